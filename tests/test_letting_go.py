"""How a store lets go: forgotten, interrupted, or asked by a signal handler.

Whatever happens, lock and files are given up in the end, and nobody waits for ever.
"""

from __future__ import annotations

import contextlib
import gc
import logging
import os
import resource
import signal
import sys
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from types import ModuleType

import pytest

from disk import Disk
from metastore import MetadataStore, StoreFailedError, StoreLockedError, compaction
from metastore import engine as engine_module
from metastore import log as log_module
from metastore import recovery as recovery_module
from metastore.directory import Directory
from test_errors import fail
from verbs import logs, numbered, read, recover_on, snapshots, states, write

#: Only a test that fails waits so long.
_SECONDS_MAX = 30


@contextlib.contextmanager
def on_signal(handler: Callable[[], None]) -> Iterator[Callable[[], None]]:
    """Yield what another thread calls to have this one run a handler, once.

    One signal is not enough: the interpreter puts it off until the wait is over if it
    comes when this thread has let go of the GIL, but does not wait yet. Beside
    two busy processes it was so with one in thirty.
    """
    heard, is_sent = threading.Event(), threading.Event()

    def handle(*_: object) -> None:
        if not heard.is_set():
            heard.set()
            handler()

    def send() -> None:
        while not heard.wait(0.01):
            os.kill(os.getpid(), signal.SIGUSR1)
        is_sent.set()

    old = signal.signal(signal.SIGUSR1, handle)
    try:
        yield send
    finally:
        is_sent.wait(_SECONDS_MAX)  # without a handler the next one ends the process
        signal.signal(signal.SIGUSR1, old)


def signal_amid_the_shutdown(
    store: MetadataStore, send: Callable[[], None], go_on: threading.Event
) -> None:
    """Have a task under way that signals once the shutdown waits for it."""
    compactor = store._engine._compactor
    begun = threading.Event()

    def task() -> None:
        begun.set()
        while not compactor._is_stopping:
            pass
        send()
        assert go_on.wait(_SECONDS_MAX)

    compactor.submit(task)
    assert begun.wait(_SECONDS_MAX)


def read_soon(path) -> object:
    """Read a store once who held it has let go of it."""
    deadline = time.monotonic() + _SECONDS_MAX
    while True:
        try:
            return read(path)
        except StoreLockedError:
            assert time.monotonic() < deadline


# Signal handlers


def test_a_signal_handler_may_shut_down_amid_the_shutdown(db):
    """It waited for itself: the second SIGTERM, while a compaction ran."""
    store, _ = MetadataStore.recover(db)
    store.insert_batch([(1, (1, b""))], sync=False)
    go_on = threading.Event()
    ended = []

    def handler() -> None:
        go_on.set()
        store.shutdown()
        ended.append(store._engine.is_released)

    with on_signal(handler) as send:
        signal_amid_the_shutdown(store, send, go_on)
        store.shutdown()
    assert ended == [True]
    assert read(db) == {1: (1, b"")}


def test_a_shutdown_from_amid_a_rotation_is_refused(tmp_path, monkeypatch):
    """It would wait for the thread that waits for the rotation to be over."""
    store, _ = MetadataStore.recover(tmp_path / "db", log_size_bytes_min=1)
    met = []
    right = engine_module.LogWriter

    def amid(*arguments: object) -> object:
        with pytest.raises(RuntimeError, match="in the middle of a commit"):
            store.shutdown()
        met.append(True)
        return right(*arguments)

    monkeypatch.setattr(engine_module, "LogWriter", amid)
    assert store.insert_batch([(1, (1, b""))]) == 1
    assert met == [True]
    assert store.insert_batch([(2, (2, b""))]) == 2
    store.shutdown()


class Interrupt(BaseException):
    pass


def interrupted_shutdown(db, go_on: threading.Event) -> MetadataStore:
    """Return a store whose shutdown was interrupted; a task of it is under way."""
    store, _ = MetadataStore.recover(db)
    store.insert_batch([(1, (1, b"not synced"))], sync=False)

    def handler() -> None:
        raise Interrupt

    with on_signal(handler) as send:
        signal_amid_the_shutdown(store, send, go_on)
        with pytest.raises(Interrupt):
            store.shutdown()
    return store


def test_an_interrupted_shutdown_may_be_tried_again(db):
    go_on = threading.Event()
    store = interrupted_shutdown(db, go_on)
    with pytest.raises(StoreLockedError):
        read(db)
    go_on.set()
    store.shutdown()
    store.shutdown()
    assert read(db) == {1: (1, b"not synced")}


def test_an_interrupted_shutdown_does_not_hide_that_the_store_is_open(db):
    """The lock was held until the process ended, and nothing said so."""
    go_on = threading.Event()
    store = interrupted_shutdown(db, go_on)
    go_on.set()
    with pytest.warns(ResourceWarning, match="shut down"):
        del store
        gc.collect()
    assert read_soon(db) == {1: (1, b"not synced")}


def test_a_failure_may_be_looked_at_by_who_logs_it():
    """The mutex that ``stats`` takes was held while the failure was logged."""
    disk = Disk()
    store, _ = recover_on(disk)
    found = []

    class Handler(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            found.append(store.stats().failure)

    handler = Handler()
    logger = logging.getLogger("metastore.engine")
    logger.addHandler(handler)

    def insert() -> None:
        with contextlib.suppress(StoreFailedError):
            store.insert_batch([(1, (1, b""))])

    thread = threading.Thread(target=insert, daemon=True)
    try:
        disk.before = fail("sync")
        thread.start()
        thread.join(_SECONDS_MAX)
        assert not thread.is_alive()
    finally:
        logger.removeHandler(handler)
    assert len(found) == 1
    assert found[0]
    disk.before = None
    store.shutdown()


# The garbage collector


@contextlib.contextmanager
def collecting_in(
    monkeypatch: pytest.MonkeyPatch, module: ModuleType, name: str
) -> Iterator[Callable[[], None]]:
    """Let nothing collect garbage but a thread's first call of a function, once it may.

    The context is what lets it, and returns when it has.
    """
    allowed, collected = threading.Event(), threading.Event()
    me = threading.current_thread()
    right = getattr(module, name)

    def collect_first(*arguments: object) -> object:
        if threading.current_thread() is not me and not collected.is_set():
            assert allowed.wait(_SECONDS_MAX)
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                gc.collect()
            collected.set()
        return right(*arguments)

    def collect() -> None:
        allowed.set()
        assert collected.wait(_SECONDS_MAX)

    monkeypatch.setattr(module, name, collect_first)
    gc.collect()
    gc.disable()
    try:
        yield collect
    finally:
        gc.enable()


def forget_in_a_cycle(store: list[object]) -> None:
    """Leave a store, the only item of a list, to the garbage collector."""
    store.append(store)


@pytest.mark.parametrize("threads", [1, 2])
def test_a_compaction_may_collect_its_own_store(db, monkeypatch, threads):
    """Its worker waited for the compaction, and that for the worker: for ever."""
    write(db, numbered(5))
    with collecting_in(monkeypatch, compaction, "encode_block") as collect:
        options = {"log_size_bytes_min": 1, "threads": threads}
        forget_in_a_cycle([MetadataStore.recover(db, **options)[0]])
        collect()
        assert read_soon(db) == states(numbered(5))[-1]
    assert len(snapshots(db)) == 1  # it came to its end


def test_preparing_a_log_may_collect_its_own_store(db, monkeypatch):
    """The thread asked for a lock that it held itself."""
    with collecting_in(monkeypatch, engine_module, "prepare_log") as collect:
        forget_in_a_cycle([MetadataStore.recover(db)[0]])
        collect()
        assert read_soon(db) == {}


def test_a_forgotten_store_lets_go_where_warnings_are_errors(db, monkeypatch):
    """The warning was raised, and with it ended what gives up the lock."""
    met = []
    monkeypatch.setattr(sys, "unraisablehook", lambda found: met.append(found.exc_type))
    monkeypatch.setattr(sys, "excepthook", lambda kind, *_: met.append(kind))
    store, _ = MetadataStore.recover(db)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        del store
        gc.collect()
    assert met == [ResourceWarning]
    assert read(db) == {}


def test_a_store_whose_progress_is_told_to_its_owner_can_be_forgotten(db):
    """The store kept the callback, that its owner, and that the store: for ever."""

    class Owner:
        def __init__(self) -> None:
            self.told: list[tuple[int, int]] = []
            self.store, _ = MetadataStore.recover(db, progress=self.on_progress)

        def on_progress(self, done: int, total: int) -> None:
            self.told.append((done, total))

    write(db, numbered(3))
    owner = Owner()
    assert owner.told
    with pytest.warns(ResourceWarning, match="shut down"):
        del owner
        gc.collect()
    assert read(db) == states(numbered(3))[-1]


# Many files


def test_a_store_of_many_small_logs_opens(db):
    """All were open at once: after a thousand short runs none could open it again."""
    for key in range(1, 101):
        write(db, [[(key, (key, b""))]], log_size_bytes_min=1 << 20)
    assert len(logs(db)) == 100
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    n_open = len(os.listdir("/proc/self/fd")) if os.path.isdir("/proc/self/fd") else 20
    resource.setrlimit(resource.RLIMIT_NOFILE, (n_open + 30, hard))
    try:
        found = read(db, threads=2)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    assert found == {key: (key, b"") for key in range(1, 101)}


def test_a_store_of_many_small_logs_opens_without_a_thread(db, monkeypatch):
    """What a thread was to do, and the caller did, kept a map of its log in the queue.

    A map has a descriptor of its own. So it was, too, if the other thread only came
    late: in one run of the tests, beside a second one.
    """

    def no_thread(thread):
        raise RuntimeError("can't start new thread")

    for key in range(1, 101):
        write(db, [[(key, (key, b""))]], log_size_bytes_min=1 << 20)
    most = []
    prepare = log_module.open_log

    def count(*arguments):
        most.append(len(os.listdir("/proc/self/fd")))
        return prepare(*arguments)

    if not os.path.isdir("/proc/self/fd"):
        pytest.skip("the system does not list descriptors")
    directory = Directory.open_existing(str(db))
    monkeypatch.setattr(recovery_module, "open_log", count)
    monkeypatch.setattr(threading.Thread, "start", no_thread)
    found = recovery_module.inspect(directory, threads=2).recovered
    monkeypatch.undo()
    directory.close()
    assert len(found) == 100
    assert len(most) == 100
    assert max(most) - min(most) < 20


def test_many_small_logs_are_compacted(db, monkeypatch):
    """Each takes a file and 64 KiB, however little is in it."""
    monkeypatch.setattr(engine_module, "_N_LOGS_MAX", 3)
    for key in range(1, 5):
        write(db, [[(key, (key, b""))]], log_size_bytes_min=1 << 20)
    assert len(logs(db)) == 4
    store, _ = MetadataStore.recover(db, log_size_bytes_min=1 << 20)
    store._engine._compactor.wait_idle()
    assert store.stats().n_compactions == 1
    store.shutdown()
    assert (len(snapshots(db)), logs(db)) == (1, [])
    assert read(db) == {key: (key, b"") for key in range(1, 5)}


def test_what_is_too_much_beside_a_smaller_snapshot_is_compacted_too(monkeypatch, rng):
    """Nothing asked again, and the log grew without bound.

    What waited was little beside the old snapshot, and too much beside the new one.
    """
    keys = range(100)
    store, _ = recover_on(Disk(), log_size_bytes_min=20_000)
    engine = store._engine
    store.insert_batch([(key, (1, rng.randbytes(500))) for key in keys])
    store.compact()
    before = store.stats()
    assert before.snapshot_size > 50_000
    compact = engine_module.compact

    def rotate_amid(*arguments: object, **options: object) -> object:
        monkeypatch.setattr(engine_module, "compact", compact)
        store.insert_batch([(1000, (1, rng.randbytes(30_000)))])
        engine._commits.exclusively(engine._rotate)
        return compact(*arguments, **options)

    monkeypatch.setattr(engine_module, "compact", rotate_amid)
    store.insert_batch([(key, None) for key in keys])
    store.compact()
    after = store.stats()
    assert 30_000 < after.snapshot_size < 50_000
    assert after.n_compactions == before.n_compactions + 2
    assert after.n_logs_sealed == 0
    store.shutdown()
