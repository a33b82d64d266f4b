"""The training loop: DP-SGD (Abadi et al. 2016, Algorithm 1) under the rules of the design."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import TypeAlias

import numpy as np
import numpy.typing as npt
import torch

from casemate.engine import clip, grid, keystream, noise, optim, sampling
from casemate.engine.program import Program
from casemate.engine.records import PATHS, Gradients
from casemate.engine.rows import Rows
from casemate.spec.errors import PlanError
from casemate.spec.job import Dp, Execution, Plan, TrainSpec

# Noise of a step in grid steps: (step, dimension) -> int64 (dimension,).
Draw: TypeAlias = Callable[[int, int], npt.NDArray[np.int64]]


def _refuse(what: str) -> PlanError:
    return PlanError(
        "plan.unsound", f"The plan is refused by the engine: {what}.", mend="Ask for a new quote."
    )


def check_plan(plan: Plan, train: TrainSpec, dimension: int, units: int) -> None:
    """Refuse a plan whose constants do not bound what the loop does. Raises ``PlanError``."""
    if plan.private != isinstance(train.privacy, Dp):
        raise _refuse("it is not of the kind that the job asks for")
    if plan.units != units or plan.steps != train.steps or not 0 < plan.rate <= 1:
        raise _refuse("its units, steps or rate are not the job's")
    if not 0 < plan.normaliser < math.inf or plan.microbatch * plan.microbatches < 1:
        raise _refuse("its normaliser or slots are not positive")
    if not plan.private:
        return
    if not (plan.clip >= clip.SMALLEST and plan.grid > 0 and plan.sigma >= plan.grid):
        raise _refuse("clip, grid and sigma are out of order")
    if plan.sensitivity < grid.sensitivity(plan.clip, dimension, plan.grid):
        raise _refuse("its sensitivity is below that of the clip and the grid")
    if plan.sigma < plan.noise_multiplier * plan.sensitivity * (1.0 - 2.0**-40):
        raise _refuse("its noise is smaller than it accounts for")
    scale = plan.sigma / plan.grid
    if scale > noise.MAX_SCALE or not grid.fits(plan.clip, plan.grid, slots(plan), scale):
        raise _refuse("its grid is too fine, or no power of two")
    words = plan.steps * (dimension + plan.units)  # noise and sampling, each under a key of its own
    if plan.delta_sampler < noise.distance(words):
        raise _refuse("it does not charge the sampler's distance")
    if [(e.rate, e.steps) for e in plan.events] != [(plan.rate, plan.steps)] or any(
        e.noise_multiplier > plan.noise_multiplier for e in plan.events
    ):
        raise _refuse("its events do not describe its steps")


def slots(plan: Plan) -> int:
    """Units evaluated in every step, whatever was sampled."""
    return plan.microbatch * plan.microbatches


def train(
    plan: Plan,
    execution: Execution,
    spec: TrainSpec,
    program: Program,
    rows: Rows,
    key: bytes,
    *,
    keep: bool = False,
) -> dict[str, torch.Tensor]:
    """Train and return the trained tensors, float32, by name.

    key: 32 fresh bytes, used for nothing else. keep: evaluate the frozen prefix once per row.
    Raises ``PlanError`` before any row is read.
    """

    def draw(step: int, dimension: int) -> npt.NDArray[np.int64]:
        return noise.gaussian(key, step, dimension, plan.sigma / plan.grid)

    return loop(plan, execution, spec, program, rows, key, draw, keep)


def loop(
    plan: Plan,
    execution: Execution,
    spec: TrainSpec,
    program: Program,
    rows: Rows,
    key: bytes,
    draw: Draw,
    keep: bool,
) -> dict[str, torch.Tensor]:
    """:func:`train` with the noise as an argument: for the engine and its tests alone."""
    check_plan(plan, spec, program.dimension, rows.units)
    if execution.path not in PATHS:
        raise _refuse(f"its path {execution.path[:40]!r} is unknown")
    torch.set_num_threads(1)
    gradients = PATHS[execution.path](program, rows.inputs, rows.count, keep)
    sample_key = keystream.subkey(key, sampling.PURPOSE)
    update = optim.optimizer(spec.optimizer, spec.schedule, plan.steps, program.dimension)
    for step in range(plan.steps):
        chosen = sampling.sample(sample_key, step, plan.units, plan.rate)
        if plan.private:
            total = grid_sum(plan, gradients, rows, chosen, program.dimension)
            total += torch.from_numpy(draw(step, program.dimension))
            mean = total.to(torch.float64).mul_(plan.grid / plan.normaliser)
        else:
            mean = plain_sum(plan, gradients, rows, chosen, program.dimension)
            mean /= plan.normaliser
        with torch.no_grad():
            update(program.flat, mean.to(torch.float32), step)
    return program.result()


def grid_sum(
    plan: Plan,
    gradients: Gradients,
    rows: Rows,
    chosen: npt.NDArray[np.int64],
    dimension: int,
) -> torch.Tensor:
    """The exact sum of the chosen units' clipped contributions in grid steps, int64 (d,)."""
    return clipped_sum(slots(plan), plan.clip, plan.grid, gradients, rows, chosen, dimension)


def clipped_sum(
    count: int,
    bound: float,
    step: float,
    gradients: Gradients,
    rows: Rows,
    chosen: npt.NDArray[np.int64],
    dimension: int,
) -> torch.Tensor:
    """:func:`grid_sum` of ``count`` slots with clip ``bound`` and grid ``step``."""
    total = torch.zeros(dimension, dtype=torch.int64)
    for real, contribution in _slots(count, gradients, rows, chosen, dimension):
        clip.clip(contribution, bound)
        steps = grid.to_grid(contribution, step)
        total.add_(steps, alpha=int(real))
    return total


def plain_sum(
    plan: Plan,
    gradients: Gradients,
    rows: Rows,
    chosen: npt.NDArray[np.int64],
    dimension: int,
) -> torch.Tensor:
    """Without privacy (P10): the sum of the chosen units' gradients, float64 (d,)."""
    total = torch.zeros(dimension, dtype=torch.float64)
    for real, contribution in _slots(slots(plan), gradients, rows, chosen, dimension):
        if real and bool(torch.isfinite(contribution).all()):
            total.add_(contribution)
    return total


def _slots(
    count: int,
    gradients: Gradients,
    rows: Rows,
    chosen: npt.NDArray[np.int64],
    dimension: int,
) -> Iterator[tuple[bool, torch.Tensor]]:
    """Every slot of a step: whether a unit sits in it, and that unit's summed gradient, float64.

    Units past the last slot are dropped (charged as ``delta_truncation``); free slots, and the rows
    that a unit lacks of k, evaluate the dummy, so that the work does not tell how many there are.
    """
    one = torch.empty(dimension)
    contribution, waste = (torch.empty(dimension, dtype=torch.float64) for _ in range(2))
    for slot in range(count):
        real = slot < len(chosen)
        members = rows.of_unit(int(chosen[slot])) if real else ()
        contribution.zero_()
        for place in range(rows.per_unit):
            taken = place < len(members)
            gradients(int(members[place]) if taken else -1, one)
            (contribution if taken else waste).add_(one)
        yield real, contribution
