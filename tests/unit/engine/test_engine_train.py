"""The loop: plans that do not bound it, empty steps, capacity, units, jobs without privacy."""

from __future__ import annotations

import ast
import dataclasses
import inspect
from pathlib import Path

import numpy as np
import pytest
import torch

import casemate
from casemate.engine import grid, sampling, train
from casemate.engine.program import Program
from casemate.spec.errors import PlanError
from casemate.spec.job import Execution
from support import engine_checks as checks
from support import engine_lab as lab


def refused(plan, spec, dimension, units):
    with pytest.raises(PlanError) as found:
        train.check_plan(plan, spec, dimension, units)
    assert found.value.code == "plan.unsound"


CHANGES = {
    "fewer units": {"units": 23},
    "more steps": {"steps": 5},
    "rate 0": {"rate": 0.0},
    "rate above 1": {"rate": 1.5},
    "no normaliser": {"normaliser": 0.0},
    "no slots": {"microbatches": 0},
    "slots for one unit": {"microbatches": 1},
    "nothing charged for dropped units": {"microbatches": 23, "delta_truncation": 0.0},
    "no noise": {"sigma": 0.0},
    "less noise": {"sigma": 0.499},
    "sensitivity without the grid": {"sensitivity": 0.5},
    "grid no power of two": {"grid": 2.0**-20 * 1.5},
    "grid too fine": {"grid": 2.0**-52},
    "sampler not charged": {"delta_sampler": 0.0},
    "no event": {"events": ()},
    "event of more noise": {"events": "more"},
    "not private": {"private": False},
    "larger clip": {"clip": 0.6},
    "another form of the clip": {"clipping": "per-layer"},
    "a gamma that nobody asked for": {"gamma": 0.01},
}


@pytest.mark.parametrize("change", CHANGES)
def test_plans_that_do_not_bound_the_loop_are_refused(change):
    program, rows, spec, plan, _ = checks.make()
    train.check_plan(plan, spec, program.dimension, rows.units)
    changes = dict(CHANGES[change])
    if changes.get("events") == "more":
        event = plan.events[0]
        changes["events"] = (
            dataclasses.replace(event, noise_multiplier=event.noise_multiplier * 1.01),
        )
    refused(dataclasses.replace(plan, **changes), spec, program.dimension, rows.units)


def test_what_leaves_the_integers_does_not_fit():
    """A contribution has twice its clip in steps and one, a draw 2^11 times the scale."""
    step = 2.0**-30
    assert grid.fits((2.0**51 - 1) * step, step, 1, 1.0)
    assert not grid.fits(2.0**51 * step, step, 1, 1.0)
    assert grid.fits(2.0**30 * step, step, 2**30, 1.0)
    assert not grid.fits(2.0**30 * step, step, 2**31, 1.0)
    assert not grid.fits(step, step, 1, 2.0**51)
    assert not grid.fits(1.0, 1.5 * step, 1, 1.0)


def test_a_plan_for_a_smaller_model_is_refused():
    program, rows, spec, plan, _ = checks.make()
    refused(plan, spec, program.dimension * 10**6, rows.units)


def test_an_unknown_path_is_refused():
    program, rows, spec, plan, _ = checks.make()
    with pytest.raises(PlanError):
        train.train(plan, Execution(path="fast"), spec, program, rows, checks.KEY)


def test_the_same_key_gives_the_same_weights_and_another_key_others():
    found = []
    for key in (checks.KEY, checks.KEY, b"\x08" * 32):
        program, rows, spec, plan, _ = checks.make()
        result = train.train(plan, Execution(), spec, program, rows, key)
        found.append(torch.cat([result[i.tensor].reshape(-1) for i in program.trained]))
        assert all(t.dtype == torch.float32 for t in result.values())
    assert torch.equal(found[0], found[1])
    assert not torch.equal(found[0], found[2])


def test_empty_batches_are_noised_as_any_other(monkeypatch):
    """P7: with nothing sampled, weights still move by noise of full size at every step."""
    monkeypatch.setattr(sampling, "sample", lambda *a: np.array([], dtype=np.int64))
    program, rows, spec, plan, _ = checks.make((60, 400, 60), count=8, steps=1)
    start = program.flat.clone()
    train.train(plan, Execution(), spec, program, rows, checks.KEY)
    moved = (program.flat - start).double() / (spec.optimizer.lr * plan.sigma / plan.normaliser)
    assert abs(float((moved**2).mean()) - 1) < 0.05


def test_more_units_than_slots_are_dropped_from_the_end():
    program, rows, _, plan, _ = checks.make(count=12, slots=4)
    chosen = [1, 3, 5, 7, 9, 11]
    found = checks.sum_of(program, rows, plan, chosen)
    assert torch.equal(found, checks.sum_of(program, rows, plan, chosen[:4]))
    assert not torch.equal(found, checks.sum_of(program, rows, plan, chosen[:3]))


def test_every_step_evaluates_the_same_number_of_records(monkeypatch):
    """P2, P6: slots times k records, whatever was sampled."""
    program, rows, _, plan, _ = checks.make(count=24, units=12, k=2, slots=5)
    counts = []
    right = program.gradient
    monkeypatch.setattr(program, "gradient", lambda *a: counts.append(1) or right(*a))
    for chosen in ([], [3], [1, 2, 3, 4, 5, 6, 7, 8]):
        counts.clear()
        checks.sum_of(program, rows, plan, chosen)
        assert len(counts) == 5 * 2


def test_a_unit_with_many_rows_is_clipped_once():
    program, rows, _, plan, _ = checks.make(count=24, units=12, k=2)
    for unit in range(12):
        steps = checks.sum_of(program, rows, plan, [unit]).double()
        assert float(torch.linalg.vector_norm(steps)) * plan.grid <= plan.sensitivity


def test_a_dummy_record_with_no_gradient_spoils_nothing():
    """The dummy of zeros gives NaN under log(sum x): free slots and missing rows must not care."""
    from casemate.graph.model import Graph

    graph = Graph(
        inputs=(lab.param("w", 3), lab.data("x", "f32", 3), lab.data("y", "i64")),
        nodes=(
            lab.node("p", "aten.mul.Tensor", "%x", "%w"),
            lab.node("s", "aten.sum.dim_IntList", "%p", [1]),
            lab.node("loss", "aten.log.default", "%s"),
        ),
        loss="loss",
    )
    schema = lab.schema(3, 2, 6, units=6, k=2)
    table = lab.table(schema)
    table["x"] = table["x"].abs() + 0.1
    program = Program(graph, {"w": torch.ones(3)})
    rows = lab.rows_of((schema, table), graph=graph)
    plan = lab.plan_of(lab.spec_of(3, 1), 6, 3, slots=6)
    present = int(table["who"][0])
    found = checks.sum_of(program, rows, plan, [present])
    assert bool(found.any())


def test_without_privacy_the_sum_is_the_plain_one():
    """P10: no clip, no grid, no noise; the same sampling and normaliser."""
    graph, weights = lab.mlp([5, 4, 3])
    schema = lab.schema(5, 3, 24)
    table = lab.table(schema)
    program = Program(graph, weights)
    rows = lab.rows_of((schema, table), graph=graph)
    spec = lab.spec_of(8, 6, private=False)
    plan = lab.plan_of(spec, 24, program.dimension)
    train.train(plan, Execution(), spec, program, rows, checks.KEY)
    unclipped = dataclasses.replace(plan, clip=1e9)
    expected = checks.reference((5, 4, 3), 0, table, unclipped, spec.optimizer.lr)
    assert torch.allclose(program.flat, expected, rtol=1e-5, atol=1e-5)


def test_only_the_engine_itself_can_choose_the_noise():
    """The zero-noise hook is ``train.loop``: in src it is called once, by ``train.start``, which
    takes no noise; nothing else names it."""
    root = Path(casemate.__file__).parent
    uses = []
    for path in root.rglob("*.py"):
        text = path.read_text(encoding="utf-8")
        if "loop" not in text:
            continue
        tree = ast.parse(text)
        for item in ast.walk(tree):
            named = isinstance(item, ast.Name) and item.id == "loop"
            reached = isinstance(item, ast.Attribute) and item.attr == "loop"
            imported = isinstance(item, ast.ImportFrom) and any(
                a.name == "loop" for a in item.names
            )
            engine = path.is_relative_to(root / "engine") or path.is_relative_to(root / "worker")
            if imported or ((named or reached) and engine):
                uses.append(path.relative_to(root).as_posix())
    assert uses == ["engine/train.py"]
    for door in (train.train, train.start):
        arguments = set(inspect.signature(door).parameters)
        assert not {"noise", "add", "draw", "sigma", "scale"} & arguments


@pytest.mark.parametrize("form", ["flat", "per-layer", "automatic"])
def test_the_same_sums_however_slots_are_parted(form):
    """Gradient accumulation: 24 slots one, six or all at a time, the same integers."""
    program, rows, spec, plan, _ = checks.make(count=24, batch=12, slots=24, form=form)
    found = []
    for microbatch in (1, 6, 24):
        parted = dataclasses.replace(plan, microbatch=microbatch, microbatches=24 // microbatch)
        train.check_plan(parted, spec, program.dimension, rows.units)
        start = program.flat.clone()
        found.append(checks.run(program, rows, spec, parted))
        with torch.no_grad():
            program.flat.copy_(start)
    assert torch.equal(found[0], found[1]) and torch.equal(found[0], found[2])
    assert not torch.equal(found[0], program.flat)


def test_what_is_released_is_the_average():
    """A run's result, and train's, is the debiased average of the weights after each step."""
    program, rows, spec, plan, _ = checks.make(steps=5)
    start = program.flat.clone()
    averaged = dataclasses.replace(spec, ema=0.6)
    run = train.loop(plan, Execution(), averaged, program, rows, checks.KEY, lab.no_noise, False)
    before = run.result()
    assert torch.equal(torch.cat([t.reshape(-1) for t in before.values()]), start)
    seen = []
    for step in range(5):
        run(step)
        seen.append(program.flat.double().clone())
        parts = [0.6 ** (step - s) for s in range(step + 1)]
        wanted = sum(p * w for p, w in zip(parts, seen, strict=True)) / sum(parts)
        got = torch.cat([t.reshape(-1) for t in run.result().values()])
        assert torch.allclose(got.double(), wanted, rtol=1e-6, atol=1e-7)
        assert torch.equal(program.flat.double(), seen[-1])  # the run itself goes on as it was
