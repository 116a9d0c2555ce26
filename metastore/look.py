"""Looking into a store's directory without its lock and without changing anything.

What the read-only commands show is collected here; ``cli`` prints it.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
from collections.abc import Callable, Iterator
from typing import Protocol, TypeVar

from metastore import _codec
from metastore.directory import (
    QUARANTINE,
    WARNING,
    Directory,
    FileName,
    FileProtocol,
    Listing,
    parse_listing,
)
from metastore.errors import CorruptionError, FormatVersionError, MetastoreError
from metastore.format import (
    FILE_HEADER_SIZE,
    FRAME_HEADER_SIZE,
    FileHeader,
    log_seed,
    size_without_zeros,
    snapshot_seed,
)
from metastore.frames import new_table
from metastore.log import LogContent, LogFile, read_logs
from metastore.parallel import ordered_map
from metastore.recovery import (
    Content,
    Headers,
    Inspection,
    Progress,
    find_exhaustion,
    inspect,
    make_plan,
    read_headers,
)
from metastore.salvage import Evidence, Gap, salvage_log, salvage_snapshot
from metastore.snapshot import SnapshotReader

__all__ = [
    "FileCheck",
    "FileFacts",
    "Overview",
    "Verification",
    "inspection",
    "open_store",
    "overview",
    "until_steady",
    "verification",
]

#: How often a look is taken again when a live store changes what is looked at.
LOOKS_MAX = 5

_TAIL_WINDOW_SIZE = 64 << 10
#: In a frame header: docs/format.md, section 4.
_PAYLOAD_CHECKSUM_OFFSET = 28


# ---- a directory that may be in use ----


class Look(Protocol):
    """What a look at a directory returns."""

    @property
    def damage(self) -> MetastoreError | None:
        """What is wrong, if anything."""
        ...


AnyLook = TypeVar("AnyLook", bound=Look)


@contextlib.contextmanager
def open_store(path: str) -> Iterator[Directory]:
    """Open a directory that a store lives in; MetastoreError if none does."""
    with contextlib.closing(Directory.open_existing(path)) as directory:
        names = directory.names()
        listing = parse_listing(names)
        ours = listing.snapshots or listing.logs or listing.temporaries
        if not ours and WARNING not in dict(names):
            raise MetastoreError(f"no store in this directory ({path})")
        yield directory


def until_steady(directory: Directory, look: Callable[[Directory], AnyLook]) -> AnyLook:
    """Look at a directory, and again when it seems to have changed meanwhile.

    A live store removes files that were just listed, and a frame may be read while it
    is written. So damage is believed once two looks in a row agree on it.

    Raises
    ------
    MetastoreError
        If no two looks agree, or a file is of another format version.
    """
    previous = None
    for _ in range(LOOKS_MAX):
        try:
            found = look(directory)
        except FileNotFoundError:
            continue
        if isinstance(found.damage, FormatVersionError):
            raise found.damage
        if found.damage is None or str(found.damage) == previous:
            return found
        previous = str(found.damage)
    raise MetastoreError(
        f"the store changed during each of {LOOKS_MAX} looks, as a process is writing "
        f"to it: try again ({directory.path})"
    )


def inspection(directory: Directory, threads: int, progress: Progress) -> Inspection:
    """Read everything, until it is steady."""
    return until_steady(
        directory,
        lambda directory: inspect(directory, threads=threads, progress=progress),
    )


# ---- overview: what headers and ends of the files say ----


@dataclasses.dataclass(frozen=True)
class FileFacts:
    """What is cheap to learn about a log or a snapshot; sizes in bytes."""

    name: FileName
    size: int
    #: Whether a log is sealed, or left open and bounded by the next, or open.
    state: str
    first_sequence: int | None
    #: None in a log that is open: it would have to be read.
    last_sequence: int | None
    #: Of a snapshot.
    n_records: int | None
    created_ns: int | None
    damage: CorruptionError | None


@dataclasses.dataclass(frozen=True)
class Overview:
    """What a directory holds, by its names, headers and indexes."""

    store_id: bytes | None
    files: list[FileFacts]
    listing: Listing
    #: In bytes, of the files in quarantine.
    quarantined_sizes: list[int]
    #: The process that holds the lock, where the system tells.
    holder_pid: int | None
    damage: CorruptionError | None


def overview(directory: Directory) -> Overview:
    """Look at names, headers and indexes; the records are not read."""
    listing = parse_listing(directory.names())
    headers = read_headers(directory, listing)
    plan = make_plan(listing, headers, directory.path)
    files = [
        _facts(directory, name, headers[name], _bound(name, listing, headers))
        for name in (*listing.snapshots, *listing.logs)
    ]
    damages = (facts.damage for facts in files if facts.damage is not None)
    return Overview(
        store_id=plan.store_id,
        files=files,
        listing=listing,
        quarantined_sizes=_quarantined_sizes(directory),
        holder_pid=directory._lock_holder(),
        damage=plan.damage or next(damages, None),
    )


def _bound(name: FileName, listing: Listing, headers: Headers) -> int | None:
    """Return the first sequence of the log behind `name`, if there is one."""
    if name.kind != "log":
        return None
    for later in listing.logs:
        header = headers[later]
        if later > name and isinstance(header, FileHeader):
            return header.sequence
    return None


def _bound_of_contained(name: FileName, headers: Headers) -> int | None:
    """Return the first sequence of the very next log, if that is still there.

    An interrupted removal may have left any of the logs that a snapshot contains: one
    further on bounds nothing.
    """
    header = headers.get(FileName(name.kind, name.number + 1))
    if name.kind != "log" or not isinstance(header, FileHeader):
        return None
    return header.sequence


def _facts(
    directory: Directory,
    name: FileName,
    header: FileHeader | CorruptionError,
    bound: int | None,
) -> FileFacts:
    with contextlib.closing(directory.open(str(name))) as file:
        size = file.size()
        facts = FileFacts(name, size, "damaged", None, None, None, None, None)
        if isinstance(header, CorruptionError):
            return dataclasses.replace(facts, damage=header)
        facts = dataclasses.replace(facts, created_ns=header.created_ns)
        if name.kind == "log":
            last = _sealed_at(file, header)
            state = "sealed" if last is not None else "left open" if bound else "open"
            if last is None and bound is not None:
                last = bound - 1
            return dataclasses.replace(
                facts, state=state, first_sequence=header.sequence, last_sequence=last
            )
        facts = dataclasses.replace(facts, last_sequence=header.sequence)
        try:
            reader = SnapshotReader(file, header)
            reader.check_headers()
        except CorruptionError as error:
            return dataclasses.replace(facts, damage=error)
        return dataclasses.replace(facts, state="published", n_records=reader.n_records)


def _sealed_at(file: FileProtocol, header: FileHeader) -> int | None:
    """Return the last sequence of a sealed log, None of any other.

    In an end frame the last byte that is not zero is the first one of the checksum of
    its empty payload, so that the frame can be found from behind.
    """
    offset = _last_nonzero(file) - _PAYLOAD_CHECKSUM_OFFSET
    if offset < FILE_HEADER_SIZE or offset % 8:
        return None
    frame = memoryview(file.read(offset, FRAME_HEADER_SIZE))
    sequence = int.from_bytes(frame[8:16], "little")
    seed = log_seed(header.store_id, header.number)
    behind = (sequence + 1) % 2**64
    _, _, status = _codec.scan_frames(frame, 0, seed, behind, new_table(1))
    return sequence if status == _codec.SCAN_SEALED else None


def _last_nonzero(file: FileProtocol) -> int:
    end = file.size()
    while end > 0:
        start = max(0, end - _TAIL_WINDOW_SIZE)
        size = size_without_zeros(bytes(file.read(start, end - start)))
        if size:
            return start + size - 1
        end = start
    return -1


def _quarantined_sizes(directory: Directory) -> list[int]:
    """Return the sizes of all files there; what repair copied lies one level down.

    None where `quarantine` is something else, as a link: what is behind it is not ours.
    """

    def fail(error: OSError) -> None:
        if not isinstance(error, FileNotFoundError):
            raise error

    path = os.path.join(directory.path, QUARANTINE)
    if os.path.islink(path) or not os.path.isdir(path):
        return []
    walk = os.walk(path, onerror=fail)
    return [
        os.lstat(os.path.join(folder, name)).st_size
        for folder, _, names in walk
        for name in names
    ]


# ---- verification: what a whole reading says ----


@dataclasses.dataclass(frozen=True)
class FileCheck:
    """What was checked of a log or a snapshot, and what came of it; size in bytes."""

    name: FileName
    size: int
    #: What was checked, for people.
    checked: str
    #: Of a log, and of a snapshot; None where the file was not read.
    n_batches: int | None
    n_records: int | None
    damage: CorruptionError | None
    #: If there is damage: every stretch of bytes that is in no whole frame.
    gaps: tuple[Gap, ...] = ()
    #: The whole snapshot that makes this file superfluous: damage in it is no loss.
    contained_in: FileName | None = None


@dataclasses.dataclass(frozen=True)
class Verification:
    """What a reading of the whole store found."""

    path: str
    #: Every snapshot and log.
    files: list[FileCheck]
    #: Of the whole store; None if it is damaged.
    n_records: int | None
    user_data_size: int | None
    sequence: int | None
    #: The file with a torn tail, its offset, and its size in bytes.
    torn: tuple[FileName, int, int] | None
    temporaries: tuple[str, ...]
    unknown: tuple[str, ...]
    #: In bytes, of the files in quarantine.
    quarantined_sizes: list[int]
    holder_pid: int | None
    #: What recovery would refuse.
    damage: CorruptionError | None

    @property
    def is_sound(self) -> bool:
        """Whether recovery accepts the directory."""
        return self.damage is None

    @property
    def damaged_contained(self) -> list[FileCheck]:
        """Damaged files that a whole snapshot contains: nothing is lost with them."""
        return [check for check in self.files if check.contained_in and check.damage]


def verification(
    directory: Directory, threads: int, progress: Progress
) -> Verification:
    """Read and check every frame of every log and snapshot.

    What a recovery would read is read in the same way. If there is damage, each file is
    also read by itself, so that every damaged one is found and not only the first; and
    so is each that a snapshot contains, which a recovery would only remove.
    """

    def look(directory: Directory) -> Verification:
        return _verify(directory, threads, progress)

    return until_steady(directory, look)


def _verify(directory: Directory, threads: int, progress: Progress) -> Verification:
    found = inspect(directory, threads=threads, progress=progress)
    if isinstance(found.damage, FormatVersionError):
        raise found.damage
    assert found.damage is None or isinstance(found.damage, CorruptionError)
    damage, content = found.damage, found.content
    if content is not None:
        damage = find_exhaustion(content, directory.path)
        content = None if damage else content
    return Verification(
        path=directory.path,
        files=_check_files(directory, found, threads),
        n_records=len(content.columns) if content else None,
        user_data_size=content.columns.user_data_size if content else None,
        sequence=content.sequence if content else None,
        torn=content.torn if content else None,
        temporaries=found.listing.temporaries,
        unknown=found.listing.unknown,
        quarantined_sizes=_quarantined_sizes(directory),
        holder_pid=directory._lock_holder(),
        damage=damage,
    )


def _check_files(
    directory: Directory, found: Inspection, threads: int
) -> list[FileCheck]:
    """Check the files that a recovery reads, and those that it would only remove."""
    listing, headers = found.listing, found.headers
    names = (*listing.snapshots, *listing.logs)
    plan = make_plan(listing, headers, directory.path)
    checks = _checks_read(found.content) if found.content is not None else {}
    for name in names:
        if name not in checks and name not in plan.obsolete:
            bound = _bound(name, listing, headers)
            checks[name] = _check_alone(directory, name, headers[name], bound, threads)
    snapshot = plan.snapshot
    if snapshot is not None and checks[snapshot].damage is not None:
        snapshot = None  # what is contained in it may be all there is
    for name in plan.obsolete:
        bound = (
            _bound_of_contained(name, headers)
            if snapshot
            else _bound(name, listing, headers)
        )
        check = _check_alone(directory, name, headers[name], bound, threads)
        checks[name] = dataclasses.replace(check, contained_in=snapshot)
    return [checks[name] for name in names]


def _check_snapshot(name: FileName, size: int, reader: SnapshotReader) -> FileCheck:
    checked = (
        f"header, index and every block ({reader.n_blocks:,}): "
        f"{reader.n_records:,} records up to batch {reader.header.sequence:,}"
    )
    return FileCheck(name, size, checked, None, reader.n_records, None)


def _check_log(name: FileName, log: LogContent) -> FileCheck:
    first, last = log.sequence - log.n_batches, log.sequence - 1
    which = f"batches {first:,} to {last:,}" if log.n_batches else "no batches"
    end = "sealed" if log.is_sealed else "not sealed"
    checked = f"header and every frame: {which}, {end}"
    if log.torn_size:
        checked += f"; torn tail of {log.torn_size:,} bytes at offset {log.end}"
    return FileCheck(name, log.size, checked, log.n_batches, None, log.damage)


def _checks_read(content: Content) -> dict[FileName, FileCheck]:
    """Describe the files of a store that was read as a whole."""
    checks = {name: _check_log(name, log) for name, log in content.logs}
    name, reader = content.plan.snapshot, content.snapshot
    if name is not None and reader is not None:
        checks[name] = _check_snapshot(name, reader.size, reader)
    return checks


def _check_alone(
    directory: Directory,
    name: FileName,
    header: FileHeader | CorruptionError,
    bound: int | None,
    threads: int,
) -> FileCheck:
    """Read a file without regard to the others."""
    with contextlib.closing(directory.open(str(name))) as file:
        size = file.size()
        if isinstance(header, CorruptionError):
            return FileCheck(name, size, "header", None, None, header)
        if name.kind == "log":
            log = LogFile(file, header, bound, is_mapped=bound is not None)
            contents, _ = read_logs([log], size, threads=threads)
            check = _check_log(name, contents[0])
        else:
            check = _check_snapshot_alone(name, size, file, header, threads)
    if check.damage is None:
        return check
    with contextlib.closing(directory.open(str(name))) as file:
        evidence = Evidence(name, file.view(), header, None)
    return dataclasses.replace(check, gaps=_gaps(evidence, header, bound))


def _check_snapshot_alone(
    name: FileName, size: int, file: FileProtocol, header: FileHeader, threads: int
) -> FileCheck:
    try:
        reader = SnapshotReader(file, header)
        for _ in ordered_map(reader.read_block, range(reader.n_blocks), threads):
            pass
    except CorruptionError as error:
        return FileCheck(name, size, "header, index and blocks", None, None, error)
    return _check_snapshot(name, size, reader)


def _gaps(file: Evidence, header: FileHeader, bound: int | None) -> tuple[Gap, ...]:
    """Go on behind the first damage, so that every bad frame is found."""
    seed = snapshot_seed(header.store_id)
    if file.kind == "log":
        return tuple(salvage_log(file, file.seed(seed), bound).gaps)
    return tuple(salvage_snapshot(file, seed).gaps)
