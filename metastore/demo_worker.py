"""The process that ``metastore demo`` kills: files to a heap, their places to a store.

It is also the shortest honest example of how the store is meant to be used. The big
data lie in a file of our own, the heap; the store remembers where. The order is what
counts: the heap is synced first, then the batch that points into it, and only then is
anything acknowledged.
"""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

from metastore.demo_files import (
    STORE,
    Heap,
    Source,
    UnreadableError,
    file_key,
    pack_user_data,
    read_paths,
)
from metastore.errors import MetastoreError
from metastore.store import MetadataStore

__all__ = ["main", "work"]


class _Worker:
    """Stores groups of files; `tell` sends one line to the parent."""

    def __init__(self, store: MetadataStore, heap: Heap, tree: bytes) -> None:
        self._store = store
        self._heap = heap
        self._tree = tree

    def tell(self, *words: object) -> None:
        """Send a line to the parent. Short enough for a pipe to take it whole."""
        line = " ".join(map(str, words)) + "\n"
        os.write(sys.stdout.fileno(), line.encode("ascii"))

    def store_files(self, group: Sequence[tuple[int, bytes]]) -> None:
        """Store some files, given by number and path, in one batch; acknowledge it."""
        batch: list[tuple[int, tuple[int, bytes] | None]] = []
        numbers = []
        for number, path in group:
            try:
                with Source(os.path.join(self._tree, path)) as source:
                    offset, length = self._heap.append(source)
            except UnreadableError:
                self.tell("skip", number)
                continue
            user_data = pack_user_data(length, path)
            batch.append((file_key(path), (offset + 1, user_data)))
            numbers.append(number)
        if batch:
            self._heap.sync()
            self._store.insert_batch(batch)
        self.tell("batch", *numbers)


def work(directory: str, tree: str, threads: int, batch_files: int) -> None:
    """Store every file of the manifest that is not stored yet; tell of each batch.

    Parameters
    ----------
    directory : str
        The working directory, with the manifest: paths below `tree`, ended by NUL.
    tree : str
        The directory that the files are read from.
    threads : int
        How many threads commit.
    batch_files : int
        Files in a batch.
    """
    paths = read_paths(directory)
    store, recovered = MetadataStore.recover(os.path.join(directory, STORE))
    with store:
        missing = [
            (number, path)
            for number, path in enumerate(paths)
            if recovered.get(file_key(path)) is None
        ]
        heap = Heap(directory)
        worker = _Worker(store, heap, os.fsencode(tree))
        worker.tell("ready")
        groups = [
            missing[start : start + batch_files]
            for start in range(0, len(missing), batch_files)
        ]
        pool = ThreadPoolExecutor(threads)
        try:
            for _ in pool.map(worker.store_files, groups):
                pass
        finally:
            pool.shutdown(cancel_futures=True)
            heap.close()
    worker.tell("done")


def main(arguments: Sequence[str]) -> int:
    """Run :func:`work`; its arguments are those of the command line, in order."""
    logging.getLogger("metastore").addHandler(logging.NullHandler())
    directory, tree, threads, batch_files = arguments
    try:
        work(directory, tree, int(threads), int(batch_files))
    except KeyboardInterrupt:  # the parent was interrupted too, and says so
        return 130
    except BrokenPipeError:  # the parent is gone, and nobody is left to tell
        return 141
    except (MetastoreError, OSError) as error:
        print(f"metastore: demo worker: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
