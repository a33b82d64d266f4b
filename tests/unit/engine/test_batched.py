"""Clip factors and microbatches of the batched path."""

from __future__ import annotations

import gc
import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from casemate.engine import batched, windows
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
    for units in (1, 5):  # each brings a part of what their sum may hide
        c, _ = factors([1.0] * units, [1e6] * units, 1.0, error=1e-6)
        assert float(c.sum()) <= ROUNDING


@pytest.mark.parametrize("units", [1, 2, 63, 64, 65, 130])
def test_the_native_factors_are_those_of_the_formula(units: int) -> None:
    """Over sites, to the last bit but one: a multiply-add may round once less."""
    made = torch.Generator().manual_seed(units)

    def drawn(power: float) -> torch.Tensor:
        return torch.rand(units, dtype=torch.float64, generator=made) * 10.0**power

    for power in (-300.0, -60.0, -3.0, 3.0, 60.0, 150.0):
        sites = [site(1e-6, 2.0**-24), site(0.0, 1e-6, False), site(1e-3, 1e-4)]
        norms = [Norm(drawn(power)), Norm(drawn(power), drawn(power / 2)), Norm(drawn(power + 2))]
        norms[0].squared[-1] = math.nan if power == 3.0 else math.inf if power == 60.0 else 0.0
        for bound in (1e-30, 1.0, 1e30):
            (a, good), (b, fine) = (
                f(sites, norms, bound, units) for f in (batched.factors, batched._factors)
            )
            assert torch.equal(good, fine)
            above = torch.maximum(a, b) > 2 * batched.SMALLEST
            assert torch.allclose(a[above], b[above], rtol=2.0**-23, atol=0.0)


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


def tensors() -> list[torch.Tensor]:
    """All that live."""
    return [o for o in gc.get_objects() if type(o) is torch.Tensor]


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
            before = len(tensors())
            sums(np.arange(32))
            after = len(tensors())
        finally:
            gc.enable()
        assert after == before


class Many(nn.Module):
    """Ways of every kind: a table, a convolution, normalisations, biases, products of tokens."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(11, 6, padding_idx=0)
        self.norm, self.mix = nn.LayerNorm(6), nn.Linear(6, 7)
        self.conv, self.group = nn.Conv1d(7, 8, 3, padding=1), nn.GroupNorm(2, 8)
        self.last = nn.Linear(8, 3)

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        made = self.mix(self.norm(self.table(input)))
        made = self.group(self.conv(made.transpose(1, 2)).relu())
        out: torch.Tensor = self.last(made.mean(2))
        return out


def words(n: int) -> Data:
    return {"input": torch.randint(11, (n, 9)), "target": torch.randint(3, (n,))}


@pytest.mark.parametrize(
    ("clipping", "slots"),
    [
        *((c, 16) for c in ("flat", "per-layer", "automatic")),
        ("flat", 48),
        *(pytest.param(c, 48, marks=pytest.mark.full) for c in ("per-layer", "automatic")),
    ],
)
def test_what_is_formed_early_and_added_by_windows_is_the_same_to_the_bit(
    clipping: Clipping, slots: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(1)
    data = words(slots)
    data["input"][3] = 0
    at = lab(Many(), lambda n: {k: v[:n] for k, v in data.items()}, rows=16, ways="gram")
    how = (0.3, 2.0**-20, slots, clipping, 0.5 if clipping == "automatic" else 0.0)
    chosen = np.arange(slots - 3)
    wanted = at.path.sums(at.rows_of(data), *how)(chosen).clone()
    before = set(at.path._given)
    at.path.form()
    after = set(at.path._given)
    assert any(name.endswith("!") for name in after) and len(before - after) >= 8
    for window in (1 << 16, 10, 2):
        monkeypatch.setattr(windows, "WINDOW", window)
        assert torch.equal(at.path.sums(at.rows_of(data), *how)(chosen), wanted)
    assert wanted.count_nonzero() > 200


class Scaled(nn.Module):
    """The first parameter's gradient is made with the second and the other way round."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Parameter(torch.randn(4, 5)), nn.Parameter(torch.randn(4, 5))

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return nn.functional.linear(input, self.first * self.second)


def test_weights_that_gradients_are_made_with_change_when_all_are_there(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Pieces are taken and weights changed at once: later gradients are those of the weights before
    the step all the same."""
    torch.manual_seed(2)
    monkeypatch.setattr(windows, "WINDOW", 10)
    data = rows(16)
    at = lab(Scaled(), lambda n: {k: v[:n] for k, v in data.items()}, rows=16)
    pieces = at.path.pieces(at.rows_of(data), 0.3, 2.0**-20, 16)
    wanted = torch.cat([part.clone() for _, part in pieces(np.arange(16))])
    got = []
    for first, part in pieces(np.arange(16)):
        got.append(part.clone())
        at.program.flat[first : first + len(part)] = 100.0
    assert len(got) == 4 and torch.equal(torch.cat(got), wanted)


def bytes_of_tensors() -> int:
    found = (t.untyped_storage() for t in tensors())
    return sum({s.data_ptr(): s.nbytes() for s in found}.values())


def test_a_step_of_one_microbatch_holds_no_vector_of_the_models_length() -> None:
    data = {"input": torch.randn(16, 450), "target": torch.randint(3, (16,))}
    layers = [m for _ in range(8) for m in (nn.Linear(450, 450), nn.Tanh())]
    at = lab(nn.Sequential(*layers, nn.Linear(450, 3)),
             lambda n: {k: v[:n] for k, v in data.items()}, rows=16)  # fmt: skip
    pieces = at.path.pieces(at.rows_of(data), 0.3, 2.0**-20, 16)
    before = bytes_of_tensors()
    most = max(bytes_of_tensors() for _ in pieces(np.arange(16))) - before
    # 17 inputs and as many output gradients, one gradient, a window.
    expected = 34 * 16 * 450 * 4 + 450 * 450 * 4 + 8 * windows.WINDOW
    assert most < 1.1 * expected < 2 * at.program.dimension
