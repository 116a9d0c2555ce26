"""Work shared by threads: order, bounds, errors, and what the caller does itself."""

from __future__ import annotations

import contextlib
import gc
import itertools
import threading
import weakref
from collections.abc import Iterator
from typing import NoReturn

import numpy as np
import pytest

from metastore.columns import Columns, sort_last_wins
from metastore.parallel import map_at_once, ordered_map

#: Only a test that fails waits so long.
_SECONDS_MAX = 30


def _begun_first(begun: threading.Event) -> Iterator[int]:
    """Twenty items; the first has been begun before there are others."""
    yield 0
    assert begun.wait(_SECONDS_MAX)
    yield from range(1, 20)


@pytest.mark.parametrize("caller_works", [False, True])
@pytest.mark.parametrize("threads", [1, 2, 3, 8])
def test_results_come_in_the_order_of_the_items(
    threads: int, caller_works: bool
) -> None:
    found = ordered_map(hex, range(200), threads, caller_works=caller_works)
    assert list(found) == list(map(hex, range(200)))


@pytest.mark.parametrize("caller_works", [False, True])
@pytest.mark.parametrize("threads", [2, 3])
def test_items_are_drawn_no_further_than_memory_allows(
    threads: int, caller_works: bool
) -> None:
    drawn = 0

    def items() -> Iterator[int]:
        nonlocal drawn
        for item in range(100):
            drawn = item + 1
            yield item

    for n_had, _ in enumerate(
        ordered_map(str, items(), threads, caller_works=caller_works)
    ):
        assert drawn <= n_had + 2 * threads


def test_the_caller_does_what_the_others_are_too_busy_for() -> None:
    """The only other thread waits until the caller has done an item itself."""
    caller = threading.get_ident()
    helped, begun = threading.Event(), threading.Event()
    by_caller = []

    def work(item: int) -> int:
        if threading.get_ident() == caller:
            by_caller.append(item)
            helped.set()
        else:
            begun.set()
            assert helped.wait(_SECONDS_MAX)
        return item

    done = ordered_map(work, _begun_first(begun), 2, caller_works=True)
    assert list(done) == list(range(20))
    assert by_caller[0] == 1  # the first that nobody had begun


def test_the_caller_leaves_the_work_to_others_unless_it_is_asked() -> None:
    caller = threading.get_ident()
    found = ordered_map(lambda _: threading.get_ident(), range(50), 2)
    assert caller not in set(found)


def test_an_error_of_the_caller_waits_for_its_turn() -> None:
    """The first item that fails is told, whoever came upon another one sooner."""
    caller = threading.get_ident()
    helped, begun = threading.Event(), threading.Event()

    def work(item: int) -> int:
        if threading.get_ident() == caller:
            helped.set()
            raise LookupError(f"item {item}, in the caller")
        begun.set()
        assert helped.wait(_SECONDS_MAX)
        raise ValueError(f"item {item}, in the other thread")

    found = ordered_map(work, _begun_first(begun), 2, caller_works=True)
    with pytest.raises(ValueError, match="item 0, in the other thread"):
        next(found)


def test_an_item_may_wait_for_those_before_it() -> None:
    """Blocks that are merged learn from those before them where they begin.

    The caller once did the item that it had drawn last, and waited for one that still
    stood in the queue of a thread which waited too: half of the threads' time.
    """
    n_items = 200
    done = [threading.Event() for _ in range(n_items)]

    def work(item: int) -> int:
        if item:
            assert done[item - 1].wait(_SECONDS_MAX)
        done[item].set()
        return item

    for threads in (2, 3, 8):
        for event in done:
            event.clear()
        found = ordered_map(work, range(n_items), threads, caller_works=True)
        assert list(found) == list(range(n_items))


@pytest.mark.parametrize("n_items", [2, 5])
def test_all_are_at_once_under_way_and_the_caller_has_the_first(n_items: int) -> None:
    together = threading.Barrier(n_items)

    def work(item: int) -> tuple[int, int]:
        together.wait(_SECONDS_MAX)
        return item, threading.get_ident()

    found = map_at_once(work, range(n_items))
    assert [item for item, _ in found] == list(range(n_items))
    assert found[0][1] == threading.get_ident()
    assert len({thread for _, thread in found}) == n_items


def test_nothing_and_one_need_no_thread() -> None:
    assert map_at_once(str, []) == []
    assert map_at_once(lambda _: threading.get_ident(), [0]) == [threading.get_ident()]


@pytest.mark.parametrize("bad", [0, 1])
def test_the_others_are_done_when_an_error_leaves(bad: int) -> None:
    """Else a kernel would still write to arrays that its caller has given back."""
    failed = threading.Event()
    done = []

    def work(item: int) -> None:
        if item == bad:
            failed.set()
            raise ValueError("bad item")
        assert failed.wait(_SECONDS_MAX)
        done.append(item)

    with pytest.raises(ValueError, match="bad item"):
        map_at_once(work, [0, 1])
    assert done == [1 - bad]


@pytest.fixture(params=[1, 2, 3], ids="the {}. thread fails".format)
def few_threads(
    request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    """From the n-th on no more than each other thread can be started."""
    start, n_asked = threading.Thread.start, itertools.count(1)

    def start_some(thread: threading.Thread) -> None:
        if thread.name.startswith("metastore"):
            n = next(n_asked)
            if n >= request.param and (n - request.param) % 2 == 0:
                raise RuntimeError("can't start new thread")
        start(thread)

    monkeypatch.setattr(threading.Thread, "start", start_some)


@pytest.mark.usefixtures("few_threads")
@pytest.mark.parametrize("caller_works", [False, True])
def test_each_item_is_done_once_if_a_thread_cannot_be_started(
    caller_works: bool,
) -> None:
    """The pool had queued the item by then: the caller did it, and a thread again.

    A second scatter of the same keys went on where the first had ended, and a sort
    lost records without an error: 994,017 of 1,000,000 came back.
    """
    done: list[int] = []
    items = range(100)
    found = ordered_map(done.append, items, 4, caller_works=caller_works)
    assert list(found) == [None] * 100
    assert sorted(done) == list(items)
    for n in range(2, 9):
        done.clear()
        map_at_once(done.append, range(n))
        assert sorted(done) == list(range(n))


@pytest.mark.usefixtures("few_threads")
def test_a_sort_loses_nothing_if_a_thread_cannot_be_started() -> None:
    n = 300_000
    keys = np.random.default_rng(1).permutation(n).astype(np.uint64)
    columns = Columns(
        keys,
        keys + np.uint64(1),
        np.zeros(n + 1, dtype=np.uint64),
        np.zeros(0, dtype=np.uint8),
    )
    for _ in range(5):
        found = sort_last_wins(columns, 4)
        assert np.array_equal(found.keys, np.arange(n, dtype=np.uint64))
        assert np.array_equal(found.values, found.keys + np.uint64(1))


def test_without_any_thread_the_caller_does_everything(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A store may be opened or compacted while the interpreter exits."""

    def start(_: threading.Thread) -> NoReturn:
        raise RuntimeError("can't create new thread at interpreter shutdown")

    monkeypatch.setattr(threading.Thread, "start", start)
    for caller_works in (False, True):
        found = ordered_map(str, range(9), 2, caller_works=caller_works)
        assert list(found) == list(map(str, range(9)))
    assert map_at_once(str, range(9)) == list(map(str, range(9)))


def test_the_end_frees_an_item_that_waits_for_one_that_never_begins() -> None:
    """Else the pool, and with it the error, would wait for ever."""
    freed = threading.Event()
    waits = threading.Event()

    def work(item: int) -> None:
        waits.set()
        assert freed.wait(_SECONDS_MAX)

    def items() -> Iterator[int]:
        yield 0
        assert waits.wait(_SECONDS_MAX)
        raise LookupError("no more items")

    found = ordered_map(work, items(), 2, caller_works=True, on_end=freed.set)
    with pytest.raises(LookupError, match="no more items"):
        next(found)
    assert freed.is_set()


@pytest.mark.parametrize("caller_works", [False, True])
@pytest.mark.parametrize("threads", [1, 2, 3])
def test_an_error_that_was_dropped_is_gone(threads: int, caller_works: bool) -> None:
    """Its traceback held the frames, and with them whole columns and a mapped file."""

    class Held:
        pass

    class PlannedError(Exception):
        pass

    def work(item: int) -> int:
        held = Held()
        references.append(weakref.ref(held))
        if item % 2:
            raise PlannedError
        return item

    references: list[weakref.ref[Held]] = []
    gc.collect()
    gc.disable()
    try:
        for each in (
            lambda: list(
                ordered_map(work, range(9), threads, caller_works=caller_works)
            ),
            lambda: map_at_once(work, range(threads)),
            lambda: map_at_once(work, [1, *range(threads)]),
        ):
            with contextlib.suppress(PlannedError):
                each()
        assert len(references) > 2
        assert [reference() for reference in references] == [None] * len(references)
    finally:
        gc.enable()
