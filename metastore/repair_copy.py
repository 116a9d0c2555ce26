"""Every file of some directories into another, whatever the medium gives.

A repair begins with this, so that nothing which it gets wrong can lose anything.
"""

from __future__ import annotations

import contextlib
import errno
from collections.abc import Mapping

from metastore.directory import DirectoryProtocol, FileProtocol
from metastore.recovery import Progress
from metastore.salvage import Gap

__all__ = ["Copy"]

_COPY_SIZE = 1 << 20
#: What is lost of a medium that cannot be read, in bytes.
_SECTOR_SIZE = 4_096


class Copy:
    """Copies directories byte for byte, and notes what cannot be read.

    Parameters
    ----------
    sources : mapping of str to DirectoryProtocol
        The directories, by how the names of their files begin in the copy.
    progress : callable, optional
        Called as ``progress(done_bytes, total_bytes)``.
    """

    def __init__(
        self,
        sources: Mapping[str, DirectoryProtocol],
        progress: Progress | None = None,
    ) -> None:
        self._sources = sources
        self._progress = progress
        self._total = 0
        #: Names of regular files, per source.
        self._names: dict[str, list[str]] = {}
        self.n_files = 0
        #: Bytes copied.
        self.size = 0
        #: Names of all else, as links and directories, whatever is in these.
        self.not_copied: list[str] = []
        #: Bytes that the medium would not give; zeros in the copy.
        self.unreadable: dict[str, tuple[Gap, ...]] = {}

    def copy_into(self, target: DirectoryProtocol) -> None:
        """Copy every regular file, durable on return."""
        for prefix, source in self._sources.items():
            self._list(prefix, source)
        for prefix, source in self._sources.items():
            into = target.subdirectory(prefix.rstrip("/")) if prefix else target
            for name in self._names[prefix]:
                self._copy_file(source, name, into, prefix + name)
            into.sync()
            if into is not target:
                into.close()

    def _list(self, prefix: str, source: DirectoryProtocol) -> None:
        """Note what there is to copy, and what is not."""
        self._names[prefix] = []
        for name, is_file in source.names():
            if is_file:
                self._names[prefix].append(name)
                with contextlib.closing(source.open(name)) as file:
                    self._total += file.size()
            elif f"{prefix}{name}/" not in self._sources:
                self.not_copied.append(prefix + name)

    def _copy_file(
        self,
        source: DirectoryProtocol,
        name: str,
        target: DirectoryProtocol,
        shown: str,
    ) -> None:
        gaps: list[Gap] = []
        with (
            contextlib.closing(source.open(name)) as old,
            contextlib.closing(target.create(name)) as new,
        ):
            size = old.size()
            for at in range(0, size, _COPY_SIZE):
                data = _read(old, at, min(_COPY_SIZE, size - at), gaps)
                new.write([data], at)
                self.size += len(data)
                if self._progress:
                    self._progress(min(self.size, self._total), self._total)
            new.sync()
        self.n_files += 1
        if gaps:
            self.unreadable[shown] = tuple(gaps)


def _read(file: FileProtocol, offset: int, size: int, gaps: list[Gap]) -> bytes:
    """Read bytes; where the medium fails, put zeros and note the gap."""
    try:
        return bytes(file.read(offset, size))
    except OSError as error:
        if error.errno != errno.EIO:
            raise
        if size <= _SECTOR_SIZE:
            gaps.append(Gap(offset, size, f"unreadable: {error.strerror}"))
            return bytes(size)
    half = max(size // 2 // _SECTOR_SIZE, 1) * _SECTOR_SIZE
    first = _read(file, offset, half, gaps)
    return first + _read(file, offset + half, size - half, gaps)
