"""Order among records: sort by key, last record wins, gather, merge.

A leaf like ``_codec``: arrays in, arrays out. All columns have the shapes of
``metastore.columns.Columns``: keys and values uint64 (n,), offsets uint64 (n + 1,) and
user data uint8 (offsets[n],). Functions release the GIL for their loops and are
thread-safe; offsets that do not ascend, or go beyond the user data, were refused by
``_codec.lengths_between`` or by decoding, and are trusted.
"""

from libc.stdint cimport int64_t, uint8_t, uint32_t, uint64_t
from libc.string cimport memcpy, memset

import numpy as np

cdef extern from *:
    """
    #define ms_clz(x) __builtin_clzll(x)
    #define ms_prefetch(at) __builtin_prefetch(at)
    """
    int clz "ms_clz"(uint64_t) nogil
    void prefetch "ms_prefetch"(const void*) nogil

cdef enum:
    DIGIT_BITS = 11
    BUCKETS_MAX = 1 << DIGIT_BITS
    INSERTION_MAX = 24      # fewer keys are sorted by insertion
    KEYS_PER_BUCKET = 4     # what a digit is chosen for
    AHEAD = 16              # records that a gather fetches ahead
    INCREASING_RUN = 4096   # keys compared before one that descends ends it


def is_increasing(const uint64_t[::1] keys not None):
    """Return whether each key is greater than the one before."""
    cdef Py_ssize_t n = keys.shape[0]
    cdef Py_ssize_t i, start = 1
    cdef bint bad = False
    with nogil:
        while start < n and not bad:  # in runs without a branch
            for i in range(start, min(start + INCREASING_RUN, n)):
                bad |= keys[i] <= keys[i - 1]
            start += INCREASING_RUN
    return not bad


def histogram(const uint64_t[::1] keys not None, int shift, int bits):
    """Count how often each value of ``(key >> shift) & (2**bits - 1)`` occurs.

    Returns
    -------
    ndarray of int64, shape (2**bits,)
    """
    _check_digit(shift, bits)
    result = np.zeros(1 << bits, dtype=np.int64)
    cdef int64_t[::1] counts = result
    cdef uint64_t mask = (<uint64_t>1 << bits) - 1
    cdef Py_ssize_t i
    with nogil:
        for i in range(keys.shape[0]):
            counts[(keys[i] >> shift) & mask] += 1
    return result


def varying_bits(const uint64_t[::1] keys not None):
    """Return the bits in which the keys differ, as one integer."""
    cdef uint64_t bits = 0
    cdef Py_ssize_t i
    with nogil:
        for i in range(keys.shape[0]):
            bits |= keys[i] ^ keys[0]
    return bits


def scatter(
    const uint64_t[::1] keys not None,
    uint32_t first,
    int shift,
    int bits,
    int64_t[::1] positions not None,
    uint64_t[::1] to_keys not None,
    uint32_t[::1] to_order not None,
):
    """Move keys, in order, to where their digit's next position says.

    Parameters
    ----------
    keys : ndarray of uint64, shape (n,)
        A part of the keys.
    first : int
        The index of ``keys[0]`` among all keys; `to_order` receives such indexes.
    shift, bits : int
        The digit: see :func:`histogram`.
    positions : ndarray of int64, shape (2**bits,)
        Where the next key of each digit goes; changed.
    to_keys, to_order : ndarray of uint64 and uint32
        Filled at those positions.
    """
    cdef Py_ssize_t n = keys.shape[0], size = to_keys.shape[0]
    cdef uint64_t mask = (<uint64_t>1 << bits) - 1
    cdef Py_ssize_t i, at
    cdef uint64_t digit
    cdef bint bad = False
    _check_digit(shift, bits)
    if positions.shape[0] != 1 << bits or to_order.shape[0] != size:
        raise ValueError("the arrays do not match")
    with nogil:
        for i in range(n):
            digit = (keys[i] >> shift) & mask
            at = positions[digit]
            if at < 0 or at >= size:
                bad = True
                break
            positions[digit] = at + 1
            to_keys[at] = keys[i]
            to_order[at] = first + i
    if bad:
        raise IndexError("a position is outside the arrays")


cdef int _check_digit(int shift, int bits) except -1:
    if not (0 <= shift < 64 and 1 <= bits <= 16):
        raise ValueError(f"no digit of {bits} bits at bit {shift}")
    return 0


def sort_ranges(
    uint64_t[::1] keys not None,
    uint32_t[::1] order not None,
    uint64_t[::1] spare_keys not None,
    uint32_t[::1] spare_order not None,
    const int64_t[::1] starts not None,
):
    """Sort each range between two `starts` by itself, stably, in place.

    The spare arrays are scratch; each is at least as long as the longest range.
    """
    cdef Py_ssize_t n = keys.shape[0]
    cdef Py_ssize_t n_spare = min(spare_keys.shape[0], spare_order.shape[0])
    cdef Py_ssize_t i, start, stop
    if order.shape[0] != n:
        raise ValueError("the arrays do not match")
    for i in range(starts.shape[0]):
        start = starts[i - 1] if i else 0
        if starts[i] < start or starts[i] > n:
            raise IndexError("a range is outside the arrays")
        if i and starts[i] - start > n_spare:
            raise ValueError("a range is longer than the spare arrays")
    with nogil:
        for i in range(starts.shape[0] - 1):
            start, stop = starts[i], starts[i + 1]
            if stop - start > 1:
                _sort(
                    &keys[start], &order[start], &spare_keys[0],
                    &spare_order[0], stop - start, True,
                )


cdef void _sort(
    uint64_t* keys, uint32_t* order, uint64_t* spare_keys, uint32_t* spare_order,
    Py_ssize_t n, bint stay
) noexcept nogil:
    """Sort by the highest digit that varies, then each digit's keys by themselves.

    The result goes back to `keys` if `stay`, else to `spare_keys`.
    """
    cdef uint32_t counts[BUCKETS_MAX + 1]
    cdef uint64_t varying = 0
    cdef uint64_t mask
    cdef Py_ssize_t i, start, stop
    cdef int bits = 1, shift, high
    if n <= INSERTION_MAX:
        _insertion_sort(keys, order, n)
    else:
        for i in range(n):
            varying |= keys[i] ^ keys[0]
    if varying == 0:
        if not stay:
            memcpy(spare_keys, keys, n * sizeof(uint64_t))
            memcpy(spare_order, order, n * sizeof(uint32_t))
        return
    high = 64 - clz(varying)
    while bits < DIGIT_BITS and (n >> bits) > KEYS_PER_BUCKET:
        bits += 1
    bits = min(bits, high)
    shift = high - bits
    mask = (<uint64_t>1 << bits) - 1
    memset(counts, 0, ((1 << bits) + 1) * sizeof(uint32_t))
    for i in range(n):
        counts[((keys[i] >> shift) & mask) + 1] += 1
    for i in range(1 << bits):
        counts[i + 1] += counts[i]
    for i in range(n):
        start = (keys[i] >> shift) & mask
        stop = counts[start]
        counts[start] = stop + 1
        spare_keys[stop] = keys[i]
        spare_order[stop] = order[i]
    start = 0
    for i in range(1 << bits):  # each count is now the end of its keys
        stop = counts[i]
        if stop > start:
            _sort(
                spare_keys + start, spare_order + start, keys + start, order + start,
                stop - start, not stay,
            )
        start = stop


cdef void _insertion_sort(uint64_t* keys, uint32_t* order, Py_ssize_t n) noexcept nogil:
    cdef Py_ssize_t i, j
    cdef uint64_t key
    cdef uint32_t place
    for i in range(1, n):
        key = keys[i]
        place = order[i]
        j = i
        while j > 0 and keys[j - 1] > key:
            keys[j] = keys[j - 1]
            order[j] = order[j - 1]
            j -= 1
        keys[j] = key
        order[j] = place


def keep_last(uint64_t[::1] keys not None, uint32_t[::1] order not None):
    """Of equal neighbours keep the last, in place; return how many stay."""
    cdef Py_ssize_t n = keys.shape[0]
    cdef Py_ssize_t i, m = 0
    if order.shape[0] != n:
        raise ValueError("the arrays do not match")
    with nogil:
        for i in range(n):
            keys[m] = keys[i]
            order[m] = order[i]
            m += i + 1 == n or keys[i + 1] != keys[i]
    return m


cdef int _check_order(const uint32_t[::1] order, uint64_t size) except -1:
    cdef Py_ssize_t i
    cdef uint32_t greatest = 0
    with nogil:
        for i in range(order.shape[0]):
            greatest = max(greatest, order[i])
    if order.shape[0] and greatest >= size:
        raise IndexError("the order goes beyond the records")
    return 0


def gather_into(
    const uint64_t[::1] column not None,
    const uint32_t[::1] order not None,
    uint64_t[::1] out not None,
):
    """Write ``column[order]`` to `out`."""
    cdef Py_ssize_t n = order.shape[0]
    cdef Py_ssize_t i
    _check_order(order, column.shape[0])
    if out.shape[0] != n:
        raise ValueError("the arrays do not match")
    with nogil:
        for i in range(n):
            if i + AHEAD < n:
                prefetch(&column[order[i + AHEAD]])
            out[i] = column[order[i]]


def gather_ends(
    const uint64_t[::1] offsets not None,
    const uint32_t[::1] order not None,
    uint64_t[::1] ends not None,
):
    """Write where each record of `order` ends when they stand back to back from 0."""
    cdef Py_ssize_t n = order.shape[0]
    cdef uint64_t total = 0
    cdef Py_ssize_t i
    _check_order(order, offsets.shape[0] - 1)
    if ends.shape[0] != n:
        raise ValueError("the arrays do not match")
    with nogil:
        for i in range(n):
            if i + AHEAD < n:
                prefetch(&offsets[order[i + AHEAD]])
            total += offsets[order[i] + 1] - offsets[order[i]]
            ends[i] = total


def gather_bytes_into(
    const uint64_t[::1] offsets not None,
    const uint8_t[::1] user_data not None,
    const uint32_t[::1] order not None,
    uint8_t[::1] out not None,
):
    """Write the user data of the records of `order` to `out`, back to back."""
    cdef Py_ssize_t n = order.shape[0]
    cdef uint64_t at = 0, size = out.shape[0]
    cdef uint64_t start, length
    cdef Py_ssize_t i
    cdef bint bad = False
    _check_order(order, offsets.shape[0] - 1)
    if <uint64_t>user_data.shape[0] < offsets[offsets.shape[0] - 1]:
        raise ValueError("offsets go beyond the user data")
    with nogil:
        for i in range(n):
            start = offsets[order[i]]
            length = offsets[order[i] + 1] - start
            if length > size - at:
                bad = True
                break
            if i + AHEAD < n:
                prefetch(&offsets[order[i + AHEAD]])
            if length == 8:  # the common size, without a call
                memcpy(&out[at], &user_data[start], 8)
            elif length:
                memcpy(&out[at], &user_data[start], length)
            at += length
    if bad or at != size:
        raise ValueError("the output has another size than the records")


def common_length(const uint64_t[::1] offsets not None):
    """Return the length of all records, or -1 if they differ or there are none."""
    cdef Py_ssize_t n = offsets.shape[0] - 1
    cdef Py_ssize_t i
    cdef uint64_t length
    cdef bint bad = False
    if n < 1:
        return -1
    length = offsets[1] - offsets[0]
    with nogil:
        for i in range(1, n + 1):
            bad |= offsets[i] - offsets[i - 1] != length
    return -1 if bad else length


cdef Py_ssize_t _lower_bound(
    const uint64_t* keys, Py_ssize_t low, Py_ssize_t n, uint64_t key
) noexcept nogil:
    """First position from `low` on whose key is not less; near ones are found fast."""
    cdef Py_ssize_t step = 1
    cdef Py_ssize_t high = low
    cdef Py_ssize_t middle
    while high < n and keys[high] < key:
        low = high + 1
        high += step
        step *= 2
    if high > n:
        high = n
    while low < high:
        middle = low + (high - low) // 2
        if keys[middle] < key:
            low = middle + 1
        else:
            high = middle
    return low


def merge_size(
    const uint64_t[::1] old_keys not None,
    const uint64_t[::1] old_offsets not None,
    const uint64_t[::1] keys not None,
    const uint64_t[::1] values not None,
    const uint64_t[::1] offsets not None,
):
    """Return records and user data size of what :func:`merge_into` writes."""
    cdef Py_ssize_t n_old = old_keys.shape[0], n = keys.shape[0]
    cdef Py_ssize_t i, at = 0
    cdef Py_ssize_t n_out = n_old
    cdef uint64_t user_data_size
    if (
        old_offsets.shape[0] != n_old + 1
        or offsets.shape[0] != n + 1
        or values.shape[0] != n
    ):
        raise ValueError("columns do not match")
    user_data_size = old_offsets[n_old] - old_offsets[0] + offsets[n] - offsets[0]
    with nogil:
        for i in range(n):
            if n_old:
                at = _lower_bound(&old_keys[0], at, n_old, keys[i])
            if at < n_old and old_keys[at] == keys[i]:
                user_data_size -= old_offsets[at + 1] - old_offsets[at]
                n_out -= 1
            n_out += values[i] != 0
    return n_out, user_data_size


cdef struct Out:
    uint64_t* keys
    uint64_t* values
    uint64_t* ends          # NULL: not wanted, since no record has user data
    uint8_t* user_data
    uint64_t base
    Py_ssize_t n_left       # room for so many records,
    uint64_t size_left      # and so many bytes of user data


cdef inline bint _copy_range(
    const uint64_t* keys, const uint64_t* values, const uint64_t* offsets,
    const uint8_t* user_data, Py_ssize_t n, Out* out
) noexcept nogil:
    """Append `n` records, the first at the pointers; return whether there is room."""
    cdef uint64_t shift, size
    cdef Py_ssize_t i
    if n == 0:
        return True
    shift = out.base - offsets[0]
    size = offsets[n] - offsets[0]
    if n > out.n_left or size > out.size_left:
        return False
    memcpy(out.keys, keys, 8 * n)
    memcpy(out.values, values, 8 * n)
    if out.ends != NULL:
        for i in range(n):
            out.ends[i] = offsets[i + 1] + shift
        out.ends += n
    if size:
        memcpy(out.user_data, user_data + offsets[0], size)
    out.keys += n
    out.values += n
    out.user_data += size
    out.base += size
    out.n_left -= n
    out.size_left -= size
    return True


def merge_into(
    old not None, new not None, out not None, uint64_t base
):
    """Merge sorted records into prepared columns; `new` wins, its tombstones delete.

    Parameters
    ----------
    old, new : tuple of (keys, values, offsets, user_data)
        Both sorted by strictly increasing key; a value of 0 in `new` deletes.
    out : tuple of (keys, values, ends, user_data)
        Writable, of the sizes from :func:`merge_size` to the record and the byte;
        `ends` has no leading 0, and may be empty if there is no user data.
    base : int
        Added to all of `ends`: the offset of the first user data byte.
    """
    cdef const uint64_t[::1] old_keys = old[0]
    cdef const uint64_t[::1] old_values = old[1]
    cdef const uint64_t[::1] old_offsets = old[2]
    cdef const uint8_t[::1] old_data = old[3]
    cdef const uint64_t[::1] keys = new[0]
    cdef const uint64_t[::1] values = new[1]
    cdef const uint64_t[::1] offsets = new[2]
    cdef const uint8_t[::1] data = new[3]
    cdef uint64_t[::1] out_keys = out[0]
    cdef uint64_t[::1] out_values = out[1]
    cdef uint64_t[::1] out_ends = out[2]
    cdef uint8_t[::1] out_data = out[3]
    if (
        old_values.shape[0] != old_keys.shape[0]
        or old_offsets.shape[0] != old_keys.shape[0] + 1
        or values.shape[0] != keys.shape[0]
        or offsets.shape[0] != keys.shape[0] + 1
        or out_values.shape[0] != out_keys.shape[0]
        or (out_ends.shape[0] != out_keys.shape[0]
            and (out_ends.shape[0] or out_data.shape[0]))
        or <uint64_t>old_data.shape[0] < old_offsets[old_keys.shape[0]]
        or <uint64_t>data.shape[0] < offsets[keys.shape[0]]
    ):
        raise ValueError("columns do not match")
    cdef Out to
    cdef Py_ssize_t n_old = old_keys.shape[0], n = keys.shape[0]
    cdef Py_ssize_t i, low = 0, high = 0
    cdef const uint64_t* old_key = &old_keys[0] if n_old else NULL
    cdef const uint64_t* old_value = &old_values[0] if n_old else NULL
    cdef const uint8_t* old_bytes = &old_data[0] if old_data.shape[0] else NULL
    cdef const uint8_t* new_bytes = &data[0] if data.shape[0] else NULL
    to.keys = &out_keys[0] if out_keys.shape[0] else NULL
    to.values = &out_values[0] if out_keys.shape[0] else NULL
    to.ends = &out_ends[0] if out_ends.shape[0] else NULL
    to.user_data = &out_data[0] if out_data.shape[0] else NULL
    to.base = base
    to.n_left = out_keys.shape[0]
    to.size_left = out_data.shape[0]
    cdef bint fits = True
    with nogil:
        for i in range(n):
            if n_old:
                high = _lower_bound(old_key, low, n_old, keys[i])
            fits = _copy_range(
                old_key + low, old_value + low, &old_offsets[low], old_bytes,
                high - low, &to
            )
            low = high + (high < n_old and old_key[high] == keys[i])
            if fits and values[i]:
                fits = _copy_range(
                    &keys[i], &values[i], &offsets[i], new_bytes, 1, &to
                )
            if not fits:
                break
        fits = fits and _copy_range(
            old_key + low, old_value + low, &old_offsets[low], old_bytes,
            n_old - low, &to
        )
    if not fits or to.n_left or to.size_left:
        raise ValueError("columns do not match: not of the sizes that merge_size tells")
