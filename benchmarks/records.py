"""Microseconds of one record in the engine's path ``record``, by what it is spent on.

``python -m benchmarks.records [--format json]``: CPU time, the fastest of several rounds, since
another process can only add to it. One slot of a step is one line of each but the last two, which
are once a step.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from typing import Any, Final

import torch
from torch import nn

from casemate.client.torch import export
from casemate.engine import clip, grid, noise, optim, records
from casemate.engine.prepare import weights_of
from casemate.engine.program import Program
from casemate.graph import pack
from casemate.spec.job import Schedule, Sgd

ROWS: Final = 256
ROUNDS: Final = 9
CALLS: Final = 1000
MODELS: Final[dict[str, Callable[[], nn.Sequential]]] = {
    "logistic regression of the demo": lambda: nn.Sequential(nn.Linear(10, 2)),
    "MLP 30-64-2": lambda: nn.Sequential(nn.Linear(30, 64), nn.ReLU(), nn.Linear(64, 2)),
    "head of demo sms on kept features": lambda: nn.Sequential(nn.Linear(2688, 2)),
}


def micros(call: Callable[[], object]) -> float:
    """CPU microseconds of one call."""
    best = float("inf")
    for _ in range(ROUNDS):
        start = time.process_time()
        for _ in range(CALLS):
            call()
        best = min(best, time.process_time() - start)
    return round(best / CALLS * 1e6, 1)


def measure(module: nn.Sequential) -> dict[str, Any]:
    """The parts of a slot of ``module`` with two classes."""
    first = module[0]
    assert isinstance(first, nn.Linear)
    inputs = {
        "input": torch.rand(ROWS, first.in_features),
        "target": torch.randint(0, 2, (ROWS,)),
    }
    packed, _ = export(module, {k: v[:2] for k, v in inputs.items()}, loss="cross_entropy")
    graph, weights = pack.unpack(packed.data)
    program = Program(graph, weights_of(weights))
    gradients = records.record(program, inputs, ROWS, False)
    buffers = records.dummy(program)

    def read() -> None:
        for name, buffer in buffers.items():
            buffer.copy_(inputs[name][3:4])
        program.prefix(buffers)

    one = torch.empty(program.dimension)
    wide = torch.empty(program.dimension, dtype=torch.float64)
    total = torch.zeros(program.dimension, dtype=torch.int64)
    found: dict[str, Any] = {"dimension": program.dimension, "read the row": micros(read)}
    found["gradient by autograd"] = round(
        micros(lambda: gradients(3, one)) - found["read the row"], 1
    )
    if program.note(program.prefix({k: v[:1] for k, v in inputs.items()})):
        found["gradient replayed"] = round(
            micros(lambda: gradients(3, one)) - found["read the row"], 1
        )
    found["widen"] = micros(lambda: wide.zero_().add_(one))
    found["clip"] = micros(lambda: clip.clip(wide, 1.0))
    found["grid and sum"] = micros(lambda: total.add_(grid.to_grid(wide, 2.0**-30), alpha=1))
    update = optim.optimizer(Sgd(lr=0.1), Schedule(), 10, program.dimension)
    found["noise, once a step"] = micros(
        lambda: noise.gaussian(bytes(32), 0, program.dimension, 2.0**20)
    )
    found["update, once a step"] = micros(lambda: update(program.flat, one, 0))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--format", choices=("table", "json"), default="table")
    options = parser.parse_args()
    torch.set_num_threads(1)
    found = {name: measure(make()) for name, make in MODELS.items()}
    if options.format == "json":
        print(json.dumps(found, indent=2))
        return
    for name, parts in found.items():
        print(name)
        for part, value in parts.items():
            print(f"  {part:24}{value:10}{'' if part == 'dimension' else ' us'}")


if __name__ == "__main__":
    main()
