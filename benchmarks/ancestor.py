"""The Rust ancestor of metastore, as a command that prints JSON (not part of this
repository; docs/performance.md says what it is).
"""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
from typing import Any

from benchmarks import data
from benchmarks.data import Arrays
from benchmarks.measure import BenchmarkError

__all__ = ["Ancestor"]


_PROBE_RECORDS = 100


def _first_answer(*outputs: str) -> dict[str, Any] | None:
    """Return the first line that is a JSON object."""
    for line in "\n".join(outputs).splitlines():
        with contextlib.suppress(ValueError):
            answer = json.loads(line)
            if isinstance(answer, dict):
                return answer
    return None


class Ancestor:
    """Runs the command; every method is one run.

    Parameters
    ----------
    binary : str
        Its path. Where a binary of the same name with ``-c8`` behind stands beside it,
        that one, whose records are smaller, is taken for figures of memory.
    """

    def __init__(self, binary: str) -> None:
        if not (os.path.isfile(binary) and os.access(binary, os.X_OK)):
            raise BenchmarkError(f"the ancestor cannot be run: {binary}")
        self._binary = binary
        self._compact = f"{binary}-c8" if os.path.exists(f"{binary}-c8") else binary

    def _run(self, *args: object, compact: bool = False) -> dict[str, Any]:
        command = [self._compact if compact else self._binary, *map(str, args)]
        try:
            done = subprocess.run(
                command,
                stdin=subprocess.DEVNULL,
                capture_output=True,
                text=True,
                errors="replace",
                check=False,
            )
        except OSError as error:
            raise BenchmarkError(
                f"the ancestor cannot be run: {command[0]}: {error.strerror}"
            ) from error
        # its shutdown sometimes crashes: what it printed before counts
        answer = _first_answer(done.stdout, done.stderr)
        if answer is None or "error" in answer:
            said = " ".join(done.stderr.split()) or "it said nothing"
            raise BenchmarkError(f"the ancestor failed: {' '.join(command)}: {said}")
        return answer

    def probe(self, path: str) -> None:
        """Raise unless it makes a small store in `path` and recovers our records."""
        expected = data.checksum(data.records(0, _PROBE_RECORDS, 8))
        self.make_snapshot(path, _PROBE_RECORDS, 8)
        found = self.recover(path)
        try:
            checksum, _ = int(found["checksum"], 16), float(found["seconds"])
        except (LookupError, TypeError, ValueError) as error:
            raise BenchmarkError(
                f"not the ancestor: {self._binary}: it answers a recovery with {found}"
            ) from error
        if checksum != expected:
            raise BenchmarkError(
                f"not the ancestor: {self._binary}: it recovered other records"
            )

    def make_snapshot(self, path: str, n_records: int, user_data_size: int) -> None:
        """Write records 0 to `n_records` as a snapshot."""
        self._run("gen-snapshot", path, n_records, user_data_size, "rand")

    def make_log(
        self, path: str, n_records: int, batch_records: int, user_data_size: int
    ) -> None:
        """Write records 0 to `n_records` as a log of batches, above any snapshot."""
        sizes = (n_records, batch_records, user_data_size)
        self._run("gen-log", path, *sizes, "rand", "--lsn", 2)

    def make_log_of(self, path: str, arrays: Arrays, batch_records: int) -> None:
        """Write any records (without user data) as a log, above any snapshot."""
        script = f"{path}.script"
        keys, values = arrays.keys.tolist(), arrays.values.tolist()
        with open(script, "w", encoding="ascii") as file:
            for start in range(0, len(keys), batch_records):
                stop = start + batch_records
                pairs = zip(keys[start:stop], values[start:stop], strict=True)
                lines = [f"put {k} {v} -" if v else f"del {k}" for k, v in pairs]
                file.write("\n".join(lines) + "\ncommit\n")
        self._run("script-log", path, 2, script)
        os.unlink(script)

    def make_snapshot_of(self, path: str, arrays: Arrays) -> None:
        """Write any records as a snapshot."""
        script = f"{path}.script"
        with open(script, "w", encoding="ascii") as file:
            for key, (value, user_data) in arrays.tuples():
                file.write(f"put {key} {value} {user_data.hex() or '-'}\n")
            file.write("commit\n")
        self._run("script-snapshot", path, 1, script)
        os.unlink(script)

    def recover(self, path: str, *, for_memory: bool = False) -> dict[str, Any]:
        """Recover a store: seconds, checksum, vmhwm_kb. It rewrites the directory."""
        return self._run("recover", path, compact=for_memory)

    def compact(self, path: str) -> float:
        """Return the seconds of the steps that its compaction consists of."""
        phases = self._run("phases", path)
        steps = [name for name in phases if name.endswith("_s")]
        return float(sum(phases[name] for name in steps))

    def fill(
        self, path: str, n_records: int, batch_records: int, n_threads: int
    ) -> dict[str, Any]:
        """Commit durable batches: batches_per_s, entries_per_s, lat_us."""
        sizes = (n_records, batch_records, 8, 1)
        return self._run("fill", path, *sizes, "rand", "--threads", n_threads)
