"""A module to a graph of what it returns, and what is refused on the way."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from casemate.engine.capture import capture_outputs
from casemate.graph import check, pack
from casemate.graph.model import Graph
from casemate.spec.errors import ModelError


class Fn(nn.Module):
    def __init__(self, how: Any) -> None:
        super().__init__()
        self.how, self.w = how, nn.Parameter(torch.randn(3, 3))

    def forward(self, x: Tensor) -> Any:
        return self.how(self, x)


def graph(how: Any, **more: Any) -> Graph:
    return pack.unpack(capture_outputs(Fn(how), {"x": ("f32", (3,))}, **more).data)[0]


def test_outputs_have_names() -> None:
    assert [o.name for o in graph(lambda m, x: x @ m.w).outputs] == ["output"]
    several = graph(lambda m, x: (x @ m.w, None, (x @ m.w).argmax(1)))
    assert [o.name for o in several.outputs] == ["output_0", "output_2"]
    named = graph(lambda m, x: {"scores": x @ m.w, "same": x, "note": "a text"})
    assert [(o.name, o.value) for o in named.outputs][1] == ("same", "x")
    assert named.loss == "" and {i.kind for i in named.inputs} == {"data", "frozen"}


class Both(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.drop = nn.BatchNorm1d(3), nn.Dropout(0.5)

    def forward(self, x: Tensor) -> Tensor:
        return self.drop(self.norm(x))


def test_it_is_the_module_in_evaluation_mode_and_stays_as_it_was() -> None:
    module = Both().train()
    packed = capture_outputs(module, {"x": ("f32", (3,))})
    assert module.training and all(p.requires_grad for p in module.parameters())
    made, view = pack.unpack(packed.data)
    checked = check.check(made, {n: i for n, (i, _) in view.items()}, bounds={})
    assert checked.dimension == 0 and checked.parameters == ()
    assert {n.op for n in made.nodes} == {"aten.batch_norm.default"}


@pytest.mark.parametrize(
    ("how", "code"),
    [
        (lambda m, x: x - x.mean(0), "model.mixes-records"),
        (lambda m, x: (x @ m.w).softmax(0), "model.mixes-records"),
        (lambda m, x: x.flip(0) @ m.w, "model.mixes-records"),
        (lambda m, x: m.w, "model.outputs"),
        (lambda m, x: (x @ m.w).t(), "model.outputs"),
        (lambda m, x: torch.arange(x.shape[0]), "model.outputs"),
        (lambda m, x: "a text", "model.outputs"),
        (lambda m, x: {"a b": x}, "model.outputs"),
        (lambda m, x: x + torch.rand_like(x), "model.random"),
    ],
    ids=range(9),
)
def test_what_is_not_a_slice_for_each_record_is_refused(how: Any, code: str) -> None:
    with pytest.raises(ModelError) as refused:
        graph(how)
    assert refused.value.code == code


class Words(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(10, 4)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.embed(tokens).mean(1)


def test_indices_made_of_records_need_bounds() -> None:
    specs: Any = {"tokens": ("i64", (5,))}
    for bounds in (None, {"tokens": (0, 10)}, {"tokens": (-1, 9)}):
        with pytest.raises(ModelError) as refused:
            capture_outputs(Words(), specs, bounds)
        assert refused.value.code == "model.index-range"
    made = pack.unpack(capture_outputs(Words(), specs, {"tokens": (0, 9)}).data)[0]
    (given,) = (i for i in made.inputs if i.kind == "data")
    assert (given.low, given.high) == (0, 9)
    with pytest.raises(ModelError, match="no integer input"):
        capture_outputs(Words(), specs, {"word": (0, 9)})
    with pytest.raises(ModelError) as refused:
        capture_outputs(Words(), specs, {"tokens": (9, 0)})
    assert refused.value.code == "model.form"
