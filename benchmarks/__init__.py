"""Measurements of metastore: see docs/performance.md, and ``python -m benchmarks -h``."""
