"""Rotation and the preparation of the next log, side by side."""

import threading
from unittest import mock

from metastore import MetadataStore
from metastore.compaction import Compactor
from metastore.directory import Directory


class OneWriterDirectory(Directory):
    """Notices a temporary file that is created again before it was published."""

    def __init__(self, descriptor, path):
        super().__init__(descriptor, path)
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
    for key in range(200):
        store.insert_batch([(key, (key + 1, b""))])
    assert store.stats().n_rotations > 10
    store.shutdown()
    assert directory.created_twice == []
    store, recovered = MetadataStore.recover(tmp_path)
    store.shutdown()
    assert len(recovered) == 200


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


def test_batches_do_not_rotate_one_by_one_while_a_compaction_is_due(tmp_path):
    """Sealed logs that wait, and are due, once made every batch seal a log of its own.

    While a compaction ran, the next one's logs waited; with them every batch was too
    much, and each paid for a rotation: a quarter of the time of 400 batches of 28 KB.
    """
    with mock.patch.object(Compactor, "submit"):  # so that sealed logs wait
        store, _ = MetadataStore.recover(tmp_path, log_size_bytes_min=10_000)
        for key in range(40):  # of 1,072 bytes each in the log
            store.insert_batch([(key, (key + 1, bytes(1_000)))])
        stats = store.stats()
    store.shutdown()
    assert stats.n_rotations == 4  # once each time that a whole limit is full
    assert stats.n_logs_sealed == 4
