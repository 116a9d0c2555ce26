"""What each command says of directories and files that it may not read or write.

Nothing stops root, so a child process gives its rights up. It imports first: whoever it
becomes may not be able to read the interpreter's own files.
"""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import pytest

import verbs
from metastore import MetadataStore

ROOT = Path(__file__).parent.parent
#: Nobody: owns nothing, here as everywhere.
USER = 65534

#: Runs command lines one after the other, each in a fork, and tells what came of them.
#: A first look at a sound store imports what is imported late.
COMMANDS = """
import concurrent.futures.thread, contextlib, importlib.util, io, json, os, sys
from metastore import MetadataStore, cli

if importlib.util.find_spec("benchmarks"):
    from benchmarks.__main__ import main as benchmarks

def recover(arguments):
    try:
        MetadataStore.recover(*arguments)
    except OSError as error:
        sys.exit(f"{type(error).__name__}: {error}")

def step_down(user):
    if os.geteuid() == 0:
        os.setgroups([])
        os.setgid(user)
        os.setuid(user)

def run(user, program, *arguments):
    out, error = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(error):
        try:
            step_down(user)
            if program == "benchmarks":
                status = benchmarks(arguments)
            elif program == "recover":
                status = recover(arguments)
            else:
                status = cli.main([program, *arguments])
        except SystemExit as ended:
            status = 1
            print(ended.code, file=sys.stderr)
    return [status, out.getvalue(), error.getvalue()]

user, *lines = json.loads(sys.argv[1])
os.chdir(sys.argv[2])
with contextlib.redirect_stdout(io.StringIO()):
    cli.main(["verify", "--json", "sound"])
"".encode("ascii")
for line in lines:
    answer, give = os.pipe()
    if os.fork() == 0:
        os.write(give, json.dumps(run(user, *line)).encode())
        os._exit(0)
    os.close(give)
    with open(answer) as told:
        print(told.read() or json.dumps([-1, "", "died"]), flush=True)
    os.wait()
"""


class Answer(NamedTuple):
    status: int
    output: str
    errors: str


Shut = Callable[[Path], str]
Run = Callable[..., list[Answer]]


def store(path: Path) -> Path:
    """A snapshot and a log."""
    verbs.write(path, verbs.numbered(3))
    opened, _ = MetadataStore.recover(path)
    with opened:
        opened.compact()
    verbs.write(path, verbs.numbered(2, 4))
    return path


@pytest.fixture
def folder() -> Iterator[Path]:
    """A directory that everybody may enter (those of pytest are not), with a store."""
    with tempfile.TemporaryDirectory() as name:
        path = Path(name)
        path.chmod(0o755)
        store(path / "sound")
        (path / "open").mkdir()
        (path / "open").chmod(0o777)
        yield path
        for shut in path.iterdir():
            shut.chmod(0o755)


@pytest.fixture
def run(folder: Path) -> Run:
    """Runs command lines without any rights, in `folder`."""

    def run_there(*lines: Sequence[object]) -> list[Answer]:
        wanted = json.dumps([USER, *([str(word) for word in line] for line in lines)])
        done = subprocess.run(
            [sys.executable, "-W", "ignore", "-c", COMMANDS, wanted, folder],
            capture_output=True,
            text=True,
            cwd=ROOT,
            timeout=60,
        )
        assert done.returncode == 0, done.stderr
        if "Operation not permitted" in done.stderr:
            pytest.skip("root may read everything, and cannot step down here")
        return [Answer(*json.loads(line)) for line in done.stdout.splitlines()]

    return run_there


def not_listed(path: Path) -> str:
    path.chmod(0o311)
    return path.name


def not_entered(path: Path) -> str:
    path.chmod(0o000)
    return path.name


def with_a_log_of_its_owner(path: Path) -> str:
    (log,) = verbs.logs(path)
    log.chmod(0o000)
    return f"{path.name}/{log.name}"


def with_a_snapshot_of_its_owner(path: Path) -> str:
    (snapshot,) = verbs.snapshots(path)
    snapshot.chmod(0o000)
    return f"{path.name}/{snapshot.name}"


@pytest.mark.parametrize(
    "shut",
    [not_listed, not_entered, with_a_log_of_its_owner, with_a_snapshot_of_its_owner],
)
def test_what_may_not_be_read(shut: Shut, folder: Path, run: Run) -> None:
    named = shut(store(folder / "db"))
    *answers, recovered = run(
        ["info", "db"],
        ["verify", "db"],
        ["verify", "--json", "db"],
        ["dump", "db"],
        ["repair", "db", "open/new"],
        ["recover", "db"],
    )
    for answer in answers:
        assert answer == (2, "", f"metastore: Permission denied ({named})\n")
    assert list((folder / "open").iterdir()) == []
    # A store that is to be written into is refused before its files are opened.
    assert recovered.status == 1
    assert recovered.errors.startswith("PermissionError: ")


def test_a_quarantine_that_may_not_be_read(folder: Path, run: Run) -> None:
    """A reading is not called whole where it was not; the records need it not."""
    (store(folder / "db") / "quarantine").mkdir(mode=0o000)
    info, verify, dump = run(["info", "db"], ["verify", "db"], ["dump", "db"])
    refused = (2, "", "metastore: Permission denied (db/quarantine)\n")
    assert info == verify == refused
    assert (dump.status, dump.errors) == (0, "")


def test_a_destination_of_repair_that_may_not_be_written(
    folder: Path, run: Run
) -> None:
    store(folder / "db")
    (folder / "shut").mkdir(mode=0o000)
    (folder / "read").mkdir(mode=0o555)
    answers = run(
        ["repair", "db", "shut"],
        ["repair", "db", "shut/a/b"],
        ["repair", "db", "read"],
        ["repair", "db", "read/new"],
    )
    for answer, named in zip(answers, ["shut", "shut/a", "", "read/new"], strict=True):
        assert (answer.status, answer.output) == (2, "")
        assert answer.errors.startswith("metastore: Permission denied")
        assert named in answer.errors
        assert answer.errors.count("\n") == 1
    assert list((folder / "read").iterdir()) == []


def test_a_tree_and_a_directory_of_the_demo(folder: Path, run: Run) -> None:
    (folder / "shut").mkdir(mode=0o000)
    for answer in run(
        ["demo", "--directory", "open/work", "shut"],
        ["demo", "--directory", "shut", "sound"],
    ):
        assert (answer.status, answer.output) == (2, "")
        assert answer.errors.startswith("metastore: Permission denied (shut")
        assert answer.errors.count("\n") == 1


def test_what_may_be_read_and_not_written_is_enough(folder: Path, run: Run) -> None:
    """The commands that look need no more, and repair writes elsewhere."""
    path = store(folder / "db")
    for file in path.iterdir():
        file.chmod(0o444)
    path.chmod(0o555)
    for answer in run(
        ["info", "db"], ["verify", "db"], ["dump", "db"], ["repair", "db", "open/new"]
    ):
        assert (answer.status, answer.errors) == (0, "")
        assert answer.output
    assert verbs.read(folder / "open" / "new") == verbs.states(verbs.numbered(5))[-1]


@pytest.mark.skipif(
    importlib.util.find_spec("benchmarks") is None,
    reason="a flavour of the extensions has none",
)
def test_the_benchmarks_refuse_before_they_measure(folder: Path, run: Run) -> None:
    from benchmarks.machine import file_system

    (folder / "shut").mkdir(mode=0o000)
    (folder / "sound").chmod(0o555)  # for who is not root, and so remains its owner
    (folder / "open" / "file").write_bytes(b"")
    wanted = {
        ("--directory", "shut"): "cannot be written to (Permission denied)",
        ("--directory", "sound"): "cannot be written to (Permission denied)",
        ("--directory", "missing"): "no such directory",
        ("--directory", "open/file"): "no such directory",
        ("--directory", "open", "--ancestor", "missing"): "missing",
    }
    if file_system(str(folder)) not in ("tmpfs", "ramfs"):  # refused for that alone
        for path in ("shut/figures.json", "missing/figures.json", "open"):
            wanted["--directory", "open", "--json", path] = path
    few = ["benchmarks", "--only", "R1", "--scale", "0.0001", "--peers", "none"]
    answers = run(*([*few, *options] for options in wanted))
    for answer, text in zip(answers, wanted.values(), strict=True):
        assert (answer.status, answer.output) == (2, "")
        last = answer.errors.splitlines()[-1]
        assert last.startswith("benchmarks: ")
        assert text in last
    assert [path.name for path in (folder / "open").iterdir()] == ["file"]
