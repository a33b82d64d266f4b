"""Noting the gradient at two batch sizes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from casemate.engine.joint import BATCHES, SEED, Noted, note
from casemate.engine.program import Program
from casemate.engine.tape import Unfit
from casemate.graph.model import Ref, Size
from support.batched_lab import Data, exported


def rows(n: int) -> Data:
    return {"input": torch.randn(n, 4), "target": torch.randint(3, (n,))}


def noted(module: nn.Module, low: Data | None = None) -> Noted:
    program, checked = exported(module, rows(3), "cross_entropy")
    few = [Program(program.graph, program.weights, b) for b in BATCHES]
    data = rows(3)
    return note(program.graph, checked.values, few,
                [{k: v[:b].clone() for k, v in data.items()} for b in BATCHES])  # fmt: skip


def test_sizes_that_follow_the_batch_are_symbols() -> None:
    made = noted(
        nn.Sequential(nn.Unflatten(1, (2, 2)), nn.Linear(2, 3), nn.Flatten(), nn.Linear(6, 3))
    )
    found = [a for n in made.joint.nodes for arg in n.args for a in getattr(arg, "items", ())]
    assert any(isinstance(a, Size) and a.a == 2 for a in found)


def test_the_gradient_starts_at_the_seed() -> None:
    made = noted(nn.Linear(4, 3))
    reads = [a.name for n in made.joint.nodes for a in n.args if isinstance(a, Ref)]
    assert SEED in reads and SEED in made.joint.inputs
    assert len(made.joint.gradients) == 2 and None not in made.joint.gradients


def test_a_trained_tensor_without_a_gradient_has_none() -> None:
    class Unused(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.f, self.g = nn.Linear(4, 3), nn.Linear(4, 3)

        def forward(self, input: Tensor) -> Any:
            return self.f(input) + 0.0 * self.g(input).detach()

    assert None in noted(Unused()).joint.gradients


def test_written_over_values_are_not_read() -> None:
    """What is written in place has its new name from then on, or the graph is refused."""

    class InPlace(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.f = nn.Linear(4, 3)

        def forward(self, input: Tensor) -> Any:
            y = self.f(input)
            z = y * 1.0
            z.add_(1.0)
            return nn.functional.relu(z, inplace=True) + y

    try:
        made = noted(InPlace())
    except Unfit:
        return
    assert all(not n.op.split(".")[1].endswith("_") for n in made.joint.nodes)


def test_random_operations_are_not_noted() -> None:
    with pytest.raises(Exception, match=r"(?i)replay|random|dropout|table|rule"):
        module = nn.Sequential(nn.Linear(4, 3))
        module.forward = lambda input: module[0](input) + torch.rand_like(input[:, :3])  # type: ignore[method-assign]
        noted(module)
