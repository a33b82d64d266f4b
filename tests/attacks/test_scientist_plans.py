"""Plans whose claimed epsilon would not be true, or whose job would be charged and then fail."""

from __future__ import annotations

import dataclasses
import math
from fractions import Fraction
from typing import Any

import pytest
import torch

from casemate.engine import clip, noise, optim, train
from casemate.engine.prepare import check_generator
from casemate.plan.compile import EXTRA_PART, compile_plan
from casemate.spec.data import Column, DatasetSchema
from casemate.spec.errors import CasemateError, PlanError
from casemate.spec.job import (
    Adam,
    DatasetUse,
    Dp,
    InputBinding,
    JobRequest,
    Schedule,
    Sgd,
    TrainSpec,
)
from casemate.spec.messages import Prepared
from support import engine_lab as lab

SCALES = [1e-45, 1e-38, 1e-20, 1.0, 1e10, 1.3e23, 1e30, 3e38]


def overshoot(bound: float, scale: float, dimension: int = 64) -> float:
    """How far above 1 the norm over the bound comes, in exact arithmetic."""
    worst = 0.0
    for k in range(24):
        made = torch.Generator().manual_seed(k)
        x = torch.randn(dimension, generator=made) * (1 + k / 24)
        wide = x.double() * scale * 4096 / 4
        clip.clip(wide, bound)
        square = sum(Fraction(v) ** 2 for v in wide.tolist()) / Fraction(bound) ** 2
        worst = max(worst, math.sqrt(square) - 1)
    return worst


@pytest.mark.parametrize("bound", [clip.SMALLEST, 1e-30, 1e-3, 1.0, 1e6])
def test_clip_bounds_hold_at_every_scale(bound: float) -> None:
    assert max(overshoot(bound, s) for s in SCALES) <= clip.eta(64)


def test_a_clip_below_the_proof_steals_epsilon_and_is_refused() -> None:
    """Below it bound / norm is a denormal with few bits: the norm that is accounted for is passed,
    by up to a third."""
    assert max(overshoot(b, 1e38) for b in (3e-281, 1e-280, 3e-280)) > 1e-3  # why
    for tiny in (5e-324, 1e-300, 1e-285, 9e-31, 0.0, -1.0, 1.1e6):
        with pytest.raises(ValueError, match="clip"):
            Dp(epsilon=1.0, delta=1e-5, clip=tiny)
    spec = lab.spec_of(8, 2)
    plan = lab.plan_of(spec, 32, 10)
    train.check_plan(plan, spec, 10, 32)
    small = dataclasses.replace(
        plan, clip=1e-285, grid=2.0**-980, sensitivity=1.1e-285, sigma=1.1e-285
    )
    with pytest.raises(PlanError, match="out of order"):
        train.check_plan(small, spec, 10, 32)


SPOILED: dict[str, tuple[Any, dict[str, Any]]] = {
    "lr below zero": (Sgd, {"lr": -0.1}),
    "lr beyond float32": (Sgd, {"lr": 1e300}),
    "lr no number": (Sgd, {"lr": math.nan}),
    "decay": (Sgd, {"lr": 0.1, "weight_decay": math.inf}),
    "momentum": (Sgd, {"lr": 0.1, "momentum": -1.0}),
    "beta of one": (Adam, {"lr": 0.1, "beta1": 1.0}),
    "beta above one": (Adam, {"lr": 0.1, "beta2": 1.5}),
    "beta below zero": (Adam, {"lr": 0.1, "beta2": -0.5}),
    "eps": (Adam, {"lr": 0.1, "eps": math.nan}),
    "every zero": (Schedule, {"kind": "step", "every": 0}),
    "gamma that overflows": (Schedule, {"kind": "step", "gamma": 1e300}),
    "warmup": (Schedule, {"warmup": -1}),
    "final": (Schedule, {"kind": "linear", "final": math.inf}),
}


@pytest.mark.parametrize("what", SPOILED)
def test_an_optimizer_that_would_fail_after_the_charge(what: str) -> None:
    kind, fields = SPOILED[what]
    with pytest.raises(ValueError, match="must be in"):
        kind(**fields)


EXTREMES = {
    "sgd": Sgd(lr=1e6, momentum=1e6, nesterov=True, weight_decay=1e6),
    "adam": Adam(lr=1e6, beta1=0.0, beta2=0.0, eps=0.0, weight_decay=1e6, decoupled=True),
    "slow adam": Adam(lr=1e6, beta1=math.nextafter(1, 0), beta2=math.nextafter(1, 0), eps=0.0),
}
SCHEDULES = [
    Schedule(kind="linear", final=1000.0),
    Schedule(kind="cosine", warmup=10_000_000, final=1000.0),
    Schedule(kind="step", gamma=0.0),
    Schedule(kind="step", gamma=1e-300, warmup=1),
]


@pytest.mark.parametrize("what", EXTREMES)
@pytest.mark.parametrize("gradient", [0.0, 1e-45, 3e38, math.inf, math.nan])
def test_no_update_raises_whatever_the_gradient(what: str, gradient: float) -> None:
    for schedule in SCHEDULES:
        update = optim.optimizer(EXTREMES[what], schedule, 40, 3)
        weights = torch.ones(3)
        for step in range(40):
            update(weights, torch.full((3,), gradient), step)


def test_a_delta_below_the_generators_distance_is_refused_before_the_charge() -> None:
    def spec(delta: float) -> TrainSpec:
        privacy = Dp(epsilon=1.0, delta=delta)
        return TrainSpec(batch_size=1, steps=1000, privacy=privacy, optimizer=Sgd(lr=0.1))

    for delta in (1e-300, 1e-24, 1e-22, 1e-5):
        enough = noise.distance(1000 * 1100) <= delta * EXTRA_PART
        try:
            check_generator(spec(delta), 100, 1000)
        except PlanError as e:
            assert e.code == "plan.delta" and not enough
        else:
            assert enough


def schema(rows: int) -> DatasetSchema:
    columns = (
        Column(name="x", dtype="f32", shape=(4,), low=-1.0, high=1.0),
        Column(name="y", dtype="i64", low=0, high=1, role="label"),
    )
    return DatasetSchema(name="n", columns=columns, rows=rows, units=rows)


@pytest.mark.parametrize("epsilon", [1e-9, 1e-3, 1.0, 30.0, 1000.0])
@pytest.mark.parametrize("bound", [1e-30, 1.0, 1e6])
@pytest.mark.parametrize(("rows", "batch", "steps"), [(1, 1, 1), (7, 7, 3), (10**6, 1, 10**7)])
def test_an_extreme_plan_is_refused_or_sound(
    epsilon: float, bound: float, rows: int, batch: int, steps: int
) -> None:
    """What the planner makes, the engine takes: nothing is charged for a plan that cannot run."""
    dimension = 50
    spec = TrainSpec(
        batch_size=batch,
        steps=steps,
        privacy=Dp(epsilon=epsilon, delta=1e-5, clip=bound),
        optimizer=Sgd(lr=0.1),
    )
    request = JobRequest(
        job="job_" + "0" * 32,
        scientist="id_ann",
        datasets=(DatasetUse(dataset="ds_" + "0" * 40, policy_digest="sha256:", epoch=0),),
        model_digest="sha256:" + "0" * 64,
        inputs=(InputBinding(input="x", columns=("x",)), InputBinding(input="y", columns=("y",))),
        train=spec,
    )
    prepared = Prepared(
        model_digest="sha256:" + "0" * 64,
        parameters=dimension,
        dimension=dimension,
        microbatch=1,
        seconds_per_microbatch=1e-3,
        seconds_per_step=1e-3,
        seconds_fixed=0.0,
        bytes=10**8,
        certified_eta=clip.eta(dimension),
        rounding=0.0,
        path=("record",),
    )
    check_generator(spec, rows, dimension)
    try:
        plan = compile_plan(request, [schema(rows)], prepared)
    except CasemateError as e:
        assert e.code in ("plan.epsilon", "plan.grid", "plan.event")
        return
    train.check_plan(plan, spec, dimension, rows)
