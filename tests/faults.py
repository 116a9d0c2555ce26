"""Calls that fail, and a directory that notices what is destroyed unread."""

from __future__ import annotations

import dataclasses
import errno
from collections.abc import Iterator

from disk import Content, Fault, Operation
from metastore.directory import FileName, parse_listing
from simulated import SimulatedDirectory, SimulatedFile

#: A full disk stops what needs room; a broken one stops everything.
NEEDS_ROOM = frozenset({"create", "write", "sync", "rename", "make", "sync_directory"})
CHANGING = NEEDS_ROOM | {"remove", "move"}
EVERYTHING = CHANGING | {"lock", "names", "open", "size", "read", "view", "drop_cache"}
#: Of these a part can be done.
DIVISIBLE = frozenset({"write", "sync"})


@dataclasses.dataclass(frozen=True)
class Failure:
    """What goes wrong at a call."""

    fault: Fault
    #: The kinds of calls that are counted, and fail.
    kinds: frozenset[str]
    #: Whether every later one fails, too.
    lasting: bool

    def __str__(self) -> str:
        name = errno.errorcode[self.fault.number]
        kept = f", {self.fault.kept:.0%} kept" if self.fault.kept else ""
        return f"{name}{kept}, {'from then on' if self.lasting else 'once'}"


def failures() -> Iterator[Failure]:
    """Every way in which a call is made to fail."""
    for lasting in (False, True):
        yield Failure(Fault(errno.EIO), EVERYTHING, lasting)
        yield Failure(Fault(errno.EIO, kept=1), CHANGING, lasting)
        yield Failure(Fault(errno.EIO, kept=0.5), DIVISIBLE, lasting)
        yield Failure(Fault(errno.ENOSPC), NEEDS_ROOM, lasting)
        yield Failure(Fault(errno.ENOSPC, kept=0.5), DIVISIBLE, lasting)


class FaultPlan:
    """Lets the call number `at` fail; counts from 1.

    Parameters
    ----------
    failure : Failure
        How.
    at : int
        Which call of those kinds; 0 for none, to count them.
    """

    def __init__(self, failure: Failure, at: int = 0) -> None:
        self._failure = failure
        self._at = at
        self.calls = 0
        self.failed: list[Operation] = []

    def __call__(self, operation: Operation) -> Fault | None:
        if operation.kind not in self._failure.kinds:
            return None
        self.calls += 1
        due = self.calls == self._at
        later = self._failure.lasting and 0 < self._at < self.calls
        if not due and not later:
            return None
        self.failed.append(operation)
        return self._failure.fault


class WatchfulFile(SimulatedFile):
    """Notes what is read."""

    def read(self, offset: int, size: int) -> bytes:
        data = super().read(offset, size)
        self.directory.note(self._content, offset, offset + len(data))
        return data

    def view(self) -> memoryview:
        view = super().view()
        self.directory.note(self._content, 0, len(view))
        return view

    directory: WatchfulDirectory


class WatchfulDirectory(SimulatedDirectory):
    """Notes each log and snapshot that is destroyed before it could be missed.

    A file may go if this program wrote it or read all of it, or if that is true of a
    snapshot which contains it. Anything else is in `destroyed`.
    """

    def __init__(self, *arguments: object) -> None:
        super().__init__(*arguments)
        self.destroyed: list[str] = []
        self._created: set[Content] = set()
        self._read: dict[Content, list[tuple[int, int]]] = {}

    def _handle(self, content: Content, name: str, *, writable: bool) -> SimulatedFile:
        file = WatchfulFile(
            self._disk, content, name, f"{self.path}/{name}", writable=writable
        )
        file.directory = self
        return file

    def note(self, content: Content, start: int, stop: int) -> None:
        self._read.setdefault(content, []).append((start, stop))

    def create(self, name: str) -> SimulatedFile:
        self._watch(name)
        file = super().create(name)
        self._created.add(self._file_at(name))
        return file

    def rename(self, old: str, new: str) -> None:
        self._watch(new)
        super().rename(old, new)

    def remove(self, name: str) -> None:
        self._watch(name)
        super().remove(name)

    def _watch(self, name: str) -> None:
        content = self._folder.live.get(name)
        listing = parse_listing([(name, isinstance(content, Content))])
        for found in (*listing.logs, *listing.snapshots):
            if not self._is_known(content) and not self._is_contained(found):
                self.destroyed.append(name)

    def _is_contained(self, name: FileName) -> bool:
        least = name.number + (name.kind == "snapshot")
        listing = parse_listing(self.names_unwatched())
        return any(
            snapshot.number >= least and self._is_known(self._file_at(str(snapshot)))
            for snapshot in listing.snapshots
        )

    def names_unwatched(self) -> list[tuple[str, bool]]:
        """The names, without a call that a test could count."""
        return [(at, isinstance(it, Content)) for at, it in self._folder.live.items()]

    def _is_known(self, content: Content) -> bool:
        """Whether it was written here, or read whole."""
        if content in self._created:
            return True
        end = 0
        for start, stop in sorted(self._read.get(content, [])):
            if start > end:
                return False
            end = max(end, stop)
        return end >= len(content.live)
