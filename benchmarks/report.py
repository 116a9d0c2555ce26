"""Figures to a JSON file, to text, and into docs/performance.md with its pictures."""

from __future__ import annotations

import importlib
import json
import os
import pathlib
from collections.abc import Callable, Sequence
from typing import Any

from benchmarks.measure import BenchmarkError
from benchmarks.results import OURS, figure

__all__ = ["QUIET", "Figures", "as_text", "check", "write"]

_DOCUMENT = pathlib.Path("docs/performance.md")
_PICTURES = pathlib.Path("docs/pictures")
_BEGIN = "<!-- benchmarks: begin (written by `python -m benchmarks --report`) -->"
_END = "<!-- benchmarks: end -->"
#: What tells one machine from another; the rest of its description may change.
_SAME = ("id", "processor", "cores", "memory_size", "file_system", "architecture")
#: So many processors may others keep busy before a case without spoiling its figures.
QUIET = 0.2


class Figures:
    """The figures of one or several runs, kept in a JSON file case by case.

    Parameters
    ----------
    path : str or None
        The file. What it holds of other cases stays; None keeps nothing.
    order : sequence of str
        Names of cases as they are to follow each other, whenever they were measured.
    """

    def __init__(self, path: str | None, order: Sequence[str]) -> None:
        self._path = path
        self._order = order
        self.content: dict[str, Any] = {"cases": {}}
        if path and os.path.exists(path):
            try:
                with open(path, encoding="utf-8") as file:
                    self.content = json.load(file)
                for case in self.content["cases"].values():
                    # older versions kept the load average, and one machine for all
                    case["busy_before"], case["revision"], case["machine"]["id"]
                if self.content["cases"]:
                    _heading(self.content)  # says all the rest of a case
            except (ValueError, LookupError, TypeError, AttributeError) as error:
                raise BenchmarkError(
                    f"not a file of figures of this version: {path}. Choose another "
                    "file with --json"
                ) from error

    def check_machine(self, machine: dict[str, Any]) -> None:
        """Raise if figures are of another machine: they do not mix with these."""
        for case in self.content["cases"].values():
            if any(case["machine"].get(name) != machine[name] for name in _SAME):
                raise BenchmarkError(
                    f"{self._path} holds figures of another machine: choose another "
                    "file"
                )

    def add(self, case: str, result: dict[str, Any]) -> None:
        """Put in the result of a case, and save the file."""
        cases = {**self.content["cases"], case: result}
        # Those of another version come last.
        names = sorted(cases, key=lambda name: (*self._order, name).index(name))
        self.content["cases"] = {name: cases[name] for name in names}
        self.save()

    def save(self) -> None:
        """Write the file, if there is to be one, whole or not at all."""
        if self._path:
            part = f"{self._path}.part"
            with open(part, "w", encoding="utf-8") as file:
                json.dump(self.content, file, indent=1)
            os.replace(part, self._path)


def _spread(side: dict[str, Any], unit: str) -> str:
    text = figure(side["median"], unit)
    if side["min"] == side["max"]:
        return text
    return f"{text} ({figure(side['min'], unit)} to {figure(side['max'], unit)})"


def _goal(goal: dict[str, Any]) -> tuple[str, str, str]:
    """Return the ratio with its spread, the bound, and whether it is met."""
    ratio = goal["ratio"]
    text = f"{ratio['median']:.3g}"
    if ratio["min"] != ratio["max"]:
        text += f" ({ratio['min']:.3g} to {ratio['max']:.3g})"
    if goal["factor"] is None:
        return text, "-", "-"
    return (
        text,
        f"{goal['bound']} {goal['factor']:g}",
        "yes" if goal["met"] else "**no**",
    )


def as_text(case: str, result: dict[str, Any]) -> str:
    """Return the result of one case as lines for a terminal."""
    if "error" in result:
        return f"{case}: {result['error']}"
    lines = []
    for row in result["rows"]:
        lines.append(f"{row['name']}: {row['title']}")
        for name, side in row["sides"].items():
            lines.append(f"    {name}: {_spread(side, row['unit'])}")
        for goal in row["goals"]:
            ratio, bound, met = _goal(goal)
            what = f"{goal['kind']} ({goal['against']})"
            lines.append(f"    {ratio} {what}; to reach: {bound}; met: {met}")
        lines += [f"    {note}" for note in row["notes"]]
    lines.append(f"    ({case} took {result['seconds']:.0f} s)")
    return "\n".join(lines)


def _table(head: list[str], lines: list[list[str]]) -> str:
    rows = [head, ["---"] * len(head), *lines]
    return "\n".join("| " + " | ".join(row) + " |" for row in rows)


def _goals_table(rows: list[dict[str, Any]]) -> str:
    lines = []
    for row in rows:
        for goal in row["goals"]:
            ratio, bound, met = _goal(goal)
            lines.append(
                [
                    row["name"],
                    _spread(row["sides"][OURS], row["unit"]),
                    goal["against"],
                    figure(row["sides"][goal["against"]]["median"], row["unit"]),
                    f"{ratio} {goal['kind']}",
                    bound,
                    met,
                ]
            )
    head = ["case", "metastore", "against", "its figure", "ratio", "to reach", "met"]
    return _table(head, lines)


def _sides_table(rows: list[dict[str, Any]]) -> str:
    """Return a table with a line per row and a column per side."""
    names: list[str] = []
    for row in rows:
        names += [name for name in row["sides"] if name not in names]
    lines = []
    for row in rows:
        cells = [
            _spread(row["sides"][name], row["unit"]) if name in row["sides"] else "-"
            for name in names
        ]
        lines.append([row["name"], *cells])
    return _table(["case", *names], lines)


def _titles(rows: list[dict[str, Any]]) -> str:
    return "\n".join(f"- {row['name']}: {row['title']}." for row in rows)


def _is_beside(name: str) -> bool:
    """Tell whether a case or a row of it stands beside other stores."""
    return name[0] == "P" or name[:2] == "C6"


def _caution(content: dict[str, Any]) -> list[str]:
    """Return a warning for readers if the figures are not what they could be."""
    cases = content["cases"].values()
    if max(case["busy_before"] for case in cases) <= QUIET and all(
        case["scale"] == 1 for case in cases
    ):
        return []
    return [
        "**These figures are rough**: the machine was busy, or the cases were small."
    ]


def _by_case(cases: dict[str, Any], what: str, of: Callable[[Any], str]) -> str:
    """Return what all cases share, or which cases are of which."""
    names: dict[str, list[str]] = {}
    for name, case in cases.items():
        names.setdefault(of(case), []).append(name)
    if len(names) == 1:
        return f"{what}: {next(iter(names))}."
    each = "; ".join(f"{key} ({', '.join(some)})" for key, some in names.items())
    return f"{what}: **not of all cases the same**: {each}."


def _revisions(cases: dict[str, Any]) -> str:
    # without git there is none
    return _by_case(cases, "Revision", lambda case: case["revision"] or "unknown")


def _named(versions: dict[str, str]) -> str:
    return ", ".join(f"{name} {version}" for name, version in versions.items())


def _peers(cases: dict[str, Any]) -> str:
    """Return the peers that were there, of cases that measure any."""
    beside = {name: case for name, case in cases.items() if _is_beside(name)}
    return _by_case(
        beside or cases,
        "Peers",
        lambda case: _named(case["machine"]["peers"]) or "none",
    )


def _hardware(machine: dict[str, Any]) -> str:
    return (
        f"{machine['processor']}, {machine['cores']} cores, "
        f"{machine['memory_size'] / (1 << 30):.0f} GiB of memory, "
        f"{machine['system']} ({machine['architecture']}), {machine['file_system']}"
    )


def _dates(cases: dict[str, Any]) -> str:
    dates = sorted({case["machine"]["date"] for case in cases.values()})
    return dates[0] if len(dates) == 1 else f"{dates[0]} to {dates[-1]}"


def _heading(content: dict[str, Any]) -> str:
    """Return what was measured where: of each case, where they differ."""
    named = content["cases"]
    cases = named.values()
    repeats = sorted({case["repeat"] for case in cases})
    scales = sorted({case["scale"] for case in cases})
    where = _by_case(
        named, f"Measured on {_dates(named)}", lambda case: _hardware(case["machine"])
    )
    versions = _by_case(
        named, "Versions", lambda case: _named(case["machine"]["versions"])
    )
    return "\n".join(
        [
            f"{where} {versions} {_revisions(named)}",
            _peers(named),
            f"Rounds: {', '.join(map(str, repeats))}; scale: "
            f"{', '.join(f'{scale:g}' for scale in scales)}; processors that "
            f"others kept busy before a case: at most "
            f"{max(case['busy_before'] for case in cases):.2f}.",
        ]
    )


def _section(content: dict[str, Any], pictures: list[tuple[str, str]]) -> str:
    results = {
        name: result for name, result in content["cases"].items() if "rows" in result
    }
    rows = [row for result in results.values() for row in result["rows"]]
    beside = [row for row in rows if _is_beside(row["name"])]
    parts = [
        *_caution(content),
        _heading(content),
        "Each figure is the median of the rounds, in brackets the least and the "
        "greatest.",
        "### Against the ancestor and the limits",
        _goals_table([row for row in rows if row not in beside]),
        _titles([row for row in rows if row not in beside]),
    ]
    if beside:
        parts += [
            "### Beside other stores",
            _sides_table(beside),
            _titles(beside),
            "What had to be reached:",
            _goals_table(beside),
        ]
    notes = [f"- {row['name']}: {note}." for row in rows for note in row["notes"]]
    if notes:
        parts += ["### Notes", "\n".join(notes)]
    failed = [
        f"- {name}: {result['error']}"
        for name, result in content["cases"].items()
        if "error" in result
    ]
    if failed:
        parts += ["### Failed", "\n".join(failed)]
    if pictures:
        parts.append("### Pictures")
        parts += [f"![{text}](pictures/{name})" for name, text in pictures]
    return "\n\n".join(parts)


def _around() -> tuple[str, str]:
    """Return what stands before and behind the markers of the document."""
    try:
        text = _DOCUMENT.read_text(encoding="utf-8")
        before, rest = text.split(_BEGIN)
        _, after = rest.split(_END)
    except (OSError, ValueError) as error:
        raise BenchmarkError(
            f"{_DOCUMENT} is missing or has not one pair of markers: run from the root "
            "of the repository"
        ) from error
    return before, after


def _pictures() -> Any:
    """Return the module that draws, which nothing but a report needs."""
    try:
        return importlib.import_module("benchmarks.pictures")
    except ImportError as error:
        raise BenchmarkError(
            "the pictures need matplotlib: `pip install metastore[bench]`"
        ) from error


def check() -> None:
    """Raise what :func:`write` would for want of markers or of matplotlib.

    Called before anything is measured, since that may take hours.
    """
    _around()
    _pictures()


def write(content: dict[str, Any]) -> None:
    """Write tables between the markers of docs/performance.md, and its pictures.

    Raises
    ------
    BenchmarkError
        If there are no figures, the document has no markers, or nothing can draw.
    """
    if not any("rows" in result for result in content["cases"].values()):
        raise BenchmarkError("there are no figures to write")
    before, after = _around()
    pictures = _pictures()
    _PICTURES.mkdir(exist_ok=True)
    drawn = pictures.draw(content, _PICTURES)
    section = _section(content, drawn)
    _DOCUMENT.write_text(
        f"{before}{_BEGIN}\n\n{section}\n\n{_END}{after}", encoding="utf-8"
    )
