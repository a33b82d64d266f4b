"""Models of many kinds, exported: the graph computes the module's own per-record losses."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch

from casemate.engine.capture.loss import make
from casemate.graph import check
from support.graphs import exported, interpret, tensors
from support.models import Case, plain, transformers

CASES = {c.name: c for c in (*plain(), *transformers())}
# Of these kinds others are quicker, or their gradients are compared in tests/numerics.
SLOW = (
    "efficientnet", "minilm", "distilbert", "bert eager attention", "gpt tied", "gru", "rnn", "vgg",
    "lstm projected",
)  # fmt: skip
NAMES = [pytest.param(n, marks=pytest.mark.full) if n in SLOW else n for n in CASES]
TARGETS = ("target", "labels")


def own_losses(case: Case, module: torch.nn.Module, data: dict[str, torch.Tensor]) -> Any:
    """What the module itself gives, one record at a time: no batch to mix with."""
    module = copy.deepcopy(module).eval()
    loss = make(case.loss)
    out = []
    for i in range(len(next(iter(data.values())))):
        one = {k: v[i : i + 1] for k, v in data.items()}
        features = {k: v for k, v in one.items() if k not in TARGETS}
        if set(features) == {"input"}:
            scores = module(features["input"])
        else:
            scores = module(**features)
        out.append(loss(scores, *(one[k] for k in TARGETS if k in one)))
    return torch.cat(out)


@pytest.mark.parametrize("name", NAMES)
def test_graph_equals_module(name: str) -> None:
    case = CASES[name]
    torch.manual_seed(1)
    module = case.make()
    for m in module.modules():
        if not isinstance(m, torch.nn.modules.batchnorm._BatchNorm):
            m.training = True
    graph, weights, infos = tensors(exported(module, case.data(4), loss=case.loss))
    made = check.check(graph, infos)
    for batch in (5, 7):
        data = case.data(batch)
        values = interpret(graph, weights, data)
        for key, value in values.items():
            assert tuple(value.shape) == made.values[key].sizes(batch), key
            assert (
                str(value.dtype)
                .split(".")[1]
                .replace("float", "f")
                .replace("uint", "u")
                .replace("int", "i")
                == made.values[key].dtype
            ), key
        torch.testing.assert_close(
            values[graph.loss], own_losses(case, module, data), rtol=2e-5, atol=2e-5
        )
    # Names are those of the state_dict, and what was trainable is what is trained.
    trained = {i.tensor for i in graph.inputs if i.kind == "param"}
    assert trained <= {
        n for n, p in module.named_parameters(remove_duplicate=False) if p.requires_grad
    }
    used = {p.data_ptr() for n, p in module.named_parameters() if p.requires_grad}
    assert len(trained) <= len(used)
