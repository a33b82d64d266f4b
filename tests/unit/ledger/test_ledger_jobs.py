"""The budget rules of a job's life."""

from __future__ import annotations

from dataclasses import replace

import pytest

from casemate.accounting.filters import RdpFilter
from casemate.ledger import catalog, ledger, quotes
from casemate.ledger.catalog import Account
from casemate.ledger.store import Store
from casemate.spec import codec
from casemate.spec.errors import (
    BudgetError,
    CasemateError,
    InternalError,
    JobError,
    PlanError,
    PolicyError,
)
from casemate.spec.job import DpEvent
from casemate.spec.log import Reserved
from support.ledgers import (
    BUDGET,
    EVENT,
    OPEN,
    OTHER,
    OWNER,
    SCIENTIST,
    ask,
    entries,
    finish,
    hexes,
    make_quote,
    person,
    push,
    queue,
    receipt,
    refused,
    register,
    run,
    secret,
    taken,
)

SMALL = DpEvent(rate=0.02, noise_multiplier=4.0, steps=50)
CHARGE = RdpFilter(BUDGET).charge((EVENT,), 2e-9, delta_shown=1e-6)
EVENT_NANO = CHARGE.rdp_nano
NOTHING = Account((0,) * len(EVENT_NANO), 0, 0)


def test_a_job_from_submit_to_commit(store: Store) -> None:
    dataset = push(store)
    job = queue(store, "1", (dataset,))
    assert ledger.next_queued(store).id == job
    assert taken(store, dataset) == NOTHING
    link = ledger.reserve(store, job)
    assert taken(store, dataset) == NOTHING.add(CHARGE)
    assert taken(store, dataset).jobs == 1
    (entry,) = entries(store, link.sequence)
    assert (entry.kind, entry.subject, entry.boot) == ("reserve", job, store.boot)
    assert codec.decode(Reserved, entry.body).events == (EVENT,)
    (opened,) = ledger.begin(store, job)
    assert (opened.key, opened.salt) == (secret("a").key, secret("a").salt)
    with pytest.raises(JobError, match=r"job\.not-done"):
        ledger.bundle(store, job)
    made = finish(store, job)
    done = ledger.job(store, job)
    assert (done.state, done.ended, done.blob) == ("done", store.size() - 1, f"results/{job}")
    assert made.envelope == receipt(store, job, done.result_digest)
    assert made.entry == store.entries(done.ended)[0]
    assert ledger.bundle(store, job) == made
    assert ledger.next_queued(store) is None
    assert [j.id for j in ledger.jobs(store, OWNER.id)] == [job]
    assert [j.id for j in ledger.jobs(store, SCIENTIST.id)] == [job]
    assert ledger.jobs(store, OTHER.id) == []


def test_submitting_again_is_the_same_job(store: Store) -> None:
    dataset = push(store)
    quote = ask(store, "1", (dataset,))
    first = ledger.submit(store, quote, SCIENTIST.id)
    assert ledger.submit(store, quote, SCIENTIST.id) == first
    run(store, first.id)
    size = store.size()
    assert ledger.submit(store, quote, SCIENTIST.id).state == "done"
    assert store.size() == size


def test_a_job_id_with_another_body_is_refused(store: Store) -> None:
    dataset = push(store)
    queue(store, "1", (dataset,))
    other = ask(store, "1", (dataset,), event=SMALL)
    refused("job.id-reused", store, other)


def test_reserving_again_gives_the_same_answer_and_charges_once(store: Store) -> None:
    dataset = push(store)
    job = queue(store, "1", (dataset,))
    entry = ledger.reserve(store, job)
    assert ledger.reserve(store, job) == entry
    finished = run(store, job)
    assert ledger.reserve(store, job) == entry
    assert taken(store, dataset).jobs == 1
    assert finish(store, job) == finished


def test_keys_come_once_and_only_for_a_reserved_job(store: Store) -> None:
    dataset = push(store)
    job = queue(store, "1", (dataset,))
    with pytest.raises(JobError, match=r"job\.state"):
        ledger.begin(store, job)
    ledger.reserve(store, job)
    ledger.begin(store, job)
    with pytest.raises(JobError, match=r"job\.state"):
        ledger.begin(store, job)
    with pytest.raises(CasemateError, match=r"data\.unknown-dataset"):
        catalog.checking_key(store, dataset)


def test_a_commit_needs_a_running_job_and_one_result(store: Store) -> None:
    dataset = push(store)
    job = queue(store, "1", (dataset,))
    ledger.reserve(store, job)
    with pytest.raises(JobError, match=r"job\.state"):
        finish(store, job)
    ledger.begin(store, job)
    finish(store, job)
    with pytest.raises(JobError, match=r"job\.state"):
        ledger.commit(
            store, job, result_digest="sha256:other", blob="x", result_key=b"", envelope=""
        )


@pytest.mark.parametrize("state", ["failed", "cancelled"])
def test_abandoning_never_refunds(store: Store, state) -> None:
    dataset = push(store)
    job = queue(store, "1", (dataset,))
    ledger.reserve(store, job)
    before = taken(store, dataset)
    ledger.begin(store, job)
    ended = ledger.abandon(store, job, state, "job.cancelled", "why")
    assert (ended.state, ended.error, ended.message) == (state, "job.cancelled", "why")
    assert taken(store, dataset) == before
    assert entries(store, ended.ended)[0].kind == "abandon"
    assert ledger.abandon(store, job, "failed", "job.failed") == ended
    with pytest.raises(JobError, match=r"job\.state"):
        finish(store, job)


def test_a_job_cancelled_in_the_queue_costs_nothing(store: Store) -> None:
    dataset = push(store)
    job = queue(store, "1", (dataset,))
    assert ledger.abandon(store, job, "cancelled", "job.cancelled").ended is None
    assert taken(store, dataset) == NOTHING
    with pytest.raises(JobError, match=r"job\.state"):
        ledger.reserve(store, job)


def test_queued_jobs_hold_the_budget_that_they_will_take(store: Store) -> None:
    dataset = push(store)
    jobs = []
    with pytest.raises(BudgetError) as e:
        for i in range(100):
            jobs.append(queue(store, str(i), (dataset,)))
    assert e.value.code == "budget.exhausted"
    assert 1 < len(jobs) < 99
    for job in jobs:
        ledger.reserve(store, job)
    capacity, spent = RdpFilter(BUDGET).capacity, taken(store, dataset)
    assert spent.jobs == len(jobs)
    assert any(s <= c for s, c in zip(spent.rdp_nano, capacity, strict=True))
    more = spent.add(CHARGE).rdp_nano
    assert all(s > c for s, c in zip(more, capacity, strict=True))


def test_what_a_cancelled_job_held_is_free_again(store: Store) -> None:
    dataset = push(store)
    jobs = []
    with pytest.raises(BudgetError):
        for i in range(100):
            jobs.append(queue(store, str(i), (dataset,)))
    ledger.abandon(store, jobs[0], "cancelled", "job.cancelled")
    queue(store, "late", (dataset,))
    refused("budget.exhausted", store, ask(store, "later", (dataset,)))


def test_a_job_that_does_not_fit_one_dataset_debits_none(store: Store) -> None:
    small = push(store, "a", budget=replace(BUDGET, epsilon=1.0))
    large = push(store, "b", OTHER)
    quote = ask(store, "1", (large, small))
    error = refused("budget.exhausted", store, quote)
    assert error.where == small
    assert taken(store, large) == taken(store, small) == NOTHING


def test_extra_delta_has_a_budget_of_its_own(store: Store) -> None:
    dataset = push(store)
    extra = {"delta": 1e-2, "extra": 6e-7}
    refused("budget.exhausted", store, ask(store, "1", (dataset,), event=SMALL, **extra))
    queue(store, "2", (dataset,), event=SMALL, delta=1e-5, extra=4e-7)


def test_versions_share_one_ledger(store: Store) -> None:
    first = push(store, "a")
    second = push(store, "b", previous="a")
    third = push(store, "c", previous="b")
    run(store, queue(store, "1", (third,)))
    assert taken(store, first) == taken(store, second) == taken(store, third)
    assert taken(store, first).jobs == 1
    refused("plan.same-lineage", store, ask(store, "2", (first, second), event=SMALL))
    with pytest.raises(BudgetError, match=r"budget\.lineage"):
        push(store, "d", previous="a", budget=replace(BUDGET, epsilon=5.0))
    with pytest.raises(CasemateError, match=r"data\.unknown-dataset"):
        push(store, "e", OTHER, previous="a")


POLICIES = [
    ("policy.not-admitted", replace(OPEN, scientists=(OTHER.id,))),
    ("policy.evaluation-only", replace(OPEN, evaluation=True)),
    ("policy.max-epsilon", replace(OPEN, max_epsilon=1.0)),
    ("policy.not-approved", replace(OPEN, approval="each-quote")),
]


@pytest.mark.parametrize(("code", "policy"), POLICIES)
def test_policies_are_enforced(store: Store, code: str, policy) -> None:
    dataset = push(store, policy=policy)
    refused(code, store, ask(store, "1", (dataset,)))


def test_a_large_delta_does_not_pass_the_limit_of_one_job(store: Store) -> None:
    shown = RdpFilter(BUDGET).charge((EVENT,), 2e-9, delta_shown=0.01).epsilon
    dataset = push(store, policy=replace(OPEN, max_epsilon=shown * 1.001))
    refused("policy.max-epsilon", store, ask(store, "1", (dataset,), delta=0.01))


def test_training_without_privacy_needs_the_owners_words(store: Store) -> None:
    words = "This table is public."
    private, public = push(store), push(store, "b", policy=replace(OPEN, nonprivate=words))
    refused("policy.private-only", store, ask(store, "1", (private,), words=words))
    refused("policy.private-only", store, ask(store, "2", (public,), words="It is all public."))
    run(store, queue(store, "3", (public,), words=words))
    assert taken(store, public) == replace(NOTHING, jobs=1)


def test_an_epoch_expires_and_stale_quotes_are_void(store: Store) -> None:
    dataset = push(store, policy=replace(OPEN, last_epoch=1))
    quote, job = ask(store, "1", (dataset,)), queue(store, "2", (dataset,), event=SMALL)
    assert catalog.advance_epoch(store, dataset, OWNER.id, 1).epoch == 1
    refused("policy.stale-epoch", store, quote)
    assert ledger.job(store, job).error == "policy.stale-epoch"
    with pytest.raises(PolicyError, match=r"policy\.epoch-back"):
        catalog.advance_epoch(store, dataset, OWNER.id, 0)
    queue(store, "3", (dataset,), event=SMALL)
    catalog.advance_epoch(store, dataset, OWNER.id, 2)
    refused("policy.expired", store, ask(store, "4", (dataset,)))


def test_approval_is_by_quote_and_the_last_word_counts(store: Store) -> None:
    policy = replace(OPEN, approval="each-quote")
    datasets = push(store, policy=policy), push(store, "b", OTHER, policy)
    quote = ask(store, "1", datasets)
    assert [q.digest for q in quotes.waiting_for(store, OWNER.id)] == [quote]
    quotes.judge(store, quote, OWNER.id, "approve")
    assert quotes.waiting_for(store, OWNER.id) == []
    refused("policy.not-approved", store, quote)
    quotes.judge(store, quote, OTHER.id, "reject")
    refused("policy.rejected", store, quote)
    quotes.judge(store, quote, OTHER.id, "approve")
    job = ledger.submit(store, quote, SCIENTIST.id)
    quotes.judge(store, quote, OWNER.id, "reject")
    assert ledger.job(store, job.id).error == "policy.rejected"
    for stranger in (SCIENTIST, person("stranger")):
        with pytest.raises(PlanError, match=r"plan\.unknown-quote"):
            quotes.judge(store, quote, stranger.id, "approve")


def test_a_new_policy_voids_quotes_approvals_and_queued_jobs(store: Store) -> None:
    policy = replace(OPEN, approval="each-quote")
    dataset = push(store, policy=policy)
    quote = ask(store, "1", (dataset,))
    quotes.judge(store, quote, OWNER.id, "approve")
    job = ledger.submit(store, quote, SCIENTIST.id)
    catalog.set_policy(store, dataset, OWNER.id, replace(policy, max_epsilon=3.0))
    assert ledger.job(store, job.id).error == "policy.changed"
    with pytest.raises(PolicyError, match=r"policy\.changed"):
        quotes.judge(store, quote, OWNER.id, "approve")
    # Back under the first policy the same quote can be asked for again, but not its approval.
    catalog.set_policy(store, dataset, OWNER.id, policy)
    again, submission = make_quote(store, "2", (dataset,))
    digest = quotes.add(store, again, submission, b"m" * 32)
    refused("policy.not-approved", store, digest)
    with pytest.raises(CasemateError, match=r"data\.unknown-dataset"):
        catalog.set_policy(store, dataset, OTHER.id, OPEN)


def test_a_void_quote_comes_back_without_its_approval(store: Store) -> None:
    policy = replace(OPEN, approval="each-quote")
    dataset = push(store, policy=policy)
    quote, submission = make_quote(store, "1", (dataset,))
    digest = quotes.add(store, quote, submission, b"m" * 32)
    quotes.judge(store, digest, OWNER.id, "approve")
    catalog.set_policy(store, dataset, OWNER.id, OPEN)
    catalog.set_policy(store, dataset, OWNER.id, policy)
    refused("policy.changed", store, digest)
    assert quotes.add(store, quote, submission, b"m" * 32) == digest
    refused("policy.not-approved", store, digest)


def test_revoking_destroys_the_key_and_stops_commits(store: Store) -> None:
    dataset, other = push(store), push(store, "b", OTHER)
    running = queue(store, "1", (dataset, other), event=SMALL)
    reserved = queue(store, "2", (dataset, other), event=SMALL)
    waiting = queue(store, "3", (dataset, other), event=SMALL)
    ledger.reserve(store, running)
    ledger.begin(store, running)
    ledger.reserve(store, reserved)
    assert catalog.revoke(store, dataset, OWNER.id).state == "revoked"
    size = store.size()
    assert catalog.revoke(store, dataset, OWNER.id).state == "revoked"
    assert store.size() == size
    assert store.all("SELECT dataset FROM dataset_keys") == [(other,)]
    with pytest.raises(PolicyError, match=r"policy\.revoked"):
        finish(store, running)
    with pytest.raises(PolicyError, match=r"policy\.revoked"):
        ledger.begin(store, reserved)
    assert ledger.job(store, waiting).error == "policy.revoked"
    for job in (running, reserved):
        ledger.abandon(store, job, "failed", "policy.revoked")
    refused("policy.revoked", store, ask(store, "4", (dataset,)))
    for change in (
        lambda: catalog.set_policy(store, dataset, OWNER.id, OPEN),
        lambda: catalog.advance_epoch(store, dataset, OWNER.id, 5),
    ):
        with pytest.raises(PolicyError, match=r"policy\.revoked"):
            change()


def test_a_dataset_that_is_not_checked_does_not_serve(store: Store) -> None:
    dataset = push(store)
    store.run("UPDATE datasets SET state = 'checking'")
    assert catalog.checking_key(store, dataset) == secret("a")
    refused("policy.checking", store, ask(store, "1", (dataset,)))
    assert catalog.settle(store, dataset, "data.bounds").state == "refused"
    assert catalog.settle(store, dataset, None).state == "refused"
    assert store.all("SELECT * FROM dataset_keys") == []
    refused("policy.refused", store, ask(store, "2", (dataset,)))


def test_registering_again_changes_nothing(store: Store) -> None:
    dataset = push(store)
    found = catalog.dataset(store, dataset)
    size = store.size()
    assert catalog.register(store, found.registration, secret("a")) == found
    assert store.size() == size
    other = replace(found.registration, budget=replace(BUDGET, epsilon=8.0))
    with pytest.raises(PolicyError, match=r"policy\.dataset-taken"):
        catalog.register(store, other, secret("a"))
    again = replace(found.registration, dataset="ds_" + hexes("z", 40))
    with pytest.raises(CasemateError, match=r"data\.upload-used"):
        catalog.register(store, again, secret("z"))


def test_two_quotes_of_one_model_do_not_share_an_upload(store: Store) -> None:
    """Its bytes go when the first's job ends; a store that lacked those of the second's would not
    start again."""
    dataset = push(store)
    first, given = make_quote(store, "1", (dataset,))
    other, more = make_quote(store, "2", (dataset,))
    request = replace(other.request, model_digest=first.request.model_digest)
    other = replace(other, request=request)
    quotes.add(store, first, given, b"m" * 32)
    with pytest.raises(CasemateError, match=r"data\.upload-used"):
        quotes.add(store, other, replace(more, request=request, upload=given.upload), b"m" * 32)
    quotes.add(store, first, given, b"m" * 32)


def test_changing_nothing_voids_nothing(store: Store) -> None:
    policy = replace(OPEN, approval="each-quote")
    dataset = push(store, policy=policy)
    quote = ask(store, "1", (dataset,))
    quotes.judge(store, quote, OWNER.id, "approve")
    size = store.size()
    catalog.set_policy(store, dataset, OWNER.id, policy)
    catalog.advance_epoch(store, dataset, OWNER.id, 0)
    quotes.judge(store, quote, OWNER.id, "approve")
    assert store.size() == size
    ledger.submit(store, quote, SCIENTIST.id)


def test_who_a_quote_concerns(store: Store) -> None:
    datasets = push(store, "a"), push(store, "b", OTHER)
    first, second = ask(store, "1", datasets), ask(store, "2", datasets[:1], event=SMALL)
    assert quotes.owners(store, first) == {OWNER.id, OTHER.id}
    assert quotes.owners(store, second) == {OWNER.id}
    assert [q.digest for q in quotes.of_scientist(store, SCIENTIST.id)] == [second, first]
    assert [q.digest for q in quotes.of_scientist(store, SCIENTIST.id, 1)] == [second]
    assert quotes.of_scientist(store, OWNER.id) == []
    assert quotes.waiting_for(store, OWNER.id) == []  # no policy asks for a word


def test_only_the_owner_revokes(store: Store) -> None:
    dataset = push(store)
    for change in (
        lambda: catalog.revoke(store, dataset, OTHER.id),
        lambda: catalog.advance_epoch(store, dataset, SCIENTIST.id, 1),
        lambda: catalog.dataset(store, "ds_none"),
    ):
        with pytest.raises(CasemateError, match=r"data\.unknown-dataset"):
            change()
    assert catalog.dataset(store, dataset).state == "ready"


def test_only_the_scientist_submits_a_quote(store: Store) -> None:
    dataset = push(store)
    refused("plan.unknown-quote", store, ask(store, "1", (dataset,)), OTHER)
    refused("plan.unknown-quote", store, "sha256:none")
    for name in ("job_x", ""):
        with pytest.raises(JobError, match=r"job\.unknown"):
            ledger.reserve(store, name)


def test_a_quote_that_charges_less_than_its_events_is_refused(store: Store) -> None:
    dataset = push(store)
    quote, _ = make_quote(store, "1", (dataset,))
    cheap = replace(quote.datasets[0].charge, rdp_nano=(1,) * len(EVENT_NANO))
    wrong = replace(quote, datasets=(replace(quote.datasets[0], charge=cheap),))
    free = replace(quote, plan=replace(quote.plan, events=()))
    for bad in (wrong, free):
        _, submission = make_quote(store, "1", (dataset,))
        digest = quotes.add(store, bad, submission, b"m" * 32)
        with pytest.raises(InternalError, match=r"internal\.quote"):
            ledger.submit(store, digest, SCIENTIST.id)


def test_who_sees_a_dataset(store: Store) -> None:
    dataset = register(store, policy=replace(OPEN, scientists=(SCIENTIST.id,)))
    found = catalog.dataset(store, dataset)

    def see() -> list[bool]:
        now = [catalog.dataset(store, dataset)]
        parties = (OWNER, SCIENTIST, OTHER)
        return [catalog.visible(store, p.id, "", 2) == now for p in parties]

    assert see() == [True, False, False], "it is not checked yet"
    catalog.settle(store, dataset, None)
    assert see() == [True, True, False]
    catalog.set_policy(store, dataset, OWNER.id, OPEN)
    assert see() == [True, True, True]
    assert catalog.visible(store, OWNER.id, dataset, 2) == []
    store.run("INSERT INTO frozen VALUES (?, 'recovery')", dataset)
    assert see() == [True, False, False], "it waits for its owner's consent"
    store.run("DELETE FROM frozen")
    shown = catalog.info(store, found, budget=True)
    assert shown.budget == catalog.budget_state(store, found.lineage)
    assert catalog.info(store, found, budget=False).budget is None


def test_a_charged_job_runs_under_the_policy_that_it_was_charged_under(store: Store) -> None:
    """An owner who narrows a policy stops what is queued; revoking stops the rest."""
    a = push(store, "a")
    charged, queued = queue(store, "charged", (a,)), queue(store, "queued", (a,))
    ledger.reserve(store, charged)
    narrow = replace(OPEN, scientists=(OWNER.id,), max_epsilon=0.01, approval="each-quote")
    catalog.set_policy(store, a, OWNER.id, narrow)
    assert ledger.job(store, queued).state == "failed"
    ledger.begin(store, charged)
    finish(store, charged)
    assert ledger.job(store, charged).state == "done"
