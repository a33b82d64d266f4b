"""A random client, owner and power switch against a model of a few lines."""

from __future__ import annotations

from collections import Counter

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from casemate.accounting.filters import RdpFilter
from casemate.ledger import catalog, fsck, ledger
from casemate.spec.errors import BudgetError, JobError, PlanError, PolicyError
from support.disk import SimDisk
from support.ledgers import (
    BUDGET,
    EVENT,
    OPEN,
    OTHER,
    OWNER,
    SCIENTIST,
    ask,
    changed_policy,
    finish,
    open_store,
    push,
)

RDP = RdpFilter(BUDGET)
CHARGE = RDP.charge((EVENT,), 2e-9, delta_shown=1e-6)


def fits(count: int) -> bool:
    return any(count * n <= c for n, c in zip(CHARGE.rdp_nano, RDP.capacity, strict=True))


PICK = st.integers(0, 1 << 20)


def nonempty(name):
    return precondition(lambda self: getattr(self, name))


class Life(RuleBasedStateMachine):
    """Things are picked by number, so that every rule can act as soon as there is one."""

    def __init__(self) -> None:
        super().__init__()
        self.disk = SimDisk()
        self.boots = 1
        self.store = open_store(self.disk, 1)
        self.spent: Counter[str] = Counter()  # lineage -> jobs charged
        self.lineage: dict[str, str] = {}
        self.names: dict[str, str] = {}
        self.valid: dict[str, bool] = {}  # quote -> may be submitted
        self.of: dict[str, tuple[str, ...]] = {}  # quote -> datasets
        self.quote: dict[str, str] = {}  # job -> quote
        self.state: dict[str, str] = {}
        self.revoked: set[str] = set()
        self.policies = 0
        self._push(OWNER, None)
        self._push(OTHER, None)

    def dataset(self, pick):
        return list(self.lineage)[pick % len(self.lineage)]

    def job(self, pick):
        return list(self.state)[pick % len(self.state)]

    @rule(owner=st.sampled_from([OWNER, OTHER]))
    def push(self, owner):
        self._push(owner, None)

    @rule(pick=PICK)
    def push_version(self, pick):
        previous = self.dataset(pick)
        owner = catalog.dataset(self.store, previous).owner
        self._push(OWNER if owner == OWNER.id else OTHER, self.names[previous])

    def _push(self, owner, previous):
        name = str(len(self.names))
        made = push(self.store, name, owner, previous=previous)
        self.names[made] = name
        before = {n: d for d, n in self.names.items()}.get(previous)
        self.lineage[made] = self.lineage[before] if before else made

    @rule(picks=st.lists(PICK, min_size=1, max_size=3), stage=st.integers(0, 5))
    def start(self, picks, stage):
        """A new job, taken some way at once."""
        used = tuple(dict.fromkeys(self.dataset(p) for p in picks))
        quote = ask(self.store, f"job {len(self.of)}", used)
        self.of[quote] = used
        lineages = [self.lineage[d] for d in used]
        self.valid[quote] = not self.revoked & set(used) and len(set(lineages)) == len(lineages)
        steps = (self._submit, self._reserve, self._begin, self._commit)
        for step in steps[:stage]:
            if step == self._submit:
                step(quote)
            elif quote in self.quote.values():
                step(next(j for j, q in self.quote.items() if q == quote))

    @nonempty("of")
    @rule(pick=PICK)
    def submit(self, pick):
        self._submit(list(self.of)[pick % len(self.of)])

    @nonempty("state")
    @rule(pick=PICK)
    def reserve(self, pick):
        self._reserve(self.job(pick))

    @nonempty("state")
    @rule(pick=PICK)
    def begin(self, pick):
        self._begin(self.job(pick))

    @nonempty("state")
    @rule(pick=PICK)
    def commit(self, pick):
        self._commit(self.job(pick))

    def _submit(self, quote):
        known = {q: j for j, q in self.quote.items()}
        held = Counter(self.spent)
        for job, state in self.state.items():
            if state == "queued":
                held.update(self.lineage[d] for d in self.of[self.quote[job]])
        room = all(fits(held[self.lineage[d]] + 1) for d in self.of[quote])
        try:
            job = ledger.submit(self.store, quote, SCIENTIST.id).id
        except (PolicyError, PlanError):
            assert not self.valid[quote] and quote not in known
            return
        except BudgetError:
            assert not room and quote not in known
            return
        assert known.get(quote, job) == job
        if quote not in known:
            assert self.valid[quote] and room
            self.quote[job], self.state[job] = quote, "queued"

    def _reserve(self, job):
        before = self.state[job]
        try:
            ledger.reserve(self.store, job)
        except JobError:
            assert before in ("failed", "cancelled")
            return
        if before == "queued":
            self.spent.update(self.lineage[d] for d in self.of[self.quote[job]])
            self.state[job] = "reserved"

    def _begin(self, job):
        before = self.state[job]
        try:
            opened = ledger.begin(self.store, job)
        except JobError:
            assert before != "reserved"
        except PolicyError:
            assert self.revoked & set(self.of[self.quote[job]])
        else:
            assert before == "reserved"
            assert [d.dataset for d in opened] == list(self.of[self.quote[job]])
            self.state[job] = "running"

    def _commit(self, job):
        before = self.state[job]
        try:
            finish(self.store, job)
        except JobError:
            assert before not in ("running", "done")
        except PolicyError:
            assert self.revoked & set(self.of[self.quote[job]])
        else:
            assert before in ("running", "done")
            self.state[job] = "done"

    @nonempty("state")
    @rule(pick=PICK, state=st.sampled_from(["failed", "cancelled"]))
    def abandon(self, pick, state):
        job = self.job(pick)
        ledger.abandon(self.store, job, state, "job.ended")
        if self.state[job] in ("queued", "reserved", "running"):
            charged = self.state[job] != "queued"
            self.state[job] = f"{state} after the charge" if charged else state

    def _void(self, dataset):
        for quote, used in self.of.items():
            if dataset in used:
                self.valid[quote] = False
        for job, quote in self.quote.items():
            if dataset in self.of[quote] and self.state[job] == "queued":
                self.state[job] = "failed"

    @rule(pick=PICK)
    def change_policy(self, pick):
        dataset = self.dataset(pick)
        owner = catalog.dataset(self.store, dataset).owner
        self.policies += 1
        policy = changed_policy(OPEN, max_epsilon=100.0 + self.policies)
        try:
            catalog.set_policy(self.store, dataset, owner, policy)
        except PolicyError:
            assert dataset in self.revoked
        else:
            self._void(dataset)

    @rule(pick=PICK)
    def revoke(self, pick):
        dataset = self.dataset(pick)
        catalog.revoke(self.store, dataset, catalog.dataset(self.store, dataset).owner)
        if dataset not in self.revoked:
            self.revoked.add(dataset)
            self._void(dataset)

    @rule(clean=st.booleans())
    def restart(self, clean):
        if clean:
            self.store.close()
        else:
            old = self.store
            self.disk = self.disk.power_cycle()
            old._mount.failed = OSError("the machine is gone")
            old.close()
        self.boots += 1
        self.store = open_store(self.disk, self.boots)
        for job, state in self.state.items():
            if state in ("reserved", "running"):
                self.state[job] = "abandoned"

    @invariant()
    def spent_is_the_models(self):
        for dataset, lineage in self.lineage.items():
            assert catalog.dataset(self.store, dataset).lineage == lineage
            _, spent, delta, jobs = catalog.spent(self.store, lineage)
            assert jobs == self.spent[lineage]
            assert spent == tuple(jobs * n for n in CHARGE.rdp_nano)
            assert delta == jobs * CHARGE.delta_femto
            assert jobs == 0 or fits(jobs)
        for job, state in self.state.items():
            assert ledger.job(self.store, job).state == state.split()[0]

    def teardown(self):
        assert not fsck.check(self.store.all, recompute=True).findings
        self.store.close()


def play(examples: int, steps: int) -> None:
    run_state_machine_as_test(
        Life,
        settings=settings(
            max_examples=examples,
            stateful_step_count=steps,
            deadline=None,
            database=None,
        ),
    )


def test_the_ledger_does_what_the_model_says() -> None:
    play(8, 25)


@pytest.mark.full
@pytest.mark.timeout(7200)
def test_the_ledger_does_what_the_model_says_for_long() -> None:
    play(5000, 60)


def scenario() -> None:
    """A reserved and a running job that end badly, step by step against the model."""
    life = Life()
    for stage in (2, 3):
        life.start([0, 1], stage)
        life.spent_is_the_models()
    for pick in (0, 1):
        life.abandon(pick, "cancelled")
        life.spent_is_the_models()
    life.restart(clean=False)
    life.spent_is_the_models()
    life.teardown()


def test_seeded_bug_refund_is_noticed_by_the_model() -> None:
    scenario()
    real = ledger.abandon

    def refund(store, id, state, error, message=""):
        if ledger.job(store, id).state in ledger.LIVE:
            store.run("UPDATE lineages SET jobs = jobs - 1 WHERE jobs > 0")
        return real(store, id, state, error, message)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ledger, "abandon", refund)
        with pytest.raises(AssertionError):
            scenario()


def test_seeded_bug_losing_a_reservation_at_restart_is_noticed_by_the_model() -> None:
    from casemate.ledger.store import Store

    real = Store._start

    def forget(self, software):
        real(self, software)
        self.run("UPDATE spent SET rdp_nano = 0")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Store, "_start", forget)
        with pytest.raises(AssertionError):
            scenario()
