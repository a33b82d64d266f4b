"""Matrix products."""

from __future__ import annotations

from typing import Final

from casemate.graph.ops.base import Call, Op, Value, op
from casemate.graph.ops.common import constant, floats


def _linear(call: Call) -> Value:
    x, w, b = call.value("input"), call.value("weight"), call["bias"]
    floats(call, "input", "weight", "bias")
    constant(call, "weight", "bias")
    if w.rank != 2 or not x.dims or x.dims[-1] != w.dims[1] or (b and b.dims != w.dims[:1]):
        call.shape(f"multiplies {x.dims} by {w.dims}")
    if x.batch is not None and x.batch.axis == x.rank - 1:
        call.mixes("contracts over the batch")
    return x.like((*x.dims[:-1], w.dims[0]), x.batch)


TABLE: Final[tuple[Op, ...]] = (
    op(
        "aten::linear(Tensor input, Tensor weight, Tensor? bias=None) -> Tensor",
        _linear,
        flops=lambda c, out: 2 * out[0].numel * c["weight"].dims[1],
    ),
)
