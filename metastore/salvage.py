"""What of a damaged file is provably whole.

Recovery stops at the first bad place of a log and refuses a damaged snapshot. Here the
walk goes on behind it: at every multiple of 8 a frame header is tried, and a frame
counts if and only if both of its checksums and its content are valid (docs/format.md,
section 4). Nothing is written and nothing is guessed.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import itertools
import struct
from collections import Counter
from collections.abc import Iterable, Iterator

import numpy as np
import numpy.typing as npt

from metastore import _codec
from metastore.columns import Columns
from metastore.directory import FileName
from metastore.errors import CorruptionError
from metastore.format import (
    CHECKSUM_XOR,
    FILE_HEADER_SIZE,
    FRAME_HEADER_SIZE,
    INDEX_DTYPE,
    INDEX_HEAD,
    KIND_BATCH,
    KIND_BLOCK,
    KIND_END,
    SEQUENCE_MAX,
    STORE_ID_SIZE,
    TRAILER_SIZE,
    FileHeader,
    size_without_zeros,
    snapshot_seed,
    unpack_trailer,
)
from metastore.frames import corruption, decode, new_table

__all__ = [
    "Block",
    "Evidence",
    "Gap",
    "LogSalvage",
    "LostBlock",
    "Run",
    "SnapshotSalvage",
    "find_store_seed",
    "salvage_log",
    "salvage_snapshot",
]

#: Frames are scanned and decoded in windows of this many bytes and rows.
_WINDOW_SIZE = 1 << 20
_WINDOW_FRAMES = 1 << 14
#: Headers that are tried for the seed of a file whose own header is gone.
_SEED_TRIES_MAX = 256
#: How often the bytes of such a file are checksummed, on average: what may be a header
#: costs as many bytes as it claims. Whole frames need one pass, damaged a little more;
#: but where made-up headers stand side by side, each may claim all that is behind it.
_SEED_PASSES_MAX = 16
#: Header checksums that must agree on a seed before it is believed.
_SEED_VOTES_MIN = 2
#: Batch, block and end, plain or packed, and two zeros, as a header's bytes 4 to 8.
_KINDS_AND_LAYOUTS = np.array([0x001, 0x101, 0x002, 0x102, 0x003], dtype=np.uint64)

#: Bad frames that a torn write can leave (docs/format.md, section 8).
_TORN_STATUSES = frozenset(
    {
        _codec.SCAN_NO_BYTES,
        _codec.SCAN_INCOMPLETE,
        _codec.STATUS_BAD_HEADER,
        _codec.STATUS_BAD_PAYLOAD,
    }
)

_END_IS_DAMAGED = "the end frame with the index is damaged"

# checksum, kind, layout, zero, sequence, durable, records, payload checksum,
# payload size, user data size
_FRAME_HEADER = struct.Struct("<IBBHQQIIQQ")
assert _FRAME_HEADER.size == FRAME_HEADER_SIZE


@dataclasses.dataclass(frozen=True)
class Gap:
    """Bytes of a file that are in no frame which could be saved."""

    offset: int
    size: int
    reason: str


# ---- files and their seeds ----


@dataclasses.dataclass(frozen=True)
class Evidence:
    """A log or a snapshot as it lies there.

    Parameters
    ----------
    name : FileName
        What its name says.
    view : memoryview
        Its bytes.
    header : FileHeader or None
        Its header, if that is whole; then it is believed rather than the name.
    damage : CorruptionError or None
        What is wrong with the header.
    """

    name: FileName
    view: memoryview
    header: FileHeader | None
    damage: CorruptionError | None

    @classmethod
    def of(cls, name: FileName, view: memoryview, path: str) -> Evidence:
        """Read the header of a file.

        Raises
        ------
        FormatVersionError
            If it is whole, but of another version.
        """
        data = bytes(view[:FILE_HEADER_SIZE])
        try:
            header = FileHeader.unpack(data, name.kind, name.number, path)
            return cls(name, view, header, None)
        except CorruptionError as error:
            damage = error
        # A file that was renamed still knows what it is.
        number = int.from_bytes(data[32:40], "little")
        for kind in ("log", "snapshot"):
            with contextlib.suppress(CorruptionError):
                header = FileHeader.unpack(data, kind, number, path)
                return cls(name, view, header, damage)
        return cls(name, view, None, damage)

    @property
    def kind(self) -> str:
        """``"log"`` or ``"snapshot"``."""
        return self.header.kind if self.header else self.name.kind

    @property
    def number(self) -> int:
        """The number of the file."""
        return self.header.number if self.header else self.name.number

    def seed(self, store_seed: int) -> int:
        """Return the seed of the file's frames from that of the store."""
        if self.kind == "snapshot":
            return store_seed
        return _codec.crc32c(self.number.to_bytes(8, "little"), store_seed)


def find_store_seed(files: Iterable[Evidence]) -> int | None:
    """Return the checksum of the store's id, with which every seed begins.

    Whole headers say it; of several stores the one with the most files is taken, of
    equals that of the newest snapshot. Without any whole header the seed is solved from
    the frames themselves: two that differ, with whole payloads, must agree on it.
    """
    files = list(files)
    ids = [file.header.store_id for file in files if file.header]
    if ids:
        store_id, _ = Counter(ids).most_common(1)[0]
        return snapshot_seed(store_id)
    votes = Counter(itertools.chain.from_iterable(map(_seed_votes, files)))
    for seed, n_votes in votes.most_common(1):
        if n_votes >= _SEED_VOTES_MIN:
            return seed
    return None


def _seed_votes(file: Evidence) -> Iterator[int]:
    id_bytes = bytes(file.view[16 : 16 + STORE_ID_SIZE])
    if len(id_bytes) == STORE_ID_SIZE:
        yield snapshot_seed(id_bytes)
    seen: set[bytes] = set()
    for head in _plausible_heads(file.view):
        if head in seen:  # the same bytes again would prove nothing
            continue
        seen.add(head)
        stored = int.from_bytes(head[:4], "little") ^ CHECKSUM_XOR
        seed = _seed_before(head[4:], stored)
        if file.kind == "log":
            seed = _seed_before(file.number.to_bytes(8, "little"), seed)
        yield seed
        if len(seen) == _SEED_TRIES_MAX:
            return


def _plausible_heads(view: memoryview) -> Iterator[bytes]:
    """Yield frame headers whose payload is whole; what lies inside one is passed by."""
    place = 0
    left = _SEED_PASSES_MAX * len(view)
    for offset in _plausible_headers(view):
        if offset < place:
            continue
        head = bytes(view[offset : offset + FRAME_HEADER_SIZE])
        payload_size = int.from_bytes(head[32:40], "little")
        start = offset + FRAME_HEADER_SIZE
        if payload_size > min(left, len(view) - start):
            continue
        left -= payload_size
        computed = _codec.crc32c(view[start : start + payload_size]) ^ CHECKSUM_XOR
        if computed == int.from_bytes(head[28:32], "little"):
            place = offset + _codec.frame_size(head, 0)
            yield head


def _plausible_headers(view: memoryview) -> Iterator[int]:
    """Yield where the fields of a frame header could be right, checksums aside."""
    words = np.frombuffer(view, "<u8", len(view) // 8)
    for start in range(0, len(words), _WINDOW_SIZE // 8):
        # As many words more as a header has behind its first.
        some = words[start : start + _WINDOW_SIZE // 8 + 5]
        n = len(some) - 5
        if n <= 0:
            return
        at = np.flatnonzero(
            np.isin(some[:n] >> np.uint64(32), _KINDS_AND_LAYOUTS)
            & (some[2 : n + 2] <= some[1 : n + 1])  # durable, sequence
            & (some[4 : n + 4] <= len(view))  # payload size
        )
        yield from (8 * (start + at)).tolist()


@functools.cache
def _crc_steps() -> tuple[list[int], dict[int, int]]:
    """Return where each byte takes the register from 0, and what leads back."""
    ones = 0xFFFFFFFF
    steps = [_codec.crc32c(bytes([byte]), ones) ^ ones for byte in range(256)]
    return steps, {step >> 24: byte for byte, step in enumerate(steps)}


def _seed_before(data: bytes, checksum: int) -> int:
    """Return the `seed` with which ``crc32c(data, seed)`` is `checksum`."""
    steps, by_high_byte = _crc_steps()
    register = checksum ^ 0xFFFFFFFF
    for byte in reversed(data):
        index = by_high_byte[register >> 24]
        register = ((register ^ steps[index]) << 8 | (index ^ byte)) & 0xFFFFFFFF
    return register ^ 0xFFFFFFFF


# ---- frames ----


@dataclasses.dataclass(frozen=True)
class _Head:
    """A frame header whose checksum agrees."""

    offset: int
    kind: int
    sequence: int
    n_records: int
    size: int


class _Frames:
    """Finds frame headers in a file by their checksums."""

    def __init__(self, view: memoryview, seed: int, path: str) -> None:
        self.view = view
        self.size = len(view)
        self.seed = seed
        self.path = path

    def head_at(self, offset: int) -> _Head | None:
        """Return the header at `offset` if its checksum agrees.

        One whose sequence no frame can have, or none behind which a store goes on, is
        forged, and is no header.
        """
        data = bytes(self.view[offset : offset + FRAME_HEADER_SIZE])
        if len(data) < FRAME_HEADER_SIZE:
            return None
        stored, kind, _, _, sequence, _, n_records, _, _, _ = _FRAME_HEADER.unpack(data)
        if stored != _codec.crc32c(data[4:], self.seed) ^ CHECKSUM_XOR:
            return None
        if sequence >= SEQUENCE_MAX:
            return None
        size = _codec.frame_size(data, 0)
        return _Head(offset, kind, sequence, n_records, size)

    def heads_from(self, offset: int) -> Iterator[_Head]:
        """Yield every header from `offset` on whose checksum agrees."""
        while 0 <= offset < self.size:
            offset = _codec.find_durable(self.view, offset, self.seed, 0)
            if offset < 0:
                return
            head = self.head_at(offset)
            if head is not None:
                yield head
            offset += 8

    def last_nonzero(self, start: int) -> int:
        """Return the offset of the last byte from `start` on that is not 0, or -1."""
        end = self.size
        while end > start:
            low = max(start, end - _WINDOW_SIZE)
            size = size_without_zeros(bytes(self.view[low:end]))
            if size:
                return low + size - 1
            end = low
        return -1

    def reason(self, offset: int, status: int) -> str:
        """Return what is wrong with the frame at `offset`."""
        frame = self.view[offset:]
        if len(frame) >= FRAME_HEADER_SIZE:
            frame = frame[: _codec.frame_size(frame, 0)]
        return corruption(self.path, offset, status, frame, self.seed).reason


# ---- logs ----


@dataclasses.dataclass(frozen=True)
class Run:
    """Whole batches that follow each other.

    Parameters
    ----------
    first : int
        The sequence of the first.
    ends : list of int
        How many records there are up to the end of each batch.
    columns : Columns
        Their records.
    """

    first: int
    ends: list[int]
    columns: Columns

    @property
    def stop(self) -> int:
        """The sequence behind the last batch."""
        return self.first + len(self.ends)

    def part(self, first: int, stop: int) -> Run:
        """Return the batches from `first` up to but without `stop`."""
        if first <= self.first and stop >= self.stop:
            return self
        ends = [0, *self.ends][first - self.first : stop - self.first + 1]
        columns = self.columns.part(ends[0], ends[-1])
        return Run(first, [end - ends[0] for end in ends[1:]], columns)


@dataclasses.dataclass
class LogSalvage:
    """What a log holds."""

    runs: list[Run]
    gaps: list[Gap]
    #: Never acknowledged, hence no loss.
    torn: Gap | None
    #: The newest sequence that a header outside the torn tail speaks of; else 0.
    sequence_known: int

    @property
    def first(self) -> int | None:
        """The first sequence that was saved."""
        return self.runs[0].first if self.runs else None


def salvage_log(file: Evidence, seed: int, bound: int | None) -> LogSalvage:
    """Find every whole batch of a log.

    Parameters
    ----------
    file : Evidence
        The log.
    seed : int
        That of its frames.
    bound : int, optional
        The first sequence of a later log; what lies here from that on was dropped when
        that log was begun. None if there is none, or nothing is known of it.
    """
    walk = _LogWalk(_Frames(file.view, seed, str(file.name)), bound)
    walk.go(file.header.sequence if file.header else None)
    return walk.found


class _LogWalk:
    """Reads a log run by run."""

    def __init__(self, frames: _Frames, bound: int | None) -> None:
        self._frames = frames
        self._bound = bound
        #: A batch of this sequence, or of a later one, does not count.
        self._stop = SEQUENCE_MAX if bound is None else min(bound, SEQUENCE_MAX)
        self._expected = 0
        self._first: int | None = None
        self.found = LogSalvage([], [], None, 0)

    def go(self, first: int | None) -> None:
        """Walk through the file; `first` is its first sequence, where known."""
        place = FILE_HEADER_SIZE
        self._first = first
        self._expected = self._first_expected() if first is None else first
        self.found.sequence_known = self._expected - 1 if first else 0
        while True:
            place, status = self._read_run(place)
            if status == _codec.SCAN_SEALED:
                self._know(self._expected - 1)
                self._note(
                    place + FRAME_HEADER_SIZE, None, "bytes behind the end frame"
                )
                return
            if self._bound is not None and self._expected >= self._bound:
                return
            if self._frames.last_nonzero(place) < 0:
                return
            reason = self._frames.reason(place, status)
            if self._is_torn(place, status):
                size = self._frames.last_nonzero(place) + 1 - place
                self.found.torn = Gap(place, size, reason)
                return
            behind = self._next(place)
            self._note(place, behind.offset if behind else None, reason)
            if behind is None:
                return
            place = behind.offset
            self._expected = behind.sequence + (behind.kind == KIND_END)

    def _first_expected(self) -> int:
        """Guess the first sequence of a log whose header is gone."""
        for head in self._frames.heads_from(FILE_HEADER_SIZE):
            if head.offset == FILE_HEADER_SIZE:
                return head.sequence + (head.kind == KIND_END)
            return max(head.sequence - 1, 1)
        return 1

    def _know(self, sequence: int) -> None:
        self.found.sequence_known = max(self.found.sequence_known, sequence)

    def _note(self, start: int, stop: int | None, reason: str) -> None:
        end = self._frames.size if stop is None else stop
        end = min(end, self._frames.last_nonzero(start) + 1)
        if end > start:
            self.found.gaps.append(Gap(start, end - start, reason))

    def _is_torn(self, place: int, status: int) -> bool:
        """Decide as recovery does (section 8): in the newest log, without a proof."""
        if self._bound is not None or status not in _TORN_STATUSES:
            return False
        if self._first is None and not self.found.runs:
            return False  # the file header before it is damaged, which no crash does
        view, seed = self._frames.view, self._frames.seed
        start = place + -place % 8
        if start >= self._frames.size:
            return True
        return _codec.find_durable(view, start, seed, self._expected) < 0

    def _read_run(self, place: int) -> tuple[int, int]:
        """Take the valid batches from `place` on; return where and why they end."""
        while self._bound is None or self._expected < self._bound:
            size = _WINDOW_SIZE
            if place + FRAME_HEADER_SIZE <= self._frames.size:
                size = max(size, _codec.frame_size(self._frames.view, place))
            data = self._frames.view[place : place + size]
            # At least one, since where batches have to end a log may end as well.
            n_wanted = max(1, min(_WINDOW_FRAMES, self._stop - self._expected))
            table = new_table(n_wanted)
            n, used, status = _codec.scan_frames(
                data, 0, self._frames.seed, self._expected, table
            )
            if n and self._expected == SEQUENCE_MAX:
                return place, _codec.STATUS_BAD_SEQUENCE
            if n:
                columns, m, bad = decode(data, table[:n])
                self._take(table[:m], columns)
                if m < n:
                    return place + int(table[m, _codec.ROW_OFFSET]), bad
                place += used
                continue
            return place, status
        return place, _codec.SCAN_MORE

    def _take(self, table: npt.NDArray[np.uint64], columns: Columns) -> None:
        if not len(table):
            return
        ends = np.cumsum(table[:, _codec.ROW_RECORDS]).tolist()
        self.found.runs.append(Run(self._expected, ends, columns))
        self._expected += len(table)
        self._know(self._expected - 1)

    def _next(self, place: int) -> _Head | None:
        """Return the next frame behind the bad one at `place` that may be believed."""
        start = place + 8 - place % 8
        own = self._frames.head_at(place)
        if own and own.kind == KIND_BATCH and own.sequence == self._expected:
            # Its size is known, so nothing inside it can pass for a frame.
            self._know(own.sequence)
            start = place + own.size
        for head in self._frames.heads_from(start):
            # A lower sequence, of an end frame too, is that of a copy in user data.
            if head.kind == KIND_BLOCK or head.sequence < self._expected:
                continue
            if self._bound is not None and head.sequence >= self._bound:
                continue
            if head.offset + head.size <= self._frames.size:
                return head
            self._know(head.sequence)
        return None


# ---- snapshots ----


@dataclasses.dataclass(frozen=True)
class Block:
    """A whole block."""

    offset: int
    size: int
    first_key: int
    last_key: int
    columns: Columns


@dataclasses.dataclass(frozen=True)
class LostBlock:
    """A block that is damaged: records with keys from `first_key` to `last_key`.

    Without an index, `n_records` is None, and several blocks may have been there.
    """

    offset: int
    size: int
    first_key: int
    last_key: int
    n_records: int | None


@dataclasses.dataclass(frozen=True)
class SnapshotSalvage:
    """What a damaged snapshot holds."""

    #: The last sequence that it contains, where header or end frame tell.
    sequence: int | None
    blocks: list[Block]
    lost: list[LostBlock]
    gaps: list[Gap]

    @property
    def is_whole(self) -> bool:
        """Whether every record is there all the same."""
        return not self.lost and self.sequence is not None


def salvage_snapshot(file: Evidence, seed: int) -> SnapshotSalvage:
    """Find every whole block of a snapshot."""
    walk = _SnapshotWalk(_Frames(file.view, seed, str(file.name)))
    walk.go()
    sequence = file.header.sequence if file.header else walk.end_sequence
    return SnapshotSalvage(sequence, walk.blocks, walk.lost(), _joined(walk.gaps))


def _joined(gaps: list[Gap]) -> list[Gap]:
    """Return gaps in order, those that meet as one."""
    joined: list[Gap] = []
    for gap in sorted(gaps, key=lambda gap: gap.offset):
        before = joined[-1] if joined else None
        if before is None or gap.offset > before.offset + before.size:
            joined.append(gap)
            continue
        stop = max(before.offset + before.size, gap.offset + gap.size)
        joined[-1] = Gap(before.offset, stop - before.offset, before.reason)
    return joined


class _SnapshotWalk:
    """Reads a snapshot block by block; the index, where whole, has the last word."""

    def __init__(self, frames: _Frames) -> None:
        self._frames = frames
        self._end_offset: int | None = None
        self._index: npt.NDArray[np.void] | None = None
        self.end_sequence: int | None = None
        self.blocks: list[Block] = []
        self.gaps: list[Gap] = []

    def go(self) -> None:
        """Walk through the file."""
        self._read_trailer()
        place = FILE_HEADER_SIZE
        while self._end_offset is None or place < self._end_offset:
            head = self._frames.head_at(place)
            if head and head.kind == KIND_END:
                if not self._read_end(head):
                    self._note(place, place + head.size, _END_IS_DAMAGED)
                break
            status = self._read_block(place, head)
            if not status and head:
                place += head.size
                continue
            behind = self._next(place, head)
            stop = behind.offset if behind else self._frames.size
            if behind is None and self._end_offset is not None:
                stop = self._end_offset
            self._note(place, stop, self._frames.reason(place, status))
            if behind is None:
                break
            place = behind.offset
        if self._index is not None:
            listed = set(self._index["offset"].tolist())
            self.blocks = [block for block in self.blocks if block.offset in listed]

    def _note(self, start: int, stop: int, reason: str) -> None:
        if stop > start:
            self.gaps.append(Gap(start, stop - start, reason))

    def _read_trailer(self) -> None:
        at = max(self._frames.size - TRAILER_SIZE, 0)
        trailer = bytes(self._frames.view[at:])
        seed, path = self._frames.seed, self._frames.path
        try:
            self._end_offset, _ = unpack_trailer(trailer, seed, path, at)
        except CorruptionError as error:
            self._note(at, self._frames.size, error.reason)
            return
        head = self._frames.head_at(self._end_offset)
        if not (head and head.kind == KIND_END and self._read_end(head)):
            self._note(self._end_offset, at, _END_IS_DAMAGED)

    def _read_end(self, head: _Head) -> bool:
        """Take what an end frame says; False if its index is damaged."""
        self.end_sequence = head.sequence
        self._end_offset = head.offset
        data = self._frames.view[head.offset : head.offset + head.size]
        table = new_table(1)
        _, _, status = _codec.scan_frames(
            data, 0, self._frames.seed, head.sequence, table, True
        )
        if status != _codec.SCAN_SEALED:
            return False
        size = INDEX_HEAD.size + head.n_records * INDEX_DTYPE.itemsize
        if size != int(table[0, _codec.ROW_PAYLOAD_SIZE]):
            return False
        if not _codec.check_payload(data, table[0]):
            return False
        payload = data[FRAME_HEADER_SIZE : FRAME_HEADER_SIZE + size]
        self._index = np.frombuffer(
            payload, INDEX_DTYPE, head.n_records, INDEX_HEAD.size
        )
        return True

    def _read_block(self, place: int, head: _Head | None) -> int:
        """Take the block at `place` if it is whole; return what is wrong, or 0."""
        size = head.size if head else FRAME_HEADER_SIZE
        data = self._frames.view[place : place + size]
        table = new_table(1)
        n, _, status = _codec.scan_frames(data, 0, self._frames.seed, 0, table, True)
        if n == 0:
            return status or _codec.STATUS_BAD_HEADER
        columns, n, status = decode(data, table)
        if n == 0:
            return status
        last = self.blocks[-1].last_key if self.blocks else -1
        in_order = _codec.first_disorder(columns.keys, columns.values) < 0
        if not len(columns) or not in_order or int(columns.keys[0]) <= last:
            return _codec.STATUS_BAD_PAYLOAD
        first, last = int(columns.keys[0]), int(columns.keys[-1])
        self.blocks.append(Block(place, size, first, last, columns))
        return 0

    def _next(self, place: int, head: _Head | None) -> _Head | None:
        start = place + 8
        if head and head.kind == KIND_BLOCK:
            start = place + head.size
        elif self._index is not None:
            # The index knows where the next block begins.
            behind = self._index["offset"][self._index["offset"] > place]
            start = int(behind.min()) if len(behind) else self._frames.size
        for found in self._frames.heads_from(start):
            if found.kind in (KIND_BLOCK, KIND_END):
                return found
        return None

    def lost(self) -> list[LostBlock]:
        """Return what is missing between the whole blocks."""
        if self._index is not None:
            return list(self._lost_of_index(self._index))
        end = self._end_offset
        lost = []
        at, key = FILE_HEADER_SIZE, 0
        for block in self.blocks:
            if block.offset > at:
                size, last = block.offset - at, block.first_key - 1
                lost.append(LostBlock(at, size, key, last, None))
            at, key = block.offset + block.size, block.last_key + 1
        if end is None or at < end:
            size = max(0, (self._frames.size if end is None else end) - at)
            lost.append(LostBlock(at, size, key, 2**64 - 1, None))
        return lost

    def _lost_of_index(self, index: npt.NDArray[np.void]) -> Iterator[LostBlock]:
        whole = {block.offset for block in self.blocks}
        stops = [*index["offset"].tolist()[1:], self._end_offset]
        for row, stop in zip(index, stops, strict=True):
            offset = int(row["offset"])
            if offset not in whole:
                first, last = int(row["first_key"]), int(row["last_key"])
                n_records = int(row["n_records"])
                yield LostBlock(offset, int(stop) - offset, first, last, n_records)
