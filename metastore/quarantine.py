"""What is kept in ``quarantine/``: under which name, once, and for how long."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator

from metastore.directory import DirectoryProtocol, FileName, FileProtocol
from metastore.errors import MetastoreError

__all__ = ["Quarantine"]

#: How many torn tails stay in quarantine; they hold nothing that was acknowledged.
_TORN_TAILS_MAX = 8
#: What tells names in quarantine apart that are given a second time, and so on.
_SUFFIX = r"(?:\.([2-9]|[1-9][0-9]+))?"
_TORN_NAME = re.compile(rf"torn_log_([0-9a-f]{{16}})_([0-9a-f]{{16}}){_SUFFIX}")
#: Until a copy is whole; what a crash leaves of one is removed by the next.
_TEMPORARY_SUFFIX = r"\.tmp"
_TEMPORARY_NAME = re.compile(
    r"(?:torn_log_[0-9a-f]{16}_[0-9a-f]{16}|log_[0-9a-f]{16})"
    + _SUFFIX
    + _TEMPORARY_SUFFIX
)
_COPY_SIZE = 1 << 20


class Quarantine:
    """What is in ``quarantine/``, and what this recovery keeps there.

    People and programs may have put there what they like: nothing is removed, or taken
    for a copy, but a regular file whose name is exactly one that is given here.
    """

    def __init__(self, directory: DirectoryProtocol, target: DirectoryProtocol) -> None:
        self._directory = directory
        self._target = target
        self._names = dict(target.names())
        self.kept: list[str] = []
        for name, is_file in [*self._names.items()]:
            if is_file and _TEMPORARY_NAME.fullmatch(name):
                target.remove(name)
                del self._names[name]

    def copy(self, name: FileName, base: str, offset: int, size: int | None) -> None:
        """Keep a part of a file under this name, or the next one that is free.

        A recovery that failed has kept the same before: that copy is enough. One more
        each time would fill what is full already, and push out other torn tails.
        """
        with contextlib.closing(self._directory.open(str(name))) as file:
            part = file, offset, file.size() - offset if size is None else size
            new = self._find_copy(base, *part) or self._free_name(base)
            if new not in self._names:
                _copy(*part, self._target, new)
        self._keep(new)

    def move(self, name: FileName) -> None:
        """Move a file here; durable on return."""
        new = self._free_name(str(name))
        self._directory.move(str(name), self._target, new)
        self._target.sync()
        self._directory.sync()
        self._keep(new)

    def _keep(self, name: str) -> None:
        self._names[name] = True
        self.kept.append(name)

    def _given(self, base: str) -> dict[str, int]:
        """Return the names that were given for `base`, with their numbers."""
        pattern = re.compile(f"{re.escape(base)}{_SUFFIX}(?:{_TEMPORARY_SUFFIX})?")
        matches = map(pattern.fullmatch, self._names)
        return {match[0]: int(match[1] or 1) for match in matches if match}

    def _free_name(self, base: str) -> str:
        """Return the name behind all that were given: it must be known as the newest.

        One that became free, since the oldest tails are removed, is older than all.
        """
        given = self._given(base)
        return f"{base}.{max(given.values()) + 1}" if given else base

    def _find_copy(
        self, base: str, file: FileProtocol, offset: int, size: int
    ) -> str | None:
        for name in self._given(base):
            if self._names[name]:
                with contextlib.closing(self._target.open(name)) as copy:
                    if _is_copy(copy, file, offset, size):
                        return name
        return None

    def remove_old_tails(self) -> None:
        """Remove all torn tails but the newest, and those that were just kept."""
        tails = {
            (match[1], match[2], int(match[3] or 1)): match[0]
            for match in map(_TORN_NAME.fullmatch, self._names)
            if match and self._names[match[0]]
        }
        kept = set(self.kept) & set(tails.values())
        others = [name for _, name in sorted(tails.items()) if name not in kept]
        for name in others[: max(0, len(tails) - _TORN_TAILS_MAX)]:
            self._target.remove(name)


def _pieces(offset: int, size: int) -> Iterator[tuple[int, int]]:
    for at in range(offset, offset + size, _COPY_SIZE):
        yield at, min(_COPY_SIZE, offset + size - at)


def _copy(
    file: FileProtocol, offset: int, size: int, target: DirectoryProtocol, new: str
) -> None:
    """Copy a part of a file; the name is given to what is whole and synced."""
    temporary = f"{new}.tmp"
    try:
        with contextlib.closing(target.create(temporary)) as copy:
            for at, n in _pieces(offset, size):
                copy.write([file.read(at, n)], at - offset)
            copy.sync()
        target.rename(temporary, new)
    except BaseException:
        # The space may be what is missing. Who cannot tidy up leaves it to the next.
        with contextlib.suppress(OSError, MetastoreError):
            target.remove(temporary)
        raise


def _is_copy(copy: FileProtocol, file: FileProtocol, offset: int, size: int) -> bool:
    """Return whether a file holds a part of another, on the medium too."""
    if copy.size() != size:
        return False
    # An earlier release gave the name first: its sync may have failed.
    copy.sync()
    copy.drop_cache()
    return all(
        copy.read(at - offset, n) == file.read(at, n) for at, n in _pieces(offset, size)
    )
