"""Group commit: many threads ask, one leader writes for all of them.

A request joins the queue; whoever finds no leader becomes it, takes the whole queue,
has it written, wakes its owners and hands the lead to the first that waits by then.

An interrupt (a signal handler that raises) may come between any two steps. So one
reference tells who leads, every step of ``_finish`` may be done twice, and whoever
leaves early goes through it.
"""

from __future__ import annotations

import threading
from collections.abc import Callable

__all__ = ["GroupCommit", "Request"]


class Request:
    """One caller's part of a group.

    Parameters
    ----------
    frame : bytearray, optional
        A started batch frame; None to write nothing.
    sync : bool
        Whether everything so far has to be durable before the caller goes on.
    action : callable, optional
        Run by the leader after the group was written, while nobody else writes.
    """

    __slots__ = (
        "action",
        "error",
        "followers",
        "frame",
        "heir",
        "is_done",
        "is_written",
        "sequence",
        "sync",
        "wake",
    )

    def __init__(
        self,
        frame: bytearray | None,
        sync: bool,
        action: Callable[[], None] | None = None,
    ) -> None:
        self.frame = frame
        self.sync = sync
        self.action = action
        #: Set by the writer: the batch's sequence.
        self.sequence = 0
        #: Set by the writer: what this caller is to raise.
        self.error: BaseException | None = None
        #: Set by the writer when everything that was asked is done, and only then.
        self.is_written = False
        self.is_done = False
        #: Of a request that waits: released when it is done, or is to lead.
        self.wake: threading.Lock | None = None
        #: Of a leader: its group, and who leads next.
        self.followers: list[Request] = []
        self.heir: Request | None = None


class GroupCommit:
    """The queue and its leader. Thread-safe.

    Parameters
    ----------
    write : callable
        Given a group of requests, writes and syncs what they ask and fills in their
        `sequence`, `is_written` and `error`. Runs in one thread at a time. What it
        raises goes on in the leader's thread alone.
    lost : callable
        Returns what to raise for a request whose leader left before it was written.
    """

    def __init__(
        self,
        write: Callable[[list[Request]], None],
        lost: Callable[[], BaseException],
    ) -> None:
        self._write = write
        self._lost = lost
        self._mutex = threading.Lock()
        self._waiting: list[Request] = []
        self._group: list[Request] = []
        self._leader: Request | None = None

    def commit(self, request: Request) -> None:
        """Return when `request` was written by this thread or another, or raise."""
        try:
            self._join(request)
            if self._leader is not request and request.wake is not None:
                request.wake.acquire()
            if self._leader is request:
                with self._mutex:
                    self._group = self._waiting
                    self._waiting = []
                self._write(self._group)
        finally:
            try:
                self._finish(request)
            except BaseException:
                self._finish(request)
                raise
        if request.error is not None:
            raise request.error
        if not request.is_written:
            raise self._lost()

    def _join(self, request: Request) -> None:
        with self._mutex:
            if self._leader is not None:
                request.wake = threading.Lock()
                request.wake.acquire()
            self._waiting.append(request)
            if self._leader is None:
                self._leader = request

    def _finish(self, request: Request) -> None:
        """Leave the queue; a leader also lets its group go and hands on the lead."""
        if request.is_done and not request.followers and self._leader is not request:
            return  # a follower, the common case
        with self._mutex:
            if self._group is self._waiting:  # interrupted while it took the queue
                self._group = []
            if request in self._waiting:  # interrupted before it was its turn
                self._waiting.remove(request)
            if self._leader is request:
                request.followers = self._group
                request.heir = self._waiting[0] if self._waiting else None
                self._leader = request.heir
        _wake(request.heir)  # first, so that the next group is on its way
        for follower in request.followers:
            follower.is_done = True
            _wake(follower)


def _wake(request: Request | None) -> None:
    if request is not None and request.wake is not None and request.wake.locked():
        request.wake.release()
