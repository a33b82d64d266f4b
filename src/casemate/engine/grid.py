"""The integer grid on which contributions are summed (P4).

A grid step is a power of two, so that dividing by it is exact. Each unit's clipped contribution is
rounded to the nearest grid point; sums of integers are exact and know no order. Rounding moves a
vector of d components by at most grid * sqrt(d) / 2, so one unit moves the sum by at most
sensitivity(C, d, grid) = C (1 + eta(d)) + grid * sqrt(d) / 2.
"""

from __future__ import annotations

import math

import torch

from casemate.engine.clip import eta


def sensitivity(bound: float, dimension: int, grid: float) -> float:
    """Accounted L2 sensitivity in gradient units, rounded up."""
    exact = bound * (1.0 + eta(dimension)) + grid * math.sqrt(dimension) / 2.0
    return exact * (1.0 + 2.0**-50)


def to_grid(contribution: torch.Tensor, grid: float) -> torch.Tensor:
    """A float64 vector in gradient units, used up, as int64 grid steps."""
    return contribution.div_(grid).round_().to(torch.int64)


def fits(bound: float, grid: float, slots: int, scale: float) -> bool:
    """Whether the step can never leave int64, nor one contribution leave float64's integers.

    ``slots``: contributions in the sum. ``scale``: sigma / grid; a draw of noise stays below 2^11
    times that, since noise._try_pair takes no U1 below 2^-(2^20).
    """
    power = math.frexp(grid)[0] == 0.5
    largest = bound / grid * 2.0 + 1.0
    return power and largest < 2.0**52 and slots * largest + scale * 2.0**11 < 2.0**62
