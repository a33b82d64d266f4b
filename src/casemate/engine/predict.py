"""Running a graph for prediction: a forward pass and nothing else.

No machine code is made once a worker is locked, so that a pass has one of few numbers of records,
each run once before (oneDNN makes its kernels then). Calls do not share a pass, unless the deployer
asks for it: then every pass has one number of records, its slots, and each kernel is tried on this
machine, at the very shapes, for whether it gives a record the same bits in every slot and whatever
the others hold (:mod:`casemate.engine.probe`, rule P13). A model has no say in what it is tried on.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Final, TypeAlias

import torch

from casemate.engine import probe, trials
from casemate.engine.joint import Noted
from casemate.engine.nodes import Runner
from casemate.engine.program import DTYPES, reader, resolve
from casemate.graph.check import Checked
from casemate.graph.joint import Joint, Proved
from casemate.graph.model import Graph, InputSpec, ListArg, Node, Ref, Size
from casemate.spec.errors import ModelError
from casemate.spec.serving import TensorSpec

Tensors: TypeAlias = dict[str, torch.Tensor]
Pass: TypeAlias = Callable[[Sequence[torch.Tensor]], Sequence[torch.Tensor]]

# A pass may be this much larger than what it is for, before it is cut in two.
_FULL: Final = 0.75


def require_outputs(graph: Graph) -> None:
    """Raises ``ModelError`` ``model.outputs`` for a graph that is for training."""
    if not graph.outputs:
        raise ModelError(
            "model.outputs",
            "The model is made for training: it gives losses and no outputs.",
            mend="Deploy the module, or pack it with casemate model export --input.",
        )


def specs(graph: Graph, checked: Checked) -> tuple[tuple[TensorSpec, ...], tuple[TensorSpec, ...]]:
    """What a prediction takes and gives, by record."""
    taken = [s for s in graph.inputs if s.kind == "data"]
    given = [(o.name, checked.values[o.value]) for o in graph.outputs]
    return (
        tuple(_spec(s) for s in taken),
        tuple(TensorSpec(name=n, dtype=_dtype(v.dtype), shape=v.dims[1:]) for n, v in given),
    )


def _spec(s: InputSpec) -> TensorSpec:
    shape = tuple(d for d in s.shape[1:] if isinstance(d, int))
    return TensorSpec(name=s.name, dtype=_dtype(s.dtype), shape=shape, low=s.low, high=s.high)


def _dtype(name: str) -> Any:
    return name


def sizes(most: int) -> list[int]:
    """The numbers of records that passes have, ascending: powers of two, and ``most``."""
    found = [1]
    while 2 * found[-1] < most:
        found.append(2 * found[-1])
    return found if found[-1] == most else [*found, most]


def parts(count: int, admitted: Sequence[int]) -> Iterator[tuple[int, int]]:
    """How ``count`` records are cut: (records, size of the pass); of a pass that could be smaller
    at most a quarter is empty."""
    while count:
        enough = next((s for s in admitted if s >= count), admitted[-1])
        smaller = [s for s in admitted if s <= count]
        if smaller and count < _FULL * enough:
            enough = smaller[-1]
        taken = min(count, enough)
        yield taken, enough
        count -= taken


class Forward:
    """A checked graph's outputs as a function of its inputs, for at most ``records`` of them in a
    pass. ``slots``: records of every pass where calls share one, else 1."""

    def __init__(
        self, graph: Graph, checked: Checked, weights: Mapping[str, torch.Tensor], records: int
    ) -> None:
        self._graph, self._checked = graph, checked
        self._inputs = [s for s in graph.inputs if s.kind == "data"]
        self._outputs = [o.name for o in graph.outputs]
        self._fixed = {s.name: weights[s.tensor] for s in graph.inputs if s.kind == "frozen"}
        self._constants()
        self.slots = 1
        layers = [n for n in graph.nodes if n.op == "aten.linear.default" and not n.kwargs]
        dense = {n.name: _dense(n) for n in layers}
        self._passes = {size: self._pass(self._runner(size), dense) for size in sizes(records)}

    # Building.

    def _constants(self) -> None:
        """Add what neither a record nor the size of a pass has a part in: made once for all."""
        with torch.inference_mode():
            for node in self._graph.nodes:
                leaves = list(_leaves(node))
                sized = any(isinstance(a, Size) for a in leaves)
                reads = {a.name for a in leaves if isinstance(a, Ref)}
                if (
                    sized
                    or not reads <= self._fixed.keys()
                    or (node.name not in self._checked.constants)
                ):
                    continue
                args = [reader(a, 1)(self._fixed) for a in node.args]
                kwargs = {k: reader(a, 1)(self._fixed) for k, a in node.kwargs.items()}
                made = resolve(node.op)(*args, **kwargs)
                if isinstance(made, list | tuple):
                    self._fixed |= {f"{node.name}.{i}": v for i, v in enumerate(made)}
                else:
                    self._fixed[node.name] = made

    def _runner(self, size: int) -> Runner:
        known = {n.partition(".")[0] for n in self._fixed}
        nodes = tuple(n for n in self._graph.nodes if n.name not in known)
        values = self._checked.values
        joint = Joint({s.name: values[s.name] for s in self._graph.inputs}, nodes, "", ())
        noted = Noted(joint, {}, (), {})
        return Runner(noted, Proved(joint, values, {}, {}), size, self._fixed, ())

    def _pass(self, runner: Runner, instead: Mapping[str, Any]) -> Pass:
        """The graph at one number of records; what nothing reads is left out."""
        run = runner.function(
            [s.name for s in self._inputs], [o.value for o in self._graph.outputs], instead
        )
        return lambda given: run(runner.fixed, *given)

    # Running.

    def __call__(self, given: Mapping[str, torch.Tensor], count: int) -> Tensors:
        """The outputs for ``count`` records, ``given`` by input with axis 0 the record. Raises
        ``ModelError`` ``model.run``."""
        found: list[Sequence[torch.Tensor]] = []
        at = 0
        with torch.inference_mode():
            for taken, size in parts(count, list(self._passes)):
                rows = [_rows(given[s.name], at, taken, size) for s in self._inputs]
                found.append([out[:taken] for out in self._run(size, rows)])
                at += taken
            whole = found[0] if len(found) == 1 else map(torch.cat, zip(*found, strict=True))
            return dict(zip(self._outputs, whole, strict=True))

    def _run(self, size: int, rows: Sequence[torch.Tensor]) -> Sequence[torch.Tensor]:
        try:
            return self._passes[size](rows)
        except (RuntimeError, IndexError, ValueError, TypeError) as e:
            raise ModelError(
                "model.run",
                f"The model fails on these inputs: {' '.join(str(e).split())[:200]}.",
                mend="Check it on the same inputs on your machine.",
            ) from None

    # Before the lock.

    def samples(self, count: int) -> Tensors:
        """Made-up records within what the inputs admit."""
        drawn = torch.Generator().manual_seed(0)  # tries kernels, guards nothing
        out = {}
        for s in self._inputs:
            shape = (count, *(d for d in s.shape[1:] if isinstance(d, int)))
            if s.dtype == "f32":
                out[s.name] = torch.randn(shape, generator=drawn)
            else:
                low, high = (0, 1) if s.low is None or s.high is None else (s.low, s.high)
                whole = torch.randint(low, high + 1, shape, generator=drawn)
                out[s.name] = whole.to(DTYPES[s.dtype])
        return out

    def warm(self) -> None:
        """Run a pass of each size, twice: kernels are chosen, compiled and kept. ``ModelError``."""
        for size in self._passes:
            given = self.samples(size)
            with torch.inference_mode():
                for _ in range(2):
                    self._run(size, [given[s.name] for s in self._inputs])

    def share(self, slots: int) -> int:
        """From now on every pass has ``slots`` records, if each kernel gives a record the same bits
        in every slot; else passes stay as they are. The slots of a pass. Raises ``ModelError``."""
        runner = self._runner(slots)
        instead = {}
        tried = probe.prober(runner)
        env: dict[str, Any] = {**runner.fixed, **self.samples(slots)}
        wanted = [o.value for o in self._graph.outputs]
        try:
            with torch.inference_mode():
                for node in runner.order([s.name for s in self._inputs], wanted):
                    made = runner.call(node, env, slots)
                    several = isinstance(made, list | tuple)
                    env.update(zip(runner.outs(node), made if several else [made], strict=True))
                    if (found := tried(node, env)) is not None:
                        instead[node.name], one_by_one = found
                        if one_by_one:  # no pass would be saved
                            return self.slots
        except (RuntimeError, IndexError, ValueError, TypeError):
            return self.slots  # the pass itself says what fails
        finally:
            trials.forget()
        self.slots, self._passes = slots, {slots: self._pass(runner, instead)}
        return slots


def _dense(node: Node) -> Callable[[Mapping[str, Any]], Any]:
    """A linear layer on its input laid densely: of one that is not, with three axes or more, torch
    makes a product for each of the first, which takes twice as long as one for all."""
    names = [a.name if isinstance(a, Ref) else "" for a in node.args]
    x, w, b = (*names, "")[:3]

    def run(values: Mapping[str, Any]) -> Any:
        bias = values[b] if b else None
        return torch.ops.aten.linear.default(values[x].contiguous(), values[w], bias)

    return run


def _leaves(node: Node) -> Iterator[Any]:
    for arg in (*node.args, *node.kwargs.values()):
        yield from arg.items if isinstance(arg, ListArg) else (arg,)


def _rows(given: torch.Tensor, at: int, count: int, size: int) -> torch.Tensor:
    """``count`` records from ``at`` on, and zeros up to ``size``."""
    rows = given[at : at + count]
    if count == size:
        return rows
    return torch.cat([rows, torch.zeros(size - count, *rows.shape[1:], dtype=rows.dtype)])
