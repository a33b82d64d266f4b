"""What a check says, and how sure it is.

A comparison of chance fails below :data:`LEVEL`. Every law is exact or bounded (binomial, chi
squared, Student's t of a correlation, Kolmogorov), so a sound build fails one with at most that
probability, and a battery of n comparisons with at most n times that; :data:`made` counts them.
"""

from __future__ import annotations

import math
from collections import Counter
from typing import Final

import numpy as np
from scipy import stats

LEVEL: Final = 1e-11
made: Counter[str] = Counter()


class Broken(AssertionError):
    """A rule of privacy does not hold."""


def holds(condition: bool, what: str) -> None:
    """A comparison without chance."""
    made["certain"] += 1
    if not condition:
        raise Broken(what)


def likely(p: float, what: str) -> None:
    """``p``: the probability, at most, of something as far off."""
    made["chance"] += 1
    if not p >= LEVEL:
        raise Broken(f"{what} (p = {p:.1e})")


def count(found: int, of: int, rate: float, what: str) -> None:
    """A binomial count, two-sided by doubling."""
    low, high = stats.binom.cdf(found, of, rate), stats.binom.sf(found - 1, of, rate)
    likely(2 * min(low, high), f"{what}: {found} of {of}, expected {of * rate:.1f}")


def counts(found: np.ndarray, of: int, rate: float, what: str) -> None:
    """:func:`count` of each, by the union bound."""
    low, high = stats.binom.cdf(found, of, rate), stats.binom.sf(found - 1, of, rate)
    p = 2 * float(np.minimum(low, high).min())
    likely(p * found.size, f"{what}: between {found.min()} and {found.max()} of {of}")


def normal(z: np.ndarray, what: str) -> None:
    """Draws said to be independent N(0, 1): variance, mean, the law's shape and its tails."""
    z = np.asarray(z, dtype=np.float64).ravel()
    n = len(z)
    holds(n > 0 and bool(np.isfinite(z).all()), f"{what}: there are finite draws")
    total = float(z @ z)
    two = 2 * min(stats.chi2.cdf(total, n), stats.chi2.sf(total, n))
    likely(two, f"{what}: variance {total / n:.5f} of {n} draws")
    mean = float(z.mean())
    likely(2 * stats.norm.sf(abs(mean) * math.sqrt(n)), f"{what}: mean {mean:.5f}")
    if n < 1000:
        return
    ordered = stats.norm.cdf(np.sort(z))
    steps = np.arange(n + 1) / n
    far = max(float((steps[1:] - ordered).max()), float((ordered - steps[:-1]).max()))
    # Massart 1990: P[sqrt(n) D > x] <= 2 exp(-2 x^2).
    likely(2 * math.exp(-2 * n * far * far), f"{what}: Kolmogorov distance {far:.5f}")
    for bound in (3.0, 4.0):
        p = 2 * float(stats.norm.sf(bound))
        count(int((np.abs(z) > bound).sum()), n, p, f"{what}: draws beyond {bound}")


def uncorrelated(a: np.ndarray, b: np.ndarray, what: str) -> None:
    """Two samples, at least one of them of independent normals: the correlation, and that of the
    sizes, of which only a bound is taken (squares have heavier tails than Student's t allows)."""
    a, b = (np.asarray(v, dtype=np.float64).ravel() for v in (a, b))
    n = len(a)
    if n < 50:
        return
    r = float(np.corrcoef(a, b)[0, 1])
    t = r * math.sqrt((n - 2) / max(1e-300, 1 - r * r))
    likely(2 * stats.t.sf(abs(t), n - 2), f"{what}: correlation {r:.4f} over {n}")
    # Whether one is above the median of sizes when the other is: independent fair coins.
    middle = float(stats.norm.ppf(0.75))
    same = int(((np.abs(a) > middle) == (np.abs(b) > middle)).sum())
    count(same, n, 0.5, f"{what}: sizes that agree")


def lengths(z: np.ndarray, what: str) -> None:
    """Rows of independent N(0, 1), (m, n): no row is shorter or longer than chance makes it."""
    squared = (np.asarray(z, dtype=np.float64) ** 2).sum(1)
    n = z.shape[1]
    p = 2 * min(stats.chi2.cdf(squared.min(), n), stats.chi2.sf(squared.max(), n))
    likely(p * len(z), f"{what}: squared lengths {squared.min():.4g} to {squared.max():.4g} of {n}")


def lags(z: np.ndarray, what: str) -> None:
    """Draws of one vector, independent N(0, 1), (n,): no two a fixed distance apart go together,
    by each distance below n - 60. The sum of products is a quadratic form of trace 0, norm at
    most 1 and squared Frobenius norm half their number m: it exceeds sqrt(2 m t) + 2 t in either
    direction with probability at most 2 exp(-t) (Laurent, Massart 2000, Lemma 1)."""
    n = len(z)
    sums = np.abs(np.fft.irfft(np.abs(np.fft.rfft(z, 2 * n)) ** 2, 2 * n)[1 : n - 60])
    half = np.sqrt(np.arange(n - 1, 60, -1) / 2)
    t = ((np.sqrt(half**2 + 2 * sums) - half) / 2) ** 2
    at = int(t.argmax())
    likely(2 * len(t) * math.exp(-t[at]), f"{what}: entries {at + 1} apart go together")
