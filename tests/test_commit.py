"""Group commit in C: its queue and its leader."""

from __future__ import annotations

import errno
import os
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from metastore._commit import GroupCommit, Tail
from metastore.frames import encode_batch
from verbs import start_waiting, together

TIMEOUT_SECONDS = 60


class File:
    """A file without a descriptor, that remembers its calls."""

    descriptor = -1
    path = "file"

    def __init__(self) -> None:
        self.data = bytearray()
        self.calls: list[str] = []

    def write(self, buffers: list[memoryview], offset: int) -> None:
        self.calls.append("write")
        self.data[offset:] = b"".join(buffers)

    def sync(self) -> None:
        self.calls.append("sync")


class RefusedError(Exception):
    pass


def group_commit(file: File, rotate: Any = lambda: None) -> GroupCommit:
    failures: list[BaseException] = []

    def fail(error: BaseException) -> None:
        failures.append(error)
        commits.close()

    def refusal() -> RefusedError:
        return RefusedError(*failures)

    tail = Tail(file, file.path, seed=1, sequence=1, size=0, zeroed_size=512)
    commits = GroupCommit(tail, fail, refusal, rotate)
    return commits


def frame(n: int = 1) -> bytearray:
    return encode_batch([(n, (n, b""))], 1)


def test_a_batch_is_written_then_synced() -> None:
    file = File()
    commits = group_commit(file)
    assert commits.commit(frame(), False) == 1
    assert file.calls == ["write"]
    assert commits.commit(frame(), True) == 2
    assert file.calls == ["write", "write", "sync"]
    assert commits.commit(None, True) == 0  # everything is durable
    assert file.calls == ["write", "write", "sync"]
    assert (commits.durable, commits.n_batches, commits.n_syncs) == (2, 2, 1)


def test_who_waits_shares_a_write_and_a_sync() -> None:
    file = File()
    commits = group_commit(file)
    n_threads = 20
    found = []

    def write_late(buffers: list[memoryview], offset: int) -> None:
        del file.write  # the next ones at once
        while commits.n_waiting < n_threads:
            pass
        File.write(file, buffers, offset)

    file.write = write_late

    def commit() -> None:
        found.append(commits.commit(frame(), True))

    together(*[commit] * (n_threads + 1))
    assert sorted(found) == list(range(1, n_threads + 2))
    assert file.calls == ["write", "sync"] * 2


def test_who_keeps_the_gil_delays_no_write(tmp_path: Path) -> None:
    """The end of each sync took the GIL, to free a variable that never held anything.

    So the lead was handed on only when a thread that spun in Python gave the GIL away,
    and one commit in twenty waited for it twice: C6 with 8 threads was half as fast.
    """
    file = File()
    file.descriptor = os.open(tmp_path / "log", os.O_RDWR | os.O_CREAT)
    commits = group_commit(file)
    threads = [
        threading.Thread(target=commits.commit, args=(frame(), True), daemon=True)
        for _ in range(2)
    ]
    interval = sys.getswitchinterval()

    def queue() -> None:
        start_waiting(commits, threads)
        sys.setswitchinterval(1000)

    try:
        commits.exclusively(queue)
        deadline = time.monotonic() + TIMEOUT_SECONDS
        while commits.durable < len(threads) and time.monotonic() < deadline:
            pass
        durable = commits.durable
    finally:
        sys.setswitchinterval(interval)
    for thread in threads:
        thread.join(TIMEOUT_SECONDS)
    os.close(file.descriptor)
    assert durable == len(threads)
    assert not file.calls


def test_a_turn_that_is_kept_is_taken_away() -> None:
    """Threads whose commits are done ask for the GIL in turns (``_turnstile.h``).

    A turn ends with the next commit of the same thread, but that need never come: here
    each thread waits for all the others to have the GIL again.
    """
    commits = group_commit(File())
    n_threads = 20
    are_back = threading.Barrier(n_threads)

    def commit() -> None:
        commits.commit(frame(), True)
        are_back.wait(TIMEOUT_SECONDS)

    together(*[commit] * n_threads)
    assert commits.durable == n_threads


def test_more_wait_than_one_call_may_write() -> None:
    """Linux takes 1,024 buffers in a call: the rest is the next leader's."""
    file = File()
    commits = group_commit(file)
    n_threads = 1100
    found = []

    def commit() -> None:
        found.append(commits.commit(frame(), True))

    size = threading.stack_size(256 << 10)
    try:
        threads = [
            threading.Thread(target=commit, daemon=True) for _ in range(n_threads)
        ]
        commits.exclusively(lambda: start_waiting(commits, threads))
        for thread in threads:
            thread.join(TIMEOUT_SECONDS)
    finally:
        threading.stack_size(size)
    assert sorted(found) == list(range(1, n_threads + 1))
    assert file.calls == ["write", "sync"] * 2


class Queueing(File):
    """During each of the first writes, others come and wait; it keeps who leads."""

    def __init__(self, n_writes: int, n_waiting: int) -> None:
        super().__init__()
        self.n_writes, self.n_waiting = n_writes, n_waiting
        self.leaders: list[threading.Thread] = []  # an ident may be used again
        self.sequences: list[int] = []
        self.n_refused = 0
        self.threads: list[threading.Thread] = []
        self.commits = group_commit(self)

    def commit(self) -> None:
        try:
            self.sequences.append(self.commits.commit(frame(), True))
        except RefusedError:
            self.n_refused += 1

    def write(self, buffers: list[memoryview], offset: int) -> None:
        self.leaders.append(threading.current_thread())
        if len(self.leaders) <= self.n_writes:
            for _ in range(self.n_waiting):
                self.threads.append(threading.Thread(target=self.commit, daemon=True))
                self.threads[-1].start()
            while self.commits.n_waiting < self.n_waiting:
                pass
        super().write(buffers, offset)

    def run(self) -> None:
        self.commit()
        for thread in self.threads:
            thread.join(TIMEOUT_SECONDS)
            assert not thread.is_alive()


def test_a_leader_goes_on_while_many_wait() -> None:
    """To wake an heir among many threads took as long as a sync: C2 with 64.

    Whose group is durable meanwhile returns all the same; and nobody leads for ever.
    """
    file = Queueing(n_writes=10, n_waiting=8)
    file.run()
    first, second = file.leaders[0], file.leaders[8]
    assert file.leaders == [first] * 8 + [second] * 3
    assert first != second
    assert sorted(file.sequences) == list(range(1, 10 * 8 + 2))
    assert file.calls == ["write", "sync"] * 11


def test_where_few_wait_each_group_has_a_leader_of_its_own() -> None:
    file = Queueing(n_writes=10, n_waiting=7)
    file.run()
    assert len(set(file.leaders)) == 11
    assert sorted(file.sequences) == list(range(1, 10 * 7 + 2))


def test_who_waits_for_the_lead_alone_gets_it_though_many_wait() -> None:
    file = Queueing(n_writes=3, n_waiting=8)
    leaders: list[int] = []

    def sync() -> None:
        if len(file.leaders) == 1:  # in front of those that the next write brings
            thread = threading.Thread(
                target=file.commits.exclusively,
                args=(lambda: leaders.append(len(file.leaders)),),
                daemon=True,
            )
            thread.start()
            file.threads.append(thread)
            while file.commits.n_waiting < 9:
                pass
        File.sync(file)

    file.sync = sync
    file.run()
    assert leaders == [2]
    assert sorted(file.sequences) == list(range(1, 3 * 8 + 2))


def test_a_failure_of_a_later_group_is_not_of_those_before() -> None:
    """Their leader has led on, and is told of its own batch as they are."""
    file = Queueing(n_writes=3, n_waiting=8)

    def sync() -> None:
        if len(file.leaders) == 3:
            raise OSError(errno.EIO, "injected")
        File.sync(file)

    file.sync = sync
    file.run()
    assert sorted(file.sequences) == list(range(1, 8 + 2))
    assert file.n_refused == 2 * 8
    assert file.commits.durable == 8 + 1
    assert file.calls == ["write", "sync"] * 2 + ["write"]


def test_a_failure_reaches_everybody_in_the_group_and_behind() -> None:
    file = File()
    commits = group_commit(file)
    commits.commit(frame(), True)
    refused = []

    def fail() -> None:
        raise OSError(errno.EIO, "injected")

    file.sync = fail

    def commit() -> None:
        with pytest.raises(RefusedError) as caught:
            commits.commit(frame(), True)
        refused.append(caught.value.args[0])

    threads = [threading.Thread(target=commit, daemon=True) for _ in range(5)]

    def start() -> None:
        for thread in threads:
            thread.start()
        while commits.n_waiting < 5:
            pass

    commits.exclusively(start)
    for thread in threads:
        thread.join(TIMEOUT_SECONDS)
    assert [error.args for error in refused] == [(errno.EIO, "injected")] * 5
    commit()
    assert (commits.durable, commits.n_batches, commits.n_writes) == (1, 6, 2)
    assert file.calls == ["write", "sync", "write"]  # nothing was tried behind it


def test_the_lead_comes_back_from_an_action_that_raises() -> None:
    commits = group_commit(File())

    def fail() -> None:
        raise KeyError

    for _ in range(2):
        with pytest.raises(KeyError):
            commits.exclusively(fail)
    assert commits.commit(frame(), True) == 1


def test_rotation_is_asked_for_behind_a_group_that_is_too_much() -> None:
    sizes = []
    file = File()
    commits = group_commit(file, lambda: sizes.append(commits.tail.size))
    commits.weight_max = 2 * len(frame())
    for n in range(1, 4):
        assert commits.commit(frame(), True) == n
    assert sizes == [3 * len(frame())]


def test_a_rotation_that_is_interrupted_gives_the_lead_back() -> None:
    def rotate() -> None:
        commits.weight_max = 1 << 40
        raise KeyboardInterrupt

    commits = group_commit(File(), rotate)
    commits.weight_max = 0
    with pytest.raises(KeyboardInterrupt):
        commits.commit(frame(), True)
    assert commits.commit(frame(), True) == 2


def test_a_commit_within_a_commit_is_refused() -> None:
    """As by a signal handler during a rotation: it would wait for itself."""

    def rotate() -> None:
        commits.weight_max = 1 << 40
        for call in (
            lambda: commits.commit(frame(), True),
            lambda: commits.exclusively(rotate),
        ):
            with pytest.raises(RuntimeError, match="in the middle of a commit"):
                call()

    commits = group_commit(File(), rotate)
    commits.weight_max = 0
    commits.commit(frame(), True)
    commits.exclusively(rotate)
    assert commits.commit(frame(), True) == 2


def test_a_failure_is_kept_though_who_is_told_of_it_is_interrupted() -> None:
    """A sync tried again succeeded, and what it had lost was acknowledged.

    The failure was kept in Python only: there a signal handler that raises came between
    the failed call and its keeping.
    """
    file = File()
    failures = []

    def interrupted(error: BaseException) -> None:
        failures.append(error)
        raise KeyboardInterrupt

    tail = Tail(file, file.path, seed=1, sequence=1, size=0, zeroed_size=512)
    commits = GroupCommit(tail, interrupted, RefusedError, lambda: None)
    commits.commit(frame(), True)
    assert tail.failure is None

    def fail() -> None:
        del file.sync  # the next one would succeed
        raise OSError(errno.EIO, "injected")

    file.sync = fail
    with pytest.raises(KeyboardInterrupt):
        commits.commit(frame(), True)
    assert not commits.is_open
    assert failures == [tail.failure]
    calls = list(file.calls)
    for attempt in (
        lambda: commits.commit(frame(), True),
        lambda: commits.commit(None, True),
    ):
        with pytest.raises(RefusedError):
            attempt()
    with pytest.raises(OSError, match="injected"):
        commits.exclusively(commits.sync_now)
    with pytest.raises(OSError, match="injected"):
        tail.seal(frame())
    assert (file.calls, commits.durable) == (calls, 1)


@pytest.mark.parametrize("kind", ["write", "sync", None])
def test_nothing_is_written_behind_an_end_frame(kind: str | None) -> None:
    """What stands behind it would never be read, whether it became durable or not."""
    file = File()
    failures: list[BaseException] = []
    tail = Tail(file, file.path, seed=1, sequence=1, size=0, zeroed_size=512)
    commits = GroupCommit(tail, failures.append, RefusedError, lambda: None)
    commits.commit(frame(), True)

    def fail(*_: object) -> None:
        delattr(file, kind)
        raise OSError(errno.EIO, "injected")

    if kind is None:
        tail.seal(frame())
    else:
        setattr(file, kind, fail)
        with pytest.raises(OSError, match="injected"):
            tail.seal(frame())
    calls = list(file.calls)
    with pytest.raises(RefusedError):
        commits.commit(frame(), True)
    assert file.calls == calls
    (failure,) = failures
    assert ("injected" if kind else "sealed") in str(failure)


def test_half_a_header_is_refused() -> None:
    file = File()
    commits = group_commit(file)
    with pytest.raises(ValueError, match="shorter than its header"):
        commits.commit(bytearray(47), True)
    assert commits.commit(frame(), True) == 1
