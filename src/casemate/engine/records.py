"""Per-record gradients over a run's rows: the engine's paths.

A path is a factory ``(program, inputs, rows, keep, draws) -> Gradients``. There is one so far,
``record``: one record per call in one set of buffers. It is sound under P13 by construction, needs
no proof of independence (P5), and is the oracle of faster ones.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Final, TypeAlias

import numpy as np
import torch

from casemate.engine.draws import Draws
from casemate.engine.program import DTYPES, Program, size_at

# ``gradients(row, out)``: writes row's gradient into ``out`` (d,), float32; row -1 is the dummy.
Gradients: TypeAlias = Callable[[int, torch.Tensor], None]


def dummy(program: Program) -> dict[str, torch.Tensor]:
    """A record of zeros."""
    return {
        i.name: torch.zeros([size_at(s) for s in i.shape], dtype=DTYPES[i.dtype])
        for i in program.data
    }


def record(
    program: Program,
    inputs: Mapping[str, torch.Tensor],
    rows: int,
    keep: bool,
    draws: Draws | None = None,
) -> Gradients:
    """One record per call. ``keep``: evaluate the frozen prefix of every row now, once. ``draws``:
    of the inputs that ``inputs`` has not; with several views, a row's gradient is their mean.

    A record on which the model fails, in whatever way, has gradient zero: an error would tell of
    the row (P6). That a model can run at all is settled in ``prepare``.
    """
    buffers = dummy(program)
    given = [name for name in buffers if name in inputs]
    if draws is None and len(given) < len(buffers):
        raise ValueError("random inputs need draws")
    drawn = [buffers[name] for name in program.frontier[program.lasting :]]

    def frontier(row: int, view: int = 0, draws: Draws | None = draws) -> list[Any] | None:
        for name in given:
            if row < 0:
                buffers[name].zero_()
            else:
                buffers[name].copy_(inputs[name][row : row + 1])
        if draws is not None:
            draws.fill(buffers, np.array([row]), np.array([view]))
        try:
            return program.prefix(buffers)
        except Exception:
            return None

    source = frontier
    if keep:

        def first(row: int) -> list[Any] | None:
            values = frontier(row, 0, None)
            return None if values is None else values[: program.lasting]

        lasting = kept(first, rows)

        def source(row: int, view: int = 0, draws: Draws | None = draws) -> list[Any] | None:
            values = lasting(row)
            if values is not None and draws is not None:
                draws.fill(buffers, np.array([row]), np.array([view]))
            return None if values is None else values + drawn

    def one(row: int, view: int, out: torch.Tensor) -> bool:
        values = source(row, view)
        if values is None:
            return False
        try:
            program.gradient(values, out)
        except Exception:
            return False
        return True

    def gradients(row: int, out: torch.Tensor) -> None:
        if not one(row, 0, out):
            out.zero_()

    if draws is None or draws.views == 1:
        return gradients
    count, part = draws.views, torch.empty(program.dimension)

    def mean(row: int, out: torch.Tensor) -> None:
        out.zero_()
        for view in range(count):
            if not one(row, view, part):
                out.zero_()
                return
            out.add_(part)
        out.mul_(1 / count)

    return mean


def kept(
    frontier: Callable[[int], list[Any] | None], rows: int
) -> Callable[[int], list[Any] | None]:
    """The frontier of every row and of the dummy, evaluated now in the order of rows.

    What a later call gets is copied to one set of buffers, whose addresses never change.
    """
    first = frontier(-1)
    if first is None:
        first = frontier(0)
    if first is None:
        return lambda row: None
    buffers = [torch.empty_like(v, memory_format=torch.contiguous_format) for v in first]
    store = [torch.empty((rows + 1, *b.shape), dtype=b.dtype) for b in buffers]
    good = [False] * (rows + 1)
    for row in range(-1, rows):
        values = first if row < 0 else frontier(row)
        if values is not None:
            good[row] = True
            for place, value in zip(store, values, strict=True):
                place[row].copy_(value)

    def source(row: int) -> list[Any] | None:
        if not good[row]:
            return None
        for buffer, place in zip(buffers, store, strict=True):
            buffer.copy_(place[row])
        return list(buffers)

    return source


PATHS: Final[dict[str, Callable[..., Gradients]]] = {
    "record": record,
}
