"""Noting the gradient at two batch sizes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from casemate.engine.joint import BATCHES, SEED, Noted, note
from casemate.engine.program import Program, maker, uses
from casemate.engine.tape import Unfit
from casemate.graph.model import Ref, Size
from support.batched_lab import Data, Lab, clipped, exported, gradients, lab, relative


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


class Of(nn.Module):
    """A function of the input and of a parameter ``w``."""

    def __init__(self, run: Any, *shape: int) -> None:
        super().__init__()
        self.f, self.w, self.run = nn.Linear(4, 3), nn.Parameter(torch.randn(shape)), run

    def forward(self, input: Tensor) -> Any:
        return self.run(self, input)


def agrees(module: nn.Module) -> Lab:
    """The path's clipped sum is that of a float64 loop over records."""
    at = lab(module, rows, "cross_entropy")
    each = gradients(module, at.program, at.data, "cross_entropy")
    bound = float(each.norm(dim=1).median())
    assert relative(at.parts(bound)[0], clipped(each, bound)[0]) < 1e-5
    return at


def test_vector_products_are_matrix_products_whose_sums_have_a_site() -> None:
    module = Of(lambda m, x: m.f(x) + (x @ m.w).unsqueeze(1), 4)
    assert not any(n.op.startswith("aten.mv") for n in noted(module).joint.nodes)
    at = agrees(module)
    assert not any(way.name == "loop" for site in at.path.sites for way in site.ways)


def test_a_table_that_is_indexed_by_constants() -> None:
    """The gradient is put into zeros made like it."""
    places = torch.tensor([[0, 2, 1], [1, 1, 0]])
    module = Of(lambda m, x: m.f(x) * m.w[places].sum(0) + m.w[:3], 5)
    assert "aten.index_put.default" in {n.op for n in noted(module).joint.nodes}
    agrees(module)


def test_memory_that_autograd_fills_is_zeros() -> None:
    def run(m: Any, x: Tensor) -> Tensor:
        y = m.f(x)
        return torch.lerp(y, y.sin(), m.w.sigmoid())

    module = Of(run)
    made = noted(module)
    ops = [n.op for n in made.joint.nodes]
    at = ops.index("aten.fill.Scalar")
    assert ops[at - 1] == "aten.zeros_like.default" and "aten.empty_like.default" not in ops
    agrees(module)


def test_what_nothing_reads_is_left_out() -> None:
    """An operation without a rule that the gradient does not need does not refuse the model."""
    module = Of(lambda m, x: m.f(x) + 0.5 * x[:, :3].sinh() * m.w, 3)
    made = noted(module)
    wanted = {made.joint.loss, *made.frontier, *(g for g in made.joint.gradients if g)}
    for node in reversed(made.joint.nodes):
        assert maker(node.name) in {maker(n) for n in wanted}
        wanted |= set(uses(node))


def test_a_gradient_that_is_always_zero() -> None:
    never = torch.zeros(3, dtype=torch.bool)
    module = Of(lambda m, x: m.f(x) + torch.where(never, m.w, 1.0) + m.w.floor(), 3)
    agrees(module)
