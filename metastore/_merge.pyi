import numpy as np
import numpy.typing as npt

_Uint64s = npt.NDArray[np.uint64]
_Int64s = npt.NDArray[np.int64]
_Uint32s = npt.NDArray[np.uint32]
_Uint8s = npt.NDArray[np.uint8]
_Columns = tuple[_Uint64s, _Uint64s, _Uint64s, _Uint8s]

__test__: dict[str, str]

def is_increasing(keys: _Uint64s) -> bool: ...
def histogram(keys: _Uint64s, shift: int, bits: int) -> _Int64s: ...
def varying_bits(keys: _Uint64s) -> int: ...
def scatter(
    keys: _Uint64s,
    first: int,
    shift: int,
    bits: int,
    positions: _Int64s,
    to_keys: _Uint64s,
    to_order: _Uint32s,
) -> None: ...
def sort_ranges(
    keys: _Uint64s,
    order: _Uint32s,
    spare_keys: _Uint64s,
    spare_order: _Uint32s,
    starts: _Int64s,
) -> None: ...
def keep_last(keys: _Uint64s, order: _Uint32s) -> int: ...
def gather_into(column: _Uint64s, order: _Uint32s, out: _Uint64s) -> None: ...
def gather_ends(offsets: _Uint64s, order: _Uint32s, ends: _Uint64s) -> None: ...
def gather_bytes_into(
    offsets: _Uint64s, user_data: _Uint8s, order: _Uint32s, out: _Uint8s
) -> None: ...
def common_length(offsets: _Uint64s) -> int: ...
def merge_size(
    old_keys: _Uint64s,
    old_offsets: _Uint64s,
    keys: _Uint64s,
    values: _Uint64s,
    offsets: _Uint64s,
) -> tuple[int, int]: ...
def merge_into(old: _Columns, new: _Columns, out: _Columns, base: int) -> None: ...
