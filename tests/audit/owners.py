"""What owners said of their datasets holds: budgets, caps, purposes, approvals, resumes, revocation
and witnesses, as the ledger keeps them."""

from __future__ import annotations

import base64
import dataclasses
import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any, Final

from audit.law import holds
from casemate.accounting import filters
from casemate.ledger import catalog, ledger, quotes
from casemate.ledger.store import Store
from casemate.spec.data import Budget, Policy
from casemate.spec.errors import CasemateError
from casemate.spec.identity import PublicIdentity
from casemate.spec.job import DpEvent, Metric
from support import ledgers
from support.disk import SimDisk

QUIET: Final = DpEvent(rate=0.02, noise_multiplier=2.5, steps=200)


def owners(seed: int) -> None:
    """Versions, scientists and jobs of any kind draw on one budget; what an owner allows is asked
    before a job is taken, before its keys are given out and before its result leaves."""
    del seed
    for check in (_budgets, _caps, _purposes, _words, _resumed, _withdrawn, _witnessed, _claims):
        check()


@contextmanager
def _store() -> Iterator[Store]:
    store = ledgers.open_store(SimDisk())
    try:
        yield store
    finally:
        store.close()


def _does(call: Callable[..., Any], *args: Any, **more: Any) -> bool:
    """Whether the ledger lets it be."""
    with suppress(CasemateError):
        call(*args, **more)
        return True
    return False


def _refused(what: str, call: Callable[..., Any], *args: Any, **more: Any) -> None:
    holds(not _does(call, *args, **more), f"owners: {what}")


def _reserved(store: Store, job: str, names: tuple[str, ...], **more: Any) -> None:
    who = more.get("scientist", ledgers.SCIENTIST).id
    ledger.reserve(store, ledger.submit(store, ledgers.ask(store, job, names, **more), who).id)


def _spend(store: Store, name: str, who: PublicIdentity = ledgers.SCIENTIST) -> int:
    """Jobs of one scientist until none is taken; how many."""
    for i in range(200):
        if not _does(_reserved, store, f"{who.name} {i}", (name,), event=QUIET, scientist=who):
            return i
    return 200


def _inside(store: Store, name: str, budget: Budget, whose: str = catalog.EVERYONE) -> bool:
    spent = catalog.account(store, catalog.dataset(store, name).lineage, whose)
    most = filters.capacities(budget.epsilon, budget.delta)
    extra = filters.delta_capacity(budget.delta)
    return filters.fits(spent.rdp_nano, most) and spent.delta_femto <= extra


def _budgets() -> None:
    """A new version's budget is the first's; a scientist's own is one more, not another."""
    larger = dataclasses.replace(ledgers.BUDGET, epsilon=2 * ledgers.BUDGET.epsilon)
    for budget in (larger, dataclasses.replace(ledgers.BUDGET, delta=1e-3)):
        with _store() as store:
            names = [ledgers.push(store)]
            with suppress(CasemateError):
                names.append(ledgers.push(store, "a, again", previous="a", budget=budget))
            _spend(store, names[-1])
            right = _inside(store, names[0], ledgers.BUDGET)
            holds(right, "owners: a new version brings a budget of its own")
            theirs: dict[str, Any] = {"previous": "a", "owner": ledgers.OTHER}
            _refused("another owner's rows are a version", ledgers.push, store, "b", **theirs)
    for own in (larger, dataclasses.replace(ledgers.BUDGET, epsilon=1.5)):
        with _store() as store:
            policy = dataclasses.replace(ledgers.OPEN, scientist_budget=own)
            name = ledgers.push(store, policy=policy)
            jobs = _spend(store, name)
            right = jobs > 0 and _inside(store, name, own, ledgers.SCIENTIST.id)
            holds(right, f"owners: {jobs} jobs pass a scientist's budget")
            _spend(store, name, ledgers.OTHER)
            right = _inside(store, name, ledgers.BUDGET)
            holds(right, "owners: scientists' budgets replace the dataset's")


def _caps() -> None:
    """``max_epsilon`` is measured at no larger delta than the budget's, whatever a job asks."""
    event, budget = ledgers.EVENT, ledgers.BUDGET
    spent = filters.nano([event])
    low, high = (filters.epsilon(spent, delta) for delta in (1e-3, budget.delta))
    for cap, allowed in (((low + high) / 2, False), (high * 1.01, True), (low / 2, False)):
        with _store() as store:
            policy = dataclasses.replace(ledgers.OPEN, max_epsilon=cap)
            name = ledgers.push(store, policy=policy)
            taken = _does(_reserved, store, "capped", (name,), event=event, delta=1e-3)
            holds(taken == allowed, f"owners: with a cap of {cap:.3f} a job of {high:.3f} is taken")


def _purposes() -> None:
    """Rows that were for one purpose never serve the other (P10)."""
    exact = dataclasses.replace(ledgers.OPEN, evaluation=True, evaluations=2)
    for first, second in ((ledgers.OPEN, exact), (exact, ledgers.OPEN)):
        with _store() as store:
            name, owner = ledgers.push(store, policy=first), ledgers.OWNER.id
            change: tuple[Any, ...] = (catalog.set_policy, store, name, owner, second)
            _refused("a purpose changes with the policy", *change)
            again: dict[str, Any] = {"previous": "a", "policy": second}
            _refused("a purpose changes with a version", ledgers.push, store, "again", **again)
    with _store() as store:
        name = ledgers.push(store, policy=exact)
        lineage = catalog.dataset(store, name).lineage
        whole = DpEvent(rate=1.0, noise_multiplier=20.0, steps=1)
        taken = _does(
            _reserved, store, "private metrics", (name,), event=whole, metrics=(Metric(name="a"),)
        )
        spent = catalog.account(store, lineage)
        full = (spent.rdp_nano, spent.delta_femto) == (filters.nano([whole]), filters.femto(2e-9))
        holds(taken and full, "owners: private metrics are not charged whole")


def _words() -> None:
    """Who may, until when, and with whose approval."""
    changes: tuple[tuple[str, Policy], ...] = (
        ("of a scientist whom it does not name", Policy(scientists=(ledgers.OTHER.id,))),
        ("after its last epoch", dataclasses.replace(ledgers.OPEN, last_epoch=0)),
        ("without approval", dataclasses.replace(ledgers.OPEN, approval="each-quote")),
    )
    for what, policy in changes:
        with _store() as store:
            name = ledgers.push(store, policy=policy)
            if policy.last_epoch is not None:
                catalog.advance_epoch(store, name, ledgers.OWNER.id, 1)
            holds(not _does(_reserved, store, "a job", (name,)), f"owners: a job {what} is taken")
    with _store() as store:
        policy = dataclasses.replace(ledgers.OPEN, approval="each-quote")
        name = ledgers.push(store, policy=policy)
        asked = ledgers.ask(store, "a job", (name,))
        quotes.judge(store, asked, ledgers.OWNER.id, "approve")
        job = ledger.submit(store, asked, ledgers.SCIENTIST.id).id
        other = dataclasses.replace(policy, max_epsilon=100.0)
        catalog.set_policy(store, name, ledgers.OWNER.id, other)
        _refused("a job of an older policy is charged", ledger.reserve, store, job)
        _refused("keys are given before a charge", ledger.begin, store, job)


def _resumed() -> None:
    """A job is gone on with as often as its owners allow, and no more."""
    for most in (0, 2):
        disk = SimDisk()
        store = ledgers.open_store(disk)
        name = ledgers.push(store, policy=dataclasses.replace(ledgers.OPEN, resumes=most))
        job = ledgers.queue(store, "a job", (name,))
        ledger.reserve(store, job)
        begun = 0
        while begun < 9 and _does(ledger.begin, store, job):
            begun += 1
            store.close()
            store = ledgers.open_store(disk, begun + 1)
        store.close()
        holds(begun == most + 1, f"owners: of a job with {most} resumes {begun} runs are begun")


def _withdrawn() -> None:
    """What an owner revokes gives no result any more, whatever its run has come to."""
    for stage in ("running", "committed"):
        with _store() as store:
            name, other = ledgers.push(store), ledgers.push(store, "b")
            job = ledgers.queue(store, "a job", (other, name))
            ledger.reserve(store, job)
            ledger.begin(store, job)
            if stage == "committed":
                ledgers.commit(store, job)
            catalog.revoke(store, name, ledgers.OWNER.id)
            left = _does(ledgers.finish, store, job)
            holds(not left, f"owners: a {stage} job on rows that were revoked has its result")
            holds(
                not _does(_reserved, store, "later", (name,)),
                "owners: a job on revoked rows is taken",
            )


def _witnessed() -> None:
    """Neither keys nor results leave before the owner's witnesses have cosigned."""
    with _store() as store:
        witness = ledgers.Witness()
        policy = dataclasses.replace(ledgers.OPEN, witnesses=(witness.vkey,), cosignatures=1)
        job = ledgers.queue(store, "a job", (ledgers.push(store, policy=policy),))
        witness.cosign(store)
        ledger.reserve(store, job)
        _refused("keys are given unwitnessed", ledger.begin, store, job)
        witness.cosign(store)
        ledger.begin(store, job)
        _refused("a result leaves unwitnessed", ledgers.finish, store, job)


def _claims() -> None:
    """A receipt of a run without privacy claims none (P10)."""
    words = "Anyone may have these rows."
    with _store() as store:
        policy = dataclasses.replace(ledgers.OPEN, nonprivate=words)
        job = ledgers.queue(store, "plain", (ledgers.push(store, policy=policy),), words=words)
        bundle = ledgers.run(store, job)
        payload = base64.b64decode(json.loads(bundle.envelope)["payload"])
        said = json.loads(payload)["predicate"]["guarantee"]
        plain = not said["private"] and "no privacy guarantee" in said["statement"]
        holds(plain, f"owners: of a run without privacy a receipt says {said}")
