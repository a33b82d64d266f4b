# ruff: noqa: E501 - one model a line
"""The path ``graph`` on kinds of models that the random ones lack, against autograd in float64."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812

from support.batched_lab import Data, clipped, gradients, lab, relative
from support.random_graphs import Layer, _p


class Two(Layer):
    def forward(self, x: Tensor, y: Tensor) -> Tensor:  # type: ignore[override]
        made: Tensor = self.how(self, x, y)  # type: ignore[call-arg]
        return made


def numbers(*shape: int) -> Callable[[int], Tensor]:
    return lambda n: torch.randn(n, *shape)


def counts(high: int, *shape: int) -> Callable[[int], Tensor]:
    return lambda n: torch.randint(high, (n, *shape))


def routed(m: Any, x: Tensor) -> Any:
    """Each record's one expert, by its weights."""
    return torch.einsum("bi,bio->bo", x, m.w[m.gate(x).argmax(-1)])


def mixed(m: Any, x: Tensor) -> Any:
    """Each record's best two experts of four."""
    best, which = m.gate(x).topk(2, -1)
    share = torch.zeros_like(m.gate(x)).scatter(1, which, best.softmax(-1))
    return (share.unsqueeze(-1) * torch.stack([e(x) for e in m.experts], 1)).sum(1)


def passed_on(m: Any, x: Tensor, edges: Tensor) -> Any:
    """A graph of five nodes, its edges by index."""
    start, end = (e.clamp(0, 4).unsqueeze(-1).expand(-1, -1, 4) for e in edges.unbind(-1))
    return m.head(torch.zeros_like(x).scatter_add(1, end, m.f(x.gather(1, start))).relu().sum(1))


def chained(m: Any, x: Tensor) -> Any:
    """The scores of a chain of tags (a CRF), and their sum over all chains."""
    scores = m.f(x)
    total = scores[:, 0]
    for t in range(1, 4):
        total = (total.unsqueeze(2) + m.moves).logsumexp(1) + scores[:, t]
    return total.logsumexp(1, keepdim=True) - scores[:, :, 0].sum(1, keepdim=True) + scores[:, 0]


def shifted_windows(m: Any, x: Tensor) -> Any:
    y = x.permute(0, 2, 3, 1).roll((-1, -1), (1, 2)).view(-1, 2, 2, 2, 2, 4)
    y = y.permute(0, 1, 3, 2, 4, 5).reshape(-1, 4, 4)
    q, k, v = m.f(y).chunk(3, -1)
    at = torch.arange(4)
    far = ((at // 2)[:, None] - (at // 2)[None] + 1) * 3 + (at % 2)[:, None] - (at % 2)[None] + 1
    y = ((q @ k.mT) + m.bias[far]).softmax(-1) @ v
    return m.head(y.view(-1, 2, 2, 2, 2, 4).mean((1, 2, 3, 4)))


def biased(m: Any, x: Tensor) -> Any:
    """Attention with a bias by distance (ALiBi)."""
    q, k, v = m.f(x).view(-1, 5, 3, 2, 2).permute(2, 0, 3, 1, 4).unbind(0)
    far = torch.arange(5, dtype=x.dtype)
    far = -(far[:, None] - far).abs() * torch.tensor([0.5, 0.25], dtype=x.dtype).view(2, 1, 1)
    y = F.scaled_dot_product_attention(q, k, v, attn_mask=far)
    return m.head(y.transpose(1, 2).flatten(2).mean(1))


def crossed(m: Any, x: Tensor, y: Tensor) -> Any:
    return m.head(m.f(x, m.wide(y)).mean(1))


def filled(m: Any, x: Tensor) -> Any:
    """Constants made like a value of records."""
    y = m.f(x)
    return m.head(y * y.new_full((6,), 0.3) + y.new_ones(6) * m.w - y.new_zeros(6))


CASES: dict[str, tuple[Callable[[], nn.Module], dict[str, Callable[[int], Tensor]]]] = {
    "looked up": (lambda: Layer(lambda m, x: m.w[x].sum(1) + m.v[x[:, 0], x[:, 1]], w=_p(9, 3), v=_p(9, 9, 3)), {"x": counts(9, 5)}),
    "looked up by place": (lambda: Layer(lambda m, x: m.w[torch.arange(5), x].sum(1), w=_p(5, 9, 3)), {"x": counts(9, 5)}),
    "selected": (lambda: Layer(lambda m, x: m.w.index_select(0, x.reshape(-1)).view(-1, 5, 3).mean(1), w=_p(9, 3)), {"x": counts(9, 5)}),
    "routed": (lambda: Layer(routed, w=_p(4, 5, 3), gate=nn.Linear(5, 4)), {"x": numbers(5)}),
    "mixed": (lambda: Layer(mixed, gate=nn.Linear(5, 4), experts=nn.ModuleList(nn.Linear(5, 3) for _ in range(4))), {"x": numbers(5)}),
    "filled": (lambda: Layer(filled, f=nn.Linear(5, 6), w=_p(6), head=nn.Linear(6, 3)), {"x": numbers(5)}),
    "edges": (lambda: Two(passed_on, f=nn.Linear(4, 4), head=nn.Linear(4, 3)), {"x": numbers(5, 4), "y": counts(5, 7, 2)}),
    "chain": (lambda: Layer(chained, f=nn.Linear(4, 3), moves=_p(3, 3)), {"x": numbers(4, 4)}),
    "windows": (lambda: Layer(shifted_windows, f=nn.Linear(4, 12), bias=_p(9), head=nn.Linear(4, 3)), {"x": numbers(4, 4, 4)}),
    "biased": (lambda: Layer(biased, f=nn.Linear(4, 12), head=nn.Linear(4, 3)), {"x": numbers(5, 4)}),
    "crossed": (lambda: Two(crossed, f=nn.TransformerDecoderLayer(4, 2, 6, batch_first=True), wide=nn.Linear(3, 4), head=nn.Linear(4, 3)), {"x": numbers(3, 4), "y": numbers(2, 3)}),
    "same filters, several dilations": (lambda: Layer(lambda m, x: m.head(sum(F.conv2d(F.pad(x, (d,) * 4), m.w, dilation=d) for d in (1, 2)).relu().mean((2, 3))), w=_p(5, 2, 3, 3), head=nn.Linear(5, 3)), {"x": numbers(2, 6, 6)}),  # type: ignore[union-attr]
    "looked up, time first": (lambda: Layer(lambda m, x: m.t(x.t().reshape(-1)).view(5, -1, 3).tanh().mean(0), t=nn.Embedding(9, 3)), {"x": counts(9, 5)}),
    "looked up with two paddings": (lambda: Layer(lambda m, x: (F.embedding(x, m.w, 0) + 2 * F.embedding(x, m.w, 1)).mean(1), w=_p(9, 3)), {"x": counts(9, 5)}),
    "looked up and a head, padded": (lambda: Layer(lambda m, x: F.linear(m.f(F.embedding(x, m.w, 2).mean(1)), m.w), w=_p(9, 3), f=nn.Linear(3, 3)), {"x": counts(9, 5)}),
    "looked up and a head, turned round": (lambda: Layer(lambda m, x: F.linear(m.f(F.embedding(x, m.w).mean(1)), m.w.flip(0)), w=_p(3, 3), f=nn.Linear(3, 3)), {"x": counts(3, 5)}),
    "a bias for each channel": (lambda: Layer(lambda m, x: m.head((x + m.b[:, None]).tanh().mean(2)), b=_p(4), head=nn.Linear(4, 3)), {"x": numbers(4, 5)}),
    "same filters twice": (lambda: Layer(lambda m, x: m.f(m.f(x).tanh()).mean((2, 3)), f=nn.Conv2d(3, 3, 3, padding=1)), {"x": numbers(3, 5, 5)}),
    "same norms twice": (lambda: Layer(lambda m, x: m.g(m.g(m.f(m.f(x).tanh()).unsqueeze(2)).tanh()).squeeze(2), f=nn.LayerNorm(6), g=nn.GroupNorm(3, 6)), {"x": numbers(6)}),
    "frozen statistics": (lambda: Layer(lambda m, x: m.g(m.f(x)).mean((2, 3)), f=nn.Conv2d(3, 4, 3), g=nn.BatchNorm2d(4, eps=0.5)).eval(), {"x": numbers(3, 5, 5)}),
    "filters over folded records": (lambda: Layer(lambda m, x: m.f(x.transpose(0, 1).reshape(-1, 2, 6)).view(3, -1, 3, 4).mean((0, 3)), f=nn.Conv1d(2, 3, 3)), {"x": numbers(3, 2, 6)}),
    "filters in groups": (lambda: Layer(lambda m, x: m.g(m.f(x).tanh()).mean((2, 3)), f=nn.Conv2d(4, 6, 3, stride=2, padding=1, groups=2), g=nn.ConvTranspose2d(6, 3, 2, stride=2, groups=3)), {"x": numbers(4, 6, 5)}),
    "two added to one": (lambda: Layer(lambda m, x: F.linear(F.layer_norm(x, (6,), m.e + m.f, m.g), m.a + m.b) + m.c + m.d, a=_p(3, 6), b=_p(3, 6), c=_p(3), d=_p(3), e=_p(6), f=_p(6), g=_p(6)), {"x": numbers(6)}),
    "product of parts": (lambda: Layer(lambda m, x: F.linear(x, torch.kron(m.a, m.b) / m.a.norm()), a=_p(3, 2), b=_p(1, 3)), {"x": numbers(6)}),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_the_clipped_sum_is_autograds(name: str) -> None:
    make, columns = CASES[name]
    torch.manual_seed(3)
    module = make()

    def data(n: int) -> Data:
        torch.manual_seed(n)
        return {**{k: of(n) for k, of in columns.items()}, "target": torch.randint(3, (n,))}

    at = lab(module, data, per_unit=2, settle=False)
    each = gradients(module, at.program, at.data, "cross_entropy")
    bound = float(each.reshape(-1, 2, each.shape[1]).sum(1).norm(dim=1).median())
    want, _ = clipped(each, bound, 2)
    assert relative(at.parts(bound)[0], want) < 1e-5
    for site in at.path.sites:
        site.settle(site.ways[-1])
    assert relative(at.parts(bound)[0], want) < 1e-5
