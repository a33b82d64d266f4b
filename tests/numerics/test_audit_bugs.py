"""Some of the audit's seeded bugs in the short form, all of them with ``full``; and that the page
has them all. docs/audit.md; make audit."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from audit import battery, bugs, page

SHORT = (
    "batches are shuffled, not sampled",
    "norms are in half precision",
    "momentum is of raw gradients",
    "plans are not checked",
    "the accountant amplifies twice",
    "a job that fails is refunded",
)


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=() if n in SHORT else pytest.mark.full) for n in bugs.BUGS]
)
def test_a_seeded_bug_is_caught_by_the_check_meant_for_it(name: str) -> None:
    found = bugs.find(name, seed=3, steps=2_000)
    assert found is not None
    assert found.check in bugs.BUGS[name].checks


def test_there_are_as_many_as_asked() -> None:
    assert len(bugs.BUGS) >= 40
    assert set(SHORT) <= set(bugs.BUGS)


def test_without_a_bug_nothing_is_found_afterwards() -> None:
    """Patches and what was prepared with them are gone."""
    assert bugs.find("plans are not checked", seed=4) is not None
    assert battery.run(4, ("plans",)) == []


def test_a_bug_that_nothing_catches_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(battery, "CHECKS", {"units": battery.CHECKS["units"]})
    monkeypatch.setitem(bugs.BUGS, "none", bugs.Bug("none", ("units",), lambda patch: None))
    assert bugs.find("none") is None


def test_the_page_has_every_bug_and_what_caught_it() -> None:
    text = (Path(__file__).parents[2] / "docs" / "audit.md").read_text()
    table = text.split(page.BEGIN)[1].split("| seeded bug |")[1]
    found = dict(re.findall(r"^\| ([^|]+) \| ([^|]+) \|", table, re.MULTILINE))
    assert set(bugs.BUGS) <= set(found)
    assert all(found[name] in battery.CHECKS for name in bugs.BUGS)
