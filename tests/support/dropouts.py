"""Modules that drop out in every way that torch has, and torch with draws put into it by hand."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils._python_dispatch import TorchDispatchMode

WIDTH, LENGTH = 6, 5


class Run(nn.Module):
    """A function of the module and x (B, LENGTH, WIDTH), then three scores."""

    def __init__(self, run: Callable[[Any, Tensor], Tensor], **parts: nn.Module) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, 3)
        self.run = run
        for name, part in parts.items():
            setattr(self, name, part)

    def forward(self, x: Tensor) -> Tensor:
        scores: Tensor = self.last(self.run(self, self.first(x))).mean(1)
        return scores


class Functional(Run):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(functional.dropout(x, 0.3, training=self.training))


def _attend(m: Any, x: Tensor, **how: Any) -> Tensor:
    return functional.scaled_dot_product_attention(x, x * 0.5, x, dropout_p=0.3, **how)


def _masked(m: Any, x: Tensor) -> Tensor:
    lower = torch.ones(LENGTH, LENGTH, dtype=torch.bool).tril(-1)  # the first attends to nothing
    return _attend(m, x, attn_mask=lower)


def _biased(m: Any, x: Tensor) -> Tensor:
    bias = torch.linspace(-1, 1, LENGTH * LENGTH).view(LENGTH, LENGTH)
    bias = torch.where(torch.eye(LENGTH).bool(), torch.full_like(bias, -torch.inf), bias)
    return _attend(m, x, attn_mask=bias.to(x.dtype))


def _grouped(m: Any, x: Tensor) -> Tensor:
    q = x.view(-1, LENGTH, 3, 2).transpose(1, 2)
    k = q[:, :1]
    out = functional.scaled_dot_product_attention(q, k, k, dropout_p=0.3, enable_gqa=True)
    return out.transpose(1, 2).reshape(-1, LENGTH, WIDTH)


def _recurrent(kind: str, both: bool = False, first: bool = True) -> nn.Module:
    made: nn.Module = getattr(nn, kind)(
        WIDTH, WIDTH // (2 if both else 1), 3, dropout=0.2, bidirectional=both, batch_first=first
    )
    return made


def _in_turn(m: Any, x: Tensor) -> Tensor:
    y, h = m.rnn(x)
    h = h[0] if isinstance(h, tuple) else h
    return y + h.transpose(0, 1).sum((1, 2), keepdim=True)


def _stochastic_depth(m: Any, x: Tensor) -> Tensor:
    noise = torch.empty((x.shape[0], 1, 1), dtype=x.dtype).bernoulli_(0.7)
    return x + noise.div_(0.7) * x.tanh()


CASES: dict[str, Callable[[], nn.Module]] = {
    "dropout": lambda: Run(lambda m, x: m.d(x), d=nn.Dropout(0.4)),
    "in place": lambda: Run(lambda m, x: m.d(x * 1.0).relu(), d=nn.Dropout(0.4, inplace=True)),
    "channels": lambda: Run(lambda m, x: m.d(x), d=nn.Dropout1d(0.4)),
    "alpha": lambda: Run(lambda m, x: m.d(x), d=nn.AlphaDropout(0.4)),
    "alpha channels": lambda: Run(lambda m, x: m.d(x), d=nn.FeatureAlphaDropout(0.4)),
    "functional": lambda: Functional(lambda m, x: x),
    "batch last": lambda: Run(
        lambda m, x: functional.dropout(x.permute(1, 2, 0), 0.3).permute(2, 0, 1)
    ),
    "batch folded": lambda: Run(
        lambda m, x: functional.dropout(x.reshape(-1, WIDTH), 0.3).view(-1, LENGTH, WIDTH)
    ),
    "attention": lambda: Run(_attend),
    "attention, causal": lambda: Run(lambda m, x: _attend(m, x, is_causal=True, scale=0.7)),
    "attention, masked": lambda: Run(_masked),
    "attention, biased": lambda: Run(_biased),
    "attention, grouped": lambda: Run(_grouped),
    "multihead": lambda: Run(
        lambda m, x: m.a(x, x, x, need_weights=False)[0] + m.a(x, x, x)[0],
        a=nn.MultiheadAttention(WIDTH, 2, dropout=0.2, batch_first=True),
    ),
    "multihead, batch second": lambda: Run(
        lambda m, x: m.a(*[x.transpose(0, 1)] * 3)[0].transpose(0, 1),
        a=nn.MultiheadAttention(WIDTH, 2, dropout=0.2),
    ),
    "encoder": lambda: Run(
        lambda m, x: m.e(x), e=nn.TransformerEncoderLayer(WIDTH, 2, 8, batch_first=True)
    ),
    "lstm": lambda: Run(_in_turn, rnn=_recurrent("LSTM")),
    "lstm, projected": lambda: Run(
        lambda m, x: m.out(m.rnn(x)[0]),
        rnn=nn.LSTM(WIDTH, 4, 2, dropout=0.2, batch_first=True, proj_size=2),
        out=nn.Linear(2, WIDTH),
    ),
    "gru, both ways": lambda: Run(_in_turn, rnn=_recurrent("GRU", both=True)),
    "rnn, batch second": lambda: Run(
        lambda m, x: m.rnn(x.transpose(0, 1))[0].transpose(0, 1),
        rnn=_recurrent("RNN", first=False),
    ),
    "stochastic depth": lambda: Run(_stochastic_depth),
}  # fmt: skip


class _ByHand(TorchDispatchMode):  # type: ignore[no-untyped-call]
    def __init__(self, kept: Iterator[Tensor]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.kept = kept

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten.bernoulli_.float:
            kept = next(self.kept)
            return args[0].copy_(kept.reshape(args[0].shape))
        if func is torch.ops.aten.native_dropout.default:
            kept = next(self.kept).reshape(args[0].shape)
            return args[0] * kept / (1 - args[1]), kept.bool()
        return func(*args, **(kwargs or {}))


@contextmanager
def by_hand(kept: Sequence[Tensor]) -> Iterator[None]:
    """torch's draws in order: what each keeps, 0 or 1. All must be taken."""
    left = iter(kept)
    with _ByHand(left), torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        yield
    assert next(left, None) is None, "a draw was not taken"
