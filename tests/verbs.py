"""Small verbs of the tests: fill stores, look into them, damage their files.

The bytes are those of docs/format.md; only what a whole, undamaged file says is
believed here. ``oracle`` forges frames with a valid checksum, from bytes to bytes.
"""

from __future__ import annotations

import contextlib
import dataclasses
import shutil
import subprocess
import sys
import textwrap
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path

import numpy as np

import oracle
from disk import Disk, Image
from metastore import MetadataStore, Recovered
from metastore._commit import GroupCommit
from metastore.columns import Columns
from simulated import SimulatedDirectory

Record = tuple[int, tuple[int, bytes] | None]
Batch = list[Record]
State = dict[int, tuple[int, bytes]]


# What a store holds


def to_columns(records: Sequence[oracle.Record]) -> Columns:
    """Put records side by side."""
    lengths = [len(data) for _, _, data in records]
    return Columns(
        np.array([key for key, _, _ in records], dtype=np.uint64),
        np.array([value for _, value, _ in records], dtype=np.uint64),
        np.cumsum([0, *lengths], dtype=np.uint64),
        np.frombuffer(b"".join(data for _, _, data in records), dtype=np.uint8),
    )


def to_records(found: Columns) -> list[oracle.Record]:
    """Return columns as records."""
    offsets = found.offsets.tolist()
    data = found.user_data.tobytes()
    return [
        (key, value, data[low:high])
        for key, value, low, high in zip(
            found.keys.tolist(),
            found.values.tolist(),
            offsets,
            offsets[1:],
            strict=False,
        )
    ]


def content(recovered: Iterable[tuple[int, int, bytes]]) -> State:
    return {key: (value, user_data) for key, value, user_data in recovered}


def apply(state: State, batch: Batch) -> State:
    """The content after `batch`; the last record of a key wins."""
    after = dict(state)
    for key, new in batch:
        if new is None:
            after.pop(key, None)
        else:
            after[key] = new
    return after


def states(batches: Iterable[Batch]) -> list[State]:
    """The content after 0, 1, 2 .. of `batches`."""
    found: list[State] = [{}]
    for batch in batches:
        found.append(apply(found[-1], batch))
    return found


def numbered(count: int, first: int = 1) -> list[Batch]:
    """Batches of which no two prefixes give the same content: key 0 counts them."""
    return [
        [
            (0, (number, b"")),
            (number, (1000 + number, b"data %d" % number)),
            (number - 2, None) if number % 3 == 0 else (number, (number, b"last")),
        ]
        for number in range(first, first + count)
    ]


def read(path: Path, **options: object) -> State:
    """Recover, shut down, and return what was there."""
    store, recovered = MetadataStore.recover(path, **options)
    store.shutdown()
    return content(recovered)


def write(path: Path, batches: Iterable[Batch], **options: object) -> list[int]:
    """Recover, insert `batches`, shut down; return their sequences."""
    store, _ = MetadataStore.recover(path, **options)
    with store:
        return [store.insert_batch(batch) for batch in batches]


def write_open(path: Path, batches: Iterable[Batch], **options: object) -> None:
    """Write `batches` as :func:`write` does, but leave what a kill would leave."""
    image = files(path) if path.exists() else {}
    put(path, open_image(image, batches, **options))


# What lies in a directory


def files(path: Path) -> Image:
    """Everything below `path`: the bytes of a file, the same again for a directory."""
    return {
        found.name: files(found) if found.is_dir() else found.read_bytes()
        for found in sorted(path.iterdir())
    }


def lasting(path: Path) -> Image:
    """What lies in `path` but for what a store writes ahead in the background."""
    return {name: data for name, data in files(path).items() if ".tmp" not in name}


def put(path: Path, image: Image) -> None:
    """Make `path` a directory that holds exactly `image`."""
    if path.exists():
        shutil.rmtree(path)
    path.mkdir(parents=True)
    for name, inside in image.items():
        if isinstance(inside, dict):
            put(path / name, inside)
        else:
            (path / name).write_bytes(inside)


def named(path: Path, kind: str) -> list[Path]:
    """The logs or the snapshots in `path`, oldest first."""
    return sorted(
        found
        for found in path.glob(f"{kind}_*")
        if found.is_file() and len(found.name) == len(kind) + 17
    )


def logs(path: Path) -> list[Path]:
    return named(path, "log")


def snapshots(path: Path) -> list[Path]:
    return named(path, "snapshot")


def newest_log(image: Image) -> str:
    """The name of the newest published log in `image`."""
    parsed = {name: oracle.parse_name(name) for name in image}
    return max(name for name, found in parsed.items() if found and found[0] == "log")


@dataclasses.dataclass(frozen=True)
class Span:
    """Where a frame lies, and what its header says."""

    offset: int
    size: int
    kind: int
    sequence: int
    durable: int
    n_records: int
    payload_size: int

    @property
    def payload_end(self) -> int:
        return self.offset + oracle.FRAME_HEADER.size + self.payload_size

    @property
    def end(self) -> int:
        return self.offset + self.size


def spans(data: bytes) -> list[Span]:
    """The frames of a file that nobody damaged."""
    found = []
    for offset in oracle.frame_offsets(data):
        kind, sequence, durable, n_records, payload_size = (
            oracle.get_field(data, offset, field)
            for field in ("kind", "sequence", "durable", "records", "payload_size")
        )
        size = oracle.FRAME_HEADER.size + payload_size
        size += oracle.padding_size(size)
        found.append(
            Span(offset, size, kind, sequence, durable, n_records, payload_size)
        )
    return found


def batches_in(data: bytes) -> list[Span]:
    return [span for span in spans(data) if span.kind == oracle.BATCH]


def without_tail(data: bytes) -> bytes:
    """A log without the zeros behind its last frame."""
    found = spans(data)
    return data[: found[-1].end if found else oracle.FILE_HEADER.size]


# Damage


def flip(path: Path, offset: int, bit: int = 0) -> None:
    data = bytearray(path.read_bytes())
    data[offset] ^= 1 << bit
    path.write_bytes(data)


def overwrite(path: Path, offset: int, new: bytes) -> None:
    data = bytearray(path.read_bytes())
    data[offset : offset + len(new)] = new
    path.write_bytes(data)


def cut(path: Path, size: int) -> None:
    path.write_bytes(path.read_bytes()[:size])


def append(path: Path, new: bytes) -> None:
    path.write_bytes(path.read_bytes() + new)


def cut_tail(path: Path) -> None:
    """Take the zeros behind the last frame of a log away."""
    path.write_bytes(without_tail(path.read_bytes()))


# Stores on a disk in memory


def recover_on(
    disk: Disk, *, inline: bool = True, **options: object
) -> tuple[MetadataStore, Recovered]:
    """Recover on a simulated disk, by default without a background thread."""
    return MetadataStore._recover_in(SimulatedDirectory(disk), inline=inline, **options)


def write_on(disk: Disk, batches: Iterable[Batch], **options: object) -> None:
    """Recover on `disk`, insert `batches`, shut down."""
    with recover_on(disk, **options)[0] as store:
        for batch in batches:
            store.insert_batch(batch)


def open_image(image: Image, batches: Iterable[Batch], **options: object) -> Image:
    """What a kill leaves after `batches` were inserted into the store of `image`."""
    disk = Disk(image)
    with recover_on(disk, **options)[0] as store:
        for batch in batches:
            store.insert_batch(batch)
        return disk.live_image()


def read_image(image: Image, **options: object) -> State:
    """Recover from `image`, shut down, and return what was there."""
    store, recovered = recover_on(Disk(image), **options)
    store.shutdown()
    return content(recovered)


@contextlib.contextmanager
def others_may_run(disk: Disk) -> Iterator[None]:
    """Let other threads use `disk` while ``Disk.before`` takes its time."""
    disk.mutex.release()
    try:
        yield
    finally:
        disk.mutex.acquire()


# Child processes


def child(code: str, *arguments: object, **options: object) -> subprocess.Popen[str]:
    """Start a Python process that runs `code`; its standard streams are pipes."""
    return subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(code), *map(str, arguments)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        **options,
    )


def run(code: str, *arguments: object) -> subprocess.CompletedProcess[str]:
    """Run `code` to its end in a process of its own."""
    process = child(code, *arguments)
    output, errors = process.communicate(timeout=60)
    return subprocess.CompletedProcess(process.args, process.returncode, output, errors)


# Threads


def together(*steps: Callable[[], object]) -> None:
    """Run each step in a thread of its own, until all have ended, as they must."""
    threads = [threading.Thread(target=step, daemon=True) for step in steps]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)  # only a test that fails waits so long
        assert not thread.is_alive()


def start_waiting(commits: GroupCommit, threads: Sequence[threading.Thread]) -> None:
    """Start threads that commit; return when all wait for the lead, held meanwhile."""
    for thread in threads:
        thread.start()
    while commits.n_waiting < len(threads):
        pass


def join_compactors() -> None:
    """Let the threads of stores that were given up come to their end."""
    for thread in threading.enumerate():
        if thread.name == "metastore-compactor":
            thread.join(60)  # only a test that fails waits so long
