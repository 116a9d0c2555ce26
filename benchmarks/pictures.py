"""The pictures of docs/performance.md."""

from __future__ import annotations

import pathlib
from typing import Any

import matplotlib as mpl

mpl.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from benchmarks.peers import PEERS
from benchmarks.results import OURS

__all__ = ["draw"]

_OURS_COLOUR = "#c0392b"
_OTHER_COLOURS = (
    "#2c3e50",
    "#d68910",
    "#2980b9",
    "#16a085",
    "#8e44ad",
    "#7f8c8d",
    "#6e2c00",
    "#1abc9c",
)
_SIZE = (8, 4.5)

Rows = dict[str, dict[str, Any]]


def _colours(names: list[str]) -> dict[str, str]:
    others = [name for name in names if name != OURS]
    colours = {
        name: _OTHER_COLOURS[number % len(_OTHER_COLOURS)]
        for number, name in enumerate(others)
    }
    return {OURS: _OURS_COLOUR, **colours}


def _axes(title: str, x_label: str, y_label: str) -> tuple[Figure, Axes]:
    figure, axes = plt.subplots(figsize=_SIZE, dpi=100, layout="constrained")
    axes.set_title(title)
    axes.set_xlabel(x_label)
    axes.set_ylabel(y_label)
    axes.grid(alpha=0.3)
    return figure, axes


def _load_times(rows: Rows, path: pathlib.Path, *, cold: bool) -> bool:
    """Draw the time of a full load against the number of records."""
    chosen = [row for row in rows.values() if row.get("cold") is cold]
    if not chosen:
        return False
    state = "page cache dropped" if cold else "warm"
    figure, axes = _axes(f"Open and load every record, {state}", "records", "seconds")
    names = list(dict.fromkeys(name for row in chosen for name in row["sides"]))
    for name, colour in _colours(names).items():
        points = sorted(
            (row["n_records"], row["sides"][name]["median"])
            for row in chosen
            if name in row["sides"]
        )
        style = "-o" if name == OURS else "--o"
        axes.plot(*zip(*points, strict=True), style, color=colour, label=name)
    axes.set_xscale("log")
    axes.set_yscale("log")
    figure.legend(fontsize="small", loc="outside lower center", ncols=3)
    _save(figure, path)
    return True


def _ratios(rows: Rows, path: pathlib.Path) -> bool:
    """Draw how many times better than the ancestor, and where the goal is."""
    bars = [
        (row["name"], goal["ratio"], goal["factor"])
        for row in rows.values()
        for goal in row["goals"]
        if goal["against"] == "ancestor" and goal["kind"] == "times better"
    ]
    if not bars:
        return False
    figure, axes = _axes("Times better than the ancestor", "", "ratio")
    places = range(len(bars))
    medians = [ratio["median"] for _, ratio, _ in bars]
    spread = [
        [ratio["median"] - ratio["min"] for _, ratio, _ in bars],
        [ratio["max"] - ratio["median"] for _, ratio, _ in bars],
    ]
    axes.bar(places, medians, color=_OURS_COLOUR, yerr=spread, label="measured")
    goals = [factor for *_, factor in bars]
    axes.plot(places, goals, "_", color="black", markersize=18, label="to reach")
    axes.set_xticks(places, [name for name, *_ in bars], rotation=60)
    axes.set_yscale("log")
    axes.legend()
    _save(figure, path)
    return True


def _beside_peers(rows: Rows, path: pathlib.Path) -> bool:
    """Draw how many times better than each peer: warm loads, storing, commits."""
    loads = [row for row in rows.values() if row.get("cold") is False]
    loads.sort(key=lambda row: int(row["n_records"]))
    # of the three sizes the two large ones, for which the goals were set
    chosen = loads[-2:] + [
        row for row in rows.values() if row["name"].startswith(("P2", "P3 C"))
    ]
    present = [
        peer.name for peer in PEERS if any(peer.name in row["sides"] for row in chosen)
    ]
    if not present:
        return False
    figure, axes = _axes("Times better than each peer", "", "ratio of the medians")
    colours = _colours(present)
    width = 0.8 / len(present)
    for number, name in enumerate(present):
        # a bar rises from 1, where both are level, or hangs from it
        bars = [
            (place + (number + 0.5) * width - 0.4, _times_better(row, name) - 1)
            for place, row in enumerate(chosen)
            if name in row["sides"]
        ]
        places, heights = zip(*bars, strict=True)
        axes.bar(places, heights, width, 1, color=colours[name], label=name)
    axes.axhline(1, color=_OURS_COLOUR, label=OURS)
    names = [row["name"].replace(" ", "\n", 1) for row in chosen]
    axes.set_xticks(range(len(chosen)), names)
    axes.set_yscale("log")
    figure.legend(fontsize="small", loc="outside lower center", ncols=3)
    _save(figure, path)
    return True


def _times_better(row: dict[str, Any], side: str) -> float:
    ours, others = (float(row["sides"][name]["median"]) for name in (OURS, side))
    return ours / others if row["unit"] == "/s" else others / ours


def _recovery_times(rows: Rows, path: pathlib.Path) -> bool:
    """Draw the time of R1 to R4 against the number of records, with R6's points."""
    lines = {}
    for name in ("R1", "R2", "R3", "R4"):
        found = [rows[key] for key in (name, f"R6 {name}") if key in rows]
        points = [(row["n_records"], _seconds(row)) for row in found]
        if points:
            lines[name] = points
    if not lines:
        return False
    figure, axes = _axes("Recovery", "records", "seconds")
    for (name, points), colour in zip(lines.items(), _OTHER_COLOURS, strict=False):
        axes.plot(*zip(*points, strict=True), "-o", color=colour, label=name)
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.legend()
    _save(figure, path)
    return True


def _seconds(row: dict[str, Any]) -> float:
    """Return our time for all records; R6 tells nanoseconds per record."""
    median = float(row["sides"][OURS]["median"])
    return median * row["n_records"] / 1e9 if row["unit"] == "ns" else median


def _latencies(rows: Rows, path: pathlib.Path) -> bool:
    """Draw the distributions of commit latencies, the tail stretched."""
    lines = [
        (f"{row['name'].split(' p')[0]}, {side}", points)
        for row in rows.values()
        for side, points in row.get("latencies", {}).items()
    ]
    if not lines:
        return False
    figure, axes = _axes(
        "Latency of a durable commit", "share of commits that took longer", "seconds"
    )
    for name, points in lines:
        shares = [1 - fraction for fraction, _ in points]
        axes.plot(shares, [seconds for _, seconds in points], label=name)
    axes.set_xscale("log")
    axes.invert_xaxis()
    axes.set_yscale("log")
    axes.legend(fontsize="small")
    _save(figure, path)
    return True


def _memory(rows: Rows, names: tuple[str, ...], title: str, path: pathlib.Path) -> bool:
    """Draw anonymous memory over time."""
    chosen = [row for row in rows.values() if row["name"].startswith(names)]
    lines = [
        (row["name"] if len(row["memory"]) == 1 else side, points)
        for row in chosen
        for side, points in row.get("memory", {}).items()
        if points
    ]
    if not lines:
        return False
    figure, axes = _axes(title, "seconds", "MiB, without file pages")
    for name, points in lines:
        mebibytes = [anonymous / (1 << 20) for _, anonymous, _ in points]
        width = 2.5 if name == OURS else 1.2
        axes.plot([at for at, *_ in points], mebibytes, label=name, linewidth=width)
    axes.legend(fontsize="small")
    _save(figure, path)
    return True


def _save(figure: Figure, path: pathlib.Path) -> None:
    # without date and version inside, equal figures give equal bytes
    figure.savefig(path, metadata={"Software": None})
    plt.close(figure)


def draw(content: dict[str, Any], folder: pathlib.Path) -> list[tuple[str, str]]:
    """Draw what the figures allow; return file names and what they show."""
    rows: Rows = {
        row["name"]: row
        for result in content["cases"].values()
        for row in result.get("rows", [])
    }
    drawn = [
        (
            _load_times(rows, folder / "load-warm.png", cold=False),
            "load-warm.png",
            "Time of a full load against the number of records, warm",
        ),
        (
            _load_times(rows, folder / "load-cold.png", cold=True),
            "load-cold.png",
            "The same with the page cache dropped",
        ),
        (
            _ratios(rows, folder / "ancestor.png"),
            "ancestor.png",
            "How many times better than the ancestor, and the goals",
        ),
        (
            _beside_peers(rows, folder / "peers.png"),
            "peers.png",
            "How many times better than each of the other stores",
        ),
        (
            _recovery_times(rows, folder / "recovery.png"),
            "recovery.png",
            "Time of a recovery against the number of records",
        ),
        (
            _latencies(rows, folder / "latencies.png"),
            "latencies.png",
            "Distribution of commit latencies",
        ),
        (
            _memory(rows, ("M1", "M2"), "Memory over time", folder / "memory.png"),
            "memory.png",
            "Memory of recovery and of compaction over time",
        ),
        (
            _memory(
                rows,
                ("P3 memory",),
                "Memory of a full load",
                folder / "memory-peers.png",
            ),
            "memory-peers.png",
            "Memory of a full load over time, beside other stores",
        ),
    ]
    return [(name, text) for was_drawn, name, text in drawn if was_drawn]
