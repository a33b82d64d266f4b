"""A random client, owner and power switch against a model of a few lines."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

import pytest
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    invariant,
    precondition,
    rule,
)

from casemate.accounting.filters import RdpFilter
from casemate.ledger import catalog, fsck, ledger, log
from casemate.spec.data import Budget, Policy
from casemate.spec.errors import BudgetError, JobError, PlanError, PolicyError
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
    commit,
    open_store,
    person,
    push,
)
from support.stateful import play

RDP = RdpFilter(BUDGET)
CHARGE = RDP.charge((EVENT,), 2e-9, delta_shown=1e-6)


CAP = Budget(epsilon=2.5, delta=1e-5)
WITNESS = Witness()
POLICIES = (
    OPEN,
    replace(OPEN, scientist_budget=CAP),
    replace(OPEN, witnesses=(WITNESS.vkey,), cosignatures=1),
    replace(OPEN, resumes=1),
)
SCIENTISTS = (SCIENTIST, person("another scientist"))


def fits(count: int, budget: Budget = BUDGET) -> bool:
    capacity = RdpFilter(budget).capacity
    return any(count * n <= c for n, c in zip(CHARGE.rdp_nano, capacity, strict=True))


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
        self.spent: Counter[tuple[str, str]] = Counter()  # lineage, scientist -> jobs charged
        self.lineage: dict[str, str] = {}
        self.names: dict[str, str] = {}
        self.valid: dict[str, bool] = {}  # quote -> may be submitted
        self.of: dict[str, tuple[str, ...]] = {}  # quote -> datasets
        self.whose: dict[str, str] = {}  # quote -> scientist
        self.policy: dict[str, Policy] = {}
        self.taken: Counter[str] = Counter()  # job -> how often taken over
        self.entry: dict[str, int] = {}  # job -> the entry that must be cosigned to go on
        self.cosigned = 0
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

    @rule(owner=st.sampled_from([OWNER, OTHER]), policy=st.sampled_from(POLICIES))
    def push(self, owner, policy):
        self._push(owner, None, policy)

    @rule(pick=PICK, policy=st.sampled_from(POLICIES))
    def push_version(self, pick, policy):
        previous = self.dataset(pick)
        owner = catalog.dataset(self.store, previous).owner
        self._push(OWNER if owner == OWNER.id else OTHER, self.names[previous], policy)

    def _push(self, owner, previous, policy=OPEN):
        name = str(len(self.names))
        made = push(self.store, name, owner, policy, previous=previous)
        self.policy[made] = policy
        self.names[made] = name
        before = {n: d for d, n in self.names.items()}.get(previous)
        self.lineage[made] = self.lineage[before] if before else made

    @rule(
        picks=st.lists(PICK, min_size=1, max_size=3),
        stage=st.integers(0, 6),
        who=st.sampled_from(SCIENTISTS),
    )
    def start(self, picks, stage, who=SCIENTIST):
        """A new job, taken some way at once."""
        used = tuple(dict.fromkeys(self.dataset(p) for p in picks))
        quote = ask(self.store, f"job {len(self.of)}", used, scientist=who)
        self.of[quote], self.whose[quote] = used, who.id
        lineages = [self.lineage[d] for d in used]
        self.valid[quote] = not self.revoked & set(used) and len(set(lineages)) == len(lineages)
        steps = (self._submit, self._reserve, self._begin, self._commit, self._release)
        for step in steps[:stage]:
            if step == self._submit:
                step(quote)
            elif quote in self.quote.values():
                self.cosign()
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

    @nonempty("state")
    @rule(pick=PICK)
    def release(self, pick):
        self._release(self.job(pick))

    @rule()
    def cosign(self):
        WITNESS.cosign(self.store)
        self.cosigned = self.store.size()

    def _room(self, quote, held):
        who = self.whose[quote]
        for dataset in self.of[quote]:
            lineage = self.lineage[dataset]
            mine = held[lineage, who]
            everyone = sum(n for (name, _), n in held.items() if name == lineage)
            cap = self.policy[dataset].scientist_budget
            if not fits(everyone + 1) or (cap is not None and not fits(mine + 1, cap)):
                return False
        return True

    def _charges(self, job):
        quote = self.quote[job]
        return [(self.lineage[d], self.whose[quote]) for d in self.of[quote]]

    def _witnessed(self, job):
        asked = any(self.policy[d].witnesses for d in self.of[self.quote[job]])
        return not asked or self.cosigned > self.entry[job]

    def _submit(self, quote):
        known = {q: j for j, q in self.quote.items()}
        held = Counter(self.spent)
        for job, state in self.state.items():
            if state == "queued":
                held.update(self._charges(job))
        room = self._room(quote, held)
        try:
            job = ledger.submit(self.store, quote, self.whose[quote]).id
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
        except BudgetError as e:
            # A queued job's share is held, but a cap that came later counts what went before it.
            assert e.code == "budget.scientist" and not self._room(self.quote[job], self.spent)
            return
        if before == "queued":
            assert self._room(self.quote[job], self.spent)
            self.spent.update(self._charges(job))
            self.state[job] = "reserved"
            self.entry[job] = self.store.size() - 1

    def _begin(self, job):
        before = self.state[job]
        try:
            opened = ledger.begin(self.store, job)
        except JobError as e:
            late = e.code == "job.not-witnessed"
            assert not self._witnessed(job) if late else before != "reserved"
        except PolicyError:
            assert self.revoked & set(self.of[self.quote[job]])
        else:
            assert before == "reserved" and self._witnessed(job)
            assert [d.dataset for d in opened] == list(self.of[self.quote[job]])
            self.state[job] = "running"

    def _commit(self, job):
        before = self.state[job]
        try:
            commit(self.store, job)
        except JobError:
            assert before not in ("running", "committed", "done")
        except PolicyError:
            assert self.revoked & set(self.of[self.quote[job]])
        else:
            assert before in ("running", "committed", "done")
            if before == "running":
                self.state[job] = "committed"
                self.entry[job] = self.store.size() - 1

    def _release(self, job):
        before = self.state[job]
        try:
            made = ledger.release(self.store, job, log.sign(self.store), b"sealed")
        except JobError as e:
            late = e.code == "job.not-witnessed"
            assert not self._witnessed(job) if late else before not in ("committed", "done")
        except PolicyError:
            assert self.revoked & set(self.of[self.quote[job]])
        else:
            assert before == "done" or (before == "committed" and self._witnessed(job))
            assert made.entry == self.store.link(ledger.job(self.store, job).ended).entry
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
        policy = replace(POLICIES[self.policies % 4], max_epsilon=100.0 + self.policies)
        try:
            catalog.set_policy(self.store, dataset, owner, policy)
        except PolicyError:
            assert dataset in self.revoked
        else:
            self._void(dataset)
            self.policy[dataset] = policy

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
                most = min(self.policy[d].resumes for d in self.of[self.quote[job]])
                if self.taken[job] < most:
                    self.taken[job] += 1
                    self.state[job] = "reserved"
                    self.entry[job] = ledger.job(self.store, job).granted
                else:
                    self.state[job] = "abandoned"
        self.cosigned = min(self.cosigned, self.store.size())

    @invariant()
    def spent_is_the_models(self):
        for dataset, lineage in self.lineage.items():
            assert catalog.dataset(self.store, dataset).lineage == lineage
            each = {s.id: self.spent[lineage, s.id] for s in SCIENTISTS}
            for whose, jobs in (*each.items(), (catalog.EVERYONE, sum(each.values()))):
                account = catalog.account(self.store, lineage, whose)
                assert account.jobs == jobs
                assert account.rdp_nano == tuple(jobs * n for n in CHARGE.rdp_nano)
                assert account.delta_femto == jobs * CHARGE.delta_femto
            assert not any(each.values()) or fits(sum(each.values()))
        for job, state in self.state.items():
            assert ledger.job(self.store, job).state == state.split()[0]

    def teardown(self):
        assert not fsck.check(self.store.all, recompute=True).findings
        self.store.close()


def test_the_ledger_does_what_the_model_says() -> None:
    play(Life, 8, 25)


@pytest.mark.full
@pytest.mark.timeout(7200)
@pytest.mark.parametrize("part", range(40))
def test_the_ledger_does_what_the_model_says_for_long(part: int) -> None:
    """Together 1,000,000 steps, in parts that processes can share."""
    play(Life, 440, 60)


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
            store.run("UPDATE accounts SET jobs = jobs - 1 WHERE jobs > 0")
        return real(store, id, state, error, message)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ledger, "abandon", refund)
        with pytest.raises(AssertionError):
            scenario()


def test_seeded_bug_losing_a_reservation_at_restart_is_noticed_by_the_model() -> None:
    real = ledger.settle_left

    def forget(store):
        real(store)
        store.run("UPDATE accounts SET jobs = jobs - 1 WHERE jobs > 0")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ledger, "settle_left", forget)
        with pytest.raises(AssertionError):
            scenario()
