# ruff: noqa: E501 - one layer a line
"""Random models over the whole table: layers drawn one after the other, each fitting what it is given.

A state is the shape of one record: (F,), (T, F), (C, L), (C, H, W) or (C, D, H, W), by its ``kind``.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812

Shape: TypeAlias = tuple[int, ...]
Rng: TypeAlias = random.Random
VOCABULARY = 12


class Layer(nn.Module):
    """``how(self, x)`` with the modules and parameters that it needs."""

    def __init__(self, how: Callable[[Any, Tensor], Tensor], **parts: Any) -> None:
        super().__init__()
        self.how = how
        for name, part in parts.items():
            setattr(self, name, part)

    def forward(self, x: Tensor) -> Tensor:
        return self.how(self, x)


def _p(*shape: int, scale: float = 0.3) -> nn.Parameter:
    return nn.Parameter(torch.randn(shape) * scale)


Made: TypeAlias = "tuple[nn.Module, Shape] | None"
Maker: TypeAlias = Callable[[Rng, Shape], Made]
SMOOTH = (
    nn.Tanh,
    nn.SiLU,
    nn.GELU,
    nn.Sigmoid,
    nn.Softplus,
    nn.Mish,
    nn.ELU,
    nn.SELU,
    nn.LogSigmoid,
)
BENT = (nn.ReLU, nn.LeakyReLU, nn.Hardswish, nn.ReLU6, nn.Hardtanh, nn.Softshrink, nn.PReLU)


# --- any shape


def _smooth(rng: Rng, s: Shape) -> Made:
    return rng.choice(SMOOTH)(), s


def _bent(rng: Rng, s: Shape) -> Made:
    return rng.choice(BENT)(), s


def _scalar(rng: Rng, s: Shape) -> Made:
    how = rng.choice([
        lambda m, x: x * m.a.exp() + m.b,
        lambda m, x: x * m.a + x.tanh() * m.b,
        lambda m, x: torch.lerp(x, x.sin(), m.a.sigmoid()) - m.b,
        lambda m, x: x / (1 + m.a.square()) + m.b * m.a,
    ])  # fmt: skip
    return Layer(how, a=nn.Parameter(torch.tensor(0.7)), b=nn.Parameter(torch.tensor(-0.2))), s


def _pointwise(rng: Rng, s: Shape) -> Made:
    how = rng.choice([
        lambda m, x: x.sigmoid() * x, lambda m, x: x.sin() + x.cos(), lambda m, x: (x.square() + 1).sqrt(),
        lambda m, x: (x.square() + 0.5).log(), lambda m, x: x.exp() / (1 + x.exp()), lambda m, x: torch.erf(x),
        lambda m, x: x.clamp(-1.5, 1.5), lambda m, x: torch.where(x > 0.3, x, x * 0.1), lambda m, x: x.atan(),
        lambda m, x: torch.addcmul(x, x, x, value=0.1), lambda m, x: (x.square() + 1).rsqrt() * x,
        lambda m, x: torch.maximum(x, x * 0.2), lambda m, x: x.masked_fill(x > 1.0, 0.5), lambda m, x: x.expm1(),
        lambda m, x: (x.abs() + 1).pow(1.5), lambda m, x: torch.logaddexp(x, -x), lambda m, x: x.sinh().asinh(),
    ])  # fmt: skip
    return Layer(how), s


def _affine(rng: Rng, s: Shape) -> Made:
    """Parameters of every place, or of one axis."""
    keep = [rng.random() < 0.6 for _ in s]
    own = tuple(d if k else 1 for d, k in zip(s, keep, strict=True))
    while len(own) > 1 and own[0] == 1 and rng.random() < 0.5:
        own = own[1:]
    return Layer(lambda m, x: x * (1 + m.a) + m.b, a=_p(*own), b=_p(*own)), s


def _last_norm(rng: Rng, s: Shape) -> Made:
    if s[-1] < 4:  # over two, a layer norm's derivative is all but zero
        return None
    if len(s) > 1 and rng.random() < 0.3:
        return nn.LayerNorm(s[-2:], bias=rng.random() < 0.7), s
    # RMSNorm's own epsilon is that of the dtype, and so not the oracle's.
    which: Any = rng.choice(
        [
            nn.LayerNorm,
            lambda n: nn.RMSNorm(n, 1e-5),
            lambda n: nn.LayerNorm(n, elementwise_affine=False),
        ]
    )
    return which(s[-1]), s


def _residual(rng: Rng, s: Shape) -> Made:
    inner = _layer(rng, s)
    if inner is None or inner[1] != s:
        return None
    return Layer(lambda m, x: x + 0.5 * m.inner(x), inner=inner[0]), s


def _sums(rng: Rng, s: Shape) -> Made:
    how = rng.choice([
        lambda m, x: x.softmax(-1) * x.shape[-1], lambda m, x: x.log_softmax(-1), lambda m, x: x.cumsum(-1) * 0.3,
        lambda m, x: x - x.mean(-1, keepdim=True), lambda m, x: x - x.logsumexp(-1, keepdim=True),
        lambda m, x: F.normalize(x, dim=-1) * 2, lambda m, x: x / (1 + x.norm(dim=-1, keepdim=True)),
        lambda m, x: x.flip(-1), lambda m, x: x.roll(1, -1), lambda m, x: x - x.amax(-1, keepdim=True),
        lambda m, x: x.sort(-1).values, lambda m, x: x * x.var(-1, keepdim=True, correction=0),
        lambda m, x: torch.cat([x, -x], -1)[..., : x.shape[-1]], lambda m, x: x + x.sum(tuple(range(1, x.dim())), keepdim=True) / x[0].numel(),
    ])  # fmt: skip
    return Layer(how), s


# --- (F,)


def _dense(rng: Rng, s: Shape) -> Made:
    out = rng.randint(2, 9)
    bias = rng.random() < 0.7
    how = rng.randrange(9)
    f = s[-1]
    shape = (*s[:-1], out)
    if how == 0:
        return Layer(lambda m, x: x @ m.w, w=_p(f, out)), shape
    if how == 1:
        base = nn.Linear(f, out, bias=bias)
        base.weight.requires_grad_(False)
        return Layer(
            lambda m, x: m.base(x) + (x @ m.a) @ m.b * 2.0, base=base, a=_p(f, 2), b=_p(2, out)
        ), shape
    if how == 2:
        return Layer(lambda m, x: x @ (m.a @ m.b), a=_p(f, 3), b=_p(3, out)), shape
    if how == 3:
        return Layer(
            lambda m, x: F.linear(x, m.w[1 : out + 1, :f], m.c[:out]),
            w=_p(out + 2, f + 1),
            c=_p(out + 3),
        ), shape
    if how == 4:
        return Layer(
            lambda m, x: F.linear(x, m.w * m.g.unsqueeze(1)), w=_p(out, f), g=_p(out, scale=1.0)
        ), shape
    if how == 5:
        return Layer(
            lambda m, x: torch.addmm(m.c, x.reshape(-1, f), m.w.t()).reshape(*x.shape[:-1], -1),
            w=_p(out, f),
            c=_p(out),
        ), shape
    if how == 6:
        return Layer(lambda m, x: torch.einsum("...i,ji->...j", x, m.w), w=_p(out, f)), shape
    return nn.Linear(f, out, bias=bias), shape


def _fold(rng: Rng, s: Shape) -> Made:
    divisors = [d for d in range(2, s[0]) if s[0] % d == 0]
    if not divisors:
        return None
    d = rng.choice(divisors)
    t = s[0] // d
    if rng.random() < 0.5:
        return Layer(lambda m, x: x.view(-1, t, d)), (t, d)
    return Layer(lambda m, x: x.reshape(x.shape[0], d, t).transpose(1, 2)), (t, d)


def _outer(rng: Rng, s: Shape) -> Made:
    if s[0] > 6:
        return None
    return Layer(lambda m, x: x.unsqueeze(2) * (x @ m.w).unsqueeze(1), w=_p(s[0], s[0])), (
        s[0],
        s[0],
    )


def _bilinear(rng: Rng, s: Shape) -> Made:
    out = rng.randint(2, 5)
    if rng.random() < 0.5:
        return Layer(
            lambda m, x: torch.einsum("bi,oij,bj->bo", x, m.w, x), w=_p(out, s[0], s[0], scale=0.1)
        ), (out,)
    return Layer(lambda m, x: m.f(x, x.tanh()), f=nn.Bilinear(s[0], s[0], out)), (out,)


def _halves(rng: Rng, s: Shape) -> Made:
    if s[0] < 4 or s[0] % 2:
        return None
    n = s[0] // 2
    how = rng.randrange(4)
    if how == 0:
        return Layer(lambda m, x: F.glu(x, -1)), (n,)
    if how == 1:
        return Layer(
            lambda m, x: torch.cat([m.f(t) for t in x.chunk(2, -1)], -1), f=nn.Linear(n, n)
        ), s
    if how == 2:
        return Layer(lambda m, x: m.f(x.chunk(2, -1)[0]) * x.chunk(2, -1)[1], f=nn.Linear(n, n)), (
            n,
        )
    return Layer(
        lambda m, x: torch.stack([m.f(x[:, :n]), x[:, n:]], 2).flatten(1),
        f=nn.Linear(n, n, bias=False),
    ), s


def _group_flat(rng: Rng, s: Shape) -> Made:
    return (nn.GroupNorm(2, s[0]), s) if s[0] % 2 == 0 and s[0] > 6 else None


# --- (T, F)


def _attention(rng: Rng, s: Shape) -> Made:
    t, f = s
    if f % 2:
        return None
    mask = torch.full((t, t), float("-inf")).triu(1)
    how = rng.randrange(5)
    if how == 0:

        def mha(m: Any, x: Tensor) -> Any:
            return m.f(x, x, x, need_weights=False, attn_mask=m.mask.to(x.dtype))[0]

        layer = Layer(mha, f=nn.MultiheadAttention(f, 2, batch_first=True))
        layer.register_buffer("mask", mask)
        return layer, s
    if how == 1:

        def sdpa(m: Any, x: Tensor) -> Any:
            q, k, v = m.f(x).view(-1, t, 3, 2, f // 2).permute(2, 0, 3, 1, 4)
            y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
            return m.o(y.transpose(1, 2).reshape(-1, t, f))

        return Layer(sdpa, f=nn.Linear(f, 3 * f), o=nn.Linear(f, f)), s
    if how == 2:

        def padded(m: Any, x: Tensor) -> Any:
            there = x[..., :1].transpose(1, 2) > -1.0  # keys that count, of each record's own
            there = there | torch.eye(t, dtype=torch.bool)
            scores = (m.q(x) @ m.k(x).transpose(1, 2)) / f**0.5
            return scores.masked_fill(~there, float("-inf")).softmax(-1) @ m.v(x)

        return Layer(padded, q=nn.Linear(f, f), k=nn.Linear(f, f, bias=False), v=nn.Linear(f, f)), s
    if how == 3 and f > 3:
        layer3 = nn.TransformerEncoderLayer(
            f, 2, 7, batch_first=True, norm_first=rng.random() < 0.5, activation="gelu"
        )
        return Layer(lambda m, x: m.f(x), f=layer3), s

    def baddbmm(m: Any, x: Tensor) -> Any:
        return torch.baddbmm(x, torch.bmm(m.q(x), x.transpose(1, 2)), x, alpha=0.2)

    return Layer(baddbmm, q=nn.Linear(f, f)), s


def _recurrent(rng: Rng, s: Shape) -> Made:
    t, f = s
    h = rng.randint(2, 5)
    how = rng.randrange(5)
    if how == 0:
        return Layer(
            lambda m, x: m.f(x)[0], f=rng.choice([nn.LSTM, nn.GRU, nn.RNN])(f, h, batch_first=True)
        ), (t, h)
    if how == 1:
        return Layer(
            lambda m, x: m.f(x)[0], f=nn.GRU(f, h, batch_first=True, bidirectional=True)
        ), (t, 2 * h)
    if how == 2:
        return Layer(lambda m, x: m.f(x.transpose(0, 1))[1].squeeze(0), f=nn.GRU(f, h)), (h,)
    if how == 3:
        return Layer(lambda m, x: m.f(x.transpose(0, 1))[0][-1], f=nn.LSTM(f, h, num_layers=2)), (
            h,
        )

    def cells(m: Any, x: Tensor) -> Any:
        a = x.new_zeros(x.shape[0], h)
        for token in x.unbind(1):
            a = m.f(token, a)
        return a

    return Layer(cells, f=rng.choice([nn.GRUCell, nn.RNNCell])(f, h)), (h,)


def _places(rng: Rng, s: Shape) -> Made:
    t, f = s
    if rng.random() < 0.5:
        return Layer(lambda m, x: x + m.f(torch.arange(t)), f=nn.Embedding(t + 2, f)), s
    return Layer(lambda m, x: x + m.a[:, :t], a=_p(1, t + 1, f)), s


def _time_first(rng: Rng, s: Shape) -> Made:
    out = rng.randint(2, 6)
    how = rng.randrange(4)
    f = s[1]
    if how == 0:
        return Layer(
            lambda m, x: m.f(x.transpose(0, 1)).tanh().transpose(0, 1), f=nn.Linear(f, out)
        ), (s[0], out)
    if how == 1:
        return Layer(
            lambda m, x: (
                m.f(x.permute(1, 0, 2).reshape(-1, f)).view(s[0], -1, out).permute(1, 0, 2)
            ),
            f=nn.Linear(f, out),
        ), (s[0], out)
    if how == 2:
        return Layer(
            lambda m, x: m.f(x.transpose(1, 2)).transpose(1, 2), f=nn.Linear(s[0], s[0])
        ), s
    return Layer(lambda m, x: (m.w @ x).tanh(), w=_p(out, s[0])), (out, f)


def _pool_tokens(rng: Rng, s: Shape) -> Made:
    how = rng.choice([
        lambda m, x: x.mean(1), lambda m, x: x[:, -1], lambda m, x: x.sum(1) * 0.5, lambda m, x: x.logsumexp(1),
        lambda m, x: (x * x[..., :1].softmax(1)).sum(1), lambda m, x: x.select(1, 0) - x.select(1, 1) if x.shape[1] > 1 else x[:, 0],
        lambda m, x: x.amax(1), lambda m, x: x.max(1).values + x.mean(1),
    ])  # fmt: skip
    return Layer(how), (s[1],)


def _as_signal(rng: Rng, s: Shape) -> Made:
    return Layer(lambda m, x: x.transpose(1, 2)), (s[1], s[0])


def _flatten(rng: Rng, s: Shape) -> Made:
    n = 1
    for d in s:
        n *= d
    return (nn.Flatten(), (n,)) if n <= 80 else None


def _heads(rng: Rng, s: Shape) -> Made:
    t, f = s
    if f % 2:
        return None
    return Layer(
        lambda m, x: m.f(x.view(-1, t, 2, f // 2)).permute(0, 2, 1, 3).reshape(-1, 2 * t, f // 2),
        f=nn.Linear(f // 2, f // 2),
    ), (2 * t, f // 2)


# --- (C, ...)


def _convolution(rng: Rng, s: Shape) -> Made:
    c, n = s[0], len(s) - 1
    groups = rng.choice([g for g in (1, 1, 1, 2, 3, c) if c % g == 0])
    out = groups * rng.randint(1, 4 if groups == 1 else 2)
    if out > 8:
        return None
    kernel = [rng.randint(1, min(3, d)) for d in s[1:]]
    stride = [rng.choice([1, 1, 2]) for _ in kernel]
    dilation = [
        rng.choice([1, 1, 2]) if (k - 1) * 2 < d else 1 for k, d in zip(kernel, s[1:], strict=True)
    ]
    padding = [
        rng.randint(0, (k - 1) * d // 2 + rng.randint(0, 1))
        for k, d in zip(kernel, dilation, strict=True)
    ]
    size = [
        (d + 2 * p - dl * (k - 1) - 1) // st + 1
        for d, p, dl, k, st in zip(s[1:], padding, dilation, kernel, stride, strict=True)
    ]
    if min(size) < 1:
        return None
    conv: Any = (nn.Conv1d, nn.Conv2d, nn.Conv3d)[n - 1]
    return conv(c, out, kernel, stride, padding, dilation, groups, bias=rng.random() < 0.6), (
        out,
        *size,
    )


def _transposed(rng: Rng, s: Shape) -> Made:
    c, n = s[0], len(s) - 1
    groups = rng.choice([g for g in (1, 1, 2, c) if c % g == 0])
    out = groups * rng.randint(1, 2)
    stride = rng.choice([1, 2])
    kernel, padding = rng.randint(1, 3), 0
    more = rng.randint(0, stride - 1)
    if kernel > 2:
        padding = rng.randint(0, 1)
    size = [(d - 1) * stride - 2 * padding + kernel + more for d in s[1:]]
    if min(size) < 1 or out * torch.Size(size).numel() > 400:
        return None
    conv: Any = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)[n - 1]
    return conv(c, out, kernel, stride, padding, more, groups, bias=rng.random() < 0.6), (
        out,
        *size,
    )


def _channel_norm(rng: Rng, s: Shape) -> Made:
    if torch.Size(s[1:]).numel() < 4:
        return None
    n = len(s) - 1
    how = rng.randrange(4)
    if how == 0:
        return (nn.InstanceNorm1d, nn.InstanceNorm2d, nn.InstanceNorm3d)[n - 1](
            s[0], affine=rng.random() < 0.7
        ), s
    if how == 1:
        frozen: Any = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)[n - 1](s[0])
        frozen.running_mean.normal_()
        frozen.running_var.uniform_(0.5, 2)
        return frozen.eval(), s
    if how == 2 and s[0] > 3:
        return Layer(lambda m, x: m.f(x.movedim(1, -1)).movedim(-1, 1), f=nn.LayerNorm(s[0])), s
    return nn.GroupNorm(
        rng.choice([g for g in (1, 2, s[0]) if s[0] % g == 0]), s[0], affine=rng.random() < 0.8
    ), s


def _pooling(rng: Rng, s: Shape) -> Made:
    n = len(s) - 1
    if min(s[1:]) < 3:
        return None
    how = rng.randrange(4)
    size = tuple((d - 2) // 2 + 1 for d in s[1:])
    if how == 0:
        return (nn.MaxPool1d, nn.MaxPool2d, nn.MaxPool3d)[n - 1](2), (s[0], *size)
    if how == 1:
        return (nn.AvgPool1d, nn.AvgPool2d, nn.AvgPool3d)[n - 1](2), (s[0], *size)
    if how == 2:
        return (nn.AdaptiveAvgPool1d, nn.AdaptiveAvgPool2d, nn.AdaptiveAvgPool3d)[n - 1](2), (
            s[0],
            *(2,) * n,
        )
    return (nn.AvgPool1d, nn.AvgPool2d, nn.AvgPool3d)[n - 1](3, 2, 1), (
        s[0],
        *((d - 1) // 2 + 1 for d in s[1:]),
    )


def _channels(rng: Rng, s: Shape) -> Made:
    c = s[0]
    ones = (1,) * (len(s) - 1)
    how = rng.randrange(5)
    if how == 0:
        return Layer(
            lambda m, x: x * m.f(x.flatten(2).mean(2)).sigmoid().view(-1, c, *ones),
            f=nn.Linear(c, c),
        ), s
    if how == 1:
        return Layer(lambda m, x: x * m.a, a=_p(c, *ones, scale=1.0)), s
    if how == 2 and c % 2 == 0:
        return Layer(lambda m, x: x.view(-1, 2, c // 2, *s[1:]).transpose(1, 2).reshape(-1, *s)), s
    if how == 3 and len(s) == 3 and s[1] * s[2] <= 25:
        return Layer(lambda m, x: F.interpolate(x, scale_factor=2.0, mode="nearest")), (
            c,
            2 * s[1],
            2 * s[2],
        )
    return Layer(lambda m, x: F.pad(x, (1, 0))), (*s[:-1], s[-1] + 1)


def _as_tokens(rng: Rng, s: Shape) -> Made:
    n = torch.Size(s[1:]).numel()
    return (Layer(lambda m, x: x.flatten(2).transpose(1, 2)), (n, s[0])) if n <= 16 else None


def _pool_all(rng: Rng, s: Shape) -> Made:
    return Layer(lambda m, x: x.flatten(2).mean(2)), (s[0],)


ANY: tuple[Maker, ...] = (
    _smooth,
    _smooth,
    _bent,
    _scalar,
    _pointwise,
    _affine,
    _last_norm,
    _residual,
    _sums,
)
FLAT: tuple[Maker, ...] = (_dense, _dense, _dense, _fold, _outer, _bilinear, _halves, _group_flat)
TOKENS: tuple[Maker, ...] = (
    _dense,
    _dense,
    _attention,
    _attention,
    _recurrent,
    _places,
    _time_first,
    _pool_tokens,
    _as_signal,
    _heads,
    _flatten,
)
IMAGES: tuple[Maker, ...] = (
    _convolution,
    _convolution,
    _convolution,
    _transposed,
    _channel_norm,
    _pooling,
    _channels,
    _as_tokens,
    _flatten,
    _pool_all,
)
BY_KIND = {"flat": FLAT, "tokens": TOKENS, "signal": IMAGES, "image": IMAGES, "volume": IMAGES}


@dataclass
class State:
    kind: str
    shape: Shape
    made: list[tuple[str, nn.Module, Shape, Shape]] = field(default_factory=list)


_KINDS: dict[Maker, str] = {
    _as_signal: "signal",
    _as_tokens: "tokens",
    _fold: "tokens",
    _outer: "tokens",
}


def _next_kind(kind: str, shape: Shape, maker: Maker) -> str:
    return "flat" if len(shape) == 1 else _KINDS.get(maker, kind)


def _layer(rng: Rng, s: Shape) -> Made:
    """A layer for a residual branch: (F,) or any shape."""
    return rng.choice((*ANY[:6], _dense) if len(s) < 3 else ANY[:6])(rng, s)


def _grow(rng: Rng, state: State) -> nn.Module | None:
    if state.made and rng.random() < 0.12:
        name, module, before, after = rng.choice(state.made)
        if (name, before) == (state.kind, state.shape) and after == before:
            return module  # parameters shared
    maker = rng.choice(ANY) if rng.random() < 0.4 else rng.choice(BY_KIND[state.kind])
    found = maker(rng, state.shape)
    if found is None:
        return None
    module, shape = found
    if torch.Size(shape).numel() > 500:
        return None
    state.made.append((state.kind, module, state.shape, shape))
    state.kind, state.shape = _next_kind(state.kind, shape, maker), shape
    return module


class Model(nn.Module):
    """``first`` (and ``second``, where there are two inputs) to scores or to a language head."""

    def __init__(self, rng: Rng) -> None:
        super().__init__()
        self.source = rng.choice(
            ["flat", "tokens", "indices", "indices", "signal", "image", "image", "volume"]
        )
        shape: Shape = {
            "flat": (rng.randint(3, 9),), "tokens": (rng.randint(2, 6), rng.randint(2, 6)), "indices": (rng.randint(2, 7),),
            "signal": (rng.randint(1, 4), rng.randint(6, 12)), "image": (rng.randint(1, 4), rng.randint(4, 8), rng.randint(4, 8)),
            "volume": (rng.randint(1, 3), 4, rng.randint(3, 5), 4),
        }[self.source]  # fmt: skip
        self.shape = shape
        state = State("tokens" if self.source == "indices" else self.source, shape)
        self.table: nn.Embedding | None = None
        self.tied = False
        if self.source == "indices":
            width = rng.choice([2, 4, 6])
            self.table = nn.Embedding(VOCABULARY, width, padding_idx=rng.choice([None, 0]))
            self.tied = rng.random() < 0.35
            state.shape = (*shape, width)
        self.two = not self.tied and rng.random() < 0.2
        layers: list[nn.Module] = []
        for _ in range(40):
            if len(layers) >= rng.randint(2, 6):
                break
            module = _grow(rng, state)
            if module is not None:
                layers.append(module)
        while len(state.shape) > 1:
            if self.tied and state.kind == "tokens":
                break
            maker: Maker = _pool_tokens if state.kind == "tokens" else _pool_all
            module, state.shape = maker(rng, state.shape)  # type: ignore[misc]
            layers.append(module)
        self.body = nn.ModuleList(layers)
        self.tied = self.tied and len(state.shape) == 2
        assert self.table is None or self.table.embedding_dim > 0
        self.loss_kind = rng.choice(["cross_entropy", "cross_entropy", "mse", "own"])
        if self.tied:
            assert self.table is not None
            self.bridge: nn.Module | None = nn.Linear(state.shape[-1], self.table.embedding_dim)
            self.loss_kind = "own"
        else:
            self.bridge = None
            self.side = nn.Linear(3, state.shape[0]) if self.two else None
            self.head = nn.Linear(state.shape[0], 3, bias=rng.random() < 0.7)
        trained = [p for p in self.parameters() if p.requires_grad]
        if rng.random() < 0.25:  # a frozen beginning
            for p in trained[: rng.randint(1, max(1, len(trained) // 2))]:
                p.requires_grad_(False)

    def forward(self, first: Tensor, second: Tensor | None = None) -> Any:
        x = first if self.table is None else self.table(first)
        for layer in self.body:
            x = layer(x)
        if self.tied:
            assert self.table is not None and self.bridge is not None
            return (self.bridge(x) @ self.table.weight.t()).log_softmax(-1).mean(1)
        if self.side is not None:
            x = x * self.side(second).tanh() + x
        return self.head(x)


def _own(scores: Tensor, target: Tensor) -> Tensor:
    return (scores.logsumexp(-1) - scores[:, 0]) * (1 + 0.1 * target) + 0.01 * scores.square().sum(
        -1
    )


@dataclass
class Graph:
    module: Model
    data: Callable[[int], dict[str, Tensor]]
    loss: Any


def graph(seed: int) -> Graph:
    """The random model of this number, its inputs for n records, and its loss."""
    rng = random.Random(seed)
    torch.manual_seed(seed)
    module = Model(rng)

    def data(n: int) -> dict[str, Tensor]:
        made = torch.Generator().manual_seed(seed + 1)
        out: dict[str, Tensor] = {}
        if module.source == "indices":
            out["first"] = torch.randint(VOCABULARY, (n, *module.shape), generator=made)
        else:
            out["first"] = torch.randn(n, *module.shape, generator=made)
        if module.two:
            out["second"] = torch.randn(n, 3, generator=made)
        if module.loss_kind == "mse":
            out["target"] = torch.randn(n, 3, generator=made)
        else:
            out["target"] = torch.randint(3, (n,), generator=made)
        return out

    return Graph(module, data, _own if module.loss_kind == "own" else module.loss_kind)
