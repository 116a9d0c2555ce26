"""What one run of the benchmarks was asked for, and the stores its cases start from."""

from __future__ import annotations

import dataclasses
import itertools
import os
import shutil
from collections.abc import Callable
from typing import TypeVar

from benchmarks import data
from benchmarks.ancestor import Ancestor
from benchmarks.data import Arrays
from benchmarks.measure import isolated, linked, unchanged
from benchmarks.peers import PEERS, Metastore, Peer

__all__ = ["NO_ROTATION", "Settings"]

T = TypeVar("T")

#: As `log_size_bytes_min`: keeps rotation, and with it compaction, out of a case.
NO_ROTATION = 1 << 50
_CHUNK_RECORDS = 1_000_000
#: Records between two compactions while a large store is made.
_COMPACT_RECORDS = 20_000_000
_N_MIN = 100

_numbers = itertools.count()


@dataclasses.dataclass(frozen=True)
class Settings:
    """Options of the command line, as each case's process gets them."""

    directory: str
    repeat: int
    scale: float
    ancestor_binary: str | None
    peer_modules: tuple[str, ...]
    large: bool

    def n(self, number: int) -> int:
        """Return a number of records, batches or commits at our scale."""
        return max(_N_MIN, round(number * self.scale))

    @property
    def ancestor(self) -> Ancestor | None:
        """The ancestor, if it is to be measured."""
        return Ancestor(self.ancestor_binary) if self.ancestor_binary else None

    @property
    def peers(self) -> list[type[Peer]]:
        """The peers to measure beside us."""
        return [peer for peer in PEERS if peer.module in self.peer_modules]

    def scratch(self) -> str:
        """Return a path for a new file or directory of this case."""
        folder = os.path.join(self.directory, "scratch")
        os.makedirs(folder, exist_ok=True)
        return os.path.join(folder, f"{os.getpid()}-{next(_numbers)}")

    def with_scratch(self, function: Callable[[str], T]) -> T:
        """Call `function` with the path of a directory that does not exist yet."""
        path = self.scratch()
        try:
            return function(path)
        finally:
            shutil.rmtree(path, ignore_errors=True)

    def with_copy(self, fixture: str, function: Callable[[str], T]) -> T:
        """Call `function` with the path of a fresh copy of a fixture."""

        def run(path: str) -> T:
            marks = linked(fixture, path)
            result = function(path)
            unchanged(marks)
            return result

        return self.with_scratch(run)

    def fixture(self, name: str, make: Callable[[str], object]) -> str:
        """Return a directory that `make` filled in this or an earlier case."""
        path = os.path.join(self.directory, "fixtures", name)
        if not os.path.exists(path):
            part = f"{path}.part"
            shutil.rmtree(part, ignore_errors=True)
            os.makedirs(os.path.dirname(path), exist_ok=True)
            isolated(make, part)
            os.rename(part, path)
        return path

    def snapshot(self, n_records: int, user_data_size: int) -> str:
        """Return a store of ours that is one snapshot."""
        return self.fixture(
            f"snapshot-{n_records}-{user_data_size}",
            lambda path: _make_snapshot(path, n_records, user_data_size),
        )

    def log(
        self, n_records: int, batch_records: int, user_data_size: int, *, sealed: bool
    ) -> str:
        """Return a store of ours that is one log, left by a shutdown or by a kill."""
        return self.fixture(
            f"log-{n_records}-{batch_records}-{user_data_size}-{sealed}",
            lambda path: _make_log(
                path, n_records, batch_records, user_data_size, sealed
            ),
        )

    def peer_store(self, peer: type[Peer], n_records: int) -> str:
        """Return a store of a peer with 8 bytes of user data in every record."""
        if peer is Metastore:
            return self.snapshot(n_records, 8)
        name = "".join(filter(str.isalnum, peer.name))
        return self.fixture(
            f"{name}-{n_records}", lambda path: _fill_peer(path, peer, n_records)
        )

    def drop_fixtures(self) -> None:
        """Remove every fixture, to give the disk back."""
        shutil.rmtree(os.path.join(self.directory, "fixtures"), ignore_errors=True)


def _make_snapshot(path: str, n_records: int, user_data_size: int) -> None:
    from metastore import MetadataStore

    store, _ = MetadataStore.recover(path, log_size_bytes_min=NO_ROTATION)
    uncompacted = 0
    for part in data.chunks(n_records, _CHUNK_RECORDS, user_data_size):
        insert_arrays(store, part)
        uncompacted += len(part.keys)
        if uncompacted >= _COMPACT_RECORDS:
            store.compact()
            uncompacted = 0
    store.compact()
    store.shutdown()


def insert_arrays(store: object, part: Arrays, *, sync: bool = True) -> None:
    """Insert columns into a store of ours."""
    store.insert_arrays(  # type: ignore[attr-defined]  # imported in children only
        part.keys, part.values, part.offsets, part.user_data, sync=sync
    )


def _make_log(
    path: str, n_records: int, batch_records: int, user_data_size: int, sealed: bool
) -> None:
    from metastore import MetadataStore

    store, _ = MetadataStore.recover(path, log_size_bytes_min=NO_ROTATION)
    for part in data.chunks(n_records, _CHUNK_RECORDS, user_data_size):
        if batch_records == 1:
            for record in part.tuples():
                store.insert_batch([record], sync=False)
            continue
        for start in range(0, len(part.keys), batch_records):
            batch = part.slice(start, start + batch_records)
            insert_arrays(store, batch, sync=False)
    store.sync()
    if sealed:
        store.shutdown()


def _fill_peer(path: str, peer: type[Peer], n_records: int) -> None:
    """Fill in the order of the keys, which every peer likes best."""
    store = peer(path)
    all_sorted = data.records(0, n_records, 8).sorted()
    for start in range(0, n_records, _CHUNK_RECORDS):
        store.commit_arrays(all_sorted.slice(start, start + _CHUNK_RECORDS))
    store.close()
