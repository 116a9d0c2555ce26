"""metastore's codec against the oracle."""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import random
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest
import zstandard
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import oracle
import strategies
from metastore import (
    MetadataStore,
    _codec,
    _merge,
    compaction,
    frames,
    log,
    recovery,
    snapshot,
)
from metastore import format as layouts
from metastore.arguments import payload_of_arrays
from metastore.columns import Columns, Recovered
from metastore.directory import Directory
from metastore.errors import CorruptionError, FormatVersionError
from verbs import to_columns, to_records

STORE_ID = bytes(range(16))
LOG = oracle.FileHeader("log", STORE_ID, 3, 1)
SNAPSHOT = oracle.FileHeader("snapshot", STORE_ID, 3, 9)
SEQUENCE = 5
LEVEL = 1

Records = list[oracle.Record]


def metastore_reads(data: bytes, offset: int = 0) -> Records | None:
    """The batch that metastore finds at `offset`; None if it refuses it."""
    view = memoryview(data)
    table = frames.new_table(1)
    n, _, _ = _codec.scan_frames(view, offset, LOG.seed, SEQUENCE, table)
    if n == 0:
        return None
    found, n, _ = frames.decode(view, table)
    return to_records(found) if n else None


def oracle_reads(data: bytes, offset: int = 0) -> Records | None:
    """The same of the oracle."""
    try:
        return oracle.read_frame(data, offset, LOG, SEQUENCE).records
    except oracle.OracleError:
        return None


def finished(frame: bytearray) -> bytes:
    """The bytes of a batch that metastore encoded."""
    _codec.finish_frame(frame, LOG.seed, SEQUENCE, SEQUENCE - 1)
    return bytes(frame)


def arrays_frame(records: Records) -> bytearray:
    """The frame that ``insert_arrays`` starts."""
    payload = payload_of_arrays(*to_columns(records).arrays())
    return frames.encode_arrays(payload, LEVEL)


def batch_frame(payload: oracle.Payload) -> bytes:
    """The frame of a batch around any payload, valid or not."""
    return oracle.pack_frame(
        LOG.seed, oracle.BATCH, payload, sequence=SEQUENCE, durable=SEQUENCE - 1
    )


# What the one writes, the other reads


@settings(max_examples=30)
@given(strategies.batches())
def test_oracle_reads_a_batch_of_tuples(records: Records) -> None:
    batch = as_batch(records)
    data = finished(frames.encode_batch(batch, LEVEL))
    assert data == batch_frame(oracle.pack_plain(records))
    assert metastore_reads(data) == records


def test_integers_of_every_number_of_digits() -> None:
    """CPython keeps 30 bits in a digit, on some machines 15."""
    powers = [1 << bits for bits in (0, 14, 15, 16, 29, 30, 31, 45, 59, 60, 61, 63)]
    numbers = [power + more for power in powers for more in (-1, 0, 1) if power + more]
    numbers.append(2**64 - 1)
    records = [(key, key, b"") for key in numbers]
    assert metastore_reads(finished(frames.encode_batch(as_batch(records), LEVEL))) == (
        records
    )
    likes = [(np.uint64(key), (np.uint64(key), b"")) for key in numbers]
    assert metastore_reads(finished(frames.encode_batch(likes, LEVEL))) == records


@settings(max_examples=30)
@given(strategies.batches())
def test_oracle_reads_plain_columns(records: Records) -> None:
    data = finished(arrays_frame(records))
    assert data == batch_frame(oracle.pack_plain(records))


@settings(max_examples=45)
@given(strategies.shaped, st.sampled_from([1, 3, 9]))
def test_oracle_reads_blocks(records: Records, level: int) -> None:
    frame = frames.encode_block(to_columns(records), level)
    _codec.finish_frame(frame, SNAPSHOT.seed, 0, 0)
    block = oracle.read_frame(bytes(frame), 0, SNAPSHOT, 10)
    assert block.records == records
    assert block.size == len(frame)
    # A block is packed if and only if that makes it smaller than plain.
    plain_size = len(oracle.pack_plain(records).data)
    is_packed = block.payload.layout == oracle.PACKED
    assert len(block.payload.data) < plain_size or not is_packed

    table = frames.new_table(1)
    scanned = _codec.scan_frames(frame, 0, SNAPSHOT.seed, 0, table, True)
    assert scanned == (1, len(frame), _codec.SCAN_MORE)
    found, n, status = frames.decode(memoryview(frame), table)
    assert (n, status) == (1, 0)
    assert to_records(found) == records
    assert _codec.first_disorder(found.keys, found.values) == -1


def test_a_block_is_within_its_user_data() -> None:
    keys, values, offsets, user_data = to_columns(SORTED).arrays()
    with pytest.raises(ValueError, match="beyond the user data"):
        frames.encode_block(Columns(keys, values, offsets, user_data[:-1]), LEVEL)


@settings(max_examples=20)
@given(st.integers(0, 2**32 - 1), st.sampled_from(["any", "text", "counter"]))
def test_oracle_reads_large_batches(seed: int, user_data: str) -> None:
    rng = random.Random(seed)
    records = strategies.shaped_records(rng, 400, length=300, user_data=user_data)
    rng.shuffle(records)
    records += [(key, 0, b"") for key, _, _ in records[:20]] + records[10:15]
    batch = as_batch(records)
    for frame in (
        arrays_frame(records),
        frames.encode_batch(batch, LEVEL),
    ):
        data = finished(frame)
        assert oracle_reads(data) == metastore_reads(data) == records
        layout = oracle.get_field(data, 0, "layout")
        assert layout == (oracle.PLAIN if user_data == "any" else oracle.PACKED)


def test_every_form_of_packing_is_written(rng: random.Random) -> None:
    shapes: list[tuple[str, str, int | str, str]]
    shapes = [(keys, "alike", 8, "any") for keys in strategies.KEY_SHAPES]
    shapes += [("any", values, 8, "any") for values in strategies.VALUE_SHAPES]
    shapes += [
        ("any", "alike", length, user_data)
        for length in strategies.LENGTHS
        for user_data in strategies.BYTE_SHAPES
    ]
    found = set()
    for shape in shapes:
        records = strategies.shaped_records(rng, 300, *shape)
        frame = frames.encode_block(to_columns(records), LEVEL)
        found |= forms_of(bytes(frame))
    assert found >= {
        *(("keys", form) for form in ("delta", "planes", "zstd")),
        *(("values", form) for form in ("none", "delta", "planes", "whole")),
        *(("values", form) for form in ("constant", "raw", "zstd")),
        *(("lengths", form) for form in ("planes", "constant", "zstd")),
        *(("user data", form) for form in ("planes", "whole")),
        *(("user data", form) for form in ("constant", "raw", "zstd")),
    }


def forms_of(frame: bytes) -> set[tuple[str, str]]:
    """Which filters, shapes and encodings the columns of a frame have."""
    if oracle.get_field(frame, 0, "layout") == oracle.PLAIN:
        return set()
    payload = frame[48:]
    at = 16
    found = set()
    for which, name in enumerate(("keys", "values", "lengths", "user data")):
        column_filter, count, _ = oracle.PACKED_COLUMN.unpack_from(payload, 4 * which)
        found.add((name, "delta" if column_filter else "none"))
        found.add((name, "planes" if count > 1 else "whole"))
        for _ in range(count):
            _, encoding, _, _ = oracle.PACKED_SECTION.unpack_from(payload, at)
            found.add((name, ("constant", "raw", "zstd")[encoding]))
            at += 8
    return found


@settings(max_examples=45)
@given(strategies.batches(size_min=1), strategies.choices)
def test_metastore_reads_every_legal_packing(
    records: Records, choices: tuple[oracle.ColumnChoice, ...]
) -> None:
    data = batch_frame(oracle.pack_packed(records, choices))
    assert metastore_reads(data) == records


@settings(max_examples=30)
@given(strategies.shaped, strategies.choices)
def test_metastore_reads_long_packed_columns(
    records: Records, choices: tuple[oracle.ColumnChoice, ...]
) -> None:
    data = batch_frame(oracle.pack_packed(records, choices))
    assert metastore_reads(data) == records


@settings(max_examples=30)
@given(st.lists(strategies.batches(), max_size=5), st.integers(0, 7), st.booleans())
def test_metastore_scans_many_frames(
    batches: list[Records], shift: int, sealed: bool
) -> None:
    # The kernels load by memcpy: a base that is not aligned makes no difference.
    data = oracle.write_log(STORE_ID, 3, 1, batches, sealed=sealed, n_zeros=64)
    view = memoryview(bytes(shift) + data)[shift:]
    table = frames.new_table(len(batches) + 2)
    n, offset, status = _codec.scan_frames(view, 64, LOG.seed, 1, table)
    whole = oracle.read_log(data, 3, newest=True)
    assert n == len(batches)
    assert table[:n, _codec.ROW_OFFSET].tolist() == [b.offset for b in whole.batches]
    sizes = [len(batch) for batch in batches]
    assert table[:n, _codec.ROW_RECORDS].tolist() == sizes
    user_data_size = sum(len(data) for batch in batches for _, _, data in batch)
    assert _codec.totals(table[:n]) == (sum(sizes), user_data_size)
    if sealed:
        assert whole.end is not None
        assert (offset, status) == (whole.end.offset, _codec.SCAN_SEALED)
        assert int(table[n, _codec.ROW_OFFSET]) == offset
    else:
        assert offset == whole.content_size
        assert status == _codec.STATUS_BAD_HEADER
    found, decoded, _ = frames.decode(view, table[:n])
    assert decoded == n
    assert to_records(found) == [record for batch in batches for record in batch]


def test_payloads_are_decoded_up_to_the_first_bad_one() -> None:
    batches = [[(i, 7, b"data %d" % i)] for i in range(5)]
    data = oracle.write_log(STORE_ID, 3, 1, batches)
    data = oracle.flip_bit(data, oracle.frame_offsets(data)[3] + 50)
    table = frames.new_table(9)
    n, _, _ = _codec.scan_frames(data, 64, LOG.seed, 1, table)
    found, decoded, status = frames.decode(memoryview(data), table[:n])
    assert (decoded, status) == (3, _codec.STATUS_BAD_PAYLOAD)
    assert to_records(found) == [batch[0] for batch in batches[:3]]


# Forged frames whose checksums agree: refused exactly when the oracle refuses them


SORTED = [(key, 1000 * key, b"%04d" % key) for key in range(10, 74)]
HOSTILE_SIZES = (0, 1, 2, 7, 2**31 - 1, 2**31, 2**32 - 1)
HOSTILE_U64 = (*HOSTILE_SIZES, 2**32, 2**62, 2**63 - 1, 2**63, 2**64 - 48, 2**64 - 1)
FRAMES = {
    "plain": batch_frame(oracle.pack_plain(SORTED)),
    "packed": batch_frame(oracle.pack_packed(SORTED)),
    "whole columns": batch_frame(oracle.pack_packed(SORTED, oracle.PLAIN_CHOICES)),
    "one record": batch_frame(oracle.pack_plain(SORTED[:1])),
    "empty": batch_frame(oracle.pack_plain([])),
}


@pytest.mark.parametrize("name", FRAMES)
@pytest.mark.parametrize("field", [f for f in oracle.FRAME_FIELDS if f != "checksum"])
def test_forged_frame_header(name: str, field: str) -> None:
    data = FRAMES[name]
    now = oracle.get_field(data, 0, field)
    size = struct.calcsize(oracle.FRAME_FIELDS[field][1])
    numbers = {
        n for n in (*HOSTILE_U64, now - 1, now + 1, now + 8) if 0 <= n < 256**size
    }
    for number in sorted(numbers):
        forged = oracle.forge(data, 0, field, number, LOG.seed)
        found = metastore_reads(forged)
        assert found == oracle_reads(forged), number
        # Every field counts, but a lower durable is as good.
        if number != now and not (field == "durable" and number < now):
            assert found is None, number


def forge_packed(
    columns: list[oracle.PackedColumn], n_records: int | None = None, size: int = 256
) -> bytes:
    """The frame of SORTED with packed columns that a test has forged."""
    n_records = len(SORTED) if n_records is None else n_records
    stored = oracle.join_packed(columns)
    return batch_frame(oracle.Payload(oracle.PACKED, n_records, size, stored))


def forged_column(which: int, **changes: Any) -> list[oracle.PackedColumn]:
    found = oracle.packed_columns(SORTED, oracle.SORTED_CHOICES)
    found[which] = dataclasses.replace(found[which], **changes)
    return found


def forged_section(which: int, section: int, **changes: Any) -> bytes:
    found = oracle.packed_columns(SORTED, oracle.SORTED_CHOICES)
    sections = list(found[which].sections)
    sections[section] = dataclasses.replace(sections[section], **changes)
    found[which] = dataclasses.replace(found[which], sections=sections)
    return forge_packed(found)


@pytest.mark.parametrize("which", range(4))
def test_forged_column_table(which: int) -> None:
    columns = oracle.packed_columns(SORTED, oracle.SORTED_CHOICES)
    assert metastore_reads(forge_packed(columns)) == SORTED
    for claimed in (*range(68), 127, 128, 254, 255):
        data = forge_packed(forged_column(which, claimed_sections=claimed))
        found = metastore_reads(data)
        assert found == oracle_reads(data)
        assert (found is None) == (claimed != len(columns[which].sections))
    for column_filter in (0, 1, 2, 3, 128, 255):
        data = forge_packed(forged_column(which, filter=column_filter))
        assert metastore_reads(data) == oracle_reads(data)
        assert (oracle_reads(data) is not None) == (
            column_filter == oracle.NO_FILTER
            or (column_filter == oracle.DELTA and which in (oracle.KEYS, oracle.VALUES))
        )
    for zero in (1, 0x100, 0xFFFF):
        data = forge_packed(forged_column(which, zero=zero))
        assert oracle_reads(data) is None
        assert metastore_reads(data) is None


@pytest.mark.parametrize(("which", "section"), [(0, 0), (1, 0), (1, 7), (2, 1), (3, 3)])
def test_forged_section_table(which: int, section: int) -> None:
    columns = oracle.packed_columns(SORTED, oracle.SORTED_CHOICES)
    true_size = len(columns[which].sections[section].stored)
    encoding = columns[which].sections[section].encoding
    changes: list[dict[str, int]] = [
        {"claimed_size": size}
        for size in {*HOSTILE_SIZES, true_size - 1, true_size + 1}
        if size >= 0
    ]
    changes += [{"encoding": number} for number in (0, 1, 2, 3, 4, 128, 255)]
    changes += [{"zero": zero} for zero in (1, 0x100, 0xFFFF)]
    changes += [{"constant": constant} for constant in (1, 255)]
    for change in changes:
        data = forged_section(which, section, **change)
        found = metastore_reads(data)
        assert found == oracle_reads(data), change
        if "zero" in change or change.get("encoding", 0) > oracle.ZSTD:
            assert found is None, change
        if "constant" in change and encoding != oracle.CONSTANT:
            assert found is None, change


PLANE = b"ab" * 32  # of user data: 64 bytes, as many as there are records


def zstd_frames() -> dict[str, tuple[bytes, bool]]:
    """Stored bytes of a section that should hold PLANE, and whether they may stand."""
    good = oracle.pack_zstd(PLANE)
    unsized = zstandard.ZstdCompressor(write_content_size=False).compress(PLANE)
    checked = zstandard.ZstdCompressor(write_checksum=True).compress(PLANE)
    skippable = struct.pack("<II", 0x184D2A50, 4) + b"skip"
    dictionary = zstandard.ZstdCompressionDict(b"abababababababab" * 8)
    with_dictionary = zstandard.ZstdCompressor(dict_data=dictionary).compress(PLANE)
    return {
        "good": (good, True),
        "best level": (oracle.pack_zstd(PLANE, 19), True),
        "own checksum": (checked, True),
        "own checksum wrong": (oracle.flip_bit(checked, len(checked) - 1), False),
        "size not stated": (unsized, False),
        "content shorter": (oracle.pack_zstd(PLANE[:-1]), False),
        "content longer": (oracle.pack_zstd(PLANE + b"a"), False),
        "stated size wrong": (oracle.set_byte(good, 5, good[5] + 1), False),
        "cut": (good[:-1], False),
        "magic only": (good[:4], False),
        "byte behind": (good + b"\0", False),
        "two frames": (good + oracle.pack_zstd(b""), False),
        "skippable behind": (good + skippable, False),
        "skippable before": (skippable + good, False),
        "skippable alone": (struct.pack("<II", 0x184D2A50, 64), False),
        "other magic": (oracle.flip_bit(good, 0), False),
        "dictionary": (with_dictionary, False),
        "not zstd": (b"\0" * 20, False),
        "nothing": (b"", False),
        "does not shrink": (good + bytes(64 - len(good)), False),
    }


@pytest.mark.parametrize("name", zstd_frames())
def test_forged_zstd_section(name: str) -> None:
    stored, valid = zstd_frames()[name]
    records = [
        (key, value, b"%c--%c" % (a, a))
        for (key, value, _), a in zip(SORTED, PLANE, strict=True)
    ]
    found = oracle.packed_columns(records, oracle.SORTED_CHOICES)
    sections = list(found[oracle.USER_DATA].sections)
    sections[3] = oracle.Section(oracle.ZSTD, stored)
    found[oracle.USER_DATA] = oracle.PackedColumn(oracle.NO_FILTER, sections)
    data = forge_packed(found)
    assert oracle_reads(data) == (records if valid else None)
    assert metastore_reads(data) == oracle_reads(data)


def test_zstd_frame_must_be_smaller_than_its_content() -> None:
    # Valid zstd, of the right size, and longer than what it unpacks to.
    stored = oracle.pack_zstd(PLANE[:2])
    for size in (2, 2 + 62):
        assert (len(stored) < size) == (size > 2)
    records = [(1, 1, b"ab")]
    found = oracle.packed_columns(records, oracle.PLAIN_CHOICES)
    found[oracle.USER_DATA] = oracle.PackedColumn(
        oracle.NO_FILTER, [oracle.Section(oracle.ZSTD, stored)]
    )
    data = forge_packed(found, n_records=1, size=2)
    assert oracle_reads(data) is None
    assert metastore_reads(data) is None


@pytest.mark.parametrize("width", [1, 2, 63, 64, 65])
@pytest.mark.parametrize("same", [True, False])
def test_planes_of_user_data_need_one_length(width: int, same: bool) -> None:
    lengths = [width] * 4 if same else [width - 1, width + 1, width, width]
    records = [(i, 1, b"u" * length) for i, length in enumerate(lengths)]
    found = oracle.packed_columns(records, oracle.PLAIN_CHOICES)
    planes = oracle.split_planes(b"u" * (4 * width), width)
    found[oracle.USER_DATA] = oracle.PackedColumn(
        oracle.NO_FILTER, [oracle.Section(oracle.RAW, plane) for plane in planes]
    )
    data = forge_packed(found, n_records=4, size=4 * width)
    legal = (same and width <= 64) or width == 1  # one section is never planes
    assert oracle_reads(data) == (records if legal else None)
    assert metastore_reads(data) == oracle_reads(data)


def constant_frame(n_records: int, user_data_size: int = 0) -> bytes:
    """The emptiest packed frame: four constant sections, 48 bytes of payload."""
    table = [
        oracle.PackedColumn(oracle.NO_FILTER, [oracle.Section(oracle.CONSTANT)])
        for _ in range(4)
    ]
    stored = oracle.join_packed(table)
    assert len(stored) == 48
    payload = oracle.Payload(oracle.PACKED, n_records, user_data_size, stored)
    return batch_frame(payload)


def test_ratio_of_a_packed_frame_is_bounded() -> None:
    fits = 48 * 2**15 // 20
    found = metastore_reads(constant_frame(fits))
    assert found == [(0, 0, b"")] * fits == oracle_reads(constant_frame(fits))
    for n_records in (fits + 1, 2**26 // 20, 2**26 // 20 + 1, 2**32 - 1):
        data = constant_frame(n_records)
        assert oracle_reads(data) is None
        assert metastore_reads(data) is None
    for size in (2**26, 2**63, 2**64 - 20, 2**64 - 1):
        data = constant_frame(1, size)
        assert oracle_reads(data) is None
        assert metastore_reads(data) is None


def test_unpacked_size_of_a_packed_frame_is_bounded() -> None:
    padding = bytes(2**11)  # so that the ratio alone would let it pass
    columns = oracle.packed_columns([(1, 1, padding)], oracle.PLAIN_CHOICES)
    for n_records in (2**26 // 20 - 100, 2**26 // 20 + 1):
        data = forge_packed(columns, n_records=n_records, size=len(padding))
        assert metastore_reads(data) is None  # without the memory that it claims
        assert oracle_reads(data) is None


@settings(max_examples=100)
@given(st.data())
def test_changed_payloads(data: st.DataObject) -> None:
    frame = FRAMES[data.draw(st.sampled_from(sorted(FRAMES)))]
    for _ in range(data.draw(st.integers(1, 3))):
        if len(frame) > 48:
            # Half of the changes go into the tables of a packed payload.
            end = data.draw(st.sampled_from([len(frame), min(272, len(frame))]))
            at = data.draw(st.integers(48, end - 1))
            frame = oracle.set_byte(frame, at, data.draw(st.integers(0, 255)))
    # Padding is left to be found wrong.
    frame = oracle.fix_payload_checksum(frame, 0, LOG.seed)
    assert metastore_reads(frame) == oracle_reads(frame)


@settings(max_examples=30)
@given(st.binary(max_size=120), st.integers(0, 3), st.integers(0, 300))
def test_payloads_of_any_bytes(stored: bytes, n_records: int, size: int) -> None:
    for layout in (oracle.PLAIN, oracle.PACKED):
        data = batch_frame(oracle.Payload(layout, n_records, size, stored))
        assert metastore_reads(data) == oracle_reads(data)


@pytest.mark.parametrize("name", FRAMES)
def test_cut_and_flipped_frames_are_refused(name: str) -> None:
    data = FRAMES[name]
    for size in range(len(data)):
        assert metastore_reads(data[:size]) is None
    for offset in range(len(data)):
        assert metastore_reads(oracle.flip_bit(data, offset, offset % 8)) is None


# Whole directories, forged: the same content, or refused by both


FIRST_BLOCK, SECOND_BLOCK = SORTED[:32], SORTED[32:]
BATCHES = [
    [(7, 4096, b"heap-0"), (20, 0, b"")],
    [(21, 1, b""), (21, 2, b"again")],
    SORTED[:3],
    [(20, 5, b"back"), (7, 0, b"")],
    [],
]
SNAPSHOT_NAME = oracle.file_name("snapshot", 2)
SEALED_NAME = oracle.file_name("log", 3)
OPEN_NAME = oracle.file_name("log", 7)
Files = dict[str, bytes]


def store_files() -> Files:
    """A snapshot of two blocks, a sealed log, and an open one of a later number."""
    packed = oracle.pack_packed(SECOND_BLOCK)
    return {
        SNAPSHOT_NAME: oracle.write_snapshot(STORE_ID, 2, 9, [FIRST_BLOCK, packed]),
        SEALED_NAME: oracle.write_log(STORE_ID, 3, 10, BATCHES[:2], n_zeros=40),
        OPEN_NAME: oracle.write_log(
            STORE_ID, 7, 12, BATCHES[2:], sealed=False, n_zeros=200
        ),
    }


def oracle_outcome(files: Files) -> object:
    """Content and last sequence, or how the oracle refuses."""
    try:
        return oracle.read_store(files)
    except oracle.OracleVersionError:
        return "another version"
    except oracle.OracleError:
        return "corrupt"


def metastore_outcome(files: Files, directory: Path) -> object:
    """The same of metastore."""
    shutil.rmtree(directory, ignore_errors=True)
    directory.mkdir()
    for name, data in files.items():
        (directory / name).write_bytes(data)
    with contextlib.closing(Directory.open_existing(str(directory))) as opened:
        found = recovery.inspect(opened)
    if found.damage is None:
        assert found.recovered is not None
        assert_arrays_agree(found.recovered)
        content = {key: (value, data) for key, value, data in found.recovered}
        return content, found.recovered.report.sequence
    if isinstance(found.damage, FormatVersionError):
        return "another version"
    assert isinstance(found.damage, CorruptionError)
    assert found.damage.path.startswith(str(directory))
    assert found.damage.offset >= 0
    assert found.damage.reason
    return "corrupt"


def assert_arrays_agree(recovered: Recovered) -> None:
    n = len(recovered)
    assert len(recovered.keys) == len(recovered.values) == n
    assert len(recovered.offsets) == n + 1
    assert recovered.offsets[0] == 0
    assert recovered.offsets[-1] == len(recovered.user_data)
    assert _codec.first_disorder(recovered.keys, recovered.values) == -1


def changed(name: str, data: bytes) -> Files:
    return {**store_files(), name: data}


def test_whole_store_is_read_alike(tmp_path: Path) -> None:
    files = store_files()
    expected: dict[int, tuple[int, bytes]] = {}
    for records in (SORTED, *BATCHES):
        oracle.last_wins(expected, records)
    assert oracle_outcome(files) == (expected, 14)
    assert metastore_outcome(files, tmp_path / "db") == (expected, 14)
    store, recovered = MetadataStore.recover(tmp_path / "db")
    with store:
        assert {key: rest for key, *rest in recovered} == {
            key: [*found] for key, found in expected.items()
        }


@pytest.mark.parametrize("name", [SNAPSHOT_NAME, SEALED_NAME, OPEN_NAME])
@pytest.mark.parametrize("field", oracle.FILE_FIELDS)
def test_forged_file_header(name: str, field: str, tmp_path: Path) -> None:
    data = store_files()[name]
    size = struct.calcsize(oracle.FILE_FIELDS[field][1])
    numbers = [0, 1, 2, 3, 9, 10, 12, 13, 255]
    if size == 8:
        numbers += [2**63 - 1, 2**63, 2**64 - 1]
    for number in numbers:
        value = number.to_bytes(size, "little")
        forged = oracle.put(data, oracle.FILE_FIELDS[field][0], value)
        if field != "checksum":
            forged = oracle.fix_file_header(forged)
        files = changed(name, forged)
        found = metastore_outcome(files, tmp_path / "db")
        assert found == oracle_outcome(files), number
        if field in ("version", "flags") and forged != data:
            assert found == "another version"


@pytest.mark.parametrize("frame", [0, 1, 2])
@pytest.mark.parametrize("name", [SNAPSHOT_NAME, SEALED_NAME, OPEN_NAME])
def test_forged_frames_of_a_store(name: str, frame: int, tmp_path: Path) -> None:
    data = store_files()[name]
    offset = oracle.frame_offsets(data)[frame]
    for field, (_, form) in oracle.FRAME_FIELDS.items():
        if field == "checksum":
            continue
        now = oracle.get_field(data, offset, field)
        numbers = {0, 1, 2, 3, 9, 10, 12, now - 1, now + 1, now + 8, 2**31, 2**64 - 1}
        for number in sorted(numbers):
            if 0 <= number < 256 ** struct.calcsize(form):
                forged = oracle.forge(data, offset, field, number)
                files = changed(name, forged)
                found = metastore_outcome(files, tmp_path / "db")
                assert found == oracle_outcome(files), (field, number)


BAD_BLOCKS = {
    "no record": [FIRST_BLOCK[:-1], [], SECOND_BLOCK],
    "tombstone": [[*FIRST_BLOCK[:5], (15, 0, b"")], SECOND_BLOCK],
    "repeated key": [[*FIRST_BLOCK, FIRST_BLOCK[-1]], SECOND_BLOCK],
    "falling key": [[FIRST_BLOCK[1], FIRST_BLOCK[0]], SECOND_BLOCK],
    "falling blocks": [SECOND_BLOCK, FIRST_BLOCK],
    "overlapping blocks": [FIRST_BLOCK, FIRST_BLOCK[-1:], SECOND_BLOCK],
}


@pytest.mark.parametrize("name", BAD_BLOCKS)
def test_bad_blocks_are_refused(name: str, tmp_path: Path) -> None:
    for pack in (oracle.pack_plain, oracle.pack_packed):
        blocks = []
        for records in BAD_BLOCKS[name]:
            if records:
                blocks.append(pack(records))
            else:
                blocks.append(oracle.pack_plain([]))
        files = changed(SNAPSHOT_NAME, forged_snapshot(blocks))
        assert oracle_outcome(files) == "corrupt"
        assert metastore_outcome(files, tmp_path / "db") == "corrupt"


def forged_snapshot(blocks: list[oracle.Payload]) -> bytes:
    """A snapshot around blocks that may be invalid; the rest of it agrees with them."""
    header = oracle.FileHeader("snapshot", STORE_ID, 2, 9)
    data = header.pack()
    found = []
    for payload in blocks:
        stored = oracle.pack_frame(header.seed, oracle.BLOCK, payload)
        own = struct.unpack_from("<I", stored)[0]
        # The index of a block without records needs a key: any between its neighbours.
        records = oracle.unpack_payload(payload) or [(41, 1, b"")]
        frame = oracle.Frame(len(data), oracle.BLOCK, 0, 0, payload, own, records)
        found.append(frame)
        data += stored
    index = oracle.pack_index(found)
    end = oracle.pack_frame(header.seed, oracle.END, index, sequence=9)
    return data + end + oracle.pack_trailer(header.seed, len(data), len(end))


def test_forged_index(tmp_path: Path) -> None:
    data = store_files()[SNAPSHOT_NAME]
    end = oracle.frame_offsets(data)[-1]
    for offset in range(end + 48, end + 48 + 16 + 2 * 40, 4):
        for change in (1, 8, 2**31):
            number = struct.unpack_from("<I", data, offset)[0] ^ change
            forged = oracle.put(data, offset, struct.pack("<I", number))
            files = changed(SNAPSHOT_NAME, oracle.fix_payload_checksum(forged, end))
            assert oracle_outcome(files) == "corrupt"
            assert metastore_outcome(files, tmp_path / "db") == "corrupt", offset


def test_forged_trailer(tmp_path: Path) -> None:
    data = store_files()[SNAPSHOT_NAME]
    at = len(data) - oracle.TRAILER.size
    for offset in range(at, at + 28, 4):
        for change in (1, 8, 64, 2**31):
            number = struct.unpack_from("<I", data, offset)[0] ^ change
            forged = oracle.put(data, offset, struct.pack("<I", number))
            files = changed(SNAPSHOT_NAME, oracle.fix_trailer(forged))
            assert oracle_outcome(files) == "corrupt"
            assert metastore_outcome(files, tmp_path / "db") == "corrupt", offset
    end_offset, end_size = struct.unpack_from("<QQ", data, at + 8)
    for offset, size in (
        (end_offset - 8, end_size + 8),
        (end_offset + 8, end_size - 8),
        (end_offset + 1, end_size - 1),
        (at, 0),
        (64, at - 64),
        (0, at),
        (2**64 - 8, at + 8),
    ):
        forged = oracle.put(data, at + 8, struct.pack("<QQ", offset, size))
        files = changed(SNAPSHOT_NAME, oracle.fix_trailer(forged))
        assert oracle_outcome(files) == "corrupt"
        assert metastore_outcome(files, tmp_path / "db") == "corrupt", offset


def test_snapshot_without_blocks(tmp_path: Path) -> None:
    for sequence in (0, 9):
        data = oracle.write_snapshot(STORE_ID, 2, sequence, [])
        files = {SNAPSHOT_NAME: data}
        assert oracle_outcome(files) == ({}, sequence)
        assert metastore_outcome(files, tmp_path / "db") == ({}, sequence)
        for cut in range(len(data)):
            files = {SNAPSHOT_NAME: data[:cut]}
            assert metastore_outcome(files, tmp_path / "db") == "corrupt"


def test_names_decide_alike(tmp_path: Path) -> None:
    files = store_files()
    open_log = files[OPEN_NAME]
    for name in (
        "log_0000000000000007.tmp",
        "log_000000000000000A",
        "log_000000000000008",
        "log_00000000000000008",
        "log_0000000000000008.bak",
        "Log_0000000000000008",
        "log_0000000000000000",
        "log_8000000000000000",
        "snapshot_zz",
        "snapshot_0000000000000009.tmp",
    ):
        more = {**files, name: open_log}
        found = metastore_outcome(more, tmp_path / "db")
        assert found == oracle_outcome(more) == oracle_outcome(files), name
    for name in files:
        fewer = {other: data for other, data in files.items() if other != name}
        found = metastore_outcome(fewer, tmp_path / "db")
        assert found == oracle_outcome(fewer), name
        assert (found == "corrupt") == (name != OPEN_NAME)


def test_contained_files_are_checked_alike(tmp_path: Path) -> None:
    older_log = oracle.write_log(STORE_ID, 1, 8, BATCHES[:2])
    older_snapshot = oracle.write_snapshot(STORE_ID, 1, 7, [FIRST_BLOCK])
    for name, data in (
        (oracle.file_name("log", 1), older_log),
        (oracle.file_name("snapshot", 1), older_snapshot),
    ):
        files = changed(name, data)
        assert oracle_outcome(files) == oracle_outcome(store_files())
        assert metastore_outcome(files, tmp_path / "db") == oracle_outcome(files)
        for field, value in (("sequence", 11), ("store_id", b"another store id")):
            forged = oracle.fix_file_header(oracle.set_file_field(data, field, value))
            files = changed(name, forged)
            assert oracle_outcome(files) == "corrupt"
            assert metastore_outcome(files, tmp_path / "db") == "corrupt"


def change_store(data: st.DataObject, files: Files) -> Files:
    """Damage or forge one thing in a store."""
    name = data.draw(st.sampled_from(sorted(files)))
    stored = files[name]
    if not stored:
        return files
    what = data.draw(st.sampled_from(["byte", "cut", "grow", "field", "payload"]))
    if what == "byte":
        at = data.draw(st.integers(0, len(stored) - 1))
        stored = oracle.set_byte(stored, at, data.draw(st.integers(0, 255)))
    elif what == "cut":
        stored = oracle.truncate(stored, data.draw(st.integers(0, len(stored))))
    elif what == "grow":
        stored += data.draw(st.sampled_from([b"\0", bytes(48), b"x", stored[-96:]]))
    else:
        offsets = oracle.frame_offsets(store_files()[name])
        offset = data.draw(st.sampled_from(offsets))
        end = offset + 48
        if what == "payload" and end < len(stored):
            at = data.draw(st.integers(end, min(len(stored), end + 300) - 1))
            stored = oracle.set_byte(stored, at, data.draw(st.integers(0, 255)))
            stored = oracle.fix_payload_checksum(stored, offset)
        elif what == "field" and end <= len(stored):
            field = data.draw(st.sampled_from(sorted(oracle.FRAME_FIELDS)[1:]))
            form = oracle.FRAME_FIELDS[field][1]
            number = data.draw(st.integers(0, 256 ** struct.calcsize(form) - 1))
            stored = oracle.forge(stored, offset, field, number % 20)
    return {**files, name: stored}


with_tmp_path = settings(
    suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=45
)


@pytest.mark.parametrize("window_size", [64, 200, log._WINDOW_SIZE])
@with_tmp_path
@given(data=st.data())
def test_changed_stores_are_judged_alike(
    window_size: int, data: st.DataObject, tmp_path: Path
) -> None:
    files = store_files()
    for _ in range(data.draw(st.integers(1, 2))):
        files = change_store(data, files)
    expected = oracle_outcome(files)
    # In small windows every frame is cut somewhere, and none may be judged by that.
    with mock.patch.multiple(log, _WINDOW_SIZE=window_size, _WINDOW_FRAMES=2):
        assert metastore_outcome(files, tmp_path / "db") == expected


@settings(with_tmp_path, max_examples=30)
@given(
    blocks=strategies.snapshots(),
    batches=st.lists(st.lists(strategies.batches(), max_size=3), max_size=3),
    choices=strategies.choices,
)
def test_stores_of_the_oracle_are_read(
    blocks: list[Records],
    batches: list[list[Records]],
    choices: tuple[oracle.ColumnChoice, ...],
    tmp_path: Path,
) -> None:
    packed = [oracle.pack_packed(block, choices) for block in blocks]
    files = {SNAPSHOT_NAME: oracle.write_snapshot(STORE_ID, 2, 4, packed)}
    sequence = 5
    for number, some in enumerate(batches, 3):
        name = oracle.file_name("log", number)
        sealed = number % 2 == 0
        files[name] = oracle.write_log(STORE_ID, number, sequence, some, sealed=sealed)
        sequence += len(some)
    expected: dict[int, tuple[int, bytes]] = {}
    for records in (*blocks, *itertools.chain(*batches)):
        oracle.last_wins(expected, records)
    assert oracle_outcome(files) == (expected, sequence - 1)
    assert metastore_outcome(files, tmp_path / "db") == (expected, sequence - 1)


histories = st.lists(
    st.one_of(
        strategies.batches(),
        strategies.blocks(),
        st.sampled_from(["compact", "reopen", "kill"]),
    ),
    max_size=14,
)


@settings(with_tmp_path, max_examples=30)
@given(history=histories, log_size_bytes_min=st.sampled_from([1, 300, 65_536]))
def test_stores_of_metastore_are_read(
    history: list[Records | str], log_size_bytes_min: int, tmp_path: Path
) -> None:
    directory = tmp_path / "db"
    shutil.rmtree(directory, ignore_errors=True)
    expected: dict[int, tuple[int, bytes]] = {}
    last = 0

    def recover() -> MetadataStore:
        store, recovered = MetadataStore._recover_in(
            Directory.open_or_create(str(directory)),
            inline=True,
            threads=1,
            log_size_bytes_min=log_size_bytes_min,
        )
        assert {key: rest for key, *rest in recovered} == {
            key: [*found] for key, found in expected.items()
        }
        return store

    # Blocks of a few records, so that compaction copies, joins and cuts some.
    with (
        mock.patch.multiple(compaction, BLOCK_RECORDS_TARGET=4, _BLOCK_RECORDS_MIN=2),
        mock.patch.object(snapshot, "BLOCK_RECORDS_TARGET", 4),
    ):
        store = recover()
        try:
            for step in history:
                if step == "compact":
                    store.compact()
                elif step == "reopen":
                    store.shutdown()
                    store = recover()
                elif step == "kill":
                    abandon(store)
                    store = recover()
                else:
                    assert not isinstance(step, str)
                    last = store.insert_batch(as_batch(step))
                    oracle.last_wins(expected, step)
                assert oracle.read_store(files_in(directory)) == (expected, last)
        finally:
            store.shutdown()
    assert oracle.read_store(files_in(directory)) == (expected, last)


def abandon(store: MetadataStore) -> None:
    """Let go of the files as the end of a process does, sealing nothing."""
    store._engine.abandon()


def files_in(directory: Path) -> Files:
    return {
        path.name: path.read_bytes() for path in directory.iterdir() if path.is_file()
    }


def as_batch(records: Records) -> list[tuple[int, tuple[int, bytes] | None]]:
    return [
        (key, (value, user_data) if value else None)
        for key, value, user_data in records
    ]


# What the end of an open log means (section 8)


def open_log(*frames: bytes, cut: int = 0) -> Files:
    """A snapshot, and behind it an open log of these frames, short of `cut` bytes."""
    header = oracle.FileHeader("log", STORE_ID, 3, SEQUENCE)
    data = header.pack() + b"".join(frames)
    return {
        SNAPSHOT_NAME: oracle.write_snapshot(STORE_ID, 2, SEQUENCE - 1, []),
        SEALED_NAME: oracle.truncate(data, len(data) - cut),
    }


def any_frame(kind: int, sequence: int, durable: int, layout: int = 0) -> bytes:
    payload = dataclasses.replace(oracle.pack_plain(SORTED[:2]), layout=layout)
    return oracle.pack_frame(
        LOG.seed, kind, payload, sequence=sequence, durable=durable
    )


def corrupt_if(is_durable: bool) -> object:
    """The outcome where the first frame is bad, by whether it was durable."""
    return "corrupt" if is_durable else ({}, SEQUENCE - 1)


def test_user_data_of_a_torn_batch_is_not_returned(tmp_path: Path) -> None:
    whole = any_frame(oracle.BATCH, SEQUENCE, SEQUENCE - 1)
    torn = oracle.flip_bit(any_frame(oracle.BATCH, SEQUENCE + 1, SEQUENCE - 1), 48)
    files = open_log(whole, torn)
    expected = {key: (value, data) for key, value, data in SORTED[:2]}
    assert oracle_outcome(files) == (expected, SEQUENCE)
    # The arrays end with the records: no byte of the torn batch is behind them.
    assert metastore_outcome(files, tmp_path / "db") == (expected, SEQUENCE)


@pytest.mark.parametrize("kind", [oracle.BATCH, oracle.BLOCK, oracle.END, 77])
@pytest.mark.parametrize("layout", [oracle.PLAIN, 3])
def test_any_agreeing_header_proves_what_was_durable(
    kind: int, layout: int, tmp_path: Path
) -> None:
    damaged = oracle.flip_bit(any_frame(oracle.BATCH, SEQUENCE, SEQUENCE - 1), 60)
    for durable in (SEQUENCE - 1, SEQUENCE, SEQUENCE + 9):
        files = open_log(damaged, any_frame(kind, SEQUENCE + 1, durable, layout))
        expected = corrupt_if(durable >= SEQUENCE)
        assert oracle_outcome(files) == expected
        assert metastore_outcome(files, tmp_path / "db") == expected, durable


@pytest.mark.parametrize(
    ("kind", "sequence", "durable"),
    [
        (oracle.BATCH, SEQUENCE, SEQUENCE - 1),
        (oracle.BATCH, SEQUENCE + 1, SEQUENCE - 1),
        (oracle.BATCH, SEQUENCE - 1, SEQUENCE - 1),
        (oracle.BLOCK, SEQUENCE, SEQUENCE - 1),
        (oracle.BATCH, SEQUENCE, SEQUENCE),
    ],
)
def test_frame_beyond_the_file_is_torn_unless_it_was_durable(
    kind: int, sequence: int, durable: int, tmp_path: Path
) -> None:
    files = open_log(any_frame(kind, sequence, durable), cut=8)
    expected = corrupt_if(durable >= SEQUENCE)
    assert oracle_outcome(files) == expected
    assert metastore_outcome(files, tmp_path / "db") == expected


@pytest.mark.parametrize("at", [6, 7])
def test_a_checksum_alone_proves_no_frame(at: int) -> None:
    """Of 32 torn batches of a gigabyte one has a place that agrees by chance."""
    frame = bytearray(48)
    frame[4] = oracle.BATCH
    frame[16] = 9  # durable
    for byte in (0, 1, 128):
        frame[at] = byte
        checksum = _codec.crc32c(frame[4:], LOG.seed) ^ 0xAF
        frame[:4] = checksum.to_bytes(4, "little")
        data = bytes(16) + frame
        found = _codec.find_durable(data, 0, LOG.seed, 9)
        assert found == (-1 if byte else 16)
        assert (found >= 0) == oracle.claims_durable(data, 0, LOG, 9)


def test_find_durable_agrees_with_the_oracle() -> None:
    data = oracle.write_log(
        STORE_ID, 3, 1, [SORTED[:2], SORTED[:1], []], durables=[0, 0, 2]
    )
    data += b"\xff" * 51
    for cut in (len(data), len(data) - 64, 200):
        part = data[:cut]
        for offset in range(0, cut, 8):
            for sequence in range(6):
                found = _codec.find_durable(part, offset, LOG.seed, sequence)
                expected = oracle.claims_durable(part, offset, LOG, sequence)
                assert (found >= 0) == expected
                if found >= 0:
                    assert oracle.get_field(part, found, "durable") >= sequence


def test_user_data_without_a_record_is_refused(tmp_path: Path) -> None:
    """It was accepted, and moved the user data of the records behind it.

    Found by Hypothesis, with valid checksums: no lengths add up to a byte. The byte
    was not even read: what lay in memory became the first of the next record's.
    """
    nothing = oracle.Payload(oracle.PLAIN, 0, 1, b"\0")
    assert oracle_reads(batch_frame(nothing)) is None
    assert metastore_reads(batch_frame(nothing)) is None
    behind = oracle.pack_frame(
        LOG.seed,
        oracle.BATCH,
        oracle.pack_plain([(1, 2, b"data")]),
        sequence=SEQUENCE + 1,
        durable=SEQUENCE,
    )
    files = open_log(batch_frame(nothing), behind)
    assert oracle_outcome(files) == "corrupt"
    assert metastore_outcome(files, tmp_path / "db") == "corrupt"


# Ends that nobody asked for


@pytest.mark.parametrize("pack", [oracle.pack_plain, oracle.pack_packed])
def test_ends_are_not_wanted_where_no_record_has_user_data(
    pack: Callable[[Records], oracle.Payload],
) -> None:
    records = [(key, key + 1, b"") for key in range(100)]
    data = memoryview(batch_frame(pack(records)))
    table = frames.new_table(1)
    assert _codec.scan_frames(data, 0, LOG.seed, SEQUENCE, table)[0] == 1
    keys, values = np.empty(100, np.uint64), np.empty(100, np.uint64)
    no_ends, no_data = np.empty(0, np.uint64), np.empty(0, np.uint8)

    def decode(columns: list[Any], base: int = 0) -> tuple[int, int]:
        return _codec.decode_frames(data, table, *columns, base, frames.decompress)

    assert decode([keys, values, no_ends, no_data]) == (1, 0)
    assert keys.tolist() == list(range(100))
    assert values.tolist() == list(range(1, 101))
    with pytest.raises(ValueError, match="not the size"):
        decode([keys, values, no_ends, np.empty(1, np.uint8)])
    ends = np.empty(100, np.uint64)
    assert decode([keys, values, ends, no_data], base=7) == (1, 0)
    assert set(ends.tolist()) == {7}


def test_lengths_are_checked_where_no_ends_are_wanted() -> None:
    """A valid checksum, no user data, and a length that is not 0."""
    payload = oracle.pack_plain([(1, 2, b""), (3, 4, b"")])
    lying = dataclasses.replace(payload, data=payload.data[:-1] + b"\1")
    assert metastore_reads(batch_frame(payload)) == [(1, 2, b""), (3, 4, b"")]
    assert metastore_reads(batch_frame(lying)) is None


def test_user_data_wants_its_ends() -> None:
    records = [(1, 2, b"x"), (3, 4, b"")]
    data = memoryview(batch_frame(oracle.pack_plain(records)))
    table = frames.new_table(1)
    assert _codec.scan_frames(data, 0, LOG.seed, SEQUENCE, table)[0] == 1
    no_ends = np.empty(0, np.uint64)
    target = np.empty(2, np.uint64), np.empty(2, np.uint64), no_ends
    room = np.empty(1, np.uint8)
    with pytest.raises(ValueError, match="not the size"):
        _codec.decode_frames(data, table, *target, room, 0, frames.decompress)
    old = to_columns(records)
    with pytest.raises(ValueError, match="do not match"):
        _merge.merge_into(old.arrays(), to_columns([]).arrays(), (*target, room), 0)


@pytest.mark.parametrize("threads", [1, 2])
def test_offsets_of_a_store_without_user_data_are_zeros(
    tmp_path: Path, threads: int
) -> None:
    """From a log, from a snapshot, and from both, where nobody writes the offsets."""
    n = 3_000
    for round_number in range(3):
        store, found = MetadataStore.recover(tmp_path, threads=threads)
        with store:
            assert len(found) == n * round_number
            assert not found.offsets.any()
            assert len(found.offsets) == len(found) + 1
            assert not len(found.user_data)
            start = n * round_number
            keys = np.arange(start, start + n, dtype=np.uint64)
            store.insert_arrays(keys, keys + np.uint64(1))
            if round_number == 1:
                store.compact()
    store, found = MetadataStore.recover(tmp_path, threads=threads)
    with store:
        assert found.keys.tolist() == list(range(3 * n))
        assert not found.offsets.any()
        store.insert_batch([(5, (6, b"user data"))])
    store, found = MetadataStore.recover(tmp_path, threads=threads)
    store.shutdown()
    assert found.get(5) == (6, b"user data")
    assert found.offsets.tolist() == [0] * 6 + [9] * (3 * n - 5)


# Constants that stand in two places


@pytest.mark.parametrize(
    "name",
    [name for name in layouts.__all__ if hasattr(_codec, name)],
)
def test_constants_are_the_same_in_both(name: str) -> None:
    assert getattr(_codec, name) == getattr(layouts, name)


def test_constants_are_those_of_the_oracle() -> None:
    assert oracle.FRAME_HEADER.size == _codec.FRAME_HEADER_SIZE
    assert (_codec.KIND_BATCH, _codec.KIND_BLOCK, _codec.KIND_END) == (
        oracle.BATCH,
        oracle.BLOCK,
        oracle.END,
    )
    assert layouts.log_seed(STORE_ID, 3) == LOG.seed
    assert layouts.snapshot_seed(STORE_ID) == SNAPSHOT.seed
    for kind in ("log", "snapshot"):
        ours = oracle.FileHeader(kind, STORE_ID, 3, 9, 12345)
        theirs = layouts.FileHeader(kind, STORE_ID, 3, 9, 12345)
        assert ours.pack() == theirs.pack()
        assert layouts.FileHeader.unpack(ours.pack(), kind, 3, "path") == theirs
    trailer = oracle.pack_trailer(SNAPSHOT.seed, 64, 64)
    assert layouts.pack_trailer(SNAPSHOT.seed, 64, 64) == trailer
