"""Crash a store everywhere, and see what comes back.

Each history is run once; right before each of its changing calls the disk is kept. From
each kept disk every crash state is made that ``crashes`` knows, and the disk as a kill
of the process leaves it, cache and all. Each state is recovered and must hold a prefix
of the batches, at least the acknowledged ones; then it takes one more batch, is shut
down, reopened and compared. That too is a history, and is crashed in the same way.

A state that broke the promise is named by its path, for example
``batch,rotate/17:any:0.1.1/5:kill``: the history, then per level the number of the call
before which the crash comes and the choice. ``python tests/explorer.py PATH`` from the
root of the project makes this very state again and tells about it.
"""

from __future__ import annotations

import contextlib
import dataclasses
import random
import sys
import traceback
from collections.abc import Iterable, Iterator

from crashes import Choice, Pending, digest, whole_digest
from disk import Disk, Image
from histories import BrokenPromiseError, Crash, History, Recover, Trace, run

#: What follows a crash.
#: A reopen of a store in use is a kill: frames that lie behind the new batch, left by
#: batches that were dropped, must not come back. Then the same with a shutdown.
AFTERMATH = ("open", "batch", "reopen", "batch", "shutdown")


@dataclasses.dataclass(frozen=True)
class Effort:
    """How hard to look at one level: in the history, in its recovery, in that one's.

    Parameters
    ----------
    exhaustive_max : int
        Up to so many states of one moment, all are made.
    samples : int
        Beyond that, so many random ones beside those that ``crashes`` picks.
    states_max : int
        Of one moment, at most so many states, picked at random.
    share : float
        The share of the states that are crashed again in their recovery.
    """

    exhaustive_max: int = 64
    samples: int = 8
    states_max: int = 1 << 30
    share: float = 0.0


@dataclasses.dataclass
class Counts:
    """What was done."""

    histories: int = 0
    moments: int = 0
    tried: int = 0
    distinct: int = 0
    recoveries: int = 0

    def __str__(self) -> str:
        return (
            f"{self.histories} histories, {self.moments} moments of a crash, "
            f"{self.tried} states tried, {self.distinct} distinct, "
            f"{self.recoveries} recoveries"
        )


@dataclasses.dataclass(frozen=True)
class Finding:
    """A state that broke the promise."""

    path: str
    error: BaseException
    #: States recovered until then.
    states: int

    def __str__(self) -> str:
        reason = f"{type(self.error).__name__}: {self.error}"
        return f"{reason}\n  replay: python tests/explorer.py {self.path}"


class Explorer:
    """Crashes the histories of a store.

    Parameters
    ----------
    recover : callable
        Opens the store of a directory and gives its content.
    efforts : iterable of Effort
        One for the history, one for its recoveries, and so on.
    seed : int
        Picks the samples.
    findings_max : int
        Stop after so many findings.
    """

    def __init__(
        self,
        recover: Recover,
        efforts: Iterable[Effort] = (Effort(),),
        *,
        seed: int = 1,
        findings_max: int = 5,
    ) -> None:
        self._recover = recover
        self._efforts = tuple(efforts)
        self._rng = random.Random(seed)
        self._findings_max = findings_max
        self._seen: set[object] = set()
        self._images: set[bytes] = set()
        self.counts = Counts()
        self.findings: list[Finding] = []

    @property
    def done(self) -> bool:
        return len(self.findings) >= self._findings_max

    def explore(self, operations: tuple[str, ...]) -> None:
        """Crash a history at each call of its last operation.

        The operations before that one are the history of their own turn.
        """
        self.counts.histories += 1
        path = ",".join(operations)
        try:
            crashes = run(self._recover, operations, record=len(operations))
        except (BrokenPromiseError, OSError, ValueError, RuntimeError) as error:
            self._found(path, error)
            return
        self.crash(crashes, path)

    def crash(self, crashes: list[Crash], path: str, level: int = 0) -> None:
        """Make, recover and check the states of these moments."""
        for crash in crashes:
            self.counts.moments += 1
            for choice, disk, key in self._states(crash, self._efforts[level]):
                if self.done:
                    return
                self.counts.tried += 1
                self._images.add(key)
                self.counts.distinct = len(self._images)
                seen = (key, crash.trace.promise)
                if seen not in self._seen:
                    self._seen.add(seen)
                    where = f"{path}/{crash.call}:{choice}"
                    self._check(disk, crash.trace, where, level)

    def _states(
        self, crash: Crash, effort: Effort
    ) -> Iterator[tuple[str, Disk, bytes]]:
        yield "kill", crash.disk.copy(), whole_digest(crash.disk)
        for model in ("any", "ordered"):
            pending = Pending(crash.disk, ordered=model == "ordered")
            for choice in self._choices(pending, effort):
                image = pending.image(choice)
                told = ".".join(map(str, choice))
                yield f"{model}:{told}", Disk(image), digest(image)

    def _choices(self, pending: Pending, effort: Effort) -> list[Choice]:
        found = list(
            pending.choices(
                self._rng,
                exhaustive_max=effort.exhaustive_max,
                samples=effort.samples,
            )
        )
        if len(found) > effort.states_max:
            found = self._rng.sample(found, effort.states_max)
        return found

    def _check(self, disk: Disk, trace: Trace, path: str, level: int) -> None:
        deeper = (
            level + 1 < len(self._efforts)
            and self._rng.random() < self._efforts[level].share
        )
        self.counts.recoveries += 1
        try:
            crashes = check(self._recover, disk, trace, record=deeper)
        except Exception as error:  # whatever it is, it is not what was promised
            self._found(path, error)
            return
        self.crash(crashes, path, level + 1)

    def _found(self, path: str, error: BaseException) -> None:
        self.findings.append(Finding(path, error, self.counts.recoveries))

    def assert_nothing_found(self) -> None:
        assert not self.findings, "\n".join(map(str, self.findings))


def check(
    recover: Recover, disk: Disk, trace: Trace, *, record: bool = False
) -> list[Crash]:
    """Recover a disk, write to it in two sessions, reopen; compare each time."""
    with contextlib.closing(History(recover, disk, trace.copy())) as history:
        history.recording = record
        for operation in AFTERMATH:
            history.perform(operation)
        history.keep_end()
        history.recording = False
        history.perform("open")
        history.perform("shutdown")
    if disk.opened:
        raise BrokenPromiseError(f"left open: {disk.opened}")
    return history.crashes


def replay(recover: Recover, path: str) -> tuple[Crash, Disk]:
    """Make the state that `path` names; return the moment it belongs to, and it."""
    told, *levels = path.split("/")
    operations = tuple(filter(None, told.split(",")))
    crashes = run(recover, operations, record=0)
    for at, level in enumerate(levels):
        call, model, *choice = level.split(":")
        crash = next(found for found in crashes if found.call == int(call))
        disk = crash.disk.copy()
        if model != "kill":
            pending = Pending(crash.disk, ordered=model == "ordered")
            numbers = [int(number) for number in choice[0].split(".") if number]
            disk = Disk(pending.image(numbers))
        if at + 1 < len(levels):
            crashes = check(recover, disk, crash.trace, record=True)
    return crash, disk


def tell(image: Image, indent: str = "  ") -> None:
    """Print what lies in a directory."""
    for name, inside in sorted(image.items()):
        if isinstance(inside, dict):
            print(f"{indent}{name}/")
            tell(inside, indent + "  ")
        else:
            size = len(inside.rstrip(b"\0"))
            print(f"{indent}{name}: {len(inside)} bytes, zeros from {size} on")


def main(path: str) -> int:
    """Make a state of the real store again, show it, recover it."""
    from small_store import recover_small, repeatable

    with repeatable():
        return show(recover_small, path)


def show(recover: Recover, path: str) -> int:
    """Make a state again, tell what lies there, and what its recovery says."""
    crash, disk = replay(recover, path)
    print(f"before call {crash.call}: {crash.operation}")
    print(f"acknowledged {crash.trace.acknowledged}, issued", end=" ")
    print(f"{crash.trace.next_sequence - 1}; the directory:")
    tell(disk.live_image())
    try:
        check(recover, disk, crash.trace)
    except Exception:  # shown, not handled
        traceback.print_exc()
        return 1
    print("recovered, as promised")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
