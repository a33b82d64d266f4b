import dataclasses

import pytest

from casemate.ledger import catalog, consent, ledger, log
from casemate.seal import dsse
from casemate.spec import codec
from casemate.spec.consent import Consented, RecoveryConsent, SoftwareConsent
from casemate.spec.errors import CasemateError, PolicyError
from casemate.spec.receipt import LogEntry
from support import passing
from support.disk import SimDisk
from support.ledgers import OPEN as POLICY
from support.ledgers import SCIENTIST, ask, changed_policy, push, queue, run
from support.passing import NEW, OLD, OTHER, owner, signed, sound, started, to_software


def pushed(disk=None):
    store = started(disk or SimDisk(), 1)
    return store, push(store, "a", owner().public)


def dsse_payload(envelope):
    return dsse.verify(envelope, {owner().id: owner().public.sign_key})[1]


def code(call, *arguments):
    with pytest.raises(CasemateError) as e:
        call(*arguments)
    return e.value.code


def state(store, dataset):
    return catalog.dataset(store, dataset).state


def restarted(store, disk, number, measurement):
    store.close()
    store = started(disk, number, measurement)
    sound(store)
    return store


def test_other_software_freezes_until_the_owner_accepts_it():
    disk = SimDisk()
    store, dataset = pushed(disk)
    queue(store, "1", (dataset,))
    store = restarted(store, disk, 2, NEW)
    assert state(store, dataset) == "frozen"
    assert catalog.info(store, catalog.dataset(store, dataset), budget=True).state == "frozen"
    assert code(ask_and_submit, store, dataset) == "policy.frozen"
    consent.give(store, to_software(store, dataset), owner().id)
    sound(store)
    assert state(store, dataset) == "ready"
    run(store, queue(store, "2", (dataset,)))
    sound(store)
    store = restarted(store, disk, 3, NEW)
    assert state(store, dataset) == "ready"


def ask_and_submit(store, dataset):
    ledger.submit(store, ask(store, "x", (dataset,)), SCIENTIST.id)


def test_a_consent_beforehand_serves_once():
    disk = SimDisk()
    store, dataset = pushed(disk)
    consent.give(store, to_software(store, dataset), owner().id)
    sound(store)
    assert state(store, dataset) == "ready"
    store = restarted(store, disk, 2, NEW)
    assert state(store, dataset) == "ready"
    store = restarted(store, disk, 3, OLD)
    assert state(store, dataset) == "frozen"  # the way back needs a word too
    store = restarted(store, disk, 4, NEW)
    assert state(store, dataset) == "ready"  # what was accepted last


def test_a_start_by_mistake_is_undone_by_the_accepted_software():
    disk = SimDisk()
    store, dataset = pushed(disk)
    for number, measurement, found in ((2, NEW, "frozen"), (3, OTHER, "frozen"), (4, OLD, "ready")):
        store = restarted(store, disk, number, measurement)
        assert state(store, dataset) == found


def test_what_is_pushed_under_new_software_is_accepted_under_it():
    disk = SimDisk()
    store, old = pushed(disk)
    store = restarted(store, disk, 2, NEW)
    new = push(store, "b", owner().public)
    assert (state(store, old), state(store, new)) == ("frozen", "ready")
    store = restarted(store, disk, 3, OLD)
    assert (state(store, old), state(store, new)) == ("ready", "frozen")


def test_the_newest_consent_counts_and_can_be_taken_back():
    disk = SimDisk()
    store, dataset = pushed(disk)
    for measurement in (NEW, OTHER):
        consent.give(store, to_software(store, dataset, measurement), owner().id)
    sound(store)
    store = restarted(store, disk, 2, NEW)
    assert state(store, dataset) == "frozen"
    store = restarted(store, disk, 3, OLD)
    consent.give(store, to_software(store, dataset, ""), owner().id)
    store = restarted(store, disk, 4, OTHER)
    assert state(store, dataset) == "frozen"


def test_the_same_consent_again_changes_nothing():
    store, dataset = pushed()
    envelope = to_software(store, dataset)
    consent.give(store, envelope, owner().id)
    size = store.size()
    consent.give(store, envelope, owner().id)
    assert store.size() == size


def test_a_frozen_dataset_gives_no_key():
    disk = SimDisk()
    store, dataset = pushed(disk)
    job = queue(store, "1", (dataset,))
    ledger.reserve(store, job)
    store = restarted(store, disk, 2, NEW)
    assert code(ledger.begin, store, job) == "policy.frozen"
    consent.give(store, to_software(store, dataset), owner().id)
    assert ledger.begin(store, job)


def test_a_frozen_dataset_is_not_checked():
    disk = SimDisk()
    store, dataset = pushed(disk)
    store.run("UPDATE datasets SET state = 'checking'")
    store = restarted(store, disk, 2, NEW)
    assert code(catalog.checking_key, store, dataset) == "policy.frozen"


def test_revoking_ends_waiting():
    disk = SimDisk()
    store, dataset = pushed(disk)
    consent.give(store, to_software(store, dataset, OTHER), owner().id)
    store = restarted(store, disk, 2, NEW)
    catalog.revoke(store, dataset, owner().id)
    assert consent.frozen(store) == {}
    sound(store)
    assert code(consent.give, store, to_software(store, dataset), owner().id) == "policy.revoked"
    restarted(store, disk, 3, OLD)


def test_what_is_frozen_can_still_be_governed():
    disk = SimDisk()
    store, dataset = pushed(disk)
    store = restarted(store, disk, 2, NEW)
    catalog.set_policy(store, dataset, owner().id, changed_policy(POLICY, approval="each-quote"))
    catalog.advance_epoch(store, dataset, owner().id, 3)
    assert state(store, dataset) == "frozen"
    restarted(store, disk, 3, NEW)


@pytest.mark.parametrize(
    "forge",
    [
        lambda store, d: to_software(store, d, origin="casemate.dev/log/" + "0" * 32),
        lambda store, d: to_software(store, d, by=owner("another")),
        lambda store, d: signed(owner(), SoftwareConsent(
            origin=log.key(store).origin, dataset=d, measurement=NEW, trust="simulated"),
            "application/json"),
        lambda store, d: to_software(store, d).replace("a", "b", 1),
        lambda store, d: signed(owner(), catalog.info(store, catalog.dataset(store, d),
                                                      budget=False)),
        lambda store, d: "[]",
        lambda store, d: "",
    ],
    ids=["log", "signer", "type", "changed", "format", "shape", "empty"],
)  # fmt: skip
def test_no_consent(forge):
    store, dataset = pushed()
    size = store.size()
    assert code(consent.give, store, forge(store, dataset), owner().id) == "policy.consent"
    assert store.size() == size


def test_a_refusal_names_the_signer_or_the_dataset():
    store, dataset = pushed()

    def refused(envelope):
        with pytest.raises(PolicyError) as e:
            consent.give(store, envelope, owner().id)
        return e.value

    software = codec.decode(SoftwareConsent, dsse_payload(to_software(store, dataset)))
    other = refused(signed(owner(), software, "application/json"))
    assert other.where == owner().id and "'application/json'" in other.message
    changed = refused(to_software(store, dataset, by=owner("another")))
    assert changed.where == owner().id
    assert changed.message.startswith("The consent does not hold: ") and len(changed.message) > 40
    log_ = refused(to_software(store, dataset, origin="casemate.dev/log/" + "0" * 32))
    assert log_.where == dataset
    head = log.seen(log.head(store))
    recovery_ = refused(signed(owner(), RecoveryConsent(head=head, next="x", dataset=dataset)))
    assert recovery_.where == dataset
    with pytest.raises(PolicyError) as e:
        consent.signed(store, "[]")
    assert e.value.where == ""


def test_another_owners_dataset():
    store, dataset = pushed()
    catalog.enrol(store, owner("another").public)
    by = owner("another")
    envelope = to_software(store, dataset, by=by)
    assert code(consent.give, store, envelope, by.id) == "data.unknown-dataset"


def test_whose_an_envelope_is():
    store, dataset = pushed()
    envelope = to_software(store, dataset)
    by, found = consent.signed(store, envelope)
    assert (by, found.dataset) == (owner().id, dataset)
    for bad in ("[]", "{}", '{"signatures":[]}', '{"signatures":[{}]}', '{"signatures":[[]]}', "x"):
        with pytest.raises(PolicyError, match="no consent"):
            consent.signed(store, bad)
    stranger = to_software(store, dataset, by=owner("stranger"))
    assert code(consent.signed, store, stranger) == "auth.unknown-identity"


@pytest.mark.parametrize(
    ("measurement", "trust"),
    [("AA", "simulated"), ("aa", ""), ("", "simulated"), ("aa", "x" * 2**15)],
)  # fmt: skip
def test_closed_form(measurement, trust):
    with pytest.raises(ValueError):
        SoftwareConsent(origin="o", dataset="d", measurement=measurement, trust=trust)


# Seeded bugs: the checker, and the rules, each find what the other would let through.


def test_seeded_bug_forgetting_to_freeze_is_found(monkeypatch):
    disk = SimDisk()
    store, _ = pushed(disk)
    store.close()
    monkeypatch.setattr(consent, "passes", lambda *_: None)
    store = started(disk, 2, NEW)
    assert "what is frozen is not what the log says" in passing.fsck.check(store.all).findings


def test_seeded_bug_thawing_without_a_word_is_found():
    disk = SimDisk()
    store, _ = pushed(disk)
    store = restarted(store, disk, 2, NEW)
    store.run("DELETE FROM frozen")
    assert passing.fsck.check(store.all).findings


def test_seeded_bug_another_measurement_in_the_table_is_found():
    store, dataset = pushed()
    consent.give(store, to_software(store, dataset), owner().id)
    store.run("UPDATE consents SET measurement = ?", OTHER)
    assert "consents are not those of the log" in passing.fsck.check(store.all).findings


def test_seeded_bug_taking_anybodys_signature_is_found(monkeypatch):
    store, dataset = pushed()
    by = owner("another")
    catalog.enrol(store, by.public)
    owned = catalog.owned
    monkeypatch.setattr(catalog, "owned", lambda s, i, _: owned(s, i, owner().id))
    consent.give(store, to_software(store, dataset, by=by), by.id)
    assert any("not the word of the owner" in f for f in passing.fsck.check(store.all).findings)


def test_the_entry_verifies_by_itself():
    """Anyone with the log sees that the owner signed: the id follows from the keys in the entry."""
    store, dataset = pushed()
    consent.give(store, to_software(store, dataset), owner().id)
    entry = codec.decode(LogEntry, store.entries(store.size() - 1)[0])
    body = codec.decode(Consented, entry.body)
    named = dataclasses.replace(owner().public, name="-")
    assert (body.sign_key, body.seal_key) == (named.sign_key, named.seal_key)
    assert dsse.verify(body.envelope, {owner().id: body.sign_key})
