"""The native step of small models: it trains as the engine does."""

import os
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch

from casemate.engine import train
from casemate.engine.aot import build, check
from casemate.engine.aot.step import of as step_of
from casemate.spec.errors import ModelError
from casemate.spec.job import Adam, Dp, Execution, Schedule, Sgd
from support import native_lab as native

KINDS = ["images", "texts"]


def engine(of, plan, spec, rows, key=bytes(32)):
    """The same run by the engine; weights are put back."""
    program = of.lab.program
    held = program.flat.clone()
    run = train.loop(
        plan, Execution(path="graph"), spec, program, rows, key,
        lambda step, first, total: train.noise.add_gaussian(
            total, key, step, plan.sigma / plan.grid, first
        ), False, fast=of.lab.path,
    )  # fmt: skip
    for step in range(plan.steps):
        run(step)
    made = torch.cat([t.reshape(-1) for t in run.result().values()]).clone()
    program.flat.copy_(held)
    of.lab.path.runner.refresh()
    return made


@pytest.mark.parametrize("kind", KINDS)
def test_an_artifact_is_accepted(kind):
    of = native.built(kind)
    assert check.accept(of.artifact, of.lab.path, of.rows).median < 1e-5
    assert len(of.artifact.program) < 3_000_000


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("optimizer", "schedule", "ema"),
    [
        (Sgd(lr=0.1, momentum=0.9, nesterov=True, weight_decay=0.01), Schedule(), 0.0),
        (Adam(lr=0.01, weight_decay=0.1, decoupled=True), Schedule(kind="cosine", warmup=1), 0.9),
        (Adam(lr=0.01, weight_decay=0.1), Schedule(kind="linear"), 0.0),
    ],
)
def test_it_trains_as_the_engine_does(kind, optimizer, schedule, ema, monkeypatch):
    monkeypatch.setattr(train, "check_plan", lambda *a: None)  # of made-up constants
    of = native.built(kind)
    plan, spec = native.plan(of), replace(native.spec(optimizer, ema), schedule=schedule)
    got = native.trained(of, plan, spec)
    wanted = engine(of, plan, spec, of.rows)
    start = of.lab.program.flat
    assert got.steps == 3
    assert float((got.weights - wanted).norm()) <= 1e-5 * float((wanted - start).norm())


@pytest.mark.parametrize("kind", KINDS)
def test_several_processes_make_the_same_sums(kind):
    of = native.built(kind)
    plan, spec = native.plan(of), native.spec(Sgd(lr=0.1))
    one = native.trained(of, plan, spec, processes=1).weights
    for processes in (2, 3, 5):
        assert torch.equal(native.trained(of, plan, spec, processes=processes).weights, one)


def test_rows_that_break_their_schema_and_rows_of_nan_add_nothing():
    of = native.built("images")
    plan, spec = native.plan(of, rate=1.0), native.spec(Sgd(lr=0.1))
    without = np.ones(48, bool)
    without[[3, 17]] = False
    poisoned = {name: t.clone() for name, t in of.rows.inputs.items()}
    poisoned["x"][[3, 17]] = torch.nan
    a = native.trained(of, plan, spec, replace(of.rows, valid=without)).weights
    b = native.trained(of, plan, spec, replace(of.rows, inputs=poisoned)).weights
    assert torch.equal(a, b)
    assert not torch.equal(a, native.trained(of, plan, spec).weights)


def test_the_budget_stops_the_run():
    of = native.built("images")
    spec = native.spec(Sgd(lr=0.1))
    spent = [native.trained(of, native.plan(of, steps=n), spec).epsilon for n in (1, 2, 3)]
    assert spent == sorted(spent) and spent[0] > 0
    for steps, limit in enumerate([spent[0] * 0.99, spent[0], spent[1], spent[2]]):
        found = native.trained(of, native.plan(of), spec, epsilon=limit)
        assert found.steps == steps
        assert found.epsilon <= limit
        assert torch.equal(
            found.weights, native.trained(of, native.plan(of, steps=steps), spec).weights
        )


GENERATE = """
import hashlib
from support import native_lab
from casemate.engine.aot import build
step = native_lab.stepped("images")[1]
text, names, results = build.generated(step)
whole = text + build.runtime(build.table(step, results), names)
print(hashlib.sha256(whole.encode()).hexdigest())
"""


@pytest.mark.full
def test_a_step_is_the_same_source_in_each_process_of_its_own():
    """As `casemate native build` is; what compiled something else before may write another."""
    path = os.pathsep.join(p for p in sys.path if p)
    made = [
        subprocess.run(
            [sys.executable, "-c", GENERATE], env={**os.environ, "PYTHONPATH": path},
            capture_output=True, text=True, check=True,
        ).stdout.split()[-1]
        for _ in range(2)
    ]  # fmt: skip
    assert made[0] == made[1]


@pytest.mark.parametrize("name", ["system", "execve", "socket", "fopen", "dlopen", "at_addmm",
                                  "aoti_torch_cpu_randn", "_ZNSt6threadD1Ev"])  # fmt: skip
def test_an_unlisted_symbol_fails_the_build_by_name(name):
    with pytest.raises(ModelError, match=name):
        build.check_symbols(["aoti_torch_empty_strided", name], ["aoti_torch_empty_strided"])


def test_an_artifact_that_disagrees_is_refused():
    of = native.built("images")
    other = native.built("images").lab.path
    wrong = step_of(other, native.CLIP / 2, native.GRID)
    artifact = replace(of.artifact, step=wrong)
    with pytest.raises(ModelError, match="differ"):
        check.accept(artifact, other, of.rows)


def test_a_plan_of_another_clip_is_refused():
    of = native.built("images")
    spec = replace(native.spec(Sgd(lr=0.1)), privacy=Dp(epsilon=1.0, delta=1e-5, clip=0.25))
    with pytest.raises(ModelError, match="clip"):
        native.trained(of, native.plan(of, clip=0.25), spec)
