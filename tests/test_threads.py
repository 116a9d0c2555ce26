"""Many threads on one store: batches stay whole, sequences unique, nothing hangs."""

from __future__ import annotations

import threading
from collections.abc import Callable

import numpy as np
import pytest

from metastore import MetadataStore
from metastore.errors import StoreClosedError
from verbs import State, content, read, start_waiting

TIMEOUT_SECONDS = 60


pytestmark = pytest.mark.usefixtures("frequent_switches")


def in_threads(n_threads: int, work: Callable[[int], object]) -> list[object]:
    """Run ``work(0)``, ``work(1)`` .. side by side; return or raise what they did."""
    results: list[object] = [None] * n_threads
    errors = []
    start = threading.Barrier(n_threads)

    def run(number: int) -> None:
        try:
            start.wait(TIMEOUT_SECONDS)
            results[number] = work(number)
        except BaseException as error:
            errors.append(error)

    threads = [
        threading.Thread(target=run, args=(number,), daemon=True)
        for number in range(n_threads)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(TIMEOUT_SECONDS)
        assert not thread.is_alive(), "a thread hangs"
    for error in errors:
        raise error
    return results


@pytest.mark.parametrize("log_size_bytes_min", [1 << 30, 2000], ids=["one-log", "many"])
def test_many_threads_commit_small_batches(db, recover, log_size_bytes_min):
    n_threads, n_batches = 8, 60
    store, _ = recover(log_size_bytes_min=log_size_bytes_min)

    def work(thread: int) -> list[int]:
        return [
            store.insert_batch(
                [(1000 * thread + i, (i + 1, b"%d" % thread)), (10**6, (i + 1, b""))],
                sync=i % 10 != 3,
            )
            for i in range(n_batches)
        ]

    sequences = in_threads(n_threads, work)
    for mine in sequences:
        assert mine == sorted(mine)
    together = sorted(sequence for mine in sequences for sequence in mine)
    assert together == list(range(1, n_threads * n_batches + 1))
    store.shutdown()
    expected: State = {
        1000 * thread + i: (i + 1, b"%d" % thread)
        for thread in range(n_threads)
        for i in range(n_batches)
    }
    found = read(db)
    found.pop(10**6)
    assert found == expected


def test_the_order_of_sequences_is_the_order_of_effects(db, recover):
    """All write one key: what is left is what the greatest sequence wrote."""
    store, _ = recover(log_size_bytes_min=1500)
    written = {}

    def work(thread: int) -> None:
        for i in range(50):
            value = 1 + 1000 * thread + i
            written[store.insert_batch([(7, (value, b""))])] = value

    in_threads(6, work)
    store.shutdown()
    assert read(db) == {7: (written[max(written)], b"")}


def test_batches_are_whole_at_every_recovery(db, recover):
    """Each batch writes the same value under ten keys: they never differ."""
    store, _ = recover(log_size_bytes_min=3000)
    keys = np.arange(10, dtype=np.uint64)

    def work(thread: int) -> None:
        for i in range(40):
            value = 1 + 1000 * thread + i
            if i % 2:
                store.insert_batch([(key, (value, b"x")) for key in range(10)])
            else:
                store.insert_arrays(keys, np.full(10, value, np.uint64))

    in_threads(6, work)
    store.shutdown()
    _, recovered = recover()
    assert recovered.keys.tolist() == list(range(10))
    assert len(set(recovered.values.tolist())) == 1


def test_commits_go_on_during_compactions(db, recover):
    store, _ = recover()
    keys = np.arange(10**6, 10**6 + 200_000, dtype=np.uint64)
    store.insert_arrays(keys, keys)
    done = threading.Event()

    def work(thread: int) -> int:
        if thread == 0:
            try:
                for _ in range(5):
                    store.compact()
            finally:
                done.set()
            return 0
        i = 0
        while not done.is_set() or i < 10:
            store.insert_batch([((thread << 32) + i, (i + 1, b"during"))])
            i += 1
        return i

    _, *counts = in_threads(4, work)
    store.shutdown()
    _, recovered = recover()
    assert len(recovered) == len(keys) + sum(counts)
    for thread, count in enumerate(counts, start=1):
        found = [recovered.get((thread << 32) + i) for i in range(count)]
        assert found == [(i + 1, b"during") for i in range(count)]


def test_many_threads_compact_and_sync_at_once(db, recover):
    store, _ = recover(log_size_bytes_min=1000)

    def work(thread: int) -> None:
        for i in range(20):
            store.insert_batch([(100 * thread + i, (1, b""))], sync=thread % 2 == 0)
            (store.compact, store.sync, store.stats)[i % 3]()

    in_threads(6, work)
    store.shutdown()
    assert len(read(db)) == 120


@pytest.mark.parametrize("n_before", [0, 1, 5, 20, 60])
def test_shutdown_races_with_writers(db, recover, n_before):
    """A writer succeeds or gets StoreClosedError; what succeeded is there."""
    store, _ = recover(log_size_bytes_min=1000)
    enough = threading.Event()

    def work(thread: int) -> list[int]:
        if thread == 0:
            assert enough.wait(TIMEOUT_SECONDS)
            store.shutdown()
            return []
        acknowledged: list[int] = []
        try:
            while True:
                key = 10**6 * thread + len(acknowledged)
                if len(acknowledged) == n_before:
                    enough.set()
                store.insert_batch([(key, (1, b""))])
                acknowledged.append(key)
        except StoreClosedError:
            return acknowledged
        finally:
            enough.set()

    results = in_threads(5, work)
    _, recovered = recover()
    acknowledged = [key for mine in results for key in mine]
    # What was refused is absent, too: every batch there has one record of its own.
    assert sorted(acknowledged) == recovered.keys.tolist()
    assert recovered.report.sequence == len(acknowledged)


def write_compact_or_sync(store: MetadataStore, thread: int, i: int) -> None:
    if thread % 3 == 0:
        store.insert_batch([(i, (1, b""))], sync=False)
    elif thread % 3 == 1:
        store.compact()
    else:
        store.sync()


def test_shutdown_races_with_everything_else(db, recover):
    """Whoever waits for a compaction or a sync is let go at the shutdown."""
    for n_before in (0, 3, 10):
        store, _ = recover(log_size_bytes_min=500)

        def work(thread: int, store: MetadataStore = store, n: int = n_before) -> int:
            i = 0
            try:
                while thread or i < n:
                    write_compact_or_sync(store, thread, i)
                    i += 1
            except StoreClosedError:
                pass
            store.shutdown()
            return i

        in_threads(6, work)
        assert store.stats().failure is None
        again, recovered = recover()
        again.shutdown()
        assert recovered.report.is_clean


def test_shutdown_waits_for_writers_that_are_in_time(db, recover):
    """Those that shut down together with the last writers lose nothing."""
    for _ in range(10):
        store, recovered = recover()
        before = len(recovered)

        def work(thread: int, store: MetadataStore = store, base: int = before) -> int:
            if thread == 0:
                store.shutdown()
                return 0
            try:
                store.insert_batch([(base + 100 * thread, (1, b""))], sync=False)
            except StoreClosedError:
                return 0
            return 1

        stored = sum(in_threads(4, work))
        again, recovered = recover()
        again.shutdown()
        assert recovered.report.sequence >= stored
        for key in list(content(recovered)):
            assert recovered.get(key) == (1, b"")


def test_recovered_is_read_by_many_threads(db, recover):
    store, _ = recover()
    keys = np.arange(0, 20_000, 2, dtype=np.uint64)
    store.insert_arrays(keys, keys + np.uint64(1))
    store.shutdown()
    _, recovered = recover()

    def work(thread: int) -> int:
        if thread % 2:
            return sum(1 for _ in recovered)
        return sum(key in recovered for key in range(thread, 20_000, 2))

    assert in_threads(4, work) == [10_000, 10_000, 9_999, 10_000]


def test_each_thread_may_have_its_own_store(tmp_path):
    def work(thread: int) -> State:
        path = tmp_path / str(thread)
        for i in range(5):
            store, _ = MetadataStore.recover(path, threads=2)
            with store:
                store.insert_batch([(i, (thread + 1, b"mine"))])
                store.compact()
        return read(path)

    found = in_threads(4, work)
    for thread, state in enumerate(found):
        assert state == {i: (thread + 1, b"mine") for i in range(5)}


def test_threads_share_syncs(recover):
    """Fewer syncs than durable batches; test_ancestor_defects has the strict form."""
    store, _ = recover()
    before = store.stats()

    def work(thread: int) -> None:
        for i in range(100):
            store.insert_batch([(1000 * thread + i, (1, b""))])

    threads = [threading.Thread(target=work, args=(n,), daemon=True) for n in range(8)]
    commits = store._engine._commits
    # The first batch of each is in one group.
    commits.exclusively(lambda: start_waiting(commits, threads))
    for thread in threads:
        thread.join(TIMEOUT_SECONDS)
        assert not thread.is_alive()
    after = store.stats()
    assert after.n_batches - before.n_batches == 800
    print(f"{after.n_syncs - before.n_syncs} syncs for 800 batches")
    assert after.n_syncs - before.n_syncs < 800


def test_a_refused_batch_does_not_disturb_others(db, recover):
    store, _ = recover()

    def work(thread: int) -> None:
        for i in range(50):
            if thread % 2:
                with pytest.raises(OverflowError):
                    store.insert_batch([(10**9, (1, b"never")), (-1, None)])
            else:
                store.insert_batch([(1000 * thread + i, (1, b""))])

    in_threads(6, work)
    assert store.stats().sequence == 150
    store.shutdown()
    found = read(db)
    assert len(found) == 150
    assert 10**9 not in found
