"""P1 to P3: the same records in other stores, side by side in one run."""

from __future__ import annotations

import importlib
import time
from collections.abc import Callable
from typing import Any

from benchmarks import data, limits
from benchmarks.cases.commits import Load, measured
from benchmarks.data import Arrays
from benchmarks.measure import (
    BenchmarkError,
    Run,
    alternate,
    directory_size,
    isolated,
    prepare_cache,
    touch,
)
from benchmarks.peers import Metastore, Peer
from benchmarks.results import Row
from benchmarks.settings import Settings

__all__ = ["p1", "p2", "p3"]

#: Peers with a key for each record, which the tables name one by one.
KEYED = ("LMDB", "RocksDB", "LevelDB", "SQLite")
COLUMNS = "np.load of the columns (no safety)"
RAW_LOG = "raw arrays appended, fdatasync"
_BATCH_RECORDS = 100_000
#: Memory that the warm-up touches, per record: Python objects for key and value.
_TOUCH_PER_RECORD = 200


def _load(side: type[Peer], path: str, n_records: int, verify: bool) -> float:
    """Return the seconds to open a store and have all its records as arrays."""
    importlib.import_module(side.module)  # outside the clock, for every side
    touch(_TOUCH_PER_RECORD * n_records)
    started = time.perf_counter()
    store = side(path)
    found = store.load()
    seconds = time.perf_counter() - started
    if verify and data.checksum(found) != _checksum(n_records):
        raise BenchmarkError(f"{side.name} gave back other records")
    store.close()
    return seconds


def _checksum(n_records: int) -> int:
    parts = data.chunks(n_records, 1_000_000, 8)
    return sum(map(data.checksum, parts)) & ((1 << 64) - 1)


def _save_columns(path: str, n_records: int) -> None:
    limits.save_columns(path, data.records(0, n_records, 8).sorted())


def _load_columns(path: str, touch_size: int) -> float:
    touch(touch_size)
    return limits.load_columns(path)


def _sides(settings: Settings) -> list[type[Peer]]:
    return [Metastore, *settings.peers]


def _loading(
    settings: Settings, side: type[Peer], n_records: int, *, cold: bool
) -> Callable[[], float]:
    """Return a run that loads a side's store; a peer's is opened where it lies."""
    fixture = settings.peer_store(side, n_records)

    def run(path: str) -> float:
        prepare_cache(path, cold=cold)
        return float(isolated(_load, side, path, n_records, False).result)

    if side is Metastore:
        return lambda: settings.with_copy(fixture, run)
    return lambda: run(fixture)


def _verify(settings: Settings, side: type[Peer], n_records: int) -> None:
    fixture = settings.peer_store(side, n_records)

    def run(path: str) -> None:
        isolated(_load, side, path, n_records, True)

    if side is Metastore:
        settings.with_copy(fixture, run)
    else:
        run(fixture)


def _columns(settings: Settings, n_records: int, *, cold: bool) -> Callable[[], float]:
    fixture = settings.fixture(
        f"columns-{n_records}", lambda path: _save_columns(path, n_records)
    )

    def run() -> float:
        prepare_cache(fixture, cold=cold)
        return float(isolated(_load_columns, fixture, 40 * n_records).result)

    return run


def _load_row(settings: Settings, n_records: int, *, cold: bool) -> Row:
    sides: dict[str, Callable[[], float]] = {
        side.name: _loading(settings, side, n_records, cold=cold)
        for side in _sides(settings)
    }
    sides[COLUMNS] = _columns(settings, n_records, cold=cold)
    state = "page cache dropped" if cold else "warm"
    row = Row(
        f"P1 {n_records / 1e6:g}M {'cold' if cold else 'warm'}",
        f"open and load {n_records:,} records with 8 bytes of user data, {state}",
        "s",
        alternate(settings.repeat, sides),
        extra={"n_records": n_records, "cold": cold},
    )
    for side in KEYED:
        row.times_better(side, 20)
    row.times_better_than_best((peer.name for peer in settings.peers), 4)
    return row.beside(COLUMNS) if cold else row.of_limit(COLUMNS, 2.5)


def p1(settings: Settings) -> list[Row]:
    """Full load of 1M, 5M and 20M records, warm and cold."""
    rows = []
    for n_records in map(settings.n, (1_000_000, 5_000_000, 20_000_000)):
        for side in _sides(settings):
            _verify(settings, side, n_records)
        rows += [_load_row(settings, n_records, cold=cold) for cold in (False, True)]
    return rows


def _put_all(side: type[Peer], path: str, batches: list[Arrays]) -> float:
    store = side(path)
    started = time.perf_counter()
    for batch in batches:
        store.commit_arrays(batch)
    seconds = time.perf_counter() - started
    store.close()
    return seconds


def _put(side: type[Peer], path: str, n_records: int) -> float:
    touch(_TOUCH_PER_RECORD * n_records)
    return _put_all(side, path, list(data.chunks(n_records, _BATCH_RECORDS, 8)))


def _raw_log(path: str, n_records: int) -> float:
    touch(_TOUCH_PER_RECORD * n_records)
    batches = list(data.chunks(n_records, _BATCH_RECORDS, 8))
    return limits.raw_log(path, batches)


def p2(settings: Settings) -> list[Row]:
    """5M records in durable batches of 100,000."""
    n_records = settings.n(5_000_000)

    def putting(side: type[Peer]) -> Callable[[], float]:
        return lambda: settings.with_scratch(
            lambda path: float(isolated(_put, side, path, n_records).result)
        )

    sides: dict[str, Callable[[], float]] = {
        side.name: putting(side) for side in _sides(settings)
    }
    sides[RAW_LOG] = lambda: float(
        isolated(_raw_log, settings.scratch(), n_records).result
    )
    row = Row(
        "P2",
        f"store {n_records:,} records in durable batches of {_BATCH_RECORDS:,}",
        "s",
        alternate(settings.repeat, sides),
    )
    row.times_better("LMDB", 20)
    row.times_better_than_best((peer.name for peer in settings.peers), 3)
    return [row.of_limit(RAW_LOG, 1.2)]


def _commit_rows(settings: Settings) -> list[Row]:
    rows = []
    for name, what, load, records in (
        ("C1", "of one record, 1 thread", Load(settings.n(10_000), 1, 1), 1),
        ("C2 8", "of one record, 8 threads", Load(settings.n(10_000), 1, 8), 1),
        ("C2 64", "of one record, 64 threads", Load(settings.n(10_000), 1, 64), 1),
        ("C3", "of 1,000 records, 1 thread", Load(settings.n(200), 1000, 1), 1000),
    ):
        kept: dict[str, list[dict[str, Any]]] = {}
        sides: dict[str, Callable[[], float]] = {
            side.name: measured(settings, side, load, kept)
            for side in _sides(settings)
            if side.commits
        }
        samples = {
            side: [rate * records for rate in rates]
            for side, rates in alternate(settings.repeat, sides).items()
        }
        row = Row(f"P3 {name}", f"durable commits {what}: records/s", "/s", samples)
        row.times_better_than_best((peer.name for peer in settings.peers), 1)
        rows.append(row)
    return rows


def _memory_row(settings: Settings, n_records: int) -> Row:
    memory: dict[str, Any] = {}

    def peak(side: type[Peer], path: str) -> float:
        run: Run = isolated(_load_only, side, path, memory_seconds=0.01)
        memory[side.name] = run.memory[:: max(1, len(run.memory) // 400)]
        return run.peak_size

    def peaking(side: type[Peer]) -> Callable[[], float]:
        fixture = settings.peer_store(side, n_records)
        if side is Metastore:
            return lambda: settings.with_copy(fixture, lambda path: peak(side, path))
        return lambda: peak(side, fixture)

    samples = alternate(
        settings.repeat, {side.name: peaking(side) for side in _sides(settings)}
    )
    row = Row(
        "P3 memory",
        f"peak memory of loading {n_records:,} records",
        "bytes",
        samples,
        extra={"memory": memory},
    )
    return row.times_better_than_best((peer.name for peer in settings.peers), 1)


def _load_only(side: type[Peer], path: str) -> None:
    store = side(path)
    store.load()
    store.close()


def p3(settings: Settings) -> list[Row]:
    """C1 to C3, bytes on the disk and peak memory of the peers."""
    n_records = settings.n(5_000_000)
    disk = Row(
        "P3 disk",
        f"bytes on the disk of {n_records:,} records",
        "bytes/record",
        {
            side.name: [
                directory_size(settings.peer_store(side, n_records)) / n_records
            ]
            for side in _sides(settings)
        },
    )
    disk.times_better_than_best((peer.name for peer in settings.peers), 1)
    return [*_commit_rows(settings), disk, _memory_row(settings, n_records)]
