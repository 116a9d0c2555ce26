"""Every call of every scripted history fails: once, and from then on.

Afterwards the error must stick, nothing acknowledged may be missing, no file may have
been destroyed that nobody had read whole, and nothing may stay open, locked or running.
"""

from __future__ import annotations

import dataclasses
import random
import threading

import pytest

from crashes import Pending
from disk import Disk
from explorer import check
from faults import Failure, FaultPlan, WatchfulDirectory, failures
from histories import BrokenPromiseError, History, Trace
from metastore import StoreFailedError
from small_store import recover_small, repeatable

#: States of the medium that are recovered after each failure, beside two fixed ones.
STATES_MAX = 3


@pytest.fixture(autouse=True)
def _repeatable():
    with repeatable():
        yield


@dataclasses.dataclass(frozen=True)
class Script:
    """A history whose calls fail, on a disk that another one, undisturbed, has left.

    `before` ends in what is left: "kill" of the process, "power" loss, or "torn", where
    half of what was pending at the loss is kept.
    """

    operations: tuple[str, ...]
    before: tuple[str, ...] = ()

    def prepare(self) -> tuple[Disk, Trace]:
        if not self.before:
            return Disk(), Trace()
        *operations, end = self.before
        history = History(recover_small, Disk())
        for operation in ("open", *operations):
            history.perform(operation)
        disk, trace = history.disk.copy(), history.trace.copy()
        if end == "power":
            disk = Disk(disk.durable_image())
        elif end == "torn":
            pending = Pending(disk)
            assert len(pending.counts) > 1
            disk = Disk(pending.image([at % 2 for at in range(len(pending.counts))]))
        history.close()
        return disk, trace


SCRIPTS = {
    "open": Script(("open",)),
    "commit": Script(("open", "batch", "delete", "batch")),
    "unsynced": Script(("open", "unsynced", "unsynced", "sync", "unsynced", "batch")),
    "rotation": Script(("open", "rotate", "batch", "rotate", "batch")),
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
        ("open", "batch", "compact"), ("batch", "unsynced", "unsynced", "torn")
    ),
    "torn tail behind a snapshot": Script(
        ("open", "delete", "shutdown"), ("rotate", "unsynced", "unsynced", "torn")
    ),
}


class WatchfulHistory(History):
    """Keeps an eye on what its stores destroy."""

    def directory(self) -> WatchfulDirectory:
        self.watched = WatchfulDirectory(self.disk)
        return self.watched


class Run:
    """One script, one failure, and all that is checked afterwards."""

    def __init__(self, script: Script, failure: Failure, at: int) -> None:
        self.plan = FaultPlan(failure, at)
        disk, trace = script.prepare()
        self._threads = threading.active_count()
        self.history = WatchfulHistory(recover_small, disk, trace, self.plan)
        self.error: OSError | None = None
        try:
            for operation in script.operations:
                self.history.perform(operation)
        except OSError as error:
            self.error = error
        if at and self.plan.failed:
            self._check_that_it_sticks()
        self._check_the_end()
        if at:
            self._check_what_is_left()

    def _check_that_it_sticks(self) -> None:
        store = self.history.store
        if store is None:  # recover or shutdown has failed, or nothing came after it
            assert self.error is not None or self._is_harmless()
            return
        raised = []
        for write in (
            lambda: store.insert_batch([(77, (1, b""))]),
            lambda: store.insert_batch([], sync=False),
            store.sync,
            store.compact,
        ):
            with pytest.raises(StoreFailedError) as caught:
                write()
            raised.append(caught.value)
        causes = {id(error.__cause__) for error in raised}
        assert len(causes) == 1
        assert "(injected)" in str(raised[0].__cause__)
        assert self.error is None or isinstance(self.error, StoreFailedError)

    def _is_harmless(self) -> bool:
        """Whether what failed need not be told: the store was about to end anyway."""
        return False

    def _check_the_end(self) -> None:
        history = self.history
        if history.store is not None:
            try:
                history.store.shutdown()
            except StoreFailedError:
                assert self.plan.failed
            history.store.shutdown()
            history.store = None
        history.disk.before = None
        assert history.disk.opened == []
        assert history.disk.lock_holder is None
        assert threading.active_count() == self._threads
        assert history.watched.destroyed == []

    def _check_what_is_left(self) -> None:
        disk, trace = self.history.disk, self.history.trace
        pending = Pending(disk)
        rng = random.Random(1)
        choices = list(pending.choices(rng, exhaustive_max=STATES_MAX, samples=0))
        if len(choices) > STATES_MAX:
            choices = rng.sample(choices, STATES_MAX)
        left = [Disk(pending.image(choice)) for choice in choices]
        for found in (disk.copy(), Disk(disk.durable_image()), *left):
            check(recover_small, found, trace)


@pytest.mark.parametrize("name", SCRIPTS)
def test_every_call_fails(name, capsys):
    script = SCRIPTS[name]
    n_runs = 0
    for failure in failures():
        n_calls = Run(script, failure, 0).plan.calls
        for at in range(1, n_calls + 1):
            try:
                run = Run(script, failure, at)
            except (AssertionError, BrokenPromiseError, OSError, ValueError) as error:
                error.add_note(f"{name}: call {at} of {n_calls}: {failure}")
                raise
            assert run.plan.failed
            n_runs += 1
    with capsys.disabled():
        print(f"\n{name}: {n_runs} failed calls, {n_runs * (2 + STATES_MAX)} states")
