"""Artifacts of small models, built once for the tests that share them."""

from __future__ import annotations

import contextlib
import fcntl
import functools
import hashlib
import os
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from casemate.engine import native, select
from casemate.engine.aot import build, check, run, step
from casemate.engine.aot.step import Step
from casemate.engine.prepare import Ready
from casemate.engine.rows import Rows, assemble
from casemate.plan.compile import constants
from casemate.spec.job import Adam, Dp, Plan, Sgd, TrainSpec
from casemate.spec.messages import Run
from casemate.worker import dataset, session
from casemate.worker import native as worker
from support import engine_lab, worker_lab
from support.batched_lab import Lab, lab

CLIP, GRID = 0.5, 2.0**-24


class Images(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, stride=2, padding=1)
        self.norm = nn.GroupNorm(2, 8)
        self.depth = nn.Conv2d(8, 8, 3, padding=1, groups=8, bias=False)
        self.point = nn.Conv2d(8, 12, 1)
        self.head = nn.Linear(12 * 16, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.norm(self.stem(x)))
        x = torch.nn.functional.silu(self.point(self.depth(x)))
        return self.head(x.flatten(1))


class Texts(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.words = nn.Embedding(40, 16)
        self.places = nn.Embedding(6, 16)
        self.layer = nn.TransformerEncoderLayer(16, 2, 24, dropout=0.0, batch_first=True)
        self.head = nn.Linear(16, 3)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.words(ids) + self.places(torch.arange(ids.shape[1]))
        return self.head(self.layer(x).mean(1))


class Tied(nn.Module):
    """Whose head is the table of its embedding."""

    def __init__(self) -> None:
        super().__init__()
        self.words = nn.Embedding(40, 16)
        self.layer = nn.Linear(16, 16)

    def forward(self, ids: Tensor) -> Tensor:
        x = torch.tanh(self.layer(self.words(ids).mean(1)))
        return torch.nn.functional.linear(x, self.words.weight)


def images(n: int) -> dict[str, Tensor]:
    torch.manual_seed(1)
    return {"x": torch.randn(n, 3, 8, 8), "target": torch.randint(4, (n,))}


def texts(n: int) -> dict[str, Tensor]:
    torch.manual_seed(2)
    return {"ids": torch.randint(40, (n, 6)), "target": torch.randint(3, (n,))}


def logistic() -> nn.Module:
    return nn.Linear(20, 4)


def mlp() -> nn.Module:
    layers = (nn.Linear(20, 32), nn.ReLU(), nn.Linear(32, 24), nn.ReLU(), nn.Linear(24, 4))
    return nn.Sequential(*layers)


def vgg() -> nn.Module:
    """As VGG-9, small."""
    layers: list[nn.Module] = []
    for i, o in ((3, 8), (8, 12)):
        layers += [nn.Conv2d(i, o, 3, padding=1), nn.ReLU()]
        layers += [nn.Conv2d(o, o, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)]
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(48, 16), nn.ReLU(), nn.Linear(16, 4))


def pictures(n: int) -> dict[str, Tensor]:
    return {"input" if name == "x" else name: t for name, t in images(n).items()}


def numbers(n: int) -> dict[str, Tensor]:
    torch.manual_seed(3)
    return {"input": torch.randn(n, 20), "target": torch.randint(4, (n,))}


# By name: a model, its records, rows a unit.
KINDS: dict[str, tuple[Callable[[], nn.Module], Callable[[int], dict[str, Tensor]], int]] = {
    "images": (Images, images, 1),
    "texts": (Texts, texts, 2),
    "logistic": (logistic, numbers, 1),
    "mlp": (mlp, numbers, 1),
    "vgg": (vgg, pictures, 1),
    "tied": (Tied, texts, 1),
}


def kept(name: str, make: Callable[[], bytes]) -> bytes:
    """What ``make`` gives, once for all processes that test this source on this machine."""
    engine = Path(build.__file__).parent.parent
    sources = sorted(p for p in engine.rglob("*") if p.suffix in (".py", ".cpp"))
    parts = [p.read_bytes() for p in (*sources, Path(__file__))]
    parts += [torch.__version__.encode(), native.cpu_digest().encode()]
    parts.append(native.version(native.compiler()))
    key = hashlib.sha256(b"".join(hashlib.sha256(p).digest() for p in parts)).hexdigest()[:32]
    folder = Path(tempfile.gettempdir(), f"casemate-tests-{os.getuid()}")
    folder.mkdir(mode=0o700, exist_ok=True)
    with (folder / f"{name}-{key}").open("a+b") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        file.seek(0)
        if not (found := file.read()):
            found = make()
            file.write(found)
        return found


@dataclass(frozen=True)
class Built:
    lab: Lab
    artifact: build.Artifact
    rows: Rows

    @property
    def names(self) -> list[str]:
        return [spec.name for spec in self.lab.program.data]


@functools.cache
def stepped(kind: str) -> tuple[Lab, step.Step]:
    model, data, k = KINDS[kind]
    torch.manual_seed(0)
    made = lab(model(), data, rows=16, per_unit=k, last=False)
    for site in made.path.sites:  # not the quickest, but the same in each process
        site.settle(site.ways[0])
    return made, step.of(made.path, CLIP, GRID)


@functools.cache
def built(kind: str) -> Built:
    _, data, k = KINDS[kind]
    made, of = stepped(kind)
    artifact = build.Artifact(kept(kind, lambda: build.build(of).program), of)
    return Built(made, artifact, select.made_up(data(48), 48 // k, k))


def plan(of: Built, **changed: Any) -> Plan:
    """Of three steps at rate 0.4, with noise that hides nothing."""
    own = {"units": of.rows.units, "rate": 0.4, "steps": 3, "normaliser": 8.0, "sigma": 1.1 * CLIP}
    return check.made_up(of.artifact.step, **own | changed)


def spec(optimizer: Sgd | Adam, ema: float = 0.0) -> TrainSpec:
    dp = Dp(epsilon=1.0, delta=1e-5, clip=CLIP)
    return TrainSpec(batch_size=8, steps=3, privacy=dp, optimizer=optimizer, ema=ema)


def job(of: Built, plan_: Plan, train: TrainSpec, rows: Rows | None = None, key: bytes = bytes(32),
        epsilon: float = 1e9, delta: float = 1e-5, processes: int = 1) -> bytes:  # fmt: skip
    tensors = of.lab.path.runner.inputs
    return b"".join(
        run.job(of.artifact, plan_, train, rows or of.rows, of.names, tensors, key, epsilon,
                delta, processes)
    )  # fmt: skip


def trained(of: Built, *args: Any, **kwargs: Any) -> run.Trained:
    return run.run(of.artifact, iter([job(of, *args, **kwargs)]))


WAYS = ("rank-one", "formed", "rank-one", "formed")


def worker_job(**more: Any) -> worker_lab.Job:
    """A job on the worker's small MLP that the native step trains."""
    made = worker_lab.job(runtime="native", clip=CLIP, **more)
    prepare = replace(made.prepare, compile_seconds=3600.0, ways=WAYS)
    return replace(made, prepare=prepare)


def prepared(of: worker_lab.Job) -> tuple[Ready, worker.Native]:
    """Phase ``prepare`` of it in this process, but for the compiler's work, which is done once."""
    built = build.build

    def once(step: Step) -> build.Artifact:
        name = f"worker-{step.clip}-{step.grid}-{step.rows}"
        return build.Artifact(kept(name, lambda: built(step).program), step)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(build, "build", once)
        ready, made = session._prepare(of.prepare, engine_lab.sealed_fd(worker_lab.KEY, of.model))
    assert made is not None
    return ready, made


def run_of(of: worker_lab.Job, ready: Ready, **more: Any) -> Run:
    """The message that runs it, with the plan that was prepared for."""
    message, said = of.prepare, ready.prepared
    plan = constants(message.train, message.schemas, said)
    asked = worker_lab.run_of(of, said)
    execution = replace(asked.execution, artifact=said.artifact, ways=said.ways)
    return replace(asked, plan=replace(plan, **more), execution=execution)


def rows_of(of: worker_lab.Job, ready: Ready, run: Run) -> Rows:
    """As a worker assembles them."""
    (d,) = run.datasets
    fd = engine_lab.sealed_fd(worker_lab.KEY, of.wire)
    table = dataset.load(d.dataset, d.schema, d.key, d.salt, fd)
    return assemble(of.prepare.schemas, [table], ready.program.data, of.prepare.inputs)


def ended(process: int) -> None:
    """Waits until a process has ended, whoever asks how."""
    stat = Path(f"/proc/{process}/stat")
    for _ in range(400):
        with contextlib.suppress(OSError):
            if stat.read_text().rpartition(")")[2].split()[0] != "Z":
                time.sleep(0.05)
                continue
        return
    raise AssertionError(f"process {process} is still there")


__all__ = ["CLIP", "GRID", "Built", "built", "check", "job", "plan", "spec", "trained"]
