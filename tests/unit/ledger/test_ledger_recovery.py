import dataclasses
import hashlib

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from casemate.accounting.filters import FEMTO, SATURATED, RdpFilter
from casemate.ledger import catalog, consent, fsck, ledger, log, quotes, recovery
from casemate.seal import checkpoint, note
from casemate.spec import merkle
from casemate.spec.consent import (
    Head,
    Recovered,
    RecoveryConsent,
    RecoveryRequest,
    Rotated,
    SoftwareConsent,
)
from casemate.spec.errors import CasemateError, LedgerError
from casemate.spec.job import Charge, Metric
from support.disk import SimDisk
from support.ledgers import KEY, OPEN, ask, commit, push, queue, run
from support.passing import (
    NEW,
    OLD,
    kinds,
    opened,
    owner,
    signed,
    sound,
    started,
    to_recovery,
    to_software,
)


def code(call, *arguments):
    with pytest.raises(CasemateError) as e:
        call(*arguments)
    return e.value.code


def state(store, dataset):
    return catalog.dataset(store, dataset).state


@pytest.fixture(scope="module")
def world():
    """Backup, and what was spent after it: (the files of then, the newest checkpoint, datasets)."""
    disk = SimDisk()
    store = started(disk, 1)
    a, b = push(store, "a", owner().public), push(store, "b", owner("second").public)
    run(store, queue(store, "1", (a, b)))
    ask(store, "waits", (a,))
    store.empty_wal()
    store.close()
    files = disk.snapshot()
    store = started(disk, 2)
    run(store, queue(store, "2", (a,)))
    newest = str(log.sign(store))
    store.close()
    return files, newest, a, b


def restored(world, number=10):
    disk = SimDisk.of(dict(world[0]))
    return disk, opened(disk, number)


def recovered(world, *given, **more):
    disk, store = restored(world)
    asked = recovery.request(store, world[1])
    recovery.recover(store, asked, [to_recovery(asked, d, owner(by), **more) for d, by in given])
    sound(store)
    return disk, store, asked


def test_the_whole_ceremony(world):
    _, newest, a, b = world
    disk, store = restored(world)
    before = log.key(store).origin
    asked = recovery.request(store, newest)
    assert asked == recovery.request(store, newest)
    assert asked.head.origin == before
    assert {d.dataset: d.budget.jobs for d in asked.datasets} == {a: 1, b: 1}
    size = store.size()
    recovery.recover(store, asked, [to_recovery(asked, a, rest=False)])
    sound(store)
    assert log.key(store).origin == asked.next != before
    assert kinds(store)[size:] == ["recover", "consent"]
    assert (state(store, a), state(store, b)) == ("ready", "frozen")
    store.close()
    store = started(disk, 11)
    run(store, queue(store, "3", (a,)))
    assert code(queue, store, "4", (b,)) == "policy.frozen"
    consent.give(store, to_recovery(asked, b, owner("second")), owner("second").id)
    run(store, queue(store, "5", (b,)))
    sound(store)
    receipt = ledger.bundle(store, queue(store, "3", (a,)))
    assert asked.next in receipt.proof
    store.close()
    # Attestations and receipts of both names of the log hold; the rest are files that are not here.
    findings = fsck.audit(disk, KEY).findings
    assert findings and all(" is missing" in f for f in findings)


def test_the_log_goes_on_where_it_ended(world):
    """A client that saw the restored head follows: the new log begins with the same leaves."""
    _, store, asked = recovered(world, (world[2], "owner"))
    assert merkle.root(asked.head.size, store.node) == asked.head.root
    entry = consent.last_recovery(store)
    assert (entry.head, entry.origin, entry.newest) == (asked.head, asked.next, world[1])
    assert asked.next.endswith(hashlib.sha256(entry.key).hexdigest()[:32])


def test_old_checkpoints(world):
    _, newest, a, _ = world
    _, store = restored(world)
    known = str(log.sign(store))
    asked = recovery.request(store)
    recovery.recover(store, asked, [to_recovery(asked, a)])
    assert log.check(store, note.parse(known)).size == asked.head.size
    assert code(log.check, store, note.parse(newest)) == "ledger.recovered"
    head = checkpoint.Checkpoint(asked.head.origin, asked.head.size - 1, b"r" * 32)
    (raw,) = store.one("SELECT key FROM log_keys WHERE origin = ?", asked.head.origin)
    private = Ed25519PrivateKey.from_private_bytes(raw)
    forked = checkpoint.sign(head, private.public_key().public_bytes_raw(), private.sign)
    assert code(log.check, store, forked) == "ledger.rolled-back"
    foreign = checkpoint.sign(
        checkpoint.Checkpoint("casemate.dev/log/x", 1, b"r" * 32),
        private.public_key().public_bytes_raw(),
        private.sign,
    )
    assert code(log.check, store, foreign).startswith("receipt.note-")


def test_without_consents_nothing_starts(world):
    _, store = restored(world)
    asked = recovery.request(store)
    size = store.size()
    assert code(recovery.recover, store, asked, []) == "ledger.consent-missing"
    assert store.size() == size


def test_an_edited_request_does_not_do_without_the_owners(world):
    """The file is the operator's: the store says whose word is needed."""
    _, store = restored(world)
    asked = recovery.request(store, world[1])
    size = store.size()
    with pytest.raises(CasemateError, match="did not sign") as e:
        recovery.recover(store, dataclasses.replace(asked, datasets=()), [])
    assert e.value.code == "ledger.consent-missing" and "--drop" not in e.value.mend
    for newest in ("no checkpoint\nat all", str(log.sign(started(SimDisk(), 3)))):
        edited = dataclasses.replace(asked, newest=newest)
        with pytest.raises(CasemateError):
            recovery.recover(store, edited, [to_recovery(asked, world[2])])
    assert store.size() == size


def test_a_state_without_datasets_needs_no_consent():
    store = started(SimDisk(), 1)
    asked = recovery.request(store)
    recovery.recover(store, asked, [])
    sound(store)


def test_quotes_are_void_and_unfinished_jobs_are_abandoned(world):
    a = world[2]
    disk = SimDisk.of(dict(world[0]))
    store = started(disk, 5)
    left = [queue(store, name, (a,)) for name in ("queued", "reserved", "running", "committed")]
    for job in left[1:]:
        ledger.reserve(store, job)
    for job in left[2:]:
        ledger.begin(store, job)
    commit(store, left[3])
    asked = recovery.request(store)
    recovery.recover(store, asked, [to_recovery(asked, a)])
    sound(store)
    assert [ledger.job(store, j).state for j in left] == ["failed"] + ["abandoned"] * 3
    assert ledger.job(store, left[0]).error == "policy.recovered"
    for (digest,) in store.all("SELECT digest FROM quotes"):
        assert quotes.get(store, digest).void == "policy.recovered"
    store.close()
    store = started(disk, 6)
    assert ledger.unfinished(store) == []
    sound(store)


def test_approvals_are_void(world):
    a = world[2]
    disk = SimDisk.of(dict(world[0]))
    store = started(disk, 5)
    digest = ask(store, "approved", (a,))
    quotes.judge(store, digest, owner().id, "approve")
    asked = recovery.request(store)
    recovery.recover(store, asked, [to_recovery(asked, a)])
    sound(store)
    assert set(quotes.get(store, digest).verdicts.values()) == {None}


@pytest.mark.parametrize("given", ["rest", "charge", "none"])
def test_what_the_owner_assumes_is_charged(world, given):
    a = world[2]
    charge = Charge(rdp_nano=tuple(range(28)), delta_femto=7, epsilon=0.5)
    more = {"rest": {"rest": True}, "charge": {"charge": charge}, "none": {}}[given]
    disk = SimDisk.of(dict(world[0]))
    store = opened(disk, 9)
    before = catalog.account(store, a)
    asked = recovery.request(store)
    recovery.recover(store, asked, [to_recovery(asked, a, **more)])
    sound(store)
    after = catalog.account(store, a)
    store.close()
    store = started(disk, 12)
    if given == "rest":
        rdp = RdpFilter(catalog.budget(store, a))
        assert after.rdp_nano == tuple(map(max, rdp.capacity, before.rdp_nano))
        assert after.delta_femto == max(rdp.delta_capacity, before.delta_femto)
        assert not after.fits(RdpFilter(catalog.budget(store, a)), charge)
        assert code(queue, store, "9", (a,)) == "budget.exhausted"
    elif given == "charge":
        assert after == before.add(charge)
    else:
        assert after == before
        run(store, queue(store, "9", (a,)))
    sound(store)


def test_a_charge_of_nothing_is_no_evaluation():
    """Of two versions the second has no rest: it is none of the exact evaluations that are left."""
    disk = SimDisk()
    store = started(disk, 1)
    policy = dataclasses.replace(OPEN, evaluation=True, evaluations=1)
    a = push(store, "a", owner().public, policy)
    b = push(store, "b", owner().public, policy, previous="a")
    asked = recovery.request(store)
    recovery.recover(store, asked, [to_recovery(asked, name, rest=True) for name in (a, b)])
    store.close()
    store = started(disk, 2)
    run(store, queue(store, "1", (b,), words="", metrics=(Metric(name="accuracy"),)))
    sound(store)


@pytest.mark.parametrize(
    "charge",
    [
        Charge(rdp_nano=(1,), delta_femto=0, epsilon=0.0),
        Charge(rdp_nano=(10**14,) * 28, delta_femto=0, epsilon=0.0),
        Charge(rdp_nano=(1,) * 28, delta_femto=10**15 + 1, epsilon=0.0),
    ],
)
def test_charges_that_are_none(world, charge):
    a = world[2]
    _, store = restored(world)
    asked = recovery.request(store)
    given = [to_recovery(asked, a, charge=charge)]
    with pytest.raises(CasemateError) as e:
        recovery.recover(store, asked, given)
    assert (e.value.code, e.value.where) == ("policy.consent", a)


def test_the_largest_charge_can_be_assumed(world):
    a = world[2]
    _, store = restored(world)
    asked = recovery.request(store)
    charge = Charge(rdp_nano=(SATURATED,) * 28, delta_femto=FEMTO, epsilon=0.0)
    recovery.recover(store, asked, [to_recovery(asked, a, charge=charge)])
    assert min(catalog.account(store, a).rdp_nano) >= SATURATED


@pytest.mark.parametrize(
    "bad",
    [
        {"rest": True, "charge": Charge(rdp_nano=(1,), delta_femto=0, epsilon=0.0)},
        {"charge": Charge(rdp_nano=(-1,), delta_femto=0, epsilon=0.0)},
        {"charge": Charge(rdp_nano=(), delta_femto=-1, epsilon=0.0)},
        {"charge": Charge(rdp_nano=(1,), delta_femto=-1, epsilon=0.0)},
    ],
)
def test_closed_form(bad):
    head = Head(origin="o", size=1, root=b"r" * 32)
    with pytest.raises(ValueError):
        RecoveryConsent(head=head, next="n", dataset="d", **bad)
    with pytest.raises(ValueError):
        Head(origin="o", size=1, root=b"r")


# Hostile: consents of another recovery, another head, another dataset, another person.


def test_one_backup_restored_twice_needs_new_consents(world):
    a = world[2]
    _, store = restored(world, 10)
    first = recovery.request(store)
    given = to_recovery(first, a)
    recovery.recover(store, first, [given])
    _, again = restored(world, 11)
    second = recovery.request(again)
    assert first.next != second.next
    assert code(recovery.recover, again, first, [given]) == "ledger.recovery"
    assert code(recovery.recover, again, second, [given]) == "policy.consent"
    assert "recover" not in kinds(again)


def test_a_request_is_of_one_head(world):
    a = world[2]
    disk, store = restored(world)
    asked = recovery.request(store)
    store.close()
    store = started(disk, 20)
    assert code(recovery.recover, store, asked, [to_recovery(asked, a)]) == "ledger.recovery"


def test_a_recovery_without_a_request(world):
    a = world[2]
    _, store = restored(world)
    head = log.seen(log.head(store))
    asked = RecoveryRequest(head=head, next="casemate.dev/log/x", newest=None, datasets=())
    assert code(recovery.recover, store, asked, [to_recovery(asked, a)]) == "ledger.recovery"


@pytest.mark.parametrize(
    "change",
    [
        lambda asked: {"head": dataclasses.replace(asked.head, size=asked.head.size - 1)},
        lambda asked: {"head": dataclasses.replace(asked.head, root=b"r" * 32)},
        lambda asked: {"head": dataclasses.replace(asked.head, origin="casemate.dev/log/y")},
        lambda asked: {"next": asked.head.origin},
    ],
    ids=["size", "root", "origin", "next"],
)
def test_a_consent_to_something_else(world, change):
    a = world[2]
    _, store = restored(world)
    asked = recovery.request(store)
    given = signed(
        owner(),
        RecoveryConsent(**{"head": asked.head, "next": asked.next, "dataset": a} | change(asked)),
    )
    size = store.size()
    assert code(recovery.recover, store, asked, [given]) == "policy.consent"
    assert store.size() == size
    assert log.key(store).origin == asked.head.origin


def test_only_its_owner_thaws_a_dataset(world):
    b = world[3]
    _, store = restored(world)
    asked = recovery.request(store)
    other = to_recovery(asked, b, owner())
    assert code(recovery.recover, store, asked, [other]) == "data.unknown-dataset"


def test_a_consent_to_software_is_none_to_a_recovery(world):
    a = world[2]
    _, store = restored(world)
    asked = recovery.request(store)
    given = signed(
        owner(),
        SoftwareConsent(origin=asked.next, dataset=a, measurement=NEW, trust="simulated"),
    )
    assert code(recovery.recover, store, asked, [given]) == "policy.consent"


def test_consents_to_software_end_with_the_log(world):
    a = world[2]
    disk = SimDisk.of(dict(world[0]))
    store = opened(disk, 9)
    consent.give(store, to_software(store, a), owner().id)
    asked = recovery.request(store)
    recovery.recover(store, asked, [to_recovery(asked, a)])
    sound(store)
    store.close()
    store = started(disk, 13, NEW)
    assert state(store, a) == "frozen"


def test_software_and_recovery_are_waited_for_apart(world):
    a = world[2]
    disk, store, asked = recovered(world, (world[3], "second"))
    store.close()
    store = started(disk, 14, NEW)
    consent.give(store, to_software(store, a), owner().id)
    sound(store)
    assert consent.frozen(store)[a] == (consent.RECOVERY,)
    consent.give(store, to_recovery(asked, a), owner().id)
    assert state(store, a) == "ready"
    sound(store)


def test_a_second_word_changes_nothing(world):
    a = world[2]
    _, store, asked = recovered(world, (a, "owner"))
    size = store.size()
    consent.give(store, to_recovery(asked, a, rest=True), owner().id)
    assert store.size() == size


def test_no_word_without_a_recovery():
    store = started(SimDisk(), 1)
    a = push(store, "a", owner().public)
    asked = recovery.request(store)
    given = to_recovery(asked, a)
    assert code(consent.give, store, given, owner().id) == "policy.consent"


def test_the_newest_checkpoint_is_this_logs(world):
    _, store = restored(world)
    other = started(SimDisk(), 3)
    assert code(recovery.request, store, str(log.sign(other))).startswith("receipt.note-")


def test_an_anchor_is_let_go(world):
    a = world[2]
    _, store = restored(world)
    store.anchor_secret()
    mark = ("tpm", 3, b"b" * 32, b"s" * 32)
    store.run("UPDATE anchor SET name = ?, count = ?, before = ?, step = ?", *mark)
    asked = recovery.request(store)
    recovery.recover(store, asked, [to_recovery(asked, a)])
    assert store.all("SELECT name, count, before, step FROM anchor") == [(None,) * 4]
    store.hold(None)


def test_a_second_recovery(world):
    a, b = world[2:]
    disk, store, first = recovered(world, (a, "owner"))
    second = recovery.request(store)
    assert second.head.origin == first.next
    recovery.recover(store, second, [to_recovery(second, a)])
    sound(store)
    assert consent.frozen(store) == {b: (consent.RECOVERY,)}
    old = to_recovery(first, b, owner("second"))
    assert code(consent.give, store, old, owner("second").id) == "policy.consent"
    store.close()
    store = started(disk, 15, OLD)
    assert log.key(store).origin == second.next


def test_a_log_begins_with_a_start():
    """Not with a command, after a first start that was refused."""
    disk = SimDisk()
    store = opened(disk, 1)
    assert code(recovery.request, store) == "ledger.missing"
    with pytest.raises(LedgerError, match="has not begun"), store.transaction():
        store.append("rotate", "1", Rotated(generation=1))
    store.close()
    sound(started(disk, 2))


# Seeded bugs that the checker must see.


def findings(store):
    return " ".join(fsck.check(store.all).findings)


def test_seeded_bug_a_job_that_outlives_the_recovery_is_found(world, monkeypatch):
    """It could be released twice: in what was lost, and here."""
    a = world[2]
    disk = SimDisk.of(dict(world[0]))
    store = started(disk, 5)
    job = queue(store, "twice", (a,))
    ledger.reserve(store, job)
    monkeypatch.setattr(ledger, "end_unfinished", lambda *_: None)
    asked = recovery.request(store)
    recovery.recover(store, asked, [to_recovery(asked, a)])
    assert ledger.begin(store, job)
    commit(store, job)
    assert "its job was reserved before the recovery" in findings(store)


def test_seeded_bug_serving_before_the_consent_is_found(world, monkeypatch):
    a = world[2]
    disk, store, _ = recovered(world, (world[3], "second"))
    store.close()
    monkeypatch.setattr(catalog, "_SELECT", f"SELECT {catalog._COLUMNS} FROM datasets")
    store = started(disk, 5)
    ledger.reserve(store, queue(store, "early", (a,)))
    assert f"{a} is frozen" in findings(store)


def test_seeded_bug_a_recovery_without_a_word_is_found(world, monkeypatch):
    _, store = restored(world)
    monkeypatch.setattr(recovery, "_live", lambda _: [])
    recovery.recover(store, recovery.request(store), [])
    assert "no owner consented to the last recovery" in findings(store)
    catalog.advance_epoch(store, world[2], owner().id, 5)
    assert "no owner consented to the recovery before it" in findings(store)


def test_seeded_bug_a_later_checkpoint_that_nobody_signed_is_found(world, monkeypatch):
    _, store = restored(world)
    monkeypatch.setattr(recovery, "_require_ours", lambda *_: None)
    asked = recovery.request(store, "all is well\n")
    recovery.recover(store, asked, [to_recovery(asked, world[2])])
    assert "is none of the log before it" in findings(store)


def test_seeded_bug_keeping_the_old_name_is_found(world):
    _, store = restored(world)
    asked = recovery.request(store)
    key = log.key(store)
    with store.transaction():
        store.append(
            "recover", key.origin, Recovered(head=asked.head, origin=key.origin, key=key.public)
        )
    assert "it names another log than the one that goes on" in findings(store)


def test_seeded_bug_forgetting_the_assumed_charge_is_found(world):
    a = world[2]
    _, store, _ = recovered(world, (a, "owner"), rest=True)
    spent = catalog.account(store, a)
    low = dataclasses.replace(spent, rdp_nano=tuple(n // 2 for n in spent.rdp_nano))
    catalog.set_account(store, a, catalog.EVERYONE, low)
    assert "what is spent of budget" in findings(store)
