"""Per-record gradients over a run's rows: the engine's paths.

A path is a factory ``(program, inputs, rows, keep) -> Gradients``. There is one so far, ``record``:
one record per call in one set of buffers. It is sound under P13 by construction, needs no proof of
independence (P5), and is the oracle of faster ones.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Final, TypeAlias

import torch

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
    program: Program, inputs: Mapping[str, torch.Tensor], rows: int, keep: bool
) -> Gradients:
    """One record per call. ``keep``: evaluate the frozen prefix of every row now, once.

    A record on which the model fails, in whatever way, has gradient zero: an error would tell of
    the row (P6). That a model can run at all is settled in ``prepare``.
    """
    buffers = dummy(program)

    def frontier(row: int) -> list[Any] | None:
        for name, buffer in buffers.items():
            if row < 0:
                buffer.zero_()
            else:
                buffer.copy_(inputs[name][row : row + 1])
        try:
            return program.prefix(buffers)
        except Exception:
            return None

    if keep:
        source = kept(frontier, rows)
    else:
        source = frontier

    def gradients(row: int, out: torch.Tensor) -> None:
        values = source(row)
        if values is None:
            out.zero_()
            return
        try:
            program.gradient(values, out)
        except Exception:
            out.zero_()

    return gradients


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


PATHS: Final[dict[str, Callable[[Program, Mapping[str, torch.Tensor], int, bool], Gradients]]] = {
    "record": record,
}
