"""Running a graph in torch, one record per call.

Rule P13 asks that a record's contribution be bit-identical whatever else is sampled. Kernels over a
batch do not promise it (docs/engine.md), so here each call sees one record, at batch 1, in the same
buffers, with one thread: nothing of another record is in reach. Operations are resolved only
through the closed table of ``graph.ops``; a name that is not in it is never looked up in torch.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any, Final, TypeAlias

import torch

from casemate.engine.tape import Tape, Unfit
from casemate.graph.model import DtypeArg, Graph, InputSpec, ListArg, Node, Ref, Size
from casemate.graph.ops import TABLE
from casemate.spec.errors import ModelError

DTYPES: Final[dict[str, torch.dtype]] = {
    "bool": torch.bool,
    "u8": torch.uint8,
    "i32": torch.int32,
    "i64": torch.int64,
    "f32": torch.float32,
}

Values: TypeAlias = dict[str, Any]
Read: TypeAlias = Callable[[Values], Any]


def size_at(size: int | Size, batch: int = 1) -> int:
    return size if isinstance(size, int) else size.a * batch + size.c


def _one_hot(index: torch.Tensor, count: int) -> torch.Tensor:
    return (index.unsqueeze(-1) == torch.arange(count)).to(torch.int64)


def _in_order(made: torch.Tensor) -> torch.Tensor:
    """The same, with a gradient that is contiguous. torch 2.13's ``native_batch_norm_backward``
    reads one that is permuted as if it were not, at some layouts, and gives wrong numbers."""
    return made.reshape(-1).reshape(made.shape)


def _instance_norm(x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
    return _in_order(torch.ops.aten.instance_norm.default(x, *args, **kwargs))


def _batch_norm(x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
    return _in_order(torch.ops.aten.batch_norm.default(x.contiguous(), *args, **kwargs))


# Instead of torch's own. one_hot looks at the values to raise an error that the proof excludes.
_INSTEAD: Final[dict[str, Callable[..., Any]]] = {
    "aten.one_hot.default": _one_hot,
    "aten.instance_norm.default": _instance_norm,
    "aten.batch_norm.default": _batch_norm,
}


def resolve(op: str, table: Collection[str] = TABLE) -> Callable[..., Any]:
    """The torch overload of an op in the closed table; ``ModelError`` for any other name."""
    if op not in table:
        raise ModelError(
            "model.op",
            f"The operation {op[:80]!r} is not in the closed table.",
            mend="Express it with supported operations.",
            where=op[:80],
        )
    if op in _INSTEAD:
        return _INSTEAD[op]
    namespace, name, overload = op.split(".")
    found: Callable[..., Any] = getattr(getattr(getattr(torch.ops, namespace), name), overload)
    return found


def reader(arg: object, batch: int) -> Read:
    """A function from the values so far to the argument."""
    if isinstance(arg, Ref):
        return lambda values: values[arg.name]
    if isinstance(arg, ListArg):
        items = [reader(item, batch) for item in arg.items]
        return lambda values: [item(values) for item in items]
    constant: object = arg
    if isinstance(arg, Size):
        constant = size_at(arg, batch)
    elif isinstance(arg, DtypeArg):
        constant = DTYPES[arg.dtype]
    elif arg in ("inf", "-inf"):  # as graphs write scalars that JSON has no number for
        constant = float(str(arg))
    return lambda values: constant


def _names(arg: object) -> list[str]:
    if isinstance(arg, Ref):
        return [arg.name]
    return [n for item in arg.items for n in _names(item)] if isinstance(arg, ListArg) else []


def maker(name: str) -> str:
    """The node or input that makes a value: ``n`` for ``n`` and for ``n.1``."""
    return name.partition(".")[0]


def uses(node: Node) -> list[str]:
    """Names of the values that a node reads."""
    return [n for arg in (*node.args, *node.kwargs.values()) for n in _names(arg)]


class _Call:
    """A node made ready to run."""

    def __init__(self, node: Node, batch: int) -> None:
        self.node = node
        self.op = resolve(node.op)
        self.args = [reader(a, batch) for a in node.args]
        self.kwargs = {k: reader(a, batch) for k, a in node.kwargs.items()}

    def __call__(self, values: Values) -> None:
        args = [a(values) for a in self.args]
        kwargs = {k: a(values) for k, a in self.kwargs.items()}
        made = self.op(*args, **kwargs)
        if isinstance(made, list | tuple):
            values.update({f"{self.node.name}.{i}": v for i, v in enumerate(made)})
        else:
            values[self.node.name] = made


def _line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0][:200]


class Program:
    """A checked graph with its weights, ready to give per-record gradients.

    ``flat`` holds all trained scalars, float32 (d,), in the order of ``trained``. Nodes fall into
    three: those that depend on no data and no trained weight (``constants``, run once here), those
    that depend on no trained weight and on nothing random (the frozen prefix, whose results can be
    kept per record), and the rest. ``frontier`` names the values that the rest takes from records:
    ``lasting`` ones, data inputs and prefix results, and then random inputs.
    """

    def __init__(self, graph: Graph, weights: Mapping[str, torch.Tensor], batch: int = 1) -> None:
        self.graph, self.batch = graph, batch
        # What each record has a value of: the columns' inputs, and those drawn for it.
        self.data: list[InputSpec] = [i for i in graph.inputs if i.kind in ("data", "random")]
        self.random: list[InputSpec] = [i for i in graph.inputs if i.kind == "random"]
        self.trained: list[InputSpec] = [i for i in graph.inputs if i.kind == "param"]
        if not self.trained:
            raise ModelError(
                "model.nothing-trained",
                "No parameter of the model is trained.",
                mend="Leave requires_grad on for what the job shall train.",
            )
        self.flat = torch.cat([weights[i.tensor].reshape(-1) for i in self.trained]).contiguous()
        self.dimension = self.flat.numel()
        self.constant: Values = {
            i.name: weights[i.tensor] for i in graph.inputs if i.kind == "frozen"
        }
        self.leaves = self._views(self.flat)
        named = zip((i.tensor for i in self.trained), self.leaves, strict=True)
        self.weights = {**weights, **{name: leaf.detach() for name, leaf in named}}
        self._tape: Tape | None = None
        self._split()

    def _views(self, flat: torch.Tensor) -> list[torch.Tensor]:
        views, at = [], 0
        for spec in self.trained:
            shape = [size_at(s) for s in spec.shape]
            count = 1
            for side in shape:
                count *= side
            # Leaves of autograd that share memory with the flat vector.
            views.append(flat[at : at + count].view(shape).detach().requires_grad_())
            at += count
        return views

    def _split(self) -> None:
        of_data = {i.name for i in self.data if i.kind == "data"}
        changing = {i.name for i in (*self.trained, *self.random)}
        constants: list[_Call] = []
        prefix: list[_Call] = []
        rest: list[_Call] = []
        for node in self.graph.nodes:
            reads = {maker(name) for name in uses(node)}
            if reads & changing:
                changing.add(node.name)
                rest.append(_Call(node, self.batch))
            elif reads & of_data:
                of_data.add(node.name)
                prefix.append(_Call(node, self.batch))
            else:
                constants.append(_Call(node, self.batch))
        wanted = {n for call in rest for n in uses(call.node)} | {self.graph.loss}
        self.frontier = sorted(n for n in wanted if maker(n) in of_data)
        self.lasting = len(self.frontier)
        kept = {maker(name) for name in self.frontier}
        self.frontier += [i.name for i in self.random if i.name in wanted]
        self._prefix: list[_Call] = []
        for call in reversed(prefix):  # leave out what nothing reads
            if call.node.name in kept:
                kept.update(maker(name) for name in uses(call.node))
                self._prefix.insert(0, call)
        self._rest = rest
        with torch.no_grad():
            for call in constants:
                self._run(call, self.constant)
        self._loss = reader(Ref(name=self.graph.loss), self.batch)

    @property
    def replays(self) -> bool:
        """Whether gradients are replayed rather than had by autograd."""
        return self._tape is not None

    @property
    def has_prefix(self) -> bool:
        return bool(self._prefix)

    def _run(self, call: _Call, values: Values) -> None:
        try:
            call(values)
        except (RuntimeError, IndexError, ValueError, TypeError, NotImplementedError) as e:
            raise ModelError(
                "model.run",
                f"The node {call.node.name!r} ({call.node.op}) fails: {_line(e)}.",
                mend="Check the model on one record of the declared schema.",
                where=call.node.source or call.node.name,
            ) from e

    def prefix(self, record: Mapping[str, torch.Tensor]) -> list[Any]:
        """Frontier values of one record from its ``data``, batch 1. Raises ``ModelError``."""
        values: Values = {**self.constant, **record}
        with torch.no_grad():
            for call in self._prefix:
                self._run(call, values)
        return [values[name] for name in self.frontier]

    def loss(self, frontier: Sequence[Any]) -> torch.Tensor:
        """The record's loss, shape (1,), with autograd's graph behind it. Raises ``ModelError``."""
        values: Values = dict(self.constant)
        values.update(zip(self.frontier, frontier, strict=True))
        values.update(zip([i.name for i in self.trained], self.leaves, strict=True))
        with torch.enable_grad():
            for call in self._rest:
                self._run(call, values)
        loss: torch.Tensor = self._loss(values)
        return loss

    def gradient(self, frontier: Sequence[Any], out: torch.Tensor) -> None:
        """Write the gradient of a record's loss into ``out`` (d,), float32. ``ModelError``."""
        if self._tape is not None:
            try:
                self._tape(frontier, out)
            except (RuntimeError, IndexError, ValueError) as e:
                raise self._no_gradient(e) from e
            return
        found = self._gradients(frontier)
        parts = [
            torch.zeros(leaf.numel()) if g is None else g.reshape(-1)
            for g, leaf in zip(found, self.leaves, strict=True)
        ]
        torch.cat(parts, out=out)

    def _no_gradient(self, error: Exception) -> ModelError:
        return ModelError(
            "model.gradient",
            f"The loss has no gradient: {_line(error)}.",
            mend="Make the loss a differentiable function of the trained parameters.",
            where=self.graph.loss,
        )

    def _gradients(self, frontier: Sequence[torch.Tensor]) -> tuple[torch.Tensor | None, ...]:
        return self.gradients_of(self.loss(frontier))

    def gradients_of(self, loss: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        """Of the sum of losses by each trained tensor, ``None`` for zero. Raises ``ModelError``."""
        try:
            return torch.autograd.grad(loss.sum(), self.leaves, allow_unused=True)
        except RuntimeError as e:
            raise self._no_gradient(e) from e

    def note(self, frontier: Sequence[torch.Tensor]) -> bool:
        """From now on replay the operations noted on this record, where that is the same
        computation; whether it is. ``note(())`` goes back to autograd."""
        self._tape = None
        constants = [v for v in self.constant.values() if isinstance(v, torch.Tensor)]
        if frontier:
            with contextlib.suppress(Unfit):
                self._tape = Tape(self._gradients, frontier, self.leaves, constants)
        return self._tape is not None

    def result(self) -> dict[str, torch.Tensor]:
        """The trained tensors by their names in the weight file."""
        return {i.tensor: leaf.detach() for i, leaf in zip(self.trained, self.leaves, strict=True)}
