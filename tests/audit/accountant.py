"""A second accountant, with an error that is bounded on both sides.

The privacy loss of a step is put on a lattice of points h apart, each to its nearest, then shifted
so that its mean is exact, and composed by FFT (Gopi, Lee, Wutschitz 2021, arXiv:2106.02848). What
lies between the true loss of T steps and the lattice's is a sum of T independent errors of mean 0
within an interval of length h, so above t = h sqrt(T log(1/eta) / 2) with probability at most eta
(Hoeffding). delta(epsilon) = E[(1 - exp(epsilon - loss))+] falls when losses do; so the lattice's
delta at epsilon + t, less eta, is below the true one, and at epsilon - t, plus eta, above it.

Allowed for besides: what the ends of the lattice cut off, what wraps around in the FFT (Chernoff's
bound on the lattice's own law) and the FFT's rounding. Nothing here is shared with
:mod:`casemate.accounting`, nor with dp-accounting.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

import numpy as np
from scipy import special

# Of delta, each way: what Hoeffding's bound may miss.
_MISSED: Final = 1e-4
_ROUNDING: Final = 2e-17
_MOST: Final = 1 << 23


@dataclass(frozen=True)
class Bounds:
    """Epsilon at a delta lies between ``low`` and ``high``."""

    low: float
    high: float


def _cdf(at: np.ndarray, rate: float, noise: float, removed: bool) -> np.ndarray:
    """P[loss <= at], the loss being log(mix/plain) under the mixture (removed), or log(plain/mix)
    under the plain normal (added). mix: (1 - q) N(0, s^2) + q N(1, s^2)."""
    level = at if removed else -at
    with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
        # log((e^l - (1 - q)) / q), without cancellation at rate 1.
        inner = np.log1p(np.expm1(level) / rate) if rate < 1 else level
    x = noise * noise * inner + 0.5
    x = np.where(np.isnan(x), -np.inf, x)
    if removed:
        return (1 - rate) * special.ndtr(x / noise) + rate * special.ndtr((x - 1) / noise)
    return special.ndtr(-x / noise)


def _mean(rate: float, noise: float, removed: bool) -> float:
    """The loss's mean, by Gauss-Legendre in pieces of a standard deviation."""
    nodes, weights = np.polynomial.legendre.leggauss(40)
    edges = np.arange(-38.0, 39.0 + 1 / noise, 1.0) * noise
    centre = (edges[1:] + edges[:-1]) / 2
    x = (centre[:, None] + nodes * noise / 2).ravel()
    w = np.tile(weights * noise / 2, len(centre))
    y = (2 * x - 1) / (2 * noise * noise)
    loss = np.logaddexp(math.log1p(-rate), math.log(rate) + y) if rate < 1 else y
    plain = np.exp(-((x / noise) ** 2) / 2) / (noise * math.sqrt(2 * math.pi))
    shifted = np.exp(-(((x - 1) / noise) ** 2) / 2) / (noise * math.sqrt(2 * math.pi))
    density = (1 - rate) * plain + rate * shifted if removed else -plain
    return float((w * density * loss).sum())


def _ends(rate: float, noise: float, removed: bool) -> tuple[float, float]:
    """Losses beyond which less than 1e-19 lies."""
    reach = 9.2 * noise
    points = np.array([-reach, 1 + reach])
    y = (2 * points - 1) / (2 * noise * noise)
    loss = np.logaddexp(math.log1p(-rate), math.log(rate) + y) if rate < 1 else y
    low, high = float(loss[0]), float(loss[1])
    return (low, high) if removed else (-high, -low)


def _one_way(rate: float, noise: float, steps: int, delta: float, removed: bool) -> Bounds:
    low, high = _ends(rate, noise, removed)
    eta = delta * _MISSED
    log_eta = math.log(1 / eta)
    # A guess of epsilon's size, and of where the composed loss can be.
    spread = math.sqrt(steps) * min(1.0, rate) / noise
    mean = _mean(rate, noise, removed)
    guess = max(1.5, min(steps * mean + 6 * spread, 500.0))
    off = 1e-3 * guess
    h = min(off / math.sqrt(steps * log_eta / 2), (high - low) / 64)
    for _ in range(12):
        first, last = math.floor(low / h), math.ceil(high / h)
        grid = np.arange(first, last + 1) * h
        cdf = _cdf(np.append(grid - h / 2, grid[-1] + h / 2), rate, noise, removed)
        mass = np.diff(cdf)
        if not removed:  # the tail that a difference near 1 would lose lies at low losses
            mass = np.maximum(mass, 0.0)
        total = float(mass.sum())
        shift = mean - float(mass @ grid)
        reach, lost = _range(grid + shift, mass, steps, eta)
        size = 1 << math.ceil(math.log2(max(2 * reach / h, len(mass)) + 2))
        if size <= _MOST:
            break
        h *= 2
    missed = steps * max(0.0, 1 - total) + lost
    t = h * math.sqrt(steps * log_eta / 2)
    centre = round(steps * mean / h)  # of the composed law, which the FFT's window is put around
    rolled = np.zeros(size)
    rolled[(np.arange(first, last + 1)) % size] = mass
    composed = np.fft.irfft(np.fft.rfft(rolled) ** steps, size)
    places = (np.arange(size) - size // 2) + centre - round(steps * shift / h)
    law = composed[places % size]
    losses = places * h + steps * shift
    noise_of_fft = _ROUNDING * math.sqrt(size) * math.log2(size) * steps**0.5
    keep = losses > -1.0
    law, losses = law[keep][::-1], losses[keep][::-1]  # falling
    above, weighed = np.cumsum(law), np.cumsum(law * np.exp(-np.maximum(losses, 0.0)))
    rising = losses[::-1]

    def at(epsilon: float) -> float:
        found = len(losses) - int(np.searchsorted(rising, epsilon, side="right"))
        if found == 0:
            return 0.0
        less = math.exp(epsilon + math.log(weighed[found - 1])) if weighed[found - 1] > 0 else 0.0
        return float(above[found - 1] - less)

    extra = eta + missed + noise_of_fft
    return Bounds(
        max(0.0, _solve(lambda e: at(e + t) - extra, delta)),
        _solve(lambda e: at(max(0.0, e - t)) + extra, delta),
    )


def _range(losses: np.ndarray, mass: np.ndarray, steps: int, eta: float) -> tuple[float, float]:
    """Half the width, around its mean, within which the composed law is but for ``lost``."""
    with np.errstate(divide="ignore"):
        log_mass = np.log(np.maximum(mass, 0.0))
    mean = float(mass @ losses)
    variance = max(1e-300, float(mass @ (losses - mean) ** 2))
    lost = eta * 1e-3
    best = [math.inf, math.inf]
    base = math.sqrt(2 * math.log(2 / lost) / (steps * variance))
    for side, sign in enumerate((1.0, -1.0)):
        for at in np.geomspace(min(0.2, base / 10), 2 * base, 16):
            moment = float(special.logsumexp(log_mass + sign * at * (losses - mean)))
            best[side] = min(best[side], (steps * moment + math.log(2 / lost)) / at)
    return max(best) * 1.01 + 2.0, lost


def _solve(at: Callable[[float], float], delta: float) -> float:
    """The epsilon at which a falling function is ``delta``; 0 where it is below from the start."""
    low, high = 0.0, 1.0
    if at(0.0) <= delta:
        return 0.0
    while at(high) > delta and high < 2e3:
        low, high = high, 2 * high
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if at(middle) > delta else (low, middle)
    return (low + high) / 2


def gaussian(mu: float, delta: float) -> float:
    """Exact epsilon of the Gaussian mechanism with means mu standard deviations apart (Balle, Wang
    2018, arXiv:1805.06530, Theorem 8)."""

    def at(epsilon: float) -> float:
        return float(
            special.ndtr(mu / 2 - epsilon / mu)
            - math.exp(epsilon + special.log_ndtr(-mu / 2 - epsilon / mu))
        )

    return _solve(at, delta)


def bounds(rate: float, noise: float, steps: int, delta: float) -> Bounds:
    """Of ``steps`` Gaussian releases of Poisson samples, both directions of adjacency."""
    if rate == 1:
        exact = gaussian(math.sqrt(steps) / noise, delta)
        return Bounds(exact * (1 - 1e-9), exact * (1 + 1e-9))
    ways = [_one_way(rate, noise, steps, delta, removed) for removed in (True, False)]
    return Bounds(max(w.low for w in ways), max(w.high for w in ways))
