"""One case in its own process: settings from stdin, rows to stdout, as JSON."""

from __future__ import annotations

import json
import sys
import time

from benchmarks.cases import CASES
from benchmarks.measure import BenchmarkError
from benchmarks.settings import Settings


def main() -> int:
    """Run the case that is asked for."""
    request = json.load(sys.stdin)
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
    json.dump(answer, sys.stdout)
    return 0


if __name__ == "__main__":
    sys.exit(main())
