"""Recovered: the Sequence over read-only arrays that recover returns."""

from __future__ import annotations

import copy
import gc
import pickle
from collections.abc import Sequence

import numpy as np
import pytest

from verbs import Batch, write

SOME: Batch = [
    (7, (4096, b"heap-0")),
    (2**64 - 1, (2**64 - 1, b"")),
    (0, (1, b"\x00" * 5)),
    (9, (3, b"nine")),
]
SORTED = [
    (0, 1, b"\x00" * 5),
    (7, 4096, b"heap-0"),
    (9, 3, b"nine"),
    (2**64 - 1, 2**64 - 1, b""),
]


@pytest.fixture
def recovered(recover):
    store, _ = recover()
    store.insert_batch(SOME)
    store.shutdown()
    return recover()[1]


def test_recovered_is_a_sequence_sorted_by_key(recovered):
    assert isinstance(recovered, Sequence)
    assert len(recovered) == 4
    assert list(recovered) == SORTED
    assert list(reversed(recovered)) == SORTED[::-1]
    for key, value, user_data in recovered:
        assert (type(key), type(value), type(user_data)) == (int, int, bytes)


def test_recovered_by_index(recovered):
    for index in range(-4, 4):
        assert recovered[index] == SORTED[index]
    for index in (4, -5, 2**70):
        with pytest.raises(IndexError):
            recovered[index]
    assert recovered[np.int64(1)] == SORTED[1]
    with pytest.raises(TypeError):
        recovered["1"]


@pytest.mark.parametrize(
    "where",
    [
        slice(None),
        slice(1, 3),
        slice(-2, None),
        slice(None, None, 2),
        slice(None, None, -1),
        slice(3, 0, -2),
        slice(2, 2),
        slice(10, 20),
    ],
)
def test_recovered_by_slice(recovered, where):
    part = recovered[where]
    assert isinstance(part, Sequence)
    assert len(part) == len(SORTED[where])
    assert list(part) == SORTED[where]


def test_recovered_get_and_in(recovered):
    for key, value, user_data in SORTED:
        assert recovered.get(key) == (value, user_data)
        assert key in recovered
    for missing in (1, 8, 10, 2**64 - 2):
        assert recovered.get(missing) is None
        assert missing not in recovered
    assert recovered.get(np.uint64(7)) == (4096, b"heap-0")
    assert np.uint64(2**64 - 1) in recovered


def test_what_cannot_be_a_key_is_not_in_recovered(recovered):
    assert -1 not in recovered
    assert 2**64 not in recovered
    assert recovered.get(-1) is None
    assert recovered.get(2**64) is None


def test_recovered_arrays_have_the_documented_shapes(recovered):
    assert recovered.keys.dtype == recovered.values.dtype == np.uint64
    assert recovered.offsets.dtype == np.uint64
    assert recovered.user_data.dtype == np.uint8
    assert recovered.keys.tolist() == [key for key, _, _ in SORTED]
    assert recovered.values.tolist() == [value for _, value, _ in SORTED]
    assert recovered.offsets.tolist() == [0, 5, 11, 15, 15]
    assert recovered.user_data.tobytes() == b"".join(data for _, _, data in SORTED)


@pytest.mark.parametrize("name", ["keys", "values", "offsets", "user_data"])
def test_recovered_arrays_are_read_only(recovered, name):
    array = getattr(recovered, name)
    assert not array.flags.writeable
    assert array.flags.c_contiguous
    with pytest.raises(ValueError, match="read-only"):
        array[0] = 1


def test_an_empty_recovered_has_arrays_too(recover):
    _, recovered = recover()
    assert recovered.keys.shape == recovered.values.shape == (0,)
    assert recovered.offsets.tolist() == [0]
    assert recovered.user_data.shape == (0,)
    assert recovered.get(7) is None
    assert 7 not in recovered
    assert list(recovered[:]) == []


def test_recovered_outlives_the_store_and_its_files(db, recover):
    write(db, [SOME])
    store, _ = recover()
    store.compact()
    store.shutdown()
    store, recovered = recover()
    store.insert_batch([(7, None), (8, (8, b"changed"))])
    store.compact()
    store.shutdown()
    for path in db.iterdir():
        path.unlink()
    gc.collect()
    assert list(recovered) == SORTED


@pytest.mark.parametrize(
    "other",
    [
        "7",
        b"7",
        7.5,
        float("nan"),
        float("inf"),
        None,
        (7,),
        [7],
        np.timedelta64(7, "s"),
        np.timedelta64("NaT"),
        np.datetime64(7, "s"),
    ],
    ids=repr,
)
def test_what_is_no_number_is_not_in_recovered(recovered, other):
    """A duration is one of numpy's integers: it gave OverflowError."""
    assert other not in recovered
    assert recovered.get(other) is None


@pytest.mark.parametrize(
    "again",
    [copy.copy, copy.deepcopy, lambda found: pickle.loads(pickle.dumps(found))],
    ids=["copy", "deepcopy", "pickle"],
)
def test_a_copy_of_recovered_is_read_only_too(recovered, again):
    """Pickle and deepcopy make arrays anew, which anybody could write to."""
    other = again(recovered)
    assert list(other) == SORTED
    assert other.report == recovered.report
    for name in ("keys", "values", "offsets", "user_data"):
        assert not getattr(other, name).flags.writeable
