"""Bytes to arrays and back: the kernels of metastore.

A leaf: no files, no policy, no state. Sections cited are those of docs/format.md.
Sizes and counts found in bytes are claims until they were checked here. Functions
release the GIL for their loops and are thread-safe; the caller keeps the arguments
from changing meanwhile.
"""

from cpython.bytearray cimport (
    PyByteArray_AS_STRING,
    PyByteArray_FromStringAndSize,
    PyByteArray_Resize,
)
from cpython.bytes cimport PyBytes_AS_STRING, PyBytes_CheckExact, PyBytes_GET_SIZE
from cpython.buffer cimport (
    PyBUF_SIMPLE,
    PyBuffer_Release,
    PyObject_CheckBuffer,
    PyObject_GetBuffer,
)
from cpython.number cimport PyNumber_Index
from libc.math cimport log2
from libc.stdint cimport UINT64_MAX, uint8_t, uint32_t, uint64_t
from libc.stdlib cimport free, malloc
from libc.string cimport memcmp, memcpy, memset

import numpy as np

from metastore.errors import shown_integer

cdef extern from "Python.h":
    ctypedef struct PyByteArrayObject:
        Py_ssize_t ob_alloc

cdef extern from *:
    """
    #ifdef __SIZEOF_INT128__
    typedef unsigned __int128 ms_wide;
    #else
    typedef uint64_t ms_wide;
    #endif
    """
    # Cython reads the digits of an int in place, without a call, only for a type with
    # room for them all: beyond 2**60 there are three of 30 bits, too many for 64.
    ctypedef unsigned long long wide "ms_wide"

cdef extern from "_kernels.h" nogil:
    void ms_init()
    uint32_t ms_crc32c(uint32_t crc, const uint8_t* data, size_t size)
    uint32_t ms_crc32c_table(uint32_t crc, const uint8_t* data, size_t size)
    uint64_t ms_load_u64(const uint8_t* at)
    uint32_t ms_load_u32(const uint8_t* at)
    void ms_store_u64(uint8_t* at, uint64_t value)
    void ms_store_u32(uint8_t* at, uint32_t value)
    void ms_finish_frame(
        uint8_t* frame, uint32_t seed, uint64_t sequence, uint64_t durable
    )
    void ms_join8(const uint8_t** planes, const size_t* steps, uint8_t* out, size_t n)
    void ms_split8(const uint8_t* data, uint8_t* out, size_t n)

ms_init()

# What a scan met (the value that scan_frames returns last), or what is wrong with a
# frame (docs/format.md, section 4).
cdef enum Status:
    OK = 0              # the table is full, there may be more
    NO_BYTES = 1        # fewer bytes than a frame header
    INCOMPLETE = 2      # a valid header whose frame goes beyond the data
    SEALED = 3          # an end frame; the row behind the last describes it
    BAD_HEADER = 10
    BAD_KIND = 11
    BAD_LAYOUT = 12
    BAD_RESERVED = 13
    BAD_SEQUENCE = 14
    BAD_DURABLE = 15
    BAD_SIZE = 16
    BAD_PADDING = 17
    BAD_PAYLOAD = 20
    BAD_LENGTHS = 21
    BAD_TOMBSTONE = 22
    BAD_TABLE = 23
    BAD_SECTION = 24

SCAN_MORE = OK
SCAN_NO_BYTES = NO_BYTES
SCAN_INCOMPLETE = INCOMPLETE
SCAN_SEALED = SEALED
STATUS_BAD_HEADER = BAD_HEADER
STATUS_BAD_PAYLOAD = BAD_PAYLOAD
STATUS_BAD_SEQUENCE = BAD_SEQUENCE
STATUS_BAD_KIND = BAD_KIND

REASONS = {
    NO_BYTES: "the file ends where a frame must stand",
    INCOMPLETE: "the frame goes beyond the end of the file",
    SEALED: "an end frame stands where none may be",
    BAD_HEADER: "frame header checksum mismatch",
    BAD_KIND: "a frame of this kind must not stand here",
    BAD_LAYOUT: "unknown frame layout",
    BAD_RESERVED: "reserved bytes of the frame header are not zero",
    BAD_SEQUENCE: "sequence out of order",
    BAD_DURABLE: "durable sequence out of range",
    BAD_SIZE: "record count and sizes of the frame contradict each other",
    BAD_PADDING: "padding of the frame is not zero",
    BAD_PAYLOAD: "frame checksum mismatch",
    BAD_LENGTHS: "lengths do not add up to the user data",
    BAD_TOMBSTONE: "a deletion carries user data",
    BAD_TABLE: "malformed section table",
    BAD_SECTION: "malformed zstd section",
}

cdef enum:
    HEADER = 48
    CHECKSUM_XOR = 0xAF
    BATCH = 1
    BLOCK = 2
    END = 3
    PLAIN = 0
    PACKED = 1
    CONSTANT = 0
    RAW = 1
    ZSTD = 2
    COLUMNS = 6
    PLANES_MAX = 64
    COLUMN_HEADS = 16
    SECTION_ROW = 8
    SECTIONS_MAX = 8 + 8 + 4 + 64
    PARTS_MAX = 1 + SECTIONS_MAX
    USER_DATA_GUESS = 16    # bytes a record, for a start
    SAMPLE_RUNS = 16
    SAMPLE_RUN = 256
    NUMBER_RUNS = 8
    NUMBER_RUN = 512
    LOGARITHMS = 4097
    COPY_SIZE = 16 << 10

FRAME_HEADER_SIZE = HEADER
KIND_BATCH = BATCH
KIND_BLOCK = BLOCK
KIND_END = END
LAYOUT_PLAIN = PLAIN
LAYOUT_PACKED = PACKED
PACKED_SIZE_MAX = 1 << 26
PACKED_RATIO_MAX = 1 << 15
ENCODING_CONSTANT = CONSTANT
ENCODING_RAW = RAW
ENCODING_ZSTD = ZSTD
FILTER_NONE = 0
FILTER_DELTA = 1
# Records with more bytes of user data than this have no planes.
STRIDE_MAX = PLANES_MAX

# The columns of a scan's table.
ROW_OFFSET = 0
ROW_PAYLOAD_SIZE = 1
ROW_RECORDS = 2
ROW_USER_DATA_SIZE = 3
ROW_LAYOUT = 4
ROW_CHECKSUM = 5
ROW_COLUMNS = COLUMNS

cdef uint64_t LENGTH_LIMIT = <uint64_t>1 << 32
cdef uint64_t PACKED_SIZE_LIMIT = <uint64_t>1 << 26
cdef uint64_t PACKED_RATIO_LIMIT = <uint64_t>1 << 15


# ---- crc32c ----

def crc32c(const uint8_t[::1] data not None, uint32_t value=0):
    """Return the crc32c of `data`, going on from the checksum `value`."""
    cdef uint32_t crc = value
    if data.shape[0]:
        with nogil:
            crc = ms_crc32c(crc, &data[0], data.shape[0])
    return crc


def crc32c_table(const uint8_t[::1] data not None, uint32_t value=0):
    """Return :func:`crc32c` by the tables that serve where no instruction does."""
    if not data.shape[0]:
        return value
    return ms_crc32c_table(value, &data[0], data.shape[0])


# ---- encoding ----

cdef inline uint8_t* _at(bytearray frame) noexcept:
    return <uint8_t*>PyByteArray_AS_STRING(frame)


cdef inline Py_ssize_t _padded(Py_ssize_t size) noexcept nogil:
    return (size + 7) & ~<Py_ssize_t>7


cdef void _start_frame(
    uint8_t* frame, int kind, int layout, uint64_t n, uint64_t payload_size,
    uint64_t user_data_size
) noexcept nogil:
    """Write the padding, and the header but for the checksums and the sequence."""
    cdef Py_ssize_t end = HEADER + payload_size
    memset(frame, 0, HEADER)
    frame[4] = kind
    frame[5] = layout
    ms_store_u32(frame + 24, n)
    ms_store_u64(frame + 32, payload_size)
    ms_store_u64(frame + 40, user_data_size)
    memset(frame + end, 0, _padded(end) - end)


cdef void _add_checksum(uint8_t* frame) noexcept nogil:
    cdef uint64_t size = ms_load_u64(frame + 32)
    ms_store_u32(frame + 28, ms_crc32c(0, frame + HEADER, size) ^ CHECKSUM_XOR)


def finish_frame(
    uint8_t[::1] frame not None, uint32_t seed, uint64_t sequence, uint64_t durable
):
    """Write sequence, durable sequence and header checksum into a started frame."""
    if frame.shape[0] < HEADER:
        raise ValueError(f"frame of {frame.shape[0]} bytes is shorter than its header")
    ms_finish_frame(&frame[0], seed, sequence, durable)


cdef uint64_t _checked_integer(object number, Py_ssize_t i, str what) except? 0:
    """Return the number; an error names the record and what the number is there."""
    if isinstance(number, bool):
        raise TypeError(f"record {i}: {what} must be an integer, not a bool")
    try:
        exact = PyNumber_Index(number)
    except TypeError:
        raise TypeError(
            f"record {i}: {what} must be an integer, not {type(number).__name__}"
        ) from None
    try:
        return exact
    except OverflowError:
        shown = shown_integer(exact)
        raise OverflowError(
            f"record {i}: {what} {shown} is outside 0 .. 2**64 - 1"
        ) from None


cdef inline uint64_t _integer(object number, Py_ssize_t i, str what) except? 0:
    """Return the number; an OverflowError is left to :func:`_name_overflow`.

    A plain int is converted here without `try`, which costs more than the conversion.
    """
    cdef wide value
    if type(number) is not int:
        return _checked_integer(number, i, what)
    value = number
    if value > <wide>UINT64_MAX:
        raise OverflowError
    return <uint64_t>value


cdef int _name_overflow(object record, Py_ssize_t i) except -1:
    """Raise the error that says which integer of a record is outside, if one is."""
    pair = (<tuple>record)[1]
    _checked_integer((<tuple>record)[0], i, "key")
    if pair is not None:
        _checked_integer((<tuple>pair)[0], i, "value")
    return 0


cdef inline Py_ssize_t _append_bytes(
    bytearray frame, Py_ssize_t end, const char* data, Py_ssize_t size, Py_ssize_t i
) except -1:
    if <uint64_t>size >= LENGTH_LIMIT:
        raise OverflowError(
            f"record {i}: user data of {size} bytes; the limit is 2**32 - 1"
        )
    if end + size > len(frame):
        PyByteArray_Resize(frame, max(end + size, 2 * len(frame)))
    memcpy(_at(frame) + end, data, size)
    return size


cdef Py_ssize_t _append_view(
    bytearray frame, Py_ssize_t end, object user_data, Py_ssize_t i
) except -1:
    """Do what `_append` does, for what is not bytes."""
    cdef Py_buffer view
    if not PyObject_CheckBuffer(user_data):
        raise TypeError(
            f"record {i}: user data must be bytes-like, not {type(user_data).__name__}"
        )
    try:
        PyObject_GetBuffer(user_data, &view, PyBUF_SIMPLE)
    except (BufferError, ValueError) as error:
        raise ValueError(
            f"record {i}: user data cannot be read as contiguous bytes: {error}"
        ) from error
    try:
        return _append_bytes(frame, end, <const char*>view.buf, view.len, i)
    finally:
        PyBuffer_Release(&view)


cdef inline Py_ssize_t _append(
    bytearray frame, Py_ssize_t end, object user_data, Py_ssize_t i
) except -1:
    """Copy user data to `end` in a frame, which grows as needed; return its size."""
    if PyBytes_CheckExact(user_data):
        return _append_bytes(
            frame, end, PyBytes_AS_STRING(user_data), PyBytes_GET_SIZE(user_data), i
        )
    return _append_view(frame, end, user_data, i)


cdef inline Py_ssize_t _add_record(
    bytearray frame, Py_ssize_t end, object record, Py_ssize_t i, Py_ssize_t n
) except -1:
    """Write record `i` of `n`, its user data to `end`; return where that ends."""
    cdef uint64_t value = 0
    cdef Py_ssize_t size = 0
    cdef object pair
    cdef uint8_t* at
    if not isinstance(record, tuple) or len(<tuple>record) != 2:
        raise TypeError(
            f"record {i}: must be a tuple (key, (value, user_data) or None)"
        )
    cdef uint64_t key = _integer((<tuple>record)[0], i, "key")
    pair = (<tuple>record)[1]
    if pair is not None:
        if not isinstance(pair, tuple) or len(<tuple>pair) != 2:
            raise TypeError(
                f"record {i}: must hold a tuple (value, user_data) or None"
            )
        value = _integer((<tuple>pair)[0], i, "value")
        if value == 0:
            raise ValueError(f"record {i}: value 0 means deleted: give None instead")
        size = _append(frame, end, (<tuple>pair)[1], i)
    at = _at(frame) + HEADER
    ms_store_u64(at + 8 * i, key)
    ms_store_u64(at + 8 * n + 8 * i, value)
    ms_store_u32(at + 16 * n + 4 * i, size)
    return end + size


def encode_batch(batch):
    """Start a plain batch frame from tuples (section 5).

    Parameters
    ----------
    batch : iterable of (int, (int, bytes-like) or None)
        Key, and value with user data, or None for a deletion.

    Returns
    -------
    bytearray
        The frame, to be given to :func:`finish_frame`.

    Raises
    ------
    TypeError, ValueError, OverflowError
        For what a batch cannot hold; the message names the record.
    """
    cdef list records = list(batch)
    cdef Py_ssize_t n = len(records)
    cdef Py_ssize_t i
    if <uint64_t>n >= LENGTH_LIMIT:
        raise OverflowError(f"a batch of {n} records; the limit is 2**32 - 1")
    cdef Py_ssize_t user_data_at = HEADER + 20 * n
    cdef Py_ssize_t end = user_data_at
    cdef bytearray frame = PyByteArray_FromStringAndSize(
        NULL, user_data_at + USER_DATA_GUESS * n
    )
    try:
        for i in range(n):
            end = _add_record(frame, end, records[i], i, n)
    except OverflowError:
        _name_overflow(records[i], i)
        raise
    PyByteArray_Resize(frame, _padded(end))
    _start_frame(_at(frame), BATCH, PLAIN, n, end - HEADER, end - user_data_at)
    _add_checksum(_at(frame))
    return frame


cdef uint32_t _copy(
    uint8_t* to, const uint8_t* data, size_t size, uint32_t crc
) noexcept nogil:
    """Copy `data`; return the checksum of the copy, going on from `crc`."""
    cdef size_t at = 0, step
    while at < size:  # in pieces that the nearest cache still holds for the checksum
        step = min(size - at, <size_t>COPY_SIZE)
        memcpy(to + at, data + at, step)
        crc = ms_crc32c(crc, to + at, step)
        at += step
    return crc


cdef bytearray _frame_in(bytearray room, Py_ssize_t size):
    """Return a frame of `size` bytes, in the memory of `room` if that fits."""
    cdef Py_ssize_t capacity = 0
    if room is not None:
        capacity = (<PyByteArrayObject*>room).ob_alloc
    if not capacity // 2 <= size < capacity:
        return PyByteArray_FromStringAndSize(NULL, size)
    PyByteArray_Resize(room, size)
    return room


def encode_payload(
    int kind, int layout, uint32_t n, uint64_t user_data_size, payload,
    bytearray room=None
):
    """Start a frame around the joined bytes of `payload`, a sequence of buffers.

    Each byte of them is read once: what is summed is what was copied. With `room` the
    frame may take the memory of that one, which is lost.
    """
    cdef list parts = list(payload)
    cdef Py_buffer views[PARTS_MAX]
    cdef int n_parts = len(parts)
    cdef int n_views = 0, i
    cdef Py_ssize_t payload_size = 0
    cdef uint32_t crc = 0
    cdef bytearray frame
    cdef uint8_t* start
    cdef uint8_t* at
    if n_parts > PARTS_MAX:
        raise ValueError(f"a payload of {n_parts} parts; the limit is {PARTS_MAX}")
    try:
        for part in parts:
            PyObject_GetBuffer(part, &views[n_views], PyBUF_SIMPLE)
            n_views += 1
            payload_size += views[n_views - 1].len
        frame = _frame_in(room, _padded(HEADER + payload_size))
        start = _at(frame)
        with nogil:  # touching new memory alone may take milliseconds
            at = start + HEADER
            for i in range(n_views):
                crc = _copy(at, <const uint8_t*>views[i].buf, views[i].len, crc)
                at += views[i].len
            _start_frame(start, kind, layout, n, payload_size, user_data_size)
            ms_store_u32(start + 28, crc ^ CHECKSUM_XOR)
    finally:
        for i in range(n_views):
            PyBuffer_Release(&views[i])
    return frame


# ---- scanning frames (section 4) ----

cdef struct Row:
    uint64_t offset
    uint64_t payload_size
    uint64_t n_records
    uint64_t user_data_size
    uint64_t layout
    uint64_t checksum


cdef inline int _check_sizes(
    const uint8_t* header, int layout, uint64_t payload_size, uint64_t user_data_size
) noexcept nogil:
    cdef uint64_t plain_size = 20 * <uint64_t>ms_load_u32(header + 24)
    if header[4] == END:
        return OK if layout == PLAIN and user_data_size == 0 else BAD_SIZE
    if layout == PLAIN:
        # payload_size is within the file by now, so neither side can wrap
        if payload_size < plain_size or payload_size - plain_size != user_data_size:
            return BAD_SIZE
        return OK
    if plain_size == 0 or user_data_size > PACKED_SIZE_LIMIT:
        return BAD_SIZE
    plain_size += user_data_size
    if plain_size > PACKED_SIZE_LIMIT or plain_size > PACKED_RATIO_LIMIT * payload_size:
        return BAD_SIZE
    return OK


cdef int _read_header(
    const uint8_t* header, Py_ssize_t left, uint32_t seed, uint64_t sequence,
    bint snapshot, Row* row
) noexcept nogil:
    """Check the frame at `header`, `left` bytes before the file ends; fill `row`."""
    cdef uint32_t stored, computed
    cdef uint64_t durable, found, payload_size
    cdef Py_ssize_t size
    cdef int kind, layout, status
    if left < HEADER:
        return NO_BYTES
    stored = ms_load_u32(header)
    computed = ms_crc32c(seed, header + 4, HEADER - 4) ^ CHECKSUM_XOR
    if stored != computed:
        return BAD_HEADER
    payload_size = ms_load_u64(header + 32)
    if payload_size > <uint64_t>(left - HEADER):
        return INCOMPLETE
    size = HEADER + payload_size
    if _padded(size) > left:
        return INCOMPLETE
    kind = header[4]
    layout = header[5]
    if kind != END and kind != (BLOCK if snapshot else BATCH):
        return BAD_KIND
    if layout != PLAIN and layout != PACKED:
        return BAD_LAYOUT
    if header[6] or header[7]:
        return BAD_RESERVED
    found = ms_load_u64(header + 8)
    durable = ms_load_u64(header + 16)
    if found != sequence - (not snapshot and kind == END) and not (
        snapshot and kind == BLOCK and found == 0
    ):
        return BAD_SEQUENCE
    if snapshot:
        if durable:
            return BAD_DURABLE
    elif durable >= found if kind == BATCH else durable != found:
        return BAD_DURABLE
    status = _check_sizes(header, layout, payload_size, ms_load_u64(header + 40))
    if status != OK:
        return status
    if kind == END and not snapshot:
        if payload_size or ms_load_u32(header + 24):
            return BAD_SIZE
        if ms_load_u32(header + 28) != CHECKSUM_XOR:  # of no bytes
            return BAD_PAYLOAD
    while size & 7:
        if header[size]:
            return BAD_PADDING
        size += 1
    row.payload_size = payload_size
    row.n_records = ms_load_u32(header + 24)
    row.user_data_size = ms_load_u64(header + 40)
    row.layout = layout
    row.checksum = stored
    return SEALED if kind == END else OK


def scan_frames(
    const uint8_t[::1] data not None,
    Py_ssize_t offset,
    uint32_t seed,
    uint64_t sequence,
    uint64_t[:, ::1] table not None,
    bint snapshot=False,
):
    """Check frame headers in sequence; payloads are left to :func:`decode_frames`.

    Parameters
    ----------
    data : buffer
        The file, or a part of it.
    offset : int
        Where in `data` the first frame stands.
    seed : int
        The checksum seed of the file.
    sequence : int
        Log: the sequence that the first frame must have. Snapshot: that of its end.
    table : ndarray of uint64, shape (rows, 6)
        Filled with a row per frame: offset in `data`, payload size, records, user
        data size, layout, header checksum.
    snapshot : bool
        Whether blocks are expected instead of batches.

    Returns
    -------
    n : int
        Rows filled. If the scan met an end frame, one more row describes that.
    offset : int
        Where the scan stopped.
    status : int
        ``SCAN_MORE``, ``SCAN_NO_BYTES``, ``SCAN_INCOMPLETE``, ``SCAN_SEALED``, or what
        is wrong with the frame there (``REASONS``).
    """
    cdef Py_ssize_t size = data.shape[0]
    cdef Py_ssize_t n = 0, rows = table.shape[0]
    cdef int status = OK
    cdef Row* row
    if table.shape[1] != COLUMNS or offset < 0 or offset > size:
        raise ValueError(
            "the table has a wrong shape, or the offset is outside the data"
        )
    if rows == 0 or size == offset:
        return 0, offset, OK if rows == 0 else NO_BYTES
    with nogil:
        while n < rows:
            row = <Row*>&table[n, 0]
            if offset == size:
                status = NO_BYTES
                break
            status = _read_header(
                &data[offset], size - offset, seed, sequence, snapshot, row
            )
            if status != OK and status != SEALED:
                break
            row.offset = offset
            if status == SEALED:
                break
            offset += _padded(HEADER + row.payload_size)
            n += 1
            if not snapshot:
                sequence += 1
    return n, offset, status


def totals(const uint64_t[:, ::1] table not None):
    """Return records and user data size of the frames that a scan put into `table`."""
    cdef uint64_t n_records = 0, user_data_size = 0
    cdef Py_ssize_t i
    cdef const Row* row
    if table.shape[1] != COLUMNS:
        raise ValueError("the table has a wrong shape")
    with nogil:
        for i in range(table.shape[0]):
            row = <const Row*>&table[i, 0]
            n_records += row.n_records
            user_data_size += row.user_data_size
    return n_records, user_data_size


def frame_size(const uint8_t[::1] data not None, Py_ssize_t offset):
    """Return the whole size that the frame header at `offset` claims, in bytes."""
    if offset < 0 or data.shape[0] - offset < HEADER:
        raise ValueError("no frame header there")
    return (HEADER + int(ms_load_u64(&data[offset + 32])) + 7) & ~7


def find_durable(
    const uint8_t[::1] data not None, Py_ssize_t offset, uint32_t seed,
    uint64_t sequence
):
    """Return where a frame says that batch `sequence` was durable (section 8), or -1.

    Every multiple of 8 from `offset` on is tried; of the header only the checksum has
    to agree, and the reserved bytes have to be zero: one place in 2**32 of a torn batch
    agrees by chance, and a gigabyte has 2**27.
    """
    cdef Py_ssize_t last = data.shape[0] - HEADER
    cdef Py_ssize_t found = -1
    cdef const uint8_t* at
    if offset < 0 or offset & 7:
        raise ValueError("frames stand at multiples of 8")
    with nogil:
        while offset <= last:
            at = &data[offset]
            if (
                ms_load_u64(at + 16) >= sequence
                and at[6] == 0 and at[7] == 0
                and ms_load_u32(at)
                == ms_crc32c(seed, at + 4, HEADER - 4) ^ CHECKSUM_XOR
            ):
                found = offset
                break
            offset += 8
    return found


# ---- decoding payloads (sections 5 and 6) ----

cdef struct Target:
    uint8_t* keys
    uint8_t* values
    uint64_t* ends          # NULL: not wanted, since no record has user data
    uint8_t* user_data
    uint64_t base           # offset of the frame's first user data byte


cdef int _ends_of(
    const uint8_t* lengths, Py_ssize_t n, uint64_t user_data_size, Target* to
) noexcept nogil:
    cdef uint64_t end = to.base
    cdef uint64_t tombstone_bytes = 0
    cdef uint64_t length
    cdef Py_ssize_t i
    for i in range(n):
        length = ms_load_u32(lengths + 4 * i)
        end += length
        if to.ends != NULL:
            to.ends[i] = end
        if length:
            tombstone_bytes |= ms_load_u64(to.values + 8 * i) == 0
    if end - to.base != user_data_size:
        return BAD_LENGTHS
    return BAD_TOMBSTONE if tombstone_bytes else OK


cdef int _decode_plain(const uint8_t* payload, Row* row, Target* to) noexcept nogil:
    cdef Py_ssize_t n = row.n_records
    if n == 0:
        return BAD_LENGTHS if row.user_data_size else OK
    if n == 1 and row.user_data_size == 8:  # a common frame, without calls
        ms_store_u64(to.keys, ms_load_u64(payload))
        ms_store_u64(to.values, ms_load_u64(payload + 8))
        ms_store_u64(to.user_data, ms_load_u64(payload + 20))
        return _ends_of(payload + 16, 1, 8, to)
    memcpy(to.keys, payload, 8 * n)
    memcpy(to.values, payload + 8 * n, 8 * n)
    if row.user_data_size:
        memcpy(to.user_data, payload + 20 * n, row.user_data_size)
    return _ends_of(payload + 16 * n, n, row.user_data_size, to)


cdef struct Section:
    const uint8_t* at       # stored bytes, or the constant one
    uint64_t stored
    uint64_t unpacked
    int encoding
    int constant


cdef struct Sections:
    int n
    int filters[4]
    int counts[4]
    Section items[SECTIONS_MAX]


cdef int _read_table(const uint8_t* payload, Row* row, Sections* out) noexcept nogil:
    """Parse and check the section table of a packed payload (section 6)."""
    cdef uint64_t n = row.n_records
    cdef uint64_t left = row.payload_size
    cdef uint64_t widths[4]
    cdef uint64_t unpacked
    cdef const uint8_t* at
    cdef Section* item
    cdef int column, _i
    if left < COLUMN_HEADS:
        return BAD_TABLE
    widths[0] = 8
    widths[1] = 8
    widths[2] = 4
    out.n = 0
    for column in range(4):
        at = payload + 4 * column
        out.filters[column] = at[0]
        out.counts[column] = at[1]
        if at[2] or at[3] or at[0] > (1 if column < 2 else 0):
            return BAD_TABLE
        if column < 3:
            if <uint64_t>at[1] != widths[column] and at[1] != 1:
                return BAD_TABLE
        elif at[1] == 0 or at[1] > PLANES_MAX:
            return BAD_TABLE
        elif at[1] > 1 and row.user_data_size != n * at[1]:
            return BAD_TABLE
        out.n += at[1]
    left -= COLUMN_HEADS
    if left < <uint64_t>out.n * SECTION_ROW:
        return BAD_TABLE
    left -= out.n * SECTION_ROW
    at = payload + COLUMN_HEADS + out.n * SECTION_ROW
    item = &out.items[0]
    for column in range(4):
        unpacked = n
        if out.counts[column] == 1:
            unpacked = row.user_data_size if column == 3 else n * widths[column]
        for _i in range(out.counts[column]):
            _read_section(
                payload + COLUMN_HEADS + (item - &out.items[0]) * SECTION_ROW, item
            )
            item.unpacked = unpacked
            if not _section_is_valid(item) or item.stored > left:
                return BAD_TABLE
            if item.encoding != CONSTANT:
                item.at = at
                at += item.stored
                left -= item.stored
            item += 1
    return BAD_TABLE if left else OK


cdef inline void _read_section(const uint8_t* row, Section* item) noexcept nogil:
    item.stored = ms_load_u32(row)
    item.encoding = row[4] if not (row[6] or row[7]) else 255
    item.constant = row[5]
    item.at = row + 5


cdef inline bint _section_is_valid(const Section* item) noexcept nogil:
    if item.encoding == CONSTANT:
        return item.stored == 0
    if item.constant:
        return False
    if item.encoding == RAW:
        return item.stored == item.unpacked
    return item.encoding == ZSTD and 0 < item.stored < item.unpacked


cdef void _join_strided(
    const Section* planes, int width, uint8_t* out, Py_ssize_t n
) noexcept nogil:
    """Integers or records of `width` bytes from their planes."""
    cdef const uint8_t* at[8]
    cdef size_t steps[8]
    cdef uint8_t constants[8][16]
    cdef const uint8_t* plane
    cdef Py_ssize_t i
    cdef int j
    if width == 8:
        for j in range(8):
            at[j] = planes[j].at
            steps[j] = 1
            if planes[j].encoding == CONSTANT:
                memset(constants[j], planes[j].constant, 16)
                at[j] = constants[j]
                steps[j] = 0
        ms_join8(at, steps, out, n)
        return
    for j in range(width):
        plane = planes[j].at
        if planes[j].encoding == CONSTANT:
            for i in range(n):
                out[i * width + j] = planes[j].constant
        else:
            for i in range(n):
                out[i * width + j] = plane[i]


cdef void _unpack_column(
    const Section* sections, int n_sections, int width, bint delta, uint8_t* out,
    Py_ssize_t n
) noexcept nogil:
    cdef uint64_t total = 0
    cdef Py_ssize_t i
    if n_sections > 1:
        _join_strided(sections, width, out, n)
    elif sections.encoding == CONSTANT:
        memset(out, sections.constant, width * n)
    else:
        memcpy(out, sections.at, width * n)
    if delta:
        for i in range(n):
            total += ms_load_u64(out + 8 * i)
            ms_store_u64(out + 8 * i, total)


cdef int _lengths_of(
    const Section* sections, int n_sections, Row* row, Target* to, uint8_t* scratch
) noexcept nogil:
    """Ends of the user data; `scratch` has room for 4 bytes a record."""
    cdef Py_ssize_t n = row.n_records
    cdef uint64_t length = 0
    cdef uint64_t end = to.base
    cdef Py_ssize_t i
    cdef int j
    for j in range(n_sections):
        if sections[j].encoding != CONSTANT:
            _unpack_column(sections, n_sections, 4, False, scratch, n)
            return _ends_of(scratch, n, row.user_data_size, to)
        length |= <uint64_t>sections[j].constant << (8 * j)
    if n_sections == 1:
        length *= 0x01010101
    if length * <uint64_t>n != row.user_data_size:
        return BAD_LENGTHS
    if to.ends == NULL:
        return OK
    for i in range(n):
        end += length
        to.ends[i] = end
        if length and ms_load_u64(to.values + 8 * i) == 0:
            return BAD_TOMBSTONE
    return OK


cdef int _decode_sections(Sections* sections, Row* row, Target* to) noexcept nogil:
    cdef Py_ssize_t n = row.n_records
    cdef Section* at = &sections.items[0]
    cdef uint8_t* scratch
    cdef Py_ssize_t i
    cdef int status
    _unpack_column(at, sections.counts[0], 8, sections.filters[0] == 1, to.keys, n)
    at += sections.counts[0]
    _unpack_column(at, sections.counts[1], 8, sections.filters[1] == 1, to.values, n)
    at += sections.counts[1]
    # The lengths come before the user data, whose room is exactly user_data_size.
    scratch = <uint8_t*>malloc(4 * n)
    if scratch == NULL:
        return -1
    status = _lengths_of(at, sections.counts[2], row, to, scratch)
    free(scratch)
    at += sections.counts[2]
    if status != OK:
        return status
    if sections.counts[3] > 1:
        for i in range(n):
            if to.ends[i] - to.base != <uint64_t>(i + 1) * sections.counts[3]:
                return BAD_LENGTHS
        _unpack_column(
            at, sections.counts[3], sections.counts[3], False, to.user_data, n
        )
    elif row.user_data_size == 0:
        return OK
    elif at.encoding == CONSTANT:
        memset(to.user_data, at.constant, row.user_data_size)
    else:
        memcpy(to.user_data, at.at, row.user_data_size)
    return OK


cdef int _decode_packed(
    const uint8_t[::1] data, Row* row, Target* to, object decompress
) except -2:
    """Decode one packed frame; zstd sections go through `decompress` with the GIL."""
    cdef Sections sections
    cdef Section* item
    cdef list unpacked = []
    cdef bytes content
    cdef Py_ssize_t start
    cdef int status, i
    cdef const uint8_t* payload = &data[row.offset + HEADER]
    status = _read_table(payload, row, &sections)
    if status != OK:
        return status
    for i in range(sections.n):
        item = &sections.items[i]
        if item.encoding != ZSTD:
            continue
        start = item.at - &data[0]
        content = decompress(
            data[start : start + <Py_ssize_t>item.stored], item.unpacked
        )
        if content is None or <uint64_t>PyBytes_GET_SIZE(content) != item.unpacked:
            return BAD_SECTION
        unpacked.append(content)
        item.at = <const uint8_t*>PyBytes_AS_STRING(content)
    with nogil:
        status = _decode_sections(&sections, row, to)
    if status == -1:
        raise MemoryError
    return status


def decode_frames(
    const uint8_t[::1] data not None,
    const uint64_t[:, ::1] table not None,
    uint64_t[::1] keys not None,
    uint64_t[::1] values not None,
    uint64_t[::1] ends not None,
    uint8_t[::1] user_data not None,
    uint64_t base,
    decompress,
):
    """Check and decode the payloads of scanned frames, one behind the other.

    Parameters
    ----------
    data : buffer
        What was scanned.
    table : ndarray of uint64, shape (frames, 6)
        The rows that :func:`scan_frames` filled for `data`.
    keys, values, ends : ndarray of uint64, shape (records of all rows,)
        Filled; `ends` with the offset behind each record's user data. If no row has
        any, `ends` may be empty.
    user_data : ndarray of uint8, shape (user data size of all rows,)
        Filled.
    base : int
        Added to all of `ends`: the offset of ``user_data[0]``.
    decompress : callable
        ``decompress(buffer, size)`` returns the content of a zstd frame as bytes, or
        None if it is not one of exactly that size.

    Returns
    -------
    row : int
        The first frame that is not valid, or the number of frames.
    status : int
        0, or what is wrong with that frame (``REASONS``).
    """
    cdef Py_ssize_t n_rows = table.shape[0], i = 0
    cdef Py_ssize_t n_records = 0, user_data_size = 0
    cdef int status = OK
    cdef Row* row
    cdef Target to
    cdef uint64_t size = data.shape[0]
    if table.shape[1] != COLUMNS:
        raise ValueError("the table has a wrong shape")
    for i in range(n_rows):
        row = <Row*>&table[i, 0]
        if row.offset > size or row.payload_size > size or (
            row.offset + HEADER + row.payload_size > size
        ):
            raise ValueError("the table is not of these bytes")
        if not _is_scanned(row):
            raise ValueError("the table was not filled by scan_frames")
        n_records += row.n_records
        user_data_size += row.user_data_size
    if not (
        keys.shape[0] == values.shape[0] == n_records
        and user_data.shape[0] == user_data_size
        and (ends.shape[0] == n_records or ends.shape[0] == user_data_size == 0)
    ):
        raise ValueError("the arrays have not the size that the table asks for")
    to.base = base
    to.keys = <uint8_t*>&keys[0] if n_records else NULL
    to.values = <uint8_t*>&values[0] if n_records else NULL
    to.ends = &ends[0] if ends.shape[0] else NULL
    to.user_data = &user_data[0] if user_data_size else NULL
    i = 0
    while i < n_rows and status == OK:
        row = <Row*>&table[i, 0]
        if row.layout == PACKED:
            with nogil:
                status = _check_payload(&data[row.offset], row)
            if status == OK:
                status = _decode_packed(data, row, &to, decompress)
            if status == OK:
                _advance(row, &to)
                i += 1
            continue
        with nogil:
            while i < n_rows:
                row = <Row*>&table[i, 0]
                if row.layout == PACKED:
                    break
                status = _check_payload(&data[row.offset], row)
                if status == OK:
                    status = _decode_plain(&data[row.offset] + HEADER, row, &to)
                if status != OK:
                    break
                _advance(row, &to)
                i += 1
    return i, status


cdef inline bint _is_scanned(const Row* row) noexcept nogil:
    """Whether count and sizes are what a scan lets pass, so that no sum can wrap."""
    if row.n_records >= LENGTH_LIMIT or row.layout > PACKED:
        return False
    if row.layout == PACKED:
        return 20 * row.n_records <= PACKED_SIZE_LIMIT and (
            row.user_data_size <= PACKED_SIZE_LIMIT
        )
    return row.payload_size >= 20 * row.n_records and (
        row.payload_size - 20 * row.n_records == row.user_data_size
    )


cdef inline int _check_payload(const uint8_t* frame, Row* row) noexcept nogil:
    cdef uint32_t computed = ms_crc32c(0, frame + HEADER, row.payload_size)
    computed ^= CHECKSUM_XOR
    return OK if computed == ms_load_u32(frame + 28) else BAD_PAYLOAD


cdef inline void _advance(const Row* row, Target* to) noexcept nogil:
    to.keys += 8 * row.n_records
    to.values += 8 * row.n_records
    if to.ends != NULL:
        to.ends += row.n_records
    to.user_data += row.user_data_size
    to.base += row.user_data_size


def check_payload(const uint8_t[::1] data not None, const uint64_t[::1] row not None):
    """Return whether the payload of a scanned frame has its checksum."""
    cdef Row* it = <Row*>&row[0]
    cdef uint64_t size = data.shape[0]
    cdef int status
    if row.shape[0] != COLUMNS or it.offset > size or it.payload_size > size or (
        it.offset + HEADER + it.payload_size > size
    ):
        raise ValueError("the row is not of these bytes")
    with nogil:
        status = _check_payload(&data[it.offset], it)
    return status == OK


def first_disorder(
    const uint64_t[::1] keys not None, const uint64_t[::1] values not None
):
    """Return the first record of a block that breaks its rules (section 5), or -1.

    Its key is not greater than the one before, or its value is 0.
    """
    cdef Py_ssize_t n = keys.shape[0]
    cdef Py_ssize_t i
    cdef bint bad = False
    if values.shape[0] != n:
        raise ValueError(f"columns do not match: {n} keys, {values.shape[0]} values")
    if n == 0:
        return -1
    with nogil:
        bad = values[0] == 0
        for i in range(1, n):  # without a branch
            bad |= (keys[i] <= keys[i - 1]) | (values[i] == 0)
    if not bad:
        return -1
    for i in range(n):
        if values[i] == 0 or (i and keys[i] <= keys[i - 1]):
            return i


# ---- packing columns (section 6); which form wins is decided by the caller ----

def split_planes(const uint8_t[::1] data not None, int width):
    """Return the byte planes of records of `width` bytes: uint8, shape (width, n)."""
    if width < 1 or data.shape[0] % width:
        raise ValueError(f"{data.shape[0]} bytes are no records of {width} bytes")
    cdef Py_ssize_t n = data.shape[0] // width
    planes = np.empty((width, n), dtype=np.uint8)
    cdef uint8_t[:, ::1] out = planes
    cdef Py_ssize_t i
    cdef int j
    if n == 0:
        return planes
    with nogil:
        if width == 8:
            ms_split8(&data[0], &out[0, 0], n)
        else:
            for j in range(width):
                for i in range(n):
                    out[j, i] = data[i * width + j]
    return planes


def lengths_between(const uint64_t[::1] offsets not None):
    """Return the steps of offsets as the lengths of a frame.

    Returns
    -------
    lengths : ndarray of uint32, shape (n,)
    size : int
        Their sum, of what is in the array, whoever changes the offsets meanwhile.

    Raises
    ------
    ValueError
        If a step is negative or above 2**32 - 1.
    """
    cdef Py_ssize_t n = max(offsets.shape[0] - 1, 0)
    result = np.empty(n, dtype=np.uint32)
    cdef uint32_t[::1] lengths = result
    cdef uint64_t step, steps = 0, size = 0
    cdef Py_ssize_t i
    with nogil:
        for i in range(n):
            step = offsets[i + 1] - offsets[i]
            steps |= step
            lengths[i] = <uint32_t>step
        for i in range(n):
            size += lengths[i]
    # A step down is one of at least 2**32, modulo 2**64; or another has to be, before.
    if steps >= LENGTH_LIMIT:
        raise ValueError("a step between offsets is no length")
    return result, size


def differences(const uint64_t[::1] numbers not None):
    """Return the first number, then each less its predecessor, modulo 2**64."""
    cdef Py_ssize_t n = numbers.shape[0]
    result = np.empty(n, dtype=np.uint64)
    cdef uint64_t[::1] out = result
    cdef Py_ssize_t i
    with nogil:
        if n:
            out[0] = numbers[0]
        for i in range(1, n):
            out[i] = numbers[i] - numbers[i - 1]
    return result


# log2 of the counts that samples have: to compute it takes longer than to count.
cdef double _logarithms[LOGARITHMS]
cdef int _count
for _count in range(1, LOGARITHMS):
    _logarithms[_count] = log2(_count)


cdef inline double _log2(uint32_t count) noexcept nogil:
    return _logarithms[count] if count < LOGARITHMS else log2(count)


cdef double _entropy(const uint32_t* counts, Py_ssize_t n) noexcept nogil:
    cdef double bits = 0
    cdef int byte
    for byte in range(256):
        if counts[byte]:
            bits += counts[byte] * (_log2(n) - _log2(counts[byte]))
    return bits / n if n else 0


def entropy_of_sample(const uint8_t[::1] data not None):
    """Estimate the order-0 entropy in bits per byte from at most 4,096 bytes."""
    cdef Py_ssize_t size = data.shape[0]
    cdef uint32_t counts[256]
    cdef Py_ssize_t run, i, start
    cdef double bits
    if size == 0:
        return 0.0
    with nogil:
        memset(counts, 0, sizeof(counts))
        if size <= SAMPLE_RUNS * SAMPLE_RUN:
            for i in range(size):
                counts[data[i]] += 1
            bits = _entropy(counts, size)
        else:
            for run in range(SAMPLE_RUNS):
                start = (size - SAMPLE_RUN) * run // (SAMPLE_RUNS - 1)
                for i in range(start, start + SAMPLE_RUN):
                    counts[data[i]] += 1
            bits = _entropy(counts, SAMPLE_RUNS * SAMPLE_RUN)
    return bits


def entropy_of_planes(const uint8_t[::1] data not None, int width):
    """Return the order-0 entropy, in bits per byte, of each plane of a small sample."""
    if not 1 <= width <= PLANES_MAX or data.shape[0] % width:
        raise ValueError(f"{data.shape[0]} bytes are no records of {width} bytes")
    cdef Py_ssize_t n = data.shape[0] // width
    cdef uint32_t counts[PLANES_MAX][256]
    cdef double bits[PLANES_MAX]
    cdef Py_ssize_t i
    cdef int plane
    with nogil:
        memset(counts, 0, sizeof(counts))
        for i in range(n):
            for plane in range(width):
                counts[plane][data[i * width + plane]] += 1
        for plane in range(width):
            bits[plane] = _entropy(counts[plane], n)
    return [bits[plane] for plane in range(width)]


def entropy_of_numbers(const uint64_t[::1] numbers not None):
    """Estimate the order-0 entropy, in bits per byte, of each byte plane.

    At most 4,096 numbers are looked at, in runs of neighbours.

    Returns
    -------
    plain, delta : list of float
        That of the numbers, and that of the differences of neighbours; 8 each.
    """
    cdef Py_ssize_t n = numbers.shape[0]
    cdef Py_ssize_t n_runs = 1, size = n, run, start, i
    cdef uint32_t counts[2][8][256]
    cdef uint64_t number, delta
    cdef int plane
    if n > NUMBER_RUNS * NUMBER_RUN:
        n_runs, size = NUMBER_RUNS, NUMBER_RUN
    with nogil:
        memset(counts, 0, sizeof(counts))
        for run in range(n_runs):
            start = (n - size) * run // (n_runs - 1) if run else 0
            for i in range(start, start + size):
                number = numbers[i]
                for plane in range(8):
                    counts[0][plane][(number >> 8 * plane) & 0xFF] += 1
                if i == 0:
                    continue  # it has no neighbour before it
                delta = number - numbers[i - 1]
                for plane in range(8):
                    counts[1][plane][(delta >> 8 * plane) & 0xFF] += 1
    size *= n_runs
    return (
        [_entropy(counts[0][plane], size) for plane in range(8)],
        [_entropy(counts[1][plane], max(size - 1, 0)) for plane in range(8)],
    )


cdef inline bint _repeats(const uint8_t[::1] data, Py_ssize_t width) noexcept:
    cdef Py_ssize_t size = data.shape[0]
    return size <= width or memcmp(&data[0], &data[width], size - width) == 0


def repeats(const uint8_t[::1] data not None, Py_ssize_t width):
    """Return whether the first `width` bytes are repeated to the end."""
    cdef Py_ssize_t size = data.shape[0]
    if width < 1 or size % width:
        raise ValueError(f"{size} bytes are no records of {width} bytes")
    return _repeats(data, width)


def constant_of(const uint8_t[::1] data not None):
    """Return the one value of all bytes, or -1 if they differ or there are none."""
    return data[0] if data.shape[0] and _repeats(data, 1) else -1
