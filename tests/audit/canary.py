"""Lower bounds on epsilon, from what the real step releases.

*Single releases.* A canary is the one unit whose gradient is along the first entry; the attacker
knows all else, sees the release, and says "it was there" above a threshold fixed beforehand, the
middle. The step is unsampled (rate 1), so the claim is a Gaussian mechanism's: an attack with
error rates (a, b) proves mu >= z(1 - a) - z(b), z the normal quantile (Dong, Roth, Su 2022,
arXiv:1905.02383, Theorem 3.4; Nasr et al. 2023, arXiv:2302.07956), and mu gives epsilon at delta
(Corollary 2.13 there). The error rates are bounded by Clopper and Pearson's tails of the
two counts. Bounding each at half of 1e-6 would lose more than chance does: the two counts are
independent, so the product of both tails is compared with what Fisher's method allows, P[p1 p2 <=
c] <= c (1 - log c), and the least mu that is not excluded is the bound.

*One run.* Many canaries, each with an entry of its own and a fair coin for whether it is there; the
coins are guessed from the weights at the end of a whole training (Steinke, Nasr, Jagielski 2023,
arXiv:2305.08846, Theorem 5.2 and its proof's computation).
"""

from __future__ import annotations

import dataclasses
import functools
import math
from dataclasses import dataclass
from typing import Final

import numpy as np
import torch
from scipy import optimize, stats

from audit import accountant, lab
from audit.lab import Job
from audit.law import holds
from casemate.accounting import pld
from casemate.engine.private import noise_for

DELTA: Final = 1e-5
CONFIDENCE: Final = 1e-6
DRAWS: Final = 100_000
# epsilon: the least share of it that has to be shown, with that many draws a side.
FLOORS: Final = {1.0: 0.80, 4.0: 0.93, 8.0: 0.95}
_SIZE: Final = 4


def _job(epsilon: float, path: str) -> Job:
    """One step of all units, calibrated by the tight accountant; more step numbers than one, so
    that each draw can have its own."""
    noise = noise_for(1.0, 1, epsilon, DELTA, "pld")
    module, schema = lab.Line(_SIZE), lab.schema_of(_SIZE, 2)
    return lab.job(
        module, schema, batch=2, steps=2 * DRAWS, noise=noise, path=path, lr=1.0, delta=DELTA
    )


@functools.cache
def _of(epsilon: float, path: str) -> functools.partial[Job]:
    return functools.partial(_job, epsilon, path)


def releases(job: Job, there: bool, count: int, key: bytes) -> np.ndarray:
    """The first entry of as many single releases, in units of sigma; each is a step of its own
    number from the same weights."""
    table = lab.zeros(job.schema)
    table["x"][0, 0] = 1e6
    table["x"][1] = 1.0
    if not there:
        table = lab.spoilt(table, [0])
    run = job.start(table, key)
    weights = job.ready.program.flat.detach().numpy()
    out = np.empty(count)
    for step in range(count):
        run(step)
        out[step] = weights[0]
        weights[:] = 0.0
    other = job.plan.clip / math.sqrt(_SIZE)  # what the attacker knows the other unit adds
    return (-out * job.plan.normaliser - other) / job.plan.sigma


def mu_bound(misses: int, alarms: int, draws: int, confidence: float = CONFIDENCE) -> float:
    """The least mu that ``misses`` and ``alarms`` of ``draws`` each do not exclude."""
    log = optimize.brentq(lambda c: c + math.log1p(-c) - math.log(confidence), -80, -1e-9)

    def largest(errors: int, log_tails: np.ndarray) -> np.ndarray:
        """The largest rates with P[at most this many errors] >= exp(log_tail)."""
        if errors >= draws:
            return np.ones_like(log_tails)
        return np.asarray(stats.beta.isf(np.exp(log_tails), errors + 1, draws - errors))

    # What is excluded grows with both rates: all splits of the budget, in cells of which the worse
    # corner counts.
    cells = np.linspace(0, 1, 201)
    a, b = largest(alarms, log * cells[1:]), largest(misses, log * (1 - cells[:-1]))
    return float((stats.norm.isf(a) - stats.norm.ppf(b)).min())


@dataclass(frozen=True)
class Shown:
    """What single releases prove about epsilon at :data:`DELTA`: the least that they do not
    exclude."""

    path: str
    claimed: float
    low: float
    draws: int

    @property
    def ratio(self) -> float:
        return self.low / self.claimed


def single(epsilon: float, path: str, draws: int, seed: int) -> Shown:
    """Bound epsilon from ``draws`` releases with the canary and as many without."""
    job = lab.kept(_of(epsilon, path))
    event = dataclasses.replace(job.plan.events[0], steps=1)
    claimed = pld.epsilon([event], DELTA)
    middle = job.plan.clip / job.plan.sigma / 2
    sides = [
        releases(job, there, draws, lab.key_of("canary", seed, epsilon, path, there))
        for there in (False, True)
    ]
    alarms, misses = int((sides[0] > middle).sum()), int((sides[1] <= middle).sum())
    mu = mu_bound(misses, alarms, draws)
    low = accountant.gaussian(mu, DELTA) if mu > 0 else 0.0
    return Shown(job.path, claimed, low, draws)


def floor(epsilon: float, path: str, draws: int) -> float:
    """The share of epsilon that has to be shown: with all draws, what :data:`FLOORS` says on the
    path ``record``; on ``graph``, which accounts 1.6% for rounding that is not there, 0.02 less.
    With fewer draws, what is expected less five standard errors."""
    if draws >= DRAWS:
        return FLOORS[epsilon] - (0.02 if path != "record" else 0.0)
    mu = float(optimize.brentq(lambda m: accountant.gaussian(m, DELTA) - epsilon, 1e-3, 20))
    rate = float(stats.norm.sf(mu / 2))
    error = math.sqrt(2 * rate * (1 - rate) / draws) / float(stats.norm.pdf(mu / 2))
    expected = mu_bound(round(draws * rate), round(draws * rate), draws)
    least = 0.98 * expected - 5 * error
    return accountant.gaussian(least, DELTA) / epsilon if least > 0 else 0.0


def check(shown: Shown, floor: float) -> None:
    """Above the claim with probability at most 1e-6 where the claim is true; below the floor where
    noise is larger than it has to be, or the canary is not what it was."""
    what = f"canaries, {shown.path}: epsilon {shown.claimed:g} is at least {shown.low:.4f}"
    holds(shown.ratio <= 1, f"{what}, more than claimed")
    holds(shown.ratio >= floor, f"{what}, a share of {shown.ratio:.3f}, not {floor}")


# --- one run of a whole training

CANARIES: Final = 2000
RUN_STEPS: Final = 40
# At a delta of which as many canaries' share is still beside nothing at that confidence.
RUN_DELTA: Final = 1e-10


def _long(path: str) -> Job:
    noise = noise_for(0.5, RUN_STEPS, 8.0, DELTA, "pld")
    module, schema = lab.Line(CANARIES), lab.schema_of(CANARIES, CANARIES)
    batch = CANARIES // 2
    return lab.job(
        module, schema, batch=batch, steps=RUN_STEPS, noise=noise, path=path, lr=1.0, delta=DELTA
    )


_longs: Final = {path: functools.partial(_long, path) for path in ("auto", "record")}


def p_value(guesses: int, right: int, canaries: int, epsilon: float, delta: float) -> float:
    """The chance, at most, of as many right guesses under (epsilon, delta)-DP."""
    share = 1 / (1 + math.exp(-epsilon))
    beta = float(stats.binom.sf(right - 1, guesses, share))
    below = np.cumsum(stats.binom.pmf(np.arange(right - 1, -1, -1), guesses, share))
    alpha = float(np.max(below / np.arange(1, right + 1), initial=0.0))
    return min(1.0, beta + 2 * alpha * delta * canaries)


def proven(guesses: int, right: int, canaries: int, delta: float, confidence: float) -> float:
    """The least epsilon that is not excluded."""
    low, high = 0.0, 50.0
    if p_value(guesses, right, canaries, 0.0, delta) > confidence:
        return 0.0
    for _ in range(50):
        middle = (low + high) / 2
        excluded = p_value(guesses, right, canaries, middle, delta) <= confidence
        low, high = (middle, high) if excluded else (low, middle)
    return low


@dataclass(frozen=True)
class OneRun:
    """Of the guesses that were made, how many were right, and what that proves."""

    claimed: float
    low: float
    guesses: int
    right: int


def one_run(seed: int, path: str = "auto", share: float = 0.05) -> OneRun:
    """Train once on many canaries and guess, of the most telling ``share`` at each end, which were
    there. The sampling of steps is the job's own."""
    job = lab.kept(_longs[path])
    rng = lab.rng_of("one run", seed, path)
    there = rng.random(CANARIES) < 0.5
    table = lab.zeros(job.schema)
    table["x"][:] = torch.eye(CANARIES) * 100
    table = lab.spoilt(table, np.flatnonzero(~there))
    run = job.start(table, rng.bytes(32))
    for step in range(RUN_STEPS):
        run(step)
    score = -job.flat()
    order, each = np.argsort(score), round(CANARIES * share)
    guesses = 2 * each
    right = int(there[order[-each:]].sum() + (~there[order[:each]]).sum())
    claimed = pld.epsilon(job.plan.events, RUN_DELTA)
    return OneRun(claimed, proven(guesses, right, CANARIES, RUN_DELTA, CONFIDENCE), guesses, right)


def check_run(found: OneRun, floor: float = 1.0) -> None:
    """As :func:`check`. floor: an epsilon that the attack always proves when it is at work."""
    what = f"one run: {found.right} of {found.guesses} guesses prove epsilon {found.low:.3f}"
    holds(found.low <= found.claimed, f"{what}, more than the claimed {found.claimed:.3f}")
    holds(found.low >= floor, f"{what}, less than {floor}")
