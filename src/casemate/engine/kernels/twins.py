"""The kernels in plain torch: what they are tested against, and what runs where nothing compiles.

They run on any device. Their matrix products are the BLAS's, so the bits of a record may depend on
its place: a path that uses them is probed for that (P13). Doors and shapes: the package's page.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch.nn import functional

from casemate.engine.kernels.bounds import UNDERFLOW

Tensor = torch.Tensor


def row_squares(x: Tensor) -> Tensor:
    return x.double().square().flatten(1).sum(1)


def rank_one(g: Tensor, x: Tensor) -> Tensor:
    return row_squares(g) * row_squares(x)


def _lengths(x: Tensor) -> Tensor:
    return x.double().square().sum(-1).sqrt()


def floored(scale: Tensor, u: Tensor, v: Tensor, n: int, m: int, tokens: int) -> Tensor:
    """S (b,) with the floor of bounds.py; ``u``, ``v``: sums of lengths of inputs and gradients."""
    floor = UNDERFLOW * (n * v.square() + m * u.square())
    return (scale.square() + floor + UNDERFLOW**2 * tokens**2 * n * m).sqrt()


def _pair(x: Tensor, g: Tensor, y: Tensor, h: Tensor) -> Tensor:
    rows = torch.bmm(x, y.transpose(1, 2)).double()
    return rows.mul_(torch.bmm(g, h.transpose(1, 2)).double()).flatten(1).sum(1)


def _pairs(x: Tensor, g: Tensor) -> Tensor:
    half = x.shape[1] // 2
    if half < 16:
        return _pair(x, g, x, g)
    x1, x2, g1, g2 = x[:, :half], x[:, half:], g[:, :half], g[:, half:]
    return _pair(x1, g1, x1, g1) + 2.0 * _pair(x1, g1, x2, g2) + _pair(x2, g2, x2, g2)


def gram_pair(g: Tensor, x: Tensor, precise: bool = False) -> tuple[Tensor, Tensor]:
    u, v = _lengths(x), _lengths(g)
    scale, tokens = (u * v).sum(1), x.shape[1]
    out = floored(scale, u.sum(1), v.sum(1), x.shape[2], g.shape[2], tokens)
    if precise:
        return _finite(_pairs(x.double(), g.double()), scale), out
    n2 = _pairs(x, g)
    again = ~torch.isfinite(n2) & torch.isfinite(scale)
    if bool(again.any()):
        n2[again] = _pairs(x[again].double(), g[again].double())
    return _finite(n2, scale), out


def _finite(n2: Tensor, scale: Tensor) -> Tensor:
    """n2, but not finite where an operand is not."""
    return torch.where(torch.isfinite(scale), n2, scale)


def _into(out: Tensor | None, formed: Tensor) -> Tensor:
    return formed if out is None else out.copy_(formed)


def formed_outer(g: Tensor, x: Tensor, out: Tensor | None = None) -> Tensor:
    return _into(out, torch.bmm(g.transpose(1, 2), x).flatten(1))


def formed_sum(g: Tensor) -> Tensor:
    return g.double().sum(1).float()


def embedding_gram(
    index: Tensor, g: Tensor, padding_idx: int | None = None
) -> tuple[Tensor, Tensor]:
    b, _, m = g.shape
    used = torch.ones_like(index, dtype=torch.bool)
    if padding_idx is not None:
        used = index != padding_idx
    record = torch.arange(b, device=g.device).unsqueeze(1).expand_as(index)[used]
    pairs = torch.stack((record, index[used]), 1)
    owners, inverse = torch.unique(pairs, dim=0, return_inverse=True)
    rows = g.new_zeros((len(owners), m), dtype=torch.float64)
    rows.index_add_(0, inverse, g[used].double())
    n2 = g.new_zeros(b, dtype=torch.float64)
    n2.index_add_(0, owners[:, 0], rows.square().sum(1))
    return n2, torch.where(used, _lengths(g), 0.0).sum(1)


def windows(
    x: Tensor,
    out: Sequence[int],
    kernel: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
) -> Tensor:
    """A view (b, C, *kernel, *out) of x (b, C, *spatial), padded with zeros: what each tap sees."""
    pads: list[int] = []
    for d in range(len(kernel)):
        reached = (out[d] - 1) * stride[d] + (kernel[d] - 1) * dilation[d] + 1
        pads = [padding[d], reached - x.shape[2 + d] - padding[d], *pads]
    x = functional.pad(x, pads).contiguous()
    steps = x.stride()[2:]
    return x.as_strided(
        (*x.shape[:2], *kernel, *out),
        (
            *x.stride()[:2],
            *(s * d for s, d in zip(steps, dilation, strict=True)),
            *(s * d for s, d in zip(steps, stride, strict=True)),
        ),
    )


def unfolded(
    x: Tensor,
    g: Tensor,
    kernel: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
) -> tuple[Tensor, Tensor]:
    """A convolution as tokens: windows (b * groups, n, T), gradients (b * groups, m, T)."""
    tokens = math.prod(g.shape[2:])
    seen = windows(x, g.shape[2:], kernel, stride, padding, dilation)
    rows = x.shape[1] // groups * math.prod(kernel)
    many = x.shape[0] * groups
    return seen.reshape(many, rows, tokens), g.reshape(many, g.shape[1] // groups, tokens)


def conv_formed(
    x: Tensor,
    g: Tensor,
    kernel: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int = 1,
    transposed: bool = False,
    out: Tensor | None = None,
) -> Tensor:
    if transposed:
        x, g = g, x
    seen, gradient = unfolded(x, g, kernel, stride, padding, dilation, groups)
    product = torch.bmm(gradient, seen.transpose(1, 2))
    return _into(out, product.reshape(x.shape[0], g.shape[1], x.shape[1] // groups, *kernel))


def conv_norms(
    x: Tensor,
    g: Tensor,
    kernel: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int = 1,
    transposed: bool = False,
) -> Tensor:
    return row_squares(conv_formed(x, g, kernel, stride, padding, dilation, groups, transposed))


def _by_group(x: Tensor, groups: int) -> Tensor:
    """Squares summed over each group's channels, (b, groups, *spatial)."""
    shape = (x.shape[0], groups, x.shape[1] // groups, *x.shape[2:])
    return x.double().square().reshape(shape).sum(2)


def conv_scale(
    x: Tensor,
    g: Tensor,
    kernel: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int = 1,
    transposed: bool = False,
) -> Tensor:
    if transposed:
        x, g = g, x
    b, taps, tokens = x.shape[0], math.prod(kernel), math.prod(g.shape[2:])
    squares = _by_group(x, groups)
    seen = windows(squares, g.shape[2:], kernel, stride, padding, dilation)
    u = seen.reshape(b, groups, taps, tokens).sum(2).sqrt()
    v = _by_group(g, groups).reshape(b, groups, tokens).sqrt()
    scale = (u * v).sum(2).square().sum(1).sqrt()
    n, m = x.shape[1] // groups * taps, g.shape[1] // groups
    return floored(scale, u.flatten(1).sum(1), v.flatten(1).sum(1), n, m, tokens * groups)


def conv_gram(
    x: Tensor,
    g: Tensor,
    kernel: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int = 1,
    transposed: bool = False,
) -> tuple[Tensor, Tensor]:
    if transposed:
        x, g = g, x
    seen, out = unfolded(x, g, kernel, stride, padding, dilation, groups)
    n2, scale = gram_pair(out.transpose(1, 2), seen.transpose(1, 2))
    return n2.view(-1, groups).sum(1), scale.view(-1, groups).square().sum(1).sqrt()


def scale_rows(g: Tensor, c: Tensor, keep: Tensor, out: Tensor | None = None) -> Tensor:
    shape = (-1,) + (1,) * (g.dim() - 1)
    scaled = torch.where(keep.view(shape), g * c.view(shape), 0.0)
    return scaled if out is None else out.copy_(scaled)


def accumulate(total: Tensor, part: Tensor, inverse_step: float) -> None:
    steps = part.double().mul_(inverse_step).round_()
    total += torch.where(steps.abs() < 2.0**62, steps, 0.0).to(torch.int64)


def finish(total: Tensor, factor: float, out: Tensor) -> None:
    out.copy_(total.double().mul_(factor))


def weighted_sum(formed: Tensor, c: Tensor) -> Tensor:
    used = torch.where(c.unsqueeze(1) == 0, 0.0, formed).double()
    return torch.mv(used.t(), c.double()).float()


def contract(
    g: Tensor, x: Tensor, c: Tensor, keep: Tensor, chunk: int, out: Tensor | None = None
) -> Tensor:
    per = len(g) // len(c)
    weights, kept = c.repeat_interleave(per), keep.repeat_interleave(per)
    g = scale_rows(g, weights, kept)
    x = torch.where(kept.unsqueeze(1), x, 0.0)
    made = torch.mm(g[:chunk].t(), x[:chunk])
    for first in range(chunk, len(g), chunk):
        made += torch.mm(g[first : first + chunk].t(), x[first : first + chunk])
    return _into(out, made)


def conv_contract(
    x: Tensor,
    g: Tensor,
    c: Tensor,
    keep: Tensor,
    chunk: int,
    kernel: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int = 1,
    transposed: bool = False,
    out: Tensor | None = None,
) -> Tensor:
    if transposed:
        x, g = g, x
    kept = keep.view(-1, *(1,) * (x.dim() - 1))
    x, g = torch.where(kept, x, 0.0), scale_rows(g, c, keep)
    records = max(1, chunk // max(1, math.prod(g.shape[2:])))
    made = None
    for first in range(0, len(x), records):
        some = slice(first, first + records)
        seen, out_ = unfolded(x[some], g[some], kernel, stride, padding, dilation, groups)
        count = len(x[some])

        def rows(t: Tensor, count: int = count) -> Tensor:
            """(groups, features, tokens of these records)"""
            return t.view(count, groups, *t.shape[1:]).permute(1, 2, 0, 3).flatten(2)

        seen, out_ = rows(seen), rows(out_)
        for t in range(0, seen.shape[2], chunk):
            part = torch.bmm(out_[..., t : t + chunk], seen[..., t : t + chunk].transpose(1, 2))
            made = part if made is None else made + part
    assert made is not None
    return _into(out, made.reshape(g.shape[1], x.shape[1] // groups, *kernel))


def embedding_add(
    total: Tensor,
    index: Tensor,
    g: Tensor,
    c: Tensor,
    keep: Tensor,
    inverse_step: float,
    padding_idx: int | None = None,
) -> None:
    used = keep.unsqueeze(1).expand_as(index)
    if padding_idx is not None:
        used = used & (index != padding_idx)
    record = torch.arange(len(index), device=g.device).unsqueeze(1).expand_as(index)[used]
    owners, inverse = torch.unique(
        torch.stack((record, index[used]), 1), dim=0, return_inverse=True
    )
    rows = g.new_zeros((len(owners), g.shape[2]), dtype=torch.float64)
    rows.index_add_(0, inverse, g[used].double())
    steps = (rows * (c.double() * inverse_step)[owners[:, 0]].unsqueeze(1)).round_()
    steps = torch.where(steps.abs() < 2.0**62, steps, 0.0).to(torch.int64)
    total.index_add_(0, owners[:, 1], steps)


def channel_affine(g: Tensor, x: Tensor, mean: Tensor, rstd: Tensor) -> tuple[Tensor, Tensor]:
    size = g.shape[1] // mean.shape[1]
    g, x = g.flatten(2).double(), x.flatten(2).double()
    centre, scale = (t.double().repeat_interleave(size, 1) for t in (mean, rstd))
    dw = (g * (x - centre.unsqueeze(2))).sum(2) * scale
    return dw.float(), g.sum(2).float()


def token_affine(g: Tensor, x: Tensor, mean: Tensor, rstd: Tensor) -> tuple[Tensor, Tensor]:
    g = g.double()
    seen = (x.double() - mean.double().unsqueeze(2)) * rstd.double().unsqueeze(2)
    return (g * seen).sum(1).float(), g.sum(1).float()


def channel_sum(g: Tensor) -> Tensor:
    return g.flatten(2).double().sum(2).float()
