"""Stores that were written once are read for ever, by metastore and by the oracle.

The files under data/golden/ are never changed; golden_writer.py adds new cases.
"""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

import oracle
from golden_writer import EXPECTED, GOLDEN, expected_lines, store_files
from metastore import MetadataStore, errors
from metastore.directory import parse_listing

CASES = sorted(path.name for path in GOLDEN.iterdir() if path.is_dir())
CASE_SIZE_MAX = 40_000
GOLDEN_SIZE_MAX = 200_000


def expected(case: str) -> list[str]:
    return (GOLDEN / case / EXPECTED).read_text("ascii").splitlines()


def copy_of(case: str, tmp_path: Path) -> Path:
    ignored = shutil.ignore_patterns(EXPECTED)
    return shutil.copytree(GOLDEN / case, tmp_path / case, ignore=ignored)


def frames_of(found: dict[str, bytes]) -> list[oracle.Frame]:
    """The frames of all files that hold records."""
    frames: list[oracle.Frame] = []
    for name, data in found.items():
        parsed = oracle.parse_name(name)
        if parsed is None:
            continue
        if parsed[0] == "snapshot":
            frames += oracle.read_snapshot(data, parsed[1]).blocks
        else:
            frames += oracle.read_log(data, parsed[1], newest=True).batches
    return frames


@pytest.mark.parametrize("case", CASES)
def test_oracle_reads(case: str) -> None:
    found = oracle.read_store(store_files(GOLDEN / case))
    assert expected_lines(*found) == expected(case)


@pytest.mark.parametrize("case", CASES)
def test_metastore_reads(case: str, tmp_path: Path) -> None:
    path = copy_of(case, tmp_path)
    store, recovered = MetadataStore.recover(path)
    with store:
        content = {key: (value, data) for key, value, data in recovered}
        sequence = recovered.report.sequence
        assert expected_lines(content, sequence) == expected(case)
        assert recovered.report.is_clean
        assert recovered.report.unknown == ()
        assert store.insert_batch([(12345, (1, b"after"))]) == sequence + 1
    content[12345] = (1, b"after")
    store, recovered = MetadataStore.recover(path)
    with store:
        assert {key: (value, data) for key, value, data in recovered} == content
        store.compact()
    assert oracle.read_store(store_files(path)) == (content, sequence + 1)


@pytest.mark.parametrize("case", CASES)
def test_damage_in_a_golden_file_is_seen(case: str, tmp_path: Path) -> None:
    for name in store_files(GOLDEN / case):
        if oracle.parse_name(name) is None:
            continue
        path = copy_of(case, tmp_path)
        data = (path / name).read_bytes()
        (path / name).write_bytes(oracle.flip_bit(data, 20))
        with pytest.raises(errors.CorruptionError):
            MetadataStore.recover(path)
        shutil.rmtree(path)


def listing(case: str) -> tuple[int, int]:
    """How many snapshots and logs a case holds."""
    found = parse_listing([(name, True) for name in store_files(GOLDEN / case)])
    return len(found.snapshots), len(found.logs)


def is_sealed(case: str) -> bool:
    """Whether the newest log of a case is."""
    files = store_files(GOLDEN / case)
    name = max(name for name in files if name.startswith("log_"))
    log = oracle.read_log(files[name], int(name[4:], 16), newest=True)
    return log.end is not None


def test_cases_hold_what_their_names_say() -> None:
    assert listing("log_open") == listing("log_sealed") == (0, 1)
    assert not is_sealed("log_open")
    assert is_sealed("log_sealed")
    assert listing("logs_several") == (0, 4)
    assert listing("snapshot") == (1, 0)
    snapshots, logs = listing("snapshot_and_logs")
    assert snapshots == 1
    assert logs >= 2
    records = {record for frame in frames("extremes") for record in frame.records}
    keys = {key for key, _, _ in records}
    values = {value for _, value, _ in records}
    assert {0, oracle.U64_MAX} <= keys
    assert {0, 1, oracle.U64_MAX} <= values
    assert max(len(data) for _, _, data in records) >= 20_000
    assert min(frame.payload.n_records for frame in frames("extremes")) == 0


def frames(case: str) -> list[oracle.Frame]:
    return frames_of(store_files(GOLDEN / case))


def test_every_form_of_packing_is_there() -> None:
    batches = [frame.payload.layout for frame in frames("packed_batch")]
    assert batches == [oracle.PLAIN, oracle.PACKED]
    found = set()
    for frame in [*frames("packed_numbers"), *frames("packed_user_data")]:
        assert frame.payload.layout == oracle.PACKED
        data = frame.payload.data
        at = 16
        for which in range(4):
            column_filter, count, _ = oracle.PACKED_COLUMN.unpack_from(data, 4 * which)
            for _ in range(count):
                _, encoding, _, _ = oracle.PACKED_SECTION.unpack_from(data, at)
                found.add((which, column_filter, count > 1, encoding))
                at += 8
    filters = {(which, column_filter) for which, column_filter, *_ in found}
    assert filters >= {
        (oracle.KEYS, oracle.DELTA),
        (oracle.VALUES, oracle.NO_FILTER),
        (oracle.VALUES, oracle.DELTA),
    }
    shapes = {(which, planes, encoding) for which, _, planes, encoding in found}
    encodings = (oracle.CONSTANT, oracle.RAW, oracle.ZSTD)
    assert shapes >= {
        *((oracle.KEYS, True, encoding) for encoding in encodings),
        *((oracle.VALUES, True, encoding) for encoding in encodings),
        (oracle.LENGTHS, True, oracle.CONSTANT),
        (oracle.LENGTHS, True, oracle.ZSTD),
        (oracle.USER_DATA, True, oracle.CONSTANT),
        (oracle.USER_DATA, True, oracle.ZSTD),
        (oracle.USER_DATA, False, oracle.CONSTANT),
        (oracle.USER_DATA, False, oracle.RAW),
        (oracle.USER_DATA, False, oracle.ZSTD),
    }


def test_golden_files_stay_small() -> None:
    sizes = {
        case: sum(path.stat().st_size for path in (GOLDEN / case).iterdir())
        for case in CASES
    }
    assert all(size <= CASE_SIZE_MAX for size in sizes.values()), sizes
    assert sum(sizes.values()) <= GOLDEN_SIZE_MAX
