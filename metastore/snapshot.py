"""Snapshots: write sorted blocks, read them back (docs/format.md, section 7)."""

from __future__ import annotations

import contextlib
import itertools
import math
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import numpy as np
import numpy.typing as npt

from metastore import _codec
from metastore._commit import weight
from metastore.columns import Columns, merge, merge_into, merged_size
from metastore.directory import (
    DirectoryProtocol,
    FileName,
    FileProtocol,
    publish,
    release_pages,
    scattered_reads,
)
from metastore.errors import CorruptionError
from metastore.format import (
    BLOCK_RECORDS_TARGET,
    BLOCK_USER_DATA_SIZE_MAX,
    FILE_HEADER_SIZE,
    FRAME_HEADER_SIZE,
    INDEX_DTYPE,
    INDEX_HEAD,
    KIND_END,
    LAYOUT_PLAIN,
    PACKED_RATIO_MAX,
    PACKED_SIZE_MAX,
    TRAILER_SIZE,
    FileHeader,
    pack_trailer,
    snapshot_seed,
    unpack_trailer,
)
from metastore.frames import corruption, decode, decode_into, encode_block, new_table
from metastore.gate import Gate
from metastore.pace import Pace, give_way
from metastore.parallel import ordered_map, submit
from metastore.read_ahead import ReadAhead

__all__ = ["SnapshotReader", "SnapshotWriter", "split_into_blocks"]

#: So many are checked at a time: one alone takes no longer than to hand it to a thread.
_CHECK_BLOCKS = 4
#: Bytes that a writer collects before it calls the operating system.
_WRITE_SIZE = 1 << 20
#: Bytes between two syncs: all in one at the end would hold up those of the log, and
#: leave nothing to do meanwhile. A sync costs the same whatever its size, so there are
#: fewer while nobody waits.
_SYNC_SIZE = 16 << 20
#: Both while commits come, and the least of a piece: a block is then two, as a rule.
#: A commit may wait for a piece that the device has; shorter ones come more often.
_GENTLE_SIZE = 320 << 10


class SnapshotReader:
    """A mapped snapshot whose header, index and trailer were checked.

    Blocks are checked when they are read. Thread-safe.

    Parameters
    ----------
    file : FileProtocol
        The snapshot; once it is closed, nothing of it is read ahead.
    header : FileHeader
        Its header, already checked.

    Raises
    ------
    CorruptionError
        If anything but a block is damaged.
    """

    def __init__(self, file: FileProtocol, header: FileHeader) -> None:
        self.path = file.path
        self.header = header
        self.view = file.view()
        self.size = len(self.view)
        self._seed = snapshot_seed(header.store_id)
        self._file = file
        with scattered_reads(self.view):
            self._read_structure()

    def _read_structure(self) -> None:
        trailer_at = max(self.size - TRAILER_SIZE, 0)
        self._file.fetch(trailer_at, self.size - trailer_at)
        trailer = bytes(self.view[trailer_at:])
        self.end_offset, _ = unpack_trailer(trailer, self._seed, self.path, trailer_at)
        self._file.fetch(self.end_offset, trailer_at - self.end_offset)
        self.index, self.n_records, self.user_data_size = self._read_index(trailer_at)
        self._check_index()

    @property
    def weight(self) -> int:
        """What it counts for beside the logs that it allows (``_commit.weight``)."""
        return weight(self.size, self.n_records, self.user_data_size)

    def _read_index(self, trailer_at: int) -> tuple[npt.NDArray[np.void], int, int]:
        end = self.view[self.end_offset : trailer_at]
        table = new_table(1)
        _, _, status = _codec.scan_frames(
            end, 0, self._seed, self.header.sequence, table, True
        )
        if status != _codec.SCAN_SEALED or not _codec.check_payload(end, table[0]):
            if status == _codec.SCAN_MORE:  # a block
                status = _codec.STATUS_BAD_KIND
            elif status == _codec.SCAN_SEALED:
                status = _codec.STATUS_BAD_PAYLOAD
            raise corruption(self.path, self.end_offset, status, end, self._seed)
        n_blocks = int(table[0, _codec.ROW_RECORDS])
        size = int(table[0, _codec.ROW_PAYLOAD_SIZE])
        expected = INDEX_HEAD.size + n_blocks * INDEX_DTYPE.itemsize
        if size != expected or len(end) != (FRAME_HEADER_SIZE + size + 7) & ~7:
            raise self._error(
                self.end_offset, f"index of {n_blocks} blocks in {size} bytes"
            )
        payload = end[FRAME_HEADER_SIZE : FRAME_HEADER_SIZE + size]
        n_records, user_data_size = INDEX_HEAD.unpack_from(payload)
        index = np.frombuffer(payload, INDEX_DTYPE, n_blocks, INDEX_HEAD.size)
        return index, n_records, user_data_size

    def _check_index(self) -> None:
        """Check what the index says of itself; each block is checked when it is read.

        Not here: pages in the cache that lie scattered halve the speed at which the
        system reads what is between them.
        """
        index = self.index
        starts = np.append(index["offset"], np.uint64(self.end_offset))

        def refuse(is_wrong: npt.NDArray[np.bool_], reason: str) -> None:
            if is_wrong.any():
                block = int(is_wrong.argmax())
                raise self._error(int(starts[block]), reason.format(block))

        if starts[0] != FILE_HEADER_SIZE:
            raise self._error(FILE_HEADER_SIZE, "blocks and index do not meet")
        if (starts[:-1] >= starts[1:]).any():  # so they may lie outside the file
            raise self._error(self.end_offset, "offsets in the index do not increase")
        refuse(index["n_records"] == 0, "block {} has no records")
        sizes = np.diff(starts)
        packed_max = np.minimum(PACKED_RATIO_MAX * sizes, PACKED_SIZE_MAX)
        claims = 20.0 * index["n_records"] + index["user_data_size"]
        refuse(  # before as much memory is taken
            claims > np.maximum(sizes, packed_max),
            "the index claims more for block {} than it can hold",
        )
        first, last = index["first_key"], index["last_key"]
        refuse(
            (first > last) | np.append(first[1:] <= last[:-1], False),
            "block {} is out of order in the index",
        )
        totals = (
            sum(index["n_records"].tolist()),
            sum(index["user_data_size"].tolist()),
        )
        if totals != (self.n_records, self.user_data_size):
            raise self._error(self.end_offset, "the sums of the index do not agree")

    def check_headers(self) -> None:
        """Check the header of every block, without reading what is between them."""
        with scattered_reads(self.view):
            for block, offset in enumerate(self.index["offset"].tolist()):
                self._file.fetch(offset, FRAME_HEADER_SIZE)
                self.check_header(block)
                self._release(block)

    def check_header(self, block: int) -> npt.NDArray[np.uint64]:
        """Check the header of a block, and that the index agrees; return its row."""
        start, end = self.block_range(block)
        table = new_table(1)
        n, stop, status = _codec.scan_frames(
            self.view[: self.end_offset], start, self._seed, 0, table, True
        )
        if n == 0:
            raise corruption(self.path, stop, status, self.view[start:end], self._seed)
        if stop != end:
            raise self._error(stop, "blocks and index do not meet")
        for field, column in (
            ("n_records", _codec.ROW_RECORDS),
            ("user_data_size", _codec.ROW_USER_DATA_SIZE),
            ("header_checksum", _codec.ROW_CHECKSUM),
        ):
            if self.index[field][block] != table[0, column]:
                raise self._error(
                    start, f"the index has another {field} for block {block}"
                )
        return table

    def _error(self, offset: int, reason: str) -> CorruptionError:
        return CorruptionError(self.path, offset, reason)

    @property
    def n_blocks(self) -> int:
        """How many blocks there are."""
        return len(self.index)

    def block_range(self, block: int) -> tuple[int, int]:
        """Return where the frame of a block begins and ends in the file."""
        start = int(self.index["offset"][block])
        if block + 1 < self.n_blocks:
            return start, int(self.index["offset"][block + 1])
        return start, self.end_offset

    def _check_block(self, block: int, n: int, status: int, columns: Columns) -> None:
        offset = int(self.index["offset"][block])
        if n == 0:
            frame = self.view[offset : self.block_range(block)[1]]
            raise corruption(self.path, offset, status, frame, self._seed)
        bad = _codec.first_disorder(columns.keys, columns.values)
        if bad >= 0:
            raise self._error(
                offset, f"record {bad} of block {block} is out of order or deleted"
            )
        row = self.index[block]
        if len(columns) and (
            columns.keys[0] != row["first_key"] or columns.keys[-1] != row["last_key"]
        ):
            raise self._error(offset, f"the index has other keys for block {block}")

    def read_block(self, block: int) -> Columns:
        """Decode and check one block."""
        give_way()
        columns, n, status = decode(self.view, self.check_header(block))
        self._check_block(block, n, status, columns)
        self._release(block)
        return columns

    def _release(self, block: int) -> int:
        start, stop = self.block_range(block)
        release_pages(self.view, start, stop)
        return stop - start

    def read_all(
        self, threads: int = 1, on_bytes: Callable[[int], None] | None = None
    ) -> Columns:
        """Decode all blocks, each straight into its place in the result."""
        whole = Columns.allocate(self.n_records, self.user_data_size)
        record_at = _running_sum(self.index["n_records"])
        data_at = _running_sum(self.index["user_data_size"])

        def read(block: int) -> None:
            self._read_into(whole, block, record_at[block], data_at[block])

        self._read_blocks(read, threads, on_bytes)
        return whole

    def read_merged(
        self,
        run: Columns,
        threads: int = 1,
        on_bytes: Callable[[int], None] | None = None,
    ) -> Columns:
        """Decode all blocks, each merged with its part of a run; the run wins.

        A block is merged while it is in the processor's cache. Where it goes is known
        once those before it have been counted; room is taken, and kept, as if no key of
        the run were in the snapshot, and what is left over is never touched.

        Parameters
        ----------
        run : Columns
            Records by strictly increasing key; a value of 0 deletes.
        threads, on_bytes
            As for :meth:`read_all`.
        """
        if not self.n_blocks:
            return merge(Columns.allocate(0, 0), run, threads)
        whole = Columns.allocate(
            self.n_records + len(run), self.user_data_size + run.user_data_size
        )
        inner = np.searchsorted(run.keys, self.index["first_key"][1:]).tolist()
        cuts = [0, *inner, len(run)]
        places = _Places()
        touched = self.index[np.diff(cuts) > 0]
        scratch = _Scratch(
            int(touched["n_records"].max(initial=0)),
            int(touched["user_data_size"].max(initial=0)),
        )

        def read(block: int) -> None:
            with places.of(block):
                part = run.part(*cuts[block : block + 2])
                if len(part) == 0:
                    at, data_at = places.take(block, *self._size_of(block))
                    self._read_into(whole, block, at, data_at)
                    return
                self._read_into(scratch.columns, block, 0, 0)
                old = scratch.columns.head(*self._size_of(block))
                n, size = merged_size(old, part)
                at, data_at = places.take(block, n, size)
                merge_into(old, part, whole, at, data_at, n, size)

        self._read_blocks(read, threads, on_bytes, places.stop)
        return whole.head(*places.end)

    def _size_of(self, block: int) -> tuple[int, int]:
        """Return the records of a block, and the bytes of their user data."""
        row = self.index[block]
        return int(row["n_records"]), int(row["user_data_size"])

    def _read_into(self, columns: Columns, block: int, at: int, data_at: int) -> None:
        """Decode and check a block; its first record and byte go to these places."""
        n_records, size = self._size_of(block)
        stop, data_stop = at + n_records, data_at + size
        n, status = decode_into(
            self.view,
            self.check_header(block),
            columns.target(at, stop, data_at, data_stop),
            data_at,
        )
        self._check_block(block, n, status, columns.part(at, stop))

    def _read_blocks(
        self,
        read: Callable[[int], None],
        threads: int,
        on_bytes: Callable[[int], None] | None,
        on_end: Callable[[], None] = lambda: None,
    ) -> None:
        """Call `read` with each block that has arrived; tell how many bytes it had."""

        def read_and_release(block: int) -> int:
            read(block)
            return self._release(block)

        ahead = ReadAhead(self._file, self.view[: self.end_offset])
        with contextlib.closing(ahead):
            arrived = self._arrived(ahead)
            sizes = ordered_map(
                read_and_release, arrived, threads, caller_works=True, on_end=on_end
            )
            with contextlib.closing(sizes):
                for size in sizes:
                    if on_bytes:
                        on_bytes(size)

    def _arrived(self, ahead: ReadAhead) -> Iterator[int]:
        """Yield each block once it is in the page cache."""
        for block in range(self.n_blocks):
            ahead.wait(self.block_range(block)[1])
            yield block

    def check_payloads(self, threads: int = 1, pace: Pace | None = None) -> None:
        """Read every block back and check its checksum, without decoding it."""
        pace = pace or Pace()

        def check(first: int) -> None:
            for block in range(first, min(first + _CHECK_BLOCKS, self.n_blocks)):
                if not _codec.check_payload(self.view, self.check_header(block)[0]):
                    offset, end = self.block_range(block)
                    raise corruption(
                        self.path,
                        offset,
                        _codec.STATUS_BAD_PAYLOAD,
                        self.view[offset:end],
                        self._seed,
                    )
                self._release(block)

        firsts = range(0, self.n_blocks, _CHECK_BLOCKS)
        checked = ordered_map(check, firsts, threads, pace.at_once, caller_works=True)
        with contextlib.closing(checked):
            for _ in checked:
                pace.rest()


class _Places:
    """Where each block's records go, block by block; thread-safe.

    A block waits for those before it to be counted. They have begun before it, or will
    without it; if one fails, or the end comes early, those behind it are freed.
    """

    def __init__(self) -> None:
        #: Records, and bytes of user data, of the blocks that were counted.
        self.end = (0, 0)
        # Both are of C: an interrupt of the caller, who works too, must not break them.
        self._lock = threading.Lock()
        self._gates: dict[int, Gate] = {}  # of blocks that wait
        self._n_counted = 0
        #: No block behind this one gets a place any more.
        self._last: float = math.inf

    @contextlib.contextmanager
    def of(self, block: int) -> Iterator[None]:
        """While a block is worked on: if that fails, free those behind it."""
        try:
            yield
        except BaseException:
            self.stop(block)
            raise

    def stop(self, last: int = -1) -> None:
        """Free those that wait for a place behind this block."""
        with self._lock:
            self._last = min(self._last, last)
            for block, gate in self._gates.items():
                if block > last:
                    gate.open()

    def take(self, block: int, n_records: int, size: int) -> tuple[int, int]:
        """Return where a block of this size begins, once that is known."""
        gate = Gate()
        with self._lock:
            self._gates[block] = gate
            if self._n_counted == block or self._last < block:
                gate.open()
        gate.wait()
        with self._lock:
            del self._gates[block]
            if self._n_counted != block:
                raise RuntimeError("a block before this one was not counted")
            at, data_at = self.end
            self.end = at + n_records, data_at + size
            self._n_counted += 1
            if self._n_counted in self._gates:
                self._gates[self._n_counted].open()
            return at, data_at


class _Scratch(threading.local):
    """Columns of each thread, for one block at a time."""

    def __init__(self, n_records: int, size: int) -> None:
        self.columns = Columns.allocate(n_records, size)


def _running_sum(column: npt.NDArray[Any]) -> list[int]:
    return list(itertools.accumulate(column.tolist(), initial=0))


def split_into_blocks(columns: Columns) -> list[Columns]:
    """Cut sorted records into parts of a block each, of about equal size."""
    n = len(columns)
    if n == 0:
        return []
    n_parts = max(1, round(n / BLOCK_RECORDS_TARGET))
    if columns.user_data_size <= BLOCK_USER_DATA_SIZE_MAX * n_parts // 2:
        # Nothing is near the bound in bytes unless sizes vary wildly; checked below.
        cuts = [n * i // n_parts for i in range(n_parts + 1)]
        parts = [columns.part(a, b) for a, b in itertools.pairwise(cuts)]
        if all(part.user_data_size <= BLOCK_USER_DATA_SIZE_MAX for part in parts):
            return parts
    parts = []
    start = 0
    while start < n:
        limit = int(columns.offsets[start]) + BLOCK_USER_DATA_SIZE_MAX
        by_size = int(np.searchsorted(columns.offsets, limit, side="right")) - 1
        stop = min(max(by_size, start + 1), start + BLOCK_RECORDS_TARGET, n)
        parts.append(columns.part(start, stop))
        start = stop
    return parts


class SnapshotWriter:
    """Writes a snapshot block by block under its temporary name. Not thread-safe.

    Parameters
    ----------
    directory : DirectoryProtocol
        Where it is to lie.
    name : FileName
        Its name once published.
    store_id : bytes
        That of the store.
    sequence : int
        The last sequence that it will contain.
    threads : int
        If there may be more than one, another syncs while this one goes on writing.
    pace : Pace, optional
        Of the compaction: while it is gentle, less is written at once, and each piece
        synced; between two of them the writer rests.
    """

    def __init__(
        self,
        directory: DirectoryProtocol,
        name: FileName,
        store_id: bytes,
        sequence: int,
        threads: int = 1,
        pace: Pace | None = None,
    ) -> None:
        self._directory = directory
        self._name = name
        self._sequence = sequence
        self._pace = pace or Pace()
        self._seed = snapshot_seed(store_id)
        self._rows: list[npt.NDArray[np.void]] = []
        self._pending: list[memoryview] = []
        self._pending_size = 0
        self._written = 0
        self._synced = 0
        self._file = directory.create(name.temporary)
        self._pool = ThreadPoolExecutor(1, "metastore-sync") if threads > 1 else None
        self._syncing: Future[None] | None = None
        self._is_finished = False
        header = FileHeader("snapshot", store_id, name.number, sequence, time.time_ns())
        self._put(header.pack())

    @property
    def size(self) -> int:
        """Bytes of the file so far."""
        return self._written + self._pending_size

    def _put(self, data: bytes | bytearray | memoryview) -> None:
        """Append; while commits come in equal pieces, with a rest between them."""
        left = memoryview(data)
        while self._pace.is_gentle and (n_pieces := len(left) // _GENTLE_SIZE) > 1:
            size = len(left) // n_pieces
            self._put_piece(left[:size])
            left = left[size:]
            self._pace.rest()
        self._put_piece(left)

    def _put_piece(self, data: memoryview) -> None:
        self._pending.append(data)
        self._pending_size += len(data)
        gentle = self._pace.is_gentle
        if self._pending_size >= (_GENTLE_SIZE if gentle else _WRITE_SIZE):
            self._write_pending()

    def _write_pending(self) -> None:
        if self._pending:
            self._file.write(self._pending, self._written)
            self._written += self._pending_size
            self._pending, self._pending_size = [], 0
        sync_size = _GENTLE_SIZE if self._pace.is_gentle else _SYNC_SIZE
        if self._written - self._synced >= sync_size:
            self._sync_so_far()

    def _sync_so_far(self) -> None:
        """Sync what was written, or begin to; raise if the sync before failed."""
        self._synced = self._written
        if self._pool is None:
            self._file.sync()
            return
        if self._syncing is not None:
            self._syncing.result()
        self._syncing = submit(self._pool, lambda file: file.sync(), self._file)

    def put_block(self, columns: Columns, frame: bytearray) -> None:
        """Append a block that :func:`frames.encode_block` made of `columns`."""
        _codec.finish_frame(frame, self._seed, 0, 0)
        row = np.zeros(1, INDEX_DTYPE)
        row["offset"] = self.size
        row["first_key"] = columns.keys[0]
        row["last_key"] = columns.keys[-1]
        row["user_data_size"] = columns.user_data_size
        row["n_records"] = len(columns)
        row["header_checksum"] = int.from_bytes(frame[:4], "little")
        self._rows.append(row)
        self._put(frame)

    def encode_and_put(self, columns: Columns, level: int) -> None:
        """Encode and append one block."""
        self.put_block(columns, encode_block(columns, level))

    def copy_block(self, reader: SnapshotReader, block: int) -> None:
        """Append a block of another snapshot of this store, byte for byte."""
        reader.check_header(block)
        row = reader.index[block : block + 1].copy()
        start, end = reader.block_range(block)
        row["offset"] = self.size
        self._rows.append(row)
        for offset in range(start, end, _WRITE_SIZE):
            stop = min(offset + _WRITE_SIZE, end)
            self._put(reader.view[offset:stop])
            self._write_pending()
            release_pages(reader.view, offset, stop)

    def finish(self) -> None:
        """Write index and trailer; with several threads the last sync only begins."""
        index = (
            np.concatenate(self._rows) if self._rows else np.zeros(0, dtype=INDEX_DTYPE)
        )
        head = INDEX_HEAD.pack(
            sum(index["n_records"].tolist()), sum(index["user_data_size"].tolist())
        )
        payload = (head, index.tobytes())
        end = _codec.encode_payload(KIND_END, LAYOUT_PLAIN, len(index), 0, payload)
        _codec.finish_frame(end, self._seed, self._sequence, 0)
        end_offset = self.size
        self._put(end)
        self._put(pack_trailer(self._seed, end_offset, len(end)))
        self._write_pending()
        if self._synced < self._written:
            self._sync_so_far()
        self._is_finished = True

    def publish(self) -> None:
        """Finish, wait for the last sync, rename, sync the name."""
        if not self._is_finished:
            self.finish()
        if self._syncing is not None:
            self._syncing.result()
        self.close()
        publish(self._directory, self._name)

    def close(self) -> None:
        """Give the file back; what is not published stays under its temporary name."""
        if self._pool is not None:  # a sync needs the descriptor until it returns
            self._pool.shutdown()
        self._file.close()
