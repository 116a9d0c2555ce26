"""The oracle reads what it writes, and refuses what is forged."""

from __future__ import annotations

import struct

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import oracle
import strategies

STORE_ID = bytes(range(16))
ONE = [(7, 4096, b"heap-0"), (9, 0, b"")]
TWO = [(8, 1, b""), (7, 2, b"again")]
SORTED = [(key, 1000 * key, b"%04d" % key) for key in range(10, 74)]


def content(*batches: list[oracle.Record]) -> dict[int, tuple[int, bytes]]:
    found: dict[int, tuple[int, bytes]] = {}
    for batch in batches:
        oracle.last_wins(found, batch)
    return found


def two_batches(**options: object) -> bytes:
    return oracle.write_log(STORE_ID, 3, 10, [ONE, TWO], **options)  # type: ignore[arg-type]  # a test names options one at a time


def two_blocks() -> bytes:
    packed = oracle.pack_packed(SORTED[32:])
    return oracle.write_snapshot(STORE_ID, 5, 44, [SORTED[:32], packed])


# Payloads


@settings(max_examples=50)
@given(strategies.batches())
def test_plain_round_trip(records: list[oracle.Record]) -> None:
    assert oracle.unpack_payload(oracle.pack_plain(records)) == records


@settings(max_examples=50)
@given(strategies.batches(size_min=1), strategies.choices)
def test_packed_round_trip(
    records: list[oracle.Record], choices: tuple[oracle.ColumnChoice, ...]
) -> None:
    assert oracle.unpack_payload(oracle.pack_packed(records, choices)) == records


@settings(max_examples=50)
@given(strategies.blocks(), strategies.choices)
def test_block_round_trip(
    records: list[oracle.Record], choices: tuple[oracle.ColumnChoice, ...]
) -> None:
    payload = oracle.pack_packed(records, choices)
    assert oracle.unpack_payload(payload, block=True) == records


def test_every_encoding_and_shape_can_be_chosen() -> None:
    records = [(key, 5, bytes([7]) * 32) for key in range(64)]
    for encoding in (oracle.CONSTANT, oracle.RAW, oracle.ZSTD):
        for planes in (False, True):
            for column_filter in (oracle.NO_FILTER, oracle.DELTA):
                choices = [
                    oracle.ColumnChoice(column_filter, planes, [encoding]),
                    oracle.ColumnChoice(column_filter, planes, [encoding]),
                    oracle.ColumnChoice(oracle.NO_FILTER, planes, [encoding]),
                    oracle.ColumnChoice(oracle.NO_FILTER, planes, [encoding]),
                ]
                columns = oracle.packed_columns(records, choices)
                counts = [len(column.sections) for column in columns]
                assert counts == ([8, 8, 4, 32] if planes else [1, 1, 1, 1])
                found = {s.encoding for c in columns for s in c.sections}
                assert encoding in found
                payload = oracle.pack_packed(records, choices)
                assert oracle.unpack_payload(payload) == records


@pytest.mark.parametrize(
    "records",
    [
        [(7, 1, b""), (7, 1, b"")],
        [(8, 1, b""), (7, 1, b"")],
        [(7, 0, b"")],
        [],
    ],
    ids=["repeated key", "falling key", "tombstone", "no record"],
)
def test_block_refuses(records: list[oracle.Record]) -> None:
    payload = oracle.pack_plain(records)
    assert oracle.unpack_payload(payload) == records
    with pytest.raises(oracle.OracleError):
        oracle.unpack_payload(payload, block=True)


@settings(max_examples=50)
@given(st.data())
def test_changed_packed_payload_is_refused_or_consistent(data: st.DataObject) -> None:
    payload = oracle.pack_packed(SORTED)
    at = data.draw(st.integers(0, len(payload.data) - 1))
    stored = oracle.set_byte(payload.data, at, data.draw(st.integers(0, 255)))
    changed = oracle.Payload(
        oracle.PACKED, payload.n_records, payload.user_data_size, stored
    )
    try:
        records = oracle.unpack_payload(changed)
    except oracle.OracleError:
        return
    assert len(records) == payload.n_records
    assert sum(len(data) for _, _, data in records) == payload.user_data_size


# Logs


@settings(max_examples=30)
@given(st.lists(strategies.batches(), max_size=4), st.booleans(), st.integers(0, 100))
def test_log_round_trip(
    batches: list[list[oracle.Record]], sealed: bool, n_zeros: int
) -> None:
    data = oracle.write_log(
        STORE_ID, 1, 5, batches, sealed=sealed, n_zeros=n_zeros, created_ns=77
    )
    log = oracle.read_log(data, 1, newest=True)
    assert [batch.records for batch in log.batches] == batches
    assert (log.end is not None) == sealed
    assert log.torn == b""
    assert log.content_size == len(data) - n_zeros
    assert log.header == oracle.FileHeader("log", STORE_ID, 1, 5, 77)
    assert log.last_sequence == 4 + len(batches)
    assert oracle.read_log(data, 1, bound=5 + len(batches)) == log


def test_older_log_must_reach_its_bound() -> None:
    open_log = two_batches(sealed=False)
    assert oracle.read_log(open_log, 3, bound=12).last_sequence == 11
    for data, bound in ((open_log, 13), (two_batches(), 13), (open_log, None)):
        with pytest.raises(oracle.OracleError):
            oracle.read_log(data, 3, bound=bound)


def test_nothing_behind_the_bound_is_read() -> None:
    data = two_batches(sealed=False)
    second = oracle.frame_offsets(data)[1]
    for changed in (data, oracle.set_byte(data, second + 60, 99), data + b"x" * 9):
        log = oracle.read_log(changed, 3, bound=11)
        assert [batch.records for batch in log.batches] == [ONE]


def test_torn_tail_of_the_newest_log_is_dropped() -> None:
    whole = two_batches(sealed=False)
    second = oracle.frame_offsets(whole)[1]
    for size in range(second, len(whole)):
        log = oracle.read_log(oracle.truncate(whole, size), 3, newest=True)
        assert [batch.records for batch in log.batches] == [ONE]
        # zeros that a cut frame begins with would be the clean end; none does
        assert log.torn == whole[second:size]


def test_damage_below_a_durable_frame_is_corruption() -> None:
    data = two_batches(sealed=False)
    first, _ = oracle.frame_offsets(data)
    damaged = oracle.flip_bit(data, first + 50)
    with pytest.raises(oracle.OracleError) as caught:
        oracle.read_log(damaged, 3, newest=True)
    assert caught.value.offset == first
    doubtful = oracle.write_log(
        STORE_ID, 3, 10, [ONE, TWO], durables=[9, 9], sealed=False
    )
    log = oracle.read_log(oracle.flip_bit(doubtful, first + 50), 3, newest=True)
    assert log.batches == []
    assert len(log.torn) == len(doubtful) - first


def test_every_bit_of_a_sealed_log_counts() -> None:
    data = two_batches(n_zeros=16)
    whole = oracle.read_log(data, 3, newest=True)
    end = oracle.frame_offsets(data)[-1]
    for offset in range(len(data)):
        damaged = oracle.flip_bit(data, offset, offset % 8)
        for newest, bound in ((True, None), (False, 12)):
            if end <= offset < end + 48:  # looks like a torn end; no batch is lost
                log = oracle.read_log(damaged, 3, bound, newest)
                assert log.batches == whole.batches
                assert log.end is None
                continue
            if offset >= end:  # not read
                assert oracle.read_log(damaged, 3, bound, newest).batches
                continue
            with pytest.raises(oracle.OracleError):
                oracle.read_log(damaged, 3, bound, newest)


FORGED_LOG_FIELDS = [
    ("kind", 2),
    ("kind", 4),
    ("layout", 2),
    ("zero", 1),
    ("sequence", 9),
    ("sequence", 11),
    ("durable", 10),
    ("records", 1),
    ("records", 2**32 - 1),
    ("payload_checksum", 0),
    ("payload_size", 45),
    ("payload_size", 2**64 - 1),
    ("user_data_size", 5),
    ("user_data_size", 2**64 - 40),
]


@pytest.mark.parametrize(("field", "value"), FORGED_LOG_FIELDS)
def test_forged_batch_is_refused(field: str, value: int) -> None:
    data = oracle.forge(two_batches(), 64, field, value)
    with pytest.raises(oracle.OracleError) as caught:
        oracle.read_log(data, 3, newest=True)
    assert caught.value.offset == 64


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("sequence", 12),
        ("durable", 10),
        ("records", 1),
        ("user_data_size", 1),
        ("layout", 1),
    ],
)
def test_forged_end_is_refused(field: str, value: int) -> None:
    data = two_batches()
    end = oracle.frame_offsets(data)[-1]
    with pytest.raises(oracle.OracleError):
        oracle.read_log(oracle.forge(data, end, field, value), 3, bound=13)


# Snapshots


@settings(max_examples=30)
@given(strategies.snapshots(), st.lists(strategies.choices, min_size=6, max_size=6))
def test_snapshot_round_trip(
    blocks: list[list[oracle.Record]],
    choices: list[tuple[oracle.ColumnChoice, ...]],
) -> None:
    packed = [
        oracle.pack_packed(block, choice)
        for block, choice in zip(blocks, choices, strict=False)
    ]
    for chosen in (blocks, packed):
        data = oracle.write_snapshot(STORE_ID, 2, 9, chosen, created_ns=1)
        snapshot = oracle.read_snapshot(data, 2)
        assert [block.records for block in snapshot.blocks] == blocks
        assert snapshot.header == oracle.FileHeader("snapshot", STORE_ID, 2, 9, 1)


def test_every_bit_of_a_snapshot_counts() -> None:
    data = two_blocks()
    for offset in range(len(data)):
        with pytest.raises(oracle.OracleError):
            oracle.read_snapshot(oracle.flip_bit(data, offset, offset % 8), 5)


def test_every_truncation_of_a_snapshot_is_refused() -> None:
    data = two_blocks()
    for size in range(len(data)):
        with pytest.raises(oracle.OracleError):
            oracle.read_snapshot(oracle.truncate(data, size), 5)
    with pytest.raises(oracle.OracleError):
        oracle.read_snapshot(data + bytes(8), 5)


def test_forged_index_is_refused() -> None:
    data = two_blocks()
    end = oracle.frame_offsets(data)[-1]
    payload = end + 48
    for offset in range(payload, payload + 16 + 2 * 40, 4):
        number = struct.unpack_from("<I", data, offset)[0]
        forged = oracle.put(data, offset, struct.pack("<I", number ^ 1))
        with pytest.raises(oracle.OracleError, match="index"):
            oracle.read_snapshot(oracle.fix_payload_checksum(forged, end), 5)


@pytest.mark.parametrize(("offset", "change"), [(8, 8), (16, -8), (24, 1)])
def test_forged_trailer_is_refused(offset: int, change: int) -> None:
    data = two_blocks()
    at = len(data) - 32 + offset
    forged = oracle.put(
        data, at, struct.pack("<I", struct.unpack_from("<I", data, at)[0] + change)
    )
    with pytest.raises(oracle.OracleError):
        oracle.read_snapshot(oracle.fix_trailer(forged), 5)


def test_keys_increase_across_blocks() -> None:
    data = oracle.write_snapshot(STORE_ID, 5, 1, [SORTED[32:], SORTED[:32]])
    with pytest.raises(oracle.OracleError, match="across blocks"):
        oracle.read_snapshot(data, 5)


# File headers


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("magic", oracle.MAGICS["snapshot"]),
        ("zero_a", 1),
        ("zero_b", 1),
        ("number", 4),
        ("sequence", 0),
    ],
)
def test_forged_file_header_is_refused(field: str, value: int | bytes) -> None:
    data = oracle.set_file_field(two_batches(), field, value)
    with pytest.raises(oracle.OracleError) as caught:
        oracle.read_log(oracle.fix_file_header(data), 3, newest=True)
    assert not isinstance(caught.value, oracle.OracleVersionError)


@pytest.mark.parametrize(("field", "value"), [("version", 2), ("flags", 1)])
def test_other_versions_are_told_apart(field: str, value: int) -> None:
    data = oracle.fix_file_header(oracle.set_file_field(two_batches(), field, value))
    with pytest.raises(oracle.OracleVersionError):
        oracle.read_log(data, 3, newest=True)


# Directories


def store() -> dict[str, bytes]:
    """A snapshot up to log 2 and sequence 2, and above it logs of 3 .. 4 and 5 .. 6."""
    return {
        "DO_NOT_PUT_YOUR_FILES_HERE": b"",
        "snapshot_0000000000000002": oracle.write_snapshot(STORE_ID, 2, 2, [SORTED]),
        "log_0000000000000003": oracle.write_log(STORE_ID, 3, 3, [ONE, TWO]),
        "log_0000000000000007": oracle.write_log(
            STORE_ID, 7, 5, [[(10, 0, b"")], [(1, 1, b"x")]], sealed=False
        ),
        "log_0000000000000008.tmp": b"junk",
        "log_0000000000000009.bak": b"junk",
        "log_000000000000000A": b"junk",
    }


def test_store_is_its_snapshot_and_the_logs_above() -> None:
    expected = content(SORTED, ONE, TWO, [(10, 0, b""), (1, 1, b"x")])
    assert oracle.read_store(store()) == (expected, 6)
    assert oracle.read_store({}) == ({}, 0)


def test_contained_log_is_not_read_again() -> None:
    files = store()
    contained = oracle.write_log(STORE_ID, 2, 1, [[(5, 5, b"")], [(5, 0, b"")]])
    files["log_0000000000000002"] = contained
    assert oracle.read_store(files) == oracle.read_store(store())


@pytest.mark.parametrize(
    "missing", ["snapshot_0000000000000002", "log_0000000000000003"]
)
def test_missing_file_is_corruption(missing: str) -> None:
    files = store()
    del files[missing]
    with pytest.raises(oracle.OracleError, match="join"):
        oracle.read_store(files)


def test_files_of_two_stores_are_corruption() -> None:
    files = store()
    files["log_0000000000000007"] = oracle.write_log(bytes(16), 7, 5, [ONE])
    with pytest.raises(oracle.OracleError, match="several stores"):
        oracle.read_store(files)
