"""The forms of the clip on the path ``graph``: definitions, the bound, bugs that must show."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from casemate.engine import batched, small
from casemate.engine.forms import ROUNDING
from support.batched_lab import Data, Lab, gradients, lab, relative

GAMMA = 0.01
FORMS = {"flat": 0.0, "per-layer": 0.0, "automatic": GAMMA}
STEP = 2.0**-24
Patch = pytest.MonkeyPatch


class Model(nn.Module):
    """Tokens, so that norms are had by Gram matrices; a table, a scale and a bias; one that has no
    gradient, and its share of the clip."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(7, 5)
        self.norm = nn.LayerNorm(5)
        self.a = nn.Linear(5, 6)
        self.b = nn.Linear(6, 3)
        self.idle = nn.Parameter(torch.ones(3))

    def forward(self, index: Tensor) -> Any:
        made = self.b(torch.tanh(self.a(self.norm(self.table(index)))).mean(1))
        return made + self.idle.detach()


def data(n: int) -> Data:
    made = torch.Generator().manual_seed(4)
    return {
        "index": torch.randint(7, (n, 4), generator=made),
        "target": torch.randint(3, (n,), generator=made),
    }


@functools.cache
def model(**how: Any) -> Lab:
    torch.manual_seed(1)
    return lab(Model(), data, **how)


def scaled(at: Lab, each: Tensor, form: str, bound: float, gamma: float) -> Tensor:
    """Units' contributions (u, d) by the definitions, float64."""
    if form == "per-layer":
        sizes = [leaf.numel() for leaf in at.program.leaves]
        limit = bound / math.sqrt(len(sizes))
        parts = [p * (limit / p.norm(dim=1, keepdim=True).clamp(min=1e-300)).clamp(max=1.0)
                 for p in torch.split(each, sizes, 1)]  # fmt: skip
        return torch.cat(parts, 1)
    norms = each.norm(dim=1, keepdim=True)
    factor = bound / (norms + gamma) if form == "automatic" else (bound / norms).clamp(max=1.0)
    return each * factor


def sums_are_right(form: str, bound: float = 0.3, k: int = 1) -> None:
    at = model(per_unit=k)
    each = gradients(at.module, at.program, at.data, "cross_entropy")
    wanted = scaled(at, each.reshape(-1, k, each.shape[1]).sum(1), form, bound, GAMMA).sum(0)
    parts, _ = at.path.parts(at.env(), bound, clipping=form, gamma=FORMS[form])  # type: ignore[arg-type]
    assert relative(at.flat(parts), wanted) < 1e-5
    rows, chosen = at.rows_of(k=k), np.arange(at.rows // k)
    how: Any = (form, FORMS[form])
    floats = at.path.sums(rows, bound, 0.0, len(chosen), *how)(chosen)
    assert relative(floats, wanted) < 1e-5
    step = 2.0 ** math.floor(math.log2(bound) - 24)
    steps = at.path.sums(rows, bound, step, len(chosen), *how)(chosen).double() * step
    assert relative(steps, wanted) < 1e-5


@pytest.mark.parametrize("k", [1, 2])
@pytest.mark.parametrize("bound", [1e-3, 0.3, 40.0])
@pytest.mark.parametrize("form", FORMS)
def test_sums_are_those_of_a_float64_loop(form: str, bound: float, k: int) -> None:
    sums_are_right(form, bound, k)


@pytest.mark.parametrize("form", FORMS)
def test_sums_are_the_same_for_every_microbatch(form: str) -> None:
    """Gradient accumulation: a step of 48 slots at 16 and at 48 at a time, within rounding."""
    found = []
    for size in (16, 48):
        at = model(rows=size)
        made = at.path.sums(at.rows_of(data(48)), 0.4, 0.0, 48, form, FORMS[form])  # type: ignore[arg-type]
        found.append(made(np.arange(41)).clone())
    assert relative(found[0], found[1]) < 1e-6


# Records made to be hostile: what one moves stays within what a plan accounts.


class Outer(nn.Module):
    """Two matrices whose gradients are sum_t g_t x_t^T with g and x the record's own."""

    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.zeros(3, 5))
        self.v = nn.Parameter(torch.zeros(3, 5))
        self.c = nn.Parameter(torch.zeros(3))

    def forward(self, x: Tensor) -> Any:
        return x[..., :5] @ self.w.t() + x[..., 5:] @ self.v.t() + self.c


@functools.cache
def hostile() -> Lab:
    torch.manual_seed(0)
    return lab(Outer(), outer, linear)


def linear(outputs: Tensor, target: Tensor) -> Tensor:
    return (outputs * target).flatten(1).sum(1)


def outer(n: int) -> Data:
    made = torch.Generator().manual_seed(9)
    return {
        "x": torch.randn(n, 6, 10, generator=made),
        "target": torch.randn(n, 6, 3, generator=made),
    }


def spoils() -> list[Callable[[Data], None]]:
    def of(x: float, v: float, g: float) -> Callable[[Data], None]:
        def spoil(d: Data) -> None:
            d["x"][0, :, :5], d["x"][0, :, 5:] = x, v
            d["target"][0] = g

        return spoil

    def cancel(size: float) -> Callable[[Data], None]:
        def spoil(d: Data) -> None:
            d["x"][0, 1::2] = d["x"][0, ::2]
            d["target"][0] *= size
            d["target"][0, 1::2] = -d["target"][0, ::2]
            d["target"][0, 0] += 1.0

        return spoil

    def shrink(factor: float) -> Callable[[Data], None]:
        return lambda d: d["target"][0].mul_(factor)

    sizes = (0.0, 1e-42, 1e-3, 1.0, 1e19, 3e38, math.inf, math.nan)
    return [
        *(of(x, v, g) for x in sizes for v in (0.0, 1e30) for g in (1e-38, 1e-20, 1.0, 1e30)),
        *(cancel(10.0**e) for e in (2, 4, 6, 8)),
        *(shrink(10.0 ** (-e / 8)) for e in range(40)),
    ]


def nothing_moves_more_than_it_may(form: str, bound: float = 1.0) -> None:
    at = hostile()
    step = 2.0 ** math.floor(math.log2(bound) - 24)
    d = {name: t.clone() for name, t in at.data.items()}
    how: Any = (form, FORMS[form])
    sums = at.path.sums(at.rows_of(d), bound, step, at.rows, *how)
    everyone, worst = np.arange(at.rows), 0.0
    for spoil in spoils():
        for name, t in at.data.items():
            d[name].copy_(t)
        spoil(d)
        difference = (sums(everyone).clone() - sums(everyone[1:])).tolist()
        by = math.sqrt(sum(v**2 for v in difference)) * step
        assert by <= batched.sensitivity(bound, at.program.dimension, step), by
        worst = max(worst, by / bound)
    assert worst > 0.5, "the attack must move something"


@pytest.mark.parametrize("bound", [1e-7, 1.0, 1e5])
@pytest.mark.parametrize("form", FORMS)
def test_no_record_moves_the_sum_by_more_than_is_accounted(form: str, bound: float) -> None:
    nothing_moves_more_than_it_may(form, bound)


def underflow_hides_nothing(form: str) -> None:
    """A factor times an operand that is barely a float32: rounded up, it was twice what it is."""
    at, worst = hostile(), 0.0
    for down in range(-90, -55, 3):
        d = {name: torch.zeros_like(t) for name, t in at.data.items()}
        d["x"][0, 0], d["target"][0, 0] = 2.0**126, 2.0**down
        for exponent in range(-34, -10):
            bound = 2.0**exponent
            parts, _ = at.path.parts(at.env(d), bound, clipping=form, gamma=0.0)  # type: ignore[arg-type]
            worst = max(worst, float(at.flat(parts).norm()) / bound)
    assert worst <= 1 + batched.ETA + 2 * ROUNDING, worst


@pytest.mark.parametrize("form", ["flat", "per-layer"])
def test_underflow_hides_nothing(form: str) -> None:
    underflow_hides_nothing(form)


@pytest.mark.parametrize("bound", [1e-6, 0.01, 1.0, 3.0, 1e6])
@pytest.mark.parametrize("gamma", [1e-6, 0.01, 1.0, 1e6])
def test_automatic_factors_are_at_most_one_and_their_scale_is_exact(
    bound: float, gamma: float
) -> None:
    scale = batched.scale_of(bound, gamma)
    assert math.frexp(scale)[0] == 0.5 and scale >= 1.0
    assert bound / scale <= gamma or (scale == 1.0 and bound <= gamma)
    assert scale == 1.0 or bound / scale >= gamma / 2 * (1 - 1e-15)


def test_a_record_that_is_not_finite_at_one_tensor_counts_at_none() -> None:
    at = hostile()
    d = {name: t.clone() for name, t in at.data.items()}
    d["x"][0, 0, 7] = math.inf  # of the second matrix alone
    for form in FORMS:
        rows, chosen = at.rows_of(d), np.arange(16)
        how: Any = (form, FORMS[form])
        one = at.path.sums(rows, 1.0, STEP, at.rows, *how)(chosen[:1])
        assert not bool(one.any()), form
        assert bool(at.path.sums(rows, 1.0, STEP, at.rows, *how)(chosen[:2]).any())


# Seeded bugs: (form, how to plant it, what must fail).


def _share_is_the_whole(patch: Patch) -> None:
    patch.setattr(batched, "share", lambda bound, tensors: bound)


def _one_factor_for_all(patch: Patch) -> None:
    right = batched.per_layer

    def first(*given: Any) -> Any:
        c, good = right(*given)
        return c[:1].expand_as(c), good

    patch.setattr(batched, "per_layer", first)


def _factors_of_the_next_tensor(patch: Patch) -> None:
    right = batched.per_layer

    def turned(*given: Any) -> Any:
        c, good = right(*given)
        return c.roll(1, 0), good

    patch.setattr(batched, "per_layer", turned)


def _parts_are_judged_alone(patch: Patch) -> None:
    def alone(sites: Any, norms: Any, bound: float, units: int) -> Any:
        found = [batched.factors([s], [n], bound, units) for s, n in zip(sites, norms, strict=True)]
        good = torch.stack([g for _, g in found])
        return torch.stack([c for c, _ in found]), good.any(0)

    patch.setattr(batched, "per_layer", alone)


def sums_are_right_where_factors_are_large(form: str) -> None:
    sums_are_right(form, 40.0)


def _no_scale(patch: Patch) -> None:
    patch.setattr(batched, "scale_of", lambda bound, gamma: 1.0)


def _gamma_is_forgotten(patch: Patch) -> None:
    right = batched._factors
    patch.setattr(batched, "_factors", lambda *given: right(*given[:4], *(1e-9 for _ in given[4:])))


def _gamma_is_taken_off(patch: Patch) -> None:
    right = batched._factors
    patch.setattr(batched, "_factors", lambda *given: right(*given[:4], *(-g for g in given[4:])))


def _small_takes_every_form(patch: Patch) -> None:
    patch.setattr(batched.Batched, "weigh", lambda self, norms, bound, *form: batched.factors(
        self.sites, norms, bound, self.shape.units))  # fmt: skip


def _tiny_factors_stay(patch: Patch) -> None:
    patch.setattr(batched, "SMALLEST", 0.0)
    patch.setattr(small, "factors", lambda *a: None)  # native, with a constant of its own


def all_or_nothing(form: str) -> None:
    test_a_record_that_is_not_finite_at_one_tensor_counts_at_none()


BUGS: dict[str, tuple[str, Callable[[Patch], None], Callable[[str], None]]] = {
    "each tensor has the whole bound": (
        "per-layer", _share_is_the_whole, nothing_moves_more_than_it_may),
    "one factor for all": ("per-layer", _one_factor_for_all, nothing_moves_more_than_it_may),
    "factors of the next tensor": ("per-layer", _factors_of_the_next_tensor, sums_are_right),
    "parts that are finite stay": ("per-layer", _parts_are_judged_alone, all_or_nothing),
    "per-layer is flat": ("per-layer", _small_takes_every_form, sums_are_right),
    "automatic is flat": ("automatic", _small_takes_every_form, sums_are_right),
    "no scale": ("automatic", _no_scale, sums_are_right_where_factors_are_large),
    "gamma is forgotten": ("automatic", _gamma_is_forgotten, sums_are_right),
    "gamma is subtracted": ("automatic", _gamma_is_taken_off, nothing_moves_more_than_it_may),
    "tiny factors stay": ("flat", _tiny_factors_stay, underflow_hides_nothing),
}  # fmt: skip


@pytest.mark.parametrize("bug", BUGS)
def test_seeded_bugs_are_caught(bug: str, monkeypatch: Patch) -> None:
    form, plant, check = BUGS[bug]
    plant(monkeypatch)
    with pytest.raises((AssertionError, RuntimeError)):
        check(form)


def test_the_native_step_takes_the_flat_form_alone(monkeypatch: Patch) -> None:
    """At sites of one token a record the whole step is native, which knows no other form."""
    made: list[int] = []
    right = small.build

    def build(*given: Any) -> Any:
        made.append(1)
        return right(*given)

    monkeypatch.setattr(small, "build", build)
    torch.manual_seed(0)
    at = lab(nn.Linear(4, 2), lambda n: {"input": torch.randn(n, 4), "target": torch.arange(n) % 2})
    for form in ("flat", "per-layer", "automatic"):
        at.path.sums(at.rows_of(), 1.0, STEP, 16, form, FORMS[form])(np.arange(9))
    assert len(made) == 1
