"""What every directory must do, the real and the simulated one alike.

Then, of the simulated one alone: what is live, what is durable, and what is neither.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from disk import SECTOR_SIZE, Disk, Fault, Operation
from metastore.directory import (
    Directory,
    DirectoryProtocol,
    FileName,
    publish,
)
from metastore.errors import StoreLockedError
from simulated import SimulatedDirectory

# The contract


class Opener:
    """Opens one and the same directory again and again, as several programs would."""

    def __init__(self, kind: str, path: Path) -> None:
        self._kind = kind
        self._path = str(path)
        self._disk = Disk()
        self._opened: list[DirectoryProtocol] = []

    def __call__(self) -> DirectoryProtocol:
        if self._kind == "real":
            found: DirectoryProtocol = Directory.open_or_create(self._path)
        else:
            found = SimulatedDirectory(self._disk, self._path)
        self._opened.append(found)
        return found

    def close(self) -> None:
        for directory in self._opened:
            directory.close()


@pytest.fixture(params=["real", "simulated"])
def opener(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Opener]:
    found = Opener(request.param, tmp_path)
    yield found
    found.close()


@pytest.fixture
def directory(opener: Opener) -> DirectoryProtocol:
    return opener()


def write(directory: DirectoryProtocol, name: str, data: bytes) -> None:
    file = directory.create(name)
    file.write([data], 0)
    file.sync()
    file.close()


def read(directory: DirectoryProtocol, name: str) -> bytes:
    file = directory.open(name)
    try:
        return bytes(file.read(0, 1 << 20))
    finally:
        file.close()


def test_an_empty_directory_has_no_names(directory):
    assert directory.names() == []


def test_a_new_file_is_empty(directory):
    file = directory.create("a")
    assert file.size() == 0
    assert bytes(file.read(0, 10)) == b""
    assert bytes(file.view()) == b""
    file.close()
    assert directory.names() == [("a", True)]


def test_what_was_written_is_read(directory):
    file = directory.create("a")
    file.write([b"hello"], 0)
    file.write([b"J"], 0)
    file.write([bytearray(b"w"), memoryview(b"orld"), b""], 5)
    assert file.size() == 10
    assert bytes(file.read(0, 10)) == b"Jelloworld"
    assert bytes(file.read(3, 4)) == b"lowo"
    file.close()
    assert read(directory, "a") == b"Jelloworld"


def test_a_read_is_short_only_at_the_end(directory):
    write(directory, "a", b"hello")
    file = directory.open("a")
    assert bytes(file.read(3, 10)) == b"lo"
    assert bytes(file.read(5, 10)) == b""
    assert bytes(file.read(50, 10)) == b""
    assert bytes(file.read(2, 0)) == b""
    file.close()


def test_a_gap_is_zeros(directory):
    file = directory.create("a")
    file.write([b"x"], 2000)
    assert bytes(file.read(0, 4000)) == bytes(2000) + b"x"
    file.close()


def test_writing_nothing_changes_nothing(directory):
    file = directory.create("a")
    file.write([], 0)
    file.write([b""], 100)
    file.write([b"", b""], 100)
    assert file.size() == 0
    file.close()


def test_more_buffers_than_one_call_takes(directory):
    buffers = [b"%04d" % number for number in range(2500)]
    file = directory.create("a")
    file.write(buffers, 7)
    assert bytes(file.read(7, 10_000)) == b"".join(buffers)
    file.close()


def test_wide_buffers_count_in_bytes(directory):
    wide = memoryview(bytes(range(16))).cast("Q")
    file = directory.create("a")
    file.write([wide], 0)
    file.write([wide, b"!"], 16)
    assert bytes(file.read(0, 100)) == bytes(range(16)) * 2 + b"!"
    file.close()


def test_a_view_outlives_its_file(directory):
    write(directory, "a", b"hello")
    file = directory.open("a")
    view = file.view()
    file.close()
    directory.remove("a")
    assert bytes(view) == b"hello"
    assert view.readonly


def test_create_empties_an_old_file(directory):
    write(directory, "a", b"hello")
    file = directory.create("a")
    assert file.size() == 0
    file.write([b"x"], 1)
    file.close()
    assert read(directory, "a") == b"\0x"
    assert directory.names() == [("a", True)]


def test_a_file_opened_for_reading_cannot_be_written(directory):
    write(directory, "a", b"hello")
    file = directory.open("a")
    with pytest.raises(OSError, match="Bad file descriptor"):
        file.write([b"x"], 0)
    file.sync()  # but synced: recovery does
    file.drop_cache()
    assert bytes(file.read(0, 10)) == b"hello"
    file.close()


def test_close_is_idempotent_and_ends_the_file(directory):
    file = directory.create("a")
    file.close()
    file.close()
    for call in (
        file.size,
        file.sync,
        lambda: file.read(0, 1),
        lambda: file.write([b"x"], 0),
    ):
        with pytest.raises((OSError, ValueError), match="descriptor"):
            call()


def test_a_descriptor_is_of_an_open_file_or_none(directory):
    """Group commit writes by it, and by the methods where there is none."""
    file = directory.create("a")
    file.write([b"hello"], 0)
    descriptor = file.descriptor
    assert descriptor == -1 or os.pread(descriptor, 10, 0) == b"hello"
    file.close()
    assert file.descriptor == -1


def test_rename_replaces(directory):
    write(directory, "a", b"new")
    write(directory, "b", b"old")
    directory.rename("a", "b")
    assert directory.names() == [("b", True)]
    assert read(directory, "b") == b"new"


def test_an_open_file_follows_its_bytes_not_its_name(directory):
    file = directory.create("a")
    directory.rename("a", "b")
    file.write([b"1"], 0)
    write(directory, "a", b"other")
    assert read(directory, "b") == b"1"
    directory.remove("b")
    file.write([b"2"], 1)
    assert bytes(file.read(0, 10)) == b"12"
    file.close()
    assert directory.names() == [("a", True)]


@pytest.mark.parametrize("verb", ["open", "remove", "rename", "move"])
def test_a_missing_name_is_an_error(directory, verb):
    other = directory.subdirectory("other")
    arguments = {"rename": ("a", "b"), "move": ("a", other, "b")}.get(verb, ("a",))
    with pytest.raises(FileNotFoundError):
        getattr(directory, verb)(*arguments)
    other.close()


@pytest.mark.parametrize("verb", ["open", "create"])
def test_errors_name_the_file(directory, verb):
    directory.subdirectory("a").close()
    name = {"open": "missing", "create": "a"}[verb]
    with pytest.raises(OSError, match=name) as raised:
        getattr(directory, verb)(name)
    assert raised.value.filename == os.path.join(directory.path, name)


def test_a_directory_is_not_a_file(directory):
    directory.subdirectory("inside").close()
    write(directory, "a", b"")
    assert sorted(directory.names()) == [("a", True), ("inside", False)]
    with pytest.raises(IsADirectoryError):
        directory.create("inside")
    with pytest.raises(OSError, match=r"directory|permitted"):
        directory.remove("inside")
    with pytest.raises(IsADirectoryError):
        directory.rename("a", "inside")
    with pytest.raises(NotADirectoryError):
        directory.subdirectory("a")


def test_a_file_moves_into_a_subdirectory(directory):
    write(directory, "a", b"hello")
    inside = directory.subdirectory("inside")
    directory.move("a", inside, "b")
    inside.sync()
    directory.sync()
    assert directory.names() == [("inside", False)]
    assert inside.names() == [("b", True)]
    assert read(inside, "b") == b"hello"
    inside.close()
    again = directory.subdirectory("inside")
    assert read(again, "b") == b"hello"
    assert again.path == os.path.join(directory.path, "inside")
    again.close()


def test_publish(directory):
    name = FileName("log", 3)
    write(directory, name.temporary, b"hello")
    publish(directory, name)
    assert directory.names() == [("log_0000000000000003", True)]


def test_the_lock_is_exclusive_and_ends_with_close(opener):
    first, second = opener(), opener()
    first.lock()
    with pytest.raises(StoreLockedError, match="locked"):
        second.lock()
    first.close()
    first.close()
    second.lock()


def test_a_closed_directory_does_nothing(directory):
    directory.close()
    for call in (
        directory.sync,
        directory.names,
        lambda: directory.open("a"),
        lambda: directory.create("a"),
        lambda: directory.remove("a"),
        lambda: directory.rename("a", "b"),
        lambda: directory.subdirectory("a"),
    ):
        with pytest.raises((OSError, ValueError), match="descriptor"):
            call()


# Live and durable


def test_bytes_are_durable_after_a_sync():
    disk = Disk()
    directory = SimulatedDirectory(disk)
    file = directory.create("a")
    directory.sync()
    file.write([b"hello"], 0)
    assert disk.live_image() == {"a": b"hello"}
    assert disk.durable_image() == {"a": b""}
    file.sync()
    assert disk.durable_image() == {"a": b"hello"}
    file.write([b"J"], 0)
    assert disk.durable_image() == {"a": b"hello"}


def test_names_are_durable_after_a_sync_of_their_directory():
    disk = Disk({"a": b"1", "b": b"2"})
    directory = SimulatedDirectory(disk)
    write(directory, "c", b"3")
    directory.rename("a", "d")
    directory.remove("b")
    assert disk.live_image() == {"c": b"3", "d": b"1"}
    assert disk.durable_image() == {"a": b"1", "b": b"2"}
    directory.sync()
    assert disk.durable_image() == disk.live_image()


def test_a_move_is_durable_on_each_side_after_its_sync():
    disk = Disk({"a": b"1"})
    directory = SimulatedDirectory(disk)
    inside = directory.subdirectory("q")
    directory.move("a", inside, "b")
    assert disk.durable_image() == {"a": b"1", "q": {}}
    inside.sync()
    assert disk.durable_image() == {"a": b"1", "q": {"b": b"1"}}
    directory.sync()
    assert disk.durable_image() == {"q": {"b": b"1"}}


def test_a_copy_is_a_disk_of_its_own():
    disk = Disk()
    directory = SimulatedDirectory(disk)
    directory.lock()
    file = directory.create("a")
    file.write([b"hello"], 0)
    other = disk.copy()
    file.sync()
    directory.sync()
    assert other.durable_image() == {}
    assert other.live_image() == {"a": b"hello"}
    again = SimulatedDirectory(other)
    again.lock()  # whoever held it was killed
    again.sync()
    assert other.durable_image() == {"a": b""}
    opened = again.open("a")
    opened.sync()
    assert other.durable_image() == {"a": b"hello"}
    assert other.opened == ["simulated", "simulated/a"]


# Faults


def fail(kind: str, fault: Fault, disk: Disk) -> None:
    """Let every call of `kind` fail."""
    disk.before = lambda operation: fault if operation.kind == kind else None


def test_each_call_is_announced():
    disk = Disk()
    seen: list[Operation] = []
    disk.before = seen.append
    directory = SimulatedDirectory(disk)
    directory.lock()
    file = directory.create("a.tmp")
    file.write([b"12", b"3"], 0)
    file.sync()
    file.close()
    directory.rename("a.tmp", "a")
    directory.sync()
    directory.subdirectory("q").close()
    assert [(found.kind, found.name, found.size) for found in seen] == [
        ("lock", ".", 0),
        ("create", "a.tmp", 0),
        ("write", "a.tmp", 3),
        ("sync", "a.tmp", 0),
        ("close", "a.tmp", 0),
        ("rename", "a", 0),
        ("sync_directory", ".", 0),
        ("make", "q", 0),
        ("sync_directory", ".", 0),
        ("close", ".", 0),
    ]


def test_a_short_write_leaves_what_arrived():
    disk = Disk()
    file = SimulatedDirectory(disk).create("a")
    fail("write", Fault(errno.ENOSPC, kept=0.5), disk)
    with pytest.raises(OSError, match=r"No space .*simulated.a") as raised:
        file.write([b"hello", b"you"], 0)
    assert raised.value.errno == errno.ENOSPC
    assert disk.live_image() == {"a": b"hell"}


@pytest.mark.parametrize("kept", [0.0, 0.5, 1.0])
def test_a_failed_sync_leaves_clean_pages_that_are_not_durable(kept):
    disk = Disk({"a": b""})
    file = SimulatedDirectory(disk).create("a")
    old, new = bytes([1]) * SECTOR_SIZE, bytes([2]) * SECTOR_SIZE
    file.write([old, new], 0)
    fail("sync", Fault(kept=kept), disk)
    with pytest.raises(OSError, match="Input/output error"):
        file.sync()
    disk.before = None
    kept_size = int(2 * SECTOR_SIZE * kept)
    assert disk.durable_image() == {"a": (old + new)[:kept_size]}

    file.sync()  # says that all is well, and writes nothing but the size
    survivors = (old + new)[:kept_size].ljust(2 * SECTOR_SIZE, b"\0")
    assert disk.durable_image() == {"a": survivors}
    assert bytes(file.read(0, 2000)) == old + new
    file.write([b"!"], 2 * SECTOR_SIZE)
    file.drop_cache()
    assert bytes(file.read(0, 2000)) == survivors + b"!"


def test_names_are_never_sure_after_a_failed_sync():
    disk = Disk()
    directory = SimulatedDirectory(disk)
    write(directory, "a", b"1")
    fail("sync_directory", Fault(), disk)
    with pytest.raises(OSError, match="Input/output error"):
        directory.sync()
    disk.before = None
    directory.sync()
    assert disk.durable_image() == {}
    assert disk.live_image() == {"a": b"1"}


@pytest.mark.parametrize("kept", [0, 1])
def test_a_failed_rename_may_have_happened(kept):
    disk = Disk({"a": b"1"})
    directory = SimulatedDirectory(disk)
    fail("rename", Fault(kept=kept), disk)
    with pytest.raises(OSError, match="injected"):
        directory.rename("a", "b")
    assert disk.live_image() == {"ba"[not kept]: b"1"}


def test_what_is_open_is_known():
    disk = Disk({"a": b""})
    directory = SimulatedDirectory(disk)
    file = directory.open("a")
    fail("close", Fault(), disk)
    assert disk.opened == ["simulated", "simulated/a"]
    with pytest.raises(OSError, match="injected"):
        file.close()
    file.close()  # the descriptor is gone, whatever close said
    disk.before = None
    directory.close()
    assert disk.opened == []
