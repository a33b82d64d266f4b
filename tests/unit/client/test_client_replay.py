"""What the writer writes replays to the same ledger; what it cannot have written is refused."""

from __future__ import annotations

import dataclasses
import hashlib

import pytest

from casemate.client.replay import _RULES, replay
from casemate.ledger import catalog, consent, ledger, quotes, recovery
from casemate.spec import codec
from casemate.spec.consent import (
    Consented,
    HandedOver,
    Head,
    Recovered,
    RecoveryConsent,
    Rotated,
    SoftwareConsent,
)
from casemate.spec.data import Budget
from casemate.spec.errors import CasemateError, ReceiptError
from casemate.spec.log import BODIES, Abandoned, Committed, Enrolled, Started, TakenOver
from casemate.spec.receipt import LogEntry
from support import passing, rfc6962, sales
from support.disk import SimDisk
from support.ledgers import (
    OTHER,
    OWNER,
    ask,
    boot,
    changed_policy,
    commit,
    dataset_id,
    open_store,
    push,
    queue,
    run,
)


@pytest.fixture(scope="module")
def life() -> list[bytes]:
    """A ledger's life: two owners, a version, jobs that end in every way, over three boots."""
    disk = SimDisk()
    store = open_store(disk, 1)
    one, two = push(store, "a"), push(store, "b", OTHER)
    run(store, queue(store, "first", (one, two)))
    ledger.reserve(store, queue(store, "failing", (one,)))
    ledger.abandon(store, queue(store, "failing", (one,)), "failed", "job.failed", "")
    push(store, "a2", previous="a")
    sales.deploy(store)
    sales.sell(store)
    catalog.set_policy(store, two, OTHER.id, changed_policy(
        catalog.dataset(store, two).policy, approval="each-quote"))  # fmt: skip
    asked = ask(store, "approved", (two,))
    quotes.judge(store, asked, OTHER.id, "approve")
    catalog.advance_epoch(store, one, OWNER.id, 3)
    job = queue(store, "left", (one,))
    ledger.reserve(store, job)
    ledger.begin(store, job)
    store.close()
    store = open_store(disk, 2)  # takes it over
    ledger.begin(store, job)
    commit(store, job)
    catalog.revoke(store, two, OTHER.id)
    store.close()
    store = open_store(disk, 3)
    out = store.entries(0, 10_000)
    store.close()
    return out


def decoded(leaves: list[bytes]) -> list[tuple[LogEntry, object]]:
    found = [codec.decode(LogEntry, raw) for raw in leaves]
    return [(e, codec.decode(BODIES[e.kind], e.body)) for e in found]


def encoded(entries: list[tuple[LogEntry, object]]) -> list[bytes]:
    """Numbered anew, as a forger would."""
    return [
        codec.encode(dataclasses.replace(e, sequence=i, body=codec.encode(body)))
        for i, (e, body) in enumerate(entries)
    ]


def test_a_whole_life_replays(life):
    found = replay(life)
    assert found.size == len(life)
    kinds = {e.kind for e, _ in decoded(life)}
    assert {"start", "identity", "register", "policy", "epoch", "revoke", "approve", "reserve",
            "takeover", "commit", "abandon", "grant"} <= kinds  # fmt: skip
    assert found.datasets[dataset_id("b")].state == "revoked"
    assert found.datasets[dataset_id("a")].epoch == 3
    assert found.datasets[dataset_id("a2")].lineage == dataset_id("a")
    states = sorted(job.state for job in found.jobs.values())
    assert states == ["committed", "committed", "failed"]
    assert max(job.takeovers for job in found.jobs.values()) == 1
    assert found.debits == 4
    # The writer's own words on what is spent.
    disk = SimDisk()
    store = open_store(disk, 1)
    push(store, "a")
    run(store, queue(store, "first", (dataset_id("a"),)))
    mine = replay(store.entries()).lineages[dataset_id("a")].state
    assert mine == catalog.budget_state(store, dataset_id("a"))


def test_every_kind_of_entry_has_a_rule():
    assert _RULES.keys() == BODIES.keys()


def refused(entries: list[tuple[LogEntry, object]]) -> ReceiptError:
    with pytest.raises(ReceiptError) as caught:
        replay(encoded(entries))
    return caught.value


def test_any_entry_that_is_dropped_doubled_or_moved_is_noticed_or_means_nothing(life):
    """Dropping a word that nothing follows from (an approval) is for the signed head to notice."""
    whole = decoded(life)
    silent = set()
    for at in range(len(whole)):
        for changed in (whole[:at] + whole[at + 1 :], [*whole[:at], whole[at], *whole[at:]]):
            try:
                replay(encoded(changed))
            except ReceiptError:
                continue
            silent.add((whole[at][0].kind, len(changed) - len(whole)))
    assert silent <= {
        ("approve", 1), ("approve", -1), ("policy", 1), ("policy", -1), ("abandon", -1),
        ("epoch", -1), ("revoke", -1), ("commit", -1), ("start", -1), ("register", -1),
        ("identity", -1), ("grant", -1),
    }  # fmt: skip
    assert ("commit", 1) not in silent and ("reserve", 1) not in silent


def lie(kind, **changes):
    """Change the first entry of this kind."""

    def apply(entries):
        at = next(i for i, (e, _) in enumerate(entries) if e.kind == kind)
        entry, body = entries[at]
        return [*entries[:at], (entry, dataclasses.replace(body, **changes)), *entries[at + 1 :]]

    return apply


def less(entries):
    at = next(i for i, (e, _) in enumerate(entries) if e.kind == "reserve")
    entry, body = entries[at]
    nano = (body.charge.rdp_nano[0] - 1, *body.charge.rdp_nano[1:])
    body = dataclasses.replace(body, charge=dataclasses.replace(body.charge, rdp_nano=nano))
    return [*entries[:at], (entry, body), *entries[at + 1 :]]


def without(kind):
    return lambda entries: [pair for pair in entries if pair[0].kind != kind]


def again(kind):
    """The same at the end, by the boot that then runs; a start is its own."""

    def apply(entries):
        entry, body = next(p for p in entries if p[0].kind == kind)
        if kind != "start":
            entry = dataclasses.replace(entry, boot=entries[-1][0].boot)
        return [*entries, (entry, body)]

    return apply


def by(boot_bytes):
    def apply(entries):
        at = next(i for i, (e, _) in enumerate(entries) if e.kind == "commit")
        entry, body = entries[at]
        forged = dataclasses.replace(entry, boot=boot_bytes)
        return [*entries[:at], (forged, body), *entries[at + 1 :]]

    return apply


def takeover_by_itself(entries):
    at = next(i for i, (e, _) in enumerate(entries) if e.kind == "takeover")
    return [*entries[:at], entries[at], *entries[at:]]


def poor(entries):
    """The budget at registration was too small for what was taken."""
    small = Budget(epsilon=0.01, delta=1e-5)
    return [
        (e, dataclasses.replace(b, budget=small) if e.kind == "register" else b) for e, b in entries
    ]


LIES = {
    "commit without reserve": (without("reserve"), "never reserved"),
    "two commits": (again("commit"), "ended before"),
    "a second reservation": (again("reserve"), "second time"),
    "a registration again": (again("register"), "twice"),
    "an identity again": (again("identity"), "twice"),
    "a revocation again": (again("revoke"), "was revoked"),
    "a start again": (again("start"), "started before"),
    "nobody enrolled": (without("identity"), "never enrolled"),
    "nothing registered": (without("register"), "no such dataset"),
    "no start at all": (without("start"), "another boot"),
    "spent above the budget": (poor, "budget"),
    "another owner approves": (lie("approve", owner="id_x"), "not the owner"),
    "a stranger's job": (lie("reserve", scientist="id_x"), "never enrolled"),
    "no debit": (lie("reserve", debits=()), "no ledger"),
    "the epoch goes back": (lie("epoch", epoch=0), "forward"),
    "a version of nothing": (lie("register", lineage=dataset_id("z")), "that there is not"),
    "a commit by another boot": (by(boot(9)), "another boot"),
    "a takeover of its own": (takeover_by_itself, "own job"),
    "a takeover that was dropped": (without("takeover"), "not taken over"),
    "a sale again": (again("grant"), "made twice"),
    "a sale of another name": (lie("grant", sale="sha256:x"), "subject"),
    "a job of another name": (lie("commit", job="job_x"), "subject"),
}  # fmt: skip


@pytest.mark.parametrize("name", LIES)
def test_impossible_sequences_are_refused(name, life):
    apply, words = LIES[name]
    error = refused(apply(decoded(life)))
    assert error.code == "receipt.log-impossible"
    assert words in error.message
    assert error.where.startswith("entry ")


def test_a_charge_that_is_not_what_its_events_cost(life):
    assert refused(less(decoded(life))).code == "receipt.log-charge"


def test_a_revoked_dataset_cannot_be_debited(life):
    whole = decoded(life)
    at = next(i for i, (e, _) in enumerate(whole) if e.kind == "reserve")
    revoke = next(p for p in whole if p[0].kind == "revoke")
    early = (dataclasses.replace(revoke[0], boot=whole[at][0].boot), revoke[1])
    error = refused([*whole[:at], early, *whole[at:]])
    assert "revoked" in error.message and error.where == f"entry {at + 1}"


def test_a_ledger_debited_twice_in_one_job_is_refused(life):
    whole = decoded(life)
    at = next(i for i, (e, _) in enumerate(whole) if e.kind == "reserve")
    entry, body = whole[at]
    twice = dataclasses.replace(body, debits=(body.debits[0], body.debits[0]))
    assert "twice" in refused([*whole[:at], (entry, twice), *whole[at + 1 :]]).message


def test_garbage_is_refused_in_one_shape(life):
    for bad in (b"", b"{}", b"\xff", life[3][:-1], life[3] + b" "):
        with pytest.raises(CasemateError):
            replay([*life[:3], bad])


@pytest.fixture(scope="module")
def passed() -> list[bytes]:
    """A log that was recovered once and whose software changed once, with its owners' words."""
    disk = SimDisk()
    store = passing.started(disk, 1)
    one, two = push(store, "a", passing.owner().public), push(
        store, "b", passing.owner("second").public)  # fmt: skip
    run(store, queue(store, "1", (one, two)))
    left = queue(store, "left", (one,))
    ledger.reserve(store, left)
    store.close()
    store = passing.opened(disk, 2)
    asked = recovery.request(store)
    recovery.recover(store, asked, [passing.to_recovery(asked, one, rest=False)])
    store.close()
    store = passing.started(disk, 3)
    run(store, queue(store, "2", (one,)))
    consent.give(store, passing.to_software(store, one), passing.owner().id)
    store.close()
    store = passing.started(disk, 4, passing.NEW)
    run(store, queue(store, "3", (one,)))
    out = store.entries(0, 10_000)
    store.close()
    return out


def test_a_log_that_was_recovered_and_changed_software_replays(passed):
    found = replay(passed)
    assert [d.state for d in found.datasets.values()] == ["registered", "frozen"]
    assert sorted(j.state for j in found.jobs.values()) == [
        "committed", "committed", "committed", "crashed",
    ]  # fmt: skip
    ((at, body),) = found.recovered
    assert found.key_at(at - 1) == (body.head.origin, None)
    assert found.key_at(at) == (body.origin, body.key)


PASSING_LIES = {
    "no consent to the recovery": (without("consent"), "waits"),
    "a recovery at the end, with no consent": (
        lambda e: e[: 1 + next(i for i, (x, _) in enumerate(e) if x.kind == "recover")],
        "waits for an owner's consent"),
    "a head that was not there": (
        lie("recover", head=Head(origin="x", size=3, root=bytes(32))), "where it says it ended"),
    "another key than the name's": (lie("recover", key=bytes(32)), "not that of its key"),
    "a consent that nobody signed": (lie("consent", sign_key=bytes(32)), "does not hold"),
    "a consent twice": (again("consent"), "does not wait"),
}  # fmt: skip


@pytest.mark.parametrize("name", PASSING_LIES)
def test_what_no_owner_consented_to_is_refused(name, passed):
    apply, words = PASSING_LIES[name]
    error = refused(apply(decoded(passed)))
    assert error.code == "receipt.log-impossible"
    assert words in error.message


# Entries that a forger with the log's key might add; ``True`` where an honest ledger could.


@dataclasses.dataclass
class Forger:
    """A log that was recovered, to which entries are added by hand."""

    leaves: list[bytes]
    boot: bytes

    def add(self, kind, subject, body, boot=None):
        entry = LogEntry(
            sequence=len(self.leaves), boot=boot or self.boot, kind=kind, subject=subject,
            body=codec.encode(body),
        )  # fmt: skip
        self.leaves.append(codec.encode(entry))
        return self

    def start(self, number, measurement=passing.NEW):
        self.boot = boot(number)
        said = Started(software="a test", measurement=measurement, attestation=D)
        return self.add("start", self.boot.hex(), said)

    def consent(self, value, by="owner", shown=None):
        who = passing.owner(by).public
        said = Consented(
            envelope=passing.signed(passing.owner(by), value), sign_key=who.sign_key,
            seal_key=passing.owner(shown or by).public.seal_key,
        )  # fmt: skip
        return self.add("consent", value.dataset, said)

    def handover(self, *dropped, measurement="dd"):
        return self.add(
            "handover", measurement,
            HandedOver(measurement=measurement, request=D, dropped=dropped),
        )  # fmt: skip

    def reserve(self, job="job_new", **changes):
        old = self.body("reserve")
        debits = (dataclasses.replace(old.debits[0], policy=self.policy("a")),)
        body = dataclasses.replace(old, job=job, **({"debits": debits} | changes))
        return self.add("reserve", job, body)

    def body(self, kind, last=False):
        found = [body for e, body in decoded(self.leaves) if e.kind == kind]
        return found[-1 if last else 0]

    def policy(self, name):
        return replay(self.leaves).datasets[dataset_id(name)].policy

    def commit(self, job="job_new"):
        return self.add("commit", job, Committed(job=job, result=D, receipt=D))


D = "sha256:" + "0" * 64
A, B = dataset_id("a"), dataset_id("b")


@pytest.fixture
def forger(passed) -> Forger:
    return Forger(list(passed), boot(4))


def software(forger, measurement="dd", dataset=A):
    origin = forger.body("recover").origin
    trust = "simulated" if measurement else ""
    return SoftwareConsent(origin=origin, dataset=dataset, measurement=measurement, trust=trust)


def recovery_consent(forger, dataset=B, **more):
    said = forger.body("recover")
    return RecoveryConsent(**({"head": said.head, "next": said.origin, "dataset": dataset} | more))


def charge(forger):
    return forger.body("reserve").charge


def debit(forger, **changes):
    whole = forger.body("reserve").debits[0]
    return (dataclasses.replace(whole, policy=forger.policy("a"), **changes),)


MORE = {
    "a job": (lambda f: f.reserve().commit(), None),
    "a rotation": (lambda f: f.add("rotate", "2", Rotated(generation=2)), None),
    "a hand-over": (lambda f: f.handover(B).start(5, "dd"), None),
    "a consent taken back": (
        lambda f: f.consent(software(f)).consent(software(f, "")), None),
    "a consent to what runs": (lambda f: f.consent(software(f, passing.NEW)), None),
    "a recovery's rest": (
        lambda f: f.consent(recovery_consent(f, rest=True), "second"), None),
    "a recovery's charge": (
        lambda f: f.consent(recovery_consent(f, charge=charge(f)), "second"), None),
    "going on after a hand-over": (
        lambda f: f.handover(B).add("identity", "id_n", Enrolled(identity="id_n")), "handed over"),
    "other software after a hand-over": (
        lambda f: f.handover(B).start(5, "ee"), "other software"),
    "dropping what was consented to, under a trust policy that did not hold": (
        lambda f: f.consent(software(f)).handover(A), None),
    "a consent to what runs that a hand-over used": (
        lambda f: f.consent(software(f, passing.NEW)).handover(B, measurement=passing.NEW)
        .start(5).handover(A, measurement=passing.NEW), None),
    "another's consent": (lambda f: f.consent(software(f), "second"), "not the owner"),
    "a consent to another recovery": (
        lambda f: f.consent(recovery_consent(f, next="x"), "second"), "another recovery"),
    "a consent by another filter": (
        lambda f: f.consent(recovery_consent(f, charge=dataclasses.replace(
            charge(f), rdp_nano=(1,))), "second"), "another filter"),
    "a consent in another envelope": (
        lambda f: f.add("consent", A, Consented(
            envelope=passing.signed(passing.owner(), software(f), "text/plain"),
            sign_key=passing.owner().public.sign_key,
            seal_key=passing.owner().public.seal_key)), "does not hold"),
    "a frozen dataset": (
        lambda f: f.reserve(debits=debit(f, dataset=B, lineage=B)), "waits for its owner"),
    "another policy": (lambda f: f.reserve(debits=debit(f) and (dataclasses.replace(
        debit(f)[0], policy=D),)), "another policy"),
    "another epoch": (lambda f: f.reserve(debits=debit(f, epoch=9)), "another policy or epoch"),
    "another ledger": (lambda f: f.reserve(debits=debit(f, lineage=B)), "another ledger"),
    "a commit of what is frozen by then": (
        lambda f: f.reserve().start(5, "ee").add(
            "takeover", "job_new", TakenOver(job="job_new")).commit(), "waits"),
    "a takeover too often": (
        lambda f: [f.reserve(), *(f.start(n).add(
            "takeover", "job_new", TakenOver(job="job_new")) for n in range(5, 9))],
        "too often"),
    "a job from before the recovery taken over": (
        lambda f: before_recovery(f, "takeover"), "before a recovery goes on"),
    "a job from before the recovery committed": (
        lambda f: before_recovery(f, "commit"), "before a recovery is committed"),
    "a committed job abandoned": (
        lambda f: f.reserve().commit().add(
            "abandon", "job_new", Abandoned(job="job_new", reason="failed")), "ended before"),
    "a version under other terms": (
        lambda f: f.add("register", "ds_n", dataclasses.replace(
            f.body("register"), dataset="ds_n", budget=Budget(epsilon=99.0, delta=1e-5))),
        "another owner, budget or filter"),
    "a recovery under the same name": (
        lambda f: f.add("recover", f.body("recover").origin, dataclasses.replace(
            f.body("recover"), head=Head(origin=f.body("recover").origin, size=len(f.leaves),
                                         root=rfc6962.mth(f.leaves)))),
        "under the name it had"),
    "events that cost nothing that can be said": (
        lambda f: f.reserve(delta_shown=0.0), "another amount"),
}  # fmt: skip


def before_recovery(forger, kind):
    """A job that was reserved, then a recovery that leaves it open, then this."""
    forger.reserve()
    head = Head(origin="x", size=len(forger.leaves), root=rfc6962.mth(forger.leaves))
    key = bytes(range(32))
    origin = f"casemate.dev/log/{hashlib.sha256(key).hexdigest()[:32]}"
    forger.add("recover", origin, Recovered(head=head, origin=origin, key=key))
    if kind == "commit":
        return forger.commit()
    forger.consent(RecoveryConsent(head=head, next=origin, dataset=B), "second")
    return forger.start(5).add("takeover", "job_new", TakenOver(job="job_new"))


@pytest.mark.parametrize("name", MORE)
def test_what_a_forger_with_the_logs_key_could_add(name, forger):
    apply, words = MORE[name]
    size = len(forger.leaves)
    apply(forger)
    assert len(forger.leaves) > size
    if words is None:
        assert replay(forger.leaves).size == len(forger.leaves)
        return
    with pytest.raises(ReceiptError) as caught:
        replay(forger.leaves)
    assert words in caught.value.message
    assert caught.value.code == (
        "receipt.log-charge" if words == "another amount" else "receipt.log-impossible"
    )


def test_owners_words_count_in_the_budget(forger):
    used = replay(forger.leaves).lineages[B]
    forger.consent(recovery_consent(forger, rest=True), "second")
    after = replay(forger.leaves).lineages[B]
    assert after.state.left_epsilon == 0.0 < used.state.left_epsilon
    assert not replay(forger.leaves).datasets[B].recovering


def test_a_log_must_begin_with_a_start():
    alone = Forger([], b"").add("abandon", "job", Abandoned(job="job", reason="failed"))
    with pytest.raises(ReceiptError) as caught:
        replay(alone.leaves)
    assert "begins without a start" in caught.value.message


def test_seeded_bug_a_rule_that_says_nothing(life, monkeypatch):
    for kind, name in (("commit", "two commits"), ("revoke", "a revocation again")):
        monkeypatch.setitem(_RULES, kind, lambda *_: iter(()))
        apply, _ = LIES[name]
        replay(encoded(apply(decoded(life))))
        monkeypatch.undo()
