"""A microbatch of the path ``graph`` as one function, noted as a graph of elementary operations.

What it computes is :meth:`casemate.engine.batched.Batched.parts`: forward and backward up to the
operands of the contractions, norms, clip factors, weighted sums. The loop around it (sampling,
rows, grid, noise, update) is the runtime's.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from casemate.engine import batched
from casemate.engine.aot import doors
from casemate.engine.batched import Batched
from casemate.engine.joint import SEED
from casemate.spec.errors import UsageError


@dataclass(frozen=True, slots=True)
class Step:
    """function: of the trained tensors, the rows' inputs and their weights (rows,), giving a sum
    for each of ``sums``; inputs: examples of them in that order, by name. sums: of which trained
    tensor each is, in order; grid: which of them are in grid steps (int64) already."""

    function: Any
    inputs: dict[str, torch.Tensor]
    sums: tuple[int, ...]


def of(path: Batched, bound: float) -> Step:
    """The step of ``path``, whose ways are chosen, for one clip."""
    runner = path.runner
    trained = [f"p{i}" for i in range(len(path.program.leaves))]
    held = {n: t for n, t in runner.inputs.items() if n not in trained}
    names = [*trained, *held, *path.source, SEED]
    sums = tuple(i for i, at in enumerate(path._order) if at is not None)
    forward = runner.function([*path.source, SEED], path.wanted)

    def function(*given: torch.Tensor) -> tuple[torch.Tensor, ...]:
        at = dict(zip(names, given, strict=True))
        env: dict[str, Any] = {n: at[n] for n in (*trained, *held)}
        for node in runner.weights:
            runner._store(node, env, runner.call(node, env, runner.rows))
        records = [at[n] for n in (*path.source, SEED)]
        made = forward(env, *records)
        env |= dict(zip(path.wanted, made, strict=True))
        norms = [site.way.norm(env) for site in path.sites]
        c, good = batched._factors(path.sites, norms, bound, path.shape.units)
        return tuple(_sum(path, i, env, c, good) for i in sums)

    inputs = {**{n: runner.inputs[n] for n in (*trained, *held)},
              **{n: path._buffers[n] for n in path.source}, SEED: torch.ones(path.shape.rows)}
    return Step(function, inputs, sums)


def _sum(path: Batched, i: int, env: Any, c: torch.Tensor, good: torch.Tensor) -> torch.Tensor:
    at = path._order[i]
    assert at is not None
    sums = {n: total(env, c, good) for n, total in at.site.totals.items()}
    sums = {**env, **sums}
    for node in at.tail:
        path.runner._store(node, sums, path.runner.call(node, sums, path.shape.rows))
    made: torch.Tensor = sums[at.gradient]
    return made


def noted(step: Step) -> Any:
    """The step as a graph module."""
    from torch.fx.experimental.proxy_tensor import make_fx

    examples = list(step.inputs.values())
    with doors.noted(), torch.no_grad():
        return make_fx(step.function, tracing_mode="fake")(*examples)
