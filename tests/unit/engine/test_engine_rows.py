"""Rows, units and bindings."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch

from casemate.engine import rows
from casemate.spec.data import Column, DatasetSchema
from casemate.spec.job import InputBinding
from support import engine_lab as lab

GRAPH, _ = lab.mlp([3, 2])
SPECS = [i for i in GRAPH.inputs if i.kind == "data"]


def test_two_datasets_lie_one_after_the_other_with_units_apart():
    a, b = lab.schema(3, 2, 5, units=4, k=2), lab.schema(3, 2, 6, units=6, k=1, name="b")
    ta, tb = lab.table(a), lab.table(b, seed=1)
    ta["who"] = torch.tensor([3, 0, 3, 3, 0])
    tb["who"] = torch.tensor([5, 5, 0, 2, 2, 2])
    made = lab.rows_of((a, ta), (b, tb), graph=GRAPH)
    assert made.units == 10 and made.count == 11 and made.per_unit == 2
    assert torch.equal(made.inputs["x"], torch.cat([ta["x"], tb["x"]]))
    members = {u: made.of_unit(u).tolist() for u in range(10) if len(made.of_unit(u))}
    # At most k of the row's own dataset, the first ones of that unit.
    assert members == {0: [1, 4], 3: [0, 2], 4: [7], 6: [8], 9: [5]}


def test_a_units_rows_do_not_depend_on_other_units():
    schema = lab.schema(3, 2, 6, units=6, k=2)
    table = lab.table(schema)
    table["who"] = torch.tensor([1, 2, 1, 2, 1, 2])
    before = lab.rows_of((schema, table), graph=GRAPH).of_unit(1).tolist()
    table["who"] = torch.tensor([1, 4, 1, 5, 1, 0])
    assert lab.rows_of((schema, table), graph=GRAPH).of_unit(1).tolist() == before == [0, 2]


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 4.5, -5.0])
def test_bad_rows_are_invalid_and_belong_to_no_sum(value):
    schema = lab.schema(3, 2, 4)
    table = lab.table(schema)
    table["x"][2, 1] = value
    made = lab.rows_of((schema, table), graph=GRAPH)
    assert made.valid.tolist() == [True, True, False, True]
    assert made.of_unit(2).tolist() == []
    assert made.of_unit(3).tolist() == [3]


def test_rows_of_unknown_units_belong_to_nobody():
    schema = lab.schema(3, 2, 4, units=4)
    table = lab.table(schema)
    table["who"] = torch.tensor([-1, 4, 2, 2**40])
    made = lab.rows_of((schema, table), graph=GRAPH)
    assert [made.of_unit(u).tolist() for u in range(4)] == [[], [], [2], []]


def test_padded_units_are_empty():
    schema = dataclasses.replace(lab.schema(3, 2, 4), units=9)
    made = lab.rows_of((schema, lab.table(schema)), graph=GRAPH)
    assert made.units == 9
    assert [len(made.of_unit(u)) for u in range(9)] == [1] * 4 + [0] * 5


def test_scalar_columns_are_stacked_in_the_bindings_order():
    columns = tuple(Column(name=n, dtype="f32", low=0.0, high=1.0) for n in "abc")
    schema = DatasetSchema(name="t", columns=columns, rows=2, units=2)
    table = {n: torch.tensor([i, i + 0.5]) for i, n in enumerate("abc")}
    chosen = rows.bound_columns(
        schema, SPECS[0], [InputBinding(input="x", columns=("c", "a", "b"))]
    )
    assert rows.stack(chosen, table).tolist() == [[2, 0, 1], [2.5, 0.5, 1.5]]


def test_synthetic_records_keep_the_bounds():
    rng = np.random.default_rng(0)
    for column in (
        Column(name="f", dtype="f32", shape=(7,), low=-2, high=3),
        Column(name="s", dtype="f32", low=10, high=90, scale="unit"),
        Column(name="i", dtype="i64", low=5, high=6),
        Column(name="u", dtype="u8", low=0, high=255),
        Column(name="b", dtype="bool"),
    ):
        low, high = column.wire_bounds or (0, 1)
        for _ in range(20):
            made = rows.synthetic([column], rng)
            assert made.shape == (1, *column.shape)
            assert low <= made.min() and made.max() <= high
