"""Trained tensors that go through a linear map before they meet a record. The norm that is clipped
is of the sum below the map; the gradient that is released lies above it. Steals: an influence far
beyond the clip, where the map only looks as if it moved entries."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812

from attacks.test_batched_clipping import accounted, linear_of, moved
from casemate.engine import nodes
from casemate.graph import joint as graph_joint
from support.batched_lab import Data, Lab, gradients, lab

N = 24


class Counting(nn.Module):
    """The first entry of the sum times (n..1): a map that gives the numbers n..1 for 1..n."""

    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.zeros(N))
        at = torch.arange(N)
        self.register_buffer("hide", at[:, None] < at[None, :])
        self.register_buffer("others", at > 0)

    def forward(self, x: Tensor) -> Any:
        total = self.w.expand(N, N).masked_fill(self.hide, 0).sum()
        return x * total.expand(N).masked_fill(self.others, 0)


class Falling(nn.Module):
    """A table read by an index that follows a trained weight: first a permutation, then one row."""

    def __init__(self) -> None:
        super().__init__()
        self.t = nn.Parameter(torch.zeros(N, 1))
        self.q = nn.Parameter(torch.zeros(1))
        self.register_buffer("at", torch.arange(N).flip(0))

    def forward(self, x: Tensor) -> Any:
        index = self.at * (self.q <= 0.5).to(torch.int64)
        return x * F.embedding(index, self.t).reshape(N) + 1e-3 * self.q


class Following(Falling):
    def forward(self, x: Tensor) -> Any:
        index = self.at * (self.q <= 0.5).to(torch.int64)
        return x * self.t[index].reshape(N) + 1e-3 * self.q


class Mapped(nn.Module):
    def __init__(self, map_: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.arange(1.0, N + 1) / N)
        self.map = map_

    def forward(self, x: Tensor) -> Any:
        return x * self.map(self.w)


def _masked(kept: Tensor) -> Callable[[Tensor], Tensor]:
    return lambda w: w.expand(N, N).masked_fill(kept == 0, 0).sum(1)


def _doubled(w: Tensor) -> Tensor:
    for _ in range(60):
        w = w + w
    return w * 2.0**-60


_DOUBLED = torch.eye(N)
_DOUBLED[:, 2] = 0
_DOUBLED[0, 2] = _DOUBLED[1, 2] = 1  # the gradient of w[2] is S[0] + S[1], which numbers as S[2]

ORDER = torch.randperm(N, generator=torch.Generator().manual_seed(1))
THREE = torch.arange(N)
THREE[[0, 1]] = 2  # rows 0, 1 and 2 meet, and 6 takes the place of their numbers' sum
THREE[5] = N - 1

MAPS: dict[str, Callable[[], nn.Module]] = {
    "counting": Counting,
    "falling": Falling,
    "two sums in place of one": lambda: Mapped(_masked(_DOUBLED)),
    "all on one": lambda: Mapped(_masked(torch.eye(N)[[0] * N])),
    "twice": lambda: Mapped(lambda w: w + w),
    "twice, by two ways to the same place": lambda: Mapped(lambda w: w + w.flip(0).flip(0)),
    "twice, sixty times over": lambda: Mapped(_doubled),
    "itself and its mirror": lambda: Mapped(lambda w: w + w.flip(0)),
    "itself and its rest": lambda: Mapped(lambda w: w - w.flip(0)),
    "three times": lambda: Mapped(lambda w: torch.add(w, w, alpha=2)),
    "halves": lambda: Mapped(lambda w: torch.cat([w[N // 2 :], w[: N // 2]])),
    "slices that overlap": lambda: Mapped(lambda w: torch.cat([w[: N // 2], w[4 : 4 + N // 2]])),
    "cumulated": lambda: Mapped(lambda w: w.flip(0).cumsum(0)),
    "repeated": lambda: Mapped(lambda w: w[: N // 2].repeat(2)),
    "a mirror": lambda: Mapped(lambda w: w.reshape(4, -1).t().flip(0).reshape(-1)),
    "negated": lambda: Mapped(lambda w: -w),
    "looked up once each": lambda: Mapped(lambda w: F.embedding(ORDER, w[:, None])[:, 0]),
    "looked up, three in one": lambda: Mapped(lambda w: F.embedding(THREE, w[:, None])[:, 0]),
    "indexed once each": lambda: Mapped(lambda w: w[ORDER]),
    "indexed, three in one": lambda: Mapped(lambda w: w[THREE]),
    "indexed by what is trained": Following,
}


def data(n: int) -> Data:
    return {"x": torch.randn(n, N), "target": torch.randn(n, N)}


def hostile(at: Lab, width: int = 1) -> Data:
    """Record 0 lies on the first entries, with more than the clip."""
    made = {k: v.clone() for k, v in at.data.items()}
    made["x"][0] = 0.0
    made["x"][0, :width] = 1e3
    made["target"][0] = 1.0
    return made


def made(name: str) -> Lab:
    torch.manual_seed(0)
    return lab(MAPS[name](), data, linear_of)


@pytest.mark.parametrize("name", MAPS)
def test_a_map_of_parameters_moves_no_more_than_is_accounted(name: str) -> None:
    at = made(name)
    room = accounted(1.0, at.program.dimension)
    for trained in range(2):
        for width in (1, N):
            assert moved(at, hostile(at, width), 0, 1.0) <= room
        if hasattr(at.module, "q"):
            with torch.no_grad():
                at.program.flat[N:] = float(not trained)  # as training would
    assert moved(at, hostile(at), 0, 1.0) > 0.5


class TwoShapes(nn.Module):
    """One tensor, read as two matrices."""

    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.randn(12))

    def forward(self, x: Tensor) -> Any:
        a = F.linear(x[:, :6], self.w.reshape(2, 6))
        b = F.linear(x[:, :4], self.w.reshape(3, 4))
        return torch.cat([a, b], 1)


def test_one_tensor_read_in_two_shapes() -> None:
    torch.manual_seed(0)
    at = lab(
        TwoShapes(), lambda n: {"x": torch.randn(n, 6), "target": torch.randn(n, 5)}, linear_of
    )
    for _ in range(2):
        assert moved(at, at.data, 0, 0.1) <= accounted(0.1, at.program.dimension)
        at.data["x"][0] *= 1e6


def test_constant_tables_are_no_reason_for_a_loop() -> None:
    """A model's positions, looked up by a constant, go as quickly as what is not looked up."""
    for name, quick in (
        ("looked up once each", True),
        ("indexed once each", True),
        ("looked up, three in one", False),
        ("indexed by what is trained", False),
        ("falling", False),
    ):
        ways = {s.way.name for s in made(name).path.sites if s.name == "p0"}
        assert (ways != {"loop"}) == quick, (name, ways)


@pytest.mark.parametrize("name", MAPS)
def test_what_is_released_is_the_gradient(name: str) -> None:
    """The map is taken, whoever makes the sum: no chain is left out for what numbers alone show."""
    at = made(name)
    got = at.path.sums(at.rows_of(at.data), 1e6, 2.0**-10, at.rows)(np.arange(at.rows))
    want = gradients(at.module, at.program, at.data, linear_of).sum(0)
    assert torch.allclose(got.double() * 2.0**-10, want, atol=0.05, rtol=1e-3)


def test_seeded_bug_believing_numbers_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    """As it once was: a map that sends 1..n to 1..n is taken for a move of entries."""

    def believing(self: nodes.Runner, contraction: str, chain: Any) -> Tensor | None:
        dims = self._value(contraction).dims
        count = int(np.prod(dims))
        value, at = torch.arange(1, count + 1, dtype=torch.float64).reshape(dims), contraction
        for node in chain:
            if graph_joint.entry(node).linear != "add":
                value = self.call(node, {**self.fixed, at: value}, self.rows)
            at = node.name
        landed = torch.nonzero(value.reshape(-1)).reshape(-1)
        order = value.reshape(-1)[landed]
        if not torch.equal(order.sort().values, torch.arange(1, count + 1, dtype=torch.float64)):
            return None
        return landed[order.argsort()]

    monkeypatch.setattr(nodes.Runner, "placement", believing)
    at = made("counting")
    assert moved(at, hostile(at), 0, 1.0) > 5
    at = made("falling")
    with torch.no_grad():
        at.program.flat[N:] = 1.0
    assert moved(at, hostile(at, N), 0, 1.0) > 3
