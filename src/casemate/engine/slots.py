"""What says of a compiled island that it treats all slots alike: its loops, the operations in it,
and how it behaves (P13; docs/adr/0007)."""

from __future__ import annotations

import math
import operator
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Final

import torch

from casemate.engine import trials
from casemate.engine.nodes import to_rows
from casemate.graph.ops import Value

# Operations of an island's lowered graph that move entries or add them up along a record.
_MOVES: Final = frozenset(
    (
        "aten.view", "aten.reshape", "aten.expand", "aten.permute", "aten.unsqueeze",
        "aten.squeeze", "aten.full", "aten.full_like", "aten.slice", "aten.select", "aten.sum",
        "aten.mean", "aten.amax", "aten.amin", "aten.empty", "aten.alias", "aten.transpose",
        "aten.t", "aten.clone", "aten.gather", "aten.scalar_tensor", "aten.arange", "prims.iota",
    )
)  # fmt: skip
_LOOP: Final = re.compile(
    r"for\s*\(\s*int64_t (\w+)=static_cast<int64_t>\((\d+)L?\); "
    r"\1<static_cast<int64_t>\((\d+)L?\); \1\+=static_cast<int64_t>\((\d+)L?\)\)"
)
WIDEST: Final = 16  # float32 in a vector; rows of a microbatch are a multiple of it
_ROUNDS: Final = 4  # with every one of what follows
_HOSTILE: Final = (1e20, 0.0, math.nan, math.inf, -1e38, 1e-42)


class Refused(Exception):
    """The compiled form cannot be taken."""


def ragged(source: str, rows: int) -> str | None:
    """A loop in generated C++ that may run different code on some records; ``None`` if none does.

    Whatever axis holds the records of a microbatch has a multiple of ``rows`` entries, alone or
    merged with others, and vectors divide that: a loop with a ragged end is over a record's own
    axes. A loop that is not understood is one.
    """
    if rows % WIDEST:
        return "rows are no multiple of a vector"
    for kernel in re.findall(r"r'''(.*?)'''", source, re.DOTALL):
        loops = list(_LOOP.finditer(kernel))
        if len(loops) != len(re.findall(r"\bfor\s*\(", kernel)) or re.search(
            r"\b(while|goto|omp)\b", kernel
        ):
            return "a loop that is not understood"
        for found in loops:
            first, end, step = (int(found[i]) for i in (2, 3, 4))
            if first != 0:
                return "a loop that does not start at zero"
            if end % step and end % rows == 0:
                return found[0]
    return None


def treated_alike(
    call: Callable[[list[torch.Tensor]], Sequence[torch.Tensor]],
    operands: Sequence[tuple[torch.Tensor, Value]],
    values: Sequence[Value],
    rows: int,
) -> list[bool]:
    """Which results of ``call`` treat all slots alike, on operands (tensor, its value); ``values``
    are those of its results.

    As :func:`casemate.engine.probe.same_in_every_slot`, and more: at magnitudes from 1e-30 to 1e30
    each record goes through every place of a vector, and among records of its size; and there is
    more to put into the other records.
    """
    generator = torch.Generator().manual_seed(0)  # tries kernels, guards nothing
    alike = [True] * len(values)
    at = [i for i, (_, v) in enumerate(operands) if v.batch is not None]
    rest = {i: t for i, (t, v) in enumerate(operands) if v.batch is None and t.is_floating_point()}
    slots = trials.Slots([operands[i] for i in at], rows)
    for round_ in range(trials.rounds_for(min((rows * v.numel for v in values), default=0))):
        slots.draw(round_, generator, not round_)
        weights = trials.other_weights(rest, round_, generator) if round_ else {}

        def outputs(
            laid: list[torch.Tensor], weights: Mapping[int, torch.Tensor] = weights
        ) -> list[torch.Tensor]:
            given = {**weights, **dict(zip(at, laid, strict=True))}
            found = call([given.get(i, t) for i, (t, _) in enumerate(operands)])
            return [to_rows(t, v, rows) for t, v in zip(found, values, strict=True)]

        orders, spoils = [torch.randperm(rows, generator=generator)], [round_]
        if round_ < _ROUNDS:
            spoils = list(range(len(_HOSTILE)))
        if round_ == _ROUNDS - 1:
            orders += [torch.arange(rows).roll(k) for k in range(1, min(rows, WIDEST))]
            floats = [t for t in slots.drawn if t.is_floating_point() and t.numel()]
            orders += [t.abs().amax(1).argsort() for t in floats]
        others = [[_HOSTILE[(k + role) % len(_HOSTILE)] for role in (1, 2, 3)] for k in spoils]
        good = slots.alike(outputs, orders, [(-round_, of) for of in others])
        alike = [a and g for a, g in zip(alike, good, strict=True)]
        if not any(alike):
            break
    return alike


def elementary(graphs: Sequence[Any]) -> dict[Any, Any]:
    """The operations of lowered graphs that work entry by entry, once each. ``Refused`` for one
    that is neither such nor a move of entries or a sum along a record."""
    found: dict[Any, Any] = {}
    for graph in graphs:
        for node in graph.graph.nodes:
            if node.op != "call_function" or node.target is operator.getitem:
                continue
            if torch.Tag.pointwise not in node.target.tags:
                name = str(node.target).rpartition(".")[0]
                if name not in _MOVES and str(node.target) != "prims.convert_element_type.default":
                    raise Refused(f"{node.target} has no lane-wise form")
            args = tuple(_kind(a) for a in node.args)
            kwargs = tuple((k, _kind(a)) for k, a in sorted(node.kwargs.items()))
            if torch.Tag.pointwise in node.target.tags:
                found.setdefault((node.target, args, kwargs), node)
    return found


def _kind(arg: Any) -> Any:
    if isinstance(arg, torch.fx.Node):
        return ("tensor", arg.meta["val"].dtype)
    if isinstance(arg, list | tuple):
        return tuple(_kind(a) for a in arg)
    return repr(arg)  # 1, 1.0 and True are equal, and 0.0 and -0.0


TRIED: Final = 1 << 14  # entries, each a record of its own


def trial(nodes: Sequence[Any]) -> tuple[Any, list[torch.Tensor]]:
    """One graph of all these operations, each on operands of its own, one run over memory."""
    from torch import fx
    from torch.fx.experimental.proxy_tensor import make_fx

    graph = fx.Graph()
    generator = torch.Generator().manual_seed(0)
    examples: list[torch.Tensor] = []
    outs = []
    for node in nodes:

        def operand(arg: Any) -> Any:
            if isinstance(arg, fx.Node):
                dtype = arg.meta["val"].dtype
                if dtype.is_floating_point:
                    made = torch.rand(TRIED, generator=generator) + 0.5
                elif dtype == torch.bool:
                    made = torch.rand(TRIED, generator=generator) < 0.5
                else:
                    made = torch.randint(-2, 3, (TRIED,), generator=generator)
                examples.append(made.to(dtype))
                return graph.placeholder(f"x{len(examples)}")
            return [operand(a) for a in arg] if isinstance(arg, list | tuple) else arg

        args = tuple(operand(a) for a in node.args)
        kwargs = {k: operand(a) for k, a in node.kwargs.items()}
        outs.append((node.target, args, kwargs))
    made = [graph.call_function(*o) for o in outs]
    graph.output(tuple(made))
    return make_fx(fx.GraphModule({}, graph), tracing_mode="fake")(*examples), examples
