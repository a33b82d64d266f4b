"""Running a graph for prediction: a forward pass and nothing else.

No machine code is made once a worker is locked, so that a pass has one of few numbers of records,
each run once before (oneDNN makes its kernels then). Calls do not share a pass, unless the deployer
asks for it: then every pass has one number of records, its slots, and :meth:`Forward.share` tries
on this machine that an output's bits depend neither on the slot nor on what is in the others.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Final, TypeAlias

import torch

from casemate.engine.program import DTYPES, reader, resolve
from casemate.engine.replay import At, Call, Replay
from casemate.graph.check import Checked
from casemate.graph.model import Graph, InputSpec, ListArg, Node, Ref, Size
from casemate.graph.ops import TABLE
from casemate.spec.errors import ModelError
from casemate.spec.serving import TensorSpec

Tensors: TypeAlias = dict[str, torch.Tensor]

# A pass may be this much larger than what it is for, before it is cut in two.
_FULL: Final = 0.75
_MAGNITUDES: Final = (1.0, 1e-30, 1e15, 1e30)
# torch's own, where the table's way is for the sake of a gradient.
_FORWARD: Final = {
    name: getattr(torch.ops.aten, name).default for name in ("instance_norm", "batch_norm")
}


def specs(graph: Graph, checked: Checked) -> tuple[tuple[TensorSpec, ...], tuple[TensorSpec, ...]]:
    """What a prediction takes and gives, by record. Raises ``ModelError`` ``model.outputs``."""
    if not graph.outputs:
        raise ModelError(
            "model.outputs",
            "The model is made for training: it gives losses and no outputs.",
            mend="Deploy the module, or pack it for prediction: casemate model export --serve.",
        )
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
    """A checked graph's outputs as a function of its inputs, for at most ``records`` of them."""

    def __init__(
        self, graph: Graph, checked: Checked, weights: Mapping[str, torch.Tensor], records: int
    ) -> None:
        self._graph, self._checked = graph, checked
        self._inputs = [s for s in graph.inputs if s.kind == "data"]
        self._outputs = [o.name for o in graph.outputs]
        self._weights = {s.name: weights[s.tensor] for s in graph.inputs if s.kind == "frozen"}
        self._fixed = self._constants()
        self.slots = 1
        self._passes = {size: self._pass(size) for size in sizes(records)}

    # Building.

    def _constants(self) -> dict[str, Any]:
        """Values that no record has a part in, nor the size of a pass."""
        found: dict[str, Any] = dict(self._weights)
        with torch.inference_mode():
            for node in self._graph.nodes:
                reads = [a.name for a in _leaves(node) if isinstance(a, Ref)]
                sized = any(isinstance(a, Size) for a in _leaves(node))
                if node.name in self._checked.constants and not sized and set(reads) <= set(found):
                    args = [reader(a, 1)(found) for a in node.args]
                    kwargs = {k: reader(a, 1)(found) for k, a in node.kwargs.items()}
                    made = _operation(node.op)(*args, **kwargs)
                    found.update(zip(self._names(node), _several(made), strict=True))
        return found

    def _names(self, node: Node) -> list[str]:
        if node.name in self._checked.values:
            return [node.name]
        count = 0
        while f"{node.name}.{count}" in self._checked.values:
            count += 1
        return [f"{node.name}.{i}" for i in range(count)]

    def _pass(self, size: int) -> Replay:
        """The graph at one number of records: what nothing reads is left out."""
        wanted = {o.value for o in self._graph.outputs}
        calls: list[Call] = []
        for node in reversed(self._graph.nodes):
            names = self._names(node)
            if wanted.isdisjoint(names) or names[0] in self._fixed:
                continue
            one = names == [node.name]
            outs: Any = names[0] if one else [n if n in wanted else None for n in names]
            args = [_argument(a, size) for a in node.args]
            kwargs = {k: _argument(a, size) for k, a in node.kwargs.items()}
            call = Call(_operation(node.op), args, kwargs, outs)
            wanted.update(call.reads)
            calls.insert(0, call)
        constants = {n: v for n, v in self._fixed.items() if n in wanted}
        values = [o.value for o in self._graph.outputs]
        return Replay(calls, [s.name for s in self._inputs], values, constants)

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
            whole = (
                found[0] if len(found) == 1 else [torch.cat(o) for o in zip(*found, strict=True)]
            )
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
        drawn = torch.Generator().manual_seed(0)
        out = {}
        for s in self._inputs:
            shape = (count, *(d for d in s.shape[1:] if isinstance(d, int)))
            if s.dtype == "f32":
                out[s.name] = torch.randn(shape, generator=drawn)
            else:
                low, high = (0, 1) if s.low is None or s.high is None else (s.low, s.high)
                high = min(high, low + 2**62)
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
        """From now on every pass has ``slots`` records, if an output's bits are the same in every
        slot and whatever stands in the others; else passes stay as they are. The slots of a pass.

        Tried are made-up records at magnitudes from 1e-30 to 1e30 and without a number, each alone
        among zeros, then in each slot among the others.
        """
        passes = self._passes
        self._passes = {slots: self._pass(slots)}
        if not self._alike(slots):
            self._passes = passes
            return 1
        self.slots = slots
        return slots

    def _alike(self, slots: int) -> bool:
        records = self._hostile(slots)
        count = len(next(iter(records.values())))
        alone = []
        for r in range(count):
            row = {n: _rows(t, r, 1, slots) for n, t in records.items()}
            alone.append([_bits(o[0]) for o in self._run_all(slots, row)])
        order = torch.Generator().manual_seed(1)
        for turn in range(2 * slots):
            chosen = [(turn + i) % count for i in range(slots)]
            if turn >= slots:
                chosen = torch.randint(count, (slots,), generator=order).tolist()
            outs = self._run_all(slots, {n: t[chosen] for n, t in records.items()})
            for slot, r in enumerate(chosen):
                if any(
                    not torch.equal(_bits(o[slot]), a) for o, a in zip(outs, alone[r], strict=True)
                ):
                    return False
        return True

    def _run_all(self, slots: int, given: Tensors) -> Sequence[torch.Tensor]:
        with torch.inference_mode():
            return self._run(slots, [given[s.name] for s in self._inputs])

    def _hostile(self, slots: int) -> Tensors:
        """As many records as slots, of every magnitude, and two that are no numbers."""
        plain = self.samples(slots)
        scale = torch.tensor([_MAGNITUDES[i % len(_MAGNITUDES)] for i in range(slots)])
        out = {}
        for name, t in plain.items():
            if t.is_floating_point():
                t = t * scale.reshape(-1, *[1] * (t.dim() - 1))
                odd = torch.stack(
                    [torch.full_like(t[0], float("inf")), torch.full_like(t[0], float("nan"))]
                )
                t = torch.cat([t, odd])
            else:
                t = torch.cat([t, t[:1], t[:1]])
            out[name] = t
        return out


def _operation(op: str) -> Any:
    own = resolve(op, TABLE)
    return _FORWARD.get(op.split(".")[1], own) if op.endswith("_norm.default") else own


def _leaves(node: Node) -> Iterator[Any]:
    for arg in (*node.args, *node.kwargs.values()):
        yield from arg.items if isinstance(arg, ListArg) else (arg,)


def _argument(arg: Any, size: int) -> Any:
    """As :class:`Call` has it."""
    if isinstance(arg, Ref):
        return At(arg.name)
    if isinstance(arg, ListArg):
        return [_argument(item, size) for item in arg.items]
    return reader(arg, size)({})


def _several(made: Any) -> list[Any]:
    return list(made) if isinstance(made, list | tuple) else [made]


def _rows(given: torch.Tensor, at: int, count: int, size: int) -> torch.Tensor:
    """``count`` records from ``at`` on, and zeros up to ``size``."""
    rows = given[at : at + count]
    if count == size:
        return rows
    return torch.cat([rows, torch.zeros(size - count, *rows.shape[1:], dtype=rows.dtype)])


def _bits(t: torch.Tensor) -> torch.Tensor:
    """NaNs are compared by their bits too."""
    return t.contiguous().view(torch.int32).clone() if t.dtype == torch.float32 else t.clone()
