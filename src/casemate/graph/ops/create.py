# ruff: noqa: E501 - one entry a line
"""Constants made in the graph. With the batch in its shape, a constant is the same for each record."""

from __future__ import annotations

import dataclasses
import math
from typing import Any, Final

from casemate.graph.model import Size
from casemate.graph.ops.base import Batch, Call, Op, Rule, Value, op
from casemate.graph.ops.common import creation, promote, static

_PLACES: Final = "Layout? layout=None, Device? device=None, bool? pin_memory=None"
_REST: Final = f"ScalarType? dtype=None, {_PLACES}"


def _known(v: Value, number: Any) -> Value:
    if v.floating or type(number) not in (int, bool):
        return v
    return dataclasses.replace(v, bounds=(int(number), int(number)))


def sized(number: int | None) -> Rule:
    """zeros, ones, full and their new_ forms; the number is ``fill_value`` for ``None``."""

    def rule(call: Call) -> Value:
        fill = call["fill_value"] if number is None else number
        like = call.args.get("self")
        dtype = call["dtype"] or (
            like.dtype if like else "f32" if number is not None else promote([fill])
        )
        return _known(creation(call, call["size"], dtype), fill)

    return rule


def like(number: int | None) -> Rule:
    """zeros_like and the like."""

    def rule(call: Call) -> Value:
        v = call.value("self")
        fill = call["fill_value"] if number is None else number
        return _known(Value(call["dtype"] or v.dtype, v.dims, v.batch), fill)

    return rule


def _arange(call: Call) -> Value:
    start, end, step = (call.args.get(n, d) for n, d in (("start", 0), ("end", None), ("step", 1)))
    if isinstance(end, Size):
        if start != 0 or step != 1 or end != Size(a=1) or call["dtype"] not in (None, "i64", "i32"):
            call.mixes("counts along the batch", "Give each record the same constant.")
        return Value(call["dtype"] or "i64", (1,), Batch(0), slot=True)
    if isinstance(start, Size) or isinstance(step, Size) or step == 0:
        call.argument("counts from or by what is no constant")
    places = (end - start) / step
    if not math.isfinite(places):
        call.argument("counts to infinity")
    count = max(0, math.ceil(places))
    dtype = call["dtype"] or promote([start, end, step])
    bounds = None
    if dtype != "f32" and all(type(x) is int for x in (start, end, step)) and count:
        last = start + (count - 1) * step
        bounds = min(start, last), max(start, last)
    return Value(dtype, (count,), None, bounds)


def _scalar(call: Call) -> Value:
    return _known(Value(call["dtype"] or "f32", ()), call["s"])


def _eye(call: Call) -> Value:
    n = static(call, call["n"], "a size")
    m = static(call, call.args.get("m", n), "a size")
    if n < 0 or m < 0:
        call.shape("has a negative size")
    return Value(call["dtype"] or "f32", (n, m))


def _linspace(call: Call) -> Value:
    return Value(call["dtype"] or "f32", (max(0, static(call, call["steps"], "steps")),))


TABLE: Final[tuple[Op, ...]] = (
    op(f"aten::zeros(SymInt[] size, *, {_REST}) -> Tensor", sized(0)),
    op(f"aten::ones(SymInt[] size, *, {_REST}) -> Tensor", sized(1)),
    op(f"aten::full(SymInt[] size, Scalar fill_value, *, {_REST}) -> Tensor", sized(None)),
    op(f"aten::new_zeros(Tensor self, SymInt[] size, *, {_REST}) -> Tensor", sized(0)),
    op(f"aten::new_ones(Tensor self, SymInt[] size, *, {_REST}) -> Tensor", sized(1)),
    op(f"aten::new_full(Tensor self, SymInt[] size, Scalar fill_value, *, {_REST}) -> Tensor", sized(None)),
    op(f"aten::zeros_like(Tensor self, *, {_REST}, MemoryFormat? memory_format=None) -> Tensor", like(0)),
    op(f"aten::ones_like(Tensor self, *, {_REST}, MemoryFormat? memory_format=None) -> Tensor", like(1)),
    op(f"aten::full_like(Tensor self, Scalar fill_value, *, {_REST}, MemoryFormat? memory_format=None) -> Tensor", like(None)),
    op(f"aten::arange(Scalar end, *, {_REST}) -> Tensor", _arange),
    op(f"aten::arange.start(Scalar start, Scalar end, *, {_REST}) -> Tensor", _arange),
    op(f"aten::arange.start_step(Scalar start, Scalar end, Scalar step=1, *, {_REST}) -> Tensor", _arange),
    op(f"aten::scalar_tensor(Scalar s, *, {_REST}) -> Tensor", _scalar),
    op(f"aten::eye(SymInt n, *, {_REST}) -> Tensor", _eye),
    op(f"aten::eye.m(SymInt n, SymInt m, *, {_REST}) -> Tensor", _eye),
    op(f"aten::linspace(Scalar start, Scalar end, int steps, *, {_REST}) -> Tensor", _linspace),
)  # fmt: skip
