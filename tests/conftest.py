"""Fixtures of all tests."""

from __future__ import annotations

import contextlib
import os
import random
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import hypothesis
import pytest

from metastore import MetadataStore, cli
from metastore.columns import Recovered

# A store's work is mostly waiting for the disk: no deadline tells anything there.
hypothesis.settings.register_profile(
    "metastore",
    deadline=None,
    print_blob=True,
    # A run depends on no earlier one, and on no checkout that it may write to.
    database=None,
    # Not "explain": it traces every line before Python 3.12, which takes minutes.
    phases=[
        phase for phase in hypothesis.Phase if phase is not hypothesis.Phase.explain
    ],
    suppress_health_check=[hypothesis.HealthCheck.too_slow],
)
hypothesis.settings.load_profile("metastore")

SEED = int(os.environ.get("METASTORE_TEST_SEED", random.randrange(2**32)))

Recover = Callable[..., tuple[MetadataStore, Recovered]]
Run = Callable[..., tuple[int, str, str]]
Campaign = Callable[[str], contextlib.AbstractContextManager[Counter[str]]]


def pytest_report_header() -> str:
    return f"metastore: METASTORE_TEST_SEED={SEED}"


@pytest.fixture
def rng(request: pytest.FixtureRequest) -> random.Random:
    """Random numbers that METASTORE_TEST_SEED repeats, whatever other tests run."""
    print(f"METASTORE_TEST_SEED={SEED}")
    return random.Random(f"{SEED} {request.node.nodeid}")


@pytest.fixture
def campaign(capsys: pytest.CaptureFixture[str]) -> Campaign:
    """A context that counts, and tells its counts in one line, whatever happens."""

    @contextlib.contextmanager
    def campaign_named(name: str) -> Iterator[Counter[str]]:
        counts = Counter(violations=0)
        started = time.monotonic()
        try:
            yield counts
        except BaseException:
            counts["violations"] = counts["violations"] or 1
            raise
        finally:
            counts["seconds"] = round(time.monotonic() - started)
            counts["violations"] = counts.pop("violations")  # to the end
            told = " ".join(f"{what}={n}" for what, n in counts.items())
            with capsys.disabled():
                print(f"\ncampaign {name}: seed={SEED} {told}", flush=True)

    return campaign_named


@pytest.fixture
def db(tmp_path: Path) -> Path:
    """Where a store may be made; nothing is there yet."""
    return tmp_path / "db"


@pytest.fixture
def recover(db: Path) -> Iterator[Recover]:
    """``MetadataStore.recover(db)`` that shuts down what a test leaves open."""
    stores = []

    def recover_here(
        path: Path = db, **options: object
    ) -> tuple[MetadataStore, Recovered]:
        store, recovered = MetadataStore.recover(path, **options)
        stores.append(store)
        return store, recovered

    yield recover_here
    for store in stores:
        store.shutdown()


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Run:
    """A command in this process: exit status, output, errors."""

    def run_here(*arguments: object) -> tuple[int, str, str]:
        status = cli.main([str(argument) for argument in arguments])
        output = capsys.readouterr()
        return status, output.out, output.err

    return run_here


@pytest.fixture
def frequent_switches() -> Iterator[None]:
    """Let the interpreter change threads far more often than it would."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    yield
    sys.setswitchinterval(before)
