"""What ran, and on what: the heading of every table."""

from __future__ import annotations

import datetime
import errno
import hashlib
import importlib.metadata
import os
import pathlib
import platform
import subprocess
import sys
import tempfile
import time
from typing import Any

from benchmarks.measure import BenchmarkError
from benchmarks.peers import Peer

__all__ = [
    "busy_processors",
    "check_directory",
    "describe",
    "disk_was_full",
    "file_system",
    "revision",
]

_PACKAGES = ("metastore", "numpy", "zstandard", "crc32c")


def _first(path: str, prefix: str) -> str:
    try:
        with open(path, encoding="utf-8") as lines:
            for line in lines:
                if line.startswith(prefix):
                    return line.split(":", 1)[1].strip()
    except OSError:
        pass
    return "unknown"


def file_system(path: str) -> str:
    """Return the type of the file system that holds `path`."""
    wanted = os.stat(path).st_dev
    device = f"{os.major(wanted)}:{os.minor(wanted)}"
    try:
        with open("/proc/self/mountinfo", encoding="utf-8") as lines:
            for line in lines:
                fields, _, rest = line.partition(" - ")
                if fields.split()[2] == device:
                    return rest.split()[0]
    except OSError:
        pass
    return "unknown"


def _identity() -> str | None:
    """Return what tells this machine from others of its kind; None if nothing does.

    A hash, since the number itself is to be told to nobody (``man machine-id``).
    """
    try:
        number = pathlib.Path("/etc/machine-id").read_bytes().strip()
    except OSError:
        return None
    return hashlib.sha256(b"metastore" + number).hexdigest()[:16] if number else None


#: Long enough to see work that comes and goes, short beside any case of full size.
_BUSY_SECONDS = 2.0
#: The system counts in hundredths: less would say next to nothing.
_BUSY_SECONDS_MIN = 0.2


def _busy_seconds() -> float | None:
    """Return how long the processors have worked since the system's start."""
    try:
        with open("/proc/stat", encoding="ascii") as lines:
            user, nice, system, _, _, irq, soft, stolen = (
                int(ticks) for ticks in next(lines).split()[1:9]
            )
    except (OSError, ValueError):
        return None
    return (user + nice + system + irq + soft + stolen) / os.sysconf("SC_CLK_TCK")


def busy_processors(scale: float) -> float:
    """Watch, doing nothing, how many processors others keep busy.

    The load average would not do: it is of the last minutes, and so counts the case
    that has just ended. Below a tenth of a case's size its figures are rough anyway,
    and a shorter look will do.
    """
    seconds = min(_BUSY_SECONDS, max(_BUSY_SECONDS_MIN, 10 * scale * _BUSY_SECONDS))
    before = _busy_seconds()
    time.sleep(seconds)
    after = _busy_seconds()
    if before is None or after is None:  # a system without /proc/stat
        return os.getloadavg()[0]
    return (after - before) / seconds


def revision() -> str | None:
    """Return what git calls the code that is measured; None without git."""
    try:
        done = subprocess.run(
            ["git", "describe", "--always", "--dirty"],
            cwd=pathlib.Path(__file__).parent,
            capture_output=True,
            text=True,
            check=True,
        )
    except (OSError, subprocess.CalledProcessError):
        return None
    return done.stdout.strip() or None


def disk_was_full(error: str) -> bool:
    """Tell whether a case failed for want of space.

    Told by the words: errors come from other processes and out of other libraries,
    and most of them carry the system's message, but not its number.
    """
    words = (os.strerror(errno.ENOSPC), os.strerror(errno.EDQUOT), "disk is full")
    return any(some in error for some in words)


def check_directory(path: str, needed_size: int) -> None:
    """Refuse a directory that cannot hold what the cases write.

    Raises
    ------
    BenchmarkError
        If it is missing, unwritable, in memory, or too full.
    """
    if not os.path.isdir(path):
        raise BenchmarkError(f"no such directory: {path}")
    try:
        tempfile.TemporaryFile(dir=path).close()
    except OSError as error:
        raise BenchmarkError(
            f"the directory cannot be written to ({error.strerror}): {path}. Choose "
            "another one with --directory"
        ) from error
    kind = file_system(path)
    if kind in ("tmpfs", "ramfs"):
        raise BenchmarkError(
            f"{path} is memory ({kind}), where a sync does nothing: choose a directory "
            "on a disk with --directory"
        )
    status = os.statvfs(path)
    free_size = status.f_bavail * status.f_frsize
    if free_size < needed_size:
        raise BenchmarkError(
            f"the cases write up to {needed_size / 1e9:.1f} GB, and {path} has "
            f"{free_size / 1e9:.1f} GB left: choose another place with --directory, "
            "fewer cases with --only, or fewer records with --scale"
        )


def describe(directory: str, peers: list[type[Peer]]) -> dict[str, Any]:
    """Return the machine and the versions of everything that ran."""
    pages, page_size = os.sysconf("SC_PHYS_PAGES"), os.sysconf("SC_PAGE_SIZE")
    versions = {"python": sys.version.split()[0]}
    for name in _PACKAGES:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            versions[name] = "not installed as a package"
    return {
        "date": datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d"),
        "id": _identity(),
        "processor": _first("/proc/cpuinfo", "model name"),
        "cores": os.cpu_count(),
        "memory_size": pages * page_size,
        "system": f"{platform.system()} {platform.release().split('-')[0]}",
        "architecture": platform.machine(),
        "file_system": file_system(directory),
        "versions": versions,
        "peers": {peer.name: peer.installed_version() for peer in peers},
    }
