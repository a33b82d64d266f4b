"""Clip factors and microbatches of the batched path."""

from __future__ import annotations

import gc
import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from casemate.engine import batched
from casemate.engine.forms import ROUNDING, Norm, Site, Way
from casemate.spec.job import Clipping
from support.batched_lab import Data, lab, relative


def site(gamma: float, error: float, scaled: bool = True) -> Site:
    made = Site("p0", [], {})
    made.way = Way("gram", lambda env: Norm(torch.zeros(1)), gamma, error, scaled)
    return made


def factors(n2: list[float], spread: list[float] | None, bound: float, **how: Any) -> Any:
    norm = Norm(
        torch.tensor(n2, dtype=torch.float64),
        None if spread is None else torch.tensor(spread, dtype=torch.float64),
    )
    at = [site(how.get("gamma", 0.0), how.get("error", 0.0))]
    both = [f(at, [norm], bound, len(n2)) for f in (batched.factors, batched._factors)]
    for a, b in zip(*both, strict=True):
        assert torch.equal(a, b), "the native factors are the formula's"
    return both[1]


def test_factors_are_rounded_towards_zero() -> None:
    c, good = factors([3.0, 0.25, 1e300], None, 1.0)
    assert bool(good.all()) and float(c[1]) == 1.0
    for value, n2 in zip(c.tolist(), [3.0, 0.25, 1e300], strict=True):
        assert value * math.sqrt(n2) <= 1.0


def test_the_certified_part_counts() -> None:
    c, _ = factors([0.0], [1e4], 1.0, gamma=1e-6)
    assert float(c[0]) <= 1.0 / math.sqrt(1e-6 * 1e8)
    c, _ = factors([1.0], [1e6], 1.0, error=1e-6)
    assert float(c[0]) <= ROUNDING


@pytest.mark.parametrize("value", [math.inf, math.nan])
def test_units_that_are_not_finite_do_not_count(value: float) -> None:
    c, good = factors([0.5, value], None, 1.0)
    assert good.tolist() == [True, False] and c.tolist() == [1.0, 0.0]


def test_without_a_bound_all_that_is_finite_counts_in_full() -> None:
    c, good = batched._factors(
        [site(0, 0)], [Norm(torch.tensor([9.0, math.inf]).double())], math.inf, 2
    )
    assert c.tolist() == [1.0, 0.0] and good.tolist() == [True, False]


def rows(n: int) -> Data:
    return {"input": torch.randn(n, 5), "target": torch.randint(3, (n,))}


@pytest.mark.parametrize("sizes", [(16, 32), (32, 48)])
def test_sums_are_the_same_for_every_microbatch(sizes: tuple[int, int]) -> None:
    torch.manual_seed(0)
    module, data = nn.Sequential(nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 3)), rows(48)
    found = []
    for size in sizes:
        at = lab(module, lambda n: {k: v[:n] for k, v in data.items()}, rows=size)
        found.append(at.path.sums(at.rows_of(data), 0.4, 0.0, 48)(np.arange(41)).clone())
    assert relative(found[0], found[1]) < 1e-6


class Keyed(nn.Module):
    """Operations with arguments by name and in lists, and a parameter that is formed whole."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.scale = nn.Linear(5, 4), nn.Parameter(torch.ones(4))
        self.last = nn.Linear(8, 3)

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        made = self.first(input) * self.scale
        out: torch.Tensor = self.last(torch.cat([made.tanh(), made.roll(1, 1)], 1))
        return out


@pytest.mark.parametrize("clipping", ["flat", "per-layer"])
def test_a_step_leaves_no_tensor_to_the_cycle_collector(clipping: Clipping) -> None:
    data = rows(32)
    at = lab(Keyed(), lambda n: {k: v[:n] for k, v in data.items()}, rows=32)
    for values in (data, {**data, "input": torch.full((32, 5), math.inf)}):
        sums = at.path.sums(at.rows_of(values), 0.4, 2.0**-20, 32, clipping)
        sums(np.arange(32))
        gc.collect()
        gc.disable()
        try:
            before = sum(isinstance(o, torch.Tensor) for o in gc.get_objects())
            sums(np.arange(32))
            after = sum(isinstance(o, torch.Tensor) for o in gc.get_objects())
        finally:
            gc.enable()
        assert after == before
