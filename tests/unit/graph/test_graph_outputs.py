"""What is admitted as a graph for prediction, beside what the exporter writes."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest

from casemate.graph import check, pack
from casemate.graph.model import Graph, InputSpec, Node, Output, Ref, Size
from casemate.spec import codec
from casemate.spec.errors import ModelError
from casemate.spec.tensors import TensorInfo

X = InputSpec(name="x", kind="data", dtype="f32", shape=(Size(a=1), 3))
K = InputSpec(name="k", kind="data", dtype="i64", shape=(Size(a=1),), low=0, high=4)
RELU = Node(name="r", op="aten.relu.default", args=(Ref(name="x"),), kwargs={})
GRAPH = Graph(inputs=(X, K), nodes=(RELU,), loss="", outputs=(Output(name="out", value="r"),))
INFOS: dict[str, TensorInfo] = {}


def refused(code: str, **changes: Any) -> None:
    with pytest.raises(ModelError) as error:
        check.check(dataclasses.replace(GRAPH, **changes), INFOS, bounds={})
    assert error.value.code == code


def test_a_plain_one_is_admitted_and_packs() -> None:
    checked = check.check(GRAPH, INFOS, bounds=check.known_bounds(GRAPH, {}, (), ()))
    assert checked.values["k"].bounds == (0, 4) and checked.dimension == 0
    assert pack.unpack(pack.pack(GRAPH, {}).data)[0] == GRAPH


def test_a_graph_without_outputs_keeps_its_bytes() -> None:
    plain = dataclasses.replace(GRAPH, inputs=(X,), outputs=(), loss="r")
    assert b"outputs" not in codec.encode(plain) and b"low" not in codec.encode(plain)


def test_two_results_or_none() -> None:
    refused("model.form", loss="r")
    refused("model.form", outputs=())
    refused("model.form", outputs=(Output(name="out", value="nothing"),))
    refused("model.form", outputs=(Output(name="out", value="r"),) * 2)
    refused("model.form", outputs=(Output(name="a b", value="r"),))
    many = tuple(Output(name=f"o{i}", value="r") for i in range(check.MAX_OUTPUTS + 1))
    refused("model.too-large", outputs=many)


def test_nothing_is_trained_or_drawn() -> None:
    drawn = InputSpec(name="d", kind="random", dtype="f32", shape=(Size(a=1),), rate=0.5)
    refused("model.form", inputs=(X, K, drawn))


@pytest.mark.parametrize(
    "spec",
    [
        dataclasses.replace(X, low=0, high=1),
        dataclasses.replace(K, low=None),
        dataclasses.replace(K, high=None),
        dataclasses.replace(K, low=5),
        dataclasses.replace(K, high=2**63),
        dataclasses.replace(K, dtype="bool"),
    ],
)
def test_bounds_are_of_integers_and_whole(spec: InputSpec) -> None:
    refused("model.form", inputs=(X, spec) if spec.name == "k" else (spec, K))


def test_a_training_graph_declares_no_bounds() -> None:
    refused("model.form", outputs=(), loss="r")


@pytest.mark.parametrize(
    ("op", "args"),
    [
        ("aten.mean.dim", (Ref(name="x"), 0)),
        ("aten.t.default", (Ref(name="x"),)),
        ("aten.select.int", (Ref(name="x"), 0, 0)),
    ],
)
def test_axis_zero_is_the_record(op: str, args: tuple[Any, ...]) -> None:
    from casemate.graph.model import ListArg

    args = tuple(ListArg(items=(a,)) if op.endswith("dim") and a == 0 else a for a in args)
    node = Node(name="r", op=op, args=args, kwargs={})
    with pytest.raises(ModelError) as error:
        check.check(dataclasses.replace(GRAPH, nodes=(node,)), INFOS, bounds={})
    assert error.value.code in ("model.outputs", "model.mixes-records")
