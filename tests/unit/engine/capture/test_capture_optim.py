"""torch's optimizers and schedules as a job's."""

from __future__ import annotations

import math
import warnings

import pytest
import torch
from torch import nn
from torch.optim import lr_scheduler

from casemate.engine.capture import optimizer, schedule
from casemate.engine.optim import factor
from casemate.spec.errors import UsageError
from casemate.spec.job import Adam, Schedule, Sgd


def test_optimizers() -> None:
    w = [nn.Parameter(torch.zeros(2))]
    assert optimizer(torch.optim.SGD(w, 0.1, momentum=0.9, nesterov=True)) == Sgd(
        lr=0.1, momentum=0.9, nesterov=True
    )
    assert optimizer(torch.optim.AdamW(w, 0.1, weight_decay=0.02)) == Adam(
        lr=0.1, weight_decay=0.02, decoupled=True
    )
    assert optimizer(torch.optim.Adam(w, 0.1, betas=(0.8, 0.9), eps=1e-6)) == Adam(
        lr=0.1, beta1=0.8, beta2=0.9, eps=1e-6
    )
    groups = [{"params": w}, {"params": [nn.Parameter(torch.zeros(1))]}]
    for bad in (
        torch.optim.SGD(w, 0.1, dampening=0.5), torch.optim.Adam(w, 0.1, amsgrad=True),
        torch.optim.SGD(w, 0.1, maximize=True), torch.optim.RMSprop(w, 0.1), torch.optim.SGD(groups, 0.1),  # noqa: E501
    ):  # fmt: skip
        with pytest.raises(UsageError) as e:
            optimizer(bad)
        assert e.value.code == "usage.optimizer"


STEPS = 12
SCHEDULES = {
    "step": lambda o: lr_scheduler.StepLR(o, 3, 0.5),
    "exponential": lambda o: lr_scheduler.ExponentialLR(o, 0.9),
    "linear": lambda o: lr_scheduler.LinearLR(o, 1.0, 0.1, STEPS),
    "cosine": lambda o: lr_scheduler.CosineAnnealingLR(o, STEPS, 0.02),
    "warm-up, cosine": lambda o: lr_scheduler.SequentialLR(
        o, [lr_scheduler.LinearLR(o, 1 / 4, 1.0, 3), lr_scheduler.CosineAnnealingLR(o, STEPS - 4)], [4]  # noqa: E501
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", SCHEDULES)
def test_schedules_are_torchs(name: str) -> None:
    o = torch.optim.SGD([nn.Parameter(torch.zeros(2))], 0.2)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        given = SCHEDULES[name](o)
        said = schedule(given, STEPS)
        assert optimizer(o).lr == 0.2
        for t in range(STEPS):
            theirs = o.param_groups[0]["lr"]
            assert math.isclose(theirs, 0.2 * factor(said, t, STEPS), rel_tol=1e-6), t
            o.step()
            given.step()


def test_schedules_without_counterpart() -> None:
    o = torch.optim.SGD([nn.Parameter(torch.zeros(2))], 0.2)
    for bad in (lr_scheduler.CosineAnnealingLR(o, 5), lr_scheduler.MultiStepLR(o, [3])):
        with pytest.raises(UsageError) as e:
            schedule(bad, STEPS)
        assert e.value.code == "usage.schedule"
    assert schedule(lr_scheduler.ConstantLR(o, 1.0), STEPS) == Schedule()
