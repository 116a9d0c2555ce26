"""The commands that look: what they say, their exit status, and that they only look."""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import errno
import hashlib
import itertools
import json
import os
import random
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

import oracle
import verbs
from metastore import MetadataStore, cli, look
from metastore.directory import Directory
from metastore.errors import CorruptionError, FormatVersionError, MetastoreError

COMMAND = [sys.executable, "-m", "metastore"]
HEADER_SIZE = 64

Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def store(db: Path) -> Path:
    """A snapshot, a sealed log, and a log that a kill left open."""
    verbs.write(db, verbs.numbered(4))
    opened, _ = MetadataStore.recover(db)
    with opened:
        opened.compact()
    verbs.write(db, verbs.numbered(3, 5))
    verbs.write_open(db, verbs.numbered(2, 8))
    return db


def fingerprint(path: Path) -> list[tuple[object, ...]]:
    """Everything that a command which only looks must leave as it was."""
    found = []
    for name in [path, *sorted(path.rglob("*"))]:
        status = name.lstat()
        data = name.read_bytes() if name.is_file() else b""
        digest = hashlib.sha256(data).hexdigest()
        found.append((name, status.st_mode, status.st_ino, status.st_mtime_ns, digest))
    return found


def assert_one_line(errors: str) -> None:
    assert errors.startswith("metastore: ")
    assert errors.count("\n") == 1
    assert errors.endswith("\n")


# info


def test_info_lists_every_file(store: Path, run: Run) -> None:
    (snapshot,), (sealed, last) = verbs.snapshots(store), verbs.logs(store)
    (store / "notes.txt").write_text("not ours")
    (store / "log_00000000000000ff.tmp").write_bytes(b"left over")
    (store / "quarantine").mkdir()
    (store / "quarantine" / "torn").write_bytes(bytes(12))
    status, output, errors = run("info", store)
    assert (status, errors) == (0, "")
    lines = {line.split()[0]: line for line in output.splitlines()}
    assert snapshot.read_bytes()[16:32].hex() in lines["store"]
    assert "no known holder" in lines["lock"]
    number = str(int(snapshot.name.removeprefix("snapshot_"), 16))
    row = lines[snapshot.name].split()
    n_records = len(verbs.states(verbs.numbered(4))[-1])
    assert row[1:3] == [number, f"{snapshot.stat().st_size:,}"]
    assert row[3:7] == ["up", "to", "4", str(n_records)]
    assert "5 to 7" in lines[sealed.name]
    assert "sealed" in lines[sealed.name]
    assert "from 8" in lines[last.name]
    assert "open" in lines[last.name]
    assert "UTC" in lines[last.name]
    assert "notes.txt" in lines["unknown"]
    assert "log_00000000000000ff.tmp" in lines["temporary"]
    assert "1 file, 12 bytes" in lines["quarantine"]


def test_info_counts_the_records_of_a_snapshot(store: Path) -> None:
    with look.open_store(str(store)) as directory:
        found = look.overview(directory)
    snapshot, sealed, last = found.files
    expected = verbs.states(verbs.numbered(4))[-1]
    assert snapshot.n_records == len(expected)
    assert (snapshot.state, sealed.state, last.state) == ("published", "sealed", "open")
    assert (sealed.first_sequence, sealed.last_sequence) == (5, 7)
    assert (last.first_sequence, last.last_sequence) == (8, None)


def test_info_tells_a_log_that_the_next_one_bounds(db: Path) -> None:
    verbs.write_open(db, verbs.numbered(3))
    verbs.write(db, verbs.numbered(1, 4))
    with look.open_store(str(db)) as directory:
        first, second = look.overview(directory).files
    assert (first.state, first.first_sequence, first.last_sequence) == (
        "left open",
        1,
        3,
    )
    assert (second.state, second.last_sequence) == ("sealed", 4)


@pytest.mark.parametrize("ending", [b"\xff" * 100, b"\xaf", bytes(30), b""])
def test_info_takes_no_user_data_for_an_end(db: Path, ending: bytes) -> None:
    verbs.write_open(db, [[(1, (1, bytes(40) + ending))]])
    with look.open_store(str(db)) as directory:
        (log,) = look.overview(directory).files
    assert log.state == "open"


@pytest.mark.skipif(
    not os.access("/proc/locks", os.R_OK), reason="only Linux tells who holds a lock"
)
def test_info_and_verify_name_the_holder(store: Path, run: Run) -> None:
    holder, _ = MetadataStore.recover(store)
    with holder:
        assert f"held by process {os.getpid()}" in run("info", store)[1]
        _, output, _ = run("verify", "--json", store)
        assert json.loads(output)["holder_pid"] == os.getpid()


def test_info_says_what_is_damaged(store: Path, run: Run) -> None:
    sealed, last = verbs.logs(store)
    verbs.flip(sealed, 20)
    status, output, errors = run("info", store)
    assert status == 1
    assert_one_line(errors)
    assert sealed.name in errors
    (row,) = (line for line in output.splitlines() if line.startswith(sealed.name))
    assert "damaged" in row
    assert last.name in output


def test_info_misses_a_log(store: Path, run: Run) -> None:
    verbs.logs(store)[0].unlink()
    status, _, errors = run("info", store)
    assert status == 1
    assert "a file is missing" in errors


def test_info_bears_a_creation_time_beyond_all_calendars(db: Path, run: Run) -> None:
    verbs.write(db, verbs.numbered(1))
    with look.open_store(str(db)) as directory:
        (facts,) = look.overview(directory).files
    facts = dataclasses.replace(facts, created_ns=2**64 - 1)
    assert "2554" in cli._facts_row(facts)[-1]
    facts = dataclasses.replace(facts, created_ns=2**100)
    assert f"{2**100} ns" in cli._facts_row(facts)[-1]


# verify


def test_verify_says_of_each_file_what_was_checked(store: Path, run: Run) -> None:
    status, output, errors = run("verify", store)
    assert (status, errors) == (0, "")
    for path in [*verbs.snapshots(store), *verbs.logs(store)]:
        assert f"{path.name}  {path.stat().st_size:,} bytes\n" in output
    assert "batches 5 to 7, sealed" in output
    assert "batches 8 to 9, not sealed" in output
    assert "sound: " in output


def test_verify_as_json(store: Path, run: Run) -> None:
    expected = verbs.states(verbs.numbered(9))[-1]
    status, output, errors = run("verify", "--json", store)
    assert (status, errors) == (0, "")
    found = json.loads(output)
    assert found["path"] == str(store)
    assert found["sound"] is True
    assert found["damage"] is found["torn"] is None
    assert found["n_records"] == len(expected)
    assert found["user_data_size"] == sum(len(data) for _, data in expected.values())
    assert found["sequence"] == 9
    names = [path.name for path in [*verbs.snapshots(store), *verbs.logs(store)]]
    assert [check["name"] for check in found["files"]] == names
    assert [check["kind"] for check in found["files"]] == ["snapshot", "log", "log"]
    assert [check["n_batches"] for check in found["files"]] == [None, 3, 2]
    assert all(check["damage"] is None for check in found["files"])
    assert found["temporaries"] == [path.name for path in store.glob("*.tmp")]
    assert found["unknown"] == []


def test_verify_reports_a_torn_tail_and_is_content(store: Path, run: Run) -> None:
    last = verbs.logs(store)[-1]
    verbs.cut_tail(last)
    verbs.cut(last, last.stat().st_size - 5)
    status, output, errors = run("verify", "--json", store)
    assert (status, errors) == (0, "")
    found = json.loads(output)
    assert found["sequence"] == 8
    assert found["torn"]["name"] == last.name
    assert found["torn"]["offset"] + found["torn"]["size"] <= last.stat().st_size
    assert "never acknowledged" in run("verify", store)[1]


def test_verify_finds_every_damaged_file_not_only_the_first(
    store: Path, run: Run
) -> None:
    (snapshot,), (sealed, last) = verbs.snapshots(store), verbs.logs(store)
    verbs.flip(snapshot, HEADER_SIZE + 60)
    verbs.flip(sealed, HEADER_SIZE + 60)
    status, output, errors = run("verify", "--json", store)
    assert status == 1
    assert_one_line(errors)
    found = json.loads(output)
    assert found["sound"] is False
    assert found["damage"]["path"] == str(snapshot)
    assert found["damage"]["offset"] == HEADER_SIZE
    assert "checksum mismatch" in found["damage"]["reason"]
    by_name = {check["name"]: check["damage"] for check in found["files"]}
    assert by_name[sealed.name]["offset"] == HEADER_SIZE
    assert by_name[last.name] is None
    status, output, _ = run("verify", store)
    assert status == 1
    assert output.count("damaged at offset 64: ") == 2
    assert "recovery refuses" in output


def test_verify_of_a_damaged_header(store: Path, run: Run) -> None:
    verbs.flip(verbs.snapshots(store)[0], 20)
    status, output, _ = run("verify", "--json", store)
    assert status == 1
    assert json.loads(output)["files"][0]["damage"]["reason"].startswith("file header")


# What a newer snapshot contains, and an interrupted removal has left


def kept_after_compaction(path: Path, *kept: Path) -> Path:
    """Compact, and bring back what that removed; return the new snapshot."""
    images = [file.read_bytes() for file in kept]
    opened, _ = MetadataStore.recover(path)
    with opened:
        opened.compact()
    for file, image in zip(kept, images, strict=True):
        assert not file.exists()
        file.write_bytes(image)
    return verbs.snapshots(path)[-1]


def checks(output: str) -> dict[str, dict[str, object]]:
    return {check["name"]: check for check in json.loads(output)["files"]}


def test_verify_reads_files_that_the_snapshot_contains(store: Path, run: Run) -> None:
    left = [*verbs.snapshots(store), *verbs.logs(store)]
    snapshot = kept_after_compaction(store, *left)
    status, output, errors = run("verify", store)
    assert (status, errors) == (0, "")
    assert output.count(f"not needed: {snapshot.name} contains this file") == 3
    assert "batches 5 to 7, sealed" in output
    assert "batches 8 to 9, not sealed" in output
    found = checks(run("verify", "--json", store)[1])
    assert [found[old.name]["contained_in"] for old in left] == [snapshot.name] * 3
    assert found[snapshot.name]["contained_in"] is None
    assert not any(check["damage"] for check in found.values())


@pytest.mark.parametrize("which", [0, 1, 2], ids=["snapshot", "sealed", "open"])
def test_damage_of_a_file_that_the_snapshot_contains_is_told_and_no_loss(
    which: int, store: Path, run: Run
) -> None:
    left = [*verbs.snapshots(store), *verbs.logs(store)]
    snapshot = kept_after_compaction(store, *left)
    expected = run("dump", store)
    verbs.flip(left[which], HEADER_SIZE + 60)
    status, output, errors = run("verify", "--json", store)
    assert status == 0
    assert_one_line(errors)
    assert str(left[which]) in errors
    assert f"no loss, {snapshot.name} contains this file" in errors
    report = json.loads(output)
    assert report["sound"] is True
    assert report["damage"] is None
    found = checks(output)
    assert found[left[which].name]["damage"]["offset"] == HEADER_SIZE
    assert [gap["offset"] for gap in found[left[which].name]["gaps"]] == [HEADER_SIZE]
    assert sum(check["damage"] is not None for check in found.values()) == 1
    status, output, again = run("verify", store)
    assert (status, again) == (0, errors)
    assert "damaged at offset 64: " in output
    assert "sound: " in output
    assert run("dump", store) == expected


@pytest.mark.parametrize("left", [[0], [1], [0, 1], [0, 3], [1, 3], [2, 3]])
def test_any_of_the_contained_logs_may_be_left(
    left: list[int], store: Path, run: Run
) -> None:
    """A log that the next one bounded is not damaged because that one is gone."""
    for first in (10, 12):
        verbs.write(store, verbs.numbered(2, first))
    logs = verbs.logs(store)
    kept_after_compaction(store, *(logs[i] for i in left))
    status, output, errors = run("verify", store)
    assert (status, errors) == (0, "")
    assert "damaged" not in output


def test_nothing_is_contained_in_a_damaged_snapshot(store: Path, run: Run) -> None:
    left = [*verbs.snapshots(store), *verbs.logs(store)]
    snapshot = kept_after_compaction(store, *left)
    verbs.flip(snapshot, HEADER_SIZE + 60)
    verbs.flip(left[1], HEADER_SIZE + 60)
    status, output, errors = run("verify", "--json", store)
    assert status == 1
    assert_one_line(errors)
    assert "no loss" not in errors
    found = checks(output)
    assert found[snapshot.name]["damage"]
    assert found[left[1].name]["damage"]
    assert all(check["contained_in"] is None for check in found.values())


def test_a_loss_and_damage_without_loss_are_told_apart(store: Path, run: Run) -> None:
    old = verbs.logs(store)[0]
    image = old.read_bytes()
    snapshot = kept_after_compaction(store)
    verbs.write(store, verbs.numbered(2, 10))
    (new,) = verbs.logs(store)
    old.write_bytes(image)
    for path in (old, new):
        verbs.flip(path, HEADER_SIZE + 60)
    status, output, errors = run("verify", "--json", store)
    assert status == 1
    without_loss, loss = errors.splitlines()
    assert old.name in without_loss
    assert "no loss" in without_loss
    assert new.name in loss
    assert "no loss" not in loss
    assert json.loads(output)["damage"]["path"] == str(new)
    found = checks(output)
    assert found[old.name]["damage"]
    assert found[old.name]["contained_in"] == snapshot.name
    assert found[new.name]["contained_in"] is None


def test_verify_lists_temporaries_and_quarantine_and_judges_neither(
    store: Path, run: Run
) -> None:
    (store / "log_00000000000000ff.tmp").write_bytes(b"left over")
    (store / "snapshot_00000000000000fe.tmp").write_bytes(bytes(100))
    (store / "quarantine").mkdir()
    (store / "quarantine" / "torn").write_bytes(bytes(12))
    status, output, errors = run("verify", store)
    assert (status, errors) == (0, "")
    assert "temporary   log_00000000000000ff.tmp\n" in output
    assert "temporary   snapshot_00000000000000fe.tmp\n" in output
    assert "quarantine  1 file, 12 bytes\n" in output
    found = json.loads(run("verify", "--json", store)[1])
    assert (found["n_quarantined"], found["quarantined_size"]) == (1, 12)
    assert {"log_00000000000000ff.tmp", "snapshot_00000000000000fe.tmp"} <= set(
        found["temporaries"]
    )


# dump


def test_dump_prints_key_value_and_user_data(db: Path, run: Run) -> None:
    verbs.write(db, [[(9, (5, b"")), (7, (4096, b"heap-0")), (2**64 - 1, (1, b"\0"))]])
    assert run("dump", db) == (0, f"7 4096 686561702d30\n9 5 \n{2**64 - 1} 1 00\n", "")
    status, output, errors = run("dump", "--json", "--limit", 2, db)
    assert (status, errors) == (0, "")
    assert [json.loads(line) for line in output.splitlines()] == [
        {"key": 7, "value": 4096, "user_data": "686561702d30"},
        {"key": 9, "value": 5, "user_data": ""},
    ]
    assert run("dump", "--limit", 0, db) == (0, "", "")


def test_dump_of_a_damaged_store_prints_no_record(store: Path, run: Run) -> None:
    verbs.flip(verbs.logs(store)[0], HEADER_SIZE + 60)
    status, output, errors = run("dump", store)
    assert (status, output) == (1, "")
    assert_one_line(errors)


def test_dump_stops_quietly_when_nobody_reads_on(db: Path) -> None:
    batch = [(key, (1, bytes(100))) for key in range(1, 5000)]
    verbs.write(db, [batch])
    with subprocess.Popen(
        [*COMMAND, "dump", str(db)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        assert process.stdout.readline() == f"1 1 {'00' * 100}\n"
        process.stdout.close()
        assert process.stderr.read() == ""
    assert process.returncode == 141


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="a device of Linux")
def test_output_that_cannot_be_written_is_an_error(store: Path) -> None:
    with open("/dev/full", "w") as full:
        done = subprocess.run(
            [*COMMAND, "dump", str(store)],
            stdout=full,
            stderr=subprocess.PIPE,
            text=True,
        )
    assert done.returncode == 2
    assert_one_line(done.stderr)
    assert "No space left" in done.stderr


def status_of(store: Path, command: str, redirection: str) -> int:
    """Run a command in a shell, where streams can be closed."""
    line = f'exec "$0" -m metastore {command} {redirection}'
    return subprocess.run(
        ["sh", "-c", line, sys.executable, str(store)],
        stdout=subprocess.DEVNULL,
        check=False,
    ).returncode


@pytest.mark.parametrize(
    ("command", "redirection"),
    [("info", ">&-"), ("verify", "2>&-"), ("dump", "<&- >&- 2>&-")],
)
def test_a_closed_stream_is_no_damage(
    command: str, redirection: str, store: Path
) -> None:
    """Where Python has None for a stream the command ended in a traceback, status 1."""
    assert status_of(store, f'{command} "$1"', redirection) == 0
    assert status_of(store, f'{command} "$1/missing"', redirection) == 2


def test_damage_is_told_where_every_stream_is_closed(store: Path) -> None:
    damaged(store)
    assert status_of(store, 'verify "$1"', "<&- >&- 2>&-") == 1


@pytest.mark.parametrize(("name", "status"), [("missing", 2), ("", 1)])
def test_the_status_is_told_where_nobody_reads_the_errors(
    name: str, status: int, store: Path
) -> None:
    """The complaint itself failed, and Python made that status 1, or 120."""
    damaged(store)
    reading, writing = os.pipe()
    os.close(reading)
    done = subprocess.run(
        [*COMMAND, "verify", str(store / name)],
        stdout=subprocess.DEVNULL,
        stderr=writing,
        check=False,
    )
    os.close(writing)
    assert done.returncode == status


# They only look


def sound(path: Path) -> None:
    """Nothing to add."""


def damaged(path: Path) -> None:
    verbs.flip(verbs.logs(path)[0], HEADER_SIZE + 60)


def torn(path: Path) -> None:
    verbs.append(verbs.logs(path)[-1], b"torn")


def littered(path: Path) -> None:
    (path / "log_00000000000000ff.tmp").write_bytes(b"left over")
    (path / "other").mkdir()
    (path / "other" / "file").write_bytes(b"not ours")
    (path / "DO_NOT_PUT_YOUR_FILES_HERE").unlink()


@pytest.mark.parametrize("state", [sound, damaged, torn, littered])
@pytest.mark.parametrize("command", ["info", "verify", "dump"])
def test_nothing_changes_on_disk(
    command: str, state: Callable[[Path], None], store: Path, run: Run
) -> None:
    state(store)
    before = fingerprint(store)
    run(command, store)
    assert fingerprint(store) == before


@contextlib.contextmanager
def read_only(path: Path) -> Iterator[None]:
    """Make a directory read-only, which stops all but root."""
    path.chmod(0o555)
    try:
        yield
    finally:
        path.chmod(0o755)


def test_a_read_only_directory_and_a_held_lock_are_no_obstacle(
    store: Path, run: Run
) -> None:
    """The holder has made its next log by then: it could not, for all but root."""
    holder, _ = MetadataStore.recover(store)
    holder._engine._compactor.wait_idle()
    with holder, read_only(store):
        for command in ("info", "verify", "dump"):
            assert run(command, store)[0] == 0


def test_a_look_does_not_keep_a_store_from_opening(store: Path) -> None:
    with look.open_store(str(store)) as directory:
        look.overview(directory)
        look.inspection(directory, 1, lambda done, total: None)
        holder, _ = MetadataStore.recover(store)
        holder.shutdown()


def test_a_live_store_that_compacts_all_the_time(db: Path, run: Run) -> None:
    """Looked at 15 times, and until something was compacted.

    While commits come a compaction rests: on a fast machine 15 looks were over before
    the first had ended, and the test failed in one run of five.
    """
    deadline = time.monotonic() + 60
    stop = threading.Event()
    store, _ = MetadataStore.recover(db, log_size_bytes_min=1000)
    rng = random.Random(5)

    def write() -> None:
        while not stop.is_set():
            store.insert_batch([(rng.randrange(100), (1, bytes(rng.randrange(300))))])

    writer = threading.Thread(target=write)
    with store:
        writer.start()
        try:
            for n_looks in itertools.count(1):
                for command in ("info", "verify", "dump"):
                    status, _, errors = run(command, db)
                    # So busy a store may be too fast to be looked at, and no worse.
                    assert status == 0 or "try again" in errors, errors
                is_compacted = store.stats().n_compactions > 0
                if n_looks >= 15 and (is_compacted or time.monotonic() > deadline):
                    break
        finally:
            stop.set()
            writer.join()
        assert store.stats().n_compactions > 0
        assert run("verify", db)[0] == 0


@dataclasses.dataclass(frozen=True)
class Seen:
    """A look that has this to say."""

    damage: MetastoreError | None


def gone() -> Seen:
    raise FileNotFoundError("compacted away")


def looks(*found: Callable[[], Seen]) -> Callable[[Directory], Seen]:
    remaining = iter(found)
    return lambda directory: next(remaining)()


def fault(offset: int) -> Callable[[], Seen]:
    return lambda: Seen(CorruptionError("log", offset, "half of it is there"))


def fine() -> Seen:
    return Seen(None)


@pytest.fixture
def directory(tmp_path: Path) -> Iterator[Directory]:
    with contextlib.closing(Directory.open_existing(str(tmp_path))) as opened:
        yield opened


def test_a_look_is_taken_again_until_it_is_steady(directory: Directory) -> None:
    assert look.until_steady(directory, looks(gone, gone, fine)).damage is None
    found = look.until_steady(directory, looks(fault(1), fault(2), fine))
    assert found.damage is None
    found = look.until_steady(directory, looks(fault(1), gone, fault(2), fault(2)))
    assert isinstance(found.damage, CorruptionError)
    assert found.damage.offset == 2


@pytest.mark.parametrize("sight", ["gone", "other"])
def test_a_look_that_is_never_steady_is_given_up(
    directory: Directory, sight: str
) -> None:
    seen = [gone if sight == "gone" else fault(i) for i in range(look.LOOKS_MAX)]
    with pytest.raises(MetastoreError, match="try again"):
        look.until_steady(directory, looks(*seen))


def test_another_format_version_is_no_damage(directory: Directory) -> None:
    with pytest.raises(FormatVersionError):
        look.until_steady(
            directory, looks(lambda: Seen(FormatVersionError("log", 2, 0)))
        )


# Usage and errors


@pytest.mark.parametrize("command", ["info", "verify", "dump"])
def test_what_is_no_store_is_an_error(command: str, tmp_path: Path, run: Run) -> None:
    (tmp_path / "file").write_bytes(b"")
    (tmp_path / "log_0000000000000001.bak").write_bytes(b"")
    for path, text in (
        (tmp_path / "missing", "No such file or directory"),
        (tmp_path / "file", "Not a directory"),
        (tmp_path, "no store in this directory"),
    ):
        status, output, errors = run(command, path)
        assert (status, output) == (2, "")
        assert_one_line(errors)
        assert text in errors
        assert str(path) in errors


@pytest.mark.parametrize("command", ["info", "verify", "dump"])
def test_a_newer_format_version_is_an_error(command: str, db: Path, run: Run) -> None:
    verbs.write(db, verbs.numbered(1))
    (log,) = verbs.logs(db)
    verbs.overwrite(log, 8, b"\2")
    checksum = oracle.checksum(log.read_bytes()[:60])
    verbs.overwrite(log, 60, checksum.to_bytes(4, "little"))
    status, output, errors = run(command, db)
    assert (status, output) == (2, "")
    assert_one_line(errors)
    assert "format version 2" in errors


def test_a_new_store_without_batches_is_one(db: Path, run: Run) -> None:
    verbs.write(db, [])
    status, output, _ = run("verify", db)
    assert status == 0
    assert "0 records" in output
    assert run("info", db)[0] == 0
    assert run("dump", db) == (0, "", "")


def test_wrong_usage_is_status_2(capsys: pytest.CaptureFixture[str]) -> None:
    for arguments in (
        [],
        ["bogus"],
        ["info"],
        ["info", "a", "b"],
        ["dump", "--limit", "-1", "db"],
        ["dump", "--limit", "x", "db"],
        ["dump", "--limit", "99999999999999999999", "db"],
        ["demo", "--threads", "0"],
        ["demo", "--kills", "-1"],
    ):
        with pytest.raises(SystemExit) as ended:
            cli.main(arguments)
        assert ended.value.code == 2
        assert "usage: metastore" in capsys.readouterr().err


@pytest.mark.parametrize("command", ["info", "verify", "dump", "demo"])
def test_help_has_examples_and_exit_status(
    command: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        cli.main([command, "--help"])
    assert ended.value.code == 0
    text = capsys.readouterr().out
    assert f"metastore {command}" in text.split("examples:")[1]
    assert "exit status:" in text
    assert max(map(len, text.splitlines())) <= 88


@pytest.mark.parametrize(
    ("error", "status", "text"),
    [
        (KeyboardInterrupt(), 130, ""),
        (BrokenPipeError(), 141, ""),
        (MemoryError(), 2, "metastore: not enough memory\n"),
        (OSError(5, "Input/output error", b"\xff"), 2, None),
        (OSError("no number"), 2, "metastore: no number\n"),
        (CorruptionError("log\n", 8, "bad"), 1, "metastore: bad (log\\n, offset 8)\n"),
    ],
)
def test_every_error_has_its_status(
    error: BaseException,
    status: int,
    text: str | None,
    db: Path,
    run: Run,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def fail(arguments: argparse.Namespace) -> int:
        raise error

    monkeypatch.setattr(cli, "_info", fail)
    found, output, errors = run("info", db)
    assert (found, output) == (status, "")
    assert errors == text or (text is None and "Input/output error" in errors)


def test_names_that_no_terminal_can_show_are_escaped(store: Path) -> None:
    with open(os.path.join(os.fsencode(store), b"evil\xff\n\x1b[2J"), "wb"):
        pass
    environment = {**os.environ, "PYTHONIOENCODING": "ascii"}
    for arguments in (["info"], ["verify"], ["verify", "--json"]):
        done = subprocess.run(
            [*COMMAND, *arguments, str(store)],
            capture_output=True,
            text=True,
            env=environment,
        )
        assert (done.returncode, done.stderr) == (0, "")
        assert "\x1b" not in done.stdout
        assert "evil\\udcff\\n\\" in done.stdout


def test_an_error_that_names_a_descriptor_is_told_in_one_line() -> None:
    """``os.scandir`` of a descriptor gives its number as the name of the file."""
    error = OSError(errno.EIO, "planted", 3)
    assert cli._text(error) == "planted"
    assert cli._text(OSError(errno.EIO, "planted", b"db")) == "planted (db)"
