# ruff: noqa: E501 - one entry a line
"""Embeddings and indexing. An index made of a record must be proved in range."""

from __future__ import annotations

from typing import Final

from casemate.graph.ops.base import Batch, Call, Op, Value, op, per_element
from casemate.graph.ops.common import broadcast, constant, floats, in_range, integers, off_batch

_OTHERS: Final = "reads from records by index, and so from other records"


def _embedding(call: Call) -> Value:
    w, i = call.value("weight"), call.value("indices")
    floats(call, "weight")
    integers(call, "indices")
    if call["scale_grad_by_freq"] or call["sparse"]:
        call.mixes(
            "scales gradients by how often an index stands in the batch, or has sparse ones",
            "Use scale_grad_by_freq=False and sparse=False.",
        )
    if w.batch is not None:
        call.mixes("looks up in a table made of the records")
    if w.rank != 2:
        call.shape("needs a table of 2 axes")
    in_range(call, "indices", i, 0, w.dims[0] - 1)
    return Value("f32", (*i.dims, w.dims[1]), i.batch)


def _index(call: Call) -> Value:
    """``self[indices]`` with integers; ``None`` for axes that stay."""
    v = call.value("self")
    given = call["indices"]
    if len(given) > v.rank or all(i is None for i in given):
        call.argument("indexes more axes than there are, or none")
    at = [k for k, i in enumerate(given) if i is not None]
    parts: list[Value] = [given[k] for k in at]
    if v.slot:
        call.mixes("uses the record's place in the batch", "Use what the record itself holds.")
    if any(i.dtype in ("bool", "u8") for i in parts):
        call.refuse(
            "model.data-dependent",
            "indexes with a mask, so that the shape depends on the data",
            "Use torch.where with the mask.",
        )
    integers_ok = all(i.dtype in ("i64", "i32") for i in parts)
    if not integers_ok:
        call.refuse("model.dtype", "indexes with floats", "Call .long().")
    dims, batch = broadcast(call, parts)
    own = v.batch.axis if v.batch is not None else None
    for k, i in zip(at, parts, strict=True):
        if k == own:
            # arange(B) at the batch's own axis takes each record's own slice.
            if not i.slot or v.batch != Batch(k) or batch is None or v.dims[k] != 1:
                call.mixes(_OTHERS)
        elif i.slot:
            call.mixes("uses the place in the batch as an index", "Index by the record's own data.")
        else:
            in_range(call, "an index", i, -v.dims[k], v.dims[k] - 1)
    if own is not None and own not in at and batch is not None:
        call.mixes(_OTHERS, "Use gather, or index the batch by arange(B) too.")
    # Indexed axes side by side are replaced where they stand; else their result comes first.
    adjacent = at[-1] - at[0] + 1 == len(at)
    first = at[0] if adjacent else 0
    rest = [k for k in range(v.rank) if k not in at]
    before = [k for k in rest if adjacent and k < first]
    after = [k for k in rest if k not in before]
    out = (*(v.dims[k] for k in before), *dims, *(v.dims[k] for k in after))
    if batch is not None:
        batch = Batch(len(before) + batch.axis, batch.outer, batch.inner)
    elif own is not None and v.batch is not None:
        place = before.index(own) if own in before else len(before) + len(dims) + after.index(own)
        batch = Batch(place, v.batch.outer, v.batch.inner)
    return Value(v.dtype, out, batch, v.range)


def _paired(call: Call, write: bool) -> Value:
    v, i = call.value("self"), call.value("index")
    axis = call.axis(call["dim"], v.rank)
    integers(call, "index")
    off_batch(call, v, (axis,), _OTHERS)
    off_batch(call, i, (axis,), _OTHERS)
    if i.slot:
        call.mixes("uses the place in the batch as an index")
    if v.batch != i.batch:
        call.mixes(_OTHERS, "Expand constants to the batch first.")
    if v.rank != i.rank or any(
        a > b for k, (a, b) in enumerate(zip(i.dims, v.dims, strict=True)) if k != axis
    ):
        call.shape(f"indexes {v.dims} by {i.dims}")
    src = call.args.get("src")
    if (
        write
        and src is not None
        and (
            src.batch != i.batch
            or src.dtype != v.dtype
            or src.rank != i.rank
            or any(a > b for a, b in zip(i.dims, src.dims, strict=True))
        )
    ):
        call.shape("writes from a value of another shape")
    if v.rank:
        in_range(call, "index", i, 0, v.dims[axis] - 1)
    return i


def _gather(call: Call) -> Value:
    i, v = _paired(call, write=False), call.value("self")
    return Value(v.dtype, i.dims, i.batch, v.range)


def _scatter(call: Call) -> Value:
    _paired(call, write=True)
    v = call.value("self")
    return Value(v.dtype, v.dims, v.batch)


def _index_select(call: Call) -> Value:
    v, i = call.value("self"), call.value("index")
    axis = call.axis(call["dim"], v.rank)
    integers(call, "index")
    off_batch(call, v, (axis,), _OTHERS)
    if i.rank > 1 or not v.rank:
        call.shape("needs an index of 1 axis")
    if i.slot:
        call.mixes("uses the place in the batch as an index")
    if v.batch is not None and i.batch is not None:
        call.mixes(_OTHERS, "Use gather.")
    in_range(call, "index", i, 0, v.dims[axis] - 1)
    n = i.dims[0] if i.rank else 1
    dims = tuple(n if k == axis else d for k, d in enumerate(v.dims))
    batch = v.batch if i.batch is None else Batch(axis, i.batch.outer, i.batch.inner)
    return Value(v.dtype, dims, batch, v.range)


def _one_hot(call: Call) -> Value:
    v, n = call.value("self"), call["num_classes"]
    if v.dtype != "i64":
        call.refuse("model.dtype", f"needs int64, not {v.dtype}", "Call .long().")
    if type(n) is not int or n < 1:
        call.refuse("model.data-dependent", "counts the classes from the data", "Give num_classes.")
    in_range(call, "the class", v, 0, n - 1)
    return Value("i64", (*v.dims, n), v.batch, (0, 1))


def _buckets(call: Call) -> Value:
    edges = call.args.get("boundaries") or call.args.get("sorted_sequence")
    constant(call, "boundaries", "sorted_sequence")
    v = call.value("self")
    if edges is None or edges.rank != 1 or call.args.get("sorter") is not None:
        call.shape("needs boundaries of 1 axis")
    dtype = "i32" if call["out_int32"] else "i64"
    return Value(dtype, v.dims, v.batch, (0, edges.dims[0]))


TABLE: Final[tuple[Op, ...]] = (
    op(
        "aten::embedding(Tensor weight, Tensor indices, SymInt padding_idx=-1, "
        "bool scale_grad_by_freq=False, bool sparse=False) -> Tensor",
        _embedding, flops=per_element(1),
    ),
    op("aten::index.Tensor(Tensor self, Tensor?[] indices) -> Tensor", _index, slots=True, linear="first"),
    op("aten::gather(Tensor self, int dim, Tensor index, *, bool sparse_grad=False) -> Tensor", _gather, linear="first"),
    op("aten::scatter.src(Tensor self, int dim, Tensor index, Tensor src) -> Tensor", _scatter),
    op("aten::scatter.value(Tensor self, int dim, Tensor index, Scalar value) -> Tensor", _scatter),
    op("aten::scatter_add(Tensor self, int dim, Tensor index, Tensor src) -> Tensor", _scatter),
    op("aten::index_select(Tensor self, int dim, Tensor index) -> Tensor", _index_select, linear="first"),
    op("aten::one_hot(Tensor self, int num_classes=-1) -> Tensor", _one_hot),
    op("aten::bucketize.Tensor(Tensor self, Tensor boundaries, *, bool out_int32=False, bool right=False) -> Tensor", _buckets),
    op("aten::searchsorted.Tensor(Tensor sorted_sequence, Tensor self, *, bool out_int32=False, bool right=False, str? side=None, Tensor? sorter=None) -> Tensor", _buckets),
)  # fmt: skip
