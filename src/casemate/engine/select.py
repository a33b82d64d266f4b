"""Whether a job can take the path ``graph``, with how many rows at once, and whether it is right.

All of the choice follows from the graph, the schemas, the plan and the memory limit, so that a
second worker on another day makes the same one: the plan counts on its microbatch. What is timed
are only the ways of the norms, none of which changes what is certified.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

import numpy as np
import torch

from casemate.engine import batched, compiled, draws
from casemate.engine.batched import Batched
from casemate.engine.probe import STEP, entrywise
from casemate.engine.program import Program, uses
from casemate.engine.records import record
from casemate.engine.rows import Rows
from casemate.engine.sites import Shape
from casemate.engine.tape import Unfit
from casemate.graph.check import Checked
from casemate.graph.joint import Proved
from casemate.graph.model import Node
from casemate.spec.errors import ModelError
from casemate.spec.job import Views

# What the process holds before a job: Python, torch and its kernels.
BASE_BYTES: Final = 600 << 20
MOST_ROWS: Final = 1024
# Values of a microbatch that are about as quick as any: more costs memory, fewer costs calls.
_GOOD_BYTES: Final = 512 << 20
# Of formed gradients, over all tensors.
FORMED_BYTES: Final = 32 << 20
# Rows of a microbatch are a multiple of one of these: see :func:`tile`.
TILE: Final = 16
TILES: Final = (TILE, 32, STEP)
_FEW: Final = 32
_TIMED_SECONDS: Final = 0.2
_CHECKED_UNITS: Final = 4
_AGREE: Final = 1e-3
_NAMED: Final = 6


# What inductor takes, loaded.
COMPILER_BYTES: Final = 512 << 20


@dataclass(frozen=True, slots=True)
class Compile:
    """Whether islands are compiled (:mod:`casemate.engine.compiled`): ``wanted``, or ``None`` where
    that is decided here, by what it is likely to save. seconds: since the start of ``prepare``;
    nothing is begun after. background: while the run goes on without."""

    seconds: float = 0.0
    wanted: bool | None = None
    background: bool = False


@dataclass(frozen=True, slots=True)
class Job:
    """slots: units of a step. per_unit: rows of each. keep: whether the frozen prefix is worth
    keeping, in kept_bytes. each: whether tensors are clipped each by itself."""

    slots: int
    per_unit: int
    keep: bool
    kept_bytes: int
    each: bool = False


def graph(
    program: Program,
    checked: Checked,
    samples: Mapping[str, torch.Tensor],
    job: Job,
    most_bytes: int,
) -> tuple[Batched | None, tuple[str, ...]]:
    """The path, and how it is had, parameter by parameter; or ``None`` and why not.

    samples: made-up records by data input. most_bytes: what the path may take.
    """
    try:
        made = _fitting(program, checked, samples, job, most_bytes)
        if made is None:
            return None, ("record", "graph: a microbatch does not fit in memory")
        rows = tiled(samples, made.shape.rows)
        made.settle(rows)
        made.choose(made.operands_of(rows), min(most_bytes // 4, FORMED_BYTES), job.each)
        made.form()
        off = disagreement(made, samples)
    except (Unfit, ModelError) as e:
        return None, ("record", f"graph: {str(e)[:300]}")
    except Exception as e:  # an operation refused made-up records; the other path has no such needs
        return None, ("record", f"graph: {type(e).__name__}: {str(e)[:200]}")
    if not off <= _AGREE:
        return None, ("record", f"graph: its sums differ from one record per call by {off:.1g}")
    return made, ("graph", *_told(made), *(f"one record per call: {name}" for name in made.slow))


def compile_(
    made: Batched,
    samples: Mapping[str, torch.Tensor],
    how: Compile,
    seconds: float,
    microbatches: int,
    slot: float,
    room: int,
) -> bool:
    """Compile islands if that pays, by public values alone; returns whether it was begun.

    seconds: left. microbatches: of the run, each of ``slot`` seconds. room: bytes of memory left.
    """
    if how.wanted is False or seconds <= 0 or room < COMPILER_BYTES:
        return False
    if how.wanted is None and not compiled.could_pay(microbatches * slot):
        return False
    decide = microbatches if how.wanted is None else None
    rows = tiled(samples, made.shape.rows)
    return made.fuse(rows, seconds, microbatches=decide, background=how.background)


def _fitting(
    program: Program,
    checked: Checked,
    samples: Mapping[str, torch.Tensor],
    job: Job,
    most_bytes: int,
) -> Batched | None:
    """Built for as many rows as are good and fit."""
    k = job.per_unit
    noted, proved = batched.analyse(program, checked, samples)
    of_rows = tile(proved)
    least = of_rows // math.gcd(of_rows, k)  # units
    few = Batched(program, noted, proved, Shape(least * k, k), job.keep)
    unit = _bytes(few, samples) / least
    fit = int((most_bytes - (job.kept_bytes if job.keep else 0)) / unit)
    most = min(fit, max(least, min(MOST_ROWS // k, int(_GOOD_BYTES / unit)))) // least * least
    if most < least:
        return None
    most = min(most, -(-job.slots // least) * least)
    # The fewest slots that nobody may fill, then the fewest calls.
    sizes = range(most, max(least, most // 2) - 1, -least)
    units = min(sizes, key=lambda u: -(-job.slots // u) * u)
    return Batched(program, noted, proved, Shape(units * k, k), job.keep)


def tile(proved: Proved) -> int:
    """The number of :data:`TILES` of which a microbatch's rows should be a multiple.

    At 64 no loop over memory has a ragged end among records. With fewer, operations entry by entry
    whose entries do not fill whole vectors are copied to where they do
    (:func:`casemate.engine.probe.evenly`), so any number is sound: the least is taken at which that
    is a small part of the graph's entries.
    """
    values = proved.values

    def outs(node: Node) -> list[str]:
        return [node.name] if node.name in values else [
            f"{node.name}.{i}" for i in range(9) if f"{node.name}.{i}" in values
        ]  # fmt: skip

    sizes, every = [], 0
    for node in proved.joint.nodes:
        made = [values[o] for o in outs(node) if values[o].batch is not None]
        every += sum(v.numel for v in made)
        given = [values[n].dims for n in uses(node)]
        if entrywise(node, given, [v.dims for v in made]):
            sizes.append(made[0].numel)
    for rows in TILES[:-1]:
        if _FEW * sum(f for f in sizes if rows * f % STEP) <= every:
            return rows
    return TILES[-1]


def _told(made: Batched) -> list[str]:
    """Which tensors' norms are had which way, a line for each way."""
    tensors = {f"p{i}": spec.tensor for i, spec in enumerate(made.program.trained)}
    by_way: dict[str, list[str]] = {}
    for site in made.sites:
        by_way.setdefault(site.way.name, []).append(tensors[site.name])
    return [
        f"{way}: {', '.join(names[:_NAMED])}"
        + (f" and {len(names) - _NAMED} more" if len(names) > _NAMED else "")
        for way, names in by_way.items()
    ]


def tiled(samples: Mapping[str, torch.Tensor], rows: int) -> dict[str, torch.Tensor]:
    """The records over and over, that many."""
    return {k: v[torch.arange(rows) % len(v)] for k, v in samples.items()}


def _bytes(made: Batched, samples: Mapping[str, torch.Tensor]) -> int:
    """Of all values of a microbatch, were none let go of."""
    env = made.values(tiled(samples, made.shape.rows))
    held = {
        s.data_ptr(): s.nbytes()
        for name, t in env.items()
        if isinstance(t, torch.Tensor) and name not in made.runner.fixed
        for s in [t.untyped_storage()]
    }
    return sum(held.values())


def made_up(samples: Mapping[str, torch.Tensor], units: int, k: int) -> Rows:
    """Units of k rows, of these over and over."""
    count = units * k
    return Rows(
        tiled(samples, count), np.ones(count, dtype=bool), np.arange(count),
        np.arange(0, count + 1, k), k, {name: t[:1] for name, t in samples.items()},
    )  # fmt: skip


def disagreement(made: Batched, samples: Mapping[str, torch.Tensor]) -> float:
    """Of the clipped sum of a few made-up units from that of the path ``record``, as a part of the
    clip, which half of them keep to."""
    program, k = made.program, made.shape.per_unit
    rows = made_up(samples, _CHECKED_UNITS, k)
    gradients = record(program, rows.inputs, rows.count, False)
    one = torch.empty(program.dimension)
    unit = one if k == 1 else torch.empty(program.dimension)

    def alone(i: int) -> torch.Tensor:
        """A unit's gradient: had twice, and not kept, since it may be as large as all else."""
        for row in range(k):
            gradients(i * k + row, one)
            if k > 1:
                unit.copy_(one) if row == 0 else unit.add_(one)
        return unit

    norms = torch.tensor([_norm(alone(i)) for i in range(_CHECKED_UNITS)], dtype=torch.float64)
    finite = torch.isfinite(norms)
    bound = 1.0
    if bool(finite.any()):
        # Made-up rows may saturate a model: beside the others' their gradients are nothing, and a
        # factor that small is zero.
        bound = max(float(norms[finite].median()), 2.0**-20 * float(norms[finite].max())) or 1.0
    sums = made.sums(rows, bound, 0.0, made.shape.units)
    off = sums(np.arange(_CHECKED_UNITS))
    for i, norm in enumerate(norms.tolist()):
        if math.isfinite(norm):
            off.sub_(alone(i), alpha=min(1.0, bound / norm) if norm else 1.0)
    return _norm(off) / bound


def _norm(t: torch.Tensor) -> float:
    return float(torch.linalg.vector_norm(t, dtype=torch.float64))


def times(made: Batched, samples: Mapping[str, torch.Tensor], views: Views) -> tuple[float, float]:
    """Seconds of a microbatch with its draws, and of one row's prefix where that is kept."""
    units, program = made.shape.units, made.program
    given = {s.name: samples[s.name] for s in program.data if s.kind == "data"}
    rows = made_up(given, units, made.shape.per_unit // views.count)
    drawn = draws.of_job(bytes(32), rows, program.data, views)
    start = time.perf_counter()
    sums = made.sums(rows, 1.0, 2.0**-20, units, drawn=drawn)
    prefix = (time.perf_counter() - start) / rows.count
    chosen = np.arange(units)
    taken: list[float] = []
    while sum(taken) < _TIMED_SECONDS or len(taken) < 2:
        start = time.perf_counter()
        sums(chosen)
        taken.append(time.perf_counter() - start)
    return statistics.median(taken), prefix
