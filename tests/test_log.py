"""Logs are read in windows; where a window ends must not matter."""

import contextlib
import dataclasses
import errno

import numpy as np
import pytest

from disk import Disk, Operation
from metastore import CorruptionError, MetadataStore, log, recovery
from metastore.columns import Columns
from metastore.directory import Directory, FileName
from metastore.format import FileHeader, size_without_zeros
from simulated import SimulatedDirectory, SimulatedFile
from verbs import newest_log, open_image, read_image

CALLS = ("sync", "drop_cache")


@pytest.mark.parametrize("window_size", [48, 56, 200, 1_000, 4_096, 1 << 20])
@pytest.mark.parametrize("threads", [1, 2])
def test_window_ends_do_not_matter(tmp_path, monkeypatch, window_size, threads):
    """A frame across the end of a window once ended the log.

    The reader compared the size of the next window, not that of the frame, with what
    was left of the file: with less than a window left, whole batches behind looked
    like damage.
    """
    rng = np.random.default_rng(7)
    store, _ = MetadataStore.recover(tmp_path)
    expected = {}
    for n_records in (1, 40, 0, 3, 200, 1, 1, 90):
        keys = rng.integers(0, 300, n_records, dtype=np.uint64)
        values = rng.integers(1, 2**64, n_records, dtype=np.uint64)
        store.insert_arrays(keys, values)
        expected.update(zip(keys.tolist(), values.tolist(), strict=True))
    store.shutdown()
    monkeypatch.setattr(log, "_WINDOW_SIZE", window_size)
    store, recovered = MetadataStore.recover(tmp_path, threads=threads)
    store.shutdown()
    assert {key: value for key, value, _ in recovered} == expected
    assert recovered.report.n_batches == 8
    assert recovered.report.is_clean


@pytest.mark.parametrize("window_frames", [1, 2, 5])
def test_window_frames_do_not_matter(tmp_path, monkeypatch, window_frames):
    """The table of a window fills up before its bytes end, also right at a bound."""
    monkeypatch.setattr(log, "_WINDOW_FRAMES", window_frames)
    for first in (0, 5, 10):
        store, recovered = MetadataStore.recover(tmp_path)
        assert len(recovered) == first
        for key in range(first, first + 5):
            store.insert_batch([(key, (key + 1, b""))])
        store.shutdown()
    store, recovered = MetadataStore.recover(tmp_path)
    store.shutdown()
    assert list(recovered) == [(key, key + 1, b"") for key in range(15)]


_N_LOGS = 30
#: Of a batch of one record: header, key, value and length, padded.
_FRAME_SIZE = 48 + 24


def several_logs() -> Disk:
    """Logs of two batches each; a key is written by every log that it divides."""
    disk = Disk()
    for number in range(1, _N_LOGS + 1):
        store, _ = MetadataStore._recover_in(SimulatedDirectory(disk), inline=True)
        for key in (1_000 + number, number % 7):
            store.insert_batch([(key, (number, b""))])
        store.shutdown()
    return disk


def state_after(n_batches: int) -> list[tuple[int, int, bytes]]:
    """What the first so many batches of those logs leave."""
    state = {}
    for batch in range(n_batches):
        number = batch // 2 + 1
        state[number % 7 if batch % 2 else 1_000 + number] = number
    return [(key, state[key], b"") for key in sorted(state)]


@pytest.mark.parametrize("threads", [1, 2, 5])
def test_logs_are_one_stream_of_work(threads):
    """The last log that writes a key wins; and few logs are open at a time."""
    disk = several_logs()
    n_open = []
    disk.before = lambda operation: n_open.append(len(disk.opened))
    store, recovered = MetadataStore._recover_in(
        SimulatedDirectory(disk), inline=True, threads=threads
    )
    assert list(recovered) == state_after(2 * _N_LOGS)
    assert recovered.report.n_batches == 2 * _N_LOGS
    store.shutdown()
    assert disk.opened == []
    assert 0 < max(n_open) <= 2 * threads + 4


@pytest.mark.parametrize("threads", [1, 2, 5])
@pytest.mark.parametrize("offset", [8, 56], ids=["header", "payload"])
@pytest.mark.parametrize("second", [False, True])
def test_nothing_behind_damage_is_kept(threads, offset, second):
    """The logs behind a damaged one were scanned already, and had their places.

    Their records once came with those of the prefix: found by the fuzzer, in the hour
    in which logs became one stream.
    """
    image = several_logs().live_image()
    damaged = 11
    name = f"log_{damaged:016x}"
    data = bytearray(image[name])
    data[64 + _FRAME_SIZE * second + offset] ^= 1
    disk = Disk({**image, name: bytes(data)})
    with pytest.raises(CorruptionError) as raised:
        MetadataStore._recover_in(
            SimulatedDirectory(disk), inline=True, threads=threads
        )
    assert disk.opened == []
    assert raised.value.path.endswith(name)
    assert raised.value.offset == 64 + _FRAME_SIZE * second
    store, recovered = MetadataStore._recover_in(
        SimulatedDirectory(disk), inline=True, threads=threads, on_damage="prefix"
    )
    store.shutdown()
    assert disk.opened == []
    assert list(recovered) == state_after(2 * (damaged - 1) + second)


@pytest.mark.parametrize("threads", [1, 2, 5])
def test_damage_is_told_before_the_error_of_a_later_log(threads, monkeypatch):
    """A medium that fails does so in several places; what precedes them is there.

    The later log is looked at while the damaged one is decoded.
    """
    image = several_logs().live_image()
    name = f"log_{11:016x}"
    data = bytearray(image[name])
    data[64 + 56] ^= 1
    disk = Disk({**image, name: bytes(data)})
    view = SimulatedFile.view

    def fail(file):
        if file.path.endswith(f"log_{12:016x}"):
            raise OSError(errno.EIO, "input/output error", file.path)
        return view(file)

    monkeypatch.setattr(SimulatedFile, "view", fail)
    with pytest.raises(CorruptionError, match=name):
        MetadataStore._recover_in(
            SimulatedDirectory(disk), inline=True, threads=threads
        )
    assert disk.opened == []
    store, recovered = MetadataStore._recover_in(
        SimulatedDirectory(disk), inline=True, threads=threads, on_damage="prefix"
    )
    store.shutdown()
    assert list(recovered) == state_after(20)


def test_a_log_is_read_where_there_is_no_room_for_what_it_may_need(
    tmp_path, monkeypatch
):
    """Its first window promises more than there is; what follows needs less."""
    store, _ = MetadataStore.recover(tmp_path)
    for key in range(200):
        store.insert_batch([(key, (key + 1, bytes(100)))])
    store.shutdown()
    allocate = Columns.allocate
    refused = []

    def allocate_little(n_records, user_data_size):
        if n_records > 100:
            refused.append(n_records)
            raise MemoryError
        return allocate(n_records, user_data_size)

    monkeypatch.setattr(log.Columns, "allocate", allocate_little)
    monkeypatch.setattr(log, "_WINDOW_SIZE", 2_000)
    directory = Directory.open_existing(str(tmp_path))
    name = FileName("log", 1)
    with (
        contextlib.closing(directory),
        contextlib.closing(directory.open(str(name))) as file,
    ):
        header = FileHeader.unpack(bytes(file.read(0, 64)), "log", 1, file.path)
        one = log.LogFile(file, header, None, is_mapped=True)
        contents, parts = log.read_logs([one], file.size())
    assert refused
    assert contents[0].n_batches == 200
    assert sum(map(len, parts)) == 200


@pytest.mark.parametrize("threads", [1, 2])
def test_a_log_that_cannot_be_opened_leaves_none_open(threads, monkeypatch):
    """Whichever it is, while those before it are decoded."""
    disk = several_logs()
    for number in (1, 2, 17, _N_LOGS):
        open_log = log.open_log

        def fail(directory, name, prepare, number=number, open_log=open_log):
            if name.number == number:
                raise OSError(errno.EMFILE, "too many open files", str(name))
            return open_log(directory, name, prepare)

        monkeypatch.setattr(recovery, "open_log", fail)
        with pytest.raises(OSError, match="too many open files"):
            MetadataStore._recover_in(
                SimulatedDirectory(disk), inline=True, threads=threads
            )
        monkeypatch.undo()
        assert disk.opened == []


@pytest.mark.parametrize(
    ("end", "calls"),
    [("shutdown", []), ("kill", ["sync", "drop_cache"]), ("unsynced", [])],
)
def test_a_log_is_read_from_the_medium_unless_it_is_sealed(end, calls):
    """What a killed process left in the cache may not be durable; what is sealed is."""
    disk = Disk()
    store, _ = MetadataStore._recover_in(SimulatedDirectory(disk), inline=True)
    store.insert_batch([(1, (1, b"")), (2, (2, bytes(5_000)))], sync=end != "unsynced")
    killed = disk.copy()
    store.shutdown()
    if end == "kill":
        disk = killed
    found = []

    def note(operation: Operation) -> None:
        if operation.name == f"log_{1:016x}" and operation.kind in CALLS:
            found.append(operation.kind)

    disk.before = note
    store, recovered = MetadataStore._recover_in(SimulatedDirectory(disk), inline=True)
    store.shutdown()
    assert len(recovered) == 2
    assert found == calls


def test_only_an_end_frame_of_its_own_seals_a_log(tmp_path):
    store, _ = MetadataStore.recover(tmp_path)
    store.insert_batch([(1, (1, bytes(100)))])
    store.shutdown()
    path = tmp_path / f"log_{1:016x}"
    sealed = path.read_bytes()
    end = 64 + 48 + 20 + 100  # behind the file header and the batch

    def is_sealed(data: bytes, number: int = 1) -> bool:
        path.write_bytes(data)
        directory = Directory.open_existing(str(tmp_path))
        file = directory.open(path.name)
        try:
            header = FileHeader.unpack(sealed[:64], "log", 1, str(path))
            return log.ends_sealed(file, dataclasses.replace(header, number=number))
        finally:
            file.close()
            directory.close()

    assert is_sealed(sealed)
    assert is_sealed(sealed[: end + 48])
    assert not is_sealed(sealed[: end + 47])
    assert is_sealed(sealed + bytes(1 << 19))
    assert not is_sealed(sealed, number=2)  # its frames have other seeds
    assert not is_sealed(sealed[:64])
    assert not is_sealed(sealed[:64] + bytes(1 << 16))
    for offset in range(64, end + 48):
        damaged = bytearray(sealed)
        damaged[offset] ^= 1
        assert is_sealed(bytes(damaged)) == (offset < end)


@pytest.mark.parametrize("bound", [False, True], ids=["newest", "bounded"])
def test_the_size_in_a_damaged_header_is_not_believed(monkeypatch, bound):
    """A torn tail of 36 bytes of anything had the rest of its log read in one piece.

    640 MB for a log of 300; MemoryError, and no store, where the log was larger than
    memory. What the header says is told by the bytes of the header.
    """
    image = open_image({}, [[(1, (1, b"one"))]])
    name = newest_log(image)
    end = 64 + 48 + 24
    if bound:
        image = open_image(image, [[(2, (2, b"two"))]])
        assert newest_log(image) != name
        end = 64
    header = b"\x11" * 32 + (1 << 30).to_bytes(8, "little") + bytes(8)
    image[name] = image[name][:end] + header + bytes(4 << 20)
    monkeypatch.setattr(log, "_WINDOW_SIZE", 4_096)
    read = log._Source.read
    asked = []

    def note(source, offset, size):
        asked.append(size)
        return read(source, offset, size)

    monkeypatch.setattr(log._Source, "read", note)
    if bound:
        with pytest.raises(CorruptionError, match="stored 0x11111111, computed 0x"):
            read_image(image)
    else:
        assert read_image(image) == {1: (1, b"one")}
    assert max(asked) <= 4_096 + 48


@pytest.mark.parametrize("size", [0, 1, 4095, 4096, 4097, 8192, 12_289])
def test_zeros_at_the_end_are_found_whatever_the_size(size):
    """They are skipped in pieces, which must make no difference."""
    for n_zeros in (0, 1, 4095, 4096, 4097, 8191, 8192, 20_000):
        for data in (bytes(size), b"\0" * (size - 1) + b"x" if size else b""):
            whole = data + bytes(n_zeros)
            assert size_without_zeros(whole) == len(whole.rstrip(b"\0"))
