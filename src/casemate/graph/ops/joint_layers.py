# ruff: noqa: E501 - one entry a line
"""Layers in the joint graph: convolution, pooling, resampling, normalisation, attention, and their
derivatives. See :mod:`casemate.graph.ops.joint`.

A derivative repeats the forward's rule on what it saved, and takes only a gradient that lies as the
forward's result does.
"""

from __future__ import annotations

import math
from typing import Any, Final

from casemate.graph.ops.attention import _attention, _attention_flops, _scores
from casemate.graph.ops.base import (
    Batch,
    Call,
    Op,
    Outputs,
    Rule,
    Value,
    op,
    per_element,
    per_input,
)
from casemate.graph.ops.common import constant, floats, off_batch, static
from casemate.graph.ops.conv import adaptive, convolution, pooling, transposed
from casemate.graph.ops.norm import _channels, _last_axes
from casemate.graph.ops.view import edge_pad

_ASIDE: Final = "combines values whose batch lies on different axes"
ABSENT: Final = Value("f32", (0,))  # stands for an output that was not asked for


def again(call: Call, **args: Any) -> Call:
    """The same node with other arguments, for the rule of the forward."""
    return Call(call.op, call.name, call.source, {**call.args, **args})


def matches(call: Call, v: Value, want: Value) -> None:
    """Refuse a value whose shape and batch are not those of ``want``; constants do not broadcast."""
    if v.batch != want.batch:
        call.mixes(_ASIDE)
    if v.dims != want.dims:
        call.shape(f"combines {v.dims} with {want.dims}")


def one(rule: Rule, call: Call) -> Value:
    made = rule(call)
    return made[0] if isinstance(made, tuple) else made


def _wanted(call: Call, *outs: Value) -> tuple[Value, ...]:
    mask = call["output_mask"]
    if len(mask) != len(outs):
        call.argument("has another number of outputs than it has")
    return tuple(v if m else ABSENT for v, m in zip(outs, mask, strict=True))


def summed(dims: tuple[int, ...], batch: Batch | None) -> Value:
    """A sum over the records, or R where there are none."""
    return Value("f32", dims, summed=batch is not None)


# --- convolution


def _convolution(call: Call) -> Value:
    n = call.value("weight").rank - 2
    if n not in (1, 2, 3):
        call.shape("convolves over other than 1 to 3 axes")
    return one((transposed if call["transposed"] else convolution)(n), call)


def _convolution_backward(call: Call) -> tuple[Value, ...]:
    grad, x, w = (call.value(n) for n in ("grad_output", "input", "weight"))
    floats(call, "grad_output")
    want = _convolution(again(call, bias=None))
    matches(call, grad, want)
    bias = call["bias_sizes"]
    if call["output_mask"][-1] and bias != (want.dims[1],):
        call.shape(f"has a bias of shape {bias}")
    return _wanted(
        call, Value("f32", x.dims, x.batch), summed(w.dims, x.batch), summed((want.dims[1],), x.batch)
    )  # fmt: skip


def contracted(rule: Rule) -> Any:
    """``contract`` of an op whose rule itself says which outputs are sums over the records."""

    def contract(call: Call) -> Outputs | None:
        return None if all(v.batch is None for v in call.tensors()) else rule(call)

    return contract


def _conv_flops(call: Call, out: tuple[Value, ...]) -> int:
    w = call["weight"]
    base = call["input"] if call["transposed"] else call.args.get("grad_output", out[0])
    each = 2 * int(base.numel) * int(math.prod(w.dims[1:]))
    return each * sum(1 for x in call.args.get("output_mask", (True,))[:2] if x)


# --- pooling


def _max_pool(n: int) -> Rule:
    def rule(call: Call) -> tuple[Value, ...]:
        out = one(pooling(n), call)
        return out, _places(call, out, n)

    return rule


def _places(call: Call, out: Value, n: int) -> Value:
    """Indices into the last n axes."""
    most = math.prod(call.value("self").dims[-n:]) - 1
    return Value("i64", out.dims, out.batch, (0, most))


def _pool_backward(n: int, forward: Rule | None) -> Rule:
    """forward: ``None`` for adaptive pooling, whose result has the gradient's own extents."""

    def rule(call: Call) -> Value:
        grad, v = call.value("grad_output"), call.value("self")
        floats(call, "grad_output", "self")
        how = adaptive(n, 1) if forward is None else forward
        size = grad.dims[-n:]
        want = one(how, again(call, output_size=size))
        matches(call, grad, want)
        indices = call.args.get("indices")
        if indices is not None:
            matches(call, indices, want)
            known, most = indices.range, math.prod(v.dims[-n:]) - 1
            if indices.dtype != "i64" or known is None or known[0] < 0 or known[1] > most:
                call.argument("has indices that are not proved to lie in the record")
        return Value("f32", v.dims, v.batch)

    return rule


# --- resampling and padding


def _factors(call: Call, before: tuple[int, ...], after: tuple[int, ...]) -> None:
    """Factors, where they are given, are those by which the extents grew."""
    names = ("scales",) if "scales" in call.args else ("scales_d", "scales_h", "scales_w")[-len(before):]  # fmt: skip
    for f, a, b in zip([call[n] for n in names], before, after, strict=True):
        if f is not None and not (0 < f < 2**20 and math.floor(a * f) == b):
            call.argument("has a factor that is not that of its sizes")


def _upsample(n: int) -> Rule:
    def rule(call: Call) -> Value:
        v = call.value("self")
        floats(call, "self")
        own = tuple(static(call, s, "a size") for s in call["output_size"])
        if v.rank != n + 2 or len(own) != n or min(own) < 1 or min(v.dims[2:]) < 1:
            call.shape(f"resamples {v.dims} to {own}")
        off_batch(call, v, range(2, v.rank), "resamples the batch")
        _factors(call, v.dims[2:], own)
        return Value("f32", (*v.dims[:2], *own), v.batch)

    return rule


def _upsample_backward(n: int) -> Rule:
    def rule(call: Call) -> Value:
        grad = call.value("grad_output")
        floats(call, "grad_output")
        size = call["input_size"]
        if grad.rank != n + 2 or len(size) != n + 2 or size[:2] != grad.shape[:2]:
            call.mixes("gives a gradient of another shape than the records have")
        off_batch(call, grad, range(2, grad.rank), "resamples the batch")
        own = tuple(static(call, s, "a size") for s in size[2:])
        if call["output_size"] != grad.dims[2:] or min(own) < 1:
            call.shape(f"resamples {own} to {grad.dims[2:]}")
        _factors(call, own, grad.dims[2:])
        return Value("f32", (*grad.dims[:2], *own), grad.batch)

    return rule


def _pad_backward(axes: int, reflects: bool) -> Rule:
    def rule(call: Call) -> Value:
        v = call.value("self")
        floats(call, "grad_output", "self")
        matches(call, call.value("grad_output"), one(edge_pad(axes, reflects=reflects), call))
        return Value("f32", v.dims, v.batch)

    return rule


def _col2im(call: Call) -> Value:
    v = call.value("self")
    floats(call, "self")
    names = ("output_size", "kernel_size", "dilation", "padding", "stride")
    lists = [tuple(static(call, x, "a size") for x in call[n]) for n in names]
    if v.rank != 3 or any(len(x) not in (1, 2) for x in lists[1:]) or len(lists[0]) != 2:
        call.shape("needs a value of 3 axes")
    off_batch(call, v, (1, 2), "lays windows over the batch")
    size, kernel, dilation, padding, stride = ((x * 2)[:2] for x in lists)
    places = 1
    for n, k, d, p, s in zip(size, kernel, dilation, padding, stride, strict=True):
        if min(n, k, d, s) < 1 or p < 0 or n + 2 * p < d * (k - 1) + 1:
            call.shape("takes windows that do not fit")
        places *= (n + 2 * p - d * (k - 1) - 1) // s + 1
    if v.dims[2] != places or v.dims[1] % math.prod(kernel):
        call.shape(f"lays {v.dims[1:]} in windows of {kernel}")
    return Value("f32", (v.dims[0], v.dims[1] // math.prod(kernel), *size), v.batch)


# --- normalisation


def _layer_stats(call: Call, v: Value) -> Value:
    own = len(call["normalized_shape"])
    return Value("f32", (*v.dims[:-own], *(1,) * own), v.batch)


def _layer_norm(call: Call) -> tuple[Value, ...]:
    out = _last_axes(call)
    stats = _layer_stats(call, out)
    return out, stats, stats


def _layer_norm_backward(call: Call) -> tuple[Value, ...]:
    floats(call, "grad_out", "mean", "rstd")
    out = _last_axes(call)
    matches(call, call.value("grad_out"), out)
    for name in ("mean", "rstd"):
        matches(call, call.value(name), _layer_stats(call, out))
    own = summed(tuple(call["normalized_shape"]), out.batch)
    return _wanted(call, out, own, own)


def _grouped(call: Call) -> tuple[Value, Value]:
    """Input and the shape of its statistics; the sizes given must be the input's own."""
    v = _channels(call)
    groups = static(call, call["group"], "a number of groups")
    sizes = (call["N"], call["C"], call["HxW"])
    if sizes != (v.shape[0], v.dims[1], math.prod(v.dims[2:])):
        call.mixes("names other sizes than its input has")
    if groups < 1 or v.dims[1] % groups:
        call.shape(f"parts {v.dims[1]} channels into {groups} groups")
    return Value("f32", v.dims, v.batch), Value("f32", (v.dims[0], groups), v.batch)


def _group_norm(call: Call) -> tuple[Value, ...]:
    out, stats = _grouped(call)
    return out, stats, stats


def _group_norm_backward(call: Call) -> tuple[Value, ...]:
    floats(call, "grad_out", "mean", "rstd")
    out, stats = _grouped(call)
    matches(call, call.value("grad_out"), out)
    for name in ("mean", "rstd"):
        matches(call, call.value(name), stats)
    own = summed((out.dims[1],), out.batch)
    return _wanted(call, out, own, own)


_STATISTICS: Final = "averages over the batch, so that records mix"


def _normalised(call: Call, train: bool) -> tuple[Value, bool]:
    """Input, and whether each channel is of one record (instance_norm folds the batch in axis 1).

    With frozen statistics the batch is axis 0. Without, each channel has its own statistics, so that
    the batch must lie in the channels and nothing may be kept over them.
    """
    v = call.value("input")
    stats = [call[n] for n in ("running_mean", "running_var")]
    if not train:
        if None in stats:
            call.refuse("model.batchnorm", _STATISTICS, "Freeze it with .eval().")
        return _channels(call), False
    if any(s is not None for s in stats):
        call.refuse("model.batchnorm", _STATISTICS, "Freeze it with .eval().")
    floats(call, "input", "weight", "bias")
    if v.rank < 2:
        call.shape("needs (batch, channels, ...)")
    off_batch(call, v, [i for i in range(v.rank) if i != 1], _STATISTICS)
    for name in ("weight", "bias"):
        w = call.args.get(name)
        if w is not None:
            matches(call, w, _channel(v))
    return v, v.batch is not None


def _channel(v: Value) -> Value:
    """One number for each channel of what has the batch in its channels, or has none."""
    batch = v.batch and Batch(0, v.batch.outer, v.batch.inner)
    return Value("f32", (v.dims[1],), batch)


def _batch_norm(call: Call) -> tuple[Value, ...]:
    v, _ = _normalised(call, call["training"])
    stats = _channel(v) if call["training"] else ABSENT
    return Value("f32", v.dims, v.batch), stats, stats


def _batch_norm_backward(call: Call) -> tuple[Value, ...]:
    v, alone = _normalised(call, call["train"])
    floats(call, "grad_out", "save_mean", "save_invstd")
    matches(call, call.value("grad_out"), v)
    if call["train"]:
        for name in ("save_mean", "save_invstd"):
            matches(call, call.value(name), _channel(v))
    else:
        constant(call, "save_mean", "save_invstd")
    own = _channel(v) if alone else summed((v.dims[1],), v.batch)
    return _wanted(call, Value("f32", v.dims, v.batch), own, own)


# --- attention


def _flash(call: Call) -> tuple[Value, ...]:
    q, k, v = (call.value(n) for n in ("query", "key", "value"))
    # The kernel broadcasts the mask alone; fewer heads of the keys serve several of the queries.
    if {q.rank, k.rank, v.rank} != {4} or len({(x.dims[0], x.batch) for x in (q, k, v)}) != 1:
        call.mixes(_ASIDE)
    if k.dims[1] != v.dims[1]:
        call.shape(f"attends to {k.dims[1]} heads with {v.dims[1]}")
    out = _attention(again(call, enable_gqa=q.dims[1] != k.dims[1]))
    return out, Value("f32", out.dims[:3], out.batch)


def _flash_backward(call: Call) -> tuple[Value, ...]:
    floats(call, "grad_out", "out", "logsumexp")
    out, sums = _flash(call)
    matches(call, call.value("grad_out"), out)
    matches(call, call.value("out"), out)
    matches(call, call.value("logsumexp"), sums)
    return tuple(
        Value("f32", x.dims, x.batch) for x in (call.value(n) for n in ("query", "key", "value"))
    )


def _sums(schema: str, rule: Rule, site: str, **more: Any) -> Op:
    """An entry whose rule says which outputs are sums; linear in the gradient, its first tensor."""
    return op(schema, rule, contract=contracted(rule), site=site, linear="first", **more)


_WINDOW: Final = "SymInt[] stride, SymInt[] padding, SymInt[] dilation, bool transposed, SymInt[] output_padding, SymInt groups"
_NORM: Final = per_input(8)
_THREE: Final = "bool[3] output_mask) -> (Tensor, Tensor, Tensor)"
_SDPA: Final = "*, Tensor? attn_mask=None, float? scale=None)"
_WORK: Final = {"flops": _attention_flops, "workspace": lambda c, out: 8 * _scores(c, out)}


def _schemas(n: int) -> list[Op]:
    ks = f"int[{n}] kernel_size, int[{n}] stride"
    average = "bool ceil_mode, bool count_include_pad, int? divisor_override) -> Tensor"
    return [
        op(f"aten::max_pool{n}d_with_indices(Tensor self, {ks}=[], int[{n}] padding=0, int[{n}] dilation=1, bool ceil_mode=False) -> (Tensor, Tensor)", _max_pool(n), flops=per_input(2)),
        op(f"aten::max_pool{n}d_with_indices_backward(Tensor grad_output, Tensor self, {ks}, int[{n}] padding, int[{n}] dilation, bool ceil_mode, Tensor indices) -> Tensor", _pool_backward(n, pooling(n)), flops=per_input(1), linear="first"),
        op(f"aten::avg_pool{n}d_backward(Tensor grad_output, Tensor self, {ks}, int[{n}] padding, {average}", _pool_backward(n, pooling(n)), flops=per_input(2), linear="first"),
        op(f"aten::adaptive_max_pool{n}d_backward(Tensor grad_output, Tensor self, Tensor indices) -> Tensor", _pool_backward(n, None), flops=per_input(1), linear="first"),
        op(f"aten::_adaptive_avg_pool{n}d(Tensor self, SymInt[{n}] output_size) -> Tensor", adaptive(n, 1), flops=per_input(1)),
        op(f"aten::_adaptive_avg_pool{n}d_backward(Tensor grad_output, Tensor self) -> Tensor", _pool_backward(n, None), flops=per_input(1), linear="first"),
    ]  # fmt: skip


def _scales(n: int) -> str:
    names = ("scales",) if n == 1 else ("scales_d", "scales_h", "scales_w")[-n:]
    return ", ".join(f"float? {s}=None" for s in names)


def _resampling(kind: str, n: int, corners: str) -> list[Op]:
    size, flops = f"SymInt[{n}] output_size", per_element(8 if corners else 1)
    return [
        op(f"aten::upsample_{kind}(Tensor self, {size}{corners}, {_scales(n)}) -> Tensor", _upsample(n), flops=flops),
        op(f"aten::upsample_{kind}_backward(Tensor grad_output, {size}, SymInt[{n + 2}] input_size{corners}, {_scales(n)}) -> Tensor", _upsample_backward(n), flops=flops, linear="first"),
    ]  # fmt: skip


TABLE: Final[tuple[Op, ...]] = (
    op(f"aten::convolution(Tensor input, Tensor weight, Tensor? bias, {_WINDOW}) -> Tensor", _convolution, flops=_conv_flops),
    _sums(f"aten::convolution_backward(Tensor grad_output, Tensor input, Tensor weight, SymInt[]? bias_sizes, {_WINDOW}, {_THREE}", _convolution_backward, "convolution", flops=_conv_flops),
    *(entry for n in (2, 3) for entry in _schemas(n)),
    *(entry for n in (1, 2, 3) for entry in _resampling(f"nearest{n}d", n, "")),
    *(
        entry
        for kind, n in (("linear1d", 1), ("bilinear2d", 2), ("bicubic2d", 2), ("trilinear3d", 3))
        for entry in _resampling(kind, n, ", bool align_corners")
    ),
    *(
        op(f"aten::{kind}_pad{n}d_backward(Tensor grad_output, Tensor self, SymInt[{2 * n}] padding) -> Tensor", _pad_backward(n, kind == "reflection"), flops=per_element(1), linear="first")
        for kind in ("reflection", "replication")
        for n in (1, 2, 3)
    ),
    op("aten::col2im(Tensor self, SymInt[2] output_size, int[2] kernel_size, int[2] dilation, int[2] padding, int[2] stride) -> Tensor", _col2im, flops=per_input(1), linear="first"),
    op("aten::native_layer_norm(Tensor input, SymInt[] normalized_shape, Tensor? weight, Tensor? bias, float eps) -> (Tensor, Tensor, Tensor)", _layer_norm, flops=_NORM),
    _sums(f"aten::native_layer_norm_backward(Tensor grad_out, Tensor input, SymInt[] normalized_shape, Tensor mean, Tensor rstd, Tensor? weight, Tensor? bias, {_THREE}", _layer_norm_backward, "norm", flops=_NORM),
    op("aten::native_group_norm(Tensor input, Tensor? weight, Tensor? bias, SymInt N, SymInt C, SymInt HxW, int group, float eps) -> (Tensor, Tensor, Tensor)", _group_norm, flops=_NORM),
    _sums(f"aten::native_group_norm_backward(Tensor grad_out, Tensor input, Tensor mean, Tensor rstd, Tensor? weight, SymInt N, SymInt C, SymInt HxW, int group, {_THREE}", _group_norm_backward, "norm", flops=_NORM),
    op("aten::native_batch_norm(Tensor input, Tensor? weight, Tensor? bias, Tensor? running_mean, Tensor? running_var, bool training, float momentum, float eps) -> (Tensor, Tensor, Tensor)", _batch_norm, flops=_NORM),
    _sums(f"aten::native_batch_norm_backward(Tensor grad_out, Tensor input, Tensor? weight, Tensor? running_mean, Tensor? running_var, Tensor? save_mean, Tensor? save_invstd, bool train, float eps, {_THREE}", _batch_norm_backward, "norm", flops=_NORM),
    op(f"aten::_scaled_dot_product_flash_attention_for_cpu(Tensor query, Tensor key, Tensor value, float dropout_p=0., bool is_causal=False, {_SDPA} -> (Tensor output, Tensor logsumexp)", _flash, **_WORK),
    op(f"aten::_scaled_dot_product_flash_attention_for_cpu_backward(Tensor grad_out, Tensor query, Tensor key, Tensor value, Tensor out, Tensor logsumexp, float dropout_p, bool is_causal, {_SDPA} -> (Tensor grad_query, Tensor grad_key, Tensor grad_value)", _flash_backward, linear="first", **_WORK),
)  # fmt: skip
