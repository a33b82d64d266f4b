"""A quoted job's native step: from the packed model and the plan to an accepted artifact."""

from __future__ import annotations

import platform
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

import torch

from casemate.engine import batched, native, prepare, select
from casemate.engine.aot import build, check, step
from casemate.engine.aot.build import Artifact, refuse
from casemate.engine.batched import Batched
from casemate.engine.program import Program
from casemate.engine.rows import Rows
from casemate.engine.sites import Shape
from casemate.engine.tape import Unfit
from casemate.graph import check as graph_check
from casemate.graph import pack
from casemate.spec.data import DatasetSchema
from casemate.spec.job import Dp, InputBinding, Plan, TrainSpec

_TIMED_SECONDS: Final = 0.2
_MOST_STEPS: Final = 1 << 16


@dataclass(frozen=True, slots=True)
class Made:
    """An accepted artifact and what it was made of.

    ways: by trained tensor with a gradient, how its norms are had: with these the same inputs give
    the same bytes. agreement: with the engine, by the path and on the made-up units of rows.
    """

    artifact: Artifact
    ways: tuple[str, ...]
    agreement: check.Agreement
    path: Batched
    rows: Rows

    @property
    def bytes(self) -> int:
        """Of memory that a run takes at most, beside its rows: all values of a microbatch, and
        weights, sums, averages and an optimizer's state by trained scalar."""
        return select._bytes(self.path, self.rows.inputs) + 48 * self.path.program.dimension

    def seconds(self) -> float:
        """Of a step of two microbatches, measured: a long run's time less a short one's."""
        once, more = check.seconds(self.artifact, self.path, self.rows, 1), 1
        taken = 0.0
        while taken < _TIMED_SECONDS and more < _MOST_STEPS:
            more *= 4
            taken = check.seconds(self.artifact, self.path, self.rows, 1 + more) - once
        return max(0.0, taken / more)

    def manifest(self, plan: Plan) -> dict[str, object]:
        """What an artifact is remade from, beside the packed model."""
        made = self.artifact.step
        return {
            "artifact": self.artifact.digest,
            "bytes": len(self.artifact.program),
            "model": plan.model_digest,
            "clip": made.clip,
            "grid": made.grid,
            "rows": made.rows,
            "rows_per_unit": made.per_unit,
            "ways": list(self.ways),
            "torch": torch.__version__,
            "compiler": native.version(native.compiler()).decode().splitlines()[0],
            "cpu": native.cpu_digest(),
            "machine": platform.machine(),
            "differs": self.agreement.median,
        }


def make(
    packed: bytes,
    plan: Plan,
    train: TrainSpec,
    schemas: Sequence[DatasetSchema],
    inputs: Sequence[InputBinding],
    ways: Sequence[str] | None = None,
) -> Made:
    """Compile the step of ``plan`` and try it (:func:`casemate.engine.aot.check.accept`).

    ways: as of a :class:`Made`, to make the same again; ``None``: as the engine chooses by timing.
    Raises ``ModelError``: as admission does, or ``model.native`` for what only the engine can run.
    """
    asked = train.privacy
    if not isinstance(asked, Dp) or asked.clipping != "flat":
        raise refuse("A native step is private, and clips each unit once (flat).")
    if train.views.count > 1 or train.views.transforms:
        raise refuse("A native step has no views.")
    path, rows = _path(packed, plan, schemas, inputs)
    records = {name: t[: path.shape.rows] for name, t in rows.inputs.items()}
    with torch.inference_mode():
        path.settle(records, last=False)
        if ways is None:
            path.choose(path.operands_of(records), select.FORMED_BYTES)
        else:
            _take(path, ways)
    taken = tuple(site.way.name for site in path.sites)
    if "loop" in taken:
        tensor = path.program.trained[taken.index("loop")].tensor
        raise refuse(f"The gradient of {tensor!r} is had one record at a time.")
    artifact = build.build(step.of(path, plan.clip, plan.grid))
    return Made(artifact, taken, check.accept(artifact, path, rows), path, rows)


def _path(
    packed: bytes, plan: Plan, schemas: Sequence[DatasetSchema], inputs: Sequence[InputBinding]
) -> tuple[Batched, Rows]:
    """The path ``graph`` at the plan's microbatch, and made-up units to try it on."""
    graph, view = pack.unpack(packed)
    bounds = graph_check.known_bounds(graph, view, inputs, schemas)
    checked = graph_check.check(graph, {n: info for n, (info, _) in view.items()}, bounds=bounds)
    program = Program(graph, prepare.weights_of(view))
    if program.random:
        raise refuse(
            "A native step has no random inputs (dropout).",
            mend='Quote it with dropout=False, or let the engine train: runtime="torch".',
        )
    k = max(schema.rows_per_unit for schema in schemas)
    shape = Shape(plan.microbatch * k, k)
    samples = prepare.samples(program, schemas, inputs, max(2 * shape.rows, 3))
    try:
        path = batched.build(program, checked, samples, shape, keep=False)
    except Unfit as e:
        raise refuse(f"The model does not take the path graph: {str(e)[:300]}") from None
    return path, select.made_up(samples, len(next(iter(samples.values()))) // k, k)


def _take(path: Batched, ways: Sequence[str]) -> None:
    found = [{w.name: w for w in site.ways} for site in path.sites]
    if len(ways) != len(found) or any(w not in by for w, by in zip(ways, found, strict=True)):
        raise refuse("The ways are not of this model.", mend="Build it without a manifest.")
    for site, name, by in zip(path.sites, ways, found, strict=True):
        site.settle(by[name])
