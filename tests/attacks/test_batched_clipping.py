# ruff: noqa: E501 - one case a line
"""Rule P3 on the path ``graph``, from outside: however a record is made, taking it out moves the sum
by no more than is accounted. Sums are integers of grid steps, so the norm moved is exact."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from casemate.engine import batched, small
from casemate.engine.forms import ROUNDING
from support.batched_lab import Data, Lab, lab

STEP = 2.0**-24
INF = float("inf")


def linear_of(outputs: Tensor, target: Tensor) -> Tensor:
    """The gradient by the outputs is the target: a record names its output gradients."""
    return (outputs * target).flatten(1).sum(1)


class Tokens(nn.Module):
    """One matrix over T tokens; the gradient is sum_t g_t x_t^T with g and x the record's own."""

    def __init__(self, shape: str = "linear") -> None:
        super().__init__()
        self.shape = shape
        self.w = nn.Parameter(torch.zeros(3, 5))
        self.c = nn.Parameter(torch.zeros(3))

    def forward(self, x: Tensor) -> Tensor:
        if self.shape == "twice":
            return x @ self.w.t() + torch.roll(x, 1, 1) @ self.w.t() + self.c
        if self.shape == "scaled":
            return x @ (self.w * 2).t() + self.c
        if self.shape == "entrywise":
            return (x[..., :3] * self.c + x[..., 2:] * self.c) + 0 * (x @ self.w.t())
        return x @ self.w.t() + self.c


class Conv(nn.Module):
    def __init__(self, **how: Any) -> None:
        super().__init__()
        self.f = nn.Conv1d(4, 4, 3, padding=1, **how)

    def forward(self, x: Tensor) -> Any:
        return self.f(x)


class Table(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.f = nn.Embedding(3, 4)

    def forward(self, x: Tensor) -> Any:
        return self.f(x)


def tokens(n: int, t: int = 6) -> Data:
    return {"x": torch.randn(n, t, 5), "target": torch.randn(n, t, 3)}


def positions(n: int) -> Data:
    return {"x": torch.randn(n, 4, 6), "target": torch.randn(n, 4, 6)}


def indices(n: int) -> Data:
    return {"x": torch.randint(3, (n, 6)), "target": torch.randn(n, 6, 4)}


def cancel(size: float) -> Callable[[Data, int], None]:
    """Tokens in pairs of opposite sign, off by a little: S / n is about ``size``."""

    def spoil(d: Data, i: int) -> None:
        x, g = d["x"], d["target"]
        axis = 0 if g.shape[1:] == (6, 4) or (x.dim() == 3 and x.shape[2] == 5) else 1

        def swap(t: Tensor) -> Tensor:
            return t[i] if axis == 0 else t[i].t()

        if x.is_floating_point():
            swap(x)[1::2] = swap(x)[::2]
        else:
            x[i] = x[i, 0]
        swap(g)[1::2] = -swap(g)[::2]
        g[i] *= size
        swap(g)[0] += 1.0
        # A few records do the same with other roundings.

    return spoil


def everywhere(x: float, g: float) -> Callable[[Data, int], None]:
    def spoil(d: Data, i: int) -> None:
        if d["x"].is_floating_point():
            d["x"][i] = d["x"][i].sign() * x
        d["target"][i] = d["target"][i].sign() * g

    return spoil


def mixed(d: Data, i: int) -> None:
    """Magnitudes from denormal to the largest within one record."""
    for t in d.values():
        if t.is_floating_point():
            flat = t[i].view(-1)
            flat *= 10.0 ** torch.linspace(-44, 36, flat.numel())[torch.randperm(flat.numel())]


def one_entry(value: float, where: str) -> Callable[[Data, int], None]:
    def spoil(d: Data, i: int) -> None:
        t = d[where]
        if t.is_floating_point():
            t[i].view(-1)[0] = value

    return spoil


SPOILS: dict[str, Callable[[Data, int], None]] = {
    **{f"cancel 1e{e}": cancel(10.0**e) for e in (2, 3, 4, 5, 6, 8, 12)},
    **{f"x {x:g} g {g:g}": everywhere(x, g) for x, g in (
        (1e30, 1e30), (1e30, 1e-30), (1e-30, 1e30), (1e-30, 1e-30), (1e38, 1.0), (1e38, 1e-38), (1e38, 3e-40),
        (1e-42, 1e38), (1e-42, 1e-42), (1e19, 1e19), (3e38, 1e-45), (0.0, 1e38), (1e38, 0.0))},
    "mixed": mixed,
    **{f"{v} in {w}": one_entry(v, w) for v in (INF, -INF, math.nan, 3e38) for w in ("x", "target")},
}  # fmt: skip

MODELS: dict[str, tuple[Callable[[], nn.Module], Callable[[int], Data]]] = {
    "linear": (Tokens, tokens),
    "one token": (Tokens, lambda n: tokens(n, 1)),
    "twice": (lambda: Tokens("twice"), tokens),
    "scaled": (lambda: Tokens("scaled"), tokens),
    "entrywise": (lambda: Tokens("entrywise"), tokens),
    "convolution": (Conv, positions),
    "depthwise": (lambda: Conv(groups=4), positions),
    "dilated": (lambda: Conv(dilation=1, groups=2), positions),
    "embedding": (Table, indices),
}


def accounted(bound: float, d: int, microbatches: int = 1) -> float:
    return bound * (1 + batched.ETA) + 2 * ROUNDING * bound + microbatches * STEP * math.sqrt(d)


def moved(at: Lab, data: Data, i: int, bound: float, step: float = STEP) -> float:
    """How far the sum moves when record i is taken out, exactly but for the root."""
    rows, n = at.rows_of(data), len(data["x"])
    chosen = np.arange(n)
    full = at.path.sums(rows, bound, step, at.rows)(chosen).clone().numpy()
    rows.valid[i] = False
    less = at.path.sums(rows, bound, step, at.rows)(chosen).numpy()
    square = sum(int(v) ** 2 for v in (full - less).tolist())
    return math.sqrt(square) * step if square else 0.0


def labs(name: str) -> list[Lab]:
    make, data = MODELS[name]
    torch.manual_seed(0)
    at = lab(make(), data, linear_of)
    return [at]


@pytest.mark.parametrize("name", MODELS)
def test_no_record_moves_the_sum_by_more_than_is_accounted(name: str) -> None:
    (at,) = labs(name)
    worst, got = 0.0, 0
    for way in range(max(len(s.ways) for s in at.path.sites)):
        for site in at.path.sites:
            site.way = site.ways[min(way, len(site.ways) - 1)]
        for label, spoil in SPOILS.items():
            for spoiled in (1, 8)[: 2 if way == 0 else 1]:
                torch.manual_seed(len(label))
                data = {k: v.clone() for k, v in at.data.items()}
                for i in range(spoiled):
                    spoil(data, i)
                by = moved(at, data, 0, 1.0)
                assert by <= accounted(1.0, at.program.dimension), (label, spoiled, at.path.sites)
                worst, got = max(worst, by), got + (by > 0)
    assert worst > 0.9 and got > 10, "the attack must move something"


@pytest.mark.parametrize("bound", [1e-6, 1e-3, 1e3])
@pytest.mark.parametrize("name", ["linear", "one token", "convolution", "embedding"])
def test_small_and_large_bounds(name: str, bound: float) -> None:
    (at,) = labs(name)
    step = 2.0 ** math.floor(math.log2(bound) - 24)
    for label, spoil in SPOILS.items():
        data = {k: v.clone() for k, v in at.data.items()}
        spoil(data, 0)
        by = moved(at, data, 0, bound, step)
        room = bound * (1 + batched.ETA + 2 * ROUNDING) + step * math.sqrt(at.program.dimension)
        assert by <= room, label


def test_a_record_that_is_not_finite_counts_as_nothing_and_leaves_the_others() -> None:
    (at,) = labs("linear")
    data = {k: v.clone() for k, v in at.data.items()}
    data["x"][3, 0, 0] = math.nan
    data["target"][5, 0, 0] = INF
    rows = at.rows_of(data)
    with_them = at.path.sums(rows, 1.0, STEP, at.rows)(np.arange(16)).clone()
    rows.valid[[3, 5]] = False
    without = at.path.sums(rows, 1.0, STEP, at.rows)(np.arange(16)).clone()
    assert with_them.abs().sum() > 0
    # Only the rounding of the sum may differ.
    assert (with_them - without).abs().max() * STEP <= 2 * ROUNDING


def test_infinite_in_one_site_alone() -> None:
    """The matrix' gradient overflows, the bias' does not: neither counts."""
    (at,) = labs("linear")
    data = {k: v.clone() for k, v in at.data.items()}
    data["x"][0] = 3e38
    data["target"][0] = 1e30
    _, c = at.parts(1.0, data)
    assert float(c[0]) == 0.0 and float(c[1]) > 0.0


def test_masks_of_minus_infinity_hide_no_record() -> None:
    class Masked(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.q = nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Any:
            hidden = x[..., :1].transpose(1, 2) > 5.0  # a record may mask everything
            scores = (self.q(x) @ x.transpose(1, 2)).masked_fill(hidden, -INF)
            return scores.softmax(-1) @ x

    def data(n: int) -> Data:
        return {"x": torch.randn(n, 3, 4), "target": torch.randn(n, 3, 4)}

    at = lab(Masked(), data, linear_of)
    for fill in (9.0, -9.0, 1e30):
        some = {k: v.clone() for k, v in at.data.items()}
        some["x"][0] = fill
        some["target"] *= 1e4
        assert moved(at, some, 0, 1.0) <= accounted(1.0, at.program.dimension)


def test_opposite_records_of_huge_size_hide_behind_each_other_and_move_no_more() -> None:
    """Pairs whose clipped contributions cancel, so that the sum is small and its rounding is not."""
    (at,) = labs("linear")
    for size in (1.0, 1e4, 1e10, 1e18):
        data = {k: v.clone() for k, v in at.data.items()}
        data["x"] *= size
        data["target"] *= size
        for i in range(0, 16, 2):
            data["x"][i + 1] = data["x"][i]
            data["target"][i + 1] = -data["target"][i]
        for i in range(3):
            by = moved(at, data, i, 1.0)
            assert by <= accounted(1.0, at.program.dimension)
            assert by > 0.9 or size**2 > 0.1 / batched.SMALLEST


def test_underestimating_norms_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    """Seeded bug: the certified part of the bound left out."""

    def careless(sites: Any, norms: Any, bound: float, units: int, *rest: Any) -> Any:
        squared = sum(n.squared for n in norms).clamp(min=0.0)
        c = (bound / squared.sqrt()).clamp(max=1.0).nan_to_num(0.0).float()
        return c, torch.ones(units, dtype=torch.bool)

    (at,) = labs("linear")
    for site in at.path.sites:
        site.way = next((w for w in site.ways if w.name.startswith("gram")), site.way)
    monkeypatch.setattr(small, "factors", careless)
    monkeypatch.setattr(small, "build", lambda *a: None)
    worst = 0.0
    for e in (4, 6, 8, 12):
        data = {k: v.clone() for k, v in at.data.items()}
        for i in range(8):
            cancel(10.0**e)(data, i)
        worst = max(worst, moved(at, data, 0, 1.0))
    assert worst > accounted(1.0, at.program.dimension)


@pytest.mark.parametrize("keep", [False, True])
def test_a_record_on_which_the_model_fails_counts_as_nothing_and_tells_nothing(keep: bool) -> None:
    """Were one to get past the proof of ranges: no error, and the other records' sums as without
    it."""

    class Frozen(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("m", torch.randn(5, 5))
            self.w = nn.Linear(5, 3)

        def forward(self, x: Tensor) -> Any:
            return self.w(torch.tanh(x @ self.m))

    torch.manual_seed(1)
    at = lab(Frozen(), lambda n: tokens(n, 1), linear_of, keep=keep)
    at.path.form()
    data = {k: v.clone() for k, v in at.data.items()}
    data["x"][[2, 9], 0, 0] = 99.0
    rows, spoiled = at.rows_of(at.data), at.rows_of(data)
    real = at.path._prefix if keep else at.path._forward

    def failing(fixed: Any, *given: Any) -> Any:
        if any(bool((t == 99.0).any()) for t in given if t.is_floating_point()):
            raise IndexError("index 99 is out of range")
        return real(fixed, *given)

    setattr(at.path, "_prefix" if keep else "_forward", failing)
    got = at.path.sums(spoiled, 1.0, STEP, at.rows)(np.arange(at.rows)).clone()
    rows.valid[[2, 9]] = False
    want = at.path.sums(rows, 1.0, STEP, at.rows)(np.arange(at.rows))
    assert want.abs().sum() > 0 and torch.equal(got, want)
