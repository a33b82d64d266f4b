"""The joint graph of forward and backward, and the proof of what its values are.

Every value is R (it does not depend on the batch), B (one slice per record) or S (a linear image of
a sum over records of functions of one record each); see :mod:`casemate.graph.ops.base`. When the
losses are B and every parameter's gradient is S, R zero or nothing, the gradient is a sum of
contributions of single records, backward included, and clipping each bounds what a record can do
(rules P3 and P5). Default deny: an op without an entry is refused, and so is a value that would be
none of the three.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

from casemate.graph.model import DtypeArg, ListArg, Node, Ref
from casemate.graph.ops import JOINT, Value, bind
from casemate.graph.ops.base import Call, Op
from casemate.graph.ops.joint import zero
from casemate.spec.errors import ModelError


@dataclass(frozen=True, slots=True)
class Joint:
    """Forward and backward as nodes in order of execution.

    inputs: the values that come in, by name. loss: the per-record losses; gradients: for each
    trained parameter the value that is the gradient of their sum, or ``None`` where it is zero.
    """

    inputs: Mapping[str, Value]
    nodes: tuple[Node, ...]
    loss: str
    gradients: tuple[str | None, ...]


@dataclass(frozen=True, slots=True)
class Proved:
    """joint: with ``None`` for gradients that are proved to be zero, and with zeros made like a sum
    made without it. values: all by name, with their state. contractions: S values that come of a
    sum over records in the node itself, with that node. linear: S values that come of others."""

    joint: Joint
    values: Mapping[str, Value]
    contractions: Mapping[str, Node]
    linear: Mapping[str, Node]


# What gives a constant the dtype of another value, and what needs no other value.
_NEW: Final = {f"aten.new_{n}.default": f"aten.{n}.default" for n in ("zeros", "ones", "full")}


def entry(node: Node) -> Op:
    """The op's entry in the table. Raises ``ModelError``."""
    found = JOINT.get(node.op)
    if found is None:
        raise ModelError(
            "model.op-unknown",
            f"Node {node.name!r} of the gradient uses {node.op[:120]}, which has no rule.",
            mend="Nothing: such a model takes the engine's slower path.",
            where=node.source or node.name,
        )
    return found


def bound(node: Node, values: Mapping[str, Any]) -> Call:
    """The node's arguments by name; ``values`` stands for the references."""

    def resolve(arg: Any) -> Any:
        if isinstance(arg, Ref):
            return values[arg.name]
        return tuple(resolve(x) for x in arg.items) if isinstance(arg, ListArg) else arg

    args = tuple(resolve(a) for a in node.args)
    kwargs = {k: resolve(a) for k, a in node.kwargs.items()}
    return bind(entry(node).schema, node.name, node.source[:200], args, kwargs)


def _outputs(call: Call, op: Op) -> tuple[tuple[Value, ...], bool, bool]:
    """Outputs, whether they are several, and whether the node contracts the batch."""
    given = call.tensors()
    if any(v.slot for v in given) and not op.slots:
        call.mixes("uses the record's place in the batch")
    sums = [v.summed for v in given]
    if any(sums):
        if any(v.batch is not None for v in given):
            call.mixes("combines a sum over records with single records")
        allowed = {
            "add": all(sums) or _beside_zeros(given),
            "each": sum(sums) == 1,
            "first": sums == [True] + [False] * (len(sums) - 1),
        }
        if not allowed.get(op.linear, False):
            call.mixes("is no linear function of a sum over records")
        if op.linear == "add" and not all(zero(x) for x in _numbers(call, op)):
            call.mixes("adds a constant to a sum over records")
        made = op.rule(call)
        if isinstance(made, Value) and made.batch is None and zero(made):
            return (made,), False, False  # zero for whatever records: R
        outs = made if isinstance(made, tuple) else (made,)
        outs = tuple(dataclasses.replace(v, summed=True) for v in outs)
        contracts = False
    else:
        contracted = op.contract(call) if op.contract is not None else None
        made = contracted if contracted is not None else op.rule(call)
        outs = made if isinstance(made, tuple) else (made,)
        contracts = any(v.summed for v in outs)
    if any(v.summed and not v.floating for v in outs):
        call.mixes("rounds a sum over records")
    return outs, isinstance(made, tuple), contracts


def _beside_zeros(given: Sequence[Value]) -> bool:
    """Whether all but the S values are zeros that do not broadcast them."""
    return all(v.summed or zero(v) for v in given) and len({v.dims for v in given}) == 1


def _numbers(call: Call, op: Op) -> list[Any]:
    """Numbers that stand for tensors."""
    kinds = {p.name for p in op.schema.params if p.kind.rstrip("?") == "Tensor"}
    return [x for name, x in call.args.items() if name in kinds and type(x) in (int, float, bool)]


def prove(joint: Joint) -> Proved:
    """The state of every value. Raises ``ModelError`` naming the node that mixes records, or that
    has no rule."""
    values = dict(joint.inputs)
    contractions: dict[str, Node] = {}
    linear: dict[str, Node] = {}
    nodes: list[Node] = []
    for node in joint.nodes:
        call = bound(node, values)
        outs, several, contracts = _outputs(call, entry(node))
        if node.op in _NEW and outs[0].batch is None:
            node = _constant(node, outs[0])
            call = bound(node, values)
        if any(v.summed for v in call.tensors()) and not any(v.summed for v in outs):
            nodes += _zeros(node, outs[0], values)
        else:
            nodes.append(node)
        for i, v in enumerate(outs):
            name = f"{node.name}.{i}" if several else node.name
            values[name] = v
            if v.summed:
                (contractions if contracts else linear)[name] = node
    loss = values[joint.loss]
    if loss.batch is None or loss.summed:
        raise _refuse(joint.loss, "The losses are not one for each record.")
    gradients = tuple(g and _gradient(g, values[g]) for g in joint.gradients)
    made = dataclasses.replace(joint, nodes=tuple(nodes), gradients=gradients)
    return Proved(made, values, contractions, linear)


def _constant(node: Node, v: Value) -> Node:
    """A constant made like another value, made without it: that may be of records."""
    given = {k: a for k, a in node.kwargs.items() if k != "self"}
    args = node.args if "self" in node.kwargs else node.args[1:]
    kwargs = {**given, "dtype": DtypeArg(dtype=v.dtype)}
    return dataclasses.replace(node, op=_NEW[node.op], args=args, kwargs=kwargs)


def _zeros(node: Node, v: Value, values: dict[str, Value]) -> tuple[Node, Node]:
    """Zeros made like a sum, made without it: they are there before any record is."""
    like = f"{node.name}z"
    values[like] = v
    size, dtype = ListArg(items=v.dims), DtypeArg(dtype=v.dtype)
    return (
        Node(name=like, op="aten.full.default", args=(size, 0), kwargs={"dtype": dtype}),
        Node(name=node.name, op="aten.zeros_like.default", args=(Ref(name=like),), kwargs={}),
    )


def _gradient(name: str, v: Value) -> str | None:
    """The gradient's name, ``None`` where it is zero. Raises ``ModelError``."""
    if v.batch is None and not v.summed and v.floating and zero(v):
        return None
    if not v.summed or v.batch is not None:
        raise _refuse(name, "A parameter's gradient is no sum over records.")
    return name


def _refuse(name: str, message: str) -> ModelError:
    return ModelError(
        "model.mixes-records", message, mend="Nothing: it takes the slower path.", where=name
    )
