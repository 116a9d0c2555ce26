"""Bugs to be planted in the store, each with the check that has to find it.

The rows are what a durable log can get wrong. A plant is in the store while its context
is entered.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

from finders import Finder, by_crashes, by_crowds, by_damage, by_faults, by_forgery
from metastore import _commit, engine, frames, log, recovery, snapshot, store
from metastore.directory import DirectoryProtocol, FileName, FileProtocol, parse_listing
from simulated import SimulatedDirectory, SimulatedFile

Plant = contextlib.AbstractContextManager[object]


def _never(*arguments: object, **options: object) -> None:
    """Take the place of a step that is left out."""


def _is_active_log(file: SimulatedFile) -> bool:
    return any(
        node is file._content and name.startswith("log_") and not name.endswith(".tmp")
        for name, node in file._disk.root.live.items()
    )


def _sync_of_the_active_log(sync: Callable[[SimulatedFile], None]) -> Plant:
    """Put `sync` in the place of the one that commits wait for."""
    right = SimulatedFile.sync

    def chosen(file: SimulatedFile) -> None:
        (sync if file._writable and _is_active_log(file) else right)(file)

    return mock.patch.object(SimulatedFile, "sync", chosen)


def acknowledged_before_the_sync() -> Plant:
    return _sync_of_the_active_log(_never)


def renamed_before_the_file_is_synced() -> Plant:
    sync = SimulatedFile.sync

    def sync_what_is_published(file: SimulatedFile) -> None:
        if file._disk.root.live.get(file._name) is not file._content or (
            not file._name.endswith(".tmp")
        ):
            sync(file)

    return mock.patch.object(SimulatedFile, "sync", sync_what_is_published)


def _only_rename(directory: DirectoryProtocol, name: FileName) -> None:
    directory.rename(name.temporary, str(name))


def no_directory_sync_after_a_log_is_created() -> Plant:
    return mock.patch.object(log, "publish", _only_rename)


def no_directory_sync_after_a_snapshot_is_renamed() -> Plant:
    return mock.patch.object(snapshot, "publish", _only_rename)


@contextlib.contextmanager
def old_files_removed_before_the_snapshot_is_durable() -> Iterator[None]:
    publish, remove = snapshot.SnapshotWriter.publish, SimulatedDirectory.remove

    def remove_and_publish(writer: snapshot.SnapshotWriter) -> int:
        directory = writer._directory
        listing = parse_listing(directory.names())
        for name in (*listing.logs, *listing.snapshots):
            if name.number <= writer._name.number:
                directory.remove(str(name))
        directory.sync()
        return publish(writer)

    def remove_if_there(directory: SimulatedDirectory, name: str) -> None:
        with contextlib.suppress(FileNotFoundError):
            remove(directory, name)

    with (
        mock.patch.object(snapshot.SnapshotWriter, "publish", remove_and_publish),
        mock.patch.object(SimulatedDirectory, "remove", remove_if_there),
    ):
        yield


def a_snapshot_replaces_itself_and_is_removed() -> Plant:
    remove_obsolete = engine.remove_obsolete

    def rewrite_and_remove(
        directory: DirectoryProtocol, content: recovery.Content
    ) -> tuple[str, ...]:
        name, logs = content.plan.snapshot, content.plan.logs
        if name is not None and not logs:
            writer = snapshot.SnapshotWriter(
                directory, name, content.plan.store_id, content.sequence
            )
            writer.encode_and_put(content.columns, 1)
            writer.publish()
            directory.remove(str(name))
        return remove_obsolete(directory, content)

    return mock.patch.object(engine, "remove_obsolete", rewrite_and_remove)


def a_torn_tail_hides_a_durable_frame() -> Plant:
    return mock.patch.object(log, "_find_durable", return_value=-1)


def a_hole_between_logs_is_accepted() -> Plant:
    judge_end = log._judge_end

    def judge_newest(*arguments: Any) -> None:
        *_, bound, _, _ = arguments
        if bound is None:
            judge_end(*arguments)

    return mock.patch.object(log, "_judge_end", judge_newest)


def a_hole_between_logs_is_made() -> Plant:
    """The log that a kill left is not synced before the next one is published."""
    read = recovery.read

    def read_what_the_cache_shows(*arguments: object, **options: object) -> object:
        return read(*arguments, **(options | {"settle_log": False}))

    return mock.patch.object(recovery, "read", read_what_the_cache_shows)


@contextlib.contextmanager
def a_sequence_is_reused_before_old_frames() -> Iterator[None]:
    """An open log is gone on with, in place, behind its last valid frame."""
    settle, writer = engine.settle, log.LogWriter

    def settle_in_place(
        directory: SimulatedDirectory, content: recovery.Content
    ) -> tuple[str, ...]:
        found.clear()
        if content.logs and not content.logs[-1][1].is_sealed:
            found.append(content.logs.pop())
        return settle(directory, content)

    found: list[tuple[FileName, log.LogContent]] = []

    def go_on(
        directory: SimulatedDirectory,
        name: FileName,
        store_id: bytes,
        sequence: int,
        prepared: FileProtocol | None = None,
    ) -> log.LogWriter:
        if not found or prepared is not None:
            return writer(directory, name, store_id, sequence, prepared)
        name, old = found.pop()
        file = directory._file_at(str(name))
        new = object.__new__(writer)
        new.name = name
        new.first_sequence = sequence - old.n_batches
        new._file = directory._handle(file, str(name), writable=True)
        seed = log.log_seed(store_id, name.number)
        file_path = str(name)
        new.tail = _commit.Tail(new._file, file_path, seed, sequence, old.end, old.size)
        return new

    with (
        mock.patch.object(engine, "settle", settle_in_place),
        mock.patch.object(engine, "LogWriter", go_on),
    ):
        yield


def the_sticky_error_is_cleared() -> Plant:
    return mock.patch.object(engine.Engine, "_fail", _never)


class _HastyCommits:
    """Lets everybody go when all is written, but for one, who still has to sync."""

    def __init__(self, *arguments: Any, **options: Any) -> None:
        self._right = _commit.GroupCommit(*arguments, **options)
        self._leads = threading.Lock()

    def commit(self, frame: bytearray | None, sync: bool) -> int:
        sequence = self._right.commit(frame, False)
        if sync and self._leads.acquire(blocking=False):
            try:
                self._right.commit(None, True)
            finally:
                self._leads.release()
        return sequence

    def __getattr__(self, name: str) -> Any:
        return getattr(self._right, name)

    def __setattr__(self, name: str, value: Any) -> None:
        if name in ("tail", "weight_max"):
            setattr(self._right, name, value)
        else:
            super().__setattr__(name, value)


def followers_are_woken_before_the_sync() -> Plant:
    return mock.patch.object(engine, "GroupCommit", _HastyCommits)


def a_failed_sync_is_retried() -> Plant:
    right = SimulatedFile.sync

    def sync(file: SimulatedFile) -> None:
        try:
            right(file)
        except OSError:
            right(file)

    return _sync_of_the_active_log(sync)


def a_read_error_is_taken_for_the_end() -> Plant:
    read = log._Source.read

    def read_or_end(source: log._Source, offset: int, size: int) -> memoryview:
        try:
            return read(source, offset, size)
        except OSError:
            source.size = offset
            return memoryview(b"")

    return mock.patch.object(log._Source, "read", read_or_end)


def a_size_is_believed() -> Plant:
    check_index = snapshot.SnapshotReader._check_index

    def check_without_sums(reader: snapshot.SnapshotReader) -> None:
        claimed = reader.n_records
        reader.n_records = sum(reader.index["n_records"].tolist())
        check_index(reader)
        reader.n_records = claimed

    return mock.patch.object(
        snapshot.SnapshotReader, "_check_index", check_without_sums
    )


def the_first_record_of_a_key_wins() -> Plant:
    encode_batch = frames.encode_batch
    return mock.patch.object(
        store, "encode_batch", lambda batch, level: encode_batch([*batch][::-1], level)
    )


PLANTS: dict[str, tuple[Callable[[], Plant], Finder]] = {
    "acknowledged before the sync": (acknowledged_before_the_sync, by_crashes),
    "renamed before the temporary file is synced": (
        renamed_before_the_file_is_synced,
        by_crashes,
    ),
    "no directory sync after a log is created": (
        no_directory_sync_after_a_log_is_created,
        by_crashes,
    ),
    "no directory sync after a rename": (
        no_directory_sync_after_a_snapshot_is_renamed,
        by_crashes,
    ),
    "old files removed before the new snapshot is durable": (
        old_files_removed_before_the_snapshot_is_durable,
        by_crashes,
    ),
    "a snapshot that replaces itself and is then removed": (
        a_snapshot_replaces_itself_and_is_removed,
        by_crashes,
    ),
    "a torn tail that hides a durable frame": (
        a_torn_tail_hides_a_durable_frame,
        by_damage,
    ),
    "a hole between logs, accepted": (a_hole_between_logs_is_accepted, by_damage),
    "a hole between logs, made": (a_hole_between_logs_is_made, by_crashes),
    "a sequence reused while old frames of it can be read": (
        a_sequence_is_reused_before_old_frames,
        by_crashes,
    ),
    "a sticky error that is cleared": (the_sticky_error_is_cleared, by_faults),
    "a group's followers woken before the leader's sync": (
        followers_are_woken_before_the_sync,
        by_crowds,
    ),
    "a failed sync retried": (a_failed_sync_is_retried, by_faults),
    "a read error taken for the end of a log": (
        a_read_error_is_taken_for_the_end,
        by_faults,
    ),
    "a size believed": (a_size_is_believed, by_forgery),
    "the last record of a key not winning within a batch": (
        the_first_record_of_a_key_wins,
        by_crashes,
    ),
}
