"""The evaluation that the enclave makes of a model's output, against torch by hand."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812

from casemate.client.torch import export_outputs
from casemate.engine.prepare import weights_of
from casemate.engine.program import Program
from casemate.engine.records import record
from casemate.graph import check, pack, score
from casemate.graph.model import Graph
from casemate.spec.contest import HIGHER
from casemate.spec.data import Column
from casemate.spec.errors import ModelError
from casemate.spec.job import Metric

ROWS = 12


class Fn(nn.Module):
    def __init__(self, how: Any) -> None:
        super().__init__()
        self.how = how

    def forward(self, x: Tensor) -> Any:
        return self.how(x)


def label(dtype: Any, low: float, high: float, *shape: int) -> Column:
    return Column(name="y", dtype=dtype, shape=shape, low=low, high=high, role="label")


def unpacked(how: Any, width: int = 4) -> tuple[Graph, pack.Weights]:
    return pack.unpack(export_outputs(Fn(how), {"x": ("f32", (width,))}).data)


def rows(how: Any, column: Column, names: list[str], y: Tensor, x: Tensor) -> Tensor:
    """Each record's (1, metrics over their limits): minus its gradient."""
    metrics = [Metric(name=n, limit=1.0 if n == "accuracy" else 8.0) for n in names]
    graph, weights, binding = score.compose(*unpacked(how, x.shape[1]), metrics, column)
    infos = {n: i for n, (i, _) in weights.items()}
    bounds = {binding.input: None if column.low is None else (int(column.low), int(column.high))}
    check.check(graph, infos, bounds=bounds)
    program = Program(graph, weights_of(weights))
    gradients = record(program, {"x": x, binding.input: y}, len(x), False)
    made = torch.empty(len(x), len(names) + 1)
    for i in range(len(x)):
        gradients(i, made[i])
    return -made


def scaled(*values: Tensor) -> Tensor:
    """What :func:`rows` should give: of accuracy the limit is 1, of others 8."""
    return torch.stack([torch.ones(ROWS), *values], 1)


def test_classes() -> None:
    x, y = torch.randn(ROWS, 4), torch.randint(0, 4, (ROWS,))
    for dtype, made in (("i64", y), ("i32", y.int()), ("u8", y.to(torch.uint8))):
        found = rows(lambda x: 3 * x, label(dtype, 0, 3), ["accuracy", "cross_entropy"], made, x)
        loss = F.cross_entropy(3 * x, y, reduction="none").clamp(0, 8) / 8
        torch.testing.assert_close(found, scaled((x.argmax(1) == y).float(), loss))


def test_elements() -> None:
    names = ["mse", "l1", "binary_cross_entropy_with_logits", "accuracy"]
    x, y = torch.randn(ROWS, 3), torch.randint(0, 2, (ROWS, 3)).float()

    def of(s: Tensor, y: Tensor) -> Tensor:
        parts = [
            ((s - y) ** 2).mean(1), (s - y).abs().mean(1),
            F.binary_cross_entropy_with_logits(s, y, reduction="none").mean(1),
        ]  # fmt: skip
        hits = ((s > 0) == (y > 0.5)).float().mean(1)
        return scaled(*(p.clamp(0, 8) / 8 for p in parts), hits)

    torch.testing.assert_close(rows(lambda x: x, label("f32", 0, 1, 3), names, y, x), of(x, y))
    one, first = label("u8", 0, 1), y[:, 0].to(torch.uint8)
    found = rows(lambda x: x[:, :1], one, names, first, x)
    torch.testing.assert_close(found, of(x[:, :1], y[:, :1]))
    flat = rows(lambda x: x[:, 0], one, names, first, x)
    torch.testing.assert_close(flat, found)


def test_what_is_no_number_is_the_worst() -> None:
    x, y = torch.ones(ROWS, 4), torch.zeros(ROWS, dtype=torch.int64)
    names = ["accuracy", "cross_entropy"]
    for bad in (lambda x: (x - x) / (x - x), lambda x: x / (x - x), lambda x: -x / (x - x)):
        found = rows(bad, label("i64", 0, 3), names, y, x)
        assert torch.isfinite(found).all() and (found[:, 2] == 1).all()
    single = rows(
        lambda x: (x - x) / (x - x), label("f32", 0, 1, 4), ["mse", "l1"], torch.zeros(ROWS, 4), x
    )
    assert (single[:, 1:] == 1).all()


def test_names_of_the_model_are_its_own() -> None:
    graph, weights = unpacked(lambda x: x * 2)
    called = {graph.nodes[0].name: "score_0"}
    renamed = dataclasses.replace(
        graph,
        nodes=tuple(dataclasses.replace(n, name=called.get(n.name, n.name)) for n in graph.nodes),
        outputs=tuple(
            dataclasses.replace(o, value=called.get(o.value, o.value)) for o in graph.outputs
        ),
    )
    made, view, binding = score.compose(
        renamed, weights, [Metric(name="accuracy")], label("i64", 0, 3)
    )
    names = [*(n.name for n in made.nodes), *(i.name for i in made.inputs)]
    assert len(set(names)) == len(names) and binding.input not in {i.name for i in graph.inputs}
    assert view.keys() - weights.keys() == {i.tensor for i in made.inputs if i.kind == "param"}


@pytest.mark.parametrize(
    ("how", "column", "metric"),
    [
        (lambda x: (x, x), label("i64", 0, 3), "accuracy"),  # two outputs
        (lambda x: x.argmax(1), label("i64", 0, 3), "accuracy"),  # no scores
        (lambda x: x, label("i64", 0, 4), "accuracy"),  # fewer scores than classes
        (lambda x: x, label("i64", 1, 4), "accuracy"),  # classes are from 0 on
        (lambda x: x, label("f32", 0, 1, 3), "mse"),  # another number of elements
        (lambda x: x, label("i64", 0, 3), "mse"),  # no elements
        (lambda x: x, label("f32", 0, 1, 4), "cross_entropy"),  # no classes
        # one score, which is above 0 or not, of what is not yes or no
        (lambda x: x[:, 0], label("i64", 0, 2), "accuracy"),
        (lambda x: x[:, :1], label("u8", 0, 9), "accuracy"),
        (lambda x: x, label("i64", 0, 2, 4), "accuracy"),
        (lambda x: x[:, 0], label("i64", 0, 2), "binary_cross_entropy_with_logits"),
        (lambda x: x, label("f32", -1, 1, 4), "binary_cross_entropy_with_logits"),
        (lambda x: x, label("f32", 0, 1.5, 4), "accuracy"),
        (lambda x: x, label("i64", 0, 3), "auc"),  # no metric
    ],
)
def test_what_cannot_be_scored_is_refused(how: Any, column: Column, metric: str) -> None:
    with pytest.raises(ModelError) as e:
        score.compose(*unpacked(how), [Metric(name=metric)], column)
    assert e.value.code == "model.contest" and e.value.mend


def test_every_metric_of_a_contest_has_a_head() -> None:
    assert score._HEADS.keys() == HIGHER.keys()
