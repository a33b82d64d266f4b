"""The checker against logs that are well chained but say what a correct writer never says, and
against tables that say what their log does not."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from casemate.accounting.filters import SATURATED
from casemate.ledger import catalog, fsck, ledger, log, quotes
from casemate.ledger.fsck_budget import EMPTY
from casemate.ledger.ledger import TrainingState
from casemate.ledger.store import Store
from casemate.seal import dsse
from casemate.spec import codec
from casemate.spec.consent import (
    CONSENT_TYPE,
    Consent,
    Consented,
    HandedOver,
    Head,
    Recovered,
    RecoveryConsent,
    Rotated,
    SoftwareConsent,
)
from casemate.spec.errors import LedgerError, UsageError
from casemate.spec.identity import PublicIdentity
from casemate.spec.job import Charge, DpEvent, Metric
from casemate.spec.log import (
    Abandoned,
    Approval,
    Committed,
    Enrolled,
    EpochAdvanced,
    PolicyChanged,
    Registered,
    Reserved,
    Revoked,
    Started,
    TakenOver,
    commitment,
)
from support.disk import SimDisk
from support.ledgers import (
    BUDGET,
    EVENT,
    OPEN,
    OTHER,
    OWNER,
    SCIENTIST,
    Witness,
    ask,
    boot,
    commit,
    dataset_id,
    entries,
    open_store,
    push,
    queue,
    register,
    run,
)

SMALL = DpEvent(rate=0.02, noise_multiplier=4.0, steps=50)


class World:
    """Two datasets of an owner, one of another, one revoked; jobs done, committed and reserved."""

    def __init__(self) -> None:
        self.store = store = open_store(SimDisk())
        self.a = push(store, "a")
        self.b = push(store, "b", OTHER)
        self.gone = push(store, "gone")
        self.quote = ask(store, "quoted", (self.a,))
        self.done = queue(store, "done", (self.a,))
        run(store, self.done)
        self.fixed = queue(store, "fixed", (self.b,), event=SMALL)
        ledger.reserve(store, self.fixed)
        ledger.begin(store, self.fixed)
        commit(store, self.fixed)
        self.free = queue(store, "free", (self.b,), event=SMALL)
        ledger.reserve(store, self.free)
        self.held = queue(store, "held", (self.b, self.gone), event=SMALL)
        ledger.reserve(store, self.held)
        catalog.revoke(store, self.gone, OWNER.id)
        words = "It is all public."
        self.strict = push(store, "strict", SIGNER, replace(
            OPEN, approval="each-quote", scientists=(SCIENTIST.id,), last_epoch=0,
            scientist_budget=replace(BUDGET, epsilon=0.5), resumes=0, nonprivate=words,
        ))  # fmt: skip
        self.shown = push(store, "shown", SIGNER, replace(OPEN, evaluation=True, evaluations=1))
        metrics = (Metric(name="accuracy"),)
        self.measured = queue(store, "measured", (self.shown,), words="", metrics=metrics)
        ledger.reserve(store, self.measured)

    def reserved(self, job: str) -> Reserved:
        (entry, *_) = entries(self.store, ledger.job(self.store, job).reserved)
        return codec.decode(Reserved, entry.body)

    def registered(self, **changes: object) -> Registered:
        entry = next(e for e in entries(self.store) if e.kind == "register")
        return replace(codec.decode(Registered, entry.body), **changes)

    def again(self, **changes: object) -> Reserved:
        """The done job's reservation for a new job."""
        return replace(self.reserved(self.done), job="job_new", **changes)

    def debit(self, **changes: object) -> Reserved:
        return self.again(debits=(replace(self.again().debits[0], **changes),))

    def strictly(self, **changes: object) -> Reserved:
        """A reservation on the dataset with a strict policy."""
        found = catalog.dataset(self.store, self.strict)
        policy = commitment(found.salt, found.policy_digest)
        return self.debit(dataset=self.strict, lineage=self.strict, policy=policy, **changes)

    def consent(self, signed: Consent, key: Ed25519PrivateKey | None = None) -> Consented:
        sign = (key or SIGNING).sign
        return Consented(
            envelope=dsse.sign(CONSENT_TYPE, codec.encode(signed), sign, SIGNER.id),
            sign_key=SIGNER.sign_key,
            seal_key=SIGNER.seal_key,
        )

    def to_software(self, **changes: object) -> SoftwareConsent:
        origin = log.key(self.store).origin
        made = SoftwareConsent(
            origin=origin, dataset=self.strict, measurement="ff", trust="simulated"
        )
        return replace(made, **changes)

    def approval(self, quote: str, dataset: str, owner: PublicIdentity) -> Approval:
        salt = quotes.get(self.store, self.quote).salt
        return Approval(quote=commitment(salt, quote), dataset=dataset, owner=owner.id)


SIGNING = Ed25519PrivateKey.from_private_bytes(b"o" * 32)
SIGNER = replace(OWNER, name="signer", sign_key=SIGNING.public_key().public_bytes_raw())
HEAD = Head(origin="another.test/log", size=3, root=b"r" * 32)


def costly(world: World) -> Reserved:
    charge = world.again().charge
    return world.again(charge=replace(charge, rdp_nano=(SATURATED,) * len(charge.rdp_nano)))


def committed(job: str) -> Committed:
    return Committed(job=job, result="x", receipt="x")


NEW = dataset_id("new")
ENDED = "the job was not reserved by this boot, or had ended"
CASES: dict[str, tuple[str, Callable[[World], object], str]] = {
    "boot": (
        "start",
        lambda w: Started(software="x", measurement="", attestation="x"),
        "this boot started before",
    ),
    "identity": ("identity", lambda w: Enrolled(identity=OWNER.id), "enrolled twice"),
    "dataset twice": ("register", lambda w: w.registered(), "registered twice"),
    "owner": (
        "register",
        lambda w: w.registered(dataset=NEW, lineage=NEW, owner="id_nobody"),
        "its owner never enrolled",
    ),
    "no lineage": (
        "register",
        lambda w: w.registered(dataset=NEW, lineage=dataset_id("nothing")),
        "continues a ledger that does not exist",
    ),
    "larger budget": (
        "register",
        lambda w: w.registered(dataset=NEW, budget=replace(BUDGET, epsilon=9.0)),
        "changed owner, budget or filter",
    ),
    "policy of nothing": (
        "policy",
        lambda w: PolicyChanged(dataset=NEW, policy="x"),
        "there is no such dataset",
    ),
    "policy of a revoked one": (
        "policy",
        lambda w: PolicyChanged(dataset=w.gone, policy="x"),
        "was revoked before",
    ),
    "epoch of nothing": (
        "epoch",
        lambda w: EpochAdvanced(dataset=NEW, epoch=1),
        "there is no such dataset",
    ),
    "revoking nothing": ("revoke", lambda w: Revoked(dataset=NEW), "there is no such dataset"),
    "revoking twice": ("revoke", lambda w: Revoked(dataset=w.gone), "was revoked before"),
    "epoch back": (
        "epoch",
        lambda w: EpochAdvanced(dataset=w.a, epoch=0),
        "the epoch did not go forward",
    ),
    "approval by another": (
        "approve",
        lambda w: w.approval(w.quote, w.a, OTHER),
        "the word is not the owner's",
    ),
    "approval of no dataset": (
        "approve",
        lambda w: w.approval(w.quote, NEW, OTHER),
        "the word is not the owner's",
    ),
    "approval of another dataset": (
        "approve",
        lambda w: w.approval(w.quote, w.b, OTHER),
        "the quote is missing, or not on this dataset",
    ),
    "approval of nothing": (
        "reject",
        lambda w: w.approval("sha256:none", w.a, OWNER),
        "the quote is missing, or not on this dataset",
    ),
    "reserved twice": ("reserve", lambda w: w.reserved(w.done), "the job was reserved before"),
    "no debit": ("reserve", lambda w: w.again(debits=()), "debits no ledger"),
    "one ledger twice": ("reserve", lambda w: w.again(debits=w.again().debits * 2), "one twice"),
    "another's ledger": ("reserve", lambda w: w.debit(lineage=w.b), "is not on that ledger"),
    "no ledger": ("reserve", lambda w: w.debit(lineage=NEW), "is not on that ledger"),
    "unknown dataset": ("reserve", lambda w: w.debit(dataset=NEW), "is not on that ledger"),
    "old policy": ("reserve", lambda w: w.debit(policy="x"), "another policy or epoch"),
    "old epoch": ("reserve", lambda w: w.debit(epoch=7), "another policy or epoch"),
    "revoked dataset": (
        "reserve",
        lambda w: w.debit(dataset=w.gone, lineage=w.gone),
        "was revoked, or had another",
    ),
    "over the budget": ("reserve", costly, "exceeds the budget"),
    "charge that gives back": (
        "reserve",
        lambda w: w.again(charge=replace(w.again().charge, rdp_nano=(*EMPTY[1:], -1))),
        "its charge is none of the filter's",
    ),
    "delta that gives back": (
        "reserve",
        lambda w: w.again(charge=replace(w.again().charge, delta_femto=-1)),
        "its charge is none of the filter's",
    ),
    "charge of other orders": (
        "reserve",
        lambda w: w.again(charge=replace(w.again().charge, rdp_nano=EMPTY[1:])),
        "its charge is none of the filter's",
    ),
    "more than a scientist may": ("reserve", lambda w: w.strictly(), "allows one scientist"),
    "without approval": ("reserve", lambda w: w.strictly(), "did not approve"),
    "after the last epoch": ("reserve", lambda w: w.strictly(epoch=1), "had expired"),
    "another scientist": (
        "reserve",
        lambda w: replace(w.strictly(), scientist=OTHER.id),
        "is not for this scientist",
    ),
    "training on what is for evaluation": (
        "reserve",
        lambda w: w.again(debits=w.reserved(w.measured).debits),
        "is for evaluation only",
    ),
    "more exact evaluations than there are": (
        "reserve",
        lambda w: replace(w.reserved(w.measured), job="job_new"),
        "gives no more exact evaluations",
    ),
    "without privacy": ("reserve", lambda w: w.again(events=()), "training without privacy"),
    "key back": ("rotate", lambda w: Rotated(generation=0), "the key did not go forward"),
    "dropping nothing": (
        "handover",
        lambda w: HandedOver(measurement="ff", request="x", dropped=(NEW,)),
        "it dropped what was not there",
    ),
    "consent by another key": (
        "consent",
        lambda w: w.consent(w.to_software(), Ed25519PrivateKey.generate()),
        "its signature or its form does not hold",
    ),
    "consent of another's dataset": (
        "consent",
        lambda w: w.consent(w.to_software(dataset=w.a)),
        "it is not the word of the owner of a dataset",
    ),
    "consent for no dataset": (
        "consent",
        lambda w: w.consent(w.to_software(dataset=NEW)),
        "it is not the word of the owner of a dataset",
    ),
    "consent for another log": (
        "consent",
        lambda w: w.consent(w.to_software(origin="another.test/log")),
        "it is for another log",
    ),
    "consent to another recovery": (
        "consent",
        lambda w: w.consent(RecoveryConsent(head=HEAD, next="x", dataset=w.strict)),
        "it is for another recovery",
    ),
    "consent that nothing waits for": (
        "consent",
        lambda w: w.consent(RecoveryConsent(head=HEAD, next="x", dataset=w.strict)),
        "its dataset does not wait for it",
    ),
    "consent to a charge of other orders": (
        "consent",
        lambda w: w.consent(
            RecoveryConsent(
                head=HEAD,
                next="x",
                dataset=w.strict,
                charge=Charge(rdp_nano=(0,), delta_femto=0, epsilon=0.0),
            )
        ),
        "its charge is none of the filter's",
    ),
    "recovery from elsewhere": (
        "recover",
        lambda w: Recovered(head=HEAD, origin="x", key=b"k" * 32),
        "it does not stand where the log before it ended",
    ),
    "recovery of another state": (
        "recover",
        lambda w: Recovered(head=HEAD, origin="x", key=b"k" * 32),
        "the head that it names is not the one over the entries before it",
    ),
    "recovery into another log": (
        "recover",
        lambda w: Recovered(head=HEAD, origin="x", key=b"k" * 32),
        "it names another log than the one that goes on",
    ),
    "recovery under another key": (
        "recover",
        lambda w: Recovered(head=HEAD, origin="x", key=b"k" * 32),
        "the log's new name is not that of its key",
    ),
    "taking over nothing": ("takeover", lambda w: TakenOver(job="job_none"), "by another"),
    "taking over one's own": (
        "takeover",
        lambda w: TakenOver(job=w.free),
        "the job was not reserved by another boot, or had ended",
    ),
    "taking over what is committed": (
        "takeover",
        lambda w: TakenOver(job=w.fixed),
        "the job was not reserved by another boot, or had ended",
    ),
    "commit without debit": ("commit", lambda w: committed("job_none"), ENDED),
    "commit twice": ("commit", lambda w: committed(w.done), ENDED),
    "commit after revocation": (
        "commit",
        lambda w: committed(w.held),
        "a dataset of it was revoked",
    ),
    "abandon without debit": (
        "abandon",
        lambda w: Abandoned(job="job_none", reason="failed"),
        "the job was not reserved, or had ended",
    ),
    "abandon after commit": (
        "abandon",
        lambda w: Abandoned(job=w.fixed, reason="failed"),
        "the job was committed, and no owner revoked",
    ),
}


def forge(store: Store, kind: str, body: object, *more: tuple[str, object]) -> list[str]:
    with store.transaction():
        for each in ((kind, body), *more):
            store.append(each[0], getattr(each[1], "job", "forged"), each[1])
    return fsck.check(store.all).findings


@pytest.mark.parametrize("name", sorted(CASES))
def test_a_forged_entry_is_found(name: str) -> None:
    kind, body, finding = CASES[name]
    world = World()
    assert fsck.check(world.store.all, recompute=True).findings == []
    findings = forge(world.store, kind, body(world))
    assert any(finding in f and f"({kind} " in f for f in findings), findings
    world.store.close()


def test_an_entry_is_on_what_its_body_is_about() -> None:
    world = World()
    world.store.boot = boot(7)
    about = {
        world.a: ("epoch", EpochAdvanced(dataset=world.a, epoch=1)),
        world.free: ("abandon", Abandoned(job=world.free, reason="failed")),
        "id_x": ("identity", Enrolled(identity="id_x")),
        boot(7).hex(): ("start", Started(software="x", measurement="", attestation="x")),
    }
    for subject, (kind, body) in about.items():
        for said in (subject, "other"):
            with world.store.transaction():
                world.store.append(kind, said, body)
            last = f"entry {world.store.size() - 1} ({kind}) is on another thing"
            assert (last in fsck.check(world.store.all).findings) == (said == "other"), last
    world.store.close()


def test_a_commit_or_reservation_by_another_boot_is_found() -> None:
    world = World()
    world.store.boot = boot(7)
    assert any(ENDED in f for f in forge(world.store, "commit", committed(world.free)))
    assert any("never started" in f for f in forge(world.store, "reserve", world.again()))
    world.store.close()


def test_what_follows_is_held_against_what_went_before() -> None:
    other = Started(software="x", measurement="ff", attestation="x")
    moved = replace(other, anchor=1)
    handed = HandedOver(measurement="ee", request="x", dropped=())
    recovered = Recovered(head=HEAD, origin="x", key=b"k" * 32)
    rejected: list[tuple[str, Callable[[World], list], str]] = [
        ("frozen", lambda w: [("start", other), ("reserve", w.again())], "is frozen"),
        (
            "frozen before the commit",
            lambda w: [("start", other), ("commit", committed(w.free))],
            "is frozen",
        ),
        (
            "after a hand-over",
            lambda w: [("handover", handed), ("identity", Enrolled(identity="id_x"))],
            "it was written after the state had been handed over",
        ),
        (
            "other software",
            lambda w: [("handover", handed), ("start", other)],
            "this is not the software that the state was handed to",
        ),
        (
            "a job of before a recovery",
            lambda w: [("recover", recovered), ("takeover", TakenOver(job=w.free))],
            "its job was reserved before the recovery",
        ),
        ("anchor", lambda w: [("start", moved), ("start", moved)], "did not go forward by one"),
        (
            "a hand-over moves the anchor too",
            lambda w: [
                ("start", moved),
                ("handover", handed),
                ("start", replace(moved, anchor=2)),
            ],
            "did not go forward by one",
        ),
        (
            "abandoned twice",
            lambda w: [("abandon", Abandoned(job=w.free, reason="failed"))] * 2,
            "the job was not reserved, or had ended",
        ),
        (
            "rejected",
            lambda w: [
                ("reject", replace(w.approval(w.quote, w.a, OWNER), quote=w.again().quote)),
                ("reserve", w.again()),
            ],
            "did not approve",
        ),
    ]
    for name, entries_of, finding in rejected:
        world = World()
        first, *more = entries_of(world)
        findings = forge(world.store, *first, *more)
        assert any(finding in f for f in findings), (name, findings)
        world.store.close()


def test_the_last_epoch_of_a_policy_has_not_expired() -> None:
    world = World()
    assert not any("had expired" in f for f in forge(world.store, "reserve", world.strictly()))
    world.store.close()


def test_one_scientist_may_not_take_more_delta_either() -> None:
    world = World()
    most = int(BUDGET.delta * 10**15)
    charge = replace(world.again().charge, rdp_nano=EMPTY, delta_femto=most)
    findings = forge(world.store, "reserve", replace(world.strictly(), charge=charge))
    assert any("allows one scientist" in f for f in findings)
    world.store.close()


def test_every_debit_is_looked_at() -> None:
    world = World()
    (good,) = world.again().debits
    debits = (replace(good, dataset=NEW, lineage=NEW), replace(good, epoch=7))
    found = " ".join(forge(world.store, "reserve", world.again(debits=debits)))
    assert "is not on that ledger" in found and "another policy or epoch" in found
    world.store.close()


def test_a_key_that_goes_forward_is_no_finding() -> None:
    world = World()
    assert forge(world.store, "rotate", Rotated(generation=1)) == []
    assert forge(world.store, "rotate", Rotated(generation=1))
    world.store.close()


def test_a_job_is_not_gone_on_with_more_often_than_its_policy_allows() -> None:
    world = World()
    world.store.boot = boot(2)
    again = ("takeover", TakenOver(job=world.free))
    start = ("start", Started(software="x", measurement="", attestation="x"))
    assert not any("too often" in f for f in forge(world.store, *start, again))
    for number in (3, 4):
        world.store.boot = boot(number)
        assert not any("too often" in f for f in forge(world.store, *start, again))
    world.store.boot = boot(5)
    assert any("too often" in f for f in forge(world.store, *start, again))
    world.store.close()


def test_a_log_that_does_not_begin_with_a_start_is_found() -> None:
    first = replace(entries(World().store, 1)[0], sequence=0)
    row = (0, codec.encode(first))
    replay = fsck.check(lambda sql: [row] if "FROM entries" in sql else [])
    assert "the log does not begin with a start" in replay.findings


def test_what_cannot_be_read_is_a_finding_but_a_stopped_store_is_an_error() -> None:
    replay = fsck.check(lambda sql: [(0, b"{}")] if "FROM entries" in sql else [])
    assert replay.findings[0].startswith("a stored value cannot be read")
    store = World().store
    store.close()
    with pytest.raises(LedgerError, match=r"ledger\.stopped"):
        fsck.check(store.all)


def test_an_accountant_that_is_not_there_is_an_error_and_no_finding() -> None:
    def part() -> None:
        raise UsageError("usage.extra", "It is not installed.", mend="Install it.")

    with pytest.raises(UsageError):
        fsck._guarded(fsck.Replay(), part)


def test_a_witness_may_stand_on_the_first_and_on_the_newest_entry() -> None:
    store, witness = open_store(SimDisk()), Witness()
    witness.cosign(store)
    assert store.size() == 1 and fsck.check(store.all).findings == []
    push(store)
    assert fsck.check(store.all).findings == []
    witness.cosign(store)
    assert fsck.check(store.all).findings == []
    store.close()


def test_charges_without_events_are_free_and_checked() -> None:
    world = World()
    assert world.reserved(world.done).events == (EVENT,)
    body = world.again(events=())
    with world.store.transaction():
        world.store.append("reserve", "forged", body)
    findings = fsck.check(world.store.all, recompute=True).findings
    assert any("is not what its events cost" in f for f in findings)
    assert SCIENTIST.id == body.scientist
    world.store.close()


# Tables that say what their log does not.


@pytest.fixture(scope="module")
def made() -> Iterator[Store]:
    """Datasets: one ready, one revoked, one refused; quotes: one never run, one done, one live."""
    store = open_store(SimDisk())
    a = push(store, "a")
    catalog.revoke(store, push(store, "revoked"), OWNER.id)
    catalog.settle(store, register(store, "refused"), "data.schema")
    ask(store, "asked", (a,), event=SMALL)
    run(store, queue(store, "done", (a,), event=SMALL))
    ledger.reserve(store, queue(store, "live", (a,), event=SMALL))
    yield store
    store.close()


@contextmanager
def changed(store: Store, sql: str, *values: object) -> Iterator[list[str]]:
    """What the checker finds after a statement, which is taken back."""
    store.run("PRAGMA defer_foreign_keys = ON")
    store.run("SAVEPOINT before")
    store.run(sql, *values)
    yield fsck.check(store.all).findings
    store.run("ROLLBACK TO before")
    store.run("RELEASE before")


def of_dataset(store: Store, name: str) -> str:
    """Its upload."""
    sql = "SELECT json_extract(CAST(registration AS TEXT), '$.upload') FROM datasets WHERE id = ?"
    return str(store.one(sql, dataset_id(name))[0])


def of_quotes(store: Store) -> list[str]:
    """The uploaded models, in the order of the quotes: asked, done, live."""
    sql = "SELECT json_extract(CAST(submission AS TEXT), '$.upload') FROM quotes ORDER BY place"
    return [upload for (upload,) in store.all(sql)]


def test_uploads_may_go_when_nothing_needs_them(made: Store) -> None:
    assert fsck.check(made.all).findings == []
    asked, done, live = of_quotes(made)
    gone = "DELETE FROM uploads WHERE id = ?"
    for upload in (of_dataset(made, "revoked"), of_dataset(made, "refused"), asked, done):
        with changed(made, gone, upload) as findings:
            assert findings == []
    with changed(made, gone, of_dataset(made, "a")) as findings:
        assert findings == [f"the upload of dataset {dataset_id('a')} is missing or another's"]
    with changed(made, gone, live) as (finding,):
        assert finding.startswith("the model of quote") and "missing or another's" in finding


@pytest.mark.parametrize("column", ["owner", "used_by"])
def test_uploads_are_of_who_uses_them(made: Store, column: str) -> None:
    catalog.enrol(made, OTHER)
    names = [of_dataset(made, name) for name in ("a", "revoked", "refused")]
    for upload in (*names, *of_quotes(made)):
        with changed(made, f"UPDATE uploads SET {column} = ? WHERE id = ?", OTHER.id, upload) as f:
            assert len(f) == 1 and f[0].endswith("is missing or another's"), f


def test_a_training_state_is_of_a_step_within_its_run() -> None:
    store = open_store(SimDisk())
    job = queue(store, "1", (push(store),), event=SMALL)
    ledger.reserve(store, job)
    ledger.begin(store, job)
    for step, sound in ((1, True), (49, True), (50, False), (0, False)):
        ledger.keep_state(store, job, TrainingState(step, f"states/{job}.{step}", b"s" * 32))
        assert (fsck.check(store.all).findings == []) == sound, step
    store.close()


def test_behind_a_gap_nothing_is_believed(made: Store) -> None:
    """One finding, not one for each thing that the rest of the log would have said."""
    with changed(made, "DELETE FROM entries WHERE sequence = 3") as findings:
        assert findings == ["entry 3 of the log is missing"]


OF_A_RESERVED_JOB = {
    "boot": "x'01'",
    "reserved": "1",
    "granted": "1",
    "takeovers": "1",
    "ended": "1",
    "result_digest": "'x'",
    "blob": "'x'",
    "result_key": "x'01'",
    "envelope": "'x'",
    "bundle": "x'01'",
    "state": "'done'",
}


@pytest.mark.parametrize("column", OF_A_RESERVED_JOB)
def test_what_was_never_reserved_has_nothing_of_a_job_that_was(column: str) -> None:
    store = open_store(SimDisk())
    a = push(store)
    jobs = [queue(store, n, (a,), event=SMALL) for n in "xyz"]
    ledger.abandon(store, jobs[1], "cancelled", "job.cancelled")
    ledger.abandon(store, jobs[2], "failed", "job.failed")
    assert fsck.check(store.all).findings == []
    sql = f"UPDATE jobs SET {column} = {OF_A_RESERVED_JOB[column]} WHERE id = ?"
    for job in jobs:
        with changed(store, sql, job) as findings:
            assert any(job in f and "was never reserved" in f for f in findings), findings
    store.close()
