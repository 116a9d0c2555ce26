"""Every planted bug is found; without one, the same checks find nothing."""

from __future__ import annotations

import pytest

from finders import by_crashes, by_crowds, by_damage, by_faults, by_forgery
from planted import PLANTS
from small_store import repeatable


@pytest.fixture(autouse=True)
def _repeatable():
    with repeatable():
        yield


@pytest.mark.parametrize("name", PLANTS)
def test_a_planted_bug_is_found(name, capsys):
    plant, find = PLANTS[name]
    with plant():
        found = find()
    assert found is not None, "the harness is blind to it"
    with capsys.disabled():
        reason = f"{type(found.error).__name__}: {found.error}"
        print(f"\n{name}: {find.__name__}, after {found.states}: {reason[:160]}")


@pytest.mark.parametrize(
    "find", [by_crowds, by_damage, by_forgery], ids=lambda find: find.__name__
)
def test_nothing_is_found_where_nothing_is_planted(find):
    assert find() is None


@pytest.mark.slow
@pytest.mark.parametrize(
    "find", [by_crashes, by_faults], ids=lambda find: find.__name__
)
def test_nothing_is_found_where_nothing_is_planted_at_length(find, campaign):
    with campaign(f"nothing planted, {find.__name__}"):
        assert find() is None
