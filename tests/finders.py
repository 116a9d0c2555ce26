"""Checks that look for a broken promise, and say after how many states they found one.

In a right store they find nothing; ``planted`` puts bugs in, and each must be found.
"""

from __future__ import annotations

import dataclasses
import itertools
import random
from collections.abc import Callable, Iterable, Iterator, Sequence

import oracle
from crowd import Crowd, recover_crowd
from disk import Disk, Image
from explorer import Effort, Explorer
from fault_runs import SCRIPTS, failing_runs
from histories import BrokenPromiseError, left
from metastore import CorruptionError, MetastoreError
from metastore.directory import parse_listing
from metastore.format import FRAME_HEADER_SIZE
from simulated import SimulatedDirectory
from small_store import recover_small


@dataclasses.dataclass(frozen=True)
class Found:
    """What a finder has found."""

    error: BaseException
    #: States recovered, or runs made, until then.
    states: int


Finder = Callable[[], Found | None]


#: Histories in which every kind of step is followed by every kind of recovery.
TELLING = (
    (),
    ("batch",),
    ("batch", "delete"),
    ("batch", "compact"),
    ("batch", "compact", "shutdown"),
    ("unsynced", "unsynced"),
    ("unsynced", "reopen"),
    ("rotate",),
    ("rotate", "rotate"),
)


def by_crashes() -> Found | None:
    """Crash some histories, and now and then their recoveries."""
    efforts = (Effort(share=0.02), Effort(states_max=4))
    explorer = Explorer(recover_small, efforts, findings_max=1)
    for operations in TELLING:
        explorer.explore(operations)
        if explorer.findings:
            return Found(explorer.findings[0].error, explorer.counts.recoveries)
    return None


def by_faults() -> Found | None:
    """Fail every call of some scripts."""
    n_runs = 0
    for name in ("commit", "reopening", "torn tail"):
        try:
            for run in failing_runs(recover_small, SCRIPTS[name], set()):
                n_runs += 1
                run()
        except (BrokenPromiseError, MetastoreError, OSError) as error:
            return Found(error, n_runs)
    return None


def by_crowds() -> Found | None:
    """Lose the power right before the syncs of several threads."""
    n_states = 0
    for seed in range(4):  # how the threads interleave is up to the system
        crowd = Crowd(
            recover_crowd,
            random.Random(seed),
            keep=lambda operation: operation.kind == "sync",
            patience_seconds=0.01,
        )
        crowd.shutdown()
        for moment in crowd.moments:
            n_states += 1
            try:
                crowd.check(Disk(moment.disk.durable_image()), moment.acknowledged)
            except (BrokenPromiseError, CorruptionError) as error:
                return Found(error, n_states)
    return None


def by_damage() -> Found | None:
    """Flip bits in an open log, and take whole logs away."""
    return _damaged(itertools.chain(_flipped(), _taken()))


def by_forgery() -> Found | None:
    """Recover a snapshot that claims to be larger than any memory."""
    history = left(recover_small, "batch", "compact")
    image = history.disk.durable_image()
    (name,) = (name for name in image if name.startswith("snapshot"))
    data = image[name]
    assert isinstance(data, bytes)
    end, seed = oracle.frame_offsets(data)[-1], oracle.file_seed(data)
    claim = (1 << 50).to_bytes(8, "little")
    forged = oracle.put(data, end + FRAME_HEADER_SIZE, claim)
    forged = oracle.fix_payload_checksum(forged, end, seed)
    return _damaged([(image | {name: forged}, [])])


Case = tuple[Image, Sequence[object]]


def _flipped() -> Iterator[Case]:
    """Each case, and what may be recovered; the last frame may count as torn."""
    history = left(recover_small, "delete", "delete", "delete")
    image, states = history.disk.durable_image(), history.trace.states
    name = max(name for name in image if name.startswith("log") and len(name) == 20)
    data = image[name]
    assert isinstance(data, bytes)
    offsets = oracle.frame_offsets(data)
    for offset in range(0, len(data.rstrip(b"\0")), 5):
        yield (
            image | {name: oracle.flip_bit(data, offset, offset % 8)},
            states[-2:] if offset >= offsets[-1] else states[-1:],
        )


def _taken() -> Iterator[Case]:
    """A store with several logs less one of them: nothing or a prefix is right."""
    again = ("shutdown", "reopen", "batch")
    history = left(recover_small, "delete", *again, *again)
    image = history.disk.durable_image()
    for name in parse_listing([(name, True) for name in image]).logs:
        rest = {at: data for at, data in image.items() if at != str(name)}
        yield rest, history.trace.states


def _damaged(cases: Iterable[Case]) -> Found | None:
    for number, (image, allowed) in enumerate(cases, 1):
        try:
            opened, state = recover_small(SimulatedDirectory(Disk(image)))
        except CorruptionError:
            continue
        except Exception as error:  # anything else is not an answer
            return Found(error, number)
        opened.shutdown()
        if state not in allowed:
            error = BrokenPromiseError(f"recovered {len(state)} records in silence")
            return Found(error, number)
    return None
