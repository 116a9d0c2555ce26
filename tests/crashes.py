"""The crash states of a disk: what may lie on the medium after a power loss now.

Each thing that is pending is an *atom* with numbered options, 0 for "lost": a sector is
old or one of the contents it was given since, torn ones among them; a file has one of
the sizes it had since; a change of names happened or not. A *choice* is one option per
atom, and gives one image. In the second model, ``ordered``, the changes of names are
one atom: the first so many happened, as on ext4.
"""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
import math
import random
from collections.abc import Iterable, Iterator, Sequence

from disk import SECTOR_SIZE, Content, Disk, Folder, Image, NameChange, Node, image_of

Choice = tuple[int, ...]

#: A place in the order of what was done: the call, and the sector within it.
Moment = tuple[int, int]


@dataclasses.dataclass
class Sector:
    """A sector that was written since its file was last synced."""

    content: Content
    index: int
    old: bytes
    versions: list[bytes] = dataclasses.field(default_factory=list)
    moments: list[Moment] = dataclasses.field(default_factory=list)

    def add(self, moment: Moment, new: bytes) -> None:
        new = new.ljust(SECTOR_SIZE, b"\0")
        if new != (self.versions[-1] if self.versions else self.old):
            self.versions.append(new)
            self.moments.append(moment)

    def torn(self) -> list[bytes]:
        """The last version cut short within what it changes.

        What is missing is as before, or zero; what the write did not change stays.
        """
        new = self.versions[-1]
        before = self.versions[-2] if len(self.versions) > 1 else self.old
        changed = [at for at in range(SECTOR_SIZE) if new[at] != before[at]]
        start, stop = changed[0], changed[-1] + 1
        size = stop - start
        found = []
        for cut in {start + size * part // 4 for part in (1, 2, 3)} | {
            min(start + 8, stop - 1),
            stop - 1,
        }:
            found.append(new[:cut] + before[cut:])
            found.append(new[:cut] + bytes(stop - cut) + before[stop:])
            found.append(before[:cut] + new[cut:])
        return sorted(set(found) - {before, new})

    def option(self, number: int) -> bytes:
        if number <= len(self.versions):
            return self.versions[number - 1]
        return self.torn()[number - len(self.versions) - 1]


@dataclasses.dataclass
class Size:
    """The size of a file that has grown or was emptied since it was last synced."""

    content: Content
    sizes: list[int]
    moments: list[Moment]


@dataclasses.dataclass
class Names:
    """Changes of names that were not synced; option k: the first k happened."""

    changes: list[NameChange]
    moments: list[Moment]


Atom = Sector | Size | Names


class Pending:
    """Everything that is pending on a disk, as atoms.

    Parameters
    ----------
    disk : Disk
        It must not change while this is in use.
    ordered : bool
        Names become durable in the order in which they were changed.
    """

    def __init__(self, disk: Disk, *, ordered: bool = False) -> None:
        self._disk = disk
        changes = _changes(disk)
        self.atoms: list[Atom] = []
        for content in _contents(disk):
            self.atoms += _content_atoms(content)
        if ordered and changes:
            moments = [(change.serial, 0) for change in changes]
            self.atoms.append(Names(changes, moments))
        elif not ordered:
            self.atoms += [Names([one], [(one.serial, 0)]) for one in changes]

    @property
    def counts(self) -> list[int]:
        """The number of options of each atom, torn sectors not counted."""
        return [len(atom.moments) + 1 for atom in self.atoms]

    def image(self, choice: Sequence[int]) -> Image:
        """What lies on the medium after this choice."""
        names = {folder: dict(folder.durable) for folder in _folders(self._disk)}
        sizes: dict[Content, int] = {}
        sectors: dict[Content, list[tuple[int, bytes]]] = {}
        happened: list[NameChange] = []
        for atom, number in zip(self.atoms, choice, strict=True):
            if number == 0:
                continue
            if isinstance(atom, Names):
                happened += atom.changes[:number]
            elif isinstance(atom, Size):
                sizes[atom.content] = atom.sizes[number - 1]
            else:
                wanted = sectors.setdefault(atom.content, [])
                wanted.append((atom.index * SECTOR_SIZE, atom.option(number)))
        for change in sorted(happened, key=lambda change: change.serial):
            change.apply(names)

        def data(content: Content) -> bytes:
            durable = bytes(content.durable)
            size = sizes.get(content, len(durable))
            if content not in sectors:
                return durable[:size].ljust(size, b"\0")
            found = bytearray(durable)
            for offset, sector in sectors[content]:
                found.extend(bytes(max(0, offset + SECTOR_SIZE - len(found))))
                found[offset : offset + SECTOR_SIZE] = sector
            return bytes(found[:size]).ljust(size, b"\0")

        return image_of(self._disk.root, names.__getitem__, data)

    def choices(
        self, rng: random.Random, *, exhaustive_max: int, samples: int
    ) -> Iterator[Choice]:
        """Every choice if they are at most `exhaustive_max`, else the telling ones.

        Those are: nothing, all, all up to each moment, each option of one atom alone,
        all but one atom, and `samples` at random. Torn sectors come on top.
        """
        counts = self.counts
        everything: Iterable[Choice]
        if math.prod(counts) <= exhaustive_max:
            everything = itertools.product(*map(range, counts))
        else:
            everything = dict.fromkeys(
                [
                    *self._in_order(),
                    *self._alone(),
                    *(
                        tuple(rng.randrange(count) for count in counts)
                        for _ in range(samples)
                    ),
                ]
            )
        yield from everything
        yield from self._torn()

    def _upto(self, moment: Moment) -> Choice:
        return tuple(
            sum(found <= moment for found in atom.moments) for atom in self.atoms
        )

    def _in_order(self) -> list[Choice]:
        moments = {moment for atom in self.atoms for moment in atom.moments}
        return [self._upto(moment) for moment in sorted({(-1, 0), *moments})]

    def _alone(self) -> Iterator[Choice]:
        none = [0] * len(self.atoms)
        last = [count - 1 for count in self.counts]
        for at, count in enumerate(self.counts):
            for number in range(1, count):
                yield (*none[:at], number, *none[at + 1 :])
            yield (*last[:at], 0, *last[at + 1 :])

    def _torn(self) -> Iterator[Choice]:
        """The last sector of each file torn, all before it kept, and all else too."""
        last: dict[Content, int] = {}
        for at, atom in enumerate(self.atoms):
            if isinstance(atom, Sector):
                before = last.get(atom.content)
                if before is None or self._last(before) < self._last(at):
                    last[atom.content] = at
        everything = tuple(count - 1 for count in self.counts)
        for at in last.values():
            atom = self.atoms[at]
            assert isinstance(atom, Sector)
            for base in {everything, self._upto(atom.moments[-1])}:
                for number in range(len(atom.torn())):
                    option = len(atom.versions) + 1 + number
                    yield (*base[:at], option, *base[at + 1 :])

    def _last(self, at: int) -> Moment:
        return self.atoms[at].moments[-1]


def _folders(disk: Disk) -> list[Folder]:
    return [node for node in _nodes(disk) if isinstance(node, Folder)]


def _contents(disk: Disk) -> list[Content]:
    return [node for node in _nodes(disk) if isinstance(node, Content)]


def _nodes(disk: Disk) -> list[Node]:
    """Everything that has a name, had one at the last sync, or had one in between."""
    found: dict[Node, None] = {disk.root: None}
    for change in disk.changes:
        for at in (*change.unlinks, *change.links):
            found[at.folder] = found[at.node] = None
    wanted: list[Node] = list(found)
    while wanted:
        node = wanted.pop()
        if isinstance(node, Folder):
            for inside in (*node.durable.values(), *node.live.values()):
                if inside not in found:
                    found[inside] = None
                    wanted.append(inside)
    return list(found)


def _changes(disk: Disk) -> list[NameChange]:
    """The pending changes; where two directories are concerned, in steps."""
    found = []
    for change in disk.changes:
        links = {at.folder for at in change.links}
        if change.unlinks and not links <= {at.folder for at in change.unlinks}:
            # The name in the other directory alone; the old one goes later, or not.
            found.append(dataclasses.replace(change, unlinks=()))
        found.append(change)
    return found


def _content_atoms(content: Content) -> list[Atom]:
    sectors: dict[int, Sector] = {}
    size = Size(content, [], [])
    for write in content.pending:
        if not write.data:
            stop = max(len(content.durable), *(one.size for one in content.pending))
            pieces = [(at, b"") for at in range(-(-stop // SECTOR_SIZE))]
        else:
            first = write.offset // SECTOR_SIZE
            pieces = [
                (first + at // SECTOR_SIZE, write.data[at : at + SECTOR_SIZE])
                for at in range(0, len(write.data), SECTOR_SIZE)
            ]
        for index, new in pieces:
            if index not in sectors:
                start = index * SECTOR_SIZE
                old = bytes(content.durable[start : start + SECTOR_SIZE])
                sectors[index] = Sector(content, index, old.ljust(SECTOR_SIZE, b"\0"))
            sectors[index].add((write.serial, index), new)
        if write.size != (size.sizes[-1] if size.sizes else len(content.durable)):
            size.sizes.append(write.size)
            size.moments.append((write.serial, 1 << 62))
    atoms: list[Atom] = [sectors[at] for at in sorted(sectors) if sectors[at].versions]
    if size.sizes:
        atoms.append(size)
    return atoms


def digest(image: Image) -> bytes:
    """Tell images apart."""
    found = hashlib.blake2b(digest_size=16)
    for name, inside in sorted(image.items()):
        data = digest(inside) if isinstance(inside, dict) else inside
        found.update(b"%d %d " % (isinstance(inside, dict), len(data)))
        found.update(name.encode() + b"\0" + data)
    return found.digest()


def whole_digest(disk: Disk) -> bytes:
    """Tell disks apart by the cache and what is pending, too."""
    found = hashlib.blake2b(digest_size=16)
    found.update(digest(disk.live_image()) + digest(disk.durable_image()))
    for content in _contents(disk):
        for write in content.pending:
            found.update(b"%d %d " % (write.offset, write.size) + write.data)
    for change in disk.changes:
        for at in (*change.links, *change.unlinks):
            found.update(at.name.encode() + b"\0%d" % change.lost)
    return found.digest()
