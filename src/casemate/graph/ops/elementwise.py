# ruff: noqa: E501 - one entry a line
"""Elementwise operations: every element by itself, operands broadcast."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Final, TypeAlias

from casemate.graph.ops.base import (
    INTEGER_RANGE,
    Call,
    Op,
    Rule,
    Value,
    held,
    op,
    per_element,
    temporaries,
)
from casemate.graph.ops.common import broadcast, floats, promote

Range: TypeAlias = "tuple[int, int] | None"


def _range(item: Any) -> Range:
    if isinstance(item, Value):
        return item.range
    return (int(item), int(item)) if type(item) in (int, bool) else None


def _corners(f: Callable[[int, int], int]) -> Callable[[Call, list[Range]], Range]:
    """Interval arithmetic of a function that is monotone in each argument."""

    def bounds(call: Call, given: list[Range]) -> Range:
        a, b = given
        if a is None or b is None or call.args.get("alpha", 1) != 1:
            return None
        found = [f(x, y) for x in a for y in b]
        return min(found), max(found)

    return bounds


def _union(call: Call, given: list[Range]) -> Range:
    known = [g for g in given if g is not None]
    if len(known) < len(given):
        return None
    return min(k[0] for k in known), max(k[1] for k in known)


def _floor(call: Call, given: list[Range]) -> Range:
    """Of both roundings, down and toward 0."""
    a, b = given
    if a is None or b is None or b[0] != b[1] or b[0] <= 0:
        return None
    return a[0] // b[0], -(-a[1] // b[0]) if a[1] < 0 else a[1] // b[0]


def _modulo(call: Call, given: list[Range]) -> Range:
    b = given[1]
    return (0, b[0] - 1) if b is not None and b[0] == b[1] > 0 else None


def _clamped(call: Call, given: list[Range]) -> Range:
    if None in given[1:]:
        return None
    known = given[0] or INTEGER_RANGE["i64"]
    low, high = call.args.get("min"), call.args.get("max")
    if isinstance(low, int):  # bools are numbers here too
        known = max(known[0], int(low)), max(known[1], int(low))
    if isinstance(high, int):
        known = min(known[0], int(high)), min(known[1], int(high))
    return None if known == INTEGER_RANGE["i64"] else known


def pointwise(
    *names: str,
    out: str = "",
    only: tuple[str, ...] = (),
    bounds: Callable[[Call, list[Range]], Range] | None = None,
    divides: bool = False,
) -> Rule:
    """The rule of an op over the arguments ``names`` (tensors or numbers).

    out: the result's dtype; "" is the promoted one, "float" that or float32 for integers.
    only: admitted dtypes of the tensors. bounds: interval arithmetic for integers.
    divides: integer division, whose divisor must be proved different from 0.
    """

    def rule(call: Call) -> Value:
        items = [call[n] for n in names if call.args.get(n) is not None]
        tensors = [x for x in items if isinstance(x, Value)]
        for v in tensors:
            if only and v.dtype not in only:
                call.refuse("model.dtype", f"is not defined for {v.dtype}", "Convert it first.")
        dims, batch = broadcast(call, call.tensors())
        dtype = out if out in INTEGER_RANGE or out == "f32" else promote(items)
        if out == "float" and dtype != "f32":
            dtype = "f32"
        if divides and dtype != "f32":
            _nonzero(call, call["other"], dtype)
        # Operands are cut to the result's dtype before anything else.
        given = [held(dtype, _range(x)) for x in items]
        found = bounds(call, given) if bounds and dtype != "f32" else None
        return Value(dtype, dims, batch, held(dtype, found))

    return rule


def _nonzero(call: Call, divisor: Any, dtype: str) -> None:
    if not any(v.data for v in call.tensors()):
        return
    # The divisor is cut to the result's dtype too: 2^32 - 1 divides an int32 as -1.
    known = held(dtype, _range(divisor))
    # -1 too: the smallest integer divided by it traps, and the process dies.
    if known is None or known[0] <= 0 <= known[1] or known[0] <= -1 <= known[1]:
        call.refuse(
            "model.index-range",
            "divides integers by what may be 0 or -1, which would raise on some record",
            "Divide by a constant, or .clamp(min=1) the divisor.",
        )


def _divide(call: Call) -> Value:
    mode = call["rounding_mode"]
    if mode not in (None, "floor", "trunc"):
        call.argument(f"has the rounding mode {str(mode)[:20]!r}")
    if mode is None:
        return _TRUE_DIVIDE(call)  # type: ignore[return-value]
    return _DIVIDE(call)  # type: ignore[return-value]


def _power(call: Call) -> Value:
    base, exponent = call["self"], call["exponent"]
    if promote([base, exponent]) != "f32" and (
        isinstance(exponent, Value) or exponent < 0 or not isinstance(base, Value)
    ):
        call.refuse("model.dtype", "raises integers to a power", "Call .float() on the base.")
    return pointwise("self", "exponent")(call)  # type: ignore[return-value]


def _select(call: Call) -> Value:
    if call.value("condition").dtype != "bool":
        call.refuse("model.dtype", "needs a bool condition", "Compare, or call .bool().")
    return pointwise("self", "other", bounds=_union)(call)  # type: ignore[return-value]


def _fill(call: Call) -> Value:
    """masked_fill and fill: the dtype of ``self``, whatever the value."""
    v, number = call.value("self"), call["value"]
    mask = call.args.get("mask")
    if mask is not None and mask.dtype != "bool":
        call.refuse("model.dtype", "needs a bool mask", "Compare, or call .bool().")
    if isinstance(number, Value) and number.dims:
        call.shape("fills with a value that has axes")
    if v.dtype != "f32" and promote([number]) == "f32":
        call.refuse("model.dtype", f"fills {v.dtype} with a float", "Call .float() first.")
    dims, batch = broadcast(call, call.tensors())
    found = [_range(number)] if mask is None else [v.range, _range(number)]
    return Value(v.dtype, dims, batch, held(v.dtype, _union(call, found)))


def _convert(call: Call) -> Value:
    v = call.value("self")
    dtype = call["dtype"] or v.dtype
    if v.slot and dtype not in ("i64", "i32"):
        call.mixes("uses the record's place in the batch", "Use what the record itself holds.")
    if v.floating and dtype in ("u8", "i32", "i64"):
        return Value(dtype, v.dims, v.batch)
    if dtype == "bool":
        return Value(dtype, v.dims, v.batch, (0, 1))
    bounds = held(dtype, v.range)
    return Value(dtype, v.dims, v.batch, bounds, slot=v.slot)


def _copy(call: Call) -> Value:
    v, src = call.value("self"), call.value("src")
    dims, batch = broadcast(call, [v, src])
    if dims != v.dims:
        call.shape(f"copies {src.dims} into {v.dims}")
    return Value(v.dtype, dims, batch, held(v.dtype, src.range))


def _detach(call: Call) -> Value:
    v = call.value("self")
    return v.view(v.dims, v.batch)


def _gelu(call: Call) -> Value:
    if call["approximate"] not in ("none", "tanh"):
        call.argument("has an unknown approximation")
    return _FLOAT(call)  # type: ignore[return-value]


def _prelu(call: Call) -> Value:
    floats(call, "self", "weight")
    v, w = call.value("self"), call.value("weight")
    dims, batch = broadcast(call, [v, w])
    if dims != v.dims:
        call.shape("has a weight that does not broadcast to its input")
    return Value("f32", dims, batch)


_INTS: Final = ("bool", "u8", "i32", "i64")
_SAME: Final = pointwise("self")
_FLOAT: Final = pointwise("self", only=("f32",))
_MATH: Final = pointwise("self", out="float")
_TRUE_DIVIDE: Final = pointwise("self", "other", out="float")
_DIVIDE: Final = pointwise("self", "other", bounds=_floor, divides=True)
_COMPARE: Final = pointwise("self", "other", out="bool")
_BITS: Final = pointwise("self", "other", only=_INTS)
_LOGIC: Final = pointwise("self", "other", out="bool")
_MAXIMUM: Final = pointwise("self", "other", bounds=_union)
_ADD: Final = pointwise("self", "other", bounds=_corners(lambda a, b: a + b))
_NUMERIC: Final = ("u8", "i32", "i64", "f32")
_SUB: Final = pointwise("self", "other", only=_NUMERIC, bounds=_corners(lambda a, b: a - b))
_RSUB: Final = pointwise("self", "other", only=_NUMERIC)
_MUL: Final = pointwise("self", "other", bounds=_corners(lambda a, b: a * b))
_MOD: Final = pointwise("self", "other", bounds=_modulo, divides=True)


def _unary(names: str, rule: Rule, flops: int, **more: Any) -> list[Op]:
    return [
        op(f"aten::{n}(Tensor self) -> Tensor", rule, flops=per_element(flops), **more)
        for n in names.split()
    ]


def _binary(overload: str, names: str, rule: Rule, flops: int = 1, **more: Any) -> list[Op]:
    kind = "Scalar" if overload == "Scalar" else "Tensor"
    return [
        op(
            f"aten::{n}.{overload}(Tensor self, {kind} other) -> Tensor",
            rule,
            flops=per_element(flops),
            **more,
        )
        for n in names.split()
    ]


_COMPARISONS: Final = "eq ne lt le gt ge"
_ONE: Final = per_element(1)
_FEW: Final = per_element(5)

TABLE: Final[tuple[Op, ...]] = (
    *_unary("neg", _SAME, 1, linear="first", isometric=True),
    *_unary("relu abs sign sgn floor ceil trunc round square", _SAME, 1),
    *_unary(
        "sigmoid tanh exp exp2 expm1 log log1p log2 log10 sqrt rsqrt reciprocal sin cos tan atan "
        "sinh cosh lgamma",
        _MATH, 5,
    ),
    *_unary("asin acos asinh acosh atanh erf erfc", _MATH, 5, workspace=temporaries(3)),
    *_unary("silu mish hardswish hardsigmoid log_sigmoid selu", _FLOAT, 5),
    *_unary("isnan isinf isfinite logical_not", pointwise("self", out="bool"), 1),
    *_unary("bitwise_not", pointwise("self", only=_INTS), 1),
    op("aten::gelu(Tensor self, *, str approximate='none') -> Tensor", _gelu, flops=per_element(10)),
    op("aten::leaky_relu(Tensor self, Scalar negative_slope=0.01) -> Tensor", _FLOAT, flops=_ONE),
    op("aten::elu(Tensor self, Scalar alpha=1, Scalar scale=1, Scalar input_scale=1) -> Tensor", _FLOAT, flops=_FEW),
    op("aten::celu(Tensor self, Scalar alpha=1.) -> Tensor", _FLOAT, flops=_FEW),
    op("aten::softplus(Tensor self, Scalar beta=1, Scalar threshold=20) -> Tensor", _FLOAT, flops=_FEW),
    op("aten::softshrink(Tensor self, Scalar lambd=0.5) -> Tensor", _FLOAT, flops=_ONE),
    op("aten::hardshrink(Tensor self, Scalar lambd=0.5) -> Tensor", _FLOAT, flops=_ONE),
    op("aten::hardtanh(Tensor self, Scalar min_val=-1, Scalar max_val=1) -> Tensor", _FLOAT, flops=_ONE),
    op("aten::threshold(Tensor self, Scalar threshold, Scalar value) -> Tensor", _FLOAT, flops=_ONE),
    op("aten::logit(Tensor self, float? eps=None) -> Tensor", _FLOAT, flops=_FEW),
    op("aten::nan_to_num(Tensor self, float? nan=None, float? posinf=None, float? neginf=None) -> Tensor", _FLOAT, flops=_ONE),
    op("aten::_prelu_kernel(Tensor self, Tensor weight) -> Tensor", _prelu, flops=_ONE),
    *(
        op(f"aten::{n}.Tensor(Tensor self, Tensor other, *, Scalar alpha=1) -> Tensor", rule, flops=_ONE, linear="add")
        for n, rule in (("add", _ADD), ("sub", _SUB), ("rsub", _RSUB))
    ),
    *(
        op(f"aten::{n}.Scalar(Tensor self, Scalar other, Scalar alpha=1) -> Tensor", rule, flops=_ONE)
        for n, rule in (("add", _ADD), ("sub", _SUB), ("rsub", _RSUB))
    ),
    *_binary("Tensor", "mul", _MUL, linear="each"),
    *_binary("Scalar", "mul", _MUL, linear="first"),
    *_binary("Tensor", "div", _TRUE_DIVIDE, linear="first"),
    *_binary("Scalar", "div", _TRUE_DIVIDE, linear="first"),
    op("aten::div.Tensor_mode(Tensor self, Tensor other, *, str? rounding_mode) -> Tensor", _divide, flops=_ONE),
    op("aten::floor_divide(Tensor self, Tensor other) -> Tensor", _DIVIDE, flops=_ONE),
    *_binary("Scalar", "remainder", _MOD),
    *_binary("Tensor", "remainder", _MOD),
    *_binary("Scalar", "fmod", pointwise("self", "other", divides=True)),
    *_binary("Tensor", "fmod", pointwise("self", "other", divides=True)),
    *_binary("Tensor", _COMPARISONS, _COMPARE),
    *_binary("Scalar", _COMPARISONS, _COMPARE),
    *_binary("Tensor", "bitwise_and bitwise_or bitwise_xor", _BITS),
    *_binary("Scalar", "bitwise_and bitwise_or bitwise_xor", _BITS),
    *_binary("other", "min max", _MAXIMUM),
    *_binary("Tensor", "xlogy", _TRUE_DIVIDE, 5, linear="first"),
    *(
        op(f"aten::{n}(Tensor self, Tensor other) -> Tensor", rule, flops=_ONE, workspace=temporaries(3))
        for n, rule in (
            ("maximum", _MAXIMUM), ("minimum", _MAXIMUM), ("atan2", _TRUE_DIVIDE),
            ("logical_and", _LOGIC), ("logical_or", _LOGIC), ("logical_xor", _LOGIC),
        )
    ),
    op("aten::pow.Tensor_Scalar(Tensor self, Scalar exponent) -> Tensor", _power, flops=_FEW, workspace=temporaries(2)),
    op("aten::pow.Tensor_Tensor(Tensor self, Tensor exponent) -> Tensor", _power, flops=_FEW, workspace=temporaries(2)),
    op("aten::pow.Scalar(Scalar self, Tensor exponent) -> Tensor", _power, flops=_FEW, workspace=temporaries(2)),
    op("aten::clamp(Tensor self, Scalar? min=None, Scalar? max=None) -> Tensor", pointwise("self", "min", "max", bounds=_clamped), flops=_ONE),
    op("aten::clamp_min(Tensor self, Scalar min) -> Tensor", pointwise("self", "min", bounds=_clamped), flops=_ONE),
    op("aten::clamp_max(Tensor self, Scalar max) -> Tensor", pointwise("self", "max", bounds=_clamped), flops=_ONE),
    op("aten::clamp.Tensor(Tensor self, Tensor? min=None, Tensor? max=None) -> Tensor", pointwise("self", "min", "max"), flops=_ONE),
    op("aten::where.self(Tensor condition, Tensor self, Tensor other) -> Tensor", _select, flops=_ONE),
    op("aten::where.ScalarOther(Tensor condition, Tensor self, Scalar other) -> Tensor", _select, flops=_ONE),
    op("aten::where.ScalarSelf(Tensor condition, Scalar self, Tensor other) -> Tensor", _select, flops=_ONE),
    op("aten::where.Scalar(Tensor condition, Scalar self, Scalar other) -> Tensor", _select, flops=_ONE),
    op("aten::masked_fill.Scalar(Tensor self, Tensor mask, Scalar value) -> Tensor", _fill, flops=_ONE),
    op("aten::masked_fill.Tensor(Tensor self, Tensor mask, Tensor value) -> Tensor", _fill, flops=_ONE),
    op("aten::fill.Scalar(Tensor self, Scalar value) -> Tensor", _fill),
    op("aten::fill.Tensor(Tensor self, Tensor value) -> Tensor", _fill),
    op("aten::copy(Tensor self, Tensor src, bool non_blocking=False) -> Tensor", _copy),
    op("aten::lerp.Scalar(Tensor self, Tensor end, Scalar weight) -> Tensor", pointwise("self", "end", only=("f32",)), flops=_FEW),
    op("aten::lerp.Tensor(Tensor self, Tensor end, Tensor weight) -> Tensor", pointwise("self", "end", "weight", only=("f32",)), flops=_FEW),
    *(
        op(f"aten::{n}(Tensor self, Tensor tensor1, Tensor tensor2, *, Scalar value=1) -> Tensor", pointwise("self", "tensor1", "tensor2", only=("f32",)), flops=per_element(3), workspace=temporaries(1))
        for n in ("addcmul", "addcdiv")
    ),
    op(
        "aten::_to_copy(Tensor self, *, ScalarType? dtype=None, Layout? layout=None, Device? device=None, "
        "bool? pin_memory=None, bool non_blocking=False, MemoryFormat? memory_format=None) -> Tensor",
        _convert, slots=True,
    ),
    op("aten::detach(Tensor(a) self) -> Tensor(a)", _detach, view=True, slots=True, linear="first", isometric=True),
)  # fmt: skip
