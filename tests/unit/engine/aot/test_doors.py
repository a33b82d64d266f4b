"""The native kernels as operations: noted with the right shapes, and in C safe against operands
that do not hold what the kernel reads."""

import ctypes
import re

import pytest
import torch
from torch.fx.experimental.proxy_tensor import make_fx

from casemate.engine import kernels
from casemate.engine.aot import doors
from casemate.engine.kernels import compiled
from support import runtime_lab as lab

if not kernels.native():
    pytestmark = pytest.mark.skip(reason="no native kernels")


def test_noting_keeps_shapes_and_computes_nothing():
    g, x = torch.randn(4, 5, 3), torch.randn(4, 5, 2)
    calls = [lambda: compiled.gram_pair(g, x), lambda: (compiled.formed_outer(g, x),)]
    for call in calls:
        with doors.noted():
            graph = make_fx(call, tracing_mode="fake", _allow_non_fake_inputs=True)()
        (out,) = (n.args[0] for n in graph.graph.nodes if n.op == "output")
        made = [n.meta["val"] for n in out]
        assert [(t.shape, t.dtype) for t in made] == [(t.shape, t.dtype) for t in call()]
        names = [n.target.name() for n in graph.graph.nodes if "casemate" in str(n.target)]
        assert len(names) == 1 and names[0].startswith("casemate::norms_")
    assert not compiled.noting()


@pytest.mark.parametrize("name", doors.STEP)
def test_every_operand_of_a_door_is_checked(name):
    takes, status = compiled.DOORS[name]
    text = doors.definition(name)
    assert text.count("perand(") == takes.count("t")
    assert text.count("result<") == sum(kind in "feq" for kind in takes)
    (call,) = re.findall(rf"norms_{name}\(([^{{]*)\)(?: \?|;)", text)
    assert len(call.split(", ")) == len(takes)
    assert ("? 1 : 0" in text) == status


def given(t):
    return ctypes.byref(lab.handle(t))


def sizes(*shape):
    return ctypes.byref(ctypes.cast(lab.ints(shape), ctypes.POINTER(ctypes.c_int64))), len(shape)


I = ctypes.c_int64  # noqa: E741


def test_a_door_computes_what_its_kernel_does():
    x, w = torch.randn(4, 6), torch.rand(4)
    made = ctypes.c_void_p()
    lab.call("norms_row_squares", given(x), I(4), I(6), *sizes(4), ctypes.byref(made))
    assert torch.equal(lab.view(made), compiled.row_squares(x))
    lab.call("norms_weighted_sum", given(x), I(4), I(6), given(w), *sizes(6), ctypes.byref(made))
    torch.testing.assert_close(lab.view(made), w @ x)


@pytest.mark.parametrize("wrong", ["rows", "width", "product", "type", "result", "gaps"])
def test_an_operand_or_a_result_that_is_too_small_ends_the_process(wrong):
    x = torch.randn(4, 6)
    rows, width, out = 4, 6, 4
    if wrong == "rows":
        rows = out = 5
    elif wrong == "width":
        width = 2**40
    elif wrong == "product":  # 0 modulo 2^64
        rows, width, out = 2**24, 2**40, 2**24
    elif wrong == "type":
        x = x.double()
    elif wrong == "result":
        out = 3
    else:
        x = torch.randn(4, 12)[:, ::2]
    made = ctypes.c_void_p()
    operand, size = given(x), sizes(out)
    assert lab.ends(
        lambda: lab.call("norms_row_squares", operand, I(rows), I(width), *size, ctypes.byref(made))
    )


@pytest.mark.parametrize("channels", [(2, 4), (4, 2), (2, 2)], ids=str)
def test_both_sides_of_a_window_are_checked_where_they_are_one_tensor(channels):
    """Of what is read as input and as output gradient, each must hold its side."""
    x, (inputs, outputs) = torch.randn(2, 2, 4, 4), channels
    side = lab.handle(x)
    shape = lab.ints([
        2, inputs, outputs, 1, *(1, 4, 4) * 2, *(1,) * 6, *(0,) * 3, *(1,) * 3,
        *(16 * inputs, 16, 16, 4, 1), *(16 * outputs, 16, 16, 4, 1),
    ])  # fmt: skip
    made = ctypes.c_void_p()

    def scale():
        lab.call(
            "norms_conv_scale", ctypes.byref(side), ctypes.byref(side), shape, I(32), *sizes(2),
            ctypes.byref(made),
        )  # fmt: skip

    if channels == (2, 2):
        scale()
        assert bool((lab.view(made) > 0).all())
    else:
        assert lab.ends(scale)


@pytest.mark.parametrize("row", [-1, 3, 2**40, 2**62, 2**63 - 1])
def test_an_index_beyond_its_table_ends_the_process(row):
    index, g = torch.tensor([[0, row]]), torch.randn(1, 2, 4)
    keep, weights = torch.ones(1, dtype=torch.bool), torch.ones(1)
    made = ctypes.c_void_p()
    operands = [given(t) for t in (index, g, weights, keep)]

    def add(table):
        lab.call(
            "norms_embedding_add", *operands[:2], I(1), I(2), I(4), I(-(2**63)), *operands[2:],
            ctypes.c_double(1.0), *sizes(table), ctypes.byref(made),
        )  # fmt: skip

    assert lab.ends(lambda: add(12))
