"""The face, part two: insert_batch, insert_arrays, sync, compact."""

from __future__ import annotations

import threading

import numpy as np
import pytest

import metastore.engine
from disk import Disk, Operation
from metastore import MetadataStore
from verbs import (
    apply,
    content,
    files,
    logs,
    numbered,
    read,
    read_image,
    recover_on,
    snapshots,
    spans,
    states,
    write,
)


def u64(*numbers: int) -> np.ndarray:
    return np.array(numbers, np.uint64)


def u8(data: bytes) -> np.ndarray:
    return np.frombuffer(data, np.uint8)


# insert_batch


def test_sequences_count_from_one_without_gaps(db, recover):
    store, _ = recover()
    assert [store.insert_batch([(i, (1, b""))]) for i in range(3)] == [1, 2, 3]
    assert store.insert_arrays(u64(5), u64(5), None, None) == 4
    assert store.insert_batch([(1, None)], sync=False) == 5
    store.compact()
    assert store.insert_batch([(9, (9, b""))]) == 6
    store.shutdown()
    assert write(db, numbered(2)) == [7, 8]
    assert read(db)[0] == (2, b"")


def test_sequences_have_no_gap_across_rotations(db, recover):
    store, _ = recover(log_size_bytes_min=1)
    assert [store.insert_batch(b) for b in numbered(40)] == list(range(1, 41))


def test_a_batch_is_any_iterable(db, recover):
    store, _ = recover()
    store.insert_batch((key, (key, b"")) for key in range(1, 4))
    store.insert_batch({4: (4, b""), 5: (5, b""), 1: None}.items())
    store.insert_batch(iter([(6, (6, b""))]))
    store.insert_batch(((7, (7, b"")),))
    store.shutdown()
    assert read(db) == {key: (key, b"") for key in range(2, 8)}


def test_none_deletes_and_a_missing_key_may_be_deleted(db, recover):
    store, _ = recover()
    store.insert_batch([(1, (1, b"one")), (2, (2, b"two"))])
    store.insert_batch([(1, None), (3, None)])
    store.shutdown()
    assert read(db) == {2: (2, b"two")}


def test_the_last_record_of_a_key_wins_within_a_batch(db, recover):
    store, _ = recover()
    batch = [
        (1, (1, b"first")),
        (2, (2, b"kept")),
        (1, None),
        (3, None),
        (1, (3, b"last")),
        (3, (4, b"came back")),
        (4, (1, b"")),
        (4, None),
    ]
    store.insert_batch(batch)
    store.shutdown()
    assert read(db) == apply({}, batch)
    store, _ = recover()
    store.compact()
    store.shutdown()
    assert read(db) == apply({}, batch)


def test_an_empty_batch_has_a_sequence(db, recover):
    store, _ = recover()
    assert store.insert_batch([]) == 1
    assert store.insert_batch([(1, (1, b""))]) == 2
    assert store.insert_arrays(u64(), u64(), None, None) == 3
    store.shutdown()
    assert read(db) == {1: (1, b"")}


@pytest.mark.parametrize("kind", [bytes, bytearray, memoryview])
def test_user_data_is_bytes_or_what_lies_in_memory_like_them(db, recover, kind):
    store, _ = recover()
    store.insert_batch([(1, (1, kind(b"some data"))), (2, (2, kind(b"")))])
    store.shutdown()
    assert read(db) == {1: (1, b"some data"), 2: (2, b"")}


def test_keys_and_values_may_be_numpy_integers(db, recover):
    store, _ = recover()
    store.insert_batch([(np.uint64(2**64 - 1), (np.int32(5), b""))])
    store.shutdown()
    assert read(db) == {2**64 - 1: (5, b"")}


def test_user_data_of_every_small_size(db, recover):
    batch = [(size, (size + 1, bytes(range(size)))) for size in range(130)]
    store, _ = recover()
    for record in batch:
        store.insert_batch([record])
    store.insert_batch([(key + 1000, new) for key, new in batch])
    store.shutdown()
    both = apply({}, batch) | apply({}, [(key + 1000, new) for key, new in batch])
    assert read(db) == both
    store, _ = recover()
    store.compact()
    store.shutdown()
    assert read(db) == both


def test_a_batch_bigger_than_a_log(db, recover, rng):
    data = rng.randbytes(3 << 20)
    store, _ = recover(log_size_bytes_min=4096)
    store.insert_batch([(1, (1, data)), (2, (2, b"small"))])
    store.insert_batch([(3, (3, data[:100_000]))])
    store.shutdown()
    assert read(db) == {1: (1, data), 2: (2, b"small"), 3: (3, data[:100_000])}


def test_a_batch_can_be_made_while_another_is_inserted(db, recover):
    """Encoding happens outside the locks: a generator may use the store itself."""
    store, _ = recover()

    def records():
        yield 1, (1, b"outer")
        assert store.insert_batch([(2, (2, b"inner"))]) == 1
        yield 3, (3, b"outer")

    assert store.insert_batch(records()) == 2
    store.shutdown()
    assert read(db) == {1: (1, b"outer"), 2: (2, b"inner"), 3: (3, b"outer")}


def test_the_caller_may_change_its_buffers_after_the_return(db, recover):
    store, _ = recover()
    data = bytearray(b"before")
    keys, values = u64(5), u64(6)
    store.insert_batch([(1, (1, data))])
    store.insert_arrays(keys, values, u64(0, 6), np.frombuffer(data, np.uint8))
    keys[0] = values[0] = 99
    data[:] = b"change"
    store.shutdown()
    assert read(db) == {1: (1, b"before"), 5: (6, b"before")}


# insert_arrays


def test_insert_arrays(db, recover):
    store, _ = recover()
    store.insert_batch([(2, (2, b"old")), (4, (4, b"old"))])
    store.insert_arrays(
        u64(3, 1, 2, 4), u64(30, 10, 0, 40), u64(0, 2, 5, 5, 5), u8(b"ccaaa")
    )
    store.shutdown()
    assert read(db) == {3: (30, b"cc"), 1: (10, b"aaa"), 4: (40, b"")}


def test_insert_arrays_without_user_data(db, recover):
    store, _ = recover()
    store.insert_arrays(u64(1, 2), u64(10, 20), None, None)
    store.insert_arrays(u64(2, 3), u64(0, 30), offsets=None, user_data=None)
    store.insert_arrays(u64(4), u64(40))
    store.shutdown()
    assert read(db) == {1: (10, b""), 3: (30, b""), 4: (40, b"")}


def test_the_last_record_of_a_key_wins_within_arrays(db, recover, rng):
    n_records = 5000
    keys = [rng.randrange(400) for _ in range(n_records)]
    values = [rng.randrange(3) for _ in range(n_records)]
    batch = [
        (key, (value, b"%d" % value) if value else None)
        for key, value in zip(keys, values, strict=True)
    ]
    lengths = [1 if value else 0 for value in values]
    store, _ = recover()
    store.insert_arrays(
        u64(*keys),
        u64(*values),
        np.cumsum([0, *lengths]).astype(np.uint64),
        u8(b"".join(b"%d" % value for value in values if value)),
    )
    store.shutdown()
    assert read(db) == apply({}, batch)


def test_what_was_recovered_can_be_inserted_as_it_is(tmp_path, db, recover):
    write(db, numbered(10))
    _, recovered = recover()
    other, _ = recover(tmp_path / "other")
    other.insert_arrays(
        recovered.keys, recovered.values, recovered.offsets, recovered.user_data
    )
    other.shutdown()
    assert read(tmp_path / "other") == content(recovered)


def test_arrays_of_random_keys_come_back_identical(db, recover, rng):
    generator = np.random.default_rng(rng.randrange(2**32))
    n_records = 150_000
    keys = generator.integers(0, 2**64, n_records, np.uint64)
    values = generator.integers(1, 2**40, n_records, np.uint64)
    user_data = generator.integers(0, 256, 8 * n_records, np.uint8)
    offsets = np.arange(0, 8 * n_records + 1, 8, dtype=np.uint64)
    assert len(np.unique(keys)) == n_records
    store, _ = recover()
    store.insert_arrays(keys, values, offsets, user_data)
    store.shutdown()
    order = np.argsort(keys)
    for compacted in (False, True):
        store, recovered = recover()
        if not compacted:
            store.compact()
        store.shutdown()
        assert np.array_equal(recovered.keys, keys[order])
        assert np.array_equal(recovered.values, values[order])
        assert np.array_equal(recovered.offsets, offsets)
        assert np.array_equal(
            recovered.user_data.reshape(-1, 8), user_data.reshape(-1, 8)[order]
        )


def test_batches_that_share_their_memory_are_each_their_own(db, recover, monkeypatch):
    """A frame takes the memory of one that is durable, and of no other."""
    monkeypatch.setattr(metastore.engine, "_SPARE_SIZE_MAX", 30_000)
    store, _ = recover()
    expected = {}

    def insert(start):
        for n in (700, 650, 3, 700, 2000, 690, 1):  # 2,000 are not kept
            keys = np.arange(start, start + n, dtype=np.uint64)
            store.insert_arrays(keys, keys * np.uint64(3) + np.uint64(n))
            expected.update((key, (3 * key + n, b"")) for key in keys.tolist())

    threads = [
        threading.Thread(target=insert, args=(10_000 * start,)) for start in range(1, 5)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    kept = store._engine.take_spare()
    assert kept is not None
    assert len(kept) <= 30_000
    assert store._engine.take_spare() is None
    store.shutdown()
    assert content(recover()[1]) == expected


def test_a_batch_of_more_than_64_mib(db, recover):
    """It is stored plain, whatever packing would save, and read in many windows."""
    n_records = 3_400_000
    keys = np.arange(n_records, dtype=np.uint64)[::-1]
    store, _ = recover()
    store.insert_batch([(1, (7, b"before"))])
    store.insert_arrays(keys, np.ones(n_records, np.uint64))
    store.insert_batch([(2, (7, b"behind"))])
    store.shutdown()
    _, recovered = recover()
    assert np.array_equal(recovered.keys, keys[::-1])
    assert recovered[2] == (2, 7, b"behind")
    assert recovered.values.sum() == n_records + 6


# sync


def watched(kinds: set[str], **options: object) -> tuple[MetadataStore, Disk, list]:
    """A store in memory, and the calls of `kinds` that it makes from now on."""
    disk = Disk()
    calls: list[Operation] = []
    store, _ = recover_on(disk, **options)

    def before(operation: Operation) -> None:
        if operation.kind in kinds:
            calls.append(operation)

    disk.before = before
    return store, disk, calls


def test_sync_false_writes_without_a_sync_and_sync_makes_durable():
    store, disk, calls = watched({"write", "sync"})
    store.insert_batch([(1, (1, b"lazy"))], sync=False)
    store.insert_arrays(u64(2), u64(2), None, None, sync=False)
    assert [call.kind for call in calls] == ["write", "write"]
    assert read_image(disk.live_image()) == {1: (1, b"lazy"), 2: (2, b"")}
    assert read_image(disk.durable_image()) == {}
    store.sync()
    assert [call.kind for call in calls] == ["write", "write", "sync"]
    assert read_image(disk.durable_image()) == {1: (1, b"lazy"), 2: (2, b"")}
    store.sync()
    assert len(calls) == 3, "nothing was left to sync"
    store.shutdown()


def test_a_durable_batch_makes_earlier_ones_durable():
    store, disk, calls = watched({"sync"})
    store.insert_batch([(1, (1, b""))], sync=False)
    store.insert_batch([(2, (2, b""))])
    assert read_image(disk.durable_image()) == {1: (1, b""), 2: (2, b"")}
    store.sync()
    assert len(calls) == 1, "nothing was left to sync"
    store.shutdown()


def test_sync_reaches_batches_before_a_rotation():
    """A rotation between a lazy batch and sync() must not leave the batch behind."""
    store, disk, calls = watched({"rename"}, log_size_bytes_min=1000)
    for batch in numbered(30):
        store.insert_batch(batch, sync=False)
    assert len([call for call in calls if "log" in call.name]) > 1
    store.sync()
    assert read_image(disk.durable_image()) == states(numbered(30))[-1]
    store.shutdown()


def test_shutdown_makes_lazy_batches_durable():
    store, disk, _ = watched(set())
    store.insert_batch([(1, (1, b"lazy"))], sync=False)
    store.shutdown()
    assert read_image(disk.durable_image()) == {1: (1, b"lazy")}


# compact


def test_compact_leaves_one_snapshot_that_holds_everything(db, recover):
    store, _ = recover()
    for batch in numbered(10):
        store.insert_batch(batch)
    store.compact()
    assert len(snapshots(db)) == 1
    assert all(not spans(log.read_bytes()) for log in logs(db))
    store.insert_batch([(500, (1, b"after"))])
    store.shutdown()
    assert read(db) == apply(states(numbered(10))[-1], [(500, (1, b"after"))])


def test_compact_with_nothing_to_do_changes_nothing(db, recover):
    store, _ = recover()
    store.insert_batch([(1, (1, b""))])
    store.compact()
    before = files(db)
    store.compact()
    assert {n: d for n, d in files(db).items() if n.startswith("snapshot")} == {
        n: d for n, d in before.items() if n.startswith("snapshot")
    }


def test_compact_of_an_empty_store(db, recover):
    store, _ = recover()
    store.compact()
    store.insert_batch([(1, (1, b""))])
    store.shutdown()
    assert read(db) == {1: (1, b"")}


def test_a_store_whose_every_key_was_deleted(db, recover):
    store, _ = recover()
    store.insert_batch([(key, (1, b"x")) for key in range(100)])
    store.compact()
    store.insert_batch([(key, None) for key in range(100)])
    store.compact()
    store.shutdown()
    assert read(db) == {}
    assert write(db, [[(1, (1, b""))]]) == [3]


def test_compact_reclaims_what_was_deleted(db, recover, rng):
    store, _ = recover()
    store.insert_batch([(key, (1, rng.randbytes(1000))) for key in range(100)])
    store.compact()
    big = snapshots(db)[0].stat().st_size
    store.insert_batch([(key, None) for key in range(1, 100)])
    store.compact()
    store.shutdown()
    assert snapshots(db)[0].stat().st_size < big // 20
    assert len(read(db)) == 1


def test_rotation_and_compaction_keep_the_directory_small(db, recover):
    store, _ = recover(log_size_bytes_min=1000)
    for number in range(1, 400):
        store.insert_batch([(number % 10, (number, b"data"))])
    store.shutdown()
    assert len(list(db.iterdir())) < 10
    assert len(read(db)) == 10


def test_user_data_bigger_than_a_block(db, recover, rng):
    data = rng.randbytes(5 << 20)
    store, _ = recover()
    store.insert_batch([(2, (2, data)), (1, (1, b"a")), (3, (3, data[:100]))])
    store.compact()
    store.insert_batch([(4, (4, b"d"))])
    store.compact()
    store.shutdown()
    assert read(db) == {1: (1, b"a"), 2: (2, data), 3: (3, data[:100]), 4: (4, b"d")}
