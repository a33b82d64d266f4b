"""Metrics as a loss: a row's gradient is its metrics, and nothing of the module moves."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import nn

from casemate.client.torch import export_metrics
from casemate.engine.capture import metrics as made
from casemate.engine.prepare import check_evaluation, weights_of
from casemate.engine.program import Program
from casemate.graph import pack
from casemate.spec.data import Column, DatasetSchema
from casemate.spec.errors import ModelError


def accuracy(scores: torch.Tensor, target: torch.Tensor) -> list[float]:
    return [float(x) for x in made.Accuracy()(scores, target)]


SIGNS = torch.tensor([-1.0, 2.0, 0.5])


@pytest.mark.parametrize(
    ("scores", "target", "expected"),
    [
        (torch.tensor([[1.0, 2.0], [3.0, 0.0]]), torch.tensor([1, 1]), [1.0, 0.0]),
        (torch.tensor([[1.0, 2.0], [3.0, 0.0]]), torch.tensor([[1], [1]]), [1.0, 0.0]),
        (SIGNS, torch.tensor([0, 0, 1]), [1.0, 0.0, 1.0]),
        (SIGNS[:, None], torch.tensor([0.0, 0.0, 1.0]), [1.0, 0.0, 1.0]),
        (SIGNS[:, None], torch.tensor([[0], [0], [1]]), [1.0, 0.0, 1.0]),
        # Several labels of a record; classes second, and last.
        (torch.tensor([[1.0, -1.0], [-1.0, -1.0]]), torch.tensor([[1, 1], [0, 0]]), [0.5, 1.0]),
        (torch.eye(3)[None].mT, torch.tensor([[0, 1, 1]]), [pytest.approx(2 / 3)]),
        (torch.eye(4)[None, :3], torch.tensor([[0, 1, 1]]), [pytest.approx(2 / 3)]),
        (torch.full((1, 2), math.nan), torch.tensor([1]), [0.0]),
    ],
)
def test_accuracy(scores: torch.Tensor, target: torch.Tensor, expected: list[Any]) -> None:
    assert accuracy(scores, target) == expected


SCHEMA = DatasetSchema(
    name="t",
    columns=(
        Column(name="x", dtype="f32", shape=(3,), low=-1.0, high=1.0),
        Column(name="y", dtype="i64", low=0, high=1, role="label"),
    ),
    rows=8,
    units=8,
)


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.drop, self.out = nn.BatchNorm1d(3), nn.Dropout(0.5), nn.Linear(3, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        scores: torch.Tensor = self.out(self.drop(self.norm(x)))
        return scores


def own(outputs: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    return outputs[:, 0] / (target - 1.0)  # no number, or without end, for one of the labels


def test_a_rows_gradient_is_its_metrics() -> None:
    """Of a module in training mode, which is evaluated as after eval() and left as it was."""
    torch.manual_seed(1)
    net = Net().train()
    net.norm.bias.requires_grad_(False)
    asked = {"accuracy": ("accuracy", 1.0), "loss": ("cross_entropy", 0.5), "own": (own, 2.0)}
    packed, _ = export_metrics(net, SCHEMA, asked)
    assert all(m.training for m in net.modules())
    assert [n for n, p in net.named_parameters() if not p.requires_grad] == ["norm.bias"]
    graph, view = pack.unpack(packed.data)
    check_evaluation(graph, 4)
    program = Program(graph, weights_of(view))
    net.eval()
    for _ in range(20):
        x, y = torch.rand(1, 3) * 2 - 1, torch.randint(2, (1,))
        with torch.no_grad():
            scores = net(x)
        values = (
            (scores.argmax(1) == y).double(),
            nn.functional.cross_entropy(scores, y).double().clamp(0, 0.5) / 0.5,
            torch.ones(1) if y == 1 else (-scores[:, 0]).clamp(0, 2) / 2,
        )
        out = torch.empty(4)
        program.gradient(program.prefix({"x": x, "target": y}), out)
        expected = [1.0, *(float(v) for v in values)]
        if y == 1 and not math.isnan(float(scores[0, 0])):  # without end, below or above
            expected[3] = 0.0 if scores[0, 0] < 0 else 1.0
        assert (-out).tolist() == pytest.approx(expected, abs=1e-6)


def test_what_trains_more_is_no_evaluation() -> None:
    packed, _ = export_metrics(Net(), SCHEMA, {"accuracy": ("accuracy", 1.0)})
    graph, _ = pack.unpack(packed.data)
    check_evaluation(graph, 2)
    with pytest.raises(ModelError, match=r"one vector of 3 scalars; this model trains .* \[2\]"):
        check_evaluation(graph, 3)


def test_unknown_metrics_are_named() -> None:
    with pytest.raises(ModelError, match="'auc' is no metric"):
        made.make("auc")
