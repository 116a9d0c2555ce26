"""What a recovery keeps in quarantine/ stays there, once, under a name of its own."""

from __future__ import annotations

import errno
import os
import re
from pathlib import Path

import pytest

import oracle
from disk import Disk, Fault, Image, Operation
from metastore import MetadataStore, Recovered
from verbs import files, newest_log, numbered, open_image, put, recover_on, states

TAIL = b"\x11" * 100
NEXT_LOG = "log_0*[2-9a-f]"


def torn(tail: bytes = TAIL) -> Image:
    """A store of three batches whose log a kill left with a torn tail."""
    image = open_image({}, numbered(3))
    name = newest_log(image)
    data = image[name]
    end = (len(data.rstrip(b"\0")) + 7) // 8 * 8
    image[name] = data[:end] + tail
    return image


def torn_name(image: Image) -> str:
    name = newest_log(image)
    return f"torn_{name}_{len(image[name]) - len(TAIL):016x}"


def damaged() -> Image:
    """A store whose only log has damage behind its first batch."""
    disk = Disk()
    store, _ = recover_on(disk)
    with store:
        for batch in numbered(3):
            store.insert_batch(batch)
    image = disk.live_image()
    name = newest_log(image)
    offset = oracle.frame_offsets(image[name])[1] + oracle.FRAME_HEADER.size
    return {**image, name: oracle.flip_bit(image[name], offset)}


def failing(image: Image, kind: str, name: str, **options: object) -> Image:
    """What a recovery leaves where every call of a kind, on such a name, fails."""

    def before(operation: Operation) -> Fault | None:
        fails = operation.kind == kind and re.match(name, operation.name)
        return Fault(errno.ENOSPC, kept=0.5) if fails else None

    disk = Disk(image)
    disk.before = before
    with pytest.raises(OSError, match=os.strerror(errno.ENOSPC)):
        recover_on(disk, **options)
    assert disk.opened == []
    disk.before = None
    return disk.live_image()


def recovered_from(image: Image, **options: object) -> tuple[Recovered, Image]:
    disk = Disk(image)
    store, recovered = recover_on(disk, **options)
    store.shutdown()
    return recovered, disk.live_image()


def test_a_recovery_that_fails_again_and_again_keeps_one_copy():
    """Each kept the tail once more; the tenth removed its own copy, and named it.

    As text '.10' comes before '.2', and a name that became free counted as the oldest.
    """
    image = torn()
    for _ in range(9):
        image = failing(image, "rename", NEXT_LOG)
        assert image["quarantine"] == {torn_name(image): TAIL}
    recovered, after = recovered_from(image)
    assert recovered.report.quarantined == (f"quarantine/{torn_name(image)}",)
    assert after["quarantine"] == {torn_name(image): TAIL}


def test_the_same_tail_pushes_out_no_other():
    image = torn()
    older = {f"torn_log_{1:016x}_{offset:016x}": b"older" for offset in range(64, 71)}
    for _ in range(3):
        image["quarantine"] = {**image.get("quarantine", {}), **older}
        image = failing(image, "rename", NEXT_LOG)
    assert image["quarantine"] == {torn_name(image): TAIL, **older}


def test_what_was_kept_before_is_not_overwritten_by_what_is_another():
    image = torn()
    name = torn_name(image)
    image["quarantine"] = {name: b"another", f"{name}.9": b"of another time"}
    recovered, after = recovered_from(image)
    assert recovered.report.quarantined == (f"quarantine/{name}.10",)
    assert after["quarantine"] == {**image["quarantine"], f"{name}.10": TAIL}


def test_the_oldest_tails_are_removed_first():
    """By number: '.10' is newer than '.9'; and a name that became free stays so."""
    image = torn()
    name = torn_name(image)
    old = {f"{name}.{n}": b"%d" % n for n in range(4, 12)}
    image["quarantine"] = old
    recovered, after = recovered_from(image)
    assert recovered.report.quarantined == (f"quarantine/{name}.12",)
    del old[f"{name}.4"]
    assert after["quarantine"] == {**old, f"{name}.12": TAIL}


def test_a_kept_tail_stays_even_if_it_is_the_oldest():
    image = torn()
    name = torn_name(image)
    newer = {f"torn_log_{number:016x}_{64:016x}": b"x" for number in range(2, 12)}
    image["quarantine"] = {**newer, name: TAIL}
    recovered, after = recovered_from(image)
    assert recovered.report.quarantined == (f"quarantine/{name}",)
    newest = sorted(newer)[-7:]
    assert after["quarantine"] == {name: TAIL, **{n: b"x" for n in newest}}


@pytest.mark.parametrize("name", ["torn_notes", "torn_log_1", f"torn_log_{1:016x}"])
def test_what_people_put_there_is_left_alone(db: Path, name: str) -> None:
    """Whatever was called torn_* was removed; a directory failed the recovery."""
    image = torn()
    folder = f"torn_log_{0:016x}_{0:016x}"
    tails = {f"torn_log_{1:016x}_{n:016x}": b"" for n in range(64, 74)}
    image["quarantine"] = {**tails, name: b"mine", folder: {}, f"a{folder}": b"mine"}
    put(db, image)
    (db / "quarantine" / f"torn_log_{0:016x}_{1:016x}").symlink_to(name)
    store, recovered = MetadataStore.recover(db)
    store.shutdown()
    after = files(db)["quarantine"]
    assert after[name] == after[f"a{folder}"] == b"mine"
    assert after[folder] == {}
    assert (db / "quarantine" / f"torn_log_{0:016x}_{1:016x}").is_symlink()
    assert set(recovered.report.quarantined) <= {f"quarantine/{n}" for n in after}
    assert len(set(after) & {*tails, torn_name(image)}) == 8


@pytest.mark.parametrize("suffix", ["", ".tmp"])
def test_a_directory_in_the_way_of_a_copy_is_passed_by(suffix):
    image = torn()
    name = torn_name(image)
    image["quarantine"] = {name + suffix: {"mine": b""}}
    recovered, after = recovered_from(image)
    assert recovered.report.quarantined == (f"quarantine/{name}.2",)
    assert after["quarantine"] == {name + suffix: {"mine": b""}, f"{name}.2": TAIL}


def test_a_copy_of_a_damaged_log_is_made_once():
    image = damaged()
    name = newest_log(image)
    for _ in range(3):
        image = failing(image, "rename", NEXT_LOG, on_damage="prefix")
        assert image["quarantine"] == {name: image[name]}
    recovered, after = recovered_from(image, on_damage="prefix")
    assert after["quarantine"] == {name: image[name]}
    assert recovered.report.quarantined == (f"quarantine/{name}",)
    assert list(recovered) == [
        (k, *v) for k, v in sorted(states(numbered(1))[1].items())
    ]


@pytest.mark.parametrize("kind", ["create", "write", "sync", "rename"])
@pytest.mark.parametrize("start", ["torn_log", "log_.*1"], ids=["tail", "log"])
def test_a_copy_that_fails_leaves_nothing(start, kind):
    """A part of it stayed under the final name: each try left one more."""
    image = torn() if start == "torn_log" else damaged()
    for _ in range(2):
        image = failing(image, kind, start, on_damage="prefix")
        assert image["quarantine"] == {}
    recovered, after = recovered_from(image, on_damage="prefix")
    (kept,) = recovered.report.quarantined
    name = newest_log(image)
    expected = TAIL if start == "torn_log" else image[name]
    assert after["quarantine"] == {kept.removeprefix("quarantine/"): expected}


def test_a_part_of_a_copy_that_a_crash_left_is_removed():
    """And nothing that only looks like one: who put that there may want it."""
    image = torn()
    name = torn_name(image)
    mine = {f"{name}.tmp.tmp": b"", f"torn_log_{2:016x}.tmp": b"", "log_1.tmp": b""}
    folder = {f"log_{9:016x}.3.tmp": {"mine": b""}}
    left = {f"{name}.tmp": TAIL[:7], f"{name}.2.tmp": b"", f"log_{7:016x}.tmp": b"x"}
    image["quarantine"] = {**mine, **folder, **left}
    recovered, after = recovered_from(image)
    assert recovered.report.quarantined == (f"quarantine/{name}",)
    assert after["quarantine"] == {**mine, **folder, name: TAIL}
