"""What says of a compiled island that it treats all slots alike: its loops, the operations in it,
and how it behaves (P13; docs/adr/0007)."""

from __future__ import annotations

import math
import operator
import re
from collections.abc import Callable, Sequence
from typing import Any, Final, TypeAlias

import torch

from casemate.engine import probe
from casemate.engine.nodes import from_rows, to_rows
from casemate.engine.probe import laid, place
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
_ROUNDS: Final = (4, 64)
_ENOUGH: Final = 10_000
_HOSTILE: Final = (1e20, 0.0, math.nan, math.inf, -1e38, 1e-42)
_Flats: TypeAlias = list[torch.Tensor | None]


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
    places = [place(t) for t, _ in operands]
    own = [None if v.batch is None else to_rows(t, v, rows) for t, v in operands]
    shared = [v.batch is not None and rows > 1 and t.stride()[v.batch.axis] == 0
              for t, v in operands]  # fmt: skip

    def outputs(flats: _Flats, weights: _Flats) -> list[torch.Tensor]:
        given = []
        for (t, v), flat, weight, at in zip(operands, flats, weights, places, strict=True):
            if flat is not None:
                given.append(laid(from_rows(flat, v), at))
            else:
                given.append(t if weight is None else weight)
        found = call(given)
        return [to_rows(t, v, rows).contiguous() for t, v in zip(found, values, strict=True)]

    def compare(a: Sequence[torch.Tensor], b: Sequence[torch.Tensor], at: Any, to: Any) -> None:
        for i, (x, y) in enumerate(zip(a, b, strict=True)):
            alike[i] = alike[i] and probe.same(x[at], y[to])

    rounds, done, round_ = _ROUNDS[0], [0] * len(values), 0
    while round_ < rounds and any(alike):
        tried: _Flats = []
        weights: _Flats = []
        for (t, _), flat, one, at in zip(operands, own, shared, places, strict=True):
            drawn, weight = flat, None
            if round_ and t.is_floating_point():
                if flat is None:
                    weight = torch.randn(t.shape, generator=generator, dtype=t.dtype)
                    weight = laid(weight if round_ % 2 else weight.abs() + 0.5, at)
                else:
                    drawn = probe.drawn_as(flat.shape, round_, generator).to(t.dtype)
            if drawn is not None:
                drawn = drawn[:1].expand(drawn.shape).clone() if one else drawn.clone()
            tried.append(drawn)
            weights.append(weight)
        first = outputs(tried, weights)
        orders = [torch.randperm(rows, generator=generator)]
        if round_ == _ROUNDS[0] - 1:
            orders += [torch.arange(rows).roll(k) for k in range(1, min(rows, WIDEST))]
            floats = [t for t in tried if t is not None and t.is_floating_point() and t.numel()]
            orders += [t.abs().amax(1).argsort() for t in floats]
        for order in orders:
            turned = outputs([None if t is None else t[order] for t in tried], weights)
            compare(first, turned, order, slice(None))
        keep = (torch.arange(rows) + round_) % 4
        for k in range(len(_HOSTILE)) if round_ < _ROUNDS[0] else [round_]:
            mixed = [None if t is None else t.clone() for t in tried]
            for m, one in zip(mixed, shared, strict=True):
                if m is not None and not one:
                    for role in (1, 2, 3):
                        if m.is_floating_point():
                            m[keep == role] = _HOSTILE[(k + role) % len(_HOSTILE)]
                        elif k % 2:
                            m[keep == role] = m[:1].clone()
            compare(first, outputs(mixed, weights), keep == 0, keep == 0)
        done = [n + t.numel() for n, t in zip(done, first, strict=True)]
        round_ += 1
        if round_ == rounds and min(done, default=_ENOUGH) < _ENOUGH and rounds < _ROUNDS[1]:
            rounds += 1
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
    return tuple(_kind(a) for a in arg) if isinstance(arg, list | tuple) else arg


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
