# ruff: noqa: E501 - one case a line
"""Seeded bugs in the rule table and in the batched path: each is caught by a check that holds without.

The checks are small ones of the tests beside: gradients against float64, every slot alike, what a
record moves, dummies and records that are not finite.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from casemate.engine import batched, forms, kernels, nodes, products, sites, small
from casemate.graph.ops import JOINT, Batch
from casemate.spec.errors import ModelError
from support.batched_lab import Data, clipped, gradients, lab, relative

Patch = pytest.MonkeyPatch


def score(outputs: Tensor, target: Tensor) -> Tensor:
    return outputs.flatten(1).square().sum(1) + outputs.flatten(1)[:, 0] * target


class Net(nn.Module):
    """Shared matrix, slices of one, a table, a norm, a scalar, time first."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(5, 6, padding_idx=0)
        self.shared, self.norm = nn.Linear(6, 6), nn.LayerNorm(6)
        self.halves, self.scale = (
            nn.Parameter(torch.randn(8, 6) * 0.3),
            nn.Parameter(torch.tensor(0.7)),
        )
        self.conv = nn.Conv1d(6, 4, 2, stride=2)

    def forward(self, i: Tensor) -> Tensor:
        x = self.table(i)
        x = self.norm(x + self.shared(self.shared(x).tanh())) * self.scale
        y = torch.cat([x @ self.halves[:5].t(), x @ self.halves[4:].t()], -1)
        y = y.transpose(0, 1).reshape(-1, 9).tanh().view(4, -1, 9).transpose(0, 1)
        return torch.cat([y.flatten(1), self.conv(x.transpose(1, 2)).flatten(1)], 1)


def inputs(n: int) -> Data:
    made = torch.Generator().manual_seed(5)
    i = torch.randint(5, (n, 4), generator=made)
    return {"i": i, "target": torch.randn(n, generator=made)}


class Plain(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.randn(9, 9) * 0.3)

    def forward(self, x: Tensor) -> Tensor:
        return (x @ self.w).square()


def rows(n: int) -> Data:
    made = torch.Generator().manual_seed(6)
    return {"x": torch.randn(n, 9, generator=made), "target": torch.randn(n, generator=made)}


def gradients_are_right() -> None:
    torch.manual_seed(0)
    at = lab(Net(), inputs, score)
    each = gradients(at.module, at.program, at.data, score)
    for bound in (float(each.norm(dim=1).median()), 1e-3):
        assert relative(at.parts(bound)[0], clipped(each, bound)[0]) < 1e-5
    for site in at.path.sites:
        site.way = site.ways[-1]
    assert relative(at.parts(bound)[0], clipped(each, bound)[0]) < 1e-5


def gradients_of_a_matrix_are_right() -> None:
    torch.manual_seed(0)
    at = lab(Plain(), rows, score)
    each = gradients(at.module, at.program, at.data, score)
    assert relative(at.parts(0.3)[0], clipped(each, 0.3)[0]) < 1e-5


def mixing_is_refused() -> None:
    class Mixed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.w = nn.Parameter(torch.randn(9, 9))

        def forward(self, x: Tensor) -> Tensor:
            y = x @ self.w
            return y.reshape(3, -1).t().reshape(-1, 9)

    with pytest.raises(ModelError):
        lab(Mixed(), rows, score)


def slots_are_alike() -> None:
    class Narrow(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.w = nn.Parameter(torch.ones(3))

        def forward(self, x: Tensor) -> Tensor:
            return nn.functional.silu(x[:, :3] * self.w)

    at = lab(Narrow(), rows, score, rows=48)
    for i in range(12):
        data = {k: v[i : i + 1].repeat(48, *(1,) * (v.dim() - 1)) for k, v in at.data.items()}
        assert len(set(at.contributions(1.0, data))) == 1


def folds_are_right() -> None:
    """One matrix over tokens that lie before the batch."""

    class First(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.w = nn.Parameter(torch.randn(3, 3) * 0.5)

        def forward(self, x: Tensor) -> Tensor:
            y = x.view(-1, 3, 3).transpose(0, 1).reshape(-1, 3)
            return (y @ self.w).view(3, -1, 3).transpose(0, 1)

    torch.manual_seed(0)
    at = lab(First(), rows, score)
    each = gradients(at.module, at.program, at.data, score)
    bound = float(each.norm(dim=1).median())
    assert relative(at.parts(bound)[0], clipped(each, bound)[0]) < 1e-5


def dummies_count_nothing() -> None:
    torch.manual_seed(0)
    at = lab(nn.Linear(9, 2), lambda n: {"input": rows(n)["x"], "target": rows(n)["target"]}, score)
    each = gradients(at.module, at.program, at.data, score)
    sums = at.path.sums(at.rows_of(), 0.5, 0.0, 32)
    for chosen in ([], [3], [0, 7, 9]):
        want = clipped(each[chosen], 0.5)[0] if chosen else torch.zeros(each.shape[1])
        assert float((sums(np.array(chosen, dtype=np.int64)) - want).abs().max()) < 1e-5


def infinite_records_count_nothing() -> None:
    at = lab(Plain(), rows, score)
    data = {k: v.clone() for k, v in at.data.items()}
    data["x"][3] = math.inf
    data["x"][5] = math.nan
    each = gradients(at.module, at.program, at.data, score)
    each[[3, 5]] = 0.0
    assert relative(at.parts(0.3, data)[0], clipped(each, 0.3)[0]) < 1e-5


def nothing_moves_more_than_it_may() -> None:
    """Cancelling tokens, by Gram matrices in float32."""

    class Tokens(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.w = nn.Parameter(torch.zeros(3, 5))

        def forward(self, x: Tensor) -> Tensor:
            return x @ self.w.t()

    def data(n: int) -> Data:
        # Each record's rounding errs to either side.
        x, g = torch.randn(n, 6, 5), torch.randn(n, 6, 3)
        x[:, 1::2], g[:, 1::2] = x[:, ::2], -g[:, ::2]
        g *= 1e6
        g[:, 0] += 1
        return {"x": x, "target": g}

    torch.manual_seed(0)
    at = lab(Tokens(), data, lambda o, t: (o * t).flatten(1).sum(1))
    for way in ("gram", "gram64"):
        for site in at.path.sites:
            site.way = next((w for w in site.ways if w.name == way), site.ways[0])
        env = at.env()
        _, c = at.path.parts(dict(env), 1.0)
        exact = torch.einsum("bti,btj->bij", at.data["target"].double(), at.data["x"].double())
        assert bool((c.double() * exact.flatten(1).norm(dim=1) <= 1 + batched.ETA).all())


# --- the bugs


def _mm_is_a_record(patch: Patch) -> None:
    """A product over the batch claimed to be one value a record."""
    op = JOINT["aten.mm.default"]

    def claim(call: Any) -> Any:
        made = op.contract(call) if op.contract is not None else None
        if made is None:
            return None
        v = made[0] if isinstance(made, tuple) else made
        return dataclasses.replace(v, summed=False, batch=Batch(0))

    patch.setitem(JOINT, "aten.mm.default", dataclasses.replace(op, contract=claim))


def _transposes_are_free(patch: Patch) -> None:
    """A rule that keeps the batch where it was although the axes are turned."""
    op = JOINT["aten.t.default"]

    def rule(call: Any) -> Any:
        v = call.value("self")
        return v.view(tuple(reversed(v.dims)), v.batch)

    patch.setitem(JOINT, "aten.t.default", dataclasses.replace(op, rule=rule))


def _factors(change: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]) -> Callable[[Patch], None]:
    def seed(patch: Patch) -> None:
        real = batched.factors
        patch.setattr(batched, "factors", lambda *a: change(*real(*a)))
        patch.setattr(small, "build", lambda *a: None)

    return seed


def _wrong_operand(patch: Patch) -> None:
    """Factors of other records."""
    real = kernels.contract
    patch.setattr(kernels, "contract", lambda g, x, c, *more: real(g, x, c.flip(0), *more))


def _no_cross_term(patch: Patch) -> None:
    """A shared parameter's norm without the products of one use with the other."""

    def apart(pairs: Any) -> Any:
        real = _joined(pairs)

        def both(env: Any) -> Any:
            g, x = real(env)
            return (g.abs(), x.abs()) if len(pairs) > 1 else (g, x)

        return both

    _joined = sites._joined
    patch.setattr(sites, "_joined", apart)


def _wrong_fold(patch: Patch) -> None:
    real = nodes.to_rows

    def flat(t: Tensor, v: Any, n: int) -> Tensor:
        return real(t, dataclasses.replace(v, batch=Batch(v.batch.axis)), n) if v.batch.outer > 1 else real(t, v, n)  # fmt: skip

    real_tokens = sites.tokens

    def tokens(t: Tensor, v: Any, shape: Any, last: int) -> Tensor:
        inner = v.batch.outer * v.batch.inner
        return real_tokens(t, dataclasses.replace(v, batch=Batch(v.batch.axis, 1, inner)), shape, last)  # fmt: skip

    patch.setattr(sites, "to_rows", flat)
    patch.setattr(sites, "tokens", tokens)


def _never_fails(patch: Patch) -> None:
    patch.setattr(batched, "prober", lambda *a: lambda *b: None)
    patch.setattr(products, "chooser", lambda *a: lambda *b: None)


def _no_overlap(patch: Patch) -> None:
    """Slices of a parameter taken as apart although they share entries."""
    patch.setattr(
        sites.Planner, "_apart",
        lambda self, name, terms, places: forms.apart_site(
            name, [_chosen(self, self._known(name, [(c, ())])) for c, _ in terms]
        ),
    )  # fmt: skip


def _chosen(planner: Any, site: Any) -> Any:
    planner.choose(site)
    return site


def _seed_of_ones(patch: Patch) -> None:
    real = batched.Batched._evaluate
    patch.setattr(
        batched.Batched, "_evaluate", lambda self, seed: real(self, torch.ones_like(seed))
    )


def _no_gamma(patch: Patch) -> None:
    real = batched.factors

    def careless(found: Any, norms: Any, bound: float, units: int) -> Any:
        bare = [dataclasses.replace(s, ways=s.ways) for s in found]
        for site, old in zip(bare, found, strict=True):
            site.way = dataclasses.replace(old.way, gamma=0.0, error=1e-30, scaled=False)
        n2 = [forms.Norm(n.squared.clamp(min=1e-30), n.spread) for n in norms]
        return real(bare, n2, bound, units)

    patch.setattr(batched, "factors", careless)


BUGS: Mapping[str, tuple[Callable[[Patch], None], Callable[[], None]]] = {
    "a contraction is claimed to be one value a record": (_mm_is_a_record, gradients_of_a_matrix_are_right),
    "a transpose leaves the batch where it was": (_transposes_are_free, gradients_of_a_matrix_are_right),
    "factors are not applied": (_factors(lambda c, good: (torch.ones_like(c), good)), gradients_are_right),
    "factors are rounded in bfloat16": (_factors(lambda c, good: (c.bfloat16().float(), good)), gradients_are_right),
    "factors go to other records": (_wrong_operand, gradients_of_a_matrix_are_right),
    "a shared parameter has no cross term": (_no_cross_term, gradients_are_right),
    "the batch is unfolded the wrong way": (_wrong_fold, folds_are_right),
    "the probe never fails": (_never_fails, slots_are_alike),
    "slices that overlap are apart": (_no_overlap, gradients_are_right),
    "dummies have a seed of one": (_seed_of_ones, dummies_count_nothing),
    "nothing is blanked, all counts": (
        _factors(lambda c, good: (c, torch.ones_like(good))), infinite_records_count_nothing),
    "norms by cancellation are trusted": (_no_gamma, nothing_moves_more_than_it_may),
}  # fmt: skip


@pytest.mark.parametrize("check", sorted({c for _, c in BUGS.values()}, key=str))
def test_the_checks_hold(check: Callable[[], None]) -> None:
    check()


def test_mixing_is_refused() -> None:
    mixing_is_refused()


@pytest.mark.parametrize("name", sorted(BUGS))
def test_seeded_bugs_are_caught(name: str, monkeypatch: Patch) -> None:
    seed, check = BUGS[name]
    seed(monkeypatch)
    with pytest.raises((AssertionError, ModelError, RuntimeError, ValueError)):
        check()
