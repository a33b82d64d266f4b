# ruff: noqa: E501 - one entry a line
"""Convolutions and pooling: the batch is the first axis, kernels are parameters."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Final

from casemate.graph.ops.base import Call, Count, Op, Rule, Value, op, temporaries
from casemate.graph.ops.common import constant, floats, off_batch, static

# Kernels compute with the extents of windows in 32 bits here and there.
MAX_EXTENT: Final = 2**20


def _tuple(call: Call, name: str, n: int, low: int) -> tuple[int, ...]:
    """A list of n ints, each at least ``low``; one stands for all."""
    given = tuple(static(call, x, name) for x in call[name]) if call[name] != () else ()
    given = given * n if len(given) == 1 else given
    if len(given) != n or min(given) < low or max(given) > MAX_EXTENT:
        call.argument(f"has {given} as {name}")
    return given


def _spatial(call: Call, v: Value, n: int, who: str) -> None:
    if v.rank != n + 2:
        call.shape(f"needs (batch, channels, {n} axes), not {v.rank} axes")
    off_batch(call, v, range(1, v.rank), f"{who} over the batch", "Keep the batch as axis 0.")


def convolution(n: int) -> Rule:
    """conv{n}d with padding as ints or as ``same`` and ``valid``."""

    def rule(call: Call) -> Value:
        x, w, b, groups = call.value("input"), call.value("weight"), call["bias"], call["groups"]
        floats(call, "input", "weight", "bias")
        constant(call, "weight", "bias")
        _spatial(call, x, n, "convolves")
        stride, dilation = _tuple(call, "stride", n, 1), _tuple(call, "dilation", n, 1)
        if type(groups) is not int or groups < 1 or w.rank != n + 2 or w.dims[0] % groups:
            call.argument("has impossible groups or weights")
        if x.dims[1] != w.dims[1] * groups or (b is not None and b.dims != w.dims[:1]):
            call.shape(f"convolves {x.dims} with {w.dims} in {groups} groups")
        if not x.dims[1]:  # torch then gives no output channels either
            call.shape("convolves no channels")
        kernel = [d * (k - 1) + 1 for d, k in zip(dilation, w.dims[2:], strict=True)]
        if isinstance(call["padding"], str):
            if call["padding"] not in ("same", "valid") or (
                call["padding"] == "same" and set(stride) != {1}
            ):
                call.argument(f"has the padding {call['padding'][:20]!r}")
            total = [k - 1 if call["padding"] == "same" else 0 for k in kernel]
        else:
            total = [2 * p for p in _tuple(call, "padding", n, 0)]
        own = []
        for d, t, k, s in zip(x.dims[2:], total, kernel, stride, strict=True):
            if d + t < k or k < 1:
                call.shape(f"has a kernel of {k} over {d}")
            own.append((d + t - k) // s + 1)
        return Value("f32", (x.dims[0], w.dims[0], *own), x.batch)

    return rule


def transposed(n: int) -> Rule:
    def rule(call: Call) -> Value:
        x, w, b, groups = call.value("input"), call.value("weight"), call["bias"], call["groups"]
        floats(call, "input", "weight", "bias")
        constant(call, "weight", "bias")
        _spatial(call, x, n, "convolves")
        stride, dilation = _tuple(call, "stride", n, 1), _tuple(call, "dilation", n, 1)
        padding, extra = _tuple(call, "padding", n, 0), _tuple(call, "output_padding", n, 0)
        if type(groups) is not int or groups < 1 or w.rank != n + 2 or w.dims[0] % groups:
            call.argument("has impossible groups or weights")
        channels = w.dims[1] * groups
        if x.dims[1] != w.dims[0] or (b is not None and b.dims != (channels,)):
            call.shape(f"convolves {x.dims} with {w.dims} in {groups} groups")
        own = tuple(
            (d - 1) * s - 2 * p + g * (k - 1) + e + 1
            for d, s, p, g, k, e in zip(
                x.dims[2:], stride, padding, dilation, w.dims[2:], extra, strict=True
            )
        )
        if min(own) < 1 or any(
            e >= max(s, g) for e, s, g in zip(extra, stride, dilation, strict=True)
        ):
            call.shape("has impossible padding")
        return Value("f32", (x.dims[0], channels, *own), x.batch)

    return rule


def _conv_flops(call: Call, out: tuple[Value, ...]) -> int:
    w = call["weight"]
    per = int(math.prod(w.dims[1:]))
    source = call["input"].numel if call.op.startswith("aten.conv_transpose") else out[0].numel
    return 2 * int(source) * per


def _columns(call: Call, out: tuple[Value, ...]) -> int:
    """Bytes of an unfolded input, and a quarter: the most that a convolution's workspace may be."""
    w = call["weight"]
    space = math.prod(out[0].dims[2:]) * out[0].dims[0]
    return 5 * space * int(math.prod(w.dims[1:]))


def windows(n: int) -> Count:
    """Two operations for each place of each window."""
    return lambda call, out: 2 * out[0].numel * math.prod(_tuple(call, "kernel_size", n, 1))


def adaptive_windows(n: int) -> Count:
    """As many for windows that part d places into o: each is at most ceil(d / o) + 1 wide."""

    def count(call: Call, out: tuple[Value, ...]) -> int:
        own = zip(call.value("self").dims[-n:], out[0].dims[-n:], strict=True)
        return 2 * out[0].numel * math.prod(-(-d // o) + 1 for d, o in own)

    return count


def pooled(
    call: Call, v: Value, n: int, kernel: Sequence[int], dilation: Sequence[int]
) -> tuple[int, ...]:
    stride = kernel if call["stride"] == () else _tuple(call, "stride", n, 1)
    padding = _tuple(call, "padding", n, 0)
    own = []
    for d, k, s, p, g in zip(v.dims[-n:], kernel, stride, padding, dilation, strict=True):
        span = g * (k - 1) + 1
        if 2 * p > k or d + 2 * p < span:
            call.shape(f"pools {d} by {k}")
        # A window may straddle the whole input; torch's backward then writes outside its memory.
        if p and g > d:
            call.shape(f"pools {d} by places {g} apart")
        size = -(-(d + 2 * p - span) // s) if call["ceil_mode"] else (d + 2 * p - span) // s
        # The last window must start inside the input or its left padding.
        own.append(size if call["ceil_mode"] and size * s >= d + p else size + 1)
    return tuple(own)


def pooling(n: int) -> Rule:
    def rule(call: Call) -> Value:
        v = call.value("self")
        floats(call, "self")
        if v.rank not in (n + 1, n + 2):
            call.shape(f"needs {n + 2} axes")
        off_batch(call, v, range(v.rank - n, v.rank), "pools over the batch")
        dilation = _tuple(call, "dilation", n, 1) if "dilation" in call.args else (1,) * n
        if call.args.get("divisor_override") == 0:
            call.argument("divides by 0")
        own = pooled(call, v, n, _tuple(call, "kernel_size", n, 1), dilation)
        return Value("f32", (*v.dims[:-n], *own), v.batch)

    return rule


def adaptive(n: int, outputs: int) -> Rule:
    def rule(call: Call) -> Value | tuple[Value, ...]:
        v = call.value("self")
        floats(call, "self")
        if v.rank not in (n + 1, n + 2):
            call.shape(f"needs {n + 2} axes")
        off_batch(call, v, range(v.rank - n, v.rank), "pools over the batch")
        own = _tuple(call, "output_size", n, 1)
        if not v.numel:
            call.shape("pools nothing")
        dims = (*v.dims[:-n], *own)
        out = Value("f32", dims, v.batch)
        if outputs == 1:
            return out
        return out, Value("i64", dims, v.batch, (0, math.prod(v.dims[-n:]) - 1))

    return rule


def _schemas(n: int) -> list[Op]:
    one = "[" + ", ".join("1" * n) + "]"
    zero = "[" + ", ".join("0" * n) + "]"
    pad_default = "[0]" if n == 1 else "0"
    one_default = "[1]" if n == 1 else "1"
    tail = f"SymInt[{n}] dilation={one}, SymInt groups=1) -> Tensor"
    head = f"(Tensor input, Tensor weight, Tensor? bias=None, SymInt[{n}] stride={one}"
    more: dict[str, Any] = {"flops": _conv_flops, "workspace": _columns}
    pool = f"(Tensor self, int[{n}] kernel_size, int[{n}] stride=[], int[{n}] padding={pad_default}"
    average = "bool ceil_mode=False, bool count_include_pad=True"
    average += ", int? divisor_override=None" if n > 1 else ""
    size = "int[1]" if n == 1 else f"SymInt[{n}]"
    return [
        op(f"aten::conv{n}d{head}, SymInt[{n}] padding={zero}, {tail}", convolution(n), **more),
        op(f'aten::conv{n}d.padding{head}, str padding="valid", {tail}', convolution(n), **more),
        op(
            f"aten::conv_transpose{n}d{'' if n == 1 else '.input'}{head}, SymInt[{n}] padding={zero}, "
            f"SymInt[{n}] output_padding={zero}, SymInt groups=1, SymInt[{n}] dilation={one}) -> Tensor",
            transposed(n), **more,
        ),
        op(
            f"aten::max_pool{n}d{pool}, int[{n}] dilation={one_default}, bool ceil_mode=False) -> Tensor",
            pooling(n), flops=windows(n), workspace=temporaries(2),
        ),
        op(f"aten::avg_pool{n}d{pool}, {average}) -> Tensor", pooling(n), flops=windows(n)),
        op(f"aten::adaptive_avg_pool{n}d(Tensor self, {size} output_size) -> Tensor", adaptive(n, 1), flops=adaptive_windows(n)),
        op(f"aten::adaptive_max_pool{n}d(Tensor self, int[{n}] output_size) -> (Tensor, Tensor)", adaptive(n, 2), flops=adaptive_windows(n)),
    ]  # fmt: skip


TABLE: Final[tuple[Op, ...]] = tuple(entry for n in (1, 2, 3) for entry in _schemas(n))
