"""What events cost, by another accountant than the writer's: dp_accounting at whole orders,
quadrature by scipy at the others (both come with the extra ``audit``).

A charge must be at least that, up to what floats hide, and not more than SLACK above it.
"""

from __future__ import annotations

import importlib
import math
from collections.abc import Iterator
from fractions import Fraction
from functools import lru_cache
from typing import Any, Final

from casemate.ledger import fsck_budget
from casemate.ledger.fsck_budget import FEMTO, NANO, ORDERS, SATURATED
from casemate.spec.errors import UsageError
from casemate.spec.job import Charge, DpEvent, Plan
from casemate.spec.log import Reserved

# Relative; what the second accountant's own floats hide, and what the writer rounds up by.
BELOW: Final = 1e-6
SLACK: Final = 2e-4
# Absolute, for one step: logarithms of numbers near 1 lose their digits.
STEP: Final = 1e-15
# Below this noise the writer bounds broken orders by convexity, or by the unsampled cost.
LITTLE_NOISE: Final = 0.06
_WINDOW: Final = 40.0  # standard deviations beyond both means
_PIECES: Final = 8


def _library(name: str) -> Any:
    try:
        return importlib.import_module(name)
    except ImportError as e:
        raise UsageError(
            "usage.extra",
            "A second accountant needs the package dp-accounting.",
            mend='Install it: pip install "casemate[audit]".',
        ) from e


def _broken(rate: float, noise: float, order: float) -> float:
    """RDP of a sampled Gaussian by its integral: E[(1+u)^a - 1 - a u] under N(0, s^2), where
    u = q (e^((2z-1)/2s^2) - 1) and E[u] = 0 (Mironov, Talwar, Zhang 2019, section 3)."""
    quad = _library("scipy.integrate").quad
    without, within = math.log1p(-rate), math.log(rate)

    def term(z: float) -> float:
        weight = -0.5 * (z / noise) ** 2 - math.log(noise * math.sqrt(2 * math.pi))
        low, high = sorted((without, within + (2 * z - 1) / (2 * noise * noise)))
        ratio = high + math.log1p(math.exp(low - high))  # log(1 + u)
        if abs(ratio) > 1e-2:
            grown = math.exp(weight + order * ratio) - order * math.exp(weight + ratio)
            return grown + (order - 1) * math.exp(weight)
        u, value, part = math.expm1(ratio), 0.0, order
        for k in range(2, 12):  # the binomial series from its square on
            part *= (order - k + 1) / k
            value += part * u**k
        return math.exp(weight) * value

    low, width = -_WINDOW * noise, (order + 2 * _WINDOW * noise) / _PIECES
    total = math.fsum(
        quad(term, low + i * width, low + (i + 1) * width, epsabs=0, epsrel=1e-10, limit=400)[0]
        for i in range(_PIECES)
    )
    return math.log1p(total) / (order - 1)


@lru_cache(maxsize=4096)
def step(rate: float, noise: float) -> tuple[float, ...]:
    """RDP of one step at each of ORDERS; at broken orders with little noise a lower bound."""
    whole = [float(a) for a in ORDERS if a.denominator == 1]
    theirs = _library("dp_accounting.rdp.rdp_privacy_accountant")
    at = dict(
        zip(
            whole,
            map(float, theirs._compute_rdp_poisson_subsampled_gaussian(rate, noise, whole)),
            strict=True,
        )
    )
    for order in map(float, ORDERS):
        if order not in at:
            plain = order / (2 * noise * noise)
            sampled = rate < 1 and noise >= LITTLE_NOISE
            at[order] = _broken(rate, noise, order) if sampled else plain if rate == 1 else 0.0
    return tuple(at[float(order)] for order in ORDERS)


def charge(body: Reserved) -> Iterator[str]:
    """What is wrong with the charge of a reservation."""
    if len(body.charge.rdp_nano) != len(ORDERS):
        yield "the charge has other orders"
        return
    yield from _nano(body.charge, body.events)
    extra = Fraction(body.delta_truncation) + Fraction(body.delta_sampler)
    if not 0 <= body.charge.delta_femto - math.floor(extra * FEMTO) <= 2:
        yield "the charge's delta is not that of truncation and sampler"
    yield from _shown(body.charge, body.delta_shown)


def _nano(taken: Charge, events: tuple[DpEvent, ...]) -> Iterator[str]:
    for i, order in enumerate(ORDERS):
        low = high = hidden = 0.0
        for event in events:
            cost = event.steps * step(event.rate, event.noise_multiplier)[i]
            low += cost
            coarse = order.denominator > 1 and event.noise_multiplier < LITTLE_NOISE
            most = event.steps * float(order) / (2 * event.noise_multiplier**2)
            high += max(cost, most) if coarse else cost
            hidden += event.steps * STEP
        least = min(SATURATED, (low * (1 - BELOW) - hidden) * NANO)
        most_nano = min(SATURATED, (high * (1 + SLACK) + hidden) * NANO + 1)
        if not least <= taken.rdp_nano[i] <= most_nano:
            yield f"the charge at order {float(order):g} is not what its events cost"
            return


def _shown(taken: Charge, delta: float) -> Iterator[str]:
    """The charge's epsilon is the least at which a fresh budget admits it."""
    if not any(taken.rdp_nano):
        if taken.epsilon != 0:
            yield "the charge shows an epsilon for nothing"
        return

    def holds(epsilon: float) -> bool:
        capacity = fsck_budget.capacities(epsilon, delta)
        return any(t <= c for t, c in zip(taken.rdp_nano, capacity, strict=True))

    if not (taken.epsilon > 0 and holds(taken.epsilon * (1 + 1e-6))):
        yield "the charge shows less epsilon than it takes"
    elif holds(taken.epsilon * (1 - 1e-6) - 1e-9):
        yield "the charge shows more epsilon than it takes"


def tight(plan: Plan, delta: float) -> float:
    """The epsilon of one job at ``delta`` by privacy loss distributions, estimated from below: no
    receipt may say less."""
    pld = _library("dp_accounting.pld.privacy_loss_distribution")
    left = delta - plan.delta_truncation - plan.delta_sampler
    total = None
    for event in plan.events:
        one = pld.from_gaussian_mechanism(
            standard_deviation=event.noise_multiplier,
            sampling_prob=event.rate,
            pessimistic_estimate=False,
            value_discretization_interval=1e-4 if event.steps < 20_000 else 1e-5,
            use_connect_dots=False,  # which has no estimate from below; it would warn
        ).self_compose(event.steps)
        total = one if total is None else total.compose(one)
    return 0.0 if total is None else float(total.get_epsilon_for_delta(left))
