# ruff: noqa: E501 - one model a line
"""Whole models: what their gradient does below autograd is proved to be sums over records, and is."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from casemate.graph import check
from casemate.graph.ops import Batch, Value
from support.graphs import exported, interpret, tensors
from support.jointcases import Case, problems
from support.jointgraph import SIZES, note, take

MOST = SIZES[1]


class Fn(nn.Module):
    """Modules by name, and a function of them and of the input."""

    def __init__(self, run: Callable[..., Tensor], **parts: Any) -> None:
        super().__init__()
        for name, part in parts.items():
            if isinstance(part, Tensor):
                part = nn.Parameter(part)
            setattr(self, name, part)
        self.run = run

    def forward(self, x: Tensor) -> Tensor:
        return self.run(self, x)


def plain(*layers: nn.Module) -> nn.Module:
    return nn.Sequential(*layers)


def per_record(out: Tensor, target: Tensor) -> Tensor:
    return ((out.flatten(1) - target[:, None]) ** 2).mean(1)


def tied() -> nn.Module:
    def run(self: Any, x: Tensor) -> Any:
        h = self.e(x) + self.p[: x.shape[1]]
        return functional.linear(self.n(h), self.e.weight)

    return Fn(run, e=nn.Embedding(9, 4), p=torch.randn(8, 4), n=nn.LayerNorm(4))


def encoder(causal: bool) -> nn.Module:
    layer = nn.TransformerEncoderLayer(4, 2, 8, dropout=0.0, batch_first=True, norm_first=True)
    mask = torch.triu(torch.full((6, 6), float("-inf")), 1)

    def run(self: Any, x: Tensor) -> Any:
        return self.t(x, src_mask=mask) if causal else self.t(x, src_key_padding_mask=x[..., 0] > 1)

    return Fn(run, t=layer)


def bottleneck() -> nn.Module:
    def run(self: Any, x: Tensor) -> Any:
        a = self.down(x)
        b = functional.interpolate(self.mid(a), size=x.shape[-2:], mode="bilinear")
        return self.up(torch.cat([x, b], 1))

    return Fn(run, down=nn.Conv2d(4, 6, 3, 2, 1), mid=nn.GroupNorm(2, 6), up=nn.ConvTranspose2d(10, 2, 2, 2))  # fmt: skip


def lora() -> nn.Module:
    base = nn.Linear(4, 4)
    for p in base.parameters():
        p.requires_grad_(False)
    return Fn(lambda s, x: s.l(x) + (x @ s.a.T) @ s.b.T * 2, l=base, a=torch.randn(2, 4), b=torch.randn(4, 2))  # fmt: skip


def merged() -> nn.Module:
    return Fn(lambda s, x: functional.linear(x, s.w + s.b @ s.a, s.c), w=torch.randn(3, 4), a=torch.randn(2, 4), b=torch.randn(3, 2), c=torch.randn(3))  # fmt: skip


def recurrent(kind: type[nn.Module], **how: Any) -> nn.Module:
    return Fn(lambda s, x: s.o(s.r(x)[0]), r=kind(4, 5, **how), o=nn.Linear(10 if how.get("bidirectional") else 5, 2))  # fmt: skip


def time_first() -> nn.Module:
    def run(self: Any, x: Tensor) -> Any:
        h = self.r(x.transpose(0, 1))[0]  # (T, B, 5): the batch is folded behind time
        return self.o(h.reshape(-1, 5)).reshape(h.shape[0], h.shape[1], 2).transpose(0, 1)

    return Fn(run, r=nn.GRU(4, 5), o=nn.Linear(5, 2))


def queries() -> nn.Module:
    """Learned queries attend to the record, after a learned token."""

    def run(self: Any, x: Tensor) -> Any:
        n = x.shape[0]
        x = torch.cat([self.c.expand(n, 1, 4), x], 1)
        return functional.scaled_dot_product_attention(self.q.expand(n, 3, 4), x, x)

    return Fn(run, q=torch.randn(1, 3, 4), c=torch.randn(1, 1, 4))


def frozen_batch_norm() -> nn.Module:
    norm = nn.BatchNorm2d(6).eval()
    norm.running_mean = torch.randn(6)
    return plain(nn.Conv2d(4, 6, 3), norm, nn.ReLU(), nn.AdaptiveAvgPool2d(1))


def unit_weights() -> nn.Module:
    return Fn(lambda s, x: functional.linear(x, functional.normalize(s.w, dim=1) * s.g.exp()), w=torch.randn(3, 4), g=torch.randn(3, 1))  # fmt: skip


def bias_table() -> nn.Module:
    at = torch.arange(6)[:, None] - torch.arange(6)[None] + 5

    def run(self: Any, x: Tensor) -> Any:
        return (x @ x.transpose(1, 2) + self.t[at]).softmax(-1) @ x

    return Fn(run, t=torch.randn(11))


MODELS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "logistic regression": (lambda: Fn(lambda s, x: (x @ s.w + s.b).sigmoid()[:, None], w=torch.randn(4), b=torch.zeros(())), (4,)),
    "mlp": (lambda: plain(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 8), nn.GELU(), nn.Linear(8, 3)), (4,)),
    "tokens": (lambda: plain(nn.Linear(4, 8), nn.SiLU(), nn.LayerNorm(8), nn.Linear(8, 2, bias=False)), (6, 4)),
    "rms": (lambda: plain(nn.Linear(4, 8), nn.RMSNorm(8), nn.Tanh(), nn.Linear(8, 2)), (6, 4)),
    "convnet": (lambda: plain(nn.Conv2d(4, 6, 3, padding=1), nn.GroupNorm(3, 6), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(6, 6, 3, groups=6), nn.Flatten(), nn.Linear(6, 2)), (4, 6, 6)),
    "convnet in one dimension": (lambda: plain(nn.Conv1d(4, 6, 3, dilation=2), nn.PReLU(6), nn.AvgPool1d(2), nn.ConvTranspose1d(6, 2, 3, 2)), (4, 12)),
    "convnet in three dimensions": (lambda: plain(nn.Conv3d(4, 2, 2, 2), nn.InstanceNorm3d(2, affine=True), nn.ELU()), (4, 4, 4, 4)),
    "instance norm": (lambda: plain(nn.Conv2d(4, 6, 3), nn.InstanceNorm2d(6, affine=True), nn.Hardswish(), nn.AdaptiveMaxPool2d(2)), (4, 6, 6)),
    "frozen batch norm": (frozen_batch_norm, (4, 6, 6)),
    "encoder, padding": (lambda: encoder(False), (6, 4)),
    "encoder, causal": (lambda: encoder(True), (6, 4)),
    "attention, sequence first": (lambda: Fn(lambda s, x: s.m(*[x.transpose(0, 1)] * 3, need_weights=False)[0].transpose(0, 1), m=nn.MultiheadAttention(4, 2)), (6, 4)),
    "attention with weights": (lambda: Fn(lambda s, x: s.m(x, x, x)[1], m=nn.MultiheadAttention(4, 2, batch_first=True)), (6, 4)),
    "learned queries": (queries, (6, 4)),
    "gru": (lambda: recurrent(nn.GRU, batch_first=True), (3, 4)),
    "lstm, both ways": (lambda: recurrent(nn.LSTM, batch_first=True, bidirectional=True), (3, 4)),
    "lstm, two layers": (lambda: recurrent(nn.LSTM, batch_first=True, num_layers=2), (2, 4)),
    "rnn": (lambda: recurrent(nn.RNN, batch_first=True), (3, 4)),
    "time first": (time_first, (3, 4)),
    "down and up": (bottleneck, (4, 6, 6)),
    "lora": (lora, (6, 4)),
    "merged adapters": (merged, (6, 4)),
    "weights on the sphere": (unit_weights, (4,)),
    "largest over time": (lambda: Fn(lambda s, x: s.l(x).max(1).values + s.l(x).logsumexp(1), l=nn.Linear(4, 3)), (6, 4)),
    "einsum": (lambda: Fn(lambda s, x: torch.einsum("bti,ijk,bsk->btsj", x, s.w, x), w=torch.randn(4, 2, 4)), (3, 4)),
    "gates": (lambda: plain(nn.Linear(4, 8), nn.GLU(), nn.Softplus(), nn.Linear(4, 2)), (6, 4)),
    "shuffled pixels": (lambda: plain(nn.Conv2d(4, 8, 1), nn.PixelShuffle(2), nn.ReflectionPad2d(1), nn.Conv2d(2, 1, 3)), (4, 3, 3)),
    "unfolded patches": (lambda: plain(nn.Unfold(2, stride=2), nn.Linear(9, 2)), (4, 6, 6)),
    "a table of biases": (bias_table, (6, 4)),
    "cosines": (lambda: Fn(lambda s, x: functional.cosine_similarity(s.l(x)[:, None], s.p[None], dim=-1), l=nn.Linear(4, 3), p=torch.randn(5, 3)), (4,)),
}  # fmt: skip


def joint_case(module: nn.Module, data: dict[str, Tensor], loss: Any) -> Case:
    """The joint graph of a model's per-record losses, each multiplied by its own number."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        graph, weights, infos = tensors(exported(module, data, loss=loss))
    values = check.check(graph, infos).values
    trained = [i for i in graph.inputs if i.kind == "param"]
    inputs = {i.name: values[i.name] for i in graph.inputs}
    held = {i.name: data[i.name] if i.kind == "data" else weights[i.tensor] for i in graph.inputs}
    inputs["seed"], held["seed"] = Value("f32", (1,), Batch(0)), torch.rand(MOST) + 0.5
    tensor = {i.name: i.tensor for i in graph.inputs}
    is_data = {i.name for i in graph.inputs if i.kind == "data"}

    def run(given: Mapping[str, Tensor]) -> list[Tensor | None]:
        with torch.enable_grad():
            leaves = {tensor[k]: v for k, v in given.items() if k != "seed" and k not in is_data}
            out = interpret(graph, leaves, {k: given[k] for k in is_data})[graph.loss]
        wanted = [given[i.name] for i in trained]
        return [out, *torch.autograd.grad([out], wanted, [given["seed"]], allow_unused=True)]

    def at(n: int) -> dict[str, Tensor]:
        made = {k: take(x, inputs[k], range(n)).detach().clone() for k, x in held.items()}
        return {k: x.requires_grad_() if k in {i.name for i in trained} else x for k, x in made.items()}  # fmt: skip

    noted = note(run, at)
    found = {n: x for n, x in zip(noted.outputs, noted.found, strict=True) if n and x is not None}
    other = {k: x.roll(3, 0) if v.batch is not None else x for (k, x), v in zip(held.items(), inputs.values(), strict=True)}  # fmt: skip
    return Case(
        "model", inputs, noted.nodes, held, other, found, names=noted.outputs[:1],
        leaves=tuple(i.name for i in trained), gradients=noted.outputs[1:],
    )  # fmt: skip


def proved(case: Case) -> None:
    values = case.prove()
    assert values[str(case.names[0])].batch == Batch(0)
    assert any(g is not None for g in case.gradients)
    for leaf, g in zip(case.leaves, case.gradients, strict=True):
        if g is not None:
            assert values[g].summed and values[g].dims == case.inputs[leaf].dims
    assert problems(case) == []


# The others are run by make test-full.
QUICK = (
    "logistic regression", "tokens", "convnet", "instance norm", "encoder, padding",
    "learned queries", "lstm, two layers", "time first", "down and up", "merged adapters",
    "a table of biases",
)  # fmt: skip


@pytest.mark.parametrize(
    "name", [n if n in QUICK else pytest.param(n, marks=pytest.mark.full) for n in MODELS]
)
def test_models(name: str) -> None:
    torch.manual_seed(2)
    make, shape = MODELS[name]
    data = {"x": torch.randn(MOST, *shape), "target": torch.randn(MOST)}
    proved(joint_case(make(), data, per_record))


def test_tied_language_model() -> None:
    torch.manual_seed(2)
    x, y = torch.randint(0, 9, (2, MOST, 6))
    proved(joint_case(tied(), {"x": x, "target": y}, _by_token))


def _by_token(out: Tensor, target: Tensor) -> Tensor:
    return functional.cross_entropy(
        out.transpose(1, 2), target, reduction="none", label_smoothing=0.1
    ).mean(1)


@pytest.mark.parametrize(
    "loss",
    [
        nn.CrossEntropyLoss(weight=torch.tensor([1.0, 2.0, 0.5])),
        nn.CrossEntropyLoss(label_smoothing=0.2),
    ],
)
def test_losses_by_class(loss: nn.Module) -> None:
    torch.manual_seed(2)
    data = {"x": torch.randn(MOST, 4), "target": torch.randint(0, 3, (MOST,))}
    proved(joint_case(nn.Linear(4, 3), data, loss))


@pytest.mark.parametrize(
    "loss", [nn.BCEWithLogitsLoss(), nn.SmoothL1Loss(), nn.HuberLoss(), nn.L1Loss(), nn.MSELoss()]
)
def test_losses_by_number(loss: nn.Module) -> None:
    torch.manual_seed(2)
    data = {"x": torch.randn(MOST, 4), "target": torch.rand(MOST, 3)}
    proved(joint_case(nn.Linear(4, 3), data, loss))
