"""The bounds of engine/kernels/bounds.py where it matters: cancellation, overflow, underflow."""

from __future__ import annotations

import math
from fractions import Fraction

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import support.kernel_checks as checks
from casemate.engine.kernels import bounds, compiled, twins

needs_compiled = pytest.mark.skipif(compiled.library() is None, reason="no compiler")
both = pytest.mark.parametrize("name", [pytest.param("compiled", marks=needs_compiled), "twins"])


@both
@pytest.mark.parametrize("shape", [(2, 1, 1), (7, 3, 5), (48, 33, 20), (64, 300, 17), (130, 8, 64)])
def test_cancelling_tokens_never_pass_below_the_truth(
    name: str, shape: tuple[int, int, int]
) -> None:
    m = checks.KERNELS[name]
    worst = min(checks.sound(m, seed, *shape) for seed in range(3))
    if shape[0] >= 48:
        # The attack is real: without gamma S^2 these would be clipped to several times the bound.
        assert worst < 0.5


@both
@settings(max_examples=25)
@given(st.integers(0, 10**6), *[st.integers(1, 24)] * 3)
def test_cancelling_tokens_of_any_shape(name: str, seed: int, tokens: int, m: int, n: int) -> None:
    checks.sound(checks.KERNELS[name], seed, tokens, m, n)


@both
@pytest.mark.parametrize("power", range(0, 24, 3))
def test_cancelling_convolutions(name: str, power: int) -> None:
    checks.conv_attack(checks.KERNELS[name], power)


@both
def test_extremes(name: str) -> None:
    checks.extremes(checks.KERNELS[name])


def exact(g: torch.Tensor, x: torch.Tensor) -> Fraction:
    """|sum_t g_t x_t^T|^2 of one record in rational arithmetic."""
    gs = [[Fraction(v) for v in row] for row in g.tolist()]
    xs = [[Fraction(v) for v in row] for row in x.tolist()]
    return sum(
        (
            sum((a[i] * c[j] for a, c in zip(gs, xs, strict=True)), Fraction(0)) ** 2
            for i in range(g.shape[1])
            for j in range(x.shape[1])
        ),
        Fraction(0),
    )


@both
def test_precise_against_rationals(name: str) -> None:
    """float64 can be attacked too, further out: its gamma must hold against exact arithmetic."""
    m = checks.KERNELS[name]
    below = False
    for g, x in checks.attacks(11, 6, 3, 4):
        truth = exact(g[0], x[0])
        n2, scale = m.gram_pair(g, x, True)
        gamma = bounds.gram_pair(6, 3, 4, precise=True, native=checks.is_native(m))
        room = Fraction(gamma) * Fraction(float(scale)) ** 2
        assert abs(Fraction(float(n2)) - truth) <= room
        below |= Fraction(float(n2)) < truth
        index = torch.zeros((1, 6), dtype=torch.int64)
        ones = torch.ones(6, 1)
        n2, scale = m.embedding_gram(index, g)
        room = Fraction(bounds.embedding_gram(6, 3)) * Fraction(float(scale)) ** 2
        assert abs(Fraction(float(n2)) - exact(g[0], ones)) <= room
    assert below  # without gamma it would be an underestimate


@both
@settings(max_examples=60)
@given(
    st.lists(st.floats(width=32, allow_nan=False, allow_infinity=False), min_size=1, max_size=70)
)
def test_row_squares_of_any_floats(name: str, values: list[float]) -> None:
    m = checks.KERNELS[name]
    x = torch.tensor([values])
    truth = sum(Fraction(v) ** 2 for v in values)
    n2 = float(m.row_squares(x))
    assert math.isfinite(n2)
    gamma = Fraction(bounds.row_squares(len(values)))
    assert abs(Fraction(n2) - truth) <= gamma * truth
    ranked = Fraction(float(m.row_squares(x) * m.row_squares(x)))
    assert abs(ranked - truth**2) <= Fraction(bounds.rank_one(len(values), len(values))) * truth**2


@both
@settings(max_examples=60)
@given(st.data())
def test_gram_of_any_floats(name: str, data: st.DataObject) -> None:
    """Any mixture of sizes, denormals among them: the floor in S pays for underflow."""
    m = checks.KERNELS[name]
    tokens, rows, columns = (data.draw(st.integers(1, 4)) for _ in range(3))
    floats = st.floats(width=32, allow_nan=False, allow_infinity=False)

    def operand(width: int) -> torch.Tensor:
        count = tokens * width
        drawn = data.draw(st.lists(floats, min_size=count, max_size=count))
        return torch.tensor(drawn).view(1, tokens, width)

    g, x = operand(rows), operand(columns)
    truth = exact(g[0], x[0])
    for precise in (False, True):
        n2, scale = m.gram_pair(g, x, precise)
        gamma = bounds.gram_pair(tokens, rows, columns, precise=precise, native=checks.is_native(m))
        room = Fraction(gamma) * Fraction(float(scale)) ** 2
        assert abs(Fraction(float(n2)) - truth) <= room, (g, x)
    xs, gs = x.transpose(1, 2).contiguous(), g.transpose(1, 2).contiguous()
    n2, scale = m.conv_gram(xs, gs, (1,), (1,), (0,), (1,))
    gamma = bounds.conv_gram(tokens, rows, columns, 1, native=checks.is_native(m))
    assert abs(Fraction(float(n2)) - truth) <= Fraction(gamma) * Fraction(float(scale)) ** 2
    n2 = m.conv_norms(xs, gs, (1,), (1,), (0,), (1,))
    scale = m.conv_scale(xs, gs, (1,), (1,), (0,), (1,))
    if math.isfinite(float(n2)):
        gamma = bounds.conv_norms(tokens, rows * columns, native=checks.is_native(m))
        assert abs(Fraction(float(n2)) - truth) <= Fraction(gamma) * Fraction(float(scale)) ** 2


def test_twins_take_any_place() -> None:
    """The twins' answers may differ in bits from place to place, never by more than gamma."""
    g, x = torch.randn(5, 40, 30), torch.randn(5, 40, 50)
    n2, scale = twins.gram_pair(g, x)
    gamma = bounds.gram_pair(40, 30, 50, precise=False, native=False)
    for i in range(5):
        alone = twins.gram_pair(g[i : i + 1], x[i : i + 1])[0]
        assert abs(float(alone) - float(n2[i])) <= 2 * gamma * float(scale[i]) ** 2


U, D = bounds.U32, bounds.U64


@pytest.mark.parametrize(
    ("found", "least"),
    [
        (bounds.row_squares(100), 101 * D),
        (bounds.rank_one(10, 20), 33 * D),
        (bounds.gram_pair(7, 20, 100, precise=False, native=True), (20 + 32) * U),
        (bounds.gram_pair(7, 20, 100, precise=False, native=False), (20 + 100) * U),
        (bounds.gram_pair(7, 20, 100, precise=True, native=True), (20 + 100 + 49) * D),
        (bounds.formed(1000, 9, native=True), 2 * 256 * U),
        (bounds.formed(1000, 9, native=False), 2 * 1000 * U),
        (bounds.formed_norm(40, native=True), 41 * U),
        (bounds.formed_sum(1000), U + 1000 * D),
        (bounds.embedding_gram(30, 5), (2 * 30 + 150) * D),
        (bounds.conv_gram(7, 4, 27, 9, native=True), (4 + 27) * U),
        (bounds.conv_gram(7, 4, 27, 9, precise=True, native=True), (4 + 27 + 49) * D),
        (bounds.weighted_sum(1000), U + 1000 * D),
        (bounds.contract(1000, 256), (256 + 4) * U),
        (bounds.contract(100, 256), 101 * U),
    ],
)
def test_each_rounding_is_counted(found: float, least: float) -> None:
    """Operands seldom come near a bound: to first order it is the number of roundings."""
    assert found >= least
