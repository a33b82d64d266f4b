# ruff: noqa: E501 - one entry a line
"""Reductions and scans along axes; never along the batch."""

from __future__ import annotations

import math
from typing import Final

from casemate.graph.ops.base import Call, Op, Rule, Value, held, op, per_input, temporaries
from casemate.graph.ops.common import drop, floats, off_batch, static

_OVER: Final = "reduces over the batch"
_ALONG: Final = "works along the batch"
_MEND: Final = "Reduce over the record's own axes, such as dim=-1, and leave axis 0."


def _axes(call: Call, v: Value, name: str = "dim") -> tuple[int, ...]:
    if v.batch is not None and call.args.get(name) in (None, ()):
        call.mixes(f"{_OVER}: it names no axes, so it takes all", _MEND)
    if call.args.get(name) == () and not call.op.startswith(("aten.amax", "aten.amin")):
        call.argument("has an empty list of axes")
    axes = call.axes(call.args.get(name), v.rank)
    off_batch(call, v, axes, _OVER, _MEND)
    return tuple(a for a in axes if a < v.rank)


def _summed(v: Value, count: int) -> tuple[int, int] | None:
    if v.range is None:
        return None
    return min(0, v.range[0] * count), max(0, v.range[1] * count)


def reduction(*, dtype: str = "", only_floats: bool = False, adds: bool = False) -> Rule:
    """Removes axes. dtype: of the result, "" as it was; adds: integers are summed as int64."""

    def rule(call: Call) -> Value:
        v = call.value("self")
        if only_floats and call.args.get("dtype") != "f32":
            floats(call, "self")
        axes = _axes(call, v)
        keep = bool(call.args.get("keepdim", False))
        dims, batch = drop(v, axes, keep)
        wanted = call.args.get("dtype")
        out = wanted or dtype or ("i64" if adds and not v.floating else v.dtype)
        if only_floats and out != "f32" and dtype == "":
            call.refuse("model.dtype", f"is not defined for {out}", "Call .float() first.")
        count = math.prod(v.dims[a] for a in axes)
        bounds = _summed(v, count) if adds else v.range if out == v.dtype else None
        return Value(out, dims, batch, held(out, bounds))

    return rule


def _sum_of_records(call: Call) -> Value | None:
    """A sum over axes among which the batch's is."""
    v = call.value("self")
    if v.batch is None or not v.floating or call.args.get("dtype") not in (None, "f32"):
        return None
    axes = call.axes(call.args.get("dim"), v.rank)
    if v.batch.axis not in axes:
        return None
    keep = bool(call.args.get("keepdim", False))
    if keep:
        dims = tuple(1 if i in axes else d for i, d in enumerate(v.dims))
    else:
        dims = tuple(d for i, d in enumerate(v.dims) if i not in axes)
    return Value("f32", dims, summed=True)


_ADDS: Final = {"contract": _sum_of_records, "site": "sum", "linear": "first"}


def _with_indices(call: Call) -> tuple[Value, Value]:
    v = call.value("self")
    axis = call.axis(call["dim"], v.rank)
    off_batch(call, v, (axis,), _OVER, _MEND)
    dims, batch = drop(v, (axis,) if v.rank else (), call["keepdim"])
    n = v.dims[axis] if v.rank else 1
    return Value(v.dtype, dims, batch, v.range), Value("i64", dims, batch, (0, max(n - 1, 0)))


def _argument(call: Call) -> Value:
    v = call.value("self")
    axes = _axes(call, v)
    count = math.prod(v.dims[a] for a in axes)
    dims, batch = drop(v, axes, call["keepdim"])
    return Value("i64", dims, batch, (0, max(count - 1, 0)))


def along(*, integers: str = "", only_floats: bool = True) -> Rule:
    """Keeps the shape and mixes along one axis (softmax, cumulative sums)."""

    def rule(call: Call) -> Value:
        v = call.value("self")
        axis = call.axis(call["dim"], v.rank)
        off_batch(call, v, (axis,), _ALONG, _MEND)
        out = call.args.get("dtype") or v.dtype
        if only_floats and out != "f32":
            call.refuse("model.dtype", f"is not defined for {out}", "Call .float() first.")
        if integers and out != "f32" and not call.args.get("dtype"):
            out = integers
        bounds = _summed(v, v.dims[axis] if v.rank else 1) if integers else None
        return Value(out, v.dims, v.batch, held(out, bounds))

    return rule


def _sort(call: Call) -> tuple[Value, Value]:
    v = call.value("self")
    axis = call.axis(call["dim"], v.rank)
    off_batch(call, v, (axis,), "sorts the batch", _MEND)
    n = v.dims[axis] if v.rank else 1
    return (
        Value(v.dtype, v.dims, v.batch, v.range),
        Value("i64", v.dims, v.batch, (0, max(n - 1, 0))),
    )


def _topk(call: Call) -> tuple[Value, Value]:
    v = call.value("self")
    axis = call.axis(call["dim"], v.rank)
    off_batch(call, v, (axis,), "takes the largest of the batch", _MEND)
    k = static(call, call["k"], "k")
    n = v.dims[axis] if v.rank else 1
    if not 0 <= k <= n:
        call.shape(f"takes {k} of {n}")
    dims = tuple(k if i == axis else d for i, d in enumerate(v.dims))
    return Value(v.dtype, dims, v.batch, v.range), Value("i64", dims, v.batch, (0, max(n - 1, 0)))


def _variance(outputs: int) -> Rule:
    def rule(call: Call) -> Value | tuple[Value, ...]:
        v = call.value("self")
        floats(call, "self")
        dims, batch = drop(v, _axes(call, v), call["keepdim"])
        out = Value("f32", dims, batch)
        return out if outputs == 1 else (out,) * outputs

    return rule


_D: Final = "bool keepdim=False, *, ScalarType? dtype=None) -> Tensor"
_C: Final = "(Tensor self, int[1]? dim=None, *, Scalar? correction=None, bool keepdim=False)"
_I: Final = "(Tensor self, int dim, bool keepdim=False) -> (Tensor values, Tensor indices)"
_MEAN: Final = reduction(only_floats=True)
_SUM: Final = reduction(adds=True)
_FEW: Final = per_input(4)
_ONE: Final = per_input(1)

TABLE: Final[tuple[Op, ...]] = (
    op("aten::sum(Tensor self, *, ScalarType? dtype=None) -> Tensor", _SUM, flops=_ONE, **_ADDS),
    op(f"aten::sum.dim_IntList(Tensor self, int[1]? dim, {_D}", _SUM, flops=_ONE, **_ADDS),
    op("aten::mean(Tensor self, *, ScalarType? dtype=None) -> Tensor", _MEAN, flops=_ONE),
    op(f"aten::mean.dim(Tensor self, int[1]? dim, {_D}", _MEAN, flops=_ONE),
    op(f"aten::prod.dim_int(Tensor self, int dim, {_D}", reduction(only_floats=True), flops=_ONE),
    *(
        op(f"aten::{n}(Tensor self, int[1] dim=[], bool keepdim=False) -> Tensor", reduction(), flops=_ONE)
        for n in ("amax", "amin")
    ),
    *(
        op(f"aten::{n}.{o}(Tensor self, {d} dim{e}, bool keepdim=False) -> Tensor", reduction(dtype="bool"), flops=_ONE)
        for n in ("all", "any")
        for o, d, e in (("dim", "int", ""), ("dims", "int[]?", "=None"))
    ),
    op("aten::max(Tensor self) -> Tensor", reduction(), flops=_ONE, workspace=temporaries(2)),
    op("aten::min(Tensor self) -> Tensor", reduction(), flops=_ONE, workspace=temporaries(2)),
    op("aten::all(Tensor self) -> Tensor", reduction(dtype="bool"), flops=_ONE),
    op("aten::any(Tensor self) -> Tensor", reduction(dtype="bool"), flops=_ONE),
    op(f"aten::max.dim{_I}", _with_indices, flops=_ONE),
    op(f"aten::min.dim{_I}", _with_indices, flops=_ONE),
    op("aten::argmax(Tensor self, int? dim=None, bool keepdim=False) -> Tensor", _argument, flops=_ONE),
    op("aten::argmin(Tensor self, int? dim=None, bool keepdim=False) -> Tensor", _argument, flops=_ONE),
    op(f"aten::var.correction{_C} -> Tensor", _variance(1), flops=_FEW),
    op(f"aten::std.correction{_C} -> Tensor", _variance(1), flops=_FEW),
    op(f"aten::var_mean.correction{_C} -> (Tensor, Tensor)", _variance(2), flops=_FEW),
    op(f"aten::std_mean.correction{_C} -> (Tensor, Tensor)", _variance(2), flops=_FEW),
    op("aten::logsumexp(Tensor self, int[1] dim, bool keepdim=False) -> Tensor", reduction(only_floats=True), flops=_FEW, workspace=temporaries(1)),
    op("aten::linalg_vector_norm(Tensor self, Scalar ord=2, int[1]? dim=None, bool keepdim=False, *, ScalarType? dtype=None) -> Tensor", reduction(only_floats=True), flops=_FEW),
    op("aten::softmax.int(Tensor self, int dim, ScalarType? dtype=None) -> Tensor", along(), flops=_FEW),
    op("aten::log_softmax.int(Tensor self, int dim, ScalarType? dtype=None) -> Tensor", along(), flops=_FEW),
    op("aten::cumsum(Tensor self, int dim, *, ScalarType? dtype=None) -> Tensor", along(integers="i64", only_floats=False), flops=_ONE),
    op("aten::cumprod(Tensor self, int dim, *, ScalarType? dtype=None) -> Tensor", along(), flops=_ONE, workspace=temporaries(2)),
    op("aten::logcumsumexp(Tensor self, int dim) -> Tensor", along(), flops=_FEW, workspace=temporaries(5)),
    op("aten::sort(Tensor self, int dim=-1, bool descending=False) -> (Tensor values, Tensor indices)", _sort, flops=per_input(20)),
    op("aten::sort.stable(Tensor self, *, bool? stable, int dim=-1, bool descending=False) -> (Tensor values, Tensor indices)", _sort, flops=per_input(20)),
    op("aten::topk(Tensor self, SymInt k, int dim=-1, bool largest=True, bool sorted=True) -> (Tensor values, Tensor indices)", _topk, flops=per_input(20)),
)  # fmt: skip
