"""Directories in which no store can be: an error that says so, and nothing changed."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import gc
import os
import re
import subprocess
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

import oracle
from metastore import MetadataStore, directory, recovery
from metastore.errors import (
    CorruptionError,
    FormatVersionError,
    StoreFailedError,
    StoreLockedError,
)
from verbs import (
    files,
    flip,
    lasting,
    logs,
    named,
    numbered,
    put,
    read,
    states,
    write,
    write_open,
)

#: What the system says of a place where nothing can be written.
CANNOT_WRITE = "|".join(map(os.strerror, [errno.EPERM, errno.EACCES, errno.EROFS]))
NO_SPACE = os.strerror(errno.ENOSPC)


def descriptors() -> int:
    return len(os.listdir("/proc/self/fd"))


# Paths


def test_a_path_that_is_a_file(tmp_path):
    path = tmp_path / "file"
    path.write_bytes(b"mine")
    with pytest.raises(OSError, match="file") as caught:
        MetadataStore.recover(path)
    assert caught.value.errno in (errno.EEXIST, errno.ENOTDIR)
    assert path.read_bytes() == b"mine"


def test_a_parent_that_is_a_file(tmp_path):
    (tmp_path / "file").write_bytes(b"mine")
    with pytest.raises(OSError, match="file") as caught:
        MetadataStore.recover(tmp_path / "file" / "db")
    assert caught.value.errno in (errno.EEXIST, errno.ENOTDIR)
    assert files(tmp_path) == {"file": b"mine"}


def test_a_link_that_points_nowhere(tmp_path):
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    with pytest.raises(OSError, match="link"):
        MetadataStore.recover(tmp_path / "link")
    assert not (tmp_path / "nowhere").exists()


def test_a_name_that_is_too_long(tmp_path):
    with pytest.raises(OSError, match="xxx") as caught:
        MetadataStore.recover(tmp_path / ("x" * 300))
    assert caught.value.errno == errno.ENAMETOOLONG


# Read-only places. Tests may run as root, whom permissions do not stop.


@pytest.fixture
def frozen(tmp_path: Path) -> Iterator[Path]:
    """A directory, with a store in it, in which no name can be made or removed."""
    path = tmp_path / "frozen"
    write(path, numbered(2))
    if os.geteuid() != 0:
        path.chmod(0o555)
        yield path
        path.chmod(0o755)
        return
    try:
        subprocess.run(["chattr", "+i", path], check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError) as error:
        pytest.skip(f"this file system has no immutable directories: {error}")
    yield path
    subprocess.run(["chattr", "-i", path], check=True)


def test_a_directory_that_cannot_be_written(frozen):
    before = files(frozen)
    for _ in range(2):  # the lock is free again after the first
        with pytest.raises(OSError, match=CANNOT_WRITE) as caught:
            MetadataStore.recover(frozen)
        assert not isinstance(caught.value, StoreLockedError)
    assert files(frozen) == before


def test_a_parent_that_cannot_be_written(frozen):
    with pytest.raises(OSError, match=CANNOT_WRITE):
        MetadataStore.recover(frozen / "db")
    assert not (frozen / "db").exists()


@pytest.fixture
def mounted(tmp_path: Path) -> Iterator[Path]:
    """A small file system of its own: 1 MiB."""
    path = tmp_path / "mounted"
    path.mkdir()
    try:
        subprocess.run(
            ["mount", "-t", "tmpfs", "-o", "size=1m", "none", path],
            check=True,
            capture_output=True,
        )
    except (OSError, subprocess.CalledProcessError) as error:
        pytest.skip(f"no file system can be mounted here: {error}")
    yield path
    gc.collect()  # an error that was caught may still hold on to a map
    subprocess.run(["umount", path], check=True)


def remount(path: Path, options: str) -> None:
    subprocess.run(["mount", "-o", f"remount,{options}", path], check=True)


def test_a_read_only_file_system(mounted):
    write(mounted / "db", numbered(3))
    before = files(mounted)
    remount(mounted, "ro")
    with pytest.raises(OSError, match=os.strerror(errno.EROFS)):
        MetadataStore.recover(mounted / "db")
    with pytest.raises(OSError, match=os.strerror(errno.EROFS)):
        MetadataStore.recover(mounted / "new")
    remount(mounted, "rw")
    assert files(mounted) == before
    assert read(mounted / "db") == states(numbered(3))[-1]


def test_a_full_disk_fails_the_batch_and_keeps_what_was_acknowledged(mounted, rng):
    """The batch fails, the error sticks, what was acknowledged stays."""
    path = mounted / "db"
    store, _ = MetadataStore.recover(path)
    acknowledged = {}

    def fill() -> None:
        for key in range(1, 1000):
            data = rng.randbytes(10_000)
            store.insert_batch([(key, (key, data))])
            acknowledged[key] = (key, data)

    with pytest.raises(OSError, match=NO_SPACE):
        fill()
    assert len(acknowledged) > 10
    with pytest.raises(StoreFailedError, match=NO_SPACE):
        store.insert_batch([(5000, (1, b"small enough, but nothing is retried"))])
    store.shutdown()
    remount(mounted, "size=8m")
    found = read(path)
    assert {key: found[key] for key in acknowledged} == acknowledged
    assert set(found) <= {*acknowledged, len(acknowledged) + 1}
    write(path, [[(6000, (1, b"works again"))]])
    assert read(path)[6000] == (1, b"works again")


def test_recover_on_a_full_disk_changes_nothing_that_is_there(mounted):
    path = mounted / "db"
    write(path, numbered(20))
    before = {name: data for name, data in files(path).items() if "log" in name}
    free = os.statvfs(mounted)
    (mounted / "filler").write_bytes(bytes(free.f_bavail * free.f_frsize))
    with pytest.raises(OSError, match=NO_SPACE):
        MetadataStore.recover(path)
    assert before.items() <= files(path).items()
    (mounted / "filler").unlink()
    assert read(path) == states(numbered(20))[-1]


# Names that are called like files of a store, and are none


@pytest.mark.parametrize("kind", ["log", "snapshot"])
@pytest.mark.parametrize("number", [2**63 - 1, 2**63 - 2, 2**62, 2**40])
def test_a_directory_does_not_use_up_the_numbers(db, kind, number):
    """The story: one directory named log_7fffffffffffffff, and no store opened."""
    write(db, numbered(2))
    (db / f"{kind}_{number:016x}").mkdir()
    (db / f"{kind}_{number:016x}.tmp").mkdir()
    write(db, numbered(2, 3))
    assert max(int(log.name[-16:], 16) for log in logs(db)) < 10
    assert read(db) == states(numbered(4))[-1]


def test_a_temporary_file_does_not_use_up_the_numbers(db):
    write(db, numbered(2))
    (db / "log_7fffffffffffffff.tmp").write_bytes(b"left over")
    write(db, numbered(2, 3))
    assert read(db) == states(numbered(4))[-1]
    assert not (db / "log_7fffffffffffffff.tmp").exists()


def test_a_published_file_does_use_up_the_numbers(db):
    data = oracle.write_log(bytes(range(16)), 2**63 - 1, 1, [[(1, 11, b"")]])
    put(db, {oracle.file_name("log", 2**63 - 1): data})
    with pytest.raises(CorruptionError, match="numbers are used up"):
        MetadataStore.recover(db)


@pytest.mark.parametrize("suffix", ["", ".tmp"])
@pytest.mark.parametrize("kind", ["log", "snapshot"])
def test_a_directory_in_the_way_of_the_next_files_is_passed_by(db, kind, suffix):
    """Rotation and compaction begin at numbers that no name has."""
    write(db, numbered(2))
    for number in (2, 3, 5, 9):
        (db / f"{kind}_{number:016x}{suffix}").mkdir()
    store, _ = MetadataStore.recover(db, log_size_bytes_min=100)
    with store:
        for batch in numbered(20, 3):
            store.insert_batch(batch)
        store.compact()
        store.insert_batch([(1, (1, b"last"))])
        assert min(int(log.name[-16:], 16) for log in logs(db)) > 9
    assert read(db)[1] == (1, b"last")


def test_numbers_begin_behind_every_name_that_a_store_may_reach():
    def number_max(*names: tuple[str, bool]) -> int:
        return directory.parse_listing(names).number_max

    assert number_max() == 0
    log = (f"log_{7:016x}", True)
    near, far = 7 + 2**32, 8 + 2**32
    assert number_max(log) == 7
    assert number_max(log, (f"log_{3:016x}", False)) == 7
    assert number_max(log, (f"snapshot_{near:016x}", False)) == near
    assert number_max(log, (f"log_{far:016x}", False)) == 7
    assert number_max(log, (f"log_{far:016x}.tmp", True)) == 7
    assert number_max((f"log_{far:016x}", True)) == far
    # With the one below it, it may be reached after all.
    both = (f"log_{far:016x}", False), (f"log_{near:016x}.tmp", True)
    assert number_max(log, *both) == far


@pytest.mark.parametrize(
    ("kind", "what"),
    [("log", "link"), ("log", "directory"), ("snapshot", "directory")],
)
def test_what_is_called_like_ours_and_is_no_file_is_told(db, recover, kind, what):
    """A log was a link to another disk: no batch of it was there, and all was clean."""
    stores_of_two_files(db)
    path = named(db, kind)[0]
    if what == "link":
        path.rename(db.with_name("elsewhere"))
        path.symlink_to(db.with_name("elsewhere"))
    else:
        path = path.with_name(f"{kind}_{77:016x}")
        path.mkdir()
    (db / "notes").mkdir()
    (db / f"log_{78:016x}.tmp").mkdir()
    report = recover()[1].report
    assert not report.is_clean
    assert report.ignored == (path.name,)
    *_, ignored, others = str(report).splitlines()
    assert ignored == f"  ignored, since these are no regular files: {path.name}"
    assert others == f"  unknown, left alone: log_{78:016x}.tmp, notes"


@pytest.mark.parametrize(
    ("name", "shown"),
    [
        (b"bad\xff", r"bad\udcff"),
        (b"one\n  damage: none", r"one\n  damage: none"),
        (b"\x1b[2J", r"\x1b[2J"),
        ("\N{LATIN SMALL LETTER E WITH ACUTE}".encode(), None),
    ],
    ids=["no-utf8", "newline", "escape", "accent"],
)
def test_a_report_can_be_printed_whatever_the_names(db, recover, name, shown):
    """A name that is no UTF-8 gave UnicodeEncodeError; one of two lines forged one."""
    write(db, numbered(2))
    (db / os.fsdecode(name)).write_bytes(b"")
    report = recover()[1].report
    assert report.unknown == (os.fsdecode(name),)
    *_, last = str(report).splitlines()
    assert last == f"  unknown, left alone: {shown or os.fsdecode(name)}"
    str(report).encode()


def test_a_report_can_be_printed_whatever_the_directory(db, recover):
    path = db.with_name("new\nline")
    write_open(path, numbered(3))
    flip(logs(path)[0], 64 + 60)
    recovered = recover(path, on_damage="prefix")[1]
    lines = str(recovered.report).splitlines()
    assert len(lines) == 5
    assert all(r"new\nline" in line for line in (lines[0], lines[2]))


# Locking


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS])
def test_a_file_system_without_locks(db, monkeypatch, number):
    write(db, numbered(2))
    before = files(db)
    held = descriptors()

    def refuse(descriptor: int, operation: int) -> None:
        raise OSError(number, os.strerror(number))

    with monkeypatch.context() as patch:
        patch.setattr(fcntl, "flock", refuse)
        with pytest.raises(OSError, match="lock") as caught:
            MetadataStore.recover(db)
    assert caught.value.errno == number
    assert caught.value.filename == str(db)
    assert not isinstance(caught.value, StoreLockedError)
    assert files(db) == before
    assert descriptors() == held
    assert read(db) == states(numbered(2))[-1]


def test_two_openers_in_one_process(db, recover):
    """Who is refused leaves nothing open, and takes nothing from who holds the store.

    The descriptors were once counted while the background opened the next log's file:
    `compact` returns when nothing is left for it to do.
    """
    store, _ = recover()
    store.insert_batch([(1, (1, b"one"))])
    store.compact()
    before = lasting(db)
    held = descriptors()
    for _ in range(3):
        with pytest.raises(StoreLockedError) as caught:
            MetadataStore.recover(db)
        assert caught.value.path == str(db)
        assert caught.value.holder_pid == os.getpid()
    assert lasting(db) == before
    assert descriptors() == held
    assert store.insert_batch([(2, (2, b"two"))]) == 2
    store.shutdown()
    assert read(db) == {1: (1, b"one"), 2: (2, b"two")}


def test_two_names_of_one_directory_are_one_lock(tmp_path, db, recover):
    recover()
    (tmp_path / "link").symlink_to(db)
    with pytest.raises(StoreLockedError):
        MetadataStore.recover(tmp_path / "link")


def test_a_directory_locked_by_someone_else(db, recover):
    """Whoever holds the flock counts, also a program that is no store."""
    db.mkdir()
    descriptor = os.open(db, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        with pytest.raises(StoreLockedError):
            MetadataStore.recover(db)
        assert files(db) == {}
    finally:
        os.close(descriptor)
    recover()


def test_a_failed_recover_frees_the_lock(db, recover):
    write(db, numbered(2))
    held = descriptors()

    def fail(done: int, total: int) -> None:
        raise LookupError

    with pytest.raises(LookupError):
        MetadataStore.recover(db, progress=fail)
    assert descriptors() == held
    recover()


@pytest.mark.parametrize("kind", ["log", "snapshot"])
def test_a_refused_recover_gives_everything_back(db, recover, kind):
    """Descriptors, threads and the lock: the damage can be undone, and all is well."""
    write(db, numbered(4))
    store, _ = recover()
    store.compact()
    store.insert_batch([(100, (1, b""))])
    store.insert_batch([(100, (2, b""))])
    store.shutdown()
    expected = read(db)
    path = named(db, kind)[0]
    gc.collect()  # what earlier tests left
    held = descriptors(), threading.active_count()
    for offset in (5, 64 + 5, 64 + 50):
        flip(path, offset)
        with pytest.raises(CorruptionError):
            MetadataStore.recover(db, threads=2)
        gc.collect()
        assert (descriptors(), threading.active_count()) == held
        flip(path, offset)
    assert read(db) == expected


def stores_of_two_files(path: Path) -> None:
    """A snapshot, and a log behind it."""
    write(path, numbered(4))
    store, _ = MetadataStore.recover(path)
    with store:
        store.compact()
        store.insert_batch([(100, (1, b""))])


@pytest.mark.parametrize("calls", range(1, 5))
@pytest.mark.parametrize("on_damage", ["raise", "prefix"])
@pytest.mark.parametrize(
    "error",
    [
        CorruptionError("other/log", 77, "damage of another store"),
        FormatVersionError("other/log", 2, 0),
        StoreLockedError("other"),
        FileNotFoundError(errno.ENOENT, "of another store"),
    ],
    ids=lambda error: type(error).__name__,
)
def test_an_error_of_who_is_told_the_progress_is_theirs(db, calls, on_damage, error):
    """A CorruptionError had an undamaged store set aside, and a store of none opened.

    With "raise" it got the note that says how to get at this store's batches.
    """
    stores_of_two_files(db)
    before = lasting(db)
    n_calls = 0

    def fail(done: int, total: int) -> None:
        nonlocal n_calls
        n_calls += 1
        if n_calls == calls:
            raise error

    with pytest.raises(type(error)) as caught:
        MetadataStore.recover(db, progress=fail, on_damage=on_damage)
    assert caught.value is error
    assert not hasattr(error, "__notes__")
    assert lasting(db) == before
    n_calls = 0
    opened = directory.Directory.open_existing(str(db))
    with contextlib.closing(opened), pytest.raises(type(error)) as caught:
        recovery.inspect(opened, progress=fail)
    assert caught.value is error


@pytest.mark.parametrize("offset", [5, 64 + 5, 64 + 50, -5])
@pytest.mark.parametrize("kind", ["log", "snapshot"])
@pytest.mark.parametrize("on_damage", ["raise", "prefix"])
def test_an_error_does_not_keep_what_was_read(db, kind, offset, on_damage):
    """A cycle of an error and the frame it had passed kept a damaged snapshot's map.

    With its descriptor, and all that was decoded, until the collector came.
    """
    stores_of_two_files(db)
    flip(named(db, kind)[0], offset % named(db, kind)[0].stat().st_size)
    gc.collect()
    gc.disable()
    try:
        held = descriptors()
        with contextlib.suppress(CorruptionError):
            MetadataStore.recover(db, on_damage=on_damage, threads=2)[0].shutdown()
        assert descriptors() == held
        assert str(db) not in Path("/proc/self/maps").read_text()
    finally:
        gc.enable()


def test_a_network_file_system_is_warned_of(db, recover, monkeypatch, caplog):
    """NFS and its like may break what flock or fsync promise; then somebody is told."""
    recover()[0].shutdown()
    assert "network" not in caplog.text
    monkeypatch.setattr(directory, "_NETWORK", re.compile(".*"))
    recover()[0].shutdown()
    assert f"{db} lies on a network file system" in caplog.text
