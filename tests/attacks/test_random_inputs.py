"""Random inputs as an attacker would write them: refused, or drawn by the server and by nobody."""

from __future__ import annotations

import math

import pytest
import torch

from casemate.engine.program import Program
from casemate.graph import check
from casemate.graph.model import DtypeArg, Graph, InputSpec, Node, Ref, Size
from casemate.plan.check import check_inputs
from casemate.spec import codec
from casemate.spec.data import Column, DatasetSchema
from casemate.spec.errors import CasemateError, ModelError, PlanError
from casemate.spec.job import InputBinding
from casemate.spec.tensors import TensorInfo
from support import engine_lab as lab

B = Size(a=1)
INFOS = {"w": TensorInfo("f32", (3, 4), 0, 48)}


def drawn(**change: object) -> InputSpec:
    given: dict = {"name": "m", "kind": "random", "dtype": "f32", "shape": (B, 4), "rate": 0.5}
    return InputSpec(**given | change)


def graph(mask: InputSpec, *more: Node, at: str = "%d", **change: InputSpec) -> Graph:
    return Graph(
        inputs=(
            change.get("x", lab.data("x", "f32", 4)), lab.data("y", "i64"),
            change.get("w", lab.param("w", 3, 4)), mask,
        ),
        nodes=(
            lab.node("d", "aten.mul.Tensor", "%x", "%m"),
            *more,
            lab.node("s", "aten.linear.default", at, "%w"),
            lab.node("loss", "aten.cross_entropy_loss.default", "%s", "%y", None, 0),
        ),
        loss="loss",
    )  # fmt: skip


def test_an_honest_one_is_admitted_and_counts() -> None:
    made = check.check(graph(drawn()), INFOS)
    assert made.values["m"].sizes(7) == (7, 4)
    assert "d" not in made.frozen_prefix  # nothing that is drawn anew can be kept
    plain = check.check(graph(lab.data("m", "f32", 4)), INFOS)
    assert "d" in plain.frozen_prefix
    assert made.saved_bytes == plain.saved_bytes + 16
    program = Program(made.graph, {"w": torch.randn(3, 4)})
    assert not program.has_prefix and program.frontier == ["x", "y", "m"]


BAD = {
    "never": drawn(rate=0.0),
    "always": drawn(rate=1.0),
    "negative": drawn(rate=-0.5),
    "more than all": drawn(rate=2.0),
    "no number": drawn(rate=math.nan),
    "a gain without bound": drawn(rate=math.nextafter(1, 0)),
    "whole numbers": drawn(dtype="i64"),
    "of the weights' file": drawn(tensor="w"),
    "for all records": drawn(shape=(4,)),
    "one for all": drawn(shape=(1, 4)),
    "batch last": drawn(shape=(4, B)),
    "batch twice": drawn(shape=(B, B)),
    "two records each": drawn(shape=(Size(a=2), 4)),
    "one record more": drawn(shape=(Size(a=1, c=1), 4)),
    "less than nothing": drawn(shape=(B, -4)),
    "too large": drawn(shape=(B, 2**28 + 1)),
    "of a taken name": drawn(name="x"),
}


@pytest.mark.parametrize("name", BAD)
def test_refused_by_form(name: str) -> None:
    with pytest.raises(ModelError) as e:
        check.check(graph(BAD[name]), INFOS)
    assert e.value.code in ("model.form", "model.argument", "model.too-large")


@pytest.mark.parametrize(
    "change",
    [
        {"x": InputSpec(name="x", kind="data", dtype="f32", shape=(B, 4), rate=0.5)},
        {"w": InputSpec(name="w", kind="param", dtype="f32", shape=(3, 4), tensor="w", rate=0.1)},
    ],
)
def test_other_inputs_have_no_rate(change: dict[str, InputSpec]) -> None:
    with pytest.raises(ModelError) as e:
        check.check(graph(drawn(), **change), INFOS)
    assert e.value.code == "model.form"


MIXING = {
    "mean over records": lab.node("e", "aten.mean.dim", "%m", [0], True),
    "another record's draws": lab.node("e", "aten.roll.default", "%m", [1], [0]),
    "sorted over records": lab.node("e", "aten.flip.default", "%m", [0]),
}


@pytest.mark.parametrize("name", MIXING)
def test_draws_do_not_mix_either(name: str) -> None:
    with pytest.raises(ModelError) as e:
        check.check(graph(drawn(), MIXING[name]), INFOS)
    assert (e.value.code, e.value.where) == ("model.mixes-records", "e")


def test_an_index_made_of_draws_is_proved_in_range_too() -> None:
    to = Node(name="i", op="aten._to_copy.default", args=(Ref(name="m"),),
              kwargs={"dtype": DtypeArg(dtype="i64")})  # fmt: skip
    pick = lab.node("g", "aten.gather.default", "%x", 1, "%i")
    with pytest.raises(ModelError) as e:
        check.check(graph(drawn(), to, pick, at="%g"), INFOS, bounds={"y": (0, 2)})
    assert e.value.code == "model.index-range"


def test_a_loss_of_draws_alone_trains_nothing() -> None:
    of = Graph(
        inputs=(lab.data("x", "f32", 4), lab.param("w", 3, 4), drawn()),
        nodes=(lab.node("s", "aten.sum.dim_IntList", "%m", [1]),),
        loss="s",
    )
    with pytest.raises(ModelError) as e:
        check.check(of, INFOS)
    assert e.value.code == "model.nothing-trained"


def test_no_column_feeds_it() -> None:
    columns = (
        Column(name="a", dtype="f32", shape=(4,), low=0.0, high=1.0),
        Column(name="b", dtype="i64", low=0, high=2, role="label"),
    )
    schema = DatasetSchema(name="d", columns=columns, rows=5, units=5)
    bound = [InputBinding(input=n, columns=(c,)) for n, c in (("x", "a"), ("y", "b"))]
    inputs = graph(drawn()).inputs
    check_inputs(inputs, bound, [schema])
    with pytest.raises(PlanError) as e:
        check_inputs(inputs, [*bound, InputBinding(input="m", columns=("a",))], [schema])
    assert e.value.code == "plan.unknown-input"


def test_its_form_is_canonical() -> None:
    spec = drawn()
    assert codec.decode(InputSpec, codec.encode(spec)) == spec
    plain = codec.encode(lab.data("x", "f32", 4))
    assert b"rate" not in plain
    with pytest.raises(CasemateError):
        codec.decode(InputSpec, plain.replace(b'"shape"', b'"rate":0.0,"shape"'))
