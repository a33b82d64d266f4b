import json

import pytest

from casemate.ledger import anchor
from casemate.ledger.anchor import Mark, Stand
from casemate.seams.files import load, store
from casemate.spec.errors import LedgerError
from support.anchors import NAME, FakeAnchor, Names, Off, link, root
from support.disk import SimDisk

BEFORE, STEP = b"b" * 32, b"s" * 32
MARK = Mark(NAME, 7, BEFORE, STEP)
AFTER = link(BEFORE, STEP)


def code(call, *arguments):
    with pytest.raises(LedgerError) as e:
        call(*arguments)
    assert e.value.where == NAME or "other" in e.value.where
    return e.value.code


def test_a_mark_says_where_it_leads():
    stand = Stand(NAME, 6, BEFORE)
    assert stand.mark(STEP) == MARK
    assert MARK.after == AFTER


@pytest.mark.parametrize("sizes", [(31, 32), (32, 33), (0, 32)])
def test_only_whole_values(sizes):
    with pytest.raises(ValueError, match="not 32"):
        Mark(NAME, 1, bytes(sizes[0]), bytes(sizes[1]))


@pytest.mark.parametrize(
    ("name", "found", "answer"),
    [
        (NAME, BEFORE, True), (NAME, AFTER, False),
        (NAME, None, "ledger.anchor-missing"), (NAME, bytes(32), "ledger.rolled-back"),
        (NAME, STEP, "ledger.rolled-back"), (NAME, link(AFTER, STEP), "ledger.rolled-back"),
        ("other", AFTER, "ledger.anchor-foreign"), ("other", BEFORE, "ledger.anchor-foreign"),
        ("other", None, "ledger.anchor-foreign"),
    ],
)  # fmt: skip
def test_the_rule(name, found, answer):
    name = "".join(list(name))  # equal, and not the same object
    found = None if found is None else bytes(bytearray(found))
    if isinstance(answer, bool):
        assert anchor.check(MARK, name, found) is answer
    else:
        assert code(anchor.check, MARK, name, found) == answer


def test_no_anchor_and_none_recorded():
    assert anchor.resume(None, None, Names(1)) is None
    assert code(anchor.resume, None, MARK, Names(1)) == "ledger.anchor-missing"


def test_the_first_start_begins():
    chip = FakeAnchor()
    stand = anchor.resume(chip, None, Names(1))
    assert stand == Stand(NAME, 0, link(None, Names(1).bytes(32)))
    assert chip.value == stand.value


def test_a_first_start_takes_what_an_earlier_one_began():
    """A crash before the first mark, or the owners' consent to a recovery."""
    chip = FakeAnchor(BEFORE)
    assert anchor.resume(chip, None, Names(1)) == Stand(NAME, 0, BEFORE)
    assert chip.trace == ["read"]


def test_an_anchor_that_keeps_nothing():
    class Leaky(FakeAnchor):
        def begin(self, base):
            pass

    assert code(anchor.resume, Leaky(), None, Names(1)) == "ledger.anchor-missing"


def test_a_start_after_the_step_and_one_before_it():
    chip = FakeAnchor(AFTER)
    assert anchor.resume(chip, MARK, Names(1)) == Stand(NAME, 7, AFTER)
    assert chip.trace == ["read"]
    chip = FakeAnchor(BEFORE)
    assert anchor.resume(chip, MARK, Names(1)) == Stand(NAME, 7, AFTER)
    assert chip.value == AFTER


def test_a_move():
    chip = FakeAnchor(BEFORE)
    assert anchor.move(chip, MARK) == Stand(NAME, 7, AFTER)
    assert chip.value == AFTER
    with pytest.raises(LedgerError, match=r"moved it for the 6\. time") as e:
        anchor.move(chip, MARK)
    assert (e.value.code, e.value.where) == ("ledger.rolled-back", NAME)
    assert chip.value == AFTER  # what is another's is not touched


def test_a_move_that_another_one_joins():
    class Busy(FakeAnchor):
        def extend(self, step):
            super().extend(b"o" * 32)
            super().extend(step)

    assert code(anchor.move, Busy(BEFORE), MARK) == "ledger.rolled-back"


# A state on a disk that loses power, and a chip that stops with it.

FILE = "ledger/state"


class Machine:
    """``seen``: what was seen outside."""

    def __init__(self, seed):
        self.disk, self.chip = SimDisk(seed), FakeAnchor()
        self.seen, self.boots = [], 0

    def state(self):
        data = load(self.disk, FILE)
        if data is None:
            return [], None
        history, mark = json.loads(data)
        name, count, before, step = mark
        return history, Mark(name, count, bytes.fromhex(before), bytes.fromhex(step))

    def keep(self, history, mark):
        fields = (mark.name, mark.count, mark.before.hex(), mark.step.hex())
        store(self.disk, FILE, json.dumps([history, fields]).encode())

    def run(self, acts=2):
        self.boots += 1
        history, mark = self.state()
        stand = anchor.resume(self.chip, mark, Names(self.boots))
        for number in range(acts):
            history = [*history, f"{self.boots}.{number}"]
            mark = stand.mark(root(tuple(history)))
            self.keep(history, mark)
            stand = anchor.move(self.chip, mark)
            assert history[: len(self.seen)] == self.seen
            self.seen = history

    def crash(self, disk=0, chip=(0, False)):
        """Run until that call of the disk or of the chip; whether it came so far."""
        self.disk.fault = (len(self.disk.trace) + disk, "POWER") if disk else None
        self.chip.crash = (len(self.chip.trace) + chip[0], chip[1]) if chip[0] else None
        try:
            self.run()
            came = False
        except (OSError, Off):
            came = True
        self.disk = self.disk.power_cycle()
        self.chip = self.chip.restarted()
        return came


def points():
    whole = Machine(0)
    whole.run()
    disk = [{"disk": n} for n in range(1, len(whole.disk.trace) + 1)]
    chip = [
        {"chip": (n, done)} for n in range(1, len(whole.chip.trace) + 1) for done in (False, True)
    ]
    return disk + chip


POINTS = points()


def test_every_crash_is_followed_by_a_start():
    """Two crashes, each at every call of the disk and before and after every call of the chip."""
    assert len(POINTS) > 25
    for i, first in enumerate(POINTS):
        for j, second in enumerate(POINTS):
            machine = Machine(i * 1000 + j)
            machine.crash(**first)
            machine.crash(**second)
            machine.run()
            assert machine.state()[0] == machine.seen


def test_every_older_state_is_refused_after_every_crash():
    for i, point in enumerate(POINTS):
        machine = Machine(i)
        machine.run()
        old = machine.disk.snapshot()
        machine.run()
        machine.crash(**point)
        machine.disk = SimDisk.of(old)
        assert code(machine.run) == "ledger.rolled-back"
