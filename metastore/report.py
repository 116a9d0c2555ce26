"""What a recovery met, and how a store stands: facts for people and programs."""

from __future__ import annotations

import dataclasses

from metastore.directory import parse_listing

__all__ = ["RecoveryReport", "StoreStats", "printable"]


def printable(name: str) -> str:
    """Return a name as a part of a line, with escapes if not all of it can be shown.

    It may hold any byte but a zero and a slash: what makes lines that look like ours,
    and what no terminal or encoding can take.
    """
    return name if name.isprintable() else ascii(name)[1:-1]


@dataclasses.dataclass(frozen=True, kw_only=True)
class RecoveryReport:
    """What a recovery read, dropped and left alone.

    Names are relative to the directory; sizes are in bytes.
    """

    path: str
    #: The snapshot that was read, or None.
    snapshot: str | None
    #: Logs that were read, in order.
    logs: tuple[str, ...]
    #: Frames that were read: batches and blocks.
    n_frames: int
    #: Batches replayed from logs.
    n_batches: int
    #: Records in the result.
    n_records: int
    #: Sequence of the last batch in the result; 0 in an empty store.
    sequence: int
    #: Bytes of all files that were read.
    bytes_read: int
    #: Bytes of the torn tail that was dropped: never acknowledged, kept in quarantine.
    bytes_dropped: int
    #: What was damaged, when ``on_damage="prefix"`` recovered what precedes it.
    damage: str | None
    #: Files under ``quarantine/`` that this recovery wrote or moved there.
    quarantined: tuple[str, ...]
    #: Files removed because a newer one contains them, or as unpublished leftovers.
    removed: tuple[str, ...]
    #: Names that are not the store's: left alone.
    unknown: tuple[str, ...]
    #: Wall-clock time of the recovery.
    seconds: float

    @property
    def ignored(self) -> tuple[str, ...]:
        """Those of the unknown names that are called like logs or snapshots.

        No regular file is there, but a link, say, or a directory: what a published file
        held is not in the result, if one was there.
        """
        listing = parse_listing([(name, True) for name in self.unknown])
        return tuple(map(str, (*listing.snapshots, *listing.logs)))

    @property
    def is_clean(self) -> bool:
        """Whether nothing was dropped, damaged or, though called like ours, ignored."""
        return not self.bytes_dropped and self.damage is None and not self.ignored

    def __str__(self) -> str:
        source = self.snapshot or "no snapshot"
        lines = [
            f"recovered {self.n_records:,} records up to batch {self.sequence:,} "
            f"in {self.seconds:.3f} s ({printable(self.path)})",
            f"  read: {source} and {len(self.logs)} logs, {self.bytes_read:,} bytes, "
            f"{self.n_frames:,} frames, {self.n_batches:,} batches replayed",
        ]
        if self.bytes_dropped:
            lines.append(
                f"  torn tail: {self.bytes_dropped:,} bytes "
                "that were never acknowledged"
            )
        if self.damage:
            lines.append(f"  damage: {printable(self.damage)}")
        ignored = self.ignored
        others = [name for name in self.unknown if name not in ignored]
        for label, names in (
            ("set aside in quarantine", self.quarantined),
            ("removed, contained elsewhere", self.removed),
            ("ignored, since these are no regular files", ignored),
            ("unknown, left alone", others),
        ):
            if names:
                lines.append(f"  {label}: {', '.join(map(printable, names))}")
        return "\n".join(lines)


@dataclasses.dataclass(frozen=True, kw_only=True)
class StoreStats:
    """How a store stands at one moment. Counts are since it was recovered."""

    #: Sequence of the newest batch, and of the newest that survives power loss.
    sequence: int
    sequence_durable: int
    #: Number of the active log, and its size without preallocated zeros, in bytes.
    log_number: int
    log_size: int
    #: Sealed logs that are not in a snapshot yet: how many, and their bytes.
    n_logs_sealed: int
    logs_sealed_size: int
    #: Number of the newest snapshot (0: none), and its size in bytes.
    snapshot_number: int
    snapshot_size: int
    #: Batches committed, group writes they went in, and syncs of the log.
    n_batches: int
    n_writes: int
    n_syncs: int
    #: Logs begun by rotation, and snapshots written by compaction.
    n_rotations: int
    n_compactions: int
    #: The sticky error, if there is one.
    failure: str | None
