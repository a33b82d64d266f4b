"""The packed form: one sequence of bytes for one model, everything else refused."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from casemate.graph import check, pack
from casemate.graph.model import Graph, InputSpec, Node
from casemate.spec import canonical
from casemate.spec.errors import CasemateError, FormatError, ModelError
from support.rawgraph import graph, infos, ls, node, r


def small() -> tuple[Graph, dict[str, pack.Tensor]]:
    g = graph()
    sizes = {"f32": 4, "i64": 8}
    weights = {
        n: (i.dtype, i.shape, bytes(sizes[i.dtype] * _product(i.shape)))
        for n, i in infos(g).items()
    }
    return g, weights


def _product(shape: tuple[int, ...]) -> int:
    out = 1
    for d in shape:
        out *= d
    return out


def test_round_trip() -> None:
    g, weights = small()
    packed = pack.pack(g, weights)
    again, views = pack.unpack(packed.data)
    assert again == g
    assert {n: (i.dtype, i.shape, bytes(v)) for n, (i, v) in views.items()} == weights
    assert pack.pack(again, weights).digest == packed.digest
    check.check(again, {n: i for n, (i, _) in views.items()})


@given(st.integers(0, 10**6), st.integers(0, 255))
def test_any_changed_byte_is_refused_or_means_another_model(at: int, value: int) -> None:
    g, weights = small()
    data = bytearray(pack.pack(g, weights).data)
    at %= len(data)
    if data[at] == value:
        return
    data[at] = value
    try:
        again, views = pack.unpack(bytes(data))
    except CasemateError as e:
        assert e.code.startswith("format.")
        return
    # What is read is written back to the very same bytes: no two forms of one model.
    tensors = {n: (i.dtype, i.shape, bytes(v)) for n, (i, v) in views.items()}
    assert pack.pack(again, tensors).data == bytes(data)


@given(st.binary(max_size=64))
def test_noise_is_refused(data: bytes) -> None:
    with pytest.raises(FormatError):
        pack.unpack(data)


def test_cut_and_padded() -> None:
    g, weights = small()
    data = pack.pack(g, weights).data
    text = int.from_bytes(data[:8], "little")
    longer = (text + 8).to_bytes(8, "little") + data[8 : 8 + text] + b" " * 8 + data[8 + text :]
    for bad in (data[:-1], data + b"\0", data[:7], b"", longer, b"\xff" * 8 + data[8:]):
        with pytest.raises(FormatError):
            pack.unpack(bad)


def test_deep_json() -> None:
    text = b"[" * 5000 + b"]" * 5000
    with pytest.raises(FormatError):
        pack.unpack(len(text).to_bytes(8, "little") + text)


def _spec(**how: object) -> InputSpec:
    given = {"name": "w", "kind": "param", "dtype": "f32", "shape": (4,), "tensor": "w", **how}
    return InputSpec(**given)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "change",
    [
        {"name": "x"}, {"name": "\u0445"}, {"name": "a b"}, {"name": "loss"}, {"name": ""},
        {"name": "w2", "tensor": "m"}, {"tensor": "nowhere"}, {"shape": (5,)}, {"dtype": "i64"},
        {"dtype": "f64"}, {"kind": "data", "shape": (4,), "tensor": ""}, {"shape": (-4,)},
    ],
)  # fmt: skip
def test_inputs_are_checked(change: dict[str, object]) -> None:
    g = graph()
    inputs = tuple(_spec(**change) if i.name == "w" else i for i in g.inputs)
    with pytest.raises(ModelError) as e:
        check.check(Graph(inputs=inputs, nodes=g.nodes, loss=g.loss), infos(g))
    assert e.value.code == "model.form"


@pytest.mark.parametrize(
    "name", ["", "x", "l0.0", "l\u0430st", "a-b", "__import__('os')", "n" * 600]
)
def test_names_of_nodes(name: str) -> None:
    bad = Node(name=name, op="aten.relu.default", args=(r("x"),), kwargs={})
    with pytest.raises(ModelError) as e:
        g = graph(bad)
        check.check(g, infos(g))
    assert e.value.code == "model.form"


def test_weights_that_no_input_names() -> None:
    g = graph()
    with pytest.raises(ModelError) as e:
        check.check(g, {**infos(g), "secret": infos(g)["w"]})
    assert e.value.code == "model.form"


def test_limits() -> None:
    g = graph(*(node(f"n{i}", "relu.default", r("x")) for i in range(10)))
    for limits in (
        check.Limits(nodes=5),
        check.Limits(inputs=2),
        check.Limits(weight_bytes=8),
        check.Limits(record_bytes=64),
        check.Limits(flops=10),
        check.Limits(elements=3),
    ):
        with pytest.raises(ModelError) as e:
            check.check(g, infos(g), limits=limits)
        assert e.value.code == "model.too-large"


def test_infinities_are_words() -> None:
    g = graph(node("mm", "clamp.default", r("x"), "-inf", "inf"))
    assert b"-inf" in canonical.encode("-inf") and check.check(g, infos(g))
    with pytest.raises(ModelError):
        bad = graph(node("mm", "clamp.default", r("x"), "nan"))
        check.check(bad, infos(bad))
    with pytest.raises(ModelError):
        bad = graph(node("mm", "sum.dim_IntList", r("x"), ls("inf")))
        check.check(bad, infos(bad))
