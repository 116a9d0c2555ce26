"""Group commit: many threads ask, one leader writes for all of them.

A request joins the queue; whoever finds no leader becomes it, takes the whole queue,
has it written, wakes its owners and hands the lead to the first that waits by then.
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
        "frame",
        "is_done",
        "leads",
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
        self.is_done = False
        self.leads = False
        self.wake: threading.Lock | None = None


class GroupCommit:
    """The queue and its leader. Thread-safe.

    Parameters
    ----------
    write : callable
        Given a group of requests, writes and syncs what they ask and fills in their
        `sequence` and `error`. Runs in one thread at a time.
    """

    def __init__(self, write: Callable[[list[Request]], None]) -> None:
        self._write = write
        self._mutex = threading.Lock()
        self._waiting: list[Request] = []
        self._has_leader = False

    def commit(self, request: Request) -> None:
        """Return when `request` was written by this thread or another, or raise."""
        with self._mutex:
            self._waiting.append(request)
            if self._has_leader:
                request.wake = threading.Lock()
                request.wake.acquire()
            else:
                self._has_leader = request.leads = True
        if request.wake is not None:
            self._wait(request)
        if not request.is_done:
            self._lead()
        if request.error is not None:
            raise request.error

    def _wait(self, request: Request) -> None:
        assert request.wake is not None
        try:
            request.wake.acquire()
        except BaseException:  # an interrupt; the queue must not wait for us
            with self._mutex:
                if request in self._waiting:
                    self._waiting.remove(request)
                    heir = self._next_leader() if request.leads else None
                else:
                    heir = None
            _wake(heir)
            raise

    def _lead(self) -> None:
        with self._mutex:
            group, self._waiting = self._waiting, []
        try:
            self._write(group)
        except BaseException as error:
            for request in group:
                request.error = request.error or error
        finally:
            with self._mutex:
                heir = self._next_leader()
            _wake(heir)  # first, so that the next group is on its way
            for request in group:
                request.is_done = True
                _wake(request)

    def _next_leader(self) -> Request | None:
        if self._waiting:
            self._waiting[0].leads = True
            return self._waiting[0]
        self._has_leader = False
        return None


def _wake(request: Request | None) -> None:
    if request is not None and request.wake is not None:
        request.wake.release()
