"""R1 to R6: opening a store, until every record is there as arrays."""

from __future__ import annotations

import functools
import os
import time
from collections.abc import Callable
from typing import Any

import numpy as np

from benchmarks import data, limits
from benchmarks.ancestor import Ancestor
from benchmarks.data import Arrays
from benchmarks.measure import (
    BenchmarkError,
    alternate,
    drop_cache,
    isolated,
    prepare_cache,
    touch,
    warm_cache,
)
from benchmarks.results import OURS, Row
from benchmarks.settings import NO_ROTATION, Settings, insert_arrays

__all__ = ["ANCESTOR", "r1", "r2", "r3", "r4", "r5", "r6", "recover_once"]

ANCESTOR = "ancestor"
COPY = "copy of the result arrays"
READING = "reading the files"
#: How much memory the warm-up touches, in sizes of the result: as much as the
#: hungriest side takes.
_OUR_TOUCH, _ANCESTOR_TOUCH = 3, 6
_TOUCH_MIN = 64 << 20


def recover_once(path: str, touch_size: int, verify: bool) -> dict[str, Any]:
    """Recover a store of ours; called in a process of its own."""
    from metastore import MetadataStore

    touch(touch_size)
    started = time.perf_counter()
    store, found = MetadataStore.recover(path, log_size_bytes_min=NO_ROTATION)
    columns = (found.keys, found.values, found.offsets, found.user_data)
    seconds = time.perf_counter() - started
    result = {
        "seconds": seconds,
        "n_records": len(found.keys),
        "sizes": [column.nbytes for column in columns],
        "checksum": data.checksum(Arrays(*columns)) if verify else None,
    }
    del found, columns
    store.shutdown()
    return result


def _expected(n_records: int, user_data_size: int) -> int:
    parts = data.chunks(n_records, 1_000_000, user_data_size)
    return sum(map(data.checksum, parts)) & ((1 << 64) - 1)


def _verify(settings: Settings, fixture: str, expected: int) -> list[int]:
    """Recover once without a clock; return the sizes of the result arrays."""
    found = settings.with_copy(
        fixture, lambda path: isolated(recover_once, path, _TOUCH_MIN, True).result
    )
    if found["checksum"] != expected:
        raise BenchmarkError(
            f"recovered other records: checksum {found['checksum']:016x}, "
            f"expected {expected:016x}"
        )
    sizes: list[int] = found["sizes"]
    return sizes


def _ours(
    settings: Settings, fixture: str, result_size: int, *, cold: bool = False
) -> Callable[[], float]:
    touch_size = max(_TOUCH_MIN, _OUR_TOUCH * result_size)

    def run(path: str) -> float:
        prepare_cache(path, cold=cold)
        return float(isolated(recover_once, path, touch_size, False).result["seconds"])

    return lambda: settings.with_copy(fixture, run)


def _ancestors(
    settings: Settings, fixture: str, result_size: int, expected: int
) -> Callable[[], float]:
    ancestor = settings.ancestor
    assert ancestor is not None

    def run(path: str) -> float:
        warm_cache(path)
        isolated(touch, max(_TOUCH_MIN, _ANCESTOR_TOUCH * result_size))
        found = ancestor.recover(path)
        if int(found["checksum"], 16) != expected:
            raise BenchmarkError("the ancestor recovered other records")
        return float(found["seconds"])

    return lambda: settings.with_copy(fixture, run)


def _copy(result_sizes: list[int]) -> Callable[[], float]:
    return lambda: float(isolated(limits.copy_arrays, result_sizes).result)


def _read_cold(fixture: str) -> Callable[[], float]:
    def run() -> float:
        drop_cache(fixture)
        return limits.read_cold(fixture)

    return run


def _measure(
    settings: Settings,
    fixture: str,
    expected: int,
    ancestor_fixture: Callable[[Ancestor, str], None] | None,
    ancestor_name: str,
    more: Callable[[int], dict[str, Callable[[], float]]] = lambda result_size: {},
) -> tuple[dict[str, list[float]], list[int]]:
    """Return the samples of us, the ancestor, the copy and more; the arrays' sizes."""
    sizes = _verify(settings, fixture, expected)
    sides: dict[str, Callable[[], float]] = {
        OURS: _ours(settings, fixture, sum(sizes)),
        COPY: _copy(sizes),
        **more(sum(sizes)),
    }
    ancestor = settings.ancestor
    if ancestor and ancestor_fixture:
        made = settings.fixture(
            f"ancestor-{ancestor_name}",
            functools.partial(ancestor_fixture, ancestor),
        )
        sides[ANCESTOR] = _ancestors(settings, made, sum(sizes), expected)
    return alternate(settings.repeat, sides), sizes


def _from_snapshot(
    settings: Settings,
    name: str,
    n_records: int,
    user_data_size: int,
    ancestor_factor: float | None,
) -> list[Row]:
    fixture = settings.snapshot(n_records, user_data_size)
    expected = isolated(_expected, n_records, user_data_size).result
    samples, sizes = _measure(
        settings,
        fixture,
        expected,
        (lambda ancestor, path: ancestor.make_snapshot(path, n_records, user_data_size))
        if ancestor_factor
        else None,
        f"snapshot-{n_records}-{user_data_size}",
    )
    what = f"recover {n_records:,} records from a snapshot"
    warm = Row(name, what, "s", samples, extra={"n_records": n_records})
    if ancestor_factor:
        warm.times_better(ANCESTOR, ancestor_factor)
    warm.of_limit(COPY, 3)
    cold_samples = alternate(
        settings.repeat,
        {
            OURS: _ours(settings, fixture, sum(sizes), cold=True),
            READING: _read_cold(fixture),
        },
    )
    cold = Row(f"{name} cold", f"{what}, page cache dropped", "s", cold_samples)
    return [warm, cold.beside(READING)]


def r1(settings: Settings) -> list[Row]:
    """5M records with 8 bytes of user data."""
    return _from_snapshot(settings, "R1", settings.n(5_000_000), 8, 60)


def r2(settings: Settings) -> list[Row]:
    """20M records without user data."""
    return _from_snapshot(settings, "R2", settings.n(20_000_000), 0, 80)


def _from_log(
    settings: Settings,
    name: str,
    n_records: int,
    batch_records: int,
    ancestor_factor: float | None,
    unit_seconds_max: float,
    unit: str,
) -> list[Row]:
    expected = isolated(_expected, n_records, 8).result
    n_units = n_records if unit == "record" else -(-n_records // batch_records)
    limit = f"{unit_seconds_max * 1e9:.0f} ns per {unit}"
    rows = []
    for sealed in (True, False):
        fixture = settings.log(n_records, batch_records, 8, sealed=sealed)
        samples, _ = _measure(
            settings,
            fixture,
            expected,
            (
                lambda ancestor, path: ancestor.make_log(
                    path, n_records, batch_records, 8
                )
            )
            if sealed and ancestor_factor
            else None,
            f"log-{n_records}-{batch_records}",
            # what a killed writer left is dropped from the page cache and read again
            lambda _, fixture=fixture, sealed=sealed: (
                {} if sealed else {READING: _read_cold(fixture)}
            ),
        )
        samples[limit] = [unit_seconds_max * n_units]
        what = f"recover a log of {n_records:,} records in frames of {batch_records:,}"
        row = Row(
            name if sealed else f"{name} killed",
            what if sealed else f"{what}, its writer killed: synced and read again",
            "s",
            samples,
            extra={"n_records": n_records},
        )
        if ancestor_factor:
            row.times_better(ANCESTOR, ancestor_factor)
        rows.append(row.of_limit(limit, 1).beside(READING))
    return rows


def r3(settings: Settings) -> list[Row]:
    """A log of 1M one-record frames."""
    return _from_log(settings, "R3", settings.n(1_000_000), 1, 100, 100e-9, "frame")


def r4(settings: Settings) -> list[Row]:
    """A log of 10k frames of 1,000 records."""
    return _from_log(settings, "R4", settings.n(10_000_000), 1000, 30, 80e-9, "record")


def _add_changes(path: str, n_records: int, n_changes: int, batch: int) -> None:
    """Log changes to records 0 to `n_records`; a store without any is created."""
    from metastore import MetadataStore

    store, _ = MetadataStore.recover(path, log_size_bytes_min=NO_ROTATION)
    changes = data.changes(n_records, n_changes)
    for start in range(0, n_changes, batch):
        insert_arrays(store, changes.slice(start, start + batch), sync=False)
    store.sync()
    store.shutdown()


def _changed(n_records: int, n_changes: int) -> int:
    """Return the checksum of the records with the changes applied."""
    changes = data.changes(n_records, n_changes)
    # of equal keys the last: the first in the reversed order
    keys, firsts = np.unique(changes.keys[::-1], return_index=True)
    values = changes.values[::-1][firsts]
    total = data.checksum(Arrays(keys[values != 0], values[values != 0]))
    for part in data.chunks(n_records, 1_000_000, 0):
        places = np.minimum(np.searchsorted(keys, part.keys), len(keys) - 1)
        kept = keys[places] != part.keys
        total += data.checksum(Arrays(part.keys[kept], part.values[kept]))
    return total & ((1 << 64) - 1)


def _ancestors_changes(
    ancestor: Ancestor, path: str, n_records: int, n_changes: int
) -> None:
    ancestor.make_snapshot(path, n_records, 0)
    ancestor.make_log_of(path, data.changes(n_records, n_changes), 1000)


def r5(settings: Settings) -> list[Row]:
    """A 20M snapshot and a log of 4M updates, inserts and deletions."""
    n_records, n_changes = settings.n(20_000_000), settings.n(4_000_000)
    snapshot = settings.snapshot(n_records, 0)

    def make(path: str) -> None:
        settings.with_copy(snapshot, lambda copy: _copy_and_change(copy, path))

    def _copy_and_change(copy: str, path: str) -> None:
        _add_changes(copy, n_records, n_changes, 1000)
        os.rename(copy, path)

    fixture = settings.fixture(f"changed-{n_records}-{n_changes}", make)
    log = settings.fixture(
        f"changes-{n_records}-{n_changes}",
        lambda path: _add_changes(path, n_records, n_changes, 1000),
    )
    expected = isolated(_changed, n_records, n_changes).result
    sum_of_parts = "the snapshot alone and the same log alone"

    def parts(result_size: int) -> dict[str, Callable[[], float]]:
        snapshot_alone = _ours(settings, snapshot, result_size)
        log_alone = _ours(settings, log, result_size)
        return {sum_of_parts: lambda: snapshot_alone() + log_alone()}

    samples, _ = _measure(
        settings,
        fixture,
        expected,
        lambda ancestor, path: _ancestors_changes(ancestor, path, n_records, n_changes),
        f"changed-{n_records}-{n_changes}",
        parts,
    )
    row = Row(
        "R5",
        f"recover a snapshot of {n_records:,} records and a log of {n_changes:,} "
        "updates, inserts and deletions",
        "s",
        samples,
    )
    return [row.times_better(ANCESTOR, 40).of_limit(sum_of_parts, 1.6)]


def r6(settings: Settings) -> list[Row]:
    """R1 to R4 at 100M records, R3 at 10M, each against its small case."""
    rows = []
    for name, small, large, user_data_size, batch in (
        ("R1", 5_000_000, 100_000_000, 8, 0),
        ("R2", 20_000_000, 100_000_000, 0, 0),
        ("R3", 1_000_000, 10_000_000, 8, 1),
        ("R4", 10_000_000, 100_000_000, 8, 1000),
    ):
        sides = {}
        for n_records in (settings.n(small), settings.n(large)):
            fixture = (
                settings.log(n_records, batch, user_data_size, sealed=True)
                if batch
                else settings.snapshot(n_records, user_data_size)
            )
            _verify(
                settings, fixture, isolated(_expected, n_records, user_data_size).result
            )
            run = _ours(settings, fixture, n_records * (24 + user_data_size))
            sides[n_records] = functools.partial(_scaled, run, 1e9 / n_records)
        small_name = f"{settings.n(small):,} records"
        samples = alternate(
            settings.repeat,
            {small_name: sides[settings.n(small)], OURS: sides[settings.n(large)]},
        )
        row = Row(
            f"R6 {name}",
            f"{name} with {settings.n(large):,} records, per record",
            "ns",
            samples,
            extra={"n_records": settings.n(large)},
        )
        rows.append(row.of_limit(small_name, 1.3))
        settings.drop_fixtures()
    return rows


def _scaled(run: Callable[[], float], factor: float) -> float:
    return run() * factor
