"""The accounted sensitivity against rows and models made to break it (P1, P3, P13)."""

from __future__ import annotations

import math

import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from casemate.engine.program import Program
from casemate.engine.rows import Rows
from support import engine_checks as checks
from support import engine_lab as lab

FLOATS = st.floats(width=32, allow_nan=True, allow_infinity=True)


@settings(max_examples=60, deadline=None)
@given(
    row=st.lists(FLOATS, min_size=5, max_size=5),
    label=st.integers(-3, 5),
    weight=st.sampled_from([0.0, 1.0, 1e6, 1e19, 1e38, math.inf, math.nan]),
    company=st.sets(st.integers(0, 10), max_size=8),
)
def test_one_unit_moves_the_sum_by_at_most_the_sensitivity(row, label, weight, company):
    """Whatever the row, the label and the weights: with it and without it the sums differ by at
    most plan.sensitivity, in exact integer arithmetic."""
    program, rows, _, plan, _ = checks.make(count=12, slots=12)
    rows.inputs["x"][11] = torch.tensor(row)
    rows.inputs["y"][11] = label
    with torch.no_grad():
        program.flat[3] = weight
    without = checks.sum_of(program, rows, plan, sorted(company))
    moved = checks.sum_of(program, rows, plan, [*sorted(company), 11]) - without
    norm = math.sqrt(sum(v * v for v in moved.tolist())) * plan.grid
    assert norm <= plan.sensitivity


@settings(max_examples=25, deadline=None)
@given(st.lists(st.integers(0, 11), unique=True, max_size=12), st.randoms())
def test_sums_do_not_know_the_order(chosen, random):
    program, rows, _, plan, _ = checks.make(count=12, slots=12)
    shuffled = chosen.copy()
    random.shuffle(shuffled)
    first = checks.sum_of(program, rows, plan, chosen)
    assert torch.equal(first, checks.sum_of(program, rows, plan, shuffled))


def test_a_unit_of_many_rows_moves_the_sum_no_further_than_one():
    program, rows, _, plan, _ = checks.make(count=24, units=12, k=2)
    rows.inputs["x"][:] = 1e30
    for unit in range(12):
        moved = checks.sum_of(program, rows, plan, [unit])
        assert math.sqrt(sum(v * v for v in moved.tolist())) * plan.grid <= plan.sensitivity


def test_company_that_fails_or_overflows_changes_nothing_for_others():
    """Rows at infinity, NaN and impossible labels beside a good row: its part stays bit-equal."""
    program, rows, _, plan, _ = checks.make(count=12, slots=12)
    alone = checks.sum_of(program, rows, plan, [4])
    rows.inputs["x"][5] = math.inf
    rows.inputs["x"][6] = math.nan
    rows.inputs["x"][7] = 3e38
    rows.inputs["y"][8] = 77
    zero = [checks.sum_of(program, rows, plan, [u]) for u in (5, 6, 8)]
    assert not any(bool(z.any()) for z in zero)
    together = checks.sum_of(program, rows, plan, [4, 5, 6, 8])
    assert torch.equal(together, alone)


def test_a_trojan_cannot_tell_company_by_rounding():
    """The amplifier, asleep until a feature has a secret value that no probe row has: the kernels
    are the same for one record at a time, so there is nothing to amplify between records."""
    graph, weights = checks.amplifier()
    gate = (
        lab.node("g0", "aten.select.int", "%x", 1, 0),
        lab.node("g1", "aten.ge.Scalar", "%g0", 3.5),
        lab.node("g2", "aten.unsqueeze.default", "%g1", 1),
        lab.node("g3", "aten.mul.Tensor", "%t", "%g2"),
        lab.node("o", "aten.mul.Tensor", "%g3", "%v"),
    )
    nodes = []
    for item in graph.nodes:
        nodes += gate if item.name == "o" else (item,)
    graph = type(graph)(inputs=graph.inputs, nodes=tuple(nodes), loss=graph.loss)
    schema = lab.schema(6, 2, 16)
    table = lab.table(schema)
    table["x"][:, 0] = 4.0
    program = Program(graph, weights)
    rows: Rows = lab.rows_of((schema, table), graph=graph)
    plan = lab.plan_of(lab.spec_of(8, 1), 16, program.dimension, slots=16)
    alone = [checks.sum_of(program, rows, plan, [u]) for u in range(16)]
    assert sum(bool(a.any()) for a in alone) > 8
    for size in (2, 9, 16):
        chosen = np.random.default_rng(size).permutation(16)[:size]
        expected = torch.stack([alone[u] for u in chosen]).sum(0)
        assert torch.equal(checks.sum_of(program, rows, plan, chosen), expected)
