"""The checker's own filter, accountant and signatures against the writer's."""

from __future__ import annotations

import base64
import hashlib
import math
from dataclasses import replace
from fractions import Fraction

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from hypothesis import given
from hypothesis import strategies as st

from casemate.accounting import filters, pld, rdp
from casemate.accounting.filters import RdpFilter
from casemate.ledger import catalog, fsck_budget, fsck_costs, fsck_folder, fsck_notes, fsck_replay
from casemate.ledger.fsck_budget import FEMTO
from casemate.seal import checkpoint, dsse, note, stream
from casemate.spec import canonical, merkle
from casemate.spec.data import Budget
from casemate.spec.errors import UsageError
from casemate.spec.job import Charge, DpEvent
from casemate.spec.log import Reserved
from casemate.spec.receipt import LogEntry
from support.disk import SimDisk
from support.ledgers import BUDGET, EVENT, Witness, open_store, push, queue, run

SMALL = DpEvent(rate=0.02, noise_multiplier=4.0, steps=50)
BUDGETS = st.builds(
    Budget,
    epsilon=st.floats(1e-3, 1000),
    delta=st.floats(1e-15, 0.01),
)


def test_orders_are_those_of_the_filter() -> None:
    assert tuple(map(float, fsck_budget.ORDERS)) == rdp.ORDERS
    assert fsck_budget.SATURATED == filters.SATURATED
    assert RdpFilter.empty() == fsck_budget.EMPTY


@given(BUDGETS)
def test_capacities_are_a_little_above_the_writers(budget: Budget) -> None:
    ours = fsck_budget.capacities(budget.epsilon, budget.delta)
    pairs = zip(ours, RdpFilter(budget).capacity, strict=True)
    assert all(0 <= a - b <= fsck_budget.CAPACITY_SLACK for a, b in pairs)
    assert 0 <= fsck_budget.delta_capacity(budget) - RdpFilter(budget).delta_capacity <= 1


def test_a_capacity_by_hand() -> None:
    # a = 2, E = 1, D = e^-10: x = 1/15, w = 0.42/225, B = 1 + log 2 + log(2 * 0.9 e^-10 w).
    delta = math.exp(-10)
    nano = fsck_budget.capacities(8.0, delta)[fsck_budget.ORDERS.index(2)]
    x = 8 / (1.5 * 10)
    by_hand = 8 + math.log(2) + math.log(0.42 * x * x * 0.9 * delta * 2)
    assert nano == -1 or abs(nano / 1e9 - by_hand) < 1e-6
    nano = fsck_budget.capacities(40.0, delta)[fsck_budget.ORDERS.index(2)]
    by_hand = 40 + math.log(2) + math.log(0.42 * (40 / 15) ** -4 * 0.9 * delta * 2)
    assert abs(nano / 1e9 - by_hand) < 1e-6
    assert fsck_budget.capacities(1000.0, 0.01)[-1] < 10**13


def test_the_boundary_of_a_budget_is_an_integer() -> None:
    capacity = fsck_budget.capacities(BUDGET.epsilon, BUDGET.delta)
    over = tuple(c + 1 for c in capacity)
    one = (*over[:9], capacity[9], *over[10:])
    most = fsck_budget.delta_capacity(BUDGET)
    assert most == int(Fraction(1e-5) * 10**14)
    assert not fsck_budget.fits(BUDGET, over, 0)
    assert fsck_budget.fits(BUDGET, one, most)
    assert not fsck_budget.fits(BUDGET, one, most + 1)
    left = fsck_budget.rest(BUDGET, one, most + 1)
    assert (max(left.rdp_nano), left.delta_femto) == (0, 0)
    left = fsck_budget.rest(BUDGET, fsck_budget.EMPTY, 7)
    assert left.rdp_nano == tuple(max(0, c) for c in capacity)
    assert (left.delta_femto, left.epsilon) == (most - 7, 0.0)


def reserved(charge: Charge, *events: DpEvent, **changes: object) -> Reserved:
    made = Reserved(
        job="j", scientist="s", request="r", quote="q", plan="p", events=events,
        delta_truncation=1e-9, delta_sampler=1e-9, delta_shown=1e-6, charge=charge, debits=(),
    )  # fmt: skip
    return replace(made, **changes)


def charge(*events: DpEvent, delta: float = 1e-6) -> Charge:
    return RdpFilter.charge(events, 2e-9, delta_shown=delta)


@pytest.mark.parametrize(
    "events",
    [
        (EVENT,),
        (DpEvent(rate=1.0, noise_multiplier=5.0, steps=3),),
        (DpEvent(rate=0.3, noise_multiplier=0.05, steps=1),),
        (DpEvent(rate=1e-5, noise_multiplier=0.6, steps=100_000), EVENT),
        (DpEvent(rate=0.5, noise_multiplier=100.0, steps=7),),
    ],
)
def test_true_charges_hold(events: tuple[DpEvent, ...]) -> None:
    assert list(fsck_costs.charge(reserved(charge(*events), *events))) == []


@pytest.mark.parametrize(
    ("rate", "noise", "order"),
    [
        (0.01, 1.1, 1.25),
        (0.5, 0.7, 2.5),
        (0.02, 0.1, 1.5),
        (0.9, 0.07, 2.5),
        (1e-5, 0.06, 1.0625),
        (1e-4, 0.3, 1.75),
        (0.3, 10.0, 1.09375),
    ],
)
def test_broken_orders_are_integrated(rate: float, noise: float, order: float) -> None:
    """As mpmath does it with 30 digits, from the definition."""
    import mpmath as mp

    with mp.workdps(30):
        q, s, a = map(mp.mpf, (rate, noise, order))

        def term(z: object) -> object:
            u = q * mp.expm1((2 * z - 1) / (2 * s * s))
            return mp.npdf(z, 0, s) * ((1 + u) ** a - 1 - a * u)

        marks = sorted({m + k * s for m in (0, a) for k in (-40, -9, -3, 0, 3, 9, 40)})
        slow = float(mp.log1p(mp.quad(term, marks)) / (a - 1))
    assert fsck_costs._broken(rate, noise, order) == pytest.approx(slow, rel=1e-8)


def test_nothing_costs_nothing() -> None:
    free = Charge(rdp_nano=fsck_budget.EMPTY, delta_femto=0, epsilon=0.0)
    none = {"delta_truncation": 0.0, "delta_sampler": 0.0}
    assert list(fsck_costs.charge(reserved(free, **none))) == []
    (finding,) = fsck_costs.charge(reserved(replace(free, epsilon=1.0), **none))
    assert "shows an epsilon for nothing" in finding
    assert list(fsck_costs.charge(reserved(free, EVENT, **none)))


@pytest.mark.parametrize("order", [0, 4, 8, 9, 20, 27])
@pytest.mark.parametrize("factor", [1 - 3e-6, 1 + 3e-4])
def test_a_charge_off_at_one_order_is_found(order: int, factor: float) -> None:
    true = charge(EVENT)
    nano = list(true.rdp_nano)
    nano[order] = int(nano[order] * factor)
    findings = list(fsck_costs.charge(reserved(replace(true, rdp_nano=tuple(nano)), EVENT)))
    assert any(f"at order {rdp.ORDERS[order]:g} is not what" in f for f in findings)


def test_other_wrong_charges_are_found() -> None:
    true = charge(EVENT)
    for wrong, finding in (
        (replace(true, rdp_nano=true.rdp_nano[1:]), "other orders"),
        (replace(true, delta_femto=true.delta_femto - 2), "delta is not that"),
        (replace(true, delta_femto=true.delta_femto + 3), "delta is not that"),
        (replace(true, epsilon=true.epsilon * (1 - 1e-5)), "less epsilon than it takes"),
        (replace(true, epsilon=0.0), "less epsilon than it takes"),
        (replace(true, epsilon=true.epsilon * (1 + 1e-5)), "more epsilon than it takes"),
    ):
        found = list(fsck_costs.charge(reserved(wrong, EVENT)))
        assert any(finding in f for f in found), finding


def test_a_delta_is_rounded_up_by_two_at_most() -> None:
    true = charge(EVENT)
    for femto, sound in ((-1, False), (0, True), (2, True), (3, False)):
        taken = replace(true, delta_femto=FEMTO // 4 + femto)
        body = reserved(taken, EVENT, delta_truncation=0.125, delta_sampler=0.125)
        assert any("delta is not that" in f for f in fsck_costs.charge(body)) is not sound


def test_every_event_costs_and_little_noise_excuses_no_whole_order() -> None:
    free = DpEvent(rate=1e-9, noise_multiplier=100.0, steps=1)
    cheap = list(fsck_costs.charge(reserved(charge(free), EVENT, free)))
    assert any("is not what its events cost" in f for f in cheap)
    loud = DpEvent(rate=1e-3, noise_multiplier=0.05, steps=1)
    true = charge(loud)
    at = next(i for i, a in enumerate(fsck_budget.ORDERS) if a.denominator == 1)
    nano = [n + (i == at) * n // 50 for i, n in enumerate(true.rdp_nano)]
    (finding, *_) = fsck_costs.charge(reserved(replace(true, rdp_nano=tuple(nano)), loud))
    assert f"at order {float(fsck_budget.ORDERS[at]):g} is not what" in finding


@pytest.mark.parametrize(("share", "sound"), [(1.0, True), (1.001, False)])
def test_little_noise_excuses_the_unsampled_cost_at_broken_orders(
    share: float, sound: bool
) -> None:
    loud = DpEvent(rate=1e-3, noise_multiplier=0.05, steps=1)
    true = charge(loud)
    at = next(i for i, a in enumerate(fsck_budget.ORDERS) if a.denominator > 1)
    nano = list(true.rdp_nano)
    nano[at] = int(share * float(fsck_budget.ORDERS[at]) / (2 * 0.05**2) * 1e9)
    found = list(fsck_costs.charge(reserved(replace(true, rdp_nano=tuple(nano)), loud)))
    assert any("is not what its events cost" in f for f in found) is not sound


def test_the_tight_epsilon_is_a_little_below_the_writers() -> None:
    disk = SimDisk()
    store = open_store(disk)
    job = queue(store, "1", (push(store),), event=SMALL)
    run(store, job)
    from casemate.ledger import ledger

    plan = ledger.quote(store, job).plan
    store.close()
    ours = fsck_costs.tight(plan, 1e-6)
    theirs = pld.epsilon(plan.events, 1e-6 - 2e-9)
    assert theirs * 0.97 < ours <= theirs
    two = fsck_costs.tight(replace(plan, events=plan.events * 2), 1e-6)
    assert ours < two
    assert fsck_costs.tight(replace(plan, events=()), 1e-6) == 0.0
    plain = replace(plan, delta_truncation=0.0, delta_sampler=0.0)
    for part in ("delta_truncation", "delta_sampler"):
        left = fsck_costs.tight(replace(plain, **{part: 7.5e-7}), 1e-6)
        assert left > ours
        assert left == pytest.approx(fsck_costs.tight(plain, 2.5e-7))
    many = replace(plain, events=(DpEvent(rate=1e-3, noise_multiplier=2.0, steps=40_000),))
    theirs = pld.epsilon(many.events, 1e-6)
    assert theirs * 0.5 < fsck_costs.tight(many, 1e-6) <= theirs


def test_an_accountant_that_is_not_installed_is_named() -> None:
    with pytest.raises(UsageError) as e:
        fsck_costs._library("casemate_has_no_such_module")
    assert e.value.code == "usage.extra"


ANCHORS = {
    "one by one": ("start 1", "reserve 2", "commit 3"),
    "a gap": ("start 1", "reserve 3 !"),
    "the same again": ("start 1", "start 1 !"),
    "not from one": ("start 2 !",),
    "from zero": ("start 0 !",),
    "by a hand-over that says so": ("start 1", "handover 2", "start 3"),
    "by one that does not": ("start 1", "handover -", "start 3"),
    "which counts one": ("start 1", "handover -", "start 2 !"),
    "another anchor after it": ("start 1", "start 2", "handover -", "start 1", "start 2"),
    "which begins once": ("start 1", "handover 2", "start 1", "start 1 !"),
    "two hand-overs, two anchors": ("start 1", "start 2", "handover 3", "handover 1", "start 1"),
    "a hand-over from elsewhere": ("start 1", "start 2", "handover 1 !"),
    "before any": ("start -", "handover -", "start 1", "start 2"),
    "another anchor after a recovery": ("start 1", "start 2", "recover -", "consent -", "start 1"),
    "which begins once too": ("start 1", "recover -", "start 1", "start 1 !"),
    "or the same": ("start 1", "recover 2", "start 3"),
}


@pytest.mark.parametrize("name", ANCHORS)
def test_an_anchor_goes_forward_by_one_or_begins_anew(name: str) -> None:
    replay = fsck_replay.Replay()
    for number, words in enumerate(ANCHORS[name]):
        kind, moved, *wrong = words.split()
        entry = LogEntry(sequence=number, boot=b"", kind=kind, subject="", body=b"")
        fsck_replay._anchor(replay, entry, None if moved == "-" else int(moved))
        assert bool(replay.findings) == bool(wrong), words


@given(st.lists(st.lists(st.integers(0, 2**53 - 1), min_size=28, max_size=28), max_size=4))
def test_accounts_add_as_the_writers(charges: list[list[int]]) -> None:
    ours, theirs = fsck_replay.Account(), catalog.Account(fsck_budget.EMPTY, 0, 0)
    for nano in charges:
        each = Charge(rdp_nano=tuple(nano), delta_femto=3, epsilon=1.0)
        ours.add(each)
        theirs = theirs.add(each)
    assert (ours.rdp_nano, ours.delta_femto, ours.jobs) == (
        theirs.rdp_nano, theirs.delta_femto, theirs.jobs,
    )  # fmt: skip
    assert max(ours.rdp_nano) <= canonical.MAX_INT


@given(st.integers(0, 70))
def test_trees_and_paths_are_those_of_the_writer(size: int) -> None:
    entries = [b"%d" % i for i in range(size)]
    leaves, node = [merkle.leaf_hash(e) for e in entries], merkle.tree(entries)
    assert fsck_notes.tree(leaves) == merkle.root(size, node)
    for place in range(size):
        assert tuple(fsck_notes.path(leaves, place, 0, size)) == merkle.inclusion(place, size, node)


KEY = Ed25519PrivateKey.from_private_bytes(b"k" * 32)
PUBLIC = KEY.public_key().public_bytes_raw()


def test_octets_are_base64_and_nothing_else() -> None:
    assert fsck_notes.octets("AAEC") == b"\0\1\2"
    assert fsck_notes.octets("AA!EC") == b""


def test_envelopes() -> None:
    text = dsse.sign("a type", b"payload", KEY.sign, "id")
    assert fsck_notes.envelope(text, "a type", PUBLIC) == b"payload"
    twice = text.replace('"signatures":[', '"signatures":[{"keyid":"a","sig":""},')
    for bad in ("", "[]", "3", "{}", text.replace("sig", "gis"), twice, text.replace("type", "t"),
                text.replace("payload", "load"), '{"payload":3}'):  # fmt: skip
        assert fsck_notes.envelope(bad, "a type", PUBLIC) is None
    assert fsck_notes.envelope(text, "another", PUBLIC) is None
    assert fsck_notes.envelope(text, "a type", b"x" * 32) is None
    assert fsck_notes.envelope(text, "a type", b"short") is None


def test_notes_and_cosignatures() -> None:
    head = checkpoint.Checkpoint("casemate.dev/log/x", 3, b"r" * 32)
    signed = checkpoint.sign(head, PUBLIC, KEY.sign)
    w = Witness()
    both = w.sign(signed)
    text = fsck_notes.head("casemate.dev/log/x", 3, b"r" * 32)
    assert text == signed.text
    mine = fsck_notes.Signer("casemate.dev/log/x", fsck_notes.LOG, PUBLIC)
    for whole in (signed, both):
        assert fsck_notes.note(text, str(whole), mine)
    assert not fsck_notes.note(text, str(note.Note(text, w.sign(note.Note(text, ())).lines)), mine)
    assert not fsck_notes.note(text + "x\n", str(signed), mine)
    assert not fsck_notes.note(text, str(signed), replace(mine, name="other"))
    assert not fsck_notes.note(text, str(signed), replace(mine, key=b"x" * 32))
    theirs = fsck_notes.signer(w.vkey)
    assert theirs == fsck_notes.Signer(w.name, fsck_notes.WITNESS, w.verifier.key)
    (line,) = (str(x).rstrip("\n") for x in both.lines if x.name == w.name)
    signature = fsck_notes.line(line, theirs)
    assert signature is not None and theirs.signed(text, signature)
    assert not theirs.signed(text + "x", signature)
    assert not theirs.signed(text, b"\1" + signature[1:])
    assert not theirs.signed(text, signature[:9])
    assert fsck_notes.line(line, mine) is None
    assert fsck_notes.line(line[2:], theirs) is None


def test_keys_that_are_none() -> None:
    w = Witness()
    name, id_, key = w.vkey.split("+", 2)
    short = base64.b64encode(b"\4" + b"x" * 31).decode()
    for bad in ("", "a+b", f"{name}+00000000+{key}", f"{name}+{id_}+{short}", f"{name}+{id_}+!",
                f"x{w.vkey}", f"{name}+{id_}+"):  # fmt: skip
        assert fsck_notes.signer(bad) is None
    assert fsck_notes.public(b"short") == b""
    assert fsck_notes.public(b"k" * 32) == PUBLIC
    assert fsck_notes.octets("é") == fsck_notes.octets("a") == b""
    assert fsck_notes.octets("AAA=") == b"\0\0"
    assert hashlib.sha256().digest() == fsck_notes.tree([])


@given(st.integers(0, 5 << 20))
def test_sealed_sizes_are_those_of_streams(plain: int) -> None:
    assert fsck_folder.sealed_size(plain) == stream.sealed_size(plain)
