"""The explorer against a naive store: silent about a right one, it tells of bugs.

Each bug is one step left out. What the explorer does not find here, it would not find
in the real store either.
"""

from __future__ import annotations

import itertools
import pickle
import random
import zlib

import pytest

from crashes import Pending
from disk import SECTOR_SIZE, Disk
from explorer import Effort, Explorer, check, replay
from histories import OPERATIONS, BrokenPromiseError, Recover, histories
from metastore.directory import DirectoryProtocol
from simulated import SimulatedDirectory
from verbs import Batch, State, apply

LOG = "log"
HEAD_SIZE = 12


class Naive:
    """One log of checksummed frames, rewritten as a whole at each open."""

    def __init__(self, directory: DirectoryProtocol, bugs: frozenset[str]) -> None:
        self._directory = directory
        self._bugs = bugs
        directory.lock()
        self.state: State = {}
        self._sequence = 0
        data = b""
        if (LOG, True) in directory.names():
            data = self._read()
        self._end = self._replay(data)
        if "append behind a torn tail" in bugs and data:
            self._file = self._rewritten(data)
        else:
            self.compact()

    def _without(self, step: str) -> bool:
        return f"no {step}" in self._bugs

    def _read(self) -> bytes:
        file = self._directory.open(LOG)
        data = bytes(file.read(0, file.size()))
        file.close()
        return data

    def _replay(self, data: bytes) -> int:
        at = 0
        while at + HEAD_SIZE <= len(data):
            size = int.from_bytes(data[at : at + 4], "little")
            payload = data[at + HEAD_SIZE : at + HEAD_SIZE + size]
            stored = int.from_bytes(data[at + 4 : at + 8], "little")
            if size == 0 or len(payload) < size:
                break
            if zlib.crc32(payload) != stored and not self._without("checksum"):
                break
            sequence, batch = pickle.loads(payload)
            if sequence <= self._sequence:
                break
            self._sequence = sequence
            self.state = apply(self.state, batch)
            at += HEAD_SIZE + size
        return at

    def _frame(self, batch: Batch) -> bytes:
        payload = pickle.dumps((self._sequence, batch))
        head = len(payload).to_bytes(4, "little")
        head += zlib.crc32(payload).to_bytes(4, "little")
        return head.ljust(HEAD_SIZE, b"\0") + payload

    def _rewritten(self, data: bytes):
        file = self._directory.create(f"{LOG}.tmp")
        file.write([data], 0)
        if not self._without("sync before the rename"):
            file.sync()
        self._directory.rename(f"{LOG}.tmp", LOG)
        if not self._without("sync of the directory"):
            self._directory.sync()
        return file

    def insert_batch(self, batch: Batch, *, sync: bool = True) -> int:
        self._sequence += 1
        self.state = apply(self.state, batch)
        frame = self._frame(batch)
        self._file.write([frame], self._end)
        self._end += len(frame)
        if sync:
            self.sync()
        return self._sequence

    def sync(self) -> None:
        if not self._without("sync"):
            self._file.sync()

    def compact(self) -> None:
        old = getattr(self, "_file", None)
        frame = self._frame(list(self.state.items())) if self.state else b""
        if "remove before the rename" in self._bugs and old is not None:
            self._directory.remove(LOG)
        self._file = self._rewritten(frame)
        self._end = len(frame)
        if old is not None:
            old.close()

    def shutdown(self) -> None:
        self.sync()
        self._file.close()
        if "leak" not in self._bugs:
            self._directory.close()


def naive(*bugs: str) -> Recover:
    def recover(directory: DirectoryProtocol) -> tuple[Naive, State]:
        store = Naive(directory, frozenset(bugs))
        return store, store.state

    return recover


TWICE = (Effort(share=0.05), Effort(states_max=8, share=0.3), Effort(states_max=4))


def explored(recover: Recover, *, length: int, **options: object) -> Explorer:
    explorer = Explorer(recover, TWICE, **options)
    for n_operations in range(length + 1):
        for operations in histories(n_operations):
            explorer.explore(operations)
            if explorer.done:
                return explorer
    return explorer


def test_a_right_store_passes(capsys):
    explorer = explored(naive(), length=2)
    with capsys.disabled():
        print(f"\nnaive store: {explorer.counts}")
    explorer.assert_nothing_found()
    assert explorer.counts.distinct > 500


@pytest.mark.parametrize(
    "bug",
    [
        "no sync",
        "no sync of the directory",
        "no sync before the rename",
        "no checksum",
        "remove before the rename",
        "append behind a torn tail",
        "leak",
    ],
)
def test_a_wrong_store_is_found(bug):
    explorer = explored(naive(bug), length=3, findings_max=1)
    (finding,) = explorer.findings
    print(f"{bug}: after {finding.states} states: {finding}")


@pytest.mark.parametrize(
    "bug",
    ["no sync", "no sync of the directory", "no sync before the rename"],
)
def test_a_finding_is_made_again_from_its_path(bug):
    explorer = explored(naive(bug), length=3, findings_max=1)
    (finding,) = explorer.findings
    assert isinstance(finding.error, BrokenPromiseError)
    crash, disk = replay(naive(bug), finding.path)
    with pytest.raises(BrokenPromiseError) as raised:
        check(naive(bug), disk, crash.trace)
    assert str(raised.value) == str(finding.error)


def test_histories_are_all_that_make_sense():
    assert list(histories(0)) == [()]
    assert [len(list(histories(length))) for length in (1, 2, 3)] == [7, 43, 265]
    assert ("shutdown", "reopen") in histories(2)
    assert ("shutdown", "batch") not in histories(2)
    assert {name for found in histories(1) for name in found} == set(OPERATIONS)


# Crash states


def images(disk: Disk, *, ordered: bool = False) -> list[object]:
    pending = Pending(disk, ordered=ordered)
    choices = pending.choices(random.Random(1), exhaustive_max=1 << 12, samples=0)
    return [pending.image(choice) for choice in choices]


def test_nothing_pending_is_one_state():
    disk = Disk({"a": b"1"})
    assert images(disk) == [{"a": b"1"}]


def test_every_subset_of_sectors_and_either_size():
    disk = Disk({"a": b"x" * SECTOR_SIZE})
    directory = SimulatedDirectory(disk)
    directory.create("b").write([b"y" * 2 * SECTOR_SIZE], 0)
    directory.sync()
    sectors = [bytes([at]) * SECTOR_SIZE for at in (b"y"[0], 0)]
    whole = {(first + second) for first, second in itertools.product(sectors, repeat=2)}
    found = {image["b"] for image in images(disk)}
    assert whole | {b""} <= found
    torn = found - whole - {b""}
    assert torn
    assert all(len(data) == 2 * SECTOR_SIZE for data in torn)
    assert all(data.startswith(sectors[0]) for data in torn)


def test_a_sector_may_have_any_content_it_had_since_the_sync():
    disk = Disk({"a": bytes(SECTOR_SIZE)})
    directory = SimulatedDirectory(disk)
    directory.rename("a", "b")
    directory.rename("b", "a")
    directory.sync()
    file = directory.create("c")
    file.write([b"1"], 0)
    directory.sync()
    file.sync()
    for new in (b"2", b"3"):
        file.write([new], 0)
    assert [image["c"] for image in images(disk)][:3] == [b"1", b"2", b"3"]


def test_names_in_any_order_and_in_order():
    disk = Disk({"a": b"1", "b": b"2"})
    directory = SimulatedDirectory(disk)
    directory.remove("a")
    directory.rename("b", "c")
    directory.create("d").close()
    found = [set(image) for image in images(disk)]
    assert len(found) == 8
    assert {"a", "b", "d"} in found
    assert {"a", "c"} in found
    assert all(("b" in names) != ("c" in names) for names in found)
    assert [set(image) for image in images(disk, ordered=True)] == [
        {"a", "b"},
        {"b"},
        {"c"},
        {"c", "d"},
    ]


def test_a_replaced_file_is_the_old_or_the_new_one():
    disk = Disk({"a": b"old"})
    directory = SimulatedDirectory(disk)
    file = directory.create("a.tmp")
    file.write([b"new"], 0)
    file.sync()
    directory.rename("a.tmp", "a")
    assert {image["a"] for image in images(disk)} == {b"old", b"new"}


def test_an_emptied_file_may_be_old_empty_or_new():
    disk = Disk({"a": b"old"})
    SimulatedDirectory(disk).create("a").write([b"n"], 0)
    found = {image["a"] for image in images(disk)}
    assert {b"old", b"", b"n"} <= found


def test_a_file_that_moves_is_never_gone():
    disk = Disk({"a": b"1", "q": {}})
    directory = SimulatedDirectory(disk)
    directory.move("a", directory.subdirectory("q"), "b")
    for image in images(disk):
        assert image.get("a") == b"1" or image["q"] == {"b": b"1"}


def test_many_pending_sectors_are_sampled_with_the_telling_states_among_them():
    disk = Disk({"a": b""})
    file = SimulatedDirectory(disk).create("a")
    n_sectors = 100
    data = random.Random(1).randbytes(n_sectors * SECTOR_SIZE)
    file.write([data], 0)
    pending = Pending(disk)
    choices = list(pending.choices(random.Random(1), exhaustive_max=64, samples=10))
    n_atoms = n_sectors + 1
    assert len(pending.atoms) == n_atoms
    assert 3 * n_sectors <= len(choices) <= 4 * n_atoms
    found = [pending.image(choice)["a"] for choice in choices]
    assert b"" in found
    assert data in found
    for kept in range(n_sectors):
        size = kept * SECTOR_SIZE
        lone = bytearray(len(data))
        lone[size : size + SECTOR_SIZE] = data[size : size + SECTOR_SIZE]
        lacking = bytearray(data)
        lacking[size : size + SECTOR_SIZE] = bytes(SECTOR_SIZE)
        assert lacking in found
