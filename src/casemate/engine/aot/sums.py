"""Sums over a record's entries, in float64.

What AOTInductor writes adds one entry after another. In float32 that loses digits that the engine's
kernels keep, which add in vectors; in float64 it takes as long and loses none. So reductions, the
norm layers and adaptive average pooling are noted as sums in float64, rounded to float32 once.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Final

import torch
from torch._decomp import decompositions

Tensor = torch.Tensor
_WIDE: Final = torch.float64


def _sum(x: Tensor, dims: list[int], keepdim: bool = False, *, dtype: Any = None) -> Any:
    if x.dtype != torch.float32 or dtype is not None:
        return NotImplemented
    return torch.sum(x, dims, keepdim, dtype=_WIDE).float()


def _mean(x: Tensor, dims: list[int], keepdim: bool = False, *, dtype: Any = None) -> Tensor:
    count = math.prod(x.shape[d] for d in dims)
    return (torch.sum(x, dims, keepdim, dtype=_WIDE) / count).float()


def _product(a: Tensor, b: Tensor) -> Any:
    """In float64 alone, which the runtime's products are not in."""
    return (a.unsqueeze(2) * b).sum(1) if a.dtype == _WIDE else NotImplemented


def _normal(x: Tensor, dims: list[int], eps: float) -> tuple[Tensor, Tensor, Tensor]:
    """x less its mean over its deviation, float64; the mean; one over the deviation."""
    x, count = x.to(_WIDE), math.prod(x.shape[d] for d in dims)
    mean = x.sum(dims, keepdim=True) / count
    centred = x - mean
    rstd = torch.rsqrt(centred.square().sum(dims, keepdim=True) / count + eps)
    return centred * rstd, mean.float(), rstd.float()


def _group_norm(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, n: int, c: int, _: int, groups: int,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    y, mean, rstd = _normal(x.reshape(n, groups, c // groups, -1), [2, 3], eps)
    of_channel = (groups, c // groups, 1)
    if weight is not None:
        y = y * weight.view(of_channel)
    if bias is not None:
        y = y + bias.view(of_channel)
    return y.float().view(x.shape), mean.view(n, groups), rstd.view(n, groups)


def _layer_norm(
    x: Tensor, shape: Sequence[int], weight: Tensor | None, bias: Tensor | None, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    y, mean, rstd = _normal(x, list(range(-len(shape), 0)), eps)
    if weight is not None:
        y = y * weight
    if bias is not None:
        y = y + bias
    return y.float(), mean, rstd


def _shares(size: int, out: int) -> Tensor:
    """(out, size): by output place of adaptive average pooling, each entry's share in it."""
    at = torch.arange(out).unsqueeze(1)
    first, behind = at * size // out, ((at + 1) * size + out - 1) // out
    entry = torch.arange(size)
    there = (entry >= first) & (entry < behind)
    return there.to(_WIDE) / (behind - first)


def _pooled(x: Tensor, shares: Sequence[Tensor]) -> Tensor:
    """Each of the last axes of x, (..., in), times its matrix, (out, in)."""
    x = x.to(_WIDE)
    for axis, share in zip(range(-len(shares), 0), shares, strict=True):
        x = (x.movedim(axis, -1).unsqueeze(-2) * share).sum(-1).movedim(-1, axis)
    return x.float()


def _adaptive_average(x: Tensor, out: Sequence[int]) -> Tensor:
    sizes = x.shape[-len(out) :]
    return _pooled(x, [_shares(n, o) for n, o in zip(sizes, out, strict=True)])


def _adaptive_average_backward(axes: int) -> Callable[[Tensor, Tensor], Tensor]:
    def run(g: Tensor, x: Tensor) -> Tensor:
        sizes = zip(x.shape[-axes:], g.shape[-axes:], strict=True)
        return _pooled(g, [_shares(n, o).t() for n, o in sizes])

    return run


def _widened(made: Callable[..., Any]) -> Callable[..., Any]:
    """A decomposition of torch's, in float64."""

    def run(*given: Any) -> Any:
        wide = [
            a.to(_WIDE) if isinstance(a, Tensor) and a.is_floating_point() else a for a in given
        ]
        return tuple(None if t is None else t.float() for t in made(*wide))

    return run


_ATEN: Final = torch.ops.aten
TABLE: Final[Mapping[Any, Callable[..., Any]]] = {
    _ATEN.sum.dim_IntList: _sum,
    _ATEN.mean.dim: _mean,
    _ATEN.mm.default: _product,
    _ATEN.native_group_norm.default: _group_norm,
    _ATEN.native_layer_norm.default: _layer_norm,
    _ATEN.native_group_norm_backward.default: _widened(decompositions.native_group_norm_backward),
    _ATEN.native_layer_norm_backward.default: _widened(decompositions.native_layer_norm_backward),
    # Whose gradient inductor has no code for.
    _ATEN._adaptive_avg_pool2d.default: _adaptive_average,
    _ATEN._adaptive_avg_pool3d.default: _adaptive_average,
    _ATEN._adaptive_avg_pool2d_backward.default: _adaptive_average_backward(2),
    _ATEN._adaptive_avg_pool3d_backward.default: _adaptive_average_backward(3),
}
