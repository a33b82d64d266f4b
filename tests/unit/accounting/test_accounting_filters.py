"""The dataset's filter: what it admits, that it never exceeds, and that it compares integers."""

from __future__ import annotations

import ast
import inspect
import math
import textwrap
from fractions import Fraction

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from casemate.accounting import calibrate, filters, rdp
from casemate.accounting.filters import RdpFilter
from casemate.spec import codec
from casemate.spec.canonical import MAX_INT
from casemate.spec.data import Budget
from casemate.spec.errors import BudgetError, PlanError
from casemate.spec.job import Charge, DpEvent

epsilons = st.floats(0.02, 200.0)
deltas = st.floats(1e-12, 1e-2)
events = st.builds(
    DpEvent,
    rate=st.floats(1e-4, 1.0),
    noise_multiplier=st.floats(0.5, 50.0),
    steps=st.integers(1, 5000),
)


def job(rate: float, noise: float, steps: int, *, extra: float = 0.0) -> Charge:
    event = DpEvent(rate=rate, noise_multiplier=noise, steps=steps)
    return RdpFilter.charge([event], extra, delta_shown=1e-5)


def test_shares_of_delta_sum_to_at_most_one() -> None:
    # Over the whole range of budgets, finely: shares move smoothly with log(epsilon).
    worst = max(
        sum(filters.weight(a, 10 ** (e / 100), delta) for a in rdp.ORDERS)
        for e in range(-500, 301)
        for delta in (1e-15, 1e-12, 1e-8, 1e-5, 1e-3, 1e-2)
    )
    assert 0.9 < worst <= 1.0


@settings(max_examples=200, deadline=None)
@given(st.floats(1e-4, 1000.0), st.floats(1e-14, 1e-2))
def test_shares_of_any_budget_sum_to_at_most_one(epsilon: float, delta: float) -> None:
    assert sum(filters.weight(a, epsilon, delta) for a in rdp.ORDERS) <= 1.0


@settings(max_examples=100, deadline=None)
@given(epsilons, epsilons, deltas)
def test_capacity_rises_with_epsilon(e1: float, e2: float, delta: float) -> None:
    low, high = (filters.capacities(e, delta) for e in sorted((e1, e2)))
    assert all(x <= y for x, y in zip(low, high, strict=True))


@settings(max_examples=100, deadline=None)
@given(epsilons, deltas)
def test_capacity_keeps_the_proof(epsilon: float, delta: float) -> None:
    """sum over orders of exp((a-1)(B - E)) (1/a)(1-1/a)^(a-1) is at most 0.9 delta: the sum that
    docs/privacy.md bounds delta by (Canonne, Kamath, Steinke 2020, Proposition 12, each order)."""
    total = 0.0
    for a, b in zip(rdp.ORDERS, filters.capacities(epsilon, delta), strict=True):
        if b >= 0:
            total += math.exp((a - 1) * (b / 1e9 - epsilon + math.log1p(-1 / a)) - math.log(a))
    assert total <= 0.9 * delta


@settings(max_examples=60, deadline=None)
@given(st.lists(events, max_size=3), events)
def test_charges_round_up_and_add(some: list[DpEvent], more: DpEvent) -> None:
    alone, rest, both = (filters.nano(x) for x in ([more], some, [*some, more]))
    for i in range(len(rdp.ORDERS)):
        exact = sum(
            e.steps * Fraction(rdp.step_curve(e.rate, e.noise_multiplier)[i]) for e in [*some, more]
        )
        assert both[i] == min(math.ceil(exact * 10**9), filters.SATURATED)
        assert both[i] <= alone[i] + rest[i]
        assert alone[i] + rest[i] <= both[i] + 1 or both[i] == filters.SATURATED


@settings(max_examples=40, deadline=None)
@given(st.floats(0.1, 20.0), st.floats(1e-9, 1e-3), st.lists(events, min_size=1, max_size=12))
def test_the_filter_never_exceeds(epsilon: float, delta: float, jobs: list[DpEvent]) -> None:
    """Whatever is asked in whatever order, what was admitted is within (epsilon, delta) by the
    plain conversion at the order that holds, and extra deltas within a tenth."""
    rdp_filter = RdpFilter(Budget(epsilon=epsilon, delta=delta))
    spent, extra = RdpFilter.empty(), 0
    total = [Fraction(0)] * len(rdp.ORDERS)
    for event in jobs:
        charge = Charge(
            rdp_nano=filters.nano([event]), delta_femto=filters.femto(delta / 50), epsilon=0.0
        )
        if rdp_filter.admits(spent, extra, charge):
            spent = tuple(map(sum, zip(spent, charge.rdp_nano, strict=True)))
            extra += charge.delta_femto
            for i, r in enumerate(rdp.step_curve(event.rate, event.noise_multiplier)):
                total[i] += event.steps * Fraction(r)
    assert rdp.epsilon(tuple(map(float, total)), 0.9 * delta) <= epsilon
    assert Fraction(extra, filters.FEMTO) <= Fraction(delta) / 10 * (1 + Fraction(1, 10**9))
    state = rdp_filter.state(spent, extra, 1)
    assert 0 <= state.spent_epsilon <= epsilon and 0 <= state.left_epsilon <= epsilon


def test_more_than_the_extra_share_of_delta_is_refused() -> None:
    rdp_filter = RdpFilter(Budget(epsilon=8.0, delta=1e-5))
    tiny = job(0.01, 20.0, 1, extra=0.9e-6)
    assert rdp_filter.admits(RdpFilter.empty(), 0, tiny)
    assert not rdp_filter.admits(RdpFilter.empty(), 0.2e-6 * filters.FEMTO, tiny)
    assert rdp_filter.left(RdpFilter.empty(), rdp_filter.delta_capacity) == 0.0


@pytest.mark.parametrize(
    ("rate", "steps", "epsilon", "delta"),
    [(0.05, 300, 2.0, 1e-5), (1.0, 1, 1.0, 1e-6), (1.0, 500, 8.0, 1e-5), (0.001, 5000, 0.5, 1e-7),
     (0.3, 20, 30.0, 1e-3), (0.01, 2000, 100.0, 1e-2), (0.1, 1, 0.05, 1e-4)],
)  # fmt: skip
def test_a_budget_admits_exactly_one_job_of_its_size(
    rate: float, steps: int, epsilon: float, delta: float
) -> None:
    noise = calibrate.noise_multiplier(rate, steps, epsilon, delta)
    event = DpEvent(rate=rate, noise_multiplier=noise, steps=steps)
    charge = RdpFilter.charge([event], 2e-4 * delta, delta_shown=delta)
    assert 0.995 * epsilon <= charge.epsilon <= epsilon
    rdp_filter = RdpFilter(Budget(epsilon=epsilon, delta=delta))
    assert rdp_filter.admits(RdpFilter.empty(), 0, charge)
    assert not rdp_filter.admits(charge.rdp_nano, charge.delta_femto, charge)
    # The charge's epsilon is itself a budget that admits it.
    at_shown = RdpFilter(Budget(epsilon=charge.epsilon, delta=delta))
    assert at_shown.admits(RdpFilter.empty(), 0, charge)
    smaller = RdpFilter(Budget(epsilon=charge.epsilon * 0.999, delta=delta))
    assert not smaller.admits(RdpFilter.empty(), 0, charge)
    # And less noise is not admitted: the calibration is the smallest.
    less = RdpFilter.charge(
        [DpEvent(rate=rate, noise_multiplier=noise * 0.999, steps=steps)], 0.0, delta_shown=delta
    )
    assert not rdp_filter.admits(RdpFilter.empty(), 0, less)


def test_state_of_a_fresh_and_of_a_spent_dataset() -> None:
    rdp_filter = RdpFilter(Budget(epsilon=3.0, delta=1e-5))
    fresh = rdp_filter.state(RdpFilter.empty(), 0, 0)
    assert (fresh.spent_epsilon, fresh.jobs) == (0.0, 0)
    assert fresh.left_epsilon == pytest.approx(3.0, rel=1e-6)
    charge = job(1.0, 20.0, 10)
    spent, left = charge.rdp_nano, [fresh.left_epsilon]
    jobs = 1
    while rdp_filter.admits(spent, 0, charge):
        state = rdp_filter.state(spent, 0, jobs)
        left.append(state.left_epsilon)
        assert charge.epsilon <= state.left_epsilon + 1e-6
        spent = tuple(map(sum, zip(spent, charge.rdp_nano, strict=True)))
        jobs += 1
    assert jobs >= 3 and left == sorted(left, reverse=True)
    assert rdp_filter.left(spent, 0) < charge.epsilon
    assert rdp_filter.left([filters.SATURATED] * len(rdp.ORDERS), 0) == 0.0


def test_a_job_beyond_measure_is_refused() -> None:
    with pytest.raises(BudgetError) as e:
        job(1.0, 0.002, 10_000_000)
    assert e.value.code == "budget.beyond-measure"
    with pytest.raises(BudgetError):
        job(0.1, 5.0, 10, extra=2e-6)


def test_no_noise_is_enough_for_a_budget_below_the_orders() -> None:
    with pytest.raises(PlanError) as e:
        calibrate.noise_multiplier(0.1, 10, 1e-4, 1e-9)
    assert e.value.code == "plan.epsilon"


def test_charges_fit_the_formats() -> None:
    charge = Charge(rdp_nano=filters.nano([DpEvent(rate=1.0, noise_multiplier=0.01, steps=10**7)]),
                    delta_femto=filters.femto(0.01), epsilon=1.0)  # fmt: skip
    assert codec.decode(Charge, codec.encode(charge)) == charge
    assert max(filters.capacities(1000.0, 0.01)) < filters.SATURATED
    # A lineage's sums stay in 63 bits for 10^5 jobs however bad.
    assert filters.SATURATED * 10**5 < 2**63 and filters.SATURATED < MAX_INT


def _comparisons(function: object) -> list[ast.AST]:
    tree = ast.parse(textwrap.dedent(inspect.getsource(function)))  # type: ignore[arg-type]
    return list(ast.walk(tree))


@pytest.mark.parametrize("function", [filters.fits, RdpFilter.admits])
def test_no_float_is_near_what_is_compared(function: object) -> None:
    for node in _comparisons(function):
        assert not (isinstance(node, ast.Constant) and isinstance(node.value, float))
        assert not isinstance(node, ast.Div | ast.Pow)
        if isinstance(node, ast.Name | ast.Attribute):
            name = node.id if isinstance(node, ast.Name) else node.attr
            assert name not in {"float", "math", "epsilon", "budget"}


def test_what_is_compared_are_integers() -> None:
    rdp_filter = RdpFilter(Budget(epsilon=1.0, delta=1e-5))
    charge = job(0.1, 2.0, 10, extra=1e-9)
    assert all(type(x) is int for x in (*rdp_filter.capacity, *charge.rdp_nano))
    assert type(rdp_filter.delta_capacity) is int and type(charge.delta_femto) is int


# Seeded bugs: each makes one of the tests above fail.


def test_seeded_conversion_without_logarithms_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    def wrong(epsilon: float, delta: float) -> tuple[int, ...]:
        return tuple(math.floor(epsilon * 10**9) for _ in rdp.ORDERS)

    monkeypatch.setattr(filters, "capacities", wrong)
    with pytest.raises(AssertionError):
        test_capacity_keeps_the_proof.hypothesis.inner_test(1.0, 1e-5)


def test_seeded_undivided_delta_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    filters.capacities.cache_clear()
    monkeypatch.setattr(filters, "weight", lambda a, e, d: 1.0)
    try:
        with pytest.raises(AssertionError):
            test_capacity_keeps_the_proof.hypothesis.inner_test(1.0, 1e-5)
        with pytest.raises(AssertionError):
            test_shares_of_delta_sum_to_at_most_one()
    finally:
        filters.capacities.cache_clear()


def test_seeded_rounding_down_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    real = filters.nano

    def wrong(events: list[DpEvent]) -> tuple[int, ...]:
        return tuple(max(0, x - 1) for x in real(events))

    monkeypatch.setattr(filters, "nano", wrong)
    with pytest.raises(AssertionError):
        test_charges_round_up_and_add.hypothesis.inner_test(
            [], DpEvent(rate=0.1, noise_multiplier=1.0, steps=1)
        )
