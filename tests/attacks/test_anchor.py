"""An operator who restores, forks and stops states at any point, against the rule of the anchor.

The operator has every state that was ever on the disk, starts as many enclaves as it likes from
them, runs them side by side and stops each where it likes. What must hold: all that is ever seen
outside follows from one history. tests/support/anchors.py goes through the orders.
"""

from __future__ import annotations

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from casemate.ledger import anchor
from casemate.spec.errors import LedgerError
from support import anchors
from support.anchors import Saved, Violation, World, enclave, explore, first_start, link

ONE, TWO, LONG = enclave(1), enclave(2), enclave(3)


@pytest.mark.parametrize(("acts", "enclaves"), [(3, 2), (1, 3)])
def test_copies_side_by_side_in_every_order(acts, enclaves):
    """Each records, moves and shows its start, and then so many jobs."""
    program = enclave(acts)
    assert explore(first_start(program), 1 + enclaves, program) > 3_000


@pytest.mark.full
def test_three_copies_that_work_in_every_order():
    assert explore(first_start(TWO), 4, TWO) > 300_000


def test_no_crash_is_ever_taken_for_an_attack():
    assert anchors.honest(4, TWO) > 2_000


@pytest.mark.full
def test_no_row_of_crashes_is_ever_taken_for_an_attack():
    assert anchors.honest(6, LONG) > 90_000


# A counter in place of the chain: what the anchor would be without knowing who moved it.


def counting(io, saved, boot, *, idempotent):
    """Recorded r against a counter c: r == c, or r == c + 1 after a crash between recording and
    moving; anything else is refused."""

    def advance(to):
        found = io.read()
        if not (idempotent and found == to):
            if found != to - 1:
                raise LedgerError("ledger.rolled-back", "", mend="")
            io.extend(1)
            if io.read() != to:
                raise LedgerError("ledger.rolled-back", "", mend="")

    at = saved.mark
    found = io.read()
    if found not in (at, at - 1):
        raise LedgerError("ledger.rolled-back", "", mend="")
    if found == at - 1:
        advance(at)
    history = (*saved.history, f"{boot}")
    io.store(Saved(history, at + 1))
    advance(at + 1)
    io.act(history)


@pytest.mark.parametrize("idempotent", [False, True])
def test_a_counter_alone_is_beaten(idempotent):
    def program(io, saved, boot):
        counting(io, saved, boot, idempotent=idempotent)

    world = World(chip=1, disks=(Saved(("0",), 1),), seen=("0",))
    with pytest.raises(Violation):
        explore(world, 3, program, extend=lambda value, step: value + step)


def test_the_attack_on_a_counter_step_by_step():
    """A dormant fork: recorded, never moved, and awake when a sibling has moved the anchor."""

    def until(world, what):
        """Run the only enclave up to before its operation ``what``, and stop it."""
        while True:
            one = world.running[0]
            try:
                ONE(anchors.Io(one.answers), one.saved, one.boot)
            except anchors.Paused as wanted:
                if wanted.args[0][0] == what:
                    return anchors.stopped(world, 0)
            world, refusal = anchors.stepped(world, 0, ONE)
            if refusal:
                raise refusal

    world = first_start(ONE)
    (newest,) = world.disks
    world = until(anchors.started(world, newest), "extend")
    dormant = world.disks[-1]
    world = anchors.started(world, newest)  # a restore, of a state that is not refused
    while world.running:
        world, refusal = anchors.stepped(world, 0, ONE)
        assert refusal is None
    assert world.seen not in (newest.history, dormant.history)
    assert dormant.mark.count == world.disks[-1].mark.count  # a counter would agree with both
    with pytest.raises(LedgerError) as e:
        until(anchors.started(world, dormant), "store")
    assert e.value.code == "ledger.rolled-back"


# Longer lives, by chance.

CHOICES = st.lists(st.integers(0, 999), min_size=20, max_size=120)


def played(choices: list[int]) -> World:
    world = first_start(LONG)
    for choice in choices:
        kind, pick = choice % 8, choice // 8
        if kind == 0 and world.boots < 12:
            world = anchors.started(world, world.disks[pick % len(world.disks)])
        elif kind == 1 and world.boots < 12:
            world = anchors.started(world, world.disks[-1])
        elif world.running:
            world, _ = anchors.stepped(world, pick % len(world.running), LONG)
    return world


@settings(max_examples=300, deadline=None)
@given(CHOICES)
def test_longer_lives(choices):
    played(choices)


@pytest.mark.full
@settings(max_examples=20_000, deadline=None)
@given(CHOICES)
def test_many_longer_lives(choices):
    played(choices)


@settings(max_examples=200, deadline=None)
@given(st.integers(1, 8), st.integers(0, 1000), st.data())
def test_a_restored_state_is_refused_whatever_came_after(acts, pick, data):
    """One enclave at a time, stopped at any operation; then a state is restored that is older than
    one of which something was seen."""
    world = first_start(LONG)
    for _ in range(acts):
        world = anchors.started(world, world.disks[-1])
        for _ in range(data.draw(st.integers(0, 30))):
            if world.running:
                world, refusal = anchors.stepped(world, 0, LONG)
                assert refusal is None
        if world.running:
            world = anchors.stopped(world, 0)
    older = [d for d in world.disks if len(d.history) < len(world.seen)]
    assume(older)
    world = anchors.started(world, older[pick % len(older)])
    _, refusal = refused(world)
    assert refusal.code == "ledger.rolled-back"


def refused(world):
    seen = world.seen
    while world.running:
        world, refusal = anchors.stepped(world, 0, LONG)
        assert world.seen == seen
        if refusal is not None:
            return world, refusal
    raise AssertionError("not refused")


# Mistakes that these tests must find.


def accepts_all(recorded, name, found):
    return False


def accepts_the_last_but_one(recorded, name, found):
    return found == recorded.before or found != recorded.after


def leaves_the_step(recorded, name, found):
    if found in (recorded.before, recorded.after):
        return False
    raise anchor.rolled_back(name, "")


def moves_blindly(io, mark):
    io.extend(mark.step)
    return anchor.Stand(mark.name, mark.count, mark.after)


def never_moves(io, mark):
    return anchor.Stand(mark.name, mark.count, mark.after)


def looks_only_before(io, mark):
    if io.read() != mark.before:
        raise anchor.rolled_back(mark.name, "")
    return moves_blindly(io, mark)


def marks_nothing(stand, step):
    """As a counter would: every state takes the same step."""
    return anchor.Mark(stand.name, stand.count + 1, stand.value, bytes(32))


@pytest.mark.parametrize(
    ("place", "name", "mistake"),
    [
        (anchor, "move", moves_blindly), (anchor, "move", never_moves),
        (anchor, "move", looks_only_before), (anchor.Stand, "mark", marks_nothing),
    ],
)  # fmt: skip
def test_a_mistake_is_found(monkeypatch, place, name, mistake):
    monkeypatch.setattr(place, name, mistake)
    with pytest.raises(Violation):
        explore(first_start(ONE), 4, ONE)


@pytest.mark.parametrize("mistake", [accepts_all, accepts_the_last_but_one])
def test_a_rule_that_accepts_all_is_stopped_by_the_move(monkeypatch, mistake):
    """The second line: the step is not taken from where the anchor stands."""
    monkeypatch.setattr(anchor, "check", mistake)
    world = first_start(ONE)
    assert explore(world, 3, ONE) > 100
    monkeypatch.setattr(anchor, "move", moves_blindly)
    with pytest.raises(Violation):
        explore(world, 3, ONE)


def test_a_mistake_that_refuses_an_honest_crash_is_found(monkeypatch):
    monkeypatch.setattr(anchor, "check", leaves_the_step)
    with pytest.raises(LedgerError):
        anchors.honest(3, ONE)


# An anchor that was destroyed.


def test_an_anchor_that_was_removed_and_made_anew_has_no_old_value():
    """Not even for the enclave itself, which begins with other bytes at each boot."""
    world = first_start(ONE)
    (old,) = world.disks
    anew = anchors.FakeAnchor()
    anchor.resume(anew, None, anchors.Names(99))
    for value in (anew.value, link(anew.value, old.mark.step)):
        with pytest.raises(LedgerError) as e:
            anchor.check(old.mark, anchors.NAME, value)
        assert e.value.code == "ledger.rolled-back"
    # Seeded: with the same bytes at each first start, the old state is taken for one that crashed.
    same = anchors.FakeAnchor()
    anchor.resume(same, None, anchors.Names(1))
    assert anchor.check(old.mark, anchors.NAME, same.value)


def test_a_removed_anchor_stops_the_start():
    world = first_start(ONE)
    (old,) = world.disks
    for there in (anchors.FakeAnchor(), None):
        with pytest.raises(LedgerError) as e:
            anchor.resume(there, old.mark, anchors.Names(2))
        assert e.value.code == "ledger.anchor-missing"
    assert anchors.FakeAnchor().value is None


def test_what_stays_open():
    """A state from before the first mark, and no anchor: nothing is there to tell it."""
    assert anchor.resume(None, None, anchors.Names(1)) is None
