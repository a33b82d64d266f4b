"""The rows of a microbatch into its buffers, with what is drawn for them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeAlias

import torch

from casemate.engine.draws import Draws
from casemate.engine.nodes import Runner, from_rows, to_rows
from casemate.engine.program import Program
from casemate.engine.rows import Rows
from casemate.graph.ops import Value

# ``fill(index, free)``: rows (n,), -1 where ``free`` says that a slot may have none.
Fill: TypeAlias = Callable[[torch.Tensor, bool], None]


def inputs(program: Program, names: Sequence[str]) -> dict[str, str]:
    """Name in the joint graph -> the graph's input, of those that each record has a value of."""
    return {
        name: spec.name for i, spec in enumerate(program.data) for name in names if name == f"d{i}"
    }


def of_rows(
    buffers: Mapping[str, torch.Tensor],
    program: Program,
    values: Mapping[str, Value],
    rows: Rows,
    store: Mapping[str, torch.Tensor] | None,
    draws: Draws | None,
) -> Fill:
    """How ``buffers``, by name in the joint graph, get the rows of a microbatch.

    store: kept values by name, each row's and, last, the filler's. draws: of the inputs that
    ``rows`` has not, and of views. With several views a row stands in as many slots one after the
    other. Raises ``ValueError`` where an input has neither rows nor draws.
    """
    of = inputs(program, list(buffers))
    drawn = {of[n]: b for n, b in buffers.items() if n in of}
    kept = {n: b for n, b in buffers.items() if store is not None and n in store}
    given = [(b, rows.inputs[of[n]], rows.filler_of(of[n])) for n, b in buffers.items()
             if n not in kept and of[n] in rows.inputs]  # fmt: skip
    if draws is None and len(given) + len(kept) < len(buffers):
        raise ValueError("random inputs need draws")
    size = len(next(iter(drawn.values()))) if drawn else 0
    view = (torch.arange(size) % (draws.views if draws else 1)).numpy()

    def fill(index: torch.Tensor, free: bool) -> None:
        for name, buffer in kept.items():
            assert store is not None
            buffer.copy_(from_rows(store[name][index], values[name]))
        if free:
            none = index < 0
            at = index.clamp(min=0)
        for buffer, t, other in given:
            if not free:
                torch.index_select(t, 0, index, out=buffer)
                continue
            if len(t):
                torch.index_select(t, 0, at, out=buffer)
            buffer[none] = other
        if draws is not None and drawn:
            draws.fill(drawn, index.numpy(), view)

    return fill


def kept(
    prefix: Callable[..., Sequence[Any]],
    names: Sequence[str],
    runner: Runner,
    program: Program,
    rows: Rows,
) -> dict[str, torch.Tensor]:
    """Frontier values ``names`` of every valid row, and of the filler for others and as the last, a
    microbatch at a time; but for random inputs, which are drawn in each step. A row on which the
    prefix fails is valid no more: an error would tell of it (P6)."""
    count, size, values = rows.count, runner.rows, runner.proved.values
    random = {f"d{i}" for i, spec in enumerate(program.data) if spec.kind == "random"}
    store: dict[str, torch.Tensor] = {}
    runner.refresh()

    def made_of(first: int, chosen: torch.Tensor) -> Sequence[Any]:
        """Of the rows from ``first`` on that are ``chosen``, bool (n,); else of the filler."""
        blocks = []
        for i, spec in enumerate(program.data):
            if spec.kind == "random":
                blocks.append(torch.zeros(values[f"d{i}"].sizes(size)))
                continue
            t = rows.inputs[spec.name]
            block = rows.filler_of(spec.name).repeat(size, *[1] * (t.dim() - 1))
            block[: len(chosen)][chosen] = t[first : first + size][chosen]
            blocks.append(block)
        with torch.inference_mode():
            return prefix(runner.fixed, *blocks)

    for first in range(0, count + 1, size):
        valid = torch.from_numpy(rows.valid[first : first + size])
        try:
            made = made_of(first, valid)
        except Exception:
            for row in range(len(valid)):
                alone = torch.zeros_like(valid)
                alone[row] = valid[row]
                try:
                    made_of(first, alone)
                except Exception:
                    valid[row] = False
            made = made_of(first, valid)
        for name, value in zip(names, made, strict=True):
            if name in random:
                continue
            flat = to_rows(value, values[name], size)
            if name not in store:
                store[name] = torch.zeros((count + 1, flat.shape[1]), dtype=flat.dtype)
            place = store[name][first : first + size]
            place.copy_(flat[: len(place)])
    return store


def leave_out(
    put: Fill, evaluate: Callable[[torch.Tensor], object], index: torch.Tensor, seed: torch.Tensor
) -> None:
    """Give the slots of units on which the model fails to nobody; each is tried alone, as it is.

    index, seed: what ``put`` and ``evaluate`` read, (units, rows of one), changed in place.
    """
    taken, weights = index.clone(), seed.clone()
    for unit in range(len(index)):
        index.fill_(-1)
        seed.zero_()
        index[unit], seed[unit] = taken[unit], weights[unit]
        put(index.view(-1), True)
        try:
            evaluate(seed.view(-1))
        except Exception:
            taken[unit], weights[unit] = -1, 0.0
    index.copy_(taken)
    seed.copy_(weights)
    put(index.view(-1), True)
