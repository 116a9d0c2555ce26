"""What the processes of the demo share: files of a tree, the heap they go to."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import itertools
import os
import stat
import struct
import threading
from types import TracebackType

from metastore.directory import Directory, File
from metastore.errors import MetastoreError
from metastore.report import printable

__all__ = [
    "CHUNK_SIZE",
    "STORE",
    "DemoError",
    "Heap",
    "Manifest",
    "Source",
    "UnreadableError",
    "difference",
    "file_key",
    "pack_user_data",
    "read_paths",
    "shown",
    "unpack_user_data",
    "walk",
]

#: Names in the working directory of a demo.
STORE = "store"
_HEAP = "heap"
_MANIFEST = "files"

#: Files are copied and compared in pieces of at most this size.
CHUNK_SIZE = 4 << 20

_LENGTH = struct.Struct("<Q")


def file_key(path: bytes) -> int:
    """Return the key of a file: a 64-bit hash of its path below the tree."""
    return int.from_bytes(hashlib.blake2b(path, digest_size=8).digest(), "little")


def pack_user_data(length: int, path: bytes) -> bytes:
    """Return the user data of a file: its length as u64, then its path."""
    return _LENGTH.pack(length) + path


def unpack_user_data(user_data: bytes) -> tuple[int, bytes]:
    """Return length and path from the user data of a file.

    Raises
    ------
    ValueError
        If the user data are too short to be those of a file.
    """
    if len(user_data) < _LENGTH.size:
        raise ValueError(f"user data of {len(user_data)} bytes hold no length")
    (length,) = _LENGTH.unpack_from(user_data)
    return length, user_data[_LENGTH.size :]


class DemoError(MetastoreError):
    """The demo cannot go on: nothing to store, two equal keys, a child that gave up."""


class UnreadableError(Exception):
    """A file of the tree cannot be read: it is skipped and counted."""


class Source:
    """A file of the tree, open for reading."""

    def __init__(self, path: bytes) -> None:
        # A name may have become a link or a pipe since the tree was walked.
        flags = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
        try:
            self._descriptor = os.open(path, flags)
        except OSError as error:
            raise UnreadableError(error.strerror) from error
        status = os.fstat(self._descriptor)
        if not stat.S_ISREG(status.st_mode):
            os.close(self._descriptor)
            raise UnreadableError("no longer a regular file")
        self._bytes_left = status.st_size
        self.size = status.st_size

    def __enter__(self) -> Source:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        os.close(self._descriptor)

    def read(self, size: int) -> bytes:
        """Return the next `size` bytes, fewer only at the end of the file.

        The end is where it was when the file was opened: a file that grows meanwhile
        does not keep us here.
        """
        wanted = min(size, self._bytes_left)
        parts = []
        while wanted > 0:
            try:
                part = os.read(self._descriptor, wanted)
            except OSError as error:
                raise UnreadableError(error.strerror) from error
            if not part:
                break
            parts.append(part)
            wanted -= len(part)
            self._bytes_left -= len(part)
        return b"".join(parts)

    def fingerprint(self) -> tuple[int, int]:
        """Return size and time of change as they are now: other ones, another file."""
        status = os.fstat(self._descriptor)
        return status.st_size, status.st_mtime_ns


class Heap:
    """An append-only file of bytes that several threads write at once."""

    def __init__(self, directory: str) -> None:
        path = os.path.join(directory, _HEAP)
        flags = os.O_RDWR | os.O_CREAT | os.O_CLOEXEC
        self._file = File(os.open(path, flags, 0o666), path)
        parent = Directory.open_existing(directory)
        try:
            parent.sync()  # or a power loss could take the name of a synced heap
        finally:
            parent.close()
        self._end = self._file.size()
        self._lock = threading.Lock()

    def size(self) -> int:
        """Return the size of the heap, bytes that nothing points to among them."""
        return self._file.size()

    def append(self, source: Source) -> tuple[int, int]:
        """Copy a file; return offset and length. It is durable after :meth:`sync`."""
        with self._lock:
            offset = self._end
            self._end += source.size
        length = 0
        while chunk := source.read(CHUNK_SIZE):
            self._file.write([chunk], offset + length)
            length += len(chunk)
        return offset, length

    def read(self, offset: int, size: int) -> bytes:
        """Return the `size` bytes at `offset`, fewer only at the end of the heap."""
        return bytes(self._file.read(offset, size))

    def sync(self) -> None:
        """Make everything appended so far durable."""
        self._file.sync()

    def close(self) -> None:
        """Give the descriptor back."""
        self._file.close()


def shown(path: bytes) -> str:
    """Return a path as one printable line."""
    return printable(os.fsdecode(path))


@dataclasses.dataclass
class Manifest:
    """The files of a tree as they were found, numbered in the order of their paths."""

    tree: bytes
    paths: list[bytes] = dataclasses.field(default_factory=list)
    #: Size and time of change of each: other ones, and the file is not the same.
    fingerprints: list[tuple[int, int]] = dataclasses.field(default_factory=list)
    numbers: dict[int, int] = dataclasses.field(default_factory=dict)
    #: Links, pipes, sockets and devices.
    n_special: int = 0
    n_directories_unreadable: int = 0

    def add(self, path: bytes, status: os.stat_result) -> None:
        """Add a file; two paths of one key are an error."""
        key = file_key(path)
        if key in self.numbers:
            other = self.paths[self.numbers[key]]
            raise DemoError(
                f"two paths have the same 64-bit hash, {key:#018x}, so the demo cannot "
                f"tell them apart: {shown(other)} and {shown(path)}"
            )
        self.numbers[key] = len(self.paths)
        self.paths.append(path)
        self.fingerprints.append((status.st_size, status.st_mtime_ns))

    def write(self, directory: str) -> None:
        """Write the paths for :func:`read_paths`, each ended by a zero byte."""
        with open(os.path.join(directory, _MANIFEST), "wb") as listing:
            listing.writelines(path + b"\0" for path in self.paths)


def read_paths(directory: str) -> list[bytes]:
    """Return the paths that :meth:`Manifest.write` wrote."""
    with open(os.path.join(directory, _MANIFEST), "rb") as listing:
        return listing.read().split(b"\0")[:-1]


def walk(tree: str) -> Manifest:
    """List the regular files below `tree`, in order; links are not followed."""
    manifest = Manifest(os.fsencode(tree))
    found = []
    pending = [b""]
    while pending:
        below = pending.pop()
        try:
            with os.scandir(os.path.join(manifest.tree, below)) as listing:
                children = list(listing)
        except OSError:
            if not below:  # the tree itself: there is nothing to show
                raise
            manifest.n_directories_unreadable += 1
            continue
        for child in children:
            path = os.path.join(below, child.name)
            if child.is_dir(follow_symlinks=False):
                pending.append(path)
            elif child.is_file(follow_symlinks=False):
                with contextlib.suppress(FileNotFoundError):  # gone again: never seen
                    found.append((path, child.stat(follow_symlinks=False)))
            else:
                manifest.n_special += 1
    for path, status in sorted(found):
        manifest.add(path, status)
    return manifest


def difference(source: Source, heap: Heap, offset: int, length: int) -> int | None:
    """Return from which byte on a stored file differs from its source, if it does."""
    position = 0
    while True:
        found = source.read(CHUNK_SIZE)
        stored = heap.read(offset + position, min(CHUNK_SIZE, length - position))
        if found != stored:
            pairs = zip(found, stored, strict=False)
            same = itertools.takewhile(lambda pair: pair[0] == pair[1], pairs)
            return position + sum(1 for _ in same)
        if not found:
            return None
        position += len(found)
