"""A second compiler for a native step: its graph as StableHLO text, compiled and run by IREE.

The step is noted with the kernels' twins (torch alone, ``engine/kernels/twins.py``) in place of the
native kernels, and each ATen operation is written in StableHLO (:data:`TABLE`): neither AOTInductor
nor the runtime nor a kernel of ours has a part in what comes out.

IREE stands in an environment of its own (``make build/iree/.ready``; deploy/iree.txt).
"""

from __future__ import annotations

import math
import operator
import struct
import subprocess
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch
from torch import Tensor, fx

from casemate.engine.aot import sums
from casemate.engine.aot.step import Step
from casemate.engine.kernels import compiled

PYTHON = Path(__file__).parents[2] / "build/iree/bin/python"
_TYPES = {torch.float32: "f32", torch.float64: "f64", torch.int64: "i64", torch.bool: "i1"}
_RUN = """
import sys
import numpy as np
from iree import compiler, runtime
folder = sys.argv[1]
made = compiler.compile_file(
    folder + "/step.mlir", target_backends=["llvm-cpu"], input_type="stablehlo",
    extra_args=["--iree-llvmcpu-target-cpu=host", "--iree-input-demote-f64-to-f32=false"],
)
context = runtime.SystemContext(config=runtime.Config("local-sync"))
context.add_vm_module(runtime.VmModule.copy_buffer(context.instance, made))
given = np.load(folder + "/given.npz")
found = context.modules.module.step(*given.values())
np.savez(folder + "/found.npz", *[t.to_host() for t in found])
"""


def graph(step: Step) -> fx.GraphModule:
    """The step in operations of :data:`TABLE`, nothing in place."""
    from torch._decomp import core_aten_decompositions, get_decompositions
    from torch.fx.experimental.proxy_tensor import make_fx

    aten = torch.ops.aten
    more = get_decompositions([aten._log_softmax, aten.addmm, aten.threshold_backward])
    table = {**core_aten_decompositions(), **more, **sums.TABLE}
    given = list(step.inputs.values())
    noting = compiled.routed(lambda *_: None)  # no buffer of the engine's is written to
    with noting, mock.patch.object(compiled, "library", lambda: None), torch.no_grad():
        made = make_fx(step.function, tracing_mode="fake")(*given)
        made = make_fx(torch.func.functionalize(made), table, tracing_mode="fake")(*given)
    made.graph.eliminate_dead_code()
    made.recompile()
    return made


def type_of(dtype: torch.dtype, shape: Sequence[int]) -> str:
    return f"tensor<{''.join(f'{n}x' for n in shape)}{_TYPES[dtype]}>"


class Text:
    """StableHLO in the making. A value: a node of the graph, a number, or (name, dtype, shape)."""

    def __init__(self) -> None:
        self.lines: list[str] = []
        self.at: dict[fx.Node, tuple[str, torch.dtype, tuple[int, ...]]] = {}

    def add(self, text: str, dtype: torch.dtype, shape: Sequence[int]) -> Any:
        """A line; ``{}`` in it is the type of what it makes."""
        name = f"%v{len(self.lines)}"
        self.lines.append(f"{name} = stablehlo.{text.replace('{}', type_of(dtype, shape))}")
        return name, dtype, tuple(shape)

    def value(self, of: Any, dtype: torch.dtype | None = None, shape: Any = None) -> Any:
        """``of`` with another dtype or broadcast to a shape, as torch does."""
        if not isinstance(of, fx.Node | tuple):
            return self.constant(of, dtype or torch.float32, shape or ())
        made = self.at[of] if isinstance(of, fx.Node) else of
        if dtype is not None and made[1] != dtype:
            if dtype == torch.bool:
                made = self.compare("NE", made, self.constant(0, *made[1:]))
                return self.value(made, None, shape)
            made = self.add(f"convert {made[0]} : ({type_of(*made[1:])}) -> {{}}", dtype, made[2])
        if shape is not None and made[2] != tuple(shape):
            dims = list(range(len(shape) - len(made[2]), len(shape)))
            text = f"broadcast_in_dim {made[0]}, dims = {dims} : ({type_of(*made[1:])}) -> {{}}"
            return self.add(text, made[1], shape)
        return made

    def constant(self, number: Any, dtype: torch.dtype, shape: Sequence[int]) -> Any:
        if dtype == torch.bool:
            written = "true" if number else "false"
        elif dtype == torch.int64:
            written = str(int(number))
        else:  # by its bits
            code = {torch.float32: ("<f", "<I", 8), torch.float64: ("<d", "<Q", 16)}[dtype]
            (bits,) = struct.unpack(code[1], struct.pack(code[0], number))
            written = f"0x{bits:0{code[2]}X}"
        return self.add(f"constant dense<{written}> : {{}}", dtype, shape)

    def same(self, op: str, *of: Any) -> Any:
        """An operation entry by entry, of values of one type."""
        return self.add(f"{op} {', '.join(v[0] for v in of)} : {{}}", *of[0][1:])

    def compare(self, how: str, a: Any, b: Any) -> Any:
        both = f"({type_of(*a[1:])}, {type_of(*b[1:])})"
        text = f"compare {how}, {a[0]}, {b[0]} : {both} -> {{}}"
        return self.add(text, torch.bool, a[2])

    def reshape(self, of: Any, shape: Sequence[int]) -> Any:
        return self.add(f"reshape {of[0]} : ({type_of(*of[1:])}) -> {{}}", of[1], shape)

    def select(self, where: Any, a: Any, b: Any) -> Any:
        text = f"select {where[0]}, {a[0]}, {b[0]} : {type_of(*where[1:])}, {{}}"
        return self.add(text, a[1], a[2])

    def reduce(self, op: str, of: Any, dims: Sequence[int], start: float) -> Any:
        dims = sorted(d % len(of[2]) for d in dims)
        first = self.constant(start, of[1], ())
        shape = [n for d, n in enumerate(of[2]) if d not in dims]
        text = (
            f"reduce({of[0]} init: {first[0]}) applies stablehlo.{op} across dimensions = {dims}"
            f" : ({type_of(*of[1:])}, {type_of(of[1], ())}) -> {{}}"
        )
        return self.add(text, of[1], shape)


Write = Callable[..., Any]


def both(op: str) -> Write:
    def write(t: Text, out: Tensor, a: Any, b: Any) -> Any:
        named = {"multiply": "and"}.get(op, op) if out.dtype == torch.bool else op
        return t.same(named, *(t.value(x, out.dtype, out.shape) for x in (a, b)))

    return write


def compared(how: str) -> Write:
    def write(t: Text, out: Tensor, a: Any, b: Any) -> Any:
        one = t.value(a, None, out.shape)
        return t.compare(how, one, t.value(b, one[1], out.shape))

    return write


def alone(op: str) -> Write:
    return lambda t, out, a: t.same(op, t.value(a, out.dtype))


def filled(number: float | None = None) -> Write:
    def write(t: Text, out: Tensor, *given: Any, **_: Any) -> Any:
        return t.constant(given[-1] if number is None else number, out.dtype, out.shape)

    return write


def reduced(op: str, start: float) -> Write:
    def write(t: Text, out: Tensor, a: Any, dims: Any, keep: bool = False, **_: Any) -> Any:
        one = t.value(a, out.dtype)
        return t.reshape(t.reduce(op, one, dims or range(len(one[2])), start), out.shape)

    return write


def shaped(t: Text, out: Tensor, a: Any, *_: Any, **__: Any) -> Any:
    return t.reshape(t.value(a), out.shape)


def permute(t: Text, out: Tensor, a: Any, dims: Sequence[int]) -> Any:
    one = t.value(a)
    text = f"transpose {one[0]}, dims = {list(dims)} : ({type_of(*one[1:])}) -> {{}}"
    return t.add(text, one[1], [one[2][d] for d in dims])


def part(t: Text, a: Any, dim: int, start: int, end: int) -> Any:
    one = t.value(a)
    size = one[2][dim]
    start, end = (max(0, min(size, n + size if n < 0 else n)) for n in (start, end))
    ranges = [f"{start}:{end}" if d == dim else f"0:{n}" for d, n in enumerate(one[2])]
    shape = [end - start if d == dim else n for d, n in enumerate(one[2])]
    text = f"slice {one[0]} [{', '.join(ranges)}] : ({type_of(*one[1:])}) -> {{}}"
    return t.add(text, one[1], shape)


def select(t: Text, out: Tensor, a: Any, dim: int, index: int) -> Any:
    size = t.value(a)[2][dim]
    at = index % size
    return t.reshape(part(t, a, dim % len(t.value(a)[2]), at, at + 1), out.shape)


def slice_(t: Text, out: Tensor, a: Any, dim: int = 0, start: Any = None, end: Any = None) -> Any:
    return part(t, a, dim, start or 0, 2**62 if end is None else end)


def product(t: Text, out: Tensor, a: Any, b: Any) -> Any:
    x, y = t.value(a), t.value(b)
    lead = len(x[2]) - 2
    batch = f"batching_dims = {list(range(lead))} x {list(range(lead))}, " if lead else ""
    dims = f"{batch}contracting_dims = [{lead + 1}] x [{lead}]"
    text = f"dot_general {x[0]}, {y[0]}, {dims} : ({type_of(*x[1:])}, {type_of(*y[1:])}) -> {{}}"
    return t.add(text, out.dtype, out.shape)


def chosen(t: Text, out: Tensor, where: Any, a: Any, b: Any) -> Any:
    return t.select(
        t.value(where, torch.bool, out.shape),
        *(t.value(x, out.dtype, out.shape) for x in (a, b)),
    )


def places(t: Text, shape: Sequence[int], dim: int, index: Any) -> Any:
    """Whether an entry's place along ``dim`` is the one that ``index`` (1 there) names."""
    number = t.add(f"iota dim = {dim} : {{}}", torch.int64, shape)
    return t.compare("EQ", number, t.value(index, None, shape))


def scatter(t: Text, out: Tensor, a: Any, dim: int, index: Any, value: float) -> Any:
    assert t.value(index)[2][dim] == 1
    there = places(t, out.shape, dim, index)
    return t.select(there, t.constant(value, out.dtype, out.shape), t.value(a))


def gather(t: Text, out: Tensor, a: Any, dim: int, index: Any) -> Any:
    assert out.shape[dim] == 1
    one = t.value(a)
    there = places(t, one[2], dim, index)
    kept = t.select(there, one, t.constant(0, *one[1:]))
    return t.reshape(t.reduce("add", kept, [dim], 0.0), out.shape)


def clamp(t: Text, out: Tensor, a: Any, low: Any = None, high: Any = None) -> Any:
    one = t.value(a, out.dtype)
    for limit, op in ((low, "maximum"), (high, "minimum")):
        if limit is not None:
            one = t.same(op, one, t.constant(limit, *one[1:]))
    return one


def squared(t: Text, out: Tensor, a: Any, power: float) -> Any:
    assert power == 2
    return t.same("multiply", *[t.value(a, out.dtype)] * 2)


def divided(t: Text, out: Tensor, a: Any) -> Any:
    one = t.value(a, out.dtype)
    return t.same("divide", t.constant(1.0, *one[1:]), one)


def towards_zero(t: Text, out: Tensor, a: Any, zero: Any) -> Any:
    """The next float32 from a number that is not negative towards zero: its bits less one."""
    one = t.value(a)
    whole = type_of(*one[1:]).replace("f32", "i32")
    lines, name = t.lines, f"%n{len(t.lines)}"
    lines.append(f"{name} = stablehlo.bitcast_convert {one[0]} : ({type_of(*one[1:])}) -> {whole}")
    lines.append(f"{name}u = stablehlo.constant dense<1> : {whole}")
    lines.append(f"{name}d = stablehlo.subtract {name}, {name}u : {whole}")
    down = t.add(f"bitcast_convert {name}d : ({whole}) -> {{}}", *one[1:])
    none = t.constant(0.0, *one[1:])
    return t.select(t.compare("GT", one, none), down, none)


def pads(*sides: tuple[int, int]) -> str:
    return f"[{', '.join(f'[{low}, {high}]' for low, high in sides)}]"


def padded(t: Text, out: Tensor, a: Any, pad: Sequence[int], value: float = 0.0) -> Any:
    one = t.value(a)
    free = [0] * (len(one[2]) - len(pad) // 2)
    low, high = ([*free, *pad[first::2][::-1]] for first in (0, 1))
    none = t.constant(value, one[1], ())
    text = (
        f"pad {one[0]}, {none[0]}, low = {low}, high = {high}, interior = {[0] * len(low)}"
        f" : ({type_of(*one[1:])}, {type_of(one[1], ())}) -> {{}}"
    )
    return t.add(text, one[1], out.shape)


def windows(t: Text, out: Tensor, a: Any, size: Sequence[int], stride: Sequence[int]) -> Any:
    """(b, c, h, w) as (b, c, i, j, y, x): the entry at (y + i, x + j) (``twins.unfolded``)."""
    one = t.value(a)
    b, c, h, w = one[2]
    assert len(size) == 6 and tuple(stride) == (c * h * w, h * w, w, 1, w, 1)
    parts = []
    for i in range(size[2]):
        for j in range(size[3]):
            down = part(t, one, 2, i, i + size[4])
            parts.append(t.reshape(part(t, down, 3, j, j + size[5]), (b, c, 1, *size[4:])))
    types = ", ".join(type_of(*q[1:]) for q in parts)
    text = f"concatenate {', '.join(q[0] for q in parts)}, dim = 2 : ({types}) -> {{}}"
    return t.reshape(t.add(text, one[1], (b, c, size[2] * size[3], *size[4:])), out.shape)


def correlate(t: Text, x: Any, w: Any, shape: Sequence[int], pad: str, dilate: Any) -> Any:
    window = f"{{stride = [1, 1], pad = {pad}, rhs_dilate = {list(dilate)}}}"
    text = (
        f"convolution({x[0]}, {w[0]}) dim_numbers = [b, f, 0, 1]x[o, i, 0, 1]->[b, f, 0, 1],"
        f" window = {window} {{feature_group_count = 1 : i64, batch_group_count = 1 : i64}}"
        f" : ({type_of(*x[1:])}, {type_of(*w[1:])}) -> "
    )
    return t.add(text + "{}", x[1], shape)


def convolution(
    t: Text, out: Tensor, x: Any, w: Any, bias: Any, stride: Any, pad: Any, dilate: Any,
    transposed: bool, _: Any, groups: int,
) -> Any:  # fmt: skip
    assert list(stride) == [1, 1] and groups == 1 and not transposed
    sides = pads(*((n, n) for n in pad))
    made = correlate(t, t.value(x), t.value(w), out.shape, sides, dilate)
    if bias is None:
        return made
    one = t.reshape(t.value(bias), (1, out.shape[1], 1, 1))
    return t.same("add", made, t.value(one, None, out.shape))


def by_input(
    t: Text, out: Any, g: Any, x: Any, w: Any, _: Any, stride: Any, pad: Any, dilate: Any,
    transposed: bool, __: Any, groups: int, mask: Sequence[bool],
) -> Any:  # fmt: skip
    """Of a convolution's gradients, the input's."""
    assert list(stride) == [1, 1] and groups == 1 and not transposed and list(mask) == [1, 0, 0]
    weight = permute(t, w, w, [1, 0, 2, 3])  # its channels change places, its taps their order
    weight = t.add(f"reverse {weight[0]}, dims = [2, 3] : {{}}", *weight[1:])
    reach = [d * (k - 1) for d, k in zip(dilate, weight[2][2:], strict=True)]
    sides = pads(*((r - n, r - n) for r, n in zip(reach, pad, strict=True)))
    return [correlate(t, t.value(g), weight, out[0].shape, sides, dilate)]


def pooled(t: Text, out: Any, x: Any, size: Any, stride: Any = (), *rest: Any) -> Any:
    """Maxima of windows side by side, and where they lie: the first of equal ones."""
    one, of = t.value(x), out[0]
    assert list(stride or size) == list(size) and not rest
    apart = (*of.shape[:3], size[0], of.shape[3], size[1])
    split = t.reshape(one, apart)
    most = t.reduce("maximum", split, [3, 5], -math.inf)
    here = t.compare("EQ", split, everywhere(t, most, apart))
    first = t.select(here, numbers(t, one[2], apart), t.constant(2**62, torch.int64, apart))
    return [most, t.reduce("minimum", first, [3, 5], 2**62)]


def numbers(t: Text, shape: Sequence[int], apart: Sequence[int]) -> Any:
    """Places in a plane, row by row, of (b, c, h, w), by window."""
    count = math.prod(shape[2:])
    one = t.reshape(t.add("iota dim = 0 : {}", torch.int64, (count,)), shape[2:])
    return t.reshape(t.value(one, None, shape), apart)


def everywhere(t: Text, of: Any, apart: Sequence[int]) -> Any:
    """An entry of each window, (b, c, h, w), for all of its places."""
    text = f"broadcast_in_dim {of[0]}, dims = [0, 1, 2, 4] : ({type_of(*of[1:])}) -> {{}}"
    return t.add(text, of[1], apart)


def unpooled(t: Text, out: Tensor, g: Any, x: Any, size: Any, *rest: Any) -> Any:
    one, at = t.value(g), t.value(rest[-1])
    apart = (*one[2][:3], size[0], one[2][3], size[1])
    here = t.compare("EQ", numbers(t, out.shape, apart), everywhere(t, at, apart))
    none = t.constant(0.0, one[1], apart)
    return t.reshape(t.select(here, everywhere(t, one, apart), none), out.shape)


# By ATen's operation: what writes it. out: of what it makes, shape and dtype.
TABLE: dict[str, Write] = {
    "add.Tensor": both("add"),
    "sub.Tensor": both("subtract"),
    "mul.Tensor": both("multiply"),
    "div.Tensor": both("divide"),
    "minimum.default": both("minimum"),
    "bitwise_and.Tensor": both("and"),
    "eq.Tensor": compared("EQ"),
    "eq.Scalar": compared("EQ"),
    "ne.Scalar": compared("NE"),
    "gt.Tensor": compared("GT"),
    "ge.Scalar": compared("GE"),
    "le.Scalar": compared("LE"),
    "abs.default": alone("abs"),
    "exp.default": alone("exponential"),
    "log.default": alone("log"),
    "neg.default": alone("negate"),
    "sqrt.default": alone("sqrt"),
    "reciprocal.default": divided,
    "pow.Tensor_Scalar": squared,
    "clamp.default": clamp,
    "relu.default": lambda t, out, a: clamp(t, out, a, 0.0),
    "nextafter.default": towards_zero,
    "where.self": chosen,
    "sum.dim_IntList": reduced("add", 0.0),
    "amax.default": reduced("maximum", -math.inf),
    "mm.default": product,
    "bmm.default": product,
    "permute.default": permute,
    "view.default": shaped,
    "unsqueeze.default": shaped,
    "squeeze.dims": shaped,
    "select.int": select,
    "slice.Tensor": slice_,
    "expand.default": lambda t, out, a, *_: t.value(a, None, out.shape),
    "clone.default": lambda t, out, a, **_: t.value(a),
    "alias.default": lambda t, out, a: t.value(a),
    "_to_copy.default": lambda t, out, a, **_: t.value(a, out.dtype),
    "full.default": filled(),
    "full_like.default": filled(),
    "scalar_tensor.default": filled(),
    "constant_pad_nd.default": padded,
    "as_strided.default": windows,
    "convolution.default": convolution,
    "convolution_backward.default": by_input,
    "max_pool2d_with_indices.default": pooled,
    "max_pool2d_with_indices_backward.default": unpooled,
    "scatter.value": scatter,
    "gather.default": gather,
}


def text(of: fx.GraphModule) -> str:
    """The graph as a module with a function ``step``; ``NotImplementedError`` for what the table
    lacks."""
    t, given, several = Text(), [], {}
    for node in of.graph.nodes:
        if node.op == "placeholder":
            val = node.meta["val"]
            t.at[node] = (f"%a{len(given)}", val.dtype, tuple(val.shape))
            given.append(f"%a{len(given)}: {type_of(val.dtype, val.shape)}")
        elif node.target is operator.getitem:
            t.at[node] = several[node.args[0]][node.args[1]]
        elif node.op == "call_function":
            name = str(node.target).removeprefix("aten.")
            try:
                found = TABLE[name](t, node.meta["val"], *node.args, **node.kwargs)
            except (KeyError, AssertionError) as e:
                raise NotImplementedError(f"{name} in this form") from e
            (several if isinstance(found, list) else t.at)[node] = found
    (made,) = (n.args[0] for n in of.graph.nodes if n.op == "output")
    results = [t.value(n) for n in made]
    types = ", ".join(type_of(*r[1:]) for r in results)
    body = "\n  ".join(t.lines)
    return (
        f"func.func @step({', '.join(given)}) -> ({types}) {{\n  {body}\n"
        f"  return {', '.join(r[0] for r in results)} : {types}\n}}\n"
    )


def run(of: fx.GraphModule, given: Sequence[Tensor]) -> list[Tensor]:
    """The graph's results by IREE, on one core of the CPU."""
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, "step.mlir").write_text(text(of))
        np.savez(f"{folder}/given.npz", *[t.detach().contiguous().numpy() for t in given])
        subprocess.run([PYTHON, "-c", _RUN, folder], check=True)
        with np.load(f"{folder}/found.npz") as found:
            return [torch.from_numpy(t) for t in found.values()]
