"""Repair: everything whole is saved, nothing is invented, and what is lost is named.

The damaged stores are those of ``test_damage``. What may be saved is told by comparing
bytes with the undamaged store; the result is read by the oracle.

METASTORE_REPAIR_DAMAGES
    How many random damages of each store the campaign (``-m slow``) repairs (5000).
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import logging
import os
import random
import subprocess
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import numpy as np
import pytest

import oracle
import verbs
from disk import Disk, Fault, Image, Operation
from metastore import MetadataStore, repair
from metastore.directory import File
from metastore.errors import CorruptionError, FormatVersionError, MetastoreError
from metastore.salvage import Evidence, find_store_seed
from simulated import SimulatedDirectory
from test_damage import (
    BATCHES,
    NEXT,
    STATES,
    STORES,
    expected,
    flips,
    randomly_damaged,
    rearranged,
    small,
    truncations,
    zeroed,
)
from verbs import State, apply, content, recover_on

Run = Callable[..., tuple[int, str, str]]
LAST = len(BATCHES)
N_DAMAGES_LONG = int(os.environ.get("METASTORE_REPAIR_DAMAGES", "5000"))


@pytest.fixture(autouse=True)
def quiet() -> Iterator[None]:
    logging.disable(logging.ERROR)
    yield
    logging.disable(logging.NOTSET)


@pytest.fixture(scope="module", params=STORES)
def store_image(request: pytest.FixtureRequest) -> Image:
    return small(STORES[request.param]())


def repaired(image: Image, **options: object) -> tuple[repair.RepairReport, Image]:
    """Repair on a simulated disk; nothing of the source may change."""
    old, new = Disk(image), Disk({})
    source, destination = SimulatedDirectory(old), SimulatedDirectory(new, "new")
    report = repair.repair_into({"": source}, destination, **options)
    source.close()
    destination.close()
    assert old.live_image() == image
    assert old.opened == new.opened == []
    result = new.live_image()
    assert result.pop("quarantine") == {"original": image}
    return report, result


def sequences(ranges: Iterable[tuple[int, int]]) -> set[int]:
    return {number for low, high in ranges for number in range(low, high + 1)}


def untouched(before: Image, after: Image) -> tuple[set[int], int]:
    """Sequences of the batches whose bytes are where they were, and of the snapshot.

    The latter is 0 if there is no snapshot, or its one block is damaged.
    """
    batches: set[int] = set()
    contained = 0
    for name, data in before.items():
        left = after.get(name, b"")
        for span in verbs.spans(data):
            if left[span.offset : span.end] != data[span.offset : span.end]:
                continue
            if span.kind == oracle.BATCH:
                batches.add(span.sequence)
            elif span.kind == oracle.BLOCK:
                contained = oracle.read_file_header(data, *oracle.parse_name(name))
                contained = contained.sequence
    return batches, contained


def check(before: Image, image: Image, *, further: bool = True) -> None:
    batches, contained = untouched(before, image)
    whole = batches | set(range(1, contained + 1))
    report, result = repaired(image)
    state, sequence = oracle.read_store(result)
    assert sequence == report.sequence
    wanted: State = dict(STATES[contained])
    for number in sorted(batches):
        wanted = apply(wanted, BATCHES[number - 1])
    assert state == wanted
    assert len(state) == report.n_records
    if report.is_prefix:
        assert state == STATES[sequence]
    sound = expected(image)
    if sound is not None:
        assert state == sound
        assert report.is_prefix
    # What is lost is named: all of it that something behind it tells of, nothing else.
    missing = sequences(report.missing)
    lost = set(range(1, LAST + 1)) - whole
    assert missing <= lost
    assert {number for number in lost if number < max(whole, default=0)} <= missing
    if further:
        check_it_opens(result, state, sequence)
        check_prefix(image, whole, snapshot_differs(before, image))


def snapshot_differs(before: Image, image: Image) -> bool:
    return any(
        "snapshot" in name and data != image.get(name) for name, data in before.items()
    )


def check_it_opens(result: Image, state: State, sequence: int) -> None:
    store, recovered = recover_on(Disk(result), threads=1)
    assert content(recovered) == state
    assert recovered.report.is_clean
    assert store.insert_batch(NEXT) == sequence + 1
    store.shutdown()


def check_prefix(image: Image, whole: set[int], snapshot_differs: bool) -> None:
    report, result = repaired(image, prefix_only=True)
    prefix = next(number for number in range(LAST + 1) if number + 1 not in whole)
    if snapshot_differs and report.sequence == 0:
        prefix = 0  # its block is whole, but nothing says that it is the only one
    assert oracle.read_store(result) == (STATES[prefix], prefix)
    assert report.sequence == report.prefix_sequence == prefix
    assert report.is_prefix
    assert not sequences(report.left_out) & sequences(report.missing)
    assert all(number > prefix for number in sequences(report.left_out))


def check_each(
    before: Image,
    images: Iterable[tuple[str, Image]],
    *,
    stride: int = 1,
    counts: Counter[str] | None = None,
) -> None:
    """Check every damage, and every `stride`-th one further."""
    for i, (damage, image) in enumerate(images):
        if counts is not None:
            counts["stores"] += 1
        try:
            check(before, image, further=i % stride == 0)
        except BaseException as error:
            error.add_note(f"after this damage: {damage}")
            raise


def test_an_undamaged_store_is_saved_whole(store_image):
    check(store_image, store_image)
    report, _ = repaired(store_image)
    assert report.is_complete
    assert report.is_prefix


def test_every_truncation(store_image):
    check_each(store_image, truncations(store_image), stride=32)


def test_every_byte_with_one_flipped_bit(store_image, rng):
    images = flips(store_image, lambda: [rng.randrange(8)])
    check_each(store_image, images, stride=32)


def test_zeros_anywhere(store_image):
    check_each(store_image, zeroed(store_image), stride=32)


@pytest.mark.slow
@pytest.mark.timeout(0)
def test_every_truncation_at_length(store_image, campaign, request):
    with campaign(f"repaired truncations, {request.node.callspec.id}") as counts:
        check_each(store_image, truncations(store_image), counts=counts)


@pytest.mark.slow
@pytest.mark.timeout(0)
def test_every_flipped_bit(store_image, campaign, request):
    with campaign(f"repaired flipped bits, {request.node.callspec.id}") as counts:
        images = flips(store_image, lambda: range(8))
        check_each(store_image, images, counts=counts)


# Files that are missing, renamed, swapped, doubled, foreign, or damaged all over


def check_nothing_is_invented(image: Image) -> None:
    """The result opens, and holds no record that no batch has ever put there."""
    ever = {(key, new) for batch in BATCHES for key, new in batch if new}
    for prefix_only in (False, True):
        report, result = repaired(image, prefix_only=prefix_only)
        state, sequence = oracle.read_store(result)
        assert set(state.items()) <= ever
        assert sequence == report.sequence <= LAST
        if report.is_prefix:
            assert state == STATES[sequence]
        check_it_opens(result, state, sequence)
    sound = expected(image)
    if sound is not None:
        assert oracle.read_store(repaired(image)[1])[0] == sound


def check_each_for_inventions(
    images: Iterable[tuple[str, Image]], counts: Counter[str] | None = None
) -> None:
    for damage, image in images:
        if counts is not None:
            counts["stores"] += 1
        try:
            check_nothing_is_invented(image)
        except BaseException as error:
            error.add_note(f"after this damage: {damage}")
            raise


def test_files_that_are_missing_or_in_another_place(store_image):
    check_each_for_inventions(rearranged(store_image))


def test_a_few_random_damages(store_image, rng):
    check_each_for_inventions(randomly_damaged(store_image, rng, 20))


@pytest.mark.slow
@pytest.mark.timeout(0)
def test_many_random_damages(store_image, rng, campaign, request):
    with campaign(f"repaired random damages, {request.node.callspec.id}") as counts:
        images = randomly_damaged(store_image, rng, N_DAMAGES_LONG)
        check_each_for_inventions(images, counts)


def test_a_missing_log_is_named_by_its_sequences():
    image = small(STORES["two-logs"]())
    second = max(image)
    report, result = repaired({second: image[second]})
    assert report.missing == ((1, 2),)
    assert not report.is_prefix
    wanted = apply(apply({}, BATCHES[2]), BATCHES[3])
    assert oracle.read_store(result) == (wanted, LAST)
    report, result = repaired({second: image[second]}, prefix_only=True)
    assert report.left_out == ((3, 4),)
    assert oracle.read_store(result) == ({}, 0)


@pytest.mark.parametrize("name", ["two-logs", "snapshot-and-log", "bounded-log"])
def test_a_renamed_file_still_says_what_it_is(name):
    image = small(STORES[name]())
    for old in image:
        renamed = {f"{new[:-2]}77" if new == old else new: image[new] for new in image}
        report, result = repaired(renamed)
        assert oracle.read_store(result) == (STATES[-1], LAST), old
        assert report.is_prefix


def test_a_copy_of_a_log_adds_nothing():
    image = small(STORES["two-logs"]())
    name = min(image)
    report, result = repaired(image | {f"{name[:-2]}77": image[name]})
    assert oracle.read_store(result) == (STATES[-1], LAST)
    assert report.n_batches == LAST


def test_a_whole_copy_stands_in_for_a_damaged_log():
    image = small(STORES["two-logs"]())
    name = min(image)
    damaged = image | {name: oracle.flip_bit(image[name], 130)}
    for copy in ("log_0000000000000077", "log_0000000000000003"):
        report, result = repaired(damaged | {copy: image[name]})
        assert oracle.read_store(result) == (STATES[-1], LAST)
        assert report.is_prefix


def test_a_file_of_another_store_is_not_used():
    image = small(STORES["two-logs"]())
    foreign = small(STORES["sealed-log"]())
    name = "log_0000000000000003"
    report, result = repaired(image | {name: foreign[min(foreign)]})
    assert oracle.read_store(result) == (STATES[-1], LAST)
    (found,) = (file for file in report.files if file.name == name)
    assert "another store" in found.fate


def test_what_a_later_log_has_superseded_stays_dead():
    """Behind a torn batch 2 lies a whole batch 3 that was never acknowledged."""
    store_id = bytes(range(16))
    old = oracle.write_log(
        store_id,
        1,
        1,
        [[(1, 11, b"")], [(2, 22, b"")], [(3, 33, b"old")]],
        durables=[0, 0, 0],
        sealed=False,
    )
    second = oracle.frame_offsets(old)[1]
    old = oracle.flip_bit(old, second + 50)
    new = oracle.write_log(store_id, 2, 2, [[(4, 44, b"")]], sealed=False)
    image: Image = {oracle.file_name("log", 1): old}
    report, result = repaired(image)
    assert oracle.read_store(result) == ({1: (11, b"")}, 1)
    assert report.is_complete
    assert report.files[0].torn is not None
    image[oracle.file_name("log", 2)] = new
    for damaged in (image, image | {oracle.file_name("log", 2): bytes(64) + new[64:]}):
        report, result = repaired(damaged)
        assert oracle.read_store(result) == ({1: (11, b""), 4: (44, b"")}, 2)


def test_user_data_that_looks_like_frames_is_not_taken_for_them():
    """A damaged batch holds bytes of its own log: its inside is passed by."""
    store_id = bytes(range(16))
    forged = oracle.write_log(store_id, 1, 3, [[(9, 99, b"never written")]])
    inside = bytes(4) + forged[64:]  # at a multiple of 8 in the file
    batches = [[(1, 11, b"")], [(2, 22, inside)], [(3, 33, b"")]]
    data = oracle.write_log(store_id, 1, 1, batches)
    assert data.index(forged[64:]) % 8 == 0
    damaged = oracle.flip_bit(data, oracle.frame_offsets(data)[1] + 60)
    report, result = repaired({oracle.file_name("log", 1): damaged})
    assert oracle.read_store(result) == ({1: (11, b""), 3: (33, b"")}, 3)
    assert report.missing == ((2, 2),)


def test_an_older_copy_inside_a_batch_without_header_is_passed_by_too():
    """Its sequences are behind what is expected, whatever its checksums say."""
    store_id = bytes(range(16))
    older = oracle.write_log(store_id, 1, 1, [[(1, 1, b"")], [(1, 2, b"")]])
    batches = [[(1, 11, b"")], [(1, 12, b"")], [(2, 22, bytes(4) + older[64:])]]
    data = oracle.write_log(store_id, 1, 1, [*batches, [(3, 33, b"")]])
    damaged = oracle.flip_bit(data, oracle.frame_offsets(data)[2] + 8)
    report, result = repaired({oracle.file_name("log", 1): damaged})
    assert oracle.read_store(result) == ({1: (12, b""), 3: (33, b"")}, 4)
    assert report.missing == ((3, 3),)


# Snapshots of several blocks


def blocks_image(n_blocks: int = 4) -> tuple[Image, bytes]:
    blocks = [
        [(100 * i + j, i + 1, b"data %d" % j) for j in range(1, 6)]
        for i in range(n_blocks)
    ]
    data = oracle.write_snapshot(bytes(range(16)), 5, 50, blocks)
    return {oracle.file_name("snapshot", 5): data}, data


def test_whole_blocks_of_a_damaged_snapshot_are_saved():
    image, data = blocks_image()
    name = min(image)
    offsets = oracle.frame_offsets(data)
    for i in range(4):
        for place in (4, 60):  # its header, its payload
            damaged = {name: oracle.flip_bit(data, offsets[i] + place)}
            report, result = repaired(damaged)
            state, sequence = oracle.read_store(result)
            assert sequence == 50
            keys = [100 * k + j for k in range(4) for j in range(1, 6) if k != i]
            assert sorted(state) == keys
            (lost,) = report.files[0].blocks_lost
            assert (lost.first_key, lost.last_key) == (100 * i + 1, 100 * i + 5)
            assert lost.n_records == 5
            assert not report.is_prefix
            assert not report.is_complete


def test_lost_keys_are_bounded_by_neighbours_where_the_index_is_gone_too():
    image, data = blocks_image()
    offsets = oracle.frame_offsets(data)
    damaged = oracle.flip_bit(data, offsets[1] + 60)
    damaged = oracle.flip_bit(damaged, offsets[4] + 60)
    report, result = repaired({min(image): damaged})
    (lost,) = report.files[0].blocks_lost
    assert (lost.first_key, lost.last_key, lost.n_records) == (6, 200, None)
    assert len(oracle.read_store(result)[0]) == 15


def test_a_snapshot_whose_blocks_are_all_whole_is_a_correct_prefix():
    image, data = blocks_image()
    wanted = oracle.read_store(image)
    end = oracle.frame_offsets(data)[4]
    for place in (3, 20, 45, end + 4, end + 60, len(data) - 3):
        damaged = oracle.flip_bit(data, place)
        report, result = repaired({min(image): damaged})
        assert oracle.read_store(result) == wanted
        assert report.is_prefix


def without_sequence(data: bytes) -> bytes:
    """A snapshot that does not tell its batch: header and end frame are damaged."""
    return oracle.flip_bit(
        oracle.flip_bit(data, 48), oracle.frame_offsets(data)[-1] + 10
    )


def test_a_snapshot_that_does_not_tell_its_batch_is_no_known_prefix():
    """The story: its blocks were saved as the state after batch 0, called a prefix."""
    image, data = blocks_image()
    wanted, _ = oracle.read_store(image)
    report, result = repaired({min(image): without_sequence(data)})
    assert oracle.read_store(result) == (wanted, 0)
    assert not report.is_prefix
    assert not report.is_complete
    assert report.files[0].sequence_unknown
    assert "nothing says up to which batch it goes" in str(report)
    report, result = repaired({min(image): without_sequence(data)}, prefix_only=True)
    assert oracle.read_store(result) == ({}, 0)


def test_a_snapshot_that_does_not_tell_its_batch_is_newer_than_the_logs_within_it():
    """The story: such a log, left by an interrupted removal, was replayed over it."""
    image, data = blocks_image()
    old = oracle.write_log(bytes(range(16)), 5, 41, [[(1, 77, b"old"), (2, 0, b"")]])
    damaged = {
        min(image): without_sequence(data),
        oracle.file_name("log", 5): old,
    }
    report, result = repaired(damaged)
    assert oracle.read_store(result) == (oracle.read_store(image)[0], 41)
    assert not report.is_prefix


@pytest.mark.parametrize("number", [6, 7])
def test_only_the_very_next_log_tells_the_batch_of_a_snapshot(number):
    """The story: with the log between lost, the result was still called a prefix."""
    image, data = blocks_image()
    first = 51 + 10 * (number - 6)
    log = oracle.write_log(bytes(range(16)), number, first, [[(1, 77, b"new")]])
    damaged = {
        min(image): without_sequence(data),
        oracle.file_name("log", number): log,
    }
    report, result = repaired(damaged)
    wanted = oracle.read_store(image)[0] | {1: (77, b"new")}
    assert oracle.read_store(result) == (wanted, first)
    assert report.is_prefix is (number == 6)
    assert report.missing == ()


def test_batches_go_over_what_was_saved_of_a_snapshot():
    """The log behind a damaged snapshot counts; the older files fill what is lost."""
    image, data = blocks_image()
    store_id = bytes(range(16))
    older = oracle.write_snapshot(
        store_id, 3, 40, [[(k, 77, b"") for k in (1, 101, 150, 201, 999)]]
    )
    log = oracle.write_log(store_id, 6, 51, [[(301, 5, b"new"), (2, 0, b"")]])
    damaged = oracle.flip_bit(data, oracle.frame_offsets(data)[1] + 60)
    report, result = repaired(
        {
            min(image): damaged,
            oracle.file_name("snapshot", 3): older,
            oracle.file_name("log", 6): log,
        }
    )
    state, sequence = oracle.read_store(result)
    assert sequence == 51
    assert 2 not in state
    assert state[301] == (5, b"new")
    assert state[1] == (1, b"data 1")  # a whole block has the last word in its range
    assert state[101] == state[150] == state[999] == (77, b"")
    assert report.prefix_sequence == 40
    assert not report.missing


# Headers that are gone


@pytest.mark.parametrize("name", ["sealed-log", "open-log", "snapshot"])
@pytest.mark.parametrize("header", [bytes(64), bytes(range(64))], ids=["zero", "noise"])
def test_the_only_header_is_gone(name, header):
    """Two checksums of 32 bits agree on one seed, and that is proof enough."""
    image = small(STORES[name]())
    (file,) = image
    report, result = repaired({file: header + image[file][64:]})
    assert oracle.read_store(result)[0] == STATES[-1]
    assert report.prefix_sequence == LAST


def test_one_frame_alone_proves_nothing():
    store_id = bytes(range(16))
    data = oracle.write_log(store_id, 1, 1, [[(1, 11, b"")]], sealed=False)
    name = oracle.file_name("log", 1)
    report, result = repaired({name: bytes(64) + data[64:]})
    assert oracle.read_store(result) == ({}, 0)
    assert not report.is_complete
    assert "proven" in report.files[0].fate


def test_noise_agrees_on_no_seed(rng):
    for _ in range(20):
        words = [rng.choice([1 << 32, 0, 7, rng.getrandbits(64)]) for _ in range(2_000)]
        view = memoryview(np.array(words, dtype=np.uint64).tobytes())
        file = Evidence.of(repair.FileName("log", 1), view, "noise")
        assert find_store_seed([file]) is None


# The medium


def test_a_sector_that_cannot_be_read_costs_what_lies_in_it():
    """One of three: the copy has zeros there, and the report says so."""
    store_id = bytes(range(16))
    batches = [[(number, number, b"x" * 4_096)] for number in range(1, 9)]
    data = oracle.write_log(store_id, 1, 1, batches)
    name = oracle.file_name("log", 1)
    old, new = Disk({name: data}), Disk({})
    source = SimulatedDirectory(old)
    bad = range(8_192, 12_288)

    file_type = type(source.open(name))
    read = file_type.read

    def read_or_fail(file: object, offset: int, size: int) -> bytes:
        meets = offset < bad.stop and offset + size > bad.start
        if file._disk is old and meets:
            raise OSError(errno.EIO, os.strerror(errno.EIO), name)
        return read(file, offset, size)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(file_type, "read", read_or_fail)
        report = repair.repair_into({"": source}, SimulatedDirectory(new))
    (gap,) = report.unreadable[name]
    assert (gap.offset, gap.size) == (bad.start, 4_096)
    lost = {
        span.sequence
        for span in verbs.batches_in(data)
        if span.offset < bad.stop and span.end > bad.start
    }
    assert sequences(report.missing) == lost
    assert not report.is_complete


@pytest.mark.parametrize("kind", ["log", "snapshot"])
def test_a_header_that_cannot_be_read_costs_what_lies_in_it(
    tmp_path, monkeypatch, kind
):
    """A look at the versions ahead of the copy met the error, and ended the repair."""
    path = tmp_path / "db"
    store, _ = MetadataStore.recover(path)
    store.insert_batch([(1, (1, b"in the snapshot"))])
    store.compact()
    store.insert_batch([(2, (2, b"in the log"))])
    store.shutdown()
    (bad,) = verbs.named(path, kind)
    read = File.read

    def read_or_fail(file: File, offset: int, size: int) -> bytes:
        if file.path == str(bad) and offset < 512 and size:
            raise OSError(errno.EIO, os.strerror(errno.EIO), file.path)
        return read(file, offset, size)

    monkeypatch.setattr(File, "read", read_or_fail)
    report = repair.repair(path, tmp_path / "new")
    monkeypatch.undo()
    (gap,) = report.unreadable[bad.name]
    assert gap.offset == 0
    found = verbs.read(tmp_path / "new")
    other = (
        (2, (2, b"in the log")) if kind == "snapshot" else (1, (1, b"in the snapshot"))
    )
    assert dict([other]).items() <= found.items()


def test_a_result_that_does_not_read_back_opens_as_no_store(tmp_path, monkeypatch):
    """The file that keeps it from opening was removed before the result was checked."""
    verbs.write(tmp_path / "db", verbs.numbered(3))

    def fail(*_: object) -> None:
        raise CorruptionError("new", 0, "planted")

    monkeypatch.setattr(repair, "_check_result", fail)
    with pytest.raises(CorruptionError, match="planted"):
        repair.repair(tmp_path / "db", tmp_path / "new")
    with pytest.raises(CorruptionError):
        MetadataStore.recover(tmp_path / "new")


def test_every_call_on_the_destination_fails_once():
    """A repair that fails leaves no store that opens, or the whole result."""
    image = small(STORES["snapshot-and-log"]())
    name = max(image)
    image[name] = oracle.flip_bit(image[name], 130)
    wanted = oracle.read_store(repaired(image)[1])[0]
    n_calls = 0
    for number in range(1, 1_000):
        old, new = Disk(image), Disk({})
        left = [number]

        def fail(operation: Operation, left: list[int] = left) -> Fault | None:
            left[0] -= 1
            return Fault(errno.ENOSPC) if left[0] == 0 else None

        new.before = fail
        with contextlib.suppress(OSError):
            repair.repair_into(
                {"": SimulatedDirectory(old)}, SimulatedDirectory(new, "new")
            )
        new.before = None
        if left[0] > 0:
            break
        n_calls += 1
        assert old.live_image() == image
        check_unfinished(new, wanted)
    assert n_calls > 20
    print(f"{n_calls} calls failed, one at a time")


def check_unfinished(new: Disk, wanted: State) -> None:
    """The destination refuses to open, is whole, or was not begun."""
    names = set(new.live_image()) - {"quarantine"}
    if not names:
        return
    new.opened.clear()
    new.lock_holder = None
    try:
        store, recovered = recover_on(new, threads=1)
    except CorruptionError:
        return
    assert content(recovered) == wanted
    store.shutdown()


# The command, on real directories


@pytest.fixture
def store(db: Path) -> Path:
    """A snapshot of 4 batches, a sealed log of 3, and one that a kill left open."""
    verbs.write(db, verbs.numbered(4))
    opened, _ = MetadataStore.recover(db)
    with opened:
        opened.compact()
    verbs.write(db, verbs.numbered(3, 5))
    verbs.write_open(db, verbs.numbered(3, 8))
    return db


@pytest.fixture
def damaged(store: Path) -> Path:
    """The same with batch 6 damaged."""
    sealed = verbs.logs(store)[0]
    verbs.flip(sealed, verbs.batches_in(sealed.read_bytes())[1].offset + 60)
    return store


def digest(path: Path) -> list[tuple[object, ...]]:
    found = []
    for name in [path, *sorted(path.rglob("*"))]:
        status = name.lstat()
        data = name.read_bytes() if name.is_file() else b""
        found.append(
            (name, status.st_mode, status.st_mtime_ns, hashlib.sha256(data).hexdigest())
        )
    return found


def test_the_command(damaged: Path, tmp_path: Path, run: Run) -> None:
    before = digest(damaged)
    status, output, errors = run("repair", damaged, tmp_path / "new" / "er")
    assert (status, errors) == (1, "")
    assert "missing: batches 6\n" in output
    assert "NOT A PREFIX" in output
    assert digest(damaged) == before
    held = {}
    for batch in verbs.numbered(10):
        if batch[0][1] != (6, b""):
            held = apply(held, batch)
    assert verbs.read(tmp_path / "new" / "er") == held
    copy = tmp_path / "new" / "er" / "quarantine" / "original"
    assert verbs.files(copy) == verbs.files(damaged)
    n_files, size = (
        len(list(copy.iterdir())),
        sum(p.stat().st_size for p in copy.iterdir()),
    )
    told = f"quarantine  {n_files} files, {size:,} bytes"
    assert told in run("info", tmp_path / "new" / "er")[1]


def test_the_command_with_prefix_as_json(damaged: Path, db: Path, run: Run) -> None:
    new = db.with_name("new")
    status, output, _ = run("repair", "--prefix", "--json", damaged, new)
    assert status == 1
    report = json.loads(output)
    assert report["missing"] == [[6, 6]]
    assert report["left_out"] == [[7, 10]]
    assert report["prefix_sequence"] == report["sequence"] == 5
    assert report["is_prefix"] is True
    assert verbs.read(new) == verbs.states(verbs.numbered(5))[-1]
    copied, _ = MetadataStore.recover(new / "quarantine/original", on_damage="prefix")
    copied.shutdown()


def test_verify_names_every_bad_frame_and_not_only_the_first(
    store: Path, run: Run
) -> None:
    sealed, last = verbs.logs(store)
    (snapshot,) = verbs.snapshots(store)
    places = {}
    for path, frames in ((sealed, (0, 2)), (last, (0,)), (snapshot, (0,))):
        spans = verbs.spans(path.read_bytes())
        places[path.name] = [(spans[i].offset, spans[i].size) for i in frames]
        for i in frames:
            verbs.flip(path, spans[i].offset + 60)
    status, output, _ = run("verify", "--json", store)
    assert status == 1
    found = {
        file["name"]: [(gap["offset"], gap["size"]) for gap in file["gaps"]]
        for file in json.loads(output)["files"]
    }
    assert found == places
    assert run("verify", store)[1].count("not whole: ") == 4


def test_a_sound_store_is_copied_whole(store: Path, tmp_path: Path, run: Run) -> None:
    status, output, _ = run("repair", store, tmp_path / "new")
    assert status == 0
    assert "nothing is known to be missing" in output
    assert verbs.read(tmp_path / "new") == verbs.states(verbs.numbered(10))[-1]


def test_every_file_in_the_directory_is_copied(damaged: Path, tmp_path: Path) -> None:
    (damaged / "notes.txt").write_bytes(b"not ours")
    (damaged / "log_00000000000000ff.tmp").write_bytes(b"left over")
    (damaged / "quarantine").mkdir(exist_ok=True)
    (damaged / "quarantine" / "torn_log").write_bytes(b"older")
    (damaged / "quarantine" / "original").mkdir()
    (damaged / "quarantine" / "original" / "log").write_bytes(b"of an earlier repair")
    (damaged / "folder").mkdir()
    (damaged / "link").symlink_to("notes.txt")
    report = repair.repair(damaged, tmp_path / "new")
    assert set(report.not_copied) == {"folder", "link", "quarantine/original"}
    assert "not copied, directories or links or the like: " in str(report)
    copy = tmp_path / "new" / report.original
    assert (copy / "notes.txt").read_bytes() == b"not ours"
    assert (copy / "quarantine" / "torn_log").read_bytes() == b"older"
    assert (copy / "log_00000000000000ff.tmp").read_bytes() == b"left over"


def test_a_holder_is_named_and_no_obstacle(db: Path, tmp_path: Path, run: Run) -> None:
    opened, _ = MetadataStore.recover(db)
    with opened:
        opened.insert_batch([(1, (11, b""))])
        status, output, _ = run("repair", db, tmp_path / "new")
    assert status == 0
    assert f"process {os.getpid()} holds the source" in output
    assert verbs.read(tmp_path / "new") == {1: (11, b"")}


def full(path: Path) -> Path:
    path.mkdir()
    (path / "mine").write_bytes(b"")
    return path


def linked(store: Path, path: Path) -> Path:
    path.symlink_to(store)
    return path / "new"


DESTINATIONS = {
    "not empty": lambda store, tmp_path: full(tmp_path / "full"),
    "the source": lambda store, tmp_path: store,
    "in the source": lambda store, tmp_path: store / "new",
    "in the source, by a link": lambda store, tmp_path: linked(store, tmp_path / "to"),
    "in the source, by dots": lambda store, tmp_path: store / "a" / ".." / "new",
    "a file": lambda store, tmp_path: full(tmp_path / "full") / "mine",
    "nowhere": lambda store, tmp_path: Path("/proc/new"),
    "below a file": lambda store, tmp_path: full(tmp_path / "full") / "mine" / "new",
}


@pytest.mark.parametrize("destination", DESTINATIONS)
def test_destinations_that_are_not_fit(destination, damaged, tmp_path, run):
    path = DESTINATIONS[destination](damaged, tmp_path)
    before = digest(tmp_path)
    status, output, errors = run("repair", damaged, path)
    assert (status, output) == (2, "")
    assert errors.startswith("metastore: ")
    assert errors.count("\n") == 1
    assert digest(tmp_path) == before


def test_sources_that_are_no_store(tmp_path: Path, run: Run) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").write_bytes(b"")
    for name in ("empty", "file", "missing"):
        status, output, errors = run("repair", tmp_path / name, tmp_path / "new")
        assert (status, output) == (2, ""), name
        assert errors.count("\n") == 1
        assert not (tmp_path / "new").exists()


def test_another_format_version_is_refused(store: Path, tmp_path: Path) -> None:
    log = verbs.logs(store)[0]
    data = oracle.set_file_field(log.read_bytes(), "version", 2)
    log.write_bytes(oracle.fix_file_header(data))
    with pytest.raises(FormatVersionError):
        repair.repair(store, tmp_path / "new")
    assert not (tmp_path / "new").exists()


def test_a_read_only_source_is_enough(damaged: Path, tmp_path: Path, run: Run) -> None:
    for path in (*damaged.iterdir(), damaged):
        path.chmod(0o500 if path.is_dir() else 0o400)
    assert run("repair", damaged, tmp_path / "new")[0] == 1
    damaged.chmod(0o700)


@pytest.mark.skipif(os.geteuid() != 0, reason="only root may mount a small disk")
def test_a_full_disk(damaged: Path, tmp_path: Path, run: Run) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=128k", "tmpfs", str(disk)]
    if subprocess.run(command, capture_output=True, check=False).returncode:
        pytest.skip("no file system may be mounted here")
    try:
        status, _, errors = run("repair", damaged, disk / "new")
        assert status == 2
        assert "No space left" in errors
        with pytest.raises(MetastoreError):
            MetadataStore.recover(disk / "new")
    finally:
        subprocess.run(["umount", str(disk)], check=True)


def test_large_logs_are_walked_in_windows(db: Path, tmp_path: Path) -> None:
    """Frames larger than a window, and many small ones, around a hole."""
    generator = random.Random(7)
    opened, _ = MetadataStore.recover(db, log_size_bytes_min=2**40)
    batches: list[verbs.Batch] = []
    for number in range(1, 41):
        size = 3 << 20 if number % 20 == 0 else 30
        batches.append([(number % 7, (number, generator.randbytes(size)))])
    with opened:
        for batch in batches:
            opened.insert_batch(batch, sync=False)
        keys = np.arange(100_000, dtype=np.uint64)
        opened.insert_arrays(keys + np.uint64(100), keys + np.uint64(1), sync=False)
    (log,) = verbs.logs(db)
    verbs.flip(log, verbs.batches_in(log.read_bytes())[9].offset + 1)
    report = repair.repair(db, tmp_path / "new", threads=2)
    assert report.missing == ((10, 10),)
    assert report.n_batches == 40
    assert report.n_records == 100_007
    assert report.files[0].whole == ((1, 9), (11, 41))
