from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Final

import numpy as np
import numpy.typing as npt

_Uint64s = npt.NDArray[np.uint64]
_Uint32s = npt.NDArray[np.uint32]
_Uint8s = npt.NDArray[np.uint8]
_Bytes = bytes | bytearray | memoryview | _Uint8s
_Buffer = _Bytes | _Uint32s | _Uint64s
_Decompress = Callable[[memoryview, int], bytes | None]

__test__: dict[str, str]

SCAN_MORE: Final[int]
SCAN_NO_BYTES: Final[int]
SCAN_INCOMPLETE: Final[int]
SCAN_SEALED: Final[int]
STATUS_BAD_HEADER: Final[int]
STATUS_BAD_PAYLOAD: Final[int]
STATUS_BAD_SEQUENCE: Final[int]
STATUS_BAD_KIND: Final[int]
REASONS: Final[Mapping[int, str]]

FRAME_HEADER_SIZE: Final[int]
KIND_BATCH: Final[int]
KIND_BLOCK: Final[int]
KIND_END: Final[int]
LAYOUT_PLAIN: Final[int]
LAYOUT_PACKED: Final[int]
PACKED_SIZE_MAX: Final[int]
PACKED_RATIO_MAX: Final[int]
ENCODING_CONSTANT: Final[int]
ENCODING_RAW: Final[int]
ENCODING_ZSTD: Final[int]
FILTER_NONE: Final[int]
FILTER_DELTA: Final[int]
STRIDE_MAX: Final[int]

ROW_OFFSET: Final[int]
ROW_PAYLOAD_SIZE: Final[int]
ROW_RECORDS: Final[int]
ROW_USER_DATA_SIZE: Final[int]
ROW_LAYOUT: Final[int]
ROW_CHECKSUM: Final[int]
ROW_COLUMNS: Final[int]

def crc32c(data: _Bytes, value: int = 0) -> int: ...
def crc32c_table(data: _Bytes, value: int = 0) -> int: ...
def finish_frame(frame: bytearray, seed: int, sequence: int, durable: int) -> None: ...
def encode_batch(batch: Iterable[Any]) -> bytearray: ...
def encode_payload(
    kind: int,
    layout: int,
    n: int,
    user_data_size: int,
    payload: Sequence[_Buffer],
    room: bytearray | None = None,
) -> bytearray: ...
def scan_frames(
    data: _Bytes,
    offset: int,
    seed: int,
    sequence: int,
    table: _Uint64s,
    snapshot: bool = False,
) -> tuple[int, int, int]: ...
def totals(table: _Uint64s) -> tuple[int, int]: ...
def frame_size(data: _Bytes, offset: int) -> int: ...
def find_durable(data: _Bytes, offset: int, seed: int, sequence: int) -> int: ...
def decode_frames(
    data: _Bytes,
    table: _Uint64s,
    keys: _Uint64s,
    values: _Uint64s,
    ends: _Uint64s,
    user_data: _Uint8s,
    base: int,
    decompress: _Decompress,
) -> tuple[int, int]: ...
def check_payload(data: _Bytes, row: _Uint64s) -> bool: ...
def first_disorder(keys: _Uint64s, values: _Uint64s) -> int: ...
def split_planes(data: _Uint8s, width: int) -> _Uint8s: ...
def lengths_between(offsets: _Uint64s) -> tuple[_Uint32s, int]: ...
def differences(numbers: _Uint64s) -> _Uint64s: ...
def entropy_of_sample(data: _Uint8s) -> float: ...
def entropy_of_planes(data: _Uint8s, width: int) -> list[float]: ...
def entropy_of_numbers(numbers: _Uint64s) -> tuple[list[float], list[float]]: ...
def repeats(data: _Uint8s, width: int) -> bool: ...
def constant_of(data: _Uint8s) -> int: ...
