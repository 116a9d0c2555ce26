"""The command: ``python -m benchmarks``, from the root of the repository."""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import math
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from typing import Any

from benchmarks import machine, report
from benchmarks.ancestor import Ancestor
from benchmarks.cases import CASES, Case
from benchmarks.measure import BenchmarkError
from benchmarks.peers import find
from benchmarks.settings import Settings

_CASE_SECONDS_MAX = 4 * 3600


def _arguments(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks",
        description="Measure metastore, its ancestor, its peers and the machine.",
        epilog="Cases: "
        + "; ".join(f"{case.name} {case.title}" for case in CASES.values()),
    )
    parser.add_argument(
        "--only", metavar="R1,C2", help="run these cases only; '' runs none"
    )
    parser.add_argument("--repeat", type=int, default=5, help="rounds (default 5)")
    parser.add_argument(
        "--scale", type=float, default=1.0, help="size of every case (default 1)"
    )
    parser.add_argument(
        "--large", action="store_true", help="the cases of 100M records too"
    )
    parser.add_argument(
        "--ancestor", metavar="BINARY", help="the ancestor, to measure it beside us"
    )
    parser.add_argument(
        "--peers",
        default="all",
        help="all (default), installed, none, or modules: lmdb,duckdb",
    )
    parser.add_argument(
        "--directory",
        help="where the data goes, on a disk (default build/, in the repository)",
    )
    parser.add_argument(
        "--json",
        metavar="FILE",
        help="add the figures to this file, case by case; newer ones replace older",
    )
    parser.add_argument(
        "--report",
        action="store_true",
        help="write docs/performance.md and its pictures from the figures; refused "
        "if they lack a case (but for those of --large)",
    )
    parser.add_argument(
        "--partial",
        action="store_true",
        help="with --report: write what there is, though cases are missing",
    )
    return parser.parse_args(argv)


def _chosen(arguments: argparse.Namespace) -> list[Case]:
    if arguments.only is None:
        return [case for case in CASES.values() if arguments.large or not case.large]
    names = [name for name in arguments.only.split(",") if name]
    unknown = [name for name in names if name not in CASES]
    if unknown:
        raise BenchmarkError(
            f"unknown case {', '.join(unknown)}: there are {', '.join(CASES)}"
        )
    left_out = [name for name in names if CASES[name].large and not arguments.large]
    if left_out:
        raise BenchmarkError(f"{', '.join(left_out)} runs with --large only")
    return [CASES[name] for name in names]


def _check_report(cases: list[Case], figures: report.Figures, *, partial: bool) -> None:
    """Refuse a report that would lose tables, or that could not be written."""
    there = {*figures.content["cases"], *(case.name for case in cases)}
    lost = [case.name for case in CASES.values() if not case.large]
    lost = [name for name in lost if name not in there]
    if lost and not partial:
        raise BenchmarkError(
            f"the report would have no tables of {', '.join(lost)}: run these too, "
            "leave out --report, or say --partial"
        )
    report.check()


def _is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:  # someone else's
        return True
    return True


_PREFIX = "metastore-benchmarks-"


#: What interrupts a run, which then cleans up.
_INTERRUPTS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


def _interrupt(*_: object) -> None:
    """Let the first signal interrupt; one while we clean up would leave the data."""
    for number in _INTERRUPTS:
        signal.signal(number, signal.SIG_IGN)
    raise KeyboardInterrupt


@contextlib.contextmanager
def _handlers(handler: Any) -> Iterator[None]:
    """Have a handler for what interrupts, but for what is ignored, as nohup has it."""
    before = {number: signal.getsignal(number) for number in _INTERRUPTS}
    for number, old in before.items():
        if old != signal.SIG_IGN:
            signal.signal(number, handler)
    try:
        yield
    finally:
        for number, old in before.items():
            signal.signal(number, old)


def _undisturbed() -> contextlib.AbstractContextManager[None]:
    return _handlers(signal.SIG_IGN)


def _remove(path: str) -> bool:
    """Remove a directory that processes which were just killed may still write to."""
    for _ in range(10):
        shutil.rmtree(path, ignore_errors=True)
        if not os.path.exists(path):
            return True
        time.sleep(0.1)
    return False


@contextlib.contextmanager
def _data_directory(parent: str) -> Iterator[str]:
    """Make a directory for this run; remove it, and what killed runs have left."""
    for name in os.listdir(parent):
        pid = name.removeprefix(_PREFIX).partition("-")[0]
        if name.startswith(_PREFIX) and pid.isdigit() and not _is_alive(int(pid)):
            _remove(os.path.join(parent, name))
    path = tempfile.mkdtemp(prefix=f"{_PREFIX}{os.getpid()}-", dir=parent)
    try:
        try:
            yield path
        finally:
            with _undisturbed():
                removed = _remove(path)
    except KeyboardInterrupt:
        raise KeyboardInterrupt(
            "the data was removed" if removed else f"the data is left: {path}"
        ) from None


@contextlib.contextmanager
def _worker(request: dict[str, Any]) -> Iterator[subprocess.Popen[str]]:
    """Ask a new process for a case; end it, with what it measures, behind the block."""
    reading, writing = os.pipe()
    with (
        open(reading, "rb") as stdin,
        # left open: the worker ends when we do, however that comes
        open(writing, "w", encoding="utf-8") as asking,
        subprocess.Popen(
            [sys.executable, "-m", "benchmarks.worker"],
            stdin=stdin,
            stdout=subprocess.PIPE,
            text=True,
            start_new_session=True,
            env={**os.environ, "OPENBLAS_NUM_THREADS": "1"},
        ) as process,
    ):
        try:
            print(json.dumps(request), file=asking, flush=True)
            yield process
        finally:
            # whatever is left of it after an interrupt or a time-out
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def _run_case(case: Case, settings: Settings) -> dict[str, Any]:
    """Run one case in its own process, with its children in its group."""
    fields = dataclasses.asdict(settings)
    peers = fields.pop("peer_modules")
    request = {"case": case.name, "settings": fields, "peer_modules": peers}
    with _worker(request) as process:
        try:
            output, _ = process.communicate(timeout=_CASE_SECONDS_MAX)
        except subprocess.TimeoutExpired:
            hours = _CASE_SECONDS_MAX / 3600
            return {"error": f"the case took longer than {hours:g} hours"}
    if process.returncode:
        return {"error": f"the case ended with exit code {process.returncode}"}
    answer: dict[str, Any] = json.loads(output)
    return answer


def _say_plan(arguments: argparse.Namespace, missing: list[str]) -> None:
    if missing:
        print(f"not installed, left out: {', '.join(missing)}", file=sys.stderr)
    if arguments.ancestor is None:
        print("no --ancestor: its columns stay empty", file=sys.stderr)
    busy = machine.busy_processors(arguments.scale)
    if busy > report.QUIET:
        print(
            f"others keep {busy:.1f} processors busy: these figures will be rough",
            file=sys.stderr,
        )


def _measure(
    arguments: argparse.Namespace, cases: list[Case], figures: report.Figures
) -> bool:
    """Run the cases one after another; return whether all of them succeeded."""
    peers, missing = find(arguments.peers)
    if arguments.ancestor:
        Ancestor(arguments.ancestor)  # refuses what is no program
    parent = os.path.abspath(arguments.directory or "build")
    if arguments.directory is None:
        os.makedirs(parent, exist_ok=True)
    needed_size = sum(case.disk_size for case in cases) * arguments.scale
    machine.check_directory(parent, round(needed_size))
    _say_plan(arguments, missing)
    succeeded = True
    with _data_directory(parent) as directory:
        settings = Settings(
            directory=directory,
            repeat=arguments.repeat,
            scale=arguments.scale,
            ancestor_binary=arguments.ancestor and os.path.abspath(arguments.ancestor),
            peer_modules=tuple(peer.module for peer in peers),
            large=arguments.large,
        )
        here = machine.describe(directory, peers)
        figures.check_machine(here)
        figures.save()  # what cannot be written shows before an hour is spent
        if settings.ancestor:
            settings.with_scratch(settings.ancestor.probe)
        for case in cases:
            about = {
                "busy_before": machine.busy_processors(settings.scale),
                "revision": machine.revision(),
                "machine": here,
                "scale": settings.scale,
                "repeat": settings.repeat,
            }
            result = {**_run_case(case, settings), **about}
            if machine.disk_was_full(result.get("error", "")):
                raise BenchmarkError(
                    f"the disk became full during {case.name}: {parent}. Choose "
                    "another place with --directory, or fewer records with --scale"
                )
            figures.add(case.name, result)
            print(report.as_text(case.name, result), flush=True)
            succeeded = succeeded and "error" not in result
    return succeeded


def main(argv: list[str]) -> int:
    """Run the command; return its exit status."""
    arguments = _arguments(argv)
    with _handlers(_interrupt):
        return _run(arguments)


def _run(arguments: argparse.Namespace) -> int:
    try:
        if arguments.repeat < 1 or not 0 < arguments.scale < math.inf:
            raise BenchmarkError("--repeat and --scale must be positive")
        figures = report.Figures(arguments.json, tuple(CASES))
        cases = _chosen(arguments)
        if arguments.report:
            _check_report(cases, figures, partial=arguments.partial)
        succeeded = not cases or _measure(arguments, cases, figures)
        if arguments.report:
            report.write(figures.content)
    except BenchmarkError as error:
        print(f"benchmarks: {error}", file=sys.stderr)
        return 2
    except OSError as error:
        print(f"benchmarks: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt as interrupt:
        said = "; ".join(["interrupted", *interrupt.args])
        print(f"benchmarks: {said}", file=sys.stderr)
        return 130
    return 0 if succeeded else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
