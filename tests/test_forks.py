"""Forks: a child can neither write, nor wait for ever, nor keep the lock.

A signal handler may fork at any moment of a call, and its child may return into that
call. ``fork_at`` forks where a function of the store begins or ends, as one that Python
runs just there would.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from metastore.directory import Directory
from metastore.errors import StoreClosedError
from verbs import child, files, logs, read, run, write, write_open

# A child that begins anew

FORK = """
import os, sys, warnings
import numpy as np
from metastore import MetadataStore
from metastore.errors import StoreClosedError, StoreLockedError

warnings.simplefilter("ignore", DeprecationWarning)  # threads and fork: on purpose
store, recovered = MetadataStore.recover(sys.argv[1])
store.insert_batch([(1, (1, b"parent"))])
store.insert_batch([(2, (2, b"parent"))], sync=False)
ready, go = os.pipe()
pid = os.fork()
if pid == 0:
    try:
        one = np.ones(1, np.uint64)
        for refused in (
            lambda: store.insert_batch([(3, (3, b"child"))]),
            lambda: store.insert_batch([(3, (3, b"child"))], sync=False),
            lambda: store.insert_arrays(one, one, None, None),
            store.sync,
            store.compact,
        ):
            try:
                refused()
            except StoreClosedError as error:
                assert "fork" in str(error), error
            else:
                os._exit(10)
        try:
            MetadataStore.recover(sys.argv[1])
        except StoreLockedError as error:
            assert error.holder_pid == os.getppid(), error
        else:
            os._exit(11)
        store.shutdown()
        store.shutdown()
    except BaseException as error:
        print(repr(error), file=sys.stderr, flush=True)
        os._exit(12)
    if sys.argv[2] == "hard":
        os._exit(0)
    sys.exit(0)
_, status = os.waitpid(pid, 0)
assert os.waitstatus_to_exitcode(status) == 0, status
try:  # the child's end did not take the lock away
    MetadataStore.recover(sys.argv[1])
except StoreLockedError:
    pass
else:
    sys.exit("the lock was lost")
assert store.insert_batch([(4, (4, b"parent again"))]) == 3
store.shutdown()
"""


@pytest.mark.parametrize("way_out", ["hard", "soft"])
def test_a_forked_child_cannot_write(db, way_out):
    done = run(FORK, db, way_out)
    assert done.returncode == 0, done.stderr
    assert "Traceback" not in done.stderr
    assert read(db) == {
        1: (1, b"parent"),
        2: (2, b"parent"),
        4: (4, b"parent again"),
    }


FORK_WHILE_COMMITTING = """
import os, sys, threading, warnings
from metastore import MetadataStore
from metastore.errors import StoreClosedError

warnings.simplefilter("ignore", DeprecationWarning)
store, _ = MetadataStore.recover(sys.argv[1], log_size_bytes_min=1000)
stop = threading.Event()
counts = [0] * 3

def work(thread):
    while not stop.is_set():
        store.insert_batch([((thread << 32) + counts[thread], (1, b"parent"))])
        counts[thread] += 1

threads = [threading.Thread(target=work, args=(t,)) for t in range(3)]
for thread in threads:
    thread.start()
for _ in range(10):
    pid = os.fork()
    if pid == 0:  # locks that other threads held are never released here
        try:
            store.insert_batch([(10**9, (1, b"child"))])
        except StoreClosedError:
            store.shutdown()
            os._exit(0)
        os._exit(1)
    _, status = os.waitpid(pid, 0)
    assert status == 0, status
stop.set()
for thread in threads:
    thread.join()
store.shutdown()
print(*counts)
"""


def test_forks_while_threads_commit(db):
    """A fork catches locks in any state: the child must neither hang nor write."""
    done = run(FORK_WHILE_COMMITTING, db)
    assert done.returncode == 0, done.stderr
    counts = list(map(int, done.stdout.split()))
    found = read(db)
    assert sorted(found) == [
        (thread << 32) + i for thread in range(3) for i in range(counts[thread])
    ]


def test_a_child_that_outlives_a_killed_parent_does_not_hold_the_lock(db):
    """A worker pool may go on for long after its parent was killed."""
    process = child(
        """
        import os, sys, warnings
        from metastore import MetadataStore
        warnings.simplefilter("ignore", DeprecationWarning)
        store, _ = MetadataStore.recover(sys.argv[1])
        store.insert_batch([(1, (1, b"parent"))])
        if os.fork() == 0:
            print("forked", os.getpid(), flush=True)
            sys.stdin.read()
            os._exit(0)
        os.kill(os.getpid(), 9)
        """,
        db,
    )
    try:
        assert process.stdout.readline().startswith("forked")
        process.wait(timeout=60)
        assert read(db) == {1: (1, b"parent")}
    finally:
        process.communicate("")


FORKED_AMID_RECOVERY = """
    import os, sys, warnings
    from metastore import MetadataStore
    warnings.simplefilter("ignore", DeprecationWarning)
    children = []
    begun, begin = os.pipe()

    def fork(done, total):
        if not children:
            children.append(os.fork())
            if children[0] == 0:
                print("forked", flush=True)
                os.write(begin, b".")
                sys.stdin.read()
                os._exit(0)
            os.read(begun, 1)  # until then it has what it inherits

    store, recovered = MetadataStore.recover(sys.argv[1], progress=fork)
    assert len(recovered) == 3
    store.shutdown()
    MetadataStore.recover(sys.argv[1])[0].shutdown()
    print("recovered again", flush=True)
"""


def test_a_child_forked_amid_a_recovery_does_not_hold_the_lock(db):
    """A pool that another thread starts meanwhile kept the store from opening again."""
    write(db, [[(key, (key, b""))] for key in (1, 2, 3)])
    process = child(FORKED_AMID_RECOVERY, db)
    try:
        assert process.stdout.readline() == "forked\n"
        assert process.stdout.readline() == "recovered again\n"
    finally:
        _, errors = process.communicate("")
    assert process.returncode == 0, errors


def test_a_child_that_goes_on_with_its_parents_recovery_is_stopped(db):
    """Both would have had the lock, and have published a log of the same name."""
    write(db, [[(key, (key, b""))] for key in (1, 2, 3)])
    done = run(
        """
        import os, sys, warnings
        from metastore import MetadataStore
        warnings.simplefilter("ignore", DeprecationWarning)
        parent = os.getpid()
        children = []

        def fork(done, total):
            if not children:
                children.append(os.fork())
                if children[0]:  # the child goes on alone
                    _, status = os.waitpid(children[0], 0)
                    assert os.waitstatus_to_exitcode(status) == 7

        try:
            store, recovered = MetadataStore.recover(sys.argv[1], progress=fork)
        except OSError as error:
            os._exit(7 if os.getpid() != parent else 1)
        assert os.getpid() == parent
        store.insert_batch([(4, (4, b""))])
        store.shutdown()
        """,
        db,
    )
    assert done.returncode == 0, done.stderr
    assert read(db) == {key: (key, b"") for key in (1, 2, 3, 4)}


# A child that returns into the call

FORK_AT = """
import os, signal, sys, threading, warnings
from metastore import MetadataStore
from metastore.errors import StoreClosedError, StoreLockedError

warnings.simplefilter("ignore", DeprecationWarning)  # threads and fork: on purpose
SECONDS_MAX = 30
children = []

def watch(event, functions, act, after=0):
    "Act once, where one of some functions of the store begins ('call') or returns."
    left = [after]
    def look(frame, found, argument):
        code = frame.f_code
        if found == event and code.co_name in functions and (
            "metastore" in code.co_filename
        ):
            left[0] -= 1
            if left[0] < 0:
                sys.setprofile(None)
                act()
    sys.setprofile(look)

def fork(in_child=lambda: None, in_parent=lambda: None):
    children.append(os.fork())
    if children[0] == 0:
        signal.alarm(SECONDS_MAX)  # ends it, however it waits
        in_child()
    else:
        in_parent()

def child_ends():
    _, status = os.waitpid(children[0], 0)
    assert status == 0, status

def end_child(*calls):
    "In the child: each call must be refused."
    for call in calls:
        try:
            call()
        except StoreClosedError as error:
            assert "fork" in str(error), error
        else:
            os._exit(1)
    os._exit(0)
"""

AMID_A_ROTATION = (
    FORK_AT
    + """
path, others, function = sys.argv[1:]
opened = []

def take_descriptors():  # also that of the log, which the child has closed
    opened.extend(open(f"{others}/{n}", "xb") for n in range(8))

store, _ = MetadataStore.recover(path, log_size_bytes_min=1000)
watch("call", {function}, lambda: fork(take_descriptors, child_ends))
key = 0
while not children or key < 40:
    key += 1
    try:
        store.insert_batch([(key, (key, bytes(50)))])
    except StoreClosedError:
        break
    assert key < 1000
if children[0] == 0:
    refused = lambda: store.insert_batch([(10**9, (1, b""))])
    end_child(refused, store.sync, store.compact)
store.shutdown()
print(key)
"""
)


@pytest.mark.parametrize(
    "function",
    ["_rotate", "seal", "_take_prepared", "write", "sync", "publish", "_as_sealed"],
)
def test_a_child_that_returns_into_a_rotation_writes_nothing(db, tmp_path, function):
    """The queue kept the closed log's number, and wrote into whatever had it now."""
    others = tmp_path / "others"
    others.mkdir()
    done = run(AMID_A_ROTATION, db, others, function)
    assert done.returncode == 0, done.stderr
    assert {path.stat().st_size for path in others.iterdir()} == {0}
    assert sorted(read(db)) == list(range(1, int(done.stdout) + 1))


BESIDE_A_LEADER = (
    FORK_AT
    + """
leading, go_on = threading.Event(), threading.Event()

def lead():
    def wait():
        leading.set()
        assert go_on.wait(SECONDS_MAX)
    watch("call", {"_rotate"}, wait)
    store.compact()

def after_the_child():
    child_ends()
    go_on.set()

store, _ = MetadataStore.recover(sys.argv[1])
store.insert_batch([(1, (1, b""))])
leader = threading.Thread(target=lead)
leader.start()
assert leading.wait(SECONDS_MAX)
watch("return", {"check"}, lambda: fork(in_parent=after_the_child), after=1)
if children:
    raise AssertionError("too early")
refused = lambda: store.insert_batch([(2, (2, b""))])
try:
    refused()
except StoreClosedError:
    assert children[0] == 0
    end_child(refused, store.sync)
assert children[0]
leader.join()
store.shutdown()
"""
)


def test_a_child_that_returns_into_a_commit_does_not_wait_for_a_leader(db):
    """Whoever led was another thread, which the child does not have."""
    done = run(BESIDE_A_LEADER, db)
    assert done.returncode == 0, done.stderr
    assert read(db) == {1: (1, b""), 2: (2, b"")}


AMID_A_RECOVERY = (
    FORK_AT
    + """
path, after = sys.argv[1], int(sys.argv[2])
ready, go = os.pipe()

def wait_for_the_parent():
    os.close(go)
    os.read(ready, 1)

watch(
    "call",
    {"create", "lock", "move", "open_existing", "publish", "remove", "rename",
     "subdirectory", "sync", "write"},
    lambda: fork(wait_for_the_parent),
    after,
)
try:
    store, recovered = MetadataStore.recover(path)
except StoreClosedError as error:
    assert children[0] == 0
    assert "fork" in str(error), error
    os._exit(0)
except StoreLockedError:  # it had not opened the directory yet
    assert children[0] == 0
    os._exit(0)
sys.setprofile(None)
if children and children[0] == 0:
    print("the child has recovered", file=sys.stderr, flush=True)
    os._exit(2)
store.insert_batch([(10**6, (1, bytes(10_000)))])
os.close(go)
if children:
    child_ends()
assert store.insert_batch([(10**6 + 1, (2, b""))])
store.shutdown()
print(len(children))
"""
)


def test_a_child_that_returns_into_a_recovery_changes_nothing(tmp_path):
    """The parent went on first: the child then zeroed the log that both had created.

    A fork before each call that changes the directory, and one before it is opened,
    where the child has a directory of its own, but finds the lock taken.
    """
    before = {key: (key, b"x" * 100) for key in range(1, 6)}
    torn = tmp_path / "torn"
    write(torn, [[(key, new)] for key, new in before.items()])
    write_open(torn, [[(3, before[3])]])
    log = logs(torn)[-1]
    log.write_bytes(log.read_bytes().rstrip(b"\0")[:-7])
    image = files(torn)
    n = 0
    while True:
        path = tmp_path / str(n)
        path.mkdir()
        for name, data in image.items():
            (path / name).write_bytes(data)
        done = run(AMID_A_RECOVERY, path, n)
        assert done.returncode == 0, (n, done.stderr)
        assert read(path) == {
            **before,
            10**6: (1, bytes(10_000)),
            10**6 + 1: (2, b""),
        }, n
        kept = [file.read_bytes() for file in (path / "quarantine").iterdir()]
        assert len(kept) == 1, n
        assert len(kept[0]) > 100, n
        if done.stdout == "0\n":
            break
        n += 1
    assert n > 10


WAITING = (
    FORK_AT
    + """

compacting, heard, go_on = threading.Event(), threading.Event(), threading.Event()
main = threading.main_thread()

def is_waiting():
    code = sys._current_frames()[main.ident].f_code
    return code.co_name == "wait" and code.co_filename.endswith("gate.py")

def wait():  # in the thread of the compaction
    compacting.set()
    while not is_waiting():
        pass
    # Again, until it is heard: the interpreter puts off what comes when a thread has
    # let go of the GIL, but does not wait yet.
    while not heard.wait(0.01):
        signal.pthread_kill(main.ident, signal.SIGUSR1)
    assert go_on.wait(SECONDS_MAX)

def fork_once(*_):
    if not heard.is_set():
        heard.set()
        fork(in_parent=after_the_child)

def after_the_child():
    child_ends()
    go_on.set()

signal.signal(signal.SIGUSR1, fork_once)
threading.setprofile(
    lambda frame, event, argument: frame.f_code.co_name == "compact" and event == "call"
    and "compaction" in frame.f_code.co_filename and not compacting.is_set() and wait()
)
store, _ = MetadataStore.recover(sys.argv[1])
threading.setprofile(None)
store.insert_batch([(1, (1, b""))])
if sys.argv[2] == "shutdown":
    threading.Thread(target=store.compact).start()
    assert compacting.wait(SECONDS_MAX)
try:
    getattr(store, sys.argv[2])()
except StoreClosedError as error:
    assert "fork" in str(error), error
    assert children[0] == 0
if children[0] == 0:
    end_child(lambda: store.insert_batch([(2, (2, b""))]))
store.shutdown()
"""
)


@pytest.mark.parametrize("call", ["compact", "shutdown"])
def test_a_child_does_not_wait_for_the_compaction(db, call):
    """Its thread is the parent's."""
    done = run(WAITING, db, call)
    assert done.returncode == 0, done.stderr
    assert read(db) == {1: (1, b"")}


# What a child may do with what its parent has opened


@pytest.fixture
def directory(tmp_path: Path) -> Iterator[Directory]:
    found = Directory.open_or_create(str(tmp_path / "forked"))
    yield found
    found.close()


def test_a_child_reads_and_closes_and_no_more(directory):
    """A sync is refused too: it would take the error that its parent is to be told."""
    file = directory.create("a")
    file.write([b"parent"], 0)
    pid = os.fork()
    if pid == 0:
        status = 1
        try:
            assert bytes(file.read(0, 9)) == b"parent"
            assert bytes(directory.open("a").view()) == b"parent"
            for refused in (
                lambda: file.write([b"child"], 0),
                file.sync,
                lambda: directory.create("b"),
                lambda: directory.rename("a", "b"),
                lambda: directory.remove("a"),
                lambda: directory.subdirectory("c"),
                lambda: directory.move("a", directory, "b"),
                directory.sync,
                directory.lock,
            ):
                with pytest.raises(StoreClosedError, match="fork"):
                    refused()
            file.close()
            directory.close()
            status = 0
        finally:
            os._exit(status)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
    file.write([b"P"], 0)
    file.sync()
    assert bytes(file.read(0, 9)) == b"Parent"
    assert directory.names() == [("a", True)]
    file.close()
