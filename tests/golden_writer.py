"""Write the golden files: `python tests/golden_writer.py [FOLDER]`, by hand only.

Golden files are stores of format version 1 that every later version must read. What is
there is never written again: a case of this script whose folder exists is left alone,
so that only new cases appear. Each folder holds the files of one store and
``expected.jsonl``: first the last sequence, then its records by key, each a list of
key, value and user data in base64; of long user data, size and SHA-256.
"""

from __future__ import annotations

import base64
import hashlib
import json
import random
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from unittest import mock

import oracle
import strategies
from metastore import MetadataStore, compaction, snapshot
from metastore.directory import Directory

GOLDEN = Path(__file__).resolve().parent / "data" / "golden"
EXPECTED = "expected.jsonl"
U64_MAX = 2**64 - 1

#: A log is preallocated with zeros, which tell nothing: this much of them is kept.
ZEROS_SIZE = 256
#: Longer user data is told by size and digest.
USER_DATA_SIZE_MAX = 300

Batch = list[tuple[int, tuple[int, bytes] | None]]
Content = dict[int, tuple[int, bytes]]
Shape = tuple[str, str, int | str, str]  # arguments of strategies.shaped_records


# What a case holds; test_golden.py uses this too


def expected_lines(content: Content, sequence: int) -> list[str]:
    """The lines of ``expected.jsonl``."""
    lines = [json.dumps({"sequence": sequence})]
    for key in sorted(content):
        value, user_data = content[key]
        record: list[int | str] = [key, value]
        if len(user_data) <= USER_DATA_SIZE_MAX:
            record.append(base64.b64encode(user_data).decode())
        else:
            record += [len(user_data), hashlib.sha256(user_data).hexdigest()]
        lines.append(json.dumps(record))
    return lines


def store_files(case: Path) -> dict[str, bytes]:
    """The files of a store without what is not the store's."""
    return {
        path.name: path.read_bytes()
        for path in case.iterdir()
        if path.is_file() and path.name != EXPECTED
    }


# The stores


@contextmanager
def opened(path: Path, **options: object) -> Iterator[MetadataStore]:
    store, _ = MetadataStore._recover_in(
        Directory.open_or_create(str(path)), inline=True, **options
    )
    with store:
        yield store


def write(path: Path, *batches: Batch) -> None:
    """Add batches in a session of their own: a sealed log."""
    with opened(path) as store:
        for batch in batches:
            store.insert_batch(batch)


def write_and_kill(path: Path, *batches: Batch) -> None:
    """Add batches and take the files as they are then: an open log."""
    taken = path.with_name("taken")
    with opened(path) as store:
        for batch in batches:
            store.insert_batch(batch)
        shutil.copytree(path, taken, ignore=shutil.ignore_patterns("*.tmp"))
    shutil.rmtree(path)
    taken.rename(path)


def heap(first: int, n: int) -> Batch:
    """Records as of a heap file: objects one behind the other."""
    return [
        (key, (1 + 4096 * key, b"heap-%d" % key)) for key in range(first, first + n)
    ]


def log_open(path: Path) -> None:
    write_and_kill(path, heap(1, 5), [(3, None), (2, (77, b"moved"))], heap(100, 2))


def log_sealed(path: Path) -> None:
    write(path, heap(1, 5), [(3, None), (2, (77, b"moved"))], heap(100, 2))


def logs_several(path: Path) -> None:
    write(path, heap(1, 4), heap(3, 4))
    write_and_kill(path, [(1, None)], heap(10, 3))
    write(path, [(2, (5, b"")), (2, (6, b"last wins"))])
    write_and_kill(path, heap(20, 2), [(21, None)])


def snapshot_only(path: Path) -> None:
    with opened(path) as store:
        store.insert_batch(heap(1, 100))
        store.insert_batch([(key, None) for key in range(10, 20)])
        store.compact()


def snapshot_and_logs(path: Path) -> None:
    snapshot_only(path)
    write(path, heap(15, 10), [(1, None), (50, (1, b"new"))])
    write_and_kill(path, [(15, None)], [], heap(1000, 1))


def extremes(path: Path) -> None:
    rng = random.Random(1)
    write(
        path,
        [
            (0, (1, b"")),
            (U64_MAX, (U64_MAX, b"\0")),
            (2**63, (2**63 - 1, b"\xff" * 255)),
        ],
        [],
        [(1, (1, rng.randbytes(20_480))), (2, (2, b"gone")), (3, None)],
        [(2, None), (U64_MAX - 1, (2**32, b"\r\n\0\x89MSLOG\r\n"))],
    )


def extremes_in_snapshot(path: Path) -> None:
    extremes(path)
    with opened(path) as store:
        store.insert_batch([])
        store.compact()


def packed_batch(path: Path) -> None:
    rng = random.Random(2)
    shaped = strategies.shaped_records(rng, 60, "near", "ascending", 1_200, "text")
    records: Batch = [(key, (value, data)) for key, value, data in shaped]
    rng.shuffle(records)
    dead = [(key, None) for key, _ in records[:20]]
    write(path, records[:10], [*records, *dead, records[5]])


def blocks_of_shapes(path: Path, seed: int, n: int, shapes: Sequence[Shape]) -> None:
    """One block per shape of columns; a block is far smaller here than by default."""
    rng = random.Random(seed)
    records: Batch = []
    for i, shape in enumerate(shapes):
        for key, value, data in strategies.shaped_records(rng, n, *shape):
            # Each shape in a range of its own, so that blocks and shapes agree.
            records.append(((i << 60) + (key >> 4), (value, data)))
    with (
        mock.patch.object(snapshot, "BLOCK_RECORDS_TARGET", n),
        mock.patch.object(compaction, "BLOCK_RECORDS_TARGET", n),
        opened(path, log_size_bytes_min=1 << 30) as store,
    ):
        store.insert_batch(records)
        store.compact()


def packed_numbers(path: Path) -> None:
    shapes: list[Shape] = [
        ("any", "any", 0, "any"),
        ("any", "alike", 0, "any"),
        ("any", "small", 8, "counter"),
        ("near", "ascending", "short", "text"),
        ("strided", "40 bits", 1, "alike"),
        ("consecutive", "ascending", "short", "any"),
    ]
    blocks_of_shapes(path, 3, 96, shapes)


def packed_user_data(path: Path) -> None:
    shapes: list[Shape] = [
        ("near", "small", 2, "counter"),
        ("near", "small", 8, "any"),
        ("near", "small", 16, "text"),
        ("near", "small", 64, "counter"),
        ("near", "small", 65, "counter"),
        ("near", "small", "short", "any"),
        ("near", "small", "short", "alike"),
    ]
    blocks_of_shapes(path, 4, 64, shapes)


CASES: dict[str, Callable[[Path], None]] = {
    "log_open": log_open,
    "log_sealed": log_sealed,
    "logs_several": logs_several,
    "snapshot": snapshot_only,
    "snapshot_and_logs": snapshot_and_logs,
    "extremes": extremes,
    "extremes_in_snapshot": extremes_in_snapshot,
    "packed_batch": packed_batch,
    "packed_numbers": packed_numbers,
    "packed_user_data": packed_user_data,
}


def shorten(path: Path) -> None:
    """Cut all but a few of the zeros that a log was preallocated with."""
    for file in path.glob("log_*"):
        data = file.read_bytes()
        content = data.rstrip(b"\0")
        size = len(content) + oracle.padding_size(len(content)) + ZEROS_SIZE
        file.write_bytes(data[:size])


def content_of(path: Path) -> tuple[Content, int]:
    """What metastore finds in a copy, so that the golden files stay as they are."""
    with tempfile.TemporaryDirectory() as folder:
        copy = shutil.copytree(path, Path(folder) / "copy")
        store, recovered = MetadataStore.recover(copy)
        store.shutdown()
        content = {key: (value, data) for key, value, data in recovered}
        return content, recovered.report.sequence


def write_case(name: str, target: Path) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "db"
        CASES[name](path)
        shorten(path)
        content, sequence = content_of(path)
        assert oracle.read_store(store_files(path)) == (content, sequence)
        lines = expected_lines(content, sequence)
        (path / EXPECTED).write_text("\n".join(lines) + "\n", "ascii")
        shutil.copytree(path, target)


def main() -> None:
    folder = Path(sys.argv[1]) if len(sys.argv) > 1 else GOLDEN
    folder.mkdir(parents=True, exist_ok=True)
    for name in CASES:
        target = folder / name
        if target.exists():
            print(f"{name}: there already, left alone")
            continue
        write_case(name, target)
        sizes = [path.stat().st_size for path in target.iterdir()]
        print(f"{name}: {len(sizes)} files, {sum(sizes):,} bytes")


if __name__ == "__main__":
    main()
