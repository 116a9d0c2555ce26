"""What the benchmarks refuse and what they leave behind, never how fast a thing is."""

from __future__ import annotations

import contextlib
import errno
import importlib.util
import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
import types
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

if importlib.util.find_spec("benchmarks") is None:
    pytest.skip("only the repository has the benchmarks", allow_module_level=True)

from benchmarks import machine, report
from benchmarks.__main__ import main
from benchmarks.ancestor import Ancestor
from benchmarks.cases import CASES, commits, compaction, recovery, sizes
from benchmarks.measure import BenchmarkError, Run, isolated
from benchmarks.peers import Metastore, Peer
from benchmarks.results import OURS
from benchmarks.settings import Settings

MEMORY = ("tmpfs", "ramfs")
TIMEOUT_SECONDS = 60


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Where the benchmarks may write, which has to be a disk."""
    if machine.file_system(str(tmp_path)) in MEMORY:
        pytest.skip("the benchmarks want a disk, and this folder is memory")
    return tmp_path


@pytest.fixture(autouse=True)
def _nobody_is_busy(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing here is a figure: do not watch the machine before each case."""
    monkeypatch.setattr(machine, "busy_processors", lambda scale: 0.0)


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
        (["--ancestor", "tests"], "tests"),
        (["--repeat", "0"], "--repeat"),
        (["--scale", "-1"], "--scale"),
        (["--scale", "nan"], "--scale"),
        (["--scale", "inf"], "--scale"),
        (["--directory", "no-such-folder"], "no-such-folder"),
    ],
)
def test_arguments_that_mean_nothing_are_refused(folder, capsys, more, what):
    assert what in refused(few(folder, *more), capsys)
    assert os.listdir(folder) == []


@pytest.mark.parametrize(
    "script",
    [
        "#!/bin/sh",
        "#!/bin/sh\necho '{garbage'",
        "#!/bin/sh\nprintf '\\377'",
        "#!/bin/sh\necho '[1]'",
        "#!/bin/sh\necho '{\"seconds\": 1}'",
        '#!/bin/sh\necho \'{"seconds": 1, "checksum": "abc"}\'',
        '#!/bin/sh\necho \'{"error": "abc"}\'',
        "#!/no/such/shell",
    ],
    ids=[
        *("silent", "garbage", "no text", "list", "no checksum", "other records"),
        *("error", "no shell"),
    ],
)
def test_what_is_not_the_ancestor_is_refused(folder, tmp_path_factory, capsys, script):
    """It was met in the middle of a case, by a traceback or a wait for nothing."""
    program = tmp_path_factory.mktemp("bin") / "ancestor"
    program.write_text(f"{script}\n")
    program.chmod(0o755)
    said = refused(few(folder, "--ancestor", str(program)), capsys)
    assert str(program) in said
    assert "Traceback" not in said
    assert os.listdir(folder) == []


@pytest.mark.parametrize(
    "content",
    [
        "",
        "[]",
        "{",
        '{"machine": {}, "missing": []}',
        '{"machine": {}, "missing": [], "cases": {"R1": {"load_before": 0.1}}}',
        '{"cases": {"R1": {"machine": null, "busy_before": 0, "revision": "abc"}}}',
    ],
    ids=["empty", "list", "cut", "no cases", "older version", "no machine"],
)
def test_a_file_that_holds_no_figures_is_refused(folder, capsys, content):
    """It stays as it is. Figures of an older version once ended with a KeyError."""
    figures = folder / "figures.json"
    figures.write_text(content)
    said = refused(few(folder, "--json", str(figures)), capsys)
    assert str(figures) in said
    assert figures.read_text() == content


def measured_here(**machine_of: object) -> dict[str, object]:
    """Return a case without rows, measured on this machine but for what is given."""
    here = machine.describe(tempfile.gettempdir(), [])
    return {
        **{"rows": [], "busy_before": 0.0, "revision": "abc", "scale": 1, "repeat": 5},
        "machine": {**here, **machine_of},
    }


@pytest.mark.parametrize("what", [{"cores": -1}, {"id": "its twin"}], ids=str)
def test_figures_of_another_machine_are_refused(folder, capsys, what):
    """Two machines of one kind were once taken for one."""
    figures = folder / "figures.json"
    case = measured_here(**{"file_system": machine.file_system(str(folder)), **what})
    content = json.dumps({"cases": {"C1": case}})
    figures.write_text(content)
    said = refused(few(folder, "--json", str(figures)), capsys)
    assert "another machine" in said
    assert figures.read_text() == content
    assert os.listdir(folder) == [figures.name]


def test_figures_keep_what_they_were_measured_with(folder):
    """A run once gave its date, versions and peers to every case in the file."""
    figures = folder / "figures.json"
    old = measured_here(
        file_system=machine.file_system(str(folder)),
        date="2001-02-03",
        versions={"metastore": "old"},
        peers={"LMDB": "1"},
    )
    figures.write_text(json.dumps({"cases": {"C1": old}}))
    assert main(few(folder, "--json", str(figures))) == 0
    cases = json.loads(figures.read_text())["cases"]
    assert cases["C1"] == old
    assert cases["R1"]["machine"]["date"] > "2001-02-03"
    assert cases["R1"]["machine"]["peers"] == {}


def test_figures_stand_in_the_order_of_the_cases(tmp_path):
    """Tables and pictures took the order in which cases had been measured."""
    path = tmp_path / "figures.json"
    figures = report.Figures(str(path), tuple(CASES))
    for name in ["P1", "of another version", "C1", "R1", "P1"]:
        figures.add(name, {"seconds": 1})
    cases = json.loads(path.read_text())["cases"]
    assert list(cases) == ["R1", "C1", "P1", "of another version"]


# Directories that cannot be used, and disks that become full


@pytest.mark.parametrize("number", [errno.EACCES, errno.EROFS])
def test_a_directory_that_cannot_be_written_to_is_refused(
    folder, capsys, monkeypatch, number
):
    """Faked, since to root every directory is writable."""

    def fail(dir: str) -> None:
        raise OSError(number, os.strerror(number), dir)

    monkeypatch.setattr(tempfile, "TemporaryFile", fail)
    said = refused(few(folder), capsys)
    assert str(folder) in said
    assert os.strerror(number) in said
    assert "--directory" in said
    assert os.listdir(folder) == []


@pytest.mark.parametrize("kind", MEMORY)
def test_a_directory_in_memory_is_refused(folder, capsys, monkeypatch, kind):
    monkeypatch.setattr(machine, "file_system", lambda path: kind)
    said = refused(few(folder), capsys)
    assert f"{folder} is memory ({kind})" in said
    assert "--directory" in said
    assert os.listdir(folder) == []


def test_a_directory_in_memory_is_recognised(capsys):
    try:
        mounts = Path("/proc/mounts").read_text().splitlines()
    except OSError:
        mounts = []
    if ["/dev/shm", "tmpfs"] not in [line.split()[1:3] for line in mounts]:
        pytest.skip("no directory is known to be in memory")
    assert "is memory (tmpfs)" in refused(few(Path("/dev/shm")), capsys)


#: Imported by every Python before anything else: one call finds the disk full.
FULL = """
import errno, os

def full(*args, **options):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

os.{call} = full
"""


def test_what_is_refused_in_a_measured_process_is_one_sentence():
    """It was the end of a traceback."""

    def refuse() -> None:
        raise BenchmarkError("this does not run here")

    with pytest.raises(BenchmarkError) as caught:
        isolated(refuse)
    assert str(caught.value) == "this does not run here"


def test_a_case_that_takes_too_long_is_told_and_the_next_one_runs(
    folder, capsys, monkeypatch
):
    """It ended the run by a traceback."""
    monkeypatch.setattr("benchmarks.__main__._CASE_SECONDS_MAX", 0.036)
    assert main(few(folder, "--only", "R1,R2", "--repeat", "1000000")) == 1
    assert capsys.readouterr().out.splitlines() == [
        "R1: the case took longer than 1e-05 hours",
        "R2: the case took longer than 1e-05 hours",
    ]
    assert os.listdir(folder) == []


#: Imported by every Python before anything else: each link is told on stdout.
TALKING = """
import os

link = os.link

def talk(*args, **options):
    os.write(1, b"linked")
    link(*args, **options)

os.link = talk
"""


def test_a_library_that_prints_spoils_no_figures(
    folder, tmp_path_factory, capsys, monkeypatch
):
    """What it printed stood amid the answer of the case, which nobody could read."""
    patch = tmp_path_factory.mktemp("patch")
    (patch / "sitecustomize.py").write_text(TALKING)
    monkeypatch.setenv("PYTHONPATH", str(patch))
    assert main(few(folder)) == 0
    assert "linked" not in capsys.readouterr().out


@pytest.mark.parametrize("call", ["link", "fsync"], ids=["case", "measured process"])
def test_a_disk_that_becomes_full_ends_the_run(
    folder, tmp_path_factory, capsys, monkeypatch, call
):
    """In one sentence, whether the case itself meets it or a process of its own."""
    patch = tmp_path_factory.mktemp("patch")
    (patch / "sitecustomize.py").write_text(FULL.format(call=call))
    monkeypatch.setenv("PYTHONPATH", str(patch))
    assert main(few(folder)) == 2
    said = capsys.readouterr()
    assert said.out == ""
    assert "Traceback" not in said.err
    last = said.err.splitlines()[-1]
    assert last.startswith(f"benchmarks: the disk became full during R1: {folder}.")
    assert "--scale" in last
    assert "--directory" in last
    assert os.listdir(folder) == []


# Interrupts


def wait_until(condition: Callable[[], object], process: subprocess.Popen[str]) -> None:
    """Return once the condition holds; fail if it takes long, or the process ends."""
    deadline = time.monotonic() + TIMEOUT_SECONDS
    while not condition():
        assert process.poll() is None, process.stderr and process.stderr.read()
        assert time.monotonic() < deadline
        threading.Event().wait(0.01)  # leaves the processor to the run


@pytest.fixture
def _interrupts_reach_children() -> Iterator[None]:
    """What runs in the background may ignore signals, and its children with it."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    before_hangup = signal.signal(signal.SIGHUP, signal.SIG_DFL)
    yield
    signal.signal(signal.SIGINT, before)
    signal.signal(signal.SIGHUP, before_hangup)


@pytest.mark.usefixtures("_interrupts_reach_children")
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_an_interrupted_run_leaves_no_data(folder, number):
    """The signal comes while the case measures, in rounds that would not end."""
    command = [sys.executable, "-m", "benchmarks", *few(folder, "--repeat", "1000000")]
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as run:
        try:
            wait_until(lambda: list(folder.glob("*/scratch/*")), run)
            run.send_signal(number)
            output, said = run.communicate(timeout=TIMEOUT_SECONDS)
        finally:
            run.kill()
    assert run.returncode == 130
    assert output == ""
    assert said.splitlines()[-1] == "benchmarks: interrupted; the data was removed"
    assert os.listdir(folder) == []


#: Imported by every Python before anything else: removing the data of a run, and that
#: alone, is a moment in which the signal comes again; or it fails.
AT_REMOVAL = """
import os, shutil, signal

remove = shutil.rmtree

def interrupted(path, **options):
    if os.path.basename(path).startswith("metastore-benchmarks-"):
        {instead}
    remove(path, **options)

shutil.rmtree = interrupted
"""


def interrupted_at(folder: Path, patch: Path, instead: str) -> list[str]:
    """Interrupt a run with `instead` in its removal of the data; what it says."""
    (patch / "sitecustomize.py").write_text(AT_REMOVAL.format(instead=instead))
    command = [sys.executable, "-m", "benchmarks", *few(folder, "--repeat", "1000000")]
    with subprocess.Popen(
        command,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": str(patch)},
    ) as run:
        try:
            wait_until(lambda: list(folder.glob("*/scratch/*")), run)
            run.send_signal(signal.SIGINT)
            _, said = run.communicate(timeout=TIMEOUT_SECONDS)
        finally:
            run.kill()
    assert run.returncode == 130
    return said.splitlines()


@pytest.mark.usefixtures("_interrupts_reach_children")
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_an_interrupt_amid_the_removal_of_the_data_does_not_stop_it(
    folder, tmp_path_factory, number
):
    """A second Ctrl-C left the data, and the run said that it was removed."""
    instead = f"os.kill(os.getpid(), {number:d})"
    said = interrupted_at(folder, tmp_path_factory.mktemp("patch"), instead)
    assert said[-1] == "benchmarks: interrupted; the data was removed"
    assert os.listdir(folder) == []


@pytest.mark.usefixtures("_interrupts_reach_children")
def test_data_that_cannot_be_removed_is_not_called_removed(folder, tmp_path_factory):
    said = interrupted_at(folder, tmp_path_factory.mktemp("patch"), "return")
    (left,) = folder.iterdir()
    assert said[-1] == f"benchmarks: interrupted; the data is left: {left}"


def test_a_killed_run_takes_what_it_measures_with(folder):
    """It measured on for hours, in a session of its own, and kept the data in use.

    Whoever is left of the run has its standard error open.
    """
    command = [sys.executable, "-m", "benchmarks", *few(folder, "--repeat", "1000000")]
    with subprocess.Popen(
        command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
    ) as run:
        found: list[Path] = []
        wait_until(lambda: found.extend(folder.glob("*/scratch/*")) or found, run)
        worker = int(found[0].name.partition("-")[0])
        run.kill()
        try:
            run.communicate(timeout=TIMEOUT_SECONDS)
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(worker, signal.SIGKILL)
    assert main(few(folder)) == 0
    assert os.listdir(folder) == []


# The report


def figures_of(*revisions: str | None) -> dict[str, object]:
    """Return figures of as many cases, R1 and so on, without rows."""
    return {
        f"R{number}": {"revision": revision}
        for number, revision in enumerate(revisions, 1)
    }


def test_the_report_names_the_revision():
    assert report._revisions(figures_of("abc", "abc")) == "Revision: abc."


def test_the_report_tells_of_several_revisions():
    """Also of figures that were taken without git."""
    said = report._revisions(figures_of("abc", None, "abc"))
    assert said.startswith("Revision: **not of all cases the same**: ")
    assert said.endswith("abc (R1, R3); unknown (R2).")


def test_the_report_tells_of_several_dates_versions_and_peers():
    cases = {
        "C1": measured_here(date="2001-02-03", versions={"metastore": "1"}),
        "P1": measured_here(date="2001-02-04", versions={"metastore": "2"}),
        "P2": measured_here(date="2001-02-04", versions={"metastore": "2"}),
    }
    cases["P2"]["machine"]["peers"] = {"LMDB": "3"}
    said = report._heading({"cases": cases})
    assert "Measured on 2001-02-03 to 2001-02-04: " in said
    assert "metastore 1 (C1); metastore 2 (P1, P2)." in said
    assert "none (P1); LMDB 3 (P2)." in said


@pytest.fixture
def document(tmp_path_factory, monkeypatch) -> Path:
    """A document with markers in the place of docs/performance.md; nothing draws."""
    docs = tmp_path_factory.mktemp("docs")
    monkeypatch.setattr(report, "_DOCUMENT", docs / "performance.md")
    monkeypatch.setattr(report, "_PICTURES", docs)
    nothing = types.SimpleNamespace(draw=lambda content, folder: [])
    monkeypatch.setitem(sys.modules, "benchmarks.pictures", nothing)
    path = docs / "performance.md"
    path.write_text(f"before {report._BEGIN} tables {report._END} behind")
    return path


def test_a_report_that_would_lose_tables_is_refused(folder, capsys, document):
    """A report of one case once replaced the tables of all others in silence."""
    before = document.read_text()
    said = refused(few(folder, "--report"), capsys)
    others = [name for name, case in CASES.items() if name != "R1" and not case.large]
    assert f" {', '.join(others)}: " in said
    assert "--partial" in said
    assert document.read_text() == before
    assert os.listdir(folder) == []


def test_a_partial_report_is_written_if_asked_for(folder, document):
    assert main(few(folder, "--report", "--partial")) == 0
    text = document.read_text()
    assert text.startswith("before ")
    assert text.endswith(" behind")
    assert "\n| R1 | " in text


def test_a_report_without_markers_is_refused_before_it_is_measured(
    folder, capsys, document
):
    """It was refused after hours of measuring."""
    document.write_text("no markers")
    assert "markers" in refused(few(folder, "--report", "--partial"), capsys)


def test_a_report_without_matplotlib_is_refused_before_it_is_measured(
    folder, capsys, document, monkeypatch
):
    """Likewise."""
    monkeypatch.setitem(sys.modules, "benchmarks.pictures", None)
    said = refused(few(folder, "--report", "--partial"), capsys)
    assert "matplotlib" in said


def test_without_git_there_is_no_revision(monkeypatch):
    monkeypatch.setenv("PATH", "")
    assert machine.revision() is None


@pytest.mark.parametrize("case", ["C3", "R3"])
def test_every_figure_stands_in_a_table(folder, case):
    """Rows without a side to stand beside were once left out of the report."""
    figures = folder / "figures.json"
    assert main(few(folder, "--only", case, "--json", str(figures))) == 0
    content = json.loads(figures.read_text())
    section = report._section(content, [])
    for row in content["cases"][case]["rows"]:
        assert f"\n| {row['name']} | " in section
        assert row["goals"]


def test_bare_writes_are_of_the_groups_of_their_round(folder, monkeypatch):
    """In every other round they once took the groups of the round before."""
    rounds = iter(range(1, 1000))

    def commit_rate(*_: object) -> Run:
        group = next(rounds)
        return Run({"rate": 1.0, "latencies": [], "group": group}, 0, [])

    monkeypatch.setattr(commits, "isolated", commit_rate)
    monkeypatch.setattr(commits, "_bare_groups", lambda settings, group: float(group))
    rows = commits.c2(Settings(str(folder), 5, 0.001, None, (), large=False))
    for row, groups in zip(rows, ([1, 2, 3, 4, 5], [6, 7, 8, 9, 10]), strict=True):
        assert row.samples[commits.GROUPS] == groups
        assert row.as_json()["groups"] == groups
    assert rows[0].notes == ["3.0 (1.0 to 5.0) commits shared a write"]


def test_the_spinning_thread_begins_when_the_threads_are_made(folder, monkeypatch):
    """It began before, beside a clock that did not run: it 'kept 124% of its speed'."""
    made: list[object] = []
    made_before: list[int] = []

    class Pool(commits.ThreadPoolExecutor):
        def submit(self, *args: object) -> object:
            made.append(args)
            return super().submit(*args)

    class Spinner(commits._Spinner):
        def __enter__(self) -> Spinner:
            made_before.append(len(made))
            return super().__enter__()

    monkeypatch.setattr(commits, "ThreadPoolExecutor", Pool)
    monkeypatch.setattr(commits, "_Spinner", Spinner)
    load = commits.Load(16, 1, 8, spin=True)
    found = commits.commit_rate(Metastore, str(folder / "store"), load)
    assert made_before == [8]
    assert found["spins"] > 0


def test_the_log_alone_is_the_log_beside_the_snapshot(folder):
    """It once had user data and no updates: longer to recover, a softer limit."""
    recovery.r5(Settings(str(folder), 1, 0.001, None, (), large=False))
    logs = sorted(folder.glob("fixtures/*/log_*"), key=os.path.getsize)[-2:]
    assert {log.parent.name.partition("-")[0] for log in logs} == {"changed", "changes"}
    assert logs[0].stat().st_size == logs[1].stat().st_size


def test_every_side_of_a_compaction_is_warm(folder, monkeypatch):
    """Ours is, since the recovery before has read it; the others read cold files."""
    warmed: list[str] = []
    monkeypatch.setattr(compaction, "warm_cache", warmed.append)
    monkeypatch.setattr(Ancestor, "__init__", lambda self, binary: None)
    for made in ("make_snapshot", "make_log_of"):
        monkeypatch.setattr(
            Ancestor, made, lambda self, path, *_: os.makedirs(path, exist_ok=True)
        )
    monkeypatch.setattr(Ancestor, "compact", lambda self, path: 1.0)
    compaction.k1(Settings(str(folder), 1, 0.0002, "ancestor", (), large=False))
    kinds = [Path(path).parent.name for path in warmed]
    assert sorted(kinds) == ["fixtures"] * 3 + ["scratch"] * 3


def test_large_recoveries_are_verified(folder, monkeypatch):
    """R6 alone gave figures of recoveries whose records nobody looked at."""
    monkeypatch.setattr(recovery, "_expected", lambda n_records, user_data_size: 0)
    with pytest.raises(BenchmarkError, match="recovered other records"):
        recovery.r6(Settings(str(folder), 1, 0.0001, None, (), large=True))


def test_the_memory_of_a_compaction_is_without_the_recovery(folder, monkeypatch):
    """The picture had the recovery before it, ten times what the table said."""
    memory = [(0.0, 900, 0), (1.0, 800, 0), (2.0, 100, 0), (3.0, 120, 0)]
    monkeypatch.setattr(Settings, "snapshot", lambda *_: str(folder / "store"))
    (folder / "store").mkdir()
    monkeypatch.setattr(
        sizes, "isolated", lambda *_, **__: Run((120, 51.5), 0, memory, started=50.0)
    )
    settings = Settings(str(folder), 1, 0.001, None, (), large=False)
    row = sizes._compaction_row(settings, 1000, 1000)
    assert row.extra["memory"] == {OURS: [(0.5, 100, 0), (1.5, 120, 0)]}


def test_a_peer_may_come_from_a_distribution_of_another_name():
    """Its version was asked for by the name of its module."""

    class Other(Peer):
        module = "_pytest"
        distribution = "pytest"

    assert Other.installed_version() == pytest.__version__
