"""From a request to a plan: all public constants that can affect privacy."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Final

from casemate.accounting.calibrate import noise_multiplier
from casemate.plan.check import check_request
from casemate.spec.codec import digest
from casemate.spec.data import DatasetSchema
from casemate.spec.errors import PlanError
from casemate.spec.job import Dp, DpEvent, JobRequest, Plan, TrainSpec
from casemate.spec.messages import Prepared

# Each of the two extra deltas is this part of the job's delta (the rules allow 1/100).
EXTRA_PART: Final = 1e-4
# Chance that a step of a job without privacy drops units; no one's privacy depends on it.
_PLAIN_TRUNCATION: Final = 1e-9
MAX_SCALE_BITS: Final = 32
_UP: Final = 1 + 2.0**-48


def capacity(units: int, rate: float, steps: int, delta_part: float) -> int:
    """The smallest number of slots (units) that a step needs, such that by the bound below the
    probability that any of ``steps`` Poisson samples is larger is at most ``delta_part``.

    With X ~ Binomial(n, q), k > nq, and p = k/n < 1:
    P[X >= k] <= P[X = k] / (1 - r), r = (n-k) q / ((k+1)(1-q)), a geometric series;
    P[X = k] <= sqrt(n / (2 pi k (n-k))) exp(1/(12n) - n KL(p || q)), Stirling's bounds
    (Robbins 1955). The union over steps is a factor.
    """
    if rate >= 1:
        return units
    if not delta_part > 0:  # its part of the smallest floats is 0
        raise PlanError("plan.delta", "The delta is too small.", mend="Ask for a larger delta.")
    target = math.log(delta_part) - math.log(steps)

    def log_tail(k: int) -> float:
        n = units
        if k >= n:
            return n * math.log(rate)
        p = k / n
        divergence = n * (p * math.log(p / rate) + (1 - p) * math.log((1 - p) / (1 - rate)))
        ratio = (n - k) * rate / ((k + 1) * (1 - rate))
        log_point = 1 / (12 * n) - divergence - math.log(2 * math.pi * k * (n - k) / n) / 2
        # 2^-40 n q covers the cancellation within the divergence.
        return log_point - math.log1p(-ratio) + 2.0**-40 * (1 + n * rate + abs(log_point))

    low, high = math.floor(units * rate) + 1, units
    while low < high:
        middle = (low + high) // 2
        if log_tail(middle + 1) <= target:
            high = middle
        else:
            low = middle + 1
    return low


def slots(train: TrainSpec, units: int) -> int:
    """Units that every step must have room for."""
    return capacity(units, train.batch_size / units, train.steps, _part(train))


def _part(train: TrainSpec) -> float:
    """Each of the two extra deltas."""
    return train.privacy.delta * EXTRA_PART if isinstance(train.privacy, Dp) else _PLAIN_TRUNCATION


def sensitivity(clip: float, eta: float, rounding: float, grid: float, dimension: int) -> float:
    """How far one unit moves the sum on the grid, L2, in gradient units, rounded up (P3):

    clip (1 + eta) + 2 rounding + grid sqrt(dimension). Sums of integers are exact, so ``rounding``
    is what comes before the grid. What joins the sum at once, a unit's contribution or a
    microbatch's, is rounded to the nearest grid point, with the unit and without it: twice at most
    grid / 2 a coordinate. Every form of the clip keeps to clip (1 + eta): per-layer bounds are
    clip / sqrt(L) on each of L tensors, and automatic clipping stays below the clip.
    """
    return (clip * (1 + eta) + 2 * rounding + grid * math.sqrt(dimension)) * _UP


def _grid(
    noise: float, clip: float, eta: float, rounding: float, dimension: int, slots: int
) -> tuple[float, float, float]:
    """Grid, sensitivity and sigma. The grid is a power of two: fine beside the noise (2^-20 sigma)
    and so fine that rounding ``dimension`` coordinates adds at most 2^-10 of the clip; coarser, by
    as little as can be, where int64 sums or the sampler's scale would otherwise overflow.

    One contribution is below 2 clip / grid + 1 grid steps, and one draw of noise below 2^11
    standard deviations; slots contributions and one draw stay below 2^62.
    """
    finest = min(noise * clip * 2.0**-20, clip * 2.0**-10 / math.sqrt(dimension))
    grid = 2.0 ** math.floor(math.log2(finest))
    while grid < clip:
        bound = sensitivity(clip, eta, rounding, grid, dimension)
        sigma = noise * bound * _UP
        scale = sigma / grid
        most = slots * (2 * clip / grid + 1) + scale * 2.0**12
        if scale < 2**8:
            break
        if scale <= 2.0**MAX_SCALE_BITS and most < 2.0**62:
            return grid, bound, sigma
        grid *= 2
    raise PlanError(
        "plan.grid",
        f"No integer grid holds {slots} contributions of norm {clip:g} beside so little noise.",
        mend="Ask for a smaller epsilon, a smaller batch or another clip.",
    )


def compile_plan(
    request: JobRequest,
    schemas: Sequence[DatasetSchema],
    prepared: Prepared,
    noise: float | None = None,
) -> Plan:
    """The plan of a request over datasets with these schemas, in the request's order.

    All datasets make one population: q = batch_size / (sum of units), and each dataset is charged
    the same event, because each of its units is sampled at q and moves the same noised sum.

    A slot is a unit with all its rows, at most ``rows_per_unit``, which are summed before one clip:
    every step evaluates microbatch * microbatches units, whatever was sampled (P2).

    The noise multiplier is the smallest by which a fresh dataset with budget (epsilon, delta)
    admits the job: 9/10 of delta are for the event, the rest covers the two extra deltas; or
    ``noise``, where another accountant than the filter has chosen it.
    Raises PlanError.
    """
    check_request(request, schemas)
    made = constants(request.train, schemas, prepared, noise)
    return replace(made, request_digest=digest(request), model_digest=request.model_digest)


def constants(
    train: TrainSpec,
    schemas: Sequence[DatasetSchema],
    prepared: Prepared,
    noise: float | None = None,
) -> Plan:
    """:func:`compile_plan` by what decides its constants, of a request that was checked: the plan
    without the request's digest and with the prepared model's."""
    privacy = train.privacy
    units = sum(s.units for s in schemas)
    rate = train.batch_size / units
    private = isinstance(privacy, Dp)
    part = _part(train)
    microbatch = prepared.microbatch
    microbatches = -(-slots(train, units) // microbatch)
    if isinstance(privacy, Dp):
        if noise is None:
            noise = noise_multiplier(rate, train.steps, privacy.epsilon, privacy.delta)
        clip = privacy.clip
        grid, bound, sigma = _grid(
            noise, clip, prepared.certified_eta, prepared.rounding, prepared.dimension,
            microbatch * microbatches,
        )  # fmt: skip
        events: tuple[DpEvent, ...] = (
            DpEvent(rate=rate, noise_multiplier=noise, steps=train.steps),
        )
        form, gamma = privacy.clipping, privacy.gamma if privacy.clipping == "automatic" else 0.0
    else:
        form, gamma = "flat", 0.0
        noise = clip = grid = bound = sigma = part = 0.0
        events = ()
    return Plan(
        request_digest="",
        model_digest=prepared.model_digest,
        private=private,
        units=units,
        rate=rate,
        steps=train.steps,
        clip=clip,
        normaliser=float(train.batch_size),
        sensitivity=bound,
        noise_multiplier=noise,
        sigma=sigma,
        grid=grid,
        microbatch=microbatch,
        microbatches=microbatches,
        events=events,
        delta_truncation=part,
        delta_sampler=part,
        clipping=form,
        gamma=gamma,
    )
