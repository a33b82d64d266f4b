# ruff: noqa: E501 - one node a line
"""What the proof takes as a gradient, and what it keeps out of sums whatever the table says."""

from __future__ import annotations

import dataclasses

import pytest

from casemate.graph import joint
from casemate.graph.model import DtypeArg, Node
from casemate.graph.ops import JOINT, TABLE, Batch, Op, Value
from casemate.spec.errors import ModelError
from support.jointcases import Case, nonlinear, single
from support.rawgraph import B, ls, node, r

X, R4 = Value("f32", (1, 4), Batch(0)), Value("f32", (4,))
S4, ZERO = Value("f32", (4,), summed=True), Value("f32", (4,), bounds=(0, 0))
INPUTS = {"x": X, "w": R4}
FORWARD = (
    node("l0", "mul.Tensor", r("x"), r("w")),
    node("loss", "sum.dim_IntList", r("l0"), ls(1)),
    node("g", "sum.dim_IntList", r("x"), ls(0)),
)


def prove(*nodes: Node, gradients: tuple[str | None, ...]) -> joint.Proved:
    return joint.prove(joint.Joint(INPUTS, (*FORWARD, *nodes), "loss", gradients))


# --- gradients


ZEROS: dict[str, tuple[Node, ...]] = {
    "made like the parameter": (node("z", "zeros_like.default", r("w")),),
    "made like a sum": (node("z", "zeros_like.default", r("g")),),
    "of the parameter's shape": (node("z", "new_zeros.default", r("x"), ls(4)),),
    "put into another shape": (node("y", "full.default", ls(2, 2), 0.0), node("z", "view.default", r("y"), ls(4))),
}  # fmt: skip


@pytest.mark.parametrize("what", ZEROS)
def test_a_gradient_that_is_zero_is_none(what: str) -> None:
    made = prove(*ZEROS[what], gradients=("g", "z", None))
    assert made.joint.gradients == ("g", None, None)
    assert not made.values["z"].summed and "z" not in made.linear


def test_zeros_made_like_a_sum_take_sums_in() -> None:
    """As the backward of ``w[indices]`` does."""
    put = node("p", "index_put.default", r("z"), ls(r("i")), r("g"), True)
    inputs = {**INPUTS, "i": Value("i64", (4,), None, (0, 3))}
    nodes = (*FORWARD, node("z", "zeros_like.default", r("g")), put)
    made = joint.prove(joint.Joint(inputs, nodes, "loss", ("p",)))
    assert made.joint.gradients == ("p",) and made.values["p"].summed
    assert "p" in made.linear


NO_GRADIENTS: dict[str, tuple[Node, ...]] = {
    "a sum for every record": (node("bad", "expand.default", r("g"), ls(B, 4)),),
    "a sum for every record, by repetition": (node("bad", "repeat.default", r("g"), ls(B, 1)),),
    "zeros for every record": (node("bad", "zeros_like.default", r("x")),),
    "ones": (node("bad", "ones_like.default", r("w")),),
    "integer zeros": (node("bad", "zeros.default", ls(4), dtype=DtypeArg(dtype="i64")),),
    "negative zeros that nothing proves": (node("bad", "mul.Scalar", r("w"), 0.0),),
}  # fmt: skip


@pytest.mark.parametrize("what", NO_GRADIENTS)
def test_what_is_no_gradient(what: str) -> None:
    with pytest.raises(ModelError) as e:
        prove(*NO_GRADIENTS[what], gradients=("g", "bad"))
    assert e.value.where == "bad" and e.value.code == "model.mixes-records"


# --- guards that do not lean on an entry's own condition


def _plain(op: str, linear: str) -> Op:
    """The models' entry, which knows nothing of sums, said to be linear."""
    return dataclasses.replace(TABLE[op], linear=linear)  # type: ignore[arg-type]


GUARDS: dict[str, tuple[Case, str, str]] = {
    "a sum plus a number": (single("add.Tensor", {"s": S4}, r("s"), 1), "aten.add.Tensor", "add"),
    "a sum minus a number": (single("sub.Tensor", {"s": S4}, r("s"), 0.5), "aten.sub.Tensor", "add"),
    "a sum as whole numbers": (single("_to_copy.default", {"s": S4}, r("s"), dtype=DtypeArg(dtype="i64")), "aten._to_copy.default", "first"),
    "a sum compared": (single("gt.Scalar", {"s": S4}, r("s"), 0), "aten.gt.Scalar", "first"),
    "a sum's places in order": (single("sort.default", {"s": S4}, r("s"), 0), "aten.sort.default", "first"),
}  # fmt: skip


@pytest.mark.parametrize("what", GUARDS)
def test_a_condition_that_is_forgotten(what: str, monkeypatch: pytest.MonkeyPatch) -> None:
    case, op, linear = GUARDS[what]
    monkeypatch.setitem(JOINT, op, _plain(op, linear))
    with pytest.raises(ModelError) as e:
        case.prove()
    assert e.value.where == "bad" and e.value.code == "model.mixes-records"


def test_a_sum_plus_nothing_is_the_sum() -> None:
    values = single("add.Tensor", {"s": S4}, r("s"), 0).prove()
    assert values["bad"].summed


def test_zero_that_is_not_zero_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    """A rule that passes its operand's zeros on for what was written into them."""
    case = single(
        "select_scatter.default",
        {"z": ZERO, "s": Value("f32", (), summed=True)},
        r("z"),
        r("s"),
        0,
        1,
    )
    assert nonlinear(case) == [] and case.prove()["bad"].summed
    sound = JOINT["aten.select_scatter.default"]
    wrong = dataclasses.replace(
        sound, rule=lambda call: dataclasses.replace(sound.rule(call), bounds=(0, 0))
    )  # type: ignore[type-var]
    monkeypatch.setitem(JOINT, "aten.select_scatter.default", wrong)
    assert not case.prove()["bad"].summed and nonlinear(case)
