"""The face, part one: recover and what it returns."""

from __future__ import annotations

import gc
import os
import threading
from pathlib import Path

import numpy as np
import pytest

import metastore
from metastore import MetadataStore
from metastore.errors import StoreClosedError
from verbs import (
    Batch,
    batches_in,
    content,
    files,
    flip,
    logs,
    numbered,
    overwrite,
    read,
    snapshots,
    states,
    write,
    write_open,
)
from verbs import run as run_child

SOME: Batch = [
    (7, (4096, b"heap-0")),
    (2**64 - 1, (2**64 - 1, b"")),
    (0, (1, b"\x00" * 5)),
    (9, (3, b"nine")),
]
SORTED = [
    (0, 1, b"\x00" * 5),
    (7, 4096, b"heap-0"),
    (9, 3, b"nine"),
    (2**64 - 1, 2**64 - 1, b""),
]


# recover


def test_recover_creates_the_directory(db, recover):
    _, recovered = recover()
    assert db.is_dir()
    assert list(recovered) == []
    assert (db / "DO_NOT_PUT_YOUR_FILES_HERE").is_file()


def test_recover_creates_missing_parents(tmp_path, recover):
    store, _ = recover(tmp_path / "a" / "b" / "c")
    store.insert_batch(SOME)
    store.shutdown()
    assert list(recover(tmp_path / "a" / "b" / "c")[1]) == SORTED


@pytest.mark.parametrize("kind", [str, Path])
def test_recover_takes_text_and_paths(db, kind):
    write(kind(db), [SOME])
    assert read(kind(db)) == content(SORTED)


def test_recover_takes_a_relative_path(tmp_path, monkeypatch, recover):
    monkeypatch.chdir(tmp_path)
    store, _ = recover("db")
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    store.insert_batch(SOME)
    store.compact()
    store.shutdown()
    assert read(tmp_path / "db") == content(SORTED)
    assert files(tmp_path / "elsewhere") == {}


def test_recover_follows_a_link_to_the_directory(tmp_path, db, recover):
    write(db, [SOME])
    (tmp_path / "link").symlink_to(db)
    assert list(recover(tmp_path / "link")[1]) == SORTED


def test_the_store_follows_its_directory_when_that_is_renamed(tmp_path, db, recover):
    store, _ = recover()
    db.rename(tmp_path / "renamed")
    store.insert_batch(SOME)
    store.compact()
    store.shutdown()
    assert read(tmp_path / "renamed") == content(SORTED)
    assert not db.exists()


def test_every_public_name_is_exported():
    assert {"MetadataStore", "Recovered", "RecoveryReport", "StoreStats"} <= set(
        metastore.__all__
    )
    for name in metastore.__all__:
        assert getattr(metastore, name) is not None


# report


def test_the_report_of_a_new_store(db, recover):
    _, recovered = recover()
    report = recovered.report
    assert report.n_batches == 0
    assert report.n_records == 0
    assert report.path == str(db)
    assert report.snapshot is None
    assert report.logs == ()
    assert report.sequence == 0
    assert report.unknown == report.quarantined == report.removed == ()
    assert report.bytes_dropped == 0
    assert report.damage is None
    assert report.is_clean
    assert report.seconds >= 0


def test_the_report_counts_what_was_read(db, recover):
    store, _ = recover()
    for batch in numbered(3):
        store.insert_batch(batch)
    store.compact()
    store.shutdown()
    write(db, numbered(5, 4))
    report = recover()[1].report
    assert report.snapshot == snapshots(db)[0].name
    assert logs(db)[0].name in report.logs
    assert report.n_batches == 5
    assert report.n_frames >= 5 + 1
    assert report.n_records == len(states(numbered(8))[-1])
    assert report.sequence == 8
    assert report.bytes_read > 0
    assert report.is_clean
    with pytest.raises(AttributeError):
        report.n_batches = 1


def test_the_report_can_be_read_by_a_person(db, recover):
    write(db, numbered(5))
    text = str(recover()[1].report)
    n_records = len(states(numbered(5))[-1])
    assert f"recovered {n_records} records up to batch 5" in text
    assert str(db) in text
    assert "5 batches replayed" in text
    assert "torn" not in text
    assert "quarantine" not in text


def test_the_report_tells_of_a_torn_tail(db, recover):
    write_open(db, numbered(5))
    (log,) = logs(db)
    last = batches_in(log.read_bytes())[-1]
    overwrite(log, last.end - 16, b"\xff" * 8)
    report = recover()[1].report
    assert report.sequence == 4
    assert last.size - 8 < report.bytes_dropped <= last.size  # padding or not
    assert not report.is_clean
    assert report.damage is None
    assert len(report.quarantined) == 1
    assert (db / "quarantine" / os.path.basename(report.quarantined[0])).is_file()
    assert "torn tail" in str(report)
    assert f"{report.bytes_dropped:,} bytes" in str(report)


def test_the_report_tells_of_damage(db, recover):
    write_open(db, numbered(5))
    (log,) = logs(db)
    third = batches_in(log.read_bytes())[2]
    flip(log, third.offset + 50)
    report = recover(on_damage="prefix")[1].report
    assert report.sequence == 2
    assert not report.is_clean
    assert log.name in report.damage
    assert report.quarantined
    assert report.damage in str(report)


def test_the_report_lists_unknown_names(db, recover):
    write(db, numbered(1))
    (db / "log.txt").write_text("mine")
    (db / "folder").mkdir()
    report = recover()[1].report
    assert sorted(report.unknown) == ["folder", "log.txt"]
    assert "log.txt" in str(report)


def test_opening_an_unchanged_store_writes_no_snapshot(db, recover):
    write(db, numbered(4))
    store, _ = recover()
    store.compact()
    store.shutdown()
    (snapshot,) = snapshots(db)
    before = (
        snapshot.read_bytes(),
        snapshot.stat().st_ino,
        snapshot.stat().st_mtime_ns,
    )
    for _ in range(3):
        assert read(db) == states(numbered(4))[-1]
        (snapshot,) = snapshots(db)
        status = snapshot.stat()
        assert before == (snapshot.read_bytes(), status.st_ino, status.st_mtime_ns)


def test_opening_a_store_again_and_again_does_not_gather_files(db):
    write(db, numbered(3))
    read(db)
    count = len(list(db.iterdir()))
    for _ in range(5):
        assert read(db) == states(numbered(3))[-1]
    assert len(list(db.iterdir())) == count


# options


def test_threads_do_not_change_the_result(db, recover):
    store, _ = recover(threads=2)
    keys = np.arange(1, 200_001, dtype=np.uint64)
    store.insert_arrays(keys, keys * np.uint64(3), None, None)
    store.compact()
    store.shutdown()
    for threads in (1, 2, 5):
        store, recovered = recover(threads=threads)
        store.shutdown()
        assert np.array_equal(recovered.keys, keys)
        assert np.array_equal(recovered.values, keys * np.uint64(3))
        assert not recovered.offsets.any()


def test_progress_climbs_to_the_whole(db, recover):
    write(db, numbered(20))
    store, _ = recover()
    store.compact()
    store.insert_batch(SOME)
    store.shutdown()
    calls = []
    recover(progress=lambda done, total: calls.append((done, total)))
    assert calls
    assert all(type(done) is int and type(total) is int for done, total in calls)
    assert all(0 <= done <= total for done, total in calls)
    assert [done for done, _ in calls] == sorted(done for done, _ in calls)
    assert len({total for _, total in calls}) == 1
    assert calls[-1][0] == calls[-1][1] > 0


def test_an_error_in_progress_ends_recover_and_frees_the_lock(db, recover):
    write(db, numbered(3))

    def stop(done: int, total: int) -> None:
        raise KeyboardInterrupt

    before = files(db)
    with pytest.raises(KeyboardInterrupt):
        recover(progress=stop)
    assert files(db) == before
    assert read(db) == states(numbered(3))[-1]


@pytest.mark.parametrize("level", [1, 9, -3])
def test_compression_level(db, recover, level):
    data = bytes(range(256)) * 40
    store, _ = recover(compression_level=level)
    store.insert_batch([(key, (key, data)) for key in range(1, 30)])
    store.compact()
    store.shutdown()
    assert snapshots(db)[0].stat().st_size < 29 * len(data) // 2
    assert read(db) == {key: (key, data) for key in range(1, 30)}


def test_a_log_rotates_when_it_passes_log_size_bytes_min(db, recover):
    store, _ = recover(log_size_bytes_min=1)
    batches = []
    while store.stats().n_rotations < 5:  # once a compaction, however long it takes
        batches.append([(len(batches), (len(batches) + 1, bytes(5_000)))])
        store.insert_batch(batches[-1])
        store._engine._compactor.wait_idle()
    batches.append([(len(batches), (1, b"in the active log"))])
    store.insert_batch(batches[-1])
    store.shutdown()
    assert int(logs(db)[-1].name[-16:], 16) >= 5
    assert read(db) == states(batches)[-1]


def test_a_big_log_size_bytes_min_keeps_one_log(db, recover):
    store, _ = recover(log_size_bytes_min=1 << 40)
    for batch in numbered(50):
        store.insert_batch([*batch, (10**6, (1, b"x" * 5000))])
    assert len(logs(db)) == 1
    assert snapshots(db) == []
    store.shutdown()


# stats, shutdown


def test_stats_are_a_dataclass_that_follows_the_store(recover):
    store, _ = recover()
    before = store.stats()
    assert isinstance(before, metastore.StoreStats)
    assert (before.sequence, before.n_batches, before.snapshot_number) == (0, 0, 0)
    for batch in numbered(3):
        store.insert_batch(batch)
    store.insert_batch([(1, None)], sync=False)
    after = store.stats()
    assert (after.sequence, after.sequence_durable, after.n_batches) == (4, 3, 4)
    assert after.log_size > before.log_size
    assert 0 < after.n_syncs <= after.n_writes
    assert after.failure is None
    store.sync()
    assert store.stats().sequence_durable == 4
    store.compact()
    compacted = store.stats()
    assert compacted.snapshot_size > 0
    assert compacted.snapshot_number >= 1
    assert compacted.log_number > after.log_number
    assert compacted.n_compactions == 1
    assert (compacted.n_logs_sealed, compacted.logs_sealed_size) == (0, 0)
    with pytest.raises(AttributeError):
        after.sequence = 1
    store.shutdown()
    assert store.stats().sequence == 4


def test_shutdown_is_idempotent(db, recover):
    store, _ = recover()
    store.insert_batch(SOME)
    store.shutdown()
    before = files(db)
    store.shutdown()
    store.shutdown()
    assert files(db) == before
    assert read(db) == content(SORTED)


def test_a_store_is_a_context_manager(db):
    store, _ = MetadataStore.recover(db)
    with store as same:
        assert same is store
        store.insert_batch(SOME)
    with pytest.raises(StoreClosedError):
        store.insert_batch(SOME)
    assert read(db) == content(SORTED)


def test_the_context_manager_lets_errors_through_and_shuts_down(db):
    def fail() -> None:
        with MetadataStore.recover(db)[0] as store:
            store.insert_batch(SOME)
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()
    assert read(db) == content(SORTED)


def test_a_store_that_was_shut_down_refuses(recover):
    store, _ = recover()
    store.shutdown()
    keys = np.ones(1, np.uint64)
    for refused in (
        lambda: store.insert_batch(SOME),
        lambda: store.insert_batch([]),
        lambda: store.insert_arrays(keys, keys, None, None),
        store.sync,
        store.compact,
    ):
        with pytest.raises(StoreClosedError, match="shut down"):
            refused()


def test_shutdown_gives_threads_and_descriptors_back(db):
    def held() -> tuple[int, int]:
        return len(os.listdir("/proc/self/fd")), threading.active_count()

    write(db, numbered(1))  # whatever is opened once per process is open now
    gc.collect()  # and what other tests have left is closed
    before = held()
    write(db, numbered(20), log_size_bytes_min=1, threads=2)
    gc.collect()  # maps live as long as what refers to them
    assert held() == before


def test_a_forgotten_store_warns_and_lets_go(db):
    def forget() -> None:
        store, _ = MetadataStore.recover(db)
        store.insert_batch(SOME)
        del store
        gc.collect()

    with pytest.warns(ResourceWarning, match="shut down"):
        forget()
    assert read(db) == content(SORTED)


def test_a_store_that_was_shut_down_does_not_warn(db):
    store, _ = MetadataStore.recover(db)
    store.shutdown()
    del store
    gc.collect()  # filterwarnings = error


def test_a_store_open_at_the_end_of_the_interpreter_loses_nothing(db):
    done = run_child(
        """
        import sys
        from metastore import MetadataStore
        store, _ = MetadataStore.recover(sys.argv[1])
        store.insert_batch([(7, (4096, b"heap-0"))])
        store.insert_batch([(8, (4096, b"heap-1"))], sync=False)
        """,
        db,
    )
    assert done.returncode == 0, done.stderr
    assert "Traceback" not in done.stderr
    assert read(db) == {7: (4096, b"heap-0"), 8: (4096, b"heap-1")}
