"""Losses without reduction, kept whole."""

from __future__ import annotations

from typing import Final

from casemate.graph.ops.base import Call, Op, Value, op, per_input
from casemate.graph.ops.common import broadcast, constant, drop, floats


def _cross_entropy(call: Call) -> Value:
    x, y = call.value("self"), call.value("target")
    floats(call, "self", "weight")
    constant(call, "weight")
    if call["reduction"] != 0:
        call.mixes("reduces the loss over the batch", "Use reduction='none'.")
    if x.rank < 2:
        call.shape("needs scores with the classes on axis 1")
    if x.batch is not None and x.batch.axis == 1:
        call.mixes("takes the classes from the batch")
    dims, batch = drop(x, (1,), keep=False)
    rest = Value("f32", dims, batch)
    if y.floating:
        if y.dims != x.dims or y.batch != x.batch:
            call.shape(f"compares scores {x.dims} with probabilities {y.dims}")
    elif y.dtype not in ("i64", "u8") or y.dims != dims or y.batch != batch:
        call.shape(f"compares scores {x.dims} with classes {y.dims} of {y.dtype}")
    broadcast(call, [rest])
    return rest


TABLE: Final[tuple[Op, ...]] = (
    op(
        "aten::cross_entropy_loss(Tensor self, Tensor target, Tensor? weight=None, "
        "int reduction=1, SymInt ignore_index=-100, float label_smoothing=0.) -> Tensor",
        _cross_entropy,
        flops=per_input(8),
    ),
)
