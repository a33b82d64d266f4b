"""What several families of rules share: promotion, broadcasting, folding of the batch."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any, Final

from casemate.graph.model import Size
from casemate.graph.ops.base import Batch, Call, Value

_RANK: Final = {"bool": 0, "u8": 1, "i32": 2, "i64": 3, "f32": 4}
_CATEGORY: Final = {"bool": 0, "u8": 1, "i32": 1, "i64": 1, "f32": 2}


def promote(operands: Iterable[Any]) -> str:
    """The dtype of an elementwise op's result, as ``torch.result_type`` gives it.

    Tensors with axes decide unless a 0-d tensor, and then a Python number, is of a higher category
    (bool < integer < float).
    """
    best: list[str | None] = [None, None, None]  # with axes, 0-d, numbers
    for item in operands:
        if isinstance(item, Value):
            place, dtype = (0 if item.dims else 1), item.dtype
        else:
            dtype = {bool: "bool", int: "i64", float: "f32"}[type(item)]
            place = 2
        old = best[place]
        if old is None or _RANK[dtype] > _RANK[old]:
            best[place] = dtype
    out: str | None = None
    for dtype_ in best:
        if dtype_ is not None and (out is None or _CATEGORY[dtype_] > _CATEGORY[out]):
            out = dtype_
    assert out is not None
    return out


def broadcast(call: Call, values: Sequence[Value]) -> tuple[tuple[int, ...], Batch | None]:
    """Common extents and batch of values that broadcast; refuses what would cross records."""
    rank = max((v.rank for v in values), default=0)
    dims = [1] * rank
    batch: Batch | None = None
    for v in values:
        if v.batch is not None:
            place = Batch(v.batch.axis + rank - v.rank, v.batch.outer, v.batch.inner)
            if batch is not None and place != batch:
                call.mixes(
                    "combines values whose batch lies on different axes, each record with others"
                )
            batch = place
    for v in values:
        for i, d in enumerate(v.dims, start=rank - v.rank):
            here = batch is not None and i == batch.axis
            if here and v.batch is None:
                if d != 1:
                    call.mixes(
                        f"lays a constant axis of {d} along the batch, so that a record's result "
                        "would depend on its place"
                    )
                dims[i] = batch.outer * batch.inner  # type: ignore[union-attr]
            elif here or dims[i] == 1:
                dims[i] = d
            elif d not in (1, dims[i]):
                call.shape(f"broadcasts sizes {dims[i]} and {d}")
    return tuple(dims), batch


def static(call: Call, item: object, what: str) -> int:
    """An int that is not a size of the batch."""
    if type(item) is not int:
        call.refuse(
            "model.batch-size",
            f"takes the number of records as {what}",
            "Use a constant: the batch's size is secret under Poisson sampling.",
        )
    return item


def off_batch(call: Call, v: Value, axes: Iterable[int], how: str, mend: str = "") -> None:
    """Refuse when an axis is the batch's."""
    if v.batch is not None and v.batch.axis in tuple(axes):
        call.mixes(how, mend) if mend else call.mixes(how)


def drop(v: Value, axes: Iterable[int], keep: bool) -> tuple[tuple[int, ...], Batch | None]:
    """Extents and batch when some axes (never the batch's) are removed or kept as 1."""
    gone = set(axes)
    if keep:
        return tuple(1 if i in gone else d for i, d in enumerate(v.dims)), v.batch
    dims = tuple(d for i, d in enumerate(v.dims) if i not in gone)
    batch = v.batch
    if batch is not None:
        axis = batch.axis - sum(i < batch.axis for i in gone)
        batch = Batch(axis, batch.outer, batch.inner)
    return dims, batch


def in_range(call: Call, name: str, v: Value, low: int, high: int) -> None:
    """Refuse an index made of a record that is not proved to lie in [low, high].

    An index out of range would raise while the job runs, and so tell of the record (rule P6).
    """
    if not v.data:
        return
    known = v.range
    if known is None or known[0] < low or known[1] > high:
        found = "has no proved bounds" if known is None else f"lies in [{known[0]}, {known[1]}]"
        call.refuse(
            "model.index-range",
            f"takes {name} from a record; it must lie in [{low}, {high}] and {found}",
            f"Declare the column's bounds so, or call .clamp({max(low, 0)}, {high}) before.",
        )


def integers(call: Call, *names: str) -> None:
    """Refuse tensors among the named arguments that are not int32 or int64."""
    for name in names:
        v = call.args.get(name)
        if isinstance(v, Value) and v.dtype not in ("i64", "i32"):
            call.refuse("model.dtype", f"needs integers as {name}, not {v.dtype}", "Call .long().")


def floats(call: Call, *names: str) -> None:
    """Refuse tensors among the named arguments that are not float32."""
    for name in names:
        v = call.args.get(name)
        if isinstance(v, Value) and not v.floating:
            call.refuse(
                "model.dtype", f"needs float32 as {name}, not {v.dtype}", "Call .float() on it."
            )


def constant(call: Call, *names: str) -> None:
    """Refuse B values among the named arguments, where an op takes parameters only."""
    for name in names:
        v = call.args.get(name)
        if isinstance(v, Value) and v.batch is not None:
            call.mixes(f"takes {name} from the records of the batch")


def creation(call: Call, size: tuple[Any, ...], dtype: str) -> Value:
    """A constant of that shape; where one size is a multiple of B, every record has the same."""
    dims: list[int] = []
    batch: Batch | None = None
    for i, d in enumerate(size):
        if isinstance(d, Size):
            if d.c != 0 or d.a < 1 or batch is not None:
                call.mixes("makes a value whose shape is not one slice for each record")
            batch = Batch(i, 1, d.a)
            dims.append(d.a)
        elif d < 0:
            call.shape(f"makes a value with an axis of {d}")
        else:
            dims.append(d)
    return Value(dtype, tuple(dims), batch)


def refold(call: Call, v: Value, size: tuple[Any, ...], how: str) -> Value:
    """Row-major reshape: one -1 is solved, and the batch must stay whole for each record.

    A B value's memory is ``before * B * after`` elements; the new shape keeps the records apart
    when its own ``before`` divides that and its own ``after`` does.
    """
    if sum(type(d) is int and d == -1 for d in size) > 1:
        call.argument("has -1 for several sizes")
    sized = [i for i, d in enumerate(size) if isinstance(d, Size)]
    if any(type(d) is int and d < -1 for d in size):
        call.argument("has a negative size")
    if v.batch is None:
        if sized:
            call.mixes(f"{how} a constant into the batch")
        dims = _solve(v.numel, list(size))
        if math.prod(dims) != v.numel:
            call.shape(f"cannot reshape {v.dims} into {tuple(size)}")
        return v.view(dims, None)
    if len(sized) > 1:
        call.mixes(f"{how} so that the batch stands on two axes")
    if any(size[i].c != 0 or size[i].a < 1 for i in sized):
        call.mixes(f"{how} to a size that is no multiple of the batch")
    items = [d.a if isinstance(d, Size) else d for d in size]
    if sized:
        axis = sized[0]
        dims = _solve(v.numel, items)
    elif -1 in items:
        axis = items.index(-1)
        dims = _solve(v.numel, items)
    else:
        call.mixes(f"{how} so that no axis holds the batch")
    if math.prod(dims) != v.numel or v.numel == 0:
        call.mixes(f"{how} so that an axis holds parts of several records")
    before, after = v.rows
    left, right = math.prod(dims[:axis]), math.prod(dims[axis + 1 :])
    if before % left or after % right:
        call.mixes(f"{how} so that the parts of different records stand side by side")
    return v.view(dims, Batch(axis, before // left, after // right))


def _solve(numel: int, items: list[int]) -> tuple[int, ...]:
    if -1 in items:
        rest = math.prod(d for d in items if d != -1)
        items = [numel // max(rest, 1) if d == -1 else d for d in items]
    return tuple(items)
