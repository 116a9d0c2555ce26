"""``metastore demo``: real files go in, the process is killed, and all comes back.

A child process (:mod:`metastore.demo_worker`) copies a tree of files into a heap and
keeps their places in a store. This module kills it, recovers what it left behind and
compares every file with its source, byte for byte.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import random
import shutil
import signal
import subprocess
import sys
import sysconfig
import tempfile
import time
from collections.abc import Iterator

from metastore.columns import Recovered
from metastore.demo_files import (
    STORE,
    DemoError,
    Heap,
    Manifest,
    Source,
    UnreadableError,
    difference,
    file_key,
    shown,
    unpack_user_data,
    walk,
)
from metastore.directory import Directory
from metastore.progress import Progress
from metastore.report import RecoveryReport, StoreStats
from metastore.store import MetadataStore

__all__ = ["Demo", "default_tree", "play", "run"]

#: Files in a batch, at most; fewer in a small tree, so that a kill finds work undone.
BATCH_FILES_MAX = 64
BATCHES_TARGET = 256

#: Every so-manieth file is deleted.
DELETE_STEP = 10
DELETE_BATCH_RECORDS = 1000


def default_tree() -> str:
    """Return the directory of this Python's standard library."""
    return sysconfig.get_path("stdlib")


@dataclasses.dataclass(frozen=True)
class Recovery:
    """One recovery of the demo, for the table."""

    when: str
    report: RecoveryReport
    stats: StoreStats
    #: Files whose batch was durable, but not acknowledged yet when the child died.
    n_files_unacknowledged: int


class Demo:
    """The state of a demo: what the child was told to keep, and what came back.

    Parameters
    ----------
    manifest : Manifest
        The files.
    directory : str
        An empty directory for heap and store.
    threads : int
        How many threads of the child commit.
    """

    def __init__(self, manifest: Manifest, directory: str, threads: int) -> None:
        self.manifest = manifest
        self.directory = directory
        self.threads = threads
        #: Lines about everything that is not as it must be.
        self.differences: list[str] = []
        self.recoveries: list[Recovery] = []
        #: Files by number: those that must be there, those that were deleted since,
        #: those that the child could not read, those that changed after the walk.
        self.acknowledged: set[int] = set()
        self.deleted: set[int] = set()
        self.unreadable: set[int] = set()
        self.changed: set[int] = set()
        self.n_batches = 0
        self.n_kills = 0
        self.n_files_compared = 0
        self.n_bytes_compared = 0
        self.load_seconds = 0.0
        self.heap_size = 0
        self._store_path = os.path.join(directory, STORE)
        n_files = len(manifest.paths)
        self.batch_files = max(1, min(BATCH_FILES_MAX, n_files // BATCHES_TARGET))
        manifest.write(directory)

    def n_batches_left(self) -> int:
        """Return how many batches a new child would commit."""
        n_files = len(self.manifest.paths) - len(self.acknowledged)
        return -(-n_files // self.batch_files)

    def load(self, kill_after_batches: int | None = None) -> None:
        """Let a child store what is missing; kill it after so many batches, if any.

        Raises
        ------
        DemoError
            If the child fails by itself; it has said why.
        """
        command = [sys.executable, "-m", "metastore.demo_worker", self.directory]
        command += [os.fsdecode(self.manifest.tree)]
        command += [str(self.threads), str(self.batch_files)]
        with subprocess.Popen(command, stdout=subprocess.PIPE) as child:
            try:
                self._listen(child, kill_after_batches)
            except BaseException:
                child.kill()
                raise
        if child.returncode == -signal.SIGKILL and kill_after_batches is not None:
            self.n_kills += 1
        elif child.returncode != 0:
            raise DemoError(f"the child ended with status {child.returncode}")
        else:  # it says that nothing is missing: hold it to its word
            self.acknowledged = set(range(len(self.manifest.paths))) - self.unreadable

    def _listen(
        self, child: subprocess.Popen[bytes], kill_after_batches: int | None
    ) -> None:
        assert child.stdout is not None
        n_batches = 0
        started = acknowledged = time.perf_counter()
        with self._progress("storing", len(self.acknowledged)) as progress:
            # Lines that were in the pipe when the child died count like all others.
            for line in child.stdout:
                word, *numbers = line.decode("ascii").split()
                files = set(map(int, numbers))
                if word == "ready":
                    started = time.perf_counter()
                elif word == "skip":
                    self.unreadable |= files
                elif word == "batch":
                    acknowledged = time.perf_counter()
                    self.acknowledged |= files
                    self.unreadable -= files
                    n_batches += 1
                    progress.advance(len(files))
                    if n_batches == kill_after_batches:
                        child.kill()
        self.n_batches += n_batches
        self.load_seconds += max(0.0, acknowledged - started)

    def check(self, when: str) -> None:
        """Recover, and compare every file that the store knows with its source."""
        store, recovered = MetadataStore.recover(self._store_path)
        with store, contextlib.closing(Heap(self.directory)) as heap:
            seen = self._compare(recovered, heap)
            stats = store.stats()
            self.heap_size = heap.size()
        for number in sorted(self.acknowledged - self.deleted - seen):
            self._differ(number, "was acknowledged, and is gone")
        n_unacknowledged = len(seen - self.acknowledged)
        self.recoveries.append(
            Recovery(when, recovered.report, stats, n_unacknowledged)
        )
        # What was recovered once is durable, acknowledged or not.
        self.acknowledged |= seen

    def _compare(self, recovered: Recovered, heap: Heap) -> set[int]:
        """Compare all that was recovered; return the numbers of the files."""
        seen = set()
        with self._progress("comparing", 0, total=len(recovered)) as progress:
            for key, value, user_data in recovered:
                progress.advance()
                number = self.manifest.numbers.get(key)
                if number is None:
                    self.differences.append(f"key {key:#018x} belongs to no file")
                    continue
                seen.add(number)
                if number in self.deleted:
                    self._differ(number, "was deleted, and is there again")
                    continue
                try:
                    length, path = unpack_user_data(user_data)
                except ValueError as error:
                    self._differ(number, str(error))
                    continue
                if path != self.manifest.paths[number]:
                    self._differ(number, f"is stored under the name {shown(path)}")
                    continue
                self._compare_file(number, heap, value - 1, length)
        return seen

    def _compare_file(self, number: int, heap: Heap, offset: int, length: int) -> None:
        path = os.path.join(self.manifest.tree, self.manifest.paths[number])
        try:
            with Source(path) as source:
                position = difference(source, heap, offset, length)
                # Looked at last, so that a change during the comparison counts too.
                fingerprint = source.fingerprint()
        except UnreadableError:
            self.changed.add(number)
            return
        if position is None:
            self.n_files_compared += 1
            self.n_bytes_compared += length
        elif fingerprint != self.manifest.fingerprints[number]:
            self.changed.add(number)
        else:
            self._differ(
                number,
                f"differs from byte {position} on, which lies at offset "
                f"{offset + position} of the heap",
            )

    def delete_some(self) -> None:
        """Delete every tenth file from the store, and compact it."""
        numbers = sorted(self.acknowledged)[::DELETE_STEP]
        store, _ = MetadataStore.recover(self._store_path)
        with store:
            for start in range(0, len(numbers), DELETE_BATCH_RECORDS):
                some = numbers[start : start + DELETE_BATCH_RECORDS]
                paths = [self.manifest.paths[number] for number in some]
                store.insert_batch([(file_key(path), None) for path in paths])
                self.deleted.update(some)
            store.compact()

    def _differ(self, number: int, what: str) -> None:
        self.differences.append(f"{shown(self.manifest.paths[number])} {what}")

    def _progress(self, label: str, done: int, total: int | None = None) -> Progress:
        progress = Progress(label, len(self.manifest.paths) if total is None else total)
        progress.advance(done)
        return progress


@contextlib.contextmanager
def working_directory(directory: str | None, keep: bool) -> Iterator[str]:
    """Give `directory`, which must be empty, or a temporary one; `keep` spares it."""
    if directory is not None:
        Directory.open_or_create(directory).close()
        if os.listdir(directory):
            raise DemoError(f"give the demo a new or empty directory ({directory})")
        yield directory
        return
    directory = tempfile.mkdtemp(prefix="metastore-demo-")
    try:
        yield directory
    finally:
        if not keep:
            shutil.rmtree(directory)


def play(demo: Demo, kills: int, seed: int) -> None:
    """Store, kill, recover and compare; go on; delete, compact and compare again."""
    chance = random.Random(seed)
    for kill in range(1, kills + 1):
        n_batches = demo.n_batches_left()
        if n_batches == 0:
            break
        # On average the kills divide what is left evenly; the last batch is spared.
        latest = max(1, min(n_batches - 1, 2 * n_batches // (kills - kill + 2)))
        demo.load(kill_after_batches=chance.randint(1, latest))
        demo.check(f"after kill {kill}")
    demo.load()
    demo.delete_some()
    demo.check("at the end")


def counted(n: int, noun: str) -> str:
    """Return a count with its noun, which takes an s as its plural."""
    return f"{n:,} {noun}" if n == 1 else f"{n:,} {noun}s"


def table(demo: Demo) -> list[str]:
    """Return the lines that say what the demo did and found."""
    manifest = demo.manifest
    n_bytes = sum(size for size, _ in manifest.fingerprints)
    commits_per_second = demo.n_batches / max(demo.load_seconds, 1e-9)
    stats = demo.recoveries[-1].stats
    log_size = stats.log_size + stats.logs_sealed_size
    rows = [
        ("tree", shown(manifest.tree)),
        ("files", f"{len(manifest.paths):,} with {n_bytes:,} bytes"),
        (
            "skipped",
            f"{len(demo.unreadable):,} unreadable, {len(demo.changed):,} changed "
            f"meanwhile, {manifest.n_special:,} links and such, "
            f"{manifest.n_directories_unreadable:,} closed directories",
        ),
        (
            "batches",
            f"{demo.n_batches:,} acknowledged, of {counted(demo.batch_files, 'file')} "
            f"each, from {counted(demo.threads, 'thread')}: "
            f"{commits_per_second:,.0f} commits/s, reading and heap syncs included",
        ),
        ("killed", f"{counted(demo.n_kills, 'time')} with SIGKILL"),
    ]
    rows += [row for recovery in demo.recoveries for row in _recovery_rows(recovery)]
    rows += [
        ("deleted", f"{counted(len(demo.deleted), 'file')}, then compacted"),
        (
            "compared",
            f"{counted(demo.n_files_compared, 'time')} a file with its source, "
            f"{demo.n_bytes_compared:,} bytes: "
            f"{counted(len(demo.differences), 'difference')}",
        ),
        ("snapshot", f"{stats.snapshot_size:,} bytes"),
        ("logs", f"{log_size:,} bytes"),
        ("heap", f"{demo.heap_size:,} bytes"),
    ]
    return [f"{label:<10}{text}" for label, text in rows]


def _recovery_rows(recovery: Recovery) -> list[tuple[str, str]]:
    report = recovery.report
    records_per_second = report.n_records / max(report.seconds, 1e-9)
    text = (
        f"{recovery.when}: {counted(report.n_records, 'record')} in "
        f"{report.seconds:.3f} s, {records_per_second:,.0f} records/s"
    )
    if recovery.n_files_unacknowledged:
        text += f"; {recovery.n_files_unacknowledged:,} were not acknowledged yet"
    torn = f"{recovery.when}: {report.bytes_dropped:,} bytes dropped"
    if report.quarantined:
        torn += f", kept as {', '.join(report.quarantined)}"
    return [("recovered", text), ("torn", torn)]


def run(
    tree: str | None = None,
    *,
    directory: str | None = None,
    threads: int = 8,
    kills: int = 1,
    keep: bool = False,
    seed: int | None = None,
) -> int:
    """Run the demo and print its table.

    Parameters
    ----------
    tree : str, optional
        The directory whose files are stored; default is Python's standard library.
    directory : str, optional
        A new or empty directory to work in; it is kept. Default is a temporary one.
    threads : int
        How many threads commit.
    kills : int
        How many times the storing process is killed.
    keep : bool
        Keep the temporary directory.
    seed : int, optional
        Chooses the moments of the kills; default is a new one each time.

    Returns
    -------
    int
        0 if every byte came back, else 1.

    Raises
    ------
    DemoError
        If the demo cannot run.
    """
    manifest = walk(default_tree() if tree is None else tree)
    if not manifest.paths:
        raise DemoError(f"no regular file to store ({shown(manifest.tree)})")
    if seed is None:
        seed = random.SystemRandom().randrange(1 << 32)
    with working_directory(directory, keep) as path:
        # First of all, so that a run that ends badly can be had again.
        print(f"seed {seed}, in {shown(os.fsencode(path))}", flush=True)
        demo = Demo(manifest, path, threads)
        try:
            play(demo, kills, seed)
        finally:
            for line in demo.differences:
                print(f"metastore: difference: {line}", file=sys.stderr)
        for line in table(demo):
            print(line)
        return 1 if demo.differences else 0
