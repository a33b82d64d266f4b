"""What each kernel must do, as checks that take the kernels: compiled, twins, or a broken copy."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import torch

from casemate.engine.kernels import bounds, compiled, twins

F64 = torch.float64
CONV = (torch.conv1d, torch.conv2d, torch.conv3d)
TRANSPOSED = (torch.conv_transpose1d, torch.conv_transpose2d, torch.conv_transpose3d)


def is_native(m: ModuleType) -> bool:
    return m is compiled


def dense_truth(g: torch.Tensor, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(n2, S) in float64 from gradients formed record by record."""
    n2 = [(a.double().t() @ c.double()).square().sum() for a, c in zip(g, x, strict=True)]
    s = (g.double().norm(dim=2) * x.double().norm(dim=2)).sum(1)
    return torch.stack(n2), s


def within(n2: torch.Tensor, truth: torch.Tensor, scale: torch.Tensor, gamma: float) -> None:
    """|n2 - truth| <= gamma S^2, and with it the sound upper bound; the truth is float64's."""
    room = gamma * scale.square() + 1e-13 * truth + 1e-15 * scale.square()
    assert bool(((n2 - truth).abs() <= room).all()), (n2, truth, scale, gamma)
    assert bool((n2 + room >= truth).all())


def close_scale(scale: torch.Tensor, truth: torch.Tensor) -> None:
    assert bool((scale >= truth * (1 - 1e-12)).all())
    assert torch.allclose(scale, truth, rtol=1e-9, atol=1e-15)


def dense(m: ModuleType, b: int, tokens: int, rows: int, columns: int, seed: int = 0) -> None:
    r = torch.Generator().manual_seed(seed)
    g = torch.randn((b, tokens, rows), generator=r)
    x = torch.randn((b, tokens, columns), generator=r)
    truth, s = dense_truth(g, x)
    native = is_native(m)
    for precise in (False, True):
        n2, scale = m.gram_pair(g, x, precise)
        gamma = bounds.gram_pair(tokens, rows, columns, precise=precise, native=native)
        within(n2, truth, scale, gamma)
        close_scale(scale, s)
    formed = m.formed_outer(g, x)
    assert formed.shape == (b, rows * columns)
    out = torch.full_like(formed, torch.nan)
    assert m.formed_outer(g, x, out) is out
    assert torch.equal(out, formed)
    assert formed.dtype == torch.float32
    oracle = torch.einsum("bti,btj->bij", g.double(), x.double()).flatten(1)
    error = (formed.double() - oracle).norm(dim=1)
    assert bool((error <= bounds.formed_norm(tokens, native=native) * s + 1e-14 * s).all())
    gamma = bounds.formed(tokens, rows * columns, native=native)
    within(m.row_squares(formed), truth, s, gamma)
    total = m.formed_sum(g)
    error = (total.double() - g.double().sum(1)).norm(dim=1)
    assert bool((error <= bounds.formed_sum(tokens) * g.double().norm(dim=2).sum(1)).all())
    one = m.row_squares(g[:, 0]) * m.row_squares(x[:, 0])
    truth, s = dense_truth(g[:, :1], x[:, :1])
    within(one, truth, s, bounds.rank_one(rows, columns))


def chunks(m: ModuleType) -> None:
    """Long sums: 1 + many terms that float32 would lose one by one."""
    count = 6000
    small = torch.full((1, 1, count), 2.0**-13.1)
    small[0, 0, 0] = 1.0
    n2, scale = m.gram_pair(torch.ones(1, 1, 1), small)
    truth, _ = dense_truth(torch.ones(1, 1, 1), small)
    gamma = bounds.gram_pair(1, 1, count, precise=False, native=is_native(m))
    within(n2, truth, scale, gamma)
    column = small.transpose(1, 2).contiguous()
    n2, scale = m.conv_gram(column, torch.ones(1, 1, 1), (1,), (1,), (0,), (1,))
    within(n2, truth, scale, bounds.conv_gram(1, 1, count, 1, native=is_native(m)))
    formed = m.formed_outer(column, column)
    exact = column.double().square().sum()
    e = bounds.formed_norm(count, native=is_native(m))
    assert abs(float(formed) - float(exact)) <= e * float(exact)
    norm = m.conv_norms(small, small, (1,), (1,), (0,), (1,))
    assert abs(math.sqrt(float(norm)) - float(exact)) <= e * float(exact)


def attacks(seed: int, tokens: int, m: int, n: int) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """(g, x) of one record each, whose tokens cancel: |A| is far below S."""
    r = torch.Generator().manual_seed(seed)

    def randn(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=r)

    for power in (3, 6, 9, 12, 15, 18, 21):
        small = 2.0**-power
        # Pairs that cancel but for a relative `small`.
        g, x = randn(1, tokens, m), randn(1, tokens, n)
        half = tokens // 2
        if half:
            x[:, half : 2 * half] = x[:, :half]
            g[:, half : 2 * half] = -g[:, :half] * (1 + small)
            g[:, 2 * half :] = 0
        yield g, x
        # The same on the other operand.
        yield x.clone(), g.clone()
        # One large direction in x, gradients that sum to nothing.
        g = randn(1, tokens, m)
        g -= g.double().mean(1, keepdim=True).float()
        yield g, randn(1, 1, n) + small * randn(1, tokens, n)
        # Both operands of rank one but for little, alternating signs, growing sizes.
        sign = torch.tensor([(-1.0) ** t * 1.5 ** (t % 8) for t in range(tokens)])
        sign -= sign.mean()
        yield (
            sign.view(1, -1, 1) * (randn(1, 1, m) + small * randn(1, tokens, m)),
            randn(1, 1, n) + small * randn(1, tokens, n),
        )


def sound(m: ModuleType, seed: int, tokens: int, rows: int, columns: int) -> float:
    """The largest underestimate n2 / truth that float32 let an attack have; the bound holds."""
    worst = 1.0
    for g, x in attacks(seed, tokens, rows, columns):
        truth, s = dense_truth(g, x)
        for precise in (False, True):
            n2, scale = m.gram_pair(g, x, precise)
            gamma = bounds.gram_pair(tokens, rows, columns, precise=precise, native=is_native(m))
            within(n2, truth, scale, gamma)
            close_scale(scale, s)
            if not precise and float(truth) > 1e-12 * float(s) ** 2:
                worst = min(worst, float(n2) / float(truth))
    return worst


def extremes(m: ModuleType) -> None:
    """Overflow and underflow of float32, and one large token among small ones."""
    r = torch.Generator().manual_seed(1)
    g, x = torch.randn((7, 5, 20), generator=r), torch.randn((7, 5, 33), generator=r)
    sizes = [(1e30, 1e30), (1e30, 1e-30), (1e-25, 1e-25), (1e-40, 1.0), (3e38, 1e-45), (1e18, 1e18)]
    for i, (a, c) in enumerate(sizes):
        g[i] = (g[i].double().clamp(-1, 1) * a).float()
        x[i] = (x[i].double().clamp(-1, 1) * c).float()
    x[6, 0] *= 1e25
    g[6, 1] *= 1e-25
    truth, s = dense_truth(g, x)
    for precise in (False, True):
        n2, scale = m.gram_pair(g, x, precise)
        assert bool(torch.isfinite(n2).all())
        assert bool(torch.isfinite(scale).all())
        gamma = bounds.gram_pair(5, 20, 33, precise=precise, native=is_native(m))
        within(n2, truth, scale, gamma)
        assert bool((scale >= s * (1 - 1e-12)).all())
    squares = m.row_squares(x[:, 0])
    assert torch.allclose(squares, x[:, 0].double().square().sum(1), rtol=1e-14)
    geometry = ((1,), (1,), (0,), (1,))
    xs, gs = x.transpose(1, 2).contiguous(), g.transpose(1, 2).contiguous()
    n2, scale = m.conv_gram(xs, gs, *geometry)
    within(n2, truth, scale, bounds.conv_gram(5, 20, 33, 1, native=is_native(m)))
    # A formed gradient may overflow where it is above float32's range; else the bound holds.
    n2, scale = m.conv_norms(xs, gs, *geometry), m.conv_scale(xs, gs, *geometry)
    fits = truth.sqrt() < 1e38
    assert not bool(torch.isfinite(n2[0]))
    fits &= torch.isfinite(n2)
    assert int(fits.sum()) >= 5
    gamma = bounds.conv_norms(5, 660, native=is_native(m))
    within(n2[fits], truth[fits], scale[fits], gamma)


def not_finite(m: ModuleType) -> None:
    """It shows, in its own record only."""
    for bad in (math.inf, -math.inf, math.nan):
        g, x = torch.ones(4, 3, 6), torch.ones(4, 3, 5)
        g[1, 2, 3] = bad
        x[2, 0, 4] = bad
        expected = [True, False, False, True]
        xs, gs = x.transpose(1, 2).contiguous(), g.transpose(1, 2).contiguous()
        geometry = ((1,), (1,), (0,), (1,))
        index = torch.zeros((4, 3), dtype=torch.int64)
        results = {
            "float32": m.gram_pair(g, x)[0],
            "float64": m.gram_pair(g, x, True)[0],
            "rank one": m.row_squares(g[:, 2]) * m.row_squares(x[:, 0]),
            "formed": m.row_squares(m.formed_outer(g, x)),
            "norms": m.conv_norms(xs, gs, *geometry),
            "gram": m.conv_gram(xs, gs, *geometry)[0],
            "embedding": m.embedding_gram(index, g)[0],
            "sum": m.row_squares(m.formed_sum(g)),
        }
        for name, n2 in results.items():
            wanted = [True, False, True, True] if name in ("embedding", "sum") else expected
            assert torch.isfinite(n2).tolist() == wanted, (name, n2)


def embedding(m: ModuleType, b: int, tokens: int, width: int, rows: int, seed: int) -> None:
    r = torch.Generator().manual_seed(seed)
    index = torch.randint(0, rows, (b, tokens), generator=r)
    g = torch.randn((b, tokens, width), generator=r)
    if seed % 2:
        half = tokens // 2
        g[:, half : 2 * half] = -g[:, :half] * (1 + 2.0**-20)
        index[:, half : 2 * half] = index[:, :half]
    for padding in (None, 0, rows - 1):
        used = torch.ones_like(index, dtype=torch.bool) if padding is None else index != padding
        hot = torch.nn.functional.one_hot(index, rows).double() * used.unsqueeze(2)
        truth = torch.einsum("btr,btm->brm", hot, g.double()).square().sum((1, 2))
        n2, scale = m.embedding_gram(index, g, padding)
        within(n2, truth, scale, bounds.embedding_gram(tokens, width))
        close_scale(scale, (g.double().norm(dim=2) * used).sum(1))


@dataclass(frozen=True)
class Convolution:
    channels: int
    outputs: int
    space: tuple[int, ...]
    kernel: tuple[int, ...]
    stride: tuple[int, ...]
    padding: tuple[int, ...]
    dilation: tuple[int, ...]
    groups: int = 1
    transposed: bool = False
    last: bool = False  # channels last in memory

    @property
    def rule(self) -> tuple[Any, ...]:
        return (
            self.kernel, self.stride, self.padding, self.dilation, self.groups, self.transposed
        )  # fmt: skip

    def forward(self, x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
        d = len(self.kernel) - 1
        if self.transposed:
            return TRANSPOSED[d](
                x, w, None, self.stride, self.padding, 0, self.groups, self.dilation
            )
        return CONV[d](x, w, None, self.stride, self.padding, self.dilation, self.groups)

    def data(self, b: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor] | None:
        """x, g and the float64 weight gradients by autograd; None when nothing comes out."""
        r = torch.Generator().manual_seed(seed)
        x = torch.randn((b, self.channels, *self.space), generator=r)
        first, second = self.outputs, self.channels
        if self.transposed:
            first, second = second, first
        w = torch.zeros((first, second // self.groups, *self.kernel), dtype=F64)
        w.requires_grad_()
        try:
            y = self.forward(x.double(), w)
        except RuntimeError:
            return None
        if not y.numel():
            return None
        g = torch.randn(y.shape, generator=r)
        parts = [
            torch.autograd.grad((y[i] * g[i]).sum(), w, retain_graph=True)[0] for i in range(b)
        ]
        return *self.laid_out(x, g), torch.stack(parts)

    def laid_out(self, x: torch.Tensor, g: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        if not self.last or len(self.space) == 1:
            return x, g
        form = torch.channels_last if len(self.space) == 2 else torch.channels_last_3d
        return x.contiguous(memory_format=form), g.contiguous(memory_format=form)

    def scale(self, x: torch.Tensor, g: torch.Tensor) -> torch.Tensor:
        """S from the definition: windows by a convolution of squares, group by group."""
        if self.transposed:
            x, g = g, x
        total = torch.zeros(x.shape[0], dtype=F64)
        conv = CONV[len(self.kernel) - 1]
        ones = torch.ones((1, x.shape[1] // self.groups, *self.kernel), dtype=F64)
        sides = zip(x.double().chunk(self.groups, 1), g.double().chunk(self.groups, 1), strict=True)
        for xs, gs in sides:
            u = conv(xs.square(), ones, None, self.stride, self.padding, self.dilation)[:, 0]
            v = gs.square().sum(1).sqrt()
            u = u[(slice(None), *(slice(0, n) for n in v.shape[1:]))].clamp(min=0).sqrt()
            total += (u * v).flatten(1).sum(1).square()
        return total.sqrt()


def convolution(m: ModuleType, c: Convolution, b: int = 2, seed: int = 0) -> bool:
    data = c.data(b, seed)
    if data is None:
        return False
    x, g, oracle = data
    truth, s = oracle.square().flatten(1).sum(1), c.scale(x, g)
    seen = x if c.transposed else g  # whose positions are summed over
    tokens, size, native = math.prod(seen.shape[2:]), oracle[0].numel(), is_native(m)
    formed = m.conv_formed(x, g, *c.rule)
    assert formed.shape == oracle.shape
    out = torch.full_like(formed, torch.nan)
    assert m.conv_formed(x, g, *c.rule, out) is out
    assert torch.equal(out, formed)
    error = (formed.double() - oracle).flatten(1).norm(dim=1)
    assert bool((error <= bounds.formed_norm(tokens, native=native) * s + 1e-13 * s).all()), c
    scale = m.conv_scale(x, g, *c.rule)
    close_scale(scale, s)
    within(m.conv_norms(x, g, *c.rule), truth, s, bounds.conv_norms(tokens, size, native=native))
    n2, scale = m.conv_gram(x, g, *c.rule)
    close_scale(scale, s)
    taps = math.prod(c.kernel)
    rows, columns = oracle.shape[1] // c.groups, oracle.shape[2] * taps
    within(n2, truth, scale, bounds.conv_gram(tokens, rows, columns, taps, native=native))
    return True


def grid() -> list[Convolution]:
    """Strides, paddings (none and more than the kernel), dilations, groups, both layouts."""
    cases = []
    values = itertools.product(
        (1, 2, 3), (1, 3), (1, 2), (0, 1, 3), (1, 2), (1, 2, 4), (False, True), (False, True)
    )
    for i, (dims, k, s, p, d, groups, transposed, last) in enumerate(values):
        if (i * 7) % 5 and dims == 3:
            continue
        space = (6, 5, 7)[:dims]
        cases.append(
            Convolution(
                4,
                8,
                space,
                (k, 2, 3)[:dims] if k > 1 else (1,) * dims,
                (s, 2, 1)[:dims],
                (p,) * dims,
                (d, 1, d)[:dims],
                groups,
                transposed,
                last,
            )
        )
    return cases


WIDE = (
    Convolution(3, 64, (12, 12), (3, 3), (1, 1), (1, 1), (1, 1)),
    Convolution(70, 33, (9, 9), (3, 3), (1, 1), (1, 1), (1, 1)),
    Convolution(33, 3, (8, 8), (3, 3), (2, 2), (1, 1), (1, 1), last=True),
    Convolution(20, 40, (17, 18), (1, 1), (1, 1), (0, 0), (1, 1)),
    Convolution(40, 40, (9, 9), (3, 3), (1, 1), (1, 1), (1, 1), groups=40),
    Convolution(40, 40, (9, 9), (5, 5), (2, 2), (2, 2), (1, 1), groups=40, last=True),
    Convolution(24, 48, (20, 20), (3, 3), (1, 1), (2, 2), (2, 2), groups=24),
    Convolution(48, 96, (20, 1), (3, 1), (1, 1), (0, 0), (1, 1), groups=3, last=True),
    Convolution(16, 16, (300,), (3,), (1,), (1,), (1,), groups=16),
    Convolution(16, 8, (40,), (4,), (2,), (1,), (1,), transposed=True),
    Convolution(64, 20, (6, 5), (1, 1), (1, 1), (0, 0), (1, 1), last=True),
    Convolution(20, 64, (6, 5), (1, 1), (1, 1), (0, 0), (1, 1), transposed=True, last=True),
)


def conv_attack(m: ModuleType, power: int) -> None:
    """A bright plane with little on it, output gradients that sum to nothing."""
    r = torch.Generator().manual_seed(power)
    x = 1.0 + 2.0**-power * torch.randn((1, 6, 8, 8), generator=r)
    g = torch.randn((1, 5, 8, 8), generator=r)
    g -= g.double().mean((2, 3), keepdim=True).float()
    for padding in (0, 1):
        c = Convolution(6, 5, (8, 8), (3, 3), (1, 1), (padding, padding), (1, 1))
        size = 6 + 2 * padding
        y = g[..., :size, :size].contiguous()
        y -= y.double().mean((2, 3), keepdim=True).float()
        w = torch.zeros((5, 6, 3, 3), dtype=F64, requires_grad=True)
        (grad,) = torch.autograd.grad((c.forward(x.double(), w) * y).sum(), w)
        truth = grad.square().sum().view(1)
        native = is_native(m)
        n2, scale = m.conv_gram(x, y, *c.rule)
        within(n2, truth, scale, bounds.conv_gram(size**2, 5, 54, 9, native=native))
        n2 = m.conv_norms(x, y, *c.rule)
        within(n2, truth, scale, bounds.conv_norms(size**2, 270, native=native))
        above = n2.sqrt() + bounds.formed_norm(size**2, native=native) * scale
        assert bool((above * (1 + 1e-12) >= truth.sqrt()).all())


def summing(m: ModuleType) -> None:
    part = torch.tensor(
        [0.5, 1.5, 2.5, -0.5, -1.5, 0.49999997, 1e-45, -7.25, 2.0**40, 3e38, math.nan, -math.inf]
    )
    steps = torch.tensor([0, 2, 2, 0, -2, 0, 0, -7, 2**40, 0, 0, 0])
    total = torch.arange(12)
    m.accumulate(total, part, 1.0)
    assert total.tolist() == (torch.arange(12) + steps).tolist()
    total = torch.zeros(3, dtype=torch.int64)
    m.accumulate(total, torch.tensor([1.0, -3.0, 2.0**-31]), 2.0**30)
    m.accumulate(total, torch.tensor([1.0, 1.0, 2.0**-30]), 2.0**30)
    assert total.tolist() == [2**31, -(2**31), 1]
    r = torch.Generator().manual_seed(3)
    part = torch.randn(1003, generator=r)
    total = torch.randint(-(2**60), 2**60, (1003,), generator=r)
    expected = [t + round(p * 2.0**20) for t, p in zip(total.tolist(), part.tolist(), strict=True)]
    m.accumulate(total, part, 2.0**20)
    assert total.tolist() == expected
    out = torch.empty(1003)
    m.finish(total, 3.7e-13, out)
    oracle = torch.tensor([float(t) * 3.7e-13 for t in total.tolist()], dtype=F64).float()
    assert torch.equal(out, oracle)


def weighting(m: ModuleType) -> None:
    r = torch.Generator().manual_seed(4)
    for b, n in ((1, 1), (5, 7), (33, 5000)):
        formed, c = torch.randn((b, n), generator=r), torch.rand(b, generator=r)
        if b > 1:
            c[b // 2] = 0.0
            formed[b // 2] = torch.tensor([math.nan, math.inf, -math.inf, 1.0, 2.0]).repeat(1000)[
                :n
            ]
            c[0] = -0.0
            formed[0] = math.nan
        used = c != 0
        exact = c[used].double() @ formed[used].double()
        size = c[used].double().abs() @ formed[used].double().abs()
        error = (m.weighted_sum(formed, c).double() - exact).abs()
        assert bool((error <= bounds.weighted_sum(b) * size + 1e-300).all())


def factors(b: int, seed: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Factors, which records count, and both as float64."""
    r = torch.Generator().manual_seed(seed)
    c, keep = torch.rand(b, generator=r), torch.rand(b, generator=r) > 0.3
    return c, keep, torch.where(keep, c, 0.0).double()


def contraction(m: ModuleType, b: int, tokens: int, rows: int, columns: int, chunk: int) -> None:
    r = torch.Generator().manual_seed(b * tokens)
    g = torch.randn((b, tokens, rows), generator=r)
    x = torch.randn((b, tokens, columns), generator=r)
    c, keep, _ = factors(b, tokens)
    scaled = (g * c.view(-1, 1, 1)).double() * keep.view(-1, 1, 1)
    turned = (x * c.view(-1, 1, 1)).double() * keep.view(-1, 1, 1)  # either side may be scaled
    size = float((scaled.norm(dim=2) * x.double().norm(dim=2)).sum())
    exact = [torch.einsum("bti,btj->ij", *p) for p in ((scaled, x.double()), (g.double(), turned))]
    g[~keep], x[~keep] = math.nan, math.inf
    flat = g.reshape(-1, rows), x.reshape(-1, columns)
    made = m.contract(*flat, c, keep, chunk)
    error = min(float((made.double() - e).norm()) for e in exact)
    assert error <= bounds.contract(b * tokens, chunk) * size + 1e-30
    out = torch.full_like(made, torch.nan)
    assert m.contract(*flat, c, keep, chunk, out) is out
    assert torch.equal(out, made)


def long_contraction(m: ModuleType) -> None:
    """1 and many terms that float32 would lose one by one, beyond the chunk."""
    count, chunk = 1 << 15, 32
    x = torch.full((count, 1), 2.0**-12.6)
    x[0] = 1.0
    one = torch.ones(1)
    exact, e = float(x.double().square().sum()), bounds.contract(count, chunk)
    made = float(m.contract(x, x, one, one > 0, chunk))
    assert abs(made - exact) <= e * exact
    image, point = x.view(1, 1, count), ((1,), (1,), (0,), (1,))
    made = float(m.conv_contract(image, image, one, one > 0, chunk, *point))
    assert abs(made - exact) <= e * exact


def convolution_sum(m: ModuleType, case: Convolution, chunk: int, seed: int = 0) -> None:
    data = case.data(5, seed)
    if data is None:
        return
    x, g, oracle = data
    c, keep, both = factors(5, seed)
    exact = torch.tensordot(both, oracle, 1)
    size = float((case.scale(x, g) * both).sum())
    tokens = 5 * math.prod((x if case.transposed else g).shape[2:])
    g, x = g.clone(), x.clone()
    g[~keep], x[~keep] = math.nan, math.inf
    made = m.conv_contract(x, g, c, keep, chunk, *case.rule)
    assert made.shape == oracle.shape[1:]
    e = bounds.contract(tokens, chunk) + 2.0**-24  # and that of the factors
    assert float((made.double() - exact).norm()) <= e * size + 1e-13 * size, case


def embedding_sum(m: ModuleType) -> None:
    """Rounded once for each record and row: cancelling tokens of one index leave no trace."""
    r = torch.Generator().manual_seed(6)
    index = torch.randint(0, 7, (4, 24), generator=r)
    g = torch.randn((4, 24, 19), generator=r)
    g[:, 12:] = -g[:, :12] * (1 + 2.0**-18)
    index[:, 12:] = index[:, :12]
    index[1] = 5
    g[3, 0] = math.nan
    c, keep = torch.rand(4, generator=r), torch.tensor([True, True, True, False])
    for padding, inverse in ((None, 2.0**20), (5, 2.0**4)):
        expected = torch.zeros((7, 19), dtype=F64)
        for i in range(3):
            each = torch.zeros((7, 19), dtype=F64)
            used = index[i] != (-1 if padding is None else padding)
            each.index_add_(0, index[i][used], g[i][used].double())
            expected += (each * float(c[i]) * inverse).round()
        total = torch.full((7, 19), 3)
        m.embedding_add(total, index, g, c, keep, inverse, padding)
        assert torch.equal(total - 3, expected.long())


def affine(m: ModuleType) -> None:
    r = torch.Generator().manual_seed(8)

    def randn(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=r)

    for b, channels, groups, space in ((3, 6, 3, (5, 7)), (2, 64, 8, (33,)), (1, 40, 4, (9000,))):
        g, x = randn(b, channels, *space), randn(b, channels, *space)
        mean, rstd = randn(b, groups), randn(b, groups).abs()
        each = (b, channels, *(1,) * len(space))
        centre, scale = (
            t.double().repeat_interleave(channels // groups, 1).view(each) for t in (mean, rstd)
        )
        seen = (x.double() - centre) * scale
        oracle = [(g.double() * t).flatten(2).sum(2) for t in (seen, torch.ones_like(seen))]
        forms = [torch.contiguous_format] + [torch.channels_last] * (len(space) == 2)
        for form in forms:
            made = m.channel_affine(
                g.contiguous(memory_format=form), x.contiguous(memory_format=form), mean, rstd
            )
            for one, wanted in zip(made, oracle, strict=True):
                assert torch.allclose(one.double(), wanted, rtol=1e-5, atol=1e-4)
            sums = m.channel_sum(g.contiguous(memory_format=form))
            assert torch.allclose(sums.double(), oracle[1], rtol=1e-5, atol=1e-4)
        g, x = g.flatten(2).transpose(1, 2).contiguous(), x.flatten(2).transpose(1, 2).contiguous()
        mean, rstd = randn(b, g.shape[1]), randn(b, g.shape[1]).abs()
        seen = (x.double() - mean.double().unsqueeze(2)) * rstd.double().unsqueeze(2)
        oracle = [(g.double() * seen).sum(1), g.double().sum(1)]
        for one, wanted in zip(m.token_affine(g, x, mean, rstd), oracle, strict=True):
            assert torch.allclose(one.double(), wanted, rtol=1e-5, atol=2e-4)


def doors(m: ModuleType) -> dict[str, object]:
    """Per-record results of operands x (b, 6, 7, 7) and g (b, 20, 7, 7), by door."""

    def tokens(t: torch.Tensor) -> torch.Tensor:
        return t.flatten(2).transpose(1, 2)

    def stacked(pair: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
        return torch.stack(pair, 1)

    rule = ((3, 3), (1, 1), (1, 1), (1, 1))
    deep = torch.channels_last
    return {
        "row_squares": lambda x, g: m.row_squares(x.flatten(1)),
        "gram_pair": lambda x, g: stacked(m.gram_pair(tokens(g), tokens(x))),
        "precise": lambda x, g: stacked(m.gram_pair(tokens(g), tokens(x), True)),
        "formed_outer": lambda x, g: m.formed_outer(tokens(g), tokens(x)),
        "formed_sum": lambda x, g: m.formed_sum(tokens(g)),
        "embedding": lambda x, g: stacked(
            m.embedding_gram((x[:, 0].flatten(1).nan_to_num() * 3).long(), tokens(g), 0)
        ),
        "conv_formed": lambda x, g: m.conv_formed(x, g, *rule),
        "conv_norms": lambda x, g: m.conv_norms(x, g, *rule),
        "conv_inputs": lambda x, g: m.conv_norms(x.repeat(1, 4, 1, 1), g[:, :3], *rule),
        "conv_last": lambda x, g: m.conv_norms(
            x.contiguous(memory_format=deep), g.contiguous(memory_format=deep), *rule
        ),
        "conv_point": lambda x, g: m.conv_formed(
            x.repeat(1, 8, 1, 1).contiguous(memory_format=deep),
            g.contiguous(memory_format=deep),
            *((1, 1), (1, 1), (0, 0), (1, 1)),
        ),
        "conv_scale": lambda x, g: m.conv_scale(x, g, *rule),
        "conv_gram": lambda x, g: stacked(m.conv_gram(x, g, *rule)),
        "depthwise": lambda x, g: m.conv_norms(x, g[:, :6], *rule, 6),
        "depthwise_scale": lambda x, g: m.conv_scale(x, g[:, :6], *rule, 6),
        "channel_affine": lambda x, g: torch.cat(
            m.channel_affine(x, x.flip(1), x[:, :3, 0, 0], x[:, :3, 0, 1]), 1
        ),
        "last_affine": lambda x, g: torch.cat(
            m.channel_affine(
                x.contiguous(memory_format=deep),
                x.contiguous(memory_format=deep),
                x[:, :3, 0, 0],
                x[:, :3, 0, 1],
            ),
            1,
        ),
        "token_affine": lambda x, g: torch.cat(
            m.token_affine(tokens(g), tokens(g).flip(2), g[:, 0].flatten(1), g[:, 1].flatten(1)), 1
        ),
        "channel_sum": lambda x, g: m.channel_sum(g),
    }


def same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    return a.numpy().tobytes() == b.numpy().tobytes()


def slots(m: ModuleType) -> None:
    """P13: no record's bits depend on its slot, on the batch's size or on the others."""
    r = torch.Generator().manual_seed(5)
    b = 9
    x, g = torch.randn((b, 6, 7, 7), generator=r), torch.randn((b, 20, 7, 7), generator=r)
    order = torch.randperm(b, generator=r)
    wild_x, wild_g = x.clone(), g.clone()
    for i, bad in enumerate((1e30, math.nan, math.inf, 1e-42)):
        wild_x[i] *= bad
        wild_g[8 - i] *= bad
    # The same values at an address that is not a multiple of a vector.
    shifted_x = torch.cat((torch.zeros(3), x.flatten()))[3:].view(x.shape)
    shifted_g = torch.cat((torch.zeros(5), g.flatten()))[5:].view(g.shape)
    for name, door in doors(m).items():
        assert callable(door)
        base = door(x, g)
        assert same_bits(door(x[order], g[order]), base[order].contiguous()), name
        assert same_bits(door(wild_x, wild_g)[4], base[4].contiguous()), name
        assert same_bits(door(shifted_x, shifted_g), base), name
        for i in range(b):
            alone = door(x[i : i + 1], g[i : i + 1])
            assert same_bits(alone, base[i : i + 1].contiguous()), name


KERNELS = {"compiled": compiled, "twins": twins}
