"""The kernels of native/norms.cpp, on float32 tensors of the CPU.

A record is handled by the same instructions on its own memory, in an order that depends on the
shapes alone, so its result has the same bits in every slot and whatever the others hold (P13).
Doors and shapes: ``twins``. MemoryError when there is no room for scratch.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import math
from collections.abc import Callable, Iterator
from typing import Any, Final

import torch

from casemate.engine import native
from casemate.engine.kernels import twins
from casemate.engine.kernels.window import Window, windowed

Tensor = torch.Tensor
_P, _I, _D = ctypes.c_void_p, ctypes.c_int64, ctypes.c_double
_NO_PADDING = -(2**63)

# name -> what it takes, and whether it answers with a status. t: a tensor; i, d: a number; s: what
# _shape makes; f, e, q: a tensor that it fills, float32, float64 or int64. A tensor may be None.
DOORS: Final[dict[str, tuple[str, bool]]] = {
    "row_squares": ("tiie", False),
    "gram_pair": ("ttiiiiiee", True),
    "formed_outer": ("ttiiiif", True),
    "formed_sum": ("tiiif", True),
    "embedding": ("ttiiiiee", True),
    "conv": ("ttsef", True),
    "conv_scale": ("ttse", True),
    "conv_gram": ("ttsiee", True),
    "accumulate": ("qtid", False),
    "finish": ("tidf", False),
    "weighted_sum": ("tiitf", False),
    "contract": ("ttiiittiif", True),
    "conv_contract": ("ttsttif", True),
    "embedding_add": ("ttiiiittdq", True),
    "channel_affine": ("ttttiiiiff", False),
    "token_affine": ("ttttiiiiff", False),
}
_ARGUMENTS: Final = {"i": _I, "d": _D}


@functools.cache
def library() -> ctypes.CDLL | None:
    """The helper with its doors declared; None where it cannot be had."""
    found = native.library("norms")
    if found is not None:
        for name, (takes, status) in DOORS.items():
            door = getattr(found, "norms_" + name)
            door.argtypes = [_ARGUMENTS.get(kind, _P) for kind in takes]
            door.restype = ctypes.c_int if status else None
    return found


def _run(name: str, *arguments: Any) -> None:
    given = [a.data_ptr() if isinstance(a, Tensor) else a for a in arguments]
    if getattr(library(), "norms_" + name)(*given):
        raise MemoryError("no room for a kernel's scratch")


_call: Callable[..., None] = _run


def noting() -> bool:
    """Whether another call than the helper's is at work."""
    return _call is not _run


@contextlib.contextmanager
def routed(call: Callable[..., None]) -> Iterator[None]:
    """Have ``call(name, *arguments)`` in place of the helper: how a step is noted for compiling."""
    global _call
    held, _call = _call, call
    try:
        yield
    finally:
        _call = held


def _doubles(like: Tensor) -> Tensor:
    return torch.empty(like.shape[0], dtype=torch.float64)


def _filled(out: Tensor | None, shape: tuple[int, ...]) -> Tensor:
    if out is None:
        return torch.empty(shape)
    if out.shape != shape or out.dtype != torch.float32 or not out.is_contiguous():
        raise TypeError(f"out: a contiguous float32 tensor of shape {shape} is needed")
    return out


def row_squares(x: Tensor) -> Tensor:
    x = x.contiguous()
    out = _doubles(x)
    _call("row_squares", x, len(x), math.prod(x.shape[1:]), out)
    return out


def gram_pair(g: Tensor, x: Tensor, precise: bool = False) -> tuple[Tensor, Tensor]:
    g, x = g.contiguous(), x.contiguous()
    b, tokens, m = g.shape
    n2, scale = _doubles(g), _doubles(g)
    _call("gram_pair", g, x, b, tokens, m, x.shape[2], int(precise), n2, scale)
    return n2, scale


def formed_outer(g: Tensor, x: Tensor, out: Tensor | None = None) -> Tensor:
    g, x = g.contiguous(), x.contiguous()
    (b, tokens, m), n = g.shape, x.shape[2]
    out = _filled(out, (b, m * n))
    _call("formed_outer", g, x, b, tokens, m, n, out)
    return out


def formed_sum(g: Tensor) -> Tensor:
    g = g.contiguous()
    out = torch.empty((g.shape[0], g.shape[2]))
    _call("formed_sum", g, *g.shape, out)
    return out


def embedding_gram(
    index: Tensor, g: Tensor, padding_idx: int | None = None
) -> tuple[Tensor, Tensor]:
    index, g = index.long().contiguous(), g.contiguous()
    n2, scale = _doubles(g), _doubles(g)
    none = _NO_PADDING if padding_idx is None else padding_idx
    _call("embedding", index, g, *g.shape, none, n2, scale)
    return n2, scale


def _strides(t: Tensor, dims: int) -> list[int]:
    """Strides of record, channel and three spatial axes; axes of one entry continue the next."""
    space = [1] * (3 - dims) + list(t.shape[2:])
    steps = [0] * (3 - dims) + list(t.stride()[2:])
    for d in (2, 1, 0):
        if space[d] == 1:
            steps[d] = steps[d + 1] * space[d + 1] if d < 2 else 1
    return [t.stride(0), t.stride(1), *steps]


@functools.lru_cache(maxsize=512)
def packed(values: tuple[int, ...]) -> ctypes.Array[ctypes.c_int64]:
    return (_I * len(values))(*values)


def _shape(x: Tensor, g: Tensor, w: Window) -> ctypes.Array[ctypes.c_int64]:
    dims = len(w.kernel)
    lead = [1] * (3 - dims)
    return packed(
        (
            x.shape[0], x.shape[1], g.shape[1], w.groups, *lead, *x.shape[2:], *lead, *g.shape[2:],
            *lead, *w.kernel, *lead, *w.stride, *([0] * (3 - dims)), *w.padding, *lead, *w.dilation,
            *_strides(x, dims), *_strides(g, dims),
        )
    )  # fmt: skip


def _rows(x: Tensor, g: Tensor, w: Window) -> bool:
    """Whether a convolution is a product of rows as they lie in memory: one tap, channels last."""
    one = w.groups == 1 and (*w.kernel, *w.stride) == (1,) * 2 * len(w.kernel)
    return one and not any(w.padding) and x.shape[2:] == g.shape[2:] and _last(x) and _last(g)


def _tokens(t: Tensor) -> Tensor:
    return t.movedim(1, -1).flatten(1, -2)


@windowed()
def conv_formed(x: Tensor, g: Tensor, w: Window, out: Tensor | None = None) -> Tensor:
    shape = _shape(x, g, w)
    out = _filled(out, (x.shape[0], g.shape[1], x.shape[1] // w.groups, *w.kernel))
    if x.shape[1] % 16 == 0 and _rows(x, g, w):
        formed_outer(_tokens(g), _tokens(x), out.view(len(x), -1))
        return out
    _call("conv", x, g, shape, None, out)
    return out


@windowed()
def conv_norms(x: Tensor, g: Tensor, w: Window) -> Tensor:
    shape = _shape(x, g, w)
    out = _doubles(x)
    _call("conv", x, g, shape, out, None)
    return out


@windowed()
def conv_scale(x: Tensor, g: Tensor, w: Window) -> Tensor:
    shape = _shape(x, g, w)
    out = _doubles(x)
    _call("conv_scale", x, g, shape, out)
    return out


@windowed()
def conv_gram(x: Tensor, g: Tensor, w: Window, precise: bool = False) -> tuple[Tensor, Tensor]:
    if w.groups != 1 or any(s != 1 for s in w.stride):
        seen, out = twins.unfolded(x, g, w)
        n2, scale = gram_pair(out.transpose(1, 2), seen.transpose(1, 2), precise)
        return n2.view(-1, w.groups).sum(1), scale.view(-1, w.groups).square().sum(1).sqrt()
    n2, scale = _doubles(x), _doubles(x)
    _call("conv_gram", x, g, _shape(x, g, w), int(precise), n2, scale)
    if noting():  # what overflows is not finite there, and counts as nothing
        return torch.where(torch.isfinite(scale), n2, scale), scale
    for i in (~torch.isfinite(n2) & torch.isfinite(scale)).nonzero().flatten().tolist():
        seen, out = twins.unfolded(x[i : i + 1], g[i : i + 1], w)
        n2[i] = gram_pair(out.transpose(1, 2), seen.transpose(1, 2), precise=True)[0][0]
    return torch.where(torch.isfinite(scale), n2, scale), scale


def accumulate(total: Tensor, part: Tensor, inverse_step: float) -> None:
    twins.needs(total, torch.int64)
    part = part.contiguous()
    _call("accumulate", total, part, total.numel(), inverse_step)


def finish(total: Tensor, factor: float, out: Tensor) -> None:
    twins.needs(total, torch.int64)
    twins.needs(out, torch.float32)
    _call("finish", total, total.numel(), factor, out)


def weighted_sum(formed: Tensor, c: Tensor) -> Tensor:
    formed, c = formed.contiguous(), c.contiguous()
    out = torch.empty(formed.shape[1])
    _call("weighted_sum", formed, *formed.shape, c, out)
    return out


def contract(
    g: Tensor, x: Tensor, c: Tensor, keep: Tensor, chunk: int, out: Tensor | None = None
) -> Tensor:
    g, x, c, keep = g.contiguous(), x.contiguous(), c.contiguous(), keep.contiguous()
    (count, m), n = g.shape, x.shape[1]
    if n < min(m, 64) and _idle(m) * n <= _idle(n) * m:  # vectors lie along the longer side
        turned = contract(x, g, c, keep, chunk).t()
        return turned.contiguous() if out is None else out.copy_(turned)
    out = _filled(out, (m, n))
    _call("contract", g, x, count, m, n, c, keep, count // len(c), chunk, out)
    return out


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
    c, keep = c.contiguous(), keep.contiguous()
    outputs, inputs = g.shape[1], x.shape[1]
    if inputs >= 64 and _rows(x, g, w):
        sides = _tokens(g).flatten(0, 1), _tokens(x).flatten(0, 1)
        out = _filled(out, (outputs, inputs, *w.kernel))
        contract(*sides, c, keep, chunk, out.view(outputs, inputs))
        return out
    point = (
        w.groups == 1 and (*w.kernel, *w.stride) == (1,) * 2 * len(w.kernel) and not any(w.padding)
    )
    if point and x.shape[2:] == g.shape[2:] and _idle(outputs) * inputs > _idle(inputs) * outputs:
        turned = conv_contract(g, x, c, keep, chunk, *w)
        turned = turned.transpose(0, 1)
        return turned.contiguous() if out is None else out.copy_(turned)
    shape = _shape(x, g, w)
    out = _filled(out, (outputs, inputs // w.groups, *w.kernel))
    _call("conv_contract", x, g, shape, c, keep, chunk, out)
    return out


def _idle(count: int) -> int:
    """``count`` in whole vectors."""
    return -(-count // 16) * 16


def embedding_add(
    total: Tensor,
    index: Tensor,
    g: Tensor,
    c: Tensor,
    keep: Tensor,
    inverse_step: float,
    padding_idx: int | None = None,
) -> None:
    twins.needs(total, torch.int64)
    index, g = index.long().contiguous(), g.contiguous()
    c, keep = c.contiguous(), keep.contiguous()
    none = _NO_PADDING if padding_idx is None else padding_idx
    _call("embedding_add", index, g, *g.shape, none, c, keep, inverse_step, total)


def channel_affine(g: Tensor, x: Tensor, mean: Tensor, rstd: Tensor) -> tuple[Tensor, Tensor]:
    (b, channels), groups = g.shape[:2], mean.shape[1]
    mean, rstd = mean.contiguous(), rstd.contiguous()
    dw, db = torch.empty((b, channels)), torch.empty((b, channels))
    positions = math.prod(g.shape[2:])
    if g.is_contiguous() or not _last(g):
        g, x = g.contiguous(), x.contiguous()
        _call(
            "channel_affine", g, x, mean, rstd, b,
            channels, positions, groups, dw, db,
        )  # fmt: skip
    else:
        g, x = (t.movedim(1, -1).contiguous() for t in (g, x))
        _call(
            "token_affine", g, x, mean, rstd, b,
            positions, channels, groups, dw, db,
        )  # fmt: skip
    return dw, db


def _last(t: Tensor) -> bool:
    """Whether channels are last in memory."""
    return t.dim() > 2 and t.movedim(1, -1).is_contiguous()


def token_affine(g: Tensor, x: Tensor, mean: Tensor, rstd: Tensor) -> tuple[Tensor, Tensor]:
    g, x, mean, rstd = g.contiguous(), x.contiguous(), mean.contiguous(), rstd.contiguous()
    b, tokens, m = g.shape
    dw, db = torch.empty((b, m)), torch.empty((b, m))
    _call("token_affine", g, x, mean, rstd, b, tokens, m, 0, dw, db)
    return dw, db


def channel_sum(g: Tensor) -> Tensor:
    if not g.is_contiguous() and _last(g):
        return formed_sum(g.movedim(1, -1).flatten(1, -2))
    g = g.contiguous()
    out = torch.empty(g.shape[:2])
    _call("channel_affine", g, None, None, None, *g.shape[:2], math.prod(g.shape[2:]), 1, None, out)
    return out
