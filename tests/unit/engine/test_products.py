"""Products by another library: tried once with the operation's own kernel."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from casemate.engine import probe, products
from support.batched_lab import Data, lab


def test_the_operations_own_kernel_is_tried_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whether it fails is asked before another library is looked for, and again after."""

    def rows(n: int) -> Data:
        return {"input": torch.randn(n, 16), "target": torch.randint(16, (n,))}

    tried: list[str] = []
    same = probe.same_in_every_slot

    def counted(runner, node, env, call):  # type: ignore[no-untyped-def]
        tried.append(node.op)
        return same(runner, node, env, call)

    monkeypatch.setattr(probe, "same_in_every_slot", counted)
    monkeypatch.setattr(products, "same_in_every_slot", counted)
    monkeypatch.setattr(products, "_timed", lambda *given: (1.0, 2.0))
    torch.manual_seed(0)
    at = lab(nn.Sequential(nn.Linear(16, 16), nn.Tanh(), nn.Linear(16, 16)), rows, rows=64)
    # Two layers of one geometry; torch's own kernel passes or another takes its place.
    assert tried.count("aten.addmm.default") == 1 + any("addmm" in n for n in at.path.instead)
    tried.clear()
    at.path.settle(at.data)
    assert tried == []
