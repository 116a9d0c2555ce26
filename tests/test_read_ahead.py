"""What is not in the page cache is read ahead, and no more of it than is needed."""

import contextlib
import ctypes
import errno
import gc
import mmap
import os
import threading

import numpy as np
import pytest

from metastore import MetadataStore, _codec, directory, log, read_ahead, snapshot
from metastore.directory import Directory, File, FileName
from metastore.format import (
    FILE_HEADER_SIZE,
    FRAME_HEADER_SIZE,
    TRAILER_SIZE,
    FileHeader,
)
from metastore.read_ahead import ReadAhead
from metastore.snapshot import SnapshotReader

_N_RECORDS = 800_000
_KIB, _MIB = 1 << 10, 1 << 20

LINUX = pytest.mark.skipif(
    not hasattr(os, "RWF_NOWAIT"), reason="needs Linux's page cache"
)


@pytest.fixture(scope="module")
def store_path(tmp_path_factory):
    """A store of one snapshot of a few blocks, which do not compress."""
    path = tmp_path_factory.mktemp("read-ahead")
    rng = np.random.default_rng(11)
    keys = np.unique(rng.integers(0, 2**64, _N_RECORDS, dtype=np.uint64))
    values = rng.integers(1, 2**64, len(keys), dtype=np.uint64)
    store, _ = MetadataStore.recover(path)
    store.insert_arrays(keys, values)
    store.compact()
    store.shutdown()
    (name,) = (name for name in os.listdir(path) if name.startswith("snapshot_"))
    return path, FileName("snapshot", int(name[len("snapshot_") :], 16))


def _open(store_path):
    path, name = store_path
    file = Directory.open_existing(str(path)).open(str(name))
    data = bytes(file.read(0, FILE_HEADER_SIZE))
    return file, FileHeader.unpack(data, name.kind, name.number, file.path)


@pytest.fixture
def asked(monkeypatch):
    """The parts that were asked for, in order."""
    parts = []

    def fetch(file, offset, size):
        parts.append((offset, offset + size))

    monkeypatch.setattr(File, "fetch", fetch)
    return parts


@pytest.fixture
def nothing_cached(monkeypatch):
    """Whatever earlier tests have left in the page cache."""
    monkeypatch.setattr(read_ahead, "is_cached", lambda view, step: False)


def _reading_threads():
    return [
        thread
        for thread in threading.enumerate()
        if thread.name.startswith("metastore")
    ]


class _Parts:
    """A file whose parts arrive when the test lets them."""

    def __init__(self):
        self.begun, self.arrived = [], []
        self.may_arrive = threading.Event()

    def fetch(self, offset, size):
        self.begun.append((offset, offset + size))
        assert self.may_arrive.wait(60)
        self.arrived.append((offset, offset + size))


def test_each_byte_is_read_once_and_waited_for(nothing_cached):
    """Parts follow each other without gaps or overlaps, up to the end, no further."""
    file = _Parts()
    file.may_arrive.set()
    size = 20 * _MIB + 77
    with contextlib.closing(ReadAhead(file, memoryview(bytes(size)))) as ahead:
        assert file.begun == []
        for stop in [1, _MIB, _MIB + 1, 7 * _MIB, size, size + 100]:
            ahead.wait(stop)
            arrived = {at for part in file.arrived for at in range(*part, _KIB)}
            assert arrived >= set(range(0, min(stop, size), _KIB))
        ahead.wait(size)
    parts = sorted(file.begun)
    assert parts == [(start, min(start + _MIB, size)) for start in range(0, size, _MIB)]


def test_what_is_read_ahead_is_bounded(nothing_cached):
    """Beyond what was waited for lie a few parts, however large the file is."""
    file = _Parts()
    file.may_arrive.set()
    with contextlib.closing(ReadAhead(file, memoryview(bytes(64 * _MIB)))) as ahead:
        ahead.wait(3 * _MIB)
        assert max(stop for _, stop in file.begun) <= 12 * _MIB


def test_the_wait_is_for_the_part_that_has_not_arrived(nothing_cached):
    """What was begun is not there yet: only its end lets the waiting thread go."""
    file = _Parts()
    with contextlib.closing(ReadAhead(file, memoryview(bytes(3 * _MIB)))) as ahead:
        done = []
        waiting = threading.Thread(
            target=lambda: (ahead.wait(2 * _MIB), done.extend(sorted(file.arrived)))
        )
        waiting.start()
        file.may_arrive.set()
        waiting.join(60)
        assert done[:2] == [(0, _MIB), (_MIB, 2 * _MIB)]


def test_what_is_in_memory_needs_no_threads():
    """A file without a map, as in the simulated directory, is never read ahead."""
    file = _Parts()
    with contextlib.closing(ReadAhead(file, memoryview(bytes(5 * _MIB)))) as ahead:
        ahead.wait(5 * _MIB)
        assert _reading_threads() == []
    assert file.begun == []


@pytest.mark.parametrize("threads", [1, 2])
def test_blocks_have_arrived_before_they_are_decoded(
    store_path, nothing_cached, monkeypatch, threads
):
    """Threads that decode touch nothing that is still on its way.

    Their page faults slowed down the reading of it: 107 MB took as long as without
    anything read ahead.
    """
    file, header = _open(store_path)
    reader = SnapshotReader(file, header)
    ranges = [reader.block_range(block) for block in range(reader.n_blocks)]
    assert reader.n_blocks > 3
    read, decoded = [], []
    file_fetch = File.fetch

    def fetch(file, offset, size):
        file_fetch(file, offset, size)
        read.append((offset, offset + size))

    def decode_into(view, table, target, base):
        (block,) = (part for part in ranges if part[0] == table[0, _codec.ROW_OFFSET])
        decoded.append(block)
        stop = 0
        for start, end in sorted(read):
            if start <= stop:
                stop = end
        assert stop >= block[1]
        return snapshot_decode(view, table, target, base)

    monkeypatch.setattr(File, "fetch", fetch)
    snapshot_decode = snapshot.decode_into
    monkeypatch.setattr(snapshot, "decode_into", decode_into)
    columns = reader.read_all(threads)
    file.close()
    assert len(columns) == reader.n_records
    assert sorted(decoded) == ranges
    assert max(stop for _, stop in read) == reader.end_offset
    assert _reading_threads() == []


def test_a_damaged_block_ends_the_reading_too(store_path, nothing_cached, monkeypatch):
    """No thread is left behind by an error."""
    file, header = _open(store_path)
    reader = SnapshotReader(file, header)

    def decode_into(*_):
        raise RuntimeError("planted")

    monkeypatch.setattr(snapshot, "decode_into", decode_into)
    with pytest.raises(RuntimeError, match="planted"):
        reader.read_all(2)
    file.close()
    assert _reading_threads() == []


def test_headers_are_asked_for_one_by_one(store_path, asked):
    """The headers of the blocks lie far apart: each is asked for, nothing between.

    The trailer was touched in the map before anybody had read it: SIGBUS.
    """
    file, header = _open(store_path)
    reader = SnapshotReader(file, header)
    reader.check_headers()
    file.close()
    offsets = reader.index["offset"].tolist()
    trailer, index, *headers = asked
    assert trailer == (reader.size - TRAILER_SIZE, reader.size)
    assert index == (reader.end_offset, trailer[0])
    assert headers == [(offset, offset + FRAME_HEADER_SIZE) for offset in offsets]


def test_a_closed_file_is_read_all_the_same(store_path):
    """The map stays valid; only nothing is read ahead."""
    file, header = _open(store_path)
    reader = SnapshotReader(file, header)
    file.close()
    assert len(reader.read_all()) == reader.n_records


def test_a_log_is_read_ahead_part_by_part(tmp_path, asked, monkeypatch, nothing_cached):
    """A log that is mapped is read ahead like a snapshot; its end bounds it.

    Whether the zeros behind the end frame are asked for depends on how far the threads
    are when the end is found: the test once wanted all of them, and at times failed.
    """
    store, _ = MetadataStore.recover(tmp_path)
    for key in range(100):
        store.insert_batch([(key, (key + 1, b"x" * 100))])
    n_bytes = store.stats().log_size
    store.shutdown()
    monkeypatch.setattr(log, "_WINDOW_SIZE", 4 * _KIB)
    monkeypatch.setattr(read_ahead, "_PART_SIZE", 6 * _KIB)
    (name,) = (name for name in os.listdir(tmp_path) if name.startswith("log_"))
    size = os.path.getsize(tmp_path / name)
    asked.clear()
    store, recovered = MetadataStore.recover(tmp_path)
    store.shutdown()
    assert len(recovered) == 100
    parts = [(start, min(start + 6 * _KIB, size)) for start in range(0, size, 6 * _KIB)]
    assert sorted(asked) == parts[: len(asked)]
    assert max(stop for _, stop in asked) >= n_bytes
    assert _reading_threads() == []


def _resident_pages(path):
    """Return which pages of a file are in the page cache."""
    libc = ctypes.CDLL(None, use_errno=True)
    with open(path, "rb") as file:
        size = os.fstat(file.fileno()).st_size
        with mmap.mmap(file.fileno(), size, prot=mmap.PROT_READ) as mapped:
            view = np.frombuffer(mapped, np.uint8)
            resident = np.zeros(-(-size // mmap.PAGESIZE), np.uint8)
            status = libc.mincore(
                ctypes.c_void_p(view.ctypes.data),
                ctypes.c_size_t(size),
                ctypes.c_void_p(resident.ctypes.data),
            )
            del view
    assert status == 0, os.strerror(ctypes.get_errno())
    return resident & 1


def _drop_cache(path):
    gc.collect()  # a map that only a cycle refers to keeps its pages
    with open(path, "rb") as file:
        # What another test has asked for may be on its way: it is not dropped, and
        # not resident yet either.
        while file.read(_MIB):
            pass
        os.fsync(file.fileno())
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    if _resident_pages(path).any():
        pytest.skip("this file system keeps files in memory")


@LINUX
def test_opening_a_snapshot_reads_nothing_of_its_blocks(store_path):
    """The check of all headers ahead of the blocks once made a cold start slower.

    A page in each block that is in the cache already ends what the system reads in one
    go: 107 MB took 175 instead of 95 ms, and 5M records 203 instead of 174 ms.
    """
    file, header = _open(store_path)
    _drop_cache(file.path)
    reader = SnapshotReader(file, header)
    resident = _resident_pages(file.path)
    first = int(reader.index["offset"][1]) // mmap.PAGESIZE
    assert not resident[first : reader.end_offset // mmap.PAGESIZE].any()
    file.close()


@LINUX
def test_a_check_of_headers_reads_headers_only(store_path):
    """The check of the headers once read the whole file, and waited for it.

    Each header that was touched in the map brought in what the device reads ahead, up
    to 8 MiB around it, on one thread: two thirds of a cold recovery (R1: 175 of 254
    ms), and for a store that is larger than memory all of it twice.
    """
    file, header = _open(store_path)
    _drop_cache(file.path)
    reader = SnapshotReader(file, header)
    reader.check_headers()
    resident = _resident_pages(file.path)
    assert resident[reader.index["offset"] // mmap.PAGESIZE].all()
    first = int(reader.index["offset"][1]) // mmap.PAGESIZE
    last = int(reader.index["offset"][-1]) // mmap.PAGESIZE
    # from the second header to the last, and the page that it may continue on
    assert resident[first : last + 1].sum() <= 2 * reader.n_blocks
    file.close()


@LINUX
def test_a_part_that_is_missing_is_noticed_and_read(store_path):
    """Some of a file in the cache, as its header always is, is not all of it.

    Its first mebibyte once hid behind the header: the first block waited behind 16 MiB
    that were asked for after it (23 of 47 ms for 1M records).
    """
    file, _ = _open(store_path)
    view = file.view()
    _drop_cache(file.path)
    file.read(0, FILE_HEADER_SIZE)
    assert not directory.is_cached(view, _MIB)
    assert _resident_pages(file.path).sum() < _MIB // mmap.PAGESIZE
    with contextlib.closing(ReadAhead(file, view)) as ahead:
        ahead.wait(len(view))
    assert _resident_pages(file.path).all()
    assert directory.is_cached(view, _MIB)
    file.close()


@LINUX
def test_to_ask_what_is_cached_reads_nothing(store_path):
    """A read that must not wait once was the probe: it began to read all the same.

    Before a page that is there the system goes back to small pieces (107 MB: 25 ms).
    """
    file, _ = _open(store_path)
    view = file.view()
    _drop_cache(file.path)
    assert not directory.is_cached(view, _MIB)
    assert not _resident_pages(file.path).any()
    file.close()


def test_a_part_is_read_whole_whatever_its_size(tmp_path, monkeypatch):
    """Neither short reads nor the limit on buffers leave a gap."""
    monkeypatch.setattr(directory, "_BUFFERS_MAX", 3)
    size = 1000 * _KIB + 5
    (tmp_path / "file").write_bytes(bytes(size))
    file = Directory.open_existing(str(tmp_path)).open("file")
    calls = []
    preadv = os.preadv

    def short(descriptor, buffers, offset):
        n = preadv(descriptor, buffers, offset) - (5 if len(calls) == 1 else 0)
        calls.append((offset, offset + n))
        return n

    monkeypatch.setattr(os, "preadv", short)
    file.fetch(7, size - 7)
    assert calls[0][0] == 7
    assert [stop for _, stop in calls[:-1]] == [start for start, _ in calls[1:]]
    assert calls[-1][1] == size
    file.fetch(size - 10, 100)  # the file has become shorter
    assert calls[-2:] == [(size - 10, size), (size, size)]
    file.close()


def _mapped(path, size):
    path.write_bytes(bytes(size))
    with contextlib.closing(Directory.open_existing(str(path.parent))) as where:
        file = where.open(path.name)
    return file, file.view()


@pytest.mark.parametrize("size", [1, 4_097, _MIB, 3 * _MIB + 5, 8 * _MIB])
@pytest.mark.parametrize("missing", [0.0, 0.5, 1.0])
def test_of_a_small_map_no_page_is_taken_for_another(
    tmp_path, monkeypatch, size, missing
):
    file, view = _mapped(tmp_path / "file", size)
    n_pages = -(-size // mmap.PAGESIZE)
    absent = round(missing * (n_pages - 1))
    start = np.frombuffer(view, np.uint8).ctypes.data

    def mincore(address, n_bytes, there):
        first = (address - start) // mmap.PAGESIZE
        for page in range(first, first + -(-n_bytes // mmap.PAGESIZE)):
            there[page - first] = 0xFE | (page != absent)
        return 0

    monkeypatch.setattr(directory, "_mincore", mincore)
    assert not directory.is_cached(view, _MIB)
    absent = -1
    assert directory.is_cached(view, _MIB)
    file.close()


@LINUX
def test_the_header_of_a_small_file_does_not_stand_for_all_of_it(tmp_path):
    """A file of up to a MiB counted as cached because its header had just been read.

    Nothing else of it was read before it was touched: where the medium failed, SIGBUS.
    """
    file, view = _mapped(tmp_path / "file", 900 * _KIB)
    _drop_cache(file.path)
    file.read(0, FILE_HEADER_SIZE)
    assert _resident_pages(file.path)[0]
    assert not directory.is_cached(view, _MIB)
    file.read(0, 900 * _KIB)
    assert directory.is_cached(view, _MIB)
    file.close()


def test_a_large_map_is_asked_for_a_page_of_each_step(tmp_path, monkeypatch):
    file, view = _mapped(tmp_path / "file", 8 * _MIB + 1)
    start = np.frombuffer(view, np.uint8).ctypes.data
    asked = []
    monkeypatch.setattr(
        directory, "_mincore", lambda at, size, there: asked.append((at - start, size))
    )
    assert directory.is_cached(view, _MIB)  # and so it is where nobody can tell
    assert asked == [(at * _MIB, 1) for at in range(9)]
    file.close()


_NO_READ = (errno.EIO, errno.EINVAL, errno.ESTALE, errno.ENODATA, errno.ETIMEDOUT)


@LINUX
@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("number", _NO_READ, ids=errno.errorcode.get)
def test_a_medium_that_cannot_be_read_is_an_error_and_no_signal(
    store_path, nothing_cached, monkeypatch, threads, number
):
    """The error was in hand, but dropped; then the map was touched: SIGBUS.

    At first any; later all but EIO, and a medium has other words for it.
    """

    def refuse(*_):
        raise OSError(number, "planted")

    monkeypatch.setattr(os, "preadv", refuse)
    path, name = store_path
    with pytest.raises(OSError, match="planted") as caught:
        MetadataStore.recover(path, threads=threads)
    assert caught.value.errno == number
    assert caught.value.filename == os.path.join(path, str(name))
    monkeypatch.undo()
    MetadataStore.recover(path)[0].shutdown()


def test_a_read_that_fails_names_the_file(tmp_path, monkeypatch):
    """The system knows a descriptor only: an error told of none of forty files."""
    file, _ = _mapped(tmp_path / "file", 10)

    def refuse(*_):
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(os, "pread", refuse)
    with pytest.raises(OSError, match=os.strerror(errno.EIO)) as caught:
        file.read(0, 10)
    assert caught.value.errno == errno.EIO
    assert caught.value.filename == str(tmp_path / "file")
    file.close()


def test_advice_that_is_refused_is_no_failure(tmp_path, monkeypatch):
    """Where all memory is locked the system gives no page back, and says so."""

    class Locked(mmap.mmap):
        def madvise(self, *_):
            refused.append(True)
            raise OSError(errno.EINVAL, "planted")

    refused = []
    monkeypatch.setattr(mmap, "mmap", Locked)
    keys = np.arange(1 << 17, dtype=np.uint64)
    store, _ = MetadataStore.recover(tmp_path / "db")
    store.insert_arrays(keys, keys + np.uint64(1))
    store.compact()
    store.insert_batch([(1, (7, b""))])
    store.compact()
    store.shutdown()
    store, recovered = MetadataStore.recover(tmp_path / "db")
    store.shutdown()
    assert len(recovered) == len(keys)
    assert len(refused) > 4
