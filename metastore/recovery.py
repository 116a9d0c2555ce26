"""What a directory means: decide by plan, read, then act.

``make_plan`` is pure: names and headers in, a plan out. ``read`` changes nothing.
``settle`` keeps what is dropped; ``remove_obsolete`` removes a file only after what
contains it was read whole.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import time
from collections.abc import Callable, Iterator, Mapping

from metastore.columns import Columns, Recovered, concatenate, merge, sort_last_wins
from metastore.directory import (
    QUARANTINE,
    DirectoryProtocol,
    FileName,
    FileProtocol,
    Listing,
    file_sizes,
    parse_listing,
    read_header,
)
from metastore.errors import CorruptionError, FormatVersionError, MetastoreError
from metastore.format import (
    NUMBER_MAX,
    SEQUENCE_MAX,
    FileHeader,
)
from metastore.log import LogContent, LogFile, ends_sealed, open_log, read_logs
from metastore.quarantine import Quarantine
from metastore.report import RecoveryReport
from metastore.snapshot import SnapshotReader

__all__ = [
    "Content",
    "Plan",
    "Progress",
    "find_exhaustion",
    "inspect",
    "make_plan",
    "read",
    "read_headers",
    "settle",
]

#: Told the bytes done and the bytes in all.
Progress = Callable[[int, int], None]

Headers = Mapping[FileName, FileHeader | CorruptionError]

_WAY_OUT = (
    "nothing was changed; copy the directory, then recover it with "
    'on_damage="prefix" to get the batches that precede the damage'
)


# ---- decide ----


@dataclasses.dataclass(frozen=True)
class Plan:
    """What to read, in which order, and what may go afterwards."""

    #: That of the store; None in a new directory.
    store_id: bytes | None
    snapshot: FileName | None
    #: Logs to replay, in order, with their headers.
    logs: tuple[tuple[FileName, FileHeader], ...]
    #: Contained in the snapshot: to be removed once that was read whole.
    obsolete: tuple[FileName, ...]
    #: The first thing that is wrong, and the files that are at or behind it.
    damage: CorruptionError | None
    set_aside: tuple[FileName, ...]
    listing: Listing

    @property
    def files(self) -> list[FileName]:
        """What is to be read: the snapshot, then the logs."""
        snapshot = [self.snapshot] if self.snapshot else []
        return [*snapshot, *(name for name, _ in self.logs)]


def read_headers(directory: DirectoryProtocol, listing: Listing) -> Headers:
    """Read the header of every log and snapshot; damaged ones yield their error.

    Raises
    ------
    FormatVersionError
        If a file is of another version: then nothing may be touched.
    """
    headers: dict[FileName, FileHeader | CorruptionError] = {}
    for name in (*listing.snapshots, *listing.logs):
        file = directory.open(str(name))
        try:
            headers[name] = read_header(file, name)
        except CorruptionError as error:
            headers[name] = error.with_traceback(None)  # it leads back to the headers
        finally:
            file.close()
    return headers


def make_plan(listing: Listing, headers: Headers, path: str) -> Plan:
    """Decide what a directory's names and headers mean; touches nothing.

    Parameters
    ----------
    listing : Listing
        The names.
    headers : mapping of FileName to FileHeader or CorruptionError
        The header of each snapshot and log, or what is wrong with it.
    path : str
        The directory, for errors.
    """
    walk = _Walk(headers, path)
    snapshot = walk.choose_snapshot(listing.snapshots)
    number = snapshot.number if snapshot else 0
    older = [name for name in listing.snapshots if name.number < number]
    contained = [name for name in listing.logs if name.number <= number]
    later = [name for name in listing.logs if name.number > number]
    obsolete = [*older, *contained]
    for name in obsolete:
        walk.check_contained(name, snapshot)
    logs = walk.join(later, snapshot)
    return Plan(
        store_id=walk.store_id,
        snapshot=snapshot,
        logs=tuple(logs),
        obsolete=tuple(name for name in obsolete if name not in walk.set_aside),
        damage=walk.damage,
        set_aside=tuple(walk.set_aside),
        listing=listing,
    )


class _Walk:
    """Goes through the files once and notes the first thing that is wrong."""

    def __init__(self, headers: Headers, path: str) -> None:
        self._headers = headers
        self._path = path
        self.store_id: bytes | None = None
        self.damage: CorruptionError | None = None
        self.set_aside: list[FileName] = []

    def _note(self, error: CorruptionError, *names: FileName) -> None:
        self.damage = self.damage or error
        self.set_aside += names

    def _header(self, name: FileName) -> FileHeader | CorruptionError:
        header = self._headers[name]
        if isinstance(header, CorruptionError):
            return header
        self.store_id = self.store_id or header.store_id
        if header.store_id != self.store_id:
            return CorruptionError(
                f"{self._path}/{name}",
                16,
                f"a file of another store: id {header.store_id.hex()} "
                f"among {self.store_id.hex()}",
            )
        return header

    def choose_snapshot(self, snapshots: tuple[FileName, ...]) -> FileName | None:
        """Return the newest snapshot whose header is valid."""
        for name in reversed(snapshots):
            header = self._header(name)
            if isinstance(header, FileHeader):
                return name
            self._note(header, name)
        return None

    def _sequence_of(self, snapshot: FileName | None) -> int:
        header = self._headers[snapshot] if snapshot else None
        return header.sequence if isinstance(header, FileHeader) else 0

    def check_contained(self, name: FileName, snapshot: FileName | None) -> None:
        """Check that a file which the snapshot makes obsolete is what it seems."""
        header = self._header(name)
        if isinstance(header, CorruptionError):
            self._note(header, name)
            return
        last = self._sequence_of(snapshot)
        if header.sequence > last + (name.kind == "log"):
            reason = f"begins at batch {header.sequence}, but {snapshot} ends at {last}"
            self._note(CorruptionError(f"{self._path}/{name}", 40, reason), name)

    def join(
        self, logs: list[FileName], snapshot: FileName | None
    ) -> list[tuple[FileName, FileHeader]]:
        """Return the logs up to the first that does not join what precedes it."""
        joined: list[tuple[FileName, FileHeader]] = []
        wanted = self._sequence_of(snapshot) + 1
        for i, name in enumerate(logs):
            header = self._header(name)
            if isinstance(header, CorruptionError):
                self._note(header, *logs[i:])
                break
            if header.sequence < wanted or (not joined and header.sequence > wanted):
                before = (
                    f"{joined[-1][0]}" if joined else f"{snapshot or 'no snapshot'}"
                )
                missing = header.sequence > wanted
                reason = (
                    f"begins at batch {header.sequence}, but batch {wanted} must "
                    f"follow {before}: "
                    f"{'a file is missing' if missing else 'they overlap'}"
                )
                error = CorruptionError(f"{self._path}/{name}", 40, reason)
                self._note(error, *logs[i:])
                break
            joined.append((name, header))
            wanted = header.sequence
        return joined


# ---- read ----


@dataclasses.dataclass
class Content:
    """What the files of a plan hold."""

    plan: Plan
    columns: Columns
    #: Sequence of the last batch; 0 in an empty store.
    sequence: int
    #: The logs of the plan that were read, with their contents but for the records.
    logs: list[tuple[FileName, LogContent]]
    snapshot: SnapshotReader | None
    n_blocks: int
    bytes_read: int
    damage: CorruptionError | None
    #: Files at or behind the damage.
    set_aside: list[FileName]
    #: A log with damage whose beginning is part of the content.
    damaged_log: FileName | None

    @property
    def torn(self) -> tuple[FileName, int, int] | None:
        """Name, offset and size of the torn tail."""
        if not self.logs or not self.logs[-1][1].torn_size:
            return None
        name, log = self.logs[-1]
        return name, log.end, log.torn_size

    @property
    def empty_logs(self) -> list[FileName]:
        """Logs that were read whole and hold nothing."""
        return [
            name
            for name, log in self.logs
            if log.n_batches == 0 and not log.torn_size and log.damage is None
        ]

    @property
    def ends_sealed(self) -> bool:
        """Whether the newest log that stays needs no later one as its bound."""
        empty = self.empty_logs
        kept = [log for name, log in self.logs if name not in empty]
        return not kept or (kept[-1].is_sealed and kept[-1].damage is None)


class _Told:
    """Whom a recovery tells how far it is, and whether an error is theirs.

    It may be of any type, as where they read another store: it is no damage of this.
    """

    def __init__(self, progress: Progress | None) -> None:
        self._progress = progress
        self.is_error_theirs = False

    def __call__(self, done: int, total: int) -> None:
        if self._progress:
            self.is_error_theirs = True
            self._progress(done, total)
            self.is_error_theirs = False


class _Counter:
    def __init__(self, total: int, progress: Progress | None) -> None:
        self.done = 0
        self._total = total
        self._progress = progress
        self.add(0)

    def add(self, size: int) -> None:
        self.done = min(self.done + size, self._total)
        if self._progress:
            self._progress(self.done, self._total)


def read(
    directory: DirectoryProtocol,
    plan: Plan,
    *,
    threads: int,
    progress: Progress | None = None,
    settle_log: bool = True,
    stop_at_damage: bool = False,
) -> Content:
    """Read what a plan names; changes no file.

    Parameters
    ----------
    directory : DirectoryProtocol
        The directory.
    plan : Plan
        Made of that directory.
    threads : int
        How many threads decode.
    progress : callable, optional
        Called in this thread with bytes done and bytes in all.
    settle_log : bool
        Whether to sync the newest log, if no end frame says that all of it is durable,
        and drop it from the page cache first: what a failed sync left in the cache may
        not be on the medium.
    stop_at_damage : bool
        Return what precedes damage in a log instead of raising.

    Raises
    ------
    CorruptionError
        For damage in the snapshot; in a log too unless `stop_at_damage`.
    """
    sizes = file_sizes(directory, plan.files)
    total = sum(sizes.values())
    counter = _Counter(total, progress)
    content = Content(
        plan, Columns.allocate(0, 0), 0, [], None, 0, total, None, [], None
    )
    content.damage = plan.damage
    content.set_aside = list(plan.set_aside)
    with _open_snapshot(directory, content) as reader:
        parts = _read_logs(
            directory, content, sizes, threads, counter, settle_log, stop_at_damage
        )
        run = sort_last_wins(concatenate(parts), threads, reuse=True)
        if reader is None:
            content.columns = merge(Columns.allocate(0, 0), run, threads)
        elif len(run) == 0:
            content.columns = reader.read_all(threads, counter.add)
        else:
            content.columns = reader.read_merged(run, threads, counter.add)
    counter.add(total)
    return content


@contextlib.contextmanager
def _open_snapshot(
    directory: DirectoryProtocol, content: Content
) -> Iterator[SnapshotReader | None]:
    name = content.plan.snapshot
    if name is None:
        yield None
        return
    with contextlib.closing(directory.open(str(name))) as file:
        header = read_header(file, name)
        reader = SnapshotReader(file, header)
        content.snapshot = reader
        content.n_blocks = reader.n_blocks
        content.sequence = header.sequence
        yield reader


def _read_logs(
    directory: DirectoryProtocol,
    content: Content,
    sizes: Mapping[FileName, int],
    threads: int,
    counter: _Counter,
    settle_log: bool,
    stop_at_damage: bool,
) -> list[Columns]:
    logs = content.plan.logs

    def prepare(header: FileHeader, bound: int | None, file: FileProtocol) -> LogFile:
        is_durable = bound is not None or (settle_log and ends_sealed(file, header))
        if settle_log and not is_durable:
            file.sync()
            file.drop_cache()
        return LogFile(file, header, bound, is_mapped=is_durable)

    bounds = [*(header.sequence for _, header in logs[1:]), None]
    contents, parts = read_logs(
        (
            open_log(directory, name, functools.partial(prepare, header, bound))
            for (name, header), bound in zip(logs, bounds, strict=False)
        ),
        sum(sizes[name] for name, _ in logs),
        threads=threads,
        on_bytes=counter.add,
    )
    damage = contents[-1].damage if contents else None
    if damage is not None and not stop_at_damage:
        if content.snapshot is not None:
            # The first damage is told, not the last.
            content.snapshot.read_all(threads, counter.add)
        contents.clear()
        try:
            raise damage
        finally:
            del damage  # it leads back to this frame, and would keep what was read
    for (name, _), log in zip(logs, contents, strict=False):
        content.sequence = log.sequence - 1
        content.logs.append((name, log))
    if damage is not None:
        _stop_at_damage(content)
    return parts


def _stop_at_damage(content: Content) -> None:
    """Set aside what lies at or behind the damage in the last log that was read."""
    name, log = content.logs[-1]
    content.damage = log.damage
    behind = [later for later, _ in content.plan.logs[len(content.logs) :]]
    if log.n_batches:
        content.damaged_log = name
    else:
        behind.insert(0, name)
        content.logs.pop()
    content.set_aside = [*behind, *content.set_aside]


def find_exhaustion(content: Content, path: str) -> CorruptionError | None:
    """Return what a store is refused for, though each file of it is whole."""
    if content.plan.listing.number_max >= NUMBER_MAX:
        return CorruptionError(path, 0, "file numbers are used up")
    if content.sequence >= SEQUENCE_MAX:
        return CorruptionError(path, 0, "sequences are used up")
    return None


# ---- act ----


def settle(directory: DirectoryProtocol, content: Content) -> tuple[str, ...]:
    """Keep in ``quarantine/`` what a recovery drops or sets aside; durable on return.

    Damaged files are moved, or copied where their beginning is still needed. A crash
    on the way leaves a directory that recovers the same. The newest torn tails stay.

    Returns
    -------
    tuple of str
        Names of the files in quarantine, relative to the directory.
    """
    torn = content.torn
    if torn is None and not content.set_aside and content.damaged_log is None:
        return ()
    with contextlib.closing(directory.subdirectory(QUARANTINE)) as target:
        quarantine = Quarantine(directory, target)
        if torn is not None:
            name, offset, size = torn
            quarantine.copy(name, f"torn_{name}_{offset:016x}", offset, size)
        if content.damaged_log is not None:
            quarantine.copy(content.damaged_log, str(content.damaged_log), 0, None)
        target.sync()
        # From the newest down, so that a crash never leaves a hole between two logs.
        for name in sorted(set(content.set_aside), key=lambda n: -n.number):
            quarantine.move(name)
        quarantine.remove_old_tails()
        return tuple(f"{QUARANTINE}/{name}" for name in quarantine.kept)


def remove_temporaries(
    directory: DirectoryProtocol, content: Content
) -> tuple[str, ...]:
    """Remove what was never published; return the names."""
    names = content.plan.listing.temporaries
    for name in names:
        directory.remove(name)
    return names


def remove_obsolete(directory: DirectoryProtocol, content: Content) -> tuple[str, ...]:
    """Remove what the content read makes superfluous, after the new log stands.

    Returns
    -------
    tuple of str
        The names: files that the snapshot contains, logs without batches.
    """
    names = tuple(map(str, [*content.plan.obsolete, *content.empty_logs]))
    for name in names:
        directory.remove(name)
    return names


def make_report(
    directory: DirectoryProtocol,
    content: Content,
    *,
    quarantined: tuple[str, ...] = (),
    removed: tuple[str, ...] = (),
    seconds: float,
) -> RecoveryReport:
    """Return the report of a recovery."""
    n_batches = sum(log.n_batches for _, log in content.logs)
    torn = content.torn
    return RecoveryReport(
        path=directory.path,
        snapshot=str(content.plan.snapshot) if content.plan.snapshot else None,
        logs=tuple(str(name) for name, _ in content.logs),
        n_frames=n_batches + content.n_blocks,
        n_batches=n_batches,
        n_records=len(content.columns),
        sequence=content.sequence,
        bytes_read=content.bytes_read,
        bytes_dropped=torn[2] if torn else 0,
        damage=str(content.damage) if content.damage else None,
        quarantined=quarantined,
        removed=removed,
        unknown=content.plan.listing.unknown,
        seconds=seconds,
    )


def read_directory(
    directory: DirectoryProtocol,
    *,
    on_damage: str,
    threads: int,
    progress: Progress | None,
    settle_log: bool = True,
) -> Content:
    """Plan and read a directory; with ``on_damage="prefix"`` stop before damage.

    A damaged snapshot is given up for an older one, if there is one, with the logs
    that follow that.
    """
    told = _Told(progress)
    try:
        listing = parse_listing(directory.names())
        headers = read_headers(directory, listing)
        return _read_listed(
            directory, listing, headers, on_damage, threads, told, settle_log
        )
    except CorruptionError as error:
        if not told.is_error_theirs:
            error.add_note(_WAY_OUT)
        raise


def _read_listed(
    directory: DirectoryProtocol,
    listing: Listing,
    headers: Headers,
    on_damage: str,
    threads: int,
    told: _Told,
    settle_log: bool,
) -> Content:
    known = dict(headers)
    while True:
        plan = make_plan(listing, known, directory.path)
        if plan.damage is not None and on_damage == "raise":
            raise plan.damage
        try:
            return read(
                directory,
                plan,
                threads=threads,
                progress=told,
                settle_log=settle_log,
                stop_at_damage=on_damage == "prefix",
            )
        except CorruptionError as error:
            if told.is_error_theirs or on_damage == "raise" or plan.snapshot is None:
                raise
            # A traceback leads back to what is known, and would keep what was read.
            known[plan.snapshot] = error.with_traceback(None)


@dataclasses.dataclass(frozen=True)
class Inspection:
    """What a look at a directory found; nothing was locked or changed."""

    listing: Listing
    #: Header, or what is wrong with it, of each snapshot and log.
    headers: Headers
    #: Sizes in bytes of each snapshot and log.
    sizes: Mapping[FileName, int]
    #: The contents and what was read, unless there is damage.
    recovered: Recovered | None
    content: Content | None
    #: The damage that a recovery would refuse.
    damage: MetastoreError | None


def inspect(
    directory: DirectoryProtocol,
    *,
    threads: int = 1,
    progress: Progress | None = None,
) -> Inspection:
    """Read a whole directory without the lock and without changing it.

    A live store may compact meanwhile: then a file is gone, and FileNotFoundError
    asks to look again.
    """
    started = time.perf_counter()
    listing = parse_listing(directory.names())
    sizes = file_sizes(directory, (*listing.snapshots, *listing.logs))
    try:
        headers = read_headers(directory, listing)
    except FormatVersionError as error:
        return Inspection(listing, {}, sizes, None, None, error)
    told = _Told(progress)
    try:
        content = _read_listed(
            directory, listing, headers, "raise", threads, told, settle_log=False
        )
    except MetastoreError as error:
        if told.is_error_theirs:
            raise
        return Inspection(listing, headers, sizes, None, None, error)
    report = make_report(directory, content, seconds=time.perf_counter() - started)
    recovered = Recovered(content.columns, report)
    return Inspection(listing, headers, sizes, recovered, content, None)
