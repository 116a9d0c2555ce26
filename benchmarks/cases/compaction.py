"""K1: a snapshot and a log become a newer snapshot."""

from __future__ import annotations

import glob
import os
import time
from collections.abc import Callable

import numpy as np

from benchmarks import data, limits
from benchmarks.ancestor import Ancestor
from benchmarks.cases.recovery import ANCESTOR
from benchmarks.data import Arrays
from benchmarks.measure import alternate, isolated, touch, warm_cache
from benchmarks.results import OURS, Row
from benchmarks.settings import NO_ROTATION, Settings, insert_arrays

__all__ = ["k1"]

COPY = "copy of the file"
_TOUCH_SIZE = 512 << 20


def _appended(n_records: int) -> Arrays:
    """Return 1% of new keys, all behind the keys of the store."""
    n_new = n_records // 100
    keys = np.uint64((1 << 64) - 1) - np.arange(n_new, dtype=np.uint64)
    return Arrays(keys, data.records(0, n_new, 0).values)


def _random(n_records: int) -> Arrays:
    """Return 1% of new keys, random as those of the store."""
    return data.records(n_records, n_records + n_records // 100, 0)


def _rewritten(n_records: int) -> Arrays:
    """Return new values for every key of the store."""
    old = data.records(0, n_records, 0)
    return Arrays(old.keys, data.records(n_records, 2 * n_records, 0).values)


def _compact(path: str, change: Callable[[int], Arrays], n_records: int) -> float:
    """Return the seconds of one compaction, of files that the recovery has just read.

    So those of the other sides are read right before their runs too.
    """
    from metastore import MetadataStore

    store, found = MetadataStore.recover(path, log_size_bytes_min=NO_ROTATION)
    del found
    changes = change(n_records)
    for start in range(0, len(changes.keys), 1000):
        insert_arrays(store, changes.slice(start, start + 1000), sync=False)
    store.sync()
    touch(_TOUCH_SIZE)
    started = time.perf_counter()
    store.compact()
    seconds = time.perf_counter() - started
    store.shutdown()
    return seconds


def _copy(settings: Settings, fixture: str) -> Callable[[], float]:
    (snapshot,) = glob.glob(os.path.join(fixture, "snapshot_*"))

    def run() -> float:
        warm_cache(fixture)
        return float(isolated(limits.copy_file, snapshot, settings.scratch()).result)

    return run


def _ancestors(
    settings: Settings, name: str, change: Callable[[int], Arrays], n_records: int
) -> Callable[[], float]:
    ancestor = settings.ancestor
    assert ancestor is not None

    def make(path: str) -> None:
        ancestor.make_snapshot(path, n_records, 0)
        ancestor.make_log_of(path, change(n_records), 1000)

    fixture = settings.fixture(f"ancestor-{name}-{n_records}", make)
    return lambda: settings.with_copy(fixture, lambda path: _phases(ancestor, path))


def _phases(ancestor: Ancestor, path: str) -> float:
    warm_cache(path)
    isolated(touch, _TOUCH_SIZE)
    return ancestor.compact(path)


def _case(
    settings: Settings,
    name: str,
    what: str,
    change: Callable[[int], Arrays],
    n_records: int,
) -> Row:
    fixture = settings.snapshot(n_records, 0)

    def ours(path: str) -> float:
        return float(isolated(_compact, path, change, n_records).result)

    sides: dict[str, Callable[[], float]] = {
        OURS: lambda: settings.with_copy(fixture, ours),
        COPY: _copy(settings, fixture),
    }
    if settings.ancestor:
        sides[ANCESTOR] = _ancestors(settings, name, change, n_records)
    samples = alternate(settings.repeat, sides)
    title = f"compact {n_records:,} records, {what}"
    return Row(f"K1 {name}", title, "s", samples).times_better(ANCESTOR, 10)


def k1(settings: Settings) -> list[Row]:
    """1% appended keys; 1% random keys; 100% rewritten, in a store of 5M records."""
    n_records = settings.n(5_000_000)
    appended = _case(settings, "appended", "1% appended keys", _appended, n_records)
    random = _case(settings, "random", "1% random keys", _random, n_records)
    rewritten = _case(settings, "rewritten", "100% rewritten", _rewritten, n_records)
    # "copy speed of the file", with room for the log that has to be read and sorted
    appended.of_limit(COPY, 1.25)
    return [appended, random.beside(COPY), rewritten.beside(COPY)]
