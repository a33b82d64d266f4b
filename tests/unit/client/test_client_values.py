"""Short constructors, optimizers by their usual names, and which column feeds which input."""

from __future__ import annotations

import pytest
import torch

import casemate as cm
from casemate.client import models, views
from casemate.client.bind import bind
from casemate.graph.model import Graph, InputSpec
from casemate.spec import codec, data, job
from casemate.spec.data import Column, DatasetSchema
from casemate.spec.errors import ModelError, UsageError


def test_constructors_give_the_shared_values():
    assert cm.Budget(8, 1e-5) == data.Budget(epsilon=8.0, delta=1e-5)
    assert cm.DP(2, 1e-5) == job.Dp(epsilon=2.0, delta=1e-5, clip=1.0)
    assert cm.Policy("*") == data.Policy(scientists=("*",))
    assert cm.Policy(["id_a"], approval=True, max_epsilon=2).approval == "each-quote"
    assert cm.Schedule("cosine", warmup=3) == job.Schedule(kind="cosine", warmup=3)
    assert cm.Views(3) == job.Views(count=3)
    both = (job.Flip(), job.Crop(pixels=2, pad="zeros"))
    assert cm.Views(4, flip=True, crop=2, pad="zeros").transforms == both
    for value in (
        cm.Views(4, flip=True, crop=2, input="x"),
        cm.Budget(8, 1e-5),
        cm.Policy("*"),
        cm.DP(2, 1e-5),
        cm.SGD(1),
        cm.AdamW(),
    ):
        assert codec.decode(type(value), codec.encode(value)) == value


@pytest.mark.parametrize(
    "make",
    [
        lambda: cm.Budget(0, 1e-5), lambda: cm.Budget(8, 0.5), lambda: cm.DP(-1, 1e-5),
        lambda: cm.Views(0), lambda: cm.Views(2, crop=-1), lambda: cm.Views(2, input="x"),
        lambda: cm.Views(2, crop=1, pad="wrap"),
        lambda: cm.Policy([]), lambda: cm.Policy(["somebody"]),
        lambda: cm.Policy("*", approval="sometimes"), lambda: cm.Policy("*", nonprivate="ok"),
    ],
)  # fmt: skip
def test_bad_values_are_usage_errors(make):
    with pytest.raises(UsageError) as caught:
        make()
    assert caught.value.code == "usage.value"


def test_every_public_name_is_there():
    assert set(cm.__all__) <= set(dir(cm))
    for name in cm.__all__:
        assert getattr(cm, name) is not None
    with pytest.raises(AttributeError):
        cm.nothing  # noqa: B018


def test_optimizers_of_torch_keep_their_settings():
    weights = [torch.nn.Parameter(torch.zeros(2))]
    sgd = torch.optim.SGD(weights, lr=0.1, momentum=0.9, nesterov=True, weight_decay=0.01)
    assert models.optimizer(sgd) == cm.SGD(0.1, 0.9, True, 0.01)
    adam = torch.optim.Adam(weights, lr=0.2, betas=(0.8, 0.99), eps=1e-6, weight_decay=0.1)
    assert models.optimizer(adam) == cm.Adam(0.2, (0.8, 0.99), 1e-6, 0.1)
    assert models.optimizer(torch.optim.AdamW(weights)) == cm.AdamW(1e-3)
    assert models.optimizer("AdamW", 0.5) == cm.AdamW(0.5)
    assert models.optimizer(cm.SGD(1.0)) == cm.SGD(1.0)


def test_optimizers_without_counterpart_are_refused():
    weights = [torch.nn.Parameter(torch.zeros(2)), torch.nn.Parameter(torch.zeros(2))]
    groups = torch.optim.SGD([{"params": weights[:1]}, {"params": weights[1:], "lr": 1.0}], lr=0.1)
    for bad in (
        groups,
        torch.optim.Adam(weights, amsgrad=True),
        torch.optim.SGD(weights, lr=0.1, momentum=0.5, dampening=0.5),
        torch.optim.SGD(weights, lr=0.1, maximize=True),
        torch.optim.RMSprop(weights),
        "rmsprop",
        None,
    ):
        with pytest.raises(UsageError) as caught:
            models.optimizer(bad, 0.1)
        assert caught.value.code == "usage.optimizer"
    with pytest.raises(UsageError):
        models.optimizer("sgd")


def test_schedules_by_name_by_torch_and_by_value():
    sgd = torch.optim.SGD([torch.nn.Parameter(torch.zeros(2))], lr=0.1)
    cosine = torch.optim.lr_scheduler.CosineAnnealingLR(sgd, T_max=20)
    assert models.schedule(None, 20) == cm.Schedule()
    assert models.views(None) == cm.Views() and models.views(3) == cm.Views(3)
    assert models.views(cm.Views(2, flip=True)) == cm.Views(2, flip=True)
    assert models.schedule("cosine", 20) == cm.Schedule("cosine")
    assert models.schedule(cm.Schedule("step", every=3), 20) == cm.Schedule("step", every=3)
    assert models.schedule(cosine, 20) == cm.Schedule("cosine")
    for bad in ("sawtooth", cosine):
        with pytest.raises(UsageError):
            models.schedule(bad, 10)


def schema(*columns: Column) -> DatasetSchema:
    return DatasetSchema(name="t", columns=columns, rows=4, units=4)


def scalar(name: str, role: str = "feature") -> Column:
    return Column(name=name, dtype="f32", low=0, high=1, role=role)


def graph(*names: str) -> Graph:
    data_inputs = [InputSpec(name=n, kind="data", dtype="f32", shape=()) for n in names]
    weight = InputSpec(name="w", kind="param", dtype="f32", shape=(2,), tensor="w")
    return Graph(inputs=(weight, *data_inputs), nodes=(), loss="")


def bound(*args, **kw):
    return {b.input: b.columns for b in bind(*args, **kw)}


def test_scalar_columns_are_stacked_and_the_label_goes_to_the_target():
    table = schema(scalar("a"), scalar("b"), scalar("sick", "label"))
    assert bound(graph("x", "target"), table) == {"x": ("a", "b"), "target": ("sick",)}


def test_names_come_first_and_what_is_given_before_them():
    table = schema(scalar("x"), scalar("z"), scalar("y", "label"))
    assert bound(graph("x", "z", "y"), table) == {"x": ("x",), "z": ("z",), "y": ("y",)}
    given = {"x": ["z", "x"]}
    assert bound(graph("x", "y"), table, given) == {"x": ("z", "x"), "y": ("y",)}


def test_an_array_column_feeds_an_input_alone():
    image = Column(name="image", dtype="u8", shape=(3, 8, 8), low=0, high=255)
    table = schema(image, scalar("kind", "label"))
    assert bound(graph("pixels", "label"), table) == {"pixels": ("image",), "label": ("kind",)}


@pytest.mark.parametrize(
    ("names", "given"),
    [
        (("x", "z", "target"), None),
        (("x", "target"), {"nothing": "a"}),
        (("target", "labels"), None),
    ],
)
def test_inputs_without_a_plain_column_are_refused_by_name(names, given):
    image = Column(name="image", dtype="u8", shape=(3, 8, 8), low=0, high=255)
    table = schema(image, scalar("a"), scalar("sick", "label"))
    with pytest.raises(ModelError) as caught:
        bind(graph(*names), table, given)
    assert caught.value.code == "model.inputs"
    assert caught.value.where


def test_a_notebook_shows_names_of_others_as_text():
    shown = views.as_html("<b>", ("<i>",), [("<script>alert(1)</script>", 1.23456)])
    assert "<script>" not in shown
    assert "&lt;script&gt;" in shown
    assert "1.235" in shown
    assert "\x1b" not in views.as_text("t", ("a",), [("\x1b[2J",)])
