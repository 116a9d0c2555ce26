"""What the index of a snapshot says is believed as far as it was checked."""

import contextlib
import struct

import pytest

import oracle
from metastore import CorruptionError, MetadataStore, StoreFailedError, compaction
from metastore.directory import Directory
from metastore.look import overview

_STORE_ID = bytes(range(16))
_NUMBER, _SEQUENCE, _USER_DATA = 1, 7, b"user data"
_OFFSET, _FIRST_KEY, _LAST_KEY, _USER_DATA_SIZE, _N_RECORDS, _CHECKSUM = range(6)


def _snapshot(forge):
    """Return a snapshot of three blocks whose index and sums were given to `forge`."""
    blocks = [
        [(10 * block + i, i + 1, _USER_DATA) for i in range(4)] for block in range(3)
    ]
    data = oracle.write_snapshot(_STORE_ID, _NUMBER, _SEQUENCE, blocks)
    whole = oracle.read_snapshot(data, _NUMBER)
    payload = oracle.pack_index(whole.blocks).data
    sums = list(oracle.INDEX_HEAD.unpack_from(payload))
    rows = [
        list(row)
        for row in oracle.INDEX_BLOCK.iter_unpack(payload[oracle.INDEX_HEAD.size :])
    ]
    forge(rows, sums)
    payload = oracle.INDEX_HEAD.pack(*sums)
    payload += b"".join(oracle.INDEX_BLOCK.pack(*row) for row in rows)
    seed = whole.header.seed
    index = oracle.Payload(oracle.PLAIN, len(rows), 0, payload)
    end = oracle.pack_frame(seed, oracle.END, index, sequence=_SEQUENCE)
    trailer = oracle.pack_trailer(seed, whole.end.offset, len(end))
    return data[: whole.end.offset] + end + trailer, whole


def _set(row, field, value, sum_at=None):
    def forge(rows, sums):
        if sum_at is not None:
            sums[sum_at] = (sums[sum_at] + value - rows[row][field]) % 2**64
        rows[row][field] = value

    return forge


def _sums(rows, sums):
    sums[0] += 1


_SIZE = 20 * 4 + 4 * len(_USER_DATA)
_FRAME_SIZE = (48 + _SIZE + 7) & ~7
_STARTS = [64 + _FRAME_SIZE * block for block in range(4)]


@pytest.mark.parametrize(
    ("forge", "offset", "reason"),
    [
        (_set(0, _OFFSET, 72), 64, "blocks and index do not meet"),
        (_set(1, _OFFSET, _STARTS[1] + 8), _STARTS[1], "blocks and index do not meet"),
        (
            _set(2, _OFFSET, _STARTS[1]),
            _STARTS[3],
            "offsets in the index do not increase",
        ),
        (
            _set(2, _OFFSET, 2**64 - 8),
            _STARTS[3],
            "offsets in the index do not increase",
        ),
        (_set(1, _N_RECORDS, 5, 0), _STARTS[1], "another n_records for block 1"),
        (_set(1, _N_RECORDS, 0, 0), _STARTS[1], "block 1 has no records"),
        (_set(1, _N_RECORDS, 2**32 - 1, 0), _STARTS[1], "claims more for block 1"),
        (_set(2, _USER_DATA_SIZE, 35, 1), _STARTS[2], "another user_data_size for b"),
        (_set(2, _USER_DATA_SIZE, 2**63, 1), _STARTS[2], "claims more for block 2"),
        (_set(1, _CHECKSUM, 1), _STARTS[1], "another header_checksum for block 1"),
        (_set(1, _FIRST_KEY, 14), _STARTS[1], "block 1 is out of order in the index"),
        (_set(1, _LAST_KEY, 20), _STARTS[1], "block 1 is out of order in the index"),
        (_set(1, _FIRST_KEY, 9), _STARTS[1], "the index has other keys for block 1"),
        (_sums, _STARTS[3], "the sums of the index do not agree"),
    ],
    ids=[
        "starts later",
        "starts in a block",
        "starts as another",
        "starts nowhere",
        "a record more",
        "none",
        "too many records",
        "a byte less",
        "too many bytes",
        "another checksum",
        "keys reversed",
        "keys overlap",
        "another key",
        "sums",
    ],
)
def test_a_forged_index_is_refused(tmp_path, forge, offset, reason):
    """Checksums agree, claims do not: an offset in the file is named.

    A block that the index puts outside the file was named by that offset once (found
    by the fuzzer, seed 2241540892, case 4634).
    """
    data, whole = _snapshot(forge)
    assert [block.offset for block in whole.blocks] == _STARTS[:3]
    (tmp_path / f"snapshot_{_NUMBER:016x}").write_bytes(data)
    with pytest.raises(CorruptionError, match=reason) as caught:
        MetadataStore.recover(tmp_path)
    assert caught.value.offset == offset


def _look(path):
    """Return what a look at a store tells of its one file."""
    with contextlib.closing(Directory.open_existing(str(path))) as directory:
        (facts,) = overview(directory).files
    return facts


def test_an_honest_index_is_believed(tmp_path):
    """The same snapshot with nothing forged looks published, and recovers."""
    data, whole = _snapshot(lambda rows, sums: None)
    (tmp_path / f"snapshot_{_NUMBER:016x}").write_bytes(data)
    assert _look(tmp_path).state == "published"
    store, recovered = MetadataStore.recover(tmp_path)
    store.shutdown()
    assert list(recovered) == whole.records


def test_the_header_of_a_block_is_looked_at_without_its_payload(tmp_path):
    """A look at a store tells of a damaged header, though it reads no block."""
    data, whole = _snapshot(lambda rows, sums: None)
    at = whole.blocks[1].offset
    damaged = bytearray(data)
    struct.pack_into("<I", damaged, at + 24, 5)
    path = tmp_path / f"snapshot_{_NUMBER:016x}"
    path.write_bytes(damaged)
    facts = _look(tmp_path)
    assert facts.state == "damaged"
    assert facts.damage is not None
    assert facts.damage.offset == at
    damaged[at : at + 48] = data[at : at + 48]
    damaged[at + 48] ^= 1
    path.write_bytes(damaged)
    facts = _look(tmp_path)
    assert facts.state == "published"


def test_a_block_with_a_damaged_header_is_not_copied(tmp_path, monkeypatch):
    """A compaction copies blocks as they lie; it names the damage where it was."""
    monkeypatch.setattr(compaction, "_BLOCK_RECORDS_MIN", 2)
    data, whole = _snapshot(lambda rows, sums: None)
    path = tmp_path / f"snapshot_{_NUMBER:016x}"
    path.write_bytes(data)
    store, _ = MetadataStore.recover(tmp_path)
    store.insert_batch([(1000, (1, b""))])
    at = whole.blocks[1].offset
    with path.open("r+b") as file:
        file.seek(at + 24)
        file.write(b"\x05")
    with pytest.raises(StoreFailedError) as caught:
        store.compact()
    cause = caught.value.__cause__
    assert isinstance(cause, CorruptionError)
    assert (cause.path, cause.offset) == (str(path), at)
    with contextlib.suppress(StoreFailedError):
        store.shutdown()
    assert path.exists()
