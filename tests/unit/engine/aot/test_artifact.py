"""The native step of small models: it trains as the engine does."""

import os
import re
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch

from casemate.engine import batched, train
from casemate.engine.aot import build, check
from casemate.engine.aot.step import of as step_of
from casemate.spec.errors import ModelError
from casemate.spec.job import Adam, Dp, Execution, Schedule, Sgd
from support import native_lab as native
from support import runtime_lab

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


@pytest.mark.parametrize("kind", KINDS)
def test_short_units_rows_in_no_order_and_broken_ones_are_as_in_the_engine(kind, monkeypatch):
    monkeypatch.setattr(train, "check_plan", lambda *a: None)  # of made-up constants
    of, rng = native.built(kind), np.random.default_rng(5)
    k, count = of.rows.per_unit, of.rows.count
    lengths = rng.integers(0, k + 1, count // k)
    rows = replace(
        of.rows, valid=rng.random(count) < 0.7, order=rng.permutation(count)[: lengths.sum()],
        starts=np.concatenate([[0], lengths.cumsum()]),
    )  # fmt: skip
    plan, spec = native.plan(of, rate=0.7), native.spec(Sgd(lr=0.1))
    got, wanted = native.trained(of, plan, spec, rows).weights, engine(of, plan, spec, rows)
    assert float((got - wanted).norm()) <= 1e-5 * float((wanted - of.lab.program.flat).norm())


def test_its_account_is_by_the_sensitivity_that_the_ledger_charges():
    of = native.built("images")
    plan, spec = native.plan(of), native.spec(Sgd(lr=0.1))
    bound = batched.sensitivity(native.CLIP, of.lab.program.dimension, native.GRID)
    wanted = runtime_lab.library().lab_epsilon(plan.rate, plan.sigma / bound, 1e-5, 3.0)
    assert native.trained(of, plan, spec).epsilon == pytest.approx(wanted, rel=1e-10)


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


UNLISTED = [
    "system", "execve", "socket", "fopen", "dlopen", "at_addmm", "aoti_torch_cpu_randn",
    "freeaddrinfo", "exp2l", "syscall", "_ZNSt6threadD1Ev",
    "_ZNSt13basic_filebufIcSt11char_traitsIcEE4openEPKcSt13_Ios_Openmode",
    "_ZNSt12__basic_fileIcE8sys_openEiSt13_Ios_Openmode", "_ZNSt6localeC1EPKc", "_ZSt3cin",
    "_ZNSt13random_device7_M_initERKNSt7__cxx1112basic_stringIcSt11char_traitsIcESaIcEEE",
    "_ZNSt10filesystem6removeERKNS_7__cxx114pathE", "_ZNSt6chrono11reload_tzdbEv",
    "_ZN2at4_ops3add4callEv", "_ZTVSt13basic_filebufIcSt11char_traitsIcEE",
    "_ZNSt11this_thread11__sleep_forENSt6chronoE",
]  # fmt: skip


@pytest.mark.parametrize("name", UNLISTED)
def test_an_unlisted_symbol_fails_the_build_by_name(name):
    with pytest.raises(ModelError, match=re.escape(name)):
        build.check_symbols(["aoti_torch_empty_strided", name], ["aoti_torch_empty_strided"])


@pytest.mark.parametrize("name", ["prctl", "write", "memcpy", "main", "_exit", "fork"])
def test_a_symbol_of_the_runtimes_libraries_is_not_the_steps_to_have(name):
    with pytest.raises(ModelError, match=name):
        build.check_symbols([], [], ["AOTInductorModelRun", "cpp_fused_add_0", name])


OTHERS = [
    "_ZNSt12out_of_rangeC1EPKc", "_ZSt9terminatev", "_ZdlPvm", "_ZNSolsEi", "_ZNSdC2Ev",
    "_ZNKSt9exception4whatEv", "_ZNSaIcED1Ev", "_ZTISt12length_error", "expf", "__cxa_throw",
    "_ZSt21__glibcxx_assert_failPKciS0_S0_",
]  # fmt: skip


@pytest.mark.parametrize("name", OTHERS)
def test_what_other_compilers_make_of_the_same_source_is_taken(name):
    build.check_symbols([name], [])


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
