"""The exceptions of metastore.

Each is a subclass of :class:`MetastoreError`, and of the builtin that is closest to it.
An ``OSError`` of the operating system is passed on as it is.
"""

from __future__ import annotations

import errno
import os

__all__ = [
    "CorruptionError",
    "FormatVersionError",
    "MetastoreError",
    "StoreClosedError",
    "StoreFailedError",
    "StoreLockedError",
]


def shown_integer(number: int) -> str:
    """Return an integer for a message: Python refuses to write thousands of digits."""
    size = number.bit_length()
    return str(number) if size <= 256 else f"of {size} bits"


class MetastoreError(Exception):
    """The base of every error that metastore itself raises."""


class CorruptionError(MetastoreError):
    """Bytes of the store are damaged, missing or not what they must be.

    Parameters
    ----------
    path : str
        The file, or the directory where a file is missing.
    offset : int
        Where in the file the damage was met, in bytes from its start.
    reason : str
        What is wrong: stored against computed where there are two sides.
    """

    def __init__(self, path: str, offset: int, reason: str) -> None:
        super().__init__(path, offset, reason)
        self.path = path
        self.offset = offset
        self.reason = reason

    def __str__(self) -> str:
        return f"{self.reason} ({self.path}, offset {self.offset})"


class FormatVersionError(MetastoreError):
    """A file is whole, but of a format version that this release cannot read.

    Parameters
    ----------
    path : str
        The file.
    version, flags : int
        What its header says.
    """

    def __init__(self, path: str, version: int, flags: int) -> None:
        super().__init__(path, version, flags)
        self.path = path
        self.version = version
        self.flags = flags

    def __str__(self) -> str:
        return (
            f"format version {self.version} with flags {self.flags:#x} is not known to "
            f"this release, which reads version 1: use a newer one ({self.path})"
        )


class StoreLockedError(MetastoreError, BlockingIOError):
    """Another store object, in this process or another, holds the directory.

    Parameters
    ----------
    path : str
        The directory.
    holder_pid : int or None
        The process that holds it, where the system tells.
    """

    def __init__(self, path: str, holder_pid: int | None = None) -> None:
        # What the builtin takes first is an errno and its text.
        super().__init__(errno.EAGAIN, os.strerror(errno.EAGAIN), path)
        self.path = path
        self.holder_pid = holder_pid

    def __reduce__(self) -> tuple[object, ...]:
        """Pickle and copy by the arguments of this class, not of the builtin."""
        return type(self), (self.path, self.holder_pid), vars(self)

    def __str__(self) -> str:
        holder = "" if self.holder_pid is None else f" by process {self.holder_pid}"
        return (
            f"the directory is locked{holder}: shut that store down first ({self.path})"
        )


class StoreClosedError(MetastoreError, ValueError):
    """The store was shut down, or belongs to the parent of this forked process."""

    @classmethod
    def in_a_fork(cls, path: str) -> StoreClosedError:
        """Return the error for what a forked child may not do to its parent's store."""
        return cls(
            "the store belongs to the parent of this forked process: recover it here "
            f"after that has shut it down ({path})"
        )


class StoreFailedError(MetastoreError, OSError):
    """A write or a sync failed; the first failure is the ``__cause__`` and sticks.

    Nothing is retried: whether the batch at hand is durable shows only at the next
    recovery.
    """
