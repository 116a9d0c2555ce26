"""The running store: active log, rotation, compaction, the sticky error.

``MetadataStore`` in store.py is the face of this; the engine knows nothing of
arguments, and the compaction thread holds it, not the face.
"""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import os
import secrets
import threading
import time
import weakref
from collections.abc import Callable
from typing import TypeVar

from metastore._commit import GroupCommit
from metastore.columns import Recovered
from metastore.compaction import Compactor, compact
from metastore.directory import WARNING, DirectoryProtocol, FileName, FileProtocol
from metastore.errors import (
    MetastoreError,
    StoreClosedError,
    StoreFailedError,
)
from metastore.format import FILE_HEADER_SIZE, STORE_ID_SIZE
from metastore.log import LogWriter, prepare_log
from metastore.pace import Pace
from metastore.parallel import default_threads
from metastore.recovery import (
    Content,
    Progress,
    find_exhaustion,
    make_report,
    read_directory,
    remove_obsolete,
    remove_temporaries,
    settle,
)
from metastore.report import StoreStats

__all__ = ["Engine", "Options", "open_engine"]

_logger = logging.getLogger(__name__)

_Face = TypeVar("_Face")

#: More bytes than a log ever holds.
_UNBOUNDED = 1 << 62
#: More sealed logs than this are compacted however small they are: each is a file, and
#: every opening of the store leaves one that was written to.
_N_LOGS_MAX = 256
#: A log this long, or as long as what a compaction has in hand, ends its rests.
_BACKLOG_SIZE_MIN = 64 << 20
#: The memory of a frame of at most this size is kept for the next.
_SPARE_SIZE_MAX = 32 << 20


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options:
    """The checked options of ``MetadataStore.recover``."""

    log_size_bytes_min: int = 65_536
    compression_level: int = 1
    threads: int | None = None
    progress: Progress | None = None
    on_damage: str = "raise"
    #: For tests: no background thread.
    inline: bool = False

    @property
    def n_threads(self) -> int:
        """How many threads decode and encode."""
        return self.threads or default_threads()


@dataclasses.dataclass(frozen=True)
class _SealedLog:
    name: FileName
    sequence: int  # of its first batch
    size: int
    weight: int


def open_engine(
    directory: DirectoryProtocol, options: Options, face: Callable[[Engine], _Face]
) -> tuple[_Face, Recovered]:
    """Lock and recover a directory, open a new log in it and let its engine run.

    Whatever is raised, all of it is given up, the directory too. `face` makes what
    gives the engine up if it is dropped, and is called before there is a thread: an
    interrupt may come when all was returned and nobody has it yet.
    """
    started = time.perf_counter()
    quarantined: tuple[str, ...] = ()
    engine = file = None
    try:
        directory.lock()
        # A name that is seen may not be durable yet; what follows relies on names.
        if (WARNING, True) not in directory.names():
            directory.create(WARNING).close()
        directory.sync()
        content = read_directory(
            directory,
            on_damage=options.on_damage,
            threads=options.n_threads,
            progress=options.progress,
        )
        exhaustion = find_exhaustion(content, directory.path)
        if exhaustion is not None:
            raise exhaustion
        # First what gives room, and what may find none: nobody is told which files were
        # set aside, if the store cannot be opened then.
        temporaries = remove_temporaries(directory, content)
        name = FileName("log", content.plan.listing.number_max + 1)
        file = prepare_log(directory, name)
        store_id = content.plan.store_id or secrets.token_bytes(STORE_ID_SIZE)
        quarantined = settle(directory, content)
        log = LogWriter(directory, name, store_id, content.sequence + 1, file)
        removed = temporaries + remove_obsolete(directory, content)
        report = make_report(
            directory,
            content,
            quarantined=quarantined,
            removed=removed,
            seconds=time.perf_counter() - started,
        )
        if not report.is_clean:
            _logger.warning("%s", report)
        engine = Engine(directory, options, store_id, content, log)
        store = face(engine)
        engine.start()
        return store, Recovered(content.columns, report)
    except BaseException as error:
        if quarantined:
            error.add_note(f"kept, in {directory.path}: {', '.join(quarantined)}")
        if engine is not None:
            engine.abandon()
        else:
            if file is not None:
                file.close()
            directory.close()
        raise


class Engine:
    """Commits, rotates and compacts. Thread-safe; made by :func:`open_engine`.

    Made, it has no thread yet, which :meth:`start` gives it.
    """

    def __init__(
        self,
        directory: DirectoryProtocol,
        options: Options,
        store_id: bytes,
        content: Content,
        log: LogWriter,
    ) -> None:
        self._directory = directory
        # Not what progress is told to: it may well hold what holds the store.
        self._options = dataclasses.replace(options, progress=None)
        self._store_id = store_id
        self._log = log
        self._failure: BaseException | None = None
        self._is_failure_told = False
        self._is_closed = False
        self._spares: list[bytearray] = []  # at most one
        #: Whether files, thread and lock were given up.
        self.is_released = False
        self.is_forked = False
        # Guards what the leader and the compaction thread both change. This one and
        # that of the shutdown may be asked for by a signal handler amid it.
        self._mutex = threading.RLock()
        self._prepare_mutex = threading.Lock()
        self._shutdown_mutex = threading.RLock()
        self._prepared: tuple[FileName, FileProtocol] | None = None
        self._snapshot = content.plan.snapshot
        snapshot = content.snapshot
        self._snapshot_size = snapshot.size if snapshot else 0
        self._snapshot_weight = snapshot.weight if snapshot else 0
        #: Sealed logs that wait for a compaction, and those that one has in hand.
        self._sealed = [
            _SealedLog(
                name,
                log.sequence - log.n_batches,
                log.end - FILE_HEADER_SIZE,
                log.weight,
            )
            for name, log in content.logs
            if log.n_batches
        ]
        self._compacting: list[_SealedLog] = []
        #: Whether the active log must stay even without batches: it is what bounds
        #: an older one that ends in a torn tail, or in damage.
        self._is_bound = not content.ends_sealed
        self._n_rotations = self._n_compactions = 0
        self._commits = GroupCommit(
            log.tail,
            on_failure=self._fail,
            failed=self._refusal,
            rotate=lambda: self._try(self._rotate_if_due),
        )
        self._set_weight_max()
        self._pace = Pace(lambda: self._commits.n_writes, self._backlog)
        if options.inline:
            self._pace.hurry()  # who compacts is who commits: a rest would help nobody
        self._compactor = Compactor(self._fail)
        _engines.add(self)  # before there are other threads

    def start(self) -> None:
        """Let the compaction thread run, if the options want one, with what is due."""
        if not self._options.inline:
            self._compactor.start()
        self._compactor.submit(self._prepare_next, is_brief=True)
        self._compact_if_due()

    def __str__(self) -> str:
        return f"the store in {self._directory.path}"

    # ---- state ----

    @property
    def compression_level(self) -> int:
        """The level of zstd for new frames."""
        return self._options.compression_level

    def check(self) -> None:
        """Raise if the store cannot be written to."""
        if self._commits.is_open:
            return
        if self.is_forked:
            raise StoreClosedError.in_a_fork(self._directory.path)
        if self._is_closed:
            raise StoreClosedError(f"the store was shut down ({self._directory.path})")
        raise self._failed()

    def _failed(self) -> StoreFailedError:
        failure = self._commits.tail.failure
        if self._failure is None and failure is not None:
            self._fail(failure)  # who was to tell us was interrupted before
        cause = self._failure
        self._is_failure_told = True
        error = StoreFailedError(
            f"the store failed: {cause}; whether batches in flight are durable shows "
            f"at the next recovery: close it and recover it again "
            f"({self._directory.path})"
        )
        error.__cause__ = cause
        return error

    def _fail(self, error: BaseException) -> None:
        """Keep the first failure; it is never cleared."""
        if self.is_forked:
            return  # the parent's store is as it was
        with self._mutex:
            is_first = self._failure is None
            if is_first:
                self._failure = error
        self._commits.close()
        if is_first:  # not with the mutex: who handles it may ask for the stats
            _logger.error("the store failed (%s): %s", self._directory.path, error)

    def stats(self) -> StoreStats:
        """Return how the store stands."""
        commits = self._commits
        # No call with the mutex, so no signal handler: it might wait for the compaction
        # to end, which asks for the mutex.
        with self._mutex:
            log = self._log
            sealed = self._compacting + self._sealed
            snapshot, snapshot_size = self._snapshot, self._snapshot_size
            n_rotations, n_compactions = self._n_rotations, self._n_compactions
        return StoreStats(
            sequence=log.sequence - 1,
            sequence_durable=commits.durable,
            log_number=log.name.number,
            log_size=log.size,
            n_logs_sealed=len(sealed),
            logs_sealed_size=sum(log.size for log in sealed),
            snapshot_number=snapshot.number if snapshot else 0,
            snapshot_size=snapshot_size,
            n_batches=commits.n_batches,
            n_writes=commits.n_writes,
            n_syncs=commits.n_syncs + n_rotations,
            n_rotations=n_rotations,
            n_compactions=n_compactions,
            failure=None if self._failure is None else str(self._failure),
        )

    # ---- commit ----

    def commit(self, frame: bytearray | None, sync: bool) -> int:
        """Write a started frame, durable on return if `sync`; return its sequence."""
        self.check()
        return self._commits.commit(frame, sync)

    def take_spare(self) -> bytearray | None:
        """Return a frame that is no longer needed, for its memory, if there is one.

        The C library gives large pieces of memory back to the system, and to touch them
        anew takes longer than to fill them.
        """
        try:
            return self._spares.pop()
        except IndexError:
            return None

    def keep_spare(self, frame: bytearray) -> None:
        """Keep a frame that was committed for :meth:`take_spare`, if it is not huge."""
        if len(frame) <= _SPARE_SIZE_MAX:
            self._spares[:] = [frame]

    def _refusal(self) -> MetastoreError:
        """Return what :meth:`check` raises, of this thread's own."""
        try:
            self.check()
        except MetastoreError as error:
            return error
        raise AssertionError("a commit was refused for no reason")

    # ---- rotation ----

    def _limit(self) -> int:
        """How much may be logged that is not on its way into a snapshot, as weight."""
        return max(self._options.log_size_bytes_min, self._snapshot_weight)

    def _waiting(self) -> int:
        return sum(log.weight for log in self._sealed)

    def _room(self) -> int:
        """How much the active log may hold before it has to rotate, as weight."""
        waiting, limit = self._waiting(), self._limit()
        # Not while a compaction is due or under way: what is sealed meanwhile would
        # wait for the next one all the same, at the price of four syncs a time.
        return _UNBOUNDED if self._compacting or waiting > limit else limit - waiting

    def _set_weight_max(self) -> None:
        self._commits.weight_max = FILE_HEADER_SIZE + self._room()

    def _rotate_if_due(self) -> None:
        # Not an empty log, though older ones that wait may be due by themselves.
        if not self._log.is_empty and self._log.weight > self._room():
            self._rotate()
            self._compact_if_due()

    def _try(self, step: Callable[[], None]) -> None:
        """Run a step that follows a durable group: its failure is the next one's."""
        try:
            step()
        except BaseException as error:
            self._fail(error)
            if not isinstance(error, Exception):
                raise

    def _rotate(self) -> None:
        """Seal the active log and open the next one."""
        old = self._log
        name = FileName("log", old.name.number + 1)
        self._commits.sync_now()
        old.seal()
        # The mutex is held until the new log is the active one: else the background
        # could create, and so empty, the file of this very name a second time.
        with self._prepare_mutex:
            file = self._take_prepared(name)
            log = LogWriter(self._directory, name, self._store_id, old.sequence, file)
            with self._mutex:
                self._log = log
                self._commits.tail = log.tail
                self._sealed.append(self._as_sealed(old))
                self._is_bound = False
                self._n_rotations += 1
                self._set_weight_max()
        old.close()
        self._compactor.submit(self._prepare_next, is_brief=True)

    def _take_prepared(self, name: FileName) -> FileProtocol | None:
        if self._prepared is None:
            return None
        (prepared, file), self._prepared = self._prepared, None
        assert prepared == name, f"{prepared} was prepared, not {name}"
        return file

    @staticmethod
    def _as_sealed(log: LogWriter) -> _SealedLog:
        size = log.size - FILE_HEADER_SIZE
        return _SealedLog(log.name, log.first_sequence, size, log.weight)

    def _prepare_next(self) -> None:
        """Write the next log's file ahead, in the background."""
        with self._prepare_mutex:
            name = FileName("log", self._log.name.number + 1)
            if self._prepared is None and not self._is_closed:
                self._prepared = name, prepare_log(self._directory, name)

    # ---- compaction ----

    def _compact_if_due(self) -> None:
        if self._waiting() > self._limit() or len(self._sealed) > _N_LOGS_MAX:
            self._compactor.submit(self._compact_for_commits)

    def _backlog(self) -> float:
        """How long the active log is, as a share of what may delay a compaction."""
        in_hand = sum(log.weight for log in self._compacting)
        bound = max(_BACKLOG_SIZE_MIN, self._snapshot_weight + in_hand)
        return self._log.weight / bound

    def _compact_for_commits(self) -> None:
        self._pace.begin(commits_come=True)
        self._compact_sealed()

    def _compact_sealed(self) -> None:
        """Bring every sealed log into a new snapshot; in the background."""
        with self._mutex:
            logs, self._sealed = self._sealed, []
            self._compacting = logs
            self._set_weight_max()
            snapshot = self._snapshot
            # The active log begins where the last of them ends.
            sequence = self._log.first_sequence - 1
        if not logs:
            return
        name, size, weight = compact(
            self._directory,
            self._store_id,
            snapshot,
            [(log.name, log.sequence) for log in logs],
            sequence,
            level=self._options.compression_level,
            threads=self._options.n_threads,
            pace=self._pace,
        )
        with self._mutex:
            self._snapshot, self._snapshot_size = name, size
            self._snapshot_weight = weight
            self._compacting = []
            self._set_weight_max()
            self._n_compactions += 1
        # What was sealed meanwhile may be too much beside a smaller snapshot.
        self._compact_if_due()

    def compact(self) -> None:
        """Bring every batch so far into a snapshot; return when it is durable."""
        self.check()

        def rotate() -> None:
            self.check()
            if not self._log.is_empty:
                self._try(self._rotate)
            self.check()

        is_done = False

        def work() -> None:
            nonlocal is_done
            self._pace.begin()
            self._compact_sealed()
            is_done = True

        self._commits.exclusively(rotate)
        self._compactor.submit(work)
        self._compactor.wait_idle()
        self.check()
        if not is_done:
            raise StoreClosedError(f"shut down before it was compacted: {self}")

    # ---- end ----

    def shutdown(self) -> None:
        """Seal the log, end the thread, close every file, free the lock; idempotent.

        A failure that no caller was told of yet is raised here, after all is closed.
        After an interrupt it may be called again.
        """
        if self.is_forked:
            return
        if self._commits.is_led_here:
            raise RuntimeError("this thread is in the middle of a commit already")
        if self._compactor.is_this_thread:
            # A logging handler, told of a failure: who shuts down waits for it.
            self._shut_down_unless_another_does()
            return
        with self._shutdown_mutex:  # who comes second returns when all is done
            self._shut_down()

    def _shut_down_unless_another_does(self) -> None:
        if self._shutdown_mutex.acquire(blocking=False):
            try:
                self._shut_down()
            finally:
                self._shutdown_mutex.release()

    def _shut_down(self) -> None:
        if not self.is_released:
            self._end()
        if self._failure is not None and not self._is_failure_told:
            raise self._failed()

    def _end(self) -> None:
        # First the thread, which may wait for nothing of ours; then the log.
        self._pace.hurry()
        self._compactor.stop()
        try:
            # Meanwhile a signal handler may have done it all.
            if not self._is_closed and self._failure is None:
                self._commits.exclusively(self._seal)
        finally:
            self.abandon()

    def _seal(self) -> None:
        try:
            self.check()  # a commit before may have failed
            self._commits.sync_now()
            if self._is_bound or not self._log.is_empty:
                self._log.seal()
            else:  # nothing in it: the directory stays as it was
                self._directory.remove(str(self._log.name))
            if self._prepared is not None:
                self._directory.remove(self._prepared[0].temporary)
        except BaseException as error:
            self._fail(error)
            if not isinstance(error, Exception):
                raise
            raise self._refusal() from self._failure
        finally:
            self._close()

    def _close(self) -> None:
        """Let nothing more be written; who leads calls it, so that nobody is at it."""
        self._is_closed = True
        self._commits.close()

    def make_durable(self) -> None:
        """Sync what was committed, if the store is open; a failure is kept."""
        if self._commits.is_open and not self._commits.is_led_here:
            with contextlib.suppress(MetastoreError):
                self.commit(None, True)

    def abandon(self) -> None:
        """Give up files, thread and lock without another write; idempotent.

        It waits for no compaction, since the garbage collector calls it in any thread:
        one that the compaction needs, or its own. If one is under way, that ends first
        and gives all of it up then.
        """
        if self.is_forked:
            return
        self._commits.exclusively(self._close)
        self._pace.hurry()
        self._compactor.stop_then(self._release)

    def _release(self) -> None:
        with contextlib.ExitStack() as stack:  # the lock goes even if a close fails
            stack.callback(self._directory.close)
            stack.callback(self._log.close)
            if self._prepared is not None:
                stack.callback(self._prepared[1].close)
                self._prepared = None
        self._spares.clear()
        self.is_released = True
        _engines.discard(self)

    def forget_after_fork(self) -> None:
        """In a forked child: let go of the files; their directory does of the lock."""
        self.is_forked = True
        self._commits.forget_after_fork()
        # The parent's may be held for ever here.
        self._mutex, self._prepare_mutex = threading.RLock(), threading.Lock()
        self._compactor.forget_after_fork()
        if self._prepared is not None:
            self._prepared[1].close()
        self._log.close()


#: Stores of this process, so that a forked child can let go of them.
_engines: weakref.WeakSet[Engine] = weakref.WeakSet()


def _forget_after_fork() -> None:
    for engine in list(_engines):
        engine.forget_after_fork()


os.register_at_fork(after_in_child=_forget_after_fork)
