"""Optimizers and schedules against torch.optim."""

from __future__ import annotations

import math
from fractions import Fraction

import pytest
import torch

from casemate.engine import optim
from casemate.spec.job import Adam, Schedule, Sgd

STEPS = 25

CASES = {
    "sgd": (Sgd(lr=0.1), lambda p: torch.optim.SGD(p, lr=0.1)),
    "momentum": (Sgd(lr=0.1, momentum=0.9), lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9)),
    "nesterov": (
        Sgd(lr=0.1, momentum=0.8, nesterov=True, weight_decay=0.01),
        lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.8, nesterov=True, weight_decay=0.01),
    ),
    "adam": (Adam(lr=0.01), lambda p: torch.optim.Adam(p, lr=0.01)),
    "adam, decay": (
        Adam(lr=0.01, beta1=0.8, beta2=0.95, eps=1e-6, weight_decay=0.1),
        lambda p: torch.optim.Adam(p, lr=0.01, betas=(0.8, 0.95), eps=1e-6, weight_decay=0.1),
    ),
    "adamw": (
        Adam(lr=0.01, weight_decay=0.1, decoupled=True),
        lambda p: torch.optim.AdamW(p, lr=0.01, weight_decay=0.1),
    ),
}

SCHEDULES = {
    "constant": (Schedule(), lambda t: 1.0),
    "warmup": (Schedule(warmup=5), lambda t: min(1.0, (t + 1) / 5)),
    "linear": (Schedule(kind="linear", final=0.2), lambda t: 1 - 0.8 * t / STEPS),
    "cosine": (
        Schedule(kind="cosine", final=0.1),
        lambda t: 0.1 + 0.9 * (1 + math.cos(math.pi * t / STEPS)) / 2,
    ),
    "step": (Schedule(kind="step", gamma=0.5, every=7), lambda t: 0.5 ** (t // 7)),
}


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("case", CASES)
def test_equals_torch(case, schedule):
    spec, theirs = CASES[case]
    plan, factor = SCHEDULES[schedule]
    made = torch.Generator().manual_seed(1)
    ours = torch.randn(50, generator=made)
    parameter = ours.clone().requires_grad_()
    optimizer = theirs([parameter])
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, factor)
    update = optim.optimizer(spec, plan, STEPS, 50)
    for step in range(STEPS):
        gradient = torch.randn(50, generator=made)
        kept = gradient.clone()
        update(ours, gradient, step)
        assert torch.equal(gradient, kept)
        parameter.grad = gradient
        optimizer.step()
        scheduler.step()
    assert torch.allclose(ours, parameter.detach(), rtol=2e-6, atol=2e-7)


def test_cosine_after_warmup_starts_at_1_and_step_counts_from_the_warmup():
    assert optim.factor(Schedule(kind="cosine", warmup=4), 4, 20) == 1.0
    spec = Schedule(kind="step", warmup=3, gamma=0.1, every=5)
    assert [optim.factor(spec, t, 20) for t in (2, 3, 7, 8)] == [1.0, 1.0, 1.0, 0.1]


def averaged(decay: float, steps: int, made: type[optim.Average] = optim.Average) -> float:
    """Relative distance of the average from its definition in exact arithmetic, at its worst."""
    generator = torch.Generator().manual_seed(5)
    average, weights, worst = made(decay, 6), torch.randn(6, generator=generator), 0.0
    seen = []
    for step in range(steps):
        weights = weights + 0.01 * torch.randn(6, generator=generator)
        average.add(weights)
        seen.append([Fraction(v) for v in weights.tolist()])
        if step not in (0, 1, 2, steps // 2, steps - 1):
            continue
        parts = [Fraction(decay) ** (len(seen) - 1 - s) for s in range(len(seen))]
        for i, got in enumerate(average.value.tolist()):
            wanted = float(sum(p * w[i] for p, w in zip(parts, seen, strict=True)) / sum(parts))
            worst = max(worst, abs(got - wanted) / max(abs(wanted), 1e-3))
    return worst


@pytest.mark.parametrize("decay", [5e-324, 0.5, 0.9, 0.9999, 1 - 1e-12, math.nextafter(1, 0)])
def test_the_average_is_its_definition(decay: float) -> None:
    assert averaged(decay, 60) < 1e-12


class _Biased(optim.Average):
    """From the initial zeros, as without the divisor."""

    def add(self, weights: torch.Tensor) -> None:
        self.value.mul_(self.decay).add_(weights, alpha=1 - self.decay)


class _Single(optim.Average):
    """In float32."""

    def add(self, weights: torch.Tensor) -> None:
        super().add(weights)
        self.value.copy_(self.value.float())


class _OneBehind(optim.Average):
    """The divisor of the step before."""

    def add(self, weights: torch.Tensor) -> None:
        part = (1 - self.decay) / (1 - self.decay ** max(1, self.count))
        self.count += 1
        self.value.mul_(1 - part).add_(weights, alpha=part)


@pytest.mark.parametrize("bug", [_Biased, _Single, _OneBehind])
def test_seeded_bugs_of_the_average_are_caught(bug: type[optim.Average]) -> None:
    assert averaged(0.9, 60, bug) > 1e-9
