"""One job through the engine itself: export, prepare, plan, train; in one process, no server.

The plan's noise, the sampling and the accounting are those of every job. Only the transport, the
sandbox and the ledger are left out; ``make demo`` and ``make bench-overhead`` show those.
"""

from __future__ import annotations

import os
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final, Literal

import torch
from torch import Tensor, nn

from casemate.accounting import rdp
from casemate.client.torch import export, load_weights
from casemate.engine import prepare, rows, train
from casemate.plan.compile import compile_plan
from casemate.spec.data import Column, DatasetSchema
from casemate.spec.job import (
    DatasetUse,
    Dp,
    Execution,
    JobRequest,
    NonPrivate,
    Schedule,
    Sgd,
    TrainSpec,
)  # fmt: skip

DELTA: Final = 1e-5
MEMORY: Final = 8 << 30
_CHUNK: Final = 64


@dataclass(frozen=True)
class Recipe:
    """How a head is trained. The learning rate is ``lr`` times epsilon, at most ``lr_most``, since
    the noise of a step falls as epsilon rises; ``lr_plain`` without privacy."""

    batch: int
    steps: int
    clip: float
    lr: float
    lr_most: float
    lr_plain: float
    momentum: float = 0.9
    schedule: Literal["constant", "linear", "cosine", "step"] = "linear"

    def spec(self, epsilon: float | None, units: int) -> TrainSpec:
        """``epsilon=None``: without privacy."""
        lr = self.lr_plain if epsilon is None else min(self.lr * epsilon, self.lr_most)
        return TrainSpec(
            batch_size=min(self.batch, units),
            steps=self.steps,
            privacy=NonPrivate(words="benchmark on public data")
            if epsilon is None
            else Dp(epsilon=epsilon, delta=DELTA, clip=self.clip),
            optimizer=Sgd(lr=lr, momentum=self.momentum),
            schedule=Schedule(kind=self.schedule),
        )


@dataclass(frozen=True)
class Part:
    """Records: graph inputs by name, and ``target`` (n,) int64."""

    inputs: dict[str, Tensor]
    target: Tensor

    def __len__(self) -> int:
        return len(self.target)

    def of(self, places: Any) -> Part:
        return Part({k: v[places] for k, v in self.inputs.items()}, self.target[places])


@dataclass(frozen=True)
class Result:
    """``accuracy`` on the part that was held out; ``epsilon`` is what was asked for, ``spent`` that
    of the plan's events by its RDP curve alone, without the filter's reserve."""

    epsilon: float | None
    spent: float | None
    noise_multiplier: float
    accuracy: float
    seconds: float
    dimension: int
    path: tuple[str, ...]


def schema_of(part: Part, bounds: Mapping[str, tuple[float, float]], classes: int) -> DatasetSchema:
    """The declaration that an owner would give: bounds and classes known in advance."""
    wire: dict[torch.dtype, Any] = {
        torch.float32: "f32",
        torch.uint8: "u8",
        torch.int64: "i64",
        torch.int32: "i32",
    }
    columns = [
        Column(
            name=name,
            dtype=wire[tensor.dtype],
            shape=tuple(tensor.shape[1:]),
            low=bounds[name][0],
            high=bounds[name][1],
        )
        for name, tensor in part.inputs.items()
    ]
    label = Column(name="target", dtype="i64", low=0, high=classes - 1, role="label")
    return DatasetSchema(
        name="benchmark", columns=(*columns, label), rows=len(part), units=len(part)
    )


@torch.no_grad()
def features(module: nn.Module, part: Part) -> Part:
    """The records with ``module``'s output in place of their inputs, as an owner may compute it at
    home: a frozen function of one record, so that training on it is the same job."""
    module.eval()
    found = [
        module(**{k: v[i : i + _CHUNK] for k, v in part.inputs.items()})
        for i in range(0, len(part), _CHUNK)
    ]
    return Part({"input": torch.cat(found)}, part.target)


@torch.no_grad()
def accuracy(module: nn.Module, part: Part) -> float:
    """The share of records whose largest score is their class."""
    module.eval()
    right = 0
    for i in range(0, len(part), _CHUNK):
        scores = module(*(v[i : i + _CHUNK] for v in part.inputs.values()))
        right += int((scores.argmax(1) == part.target[i : i + _CHUNK]).sum())
    return right / len(part)


def run(
    module: nn.Module,
    own: Part,
    held_out: Part,
    recipe: Recipe,
    epsilon: float | None,
    bounds: Mapping[str, tuple[float, float]],
    classes: int,
) -> Result:
    """Train ``module`` on ``own`` by the engine, in place, and judge it on ``held_out``."""
    start = time.perf_counter()
    schema = schema_of(own, bounds, classes)
    packed, bindings = export(module, schema, loss="cross_entropy")
    spec = recipe.spec(epsilon, schema.units)
    ready = prepare.prepare(packed.data, packed.digest, (schema,), bindings, spec, MEMORY)
    request = JobRequest(
        job="job_" + "0" * 32,
        scientist="benchmark",
        datasets=(DatasetUse(dataset="benchmark", policy_digest="", epoch=0),),
        model_digest=packed.digest,
        inputs=bindings,
        train=spec,
    )
    plan = compile_plan(request, (schema,), ready.prepared)
    table = {**own.inputs, "target": own.target}
    made = rows.assemble((schema,), (table,), ready.program.data, bindings)
    trained = train.train(
        plan, Execution(path=ready.path), spec, ready.program, made, os.urandom(32),
        keep=ready.keep, fast=ready.fast,
    )  # fmt: skip
    load_weights(module, trained)
    spent = None
    if epsilon is not None:
        (event,) = plan.events
        spent = rdp.epsilon(rdp.curve(event), DELTA)
    return Result(
        epsilon=epsilon,
        spent=spent,
        noise_multiplier=plan.noise_multiplier,
        accuracy=accuracy(module, held_out),
        seconds=round(time.perf_counter() - start, 1),
        dimension=ready.program.dimension,
        path=ready.prepared.path,
    )
