# ruff: noqa: E501 - one node a line
"""A model that makes the worker fail, or write where it must not, on some rows and not on others.

"The job failed" is a released bit. So nothing that a record holds may raise, trap or write outside
its memory; the graph's check proves it before any row is read.
"""

from __future__ import annotations

import random
import re

import pytest
import torch

from casemate.engine.prepare import weights_of
from casemate.graph import check
from casemate.graph.model import DtypeArg, Node
from casemate.graph.ops import elementwise
from casemate.spec.errors import ModelError
from casemate.spec.tensors import TensorInfo
from support.graphs import DTYPES, interpret
from support.rawgraph import data, graph, infos, ls, node, r, run, weight

BOUNDS = {"i": (-3, 9)}
I32, I64, U8, BOOL = (DtypeArg(dtype=d) for d in ("i32", "i64", "u8", "bool"))


def refused(code: str, *nodes: Node) -> None:
    with pytest.raises(ModelError) as e:
        run(*nodes, bounds=BOUNDS)
    assert e.value.code == code, e.value.message


def trap(divisor: int, mode: str) -> list[Node]:
    """Divides the smallest int32 by -1 on the records whose feature is 3: SIGFPE on x86."""
    return [
        node("hit", "eq.Scalar", r("i"), 3),
        node("one", "_to_copy.default", r("hit"), dtype=I32),
        node("low", "mul.Scalar", r("one"), -(2**31)),
        node("bad", "div.Tensor_mode", r("low"), divisor, rounding_mode=mode),
    ]


@pytest.mark.parametrize("mode", ["trunc", "floor"])
@pytest.mark.parametrize("divisor", [-1, 2**32 - 1, 2**40 - 1, 0, 2**32])
def test_steals_a_row_by_trapping_in_a_division(divisor: int, mode: str) -> None:
    refused("model.index-range", *trap(divisor, mode))


@pytest.mark.parametrize("axes", [1, 2, 3])
def test_writes_outside_the_gradient_of_a_pool(axes: int) -> None:
    """A window whose two places straddle the input: torch takes the place past the end, and its
    backward adds the gradient there, into whatever lies behind."""
    side = 4
    n = (1, 1) + (side,) * axes
    inputs = (data("p", *n[1:]), weight("w", 4), data("x", 4))
    bad = node("bad", f"max_pool{axes}d.default", r("p"), ls(2), ls(1), ls(1), ls(side + 1))
    g = graph(bad, inputs=inputs)
    with pytest.raises(ModelError) as e:
        check.check(g, infos(g))
    assert (e.value.code, e.value.where) == ("model.shape", "bad")
    pool = getattr(torch.nn.functional, f"max_pool{axes}d")
    _, place = pool(torch.zeros(n), 2, 1, 1, side + 1, return_indices=True)
    assert int(place.max()) >= side**axes  # why it is refused
    for spread in range(1, side + 1):  # the widest that are admitted stay inside
        if side + 2 < spread + 1:
            continue
        good = node("good", f"max_pool{axes}d.default", r("p"), ls(2), ls(1), ls(1), ls(spread))
        check.check(graph(good, inputs=inputs), infos(g))
        _, place = pool(torch.zeros(n), 2, 1, 1, spread, return_indices=True)
        assert int(place.min()) >= 0 and int(place.max()) < side**axes


LIES = {
    "sums that wrap": [
        node("j", "mul.Scalar", r("i"), -(2**52)), node("j2", "mul.Scalar", r("j"), 2**9),
        node("s", "sum.dim_IntList", r("j2"), ls(1)), node("kk", "clamp.default", r("s"), 0, None)],
    "sums in a smaller dtype": [
        node("j", "_to_copy.default", r("i"), dtype=I32), node("cc", "clamp.default", r("j"), 0, 9),
        node("kk", "sum.dim_IntList", r("cc"), ls(1), dtype=I32)],
    "running sums in a smaller dtype": [
        node("j", "clamp.default", r("i"), 0, 9), node("l", "mul.Scalar", r("j"), 2**27),
        node("s", "cumsum.default", r("l"), 1, dtype=I32), node("kk", "clamp.default", r("s"), None, 9)],
    "rounding toward zero": [
        node("j", "clamp.default", r("i"), -3, -1), node("d", "div.Tensor_mode", r("j"), 2, rounding_mode="trunc"),
        node("kk", "add.Scalar", r("d"), 10)],
    "a constant that wraps": [
        node("f", "full.default", ls(1), -1, dtype=U8), node("g", "_to_copy.default", r("f"), dtype=I64),
        node("cc", "clamp.default", r("i"), 0, 9), node("kk", "add.Tensor", r("cc"), r("g"))],
    "a bool of five": [
        node("f", "full.default", ls(1), 5, dtype=BOOL), node("g", "_to_copy.default", r("f"), dtype=I64),
        node("cc", "clamp.default", r("i"), 0, 9), node("h", "add.Tensor", r("cc"), r("g")),
        node("kk", "sub.Scalar", r("h"), 5)],
    "a bound that wraps": [
        node("j", "_to_copy.default", r("i"), dtype=I32), node("cc", "clamp.default", r("j"), 0, 9),
        node("kk", "clamp.default", r("cc"), None, 2**32 - 1)],
    "a divisor that wraps": [
        node("j", "_to_copy.default", r("i"), dtype=I32), node("cc", "clamp.default", r("j"), 0, 900),
        node("kk", "div.Tensor_mode", r("cc"), 2**32 + 1, rounding_mode="floor")],
}  # fmt: skip


LIES["a clamp at a bool"] = [
    node("low", "clamp.default", r("i"), -3, 0),
    node("one", "clamp.default", r("low"), True),  # at most 0 before, and 1 all the same
    node("kk", "mul.Scalar", r("one"), -1),
]


@pytest.mark.parametrize("what", LIES)
def test_steals_a_row_by_an_index_thought_in_range(what: str) -> None:
    nodes = LIES[what]
    look = node("bad", "embedding.default", r("e"), r("kk"))
    refused("model.index-range", *nodes, look)


def chain(rng: random.Random) -> list[Node]:
    """Random integer arithmetic on the record's integers."""
    numbers = (
        0, 1, 2, 3, 7, -1, -2, -7, 255, 256, 2**31 - 1, 2**31, 2**32 + 1, -(2**31), 2**52,
        True, False, True, False,
    )  # fmt: skip
    at, out = "i", []
    for n in range(rng.randrange(1, 6)):
        number = rng.choice(numbers)
        name = f"n{n}"
        kinds = {
            "add": ("add.Scalar", r(at), number),
            "sub": ("sub.Scalar", r(at), number),
            "mul": ("mul.Scalar", r(at), number),
            "own": (rng.choice(("add.Tensor", "mul.Tensor")), r(at), r(rng.choice(("i", at)))),
            "mod": ("remainder.Scalar", r(at), number),
            "low": ("clamp.default", r(at), number, None),
            "high": ("clamp.default", r(at), None, number),
            "least": ("clamp_min.default", r(at), number),
            "most": ("clamp_max.default", r(at), number),
            "fill": ("full_like.default", r(at), number),
            "both": ("clamp.default", r(at), number, rng.choice(numbers)),
            "sum": ("sum.dim_IntList", r(at), ls(1), True),
            "run": ("cumsum.default", r(at), 1),
            "sort": ("sort.default", r(at), 1),
            "max": ("amax.default", r(at), ls(1), True),
            "tri": ("one_hot.default", r(at), 3),
            "roll": ("roll.default", r(at), ls(1), ls(1)),
        }  # fmt: skip
        kind = rng.choice([*kinds, "div", "cast", "sumcast", "runcast"])
        if kind == "div":
            mode = rng.choice(("floor", "trunc"))
            made = node(name, "div.Tensor_mode", r(at), number, rounding_mode=mode)
        elif kind == "cast":
            made = node(name, "_to_copy.default", r(at), dtype=rng.choice((I32, I64, U8, BOOL)))
        elif kind == "sumcast":
            made = node(name, "sum.dim_IntList", r(at), ls(1), True, dtype=rng.choice((I32, U8)))
        elif kind == "runcast":
            made = node(name, "cumsum.default", r(at), 1, dtype=rng.choice((I32, U8)))
        else:
            op, *args = kinds[kind]
            made = node(name, op, *args)
        out.append(made)
        at = f"{name}.0" if kind == "sort" else name
    return out


def broken_claims(seed: int) -> tuple[int, list[str]]:
    """Random chains whose proved bounds torch breaks; how many chains were admitted."""
    rng, found, admitted = random.Random(seed), [], 0
    rows = torch.tensor([[a, b, c, 9] for a in (-3, 0, 9) for b in (-3, 5) for c in (-1, 3)])
    for _ in range(1500):
        nodes = chain(rng)
        g = graph(*nodes, inputs=(data("i", 4, dtype="i64"), data("x", 4), weight("w", 4)))
        try:
            made = check.check(g, infos(g), bounds=BOUNDS)
        except ModelError:
            continue
        try:
            values = interpret(g, {"w": torch.ones(4)}, {"i": rows, "x": torch.ones(12, 4)})
        except (RuntimeError, IndexError) as e:
            if not re.search(
                "overflow|not implemented|not supported", str(e)
            ):  # for all rows alike
                found.append(f"{nodes}: {e}")
            continue
        admitted += 1
        for name, v in made.values.items():
            if v.range is None or v.floating or not values[name].numel():
                continue
            low, high = int(values[name].min()), int(values[name].max())
            if not v.range[0] <= low <= high <= v.range[1] or DTYPES[v.dtype] != values[name].dtype:
                found.append(f"{nodes}: {name} in {v.range}, is in [{low}, {high}]")
    return admitted, found


def test_proved_bounds_hold_in_torch() -> None:
    admitted, found = broken_claims(1)
    assert not found, found[0]
    assert admitted > 400


def test_seeded_bug_in_the_bounds_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(elementwise, "held", lambda dtype, found: found)
    monkeypatch.setattr(check, "held", lambda dtype, found: found)
    assert broken_claims(1)[1]


def test_a_bool_weight_is_a_bool() -> None:
    """torch trusts the byte: as an integer it would be 5, above what is proved of a bool."""
    with pytest.raises(ModelError, match="no bool"):
        weights_of({"b": (TensorInfo("bool", (1,), 0, 1), memoryview(b"\x05"))})
    good = weights_of({"b": (TensorInfo("bool", (2,), 0, 2), memoryview(b"\x00\x01"))})
    assert good["b"].tolist() == [False, True]


def test_what_has_no_elements_cannot_be_trained() -> None:
    with pytest.raises(ModelError) as e:
        nothing = node("a", "slice.Tensor", r("x"), 1, 0, 0)
        product = node("b", "mul.Tensor", r("a"), r("w"))
        loss = node("loss", "sum.dim_IntList", r("b"), ls(1))
        g = graph(nothing, product, loss, inputs=(data("x", 4), weight("w", 0)), loss="loss")
        check.check(g, infos(g))
    assert e.value.code == "model.nothing-trained"
