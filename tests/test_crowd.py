"""Longer histories with several threads: sampled crashes, and calls that fail.

METASTORE_CROWD_ROUNDS
    How many crowds the campaign (``-m slow``) crashes (1500).

The seed of a run decides what each thread does and which moments are kept; how the
threads interleave is up to the system. So a state that breaks the promise is written
down as well: the message says where.
"""

from __future__ import annotations

import contextlib
import os
import pickle
import random
import threading
from pathlib import Path
from unittest import mock

import pytest

from crashes import Pending
from crowd import (
    TIMEOUT_SECONDS,
    Crowd,
    Moment,
    batch_numbered,
    recover_after_crowd,
    recover_crowd,
)
from disk import Disk, Fault, Operation
from faults import FaultPlan, failures
from histories import BrokenPromiseError
from metastore import MetadataStore, StoreFailedError, engine, log
from metastore.directory import DirectoryProtocol, FileName
from simulated import SimulatedDirectory
from small_store import repeatable
from verbs import apply

N_ROUNDS_LONG = int(os.environ.get("METASTORE_CROWD_ROUNDS", "1500"))
#: Few threads, and so many that a leader goes on leading while they wait.
N_THREADS = 4, 20


@pytest.fixture(autouse=True)
def _repeatable():
    with repeatable():
        yield


def crash_a_crowd(seed: int, where: Path) -> tuple[int, int]:
    """Run threads, crash them at some moments; return the moments and the states."""
    rng = random.Random(seed)
    crowd = Crowd(
        recover_crowd,
        rng,
        n_threads=rng.choice(N_THREADS),
        keep=lambda operation: rng.random() < 0.1,
    )
    crowd.shutdown()
    n_states = 0
    for moment in [*crowd.moments, Moment(crowd.disk, frozenset(crowd.acknowledged))]:
        for disk in states_of(moment, rng):
            n_states += 1
            kept = disk.durable_image()
            try:
                crowd.check(disk, moment.acknowledged)
            except Exception as error:
                facts = kept, moment.acknowledged, crowd.sequences
                (where / "state").write_bytes(pickle.dumps(facts))
                error.add_note(f"seed {seed}; METASTORE_CROWD_STATE={where}/state")
                raise
    return len(crowd.moments) + 1, n_states


def states_of(moment: Moment, rng: random.Random) -> list[Disk]:
    """The disk after a kill, and a few that a power loss may leave."""
    pending = Pending(moment.disk, ordered=rng.random() < 0.5)
    choices = list(pending.choices(rng, exhaustive_max=32, samples=2))
    picked = rng.sample(choices, min(4, len(choices)))
    return [moment.disk.copy(), *(Disk(pending.image(choice)) for choice in picked)]


def test_crashes_of_a_crowd(tmp_path, rng, capsys):
    seeds = [rng.randrange(1 << 30) for _ in range(6)]
    counts = [crash_a_crowd(seed, tmp_path) for seed in seeds]
    with capsys.disabled():
        n_moments, n_states = (sum(count) for count in zip(*counts, strict=True))
        print(f"\ncrowds: {len(seeds)} runs, {n_moments} moments, {n_states} states")


@pytest.mark.slow
@pytest.mark.timeout(0)
def test_crashes_of_many_crowds(tmp_path, rng, campaign):
    with campaign("crowds") as counts:
        for _ in range(N_ROUNDS_LONG):
            n_moments, n_states = crash_a_crowd(rng.randrange(1 << 30), tmp_path)
            counts.update(crowds=1, moments=n_moments, states=n_states)


@pytest.mark.skipif(
    "METASTORE_CROWD_STATE" not in os.environ,
    reason="replays the state in the file METASTORE_CROWD_STATE",
)
def test_a_state_that_was_written_down():
    path = Path(os.environ["METASTORE_CROWD_STATE"])
    image, acknowledged, sequences = pickle.loads(path.read_bytes())
    crowd = Crowd(recover_crowd, random.Random(1), n_batches=0)
    crowd.shutdown()
    crowd.sequences = sequences
    crowd.check(Disk(image), acknowledged)


def fail_a_crowd(seed: int) -> bool:
    """Let a call fail under several threads; say whether it was reached."""
    rng = random.Random(seed)
    plan = FaultPlan(rng.choice(list(failures())), at=rng.randrange(1, 150))
    n_threads = threading.active_count()
    crowd = Crowd(recover_crowd, rng, n_threads=rng.choice(N_THREADS), plan=plan)
    if crowd.store is not None and plan.failed:
        with pytest.raises(StoreFailedError, match="injected"):
            crowd.store.compact()
        assert all(isinstance(error, StoreFailedError) for error in crowd.errors)
    acknowledged = frozenset(crowd.acknowledged)
    if crowd.store is not None:
        try:
            crowd.store.shutdown()
        except StoreFailedError:
            assert plan.failed
    crowd.disk.before = None
    assert crowd.disk.opened == []
    assert threading.active_count() == n_threads
    for disk in states_of(Moment(crowd.disk, acknowledged), rng):
        crowd.check(disk, acknowledged)
    return bool(plan.failed)


def test_calls_that_fail_under_a_crowd(rng, capsys):
    n_failed = 0
    for _ in range(25):
        seed = rng.randrange(1 << 30)
        try:
            n_failed += fail_a_crowd(seed)
        except Exception as error:
            error.add_note(f"seed {seed}")
            raise
    with capsys.disabled():
        print(f"\ncrowds with a call that fails: {n_failed} of 25")
    assert n_failed


def test_the_next_log_is_not_prepared_under_the_rotation_that_needs_it():
    """The story: a rotation came before the thread had prepared the next log.

    So the rotation made that file itself, and while it published it, the thread made it
    again, under the same temporary name: the published log was emptied, with its header
    and what was acknowledged in it. Seen as a failed shutdown in crowds.
    """
    disk = Disk()
    publishing, prepared = threading.Event(), threading.Event()
    prepare_next, publish = engine.Engine._prepare_next, log.publish
    published = []

    def prepare_late(self: engine.Engine) -> None:
        publishing.wait(TIMEOUT_SECONDS)
        prepare_next(self)
        prepared.set()

    def publish_late(directory: DirectoryProtocol, name: FileName) -> None:
        published.append(name)
        if len(published) == 2:
            publishing.set()
            prepared.wait(0.5)  # in vain, if the thread rightly waits for us
        publish(directory, name)

    with (
        mock.patch.object(engine.Engine, "_prepare_next", prepare_late),
        mock.patch.object(log, "publish", publish_late),
    ):
        store, _ = MetadataStore._recover_in(
            SimulatedDirectory(disk), log_size_bytes_min=100
        )
        store.insert_batch([(1, (1, bytes(200)))])
        store.insert_batch([(2, (2, b"acknowledged"))])
        killed = disk.copy()
        store.shutdown()
    assert disk.opened == []
    store, state = recover_crowd(SimulatedDirectory(killed))
    store.shutdown()
    assert state == {1: (1, bytes(200)), 2: (2, b"acknowledged")}


def compact(store: MetadataStore) -> None:
    with pytest.raises(StoreFailedError, match="injected"):
        store.compact()


def test_a_log_is_not_sealed_again_after_a_rotation_that_failed():
    """The story: a batch made the log due, and compact() came in the same group.

    The rotation for the batch sealed the log and failed behind that; then compact()
    began a rotation of its own, and its end frame stood behind the first one: the store
    could never be opened again. Seen when calls failed under crowds.
    """
    disk = Disk()
    store, _ = recover_crowd(SimulatedDirectory(disk))
    store.insert_batch([(1, (1, b"acknowledged"))])
    running = store._engine
    running._compactor.wait_idle()
    compacting = threading.Thread(target=compact, args=[store])

    def fail_rename(operation: Operation) -> Fault | None:
        if operation.kind == "write" and not compacting.ident:
            compacting.start()
            while running._commits.n_waiting == 0:  # compact() waits behind this batch
                pass
        return Fault() if operation.kind == "rename" else None

    disk.before = fail_rename
    store.insert_batch([(2, (2, bytes(range(256)) * 10))])
    compacting.join(TIMEOUT_SECONDS)
    assert not compacting.is_alive()
    with contextlib.suppress(StoreFailedError):
        store.shutdown()
    store, state = recover_after_crowd(SimulatedDirectory(disk.copy()))
    store.shutdown()
    assert state[1] == (1, b"acknowledged")
    assert len(state) == 2


# The judge


@pytest.fixture
def crowd():
    crowd = Crowd(recover_crowd, random.Random(1), n_batches=0)
    crowd.shutdown()
    crowd.sequences = {3: 1, 1: 2, 2: 3}
    return crowd


def state_of(*batches: int) -> dict[int, tuple[int, bytes]]:
    state: dict[int, tuple[int, bytes]] = {}
    for batch in batches:
        state = apply(state, batch_numbered(batch))
    return state


def test_the_judge_accepts_prefixes(crowd):
    for n_batches in range(4):
        state = state_of(*[3, 1, 2][:n_batches])
        assert crowd.judge(state, frozenset()) == n_batches
    # A batch whose call failed may be there, too.
    assert crowd.judge(state_of(3, 1, 2, 9), frozenset({1, 2, 3})) == 4


@pytest.mark.parametrize(
    ("batches", "acknowledged", "reason"),
    [
        ([3, 1], {2}, "acknowledged"),
        ([3, 2], set(), "not among them"),
        ([1], set(), "sequence"),
        ([1, 3], set(), "hidden"),
    ],
)
def test_the_judge_refuses_anything_else(crowd, batches, acknowledged, reason):
    with pytest.raises(BrokenPromiseError, match=reason):
        crowd.judge(state_of(*batches), frozenset(acknowledged))


def test_the_judge_refuses_half_a_batch(crowd):
    state = state_of(3, 1)
    del state[3]
    with pytest.raises(BrokenPromiseError, match="whole"):
        crowd.judge(state, frozenset())
