"""Compaction: a snapshot and the sealed logs behind it become a newer snapshot.

``plan_jobs`` decides from the index and the keys of the run which blocks are copied as
they are; ``compact`` does it, in bounded memory; ``Compactor`` is the thread.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import itertools
import os
import queue
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt

from metastore.columns import Columns, Uint64s, concatenate, merge, sort_last_wins
from metastore.directory import (
    DirectoryProtocol,
    FileName,
    FileProtocol,
    file_sizes,
    read_header,
)
from metastore.errors import CorruptionError
from metastore.format import (
    BLOCK_RECORDS_TARGET,
    BLOCK_USER_DATA_SIZE_MAX,
    INDEX_DTYPE,
)
from metastore.frames import encode_block
from metastore.gate import Gate
from metastore.log import LogFile, open_log, read_logs
from metastore.pace import Pace, give_way
from metastore.parallel import ordered_map
from metastore.snapshot import SnapshotReader, SnapshotWriter, split_into_blocks

__all__ = ["Compactor", "Job", "compact", "plan_jobs"]

#: A block with fewer records, and few bytes, is joined with its neighbour.
_BLOCK_RECORDS_MIN = BLOCK_RECORDS_TARGET // 2
_BLOCK_USER_DATA_SIZE_MIN = BLOCK_USER_DATA_SIZE_MAX // 2

T = TypeVar("T")


@dataclasses.dataclass(frozen=True)
class Job:
    """Blocks ``block_start:block_stop`` of the snapshot and ``run_start:run_stop``.

    Blocks with no records of the run are copied verbatim; else both are merged.
    """

    block_start: int
    block_stop: int
    run_start: int
    run_stop: int
    #: Whether small blocks become one, although the run has nothing for them.
    is_join: bool = False

    @property
    def is_copy(self) -> bool:
        """Whether nothing has to be decoded."""
        return self.run_start == self.run_stop and not self.is_join


def _cut(start: int, stop: int) -> Iterator[tuple[int, int]]:
    """Cut a range into about equal pieces of at most a block's records."""
    n_pieces = -(-(stop - start) // BLOCK_RECORDS_TARGET)
    cuts = [start + (stop - start) * i // n_pieces for i in range(n_pieces + 1)]
    yield from itertools.pairwise(cuts)


def _units(index: npt.NDArray[np.void], run_keys: Uint64s) -> Iterator[Job]:
    """Give each block its part of the run; many records between blocks stand alone."""
    starts = np.searchsorted(run_keys, index["first_key"], side="left").tolist()
    stops = np.searchsorted(run_keys, index["last_key"], side="right").tolist()
    at = 0
    for block in range(len(index)):
        if starts[block] - at >= _BLOCK_RECORDS_MIN:
            for start, stop in _cut(at, starts[block]):
                yield Job(block, block, start, stop)
            at = starts[block]
        yield Job(block, block + 1, at, stops[block])
        at = stops[block]
    if at < len(run_keys):
        for start, stop in _cut(at, len(run_keys)):
            yield Job(len(index), len(index), start, stop)


def plan_jobs(index: npt.NDArray[np.void], run_keys: Uint64s) -> Iterator[Job]:
    """Cut a compaction into jobs, in key order, that need nothing of each other.

    Neighbours that are small are joined, so that blocks do not crumble.

    Parameters
    ----------
    index : ndarray of INDEX_DTYPE
        That of the old snapshot.
    run_keys : ndarray of uint64
        The sorted keys of the run.
    """
    n_records = index["n_records"].tolist()
    sizes = index["user_data_size"].tolist()
    joined: Job | None = None  # small so far, may take in its neighbour
    copied: Job | None = None
    joined_records = 0
    for unit in _units(index, run_keys):
        n = unit.run_stop - unit.run_start
        size = 0
        if unit.block_stop > unit.block_start:
            n += n_records[unit.block_start]
            size = sizes[unit.block_start]
        is_small = n < _BLOCK_RECORDS_MIN and size < _BLOCK_USER_DATA_SIZE_MIN
        if joined is None and unit.is_copy and not is_small:
            copied = _extend(copied, unit)
            continue
        if joined is not None and (is_small or not unit.is_copy):
            joined = dataclasses.replace(_extend(joined, unit), is_join=True)
            joined_records += n
        else:
            if joined is not None:  # a large untouched block stands behind it
                yield from _flush(copied, joined)
                joined, joined_records = None, 0
                copied = unit
                continue
            joined, joined_records = unit, n
        if joined_records >= _BLOCK_RECORDS_MIN or not is_small:
            yield from _flush(copied, joined)
            joined, copied, joined_records = None, None, 0
    yield from _flush(copied, joined)


def _extend(job: Job | None, unit: Job) -> Job:
    if job is None:
        return unit
    return dataclasses.replace(job, block_stop=unit.block_stop, run_stop=unit.run_stop)


def _flush(copied: Job | None, joined: Job | None) -> Iterator[Job]:
    if copied is not None and joined is not None and joined.is_copy:
        yield _extend(copied, joined)
        return
    if copied is not None:
        yield copied
    if joined is not None:
        yield joined


def compact(
    directory: DirectoryProtocol,
    store_id: bytes,
    snapshot: FileName | None,
    logs: Sequence[tuple[FileName, int]],
    sequence: int,
    *,
    level: int,
    threads: int,
    pace: Pace,
) -> tuple[FileName, int, int]:
    """Write, check and publish a snapshot of `snapshot` and `logs`, then remove those.

    Parameters
    ----------
    directory : DirectoryProtocol
        The directory.
    store_id : bytes
        That of the store.
    snapshot : FileName or None
        The newest snapshot.
    logs : sequence of (FileName, int)
        Every log behind it that is to be contained, with its first sequence; sealed,
        or bounded by the next.
    sequence : int
        The last sequence that those logs hold.
    level : int
        The compression level of zstd.
    threads : int
        How many threads decode, merge and encode.
    pace : Pace
        When to rest; begun.

    Returns
    -------
    name : FileName
        The new snapshot; durable.
    size, weight : int
        Its size in bytes, and what it counts for.
    """
    name = FileName("snapshot", logs[-1][0].number)
    run = _read_run(directory, store_id, logs, sequence, threads, pace)
    pace.rest()
    reader = _open_snapshot(directory, snapshot, str(snapshot)) if snapshot else None
    writer = SnapshotWriter(directory, name, store_id, sequence, threads, pace)
    try:
        _write_jobs(writer, reader, run, level, threads, pace)
        writer.finish()
        # Nothing is removed before what contains it was read back.
        size, weight = _check(directory, name, threads, pace)
        writer.publish()
    finally:
        writer.close()
    for old in [*(log for log, _ in logs), *([snapshot] if snapshot else [])]:
        directory.remove(str(old))
    directory.sync()
    return name, size, weight


def _check(
    directory: DirectoryProtocol, name: FileName, threads: int, pace: Pace
) -> tuple[int, int]:
    """Read a snapshot back that is not published yet; return its size and weight."""
    reader = _open_snapshot(directory, name, name.temporary)
    reader.check_payloads(threads, pace)
    return reader.size, reader.weight


def _open_snapshot(
    directory: DirectoryProtocol, name: FileName, path: str
) -> SnapshotReader:
    file = directory.open(path)
    try:
        return SnapshotReader(file, read_header(file, name))
    finally:
        file.close()


def _read_run(
    directory: DirectoryProtocol,
    store_id: bytes,
    logs: Sequence[tuple[FileName, int]],
    sequence: int,
    threads: int,
    pace: Pace,
) -> Columns:
    """Return the records of all logs, sorted, tombstones included."""
    threads = pace.threads(threads)
    bounds = [first for _, first in logs[1:]] + [sequence + 1]

    def prepare(name: FileName, first: int, bound: int, file: FileProtocol) -> LogFile:
        header = read_header(file, name)
        if header.store_id != store_id or header.sequence != first:
            raise CorruptionError(file.path, 0, "the log was exchanged for another")
        return LogFile(file, header, bound, is_mapped=True)

    contents, parts = read_logs(
        (
            open_log(directory, name, functools.partial(prepare, name, first, bound))
            for (name, first), bound in zip(logs, bounds, strict=True)
        ),
        sum(file_sizes(directory, [name for name, _ in logs]).values()),
        threads=threads,
        on_bytes=lambda _: pace.rest(),
    )
    for content in contents:
        if content.damage is not None:
            raise content.damage
    return sort_last_wins(concatenate(parts), threads)


def _write_jobs(
    writer: SnapshotWriter,
    reader: SnapshotReader | None,
    run: Columns,
    level: int,
    threads: int,
    pace: Pace,
) -> None:
    index = reader.index if reader else np.zeros(0, dtype=INDEX_DTYPE)

    def work(job: Job) -> Job | list[tuple[Columns, bytearray]]:
        if job.is_copy:
            return job
        with pace.at_work():
            old = [
                reader.read_block(block)
                for block in range(job.block_start, job.block_stop)
                if reader
            ]
            give_way()
            merged = merge(concatenate(old), run.part(job.run_start, job.run_stop))
            return [
                (part, encode_block(part, level)) for part in split_into_blocks(merged)
            ]

    jobs = plan_jobs(index, run.keys)
    for done in ordered_map(work, jobs, threads, pace.at_once):
        if isinstance(done, Job):
            assert reader is not None
            for block in range(done.block_start, done.block_stop):
                writer.copy_block(reader, block)
                pace.rest()
            continue
        for columns, frame in done:
            writer.put_block(columns, frame)
        pace.rest()


def _yield_to_commits() -> None:
    """Let this thread, and those that it starts, preempt no other when they wake."""
    if not hasattr(os, "SCHED_BATCH"):
        return
    with contextlib.suppress(OSError):  # as in a container that forbids it
        if os.sched_getscheduler(0) == os.SCHED_OTHER:
            os.sched_setscheduler(0, os.SCHED_BATCH, os.sched_param(0))


@dataclasses.dataclass(frozen=True)
class _Task:
    run: Callable[[], Any]
    is_brief: bool
    #: Whether it is left undone if the compactor is stopped before.
    is_dropped: bool = True


_NOTHING = _Task(lambda: None, is_brief=True)


def _taken(things: queue.SimpleQueue[T]) -> Iterator[T]:
    """Take out what is there, as others may at the same time."""
    with contextlib.suppress(queue.Empty):
        while True:
            yield things.get_nowait()


class Compactor:
    """The one background thread: it runs tasks in order until it is stopped.

    Who calls takes no lock. A signal handler may come at any moment of a call, raise,
    or stop the compactor, for whose thread it then waits: neither may find one taken.

    Parameters
    ----------
    on_failure : callable
        Told the exception of a task; no task runs after it.
    """

    def __init__(self, on_failure: Callable[[BaseException], None]) -> None:
        self._on_failure = on_failure
        self._tasks: queue.SimpleQueue[_Task] = queue.SimpleQueue()
        self._running: list[_Task] = []  # inline a task may submit one
        self._is_stopping = False
        self._ended = Gate()
        self._ended.open()
        #: Who waits until there is no task, and what is to be done when none runs any
        #: more: by who takes it out.
        self._gates: queue.SimpleQueue[Gate] = queue.SimpleQueue()
        self._lasts: queue.SimpleQueue[Callable[[], Any]] = queue.SimpleQueue()
        self._thread: threading.Thread | None = None

    def start(self) -> None:
        """Start the thread; without it tasks run in the caller, as tests want it."""
        self._ended = Gate()
        # A daemon, since interpreter exit must not wait for a forgotten store.
        self._thread = threading.Thread(
            target=self._work, name="metastore-compactor", daemon=True
        )
        try:
            self._thread.start()
        except BaseException:  # an interrupt may come when it runs already
            self._ask_to_stop()
            self._ended.open()
            self._thread = None
            raise

    @property
    def is_this_thread(self) -> bool:
        """Whether the calling thread is that of the tasks."""
        return self._thread is threading.current_thread()

    def submit(self, task: Callable[[], Any], *, is_brief: bool = False) -> None:
        """Queue a task; a brief one waits for no other thread."""
        if self._thread is None:
            self._run(_Task(task, is_brief))
        else:
            self._tasks.put(_Task(task, is_brief))

    def wait_idle(self) -> None:
        """Return when no task runs and none waits."""
        gate = Gate()
        self._tasks.put(_Task(lambda: self._gates.put(gate), True, is_dropped=False))
        if self._ended.is_open:  # maybe before it saw that
            self._end()
        gate.wait()

    def stop(self) -> None:
        """Let a running task end, drop those that wait, end the thread; idempotent."""
        self._ask_to_stop()
        if self._thread is not None and not self.is_this_thread:
            self._ended.wait()
            self._thread.join()

    def stop_then(self, last: Callable[[], Any]) -> None:
        """Stop, and have `last` done when no task runs; wait for a brief one only.

        Any thread may call it, also one that the running task waits for, or its own.
        """
        self._ask_to_stop()
        # What begins from now on is dropped (see _run), so what is missing in this list
        # may be counted on not to run.
        running = self._running[:]
        is_elsewhere = self._thread not in (None, threading.current_thread())
        if running and all(task.is_brief for task in running) and is_elsewhere:
            self._ended.wait()
        self._lasts.put(last)
        if not self._running:
            self._do_lasts()

    def forget_after_fork(self) -> None:
        """In a forked child, where the thread is not: let nobody wait for it."""
        self._is_stopping = True
        self._ended.open()
        self._end()

    def _ask_to_stop(self) -> None:
        self._is_stopping = True
        self._tasks.put(_NOTHING)  # it may be waiting for one

    def _work(self) -> None:
        _yield_to_commits()
        try:
            while not self._is_stopping:
                self._run(self._tasks.get())
                if self._tasks.empty():
                    self._open_gates()
        finally:  # also if a failure cannot be told
            self._ended.open()
            self._end()

    def _run(self, task: _Task) -> None:
        self._running.append(task)
        try:
            # Asked only now: who stops it looks for what runs afterwards.
            if not (self._is_stopping and task.is_dropped):
                task.run()
        except BaseException as error:
            self._is_stopping = True
            self._on_failure(error)
        finally:
            self._running.pop()
        if self._is_stopping and self._thread is None and not self._running:
            self._do_lasts()

    def _end(self) -> None:
        for task in _taken(self._tasks):
            if not task.is_dropped:
                task.run()
        self._open_gates()
        self._do_lasts()

    def _open_gates(self) -> None:
        for gate in _taken(self._gates):
            gate.open()

    def _do_lasts(self) -> None:
        for last in _taken(self._lasts):
            last()
