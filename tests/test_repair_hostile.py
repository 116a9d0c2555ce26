"""Repair among hostile names, forged frames, strangers' files and other processes.

Each test tells what a review of the repair found.
"""

from __future__ import annotations

import errno
import json
import os
import struct
from collections.abc import Callable
from pathlib import Path

import pytest

import oracle
import verbs
from metastore import MetadataStore, repair, salvage
from metastore.columns import Columns
from metastore.directory import DirectoryProtocol, File, FileName
from metastore.errors import CorruptionError, MetastoreError

Run = Callable[..., tuple[int, str, str]]

# The destination


@pytest.fixture
def two_stores(tmp_path: Path) -> tuple[Path, Path]:
    """One of 3 batches, and another of 5."""
    verbs.write(tmp_path / "a", verbs.numbered(3))
    verbs.write(tmp_path / "b", verbs.numbered(5))
    return tmp_path / "a", tmp_path / "b"


def test_two_repairs_do_not_share_a_destination(
    two_stores: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What ended between the look at the destination and its lock was overwritten."""
    first, second = two_stores
    read_headers = repair.read_headers

    def read_headers_late(*arguments: object) -> object:
        monkeypatch.setattr(repair, "read_headers", read_headers)
        repair.repair(first, tmp_path / "new")
        verbs.write(tmp_path / "new", verbs.numbered(1, 4))
        return read_headers(*arguments)

    monkeypatch.setattr(repair, "read_headers", read_headers_late)
    with pytest.raises(MetastoreError, match="not empty"):
        repair.repair(second, tmp_path / "new")
    assert verbs.read(tmp_path / "new") == verbs.states(verbs.numbered(4))[-1]
    copy = tmp_path / "new" / "quarantine" / "original"
    assert verbs.files(copy) == verbs.files(first)


def test_the_destination_does_not_open_before_it_was_read_back(
    db: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A kill while the result was read left a store that opened all the same."""
    verbs.write(db, verbs.numbered(3))
    check = repair._check_result
    seen = []

    def look_and_check(*arguments: object) -> None:
        seen.append(verbs.files(tmp_path / "new"))
        check(*arguments)

    monkeypatch.setattr(repair, "_check_result", look_and_check)
    repair.repair(db, tmp_path / "new")
    verbs.put(tmp_path / "killed", seen[0])
    with pytest.raises(CorruptionError):
        MetadataStore.recover(tmp_path / "killed")


def test_other_records_than_those_written_are_no_result(
    db: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is read back is compared, record by record."""
    verbs.write(db, verbs.numbered(3))
    write = repair._write

    def write_less(new: DirectoryProtocol, columns: Columns, last: int) -> FileName:
        return write(new, columns.part(0, len(columns) - 1), last)

    monkeypatch.setattr(repair, "_write", write_less)
    with pytest.raises(CorruptionError, match="read back"):
        repair.repair(db, tmp_path / "new")
    with pytest.raises(CorruptionError):
        MetadataStore.recover(tmp_path / "new")


# Strangers' files


def test_the_user_s_store_beside_more_files_of_another_is_no_complete_result(
    tmp_path: Path, run: Run
) -> None:
    """One log beside three stray ones: the strays were saved, "nothing missing"."""
    mine, other = tmp_path / "mine", tmp_path / "other"
    verbs.write(mine, verbs.numbered(4))
    for number in range(1, 4):
        verbs.write_open(other, verbs.numbered(1, number))
    (own,) = verbs.logs(mine)
    for number, log in enumerate(verbs.logs(other), 16):
        (mine / f"log_{number:016x}").write_bytes(log.read_bytes())
    chosen, left = (
        verbs.logs(path)[0].read_bytes()[16:32].hex() for path in (other, mine)
    )
    status, output, _ = run("repair", mine, tmp_path / "new")
    assert status == 1
    assert f"files used: of store {chosen}\n" in output
    assert f"{own.name}  {own.stat().st_size:,} bytes, of another store, {left}" in (
        output
    )
    assert "NOT USED: 1 of the files above" in output
    assert "nothing is known to be missing" not in output
    status, output, _ = run("repair", "--json", mine, tmp_path / "newer")
    report = json.loads(output)
    assert status == 1
    assert (report["store_id"], report["n_foreign"]) == (chosen, 1)
    assert report["is_complete"] is False


# Forged frames


def forged(path: Path, *sequences: int) -> Path:
    """Three batches; the header of 2 is damaged, 3 and more have these sequences."""
    store_id = bytes(range(16))
    data = oracle.write_log(store_id, 1, 1, [[(1, 1, b"")], [(2, 2, b"")]])
    at = oracle.frame_offsets(data)[1]
    data = oracle.flip_bit(data[: oracle.frame_offsets(data)[2]], at + 20)
    seed = oracle.file_seed(data)
    for sequence in sequences:
        payload = oracle.pack_plain([(77, 5, b"forged")])
        data += oracle.pack_frame(
            seed, oracle.BATCH, payload, sequence=sequence, durable=2
        )
    verbs.put(path, {oracle.file_name("log", 1): data})
    return path


LAST = oracle.SEQUENCE_MAX
FORGED = [[2**64 - 1], [LAST + 6], [LAST + 1], [LAST], [LAST, LAST + 1]]


@pytest.mark.parametrize("sequences", FORGED)
def test_a_sequence_that_no_batch_can_have_is_no_batch(
    sequences: list[int], db: Path, tmp_path: Path, run: Run
) -> None:
    """Repair and verify ended in OverflowError, or the result was one that is refused.

    With the last sequence of all the repair ended well, and no store opened.
    """
    assert run("verify", forged(db, *sequences))[0] == 1
    status, output, _ = run("repair", db, tmp_path / "new")
    assert status == 1
    assert "not saved" in output
    assert verbs.read(tmp_path / "new") == {1: (1, b"")}


@pytest.mark.parametrize("sequences", FORGED)
def test_such_a_sequence_does_not_tell_where_a_log_without_header_begins(
    sequences: list[int], db: Path, tmp_path: Path
) -> None:
    """The first frame is all that says which batch the first one is."""
    store_id = bytes(range(16))
    second = oracle.write_log(store_id, 2, 2, [])[:64]
    for sequence in (*sequences, 2):
        payload = oracle.pack_plain([(sequence % 100, 5, b"")])
        seed = oracle.file_seed(second)
        second += oracle.pack_frame(seed, oracle.BATCH, payload, sequence=sequence)
    first = oracle.write_log(store_id, 1, 1, [[(1, 1, b"")]])
    names = [oracle.file_name("log", number) for number in (1, 2)]
    verbs.put(db, {names[0]: first, names[1]: bytes(64) + second[64:]})
    report = repair.repair(db, tmp_path / "new")
    assert report.sequence == 2
    assert verbs.read(tmp_path / "new") == {1: (1, b""), 2: (5, b"")}


def test_the_last_batch_behind_which_a_store_goes_on_is_saved(
    db: Path, tmp_path: Path
) -> None:
    """What may not be believed begins one further."""
    report = repair.repair(forged(db, LAST - 1, LAST), tmp_path / "new")
    assert report.sequence == LAST - 1
    assert verbs.read(tmp_path / "new") == {1: (1, b""), 77: (5, b"forged")}


@pytest.mark.parametrize("is_damaged", [False, True])
def test_a_snapshot_with_the_last_sequence_is_saved_into_a_store_that_opens(
    is_damaged: bool, db: Path, tmp_path: Path, run: Run
) -> None:
    """Verify called it sound, recovery refused it, and so it did what repair made."""
    data = oracle.write_snapshot(bytes(range(16)), 1, LAST, [[(1, 1, b"")]])
    if is_damaged:
        data = oracle.flip_bit(data, 20)
    verbs.put(db, {oracle.file_name("snapshot", 1): data})
    status, output, errors = run("verify", "--json", db)
    assert status == 1
    assert json.loads(output)["sound"] is False
    assert is_damaged or "sequences are used up" in errors
    with pytest.raises(CorruptionError):
        MetadataStore.recover(db)
    repair.repair(db, tmp_path / "new")
    assert verbs.read(tmp_path / "new") == {1: (1, b"")}
    assert run("verify", tmp_path / "new")[0] == 0


def test_verify_refuses_where_file_numbers_are_used_up(db: Path, run: Run) -> None:
    """Recovery refuses such a store, and verify called it sound."""
    number = oracle.NUMBER_MAX
    data = oracle.write_log(bytes(range(16)), number, 1, [[(1, 1, b"")]])
    verbs.put(db, {oracle.file_name("log", number): data})
    with pytest.raises(CorruptionError, match="used up"):
        MetadataStore.recover(db)
    status, output, errors = run("verify", db)
    assert status == 1
    assert "recovery refuses this store" in output
    assert "file numbers are used up" in errors


# Names


@pytest.mark.parametrize("end", ["\n", "\r", "\x0b", "\x85", "\u2028"])
def test_a_name_forges_no_line_of_the_report(
    end: str, db: Path, tmp_path: Path, run: Run
) -> None:
    """A link called like the report's last lines made a repair look complete."""
    verbs.write(db, verbs.numbered(2))
    verbs.logs(db)[0].write_bytes(bytes(200))
    lines = "nothing is known to be missing", "  saved: everything"
    (db / end.join(["x", *lines])).symlink_to("nowhere")
    status, output, _ = run("repair", db, tmp_path / f"new{end}{lines[0]}")
    assert status == 1
    assert not set(lines) & set(output.splitlines())
    assert ascii(end)[1:-1] + lines[0] in output


def test_names_that_are_no_text_are_told(db: Path, tmp_path: Path) -> None:
    """The report of a name that is not UTF-8 could not be written to a file."""
    verbs.write(db, verbs.numbered(2))
    for folder in (db, db / "quarantine"):
        folder.mkdir(exist_ok=True)
        os.symlink("nowhere", os.fsencode(folder) + b"/\xff")
    report = repair.repair(db, tmp_path / os.fsdecode(b"new\xfe"))
    text = str(report).encode()
    assert rb" or the like: \udcff, quarantine/\udcff" in text
    assert rb"new\udcfe" in text


def test_a_file_that_cannot_be_read_is_told_in_one_line(
    db: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The names of files are as little to be trusted as those of links."""
    verbs.write(db, verbs.numbered(2))
    (db / "x\nmissing: nothing").write_bytes(b"data")
    read = File.read

    def read_or_fail(file: File, offset: int, size: int) -> bytes:
        if file.path.endswith("nothing") and size:
            raise OSError(errno.EIO, os.strerror(errno.EIO), file.path)
        return read(file, offset, size)

    monkeypatch.setattr(File, "read", read_or_fail)
    report = repair.repair(db, tmp_path / "new")
    assert "  x\\nmissing: nothing: 4 bytes at offset 0" in str(report)


def dangling(path: Path, new: Path) -> None:
    path.symlink_to("nowhere")


def to_the_destination(path: Path, new: Path) -> None:
    new.mkdir()
    path.symlink_to(new)


def to_other_files(path: Path, new: Path) -> None:
    other = new.with_name("other")
    other.mkdir()
    (other / "secret").write_bytes(b"not the store's")
    path.symlink_to(other)


def fifo(path: Path, new: Path) -> None:
    os.mkfifo(path)


def file(path: Path, new: Path) -> None:
    path.write_bytes(b"no directory")


@pytest.mark.parametrize(
    "make", [dangling, to_the_destination, to_other_files, fifo, file]
)
def test_a_quarantine_that_is_no_directory_is_not_followed(
    make: Callable[[Path, Path], None], db: Path, tmp_path: Path, run: Run
) -> None:
    """A link was followed, into DEST as well; any but a directory ended the repair."""
    verbs.write(db, verbs.numbered(3))
    new = tmp_path / "new"
    make(db / "quarantine", new)
    for command in ("info", "verify"):
        status, output, errors = run(command, db)
        assert (status, errors) == (0, "")
        assert "quarantine  " not in output
    report = repair.repair(db, new)
    assert report.is_complete
    assert verbs.read(new) == verbs.states(verbs.numbered(3))[-1]
    copy = verbs.files(new / report.original)
    if make is file:
        assert copy["quarantine"] == b"no directory"
    else:
        assert report.not_copied == ("quarantine",)
        assert "quarantine" not in copy


# Time


def test_headers_that_claim_much_cost_no_more_than_some_passes(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Each of many made-up headers had half the file checksummed: minutes for 8 MiB."""
    size = 1 << 17
    frame_header = struct.Struct("<IBBHQQIIQQ")
    # From kind to user data size: a batch, plain, with half the file for its payload.
    head = frame_header.pack(7, 1, 0, 0, 1, 0, 1, 0x1234, size // 2, 0)
    data = bytes(64) + head * ((size - 64) // len(head))
    checksummed = 0
    crc32c = salvage._codec.crc32c

    def count(data: bytes, seed: int = 0) -> int:
        nonlocal checksummed
        checksummed += len(data)
        return crc32c(data, seed)

    monkeypatch.setattr(salvage._codec, "crc32c", count)
    log = FileName("log", 1)
    assert (
        salvage.find_store_seed([salvage.Evidence.of(log, memoryview(data), "made up")])
        is None
    )
    assert size < checksummed <= 17 * size
