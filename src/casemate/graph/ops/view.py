# ruff: noqa: E501 - one entry a line
"""Operations that move, take, repeat or join elements."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Final

from casemate.graph.model import Size
from casemate.graph.ops.base import Batch, Call, Op, Rule, Value, op, per_element, temporaries
from casemate.graph.ops.common import drop, floats, off_batch, refold, static

MAX_PARTS: Final = 4096
_TAKES: Final = "takes some records of the batch and not others"
_ORDER: Final = "changes the order of the batch"


def _reshape(call: Call) -> Value:
    return refold(call, call.value("self"), call["shape"], "reshapes")


def permuted(call: Call, v: Value, order: Sequence[int]) -> Value:
    batch = v.batch
    if batch is not None:
        batch = Batch(list(order).index(batch.axis), batch.outer, batch.inner)
    return v.view(tuple(v.dims[i] for i in order), batch)


def _permute(call: Call) -> Value:
    v = call.value("self")
    order = call.axes(call["dims"], v.rank) if v.rank else ()
    if len(order) != v.rank or len(call["dims"]) != v.rank:
        call.argument("does not name every axis once")
    return permuted(call, v, order)


def _transpose(call: Call) -> Value:
    v = call.value("self")
    a, b = call.axis(call["dim0"], v.rank), call.axis(call["dim1"], v.rank)
    order = list(range(v.rank))
    if v.rank:
        order[a], order[b] = b, a
    return permuted(call, v, order)


def _t(call: Call) -> Value:
    v = call.value("self")
    if v.rank > 2:
        call.shape("transposes a value of more than 2 axes")
    return permuted(call, v, range(v.rank)[::-1])


def _unsqueeze(call: Call) -> Value:
    v = call.value("self")
    at = call.axis(call["dim"], v.rank + 1)
    batch = v.batch
    if batch is not None:
        batch = Batch(batch.axis + (at <= batch.axis), batch.outer, batch.inner)
    return v.view((*v.dims[:at], 1, *v.dims[at:]), batch)


def _squeeze(call: Call) -> Value:
    v = call.value("self")
    axes = call.axes(call["dim"], v.rank) if call["dim"] != () else ()
    off_batch(call, v, axes, "squeezes the batch, which may hold one record")
    dims, batch = drop(v, [a for a in axes if a < v.rank and v.dims[a] == 1], keep=False)
    return v.view(dims, batch)


def expanded(call: Call, v: Value, size: Sequence[Any]) -> Value:
    new = len(size) - v.rank
    if new < 0:
        call.shape("expands to fewer axes")
    dims: list[int] = []
    batch = v.batch and Batch(v.batch.axis + new, v.batch.outer, v.batch.inner)
    for i, want in enumerate(size):
        have = v.dims[i - new] if i >= new else 1
        held = batch is not None and i == batch.axis and v.batch is not None
        if type(want) is int and want == -1:
            if i < new:
                call.argument("has -1 for a new axis")
            dims.append(have)
        elif isinstance(want, Size):
            if held and want == Size(a=have):
                dims.append(have)
            elif batch is None and have == 1 and want.c == 0 and want.a > 0:
                batch = Batch(i, 1, want.a)
                dims.append(want.a)
            else:
                call.mixes("expands to a shape that is not one slice for each record")
        elif held:
            call.mixes("expands the batch to a constant")
        elif have in (1, want):
            dims.append(want)
        else:
            call.shape(f"expands {have} to {want}")
    return v.view(tuple(dims), batch)


def _expand(call: Call) -> Value:
    return expanded(call, call.value("self"), call["size"])


def _select(call: Call) -> Value:
    v = call.value("self")
    if not v.rank:
        call.shape("selects from a value without axes")
    axis = call.axis(call["dim"], v.rank)
    off_batch(call, v, (axis,), _TAKES)
    _inside(call, static(call, call["index"], "an index"), v.dims[axis])
    dims, batch = drop(v, (axis,), keep=False)
    return v.view(dims, batch)


def _inside(call: Call, index: int, n: int) -> None:
    if not -n <= index < n:
        call.shape(f"takes place {index} of {n}")


def _span(call: Call, v: Value, axis: int) -> int:
    """Length of a slice along an axis; along the batch only the whole is admitted."""
    start, end, step = call["start"], call["end"], static(call, call["step"], "a step")
    if step < 1:
        call.argument("slices with a step below 1")
    if v.batch is not None and v.batch.axis == axis:
        whole = end is None or end == Size(a=v.dims[axis])
        if start not in (None, 0) or not whole or step != 1:
            call.mixes(_TAKES)
        return v.dims[axis]
    n = v.dims[axis]
    low = 0 if start is None else static(call, start, "a start")
    high = n if end is None else static(call, end, "an end")
    low = min(max(low + n if low < 0 else low, 0), n)
    high = min(max(high + n if high < 0 else high, low), n)
    return -(-(high - low) // step)


def _slice(call: Call) -> Value:
    v = call.value("self")
    axis = call.axis(call["dim"], v.rank)
    if not v.rank:
        call.shape("slices a value without axes")
    n = _span(call, v, axis)
    return v.view(tuple(n if i == axis else d for i, d in enumerate(v.dims)), v.batch)


def _select_scatter(call: Call) -> Value:
    v, src = call.value("self"), call.value("src")
    axis = call.axis(call["dim"], v.rank)
    off_batch(call, v, (axis,), _TAKES)
    _inside(call, static(call, call["index"], "an index"), v.dims[axis])
    return _scattered(call, v, src, drop(v, (axis,), keep=False))


def _slice_scatter(call: Call) -> Value:
    v, src = call.value("self"), call.value("src")
    axis = call.axis(call["dim"], v.rank)
    n = _span(call, v, axis)
    dims = tuple(n if i == axis else d for i, d in enumerate(v.dims))
    return _scattered(call, v, src, (dims, v.batch))


def _scattered(call: Call, v: Value, src: Value, want: tuple[Any, Batch | None]) -> Value:
    if src.batch != want[1] and src.batch is not None:
        call.mixes("writes records over other records or over a constant")
    if (src.dims, src.batch) != want or src.dtype != v.dtype:
        call.shape(f"writes a value of shape {src.shape} into a part of another shape or dtype")
    known = v.range and src.range and (min(v.range[0], src.range[0]), max(v.range[1], src.range[1]))
    return Value(v.dtype, v.dims, v.batch, known)


def _parts(call: Call, v: Value, axis: int, sizes: Sequence[int]) -> tuple[Value, ...]:
    off_batch(call, v, (axis,), "splits the batch")
    if len(sizes) > MAX_PARTS:
        call.refuse("model.too-large", f"has {len(sizes)} outputs", f"At most {MAX_PARTS}.")
    if any(s < 0 for s in sizes) or sum(sizes) != v.dims[axis]:
        call.shape(f"splits {v.dims[axis]} into other sizes")
    return tuple(
        v.view(tuple(s if i == axis else d for i, d in enumerate(v.dims)), v.batch) for s in sizes
    )


def _split(call: Call) -> tuple[Value, ...]:
    v = call.value("self")
    if not v.rank:
        call.shape("splits a value without axes")
    axis, size = call.axis(call["dim"], v.rank), static(call, call["split_size"], "a size")
    n = v.dims[axis]
    off_batch(call, v, (axis,), "splits the batch")
    if size < 1 or n // size >= MAX_PARTS:
        call.shape(f"splits {n} into parts of {size}")
    sizes = [size] * (n // size) + ([n % size] if n % size else [])
    return _parts(call, v, axis, sizes)


def _split_sizes(call: Call) -> tuple[Value, ...]:
    v = call.value("self")
    if not v.rank:
        call.shape("splits a value without axes")
    sizes = [static(call, s, "a size") for s in call["split_sizes"]]
    return _parts(call, v, call.axis(call["dim"], v.rank), sizes)


def _unbind(call: Call) -> tuple[Value, ...]:
    v = call.value("self")
    if not v.rank:
        call.shape("splits a value without axes")
    axis = call.axis(call["dim"], v.rank)
    off_batch(call, v, (axis,), "splits the batch")
    if v.dims[axis] > MAX_PARTS:
        call.refuse("model.too-large", f"has {v.dims[axis]} outputs", f"At most {MAX_PARTS}.")
    dims, batch = drop(v, (axis,), keep=False)
    return (v.view(dims, batch),) * v.dims[axis]


def _joined(call: Call) -> list[Value]:
    tensors = list(call["tensors"])
    if not tensors or not all(isinstance(t, Value) for t in tensors):
        call.argument("joins nothing")
    if len({t.dtype for t in tensors}) > 1:
        call.refuse("model.dtype", "joins values of different dtypes", "Convert them first.")
    if len({t.batch for t in tensors}) > 1:
        call.mixes(
            "joins values of which not all have the batch on the same axis",
            "Expand constants to the batch first, and join along the record's own axes.",
        )
    return tensors


def _known(tensors: Sequence[Value]) -> tuple[int, int] | None:
    known = [t.range for t in tensors]
    if any(k is None for k in known):
        return None
    return min(k[0] for k in known if k), max(k[1] for k in known if k)


def _cat(call: Call) -> Value:
    tensors = _joined(call)
    first = tensors[0]
    axis = call.axis(call["dim"], first.rank)
    off_batch(call, first, (axis,), "joins along the batch")
    for t in tensors:
        if (
            t.rank != first.rank
            or not t.rank
            or any(
                a != b for i, (a, b) in enumerate(zip(t.dims, first.dims, strict=True)) if i != axis
            )
        ):
            call.shape("joins values of different shapes")
    n = sum(t.dims[axis] for t in tensors)
    dims = tuple(n if i == axis else d for i, d in enumerate(first.dims))
    return Value(first.dtype, dims, first.batch, _known(tensors))


def _stack(call: Call) -> Value:
    tensors = _joined(call)
    first = tensors[0]
    if any(t.dims != first.dims for t in tensors):
        call.shape("stacks values of different shapes")
    at = call.axis(call["dim"], first.rank + 1)
    batch = first.batch
    if batch is not None:
        batch = Batch(batch.axis + (at <= batch.axis), batch.outer, batch.inner)
    dims = (*first.dims[:at], len(tensors), *first.dims[at:])
    return Value(first.dtype, dims, batch, _known(tensors))


def _flip(call: Call) -> Value:
    v = call.value("self")
    axes = call.axes(call["dims"], v.rank) if call["dims"] else ()
    off_batch(call, v, axes, _ORDER)
    return v.view(v.dims, v.batch)


def _roll(call: Call) -> Value:
    v = call.value("self")
    if not call["dims"] and v.batch is not None:
        call.mixes(_ORDER)
    off_batch(call, v, [call.axis(d, v.rank) for d in call["dims"]], _ORDER)
    for s in call["shifts"]:
        static(call, s, "a shift")
    if len(call["shifts"]) != max(1, len(call["dims"])):
        call.argument("has not one shift for each axis")
    return v.view(v.dims, v.batch)


def _repeat(call: Call) -> Value:
    v, times = call.value("self"), call["repeats"]
    new = len(times) - v.rank
    if new < 0:
        call.shape("repeats fewer axes than there are")
    batch = v.batch and Batch(v.batch.axis + new, v.batch.outer, v.batch.inner)
    dims: list[int] = []
    for i, n in enumerate(times):
        have = v.dims[i - new] if i >= new else 1
        if isinstance(n, Size):
            if batch is not None or n.c != 0 or n.a < 1:
                call.mixes("repeats to a shape that is not one slice for each record")
            # Memory is [n.a * B][have]; the copies are equal, so any order of them serves.
            batch = Batch(i, 1, n.a * have)
            dims.append(n.a * have)
            continue
        if n < 0:
            call.argument("repeats a negative number of times")
        if v.batch is not None and batch is not None and i == batch.axis and n != 1:
            if n == 0:
                call.mixes("repeats the batch no times")
            batch = Batch(i, batch.outer * n, batch.inner)
        dims.append(have * n)
    return v.view(tuple(dims), batch)


def _repeat_interleave(call: Call) -> Value:
    v, n = call.value("self"), static(call, call["repeats"], "a number of times")
    if n < 1 or not v.rank or call["dim"] is None:
        call.argument("must name an axis and repeat at least once")
    axis = call.axis(call["dim"], v.rank)
    batch = v.batch
    if batch is not None and batch.axis == axis:
        batch = Batch(axis, batch.outer, batch.inner * n)
    return v.view(tuple(d * n if i == axis else d for i, d in enumerate(v.dims)), batch)


def _pad(call: Call) -> Value:
    v = call.value("self")
    pads = [static(call, p, "a padding") for p in call["pad"]]
    if len(pads) % 2 or len(pads) > 2 * v.rank:
        call.argument("pads more axes than there are")
    dims = list(v.dims)
    for i in range(len(pads) // 2):
        axis = v.rank - 1 - i
        low, high = pads[2 * i : 2 * i + 2]
        if (low or high) and v.batch is not None and v.batch.axis == axis:
            call.mixes("pads the batch")
        dims[axis] += low + high
        if dims[axis] < 0 or min(low, 0) + min(high, 0) < -v.dims[axis]:
            call.shape("pads to a negative size")
    return Value(v.dtype, tuple(dims), v.batch)


def edge_pad(axes: int, *, reflects: bool) -> Rule:
    """Padding of the last axes by what stands at their edges."""

    def rule(call: Call) -> Value:
        v = call.value("self")
        pads = [static(call, p, "a padding") for p in call["padding"]]
        if len(pads) != 2 * axes or v.rank not in (axes + 1, axes + 2):
            call.shape(f"pads a value of {v.rank} axes")
        own = range(v.rank - axes, v.rank)
        off_batch(call, v, own, "pads the batch")
        dims = list(v.dims)
        for i, axis in enumerate(reversed(own)):
            low, high = pads[2 * i : 2 * i + 2]
            if min(low, high) < 0 or (reflects and max(low, high) >= dims[axis]) or not dims[axis]:
                call.shape(f"pads {dims[axis]} by {low} and {high}")
            dims[axis] += low + high
        return v.view(tuple(dims), v.batch)

    return rule


def _unfold(call: Call) -> Value:
    v = call.value("self")
    axis, size, step = call.axis(call["dimension"], v.rank), call["size"], call["step"]
    off_batch(call, v, (axis,), "lays windows over the batch")
    if (
        not v.rank
        or type(size) is not int
        or type(step) is not int
        or step < 1
        or not 0 <= size <= v.dims[axis]
    ):
        call.shape("takes windows that do not fit")
    n = (v.dims[axis] - size) // step + 1
    return v.view((*(n if i == axis else d for i, d in enumerate(v.dims)), size), v.batch)


def _im2col(call: Call) -> Value:
    v = call.value("self")
    floats(call, "self")
    pairs = [call[n] for n in ("kernel_size", "dilation", "padding", "stride")]
    if v.rank != 4 or any(len(p) not in (1, 2) for p in pairs):
        call.shape("needs a value of 4 axes")
    off_batch(call, v, (1, 2, 3), "lays windows over the batch")
    kernel, dilation, padding, stride = ((p * 2)[:2] for p in pairs)
    places = 1
    for n, k, d, p, s in zip(v.dims[2:], kernel, dilation, padding, stride, strict=True):
        if min(k, d, s) < 1 or p < 0 or n + 2 * p < d * (k - 1) + 1:
            call.shape("takes windows that do not fit")
        places *= (n + 2 * p - d * (k - 1) - 1) // s + 1
    return Value("f32", (v.dims[0], v.dims[1] * math.prod(kernel), places), v.batch)


def _triangle(call: Call) -> Value:
    v = call.value("self")
    static(call, call["diagonal"], "a diagonal")
    if v.rank < 2:
        call.shape("needs at least 2 axes")
    off_batch(call, v, (v.rank - 2, v.rank - 1), "makes records differ by their place")
    known = v.range and (min(v.range[0], 0), max(v.range[1], 0))
    return Value(v.dtype, v.dims, v.batch, known)


def _diagonal(call: Call) -> Value:
    v = call.value("self")
    a, b, offset = call.axis(call["dim1"], v.rank), call.axis(call["dim2"], v.rank), call["offset"]
    off_batch(call, v, (a, b), "takes a diagonal through the batch")
    if a == b or v.rank < 2 or type(offset) is not int:
        call.argument("names one axis twice")
    n = min(v.dims[a] + min(offset, 0), v.dims[b] - max(offset, 0))
    dims, batch = drop(v, (a, b), keep=False)
    return v.view((*dims, max(n, 0)), batch)


def _shuffle(call: Call) -> Value:
    v = call.value("self")
    up = "upscale_factor" in call.args
    r = call["upscale_factor" if up else "downscale_factor"]
    if v.rank < 3 or type(r) is not int or r < 1:
        call.shape("needs at least 3 axes and a factor")
    off_batch(call, v, range(v.rank - 3, v.rank), "mixes the batch with other axes")
    c, h, w = v.dims[-3:]
    if (up and c % (r * r)) or (not up and (h % r or w % r)):
        call.shape(f"cannot take {v.dims[-3:]} apart by {r}")
    last = (c // (r * r), h * r, w * r) if up else (c * r * r, h // r, w // r)
    return v.view((*v.dims[:-3], *last), v.batch)


def upsample(axes: int) -> Rule:
    def rule(call: Call) -> Value:
        v = call.value("input")
        floats(call, "input")
        if v.rank != axes + 2:
            call.shape(f"needs {axes + 2} axes")
        off_batch(call, v, range(2, v.rank), "resamples the batch")
        size, scale = call["output_size"], call["scale_factors"]
        if (size is None) == (scale is None) or len(size or scale) != axes:
            call.argument("needs either sizes or factors, one for each axis")
        if size is not None:
            own = tuple(static(call, s, "a size") for s in size)
        else:
            if not all(0 < f < 2**20 for f in scale):
                call.argument("has an impossible factor")
            own = tuple(math.floor(d * f) for d, f in zip(v.dims[2:], scale, strict=True))
        if any(d < 1 for d in own):
            call.shape("resamples to nothing")
        return Value("f32", (*v.dims[:2], *own), v.batch)

    return rule


def _glu(call: Call) -> Value:
    v = call.value("self")
    floats(call, "self")
    axis = call.axis(call["dim"], v.rank)
    off_batch(call, v, (axis,), "halves the batch")
    if not v.rank or v.dims[axis] % 2:
        call.shape("needs an even axis")
    return Value("f32", tuple(d // 2 if i == axis else d for i, d in enumerate(v.dims)), v.batch)


def _view(schema: str, rule: Rule, *, isometric: bool = False) -> Op:
    return op(schema, rule, view=True, slots=True, linear="first", isometric=isometric)


_UP: Final = "SymInt[]? output_size, bool align_corners, float[]? scale_factors) -> Tensor"

TABLE: Final[tuple[Op, ...]] = (
    _view("aten::reshape(Tensor(a) self, SymInt[] shape) -> Tensor(a)", _reshape, isometric=True),
    _view("aten::permute(Tensor(a) self, int[] dims) -> Tensor(a)", _permute, isometric=True),
    _view("aten::transpose.int(Tensor(a) self, int dim0, int dim1) -> Tensor(a)", _transpose, isometric=True),
    _view("aten::t(Tensor(a) self) -> Tensor(a)", _t, isometric=True),
    _view("aten::unsqueeze(Tensor(a) self, int dim) -> Tensor(a)", _unsqueeze, isometric=True),
    _view("aten::squeeze.dim(Tensor(a) self, int dim) -> Tensor(a)", _squeeze, isometric=True),
    _view("aten::squeeze.dims(Tensor(a) self, int[] dim) -> Tensor(a)", _squeeze, isometric=True),
    _view("aten::expand(Tensor(a) self, SymInt[] size, *, bool implicit=False) -> Tensor(a)", _expand),
    _view("aten::select.int(Tensor(a) self, int dim, SymInt index) -> Tensor(a)", _select),
    _view("aten::slice.Tensor(Tensor(a) self, int dim=0, SymInt? start=None, SymInt? end=None, SymInt step=1) -> Tensor(a)", _slice),
    _view("aten::split.Tensor(Tensor(a -> *) self, SymInt split_size, int dim=0) -> Tensor(a)[]", _split),
    _view("aten::split_with_sizes(Tensor(a -> *) self, SymInt[] split_sizes, int dim=0) -> Tensor(a)[]", _split_sizes),
    _view("aten::unbind.int(Tensor(a -> *) self, int dim=0) -> Tensor(a)[]", _unbind),
    _view("aten::diagonal(Tensor(a) self, int offset=0, int dim1=0, int dim2=1) -> Tensor(a)", _diagonal),
    _view("aten::unfold(Tensor(a) self, int dimension, int size, int step) -> Tensor(a)", _unfold),
    op("aten::cat(Tensor[] tensors, int dim=0) -> Tensor", _cat, linear="add"),
    op("aten::stack(Tensor[] tensors, int dim=0) -> Tensor", _stack, linear="add"),
    op("aten::flip(Tensor self, int[] dims) -> Tensor", _flip, linear="first", isometric=True),
    op("aten::roll(Tensor self, SymInt[1] shifts, int[1] dims=[]) -> Tensor", _roll, linear="first", isometric=True),
    op("aten::repeat(Tensor self, SymInt[] repeats) -> Tensor", _repeat, linear="first"),
    op("aten::repeat_interleave.self_int(Tensor self, SymInt repeats, int? dim=None, *, SymInt? output_size=None) -> Tensor", _repeat_interleave),
    op("aten::constant_pad_nd(Tensor self, SymInt[] pad, Scalar value=0) -> Tensor", _pad),
    *(
        op(f"aten::{kind}_pad{n}d(Tensor self, SymInt[{2 * n}] padding) -> Tensor", edge_pad(n, reflects=kind == "reflection"))
        for kind in ("reflection", "replication")
        for n in (1, 2, 3)
    ),
    op("aten::select_scatter(Tensor self, Tensor src, int dim, SymInt index) -> Tensor", _select_scatter),
    op("aten::slice_scatter(Tensor self, Tensor src, int dim=0, SymInt? start=None, SymInt? end=None, SymInt step=1) -> Tensor", _slice_scatter),
    op("aten::tril(Tensor self, SymInt diagonal=0) -> Tensor", _triangle, linear="first"),
    op("aten::triu(Tensor self, SymInt diagonal=0) -> Tensor", _triangle, linear="first"),
    op("aten::pixel_shuffle(Tensor self, int upscale_factor) -> Tensor", _shuffle, linear="first", isometric=True),
    op("aten::pixel_unshuffle(Tensor self, int downscale_factor) -> Tensor", _shuffle, linear="first", isometric=True),
    op("aten::im2col(Tensor self, int[2] kernel_size, int[2] dilation, int[2] padding, int[2] stride) -> Tensor", _im2col, linear="first", workspace=temporaries(1)),
    *(
        op(f"aten::upsample_nearest{n}d.vec(Tensor input, SymInt[]? output_size, float[]? scale_factors) -> Tensor", upsample(n))
        for n in (1, 2, 3)
    ),
    *(
        op(f"aten::upsample_{kind}.vec(Tensor input, {_UP}", upsample(n), flops=per_element(8))
        for kind, n in (("linear1d", 1), ("bilinear2d", 2), ("bicubic2d", 2), ("trilinear3d", 3))
    ),
    op("aten::glu(Tensor self, int dim=-1) -> Tensor", _glu, flops=per_element(5)),
)  # fmt: skip
