"""Operations with their operands' states, forward and backward, and what the numbers say of the
proof: a B value's slice is a function of its record, an S value is the sum of what each record
gives alone, R does not change."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch

from casemate.graph import check, joint
from casemate.graph.model import DtypeArg, Graph, InputSpec, ListArg, Node, Ref, Size
from casemate.graph.ops import JOINT, TABLE, Batch, Value, bind
from casemate.spec.errors import ModelError
from support.graphs import DTYPES, interpret
from support.jointgraph import SIZES, note, overload, replay, take
from support.rawgraph import infos

# Operands by which torch has no derivative.
FIXED = {
    "batch_norm": ("running_mean", "running_var"), "instance_norm": ("running_mean", "running_var"),
    "cross_entropy_loss": ("weight",), "nll_loss_nd": ("weight",),
    "binary_cross_entropy_with_logits": ("weight", "pos_weight"), "soft_margin_loss": ("target",),
}  # fmt: skip
NO_GRADIENT = ("floor_divide", "copy")


@dataclasses.dataclass(frozen=True)
class Case:
    """Nodes with the states of what comes in, and numbers for it.

    data: at ``SIZES[1]`` records; other: the same of other records. found: what autograd gives, by
    name. outputs: what the models' table says of the operation's outputs, leaves: the inputs by
    which ``gradients`` are, both for one operation forward and backward.
    """

    name: str
    inputs: Mapping[str, Value]
    nodes: tuple[Node, ...]
    data: Mapping[str, torch.Tensor]
    other: Mapping[str, torch.Tensor]
    found: Mapping[str, torch.Tensor] = dataclasses.field(default_factory=dict)
    outputs: tuple[Value, ...] = ()
    names: tuple[str | None, ...] = ()
    leaves: tuple[str, ...] = ()
    gradients: tuple[str | None, ...] = ()
    seen: frozenset[str] = frozenset()

    def at(self, records: Sequence[int], other: bool = False) -> dict[str, torch.Tensor]:
        held = self.other if other else self.data
        return {k: take(x, self.inputs[k], records) for k, x in held.items()}

    def prove(self) -> Mapping[str, Value]:
        inputs = {**self.inputs, "_loss": Value("f32", (1,), Batch(0))}
        return joint.prove(joint.Joint(inputs, self.nodes, "_loss", ())).values


def _bound(node: Node, batch: int | None) -> tuple[Node, list[str]]:
    """The node with each reference an input of its own; sizes at a fixed batch if one is given."""
    found: list[str] = []

    def walk(arg: Any) -> Any:
        if isinstance(arg, Ref):
            found.append(arg.name)
            return Ref(name=f"a{len(found) - 1}")
        if isinstance(arg, ListArg):
            return ListArg(items=tuple(walk(x) for x in arg.items))
        if isinstance(arg, Size) and batch is not None:
            return arg.a * batch + arg.c
        return arg

    args = tuple(walk(a) for a in node.args)
    kwargs = {k: walk(v) for k, v in node.kwargs.items()}
    return dataclasses.replace(node, args=args, kwargs=kwargs), found


def _values(node: Node, inputs: Mapping[str, Any]) -> tuple[Any, dict[str, Any]]:
    def read(arg: Any) -> Any:
        if isinstance(arg, Ref):
            return inputs[arg.name]
        return tuple(read(x) for x in arg.items) if isinstance(arg, ListArg) else arg

    return tuple(read(a) for a in node.args), {k: read(v) for k, v in node.kwargs.items()}


def _forward(node: Node, inputs: Mapping[str, Value]) -> tuple[Value, ...]:
    """Outputs by the models' table."""
    entry = TABLE[node.op]
    args, kwargs = _values(node, inputs)
    made = entry.rule(bind(entry.schema, node.name, "", args, kwargs))
    return made if isinstance(made, tuple) else (made,)


def _run(node: Node, inputs: Mapping[str, torch.Tensor], batch: int) -> list[torch.Tensor]:
    args, kwargs = _values(node, inputs)

    def plain(arg: Any) -> Any:
        if isinstance(arg, tuple):
            return [plain(x) for x in arg]
        if isinstance(arg, Size):
            return arg.a * batch + arg.c
        if isinstance(arg, DtypeArg):
            return DTYPES[arg.dtype]
        return float(arg) if isinstance(arg, str) and arg in ("inf", "-inf") else arg

    made = overload(node.op)(*(plain(a) for a in args), **{k: plain(v) for k, v in kwargs.items()})
    return [made] if isinstance(made, torch.Tensor) else list(made)


def _case(
    name: str,
    node: Node,
    states: Mapping[str, Value],
    data: Mapping[str, torch.Tensor],
    other: Mapping[str, torch.Tensor],
) -> Case:
    outputs = _forward(node, states)
    short = node.op.split(".")[1]
    params = zip(TABLE[node.op].schema.params, node.args, strict=False)
    fixed = {a.name for p, a in params if p.name in FIXED.get(short, ()) and isinstance(a, Ref)}
    leaves = tuple(
        k for k, v in states.items() if v.floating and k not in fixed and short not in NO_GRADIENT
    )
    inputs, most = dict(states), SIZES[1]
    torch.manual_seed(11)
    cots: dict[str, torch.Tensor] = {}
    others: dict[str, torch.Tensor] = {}
    for k, v in enumerate(outputs):
        if v.floating:
            cots[f"cot{k}"] = torch.randn(v.sizes(most))
            others[f"cot{k}"] = torch.randn(v.sizes(most)) if v.batch else cots[f"cot{k}"]
            inputs[f"cot{k}"] = Value("f32", v.dims, v.batch, summed=v.batch is None)
    held = {**data, **cots}

    def run(given: Mapping[str, torch.Tensor]) -> list[torch.Tensor | None]:
        batch = next((x.shape[v.batch.axis] // v.dims[v.batch.axis] for k, v in inputs.items()
                      if v.batch is not None and (x := given[k]) is not None), 1)  # fmt: skip
        with torch.enable_grad():
            outs = _run(node, given, batch)
        found: list[torch.Tensor | None] = list(outs)
        trained = [k for k, o in enumerate(outs) if o.requires_grad]
        if trained and leaves:
            found += torch.autograd.grad(
                [outs[k] for k in trained], [given[k] for k in leaves],
                [given[f"cot{k}"] for k in trained], allow_unused=True,
            )  # fmt: skip
        return found

    def at(n: int) -> dict[str, torch.Tensor]:
        made = {k: take(x, inputs[k], range(n)).detach().clone() for k, x in held.items()}
        return {k: x.requires_grad_() if k in leaves else x for k, x in made.items()}

    noted = note(run, at)
    found = {
        n: x for n, x in zip(noted.outputs, noted.found, strict=True)
        if n is not None and x is not None
    }  # fmt: skip
    k = len(outputs)
    return Case(
        name, inputs, noted.nodes, held, {**other, **others}, found, outputs, noted.outputs[:k],
        leaves, noted.outputs[k:], noted.seen,
    )  # fmt: skip


def _states(
    node: Node,
    found: list[str],
    values: Mapping[str, Value],
    data: Mapping[str, torch.Tensor],
    other: Mapping[str, torch.Tensor],
) -> Iterator[tuple[str, Node, dict[str, Value], list[torch.Tensor], list[torch.Tensor]]]:
    """The operands as they are, each set of those of records as constants, and all as constants."""
    names = [f"a{i}" for i in range(len(found))]
    of_records = [i for i, n in enumerate(found) if values[n].batch is not None]
    swaps = itertools.chain.from_iterable(
        itertools.combinations(of_records, k) for k in range(len(of_records))
    )
    for swap in swaps if len(of_records) < 4 else [()]:
        given = {names[i]: dataclasses.replace(values[n], data=False) for i, n in enumerate(found)}
        one, two = [data[n] for n in found], [other[n] for n in found]
        for i in swap:
            v = values[found[i]]
            given[names[i]] = Value(v.dtype, v.dims, bounds=v.bounds)
            one[i] = two[i] = take(data[found[i]], v, [0])
        if not any(values[found[i]].slot for i in swap):
            yield "".join("R" if i in swap else "B" for i in of_records), node, given, one, two
    if any(values[n].slot for n in found):
        return
    size = 3
    still, _ = _bound(node, size)
    constant = {
        names[i]: Value(values[n].dtype, values[n].sizes(size), bounds=values[n].bounds)
        for i, n in enumerate(found)
    }
    one = [take(data[n], values[n], range(size)) for n in found]
    yield "constant", still, constant, one, one


def cases(
    g: Graph, nodes: Sequence[Node], values_of: Callable[[InputSpec, int], torch.Tensor]
) -> tuple[Case, ...]:
    """Each of ``nodes`` with its operands in every state that the models' table admits."""
    torch.manual_seed(3)
    checked = check.check(g, infos(g)).values
    weights = {i.tensor: values_of(i, 0) for i in g.inputs if i.kind != "data"}
    weights["sorted"] = weights["sorted"].sort().values
    most = SIZES[1]
    data, other = (
        interpret(g, weights, {i.name: values_of(i, most) for i in g.inputs if i.kind == "data"})
        for _ in range(2)
    )
    out: list[Case] = []
    for node in nodes:
        bound, found = _bound(node, None)
        for tag, form, states, one, two in _states(bound, found, checked, data, other):
            try:
                made = _forward(form, states)
                if tag != "B" * len(tag) and not any(v.floating for v in made):
                    continue  # no gradient flows
                _run(form, dict(zip(states, one, strict=True)), most)
            except (ModelError, RuntimeError):  # torch broadcasts less than the table may think
                assert tag != "B" * len(tag), f"{node.name}: {tag}"
                continue
            pair = [dict(zip(states, x, strict=True)) for x in (one, two)]
            out.append(_case(f"{node.name}:{tag}", form, states, pair[0], pair[1]))
    return tuple(out)


def singles(case: Case) -> Iterator[Case]:
    """Each node of a case by itself, its operands' states and numbers as they are there."""
    values, most = case.prove(), SIZES[1]
    one = replay(case.nodes, case.at(range(most)), most)
    two = replay(case.nodes, case.at(range(most), other=True), most)
    for node in case.nodes:
        form, found = _bound(node, None)
        names = [f"a{i}" for i in range(len(found))]
        yield Case(
            f"{case.name}/{node.op}",
            {k: values[n] for k, n in zip(names, found, strict=True)},
            (form,),
            {k: one[n] for k, n in zip(names, found, strict=True)},
            {k: two[n] for k, n in zip(names, found, strict=True)},
        )


def single(op: str, inputs: Mapping[str, Value], *args: Any, name: str = "", **kwargs: Any) -> Case:
    """One node ``bad`` with operands made up: floats at random, zeros where they are proved to be,
    integers within their bounds."""
    most = SIZES[1]
    gen = torch.Generator().manual_seed(7)

    def made(v: Value) -> torch.Tensor:
        size = v.sizes(most)
        if v.slot:
            return torch.arange(most)
        if v.bounds == (0, 0) or v.dtype == "f32":
            x = torch.randn(size, generator=gen)
            return (x * (v.bounds is None)).to(DTYPES[v.dtype])
        low, high = v.range or (0, 3)
        return torch.randint(low, high + 1, size, generator=gen).to(DTYPES[v.dtype])

    node = Node(name="bad", op=f"aten.{op}", args=args, kwargs=kwargs)
    data = {k: made(v) for k, v in inputs.items()}
    other = {k: made(v) if v.batch is not None else data[k] for k, v in inputs.items()}
    return Case(name or op, inputs, (node,), data, other)


def refolded(case: Case, factor: int, inner: Sequence[bool]) -> Case:
    """The case with the batch of its values folded with one more axis, which stands behind a
    value's records (``inner``, one for each B value) or before them. The sizes grow with it."""

    def grown(arg: Any) -> Any:
        if isinstance(arg, ListArg):
            return ListArg(items=tuple(grown(x) for x in arg.items))
        return Size(a=arg.a * factor, c=arg.c) if isinstance(arg, Size) else arg

    nodes = tuple(
        dataclasses.replace(
            n,
            args=tuple(grown(a) for a in n.args),
            kwargs={k: grown(v) for k, v in n.kwargs.items()},
        )
        for n in case.nodes
    )
    inputs, data, other = dict(case.inputs), dict(case.data), dict(case.other)
    wide = [k for k, v in inputs.items() if v.batch is not None]
    for k, behind in zip(wide, inner, strict=True):
        v, torch_seed = inputs[k], len(k)
        assert v.batch is not None
        b = v.batch
        fold = (
            Batch(b.axis, b.outer, b.inner * factor)
            if behind
            else Batch(b.axis, b.outer * factor, b.inner)
        )
        dims = tuple(d * factor if i == b.axis else d for i, d in enumerate(v.dims))
        inputs[k] = dataclasses.replace(v, dims=dims, batch=fold)
        for held in (data, other):
            held[k] = _wider(held[k], v, factor, behind, torch_seed)
    return dataclasses.replace(
        case, name=f"{case.name}*{factor}", inputs=inputs, nodes=nodes, data=data, other=other,
        found={}, outputs=(), names=(), leaves=(), gradients=(),
    )  # fmt: skip


def _wider(x: torch.Tensor, v: Value, factor: int, behind: bool, seed: int) -> torch.Tensor:
    """``factor`` places for each one of a record, filled from places of other records."""
    assert v.batch is not None
    k, o, i = v.batch.axis, v.batch.outer, v.batch.inner
    gen = torch.Generator().manual_seed(seed)
    n = x.shape[k] // (o * i)
    parts = [take(x, v, torch.randperm(n, generator=gen).tolist()) for _ in range(factor)]
    laid = [p.movedim(k, 0).reshape(o, n, i, *p.movedim(k, 0).shape[1:]) for p in parts]
    y = torch.stack(laid, 3) if behind else torch.stack(laid, 0)
    return y.reshape(-1, *y.shape[4:]).movedim(0, k).contiguous()


def constants(case: Case, size: int = 3) -> Case:
    """The case with every value a constant: the batch is ``size`` and no longer a batch."""

    def fixed(arg: Any) -> Any:
        if isinstance(arg, ListArg):
            return ListArg(items=tuple(fixed(x) for x in arg.items))
        return arg.a * size + arg.c if isinstance(arg, Size) else arg

    nodes = tuple(
        dataclasses.replace(
            n,
            args=tuple(fixed(a) for a in n.args),
            kwargs={k: fixed(v) for k, v in n.kwargs.items()},
        )
        for n in case.nodes
    )
    inputs = {k: Value(v.dtype, v.sizes(size), bounds=v.bounds) for k, v in case.inputs.items()}
    data = case.at(range(size))
    return Case(case.name, inputs, nodes, data, data)


def _lay(parts: Sequence[torch.Tensor], v: Value) -> torch.Tensor:
    """The batch of these records, one after the other."""
    assert v.batch is not None
    k, o, i = v.batch.axis, v.batch.outer, v.batch.inner
    rows = [p.movedim(k, 0).reshape(o, 1, i, *p.movedim(k, 0).shape[1:]) for p in parts]
    y = torch.cat(rows, 1)
    return y.reshape(-1, *y.shape[3:]).movedim(0, k).contiguous()


def close(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Equal up to the rounding of sums in another order."""
    if a.shape != b.shape or a.dtype != b.dtype:
        return False
    if not a.dtype.is_floating_point:
        return torch.equal(a, b)
    return torch.allclose(a, b, rtol=2e-4, atol=2e-4, equal_nan=True)


def _numbers(x: torch.Tensor) -> torch.Tensor:
    return x.nan_to_num(7.25) if x.dtype.is_floating_point else x


def problems(case: Case) -> list[str]:
    """What the proof says and the numbers deny."""
    values, most, third = case.prove(), SIZES[1], 2
    made = [n for n in values if n not in case.inputs and n != "_loss"]
    for n in SIZES:
        run = replay(case.nodes, case.at(range(n)), n)
        here = [k for k in made if k in run]
        for k in here:
            v = values[k]
            if tuple(run[k].shape) != v.sizes(n) or run[k].dtype != DTYPES[v.dtype]:
                return [f"{k} is {run[k].dtype} {tuple(run[k].shape)}, said {v}"]
    out = [
        f"{k} is not what autograd gives"
        for k, x in case.found.items()
        if k in run and not close(run[k], x)
    ]
    ours, others = case.at(range(most)), case.at(range(most), other=True)
    for k, v in case.inputs.items():
        if v.batch is not None and not v.slot:
            records = [take(others[k] if i == third else ours[k], v, [i]) for i in range(most)]
            ours[k] = _lay(records, v)
    two = replay(case.nodes, ours, most)
    alone = [replay(case.nodes, case.at([i]), 1) for i in range(most)]
    sums = any(v.summed for v in case.inputs.values())
    keep = [i for i in range(most) if i != third]
    for k in here:
        v, x = values[k], run[k]
        low, high = v.bounds or (x.min(), x.max()) if x.numel() else (0, 0)
        if x.numel() and (low > x.min() or x.max() > high):
            out.append(f"{k} leaves {v.bounds}")
        if v.summed:
            if not sums and not close(x, torch.stack([a[k] for a in alone]).sum(0)):
                out.append(f"{k} is no sum over the records")
        elif v.batch is None:
            if not torch.equal(_numbers(x), _numbers(two[k])):
                out.append(f"{k} depends on the records")
        elif not close(take(x, v, keep), take(two[k], v, keep)):
            out.append(f"{k} mixes records")
        elif not v.slot and not all(close(take(x, v, [i]), a[k]) for i, a in enumerate(alone)):
            out.append(f"{k} is no function of the record alone")
    return out


def shows(case: Case) -> bool:
    """Whether a bug in the rules shows: in the numbers, in torch, or as a refusal."""
    try:
        return problems(case) != []
    except (
        ModelError, RuntimeError, IndexError, TypeError, ValueError, AssertionError, AttributeError,
        KeyError, ZeroDivisionError,
    ):  # fmt: skip
        return True


def nonlinear(case: Case) -> list[str]:
    """Outputs that are proved S and that are no linear function of the S operands, or zero and that
    are not."""
    node, values = case.nodes[0], case.prove()
    torch.manual_seed(5)
    one, two, both, twice = (dict(case.data) for _ in range(4))
    for k, v in case.inputs.items():
        if v.summed:
            one[k], two[k] = torch.randn(v.dims), torch.randn(v.dims) * 3
            both[k], twice[k] = one[k] + two[k], -2.5 * one[k]
    a, b, c, d = (replay(case.nodes, x, 1) for x in (one, two, both, twice))
    out = []
    for k in [n for n in a if n.partition(".")[0] == node.name]:
        if values[k].floating and values[k].bounds == (0, 0) and any(x[k].any() for x in (a, b)):
            out.append(f"{node.op}: {k} is not zero")
        if not values[k].summed or not a[k].numel():
            continue
        if not a[k].dtype.is_floating_point:
            out.append(f"{node.op}: {k} is rounded")
            continue
        finite = torch.isfinite(a[k]) & torch.isfinite(b[k])
        zero = torch.zeros(())
        pairs = ((c[k], a[k] + b[k]), (d[k], -2.5 * a[k]))
        cut = [[torch.where(finite, x, zero) for x in pair] for pair in pairs]
        if not all(close(x, y) for x, y in cut):
            out.append(f"{node.op}: {k} is not linear")
        if JOINT[node.op].isometric and sum(v.summed for v in case.inputs.values()) == 1:
            (given,) = (x for n, x in one.items() if case.inputs[n].summed)
            moved = [t[t != 0].abs().sort().values for t in (a[k], given)]
            if not torch.equal(*moved):
                out.append(f"{node.op}: {k} does not only move entries")
    return out
