"""Clipped sums against a float64 loop in all ways that the planner may take, to 1e-5.

The layers are the benchmark's, of fewer channels and tokens, at sizes where Gram matrices in
float32 are among the ways.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from casemate.engine import ways
from support.batched_lab import Data, Lab, clipped, gradients, lab, relative


class Encoder(nn.Module):
    """MiniLM's kind: attention and a wide layer over 64 tokens, the mean of them, a head."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(50, 192)
        self.body = nn.TransformerEncoderLayer(192, 4, 384, dropout=0.0, batch_first=True)
        self.head = nn.Linear(192, 3)

    def forward(self, words: Tensor) -> Tensor:
        out: Tensor = self.head(self.body(self.table(words)).mean(1))
        return out


def words(n: int) -> Data:
    return {"words": torch.randint(50, (n, 64)), "target": torch.randint(3, (n,))}


def residual() -> nn.Module:
    """ResNet-18's later stages: 3x3 at 8x8 and 4x4, a stride, group norms."""

    def block(i: int, o: int, stride: int) -> list[nn.Module]:
        return [nn.Conv2d(i, o, 3, stride, 1, bias=False), nn.GroupNorm(8, o), nn.ReLU()]

    return nn.Sequential(
        *block(16, 64, 1), *block(64, 64, 1), *block(64, 96, 2), *block(96, 96, 1),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(96, 5),
    )  # fmt: skip


def images(n: int) -> Data:
    return {"input": torch.randn(n, 16, 8, 8), "target": torch.randint(5, (n,))}


def off(at: Lab, each: Tensor) -> float:
    """The sum's error where every unit is clipped."""
    bound = 0.1 * float(each.norm(dim=1).min())
    got, _ = at.parts(bound)
    return relative(got, clipped(each, bound)[0])


def built(make: Callable[[], nn.Module], data: Callable[[int], Data]) -> tuple[Lab, Tensor]:
    torch.manual_seed(0)
    at = lab(make(), data, rows=16, settle=False)
    return at, gradients(at.module, at.program, at.data, "cross_entropy")


def quickest(name: str) -> Callable[..., dict[str, float]]:
    """Times by way, least for the one named."""
    return lambda site, some, *rest: {w.name: float(w.name != name) for w in some}


CASES = pytest.mark.parametrize(("make", "data"), [(Encoder, words), (residual, images)])


@CASES
def test_sums_of_all_ways_admitted(
    make: Callable[[], nn.Module], data: Callable[[int], Data], monkeypatch: pytest.MonkeyPatch
) -> None:
    at, each = built(make, data)
    env, seen = at.env(), set()
    for wanted in ("gram", "gram64", "direct", "formed"):
        # As if that way were the quickest wherever it is one.
        monkeypatch.setattr(ways, "_seconds", quickest(wanted))
        at.path.choose(env, 1 << 30)
        seen |= {s.way.name for s in at.path.sites}
        lost = ways.losses(at.path.sites, env, False)[0]
        assert float(torch.stack(lost).sum(0).max()) <= ways.LOSS
        assert off(at, each) <= 1e-5, wanted
    assert {"gram", "gram64", "formed"} <= seen


def test_a_rule_that_is_left_out_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    """Gram matrices in float32 wherever they are quick."""
    monkeypatch.setattr(ways, "_accurate", lambda *rest: None)
    monkeypatch.setattr(ways, "_seconds", quickest("gram"))
    at, each = built(residual, images)
    at.path.choose(at.env(), 1 << 30)
    assert off(at, each) > 1e-5
