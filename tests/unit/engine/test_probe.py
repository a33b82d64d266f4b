"""The probe of single operations (P13)."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from casemate.engine.probe import one_by_one
from casemate.engine.program import uses
from support.batched_lab import Data, Lab, lab


def rows(n: int) -> Data:
    return {"input": torch.randn(n, 3), "target": torch.randint(3, (n,))}


def made(rows_: int = 16) -> Lab:
    torch.manual_seed(0)
    return lab(nn.Sequential(nn.Linear(3, 3), nn.SiLU(), nn.Linear(3, 3)), rows, rows=rows_)


@pytest.mark.skipif(
    torch.backends.cpu.get_cpu_capability() != "AVX512", reason="sizes of AVX-512 loops"
)
def test_an_operation_whose_last_elements_take_other_code_is_found() -> None:
    """48 numbers: 32 by vectors, the rest one by one."""
    assert any("silu" in name for name in made().slow)


def test_one_by_one_gives_the_same_values() -> None:
    at = made()
    runner = at.path.runner
    nodes = runner.order([*at.path.data, "seed"], at.path.wanted)
    env = dict(runner.fixed)
    env |= {f"d{i}": at.data[s.name] for i, s in enumerate(at.program.data)} | {
        "seed": torch.ones(16)
    }
    tried = 0
    with torch.inference_mode():
        for node in nodes:
            whole = runner.call(node, env, 16, runner.without_sums(node))
            if any(runner.proved.values[n].batch is not None for n in uses(node)):
                runner._store(node, env, whole)
                alone = one_by_one(runner, node, env)(env)
                pairs = (
                    zip(whole, alone, strict=True) if isinstance(whole, tuple) else [(whole, alone)]
                )
                for a, b in pairs:
                    if isinstance(a, torch.Tensor) and a.is_floating_point() and a.numel():
                        assert torch.allclose(a, b, rtol=1e-5, atol=1e-6), node.op
                        tried += 1
            runner._store(node, env, whole)
    assert tried > 5
