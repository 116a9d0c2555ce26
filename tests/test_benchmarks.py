"""What the benchmarks refuse and what they leave behind, never how fast a thing is."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

if importlib.util.find_spec("benchmarks") is None:
    pytest.skip("only the repository has the benchmarks", allow_module_level=True)

from benchmarks import machine
from benchmarks.__main__ import main

MEMORY = ("tmpfs", "ramfs")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Where the benchmarks may write, which has to be a disk."""
    if machine.file_system(str(tmp_path)) in MEMORY:
        pytest.skip("the benchmarks want a disk, and this folder is memory")
    return tmp_path


@pytest.fixture(autouse=True)
def _nobody_is_busy(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing here is a figure: do not watch the machine before each case."""
    monkeypatch.setattr(machine, "busy_processors", lambda: 0.0)


def few(folder: Path, *more: str) -> list[str]:
    """Arguments for next to nothing: a thousandth of one case, once."""
    return [
        *("--only", "R1", "--scale", "0.001", "--repeat", "1", "--peers", "none"),
        *("--directory", str(folder), *more),
    ]


def refused(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    """Run the benchmarks, which must refuse before they measure; what they say."""
    assert main(arguments) == 2
    said = capsys.readouterr()
    assert said.out == ""
    last = said.err.splitlines()[-1]
    assert last.startswith("benchmarks: ")
    return last


def test_a_run_leaves_its_figures_and_nothing_else(folder, capsys):
    figures = folder / "figures.json"
    assert main(few(folder, "--json", str(figures))) == 0
    assert "copy of the result arrays" in capsys.readouterr().out
    case = json.loads(figures.read_text())["cases"]["R1"]
    assert case["scale"] == 0.001
    assert all(row["sides"]["metastore"]["median"] > 0 for row in case["rows"])
    assert os.listdir(folder) == [figures.name]


def test_what_a_killed_run_left_is_removed(folder):
    """By the next run; what belongs to a process that still runs is not."""
    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait()
    left = folder / f"metastore-benchmarks-{ended.pid}-abc"
    used = folder / f"metastore-benchmarks-{os.getpid()}-abc"
    for path in (left, used):
        path.mkdir()
        (path / "log").write_bytes(b"data")
    assert main(few(folder)) == 0
    assert os.listdir(folder) == [used.name]


def test_a_full_disk_is_refused(folder, capsys):
    said = refused(few(folder, "--scale", "1e9"), capsys)
    assert str(folder) in said
    assert "--scale" in said
    assert os.listdir(folder) == []


def test_a_missing_peer_is_refused(folder, capsys, monkeypatch):
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if name == "lmdb" else find(name)
    )
    said = refused(few(folder, "--peers", "lmdb"), capsys)
    assert "not installed: lmdb" in said
    assert "--peers installed" in said
    assert os.listdir(folder) == []


@pytest.mark.parametrize(
    ("more", "what"),
    [
        (["--peers", "nobody"], "unknown peer nobody"),
        (["--only", "R1,R99"], "unknown case R99"),
        (["--only", "R6"], "--large"),
        (["--ancestor", "no-such-file"], "no-such-file"),
        (["--repeat", "0"], "--repeat"),
        (["--scale", "-1"], "--scale"),
        (["--directory", "no-such-folder"], "no-such-folder"),
    ],
)
def test_arguments_that_mean_nothing_are_refused(folder, capsys, more, what):
    assert what in refused(few(folder, *more), capsys)
    assert os.listdir(folder) == []


@pytest.mark.parametrize(
    "content",
    [
        "",
        "[]",
        "{",
        '{"machine": {}, "missing": []}',
        '{"machine": {}, "missing": [], "cases": {"R1": {"load_before": 0.1}}}',
    ],
    ids=["empty", "list", "cut", "no cases", "older version"],
)
def test_a_file_that_holds_no_figures_is_refused(folder, capsys, content):
    """It stays as it is. Figures of an older version once ended with a KeyError."""
    figures = folder / "figures.json"
    figures.write_text(content)
    said = refused(few(folder, "--json", str(figures)), capsys)
    assert str(figures) in said
    assert figures.read_text() == content


def test_figures_of_another_machine_are_refused(folder, capsys):
    figures = folder / "figures.json"
    content = json.dumps({"machine": {"cores": -1}, "missing": [], "cases": {}})
    figures.write_text(content)
    said = refused(few(folder, "--json", str(figures)), capsys)
    assert "another machine" in said
    assert figures.read_text() == content
    assert os.listdir(folder) == [figures.name]
