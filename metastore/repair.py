"""Repair: save what is provably whole from a damaged store into a new one.

The damaged directory is only read. First its files and those of its quarantine are
copied byte for byte (``repair_copy``), then the copy is taken apart, and what is whole
goes into one snapshot, which is read back.
"""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import os
import secrets
from collections.abc import Iterable, Iterator, Mapping, Sequence

import numpy as np

from metastore.columns import Columns, concatenate, merge, sort_last_wins
from metastore.directory import (
    QUARANTINE,
    Directory,
    DirectoryProtocol,
    FileName,
    parse_listing,
    read_header,
)
from metastore.errors import CorruptionError, MetastoreError
from metastore.format import (
    SEQUENCE_MAX,
    STORE_ID_SIZE,
    snapshot_seed,
)
from metastore.look import open_store
from metastore.parallel import default_threads
from metastore.recovery import Progress, read_headers
from metastore.repair_copy import Copy
from metastore.repair_report import Range, RepairedFile, RepairReport
from metastore.salvage import (
    Block,
    Evidence,
    Gap,
    LogSalvage,
    LostBlock,
    Run,
    SnapshotSalvage,
    find_store_seed,
    salvage_log,
    salvage_snapshot,
)
from metastore.snapshot import SnapshotReader, SnapshotWriter, split_into_blocks

__all__ = ["ORIGINAL", "RepairReport", "RepairedFile", "repair"]

#: Where the copy lies: in ``quarantine/``, but not among the files there, of which a
#: store keeps only so many.
ORIGINAL = "original"

_COMPRESSION_LEVEL = 1


# ---- the face ----


def repair(
    source: str | os.PathLike[str],
    destination: str | os.PathLike[str],
    *,
    prefix_only: bool = False,
    threads: int | None = None,
    progress: Progress | None = None,
) -> RepairReport:
    """Save what is provably whole from a damaged store into a new one.

    Parameters
    ----------
    source : str or path-like
        The directory of the damaged store. It is only read, and no lock is taken.
    destination : str or path-like
        Where the new store is to be: a directory that is missing or empty. It also
        gets a copy of every regular file of `source` and of its ``quarantine``, in
        ``quarantine/original``; further directories and links are named, not copied.
    prefix_only : bool
        Save only the longest run of batches, from the first on, of which none is
        missing. Otherwise every whole batch is saved, and every whole block of a
        damaged snapshot: more, but not a state that the store ever had.
    threads : int, optional
        How many threads decode; by default one per processor.
    progress : callable, optional
        Called as ``progress(done_bytes, total_bytes)`` while files are copied.

    Returns
    -------
    RepairReport
        What was saved, and exactly what was not.

    Raises
    ------
    MetastoreError
        If there is no store in `source`, or `destination` is not fit.
    FormatVersionError
        If a file is of a version that this release cannot read.
    OSError
        What the operating system says. `destination` is then not finished: it opens
        with ``on_damage="prefix"`` only, or holds the whole result, read back.
    """
    source, destination = os.fspath(source), os.fspath(destination)
    with contextlib.ExitStack() as stack:
        old = stack.enter_context(open_store(source))
        _check_destination(source, destination)
        try:
            read_headers(old, parse_listing(old.names()))
        except OSError as error:
            if error.errno != errno.EIO:
                raise
            # Versions are looked at once more in the copy, which has zeros there.
        sources: dict[str, DirectoryProtocol] = {"": old}
        path = os.path.join(source, QUARANTINE)
        # Through a link might come files of another directory, DEST among them.
        if os.path.isdir(path) and not os.path.islink(path):
            sources[f"{QUARANTINE}/"] = stack.enter_context(
                contextlib.closing(Directory.open_existing(path))
            )
        new = stack.enter_context(
            contextlib.closing(Directory.open_or_create(destination))
        )
        new.lock()
        _check_empty(new)  # until the lock another repair may have ended there
        return repair_into(
            sources,
            new,
            prefix_only=prefix_only,
            threads=threads or default_threads(),
            holder_pid=old._lock_holder(),
            progress=progress,
        )


def _check_destination(source: str, destination: str) -> None:
    inner, outer = os.path.realpath(destination), os.path.realpath(source)
    if os.path.commonpath([inner, outer]) == outer:
        raise MetastoreError(
            f"the destination lies in the source, which is not to be touched: "
            f"name another directory ({destination})"
        )
    if os.path.lexists(destination):
        with contextlib.closing(Directory.open_existing(destination)) as directory:
            _check_empty(directory)


def _check_empty(destination: Directory) -> None:
    if destination.names():
        raise MetastoreError(
            "the destination is not empty, and nothing in it was touched: "
            f"name a new one ({destination.path})"
        )


def repair_into(
    sources: Mapping[str, DirectoryProtocol],
    new: DirectoryProtocol,
    *,
    prefix_only: bool = False,
    threads: int = 1,
    holder_pid: int | None = None,
    progress: Progress | None = None,
) -> RepairReport:
    """Repair from open directories; see :func:`repair`.

    Parameters
    ----------
    sources : mapping of str to DirectoryProtocol
        The directory of the store under ``""``, further ones by how the names of their
        files begin.
    new : DirectoryProtocol
        The destination: empty, and locked.
    prefix_only, threads, progress
        As in :func:`repair`.
    holder_pid : int, optional
        The process that holds the source.
    """
    # A log without a header is damage: so the destination does not open, unless with
    # on_damage="prefix", until what it holds was read back.
    guard = FileName("log", 1)
    new.create(str(guard)).close()
    new.sync()
    quarantine = new.subdirectory(QUARANTINE)
    original = quarantine.subdirectory(ORIGINAL)
    try:
        copy = Copy(sources, progress)
        copy.copy_into(original)
        found = _take_apart(original, threads)
        plan = _decide(found, prefix_only)
        columns = _assemble(plan, threads)
    finally:
        original.close()
        quarantine.close()
    name = _write(new, columns, plan.sequence)
    _check_result(new, name, columns, plan.sequence, threads)
    new.remove(str(guard))
    new.sync()
    return RepairReport(
        source=sources[""].path,
        destination=new.path,
        holder_pid=holder_pid,
        prefix_only=prefix_only,
        sequence=plan.sequence,
        prefix_sequence=plan.prefix_sequence,
        n_records=len(columns),
        user_data_size=columns.user_data_size,
        n_batches=sum(len(run.ends) for run in plan.runs),
        missing=tuple(plan.missing),
        left_out=tuple(plan.left_out),
        files=tuple(found.files),
        store_id=found.store_id.hex() if found.store_id else None,
        n_foreign=found.n_foreign,
        original=f"{QUARANTINE}/{ORIGINAL}",
        n_copied=copy.n_files,
        copied_size=copy.size,
        not_copied=tuple(copy.not_copied),
        unreadable=copy.unreadable,
    )


# ---- take apart ----


@dataclasses.dataclass
class _DamagedSnapshot:
    """What is whole in a damaged snapshot, and where it belongs."""

    number: int
    parts: SnapshotSalvage
    #: The last batch that it contains. Where nothing tells, the last before the next
    #: log, however many logs are missing between, or else the last of a log within it.
    sequence: int


@dataclasses.dataclass
class _Found:
    """What the files hold."""

    files: list[RepairedFile] = dataclasses.field(default_factory=list)
    #: The id of the store, where a header tells it.
    store_id: bytes | None = None
    #: How many files are of other stores.
    n_foreign: int = 0
    #: The newest whole snapshot: its records and its sequence.
    base: Columns = dataclasses.field(default_factory=lambda: Columns.allocate(0, 0))
    base_sequence: int = 0
    #: Damaged snapshots that are newer, oldest first.
    damaged: list[_DamagedSnapshot] = dataclasses.field(default_factory=list)
    #: Whole batches, ascending; none overlap.
    runs: list[Run] = dataclasses.field(default_factory=list)
    #: The newest sequence that anything speaks of.
    sequence_known: int = 0


def _take_apart(directory: DirectoryProtocol, threads: int) -> _Found:
    listing = parse_listing(directory.names())
    files = []
    for name in (*reversed(listing.snapshots), *listing.logs):
        with contextlib.closing(directory.open(str(name))) as file:
            files.append(Evidence.of(name, file.view(), file.path))
    seed = find_store_seed(files)
    found = _Found()
    if seed is None:
        found.files = [
            _rejected(file, "nothing here could be proven to be whole")
            for file in files
        ]
        return found
    ids = (file.header.store_id for file in files if file.header)
    found.store_id = next((one for one in ids if snapshot_seed(one) == seed), None)
    taking = _Taking(directory, seed, threads, found)
    taking.take_all(files)
    found.files.sort(key=lambda file: (not file.name.startswith("snapshot"), file.name))
    return found


def _rejected(file: Evidence, fate: str) -> RepairedFile:
    gaps = (Gap(0, len(file.view), str(file.damage.reason)),) if file.damage else ()
    return RepairedFile(name=str(file.name), size=len(file.view), fate=fate, gaps=gaps)


class _Taking:
    """Goes through the files, the newest first."""

    def __init__(
        self, directory: DirectoryProtocol, seed: int, threads: int, found: _Found
    ) -> None:
        self._directory = directory
        self._seed = seed
        self._threads = threads
        self._found = found
        self._base_number = 0
        #: First sequences of logs and of what follows snapshots, by number.
        self._bounds: list[tuple[int, int]] = []

    def take_all(self, files: Sequence[Evidence]) -> None:
        """Take what is whole in each file."""
        own = sorted(self._of_this_store(files), key=lambda file: -file.number)
        logs = [file for file in own if file.kind == "log"]
        for file in own:
            if file.kind == "snapshot":
                self._take_snapshot(file, logs)
        for number, sequence in self._contained():
            self._bounds.append((number + 1, sequence + 1))
        for file in logs:
            self._take_log(file)
        self._found.runs.sort(key=lambda run: run.first)

    def _of_this_store(self, files: Sequence[Evidence]) -> Iterator[Evidence]:
        for file in files:
            header = file.header
            if header is None or snapshot_seed(header.store_id) == self._seed:
                yield file
            else:
                fate = f"of another store, {header.store_id.hex()}: not used"
                self._found.files.append(_rejected(file, fate))
                self._found.n_foreign += 1

    def _contained(self) -> Iterator[tuple[int, int]]:
        yield self._base_number, self._found.base_sequence
        for damaged in self._found.damaged:
            if damaged.parts.sequence is not None:
                yield damaged.number, damaged.parts.sequence

    def _add(
        self,
        file: Evidence,
        fate: str,
        *,
        whole: tuple[Range, ...] = (),
        gaps: Iterable[Gap] = (),
        blocks_lost: Iterable[LostBlock] = (),
        torn: Gap | None = None,
        sequence_unknown: bool = False,
    ) -> None:
        if file.damage is not None:
            fate += f"; its header was not usable: {file.damage.reason}"
        self._found.files.append(
            RepairedFile(
                name=str(file.name),
                size=len(file.view),
                fate=fate,
                whole=whole,
                gaps=tuple(gaps),
                blocks_lost=tuple(blocks_lost),
                torn=torn,
                sequence_unknown=sequence_unknown,
            )
        )

    def _take_snapshot(self, file: Evidence, logs: Sequence[Evidence]) -> None:
        if self._base_number:
            self._add(file, "not needed: a newer snapshot contains it")
            return
        columns = self._read_whole(file)
        if columns is not None and file.header is not None:
            self._set_base(file, columns, file.header.sequence)
            self._add(file, f"whole, up to batch {file.header.sequence:,}")
            return
        parts = salvage_snapshot(file, file.seed(self._seed))
        number, last = _last_before(file.number, logs)
        if parts.sequence is None and number == file.number + 1:
            parts = dataclasses.replace(parts, sequence=last)
        self._take_parts(file, parts, last)

    def _take_parts(self, file: Evidence, parts: SnapshotSalvage, last: int) -> None:
        """Take whole blocks; `last` is the last batch before any later log, or 0."""
        if parts.is_whole and parts.sequence is not None:
            self._set_base(file, _joined(parts.blocks), parts.sequence)
            fate = f"every block whole, up to batch {parts.sequence:,}"
            self._add(file, fate, gaps=parts.gaps)
            return
        sequence = last if parts.sequence is None else parts.sequence
        self._found.damaged.insert(0, _DamagedSnapshot(file.number, parts, sequence))
        self._know(sequence)
        self._add(
            file,
            f"{len(parts.blocks):,} blocks whole",
            gaps=parts.gaps,
            blocks_lost=parts.lost,
            sequence_unknown=parts.sequence is None,
        )

    def _read_whole(self, file: Evidence) -> Columns | None:
        if file.header is None:
            return None
        with contextlib.closing(self._directory.open(str(file.name))) as opened:
            try:
                reader = SnapshotReader(opened, file.header)
                return reader.read_all(self._threads)
            except CorruptionError:  # told in detail by the salvage
                return None

    def _set_base(self, file: Evidence, columns: Columns, sequence: int) -> None:
        self._base_number = file.number
        self._found.base, self._found.base_sequence = columns, sequence
        self._know(sequence)

    def _know(self, sequence: int) -> None:
        self._found.sequence_known = max(self._found.sequence_known, sequence)

    def _take_log(self, file: Evidence) -> None:
        if file.number <= self._base_number:
            self._add(file, "not needed: the snapshot contains it")
            return
        later = (first for number, first in self._bounds if number > file.number)
        bound = min(later, default=None)
        log = salvage_log(file, file.seed(self._seed), bound)
        first = file.header.sequence if file.header else log.first
        if first is not None:
            self._bounds.append((file.number, first))
        self._know(log.sequence_known)
        self._count_as_contained(file, log)
        self._take_runs(log)
        whole = _stretches((run.first, run.stop - 1) for run in log.runs)
        self._add(file, "log", whole=whole, gaps=log.gaps, torn=log.torn)

    def _count_as_contained(self, file: Evidence, log: LogSalvage) -> None:
        """Let a snapshot that cannot tell its batch come behind the logs within it."""
        for damaged in self._found.damaged:
            is_unknown = damaged.parts.sequence is None
            if is_unknown and file.number <= damaged.number and log.runs:
                damaged.sequence = max(damaged.sequence, log.runs[-1].stop - 1)

    def _take_runs(self, log: LogSalvage) -> None:
        """Take the batches of a log that no other file, or copy of it, gave yet."""
        taken = _stretches((run.first, run.stop - 1) for run in self._found.runs)
        for run in log.runs:
            for first, last in _without((run.first, run.stop - 1), taken):
                self._found.runs.append(run.part(first, last + 1))


def _last_before(number: int, logs: Sequence[Evidence]) -> tuple[int, int]:
    """Return the number of the next log, and the last batch before it; 0, 0 if none."""
    later = [
        (log.number, log.header.sequence - 1)
        for log in logs
        if log.header and log.number > number
    ]
    return min(later, default=(0, 0))


def _stretches(ranges: Iterable[Range]) -> tuple[Range, ...]:
    """Return ranges of sequences, those that meet as one."""
    joined: list[Range] = []
    for first, last in sorted(ranges):
        if joined and first <= joined[-1][1] + 1:
            joined[-1] = joined[-1][0], max(joined[-1][1], last)
        else:
            joined.append((first, last))
    return tuple(joined)


def _without(whole: Range, taken: Iterable[Range]) -> Iterator[Range]:
    """Yield what is left of a range without those in `taken`, which ascend."""
    first, last = whole
    for low, high in taken:
        if high < first or low > last:
            continue
        if low > first:
            yield first, low - 1
        first = high + 1
    if first <= last:
        yield first, last


# ---- decide ----


@dataclasses.dataclass
class _Plan:
    """What goes into the new store."""

    base: Columns
    #: Batches and whole blocks in the order in which they count.
    runs: list[Run]
    overlays: list[tuple[int, list[Block]]]
    sequence: int
    prefix_sequence: int
    missing: list[Range]
    left_out: list[Range]


def _decide(found: _Found, prefix_only: bool) -> _Plan:
    """Choose what to save; touches nothing."""
    whole = _stretches(
        [(0, found.base_sequence), *((run.first, run.stop - 1) for run in found.runs)]
    )
    prefix = whole[0][1]
    overlays = [] if prefix_only else _overlays(found, prefix)
    # What a damaged snapshot contains is told by its blocks, not by sequences.
    told = max([found.base_sequence, *(sequence for sequence, _ in overlays)])
    if told > prefix:
        whole = _stretches([*whole, (0, told)])
    missing = list(_without((1, found.sequence_known), whole))
    left_out: list[Range] = []
    if prefix_only:
        left_out = list(_without((prefix + 1, found.sequence_known), missing))
    last = prefix if prefix_only else max(found.sequence_known, prefix, told)
    last = min(last, SEQUENCE_MAX - 1)  # or the new store could not be opened
    return _Plan(
        base=found.base,
        runs=_between(found.runs, found.base_sequence + 1, last),
        overlays=overlays,
        sequence=last,
        prefix_sequence=prefix,
        missing=missing,
        left_out=left_out,
    )


def _overlays(found: _Found, prefix: int) -> list[tuple[int, list[Block]]]:
    """Return the blocks that say more than the prefix, and behind which batch."""
    return [
        (max(damaged.sequence, found.base_sequence), damaged.parts.blocks)
        for damaged in found.damaged
        if damaged.parts.blocks
        and not (damaged.parts.sequence and damaged.parts.sequence <= prefix)
    ]


# ---- assemble ----


def _joined(blocks: Iterable[Block]) -> Columns:
    return concatenate([block.columns for block in blocks])


def _assemble(plan: _Plan, threads: int) -> Columns:
    """Return the records of the new store."""
    columns = plan.base
    runs = list(plan.runs)
    for sequence, blocks in plan.overlays:
        columns = _replay(columns, _between(runs, 0, sequence), threads)
        columns = _lay_over(columns, blocks, threads)
        runs = _between(runs, sequence + 1, plan.sequence)
    return _replay(columns, runs, threads)


def _between(runs: Iterable[Run], first: int, last: int) -> list[Run]:
    """Return the batches from `first` to `last`."""
    return [
        run.part(max(run.first, first), min(run.stop, last + 1))
        for run in runs
        if run.first <= last and run.stop > first
    ]


def _replay(columns: Columns, runs: Sequence[Run], threads: int) -> Columns:
    if not runs and columns.offsets[0] == 0:
        return columns
    new = sort_last_wins(concatenate([run.columns for run in runs]), threads)
    return merge(columns, new, threads)


def _lay_over(columns: Columns, blocks: Sequence[Block], threads: int) -> Columns:
    """Put blocks in the place of everything in their ranges of keys."""
    kept = []
    start = 0
    for block in blocks:
        first, last = np.uint64(block.first_key), np.uint64(block.last_key)
        kept.append(columns.part(start, int(np.searchsorted(columns.keys, first))))
        start = int(np.searchsorted(columns.keys, last, side="right"))
    kept.append(columns.part(start, len(columns)))
    return merge(concatenate(kept), _joined(blocks), threads)


# ---- write ----


def _write(new: DirectoryProtocol, columns: Columns, sequence: int) -> FileName:
    """Publish one snapshot, of a store of its own; return its name."""
    store_id = secrets.token_bytes(STORE_ID_SIZE)
    name = FileName("snapshot", 1)
    writer = SnapshotWriter(new, name, store_id, sequence)
    try:
        for part in split_into_blocks(columns):
            writer.encode_and_put(part, _COMPRESSION_LEVEL)
        writer.publish()
    finally:
        writer.close()
    return name


def _check_result(
    new: DirectoryProtocol,
    name: FileName,
    columns: Columns,
    sequence: int,
    threads: int,
) -> None:
    """Read the snapshot as a recovery would, and compare."""
    with contextlib.closing(new.open(str(name))) as file:
        header = read_header(file, name)
        found = SnapshotReader(file, header).read_all(threads)
    if header.sequence != sequence or not all(
        np.array_equal(getattr(columns, field.name), getattr(found, field.name))
        for field in dataclasses.fields(Columns)
    ):
        raise CorruptionError(
            new.path, 0, "the new store does not read back as it was written"
        )
