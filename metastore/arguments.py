"""Bad input is refused here, before a byte is written."""

from __future__ import annotations

import operator
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from metastore import _codec
from metastore.columns import Payload, Uint8s, Uint32s, Uint64s
from metastore.errors import shown_integer
from metastore.format import LENGTH_MAX

__all__ = ["integer_in", "payload_of_arrays"]


def integer_in(name: str, number: Any, low: int, high: int) -> int:
    """Return `number` as an int from `low` to `high`, or raise what fits."""
    if isinstance(number, bool):
        raise TypeError(f"{name} must be an integer, not a bool")
    try:
        result = operator.index(number)
    except TypeError:
        raise TypeError(
            f"{name} must be an integer, not {type(number).__name__}"
        ) from None
    if not low <= result <= high:
        raise ValueError(f"{name} must be from {low} to {high}, not {result}")
    return result


def _uint64s(name: str, array: Any) -> Uint64s:
    """Return a contiguous, aligned, native uint64 array of the same integers."""
    _refuse_masked(name, array)
    found = np.asarray(array)
    if found.dtype.kind in "fO" and _is_list_of_integers(array):
        return _uint64s_of_list(name, array)
    if found.size == 0 and not isinstance(array, np.ndarray):
        found = found.astype(np.uint64)  # an empty list has no type of its own
    if found.dtype.kind not in "ui":
        raise TypeError(f"{name} must be an array of integers, not {found.dtype}")
    if found.ndim != 1:
        raise ValueError(f"{name} must have one dimension, not {found.ndim}")
    if found.dtype.kind == "i" and found.size and int(found.min()) < 0:
        at = int(np.flatnonzero(found < 0)[0])
        raise OverflowError(f"{name}[{at}] is {int(found[at])}, outside 0 .. 2**64 - 1")
    return np.require(found, np.uint64, ["C_CONTIGUOUS", "ALIGNED"])


def _refuse_masked(name: str, array: Any) -> None:
    if np.ma.is_masked(array):
        raise ValueError(f"{name} has masked elements, and a store has no such thing")


def _is_list_of_integers(array: Any) -> bool:
    """Return whether numpy took for something else what is a list of integers.

    That is what it does where no type of its own holds all of them, and with those of
    2**63 and more beside smaller ones.
    """
    return isinstance(array, list | tuple) and all(
        isinstance(number, int | np.integer)
        and not isinstance(number, bool | np.timedelta64)
        for number in array
    )


def _uint64s_of_list(name: str, numbers: Sequence[Any]) -> Uint64s:
    for at, number in enumerate(map(int, numbers)):
        if not 0 <= number < 2**64:
            shown = shown_integer(number)
            raise OverflowError(f"{name}[{at}] is {shown}, outside 0 .. 2**64 - 1")
    return np.array(numbers, np.uint64)


def _bytes_of(user_data: Any) -> Uint8s:
    _refuse_masked("user_data", user_data)
    if isinstance(user_data, np.ndarray):
        found: npt.NDArray[Any] = user_data
        if found.dtype.itemsize != 1 or found.dtype.kind not in "uiSV":
            raise TypeError(f"user_data must be an array of uint8, not {found.dtype}")
        if found.ndim != 1:
            raise ValueError(f"user_data must have one dimension, not {found.ndim}")
        return np.ascontiguousarray(found).view(np.uint8)
    try:
        return np.frombuffer(user_data, dtype=np.uint8)
    except BufferError:
        raise ValueError("user_data must be contiguous") from None
    except (TypeError, AttributeError):
        raise TypeError(
            "user_data must be bytes-like or an array of uint8, "
            f"not {type(user_data).__name__}"
        ) from None


def payload_of_arrays(keys: Any, values: Any, offsets: Any, user_data: Any) -> Payload:
    """Check the arguments of ``insert_arrays`` and return them as a frame's columns.

    Keys and user data may be the caller's own arrays, that another thread changes
    meanwhile. What a check has accepted is no longer theirs: a frame that contradicts
    itself would be durable, and nothing behind it could be recovered.

    Raises
    ------
    TypeError, ValueError, OverflowError
        The message names the argument and, where there is one, the index.
    """
    checked_keys = _uint64s("keys", keys)
    n = len(checked_keys)
    checked_values = _uint64s("values", values)
    lengths, data = _lengths_and_user_data(n, offsets, user_data)
    if len(checked_values) != n:
        raise ValueError(f"{n} keys, but {len(checked_values)} values")
    if n > LENGTH_MAX:
        raise OverflowError(f"a batch of {n} records; the limit is 2**32 - 1")
    if len(data):
        checked_values = checked_values.copy()
        deleted = checked_values == 0
        if deleted.any():
            at = np.flatnonzero(deleted & (lengths != 0))
            if len(at):
                raise ValueError(
                    f"values[{int(at[0])}] is 0, which deletes, but it has user data"
                )
    return Payload(checked_keys, checked_values, lengths, data)


def _lengths_and_user_data(
    n: int, offsets: Any, user_data: Any
) -> tuple[Uint32s, Uint8s]:
    if offsets is None and user_data is None:
        return np.zeros(n, dtype=np.uint32), np.empty(0, dtype=np.uint8)
    if offsets is None or user_data is None:
        missing = "offsets" if offsets is None else "user_data"
        raise ValueError(
            f"offsets and user_data belong together, but {missing} is None"
        )
    checked = _uint64s("offsets", offsets)
    data = _bytes_of(user_data)
    if len(checked) != n + 1:
        raise ValueError(f"{n} keys need {n + 1} offsets, not {len(checked)}")
    try:
        lengths, size = _codec.lengths_between(checked)
    except ValueError:
        size = -1
    if size != len(data) or checked[0] != 0:
        raise _refusal(checked, data)
    return lengths, data


def _refusal(offsets: Uint64s, data: Uint8s) -> Exception:
    ascend = not np.any(offsets[1:] < offsets[:-1])
    if ascend and offsets[0] == 0 and offsets[-1] == len(data):
        longest = int(_codec.differences(offsets).max())
        return OverflowError(
            f"user data of {longest} bytes in one record; the limit is 2**32 - 1"
        )
    return ValueError(
        "offsets must start at 0, never descend, and end at the size of user_data "
        f"({len(data)} bytes)"
    )
