"""Sums and norm layers of a noted step: float64, rounded once."""

import pytest
import torch

from casemate.engine.aot import step, sums
from support import native_lab as native

ATEN = torch.ops.aten
N, C, HW, GROUPS = 3, 6, 500, 2


def records(seed):
    torch.manual_seed(seed)
    return torch.randn(N, C, 20, 25) + 1000.0  # far from zero: float32 sums lose digits


def cases():
    x, g, w, b = records(0), torch.randn(N, C, 20, 25), torch.rand(C) + 0.5, torch.randn(C)
    lw, lb = torch.rand(20, 25) + 0.5, torch.randn(20, 25)
    group = (x, w, b, N, C, HW, GROUPS, 1e-5)
    mean, rstd = (t.float() for t in ATEN.native_group_norm(*wide(group))[1:])
    layer = (x, [20, 25], lw, lb, 1e-5)
    at, over = (t.float() for t in ATEN.native_layer_norm(*wide(layer))[1:])
    return {
        "sum.dim_IntList": (x, [1, 3], True),
        "mean.dim": (x, [2, 3]),
        "native_group_norm.default": group,
        "native_group_norm_backward.default": (
            g, x, mean, rstd, w, N, C, HW, GROUPS, [True, True, True]
        ),
        "native_layer_norm.default": layer,
        "native_layer_norm_backward.default": (
            g, x, [20, 25], at, over, lw, lb, [True, True, True]
        ),
        "_adaptive_avg_pool2d.default": (x, [7, 3]),
        "_adaptive_avg_pool2d_backward.default": (torch.randn(N, C, 7, 3), x),
        "_adaptive_avg_pool3d.default": (x, [4, 20, 40]),
        "_adaptive_avg_pool3d_backward.default": (torch.randn(N, 4, 20, 40), x),
    }  # fmt: skip


def wide(given):
    return [t.double() if isinstance(t, torch.Tensor) else t for t in given]


def test_all_of_the_table_is_tried():
    assert {op.name().removeprefix("aten::") for op in sums.TABLE} == {
        "mm",
        *(name.removesuffix(".default") for name in cases()),
    }


def test_a_product_is_one_of_the_runtimes_in_float32_alone():
    a, b = torch.randn(4, 30), torch.randn(30, 5)
    assert sums.TABLE[ATEN.mm.default](a, b) is NotImplemented
    made = sums.TABLE[ATEN.mm.default](a.double(), b.double())
    torch.testing.assert_close(made, a.double() @ b.double())


@pytest.mark.parametrize("name", cases())
def test_it_is_the_operation_of_float64_rounded_once(name):
    op, given = ATEN, cases()[name]
    for part in name.split("."):
        op = getattr(op, part)
    made, exact = sums.TABLE[op](*given), op(*wide(given))
    if isinstance(made, torch.Tensor):
        made, exact = [made], [exact]
    for got, want in zip(made, exact, strict=True):
        assert got.dtype == torch.float32
        torch.testing.assert_close(got, want.float(), rtol=2.0**-22, atol=1e-8)


@pytest.mark.parametrize("kind", ["images", "texts", "tied"])
def test_no_sum_of_a_noted_step_is_in_float32(kind):
    graph = step.noted(native.stepped(kind)[1]).graph
    found, here = 0, {ATEN.sum.dim_IntList, ATEN.mean.dim}
    for node in graph.nodes:
        assert node.target not in set(sums.TABLE) - {*here, ATEN.mm.default}
        if node.target is ATEN.mm.default:  # the runtime's own
            assert node.meta["val"].dtype == torch.float32
        if node.target in here:
            of = node.kwargs.get("dtype") or node.args[0].meta["val"].dtype
            assert of in (torch.float64, torch.int64)
            found += 1
    assert found > 2
