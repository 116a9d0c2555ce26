"""Run one function over items on a few threads, results in order."""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Generator, Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

__all__ = ["default_threads", "map_at_once", "ordered_map", "submit"]

Item = TypeVar("Item")
Result = TypeVar("Result")
#: Items, each held until somebody begins it, and their futures.
_UnderWay = deque[tuple[list[Item], Future[Result]]]


def default_threads() -> int:
    """Return how many processors this process may run on."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def ordered_map(
    function: Callable[[Item], Result],
    items: Iterable[Item],
    threads: int,
    at_once: Callable[[int], int] = lambda threads: 2 * threads,
    *,
    caller_works: bool = False,
    on_end: Callable[[], None] = lambda: None,
) -> Generator[Result, None, None]:
    """Yield ``function(item)`` for each item, in the order of `items`.

    Items are drawn lazily, and at most ``at_once(threads)`` are under way, so that
    memory stays bounded. With one thread everything runs in the caller. Who may leave
    before the end closes the generator, which waits for what is under way.

    With `caller_works` the caller is one of the threads: who draws the items does work
    too, and would only take turns with the others if there were more threads than
    processors. When they are busy it does the first item that none of them has begun;
    so an item may wait for something that those before it do. If the end comes early
    some of those are never begun: `on_end` has to free who waits. It is not called with
    one thread, where nobody does.
    """
    if threads <= 1:
        yield from map(function, items)
        return
    workers = threads - caller_works
    with ThreadPoolExecutor(workers, thread_name_prefix="metastore") as pool:
        under_way: _UnderWay[Item, Result] = deque()

        def first_result() -> Result:
            held, future = under_way.popleft()
            try:
                if caller_works and future.cancel():
                    return function(held.pop())
                return future.result()
            finally:
                del future

        try:
            for item in items:
                held = [item]
                del item
                under_way.append((held, _submit(pool, function, held)))
                if caller_works and _n_waiting(under_way) > 2 * workers:
                    _help(under_way, function)
                while len(under_way) >= at_once(threads):
                    yield first_result()
            while under_way:
                yield first_result()
        finally:
            on_end()
            for _, future in reversed(under_way):  # what was begun is a prefix
                future.cancel()


def _n_waiting(under_way: _UnderWay[Item, Result]) -> int:
    return sum(not future.done() for _, future in under_way)


def _help(
    under_way: _UnderWay[Item, Result], function: Callable[[Item], Result]
) -> None:
    """Do the first item that nobody has begun; an error of it waits for its turn."""
    for n, (held, future) in enumerate(under_way):
        if future.cancel():
            under_way[n] = held, _done(function, held.pop())
            return


def map_at_once(
    function: Callable[[Item], Result], items: Sequence[Item]
) -> list[Result]:
    """Return ``function(item)`` of each item, all of them under way at once.

    The caller works too, on the first. If it slept, the system would often put two new
    threads on one processor, and the second waits for a slice of the scheduler (about
    3 ms) before it is moved to the one that the caller has left.
    """
    if len(items) <= 1:
        return list(map(function, items))
    first, *others = items
    with ThreadPoolExecutor(len(others), thread_name_prefix="metastore") as pool:
        under_way = deque(submit(pool, function, item) for item in others)
        results = [function(first)]
        while under_way:
            results.append(under_way.popleft().result())
        return results


def submit(
    pool: ThreadPoolExecutor, function: Callable[[Item], Result], item: Item
) -> Future[Result]:
    """Have a thread do an item, or do it here if there is none to be had.

    The pool may queue an item, then fail to start a thread for it, and have another
    thread do it later: so the future is ours, and who begins it first does it alone.
    """
    return _submit(pool, function, [item])


def _submit(
    pool: ThreadPoolExecutor, function: Callable[[Item], Result], held: list[Item]
) -> Future[Result]:
    """Do the same; who begins the item takes it out of `held`.

    What was queued stays in the queue until a thread looks at it, which may never be:
    an item in it, with a map and its descriptor, must not.
    """
    future: Future[Result] = Future()
    try:
        pool.submit(_run, [future], function, held)
    except RuntimeError:  # too many threads, or the interpreter exits
        if future.cancel():
            return _done(function, held.pop())
    return future


# An error holds the frames that it has passed, and those that called them. Where one of
# them holds its future, both live on, with whole columns, until the garbage collector
# comes: so none of these frames keeps one.


def _run(
    futures: list[Future[Result]], function: Callable[[Item], Result], held: list[Item]
) -> None:
    future = futures.pop()
    try:
        if future.set_running_or_notify_cancel():
            _do(future, function, held.pop(), BaseException)
    finally:
        del future


def _done(function: Callable[[Item], Result], item: Item) -> Future[Result]:
    future: Future[Result] = Future()
    try:
        _do(future, function, item, Exception)
        return future
    finally:
        del future


def _do(
    future: Future[Result],
    function: Callable[[Item], Result],
    item: Item,
    errors: type[BaseException],
) -> None:
    """Do an item for its future, which keeps the result or one of these errors."""
    try:
        future.set_result(function(item))
    except errors as error:
        future.set_exception(error)
    finally:
        del future
