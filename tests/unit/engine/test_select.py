"""Which path a job takes, and that the fast one is the slow one's."""

from __future__ import annotations

import dataclasses
import hashlib
import math

import numpy as np
import pytest
import torch

from casemate.engine import batched, prepare, select, train
from casemate.engine.batched import Batched
from casemate.spec.errors import LimitError, PlanError
from casemate.spec.job import Execution
from support import engine_lab as lab

KEY = b"\x05" * 32


def ready_of(graph, weights, schema, spec, *, path="auto", memory=4 << 30):
    packed = lab.packed(graph, weights)
    digest = "sha256:" + hashlib.sha256(packed).hexdigest()
    return prepare.prepare(packed, digest, [schema], lab.BINDINGS, spec, memory, path)


def planned(ready, spec, units):
    return lab.fitted(lab.plan_of(spec, units, ready.program.dimension), ready.prepared)


def weights_after(path, *, sizes=(5, 4, 3), frozen=0, k=1, private=True, spoilt=(), **form):
    graph, weights = lab.mlp(list(sizes), frozen=frozen)
    units = -(-40 // k)
    schema = lab.schema(5, 3, 40, units=units if k > 1 else None, k=k)
    table = lab.table(schema)
    for row in spoilt:
        table["x"][row] = math.nan
        table["y"][row] = 99
    spec = lab.spec_of(12, 6, clip=0.3, private=private, **form)
    ready = ready_of(graph, weights, schema, spec, path=path)
    assert ready.path == ("graph" if path == "auto" else "record")
    rows = lab.rows_of((schema, table), graph=graph)
    take = train.loop(
        planned(ready, spec, units), Execution(path=ready.path), spec, ready.program, rows, KEY,
        lab.no_noise, ready.keep, ready.fast,
    )  # fmt: skip
    before = ready.program.flat.clone()
    for step in range(spec.steps):
        take(step)
    return ready, ready.program.flat - before


CASES = {
    "plain": {},
    "frozen prefix": {"frozen": 1},
    "units of two rows": {"k": 2},
    "units of three rows, frozen prefix": {"k": 3, "frozen": 1},
    "rows outside their schema": {"spoilt": (0, 7, 39)},
    "frozen prefix, rows outside their schema": {"spoilt": (0, 7, 39), "frozen": 1},
    "without privacy": {"private": False},
    "per layer": {"form": "per-layer"},
    "automatic": {"form": "automatic"},
}


@pytest.mark.parametrize("case", CASES)
def test_both_paths_train_the_same_weights(case):
    slow, wanted = weights_after("record", **CASES[case])
    fast, found = weights_after("auto", **CASES[case])
    assert fast.keep == slow.keep == ("frozen" in CASES[case])
    assert float(wanted.norm()) > 1e-2
    assert float((found - wanted).norm()) <= 1e-5 * float(wanted.norm())


@pytest.mark.parametrize("bug", ["clip", "seed", "row"])
def test_a_path_that_differs_is_noticed(bug, monkeypatch):
    """The check at a job's start against one record per call."""
    graph, weights = lab.mlp([5, 4, 3])
    right = batched.factors

    def scaled(*args):
        c, good = right(*args)
        return c * (1 + 1e-2), good

    real = Batched.sums

    def other_rows(self, rows, *args):
        return real(self, dataclasses.replace(rows, order=np.zeros_like(rows.order)), *args)

    if bug == "clip":
        monkeypatch.setattr(batched, "factors", scaled)
    elif bug == "row":
        monkeypatch.setattr(Batched, "sums", other_rows)
    else:
        right_fill = torch.Tensor.fill_
        monkeypatch.setattr(
            Batched, "_evaluate", lambda self, seed, f=Batched._evaluate: f(
                self, right_fill(seed.clone(), 0.9)
            ),
        )  # fmt: skip
    schema = lab.schema(5, 3, 40)
    ready = ready_of(graph, weights, schema, lab.spec_of(12, 6))
    assert ready.path == "record" and ready.fast is None
    assert "differ from one record per call" in ready.prepared.path[1]


def test_a_model_without_a_proof_takes_the_slow_path_and_says_why(monkeypatch):
    graph, weights = lab.mlp([5, 3])

    def unfit(*args):
        raise select.Unfit("v3: no rule")

    monkeypatch.setattr(select.batched, "analyse", unfit)
    ready = ready_of(graph, weights, lab.schema(5, 3, 40), lab.spec_of(12, 6))
    assert ready.prepared.path == ("record", "graph: v3: no rule")
    assert ready.prepared.microbatch == 1


def test_memory_decides_between_paths_as_the_limit_says(monkeypatch):
    graph, weights = lab.mlp([5, 4, 3])
    schema, spec = lab.schema(5, 3, 40), lab.spec_of(12, 6)
    with monkeypatch.context() as patch:
        patch.setattr(select, "BASE_BYTES", (4 << 30) - 4096)
        few = ready_of(graph, weights, schema, spec)
    assert few.prepared.path == ("record", "graph: a microbatch does not fit in memory")
    with pytest.raises(LimitError):
        ready_of(graph, weights, schema, spec, memory=1 << 20)


def test_rows_at_once_follow_from_public_values_alone():
    graph, weights = lab.mlp([5, 4, 3])
    found = {
        batch: ready_of(graph, weights, lab.schema(5, 3, 4000), lab.spec_of(batch, 6)).fast.shape
        for batch in (1, 300, 2000)
    }
    again = ready_of(graph, weights, lab.schema(5, 3, 4000), lab.spec_of(300, 6)).fast.shape
    assert found[300] == again
    assert all(s.rows % select.TILE == 0 and s.rows <= select.MOST_ROWS for s in found.values())
    assert found[1].rows < found[300].rows


def test_a_plan_for_other_rows_at_once_is_refused():
    graph, weights = lab.mlp([5, 4, 3])
    schema, spec = lab.schema(5, 3, 40), lab.spec_of(12, 6)
    ready = ready_of(graph, weights, schema, spec)
    rows = lab.rows_of((schema, lab.table(schema)), graph=graph)
    plan = planned(ready, spec, 40)
    for changed in (
        dataclasses.replace(plan, microbatch=plan.microbatch * 2),
        dataclasses.replace(plan, sensitivity=plan.clip),
    ):
        with pytest.raises(PlanError):
            train.start(
                changed, Execution(path="graph"), spec, ready.program, rows, KEY, fast=ready.fast
            )
    with pytest.raises(PlanError):
        train.start(plan, Execution(path="graph"), spec, ready.program, rows, KEY)


def test_what_only_one_path_can_do_goes_by_that_path(monkeypatch):
    graph, weights = lab.mlp([5, 4, 3])
    swapped = dataclasses.replace(
        graph,
        nodes=tuple(
            dataclasses.replace(n, op="aten.sgn.default", kwargs={}) if "relu" in n.op else n
            for n in graph.nodes
        ),
    )
    assert swapped != graph
    spec = lab.spec_of(12, 2)
    made = ready_of(swapped, weights, lab.schema(5, 3, 40), spec)
    assert made.prepared.path == ("record", "graph: a gradient is zero and has no memory")

    def refuses(*args, **more):
        raise RuntimeError("sizes of tensors must match")

    monkeypatch.setattr(Batched, "settle", refuses)
    made = ready_of(graph, weights, lab.schema(5, 3, 40), spec)
    assert made.prepared.path == ("record", "graph: RuntimeError: sizes of tensors must match")
