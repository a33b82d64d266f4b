"""The privacy filter of a dataset, valid when later jobs depend on earlier results (P9).

The filter "rdp/v1" of a budget (E, D) has a fixed capacity B(a) at each order a of
:data:`casemate.accounting.rdp.ORDERS`. A job with RDP r(a) is admitted when at *some* order the sum
over all jobs stays within B(a), and the sum of the jobs' extra deltas within D/10.

At a single order fixed in advance this is the Rényi filter of Feldman and Zrnic 2021
(arXiv:2008.11193, Theorem 4.5). With several orders the order that still holds may depend on what
was released, so that no single order covers every outcome, and the usual proof no longer gives each
order the whole of delta. So delta is divided over the orders by weights w(a) with sum at most 1,
and the union is paid for:

    B(a) = E - log((a-1)/a) + log(w(a) d a) / (a-1),   d = 0.9 D.

Then the whole interaction is (E, D)-DP; docs/privacy.md has the proof. The weights depend on the
budget alone, and put most of delta where a Gaussian of this budget has its best order.

Whatever is compared is an integer: nano-RDP (charges rounded up, capacities down) and delta in
units of 1e-15 (likewise).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from fractions import Fraction
from functools import lru_cache
from typing import Final

from casemate.accounting import rdp
from casemate.spec.data import Budget, BudgetState
from casemate.spec.errors import BudgetError
from casemate.spec.job import Charge, DpEvent

# A charge at or above this is more than any budget holds; sums of 10^5 such stay below 2^63.
SATURATED: Final = 10**13
NANO: Final = 10**9
FEMTO: Final = 10**15
# Part of delta that pays for the RDP; the rest pays for truncation and sampler.
RDP_SHARE: Final = 0.9
MAX_EPSILON: Final = 1e4


def weight(order: float, epsilon: float, delta: float) -> float:
    """The share of delta that an order gets under a budget (epsilon, delta).

    x is the order's distance, as a ratio, from a - 1 = 1.5 log(1/delta) / epsilon, near which a
    Gaussian mechanism of this budget has its best order. Shares fall as x^2 below it (jobs with a
    small sampling rate need lower orders) and as x^-4 above it. Their sum over ORDERS is at most 1
    (tested over the whole range), and each B(a) rises with epsilon: the slope of the logarithm's
    term is at least -4 / ((a-1) epsilon) >= -4 / (1.5 log(1/delta)) > -1 where delta <= 0.01.
    """
    x = (order - 1) * epsilon / (1.5 * math.log(1 / delta))
    return 0.42 * (x * x if x < 1 else x**-4)


@lru_cache(maxsize=1024)
def capacities(epsilon: float, delta: float) -> tuple[int, ...]:
    """Nano-RDP that the filter of (epsilon, delta) holds at each order, rounded down; -1: none."""
    d = RDP_SHARE * delta
    out = []
    for a in rdp.ORDERS:
        share = weight(a, epsilon, delta) * d * a
        if share <= 0:
            out.append(-1)
            continue
        b = epsilon - math.log1p(-1 / a) + math.log(share) / (a - 1)
        b -= 1e-12 * (1 + epsilon + abs(math.log(share)) / (a - 1))
        out.append(max(-1, min(math.floor(Fraction(b) * NANO), SATURATED - 1)))
    return tuple(out)


def fits(total: Sequence[int], capacity: Sequence[int]) -> bool:
    """Whether at some order the sum stays within the capacity. Integers only."""
    return any(t <= c for t, c in zip(total, capacity, strict=True))


def beyond(total: Sequence[int], cap: float | None, delta: float) -> bool:
    """Whether ``total`` is more than the filter of (cap, delta) holds; past MAX_EPSILON no more
    than there, without a cap never. Integers only."""
    return cap is not None and not fits(total, capacities(min(cap, MAX_EPSILON), delta))


def nano(events: Sequence[DpEvent]) -> tuple[int, ...]:
    """RDP of the events together in nano-RDP at each order, rounded up, at most SATURATED."""
    total = [Fraction(0)] * len(rdp.ORDERS)
    for event in events:
        for i, r in enumerate(rdp.step_curve(event.rate, event.noise_multiplier)):
            total[i] += event.steps * Fraction(r)
    return tuple(min(SATURATED, math.ceil(t * NANO)) for t in total)


def femto(delta: float) -> int:
    """Delta in units of 1e-15, rounded up."""
    return math.ceil(Fraction(delta) * FEMTO)


def delta_capacity(delta: float) -> int:
    """What the filter of a delta holds for extra deltas, in units of 1e-15, rounded down."""
    return math.floor(Fraction(delta) * (1 - Fraction(RDP_SHARE)) * FEMTO)


def epsilon(total: Sequence[int], delta: float) -> float:
    """The smallest epsilon such that the filter of (epsilon, delta) holds ``total``.

    0 for nothing spent; ``inf`` above MAX_EPSILON. Bisection on floats, the end that holds.
    """
    if not any(total):
        return 0.0
    low, high = 0.0, MAX_EPSILON
    if not fits(total, capacities(high, delta)):
        return math.inf
    while high - low > 1e-9 * high:
        middle = (low + high) / 2
        if fits(total, capacities(middle, delta)):
            high = middle
        else:
            low = middle
    return high


class RdpFilter:
    """The filter "rdp/v1" of a budget.

    ``capacity``: nano-RDP at each order. ``delta_capacity``: units of 1e-15 for the extra deltas.
    """

    def __init__(self, budget: Budget) -> None:
        self.budget = budget
        self.capacity = capacities(budget.epsilon, budget.delta)
        self.delta_capacity = delta_capacity(budget.delta)

    @staticmethod
    def empty() -> tuple[int, ...]:
        """The sum of no charges."""
        return (0,) * len(rdp.ORDERS)

    @staticmethod
    def charge(events: Sequence[DpEvent], delta_extra: float, *, delta_shown: float) -> Charge:
        """What a job of these events takes from any dataset that it touches.

        ``delta_extra``: its truncation and sampler deltas together. The charge's ``epsilon`` is the
        smallest E such that a fresh dataset with budget (E, ``delta_shown``) admits the job; this
        is what :func:`casemate.accounting.calibrate.noise_multiplier` aims at.
        Raises BudgetError ``budget.beyond-measure`` when no E up to 10^4 does.
        """
        total, extra = nano(events), femto(delta_extra)
        shown = epsilon(total, delta_shown)
        if math.isinf(shown) or extra > delta_capacity(delta_shown):
            raise BudgetError(
                "budget.beyond-measure",
                f"No epsilon up to {MAX_EPSILON:g} covers the job at delta {delta_shown:g}.",
                mend="Use more noise, fewer steps, smaller batches or a larger delta.",
            )
        return Charge(rdp_nano=total, delta_femto=extra, epsilon=shown)

    def admits(self, spent: Sequence[int], delta_femto: int, charge: Charge) -> bool:
        """Whether a dataset that spent this admits the charge. Integers only."""
        total = [s + c for s, c in zip(spent, charge.rdp_nano, strict=True)]
        extra = delta_femto + charge.delta_femto
        return fits(total, self.capacity) and extra <= self.delta_capacity

    def left(self, spent: Sequence[int], delta_femto: int) -> float:
        """The epsilon at the budget's delta of the largest plain Gaussian job that still fits.

        A plain Gaussian job (every unit in every step) costs r * a at order a. The figure is a
        yardstick: a job of another shape fits when :meth:`admits` says so, at an epsilon that may
        be a little above or below this.
        """
        if delta_femto >= self.delta_capacity:
            return 0.0
        rows = zip(rdp.ORDERS, spent, self.capacity, strict=True)
        slope = max(Fraction(c - s) / Fraction(a) for a, s, c in rows)
        if slope <= 0:
            return 0.0
        job = [math.floor(slope * Fraction(a)) for a in rdp.ORDERS]
        return min(self.budget.epsilon, epsilon(job, self.budget.delta))

    def state(self, spent: Sequence[int], delta_femto: int, jobs: int) -> BudgetState:
        """The budget as its owner sees it.

        ``spent_epsilon``: the smallest E such that the filter of (E, budget.delta) holds what was
        spent; the releases so far are (E, budget.delta)-DP. ``left_epsilon``: :meth:`left`. The two
        need not add up to the budget: RDP adds, epsilon does not.
        """
        used = epsilon(spent, self.budget.delta)
        if fits(spent, self.capacity):
            used = min(used, self.budget.epsilon)  # the bisection's last digit
        return BudgetState(
            budget=self.budget,
            spent_epsilon=min(used, MAX_EPSILON),
            left_epsilon=self.left(spent, delta_femto),
            jobs=jobs,
        )


# What a job without privacy takes.
NOTHING: Final = Charge(rdp_nano=RdpFilter.empty(), delta_femto=0, epsilon=0.0)
