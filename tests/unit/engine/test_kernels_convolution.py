"""Convolutions against float64 autograd, one record at a time."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import support.kernel_checks as checks
from casemate.engine.kernels import bounds, compiled, twins
from support.kernel_checks import Convolution

needs_compiled = pytest.mark.skipif(compiled.library() is None, reason="no compiler")
both = pytest.mark.parametrize("name", [pytest.param("compiled", marks=needs_compiled), "twins"])


@both
def test_grid(name: str) -> None:
    cases = checks.grid()
    assert sum(checks.convolution(checks.KERNELS[name], c) for c in cases) > 300


@both
@pytest.mark.parametrize("case", checks.WIDE, ids=str)
def test_wide(name: str, case: Convolution) -> None:
    assert checks.convolution(checks.KERNELS[name], case)


@st.composite
def convolutions(draw: st.DrawFn) -> Convolution:
    dims = draw(st.integers(1, 3))

    def axes(low: int, high: int) -> tuple[int, ...]:
        return tuple(draw(st.integers(low, high)) for _ in range(dims))

    groups = draw(st.sampled_from((1, 1, 2, 3, 17)))
    return Convolution(
        groups * draw(st.integers(1, 5)), groups * draw(st.integers(1, 5)),
        axes(1, 9 if dims < 3 else 4), axes(1, 4), axes(1, 3), axes(0, 3), axes(1, 2),
        groups, draw(st.booleans()), draw(st.booleans()),
    )  # fmt: skip


@both
@settings(max_examples=60)
@given(convolutions(), st.integers(1, 3), st.integers(0, 99))
def test_any(name: str, case: Convolution, b: int, seed: int) -> None:
    checks.convolution(checks.KERNELS[name], case, b, seed)


@both
@pytest.mark.parametrize("chunk", [64, 256])
def test_weighted_sums(name: str, chunk: int) -> None:
    for i, case in enumerate((*checks.WIDE, *checks.grid())):
        if i < len(checks.WIDE) or i % 20 == chunk % 3:
            checks.convolution_sum(checks.KERNELS[name], case, chunk)


@both
@settings(max_examples=40)
@given(convolutions(), st.sampled_from((16, 64, 256)), st.integers(0, 99))
def test_any_weighted_sum(name: str, case: Convolution, chunk: int, seed: int) -> None:
    checks.convolution_sum(checks.KERNELS[name], case, chunk, seed)


@both
def test_gram_matrices_in_float64(name: str) -> None:
    """Where tokens cancel too; each record has the same bits alone."""
    m = checks.KERNELS[name]
    for case in (*checks.WIDE, *checks.grid()[::23]):
        data = case.data(3)
        if data is None:
            continue
        x, g, oracle = data
        g = g - g.flatten(2).mean(2).reshape(*g.shape[:2], *(1,) * (g.dim() - 2))
        n2, scale = m.conv_gram(x, g, *case.rule, True)
        truth = twins.conv_formed(x.double(), g.double(), *case.rule).square().flatten(1).sum(1)
        taps = math.prod(case.kernel)
        rows, columns = oracle.shape[1] // case.groups, oracle.shape[2] * taps
        gamma = bounds.conv_gram(
            math.prod(g.shape[2:]), rows, columns, taps, precise=True, native=m is compiled
        )
        assert gamma < 1e-10
        checks.within(n2, truth, scale, gamma)
        if m is compiled:
            turned = m.conv_gram(x.flip(0), g.flip(0), *case.rule, True)[0]
            assert torch.equal(turned.flip(0), n2)


@needs_compiled
def test_layouts_are_not_copied_and_any_stride_is_read() -> None:
    case = Convolution(5, 7, (6, 8), (3, 3), (1, 1), (1, 1), (1, 1))
    data = case.data(3)
    assert data is not None
    x, g, _ = data
    expected = twins.conv_norms(x, g, *case.rule)
    wide = torch.randn(3, 5, 6, 16)
    wide[..., ::2] = x
    for odd in (
        wide[..., ::2],
        x.permute(3, 1, 0, 2).contiguous().permute(2, 1, 3, 0),
        x.contiguous(memory_format=torch.channels_last),
    ):
        assert torch.allclose(compiled.conv_norms(odd, g, *case.rule), expected, rtol=1e-5)
        assert torch.allclose(compiled.conv_gram(odd, g, *case.rule)[0], expected, rtol=1e-5)
    same = torch.randn(3, 1, 1, 1).expand(3, 5, 6, 8)
    one = compiled.conv_norms(same, g, *case.rule)
    assert torch.allclose(one, twins.conv_norms(same, g, *case.rule), rtol=1e-4)
