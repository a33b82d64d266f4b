"""Whole runs of jobs of many kinds, made again: who is sampled, what each unit adds, the noise, the
optimizer and the average follow from the key, the rows and the job, by code of the audit's own.

Most checks look at one thing in jobs that are otherwise plain. What goes wrong in jobs of one kind
alone (Adam's, those with views, large clips, many units) shows here, whatever it is.
"""

from __future__ import annotations

import copy
import dataclasses
import functools
import math
from typing import Any, Final
from unittest import mock

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from audit import known, lab, models, rest, sums
from audit.lab import Job, Table
from audit.law import holds
from casemate.engine import noise as engine_noise
from casemate.engine import rows, sampling, train
from casemate.engine.program import DTYPES
from casemate.spec import frames
from casemate.spec.data import DatasetSchema
from casemate.spec.job import Adam, Schedule, Sgd, Views
from casemate.worker import session
from support import worker_lab

STEPS: Final = 4
# How far weights may be from those made again, of what clip and noise move them by.
OFF: Final = 3e-4


class Carrier(nn.Module):
    """A meter of tensors of these sizes; a frozen branch has the dropout."""

    def __init__(self, sizes: tuple[int, ...], drop: bool) -> None:
        super().__init__()
        self.sizes = list(sizes)
        self.w = nn.ParameterList(nn.Parameter(torch.zeros(n)) for n in sizes)
        self.drop = nn.Dropout(0.5) if drop else nn.Identity()
        self.register_buffer("still", torch.full((sum(sizes),), 1e-3))

    def forward(self, x: Tensor) -> Tensor:
        parts = torch.split(x.float(), self.sizes, 1)
        out = [(p * w).sum(1) for p, w in zip(parts, self.w, strict=True)]
        return torch.stack([*out, self.drop(x.float() * self.still).sum(1)], 1)


# What a job may be, each apart from the others. Of the optimizers, Adam's eps is as large as a
# mean, so that its steps have a size too.
LEVELS: Final[dict[str, tuple[Any, ...]]] = {
    "path": ("auto", "record"),
    "form": ("flat", "per-layer", "automatic"),
    "gamma": (4.0, 0.25, 0.01),  # of the clip
    "clip": (1e-7, 1e-3, 0.3, 1.0, 50.0, 1e6),
    "noise": (0.1, 0.5, 1.0, 6.0, 300.0),
    "delta": (1e-8, 1e-5, 1e-3),
    "optimizer": ("plain", "momentum", "nesterov", "adam", "adamw"),
    "schedule": ("constant", "linear", "cosine", "step"),
    "ema": (0.0, 0.6),
    "views": (1, 1, 3),
    "drop": (False, True),
    "k": (0, 1, 2, 5),  # rows of a unit; 0: units are rows
    "datasets": (1, 1, 2, 4),
    # Units, and how many a step has: also none for the most part, and many microbatches.
    "people": ((8, 8), (40, 6), (60, 30), (3_000, 3), (24, 1), (120, 100), (120_000, 2)),
    "sizes": ((1,), (3, 5), (2, 1, 3, 1, 4, 2, 1, 3, 2, 1, 5, 3), (40,), (1, 7, 20)),
    "dtype": ("f32", "f32", "i32", "u8"),
    "few": (0, 16),
    "steps": (STEPS, 30, 100_000),
    "resumed": (0, 2),
    "plain": (False, False, False, True),  # without native kernels
}
COUNT: Final = 20


def _kinds() -> list[dict[str, Any]]:
    """Of each level as many jobs as of others, put together by chance."""
    rng = lab.rng_of("kinds of jobs")
    columns = {
        name: [levels[i % len(levels)] for i in rng.permutation(COUNT)]
        for name, levels in LEVELS.items()
    }
    return [{name: column[i] for name, column in columns.items()} for i in range(COUNT)]


KINDS: Final = _kinds()


def _optimizer(kind: dict[str, Any], unit: float) -> Sgd | Adam:
    return {
        "plain": Sgd(lr=1.0),
        "momentum": Sgd(lr=1.0, momentum=0.7),
        "nesterov": Sgd(lr=1.0, momentum=0.7, nesterov=True, weight_decay=0.05),
        "adam": Adam(
            lr=min(1.0, unit), beta1=0.6, beta2=0.8, eps=min(1e6, unit), weight_decay=0.05
        ),
        "adamw": Adam(
            lr=min(1.0, unit),
            beta1=0.6,
            beta2=0.8,
            eps=min(1e6, unit),
            weight_decay=0.05,
            decoupled=True,
        ),
    }[kind["optimizer"]]


def _schedule(kind: dict[str, Any]) -> Schedule:
    return {
        "constant": Schedule(),
        "linear": Schedule(kind="linear", final=0.2, warmup=2),
        "cosine": Schedule(kind="cosine", final=0.1),
        "step": Schedule(kind="step", gamma=0.5, every=2, warmup=1),
    }[kind["schedule"]]


def _parts(kind: dict[str, Any]) -> tuple[int, int, int]:
    """Of each dataset: units, rows, and rows that a unit may have."""
    units = kind["people"][0] // kind["datasets"]
    return units, units * max(1, kind["k"]), max(1, kind["k"])


def _schema(kind: dict[str, Any], units: int, count: int, k: int) -> DatasetSchema:
    of = units if kind["k"] else None
    return lab.schema_of(sum(kind["sizes"]), count, units=of, k=k, dtype=kind["dtype"])


def _made(number: int) -> Job:
    kind = KINDS[number]
    units, count, k = _parts(kind)
    whole, batch = units * kind["datasets"], kind["people"][1]
    schema = _schema(kind, whole, count * kind["datasets"], k)
    clip, noise = kind["clip"], kind["noise"]
    gamma = min(1e6, max(1e-6, clip * kind["gamma"]))
    with models.without_help(kind["plain"]):
        return lab.job(
            Carrier(kind["sizes"], kind["drop"]), schema, batch=batch, steps=kind["steps"],
            noise=noise, clip=clip, form=kind["form"], gamma=gamma,
            path=kind["path"], optimizer=_optimizer(kind, clip * (1 + noise) / batch),
            schedule=_schedule(kind), ema=kind["ema"], views=Views(count=kind["views"]),
            delta=kind["delta"],
            dropout=kind["drop"], few=kind["few"],
        )  # fmt: skip


_jobs: Final = [functools.partial(_made, number) for number in range(COUNT)]


def _rows(kind: dict[str, Any], rng: np.random.Generator, clip: float) -> list[Table]:
    """Of each dataset: units with fewer rows than they may have and with more, rows that break
    their schema, gradients of all lengths around the clip."""
    made = []
    units, count, _ = _parts(kind)
    low, high = lab.BOUNDS[kind["dtype"]]
    for _ in range(kind["datasets"]):
        x = rng.normal(size=(count, sum(kind["sizes"])))
        if kind["dtype"] == "f32":
            x *= clip * 10 ** rng.uniform(-1.5, 1.5, (count, 1)) / math.sqrt(x.shape[1])
            wrong = math.nan
        else:
            x = np.rint(np.clip(20 * x + (low == 0) * 50, low, high))
            wrong = high + 1
        x[rng.random(count) < 0.15] = wrong
        table = {"x": torch.from_numpy(x).to(DTYPES[kind["dtype"]])}
        table["target"] = torch.from_numpy(rng.normal(size=count)).float()
        if kind["k"]:
            table["who"] = torch.from_numpy(rng.integers(0, units, count))
        made.append(table)
    return made


def _assembled(job: Job, kind: dict[str, Any], tables: list[Table]) -> rows.Rows:
    units, count, k = _parts(kind)
    part = _schema(kind, units, count, k)
    parts = (part,) * kind["datasets"]
    return rows.assemble(parts, tables, job.ready.program.data, job.inputs)


def _adds(job: Job, kind: dict[str, Any], tables: list[Table], chosen: np.ndarray) -> np.ndarray:
    """What each of these units adds, (n, d): of its first rows, at most k, those within their
    schema."""
    units, _, k = _parts(kind)
    low, high = lab.BOUNDS[kind["dtype"]]
    out = [np.zeros(sum(kind["sizes"]))]
    for whole in chosen:
        dataset, unit = divmod(int(whole), units)
        x = tables[dataset]["x"].numpy()
        who = tables[dataset]["who"].numpy() if kind["k"] else np.arange(len(x))
        mine = x[np.flatnonzero(who == unit)[:k]].astype(np.float64)
        right = ((mine >= low) & (mine <= high)).all(1)
        out.append(sums.expected(job, mine[right].sum(0), kind["sizes"]))
    return np.array(out)


class Held:
    """A state's bytes, as a run reads them."""

    def __init__(self, data: bytes) -> None:
        self.data, self.size = data, len(data)

    def readinto(self, offset: int, buffer: memoryview) -> int:
        part = self.data[offset : offset + len(buffer)]
        buffer[: len(part)] = part
        return len(part)


def _state(run: train.Run) -> bytes:
    return b"".join(bytes(part) for part in run.state())


def runs(seed: int) -> None:
    """Whole runs are what the audit makes of their key, rows and job: weights after each step, and
    the result; and nothing but the noised sums is in what they leave."""
    for number, make in enumerate(_jobs):
        kind = KINDS[number]
        what = f"run {number} ({kind['path']}, {kind['form']}, {kind['optimizer']})"
        with models.without_help(kind["plain"]):
            job = lab.kept(make)
            sums.on_path(job, "graph" if kind["path"] == "auto" else "record")
            rest.bounds(job)
            _constants(job, what)
            _again(job, kind, seed, what)
            _afterwards(job, kind, seed, what)
    _through_worker(seed)


def _constants(job: Job, what: str) -> None:
    plan, spec = job.plan, job.spec
    rate = spec.batch_size / job.schema.units
    right = (plan.rate, plan.normaliser, plan.steps) == (rate, spec.batch_size, spec.steps)
    holds(right, f"{what}: rate, normaliser and steps are those asked for")
    (event,) = plan.events
    claimed = (event.rate, event.steps) == (plan.rate, plan.steps)
    enough = plan.sigma >= event.noise_multiplier * plan.sensitivity * (1 - 1e-12)
    holds(claimed and enough, f"{what}: its event is what its plan does")


def _again(job: Job, kind: dict[str, Any], seed: int, what: str) -> None:
    plan, rng = job.plan, lab.rng_of("runs", seed, what)
    tables = _rows(kind, rng, plan.clip)
    given, count = _assembled(job, kind, tables), job.ready.program.dimension
    helper = (lambda: None) if kind["plain"] else engine_noise._helper
    means: list[np.ndarray] = []
    with mock.patch.object(engine_noise, "_helper", helper):
        key = rng.bytes(32)
        run = job.start_of(given, key)
        for step in range(STEPS):
            if step and step == kind["resumed"]:
                source, key = Held(_state(run)), rng.bytes(32)
                run = job.start_of(given, key, source=source)
            chosen = known.sample(key, step, plan.units, plan.rate)[: train.slots(plan)]
            drawn = np.rint(known.normals(key, step, count) * plan.sigma / plan.grid)
            total = _adds(job, kind, tables, chosen).sum(0) + (drawn * plan.grid).astype(np.float64)
            means.append(total / plan.normaliser)
            run(step)
            want, average = rest.again(job, means)
            unit = (plan.clip + plan.sigma * 1e-2) / plan.normaliser
            if isinstance(job.spec.optimizer, Adam):
                unit *= job.spec.optimizer.lr / job.spec.optimizer.eps
            most = OFF * (step + 1) * unit + 1e-6 * float(np.abs(want).max())
            off = float(np.abs(job.flat() - want[-1]).max())
            holds(off <= most, f"{what}: after step {step} weights are {off / unit:.3g} units off")
            if kind["ema"]:
                found = torch.cat([t.reshape(-1) for t in run.result().values()]).numpy()
                off = float(np.abs(found - average).max())
                holds(off <= most, f"{what}: the average is {off / unit:.3g} units off")


def _afterwards(job: Job, kind: dict[str, Any], seed: int, what: str) -> None:
    """The noised sums being the same, a run leaves the same bits, whoever was in it."""
    rng = lab.rng_of("afterwards", seed, what)
    key, left = rng.bytes(32), []
    for some in (True, False):
        tables = _rows(kind, rng, job.plan.clip)
        given = _assembled(job, kind, tables)
        units = np.arange(given.units if some else 0)[: train.slots(job.plan)]
        with (
            mock.patch.object(engine_noise, "add_gaussian", _overwritten(seed)),
            mock.patch.object(sampling, "sample", lambda *a, units=units: units),
        ):
            run = job.start_of(given, key)
            for step in range(STEPS):
                run(step)
                left.append(_state(run))
            left += [t.numpy().tobytes() for t in run.result().values()]
    half = len(left) // 2
    same = left[:half] == left[half:]
    holds(same, f"{what}: more than the noised sums shows in what it leaves")


def _overwritten(seed: int) -> Any:
    """After the noise: sums that have nothing of the rows."""
    real = engine_noise.add_gaussian

    def add(total: np.ndarray, key: bytes, step: int, scale: float, first: int = 0) -> None:
        real(total, key, step, scale, first)
        rng = lab.rng_of("overwritten", seed, step, first)
        total[:] = np.rint(rng.normal(size=len(total)) * scale)

    return add


def _through_worker(seed: int) -> None:
    """So do a worker's messages and files, and the library's weights."""
    first = rest.worker()
    other = copy.copy(first)
    sizes = rest.WORKER
    rows_of = worker_lab.job(rest.WORKED, sizes=sizes, rows=1).wire
    other.job = dataclasses.replace(first.job, wire=rows_of)
    told: list[Any] = []
    send = frames.send

    def sent(sock: Any, message: object, *more: Any) -> None:
        told[-1].append(message)
        send(sock, message, *more)

    found = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(engine_noise, "add_gaussian", _overwritten(seed))
        patch.setattr(session.frames, "send", sent)
        for one in (first, other):
            told.append([])
            found.append(one.run(patch, every=1))
    mine = [[m for m in messages if type(m).__name__ == "State"] for messages in told]
    holds(found[0] == found[1], "worker: more than the noised sums is in what it writes")
    holds(mine[0] == mine[1] != [], "worker: more than the noised sums is in what it says")
    library = []
    with mock.patch.object(engine_noise, "add_gaussian", _overwritten(seed)):
        for data in (0.0, 1.0):
            library.append(rest.library(seed, data).tobytes())
    holds(library[0] == library[1], "library: more than the noised sums is in its weights")
