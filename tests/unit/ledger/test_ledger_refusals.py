"""What a refusal says besides its sentence, and what has a limit."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace

import apsw
import pytest

from casemate.accounting import filters
from casemate.ledger import admission, anchor, catalog, fsck, ledger, log, quotes
from casemate.ledger.ledger import TrainingState
from casemate.ledger.store import Store
from casemate.spec import codec, merkle
from casemate.spec.data import Budget, Policy
from casemate.spec.errors import CasemateError, InternalError, JobError, LedgerError, LimitError
from casemate.spec.job import Charge, DpEvent, Metric
from casemate.spec.log import Abandoned, Committed, Reserved, commitment
from casemate.spec.receipt import LogEntry
from support.anchors import NAME, FakeAnchor
from support.disk import SimDisk
from support.ledgers import (
    KEY,
    OPEN,
    OTHER,
    OWNER,
    SCIENTIST,
    CountingRng,
    ask,
    boot,
    commit,
    dataset_id,
    make_quote,
    open_store,
    person,
    push,
    queue,
    refused,
    run,
    secret,
)

SMALL = DpEvent(rate=0.02, noise_multiplier=4.0, steps=50)


@pytest.fixture
def store():
    made = open_store(SimDisk())
    yield made
    made.close()


def shape(e: CasemateError) -> tuple[str, int, str]:
    return e.code, e.status, e.where


def refusal(action: Callable[[], object]) -> tuple[str, int, str]:
    with pytest.raises(CasemateError) as e:
        action()
    assert e.value.mend
    return shape(e.value)


def test_what_may_not_be_seen_is_as_what_there_is_not(store: Store) -> None:
    push(store)
    quote = ask(store, "1", (dataset_id("a"),))
    catalog.enrol(store, OTHER)
    upload = catalog.add_upload(store, OTHER.id, 5)
    for code, actions in {
        "job.unknown": [lambda: ledger.job(store, "job_x"), lambda: ledger.reserve(store, "")],
        "data.unknown-dataset": [
            lambda: catalog.dataset(store, "ds_x"),
            lambda: catalog.revoke(store, dataset_id("a"), OTHER.id),
            lambda: catalog.checking_key(store, dataset_id("a")),
            lambda: push(store, "b", OTHER, previous="a"),
            lambda: push(store, "c", OTHER, previous="none"),
        ],
        "plan.unknown-quote": [
            lambda: quotes.get(store, "sha256:x"),
            lambda: ledger.submit(store, quote, OTHER.id),
            lambda: quotes.judge(store, quote, SCIENTIST.id, "approve"),
        ],
        "data.unknown-upload": [
            lambda: catalog.upload(store, "up_x", OWNER.id),
            lambda: catalog.upload(store, upload, OWNER.id),
        ],
    }.items():
        for action in actions:
            assert refusal(action) == (code, 404, "")
    assert refusal(lambda: catalog.identity(store, "id_x")) == ("auth.unknown-identity", 401, "")


def test_refusals_of_owners_and_versions(store: Store) -> None:
    dataset = push(store)
    found = catalog.dataset(store, dataset)
    other = replace(found.registration, policy=replace(OPEN, max_epsilon=1.0))
    assert refusal(lambda: catalog.register(store, other, secret("a"))) == (
        "policy.dataset-taken", 409, "",
    )  # fmt: skip
    again = replace(found.registration, dataset=dataset_id("z"))
    assert refusal(lambda: catalog.register(store, again, secret("z"))) == (
        "data.upload-used", 409, "",
    )  # fmt: skip
    assert store.one("SELECT used_by FROM uploads") == (dataset,)
    for epoch in (-1, 2**53):
        assert refusal(lambda e=epoch: catalog.advance_epoch(store, dataset, OWNER.id, e)) == (
            "policy.epoch-back", 409, "",
        )  # fmt: skip
    assert catalog.advance_epoch(store, dataset, OWNER.id, 2**53 - 1).epoch == 2**53 - 1
    catalog.revoke(store, dataset, OWNER.id)
    assert refusal(lambda: catalog.set_policy(store, dataset, OWNER.id, OPEN)) == (
        "policy.revoked", 403, "",
    )  # fmt: skip
    with pytest.raises(CasemateError) as e:
        ledger.submit(store, ask(store, "1", (dataset,)), SCIENTIST.id)
    assert shape(e.value) == ("policy.revoked", 403, dataset)


def test_a_void_quote_is_named(store: Store) -> None:
    dataset = push(store)
    quote = ask(store, "1", (dataset,))
    catalog.set_policy(store, dataset, OWNER.id, replace(OPEN, max_epsilon=50.0))
    judged = refusal(lambda: quotes.judge(store, quote, OWNER.id, "approve"))
    assert judged == ("policy.changed", 403, quote)


def test_refusals_of_a_policy_name_the_dataset(store: Store) -> None:
    policy = replace(OPEN, approval="each-quote")
    plain, strict = push(store), push(store, "b", OTHER, policy)
    asked = ask(store, "1", (plain, strict))
    assert refusal(lambda: ledger.submit(store, asked, SCIENTIST.id)) == (
        "policy.not-approved", 403, strict,
    )  # fmt: skip
    version = push(store, "c", previous="a")
    both = ask(store, "2", (plain, version))
    assert refusal(lambda: ledger.submit(store, both, SCIENTIST.id)) == (
        "plan.same-lineage", 422, version,
    )  # fmt: skip


def test_a_dataset_over_its_limit_of_one_job_is_admitted_at_it(store: Store) -> None:
    quote, _ = make_quote(store, "1", (push(store),), event=SMALL)
    epsilon = quote.datasets[0].charge.epsilon
    exact = push(store, "b", policy=replace(OPEN, max_epsilon=epsilon))
    below = push(store, "c", policy=replace(OPEN, max_epsilon=epsilon * (1 - 1e-9)))
    queue(store, "2", (exact,), event=SMALL)
    late = ask(store, "3", (below,), event=SMALL)
    assert refusal(lambda: ledger.submit(store, late, SCIENTIST.id))[0] == "policy.max-epsilon"


def test_the_limit_of_one_job_is_held_in_integers(store: Store) -> None:
    """At the very float at which the job's charge fits; one less does not hold it."""
    quote, _ = make_quote(store, "1", (push(store),), event=SMALL)
    charge = quote.datasets[0].charge
    high, low = charge.epsilon, charge.epsilon * (1 - 1e-8)
    while math.nextafter(low, high) < high:
        middle = (low + high) / 2
        if filters.beyond(charge.rdp_nano, middle, quote.delta):
            low = middle
        else:
            high = middle
    assert low < high < charge.epsilon
    exact = push(store, "b", policy=replace(OPEN, max_epsilon=high))
    below = push(store, "c", policy=replace(OPEN, max_epsilon=low))
    queue(store, "2", (exact,), event=SMALL)
    late = ask(store, "3", (below,), event=SMALL)
    assert refusal(lambda: ledger.submit(store, late, SCIENTIST.id))[0] == "policy.max-epsilon"


def test_only_uploads_that_wait_count(store: Store) -> None:
    catalog.enrol(store, OWNER)
    names = [catalog.add_upload(store, OWNER.id, 5) for _ in range(64)]
    assert len(set(names)) == 64 and all(n[:3] == "up_" and len(n) == 35 for n in names)
    with pytest.raises(LimitError, match=r"limit\.uploads"):
        catalog.add_upload(store, OWNER.id, 5)
    catalog.enrol(store, OTHER)
    catalog.add_upload(store, OTHER.id, 5)
    with store.transaction():
        catalog.use_upload(store, names[0], OWNER.id, "ds_x")
    assert catalog.upload(store, names[0], OWNER.id).used_by == "ds_x"
    assert catalog.upload(store, names[1], OWNER.id).used_by is None
    catalog.add_upload(store, OWNER.id, 5)
    catalog.drop_upload(store, names[1])
    assert [u.id for u in catalog.uploads(store)] == sorted(
        {u for (u,) in store.all("SELECT id FROM uploads")}
    )
    assert len(catalog.uploads(store)) == 65


def test_lists_are_cut_at_their_limits(store: Store) -> None:
    policy = replace(OPEN, approval="each-quote")
    dataset = push(store, policy=policy)
    free = push(store, "b", OTHER)
    first = ask(store, "0", (dataset,), event=SMALL)
    job = queue(store, "job", (free,), event=SMALL)
    with store.transaction():
        for i in range(1, 102):
            store.run(
                "INSERT INTO quotes SELECT ?1, 1000 + ?2, job, scientist, quote, submission,"
                " model_key, salt, void FROM quotes WHERE digest = ?3", f"q{i:03}", i, first,
            )  # fmt: skip
            store.run("INSERT INTO quote_datasets VALUES (?, ?, NULL)", f"q{i:03}", dataset)
        for i in range(1001):
            store.run(
                "INSERT INTO jobs (id, place, request_digest, quote, scientist, state)"
                " SELECT ?1, 1000 + ?2, request_digest, quote, scientist, 'failed' FROM jobs"
                " WHERE id = ?3", f"j{i:04}", i, job,
            )  # fmt: skip
    assert [q.digest for q in quotes.of_scientist(store, SCIENTIST.id)] == [
        f"q{i:03}" for i in range(101, 1, -1)
    ]
    waiting = [q.digest for q in quotes.waiting_for(store, OWNER.id)]
    assert waiting == [first, *(f"q{i:03}" for i in range(1, 100))]
    assert len(quotes.waiting_for(store, OWNER.id, 3)) == 3
    jobs = [j.id for j in ledger.jobs(store, SCIENTIST.id)]
    assert jobs == [f"j{i:04}" for i in range(1000, 0, -1)]
    assert [j.id for j in ledger.jobs(store, OTHER.id, 7)] == [job]
    assert len(ledger.jobs(store, SCIENTIST.id, 7)) == 7


def test_a_thousand_entries_at_a_time(store: Store) -> None:
    with store.transaction():
        for i in range(1002):
            store.append("identity", f"id_{i}", person(str(i)))
    assert (len(store.entries()), len(store.entries(1000)), len(store.entries(2, 3))) == (
        1000,
        3,
        3,
    )
    assert merkle.root(1003, store.node) == log.head(store).root


def test_a_running_jobs_newest_state_is_kept(store: Store) -> None:
    dataset = push(store)
    job, other = queue(store, "1", (dataset,)), queue(store, "2", (dataset,))
    states = [TrainingState(n, f"states/{job}.{n}", bytes([n]) * 32) for n in (3, 6)]
    ledger.reserve(store, job)
    for stopped in (job, other):
        with pytest.raises(JobError, match="not running in this boot"):
            ledger.keep_state(store, stopped, states[0])
    ledger.begin(store, job)
    assert ledger.training_state(store, job) is None
    for state in states:
        ledger.keep_state(store, job, state)
        assert ledger.training_state(store, job) == state
        assert ledger.training_states(store) == {state.path}
    store.boot = boot(7)
    with pytest.raises(JobError, match="not running in this boot"):
        ledger.keep_state(store, job, states[0])
    store.boot = boot(1)
    assert "key" not in repr(states[0])
    assert ledger.quote(store, job).request.job == job
    ledger.abandon(store, job, "failed", "job.failed")
    assert ledger.training_states(store) == set()


@pytest.mark.parametrize(
    ("action", "words"),
    [
        (lambda s, j: ledger.begin(s, j), "is queued, not reserved by this boot"),
        (
            lambda s, j: ledger.commit(
                s, j, result_digest="", blob="", result_key=b"", envelope=""
            ),
            "is queued, not running in this boot",
        ),
        (lambda s, j: ledger.release(s, j, log.sign(s), b""), "is queued, not committed"),
    ],
)
def test_a_job_in_another_state_is_told_in_which(store: Store, action, words: str) -> None:
    job = queue(store, "1", (push(store),))
    with pytest.raises(JobError) as e:
        action(store, job)
    assert e.value.message == f"The job {job} {words}."
    ledger.abandon(store, job, "cancelled", "job.cancelled", "why")
    with pytest.raises(JobError) as e:
        ledger.reserve(store, job)
    assert e.value.message == f"The job {job} is cancelled, not queued."


def test_what_cannot_be_read_names_its_place(store: Store) -> None:
    with pytest.raises(IndexError, match="node 7 of level 3"):
        store.node(3, 7)
    with pytest.raises(ValueError, match="a salt has 32 bytes, not 3"):
        commitment(b"abc", "sha256:x")


class Busy(FakeAnchor):
    """An anchor that fails in its step."""

    def extend(self, step: bytes) -> None:
        raise OSError("no answer")


def test_an_anchor_that_does_not_move_stops_the_store() -> None:
    disk = SimDisk()
    store = open_store(disk)
    job = queue(store, "1", (push(store),))
    store.hold(Busy())
    with pytest.raises(OSError, match="no answer"):
        ledger.reserve(store, job)
    with pytest.raises(LedgerError, match=r"ledger\.stopped.*no answer"):
        store.size()
    store.close()
    after = open_store(disk, 2)  # the charge was durable before the anchor was to move
    assert ledger.job(after, job).reserved is not None
    assert not fsck.check(after.all).findings
    after.close()


class Torn:
    """A connection that cannot even undo."""

    def __init__(self, real: apsw.Connection) -> None:
        self.real = real

    @property
    def in_transaction(self) -> bool:
        return self.real.in_transaction

    def execute(self, sql: str, *values: object) -> object:
        done = self.real.execute(sql, *values)
        if sql == "ROLLBACK":
            raise apsw.IOError("the disk is gone")
        return done

    def close(self) -> None:
        self.real.close()


def test_a_transaction_that_cannot_be_undone_stops_the_store(store: Store) -> None:
    store._connection = Torn(store._connection)
    with pytest.raises(KeyError), store.transaction():
        raise KeyError("first")
    with pytest.raises(LedgerError, match=r"ledger\.stopped.*the disk is gone"):
        store.size()


def test_a_wal_in_use_is_not_said_to_be_empty(store: Store, monkeypatch) -> None:
    monkeypatch.setattr(Store, "one", lambda self, sql, *_: (1, 0, 0))
    with pytest.raises(InternalError, match=r"internal\.ledger"):
        store.empty_wal()
    monkeypatch.undo()
    store.empty_wal()


def test_the_log_keeps_its_name_and_key(store: Store) -> None:
    mine = log.key(store)
    assert log.key(store) == mine or log.key(store).public == mine.public
    assert mine.origin.startswith("casemate.dev/log/") and len(mine.origin) == 17 + 32
    assert store.all("SELECT generation, ended FROM log_keys") == [(1, None)]
    assert str(mine.verifier).startswith(f"{mine.origin}+")


def test_a_store_opens_once_and_under_its_key() -> None:
    disk = SimDisk()
    open_store(disk).close()
    for key, name, code in (
        (KEY, boot(1), "ledger.boot"),
        (KEY, b"x" * 15, "ledger.boot"),
        (b"y" * 32, boot(2), "ledger.key"),
        (b"y" * 31, boot(2), "ledger.key"),
    ):
        with pytest.raises(LedgerError) as e:
            Store.open(disk, key, name, CountingRng())
        assert e.value.code == code
    foreign = SimDisk.of(disk.snapshot())
    store = open_store(foreign, 3)
    store.run("PRAGMA application_id = 7")
    store.close()
    with pytest.raises(LedgerError, match=r"ledger\.version"):
        open_store(foreign, 4)
    assert codec.digest(OPEN) == codec.digest(replace(OPEN))


WORDS = "It is all public."
METRICS = (Metric(name="accuracy"),)
RULES = [
    ("policy.checking", "is checking, not ready", {}, {}),
    ("policy.not-admitted", "does not admit this scientist", {"scientists": (OTHER.id,)}, {}),
    ("policy.expired", "has expired with epoch 3", {"last_epoch": 3}, {}),
    ("policy.evaluation-only", "is for evaluation only", {"evaluation": True}, {}),
    (
        "policy.private-only",
        "does not permit training without privacy in these words",
        {"nonprivate": WORDS},
        {"words": "It is public, all."},
    ),
    (
        "policy.not-evaluation",
        "is not registered for evaluation, so that metrics on it must be private",
        {"nonprivate": WORDS},
        {"words": WORDS, "metrics": METRICS},
    ),
    (
        "policy.evaluations",
        "gives 0 exact evaluations, and gave or holds 0",
        {"evaluation": True},
        {"words": "", "metrics": METRICS},
    ),
    ("policy.max-epsilon", "allows at most epsilon 0.1 for one job", {"max_epsilon": 0.1}, {}),
    (
        "policy.not-approved",
        "needs its owner's approval of this quote",
        {"approval": "each-quote"},
        {},
    ),
]


@pytest.mark.parametrize(("code", "words", "policy", "job"), RULES)
def test_each_rule_says_what_is_wrong(store: Store, code, words, policy, job) -> None:
    dataset = push(store, policy=replace(OPEN, **policy))
    if code == "policy.checking":
        store.run("UPDATE datasets SET state = 'checking'")
    if code == "policy.expired":
        catalog.advance_epoch(store, dataset, OWNER.id, 4)
    quote = ask(store, "1", (dataset,), event=SMALL, **job)
    with pytest.raises(CasemateError) as e:
        ledger.submit(store, quote, SCIENTIST.id)
    assert shape(e.value) == (code, 403, dataset)
    assert e.value.message == f"The dataset {dataset} {words}."
    assert e.value.mend and e.value.mend[0].isupper()


HELD_OUT = replace(OPEN, evaluation=True, evaluations=2)


def test_exact_evaluations_are_held_while_they_wait_and_counted_once_reserved(store: Store) -> None:
    """By the ledger, so that a new version has no new ones; what is cancelled gives its place
    back."""
    exact = {"words": "", "metrics": METRICS}
    dataset = push(store, policy=HELD_OUT)
    first = queue(store, "1", (dataset,), **exact)
    second = queue(store, "2", (dataset,), **exact)
    third = ask(store, "3", (dataset,), **exact)
    refused("policy.evaluations", store, third)
    ledger.abandon(store, second, "cancelled", "job.cancelled")
    run(store, first)
    assert ledger.submit(store, third, SCIENTIST.id).state == "queued"
    newer = push(store, "b", policy=HELD_OUT, previous="a")
    assert admission.evaluated(store, dataset, held=False) == 1
    assert admission.evaluated(store, dataset, held=True) == 2
    refused("policy.evaluations", store, ask(store, "4", (newer,), **exact))
    # Private ones are not counted.
    queue(store, "5", (newer,), event=SMALL, metrics=METRICS)


@pytest.mark.parametrize("before", [OPEN, HELD_OUT])
def test_rows_keep_their_purpose(store: Store, before: Policy) -> None:
    other = HELD_OUT if before == OPEN else OPEN
    dataset = push(store, policy=before)
    catalog.set_policy(store, dataset, OWNER.id, replace(before, max_epsilon=1.0))
    for action in (
        lambda: catalog.set_policy(store, dataset, OWNER.id, other),
        lambda: push(store, "b", policy=other, previous="a"),
    ):
        with pytest.raises(CasemateError) as e:
            action()
        assert (e.value.code, e.value.where) == ("policy.purpose", dataset)
    assert catalog.dataset(store, dataset).policy.evaluation == before.evaluation


def test_the_last_epoch_serves_and_a_named_scientist_is_admitted(store: Store) -> None:
    policy = replace(OPEN, scientists=(SCIENTIST.id,), last_epoch=4, nonprivate=WORDS)
    dataset = push(store, policy=policy)
    catalog.advance_epoch(store, dataset, OWNER.id, 4)
    queue(store, "1", (dataset,), event=SMALL)
    queue(store, "2", (dataset,), words=WORDS)


def test_a_quote_that_came_back_is_held_against_todays_policy_and_epoch(store: Store) -> None:
    policy = replace(OPEN, max_epsilon=50.0)
    for code, words, change in (
        (
            "policy.changed",
            "has another policy now; list it again",
            lambda d: catalog.set_policy(store, d, OWNER.id, policy),
        ),
        (
            "policy.stale-epoch",
            "is in epoch 1, not 0; list it again",
            lambda d: catalog.advance_epoch(store, d, OWNER.id, 1),
        ),
    ):
        dataset = push(store, code)
        quote, submission = make_quote(store, code, (dataset,), event=SMALL)
        digest = quotes.add(store, quote, submission, b"m" * 32)
        change(dataset)
        assert quotes.get(store, digest).void == code
        quotes.add(store, quote, submission, b"m" * 32)
        assert quotes.get(store, digest).void is None
        with pytest.raises(CasemateError) as e:
            ledger.submit(store, digest, SCIENTIST.id)
        assert shape(e.value) == (code, 403, dataset)
        assert e.value.message == f"The dataset {dataset} {words}."


def test_a_void_quote_is_refused_with_what_made_it_void(store: Store) -> None:
    dataset = push(store)
    quote = ask(store, "1", (dataset,), event=SMALL)
    store.run("UPDATE quotes SET void = 'policy.changed'")
    with pytest.raises(CasemateError) as e:
        ledger.submit(store, quote, SCIENTIST.id)
    assert shape(e.value) == ("policy.changed", 403, dataset)
    words = "is part of a quote that an owner's change made void"
    assert e.value.message == f"The dataset {dataset} {words}."


def test_a_rejected_quote_is_withheld(store: Store) -> None:
    dataset = push(store)
    quote = ask(store, "1", (dataset,), event=SMALL)
    quotes.judge(store, quote, OWNER.id, "reject")
    with pytest.raises(CasemateError) as e:
        ledger.submit(store, quote, SCIENTIST.id)
    assert shape(e.value) == ("policy.rejected", 403, dataset)
    assert e.value.message == f"The dataset {dataset} is withheld: its owner rejected the quote."


def test_whose_budget_is_exhausted(store: Store) -> None:
    low = Budget(epsilon=0.1, delta=1e-5)
    mine = push(store, "a", policy=replace(OPEN, scientist_budget=low))
    all_ = push(store, "b", OTHER, budget=low)
    for dataset, code, whose in (
        (mine, "budget.scientist", " for this scientist"),
        (all_, "budget.exhausted", ""),
    ):
        with pytest.raises(CasemateError) as e:
            ledger.submit(store, ask(store, code, (dataset,)), SCIENTIST.id)
        assert shape(e.value) == (code, 409, dataset)
        left = f"has not enough budget left{whose} for this job"
        assert e.value.message == f"The dataset {dataset} {left}."


def test_the_budget_counts_both_extra_deltas(store: Store) -> None:
    dataset = push(store, policy=replace(OPEN, max_epsilon=50.0))
    late = ask(store, "1", (dataset,), event=SMALL, delta=1e-2, extra=6e-7)
    assert refusal(lambda: ledger.submit(store, late, SCIENTIST.id))[0] == "budget.exhausted"
    queue(store, "2", (dataset,), event=SMALL, delta=1e-2, extra=4e-7)


def test_what_a_listing_shows(store: Store) -> None:
    policy = replace(OPEN, max_epsilon=50.0)
    dataset = push(store, policy=policy)
    catalog.advance_epoch(store, dataset, OWNER.id, 2)
    ledger.reserve(store, queue(store, "1", (dataset,), event=SMALL))
    found = catalog.dataset(store, dataset)
    shown = catalog.info(store, found, budget=True)
    assert (shown.dataset, shown.owner, shown.epoch, shown.state) == (
        dataset, OWNER.id, 2, "ready",
    )  # fmt: skip
    assert (shown.policy, shown.policy_digest) == (policy, codec.digest(policy))
    assert (shown.schema, shown.error) == (found.registration.schema, None)
    assert shown.budget is not None
    assert shown.budget.jobs == 1
    assert 0 < shown.budget.spent_epsilon < shown.budget.left_epsilon < 4
    store.run("UPDATE datasets SET state = 'refused', error = 'data.bounds'")
    again = catalog.info(store, catalog.dataset(store, dataset), budget=False)
    assert (again.state, again.error, again.budget) == ("refused", "data.bounds", None)


def test_what_is_frozen_gives_no_key(store: Store) -> None:
    a, b = push(store, "a"), push(store, "b", OTHER)
    job = queue(store, "1", (a, b), event=SMALL)
    late = ask(store, "2", (a, b), event=SMALL)
    ledger.reserve(store, job)
    assert not ledger.frozen(store, job)
    store.run("INSERT INTO frozen VALUES (?, 'recovery')", b)
    assert ledger.frozen(store, job)
    assert not ledger.frozen(store, queue(store, "3", (a,), event=SMALL))
    catalog.require_thawed(store, a)
    for action in (
        lambda: ledger.begin(store, job),
        lambda: catalog.require_thawed(store, b),
        lambda: ledger.submit(store, late, SCIENTIST.id),
    ):
        assert refusal(action) == ("policy.frozen", 403, b)
    assert [d.state for d in catalog.datasets(store) if d.id == b] == ["frozen"]
    store.run("UPDATE datasets SET state = 'checking'")
    assert refusal(lambda: catalog.checking_key(store, b)) == ("policy.frozen", 403, b)
    assert catalog.checking_key(store, a) == secret("a")
    store.run("UPDATE datasets SET state = 'ready'")
    store.run("INSERT INTO consents VALUES (?, 'ff', '')", b)
    catalog.revoke(store, b, OTHER.id)
    assert store.all("SELECT * FROM frozen") == store.all("SELECT * FROM consents") == []


def test_a_charge_of_other_orders_is_no_charge() -> None:
    with pytest.raises(ValueError, match="zip"):
        catalog.Account((0, 0), 0, 0).add(Charge(rdp_nano=(1,), delta_femto=0, epsilon=0.0))
    most = catalog.Account((2**53 - 2,), 0, 0)
    for nano, total in ((1, 2**53 - 1), (2, 2**53 - 1)):
        added = most.add(Charge(rdp_nano=(nano,), delta_femto=0, epsilon=0.0))
        assert added.rdp_nano == (total,)


def test_entries_say_how_often_the_anchor_was_moved(store: Store) -> None:
    job = queue(store, "1", (push(store),), event=SMALL)
    ledger.reserve(store, queue(store, "0", (dataset_id("a"),), event=SMALL))
    store.hold(FakeAnchor())
    reserved = ledger.reserve(store, job)
    ledger.begin(store, job)
    committed = commit(store, job)
    bodies = [codec.decode(LogEntry, link.entry).body for link in (reserved, committed)]
    assert codec.decode(Reserved, bodies[0]).anchor == 1
    assert codec.decode(Committed, bodies[1]).anchor == 2
    count, step = store.one("SELECT count, step FROM anchor")
    assert (count, step) == (2, log.head(store).root)


def test_a_committed_run_keeps_no_state_and_an_ended_one_its_reason(store: Store) -> None:
    dataset = push(store)
    jobs = [queue(store, name, (dataset,), event=SMALL) for name in "123"]
    for job in jobs:
        ledger.reserve(store, job)
        (run,) = ledger.begin(store, job)
        assert (run.dataset, run.key, run.salt) == (dataset, secret("a").key, secret("a").salt)
        assert run.schema == catalog.dataset(store, dataset).registration.schema
        ledger.keep_state(store, job, TrainingState(3, f"states/{job}.3", b"s" * 32))
    commit(store, jobs[0])
    assert ledger.training_states(store) == {f"states/{job}.3" for job in jobs[1:]}
    for job, reason in zip(jobs[1:], ("failed", "cancelled"), strict=True):
        ended = ledger.abandon(store, job, reason, "job.ended")
        assert ended.message == ""
        entry = codec.decode(LogEntry, store.link(ended.ended).entry)
        assert codec.decode(Abandoned, entry.body) == Abandoned(job=job, reason=reason)


def test_a_revoked_dataset_gives_no_key_and_is_named(store: Store) -> None:
    a, b = push(store, "a"), push(store, "b", OTHER)
    job = queue(store, "1", (a, b), event=SMALL)
    ledger.reserve(store, job)
    catalog.revoke(store, b, OTHER.id)
    assert refusal(lambda: ledger.begin(store, job)) == ("policy.revoked", 403, b)


def test_a_release_says_what_it_wanted(store: Store) -> None:
    job = queue(store, "1", (push(store),), event=SMALL)
    ledger.reserve(store, job)
    ledger.begin(store, job)
    before = log.sign(store)
    commit(store, job)
    with pytest.raises(JobError) as e:
        ledger.release(store, job, before, b"s")
    assert e.value.message == f"The job {job} is committed, not under this checkpoint."
    assert refusal(lambda: ledger.bundle(store, job)) == ("job.not-done", 409, "")


def test_a_quote_is_found_as_it_was_kept(store: Store) -> None:
    quote, submission = make_quote(store, "1", (push(store),), event=SMALL)
    found = quotes.get(store, quotes.add(store, quote, submission, b"m" * 32))
    assert (found.quote, found.submission, found.model_key) == (quote, submission, b"m" * 32)
    assert len(found.salt) == 32 and found.salt != found.model_key
    assert (found.void, found.verdicts) == (None, {dataset_id("a"): None})


def test_a_refused_dataset_keeps_the_reason(store: Store) -> None:
    dataset = push(store)
    store.run("UPDATE datasets SET state = 'checking'")
    found = catalog.settle(store, dataset, "data.bounds")
    assert (found.state, found.error) == ("refused", "data.bounds")
    assert store.one("SELECT error FROM datasets") == ("data.bounds",)


def test_a_quote_of_another_length_is_no_quote(store: Store) -> None:
    dataset = push(store)
    quote, submission = make_quote(store, "1", (dataset,), event=SMALL)
    short = quotes.add(store, replace(quote, datasets=()), submission, b"m" * 32)
    with pytest.raises(ValueError, match="zip"):
        ledger.submit(store, short, SCIENTIST.id)
    cheap = replace(quote.datasets[0], charge=replace(quote.datasets[0].charge, delta_femto=0))
    for wrong, words in (
        (replace(quote, datasets=(cheap,)), "its charge is not what the filter takes"),
        (
            replace(quote, plan=replace(quote.plan, events=())),
            "a private plan has events, another has none",
        ),
    ):
        _, submission = make_quote(store, "1", (dataset,), event=SMALL)
        digest = quotes.add(store, wrong, submission, b"m" * 32)
        with pytest.raises(InternalError) as e:
            ledger.submit(store, digest, SCIENTIST.id)
        assert e.value.message == f"The quote is wrong: {words}."


def test_what_a_recovery_ends_is_abandoned(store: Store) -> None:
    job = queue(store, "1", (push(store),), event=SMALL)
    ledger.reserve(store, job)
    with store.transaction():
        ledger.end_unfinished(store, "It was lost.")
    found = ledger.job(store, job)
    assert (found.state, found.error, found.message) == (
        "abandoned", "job.abandoned", "It was lost.",
    )  # fmt: skip


def test_a_mark_and_a_first_value_have_32_bytes() -> None:
    mark = anchor.Mark("n", 1, b"b" * 32, b"s" * 32)
    with pytest.raises(ValueError, match=r"^before has 31 bytes, not 32$"):
        replace(mark, before=b"b" * 31)
    with pytest.raises(ValueError, match=r"^step has 33 bytes, not 32$"):
        replace(mark, step=b"s" * 33)
    asked = []

    class Counting(CountingRng):
        def bytes(self, count: int) -> bytes:
            asked.append(count)
            return super().bytes(count)

    held = FakeAnchor()
    stand = anchor.resume(held, None, Counting())
    assert asked == [32] and stand == anchor.Stand(NAME, 0, held.value)
