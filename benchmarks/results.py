"""A figure with its sides, and what it has to reach against them."""

from __future__ import annotations

import dataclasses
import statistics
from collections.abc import Iterable
from typing import Any, Literal

from benchmarks.measure import summary

__all__ = ["OURS", "Row", "figure"]

#: The side that is measured against all others.
OURS = "metastore"

#: Per unit: a divisor and a name, the greatest first.
_UNITS: dict[str, tuple[tuple[float, str], ...]] = {
    "s": ((1, "s"), (1e-3, "ms"), (1e-6, "us"), (1e-9, "ns")),
    "ns": ((1, "ns"),),
    "/s": ((1e6, "M/s"), (1e3, "k/s"), (1, "/s")),
    "bytes": ((1 << 30, "GiB"), (1 << 20, "MiB"), (1 << 10, "KiB"), (1, "bytes")),
    "bytes/record": ((1, "bytes/record"),),
}


def figure(value: float, unit: str) -> str:
    """Return a figure as people read it."""
    scales = _UNITS[unit]
    divisor, name = next((scale for scale in scales if value >= scale[0]), scales[-1])
    scaled = value / divisor
    return f"{scaled:.0f} {name}" if scaled >= 100 else f"{scaled:.3g} {name}"


@dataclasses.dataclass
class Row:
    """One row of a table: every side's samples, and our goals.

    Parameters
    ----------
    name : str
        The case, and its variant if it has several.
    title : str
        What was done.
    unit : str
        ``s``, ``ns``, ``/s``, ``bytes`` or ``bytes/record``.
    samples : dict
        Per side, the samples; the n-th of two sides are of the same round.
    """

    name: str
    title: str
    unit: Literal["s", "ns", "/s", "bytes", "bytes/record"]
    samples: dict[str, list[float]]
    goals: list[dict[str, Any]] = dataclasses.field(default_factory=list)
    notes: list[str] = dataclasses.field(default_factory=list)
    #: What plots need beside the figures.
    extra: dict[str, Any] = dataclasses.field(default_factory=dict)

    @property
    def _higher_is_better(self) -> bool:
        return self.unit == "/s"

    def _ratios(self, over: str, under: str) -> list[float]:
        a, b = self.samples[over], self.samples[under]
        if 1 in (len(a), len(b)):  # a side with one figure, say a computed bound
            return [x / y for x in a for y in b]
        return [x / y for x, y in zip(a, b, strict=True)]

    def beside(self, side: str) -> Row:
        """Give the ratio to a side that no goal is set against."""
        if side in self.samples:
            ratio = summary(self._ratios(OURS, side))
            self._add(side, "of the limit", "none set", None, ratio, None)
        return self

    def times_better(self, side: str, factor: float) -> Row:
        """Ask to be so many times as good as another side, if that side is there."""
        if side in self.samples:
            pair = (OURS, side) if self._higher_is_better else (side, OURS)
            ratio = summary(self._ratios(*pair))
            met = ratio["median"] >= factor
            self._add(side, "times better", "at least", factor, ratio, met)
        return self

    def of_limit(self, side: str, factor: float) -> Row:
        """Ask to be within a factor of what the machine, or a computation, allows."""
        if side in self.samples:
            ratio = summary(self._ratios(OURS, side))
            if self._higher_is_better:
                met = ratio["median"] >= factor
                self._add(side, "of the limit", "at least", factor, ratio, met)
            else:
                met = ratio["median"] <= factor
                self._add(side, "of the limit", "at most", factor, ratio, met)
        return self

    def times_better_than_best(self, sides: Iterable[str], factor: float) -> Row:
        """Ask to be so many times as good as the best of some sides."""
        present = [side for side in sides if side in self.samples]
        if present:
            choose = max if self._higher_is_better else min
            best = choose(
                present, key=lambda side: statistics.median(self.samples[side])
            )
            self.times_better(best, factor)
        return self

    def _add(
        self,
        side: str,
        kind: str,
        bound: str,
        factor: float | None,
        ratio: dict[str, float],
        met: bool | None,
    ) -> None:
        self.goals.append(
            {
                "against": side,
                "kind": kind,
                "bound": bound,
                "factor": factor,
                "ratio": ratio,
                "met": met,
            }
        )

    def as_json(self) -> dict[str, Any]:
        """Return the row with medians and spread."""
        sides = {
            side: {**summary(samples), "samples": samples}
            for side, samples in self.samples.items()
        }
        return {
            "name": self.name,
            "title": self.title,
            "unit": self.unit,
            "sides": sides,
            "goals": self.goals,
            "notes": self.notes,
            **self.extra,
        }
