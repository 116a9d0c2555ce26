"""What is not in the page cache is read ahead, and no more of it than is needed."""

import ctypes
import errno
import mmap
import os

import numpy as np
import pytest

from metastore import MetadataStore, _codec, directory, log, snapshot
from metastore.directory import Directory, File, FileName, ReadAhead
from metastore.format import FILE_HEADER_SIZE, FRAME_HEADER_SIZE, FileHeader
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


def test_each_byte_is_asked_for_once_and_not_too_early():
    """What is asked for grows without gaps or overlaps, up to the end."""
    parts = []

    class Noting:
        def fetch(self, offset, size):
            parts.append((offset, offset + size))

    size = directory._FETCH_AHEAD * 3 + 77
    ahead = ReadAhead(Noting(), size)
    for offset in range(64, size, 1_000_003):
        ahead.advance(offset)
        assert parts[-1][1] == min(offset + directory._FETCH_AHEAD, size)
    assert parts[0][0] == 64
    assert [stop for _, stop in parts[:-1]] == [start for start, _ in parts[1:]]


@pytest.mark.parametrize("threads", [1, 2])
def test_blocks_are_asked_for_before_they_are_read(
    store_path, asked, monkeypatch, threads
):
    """A thread that decodes finds what it needs on its way already."""
    file, header = _open(store_path)
    reader = SnapshotReader(file, header)
    ranges = [reader.block_range(block) for block in range(reader.n_blocks)]
    assert reader.n_blocks > 3
    block_size = ranges[0][1] - ranges[0][0]
    monkeypatch.setattr(directory, "_FETCH_AHEAD", 3 * block_size // 2)
    asked.clear()
    decoded = []

    def decode_into(view, table, target, base):
        (start,) = (a for a, b in ranges if a == int(table[0, _codec.ROW_OFFSET]))
        decoded.append(start)
        stop = min(start + 3 * block_size // 2, reader.end_offset)
        assert asked[0][0] <= start
        assert asked[-1][1] >= stop
        return snapshot_decode(view, table, target, base)

    snapshot_decode = snapshot.decode_into
    monkeypatch.setattr(snapshot, "decode_into", decode_into)
    columns = reader.read_all(threads)
    file.close()
    assert len(columns) == reader.n_records
    assert sorted(decoded) == [start for start, _ in ranges]
    assert asked[-1][1] == reader.end_offset


def test_headers_are_asked_for_one_by_one(store_path, asked):
    """The headers of the blocks lie far apart: each is asked for, nothing between."""
    file, header = _open(store_path)
    reader = SnapshotReader(file, header)
    reader.check_headers()
    file.close()
    offsets = reader.index["offset"].tolist()
    index, *headers = asked
    assert index[0] == reader.end_offset
    assert headers == [(offset, offset + FRAME_HEADER_SIZE) for offset in offsets]


def test_a_closed_file_is_read_all_the_same(store_path):
    """The map stays valid; only nothing is read ahead."""
    file, header = _open(store_path)
    reader = SnapshotReader(file, header)
    file.close()
    assert len(reader.read_all()) == reader.n_records


def test_a_log_is_asked_for_window_by_window(tmp_path, asked, monkeypatch):
    """A log that is mapped is read ahead like a snapshot; its end bounds it."""
    store, _ = MetadataStore.recover(tmp_path)
    for key in range(100):
        store.insert_batch([(key, (key + 1, b"x" * 100))])
    store.shutdown()
    monkeypatch.setattr(log, "_WINDOW_SIZE", 4 * _KIB)
    monkeypatch.setattr(directory, "_FETCH_AHEAD", 6 * _KIB)
    (name,) = (name for name in os.listdir(tmp_path) if name.startswith("log_"))
    size = os.path.getsize(tmp_path / name)
    store, recovered = MetadataStore.recover(tmp_path)
    store.shutdown()
    assert len(recovered) == 100
    assert asked[0] == (FILE_HEADER_SIZE, FILE_HEADER_SIZE + 6 * _KIB)
    assert [stop for _, stop in asked[:-1]] == [start for start, _ in asked[1:]]
    assert asked[-1][1] <= size


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
def test_what_was_read_is_known_to_be_cached(store_path):
    """Without a wait: a byte that would have to be read first is not."""
    file, _ = _open(store_path)
    _drop_cache(file.path)
    assert not file._is_cached(_MIB)
    file.read(_MIB, 1)
    if not file._is_cached(_MIB):
        pytest.skip("this file system cannot tell")
    assert not file._is_cached(file.size())
    file.close()


@LINUX
def test_what_is_cached_is_not_asked_for_again(store_path, monkeypatch):
    """Both ends of a mebibyte in the cache tell of what is between them.

    One end told once: then a file's header, which is read before, hid its first
    mebibyte, and the first block waited behind 16 MiB that were asked for after it
    (23 of 47 ms for 1M records).
    """
    asked_for = []

    def posix_fadvise(descriptor, offset, size, advice):
        assert advice == os.POSIX_FADV_WILLNEED
        asked_for.append((offset, offset + size))

    file, _ = _open(store_path)
    monkeypatch.setattr(os, "posix_fadvise", posix_fadvise)
    cached = {5, _MIB + 5, 2 * _MIB + 4, 3 * _MIB + 4}
    monkeypatch.setattr(file, "_is_cached", cached.__contains__)
    file.fetch(5, 3 * _MIB + 17)
    file.close()
    missing = [(5, _MIB + 5), (2 * _MIB + 5, 3 * _MIB + 22)]
    for start, stop in missing:
        parts = [part for part in asked_for if start <= part[0] < stop]
        assert parts[0][0] == start
        assert [part[1] for part in parts[:-1]] == [part[0] for part in parts[1:]]
        assert parts[-1][1] == stop
        assert all(part[1] - part[0] <= 128 * _KIB for part in parts)
        del asked_for[: len(parts)]
    assert asked_for == []


@LINUX
def test_a_refused_hint_is_no_failure(store_path, monkeypatch):
    """A file system may know nothing of advice; everything is read all the same."""

    def refuse(*_):
        raise OSError(errno.EINVAL, "planted")

    file, header = _open(store_path)
    monkeypatch.setattr(os, "posix_fadvise", refuse)
    monkeypatch.setattr(os, "preadv", refuse)
    reader = SnapshotReader(file, header)
    assert len(reader.read_all()) == reader.n_records
    file.close()
