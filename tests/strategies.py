"""Hypothesis strategies for records and for how they are packed."""

from __future__ import annotations

import itertools
import random

from hypothesis import strategies as st

import oracle

U64_MAX = 2**64 - 1

# The ends of the range and the places where a byte plane carries are where codecs err.
u64 = st.one_of(
    st.integers(0, 300),
    st.integers(U64_MAX - 2, U64_MAX),
    st.sampled_from([2**k + d for k in (8, 16, 31, 32, 40, 63) for d in (-1, 0)]),
    st.integers(0, U64_MAX),
)
values = u64.filter(bool)


def user_data_lists(n: int) -> st.SearchStrategy[list[bytes]]:
    """User data of `n` records: none, all of one length, or of any lengths."""
    any_length = st.lists(st.binary(max_size=40), min_size=n, max_size=n)
    equal = st.sampled_from([1, 2, 3, 4, 5, 7, 8, 9, 16, 63, 64, 65]).flatmap(
        lambda width: st.lists(
            st.binary(min_size=width, max_size=width), min_size=n, max_size=n
        )
    )
    alike = st.binary(max_size=70).map(lambda data: [data] * n)
    return st.one_of(st.just([b""] * n), any_length, equal, alike)


def value_lists(n: int) -> st.SearchStrategy[list[int]]:
    """Nonzero values: any, one for all, or ascending as offsets in a heap do."""
    any_values = st.lists(values, min_size=n, max_size=n)
    alike = values.map(lambda value: [value] * n)
    ascending = st.integers(1, 2**40).map(
        lambda first: [first + 4096 * i for i in range(n)]
    )
    return st.one_of(any_values, alike, ascending)


@st.composite
def batches(draw: st.DrawFn, *, size_min: int = 0) -> list[oracle.Record]:
    """Records in any order, with tombstones and keys that repeat."""
    n = draw(st.integers(size_min, 12))
    keys = draw(st.lists(st.one_of(u64, st.integers(0, 3)), min_size=n, max_size=n))
    records = zip(keys, draw(value_lists(n)), draw(user_data_lists(n)), strict=True)
    dead = draw(st.sets(st.integers(0, n)))
    return [
        (key, 0, b"") if i in dead else (key, value, data)
        for i, (key, value, data) in enumerate(records)
    ]


@st.composite
def blocks(draw: st.DrawFn) -> list[oracle.Record]:
    """Records as a block holds them: keys increase, no tombstones, at least one."""
    n = draw(st.integers(1, 12))
    any_keys = st.lists(u64, min_size=n, max_size=n, unique=True).map(sorted)
    consecutive = st.integers(0, U64_MAX - n).map(
        lambda first: list(range(first, first + n))
    )
    keys = draw(st.one_of(any_keys, consecutive))
    return list(zip(keys, draw(value_lists(n)), draw(user_data_lists(n)), strict=True))


@st.composite
def snapshots(draw: st.DrawFn) -> list[list[oracle.Record]]:
    """Blocks whose keys increase across them too."""
    keys = sorted(draw(st.sets(u64, max_size=20)))
    n = len(keys)
    records = list(
        zip(keys, draw(value_lists(n)), draw(user_data_lists(n)), strict=True)
    )
    cuts = sorted({0, n, *draw(st.sets(st.integers(0, n), max_size=4))})
    return [records[a:b] for a, b in itertools.pairwise(cuts) if a < b]


encodings = st.lists(
    st.sampled_from([oracle.CONSTANT, oracle.RAW, oracle.ZSTD]), min_size=1, max_size=8
)


def column_choices(which: int) -> st.SearchStrategy[oracle.ColumnChoice]:
    """Every legal way to store column `which`."""
    filters = [oracle.NO_FILTER]
    if which in (oracle.KEYS, oracle.VALUES):
        filters.append(oracle.DELTA)
    return st.builds(
        oracle.ColumnChoice, st.sampled_from(filters), st.booleans(), encodings
    )


choices = st.tuples(*(column_choices(which) for which in range(4)))


KEY_SHAPES = ("any", "consecutive", "strided", "near")
VALUE_SHAPES = ("any", "alike", "ascending", "small", "40 bits")
LENGTHS = (0, 1, 2, 3, 4, 7, 8, 16, 63, 64, 65, 300, "short", "long")
BYTE_SHAPES = ("any", "alike", "text", "counter")


def shaped_keys(rng: random.Random, n: int, shape: str) -> list[int]:
    """Distinct keys, ascending."""
    if shape == "any":
        keys: set[int] = set()
        while len(keys) < n:
            keys.add(rng.getrandbits(64))
        return sorted(keys)
    step = {"consecutive": 1, "strided": 4096, "near": 0}[shape]
    key = rng.randrange(2**63)
    found = []
    for _ in range(n):
        found.append(key)
        key += step or rng.randrange(1, 300)
    return found


def shaped_values(rng: random.Random, n: int, shape: str) -> list[int]:
    """Nonzero values."""
    first = rng.randrange(1, 2**48)
    return {
        "any": [rng.getrandbits(64) or 1 for _ in range(n)],
        "alike": [first] * n,
        "ascending": [first + 512 * i for i in range(n)],
        "small": [rng.randrange(1, 200) for _ in range(n)],
        "40 bits": [rng.getrandbits(40) or 1 for _ in range(n)],
    }[shape]


def shaped_user_data(
    rng: random.Random, n: int, length: int | str, shape: str
) -> list[bytes]:
    """User data of one length, or of many short or long ones."""
    found = []
    for i in range(n):
        size = length
        if isinstance(size, str):
            size = rng.randrange({"short": 12, "long": 600}[size])
        if shape == "any":
            found.append(rng.randbytes(size))
        elif shape == "alike":
            found.append(b"z" * size)
        elif shape == "counter":
            found.append((i.to_bytes(4, "little") * (size // 4 + 1))[:size])
        else:
            found.append((b"heap-%d/of/a/store;" % (i % 7) * (size // 8 + 1))[:size])
    return found


def shaped_records(
    rng: random.Random,
    n: int,
    keys: str = "any",
    values: str = "any",
    length: int | str = 8,
    user_data: str = "any",
) -> list[oracle.Record]:
    """As many records as packing takes to pay, with columns of chosen shapes."""
    return list(
        zip(
            shaped_keys(rng, n, keys),
            shaped_values(rng, n, values),
            shaped_user_data(rng, n, length, user_data),
            strict=True,
        )
    )


#: The same with everything drawn; Hypothesis shrinks the shapes, not the bytes.
shaped = st.builds(
    shaped_records,
    st.integers(0, 2**32 - 1).map(random.Random),
    st.integers(1, 400),
    st.sampled_from(KEY_SHAPES),
    st.sampled_from(VALUE_SHAPES),
    st.sampled_from(LENGTHS),
    st.sampled_from(BYTE_SHAPES),
)
