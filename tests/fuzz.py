"""Structure-aware fuzzing: hostile stores, recovered and compared with the oracle.

``python tests/fuzz.py --seconds N --seed S`` generates forged stores (``hostile``) and
recovers each: contents and last sequence must be those that ``oracle`` reads, or both
refuse; the only errors are CorruptionError and FormatVersionError; a refusal changes no
file; ``on_damage="prefix"`` always opens; memory stays within section 6 of
docs/format.md. Some cases are recovered from real files, which are mapped, and some
feed the kernels directly. ``--case N`` runs one case again, ``--replay DIR`` a store
that was saved.

The dice are a plain generator's; ``fuzz_guided`` lets a coverage-guided engine roll
them. The sanitizer build, under which `make stress` runs this, sees what goes wrong in
memory.
"""

from __future__ import annotations

import argparse
import collections
import contextlib
import itertools
import logging
import random
import re
import resource
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Iterator
from pathlib import Path

import numpy as np

import kernel_cases
import oracle
from disk import Disk, Image
from hostile import Files, hostile_store
from metastore import MetadataStore, Recovered, _codec
from metastore.errors import CorruptionError, FormatVersionError
from verbs import Batch, State, apply, content, put, recover_on

NEXT: Batch = [(9, (99, b"next")), (10, None)]
#: What a recovery may take beyond what its frames unpack to: code, contexts, threads.
MEMORY_SLACK = 96 << 20
#: Copies of the records that are alive at once: decoded, sorted, merged, in a test.
MEMORY_COPIES = 6
REAL_EVERY = 40
KERNELS_EVERY = 10
FINDINGS_MAX = 1000
#: Findings that look the same are told and saved this often.
ALIKE_MAX = 3

#: What is done with a store that opened, before the oracle reads it again.
THEN = ("write", "compact", "nothing")

Wanted = tuple[State, int] | None


class ViolationError(Exception):
    """Something that must not happen."""


def require(condition: object, what: str) -> None:
    if not condition:
        raise ViolationError(what)


# ---- what the oracle says ----


def another_version(files: Files) -> bool:
    """Tell whether a file is of another version, which comes before all else."""
    for name, data in files.items():
        parsed = oracle.parse_name(name)
        if parsed is None:
            continue
        try:
            oracle.read_file_header(data, *parsed)
        except oracle.OracleVersionError:
            return True
        except oracle.OracleError:
            continue
    return False


def wanted_of(files: Files) -> Wanted:
    """Return what must be recovered; None where that must be refused."""
    try:
        return oracle.read_store(files)
    except oracle.OracleError:
        return None


def memory_bound(files: Files) -> int:
    """Return how many bytes a recovery of these files may take (section 6)."""
    bound = MEMORY_SLACK
    for name, data in files.items():
        bound += 8 * len(data)
        if oracle.parse_name(name) is None or len(data) < oracle.FILE_HEADER.size:
            continue
        seed = oracle.file_seed(data)
        for offset in range(oracle.FILE_HEADER.size, len(data) - 47, 8):
            stored = int.from_bytes(data[offset : offset + 4], "little")
            if stored != oracle.checksum(data[offset + 4 : offset + 48], seed):
                continue
            size = oracle.get_field(data, offset, "payload_size")
            if size <= len(data):
                limit = oracle.PACKED_RATIO_MAX * size
                bound += MEMORY_COPIES * min(oracle.PACKED_SIZE_MAX, limit)
    return bound


# ---- memory of this process ----


def reset_peak() -> None:
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")


def memory(field: str) -> int:
    """Return a line of Linux's account of this process in bytes; 0 elsewhere."""
    try:
        found = re.search(rf"{field}:\s+(\d+)", Path("/proc/self/status").read_text())
    except OSError:
        return 0
    return int(found[1]) << 10 if found else 0


@contextlib.contextmanager
def bounded_memory(files: Files) -> Iterator[None]:
    reset_peak()
    before = memory("VmRSS")
    yield
    grown = memory("VmHWM") - before
    if grown > MEMORY_SLACK:
        bound = memory_bound(files)
        require(grown <= bound, f"{grown >> 20} MiB of memory, bound {bound >> 20} MiB")


# ---- one case ----


def check_store(files: Files, threads: int, then: str) -> str:
    """Recover on the disk in memory, and compare; return what it was."""
    version = another_version(files)
    wanted = wanted_of(files)
    disk = Disk(dict(files))
    try:
        with bounded_memory(files):
            store, recovered = recover_on(disk, threads=threads)
    except FormatVersionError:
        require(version, "FormatVersionError, but the oracle sees version 1")
        check_untouched(files, disk)
        return "another version"
    except CorruptionError as error:
        require(not version, "CorruptionError before FormatVersionError")
        check_untouched(files, disk)
        if wanted is not None:
            require(is_used_up(error, files), f"refused: {error}")
            return "used up"
        check_place(error, files)
        check_prefix(files, threads)
        return "refused"
    require(not version, "opened, but a file is of another version")
    check_opened(disk, store, recovered, wanted, then)
    return "opened"


def is_used_up(error: CorruptionError, files: Files) -> bool:
    """Tell whether the refusal is that nothing further can be numbered, rightly."""
    return "used up" in error.reason and is_near_the_end(files)


def is_near_the_end(files: Files) -> bool:
    """Tell whether a few more files or batches would have no number any more."""
    for name, data in files.items():
        parsed = oracle.parse_name(name)
        if parsed is None:
            continue
        if parsed[1] > oracle.NUMBER_MAX - 8:
            return True
        sequence = int.from_bytes(data[40:48], "little")
        if sequence > oracle.SEQUENCE_MAX - 100:
            return True
    return False


def check_untouched(files: Files, disk: Disk) -> None:
    left = {name: data for name, data in only_files(disk).items() if name in files}
    require(left == files, "a refusal changed files")
    require(disk.opened == [], f"left open: {disk.opened}")


def check_place(error: CorruptionError, files: Files) -> None:
    name = error.path.rpartition("/")[2]
    require(name in files or error.path == "simulated", f"no such file: {error.path}")
    size = len(files.get(name, b""))
    require(0 <= error.offset <= size, f"offset {error.offset} of {size} bytes")


def check_opened(
    disk: Disk, store: MetadataStore, recovered: Recovered, wanted: Wanted, then: str
) -> None:
    """Check what was recovered, go on, and let the oracle read it all."""
    sequence = recovered.report.sequence
    try:
        found = content(recovered)
        require(wanted is not None, "opened, but the oracle refuses")
        require((found, sequence) == wanted, "not what the oracle reads")
        if sequence > oracle.U64_MAX - 8:
            then = "nothing"
        if then != "nothing":
            sequence += 1
            require(store.insert_batch(NEXT) == sequence, "the next sequence is wrong")
            found = apply(found, NEXT)
        if then == "compact":
            store.compact()
    finally:
        store.shutdown()
    require(disk.opened == [], f"left open: {disk.opened}")
    try:
        after = oracle.read_store(only_files(disk))
    except oracle.OracleError as error:
        raise ViolationError(f"after {then}, the store is corrupt: {error}") from error
    require(after == (found, sequence), f"after {then}, the oracle reads otherwise")


def only_files(disk: Disk) -> Files:
    image = disk.live_image()
    return {name: data for name, data in image.items() if isinstance(data, bytes)}


def check_prefix(files: Files, threads: int) -> None:
    """Recover a prefix; from then on the store is whole, for the oracle too."""
    disk = Disk(dict(files))
    try:
        with bounded_memory(files):
            store, recovered = recover_on(disk, threads=threads, on_damage="prefix")
    except CorruptionError as error:
        require(is_used_up(error, files), f"no prefix: {error}")
        return
    store.shutdown()
    require(disk.opened == [], f"left open: {disk.opened}")
    found = content(recovered), recovered.report.sequence
    require(recovered.report.damage, "the damage is not reported")
    try:
        after = oracle.read_store(only_files(disk))
    except oracle.OracleError as error:
        raise ViolationError(f"the prefix is corrupt afterwards: {error}") from error
    require(after == found, "the prefix reads otherwise")
    if is_near_the_end(files):
        return  # each opening takes a number
    store, recovered = recover_on(disk, threads=threads)
    store.shutdown()
    again = content(recovered), recovered.report.sequence
    require(again == found, "the prefix is another one the next time")


def check_real(files: Files, folder: Path) -> str:
    """Recover from a file system, where files are mapped."""
    image: Image = dict(files)
    put(folder / "db", image)
    version, wanted = another_version(files), wanted_of(files)
    try:
        with bounded_memory(files):
            store, recovered = MetadataStore.recover(folder / "db", threads=2)
    except FormatVersionError:
        require(version, "FormatVersionError, but the oracle sees version 1")
        return "real, another version"
    except CorruptionError as error:
        require(not version, "CorruptionError before FormatVersionError")
        if wanted is not None:
            require(is_used_up(error, files), f"refused: {error}")
            return "real, used up"
        check_real_prefix(files, folder)
        return "real, refused"
    store.shutdown()
    found = content(recovered), recovered.report.sequence
    require(found == wanted, "other records than the oracle")
    return "real, opened"


def check_real_prefix(files: Files, folder: Path) -> None:
    options = {"threads": 2, "on_damage": "prefix"}
    try:
        store, _ = MetadataStore.recover(folder / "db", **options)
    except CorruptionError as error:
        require(is_used_up(error, files), f"no prefix: {error}")
    else:
        store.shutdown()


def run_case(seed: int, case: int, folder: Path) -> tuple[str, Files]:
    """Run one case; return what it was and its files.

    What goes wrong is raised with ``files`` and ``told`` as attributes.
    """
    rng = random.Random(f"{seed} {case}")
    if case % KERNELS_EVERY == KERNELS_EVERY - 1:
        return kernel_cases.run(rng), {}
    files, told = hostile_store(rng)
    threads = rng.choice([1, 1, 1, 3])
    try:
        if case % REAL_EVERY == 0:
            return check_real(files, folder), files
        return check_store(files, threads, THEN[case % len(THEN)]), files
    except Exception as error:
        error.add_note(f"{'; '.join(told)}; {threads} threads")
        error.files = files  # type: ignore[attr-defined]  # for the one who saves it
        raise


# ---- the campaign ----


class Campaign:
    """Runs cases until the time is over, and tells about it."""

    def __init__(self, seed: int, save: Path | None, last: Path | None) -> None:
        self.seed = seed
        self.counts: collections.Counter[str] = collections.Counter()
        self.findings = 0
        self.stopped = False
        self._save = save
        self._last = last.open("wb", buffering=0) if last else None
        self._started = time.monotonic()

    def stop(self, *_: object) -> None:
        self.stopped = True

    def tell(self) -> None:
        seconds = time.monotonic() - self._started
        counts = ", ".join(f"{what}: {n:,}" for what, n in sorted(self.counts.items()))
        total = sum(self.counts.values())
        print(
            f"fuzz: seed {self.seed}, {total:,} cases in {seconds:.0f} s, "
            f"{self.findings} findings ({counts})",
            flush=True,
        )

    def tell_end(self) -> None:
        """Tell the same as other campaigns do."""
        seconds = time.monotonic() - self._started
        print(
            f"campaign fuzzing: seed={self.seed} cases={self.counts.total()} "
            f"seconds={seconds:.0f} violations={self.findings}",
            flush=True,
        )

    def run(self, seconds: float, first: int, tell_every: float) -> None:
        """Run cases from `first` on."""
        end = self._started + seconds
        told = self._started
        case = first
        with tempfile.TemporaryDirectory() as folder:
            while not self.stopped and self.findings < FINDINGS_MAX:
                now = time.monotonic()
                if now >= end:
                    break
                if now - told >= tell_every:
                    told = now
                    self.tell()
                self.run_one(case, Path(folder))
                case += 1

    def run_one(self, case: int, folder: Path) -> None:
        if self._last:  # a sanitizer ends the process: what was it doing?
            self._last.seek(0)
            self._last.write(b"%d %-20d\n" % (self.seed, case))
        try:
            what, _ = run_case(self.seed, case, folder)
        except Exception as error:
            what = "FINDING " + re.sub(r"\W*\d+\W*", " ", str(error))[:60]
            self.findings += 1
            if self.counts[what] < ALIKE_MAX:
                print(f"FINDING: --seed {self.seed} --case {case}", flush=True)
                traceback.print_exc(file=sys.stdout, limit=-3)
                self._keep(case, getattr(error, "files", {}))
        self.counts[what] += 1

    def _keep(self, case: int, files: Files) -> None:
        if self._save and files:
            folder = self._save / f"{self.seed}-{case}"
            shutil.rmtree(folder, ignore_errors=True)
            put(folder, dict(files))
            print(f"saved as {folder}", flush=True)


def replay(folder: Path) -> str:
    """Check a saved store in every way."""
    files = {found.name: found.read_bytes() for found in sorted(folder.iterdir())}
    with tempfile.TemporaryDirectory() as scratch:
        check_real(files, Path(scratch))
    for threads, then in itertools.product((1, 3), THEN):
        what = check_store(files, threads, then)
    return what


def main(arguments: list[str] | None = None) -> int:
    """Run what the command line says."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--seconds", type=float, default=60)
    parser.add_argument("--seed", type=int, default=random.randrange(2**32))
    parser.add_argument("--first", type=int, default=0, help="number of the first case")
    parser.add_argument("--case", type=int, help="run this case only")
    parser.add_argument("--replay", type=Path, help="check a saved store")
    parser.add_argument("--save", type=Path, help="where findings are saved")
    parser.add_argument("--last", type=Path, help="file that names the running case")
    parser.add_argument("--tell-every", type=float, default=20)
    parser.add_argument("--address-space", type=int, help="limit of this process")
    options = parser.parse_args(arguments)
    logging.disable(logging.ERROR)  # torn tails, by the thousand
    np.seterr(all="raise")
    if options.address_space:
        limits = options.address_space, options.address_space
        resource.setrlimit(resource.RLIMIT_AS, limits)
    if options.replay:
        print(replay(options.replay))
        return 0
    campaign = Campaign(options.seed, options.save, options.last)
    signal.signal(signal.SIGTERM, campaign.stop)
    signal.signal(signal.SIGINT, campaign.stop)
    print(f"fuzz: seed {options.seed}, {_codec.__file__}", flush=True)
    if options.case is not None:
        with tempfile.TemporaryDirectory() as folder:
            campaign.run_one(options.case, Path(folder))
    else:
        campaign.run(options.seconds, options.first, options.tell_every)
    campaign.tell()
    campaign.tell_end()
    return 1 if campaign.findings else 0


if __name__ == "__main__":
    sys.exit(main())
