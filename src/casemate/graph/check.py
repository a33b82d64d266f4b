"""Checks a graph before anything runs: form, dtypes, shapes, costs, independence of records.

Default deny: an op without an entry in :data:`casemate.graph.ops.TABLE` is refused, and so is what
an entry's rule does not prove.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final, NoReturn

from casemate.graph.model import MAX_NODES, Graph, InputSpec, ListArg, Node, Ref, Size
from casemate.graph.ops import TABLE, Batch, Value, bind
from casemate.spec.data import ITEM_BYTES
from casemate.spec.errors import ModelError
from casemate.spec.tensors import TensorInfo

_NAME: Final = re.compile(r"[A-Za-z_][A-Za-z0-9_]{0,511}\Z")


@dataclass(frozen=True, slots=True)
class Limits:
    """The largest graph admitted. Elements and bytes are per record for B values."""

    nodes: int = MAX_NODES
    inputs: int = 65_536
    rank: int = 8
    dim: int = 2**31 - 1
    elements: int = 2**31
    weight_bytes: int = 8 << 30
    record_bytes: int = 64 << 30
    constant_bytes: int = 4 << 30
    flops: int = 10**15


@dataclass(frozen=True, slots=True)
class Checked:
    """What is proved of a graph.

    values: by name (``name.i`` for one of several outputs). parameters: names of the trained
    inputs; ``dimension`` their scalars. flops, saved_bytes: of forward and backward per record,
    and what a record's intermediate values need. fixed_flops, fixed_bytes: what does not depend on
    the batch. frozen_prefix: nodes that depend on the record and on frozen values only, so that
    they need evaluating once per record; constants: nodes that depend on no record and on no
    trained parameter.
    """

    graph: Graph
    values: Mapping[str, Value]
    parameters: tuple[str, ...]
    dimension: int
    flops: int
    saved_bytes: int
    workspace_bytes: int
    fixed_flops: int
    fixed_bytes: int
    frozen_prefix: frozenset[str]
    constants: frozenset[str]


def _refuse(code: str, message: str, mend: str, where: str = "") -> NoReturn:
    raise ModelError(code, message, mend=mend, where=where)


def _form(where: str, message: str) -> NoReturn:
    _refuse("model.form", message, "Export the model again with casemate.", where)


def _input(spec: InputSpec, weights: Mapping[str, TensorInfo], limits: Limits) -> Value:
    name = spec.name
    if spec.dtype not in ITEM_BYTES:
        _form(name, f"Input {name!r} has the dtype {spec.dtype!r}.")
    dims = tuple(d.a if isinstance(d, Size) else d for d in spec.shape)
    if len(dims) > limits.rank or any(not 0 <= d <= limits.dim for d in dims):
        _form(name, f"Input {name!r} has a shape that is not admitted.")
    if spec.kind == "data":
        if not spec.shape or spec.shape[0] != Size(a=1) or spec.tensor:
            _form(name, f"Data input {name!r} must have the batch as axis 0 and no tensor.")
        if any(isinstance(d, Size) for d in spec.shape[1:]):
            _form(name, f"Data input {name!r} has the batch on another axis too.")
        bounds = {"bool": (0, 1), "u8": (0, 255)}.get(spec.dtype)
        return Value(spec.dtype, dims, Batch(0), bounds)
    if any(isinstance(d, Size) for d in spec.shape):
        _form(name, f"Input {name!r} is no data and has the batch in its shape.")
    info = weights.get(spec.tensor)
    if info is None:
        _form(name, f"The weights hold no tensor {spec.tensor!r}.")
    if (info.dtype, info.shape) != (spec.dtype, dims):
        _form(name, f"Tensor {spec.tensor!r} is not of the dtype and shape that the graph says.")
    if spec.kind == "param" and spec.dtype != "f32":
        _refuse(
            "model.dtype",
            f"Parameter {spec.tensor!r} is {spec.dtype}, not float32.",
            "Call .float() on the module.",
            name,
        )
    return Value(spec.dtype, dims)


def _inputs(graph: Graph, weights: Mapping[str, TensorInfo], limits: Limits) -> dict[str, Value]:
    if not 1 <= len(graph.inputs) <= limits.inputs or len(graph.nodes) > limits.nodes:
        _refuse(
            "model.too-large",
            f"The graph has {len(graph.inputs)} inputs and {len(graph.nodes)} nodes.",
            f"At most {limits.inputs} and {limits.nodes} are admitted.",
        )
    values: dict[str, Value] = {}
    tensors: set[str] = set()
    for spec in graph.inputs:
        if not _NAME.match(spec.name) or spec.name in values:
            _form(
                spec.name[:80],
                f"Input {spec.name[:80]!r} has a name that is taken or is no ASCII identifier.",
            )
        if spec.kind != "data":
            if spec.tensor in tensors:
                _form(spec.name, f"Tensor {spec.tensor!r} is named by two inputs.")
            tensors.add(spec.tensor)
        values[spec.name] = _input(spec, weights, limits)
    if unused := sorted(set(weights) - tensors):
        _form("", f"Tensor {unused[0]!r} belongs to no input.")
    if not any(s.kind == "data" for s in graph.inputs):
        _form("", "The graph reads no data.")
    return values


def _resolve(node: Node, arg: Any, values: Mapping[str, Value]) -> Any:
    if isinstance(arg, Ref):
        if arg.name not in values:
            _form(
                node.name,
                f"Node {node.name!r} reads {arg.name[:80]!r}, which nothing before it makes.",
            )
        return values[arg.name]
    if isinstance(arg, ListArg):
        return tuple(_resolve(node, x, values) for x in arg.items)
    return arg


def references(node: Node) -> list[str]:
    """Names of the values that a node reads."""
    out: list[str] = []
    for arg in (*node.args, *node.kwargs.values()):
        for x in arg.items if isinstance(arg, ListArg) else (arg,):
            if isinstance(x, Ref):
                out.append(x.name)
    return out


def check(graph: Graph, weights: Mapping[str, TensorInfo], *, limits: Limits = Limits()) -> Checked:
    """Prove what :class:`Checked` says, or raise ``ModelError`` naming the node and the mend."""
    values = _inputs(graph, weights, limits)
    trained = {s.name for s in graph.inputs if s.kind == "param"}
    tainted = set(trained)  # names of values that depend on a trained parameter
    names = set(values)
    prefix: set[str] = set()
    constants: set[str] = set()
    cost = {"flops": 0, "saved": 0, "work": 0, "fixed_flops": 0, "fixed_bytes": 0}
    for node in graph.nodes:
        if not _NAME.match(node.name) or node.name in names:
            _form(
                node.name[:80],
                f"Node {node.name[:80]!r} has a name that is taken or is no ASCII identifier.",
            )
        names.add(node.name)
        entry = TABLE.get(node.op)
        if entry is None:
            _refuse(
                "model.op-unknown",
                f"Node {node.name!r} is {node.op[:120]!r}, which is not in the table of operations.",
                "Write it with the operations listed in docs/models.md.",
                node.name,
            )
        args = tuple(_resolve(node, a, values) for a in node.args)
        kwargs = {k: _resolve(node, a, values) for k, a in node.kwargs.items()}
        call = bind(entry.schema, node.name, node.source[:200], args, kwargs)
        made = entry.rule(call)
        outs = made if isinstance(made, tuple) else (made,)
        for i, v in enumerate(outs):
            name = f"{node.name}.{i}" if isinstance(made, tuple) else node.name
            _limit(node, v, limits)
            values[name] = v
        record = any(v.batch is not None for v in outs)
        taint = any(r in tainted for r in references(node))
        if taint:
            tainted.update(
                f"{node.name}.{i}" if isinstance(made, tuple) else node.name
                for i in range(len(outs))
            )
        else:
            (prefix if record else constants).add(node.name)
        flops = entry.flops(call, outs) * (1 + entry.backward if taint else 1)
        nbytes = 0 if entry.view else sum(v.nbytes for v in outs)
        work = entry.workspace(call, outs)
        if record:
            cost["flops"] += flops
            cost["saved"] += nbytes
            cost["work"] = max(cost["work"], work)
        else:
            cost["fixed_flops"] += flops
            cost["fixed_bytes"] += nbytes
        if (
            cost["saved"] > limits.record_bytes
            or cost["fixed_bytes"] > limits.constant_bytes
            or max(cost["flops"], cost["fixed_flops"]) > limits.flops
        ):
            _refuse(
                "model.too-large",
                f"At node {node.name!r} the graph needs more memory or work than is admitted.",
                "Make the model smaller.",
                node.name,
            )
    _loss(graph, values, tainted)
    params = tuple(s.name for s in graph.inputs if s.kind == "param")
    return Checked(
        graph, values, params, sum(values[p].numel for p in params),
        cost["flops"], cost["saved"], cost["work"], cost["fixed_flops"], cost["fixed_bytes"],
        frozenset(prefix), frozenset(constants),
    )  # fmt: skip


def _limit(node: Node, v: Value, limits: Limits) -> None:
    if v.rank > limits.rank or any(d > limits.dim for d in v.dims) or v.numel > limits.elements:
        _refuse(
            "model.too-large",
            f"Node {node.name!r} makes a value of shape {v.dims}.",
            f"At most {limits.elements} elements and {limits.rank} axes are admitted.",
            node.name,
        )


def _loss(graph: Graph, values: Mapping[str, Value], tainted: set[str]) -> None:
    loss = values.get(graph.loss)
    if loss is None:
        _form(graph.loss[:80], f"The loss {graph.loss[:80]!r} is no value of the graph.")
    if loss.batch != Batch(0) or loss.dims != (1,) or loss.dtype != "f32" or loss.slot:
        _refuse(
            "model.loss",
            f"The loss {graph.loss!r} is {loss.dtype} of shape {loss.shape}.",
            "Give one float32 loss for each record, shape (B,).",
            graph.loss,
        )
    if graph.loss not in tainted:
        _refuse(
            "model.loss",
            "The loss depends on no trained parameter.",
            "Leave requires_grad on for what is to be trained.",
            graph.loss,
        )
