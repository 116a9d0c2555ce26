"""Order among records: sort by key, last record wins, gather, merge.

A leaf like ``_codec``: arrays in, arrays out. All columns have the shapes of
``metastore.columns.Columns``: keys and values uint64 (n,), offsets uint64 (n + 1,) and
user data uint8 (offsets[n],). Functions release the GIL for their loops and are
thread-safe; offsets that do not ascend, or go beyond the user data, are refused by
``check_offsets`` and otherwise trusted.
"""

from libc.stdint cimport uint8_t, uint32_t, uint64_t
from libc.string cimport memcpy

import numpy as np

cdef enum:
    DIGIT_BITS = 11
    DIGITS = 6              # of 11 bits in 64
    BUCKETS = 1 << DIGIT_BITS


def check_offsets(const uint64_t[::1] offsets not None, uint64_t user_data_size):
    """Return whether `offsets` go from 0 to `user_data_size` and never descend."""
    cdef Py_ssize_t n = offsets.shape[0]
    cdef Py_ssize_t i
    cdef bint bad = False
    if n == 0:
        return False
    with nogil:
        bad = offsets[0] != 0 or offsets[n - 1] != user_data_size
        for i in range(1, n):
            bad |= offsets[i] < offsets[i - 1]
    return not bad


def is_increasing(const uint64_t[::1] keys not None):
    """Return whether each key is greater than the one before."""
    cdef Py_ssize_t n = keys.shape[0]
    cdef Py_ssize_t i
    cdef bint bad = False
    with nogil:
        for i in range(1, n):
            bad |= keys[i] <= keys[i - 1]
    return not bad


def sort_last_wins(const uint64_t[::1] keys not None):
    """Sort keys; of equal ones the last stays.

    A stable radix sort from the least digit up; digits that all keys share cost
    nothing but their count.

    Parameters
    ----------
    keys : ndarray of uint64, shape (n,)

    Returns
    -------
    sorted_keys : ndarray of uint64, shape (m,)
        The distinct keys, ascending.
    order : ndarray of uint32, shape (m,)
        Where in `keys` each of them stood last.
    """
    cdef Py_ssize_t n = keys.shape[0]
    if <uint64_t>n > 0xFFFFFFFFu:
        raise OverflowError(f"cannot sort {n} records at once; the limit is 2**32 - 1")
    key_buffers = np.empty((2, n), dtype=np.uint64)
    order_buffers = np.empty((2, n), dtype=np.uint32)
    counts_buffer = np.zeros((DIGITS, BUCKETS), dtype=np.uint64)
    cdef uint64_t[:, ::1] key_rows = key_buffers
    cdef uint32_t[:, ::1] order_rows = order_buffers
    cdef uint64_t[:, ::1] counts = counts_buffer
    cdef Py_ssize_t m
    cdef int side
    if n == 0:
        return key_buffers[0], order_buffers[0]
    with nogil:
        side = _radix_sort(keys, key_rows, order_rows, counts)
        m = _keep_last(&key_rows[side, 0], &order_rows[side, 0], n)
    # Copies, so that the buffers' other halves do not live on.
    return key_buffers[side, :m].copy(), order_buffers[side, :m].copy()


cdef int _radix_sort(
    const uint64_t[::1] keys, uint64_t[:, ::1] key_rows, uint32_t[:, ::1] order_rows,
    uint64_t[:, ::1] counts
) noexcept nogil:
    """Return which of the two rows holds the result."""
    cdef Py_ssize_t n = keys.shape[0]
    cdef Py_ssize_t i
    cdef uint64_t key, total, count
    cdef int digit, bucket
    cdef int side = 0
    for i in range(n):
        key = keys[i]
        key_rows[0, i] = key
        order_rows[0, i] = i
        for digit in range(DIGITS):
            counts[digit, (key >> (DIGIT_BITS * digit)) & (BUCKETS - 1)] += 1
    for digit in range(DIGITS):
        key = (keys[0] >> (DIGIT_BITS * digit)) & (BUCKETS - 1)
        if counts[digit, key] == <uint64_t>n:
            continue
        total = 0
        for bucket in range(BUCKETS):
            count = counts[digit, bucket]
            counts[digit, bucket] = total
            total += count
        _scatter(
            &key_rows[side, 0], &order_rows[side, 0],
            &key_rows[1 - side, 0], &order_rows[1 - side, 0],
            &counts[digit, 0], n, DIGIT_BITS * digit,
        )
        side = 1 - side
    return side


cdef void _scatter(
    const uint64_t* keys, const uint32_t* order, uint64_t* to_keys, uint32_t* to_order,
    uint64_t* positions, Py_ssize_t n, int shift
) noexcept nogil:
    cdef Py_ssize_t i
    cdef uint64_t key, at
    cdef uint64_t* position
    for i in range(n):
        key = keys[i]
        position = &positions[(key >> shift) & (BUCKETS - 1)]
        at = position[0]
        position[0] = at + 1
        to_keys[at] = key
        to_order[at] = order[i]


cdef Py_ssize_t _keep_last(
    uint64_t* keys, uint32_t* order, Py_ssize_t n
) noexcept nogil:
    cdef Py_ssize_t i, m = 0
    for i in range(n):
        keys[m] = keys[i]
        order[m] = order[i]
        m += i + 1 == n or keys[i + 1] != keys[i]
    return m


def gather(const uint64_t[::1] column not None, const uint32_t[::1] order not None):
    """Return ``column[order]``, uint64."""
    cdef Py_ssize_t n = order.shape[0]
    result = np.empty(n, dtype=np.uint64)
    cdef uint64_t[::1] out = result
    cdef uint64_t size = column.shape[0]
    cdef Py_ssize_t i
    cdef bint bad = False
    with nogil:
        for i in range(n):
            if order[i] >= size:
                bad = True
                break
            out[i] = column[order[i]]
    if bad:
        raise IndexError("order goes beyond the column")
    return result


def gather_user_data(
    const uint64_t[::1] offsets not None,
    const uint8_t[::1] user_data not None,
    const uint32_t[::1] order not None,
):
    """Return offsets and user data of the records in `order`."""
    cdef Py_ssize_t n = order.shape[0]
    cdef uint64_t size = offsets.shape[0] - 1
    new_offsets = np.empty(n + 1, dtype=np.uint64)
    cdef uint64_t[::1] ends = new_offsets
    cdef uint64_t total = 0
    cdef Py_ssize_t i
    cdef bint bad = False
    ends[0] = 0
    with nogil:
        for i in range(n):
            if order[i] >= size:
                bad = True
                break
            total += offsets[order[i] + 1] - offsets[order[i]]
            ends[i + 1] = total
    if bad:
        raise IndexError("order goes beyond the columns")
    new_user_data = np.empty(total, dtype=np.uint8)
    cdef uint8_t[::1] out = new_user_data
    if total:
        with nogil:
            _gather_bytes(offsets, &user_data[0], order, ends, &out[0])
    return new_offsets, new_user_data


cdef void _gather_bytes(
    const uint64_t[::1] offsets, const uint8_t* user_data, const uint32_t[::1] order,
    const uint64_t[::1] ends, uint8_t* out
) noexcept nogil:
    cdef Py_ssize_t i
    cdef uint64_t length
    for i in range(order.shape[0]):
        length = ends[i + 1] - ends[i]
        if length == 8:  # the common size, without a call
            memcpy(out + ends[i], user_data + offsets[order[i]], 8)
        elif length:
            memcpy(out + ends[i], user_data + offsets[order[i]], length)


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
    uint64_t* ends
    uint8_t* user_data
    uint64_t base


cdef void _copy_range(
    const uint64_t* keys, const uint64_t* values, const uint64_t* offsets,
    const uint8_t* user_data, Py_ssize_t n, Out* out
) noexcept nogil:
    """Append `n` records; the pointers are those of the first of them."""
    cdef uint64_t shift = out.base - offsets[0]
    cdef uint64_t size = offsets[n] - offsets[0]
    cdef Py_ssize_t i
    if n == 0:
        return
    memcpy(out.keys, keys, 8 * n)
    memcpy(out.values, values, 8 * n)
    for i in range(n):
        out.ends[i] = offsets[i + 1] + shift
    if size:
        memcpy(out.user_data, user_data + offsets[0], size)
    out.keys += n
    out.values += n
    out.ends += n
    out.user_data += size
    out.base += size


def merge_into(
    old not None, new not None, out not None, uint64_t base
):
    """Merge sorted records into prepared columns; `new` wins, its tombstones delete.

    Parameters
    ----------
    old, new : tuple of (keys, values, offsets, user_data)
        Both sorted by strictly increasing key; a value of 0 in `new` deletes.
    out : tuple of (keys, values, ends, user_data)
        Writable, of the sizes from :func:`merge_size`; `ends` has no leading 0.
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
    n_out, size = merge_size(old_keys, old_offsets, keys, values, offsets)
    if (
        old_values.shape[0] != old_keys.shape[0]
        or out_keys.shape[0] != n_out
        or out_values.shape[0] != n_out
        or out_ends.shape[0] != n_out
        or out_data.shape[0] != size
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
    to.ends = &out_ends[0] if out_keys.shape[0] else NULL
    to.user_data = &out_data[0] if out_data.shape[0] else NULL
    to.base = base
    with nogil:
        for i in range(n):
            if n_old:
                high = _lower_bound(old_key, low, n_old, keys[i])
            _copy_range(
                old_key + low, old_value + low, &old_offsets[low], old_bytes,
                high - low, &to
            )
            low = high + (high < n_old and old_key[high] == keys[i])
            if values[i]:
                _copy_range(&keys[i], &values[i], &offsets[i], new_bytes, 1, &to)
        _copy_range(
            old_key + low, old_value + low, &old_offsets[low], old_bytes,
            n_old - low, &to
        )
