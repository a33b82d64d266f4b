"""A microbatch of the path ``graph`` as one function, noted as a graph of elementary operations.

What it computes is :meth:`casemate.engine.batched.Batched.parts`: forward and backward up to the
operands of the contractions, norms, clip factors, weighted sums. The loop around it (sampling,
rows, grid, noise, update) is the runtime's.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch

from casemate.engine import batched
from casemate.engine.aot import doors, sums
from casemate.engine.batched import Batched
from casemate.engine.joint import SEED

Function: TypeAlias = Callable[..., tuple[torch.Tensor, ...]]


@dataclass(frozen=True, slots=True)
class Step:
    """function: of ``inputs`` in order, gives a sum for each of ``sums``.

    inputs: examples by name: trained tensors, what else the model holds, the records' inputs, the
    records' weights (rows,); ``trained`` and ``held`` are how many there are of the first two.
    sums: which trained tensor each is of; float32, or int64 in grid steps. clip, grid: what it is
    made for, in gradient units.
    """

    function: Function
    inputs: dict[str, torch.Tensor]
    trained: int
    held: int
    sums: tuple[int, ...]
    rows: int
    per_unit: int
    clip: float
    grid: float


def of(path: Batched, clip: float, grid: float) -> Step:
    """The step of ``path``, whose ways are chosen, for one clip and one grid."""
    runner, source = path.runner, [*path.source, SEED]
    trained = [f"p{i}" for i in range(len(path.program.leaves))]
    held = [name for name in runner.inputs if name not in trained]
    names = [*trained, *held, *source]
    sums = tuple(i for i, at in enumerate(path._order) if at is not None)
    forward = runner.function(source, path.wanted)

    def function(*given: torch.Tensor) -> tuple[torch.Tensor, ...]:
        at = dict(zip(names, given, strict=True))
        env: dict[str, Any] = {name: at[name] for name in (*trained, *held)}
        for node in runner.weights:
            runner._store(node, env, runner.call(node, env, runner.rows))
        made = forward(env, *(at[name] for name in source))
        env |= dict(zip(path.wanted, made, strict=True))
        norms = [site.way.norm(env) for site in path.sites]
        c, good = batched._factors(path.sites, norms, clip, path.shape.units)
        k = path.shape.per_unit
        weights, keep = (t.repeat_interleave(k) if k > 1 else t for t in (c, good))
        return tuple(_sum(path, i, env, weights, keep, 1.0 / grid) for i in sums)

    inputs = {name: runner.inputs[name] for name in (*trained, *held)}
    inputs |= {name: path._buffers[name] for name in path.source}
    inputs[SEED] = torch.ones(path.shape.rows)
    shape = path.shape
    return Step(
        function, inputs, len(trained), len(held), sums, shape.rows, shape.per_unit, clip, grid
    )


def _sum(
    path: Batched, i: int, env: Any, weights: torch.Tensor, keep: torch.Tensor, inverse: float
) -> torch.Tensor:
    at = path._order[i]
    assert at is not None
    if at.gradient in at.site.adds:
        steps = torch.zeros(path.program.leaves[i].numel(), dtype=torch.int64)
        at.site.adds[at.gradient](steps, 0, env, weights, keep, inverse)
        return steps
    return path.total(at, env, weights, keep)


def noted(step: Step) -> Any:
    """The step as a graph module of ATen's operations and the kernels' doors."""
    from torch.fx.experimental.proxy_tensor import make_fx

    with doors.noted(), torch.no_grad():
        made = make_fx(step.function, dict(sums.TABLE), tracing_mode="fake")
        return made(*step.inputs.values())
