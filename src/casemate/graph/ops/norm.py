# ruff: noqa: E501 - one entry a line
"""Normalisations, kept whole. Each may look at one record only."""

from __future__ import annotations

from typing import Final

from casemate.graph.ops.base import Call, Op, Value, op, per_input, temporaries
from casemate.graph.ops.common import constant, floats, off_batch, static

_GROUPNORM: Final = "Replace it by GroupNorm, or freeze it with .eval()."


def _last_axes(call: Call) -> Value:
    v = call.value("input")
    floats(call, "input", "weight", "bias")
    constant(call, "weight", "bias")
    own = tuple(static(call, d, "a size") for d in call["normalized_shape"])
    off_batch(call, v, range(max(0, v.rank - len(own)), v.rank), "normalises over the batch")
    if not own or v.dims[-len(own) :] != own or len(own) > v.rank:
        call.shape(f"normalises {v.dims} over {own}")
    _affine(call, own)
    return Value("f32", v.dims, v.batch)


def _affine(call: Call, dims: tuple[int, ...]) -> None:
    for name in ("weight", "bias", "running_mean", "running_var"):
        w = call.args.get(name)
        if w is not None and w.dims != dims:
            call.shape(f"has {name} of shape {w.dims}, not {dims}")


def _channels(call: Call) -> Value:
    """The input, (batch, channels, ...), with the batch at axis 0."""
    v = call.value("input")
    floats(call, "input", "weight", "bias", "running_mean", "running_var")
    constant(call, "weight", "bias", "running_mean", "running_var")
    if v.rank < 2:
        call.shape("needs (batch, channels, ...)")
    off_batch(call, v, range(1, v.rank), "normalises over the batch", "Keep the batch as axis 0.")
    _affine(call, (v.dims[1],))
    return v


def _group_norm(call: Call) -> Value:
    v, groups = _channels(call), call["num_groups"]
    if type(groups) is not int or groups < 1 or v.dims[1] % groups:
        call.shape(f"parts {v.dims[1]} channels into {groups} groups")
    return Value("f32", v.dims, v.batch)


def _instance_norm(call: Call) -> Value:
    v = _channels(call)
    stats = call["running_mean"] is not None and call["running_var"] is not None
    if call["use_input_stats"] and (call["running_mean"] or call["running_var"]):
        call.refuse(
            "model.batchnorm",
            "updates running statistics over the batch, so that records mix",
            "Make the InstanceNorm with track_running_stats=False.",
        )
    if not call["use_input_stats"] and not stats:
        call.argument("has no statistics")
    return Value("f32", v.dims, v.batch)


def _batch_norm(call: Call) -> Value:
    if call["training"] or call["running_mean"] is None or call["running_var"] is None:
        call.refuse("model.batchnorm", "averages over the batch, so that records mix", _GROUPNORM)
    v = _channels(call)
    return Value("f32", v.dims, v.batch)


_W: Final = "Tensor? weight=None, Tensor? bias=None, float eps=1.0000000000000001e-05"
_R: Final = "Tensor input, Tensor? weight, Tensor? bias, Tensor? running_mean, Tensor? running_var"
_FLOPS: Final = per_input(8)

TABLE: Final[tuple[Op, ...]] = (
    op(f"aten::layer_norm(Tensor input, SymInt[] normalized_shape, {_W}, bool cudnn_enable=True) -> Tensor", _last_axes, flops=_FLOPS),
    op("aten::rms_norm(Tensor input, SymInt[] normalized_shape, Tensor? weight=None, float? eps=None) -> Tensor", _last_axes, flops=_FLOPS),
    op(f"aten::group_norm(Tensor input, int num_groups, {_W}, bool cudnn_enabled=True) -> Tensor", _group_norm, flops=_FLOPS, workspace=temporaries(1)),
    op(f"aten::instance_norm({_R}, bool use_input_stats, float momentum, float eps, bool cudnn_enabled) -> Tensor", _instance_norm, flops=_FLOPS, workspace=temporaries(1)),
    op(f"aten::batch_norm({_R}, bool training, float momentum, float eps, bool cudnn_enabled) -> Tensor", _batch_norm, flops=_FLOPS),
)  # fmt: skip
