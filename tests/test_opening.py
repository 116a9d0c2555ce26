"""What opening and ending a store owe to the process and the disk around it."""

from __future__ import annotations

import errno
import os
import subprocess
import sys

import pytest

from metastore import MetadataStore, StoreLockedError
from verbs import numbered, read, states, write

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
