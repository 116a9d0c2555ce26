"""A second codec of the store's files, for tests: plain, obvious and slow.

It is written from docs/format.md alone and imports nothing of metastore, so that an
error of the one is not an error of the other. Sections named here are that document's.

The writing functions build valid files from what a test chooses; the verbs at the end
(`set_field`, `fix_frame_checksum`, ...) forge damaged ones with checksums that agree.
"""

from __future__ import annotations

import dataclasses
import itertools
import re
import struct
from collections.abc import Iterable, Sequence

import crc32c
import zstandard

Record = tuple[int, int, bytes]  # key, value (0: a tombstone), user data

CHECKSUM_XOR = 0xAF
NUMBER_MAX = 2**63 - 1
SEQUENCE_MAX = 2**63 - 1
U64_MAX = 2**64 - 1

MAGICS = {"log": b"\x89MSLOG\r\n", "snapshot": b"\x89MSSNP\r\n"}
TRAILER_MAGIC = b"\x89MSEND\r\n"

FILE_HEADER = struct.Struct("<8sHHI16sQQQII")
FRAME_HEADER = struct.Struct("<IBBHQQIIQQ")
INDEX_HEAD = struct.Struct("<QQ")
INDEX_BLOCK = struct.Struct("<QQQQII")
TRAILER = struct.Struct("<8sQQII")
PACKED_COLUMN = struct.Struct("<BBH")
PACKED_SECTION = struct.Struct("<IBBH")

BATCH, BLOCK, END = 1, 2, 3
PLAIN, PACKED = 0, 1
NO_FILTER, DELTA = 0, 1
CONSTANT, RAW, ZSTD = 0, 1, 2
KEYS, VALUES, LENGTHS, USER_DATA = 0, 1, 2, 3

INTEGER_WIDTHS = (8, 8, 4)  # of keys, values, lengths
PLANES_WIDTH_MIN, PLANES_WIDTH_MAX = 2, 64  # of user data
PACKED_SIZE_MAX = 2**26
PACKED_RATIO_MAX = 2**15
ZSTD_MAGIC = b"\x28\xb5\x2f\xfd"


class OracleError(Exception):
    """The bytes are not valid; `offset` says where, `reason` says why."""

    def __init__(self, offset: int, reason: str) -> None:
        super().__init__(offset, reason)
        self.offset = offset
        self.reason = reason


class OracleVersionError(OracleError):
    """The file header is whole, but of another format version (section 3)."""


class OracleTornError(OracleError):
    """A bad frame as a torn write can leave it (section 8).

    Its header checksum does not agree, it goes beyond the file, or its payload checksum
    does not agree. What is wrong in any other way is corruption everywhere.
    """


def require(
    condition: object,
    offset: int,
    reason: str,
    error: type[OracleError] = OracleError,
) -> None:
    """Raise an error unless `condition` holds."""
    if not condition:
        raise error(offset, reason)


def checksum(data: bytes, seed: int = 0) -> int:
    """Return what the document stores as the checksum of `data`."""
    return crc32c.crc32c(data, seed) ^ CHECKSUM_XOR


def padding_size(size: int) -> int:
    """Return how many bytes lead from `size` to the next multiple of 8."""
    return -size % 8


# Section 3: file headers ---------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class FileHeader:
    """The first 64 bytes of a log or a snapshot."""

    kind: str
    store_id: bytes
    number: int
    sequence: int
    created_ns: int = 0

    @property
    def seed(self) -> int:
        """The seed of the checksums of this file's frame headers (section 4)."""
        seeded = self.store_id
        if self.kind == "log":
            seeded += struct.pack("<Q", self.number)
        return crc32c.crc32c(seeded)

    def pack(self) -> bytes:
        """Return the 64 bytes."""
        head = FILE_HEADER.pack(
            MAGICS[self.kind],
            1,
            0,
            0,
            self.store_id,
            self.number,
            self.sequence,
            self.created_ns,
            0,
            0,
        )
        return head[:60] + struct.pack("<I", checksum(head[:60]))


def read_file_header(data: bytes, kind: str, number: int) -> FileHeader:
    """Return the header of a file whose name says `kind` and `number`."""
    require(len(data) >= FILE_HEADER.size, 0, "no whole file header")
    magic, version, flags, zero_a, *rest = FILE_HEADER.unpack_from(data)
    store_id, own, sequence, created_ns, zero_b, stored = rest
    require(magic == MAGICS[kind], 0, "wrong magic")
    require(stored == checksum(data[:60]), 60, "file header checksum")
    if version != 1 or flags != 0:
        raise OracleVersionError(8, "another format version")
    require(zero_a == 0 and zero_b == 0, 12, "zero field of the file header")
    require(own == number, 32, "number is not that of the name")
    require(1 <= own <= NUMBER_MAX, 32, "number out of range")
    least = 0 if kind == "snapshot" else 1
    require(least <= sequence <= SEQUENCE_MAX, 40, "sequence out of range")
    return FileHeader(kind, store_id, own, sequence, created_ns)


# Sections 5 and 6: payloads ------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Payload:
    """A frame's payload, with what its frame header says of it."""

    layout: int
    n_records: int
    user_data_size: int
    data: bytes


@dataclasses.dataclass(frozen=True)
class Section:
    """One stored section; `claimed_size` forges its size in the section table."""

    encoding: int
    stored: bytes = b""
    constant: int = 0
    claimed_size: int | None = None
    zero: int = 0


@dataclasses.dataclass(frozen=True)
class PackedColumn:
    """One column; `claimed_sections` forges the count of its sections."""

    filter: int
    sections: Sequence[Section]
    claimed_sections: int | None = None
    zero: int = 0


@dataclasses.dataclass(frozen=True)
class ColumnChoice:
    """How `pack_packed` is to store one column.

    `encodings` are asked for section by section, the last one for all that follow. One
    that is not legal (constant over bytes that differ, zstd that does not shrink) gives
    way to raw.
    """

    filter: int = NO_FILTER
    planes: bool = False
    encodings: Sequence[int] = (RAW,)


def pack_plain(records: Sequence[Record]) -> Payload:
    """Return the plain payload of `records` (section 5)."""
    user_data = b"".join(data for _, _, data in records)
    parts = [
        b"".join(struct.pack("<Q", key) for key, _, _ in records),
        b"".join(struct.pack("<Q", value) for _, value, _ in records),
        b"".join(struct.pack("<I", len(data)) for _, _, data in records),
        user_data,
    ]
    return Payload(PLAIN, len(records), len(user_data), b"".join(parts))


def user_data_width(lengths: Iterable[int]) -> int | None:
    """Return how many planes the user data may have; None if it has one section."""
    same = set(lengths)
    width = same.pop() if len(same) == 1 else 0
    return width if PLANES_WIDTH_MIN <= width <= PLANES_WIDTH_MAX else None


def deltas(integers: Sequence[int]) -> list[int]:
    """Return the first integer, then each less its predecessor, modulo 2^64."""
    before = 0
    found = []
    for integer in integers:
        found.append((integer - before) % 2**64)
        before = integer
    return found


def sums(integers: Sequence[int]) -> list[int]:
    """Undo `deltas`."""
    total = 0
    found = []
    for integer in integers:
        total = (total + integer) % 2**64
        found.append(total)
    return found


def split_planes(data: bytes, width: int) -> list[bytes]:
    """Return for each j the j-th byte of every `width` bytes."""
    return [data[j::width] for j in range(width)]


def join_planes(planes: Sequence[bytes]) -> bytes:
    """Undo `split_planes`."""
    return b"".join(bytes(column) for column in zip(*planes, strict=True))


def pack_zstd(data: bytes, level: int = 1) -> bytes:
    """Return one zstd frame that states its content size."""
    return zstandard.ZstdCompressor(level=level, write_content_size=True).compress(data)


def pack_section(data: bytes, encoding: int) -> Section:
    """Store a section in the wanted encoding, or raw where that is not legal."""
    if encoding == CONSTANT and data == data[:1] * len(data):
        return Section(CONSTANT, constant=data[0] if data else 0)
    if encoding == ZSTD:
        compressed = pack_zstd(data)
        if len(compressed) < len(data):
            return Section(ZSTD, compressed)
    return Section(RAW, data)


def pack_column(unpacked: Sequence[bytes], choice: ColumnChoice) -> PackedColumn:
    """Store the sections of one column."""
    sections = []
    for i, data in enumerate(unpacked):
        wanted = choice.encodings[min(i, len(choice.encodings) - 1)]
        sections.append(pack_section(data, wanted))
    return PackedColumn(choice.filter, sections)


def join_packed(columns: Sequence[PackedColumn]) -> bytes:
    """Return the bytes of a packed payload as its parts say, valid or not."""
    head = b""
    table = b""
    stored = b""
    for column in columns:
        count = column.claimed_sections
        if count is None:
            count = len(column.sections)
        head += PACKED_COLUMN.pack(column.filter, count, column.zero)
        for section in column.sections:
            size = section.claimed_size
            if size is None:
                size = len(section.stored)
            table += PACKED_SECTION.pack(
                size, section.encoding, section.constant, section.zero
            )
            stored += section.stored
    return head + table + stored


def packed_columns(
    records: Sequence[Record], choices: Sequence[ColumnChoice]
) -> list[PackedColumn]:
    """Return the four columns of `records`, stored as `choices` say.

    Planes of user data are left out where its lengths do not allow them.
    """
    user_data = b"".join(data for _, _, data in records)
    integers = [
        [key for key, _, _ in records],
        [value for _, value, _ in records],
        [len(data) for _, _, data in records],
    ]
    columns = []
    for which, width in enumerate(INTEGER_WIDTHS):
        numbers = integers[which]
        if choices[which].filter == DELTA:
            numbers = deltas(numbers)
        data = b"".join(number.to_bytes(width, "little") for number in numbers)
        planes = split_planes(data, width) if choices[which].planes else [data]
        columns.append(pack_column(planes, choices[which]))
    stride = user_data_width(integers[LENGTHS])
    planes = [user_data]
    if choices[USER_DATA].planes and stride is not None:
        planes = split_planes(user_data, stride)
    columns.append(pack_column(planes, choices[USER_DATA]))
    return columns


PLAIN_CHOICES = (ColumnChoice(),) * 4
SORTED_CHOICES = (
    ColumnChoice(DELTA, planes=True, encodings=[CONSTANT]),
    ColumnChoice(planes=True, encodings=[ZSTD]),
    ColumnChoice(planes=True, encodings=[CONSTANT]),
    ColumnChoice(planes=True, encodings=[ZSTD]),
)


def pack_packed(
    records: Sequence[Record], choices: Sequence[ColumnChoice] = SORTED_CHOICES
) -> Payload:
    """Return a packed payload of `records` (section 6); a test chooses how.

    Whether the limits of size and ratio hold is the caller's affair.
    """
    data = join_packed(packed_columns(records, choices))
    size = sum(len(user_data) for _, _, user_data in records)
    return Payload(PACKED, len(records), size, data)


def unpack_section(data: bytes, section: tuple[int, int], size: int, at: int) -> bytes:
    """Return the unpacked bytes of one section of `size` bytes."""
    encoding, constant = section
    if encoding == CONSTANT:
        require(data == b"", at, "constant section with stored bytes")
        return bytes([constant]) * size
    require(constant == 0, at, "constant set beside another encoding")
    if encoding == RAW:
        require(len(data) == size, at, "raw section of another size")
        return data
    require(encoding == ZSTD, at, "unknown encoding")
    require(len(data) < size, at, "zstd section that does not shrink")
    return unpack_zstd(data, size, at)


def unpack_zstd(data: bytes, size: int, at: int) -> bytes:
    """Return the content of the one zstd frame that `data` must be."""
    require(data[:4] == ZSTD_MAGIC, at, "not a zstd frame")
    try:
        parameters = zstandard.get_frame_parameters(data)
        require(parameters.content_size == size, at, "zstd frame states another size")
        decompressor = zstandard.ZstdDecompressor().decompressobj()
        content = decompressor.decompress(data)
    except zstandard.ZstdError as error:
        raise OracleError(at, f"zstd: {error}") from error
    require(decompressor.eof, at, "zstd frame is cut")
    require(decompressor.unused_data == b"", at, "bytes behind a zstd frame")
    require(len(content) == size, at, "zstd content of another size")
    return content


def unpack_columns(payload: Payload, at: int) -> tuple[list[list[int]], bytes]:
    """Return keys, values and lengths, and the user data of a packed payload."""
    n, data = payload.n_records, payload.data
    require(len(data) >= 4 * PACKED_COLUMN.size, at, "no whole column table")
    heads = [PACKED_COLUMN.unpack_from(data, 4 * which) for which in range(4)]
    require(all(zero == 0 for _, _, zero in heads), at, "zero field of a column")
    table_at = 4 * PACKED_COLUMN.size
    n_sections = sum(count for _, count, _ in heads)
    stored_at = table_at + n_sections * PACKED_SECTION.size
    require(len(data) >= stored_at, at, "no whole section table")
    table = [
        PACKED_SECTION.unpack_from(data, table_at + i * PACKED_SECTION.size)
        for i in range(n_sections)
    ]
    total = stored_at + sum(size for size, _, _, _ in table)
    require(total == len(data), at, "sections do not fill the payload")

    stored = []
    for size, _, _, _ in table:
        stored.append(data[stored_at : stored_at + size])
        stored_at += size
    integers: list[list[int]] = []
    for which, width in enumerate(INTEGER_WIDTHS):
        column_filter, count, _ = heads[which]
        filters = (NO_FILTER,) if which == LENGTHS else (NO_FILTER, DELTA)
        require(column_filter in filters, at, "unknown filter")
        require(count in (1, width), at, "wrong count of sections")
        unpacked = unpack_column(table[:count], stored[:count], n * width, at)
        table, stored = table[count:], stored[count:]
        numbers = split_integers(unpacked, width)
        integers.append(sums(numbers) if column_filter == DELTA else numbers)
    column_filter, count, _ = heads[USER_DATA]
    require(column_filter == NO_FILTER, at, "unknown filter")
    planes_width = user_data_width(integers[LENGTHS])
    require(count in (1, planes_width), at, "wrong count of sections")
    if count > 1:
        require(n * count == payload.user_data_size, at, "lengths do not add up")
    return integers, unpack_column(table, stored, payload.user_data_size, at)


def split_integers(data: bytes, width: int) -> list[int]:
    """Return the integers of `width` bytes each."""
    return [
        int.from_bytes(data[i : i + width], "little")
        for i in range(0, len(data), width)
    ]


def unpack_column(
    table: Sequence[tuple[int, int, int, int]],
    stored: Sequence[bytes],
    size: int,
    at: int,
) -> bytes:
    """Return the `size` bytes of one column from its sections, planes or not."""
    sections = []
    for (_, encoding, constant, zero), data in zip(table, stored, strict=True):
        require(zero == 0, at, "zero field of a section")
        section = (encoding, constant)
        sections.append(unpack_section(data, section, size // len(table), at))
    return sections[0] if len(sections) == 1 else join_planes(sections)


def plain_columns(payload: Payload, at: int) -> tuple[list[list[int]], bytes]:
    """Return keys, values and lengths, and the user data of a plain payload."""
    n, data = payload.n_records, payload.data
    keys = list(struct.unpack_from(f"<{n}Q", data, 0))
    values = list(struct.unpack_from(f"<{n}Q", data, 8 * n))
    lengths = list(struct.unpack_from(f"<{n}I", data, 16 * n))
    return [keys, values, lengths], data[20 * n :]


def check_sizes(payload: Payload, at: int) -> None:
    """Hold the numbers of a frame header of a batch or block against each other."""
    size = 20 * payload.n_records + payload.user_data_size
    if payload.layout == PLAIN:
        require(len(payload.data) == size, at, "plain payload of another size")
        return
    require(payload.n_records >= 1, at, "packed payload without records")
    require(size <= PACKED_SIZE_MAX, at, "packed payload unpacks too large")
    ratio_size = PACKED_RATIO_MAX * len(payload.data)
    require(size <= ratio_size, at, "packed payload shrinks too far")


def unpack_payload(
    payload: Payload, *, block: bool = False, at: int = 0
) -> list[Record]:
    """Return the records of a payload in their order; `at` is for errors.

    With `block` the further conditions on a block of a snapshot are checked.
    """
    check_sizes(payload, at)
    if payload.layout == PACKED:
        (keys, values, lengths), user_data = unpack_columns(payload, at)
    else:
        (keys, values, lengths), user_data = plain_columns(payload, at)
    require(sum(lengths) == payload.user_data_size, at, "lengths do not add up")
    records = []
    offset = 0
    for key, value, length in zip(keys, values, lengths, strict=True):
        require(value != 0 or length == 0, at, "tombstone with user data")
        records.append((key, value, user_data[offset : offset + length]))
        offset += length
    if block:
        require(records, at, "block without records")
        require(all(values), at, "tombstone in a block")
        increasing = all(a < b for a, b in itertools.pairwise(keys))
        require(increasing, at, "keys of a block do not increase")
    return records


# Section 4: frames ---------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Frame:
    """One frame of a file; `records` are empty in an end frame."""

    offset: int
    kind: int
    sequence: int
    durable: int
    payload: Payload
    header_checksum: int
    records: list[Record] = dataclasses.field(default_factory=list)

    @property
    def size(self) -> int:
        """The size with header and padding."""
        size = FRAME_HEADER.size + len(self.payload.data)
        return size + padding_size(size)

    @property
    def end(self) -> int:
        """The offset right behind the frame."""
        return self.offset + self.size


def pack_frame(
    seed: int, kind: int, payload: Payload, *, sequence: int = 0, durable: int = 0
) -> bytes:
    """Return one frame, header checksum and padding included."""
    head = FRAME_HEADER.pack(
        0,
        kind,
        payload.layout,
        0,
        sequence,
        durable,
        payload.n_records,
        checksum(payload.data),
        len(payload.data),
        payload.user_data_size,
    )
    head = struct.pack("<I", checksum(head[4:], seed)) + head[4:]
    return head + payload.data + bytes(padding_size(len(payload.data)))


def header_agrees(data: bytes, offset: int, header: FileHeader) -> bool:
    """Tell whether a frame header with its checksum stands at `offset`."""
    head = data[offset : offset + FRAME_HEADER.size]
    if len(head) < FRAME_HEADER.size:
        return False
    stored: int = FRAME_HEADER.unpack(head)[0]
    return stored == checksum(head[4:], header.seed)


def may_stand(data: bytes, offset: int, header: FileHeader) -> bool:
    """Tell whether kind, layout and zero field are right for this kind of file."""
    _, kind, layout, zero, *_ = FRAME_HEADER.unpack_from(data, offset)
    kinds = (BATCH, END) if header.kind == "log" else (BLOCK, END)
    layouts = (PLAIN,) if kind == END else (PLAIN, PACKED)
    return kind in kinds and layout in layouts and zero == 0


def read_frame(data: bytes, offset: int, header: FileHeader, expected: int) -> Frame:
    """Return the valid frame at `offset`, in which `expected` is the next sequence.

    In a snapshot `expected` is the sequence that an end must carry, plus 1.
    """
    torn = OracleTornError
    require(header_agrees(data, offset, header), offset, "no frame header", torn)
    own, kind, layout, _, sequence, durable, n, *rest = FRAME_HEADER.unpack_from(
        data, offset
    )
    payload_checksum, size, user_data_size = rest
    start = offset + FRAME_HEADER.size
    end = start + size + padding_size(size)
    require(end <= len(data), offset, "frame ends behind the file", torn)
    require(may_stand(data, offset, header), offset, "this frame must not stand here")
    wanted = {BATCH: expected, BLOCK: 0, END: expected - 1}[kind]
    require(sequence == wanted, offset, "sequence is not the expected one")
    if header.kind == "snapshot":
        require(durable == 0, offset, "durable set in a snapshot")
    elif kind == END:
        require(durable == sequence, offset, "durable of an end is not its sequence")
    else:
        require(durable < sequence, offset, "durable is not below the sequence")

    require(not any(data[start + size : end]), offset, "padding is not zero")
    payload = Payload(layout, n, user_data_size, data[start : start + size])
    if kind != END:
        check_sizes(payload, offset)
    else:
        require(user_data_size == 0, offset, "user data size of an end")
        empty = n == 0 and size == 0
        require(empty or header.kind == "snapshot", offset, "end of a log is not empty")

    agrees = payload_checksum == checksum(payload.data)
    require(agrees, offset, "payload checksum", torn)
    frame = Frame(offset, kind, sequence, durable, payload, own)
    if kind == END:
        return frame
    records = unpack_payload(payload, block=kind == BLOCK, at=offset)
    return dataclasses.replace(frame, records=records)


# Section 7: snapshots ------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Snapshot:
    """A snapshot, read whole."""

    header: FileHeader
    blocks: list[Frame]
    end: Frame

    @property
    def records(self) -> list[Record]:
        """All records, sorted by key."""
        return [record for block in self.blocks for record in block.records]


def pack_index(blocks: Sequence[Frame]) -> Payload:
    """Return the payload of the end frame over `blocks`."""
    data = INDEX_HEAD.pack(
        sum(block.payload.n_records for block in blocks),
        sum(block.payload.user_data_size for block in blocks),
    )
    for block in blocks:
        data += INDEX_BLOCK.pack(
            block.offset,
            block.records[0][0],
            block.records[-1][0],
            block.payload.user_data_size,
            block.payload.n_records,
            block.header_checksum,
        )
    return Payload(PLAIN, len(blocks), 0, data)


def pack_trailer(seed: int, end_offset: int, end_size: int) -> bytes:
    """Return the last 32 bytes of a snapshot."""
    head = TRAILER.pack(TRAILER_MAGIC, end_offset, end_size, 0, 0)[:28]
    return head + struct.pack("<I", checksum(head, seed))


def write_snapshot(
    store_id: bytes,
    number: int,
    sequence: int,
    blocks: Iterable[Sequence[Record] | Payload],
    *,
    created_ns: int = 0,
) -> bytes:
    """Return a snapshot of blocks; mere records are stored plain."""
    header = FileHeader("snapshot", store_id, number, sequence, created_ns)
    data = header.pack()
    frames = []
    for block in blocks:
        payload = block if isinstance(block, Payload) else pack_plain(block)
        stored = pack_frame(header.seed, BLOCK, payload)
        own = struct.unpack_from("<I", stored)[0]
        records = unpack_payload(payload)
        frames.append(Frame(len(data), BLOCK, 0, 0, payload, own, records))
        data += stored
    end = pack_frame(header.seed, END, pack_index(frames), sequence=sequence)
    return data + end + pack_trailer(header.seed, len(data), len(end))


def read_trailer(data: bytes, header: FileHeader) -> int:
    """Return the offset of the end frame."""
    at = len(data) - TRAILER.size
    require(at >= FILE_HEADER.size, len(data), "no whole trailer")
    end_offset: int
    magic, end_offset, end_size, zero, stored = TRAILER.unpack_from(data, at)
    require(magic == TRAILER_MAGIC, at, "wrong magic of the trailer")
    require(stored == checksum(data[at : at + 28], header.seed), at, "trailer checksum")
    require(zero == 0, at, "zero field of the trailer")
    require(end_offset + end_size == at, at, "end frame not before the trailer")
    require(end_offset >= FILE_HEADER.size, at, "end frame inside the file header")
    require(end_offset % 8 == 0, at, "end frame is not at a multiple of 8")
    return end_offset


def check_index(end: Frame, blocks: Sequence[Frame]) -> None:
    """Hold the index against the blocks as they were read."""
    data = end.payload.data
    size = INDEX_HEAD.size + INDEX_BLOCK.size * end.payload.n_records
    require(len(data) == size, end.offset, "index of another size")
    require(end.payload.n_records == len(blocks), end.offset, "blocks of the index")
    require(data == pack_index(blocks).data, end.offset, "index disagrees with a block")


def read_snapshot(data: bytes, number: int) -> Snapshot:
    """Return a snapshot, or raise OracleError: anything invalid is corruption."""
    header = read_file_header(data, "snapshot", number)
    end_offset = read_trailer(data, header)
    blocks: list[Frame] = []
    offset = FILE_HEADER.size
    last_key = -1
    while offset < end_offset:
        block = read_frame(data, offset, header, header.sequence + 1)
        require(block.kind == BLOCK, offset, "end frame before its place")
        require(block.end <= end_offset, offset, "block reaches into the end frame")
        first_key = block.records[0][0]
        require(first_key > last_key, offset, "keys do not increase across blocks")
        last_key = block.records[-1][0]
        blocks.append(block)
        offset = block.end
    end = read_frame(data, end_offset, header, header.sequence + 1)
    require(end.kind == END, end_offset, "block in the place of the end frame")
    trailer_offset = len(data) - TRAILER.size
    require(end.end == trailer_offset, end_offset, "bytes between end and trailer")
    check_index(end, blocks)
    return Snapshot(header, blocks, end)


# Section 8: logs -----------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Log:
    """A log as read; `torn` are the bytes from the first bad place on, if any."""

    header: FileHeader
    batches: list[Frame]
    end: Frame | None
    content_size: int
    torn: bytes = b""

    @property
    def last_sequence(self) -> int:
        """The last sequence it holds; that before its first when it holds none."""
        return self.header.sequence + len(self.batches) - 1


def write_log(
    store_id: bytes,
    number: int,
    sequence: int,
    batches: Iterable[Sequence[Record] | Payload],
    *,
    durables: Sequence[int] | None = None,
    sealed: bool = True,
    n_zeros: int = 0,
    created_ns: int = 0,
) -> bytes:
    """Return a log whose first batch has `sequence`; mere records are stored plain.

    Each batch calls all before it durable, unless `durables` says otherwise; `n_zeros`
    zeros follow.
    """
    header = FileHeader("log", store_id, number, sequence, created_ns)
    data = header.pack()
    for i, batch in enumerate(batches):
        payload = batch if isinstance(batch, Payload) else pack_plain(batch)
        durable = sequence - 1 if durables is None else durables[i]
        data += pack_frame(
            header.seed, BATCH, payload, sequence=sequence, durable=durable
        )
        sequence += 1
    if sealed:
        last = sequence - 1
        empty = pack_plain([])
        data += pack_frame(header.seed, END, empty, sequence=last, durable=last)
    return data + bytes(n_zeros)


def claims_durable(data: bytes, offset: int, header: FileHeader, sequence: int) -> bool:
    """Tell whether a frame header from `offset` on says that `sequence` is durable."""
    for place in range(offset, len(data) - FRAME_HEADER.size + 1, 8):
        if header_agrees(data, place, header):
            fields = FRAME_HEADER.unpack_from(data, place)
            _, _, _, reserved, _, durable = fields[:6]
            if reserved == 0 and durable >= sequence:
                return True
    return False


def read_log(
    data: bytes, number: int, bound: int | None = None, newest: bool = False
) -> Log:
    """Return a log, or raise OracleError where it is corrupt.

    Parameters
    ----------
    data : bytes
        The file.
    number : int
        The number in its name.
    bound : int, optional
        The first sequence of the next log, if there is one.
    newest : bool
        Whether it may be open and its tail torn. Without `bound` and `newest` the log
        must be sealed.
    """
    header = read_file_header(data, "log", number)
    require(bound is None or bound >= header.sequence, 40, "log begins at its bound")
    batches: list[Frame] = []
    offset = FILE_HEADER.size
    expected = header.sequence
    while True:
        try:
            frame = read_frame(data, offset, header, expected)
        except OracleError as error:
            log = Log(header, batches, None, offset)
            return stop_at(data, error, log, bound, newest)
        if frame.kind == END:
            require(bound in (None, expected), offset, "log ends before its bound")
            return Log(header, batches, frame, frame.end)
        if expected == bound:  # what lies behind the bound is not read
            return Log(header, batches, None, offset)
        batches.append(frame)
        offset = frame.end
        expected += 1


def stop_at(
    data: bytes, error: OracleError, log: Log, bound: int | None, newest: bool
) -> Log:
    """Decide what the first place without a valid frame means."""
    expected = log.last_sequence + 1
    if bound is not None and expected == bound:
        return log
    if not newest or not isinstance(error, OracleTornError):
        raise error
    rest = data[log.content_size :]
    if not any(rest):
        return log
    if claims_durable(data, log.content_size, log.header, expected):
        raise error
    return dataclasses.replace(log, torn=rest)


# Sections 1 and 8: the directory -------------------------------------------------

NAME = re.compile(r"(log|snapshot)_([0-9a-f]{16})")


def file_name(kind: str, number: int) -> str:
    """Return the name of a file."""
    return f"{kind}_{number:016x}"


def parse_name(name: str) -> tuple[str, int] | None:
    """Return kind and number of a published file; None for any other name."""
    match = NAME.fullmatch(name)
    if match is None or not 1 <= int(match[2], 16) <= NUMBER_MAX:
        return None
    return match[1], int(match[2], 16)


def last_wins(content: dict[int, tuple[int, bytes]], records: Iterable[Record]) -> None:
    """Put records over `content` in their order."""
    for key, value, user_data in records:
        if value:
            content[key] = (value, user_data)
        else:
            content.pop(key, None)


def check_contained(
    found: dict[str, dict[int, bytes]], contained: int, last: int
) -> None:
    """Check that files up to a snapshot's number begin within what it contains."""
    for kind, reach in (("snapshot", last), ("log", last + 1)):
        for number, data in found[kind].items():
            if number <= contained:
                first = read_file_header(data, kind, number).sequence
                require(first <= reach, 40, "not contained in the newest snapshot")


def read_store(files: dict[str, bytes]) -> tuple[dict[int, tuple[int, bytes]], int]:
    """Return the content of a whole directory and its last sequence.

    Of several snapshots the newest counts; of the older files only headers are read.
    """
    found: dict[str, dict[int, bytes]] = {"log": {}, "snapshot": {}}
    store_ids = set()
    for name, data in files.items():
        parsed = parse_name(name)
        if parsed is not None:
            kind, number = parsed
            found[kind][number] = data
            store_ids.add(read_file_header(data, kind, number).store_id)
    require(len(store_ids) <= 1, 16, "files of several stores")

    content: dict[int, tuple[int, bytes]] = {}
    contained, last = 0, 0
    if found["snapshot"]:
        contained = max(found["snapshot"])
        snapshot = read_snapshot(found["snapshot"][contained], contained)
        last_wins(content, snapshot.records)
        last = snapshot.header.sequence
        check_contained(found, contained, last)
    numbers = sorted(number for number in found["log"] if number > contained)
    for number, after in itertools.zip_longest(numbers, numbers[1:]):
        data = found["log"][number]
        first = read_file_header(data, "log", number).sequence
        require(first == last + 1, 40, "log does not join what is before it")
        bound = None
        if after is not None:
            bound = read_file_header(found["log"][after], "log", after).sequence
        log = read_log(data, number, bound=bound, newest=after is None)
        for batch in log.batches:
            last_wins(content, batch.records)
        last = log.last_sequence
    return content, last


# Verbs to forge files with ---------------------------------------------------------

#: Fields of a frame header: offset in it, and type.
FRAME_FIELDS = {
    "checksum": (0, "<I"),
    "kind": (4, "<B"),
    "layout": (5, "<B"),
    "zero": (6, "<H"),
    "sequence": (8, "<Q"),
    "durable": (16, "<Q"),
    "records": (24, "<I"),
    "payload_checksum": (28, "<I"),
    "payload_size": (32, "<Q"),
    "user_data_size": (40, "<Q"),
}
#: Fields of a file header: offset in it, and type.
FILE_FIELDS = {
    "magic": (0, "<8s"),
    "version": (8, "<H"),
    "flags": (10, "<H"),
    "zero_a": (12, "<I"),
    "store_id": (16, "<16s"),
    "number": (32, "<Q"),
    "sequence": (40, "<Q"),
    "created": (48, "<Q"),
    "zero_b": (56, "<I"),
    "checksum": (60, "<I"),
}


def put(data: bytes, offset: int, new: bytes) -> bytes:
    """Overwrite bytes at `offset`; the size stays."""
    assert 0 <= offset <= len(data) - len(new)
    return data[:offset] + new + data[offset + len(new) :]


def set_byte(data: bytes, offset: int, value: int) -> bytes:
    """Overwrite one byte."""
    return put(data, offset, bytes([value]))


def flip_bit(data: bytes, offset: int, bit: int = 0) -> bytes:
    """Turn one bit of one byte over."""
    return set_byte(data, offset, data[offset] ^ (1 << bit))


def truncate(data: bytes, size: int) -> bytes:
    """Keep the first `size` bytes."""
    assert size <= len(data)
    return data[:size]


def file_seed(data: bytes) -> int:
    """Return the seed of the frame checksums from the file's own header."""
    kind = "log" if data[:8] == MAGICS["log"] else "snapshot"
    number = struct.unpack_from("<Q", data, 32)[0]
    return FileHeader(kind, data[16:32], number, 0).seed


def frame_offsets(data: bytes) -> list[int]:
    """Return where the frames of a file start, the end frame included.

    Only sizes are believed, nothing is checked: for files that were just written.
    """
    found = []
    offset = FILE_HEADER.size
    while offset + FRAME_HEADER.size <= len(data) and any(data[offset : offset + 48]):
        if data[offset : offset + 8] == TRAILER_MAGIC:
            break
        found.append(offset)
        size = struct.unpack_from("<Q", data, offset + 32)[0]
        offset += FRAME_HEADER.size + size + padding_size(size)
    return found


def set_file_field(data: bytes, field: str, value: int | bytes) -> bytes:
    """Set a field of the file header; `fix_file_header` comes after."""
    place, form = FILE_FIELDS[field]
    return put(data, place, struct.pack(form, value))


def set_field(data: bytes, offset: int, field: str, value: int) -> bytes:
    """Set a field of the frame at `offset`; `fix_frame_checksum` comes after."""
    place, form = FRAME_FIELDS[field]
    return put(data, offset + place, struct.pack(form, value))


def get_field(data: bytes, offset: int, field: str) -> int:
    """Return a field of the frame at `offset`."""
    place, form = FRAME_FIELDS[field]
    return int(struct.unpack_from(form, data, offset + place)[0])


def fix_file_header(data: bytes) -> bytes:
    """Make the checksum of the file header agree."""
    return set_file_field(data, "checksum", checksum(data[:60]))


def fix_frame_checksum(data: bytes, offset: int, seed: int | None = None) -> bytes:
    """Make the header checksum of the frame at `offset` agree.

    A frame without its file needs the `seed` of that file.
    """
    head = data[offset + 4 : offset + FRAME_HEADER.size]
    seed = file_seed(data) if seed is None else seed
    return set_field(data, offset, "checksum", checksum(head, seed))


def fix_payload_checksum(data: bytes, offset: int, seed: int | None = None) -> bytes:
    """Make both checksums of the frame at `offset` agree."""
    start = offset + FRAME_HEADER.size
    payload = data[start : start + get_field(data, offset, "payload_size")]
    data = set_field(data, offset, "payload_checksum", checksum(payload))
    return fix_frame_checksum(data, offset, seed)


def fix_trailer(data: bytes) -> bytes:
    """Make the checksum of a snapshot's trailer agree."""
    at = len(data) - TRAILER.size
    stored = checksum(data[at : at + 28], file_seed(data))
    return put(data, at + 28, struct.pack("<I", stored))


def forge(
    data: bytes, offset: int, field: str, value: int, seed: int | None = None
) -> bytes:
    """Set a field of a frame, and make its header checksum agree."""
    return fix_frame_checksum(set_field(data, offset, field, value), offset, seed)
