"""ONNX files as graphs, against ONNX's own reference evaluator, and what is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper
from onnx.reference import ReferenceEvaluator

from casemate.client.torch import export_onnx
from casemate.client.torch.onnx import load
from casemate.client.torch.onnx_rules import RULES
from casemate.engine import predict
from casemate.engine.prepare import weights_of
from casemate.graph import check, pack
from casemate.spec.errors import CasemateError

FLOAT, INT = TensorProto.FLOAT, TensorProto.INT64
RNG = np.random.default_rng(0)


def node(op: str, inputs: str, outputs: str = "y", **attributes: Any) -> Any:
    named = ["" if i == "_" else i for i in inputs.split()]
    return helper.make_node(op, named, outputs.split(), name=f"the {op}", **attributes)


def f32(*shape: int) -> Any:
    return RNG.normal(size=shape).astype(np.float32)


def ints(*values: int) -> Any:
    return np.array(values, np.int64)


def model(
    nodes: Any, weights: dict[str, Any], shape: tuple[int, ...] = (4,), dtype: int = FLOAT,
    out: int = FLOAT, opset: int = 18, outputs: tuple[str, ...] = ("y",),
) -> Any:  # fmt: skip
    nodes = nodes if isinstance(nodes, list) else [nodes]
    graph = helper.make_graph(
        nodes,
        "g",
        [helper.make_tensor_value_info("x", dtype, ["N", *shape])],
        [helper.make_tensor_value_info(o, out, ["any"]) for o in outputs],
        [numpy_helper.from_array(a, n) for n, a in weights.items()],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=8)


def written(proto: Any, folder: Path) -> Path:
    path = folder / "model.onnx"
    path.write_bytes(proto.SerializeToString())
    return path


IMAGE = (3, 8, 8)
CASES: dict[str, Any] = {
    **{
        op: model(node(op, "x"), {})
        for op in (
            "Abs",
            "Ceil",
            "Cos",
            "Elu",
            "Erf",
            "Exp",
            "Floor",
            "HardSigmoid",
            "HardSwish",
            "Identity",
            "LeakyRelu",
            "LogSoftmax",
            "Mish",
            "Neg",
            "Reciprocal",
            "Relu",
            "Round",
            "Selu",
            "Sigmoid",
            "Sign",
            "Sin",
            "Softmax",
            "Softplus",
            "Tanh",
            "Dropout",
        )
    },
    **{op: model([node("Abs", "x", "a"), node(op, "a")], {}) for op in ("Sqrt", "Log")},
    **{
        op: model(node(op, "x b"), {"b": f32(4)})
        for op in ("Add", "Div", "Mul", "Sub", "Max", "Min", "Sum", "PRelu")
    },
    **{
        op: model([node(op, "x b", "m"), node("Cast", "m", to=FLOAT)], {"b": f32(4)})
        for op in ("Equal", "Greater", "GreaterOrEqual", "Less", "LessOrEqual")
    },
    **{
        op: model(node(op, "x", keepdims=0, axes=[1, 2]), {}, (3, 4), opset=17)
        for op in ("ReduceL2", "ReduceMax", "ReduceMean", "ReduceMin")
    },
    "ReduceSum": model(node("ReduceSum", "x axes"), {"axes": ints(1, 2)}, (3, 4)),
    "And Or Not Where": model(
        [
            node("Greater", "x b", "m"),
            node("Less", "x c", "n"),
            node("And", "m n", "p"),
            node("Or", "p m", "q"),
            node("Not", "q", "r"),
            node("Where", "r x b"),
        ],
        {"b": f32(4), "c": f32(4)},
    ),
    "ArgMax": model(node("ArgMax", "x", axis=1), {}, out=INT),
    "ArgMin": model(node("ArgMin", "x", axis=-1, keepdims=0), {}, out=INT),
    "Pow": model(node("Pow", "x e"), {"e": np.array(2.0, np.float32)}),
    "Clip": model(node("Clip", "x l h"), {"l": np.float32(-0.5), "h": np.float32(0.4)}),
    "Clip below": model(node("Clip", "x _ h"), {"h": np.array(0.4, np.float32)}),
    "Gelu": model(node("Gelu", "x", approximate="tanh"), {}, opset=20),
    "Gemm": model(node("Gemm", "x w b", transB=1), {"w": f32(5, 4), "b": f32(5)}),
    "Gemm scaled": model(
        node("Gemm", "x w b", alpha=0.5, beta=2.0), {"w": f32(4, 5), "b": f32(1, 5)}
    ),
    "MatMul": model(node("MatMul", "x w"), {"w": f32(4, 6)}, (3, 4)),
    "Einsum": model(node("Einsum", "x w", equation="bij,jk->bik"), {"w": f32(4, 6)}, (3, 4)),
    "Conv": model(
        node("Conv", "x w b", strides=[2, 2], pads=[1, 1, 1, 1]),
        {"w": f32(6, 3, 3, 3), "b": f32(6)},
        IMAGE,
    ),
    "Conv, uneven": model(
        node("Conv", "x w", pads=[0, 1, 1, 2], dilations=[2, 1]), {"w": f32(6, 3, 3, 3)}, IMAGE
    ),
    "Conv in groups, 1d": model(node("Conv", "x w", group=3), {"w": f32(6, 1, 3)}, (3, 9)),
    "ConvTranspose": model(
        node("ConvTranspose", "x w", strides=[2, 2], output_padding=[1, 1]),
        {"w": f32(3, 4, 3, 3)},
        IMAGE,
    ),
    "MaxPool": model(
        node("MaxPool", "x", kernel_shape=[3, 3], strides=[2, 2], pads=[1, 1, 1, 1]), {}, IMAGE
    ),
    "AveragePool": model(node("AveragePool", "x", kernel_shape=[2, 2], strides=[2, 2]), {}, IMAGE),
    "GlobalAveragePool": model(node("GlobalAveragePool", "x"), {}, IMAGE),
    "GlobalMaxPool": model(node("GlobalMaxPool", "x"), {}, IMAGE),
    "BatchNormalization": model(
        node("BatchNormalization", "x s b m v"),
        {"s": f32(3), "b": f32(3), "m": f32(3), "v": np.abs(f32(3))},
        IMAGE,
    ),
    "InstanceNormalization": model(
        node("InstanceNormalization", "x s b"), {"s": f32(3), "b": f32(3)}, IMAGE
    ),
    "LayerNormalization": model(
        node("LayerNormalization", "x s b", axis=-1), {"s": f32(4), "b": f32(4)}, (3, 4)
    ),
    "GroupNormalization": model(
        node("GroupNormalization", "x s b", num_groups=3),
        {"s": f32(6), "b": f32(6)},
        (6, 5, 5),
        opset=21,
    ),
    "Flatten": model(node("Flatten", "x"), {}, IMAGE),
    "Reshape": model(node("Reshape", "x s"), {"s": ints(0, 2, -1)}, (3, 4)),
    "Reshape by its own shape": model(
        [
            node("Shape", "x", "s"),
            node("Gather", "s zero", "n"),
            node("Unsqueeze", "n axes", "m"),
            node("Concat", "m rest", "t", axis=0),
            node("Reshape", "x t"),
        ],
        {"zero": np.array(0), "axes": ints(0), "rest": ints(4, 3)},
        (3, 4),
    ),
    "Sizes that are computed": model(
        [
            node("Shape", "x", "s", start=1),
            node("Slice", "s a b", "t"),
            node("Squeeze", "t", "u"),
            node("Mul", "u two", "v"),
            node("Div", "v two", "w"),
            node("Unsqueeze", "w zero", "z"),
            node("Concat", "keep z last", "to", axis=0),
            node("Reshape", "x to"),
        ],
        {
            "a": ints(0),
            "b": ints(1),
            "two": np.array(2),
            "zero": ints(0),
            "keep": ints(0),
            "last": ints(-1),
        },
        (3, 4),
    ),
    "Transpose": model(node("Transpose", "x", perm=[0, 2, 1]), {}, (3, 4)),
    "Squeeze Unsqueeze": model(
        [node("Unsqueeze", "x a", "u"), node("Squeeze", "u b")], {"a": ints(1, 3), "b": ints(3)}
    ),
    "Concat Split": model(
        [
            node("Concat", "x x", "c", axis=1),
            node("Split", "c n", "p q", axis=1),
            node("Sub", "p q"),
        ],
        {"n": ints(4, 4)},
    ),
    "Slice": model(
        node("Slice", "x s e a t"),
        {"s": ints(1), "e": ints(2**62), "a": ints(-1), "t": ints(2)},
        (3, 9),
    ),
    "Expand": model(
        [node("Unsqueeze", "x a", "u"), node("Expand", "u s")], {"a": ints(1), "s": ints(1, 3, 4)}
    ),
    "Pad": model(node("Pad", "x p v"), {"p": ints(0, 1, 2, 0, 0, 1), "v": np.float32(2.5)}, (3, 4)),
    "Pad by reflection": model(
        node("Pad", "x p", mode="reflect"), {"p": ints(0, 0, 1, 2, 0, 0, 2, 1)}, IMAGE
    ),
    "Pad by its edge": model(
        node("Pad", "x p _ a", mode="edge"), {"p": ints(2, 1), "a": ints(2)}, (3, 4)
    ),
    "Constant": model(
        [
            helper.make_node("Constant", [], ["c"], value=numpy_helper.from_array(f32(4))),
            helper.make_node("Constant", [], ["d"], value_float=0.5),
            node("Add", "x c", "e"),
            node("Mul", "e d"),
        ],
        {},
    ),
    "ConstantOfShape": model(
        [
            node(
                "ConstantOfShape",
                "s",
                "c",
                value=numpy_helper.from_array(np.array([3.0], np.float32)),
            ),
            node("Add", "x c"),
        ],
        {"s": ints(4)},
    ),
    "Gather rows": model(node("Gather", "x i", axis=1), {"i": ints(2, 0)}, (3, 4)),
    "Gather one": model(node("Gather", "x i", axis=2), {"i": np.array(1)}, (3, 4)),
}


def outputs_of(packed: Any, given: dict[str, Any]) -> dict[str, Any]:
    graph, view = pack.unpack(packed.data)
    known = check.known_bounds(graph, view, (), ())
    checked = check.check(graph, {n: i for n, (i, _) in view.items()}, bounds=known)
    forward = predict.Forward(graph, checked, weights_of(view), 4)
    rows = {n: torch.from_numpy(a) for n, a in given.items()}
    found = forward(rows, len(next(iter(given.values()))))
    return {n: t.numpy() for n, t in found.items()}


@pytest.mark.parametrize("case", CASES)
def test_outputs_are_those_of_the_reference(case: str, tmp_path: Path) -> None:
    proto = CASES[case]
    onnx.checker.check_model(proto)
    shape = [d.dim_value for d in proto.graph.input[0].type.tensor_type.shape.dim][1:]
    x = f32(3, *shape)
    (wanted,) = ReferenceEvaluator(proto).run(None, {"x": x})
    found = outputs_of(export_onnx(written(proto, tmp_path)), {"x": x})["y"]
    assert found.shape == wanted.shape and found.dtype == wanted.dtype
    np.testing.assert_allclose(found, wanted, rtol=2e-5, atol=2e-5)


def test_every_rule_is_tried() -> None:
    tried = {n.op_type for proto in CASES.values() for n in proto.graph.node}
    assert set(RULES) == tried


def test_tokens_are_looked_up_within_their_bounds(tmp_path: Path) -> None:
    proto = model(node("Gather", "table x"), {"table": f32(10, 4)}, (5,), dtype=TensorProto.INT64)
    path = written(proto, tmp_path)
    tokens = RNG.integers(0, 10, size=(3, 5))
    (wanted,) = ReferenceEvaluator(proto).run(None, {"x": tokens})
    found = outputs_of(export_onnx(path, bounds={"x": (0, 9)}), {"x": tokens})["y"]
    np.testing.assert_array_equal(found, wanted)
    with pytest.raises(CasemateError, match="index-range"):
        export_onnx(path)


FOREIGN = model(helper.make_node("Gelu", ["x"], ["y"], domain="com.microsoft"), {})
FOREIGN.opset_import.append(helper.make_opsetid("com.microsoft", 1))
REFUSED: dict[str, tuple[Any, str]] = {
    "an operation without a rule": (model(node("Hardmax", "x"), {}), "Hardmax.*the Hardmax"),
    "another domain": (FOREIGN, "Gelu"),
    "records that mix": (model(node("Softmax", "x", axis=0), {}), "mixes"),
    "a mean over records": (
        model(node("ReduceMean", "x", axes=[0], keepdims=1), {}, opset=17), "mixes|batch"
    ),
    "an old opset": (model(node("Relu", "x"), {}, opset=11), "opset 11"),
    "padding by itself": (
        model(node("Conv", "x w", auto_pad="SAME_UPPER"), {"w": f32(6, 3, 3, 3)}, IMAGE), "auto_pad"
    ),
    "a size that is data": (
        model([node("Cast", "x", "s", to=INT), node("Reshape", "x s")], {}), "constant"
    ),
    "another float": (model(node("Relu", "x"), {}, dtype=TensorProto.DOUBLE), "not float32"),
    "a second dynamic axis": (model(node("Relu", "x"), {}, ("T", 4)), "fixed sizes"),  # type: ignore[arg-type]
    "training mode": (
        model(
            node("BatchNormalization", "x s b m v", "y rm rv", training_mode=1),
            {"s": f32(3), "b": f32(3), "m": f32(3), "v": np.abs(f32(3))}, IMAGE,
        ),
        "training mode",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_said_is_refused_by_name(case: str, tmp_path: Path) -> None:
    proto, words = REFUSED[case]
    with pytest.raises(CasemateError, match=words) as refused:
        export_onnx(written(proto, tmp_path))
    assert refused.value.family == "model"


def test_what_is_no_onnx_file_is_refused(tmp_path: Path) -> None:
    for data in (b"", b"garbage", b"\x08" * 1000):
        (tmp_path / "model.onnx").write_bytes(data)
        with pytest.raises(CasemateError, match=r"usage\.file"):
            load(tmp_path / "model.onnx")
    with pytest.raises(CasemateError, match=r"usage\.file"):
        load(tmp_path / "absent.onnx")


def test_the_page_lists_the_rules() -> None:
    page = (Path(__file__).parents[3] / "docs" / "inference.md").read_text()
    listed = page.split("<!-- onnx -->")[1].split("<!-- end -->")[0]
    assert sorted(w.strip() for w in listed.split(",")) == sorted(RULES)
