"""Scripted histories, run with a failing call, and what must hold afterwards.

The error must stick, nothing acknowledged may be missing, no file may have been
destroyed that nobody had read whole, and nothing may stay open, locked or running.
"""

from __future__ import annotations

import dataclasses
import functools
import random
import threading
from collections.abc import Callable, Iterator

from crashes import Pending, whole_digest
from disk import Disk
from explorer import check
from faults import Failure, FaultPlan, WatchfulDirectory, failures
from histories import BrokenPromiseError, History, Recover, Trace, left
from metastore import StoreClosedError, StoreFailedError
from simulated import SimulatedDirectory

#: States of the medium that are recovered after each failure, beside two fixed ones.
STATES_MAX = 3


@dataclasses.dataclass(frozen=True)
class Script:
    """A history whose calls fail, on a disk that another one, undisturbed, has left.

    `before` ends in what is left: "kill" of the process, "power" loss, or "torn", the
    first state of the medium with a torn tail.
    """

    operations: tuple[str, ...]
    before: tuple[str, ...] = ()

    def prepare(self, recover: Recover) -> tuple[Disk, Trace]:
        """Make the disk on which it is to run."""
        if not self.before:
            return Disk(), Trace()
        *operations, end = self.before
        history = left(recover, *operations)
        disk = history.disk
        if end == "power":
            disk = Disk(disk.durable_image())
        elif end == "torn":
            disk = first_torn(recover, disk)
        return disk, history.trace


def first_torn(recover: Recover, disk: Disk) -> Disk:
    """Make a power loss leave a torn tail."""
    pending = Pending(disk)
    for choice in pending.choices(random.Random(1), exhaustive_max=1, samples=0):
        tried = Disk(pending.image(choice))
        opened, _ = recover(SimulatedDirectory(tried))
        opened.shutdown()
        if "quarantine" in tried.live_image():
            return Disk(pending.image(choice))
    raise AssertionError("no state with a torn tail")


SCRIPTS = {
    "open": Script(("open",)),
    "commit": Script(("open", "batch", "delete", "batch")),
    "unsynced": Script(("open", "unsynced", "unsynced", "sync", "unsynced", "batch")),
    "rotation": Script(("open", "rotate", "batch", "rotate", "batch")),
    "rotation at the end": Script(("open", "rotate", "shutdown")),
    "unsynced rotation at the end": Script(("open", "unsynced rotate", "shutdown")),
    "compaction": Script(("open", "batch", "compact", "delete", "compact")),
    "shutdown": Script(("open", "batch", "unsynced", "shutdown")),
    "reopening": Script(("open", "batch", "shutdown"), ("batch", "shutdown", "power")),
    "snapshot and log": Script(
        ("open", "batch", "compact"), ("rotate", "batch", "shutdown", "power")
    ),
    "after a kill": Script(
        ("open", "batch", "shutdown"), ("batch", "unsynced", "unsynced", "kill")
    ),
    "torn tail": Script(
        ("open", "batch", "compact"),
        ("delete", "unsynced", "unsynced", "torn"),
    ),
    "torn tail behind a snapshot": Script(
        ("open", "delete", "shutdown"),
        ("batch", "batch", "compact", "unsynced", "unsynced", "torn"),
    ),
}


class WatchfulHistory(History):
    """Keeps an eye on what its stores destroy."""

    def directory(self) -> WatchfulDirectory:
        self.watched = WatchfulDirectory(self.disk)
        return self.watched


class Run:
    """One script, one failure, and all that is checked afterwards.

    Parameters
    ----------
    recover : callable
        Opens the store.
    script : Script
        What is done.
    prepared : Disk, Trace
        On what; they are copied.
    plan : FaultPlan
        What fails.
    seen : set
        States that need not be recovered again.

    Raises
    ------
    BrokenPromiseError
        If something does not hold.
    """

    def __init__(
        self,
        recover: Recover,
        script: Script,
        prepared: tuple[Disk, Trace],
        plan: FaultPlan,
        seen: set[object],
    ) -> None:
        self._recover = recover
        self._plan = plan
        self._seen = seen
        disk, trace = prepared
        n_threads = threading.active_count()
        self._history = WatchfulHistory(recover, disk.copy(), trace.copy(), plan)
        self._error: OSError | None = None
        self._failed_at = ""
        for operation in script.operations:
            try:
                self._history.perform(operation)
            except OSError as error:
                self._error = error
                self._failed_at = operation
                break
        if plan.failed:
            self._check_that_it_sticks()
        self._check_the_end(n_threads)
        if plan.failed:
            self._check_what_is_left()

    def _check_that_it_sticks(self) -> None:
        store = self._history.store
        if store is None:
            require(self._error is not None, "nobody was told of the failure")
            return
        is_closed = self._failed_at == "shutdown"
        kind = StoreClosedError if is_closed else StoreFailedError
        raised = [
            raised_by(kind, write)
            for write in (
                lambda: store.insert_batch([(77, (1, b""))]),
                lambda: store.insert_batch([], sync=False),
                store.sync,
                store.compact,
            )
        ]
        if self._error is not None:
            require(
                isinstance(self._error, StoreFailedError),
                f"{self._failed_at} has raised {self._error!r}",
            )
        if is_closed:
            raised = [self._error]
        causes = {id(error.__cause__): str(error.__cause__) for error in raised}
        require(len(causes) == 1, f"several causes: {causes}")
        require("(injected)" in str(causes), f"not the cause: {causes}")

    def _check_the_end(self, n_threads: int) -> None:
        history = self._history
        if history.store is not None:
            try:
                history.store.shutdown()
            except StoreFailedError:
                require(bool(self._plan.failed), "shutdown failed for no reason")
            history.store.shutdown()
            history.store = None
        disk, history.disk.before = history.disk, None
        require(disk.opened == [], f"left open: {disk.opened}")
        require(disk.lock_holder is None, "left locked")
        require(threading.active_count() == n_threads, "left a thread")
        destroyed = history.watched.destroyed
        require(destroyed == [], f"destroyed before they were read: {destroyed}")

    def _check_what_is_left(self) -> None:
        disk, trace = self._history.disk, self._history.trace
        pending = Pending(disk)
        rng = random.Random(1)
        choices = list(pending.choices(rng, exhaustive_max=STATES_MAX, samples=0))
        if len(choices) > STATES_MAX:
            choices = rng.sample(choices, STATES_MAX)
        left = [Disk(pending.image(choice)) for choice in choices]
        for found in (disk.copy(), Disk(disk.durable_image()), *left):
            key = whole_digest(found), trace.promise
            if key not in self._seen:
                self._seen.add(key)
                check(self._recover, found, trace)


def require(holds: bool, otherwise: str) -> None:
    if not holds:
        raise BrokenPromiseError(otherwise)


def raised_by(kind: type[BaseException], call: Callable[[], object]) -> BaseException:
    """Make a call that must raise this."""
    try:
        call()
    except kind as error:
        return error
    raise BrokenPromiseError(f"a write went through that should raise {kind.__name__}")


def failing_runs(
    recover: Recover, script: Script, seen: set[object]
) -> Iterator[Callable[[], None]]:
    """Yield the runs of a script, one for every failure of every call."""
    prepared = script.prepare(recover)

    def run(failure: Failure, at: int, n_calls: int) -> None:
        plan = FaultPlan(failure, at)
        try:
            Run(recover, script, prepared, plan, seen)
            require(bool(plan.failed), "the call was not made this time")
        except Exception as error:
            error.add_note(f"call {at} of {n_calls}: {failure}; failed: {plan.failed}")
            raise

    for failure in failures():
        counting = FaultPlan(failure)
        Run(recover, script, prepared, counting, seen)
        for at in range(1, counting.calls + 1):
            yield functools.partial(run, failure, at, counting.calls)
