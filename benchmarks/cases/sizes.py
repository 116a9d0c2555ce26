"""M1, M2, D1: memory and disk."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from typing import Any

from benchmarks import data
from benchmarks.cases.recovery import ANCESTOR, recover_once
from benchmarks.measure import Run, alternate, directory_size, isolated, reset_peak
from benchmarks.results import OURS, Row
from benchmarks.settings import NO_ROTATION, Settings, insert_arrays

__all__ = ["d1", "m1", "m2"]

_MIB = 1 << 20
_SAMPLE_SECONDS = 0.01
_KIB_OF_ANCESTOR = 1024


def _memory(run: Run, since: float = 0) -> list[tuple[float, int, int]]:
    """Return the samples `since` seconds after the start, thinned out for a plot."""
    samples = [(at - since, *sizes) for at, *sizes in run.memory if at >= since]
    return samples[:: max(1, len(samples) // 400)]


def _recovery_row(
    settings: Settings,
    name: str,
    what: str,
    fixtures: tuple[str, Callable[[], str] | None],
    factor: float,
) -> Row:
    fixture, ancestor_fixture = fixtures
    kept: dict[str, Any] = {}

    def ours(path: str) -> float:
        run = isolated(recover_once, path, 0, False, memory_seconds=_SAMPLE_SECONDS)
        kept["run"] = run
        return run.peak_size

    sides: dict[str, Callable[[], float]] = {
        OURS: lambda: settings.with_copy(fixture, ours)
    }
    ancestor = settings.ancestor
    if ancestor and ancestor_fixture:
        made = ancestor_fixture()

        def ancestors(path: str) -> float:
            found = ancestor.recover(path, for_memory=True)
            return float(found["vmhwm_kb"] * _KIB_OF_ANCESTOR)

        sides[ANCESTOR] = lambda: settings.with_copy(made, ancestors)
    samples = alternate(settings.repeat, sides)
    arrays_size = sum(kept["run"].result["sizes"])
    bound = f"{factor:g} times the result arrays + 64 MiB"
    samples[bound] = [factor * arrays_size + 64 * _MIB]
    row = Row(
        name,
        f"peak memory of {what}",
        "bytes",
        samples,
        extra={"memory": {OURS: _memory(kept["run"])}, "arrays_size": arrays_size},
    )
    return row.times_better(ANCESTOR, 1).of_limit(bound, 1)


def m1(settings: Settings) -> list[Row]:
    """Peak memory of R2 and R4."""
    n_records = settings.n(20_000_000)
    n_logged = settings.n(10_000_000)
    ancestor = settings.ancestor

    def snapshot() -> str:
        assert ancestor is not None
        return settings.fixture(
            f"ancestor-snapshot-{n_records}-0",
            lambda path: ancestor.make_snapshot(path, n_records, 0),
        )

    def log() -> str:
        assert ancestor is not None
        return settings.fixture(
            f"ancestor-log-{n_logged}-1000",
            lambda path: ancestor.make_log(path, n_logged, 1000, 8),
        )

    return [
        _recovery_row(
            settings,
            "M1 R2",
            f"recovering {n_records:,} records from a snapshot",
            (settings.snapshot(n_records, 0), snapshot),
            1.3,
        ),
        _recovery_row(
            settings,
            "M1 R4",
            f"recovering a log of {n_logged:,} records in frames of 1,000",
            (settings.log(n_logged, 1000, 8, sealed=True), log),
            2.2,
        ),
    ]


#: Stored bytes of a record without user data in a log: key, value, length.
_LOGGED_RECORD_SIZE = 20


def _compact(path: str, n_records: int, log_size: int) -> tuple[int, float]:
    """Compact random changes.

    Returns
    -------
    int
        The peak memory, over what was there.
    float
        When it began, by `time.perf_counter`.
    """
    from metastore import MetadataStore

    store, found = MetadataStore.recover(path, log_size_bytes_min=NO_ROTATION)
    del found
    n_changes = log_size // _LOGGED_RECORD_SIZE
    for start in range(n_records, n_records + n_changes, 100_000):
        stop = min(start + 100_000, n_records + n_changes)
        insert_arrays(store, data.records(start, stop, 0), sync=False)
    store.sync()
    peak = reset_peak()
    started = time.perf_counter()
    store.compact()
    size = peak()
    store.shutdown()
    return size, started


def _compaction_row(settings: Settings, n_records: int, log_size: int) -> Row:
    fixture = settings.snapshot(n_records, 0)
    # of the compaction alone: the recovery before it, of M1, takes more than it does
    memory: list[tuple[float, int, int]] = []

    def ours(path: str) -> float:
        run = isolated(
            _compact, path, n_records, log_size, memory_seconds=_SAMPLE_SECONDS
        )
        size, started = run.result
        memory[:] = _memory(run, started - run.started)
        return float(size)

    samples = alternate(
        settings.repeat, {OURS: lambda: settings.with_copy(fixture, ours)}
    )
    bound = "256 MiB"
    samples[bound] = [256.0 * _MIB]
    row = Row(
        f"M2 {n_records / 1e6:g}M",
        f"peak memory of compacting {n_records:,} records and a log of "
        f"{log_size / _MIB:g} MiB of random keys",
        "bytes",
        samples,
        extra={"memory": {OURS: memory}},
    )
    return row.of_limit(bound, 1)


def m2(settings: Settings) -> list[Row]:
    """Peak memory of compacting a 64 MiB log into a small and into a large store."""
    small, large = (
        (20_000_000, 100_000_000) if settings.large else (5_000_000, 20_000_000)
    )
    log_size = round(64 * _MIB * min(1, settings.scale))
    return [
        _compaction_row(settings, settings.n(n_records), log_size)
        for n_records in (small, large)
    ]


def _random_entropy(n_records: int) -> float:
    """Return bytes per record: a set of n random keys, a value, 8 bytes of data."""
    # log2(binomial(2^64, n)) / n, by Stirling
    key_bits = 64 - math.log2(n_records) + math.log2(math.e)
    return key_bits / 8 + 8 + 8


def _heap_entropy() -> float:
    """Return bytes per record: a length and a shard; all else follows from them."""
    return math.log2(data.HEAP_LENGTHS * data.HEAP_SHARDS) / 8


def _make_heap(path: str, n_records: int) -> None:
    from metastore import MetadataStore

    store, _ = MetadataStore.recover(path, log_size_bytes_min=NO_ROTATION)
    insert_arrays(store, data.heap_like(n_records))
    store.compact()
    store.shutdown()


def _disk_row(
    name: str,
    what: str,
    stores: tuple[str, str | None],
    n_records: int,
    goals: tuple[float, float],
) -> Row:
    ours, ancestors = stores
    ancestor_factor, entropy = goals
    samples = {OURS: [directory_size(ours) / n_records]}
    if ancestors:
        samples[ANCESTOR] = [directory_size(ancestors) / n_records]
    samples["entropy of the data"] = [entropy]
    row = Row(name, f"bytes on the disk, {what}", "bytes/record", samples)
    row.of_limit(ANCESTOR, ancestor_factor)
    return row.beside("entropy of the data")


def d1(settings: Settings) -> list[Row]:
    """Random data; and heap-like data."""
    n_random, n_heap = settings.n(5_000_000), settings.n(1_000_000)
    ancestor = settings.ancestor
    ancestors: list[str | None] = [None, None]
    if ancestor:
        ancestors = [
            settings.fixture(
                f"ancestor-snapshot-{n_random}-8",
                lambda path: ancestor.make_snapshot(path, n_random, 8),
            ),
            settings.fixture(
                f"ancestor-heap-{n_heap}",
                lambda path: ancestor.make_snapshot_of(path, data.heap_like(n_heap)),
            ),
        ]
    heap = settings.fixture(f"heap-{n_heap}", lambda path: _make_heap(path, n_heap))
    return [
        _disk_row(
            "D1 random",
            f"{n_random:,} random records with 8 bytes of user data",
            (settings.snapshot(n_random, 8), ancestors[0]),
            n_random,
            (0.9, _random_entropy(n_random)),
        ),
        _disk_row(
            "D1 heap",
            f"{n_heap:,} records of a heap: offsets that grow, lengths, shards",
            (heap, ancestors[1]),
            n_heap,
            (0.4, _heap_entropy()),
        ),
    ]
