"""Sums of models that are no meters, against gradients by autograd in float64: several steps in
several microbatches, and every way to every kind of layer's norm."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Final

import numpy as np
import torch
from torch import Tensor, nn

from audit import known, lab, sums
from audit.lab import Job
from audit.law import holds
from casemate.engine import batched, train
from casemate.spec.job import Execution
from support import batched_lab
from support.engine_lab import no_noise

UNITS: Final = 60
STEPS: Final = 6


def _net(path: str) -> Job:
    few = 16 if path == "auto" else 0
    return lab.job(
        lab.Net(), lab.schema_of(12, UNITS), batch=30, steps=STEPS, path=path, loss=sums.net_loss,
        clip=0.3, few=few,
    )  # fmt: skip


_nets: Final = {path: functools.partial(_net, path) for path in ("auto", "record")}


def steps(seed: int) -> None:
    """Each of six steps of one run, in several microbatches, sums the clipped gradients of those
    whom the key has sampled: no place and no step keeps anything of an earlier one."""
    for path, make in _nets.items():
        job = lab.kept(make)
        plan, fast, program = job.plan, job.ready.fast, job.ready.program
        sums.on_path(job, "graph" if path == "auto" else path)
        if fast is not None:
            several = plan.microbatches > 1 and fast._small() is None
            holds(several, f"steps, {path}: several microbatches, not of the smallest native step")
        rng = lab.rng_of("steps", seed, path)
        table, key = lab.zeros(job.schema), rng.bytes(32)
        table["x"][:] = torch.from_numpy(rng.normal(size=(UNITS, 12)))
        table["target"][:] = torch.from_numpy(rng.normal(size=UNITS))
        with torch.no_grad():
            program.flat.copy_(job.initial)
        each = batched_lab.gradients(lab.Net(), program, table, sums.net_loss)
        parts = (each * torch.clamp(plan.clip / each.norm(dim=1), max=1)[:, None]).numpy()
        run = train.loop(
            plan, Execution(path=job.path), job.spec, program, job.rows(table), key, no_noise,
            job.ready.keep, fast,
        )  # fmt: skip
        for step in range(STEPS):
            with torch.no_grad():
                program.flat.copy_(job.initial)
            run(step)
            before = job.initial.numpy().astype(np.float64)
            found = (before - job.flat()) * plan.normaliser / job.rate
            want = parts[known.sample(key, step, UNITS, plan.rate)].sum(0)
            off = float(np.linalg.norm(found - want))
            holds(off < 2e-3, f"steps, {path}: the sum of step {step} is {off:.3g} off its units'")


class Embedded(nn.Module):
    """Tokens' vectors, as they are or against the same table. Index 3 is padding."""

    def __init__(self, tied: bool) -> None:
        super().__init__()
        made = torch.Generator().manual_seed(8)
        self.table = nn.Embedding(7, 4, padding_idx=None if tied else 3)
        self.tied = tied
        with torch.no_grad():
            self.table.weight.copy_(torch.randn(7, 4, generator=made))

    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = self.table(x)
        return found @ self.table.weight.t() if self.tied else found


class Layer(nn.Module):
    """One layer of torch's, its parameters drawn."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        made = torch.Generator().manual_seed(9)
        self.layer = layer
        with torch.no_grad():
            for p in layer.parameters():
                p.copy_(torch.randn(p.shape, generator=made))

    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = self.layer(x)
        return found


def _tokens(n: int, made: torch.Generator) -> Tensor:
    """Every other record is one index, six times; in the others one is padding."""
    x = torch.randint(4, 7, (n, 6), generator=made)
    x[:, -1] = 3
    x[::2] = torch.randint(4, 7, (len(x[::2]), 1), generator=made)
    return x


def _images(channels: int) -> Callable[[int, torch.Generator], Tensor]:
    return lambda n, made: torch.randn(n, channels, 6, 6, generator=made)


Inputs = Callable[[int, torch.Generator], Tensor]
ZOO: Final[dict[str, tuple[Callable[[], nn.Module], Inputs]]] = {
    "embedding": (lambda: Embedded(False), _tokens),
    "tied embedding": (lambda: Embedded(True), _tokens),
    "convolution": (lambda: Layer(nn.Conv2d(2, 3, 3, padding=1)), _images(2)),
    "convolution of groups": (lambda: Layer(nn.Conv2d(4, 4, 3, groups=2)), _images(4)),
    "convolution with stride": (lambda: Layer(nn.Conv2d(2, 3, 2, stride=2)), _images(2)),
    "transposed convolution": (lambda: Layer(nn.ConvTranspose2d(2, 3, 3, stride=2)), _images(2)),
    "group norm": (lambda: Layer(nn.GroupNorm(2, 4)), _images(4)),
    "linear layer of tokens": (lambda: Layer(nn.Linear(6, 5)), _images(2)),
}


def weighed(outputs: Tensor, target: Tensor) -> Tensor:
    """The gradient with respect to the outputs is the target."""
    return (outputs * target).flatten(1).sum(1)


def _made(name: str, seed: int, count: int) -> batched_lab.Data:
    made = torch.Generator().manual_seed(seed)
    build, inputs = ZOO[name]
    x = inputs(count, made)
    with torch.no_grad():
        like = build()(x)
    # All of one sign, so that what meets at one weight adds up.
    return {"x": x, "target": torch.randn(like.shape, generator=made).abs() * 50}


def _zoo(name: str) -> batched_lab.Lab:
    at = batched_lab.lab(ZOO[name][0](), functools.partial(_made, name, 0), weighed)
    at.path.choose(at.env(), batched_lab.ROOM)
    return at


_labs: Final = {name: functools.partial(_zoo, name) for name in ZOO}


def layers(seed: int) -> None:
    """Layers whose norms are had by kernels of their own, in every way that the engine may take:
    a unit adds its gradient clipped, and the sum is that of the factors."""
    for name, make in _labs.items():
        at: batched_lab.Lab = lab.kept(make)  # type: ignore[arg-type,assignment]
        data = _made(name, seed, at.rows)
        each = batched_lab.gradients(at.module, at.program, data, weighed)
        norms = each.norm(dim=1)
        for site in at.path.sites:
            for way in site.ways:
                site.way, what = way, f"{name}, {way.name}"
                total, c = at.parts(1.0, data)
                added = (c.double() * norms)[norms > 1]
                most, least = float(added.max()), float(added.min())
                holds(most <= 1 + 2 * sums.TIGHT, f"{what}: a unit adds {most:.6g}")
                holds(least > 0.98, f"{what}: a unit adds {least:.6g}, which is too little")
                off = float((total - (c.double()[:, None] * each).sum(0)).norm())
                holds(off <= 2e-3, f"{what}: the sum is {off:.3g} off that of the factors")


class Product(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.zeros(3, 5))

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.w.t()


def rounding(seed: int) -> None:
    """Records made of large parts that cancel: rounding moves the sum by no more than is accounted
    (``batched.ROUNDING`` of the clip)."""

    def data(n: int) -> batched_lab.Data:
        made = torch.Generator().manual_seed(seed)
        x, g = torch.randn(n, 6, 5, generator=made), torch.randn(n, 6, 3, generator=made)
        g *= 10 ** (3 + 5 * torch.rand(n, 1, 1, generator=made))
        x[:, 1::2], g[:, 1::2] = x[:, ::2], -g[:, ::2]
        g[:, 0] *= 1 + 1e-6
        return {"x": x, "target": g}

    at = batched_lab.lab(Product(), data, weighed)
    (site,) = at.path.sites
    for way in site.ways:
        if not way.name.startswith("gram"):
            continue
        site.way = way
        total, c = at.parts(1.0)
        g, x = at.data["target"].double(), at.data["x"].double()
        exact = torch.einsum("b,bti,btj->ij", c.double(), g, x).flatten()
        off = float((total - exact).norm())
        most = batched.ROUNDING * (1 + 1e-6)
        holds(off <= most, f"rounding of sums, {way.name}: the sum is {off:.3g} off its factors'")
