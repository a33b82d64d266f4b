"""The joint graph of forward and backward, as torch runs it below autograd.

The operations of the gradient are noted at two batch sizes; whatever integer differs between them
is affine in the batch. The result is a graph of its own in the format of
:mod:`casemate.graph.model`, free of torch, on which :mod:`casemate.graph.joint` proves what each
value is before anything is run from it.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Final

import torch

from casemate.engine.program import DTYPES, Program, maker, uses
from casemate.engine.tape import Log, Unfit, memory, random
from casemate.graph.joint import Joint
from casemate.graph.model import DtypeArg, Graph, ListArg, Node, Ref, Size
from casemate.graph.ops import Batch, Value
from casemate.graph.ops.base import PLACE_NAMES

BATCHES: Final = (2, 3)
SEED: Final = "seed"
_NAMES: Final = {dtype: name for name, dtype in DTYPES.items()}
_PLACES: Final = (torch.layout, torch.device, torch.memory_format, torch.Generator)
# In-place operations whose other form is not the same name without the underscore.
_OTHER_FORM: Final = {
    "aten.transpose_.default": "aten.transpose.int",
    "aten.squeeze_.dim": "aten.squeeze.dim",
    "aten.zero_.default": "aten.zeros_like.default",
    # Memory that autograd writes before it reads.
    "aten.empty_like.default": "aten.zeros_like.default",
}


@dataclass(frozen=True, slots=True)
class Noted:
    """joint: the graph. Its inputs: ``d0``... the data in the order of ``Program.data``, ``p0``...
    the trained tensors, those of ``constants`` with their names in the program, and :data:`SEED`,
    (B,), by which each record's loss is multiplied before the gradient is taken.

    places: of each node, arguments on layout and memory that the graph's format leaves out.
    frontier: the values, in the order of ``Program.frontier``, that need no trained tensor.
    """

    joint: Joint
    places: Mapping[str, Mapping[str, Any]]
    frontier: tuple[str, ...]
    constants: Mapping[str, str]


@contextmanager
def _cells() -> Iterator[None]:
    """Without oneDNN, not by torch.backends: those warn of what they leave alone."""
    before = torch._C._get_mkldnn_enabled()
    torch._C._set_mkldnn_enabled(False)
    try:
        yield
    finally:
        torch._C._set_mkldnn_enabled(before)


class _Run:
    """One noting: names of tensors by identity, and which are stale since written over."""

    def __init__(self, program: Program, record: Mapping[str, torch.Tensor]) -> None:
        self.names: dict[int, str] = {}
        self.alive: list[Any] = []
        self.stale: set[int] = set()
        self.by_storage: dict[int, list[torch.Tensor]] = {}
        data = {spec.name: record[spec.name] for spec in program.data}
        for i, v in enumerate(data.values()):
            self.add(v, f"d{i}")
        for i, v in enumerate(program.leaves):
            self.add(v, f"p{i}")
        self.constants: dict[str, str] = {}
        for i, (name, v) in enumerate(program.constant.items()):
            if isinstance(v, torch.Tensor):
                self.add(v, f"c{i}")
                self.constants[f"c{i}"] = name
        log = Log()
        # Fused recurrent layers hide their contractions; the cells do not.
        with _cells(), log:
            self.frontier = program.prefix(data)
            self.loss = program.loss(self.frontier)
            self.found = program.gradients_of(self.loss)
        self.entries = log.entries
        self.alive += [log.entries, data]

    def add(self, value: torch.Tensor, name: str) -> None:
        self.names[id(value)] = name
        self.stale.discard(id(value))
        self.alive.append(value)
        self.by_storage.setdefault(memory(value), []).append(value)

    def name(self, value: torch.Tensor) -> str:
        if id(value) not in self.names:
            raise Unfit("a tensor was made out of sight")
        if id(value) in self.stale:
            raise Unfit("a tensor is read after another one on its memory was written")
        return self.names[id(value)]

    def written(self, value: torch.Tensor) -> None:
        """Values on the same memory are not what they were."""
        for other in self.by_storage.get(memory(value), []):
            if other is not value and _overlap(other, value):
                self.stale.add(id(other))


def _overlap(a: torch.Tensor, b: torch.Tensor) -> bool:
    def places(v: torch.Tensor) -> torch.Tensor:
        size = v.untyped_storage().nbytes() // max(1, v.element_size())
        grid = torch.zeros(size, dtype=torch.bool)
        grid.as_strided(v.size(), v.stride(), v.storage_offset()).fill_(True)
        return grid

    if a.dtype != b.dtype:
        return True
    return bool((places(a) & places(b)).any())


def _pair(x: Any, y: Any, first: _Run, second: _Run) -> Any:
    """One argument of both notings in the graph's format."""
    if type(x) is not type(y):
        raise Unfit("an argument changes its kind with the batch")
    if isinstance(x, torch.Tensor):
        name = first.name(x)
        if second.name(y) != name:
            raise Unfit("the order of operations changes with the batch")
        return Ref(name=name)
    if isinstance(x, list | tuple):
        if len(x) != len(y):
            raise Unfit("a list changes its length with the batch")
        return ListArg(items=tuple(_pair(a, b, first, second) for a, b in zip(x, y, strict=True)))
    if isinstance(x, torch.dtype):
        if x not in _NAMES or x is not y:
            raise Unfit(f"the dtype {x} has no rule")
        return DtypeArg(dtype=_NAMES[x])
    if type(x) is int and x != y:
        low, high = BATCHES
        a, rest = divmod(y - x, high - low)
        if rest or a < 1:
            raise Unfit("a size is not affine in the batch")
        return Size(a=a, c=x - a * low)
    if isinstance(x, float) and math.isinf(x) and x == y:
        return "inf" if x > 0 else "-inf"
    if x != y:
        raise Unfit("a number changes with the batch")
    return x


def _form(func: Any) -> str:
    """The op's name, of its form that writes nothing."""
    full = str(func)
    if full in _OTHER_FORM:
        return _OTHER_FORM[full]
    space, name, overload = full.split(".")
    return f"{space}.{name.removesuffix('_')}.{overload}" if name[-1] == "_" else full


def _split(func: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> tuple[Any, Any, Any]:
    """Positional and named arguments, and those on place and layout, as the schema names them."""
    plain: list[Any] = []
    named: dict[str, Any] = {}
    places: dict[str, Any] = {}
    schema = func._schema.arguments
    given = {a.name: v for a, v in zip(schema, args, strict=False)} | dict(kwargs)
    for argument in schema:
        name = argument.name
        if name not in given:
            continue
        value = given[name]
        if name in PLACE_NAMES or isinstance(value, _PLACES):
            if value is not None and not isinstance(value, torch.device):
                places[name] = value
        elif argument.kwarg_only or len(plain) < _before(schema, name):
            named[name] = value
        else:
            plain.append(value)
    return plain, named, places


def _before(schema: Sequence[Any], name: str) -> int:
    """How many positional arguments stand before ``name``."""
    return next(i for i, a in enumerate(schema) if a.name == name)


def note(graph: Graph, values: Mapping[str, Value], programs: Sequence[Program],
         records: Sequence[Mapping[str, torch.Tensor]]) -> Noted:  # fmt: skip
    """Note the gradient of ``graph`` at the two :data:`BATCHES`.

    values: what :func:`casemate.graph.check.check` proved of it. Raises ``Unfit`` where the
    operations depend on the batch in a way that the format cannot say, or cannot be replayed.
    """
    first, second = (_Run(p, r) for p, r in zip(programs, records, strict=True))
    program = programs[0]
    inputs = {f"d{i}": values[spec.name] for i, spec in enumerate(program.data)}
    inputs |= {f"p{i}": values[spec.name] for i, spec in enumerate(program.trained)}
    inputs |= {key: values[name] for key, name in first.constants.items()}
    inputs[SEED] = Value("f32", (1,), Batch(0))
    if len(first.entries) != len(second.entries):
        raise Unfit("the number of operations changes with the batch")
    if not all(isinstance(v, torch.Tensor) for v in first.frontier):
        raise Unfit("a value that is no tensor crosses the frontier")
    nodes: list[Node] = []
    places: dict[str, Mapping[str, Any]] = {}
    loss = ""
    sums: set[int] = (
        set()
    )  # identities of the losses' sum and of the ones that autograd starts from
    seeded = False
    for (func, args, kwargs, out), (func2, args2, kwargs2, out2) in zip(
        first.entries, second.entries, strict=True
    ):
        if func is not func2:
            raise Unfit("the order of operations changes with the batch")
        if random(func, args, kwargs):
            raise Unfit(f"{func} cannot be replayed")
        if func is torch.ops.aten.detach.default and id(args[0]) in sums:
            sums.add(id(out))
            continue
        if func is torch.ops.aten.detach.default:
            first.add(out, first.name(args[0]))
            second.add(out2, second.name(args2[0]))
            continue
        if not loss and args and args[0] is first.loss and func is torch.ops.aten.sum.default:
            loss = first.name(first.loss)
            sums.add(id(out))
        elif loss and not seeded and func is torch.ops.aten.ones_like.default:
            if id(args[0]) not in sums:
                raise Unfit("the gradient does not start at the losses")
            sums.add(id(out))
        elif sums and args and id(args[0]) in sums:
            if func is not torch.ops.aten.expand.default or seeded:
                raise Unfit("the gradient does not start at the losses")
            first.add(out, SEED)
            second.add(out2, SEED)
            seeded = True
        else:
            node = _node(f"v{len(nodes)}", func, (args, args2), (kwargs, kwargs2),
                         first, second, places)  # fmt: skip
            nodes += _as_matrices(node) if func is torch.ops.aten.mv.default else (node,)
            _outputs(nodes[-1].name, func, (args, args2), (out, out2), first, second)
    if not seeded:
        raise Unfit("the gradient does not start at the losses")
    gradients = []
    for g, h in zip(first.found, second.found, strict=True):
        gradients.append(None if g is None or h is None else _pair(g, h, first, second).name)
    frontier = tuple(first.name(v) for v in first.frontier)
    kept = _read(nodes, [loss, *frontier, *(g for g in gradients if g is not None)])
    return Noted(
        joint=Joint(inputs, kept, loss, tuple(gradients)),
        places={n.name: places[n.name] for n in kept if n.name in places},
        frontier=frontier,
        constants=first.constants,
    )


def _as_matrices(node: Node) -> tuple[Node, ...]:
    """``mv`` as ``mm``, whose sum over records has a site; the result is the last node."""
    left, right = node.args
    at = int(node.name[1:])
    names = [Ref(name=f"v{at + i}") for i in range(3)]
    return (
        Node(name=names[0].name, op="aten.unsqueeze.default", args=(right, 1), kwargs={}),
        Node(name=names[1].name, op="aten.mm.default", args=(left, names[0]), kwargs={}),
        Node(name=names[2].name, op="aten.squeeze.dim", args=(names[1], 1), kwargs={}),
    )


def _read(nodes: Sequence[Node], wanted: Sequence[str]) -> tuple[Node, ...]:
    """The nodes that the values come of: what nothing reads needs no proof."""
    names = {maker(n) for n in wanted}
    kept = []
    for node in reversed(nodes):
        if node.name in names:
            names.update(maker(n) for n in uses(node))
            kept.append(node)
    return tuple(reversed(kept))


def _node(
    name: str,
    func: Any,
    args: tuple[Any, Any],
    kwargs: tuple[Any, Any],
    first: _Run,
    second: _Run,
    places: dict[str, Mapping[str, Any]],
) -> Node:
    plain, named, place = _split(func, args[0], kwargs[0])
    plain2, named2, _ = _split(func, args[1], kwargs[1])
    if len(plain) != len(plain2) or named.keys() != named2.keys():
        raise Unfit("the arguments change with the batch")
    if place:
        places[name] = place
    return Node(
        name=name,
        op=_form(func),
        args=tuple(_pair(x, y, first, second) for x, y in zip(plain, plain2, strict=True)),
        kwargs={k: _pair(named[k], named2[k], first, second) for k in named},
    )


def _outputs(
    name: str,
    func: Any,
    args: tuple[Any, Any],
    outs: tuple[Any, Any],
    first: _Run,
    second: _Run,
) -> None:
    several = isinstance(outs[0], list | tuple)
    for run, given, out in zip((first, second), args, outs, strict=True):
        if func._schema.is_mutable:
            if several or out is not given[0]:
                raise Unfit(f"{func} writes to what it does not give back")
            if run.names[id(out)][0] in "dpcs":
                raise Unfit(f"{func} writes to what must stay")
            run.written(out)
        for i, value in enumerate(out if several else (out,)):
            if isinstance(value, torch.Tensor):
                run.add(value, f"{name}.{i}" if several else name)
