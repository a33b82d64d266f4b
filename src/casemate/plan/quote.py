"""Quotes: what a plan costs each dataset, and whether its owner's policy and budget allow it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final, Literal

from casemate.accounting import filters, pld
from casemate.accounting.filters import RdpFilter
from casemate.spec.data import DatasetSchema, Policy
from casemate.spec.job import (
    Charge,
    DatasetQuote,
    DatasetUse,
    Dp,
    Execution,
    JobRequest,
    NonPrivate,
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
    jobs alone. ``evaluated``: exact evaluations so far."""

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


def recompute(plan: Plan, delta: float) -> tuple[Charge, float]:
    """From a plan's events and extra deltas alone: the charge that each dataset's filter takes, and
    the tight PLD epsilon at the job's ``delta``. For receipts, after the run and offline.

    The PLD's part of delta is what the extra deltas leave. A plan without privacy costs nothing
    that a filter can hold, and its epsilon is 0 beside ``private=False``.
    """
    if not plan.private:
        return Charge(rdp_nano=RdpFilter.empty(), delta_femto=0, epsilon=0.0), 0.0
    extra = plan.delta_truncation + plan.delta_sampler
    charge = RdpFilter.charge(plan.events, extra, delta_shown=delta)
    return charge, pld.epsilon(plan.events, delta - extra)


def ticks(seconds: float) -> int:
    """Public progress steps of a run predicted to take this long: one lasts max(0.25 s, 1%)."""
    return max(1, math.ceil(seconds / max(MIN_TICK, seconds / TICKS)))


def refusal(
    request: JobRequest, plan: Plan, charge: Charge, use: DatasetUse, now: DatasetState
) -> tuple[str, str] | None:
    """The first rule of the owner, or of the budget, that forbids the job: (code, sentence)."""
    policy, privacy = now.policy, request.train.privacy
    words = privacy.words if isinstance(privacy, NonPrivate) else None
    capped, own = policy.max_epsilon, policy.scientist_budget
    # Epsilon falls as delta grows: a job may not pass by showing it at a delta of its choice.
    at = min(now.filter.budget.delta, privacy.delta) if isinstance(privacy, Dp) else 1.0
    rules = (
        (now.state != "ready", f"policy.{now.state}", f"is {now.state}, not ready"),
        (
            not policy.admits(request.scientist),
            "policy.not-admitted",
            "does not admit this scientist",
        ),
        (
            use.policy_digest != now.policy_digest,
            "policy.changed",
            "has another policy now; list it again",
        ),
        (
            use.epoch != now.epoch,
            "policy.stale-epoch",
            f"is in epoch {now.epoch}, not {use.epoch}; list it again",
        ),
        (
            policy.last_epoch is not None and now.epoch > policy.last_epoch,
            "policy.expired",
            f"has expired with epoch {policy.last_epoch}",
        ),
        (
            policy.evaluation and not request.metrics,
            "policy.evaluation-only",
            "is for evaluation only",
        ),
        (
            request.exact and not policy.evaluation,
            "policy.not-evaluation",
            "is not registered for evaluation, so that metrics on it must be private",
        ),
        (
            request.exact and now.evaluated >= policy.evaluations,
            "policy.evaluations",
            f"gives {policy.evaluations} exact evaluations, and gave {now.evaluated}",
        ),
        (
            not (plan.private or request.exact) and (words is None or words != policy.nonprivate),
            "policy.private-only",
            "does not permit training without privacy in these words",
        ),
        (
            plan.private and capped is not None and filters.epsilon(charge.rdp_nano, at) > capped,
            "policy.max-epsilon",
            f"allows at most epsilon {capped} for one job",
        ),
        (
            not now.filter.admits(now.spent, now.delta_femto, charge),
            "budget.exhausted",
            f"has epsilon {now.filter.left(now.spent, now.delta_femto):.3g} left"
            f" at delta {now.filter.budget.delta:g}, the job would take {charge.epsilon:.3g}",
        ),
        (
            own is not None and not RdpFilter(own).admits(*now.by_scientist, charge),
            "budget.scientist",
            "has not enough budget left for this scientist",
        ),
    )
    for broken, code, sentence in rules:
        if broken:
            return code, f"The dataset {now.schema.name!r} {sentence}."
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
        refused = refusal(request, plan, charge, use, now)
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
