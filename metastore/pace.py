"""Pace: a compaction goes gently while commits come.

A commit that meets a compaction waits for two things: the device, when a piece of the
snapshot is on its way, and a processor, when packing has taken all of them. Smaller
pieces and lower priorities make each wait shorter, but every commit waits; so the
compaction leaves processors free, and rests for a multiple of the time it worked.
"""

from __future__ import annotations

import contextlib
import os
import threading
import time
from collections.abc import Callable, Iterator

from metastore.gate import Gate

__all__ = ["Pace", "give_way"]

#: Seconds of rest for each second of work: p99 of commits then stays within about
#: twice that of an idle store (docs/performance.md).
_REST_RATIO = 12.0
#: A longer rest would make nothing better.
_REST_SECONDS_MAX = 0.1
#: Commits come if one came so many seconds ago.
_RECENT_SECONDS = 0.25

_local = threading.local()


def give_way() -> None:
    """Let who waits for this processor go first; to be called amid long work.

    Nothing happens but in a thread :meth:`at work <Pace.at_work>` for a gentle pace. A
    thread that wakes is often put on the processor of a worker while another is free,
    and stays there until the next tick or the end of a slice: 2 to 4 ms.
    """
    pace: Pace | None = getattr(_local, "pace", None)
    if pace is not None and pace.is_gentle:
        os.sched_yield()


class Pace:
    """When a compaction rests. For one at a time; :meth:`hurry` is for any thread.

    Parameters
    ----------
    n_writes : callable
        Returns how often a commit was written so far: if it stands still, nobody is
        in the way and there is no rest.
    backlog : callable
        Returns what has piled up meanwhile, as a share of what may: rests shrink as it
        grows, and end when it reaches 1, so that commits never outrun compaction.
    """

    def __init__(
        self,
        n_writes: Callable[[], int] = lambda: 0,
        backlog: Callable[[], float] = lambda: 0.0,
    ) -> None:
        self._n_writes = n_writes
        self._backlog = backlog
        self._hurried = Gate()
        #: Whether commits come: then half of the threads do the work of all, give way
        #: amid it, and sync each block.
        self.is_gentle = False
        self.begin()

    def begin(self, *, commits_come: bool = False) -> None:
        """Start: gently if it is for a commit, else at full speed until one comes."""
        now = time.perf_counter()
        self._n_seen = self._n_writes()
        self._seen_at = now if commits_come else -_RECENT_SECONDS
        self._resumed_at = now
        self._decide(now)

    def hurry(self) -> None:
        """End the rest, and take no other: someone waits for the end."""
        self._hurried.open()

    def threads(self, threads: int) -> int:
        """Return how many of so many threads may work."""
        return max(1, threads // 2) if self.is_gentle else threads

    def at_once(self, threads: int) -> int:
        """Return how many jobs may be under way if there are so many threads."""
        return self.threads(threads) if self.is_gentle else 2 * threads

    @contextlib.contextmanager
    def at_work(self) -> Iterator[None]:
        """While this thread works for it: :func:`give_way` asks this pace."""
        _local.pace = self
        try:
            yield
        finally:
            del _local.pace

    def rest(self) -> None:
        """Rest from the work since the last rest, if commits come."""
        now = time.perf_counter()
        worked = now - self._resumed_at
        n_writes = self._n_writes()
        if n_writes != self._n_seen:
            self._n_seen, self._seen_at = n_writes, now
        share = self._decide(now)
        if self.is_gentle:
            self._hurried.wait(min(worked * _REST_RATIO * share, _REST_SECONDS_MAX))
        self._resumed_at = time.perf_counter()

    def _decide(self, now: float) -> float:
        """See whether to be gentle; return the share of a whole rest to take."""
        share = 1 - self._backlog() if now - self._seen_at < _RECENT_SECONDS else 0.0
        self.is_gentle = share > 0 and not self._hurried.is_open
        return share
