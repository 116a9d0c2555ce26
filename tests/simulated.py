"""``DirectoryProtocol`` and ``FileProtocol`` on a disk in memory."""

from __future__ import annotations

import errno
import os
from collections.abc import Sequence

from disk import Content, Disk, Fault, Folder, Place
from metastore.directory import Buffer
from metastore.errors import StoreLockedError


class SimulatedFile:
    """An open file of a simulated directory."""

    descriptor = -1

    def __init__(
        self, disk: Disk, content: Content, name: str, path: str, *, writable: bool
    ) -> None:
        self._disk = disk
        self._content = content
        self._name = name
        self._writable = writable
        self._open = True
        self.path = path
        disk.opened.append(path)

    def _announce(self, kind: str, size: int = 0) -> Fault | None:
        if not self._open:
            raise OSError(errno.EBADF, os.strerror(errno.EBADF))
        return self._disk.announce(kind, self._name, size)

    def size(self) -> int:
        with self._disk.mutex:
            if fault := self._announce("size"):
                raise fault.error(self.path)
            return len(self._content.live)

    def read(self, offset: int, size: int) -> bytes:
        with self._disk.mutex:
            if fault := self._announce("read", size):
                raise fault.error(self.path)
            return bytes(self._content.live[offset : offset + size])

    def view(self) -> memoryview:
        with self._disk.mutex:
            if fault := self._announce("view"):
                raise fault.error(self.path)
            return memoryview(bytes(self._content.live))

    def write(self, buffers: Sequence[Buffer], offset: int) -> None:
        data = b"".join(bytes(buffer) for buffer in buffers)
        with self._disk.mutex:
            if not self._writable:
                raise OSError(errno.EBADF, os.strerror(errno.EBADF))
            fault = self._announce("write", len(data))
            if fault:
                data = data[: int(fault.kept * len(data))]
            self._content.write(self._disk.serial, data, offset)
            if fault:
                raise fault.error(self.path)

    def sync(self) -> None:
        with self._disk.mutex:
            if fault := self._announce("sync"):
                self._content.fail_sync(fault.kept)
                raise fault.error(self.path)
            self._content.sync()

    def drop_cache(self) -> None:
        with self._disk.mutex:
            if fault := self._announce("drop_cache"):
                raise fault.error(self.path)
            self._content.drop_cache()

    def fetch(self, offset: int, size: int) -> None:
        pass  # only a hint: nothing that a crash or a fault could change

    def close(self) -> None:
        with self._disk.mutex:
            if self._open:
                fault = self._announce("close")
                self._open = False
                self._disk.opened.remove(self.path)
                if fault:
                    raise fault.error(self.path)


class SimulatedDirectory:
    """A directory of a :class:`Disk`, with the methods of ``DirectoryProtocol``."""

    def __init__(
        self, disk: Disk, path: str = "simulated", folder: Folder | None = None
    ) -> None:
        self._disk = disk
        self._folder = folder or disk.root
        self._open = True
        self.path = path
        disk.opened.append(path)

    def _announce(self, kind: str, name: str = ".") -> Fault | None:
        """Ask what is to happen; raise here what has no effect."""
        if not self._open:
            raise OSError(errno.EBADF, os.strerror(errno.EBADF))
        fault = self._disk.announce(kind, name)
        if fault and fault.kept < 1 and kind != "sync_directory":
            raise fault.error(self.path)
        return fault

    def _finish(self, fault: Fault | None) -> None:
        if fault:
            raise fault.error(self.path)

    def _file_at(self, name: str) -> Content:
        node = self._folder.live.get(name)
        if node is None:
            raise _name_error(errno.ENOENT, self.path, name)
        if isinstance(node, Folder):
            raise _name_error(errno.EISDIR, self.path, name)
        return node

    def _handle(self, content: Content, name: str, *, writable: bool) -> SimulatedFile:
        path = os.path.join(self.path, name)
        return SimulatedFile(self._disk, content, name, path, writable=writable)

    def lock(self) -> None:
        with self._disk.mutex:
            self._finish(self._announce("lock"))
            if self._disk.lock_holder not in (None, self):
                raise StoreLockedError(self.path)
            self._disk.lock_holder = self

    def names(self) -> list[tuple[str, bool]]:
        with self._disk.mutex:
            self._finish(self._announce("names"))
            return [
                (name, isinstance(node, Content))
                for name, node in self._folder.live.items()
            ]

    def open(self, name: str) -> SimulatedFile:
        with self._disk.mutex:
            self._finish(self._announce("open", name))
            return self._handle(self._file_at(name), name, writable=False)

    def create(self, name: str) -> SimulatedFile:
        with self._disk.mutex:
            fault = self._announce("create", name)
            if name in self._folder.live:
                content = self._file_at(name)
                content.empty(self._disk.serial)
            else:
                content = Content()
                self._disk.change((Place(self._folder, name, content),), ())
            self._finish(fault)
            return self._handle(content, name, writable=True)

    def rename(self, old: str, new: str) -> None:
        with self._disk.mutex:
            fault = self._announce("rename", new)
            self._rename(old, self._folder, new)
            self._finish(fault)

    def _rename(self, old: str, folder: Folder, new: str) -> None:
        content = self._file_at(old)
        if isinstance(folder.live.get(new), Folder):
            raise _name_error(errno.EISDIR, self.path, new)
        self._disk.change(
            (Place(folder, new, content),), (Place(self._folder, old, content),)
        )

    def remove(self, name: str) -> None:
        with self._disk.mutex:
            fault = self._announce("remove", name)
            self._disk.change((), (Place(self._folder, name, self._file_at(name)),))
            self._finish(fault)

    def sync(self) -> None:
        with self._disk.mutex:
            if fault := self._announce("sync_directory"):
                self._disk.fail_sync_names(self._folder)
                raise fault.error(self.path)
            self._disk.sync_names(self._folder)

    def subdirectory(self, name: str) -> SimulatedDirectory:
        with self._disk.mutex:
            if name not in self._folder.live:
                fault = self._announce("make", name)
                self._disk.change((Place(self._folder, name, Folder()),), ())
                self._finish(fault)
            self.sync()
            folder = self._folder.live[name]
            if isinstance(folder, Content):
                raise _name_error(errno.ENOTDIR, self.path, name)
            return SimulatedDirectory(self._disk, os.path.join(self.path, name), folder)

    def move(self, name: str, other: SimulatedDirectory, new: str) -> None:
        with self._disk.mutex:
            fault = self._announce("move", name)
            self._rename(name, other._folder, new)
            self._finish(fault)

    def close(self) -> None:
        with self._disk.mutex:
            if self._open:
                fault = self._announce("close")
                self._open = False
                self._disk.opened.remove(self.path)
                if self._disk.lock_holder is self:
                    self._disk.lock_holder = None
                self._finish(fault)


def _name_error(number: int, directory: str, name: str) -> OSError:
    return OSError(number, os.strerror(number), os.path.join(directory, name))
