"""Quotes: what a plan costs each dataset, and whether its owner's policy and budget allow it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final, Literal

from casemate.accounting import filters, pld
from casemate.accounting.filters import RdpFilter
from casemate.spec import rules
from casemate.spec.data import DatasetSchema, Policy
from casemate.spec.job import (
    Charge,
    DatasetQuote,
    DatasetUse,
    Dp,
    Execution,
    JobRequest,
    Plan,
    Quote,
)
from casemate.spec.messages import Prepared

TICKS: Final = 100
MIN_TICK: Final = 0.25


@dataclass(frozen=True, slots=True)
class DatasetState:
    """A dataset as the ledger knows it now. ``spent`` in nano-RDP at each order, ``delta_femto`` in
    units of 1e-15; both with what is reserved. ``by_scientist``: both again, of this scientist's
    jobs alone. ``evaluated``: exact evaluations so far. ``entered``: this scientist's entries in
    its contest so far."""

    dataset: str
    owner: str
    schema: DatasetSchema
    policy: Policy
    policy_digest: str
    epoch: int
    state: Literal["checking", "ready", "frozen", "refused", "revoked"]
    filter: RdpFilter
    spent: tuple[int, ...]
    delta_femto: int
    by_scientist: tuple[tuple[int, ...], int]
    evaluated: int = 0
    entered: int = 0


def recompute(plan: Plan, delta: float) -> tuple[Charge, float]:
    """From a plan's events and extra deltas alone: the charge that each dataset's filter takes, and
    the tight PLD epsilon at the job's ``delta``. For receipts, after the run and offline.

    The PLD's part of delta is what the extra deltas leave. A plan without privacy costs nothing
    that a filter can hold, and its epsilon is 0 beside ``private=False``.
    """
    if not plan.private:
        return filters.NOTHING, 0.0
    extra = plan.delta_truncation + plan.delta_sampler
    charge = RdpFilter.charge(plan.events, extra, delta_shown=delta)
    return charge, pld.epsilon(plan.events, delta - extra)


def ticks(seconds: float) -> int:
    """Public progress steps of a run predicted to take this long: one lasts max(0.25 s, 1%)."""
    return max(1, math.ceil(seconds / max(MIN_TICK, seconds / TICKS)))


def refusal(
    request: JobRequest, charge: Charge, use: DatasetUse, now: DatasetState
) -> tuple[str, str] | None:
    """The first rule of the owner, or of the budget, that forbids the job: (code, sentence)."""
    name, own, privacy = now.schema.name, now.policy.scientist_budget, request.train.privacy
    delta = min(now.filter.budget.delta, privacy.delta if isinstance(privacy, Dp) else 1.0)
    standing = rules.Standing(
        state=now.state,
        policy=now.policy,
        policy_digest=now.policy_digest,
        epoch=now.epoch,
        evaluated=now.evaluated,
        beyond=filters.beyond(charge.rdp_nano, now.policy.max_epsilon, delta),
        entered=now.entered,
    )
    if (found := rules.broken(request, use, standing)) is not None:
        return found[0], f"The dataset {name!r} {found[1]}."
    if not now.filter.admits(now.spent, now.delta_femto, charge):
        left = now.filter.left(now.spent, now.delta_femto)
        return (
            "budget.exhausted",
            f"The dataset {name!r} has epsilon {left:.3g} left at delta"
            f" {now.filter.budget.delta:g}, the job would take {charge.epsilon:.3g}.",
        )
    if own is not None and not RdpFilter(own).admits(*now.by_scientist, charge):
        return (
            "budget.scientist",
            f"The dataset {name!r} has not enough budget left for this scientist.",
        )
    return None


def quote(
    request: JobRequest,
    plan: Plan,
    prepared: Prepared,
    execution: Execution,
    datasets: Sequence[DatasetState],
) -> Quote:
    """The quote of a compiled plan; ``datasets`` in the request's order. Reads no data.

    seconds = fixed + steps * (step + microbatches * microbatch's), all as probed in ``prepared``.
    """
    privacy = request.train.privacy
    delta = privacy.delta if isinstance(privacy, Dp) else 0.0
    charge, epsilon = recompute(plan, delta)
    rows = []
    for use, now in zip(request.datasets, datasets, strict=True):
        refused = refusal(request, charge, use, now)
        after = [s + c for s, c in zip(now.spent, charge.rdp_nano, strict=True)]
        rows.append(
            DatasetQuote(
                dataset=now.dataset,
                owner=now.owner,
                policy_digest=now.policy_digest,
                epoch=now.epoch,
                charge=charge,
                left_after=now.filter.left(after, now.delta_femto + charge.delta_femto),
                approval_needed=now.policy.approval == "each-quote",
                refusal=refused[0] if refused else None,
                message=refused[1] if refused else "",
            )
        )
    seconds = prepared.seconds_fixed + plan.steps * (
        prepared.seconds_per_step + plan.microbatches * prepared.seconds_per_microbatch
    )
    return Quote(
        request=request,
        plan=plan,
        execution=execution,
        epsilon=epsilon,
        delta=delta,
        datasets=tuple(rows),
        seconds=seconds,
        bytes=prepared.bytes,
        ticks=ticks(seconds),
        parameters=prepared.parameters,
        path=prepared.path,
    )
