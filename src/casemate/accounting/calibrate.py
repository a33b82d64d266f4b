"""The smallest noise that keeps a job within (epsilon, delta), by the filter's own charge (P9)."""

from __future__ import annotations

import math
from functools import lru_cache

from casemate.accounting import filters, rdp
from casemate.spec.errors import PlanError
from casemate.spec.job import DpEvent


@lru_cache(maxsize=256)
def noise_multiplier(rate: float, steps: int, epsilon: float, delta: float) -> float:
    """Noise (standard deviation over sensitivity) of ``steps`` steps at sampling rate ``rate``.

    The result is within a factor 1 + 2^-16 of the smallest noise such that a fresh dataset with
    budget (``epsilon``, ``delta``) admits the job; the job's charge then shows at most ``epsilon``.
    ``delta`` is the whole delta: a tenth is kept for truncation and sampler.
    Raises PlanError ``plan.epsilon`` when no noise is enough.
    """
    capacity = filters.capacities(epsilon, delta)

    def enough(noise: float) -> bool:
        event = DpEvent(rate=rate, noise_multiplier=noise, steps=steps)
        return filters.fits(filters.nano([event]), capacity)

    low, high = math.log2(rdp.MIN_NOISE), math.log2(rdp.MAX_NOISE)
    if not enough(math.exp2(high)):
        raise PlanError(
            "plan.epsilon",
            f"No noise keeps {steps} steps within epsilon {epsilon:g} at delta {delta:g}.",
            mend="Ask for a larger epsilon or delta.",
        )
    if enough(math.exp2(low)):
        return math.exp2(low)
    # Most answers lie between 1/4 and 16; doubling from 1 is cheaper than halving [-10, 40].
    step, at = 1.0, 0.0
    if enough(1.0):
        while at - step > low and enough(math.exp2(at - step)):
            at, step = at - step, 2 * step
        low, high = max(low, at - step), at
    else:
        while at + step < high and not enough(math.exp2(at + step)):
            at, step = at + step, 2 * step
        low, high = at, min(high, at + step)
    while high - low > 2.0**-16:
        middle = (low + high) / 2
        if enough(math.exp2(middle)):
            high = middle
        else:
            low = middle
    return math.exp2(high)
