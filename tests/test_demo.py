"""A tree goes in, a process dies, everything comes back, or the demo says what not."""

from __future__ import annotations

import contextlib
import os
import random
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from metastore import MetadataStore, cli, demo, demo_files
from metastore.demo import Demo
from metastore.demo_files import (
    CHUNK_SIZE,
    STORE,
    DemoError,
    Heap,
    Source,
    UnreadableError,
    file_key,
    unpack_user_data,
    walk,
)
from metastore.errors import CorruptionError
from metastore.progress import Progress

NOT_UTF8 = b"caf\xe9\n.txt"


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """About 200 files, with every kind of trouble a walk can meet."""
    root = tmp_path_factory.mktemp("tree")
    rng = random.Random(1)
    for number in range(190):
        path = root / f"directory {number % 7}" / f"{number}.bin"
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(rng.randbytes(rng.randrange(3000)))
    (root / "deep" / "deeper").mkdir(parents=True)
    (root / "deep" / "deeper" / "empty").write_bytes(b"")
    (root / "also empty").write_bytes(b"")
    (root / "two chunks").write_bytes(rng.randbytes(CHUNK_SIZE + 1))
    (root / "one chunk").write_bytes(rng.randbytes(CHUNK_SIZE))
    with open(os.path.join(os.fsencode(root), NOT_UTF8), "wb") as file:
        file.write(b"bytes under a name that is not UTF-8")
    (root / "link to a file").symlink_to("also empty")
    (root / "link to a directory").symlink_to("deep")
    (root / "link to itself").symlink_to("link to itself")
    os.mkfifo(root / "pipe")
    return root


def loaded(tree: Path, directory: Path) -> Demo:
    """A demo whose files are all stored."""
    directory.mkdir(exist_ok=True)
    done = Demo(walk(str(tree)), str(directory), threads=4)
    done.load()
    return done


def small_tree(path: Path, count: int = 20) -> Path:
    path.mkdir()
    for number in range(count):
        (path / f"{number:03}").write_bytes(b"%d" % number * 10)
    return path


def flip(path: Path, offset: int) -> None:
    data = bytearray(path.read_bytes())
    data[offset] ^= 0x40
    path.write_bytes(data)


# The whole of it


def test_everything_comes_back_after_two_kills(tree: Path, tmp_path: Path) -> None:
    work = tmp_path / "work"
    command = [sys.executable, "-m", "metastore", "demo", str(tree)]
    command += ["--directory", str(work), "--kills", "2", "--threads", "4"]
    done = subprocess.run(command, capture_output=True, text=True)
    print(done.stdout)  # the seed among it
    assert done.returncode == 0, done.stderr + done.stdout
    assert done.stderr == ""  # no bar where no terminal is
    assert ": 0 differences" in done.stdout
    assert "seed" in done.stdout

    store, recovered = MetadataStore.recover(work / STORE)
    paths = walk(str(tree)).paths
    with store, contextlib.closing(Heap(str(work))) as heap:
        found = {}
        for key, value, user_data in recovered:
            length, path = unpack_user_data(user_data)
            assert key == file_key(path)
            found[path] = heap.read(value - 1, length)
    root = os.fsencode(tree)
    kept = [path for number, path in enumerate(paths) if number % 10]
    assert len(paths) == 195
    assert NOT_UTF8 in paths
    assert sorted(found) == kept
    for path, data in found.items():
        with open(os.path.join(root, path), "rb") as file:
            assert file.read() == data, path


def test_the_same_seed_kills_at_the_same_batches(tmp_path: Path) -> None:
    class Rehearsal(Demo):
        def load(self, kill_after_batches: int | None = None) -> None:
            points.append(kill_after_batches)
            self.acknowledged |= set(range(10 * len(points)))

        def check(self, when: str) -> None:
            labels.append(when)

        def delete_some(self) -> None:
            pass

    manifest = walk(str(small_tree(tmp_path / "tree", 40)))
    runs = []
    for _ in range(2):
        points: list[int | None] = []
        labels: list[str] = []
        demo.play(Rehearsal(manifest, str(tmp_path), 1), kills=3, seed=7)
        assert labels == ["after kill 1", "after kill 2", "after kill 3", "at the end"]
        runs.append(points)
    assert runs[0] == runs[1]
    first, second, third, last = runs[0]
    assert first in range(1, 21)  # of 40 batches, for three kills
    assert second in range(1, 21)  # of 30, for two
    assert third in range(1, 20)  # of 20, for one
    assert last is None


@pytest.mark.parametrize("keep", [False, True])
def test_the_temporary_directory_is_removed_unless_kept(
    keep: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tree = small_tree(tmp_path / "tree", 3)
    temporary = tmp_path / "temporary"
    temporary.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(temporary))
    assert cli.main(["demo", str(tree), "--kills=0", *["--keep"][: int(keep)]]) == 0
    assert len(list(temporary.glob("*/store/snapshot_*"))) == int(keep)
    assert len(list(temporary.iterdir())) == int(keep)


def test_a_single_empty_file_is_enough(tmp_path: Path) -> None:
    tree = tmp_path / "tree"
    tree.mkdir()
    (tree / "empty").touch()
    assert demo.run(str(tree), directory=str(tmp_path / "work"), kills=1) == 0


# What differs is found


def test_a_flipped_byte_of_the_heap_is_a_difference(
    tree: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    work = tmp_path / "work"
    delete_some = Demo.delete_some

    def sabotaged(self: Demo) -> None:
        delete_some(self)
        flip(work / "heap", (work / "heap").stat().st_size // 2)

    monkeypatch.setattr(Demo, "delete_some", sabotaged)
    # The middle of the heap may lie in a file that is deleted, so no file is.
    monkeypatch.setattr(demo, "DELETE_STEP", 1000)
    assert cli.main(["demo", str(tree), "--directory", str(work), "--kills", "0"]) == 1
    output = capsys.readouterr()
    assert ": 1 difference\n" in output.out
    (line,) = output.err.splitlines()
    assert "differs from byte" in line


def test_each_kind_of_difference_is_named(tmp_path: Path) -> None:
    tree = small_tree(tmp_path / "tree")
    done = loaded(tree, tmp_path / "work")
    done.delete_some()
    assert done.deleted == {0, 10}
    record = {path: (key, new) for path, key, new in records(done)}
    store, _ = MetadataStore.recover(tmp_path / "work" / STORE)
    with store:
        store.insert_batch(
            [
                (file_key(b"000"), record[b"001"][1]),  # deleted: there again
                (file_key(b"001"), None),  # gone
                (file_key(b"002"), record[b"003"][1]),  # another file's place
                (file_key(b"004"), (1, b"short")),
                (4711, (1, b"")),  # of no file
            ]
        )
    flip(tmp_path / "work" / "heap", record[b"005"][1][0] - 1 + 9)
    done.check("now")
    assert sorted(done.differences) == [
        "000 was deleted, and is there again",
        "001 was acknowledged, and is gone",
        "002 is stored under the name 003",
        "004 user data of 5 bytes hold no length",
        f"005 differs from byte 9 on, which lies at offset {record[b'005'][1][0] + 8} "
        "of the heap",
        "key 0x0000000000001267 belongs to no file",
    ]


def records(done: Demo) -> list[tuple[bytes, int, tuple[int, bytes]]]:
    store, recovered = MetadataStore.recover(os.path.join(done.directory, STORE))
    store.shutdown()
    return [
        (unpack_user_data(user_data)[1], key, (value, user_data))
        for key, value, user_data in recovered
    ]


def test_a_shorter_heap_is_a_difference(tmp_path: Path) -> None:
    done = loaded(small_tree(tmp_path / "tree", 1), tmp_path / "work")
    os.truncate(tmp_path / "work" / "heap", 4)
    done.check("now")
    (line,) = done.differences
    assert "differs from byte 4 on" in line


def test_a_damaged_store_ends_the_demo_with_status_1(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    work = tmp_path / "work"
    tree = small_tree(tmp_path / "tree", 3)
    load = Demo.load

    def sabotaged(self: Demo, kill_after_batches: int | None = None) -> None:
        load(self, kill_after_batches)
        (log,) = (work / STORE).glob("log_*")
        flip(log, 16)

    monkeypatch.setattr(Demo, "load", sabotaged)
    with pytest.raises(CorruptionError):
        demo.run(str(tree), directory=str(work), kills=0)
    arguments = ["demo", str(tree), "--directory", str(tmp_path / "again")]
    work = tmp_path / "again"
    assert cli.main([*arguments, "--kills", "0"]) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert "log_" in line


# What changes while it runs is counted, not blamed


def test_files_that_change_or_vanish_are_counted(tmp_path: Path) -> None:
    tree = small_tree(tmp_path / "tree")
    manifest = walk(str(tree))
    (tree / "000").unlink()  # gone before it is stored
    (tree / "001").write_bytes(b"changed before it is stored: what is stored counts")
    (tmp_path / "work").mkdir()
    done = Demo(manifest, str(tmp_path / "work"), threads=2)
    done.load()
    assert done.unreadable == {0}
    (tree / "002").write_bytes(b"changed after it was stored")
    (tree / "003").unlink()
    (tree / "004").unlink()
    os.mkfifo(tree / "004")
    done.check("now")
    assert done.differences == []
    assert done.changed == {2, 3, 4}
    assert done.n_files_compared == 16


def test_a_source_is_read_as_far_as_it_was_when_opened(tmp_path: Path) -> None:
    path = tmp_path / "growing"
    path.write_bytes(b"12345")
    with Source(os.fsencode(path)) as source:
        with path.open("ab") as file:
            file.write(b"678")
        assert source.read(100) == b"12345"
        assert source.read(100) == b""
        assert source.fingerprint()[0] == 8


def test_only_regular_files_are_sources(tree: Path) -> None:
    for name in ("pipe", "link to a file", "deep", "missing"):
        with pytest.raises(UnreadableError):
            Source(os.fsencode(tree / name))


def test_unreadable_files_and_directories_are_counted(tmp_path: Path) -> None:
    tree = small_tree(tmp_path / "tree")
    (tree / "007").chmod(0)
    (tree / "closed").mkdir(mode=0)
    if os.access(tree / "007", os.R_OK):
        pytest.skip("root reads everything")
    done = loaded(tree, tmp_path / "work")
    done.check("now")
    assert done.manifest.n_directories_unreadable == 1
    assert done.unreadable == {7}
    assert done.differences == []


def test_a_walk_follows_no_links(tree: Path) -> None:
    manifest = walk(str(tree))
    assert len(manifest.paths) == 195
    assert manifest.n_special == 4
    assert manifest.paths == sorted(manifest.paths)


# What cannot run says so


def test_two_paths_of_one_key_are_refused_by_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    tree = small_tree(tmp_path / "tree", 2)
    monkeypatch.setattr(demo_files, "file_key", lambda path: 7)
    assert cli.main(["demo", str(tree)]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "same 64-bit hash" in line
    assert line.endswith("000 and 001")


def test_a_directory_with_something_in_it_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tree = small_tree(tmp_path / "tree", 2)
    assert cli.main(["demo", str(tree), "--directory", str(tree)]) == 2
    assert "new or empty directory" in capsys.readouterr().err
    assert len(list(tree.iterdir())) == 2


def test_a_tree_without_files_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["demo", str(tmp_path)]) == 2
    assert "no regular file" in capsys.readouterr().err
    assert cli.main(["demo", str(tmp_path / "missing")]) == 2
    assert "No such file or directory" in capsys.readouterr().err


def test_a_child_that_fails_by_itself_ends_the_demo(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "work" / "heap").mkdir(parents=True)  # the heap cannot be opened
    manifest = walk(str(small_tree(tmp_path / "tree", 2)))
    with pytest.raises(DemoError, match="status 2"):
        Demo(manifest, str(tmp_path / "work"), threads=1).load()
    (line,) = capfd.readouterr().err.splitlines()
    assert line.startswith("metastore: demo worker: ")
    assert "heap" in line


def test_a_child_whose_parent_is_gone_goes_quietly(tree: Path, tmp_path: Path) -> None:
    walk(str(tree)).write(str(tmp_path))
    command = [sys.executable, "-m", "metastore.demo_worker"]
    command += [str(tmp_path), str(tree), "2", "1"]
    child = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert child.stdout is not None
    child.stdout.close()
    _, errors = child.communicate()
    assert (child.returncode, errors) == (141, b"")


# The progress bar


class Terminal:
    """A stderr that claims to be a terminal."""

    def __init__(self) -> None:
        self.text = ""

    def isatty(self) -> bool:
        return True

    def write(self, text: str) -> int:
        self.text += text
        return len(text)

    def flush(self) -> None:
        pass


def pretend_terminal(monkeypatch: pytest.MonkeyPatch) -> Terminal:
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    return terminal


def test_progress_without_tqdm_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = pretend_terminal(monkeypatch)
    monkeypatch.setitem(sys.modules, "tqdm", None)  # as if it were not installed
    with Progress("storing", 1000) as progress:
        progress.advance(10)
        progress.report(1000, 2000)
    assert terminal.text.startswith("\rstoring: ")
    assert terminal.text.endswith("\rstoring:  50% (1,000 of 2,000 files)\n")


def test_progress_with_tqdm_is_its_bar(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("tqdm")
    terminal = pretend_terminal(monkeypatch)
    with Progress("storing", 1000, "bytes") as progress:
        progress.report(500, 1000)
    assert "storing" in terminal.text
    assert "50%" in terminal.text
