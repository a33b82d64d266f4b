"""Sound clipping of one unit's contribution (P3), in the forms of ``spec.job.Dp``.

The claim: what any of :data:`FORMS` leaves has L2 norm at most C(1 + eta(d)), whatever came in, so
that the sensitivity that a plan accounts does not depend on its form.

*Flat*: what :func:`clip` leaves has L2 norm at most C(1 + eta(d)), whatever came in. Proof,
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

*Per-layer*: a part of d_l components goes to norm at most C_l (1 + u)^3 / sqrt(1 - gamma), and C_l,
computed, is at most C / sqrt(L) (1 + u)^3. Parts have no component in common: squares add, over L
of them to at most C^2 (1 + u)^12 / (1 - gamma), whose root is at most C (1 + 7u)(1 + gamma) <= C (1
+ eta(d)). C_l is at least SMALLEST as C >= 1e-30 > 2^-100 and L <= d.

*Automatic*: with g > 0 for the form's own gamma, what is computed for n + g is at least n (1 - u),
n being the computed norm; that is one rounding more than flat: at most C (1 + u)^4 / sqrt(1 -
gamma) <= C (1 + 5u)(1 + gamma). The factor is at most C / g, at most 1e12: nothing overflows.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Final, TypeAlias

import torch

# Clips a contribution (d,), float64, in place, to a bound.
Clip: TypeAlias = Callable[[torch.Tensor, float], None]

SMALLEST: Final = 2.0**-400


def eta(dimension: int) -> float:
    """Relative slack of the clip for ``dimension`` components; see the module's proof."""
    return (dimension + 16) * 2.0**-52


def clip(contribution: torch.Tensor, bound: float) -> None:
    """Scale a float64 vector (d,), in place, to norm at most ``bound`` * (1 + eta(d)).

    Its components are sums of at most 4096 float32 values; ``bound`` is at least SMALLEST.
    """
    squared = _squared(contribution)
    if squared > 0.0 and (norm := math.sqrt(squared)) > bound:
        contribution.mul_(bound / norm)


def _squared(contribution: torch.Tensor) -> float:
    """The squared norm; of what is not finite, which becomes zeros, 0."""
    squared = float(torch.dot(contribution, contribution))
    if math.isfinite(squared):
        return squared
    contribution.zero_()
    return 0.0


def share(bound: float, tensors: int) -> float:
    """C_l of the form ``per-layer``: squares of ``tensors`` equal shares add up to C^2."""
    return bound / math.sqrt(tensors)


def per_layer(sizes: Sequence[int]) -> Clip:
    """Clips the parts of these sizes, one for each trained tensor, each by itself."""

    def layers(contribution: torch.Tensor, bound: float) -> None:
        if _squared(contribution) > 0.0:  # else a part alone may be finite
            for part in torch.split(contribution, list(sizes)):
                clip(part, share(bound, len(sizes)))

    return layers


def automatic(gamma: float) -> Clip:
    """Scales every contribution by bound / (norm + gamma), short ones up."""

    def scale(contribution: torch.Tensor, bound: float) -> None:
        squared = _squared(contribution)
        contribution.mul_(bound / (math.sqrt(squared) + gamma))

    return scale


# Plan.clipping -> (sizes of the trained tensors, gamma) -> what clips.
FORMS: Final[Mapping[str, Callable[[Sequence[int], float], Clip]]] = {
    "flat": lambda sizes, gamma: clip,
    "per-layer": lambda sizes, gamma: per_layer(sizes),
    "automatic": lambda sizes, gamma: automatic(gamma),
}
