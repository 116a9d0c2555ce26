"""Repair among hostile names, forged frames, strangers' files and other processes.

Each test tells what a review of the repair found.
"""

from __future__ import annotations

from pathlib import Path

import pytest

import verbs
from metastore import repair
from metastore.errors import MetastoreError

# The destination


@pytest.fixture
def two_stores(tmp_path: Path) -> tuple[Path, Path]:
    """One of 3 batches, and another of 5."""
    verbs.write(tmp_path / "a", verbs.numbered(3))
    verbs.write(tmp_path / "b", verbs.numbered(5))
    return tmp_path / "a", tmp_path / "b"


def test_two_repairs_do_not_share_a_destination(
    two_stores: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What ended between the look at the destination and its lock was overwritten."""
    first, second = two_stores
    read_headers = repair.read_headers

    def read_headers_late(*arguments: object) -> object:
        monkeypatch.setattr(repair, "read_headers", read_headers)
        repair.repair(first, tmp_path / "new")
        verbs.write(tmp_path / "new", verbs.numbered(1, 4))
        return read_headers(*arguments)

    monkeypatch.setattr(repair, "read_headers", read_headers_late)
    with pytest.raises(MetastoreError, match="not empty"):
        repair.repair(second, tmp_path / "new")
    assert verbs.read(tmp_path / "new") == verbs.states(verbs.numbered(4))[-1]
    copy = tmp_path / "new" / "quarantine" / "original"
    assert verbs.files(copy) == verbs.files(first)
