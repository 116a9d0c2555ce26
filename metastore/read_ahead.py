"""Read what follows in a mapped file while what precedes is worked on."""

from __future__ import annotations

from metastore.directory import FileProtocol, is_cached
from metastore.parallel import ordered_map

__all__ = ["ReadAhead"]

#: So much is read by one thread at a time; and so many threads do, however many there
#: are to work on the map: they wait for the device, most of the time.
_PART_SIZE = 1 << 20
_N_THREADS = 4


class ReadAhead:
    """Has a file in the page cache, part by part, before it is touched in its map.

    Left to itself the system reads of a map only where a thread already waits. Asked by
    advice, it fills the cache page by page, at half the speed of calls that read; and
    threads that touch what is on its way slow it down. So threads of their own read,
    and who works on the map waits for them. If :func:`is_cached` says that everything
    is there, there are none. Not thread-safe.

    Parameters
    ----------
    file : FileProtocol
        The file; once it is closed, nothing is read ahead.
    view : memoryview
        Its map, from the first byte to where to end.
    """

    def __init__(self, file: FileProtocol, view: memoryview) -> None:
        self._file = file
        self._stop = len(view)
        self._arrived = self._stop if is_cached(view, _PART_SIZE) else 0
        parts = range(0, self._stop, _PART_SIZE)
        self._reads = ordered_map(self._fetch, parts, _N_THREADS)

    def _fetch(self, part: int) -> int:
        end = min(part + _PART_SIZE, self._stop)
        self._file.fetch(part, end - part)
        return end

    def wait(self, stop: int) -> None:
        """Return when everything before `stop` is in the page cache."""
        while self._arrived < min(stop, self._stop):
            self._arrived = next(self._reads)

    def close(self) -> None:
        """End the threads."""
        self._reads.close()
