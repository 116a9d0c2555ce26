"""Columns to frames and back: which layout a frame gets, and the zstd contexts.

The kernels are in ``_codec``; this module decides, by samples, which filter, planes
and encodings are worth it (docs/format.md, section 6).
"""

from __future__ import annotations

import dataclasses
import struct
import threading
from typing import Any

import numpy as np
import numpy.typing as npt
import zstandard

from metastore import _codec
from metastore.columns import Columns, Payload, Uint8s, Uint32s, Uint64s
from metastore.errors import CorruptionError
from metastore.format import CHECKSUM_XOR, PACKED_RATIO_MAX, PACKED_SIZE_MAX
from metastore.pace import give_way

__all__ = [
    "corruption",
    "decode",
    "decode_into",
    "encode_arrays",
    "encode_batch",
    "encode_block",
    "new_table",
]

Table = Uint64s

#: Below this payload size a batch is not worth the tries of packing.
_BATCH_SIZE_MIN = 1 << 16
#: A batch is packed if that saves an eighth or more.
_BATCH_SAVING = 7 / 8
#: Bytes with an estimated entropy above this many bits are not given to zstd ...
_ENTROPY_BITS_MAX = 7.5
#: ... unless it shortens a sample of this size by a tenth (by repetition).
_SAMPLE_SIZE = 8_192
_SAMPLE_SAVING = 0.9

_COLUMN = struct.Struct("<BBH")
_SECTION = struct.Struct("<IBBH")

_local = threading.local()


def decompress(data: memoryview, size: int) -> bytes | None:
    """Return the content of one whole zstd frame of exactly `size` bytes, else None."""
    give_way()
    try:
        if zstandard.frame_content_size(data) != size:
            return None
        return _decompressor().decompress(data, allow_extra_data=False)
    except zstandard.ZstdError:
        return None


def _decompressor() -> zstandard.ZstdDecompressor:
    # One context per thread: zstd's are not thread-safe, and costly to make.
    context: zstandard.ZstdDecompressor | None = getattr(_local, "decompressor", None)
    if context is None:
        context = _local.decompressor = zstandard.ZstdDecompressor()
    return context


def _compressor(level: int) -> zstandard.ZstdCompressor:
    context: tuple[int, zstandard.ZstdCompressor] | None
    context = getattr(_local, "compressor", None)
    if context is None or context[0] != level:
        context = level, zstandard.ZstdCompressor(level=level)
        _local.compressor = context
    return context[1]


# ---- decoding ----


def new_table(n_frames: int) -> Table:
    """Return an empty table for ``_codec.scan_frames``."""
    return np.empty((n_frames, _codec.ROW_COLUMNS), dtype=np.uint64)


def decode_into(
    data: memoryview,
    table: Table,
    target: tuple[Uint64s, Uint64s, Uint64s, Uint8s],
    base: int,
) -> tuple[int, int]:
    """Decode scanned frames into prepared columns; see ``_codec.decode_frames``."""
    return _codec.decode_frames(data, table, *target, base, decompress)


def decode(data: memoryview, table: Table) -> tuple[Columns, int, int]:
    """Decode scanned frames into new columns.

    Returns
    -------
    columns : Columns
        The records of the valid frames.
    n : int
        How many frames, from the first on, are valid.
    status : int
        What is wrong with the next one, or 0.
    """
    n_records, size = _codec.totals(table)
    columns = Columns.allocate(n_records, size)
    whole = columns.target(0, n_records, 0, size)
    n, status = decode_into(data, table, whole, 0)
    if n < len(table):
        n_records, size = _codec.totals(table[:n])
        keys, values, offsets, user_data = columns.part(0, n_records).arrays()
        columns = Columns(keys, values, offsets, user_data[:size])
    return columns, n, status


def corruption(
    path: str,
    offset: int,
    status: int,
    frame: bytes | bytearray | memoryview,
    seed: int,
) -> CorruptionError:
    """Return the error for the bad frame of `status`; `frame` is how it begins."""
    reason = _codec.REASONS[status]
    frame = bytes(frame)
    size = _codec.FRAME_HEADER_SIZE
    if status == _codec.STATUS_BAD_HEADER and len(frame) >= size:
        stored = int.from_bytes(frame[:4], "little")
        computed = _codec.crc32c(frame[4:size], seed) ^ CHECKSUM_XOR
        reason += f": stored {stored:#010x}, computed {computed:#010x}"
    elif status == _codec.STATUS_BAD_PAYLOAD:
        stored = int.from_bytes(frame[28:32], "little")
        payload_size = int.from_bytes(frame[32:40], "little")
        computed = _codec.crc32c(frame[size : size + payload_size])
        computed ^= CHECKSUM_XOR
        reason += f": stored {stored:#010x}, computed {computed:#010x}"
    elif status == _codec.STATUS_BAD_SEQUENCE:
        reason += f": stored {int.from_bytes(frame[8:16], 'little')}"
    return CorruptionError(path, offset, reason)


# ---- encoding ----


def encode_batch(batch: Any, level: int) -> bytearray:
    """Start a batch frame from tuples; see ``_codec.encode_batch``."""
    frame = _codec.encode_batch(batch)
    if len(frame) < _BATCH_SIZE_MIN:
        return frame
    packed = _pack(_codec.KIND_BATCH, _plain_payload(frame), level, _BATCH_SAVING)
    return packed or frame


def encode_arrays(
    payload: Payload, level: int, room: bytearray | None = None
) -> bytearray:
    """Start a batch frame from arrays, in the memory of the frame `room` if that fits.

    Another thread may change keys and user data meanwhile, of which every content is a
    payload; the other two must be the caller's own.
    """
    packed = None
    if payload.size >= _BATCH_SIZE_MIN:
        packed = _pack(_codec.KIND_BATCH, payload, level, _BATCH_SAVING, room)
    return packed or _plain_frame(_codec.KIND_BATCH, payload, room)


def encode_block(columns: Columns, level: int) -> bytearray:
    """Start a block frame, packed where that makes it smaller."""
    start, stop = int(columns.offsets[0]), int(columns.offsets[-1])
    lengths, size = _codec.lengths_between(columns.offsets)
    user_data = columns.user_data[start:stop]
    if len(user_data) != size:
        raise ValueError("offsets go beyond the user data")
    payload = Payload(columns.keys, columns.values, lengths, user_data)
    packed = _pack(_codec.KIND_BLOCK, payload, level, 1.0)
    return packed or _plain_frame(_codec.KIND_BLOCK, payload)


def _plain_frame(
    kind: int, payload: Payload, room: bytearray | None = None
) -> bytearray:
    n, size = len(payload.keys), len(payload.user_data)
    return _codec.encode_payload(kind, _codec.LAYOUT_PLAIN, n, size, payload, room)


def _plain_payload(frame: bytearray) -> Payload:
    n = int.from_bytes(frame[24:28], "little")
    user_data_size = int.from_bytes(frame[40:48], "little")
    at = _codec.FRAME_HEADER_SIZE
    return Payload(
        np.frombuffer(frame, np.uint64, n, at),
        np.frombuffer(frame, np.uint64, n, at + 8 * n),
        np.frombuffer(frame, np.uint32, n, at + 16 * n),
        np.frombuffer(frame, np.uint8, user_data_size, at + 20 * n),
    )


@dataclasses.dataclass(frozen=True)
class _Section:
    encoding: int
    constant: int
    stored: bytes | Uint8s


@dataclasses.dataclass(frozen=True)
class _Column:
    filter: int
    sections: list[_Section]


def _constant(byte: int) -> _Section:
    return _Section(_codec.ENCODING_CONSTANT, byte, b"")


def _raw(data: Uint8s) -> _Section:
    return _Section(_codec.ENCODING_RAW, 0, data)


def _pack(
    kind: int,
    payload: Payload,
    level: int,
    saving: float,
    room: bytearray | None = None,
) -> bytearray | None:
    """Return a packed frame, or None if it would not be small enough or allowed."""
    n, user_data_size = len(payload.keys), len(payload.user_data)
    plain_size = payload.size
    if n == 0 or plain_size > PACKED_SIZE_MAX:
        return None
    common = _common_length(payload.lengths)
    compressor = _compressor(level)
    packed = [
        _pack_numbers(payload.keys, compressor),
        _pack_numbers(payload.values, compressor),
        _pack_lengths(payload.lengths, common, compressor),
        _pack_user_data(payload.user_data, common, compressor),
    ]
    sections = [section for column in packed for section in column.sections]
    table = b"".join(
        [_COLUMN.pack(column.filter, len(column.sections), 0) for column in packed]
        + [
            _SECTION.pack(len(section.stored), section.encoding, section.constant, 0)
            for section in sections
        ]
    )
    size = len(table) + sum(len(section.stored) for section in sections)
    if size >= plain_size * saving or plain_size > PACKED_RATIO_MAX * size:
        return None
    stored = [table, *(section.stored for section in sections)]
    give_way()
    return _codec.encode_payload(
        kind, _codec.LAYOUT_PACKED, n, user_data_size, stored, room
    )


def _pack_section(data: Uint8s, compressor: zstandard.ZstdCompressor) -> _Section:
    """Store bytes in the shortest of the three encodings, by a guess at zstd's."""
    give_way()
    byte = _codec.constant_of(data)
    if byte >= 0 or len(data) == 0:
        return _constant(max(byte, 0))
    if _is_compressible(data, compressor):
        give_way()
        stored = _compress(data, compressor)
        if len(stored) < len(data):
            return _Section(_codec.ENCODING_ZSTD, 0, stored)
    return _raw(data)


def _compress(data: Uint8s, compressor: zstandard.ZstdCompressor) -> bytes:
    # Of a copy: of bytes that change meanwhile zstd might make what is no frame.
    return compressor.compress(data.tobytes())


def _is_compressible(data: Uint8s, compressor: zstandard.ZstdCompressor) -> bool:
    if _codec.entropy_of_sample(data) <= _ENTROPY_BITS_MAX:
        return True
    sample = data[:_SAMPLE_SIZE]
    return len(_compress(sample, compressor)) < len(sample) * _SAMPLE_SAVING


def _pack_numbers(numbers: Uint64s, compressor: zstandard.ZstdCompressor) -> _Column:
    give_way()
    plain_bits, delta_bits = _codec.entropy_of_numbers(numbers)
    if min(plain_bits) > _ENTROPY_BITS_MAX and min(delta_bits) > _ENTROPY_BITS_MAX:
        return _Column(_codec.FILTER_NONE, [_pack_section(_bytes(numbers), compressor)])
    if sum(delta_bits) < sum(plain_bits):
        return _Column(
            _codec.FILTER_DELTA,
            _pack_planes(_bytes(_codec.differences(numbers)), 8, compressor),
        )
    return _Column(_codec.FILTER_NONE, _pack_planes(_bytes(numbers), 8, compressor))


def _pack_planes(
    data: Uint8s, width: int, compressor: zstandard.ZstdCompressor
) -> list[_Section]:
    planes = _codec.split_planes(data, width)
    sections = [_pack_section(plane, compressor) for plane in planes]
    if all(section.encoding == _codec.ENCODING_RAW for section in sections):
        return [_raw(data)]  # the same size, and nothing to shuffle back
    return sections


def _common_length(lengths: Uint32s) -> int | None:
    return int(lengths[0]) if _codec.repeats(_bytes(lengths), 4) else None


def _pack_lengths(
    lengths: Uint32s, common: int | None, compressor: zstandard.ZstdCompressor
) -> _Column:
    if common is not None:
        planes = [_constant(byte) for byte in common.to_bytes(4, "little")]
    else:
        planes = _pack_planes(_bytes(lengths), 4, compressor)
    return _Column(_codec.FILTER_NONE, planes)


def _pack_user_data(
    user_data: Uint8s, common: int | None, compressor: zstandard.ZstdCompressor
) -> _Column:
    if common is not None and 2 <= common <= _codec.STRIDE_MAX:
        n_sample = max(1, _SAMPLE_SIZE // common)
        sample = user_data[: n_sample * common]
        bits = _codec.entropy_of_planes(sample, common)
        planes_size = sum(bits) / 8 * (len(sample) / common)
        if min(bits) <= _ENTROPY_BITS_MAX and planes_size < len(
            _compress(sample, compressor)
        ):
            return _Column(
                _codec.FILTER_NONE, _pack_planes(user_data, common, compressor)
            )
    return _Column(_codec.FILTER_NONE, [_pack_section(user_data, compressor)])


def _bytes(numbers: npt.NDArray[Any]) -> Uint8s:
    return np.ascontiguousarray(numbers).view(np.uint8)
