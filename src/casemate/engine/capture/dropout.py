"""Draws of a module in training mode, written with inputs of the kind ``random``.

No operation of a graph draws: what a module would multiply by at random comes in from outside,
drawn for each record by who runs the graph (:mod:`casemate.engine.draws`). Attention and recurrent
layers that drop out inside are written with their parts.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Final, NoReturn, TypeAlias

from casemate.graph.model import DtypeArg, InputSpec, ListArg, Ref, Size

Sizes: TypeAlias = "Sequence[int | Size]"
_RECURRENT: Final = {
    "aten.lstm.input", "aten.gru.input", "aten.rnn_tanh.input", "aten.rnn_relu.input",
}  # fmt: skip
_ATTENTION: Final = "aten.scaled_dot_product_attention.default"
# In place of minus infinity, whose softmax over a row without anything else is no number.
_LOW: Final = -3e38
# Operations that draw and are known here; no rule of torch's may take them apart before.
KEPT: Final = ("aten.native_dropout.default", "aten.bernoulli.p")


@dataclass(frozen=True, slots=True)
class Writer:
    """How nodes are written for one traced node.

    emit(op, *args, **kwargs): a new node's value. draw(shape, rate): a new random input of this
    per-record shape. sizes(traced): shape of a traced value. arg(traced): an argument in the
    graph's format. refuse(code, what, mend): raises ``ModelError`` naming the node.
    """

    emit: Callable[..., Ref]
    draw: Callable[[Sizes, float], Ref]
    sizes: Callable[[Any], Sizes]
    arg: Callable[[Any], Any]
    refuse: Callable[[str, str, str], NoReturn]


def draws(node: Any) -> bool:
    """Whether a traced node draws at random in a way that is known here."""
    op = str(node.target)
    if op == _ATTENTION:
        return bool(_given(node, "dropout_p"))
    if op in _RECURRENT:
        return bool(_given(node, "train") and _given(node, "dropout"))
    return op in KEPT


def write(node: Any, to: Writer) -> Any:
    """The node's value, or a function from the place of one of several to that."""
    op = str(node.target)
    if op == _ATTENTION:
        return _attention(node, to)
    if op in _RECURRENT:
        return _recurrent(node, to)
    if op == "aten.bernoulli.p":
        drawn = _placed(to, to.sizes(node), 1 - float(node.args[1]))
        if isinstance(drawn, float):
            sizes = ListArg(items=tuple(to.sizes(node)))
            return to.emit("aten.full.default", sizes, drawn, dtype=DtypeArg(dtype="f32"))
        kept = to.emit("aten.gt.Scalar", drawn, 0)
        return to.emit("aten._to_copy.default", kept, dtype=DtypeArg(dtype="f32"))
    source, rate, train = node.args
    if train is False:
        return lambda i: to.arg(source)
    made = _dropped(to, to.arg(source), to.sizes(source), float(rate))
    return lambda i: made if i == 0 else to.emit("aten.ne.Scalar", made, 0)


def spec(name: str, shape: Sizes, rate: float) -> InputSpec:
    """A random input of this per-record shape."""
    return InputSpec(name=name, kind="random", dtype="f32", shape=(Size(a=1), *shape), rate=rate)


def _given(node: Any, name: str) -> Any:
    """An argument of a traced call by its name, or its default."""
    schema = node.target._schema.arguments
    at = next(i for i, a in enumerate(schema) if a.name == name)
    if at < len(node.args):
        return node.args[at]
    return node.kwargs.get(name, schema[at].default_value)


def _dropped(to: Writer, value: Ref, sizes: Sizes, rate: float) -> Ref:
    if rate == 0:
        return value
    return to.emit("aten.mul.Tensor", value, _placed(to, sizes, rate))


def _placed(to: Writer, sizes: Sizes, rate: float) -> Ref | float:
    """Draws for a value of these sizes, with the batch where the value has it; 0.0 where all is
    dropped, 1.0 where nothing is.

    Where the batch is folded with other axes its records are taken to lie each in one piece; the
    proof of independence refuses the graph where they do not.
    """
    if rate in (0, 1):
        return 1.0 - rate
    axes = [i for i, d in enumerate(sizes) if isinstance(d, Size)]
    if len(axes) != 1 or (batch := sizes[axes[0]]).c or batch.a < 1:  # type: ignore[union-attr]
        to.refuse(
            "model.random",
            "draws once for all records",
            "Draw for each record, such as by dropping out what was made of one.",
        )
    axis, fold = axes[0], batch.a  # type: ignore[union-attr]
    rest = [d for i, d in enumerate(sizes) if i != axis]
    drawn = to.draw([fold, *rest] if fold > 1 else rest, rate)
    lead = 2 if fold > 1 else 1
    if axis:
        order = [*range(lead, lead + axis), *range(lead), *range(lead + axis, lead + len(rest))]
        drawn = to.emit("aten.permute.default", drawn, ListArg(items=tuple(order)))
    if fold > 1:
        drawn = to.emit("aten.reshape.default", drawn, ListArg(items=tuple(sizes)))
    return drawn


def _attention(node: Any, to: Writer) -> Ref:
    """As torch.nn.functional.scaled_dot_product_attention is documented; a query that may attend to
    nothing gives zeros."""
    query, key, value, mask = (_given(node, n) for n in ("query", "key", "value", "attn_mask"))
    q, k, v = (to.arg(x) for x in (query, key, value))
    sizes, (*_, length, _) = list(to.sizes(query)), to.sizes(key)
    if _given(node, "enable_gqa"):
        heads = to.sizes(key)[-3]
        if not isinstance(heads, int) or not isinstance(sizes[-3], int) or sizes[-3] % heads:
            to.refuse("model.shape", "has query heads that are no multiple", "Give such heads.")
        k, v = (
            to.emit("aten.repeat_interleave.self_int", x, sizes[-3] // heads, -3) for x in (k, v)
        )
    scale = _given(node, "scale")
    scale = 1 / math.sqrt(_int(sizes[-1])) if scale is None else scale
    turned = to.emit("aten.transpose.int", k, -2, -1)
    scores = to.emit("aten.matmul.default", to.emit("aten.mul.Tensor", q, scale), turned)
    allowed = None
    if _given(node, "is_causal"):
        square = ListArg(items=(sizes[-2], length))
        ones = to.emit("aten.ones.default", square, dtype=DtypeArg(dtype="bool"))
        allowed = to.emit("aten.tril.default", ones)
    elif mask is not None and mask.meta["val"].is_floating_point():
        scores = to.emit("aten.add.Tensor", scores, to.arg(mask))
        allowed = to.emit("aten.gt.Scalar", to.arg(mask), "-inf")
    elif mask is not None:
        allowed = to.arg(mask)
    if allowed is not None:
        scores = to.emit("aten.where.ScalarOther", allowed, scores, _LOW)
    weights = to.emit("aten.softmax.int", scores, -1)
    if allowed is not None:
        weights = to.emit("aten.where.ScalarOther", allowed, weights, 0.0)
    shape = [*to.sizes(node)[:-1], length]
    dropped = _dropped(to, weights, shape, float(_given(node, "dropout_p")))
    return to.emit("aten.matmul.default", dropped, v)


def _int(size: int | Size) -> int:
    return size if isinstance(size, int) else size.a + size.c


def _recurrent(node: Any, to: Writer) -> Callable[[int], Ref]:
    """One layer after the other, with dropout between them."""
    op, hx = str(node.target), _given(node, "hx")
    states = [*hx] if isinstance(hx, list | tuple) else [hx]
    params = [to.arg(p) for p in _given(node, "params")]
    layers, rate = _given(node, "num_layers"), float(_given(node, "dropout"))
    ways = 2 if _given(node, "bidirectional") else 1
    rest = [_given(node, n) for n in ("has_biases", "bidirectional", "batch_first")]
    biases, both, first = rest
    each = len(params) // layers
    x: Ref = to.arg(_given(node, "input"))
    sizes = list(to.sizes(_given(node, "input")))
    sizes[-1] = _int(to.sizes(states[0])[-1]) * ways
    ends: list[list[Ref]] = []
    for layer in range(layers):
        if layer:
            x = _dropped(to, x, sizes, rate)
        at = [to.emit("aten.slice.Tensor", to.arg(s), 0, layer * ways, (layer + 1) * ways)
              for s in states]  # fmt: skip
        start = ListArg(items=tuple(at)) if op == "aten.lstm.input" else at[0]
        own = ListArg(items=tuple(params[layer * each : (layer + 1) * each]))
        made = to.emit(op, x, start, own, biases, 1, 0.0, False, both, first)
        x = Ref(name=f"{made.name}.0")
        ends.append([Ref(name=f"{made.name}.{i + 1}") for i in range(len(states))])

    def output(i: int) -> Ref:
        if i == 0:
            return x
        parts = ListArg(items=tuple(end[i - 1] for end in ends))
        return to.emit("aten.cat.default", parts)

    return output
