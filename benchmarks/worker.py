"""One case in its own process: settings from stdin, rows to stdout, as JSON.

What else is printed, by a library say, goes to stderr.

Stdin stays open as long as the process that asks: its end is the worker's end.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import threading
import time

from benchmarks.cases import CASES
from benchmarks.measure import BenchmarkError
from benchmarks.settings import Settings


def _end_with_the_run() -> None:
    """Kill this process and all that it measures with once nobody waits for it.

    It has a session of its own, and a run that was killed tells nobody. The descriptor
    is read, not the file object, whose lock a forked child would find taken.
    """
    while os.read(0, 1):
        pass
    os.killpg(0, signal.SIGKILL)


def main() -> int:
    """Run the case that is asked for."""
    request = json.loads(sys.stdin.readline())
    answering = os.dup(1)
    os.dup2(2, 1)
    threading.Thread(target=_end_with_the_run, daemon=True).start()
    settings = Settings(
        **{**request["settings"], "peer_modules": tuple(request["peer_modules"])}
    )
    started = time.perf_counter()
    try:
        rows = CASES[request["case"]].run(settings)
    except (BenchmarkError, OSError) as error:
        answer = {"error": f"{type(error).__name__}: {error}"}
    else:
        answer = {"rows": [row.as_json() for row in rows]}
    answer["seconds"] = time.perf_counter() - started
    with open(answering, "w", encoding="utf-8") as stdout:
        json.dump(answer, stdout)
    return 0


if __name__ == "__main__":
    sys.exit(main())
