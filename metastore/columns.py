"""Records as columns: what recovery returns and compaction merges."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple, overload

import numpy as np
import numpy.typing as npt

from metastore import _merge
from metastore.pace import give_way
from metastore.parallel import map_at_once

if TYPE_CHECKING:
    from metastore.report import RecoveryReport

__all__ = [
    "Columns",
    "Payload",
    "Recovered",
    "concatenate",
    "merge",
    "sort_last_wins",
]

Uint64s = npt.NDArray[np.uint64]
Uint32s = npt.NDArray[np.uint32]
Uint8s = npt.NDArray[np.uint8]
Record = tuple[int, int, bytes]

#: Iteration converts this many records at a time.
_ITERATION_RECORDS = 1_024
#: Below this many records a job is not worth a second thread.
_RECORDS_PER_THREAD = 1 << 16
#: The first digit of the sort, in bits; an index of a record has 32.
_SORT_BITS = 11
_SORT_RECORDS_MAX = 2**32 - 1


@dataclasses.dataclass(frozen=True, eq=False)
class Columns:
    """Records side by side.

    Parameters
    ----------
    keys, values : ndarray of uint64, shape (n,)
        A value of 0 is a tombstone.
    offsets : ndarray of uint64, shape (n + 1,)
        Record i's user data is ``user_data[offsets[i]:offsets[i + 1]]``.
    user_data : ndarray of uint8
        Bytes beside the records; a slice shares those of the whole.
    """

    keys: Uint64s
    values: Uint64s
    offsets: Uint64s
    user_data: Uint8s

    @classmethod
    def allocate(cls, n_records: int, user_data_size: int) -> Columns:
        """Return columns of these sizes to be filled; the first offset is 0.

        Without user data all offsets are: as the system gives them, so that nobody
        touches their memory before they are read.
        """
        new_offsets = np.empty if user_data_size else np.zeros
        columns = cls(
            np.empty(n_records, dtype=np.uint64),
            np.empty(n_records, dtype=np.uint64),
            new_offsets(n_records + 1, dtype=np.uint64),
            np.empty(user_data_size, dtype=np.uint8),
        )
        columns.offsets[0] = 0
        return columns

    def __len__(self) -> int:
        return len(self.keys)

    @property
    def user_data_size(self) -> int:
        """Bytes of user data of these records."""
        return int(self.offsets[-1]) - int(self.offsets[0])

    def part(self, start: int, stop: int) -> Columns:
        """Return the records from `start` to `stop`, without a copy."""
        return Columns(
            self.keys[start:stop],
            self.values[start:stop],
            self.offsets[start : stop + 1],
            self.user_data,
        )

    def head(self, n_records: int, user_data_size: int) -> Columns:
        """Return so many records and bytes from the first on, without a copy."""
        return Columns(
            self.keys[:n_records],
            self.values[:n_records],
            self.offsets[: n_records + 1],
            self.user_data[:user_data_size],
        )

    def target(
        self, start: int, stop: int, data_start: int, data_stop: int
    ) -> tuple[Uint64s, Uint64s, Uint64s, Uint8s]:
        """Return the views that a kernel fills: keys, values, ends, user data.

        For columns of :meth:`allocate`: where there is no user data there are no ends
        to fill.
        """
        ends = self.offsets[start + 1 : stop + 1]
        return (
            self.keys[start:stop],
            self.values[start:stop],
            ends if len(self.user_data) else ends[:0],
            self.user_data[data_start:data_stop],
        )

    def arrays(self) -> tuple[Uint64s, Uint64s, Uint64s, Uint8s]:
        """Return keys, values, offsets, user data."""
        return self.keys, self.values, self.offsets, self.user_data


class Payload(NamedTuple):
    """Records as a frame holds them (docs/format.md, section 5).

    Lengths add up to the size of the user data, and where a value is 0 the length is 0.
    """

    keys: Uint64s
    values: Uint64s
    lengths: Uint32s
    user_data: Uint8s

    @property
    def size(self) -> int:
        """Bytes of it, plain."""
        return sum(column.nbytes for column in self)


def concatenate(parts: list[Columns]) -> Columns:
    """Join columns one behind the other, and empty the list on the way.

    Each column is freed as soon as it is copied, so that the peak is one column more
    than the result.
    """
    if len(parts) == 1 and parts[0].offsets[0] == 0:
        return parts.pop()
    if not parts:
        return Columns.allocate(0, 0)
    starts = [int(part.offsets[0]) for part in parts]
    sizes = [part.user_data_size for part in parts]
    keys, values, offsets, user_data = (
        [part.keys for part in parts],
        [part.values for part in parts],
        [part.offsets for part in parts],
        [part.user_data for part in parts],
    )
    parts.clear()
    return Columns(
        _joined(keys),
        _joined(values),
        _joined_offsets(offsets),
        _joined(
            [
                data[start : start + size]
                for data, start, size in zip(user_data, starts, sizes, strict=True)
            ],
            user_data,
        ),
    )


def _joined(arrays: list[Any], owners: list[Any] | None = None) -> npt.NDArray[Any]:
    joined = np.concatenate(arrays)
    arrays.clear()
    if owners is not None:
        owners.clear()
    return joined


def _joined_offsets(offsets: list[Uint64s]) -> Uint64s:
    joined = np.empty(sum(len(part) - 1 for part in offsets) + 1, dtype=np.uint64)
    joined[0] = 0
    at, base = 0, 0
    for part in offsets:
        # Modulo 2**64: a part's own first offset may be anything.
        shift = np.uint64((base - int(part[0])) % 2**64)
        stop = at + len(part) - 1
        np.add(part[1:], shift, out=joined[at + 1 : stop + 1])
        at, base = stop, int(joined[stop])
    offsets.clear()
    return joined


def sort_last_wins(
    columns: Columns, threads: int = 1, *, reuse: bool = False
) -> Columns:
    """Return the records sorted by key; of equal keys the last stays, tombstones too.

    A radix sort of keys with their places, from the highest digit that varies down,
    then one gather per column. Threads share both by ranges.

    With `reuse` the arrays of `columns` lose their contents: one that is done holds
    the next of the result. New memory costs as much to touch as a gather takes.
    """
    if _merge.is_increasing(columns.keys):
        return columns
    keys, order = _sorted_keys(columns.keys, threads)
    cuts = _ranges(len(keys), threads)
    room = columns if reuse else Columns.allocate(len(keys), 0)
    values = room.keys[: len(keys)]
    _each(
        lambda a, b: _merge.gather_into(columns.values, order[a:b], values[a:b]), cuts
    )
    offsets, user_data = _gather_user_data(columns, order, cuts, room.values)
    return Columns(keys, values, offsets, user_data)


def _ranges(n: int, threads: int) -> list[tuple[int, int]]:
    """Cut ``range(n)`` into as many parts as are worth a thread each."""
    parts = min(threads, 1 + n // _RECORDS_PER_THREAD)
    return [(n * i // parts, n * (i + 1) // parts) for i in range(parts)]


def _each(
    function: Callable[[int, int], None], ranges: Sequence[tuple[int, int]]
) -> None:
    map_at_once(lambda cut: function(*cut), ranges)


def _sorted_keys(keys: Uint64s, threads: int) -> tuple[Uint64s, Uint32s]:
    """Return the distinct keys ascending, and where each stood last."""
    n = len(keys)
    if n > _SORT_RECORDS_MAX:
        raise OverflowError(f"cannot sort {n} records of logs at once; compact earlier")
    varying = _merge.varying_bits(keys)
    bits = min(_SORT_BITS, max(1, varying.bit_length()))
    shift = max(0, varying.bit_length() - bits)
    ranges = _ranges(n, threads)
    counts = np.array(
        map_at_once(
            lambda cut: _merge.histogram(keys[cut[0] : cut[1]], shift, bits), ranges
        )
    )
    starts = np.concatenate([[0], np.cumsum(counts.sum(axis=0))])
    # Each part's keys of a digit stand behind those of the parts before it.
    positions = starts[:-1] + np.cumsum(counts, axis=0) - counts
    sorted_keys, order = np.empty(n, dtype=np.uint64), np.empty(n, dtype=np.uint32)

    def scatter(part: int) -> None:
        start, stop = ranges[part]
        digits = keys[start:stop], start, shift, bits
        _merge.scatter(*digits, positions[part], sorted_keys, order)

    map_at_once(scatter, range(len(ranges)))
    digit_cuts = np.searchsorted(starts, [stop for _, stop in ranges[:-1]]).tolist()
    digit_ranges = list(itertools.pairwise([0, *digit_cuts, len(starts) - 1]))

    def sort(first: int, last: int) -> None:
        digits = starts[first : last + 1]
        longest = int(np.diff(digits).max(initial=0))
        spare = np.empty(longest, dtype=np.uint64), np.empty(longest, dtype=np.uint32)
        _merge.sort_ranges(sorted_keys, order, *spare, digits)

    _each(sort, digit_ranges)
    m = _merge.keep_last(sorted_keys, order)
    return sorted_keys[:m], order[:m]


def _gather_user_data(
    columns: Columns, order: Uint32s, cuts: Sequence[tuple[int, int]], room: Uint64s
) -> tuple[Uint64s, Uint8s]:
    """Return offsets and user data by `order`; `room` has 8 bytes for each record."""
    m = len(order)
    start = int(columns.offsets[0])
    length = _merge.common_length(columns.offsets)
    if length in (0, 8):  # no need to look up where each record's data lies
        offsets = columns.offsets[: m + 1]
        if start:
            offsets = offsets - np.uint64(start)
        data = columns.user_data[start : start + length * len(columns)]
        words = room[: m * length // 8]
        if length:
            source = np.require(data.view(np.uint64), requirements=["C", "A"])
            _each(lambda a, b: _merge.gather_into(source, order[a:b], words[a:b]), cuts)
        return offsets, words.view(np.uint8)
    offsets = np.zeros(m + 1, dtype=np.uint64)
    _merge.gather_ends(columns.offsets, order, offsets[1:])
    user_data = np.empty(int(offsets[-1]), dtype=np.uint8)

    def gather(a: int, b: int) -> None:
        out = user_data[int(offsets[a]) : int(offsets[b])]
        _merge.gather_bytes_into(columns.offsets, columns.user_data, order[a:b], out)

    _each(gather, cuts)
    return offsets, user_data


def merge(old: Columns, new: Columns, threads: int = 1) -> Columns:
    """Merge two runs of strictly increasing keys; `new` wins, its tombstones delete."""
    if len(new) == 0 and old.offsets[0] == 0:
        return old
    if len(old) == 0 and new.offsets[0] == 0 and bool(new.values.all()):
        return new
    n_ranges = min(threads, 1 + (len(old) + len(new)) // _RECORDS_PER_THREAD)
    longer = new if len(new) > len(old) else old
    cuts = [longer.keys[len(longer) * i // n_ranges] for i in range(1, n_ranges)]
    old_cuts = [0, *np.searchsorted(old.keys, cuts).tolist(), len(old)]
    new_cuts = [0, *np.searchsorted(new.keys, cuts).tolist(), len(new)]
    ranges = [
        (old.part(*old_cuts[i : i + 2]), new.part(*new_cuts[i : i + 2]))
        for i in range(n_ranges)
    ]

    sizes = map_at_once(lambda pair: merged_size(*pair), ranges)
    give_way()
    merged = Columns.allocate(sum(n for n, _ in sizes), sum(size for _, size in sizes))
    jobs = []
    at = data_at = 0
    for (before, after), (n, size) in zip(ranges, sizes, strict=True):
        jobs.append((before, after, merged, at, data_at, n, size))
        at, data_at = at + n, data_at + size
    map_at_once(lambda job: merge_into(*job), jobs)
    return merged


def merged_size(old: Columns, new: Columns) -> tuple[int, int]:
    """Return how many records two runs make, and how many bytes of user data."""
    return _merge.merge_size(old.keys, old.offsets, new.keys, new.values, new.offsets)


def merge_into(
    old: Columns,
    new: Columns,
    merged: Columns,
    at: int,
    data_at: int,
    n_records: int,
    user_data_size: int,
) -> None:
    """Merge two runs, whose :func:`merged_size` is known, to a place in a result."""
    out = merged.target(at, at + n_records, data_at, data_at + user_data_size)
    _merge.merge_into(old.arrays(), new.arrays(), out, data_at)


class Recovered(Sequence[Record]):
    """What a recovery returned: records sorted by key, over read-only arrays.

    A sequence of ``(key, value, user_data)``, of types int, int and bytes. The arrays
    are the fast way in; they stay valid after the store was shut down. Thread-safe.
    """

    def __init__(self, columns: Columns, report: RecoveryReport) -> None:
        for array in columns.arrays():
            array.flags.writeable = False
        self._columns = columns
        self._report = report

    def __reduce__(self) -> tuple[type[Recovered], tuple[Columns, RecoveryReport]]:
        """Have whoever unpickles or copies it get read-only arrays, too."""
        return type(self), (self._columns, self._report)

    @property
    def keys(self) -> Uint64s:
        """Keys, strictly increasing: uint64, shape (n,), read-only."""
        return self._columns.keys

    @property
    def values(self) -> Uint64s:
        """Values, none of them 0: uint64, shape (n,), read-only."""
        return self._columns.values

    @property
    def offsets(self) -> Uint64s:
        """Offsets into `user_data`, from 0 on: uint64, shape (n + 1,), read-only.

        Record i's user data is ``user_data[offsets[i]:offsets[i + 1]]``: the layout
        that Arrow calls variable-size binary.
        """
        return self._columns.offsets

    @property
    def user_data(self) -> Uint8s:
        """User data of all records, back to back: uint8, shape (m,), read-only."""
        return self._columns.user_data

    @property
    def report(self) -> RecoveryReport:
        """What the recovery met; ``print(recovered.report)`` tells a person."""
        return self._report

    def __len__(self) -> int:
        return len(self._columns)

    def _user_data_of(self, i: int) -> bytes:
        start, stop = self.offsets[i : i + 2].tolist()
        return self.user_data[start:stop].tobytes()

    @overload
    def __getitem__(self, index: int) -> Record: ...
    @overload
    def __getitem__(self, index: slice) -> list[Record]: ...
    def __getitem__(self, index: int | slice) -> Record | list[Record]:
        """Return a record, or a list of them for a slice."""
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        i = range(len(self))[index]
        return int(self.keys[i]), int(self.values[i]), self._user_data_of(i)

    def __iter__(self) -> Iterator[Record]:
        for start in range(0, len(self), _ITERATION_RECORDS):
            stop = min(start + _ITERATION_RECORDS, len(self))
            offsets = self.offsets[start : stop + 1].tolist()
            first = offsets[0]
            data = self.user_data[first : offsets[-1]].tobytes()
            pairs = itertools.pairwise(offsets)
            for key, value, (low, high) in zip(
                self.keys[start:stop].tolist(),
                self.values[start:stop].tolist(),
                pairs,
                strict=True,
            ):
                yield key, value, data[low - first : high - first]

    def _find(self, key: object) -> int | None:
        # A duration is one of numpy's integers, but cannot be compared with one.
        if not isinstance(key, int | np.integer) or isinstance(key, np.timedelta64):
            return None
        if not 0 <= key < 2**64:
            return None
        wanted = np.uint64(key)
        i = int(np.searchsorted(self.keys, wanted))
        return i if i < len(self) and self.keys[i] == wanted else None

    def get(self, key: int) -> tuple[int, bytes] | None:
        """Return value and user data of `key`, or None; a binary search."""
        i = self._find(key)
        return None if i is None else (int(self.values[i]), self._user_data_of(i))

    def __contains__(self, key: object) -> bool:
        """Return whether `key` is there."""
        return self._find(key) is not None

    def __repr__(self) -> str:
        return f"<Recovered: {len(self):,} records, {len(self.user_data):,} bytes>"
