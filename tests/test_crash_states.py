"""Every crash of every short history of the real store, and what its recovery says.

A small share runs always, and always the same one. The campaign (``-m slow``) takes its
size from the environment:

METASTORE_CRASH_LENGTH
    Operations of a history at most; every history is crashed (4).
METASTORE_CRASH_SHARE
    The share of the states whose recovery is crashed, too; and a quarter of that of the
    states that this leaves once more (0.028: some 250,000 distinct states in all).
METASTORE_CRASH_SECONDS
    Begin no history after so many seconds (no limit).
METASTORE_TEST_SEED
    Picks the samples.

What breaks the promise is printed with the command that makes the state again.
"""

from __future__ import annotations

import dataclasses
import os
import time

import pytest

import oracle
from disk import Disk
from explorer import Effort, Explorer, check, show
from histories import BrokenPromiseError, Recover, histories, left
from metastore import MetadataStore
from metastore.directory import QUARANTINE
from metastore.format import FRAME_HEADER_SIZE
from simulated import SimulatedDirectory
from small_store import recover_small, repeatable
from verbs import State, content

LENGTH = int(os.environ.get("METASTORE_CRASH_LENGTH", "4"))
SHARE = float(os.environ.get("METASTORE_CRASH_SHARE", "0.028"))
SECONDS = float(os.environ.get("METASTORE_CRASH_SECONDS", "inf"))
IS_WHOLE = not any(name.startswith("METASTORE_CRASH_") for name in os.environ)
DISTINCT_MIN = 200_000


@pytest.fixture(autouse=True)
def _repeatable():
    with repeatable():
        yield


def test_every_crash_of_histories_of_two_operations(capsys):
    explorer = Explorer(recover_small)
    for length in range(3):
        for operations in histories(length):
            explorer.explore(operations)
    with capsys.disabled():
        print(f"\ncrashes: {explorer.counts}")
    explorer.assert_nothing_found()
    assert explorer.counts.distinct > 1000


@pytest.mark.parametrize(
    "operations",
    [
        ("unsynced", "batch"),
        ("batch", "rotate"),
        ("delete", "compact"),
        ("unsynced", "reopen"),
    ],
    ids="-".join,
)
def test_crashes_of_recoveries_and_of_their_recoveries(operations, capsys):
    efforts = (
        Effort(states_max=2, share=0.06),
        Effort(states_max=2, share=0.06),
        Effort(states_max=2),
    )
    explorer = Explorer(recover_small, efforts)
    explorer.explore(operations)
    with capsys.disabled():
        print(f"\n{'-'.join(operations)}, and again: {explorer.counts}")
    explorer.assert_nothing_found()


@pytest.mark.parametrize(("log", "batch"), [(0, 0), (0, 1), (1, 0), (1, 1), (2, 1)])
def test_crashes_of_a_recovery_that_sets_damage_aside(log, batch, capsys):
    """With ``on_damage="prefix"``: the same prefix every time, and no byte is lost.

    Once that has returned, the store is whole again, and opens without it.
    """
    two, again = ("delete", "delete"), ("shutdown", "reopen")
    history = left(recover_small, *two, *again, *two, *again, *two, "shutdown")
    image, trace = history.disk.durable_image(), history.trace
    trace.acknowledged = 2 * log + batch
    del trace.states[trace.acknowledged + 1 :]
    names = [name for name in sorted(image) if name.startswith("log")]
    offset = oracle.frame_offsets(image[names[log]])[batch] + FRAME_HEADER_SIZE
    image[names[log]] = oracle.flip_bit(image[names[log]], offset)
    set_aside = [image[name] for name in names[log:]]

    settled: set[Disk] = set()

    def recover_prefix(directory: SimulatedDirectory) -> tuple[MetadataStore, State]:
        on_damage = "raise" if directory._disk in settled else "prefix"
        store, recovered = MetadataStore._recover_in(
            directory, inline=True, threads=1, on_damage=on_damage
        )
        settled.add(directory._disk)
        kept = directory._disk.live_image()[QUARANTINE].values()
        if not set(set_aside) <= set(kept):
            raise BrokenPromiseError("bytes that were set aside are not kept")
        return store, content(recovered)

    explorer = Explorer(recover_prefix, (Effort(share=0.02), Effort(states_max=2)))
    crashes = check(recover_prefix, Disk(image), trace, record=True)
    explorer.crash(crashes, "damage")
    with capsys.disabled():
        print(f"\ndamage in batch {batch} of log {log}: {explorer.counts}")
    explorer.assert_nothing_found()


@pytest.mark.slow
@pytest.mark.timeout(0)
def test_campaign(rng, capsys, campaign):
    efforts = (
        Effort(exhaustive_max=256, samples=16, share=SHARE),
        Effort(exhaustive_max=16, samples=4, states_max=8, share=SHARE / 4),
        Effort(exhaustive_max=16, samples=4, states_max=4),
    )
    explorer = Explorer(recover_small, efforts, seed=rng.randrange(1 << 30))
    started = time.monotonic()
    with campaign("crash states") as counts:
        for length in range(LENGTH + 1):
            for operations in histories(length):
                if time.monotonic() - started < SECONDS and not explorer.done:
                    explorer.explore(operations)
            with capsys.disabled():
                print(f"\ncrashes up to length {length}: {explorer.counts}")
        counts.update(dataclasses.asdict(explorer.counts))
        counts["violations"] = len(explorer.findings)
        explorer.assert_nothing_found()
        assert explorer.counts.distinct >= DISTINCT_MIN or not IS_WHOLE


def test_a_state_is_made_again_and_told_about(capsys):
    assert show(recover_small, "batch,unsynced/14:any:1/9:kill") == 0
    told = capsys.readouterr().out
    assert "before call 9: Operation(kind=" in told
    assert "acknowledged 1, issued" in told
    assert "recovered, as promised" in told


def test_a_state_that_breaks_the_promise_is_told_about(capsys):
    def forgetful(directory: object) -> tuple[object, dict[int, object]]:
        store, state = recover_small(directory)
        return store, state if 9 not in state else {}

    recover: Recover = forgetful
    explorer = Explorer(recover, findings_max=1)
    explorer.explore(("rotate",))
    (finding,) = explorer.findings
    assert str(finding).count("\n") == 1
    path = str(finding).split()[-1]
    assert show(recover, path) == 1
    out, error = capsys.readouterr()
    assert "log_" in out
    assert "BrokenPromiseError: " in error
