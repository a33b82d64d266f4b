"""Elementwise operations: every element by itself, operands broadcast."""

from __future__ import annotations

from typing import Final

from casemate.graph.ops.base import Call, Op, Rule, Value, op, per_element
from casemate.graph.ops.common import broadcast, floats, promote

_UNARY: Final = "aten::{0}(Tensor self) -> Tensor"
_BINARY: Final = "aten::{0}.Tensor(Tensor self, Tensor other) -> Tensor"
_SCALAR: Final = "aten::{0}.Scalar(Tensor self, Scalar other) -> Tensor"


def _operands(call: Call) -> list[object]:
    return [x for n in ("self", "other", "exponent") if (x := call.args.get(n)) is not None]


def pointwise(*, out: str = "") -> Rule:
    """Broadcast, then the dtype ``out``, or float32 for "float", or the promoted one for ""."""

    def rule(call: Call) -> Value:
        dims, batch = broadcast(call, call.tensors())
        dtype = out or promote(_operands(call))
        if out == "float":
            dtype = "f32"
        return Value(dtype, dims, batch)

    return rule


def _floating_only(call: Call) -> Value:
    floats(call, "self", "other", "weight")
    dims, batch = broadcast(call, [call.value("self")])
    return Value("f32", dims, batch)


_ARITHMETIC: Final = pointwise()

TABLE: Final[tuple[Op, ...]] = (
    *(
        op(_UNARY.format(n), _floating_only, flops=per_element(f))
        for n, f in (
            ("relu", 1), ("sigmoid", 4), ("tanh", 6), ("silu", 5), ("exp", 4), ("log", 4),
            ("sqrt", 2), ("rsqrt", 2), ("neg", 1), ("abs", 1),
        )
    ),
    op("aten::gelu(Tensor self, *, str approximate='none') -> Tensor", _floating_only, flops=per_element(10)),
    *(
        op(f"aten::{n}.Tensor(Tensor self, Tensor other, *, Scalar alpha=1) -> Tensor", _ARITHMETIC, flops=per_element(1))
        for n in ("add", "sub")
    ),
    op(_BINARY.format("mul"), _ARITHMETIC, flops=per_element(1)),
    op(_BINARY.format("div"), pointwise(out="float"), flops=per_element(1)),
)  # fmt: skip
