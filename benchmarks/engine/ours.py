"""The one place that knows how casemate's private step is entered."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from benchmarks.engine.workloads import CLIP, LEARNING_RATE, NOISE_MULTIPLIER, Workload

GRID: Final = 2.0**-20
# A job that is long enough for compiling to pay where it can.
LONG: Final = 10**6
COMPILE_SECONDS: Final = 600.0


def program_of(workload: Workload) -> tuple[Any, Any, dict[str, Any]]:
    """A workload as the engine has it: program, what admission found, records by input."""
    from casemate.client.torch import export
    from casemate.engine.prepare import weights_of
    from casemate.engine.program import Program
    from casemate.graph import check, pack

    module, (inputs, target) = workload.make(), workload.data()
    named = dict(zip(inspect.signature(module.forward).parameters, inputs, strict=True))
    packed, _ = export(module, {**named, "target": target}, loss="cross_entropy")
    graph, view = pack.unpack(packed.data)
    checked = check.check(graph, {name: info for name, (info, _) in view.items()})
    program = Program(graph, weights_of(view))
    records = {spec.name: {**named, "target": target}[spec.name] for spec in program.data}
    return program, checked, records


def casemate_step(workload: Workload) -> Callable[[], object]:
    """One private step of ``workload``: forward, backward, norms, clip, sum, noise, optimizer.

    Building it exports, proves, tries each kernel in every slot, chooses the ways of the norms and
    compiles what a long job would.
    """
    from casemate.engine import batched, noise, optim, train
    from casemate.engine.rows import Rows
    from casemate.engine.select import FORMED_BYTES
    from casemate.engine.sites import Shape
    from casemate.spec.job import Schedule, Sgd

    b = workload.batch
    program, checked, records = program_of(workload)
    path = batched.build(program, checked, records, Shape(b, 1), keep=False)
    path.settle(records)
    path.choose(path.operands_of(records), FORMED_BYTES)
    path.form()
    path.fuse(records, COMPILE_SECONDS, microbatches=LONG)
    rows = Rows(
        records, valid=np.ones(b, bool), order=np.arange(b), starts=np.arange(b + 1), per_unit=1
    )
    pieces = path.pieces(rows, CLIP, GRID, b)
    update = optim.optimizer(Sgd(lr=LEARNING_RATE), Schedule(), 10**6, program.dimension)
    chosen, key = np.arange(b), bytes(range(32))
    done = 0

    def add(step: int, first: int, total: npt.NDArray[np.int64]) -> None:
        noise.add_gaussian(total, key, step, NOISE_MULTIPLIER * CLIP / GRID, first)

    apply = train.applied(program.flat, add, update, GRID / b)

    def step() -> None:
        nonlocal done
        apply(pieces(chosen), done)
        done += 1

    return step
