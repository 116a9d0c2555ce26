"""Pace: when a compaction rests, and for how long."""

import dataclasses
import threading
from unittest import mock

import numpy as np
import pytest

from metastore import MetadataStore, pace, snapshot
from metastore.columns import Columns
from metastore.directory import Directory, File, FileName
from metastore.format import FILE_HEADER_SIZE, FileHeader
from metastore.frames import encode_block
from metastore.pace import Pace, give_way
from metastore.snapshot import SnapshotReader, SnapshotWriter


class Clock:
    """Time that passes only when a test says so; a rest passes it too."""

    def __init__(self):
        self.now = 1000.0
        self.rests = []

    def perf_counter(self):
        return self.now

    def wait(self, seconds):
        self.rests.append(seconds)
        self.now += seconds


class Commits:
    """What a pace asks of a store."""

    def __init__(self):
        self.n_writes = 7
        self.backlog = 0.0


@pytest.fixture
def clock(monkeypatch):
    clock = Clock()
    monkeypatch.setattr(pace, "time", clock)
    return clock


@pytest.fixture
def commits():
    return Commits()


@pytest.fixture
def paced(clock, commits, monkeypatch):
    paced = Pace(lambda: commits.n_writes, lambda: commits.backlog)
    monkeypatch.setattr(paced._hurried, "wait", clock.wait)
    return paced


def work(clock, paced, seconds):
    """Work for so long, then let the pace decide; return how long it rested."""
    clock.now += seconds
    n_rests = len(clock.rests)
    paced.rest()
    return sum(clock.rests[n_rests:])


def test_without_commits_there_is_no_rest(clock, paced):
    assert work(clock, paced, 0.001) == 0
    assert work(clock, paced, 1.0) == 0
    assert paced.at_once(3) == 6


def test_commits_before_the_compaction_do_not_count(clock, commits, paced):
    commits.n_writes += 100
    paced.begin()
    assert work(clock, paced, 0.001) == 0
    assert paced.at_once(3) == 6


def test_a_compaction_that_a_commit_asked_for_begins_gently(clock, commits, paced):
    """Its logs were read and sorted by all threads; most slow commits met that."""
    assert [paced.threads(threads) for threads in (1, 2, 5)] == [1, 2, 5]
    paced.begin(commits_come=True)
    assert [paced.threads(threads) for threads in (1, 2, 5)] == [1, 1, 2]
    assert paced.at_once(2) == 1
    assert work(clock, paced, 0.001) == pytest.approx(12 * 0.001)
    assert work(clock, paced, 0.3) == 0
    commits.backlog = 1.0
    paced.begin(commits_come=True)
    assert paced.threads(2) == 2


def test_who_asks_for_a_compaction_gets_it_at_full_speed(tmp_path):
    begun = []
    begin = Pace.begin

    def noting(self, **options):
        begun.append(options)
        begin(self, **options)

    store, _ = MetadataStore.recover(tmp_path, log_size_bytes_min=10_000)
    with mock.patch.object(Pace, "begin", noting):
        store.insert_batch([(1, (1, bytes(9_000)))], sync=False)
        store._engine._options = dataclasses.replace(
            store._engine._options, log_size_bytes_min=1_000
        )
        store.compact()  # though it would be due by now
        assert begun == [{}]
        store.insert_batch([(1, (1, bytes(20_000)))])
        store._engine._compactor.wait_idle()
    store.shutdown()
    assert begun == [{}, {"commits_come": True}]


def test_a_rest_is_a_multiple_of_the_work(clock, commits, paced):
    commits.n_writes += 1
    assert work(clock, paced, 0.001) == pytest.approx(12 * 0.001)
    assert [paced.at_once(threads) for threads in (1, 2, 3, 4, 32)] == [1, 1, 1, 2, 16]
    commits.n_writes += 1
    assert work(clock, paced, 0.002) == pytest.approx(12 * 0.002)
    commits.n_writes += 1
    assert work(clock, paced, 1.0) == 0.1  # at most


def test_commits_that_came_lately_still_count(clock, commits, paced):
    commits.n_writes += 1
    assert work(clock, paced, 0.001) > 0
    assert work(clock, paced, 0.1) > 0
    assert work(clock, paced, 0.3) == 0
    assert paced.at_once(3) == 6


def test_rests_shrink_as_the_backlog_grows(clock, commits, paced):
    """Else commits could outrun a compaction for ever."""
    for backlog, expected in ((0.5, 0.006), (0.75, 0.003), (1.0, 0.0), (3.0, 0.0)):
        commits.n_writes += 1
        commits.backlog = backlog
        assert work(clock, paced, 0.001) == pytest.approx(expected)
        assert paced.at_once(2) == (1 if expected else 4)


def test_who_waits_for_the_end_ends_the_rests(clock, commits, paced):
    commits.n_writes += 1
    paced.hurry()
    assert work(clock, paced, 0.001) == 0
    assert paced.at_once(3) == 6


def test_a_rest_under_way_ends_at_once():
    """Not mocked: shutdown must not wait for a rest."""
    n_writes = iter(range(10))
    paced = Pace(lambda: next(n_writes))
    with (
        mock.patch.object(pace, "_REST_SECONDS_MAX", 600.0),
        mock.patch.object(pace, "_REST_RATIO", 1e12),
    ):
        thread = threading.Thread(target=paced.rest)
        thread.start()
        paced.hurry()
        thread.join(60)
    assert not thread.is_alive()


def test_who_waits_for_the_processor_goes_first_while_commits_come(monkeypatch):
    given = []
    monkeypatch.setattr(pace.os, "sched_yield", lambda: given.append(True))
    gentle = Pace()
    gentle.begin(commits_come=True)
    give_way()
    assert not given  # this thread works for no compaction
    with gentle.at_work():
        give_way()
        assert len(given) == 1
        gentle.hurry()
        gentle.rest()
        give_way()
    give_way()
    assert len(given) == 1


def test_a_compaction_gives_way_between_its_steps(tmp_path, monkeypatch):
    """Commits waited 2 to 4 ms for the processor of a worker: C5, p99.9."""
    given = []
    rng = np.random.default_rng(1)
    monkeypatch.setattr(pace.os, "sched_yield", lambda: given.append(True))

    def gently(paced, _):
        paced.is_gentle = True
        return 0.0  # but without rests

    monkeypatch.setattr(Pace, "_decide", gently)
    store, _ = MetadataStore.recover(tmp_path / "db")
    keys = rng.integers(0, 1 << 40, 100_000, dtype=np.uint64)
    store.insert_arrays(keys, keys + np.uint64(1))
    store.compact()
    before = len(given)
    store.insert_arrays(keys, keys + np.uint64(2))
    store.compact()
    assert before > 8  # merge, entropies, each plane that zstd packs, the frame
    assert len(given) > before + 15  # and before each plane that is read
    store.shutdown()


def test_a_block_goes_to_the_disk_in_spaced_pieces_while_commits_come(
    tmp_path, monkeypatch
):
    """A commit behind a sync of 0.8 MB waited four times as long as an idle one: C5.

    Each piece is synced and followed by a rest; a rest may also find that the commits
    have ended, and then what is left is written as always.
    """
    done = []
    n_rests_gentle = 3
    write, sync = File.write, File.sync

    class Gentle(Pace):
        def rest(self):
            done.append("rest")
            self.is_gentle = done.count("rest") < n_rests_gentle

    def noting_write(file, buffers, offset):
        done.append(sum(map(len, buffers)))
        write(file, buffers, offset)

    def noting_sync(file):
        done.append("sync")
        sync(file)

    monkeypatch.setattr(snapshot, "_GENTLE_SIZE", 1000)
    monkeypatch.setattr(File, "write", noting_write)
    monkeypatch.setattr(File, "sync", noting_sync)
    rng = np.random.default_rng(1)
    keys = np.sort(rng.integers(0, 1 << 63, 700, dtype=np.uint64))
    offsets = np.zeros(701, dtype=np.uint64)
    columns = Columns(keys, keys + np.uint64(1), offsets, np.zeros(0, dtype=np.uint8))
    directory = Directory.open_or_create(str(tmp_path))
    name = FileName("snapshot", 1)
    gentle = Gentle()
    gentle.is_gentle = True
    writer = SnapshotWriter(directory, name, b"s" * 16, 7, pace=gentle)
    frame = encode_block(columns, 1)
    writer.put_block(columns, frame)
    writer.publish()
    size = (tmp_path / str(name)).stat().st_size
    n_pieces = len(frame) // 1000
    assert n_pieces > 2 * n_rests_gentle
    firsts = [x for x in done[: 3 * n_rests_gentle] if isinstance(x, int)]
    assert done[: 3 * n_rests_gentle] == [
        step for first in firsts for step in (first, "sync", "rest")
    ]
    assert all(1000 <= first < 2000 + FILE_HEADER_SIZE for first in firsts)
    assert done[3 * n_rests_gentle :] == [size - sum(firsts), "sync"]
    file = directory.open(str(name))
    header = FileHeader.unpack(bytes(file.read(0, FILE_HEADER_SIZE)), "snapshot", 1, "")
    read = SnapshotReader(file, header).read_all()
    assert np.array_equal(read.keys, keys)
    assert np.array_equal(read.values, keys + np.uint64(1))
    file.close()
    directory.close()
