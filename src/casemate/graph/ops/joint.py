# ruff: noqa: E501 - one entry a line
"""Operations of the joint graph of forward and backward that no model may hold: what autograd calls
below the composite operations, and the derivatives. Their outputs that sum over the records are S.
"""

from __future__ import annotations

from typing import Any, Final

from casemate.graph.ops.base import Call, Op, Outputs, Rule, Value, op, per_element, per_input
from casemate.graph.ops.common import refold


def like(name: str) -> Rule:
    """The result is as the argument ``name``, to which all others must be aligned."""

    def rule(call: Call) -> Value:
        base = call.value(name)
        for v in call.tensors():
            if v.batch != base.batch and v.batch is not None:
                call.mixes("combines values whose batch lies on different axes")
            if v.batch is not None and v.dims != base.dims:
                call.shape(f"combines {v.dims} with {base.dims}")
        return Value(base.dtype, base.dims, base.batch)

    return rule


def _view_as(call: Call) -> Value:
    return refold(call, call.value("self"), call["size"], "reshapes")


_FLOPS: Final = per_element(5)

TABLE: Final[tuple[Op, ...]] = (
    op("aten::view(Tensor(a) self, SymInt[] size) -> Tensor(a)", _view_as, view=True, slots=True, linear="first", isometric=True),
    op("aten::_unsafe_view(Tensor self, SymInt[] size) -> Tensor", _view_as, view=True, slots=True, linear="first", isometric=True),
    op("aten::clone(Tensor self, *, MemoryFormat? memory_format=None) -> Tensor", like("self"), linear="first", isometric=True),
    op("aten::threshold_backward(Tensor grad_output, Tensor self, Scalar threshold) -> Tensor", like("grad_output"), flops=_FLOPS),
    op("aten::tanh_backward(Tensor grad_output, Tensor output) -> Tensor", like("grad_output"), flops=_FLOPS),
    op("aten::sigmoid_backward(Tensor grad_output, Tensor output) -> Tensor", like("grad_output"), flops=_FLOPS),
)  # fmt: skip
