"""RDP against two slow oracles, and charges against a second accountant over many settings."""

from __future__ import annotations

import itertools
import math

import mpmath
import pytest

from casemate.accounting import filters, pld, rdp
from casemate.accounting.filters import RdpFilter
from casemate.spec.job import DpEvent

SETTINGS = [
    (0.01, 1.1), (0.5, 0.3), (1e-5, 0.5), (0.99, 5.0), (0.05, 40.0), (0.3, 0.1), (0.001, 0.07),
    (1e-6, 0.3),
]  # fmt: skip


def log_a(q: float, s: float, a: float, *, swapped: bool = False) -> mpmath.mpf:
    """log E_{mu0}[(mu/mu0)^a], or log E_mu[(mu0/mu)^a], by adaptive quadrature in 20 digits."""
    with mpmath.workdps(20):
        q, s, a = mpmath.mpf(q), mpmath.mpf(s), mpmath.mpf(a)

        def integrand(z: mpmath.mpf) -> mpmath.mpf:
            ratio = (1 - q) + q * mpmath.exp((2 * z - 1) / (2 * s * s))
            return mpmath.npdf(z, 0, s) * ratio ** (1 - a if swapped else a)

        turn = s * s * mpmath.log(1 / q - 1) + mpmath.mpf(1) / 2
        marks = {-35 * s, a + 35 * s, min(max(turn, -30 * s), a + 30 * s)}
        for centre, k in itertools.product((mpmath.mpf(0), a), (-12, -4, 0, 4, 12)):
            marks.add(centre + k * s)
        return mpmath.log(mpmath.quad(integrand, sorted(marks)))


@pytest.mark.parametrize(("q", "s"), SETTINGS)
def test_curve_is_above_quadrature_and_near(q: float, s: float) -> None:
    curve = rdp.step_curve(q, s)
    for i in (0, 6, 8, 9):  # fractional, 2, fractional
        a = rdp.ORDERS[i]
        exact = log_a(q, s, a) / (a - 1)
        assert exact <= curve[i] <= exact * (1 + 1e-4)


@pytest.mark.parametrize(("q", "s"), SETTINGS[:3])
def test_the_other_direction_costs_no_more(q: float, s: float) -> None:
    # Mironov, Talwar, Zhang 2019, Theorem 5.
    for a in (1.25, 2.0, 4.0):
        assert log_a(q, s, a, swapped=True) <= log_a(q, s, a)


@pytest.mark.parametrize(("q", "s"), [(0.01, 1.1), (0.5, 0.6), (1e-4, 0.4), (0.9, 3.0)])
def test_integer_orders_against_exact_sums(q: float, s: float) -> None:
    with mpmath.workdps(60):
        for a in (2, 3, 17, 129, 513):
            total = mpmath.fsum(
                mpmath.binomial(a, k) * (1 - mpmath.mpf(q)) ** (a - k) * mpmath.mpf(q) ** k
                * mpmath.exp(mpmath.mpf(k * k - k) / (2 * mpmath.mpf(s) ** 2))
                for k in range(a + 1)
            )  # fmt: skip
            exact = mpmath.log(total) / (a - 1)
            assert exact <= rdp.step_curve(q, s)[rdp.ORDERS.index(a)] <= exact * (1 + 3e-7)


@pytest.mark.parametrize("bug", ["down", "no-noise-square", "swapped-rate"])
def test_seeded_curves_are_caught(bug: str, monkeypatch: pytest.MonkeyPatch) -> None:
    real = rdp.step_curve
    wrong = {
        "down": lambda q, s: tuple(r * (1 - 1e-6) for r in real(q, s)),
        "no-noise-square": lambda q, s: real(q, math.sqrt(s)),
        "swapped-rate": lambda q, s: real(q / 2, s),
    }
    monkeypatch.setattr(rdp, "step_curve", wrong[bug])
    with pytest.raises(AssertionError):
        test_curve_is_above_quadrature_and_near(0.5, 0.3)


def test_charges_against_a_second_accountant() -> None:
    """360 settings: integer orders equal dp_accounting's RDP, and the filter's epsilon is at least
    dp_accounting's over the same integer orders."""
    from dp_accounting.rdp import rdp_privacy_accountant as second

    whole = [a for a in rdp.ORDERS if a.is_integer()]
    for q, s in itertools.product((1e-4, 1e-3, 0.01, 0.05, 0.2, 1.0), (0.6, 1.0, 2.0, 5.0, 20.0)):
        theirs = second._compute_rdp_poisson_subsampled_gaussian(q, s, whole)
        ours = [r for a, r in zip(rdp.ORDERS, rdp.step_curve(q, s), strict=True) if a.is_integer()]
        for x, y in zip(ours, theirs, strict=True):
            assert y * (1 - 1e-5) - 1e-13 <= x <= y * (1 + 1e-5) + 1e-12
        for steps, delta in itertools.product((1, 100, 3000), (1e-3, 1e-5, 1e-7, 1e-9)):
            event = DpEvent(rate=q, noise_multiplier=s, steps=steps)
            plain = rdp.epsilon(rdp.curve(event), delta)
            best, _ = second.compute_epsilon(whole, [steps * y for y in theirs], delta)
            # Theirs also has a bound by KL divergence, which gives 0 for the smallest jobs only.
            assert best == 0 or plain <= best * (1 + 1e-4)
            assert filters.epsilon(filters.nano([event]), delta) >= plain


TIGHT = list(itertools.product((0.001, 0.02, 0.3, 1.0), (0.7, 1.5, 6.0), (1, 40, 1000)))


@pytest.mark.parametrize(
    ("q", "s", "steps"),
    [pytest.param(*x, marks=() if i % 4 == 0 else pytest.mark.full) for i, x in enumerate(TIGHT)],
)
def test_charge_is_never_below_the_tight_epsilon(q: float, s: float, steps: int) -> None:
    event = DpEvent(rate=q, noise_multiplier=s, steps=steps)
    for delta in (1e-3, 1e-6):
        charge = RdpFilter.charge([event], 0.0, delta_shown=delta)
        plain = rdp.epsilon(rdp.curve(event), delta)
        assert 0 <= pld.epsilon([event], delta) <= plain <= charge.epsilon
