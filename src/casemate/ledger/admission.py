"""Whether a job may be queued or charged: the owners' policies, then their budgets."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Final

from casemate.accounting.filters import RdpFilter
from casemate.ledger import catalog
from casemate.ledger.catalog import Account, Dataset
from casemate.ledger.quotes import StoredQuote
from casemate.ledger.store import Store
from casemate.spec import codec
from casemate.spec.data import Budget
from casemate.spec.errors import BudgetError, InternalError, PlanError, PolicyError
from casemate.spec.job import Charge, DatasetUse, NonPrivate, Quote

NOTHING: Final = Charge(rdp_nano=RdpFilter.empty(), delta_femto=0, epsilon=0.0)


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
        _check_policy(found, use, stored, rdp, evaluated(store, found.lineage, held=held))
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


def _check_policy(
    found: Dataset, use: DatasetUse, stored: StoredQuote, rdp: RdpFilter, evaluated: int
) -> None:
    """The owner's rules, one row each: (broken, code, sentence, mend)."""
    policy, quote = found.policy, stored.quote
    request, privacy = quote.request, quote.request.train.privacy
    words = privacy.words if isinstance(privacy, NonPrivate) else None
    verdict = stored.verdicts[found.id]
    ask = "Ask its owner."
    rules = (
        (found.state != "ready", f"policy.{found.state}", "does not serve", ask),
        (
            not policy.admits(quote.request.scientist),
            "policy.not-admitted",
            "does not admit this scientist",
            ask,
        ),
        (
            use.policy_digest != found.policy_digest,
            "policy.changed",
            "has another policy now",
            "Ask for a new quote.",
        ),
        (
            use.epoch != found.epoch,
            "policy.stale-epoch",
            "is in another epoch",
            "Ask for a new quote.",
        ),
        (
            stored.void is not None,
            stored.void or "",
            "is part of a quote that an owner's change made void",
            "Ask for a new quote.",
        ),
        (
            policy.last_epoch is not None and found.epoch > policy.last_epoch,
            "policy.expired",
            "has expired",
            ask,
        ),
        (
            policy.evaluation and not request.metrics,
            "policy.evaluation-only",
            "is for evaluation only",
            ask,
        ),
        (
            request.exact and not policy.evaluation,
            "policy.not-evaluation",
            "is not registered for evaluation",
            "Ask for private metrics, with epsilon and delta.",
        ),
        (
            request.exact and evaluated >= policy.evaluations,
            "policy.evaluations",
            f"gives {policy.evaluations} exact evaluations, and gave or holds {evaluated}",
            "Ask for private metrics, or its owner for more.",
        ),
        (
            not (quote.plan.private or request.exact)
            and (words is None or words != policy.nonprivate),
            "policy.private-only",
            "does not permit training without privacy in these words",
            "Repeat the policy's words, or train with privacy.",
        ),
        (
            quote.plan.private and not _within_job_limit(policy.max_epsilon, quote, rdp),
            "policy.max-epsilon",
            "allows less epsilon for one job",
            f"Ask for at most {policy.max_epsilon}.",
        ),
        (verdict == "reject", "policy.rejected", "is withheld: its owner rejected the quote", ask),
        (
            policy.approval == "each-quote" and verdict != "approve",
            "policy.not-approved",
            "needs its owner's approval of this quote",
            "Wait for the approval.",
        ),
    )
    for broken, code, sentence, mend in rules:
        if broken:
            raise PolicyError(
                code, f"The dataset {found.id} {sentence}.", mend=mend, where=found.id
            )


def _within_job_limit(most: float | None, quote: Quote, rdp: RdpFilter) -> bool:
    """Epsilon falls as delta grows, so a job cannot pass by showing it at a delta of its choice."""
    if most is None:
        return True
    shown = min(quote.delta, rdp.budget.delta)
    plan = quote.plan
    extra = plan.delta_truncation + plan.delta_sampler
    return rdp.charge(plan.events, extra, delta_shown=shown).epsilon <= most


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
