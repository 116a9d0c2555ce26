"""The ancestor's defects 9 to 16; see test_ancestor_defects.py."""

from __future__ import annotations

import contextlib
import errno
import os
import threading

import numpy as np
import pytest

import oracle
from disk import Disk, Fault, Image, Operation
from metastore import MetadataStore
from metastore.errors import CorruptionError, StoreClosedError, StoreFailedError
from verbs import (
    State,
    batches_in,
    content,
    files,
    flip,
    logs,
    named,
    newest_log,
    numbered,
    open_image,
    others_may_run,
    put,
    read,
    read_image,
    recover_on,
    snapshots,
    spans,
    states,
    write,
    write_on,
    write_open,
)


@pytest.mark.parametrize("kind", ["create", "write", "sync", "rename", "remove"])
@pytest.mark.parametrize("inline", [True, False], ids=["inline", "threads"])
def test_09_the_error_of_a_failed_compaction_is_never_cleared(kind, inline):
    """The compaction thread cleared the sticky error on its way out."""
    disk = Disk()
    store, _ = recover_on(disk, inline=inline)
    for batch in numbered(4):
        store.insert_batch(batch)

    def fail(operation: Operation) -> Fault | None:
        ours = operation.name.startswith("snapshot") or operation.kind == "remove"
        return Fault(errno.EIO) if ours and operation.kind == kind else None

    disk.before = fail
    with contextlib.suppress(OSError):
        store.compact()
    with pytest.raises(StoreFailedError) as first:
        store.insert_batch([(100, (1, b"refused"))])
    assert first.value.__cause__.errno == errno.EIO
    disk.before = None
    for _ in range(3):
        with pytest.raises(StoreFailedError) as again:
            store.insert_batch([(100, (1, b"refused"))])
        assert again.value.__cause__ is first.value.__cause__
    with contextlib.suppress(StoreFailedError):
        store.shutdown()
    with pytest.raises((StoreFailedError, StoreClosedError)):
        store.insert_batch([(100, (1, b"refused"))])
    assert read_image(disk.live_image()) == states(numbered(4))[-1]


def test_10_opening_writes_no_snapshot():
    """Every open wrote the whole snapshot anew, whatever had changed."""
    disk = Disk()
    store, _ = recover_on(disk)
    for batch in numbered(4):
        store.insert_batch(batch)
    store.compact()
    store.shutdown()
    write_on(disk, numbered(2, 5))
    calls = []

    def before(operation: Operation) -> None:
        if operation.name.startswith("snapshot"):
            calls.append(operation.kind)

    disk.before = before
    for _ in range(3):
        store, recovered = recover_on(disk)
        store.shutdown()
        assert content(recovered) == states(numbered(6))[-1]
    assert {"create", "write", "rename", "remove"}.isdisjoint(calls)


def test_10_compaction_copies_untouched_blocks_as_they_are(db):
    """The snapshot was one zstd frame: one changed record rewrote everything."""
    n_records = 300_000
    keys = np.arange(n_records, dtype=np.uint64) * np.uint64(10)
    store, _ = MetadataStore.recover(db)
    store.insert_arrays(keys, keys + np.uint64(1), None, None)
    store.compact()
    before = snapshots(db)[0].read_bytes()
    store.insert_batch([(1_000_005, (7, b"new")), (1_000_000, None)])
    store.compact()
    store.shutdown()
    after = snapshots(db)[0].read_bytes()

    def blocks(data: bytes) -> list[bytes]:
        return [data[s.offset : s.end] for s in spans(data) if s.kind == oracle.BLOCK]

    old, new = blocks(before), blocks(after)
    assert len(old) >= 4
    assert len(set(old) - set(new)) == 1
    assert len(set(new) - set(old)) <= 2
    _, recovered = MetadataStore.recover(db)
    _.shutdown()
    assert len(recovered) == n_records
    assert recovered.get(1_000_005) == (7, b"new")
    assert 1_000_000 not in recovered


def test_11_threads_share_their_syncs():
    """Every batch had an fsync of its own, under the lock."""
    disk = Disk()
    store, _ = recover_on(disk, inline=False)
    syncs = []
    never = threading.Event()

    def before(operation: Operation) -> None:
        if operation.kind == "sync":
            syncs.append(operation)
            with others_may_run(disk):  # as on a real disk, while it turns
                never.wait(0.001)

    disk.before = before

    def commit(first: int) -> None:
        for key in range(first, first + 50):
            store.insert_batch([(key, (1, b""))])

    threads = [threading.Thread(target=commit, args=(100 * i,)) for i in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
        assert not thread.is_alive()
    print(f"{len(syncs)} syncs for 400 batches")
    assert len(syncs) < 200
    disk.before = None
    store.shutdown()
    assert len(read_image(disk.live_image())) == 400


def test_12_shutdown_returns_when_everything_is_let_go(db):
    """It was acknowledged twice, before the thread let go; a double free ended it."""
    names = {thread.name for thread in threading.enumerate()}
    for round_ in range(10):
        store, _ = MetadataStore.recover(db, log_size_bytes_min=1)
        for batch in numbered(10, 1 + 10 * round_):
            store.insert_batch(batch)  # compactions are under way
        store.shutdown()
        assert {thread.name for thread in threading.enumerate()} == names
    assert read(db) == states(numbered(100))[-1]


@pytest.mark.usefixtures("frequent_switches")
def test_12_shutdown_from_many_threads_at_once(db):
    store, _ = MetadataStore.recover(db, log_size_bytes_min=1)
    for batch in numbered(20):
        store.insert_batch(batch)
    start, one_at_a_time = threading.Barrier(8), threading.Lock()
    reopened: list[State] = []

    def shut_down() -> None:
        start.wait(30)
        store.shutdown()
        with one_at_a_time:  # whoever returned may rely on the lock being free
            again, recovered = MetadataStore.recover(db)
            again.shutdown()
        reopened.append(content(recovered))

    threads = [threading.Thread(target=shut_down) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
        assert not thread.is_alive()
    assert reopened == [states(numbered(20))[-1]] * 8


@pytest.mark.usefixtures("frequent_switches")
def test_12_shutdown_from_many_threads_seals_once():
    """Those that come while another shuts down must not write behind the end."""
    for n_batches in range(40):
        disk = Disk()
        store, _ = recover_on(disk, inline=False)
        for batch in numbered(n_batches):
            store.insert_batch(batch, sync=False)
        start = threading.Barrier(6)

        def shut_down(
            store: MetadataStore = store,
            start: threading.Barrier = start,
            compacts: bool = n_batches % 3 == 0,
        ) -> None:
            start.wait(30)
            with contextlib.suppress(StoreClosedError):
                store.compact() if compacts else store.sync()
            store.shutdown()

        threads = [threading.Thread(target=shut_down) for _ in range(6)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(60)
            assert not thread.is_alive()
        assert disk.opened == []
        assert store.stats().failure is None
        assert read_image(disk.live_image()) == states(numbered(n_batches))[-1]


def every_moment(disk: Disk) -> list[Image]:
    """The directory before each call that changes it: where a kill may strike."""
    images: list[Image] = []

    def before(operation: Operation) -> None:
        image = disk.live_image()
        if not images or image != images[-1]:
            images.append(image)

    disk.before = before
    return images


def test_13_a_kill_at_any_moment_of_a_compaction(tmp_path, monkeypatch):
    """Between the rename of a snapshot and the last unlink lay two snapshots.

    The store never opened again, or, with the working directory inside, opened with the
    older content.
    """
    disk = Disk()
    store, _ = recover_on(disk)
    for batch in numbered(5):
        store.insert_batch(batch)
    store.compact()
    for batch in numbered(5, 6):
        store.insert_batch(batch)
    images = every_moment(disk)
    store.compact()
    images.append(disk.live_image())
    disk.before = None
    store.shutdown()
    expected = states(numbered(10))[-1]
    doubled = 0
    for number, image in enumerate(images):
        assert read_image(image) == expected
        path = tmp_path / str(number)
        put(path, image)
        doubled += len(snapshots(path)) > 1
        monkeypatch.chdir(path)
        for _ in range(2):
            assert read(path) == expected
        assert len(snapshots(path)) == 1
    assert doubled, "no moment with two snapshots was met"
    print(f"{len(images)} moments, {doubled} of them with two snapshots")


def test_13_a_kill_at_any_moment_of_a_recovery():
    disk = Disk()
    store, _ = recover_on(disk)
    for batch in numbered(5):
        store.insert_batch(batch)
    store.compact()
    store.shutdown()
    torn = open_image(disk.live_image(), numbered(3, 6))
    name = newest_log(torn)
    last = batches_in(torn[name])[-1]
    torn[name] = oracle.put(torn[name], last.end - 16, b"torn off")
    disk = Disk(torn)
    images = every_moment(disk)
    store, recovered = recover_on(disk)
    store.shutdown()
    assert content(recovered) == states(numbered(7))[-1]
    for image in images:
        assert read_image(image) == states(numbered(7))[-1]
    print(f"{len(images)} moments")


def snapshot_with_its_logs(path) -> None:
    """Leave a snapshot beside the logs that it contains: their removal was cut off."""
    write(path, numbered(3))
    write(path, numbered(3, 4))
    old = {log.name: log.read_bytes() for log in logs(path)}
    store, _ = MetadataStore.recover(path)
    store.compact()
    store.shutdown()
    assert snapshots(path)
    for name, data in old.items():
        (path / name).write_bytes(data)


def test_14_logs_below_a_snapshot_stay_until_it_is_verified(db):
    """They were deleted first, and then the snapshot turned out to be damaged."""
    snapshot_with_its_logs(db)
    (snapshot,) = snapshots(db)
    whole = snapshot.read_bytes()
    flip(snapshot, 64 + 50)
    before = files(db)
    with pytest.raises(CorruptionError) as caught:
        MetadataStore.recover(db)
    assert caught.value.path == str(snapshot)
    assert {n: d for n, d in files(db).items() if n in before} == before
    snapshot.write_bytes(whole)
    for _ in range(2):
        assert read(db) == states(numbered(6))[-1]


def test_14_prefix_throws_nothing_away(db):
    """Asked to go on with a damaged snapshot, every byte of it and its logs is kept."""
    snapshot_with_its_logs(db)
    (snapshot,) = snapshots(db)
    flip(snapshot, 64 + 50)
    before = files(db)
    found = read(db, on_damage="prefix")
    assert found in states(numbered(6))
    after = files(db)
    kept = [*after.values(), *after.get("quarantine", {}).values()]
    for name, data in before.items():
        if batches_in(data) or name == snapshot.name:
            assert any(isinstance(k, bytes) and data.rstrip(b"\0") in k for k in kept)


OTHERS = [
    "log_0000000000000009.bak",
    "log_0000000000000009.tmp2",
    "log_0000000000000009.tmp.tmp",
    "snapshot_0000000000000009.old",
    "log_000000000000000A",
    "LOG_0000000000000009",
    "log_00000000000000009",
    "log_000000000000009",
    "log_0000000000000000",
    "log_8000000000000000",
    "log_0000000000000009\n",
    "notes.tmp",
    "log.tmp",
    ".tmp",
    "snapshot_zz.tmp",
    " log_0000000000000009",
    "log_\u0660\u0660\u0660\u0660\u0660\u0660\u0660\u0660\u0660\u0660\u0660\u0660\u0660\u0660\u0660\u0669",
]


@pytest.mark.parametrize("name", OTHERS, ids=ascii)
def test_15_names_match_whole_or_are_unknown(db, recover, name):
    """A suffix or upper case was taken for the number; every *.tmp was deleted."""
    write(db, numbered(3))
    (db / name).write_bytes(b"not ours")
    store, recovered = recover()
    assert content(recovered) == states(numbered(3))[-1]
    assert recovered.report.unknown == (name,)
    store.compact()
    store.shutdown()
    assert (db / name).read_bytes() == b"not ours"


@pytest.mark.parametrize(
    "name",
    [
        "log_0000000000000009",
        "snapshot_0000000000000009",
        "log_0000000000000009.tmp",
        "snapshot_0000000000000009.tmp",
    ],
)
@pytest.mark.parametrize("kind", ["directory", "link", "fifo"])
def test_15_what_is_no_file_is_unknown_whatever_its_name(db, recover, name, kind):
    """A directory of such a name ended the store."""
    write(db, numbered(3))
    if kind == "directory":
        (db / name).mkdir()
    elif kind == "link":
        (db / name).symlink_to("nowhere")
    else:
        os.mkfifo(db / name)
    store, recovered = recover()
    assert content(recovered) == states(numbered(3))[-1]
    assert recovered.report.unknown == (name,)
    store.insert_batch([(100, (1, b""))])
    store.compact()
    store.shutdown()
    assert os.path.lexists(db / name)
    assert read(db)[100] == (1, b"")


def test_15_our_own_temporary_files_are_removed(db):
    write(db, numbered(3))
    ours = ["log_00000000000000aa.tmp", "snapshot_00000000000000bb.tmp"]
    for name in ours:
        (db / name).write_bytes(b"half a file")
    assert read(db) == states(numbered(3))[-1]
    assert not any((db / name).exists() for name in ours)


def bad_batches() -> dict[str, oracle.Payload]:
    """Payloads that no writer makes, for frames whose checksums are right."""
    records = [(1, 11, b"user data"), (2, 22, b""), (3, 33, b"x" * 9)]
    plain = oracle.pack_plain(records)
    packed = oracle.pack_packed(records)
    columns = oracle.packed_columns(records, oracle.SORTED_CHOICES)
    columns[1] = oracle.PackedColumn(
        oracle.NO_FILTER, [oracle.Section(oracle.ZSTD, b"no zstd at all")]
    )

    def payload(of: oracle.Payload, data: bytes, n_records: int = 3) -> oracle.Payload:
        return oracle.Payload(of.layout, n_records, of.user_data_size, data)

    return {
        "not-zstd": payload(packed, oracle.join_packed(columns)),
        "cut-records": payload(plain, plain.data[:-5]),
        "no-records": payload(plain, b""),
        "junk-behind": payload(plain, plain.data + b"junkjunk"),
        "packed-junk-behind": payload(packed, packed.data + b"junkjunk"),
        "packed-cut": payload(packed, packed.data[:-3]),
        "packed-empty": payload(packed, b""),
        "too-few-records": payload(plain, plain.data, 2),
        "too-many-records": payload(plain, plain.data, 4),
        "lengths-too-long": payload(
            plain, oracle.put(plain.data, 48, (10).to_bytes(4, "little"))
        ),
        "deletion-with-user-data": payload(plain, oracle.put(plain.data, 24, bytes(8))),
    }


@pytest.mark.parametrize("name", bad_batches())
@pytest.mark.parametrize("last", [False, True], ids=["middle", "last"])
def test_16_a_right_checksum_over_a_wrong_inside_in_a_log(db, name, last):
    """Such content ended the log in silence, or the process."""
    good = oracle.pack_plain([(7, 7, b"good")])
    batches = [good, bad_batches()[name]] + ([] if last else [good])
    data = oracle.write_log(b"0123456789abcdef", 1, 1, batches)
    put(db, {"log_0000000000000001": data})
    before = files(db)
    with pytest.raises(CorruptionError) as caught:
        MetadataStore.recover(db)
    assert caught.value.path == str(db / "log_0000000000000001")
    assert caught.value.offset >= batches_in(data)[1].offset
    assert {n: d for n, d in files(db).items() if n in before} == before


@pytest.mark.parametrize(
    "records",
    [
        pytest.param([(1, 11, b""), (2, 0, b""), (3, 33, b"")], id="value-0"),
        pytest.param([(2, 22, b""), (1, 11, b"")], id="disorder"),
        pytest.param([(1, 11, b""), (1, 12, b"")], id="twice"),
    ],
)
@pytest.mark.parametrize("pack", [oracle.pack_plain, oracle.pack_packed])
def test_16_a_right_checksum_over_a_wrong_inside_in_a_snapshot(db, records, pack):
    data = oracle.write_snapshot(b"0123456789abcdef", 3, 5, [pack(records)])
    put(db, {"snapshot_0000000000000003": data})
    with pytest.raises(CorruptionError) as caught:
        MetadataStore.recover(db)
    assert caught.value.path == str(db / "snapshot_0000000000000003")


def test_16_blocks_that_overlap_in_a_snapshot(db):
    blocks = [[(1, 1, b""), (5, 5, b"")], [(5, 6, b""), (9, 9, b"")]]
    data = oracle.write_snapshot(b"0123456789abcdef", 3, 5, blocks)
    put(db, {"snapshot_0000000000000003": data})
    with pytest.raises(CorruptionError):
        MetadataStore.recover(db)


def test_16_an_unknown_layout_or_kind(db):
    for field, value in (("layout", 2), ("kind", 4), ("kind", 2), ("zero", 1)):
        write_open(db, numbered(4))
        (log,) = logs(db)
        data = log.read_bytes()
        second = batches_in(data)[1]
        log.write_bytes(oracle.forge(data, second.offset, field, value))
        with pytest.raises(CorruptionError) as caught:
            MetadataStore.recover(db)
        assert caught.value.offset == second.offset
        assert named(db, "log") == [log]
        log.unlink()
