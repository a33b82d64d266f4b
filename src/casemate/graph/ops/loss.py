# ruff: noqa: E501 - one entry a line
"""Losses without reduction, kept whole."""

from __future__ import annotations

from typing import Final

from casemate.graph.ops.base import Call, Op, Value, op, per_input
from casemate.graph.ops.common import broadcast, constant, drop, floats, in_range

_REDUCES: Final = "reduces the loss over the batch"
_MEND: Final = "Give one loss for each record: reduction='none'."


def _classes(call: Call) -> Value:
    """cross_entropy_loss and nll_loss_nd: scores (N, C, ...), classes (N, ...)."""
    x, y = call.value("self"), call.value("target")
    floats(call, "self", "weight")
    constant(call, "weight")
    if call["reduction"] != 0:
        call.mixes(_REDUCES, _MEND)
    if x.rank < 2:
        call.shape("needs scores with the classes on axis 1")
    if x.batch is not None and x.batch.axis == 1:
        call.mixes("takes the classes from the batch")
    w = call["weight"]
    if w is not None and w.dims != (x.dims[1],):
        call.shape(f"has weights of shape {w.dims} for {x.dims[1]} classes")
    dims, batch = drop(x, (1,), keep=False)
    if y.batch != (x.batch if y.floating else batch):
        call.mixes("compares scores with the targets of other records")
    if y.floating:
        if y.dims != x.dims:
            call.shape(f"compares scores {x.dims} with probabilities {y.dims}")
    elif y.dtype not in ("i64", "u8") or y.dims != dims:
        call.shape(f"compares scores {x.dims} with classes {y.dims} of {y.dtype}")
    else:
        in_range(call, "the class", y, 0, x.dims[1] - 1)
    return Value("f32", dims, batch)


def _elementwise(call: Call) -> Value:
    if call["reduction"] != 0:
        call.mixes(_REDUCES, _MEND)
    floats(call, "self", "target", "weight", "pos_weight")
    dims, batch = broadcast(call, call.tensors())
    return Value("f32", dims, batch)


_CLASSES: Final = (
    "(Tensor self, Tensor target, Tensor? weight=None, int reduction=1, SymInt ignore_index=-100"
)
_FEW: Final = per_input(8)

TABLE: Final[tuple[Op, ...]] = (
    op(f"aten::cross_entropy_loss{_CLASSES}, float label_smoothing=0.) -> Tensor", _classes, flops=_FEW),
    op(f"aten::nll_loss_nd{_CLASSES}) -> Tensor", _classes, flops=_FEW),
    op(
        "aten::binary_cross_entropy_with_logits(Tensor self, Tensor target, Tensor? weight=None, "
        "Tensor? pos_weight=None, int reduction=1) -> Tensor",
        _elementwise, flops=_FEW,
    ),
    *(
        op(f"aten::{n}(Tensor self, Tensor target, int reduction=1{more}) -> Tensor", _elementwise, flops=_FEW)
        for n, more in (
            ("mse_loss", ""), ("l1_loss", ""), ("soft_margin_loss", ""),
            ("smooth_l1_loss", ", float beta=1."), ("huber_loss", ", float delta=1."),
            ("kl_div", ", *, bool log_target=False"),
        )
    ),
)  # fmt: skip
