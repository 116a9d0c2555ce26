"""The records that every side stores, and a checksum that every side can compute.

Record i has the key, value and user data that splitmix64 draws from a seed, so that
another program makes the same records and a checksum of the content compares without
exchanging it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

import numpy as np
import numpy.typing as npt

__all__ = [
    "HEAP_LENGTHS",
    "HEAP_SHARDS",
    "SEED",
    "Arrays",
    "changes",
    "checksum",
    "chunks",
    "heap_like",
    "records",
]

U64 = npt.NDArray[np.uint64]
U8 = npt.NDArray[np.uint8]

SEED = 1
#: Different lengths and shards in :func:`heap_like`, all equally frequent.
HEAP_LENGTHS = 1024
HEAP_SHARDS = 16
#: The increment of splitmix64: 2^64 divided by the golden ratio.
_GAMMA = 0x9E3779B97F4A7C15
_MASK = (1 << 64) - 1
#: Draws of one record: its key, its value, the seed of its user data.
_KEY, _VALUE, _USER_DATA = 1, 2, 3


@dataclasses.dataclass(frozen=True)
class Arrays:
    """Records as columns; a value of 0 deletes."""

    keys: U64
    values: U64
    #: n + 1 offsets into `user_data`; both None where no record has any.
    offsets: U64 | None = None
    user_data: U8 | None = None

    @property
    def size(self) -> int:
        """Bytes of all columns."""
        columns = (self.keys, self.values, self.offsets, self.user_data)
        return sum(column.nbytes for column in columns if column is not None)

    def slice(self, start: int, stop: int) -> Arrays:
        """Return records `start` to `stop`; keys and values are views."""
        keys, values = self.keys[start:stop], self.values[start:stop]
        if self.offsets is None or self.user_data is None:
            return Arrays(keys, values)
        offsets = self.offsets[start : stop + 1]
        if len(offsets) == 0:
            return Arrays(keys, values)
        first, last = int(offsets[0]), int(offsets[-1])
        return Arrays(keys, values, offsets - offsets[0], self.user_data[first:last])

    def sorted(self) -> Arrays:
        """Return the records by ascending key; all must have user data of one size."""
        order = np.argsort(self.keys)
        if self.offsets is None or self.user_data is None:
            return Arrays(self.keys[order], self.values[order])
        width = len(self.user_data) // max(1, len(self.keys))
        user_data = self.user_data.reshape(-1, width)[order].reshape(-1)
        return Arrays(self.keys[order], self.values[order], self.offsets, user_data)

    def tuples(self) -> list[tuple[int, tuple[int, bytes]]]:
        """Return the records as `insert_batch` takes them; none may be a deletion."""
        keys, values = self.keys.tolist(), self.values.tolist()
        if self.offsets is None or self.user_data is None:
            return [(k, (v, b"")) for k, v in zip(keys, values, strict=True)]
        joined, ends = self.user_data.tobytes(), self.offsets.tolist()
        return [
            (keys[i], (values[i], joined[ends[i] : ends[i + 1]]))
            for i in range(len(keys))
        ]


def _finish(z: U64) -> U64:
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return z ^ (z >> np.uint64(31))


def _draw(seed: int, numbers: U64, lane: int) -> U64:
    steps = numbers * np.uint64(3) + np.uint64(lane)
    return _finish(np.uint64(seed) + steps * np.uint64(_GAMMA))


def _words(seeds: U64, n_words: int) -> U64:
    columns = [
        _finish(seeds + np.uint64((word + 1) * _GAMMA & _MASK))
        for word in range(n_words)
    ]
    return np.stack(columns, axis=1) if columns else np.empty((len(seeds), 0), "<u8")


def _keys(numbers: U64) -> U64:
    return _draw(SEED, numbers, _KEY)


def _values(numbers: U64) -> U64:
    values = _draw(SEED, numbers, _VALUE)
    values[values == 0] = 1
    return values


def records(start: int, stop: int, user_data_size: int) -> Arrays:
    """Return the records `start` to `stop`, in the order of their numbers.

    Keys are random and unique, values random and nonzero, user data random.
    """
    numbers = np.arange(start, stop, dtype=np.uint64)
    keys, values = _keys(numbers), _values(numbers)
    if user_data_size == 0:
        return Arrays(keys, values)
    words = _words(_draw(SEED, numbers, _USER_DATA), -(-user_data_size // 8))
    as_bytes = np.ascontiguousarray(words.astype("<u8", copy=False)).view(np.uint8)
    user_data = np.ascontiguousarray(as_bytes[:, :user_data_size]).reshape(-1)
    offsets = np.arange(len(keys) + 1, dtype=np.uint64) * np.uint64(user_data_size)
    return Arrays(keys, values, offsets, user_data)


def chunks(n_records: int, chunk_records: int, user_data_size: int) -> Iterator[Arrays]:
    """Yield the records 0 to `n_records`, so many at a time."""
    for start in range(0, n_records, chunk_records):
        stop = min(start + chunk_records, n_records)
        yield records(start, stop, user_data_size)


def changes(n_records: int, n_changes: int) -> Arrays:
    """Return changes to the records 0 to `n_records` (without user data).

    Of four, two are updates, one is an insert and one a deletion.
    """
    numbers = np.arange(n_changes, dtype=np.uint64)
    old = _finish(numbers) % np.uint64(n_records)
    new = numbers + np.uint64(n_records)
    kind = numbers % np.uint64(4)
    keys = _keys(np.where(kind == 2, new, old))
    values = _values(new)
    values[kind == 3] = 0
    return Arrays(keys, values)


def heap_like(n_records: int) -> Arrays:
    """Return what a heap would store: object number, offset, then length and shard.

    Keys count up, values are the offsets of objects that lie back to back, user data
    is the object's length (u32, 64 to 1,087) and one of 16 shards (u32).
    """
    numbers = np.arange(n_records, dtype=np.uint64)
    draws = _draw(SEED, numbers, _VALUE)
    lengths = np.uint64(64) + (draws & np.uint64(HEAP_LENGTHS - 1))
    values = np.uint64(4096) + np.cumsum(lengths, dtype=np.uint64) - lengths
    pairs = np.empty((n_records, 2), "<u4")
    pairs[:, 0] = lengths
    pairs[:, 1] = (draws >> np.uint64(32)) & np.uint64(HEAP_SHARDS - 1)
    offsets = np.arange(n_records + 1, dtype=np.uint64) * np.uint64(8)
    return Arrays(numbers, values, offsets, pairs.view(np.uint8).reshape(-1))


def _mix(x: U64) -> U64:
    return _finish(x + np.uint64(_GAMMA))


def _word_at(arrays: Arrays, which: npt.NDArray[np.intp], word: int) -> U64:
    """Return word number `word` of each record's user data, padded with zeros."""
    assert arrays.offsets is not None
    assert arrays.user_data is not None
    start = arrays.offsets[which] + np.uint64(8 * word)
    left = arrays.offsets[which + 1] - start
    total = np.zeros(len(which), np.uint64)
    for byte in range(8):
        has = left > byte
        taken = arrays.user_data[start[has] + np.uint64(byte)].astype(np.uint64)
        total[has] |= taken << np.uint64(8 * byte)
    return total


def _checksum_part(arrays: Arrays) -> int:
    h = _mix(arrays.keys)
    h = _mix(h ^ arrays.values)
    if arrays.offsets is None or arrays.user_data is None or len(h) == 0:
        return int(np.add.reduce(_mix(h)))
    lengths = np.diff(arrays.offsets)
    h = _mix(h ^ lengths)
    longest = int(lengths.max())
    if longest == 8 and int(lengths.min()) == 8:  # the common case: views, no gather
        return int(np.add.reduce(_mix(h ^ arrays.user_data.view("<u8"))))
    for word in range(-(-longest // 8)):
        which = np.flatnonzero(lengths > 8 * word)
        h[which] = _mix(h[which] ^ _word_at(arrays, which, word))
    return int(np.add.reduce(h))


def checksum(arrays: Arrays) -> int:
    """Return the checksum of a content: a sum over records, whatever their order."""
    step = 1 << 20  # bounds the temporaries
    total = 0
    for start in range(0, len(arrays.keys), step):
        total += _checksum_part(arrays.slice(start, start + step))
    return total & _MASK
