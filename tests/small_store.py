"""The real store, made small and repeatable for histories on a simulated disk."""

from __future__ import annotations

import contextlib
import logging
import types
from collections.abc import Iterator
from unittest import mock

from disk import SECTOR_SIZE
from histories import LOG_SIZE_BYTES_MIN, Store
from metastore import MetadataStore, engine, log, pace, snapshot
from metastore.directory import DirectoryProtocol
from verbs import State, content


def recover_small(
    directory: DirectoryProtocol, *, inline: bool = True
) -> tuple[Store, State]:
    """Recover a store that rotates every few batches; without a thread if `inline`."""
    store, recovered = MetadataStore._recover_in(
        directory, inline=inline, threads=1, log_size_bytes_min=LOG_SIZE_BYTES_MIN
    )
    return store, content(recovered)


@contextlib.contextmanager
def repeatable() -> Iterator[None]:
    """Let every run of a history write the same bytes, and few zeros ahead."""
    clock = types.SimpleNamespace(time_ns=lambda: 1)
    dice = types.SimpleNamespace(token_bytes=lambda size: b"\x5a" * size)
    with (
        # Each torn tail is reported, and here they come by the thousand.
        mock.patch.object(logging.getLogger(engine.__name__), "disabled", True),
        mock.patch.object(engine, "secrets", dice),
        mock.patch.object(log, "time", clock),
        mock.patch.object(snapshot, "time", clock),
        mock.patch.object(log, "_AHEAD_SIZE_MIN", 2 * SECTOR_SIZE),
        # A snapshot that is synced on the way, too.
        mock.patch.object(snapshot, "_WRITE_SIZE", SECTOR_SIZE // 2),
        mock.patch.object(snapshot, "_SYNC_SIZE", SECTOR_SIZE // 2),
        mock.patch.object(snapshot, "_GENTLE_SIZE", SECTOR_SIZE // 2),
        # A disk in memory gives way at once: what rests is time in which nothing is
        # tried.
        mock.patch.object(pace, "_REST_SECONDS_MAX", 0.0002),
        # Whether a compaction goes gently must not depend on how fast a run is.
        mock.patch.object(pace, "_RECENT_SECONDS", 1e9),
    ):
        yield
