"""Rényi differential privacy of Gaussian noise on Poisson samples: certified upper bounds.

Adjacency is zero-out (P1): one unit's contribution is replaced by nothing, the number of units
stays. The output then is, in the one dimension that matters, mu = (1-q) N(0, s^2) + q N(1, s^2)
against mu0 = N(0, s^2), with q the sampling rate and s the noise multiplier, and

    RDP(a) = log A(a) / (a-1),   A(a) = E_{z ~ mu0} [(mu(z) / mu0(z))^a]

in both directions (Mironov, Talwar, Zhang 2019, "Rényi Differential Privacy of the Sampled
Gaussian Mechanism", arXiv:1908.10530: Theorem 4 for one dimension, Theorem 5 and Corollary 7 for
the directions).

Every float result is an upper bound on the true value: sums have positive terms only, and what
rounding, truncation and quadrature can hide is added. It is assumed that the C library's exp, log
and their like err by less than 4 units in the last place; 16 are allowed for.
"""

from __future__ import annotations

import math
from functools import cache, lru_cache
from operator import add
from typing import Final

from casemate.spec.errors import PlanError
from casemate.spec.job import DpEvent

# a - 1 = 2^k and 1.5 * 2^k for k = -4 .. 9: two orders an octave, all exact in binary. Part of the
# identity of the filter "rdp/v1": never change it, make a v2.
ORDERS: Final[tuple[float, ...]] = tuple(
    1.0 + 2.0**k * m for k in range(-4, 10) for m in (1.0, 1.5)
)

MIN_RATE: Final = 2.0**-64
MIN_NOISE: Final = 2.0**-10
MAX_NOISE: Final = 2.0**40
_ULP: Final = 16 * 2.0**-53
_TINY: Final = 5e-324


def _up(x: float) -> float:
    """Above the true value of a quantity computed as ``x`` > 0 by a handful of operations."""
    return x * (1 + 4 * _ULP) + _TINY


def _snap(x: float) -> float:
    """``x`` rounded up to 24 significant bits, so that another machine's last bits in exp or log
    do not show: an auditor there recomputes the same charge."""
    mantissa, exponent = math.frexp(x)
    return math.ldexp(math.ceil(mantissa * 2**24), exponent - 24)


@cache
def _log_binomials(a: int) -> tuple[float, ...]:
    """log C(a, k) for k = 2 .. a, from exact integers."""
    row, out = a, []
    for k in range(2, a + 1):
        row = row * (a - k + 1) // k
        out.append(math.log(row))
    return tuple(out)


def _log_a_bound(q: float, s: float, a: float) -> float:
    """log((1-q) + q e^{a(a-1)/2s^2}), an upper bound of log A by the convexity of t -> t^a."""
    x = a * (a - 1) / (2 * s * s)
    if x < 600:
        return _up(math.log1p(q * math.expm1(x) * (1 + 4 * _ULP * (x + 4))))
    return x + math.log(q + (1 - q) * math.exp(-x)) + 4 * _ULP * (x + 64)


def _integer_orders(q: float, s: float, orders: tuple[int, ...]) -> list[float]:
    """log A at integer orders by the binomial sum (Mironov et al. 2019, Section 3.3, Eq. 4):

    A - 1 = sum_{k=2}^{a} C(a,k) (1-q)^{a-k} q^k (e^{k(k-1)/2s^2} - 1), without cancellation
    because the weights sum to 1 and the terms k = 0, 1 vanish.
    """
    top = max(orders)
    log_q, log_p = math.log(q), math.log1p(-q)
    tail, sizes, size = [], [0.0, 0.0], 0.0
    for k in range(2, top + 1):
        x = k * (k - 1) / (2 * s * s)
        log_e = math.log(math.expm1(x)) if x < 40 else x  # log(e^x - 1) <= x
        tail.append(k * (log_q - log_p) + log_e)
        size = max(size, x + k * (abs(log_q) + abs(log_p)) + abs(log_e))
        sizes.append(size)
    out = []
    for a in orders:
        terms = list(map(add, _log_binomials(a), tail))
        shift = max(terms)
        total = math.fsum(math.exp(t - shift) for t in terms)
        # An error of e in a logarithm is a factor of at most 1 + 2e on its term.
        slack = 4 * _ULP * (sizes[a] + 2 * a * abs(log_p) + 8 * a + abs(shift))
        log_sum = shift + a * log_p + math.log(total) + slack
        out.append(
            _up(
                log_sum + math.log1p(math.exp(-log_sum))
                if log_sum > 0
                else math.log1p(math.exp(log_sum) + _TINY)
            )
        )
    return out


def _fractional_orders(q: float, s: float, orders: tuple[float, ...]) -> list[float]:
    """log A at any orders up to 2.5 by the trapezoidal rule, whose error is bounded.

    A - 1 = integral of f(z) = mu0(z) g(u(z)), u = q (e^y - 1), y = (2z-1)/2s^2,
    g(u) = (1+u)^a - 1 - a u >= 0 (Bernoulli; E[u] = 0 under mu0).
    f is analytic for |Im z| < pi s^2, where 1+u = (1-q) + q e^y meets no negative real. On the line
    Im z = b the modulus of f is at most e^{b^2/2s^2} mu0(x) (((1-q) + q e^y)^a + 1 + a q (e^y + 1))
    with y that of the real part x; its integral is at most M = e^{b^2/2s^2} (A + 1 + 2aq), and the
    rule with step h errs by at most 2 M / (e^{2 pi b/h} - 1) (Trefethen and Weideman 2014, "The
    Exponentially Convergent Trapezoidal Rule", Theorem 5.1).
    """
    b = min(3 * s * s, 9 * s)
    h = 2 * math.pi * b / (72 + b * b / (2 * s * s))
    reach = 13.0
    first = -math.ceil(reach * s / h)
    last = math.ceil((max(orders) + reach * s) / h)
    log_unit = math.log(h / (s * math.sqrt(2 * math.pi)))
    near: list[tuple[float, float, float]] = []  # weight, u, log(1+u)
    far: list[tuple[float, float, float]] = []  # log weight, y, log(1+u)
    for j in range(first, last + 1):
        z = j * h
        log_w = log_unit - (z / s) ** 2 / 2
        y = (2 * z - 1) / (2 * s * s)
        if y > 0 and y + math.log(q) > -4:
            far.append((log_w, y, y + math.log(q + (1 - q) * math.exp(-y))))
        else:
            u = q * math.expm1(y)
            near.append((math.exp(log_w), u, math.log1p(u)))
    # Rounding of z/s, y and the logarithms: each exponent errs by at most _ULP times its size.
    size = 8 + (reach + max(orders) / s) ** 2 + 4 * abs(math.log(q))
    out = []
    for a in orders:
        total = math.fsum(w * max(0.0, math.expm1(a * v) - a * u) for w, u, v in near)
        lost = math.fsum(w * abs(u) for w, u, _ in near) * a * size * 2 * _ULP
        high = 0.0
        for log_w, y, v in far:
            big = math.exp(log_w + a * v)
            low = math.exp(log_w + y + math.log(a * q + (1 - a * q) * math.exp(-y)))
            total += max(0.0, big - low)
            high += big + low
        lost += high * size * 4 * _ULP + total * size * 4 * _ULP
        bound = math.exp(a * (a - 1) / (2 * s * s))
        # The rule's error, then both tails of the sum beyond ``reach`` standard deviations.
        lost += 2 * (bound + 1 + 2 * a * q) * math.exp(-71.9)
        lost += 4 * (bound + 2) * math.exp(-reach * reach / 2)
        out.append(_up(math.log1p(total + lost)))
    return out


@lru_cache(maxsize=4096)
def step_curve(rate: float, noise: float) -> tuple[float, ...]:
    """RDP of one step at each of ORDERS, rounded up; ``inf`` nowhere.

    ``rate`` in [2^-64, 1], ``noise`` (standard deviation over sensitivity) in [2^-10, 2^40];
    anything else raises PlanError ``plan.event``.
    """
    if not (MIN_RATE <= rate <= 1 and MIN_NOISE <= noise <= MAX_NOISE):
        raise PlanError(
            "plan.event",
            f"No privacy can be accounted for rate {rate} and noise multiplier {noise}.",
            mend="Use a rate in (0, 1] and more noise (a smaller epsilon).",
        )
    plain = [_up(a / (2 * noise * noise)) for a in ORDERS]
    if rate == 1:
        return tuple(map(_snap, plain))
    whole = tuple(int(a) for a in ORDERS if a.is_integer())
    logs = dict(zip(map(float, whole), _integer_orders(rate, noise, whole), strict=True))
    broken = tuple(a for a in ORDERS if not a.is_integer())
    if noise >= 0.06:
        logs |= zip(broken, _fractional_orders(rate, noise, broken), strict=True)
    # Sampling never hurts (convexity), so that the smallest of the bounds holds.
    return tuple(
        _snap(min(p, _up(min(logs.get(a, math.inf), _log_a_bound(rate, noise, a)) / (a - 1))))
        for a, p in zip(ORDERS, plain, strict=True)
    )


def curve(event: DpEvent) -> tuple[float, ...]:
    """RDP of all steps of an event at each of ORDERS, rounded up.

    Composition adds at each order (Mironov 2017, arXiv:1702.07476, Proposition 1).
    """
    return tuple(_up(event.steps * r) for r in step_curve(event.rate, event.noise_multiplier))


def epsilon(total: tuple[float, ...], delta: float) -> float:
    """Epsilon at ``delta`` of a mechanism whose RDP at ORDERS is ``total``, best order.

    Canonne, Kamath, Steinke 2020, arXiv:2004.00010, Proposition 12 (also Balle et al. 2020,
    arXiv:1905.09982, Theorem 21). For one job fixed in advance; a dataset's filter asks for more,
    because later jobs depend on earlier results: see :mod:`casemate.accounting.filters`.
    """
    best = min(
        r + math.log1p(-1 / a) - math.log(delta * a) / (a - 1)
        for a, r in zip(ORDERS, total, strict=True)
    )
    return max(0.0, best + 64 * _ULP * (1 + abs(best)))
