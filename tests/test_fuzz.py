"""A while of fuzzing, and every store that fuzzing ever found wanting.

METASTORE_FUZZ_SECONDS
    How long (60; in the campaign, ``-m slow``, 3600).

A finding is told with the command that runs its case again.
"""

from __future__ import annotations

import contextlib
import os
import random
import subprocess
import sys
from pathlib import Path

import pytest

import fuzz
import metastore

HERE = Path(__file__).parent
FINDINGS = sorted((HERE / "data" / "findings").iterdir())
#: More than any case may take; a sanitizer takes terabytes of addresses for itself.
ADDRESS_SPACE = 4 << 30
#: The same, under a sanitizer on a busy machine.
CASE_SECONDS_MAX = 300


def run_fuzzer(rng: random.Random, seconds: float, folder: Path) -> int:
    """Fuzz in a process of its own: a finding may end it, or eat all memory."""
    seed = rng.randrange(2**32)
    last = folder / "last"
    command = [sys.executable, "-X", "faulthandler", HERE / "fuzz.py"]
    command += ["--seed", str(seed), "--seconds", str(seconds), "--last", last]
    if "asan" not in os.environ.get("LD_PRELOAD", ""):
        command += ["--address-space", str(ADDRESS_SPACE)]
    # A flavour of the extensions is fuzzed where it is tested.
    environment = {**os.environ, "PYTHONPATH": Path(metastore.__file__).parent.parent}
    limit = seconds + CASE_SECONDS_MAX
    status = -1
    with contextlib.suppress(subprocess.TimeoutExpired):
        status = subprocess.run(command, env=environment, timeout=limit).returncode
    if status not in (0, 1):
        ended = last.read_text().split()
        print("fuzz: ended by --seed {} --case {}".format(*ended), file=sys.stderr)
    return status


@pytest.mark.parametrize(
    "seconds",
    [
        pytest.param(60.0, id="a minute"),
        pytest.param(3600.0, id="an hour", marks=pytest.mark.slow),
    ],
)
@pytest.mark.timeout(0)  # the fuzzer has one of its own
def test_fuzzing(seconds, rng, tmp_path, capfd):
    seconds = float(os.environ.get("METASTORE_FUZZ_SECONDS", seconds))
    with capfd.disabled():
        print()
        assert run_fuzzer(rng, seconds, tmp_path) == 0


@pytest.mark.parametrize("folder", FINDINGS, ids=lambda folder: folder.name)
def test_a_store_that_was_a_finding(folder):
    fuzz.replay(folder)


def test_a_case_is_made_again_from_its_seed(tmp_path):
    first = [fuzz.run_case(7, case, tmp_path) for case in range(1, 30)]
    again = [fuzz.run_case(7, case, tmp_path) for case in range(1, 30)]
    assert first == again
    assert len({what for what, _ in first}) > 3
