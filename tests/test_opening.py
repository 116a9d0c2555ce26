"""What opening and ending a store owe to the process and the disk around it."""

from __future__ import annotations

import errno
import itertools
import logging
import os
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest

from metastore import (
    MetadataStore,
    StoreClosedError,
    StoreFailedError,
    StoreLockedError,
)
from metastore import engine as engine_module
from metastore.directory import Directory
from verbs import (
    content,
    join_compactors,
    logs,
    numbered,
    read,
    run,
    states,
    together,
    write,
)

_SECONDS_MAX = 30


# The directory


@pytest.fixture
def synced(monkeypatch):
    """Inodes of the directories that were synced."""
    found = []
    right = os.fsync

    def fsync(descriptor):
        found.append(os.fstat(descriptor).st_ino)
        right(descriptor)

    monkeypatch.setattr(os, "fsync", fsync)
    return found


@pytest.mark.parametrize("made", ["by us", "by the user", "before a crash"])
def test_the_name_of_the_directory_is_durable(tmp_path, synced, made):
    """It was synced only by who created it: a user's own could go with all in it."""
    path = tmp_path / "above" / "db"
    if made == "by the user":
        path.mkdir(parents=True)
    elif made == "before a crash":
        path.parent.mkdir()
    read(path)
    assert path.parent.stat().st_ino in synced
    if made != "by the user":
        assert tmp_path.stat().st_ino in synced


def test_a_parent_that_may_not_be_opened(tmp_path, monkeypatch):
    write(tmp_path / "db", numbered(1))
    right = os.open

    def refusing(path, *arguments, **options):
        if str(path).endswith(".."):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), path)
        return right(path, *arguments, **options)

    monkeypatch.setattr(os, "open", refusing)
    assert read(tmp_path / "db") == states(numbered(1))[-1]


def test_a_parent_whose_sync_fails(tmp_path, monkeypatch):
    """A later call did not know of it, and acknowledged batches all the same."""
    path = tmp_path / "db"

    def failing(descriptor):
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(os, "fsync", failing)
    for _ in range(2):
        with pytest.raises(OSError, match="Input/output"):
            MetadataStore.recover(path)
    monkeypatch.undo()
    assert read(path) == {}


def test_another_process_that_creates_the_directory_first(tmp_path, monkeypatch):
    """FileExistsError was raised, not StoreLockedError."""
    path = tmp_path / "above" / "db"
    right = os.mkdir
    others = []

    def slow(name, *arguments, **options):
        if str(name) == str(path) and not others:
            others.append(None)
            others[0] = MetadataStore.recover(path)[0]
        right(name, *arguments, **options)

    monkeypatch.setattr(os, "mkdir", slow)
    with pytest.raises(StoreLockedError):
        MetadataStore.recover(path)
    others[0].shutdown()


@pytest.mark.parametrize("as_bytes", [False, True])
def test_a_path_in_bytes(tmp_path, as_bytes):
    """The directory was created and locked, and then TypeError raised."""
    path = os.fsencode(tmp_path / "db")

    class Like:
        def __fspath__(self):
            return path

    write(path if as_bytes else Like(), numbered(2))
    assert read(tmp_path / "db") == states(numbered(2))[-1]


def test_a_path_that_goes_up_behind_a_link(tmp_path):
    """Normalised, it was another directory, which was created instead."""
    (tmp_path / "real" / "in").mkdir(parents=True)
    (tmp_path / "link").symlink_to("real/in")
    read(f"{tmp_path}/link/../db")
    assert (tmp_path / "real" / "db").is_dir()
    assert not (tmp_path / "db").exists()


def test_a_path_with_a_null_character_creates_nothing(tmp_path):
    with pytest.raises(ValueError, match="null"):
        MetadataStore.recover(f"{tmp_path}/a/b\0")
    assert list(tmp_path.iterdir()) == []


# The process


WITHOUT_STREAMS = """
import os, sys
from metastore import MetadataStore
store, _ = MetadataStore.recover(sys.argv[1])
store.insert_batch([(1, (1, b""))])
store.compact()
store.insert_batch([(2, (2, b""))])
try:  # as a library of C does that complains
    os.write(2, b"some library: no such device\\n" * 10)
except OSError:
    pass
store.insert_batch([(3, (3, b""))])
store.shutdown()
"""


def test_a_process_without_standard_streams(db):
    """Descriptor 2 was the log: what was meant for stderr went over its header."""
    command = [sys.executable, "-c", WITHOUT_STREAMS, db]
    shell = 'exec "$@" <&- >&- 2>&-'
    done = subprocess.run(["sh", "-c", shell, "sh", *command], timeout=60, check=False)
    assert done.returncode == 0
    assert read(db) == {1: (1, b""), 2: (2, b""), 3: (3, b"")}


AT_THE_EXIT = """
import atexit, sys

def clean_up():
    store.shutdown()
    stats = store.stats()
    print(stats.sequence, stats.sequence_durable, flush=True)

if sys.argv[2] == "before":
    atexit.register(clean_up)
from metastore import MetadataStore
store, _ = MetadataStore.recover(sys.argv[1])
store.insert_batch([(1, (1, b""))], sync=False)
if sys.argv[2] == "after":
    atexit.register(clean_up)
"""


@pytest.mark.parametrize("registered", ["before", "after"])
def test_a_shutdown_at_the_exit_makes_durable(db, registered):
    """The store had been given up by then, and the shutdown returned all the same."""
    done = run(AT_THE_EXIT, db, registered)
    assert done.returncode == 0, done.stderr
    assert done.stdout == "1 1\n"
    assert read(db) == {1: (1, b"")}


def _let_threads_idle():
    """Return when the thread of each store has done all that it has to do."""
    for engine in list(engine_module._engines):
        compactor = getattr(engine, "_compactor", None)
        if compactor is not None and compactor._thread is not None:
            compactor.wait_idle()


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.filterwarnings("ignore::ResourceWarning")
def test_an_interrupt_when_all_is_opened_gives_the_lock_up(db):
    """Between the engine and its face nobody gave up either, nor the thread.

    That was started in ``Engine.__init__``, so when this returned nobody knew of it
    yet. Mostly it ended all the same: its first task failed, since the directory had
    been closed. In one run of the tests it had done that task before. So it does here.
    """
    before = threading.active_count()
    opening = {
        "open_engine",
        "Engine.__init__",
        "Engine.start",
        "MetadataStore.__init__",
        "MetadataStore._open",
    }

    class Interrupt(BaseException):
        pass

    for at in itertools.count():
        moments = itertools.count()
        where = []

        def profile(frame, event, argument, at=at, moments=moments, where=where):
            names = [frame.f_code.co_qualname]
            if frame.f_back is not None:
                names.append(frame.f_back.f_code.co_qualname)
            if opening.intersection(names) and next(moments) == at:
                sys.setprofile(None)
                where.append((event, *names))
                _let_threads_idle()
                raise Interrupt

        store = None
        sys.setprofile(profile)
        try:
            store, _ = MetadataStore.recover(db)
        except Interrupt:
            pass
        finally:
            sys.setprofile(None)
        if store is not None:
            store.shutdown()
        if not where:
            break
        join_compactors()
        assert threading.active_count() == before, where
        assert read(db) == {}, where
    assert at > 50


def test_a_logging_handler_that_shuts_down_beside_a_shutdown(db, monkeypatch):
    """It waited for the shutdown, which waited for the thread that it was told in."""
    begun, go_on = threading.Event(), threading.Event()

    def failing(*_arguments, **_options):
        begun.set()
        assert go_on.wait(_SECONDS_MAX)
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(engine_module, "compact", failing)
    store, _ = MetadataStore.recover(db)
    told = []

    class Handler(logging.Handler):
        def emit(self, record):
            told.append(record)
            store.shutdown()

    raised = []

    def tried(call):
        try:
            call()
        except (StoreFailedError, StoreClosedError) as error:
            raised.append(error)

    def compact():
        tried(store.compact)

    def shut_down():
        assert begun.wait(_SECONDS_MAX)
        stop = store._engine._compactor.stop

        def stop_and_let_fail():
            go_on.set()
            stop()

        monkeypatch.setattr(store._engine._compactor, "stop", stop_and_let_fail)
        tried(store.shutdown)

    handler = Handler()
    logger = logging.getLogger("metastore.engine")
    logger.addHandler(handler)
    try:
        store.insert_batch([(1, (1, b""))])
        together(compact, shut_down)
    finally:
        logger.removeHandler(handler)
    assert len(told) == 1
    assert any(isinstance(error, StoreFailedError) for error in raised)
    assert read(db) == {1: (1, b"")}


@pytest.mark.parametrize(
    "threads",
    [np.uint8(128), np.int8(100), type("N", (), {"__index__": lambda _: 2})()],
)
def test_threads_by_another_kind_of_integer(db, threads):
    """It was checked, and then computed with: 2 * 128 is 0 among bytes."""
    write(db, numbered(3))
    assert read(db, threads=threads) == states(numbered(3))[-1]


# A full disk


def fail_to_create(monkeypatch, *, logs_only):
    right = Directory.create

    def create(directory, name):
        if name.startswith("log_") or not logs_only:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), name)
        return right(directory, name)

    monkeypatch.setattr(Directory, "create", create)


def test_a_disk_filled_by_what_was_never_published(db, monkeypatch):
    """A failed compaction left it; opening failed before it came to remove it."""
    write(db, numbered(3))
    garbage = db / "snapshot_0000000000000001.tmp"
    garbage.write_bytes(bytes(1000))
    fail_to_create(monkeypatch, logs_only=True)
    with pytest.raises(OSError, match="No space"):
        MetadataStore.recover(db)
    assert not garbage.exists()
    monkeypatch.undo()
    assert read(db) == states(numbered(3))[-1]


def test_nothing_is_set_aside_for_a_store_that_cannot_be_opened(db, monkeypatch):
    """The next opening found no damage any more, and told nobody of a log less."""
    for batch in numbered(3):
        write(db, [batch])
    logs(db)[1].unlink()
    fail_to_create(monkeypatch, logs_only=True)
    with pytest.raises(OSError, match="No space"):
        MetadataStore.recover(db, on_damage="prefix")
    monkeypatch.undo()
    with pytest.raises(Exception, match="missing"):
        MetadataStore.recover(db)
    store, recovered = MetadataStore.recover(db, on_damage="prefix")
    store.shutdown()
    assert f"quarantine/{logs(db)[-1].name}" not in recovered.report.quarantined
    assert "quarantine/log_0000000000000003" in recovered.report.quarantined
    assert content(recovered) == states(numbered(1))[-1]


def test_what_was_set_aside_is_told_with_a_later_failure(db, monkeypatch):
    for batch in numbered(3):
        write(db, [batch])
    logs(db)[1].unlink()

    def failing(*_):
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(engine_module, "remove_obsolete", failing)
    with pytest.raises(OSError, match="Input/output") as caught:
        MetadataStore.recover(db, on_damage="prefix")
    (note,) = caught.value.__notes__
    assert f"quarantine/{Path(logs(db)[-1]).name[:4]}" in note
