"""What the SDK makes of a caller's inputs and of an answer, without a server."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from casemate.client import models, served
from casemate.client.torch import export_outputs
from casemate.graph import pack
from casemate.spec import serving, tensors
from casemate.spec.errors import CasemateError, UsageError
from casemate.spec.serving import TensorSpec
from support.server import mlp

X = TensorSpec(name="x", dtype="f32", shape=(2,))
K = TensorSpec(name="k", dtype="i64", shape=(), low=0, high=9)
ROWS = [[1.0, 2.0], [3.0, 4.0], [5.0, 6.0]]


@pytest.mark.parametrize(
    "given",
    [
        ROWS,
        np.array(ROWS),
        np.array(ROWS, np.float32),
        torch.tensor(ROWS, requires_grad=True),
        {"x": ROWS},
        (np.array(ROWS),),
    ],
    ids=lambda g: type(g).__name__,
)
def test_one_input_may_come_in_many_ways(given: Any) -> None:
    wire, records = served._wire((X,), given)
    assert records == 3
    ((info, raw),) = tensors.load(wire).values()
    assert (info.dtype, info.shape) == ("f32", (3, 2))
    assert np.frombuffer(raw, np.float32).tolist() == [1, 2, 3, 4, 5, 6]


def test_several_inputs_come_by_name_or_in_order() -> None:
    k = np.array([1, 2, 3], np.int32)
    by_name = served._wire((X, K), {"k": k, "x": ROWS})
    assert by_name == served._wire((X, K), (ROWS, k))
    assert tensors.load(by_name[0])["k"][0].dtype == "i64"


@pytest.mark.parametrize(
    "given",
    [
        {"y": ROWS},
        {"x": ROWS, "y": ROWS},
        {},
        [],
        1.0,
        [[1.0]],
        [["a", "b"]],
        np.array([[1, 2]]),  # integers for floats
        np.array(ROWS) + 1j,
        np.zeros((0, 2), np.float32),
    ],
    ids=range(10),
)
def test_inputs_of_another_form_are_refused_before_anything_is_sent(given: Any) -> None:
    with pytest.raises(UsageError) as refused:
        served._wire((X,), given)
    assert refused.value.code == "usage.inputs"


def test_an_integer_that_does_not_fit_is_refused_and_not_cut() -> None:
    small = TensorSpec(name="k", dtype="i32", shape=())
    for spec, odd in ((small, 2**32 + 5), (small, -(2**31) - 1), (K, 2**64 - 1)):
        with pytest.raises(UsageError):
            served._wire((spec,), np.array([1, odd]))
    wire, _ = served._wire((small,), np.array([-(2**31), 2**31 - 1]))
    assert tensors.load(wire)["k"][0].dtype == "i32"


def test_inputs_of_different_numbers_are_refused() -> None:
    with pytest.raises(UsageError, match="records along axis 0"):
        served._wire((X, K), {"x": ROWS, "k": np.array([1, 2])})


def test_answers_are_arrays_or_tensors_as_inputs_were() -> None:
    raw = np.array(ROWS, np.float32).tobytes()
    one = serving.dump((X,), 3, {"x": raw})
    assert served._arrays((X,), 3, memoryview(one), ROWS).tolist() == ROWS
    found = served._arrays((X,), 3, memoryview(one), (torch.zeros(3, 2),))
    assert isinstance(found, torch.Tensor) and found.tolist() == ROWS
    both = serving.dump((X, K), 3, {"x": raw, "k": np.array([7, 8, 9]).tobytes()})
    several = served._arrays((X, K), 3, memoryview(both), {"x": ROWS})
    assert several["k"].tolist() == [7, 8, 9] and several["k"].flags.writeable
    with pytest.raises(CasemateError, match=r"format\.tensors"):
        served._arrays((X,), 2, memoryview(one), ROWS)


@pytest.mark.parametrize(
    "example",
    [
        torch.zeros(4, 3),
        np.zeros((1, 3), np.float32),
        [[0.0, 0.0, 0.0]],
        (torch.zeros(1, 3),),
        {"input": torch.zeros(1, 3)},
        {"input": ("f32", (3,))},
    ],
    ids=range(6),
)
def test_a_module_is_exported_from_an_example_in_many_forms(example: Any) -> None:
    graph, _ = pack.unpack(export_outputs(nn.Linear(3, 2), example).data)
    assert [o.name for o in graph.outputs] == ["output"]


@pytest.mark.parametrize(
    "example", [None, torch.tensor(1.0), (torch.zeros(1, 3), torch.zeros(1, 3))], ids=range(3)
)
def test_an_example_that_is_none_is_refused(example: Any) -> None:
    with pytest.raises(UsageError) as refused:
        export_outputs(nn.Linear(3, 2), example)
    assert refused.value.code == "usage.inputs"


def test_a_model_packed_for_training_is_not_deployed() -> None:
    with pytest.raises(UsageError, match="packed for training"):
        models.export_outputs(mlp())
    packed = export_outputs(nn.Linear(3, 2), torch.zeros(1, 3))
    assert models.export_outputs(packed) is packed
