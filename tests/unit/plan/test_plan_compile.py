"""Plans: capacity against exact tails, and each constant against its rule."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from plan_values import prepared, request, schema
from scipy.stats import binom

from casemate.accounting.filters import RdpFilter
from casemate.plan import compile as compiler
from casemate.plan.compile import capacity, compile_plan
from casemate.spec import codec
from casemate.spec.data import Budget
from casemate.spec.errors import PlanError
from casemate.spec.job import Dp, NonPrivate, Plan


@settings(max_examples=150, deadline=None)
@given(
    st.integers(1, 200_000), st.floats(1e-5, 1.0), st.integers(1, 100_000), st.floats(1e-12, 1e-4)
)
def test_capacity_holds_and_is_near_the_smallest(n: int, q: float, steps: int, part: float) -> None:
    slots = capacity(n, q, steps, part)
    assert n * q < slots <= n or slots == n
    if slots < n:
        assert steps * binom.sf(slots, n, q) <= part
    fewer = slots - max(4, math.ceil(0.02 * slots))
    assert fewer <= n * q or steps * binom.sf(fewer, n, q) > part


def test_capacity_of_certain_and_of_huge_samples() -> None:
    assert capacity(500, 1.0, 10, 1e-9) == 500
    assert capacity(500, 0.999, 10, 1e-9) == 500
    # 2^40 units at a rate of 256 in all: a Poisson tail.
    slots = capacity(2**40, 256 / 2**40, 10_000, 1e-9)
    assert 256 + 5 * 16 < slots < 256 + 9 * 16


@pytest.mark.parametrize("bug", ["mean", "one-step", "other-tail"])
def test_seeded_capacities_are_caught(bug: str, monkeypatch: pytest.MonkeyPatch) -> None:
    real = capacity
    wrong = {
        "mean": lambda n, q, steps, part: math.ceil(n * q),
        "one-step": lambda n, q, steps, part: real(n, q, 1, part),
        "other-tail": lambda n, q, steps, part: max(1, real(n, q, steps, part) - 2),
    }
    monkeypatch.setitem(globals(), "capacity", wrong[bug])
    with pytest.raises(AssertionError):
        test_capacity_holds_and_is_near_the_smallest.hypothesis.inner_test(
            10_000, 0.01, 5_000, 1e-9
        )


def check_rules(plan: Plan, d: int, eta: float, rounding: float) -> None:
    """What must hold of any private plan, recomputed here."""
    assert plan.private and plan.rate * plan.units == pytest.approx(plan.normaliser)
    assert math.frexp(plan.grid)[0] == 0.5
    before = plan.clip * (1 + eta) + 2 * rounding
    least = before + plan.grid * math.sqrt(d)
    assert least <= plan.sensitivity <= least * (1 + 1e-12)
    assert plan.sigma >= plan.noise_multiplier * plan.sensitivity
    assert 2**8 <= plan.sigma / plan.grid <= 2**32
    slots = plan.microbatch * plan.microbatches
    assert slots * (2 * plan.clip / plan.grid + 1) + plan.sigma / plan.grid * 2**11 < 2**62
    if plan.sensitivity > before * 1.001:  # no finer grid would do
        half = plan.grid / 2
        scale = plan.noise_multiplier * (before + half * math.sqrt(d)) / half
        assert scale > 2**32 or slots * (2 * plan.clip / half + 1) + scale * 2**12 >= 2**62
    if slots < plan.units:
        tail = plan.steps * binom.sf(slots, plan.units, plan.rate)
        assert tail <= plan.delta_truncation
    (event,) = plan.events
    assert (event.rate, event.steps) == (plan.rate, plan.steps)
    assert event.noise_multiplier == plan.noise_multiplier


@settings(max_examples=40, deadline=None)
@given(
    st.floats(0.1, 50.0),
    st.floats(1e-8, 1e-3),
    st.floats(1e-3, 1e3),
    st.integers(1, 2**30),
    st.integers(1, 600),
    st.integers(1, 20_000),
    st.floats(0.0, 1e-3),
)
def test_plans_keep_the_rules(
    epsilon: float, delta: float, clip: float, d: int, batch: int, steps: int, rounding: float
) -> None:
    job = request(2, batch=batch, steps=steps, privacy=Dp(epsilon=epsilon, delta=delta, clip=clip))
    plan = compile_plan(job, (schema(), schema()), prepared(dimension=d, rounding=rounding * clip))
    check_rules(plan, d, 1e-12, rounding * clip)
    extra = plan.delta_truncation + plan.delta_sampler
    assert max(plan.delta_truncation, plan.delta_sampler) <= delta / 100
    charge = RdpFilter.charge(plan.events, extra, delta_shown=delta)
    assert charge.epsilon <= epsilon
    fresh = RdpFilter(Budget(epsilon=epsilon, delta=delta))
    assert fresh.admits(RdpFilter.empty(), 0, charge)
    assert not fresh.admits(charge.rdp_nano, charge.delta_femto, charge)
    assert codec.decode(Plan, codec.encode(plan)) == plan


def test_the_plan_binds_request_and_model() -> None:
    job = request()
    plan = compile_plan(job, (schema(),), prepared())
    assert plan.request_digest == codec.digest(job) and plan.model_digest == job.model_digest


def test_a_worker_has_the_plan_from_the_training_alone() -> None:
    asked, said = request(2), prepared()
    found = compiler.constants(asked.train, [schema(), schema("south")], said)
    whole = compile_plan(asked, [schema(), schema("south")], said)
    assert replace(found, request_digest=codec.digest(asked)) == whole


def test_all_datasets_are_one_population() -> None:
    one = compile_plan(request(1), (schema(rows=600),), prepared())
    two = compile_plan(request(2), (schema(rows=100), schema(rows=500)), prepared())
    assert (one.units, one.rate, one.events) == (two.units, two.rate, two.events)


def test_the_whole_population_in_every_step() -> None:
    plan = compile_plan(request(batch=300), (schema(),), prepared())
    assert plan.rate == 1.0 and plan.microbatch * plan.microbatches >= 300


def test_a_batch_above_the_population_is_refused() -> None:
    with pytest.raises(PlanError) as e:
        compile_plan(request(batch=301), (schema(),), prepared())
    assert e.value.code == "plan.batch-size" and e.value.where == "train.batch_size"


def test_too_small_an_epsilon_is_refused() -> None:
    with pytest.raises(PlanError) as e:
        compile_plan(request(privacy=Dp(epsilon=1e-5, delta=1e-9)), (schema(),), prepared())
    assert e.value.code == "plan.epsilon"


def test_a_job_without_privacy_has_no_noise_and_no_events() -> None:
    job = request(privacy=NonPrivate(words="this one is public"))
    plan = compile_plan(job, (schema(),), prepared())
    assert not plan.private and plan.events == ()
    assert plan.sigma == plan.noise_multiplier == plan.delta_truncation == 0.0
    assert plan.microbatch * plan.microbatches >= 64


@pytest.mark.parametrize("bug", ["no-rounding", "one-sided", "no-grid"])
def test_seeded_sensitivities_are_caught(bug: str, monkeypatch: pytest.MonkeyPatch) -> None:
    real = compiler.sensitivity
    wrong = {
        "no-rounding": lambda c, eta, r, g, d: real(c, eta, 0.0, g, d),
        "one-sided": lambda c, eta, r, g, d: real(c, eta, r / 2, g, d),
        "no-grid": lambda c, eta, r, g, d: real(c, eta, r, 0.0, d),
    }
    monkeypatch.setattr(compiler, "sensitivity", wrong[bug])
    plan = compile_plan(request(), (schema(),), prepared(rounding=1e-6, dimension=10**6))
    with pytest.raises(AssertionError):
        check_rules(plan, 10**6, 1e-12, 1e-6)


def test_a_delta_whose_part_is_zero_is_refused():
    """The smallest float: its ten-thousandth part has no logarithm."""
    with pytest.raises(PlanError) as e:
        capacity(1000, 0.01, 10, 5e-324 * 1e-4)
    assert e.value.code == "plan.delta"
