"""A place to wait, that an interrupt leaves as it was."""

from __future__ import annotations

import threading

__all__ = ["Gate"]


class Gate:
    """Closed until somebody opens it, then open for good. Thread-safe.

    What ``threading.Event`` is, but each step is one call of C. An event, and a
    condition, enter and leave their lock in Python: a signal handler that raises there
    leaves it locked, and whoever asks for it next waits for ever.
    """

    def __init__(self) -> None:
        self.is_open = False
        self._lock = threading.Lock()
        self._lock.acquire()

    def open(self) -> None:
        """Let all go who wait or will; idempotent."""
        self.is_open = True
        try:
            self._lock.release()
        except RuntimeError:  # it was open
            pass

    def wait(self, seconds_max: float = -1) -> None:
        """Return when it is open, or after so long; -1: however long it takes."""
        try:
            if not self.is_open:
                self._lock.acquire(timeout=seconds_max)
        finally:  # an interrupt may come before the lock, which was got, is given on
            if self.is_open:
                self.open()
