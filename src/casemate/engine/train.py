"""The training loop: DP-SGD (Abadi et al. 2016, Algorithm 1) under the rules of the design."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Final, TypeAlias

import numpy as np
import numpy.typing as npt
import torch

from casemate.engine import (
    batched,
    clip,
    draws,
    grid,
    kernels,
    keystream,
    noise,
    optim,
    sampling,
    state,
    windows,
)
from casemate.engine.batched import Batched
from casemate.engine.program import Program
from casemate.engine.records import PATHS, Gradients
from casemate.engine.rows import Rows
from casemate.plan.compile import capacity
from casemate.plan.state import due
from casemate.spec.errors import PlanError
from casemate.spec.job import Dp, Execution, Plan, TrainSpec

# Adds a step's noise, in grid steps: (step, first entry, int64 (n,) of the step's sum).
Add: TypeAlias = Callable[[int, int, npt.NDArray[np.int64]], None]
# The sum of the chosen units' contributions, by pieces: int64 grid steps, or float64 without
# privacy.
Sums: TypeAlias = Callable[[npt.NDArray[np.int64]], Iterator[windows.Piece]]
# Takes a state in: (steps taken, its bytes in parts, valid for the call).
Save: TypeAlias = Callable[[int, Iterator[bytes | memoryview]], None]

# For each path, how far one unit moves its sum: (clip, dimension, grid) -> L2, gradient units; the
# same for every form of the clip (``clip``, ``batched.factors``).
SENSITIVITY: Final[dict[str, Callable[[float, int, float], float]]] = {
    "graph": batched.sensitivity,
    "native": batched.sensitivity,
    "record": grid.sensitivity,
}


def _refuse(what: str) -> PlanError:
    return PlanError(
        "plan.unsound", f"The plan is refused by the engine: {what}.", mend="Ask for a new quote."
    )


def check_plan(
    plan: Plan, train: TrainSpec, dimension: int, units: int, path: str = "record"
) -> None:
    """Refuse a plan whose constants do not bound what the loop does. Raises ``PlanError``."""
    if path not in SENSITIVITY:
        raise _refuse(f"its path {path[:40]!r} is unknown")
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
    assert isinstance(train.privacy, Dp)
    asked = train.privacy
    gamma = asked.gamma if asked.clipping == "automatic" else 0.0
    if (plan.clip, plan.clipping, plan.gamma) != (asked.clip, asked.clipping, gamma):
        raise _refuse("its clip is not the job's")
    if plan.sensitivity < SENSITIVITY[path](plan.clip, dimension, plan.grid):
        raise _refuse("its sensitivity is below that of the clip and the grid")
    if plan.sigma < plan.noise_multiplier * plan.sensitivity * (1.0 - 2.0**-40):
        raise _refuse("its noise is smaller than it accounts for")
    scale = plan.sigma / plan.grid
    if scale > noise.MAX_SCALE or not grid.fits(plan.clip, plan.grid, slots(plan), scale):
        raise _refuse("its grid is too fine, or no power of two")
    words = plan.steps * (dimension + plan.units)  # noise and sampling, each under a key of its own
    if plan.delta_sampler < noise.distance(words):
        raise _refuse("it does not charge the sampler's distance")
    if slots(plan) < _room(plan):
        raise _refuse("its slots are too few for what it charges for units that are dropped")
    if [(e.rate, e.steps) for e in plan.events] != [(plan.rate, plan.steps)] or any(
        e.noise_multiplier > plan.noise_multiplier for e in plan.events
    ):
        raise _refuse("its events do not describe its steps")


def _room(plan: Plan) -> int:
    """Slots that what is charged for dropped units asks for; with nothing charged, one a unit."""
    if plan.delta_truncation <= 0:
        return plan.units
    return capacity(plan.units, plan.rate, plan.steps, plan.delta_truncation)


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
    fast: Batched | None = None,
    source: state.Source | None = None,
    every: int = 0,
    save: Save | None = None,
) -> dict[str, torch.Tensor]:
    """Train and return the trained tensors, float32, by name: the last, or their average.

    key: 32 fresh bytes, used for nothing else, not even for the run that is resumed. keep: evaluate
    the frozen prefix once per row. fast: what the path ``graph`` was prepared with. source: the
    state to go on from. save: is given the state after each ``every`` steps but the last (0:
    never). Raises ``PlanError`` and what ``engine.state.read`` does before any row is read.
    """
    run = start(plan, execution, spec, program, rows, key, keep=keep, fast=fast, source=source)
    saved = due(plan.steps, every, run.done)
    while run.done < plan.steps:
        run(run.done)
        if run.done == saved and save is not None:
            save(run.done, run.state())
            saved = due(plan.steps, every, saved)
    return run.result()


class Run:
    """A run under way: call it with a step's number, in order from ``done``. No step is taken
    twice, for its noise belongs to its number."""

    def __init__(
        self,
        take: Callable[[int], None],
        program: Program,
        average: optim.Average | None,
        write: Callable[[int], Iterator[bytes | memoryview]],
        done: int = 0,
    ) -> None:
        self.program, self.average, self.done = program, average, done
        self._take, self._write = take, write

    def __call__(self, step: int) -> None:
        if step != self.done:
            raise ValueError(f"step {self.done} is due, not {step}")
        self._take(step)
        if self.average is not None:
            self.average.add(self.program.flat)
        self.done += 1

    def state(self) -> Iterator[bytes | memoryview]:
        """What the run can be resumed from, in parts valid until the next step: see
        :mod:`casemate.plan.state`. It holds no key."""
        return self._write(self.done)

    def result(self) -> dict[str, torch.Tensor]:
        """What is released as the run stands: the trained tensors, float32, by name, or their
        average over the steps so far (``TrainSpec.ema``)."""
        found = self.program.result()
        if self.average is None or not self.average.count:
            return found
        parts = torch.split(self.average.value, [t.numel() for t in found.values()])
        return {
            name: part.to(torch.float32).view(t.shape)
            for (name, t), part in zip(found.items(), parts, strict=True)
        }


def start(
    plan: Plan,
    execution: Execution,
    spec: TrainSpec,
    program: Program,
    rows: Rows,
    key: bytes,
    *,
    keep: bool = False,
    fast: Batched | None = None,
    source: state.Source | None = None,
) -> Run:
    """As :func:`train`; takes the step of a number, in order."""

    def add(step: int, first: int, total: npt.NDArray[np.int64]) -> None:
        noise.add_gaussian(total, key, step, plan.sigma / plan.grid, first)

    return loop(plan, execution, spec, program, rows, key, add, keep, fast, source)


def loop(
    plan: Plan,
    execution: Execution,
    spec: TrainSpec,
    program: Program,
    rows: Rows,
    key: bytes,
    add: Add,
    keep: bool,
    fast: Batched | None = None,
    source: state.Source | None = None,
) -> Run:
    """:func:`start` with the noise as an argument: for the engine and its tests alone."""
    check_plan(plan, spec, program.dimension, rows.units, execution.path)
    torch.set_num_threads(1)
    update = optim.optimizer(spec.optimizer, spec.schedule, plan.steps, program.dimension)
    average = optim.Average(spec.ema, program.dimension) if spec.ema else None
    vectors = {"weights": program.flat, **update.state}
    if average is not None:
        vectors["average"] = average.value
    done = 0 if source is None else state.read(source, plan, spec, vectors)
    if average is not None:
        average.count = done
    drawn = draws.of_job(key, rows, program.data, spec.views)
    if keep and spec.views.transforms:
        raise _refuse("it keeps what the views of a row are not made of")
    sums = _sums(plan, execution.path, program, rows, keep, fast, drawn)
    sample_key = keystream.subkey(key, sampling.PURPOSE)
    apply = applied(program.flat, add if plan.private else None, update,
                    (plan.grid if plan.private else 1.0) / plan.normaliser)  # fmt: skip

    def take(step: int) -> None:
        if drawn is not None:
            drawn.step = step
        apply(sums(sampling.sample(sample_key, step, plan.units, plan.rate)), step)

    return Run(take, program, average, lambda at: state.write(plan, spec, at, vectors), done)


def applied(
    weights: torch.Tensor, add: Add | None, update: optim.Update, factor: float
) -> Callable[[Iterator[windows.Piece], int], None]:
    """What makes a step of a sum: noise (None: without privacy), times ``factor``, the update."""
    room = torch.empty(min(windows.WINDOW, len(weights)))

    def apply(pieces: Iterator[windows.Piece], step: int) -> None:
        with torch.no_grad():
            for first, total in pieces:
                mean = room[: len(total)]
                if add is None:
                    mean.copy_(total.mul_(factor))
                else:
                    add(step, first, total.numpy())
                    kernels.finish(total, factor, mean)
                update(weights[first : first + len(total)], mean, step, first)

    return apply


def _sums(
    plan: Plan,
    path: str,
    program: Program,
    rows: Rows,
    keep: bool,
    fast: Batched | None,
    drawn: draws.Draws | None,
) -> Sums:
    if path == "graph":
        if fast is None or plan.microbatch != fast.shape.units:
            raise _refuse("its microbatch is not the one prepared for")
        bound, step = (plan.clip, plan.grid) if plan.private else (math.inf, 0.0)
        return fast.pieces(rows, bound, step, slots(plan), plan.clipping, plan.gamma, drawn)
    gradients = PATHS[path](program, rows.inputs, rows.count, keep, drawn)
    if not plan.private:
        return lambda chosen: windows.of(
            plain_sum(plan, gradients, rows, chosen, program.dimension)
        )
    sizes = [leaf.numel() for leaf in program.leaves]
    return lambda chosen: windows.of(
        grid_sum(plan, gradients, rows, chosen, program.dimension, sizes)
    )


def grid_sum(
    plan: Plan,
    gradients: Gradients,
    rows: Rows,
    chosen: npt.NDArray[np.int64],
    dimension: int,
    sizes: Sequence[int] = (),
) -> torch.Tensor:
    """The exact sum of the chosen units' clipped contributions in grid steps, int64 (d,).

    sizes: elements of each trained tensor; by default there is one.
    """
    how = clip.FORMS[plan.clipping](sizes or (dimension,), plan.gamma)
    return clipped_sum(slots(plan), plan.clip, plan.grid, gradients, rows, chosen, dimension, how)


def clipped_sum(
    count: int,
    bound: float,
    step: float,
    gradients: Gradients,
    rows: Rows,
    chosen: npt.NDArray[np.int64],
    dimension: int,
    how: clip.Clip | None = None,
) -> torch.Tensor:
    """:func:`grid_sum` of ``count`` slots with clip ``bound`` and grid ``step``."""
    how = how or clip.clip
    total = torch.zeros(dimension, dtype=torch.int64)
    for real, contribution in _slots(count, gradients, rows, chosen, dimension):
        how(contribution, bound)
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
