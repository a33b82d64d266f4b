"""Operations of ONNX in PyTorch: :data:`RULES`, by name, of the default domain's opsets 13 to 24.

Reference: the ONNX operator schemas (onnx.ai/onnx/operators). What a rule cannot say is refused by
the node's name.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Final, NoReturn, TypeAlias

import torch
from torch.nn import functional as F  # noqa: N812

from casemate.engine.capture.trace import TORCH_DTYPES
from casemate.spec.errors import ModelError

# TensorProto.DataType of the dtypes that there are.
DTYPES: Final = {1: "f32", 2: "u8", 6: "i32", 7: "i64", 9: "bool"}
Value: TypeAlias = Any  # a tensor, a number, or a list of numbers that sizes are made of


def refuse(message: str, mend: str, where: str = "") -> NoReturn:
    raise ModelError("model.onnx", message, mend=mend, where=where)


@dataclass(frozen=True, slots=True)
class Call:
    """One node: its inputs' values, ``None`` for one that is left out, and its attributes."""

    op: str
    name: str
    inputs: Sequence[Value]
    attributes: dict[str, Any]
    outputs: int

    def has(self, i: int) -> bool:
        return i < len(self.inputs) and self.inputs[i] is not None

    def t(self, i: int) -> torch.Tensor:
        """Input ``i`` as a tensor."""
        given = self.inputs[i] if self.has(i) else None
        if given is None:
            self.refuse(f"has no input {i}")
        return given if isinstance(given, torch.Tensor) else torch.tensor(given)

    def ints(self, i: int) -> list[Any]:
        """Input ``i`` as sizes or axes, which no record may decide."""
        given = self.inputs[i]
        if isinstance(given, torch.Tensor):
            self.refuse(f"takes input {i} from data; it must be a constant")
        return given if isinstance(given, list) else [given]

    def number(self, i: int) -> Any:
        """Input ``i`` as one number that stands in the file."""
        given = self.inputs[i]
        if isinstance(given, torch.Tensor):
            self.refuse(f"takes input {i} from data; it must be one constant")
        return given[0] if isinstance(given, list) else given

    def a(self, name: str, default: Any = None) -> Any:
        return self.attributes.get(name, default)

    def refuse(self, what: str) -> NoReturn:
        refuse(
            f"Node {self.name!r} ({self.op}) {what}.",
            "Export it in another way, or deploy the PyTorch module.",
            self.name,
        )


Rule: TypeAlias = "Callable[[Call], Any]"


def _unary(f: Callable[[torch.Tensor], torch.Tensor]) -> Rule:
    return lambda c: f(c.t(0))


def _numbers(c: Call) -> bool:
    """Whether sizes are computed, not data."""
    return all(not isinstance(x, torch.Tensor) for x in c.inputs)


def _binary(f: Callable[[Any, Any], Any]) -> Rule:
    def rule(c: Call) -> Any:
        if _numbers(c):
            a, b = c.ints(0), c.ints(1)
            count = max(len(a), len(b))
            pairs = zip(a * (count // len(a)), b * (count // len(b)), strict=True)
            made = [f(x, y) for x, y in pairs]
            scalar = not any(isinstance(x, list) for x in c.inputs)
            return made[0] if scalar else made
        return f(c.t(0), c.t(1))

    return rule


def _div(a: Any, b: Any) -> Any:
    if not isinstance(a, torch.Tensor):
        return a // b
    return a / b if a.is_floating_point() else torch.div(a, b, rounding_mode="trunc")


def _folded(f: Callable[[Any, Any], Any]) -> Rule:
    def rule(c: Call) -> Any:
        made = c.t(0)
        for i in range(1, len(c.inputs)):
            made = f(made, c.t(i))
        return made

    return rule


def _axes(c: Call, at: int = 1) -> list[int] | None:
    found = c.ints(at) if c.has(at) else c.a("axes")
    return None if found is None else [int(x) for x in found]


def _reduce(f: Callable[[torch.Tensor, list[int], bool], torch.Tensor]) -> Rule:
    def rule(c: Call) -> Any:
        axes = _axes(c)
        if axes is None or not axes:
            if c.a("noop_with_empty_axes", 0):
                return c.t(0)
            axes = list(range(c.t(0).dim()))
        return f(c.t(0), axes, bool(c.a("keepdims", 1)))

    return rule


def _extreme(f: Callable[..., torch.Tensor]) -> Rule:
    def rule(c: Call) -> Any:
        if c.a("select_last_index", 0):
            c.refuse("asks for the last index")
        return f(c.t(0), dim=c.a("axis", 0), keepdim=bool(c.a("keepdims", 1)))

    return rule


def _gemm(c: Call) -> Any:
    a = c.t(0).t() if c.a("transA", 0) else c.t(0)
    b = c.t(1).t() if c.a("transB", 0) else c.t(1)
    alpha, beta = c.a("alpha", 1.0), c.a("beta", 1.0)
    if alpha == 1 and not c.a("transA", 0) and (not c.has(2) or (beta == 1 and c.t(2).dim() == 1)):
        return F.linear(a, b.t(), c.t(2) if c.has(2) else None)
    made = (a @ b) * alpha
    return made + c.t(2) * beta if c.has(2) else made


def _pads(c: Call, axes: int) -> tuple[list[int], list[int]]:
    """Before and after each spatial axis."""
    if c.a("auto_pad", b"NOTSET") not in (b"NOTSET", b"VALID", b""):
        c.refuse("pads by itself (auto_pad)")
    pads = list(c.a("pads") or [0] * 2 * axes)
    return pads[:axes], pads[axes:]


def _padded(c: Call, axes: int, value: float) -> tuple[torch.Tensor, list[int]]:
    """The input, padded here where the two sides differ, and what is left to pad."""
    before, after = _pads(c, axes)
    if before == after:
        return c.t(0), before
    flat = [p for pair in zip(reversed(before), reversed(after), strict=True) for p in pair]
    return F.pad(c.t(0), flat, value=value), [0] * axes


_CONV: Final = (F.conv1d, F.conv2d, F.conv3d)
_DECONV: Final = (F.conv_transpose1d, F.conv_transpose2d, F.conv_transpose3d)
_MAX_POOL: Final = (F.max_pool1d, F.max_pool2d, F.max_pool3d)
_AVG_POOL: Final = (F.avg_pool1d, F.avg_pool2d, F.avg_pool3d)


def _spatial(c: Call) -> int:
    axes = c.t(0).dim() - 2
    if not 1 <= axes <= 3:
        c.refuse(f"has {axes} spatial axes")
    return axes


def _conv(c: Call) -> Any:
    axes = _spatial(c)
    x, padding = _padded(c, axes, 0.0)
    ones = [1] * axes
    return _CONV[axes - 1](
        x, c.t(1), c.t(2) if c.has(2) else None, stride=c.a("strides", ones), padding=padding,
        dilation=c.a("dilations", ones), groups=c.a("group", 1),
    )  # fmt: skip


def _deconv(c: Call) -> Any:
    axes = _spatial(c)
    before, after = _pads(c, axes)
    if before != after or c.a("output_shape"):
        c.refuse("has another padding on each side, or an output shape")
    ones = [1] * axes
    return _DECONV[axes - 1](
        c.t(0), c.t(1), c.t(2) if c.has(2) else None, stride=c.a("strides", ones), padding=before,
        output_padding=c.a("output_padding", [0] * axes), groups=c.a("group", 1),
        dilation=c.a("dilations", ones),
    )  # fmt: skip


def _max_pool(c: Call) -> Any:
    if c.outputs > 1:
        c.refuse("gives indices")
    axes = _spatial(c)
    x, padding = _padded(c, axes, -math.inf)
    return _MAX_POOL[axes - 1](
        x, c.a("kernel_shape"), stride=c.a("strides", [1] * axes), padding=padding,
        dilation=c.a("dilations", [1] * axes), ceil_mode=bool(c.a("ceil_mode", 0)),
    )  # fmt: skip


def _avg_pool(c: Call) -> Any:
    axes = _spatial(c)
    before, after = _pads(c, axes)
    counted = bool(c.a("count_include_pad", 0))
    if any(d != 1 for d in c.a("dilations", [1])) or (before != after and not counted):
        c.refuse("is dilated, or has another padding on each side")
    x, padding = _padded(c, axes, 0.0)
    return _AVG_POOL[axes - 1](
        x, c.a("kernel_shape"), stride=c.a("strides", [1] * axes), padding=padding,
        ceil_mode=bool(c.a("ceil_mode", 0)), count_include_pad=counted,
    )  # fmt: skip


def _over_space(f: Callable[[torch.Tensor, list[int]], torch.Tensor]) -> Rule:
    return lambda c: f(c.t(0), list(range(2, c.t(0).dim())))


def _batch_norm(c: Call) -> Any:
    if c.a("training_mode", 0):
        c.refuse("is in training mode, and averages over the records")
    scale, bias, mean, var = (c.t(i) for i in range(1, 5))
    return F.batch_norm(c.t(0), mean, var, scale, bias, False, 0.0, c.a("epsilon", 1e-5))


def _layer_norm(c: Call) -> Any:
    if c.outputs > 1:
        c.refuse("gives its statistics")
    x = c.t(0)
    axis = c.a("axis", -1) % x.dim()
    shape = [int(d) for d in x.shape[axis:]]
    weight = c.t(1).expand(shape)
    bias = c.t(2).expand(shape) if c.has(2) else None
    return F.layer_norm(x, shape, weight, bias, c.a("epsilon", 1e-5))


def _group_norm(c: Call) -> Any:
    return F.group_norm(c.t(0), c.a("num_groups"), c.t(1), c.t(2), c.a("epsilon", 1e-5))


def _clip(c: Call) -> Any:
    low = c.number(1) if c.has(1) else None
    high = c.number(2) if c.has(2) else None
    made = c.t(0)
    return made if low is None and high is None else made.clamp(low, high)


def _cast(c: Call) -> Any:
    to = DTYPES.get(c.a("to"))
    if not isinstance(c.inputs[0], torch.Tensor):
        return c.inputs[0]
    if to is None:
        c.refuse("converts to a type that is not float32, int64, int32, uint8 or bool")
    return c.t(0).to(TORCH_DTYPES[to])


def _reshape(c: Call) -> Any:
    x, shape = c.t(0), c.ints(1)
    if not c.a("allowzero", 0):
        shape = [x.shape[i] if isinstance(d, int) and d == 0 else d for i, d in enumerate(shape)]
    return x.reshape(shape)


def _flatten(c: Call) -> Any:
    if c.a("axis", 1) % c.t(0).dim() != 1:
        c.refuse("flattens from another axis than 1")
    return c.t(0).flatten(1)


def _squeeze(c: Call) -> Any:
    axes = _axes(c)
    if not isinstance(c.inputs[0], torch.Tensor):
        return c.ints(0)[0]
    if axes is None:
        c.refuse("names no axes")
    return c.t(0).squeeze(tuple(axes))


def _unsqueeze(c: Call) -> Any:
    axes = _axes(c) or []
    if not isinstance(c.inputs[0], torch.Tensor):
        return c.ints(0)
    x = c.t(0)
    rank = x.dim() + len(axes)
    for axis in sorted(a % rank for a in axes):
        x = x.unsqueeze(axis)
    return x


def _concat(c: Call) -> Any:
    if _numbers(c):
        return [d for i in range(len(c.inputs)) for d in c.ints(i)]
    return torch.cat([c.t(i) for i in range(len(c.inputs))], c.a("axis"))


def _split(c: Call) -> Any:
    x, axis = c.t(0), c.a("axis", 0)
    if c.has(1):
        return torch.split(x, [int(d) for d in c.ints(1)], axis)
    each = -(-int(x.shape[axis]) // c.outputs)
    return torch.split(x, each, axis)


def _slice(c: Call) -> Any:
    starts, ends = c.ints(1), c.ints(2)
    steps = c.ints(4) if c.has(4) else [1] * len(starts)
    if not isinstance(c.inputs[0], torch.Tensor):
        return c.ints(0)[starts[0] : min(ends[0], 2**31) : steps[0]]
    x = c.t(0)
    axes = c.ints(3) if c.has(3) else list(range(len(starts)))
    for start, end, axis, step in zip(starts, ends, axes, steps, strict=True):
        if step < 1:
            c.refuse("goes backwards")
        where: list[Any] = [slice(None)] * x.dim()
        where[axis % x.dim()] = slice(start, None if end >= 2**31 - 1 else end, step)
        x = x[tuple(where)]
    return x


def _gather(c: Call) -> Any:
    axis = c.a("axis", 0)
    if not isinstance(c.inputs[0], torch.Tensor):
        given = c.ints(0)
        at = c.inputs[1]
        return [given[i] for i in at] if isinstance(at, list) else given[at]
    x, at = c.t(0), c.inputs[1]
    if isinstance(at, int):
        return x.select(axis, at)
    indices = c.t(1)
    if axis % x.dim() == 0 and x.dim() == 2 and isinstance(c.inputs[1], torch.Tensor):
        return F.embedding(indices, x)
    flat = x.index_select(axis, indices.reshape(-1))
    axis %= x.dim()
    return flat.reshape(*x.shape[:axis], *indices.shape, *x.shape[axis + 1 :])


def _expand(c: Call) -> Any:
    x, shape = c.t(0), c.ints(1)
    lead = [1] * (len(shape) - x.dim())
    sizes = [*lead, *x.shape]
    wanted = [*[1] * (len(sizes) - len(shape)), *shape]
    return x.expand(
        [a if isinstance(b, int) and b == 1 else b for a, b in zip(sizes, wanted, strict=True)]
    )


def _pad(c: Call) -> Any:
    mode = c.a("mode", b"constant").decode()
    x, pads = c.t(0), [int(p) for p in c.ints(1)]
    axes = [int(a) % x.dim() for a in c.ints(3)] if c.has(3) else list(range(x.dim()))
    before = dict(zip(axes, pads[: len(axes)], strict=True))
    after = dict(zip(axes, pads[len(axes) :], strict=True))
    flat = [p for d in reversed(range(x.dim())) for p in (before.get(d, 0), after.get(d, 0))]
    if mode == "constant":
        return F.pad(x, flat, value=c.number(2) if c.has(2) else 0.0)
    while flat and flat[-2:] == [0, 0]:
        flat = flat[:-2]
    torch_mode = {"reflect": "reflect", "edge": "replicate"}.get(mode)
    if torch_mode is None:
        c.refuse(f"pads by {mode}")
    return F.pad(x, flat, mode=torch_mode)


def _shape(c: Call) -> Any:
    sizes = list(c.t(0).shape)
    return sizes[c.a("start", 0) : c.a("end", len(sizes))]


def _constant(c: Call) -> Any:
    for name in ("value", "value_float", "value_int", "value_floats", "value_ints"):
        if (found := c.a(name)) is not None:
            return found
    return c.refuse("holds no numbers")


def _constant_of_shape(c: Call) -> Any:
    filled = c.a("value")
    value = 0.0 if filled is None else (filled[0] if isinstance(filled, list) else filled)
    if isinstance(value, torch.Tensor):
        return value.reshape(()).expand(c.ints(0))
    dtype = torch.int64 if isinstance(value, int) else torch.float32
    return torch.full(c.ints(0), value, dtype=dtype)


def _softmax(f: Callable[..., torch.Tensor]) -> Rule:
    return lambda c: f(c.t(0), dim=c.a("axis", -1))


RULES: Final[dict[str, Rule]] = {
    "Abs": _unary(torch.abs),
    "Add": _binary(lambda a, b: a + b),
    "And": _binary(torch.logical_and),
    "ArgMax": _extreme(torch.argmax),
    "ArgMin": _extreme(torch.argmin),
    "AveragePool": _avg_pool,
    "BatchNormalization": _batch_norm,
    "Cast": _cast,
    "Ceil": _unary(torch.ceil),
    "Clip": _clip,
    "Concat": _concat,
    "Constant": _constant,
    "ConstantOfShape": _constant_of_shape,
    "Conv": _conv,
    "ConvTranspose": _deconv,
    "Cos": _unary(torch.cos),
    "Div": _binary(_div),
    "Dropout": lambda c: c.t(0),
    "Einsum": lambda c: torch.einsum(
        c.a("equation").decode(), *(c.t(i) for i in range(len(c.inputs)))
    ),
    "Elu": lambda c: F.elu(c.t(0), c.a("alpha", 1.0)),
    "Equal": _binary(lambda a, b: a == b),
    "Erf": _unary(torch.erf),
    "Exp": _unary(torch.exp),
    "Expand": _expand,
    "Flatten": _flatten,
    "Floor": _unary(torch.floor),
    "Gather": _gather,
    "Gelu": lambda c: F.gelu(c.t(0), approximate=c.a("approximate", b"none").decode()),
    "Gemm": _gemm,
    "GlobalAveragePool": _over_space(lambda x, axes: x.mean(axes, keepdim=True)),
    "GlobalMaxPool": _over_space(lambda x, axes: x.amax(axes, keepdim=True)),
    "Greater": _binary(lambda a, b: a > b),
    "GreaterOrEqual": _binary(lambda a, b: a >= b),
    "GroupNormalization": _group_norm,
    "HardSigmoid": lambda c: (c.t(0) * c.a("alpha", 0.2) + c.a("beta", 0.5)).clamp(0, 1),
    "HardSwish": _unary(F.hardswish),
    "Identity": lambda c: c.inputs[0],
    "InstanceNormalization": lambda c: F.instance_norm(
        c.t(0), weight=c.t(1), bias=c.t(2), eps=c.a("epsilon", 1e-5)
    ),
    "LayerNormalization": _layer_norm,
    "LeakyRelu": lambda c: F.leaky_relu(c.t(0), c.a("alpha", 0.01)),
    "Less": _binary(lambda a, b: a < b),
    "LessOrEqual": _binary(lambda a, b: a <= b),
    "Log": _unary(torch.log),
    "LogSoftmax": _softmax(torch.log_softmax),
    "MatMul": lambda c: c.t(0) @ c.t(1),
    "Max": _folded(torch.maximum),
    "MaxPool": _max_pool,
    "Min": _folded(torch.minimum),
    "Mish": _unary(F.mish),
    "Mul": _binary(lambda a, b: a * b),
    "Neg": _unary(torch.neg),
    "Not": _unary(torch.logical_not),
    "Or": _binary(torch.logical_or),
    "PRelu": lambda c: torch.where(c.t(0) > 0, c.t(0), c.t(0) * c.t(1)),
    "Pad": _pad,
    "Pow": _binary(lambda a, b: a**b),
    "Reciprocal": _unary(torch.reciprocal),
    "ReduceL2": _reduce(lambda x, axes, keep: torch.linalg.vector_norm(x, dim=axes, keepdim=keep)),
    "ReduceMax": _reduce(lambda x, axes, keep: x.amax(axes, keepdim=keep)),
    "ReduceMean": _reduce(lambda x, axes, keep: x.mean(axes, keepdim=keep)),
    "ReduceMin": _reduce(lambda x, axes, keep: x.amin(axes, keepdim=keep)),
    "ReduceSum": _reduce(lambda x, axes, keep: x.sum(axes, keepdim=keep)),
    "Relu": _unary(torch.relu),
    "Reshape": _reshape,
    "Round": _unary(torch.round),
    "Selu": _unary(torch.selu),
    "Shape": _shape,
    "Sigmoid": _unary(torch.sigmoid),
    "Sign": _unary(torch.sign),
    "Sin": _unary(torch.sin),
    "Slice": _slice,
    "Softmax": _softmax(torch.softmax),
    "Softplus": _unary(F.softplus),
    "Split": _split,
    "Sqrt": _unary(torch.sqrt),
    "Squeeze": _squeeze,
    "Sub": _binary(lambda a, b: a - b),
    "Sum": _folded(lambda a, b: a + b),
    "Tanh": _unary(torch.tanh),
    "Transpose": lambda c: c.t(0).permute(c.a("perm") or list(range(c.t(0).dim()))[::-1]),
    "Unsqueeze": _unsqueeze,
    "Where": lambda c: torch.where(c.t(0), c.t(1), c.t(2)),
}
