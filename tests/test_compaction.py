"""Which blocks are copied, which are merged, and that it makes no difference."""

from __future__ import annotations

import errno
import functools
import os
import threading

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from metastore import (
    CorruptionError,
    MetadataStore,
    StoreFailedError,
    compaction,
    log,
    snapshot,
)
from metastore.compaction import plan_jobs
from metastore.directory import File
from metastore.format import BLOCK_RECORDS_TARGET, INDEX_DTYPE
from metastore.pace import Pace

TARGET = 8


@pytest.fixture(autouse=True)
def tiny_blocks():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(compaction, "BLOCK_RECORDS_TARGET", TARGET)
        patch.setattr(compaction, "_BLOCK_RECORDS_MIN", TARGET // 2)
        patch.setattr(snapshot, "BLOCK_RECORDS_TARGET", TARGET)
        yield


def index_of(blocks: list[list[int]]) -> np.ndarray:
    index = np.zeros(len(blocks), INDEX_DTYPE)
    index["first_key"] = [keys[0] for keys in blocks]
    index["last_key"] = [keys[-1] for keys in blocks]
    index["n_records"] = [len(keys) for keys in blocks]
    return index


KEYS = st.integers(0, 400)


@given(
    st.sets(KEYS, max_size=150).map(sorted),
    st.lists(st.integers(1, 2 * TARGET), min_size=1),
    st.sets(KEYS, max_size=80).map(sorted),
)
def test_jobs_cover_everything_once(old, sizes, run):
    blocks = []
    while old:
        size = sizes[len(blocks) % len(sizes)]
        blocks.append(old[:size])
        old = old[size:]
    block_at = run_at = 0
    last_key = -1
    for job in plan_jobs(index_of(blocks), np.array(run, dtype=np.uint64)):
        assert (job.block_start, job.run_start) == (block_at, run_at)
        assert job.block_stop > job.block_start or job.run_stop > job.run_start
        block_at, run_at = job.block_stop, job.run_stop
        keys = run[job.run_start : job.run_stop]
        for block in blocks[job.block_start : job.block_stop]:
            keys += block
        assert min(keys) > last_key  # so that the jobs' results follow each other
        last_key = max(keys)
        assert not (job.is_copy and job.run_stop > job.run_start)
        assert len(keys) < 6 * TARGET
    assert (block_at, run_at) == (len(blocks), len(run))


def test_untouched_blocks_are_copied():
    blocks = [[10 * i + k for k in range(TARGET)] for i in range(10)]
    run = np.array([42, 1000], dtype=np.uint64)
    jobs = list(plan_jobs(index_of(blocks), run))
    assert [(job.block_start, job.block_stop) for job in jobs if job.is_copy] == [
        (0, 4),
        (5, 10),
    ]


@pytest.mark.parametrize("threads", [1, 2])
def test_many_compactions_against_a_dict(tmp_path, rng, threads):
    """Blocks that are copied, joined and split hold the same as a dict at any time."""
    expected: dict[int, tuple[int, bytes]] = {}
    store, _ = MetadataStore.recover(tmp_path, threads=threads)
    for _ in range(25):
        for _ in range(rng.randrange(1, 4)):
            batch = []
            first = rng.randrange(500)
            for key in rng.sample(range(first, first + 100), rng.randrange(1, 40)):
                if rng.random() < 0.4:
                    batch.append((key, None))
                    expected.pop(key, None)
                else:
                    new = rng.randrange(1, 2**64), rng.randbytes(rng.choice([0, 8, 30]))
                    batch.append((key, new))
                    expected[key] = new
            store.insert_batch(batch)
        store.compact()
        if rng.random() < 0.3:
            store.shutdown()
            store, recovered = MetadataStore.recover(tmp_path, threads=threads)
            assert {key: (value, data) for key, value, data in recovered} == expected
    store.shutdown()
    store, recovered = MetadataStore.recover(tmp_path, threads=threads)
    store.shutdown()
    assert {key: (value, data) for key, value, data in recovered} == expected
    assert recovered.report.snapshot is not None


def ten_blocks(path, threads):
    """Return a store with a log of ten blocks of 30-byte user data, not compacted."""
    store, _ = MetadataStore.recover(path, threads=threads)
    store.insert_batch([(key, (key + 1, bytes(30))) for key in range(10 * TARGET)])
    return store


class FailingSync:
    """Takes the place of ``File.sync``: that of a snapshot fails, the n-th time."""

    def __init__(self, n):
        self.n = n
        self.n_syncs = 0
        self._right = File.sync

    def __call__(self, file):
        if "snapshot" in file.path:
            self.n_syncs += 1
            if self.n_syncs == self.n:
                raise OSError(errno.EIO, "planted")
        self._right(file)

    def __get__(self, file, kind):
        return functools.partial(self, file)


@pytest.mark.parametrize("threads", [1, 2])
def test_a_failed_sync_on_the_way_ends_the_compaction(tmp_path, monkeypatch, threads):
    """Nothing is synced, published or removed behind it: a retry could lie."""
    monkeypatch.setattr(snapshot, "_WRITE_SIZE", 1)
    monkeypatch.setattr(snapshot, "_SYNC_SIZE", 100)
    sync = FailingSync(3)
    store = ten_blocks(tmp_path, threads)
    with monkeypatch.context() as patch:
        patch.setattr(File, "sync", sync)
        with pytest.raises(StoreFailedError, match="planted"):
            store.compact()
    store.shutdown()
    assert sync.n_syncs == 3
    store, recovered = MetadataStore.recover(tmp_path, threads=threads)
    assert len(recovered) == 10 * TARGET
    assert recovered.report.snapshot is None
    store.compact()
    store.shutdown()


def test_no_sync_is_left_in_a_queue_where_its_failure_would_be_lost(
    tmp_path, monkeypatch
):
    """A pool that cannot start its thread has queued the sync, and does it later.

    The caller had done it by then; the second one failed unheard, and took with it the
    one error that the system tells of a page it could not write.
    """
    monkeypatch.setattr(snapshot, "_WRITE_SIZE", 1)
    monkeypatch.setattr(snapshot, "_SYNC_SIZE", 100)
    start, sync = threading.Thread.start, FailingSync(2)
    asked = 0

    def start_from_the_second_on(thread):
        nonlocal asked
        if thread.name.startswith("metastore-sync"):
            asked += 1
            if asked == 1:
                raise RuntimeError("can't start new thread")
        start(thread)

    store = ten_blocks(tmp_path, 2)
    with monkeypatch.context() as patch:
        patch.setattr(threading.Thread, "start", start_from_the_second_on)
        patch.setattr(File, "sync", sync)
        with pytest.raises(StoreFailedError, match="planted"):
            store.compact()
    store.shutdown()
    assert asked == 2
    assert sync.n_syncs == 2


@pytest.mark.skipif(not hasattr(os, "SCHED_BATCH"), reason="no scheduling policies")
def test_its_threads_interrupt_no_other(tmp_path, monkeypatch):
    """Those that pack too: they are started by the compactor's, which sets its kind.

    A packer that woke once took the processor from the commit that ran on it: the p99
    of commits was 1.75 ms instead of 1.0.
    """
    found = set()
    encode_block = compaction.encode_block

    def noting(*args):
        found.add(os.sched_getscheduler(0))
        return encode_block(*args)

    monkeypatch.setattr(compaction, "encode_block", noting)
    before = os.sched_getscheduler(0)
    store = ten_blocks(tmp_path, 2)
    store.compact()
    store.shutdown()
    assert os.sched_getscheduler(0) == before
    expected = os.SCHED_BATCH if before == os.SCHED_OTHER else before
    assert found == {expected}


@pytest.mark.parametrize("threads", [1, 2])
def test_logs_are_read_gently_too(tmp_path, monkeypatch, threads):
    """A compaction rests from its first window on, not only between blocks.

    It read its logs in one go: large batches took half as long again meanwhile.
    """
    monkeypatch.setattr(log, "_WINDOW_FRAMES", 10)
    rest = Pace.rest
    before_snapshot = []

    def noting(pace):
        names = os.listdir(tmp_path)
        before_snapshot.append(not any(name.startswith("snapshot_") for name in names))
        rest(pace)

    monkeypatch.setattr(Pace, "rest", noting)
    store, _ = MetadataStore.recover(tmp_path, threads=threads)
    for key in range(100):
        store.insert_batch([(key, (1, b"data"))], sync=False)
    store.compact()
    store.shutdown()
    assert sum(before_snapshot) >= 10


def test_what_changes_while_the_rest_is_written_is_not_published(tmp_path, monkeypatch):
    """A block long written, of a snapshot as large as real ones, at their sizes.

    For two days blocks were read back while the next were written, and not again: then
    a change behind that was published, and the logs that held the data were removed.
    """
    monkeypatch.setattr(compaction, "BLOCK_RECORDS_TARGET", BLOCK_RECORDS_TARGET)
    monkeypatch.setattr(snapshot, "BLOCK_RECORDS_TARGET", BLOCK_RECORDS_TARGET)
    store, _ = MetadataStore.recover(tmp_path, threads=2, log_size_bytes_min=1 << 30)
    keys = np.arange(1_000_000, dtype=np.uint64)
    values = np.random.default_rng(1).integers(1, 2**63, len(keys), dtype=np.uint64)
    store.insert_arrays(keys, values, sync=False)
    write = File.write
    flipped = []

    def write_and_flip(file, buffers, offset):
        write(file, buffers, offset)
        is_snapshot = os.path.basename(file.path).startswith("snapshot_")
        if is_snapshot and file.size() > 7 << 20 and not flipped:
            at = 64 + 48 + 100  # in the payload of the first block
            (byte,) = bytes(file.read(at, 1))
            os.pwrite(file.descriptor, bytes([byte ^ 4]), at)
            flipped.append(at)

    monkeypatch.setattr(File, "write", write_and_flip)
    with pytest.raises(StoreFailedError) as raised:
        store.compact()
    assert isinstance(raised.value.__cause__, CorruptionError)
    assert raised.value.__cause__.offset == 64
    assert flipped
    store.shutdown()
    monkeypatch.undo()
    store, recovered = MetadataStore.recover(tmp_path)
    store.shutdown()
    assert np.array_equal(recovered.values, values)


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("where", [0.0, 0.3, 0.7, 1.0])
def test_a_snapshot_that_reads_back_differently_is_not_published(
    tmp_path, monkeypatch, threads, where
):
    """What the page cache holds is checked before anything is renamed or removed.

    It was checked after the rename: then the next recovery met a damaged snapshot as
    the newest, though all that it contains was still there.
    """
    store, _ = MetadataStore.recover(tmp_path, threads=threads)
    expected = {}
    for start in (0, 1000):
        for key in range(start, start + 100):
            store.insert_batch([(key, (key + 1, b"some data"))], sync=False)
            expected[key] = key + 1
        if start == 0:
            store.compact()
    before = {name for name in os.listdir(tmp_path) if name.startswith("snapshot_")}
    sync = File.sync
    flipped = []

    def sync_and_flip(file):
        sync(file)
        if not os.path.basename(file.path).startswith("snapshot_") or flipped:
            return
        # the frames of the blocks begin behind the header of the file
        at = 64 + round(where * (file.size() - 64 - 200))
        (byte,) = bytes(file.read(at, 1))
        os.pwrite(file.descriptor, bytes([byte ^ 4]), at)
        flipped.append(at)

    monkeypatch.setattr(snapshot.SnapshotWriter, "_sync_so_far", _sync_inline)
    monkeypatch.setattr(File, "sync", sync_and_flip)
    with pytest.raises(StoreFailedError):
        store.compact()
    assert flipped
    store.shutdown()
    monkeypatch.undo()
    published = {
        name
        for name in os.listdir(tmp_path)
        if name.startswith("snapshot_") and not name.endswith(".tmp")
    }
    assert published == before
    store, recovered = MetadataStore.recover(tmp_path)
    store.shutdown()
    assert {key: value for key, value, _ in recovered} == expected
    assert recovered.report.is_clean


def _sync_inline(writer):
    """Sync in this thread, so that what follows meets what the sync has done."""
    writer._synced = writer._written
    writer._file.sync()
