"""Each error: its class, its attributes, and a text that names place and way out."""

from __future__ import annotations

import contextlib
import copy
import errno
import os
import pickle

import numpy as np
import pytest

import metastore
import oracle
from disk import Disk, Fault, Operation
from metastore import MetadataStore
from metastore.errors import (
    CorruptionError,
    FormatVersionError,
    MetastoreError,
    StoreClosedError,
    StoreFailedError,
    StoreLockedError,
)
from verbs import flip, logs, numbered, read_image, recover_on, snapshots, write

SAMPLES = [
    CorruptionError("db/log_0000000000000001", 64, "it is bad"),
    FormatVersionError("db/log_0000000000000001", 2, 1),
    StoreLockedError("db", 4711),
    StoreClosedError("the store was shut down"),
    StoreFailedError("the store failed"),
]


@pytest.mark.parametrize("error", SAMPLES, ids=lambda error: type(error).__name__)
def test_every_error_is_a_metastore_error(error):
    assert isinstance(error, MetastoreError)
    assert type(error).__name__ in metastore.errors.__all__


@pytest.mark.parametrize("error", SAMPLES, ids=lambda error: type(error).__name__)
@pytest.mark.parametrize(
    "again",
    [copy.copy, lambda error: pickle.loads(pickle.dumps(error))],
    ids=["copy", "pickle"],
)
def test_an_error_crosses_processes(error, again):
    other = again(error)
    assert type(other) is type(error)
    assert str(other) == str(error)
    assert vars(other) == vars(error)


def test_the_builtins_they_are_too():
    assert issubclass(StoreClosedError, ValueError)
    assert issubclass(StoreLockedError, BlockingIOError)
    assert issubclass(StoreFailedError, OSError)


# CorruptionError


def corruption(path, **options) -> CorruptionError:
    with pytest.raises(CorruptionError) as caught:
        MetadataStore.recover(path, **options)
    return caught.value


def test_a_damaged_payload_names_file_offset_and_checksums(db):
    write(db, numbered(3))
    (log,) = logs(db)
    _, second, *_ = oracle.frame_offsets(log.read_bytes())
    flip(log, second + 60)
    error = corruption(db)
    assert error.path == str(log)
    assert second <= error.offset <= second + 60
    assert "checksum" in error.reason
    assert "stored 0x" in error.reason
    assert "computed 0x" in error.reason
    assert str(error) == f"{error.reason} ({log}, offset {error.offset})"
    assert error.reason[0].islower()


def test_a_damaged_file_header_names_the_file(db):
    write(db, numbered(3))
    (log,) = logs(db)
    flip(log, 20)
    error = corruption(db)
    assert error.path == str(log)
    assert error.offset < 64
    assert "checksum" in error.reason


def test_a_foreign_file_under_our_name(db):
    write(db, numbered(3))
    (db / "log_00000000000000ff").write_bytes(b"#!/bin/sh\n" * 20)
    error = corruption(db)
    assert error.path.endswith("log_00000000000000ff")
    assert "not a log" in error.reason


def test_an_empty_file_under_our_name(db):
    write(db, numbered(3))
    (db / "snapshot_00000000000000ff").write_bytes(b"")
    error = corruption(db)
    assert error.path.endswith("snapshot_00000000000000ff")
    assert error.offset == 0


def test_a_file_under_the_name_of_another(db):
    write(db, numbered(3))
    (log,) = logs(db)
    log.rename(db / "log_0000000000000009")
    error = corruption(db)
    assert error.path.endswith("log_0000000000000009")
    assert "number" in error.reason


def test_a_log_of_another_store(db, tmp_path):
    write(db, numbered(3))
    write(tmp_path / "other", numbered(3))
    write(tmp_path / "other", numbered(1, 4))
    alien = logs(tmp_path / "other")[-1]
    (db / alien.name).write_bytes(alien.read_bytes())
    error = corruption(db)
    assert "store" in error.reason


def test_a_damaged_snapshot_names_the_block(db, recover):
    write(db, numbered(3))
    store, _ = recover()
    store.compact()
    store.shutdown()
    (snapshot,) = snapshots(db)
    flip(snapshot, 64 + 50)
    error = corruption(db)
    assert error.path == str(snapshot)
    assert 64 <= error.offset <= 64 + 50
    assert "checksum" in error.reason


def test_the_text_of_a_corruption_says_the_way_out(db):
    """Who can only read the traceback learns what `on_damage` would do."""
    write(db, numbered(3))
    flip(logs(db)[0], 64 + 60)
    with pytest.raises(CorruptionError) as caught:
        MetadataStore.recover(db)
    notes = " ".join(getattr(caught.value, "__notes__", []))
    assert "on_damage" in f"{caught.value} {notes}"


# FormatVersionError


@pytest.mark.parametrize(("version", "flags"), [(2, 0), (0, 0), (65535, 0), (1, 4)])
@pytest.mark.parametrize("kind", ["log", "snapshot"])
def test_a_file_of_another_version(db, recover, kind, version, flags):
    write(db, numbered(3))
    if kind == "snapshot":
        store, _ = recover()
        store.compact()
        store.shutdown()
    path = (logs(db) if kind == "log" else snapshots(db))[-1]
    data = oracle.set_file_field(path.read_bytes(), "version", version)
    data = oracle.set_file_field(data, "flags", flags)
    path.write_bytes(oracle.fix_file_header(data))
    with pytest.raises(FormatVersionError) as caught:
        MetadataStore.recover(db)
    error = caught.value
    assert (error.path, error.version, error.flags) == (str(path), version, flags)
    assert str(path) in str(error)
    assert f"version {version}" in str(error)
    assert "reads version 1" in str(error)


def test_a_file_of_another_version_is_not_damage_to_set_aside(db):
    """A newer release's store is whole: `prefix` must not take it apart."""
    write(db, numbered(3))
    (log,) = logs(db)
    data = oracle.set_file_field(log.read_bytes(), "version", 2)
    log.write_bytes(oracle.fix_file_header(data))
    before = log.read_bytes()
    with pytest.raises(FormatVersionError):
        MetadataStore.recover(db, on_damage="prefix")
    assert log.read_bytes() == before


# StoreLockedError


def test_a_locked_store_names_directory_and_holder(db, recover):
    recover()
    with pytest.raises(StoreLockedError) as caught:
        MetadataStore.recover(db)
    assert caught.value.path == str(db)
    assert caught.value.holder_pid == os.getpid()
    text = str(caught.value)
    assert str(db) in text
    assert f"process {os.getpid()}" in text
    assert "shut that store down" in text


@pytest.mark.parametrize(
    "again",
    [lambda error: error, copy.copy, lambda error: pickle.loads(pickle.dumps(error))],
    ids=["itself", "copy", "pickle"],
)
def test_a_locked_store_is_an_error_of_the_system_too(again):
    """Its errno was the directory, its strerror the process: who compares, fails."""
    error = StoreLockedError("db", 4711)
    error.add_note("of who caught it")
    error = again(error)
    assert error.__notes__ == ["of who caught it"]
    assert error.errno == errno.EAGAIN
    assert error.strerror == os.strerror(errno.EAGAIN)
    assert (error.filename, error.path, error.holder_pid) == ("db", "db", 4711)
    assert "locked by process 4711" in str(error)


def test_a_locked_store_whose_holder_is_not_known():
    error = StoreLockedError("db")
    assert error.holder_pid is None
    assert "process" not in str(error)
    assert "db" in str(error)


# StoreClosedError


def test_a_closed_store_says_so(recover):
    store, _ = recover()
    store.shutdown()
    with pytest.raises(StoreClosedError, match="shut down") as caught:
        store.insert_batch([(1, (1, b""))])
    assert isinstance(caught.value, ValueError)


# StoreFailedError


def fail(kind: str, number: int = errno.EIO):
    """Let every call of a kind fail from now on."""

    def before(operation: Operation) -> Fault | None:
        return Fault(number) if operation.kind == kind else None

    return before


@pytest.mark.parametrize("inline", [True, False], ids=["inline", "threads"])
@pytest.mark.parametrize("number", [errno.EIO, errno.ENOSPC], ids=["eio", "enospc"])
@pytest.mark.parametrize("kind", ["write", "sync"])
def test_a_failed_write_or_sync_sticks(kind, number, inline):
    disk = Disk()
    store, _ = recover_on(disk, inline=inline)
    store.insert_batch([(1, (1, b"acknowledged"))])
    store._engine._compactor.wait_idle()  # the next log's file is made by then
    disk.before = fail(kind, number)
    with pytest.raises(StoreFailedError, match=os.strerror(number)) as caught:
        store.insert_batch([(2, (2, b"unknown"))])
    first = caught.value.__cause__
    assert isinstance(first, OSError)
    assert first.errno == number
    disk.before = None  # the disk is well again: nobody may find out
    calls = []
    disk.before = lambda operation: calls.append(operation.kind)
    for refused in (
        lambda: store.insert_batch([(3, (3, b"refused"))]),
        lambda: store.insert_batch([(3, (3, b"refused"))], sync=False),
        lambda: store.insert_arrays(np.ones(1, np.uint64), np.ones(1, np.uint64)),
        store.sync,
        store.compact,
    ):
        with pytest.raises(StoreFailedError) as caught:
            refused()
        assert caught.value.__cause__ is first
        text = str(caught.value)
        assert "recover" in text
        assert os.strerror(number) in text
    assert {"write", "sync"}.isdisjoint(calls)
    with contextlib.suppress(StoreFailedError):  # it may say so again
        store.shutdown()
    disk.before = None
    found = read_image(disk.live_image())
    assert found[1] == (1, b"acknowledged")
    assert 3 not in found


def test_the_text_says_that_the_fate_of_the_batch_is_unknown():
    disk = Disk()
    store, _ = recover_on(disk)
    disk.before = fail("sync")
    with pytest.raises(StoreFailedError) as caught:
        store.insert_batch([(1, (1, b"unknown"))])
    assert isinstance(caught.value.__cause__, OSError)
    text = str(caught.value)
    assert "unknown" in text or "next recovery" in text
    assert "recover" in text
    disk.before = None
    with contextlib.suppress(StoreFailedError):
        store.shutdown()


def test_a_failed_store_that_was_shut_down_is_closed():
    disk = Disk()
    store, _ = recover_on(disk)
    disk.before = fail("sync")
    with pytest.raises(StoreFailedError):
        store.insert_batch([(1, (1, b""))])
    with contextlib.suppress(StoreFailedError):
        store.shutdown()
    store.shutdown()
    disk.before = None
    assert disk.opened == []
    with pytest.raises((StoreClosedError, StoreFailedError)):
        store.insert_batch([(1, (1, b""))])
    recover_on(disk)[0].shutdown()


def test_bad_arguments_do_not_stick():
    disk = Disk()
    store, _ = recover_on(disk)
    for _ in range(3):
        with pytest.raises(OverflowError):
            store.insert_batch([(-1, None)])
    assert store.insert_batch([(1, (1, b""))]) == 1
    store.shutdown()


def test_an_interrupt_before_the_write_does_not_stick():
    disk = Disk()
    store, _ = recover_on(disk)

    def records():
        yield 1, (1, b"")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        store.insert_batch(records())
    assert store.insert_batch([(1, (1, b""))]) == 1
    store.shutdown()


@pytest.mark.parametrize("kind", ["write", "sync"])
def test_an_interrupt_during_the_write_leaves_no_hole(kind):
    """Ctrl-C between write and return: the fate of that batch is unknown, no more."""
    disk = Disk()
    store, _ = recover_on(disk)
    store.insert_batch([(1, (1, b"acknowledged"))])

    def interrupt(operation: Operation) -> None:
        if operation.kind == kind:
            disk.before = None
            raise KeyboardInterrupt

    disk.before = interrupt
    with pytest.raises((KeyboardInterrupt, StoreFailedError)):
        store.insert_batch([(2, (2, b"unknown"))])
    expected = {1: (1, b"acknowledged")}
    for key in (3, 4):
        with contextlib.suppress(StoreFailedError):
            store.insert_batch([(key, (key, b"behind"))])
            expected[key] = (key, b"behind")
    with contextlib.suppress(StoreFailedError):
        store.shutdown()
    for image in (disk.live_image(), disk.durable_image()):
        found = read_image(image)
        found.pop(2, None)
        assert found == expected
    assert disk.opened == []
