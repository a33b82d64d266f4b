"""Sound clipping of one unit's contribution (P3).

The claim: what :func:`clip` leaves has L2 norm at most C(1 + eta(d)), whatever came in. Proof,
with u = 2^-53 and d components. A contribution is the float64 sum of a few float32 gradients:
finite components are below 2^141 and zero or above 2^-150 in size, so that float64 squares neither
overflow nor underflow; nor do the quotient and the products for C >=
2^-400 (SMALLEST) and d <= 2^40. All terms being positive, the computed dot product has relative
error at most gamma = du / (1 - du) in any order (Higham, Accuracy and Stability of Numerical
Algorithms, section 3.1), so the computed n^2 is at least n^2 (1 - gamma). One square root, one
division and one product a component add a relative u each, so the norm after scaling is at most C
(1 + u)^3 / sqrt(1 - gamma) <= C (1 + 4u)(1 + gamma) <= C (1 + (d + 16) 2^-52), for d <= 2^40. A
norm that is not finite means that a component is not: the contribution becomes zeros before
anything is multiplied.
"""

from __future__ import annotations

import math
from typing import Final

import torch

SMALLEST: Final = 2.0**-400


def eta(dimension: int) -> float:
    """Relative slack of the clip for ``dimension`` components; see the module's proof."""
    return (dimension + 16) * 2.0**-52


def clip(contribution: torch.Tensor, bound: float) -> None:
    """Scale a float64 vector (d,), in place, to norm at most ``bound`` * (1 + eta(d)).

    Its components are sums of at most 4096 float32 values; ``bound`` is at least SMALLEST.
    """
    squared = float(torch.dot(contribution, contribution))
    if not math.isfinite(squared):
        contribution.zero_()
        return
    norm = math.sqrt(squared)
    if norm > bound:
        contribution.mul_(bound / norm)
