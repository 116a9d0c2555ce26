"""Processes that die or meet: what was acknowledged is there, the lock holds.

METASTORE_KILL_ROUNDS
    How often the campaign (``-m slow``) kills a process (1000).
"""

from __future__ import annotations

import os
import random
import signal
import subprocess
from collections import Counter
from pathlib import Path

import pytest

from metastore import MetadataStore
from metastore.errors import StoreLockedError
from verbs import (
    State,
    child,
    content,
    files,
    logs,
    numbered,
    read,
    run,
    states,
    write,
    write_open,
)

N_ROUNDS_LONG = int(os.environ.get("METASTORE_KILL_ROUNDS", "1000"))
#: So many that a leader goes on leading while they wait.
N_THREADS = 16

# Batch i of a thread: its marker says that i + 1 batches are there, and one of a few
# keys is written or deleted. No two threads share a key.
BATCH = """
def batch(thread, i):
    key = 1000 * thread + i % 20
    new = None if i % 7 == 0 else (i + 1, b"%d of thread %d" % (i, thread) * (i % 5))
    return [(10**6 + thread, (i + 1, b"")), (key, new)]
"""
exec(BATCH)  # the children need its text, this module its function

WRITER = (
    BATCH
    + f"""
import os, sys, threading
from metastore import MetadataStore
store, recovered = MetadataStore.recover(sys.argv[1], log_size_bytes_min=1500)

def work(thread):
    found = recovered.get(10**6 + thread)
    i = found[0] if found else 0
    while True:
        sequence = store.insert_batch(batch(thread, i))
        os.write(1, b"%d %d %d\\n" % (sequence, thread, i))
        i += 1

for thread in range({N_THREADS}):
    threading.Thread(target=work, args=(thread,)).start()
"""
)


def state_after(counts: Counter[int]) -> State:
    """The content after so many batches of each thread."""
    state: State = {}
    for thread in range(N_THREADS):
        for i in range(counts[thread]):
            for key, new in batch(thread, i):  # noqa: F821 - of BATCH
                state.pop(key, None)
                if new is not None:
                    state[key] = new
    return state


def one_round(path: Path, rng: random.Random) -> int:
    """Let threads commit, kill them, check; return how much was acknowledged."""
    process = child(WRITER, path)
    wanted = rng.randrange(1, 120)
    lines = [process.stdout.readline() for _ in range(wanted)]
    process.kill()
    lines += process.stdout  # not communicate(): it loses what readline() has buffered
    _, errors = process.communicate(timeout=60)
    assert process.returncode == -signal.SIGKILL, errors
    acknowledged = [
        tuple(map(int, line.split())) for line in lines if line.endswith("\n")
    ]
    assert len(acknowledged) >= wanted, errors

    store, recovered = MetadataStore.recover(path)
    store.shutdown()
    found = content(recovered)
    counts = Counter({t: found.get(10**6 + t, (0, b""))[0] for t in range(N_THREADS)})
    assert found == state_after(counts)
    # No batch is missing before the last one, and none of the acknowledged ones.
    assert counts.total() == recovered.report.sequence
    assert max(sequence for sequence, _, _ in acknowledged) <= counts.total()
    assert all(i < counts[thread] for _, thread, i in acknowledged)
    return len(acknowledged)


def test_a_score_of_kills(db, rng):
    acknowledged = sum(one_round(db, rng) for _ in range(20))
    print(f"20 kills, {acknowledged} batches acknowledged, all of them there")


@pytest.mark.slow
@pytest.mark.timeout(0)
def test_a_thousand_kills(db, rng, campaign):
    with campaign("kills") as counts:
        for _ in range(N_ROUNDS_LONG):
            counts.update(rounds=1, acknowledged=one_round(db, rng))


# Processes that kill themselves right before a call that matters

SUICIDES = """
import itertools, os, shutil, signal, sys, traceback
from metastore import MetadataStore

origin, work, what = sys.argv[1:]

def deadly(function):
    def wrapped(*arguments, **options):
        global left
        left -= 1
        if left == 0:
            os.kill(os.getpid(), signal.SIGKILL)
        return function(*arguments, **options)
    return wrapped

for n in itertools.count(1):
    path = os.path.join(work, str(n))
    shutil.copytree(origin, path)
    pid = os.fork()
    if pid == 0:
        left = n
        for name in "pwrite pwritev fsync fdatasync rename unlink mkdir".split():
            setattr(os, name, deadly(getattr(os, name)))
        try:
            store, _ = MetadataStore.recover(path, on_damage="prefix")
            if what == "compaction":
                store.compact()
            store.shutdown()
        except BaseException:
            traceback.print_exc()
            os._exit(1)
        os._exit(0)
    _, status = os.waitpid(pid, 0)
    code = os.waitstatus_to_exitcode(status)
    if code == 0:
        break
    if code != -signal.SIGKILL:
        sys.exit(f"exit code {code} at call {n}")
"""


def torn(path: Path) -> State:
    """A snapshot, a sealed log, an open one with a torn tail; return the content."""
    write(path, numbered(3))
    with MetadataStore.recover(path)[0] as store:
        store.compact()
    write(path, numbered(3, 4))
    write_open(path, numbered(3, 7))
    log = logs(path)[-1]
    log.write_bytes(log.read_bytes().rstrip(b"\0")[:-3])
    return states(numbered(8))[-1]


def damaged(path: Path) -> State:
    """The same with damage in the sealed log."""
    torn(path)
    log = logs(path)[-2]
    data = bytearray(log.read_bytes())
    data[data.index(b"data 5")] ^= 1
    log.write_bytes(data)
    return states(numbered(4))[-1]


@pytest.mark.parametrize("what", ["recovery", "compaction"])
@pytest.mark.parametrize("prepare", [torn, damaged])
def test_a_kill_before_each_system_call(tmp_path, prepare, what):
    expected = prepare(tmp_path / "origin")
    (tmp_path / "work").mkdir()
    done = run(SUICIDES, tmp_path / "origin", tmp_path / "work", what)
    assert done.returncode == 0, done.stderr
    killed = sorted((tmp_path / "work").iterdir(), key=lambda path: int(path.name))
    assert len(killed) > 10
    for path in killed:
        if prepare is damaged:
            assert read(path, on_damage="prefix") == expected, path.name
        assert read(path) == expected, path.name
        assert write(path, numbered(1, 20)), path.name
        assert read(path)[20] == (20, b"last"), path.name
    print(f"{len(killed)} calls")


# The lock

HOLDER = """
import signal, sys
from metastore import MetadataStore
# A shell that starts something in the background lets it ignore this one.
signal.signal(signal.SIGINT, signal.default_int_handler)
store, _ = MetadataStore.recover(sys.argv[1])
store.insert_batch([(1, (1, b"durable"))])
store.insert_batch([(2, (2, b"written"))], sync=False)
# The next log's file is made in the background: who lists the files came before it.
store._engine._compactor.wait_idle()
print("holding", flush=True)
sys.stdin.read()
store.shutdown()
"""


@pytest.fixture
def holder(db):
    process = child(HOLDER, db)
    assert process.stdout.readline() == "holding\n"
    yield process
    process.kill()
    process.communicate()


def test_a_second_process_is_refused_at_once(db, holder):
    before = files(db)
    for _ in range(3):
        with pytest.raises(StoreLockedError) as caught:
            MetadataStore.recover(db)
        assert caught.value.holder_pid in (holder.pid, None)
    if os.path.exists("/proc/locks"):
        assert caught.value.holder_pid == holder.pid
        assert f"process {holder.pid}" in str(caught.value)
    assert files(db) == before
    holder.communicate("", timeout=60)
    assert holder.returncode == 0
    assert read(db) == {1: (1, b"durable"), 2: (2, b"written")}


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
def test_the_lock_goes_with_its_holder(db, holder, number):
    """Neither a stale lock nor a lost batch, also of those not synced yet."""
    holder.send_signal(number)
    holder.wait(timeout=60)
    assert holder.returncode != 0
    assert read(db) == {1: (1, b"durable"), 2: (2, b"written")}


def test_a_second_process_that_only_looks_disturbs_nobody(db, holder):
    """The commands that only read take no exclusive lock."""
    done = subprocess.run(
        [os.sys.executable, "-m", "metastore", "info", db],
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 0, done.stderr
    holder.communicate("", timeout=60)
    assert holder.returncode == 0


INTERRUPTED = """
import os, random, signal, sys, threading
from metastore import MetadataStore
from metastore.errors import StoreFailedError

class Interrupt(BaseException):
    pass

armed = False  # an interrupt between two calls would be this script's own affair

def interrupt(number, frame):
    if armed:
        raise Interrupt

def insert_interrupted(store, key, seconds):
    global armed
    try:
        armed = True
        signal.setitimer(signal.ITIMER_REAL, seconds)
        store.insert_batch([(key, (1, b""))])
    finally:
        armed = False
        signal.setitimer(signal.ITIMER_REAL, 0)

def commit_until_failed(store, keys, committed):
    try:
        for key in keys:
            store.insert_batch([(key, (1, b""))])
            committed.append(key)
            if stop.is_set():
                break
    except StoreFailedError:
        pass

signal.signal(signal.SIGALRM, interrupt)
rng = random.Random(sys.argv[2])
interrupts = 0
for number in range(60):
    path = os.path.join(sys.argv[1], str(number))
    store, _ = MetadataStore.recover(path, log_size_bytes_min=3000)
    stop = threading.Event()
    committed = []
    threads = [
        threading.Thread(
            target=commit_until_failed,
            args=(store, range(first, 2 * first), committed),
            daemon=True,
        )
        for first in (10**6, 10**8)
    ]
    for thread in threads:
        thread.start()
    for key in range(40):
        try:
            insert_interrupted(store, key, 10 ** rng.uniform(-5, -3))
            committed.append(key)
        except Interrupt:
            interrupts += 1
        except StoreFailedError:
            break
    stop.set()
    for thread in threads:
        thread.join(30)
        if thread.is_alive():
            sys.exit(f"another thread hangs, round {number}")
    try:
        store.shutdown()
    except StoreFailedError:
        pass
    print(number, *committed)
print(interrupts)
"""


def test_interrupts_at_any_moment_hang_and_lose_nothing(tmp_path, rng):
    """Ctrl-C in one thread: the others go on, or are told that the store failed."""
    done = run(INTERRUPTED, tmp_path, rng.random())
    assert done.returncode == 0, done.stderr
    *rounds, interrupts = done.stdout.splitlines()
    for line in rounds:
        number, *committed = line.split()
        assert set(map(int, committed)) <= set(read(tmp_path / number))
    print(f"{interrupts} interrupts")
    assert int(interrupts) > len(rounds) // 2
