"""When a log rotates, and the preparation of the next one beside it."""

import threading
from unittest import mock

import numpy as np

from metastore import MetadataStore, engine
from metastore.compaction import Compactor
from metastore.directory import Directory
from verbs import read


class OneWriterDirectory(Directory):
    """Notices a temporary file that is created again before it was published."""

    def __init__(self, *opened):
        super().__init__(*opened)
        self._mutex = threading.Lock()
        self._unpublished = set()
        self.created_twice = []

    def create(self, name):
        with self._mutex:
            if name in self._unpublished:
                self.created_twice.append(name)
            self._unpublished.add(name)
        return super().create(name)

    def rename(self, old, new):
        super().rename(old, new)
        with self._mutex:
            self._unpublished.discard(old)


def test_the_next_log_is_created_by_one_thread(tmp_path):
    """Leader and background thread once both created the next log's file.

    The leader took what was prepared under the mutex, found nothing, and created the
    file after letting go, while the background thread was about to create the same
    name. The second creation empties what the first has written, up to acknowledged
    batches; shutdown then missed the file.
    """
    directory = OneWriterDirectory.open_or_create(str(tmp_path))
    store, _ = MetadataStore._recover_in(directory, log_size_bytes_min=1)
    store._engine._pace.hurry()  # its rests would let commits outrun it
    n_batches = 0
    while store.stats().n_rotations <= 20:  # once a compaction, however long it takes
        store.insert_batch([(n_batches, (n_batches + 1, bytes(5_000)))])
        n_batches += 1
    store.shutdown()
    assert directory.created_twice == []
    store, recovered = MetadataStore.recover(tmp_path)
    store.shutdown()
    assert len(recovered) == n_batches


def test_a_log_without_batches_is_not_rotated(tmp_path):
    """Older logs that wait may be due by themselves; then a sync began a new log."""
    store, _ = MetadataStore.recover(tmp_path)
    store.insert_batch([(1, (1, bytes(5_000)))])
    store.shutdown()
    with mock.patch.object(Compactor, "submit"):  # so that the sealed log waits
        store, _ = MetadataStore.recover(tmp_path, log_size_bytes_min=1)
        store.sync()
        assert store.stats().n_logs_sealed == 1
        assert store.stats().n_rotations == 0
        store.shutdown()


def test_nothing_rotates_while_a_compaction_is_due_or_under_way(tmp_path):
    """While a compaction ran, every batch or a few once sealed a log of its own.

    What is sealed meanwhile waits for the next compaction, as it would in the active
    log, but each rotation costs its commit four syncs: first with the waiting logs
    counted against the active one (every batch rotated), then without (every time that
    a limit was full, 16 times beside 3 compactions of 50 batches of 2.8 MB).
    """
    with mock.patch.object(Compactor, "submit"):  # so that the compaction stays due
        store, _ = MetadataStore.recover(tmp_path, log_size_bytes_min=10_000)
        for key in range(40):  # of 1,072 bytes each in the log
            store.insert_batch([(key, (key + 1, bytes(1_000)))])
        stats = store.stats()
    store.shutdown()
    assert stats.n_rotations == 1
    assert stats.n_logs_sealed == 1
    assert stats.log_size > 3 * 10_000


def test_a_log_that_grew_beside_a_compaction_rotates_when_that_has_ended(tmp_path):
    """The first commit after a compaction sees that the log is due by then."""
    started, may_end = threading.Event(), threading.Event()
    compact = engine.compact

    def slow(*args, **options):
        started.set()
        assert may_end.wait(60)
        return compact(*args, **options)

    store, _ = MetadataStore.recover(tmp_path, log_size_bytes_min=10_000)
    with mock.patch.object(engine, "compact", slow):
        for key in range(10):
            store.insert_batch([(key, (key + 1, bytes(1_000)))])
        assert started.wait(60)
        for key in range(10, 40):
            store.insert_batch([(key, (key + 1, bytes(1_000)))])
        assert store.stats().n_rotations == 1
        may_end.set()
        store._engine._compactor.wait_idle()
        assert store.stats().n_rotations == 1
        store.insert_batch([(40, (41, b""))])
        store._engine._compactor.wait_idle()
    stats = store.stats()
    store.shutdown()
    assert (stats.n_rotations, stats.n_compactions, stats.n_logs_sealed) == (2, 2, 0)


# Batches that pack well

#: 20 bytes each, so 400 kB, of which the log takes some hundred.
N_PACKED = 20_000
PACKED_WEIGHT = 20 * N_PACKED // 16


def packed(store: MetadataStore, first: int) -> None:
    """Insert a batch whose keys count up and whose values are equal."""
    keys = np.arange(first, first + N_PACKED, dtype=np.uint64)
    store.insert_arrays(keys, np.ones(N_PACKED, np.uint64))


def test_batches_that_pack_well_make_a_log_due_by_what_they_unpack_to(tmp_path):
    """Only the bytes of logs were bounded: 16 kB of log took 360 MB to recover."""
    limit = 5 * PACKED_WEIGHT // 2
    with mock.patch.object(Compactor, "submit"):  # so that the sealed log waits
        store, _ = MetadataStore.recover(tmp_path, log_size_bytes_min=limit)
        for n in range(2):
            packed(store, n * N_PACKED)
        assert store.stats().n_rotations == 0
        packed(store, 2 * N_PACKED)
        stats = store.stats()
        store.shutdown()
    assert stats.n_rotations == 1
    assert stats.logs_sealed_size < PACKED_WEIGHT // 10


def test_what_logs_unpack_to_counts_after_a_recovery_as_before(tmp_path):
    limit = 5 * PACKED_WEIGHT // 2
    store, _ = MetadataStore.recover(tmp_path, log_size_bytes_min=limit)
    packed(store, 0)
    packed(store, N_PACKED)
    store.shutdown()
    store, _ = MetadataStore.recover(tmp_path, log_size_bytes_min=limit)
    assert store.stats().n_logs_sealed == 1
    packed(store, 2 * N_PACKED)
    store._engine._compactor.wait_idle()
    stats = store.stats()
    store.shutdown()
    assert (stats.n_rotations, stats.n_compactions, stats.n_logs_sealed) == (1, 1, 0)
    assert len(read(tmp_path)) == 3 * N_PACKED


def test_a_snapshot_that_packs_well_allows_logs_by_what_it_unpacks_to(tmp_path):
    """Else the whole store would be written anew for each sixteenth of its records."""
    store, _ = MetadataStore.recover(tmp_path, log_size_bytes_min=1)
    for n in range(4):
        packed(store, n * N_PACKED)
    store.compact()
    n_rotations = store.stats().n_rotations
    packed(store, 0)
    assert store.stats().n_rotations == n_rotations  # so the compaction told it
    store.shutdown()
    store, _ = MetadataStore.recover(tmp_path, log_size_bytes_min=1)
    packed(store, 0)
    assert store.stats().n_rotations == 0  # and the recovery
    store.shutdown()
