"""The sixteen defects of the ancestor, each as a test that fails on its behaviour.

Numbers and stories are those of the table in docs/design.md; the second half of them is
in test_ancestor_defects_more.py.
"""

from __future__ import annotations

import errno
import os

import pytest

import oracle
from disk import Disk, Fault, Image, Operation
from metastore import MetadataStore
from metastore.errors import CorruptionError
from verbs import (
    append,
    batches_in,
    content,
    files,
    flip,
    logs,
    named,
    numbered,
    open_image,
    overwrite,
    put,
    read,
    read_image,
    recover_on,
    snapshots,
    spans,
    states,
    write,
    write_on,
    write_open,
)


def compact(path, batches=()) -> None:
    store, _ = MetadataStore.recover(path)
    with store:
        for batch in batches:
            store.insert_batch(batch)
        store.compact()


def refuses(path, **options) -> CorruptionError:
    """Recovery must refuse, and change nothing; return what it said."""
    before = files(path)
    with pytest.raises(CorruptionError) as caught:
        MetadataStore.recover(path, **options)
    after = files(path)
    assert {name: after.get(name) for name in before} == before
    return caught.value


def test_01_a_snapshot_without_a_newer_log_survives_being_opened(db):
    """Recovery wrote the snapshot onto its own name, then removed it as the old one.

    A crash inside recovery leaves such a directory; at the second open everything was
    gone.
    """
    expected = states(numbered(7))[-1]
    compact(db, numbered(7))
    (snapshot,) = snapshots(db)
    for log in logs(db):
        log.unlink()
    before = (snapshot.read_bytes(), snapshot.stat().st_ino)
    for _ in range(3):
        assert read(db) == expected
        assert named(db, "snapshot") == [snapshot]
        assert (snapshot.read_bytes(), snapshot.stat().st_ino) == before


def test_02_a_bad_frame_in_the_middle_of_a_log_is_not_its_end(db):
    """``while let Ok(frame)``: a bad frame ended the log in silence.

    What stood behind it was acknowledged, and was then deleted with the log.
    """
    write_open(db, numbered(5))
    (log,) = logs(db)
    third = batches_in(log.read_bytes())[2]
    flip(log, third.offset + 50)
    error = refuses(db)
    assert error.path == str(log)
    assert third.offset <= error.offset < third.end


@pytest.mark.parametrize("kind", ["read", "view", "size", "open"])
def test_02_a_read_error_is_not_the_end_of_a_log(kind):
    """A read that failed looked like the end, and the log was deleted unread."""
    disk = Disk()
    write_on(disk, numbered(5))
    disk = Disk(open_image(disk.live_image(), numbered(5, 6)))
    before = disk.live_image()
    n_calls = 1
    while True:
        disk = Disk(before)
        left = [n_calls]

        def fail(operation: Operation, left: list[int] = left) -> Fault | None:
            left[0] -= operation.kind == kind
            return Fault(errno.EIO) if operation.kind == kind and left[0] == 0 else None

        disk.before = fail
        try:
            recover_on(disk)[0].shutdown()
            numbers = []
        except OSError as error:
            numbers = [error.errno]
        if numbers:
            assert numbers == [errno.EIO]
            assert {name: disk.live_image().get(name) for name in before} == before
        disk.before = None
        assert read_image(disk.live_image()) == states(numbered(10))[-1]
        if left[0] > 0:
            break
        n_calls += 1
    print(f"{n_calls - 1} calls of {kind} failed, one at a time")


def test_02_a_torn_tail_is_reported_and_its_bytes_are_kept(db, recover):
    """The torn tail itself may go, but not unseen: its bytes are kept aside."""
    write_open(db, numbered(5))
    (log,) = logs(db)
    last = batches_in(log.read_bytes())[-1]
    torn = log.read_bytes()[last.offset : last.end - 8]
    overwrite(log, last.end - 8, bytes(8))
    _, recovered = recover()
    assert {key: (value, data) for key, value, data in recovered} == states(
        numbered(4)
    )[-1]
    assert recovered.report.bytes_dropped == last.size - 8
    assert "torn tail" in str(recovered.report)
    kept = files(db)["quarantine"]
    assert any(torn in data for data in kept.values())


def test_02_a_torn_tail_is_dropped_once(db, recover):
    """Once dropped and kept aside it is no news at later opens, nor kept again."""
    write_open(db, numbered(5))
    (log,) = logs(db)
    overwrite(log, batches_in(log.read_bytes())[-1].end - 16, bytes(16))
    read(db)
    kept = files(db)["quarantine"]
    for _ in range(3):
        store, recovered = recover()
        store.shutdown()
        assert recovered.report.is_clean
        assert content(recovered) == states(numbered(4))[-1]
        assert files(db)["quarantine"] == kept


def test_03_damage_in_one_log_with_a_later_log_intact(db):
    """Log 1 ended at its damage, and log 2 was applied over the hole."""
    write(db, numbered(4))
    write(db, numbered(4, 5))
    first, second = logs(db)
    third = batches_in(first.read_bytes())[2]
    flip(first, third.offset + 50)
    error = refuses(db)
    assert error.path == str(first)
    assert third.offset <= error.offset < third.end
    assert second.exists()


def test_03_a_cut_log_with_a_later_log_intact(db):
    """A log that lost its last frames whole looks clean; the next one tells."""
    write(db, numbered(4))
    write(db, numbered(4, 5))
    first, _ = logs(db)
    data = first.read_bytes()
    third = batches_in(data)[2]
    first.write_bytes(data[: third.offset] + bytes(len(data) - third.offset))
    assert refuses(db).path in [str(log) for log in logs(db)]


def test_04_a_missing_log_between_two_others(db):
    """Logs were applied by number, whether or not they joined."""
    for first in (1, 3, 5):
        write(db, numbered(2, first))
    missing = logs(db)[1]
    missing.unlink()
    error = refuses(db)
    assert "sequence" in error.reason or "missing" in error.reason
    assert str(db) in error.path


def test_04_a_missing_first_log(db):
    for first in (1, 3):
        write(db, numbered(2, first))
    logs(db)[0].unlink()
    refuses(db)


def test_04_a_missing_snapshot_under_logs(db):
    """Without its snapshot the store opened with what the logs alone held."""
    compact(db, numbered(4))
    write(db, numbered(2, 5))
    (snapshot,) = snapshots(db)
    snapshot.unlink()
    error = refuses(db)
    assert "sequence" in error.reason or "snapshot" in error.reason


def test_05_every_published_name_is_durable_before_it_is_relied_on():
    """The directory was not synced after a log was created.

    An acknowledged batch lay, synced, in a file whose name a power loss took away. Here
    after every call everything that may be lost is lost.
    """
    disk = Disk()
    acknowledged: list[int] = []
    lost: list[tuple[int, Image]] = []

    def before(operation: Operation) -> None:
        lost.append((len(acknowledged), disk.durable_image()))

    disk.before = before
    store, _ = recover_on(disk, log_size_bytes_min=500)
    for batch in numbered(25):
        acknowledged.append(store.insert_batch(batch))
    store.compact()
    store.shutdown()
    prefixes = states(numbered(25))
    for n_acknowledged, image in lost:
        assert read_image(image) in prefixes[n_acknowledged:]
    print(f"{len(lost)} crash states")


def test_05_the_directory_of_a_new_store_is_durable_in_its_parent(
    tmp_path, monkeypatch, recover
):
    """`recover` creates directories: their names must be durable as well."""
    synced = []
    fsync = os.fsync

    def watch(descriptor: int) -> None:
        synced.append(os.readlink(f"/proc/self/fd/{descriptor}"))
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", watch)
    recover(tmp_path / "a" / "b")
    assert synced.index(str(tmp_path)) < synced.index(str(tmp_path / "a"))
    assert str(tmp_path / "a" / "b") in synced


SIZES = [2**31 - 49, 2**31, 2**32, 2**40, 2**62, 2**63, 2**64 - 48, 2**64 - 1]


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("with_checksum", [True, False], ids=["forged", "plain"])
def test_06_a_frame_length_is_a_claim(db, size, with_checksum):
    """The length was believed: the buffer for it was allocated before any check."""
    write_open(db, numbered(4))
    (log,) = logs(db)
    data = log.read_bytes()
    second = batches_in(data)[1].offset
    data = oracle.set_field(data, second, "payload_size", size)
    if with_checksum:
        data = oracle.fix_frame_checksum(data, second)
    log.write_bytes(data)
    error = refuses(db)
    assert (error.path, error.offset) == (str(log), second)


@pytest.mark.parametrize(
    ("field", "count"),
    [("records", 2**32 - 1), ("user_data_size", 2**40), ("user_data_size", 2**64 - 1)],
)
def test_06_counts_in_a_log_are_claims_too(db, field, count):
    write_open(db, numbered(4))
    (log,) = logs(db)
    data = log.read_bytes()
    second = batches_in(data)[1].offset
    log.write_bytes(oracle.forge(data, second, field, count))
    error = refuses(db)
    assert (error.path, error.offset) == (str(log), second)


@pytest.mark.parametrize(
    ("field", "count"),
    [("records", 2**32 - 1), ("user_data_size", 2**40), ("user_data_size", 2**64 - 1)],
)
@pytest.mark.parametrize("pack", [oracle.pack_plain, oracle.pack_packed])
def test_06_counts_in_a_snapshot_are_claims_too(db, field, count, pack):
    """Block, index and all checksums agree on a size that the file cannot hold."""
    payload = pack([(key, key, b"data") for key in range(1, 9)])
    data = oracle.write_snapshot(b"0123456789abcdef", 3, 5, [payload])
    block, end = spans(data)
    data = oracle.forge(data, block.offset, field, count)
    checksum = oracle.get_field(data, block.offset, "checksum")
    n_records = oracle.get_field(data, block.offset, "records")
    size = oracle.get_field(data, block.offset, "user_data_size")
    index = end.offset + oracle.FRAME_HEADER.size
    data = oracle.put(data, index, oracle.INDEX_HEAD.pack(n_records, size))
    row = oracle.INDEX_BLOCK.pack(block.offset, 1, 8, size, n_records, checksum)
    data = oracle.put(data, index + oracle.INDEX_HEAD.size, row)
    data = oracle.fix_payload_checksum(data, end.offset)
    put(db, {"snapshot_0000000000000003": data})
    error = refuses(db)
    assert error.path == str(snapshots(db)[0])


@pytest.mark.parametrize("size", SIZES)
def test_06_a_trailer_points_where_it_likes(db, size):
    compact(db, numbered(4))
    (snapshot,) = snapshots(db)
    data = snapshot.read_bytes()
    for place in (8, 16):
        forged = oracle.put(data, len(data) - 32 + place, size.to_bytes(8, "little"))
        snapshot.write_bytes(oracle.fix_trailer(forged))
        assert refuses(db).path == str(snapshot)


def test_07_unknown_names_are_left_alone_and_listed(db, recover):
    """``log.txt`` and ``snapshot_zz`` ended the process."""
    write(db, numbered(3))
    unknown = ["log.txt", "snapshot_zz", "log_", "snapshot", "log_-000000000000001"]
    for name in unknown:
        (db / name).write_bytes(b"mine")
    (db / os.fsdecode(b"log_\xff")).write_bytes(b"mine")
    store, recovered = recover()
    assert len(recovered) == len(states(numbered(3))[-1])
    assert set(recovered.report.unknown) == {*unknown, os.fsdecode(b"log_\xff")}
    assert "log.txt" in str(recovered.report)
    store.compact()
    for name in unknown:
        assert (db / name).read_bytes() == b"mine"


def two_snapshots(path) -> tuple[bytes, bytes]:
    """Leave an older and a newer snapshot side by side; return both."""
    compact(path, numbered(3))
    (older,) = snapshots(path)
    data = older.read_bytes()
    compact(path, numbered(3, 4))
    (newer,) = snapshots(path)
    assert older != newer
    older.write_bytes(data)
    return data, newer.read_bytes()


@pytest.mark.parametrize("inside", [False, True], ids=["elsewhere", "inside"])
def test_08_of_two_snapshots_the_newer_is_used(tmp_path, db, monkeypatch, inside):
    """It removed the newer name, and that relative to the working directory."""
    two_snapshots(db)
    newer = snapshots(db)[-1]
    data = newer.read_bytes()
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    (elsewhere / newer.name).write_bytes(b"not ours")
    monkeypatch.chdir(db if inside else elsewhere)
    for _ in range(2):
        assert read(db) == states(numbered(6))[-1]
        assert newer.read_bytes() == data
    assert snapshots(db) == [newer], "the older one is contained in it"
    assert (elsewhere / newer.name).read_bytes() == b"not ours"


def test_08_an_older_snapshot_stays_until_the_newer_is_verified(db):
    two_snapshots(db)
    older, newer = snapshots(db)
    flip(newer, newer.stat().st_size // 2)
    assert refuses(db).path == str(newer)
    assert snapshots(db) == [older, newer]
    append(newer, b"")
    put(db, files(db))
    assert refuses(db).path == str(newer)
