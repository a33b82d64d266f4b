"""Whatever the writer accepts, the checker and a client's replay accept too: else no start would
ever follow."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import HealthCheck

from casemate.accounting.filters import NOTHING
from casemate.ledger import catalog, fsck_passing, fsck_replay, quotes
from casemate.spec.errors import LedgerError
from support.ledgers import BUDGET, OPEN, SCIENTIST
from support.life import METRICS, Life
from support.passing import NEW
from support.stateful import play


def test_what_is_written_is_sound() -> None:
    play(Life, 8, 30, ignoring=HealthCheck)


@pytest.mark.full
@pytest.mark.timeout(7200)
@pytest.mark.parametrize("part", range(20))
def test_what_is_written_is_sound_for_long(part: int) -> None:
    """In parts that processes can share."""
    play(Life, 500, 60, ignoring=HealthCheck)


# Seeded bugs. Each scenario is one that the rules can make.


def born(chip=0):
    life = Life()
    life.begin_life(chip)
    return life


def two_quotes_of_one_upload():
    life = born()
    life.train(picks=[0], who=SCIENTIST, kind={}, stage=2)
    life.quote_again(pick=0, other=True, stage=2)
    life.end(pick=0, state="cancelled")
    life.sweep()
    life.is_sound()


def a_consent_that_charges_nothing():
    life = born()
    policy = replace(OPEN, evaluation=True, evaluations=1)
    life.push(pick=0, policy=policy, budget=BUDGET, end="ready")
    life.recover(who=63, assumed={"charge": NOTHING}, stale=False)
    exact = {"words": "", "metrics": METRICS}
    for pick in range(1, 13):  # whichever it is
        life.train(picks=[pick], who=SCIENTIST, kind=exact, stage=3)
    life.is_sound()
    assert life.store.one("SELECT count(*) FROM jobs WHERE reserved NOT NULL") == (1,)


def a_second_hand_over_before_a_start():
    life = born(chip=1)
    life.agree_all(measurement=NEW, but=7)
    for chip in (2, 0):
        life.hand_over(measurement=NEW, drop=False, doubt=7, chip=chip)
        life.is_sound()
    life.start(measurement=None)
    assert life.up


def twice(store, id, owner, user):
    """The same user may have an upload twice."""
    if catalog.upload(store, id, owner).used_by != user:
        USE_UPLOAD(store, id, owner, user)


USE_UPLOAD = catalog.use_upload
TO_RECOVERY = fsck_passing._to_recovery
ANCHOR = fsck_replay._anchor


def counted(replay, signed):
    """A consent that charges nothing is an exact evaluation."""
    yield from TO_RECOVERY(replay, signed)
    lineage = replay.lineages[replay.datasets[signed.dataset].lineage]
    lineage.accounts[""].free += signed.charge == NOTHING


def by_one_always(replay, entry, moved):
    """A hand-over moves the anchor of the predecessor's predecessor."""
    old = entry.kind == "handover" and replay.anchored is not None
    ANCHOR(replay, entry, replay.anchored[0] + 1 if old else moved)


BUGS = [
    (two_quotes_of_one_upload, quotes, "use_upload", twice),
    (a_consent_that_charges_nothing, fsck_passing, "_to_recovery", counted),
    (a_second_hand_over_before_a_start, fsck_replay, "_anchor", by_one_always),
]


@pytest.mark.parametrize(("scenario", "where", "name", "bug"), BUGS)
def test_seeded_bugs_are_found(scenario, where, name, bug, monkeypatch) -> None:
    scenario()
    monkeypatch.setattr(where, name, bug)
    with pytest.raises((AssertionError, LedgerError)):
        scenario()
