"""Products by another library: tried once with the operation's own kernel."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from casemate.engine import probe, products
from support.batched_lab import Data, Lab, lab


def _layers() -> Lab:
    """Two layers of one geometry."""

    def rows(n: int) -> Data:
        return {"input": torch.randn(n, 16), "target": torch.randint(16, (n,))}

    return lab(nn.Sequential(nn.Linear(16, 16), nn.Tanh(), nn.Linear(16, 16)), rows, rows=64)


def test_the_operations_own_kernel_is_tried_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whether it fails is asked before another library is looked for, and again after."""

    tried: list[str] = []
    same = probe.same_in_every_slot

    def counted(runner, node, env, call):  # type: ignore[no-untyped-def]
        tried.append(node.op)
        return same(runner, node, env, call)

    monkeypatch.setattr(probe, "same_in_every_slot", counted)
    monkeypatch.setattr(products, "same_in_every_slot", counted)
    monkeypatch.setattr(products, "_timed", lambda ways, *given: (1.0, 2.0, 2.0)[: len(ways)])
    torch.manual_seed(0)
    at = _layers()
    # torch's own kernel passes or another takes its place.
    assert tried.count("aten.addmm.default") == 1 + any("addmm" in n for n in at.path.instead)
    tried.clear()
    at.path.settle(at.data)
    assert tried == []


def test_the_quickest_library_that_treats_slots_alike_is_taken(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    taken: list[str] = []

    def noted(name: str) -> products.Product:
        way = getattr(products, name)

        def run(a: torch.Tensor, b: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
            taken.append(name)
            made: torch.Tensor = way(a, b, bias)
            return made

        run.__name__ = name
        return run

    def chosen() -> set[str]:
        at = _layers()
        taken.clear()
        at.env()
        return set(taken)

    torch.manual_seed(0)
    for name in ("_onednn", "_packed"):
        monkeypatch.setattr(products, name, noted(name))
    for seconds, expected in (((9.0, 1.0, 2.0), {"_onednn"}), ((1.0, 9.0, 9.0), set())):
        monkeypatch.setattr(products, "_timed", lambda ways, *a, s=seconds: s[: len(ways)])
        assert chosen() <= expected  # nothing where an operation's own kernel will do
    # Backward a weight has its columns for rows.
    monkeypatch.setattr(products, "_timed", lambda ways, *a: (9.0, 2.0, 1.0)[: len(ways)])
    assert "_packed" in chosen()


@pytest.mark.parametrize("turned", [False, True])
@pytest.mark.parametrize("bias", [False, True])
def test_every_library_makes_the_same_product(turned: bool, bias: bool) -> None:
    torch.manual_seed(0)
    a, b = torch.randn(33, 20), torch.randn(17, 20).t() if turned else torch.randn(20, 17)
    row = torch.randn(17) if bias else None
    if not products._fits(a, b, row):
        pytest.skip("no oneDNN")
    expected = a.double() @ b.double() + (0.0 if row is None else row.double())
    for way in (products._own, products._onednn, products._packed):
        made = way(a, b, row)
        assert made.is_contiguous()
        assert torch.allclose(made.double(), expected, rtol=1e-5, atol=1e-5)
