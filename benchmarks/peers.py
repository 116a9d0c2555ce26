"""The stores we measure beside ours, each as one small class, each durable at commit.

Adding a peer is: a subclass of :class:`Peer` with its five methods, and its name in
:data:`PEERS`. Each is given the fastest way that its Python binding offers to do what
is measured; where that way is a trick that its users would not come upon, its name
says so.
"""

from __future__ import annotations

import abc
import importlib.metadata
import importlib.util
import os
import threading
from collections.abc import Iterable
from typing import Any, ClassVar

import numpy as np

from benchmarks.data import Arrays
from benchmarks.measure import BenchmarkError

__all__ = ["PEERS", "Batch", "Metastore", "Peer", "find"]

#: What is committed at once, as `insert_batch` takes it.
Batch = list[tuple[int, tuple[int, bytes]]]

_MAP_SIZE = 1 << 37


class Peer(abc.ABC):
    """A store of records in a directory; opening creates it."""

    name: ClassVar[str]
    #: The module to import, which is also how the command line calls the peer.
    module: ClassVar[str]
    #: What installs the module, if that is called otherwise.
    distribution: ClassVar[str | None] = None
    #: Whether small commits and several threads make sense for it.
    commits: ClassVar[bool] = True

    def __init__(self, path: str) -> None:
        os.makedirs(path, exist_ok=True)
        self._api: Any = importlib.import_module(self.module)
        self._open(path)

    @abc.abstractmethod
    def _open(self, path: str) -> None:
        """Open the store in `path`, or create it."""

    @abc.abstractmethod
    def commit(self, batch: Batch) -> None:
        """Store a batch; durable on return. Called by many threads at once."""

    @abc.abstractmethod
    def commit_arrays(self, arrays: Arrays) -> None:
        """Store a large batch; durable on return."""

    @abc.abstractmethod
    def load(self) -> Arrays:
        """Return every record as arrays."""

    @abc.abstractmethod
    def close(self) -> None:
        """Shut the store down."""

    def batches_per_write(self) -> float:
        """Return how many commits shared a write; 1 if the store does not tell."""
        return 1

    @classmethod
    def installed_version(cls) -> str:
        """Return the version of the binding, and of the store where it is known."""
        return importlib.metadata.version(cls.distribution or cls.module)


class Metastore(Peer):
    """The store that this repository is about."""

    name = "metastore"
    module = "metastore"

    def _open(self, path: str) -> None:
        store, recovered = self._api.MetadataStore.recover(path)
        self._store, self._recovered = store, recovered

    def commit(self, batch: Batch) -> None:
        self._store.insert_batch(batch)

    def commit_arrays(self, arrays: Arrays) -> None:
        self._store.insert_arrays(
            arrays.keys, arrays.values, arrays.offsets, arrays.user_data
        )

    def load(self) -> Arrays:
        found = self._recovered
        return Arrays(found.keys, found.values, found.offsets, found.user_data)

    def close(self) -> None:
        self._store.shutdown()

    def batches_per_write(self) -> float:
        counts = self._store.stats()
        return float(counts.n_batches / counts.n_writes) if counts.n_writes else 1


# -- key-value stores: an 8-byte key that sorts as the number does, value || user data


def _pairs(arrays: Arrays) -> Iterable[tuple[bytes, bytes]]:
    """Return key and stored value of each record; all user data of one size."""
    n_records = len(arrays.keys)
    assert arrays.user_data is not None
    width = 8 + len(arrays.user_data) // n_records
    stored = np.empty((n_records, width), np.uint8)
    stored[:, :8] = arrays.values.astype("<u8").view(np.uint8).reshape(-1, 8)
    stored[:, 8:] = arrays.user_data.reshape(n_records, width - 8)
    keys = arrays.keys.astype(">u8").tobytes()
    values = stored.tobytes()
    return (
        (keys[8 * i : 8 * i + 8], values[width * i : width * (i + 1)])
        for i in range(n_records)
    )


def _batch_pairs(batch: Batch) -> Iterable[tuple[bytes, bytes]]:
    return (
        (key.to_bytes(8, "big"), value.to_bytes(8, "little") + user_data)
        for key, (value, user_data) in batch
    )


def _from_pairs(keys: list[bytes], stored: list[bytes]) -> Arrays:
    """Return arrays of what a cursor gave, for user data of any size."""
    n_records = len(keys)
    found_keys = np.frombuffer(b"".join(keys), ">u8").astype(np.uint64)
    lengths = np.fromiter(map(len, stored), np.uint64, n_records)
    ends = np.concatenate([[np.uint64(0)], np.cumsum(lengths, dtype=np.uint64)])
    offsets = ends - np.arange(n_records + 1, dtype=np.uint64) * np.uint64(8)
    joined = np.frombuffer(b"".join(stored), np.uint8)
    if n_records and int(lengths.min()) == int(lengths.max()):
        rows = joined.reshape(n_records, -1)
        values = np.ascontiguousarray(rows[:, :8]).view("<u8").reshape(-1)
        return Arrays(
            found_keys, values, offsets, np.ascontiguousarray(rows[:, 8:]).reshape(-1)
        )
    is_value = np.zeros(len(joined), bool)
    is_value[(ends[:-1, None] + np.arange(8, dtype=np.uint64)).reshape(-1)] = True
    return Arrays(found_keys, joined[is_value].view("<u8"), offsets, joined[~is_value])


class Lmdb(Peer):
    """A memory-mapped B+ tree; one writer at a time."""

    name = "LMDB"
    module = "lmdb"

    def _open(self, path: str) -> None:
        self._environment = self._api.open(path, map_size=_MAP_SIZE, max_dbs=1)

    def _put(self, pairs: Iterable[tuple[bytes, bytes]]) -> None:
        with self._environment.begin(write=True) as transaction:
            transaction.cursor().putmulti(pairs)

    def commit(self, batch: Batch) -> None:
        self._put(_batch_pairs(batch))

    def commit_arrays(self, arrays: Arrays) -> None:
        self._put(_pairs(arrays))

    def load(self) -> Arrays:
        keys: list[bytes] = []
        values: list[bytes] = []
        with self._environment.begin() as transaction:
            for key, value in transaction.cursor():
                keys.append(key)
                values.append(value)
        return _from_pairs(keys, values)

    def close(self) -> None:
        self._environment.close()

    @classmethod
    def installed_version(cls) -> str:
        api = importlib.import_module(cls.module)
        store = ".".join(map(str, api.version()))
        return f"{super().installed_version()} (LMDB {store})"


class LmdbDuplicates(Lmdb):
    """All records as the sorted, fixed-size duplicates of one key: read by the page."""

    name = "LMDB, fixed-size duplicates (a trick)"
    commits = False
    _width: ClassVar[int] = 24

    def _open(self, path: str) -> None:
        super()._open(path)
        self._table = self._environment.open_db(b"records", dupsort=True, dupfixed=True)

    def _put(self, pairs: Iterable[tuple[bytes, bytes]]) -> None:
        records = ((b"r", key + value) for key, value in pairs)
        with self._environment.begin(write=True, db=self._table) as transaction:
            transaction.cursor().putmulti(records)

    def load(self) -> Arrays:
        with self._environment.begin(db=self._table, buffers=True) as transaction:
            found = transaction.cursor().getmulti(
                [b"r"], dupdata=True, dupfixed_bytes=self._width, keyfixed=True
            )
            rows = np.frombuffer(found, np.uint8).reshape(-1, 1 + self._width)
            keys = np.ascontiguousarray(rows[:, 1:9]).view(">u8").astype(np.uint64)
            values = np.ascontiguousarray(rows[:, 9:17]).view("<u8")
            user_data = np.ascontiguousarray(rows[:, 17:])
        offsets = np.arange(len(keys) + 1, dtype=np.uint64) * np.uint64(8)
        return Arrays(
            keys.reshape(-1), values.reshape(-1), offsets, user_data.reshape(-1)
        )


class RocksDb(Peer):
    """A log-structured merge tree."""

    name = "RocksDB"
    module = "rocksdict"

    def _open(self, path: str) -> None:
        self._store = self._api.Rdict(path, self._api.Options(raw_mode=True))
        options = self._api.WriteOptions()
        options.sync = True
        self._store.set_write_options(options)

    def _put(self, pairs: Iterable[tuple[bytes, bytes]]) -> None:
        batch = self._api.WriteBatch(raw_mode=True)
        for key, value in pairs:
            batch.put(key, value)
        self._store.write(batch)

    def commit(self, batch: Batch) -> None:
        if len(batch) == 1:
            ((key, value),) = _batch_pairs(batch)
            self._store.put(key, value)
        else:
            self._put(_batch_pairs(batch))

    def commit_arrays(self, arrays: Arrays) -> None:
        self._put(_pairs(arrays))

    def load(self) -> Arrays:
        keys: list[bytes] = []
        values: list[bytes] = []
        for key, value in self._store.items():
            keys.append(key)
            values.append(value)
        return _from_pairs(keys, values)

    def close(self) -> None:
        self._store.close()


class LevelDb(Peer):
    """A log-structured merge tree, the older one; it groups commits of threads."""

    name = "LevelDB"
    module = "plyvel"

    def _open(self, path: str) -> None:
        self._store = self._api.DB(path, create_if_missing=True)

    def _put(self, pairs: Iterable[tuple[bytes, bytes]]) -> None:
        with self._store.write_batch(sync=True) as batch:
            for key, value in pairs:
                batch.put(key, value)

    def commit(self, batch: Batch) -> None:
        if len(batch) == 1:
            ((key, value),) = _batch_pairs(batch)
            self._store.put(key, value, sync=True)
        else:
            self._put(_batch_pairs(batch))

    def commit_arrays(self, arrays: Arrays) -> None:
        self._put(_pairs(arrays))

    def load(self) -> Arrays:
        keys: list[bytes] = []
        values: list[bytes] = []
        for key, value in self._store.iterator(fill_cache=False):
            keys.append(key)
            values.append(value)
        return _from_pairs(keys, values)

    def close(self) -> None:
        self._store.close()


# -- tables


class Sqlite(Peer):
    """A B+ tree by row id behind SQL; signed numbers, so keys and values are moved."""

    name = "SQLite"
    module = "sqlite3"
    _TOP: ClassVar[int] = 1 << 63

    def _open(self, path: str) -> None:
        self._connection = self._api.connect(
            os.path.join(path, "records.sqlite"),
            check_same_thread=False,
            isolation_level=None,
        )
        self._lock = threading.Lock()
        for statement in (
            "PRAGMA journal_mode=WAL",
            "PRAGMA synchronous=FULL",
            "CREATE TABLE IF NOT EXISTS records"
            " (key INTEGER PRIMARY KEY, value INTEGER NOT NULL, user_data BLOB)",
        ):
            self._connection.execute(statement)

    def _put(self, rows: Iterable[tuple[int, int, bytes]]) -> None:
        with self._lock:
            self._connection.execute("BEGIN IMMEDIATE")
            self._connection.executemany(
                "INSERT OR REPLACE INTO records VALUES (?, ?, ?)", rows
            )
            self._connection.execute("COMMIT")

    def commit(self, batch: Batch) -> None:
        top = self._TOP
        self._put((key - top, value - top, data) for key, (value, data) in batch)

    def commit_arrays(self, arrays: Arrays) -> None:
        self.commit(arrays.tuples())

    def load(self) -> Arrays:
        rows = self._connection.execute("SELECT * FROM records ORDER BY key").fetchall()
        n_records = len(rows)
        columns = list(zip(*rows, strict=True)) or [(), (), ()]
        top = np.uint64(self._TOP)
        keys = np.fromiter(columns[0], np.int64, n_records).view(np.uint64) ^ top
        values = np.fromiter(columns[1], np.int64, n_records).view(np.uint64) ^ top
        lengths = np.fromiter(map(len, columns[2]), np.uint64, n_records)
        offsets = np.concatenate([[np.uint64(0)], np.cumsum(lengths, dtype=np.uint64)])
        user_data = np.frombuffer(b"".join(columns[2]), np.uint8)
        return Arrays(keys, values, offsets, user_data)

    def close(self) -> None:
        self._connection.close()

    @classmethod
    def installed_version(cls) -> str:
        return str(importlib.import_module(cls.module).sqlite_version)


class DuckDb(Peer):
    """A column store, here a table without a key: an update would be a second row.

    User data is kept as a number (it has 8 bytes in every case measured), since blobs
    cannot leave it as arrays without a Python object each.
    """

    name = "DuckDB, without a key"
    module = "duckdb"

    def _open(self, path: str) -> None:
        self._connection = self._api.connect(os.path.join(path, "records.duckdb"))
        self._connection.execute(
            "CREATE TABLE IF NOT EXISTS records"
            " (key UBIGINT, value UBIGINT, user_data UBIGINT)"
        )
        self._cursors = threading.local()

    def _cursor(self) -> Any:
        if not hasattr(self._cursors, "own"):
            self._cursors.own = self._connection.cursor()
        return self._cursors.own

    def commit(self, batch: Batch) -> None:
        if len(batch) == 1:
            ((key, (value, user_data)),) = batch
            row = (key, value, int.from_bytes(user_data, "little"))
            self._cursor().execute("INSERT INTO records VALUES (?, ?, ?)", row)
            return
        keys = np.array([key for key, _ in batch], np.uint64)
        values = np.array([value for _, (value, _) in batch], np.uint64)
        joined = b"".join(user_data for _, (_, user_data) in batch)
        self._put(keys, values, np.frombuffer(joined, "<u8"))

    def commit_arrays(self, arrays: Arrays) -> None:
        assert arrays.user_data is not None
        self._put(arrays.keys, arrays.values, arrays.user_data.view("<u8"))

    def _put(self, keys: Any, values: Any, user_data: Any) -> None:
        cursor = self._cursor()
        columns = {"key": keys, "value": values, "user_data": user_data}
        cursor.register("columns", columns)
        cursor.execute("INSERT INTO records SELECT * FROM columns")
        cursor.unregister("columns")

    def load(self) -> Arrays:
        found = self._connection.execute("SELECT * FROM records").fetchnumpy()
        user_data = np.ascontiguousarray(found["user_data"]).view(np.uint8)
        offsets = np.arange(len(found["key"]) + 1, dtype=np.uint64) * np.uint64(8)
        return Arrays(found["key"], found["value"], offsets, user_data)

    def close(self) -> None:
        self._connection.close()


#: Every peer, in the order of the tables.
PEERS: tuple[type[Peer], ...] = (
    Lmdb,
    RocksDb,
    LevelDb,
    Sqlite,
    LmdbDuplicates,
    DuckDb,
)


def find(wanted: str) -> tuple[list[type[Peer]], list[str]]:
    """Return the peers that the command line asks for, and what is not installed.

    Parameters
    ----------
    wanted : str
        ``all``, ``installed``, ``none``, or module names with commas between them.

    Raises
    ------
    BenchmarkError
        If a peer is asked for that is not known or (except by ``installed``) not there.
    """
    names = {peer.module for peer in PEERS}
    asked = names if wanted in ("all", "installed") else set(wanted.split(","))
    asked -= {"none"}
    if not asked <= names:
        unknown = ", ".join(sorted(asked - names))
        raise BenchmarkError(
            f"unknown peer {unknown}: there are {', '.join(sorted(names))}"
        )
    missing = sorted(name for name in asked if not importlib.util.find_spec(name))
    if missing and wanted != "installed":
        raise BenchmarkError(
            f"not installed: {', '.join(missing)}. Install them with `pip install "
            "metastore[bench]`, or say `--peers installed` to leave out "
            "what is missing"
        )
    present = asked - set(missing)
    return [peer for peer in PEERS if peer.module in present], missing
