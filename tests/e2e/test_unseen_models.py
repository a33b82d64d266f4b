# ruff: noqa: E501 - one case a line
"""Models of kinds that no other test has, from the client's door to a short private job.

Each is exported for a schema, prepared as the worker prepares it, compared record by record with
plain autograd on the module, and trained for two steps; or it is refused, and the mend works.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812

from casemate.client.torch import export, groupnorm
from casemate.engine import prepare, rows, train
from casemate.spec.data import Column, DatasetSchema
from casemate.spec.errors import ModelError
from casemate.spec.job import Execution
from support import engine_lab as lab

ROWS = 5
Ref = Callable[[nn.Module, dict[str, Tensor]], Tensor]


def real(name: str, *shape: int, role: Any = "feature") -> Column:
    return Column(name=name, dtype="f32", shape=shape, low=-2.0, high=2.0, role=role)


def count(name: str, high: int, *shape: int, low: int = 0, role: Any = "feature") -> Column:
    return Column(name=name, dtype="i64", shape=shape, low=low, high=high, role=role)


def label(classes: int, *shape: int) -> Column:
    return count("y", classes - 1, *shape, role="label")


def job(
    module: nn.Module, columns: Sequence[Column], loss: Any, ref: Ref, inputs: Any = None
) -> None:
    """Export, prepare, compare every record's gradient with ``ref``'s, and train two steps."""
    schema = DatasetSchema(name="t", columns=tuple(columns), rows=ROWS, units=ROWS)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        packed, bindings = export(module, schema, loss=loss, inputs=inputs, dropout=False)
    spec = lab.spec_of(3, 2)
    ready = prepare.prepare(packed.data, packed.digest, [schema], bindings, spec, 4 << 30)
    program = ready.program
    rng = np.random.default_rng(3)
    table = {c.name: torch.cat([rows.synthetic([c], rng) for _ in range(ROWS)]) for c in columns}
    assembled = rows.assemble([schema], [table], program.data, bindings)
    fast = ready.fast
    summed = fast and fast.sums(assembled, math.inf, 0.0, fast.shape.units)
    own = dict(module.named_parameters(remove_duplicate=False))
    module.eval()
    largest = 0.0
    for row in range(ROWS):
        record = {k: v[row : row + 1] for k, v in assembled.inputs.items()}
        found = torch.empty(program.dimension)
        program.gradient(program.prefix(record), found)
        leaves = [own[s.tensor] for s in program.trained]
        loss_ = ref(module, {k: v[row : row + 1] for k, v in table.items()})
        wanted = torch.autograd.grad(loss_.sum(), leaves, allow_unused=True)
        flat = torch.cat(
            [torch.zeros(p.numel()) if g is None else g.flatten() for g, p in zip(wanted, leaves, strict=True)]
        )  # fmt: skip
        assert torch.isfinite(flat).all()
        largest = max(largest, float(flat.norm()))
        assert (found - flat).norm() <= 1e-5 * flat.norm()
        if summed:
            assert (summed(np.array([row])) - flat).norm() <= 1e-5 * flat.norm()
    assert largest > 0
    before = program.flat.clone()
    plan = lab.fitted(lab.plan_of(spec, ROWS, program.dimension), ready.prepared)
    train.train(
        plan, Execution(path=ready.path), spec, program, assembled, bytes(32),
        keep=ready.keep, fast=fast,
    )  # fmt: skip
    assert not torch.equal(before, program.flat) and torch.isfinite(program.flat).all()


def refused(module: nn.Module, columns: Sequence[Column], loss: Any, inputs: Any = None) -> Any:
    schema = DatasetSchema(name="t", columns=tuple(columns), rows=ROWS, units=ROWS)
    with warnings.catch_warnings(), pytest.raises(ModelError) as caught:
        warnings.simplefilter("ignore")
        export(module, schema, loss=loss, inputs=inputs)
    return caught.value


class TabTransformer(nn.Module):
    """Several categories in one table by offsets, numbers beside them."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(30, 8)
        self.register_buffer("offset", torch.tensor([0, 10, 20]))
        self.encoder = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
        self.head = nn.Linear(28, 2)

    def forward(self, cats: Tensor, x: Tensor) -> Tensor:
        return self.head(torch.cat([self.encoder(self.table(cats + self.offset)).flatten(1), x], 1))


class Recurrent(nn.Module):
    def __init__(self, bidirectional: bool = False) -> None:
        super().__init__()
        self.rnn = nn.LSTM(3, 5, 2, batch_first=True, dropout=0.1, bidirectional=bidirectional)
        self.head = nn.Linear(10 if bidirectional else 5, 3)

    def forward(self, x: Tensor, length: Tensor) -> Tensor:
        out, _ = self.rnn(x)
        last = (length - 1).view(-1, 1, 1).expand(-1, 1, out.size(2))
        return self.head(out.gather(1, last).squeeze(1))


class Packed(Recurrent):
    def forward(self, x: Tensor, length: Tensor) -> Tensor:
        packed = nn.utils.rnn.pack_padded_sequence(
            x, length, batch_first=True, enforce_sorted=False
        )
        return self.head(self.rnn(packed)[1][0][-1])


class Gpt(nn.Module):
    """Rotary attention, gated MLP, tied scores."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(20, 8)
        self.qkv, self.out = nn.Linear(8, 24, bias=False), nn.Linear(8, 8)
        self.up, self.down = nn.Linear(8, 32), nn.Linear(16, 8)
        self.register_buffer("seen", torch.ones(64, 64).tril().bool(), persistent=False)

    def forward(self, tokens: Tensor) -> Tensor:
        batch, length = tokens.shape
        x = self.table(tokens)
        q, k, v = self.qkv(x).view(batch, length, 3, 2, 4).permute(2, 0, 3, 1, 4)
        angle = torch.outer(torch.arange(length).float(), 1 / 100 ** (torch.arange(0, 4, 2) / 4))
        q, k = (
            torch.cat([u[..., ::2] * angle.cos() - u[..., 1::2] * angle.sin(),
                       u[..., ::2] * angle.sin() + u[..., 1::2] * angle.cos()], -1)
            for u in (q, k)
        )  # fmt: skip
        scores = (q @ k.mT / 2).masked_fill(~self.seen[:length, :length], float("-inf"))
        x = x + self.out((scores.softmax(-1) @ v).transpose(1, 2).reshape(batch, length, -1))
        gate, value = self.up(x).chunk(2, -1)
        return (x + self.down(F.silu(gate) * value)) @ self.table.weight.t()


def token_loss(out: Tensor, tokens: Tensor) -> Tensor:
    flat = F.cross_entropy(out[:, :-1].reshape(-1, 20), tokens[:, 1:].reshape(-1), reduction="none")
    return flat.view(tokens.shape[0], -1).mean(1)


class Two(nn.Module):
    """Two heads."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.kind, self.price = nn.Linear(4, 8), nn.Linear(8, 3), nn.Linear(8, 1)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        h = F.selu(self.body(x))
        return {"kind": self.kind(h), "price": self.price(h).squeeze(1)}


def two_losses(out: dict[str, Tensor], kind: Tensor, price: Tensor) -> Tensor:
    first = F.cross_entropy(out["kind"], kind, reduction="none")
    return first + F.mse_loss(out["price"], price, reduction="none")


class Flow(nn.Module):
    """Affine couplings (Dinh et al. 2017)."""

    def __init__(self) -> None:
        super().__init__()
        self.nets = nn.ModuleList([nn.Linear(4, 8) for _ in range(2)])
        self.register_buffer("mask", torch.tensor([[1.0, 0, 1, 0], [0, 1, 0, 1]]))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        volume = torch.zeros(x.shape[0])
        for mask, net in zip(self.mask, self.nets, strict=True):
            scale, shift = net(x * mask).chunk(2, -1)
            scale = scale.tanh() * (1 - mask)
            x = x * mask + (1 - mask) * (x * scale.exp() + shift)
            volume = volume + scale.sum(-1)
        return x, volume


class Hyper(nn.Module):
    """Weights made of the context, and a bilinear form."""

    def __init__(self) -> None:
        super().__init__()
        self.made, self.form = nn.Linear(2, 12), nn.Bilinear(4, 2, 3)

    def forward(self, x: Tensor, context: Tensor) -> Tensor:
        own = torch.bmm(self.made(context).view(-1, 3, 4), x.unsqueeze(-1)).squeeze(-1)
        return own + self.form(x, context)


class Noisy(nn.Module):
    def __init__(self, always: bool) -> None:
        super().__init__()
        self.inner, self.always = nn.Linear(4, 3), always

    def forward(self, x: Tensor) -> Tensor:
        if self.always or self.training:
            x = x + torch.randn_like(x)
        return self.inner(x)


class Bag(nn.Module):
    def __init__(self, bag: bool) -> None:
        super().__init__()
        self.table = nn.EmbeddingBag(20, 8) if bag else nn.Embedding(20, 8)
        self.head, self.bag = nn.Linear(8, 2), bag

    def forward(self, tokens: Tensor) -> Tensor:
        words = self.table(tokens)
        return self.head(words if self.bag else words.mean(1))


def head(out: int = 1) -> nn.Sequential:
    return nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, out))


def binomial(out: Tensor, y: Tensor) -> Tensor:
    made = torch.distributions.NegativeBinomial(F.softplus(out[:, 1]), logits=out[:, 0])
    return -made.log_prob(y.float())


def mixture(out: Tensor, y: Tensor) -> Tensor:
    weight, mean, scale = out.chunk(3, 1)
    each = F.log_softmax(weight, 1) - 0.5 * ((y[:, None] - mean) / scale.exp()) ** 2 - scale
    return -torch.logsumexp(each, 1)


def hazard(out: Tensor, time: Tensor, event: Tensor) -> Tensor:
    before = torch.arange(5)[None] < time[:, None]
    at = F.one_hot(time, 5).float() * event.unsqueeze(1)
    each = F.binary_cross_entropy_with_logits(out, at, reduction="none")
    return (each * (before | (at > 0))).sum(1)


def cox(out: Tensor, y: Tensor) -> Tensor:
    out = out.squeeze(1)
    return torch.logsumexp(out[None].masked_fill(y[None] < y[:, None], -1e9), 1) - out


def cosine(out: Tensor, x: Tensor) -> Tensor:
    return F.cosine_embedding_loss(out, x, torch.ones(x.shape[0]), reduction="none")


def scores(*names: str) -> Ref:
    """The reference of a classifier of these columns."""
    return lambda m, r: F.cross_entropy(m(*(r[n] for n in names)), r["y"])


def of(loss: Callable[..., Tensor], *targets: str, on: str = "x") -> Ref:
    return lambda m, r: loss(m(r[on]), *(r[n] for n in targets))


CE, X, Y = "cross_entropy", real("x", 4), real("y", role="label")
SERIES = [real("x", 7, 3), count("length", 7, low=1), label(3)]
WORDS, TOKENS = [count("tokens", 19, 9), label(2)], [count("tokens", 19, 7)]
KINDS = [X, count("kind", 2, role="label"), real("price", role="label")]
TIMES = [X, count("time", 4, role="label"), count("event", 1, role="label")]
CLASSES = [X, label(3)]


def flow_loss(out: tuple[Tensor, Tensor]) -> Tensor:
    return 0.5 * out[0].pow(2).sum(1) - out[1]


CASES: dict[str, tuple[Callable[[], nn.Module], Sequence[Column], Any, Ref, Any]] = {
    "tab-transformer": (TabTransformer, [count("cats", 9, 3), X, label(2)], CE, scores("cats", "x"), None),
    "lstm-last-step": (Recurrent, SERIES, CE, scores("x", "length"), None),
    "bilstm-last-step": (lambda: Recurrent(True), SERIES, CE, scores("x", "length"), None),
    "gpt-flat-loss": (Gpt, TOKENS, token_loss, of(token_loss, "tokens", on="tokens"), None),
    "gpt-next-token": (Gpt, TOKENS, "next_token", of(token_loss, "tokens", on="tokens"), {"target": "tokens"}),
    "two-tasks": (Two, KINDS, two_losses, of(two_losses, "kind", "price"), None),
    "autoencoder": (lambda: head(4), [X], lambda out, x: (out - x).pow(2).mean(1),
                    lambda m, r: F.mse_loss(m(r["x"]), r["x"]), {"input": "x"}),
    "cosine": (lambda: head(4), [X], cosine, of(cosine, "x"), {"input": "x"}),
    "flow": (Flow, [X], flow_loss, of(flow_loss), None),
    "hyper": (Hyper, [X, real("context", 2), label(3)], CE, scores("x", "context"), None),
    "negative-binomial": (lambda: head(2), [X, count("y", 9, role="label")], binomial, of(binomial, "y"), None),
    "mixture": (lambda: head(6), [X, Y], mixture, of(mixture, "y"), None),
    "hazard": (lambda: head(5), TIMES, hazard, of(hazard, "time", "event"), {"input": "x"}),
    "frozen-noise": (lambda: Noisy(False), CLASSES, CE, scores("x"), None),
    "bag-by-hand": (lambda: Bag(False), WORDS, CE, scores("tokens"), None),
}  # fmt: skip
LIGHT = {"two-tasks", "autoencoder", "hyper", "hazard"}


@pytest.mark.parametrize(
    "name", [n if n in LIGHT else pytest.param(n, marks=pytest.mark.full) for n in CASES]
)
def test_admitted_with_the_right_gradient(name: str) -> None:
    make, columns, loss, ref, inputs = CASES[name]
    torch.manual_seed(0)
    job(make(), columns, loss, ref, inputs)


REFUSED: dict[str, tuple[Callable[[], nn.Module], Sequence[Column], Any, str, str]] = {
    "cox": (head, [X, Y], cox, "model.mixes-records", "Let every operation"),
    "noise": (lambda: Noisy(True), CLASSES, CE, "model.random", "Leave it out"),
    "bag": (lambda: Bag(True), WORDS, CE, "model.op-unknown", "mean or sum over axis 1"),
    "packed": (Packed, SERIES, CE, "model.data-dependent", "by gather"),
    "no-target": (head, [X], "mse_loss", "model.inputs", "inputs={'target'"),
    "bce": (head, [X, label(2)], nn.BCELoss(), "model.loss", "BCEWithLogits"),
    "lazy": (lambda: nn.Sequential(nn.LazyLinear(3)), CLASSES, CE, "model.export", "once on example"),
    "spectral": (lambda: nn.Sequential(nn.utils.parametrizations.spectral_norm(nn.Linear(4, 3))),
                 CLASSES, CE, "model.export", ".eval()"),
    "instance": (lambda: nn.Sequential(nn.Unflatten(1, (2, 2)), nn.InstanceNorm1d(2, track_running_stats=True),
                                       nn.Flatten(), nn.Linear(4, 3)), CLASSES, CE, "model.export", ".eval()"),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_refused_by_name_with_a_mend(name: str) -> None:
    make, columns, loss, code, mend = REFUSED[name]
    error = refused(make(), columns, loss)
    assert error.code == code and mend in error.mend


@pytest.mark.parametrize("name", ["spectral", "instance"])
def test_freezing_mends(name: str) -> None:
    make, columns, loss, _, _ = REFUSED[name]
    torch.manual_seed(0)
    job(make().eval(), columns, loss, scores("x"))


def test_groupnorm_mends() -> None:
    torch.manual_seed(0)
    module = nn.Sequential(
        nn.Conv2d(3, 8, 3, 2, bias=False), nn.BatchNorm2d(8), nn.ReLU6(inplace=True),
        nn.Conv2d(8, 8, 3, groups=8), nn.Flatten(), nn.Linear(8, 3),
    )  # fmt: skip
    columns = [real("x", 3, 8, 8), label(3)]
    assert refused(module, columns, CE).code == "model.batchnorm"
    job(groupnorm(module), columns, CE, scores("x"))


def test_a_label_is_not_taken_for_a_feature_of_its_name() -> None:
    """A parameter of the loss may be called as a feature is; the label still feeds it."""
    torch.manual_seed(0)
    job(head(), [X, Y], lambda out, x: (out[:, 0] - x) ** 2,
        lambda m, r: (m(r["x"])[:, 0] - r["y"]) ** 2)  # fmt: skip


def test_what_training_alone_does_beside_dropout_is_left_out_aloud() -> None:
    given = {"x": torch.randn(4, 4), "target": torch.randint(3, (4,))}
    with pytest.warns(UserWarning, match="left out"):
        export(Noisy(False), given, loss=CE)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        export(Noisy(False).eval(), given, loss=CE)
