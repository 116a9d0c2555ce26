"""Every call of every scripted history fails: once, and from then on."""

from __future__ import annotations

import pytest

from disk import Disk
from fault_runs import SCRIPTS, failing_runs
from faults import WatchfulDirectory
from small_store import recover_small, repeatable


@pytest.fixture(autouse=True)
def _repeatable():
    with repeatable():
        yield


@pytest.mark.parametrize("name", SCRIPTS)
def test_every_call_fails(name, capsys):
    n_runs = 0
    seen: set[object] = set()
    for run in failing_runs(recover_small, SCRIPTS[name], seen):
        run()
        n_runs += 1
    with capsys.disabled():
        print(
            f"\n{name}: {n_runs} failed calls, {len(seen)} distinct states after them"
        )


def test_the_watchful_directory_notices_what_is_destroyed_unread():
    log, snapshot = f"log_{1:016x}", f"snapshot_{1:016x}"
    image = {log: b"1" * 100, snapshot: b"2" * 100, "other": b"3", f"{log}.tmp": b"4"}

    def opened() -> WatchfulDirectory:
        return WatchfulDirectory(Disk(image))

    directory = opened()
    directory.remove("other")
    directory.remove(f"{log}.tmp")
    assert directory.destroyed == []
    directory.remove(log)
    assert directory.destroyed == [log]

    directory = opened()
    file = directory.open(log)
    file.read(0, 50)
    directory.remove(snapshot)
    directory.rename("other", log)
    assert directory.destroyed == [snapshot, log]

    directory = opened()
    file = directory.open(log)
    file.read(40, 60)
    file.read(0, 50)
    directory.remove(log)
    directory.create(log)
    directory.remove(log)
    assert directory.destroyed == []

    directory = opened()
    directory.open(snapshot).view()
    directory.remove(log)
    assert directory.destroyed == []
