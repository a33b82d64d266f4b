"""Running a proved joint graph: rows of folded batches, one function, one record at a time."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from casemate.engine.nodes import from_rows, to_rows
from casemate.graph.ops import Batch, Value
from support.batched_lab import Data, lab


@pytest.mark.parametrize("axis", [0, 1, 2])
@pytest.mark.parametrize(("outer", "inner"), [(1, 1), (3, 1), (1, 2), (3, 2)])
def test_rows_of_a_folded_batch_and_back(axis: int, outer: int, inner: int) -> None:
    dims = [4, 5, 2]
    dims[axis] = outer * inner
    v = Value("f32", tuple(dims), Batch(axis, outer, inner))
    t = torch.randn(v.sizes(7))
    flat = to_rows(t, v, 7)
    assert flat.shape == (7, v.numel)
    assert torch.equal(from_rows(flat, v), t)
    # Record 3 owns the places (o * B + 3) * inner + i.
    places = [(o * 7 + 3) * inner + i for o in range(outer) for i in range(inner)]
    assert set(flat[3].tolist()) == set(
        t.index_select(axis, torch.tensor(places)).flatten().tolist()
    )


def rows(n: int) -> Data:
    return {"x": torch.randn(n, 6), "target": torch.randint(3, (n,))}


class Halves(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.randn(5, 6))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x @ self.w[1:4].t()


def test_the_function_gives_what_node_by_node_gives() -> None:
    torch.manual_seed(0)
    at = lab(
        nn.Sequential(nn.Linear(6, 4), nn.Tanh(), nn.Linear(4, 3)),
        lambda n: {"input": rows(n)["x"], "target": rows(n)["target"]},
    )
    runner = at.path.runner
    env = dict(runner.fixed)
    env |= {f"d{i}": at.data[s.name] for i, s in enumerate(at.program.data)} | {
        "seed": torch.ones(16)
    }
    with torch.inference_mode():
        for node in runner.order([*at.path.data, "seed"], at.path.wanted):
            runner._store(node, env, runner.call(node, env, 16))
    made = at.env()
    for name in at.path.wanted:
        assert torch.allclose(made[name], env[name], rtol=1e-6, atol=1e-7)


def test_placement_says_where_a_slice_of_a_parameter_lands() -> None:
    at = lab(Halves(), rows)
    proved, runner = at.path.proved, at.path.runner
    ((name, _),) = proved.contractions.items()
    chain = [n for n in proved.joint.nodes if any(o in proved.linear for o in runner.outs(n))]
    places = runner.placement(name, chain)
    assert places is not None and sorted(places.tolist()) == list(range(6, 24))


def test_values_of_the_parameters_are_had_anew_each_step() -> None:
    at = lab(Halves(), rows)
    before = at.env()
    with torch.no_grad():
        at.program.flat.mul_(2.0)
    at.path.runner.refresh()
    after = at.env()
    assert any(not torch.equal(before[n], after[n]) for n in at.path.wanted)
