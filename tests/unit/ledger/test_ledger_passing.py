"""The checker on entries about states that pass on, each forged with the right keys."""

import dataclasses
from types import SimpleNamespace

import pytest

from casemate.ledger import (
    catalog,
    consent,
    fsck,
    fsck_passing,
    handover,
    ledger,
    log,
    quotes,
    recovery,
)
from casemate.spec import codec
from casemate.spec.consent import Consented, HandedOver, Recovered, Rotated
from casemate.spec.receipt import LogEntry
from support.disk import SimDisk
from support.ledgers import KEY, OPEN, ask, commit, push, queue
from support.passing import (
    NEW,
    OLD,
    OTHER,
    opened,
    owner,
    signed,
    sound,
    started,
    to_recovery,
    to_software,
)


@pytest.fixture
def world():
    """A store that was recovered once; its datasets, of one owner."""
    store = started(SimDisk(), 1)
    a, b = push(store, "a", owner().public), push(store, "b", owner().public)
    asked = recovery.request(store)
    recovery.recover(store, asked, [to_recovery(asked, a)])
    sound(store)
    return store, a, b, asked


def findings(store):
    return " | ".join(fsck.check(store.all).findings)


def forge(store, kind, subject, body):
    with store.transaction():
        store.append(kind, subject, body)
    return findings(store)


def entry(envelope, by=None):
    keys = (by or owner()).public
    return Consented(envelope=envelope, sign_key=keys.sign_key, seal_key=keys.seal_key)


def test_what_was_written_under_the_logs_first_name_still_holds():
    """Attestations and heads name the log as it was called then; its head, as it is now."""
    disk = SimDisk()
    store = started(disk, 1)
    a = push(store, "a", owner().public)
    kept = [str(log.sign(store, n)) for n in (1, store.size())]
    store.empty_wal()
    disk, lost = SimDisk.of(disk.snapshot()), store
    push(lost, "b", owner().public)
    newer = str(log.sign(lost))
    store = opened(disk, 2)
    asked = recovery.request(store)
    recovery.recover(store, asked, [to_recovery(asked, a)])
    for _ in range(3):
        catalog.advance_epoch(store, a, owner().id, catalog.dataset(store, a).epoch + 1)
    assert store.size() > lost.size()
    found = fsck.check(store.all)
    assert fsck.head(found) == log.seen(log.head(store))
    for head in (*kept, str(log.sign(store))):
        fsck.extends(found, head)
    assert found.findings == []
    fsck.extends(found, newer)
    assert "the log lacks entries" in found.findings[-1]
    store.close()
    lost.close()
    assert [f for f in fsck.audit(disk, KEY).findings if "the file" not in f] == []


def test_a_consent_by_somebody_else(world):
    store, a, _, _ = world
    by = owner("another")
    said = forge(store, "consent", a, entry(to_software(store, a, by=by), by))
    assert "not the word of the owner" in said


def test_a_consent_with_other_keys_than_signed_it(world):
    store, a, _, _ = world
    assert "does not hold" in forge(store, "consent", a, entry(to_software(store, a), owner("b")))


@pytest.mark.parametrize("text", ["", "{}", "[]", '{"payload":"","signatures":[]}'])
def test_a_consent_that_is_none(world, text):
    store, a, _, _ = world
    assert "does not hold" in forge(store, "consent", a, entry(text))


def test_a_consent_of_another_format(world):
    store, a, _, _ = world
    info = catalog.info(store, catalog.dataset(store, a), budget=False)
    for envelope in (signed(owner(), info), signed(owner(), info, "application/json")):
        assert "does not hold" in findings_of(store, a, envelope)


def findings_of(store, dataset, envelope):
    return forge(store, "consent", dataset, entry(envelope))


def test_a_consent_for_another_log(world):
    store, a, _, _ = world
    other = to_software(store, a, origin="casemate.dev/log/" + "0" * 32)
    assert "it is for another log" in findings_of(store, a, other)


def test_a_consent_for_another_recovery(world):
    store, _, b, asked = world
    other = dataclasses.replace(asked, head=dataclasses.replace(asked.head, size=1))
    assert "it is for another recovery" in findings_of(store, b, to_recovery(other, b))


def test_a_second_consent_to_one_recovery(world):
    store, a, _, asked = world
    assert "does not wait for it" in findings_of(store, a, to_recovery(asked, a))


def test_a_consent_for_what_was_revoked(world):
    store, a, _, _ = world
    envelope = to_software(store, a)
    catalog.revoke(store, a, owner().id)
    assert "not the word of the owner" in findings_of(store, a, envelope)


@pytest.mark.parametrize(
    ("change", "finding"),
    [
        ({"size": 7}, "does not stand where the log before it ended"),
        ({"origin": "casemate.dev/log/x"}, "does not stand where the log before it ended"),
        ({"root": b"r" * 32}, "not the one over the entries before it"),
    ],
)
def test_a_recovery_of_another_head(change, finding):
    store = started(SimDisk(), 1)
    asked = recovery.request(store)
    recovery.recover(store, asked, [])
    sequence = asked.head.size
    (raw,) = store.one("SELECT entry FROM entries WHERE sequence = ?", sequence)
    found = codec.decode(LogEntry, raw)
    body = codec.decode(Recovered, found.body)
    forged = dataclasses.replace(body, head=dataclasses.replace(body.head, **change))
    made = codec.encode(dataclasses.replace(found, body=codec.encode(forged)))
    store.run("UPDATE entries SET entry = ? WHERE sequence = ?", made, sequence)
    assert finding in findings(store)


def test_a_recovery_under_another_key(world):
    store = started(SimDisk(), 1)
    asked = recovery.request(store)
    key = log.key(store)
    body = Recovered(head=asked.head, origin="casemate.dev/log/y", key=key.public)
    said = forge(store, "recover", "x", body)
    assert "names another log than the one that goes on" in said
    assert "not that of its key" in said
    assert "not those of its recoveries" in said


def test_log_keys_that_are_not_of_their_names(world):
    store = world[0]
    store.run("UPDATE log_keys SET key = zeroblob(32) WHERE generation = 1")
    assert "is not the one of its name" in findings(store)


def test_a_key_that_goes_back(world):
    store = world[0]
    assert "did not go forward" in forge(store, "rotate", "0", Rotated(generation=0))


def test_rotations(world):
    store = world[0]
    for generation in (1, 2, 5):
        assert not forge(store, "rotate", str(generation), Rotated(generation=generation))
    assert "did not go forward" in forge(store, "rotate", "5", Rotated(generation=5))


def test_a_hand_over_that_drops_what_is_not_there(world):
    store = world[0]
    body = HandedOver(measurement=NEW, request="sha256:0", dropped=("ds_none",))
    assert "dropped what was not there" in forge(store, "handover", NEW, body)


def test_taking_a_consent_back(world):
    store, a, _, _ = world
    consent.give(store, to_software(store, a), owner().id)
    consent.give(store, to_software(store, a, ""), owner().id)
    sound(store)


# Parts of the checker by themselves.


@dataclasses.dataclass
class Past:
    """What a replay knows, as far as these questions go."""

    passing: fsck_passing.Passing
    jobs: dict[str, SimpleNamespace]


def past(**passing):
    debit = SimpleNamespace(dataset="ds_1")
    job = SimpleNamespace(sequence=5, reserved=SimpleNamespace(debits=(debit,)))
    return Past(fsck_passing.Passing(**passing), {"job": job})


def before(replay, kind, subject="job", sequence=9, body=None):
    entry = SimpleNamespace(kind=kind, subject=subject, sequence=sequence)
    return list(fsck_passing.before(replay, entry, body))


def test_no_commit_on_a_frozen_dataset():
    frozen = past(frozen={("ds_1", OLD)})
    assert before(frozen, "commit") == ["ds_1 is frozen"]
    assert before(frozen, "commit", "another job") == before(frozen, "release") == []
    assert before(past(frozen={("ds_2", OLD)}), "commit") == []


@pytest.mark.parametrize("kind", ["takeover", "commit"])
def test_no_job_of_before_a_recovery_goes_on(kind):
    assert before(past(began=6), kind) == ["its job was reserved before the recovery"]
    assert before(past(began=5), kind) == before(past(), kind) == before(past(began=6), "end") == []


def test_before_the_first_key_the_log_has_no_name():
    assert fsck_passing.Passing().origin(0) == ""
    named = fsck_passing.Passing(origins=[("first", 3), ("second", None)])
    assert [named.origin(n) for n in (2, 3)] == ["first", "second"]


def test_only_a_checkpoint_that_the_log_signed(world):
    store = world[0]
    key, other = log.key(store), log.sign(store)
    known = SimpleNamespace(keys={key.origin: key.public})
    signed_by = fsck_passing.signed_by
    assert signed_by(known, key.origin, str(other))
    assert not signed_by(known, "casemate.dev/log/x", str(other))
    assert not signed_by(SimpleNamespace(keys={}), key.origin, str(other))
    assert not signed_by(known, key.origin, f"{key.origin}\n1\nAAAA\n\n— {key.origin} AAAA\n")


def test_a_committed_job_ends_without_a_release_when_its_owner_revokes():
    store = started(SimDisk(), 1)
    a = push(store, "a", owner().public)
    job = queue(store, "1", (a,))
    ledger.reserve(store, job)
    ledger.begin(store, job)
    commit(store, job)
    catalog.revoke(store, a, owner().id)
    ledger.abandon(store, job, "failed", "policy.revoked")
    sound(store)


# Hand-over: what passes, and what does not.


def handed(store, *, drop, agreed=(), to=NEW):
    return handover.hand_over(store, to, "sha256:" + "12" * 32, set(agreed), drop=drop)


def test_what_was_refused_passes_as_it_is():
    store = started(SimDisk(), 1)
    a, b = push(store, "a", owner().public), push(store, "b", owner().public)
    store.run("UPDATE datasets SET state = 'checking' WHERE id = ?", b)
    catalog.settle(store, b, "data.schema")
    consent.give(store, to_software(store, a), owner().id)
    handed(store, drop=False, agreed={a})
    sound(store)
    store.run("UPDATE datasets SET state = 'ready' WHERE id = ?", b)
    assert f"dataset {b} was handed over without consent" in findings(store)


def test_what_is_dropped_takes_its_approvals_and_its_wait_with_it():
    disk = SimDisk()
    store = started(disk, 1)
    policy = dataclasses.replace(OPEN, approval="each-quote")
    a, b = (push(store, n, owner().public, policy) for n in "ab")
    gone = ask(store, "2", (b,))
    quotes.judge(store, gone, owner().id, "approve")
    store.close()
    store = started(disk, 2, NEW)  # both are frozen
    consent.give(store, to_software(store, a, NEW), owner().id)
    consent.give(store, to_software(store, a, OTHER), owner().id)
    quoted = ask(store, "1", (a,))
    quotes.judge(store, quoted, owner().id, "approve")
    sound(store)
    handed(store, drop=True, agreed={a}, to=OTHER)
    assert catalog.dataset(store, b).state == "revoked"
    sound(store)
