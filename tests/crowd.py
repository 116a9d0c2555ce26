"""Several threads on one store: crashed at random moments, or with calls that fail.

The order of the batches shows only in the sequences that their calls return, and a
batch whose call has failed may be there or not. So what was recovered is judged by the
set of batches that it contains.
"""

from __future__ import annotations

import contextlib
import random
import sys
import threading
from collections.abc import Callable, Iterator
from typing import NamedTuple

from disk import Disk, Fault, Operation
from histories import BrokenPromiseError
from metastore import MetadataStore
from metastore.directory import DirectoryProtocol
from simulated import SimulatedDirectory
from verbs import Batch, State, content

TIMEOUT_SECONDS = 60

RecoverMany = Callable[[DirectoryProtocol], tuple[MetadataStore, State]]


def batch_numbered(number: int) -> Batch:
    """Two records that belong together, and key 0: whose batch was the last."""
    data = random.Random(number).randbytes(number * 37 % 400)
    return [
        (2 * number, (number, data)),
        (0, (number, b"")),
        (2 * number + 1, (number, data[::-1])),
    ]


def batches_in(state: State) -> set[int]:
    """The numbers of the batches that a store holds; each must be whole."""
    found = {key // 2 for key in state if key > 1}
    for number in found:
        for key, new in batch_numbered(number):
            if key and state.get(key) != new:
                raise BrokenPromiseError(f"batch {number} is not whole")
    if state and state[0][0] not in found:
        raise BrokenPromiseError("the last batch is not there")
    return found


class Moment(NamedTuple):
    """The disk at some moment, and which batches had been acknowledged before."""

    disk: Disk
    acknowledged: frozenset[int]


class Crowd:
    """Threads that insert, sync and now and then compact, until they are done.

    Parameters
    ----------
    recover : callable
        Opens the store, with its background thread.
    rng : random.Random
        Picks what each thread does, and the moments that are kept.
    n_threads, n_batches : int
        How many threads, and how many batches each inserts.
    keep : callable
        Whether the moment before a call is kept.
    plan : callable, optional
        Asked before each call whether it is to fail.
    patience_seconds : float
        How long to wait before each sync whether a batch is acknowledged too early.
    """

    def __init__(
        self,
        recover: RecoverMany,
        rng: random.Random,
        *,
        n_threads: int = 4,
        n_batches: int = 6,
        keep: Callable[[Operation], bool] = lambda operation: False,
        plan: Callable[[Operation], Fault | None] = lambda operation: None,
        patience_seconds: float = 0.0,
    ) -> None:
        self.disk = Disk()
        self.moments: list[Moment] = []
        #: The sequence of each batch whose call returned.
        self.sequences: dict[int, int] = {}
        #: Those that are durable.
        self.acknowledged: set[int] = set()
        self.errors: list[OSError] = []
        self._mutex = threading.Lock()
        self._keep = keep
        self._plan = plan
        self._patience_seconds = patience_seconds
        self._told = threading.Event()
        self._start = threading.Barrier(n_threads)
        self.disk.before = self._before
        self.store: MetadataStore | None = None
        try:
            self.store, _ = recover(SimulatedDirectory(self.disk))
        except OSError as error:
            self.errors.append(error)
            return
        with switching_often():
            self._run([rng.randrange(1 << 30) for _ in range(n_threads)], n_batches)

    def _run(self, seeds: list[int], n_batches: int) -> None:
        threads = [
            threading.Thread(
                target=self._work, args=(number, seed, n_batches), daemon=True
            )
            for number, seed in enumerate(seeds)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(TIMEOUT_SECONDS)
            if thread.is_alive():
                raise BrokenPromiseError("a thread hangs")

    def _before(self, operation: Operation) -> Fault | None:
        if self._patience_seconds and operation.kind == "sync":
            self._told.clear()
            self._told.wait(self._patience_seconds)
        if self._keep(operation):
            with self._mutex:
                acknowledged = frozenset(self.acknowledged)
            self.moments.append(Moment(self.disk.copy(), acknowledged))
        return self._plan(operation)

    def _work(self, number: int, seed: int, n_batches: int) -> None:
        rng = random.Random(seed)
        mine: set[int] = set()
        self._start.wait(TIMEOUT_SECONDS)
        try:
            for at in range(n_batches):
                self._step(1 + number * n_batches + at, rng, mine)
        except OSError as error:
            self.errors.append(error)

    def _step(self, batch: int, rng: random.Random, mine: set[int]) -> None:
        assert self.store is not None
        sync = rng.random() < 0.7
        sequence = self.store.insert_batch(batch_numbered(batch), sync=sync)
        mine.add(batch)
        with self._mutex:
            self.sequences[batch] = sequence
        if not sync and rng.random() < 0.5:
            self.store.sync()
            sync = True
        if rng.random() < 0.05:
            self.store.compact()
        if sync:
            with self._mutex:
                self.acknowledged |= mine
            self._told.set()

    def shutdown(self) -> None:
        """End the store; afterwards everything that was inserted is durable."""
        if self.store is not None:
            self.store.shutdown()
        with self._mutex:
            self.acknowledged |= set(self.sequences)

    def judge(self, state: State, acknowledged: frozenset[int]) -> int:
        """Check what was recovered; return how many batches there were.

        They must be the first ones by sequence, as far as sequences are known, and all
        the acknowledged ones among them.
        """
        found = batches_in(state)
        lost = acknowledged - found
        if lost:
            raise BrokenPromiseError(f"batches {sorted(lost)} were acknowledged")
        for batch, sequence in self.sequences.items():
            if (batch in found) != (sequence <= len(found)):
                raise BrokenPromiseError(
                    f"batch {batch} has sequence {sequence}, there are {len(found)} "
                    f"batches, and it is {'' if batch in found else 'not '}among them"
                )
        if state and self.sequences.get(state[0][0], len(found)) != len(found):
            raise BrokenPromiseError("a later batch is hidden by an earlier one")
        return len(found)

    def check(self, disk: Disk, acknowledged: frozenset[int]) -> None:
        """Recover a disk that this crowd has left, go on, reopen; judge each time."""
        store, state = recover_after_crowd(SimulatedDirectory(disk))
        with store:
            n_batches = self.judge(state, acknowledged)
            sequence = store.insert_batch([(1 << 40, (1, b"last"))])
        if sequence != n_batches + 1:
            raise BrokenPromiseError(f"{n_batches} batches, the next is {sequence}")
        store, again = recover_after_crowd(SimulatedDirectory(disk))
        store.shutdown()
        if again != state | {1 << 40: (1, b"last")}:
            raise BrokenPromiseError("reopened, the content is another")
        if disk.opened:
            raise BrokenPromiseError(f"left open: {disk.opened}")


@contextlib.contextmanager
def switching_often() -> Iterator[None]:
    """Let the interpreter change threads far more often than it would."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    try:
        yield
    finally:
        sys.setswitchinterval(before)


def recover_crowd(
    directory: DirectoryProtocol, *, inline: bool = False
) -> tuple[MetadataStore, State]:
    """Recover a store whose logs are due after a few batches."""
    store, recovered = MetadataStore._recover_in(
        directory, inline=inline, threads=1, log_size_bytes_min=2000
    )
    return store, content(recovered)


def recover_after_crowd(directory: DirectoryProtocol) -> tuple[MetadataStore, State]:
    """Recover it without a thread, which there would only take time."""
    return recover_crowd(directory, inline=True)
