"""Whether an artifact does what the engine does, before it is accepted.

Both train by the same key on made-up records, a step of all units with noise of two grid steps:
what is compared is the clipped sum, through the artifact's own loop, locks and files.
"""

from __future__ import annotations

import math
import statistics
import time
from dataclasses import dataclass, replace
from typing import Any, Final

import numpy as np
import torch

from casemate.engine.aot.build import Artifact, refuse
from casemate.engine.aot.run import job, run
from casemate.engine.aot.step import Step
from casemate.engine.batched import Batched
from casemate.engine.noise import add_gaussian
from casemate.engine.rows import Rows
from casemate.spec.job import Dp, DpEvent, Plan, Sgd, TrainSpec

# Float32 sums in another order. Where two entries of a pooling window, or an entry and zero, are
# equal but for rounding, a gradient goes another way: so the median, and a bound on each.
AGREES: Final = 2.0**-19
NEVER: Final = 2.0**-6
_TRIALS: Final = 5
_SLOTS: Final = 64
_NOISE: Final = 2.0
_NORMALISER: Final = 2.0**-10


@dataclass(frozen=True, slots=True)
class Agreement:
    """By trial: how far the artifact's clipped sum is from the engine's, relative to its length.
    grid: what rounding to the grid alone may make of that, half a step an entry."""

    differences: tuple[float, ...]
    grid: float

    @property
    def median(self) -> float:
        return statistics.median(self.differences)

    @property
    def good(self) -> bool:
        return self.median <= AGREES + self.grid and max(self.differences) <= NEVER + self.grid


def made_up(step: Step, units: int, **changed: Any) -> Plan:
    """A plan for ``step`` of so many units that nobody asked for: one step of all of them, with
    noise of two grid steps; ``changed`` are fields with other values."""
    sigma = _NOISE * step.grid
    plan = Plan(
        request_digest="0" * 64, model_digest="0" * 64, private=True, units=units, rate=1.0,
        steps=1, clip=step.clip, normaliser=_NORMALISER, sensitivity=step.clip, sigma=sigma,
        noise_multiplier=sigma / step.clip, grid=step.grid, microbatch=step.rows // step.per_unit,
        microbatches=-(-units * step.per_unit // step.rows), delta_truncation=0.0,
        delta_sampler=0.0, events=(DpEvent(rate=1.0, noise_multiplier=1.0, steps=1),),
    )  # fmt: skip
    return replace(plan, **changed)


_TRAIN: Final = TrainSpec(
    batch_size=1, steps=1, privacy=Dp(epsilon=1.0, delta=1e-5), optimizer=Sgd(lr=1.0)
)


def change(artifact: Artifact, path: Batched, rows: Rows, key: bytes) -> torch.Tensor:
    """What one step of all units changes the weights by, float32 (d,), over ``_NORMALISER``: the
    noised sum."""
    names = [spec.name for spec in path.program.data]
    plan = made_up(artifact.step, rows.units)
    train = replace(_TRAIN, privacy=Dp(epsilon=1.0, delta=1e-5, clip=plan.clip))
    given = job(artifact, plan, train, rows, names, path.runner.inputs, key, float("inf"), 1e-5)
    return (path.program.flat - run(artifact, given).weights) * _NORMALISER


def clipped(
    artifact: Artifact, path: Batched, rows: Rows, key: bytes
) -> np.ndarray[tuple[int], np.dtype[np.float64]]:
    """The artifact's clipped sum of all units, in grid steps (d,): the noise is taken off again."""
    noise = np.zeros(path.program.dimension, dtype=np.int64)
    add_gaussian(noise, key, 0, _NOISE)
    made = change(artifact, path, rows, key).double() / artifact.step.grid
    return made.numpy() - noise


def seconds(artifact: Artifact, path: Batched, rows: Rows, steps: int) -> float:
    """Of a run of so many steps of all units."""
    names = [spec.name for spec in path.program.data]
    plan = made_up(artifact.step, rows.units, steps=steps)
    begun = time.perf_counter()
    given = job(
        artifact, plan, _TRAIN, rows, names, path.runner.inputs, bytes(32), float("inf"), 1e-5
    )
    run(artifact, given)
    return time.perf_counter() - begun


def agreement(artifact: Artifact, path: Batched, rows: Rows) -> Agreement:
    """On units of ``rows``, a microbatch a trial, in turn."""
    found, lengths, units, grid = [], [], path.shape.units, artifact.step.grid
    sums = path.sums(rows, artifact.step.clip, grid, units)
    for trial in range(_TRIALS):
        some = np.unique(np.arange(units * trial, units * (trial + 1)) % rows.units)
        exact = sums(some).numpy()
        off = clipped(artifact, path, subset(rows, some), bytes([trial + 1]) * 32) - exact
        lengths.append(max(float(np.linalg.norm(exact)), 1.0))
        found.append(float(np.linalg.norm(off)) / lengths[-1])
    return Agreement(tuple(found), math.sqrt(path.program.dimension) / 2.0 / min(lengths))


def slots_alike(artifact: Artifact, path: Batched, rows: Rows) -> bool:
    """Whether a unit's contribution has the same bits in every slot (P13), beside places without a
    row and, where the model takes numbers, beside rows of NaN, which count as nothing."""
    names = [spec.name for spec in path.program.data]
    units, k = path.shape.units, path.shape.per_unit
    one = {name: rows.inputs[name][rows.of_unit(0)[:1]] for name in names}
    hostile = {n: torch.full_like(t, torch.nan) if t.is_floating_point() else t
               for n, t in one.items()}  # fmt: skip
    numbers = any(t.is_floating_point() for t in one.values())
    wanted = None
    for slot in np.unique(np.linspace(0, units - 1, min(units, _SLOTS)).astype(int)):
        for beside in (False, True) if numbers else (False,):
            valid = np.full(units, beside)
            valid[slot] = True
            inputs = {}
            for name in names:
                inputs[name] = hostile[name].repeat(units, *[1] * (one[name].dim() - 1))
                inputs[name][slot] = one[name][0]
            starts = np.arange(units + 1)
            some = Rows(inputs, valid, np.arange(units), starts, k, rows.filler)
            made = change(artifact, path, some, bytes(32)).numpy().tobytes()
            wanted = wanted or made
            if made != wanted:
                return False
    return True


def accept(artifact: Artifact, path: Batched, rows: Rows) -> Agreement:
    """Raises ``ModelError`` ``model.native`` for an artifact that disagrees with the engine."""
    found = agreement(artifact, path, rows)
    if not found.good:
        raise refuse(f"The native step's sums differ from the engine's by {found.median:.1g}.")
    if not slots_alike(artifact, path, rows):
        raise refuse("The native step's bits depend on a record's slot.")
    return found


def subset(rows: Rows, units: np.ndarray[tuple[int], np.dtype[np.int64]]) -> Rows:
    """These units alone, in this order."""
    order = [rows.order[rows.starts[u] : rows.starts[u + 1]] for u in units]
    lengths = [0, *(len(part) for part in order)]
    return replace(rows, order=np.concatenate(order), starts=np.cumsum(lengths).astype(np.int64))
