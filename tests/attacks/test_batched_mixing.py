# ruff: noqa: E501 - one case a line
"""Models that mix records in their backward pass, or whose batch lies where it may be mistaken: on
the path ``graph`` refused by the node's name, or right. Never wrong."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812

from casemate.engine.tape import Unfit
from casemate.spec.errors import ModelError
from support.batched_lab import Data, clipped, gradients, lab, relative

B = 16  # the microbatch, and a size of the models too


def score(outputs: Tensor, target: Tensor) -> Tensor:
    return outputs.flatten(1).square().sum(1) + outputs.flatten(1)[:, 0] * target


class Model(nn.Module):
    def __init__(self, how: Callable[..., Tensor], f: int = B, out: int = B) -> None:
        super().__init__()
        self.how, self.w = how, nn.Parameter(torch.randn(out, f) * 0.2)
        self.p = nn.Parameter(torch.randn(out) * 0.2)

    def forward(self, x: Tensor) -> Tensor:
        return self.how(self, x)


MIX: dict[str, Callable[..., Tensor]] = {
    "batch mean": lambda m, x: x @ m.w - (x @ m.w).mean(0),
    "batch softmax": lambda m, x: (x @ m.w).softmax(0),
    "batch sort": lambda m, x: (x @ m.w).sort(0).values,
    "batch cumsum": lambda m, x: (x @ m.w).cumsum(0),
    "neighbour": lambda m, x: (x @ m.w).roll(1, 0),
    "flip": lambda m, x: (x @ m.w).flip(0) + x,
    "gram": lambda m, x: (x @ m.w) @ x.t() @ x,
    "batch norm": lambda m, x: F.batch_norm(x @ m.w, None, None, training=True),
    "regrouped": lambda m, x: (x @ m.w).reshape(2, -1, B).sum(0).repeat(2, 1),
    "attention over the batch": lambda m, x: F.scaled_dot_product_attention(
        (x @ m.w)[None], x[None], x[None]
    )[0],
    "folded and softmaxed": lambda m, x: (x @ m.w).reshape(1, -1).softmax(1).view(-1, B),
    "folded the wrong way": lambda m, x: (x @ m.w).reshape(B, -1).t(),
    "norm of the batch": lambda m, x: (x @ m.w) / (x @ m.w).norm(),
    "max of the batch": lambda m, x: (x @ m.w) - (x @ m.w).max(),
    "first record": lambda m, x: (x @ m.w) + x[:1],
    "transposed": lambda m, x: (x @ m.w).t() @ x if x.shape[0] == B else x @ m.w,
}


def rows(n: int) -> Data:
    return {"x": torch.randn(n, B), "target": torch.randn(n)}


def right(module: nn.Module, data: Callable[[int], Data], loss: object = score) -> None:
    at = lab(module, data, loss, rows=B)
    each = gradients(module, at.program, at.data, loss)
    bound = float(each.norm(dim=1).median())
    for way in range(max(len(s.ways) for s in at.path.sites)):
        for site in at.path.sites:
            site.way = site.ways[min(way, len(site.ways) - 1)]
        assert relative(at.parts(bound)[0], clipped(each, bound)[0]) < 1e-5


@pytest.mark.parametrize("name", MIX)
def test_what_mixes_is_refused_by_name_or_is_no_mixing(name: str) -> None:
    torch.manual_seed(0)
    module = Model(MIX[name])
    try:
        right(module, rows)
    except (ModelError, Unfit) as refused:
        if isinstance(refused, ModelError):
            assert refused.code.startswith("model.") and (refused.where or "'" in str(refused))
    else:
        pytest.fail("was admitted")


class Backwards(torch.autograd.Function):
    """Forward of each record by itself; the gradient that flows back is the batch's mean."""

    @staticmethod
    def forward(ctx: object, x: Tensor) -> Tensor:
        return x * 1.0

    @staticmethod
    def backward(ctx: object, *grads: Tensor) -> Tensor:
        (g,) = grads
        return g.mean(0, keepdim=True).expand_as(g).contiguous()


def test_mixing_in_the_backward_alone_has_no_effect_or_is_refused() -> None:
    """The exporter keeps the forward's operations: the gradient is theirs, and right."""
    torch.manual_seed(0)
    plain = Model(lambda m, x: (x @ m.w) * 1.0)
    apply: Any = Backwards.apply
    hostile = Model(lambda m, x: apply(x @ m.w))
    hostile.load_state_dict(plain.state_dict())
    try:
        at = lab(hostile, rows, score, rows=B)
    except (ModelError, Unfit):
        return
    each = gradients(plain, at.program, at.data, score)
    assert relative(at.parts(1.0)[0], clipped(each, 1.0)[0]) < 1e-5


FOLDS: dict[str, Callable[..., Tensor]] = {
    "square": lambda m, x: x @ m.w,
    "square twice": lambda m, x: (x @ m.w).tanh() @ m.w.t(),
    "time first": lambda m, x: (x.view(-1, 4, 4).transpose(0, 1) @ m.w[:4, :4]).transpose(0, 1),
    "time first folded": lambda m, x: (
        (x.view(-1, 4, 4).permute(1, 0, 2).reshape(-1, 4) @ m.w[:4, :4])
        .view(4, -1, 4)
        .permute(1, 0, 2)
    ),
    "features first": lambda m, x: (m.w @ x.t()).t(),
    "features first twice": lambda m, x: (m.w @ (m.w @ x.t()).tanh()).t(),
    "inner fold": lambda m, x: (x.reshape(-1, 4) @ m.w[:4, :4]).tanh().view(-1, B),
    "both folds": lambda m, x: (
        (x.view(-1, 2, 2, 4).permute(1, 0, 2, 3).reshape(-1, 4) @ m.w[:4, :4])
        .view(2, -1, 2, 4)
        .permute(1, 0, 2, 3)
    ),
    "flattened": lambda m, x: (x.reshape(-1, 1) * m.p).tanh().view(-1, B, B).sum(2),
    "expanded": lambda m, x: (x.unsqueeze(1).expand(-1, B, B) * m.w).sum(2),
    "parameter as one row": lambda m, x: x * m.p[None].expand(x.shape[0], -1),
    "parameter repeated": lambda m, x: x * m.p.repeat(x.shape[0], 1),
    "bias by position": lambda m, x: torch.addmm(m.p, x, m.w),
    "outer of records": lambda m, x: torch.bmm(x.unsqueeze(2), x.unsqueeze(1)) * m.w,
    "slices of the parameter": lambda m, x: torch.cat(
        [x @ m.w[:5].t(), x @ m.w[3:9].t(), x @ m.w[9:].t()], 1
    ),
    "overlapping twice": lambda m, x: x @ m.w[:8].t() + x @ m.w[4:12].t() * 0.5,
    "both sides": lambda m, x: (x @ m.w) * (x @ m.w.t()),
    "matrix and entries": lambda m, x: x @ m.w + (x.unsqueeze(1) * m.w).sum(2),
    "embedding and matrix": lambda m, x: F.embedding(x.argmax(1), m.w) @ m.w,
    "product of parameters": lambda m, x: x * m.w.diagonal() + x * m.p * m.p,
}


def few_rows(n: int) -> Data:
    return {"x": torch.randn(n, B), "target": torch.randn(n)}


# These are not refused.
RIGHT = ("square", "time first", "features first", "inner fold", "both folds", "overlapping twice", "both sides")  # fmt: skip


@pytest.mark.parametrize("name", FOLDS)
def test_batches_that_look_like_other_axes(name: str) -> None:
    """The microbatch is as long as the features, the tokens or the classes."""
    torch.manual_seed(1)
    try:
        right(Model(FOLDS[name]), few_rows)
    except (ModelError, Unfit) as refused:
        assert name not in RIGHT
        assert isinstance(refused, Unfit) or refused.code.startswith("model.")


@pytest.mark.parametrize("t", [2, *(pytest.param(t, marks=pytest.mark.full) for t in (3, 16))])
def test_as_many_tokens_as_records(t: int) -> None:
    """Two and three are the sizes at which the gradient is noted."""

    class Recurrent(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.rnn, self.head = nn.GRU(t, t), nn.Linear(t, t)

        def forward(self, x: Tensor) -> Any:
            return self.head(self.rnn(x.transpose(0, 1))[0].transpose(0, 1))

    torch.manual_seed(t)
    right(Recurrent(), lambda n: {"x": torch.randn(n, t, t), "target": torch.randn(n)})


DATA_DEPENDENT: dict[str, Callable[..., Tensor]] = {
    "branch": lambda m, x: x @ m.w if bool(x.sum() > 0) else x @ m.w * 2,
    "item": lambda m, x: x @ m.w * float(x.abs().max()),
    "nonzero": lambda m, x: (x @ m.w)[x.sum(1).nonzero().squeeze(1)],
    "masked": lambda m, x: (x @ m.w)[x > 0].view(1, -1),
    "size": lambda m, x: (x @ m.w) / x.shape[0],
    "noise": lambda m, x: x @ m.w + torch.randn_like(x),
    "one draw for all": lambda m, x: x @ m.w * F.dropout(m.w[0], 0.5, training=True),
}


@pytest.mark.parametrize("name", DATA_DEPENDENT)
def test_what_depends_on_values_or_on_the_batch_is_refused(name: str) -> None:
    with pytest.raises((ModelError, Unfit)):
        lab(Model(DATA_DEPENDENT[name]), few_rows, score, rows=B)
