"""The kernels of native/norms.cpp, on float32 tensors of the CPU.

A record is handled by the same instructions on its own memory, in an order that depends on the
shapes alone, so its result has the same bits in every slot and whatever the others hold (P13).
Doors and shapes: ``twins``. MemoryError when there is no room for scratch.
"""

from __future__ import annotations

import ctypes
import functools
import math

import torch

from casemate.engine import native
from casemate.engine.kernels import twins
from casemate.engine.kernels.window import Window, windowed

Tensor = torch.Tensor
_P, _I, _D = ctypes.c_void_p, ctypes.c_int64, ctypes.c_double
_NO_PADDING = -(2**63)

# name -> argument types, and whether it answers with a status
_DOORS: dict[str, tuple[tuple[type, ...], bool]] = {
    "row_squares": ((_P, _I, _I, _P), False),
    "gram_pair": ((_P, _P, _I, _I, _I, _I, ctypes.c_int, _P, _P), True),
    "formed_outer": ((_P, _P, _I, _I, _I, _I, _P), True),
    "formed_sum": ((_P, _I, _I, _I, _P), True),
    "embedding": ((_P, _P, _I, _I, _I, _I, _P, _P), True),
    "conv": ((_P, _P, _P, _P, _P), True),
    "conv_scale": ((_P, _P, _P, _P), True),
    "conv_gram": ((_P, _P, _P, ctypes.c_int, _P, _P), True),
    "accumulate": ((_P, _P, _I, _D), False),
    "finish": ((_P, _I, _D, _P), False),
    "weighted_sum": ((_P, _I, _I, _P, _P), False),
    "contract": ((_P, _P, _I, _I, _I, _P, _P, _I, _I, _P), True),
    "conv_contract": ((_P, _P, _P, _P, _P, _I, _P), True),
    "embedding_add": ((_P, _P, _I, _I, _I, _I, _P, _P, _D, _P), True),
    "channel_affine": ((_P, _P, _P, _P, _I, _I, _I, _I, _P, _P), False),
    "token_affine": ((_P, _P, _P, _P, _I, _I, _I, _I, _P, _P), False),
}


@functools.cache
def library() -> ctypes.CDLL | None:
    """The helper with its doors declared; None where it cannot be had."""
    found = native.library("norms")
    if found is not None:
        for name, (arguments, status) in _DOORS.items():
            door = getattr(found, "norms_" + name)
            door.argtypes = arguments
            door.restype = ctypes.c_int if status else None
    return found


def _call(name: str, *arguments: object) -> None:
    if getattr(library(), "norms_" + name)(*arguments):
        raise MemoryError("no room for a kernel's scratch")


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
    _call("row_squares", x.data_ptr(), len(x), math.prod(x.shape[1:]), out.data_ptr())
    return out


def gram_pair(g: Tensor, x: Tensor, precise: bool = False) -> tuple[Tensor, Tensor]:
    g, x = g.contiguous(), x.contiguous()
    b, tokens, m = g.shape
    n2, scale = _doubles(g), _doubles(g)
    _call(
        "gram_pair", g.data_ptr(), x.data_ptr(), b, tokens, m, x.shape[2], int(precise),
        n2.data_ptr(), scale.data_ptr(),
    )  # fmt: skip
    return n2, scale


def formed_outer(g: Tensor, x: Tensor, out: Tensor | None = None) -> Tensor:
    g, x = g.contiguous(), x.contiguous()
    (b, tokens, m), n = g.shape, x.shape[2]
    out = _filled(out, (b, m * n))
    _call("formed_outer", g.data_ptr(), x.data_ptr(), b, tokens, m, n, out.data_ptr())
    return out


def formed_sum(g: Tensor) -> Tensor:
    g = g.contiguous()
    out = torch.empty((g.shape[0], g.shape[2]))
    _call("formed_sum", g.data_ptr(), *g.shape, out.data_ptr())
    return out


def embedding_gram(
    index: Tensor, g: Tensor, padding_idx: int | None = None
) -> tuple[Tensor, Tensor]:
    index, g = index.long().contiguous(), g.contiguous()
    n2, scale = _doubles(g), _doubles(g)
    none = _NO_PADDING if padding_idx is None else padding_idx
    _call(
        "embedding", index.data_ptr(), g.data_ptr(), *g.shape, none, n2.data_ptr(),
        scale.data_ptr(),
    )  # fmt: skip
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
def _packed(values: tuple[int, ...]) -> ctypes.Array[ctypes.c_int64]:
    return (_I * len(values))(*values)


def _shape(x: Tensor, g: Tensor, w: Window) -> ctypes.Array[ctypes.c_int64]:
    dims = len(w.kernel)
    lead = [1] * (3 - dims)
    return _packed(
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
    _call("conv", x.data_ptr(), g.data_ptr(), shape, None, out.data_ptr())
    return out


@windowed()
def conv_norms(x: Tensor, g: Tensor, w: Window) -> Tensor:
    shape = _shape(x, g, w)
    out = _doubles(x)
    _call("conv", x.data_ptr(), g.data_ptr(), shape, out.data_ptr(), None)
    return out


@windowed()
def conv_scale(x: Tensor, g: Tensor, w: Window) -> Tensor:
    shape = _shape(x, g, w)
    out = _doubles(x)
    _call("conv_scale", x.data_ptr(), g.data_ptr(), shape, out.data_ptr())
    return out


@windowed()
def conv_gram(x: Tensor, g: Tensor, w: Window, precise: bool = False) -> tuple[Tensor, Tensor]:
    if w.groups != 1 or any(s != 1 for s in w.stride):
        seen, out = twins.unfolded(x, g, w)
        n2, scale = gram_pair(out.transpose(1, 2), seen.transpose(1, 2), precise)
        return n2.view(-1, w.groups).sum(1), scale.view(-1, w.groups).square().sum(1).sqrt()
    n2, scale = _doubles(x), _doubles(x)
    _call(
        "conv_gram", x.data_ptr(), g.data_ptr(), _shape(x, g, w), int(precise), n2.data_ptr(),
        scale.data_ptr(),
    )  # fmt: skip
    for i in (~torch.isfinite(n2) & torch.isfinite(scale)).nonzero().flatten().tolist():
        seen, out = twins.unfolded(x[i : i + 1], g[i : i + 1], w)
        n2[i] = gram_pair(out.transpose(1, 2), seen.transpose(1, 2), precise=True)[0][0]
    return torch.where(torch.isfinite(scale), n2, scale), scale


def accumulate(total: Tensor, part: Tensor, inverse_step: float) -> None:
    twins.needs(total, torch.int64)
    part = part.contiguous()
    _call("accumulate", total.data_ptr(), part.data_ptr(), total.numel(), inverse_step)


def finish(total: Tensor, factor: float, out: Tensor) -> None:
    twins.needs(total, torch.int64)
    twins.needs(out, torch.float32)
    _call("finish", total.data_ptr(), total.numel(), factor, out.data_ptr())


def weighted_sum(formed: Tensor, c: Tensor) -> Tensor:
    formed, c = formed.contiguous(), c.contiguous()
    out = torch.empty(formed.shape[1])
    _call("weighted_sum", formed.data_ptr(), *formed.shape, c.data_ptr(), out.data_ptr())
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
    _call(
        "contract", g.data_ptr(), x.data_ptr(), count, m, n, c.data_ptr(), keep.data_ptr(),
        count // len(c), chunk, out.data_ptr(),
    )  # fmt: skip
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
    _call(
        "conv_contract", x.data_ptr(), g.data_ptr(), shape, c.data_ptr(), keep.data_ptr(), chunk,
        out.data_ptr(),
    )  # fmt: skip
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
    _call(
        "embedding_add", index.data_ptr(), g.data_ptr(), *g.shape, none, c.data_ptr(),
        keep.data_ptr(), inverse_step, total.data_ptr(),
    )  # fmt: skip


def channel_affine(g: Tensor, x: Tensor, mean: Tensor, rstd: Tensor) -> tuple[Tensor, Tensor]:
    (b, channels), groups = g.shape[:2], mean.shape[1]
    mean, rstd = mean.contiguous(), rstd.contiguous()
    dw, db = torch.empty((b, channels)), torch.empty((b, channels))
    positions = math.prod(g.shape[2:])
    if g.is_contiguous() or not _last(g):
        g, x = g.contiguous(), x.contiguous()
        _call(
            "channel_affine", g.data_ptr(), x.data_ptr(), mean.data_ptr(), rstd.data_ptr(), b,
            channels, positions, groups, dw.data_ptr(), db.data_ptr(),
        )  # fmt: skip
    else:
        g, x = (t.movedim(1, -1).contiguous() for t in (g, x))
        _call(
            "token_affine", g.data_ptr(), x.data_ptr(), mean.data_ptr(), rstd.data_ptr(), b,
            positions, channels, groups, dw.data_ptr(), db.data_ptr(),
        )  # fmt: skip
    return dw, db


def _last(t: Tensor) -> bool:
    """Whether channels are last in memory."""
    return t.dim() > 2 and t.movedim(1, -1).is_contiguous()


def token_affine(g: Tensor, x: Tensor, mean: Tensor, rstd: Tensor) -> tuple[Tensor, Tensor]:
    g, x, mean, rstd = g.contiguous(), x.contiguous(), mean.contiguous(), rstd.contiguous()
    b, tokens, m = g.shape
    dw, db = torch.empty((b, m)), torch.empty((b, m))
    _call(
        "token_affine", g.data_ptr(), x.data_ptr(), mean.data_ptr(), rstd.data_ptr(), b, tokens, m,
        0, dw.data_ptr(), db.data_ptr(),
    )  # fmt: skip
    return dw, db


def channel_sum(g: Tensor) -> Tensor:
    if not g.is_contiguous() and _last(g):
        return formed_sum(g.movedim(1, -1).flatten(1, -2))
    g = g.contiguous()
    out = torch.empty(g.shape[:2])
    _call(
        "channel_affine", g.data_ptr(), None, None, None, *g.shape[:2], math.prod(g.shape[2:]), 1,
        None, out.data_ptr(),
    )  # fmt: skip
    return out
