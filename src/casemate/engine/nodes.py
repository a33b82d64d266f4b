"""Running a proved joint graph at one batch size.

Nodes become calls of a :class:`casemate.engine.replay.Replay`; every operation is resolved through
the closed table.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeAlias

import torch

from casemate.engine import layout
from casemate.engine.joint import Noted
from casemate.engine.program import maker, reader, resolve, uses
from casemate.engine.replay import At, Call, Replay
from casemate.graph import joint as graph_joint
from casemate.graph.joint import Proved
from casemate.graph.model import ListArg, Node, Ref
from casemate.graph.ops import JOINT, Value
from casemate.graph.ops.joint import zero

Env: TypeAlias = dict[str, Any]


def to_rows(t: torch.Tensor, v: Value, rows: int) -> torch.Tensor:
    """A B value as (rows, elements of one record)."""
    assert v.batch is not None
    k, b = v.batch.axis, v.batch
    if k == 0 and b.outer == 1:
        return t.reshape(rows, -1)
    before, after = math.prod(v.dims[:k]), math.prod(v.dims[k + 1 :])
    t = t.reshape(before * b.outer, rows, b.inner * after)
    return t.transpose(0, 1).reshape(rows, -1)


def from_rows(flat: torch.Tensor, v: Value) -> torch.Tensor:
    """The inverse of :func:`to_rows`; contiguous."""
    assert v.batch is not None
    rows, k, b = len(flat), v.batch.axis, v.batch
    before, after = math.prod(v.dims[:k]), math.prod(v.dims[k + 1 :])
    t = flat.reshape(rows, before * b.outer, b.inner * after).transpose(0, 1)
    return t.reshape(v.sizes(rows)).contiguous()


def needed(wanted: Sequence[str], more: Sequence[Call]) -> list[str]:
    """What has to be made for ``wanted`` but for what the calls ``more`` make, and for these."""
    made = {o for call in more for o in call.made}
    reads = [r for call in more for r in call.reads]
    return list(dict.fromkeys([*(w for w in wanted if w not in made), *reads]))


# No closure that calls itself: such a cycle would keep a microbatch's values alive.
def mapped(arg: Any, of: Callable[[Any], Any]) -> Any:
    """``of`` of a node's argument, or of each item of a list."""
    return tuple(mapped(a, of) for a in arg.items) if isinstance(arg, ListArg) else of(arg)


class Runner:
    """The nodes of ``proved`` at ``rows`` records. ``constants``: R and B values that come from the
    model at this batch size, by name; ``leaves``: the trained tensors."""

    def __init__(
        self,
        noted: Noted,
        proved: Proved,
        rows: int,
        constants: Mapping[str, torch.Tensor],
        leaves: Sequence[torch.Tensor],
    ) -> None:
        self.noted, self.proved, self.rows = noted, proved, rows
        self.nodes = {n.name: n for n in proved.joint.nodes}
        self.reads = {n.name: uses(n) for n in proved.joint.nodes}
        self.inputs: Env = dict(constants)
        self._trained = {f"p{i}": leaf.detach() for i, leaf in enumerate(leaves)}
        self.inputs |= self._trained
        self.of_batch = {
            n.name
            for n in proved.joint.nodes
            if any(self._value(o).batch is not None for o in self.outs(n))
        }
        self.summed = {maker(n) for n in (*proved.contractions, *proved.linear)}
        self.weights = [
            n
            for n in proved.joint.nodes
            if n.name not in self.of_batch and n.name not in self.summed
        ]
        self._of_weights = self.weights
        self.fixed: Env = {}
        self.last = False
        self._laid: dict[str, torch.Tensor] = {}  # weights with channels last, and as they are
        self._plain: Env = {}
        self.refresh()

    def _value(self, name: str) -> Value:
        return self.proved.values[name]

    def outs(self, node: Node) -> list[str]:
        """Names of a node's outputs."""
        if node.name in self.proved.values:
            return [node.name]
        out, i = [], 0
        while f"{node.name}.{i}" in self.proved.values:
            out.append(f"{node.name}.{i}")
            i += 1
        return out

    def ancestors(self, names: Sequence[str], stop: frozenset[str] = frozenset()) -> set[str]:
        """Nodes that the values are made by, up to the values of ``stop``."""
        seen: set[str] = set()
        todo = [n for n in names if n not in stop]
        while todo:
            node = maker(todo.pop())
            if node in seen or node not in self.nodes:
                continue
            seen.add(node)
            todo += [n for n in self.reads[node] if n not in stop]
        return seen

    def sums_behind(self, names: Sequence[str], stop: frozenset[str] = frozenset()) -> list[Node]:
        """The nodes, in order, from contractions (or the S values of ``stop``) to S values."""
        seen: set[str] = set()
        todo = [n for n in names if n not in stop]
        while todo:
            node = maker(todo.pop())
            if node not in seen:
                seen.add(node)
                todo += [n for n in self.reads[node] if self._value(n).summed and n not in stop]
        return [n for n in self.proved.joint.nodes if n.name in seen]

    def reads_behind(self, names: Sequence[str]) -> tuple[str, ...]:
        """What contractions and linear operations read to make these S values."""
        inside = self.sums_behind(names)
        made = {o for n in inside for o in self.outs(n)}
        return tuple(dict.fromkeys(r for n in inside for r in self.reads[n.name] if r not in made))

    def refresh(self) -> None:
        """Evaluate what depends on the trained tensors alone: once a step."""
        if self.fixed and not (self._of_weights or self._laid):
            return
        env = {**(self.fixed or self.inputs), **self._plain}
        with torch.inference_mode():
            for node in self._of_weights:
                self._store(node, env, self.call(node, env, self.rows))
        if not self.fixed:
            # Views of inputs follow these.
            memory = {t.untyped_storage().data_ptr() for t in self.inputs.values()}
            self._of_weights = [
                n
                for n in self._of_weights
                if any(env[o].untyped_storage().data_ptr() not in memory for o in self.outs(n))
            ]
        self._plain = {name: env[name] for name in self._laid}
        with torch.inference_mode():
            env |= {name: copy.copy_(env[name]) for name, copy in self._laid.items()}
        self.fixed = env

    def lay(self, last: bool) -> None:
        """Run with channels last (:mod:`casemate.engine.layout`), or in order."""
        self.fixed.update(self._plain)
        self.last, self._laid, self._plain = last, {}, {}
        for name in layout.weights(self.proved) if last else ():
            if (copy := layout.laid(self.fixed[name])) is not None:
                self._laid[name] = copy
        self.refresh()

    def operation(self, op: str) -> Callable[..., Any]:
        """What an operation of the closed table is run by."""
        own = resolve(op, JOINT)
        return layout.INSTEAD.get(op, own) if self.last else own

    @staticmethod
    def _store(node: Node, env: Env, made: Any) -> None:
        if isinstance(made, list | tuple):
            env.update({f"{node.name}.{i}": v for i, v in enumerate(made)})
        else:
            env[node.name] = made

    def call(
        self,
        node: Node,
        env: Mapping[str, Any],
        batch: int,
        changed: Mapping[str, Any] | None = None,
    ) -> Any:
        """The node's result at a batch size; ``changed`` replaces arguments by name."""
        args, kwargs = self.arguments(node, env.__getitem__, batch, changed)
        return self.operation(node.op)(*args, **kwargs)

    def arguments(
        self,
        node: Node,
        value: Callable[[str], Any],
        batch: int,
        changed: Mapping[str, Any] | None = None,
    ) -> tuple[list[Any], dict[str, Any]]:
        """What the node's operation is called with, positional and by name; ``value``: what stands
        for the value of a name."""

        def of(arg: Any) -> Any:
            return value(arg.name) if isinstance(arg, Ref) else reader(arg, batch)({})

        args = [mapped(a, of) for a in node.args]
        kwargs = {k: mapped(a, of) for k, a in node.kwargs.items()}
        kwargs.update(self.noted.places.get(node.name, {}))
        if changed:
            names = [p.name for p in graph_joint.entry(node).schema.params]
            for name, made in changed.items():
                at = names.index(name)
                if at < len(args):
                    args[at] = made
                else:
                    kwargs[name] = made
        return args, kwargs

    def without_sums(self, node: Node) -> dict[str, Any]:
        """Arguments that keep a contraction from making its sums beside what records need."""
        return self._masked(node, lambda v: not v.summed)

    def _masked(self, node: Node, wanted: Callable[[Value], bool]) -> dict[str, Any]:
        names = [p.name for p in graph_joint.entry(node).schema.params]
        if "output_mask" not in names:
            return {}
        call = graph_joint.bound(node, self.proved.values)
        mask = [
            bool(on) and wanted(self._value(o))
            for on, o in zip(call["output_mask"], self.outs(node), strict=True)
        ]
        return {"output_mask": mask}

    def order(self, inputs: Sequence[str], wanted: Sequence[str]) -> list[Node]:
        """The nodes of records between two sets of values, in order of execution."""
        inside = self.ancestors(wanted, frozenset(inputs))
        return [n for n in self.proved.joint.nodes if n.name in inside and n.name in self.of_batch]

    # --- one function for the part that is evaluated for each microbatch ---

    def function(
        self,
        inputs: Sequence[str],
        wanted: Sequence[str],
        instead: Mapping[str, Any] | None = None,
        more: Sequence[Call] = (),
    ) -> Callable[..., Sequence[Any]]:
        """``f(fixed, *inputs)`` giving the B values ``wanted``, with nodes up to ``inputs`` left
        out. ``instead``: by node, functions of its operands by name that take its place. more:
        calls on values of records, each made as soon as it can be; what they make may be wanted."""
        order = self.order(inputs, needed(wanted, more))
        calls = [self.as_call(n, instead or {}) for n in order]
        return self.replayed(calls, inputs, wanted, more)

    def as_call(self, node: Node, instead: Mapping[str, Any]) -> Call:
        outs = self.outs(node)
        made = outs[0] if outs == [node.name] else outs
        if node.name in instead:
            names = list(dict.fromkeys(uses(node)))
            return Call(_by_name(instead[node.name], names), [At(n) for n in names], {}, made)
        args, kwargs = self.arguments(node, At, self.rows, self.without_sums(node))
        op = self.operation(node.op)
        return Call(getattr(op, "_op", op), args, kwargs, made)

    def replayed(
        self,
        calls: Sequence[Call],
        inputs: Sequence[str],
        wanted: Sequence[str],
        more: Sequence[Call] = (),
    ) -> Callable[..., Sequence[Any]]:
        """``f(fixed, *inputs)`` giving the values ``wanted``; more: as of :meth:`function`."""
        after = {o: i for i, call in enumerate(calls) for o in call.made}
        then: list[list[Call]] = [[] for _ in range(len(calls) + 1)]
        for call in more:
            then[1 + max((after.get(r, -1) for r in call.reads), default=-1)].append(call)
        calls = [*then[0], *(c for a, b in zip(calls, then[1:], strict=True) for c in (a, *b))]
        made = {*inputs, *(o for c in calls for o in c.made)}
        outside = list(dict.fromkeys(r for c in calls for r in c.reads if r not in made))
        replay = Replay(calls, [*outside, *inputs], wanted)
        return lambda fixed, *given: replay([*map(fixed.__getitem__, outside), *given])

    # --- one record at a time ---

    def looped(self, name: str, shape: Any) -> Callable[[Env], torch.Tensor]:
        """An S value's term of every unit, (units, elements) float32: its contractions and what
        follows them evaluated one record at a time, each in the same buffers."""
        inside = self.sums_behind([name])
        reads = self.reads_behind([name])
        of_records = [r for r in reads if self._value(r).batch is not None]
        masks = {n.name: self._masked(n, lambda v: v.summed) for n in inside}
        size = math.prod(self._value(name).dims)

        def form(env: Env) -> torch.Tensor:
            out = torch.empty(self.rows, size)
            one: Env = {**self.fixed, **{r: env[r] for r in reads if r not in of_records}}
            flat = {}
            for r in of_records:
                flat[r] = to_rows(env[r], self._value(r), self.rows)
                one[r] = torch.empty(self._value(r).sizes(1), dtype=env[r].dtype)
            for i in range(self.rows):
                for r in of_records:
                    one[r].copy_(from_rows(flat[r][i : i + 1], self._value(r)))
                for node in inside:
                    self._store(node, one, self.call(node, one, 1, masks[node.name]))
                out[i].copy_(one[name].reshape(-1))
            if shape.per_unit > 1:
                return out.reshape(shape.units, shape.per_unit, -1).sum(1)
            return out

        return form

    def placement(self, contraction: str, chain: Sequence[Node]) -> torch.Tensor | None:
        """Where each entry of a contraction lands in what the chain makes of it, flat int64;
        ``None`` unless each lands once, as it is, with zeros elsewhere.

        By the closed table no node of the chain sends an entry to two places, or changes it where
        it lands alone; so numbers that come out once each show where they landed. Of other linear
        maps they show nothing, nor of one that follows trained weights.
        """
        dims = self._value(contraction).dims
        count = math.prod(dims)
        value = torch.arange(1, count + 1, dtype=torch.float64).reshape(dims)
        at = contraction
        for node in chain:
            entry = graph_joint.entry(node)
            if entry.isometric or (entry.scatters and self._same_always(node, at)):
                zeros = {n: self.fixed[n].double() for n in uses(node)
                         if n != at and self._value(n).floating}  # fmt: skip
                value = self.call(node, {**self.fixed, **zeros, at: value}, self.rows)
            elif not self._adds(node, at):
                return None
            at = node.name
        flat = value.reshape(-1)
        landed = torch.nonzero(flat).reshape(-1)
        numbers = flat[landed]
        if numbers.numel() != count or not torch.equal(
            numbers.sort().values, torch.arange(1, count + 1, dtype=torch.float64)
        ):
            return None
        return landed[numbers.argsort()]

    def _adds(self, node: Node, at: str) -> bool:
        """Whether a node is the S value ``at``, once, plus another of the same shape."""
        if node.op != "aten.add.Tensor":
            return False
        call = graph_joint.bound(node, self.proved.values)
        same = {self._value(n).dims for n in uses(node)} == {self._value(at).dims}
        return call["alpha"] == 1 and uses(node).count(at) == 1 and same

    def _same_always(self, node: Node, at: str) -> bool:
        """Whether what a node reads beside ``at`` is 0, or depends on no trained tensor."""
        beside = [n for n in uses(node) if n != at]
        behind = self.ancestors([n for n in beside if not zero(self._value(n))])
        reads = {*beside, *(r for n in behind for r in self.reads[n])}
        return len(beside) + 1 == len(uses(node)) and reads.isdisjoint(self._trained)


def _by_name(f: Callable[[Mapping[str, Any]], Any], names: Sequence[str]) -> Callable[..., Any]:
    return lambda *values: f(dict(zip(names, values, strict=True)))
