"""What a request gets wrong, from declarations alone: each refusal by its code."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
from plan_values import X, Y, request, schema

from casemate.graph.model import InputSpec, Size
from casemate.plan.check import check_inputs, check_request
from casemate.spec.data import Column
from casemate.spec.errors import PlanError
from casemate.spec.job import Dp, Flip, InputBinding, NonPrivate, Views

B = Size(a=1)
PARAM = InputSpec(name="w", kind="param", dtype="f32", shape=(30, 2), tensor="w")
INPUTS = (
    PARAM,
    InputSpec(name="x", kind="data", dtype="f32", shape=(B, 30)),
    InputSpec(name="y", kind="data", dtype="i64", shape=(B,)),
)
BIND_X = InputBinding(input="x", columns=("x",))
BIND_Y = InputBinding(input="y", columns=("y",))
SCALARS = tuple(Column(name=f"c{i}", dtype="f32", low=0.0, high=1.0) for i in range(3))


def test_what_fits_is_admitted() -> None:
    check_inputs(INPUTS, (BIND_X, BIND_Y), (schema(), schema("south", 50)))
    check_request(request(2), (schema(), schema("south", 50)))


def test_scalar_columns_are_stacked() -> None:
    spec = InputSpec(name="x", kind="data", dtype="f32", shape=(B, 3))
    names = tuple(c.name for c in SCALARS)
    check_inputs((spec,), (InputBinding(input="x", columns=names),), (schema(columns=SCALARS),))


@pytest.mark.parametrize(
    ("bindings", "code", "where"),
    [
        ((BIND_X,), "plan.unbound-input", "y"),
        ((BIND_X, BIND_Y, BIND_X), "plan.inputs", ""),
        ((BIND_X, BIND_Y, InputBinding(input="z", columns=("x",))), "plan.unknown-input", "z"),
        ((BIND_X, BIND_Y, InputBinding(input="w", columns=("x",))), "plan.unknown-input", "w"),
        ((BIND_X, InputBinding(input="y", columns=())), "plan.input-columns", "y"),
        ((BIND_X, InputBinding(input="y", columns=("age",))), "plan.unknown-column", "y"),
        ((BIND_X, InputBinding(input="y", columns=("x",))), "plan.dtype", "y"),
        ((InputBinding(input="x", columns=("c0",)), BIND_Y), "plan.shape", "x"),
        ((InputBinding(input="x", columns=("c0", "c1")), BIND_Y), "plan.shape", "x"),
        ((InputBinding(input="x", columns=("c0", "x")), BIND_Y), "plan.stacking", "x"),
        ((InputBinding(input="x", columns=("c0", "y")), BIND_Y), "plan.stacking", "x"),
    ],
)  # fmt: skip
def test_bindings_that_do_not_fit(
    bindings: tuple[InputBinding, ...], code: str, where: str
) -> None:
    with pytest.raises(PlanError) as e:
        check_inputs(INPUTS, bindings, (schema(columns=(X, Y, *SCALARS)),))
    assert (e.value.code, e.value.where) == (code, where)
    assert e.value.mend


def test_a_shape_error_says_what_was_expected_and_what_came() -> None:
    wide = dataclasses.replace(X, shape=(31,))
    with pytest.raises(PlanError) as e:
        check_inputs(INPUTS, (BIND_X, BIND_Y), (schema(columns=(wide, Y)),))
    assert "'x'" in e.value.message and "(30,)" in e.value.message and "(31,)" in e.value.message


@pytest.mark.parametrize(
    "other",
    [
        dataclasses.replace(X, high=2.0),
        dataclasses.replace(X, shape=(29,)),
        dataclasses.replace(X, dtype="i32", low=-1, high=1),
        dataclasses.replace(X, scale="symmetric"),
    ],
)
def test_datasets_must_agree_on_what_is_bound(other: Column) -> None:
    schemas = (schema(), schema("south", columns=(other, Y)))
    with pytest.raises(PlanError) as e:
        check_request(request(2), schemas)
    assert (e.value.code, e.value.where) == ("plan.schemas-differ", "x")
    assert "'north'" in e.value.message and "'south'" in e.value.message


def test_columns_that_are_not_bound_may_differ() -> None:
    extra = Column(name="note", dtype="i64", low=0, high=9)
    check_request(request(2), (schema(), schema("south", columns=(X, Y, extra))))


@pytest.mark.parametrize(
    ("more", "where"),
    [
        ({"privacy": NonPrivate(words="we agree")}, "train.privacy"),
        ({"privacy": Dp(epsilon=1.0, delta=1e-5, clipping="per-layer")}, "train.privacy"),
        ({"views": Views(count=2)}, "train.views"),
        ({"views": Views(transforms=(Flip(),))}, "train.views"),
    ],
)
def test_what_no_native_step_has(more: Any, where: str) -> None:
    train = dataclasses.replace(request().train, **more)
    check_request(dataclasses.replace(request(), train=train), (schema(),))
    train = dataclasses.replace(train, runtime="native")
    with pytest.raises(PlanError) as refused:
        check_request(dataclasses.replace(request(), train=train), (schema(),))
    assert (refused.value.code, refused.value.where) == ("plan.native", where)


def test_the_unit_column_feeds_no_model() -> None:
    unit = Column(name="who", dtype="i64", low=0, high=299, role="unit")
    job = request(inputs=(InputBinding(input="x", columns=("who",)),))
    with pytest.raises(PlanError) as e:
        check_request(job, (schema(columns=(X, Y, unit)),))
    assert e.value.code == "plan.unknown-column" and "who" not in e.value.mend


def test_requests_that_name_nothing_or_too_much() -> None:
    for job, schemas, code in (
        (request(inputs=()), (schema(),), "plan.inputs"),
        (request(2), (schema(),), "plan.datasets"),
        (request(batch=301), (schema(),), "plan.batch-size"),
    ):
        with pytest.raises(PlanError) as e:
            check_request(job, schemas)
        assert e.value.code == code
