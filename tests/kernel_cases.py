"""Hostile bytes and arrays for the kernels, without the modules around them.

A kernel may raise ValueError, IndexError, OverflowError or TypeError; anything else,
or a memory access that the sanitizer build reports, is a finding. What a kernel's
documentation says it trusts (tables of ``scan_frames``, offsets that
``lengths_between`` accepted) is built as the callers build it.
"""

from __future__ import annotations

import random
from collections.abc import Callable

import numpy as np

import hostile
import oracle
from metastore import _codec, _merge
from metastore.columns import Columns, sort_last_wins
from metastore.frames import decode, decompress, new_table

ALLOWED = (ValueError, IndexError, OverflowError, TypeError)


def one_file(rng: random.Random) -> bytes:
    """Return a hostile file, which may be short or odd."""
    files, _ = hostile.hostile_store(rng)
    data = rng.choice([*files.values(), b"", rng.randbytes(100)])
    return data[: rng.choice([len(data), rng.randrange(len(data) + 1)])]


def size_near(rng: random.Random, size: int) -> int:
    return max(0, size + rng.choice([0] * 12 + [-1, 1, 7]))


def scan_and_decode(rng: random.Random) -> None:
    """Scan from anywhere, then decode into arrays that fit or do not."""
    data = one_file(rng)
    snapshot = data[:8] == oracle.MAGICS["snapshot"]
    seed = oracle.file_seed(data) if len(data) >= 40 else 0
    offset = rng.choice([64, 64, 64, 0, 8, 65, -1, len(data), len(data) + 1, 2**62])
    sequence = int.from_bytes(data[40:48], "little")
    sequence = rng.choice([sequence, sequence, sequence, hostile.edge(rng, 64)])
    table = new_table(rng.choice([0, 1, 2, 100]))
    n, stop, _ = _codec.scan_frames(data, offset, seed, sequence, table, snapshot)
    assert 0 <= n <= len(table)
    assert 0 <= stop <= len(data)
    table = table[:n]
    decode(memoryview(data), table)
    n_records, size = _codec.totals(table)
    arrays = [np.empty(size_near(rng, n_records), dtype=np.uint64) for _ in range(3)]
    if rng.random() < 0.2:
        arrays[2] = arrays[2][:0]  # ends that are not wanted
    user_data = np.empty(size_near(rng, size), dtype=np.uint8)
    cut = data[: rng.choice([len(data), rng.randrange(len(data) + 1)])]
    base = hostile.edge(rng, 64)
    _codec.decode_frames(cut, table, *arrays, user_data, base, decompress)


def search(rng: random.Random) -> None:
    """Search bytes from any place on."""
    data = one_file(rng)
    offset = rng.choice([0, 8, 64, 65, -8, len(data), 2**62])
    sequence = hostile.edge(rng, 64)
    functions: list[Callable[[], object]] = [
        lambda: _codec.find_durable(data, offset, 0, sequence),
        lambda: _codec.frame_size(data, offset),
        lambda: _codec.check_payload(data, np.zeros(rng.choice([0, 5, 6]), np.uint64)),
        lambda: _codec.split_planes(np.frombuffer(data, np.uint8), rng.randrange(70)),
        lambda: _codec.entropy_of_sample(np.frombuffer(data, np.uint8)),
        lambda: _codec.entropy_of_planes(
            np.frombuffer(data, np.uint8), rng.choice([-1, 0, 1, 2, 8, 64, 65])
        ),
        lambda: _codec.entropy_of_numbers(
            np.frombuffer(data[: len(data) & ~7], np.uint64)
        ),
        lambda: _codec.constant_of(np.frombuffer(data, np.uint8)),
        lambda: _codec.repeats(
            np.frombuffer(data, np.uint8), rng.choice([-8, 0, 1, 2, 8, 2**62])
        ),
    ]
    rng.choice(functions)()
    assert _codec.crc32c(data) == _codec.crc32c_table(data)


def columns(rng: random.Random, *, increasing: bool) -> Columns:
    """Return columns with extreme keys and offsets that ascend."""
    n = rng.choice([0, 1, 2, 30, 300, 3000])
    top = rng.choice([4, 2 * n + 2, 2**32, 2**64])
    numbers = [rng.randrange(top) for _ in range(n)]
    if rng.random() < 0.3:
        numbers = [hostile.edge(rng, 64) for _ in range(n)]
    if increasing:
        numbers = sorted(set(numbers))
    n = len(numbers)
    keys = np.array(numbers, dtype=np.uint64)
    width = rng.choice([None, 0, 8, 5])
    values = np.array([rng.randrange(rng.choice([1, 9])) for _ in range(n)], np.uint64)
    if rng.random() < 0.5:
        values += np.uint64(1)
    lengths = [
        0 if value == 0 else rng.randrange(9) if width is None else width
        for value in values
    ]
    offsets = np.cumsum([rng.choice([0, 8]), *lengths], dtype=np.uint64)
    user_data = np.frombuffer(rng.randbytes(int(offsets[-1])), np.uint8)
    return Columns(keys, values, offsets, user_data)


def rows_of(table: Columns) -> list[oracle.Record]:
    bounds = table.offsets.tolist()
    data = table.user_data.tobytes()
    return [
        (int(key), int(value), data[bounds[i] : bounds[i + 1]])
        for i, (key, value) in enumerate(zip(table.keys, table.values, strict=True))
    ]


def sort(rng: random.Random) -> None:
    """Sort, and compare with a dictionary."""
    table = columns(rng, increasing=False)
    last = {row[0]: row for row in rows_of(table)}
    made = sort_last_wins(table, rng.choice([1, 3]))
    assert rows_of(made) == [last[key] for key in sorted(last)]


def merge(rng: random.Random) -> None:
    """Merge into columns that have the right size, or not."""
    old, new = columns(rng, increasing=True), columns(rng, increasing=True)
    n, size = _merge.merge_size(
        old.keys, old.offsets, new.keys, new.values, new.offsets
    )
    out = (
        np.empty(size_near(rng, n), dtype=np.uint64),
        np.empty(size_near(rng, n), dtype=np.uint64),
        np.empty(size_near(rng, n), dtype=np.uint64),
        np.empty(size_near(rng, size), dtype=np.uint8),
    )
    _merge.merge_into(old.arrays(), new.arrays(), out, hostile.edge(rng, 64))
    state = {key: (value, user_data) for key, value, user_data in rows_of(old)}
    oracle.last_wins(state, rows_of(new))
    assert dict(zip(out[0].tolist(), out[1].tolist(), strict=True)) == {
        key: value for key, (value, _) in state.items()
    }
    assert out[3].tobytes() == b"".join(state[key][1] for key in sorted(state))


def gather(rng: random.Random) -> None:
    """Gather in orders that may point anywhere."""
    table = columns(rng, increasing=False)
    n = size_near(rng, len(table))
    top = max(1, len(table)) if rng.random() < 0.7 else rng.choice([2**31, 2**32])
    order = np.array([rng.randrange(top) for _ in range(n)], dtype=np.uint32)
    out = np.empty(size_near(rng, n), dtype=np.uint64)
    user_data = np.empty(size_near(rng, table.user_data_size), dtype=np.uint8)
    functions: list[Callable[[], object]] = [
        lambda: _merge.gather_into(table.keys, order, out),
        lambda: _merge.gather_ends(table.offsets, order, out),
        lambda: _merge.gather_bytes_into(
            table.offsets, table.user_data, order, user_data
        ),
        lambda: _merge.common_length(table.offsets[: rng.choice([0, 1, 2, n])]),
        lambda: _merge.keep_last(out, order),
        lambda: _codec.lengths_between(out),
    ]
    rng.choice(functions)()


def digits(rng: random.Random) -> None:
    """Scatter and sort with positions and ranges that may point anywhere."""
    table = columns(rng, increasing=False)
    n = len(table)
    shift, bits = rng.choice([0, 5, 53, 63, 64, -1]), rng.choice([0, 1, 4, 11, 16, 17])
    counts = _merge.histogram(table.keys, shift, bits)
    assert counts.sum() == n
    positions = np.cumsum(counts) - counts
    if rng.random() < 0.5:
        at = rng.randrange(len(positions))
        positions[at] = rng.choice([-1, n, 2**62, -(2**63)])
    to_keys, to_order = np.empty(n, np.uint64), np.empty(n, np.uint32)
    first = rng.choice([0, 2**32 - 1])
    starts = sorted(rng.randrange(n + 1) for _ in range(rng.randrange(5)))
    if starts and rng.random() < 0.3:
        starts[rng.randrange(len(starts))] = rng.choice([-1, n + 1, 2**62])
    ranges = np.array(starts, dtype=np.int64)
    longest = min(n, int(np.diff(ranges).max(initial=0)))
    spare = np.empty(size_near(rng, longest), np.uint64), np.empty(longest, np.uint32)
    keys = table.keys.copy()
    _merge.sort_ranges(keys, np.arange(n, dtype=np.uint32), *spare, ranges)
    _merge.scatter(table.keys, first, shift, bits, positions, to_keys, to_order)


def run(rng: random.Random) -> str:
    """Run one case; return what it was."""
    case = rng.choice(
        [scan_and_decode, scan_and_decode, search, sort, merge, gather, digits]
    )
    try:
        case(rng)
    except ALLOWED:
        return f"kernel {case.__name__}, refused"
    return f"kernel {case.__name__}"
