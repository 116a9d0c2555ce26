"""Layouts of docs/format.md that Python packs: file header, index, trailer.

Frames are packed and scanned in ``_codec``. Constants that both need stand in both, and
a test holds the two together.
"""

from __future__ import annotations

import dataclasses
import struct

import crc32c
import numpy as np

from metastore.errors import CorruptionError, FormatVersionError

__all__ = [
    "BLOCK_RECORDS_TARGET",
    "BLOCK_USER_DATA_SIZE_MAX",
    "CHECKSUM_XOR",
    "FILE_HEADER_SIZE",
    "FORMAT_VERSION",
    "FRAME_HEADER_SIZE",
    "INDEX_DTYPE",
    "INDEX_HEAD",
    "KIND_BATCH",
    "KIND_BLOCK",
    "KIND_END",
    "LAYOUT_PACKED",
    "LAYOUT_PLAIN",
    "LENGTH_MAX",
    "NUMBER_MAX",
    "PACKED_RATIO_MAX",
    "PACKED_SIZE_MAX",
    "SEQUENCE_MAX",
    "STORE_ID_SIZE",
    "TRAILER_SIZE",
    "FileHeader",
    "log_seed",
    "pack_trailer",
    "size_without_zeros",
    "snapshot_seed",
    "unpack_trailer",
]

FORMAT_VERSION = 1
CHECKSUM_XOR = 0xAF
STORE_ID_SIZE = 16
NUMBER_MAX = 2**63 - 1
SEQUENCE_MAX = 2**63 - 1
LENGTH_MAX = 2**32 - 1

KIND_BATCH = 1
KIND_BLOCK = 2
KIND_END = 3
LAYOUT_PLAIN = 0
LAYOUT_PACKED = 1

BLOCK_RECORDS_TARGET = 65_536
BLOCK_USER_DATA_SIZE_MAX = 4 << 20
PACKED_SIZE_MAX = 1 << 26
PACKED_RATIO_MAX = 1 << 15

FILE_HEADER_SIZE = 64
FRAME_HEADER_SIZE = 48
TRAILER_SIZE = 32

_MAGIC = {"log": b"\x89MSLOG\r\n", "snapshot": b"\x89MSSNP\r\n"}
_TRAILER_MAGIC = b"\x89MSEND\r\n"

# magic, version, flags, zero, store id, number, sequence, creation time, zero
_FILE_HEADER = struct.Struct("<8sHHI16sQQQI")
_CHECKSUM = struct.Struct("<I")
# magic, offset and size of the end frame, zero
_TRAILER = struct.Struct("<8sQQI")

#: Section 7: records and user data size of all blocks, ahead of the index rows.
INDEX_HEAD = struct.Struct("<QQ")
#: Section 7: one row of a snapshot's index.
INDEX_DTYPE = np.dtype(
    [
        ("offset", "<u8"),
        ("first_key", "<u8"),
        ("last_key", "<u8"),
        ("user_data_size", "<u8"),
        ("n_records", "<u4"),
        ("header_checksum", "<u4"),
    ]
)

assert _FILE_HEADER.size + _CHECKSUM.size == FILE_HEADER_SIZE
assert _TRAILER.size + _CHECKSUM.size == TRAILER_SIZE
assert INDEX_DTYPE.itemsize == 40
assert INDEX_HEAD.size == 16


def _checksum(data: bytes, seed: int = 0) -> int:
    return crc32c.crc32c(data, seed) ^ CHECKSUM_XOR


def snapshot_seed(store_id: bytes) -> int:
    """Return the seed of the frame checksums of a snapshot (section 4)."""
    return crc32c.crc32c(store_id)


def log_seed(store_id: bytes, number: int) -> int:
    """Return the seed of the frame checksums of log `number` (section 4)."""
    return crc32c.crc32c(store_id + number.to_bytes(8, "little"))


#: Zeros are looked for in pieces of this: by one byte at a time a log's end takes 4 ms.
_ZEROS = bytes(4096)


def size_without_zeros(data: bytes) -> int:
    """Return how long `data` is without the zeros at its end (section 8)."""
    size = len(data)
    while data.endswith(_ZEROS, 0, size):
        size -= len(_ZEROS)
    start = max(0, size - len(_ZEROS))
    return start + len(data[start:size].rstrip(b"\0"))


@dataclasses.dataclass(frozen=True)
class FileHeader:
    """The first 64 bytes of a file (section 3)."""

    kind: str
    store_id: bytes
    number: int
    sequence: int
    created_ns: int

    def pack(self) -> bytes:
        """Return the 64 bytes."""
        head = _FILE_HEADER.pack(
            _MAGIC[self.kind],
            FORMAT_VERSION,
            0,
            0,
            self.store_id,
            self.number,
            self.sequence,
            self.created_ns,
            0,
        )
        return head + _CHECKSUM.pack(_checksum(head))

    @classmethod
    def unpack(cls, data: bytes, kind: str, number: int, path: str) -> FileHeader:
        """Parse and check the header of the file `path`.

        Parameters
        ----------
        data : bytes
            The first 64 bytes, fewer if the file is shorter.
        kind : str
            ``"log"`` or ``"snapshot"``: what the file's name says.
        number : int
            The number in the file's name.
        path : str
            The file, for errors.

        Raises
        ------
        CorruptionError
            If the header is damaged or contradicts the name.
        FormatVersionError
            If it is whole but of another version.
        """
        if len(data) < FILE_HEADER_SIZE:
            raise CorruptionError(
                path, 0, f"file of {len(data)} bytes is shorter than its header"
            )
        head = data[: _FILE_HEADER.size]
        (stored,) = _CHECKSUM.unpack_from(data, _FILE_HEADER.size)
        magic, version, flags, zero, store_id, own, sequence, created, zero2 = (
            _FILE_HEADER.unpack(head)
        )
        if magic != _MAGIC[kind]:
            raise CorruptionError(path, 0, f"not a {kind}: its magic is {magic!r}")
        computed = _checksum(head)
        if stored != computed:
            raise CorruptionError(
                path,
                _FILE_HEADER.size,
                "file header checksum mismatch: "
                f"stored {stored:#010x}, computed {computed:#010x}",
            )
        if version != FORMAT_VERSION or flags:
            raise FormatVersionError(path, version, flags)
        if zero or zero2:
            raise CorruptionError(path, 12, "reserved bytes of the header are not zero")
        if own != number:
            raise CorruptionError(
                path, 32, f"number mismatch: {number:#x} in the name, {own:#x} inside"
            )
        if not (1 if kind == "log" else 0) <= sequence <= SEQUENCE_MAX:
            raise CorruptionError(path, 40, f"sequence {sequence} is out of range")
        return cls(kind, store_id, number, sequence, created)


def pack_trailer(seed: int, end_offset: int, end_size: int) -> bytes:
    """Return the 32 bytes behind the end frame of a snapshot (section 7)."""
    head = _TRAILER.pack(_TRAILER_MAGIC, end_offset, end_size, 0)
    return head + _CHECKSUM.pack(_checksum(head, seed))


def unpack_trailer(data: bytes, seed: int, path: str, offset: int) -> tuple[int, int]:
    """Return offset and size of the end frame that the trailer points at.

    Raises
    ------
    CorruptionError
        If it is damaged, or does not point right before itself.
    """
    if len(data) < TRAILER_SIZE:
        raise CorruptionError(path, offset, "the snapshot is too short for a trailer")
    head = data[: _TRAILER.size]
    (stored,) = _CHECKSUM.unpack_from(data, _TRAILER.size)
    magic, end_offset, end_size, zero = _TRAILER.unpack(head)
    computed = _checksum(head, seed)
    if magic != _TRAILER_MAGIC or stored != computed:
        raise CorruptionError(
            path,
            offset,
            "snapshot trailer missing or damaged: "
            f"stored {stored:#010x}, computed {computed:#010x}",
        )
    if zero or end_offset < FILE_HEADER_SIZE or end_offset + end_size != offset:
        raise CorruptionError(path, offset, "snapshot trailer points to a wrong place")
    return end_offset, end_size
