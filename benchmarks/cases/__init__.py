"""The cases, by name, in the order in which they run."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

from benchmarks.cases import commits, compaction, loads, recovery, sizes
from benchmarks.results import Row
from benchmarks.settings import Settings

__all__ = ["CASES", "Case"]


@dataclasses.dataclass(frozen=True)
class Case:
    """One case: what it measures, and what it needs."""

    name: str
    title: str
    run: Callable[[Settings], list[Row]]
    #: Bytes on the disk at scale 1 while it runs, fixtures among them.
    disk_size: int
    #: Whether only ``--large`` runs it.
    large: bool = False


_MB = 1_000_000

CASES: dict[str, Case] = {
    case.name: case
    for case in (
        Case("R1", "recover a snapshot", recovery.r1, 300 * _MB),
        Case("R2", "recover a large snapshot", recovery.r2, 1_000 * _MB),
        Case("R3", "recover a log of one-record frames", recovery.r3, 350 * _MB),
        Case("R4", "recover a log of batches", recovery.r4, 1_000 * _MB),
        Case("R5", "recover a snapshot and a log", recovery.r5, 1_500 * _MB),
        Case("R6", "R1 to R4 at 100M records", recovery.r6, 12_000 * _MB, large=True),
        Case("C1", "durable one-record commits", commits.c1, 100 * _MB),
        Case("C2", "the same with threads", commits.c2, 100 * _MB),
        Case("C3", "batches of 1,000 tuples", commits.c3, 400 * _MB),
        Case("C4", "batches of 100,000 as arrays", commits.c4, 500 * _MB),
        Case("C5", "latencies during compaction", commits.c5, 2_000 * _MB),
        Case("C6", "commits beside a spinning thread", commits.c6, 100 * _MB),
        Case("K1", "compaction", compaction.k1, 1_500 * _MB),
        Case("M1", "peak memory of recovery", sizes.m1, 2_000 * _MB),
        Case("M2", "peak memory of compaction", sizes.m2, 1_500 * _MB),
        Case("D1", "bytes on the disk", sizes.d1, 500 * _MB),
        Case("P1", "full load beside peers", loads.p1, 12_000 * _MB),
        Case("P2", "durable load beside peers", loads.p2, 1_500 * _MB),
        Case("P3", "commits and sizes beside peers", loads.p3, 3_000 * _MB),
    )
}
