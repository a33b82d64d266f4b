"""Small graphs, tables and plans for the engine's tests, made by hand."""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
import math
import os
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from casemate.engine import grid, rows
from casemate.engine import train as train_
from casemate.graph import pack
from casemate.graph.model import Graph, InputSpec, ListArg, Node, Ref, Size
from casemate.seal import stream
from casemate.spec import tensors
from casemate.spec.data import Column, DatasetSchema
from casemate.spec.job import (
    Adam,
    Dp,
    DpEvent,
    Execution,
    InputBinding,
    NonPrivate,
    Plan,
    Sgd,
    TrainSpec,
)
from casemate.spec.messages import Prepare, Prepared, Run, RunDataset

WIRE = {
    torch.float32: "f32",
    torch.int64: "i64",
    torch.int32: "i32",
    torch.uint8: "u8",
    torch.bool: "bool",
}


def to_wire(values: dict[str, torch.Tensor]) -> bytes:
    return tensors.dump(
        {
            n: (WIRE[t.dtype], tuple(t.shape), t.contiguous().numpy().tobytes())
            for n, t in values.items()
        }
    )


def node(name: str, op: str, *args: Any, **kwargs: Any) -> Node:
    """A node; strings starting with % are references."""

    def arg(x: Any) -> Any:
        if isinstance(x, str) and x.startswith("%"):
            return Ref(name=x[1:])
        return ListArg(items=tuple(arg(y) for y in x)) if isinstance(x, list) else x

    return Node(
        name=name, op=op, args=tuple(map(arg, args)), kwargs={k: arg(v) for k, v in kwargs.items()}
    )


def param(name: str, *shape: int, kind: str = "param") -> InputSpec:
    return InputSpec(name=name, kind=kind, dtype="f32", shape=shape, tensor=name)


def data(name: str, dtype: str, *shape: int) -> InputSpec:
    return InputSpec(name=name, kind="data", dtype=dtype, shape=(Size(a=1), *shape))


def mlp(
    sizes: Sequence[int], seed: int = 0, frozen: int = 0
) -> tuple[Graph, dict[str, torch.Tensor]]:
    """ReLU MLP with cross entropy over ``sizes[-1]`` classes; the first ``frozen`` layers stay."""
    made = torch.Generator().manual_seed(seed)
    inputs, nodes, weights, at = [], [], {}, "x"
    layers = list(itertools.pairwise(sizes))
    for i, (a, b) in enumerate(layers):
        kind = "frozen" if i < frozen else "param"
        inputs += [param(f"w{i}", b, a, kind=kind), param(f"b{i}", b, kind=kind)]
        weights[f"w{i}"] = torch.randn(b, a, generator=made) / math.sqrt(a)
        weights[f"b{i}"] = torch.randn(b, generator=made) * 0.1
        nodes.append(node(f"h{i}", "aten.linear.default", f"%{at}", f"%w{i}", f"%b{i}"))
        at = f"h{i}"
        if i < len(layers) - 1:
            nodes.append(node(f"r{i}", "aten.relu.default", f"%{at}"))
            at = f"r{i}"
    nodes.append(node("loss", "aten.cross_entropy_loss.default", f"%{at}", "%y", None, 0))
    inputs += [data("x", "f32", sizes[0]), data("y", "i64")]
    return Graph(inputs=tuple(inputs), nodes=tuple(nodes), loss="loss"), weights


def schema(
    features: int,
    classes: int,
    count: int,
    *,
    units: int | None = None,
    k: int = 1,
    name: str = "t",
) -> DatasetSchema:
    columns = [
        Column(name="x", dtype="f32", shape=(features,), low=-4.0, high=4.0),
        Column(name="y", dtype="i64", low=0, high=classes - 1, role="label"),
    ]
    if units is not None:
        columns.append(Column(name="who", dtype="i64", low=0, high=units - 1, role="unit"))
    return DatasetSchema(
        name=name, columns=tuple(columns), rows=count, units=units or count, rows_per_unit=k
    )


def table(of: DatasetSchema, seed: int = 0) -> dict[str, torch.Tensor]:
    """Rows within the schema's bounds; the class depends on the features."""
    made = torch.Generator().manual_seed(seed)
    features, classes = of.columns[0].shape[0], int(of.columns[1].high or 0) + 1
    x = torch.randn(of.rows, features, generator=made).clamp(-4, 4)
    slope = torch.randn(features, classes, generator=torch.Generator().manual_seed(99))
    out = {"x": x, "y": (x @ slope).argmax(1)}
    if of.unit_column is not None:
        out["who"] = torch.randint(0, of.units, (of.rows,), generator=made)
    return out


BINDINGS = (InputBinding(input="x", columns=("x",)), InputBinding(input="y", columns=("y",)))


def rows_of(*pairs: tuple[DatasetSchema, dict[str, torch.Tensor]], graph: Graph) -> rows.Rows:
    specs = [i for i in graph.inputs if i.kind == "data"]
    return rows.assemble([s for s, _ in pairs], [t for _, t in pairs], specs, BINDINGS)


def spec_of(
    batch: int, steps: int, *, clip: float = 1.0, private: bool = True, optimizer: Any = None,
    form: str = "flat", gamma: float = 0.01, **more: Any,
) -> TrainSpec:  # fmt: skip
    """``form``: of the clip; ``more``: other fields of ``TrainSpec``."""
    clipping: Any = form
    return TrainSpec(
        batch_size=batch,
        steps=steps,
        privacy=Dp(epsilon=3.0, delta=1e-5, clip=clip, clipping=clipping, gamma=gamma)
        if private
        else NonPrivate(words="we all agree"),
        optimizer=optimizer or Sgd(lr=0.5),
        **more,
    )


def plan_of(
    train: TrainSpec, units: int, dimension: int, *, slots: int | None = None, noise: float = 1.0
) -> Plan:
    """A sound plan made by hand; its noise is not calibrated to any epsilon."""
    private = isinstance(train.privacy, Dp)
    asked = train.privacy if isinstance(train.privacy, Dp) else None
    bound = asked.clip if asked else 1.0
    step = 2.0 ** math.floor(math.log2(bound * 2.0**-20 / math.sqrt(dimension)))
    sensitivity = grid.sensitivity(bound, dimension, step)
    rate = min(1.0, train.batch_size / units)
    expected = rate * units
    count = slots or min(units, math.ceil(expected + 8 * math.sqrt(expected) + 8))
    event = DpEvent(rate=rate, noise_multiplier=noise, steps=train.steps)
    return Plan(
        request_digest="sha256:" + "0" * 64,
        model_digest="sha256:" + "0" * 64,
        private=private,
        units=units,
        rate=rate,
        steps=train.steps,
        clip=bound,
        normaliser=float(train.batch_size),
        sensitivity=sensitivity if private else 0.0,
        noise_multiplier=noise if private else 0.0,
        sigma=noise * sensitivity if private else 0.0,
        grid=step,
        microbatch=1,
        microbatches=count,
        events=(event,) if private else (),
        delta_truncation=1e-9,
        delta_sampler=1e-12,
        clipping=asked.clipping if asked else "flat",
        gamma=asked.gamma if asked and asked.clipping == "automatic" else 0.0,
    )


def fitted(plan: Plan, prepared: Prepared) -> Plan:
    """The plan on the path and in the microbatches that were prepared."""
    bound = train_.SENSITIVITY[prepared.path[0]](plan.clip, prepared.dimension, plan.grid)
    return dataclasses.replace(
        plan,
        microbatch=prepared.microbatch,
        microbatches=math.ceil(plan.microbatches / prepared.microbatch),
        sensitivity=bound * plan.private,
        sigma=bound * plan.noise_multiplier,
    )


def run_of(prepare: Prepare, prepared: Prepared, wire: bytes, key: bytes, salt: bytes) -> Run:
    """The message that runs what was prepared on one table, in the worker that prepared it."""
    (schema,) = prepare.schemas
    plan = fitted(plan_of(prepare.train, schema.units, prepared.dimension), prepared)
    return Run(
        plan=dataclasses.replace(plan, model_digest=prepare.model_digest),
        execution=Execution(path=prepared.path[0], compiled=prepared.compiled),
        datasets=(RunDataset(dataset=commitment(salt, wire), schema=schema, key=key, salt=salt),),
    )


def packed(graph: Graph, weights: dict[str, torch.Tensor]) -> bytes:
    return pack.pack(
        graph,
        {
            n: (WIRE[t.dtype], tuple(t.shape), t.contiguous().numpy().tobytes())
            for n, t in weights.items()
        },
    ).data


def sealed_fd(key: bytes, plain: bytes) -> int:
    """A memfd with the sealed stream."""
    fd = os.memfd_create("sealed", os.MFD_CLOEXEC)
    for part in stream.encrypt(key, [plain]):
        os.write(fd, part)
    os.lseek(fd, 0, os.SEEK_SET)
    return fd


def commitment(salt: bytes, wire: bytes) -> str:
    return "ds_" + hashlib.sha256(b"casemate/dataset/v1\0" + salt + wire).hexdigest()[:40]


def no_noise(step: int, first: int, total: np.ndarray) -> None:
    """Adds nothing."""


__all__ = [name for name in dir() if not name.startswith("_")] + ["Adam", "Sgd"]
