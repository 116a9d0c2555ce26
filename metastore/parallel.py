"""Run one function over many items on a few threads, results in order."""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Generator, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

__all__ = ["default_threads", "ordered_map"]

Item = TypeVar("Item")
Result = TypeVar("Result")


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
) -> Generator[Result, None, None]:
    """Yield ``function(item)`` for each item, in the order of `items`.

    Items are drawn lazily, and at most ``at_once(threads)`` are under way, so that
    memory stays bounded. With one thread everything runs in the caller.
    """
    if threads <= 1:
        yield from map(function, items)
        return
    with ThreadPoolExecutor(threads, thread_name_prefix="metastore") as pool:
        under_way: deque[Future[Result]] = deque()
        try:
            for item in items:
                under_way.append(_submit(pool, function, item))
                while len(under_way) >= at_once(threads):
                    yield under_way.popleft().result()
            while under_way:
                yield under_way.popleft().result()
        finally:
            for future in under_way:
                future.cancel()


def _submit(
    pool: ThreadPoolExecutor, function: Callable[[Item], Result], item: Item
) -> Future[Result]:
    try:
        return pool.submit(function, item)
    except RuntimeError:  # no thread to be had, as while the interpreter exits
        future: Future[Result] = Future()
        future.set_result(function(item))
        return future
