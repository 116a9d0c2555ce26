"""The directory of a store: names, the lock, and every durability system call.

No other module parses a name or calls the operating system for something that has to
survive a crash. Tests put a simulated directory with the same methods in its place.
"""

from __future__ import annotations

import contextlib
import ctypes
import dataclasses
import errno
import fcntl
import mmap
import os
import re
import sys
import weakref
from collections.abc import Iterable, Iterator, Sequence
from typing import Protocol

import numpy as np

from metastore.errors import StoreClosedError, StoreLockedError
from metastore.format import FILE_HEADER_SIZE, NUMBER_MAX, FileHeader

__all__ = [
    "QUARANTINE",
    "WARNING",
    "Buffer",
    "Directory",
    "DirectoryProtocol",
    "File",
    "FileName",
    "FileProtocol",
    "Listing",
    "file_sizes",
    "is_cached",
    "parse_listing",
    "publish",
    "read_header",
    "release_pages",
    "scattered_reads",
]

Buffer = bytes | bytearray | memoryview

WARNING = "DO_NOT_PUT_YOUR_FILES_HERE"
QUARANTINE = "quarantine"

_NAME = re.compile(r"(log|snapshot)_([0-9a-f]{16})(\.tmp)?")
_TEMPORARY_SUFFIX = ".tmp"
#: More files than a store begins before it is opened again: one every millisecond, with
#: three syncs each, for 49 days.
_NUMBERS_AHEAD = 1 << 32
#: File systems that may not keep what `flock` and `fsync` promise.
_NETWORK = re.compile(
    r"9p|afs|beegfs|ceph|cifs|davfs|fuse\.(sshfs|glusterfs|ceph|s3fs|rclone|juicefs)"
    r"|glusterfs|lustre|ncpfs|nfs4?|smb3?|smbfs|vboxsf|virtiofs"
)
#: Linux takes at most 1,024 buffers in one call.
_BUFFERS_MAX = 1024
#: A part is read into the page cache in pieces, since it is only the cache that wants
#: them: such a piece stays in the processor's own.
_SCRATCH_SIZE = 64 << 10

_mincore = ctypes.CDLL(None).mincore
_mincore.argtypes = ctypes.c_void_p, ctypes.c_size_t, ctypes.POINTER(ctypes.c_ubyte)


@dataclasses.dataclass(frozen=True, order=True)
class FileName:
    """What the name of a log or a snapshot says (docs/format.md, section 1)."""

    kind: str
    number: int

    def __str__(self) -> str:
        return f"{self.kind}_{self.number:016x}"

    @property
    def temporary(self) -> str:
        """The name until the file is published."""
        return f"{self}{_TEMPORARY_SUFFIX}"


@dataclasses.dataclass(frozen=True)
class Listing:
    """The names in a directory, by what they mean; numbers ascend."""

    snapshots: tuple[FileName, ...]
    logs: tuple[FileName, ...]
    temporaries: tuple[str, ...]
    unknown: tuple[str, ...]
    #: New files have greater numbers than this; see :func:`parse_listing`.
    number_max: int


def parse_listing(names: Sequence[tuple[str, bool]]) -> Listing:
    """Sort the names of a directory.

    A new file must not meet the name of a temporary, or of a directory that is called
    like a log: so their numbers count, too. But such a name is no file of a store, and
    must not use up the numbers: one that no store will reach does not count.

    Parameters
    ----------
    names : sequence of (str, bool)
        Each name, and whether it is a regular file.
    """
    found: dict[str, list[FileName]] = {"log": [], "snapshot": []}
    temporaries: list[str] = []
    unknown: list[str] = []
    numbers_met = []
    for name, is_file in sorted(names):
        match = _NAME.fullmatch(name)
        number = int(match[2], 16) if match else 0
        if match is None or not 1 <= number <= NUMBER_MAX:
            if name not in (WARNING, QUARANTINE):
                unknown.append(name)
            continue
        if is_file and not match[3]:
            found[match[1]].append(FileName(match[1], number))
            continue
        numbers_met.append(number)
        (temporaries if is_file else unknown).append(name)
    files = [*found["log"], *found["snapshot"]]
    number_max = max((name.number for name in files), default=0)
    for number in sorted(numbers_met):
        if number <= number_max + _NUMBERS_AHEAD:
            number_max = max(number_max, number)
    return Listing(
        snapshots=tuple(sorted(found["snapshot"])),
        logs=tuple(sorted(found["log"])),
        temporaries=tuple(temporaries),
        unknown=tuple(unknown),
        number_max=number_max,
    )


class FileProtocol(Protocol):
    """What the store asks of a file; offsets and sizes in bytes."""

    @property
    def path(self) -> str:
        """The file as errors name it."""
        ...

    @property
    def descriptor(self) -> int:
        """For writing and syncing in C; -1 if the methods have to be called."""
        ...

    def size(self) -> int:
        """Return the size of the file now."""
        ...

    def read(self, offset: int, size: int) -> Buffer:
        """Return the `size` bytes at `offset`, fewer only at the end of the file."""
        ...

    def view(self) -> memoryview:
        """Return the whole file, read-only; valid as long as it is referenced."""
        ...

    def write(self, buffers: Sequence[Buffer], offset: int) -> None:
        """Write `buffers` one after another at `offset`, whole or raise."""
        ...

    def sync(self) -> None:
        """Make everything written to this file durable, or raise."""
        ...

    def drop_cache(self) -> None:
        """Ask that later reads come from the medium, where the system can."""
        ...

    def fetch(self, offset: int, size: int) -> None:
        """Read a part into the page cache, as far as the system can, or raise."""
        ...

    def close(self) -> None:
        """Give the descriptor back; idempotent."""
        ...


class DirectoryProtocol(Protocol):
    """What the store asks of a directory. Names are relative to it."""

    @property
    def path(self) -> str:
        """The directory as errors name it."""
        ...

    def lock(self) -> None:
        """Take the exclusive lock at once, or raise StoreLockedError."""
        ...

    def names(self) -> list[tuple[str, bool]]:
        """Return each name, and whether it is a regular file."""
        ...

    def open(self, name: str) -> FileProtocol:
        """Open a file for reading and syncing."""
        ...

    def create(self, name: str) -> FileProtocol:
        """Create a file, or empty an old one, for writing."""
        ...

    def rename(self, old: str, new: str) -> None:
        """Rename atomically; durable after :meth:`sync`."""
        ...

    def remove(self, name: str) -> None:
        """Remove a file; durable after :meth:`sync`."""
        ...

    def sync(self) -> None:
        """Make created, renamed and removed names durable, or raise."""
        ...

    def subdirectory(self, name: str) -> DirectoryProtocol:
        """Open the directory `name` in this one; if missing, create it and sync."""
        ...

    def move(self, name: str, other: DirectoryProtocol, new: str) -> None:
        """Rename a file into `other`; durable after both were synced, `other` first."""
        ...

    def close(self) -> None:
        """Give the descriptor, and with it the lock, back; idempotent."""
        ...


class _Opened:
    """What is open belongs to who opened it: a forked child may read and close it.

    Not even a sync is the child's: it would take the error that is its parent's to be
    told. A signal handler may fork, and its child return into any call: so who was
    forked shows in what was counted before the descriptor was got, and is asked in the
    expression that uses it, where no handler can come between.
    """

    def __init__(self, descriptor: int, path: str, n_forks: int | None = None) -> None:
        self._descriptor = descriptor
        self.path = path
        self._n_forks = _n_forks if n_forks is None else n_forks

    def _own(self) -> int:
        """Return the descriptor, to change what it refers to, or raise in a fork."""
        if self._n_forks != _n_forks:
            raise StoreClosedError.in_a_fork(self.path)
        return self._descriptor

    def close(self) -> None:
        """Give the descriptor back, and with it a lock; idempotent. Maps stay valid."""
        if self._descriptor >= 0:
            descriptor, self._descriptor = self._descriptor, -1
            os.close(descriptor)


class File(_Opened):
    """An open file of a real directory. Reads and writes are thread-safe."""

    @property
    def descriptor(self) -> int:
        """That of the operating system; who keeps it keeps the file from closing."""
        return self._descriptor

    def size(self) -> int:
        """Return the size of the file now, in bytes."""
        return os.fstat(self._descriptor).st_size

    def read(self, offset: int, size: int) -> Buffer:
        """Return the `size` bytes at `offset`, fewer only at the end of the file."""
        parts = []
        while size > 0:
            try:
                part = os.pread(self._descriptor, size, offset)
            except OSError as error:
                error.filename = self.path
                raise
            if not part:
                break
            parts.append(part)
            offset += len(part)
            size -= len(part)
        return parts[0] if len(parts) == 1 else b"".join(parts)

    def view(self) -> memoryview:
        """Return the whole file as a read-only map."""
        size = self.size()
        if size == 0:  # an empty file cannot be mapped
            return memoryview(b"")
        mapped = mmap.mmap(self._descriptor, size, prot=mmap.PROT_READ)
        return memoryview(mapped)

    def write(self, buffers: Sequence[Buffer], offset: int) -> None:
        """Write `buffers` one after another at `offset`, whole or raise."""
        if len(buffers) == 1:
            self._write_one(memoryview(buffers[0]).cast("B"), offset)
            return
        for start in range(0, len(buffers), _BUFFERS_MAX):
            some = buffers[start : start + _BUFFERS_MAX]
            size = sum(len(buffer) for buffer in some)
            written = os.pwritev(self._own(), some, offset)
            if written < size:  # short: above 2 GiB, or when the disk fills up
                rest = memoryview(b"".join(some))[written:]
                self._write_one(rest, offset + written)
            offset += size

    def _write_one(self, view: memoryview, offset: int) -> None:
        while view:
            written = os.pwrite(self._own(), view, offset)
            if written == 0:
                raise OSError(errno.EIO, "write made no progress", self.path)
            view = view[written:]
            offset += written

    def sync(self) -> None:
        """Make everything written to this file durable, or raise."""
        if sys.platform == "darwin":
            fcntl.fcntl(self._own(), fcntl.F_FULLFSYNC)
        else:
            os.fdatasync(self._own())

    def drop_cache(self) -> None:
        """Ask that later reads come from the medium, where the system can."""
        if hasattr(os, "posix_fadvise"):
            os.posix_fadvise(self._descriptor, 0, 0, os.POSIX_FADV_DONTNEED)

    def fetch(self, offset: int, size: int) -> None:
        """Read a part into the page cache, as far as the system can.

        Raises
        ------
        OSError
            If it cannot be read: who touched that part of a map would get a signal
            instead, which ends the process. A medium, or the file system on it, has
            more ways to say so than EIO. That the file was closed is no such error.
        """
        scratch = memoryview(bytearray(min(size, _SCRATCH_SIZE)))
        end = offset + size
        try:
            while offset < end:
                n_whole, rest = divmod(end - offset, len(scratch))
                buffers = [scratch] * min(n_whole, _BUFFERS_MAX) or [scratch[:rest]]
                n_read = os.preadv(self._descriptor, buffers, offset)
                if n_read == 0:
                    break
                offset += n_read
        except OSError as error:
            if error.errno != errno.EBADF:
                raise OSError(error.errno, error.strerror, self.path) from error


class Directory(_Opened):
    """A real directory, held open: renaming it or changing the cwd is harmless."""

    @classmethod
    def open_or_create(cls, path: str) -> Directory:
        """Open the directory `path`; if missing, create it; its name is durable then.

        Also where it was there: whoever made it may not have got so far as to sync.
        """
        if "\0" in path:
            raise ValueError(f"a path without null characters is needed, not {path!r}")
        # As it is: behind a link, `..` is not what a normalised path takes it for.
        missing, there = [], path.rstrip("/") or path
        while not os.path.lexists(there):
            missing.append(there)
            there = os.path.dirname(there) or "."
        cls._sync_above(there)
        for name in reversed(missing):
            with contextlib.suppress(FileExistsError):  # another process was faster
                os.mkdir(name)
            cls._sync_above(name)
        return cls.open_existing(path)

    @classmethod
    def _sync_above(cls, path: str) -> None:
        """Make the name of the directory `path` durable, if we may open its parent."""
        with contextlib.suppress(PermissionError):
            parent = cls.open_existing(os.path.join(path, ".."))
            with contextlib.closing(parent):
                parent.sync()

    @classmethod
    def open_existing(cls, path: str) -> Directory:
        """Open the directory `path`, which must exist."""
        n_forks = _n_forks
        flags = os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC
        return cls(_above_standard(os.open(path, flags)), path, n_forks)

    def network_type(self) -> str | None:
        """Return the type of the network file system that this lies on, if known."""
        status = os.fstat(self._descriptor)
        device = f"{os.major(status.st_dev)}:{os.minor(status.st_dev)}"
        try:
            with open("/proc/self/mountinfo", encoding="utf-8", errors="replace") as f:
                for line in f:
                    mount, _, source = line.partition(" - ")
                    kind = source.split(" ", 1)[0]
                    if mount.split()[2:3] == [device] and _NETWORK.fullmatch(kind):
                        return kind
        except OSError:  # only a courtesy: not every system tells
            pass
        return None

    def lock(self) -> None:
        """Take the exclusive lock at once, or raise StoreLockedError."""
        _locked.add(self)
        try:
            fcntl.flock(self._own(), fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno in (errno.EWOULDBLOCK, errno.EACCES):
                raise StoreLockedError(self.path, self._lock_holder()) from None
            raise OSError(
                error.errno,
                f"{os.strerror(error.errno or 0)}: this file system cannot lock "
                "a directory, and without the lock a store is not safe",
                self.path,
            ) from error

    def _lock_holder(self) -> int | None:
        status = os.fstat(self._descriptor)
        device = f"{os.major(status.st_dev):02x}:{os.minor(status.st_dev):02x}"
        wanted = f"{device}:{status.st_ino}"
        try:
            with open("/proc/locks", encoding="ascii") as lines:
                for line in lines:
                    fields = line.split()
                    if fields[1:2] == ["FLOCK"] and fields[5:6] == [wanted]:
                        return int(fields[4])
        except OSError:  # only a courtesy: not every system tells
            pass
        return None

    def names(self) -> list[tuple[str, bool]]:
        """Return each name, and whether it is a regular file (a link is not)."""
        if self._descriptor < 0:  # scandir takes -1 for the working directory
            raise ValueError(f"bad descriptor: the directory was closed ({self.path})")
        with os.scandir(self._descriptor) as found:
            return [(item.name, item.is_file(follow_symlinks=False)) for item in found]

    def open(self, name: str) -> File:
        """Open a file for reading and syncing."""
        return self._open(name, os.O_RDONLY | os.O_NOFOLLOW)

    def create(self, name: str) -> File:
        """Create a file, or empty an old one, for writing."""
        return self._open(name, os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW)

    def _open(self, name: str, flags: int) -> File:
        path = os.path.join(self.path, name)
        flags |= os.O_CLOEXEC
        try:
            here = self._own() if flags & os.O_CREAT else self._descriptor
            descriptor = os.open(name, flags, 0o666, dir_fd=here)
        except OSError as error:
            error.filename = path
            raise
        return File(_above_standard(descriptor), path, self._n_forks)

    def rename(self, old: str, new: str) -> None:
        """Rename atomically; durable after :meth:`sync`."""
        here = self._own()
        os.rename(old, new, src_dir_fd=here, dst_dir_fd=here)

    def remove(self, name: str) -> None:
        """Remove a file; durable after :meth:`sync`."""
        os.unlink(name, dir_fd=self._own())

    def sync(self) -> None:
        """Make created, renamed and removed names durable, or raise."""
        os.fsync(self._own())

    def subdirectory(self, name: str) -> Directory:
        """Open the directory `name` in this one; if missing, create it and sync."""
        try:
            os.mkdir(name, dir_fd=self._own())
        except FileExistsError:
            pass
        self.sync()
        flags = os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC
        descriptor = _above_standard(os.open(name, flags, dir_fd=self._descriptor))
        return Directory(descriptor, os.path.join(self.path, name), self._n_forks)

    def move(self, name: str, other: DirectoryProtocol, new: str) -> None:
        """Rename a file into `other`; durable after both were synced, `other` first."""
        assert isinstance(other, Directory)
        here, there = self._own(), other._own()
        os.rename(name, new, src_dir_fd=here, dst_dir_fd=there)


def _above_standard(descriptor: int) -> int:
    """Return a descriptor that is not one of the standard streams'.

    In a process that was started without them, they are the first that are free; and
    what somebody writes to stderr all the same would go into a store's file.
    """
    if descriptor > 2:
        return descriptor
    try:
        return fcntl.fcntl(descriptor, fcntl.F_DUPFD_CLOEXEC, 3)
    finally:
        os.close(descriptor)


#: How often this process, or one that it descends from, was forked. The number of a
#: process may come again; this one does not.
_n_forks = 0

#: Directories whose descriptor holds, or held, a lock. A forked child shares it, and
#: the lock lasts as long as anybody has it: so a child gives it back.
_locked: weakref.WeakSet[Directory] = weakref.WeakSet()


def _unlock_after_fork() -> None:
    global _n_forks
    _n_forks += 1
    for directory in list(_locked):
        directory.close()


os.register_at_fork(after_in_child=_unlock_after_fork)


def file_sizes(
    directory: DirectoryProtocol, names: Iterable[FileName]
) -> dict[FileName, int]:
    """Return the sizes of files in bytes, one open at a time: there may be many."""
    sizes = {}
    for name in names:
        with contextlib.closing(directory.open(str(name))) as file:
            sizes[name] = file.size()
    return sizes


def read_header(file: FileProtocol, name: FileName) -> FileHeader:
    """Return the header of a log or snapshot; the file must be what its name says."""
    data = bytes(file.read(0, FILE_HEADER_SIZE))
    return FileHeader.unpack(data, name.kind, name.number, file.path)


def release_pages(view: memoryview, start: int, stop: int) -> None:
    """Give the pages of a part of a map that was read back to the page cache.

    They stay readable; but they do not count as this process's memory any more.
    """
    if isinstance(view.obj, mmap.mmap):
        start = -(-start // mmap.PAGESIZE) * mmap.PAGESIZE
        size = stop // mmap.PAGESIZE * mmap.PAGESIZE - start
        if size > 0:
            with contextlib.suppress(OSError):  # as where all memory is locked
                view.obj.madvise(mmap.MADV_DONTNEED, start, size)


def is_cached(view: memoryview, step: int) -> bool:
    """Return whether a map is in the page cache.

    Of up to 8 MiB each page is asked for, since a file's header has just been read, and
    would stand for its whole first step (18 us for a MiB). Of a larger map one page of
    every `step` bytes: all of 107 MB would take 2 ms of 28.

    A call that reads without a wait would tell as well; but where the answer is no, it
    has that page read, and before a page that is there already the system goes back to
    small pieces (107 MB: 25 ms more).
    """
    if not isinstance(view.obj, mmap.mmap):
        return True
    start = np.frombuffer(view, np.uint8).ctypes.data
    size = 1
    if len(view) <= 8 << 20:
        size = step = max(len(view), 1)
    # Ones: so it stays where the system cannot tell.
    are_there = np.ones(-(-size // mmap.PAGESIZE), np.uint8)
    pointer = are_there.ctypes.data_as(ctypes.POINTER(ctypes.c_ubyte))
    for offset in range(0, len(view), step):
        _mincore(start + offset // mmap.PAGESIZE * mmap.PAGESIZE, size, pointer)
        if not (are_there & 1).all():
            return False
    return True


@contextlib.contextmanager
def scattered_reads(view: memoryview) -> Iterator[None]:
    """Have the system read no more of a map than is touched, meanwhile."""
    if not isinstance(view.obj, mmap.mmap):
        yield
        return
    with contextlib.suppress(OSError):  # a hint, no more
        view.obj.madvise(mmap.MADV_RANDOM)
    try:
        yield
    finally:
        with contextlib.suppress(OSError):
            view.obj.madvise(mmap.MADV_NORMAL)


def publish(directory: DirectoryProtocol, name: FileName) -> None:
    """Rename a synced temporary file to its final name, and make the name durable."""
    directory.rename(name.temporary, str(name))
    directory.sync()
