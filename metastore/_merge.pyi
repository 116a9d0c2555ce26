import numpy as np
import numpy.typing as npt

_Uint64s = npt.NDArray[np.uint64]
_Uint32s = npt.NDArray[np.uint32]
_Uint8s = npt.NDArray[np.uint8]
_Columns = tuple[_Uint64s, _Uint64s, _Uint64s, _Uint8s]

__test__: dict[str, str]

def check_offsets(offsets: _Uint64s, user_data_size: int) -> bool: ...
def is_increasing(keys: _Uint64s) -> bool: ...
def sort_last_wins(keys: _Uint64s) -> tuple[_Uint64s, _Uint32s]: ...
def gather(column: _Uint64s, order: _Uint32s) -> _Uint64s: ...
def gather_user_data(
    offsets: _Uint64s, user_data: _Uint8s, order: _Uint32s
) -> tuple[_Uint64s, _Uint8s]: ...
def merge_size(
    old_keys: _Uint64s,
    old_offsets: _Uint64s,
    keys: _Uint64s,
    values: _Uint64s,
    offsets: _Uint64s,
) -> tuple[int, int]: ...
def merge_into(old: _Columns, new: _Columns, out: _Columns, base: int) -> None: ...
