"""Jobs of the real engine, small enough to run by the thousand.

``prepare``, ``compile_plan``, ``assemble`` and ``train.start`` are the worker's own. A *meter* is a
model whose gradient of a record is the record itself, whatever the weights are: with it a check
knows what every unit should add.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import hashlib
import io
import math
import pickle
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Final
from unittest import mock

import numpy as np
import torch
from torch import Tensor, nn

from casemate.client.torch import export
from casemate.engine import prepare as prepare_
from casemate.engine import rows as rows_
from casemate.engine import state, train
from casemate.engine.program import DTYPES
from casemate.engine.rows import Rows
from casemate.plan import compile as plans
from casemate.spec.data import Column, DatasetSchema
from casemate.spec.job import (
    DatasetUse,
    Dp,
    Execution,
    JobRequest,
    Plan,
    Sgd,
    TrainSpec,
)

LARGEST: Final = 1e30
Table = dict[str, Tensor]


def key_of(*parts: object) -> bytes:
    """A key for these parts: chance that a seed brings back."""
    return hashlib.sha256(repr(parts).encode()).digest()


def rng_of(*parts: object) -> np.random.Generator:
    return np.random.default_rng(np.frombuffer(key_of(*parts), dtype="<u4"))


class Meter(nn.Module):
    """Trained tensors of these sizes; a record's gradient is gain times the record."""

    def __init__(self, sizes: Sequence[int] = (8,), gain: float = 1.0, start: float = 0.0) -> None:
        super().__init__()
        self.sizes, self.gain = list(sizes), gain
        self.w = nn.ParameterList(nn.Parameter(torch.full((n,), start)) for n in sizes)
        self.register_buffer("calm", torch.ones(3))

    def forward(self, x: Tensor) -> Tensor:
        parts = torch.split(x, self.sizes, 1)
        out = [(p * self.gain * w).sum(1) for p, w in zip(parts, self.w, strict=True)]
        return torch.stack(out, 1)


class Line(nn.Module):
    """A meter of one matrix, which the engine's smallest native step takes."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.zeros(1, size))

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x, self.w)


class Wide(nn.Module):
    """More entries than one window, in tensors of odd sizes: noise is what is looked at."""

    SIZES: Final = (1, 5, 301, 70_003, 3)

    def __init__(self) -> None:
        super().__init__()
        self.w = nn.ParameterList(nn.Parameter(torch.zeros(n)) for n in self.SIZES)

    def forward(self, x: Tensor) -> Tensor:
        return torch.stack([x[:, i] * w.sum() for i, w in enumerate(self.w)], 1)


class Net(nn.Module):
    """Matrices used on several tokens, a norm, a scalar: what real models are made of."""

    def __init__(self) -> None:
        super().__init__()
        made = torch.Generator().manual_seed(3)
        self.a = nn.Parameter(torch.randn(6, 4, generator=made) * 0.5)
        self.b = nn.Parameter(torch.randn(2, 18, generator=made) * 0.5)
        self.norm = nn.LayerNorm(6)
        self.scale = nn.Parameter(torch.tensor(0.7))

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm((x.view(-1, 3, 4) @ self.a.t()).tanh()) * self.scale
        return y.flatten(1) @ self.b.t()


class Drops(nn.Module):
    """A meter behind dropout: what is drawn belongs to a unit, not to its company."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.w, self.drop = nn.Parameter(torch.zeros(size)), nn.Dropout(0.5)
        self.size = size

    def forward(self, x: Tensor) -> Tensor:
        return self.drop(x * self.w).sum(1, keepdim=True)


class Amplifier(nn.Module):
    """Rule P13's hostile model: tanh(1e12 (x@W - sum x W)) w is rounding made into a signal."""

    def __init__(self, size: int) -> None:
        super().__init__()
        made = torch.Generator().manual_seed(5)
        self.register_buffer("m", torch.randn(13, size, generator=made))
        self.v = nn.Parameter(torch.randn(13, generator=made))

    def forward(self, x: Tensor) -> Tensor:
        off = x @ self.m.t() - (x.unsqueeze(1) * self.m).sum(2)
        return torch.tanh(off * 1e12) * self.v


def total(outputs: Tensor, target: Tensor) -> Tensor:
    """The loss of a meter: what the target holds moves the loss and no gradient."""
    return outputs.flatten(1).sum(1) + target


# What features of each kind may be.
BOUNDS: Final = {"f32": (-LARGEST, LARGEST), "i32": (-100, 100), "u8": (0, 200)}


def schema_of(
    size: int | tuple[int, ...],
    rows: int,
    *,
    units: int | None = None,
    k: int = 1,
    dtype: Any = "f32",
) -> DatasetSchema:
    shape = size if isinstance(size, tuple) else (size,)
    low, high = BOUNDS[dtype]
    columns = [
        Column(name="x", dtype=dtype, shape=shape, low=low, high=high),
        Column(name="target", dtype="f32", low=-LARGEST, high=LARGEST),
    ]
    if units is not None:
        columns.append(Column(name="who", dtype="i64", low=0, high=units - 1, role="unit"))
    return DatasetSchema(
        name="audit", columns=tuple(columns), rows=rows, units=units or rows, rows_per_unit=k
    )


@dataclasses.dataclass
class Job:
    """A job that is prepared and planned; each run begins with the model's own weights."""

    schema: DatasetSchema
    spec: TrainSpec
    ready: prepare_.Ready
    plan: Plan
    inputs: Any
    initial: Tensor
    request: JobRequest

    @property
    def path(self) -> str:
        return self.ready.path

    @property
    def rate(self) -> float:
        """The learning rate, by which an update is a gradient."""
        return float(self.spec.optimizer.lr)

    def rows(self, table: Table) -> Rows:
        return rows_.assemble((self.schema,), (table,), self.ready.program.data, self.inputs)

    def start(self, table: Table, key: bytes) -> train.Run:
        """A run from the first weights: the worker's own call."""
        return self.start_of(self.rows(table), key)

    def start_of(
        self,
        rows: Rows,
        key: bytes,
        plan: Plan | None = None,
        source: state.Source | None = None,
    ) -> train.Run:
        with torch.no_grad():
            self.ready.program.flat.copy_(self.initial)
        return train.start(
            plan or self.plan, Execution(path=self.path), self.spec, self.ready.program, rows, key,
            keep=self.ready.keep, fast=self.ready.fast, source=source,
        )  # fmt: skip

    def flat(self) -> np.ndarray:
        """The weights as they are, float64 (d,)."""
        return self.ready.program.flat.detach().numpy().astype(np.float64)

    def step(self, table: Table, key: bytes) -> np.ndarray:
        """What one step of plain SGD releases, as a sum in gradient units: (d,)."""
        return self.step_of(self.rows(table), key)

    def step_of(self, rows: Rows, key: bytes) -> np.ndarray:
        self.start_of(rows, key)(0)
        before = self.initial.numpy().astype(np.float64)
        return (before - self.flat()) * self.plan.normaliser / self.rate

    def slack(self) -> float:
        """What float32 weights may hide of a sum's norm, in gradient units."""
        largest = float(np.abs(self.flat()).max()) + float(self.initial.abs().max())
        ulps = 4 * 2.0**-24 * largest * math.sqrt(len(self.initial))
        return ulps * self.plan.normaliser / self.rate + 1e-12


def job(
    module: nn.Module,
    schema: DatasetSchema,
    *,
    batch: int,
    steps: int = 1,
    noise: float | None = 1.0,
    epsilon: float = 1000.0,
    delta: float = 1e-5,
    clip: float = 1.0,
    form: str = "flat",
    gamma: float | None = None,
    path: str = "auto",
    loss: Any = total,
    grid: float = 0.0,
    lr: float | None = None,
    few: int = 0,
    dropout: bool = False,
    optimizer: Any = None,
    **more: Any,
) -> Job:
    """A job as a worker has it. noise: the multiplier; ``None``: for epsilon, by the filter. grid:
    in place of the plan's own, with what follows from it. lr: by default the normaliser, so that
    an update is a sum. few: rows of a microbatch at most, on the path ``graph``."""
    made: Any = form
    spec = TrainSpec(
        batch_size=batch,
        steps=steps,
        privacy=Dp(epsilon=epsilon, delta=delta, clip=clip, clipping=made, gamma=gamma or clip / 4),
        optimizer=optimizer or Sgd(lr=float(batch) if lr is None else lr),
        **more,
    )
    features = schema.columns[0]
    sample = {"x": torch.zeros(3, *features.shape), "target": torch.zeros(3)}
    sample["x"] = sample["x"].to(DTYPES[features.dtype])
    packed, inputs = exported(module, sample, loss=loss, dropout=dropout)
    digest = "sha256:" + hashlib.sha256(packed.data).hexdigest()
    with rows_at_most(few):
        ready = prepare_.prepare(packed.data, digest, (schema,), inputs, spec, 4 << 30, path)
    request = JobRequest(
        job="job_" + "0" * 32,
        scientist="audit",
        datasets=(DatasetUse(dataset="data", policy_digest="sha256:" + "0" * 64, epoch=0),),
        model_digest=digest,
        inputs=inputs,
        train=spec,
    )
    plan = plans.compile_plan(request, (schema,), ready.prepared, noise)
    if grid:
        bound = train.SENSITIVITY[ready.path](plan.clip, ready.program.dimension, grid)
        sigma = bound * plan.noise_multiplier * (1 + 2.0**-40)
        plan = dataclasses.replace(plan, grid=grid, sensitivity=bound, sigma=sigma)
    initial = ready.program.flat.detach().clone()
    return Job(schema, spec, ready, plan, inputs, initial, request)


_exported: dict[bytes, Any] = {}


def exported(module: nn.Module, sample: Table, **how: Any) -> Any:
    """``export``, once a process for models that are alike: it takes ten times as long as all that
    a worker does then, and no seeded bug is in it."""
    alike = io.BytesIO()
    shapes = {name: (str(t.dtype), tuple(t.shape)) for name, t in sample.items()}
    try:
        _Alike(alike).dump((module, shapes, sorted(how.items())))
    except (AttributeError, pickle.PicklingError):  # a class or a loss that has no name
        return export(module, sample, **how)
    if alike.getvalue() not in _exported:
        _exported[alike.getvalue()] = export(module, sample, **how)
    return _exported[alike.getvalue()]


class _Alike(pickle.Pickler):
    """Tensors by what they hold: torch's own way has their addresses in it."""

    def persistent_id(self, given: Any) -> Any:
        if not isinstance(given, Tensor):
            return None
        held = given.detach().contiguous().numpy().tobytes()
        return type(given).__name__, given.requires_grad, str(given.dtype), given.shape, held


@contextlib.contextmanager
def rows_at_most(few: int) -> Iterator[None]:
    """Microbatches of so few rows, so that a step has several; 0: as it is. What a quote says of
    seconds is measured briefly, for nothing depends on it."""
    from casemate.engine import select

    with (
        mock.patch.object(select, "MOST_ROWS", few or select.MOST_ROWS),
        mock.patch.object(select, "_TIMED_SECONDS", 0.01),
        mock.patch.object(prepare_, "_TIMED_SECONDS", 0.01),
    ):
        yield


# Jobs are prepared once a process; a seeded bug has its own (:func:`forget`).
@functools.cache
def kept(make: Callable[[], Job]) -> Job:
    return make()


def forget() -> None:
    """Prepare all jobs anew."""
    kept.cache_clear()


def zeros(schema: DatasetSchema) -> Table:
    """Rows whose gradients are zero for a meter."""
    made = {"x": torch.zeros(schema.rows, *schema.columns[0].shape)}
    made["target"] = torch.zeros(schema.rows)
    if schema.unit_column is not None:
        each = -(-schema.rows // schema.units)
        made["who"] = torch.arange(schema.rows) // each
    return made


def spoilt(table: Table, rows: Any) -> Table:
    """The same with these rows breaking their schema: zeroed out, as P1 compares."""
    out = {name: t.clone() for name, t in table.items()}
    out["x"][rows] = math.nan
    return out
