"""What a repair saved, and exactly what it did not: facts for people and programs."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator, Mapping

from metastore.report import printable
from metastore.salvage import Gap, LostBlock

__all__ = ["Range", "RepairReport", "RepairedFile"]

#: The first and the last of some sequences.
Range = tuple[int, int]


@dataclasses.dataclass(frozen=True, kw_only=True)
class RepairedFile:
    """What became of one log or snapshot."""

    name: str
    #: In bytes.
    size: int
    #: What was done with it, for people.
    fate: str
    #: The sequences of a log's whole batches: first and last of each stretch.
    whole: tuple[Range, ...] = ()
    #: Bytes that are in no whole frame, and why.
    gaps: tuple[Gap, ...] = ()
    #: Blocks of a snapshot that are damaged.
    blocks_lost: tuple[LostBlock, ...] = ()
    #: A torn tail: never acknowledged, hence no loss.
    torn: Gap | None = None
    #: Of a damaged snapshot: nothing says up to which batch it goes.
    sequence_unknown: bool = False


@dataclasses.dataclass(frozen=True, kw_only=True)
class RepairReport:
    """What a repair saved, and exactly what it did not."""

    source: str
    destination: str
    #: The process that held the source, where the system tells.
    holder_pid: int | None
    #: Whether only the longest correct prefix was asked for.
    prefix_only: bool
    #: Sequence that the next batch of the new store follows.
    sequence: int
    #: The result holds every batch up to this one.
    prefix_sequence: int
    n_records: int
    user_data_size: int
    #: Batches that were taken from logs.
    n_batches: int
    #: Sequences, first and last, of batches that are known to have been and are lost.
    missing: tuple[Range, ...]
    #: Those of whole batches behind the prefix, if only that was asked for.
    left_out: tuple[Range, ...]
    files: tuple[RepairedFile, ...]
    #: In hex: the store whose files were used. None where no whole header tells.
    store_id: str | None
    #: How many files are of other stores, and were not used.
    n_foreign: int
    #: Where the copy lies, relative to the destination; its files and their bytes.
    original: str
    n_copied: int
    copied_size: int
    #: Names that were not copied: links, directories with all that is in them, and
    #: whatever else is no regular file.
    not_copied: tuple[str, ...]
    #: Bytes that the source's medium would not give; zeros in the copy.
    unreadable: Mapping[str, tuple[Gap, ...]]

    @property
    def is_prefix(self) -> bool:
        """Whether the result is what the store held after some batch."""
        return self.prefix_only or (
            not any(first <= self.sequence for first, _ in self.missing)
            and not any(
                file.blocks_lost or file.sequence_unknown for file in self.files
            )
        )

    @property
    def is_complete(self) -> bool:
        """Whether nothing that was found had anything to lose which was not saved."""
        return (
            not self.missing
            and not self.left_out
            and not self.unreadable
            and not self.n_foreign  # which store was meant, nothing here can tell
            and not any(file.gaps or file.blocks_lost for file in self.files)
        )

    def as_json(self) -> dict[str, object]:
        """Return everything as what ``json.dumps`` takes."""
        return {
            "is_prefix": self.is_prefix,
            "is_complete": self.is_complete,
            **dataclasses.asdict(self),
        }

    def __str__(self) -> str:
        return "\n".join(self._lines())

    def _lines(self) -> Iterator[str]:
        yield f"repaired {printable(self.source)} into {printable(self.destination)}"
        if self.holder_pid is not None:
            yield (
                f"  process {self.holder_pid} holds the source: what it wrote "
                "meanwhile may look like damage; shut it down and repair again"
            )
        yield (
            f"  saved: {self.n_records:,} records, {self.user_data_size:,} bytes of "
            f"user data, {self.n_batches:,} batches from logs; "
            f"complete up to batch {self.prefix_sequence:,}"
        )
        yield f"  next batch: {self.sequence + 1:,}"
        if self.store_id is not None:
            yield f"  files used: of store {self.store_id}"
        yield (
            f"  copied: {self.n_copied:,} files, {self.copied_size:,} bytes, "
            f"into {self.original}"
        )
        if self.not_copied:
            names = ", ".join(map(printable, self.not_copied))
            yield f"  not copied, directories or links or the like: {names}"
        for name, gaps in self.unreadable.items():
            yield from (f"  {printable(name)}: {_place(gap)}" for gap in gaps)
        for file in self.files:
            yield from _file_lines(file)
        if self.missing:
            yield f"missing: batches {_ranges(self.missing)}"
        if self.left_out:
            yield f"left out, behind the damage: batches {_ranges(self.left_out)}"
        if self.n_foreign:
            yield (
                f"NOT USED: {self.n_foreign:,} of the files above, of another store: "
                "to save that one, repair a directory that holds its files only"
            )
        if not self.is_prefix:
            yield (
                "NOT A PREFIX: the result may hold batches behind others that are "
                "missing; records that those would have changed are as they were before"
            )
        if self.is_complete:
            yield "nothing is known to be missing"


def _file_lines(file: RepairedFile) -> Iterator[str]:
    whole = f": batches {_ranges(file.whole)}" if file.whole else ""
    yield f"  {file.name}  {file.size:,} bytes, {file.fate}{whole}"
    for gap in file.gaps:
        yield f"    not saved: {_place(gap)}"
    for lost in file.blocks_lost:
        n = "an unknown number of" if lost.n_records is None else f"{lost.n_records:,}"
        yield (
            f"    lost: {n} records with keys {lost.first_key} to {lost.last_key} "
            f"({lost.size:,} bytes at offset {lost.offset})"
        )
    if file.sequence_unknown:
        yield "    nothing says up to which batch it goes"
    if file.torn:
        yield f"    torn tail, never acknowledged: {_place(file.torn)}"


def _place(gap: Gap) -> str:
    return f"{gap.size:,} bytes at offset {gap.offset}: {gap.reason}"


def _ranges(ranges: Iterable[Range]) -> str:
    return ", ".join(
        f"{first:,}" if first == last else f"{first:,} to {last:,}"
        for first, last in ranges
    )
