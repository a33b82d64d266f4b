"""What joined the budget rules with the public log: caps per scientist, witnesses, take-over by
another boot, the commit apart from the release, commitments."""

from __future__ import annotations

import base64
import hashlib
from dataclasses import replace

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from casemate.accounting.filters import RdpFilter
from casemate.ledger import catalog, ledger, log, quotes, recovery
from casemate.ledger.ledger import TrainingState
from casemate.ledger.store import MAX_ENTRY, Link, Store
from casemate.seal import checkpoint, note
from casemate.seal.note import Note
from casemate.spec import codec, merkle
from casemate.spec.data import Budget
from casemate.spec.errors import CasemateError, JobError, LedgerError, LimitError, PolicyError
from casemate.spec.job import DpEvent
from casemate.spec.log import Abandoned, Enrolled, Reserved, commitment, dataset_salt
from casemate.spec.receipt import LogEntry
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
    attestation,
    boot,
    commit,
    entries,
    finish,
    open_store,
    person,
    push,
    queue,
    refused,
    run,
    secret,
    taken,
)

SMALL = DpEvent(rate=0.02, noise_multiplier=4.0, steps=50)
CHARGE = RdpFilter(BUDGET).charge((EVENT,), 2e-9, delta_shown=1e-6)
EVENT_NANO = CHARGE.rdp_nano


# A budget for each scientist.

CAP = Budget(epsilon=2.8, delta=1e-5)
CAPPED = replace(OPEN, scientist_budget=CAP)
SECOND = person("second scientist")


def fitting(budget: Budget) -> int:
    """How many EVENT jobs a budget holds, counted without the ledger."""
    count, capacity = 0, RdpFilter(budget).capacity
    while any((count + 1) * n <= c for n, c in zip(EVENT_NANO, capacity, strict=True)):
        count += 1
    return count


def test_each_scientist_has_a_budget_of_their_own(store: Store) -> None:
    dataset = push(store, policy=CAPPED)
    most = fitting(CAP)
    assert 0 < most < fitting(BUDGET)
    for i in range(most):
        run(store, queue(store, f"mine {i}", (dataset,)))
    error = refused("budget.scientist", store, ask(store, "one more", (dataset,)))
    assert error.where == dataset
    theirs = ask(store, "theirs", (dataset,), scientist=SECOND)
    job = ledger.submit(store, theirs, SECOND.id).id
    ledger.reserve(store, job)
    assert taken(store, dataset, SCIENTIST.id).jobs == most
    assert taken(store, dataset, SECOND.id).jobs == 1
    assert taken(store, dataset).jobs == most + 1


def test_what_a_scientists_queued_jobs_will_take_is_held(store: Store) -> None:
    dataset = push(store, policy=CAPPED)
    jobs = [queue(store, f"mine {i}", (dataset,)) for i in range(fitting(CAP))]
    refused("budget.scientist", store, ask(store, "one more", (dataset,)))
    # What another scientist's jobs hold is not mine.
    ledger.submit(store, ask(store, "theirs", (dataset,), scientist=SECOND), SECOND.id)
    ledger.abandon(store, jobs[0], "cancelled", "job.cancelled")
    queue(store, "instead", (dataset,))


def test_the_datasets_budget_stands_above_those_of_scientists(store: Store) -> None:
    dataset = push(store, policy=replace(OPEN, scientist_budget=replace(BUDGET, epsilon=900.0)))
    for i in range(fitting(BUDGET)):
        queue(store, str(i), (dataset,))
    refused("budget.exhausted", store, ask(store, "more", (dataset,), scientist=SECOND), SECOND)


def test_a_later_cap_counts_what_was_spent_before_it(store: Store) -> None:
    dataset = push(store)
    for i in range(fitting(CAP)):
        run(store, queue(store, str(i), (dataset,)))
    catalog.set_policy(store, dataset, OWNER.id, CAPPED)
    refused("budget.scientist", store, ask(store, "late", (dataset,)))
    theirs = ask(store, "theirs", (dataset,), scientist=SECOND)
    assert ledger.submit(store, theirs, SECOND.id).state == "queued"


def test_a_cap_on_extra_delta(store: Store) -> None:
    dataset = push(store, policy=replace(OPEN, scientist_budget=replace(BUDGET, delta=1e-6)))
    extra = {"delta": 1e-5, "extra": 6e-8}
    refused("budget.scientist", store, ask(store, "1", (dataset,), event=SMALL, **extra))
    queue(store, "2", (dataset,), event=SMALL, delta=1e-5, extra=4e-8)


def test_a_version_does_not_start_a_scientists_budget_anew(store: Store) -> None:
    first = push(store, "a", policy=CAPPED)
    for i in range(fitting(CAP)):
        run(store, queue(store, str(i), (first,)))
    second = push(store, "b", policy=CAPPED, previous="a")
    refused("budget.scientist", store, ask(store, "more", (second,)))


# Witnesses.

W1, W2, W3 = (Witness(f"witness.test/{i}") for i in range(3))
TWO_OF_THREE = replace(OPEN, witnesses=(W1.vkey, W2.vkey, W3.vkey), cosignatures=2)


def not_witnessed(action) -> None:
    with pytest.raises(JobError) as e:
        action()
    assert (e.value.code, e.value.status) == ("job.not-witnessed", 503)


def test_keys_and_results_wait_for_k_of_n_witnesses(store: Store) -> None:
    datasets = push(store, "a", policy=TWO_OF_THREE), push(store, "b", OTHER)
    assert catalog.witnesses(store) == {w.vkey for w in (W1, W2, W3)}
    job = queue(store, "1", datasets, event=SMALL)
    W1.cosign(store)
    W2.cosign(store)
    ledger.reserve(store, job)
    not_witnessed(lambda: ledger.begin(store, job))  # both saw the log before the reservation
    W1.cosign(store)
    not_witnessed(lambda: ledger.begin(store, job))
    assert ledger.job(store, job).state == "reserved"
    W3.cosign(store)
    ledger.begin(store, job)
    committed = commit(store, job)
    sealed = b"sealed"
    not_witnessed(lambda: ledger.release(store, job, log.sign(store), sealed))
    W2.cosign(store)
    not_witnessed(lambda: ledger.release(store, job, log.sign(store), sealed))
    with pytest.raises(JobError, match=r"job\.not-done"):
        ledger.bundle(store, job)
    W3.cosign(store)
    made = ledger.release(store, job, log.sign(store), sealed)
    proof = checkpoint.read_proof(made.proof)
    head = checkpoint.verify_proof(proof, made.entry, log.key(store).verifier)
    assert (proof.place, head.size) == (committed.sequence, store.size())
    cosigned = note.verify(proof.signed, [w.verifier for w in (W1, W2, W3)])
    assert set(cosigned) == {W2.verifier, W3.verifier}


def test_each_datasets_own_witnesses_count(store: Store) -> None:
    one = replace(OPEN, witnesses=(W1.vkey,), cosignatures=1)
    other = replace(OPEN, witnesses=(W2.vkey,), cosignatures=1)
    job = queue(store, "1", (push(store, "a", policy=one), push(store, "b", OTHER, other)))
    ledger.reserve(store, job)
    W1.cosign(store)
    not_witnessed(lambda: ledger.begin(store, job))
    W2.cosign(store)
    ledger.begin(store, job)


def test_a_job_taken_over_is_witnessed_again(store: Store) -> None:
    job = queue(store, "1", (push(store, policy=replace(TWO_OF_THREE)),))
    ledger.reserve(store, job)
    W1.cosign(store)
    W2.cosign(store)
    store.boot = boot(2)
    recovery.start(store, attestation(store), software="a test", measurement="00")
    assert ledger.job(store, job).takeovers == 1
    not_witnessed(lambda: ledger.begin(store, job))
    W1.cosign(store)
    W3.cosign(store)
    ledger.begin(store, job)


def foreign(store: Store, **changes: object) -> Note:
    """A checkpoint of another log, or key, or size, or root, cosigned by W1."""
    mine = log.key(store)
    head = replace(log.head(store), **changes)
    private = mine.private
    if "origin" in changes:
        private = Ed25519PrivateKey.generate()
    public = private.public_key().public_bytes_raw()
    return W1.sign(checkpoint.sign(head, public, private.sign))


def test_what_a_witness_said_of_another_checkpoint_does_not_count(store: Store) -> None:
    job = queue(
        store, "1", (push(store, policy=replace(OPEN, witnesses=(W1.vkey,), cosignatures=1)),)
    )
    ledger.reserve(store, job)
    size = store.size()
    cases = (
        ("receipt.note-unsigned", foreign(store, origin="another.test/log")),
        ("ledger.rolled-back", foreign(store, root=b"x" * 32)),
        ("ledger.rolled-back", foreign(store, size=size + 1)),
        ("ledger.rolled-back", foreign(store, size=size - 1)),
    )
    for code, signed in cases:
        with pytest.raises(CasemateError) as e:
            log.cosign(store, signed, [W1.verifier])
        assert e.value.code == code
    # Another witness's word, or one on another text, is no word of this one.
    log.cosign(store, W2.sign(log.sign(store)), [W1.verifier])
    other = W1.sign(foreign(store, size=size - 1, root=merkle.root(size - 1, store.node))).lines
    moved = log.sign(store).add(line for line in other if line.name == W1.name)
    with pytest.raises(CasemateError, match=r"receipt\.note-signature"):
        log.cosign(store, moved, [W1.verifier])
    # One on an earlier size of this very log counts for what stood there, and that is not the job.
    log.cosign(
        store, foreign(store, size=size - 1, root=merkle.root(size - 1, store.node)), [W1.verifier]
    )
    not_witnessed(lambda: ledger.begin(store, job))
    W1.cosign(store)
    ledger.begin(store, job)


def test_an_older_cosignature_never_replaces_a_newer_one(store: Store) -> None:
    push(store)
    W1.cosign(store)
    size = store.size()
    old = foreign(store, size=size - 2, root=merkle.root(size - 2, store.node))
    assert log.cosign(store, old, [W1.verifier]).size == size - 2
    assert store.all("SELECT size FROM cosignatures") == [(size,)]
    assert log.cosigned(store, [W1.vkey, W2.vkey], size - 1) == 1
    assert log.cosigned(store, [W1.vkey], size) == 0
    signed = log.sign(store)
    assert note.verify(signed, [W1.verifier]) == {W1.verifier: 1}
    catalog.enrol(store, SECOND)
    assert len(log.sign(store).lines) == 1  # it stands on an earlier head than this


def test_a_checkpoint_that_the_state_does_not_extend_is_found(store: Store) -> None:
    push(store)
    seen = log.sign(store)
    push(store, "b")
    assert log.check(store, seen).size < store.size()
    older = open_store(SimDisk())
    older.run("UPDATE log_keys SET key = ?, origin = ?", *log_key(store))
    with pytest.raises(LedgerError) as e:
        log.check(older, seen)
    assert (e.value.code, e.value.where) == ("ledger.rolled-back", log.key(store).origin)
    older.close()


def log_key(store: Store) -> tuple[bytes, str]:
    return store.one("SELECT key, origin FROM log_keys")


def test_a_policys_witnesses_are_different_keys_and_more_than_half_sign() -> None:
    for keys, count in (
        ((W1.vkey,) * 2, 2),
        ((W1.vkey, W2.vkey), 1),
        ((W1.vkey,), 2),
        ((), 1),
        ((W1.vkey,), 0),
    ):
        with pytest.raises(ValueError, match="witnesses"):
            replace(OPEN, witnesses=keys, cosignatures=count)
    renamed = "other" + W1.vkey
    with pytest.raises(ValueError, match="different keys"):
        replace(OPEN, witnesses=(W1.vkey, renamed), cosignatures=2)
    many = tuple(Witness(f"w/{i}").vkey for i in range(17))
    with pytest.raises(ValueError, match="at most 16"):
        replace(OPEN, witnesses=many, cosignatures=17)
    replace(OPEN, witnesses=many[:16], cosignatures=9)


# Another boot goes on.


def restart(store: Store, number: int) -> None:
    store.boot = boot(number)
    recovery.start(store, attestation(store), software="a test", measurement="00")


@pytest.mark.parametrize("resumes", [0, 1, 3])
def test_a_job_is_gone_on_with_as_often_as_its_policies_allow(store: Store, resumes: int) -> None:
    datasets = push(store, "a", policy=replace(OPEN, resumes=resumes)), push(store, "b", OTHER)
    job = queue(store, "1", datasets)
    ledger.reserve(store, job)
    spent = taken(store, datasets[0])
    for number in range(2, 2 + resumes):
        ledger.begin(store, job)
        restart(store, number)
        found = ledger.job(store, job)
        assert (found.state, found.boot, found.takeovers) == ("reserved", boot(number), number - 1)
        assert entries(store, found.granted)[0].kind == "takeover"
    ledger.begin(store, job)
    restart(store, 9)
    found = ledger.job(store, job)
    assert (found.state, found.error) == ("abandoned", "job.abandoned")
    body = codec.decode(Abandoned, entries(store, found.ended)[0].body)
    assert body == Abandoned(job=job, reason="crashed")
    assert taken(store, datasets[0]) == spent


def test_never_two_boots(store: Store) -> None:
    job = queue(store, "1", (push(store),))
    ledger.reserve(store, job)
    ledger.begin(store, job)
    restart(store, 2)
    store.boot = boot(1)  # the branch that the first boot still runs
    for action in (
        lambda: ledger.begin(store, job),
        lambda: commit(store, job),
        lambda: ledger.keep_state(store, job, TrainingState(1, "x", bytes(32))),
    ):
        with pytest.raises(JobError, match=r"job\.state"):
            action()
    store.boot = boot(2)
    ledger.begin(store, job)
    finish(store, job)
    restart(store, 3)
    assert ledger.job(store, job).state == "done"  # what has ended is not gone on with


def test_a_committed_result_outlives_the_boot_and_no_other_takes_its_place(store: Store) -> None:
    job = queue(store, "1", (push(store),))
    ledger.reserve(store, job)
    ledger.begin(store, job)
    link = commit(store, job)
    restart(store, 2)
    found = ledger.job(store, job)
    assert (found.state, found.takeovers, found.boot) == ("committed", 0, boot(1))
    assert [j.id for j in ledger.unfinished(store)] == [job]
    for action in (
        lambda: ledger.begin(store, job),
        lambda: other_commit(store, job),
    ):
        with pytest.raises(JobError, match=r"job\.state"):
            action()
    assert ledger.release(store, job, log.sign(store), b"s").entry == link.entry
    assert ledger.unfinished(store) == []


def other_commit(store: Store, job: str) -> Link:
    return ledger.commit(
        store, job, result_digest="sha256:" + "0" * 64, blob="x", result_key=b"", envelope=""
    )


# Commit, then release.


def test_a_commit_is_idempotent_and_shows_nothing(store: Store) -> None:
    job = queue(store, "1", (push(store),))
    ledger.reserve(store, job)
    ledger.begin(store, job)
    link = commit(store, job)
    size = store.size()
    assert commit(store, job) == link
    with pytest.raises(JobError, match=r"job\.state"):
        other_commit(store, job)
    with pytest.raises(JobError, match=r"job\.not-done"):
        ledger.bundle(store, job)
    assert store.size() == size
    assert ledger.result_key(store, job) == hashlib.sha256(job.encode()).digest()
    made = ledger.release(store, job, log.sign(store), b"sealed to the scientist")
    assert (
        ledger.release(store, job, log.sign(store), b"again") == made == ledger.bundle(store, job)
    )
    assert ledger.result_key(store, job) == b"sealed to the scientist"
    assert commit(store, job) == link
    assert store.size() == size


def test_nothing_is_released_that_was_not_committed(store: Store) -> None:
    job = queue(store, "1", (push(store),))
    for step in (
        lambda: ledger.reserve(store, job),
        lambda: ledger.begin(store, job),
        lambda: None,
    ):
        with pytest.raises(JobError, match=r"job\.state"):
            ledger.release(store, job, log.sign(store), b"s")
        with pytest.raises(JobError, match=r"job\.not-done"):
            ledger.result_key(store, job)
        step()


def test_a_checkpoint_before_the_commit_does_not_release(store: Store) -> None:
    job = queue(store, "1", (push(store),))
    ledger.reserve(store, job)
    ledger.begin(store, job)
    before = log.sign(store)
    commit(store, job)
    with pytest.raises(JobError, match=r"job\.state"):
        ledger.release(store, job, before, b"s")
    with pytest.raises(CasemateError, match=r"receipt\.note"):
        ledger.release(store, job, foreign(store, origin="another.test/log"), b"s")
    ledger.release(store, job, log.sign(store), b"s")


def test_an_owner_who_revokes_between_commit_and_release_is_heard(store: Store) -> None:
    dataset = push(store)
    job = queue(store, "1", (dataset, push(store, "b", OTHER)))
    ledger.reserve(store, job)
    ledger.begin(store, job)
    commit(store, job)
    # Nothing else undoes a commit.
    assert ledger.abandon(store, job, "cancelled", "job.cancelled").state == "committed"
    catalog.revoke(store, dataset, OWNER.id)
    with pytest.raises(PolicyError) as e:
        ledger.release(store, job, log.sign(store), b"s")
    assert (e.value.code, e.value.where) == ("policy.revoked", dataset)
    ended = ledger.abandon(store, job, "failed", "policy.revoked")
    assert (ended.state, ended.blob, ended.result_digest) == ("failed", None, None)
    assert store.all("SELECT result_key, envelope, bundle FROM jobs") == [(None, None, None)]
    assert entries(store, ended.ended)[0].kind == "abandon"
    with pytest.raises(JobError):
        ledger.release(store, job, log.sign(store), b"s")


# The log is public.


def test_no_digest_of_plaintext_stands_in_the_log(store: Store) -> None:
    policy = replace(OPEN, approval="each-quote", nonprivate="It is all public.")
    dataset, other = push(store, "a", policy=policy), push(store, "b", OTHER)
    quoted = ask(store, "1", (dataset, other))
    quotes.judge(store, quoted, OWNER.id, "approve")
    job = ledger.submit(store, quoted, SCIENTIST.id).id
    made = run(store, job)
    catalog.set_policy(store, dataset, OWNER.id, OPEN)
    stored = quotes.get(store, quoted)
    request, plan = stored.quote.request, stored.quote.plan
    schema = catalog.dataset(store, dataset).registration.schema
    digests = [codec.digest(x) for x in (schema, policy, OPEN, stored.quote, request, plan)]
    digests += [request.model_digest, ledger.job(store, job).result_digest]
    digests.append("sha256:" + hashlib.sha256(made.envelope.encode()).hexdigest())
    shown = b"".join(store.entries()) + b"".join(e.body for e in entries(store))
    for digest in digests:
        raw = bytes.fromhex(digest[7:])
        forms = (raw, raw.hex().encode(), raw.hex().upper().encode())
        forms += (base64.b64encode(raw), base64.urlsafe_b64encode(raw).rstrip(b"="))
        assert not any(form in shown for form in forms)
        # Nor under no salt, or one that anyone knows.
        for salt in (bytes(32), b"", hashlib.sha256(dataset.encode()).digest()):
            guess = hashlib.sha256(b"casemate/log/v1\0" + salt + digest.encode()).hexdigest()
            assert guess.encode() not in shown
    reserved = codec.decode(Reserved, entries(store, ledger.job(store, job).reserved)[0].body)
    assert reserved.quote == commitment(stored.salt, quoted)
    assert reserved.plan == commitment(stored.salt, codec.digest(plan))
    assert reserved.debits[0].policy == commitment(dataset_salt(secret("a").salt), digests[1])
    assert made.salt == stored.salt != catalog.dataset(store, dataset).salt


def test_each_job_has_a_salt_of_its_own(store: Store) -> None:
    dataset = push(store)
    salts = {quotes.get(store, ask(store, str(i), (dataset,))).salt for i in range(5)}
    assert len(salts) == 5
    assert all(len(salt) == 32 for salt in salts)


def test_an_entry_that_no_tile_can_hold_is_refused_and_leaves_nothing(store: Store) -> None:
    size = store.size()
    body = Enrolled(identity="")
    entry = LogEntry(
        sequence=size, boot=store.boot, kind="identity", subject="", body=codec.encode(body)
    )
    least = len(codec.encode(entry))
    too_long = "x" * (MAX_ENTRY - least + 1)
    with pytest.raises(LimitError) as e, store.transaction():
        store.append("identity", too_long, body)
    assert (e.value.code, e.value.where) == ("limit.entry", too_long)
    assert store.size() == size
    with pytest.raises(KeyError), store.transaction():
        link = store.append("identity", too_long[1:], body)
        assert (link.sequence, len(link.entry)) == (size, MAX_ENTRY)
        raise KeyError
    assert store.size() == size


def test_an_entry_is_appended_inside_a_transaction_only(store: Store) -> None:
    with pytest.raises(RuntimeError, match="inside a transaction"):
        store.append("identity", "x", Enrolled(identity="x"))
    with store.transaction(), pytest.raises(RuntimeError, match="do not nest"):
        catalog.enrol(store, SECOND)


def test_where_enough_witnesses_stand_on_one_checkpoint(store: Store) -> None:
    """Cosignatures of two checkpoints do not add up, though each is over the entry."""
    policy = replace(OPEN, witnesses=(W1.vkey, W2.vkey, W3.vkey), cosignatures=2)
    job = queue(store, "1", (push(store, policy=policy),))
    free = queue(store, "2", (push(store, "b"),))
    at = store.size() - 1
    assert ledger.cosigned_at(store, free, at) == store.size()
    assert ledger.cosigned_at(store, job, at) is None
    W1.cosign(store)
    assert ledger.cosigned_at(store, job, at) is None
    first = store.size()
    catalog.enrol(store, person("one more"))
    W2.cosign(store)
    assert ledger.cosigned_at(store, job, at) is None
    W3.cosign(store)
    assert ledger.cosigned_at(store, job, at) == store.size() > first
    assert ledger.cosigned_at(store, job, store.size()) is None
