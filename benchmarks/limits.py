"""What the machine allows: the same bytes without a store around them."""

from __future__ import annotations

import os
import time

import numpy as np
import numpy.typing as npt

from benchmarks.data import Arrays
from benchmarks.measure import touch, warm_cache

__all__ = [
    "copy_arrays",
    "copy_file",
    "load_columns",
    "raw_log",
    "read_cold",
    "save_columns",
    "write_and_sync",
]

_CHUNK_SIZE = 1 << 20


def copy_arrays(sizes: list[int]) -> float:
    """Return the seconds to copy arrays of so many bytes into new memory."""
    sources = [np.ones(size, np.uint8) for size in sizes]
    touch(sum(sizes))
    started = time.perf_counter()
    copies = [source.copy() for source in sources]
    seconds = time.perf_counter() - started
    assert len(copies) == len(sources)
    return seconds


def _zeroed(path: str, size: int) -> int:
    """Create a file of `size` durable zeros; return its descriptor."""
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL)
    zeros = bytes(_CHUNK_SIZE)
    for offset in range(0, size, _CHUNK_SIZE):
        os.pwrite(descriptor, zeros[: size - offset], offset)
    os.fsync(descriptor)
    return descriptor


def write_and_sync(
    path: str, size: int, n_writes: int, zeroed: bool = True
) -> list[int]:
    """Write `size` bytes and sync, again and again.

    Parameters
    ----------
    path : str
        A new file; it is removed at the end.
    size, n_writes : int
        How much, and how often.
    zeroed : bool
        Whether the file is full of durable zeros before, or grows.

    Returns
    -------
    list of int
        The nanoseconds of each write with its sync.
    """
    data = os.urandom(min(size, _CHUNK_SIZE)) * (size // _CHUNK_SIZE + 1)
    data = data[:size]
    descriptor = _zeroed(path, size * n_writes if zeroed else 0)
    latencies_ns = []
    try:
        for number in range(n_writes):
            started = time.perf_counter_ns()
            os.pwrite(descriptor, data, number * size)
            os.fdatasync(descriptor)
            latencies_ns.append(time.perf_counter_ns() - started)
    finally:
        os.close(descriptor)
        os.unlink(path)
    return latencies_ns


def raw_log(path: str, batches: list[Arrays]) -> float:
    """Return the seconds to append the batches' columns, a sync after each."""
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL)
    try:
        started = time.perf_counter()
        for batch in batches:
            columns = (batch.keys, batch.values, batch.offsets, batch.user_data)
            buffers = [memoryview(c).cast("B") for c in columns if c is not None]
            size = sum(len(buffer) for buffer in buffers)
            if os.writev(descriptor, buffers) != size:
                raise OSError("the disk took only a part of a write")
            os.fdatasync(descriptor)
        return time.perf_counter() - started
    finally:
        os.close(descriptor)
        os.unlink(path)


def save_columns(path: str, arrays: Arrays) -> None:
    """Save the columns as bare .npy files in the new directory `path`."""
    os.makedirs(path)
    for name in ("keys", "values", "offsets", "user_data"):
        column: npt.NDArray[np.generic] | None = getattr(arrays, name)
        if column is not None:
            np.save(os.path.join(path, name), column)


def load_columns(path: str) -> float:
    """Return the seconds to load what :func:`save_columns` saved."""
    started = time.perf_counter()
    columns = [np.load(os.path.join(path, name)) for name in sorted(os.listdir(path))]
    seconds = time.perf_counter() - started
    assert columns
    return seconds


def read_cold(path: str) -> float:
    """Return the seconds to read the files in `path` once, from start to end."""
    started = time.perf_counter()
    warm_cache(path)
    return time.perf_counter() - started


def copy_file(source: str, target: str) -> float:
    """Return the seconds to copy a file and sync the copy; the copy is removed."""
    started = time.perf_counter()
    with open(source, "rb") as reading, open(target, "xb") as writing:
        left = os.fstat(reading.fileno()).st_size
        while left:
            try:
                copied = os.copy_file_range(reading.fileno(), writing.fileno(), left)
            except OSError:  # a file system without it
                copied = writing.write(reading.read(_CHUNK_SIZE))
                writing.flush()
            if copied == 0:
                raise OSError(f"{source} became shorter while it was copied")
            left -= copied
        os.fdatasync(writing.fileno())
    seconds = time.perf_counter() - started
    os.unlink(target)
    return seconds
