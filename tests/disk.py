"""A disk in memory that tells apart what is seen and what a crash would leave.

``simulated`` opens directories on it. Three things are kept of every file and of every
directory: what a program sees (*live*), what the medium holds (*durable*), and what was
done since the last sync (*pending*), of which a crash may keep any part; ``crashes``
builds those crash states.

Before each call ``Disk.before`` is asked, if it is set: there histories are recorded,
and what it answers, a :class:`Fault`, makes the call fail. A failed sync behaves as on
ext4: the pages count as clean, reads still show them, no later sync writes them, and
they are gone once the cache is dropped.
"""

from __future__ import annotations

import dataclasses
import errno
import os
import threading
from collections.abc import Callable, Sequence
from typing import NamedTuple

SECTOR_SIZE = 512

#: What lies in a directory: a file's bytes, or the image of a subdirectory.
Image = dict[str, "bytes | Image"]

#: The calls that change what a crash may leave.
CHANGES = frozenset(
    {"create", "write", "sync", "rename", "remove", "make", "move", "sync_directory"}
)


class Operation(NamedTuple):
    """One call, as ``Disk.before`` is told of it."""

    kind: str
    name: str
    size: int = 0


@dataclasses.dataclass(frozen=True)
class Fault:
    """How a call fails.

    `kept` is the share of a write's bytes that arrive, and of the sectors that a failed
    sync still makes durable; any other call has its effect, and fails all the same, if
    `kept` is 1.
    """

    number: int = errno.EIO
    kept: float = 0.0

    def error(self, path: str) -> OSError:
        return OSError(self.number, f"{os.strerror(self.number)} (injected)", path)


class Write(NamedTuple):
    """Sectors that a write has touched, as they were seen right after it.

    Emptying a file is a write of no sectors that leaves the size 0.
    """

    serial: int
    offset: int
    data: bytes
    size: int


class Content:
    """What a file holds, whatever it is called."""

    def __init__(self, durable: bytes = b"") -> None:
        self.durable = bytearray(durable)
        self.live = bytearray(durable)
        self.pending: list[Write] = []
        #: A sync failed: `live` shows bytes that are neither durable nor pending.
        self.stale = False

    def copy(self) -> Content:
        other = Content.__new__(Content)
        other.durable = self.durable[:]
        other.live = self.live[:]
        other.pending = self.pending[:]
        other.stale = self.stale
        return other

    def write(self, serial: int, data: bytes, offset: int) -> None:
        if not data:
            return
        end = offset + len(data)
        if offset > len(self.live):
            self.live.extend(bytes(offset - len(self.live)))
        self.live[offset:end] = data
        first = offset - offset % SECTOR_SIZE
        last = end + -end % SECTOR_SIZE
        self.pending.append(
            Write(serial, first, bytes(self.live[first:last]), len(self.live))
        )

    def empty(self, serial: int) -> None:
        if self.live:
            self.live.clear()
            self.pending.append(Write(serial, 0, b"", 0))

    def sync(self) -> None:
        self._keep(self.pending)
        self.pending.clear()
        # The size stays dirty in the inode until it is written, also past a failure.
        _resize(self.durable, len(self.live))

    def fail_sync(self, kept: float) -> None:
        """Make a share of the pending sectors durable, and forget the others."""
        sectors = [
            Write(write.serial, write.offset + at, write.data[at : at + SECTOR_SIZE], 0)
            for write in self.pending
            for at in range(0, len(write.data), SECTOR_SIZE)
        ]
        if kept == 1:
            self._keep(self.pending)
        else:
            self._keep(sectors[: round(kept * len(sectors))])
        self.pending.clear()
        self.stale = True

    def _keep(self, writes: Sequence[Write]) -> None:
        for write in writes:
            if not write.data:
                self.durable.clear()
            _overwrite(self.durable, write.data, write.offset)
            if len(self.durable) < write.size:
                _resize(self.durable, write.size)

    def drop_cache(self) -> None:
        if self.stale:
            size = len(self.live)
            self.live = self.durable[:]
            for write in self.pending:
                _overwrite(self.live, write.data, write.offset)
            _resize(self.live, size)
            self.stale = False


def _overwrite(target: bytearray, data: bytes, offset: int) -> None:
    if len(target) < offset:
        target.extend(bytes(offset - len(target)))
    target[offset : offset + len(data)] = data


def _resize(target: bytearray, size: int) -> None:
    del target[size:]
    target.extend(bytes(size - len(target)))


class Folder:
    """What a directory holds: a content or a folder for each name."""

    def __init__(self) -> None:
        self.durable: dict[str, Content | Folder] = {}
        self.live: dict[str, Content | Folder] = {}


Node = Content | Folder
Names = dict[Folder, dict[str, Node]]


class Place(NamedTuple):
    """A name in a folder, and what it stands for."""

    folder: Folder
    name: str
    node: Node


@dataclasses.dataclass
class NameChange:
    """Names that appear and vanish together: a creation, a renaming, a removal.

    A move to another directory is one change, whose two sides become durable when their
    own directory is synced.
    """

    serial: int
    links: tuple[Place, ...] = ()
    unlinks: tuple[Place, ...] = ()
    #: A sync of the directory failed: no later one makes this durable.
    lost: bool = False

    def apply(self, names: Names) -> None:
        for folder, name, node in self.unlinks:
            if names[folder].get(name) is node:
                del names[folder][name]
        for folder, name, node in self.links:
            names[folder][name] = node

    def part(self, folder: Folder, *, inside: bool) -> NameChange:
        """The side of this change that concerns `folder`, or the other one."""
        return dataclasses.replace(
            self,
            links=tuple(at for at in self.links if (at.folder is folder) == inside),
            unlinks=tuple(at for at in self.unlinks if (at.folder is folder) == inside),
        )


class Disk:
    """A medium and the kernel above it; directories opened on it share both."""

    def __init__(self, image: Image | None = None) -> None:
        self.root = _folder(image or {})
        self.changes: list[NameChange] = []
        self.serial = 0
        self.before: Callable[[Operation], Fault | None] | None = None
        self.mutex = threading.RLock()
        self.lock_holder: object = None
        #: Paths of files and directories that were opened and not closed yet.
        self.opened: list[str] = []

    def copy(self) -> Disk:
        """The same disk, cache and all, after every process on it was killed."""
        nodes: dict[Node, Node] = {}

        def copied(node: Node) -> Node:
            if node not in nodes:
                nodes[node] = node.copy() if isinstance(node, Content) else Folder()
                if isinstance(node, Folder):
                    new = nodes[node]
                    new.durable = {at: copied(it) for at, it in node.durable.items()}
                    new.live = {at: copied(it) for at, it in node.live.items()}
            return nodes[node]

        def placed(places: tuple[Place, ...]) -> tuple[Place, ...]:
            return tuple(
                Place(copied(at.folder), at.name, copied(at.node)) for at in places
            )

        with self.mutex:
            other = Disk()
            other.root = copied(self.root)
            other.serial = self.serial
            other.changes = [
                NameChange(
                    change.serial,
                    placed(change.links),
                    placed(change.unlinks),
                    change.lost,
                )
                for change in self.changes
            ]
        return other

    def live_image(self) -> Image:
        """What a program sees now."""
        return image_of(self.root, lambda folder: folder.live, lambda file: file.live)

    def durable_image(self) -> Image:
        """What is left if a crash loses everything that it may lose."""
        return image_of(
            self.root, lambda folder: folder.durable, lambda file: file.durable
        )

    def announce(self, kind: str, name: str, size: int = 0) -> Fault | None:
        """Ask what is to happen to a call; its number in the history goes up by one."""
        self.serial += 1
        if self.before is None:
            return None
        return self.before(Operation(kind, name, size))

    def change(self, links: tuple[Place, ...], unlinks: tuple[Place, ...]) -> None:
        """Change names as a program sees them; a crash may still undo it."""
        change = NameChange(self.serial, links, unlinks)
        change.apply({at.folder: at.folder.live for at in (*links, *unlinks)})
        self.changes.append(change)

    def sync_names(self, folder: Folder) -> None:
        rest = []
        for change in self.changes:
            if not change.lost:
                change.part(folder, inside=True).apply({folder: folder.durable})
                change = change.part(folder, inside=False)
            if change.links or change.unlinks:
                rest.append(change)
        self.changes = rest

    def fail_sync_names(self, folder: Folder) -> None:
        """Leave open for ever what becomes of the names that were to be synced."""
        for change in self.changes:
            if any(at.folder is folder for at in (*change.links, *change.unlinks)):
                change.lost = True


def _folder(image: Image) -> Folder:
    folder = Folder()
    for name, inside in image.items():
        node = _folder(inside) if isinstance(inside, dict) else Content(inside)
        folder.durable[name] = folder.live[name] = node
    return folder


def image_of(
    folder: Folder,
    names: Callable[[Folder], dict[str, Node]],
    data: Callable[[Content], bytes | bytearray],
) -> Image:
    """Write down what lies in `folder` by what `names` and `data` say."""
    return {
        name: bytes(data(node))
        if isinstance(node, Content)
        else image_of(node, names, data)
        for name, node in names(folder).items()
    }
