"""Models that try to let one record's gradient depend on another record, through anything kept."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from casemate.engine.program import Program
from casemate.engine.records import record
from casemate.graph.model import Graph
from support.engine_lab import data, node, param

# Row 2 fails in the frozen prefix, row 3 in the trained part; row 4 holds what is not finite.
ROWS = {
    "x": torch.tensor([[1.0, -2.0], [0.5, 3.0], [1.0, 1.0], [2.0, 2.0], [float("inf"), -0.0]]),
    "i": torch.tensor([0, 2, 9, 1, 2]),
    "j": torch.tensor([1, 2, 0, 9, 0]),
}
FAIL = (2, 3)


def looking() -> tuple[Graph, dict[str, torch.Tensor]]:
    """A frozen look-up, then a trained one, neither of which is proved in range."""
    inputs = (
        param("f", 3, 2, kind="frozen"),
        param("e", 3, 2),
        param("w", 2),
        data("x", "f32", 2),
        data("i", "i64"),
        data("j", "i64"),
    )
    nodes = (
        node("a", "aten.embedding.default", "%f", "%i"),
        node("ax", "aten.mul.Tensor", "%a", "%x"),
        node("b", "aten.embedding.default", "%e", "%j"),
        node("c", "aten.mul.Tensor", "%b", "%ax"),
        node("d", "aten.mul.Tensor", "%c", "%w"),
        node("t", "aten.tanh.default", "%d"),
        node("loss", "aten.sum.dim_IntList", "%t", [1]),
    )
    made = torch.Generator().manual_seed(3)
    weights = {
        n: torch.randn(s, generator=made) for n, s in (("f", (3, 2)), ("e", (3, 2)), ("w", 2))
    }
    return Graph(inputs=inputs, nodes=nodes, loss="loss"), weights


def bits(t: torch.Tensor) -> bytes:
    return t.numpy().tobytes()


def alone(row: int, replayed: bool, keep: bool) -> bytes:
    """The row's gradient in a program that has seen no other row."""
    only = {n: t[row : row + 1].clone() for n, t in ROWS.items()}
    program = make(replayed)
    out = torch.empty(program.dimension)
    record(program, only, 1, keep)(0, out)
    return bits(out)


def make(replayed: bool) -> Program:
    program = Program(*looking())
    if replayed:
        first = {n: t[:1].clone() for n, t in ROWS.items()}
        assert program.note(program.prefix(first))
    return program


@pytest.mark.parametrize("keep", [False, True])
@pytest.mark.parametrize("replayed", [False, True])
def test_steals_the_row_before_through_what_a_failure_leaves(replayed: bool, keep: bool) -> None:
    program = make(replayed)
    gradients = record(program, ROWS, 5, keep)
    out = torch.full((program.dimension,), 7.0)
    for row in (0, 2, 0, 3, 1, 2, 3, 1, -1, 4, 0, 4, 2, 1, 3, -1, 0):
        gradients(row, out)
        if row in FAIL:
            assert not out.any()
        elif row >= 0:
            assert bits(out) == alone(row, replayed, keep)


@pytest.mark.parametrize("keep", [False, True])
@pytest.mark.parametrize("error", [ZeroDivisionError, IndexError, OverflowError, KeyError])
@pytest.mark.parametrize("where", ["gradient", "prefix"])
def test_steals_a_row_by_an_error_of_another_kind(
    where: str, error: type[Exception], keep: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever a row makes torch raise, the run goes on as if its gradient were zero."""
    program = make(False)

    def fails(*given: Any) -> Any:
        raise error("of some row")

    monkeypatch.setattr(program, where, fails)
    gradients = record(program, ROWS, 5, keep)
    out = torch.full((program.dimension,), 7.0)
    gradients(0, out)
    assert not out.any()


def test_keeps_a_count_of_records_in_the_running_statistics() -> None:
    """torch's instance_norm writes its statistics back, even frozen: the mean of equal copies."""
    inputs = (
        param("w", 1, 3, 1),
        param("m", 3, kind="frozen"),
        param("v", 3, kind="frozen"),
        data("x", "f32", 3, 4),
    )
    nodes = (
        node("a", "aten.mul.Tensor", "%x", "%w"),
        node(
            "n", "aten.instance_norm.default", "%a", None, None, "%m", "%v", False, 0.1, 1e-5, False
        ),
        node("t", "aten.tanh.default", "%n"),
        node("loss", "aten.sum.dim_IntList", "%t", [1, 2]),
    )
    weights = {
        "w": torch.ones(1, 3, 1),
        "m": torch.tensor([0.1, 1 / 3, -7.7]),
        "v": torch.tensor([0.3, 1.7, 1e-30]),
    }
    program = Program(Graph(inputs=inputs, nodes=nodes, loss="loss"), weights)
    rows = {"x": torch.randn(6, 3, 4, generator=torch.Generator().manual_seed(0))}
    program.note(program.prefix({"x": rows["x"][:1].clone()}))
    before = {n: bits(t) for n, t in weights.items()}
    gradients = record(program, rows, 6, False)
    first, again = torch.empty(3), torch.empty(3)
    gradients(0, first)
    for row in range(6):
        gradients(row, again)
    gradients(0, again)
    assert bits(first) == bits(again)
    assert {n: bits(t) for n, t in weights.items()} == before
