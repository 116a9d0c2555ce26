"""Short histories of a store on a simulated disk, and what must be left of them.

The batches of a history are numbered by their sequence, and key 0 holds the number of
the last one: so no two prefixes of a history have the same content.
"""

from __future__ import annotations

import contextlib
import itertools
import random
from collections.abc import Callable, Iterator
from typing import NamedTuple, Protocol

from disk import CHANGES, Disk, Fault, Operation
from metastore.directory import DirectoryProtocol
from simulated import SimulatedDirectory
from verbs import Batch, Record, State, apply

#: Every log outgrows this soon: see :func:`batch_of`.
LOG_SIZE_BYTES_MIN = 1024

OPERATIONS = (
    "batch",
    "delete",
    "unsynced",
    "rotate",
    "compact",
    "shutdown",
    "reopen",
)


class BrokenPromiseError(AssertionError):
    """A store broke its promise."""


class Store(Protocol):
    """What a history asks of a store."""

    def insert_batch(self, batch: Batch, *, sync: bool = True) -> int: ...
    def sync(self) -> None: ...
    def compact(self) -> None: ...
    def shutdown(self) -> None: ...


Recover = Callable[[DirectoryProtocol], tuple[Store, State]]


class Trace:
    """The batches given to a store, and how many of them it has acknowledged."""

    def __init__(self) -> None:
        #: The content after 0, 1, 2 .. batches.
        self.states: list[State] = [{}]
        self.acknowledged = 0

    def copy(self) -> Trace:
        other = Trace()
        other.states = self.states[:]
        other.acknowledged = self.acknowledged
        return other

    @property
    def next_sequence(self) -> int:
        return len(self.states)

    @property
    def promise(self) -> tuple[int, int, int]:
        """Tells what a recovery may show, as far as one store is concerned."""
        open_states = self.states[self.acknowledged :]
        told = tuple(tuple(sorted(state.items())) for state in open_states)
        return self.acknowledged, len(open_states), hash(told)

    def issue(self, batch: Batch) -> None:
        self.states.append(apply(self.states[-1], batch))

    def acknowledge(self, sequence: int) -> None:
        self.acknowledged = max(self.acknowledged, sequence)

    def recovered(self, state: State) -> None:
        """Check what a recovery found; from now on it is all there ever was.

        What a recovery has shown must stay, so it counts as acknowledged, and what it
        did not show must never come back.
        """
        for sequence in range(self.acknowledged, len(self.states)):
            if state == self.states[sequence]:
                self.acknowledged = sequence
                del self.states[sequence + 1 :]
                return
        raise BrokenPromiseError(
            f"recovered {_told(state)}, which is none of the prefixes "
            f"{self.acknowledged} (acknowledged) to {len(self.states) - 1} (issued)"
        )


def _told(state: State) -> str:
    last = state[0][0] if 0 in state else "none"
    return f"{len(state)} records, the last batch being {last}"


def batch_of(sequence: int, kind: str) -> Batch:
    """The batch that a history inserts under this sequence.

    Sizes make frames begin and end within sectors, and "rotate" makes every log due:
    each one writes more than the ones before it have left in a snapshot. Key 0 comes
    twice, and the last record of a key wins.
    """
    rng = random.Random(sequence)
    records: list[Record] = [(0, (2**40, b"")), (0, (sequence, b""))]
    if kind == "delete":
        return [*records, (1 + sequence % 3, None), (1 + (sequence + 2) % 3, None)]
    if "rotate" in kind:
        data = rng.randbytes(LOG_SIZE_BYTES_MIN + 400 * sequence)
        return [*records, (9, (sequence, data))]
    data = rng.randbytes((30, 500, 200)[sequence % 3])
    return [*records, (1 + sequence % 3, (1000 + sequence, data))]


class Crash(NamedTuple):
    """A moment of a history: the disk right before a call, and what was promised."""

    call: int
    operation: Operation | None
    disk: Disk
    trace: Trace


class History:
    """Carries out operations on a store, and can keep the disk before each call.

    Parameters
    ----------
    recover : callable
        Opens the store of a directory and gives its content.
    disk : Disk
        Where the store is, or will be. It is changed.
    trace : Trace, optional
        What was inserted into it before.
    plan : callable, optional
        Asked before each call whether it is to fail.
    """

    def __init__(
        self,
        recover: Recover,
        disk: Disk,
        trace: Trace | None = None,
        plan: Callable[[Operation], Fault | None] | None = None,
    ) -> None:
        self._recover = recover
        self._plan = plan
        self.disk = disk
        self.trace = trace or Trace()
        self.store: Store | None = None
        self.crashes: list[Crash] = []
        self.recording = False
        #: Changing calls so far.
        self.call = 0
        disk.before = self._record

    def perform(self, operation: str) -> None:
        """Carry out one of ``OPERATIONS``, "open", "sync" or "unsynced rotate"."""
        if operation in ("open", "reopen"):
            self._open()
            return
        assert self.store is not None, "no operation after a shutdown but reopen"
        if operation == "shutdown":
            self.store.shutdown()
            self.store = None
            self.trace.acknowledge(self.trace.next_sequence - 1)
        elif operation in ("compact", "sync"):
            getattr(self.store, operation)()
            self.trace.acknowledge(self.trace.next_sequence - 1)
        else:
            self._insert(operation)

    def _insert(self, kind: str) -> None:
        assert self.store is not None
        expected = self.trace.next_sequence
        batch = batch_of(expected, kind)
        self.trace.issue(batch)
        sequence = self.store.insert_batch(batch, sync="unsynced" not in kind)
        if sequence != expected:
            raise BrokenPromiseError(
                f"batch {expected} was given the sequence {sequence}"
            )
        if "unsynced" not in kind:
            self.trace.acknowledge(sequence)

    def _open(self) -> None:
        """Recover; if the store is in use, as after a kill: the cache survives."""
        if self.store is not None:
            killed, self.disk = self.disk, self.disk.copy()
            killed.before = None
            self.store.shutdown()
            self.disk.before = self._record
        self.store, state = self._recover(self.directory())
        self.trace.recovered(state)

    def directory(self) -> SimulatedDirectory:
        """What the store is recovered in."""
        return SimulatedDirectory(self.disk)

    def _record(self, operation: Operation) -> Fault | None:
        if operation.kind in CHANGES:
            if self.recording:
                self._keep(operation)
            self.call += 1
        return self._plan(operation) if self._plan else None

    def _keep(self, operation: Operation | None) -> None:
        self.crashes.append(
            Crash(self.call, operation, self.disk.copy(), self.trace.copy())
        )

    def keep_end(self) -> None:
        """Keep the disk after the last call too, with all that was promised by then."""
        if self.recording:
            self._keep(None)

    def close(self) -> None:
        """End the store; nothing of this is recorded."""
        self.disk.before = None
        if self.store is not None:
            store, self.store = self.store, None
            store.shutdown()


def run(recover: Recover, operations: tuple[str, ...], *, record: int) -> list[Crash]:
    """Open a new store and carry out `operations`; record from this one on."""
    with contextlib.closing(History(recover, Disk())) as history:
        for at, operation in enumerate(("open", *operations)):
            history.recording = at >= record
            history.perform(operation)
        history.keep_end()
        return history.crashes


def left(recover: Recover, *operations: str) -> History:
    """Open a new store, carry out `operations`, and leave it as a kill would."""
    history = History(recover, Disk())
    for operation in ("open", *operations):
        history.perform(operation)
    disk = history.disk.copy()
    history.close()
    history.disk = disk
    return history


def histories(length: int) -> Iterator[tuple[str, ...]]:
    """Every history of exactly `length` operations: after a shutdown only a reopen."""
    for operations in itertools.product(OPERATIONS, repeat=length):
        pairs = itertools.pairwise(operations)
        if all(after == "reopen" for before, after in pairs if before == "shutdown"):
            yield operations
