"""docs/format.md is right: its tables and its worked example are held to the code."""

from __future__ import annotations

import re
import struct
from pathlib import Path

import numpy as np
import pytest

import oracle
from metastore import MetadataStore, _codec
from metastore import format as layouts

DOCUMENT = Path(__file__).resolve().parent.parent / "docs" / "format.md"
STORE_ID = bytes(range(16))
NUMBER = 1
BATCH = [(7, (4096, b"heap-0")), (9, None)]
PACKED_RECORDS = [(10 + i, 4096 * (i + 1), b"h%d" % i) for i in range(4)]

TYPE_FORMATS = {
    "u8": "B",
    "u16": "H",
    "u32": "I",
    "u64": "Q",
    "8 bytes": "8s",
    "16 bytes": "16s",
}
DUMP_LINE = re.compile(r"([0-9a-f]{4})  ([0-9a-f]{2}(?: [0-9a-f]{2}){0,15})  \S.*")


def section(number: int) -> str:
    """The text of a section of the document."""
    parts = re.split(r"^## (\d+)\. ", DOCUMENT.read_text("ascii"), flags=re.MULTILINE)
    return parts[parts.index(str(number)) + 1]


def tables(number: int) -> list[list[list[str]]]:
    """The tables of a section that begin with an offset: lines of cells."""
    found: list[list[list[str]]] = []
    inside = False
    for line in section(number).splitlines():
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        if line.startswith("| offset |"):
            found.append([])
            inside = True
        elif not line.startswith("|"):
            inside = False
        elif inside and not line.startswith("| ---"):
            found[-1].append(cells)
    return found


def dumps() -> list[bytes]:
    """The hex dumps of the worked example."""
    found = []
    for block in re.findall(r"^```text\n(.*?)^```", section(11), re.DOTALL | re.M):
        data = b""
        for line in block.splitlines():
            match = DUMP_LINE.fullmatch(line)
            assert match is not None, line
            assert int(match[1], 16) == len(data), line
            data += bytes.fromhex(match[2])
        found.append(data)
    return found


def table_format(table: list[list[str]]) -> str:
    """The struct format of a table whose offsets must add up."""
    form = "<"
    for offset, types, _ in table:
        assert int(offset) == struct.calcsize(form)
        form += "".join(TYPE_FORMATS[name] for name in types.split(", "))
    return form


def test_table_of_the_file_header() -> None:
    (table,) = tables(3)
    form = table_format(table)
    assert form == oracle.FILE_HEADER.format
    assert struct.calcsize(form) == layouts.FILE_HEADER_SIZE


def test_table_of_the_frame_header() -> None:
    (table,) = tables(4)
    form = table_format(table)
    assert form == oracle.FRAME_HEADER.format
    assert struct.calcsize(form) == layouts.FRAME_HEADER_SIZE
    assert layouts.FRAME_HEADER_SIZE == _codec.FRAME_HEADER_SIZE


def test_tables_of_the_snapshot() -> None:
    index, trailer = tables(7)
    per_block = index.pop()
    assert table_format(index) == layouts.INDEX_HEAD.format == oracle.INDEX_HEAD.format
    assert per_block[0] == (
        f"{layouts.INDEX_HEAD.size} + {layouts.INDEX_DTYPE.itemsize} i"
    )
    types = per_block[1].split(", ")
    assert "<" + "".join(TYPE_FORMATS[name] for name in types) == (
        oracle.INDEX_BLOCK.format
    )
    names = layouts.INDEX_DTYPE.names or ()
    numpy_types = [layouts.INDEX_DTYPE[name].str for name in names]
    assert numpy_types == [{"u64": "<u8", "u32": "<u4"}[name] for name in types]

    form = table_format(trailer)
    assert form == oracle.TRAILER.format
    assert struct.calcsize(form) == layouts.TRAILER_SIZE


def test_types_of_the_packed_tables() -> None:
    ((columns, sections, _),) = tables(6)
    for text, form in (
        (columns[2], oracle.PACKED_COLUMN.format),
        (sections[2], oracle.PACKED_SECTION.format),
    ):
        types = re.findall(r"\bu\d+\b", text)
        assert "<" + "".join(TYPE_FORMATS[name] for name in types) == form
    assert int(sections[0]) == 4 * oracle.PACKED_COLUMN.size


def test_oracle_reads_the_example() -> None:
    data, _ = dumps()
    log = oracle.read_log(data, NUMBER, newest=True)
    assert log.header == oracle.FileHeader("log", STORE_ID, NUMBER, 1, 0)
    assert [batch.records for batch in log.batches] == [
        [(7, 4096, b"heap-0"), (9, 0, b"")]
    ]
    assert log.batches[0].durable == 0
    assert log.end is not None
    assert log.content_size == len(data)


def test_oracle_writes_the_example() -> None:
    data, payload = dumps()
    records = [(7, 4096, b"heap-0"), (9, 0, b"")]
    assert oracle.write_log(STORE_ID, NUMBER, 1, [records]) == data
    planes = oracle.ColumnChoice(planes=True, encodings=[oracle.CONSTANT])
    deltas = oracle.ColumnChoice(oracle.DELTA, planes=True, encodings=[oracle.CONSTANT])
    choices = [deltas, oracle.ColumnChoice(), planes, planes]
    assert oracle.pack_packed(PACKED_RECORDS, choices).data == payload


def test_metastore_writes_the_example() -> None:
    data, _ = dumps()
    header = layouts.FileHeader("log", STORE_ID, NUMBER, 1, 0)
    seed = layouts.log_seed(STORE_ID, NUMBER)
    batch = _codec.encode_batch(BATCH)
    _codec.finish_frame(batch, seed, 1, 0)
    end = _codec.encode_payload(layouts.KIND_END, layouts.LAYOUT_PLAIN, 0, 0, [])
    _codec.finish_frame(end, seed, 1, 1)
    assert header.pack() + batch + end == data


def test_metastore_reads_the_example(tmp_path: Path) -> None:
    data, _ = dumps()
    (tmp_path / oracle.file_name("log", NUMBER)).write_bytes(data)
    store, recovered = MetadataStore.recover(tmp_path)
    with store:
        assert list(recovered) == [(7, 4096, b"heap-0")]
        assert store.insert_batch([]) == 2


def test_metastore_reads_the_packed_example() -> None:
    _, stored = dumps()
    payload = oracle.Payload(oracle.PACKED, 4, 8, stored)
    assert oracle.unpack_payload(payload, block=True) == PACKED_RECORDS
    seed = layouts.log_seed(STORE_ID, NUMBER)
    frame = oracle.pack_frame(seed, oracle.BATCH, payload, sequence=1)
    table = np.zeros((1, _codec.ROW_COLUMNS), dtype=np.uint64)
    assert _codec.scan_frames(frame, 0, seed, 1, table) == (
        1,
        len(frame),
        _codec.SCAN_MORE,
    )
    keys, values, ends = (np.zeros(4, dtype=np.uint64) for _ in range(3))
    user_data = np.zeros(8, dtype=np.uint8)

    def refuse(data: object, size: int) -> bytes:
        pytest.fail("the example holds no zstd section")

    assert _codec.decode_frames(
        frame, table, keys, values, ends, user_data, 0, refuse
    ) == (1, 0)
    assert keys.tolist() == [10, 11, 12, 13]
    assert values.tolist() == [4096, 8192, 12288, 16384]
    assert ends.tolist() == [2, 4, 6, 8]
    assert user_data.tobytes() == b"h0h1h2h3"


def test_metastore_frames_the_packed_example() -> None:
    _, stored = dumps()
    payload = oracle.Payload(oracle.PACKED, 4, 8, stored)
    frame = _codec.encode_payload(layouts.KIND_BLOCK, oracle.PACKED, 4, 8, [stored])
    seed = layouts.snapshot_seed(STORE_ID)
    _codec.finish_frame(frame, seed, 0, 0)
    assert bytes(frame) == oracle.pack_frame(seed, oracle.BLOCK, payload)
