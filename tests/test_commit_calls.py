"""The two calls of a group commit fail in the C library, below the store."""

from __future__ import annotations

import errno
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from metastore import MetadataStore

TIMEOUT_SECONDS = 60
PWRITEV, FDATASYNC = 1, 2
SHORT, NO_PROGRESS = -1, -2

SCRIPT = """
import ctypes, json, sys, threading
from metastore import MetadataStore, StoreFailedError

path, n_threads, call, at, error, forever = sys.argv[1], *map(int, sys.argv[2:])
library = ctypes.CDLL(None)
store, _ = MetadataStore.recover(path)
store.insert_batch([(0, (1, b"before"))])
store.compact()  # so that nothing goes on behind our back
returned, raised = [0], []
ready = threading.Barrier(n_threads)

def work(thread):
    ready.wait()
    for key in range(1 + thread, 1 + 40 * n_threads, n_threads):
        try:
            store.insert_batch([(key, (key, bytes(1000)))])
            returned.append(key)
        except StoreFailedError as failure:
            cause = failure.__cause__
            raised.append([cause.errno, cause.filename])

library.failing_calls_plan(call, at, error, forever)
threads = [threading.Thread(target=work, args=[n]) for n in range(n_threads)]
for thread in threads:
    thread.start()
for thread in threads:
    thread.join()
calls = [library.failing_calls_count(number) for number in (1, 2)]
library.failing_calls_plan(0, 0, 0, 0)
store.shutdown()
print(json.dumps([returned, raised, calls]))
"""


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    compiler = shutil.which("cc") or shutil.which("gcc")
    if compiler is None or sys.platform != "linux":
        pytest.skip("needs a C compiler and a loader that takes libraries beforehand")
    target = tmp_path_factory.mktemp("library") / "failing_calls.so"
    source = Path(__file__).with_name("failing_calls.c")
    command = [compiler, "-shared", "-fPIC", "-o", target, source, "-ldl"]
    subprocess.run(command, check=True)
    return target


def run_with_library(library: Path, script: str, *arguments: object) -> Any:
    """Run a script above failing calls; return what it prints."""
    preload = ":".join(filter(None, [os.environ.get("LD_PRELOAD"), str(library)]))
    done = subprocess.run(
        [sys.executable, "-c", script, *map(str, arguments)],
        env={**os.environ, "LD_PRELOAD": preload},
        capture_output=True,
        text=True,
        timeout=TIMEOUT_SECONDS,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def run_with_failure(
    library: Path, path: Path, n_threads: int, *plan: int
) -> tuple[list[int], list[list[Any]], list[int]]:
    """Return keys whose call returned, causes of those that raised, and calls."""
    returned, raised, calls = run_with_library(library, SCRIPT, path, n_threads, *plan)
    return returned, raised, calls


def recovered_keys(path: Path) -> set[int]:
    store, recovered = MetadataStore.recover(path)
    store.shutdown()
    assert not recovered.report.damage
    for key, value, data in recovered:
        assert (value, bytes(data)) == ((key, bytes(1000)) if key else (1, b"before"))
    return set(recovered.keys.tolist())


@pytest.mark.parametrize("n_threads", [1, 8])
@pytest.mark.parametrize(
    ("call", "error"),
    [(PWRITEV, SHORT), (PWRITEV, errno.EINTR), (FDATASYNC, errno.EINTR)],
)
def test_what_can_be_gone_on_with(library, tmp_path, n_threads, call, error):
    for at in (1, 3):
        path = tmp_path / str(at)
        returned, raised, _ = run_with_failure(
            library, path, n_threads, call, at, error, 0
        )
        assert raised == []
        assert set(returned) == set(range(1 + 40 * n_threads)) == recovered_keys(path)


@pytest.mark.parametrize("n_threads", [1, 8])
@pytest.mark.parametrize("forever", [0, 1])
@pytest.mark.parametrize(
    ("call", "error"),
    [
        (PWRITEV, errno.EIO),
        (PWRITEV, errno.ENOSPC),
        (PWRITEV, NO_PROGRESS),
        (FDATASYNC, errno.EIO),
        (FDATASYNC, errno.ENOSPC),
    ],
)
def test_a_failed_call_sticks(library, tmp_path, n_threads, forever, call, error):
    for at in (1, 3):
        path = tmp_path / str(at)
        returned, raised, calls = run_with_failure(
            library, path, n_threads, call, at, error, forever
        )
        number = errno.EIO if error == NO_PROGRESS else error
        log = str(path / f"log_{2:016x}")
        assert raised == [[number, log]] * (1 + 40 * n_threads - len(returned))
        # None was tried again, and nothing after it.
        assert calls == ([at, at - 1] if call == PWRITEV else [at, at])
        found = recovered_keys(path)
        assert set(returned) <= found
        assert len(found - set(returned)) <= n_threads


IN_GERMAN = """
import ctypes, errno, json, sys
from metastore import MetadataStore, StoreFailedError

library = ctypes.CDLL(None)
store, _ = MetadataStore.recover(sys.argv[1])
store.insert_batch([(0, (1, b"before"))])
store.compact()  # so that nothing goes on behind our back
causes = []
library.failing_calls_plan(2, 1, errno.ENOSPC, 1)
library.failing_calls_in_german(1)
for key in (1, 2):
    try:
        store.insert_batch([(key, (key, bytes(1000)))])
    except StoreFailedError as failure:
        causes.append(failure.__cause__.errno)
library.failing_calls_in_german(0)
library.failing_calls_plan(0, 0, 0, 0)
failure = store.stats().failure
store.shutdown()
print(json.dumps([causes, failure]))
"""


def test_a_failure_that_the_system_words_in_another_encoding(library, tmp_path):
    """Taken for UTF-8, they had the store raise UnicodeDecodeError ever after."""
    causes, failure = run_with_library(library, IN_GERMAN, tmp_path / "db")
    assert causes == [errno.ENOSPC] * 2
    assert "kein Speicherplatz" in failure


LARGE = """
import ctypes, json, sys
import numpy as np
from metastore import MetadataStore, StoreFailedError

path, sync, call, at, error = sys.argv[1], *map(int, sys.argv[2:])
library = ctypes.CDLL(None)
store, _ = MetadataStore.recover(path, log_size_bytes_min=1 << 40)
keys = np.arange(200_000, dtype=np.uint64)
returned = []
library.failing_calls_plan(call, at, error, 0)
for number in range(1, 4):
    try:
        rng = np.random.default_rng(number)
        values = rng.integers(1, 1 << 63, len(keys), np.uint64)
        store.insert_arrays(keys, values, sync=bool(sync))
        returned.append(number)
    except StoreFailedError:
        pass
calls = [library.failing_calls_count(number) for number in (1, 2)]
library.failing_calls_plan(0, 0, 0, 0)
store.shutdown()
print(json.dumps([returned, calls]))
"""


@pytest.mark.parametrize("sync", [0, 1])
@pytest.mark.parametrize(
    ("call", "at", "error"),
    [
        (PWRITEV, 0, 0),
        (PWRITEV, 2, SHORT),
        (PWRITEV, 2, errno.EINTR),
        (PWRITEV, 2, errno.ENOSPC),
        (PWRITEV, 6, errno.EIO),
        (FDATASYNC, 2, errno.EIO),
    ],
)
def test_a_batch_that_is_written_in_pieces(library, tmp_path, sync, call, at, error):
    """Whatever becomes of a piece, the batch is whole or absent."""
    path = tmp_path / "db"
    returned, calls = run_with_library(library, LARGE, path, sync, call, at, error)
    fails = error > 0 and error != errno.EINTR
    if not fails or (not sync and (call == FDATASYNC or at > 3)):
        assert returned == [1, 2, 3]
    else:
        assert len(returned) < 3
        assert calls[call - 1] == at
    if at == 0:
        assert calls[0] > 6 if sync else calls[0] == 3
    store, recovered = MetadataStore.recover(path)
    store.shutdown()
    last = recovered.report.sequence
    assert returned[-1:] in ([], [last]) or returned[-1] + 1 == last
    if last:
        assert np.array_equal(recovered.keys, np.arange(200_000, dtype=np.uint64))
        rng = np.random.default_rng(last)
        expected = rng.integers(1, 1 << 63, len(recovered), np.uint64)
        assert np.array_equal(recovered.values, expected)


# A failed call and a signal at once

INTERRUPTED = """
import ctypes, errno, json, os, signal, sys
from metastore import MetadataStore, StoreFailedError

signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell may have ignored it
path, where, call = sys.argv[1], sys.argv[2], int(sys.argv[3])
library = ctypes.CDLL(None)
store, _ = MetadataStore.recover(path)
store.insert_batch([(0, (1, b"before"))])
store.compact()  # so that nothing goes on behind our back
returned, raised = [0], []
key = 1

def commit(sync=True):
    global key
    try:
        store.insert_batch([(key, (key, bytes(1000)))], sync=sync)
        returned.append(key)
    except (KeyboardInterrupt, StoreFailedError) as error:
        cause = error.__cause__
        raised.append([type(error).__name__, cause and cause.errno])
    key += 1

at = 1
if where == "seal":
    while store.stats().log_size < (1 << 16) - 1000:
        commit()
    at = 2  # behind those of the batch that makes the rotation due
library.failing_calls_plan(call, at, errno.EIO, 0)
library.failing_calls_interrupt(1)
commit()
failed = [library.failing_calls_count(number) for number in (1, 2)]
for _ in range(3):
    commit()
commit(sync=False)
for end in (store.sync, store.shutdown):
    try:
        end()
    except StoreFailedError as error:
        raised.append([type(error).__name__, error.__cause__.errno])
    else:
        raised.append(None)
calls = [library.failing_calls_count(number) for number in (1, 2)]
print(json.dumps([returned, raised, failed, calls]), flush=True)
os._exit(0)
"""


@pytest.mark.parametrize("where", ["commit", "seal"])
@pytest.mark.parametrize("call", [PWRITEV, FDATASYNC])
def test_a_signal_beside_a_failure_hides_nothing(library, tmp_path, where, call):
    """Ctrl-C while a disk stalls, which then fails: batches were acknowledged and lost.

    The handler ran before the failure was kept. The next sync succeeded without what
    the failed one had lost; and behind an end frame whose sync had failed the log was
    gone on with, where nobody reads.
    """
    path = tmp_path / "db"
    returned, raised, failed, calls = run_with_library(
        library, INTERRUPTED, path, where, call
    )
    assert raised[0] == ["KeyboardInterrupt", None]
    assert raised[1:5] == [["StoreFailedError", errno.EIO]] * 4
    assert raised[5][1] == errno.EIO
    assert raised[6] is None or raised[6][1] == errno.EIO
    assert calls == failed  # nothing was tried again
    found = recovered_keys(path)
    assert set(returned) <= found
    assert len(found - set(returned)) <= 1
