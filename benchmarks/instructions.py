"""Counts the instructions of the kernels and compares them with a recorded baseline.

Times are noisy, counts are not: the same build runs the same instructions on the same
data. A fixed scenario (recover, commit, compact) runs under callgrind in one thread,
and what each kernel cost there, with all that it called, is compared::

    python -m benchmarks.instructions            # compare
    python -m benchmarks.instructions --record   # write the baseline anew

The exit status is 0 if no kernel became dearer, 1 if one did, and 2 if nothing could be
compared: a baseline holds for one compiler, Cython and processor architecture.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import pathlib
import platform
import re
import shutil
import subprocess
import sys
import tempfile

from benchmarks import data
from benchmarks.data import Arrays
from benchmarks.measure import BenchmarkError

_BASELINE = pathlib.Path(__file__).with_name("instructions.json")
#: More instructions than this are a regression; the C library differs a little.
_TOLERANCE = 0.02
#: But not so few: where Python puts its objects decides over some.
_FEW = 100
#: Of group commit only what commits: its other methods call back into Python.
_LINE = re.compile(
    r"^\s*([\d,]+) .*:__pyx_pw_9metastore_\d+"
    r"(?:(_codec|_merge)_\d+([a-z]\w*)|(_commit)_\d+GroupCommit_\d+(commit)\b)"
)
_NO_ROTATION = 1 << 50
_N_SNAPSHOT = 200_000
_N_SMALL = 2_000
_N_BATCHES = 20


def _insert(store: object, arrays: Arrays) -> None:
    store.insert_arrays(  # type: ignore[attr-defined]  # imported late, below
        arrays.keys, arrays.values, arrays.offsets, arrays.user_data, sync=False
    )


def _commit_all(store: object, start: int) -> None:
    """Commit one record at a time, batches of tuples, and columns."""
    for record in data.records(start, start + _N_SMALL, 8).tuples():
        store.insert_batch([record], sync=False)  # type: ignore[attr-defined]  # as above
    start += _N_SMALL
    for number in range(_N_BATCHES):
        first = start + 1000 * number
        batch = data.records(first, first + 1000, 8).tuples()
        store.insert_batch(batch, sync=False)  # type: ignore[attr-defined]  # as above
    _insert(store, data.heap_like(_N_SNAPSHOT // 4))


def _make(path: str) -> None:
    """Make the store that the scenario starts from: a snapshot and a log."""
    from metastore import MetadataStore

    store, _ = MetadataStore.recover(path, log_size_bytes_min=_NO_ROTATION)
    _insert(store, data.records(0, _N_SNAPSHOT, 8))
    store.compact()
    _commit_all(store, _N_SNAPSHOT)
    store.shutdown()


def _scenario(path: str) -> None:
    """Do everything once, in one thread."""
    from metastore import MetadataStore

    store, _ = MetadataStore.recover(path, log_size_bytes_min=_NO_ROTATION, threads=1)
    _commit_all(store, 2 * _N_SNAPSHOT)
    store.compact()
    store.shutdown()


def _environment() -> dict[str, str]:
    """Return what decides about the code of the kernels."""
    spec = importlib.util.find_spec("metastore._codec")
    if spec is None or spec.origin is None:
        raise BenchmarkError("the extensions are not built: `make setup`")
    content = pathlib.Path(spec.origin).read_bytes()
    compiler = re.search(rb"(?:GCC: \([^)]*\)|clang version) [\d.]+", content)
    cython = re.search(rb"_cython_(\d+_\d+_\d+)", content)
    return {
        "architecture": platform.machine(),
        "compiler": compiler[0].decode() if compiler else "unknown",
        "cython": cython[1].decode().replace("_", ".") if cython else "?",
    }


def count() -> dict[str, int]:
    """Return the instructions of each kernel that the scenario calls.

    Raises
    ------
    BenchmarkError
        If valgrind is missing or fails.
    """
    if shutil.which("valgrind") is None:
        raise BenchmarkError("valgrind is not installed: it counts the instructions")
    with tempfile.TemporaryDirectory(prefix="metastore-instructions-") as folder:
        store = os.path.join(folder, "store")
        output = os.path.join(folder, "callgrind.out")
        _make(store)
        _run(
            "valgrind",
            "--tool=callgrind",
            f"--callgrind-out-file={output}",
            sys.executable,
            "-m",
            "benchmarks.instructions",
            "--scenario",
            store,
        )
        annotated = _run(
            "callgrind_annotate", "--inclusive=yes", "--threshold=100", output
        )
    return _kernels(annotated)


def _kernels(annotated: str) -> dict[str, int]:
    """Return the instructions of each kernel that callgrind_annotate lists."""
    found: dict[str, int] = {}
    for match in filter(None, map(_LINE.match, annotated.splitlines())):
        name = f"{match[2] or match[4]}.{match[3] or match[5]}"
        # what a kernel inlines from headers has lines of its own, which its line holds
        found[name] = max(found.get(name, 0), int(match[1].replace(",", "")))
    if not found:
        raise BenchmarkError("callgrind saw no kernel: are the extensions stripped?")
    return dict(sorted(found.items()))


def _run(*command: str) -> str:
    environment = {**os.environ, "PYTHONHASHSEED": "0", "OPENBLAS_NUM_THREADS": "1"}
    done = subprocess.run(
        command, env=environment, capture_output=True, text=True, check=False
    )
    if done.returncode:
        raise BenchmarkError(f"{command[0]} failed:\n{done.stderr[-2000:]}")
    return done.stdout


def _check_comparable(
    baseline: dict[str, dict[str, str]], environment: dict[str, str]
) -> None:
    """Raise if other code than the baseline's is to be expected here anyway."""
    recorded = baseline["environment"]
    differences = [
        f"{name} {recorded.get(name, 'unknown')} there, {here} here"
        for name, here in environment.items()
        if recorded.get(name) != here
    ]
    if differences:
        raise BenchmarkError(
            f"the baseline is not comparable ({'; '.join(differences)}): "
            "record one of your own with --record"
        )


def _compare(counts: dict[str, int], baseline: dict[str, int]) -> bool:
    """Print a line per kernel; return whether none became dearer."""
    succeeded = True
    for name in sorted({*counts, *baseline}):
        now, before = counts.get(name), baseline.get(name)
        if now is None or before is None:
            print(f"{name}: {'new, not recorded' if now else 'gone'}")
            succeeded = False
            continue
        change = now / before - 1
        tolerance = max(_TOLERANCE, _FEW / before)
        verdict = "" if change <= tolerance else "  dearer"
        if change < -tolerance:
            verdict = "  cheaper: record it"
        succeeded = succeeded and change <= tolerance
        print(f"{name}: {now:,} ({change:+.1%}){verdict}")
    return succeeded


def main(argv: list[str]) -> int:
    """Run the command; return its exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.instructions",
        description="Compare the kernels' instruction counts with the baseline.",
    )
    parser.add_argument("--record", action="store_true", help="write the baseline")
    parser.add_argument("--scenario", help=argparse.SUPPRESS)
    arguments = parser.parse_args(argv)
    if arguments.scenario:
        _scenario(arguments.scenario)
        return 0
    try:
        return _record() if arguments.record else _judge()
    except BenchmarkError as error:
        print(f"benchmarks.instructions: {error}", file=sys.stderr)
        return 2


def _record() -> int:
    """Write the baseline anew; return the exit status."""
    environment, counts = _environment(), count()
    content = {"environment": environment, "instructions": counts}
    _BASELINE.write_text(json.dumps(content, indent=1) + "\n", encoding="ascii")
    print(f"recorded {len(counts)} kernels in {_BASELINE.name}")
    return 0


def _judge() -> int:
    """Compare with the baseline; return the exit status."""
    baseline = json.loads(_BASELINE.read_text(encoding="ascii"))
    _check_comparable(baseline, _environment())
    return 0 if _compare(count(), baseline["instructions"]) else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
