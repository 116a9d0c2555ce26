"""How one figure comes about: isolated runs, touched memory, alternating sides."""

from __future__ import annotations

import dataclasses
import multiprocessing
import os
import statistics
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from multiprocessing.connection import Connection
from typing import Any

import numpy as np

__all__ = [
    "BenchmarkError",
    "Run",
    "alternate",
    "directory_size",
    "drop_cache",
    "isolated",
    "linked",
    "prepare_cache",
    "quantiles",
    "reset_peak",
    "spread",
    "summary",
    "touch",
    "unchanged",
    "warm_cache",
]

_PAGE_SIZE = 4096
#: Where in a distribution of latencies we look: dense towards the end.
_QUANTILES = 1 - np.logspace(0, -4, 161)


class BenchmarkError(Exception):
    """A benchmark cannot run here; the message says why and what to do."""


@dataclasses.dataclass
class Run:
    """What an isolated function returned, and the memory it took."""

    result: Any
    #: Peak of the resident memory over what was resident at the start, in bytes.
    peak_size: int
    #: (seconds since the start, anonymous bytes, file-backed bytes), if sampled.
    memory: list[tuple[float, int, int]]
    #: The start, by `time.perf_counter`, which all processes share.
    started: float = 0


def _status_sizes(pid: int | str, *names: str) -> list[int]:
    """Return fields of /proc/PID/status in bytes; 0 where the system has none."""
    try:
        with open(f"/proc/{pid}/status", encoding="ascii") as lines:
            fields = dict(line.split(":", 1) for line in lines)
    except OSError:
        return [0] * len(names)
    return [int(fields.get(name, "0 kB").split()[0]) * 1024 for name in names]


def reset_peak() -> Callable[[], int]:
    """Start to watch the peak of this process's resident memory.

    Returns
    -------
    callable
        Gives the peak since now, over what was resident now, in bytes.
    """
    try:
        with open("/proc/self/clear_refs", "w", encoding="ascii") as file:
            file.write("5")
    except OSError:  # then the peak is one of earlier: too high, never too low
        pass
    (before,) = _status_sizes("self", "VmRSS")
    return lambda: max(0, _status_sizes("self", "VmHWM")[0] - before)


def touch(size: int) -> None:
    """Write to `size` bytes of new memory and free it again.

    On a virtual machine the first touch of a page may wait for the host, 10 times and
    more as long as the fault itself: each side pays that here, ahead of its run.
    """
    block = np.empty(size, np.uint8)
    block[::_PAGE_SIZE] = 1


def _child(
    connection: Connection, function: Callable[..., Any], args: tuple[Any, ...]
) -> None:
    try:
        peak = reset_peak()
        result = function(*args)
        connection.send(("returned", result, peak()))
    except BenchmarkError as error:  # says all there is to say
        connection.send(("refused", str(error), 0))
    except BaseException:
        connection.send(("failed", traceback.format_exc(), 0))
    connection.close()
    os._exit(0)  # as a killed process: no finalizer, no shutdown that was not asked for


def isolated(
    function: Callable[..., Any], *args: Any, memory_seconds: float = 0
) -> Run:
    """Call `function` in a process of its own, forked from this small one.

    Parameters
    ----------
    function : callable
        Its result must be picklable. It calls :func:`touch` itself where that matters.
    *args
        Passed on.
    memory_seconds : float
        If not 0, sample the memory of the process so often.
    """
    context = multiprocessing.get_context("fork")
    here, there = context.Pipe(duplex=False)
    process = context.Process(target=_child, args=(there, function, args))
    started = time.perf_counter()
    process.start()
    there.close()
    memory = []
    while not here.poll(memory_seconds or None):
        sizes = _status_sizes(process.pid or 0, "RssAnon", "RssFile")
        memory.append((time.perf_counter() - started, sizes[0], sizes[1]))
    try:
        outcome, result, peak = here.recv()
    except EOFError:
        process.join()
        raise BenchmarkError(
            f"the measured process died with exit code {process.exitcode}"
        ) from None
    process.join()
    if outcome == "refused":
        raise BenchmarkError(result)
    if outcome == "failed":
        raise BenchmarkError(f"the measured process failed:\n{result}")
    return Run(result, peak, memory, started)


def alternate(
    n_rounds: int, sides: Mapping[str, Callable[[], float]]
) -> dict[str, list[float]]:
    """Run every side once a round, forwards and backwards by turns.

    The n-th sample of each side is of the n-th round, so that ratios can be taken
    within rounds. What one side left to be written out is on the disk before the next
    begins: none waits for another's work.
    """
    samples: dict[str, list[float]] = {name: [] for name in sides}
    for number in range(n_rounds):
        names = list(sides)
        for name in names if number % 2 == 0 else reversed(names):
            os.sync()
            samples[name].append(sides[name]())
    return samples


def summary(samples: Sequence[float]) -> dict[str, float]:
    """Return median, least and greatest of the samples."""
    return {
        "median": statistics.median(samples),
        "min": min(samples),
        "max": max(samples),
    }


def spread(samples: Sequence[float], form: str) -> str:
    """Return median, least and greatest of the samples as a note has them."""
    found = {name: format(sample, form) for name, sample in summary(samples).items()}
    if found["min"] == found["max"]:
        return found["median"]
    return f"{found['median']} ({found['min']} to {found['max']})"


def quantiles(latencies_ns: Sequence[int]) -> list[tuple[float, float]]:
    """Return (fraction, seconds) along the distribution of latencies."""
    seconds = np.quantile(np.asarray(latencies_ns, np.float64), _QUANTILES) / 1e9
    return list(zip(_QUANTILES.tolist(), seconds.tolist(), strict=True))


def _files(path: str) -> list[str]:
    return [
        os.path.join(folder, name)
        for folder, _, names in os.walk(path)
        for name in sorted(names)
    ]


def directory_size(path: str) -> int:
    """Return the bytes that the files under `path` take on the disk."""
    return sum(os.stat(name).st_blocks * 512 for name in _files(path))


def drop_cache(path: str) -> None:
    """Write out the files under `path` and drop them from the page cache."""
    for name in _files(path):
        descriptor = os.open(name, os.O_RDONLY)
        try:
            os.fdatasync(descriptor)
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        finally:
            os.close(descriptor)


def warm_cache(path: str) -> None:
    """Read the files under `path`, so that the page cache holds them.

    A system may page out what nobody has read for a minute (Linux's DAMON does), and a
    round of a case takes longer than that.
    """
    buffer = bytearray(4 << 20)
    for name in _files(path):
        with open(name, "rb", buffering=0) as file:
            while file.readinto(buffer):
                pass


def prepare_cache(path: str, *, cold: bool) -> None:
    """Have the page cache hold none of the files under `path`, or all of them."""
    (drop_cache if cold else warm_cache)(path)


def linked(source: str, target: str) -> dict[str, tuple[int, int]]:
    """Make `target` a copy of the directory `source`, by hard links.

    A store replaces its published files and never writes to them, so a link is a copy
    that costs no page cache. The result is what :func:`unchanged` wants.
    """
    os.makedirs(target)
    marks = {}
    for name in sorted(os.listdir(source)):
        path = os.path.join(source, name)
        os.link(path, os.path.join(target, name))
        status = os.stat(path)
        marks[path] = (status.st_size, status.st_mtime_ns)
    # Else a run's first sync would wait for the links, and for whatever the last one
    # has left in the file system's journal.
    descriptor = os.open(target, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
    return marks


def unchanged(marks: Mapping[str, tuple[int, int]]) -> None:
    """Raise if a file that was linked has been written to."""
    for path, mark in marks.items():
        status = os.stat(path)
        if (status.st_size, status.st_mtime_ns) != mark:
            raise BenchmarkError(f"a run wrote to the file it was to read: {path}")
