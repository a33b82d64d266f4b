"""Optimizers and schedules against torch.optim."""

from __future__ import annotations

import math

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
