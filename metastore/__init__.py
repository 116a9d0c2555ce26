"""A durable map ``u64 -> (nonzero u64, bytes)`` for storage engines in Python."""

from metastore.columns import Recovered
from metastore.errors import (
    CorruptionError,
    FormatVersionError,
    MetastoreError,
    StoreClosedError,
    StoreFailedError,
    StoreLockedError,
)
from metastore.report import RecoveryReport, StoreStats
from metastore.store import MetadataStore

__all__ = [
    "CorruptionError",
    "FormatVersionError",
    "MetadataStore",
    "MetastoreError",
    "Recovered",
    "RecoveryReport",
    "StoreClosedError",
    "StoreFailedError",
    "StoreLockedError",
    "StoreStats",
]

__version__ = "0.1.0"
