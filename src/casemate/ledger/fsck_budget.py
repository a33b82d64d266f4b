"""The filter "rdp/v1" for ``fsck``, written again from its formula, in decimals of 50 digits.

    B(a) = E - log((a-1)/a) + log(w(a) d a) / (a-1),   d = 0.9 D,
    w(a) = 0.42 x^2 for x < 1, else 0.42 x^-4,         x = (a-1) E / (1.5 log(1/D)),

at a = 1 + 2^k and 1 + 1.5 2^k for k = -4 .. 9; a tenth of D is for extra deltas. Capacities here
are those of exact arithmetic, rounded down; the writer's floats are a little below them.
"""

from __future__ import annotations

import decimal
from collections.abc import Sequence
from decimal import Decimal
from fractions import Fraction
from functools import lru_cache
from typing import Final

from casemate.spec.data import Budget
from casemate.spec.job import Charge

NANO: Final = 10**9
FEMTO: Final = 10**15
SATURATED: Final = 10**13
ORDERS: Final = tuple(1 + Fraction(2) ** k * m for k in range(-4, 10) for m in (1, Fraction(3, 2)))
EMPTY: Final = (0,) * len(ORDERS)
# How far the writer's capacities may be below these: what its floats can hide, in nano-RDP.
CAPACITY_SLACK: Final = 4
_DIGITS: Final = decimal.Context(prec=50, Emax=10**6, Emin=-(10**6))


def _decimal(x: Fraction | float) -> Decimal:
    exact = Fraction(x)
    return Decimal(exact.numerator) / Decimal(exact.denominator)


@lru_cache(maxsize=1024)
def capacities(epsilon: float, delta: float) -> tuple[int, ...]:
    """Nano-RDP at each order; -1 where there is none."""
    out = []
    with decimal.localcontext(_DIGITS):
        e, d = _decimal(epsilon), _decimal(delta)
        for order in ORDERS:
            a = _decimal(order)
            x = (a - 1) * e / (Decimal("1.5") * (1 / d).ln())
            w = Decimal("0.42") * (x**2 if x < 1 else x**-4)
            b = e - ((a - 1) / a).ln() + (w * Decimal("0.9") * d * a).ln() / (a - 1)
            nano = int((b * NANO).to_integral_value(decimal.ROUND_FLOOR))
            out.append(max(-1, min(nano, SATURATED - 1)))
    return tuple(out)


def delta_capacity(budget: Budget) -> int:
    """In units of 1e-15."""
    return int(Fraction(budget.delta) * FEMTO / 10)


def possible(charge: Charge) -> bool:
    """Whether a charge has the filter's orders and gives nothing back."""
    return len(charge.rdp_nano) == len(ORDERS) and min(*charge.rdp_nano, charge.delta_femto) >= 0


def fits(budget: Budget, rdp_nano: Sequence[int], delta_femto: int) -> bool:
    """Whether a budget holds this."""
    capacity = capacities(budget.epsilon, budget.delta)
    within = [spent <= most for spent, most in zip(rdp_nano, capacity, strict=True)]
    return any(within) and delta_femto <= delta_capacity(budget)


def rest(budget: Budget, rdp_nano: Sequence[int], delta_femto: int) -> Charge:
    """All that is left, up to CAPACITY_SLACK."""
    capacity = capacities(budget.epsilon, budget.delta)
    return Charge(
        rdp_nano=tuple(max(0, c - s) for c, s in zip(capacity, rdp_nano, strict=True)),
        delta_femto=max(0, delta_capacity(budget) - delta_femto),
        epsilon=0.0,
    )
