# ruff: noqa: E501 - one entry a line
"""Operations of the joint graph of forward and backward that no model may hold: what autograd calls
below the composite operations, and the derivatives. Their outputs that sum over the records are S.

Some entries stand for ones of the models' table, with what is true of them for S. There a float
value with the bounds (0, 0) is proved to be zero: what S is written into must be.
"""

from __future__ import annotations

import dataclasses
from typing import Any, Final

from casemate.graph.model import Size
from casemate.graph.ops import create, elementwise, index, matmul, reduce, view
from casemate.graph.ops import joint_layers as layers
from casemate.graph.ops.base import Batch, Call, Op, Outputs, Rule, Value, op, per_element
from casemate.graph.ops.common import broadcast, floats, off_batch, refold, static
from casemate.graph.ops.joint_layers import again, matches, one, summed
from casemate.graph.ops.loss import _REDUCES, _classes
from casemate.graph.ops.reduce import along

_AFFINE: Final = "adds or writes a constant to a sum over records"


def zero(item: Any) -> bool:
    """Whether a value or a number is proved to be 0."""
    return item.bounds == (0, 0) if isinstance(item, Value) else item == 0


def like(name: str, *others: str) -> Rule:
    """The result is as the argument ``name``; the other tensors lie as it does."""

    def rule(call: Call) -> Value:
        base = call.value(name)
        for v in call.tensors():
            matches(call, v, base)
        return Value(base.dtype, base.dims, base.batch)

    return rule


def same(name: str) -> Rule:
    """Elementwise on float tensors of one shape and one place of the batch, which ``name`` has."""
    alike = like(name)

    def rule(call: Call) -> Outputs:
        for v in call.tensors():
            if not v.floating:
                call.refuse("model.dtype", f"needs float32, not {v.dtype}", "Call .float() on it.")
        return alike(call)

    return rule


def wide(call: Call) -> Value:
    """Elementwise on float tensors that broadcast."""
    for v in call.tensors():
        if not v.floating:
            call.refuse("model.dtype", f"needs float32, not {v.dtype}", "Call .float() on it.")
    dims, batch = broadcast(call, call.tensors())
    return Value("f32", dims, batch)


# --- pointwise


def _prelu_backward(call: Call) -> tuple[Value, ...]:
    v = call.value("self")
    matches(call, call.value("grad_output"), v)
    out = wide(call)
    if (out.dims, out.batch) != (v.dims, v.batch):
        call.shape("has a weight that does not broadcast to its input")
    return out, out


def _log_sigmoid(call: Call) -> tuple[Value, ...]:
    out = one(same("self"), call)
    return out, out


def _glu_backward(call: Call) -> Value:
    v = call.value("self")
    floats(call, "grad_output", "self")
    matches(call, call.value("grad_output"), one(view._glu, call))
    return Value("f32", v.dims, v.batch)


def _loss_backward(call: Call) -> Value:
    if call["reduction"] != 0:
        call.mixes(_REDUCES)
    return wide(call)


def _softmax(call: Call) -> Outputs:
    if call.args.get("half_to_float"):
        call.argument("converts half precision")
    return along()(call)


def _softmax_backward(call: Call) -> Outputs:
    v = call.value("output")
    off_batch(call, v, (call.axis(call["dim"], v.rank),), "works along the batch")
    if call["input_dtype"] != "f32":
        call.argument("converts precision")
    return same("output")(call)


# --- views


def _view_as(call: Call) -> Value:
    return refold(call, call.value("self"), call["size"], "reshapes")


def _grown(call: Call, grad: Value, axis: int, n: object, taken: int | None) -> Value:
    """``grad`` with the axis of n restored; it holds ``taken`` places of it, or lacks it (None)."""
    sizes = call["input_sizes"]
    long = static(call, n, "a size")
    short = list(grad.shape)
    dims, batch = list(grad.dims), grad.batch
    if taken is None:
        short.insert(axis, long)
        dims.insert(axis, long)
        batch = batch and Batch(batch.axis + (axis <= batch.axis), batch.outer, batch.inner)
    else:
        off_batch(call, grad, (axis,), "writes over some records of the batch")
        if grad.dims[axis] != taken:
            call.shape(f"writes {grad.dims[axis]} places where there are {taken}")
        short[axis] = dims[axis] = long
    if tuple(short) != sizes:
        call.mixes("gives a gradient of another shape than the records have")
    return Value("f32", tuple(dims), batch)


def _select_backward(call: Call) -> Value:
    grad, sizes = call.value("grad_output"), call["input_sizes"]
    floats(call, "grad_output")
    axis = call.axis(call["dim"], grad.rank + 1)
    if len(sizes) != grad.rank + 1:
        call.shape("restores another number of axes")
    n = static(call, sizes[axis], "a size")
    view._inside(call, static(call, call["index"], "an index"), n)
    return _grown(call, grad, axis, n, None)


def _slice_backward(call: Call) -> Value:
    grad, sizes = call.value("grad_output"), call["input_sizes"]
    floats(call, "grad_output")
    axis = call.axis(call["dim"], grad.rank)
    if len(sizes) != grad.rank or not grad.rank:
        call.shape("restores another number of axes")
    if grad.batch is not None and grad.batch.axis == axis:
        end = call["end"]
        whole = end == Size(a=grad.dims[axis]) or end == 2**63 - 1
        if call["start"] != 0 or not whole or call["step"] != 1 or sizes != grad.shape:
            call.mixes("writes over some records of the batch")
        return Value("f32", grad.dims, grad.batch)
    base = Value("f32", (static(call, sizes[axis], "a size"),))
    return _grown(call, grad, axis, sizes[axis], view._span(call, base, 0))


def _diagonal_backward(call: Call) -> Value:
    grad, sizes, offset = call.value("grad_output"), call["input_sizes"], call["offset"]
    floats(call, "grad_output")
    rank = len(sizes)
    a, b = call.axis(call["dim1"], rank), call.axis(call["dim2"], rank)
    if a == b or rank != grad.rank + 1 or type(offset) is not int:
        call.argument("names one axis twice")
    off_batch(call, grad, (grad.rank - 1,), "takes a diagonal through the batch")
    n, m = (static(call, sizes[i], "a size") for i in (a, b))
    if grad.dims[-1] != max(min(n + min(offset, 0), m - max(offset, 0)), 0):
        call.shape(f"has a diagonal of {grad.dims[-1]}")
    rest = Value("f32", grad.dims[:-1], grad.batch)
    low, high = sorted(((a, n), (b, m)))
    middle = tuple(d for i, d in enumerate(sizes) if i != high[0])
    first = _grown(again(call, input_sizes=middle), rest, low[0], low[1], None)
    return _grown(call, first, high[0], high[1], None)


def _unfold_backward(call: Call) -> Value:
    grad, sizes = call.value("grad_in"), call["input_sizes"]
    floats(call, "grad_in")
    axis = call.axis(call["dim"], len(sizes))
    size, step = call["size"], call["step"]
    if grad.rank != len(sizes) + 1 or type(size) is not int or type(step) is not int:
        call.shape("restores another number of axes")
    off_batch(call, grad, (axis, grad.rank - 1), "lays windows over the batch")
    n = static(call, sizes[axis], "a size")
    if step < 1 or not 0 <= size <= n or grad.dims[-1] != size:
        call.shape("takes windows that do not fit")
    places = (n - size) // step + 1
    return _grown(call, Value("f32", grad.dims[:-1], grad.batch), axis, n, places)


# --- losses


def _nll(call: Call) -> Value:
    """The losses. Without a reduction torch leaves the total weight at 0."""
    floats(call, "self")
    y, rank = call.value("target"), 4 if "loss2d" in call.op else 2
    if y.dtype not in ("i64", "u8") or call.value("self").rank != rank:
        call.shape(f"needs scores of {rank} axes and classes as integers")
    static(call, call["ignore_index"], "a class")
    return _classes(call)


def _nll_forward(call: Call) -> tuple[Value, ...]:
    return _nll(call), Value("f32", (), bounds=(0, 0))


def _nll_backward(call: Call) -> Value:
    x, total = call.value("self"), call.value("total_weight")
    floats(call, "grad_output")
    matches(call, call.value("grad_output"), _nll(call))
    if total.batch is not None or not zero(total):
        call.mixes(_REDUCES)
    return Value("f32", x.dims, x.batch)


# --- indices: what a record adds into, and where


def _embedding_backward(call: Call) -> Value:
    grad, i = call.value("grad_output"), call.value("indices")
    floats(call, "grad_output")
    rows = static(call, call["num_weights"], "a number of rows")
    static(call, call["padding_idx"], "a row")
    if call["scale_grad_by_freq"]:
        call.mixes("scales gradients by how often an index stands in the batch")
    table = Value("f32", (rows, grad.dims[-1] if grad.rank else 0))
    if grad.rank != i.rank + 1:
        call.shape(f"has gradients {grad.dims} for indices {i.dims}")
    arguments = {"weight": table, "indices": i, "scale_grad_by_freq": False, "sparse": False}
    matches(call, grad, one(index._embedding, again(call, **arguments)))
    return summed(table.dims, grad.batch)


def _put(call: Call) -> Value:
    """``self`` with ``values`` added at ``indices``, as ``self[indices]`` would take them."""
    v, new = call.value("self"), call.value("values")
    floats(call, "self", "values")
    if not call["accumulate"]:
        call.argument("writes over what is there")
    if new.slot:
        call.mixes("uses the record's place in the batch")
    return _added(call, v, new, one(index._index, call))


def _add_at(call: Call) -> Value:
    v, new = call.value("self"), call.value("source")
    floats(call, "self", "source")
    return _added(call, v, new, one(index._index_select, call))


def _added(call: Call, v: Value, new: Value, taken: Value) -> Value:
    matches(call, new, taken)
    if v.batch is None and new.batch is not None:
        if not zero(v):
            call.mixes(_AFFINE)
        return summed(v.dims, new.batch)
    _sums_or_zeros(call, v, new)
    return Value("f32", v.dims, v.batch)


def _sums_or_zeros(call: Call, *values: Any) -> None:
    """Refuse S beside what is neither S nor 0."""
    if not _all_linear(*values):
        call.mixes(_AFFINE)


def _all_linear(*values: Any) -> bool:
    sums = [isinstance(v, Value) and v.summed for v in values]
    return not any(sums) or all(s or zero(v) for s, v in zip(sums, values, strict=True))


def _scatter_add(call: Call) -> Outputs:
    """scatter_add and scatter.src: S only into zeros."""
    _sums_or_zeros(call, call.value("self"), call.value("src"))
    return index._scatter(call)


# --- what changes for S: the models' entry, with a condition


def _other(name: str) -> Any:
    """``name`` must be 0 where another operand is S."""

    def condition(call: Call) -> bool:
        return zero(call[name])

    return condition


def _float_sums(call: Call) -> bool:
    return call.args.get("dtype") in (None, "f32")


def _sides(*names: str) -> Any:
    """Those of the operands that are no S are 0."""

    def condition(call: Call) -> bool:
        return _all_linear(*(call[n] for n in names))

    return condition


def _plus(call: Call) -> bool:
    return isinstance(call["other"], Value) or zero(call["other"])


def _replaces(call: Call) -> bool:
    return call.value("src").summed and call.value("self").floating


def again_for_sums(entry: Op, condition: Any, **more: Any) -> Op:
    """The entry, refusing S where the condition does not hold."""

    def rule(call: Call) -> Outputs:
        if any(v.summed for v in call.tensors()) and not condition(call):
            call.mixes(_AFFINE)
        return entry.rule(call)

    return dataclasses.replace(entry, rule=rule, **more)


def _known_zero(entry: Op) -> Op:
    """A constant, with the bounds (0, 0) where it is 0, and the fold of the batch it is made for."""
    zeros = "zero" in entry.schema.name

    def rule(call: Call) -> Value:
        v = one(entry.rule, call)
        base = call.args.get("self")
        if v.batch is not None and base is not None and base.batch is not None:
            fold = Batch(v.batch.axis, base.batch.outer, base.batch.inner)
            if fold.outer * fold.inner == v.dims[fold.axis]:
                v = v.view(v.dims, fold)
        number = 0 if zeros else call.args.get("fill_value", call.args.get("s"))
        return dataclasses.replace(v, bounds=(0, 0)) if number == 0 else v

    # Zeros are a linear function of whatever they are made like.
    made_like = zeros and any(p.kind == "Tensor" for p in entry.schema.params)
    return dataclasses.replace(entry, rule=rule, linear="first" if made_like else "")


def _empty(call: Call) -> Value:
    """What is not written yet is admitted only where there is nothing of it."""
    if 0 not in call["size"] or any(type(d) is not int for d in call["size"]):
        call.refuse("model.uninitialised", "reads memory that nothing has written", "Use zeros.")
    return Value(call["dtype"] or "f32", call["size"])


def _mv(call: Call) -> Value | None:
    """``mv`` and ``dot`` over the batch."""
    a, b = call.value("self"), call.value("vec" if "vec" in call.args else "tensor")
    left, right = a.batch, b.batch
    if left is None or right is None or not (a.floating and b.floating):
        return None
    if b.rank != 1 or left.axis != a.rank - 1 or a.rank != (2 if "vec" in call.args else 1):
        return None
    if (left.outer, left.inner) != (right.outer, right.inner) or a.dims[-1] != b.dims[0]:
        call.mixes("multiplies records with other records")
    return summed(a.dims[:-1], left)


def _entries(*families: tuple[Op, ...]) -> dict[str, Op]:
    return {e.schema.name.removeprefix("aten."): e for family in families for e in family}


_HAVE: Final = _entries(elementwise.TABLE, reduce.TABLE, view.TABLE, matmul.TABLE, index.TABLE, create.TABLE)  # fmt: skip
_CONDITIONS: Final[dict[str, tuple[Any, dict[str, Any]]]] = {
    **{f"{n}.Tensor": (_plus, {}) for n in ("add", "sub", "rsub")},
    **{n: (_float_sums, {}) for n in ("sum.default", "sum.dim_IntList")},
    **{n: (_float_sums, {"linear": "first"}) for n in ("mean.default", "mean.dim", "cumsum.default", "_to_copy.default")},
    "where.self": (_sides("self", "other"), {"linear": "each"}),
    "masked_fill.Scalar": (_other("value"), {"linear": "first"}),
    "masked_fill.Tensor": (_other("value"), {"linear": "first"}),
    "constant_pad_nd.default": (_other("value"), {"linear": "first"}),
    "scatter.value": (_other("value"), {"linear": "first"}),
    "copy.default": (_replaces, {"linear": "each"}),
    **{f"{n}_scatter.default": (_sides("self", "src"), {"linear": "each"}) for n in ("select", "slice")},
}  # fmt: skip
_CONSTANTS: Final = "zeros.default zeros_like.default new_zeros.default full.default full_like.default new_full.default scalar_tensor.default"

_PLACES: Final = "Layout? layout=None, Device? device=None, bool? pin_memory=None"
_FLOPS: Final = per_element(5)
_FIRST: Final[dict[str, Any]] = {"flops": _FLOPS, "linear": "first"}
_GRAD: Final = "(Tensor grad_output, Tensor self"
_VIEW: Final[dict[str, Any]] = {"view": True, "slots": True, "linear": "first", "isometric": True}
_MOVED: Final[dict[str, Any]] = {"linear": "first", "isometric": True}
_TARGET: Final = "Tensor target, Tensor? weight, int reduction, SymInt ignore_index"

_POINTWISE: Final = {
    "threshold_backward": (f"{_GRAD}, Scalar threshold)", "grad_output"),
    "tanh_backward": ("(Tensor grad_output, Tensor output)", "grad_output"),
    "sigmoid_backward": ("(Tensor grad_output, Tensor output)", "grad_output"),
    "elu_backward": ("(Tensor grad_output, Scalar alpha, Scalar scale, Scalar input_scale, bool is_result, Tensor self_or_result)", "grad_output"),
    "leaky_relu_backward": (f"{_GRAD}, Scalar negative_slope, bool self_is_result)", "grad_output"),
    "gelu_backward": (f'{_GRAD}, *, str approximate="none")', "grad_output"),
    "softplus_backward": (f"{_GRAD}, Scalar beta, Scalar threshold)", "grad_output"),
    "softshrink_backward": (f"{_GRAD}, Scalar lambd)", "grad_output"),
    "hardshrink_backward": ("(Tensor grad_out, Tensor self, Scalar lambd)", "grad_out"),
    "hardtanh_backward": (f"{_GRAD}, Scalar min_val, Scalar max_val)", "grad_output"),
    "logit_backward": (f"{_GRAD}, float? eps=None)", "grad_output"),
    "log_sigmoid_backward": (f"{_GRAD}, Tensor buffer)", "grad_output"),
    **{f"{n}_backward": (f"{_GRAD})", "grad_output") for n in ("silu", "mish", "hardswish", "hardsigmoid")},
}  # fmt: skip

_OWN: Final[tuple[Op, ...]] = (
    op("aten::view(Tensor(a) self, SymInt[] size) -> Tensor(a)", _view_as, **_VIEW),
    op("aten::_unsafe_view(Tensor self, SymInt[] size) -> Tensor", _view_as, **_VIEW),
    op("aten::alias(Tensor(a) self) -> Tensor(a)", elementwise._detach, **_VIEW),
    op("aten::lift_fresh(Tensor(a) self) -> Tensor(a)", elementwise._detach, **_VIEW),
    op("aten::clone(Tensor self, *, MemoryFormat? memory_format=None) -> Tensor", elementwise._detach, slots=True, **_MOVED),
    op("aten::unsafe_split.Tensor(Tensor self, SymInt split_size, int dim=0) -> Tensor[]", view._split, view=True, linear="first"),
    *(op(f"aten::{n}{args} -> Tensor", same(base), **_FIRST) for n, (args, base) in _POINTWISE.items()),
    op(f"aten::_prelu_kernel_backward{_GRAD}, Tensor weight) -> (Tensor, Tensor)", _prelu_backward, **_FIRST),
    op("aten::log_sigmoid_forward(Tensor self) -> (Tensor output, Tensor buffer)", _log_sigmoid, flops=_FLOPS),
    op("aten::digamma(Tensor self) -> Tensor", elementwise._MATH, flops=_FLOPS),
    op(f"aten::glu_backward{_GRAD}, int dim) -> Tensor", _glu_backward, **_FIRST),
    *(
        op(f"aten::{n}_backward{_GRAD}, Tensor target, int reduction{more}) -> Tensor", _loss_backward, **_FIRST)
        for n, more in (("mse_loss", ""), ("soft_margin_loss", ""), ("smooth_l1_loss", ", float beta"), ("huber_loss", ", float delta"))
    ),
    *(
        op(f"aten::{n}(Tensor self, int dim, bool half_to_float) -> Tensor", _softmax, flops=_FLOPS)
        for n in ("_softmax", "_log_softmax")
    ),
    op("aten::_safe_softmax(Tensor self, int dim, ScalarType? dtype=None) -> Tensor", _softmax, flops=_FLOPS),
    *(
        op(f"aten::{n}_backward_data(Tensor grad_output, Tensor output, int dim, ScalarType input_dtype) -> Tensor", _softmax_backward, **_FIRST)
        for n in ("_softmax", "_log_softmax")
    ),
    op("aten::select_backward(Tensor grad_output, SymInt[] input_sizes, int dim, SymInt index) -> Tensor", _select_backward, **_MOVED),
    op("aten::slice_backward(Tensor grad_output, SymInt[] input_sizes, int dim, SymInt start, SymInt end, SymInt step) -> Tensor", _slice_backward, **_MOVED),
    op("aten::diagonal_backward(Tensor grad_output, SymInt[] input_sizes, int offset, int dim1, int dim2) -> Tensor", _diagonal_backward, **_MOVED),
    op("aten::unfold_backward(Tensor grad_in, SymInt[] input_sizes, int dim, int size, int step) -> Tensor", _unfold_backward, linear="first"),
    *(op(f"aten::nll_loss{d}_forward(Tensor self, {_TARGET}) -> (Tensor output, Tensor total_weight)", _nll_forward, flops=_FLOPS) for d in ("", "2d")),
    *(op(f"aten::nll_loss{d}_backward{_GRAD}, {_TARGET}, Tensor total_weight) -> Tensor", _nll_backward, **_FIRST) for d in ("", "2d")),
    op(
        "aten::embedding_dense_backward(Tensor grad_output, Tensor indices, SymInt num_weights, SymInt padding_idx, bool scale_grad_by_freq) -> Tensor",
        _embedding_backward, contract=layers.contracted(_embedding_backward), site="embedding", linear="first", scatters=True,
    ),
    op("aten::index_put(Tensor self, Tensor?[] indices, Tensor values, bool accumulate=False) -> Tensor", _put, contract=layers.contracted(_put), slots=True, linear="each", scatters=True),
    op("aten::index_add(Tensor self, int dim, Tensor index, Tensor source, *, Scalar alpha=1) -> Tensor", _add_at, contract=layers.contracted(_add_at), linear="each"),
    *(dataclasses.replace(_HAVE[n], rule=_scatter_add, linear="each") for n in ("scatter_add.default", "scatter.src")),
    *(again_for_sums(_HAVE[n], condition, **more) for n, (condition, more) in _CONDITIONS.items()),
    *(_known_zero(_HAVE[n]) for n in _CONSTANTS.split()),
    _known_zero(op(f"aten::_efficientzerotensor(SymInt[] size, *, ScalarType? dtype=None, {_PLACES}) -> Tensor", create.sized(0))),
    op(f"aten::empty.memory_format(SymInt[] size, *, ScalarType? dtype=None, {_PLACES}, MemoryFormat? memory_format=None) -> Tensor", _empty),
    *(dataclasses.replace(_HAVE[n], contract=_mv, linear="each") for n in ("mv.default", "dot.default")),
)  # fmt: skip

TABLE: Final[tuple[Op, ...]] = _OWN + layers.TABLE
