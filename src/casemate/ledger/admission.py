"""Whether a job may be queued or charged: the owners' policies, then their budgets."""

from __future__ import annotations

from collections.abc import Iterator

from casemate.accounting import filters
from casemate.accounting.filters import NOTHING, RdpFilter
from casemate.ledger import catalog
from casemate.ledger.catalog import Account, Dataset
from casemate.ledger.quotes import StoredQuote
from casemate.ledger.store import Store
from casemate.spec import codec, rules
from casemate.spec.data import Budget
from casemate.spec.errors import BudgetError, InternalError, PlanError, PolicyError
from casemate.spec.job import Charge, DatasetUse, Quote


def admit(store: Store, stored: StoredQuote, *, held: bool) -> list[tuple[Dataset, Charge]]:
    """Each dataset of a job that policies and budgets allow now, with its charge."""
    plan = stored.quote.plan
    if plan.private != bool(plan.events):
        raise _bad_quote("a private plan has events, another has none")
    out = []
    lineages = set()
    for use, offered in zip(stored.quote.request.datasets, stored.quote.datasets, strict=True):
        found = catalog.dataset(store, use.dataset)
        rdp = RdpFilter(catalog.budget(store, found.lineage))
        charge = charge_of(rdp, stored.quote)
        if (use.dataset, charge) != (offered.dataset, offered.charge):
            raise _bad_quote("its charge is not what the filter takes")
        done = evaluated(store, found.lineage, held=held)
        before = entered(store, found, stored.quote.request.scientist, held=held)
        _check_policy(found, use, stored, rdp.budget, charge, done, before)
        if found.lineage in lineages:
            raise PlanError(
                "plan.same-lineage",
                f"The dataset {found.id} is a version of another one of the job.",
                mend="Train on one version of a dataset.",
                where=found.id,
            )
        lineages.add(found.lineage)
        for scientist, budget, code, whose in _filters(found, stored, rdp.budget):
            account = catalog.account(store, found.lineage, scientist)
            if held:
                account = _with_held(store, found.lineage, scientist, account)
            if not account.fits(RdpFilter(budget), charge):
                raise BudgetError(
                    code,
                    f"The dataset {found.id} has not enough budget left{whose} for this job.",
                    mend="Ask for a smaller epsilon, or for the owner's new dataset.",
                    where=found.id,
                )
        out.append((found, charge))
    return out


def _bad_quote(why: str) -> InternalError:
    return InternalError("internal.quote", f"The quote is wrong: {why}.", mend="Report it.")


def charge_of(rdp: RdpFilter, quote: Quote) -> Charge:
    """What a filter takes for the quote's plan; nothing for a job without privacy (P10)."""
    plan = quote.plan
    if not plan.private:
        return NOTHING
    extra = plan.delta_truncation + plan.delta_sampler
    return rdp.charge(plan.events, extra, delta_shown=quote.delta)


def evaluated(store: Store, lineage: str, *, held: bool) -> int:
    """Exact evaluations of a ledger so far, ``held`` ones in the queue too. Nobody trains on what
    is for evaluation, so they are its jobs that charge nothing."""
    sql = (
        "SELECT count(*) FROM job_datasets JOIN jobs ON id = job WHERE lineage = ? AND charge = ?"
        " AND (reserved IS NOT NULL OR (? AND state = 'queued'))"
    )
    row = store.one(sql, lineage, codec.encode(NOTHING), held)
    assert row is not None
    return int(row[0])


def entered(store: Store, found: Dataset, scientist: str, *, held: bool) -> int:
    """Jobs of a scientist on a contest's ledger so far, ``held`` ones in the queue too: all of them
    are entries."""
    if found.policy.contest is None:
        return 0
    sql = (
        "SELECT count(*) FROM job_datasets JOIN jobs ON id = job WHERE lineage = ? AND"
        " scientist = ? AND (reserved IS NOT NULL OR (? AND state = 'queued'))"
    )
    row = store.one(sql, found.lineage, scientist, held)
    assert row is not None
    return int(row[0])


def _check_policy(
    found: Dataset,
    use: DatasetUse,
    stored: StoredQuote,
    budget: Budget,
    charge: Charge,
    evaluated: int,
    entered: int,
) -> None:
    """The owner's rules, then the owner's word on this quote."""
    quote, verdict = stored.quote, stored.verdicts[found.id]
    cap, delta = found.policy.max_epsilon, min(quote.delta, budget.delta)
    standing = rules.Standing(
        state=found.state,
        policy=found.policy,
        policy_digest=found.policy_digest,
        epoch=found.epoch,
        evaluated=evaluated,
        beyond=charge != NOTHING and filters.beyond(charge.rdp_nano, cap, delta),
        entered=entered,
    )
    if (broken := rules.broken(quote.request, use, standing)) is None:
        words = (
            (stored.void is not None, stored.void or "",
             "is part of a quote that an owner's change made void", "Ask for a new quote."),
            (verdict == "reject", "policy.rejected",
             "is withheld: its owner rejected the quote", "Ask its owner."),
            (found.policy.approval == "each-quote" and verdict != "approve", "policy.not-approved",
             "needs its owner's approval of this quote", "Wait for the approval."),
        )  # fmt: skip
        broken = next((row[1:] for row in words if row[0]), None)
    if broken is not None:
        code, sentence, mend = broken
        raise PolicyError(code, f"The dataset {found.id} {sentence}.", mend=mend, where=found.id)


def _filters(
    found: Dataset, stored: StoredQuote, budget: Budget
) -> Iterator[tuple[str, Budget, str, str]]:
    """The filters that a job must pass: (whose account, budget, code, words)."""
    yield catalog.EVERYONE, budget, "budget.exhausted", ""
    if found.policy.scientist_budget is not None:
        scientist = stored.quote.request.scientist
        yield scientist, found.policy.scientist_budget, "budget.scientist", " for this scientist"


def _with_held(store: Store, lineage: str, scientist: str, account: Account) -> Account:
    """An account with what queued jobs will take."""
    sql = (
        "SELECT charge FROM job_datasets JOIN jobs ON id = job"
        " WHERE lineage = ?1 AND state = 'queued' AND ?2 IN ('', scientist)"
    )
    for (raw,) in store.all(sql, lineage, scientist):
        account = account.add(codec.decode(Charge, raw))
    return account
