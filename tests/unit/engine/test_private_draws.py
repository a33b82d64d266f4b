"""Dropout and views through the library's door: prepared, planned and trained on both paths."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

import casemate.engine as ce

ROWS = 80


def images() -> dict[str, torch.Tensor]:
    made = torch.Generator().manual_seed(0)
    y = torch.randint(2, (ROWS,), generator=made)
    x = torch.rand(ROWS, 1, 6, 6, generator=made) * 0.4
    x[y == 1, :, 2:4] += 0.6  # a bar across, which no flip and no crop hides
    return {"input": x, "target": y}


def net(dropout: float = 0.25) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Flatten(), nn.Dropout(dropout), nn.Linear(64, 2)
    )


def private(model: nn.Module, **how: Any) -> Any:
    given = {"delta": 1e-4, "noise_multiplier": 0.5, "batch_size": 20, "steps": 6, **how}
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1.0)
    return ce.Private(
        model, loss="cross_entropy", optimizer=optimizer, data=images(),
        bounds={"input": (0.0, 1.0)}, **given,
    )  # fmt: skip


FOUR = ce.Views(count=4, transforms=(ce.Flip(), ce.Crop(pixels=1, pad="zeros")))


SLOW = pytest.param("record", FOUR, marks=pytest.mark.full)


@pytest.mark.parametrize(
    ("path", "views"), [*(("auto", v) for v in (1, 2, FOUR)), ("record", 1), ("record", 2), SLOW]
)
def test_it_learns(path: str, views: Any) -> None:
    model = net()
    run = private(model, path=path, views=views, steps=30)
    assert run.ready.path == ("graph" if path == "auto" else "record")
    assert [i.rate for i in run.ready.program.random] == [0.25]
    run.train()
    scores = model.eval()(images()["input"])
    assert (scores.argmax(1) == images()["target"]).float().mean() > 0.8


def test_views_cost_no_privacy_and_no_noise() -> None:
    one, four = (private(net(), views=v) for v in (1, FOUR))
    for name in ("epsilon", "sigma", "rate", "clip"):
        assert getattr(one.quote(), name) == getattr(four.quote(), name), name


def test_dropout_follows_the_mode() -> None:
    for model, how in ((net().eval(), {}), (net(), {"dropout": False}), (net(0.0), {})):
        assert not private(model, **how).ready.program.random


@pytest.mark.parametrize("views", [1, 3, FOUR])
def test_a_prefix_is_kept_unless_it_is_of_a_view(views: Any) -> None:
    model = net()
    model[0].requires_grad_(False)
    run = private(model, views=views, steps=40)
    assert run.ready.program.has_prefix
    assert run.ready.keep == (views is not FOUR)
    run.step()


def test_refusals() -> None:
    flat = nn.Sequential(nn.Flatten(), nn.Linear(36, 2))
    with pytest.raises(ce.CasemateError) as e:
        private(flat, views=ce.Views(transforms=(ce.Crop(pixels=6),)))
    assert e.value.code == "plan.views"
    with pytest.raises(ce.CasemateError) as e:
        private(flat, views=0)
    assert e.value.code == "usage.value"
