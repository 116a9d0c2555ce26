"""C1 to C6: batches that are durable when the call returns."""

from __future__ import annotations

import dataclasses
import functools
import itertools
import os
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor, wait
from typing import Any

import numpy as np

from benchmarks import data, limits
from benchmarks.cases.recovery import ANCESTOR
from benchmarks.measure import (
    alternate,
    isolated,
    linked,
    quantiles,
    spread,
    unchanged,
)
from benchmarks.peers import Batch, Metastore, Peer
from benchmarks.results import OURS, Row
from benchmarks.settings import NO_ROTATION, Settings, insert_arrays

__all__ = ["Load", "c1", "c2", "c3", "c4", "c5", "c6", "commit_rate"]

BARE = "bare pwrite + fdatasync, zeroed file"
APPENDING = "bare pwrite + fdatasync, growing file"
WALK = "hash() of the same tuples"
FRAMES = "making their frames alone"
GROUPS = "bare writes of as many frames"
#: Stored bytes of a batch of one record with 8 bytes of user data.
_ONE_RECORD_FRAME_SIZE = 80
#: Below this a distribution says nothing.
_COMMITS_MIN = 50


@dataclasses.dataclass(frozen=True)
class Load:
    """What is committed: how many batches of how many records, by how many threads."""

    n_batches: int
    batch_records: int
    n_threads: int
    #: Stop early after so long; 0: never.
    seconds_max: float = 0
    #: Whether one more thread spins in pure Python.
    spin: bool = False
    #: How long each thread computes, in Python, between two commits.
    compute_seconds: float = 0
    #: After how long the interpreter asks a thread for its lock; 0: as it is set.
    switch_seconds: float = 0


class _Spinner:
    """A thread that never waits; how often it went round tells if it was stopped."""

    def __init__(self, active: bool) -> None:
        #: Rounds a second between its own first and last one.
        self.speed = 0.0
        self._stop = False
        self._thread = threading.Thread(target=self._spin) if active else None

    def _spin(self) -> None:
        rounds = 0
        started = time.perf_counter()
        while not self._stop:
            rounds += 1
        self.speed = rounds / (time.perf_counter() - started)

    def __enter__(self) -> _Spinner:
        if self._thread:
            self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop = True
        if self._thread:
            self._thread.join()


def _batches(load: Load) -> list[Batch]:
    total = load.n_batches * load.batch_records
    rows = data.records(0, total, 8).tuples()
    return [
        rows[start : start + load.batch_records]
        for start in range(0, total, load.batch_records)
    ]


def commit_rate(side: type[Peer], path: str, load: Load) -> dict[str, Any]:
    """Commit to a new store; called in a process of its own.

    Returns
    -------
    dict
        Commits per second, the distribution of latencies, how often the spinning
        thread went round in a second, and how many commits shared a write.
    """
    if load.switch_seconds:
        sys.setswitchinterval(load.switch_seconds)
    batches = _batches(load)
    store = side(path)
    ready = threading.Barrier(load.n_threads + 1)
    compute_ns = int(load.compute_seconds * 1e9)

    def work(own: list[Batch]) -> list[int]:
        found = []
        clock = time.perf_counter_ns
        ready.wait()
        stop = clock() + int(load.seconds_max * 1e9) if load.seconds_max else 1 << 63
        for batch in own:
            started = clock()
            if started > stop:
                break
            store.commit(batch)
            ended = clock()
            found.append(ended - started)
            while clock() < ended + compute_ns:
                pass
        return found

    shares = [batches[number :: load.n_threads] for number in range(load.n_threads)]
    with ThreadPoolExecutor(load.n_threads) as pool:
        futures = [pool.submit(work, share) for share in shares]
        # not before: it would have most of the time in which the threads are made
        with _Spinner(load.spin) as spinner:
            ready.wait()
            started = time.perf_counter()
            wait(futures)
            seconds = time.perf_counter() - started
    found = list(itertools.chain(*(future.result() for future in futures)))
    group = store.batches_per_write()
    store.close()
    return {
        "rate": len(found) / seconds,
        "latencies": quantiles(found),
        "spins": spinner.speed,
        "group": group,
    }


def measured(
    settings: Settings,
    side: type[Peer],
    load: Load,
    kept: dict[str, list[dict[str, Any]]],
) -> Callable[[], float]:
    """Return a run of :func:`commit_rate`; `kept` gets every result, by side."""

    def run(path: str) -> float:
        found: dict[str, Any] = isolated(commit_rate, side, path, load).result
        kept.setdefault(side.name, []).append(found)
        return float(found["rate"])

    return lambda: settings.with_scratch(run)


def _bare(
    settings: Settings, size: int, n_writes: int, *, zeroed: bool = True
) -> list[int]:
    """Return the latencies of the bare loop."""
    path = settings.scratch()
    latencies_ns: list[int] = isolated(
        limits.write_and_sync, path, size, n_writes, zeroed
    ).result
    return latencies_ns


def _rate(latencies_ns: list[int], per_write: float = 1) -> float:
    return per_write * len(latencies_ns) / (sum(latencies_ns) / 1e9)


def _bare_groups(settings: Settings, n_frames: float) -> float:
    """Return commits a second if so many on average share each bare write."""
    size = round(_ONE_RECORD_FRAME_SIZE * n_frames)
    return _rate(_bare(settings, size, settings.n(2_000)), n_frames)


def _ancestor(settings: Settings, load: Load, field: str) -> Callable[[], float]:
    ancestor = settings.ancestor
    assert ancestor is not None

    def run(path: str) -> float:
        n_records = load.n_batches * load.batch_records
        found = ancestor.fill(path, n_records, load.batch_records, load.n_threads)
        return float(found[field])

    return lambda: settings.with_scratch(run)


def c1(settings: Settings) -> list[Row]:
    """Durable one-record commits, one thread; in many short turns."""
    load = Load(settings.n(5_000), 1, 1)
    kept: dict[str, list[dict[str, Any]]] = {}
    bare_ns: list[int] = []

    def bare() -> float:
        bare_ns[:] = _bare(settings, _ONE_RECORD_FRAME_SIZE, load.n_batches)
        return _rate(bare_ns)

    sides: dict[str, Callable[[], float]] = {
        OURS: measured(settings, Metastore, load, kept),
        BARE: bare,
    }
    if settings.ancestor:
        sides[ANCESTOR] = _ancestor(settings, load, "batches_per_s")
    samples = alternate(4 * settings.repeat, sides)
    row = Row(
        "C1",
        "durable commits of one record, 1 thread",
        "/s",
        samples,
        extra={
            "latencies": {OURS: kept[OURS][-1]["latencies"], BARE: quantiles(bare_ns)}
        },
    )
    return [row.times_better(ANCESTOR, 1.4).of_limit(BARE, 0.9)]


def _with_bare_groups(
    settings: Settings,
    ours: Callable[[], float],
    kept: dict[str, list[dict[str, Any]]],
) -> tuple[Callable[[], float], list[float]]:
    """Return a side that is ours and then its bare writes, and the rates of these.

    As a side of their own they would come first in every other round, and would have to
    take the size of the groups from the round before.
    """
    in_groups: list[float] = []

    def run() -> float:
        rate = ours()
        os.sync()  # as between any two sides
        in_groups.append(_bare_groups(settings, kept[OURS][-1]["group"]))
        return rate

    return run, in_groups


def c2(settings: Settings) -> list[Row]:
    """The same with 8 and with 64 threads."""
    rows = []
    for n_threads, factor in ((8, 4), (64, 8)):
        load = Load(settings.n(20_000), 1, n_threads)
        kept: dict[str, list[dict[str, Any]]] = {}
        full = f"bare writes of {n_threads} frames"
        ours = measured(settings, Metastore, load, kept)
        ours_and_groups, in_groups = _with_bare_groups(settings, ours, kept)
        sides: dict[str, Callable[[], float]] = {
            OURS: ours_and_groups,
            full: lambda n=n_threads: _bare_groups(settings, n),
        }
        if settings.ancestor:
            sides[ANCESTOR] = _ancestor(settings, load, "batches_per_s")
        samples = alternate(settings.repeat, sides)
        groups = [found["group"] for found in kept[OURS]]
        row = Row(
            f"C2 {n_threads}",
            f"durable commits of one record, {n_threads} threads",
            "/s",
            {OURS: samples.pop(OURS), GROUPS: in_groups, **samples},
            extra={
                "latencies": {OURS: kept[OURS][-1]["latencies"]},
                "groups": groups,
            },
        )
        row.notes.append(f"{spread(groups, '.1f')} commits shared a write")
        row.times_better(ANCESTOR, factor).of_limit(GROUPS, 0.5).beside(full)
        rows.append(row)
    return rows


def _unsynced(path: str, n_batches: int) -> float:
    """Return the nanoseconds per record of batches that are written, not synced."""
    from metastore import MetadataStore

    batches = _batches(Load(n_batches, 1000, 1))
    store, _ = MetadataStore.recover(path, log_size_bytes_min=NO_ROTATION)
    started = time.perf_counter()
    for batch in batches:
        store.insert_batch(batch, sync=False)
    seconds = time.perf_counter() - started
    store.shutdown()
    return seconds * 1e9 / (n_batches * 1000)


def _first_met(encode: bool, n_batches: int) -> float:
    """Return the nanoseconds per record of work on batches not touched before.

    Either their frames are made and not written, or the interpreter only visits every
    tuple, integer and byte string.
    """
    from metastore.frames import encode_batch

    batches = _batches(Load(n_batches, 1000, 1))
    started = time.perf_counter()
    for batch in batches:
        if encode:
            encode_batch(batch, 1)
        else:
            hash(tuple(batch))
    return (time.perf_counter() - started) * 1e9 / (n_batches * 1000)


def _frame_size(batch_records: int) -> int:
    """Return the stored bytes of a batch of tuples."""
    from metastore.frames import encode_batch

    return len(encode_batch(_batches(Load(1, batch_records, 1))[0], 1))


def c3(settings: Settings) -> list[Row]:
    """Batches of 1,000 tuples, one thread."""
    load = Load(settings.n(1_000), 1000, 1)
    kept: dict[str, Any] = {}
    ours = measured(settings, Metastore, load, kept)
    size = isolated(_frame_size, load.batch_records).result

    def bare(zeroed: bool) -> float:
        latencies_ns = _bare(settings, size, load.n_batches, zeroed=zeroed)
        return _rate(latencies_ns, load.batch_records)

    sides: dict[str, Callable[[], float]] = {
        OURS: lambda: ours() * 1000,
        APPENDING: lambda: bare(False),
        BARE: lambda: bare(True),
    }
    if settings.ancestor:
        sides[ANCESTOR] = _ancestor(settings, load, "entries_per_s")
    row = Row(
        "C3",
        "durable batches of 1,000 tuples, 1 thread: records a second",
        "/s",
        alternate(settings.repeat, sides),
    )
    limit = "60 ns"
    unsynced = "unsynced"
    encoding = alternate(
        settings.repeat,
        {
            OURS: lambda: float(isolated(_first_met, True, load.n_batches).result),
            WALK: lambda: float(isolated(_first_met, False, load.n_batches).result),
            unsynced: lambda: settings.with_scratch(
                lambda path: float(isolated(_unsynced, path, load.n_batches).result)
            ),
        },
    )
    written = {OURS: encoding.pop(unsynced), FRAMES: encoding[OURS]}
    return [
        row.times_better(ANCESTOR, 3).beside(APPENDING).beside(BARE),
        Row(
            "C3 encode",
            "making their frames, per record; each batch is met for the first time",
            "ns",
            {**encoding, limit: [60.0]},
        )
        .of_limit(limit, 1)
        .beside(WALK),
        Row(
            "C3 unsynced", "the same batches, not synced, per record", "ns", written
        ).beside(FRAMES),
    ]


def _insert_large(path: str, n_batches: int, batch_records: int) -> tuple[float, int]:
    """Return records a second, and the stored bytes of a batch."""
    from metastore import MetadataStore

    store, _ = MetadataStore.recover(path, log_size_bytes_min=NO_ROTATION)
    batches = list(data.chunks(n_batches * batch_records, batch_records, 8))
    started = time.perf_counter()
    for batch in batches:
        insert_arrays(store, batch)
    seconds = time.perf_counter() - started
    stored = store.stats().log_size
    store.shutdown()
    return n_batches * batch_records / seconds, stored // n_batches


def c4(settings: Settings) -> list[Row]:
    """Batches of 100,000 as arrays, one thread."""
    n_batches, batch_records = max(5, round(50 * settings.scale)), 100_000
    sizes: list[int] = []

    def ours(path: str) -> float:
        rate, size = isolated(_insert_large, path, n_batches, batch_records).result
        sizes.append(size)
        return float(rate)

    def bare(zeroed: bool) -> float:
        latencies_ns = _bare(settings, sizes[0], n_batches, zeroed=zeroed)
        return _rate(latencies_ns, batch_records)

    settings.with_scratch(ours)  # tells how many bytes we store
    samples = alternate(
        settings.repeat,
        {
            OURS: lambda: settings.with_scratch(ours),
            APPENDING: lambda: bare(False),
            BARE: lambda: bare(True),
        },
    )
    row = Row(
        "C4",
        "durable batches of 100,000 records as arrays: records a second",
        "/s",
        samples,
        extra={"batch_size": sizes[0]},
    )
    return [row.of_limit(APPENDING, 0.5).beside(BARE)]


def _latencies_of(
    store: Any, numbers: itertools.count[int], n_min: int, go_on: Callable[[], bool]
) -> list[int]:
    """Commit one record at a time, `n_min` times and then as long as `go_on()`."""
    found: list[int] = []
    while len(found) < n_min or go_on():
        key = next(numbers)
        started = time.perf_counter_ns()
        store.insert_batch([(key, (key + 1, b"8 bytes."))])
        found.append(time.perf_counter_ns() - started)
    return found


def _commit_beside_compaction(
    path: str, n_records: int, rounds: int
) -> dict[str, list[list[int]]]:
    """Return the latencies of commits while the store compacts, and before and after.

    What an idle store does changes from one half of a minute to the next by as much as
    a compaction changes it: so it is asked on both sides of each. The first warms up.
    """
    from metastore import MetadataStore

    store, found = MetadataStore.recover(path, log_size_bytes_min=NO_ROTATION)
    del found
    numbers = itertools.count(1)
    idle, busy = [], []
    for number in range(rounds + 1):
        start = n_records + number * (n_records // 100)
        insert_arrays(store, data.records(start, start + n_records // 100, 0))
        thread = threading.Thread(target=store.compact)
        thread.start()
        busy.append(_latencies_of(store, numbers, _COMMITS_MIN, thread.is_alive))
        thread.join()
        idle.append(_latencies_of(store, numbers, len(busy[-1]), lambda: False))
    store.shutdown()
    around = [before + after for before, after in itertools.pairwise(idle)]
    return {"idle": around, "busy": busy[1:]}


def c5(settings: Settings) -> list[Row]:
    """Latencies of C1 while 1% random keys are compacted into a 20M store."""
    n_records = settings.n(20_000_000)
    fixture = settings.snapshot(n_records, 0)

    def run(path: str) -> dict[str, list[list[int]]]:
        marks = linked(fixture, path)
        found: dict[str, list[list[int]]] = isolated(
            _commit_beside_compaction, path, n_records, settings.repeat
        ).result
        unchanged(marks)
        return found

    found = settings.with_scratch(run)
    rows = []
    for fraction, factor in ((0.5, None), (0.99, 2), (0.999, 3)):
        seconds = {
            side: [float(np.quantile(some, fraction)) / 1e9 for some in found[side]]
            for side in ("busy", "idle")
        }
        row = Row(
            f"C5 p{fraction * 100:g}",
            f"latency of commits while {n_records:,} records compact, "
            f"{fraction * 100:g}th percentile",
            "s",
            {OURS: seconds["busy"], "idle": seconds["idle"]},
        )
        rows.append(row.of_limit("idle", factor) if factor else row.beside("idle"))
    rows[0].extra["latencies"] = {
        "compacting": quantiles(list(itertools.chain(*found["busy"]))),
        "idle": quantiles(list(itertools.chain(*found["idle"]))),
    }
    return rows


def _spins_alone(seconds: float) -> float:
    """Return how often the spinning thread goes round a second with nobody beside."""
    with _Spinner(True) as spinner:
        threading.Event().wait(seconds)
    return spinner.speed


def c6(settings: Settings) -> list[Row]:
    """C1 and C2 beside one thread that spins in pure Python."""
    seconds = max(0.3, 2 * min(1, settings.scale))
    load = functools.partial(Load, 50_000, 1, seconds_max=seconds, spin=True)
    short = "C6 1 short interval"
    rows = []
    for name, what, some in (
        ("C6 1", "1 thread", load(n_threads=1)),
        (
            short,
            "1 thread, with sys.setswitchinterval(0.0005)",
            load(n_threads=1, switch_seconds=500e-6),
        ),
        ("C6 8", "8 threads", load(n_threads=8)),
        (
            "C6 8 computing",
            "8 threads that compute 50 us between two",
            load(n_threads=8, compute_seconds=50e-6),
        ),
        ("C6 64", "64 threads", load(n_threads=64)),
    ):
        row = _beside_spinner(settings, name, what, some)
        if name != short:  # shows a way out; nothing has to be reached by it
            for side in ("LMDB", "LevelDB", "SQLite"):
                row.times_better(side, 1)
        rows.append(row)
    return rows


def _beside_spinner(settings: Settings, name: str, what: str, load: Load) -> Row:
    """Measure ourselves and the peers, and a spinner by itself in each round too."""
    kept: dict[str, list[dict[str, Any]]] = {}
    sides: dict[str, Callable[[], float]] = {
        side.name: measured(settings, side, load, kept)
        for side in (Metastore, *settings.peers)
        if side.commits
    }
    alone = "alone"
    sides[alone] = lambda: float(isolated(_spins_alone, load.seconds_max).result)
    samples = alternate(settings.repeat, sides)
    speeds = samples.pop(alone)
    row = Row(
        name,
        f"durable commits of one record, {what}, beside one that spins",
        "/s",
        samples,
    )
    for side, found in kept.items():
        kept_speed = [
            some["spins"] / speed for some, speed in zip(found, speeds, strict=True)
        ]
        row.notes.append(
            f"beside {side} the spinning thread kept {spread(kept_speed, '.0%')} of "
            "its speed"
        )
    return row
