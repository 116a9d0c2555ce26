"""The kernels against obvious models, and crc32c against the package."""

from __future__ import annotations

import itertools
import random
from collections.abc import Sequence
from unittest import mock

import crc32c
import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

import oracle
import strategies
from metastore import (
    _codec,
    _merge,
    columns,
)
from metastore.columns import Columns
from verbs import to_columns, to_records

Records = list[oracle.Record]


# crc32c


def test_crc32c_of_all_lengths(rng: random.Random) -> None:
    data = rng.randbytes(4300)
    for size in range(4201):
        start = rng.randrange(64)
        part = memoryview(data)[start : start + size]
        value = rng.getrandbits(32)
        expected = crc32c.crc32c(part, value)
        assert _codec.crc32c(part, value) == expected
        assert _codec.crc32c_table(part, value) == expected


def test_crc32c_goes_on(rng: random.Random) -> None:
    data = rng.randbytes(1 << 20)
    whole = crc32c.crc32c(data)
    assert _codec.crc32c(data) == _codec.crc32c_table(data) == whole
    for _ in range(50):
        cut = rng.randrange(len(data) + 1)
        first = _codec.crc32c(memoryview(data)[:cut])
        assert _codec.crc32c(memoryview(data)[cut:], first) == whole
    assert _codec.crc32c(b"123456789") == 0xE3069283
    assert _codec.crc32c(b"") == 0


# Kernels against models


def uint64s(numbers: Sequence[int]) -> np.ndarray:
    return np.array(numbers, dtype=np.uint64)


@settings(max_examples=30)
@given(st.lists(strategies.u64, max_size=50))
@example([])
def test_differences_and_disorder(numbers: list[int]) -> None:
    assert _codec.differences(uint64s(numbers)).tolist() == oracle.deltas(numbers)
    bad = next((i for i in range(1, len(numbers)) if numbers[i] <= numbers[i - 1]), -1)
    ones = np.ones(len(numbers), dtype=np.uint64)
    assert _codec.first_disorder(uint64s(numbers), ones) == bad
    assert _merge.is_increasing(uint64s(numbers)) == (bad == -1)


@settings(max_examples=30)
@given(st.integers(0, 40), st.integers(0, 39))
def test_disorder_finds_a_tombstone(n: int, dead: int) -> None:
    keys = np.arange(n, dtype=np.uint64)
    values = np.ones(n, dtype=np.uint64)
    values[dead : dead + 1] = 0
    assert _codec.first_disorder(keys, values) == (dead if dead < n else -1)


@settings(max_examples=30)
@given(st.integers(1, 70), st.integers(0, 40), st.integers(0, 2**32 - 1))
def test_split_planes(width: int, n: int, seed: int) -> None:
    data = random.Random(seed).randbytes(width * n)
    planes = _codec.split_planes(np.frombuffer(data, np.uint8), width)
    assert [plane.tobytes() for plane in planes] == oracle.split_planes(data, width)


def test_constant_of() -> None:
    for size in range(40):
        same = np.full(size, 0xFE, dtype=np.uint8)
        assert _codec.constant_of(same) == (0xFE if size else -1)
        for at in range(size if size > 1 else 0):
            other = same.copy()
            other[at] = 0xFF
            assert _codec.constant_of(other) == -1


keys_that_repeat = st.lists(
    st.one_of(
        st.integers(0, 8), strategies.u64, st.integers(0, 63).map(lambda i: 1 << i)
    ),
    max_size=60,
)


@given(st.integers(1, 64), st.integers(0, 300), st.integers(0, 2**32))
def test_entropy_of_planes(width: int, n: int, seed: int) -> None:
    rng = random.Random(seed)
    data = rng.randbytes(width * n)
    planes = _codec.split_planes(np.frombuffer(data, np.uint8), width)
    expected = [_codec.entropy_of_sample(plane) for plane in planes]
    assert _codec.entropy_of_planes(np.frombuffer(data, np.uint8), width) == expected
    if n > 1:
        values = [len(set(data[plane::width])) for plane in range(width)]
        assert [bits == 0 for bits in expected] == [number == 1 for number in values]


@pytest.mark.parametrize("n", [0, 1, 2, 3, 100, 4096, 4097, 5000, 100_003])
@pytest.mark.parametrize("kind", ["random", "ascending", "equal"])
def test_entropy_of_numbers(n: int, kind: str, rng: random.Random) -> None:
    """That of the planes of a sample of them, and of what it is above its neighbour."""
    numbers = np.frombuffer(rng.randbytes(8 * n), np.uint64).copy()
    if kind == "ascending":
        numbers = np.cumsum(numbers >> np.uint64(50), dtype=np.uint64)
    elif kind == "equal":
        numbers[:] = 12345
    deltas = np.diff(numbers, prepend=np.uint64(0))
    rows = np.arange(n)
    if n > 4096:
        rows = np.concatenate([(n - 512) * i // 7 + np.arange(512) for i in range(8)])
    plain, delta = _codec.entropy_of_numbers(numbers)
    for found, sampled in ((plain, numbers[rows]), (delta, deltas[rows][1:])):
        assert found == _codec.entropy_of_planes(sampled.view(np.uint8), 8)


def test_repeats(rng: random.Random) -> None:
    for width in (1, 4, 8):
        for n in range(20):
            same = np.frombuffer(rng.randbytes(width) * n, np.uint8)
            assert _codec.repeats(same, width)
            for at in range(len(same) if n > 1 else 0):
                other = same.copy()
                other[at] ^= 1
                assert not _codec.repeats(other, width)
    for width in (-1, 0, 2):
        with pytest.raises(ValueError, match="no records"):
            _codec.repeats(np.zeros(9, np.uint8), width)


def test_planes_of_other_sizes_are_refused() -> None:
    for width in (-1, 0, 2, 65):
        with pytest.raises(ValueError, match=f"of {width} bytes"):
            _codec.entropy_of_planes(np.zeros(65 * 3, np.uint8), width)


def test_a_frame_in_the_memory_of_another() -> None:
    def frame(size: int, room: bytearray | None = None) -> bytearray:
        parts = [b"x" * size]
        return _codec.encode_payload(1, _codec.LAYOUT_PLAIN, 7, size, parts, room)

    for size, other, fits in (
        (1000, 1000, True),
        (1000, 900, True),
        (1000, 501, True),
        (1000, 400, False),
        (1000, 1100, False),
        (0, 0, True),
    ):
        room = bytearray(b"!" * (48 + (size + 7) // 8 * 8))
        made = frame(other, room)
        assert (made is room) == fits
        assert made == frame(other)
        assert len(made) == 48 + (other + 7) // 8 * 8
    room = bytearray(b"!" * 1048)
    frame(600, room)
    assert frame(1000, room) is room  # it has not lost what it does not need
    with memoryview(room), pytest.raises(BufferError):
        frame(900, room)


def test_a_payload_of_many_parts() -> None:
    """Parts are joined without the GIL, in an array of a fixed size."""
    parts = [bytes([number]) * (number % 3) for number in range(85)]
    frame = _codec.encode_payload(_codec.KIND_END, _codec.LAYOUT_PLAIN, 0, 0, parts)
    size = sum(map(len, parts))
    assert frame[48 : 48 + size] == b"".join(parts)
    assert int.from_bytes(frame[32:40], "little") == size
    assert len(frame) == (48 + size + 7) // 8 * 8
    assert not any(frame[48 + size :])
    with pytest.raises(ValueError, match="86 parts"):
        _codec.encode_payload(1, 0, 0, 0, [b""] * 86)
    with pytest.raises(TypeError):
        _codec.encode_payload(1, 0, 0, 0, [b"bytes", 5])


@settings(max_examples=45)
@given(
    keys_that_repeat,
    st.sampled_from([None, 0, 1, 8]),
    st.integers(1, 4),
    st.integers(1, 16),
    st.booleans(),
)
def test_sort_last_wins(
    keys: list[int], length: int | None, threads: int, sort_bits: int, reuse: bool
) -> None:
    records = []
    for i, key in enumerate(keys):
        size = i % 5 if length is None else length
        records.append((key, i % 3, i.to_bytes(8, "little")[:size]))
    model = {key: (value, data) for key, value, data in records}
    # Threads share what is worth it: here a few records are.
    with mock.patch.multiple(columns, _RECORDS_PER_THREAD=4, _SORT_BITS=sort_bits):
        found = columns.sort_last_wins(to_columns(records), threads, reuse=reuse)
    assert to_records(found) == [(key, *model[key]) for key in sorted(model)]
    assert int(found.offsets[-1]) == len(found.user_data)


@pytest.mark.parametrize("bits", [1, 8, 11, 12, 16, 22, 33, 63, 64])
@pytest.mark.parametrize("shift", [0, 7, 40])
def test_sort_last_wins_of_many(bits: int, shift: int, rng: random.Random) -> None:
    numbers = np.random.default_rng(rng.getrandbits(32))
    n = 20_000
    keys = numbers.integers(0, 2**bits, n, dtype=np.uint64) << np.uint64(shift)
    places = np.arange(n, dtype=np.uint64)
    offsets = np.arange(n + 1, dtype=np.uint64)
    whole = Columns(keys, places, offsets, places.astype(np.uint8))
    # numpy's unique finds first places; of the reversed keys those are the last.
    expected, first = np.unique(keys[::-1], return_index=True)
    found = columns.sort_last_wins(whole, 2)
    np.testing.assert_array_equal(found.keys, expected)
    np.testing.assert_array_equal(found.values, n - 1 - first)
    np.testing.assert_array_equal(found.user_data, found.values.astype(np.uint8))


def apply(old: Records, new: Records) -> Records:
    """The records after a merge, by a dict."""
    content: dict[int, tuple[int, bytes]] = {}
    oracle.last_wins(content, [*old, *new])
    return [(key, *content[key]) for key in sorted(content)]


@st.composite
def two_runs(draw: st.DrawFn) -> tuple[Records, Records]:
    """Sorted records, and newer ones of which some replace or delete them."""
    old = draw(st.one_of(st.just([]), strategies.blocks()))
    new = draw(strategies.batches())
    for key, _, _ in old:
        what = draw(st.sampled_from(["leave", "leave", "delete", "replace"]))
        if what != "leave":
            new.append((key, 0, b"") if what == "delete" else (key, 9, b"new"))
    last = {key: (key, value, data) for key, value, data in new}
    return old, [last[key] for key in sorted(last)]


@settings(max_examples=30)
@given(two_runs(), st.integers(1, 3))
def test_merge(runs: tuple[Records, Records], threads: int) -> None:
    old, new = runs
    merged = columns.merge(to_columns(old), to_columns(new), threads)
    assert to_records(merged) == apply(old, new)
    assert int(merged.offsets[0]) == 0
    assert int(merged.offsets[-1]) == len(merged.user_data)


@settings(max_examples=30)
@given(two_runs(), st.integers(0, 5), st.integers(0, 5), st.integers(0, 2**40))
def test_merge_of_parts(
    runs: tuple[Records, Records], skip: int, leave: int, base: int
) -> None:
    # Parts share the bytes of the whole: their offsets do not begin at 0.
    parts = []
    for run in runs:
        start = min(skip, len(run))
        parts.append(to_columns(run).part(start, max(start, len(run) - leave)))
    old, new = parts
    n, size = _merge.merge_size(
        old.keys, old.offsets, new.keys, new.values, new.offsets
    )
    expected = apply(to_records(old), to_records(new))
    assert (n, size) == (len(expected), sum(len(data) for _, _, data in expected))
    merged = Columns.allocate(n, size)
    _merge.merge_into(old.arrays(), new.arrays(), merged.target(0, n, 0, size), base)
    merged.offsets[1:] -= np.uint64(base)
    assert to_records(merged) == expected


@pytest.mark.parametrize("threads", [1, 3])
def test_merge_of_many_records(threads: int, rng: random.Random) -> None:
    numbers = np.random.default_rng(rng.getrandbits(32))

    def run(n: int) -> tuple[dict[int, int], Columns]:
        keys = np.unique(numbers.integers(0, 300_000, n, dtype=np.uint64))
        values = numbers.integers(0, 4, len(keys), dtype=np.uint64)
        lengths = np.where(values > 0, keys % np.uint64(3), 0)
        offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.uint64)
        data = np.repeat(keys.astype(np.uint8), lengths.astype(np.int64))
        found = Columns(keys, values, offsets, data)
        return dict(zip(keys.tolist(), values.tolist(), strict=True)), found

    old, old_columns = run(100_000)
    live = np.flatnonzero(old_columns.values)
    old_columns = columns.merge(Columns.allocate(0, 0), old_columns)
    assert len(old_columns) == len(live)
    new, new_columns = run(100_000)
    merged = columns.merge(old_columns, new_columns, threads)
    model = {key: value for key, value in {**old, **new}.items() if value}
    assert merged.keys.tolist() == sorted(model)
    assert merged.values.tolist() == [model[key] for key in sorted(model)]
    lengths = np.diff(merged.offsets)
    np.testing.assert_array_equal(lengths, merged.keys % np.uint64(3))
    expected = np.repeat(merged.keys.astype(np.uint8), lengths.astype(np.int64))
    np.testing.assert_array_equal(merged.user_data, expected)


@settings(max_examples=30)
@given(st.lists(strategies.batches(), max_size=4), st.integers(0, 3))
def test_concatenate(batches: list[Records], skip: int) -> None:
    parts = [
        to_columns(batch).part(min(skip, len(batch)), len(batch)) for batch in batches
    ]
    expected = [record for batch in batches for record in batch[skip:]]
    joined = columns.concatenate(parts)
    assert to_records(joined) == expected
    assert joined.offsets[0] == 0


@settings(max_examples=60)
@given(
    st.lists(st.integers(0, 6) | st.integers(0, 2**64 - 1), max_size=9),
    st.sampled_from([0, 5, 2**32 - 2, 2**63]),
    st.booleans(),
)
def test_lengths_between(numbers: list[int], start: int, ascending: bool) -> None:
    if ascending:
        numbers = list(itertools.accumulate(numbers, initial=start))
        numbers = [number for number in numbers if number < 2**64]
    steps = [(b - a) % 2**64 for a, b in itertools.pairwise(numbers)]
    if any(step >= 2**32 for step in steps):
        with pytest.raises(ValueError, match="no length"):
            _codec.lengths_between(uint64s(numbers))
        return
    lengths, size = _codec.lengths_between(uint64s(numbers))
    assert lengths.dtype == np.uint32
    assert lengths.tolist() == steps
    assert size == sum(steps)


@settings(max_examples=30)
@given(strategies.batches(size_min=1), st.lists(st.integers(0, 11), max_size=40))
def test_gather(records: Records, order: list[int]) -> None:
    whole = to_columns(records)
    wanted = np.array(order, dtype=np.uint32)
    keys, values = np.zeros((2, len(order)), dtype=np.uint64)
    offsets = np.zeros(len(order) + 1, dtype=np.uint64)
    if any(i >= len(records) for i in order):
        with pytest.raises(IndexError):
            _merge.gather_into(whole.keys, wanted, keys)
        with pytest.raises(IndexError):
            _merge.gather_ends(whole.offsets, wanted, offsets[1:])
        return
    _merge.gather_into(whole.keys, wanted, keys)
    _merge.gather_into(whole.values, wanted, values)
    _merge.gather_ends(whole.offsets, wanted, offsets[1:])
    data = np.zeros(int(offsets[-1]), dtype=np.uint8)
    _merge.gather_bytes_into(whole.offsets, whole.user_data, wanted, data)
    found = to_records(Columns(keys, values, offsets, data))
    assert found == [records[i] for i in order]
    for wrong in (data[1:], np.zeros(len(data) + 1, dtype=np.uint8)):
        if len(wrong) != len(data):
            with pytest.raises(ValueError, match="another size"):
                _merge.gather_bytes_into(whole.offsets, whole.user_data, wanted, wrong)


@settings(max_examples=30)
@given(strategies.batches())
def test_common_length(records: Records) -> None:
    lengths = {len(data) for _, _, data in records}
    expected = lengths.pop() if len(lengths) == 1 else -1
    assert _merge.common_length(to_columns(records).offsets) == expected
