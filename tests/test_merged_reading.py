"""A snapshot that is read together with a run of later records."""

from __future__ import annotations

import itertools
import random
import threading
from pathlib import Path

import numpy as np
import pytest

import oracle
from metastore import CorruptionError, MetadataStore, snapshot
from metastore.columns import Columns
from metastore.directory import Directory, FileName
from metastore.format import FILE_HEADER_SIZE, FileHeader
from metastore.snapshot import SnapshotReader, _Places
from verbs import to_columns, to_records

_STORE_ID = bytes(range(16))
_NUMBER, _SEQUENCE = 1, 7
#: Only a test that fails waits so long.
_SECONDS_MAX = 30


def _reader(
    path: Path, blocks: list[list[oracle.Record]], damage: int = -1
) -> SnapshotReader:
    """Write a snapshot of these blocks, one of them damaged, and open it."""
    data = bytearray(oracle.write_snapshot(_STORE_ID, _NUMBER, _SEQUENCE, blocks))
    if damage >= 0:
        whole = oracle.read_snapshot(bytes(data), _NUMBER)
        data[whole.blocks[damage].offset + 48] ^= 1
    name = FileName("snapshot", _NUMBER)
    (path / str(name)).write_bytes(data)
    file = Directory.open_existing(str(path)).open(str(name))
    header = bytes(file.read(0, FILE_HEADER_SIZE))
    return SnapshotReader(
        file, FileHeader.unpack(header, name.kind, name.number, file.path)
    )


def _merged(
    blocks: list[list[oracle.Record]], run: list[oracle.Record]
) -> list[oracle.Record]:
    found = {record[0]: record for block in blocks for record in block}
    found.update({record[0]: record for record in run})
    return [found[key] for key in sorted(found) if found[key][1]]


def _random_case(
    dice: random.Random,
) -> tuple[list[list[oracle.Record]], list[oracle.Record]]:
    """Return blocks of a snapshot, and a run that hits some, misses some, deletes."""
    n_keys = dice.choice([1, 5, 40, 400])
    size = dice.choice([0, 3, 8, 30])

    def user_data() -> bytes:
        return dice.randbytes(dice.choice([size, dice.randint(0, size)]))

    def keys(n: int) -> list[int]:
        return sorted(
            {dice.choice([dice.randint(0, n_keys), 2**64 - 1 - n]) for _ in range(n)}
        )

    old = [(key, dice.randint(1, 2**64 - 1), user_data()) for key in keys(n_keys)]
    cuts = sorted({0, len(old), *(dice.randint(0, len(old)) for _ in range(4))})
    blocks = [old[a:b] for a, b in itertools.pairwise(cuts)]
    deleted = dice.choice([0.0, 0.3, 1.0])
    run = [
        (key, 0, b"")
        if dice.random() < deleted
        else (key, dice.randint(1, 2**64 - 1), user_data())
        for key in keys(dice.randint(1, n_keys))
    ]
    return blocks, run


@pytest.mark.parametrize("threads", [1, 2, 5])
@pytest.mark.parametrize("seed", range(40))
def test_the_run_wins_and_everything_is_there_once(
    tmp_path: Path, seed: int, threads: int
) -> None:
    """The seed is part of the test's name."""
    blocks, run = _random_case(random.Random(seed))
    sizes = []
    found = _reader(tmp_path, blocks).read_merged(
        to_columns(run), threads, sizes.append
    )
    assert to_records(found) == _merged(blocks, run)
    assert len(sizes) == len(blocks)
    assert found.offsets[0] == 0
    assert found.offsets[-1] == len(found.user_data)


@pytest.mark.parametrize(
    "run",
    [
        [(0, 1, b"before all")],
        [(35, 1, b"between two blocks")],
        [(2**64 - 1, 1, b"behind all")],
        [(key, 0, b"") for key in range(10, 20)],
        [(key, 0, b"") for key in range(100)],
        [(key, key + 1, b"again") for key in range(100)],
        [(5, 0, b""), (2**64 - 1, 0, b"")],
    ],
    ids=["first", "gap", "last", "a block goes", "all go", "all again", "never there"],
)
def test_a_run_beside_the_blocks(tmp_path: Path, run: list[oracle.Record]) -> None:
    blocks = [
        [(key, key, b"data%d" % key) for key in range(start, start + 10)]
        for start in (10, 20, 40, 50)
    ]
    found = _reader(tmp_path, blocks).read_merged(to_columns(run), 2)
    assert to_records(found) == _merged(blocks, run)


def test_a_snapshot_without_blocks(tmp_path: Path) -> None:
    run = [(1, 1, b"kept"), (2, 0, b"")]
    found = _reader(tmp_path, []).read_merged(to_columns(run), 2)
    assert to_records(found) == run[:1]


@pytest.mark.parametrize("threads", [1, 2, 5])
@pytest.mark.parametrize("damage", [0, 3, 19])
def test_a_damaged_block_is_told_and_nobody_waits_for_it(
    tmp_path: Path, damage: int, threads: int
) -> None:
    """Blocks behind it wait for its count, in vain."""
    blocks = [[(10 * n + i, 1, b"data") for i in range(5)] for n in range(20)]
    reader = _reader(tmp_path, blocks, damage)
    run = to_columns([(10 * n + 2, 5, b"") for n in range(20)])
    offset = int(reader.index["offset"][damage])
    with pytest.raises(CorruptionError) as caught:
        reader.read_merged(run, threads)
    assert caught.value.offset == offset
    assert [t for t in threading.enumerate() if t.name.startswith("metastore_")] == []


def test_an_interrupt_of_the_caller_frees_those_that_wait(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ctrl-C may come while the caller works on a block that others wait for."""
    blocks = [[(10 * n + i, 1, b"data") for i in range(5)] for n in range(20)]
    reader = _reader(tmp_path, blocks)
    caller = threading.get_ident()
    merged_size = snapshot.merged_size
    interrupted = threading.Event()

    def count(old: Columns, part: Columns) -> tuple[int, int]:
        if threading.get_ident() == caller:
            interrupted.set()
            raise KeyboardInterrupt
        assert interrupted.wait(_SECONDS_MAX)
        return merged_size(old, part)

    monkeypatch.setattr(snapshot, "merged_size", count)
    with pytest.raises(KeyboardInterrupt):
        reader.read_merged(to_columns([(10 * n + 2, 5, b"") for n in range(20)]), 3)
    assert interrupted.is_set()


@pytest.mark.parametrize("n_started", [0, 1, 2])
def test_every_block_is_counted_once_if_a_thread_cannot_be_started(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, n_started: int
) -> None:
    """A block that was done a second time waited for ever to be counted again."""
    blocks = [[(10 * n + i, 1, b"data") for i in range(5)] for n in range(20)]
    run: list[oracle.Record] = [(10 * n + 2, 5, b"") for n in range(20)]
    reader = _reader(tmp_path, blocks)
    start, n_asked = threading.Thread.start, itertools.count()

    def start_some(thread: threading.Thread) -> None:
        if thread.name.startswith("metastore") and next(n_asked) >= n_started:
            raise RuntimeError("can't start new thread")
        start(thread)

    monkeypatch.setattr(threading.Thread, "start", start_some)
    found = reader.read_merged(to_columns(run), 4)
    assert to_records(found) == _merged(blocks, run)


@pytest.mark.parametrize("n_calls", [2, 3, 5])
def test_no_thread_outlives_an_error_of_the_progress_callback(
    tmp_path: Path, n_calls: int
) -> None:
    """They decoded on after directory and lock were given back, while the error lived.

    Its traceback kept the generator alive that ends the threads.
    """
    rng = np.random.default_rng(5)
    store, _ = MetadataStore.recover(tmp_path)
    for n in (500_000, 200_000):
        keys = rng.integers(0, 2**64, n, dtype=np.uint64)
        store.insert_arrays(keys, keys | np.uint64(1))
        store.compact()
    store.insert_arrays(keys, keys | np.uint64(2))
    store.shutdown()
    calls = itertools.count(1)

    def progress(done: int, total: int) -> None:
        if next(calls) == n_calls:
            raise LookupError("planted")

    with pytest.raises(LookupError, match="planted") as caught:
        MetadataStore.recover(tmp_path, threads=3, progress=progress)
    names = [thread.name for thread in threading.enumerate()]
    assert [name for name in names if name.startswith("metastore_")] == []
    del caught


def test_a_failure_frees_those_behind_it() -> None:
    places = _Places()
    freed: list[RuntimeError] = []

    def wait_for_block_0() -> None:
        try:
            places.take(1, 1, 0)
        except RuntimeError as error:
            freed.append(error)

    thread = threading.Thread(target=wait_for_block_0)
    thread.start()
    with pytest.raises(KeyboardInterrupt), places.of(0):
        raise KeyboardInterrupt
    thread.join(_SECONDS_MAX)
    assert len(freed) == 1


def test_a_later_failure_does_not_free_those_before_it() -> None:
    """Block 2 fails while block 1 still waits for block 0, which is well."""
    places = _Places()
    with pytest.raises(ValueError, match="planted"), places.of(2):
        raise ValueError("planted")
    found: list[tuple[int, int]] = []
    thread = threading.Thread(target=lambda: found.append(places.take(1, 2, 20)))
    thread.start()
    assert places.take(0, 1, 10) == (0, 0)
    thread.join(_SECONDS_MAX)
    assert found == [(1, 10)]
    assert places.end == (3, 30)
    with pytest.raises(RuntimeError, match="before this one was not counted"):
        places.take(4, 1, 1)


def test_a_store_gives_back_what_snapshot_and_logs_make(tmp_path: Path) -> None:
    store, _ = MetadataStore.recover(tmp_path)
    store.insert_batch([(key, (key + 1, b"old")) for key in range(1000)])
    store.compact()
    store.insert_batch([(key, None) for key in range(0, 1000, 2)])
    store.insert_batch([(key, (7, b"new")) for key in range(1, 2000, 5)])
    store.shutdown()
    expected = {key: (key, key + 1, b"old") for key in range(1, 1000, 2)}
    expected.update({key: (key, 7, b"new") for key in range(1, 2000, 5)})
    store, found = MetadataStore.recover(tmp_path)
    store.shutdown()
    assert list(found) == [expected[key] for key in sorted(expected)]
