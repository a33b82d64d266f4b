"""Checks a graph before anything runs: form, dtypes, shapes, costs, independence of records.

Default deny: an op without an entry in :data:`casemate.graph.ops.TABLE` is refused, and so is what
an entry's rule does not prove.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final, NoReturn

from casemate.graph.model import MAX_NODES, Graph, InputSpec, ListArg, Node, Ref, Size
from casemate.graph.ops import TABLE, Batch, Value, bind
from casemate.graph.ops.base import held
from casemate.graph.pack import Weights
from casemate.graph.unknown import reason
from casemate.spec.data import ITEM_BYTES, DatasetSchema
from casemate.spec.errors import ModelError
from casemate.spec.job import InputBinding
from casemate.spec.tensors import TensorInfo

# The most by which dropout may multiply what it keeps.
MAX_GAIN: Final = 2**16
MAX_OUTPUTS: Final = 64
_NAME: Final = re.compile(r"[A-Za-z_][A-Za-z0-9_]{0,511}\Z")


@dataclass(frozen=True, slots=True)
class Limits:
    """The largest graph admitted; elements, bytes and FLOPs are per record for B values.

    ``values``: inputs and outputs of all nodes together. ``items``: of one list among a node's
    arguments. ``fixed_bytes`` bounds what constants made in the graph may take, ``moved`` the
    elements that forward and backward read or write, which views cost too: the gradient of a view
    is as large as what was looked at.
    """

    nodes: int = MAX_NODES
    inputs: int = 65_536
    values: int = 2**18
    items: int = 4096
    rank: int = 8
    elements: int = 2**28
    weight_bytes: int = 8 << 30
    record_bytes: int = 16 << 30
    fixed_bytes: int = 2 << 30
    flops: int = 10**13
    moved: int = 2**36


@dataclass(frozen=True, slots=True)
class Checked:
    """What is proved of a graph.

    values: by name (``name.i`` for one of several outputs), with shape, dtype and batch axis.
    parameters: the trained inputs; ``dimension``: their scalars.
    flops: forward and backward, per record; saved_bytes: what a record's intermediate values take;
    workspace_bytes: the most that any one node needs besides, forward or backward. fixed_flops and
    fixed_bytes: of what depends on no record.
    frozen_prefix: nodes that depend on the record and on no trained parameter and no random input,
    so that they need evaluating once per record. constants: nodes that depend on none of these.
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


def _name(kind: str, name: str, taken: set[str]) -> None:
    if not _NAME.match(name) or name in taken:
        _form(name[:80], f"{kind} {name[:80]!r} has a taken name, or one that is no identifier.")
    taken.add(name)


def _size(item: int | Size) -> int:
    return item.a if isinstance(item, Size) else item


def _weight(
    spec: InputSpec,
    weights: Mapping[str, TensorInfo],
    bounds: Mapping[str, tuple[int, int] | None] | None,
) -> Value:
    name, dims = spec.name, tuple(_size(d) for d in spec.shape)
    if any(isinstance(d, Size) for d in spec.shape):
        _form(name, f"Input {name!r} is no data and has the batch in its shape.")
    info = weights.get(spec.tensor)
    if " ".join(spec.tensor.split()) != spec.tensor:
        _form(name, f"Tensor {spec.tensor[:120]!r} has spaces that cannot be seen.")
    if info is None:
        _form(name, f"The weights hold no tensor {spec.tensor[:120]!r}.")
    if (info.dtype, info.shape) != (spec.dtype, dims):
        _form(name, f"Tensor {spec.tensor!r} is not of the dtype and shape that the graph says.")
    if spec.kind == "param" and spec.dtype != "f32":
        message = f"Parameter {spec.tensor!r} is {spec.dtype}, not float32."
        _refuse("model.dtype", message, "Call .float() on the module.", name)
    known = bounds.get(name) if bounds is not None and spec.kind == "frozen" else None
    return Value(spec.dtype, dims, bounds=known)


def _data(spec: InputSpec, bounds: Mapping[str, tuple[int, int] | None] | None) -> Value:
    name = spec.name
    if not spec.shape or spec.shape[0] != Size(a=1) or spec.tensor:
        _form(name, f"Input {name!r} must have the batch as axis 0 and no tensor.")
    if any(isinstance(d, Size) for d in spec.shape[1:]):
        _form(name, f"Input {name!r} has the batch on another axis too.")
    dims = tuple(_size(d) for d in spec.shape)
    known = bounds.get(name) if bounds is not None else None
    return Value(spec.dtype, dims, Batch(0), known, data=bounds is not None)


def _declared(graph: Graph, spec: InputSpec) -> None:
    """Bounds stand in the graph where no dataset declares them, and make sense."""
    whole = spec.kind == "data" and spec.dtype in ("u8", "i32", "i64")
    if not (graph.outputs and whole) or spec.low is None or spec.high is None:
        _form(spec.name, f"Input {spec.name!r} has bounds and is no integer input of a prediction.")
    if held(spec.dtype, (spec.low, spec.high)) is None or spec.low > spec.high:
        _form(spec.name, f"Input {spec.name!r} has bounds that its dtype does not hold.")


def _random(spec: InputSpec, bounds: Mapping[str, tuple[int, int] | None] | None) -> Value:
    """Each element is 0 or 1 / (1 - rate), drawn for the record alone."""
    name = spec.name
    if spec.dtype != "f32" or not 0 < spec.rate < 1:
        _form(name, f"Random input {name!r} is not float32, or its rate is not between 0 and 1.")
    if 1 / (1 - spec.rate) > MAX_GAIN:
        message = f"Random input {name!r} multiplies by {1 / (1 - spec.rate):.3g}."
        _refuse("model.argument", message, f"Drop out at most 1 - 1/{MAX_GAIN} of it.", name)
    return _data(spec, bounds)


_OF_RECORD: Final = {"data": _data, "random": _random}


def _inputs(
    graph: Graph,
    weights: Mapping[str, TensorInfo],
    bounds: Mapping[str, tuple[int, int] | None] | None,
    limits: Limits,
) -> dict[str, Value]:
    counts = f"{len(graph.inputs)} inputs and {len(graph.nodes)} nodes"
    if len(graph.inputs) > limits.inputs or len(graph.nodes) > limits.nodes:
        mend = f"At most {limits.inputs} and {limits.nodes} are admitted."
        _refuse("model.too-large", f"The graph has {counts}.", mend)
    values: dict[str, Value] = {}
    names: set[str] = set()
    tensors: set[str] = set()
    for spec in graph.inputs:
        name = spec.name
        _name("Input", name, names)
        if spec.dtype not in ITEM_BYTES or any(_size(d) < 0 for d in spec.shape):
            _form(name, f"Input {name!r} has a dtype or shape that is not admitted.")
        if spec.kind != "random" and spec.rate:
            _form(name, f"Input {name!r} has a rate and is not random.")
        if (spec.low, spec.high) != (None, None):
            _declared(graph, spec)
        if spec.kind in _OF_RECORD:
            values[name] = _OF_RECORD[spec.kind](spec, bounds)
        else:
            if spec.tensor in tensors:
                _form(name, f"Tensor {spec.tensor!r} is named by two inputs.")
            tensors.add(spec.tensor)
            values[name] = _weight(spec, weights, bounds)
        _limit("Input", name, values[name], limits)
    if unused := sorted(set(weights) - tensors):
        _form("", f"Tensor {unused[0]!r} belongs to no input.")
    if sum(v.nbytes for v in values.values() if v.batch is None) > limits.weight_bytes:
        mend = f"At most {limits.weight_bytes} bytes are admitted."
        _refuse("model.too-large", "The weights are too large.", mend)
    if not any(s.kind == "data" for s in graph.inputs):
        _form("", "The graph reads no data.")
    return values


def require_bools(weights: Mapping[str, tuple[TensorInfo, memoryview]]) -> None:
    """Raises ``model.form``: torch trusts a bool's byte, and the proof of ranges takes it as 0 or
    1."""
    for name, (info, raw) in weights.items():
        if info.dtype == "bool" and raw.tobytes().translate(None, b"\0\1"):
            _form(name[:120], f"Tensor {name[:120]!r} holds bytes that are no bool.")


def declared_bounds(
    graph: Graph, bindings: Sequence[InputBinding], schemas: Sequence[DatasetSchema]
) -> dict[str, tuple[int, int] | None]:
    """Inclusive bounds of the graph's integer inputs over all datasets, as their owners declare."""
    out: dict[str, tuple[int, int] | None] = {}
    dtypes = {s.name: s.dtype for s in graph.inputs if s.kind == "data" and s.dtype != "f32"}
    for b in bindings:
        if b.input not in dtypes:
            continue
        found = [schema.column(c) for schema in schemas for c in b.columns]
        spans = [c.wire_bounds for c in found if c is not None]
        known = [s for s in spans if s is not None]
        if known and len(known) == len(found):
            low, high = min(s[0] for s in known), max(s[1] for s in known)
            out[b.input] = math.ceil(low), math.floor(high)
    return out


def known_bounds(
    graph: Graph,
    weights: Weights,
    bindings: Sequence[InputBinding],
    schemas: Sequence[DatasetSchema],
) -> dict[str, tuple[int, int] | None]:
    """:func:`declared_bounds`, those that a graph for prediction declares itself, and those of
    constant int64 inputs (offsets, tables) by value."""
    out = declared_bounds(graph, bindings, schemas)
    for spec in graph.inputs:
        if spec.low is not None and spec.high is not None:
            out[spec.name] = spec.low, spec.high
        if spec.kind == "frozen" and spec.tensor in weights:
            info, raw = weights[spec.tensor]
            if info.dtype == "i64" and raw:
                values = raw.cast("q")
                out[spec.name] = min(values), max(values)
    return out


def _resolve(node: Node, arg: Any, values: Mapping[str, Value]) -> Any:
    if isinstance(arg, Ref):
        if arg.name not in values:
            what = f"reads {arg.name[:80]!r}, which nothing before it makes"
            _form(node.name, f"Node {node.name!r} {what}.")
        return values[arg.name]
    if isinstance(arg, ListArg):
        return tuple(_resolve(node, x, values) for x in arg.items)
    return arg


def references(node: Node) -> list[str]:
    """Names of the values that a node reads, in order."""
    out: list[str] = []
    for arg in (*node.args, *node.kwargs.values()):
        for x in arg.items if isinstance(arg, ListArg) else (arg,):
            if isinstance(x, Ref):
                out.append(x.name)
    return out


def _limit(kind: str, name: str, v: Value, limits: Limits) -> None:
    if v.rank > limits.rank or v.numel > limits.elements or max(v.dims, default=0) > 2**31:
        message = f"{kind} {name!r} has the shape {str(v.dims)[:120]}."
        mend = f"At most {limits.elements} elements for a record and {limits.rank} axes."
        _refuse("model.too-large", message, mend, name)


@dataclass(slots=True)
class _Cost:
    """Sums over nodes that depend on the record, or on none."""

    flops: int = 0
    nbytes: int = 0
    workspace: int = 0
    moved: int = 0


class _Walk:
    """The one pass over the nodes."""

    def __init__(self, graph: Graph, values: dict[str, Value], limits: Limits) -> None:
        self.values, self.limits = values, limits
        self.names = set(values)
        # Names of values that depend on a trained parameter.
        self.trained = {s.name for s in graph.inputs if s.kind == "param"}
        # And of those that depend on a draw, which is another one in each step.
        self.drawn = {s.name for s in graph.inputs if s.kind == "random"}
        self.prefix: set[str] = set()
        self.constants: set[str] = set()
        self.record, self.fixed = _Cost(), _Cost()
        self.record.nbytes = sum(values[name].nbytes for name in self.drawn)

    def node(self, node: Node) -> None:
        _name("Node", node.name, self.names)
        entry = TABLE.get(node.op)
        if entry is None:
            code, what, mend = reason(node.op[:200])
            place = f", in {node.source[:200]}" if node.source else ""
            message = f"Node {node.name!r} ({node.op[:120]}{place}) {what}."
            _refuse(code, message, mend, node.name)
        lists = (a for a in (*node.args, *node.kwargs.values()) if isinstance(a, ListArg))
        if (longest := max((len(a.items) for a in lists), default=0)) > self.limits.items:
            message = f"Node {node.name!r} has a list of {longest} items."
            mend = f"At most {self.limits.items} are admitted."
            _refuse("model.too-large", message, mend, node.name)
        args = tuple(_resolve(node, a, self.values) for a in node.args)
        kwargs = {k: _resolve(node, a, self.values) for k, a in node.kwargs.items()}
        call = bind(entry.schema, node.name, node.source[:200], args, kwargs)
        given = call.tensors()
        if any(v.slot for v in given) and not entry.slots:
            call.mixes("uses the record's place in the batch", "Use what the record itself holds.")
        made = entry.rule(call)
        several = isinstance(made, tuple)
        outs = made if isinstance(made, tuple) else (made,)
        names = [f"{node.name}.{i}" if several else node.name for i in range(len(outs))]
        data = any(v.data for v in given)
        for name, v in zip(names, outs, strict=True):
            _limit("Node", node.name, v, self.limits)
            self.values[name] = dataclasses.replace(v, bounds=held(v.dtype, v.bounds), data=data)
        reads = references(node)
        trains = not self.trained.isdisjoint(reads)
        draws = not self.drawn.isdisjoint(reads)
        of_record = any(v.batch is not None for v in outs)
        if trains:
            self.trained.update(names)
        if draws:
            self.drawn.update(names)
        if not (trains or draws):
            (self.prefix if of_record else self.constants).add(node.name)
        cost = self.record if of_record else self.fixed
        cost.flops += entry.flops(call, outs) * (1 + entry.backward * trains)
        made_bytes = sum(v.nbytes for v in outs)
        extra = entry.workspace(call, outs)
        # A view may have to be copied. Backward each output has a gradient, and so has each value
        # that it was made of, whole, though one element was looked at.
        back = [self.values[n] for n in reads if n in self.trained]
        whole = made_bytes + sum(v.nbytes for v in back)
        cost.nbytes += 0 if entry.view else made_bytes
        cost.workspace = max(cost.workspace, extra + trains * whole, entry.view * made_bytes)
        cost.moved += sum(v.numel for v in outs) * (1 + trains) + extra // 4
        cost.moved += sum(v.numel for v in back)
        self._afford(node)

    def _afford(self, node: Node) -> None:
        most = self.limits
        if (
            self.record.nbytes > most.record_bytes
            or self.fixed.nbytes > most.fixed_bytes
            or max(self.record.workspace, self.fixed.workspace) > most.record_bytes
            or max(self.record.flops, self.fixed.flops) > most.flops
            or max(self.record.moved, self.fixed.moved) > most.moved
            or len(self.values) > most.values
        ):
            message = f"At node {node.name!r} the graph needs more memory or work than is admitted."
            _refuse("model.too-large", message, "Make the model smaller.", node.name)


def check(
    graph: Graph,
    weights: Mapping[str, TensorInfo],
    *,
    bounds: Mapping[str, tuple[int, int] | None] | None = None,
    limits: Limits = Limits(),
) -> Checked:
    """Prove what :class:`Checked` says, or raise ``ModelError`` naming the node and the mend.

    ``weights``: what the weights' file holds. ``bounds``: of the integer data inputs, as
    :func:`known_bounds` gives them, and of integer constants; with them every index that is made
    of a record is proved in range, so that no record can raise an error. Without them (``None``:
    there is no schema yet) that proof is left out.

    The proof of independence carries the batch axis through every node (three states suffice, R and
    B here; see casemate.graph.ops.base): the loss of record b, or each output for it, is a function
    of record b and of the weights.
    """
    values = _inputs(graph, weights, bounds, limits)
    walk = _Walk(graph, values, limits)
    for node in graph.nodes:
        walk.node(node)
    parameters = tuple(s.name for s in graph.inputs if s.kind == "param")
    dimension = sum(values[p].numel for p in parameters)
    if graph.outputs:
        _outputs(graph, values)
    else:
        _loss(graph, values, walk)
        if not dimension:
            mend = "Train a tensor that has elements."
            _refuse("model.nothing-trained", "What is trained has no elements.", mend, graph.loss)
    return Checked(
        graph=graph,
        values=values,
        parameters=parameters,
        dimension=dimension,
        flops=walk.record.flops,
        saved_bytes=walk.record.nbytes,
        workspace_bytes=max(walk.record.workspace, walk.fixed.workspace),
        fixed_flops=walk.fixed.flops,
        fixed_bytes=walk.fixed.nbytes,
        frozen_prefix=frozenset(walk.prefix),
        constants=frozenset(walk.constants),
    )


def _loss(graph: Graph, values: Mapping[str, Value], walk: _Walk) -> None:
    """One float32 for each record, that some trained weight has a part in."""
    loss = values.get(graph.loss)
    if loss is None:
        _form(graph.loss[:80], f"The loss {graph.loss[:80]!r} is no value of the graph.")
    if loss.batch != Batch(0) or loss.dims != (1,) or not loss.floating or loss.slot:
        shape = tuple(f"{d.a}*B" if isinstance(d, Size) else d for d in loss.shape)
        message = f"The loss {graph.loss!r} is {loss.dtype} of shape {shape}."
        mend = "Give one float32 loss for each record, shape (B,)."
        _refuse("model.loss", message, mend, graph.loss)
    if graph.loss not in walk.trained:
        mend = "Leave requires_grad on for what is to be trained."
        _refuse("model.nothing-trained", "The loss depends on no trained weight.", mend, graph.loss)


def _outputs(graph: Graph, values: Mapping[str, Value]) -> None:
    """Each with a slice for each record along axis 0; nothing is trained or drawn."""
    if graph.loss or any(s.kind in ("param", "random") for s in graph.inputs):
        _form("outputs", "A graph for prediction has a loss, or an input that is trained or drawn.")
    if len(graph.outputs) > MAX_OUTPUTS:
        mend = f"At most {MAX_OUTPUTS} are admitted."
        _refuse("model.too-large", f"The graph has {len(graph.outputs)} outputs.", mend)
    names: set[str] = set()
    for out in graph.outputs:
        _name("Output", out.name, names)
        found = values.get(out.value)
        if found is None:
            _form(out.name, f"The output {out.name!r} is no value of the graph.")
        if found.batch != Batch(0) or found.dims[0] != 1 or found.slot:
            message = f"The output {out.name!r} does not have one slice for each record on axis 0."
            mend = "Return tensors whose axis 0 is the batch, and nothing that all records share."
            _refuse("model.outputs", message, mend, out.name)
