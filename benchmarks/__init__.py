"""Measurements of metastore: docs/performance.md, ``python -m benchmarks -h``."""
