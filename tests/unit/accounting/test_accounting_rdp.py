"""RDP curves: properties that hold for every setting, known values, and the conversion."""

from __future__ import annotations

import itertools
import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from casemate.accounting import rdp
from casemate.spec.errors import PlanError
from casemate.spec.job import DpEvent

rates = st.floats(1e-7, 1.0)
noises = st.floats(0.1, 200.0)


def test_orders_are_fixed() -> None:
    # The identity of rdp/v1: changing any of them changes every ledger.
    assert len(rdp.ORDERS) == 28 and list(rdp.ORDERS) == sorted(set(rdp.ORDERS))
    assert rdp.ORDERS[:5] == (1.0625, 1.09375, 1.125, 1.1875, 1.25)
    assert rdp.ORDERS[8:14] == (2.0, 2.5, 3.0, 4.0, 5.0, 7.0)
    assert rdp.ORDERS[-2:] == (513.0, 769.0)


def test_whole_batches_are_the_gaussian_mechanism() -> None:
    # Mironov 2017, Proposition 7: a / (2 s^2).
    for a, r in zip(rdp.ORDERS, rdp.step_curve(1.0, 3.0), strict=True):
        assert 0 <= r / (a / 18) - 1 < 2.0**-22


def test_order_two_has_a_closed_form() -> None:
    # A(2) = 1 + q^2 (e^{1/s^2} - 1).
    for q, s in [(0.01, 1.0), (0.3, 0.4), (1e-6, 2.0)]:
        exact = math.log1p(q * q * math.expm1(1 / (s * s)))
        assert 0 <= rdp.step_curve(q, s)[8] / exact - 1 < 2e-7


@settings(max_examples=60, deadline=None)
@given(rates, noises, st.floats(1.0, 4.0))
def test_more_noise_costs_no_more(q: float, s: float, factor: float) -> None:
    less, more = rdp.step_curve(q, s), rdp.step_curve(q, s * factor)
    assert all(m <= n * (1 + 1e-3) + 1e-14 for m, n in zip(more, less, strict=True))


@settings(max_examples=60, deadline=None)
@given(rates, noises, st.floats(0.0, 1.0))
def test_a_smaller_sample_costs_no_more(q: float, s: float, part: float) -> None:
    small, large = rdp.step_curve(max(1e-9, q * part), s), rdp.step_curve(q, s)
    assert all(m <= n * (1 + 1e-3) + 1e-14 for m, n in zip(small, large, strict=True))


@settings(max_examples=60, deadline=None)
@given(rates, noises)
def test_curve_rises_with_the_order_and_stays_below_the_gaussian(q: float, s: float) -> None:
    # Rényi divergence does not fall in its order (van Erven, Harremoës 2014, Theorem 3), and
    # log A = (a - 1) RDP is convex in a.
    c = rdp.step_curve(q, s)
    assert all(
        0 < r <= (a / (2 * s * s)) * (1 + 2.0**-22) for a, r in zip(rdp.ORDERS, c, strict=True)
    )
    assert all(x <= y * (1 + 1e-3) + 1e-14 for x, y in itertools.pairwise(c))
    logs = [(a - 1) * r for a, r in zip(rdp.ORDERS, c, strict=True)]
    for (a0, l0), (a1, l1), (a2, l2) in zip(
        *(list(zip(rdp.ORDERS, logs, strict=True))[i:] for i in range(3)), strict=False
    ):
        chord = l0 + (l2 - l0) * (a1 - a0) / (a2 - a0)
        assert l1 <= chord * (1 + 1e-3) + 1e-14


@settings(max_examples=30, deadline=None)
@given(rates, noises, st.integers(1, 10_000), st.integers(1, 10_000))
def test_steps_add(q: float, s: float, m: int, n: int) -> None:
    one, two, both = (
        rdp.curve(DpEvent(rate=q, noise_multiplier=s, steps=k)) for k in (m, n, m + n)
    )
    for x, y, z in zip(one, two, both, strict=True):
        assert math.isclose(x + y, z, rel_tol=1e-12)


@pytest.mark.parametrize(
    ("rate", "noise"),
    [(0.0, 1.0), (1.1, 1.0), (-0.1, 1.0), (0.1, 0.0), (0.1, 1e-4), (0.1, math.inf),
     (math.nan, 1.0), (0.1, math.nan), (1e-300, 1.0)],
)  # fmt: skip
def test_what_cannot_be_accounted_is_refused(rate: float, noise: float) -> None:
    with pytest.raises(PlanError) as e:
        rdp.step_curve(rate, noise)
    assert e.value.code == "plan.event"


@pytest.mark.parametrize("rate", [2.0**-64, 1e-12, 1e-3, 0.5, 1 - 2.0**-53])
@pytest.mark.parametrize("noise", [rdp.MIN_NOISE, 0.0599, 0.06, 0.5, 1e3, rdp.MAX_NOISE])
def test_extremes_stay_finite_and_bounded(rate: float, noise: float) -> None:
    for a, r in zip(rdp.ORDERS, rdp.step_curve(rate, noise), strict=True):
        assert 0 < r <= a / (2 * noise * noise) * (1 + 2.0**-22)


def test_conversion_needs_its_logarithms() -> None:
    # One Gaussian with s = 1 at delta = 1e-5: its exact epsilon (Balle, Wang 2018) is 4.3771.
    total = rdp.curve(DpEvent(rate=1.0, noise_multiplier=1.0, steps=1))
    assert 4.3771 < rdp.epsilon(total, 1e-5) < 4.85
    basic = min(r + math.log(1e5) / (a - 1) for a, r in zip(rdp.ORDERS, total, strict=True))
    assert rdp.epsilon(total, 1e-5) < basic


@settings(max_examples=50, deadline=None)
@given(st.floats(0.3, 50.0), st.floats(1e-12, 1e-2), st.floats(1e-12, 1e-2))
def test_epsilon_falls_with_delta(s: float, d1: float, d2: float) -> None:
    total = rdp.curve(DpEvent(rate=0.1, noise_multiplier=s, steps=100))
    assert rdp.epsilon(total, min(d1, d2)) >= rdp.epsilon(total, max(d1, d2))


def test_last_bits_of_the_math_library_do_not_show(monkeypatch: pytest.MonkeyPatch) -> None:
    """A library whose exp and log differ in their last bits gives the same curves."""
    settings = [(0.01 * k, 0.5 + 0.07 * k) for k in range(1, 25)]
    here = [rdp.step_curve(q, s) for q, s in settings]
    rdp.step_curve.cache_clear()
    for name in ("exp", "expm1", "log", "log1p"):
        real = getattr(math, name)
        monkeypatch.setattr(math, name, lambda x, f=real: f(x) * (1 + 2.0**-51))
    try:
        there = [rdp.step_curve(q, s) for q, s in settings]
    finally:
        rdp.step_curve.cache_clear()
    pairs = [(x, y) for a, b in zip(here, there, strict=True) for x, y in zip(a, b, strict=True)]
    assert sum(x != y for x, y in pairs) <= 1
