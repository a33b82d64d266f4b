# ruff: noqa: E501 - one entry a line
"""Matrix products: the contracted axis is never the batch."""

from __future__ import annotations

from typing import Final

from casemate.graph.ops.base import Batch, Call, Op, Value, op
from casemate.graph.ops.common import broadcast, constant, floats

_CONTRACTS: Final = "contracts over the batch, so that records are summed"
_PAIRS: Final = "multiplies records with other records"


def _linear(call: Call) -> Value:
    x, w, b = call.value("input"), call.value("weight"), call["bias"]
    floats(call, "input", "weight", "bias")
    constant(call, "weight", "bias")
    if x.batch is not None and x.batch.axis == x.rank - 1:
        call.mixes(_CONTRACTS)
    if w.rank != 2 or not x.rank or x.dims[-1] != w.dims[1] or (b and b.dims != w.dims[:1]):
        call.shape(f"multiplies {x.dims} by {w.dims}")
    return Value("f32", (*x.dims[:-1], w.dims[0]), x.batch)


def product(call: Call, a: Value, b: Value) -> Value:
    """``a @ b`` as torch.matmul defines it."""
    for v in (a, b):
        if not v.floating:
            call.refuse("model.dtype", f"multiplies {v.dtype}", "Call .float() first.")
        if not v.rank:
            call.shape("multiplies a value without axes")
    row, column = a.rank == 1, b.rank == 1
    if row:
        a = a.view((1, *a.dims), a.batch and Batch(1, a.batch.outer, a.batch.inner))
    if column:
        b = b.view((*b.dims, 1), b.batch)
    if (a.batch and a.batch.axis == a.rank - 1) or (b.batch and b.batch.axis == b.rank - 2):
        call.mixes(_CONTRACTS)
    if a.dims[-1] != b.dims[-2]:
        call.shape(f"multiplies {a.dims} by {b.dims}")
    # The axes before the matrix broadcast; at most one operand has the batch in the matrix itself.
    lead: list[Value] = []
    inside: Batch | None = None
    rank = max(a.rank, b.rank)
    for v in (a, b):
        batch = v.batch
        if batch is not None and batch.axis >= v.rank - 2:
            if inside is not None:
                call.mixes(_PAIRS)
            inside = Batch(batch.axis + rank - v.rank, batch.outer, batch.inner)
            batch = None
        lead.append(Value("f32", v.dims[:-2], batch))
    dims, batch = broadcast(call, lead)
    if inside is not None and batch is not None:
        call.mixes(_PAIRS)
    batch = inside or batch
    out = (*dims, a.dims[-2], b.dims[-1])
    if column:
        out = out[:-1]
    if row:
        at = len(out) - 1 if column else len(out) - 2
        out = (*out[:at], *out[at + 1 :])
        if batch is not None and batch.axis > at:
            batch = Batch(batch.axis - 1, batch.outer, batch.inner)
    return Value("f32", out, batch)


def _matmul(call: Call) -> Value:
    return product(call, call.value("self"), call.value("other"))


def _mm(call: Call) -> Value:
    a, b = call.value("self"), call.value("mat2")
    rank = 3 if call.op == "aten.bmm.default" else 2
    if (a.rank, b.rank) != (rank, rank) or (rank == 3 and a.dims[0] != b.dims[0]):
        call.shape(f"multiplies {a.dims} by {b.dims}")
    if (
        rank == 3
        and (a.batch != b.batch)
        and 0 in (a.batch and a.batch.axis, b.batch and b.batch.axis)
    ):
        call.mixes(_PAIRS)
    return product(call, a, b)


def _contracted(call: Call) -> Value | None:
    """``mm`` and ``bmm`` over the batch: both factors hold it, folded alike, on the inner axis."""
    a, b = call.value("self"), call.value("mat2")
    if a.rank != b.rank or a.rank not in (2, 3) or not (a.floating and b.floating):
        return None
    left, right = a.batch, b.batch
    if left is None or right is None or left.axis != a.rank - 1 or right.axis != b.rank - 2:
        return None
    if (left.outer, left.inner) != (right.outer, right.inner):
        call.mixes(_PAIRS)
    if a.dims[:-2] != b.dims[:-2] or a.dims[-1] != b.dims[-2]:
        call.shape(f"multiplies {a.dims} by {b.dims}")
    return Value("f32", (*a.dims[:-1], b.dims[-1]), summed=True)


_OUTER: Final = {"contract": _contracted, "site": "outer", "linear": "each"}


def _vector(call: Call) -> Value:
    name = "vec" if "vec" in call.args else "tensor"
    a, b = call.value("self"), call.value(name)
    if a.rank != (2 if name == "vec" else 1) or b.rank != 1:
        call.shape(f"multiplies {a.dims} by {b.dims}")
    return product(call, a, b)


def _addmm(call: Call) -> Value:
    names = ("mat1", "mat2") if "mat1" in call.args else ("batch1", "batch2")
    floats(call, "self")
    a, b = (call.value(n) for n in names)
    if len({a.rank, b.rank, 2 if names[0] == "mat1" else 3}) != 1:
        call.shape(f"multiplies {a.dims} by {b.dims}")
    if a.rank == 3 and a.dims[0] != b.dims[0]:
        call.shape(f"multiplies {a.dims} by {b.dims}")
    out = product(call, a, b)
    dims, batch = broadcast(call, [call.value("self"), out])
    if dims != out.dims or batch != out.batch:
        call.shape("adds a value of more axes than the product has")
    return out


def _flops(call: Call, out: tuple[Value, ...]) -> int:
    inner = next(call[n] for n in ("mat1", "batch1", "self") if call.args.get(n) is not None)
    return 2 * out[0].numel * (inner.dims[-1] if inner.rank else 1)


def _spread(call: Call, out: tuple[Value, ...]) -> int:
    """Bytes of both factors with the axes before the matrix spread out, as backward needs them
    before it sums; a factor of at most 2 axes is multiplied in one piece."""
    factors = [v for v in call.tensors()[-2:] if v.rank > 2]
    if len(factors) < 2:
        return 0
    o = out[0]
    lead = o.numel // max(1, o.dims[-2] * o.dims[-1])
    return 4 * lead * sum(v.dims[-2] * v.dims[-1] for v in factors)


TABLE: Final[tuple[Op, ...]] = (
    op(
        "aten::linear(Tensor input, Tensor weight, Tensor? bias=None) -> Tensor",
        _linear,
        flops=lambda c, out: 2 * out[0].numel * int(c["weight"].dims[1]),
    ),
    op("aten::matmul(Tensor self, Tensor other) -> Tensor", _matmul, flops=_flops, workspace=_spread),
    op("aten::mm(Tensor self, Tensor mat2) -> Tensor", _mm, flops=_flops, **_OUTER),
    op("aten::bmm(Tensor self, Tensor mat2) -> Tensor", _mm, flops=_flops, **_OUTER),
    op("aten::mv(Tensor self, Tensor vec) -> Tensor", _vector, flops=_flops),
    op("aten::dot(Tensor self, Tensor tensor) -> Tensor", _vector, flops=_flops),
    op(
        "aten::addmm(Tensor self, Tensor mat1, Tensor mat2, *, Scalar beta=1, Scalar alpha=1) -> Tensor",
        _addmm, flops=_flops,
    ),
    op(
        "aten::baddbmm(Tensor self, Tensor batch1, Tensor batch2, *, Scalar beta=1, Scalar alpha=1) -> Tensor",
        _addmm, flops=_flops,
    ),
)  # fmt: skip
