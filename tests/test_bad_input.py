"""Bad arguments are refused before a byte is written, and the store goes on working.

Most tests end in the same check: after the refusal the directory is what it was, the
next batch gets the next sequence, and a reopened store knows nothing of the bad one.
"""

from __future__ import annotations

import contextlib
import mmap
import operator
import os
import resource
import threading
import types
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import zstandard

import metastore.store
from metastore import MetadataStore, frames
from metastore.arguments import payload_of_arrays
from metastore.errors import StoreClosedError
from metastore.frames import encode_arrays
from verbs import content, lasting, read

GOOD = [(1, (10, b"one")), (2, (20, b"two"))]


@contextlib.contextmanager
def refused(
    db: Path,
    error: type[Exception] | tuple[type[Exception], ...],
    match: str | None = None,
) -> Iterator[MetadataStore]:
    """What happens inside must raise `error` and change nothing."""
    store, _ = MetadataStore.recover(db)
    with store:
        assert store.insert_batch(GOOD) == 1
        before = lasting(db)
        with pytest.raises(error, match=match):
            yield store
        assert lasting(db) == before
        assert store.insert_batch([(3, (30, b"three"))]) == 2
    assert read(db) == {1: (10, b"one"), 2: (20, b"two"), 3: (30, b"three")}


# insert_batch


@pytest.mark.parametrize(
    ("batch", "error"),
    [
        pytest.param(None, TypeError, id="none"),
        pytest.param(7, TypeError, id="integer"),
        pytest.param([7], TypeError, id="integers"),
        pytest.param({7: (1, b"")}, TypeError, id="dict"),
        pytest.param(["ab"], TypeError, id="text"),
        pytest.param([b"ab"], TypeError, id="bytes"),
        pytest.param([None], TypeError, id="no-record"),
        pytest.param([()], (TypeError, ValueError), id="empty-record"),
        pytest.param([(7,)], (TypeError, ValueError), id="short-record"),
        pytest.param([(7, None, None)], (TypeError, ValueError), id="long-record"),
        pytest.param([(7, 4096)], TypeError, id="value-alone"),
        pytest.param([(7, b"data")], (TypeError, ValueError), id="user-data-alone"),
        pytest.param([(7, (4096,))], (TypeError, ValueError), id="no-user-data"),
        pytest.param([(7, (1, b"", 2))], (TypeError, ValueError), id="long-new"),
        pytest.param([(7, ())], (TypeError, ValueError), id="empty-new"),
        pytest.param([[7, [1, b""]]], TypeError, id="lists"),
        pytest.param([("7", (1, b""))], TypeError, id="text-key"),
        pytest.param([(7.0, (1, b""))], TypeError, id="float-key"),
        pytest.param([(float("nan"), (1, b""))], TypeError, id="nan-key"),
        pytest.param([(np.float64(7), (1, b""))], TypeError, id="numpy-float-key"),
        pytest.param([(None, (1, b""))], TypeError, id="none-key"),
        pytest.param([(True, (1, b""))], TypeError, id="bool-key"),
        pytest.param([(np.True_, (1, b""))], TypeError, id="numpy-bool-key"),
        pytest.param([(-1, (1, b""))], OverflowError, id="negative-key"),
        pytest.param([(-1, None)], OverflowError, id="negative-key-deleted"),
        pytest.param([(2**64, (1, b""))], OverflowError, id="large-key"),
        pytest.param([(2**64, None)], OverflowError, id="large-key-deleted"),
        pytest.param([(2**200, (1, b""))], OverflowError, id="huge-key"),
        pytest.param([(7, (0, b""))], ValueError, id="zero-value"),
        pytest.param([(7, (False, b""))], TypeError, id="bool-value"),
        pytest.param([(7, (-5, b""))], OverflowError, id="negative-value"),
        pytest.param([(7, (2**64, b""))], OverflowError, id="large-value"),
        pytest.param([(7, (1.5, b""))], TypeError, id="float-value"),
        pytest.param([(7, (None, b""))], TypeError, id="none-value"),
        pytest.param([(7, (1, "text"))], TypeError, id="text-user-data"),
        pytest.param([(7, (1, None))], TypeError, id="none-user-data"),
        pytest.param([(7, (1, 5))], TypeError, id="integer-user-data"),
        pytest.param([(7, (1, [1, 2]))], TypeError, id="list-user-data"),
    ],
)
@pytest.mark.parametrize("behind", [False, True], ids=["first", "behind-good"])
def test_a_bad_batch_is_refused(db, batch, error, behind):
    if behind and isinstance(batch, list):
        batch = [(1, (99, b"never")), (50, (1, b"never")), *batch]
    with refused(db, error) as store:
        store.insert_batch(batch)


def test_the_message_names_the_record(db):
    with refused(db, OverflowError, "record 2.*key") as store:
        store.insert_batch([*GOOD, (-1, None)])


class Like:
    """An integer by ``__index__`` alone, as numpy's are."""

    def __init__(self, number):
        self.number = number

    def __index__(self):
        return self.number

    def __str__(self):
        return str(self.number)


class Named(NamedTuple):
    key: object
    new: object


@pytest.mark.parametrize("kind", [int, Like])
@pytest.mark.parametrize("what", ["key", "value"])
@pytest.mark.parametrize(
    "number", [2**64, 2**90 + 7, 2**128 - 1, 2**128, 2**128 + 7, -1, -(2**64) + 7]
)
@pytest.mark.parametrize("shape", [lambda *pair: pair, Named], ids=["tuple", "named"])
def test_no_integer_is_cut_to_64_bits(db, number, what, kind, shape):
    """A plain int is read into 128 bits where the compiler has them, then narrowed.

    The message was that of Cython where the record was of a subclass of tuple.
    """
    bad = kind(number)
    record = shape(bad, "not looked at") if what == "key" else shape(9, (bad, b""))
    message = rf"^record 2: {what} {number} is outside 0 \.\. 2\*\*64 - 1$"
    with refused(db, OverflowError, message) as store:
        store.insert_batch([*GOOD, record])


def test_an_integer_too_long_to_be_written_out(db):
    """Python refuses to: its ValueError hid which record it was."""
    message = r"^record 2: key of 20001 bits is outside 0 \.\. 2\*\*64 - 1$"
    with refused(db, OverflowError, message) as store:
        store.insert_batch([*GOOD, (1 << 20_000, None)])


class Nine(int):
    """An int that says of itself that it is another."""

    def __index__(self):
        return 9


def test_an_integer_is_what_python_says_it_is(db, recover):
    """``__index__`` was called by its name: 9 was stored for 4, and 3 for 3.7."""
    odd = Like(3.7)
    alone = types.SimpleNamespace(__index__=lambda: 5)
    assert operator.index(Nine(4)) == 4
    store, _ = recover()
    store.insert_batch([(Nine(4), (Nine(5), b""))])
    for number in (odd, alone):
        with pytest.raises(TypeError, match="record 0: key must be an integer"):
            store.insert_batch([(number, (1, b""))])
    store.shutdown()
    assert read(db) == {4: (5, b"")}


def test_a_value_of_zero_says_how_to_delete(db):
    with refused(db, ValueError, "None") as store:
        store.insert_batch([(5, (0, b""))])


def test_a_generator_that_raises_halfway(db):
    def records():
        yield 1, (99, b"never")
        yield 50, (1, b"never")
        raise LookupError("halfway")

    with refused(db, LookupError, "halfway") as store:
        store.insert_batch(records())


def test_a_generator_that_shuts_the_store_down(db):
    store, _ = MetadataStore.recover(db)
    store.insert_batch(GOOD)

    def records():
        yield 50, (1, b"never")
        store.shutdown()

    with pytest.raises(StoreClosedError):
        store.insert_batch(records())
    assert read(db) == {1: (10, b"one"), 2: (20, b"two")}


def test_a_key_whose_index_raises(db):
    class Key:
        def __index__(self) -> int:
            raise LookupError("no number")

    with refused(db, (LookupError, TypeError)) as store:
        store.insert_batch([(50, (1, b"never")), (Key(), (1, b"never"))])


def released() -> memoryview:
    view = memoryview(b"abcd")
    view.release()
    return view


@pytest.mark.parametrize(
    "user_data",
    [
        pytest.param(lambda: memoryview(b"a-b-c-d-")[::2], id="strided"),
        pytest.param(lambda: np.arange(8, dtype=np.uint8)[::2], id="numpy-strided"),
        pytest.param(lambda: np.ones((2, 2), np.uint8, order="F"), id="by-columns"),
        pytest.param(released, id="released"),
    ],
)
def test_user_data_without_contiguous_bytes_is_refused(db, user_data):
    """Where the exporter had its own error, that of numpy, it named no record."""
    with refused(db, ValueError, "^record 2: user data cannot be read") as store:
        store.insert_batch([*GOOD, (9, (1, user_data()))])


def test_user_data_of_wider_elements_counts_in_bytes(db, recover):
    store, _ = recover()
    store.insert_batch([(1, (1, np.arange(3, dtype="<u4"))), (2, (2, b"next"))])
    store.shutdown()
    wide = np.arange(3, dtype="<u4").tobytes()
    assert read(db) == {1: (1, wide), 2: (2, b"next")}


def test_a_bytearray_that_changes_during_the_iteration(db, recover):
    """Either state of it may be stored; what must not happen is a mixture of sizes."""
    data = bytearray(b"short")
    longer = b"much longer than before"

    def records():
        yield 1, (1, data)
        data[:] = longer
        yield 2, (2, b"two")
        yield 3, (3, data)

    store, _ = recover()
    store.insert_batch(records())
    store.shutdown()
    found = read(db)
    assert found[1][1] in (b"short", longer)
    assert found[2] == (2, b"two")
    assert found[3] == (3, longer)


class Meddler(int):
    """A number that does something else when it is asked for its value."""

    def __index__(self) -> int:
        self.meddle()
        return 5

    def __int__(self) -> int:
        return self.__index__()


@pytest.mark.parametrize("meddling", ["clear", "grow", "resize"])
def test_a_batch_that_changes_while_it_is_read(db, recover, meddling):
    """Refused or stored whole, and no memory is read that was given back."""
    batch = []
    data = bytearray(b"data" * 10)
    number = Meddler(5)
    number.meddle = {
        "clear": batch.clear,
        "grow": lambda: batch.extend([(9, (9, b"grown"))] * 100),
        "resize": lambda: data.extend(b"more" * 1000),
    }[meddling]
    records = [(1, (1, data)), (number, (number, data)), (3, (3, data))]
    batch.extend(records)
    store, _ = recover()
    stored = True
    try:
        store.insert_batch(batch)
    except (TypeError, ValueError, BufferError):
        stored = False
    store.insert_batch([(100, (1, b"works"))])
    store.shutdown()
    found = read(db)
    assert found.pop(100) == (1, b"works")
    assert found.pop(9, (9, b"grown")) == (9, b"grown")
    assert (set(found) == {1, 5, 3}) if stored else (found == {})
    assert {user_data for _, user_data in found.values()} <= {
        b"data" * 10,
        bytes(data),
    }


# Sizes above 4 GiB, without a byte of memory behind them


@pytest.fixture
def four_gib(tmp_path):
    with open(tmp_path / "sparse", "w+b") as file:
        file.truncate(2**32 + 4096)
        with mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ) as mapped:
            yield memoryview(mapped)


@contextlib.contextmanager
def little_memory() -> Iterator[None]:
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    yield
    after = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    assert after - before < 64 << 10  # KiB


def test_user_data_of_4_gib_is_refused_unread(db, four_gib):
    data = four_gib[: 2**32]
    with little_memory(), refused(db, OverflowError) as store:
        store.insert_batch([(50, (1, b"never")), (51, (1, data))])
    data.release()
    four_gib.release()


def test_user_data_of_4_gib_in_arrays_is_refused_unread(db, tmp_path, four_gib):
    four_gib.release()
    user_data = np.memmap(tmp_path / "sparse", np.uint8, "r", shape=(2**32,))
    keys = np.array([50, 51], np.uint64)
    with little_memory(), refused(db, OverflowError) as store:
        store.insert_arrays(keys, keys, np.array([0, 0, 2**32], np.uint64), user_data)


# insert_arrays

KEYS = np.array([1, 2, 50], np.uint64)
VALUES = np.array([99, 0, 99], np.uint64)
OFFSETS = np.array([0, 3, 3, 6], np.uint64)
USER_DATA = np.frombuffer(b"aaabbb", np.uint8)


@pytest.mark.parametrize(
    ("changed", "error"),
    [
        pytest.param({"keys": None}, TypeError, id="no-keys"),
        pytest.param({"values": None}, TypeError, id="no-values"),
        pytest.param({"keys": b"12345678"}, TypeError, id="bytes-keys"),
        pytest.param({"keys": "123"}, TypeError, id="text-keys"),
        pytest.param({"keys": KEYS.astype(float)}, TypeError, id="float-keys"),
        pytest.param({"values": np.full(3, np.nan)}, TypeError, id="nan-values"),
        pytest.param({"keys": KEYS.astype(bool)}, TypeError, id="bool-keys"),
        pytest.param({"values": KEYS.astype(bool)}, TypeError, id="bool-values"),
        pytest.param({"keys": KEYS.astype(complex)}, TypeError, id="complex-keys"),
        pytest.param({"keys": KEYS.astype(object)}, TypeError, id="object-keys"),
        pytest.param({"keys": KEYS.astype("M8[s]")}, TypeError, id="time-keys"),
        pytest.param(
            {"keys": np.array([1, -1, 2])}, (OverflowError, TypeError), id="negative"
        ),
        pytest.param(
            {"values": np.array([1, -1, 2])},
            (OverflowError, TypeError),
            id="negative-values",
        ),
        pytest.param({"keys": KEYS.reshape(3, 1)}, (TypeError, ValueError), id="2d"),
        pytest.param({"keys": KEYS[0]}, (TypeError, ValueError), id="scalar"),
        pytest.param({"keys": KEYS[:2]}, ValueError, id="short-keys"),
        pytest.param({"values": VALUES[:2]}, ValueError, id="short-values"),
        pytest.param({"values": VALUES[:0]}, ValueError, id="no-value"),
        pytest.param({"offsets": None}, (TypeError, ValueError), id="no-offsets"),
        pytest.param({"user_data": None}, (TypeError, ValueError), id="no-user-data"),
        pytest.param({"offsets": OFFSETS[:-1]}, ValueError, id="short-offsets"),
        pytest.param({"offsets": OFFSETS[:0]}, ValueError, id="empty-offsets"),
        pytest.param(
            {"offsets": np.append(OFFSETS, OFFSETS[-1])}, ValueError, id="long-offsets"
        ),
        pytest.param(
            {"offsets": np.array([0, 4, 3, 6], np.uint64)}, ValueError, id="backward"
        ),
        pytest.param(
            {"offsets": np.array([1, 3, 3, 6], np.uint64)}, ValueError, id="late-start"
        ),
        pytest.param(
            {"offsets": np.array([0, 3, 3, 5], np.uint64)}, ValueError, id="early-end"
        ),
        pytest.param(
            {"offsets": np.array([0, 3, 3, 7], np.uint64)}, ValueError, id="late-end"
        ),
        pytest.param(
            {"offsets": np.array([0, 2**63, 2**63, 6], np.uint64)},
            (ValueError, OverflowError),
            id="far-middle",
        ),
        pytest.param(
            {"offsets": np.array([0, 2**64 - 1, 3, 6], np.uint64)},
            (ValueError, OverflowError),
            id="wrapping",
        ),
        pytest.param({"offsets": OFFSETS.astype(float)}, TypeError, id="float-offsets"),
        pytest.param(
            {"offsets": np.array([0, -1, 3, 6])},
            (TypeError, ValueError, OverflowError),
            id="negative-offsets",
        ),
        pytest.param(
            {"user_data": USER_DATA.astype(np.uint16)}, TypeError, id="wide-user-data"
        ),
        pytest.param(
            {"user_data": USER_DATA.astype(float)}, TypeError, id="float-user-data"
        ),
        pytest.param({"user_data": "aaabbb"}, TypeError, id="text-user-data"),
        pytest.param(
            {"user_data": USER_DATA.reshape(2, 3)},
            (TypeError, ValueError),
            id="2d-user-data",
        ),
        pytest.param(
            {"offsets": np.array([0, 2, 4, 6], np.uint64)},
            ValueError,
            id="deletion-with-user-data",
        ),
    ],
)
def test_bad_arrays_are_refused(db, changed, error):
    arguments = {
        "keys": KEYS,
        "values": VALUES,
        "offsets": OFFSETS,
        "user_data": USER_DATA,
        **changed,
    }
    with refused(db, error) as store:
        store.insert_arrays(**arguments)


@pytest.mark.parametrize(
    "strided",
    [
        lambda data: memoryview(bytes(data.repeat(2)))[::2],
        lambda data: memoryview(bytes(data[::-1]))[::-1],
    ],
    ids=["every-second", "backward"],
)
def test_a_buffer_that_is_not_contiguous_is_refused(db, strided):
    """It gave BufferError, which names no argument; an array of the same is taken."""
    with refused(db, ValueError, "^user_data must be contiguous$") as store:
        store.insert_arrays(KEYS, VALUES, OFFSETS, strided(USER_DATA))


@pytest.mark.parametrize("name", ["keys", "values", "offsets", "user_data"])
def test_what_a_mask_hides_is_not_stored(db, name):
    """It was, as if it were there."""
    arrays = {"keys": KEYS, "values": VALUES, "offsets": OFFSETS}
    arrays["user_data"] = USER_DATA
    mask = np.zeros(len(arrays[name]), bool)
    mask[1] = True
    hidden = {**arrays, name: np.ma.array(arrays[name], mask=mask)}
    with refused(db, ValueError, f"^{name} has masked elements") as store:
        store.insert_arrays(**hidden)


def test_a_mask_that_hides_nothing_is_taken(db, recover):
    store, _ = recover()
    masked = [np.ma.array(column) for column in (KEYS, VALUES, OFFSETS, USER_DATA)]
    store.insert_arrays(*masked)
    store.shutdown()
    assert read(db) == {1: (99, b"aaa"), 50: (99, b"bbb")}


@pytest.mark.parametrize("kind", [list, tuple])
def test_a_list_of_integers_that_numpy_takes_for_floats(db, recover, kind):
    """[1, 2**63] is a list of keys; it was refused as float64."""
    keys, values = [1, 2**63, np.uint64(2**64 - 1)], [2**63, np.int8(1), 2**64 - 1]
    assert np.asarray(keys).dtype == float
    store, _ = recover()
    store.insert_arrays(kind(keys), kind(values))
    store.shutdown()
    assert read(db) == {
        key: (value, b"") for key, value in zip(keys, values, strict=True)
    }


@pytest.mark.parametrize("name", ["keys", "values", "offsets"])
@pytest.mark.parametrize(
    ("number", "shown"),
    [
        (2**64, str(2**64)),
        (-1, "-1"),
        (-(2**63) - 1, str(-(2**63) - 1)),
        (1 << 20_000, "of 20001 bits"),
    ],
    ids=["large", "negative", "too-negative", "huge"],
)
def test_a_list_names_the_integer_that_does_not_fit(db, name, number, shown):
    arrays = {"keys": KEYS, "values": VALUES, "offsets": OFFSETS}
    arrays[name] = [*arrays[name].tolist()[:2], 2**63, number]
    message = rf"^{name}\[3\] is {shown}, outside 0 \.\. 2\*\*64 - 1$"
    with refused(db, OverflowError, message) as store:
        store.insert_arrays(**arrays, user_data=USER_DATA)


@pytest.mark.parametrize(
    "other",
    [1.0, True, "1", None, np.timedelta64(1, "s"), np.float64(1), [1]],
    ids=repr,
)
def test_a_list_of_large_integers_and_something_else_is_refused(db, other):
    with refused(db, (TypeError, ValueError)) as store:
        store.insert_arrays([1, other, 2**63], [1, 1, 1])


def many_records(shape):
    """Arrays above the size that packing is tried from, each stored in another form."""
    rng = np.random.default_rng(5)
    n = 9_000
    keys = rng.integers(0, 2**64, n, np.uint64)
    values = rng.integers(1, 2**64, n, np.uint64)
    if shape == "random":
        lengths = np.full(n, 8)
    elif shape == "text":
        lengths = rng.integers(0, 40, n)
    else:  # of high entropy, and yet zstd shortens them: runs that repeat
        keys, values = np.tile(keys[:500], 18), np.tile(values[:500], 18)
        lengths = np.zeros(n, np.int64)
    offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.uint64)
    top = 4 if shape == "text" else 256
    user_data = rng.integers(0, top, int(offsets[-1]), np.uint8)
    return keys, values, offsets, user_data


def scribble(keys, values, offsets, user_data):
    """Make them what no batch may be; keys and user data may be anything."""
    values[:] = 0
    offsets[:] = 2**63
    keys[:] = 7
    user_data[:] = 7


@pytest.mark.parametrize("shape", ["random", "text", "repeating"])
def test_arrays_that_change_behind_their_check(db, recover, monkeypatch, shape):
    """A frame that contradicts itself would be durable, and end every recovery.

    Another thread may change the arrays of ``insert_arrays`` until they are in the
    frame; here between the check and the encoding.
    """
    arrays = many_records(shape)
    _, values, offsets, user_data = [array.copy() for array in arrays]

    def scribble_and_encode(*arguments):
        scribble(*arrays)
        return encode_arrays(*arguments)

    monkeypatch.setattr(metastore.store, "encode_arrays", scribble_and_encode)
    store, _ = recover()
    assert store.insert_arrays(*arrays) == 1
    store.shutdown()
    _, recovered = recover()
    if len(user_data):
        length = int(offsets[-1] - offsets[-2])
        assert list(recovered) == [(7, int(values[-1]), b"\7" * length)]
    else:
        assert not len(recovered)  # without user data any value is one, also 0


@pytest.mark.parametrize("shape", ["random", "text", "repeating"])
def test_arrays_that_change_while_they_are_packed(db, recover, monkeypatch, shape):
    """What zstd reads is a copy: of bytes that change it may make what is no frame."""
    arrays = many_records(shape)
    read = []

    class Noting:
        def __init__(self, level):
            self.compressor = zstandard.ZstdCompressor(level=level)

        def compress(self, data):
            read.append(np.frombuffer(data, np.uint8))
            return self.compressor.compress(data)

    monkeypatch.setattr(frames, "_compressor", Noting)
    store, _ = recover()
    store.insert_arrays(*arrays)
    store.shutdown()
    assert len(read) > (2 if shape == "random" else 3)
    assert not any(np.shares_memory(data, array) for data in read for array in arrays)


def test_arrays_that_another_thread_keeps_changing(db, recover):
    """Each batch holds what no moment did, and each is one that recovery takes."""
    arrays = many_records("text")
    original = [array.copy() for array in arrays]
    done = threading.Event()

    def change():
        while not done.is_set():
            scribble(*arrays)
            for array, before in zip(arrays, original, strict=True):
                array[:] = before

    store, _ = recover()
    changing = threading.Thread(target=change)
    changing.start()
    written = refused = 0
    try:
        while written < 60 and refused < 5_000:
            try:
                store.insert_arrays(*arrays, sync=False)
                written += 1
            except (ValueError, OverflowError):
                refused += 1
    finally:
        done.set()
        changing.join()
    store.shutdown()
    assert written
    _, recovered = recover()
    assert recovered.report.sequence == written


@pytest.mark.parametrize(
    "reshape",
    [
        pytest.param(
            lambda array: array.astype(array.dtype.newbyteorder(">")), id="big-endian"
        ),
        pytest.param(lambda array: np.repeat(array, 3)[::3], id="strided"),
        pytest.param(lambda array: array[::-1].copy()[::-1], id="reversed"),
        pytest.param(
            lambda array: np.frombuffer(b"!" + array.tobytes(), np.uint8)[1:].view(
                array.dtype
            ),
            id="unaligned",
        ),
    ],
)
@pytest.mark.parametrize("name", ["keys", "values", "offsets", "user_data"])
def test_arrays_of_another_layout_are_converted(db, recover, reshape, name):
    arguments = {
        "keys": KEYS,
        "values": VALUES,
        "offsets": OFFSETS,
        "user_data": USER_DATA,
    }
    arguments[name] = reshape(arguments[name])
    store, _ = recover()
    store.insert_arrays(**arguments)
    store.shutdown()
    assert read(db) == {1: (99, b"aaa"), 50: (99, b"bbb")}


def test_what_the_kernels_read_is_aligned():
    """A loop that the compiler vectorised may count on it; a buffer's slice is not."""
    unaligned = [
        np.frombuffer(b"!" + array.tobytes(), np.uint8)[1:].view(array.dtype)
        for array in (KEYS, VALUES, OFFSETS, USER_DATA)
    ]
    assert not any(array.flags.aligned for array in unaligned[:3])
    for column in payload_of_arrays(*unaligned):
        assert column.flags.aligned


def test_a_bad_sync_argument_is_no_reason_to_write(db):
    with refused(db, TypeError) as store:
        store.insert_batch([(50, (1, b"never"))], True)


# Options of recover


@pytest.mark.parametrize(
    ("options", "error"),
    [
        ({"threads": 0}, ValueError),
        ({"threads": -1}, ValueError),
        ({"threads": "2"}, TypeError),
        ({"threads": 1.5}, TypeError),
        ({"log_size_bytes_min": -1}, ValueError),
        ({"log_size_bytes_min": "64k"}, TypeError),
        ({"log_size_bytes_min": 1.5}, TypeError),
        ({"compression_level": 1000}, ValueError),
        ({"compression_level": -(10**9)}, ValueError),
        ({"compression_level": "fast"}, TypeError),
        ({"progress": 5}, TypeError),
        ({"on_damage": "ignore"}, ValueError),
        ({"on_damage": None}, (TypeError, ValueError)),
        ({"log_size": 5}, TypeError),
    ],
    ids=str,
)
def test_a_bad_option_is_refused_before_the_directory_is_touched(db, options, error):
    with pytest.raises(error, match=next(iter(options))):
        MetadataStore.recover(db, **options)
    assert not db.exists()


def test_options_are_keyword_only(db):
    with pytest.raises(TypeError):
        MetadataStore.recover(db, 65536)
    assert not db.exists()


@pytest.mark.parametrize("path", [None, 5, 1.5, ["db"]], ids=str)
def test_a_path_of_another_type_is_refused(path):
    with pytest.raises(TypeError):
        MetadataStore.recover(path)


@pytest.mark.parametrize("path", ["", "a\0b"], ids=["empty", "nul"])
def test_a_path_that_cannot_be_is_refused(tmp_path, monkeypatch, path):
    monkeypatch.chdir(tmp_path)
    with pytest.raises((ValueError, OSError)):
        MetadataStore.recover(path)
    assert os.listdir(tmp_path) == []


def test_a_store_is_made_by_recover_alone(db):
    with pytest.raises(TypeError, match="recover"):
        MetadataStore(str(db))
    assert not db.exists()


def test_nothing_of_a_refused_batch_is_in_what_was_recovered(db, recover):
    """A refusal between two batches of a group does not shift anything."""
    store, _ = recover()
    expected = {}
    for key in range(1, 60):
        if key % 3:
            store.insert_batch([(key, (key, b"kept"))], sync=key % 2 == 0)
            expected[key] = (key, b"kept")
        else:
            with pytest.raises(OverflowError):
                store.insert_batch([(key, (key, b"never")), (2**64, None)])
    store.shutdown()
    assert content(recover()[1]) == expected
