"""Logs: append batches, read them back (docs/format.md, section 8)."""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import math
import os
import time
from collections.abc import Callable, Iterator

from metastore import _codec
from metastore._commit import Tail
from metastore.columns import Columns
from metastore.directory import (
    DirectoryProtocol,
    FileName,
    FileProtocol,
    publish,
    release_pages,
)
from metastore.errors import CorruptionError
from metastore.format import (
    CHECKSUM_XOR,
    FILE_HEADER_SIZE,
    FRAME_HEADER_SIZE,
    KIND_END,
    LAYOUT_PLAIN,
    FileHeader,
    log_seed,
    size_without_zeros,
)
from metastore.frames import Table, corruption, decode_into, new_table
from metastore.parallel import ordered_map
from metastore.read_ahead import ReadAhead

__all__ = ["LogContent", "LogWriter", "ends_sealed", "prepare_log", "read_log"]

#: Behind its last frame a log has fewer zeros than this.
_TAIL_SIZE_MAX = (1 << 20) + 4096

#: A log is read, and its payloads are decoded, in windows of this size.
_WINDOW_SIZE = 2 << 20
_WINDOW_SIZE_LARGE = 32 << 20
_WINDOW_FRAMES = 1 << 15

#: Room for a log is taken for this much more than its first window lets expect, and at
#: most for so many bytes per byte of the log; a record takes this much beside its data.
_EXTENT_MARGIN = 1.02
_EXTENT_SIZE_PER_BYTE = 8
_RECORD_SIZE = 24

#: A log begins with so many zeros (``_commit`` says why); its header is among them.
_AHEAD_SIZE_MIN = 64 << 10

#: Bad frames that a torn write can leave; any other is damage or forgery.
_TORN_STATUSES = frozenset(
    {
        _codec.SCAN_NO_BYTES,
        _codec.SCAN_INCOMPLETE,
        _codec.STATUS_BAD_HEADER,
        _codec.STATUS_BAD_PAYLOAD,
    }
)


# ---- writing ----


def prepare_log(directory: DirectoryProtocol, name: FileName) -> FileProtocol:
    """Create the temporary file of a log, with room for its header and first frames.

    It is not published: only then is its first sequence known.
    """
    file = directory.create(name.temporary)
    try:
        file.write([bytes(_AHEAD_SIZE_MIN)], 0)
        file.sync()
    except BaseException:
        file.close()
        raise
    return file


class LogWriter:
    """The active log. Not thread-safe: who leads the commits writes.

    Parameters
    ----------
    directory : DirectoryProtocol
        Where it lies.
    name : FileName
        Its name.
    store_id : bytes
        That of the store.
    sequence : int
        The sequence of the first batch that it will hold.
    prepared : FileProtocol, optional
        What :func:`prepare_log` returned for this name.

    Attributes
    ----------
    tail : Tail
        Where batches are appended.
    """

    def __init__(
        self,
        directory: DirectoryProtocol,
        name: FileName,
        store_id: bytes,
        sequence: int,
        prepared: FileProtocol | None = None,
    ) -> None:
        self.name = name
        self.first_sequence = sequence
        self._file = prepared or prepare_log(directory, name)
        try:
            header = FileHeader("log", store_id, name.number, sequence, time.time_ns())
            self._file.write([header.pack()], 0)
            self._file.sync()
            publish(directory, name)
            self.tail = Tail(
                self._file,
                os.path.join(directory.path, str(name)),
                log_seed(store_id, name.number),
                sequence,
                FILE_HEADER_SIZE,
                _AHEAD_SIZE_MIN,
            )
        except BaseException:
            self._file.close()
            raise

    @property
    def sequence(self) -> int:
        """The sequence of the next batch."""
        return self.tail.sequence

    @property
    def size(self) -> int:
        """Where the next frame goes."""
        return self.tail.size

    @property
    def is_empty(self) -> bool:
        """Whether it holds no batch."""
        return self.tail.sequence == self.first_sequence

    def seal(self) -> None:
        """Write the end frame and make it durable; all before must be already."""
        self.tail.seal(_codec.encode_payload(KIND_END, LAYOUT_PLAIN, 0, 0, ()))

    def close(self) -> None:
        """Give the file back; idempotent. Nobody may be appending."""
        self._file.close()


# ---- reading ----


@dataclasses.dataclass
class LogContent:
    """What was read of one log."""

    #: Records of the batches in order, a part per window.
    parts: list[Columns]
    n_batches: int
    #: Sequence of the batch behind the last one read.
    sequence: int
    #: Offset behind the last valid frame.
    end: int
    is_sealed: bool
    #: Size of the torn tail at `end`, in bytes; 0 if there is none.
    torn_size: int
    #: Damage at `end` that ended the reading; the batches before it are valid.
    damage: CorruptionError | None


@dataclasses.dataclass(frozen=True)
class _Window:
    """Scanned frames that wait to be decoded."""

    data: memoryview
    offset: int
    table: Table


@dataclasses.dataclass(frozen=True)
class _Place:
    """Where the records of a window go: an extent, and a range of each column in it."""

    extent: int
    start: int
    stop: int
    data_start: int
    data_stop: int


class _Extents:
    """Room for the records of a log, so that windows decode into it side by side.

    The first window tells how much room the whole log will need; a log that is uneven
    takes a further extent.
    """

    def __init__(self, log_size: int) -> None:
        self._left = log_size
        self._extents: list[Columns] = []
        #: Records and bytes of user data that are taken, per extent.
        self._taken: list[tuple[int, int]] = []

    def reserve(self, window: _Window) -> _Place:
        """Return a place with room for the window's records."""
        n, size = _codec.totals(window.table)
        if not self._extents or not self._fits(n, size):
            self._extend(n, size, len(window.data))
        self._left -= len(window.data)
        start, low = self._taken[-1]
        self._taken[-1] = start + n, low + size
        return _Place(len(self._extents) - 1, start, start + n, low, low + size)

    def _fits(self, n: int, size: int) -> bool:
        record, user_data = self._taken[-1]
        extent = self._extents[-1]
        return len(extent) - record >= n and len(extent.user_data) - user_data >= size

    def _extend(self, n: int, size: int, window_size: int) -> None:
        share = max(1.0, self._left / window_size * _EXTENT_MARGIN)
        # A frame of few bytes may unpack to many: one window's claim must not reserve
        # much more than a log of plain frames could need.
        limit = _EXTENT_SIZE_PER_BYTE * self._left
        n_records = max(n, min(int(n * share) + 1, limit // _RECORD_SIZE))
        user_data_size = max(size, min(math.ceil(size * share), limit))
        self._extents.append(Columns.allocate(n_records, user_data_size))
        self._taken.append((0, 0))

    def decode(self, window: _Window, place: _Place) -> tuple[int, int]:
        """Decode a window into its place; see ``_codec.decode_frames``."""
        target = self._extents[place.extent].target(
            place.start, place.stop, place.data_start, place.data_stop
        )
        return decode_into(window.data, window.table, target, place.data_start)

    def cut(self, place: _Place, table: Table) -> None:
        """Give up everything behind the frames of `table` in the window at `place`."""
        n, size = _codec.totals(table)
        del self._extents[place.extent + 1 :], self._taken[place.extent + 1 :]
        self._taken[place.extent] = place.start + n, place.data_start + size

    def parts(self) -> list[Columns]:
        """Return what was decoded."""
        return [
            extent.head(n, size)
            for extent, (n, size) in zip(self._extents, self._taken, strict=True)
        ]


class _Source:
    """Windows of a file: slices of a map, or copies if the file may still change."""

    def __init__(self, file: FileProtocol, mapped: bool) -> None:
        self.size = file.size()
        self._file = file
        self._view = file.view() if mapped else None
        self._ahead = ReadAhead(file, self._view or memoryview(b""))

    def read(self, offset: int, size: int) -> memoryview:
        size = min(size, self.size - offset)
        if self._view is not None:
            self._ahead.wait(offset + size)
            return self._view[offset : offset + size]
        data = memoryview(self._file.read(offset, size))
        if len(data) < size:
            raise OSError(
                errno.EIO, "the file shrank while it was read", self._file.path
            )
        return data

    def release(self, offset: int, size: int) -> None:
        """Say that a part is not needed any more."""
        if self._view is not None:
            release_pages(self._view, offset, offset + size)

    def close(self) -> None:
        """End what reads ahead."""
        self._ahead.close()


def ends_sealed(file: FileProtocol, header: FileHeader) -> bool:
    """Return whether an end frame stands behind everything in a log but zeros.

    Every sync of the batches had succeeded before it was written: so what the cache
    shows of them is on the medium, whether the end frame is or not.
    """
    size = file.size()
    start = max(FILE_HEADER_SIZE, size // 8 * 8 - _TAIL_SIZE_MAX)
    data = bytes(file.read(start, size - start))
    used = size_without_zeros(data)
    seed = log_seed(header.store_id, header.number)
    # The frame's last bytes may be zeros, too.
    for at in range(max(used - FRAME_HEADER_SIZE, 0) // 8 * 8, used, 8):
        frame = data[at : at + FRAME_HEADER_SIZE]
        checksum = int.from_bytes(frame[:4], "little") ^ CHECKSUM_XOR
        if (
            len(frame) == FRAME_HEADER_SIZE
            and frame[4] == KIND_END
            and _codec.crc32c(frame[4:], seed) == checksum
        ):
            return True
    return False


def read_log(
    file: FileProtocol,
    header: FileHeader,
    *,
    bound: int | None = None,
    mapped: bool = False,
    threads: int = 1,
    on_bytes: Callable[[int], None] | None = None,
) -> LogContent:
    """Read the batches of a log.

    Parameters
    ----------
    file : FileProtocol
        The log; it may be sealed, bounded or open.
    header : FileHeader
        Its header, already checked.
    bound : int, optional
        The first sequence of the next log; None for the newest log.
    mapped : bool
        Whether to map the file, which nobody may be writing; an error of the medium is
        a signal then, and not an exception.
    threads : int
        How many threads decode.
    on_bytes : callable, optional
        Told how many more bytes were read, from time to time.

    Returns
    -------
    LogContent
        With `damage` set where a bad frame is not a torn tail.
    """
    with contextlib.closing(_Source(file, mapped)) as source:
        scan = _Scan(source, header, bound, file.path)
        content = LogContent([], 0, header.sequence, FILE_HEADER_SIZE, False, 0, None)

        extents = _Extents(source.size)

        def decode(job: tuple[_Window, _Place]) -> tuple[_Window, _Place, int, int]:
            return (*job, *extents.decode(*job))

        jobs = ((window, extents.reserve(window)) for window in scan)
        bad: tuple[int, int] | None = None
        decoded = ordered_map(decode, jobs, threads, caller_works=True)
        with contextlib.closing(decoded):
            for window, place, n, status in decoded:
                content.n_batches += n
                content.sequence += n
                if n < len(window.table):
                    row = window.table[n, _codec.ROW_OFFSET]
                    bad = window.offset + int(row), status
                    extents.cut(place, window.table[:n])
                    break
                content.end = window.offset + len(window.data)
                source.release(window.offset, len(window.data))
                if on_bytes:
                    on_bytes(len(window.data))
        content.parts = extents.parts()
        if bad is None:
            bad = scan.stop, scan.status
            content.is_sealed = scan.status == _codec.SCAN_SEALED
        content.end = bad[0]
        _judge_end(source, content, header, bound, bad[1], file.path)
        return content


class _Scan:
    """Iterates over the windows of a log; afterwards tells where and why it stopped."""

    def __init__(
        self, source: _Source, header: FileHeader, bound: int | None, path: str
    ) -> None:
        self._source = source
        self._seed = log_seed(header.store_id, header.number)
        self._sequence = header.sequence
        self._bound = bound
        self.stop = FILE_HEADER_SIZE
        self.status = _codec.SCAN_MORE

    def __iter__(self) -> Iterator[_Window]:
        size = _WINDOW_SIZE
        while True:
            n_wanted = _WINDOW_FRAMES
            if self._bound is not None:
                n_wanted = min(n_wanted, self._bound - self._sequence)
            # One row more than batches are wanted, so that an end frame is seen.
            table = new_table(n_wanted + 1)
            start = self.stop
            data = self._source.read(start, size)
            n, used, self.status = _codec.scan_frames(
                data, 0, self._seed, self._sequence, table
            )
            if n > n_wanted:
                used = int(table[n_wanted, _codec.ROW_OFFSET])
                n, self.status = n_wanted, _codec.SCAN_MORE
            self._sequence += n
            self.stop = start + used
            if n:
                yield _Window(data[:used], start, table[:n])
            at_end = start + len(data) == self._source.size
            if self.status == _codec.SCAN_INCOMPLETE and not at_end:
                claimed = _codec.frame_size(data, used)
                if claimed > self._source.size - self.stop:
                    return
                # The next ones may be like it; half of a window read twice is enough.
                size = max(size, claimed, min(4 * claimed, _WINDOW_SIZE_LARGE))
            elif self.status == _codec.SCAN_NO_BYTES and not at_end:
                continue
            elif self.status != _codec.SCAN_MORE or self._sequence == self._bound:
                return


def _judge_end(
    source: _Source,
    content: LogContent,
    header: FileHeader,
    bound: int | None,
    status: int,
    path: str,
) -> None:
    """Decide what the first place without a valid batch means (section 8)."""
    end = content.end
    if bound is not None and content.sequence == bound:
        return  # what lies behind is not read
    if content.is_sealed:
        if bound is not None:
            content.damage = CorruptionError(
                path,
                end,
                f"batches {content.sequence} to {bound - 1} are missing between "
                "this log and the next: a log was lost",
            )
        return
    seed = log_seed(header.store_id, header.number)
    frame = source.read(end, _codec.FRAME_HEADER_SIZE)
    if len(frame) == _codec.FRAME_HEADER_SIZE:
        frame = source.read(end, min(_codec.frame_size(frame, 0), source.size - end))
    found = corruption(path, end, status, frame, seed)
    if bound is not None:
        found.reason += f" (a later log begins at batch {bound})"
        content.damage = found
        return
    if status not in _TORN_STATUSES:
        content.damage = found
        return
    last = _last_nonzero(source, end)
    if last < 0:
        return
    proof = _find_durable(source, end, seed, content.sequence)
    if proof >= 0:
        found.reason += (
            f": the frame at offset {proof} says "
            f"that batch {content.sequence} was durable"
        )
        content.damage = found
        return
    content.torn_size = last + 1 - end


def _windows(source: _Source, offset: int) -> Iterator[tuple[int, memoryview]]:
    while offset < source.size:
        data = source.read(offset, _WINDOW_SIZE)
        if not data:
            return
        yield offset, data
        offset += len(data)


def _last_nonzero(source: _Source, start: int) -> int:
    last = -1
    for offset, data in _windows(source, start):
        size = size_without_zeros(bytes(data))
        if size:
            last = offset + size - 1
    return last


def _find_durable(source: _Source, start: int, seed: int, sequence: int) -> int:
    offset = start
    while offset < source.size:
        # Windows overlap by less than a header, so that none is missed between two.
        data = source.read(offset, _WINDOW_SIZE + FRAME_HEADER_SIZE - 8)
        found = _codec.find_durable(data, 0, seed, sequence)
        if found >= 0:
            return offset + found
        offset += _WINDOW_SIZE
    return -1
