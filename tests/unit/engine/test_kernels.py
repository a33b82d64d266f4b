"""Kernels against float64, record by record; compiled ones and their twins by the same checks."""

from __future__ import annotations

import contextlib
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import support.kernel_checks as checks
from casemate.engine import kernels
from casemate.engine.kernels import bounds, compiled, twins

needs_compiled = pytest.mark.skipif(compiled.library() is None, reason="no compiler")
BOTH = [pytest.param("compiled", marks=needs_compiled), "twins"]
both = pytest.mark.parametrize("name", BOTH)
size = st.integers(1, 40)


@both
@settings(max_examples=40)
@given(st.integers(1, 4), size, size, size, st.integers(0, 9))
def test_dense(name: str, b: int, tokens: int, m: int, n: int, seed: int) -> None:
    checks.dense(checks.KERNELS[name], b, tokens, m, n, seed)


@both
@pytest.mark.parametrize(
    "shape", [(1, 1, 1, 1), (2, 1, 512, 784), (2, 130, 17, 600), (2, 64, 64, 64), (1, 300, 3, 2)]
)
def test_dense_wide(name: str, shape: tuple[int, int, int, int]) -> None:
    checks.dense(checks.KERNELS[name], *shape)


@both
@settings(max_examples=30)
@given(st.integers(1, 3), size, size, st.integers(1, 9), st.integers(0, 9))
def test_embedding(name: str, b: int, tokens: int, width: int, rows: int, seed: int) -> None:
    checks.embedding(checks.KERNELS[name], b, tokens, width, rows, seed)


@both
@pytest.mark.parametrize(
    "check",
    ["chunks", "summing", "weighting", "not_finite", "long_contraction", "embedding_sum",
     "affine"],
)  # fmt: skip
def test_rules(name: str, check: str) -> None:
    getattr(checks, check)(checks.KERNELS[name])


@both
@pytest.mark.parametrize(
    "shape",
    [(3, 5, 7, 9, 4), (4, 128, 40, 100, 256), (10, 1, 64, 10, 4), (64, 1, 2, 30, 32),
     (4, 300, 33, 17, 256), (2, 3, 20, 1, 32)],
)  # fmt: skip
def test_weighted_sums(name: str, shape: tuple[int, int, int, int, int]) -> None:
    checks.contraction(checks.KERNELS[name], *shape)


@needs_compiled
def test_bits_do_not_depend_on_the_slot() -> None:
    checks.slots(compiled)


@needs_compiled
def test_integer_sums_have_the_same_bits() -> None:
    part = torch.randn(4099) * torch.logspace(-30, 30, 4099)
    sums = [torch.zeros(4099, dtype=torch.int64) for _ in range(2)]
    outs = [torch.empty(4099) for _ in range(2)]
    for m, total, out in zip((compiled, twins), sums, outs, strict=True):
        m.accumulate(total, part, 2.0**12)
        m.finish(total, 2.0**-12 / 3, out)
    assert torch.equal(*sums)
    assert checks.same_bits(*outs)


def test_doors_choose(monkeypatch: pytest.MonkeyPatch) -> None:
    g, x = torch.randn(2, 3, 4), torch.randn(2, 3, 5)
    rule = ((1,), (1,), (0,), (1,))

    def results() -> list[torch.Tensor]:
        total, out = torch.zeros(2, dtype=torch.int64), torch.empty(2)
        kernels.accumulate(total, g[:, 0, 0].contiguous(), 2.0**20)
        kernels.finish(total, 2.0**-20, out)
        xs, gs = x.transpose(1, 2), g.transpose(1, 2)
        return [
            *kernels.gram_pair(g, x), kernels.row_squares(g),
            kernels.formed_outer(g, x), kernels.formed_sum(g),
            *kernels.embedding_gram(torch.zeros((2, 3), dtype=torch.int64), g),
            kernels.conv_formed(xs, gs, *rule), kernels.conv_norms(xs, gs, *rule),
            kernels.conv_scale(xs, gs, *rule), *kernels.conv_gram(xs, gs, *rule),
            kernels.weighted_sum(x[:, 0], torch.ones(2)), out,
        ]  # fmt: skip

    first = results()
    monkeypatch.setattr(compiled, "library", lambda: None)
    assert not kernels.native()
    for a, b in zip(first, results(), strict=True):
        assert torch.allclose(a, b, rtol=1e-5, atol=1e-6)


@needs_compiled
def test_compiled_kernels_get_float32_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    called: list[str] = []
    call = compiled._call

    def counted(name: str, *operands: object) -> None:
        called.append(name)
        call(name, *operands)

    monkeypatch.setattr(compiled, "_call", counted)
    total, keep = torch.zeros((2, 4), dtype=torch.int64), torch.ones(2, dtype=torch.bool)
    g, c = torch.ones(2, 3, 4), torch.ones(2)
    index = torch.zeros((2, 3), dtype=torch.int64)
    row, doubles = torch.ones(2, 4), torch.ones(2, 4, dtype=torch.float64)
    cases: list[tuple[Any, tuple[Any, ...], torch.Tensor]] = [
        (kernels.row_squares, (g,), g.to(torch.uint8)),
        (kernels.embedding_gram, (index, g), g.double()),
        (kernels.contract, (row, row, c, keep, 32), doubles),
        (kernels.conv_contract, (g, g, c, keep, 32, (1,), (1,), (0,), (1,)), g.double()),
        (kernels.embedding_add, (total, index, g, c, keep, 1.0), g.double()),
        (kernels.accumulate, (total, row, 1.0), doubles),
    ]
    for door, operands, other in cases:
        door(*operands)
        assert len(called) == 1
        same = [other if isinstance(o, torch.Tensor) and o.shape == other.shape
                and o.dtype == torch.float32 else o for o in operands]  # fmt: skip
        with contextlib.suppress(RuntimeError):  # a twin may mind two types at once
            door(*same)
        assert len(called) == 1
        called.clear()


def test_sums_need_their_types() -> None:
    with pytest.raises(TypeError):
        kernels.accumulate(torch.zeros(2), torch.zeros(2), 1.0)
    with pytest.raises(TypeError):
        kernels.finish(torch.zeros(2, dtype=torch.int64), 1.0, torch.zeros(2, dtype=torch.float64))
    with pytest.raises(TypeError):
        kernels.accumulate(torch.zeros(4, dtype=torch.int64)[::2], torch.zeros(2), 1.0)


@needs_compiled
def test_out_must_fit() -> None:
    with pytest.raises(TypeError):
        compiled.formed_outer(torch.ones(2, 3, 4), torch.ones(2, 3, 5), torch.empty(2, 21))


def test_gamma() -> None:
    assert bounds.gamma(1, 0.25) == 0.25 / 0.75
    with pytest.raises(ValueError, match="too many"):
        bounds.gamma(2**23, bounds.U32)
    # The compiled kernels' does not grow with the number of terms.
    short, long = (bounds.gram_pair(8, n, n, precise=False, native=True) for n in (256, 2**20))
    assert long < 1.01 * short
