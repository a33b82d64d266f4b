# ruff: noqa: E501 - one call a line
"""What is no linear image of a sum over records must not be called one: a constant that is added
would be counted once for each record, and a clip would be of something else. Each is refused by the
node's name; with refusals silenced the numbers show that it is not linear."""

from __future__ import annotations

import dataclasses

import pytest

from casemate.graph import joint
from casemate.graph.model import DtypeArg, Node
from casemate.graph.ops import JOINT, Batch, Call, Value
from casemate.spec.errors import ModelError
from support.jointcases import Case, nonlinear, problems, single
from support.rawgraph import B, ls, node, r

S, S4, X = Value("f32", (4, 4), summed=True), Value("f32", (4,), summed=True), Value("f32", (1, 4), Batch(0))  # fmt: skip
R, R4, MASK = Value("f32", (4, 4)), Value("f32", (4,)), Value("bool", (4, 4))
ZERO, INDEX = Value("f32", (4, 4), bounds=(0, 0)), Value("i64", (4, 4), None, (0, 3))
ROWS, WHOLE = Value("i64", (4,), None, (0, 3)), DtypeArg(dtype="i64")

NONLINEAR: dict[str, Case] = {
    "a number added": single("add.Tensor", {"s": S}, r("s"), 1),
    "a number taken away": single("sub.Tensor", {"s": S}, r("s"), 0.5),
    "taken from a number": single("rsub.Scalar", {"s": S}, r("s"), 1),
    "a number added, as a number": single("add.Scalar", {"s": S}, r("s"), 1),
    "a constant added": single("add.Tensor", {"s": S, "w": R}, r("s"), r("w")),
    "squared": single("mul.Tensor", {"s": S, "t": S}, r("s"), r("t")),
    "multiplied with itself": single("mm.default", {"s": S, "t": S}, r("s"), r("t")),
    "a vector with itself": single("dot.default", {"s": S4, "t": S4}, r("s"), r("t")),
    "divided by a sum": single("div.Tensor", {"w": R, "s": S}, r("w"), r("s")),
    "to a power": single("pow.Tensor_Scalar", {"s": S}, r("s"), 3),
    "relu": single("relu.default", {"s": S}, r("s")),
    "absolute": single("abs.default", {"s": S}, r("s")),
    "sign": single("sgn.default", {"s": S}, r("s")),
    "clamped": single("clamp.default", {"s": S}, r("s"), -0.1, 0.1),
    "compared": single("gt.Scalar", {"s": S}, r("s"), 0),
    "rounded": single("_to_copy.default", {"s": S}, r("s"), dtype=WHOLE),
    "summed as integers": single("sum.dim_IntList", {"s": S}, r("s"), ls(0), False, dtype=WHOLE),
    "summed along an axis as integers": single("cumsum.default", {"s": S}, r("s"), 0, dtype=WHOLE),
    "copied to integers": single("copy.default", {"i": INDEX, "s": S}, r("i"), r("s")),
    "softmax": single("_softmax.default", {"s": S}, r("s"), 1, False),
    "normalised": single("native_layer_norm.default", {"s": S}, r("s"), ls(4), None, None, 1e-5),
    "the output of a derivative": single("tanh_backward.default", {"w": R, "s": S}, r("w"), r("s")),
    "gradient and output": single("sigmoid_backward.default", {"s": S, "t": S}, r("s"), r("t")),
    "filled with 1": single("masked_fill.Scalar", {"s": S, "m": MASK}, r("s"), r("m"), 1.0),
    "filled with a value": single("masked_fill.Tensor", {"s": S, "m": MASK, "w": Value("f32", ())}, r("s"), r("m"), r("w")),
    "padded with 1": single("constant_pad_nd.default", {"s": S}, r("s"), ls(1, 1), 1.0),
    "2 written into it": single("scatter.value", {"s": S, "i": INDEX}, r("s"), 0, r("i"), 2),
    "a constant written into it": single("scatter.src", {"s": S, "i": INDEX, "w": R}, r("s"), 0, r("i"), r("w")),
    "written into a constant": single("scatter.src", {"w": R, "i": Value("i64", (2, 4), None, (0, 1)), "s": S}, r("w"), 0, r("i"), r("s")),
    "a constant added to it by index": single("scatter_add.default", {"s": S, "i": INDEX, "w": R}, r("s"), 0, r("i"), r("w")),
    "added to a constant by index": single("index_put.default", {"w": R, "i": ROWS, "s": S}, r("w"), ls(r("i")), r("s"), True),
    "rows added to a constant": single("index_add.default", {"w": R, "i": ROWS, "s": S}, r("w"), 0, r("i"), r("s")),
    "a row of a constant": single("select_scatter.default", {"w": R, "s": S4}, r("w"), r("s"), 0, 1),
    "a constant row": single("select_scatter.default", {"s": S, "w": R4}, r("s"), r("w"), 0, 1),
    "rows of a constant": single("slice_scatter.default", {"w": R, "s": Value("f32", (2, 4), summed=True)}, r("w"), r("s"), 0, 1, 3),
    "this or a constant": single("where.self", {"m": MASK, "s": S, "w": R}, r("m"), r("s"), r("w")),
    "a constant or this": single("where.self", {"m": MASK, "w": R, "s": S}, r("m"), r("w"), r("s")),
    "beside a constant": single("cat.default", {"s": S, "w": R}, ls(r("s"), r("w")), 0),
    "interpolated": single("lerp.Scalar", {"w": R, "s": S}, r("w"), r("s"), 0.5),
    "a product added": single("addcmul.default", {"w": R, "s": S, "v": R}, r("w"), r("s"), r("v")),
    "a bias added": single("addmm.default", {"w": R, "s": S, "v": R}, r("w"), r("s"), r("v")),
    "the largest": single("amax.default", {"s": S}, r("s"), ls(1)),
    "sorted": single("sort.default", {"s": S}, r("s"), 1),
    "the norm": single("linalg_vector_norm.default", {"s": S}, r("s"), 2, ls(1)),
}  # fmt: skip

# A sum over records beside what is of single records: neither a sum nor of one record.
MIXED: dict[str, Case] = {
    "records plus a sum": single("add.Tensor", {"x": X, "s": S4}, r("x"), r("s")),
    "records times a sum": single("mm.default", {"x": X, "s": S}, r("x"), r("s")),
    "a sum times records": single("mul.Tensor", {"s": S4, "x": X}, r("s"), r("x")),
    "a sum over a sum over records": single("div.Tensor", {"s": S4, "x": X}, r("s"), r("x")),
    "records where a sum is": single("where.self", {"m": Value("bool", (1, 4), Batch(0)), "s": S4, "z": Value("f32", (4,), bounds=(0, 0))}, r("m"), r("s"), r("z")),
    "records into a sum": single("index_put.default", {"s": S, "i": Value("i64", (1,), Batch(0), (0, 3)), "x": X}, r("s"), ls(r("i")), r("x"), True),
    "a derivative of records by a sum": single("tanh_backward.default", {"x": X, "s": S4}, r("x"), r("s")),
    "classes by a sum": single("nll_loss_forward.default", {"x": X, "y": Value("i64", (1,), Batch(0), (0, 3)), "s": S4}, r("x"), r("y"), r("s"), 0, -100),
    "losses by a total over records": single("nll_loss_backward.default", {"g": Value("f32", (1,), Batch(0)), "x": X, "y": Value("i64", (1,), Batch(0), (0, 3)), "s": Value("f32", (), summed=True)}, r("g"), r("x"), r("y"), None, 0, -100, r("s")),
    "normalised records by a sum": single("native_layer_norm.default", {"x": X, "s": S4}, r("x"), ls(4), r("s"), r("s"), 1e-5),
    "a convolution by a sum": single("convolution.default", {"x": Value("f32", (1, 4, 6), Batch(0)), "s": Value("f32", (4, 4, 3), summed=True)}, r("x"), r("s"), None, ls(1), ls(0), ls(1), False, ls(0), 1),
    "a table that is a sum": single("embedding.default", {"s": S, "i": Value("i64", (1,), Batch(0), (0, 3))}, r("s"), r("i")),
}  # fmt: skip


@pytest.mark.parametrize("what", NONLINEAR)
def test_no_linear_image(what: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ModelError) as e:
        NONLINEAR[what].prove()
    assert e.value.where == "bad" and e.value.code == "model.mixes-records"
    monkeypatch.setattr(Call, "refuse", lambda self, *a: None)
    assert nonlinear(NONLINEAR[what])


@pytest.mark.parametrize("what", MIXED)
def test_a_sum_beside_records(what: str) -> None:
    with pytest.raises(ModelError) as e:
        MIXED[what].prove()
    assert e.value.where == "bad" and e.value.code == "model.mixes-records"


# --- whole graphs: x (B, 4), weights w; the gradient of sum(x w) is the sum of x

INPUTS = {"x": X, "w": R4, "m": R, "t": Value("f32", (1, 3, 4), Batch(0))}
FORWARD = (
    node("l0", "mul.Tensor", r("x"), r("w")),
    node("loss", "sum.dim_IntList", r("l0"), ls(1)),
    node("g", "sum.dim_IntList", r("x"), ls(0)),
)


def prove(*nodes: Node, loss: str = "loss", gradients: tuple[str | None, ...] = ("g",)) -> joint.Proved:  # fmt: skip
    return joint.prove(joint.Joint(INPUTS, (*FORWARD, *nodes), loss, gradients))


def test_a_clean_graph() -> None:
    made = prove(gradients=("g", None))
    assert set(made.contractions) == {"g"} and not made.linear


# What an author's own backward may do to the gradients of a batch: (nodes, the last at fault).
BACKWARD = {
    "centred over the batch": (node("bad", "mean.dim", r("x"), ls(0), True),),
    "scaled by the batch's norm": (node("bad", "linalg_vector_norm.default", r("x")),),
    "the largest record's alone": (node("bad", "amax.default", r("x"), ls(0)),),
    "of the first record": (node("bad", "select.int", r("x"), 0, 0),),
    "of the next record": (node("bad", "roll.default", r("x"), ls(1), ls(0)),),
    "sorted over records": (node("bad", "sort.default", r("x"), 0),),
    "softmax over records": (node("bad", "_softmax.default", r("x"), 0, False),),
    "weighted by all others": (
        node("n", "sum.dim_IntList", r("x"), ls(0)), node("bad", "mul.Tensor", r("x"), r("n"))),
    "a sum given to every record": (
        node("e", "expand.default", r("g"), ls(B, 4)), node("bad", "mul.Tensor", r("e"), r("x"))),
    "a sum given to every record and summed": (
        node("e", "expand.default", r("g"), ls(B, 4)), node("bad", "add.Tensor", r("e"), r("x"))),
    "records by records": (
        node("p", "t.default", r("x")), node("q", "mm.default", r("p"), r("x")), node("bad", "mm.default", r("x"), r("q"))),
    "scaled by its own norm": (node("bad", "linalg_vector_norm.default", r("g")),),
    "its sign": (node("bad", "sgn.default", r("g")),),
    "squared": (node("bad", "mul.Tensor", r("g"), r("g")),),
    "scaled by the batch's size": (node("bad", "div.Tensor", r("g"), B),),
    "drawn at random": (node("bad", "bernoulli.default", r("x")),),
    "dropped out": (node("bad", "native_dropout.default", r("x"), 0.5, True),),
    "the median": (node("bad", "median.default", r("x")),),
    "written over by strides": (node("bad", "as_strided.default", r("x"), ls(4, 4), ls(0, 1)),),
    "an unknown library's": (Node(name="bad", op="evil.kernel.default", args=(r("x"),), kwargs={}),),
}  # fmt: skip


@pytest.mark.parametrize("what", BACKWARD)
def test_a_backward_of_ones_own(what: str) -> None:
    with pytest.raises(ModelError) as e:
        prove(*BACKWARD[what])
    assert e.value.where == "bad"


@pytest.mark.parametrize(
    ("gradient", "nodes"),
    [
        ("x", ()),
        ("w", ()),
        ("loss", ()),
        ("y", (node("y", "mul.Tensor", r("x"), r("w")),)),
        ("y", (node("y", "mul.Tensor", r("w"), r("w")),)),
    ],
)
def test_gradients_that_are_no_sums(gradient: str, nodes: tuple[Node, ...]) -> None:
    with pytest.raises(ModelError) as e:
        prove(*nodes, gradients=("g", gradient))
    assert e.value.where == gradient and e.value.code == "model.mixes-records"


@pytest.mark.parametrize("loss", ["g", "w"])
def test_losses_that_are_not_of_records(loss: str) -> None:
    with pytest.raises(ModelError) as e:
        prove(loss=loss)
    assert e.value.where == loss


# --- seeded bugs in the table as a whole


@pytest.mark.parametrize(
    ("op", "case"),
    [
        ("aten.embedding_dense_backward.default", single("embedding_dense_backward.default", {"g": Value("f32", (1, 3, 4), Batch(0)), "i": Value("i64", (1, 3), Batch(0), (0, 3))}, r("g"), r("i"), 4, -1, True)),
        ("aten.convolution_backward.default", single("convolution_backward.default", {"g": Value("f32", (1, 2, 4), Batch(0)), "x": Value("f32", (1, 2, 6), Batch(0)), "w": Value("f32", (2, 2, 3))}, r("g"), r("x"), r("w"), ls(2), ls(1), ls(0), ls(1), False, ls(0), 1, ls(True, True, True))),
    ],
)  # fmt: skip
def test_a_sum_said_to_be_constant_is_caught(op: str, case: Case, monkeypatch: pytest.MonkeyPatch) -> None:  # fmt: skip
    """A site that forgets to say that it sums; frequency scaling that is admitted."""
    sound = JOINT[op]
    monkeypatch.setattr(Call, "refuse", lambda self, *a: None)
    if op.startswith("aten.embedding"):  # admitted, its sums are not the sums of single records
        assert problems(case)
    monkeypatch.setitem(JOINT, op, dataclasses.replace(sound, contract=lambda call: tuple(
        dataclasses.replace(v, summed=False) for v in made) if isinstance(made := sound.rule(call), tuple) else dataclasses.replace(made, summed=False)))  # fmt: skip
    assert problems(case)
