"""Quotes: costs, refusals in the order of the owner's rules, and recomputation."""

from __future__ import annotations

import math
from dataclasses import replace
from statistics import NormalDist
from typing import Any

import pytest
from plan_values import POLICY, X, Y, prepared, request, schema, state

from casemate.accounting.filters import RdpFilter, delta_capacity
from casemate.plan.compile import compile_plan
from casemate.plan.quote import MIN_TICK, quote, recompute, ticks
from casemate.spec import codec
from casemate.spec.data import Budget, Column, DatasetSchema, Policy
from casemate.spec.job import (
    Dp,
    Execution,
    JobRequest,
    Metric,
    NonPrivate,
    Quote,
    Sgd,
    TrainSpec,
)


def made(job: JobRequest, *states: Any) -> Quote:
    plan = compile_plan(job, [s.schema for s in states], prepared())
    return quote(job, plan, prepared(), Execution(), states)


def test_a_quote_says_what_each_dataset_pays() -> None:
    result = made(request(2), state(0), state(1, budget=Budget(epsilon=2.5, delta=1e-5)))
    first, second = result.datasets
    assert first.charge == second.charge and first.refusal is second.refusal is None
    assert 1.99 < first.charge.epsilon <= 2.0 and 0 < result.epsilon < first.charge.epsilon
    assert 4.0 > first.left_after > second.left_after > 0
    assert (first.dataset, first.owner) == (state(0).dataset, "id_owner0")
    assert not first.approval_needed and result.delta == 1e-5
    plan = result.plan
    assert result.seconds == pytest.approx(0.5 + 100 * (0.002 + plan.microbatches * 0.01))
    assert codec.decode(Quote, codec.encode(result)) == result


OTHER = Policy(scientists=("id_bob",))
FOUR = Budget(epsilon=4.0, delta=1e-5)
CAPPED = Policy(scientists=("*",), max_epsilon=1.5)


@pytest.mark.parametrize(
    ("code", "changes"),
    [
        ("policy.checking", {"state": "checking"}),
        ("policy.revoked", {"state": "revoked"}),
        ("policy.not-admitted", {"policy": OTHER}),
        ("policy.changed", {"policy": Policy(scientists=("*",)), "policy_digest": "sha256:1"}),
        ("policy.stale-epoch", {"epoch": 1}),
        ("policy.expired", {"policy": Policy(scientists=("*",), last_epoch=0), "epoch": 1}),
        ("policy.evaluation-only", {"policy": Policy(scientists=("*",), evaluation=True)}),
        ("policy.max-epsilon", {"policy": CAPPED}),
        ("budget.exhausted", {"budget": Budget(epsilon=1.0, delta=1e-5)}),
        ("budget.exhausted", {"budget": Budget(epsilon=2.0, delta=1e-6)}),
        ("budget.exhausted", {"delta_femto": delta_capacity(1e-5)}),
        (
            "budget.scientist",
            {"policy": Policy(scientists=("*",), scientist_budget=Budget(epsilon=1.0, delta=1e-5))},
        ),
        (
            "budget.scientist",
            {
                "policy": Policy(scientists=("*",), scientist_budget=FOUR),
                "by_scientist": (RdpFilter.empty(), delta_capacity(1e-5)),
            },
        ),
    ],
)  # fmt: skip
def test_refusals(code: str, changes: dict[str, Any]) -> None:
    policy = changes.get("policy", POLICY)
    job = request(policy=policy)
    if code == "policy.expired":
        use = codec.from_json(type(job.datasets[0]), {**codec.to_json(job.datasets[0]), "epoch": 1})  # type: ignore[dict-item]
        job = codec.from_json(JobRequest, {**codec.to_json(job), "datasets": [codec.to_json(use)]})  # type: ignore[dict-item]
    (row,) = made(job, state(**changes)).datasets
    assert row.refusal == code and "'north'" in row.message


HELD_OUT = Policy(scientists=("*",), evaluation=True, evaluations=3)


@pytest.mark.parametrize(
    ("code", "policy", "evaluated"),
    [
        (None, HELD_OUT, 2),
        ("policy.evaluations", HELD_OUT, 3),
        ("policy.evaluations", Policy(scientists=("*",), evaluation=True), 0),
        ("policy.not-evaluation", Policy(scientists=("*",), nonprivate="Anybody may train."), 0),
    ],
)
def test_exact_metrics(code: str | None, policy: Policy, evaluated: int) -> None:
    job = evaluation(policy, NonPrivate(words="Anybody may train."))
    (row,) = made(job, state(policy=policy, evaluated=evaluated)).datasets
    assert row.refusal == code and row.charge.epsilon == 0.0


def evaluation(policy: Policy, privacy: Dp | NonPrivate) -> JobRequest:
    train = TrainSpec(batch_size=schema().units, steps=1, privacy=privacy, optimizer=Sgd(lr=1.0))
    return replace(request(policy=policy), train=train, metrics=(Metric(name="accuracy"),))


@pytest.mark.parametrize("policy", [POLICY, HELD_OUT])
def test_private_metrics_cost_as_one_step_on_all_rows(policy: Policy) -> None:
    result = made(evaluation(policy, Dp(epsilon=1.0, delta=1e-5, clip=1.5)), state(policy=policy))
    (row,) = result.datasets
    assert row.refusal is None and 0.99 < row.charge.epsilon <= 1.0
    (event,) = result.plan.events
    assert (event.rate, event.steps) == (1.0, 1)
    # The Gaussian mechanism's own curve (Balle and Wang 2018, Theorem 8), at the event's delta.
    mu = 1 / event.noise_multiplier
    cdf = NormalDist().cdf
    eps = result.epsilon
    delta = cdf(mu / 2 - eps / mu) - math.exp(eps) * cdf(-mu / 2 - eps / mu)
    assert delta == pytest.approx(1e-5, rel=0.01)


def test_approval_is_asked_for_but_refuses_nothing() -> None:
    policy = Policy(scientists=("*",), approval="each-quote")
    (row,) = made(request(policy=policy), state(policy=policy)).datasets
    assert row.approval_needed and row.refusal is None


def test_a_large_delta_does_not_get_round_max_epsilon() -> None:
    # At delta 0.01 the job shows 1.4; at the budget's delta it is above 1.5.
    job = request(privacy=Dp(epsilon=1.4, delta=0.01), policy=CAPPED)
    (row,) = made(job, state(policy=CAPPED, budget=Budget(epsilon=50.0, delta=1e-6))).datasets
    assert row.charge.epsilon <= 1.4 and row.refusal == "policy.max-epsilon"


def test_the_second_job_of_the_budgets_size_is_refused() -> None:
    budget = Budget(epsilon=2.0, delta=1e-5)
    (first,) = made(request(), state(budget=budget)).datasets
    assert first.refusal is None and first.left_after < 0.1
    spent = state(budget=budget, spent=first.charge.rdp_nano, delta_femto=first.charge.delta_femto)
    (second,) = made(request(), spent).datasets
    assert second.refusal == "budget.exhausted"


@pytest.mark.parametrize(
    ("words", "policy_words", "refusal"),
    [
        ("these rows are public", "these rows are public", None),
        ("these rows are not", "these rows are public", "policy.private-only"),
        ("these rows are public", None, "policy.private-only"),
    ],
)
def test_no_privacy_only_in_the_owners_words(
    words: str, policy_words: str | None, refusal: str | None
) -> None:
    policy = Policy(scientists=("*",), nonprivate=policy_words)
    job = request(privacy=NonPrivate(words=words), policy=policy)
    result = made(job, state(policy=policy))
    assert result.datasets[0].refusal == refusal
    assert not result.plan.private and result.epsilon == 0.0
    assert not any(result.datasets[0].charge.rdp_nano)


def test_recompute_needs_the_plan_alone() -> None:
    result = made(request(), state())
    charge, epsilon = recompute(result.plan, result.delta)
    assert (charge, epsilon) == (result.datasets[0].charge, result.epsilon)


def test_recompute_shows_a_plan_with_too_little_noise() -> None:
    result = made(request(), state())
    fields = codec.to_json(result.plan)
    assert isinstance(fields, dict) and isinstance(fields["events"], list)
    event = fields["events"][0]
    assert isinstance(event, dict)
    event["noise_multiplier"] = result.plan.noise_multiplier * 0.98
    weaker = codec.from_json(type(result.plan), fields)
    charge, epsilon = recompute(weaker, result.delta)
    assert charge.epsilon > 2.0 and epsilon > result.epsilon


def test_ticks_are_public_and_coarse() -> None:
    assert ticks(0.0) == 1 and ticks(0.1) == 1
    assert ticks(10.0) == 40 and ticks(25.0) == 100 and ticks(3600.0) == 100
    for seconds in (0.3, 1.0, 7.7, 24.9, 100.0):
        assert seconds / ticks(seconds) >= min(MIN_TICK, seconds) * 0.5


def test_rows_per_unit_change_no_constant() -> None:
    """A unit's rows are summed before one clip: slots and noise count units (P1)."""
    who = Column(name="who", dtype="i64", low=0, high=299, role="unit")
    columns = (X, Y, who)
    many = DatasetSchema(name="north", columns=columns, rows=1200, units=300, rows_per_unit=4)
    one = compile_plan(request(), (schema(),), prepared())
    assert compile_plan(request(), (many,), prepared()) == one
