"""MetadataStore: the face of metastore."""

from __future__ import annotations

import atexit
import logging
import os
import warnings
import weakref
from collections.abc import Iterable
from types import TracebackType
from typing import Any, Literal

import numpy.typing as npt

from metastore.arguments import integer_in, payload_of_arrays
from metastore.columns import Recovered
from metastore.directory import Directory, DirectoryProtocol
from metastore.engine import Engine, Options, open_engine
from metastore.frames import encode_arrays, encode_batch
from metastore.recovery import Progress
from metastore.report import StoreStats

__all__ = ["MetadataStore"]

_logger = logging.getLogger(__name__)

Buffer = bytes | bytearray | memoryview
Batch = Iterable[tuple[int, tuple[int, Buffer] | None]]

_BOUNDS = {
    "log_size_bytes_min": (1, 2**63 - 1),
    "compression_level": (-50, 22),
    "threads": (1, 256),
}


class MetadataStore:
    """A durable map from u64 keys to (nonzero u64 value, bytes).

    Made by :meth:`recover`. All methods are thread-safe; one process at a time owns a
    directory. Use it as a context manager, or call :meth:`shutdown`.
    """

    def __init__(self, engine: Engine) -> None:
        if not isinstance(engine, Engine):
            raise TypeError("a MetadataStore is made by MetadataStore.recover(path)")
        self._engine = engine
        # Not __del__: it could bring the store back. At the exit, _end_stores calls it:
        # behind handlers that were registered later, and may well shut the store down.
        self._finalizer = weakref.finalize(self, _warn_and_abandon, engine)
        self._finalizer.atexit = False
        _stores.add(self)

    @classmethod
    def recover(
        cls,
        path: str | bytes | os.PathLike[str] | os.PathLike[bytes],
        *,
        log_size_bytes_min: int = 65_536,
        compression_level: int = 1,
        threads: int | None = None,
        progress: Progress | None = None,
        on_damage: Literal["raise", "prefix"] = "raise",
    ) -> tuple[MetadataStore, Recovered]:
        """Open the store in a directory and return it with everything it holds.

        Parameters
        ----------
        path : str, bytes or path-like
            The directory. It is created if it is missing, with its parents.
        log_size_bytes_min : int
            A log rotates, and is compacted, when the bytes that are not yet in a
            snapshot pass ``max(log_size_bytes_min, size of the snapshot)``; while a
            compaction is under way, with the first commit after it. Batches that pack
            better than 16 times count, in logs and snapshot, as if they packed so well.
            More than 256 sealed logs are compacted whatever their size.
        compression_level : int
            Of zstd, -50 to 22, for batches and snapshots written from now on.
        threads : int, optional
            How many threads decode and compact, 1 to 256; by default one per
            processor that this process may use.
        progress : callable, optional
            Called as ``progress(done_bytes, total_bytes)`` in this thread.
        on_damage : {"raise", "prefix"}
            What to do about damage that no crash explains: refuse, or recover the
            batches that precede it and keep every byte of the rest under
            ``quarantine/``. A torn tail, which was never acknowledged, is no damage:
            it is dropped, reported and kept aside either way.

        Returns
        -------
        store : MetadataStore
            Ready to be written to.
        recovered : Recovered
            All records, sorted by key.

        Raises
        ------
        StoreLockedError
            If another store object holds the directory; at once.
        CorruptionError, FormatVersionError
            If the files are damaged, or of another version; names file and offset.
        OSError
            What the operating system says, as it is.
        """
        options = _options(
            log_size_bytes_min=log_size_bytes_min,
            compression_level=compression_level,
            threads=threads,
            progress=progress,
            on_damage=on_damage,
        )
        return cls._open(Directory.open_or_create(os.fsdecode(path)), options)

    @classmethod
    def _recover_in(
        cls, directory: DirectoryProtocol, *, inline: bool = False, **options: Any
    ) -> tuple[MetadataStore, Recovered]:
        """For tests: recover a directory object, without a thread if `inline`."""
        return cls._open(directory, _options(inline=inline, **options))

    @classmethod
    def _open(
        cls, directory: DirectoryProtocol, options: Options
    ) -> tuple[MetadataStore, Recovered]:
        try:
            if isinstance(directory, Directory):
                _warn_of_a_network(directory)
        except BaseException:
            directory.close()
            raise
        return open_engine(directory, options, cls)

    def insert_batch(self, batch: Batch, *, sync: bool = True) -> int:
        """Write records as one atomic batch.

        Parameters
        ----------
        batch : iterable of (int, (int, bytes-like) or None)
            Keys with value and user data; None deletes the key. The last record of a
            key wins.
        sync : bool
            Whether the batch is durable when the call returns. Otherwise it survives
            a killed process at once, and power loss after :meth:`sync`.

        Returns
        -------
        int
            The sequence of the batch: 1 for the first of a store, then without gaps.

        Raises
        ------
        TypeError, ValueError, OverflowError
            For what cannot be stored; nothing was written and the store still works.
        StoreFailedError
            After a failed write or sync: the fate of this batch shows at the next
            recovery, and no later one is written.
        StoreClosedError
            After :meth:`shutdown`, and in a forked child.
        """
        self._engine.check()
        frame = encode_batch(batch, self._engine.compression_level)
        return self._engine.commit(frame, sync)

    def insert_arrays(
        self,
        keys: npt.ArrayLike,
        values: npt.ArrayLike,
        offsets: npt.ArrayLike | None = None,
        user_data: npt.ArrayLike | Buffer | None = None,
        *,
        sync: bool = True,
    ) -> int:
        """Write columns as one atomic batch; :meth:`insert_batch` for many records.

        Parameters
        ----------
        keys, values : array of integers, shape (n,)
            A value of 0 deletes the key. The last record of a key wins.
        offsets : array of integers, shape (n + 1,), optional
            Record i's user data is ``user_data[offsets[i]:offsets[i + 1]]``. Without
            `offsets` and `user_data` all user data is empty.
        user_data : bytes-like or array of uint8, shape (offsets[n],), optional
            The user data of all records, back to back.
        sync : bool
            As in :meth:`insert_batch`.

        Returns
        -------
        int
            The sequence of the batch.

        Raises
        ------
        TypeError, ValueError, OverflowError, StoreFailedError, StoreClosedError
            As in :meth:`insert_batch`. Arrays of floats or bools are refused; other
            integer types, byte orders and strides are converted.
        """
        self._engine.check()
        payload = payload_of_arrays(keys, values, offsets, user_data)
        engine = self._engine
        frame = encode_arrays(payload, engine.compression_level, engine.take_spare())
        sequence = engine.commit(frame, sync)
        engine.keep_spare(frame)
        return sequence

    def sync(self) -> None:
        """Make every batch whose call has returned durable, or raise."""
        self._engine.commit(None, True)

    def compact(self) -> None:
        """Bring every batch so far into a snapshot; return when that is durable.

        The store does so by itself when its logs outgrow the snapshot.
        """
        self._engine.compact()

    def stats(self) -> StoreStats:
        """Return how the store stands; also after shutdown or failure."""
        return self._engine.stats()

    def shutdown(self) -> None:
        """Make every batch durable, end the thread, close the files, free the lock.

        Idempotent; after an interrupt it may be called again. A compaction that is
        under way ends first. After a failure nothing more is written.

        Raises
        ------
        StoreFailedError
            For a failure that no call was told of yet; everything is closed all the
            same.
        RuntimeError
            In a signal handler that interrupts a commit of the same thread.
        """
        self._engine.shutdown()

    def __enter__(self) -> MetadataStore:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.shutdown()

    def __repr__(self) -> str:
        return f"<MetadataStore: {self._engine}>"


def _warn_of_a_network(directory: Directory) -> None:
    kind = directory.network_type()
    if kind is not None:
        _logger.warning(
            "%s lies on a network file system (%s): lock and sync may not hold",
            directory.path,
            kind,
        )


def _options(**options: Any) -> Options:
    """Check the options of ``recover``; its integers become ints of Python."""
    for name, (low, high) in _BOUNDS.items():
        if name in options and not (name == "threads" and options[name] is None):
            options[name] = integer_in(name, options[name], low, high)
    if options.get("progress") is not None and not callable(options["progress"]):
        raise TypeError("progress must be callable")
    if options.get("on_damage", "raise") not in ("raise", "prefix"):
        raise ValueError(
            f'on_damage must be "raise" or "prefix", not {options["on_damage"]!r}'
        )
    return Options(**options)


_stores: weakref.WeakSet[MetadataStore] = weakref.WeakSet()


def _end_stores() -> None:
    for store in list(_stores):
        # For handlers that come later: a shutdown that finds all given up is one all
        # the same.
        store._engine.make_durable()
        store._finalizer()


atexit.register(_end_stores)


def _warn_and_abandon(engine: Engine) -> None:
    if engine.is_forked or engine.is_released:
        return  # the parent's to warn about, or as it should be
    try:
        warnings.warn(
            f"{engine} was never shut down: every batch that was acknowledged is safe, "
            "but the lock and the files were held until now",
            ResourceWarning,
            stacklevel=2,
        )
    finally:  # also where warnings are errors
        engine.abandon()
