"""Logs: append batches, read them back (docs/format.md, section 8)."""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import math
import os
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator

from metastore import _codec
from metastore._commit import Tail, weight
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

__all__ = [
    "LogContent",
    "LogFile",
    "LogWriter",
    "ends_sealed",
    "open_log",
    "prepare_log",
    "read_logs",
]

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
    def weight(self) -> int:
        """What its frames count for where they bound a recovery."""
        return self.tail.weight - FILE_HEADER_SIZE

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


@dataclasses.dataclass(frozen=True)
class LogFile:
    """A log to be read; who reads it closes the file."""

    file: FileProtocol
    #: Already checked.
    header: FileHeader
    #: The first sequence of the next log; None for the newest log.
    bound: int | None
    #: Whether to map the file, which nobody may be writing; an error of the medium is a
    #: signal then, and not an exception.
    is_mapped: bool


@dataclasses.dataclass
class LogContent:
    """What was read of one log, beside its records."""

    #: Bytes of the file.
    size: int
    n_batches: int
    #: Sequence of the batch behind the last one read.
    sequence: int
    #: Offset behind the last valid frame.
    end: int
    #: What the batches count for where they bound a recovery (``_commit.weight``).
    weight: int
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
    """Room for the records of logs, so that windows decode into it side by side.

    The first window tells how much room all logs will need; if they are uneven they
    take further extents.
    """

    def __init__(self, logs_size: int) -> None:
        self._left = logs_size
        self._extents: list[Columns] = []
        #: Records and bytes of user data, per extent, that are taken; and of those,
        #: that are kept.
        self._taken: list[tuple[int, int]] = []
        self._kept: list[tuple[int, int]] = []

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
        try:
            extent = Columns.allocate(n_records, user_data_size)
        except MemoryError:  # there may be room for what this window needs
            extent = Columns.allocate(n, size)
        self._extents.append(extent)
        self._taken.append((0, 0))
        self._kept.append((0, 0))

    def decode(self, window: _Window, place: _Place) -> tuple[int, int]:
        """Decode a window into its place; see ``_codec.decode_frames``."""
        target = self._extents[place.extent].target(
            place.start, place.stop, place.data_start, place.data_stop
        )
        return decode_into(window.data, window.table, target, place.data_start)

    def keep(self, place: _Place, table: Table, n_valid: int) -> tuple[int, int]:
        """Keep the first frames of the window at `place`; called in order.

        Returns their records and bytes of user data.
        """
        n, size = place.stop - place.start, place.data_stop - place.data_start
        if n_valid < len(table):
            n, size = _codec.totals(table[:n_valid])
        self._kept[place.extent] = place.start + n, place.data_start + size
        return n, size

    def parts(self) -> list[Columns]:
        """Return what was kept."""
        return [
            extent.head(n, size)
            for extent, (n, size) in zip(self._extents, self._kept, strict=True)
            if n
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


def open_log(
    directory: DirectoryProtocol,
    name: FileName,
    prepare: Callable[[FileProtocol], LogFile],
) -> LogFile:
    """Open a log and have it prepared; if that fails the file is closed."""
    with contextlib.ExitStack() as undo:
        file = directory.open(str(name))
        undo.callback(file.close)
        log = prepare(file)
        undo.pop_all()
        return log


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


class _Reading:
    """A log from its first window until its end was judged."""

    def __init__(self, log: LogFile) -> None:
        self._log = log
        self._source = _Source(log.file, log.is_mapped)
        self.scan = _Scan(self._source, log.header, log.bound)
        self.content = LogContent(
            self._source.size,
            0,
            log.header.sequence,
            FILE_HEADER_SIZE,
            weight=0,
            is_sealed=False,
            torn_size=0,
            damage=None,
        )

    def take(self, window: _Window, n_valid: int, n: int, user_data_size: int) -> bool:
        """Count the valid frames of the next window; return whether all of them are.

        They hold `n` records.
        """
        content = self.content
        content.n_batches += n_valid
        content.sequence += n_valid
        is_whole = n_valid == len(window.table)
        size = len(window.data)
        if not is_whole:
            size = int(window.table[n_valid, _codec.ROW_OFFSET])
        content.end = window.offset + size
        content.weight += weight(size, n, user_data_size)
        if is_whole:
            self._source.release(window.offset, size)
        return is_whole

    def judge(self, status: int) -> None:
        """Decide what the place behind the last valid frame means."""
        log = self._log
        _judge_end(
            self._source, self.content, log.header, log.bound, status, log.file.path
        )

    def close(self) -> None:
        """Give the file back; maps of it stay valid."""
        self._source.close()
        self._log.file.close()


#: A window of a log and its place; or neither, behind the last one; or None, where the
#: next log could not be read.
_Item = tuple[_Reading, tuple[_Window, _Place] | None] | None


def read_logs(
    logs: Iterable[LogFile],
    size: int,
    *,
    threads: int = 1,
    on_bytes: Callable[[int], None] | None = None,
) -> tuple[list[LogContent], list[Columns]]:
    """Read the batches of logs, one log behind the other.

    The windows of all are one stream of work: while those of one log are decoded, the
    next is opened and scanned; and the records of all go to the same extents. A log is
    closed once its end was judged, so that few are open at a time.

    Parameters
    ----------
    logs : iterable of LogFile
        Drawn one by one. Only the last may have no bound.
    size : int
        Bytes of all logs together.
    threads : int
        How many threads decode.
    on_bytes : callable, optional
        Told how many more bytes were read, from time to time.

    Returns
    -------
    contents : list of LogContent
        Up to the first log with damage: with a bad frame that is no torn tail. An error
        of a log behind that is not told.
    parts : list of Columns
        The records of all of them in order.
    """
    extents = _Extents(size)
    contents: list[LogContent] = []
    readings: deque[_Reading] = deque()
    errors: list[OSError] = []  # taken out to be raised: a kept one keeps all columns

    def items() -> Iterator[_Item]:
        try:
            yield from windows()
        except OSError as error:
            errors.append(error)
        if errors:
            yield None

    def windows() -> Iterator[_Item]:
        for log in logs:
            with contextlib.ExitStack() as undo:
                undo.callback(log.file.close)
                readings.append(_Reading(log))
                undo.pop_all()
            reading = readings[-1]
            for window in reading.scan:
                yield reading, (window, extents.reserve(window))
            yield reading, None

    def decode(item: _Item) -> tuple[_Reading, tuple[_Window, _Place] | None, int, int]:
        if item is None:  # in its turn: damage in a log before it comes first
            raise errors.pop()
        reading, job = item
        return (reading, job, *extents.decode(*job)) if job else (reading, job, 0, 0)

    try:
        decoded = ordered_map(decode, items(), threads, caller_works=True)
        with contextlib.closing(decoded):
            for reading, job, n, status in decoded:
                if job is None:
                    reading.content.end = reading.scan.stop
                    status = reading.scan.status
                    reading.content.is_sealed = status == _codec.SCAN_SEALED
                else:
                    window, place = job
                    kept = extents.keep(place, window.table, n)
                    if reading.take(window, n, *kept):
                        if on_bytes:
                            on_bytes(len(window.data))
                        continue
                reading.judge(status)
                contents.append(reading.content)
                readings.popleft().close()
                if job is not None or reading.content.damage is not None:
                    break
    finally:
        errors.clear()
        for reading in readings:
            reading.close()
    return contents, extents.parts()


class _Scan:
    """Iterates over the windows of a log; afterwards tells where and why it stopped."""

    def __init__(self, source: _Source, header: FileHeader, bound: int | None) -> None:
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
    if status == _codec.STATUS_BAD_PAYLOAD:
        # Its header is valid, and so is the size; elsewhere that may be anything.
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
