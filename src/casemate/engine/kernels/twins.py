"""The kernels in plain torch: what they are tested against, and what runs where nothing compiles.

They say what each door is, with shapes and bounds. They run on any device. Their matrix products
are the BLAS's, so the bits of a record may depend on its place: a path that uses them is probed for
that (P13). Doors of convolutions take the parts of a :class:`Window` where ``w`` stands.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch.nn import functional

from casemate.engine.kernels.bounds import UNDERFLOW
from casemate.engine.kernels.window import Window, windowed

Tensor = torch.Tensor
_LANES = 16


def row_squares(x: Tensor) -> Tensor:
    """Sum of squares of each row of x (b, ...), added in float64; gamma: bounds.row_squares.

    Exact squares, all positive: no cancellation, and no overflow, whatever finite float32 comes in.
    """
    return x.double().square().flatten(1).sum(1)


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
    """(n2, S) for g (b, T, m), x (b, T, n): n2 = sum_{t,s} (x_t . x_s)(g_t . g_s).

    ``precise``: the dots in float64, else in float32; gamma: bounds.gram_pair. A record whose
    float32 dots could overflow is done in float64. Only pairs t <= s are computed.
    """
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


def needs(t: Tensor, dtype: torch.dtype) -> None:
    if t.dtype != dtype or not t.is_contiguous():
        raise TypeError(f"a contiguous {dtype} tensor is needed")


def _into(out: Tensor | None, formed: Tensor) -> Tensor:
    return formed if out is None else out.copy_(formed)


def formed_outer(g: Tensor, x: Tensor, out: Tensor | None = None) -> Tensor:
    """The gradients themselves, (b, m * n) float32, for g (b, T, m), x (b, T, n).

    Their squares: bounds.formed with S as for gram_pair, and bounds.formed_norm, which is far
    tighter where n is much below S. ``out``, if given, is filled and returned; fresh memory costs
    more than the arithmetic where few tokens make large gradients.
    """
    return _into(out, torch.bmm(g.transpose(1, 2), x).flatten(1))


def formed_sum(g: Tensor) -> Tensor:
    """sum_t g_t, (b, m) float32, for g (b, T, m): a bias. Error: bounds.formed_sum."""
    return g.double().sum(1).float()


def embedding_gram(
    index: Tensor, g: Tensor, padding_idx: int | None = None
) -> tuple[Tensor, Tensor]:
    """(n2, S) of an embedding's gradient for index (b, T) int64, g (b, T, m).

    n2 = sum over pairs of tokens with one index of g_t . g_s, S = sum_t |g_t|, both without tokens
    whose index is ``padding_idx``. Rows of one index are added in float64 and squared, which is
    cheaper than the masked Gram matrix and tighter; gamma: bounds.embedding_gram.
    """
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


def windows(x: Tensor, out: Sequence[int], w: Window) -> Tensor:
    """A view (b, C, *kernel, *out) of x (b, C, *spatial), padded with zeros: what each tap sees."""
    pads: list[int] = []
    for d in range(len(w.kernel)):
        reached = (out[d] - 1) * w.stride[d] + (w.kernel[d] - 1) * w.dilation[d] + 1
        pads = [w.padding[d], reached - x.shape[2 + d] - w.padding[d], *pads]
    x = functional.pad(x, pads).contiguous()
    steps = x.stride()[2:]
    return x.as_strided(
        (*x.shape[:2], *w.kernel, *out),
        (
            *x.stride()[:2],
            *(s * d for s, d in zip(steps, w.dilation, strict=True)),
            *(s * d for s, d in zip(steps, w.stride, strict=True)),
        ),
    )


def unfolded(x: Tensor, g: Tensor, w: Window) -> tuple[Tensor, Tensor]:
    """A convolution as tokens: windows (b * groups, n, T), gradients (b * groups, m, T)."""
    tokens = math.prod(g.shape[2:])
    seen = windows(x, g.shape[2:], w)
    rows = x.shape[1] // w.groups * math.prod(w.kernel)
    many = x.shape[0] * w.groups
    return seen.reshape(many, rows, tokens), g.reshape(many, g.shape[1] // w.groups, tokens)


@windowed()
def conv_formed(x: Tensor, g: Tensor, w: Window, out: Tensor | None = None) -> Tensor:
    """Weight gradients (b, O, C / groups, *kernel), float32, of a convolution in 1 to 3 dimensions.

    x (b, C, *in), g (b, O, *out), of any strides; ``transposed``: (b, C, O / groups, *kernel).
    Squares: bounds.formed(T, size) or formed_norm, S of :func:`conv_scale`. ``out`` as above.
    """
    # In whole vectors: a product of one row looks at where its operands begin.
    seen, gradient = (functional.pad(t, (0, -t.shape[2] % _LANES)) for t in unfolded(x, g, w))
    product = torch.bmm(gradient, seen.transpose(1, 2))
    return _into(out, product.reshape(x.shape[0], g.shape[1], x.shape[1] // w.groups, *w.kernel))


@windowed()
def conv_norms(x: Tensor, g: Tensor, w: Window) -> Tensor:
    """n2 of the same, forming each gradient tile by tile in registers and never writing it out.

    Costs the FLOPs of the plain weight gradient. gamma: bounds.conv_norms with :func:`conv_scale`;
    n2^(1/2) + bounds.formed_norm S is the tighter bound, for which a rough S will do.
    """
    return row_squares(conv_formed(x, g, *w))


def _by_group(x: Tensor, groups: int) -> Tensor:
    """Squares summed over each group's channels, (b, groups, *spatial)."""
    shape = (x.shape[0], groups, x.shape[1] // groups, *x.shape[2:])
    return x.double().square().reshape(shape).sum(2)


@windowed()
def conv_scale(x: Tensor, g: Tensor, w: Window) -> Tensor:
    """S of a convolution, float64 (b,): sum_t |g_t||u_t|, u_t the window; over groups, the root
    of the sum of squares."""
    b, taps, tokens = x.shape[0], math.prod(w.kernel), math.prod(g.shape[2:])
    squares = _by_group(x, w.groups)
    seen = windows(squares, g.shape[2:], w)
    u = seen.reshape(b, w.groups, taps, tokens).sum(2).sqrt()
    v = _by_group(g, w.groups).reshape(b, w.groups, tokens).sqrt()
    scale = (u * v).sum(2).square().sum(1).sqrt()
    n, m = x.shape[1] // w.groups * taps, g.shape[1] // w.groups
    return floored(scale, u.flatten(1).sum(1), v.flatten(1).sum(1), n, m, tokens * w.groups)


@windowed()
def conv_gram(x: Tensor, g: Tensor, w: Window, precise: bool = False) -> tuple[Tensor, Tensor]:
    """(n2, S) by Gram matrices over output positions: cheap where these are few.

    Compiled, with strides of 1 and one group: (u_t . u_s) is the padded input's Gram matrix summed
    over the taps along its diagonals, so nothing is unfolded. Else windows are written out and
    :func:`gram_pair` does it. ``precise``: dots in float64. gamma: bounds.conv_gram.
    """
    seen, out = unfolded(x, g, w)
    n2, scale = gram_pair(out.transpose(1, 2), seen.transpose(1, 2), precise)
    return n2.view(-1, w.groups).sum(1), scale.view(-1, w.groups).square().sum(1).sqrt()


def _scaled(g: Tensor, c: Tensor, keep: Tensor) -> Tensor:
    """c_i g_i; zeros where a record is not kept, whatever it holds."""
    shape = (-1,) + (1,) * (g.dim() - 1)
    return torch.where(keep.view(shape), g * c.view(shape), 0.0)


def accumulate(total: Tensor, part: Tensor, inverse_step: float) -> None:
    """total (d,) int64 += rint(part * inverse_step), part (d,) float32, the product in float64.

    ``inverse_step`` is a power of two, so that the product is exact; halves go to the even integer.
    What is not finite, or 2^62 and more, counts as zero.
    """
    needs(total, torch.int64)
    steps = part.double().mul_(inverse_step).round_()
    total += torch.where(steps.abs() < 2.0**62, steps, 0.0).to(torch.int64)


def finish(total: Tensor, factor: float, out: Tensor) -> None:
    """out (d,) float32 = total (d,) int64 * factor, in float64, rounded once more."""
    needs(total, torch.int64)
    needs(out, torch.float32)
    out.copy_(total.double().mul_(factor))


def weighted_sum(formed: Tensor, c: Tensor) -> Tensor:
    """sum_i c_i formed_i, (n,) float32, for formed (b, n), c (b,).

    A row of weight zero does not count, whatever it holds. Error: bounds.weighted_sum.
    """
    used = torch.where(c.unsqueeze(1) == 0, 0.0, formed).double()
    return torch.mv(used.t(), c.double()).float()


def contract(
    g: Tensor, x: Tensor, c: Tensor, keep: Tensor, chunk: int, out: Tensor | None = None
) -> Tensor:
    """sum_t c_t g_t x_t^T, (m, n) float32, for g (b * T, m), x (b * T, n), c and ``keep`` (b,).

    Tokens of a record that is not kept count as zeros, whatever they hold. At most ``chunk`` terms
    are added in float32 before their sum is; error: bounds.contract.
    """
    per = len(g) // len(c)
    weights, kept = c.repeat_interleave(per), keep.repeat_interleave(per)
    g = _scaled(g, weights, kept)
    x = torch.where(kept.unsqueeze(1), x, 0.0)
    made = torch.mm(g[:chunk].t(), x[:chunk])
    for first in range(chunk, len(g), chunk):
        made += torch.mm(g[first : first + chunk].t(), x[first : first + chunk])
    return _into(out, made)


@windowed(before=3)
def conv_contract(
    x: Tensor,
    g: Tensor,
    c: Tensor,
    keep: Tensor,
    chunk: int,
    w: Window,
    out: Tensor | None = None,
) -> Tensor:
    """The same of a convolution: its weight gradient with records weighted by c (b,)."""
    kept = keep.view(-1, *(1,) * (x.dim() - 1))
    x, g = torch.where(kept, x, 0.0), _scaled(g, c, keep)
    records = max(1, chunk // max(1, math.prod(g.shape[2:])))
    made = None
    for first in range(0, len(x), records):
        some = slice(first, first + records)
        seen, out_ = unfolded(x[some], g[some], w)
        count = len(x[some])

        def rows(t: Tensor, count: int = count) -> Tensor:
            """(groups, features, tokens of these records)"""
            return t.view(count, w.groups, *t.shape[1:]).permute(1, 2, 0, 3).flatten(2)

        seen, out_ = rows(seen), rows(out_)
        for t in range(0, seen.shape[2], chunk):
            part = torch.bmm(out_[..., t : t + chunk], seen[..., t : t + chunk].transpose(1, 2))
            made = part if made is None else made + part
    assert made is not None
    return _into(out, made.reshape(g.shape[1], x.shape[1] // w.groups, *w.kernel))


def embedding_add(
    total: Tensor,
    index: Tensor,
    g: Tensor,
    c: Tensor,
    keep: Tensor,
    inverse_step: float,
    padding_idx: int | None = None,
) -> None:
    """total (rows, m) int64 += rint(c_i A_i inverse_step) for each record i that is kept.

    A_i: the embedding's gradient for index (b, T), g (b, T, m) as :func:`embedding_gram` has it,
    added up in float64. Every record is rounded by itself, so that none moves another's entries.
    ``inverse_step`` is a power of two. Indices are not checked.
    """
    needs(total, torch.int64)
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
    """(dw, db), each (b, C), of a group norm's scale and shift, for g, x (b, C, ...), mean, rstd
    (b, G)."""
    size = g.shape[1] // mean.shape[1]
    g, x = g.flatten(2).double(), x.flatten(2).double()
    centre, scale = (t.double().repeat_interleave(size, 1) for t in (mean, rstd))
    dw = (g * (x - centre.unsqueeze(2))).sum(2) * scale
    return dw.float(), g.sum(2).float()


def token_affine(g: Tensor, x: Tensor, mean: Tensor, rstd: Tensor) -> tuple[Tensor, Tensor]:
    """(dw, db), each (b, m), of a layer norm's scale and shift, for g, x (b, T, m), mean, rstd
    (b, T)."""
    g = g.double()
    seen = (x.double() - mean.double().unsqueeze(2)) * rstd.double().unsqueeze(2)
    return (g * seen).sum(1).float(), g.sum(1).float()


def channel_sum(g: Tensor) -> Tensor:
    """Sums over all axes but the first two, (b, C) float32, for g (b, C, ...)."""
    return g.flatten(2).double().sum(2).float()
