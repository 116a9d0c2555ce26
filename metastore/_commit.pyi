from collections.abc import Callable

from typing_extensions import disjoint_base

from metastore.directory import FileProtocol
from metastore.errors import MetastoreError

__test__: dict[str, str]

@disjoint_base
class Tail:
    def __init__(
        self,
        file: FileProtocol,
        path: str,
        seed: int,
        sequence: int,
        size: int,
        zeroed_size: int,
    ) -> None: ...
    @property
    def sequence(self) -> int: ...
    @property
    def size(self) -> int: ...
    @property
    def failure(self) -> BaseException | None: ...
    def seal(self, end: bytearray) -> None: ...

@disjoint_base
class GroupCommit:
    tail: Tail
    size_max: int
    def __init__(
        self,
        tail: Tail,
        on_failure: Callable[[BaseException], None],
        failed: Callable[[], MetastoreError],
        rotate: Callable[[], None],
    ) -> None: ...
    @property
    def is_open(self) -> bool: ...
    @property
    def is_led_here(self) -> bool: ...
    @property
    def durable(self) -> int: ...
    @property
    def n_batches(self) -> int: ...
    @property
    def n_writes(self) -> int: ...
    @property
    def n_syncs(self) -> int: ...
    @property
    def n_waiting(self) -> int: ...
    def close(self) -> None: ...
    def commit(self, frame: bytearray | None, sync: bool) -> int: ...
    def exclusively(self, action: Callable[[], None]) -> None: ...
    def sync_now(self) -> None: ...
