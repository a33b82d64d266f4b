"""Ways from the operands of a contraction to norms of units and to the weighted sum.

See :mod:`casemate.engine.sites` for what a site is and for the bounds. Each function here makes the
site of one kind of contraction from functions of the operands.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final, TypeAlias

import torch

from casemate.engine import kernels
from casemate.engine.kernels import bounds

Tensor: TypeAlias = torch.Tensor
Env: TypeAlias = dict[str, Any]
Make: TypeAlias = Callable[[Env], Tensor]
Total: TypeAlias = Callable[[Env, Tensor, Tensor], Tensor]
Add: TypeAlias = Callable[[Tensor, int, Env, Tensor, Tensor, float], None]
ROUNDING: Final = 2.0**-7
# S / n of honest units, above which the rounding limit may bind: one token has 1 (measured: up to
# 12 of the ways that sum over tokens, tests/unit/engine/test_sites.py).
HONEST: Final = 12.0
CHUNKS: Final = (256, 128, 64, 32)


@dataclass(frozen=True, slots=True)
class Shape:
    """rows of a microbatch, rows of a unit; ``rows`` is a multiple of ``per_unit``."""

    rows: int
    per_unit: int

    @property
    def units(self) -> int:
        return self.rows // self.per_unit

    def merged(self, rows: Tensor) -> Tensor:
        """(rows, n) formed gradients as those of units: sums of per_unit rows."""
        if self.per_unit == 1:
            return rows
        return kernels.formed_sum(rows.reshape(self.units, self.per_unit, -1))

    def of_units(self, rows: Tensor) -> Tensor:
        """What is the same for all rows of a unit, once."""
        return rows.view(self.units, self.per_unit)[:, 0].contiguous()


@dataclass(frozen=True, slots=True)
class Norm:
    """Squared norms of units (u,), float64, and S (u,) where it is not the norm itself."""

    squared: Tensor
    spread: Tensor | None = None


@dataclass(frozen=True, slots=True)
class Way:
    """One way to a site's norms.

    gamma: |n2 - n^2| <= gamma S^2. error: what goes into the sum is off by at most
    error * sum_i c_i S_i in norm. scaled: whether operands are multiplied by c in float32, which
    moves a contribution by 2^-24 c S. bytes: what the way keeps until the sum. formed: the
    gradients that it takes its norm from, if nothing else: they may be formed before.
    """

    name: str
    norm: Callable[[Env], Norm]
    gamma: float
    error: float
    scaled: bool = False
    bytes: int = 0
    formed: tuple[Formed, ...] = ()


class Buffer:
    """Memory for formed gradients, the same each time: fresh pages cost more than the sums; none
    while a step is noted as a graph, which has no memory."""

    def __init__(self, *shape: int) -> None:
        self.shape = shape
        self.held: Tensor | None = None

    def __call__(self) -> Tensor | None:
        if kernels.noting():
            return None
        if self.held is None:
            self.held = torch.empty(self.shape)
        return self.held


@dataclass(slots=True)
class Site:
    """What one parameter's gradient is made of.

    totals: S value -> function of (env, weights of rows (b,) float32, which rows count) giving its
    weighted sum. adds: for some of them also a function that adds it to int64 grid steps, of
    (steps, flat, some of its entries; the first of these; env; weights; rows; 1 / step), rounding
    each unit by itself. parts: the sites that this one is put together from.
    """

    name: str
    ways: list[Way]
    totals: dict[str, Total]
    adds: dict[str, Add] = field(default_factory=dict)
    rooms: tuple[Buffer, ...] = ()
    parts: Sequence[Site] = ()
    way: Way = field(init=False)

    def settle(self, way: Way) -> None:
        """Take ``way``; memory that only others need goes back."""
        self.way = way
        if not way.bytes:
            for room in self.rooms:
                room.held = None


def chunk_for(units: int, terms: int) -> int:
    """How many terms to add in float32 at a time, so that honest units keep their factors: the most
    with units * error * S / n <= ROUNDING, else the one with the least error."""
    kappa = 1.1 if terms <= units else HONEST
    for chunk in CHUNKS:
        if units * bounds.contract(terms, chunk) * kappa <= ROUNDING:
            return chunk
    return min(CHUNKS, key=lambda c: bounds.contract(terms, c))


class Formed:
    """Gradients of units formed once, (u, n), and kept for their weighted sum.

    What is formed is the contribution: its norm is exact up to its squares' sum.
    """

    def __init__(self, make: Make, size: int, shape: Shape, label: str = "formed") -> None:
        self.key, self.make, self.size = f"{id(self)}!", make, size
        self.shape, self.label = shape, label

    def norm(self, env: Env) -> Norm:
        if self.key not in env:
            env[self.key] = self.make(env)
        return Norm(kernels.row_squares(env[self.key]))

    def way(self) -> Way:
        return Way(
            self.label,
            self.norm,
            bounds.row_squares(self.size),
            bounds.weighted_sum(self.shape.units),
            bytes=4 * self.shape.units * self.size,
            formed=(self,),
        )

    def or_else(self, other: Total | None, size: Sequence[int]) -> Total:
        """The weighted sum of what was formed, or ``other`` where nothing was."""

        def total(env: Env, weights: Tensor, keep: Tensor) -> Tensor:
            made = env.pop(self.key, None)
            if made is None:
                assert other is not None
                return other(env, weights, keep)
            c = self.shape.of_units(weights)
            return kernels.weighted_sum(made, c).reshape(tuple(size))

        return total


def nothing(size: Sequence[int]) -> Total:
    """The sum of an S value whose contributions are counted at another."""
    return lambda env, weights, keep: torch.zeros(tuple(size))


def formed_site(name: str, names: Sequence[str], make: Make, size: Sequence[int],
                shape: Shape, label: str = "formed") -> Site:  # fmt: skip
    """``make`` gives the units' gradients over all S values ``names``, which add up."""
    formed = Formed(make, math.prod(size), shape, label)
    totals: dict[str, Total] = {names[0]: formed.or_else(None, size)}
    totals |= {c: nothing(size) for c in names[1:]}
    return Site(name, [formed.way()], totals)


def outer_site(
    name: str,
    names: Sequence[str],
    both: Callable[[Env], tuple[Tensor, Tensor]],
    count: int,
    sizes: tuple[int, int],
    shape: Shape,
) -> Site:
    """Sum over units and ``count`` tokens of g x^T, from g (u, count, m), x (u, count, n)."""
    m, n = sizes
    native = kernels.native()
    chunk = chunk_for(shape.units, count * shape.units)
    error = bounds.contract(count * shape.units, chunk)
    ways: list[Way] = []

    def total(env: Env, weights: Tensor, keep: Tensor) -> Tensor:
        g, x = both(env)
        c, units = shape.of_units(weights), shape.of_units(keep)
        return kernels.contract(g.reshape(-1, m), x.reshape(-1, n), c, units, chunk)

    if count == 1:

        def rank_one(env: Env) -> Norm:
            g, x = both(env)
            g2, x2 = kernels.row_squares(g[:, 0]), kernels.row_squares(x[:, 0])
            # S with a floor for what underflow does to c g: see bounds.
            floor = bounds.UNDERFLOW * (n * g2 + m * x2)
            return Norm(g2 * x2, (g2 * x2 + floor).sqrt())

        ways.append(Way("rank-one", rank_one, bounds.rank_one(m, n), error, True))
    else:
        for precise in (True, False):
            # Twice the time of a small product is nothing.
            if not precise and shape.units * count * count * (m + n) < 2e7:
                continue

            def gram(env: Env, precise: bool = precise) -> Norm:
                return Norm(*kernels.gram_pair(*both(env), precise))

            gamma = bounds.gram_pair(count, m, n, precise=precise, native=native)
            ways.append(Way("gram" if not precise else "gram64", gram, gamma, error, True))
    room = Buffer(shape.units, m * n)
    if count == 1:
        totals: dict[str, Total] = {names[0]: total}
    else:
        formed = Formed(lambda env: kernels.formed_outer(*both(env), out=room()), m * n, shape)
        ways.append(formed.way())
        totals = {names[0]: formed.or_else(total, sizes)}
    totals |= {c: nothing(sizes) for c in names[1:]}
    return Site(name, ways, totals, rooms=(room,))


@dataclass(frozen=True, slots=True)
class Window:
    """A convolution's geometry, as the kernels take it, and its sizes: positions of the output,
    channels in and out of the sum, groups."""

    args: tuple[Any, ...]
    weight: tuple[int, ...]
    positions: int
    channels: int
    outputs: int
    groups: int

    @property
    def taps(self) -> int:
        return math.prod(self.weight[2:])


def convolution_site(
    name: str, c: str, x_name: str, g_name: str, window: Window, shape: Shape
) -> Site:
    args, size, positions = window.args, math.prod(window.weight), window.positions
    kernel, stride, padding, dilation, groups, transposed = args
    native = kernels.native()
    room = Buffer(shape.rows, *window.weight)

    def make(env: Env) -> Tensor:
        made = kernels.conv_formed(
            env[x_name], env[g_name], kernel, stride, padding, dilation, groups, transposed, room()
        )
        return shape.merged(made.reshape(shape.rows, -1))

    def direct(env: Env) -> Norm:
        x, g = env[x_name], env[g_name]
        return Norm(kernels.conv_norms(x, g, *args), kernels.conv_scale(x, g, *args))

    chunk = chunk_for(shape.units, positions * shape.rows)
    error = bounds.contract(positions * shape.rows, chunk)

    def total(env: Env, weights: Tensor, keep: Tensor) -> Tensor:
        return kernels.conv_contract(env[x_name], env[g_name], weights, keep, chunk, *args)

    formed = Formed(make, size, shape)
    ways = [formed.way()]
    depthwise = window.groups == window.channels == window.outputs > 1
    if shape.per_unit == 1 and not depthwise:
        gamma = bounds.conv_norms(positions, size, native=native)
        ways.append(Way("direct", direct, gamma, error, True))
        for precise in (False, True) if window.groups == 1 and positions <= 512 else ():

            def gram(env: Env, precise: bool = precise) -> Norm:
                return Norm(*kernels.conv_gram(env[x_name], env[g_name], *args, precise))

            sizes = (window.outputs, window.channels * window.taps, window.taps)
            gamma = bounds.conv_gram(positions, *sizes, precise=precise, native=native)
            ways.append(Way("gram64" if precise else "gram", gram, gamma, error, True))
    return Site(name, ways, {c: formed.or_else(total, window.weight)}, rooms=(room,))


def embedding_site(
    name: str,
    names: Sequence[str],
    both: Callable[[Env], tuple[Tensor, Tensor]],
    count: int,
    table: tuple[int, int],
    padding: int,
    shape: Shape,
) -> Site:
    """Rows of one index are added up in float64 for the norm and for the sum alike, so the norm is
    that of what is added but for float64's rounding; on the grid units do not touch each other.
    ``both`` gives index (u, count), g (u, count, width)."""
    width = table[1]
    none = padding if padding >= 0 else None

    def norm(env: Env) -> Norm:
        return Norm(*kernels.embedding_gram(*both(env), none))

    def total(env: Env, weights: Tensor, keep: Tensor) -> Tensor:
        index, g = both(env)
        c = torch.where(shape.of_units(keep), shape.of_units(weights), 0.0).double()
        scaled = torch.where(c.view(-1, 1, 1) != 0, g.double() * c.view(-1, 1, 1), 0.0)
        if none is not None:
            scaled = torch.where((index != none).unsqueeze(2), scaled, 0.0)
        made = torch.zeros(table, dtype=torch.float64)
        return made.index_add_(0, index.reshape(-1), scaled.reshape(-1, width)).float()

    def add(
        steps: Tensor, first: int, env: Env, weights: Tensor, keep: Tensor, inverse: float
    ) -> None:
        c, units = shape.of_units(weights), shape.of_units(keep)
        index, g = both(env)
        top, bottom = first // width, -(-(first + len(steps)) // width)
        if len(steps) == math.prod(table):
            kernels.embedding_add(steps.view(table), index, g, c, units, inverse, none)
            return
        inside = (index >= top) & (index < bottom) & (index != padding)
        some = torch.where(inside, index - top, -1)
        whole = torch.zeros(bottom - top, width, dtype=torch.int64)  # rows, some of which are cut
        kernels.embedding_add(whole, some, g, c, units, inverse, -1)
        steps += whole.view(-1)[first - top * width :][: len(steps)]

    # Twice: for the squares, and for the rounding of what is added.
    gamma = 2.0 * bounds.embedding_gram(count, width)
    way = Way("embedding", norm, gamma, bounds.weighted_sum(count * shape.units))
    totals: dict[str, Total] = {names[0]: total} | {c: nothing(table) for c in names[1:]}
    return Site(name, [way], totals, {names[0]: add})


def _one_by_one(of: Callable[..., Sequence[Tensor]], *operands: Tensor) -> list[Tensor]:
    """``of`` of one unit a call, in the same memory each time."""
    held = [torch.empty_like(t[:1], memory_format=torch.contiguous_format) for t in operands]
    made = []
    for i in range(len(operands[0])):
        for one, t in zip(held, operands, strict=True):
            one.copy_(t[i : i + 1])
        made.append([t.clone() for t in of(*held)])
    return [torch.cat(parts) for parts in zip(*made, strict=True)]


def tied_site(
    head: Site,
    table: Site,
    products: Callable[[Env], tuple[Tensor, Tensor]],
    lookups: Callable[[Env], tuple[Tensor, Tensor]],
    counts: tuple[int, int],
    sizes: tuple[int, int],
    padding: int,
    turned: bool,
    shape: Shape,
) -> Site:
    """A tensor (rows, width) that is a factor of products and a table of embeddings: A + B with
    A = sum_t g_t x_t^T and B = sum_s 1_{index_s} e_s^T, ``counts`` tokens each.

    |A + B|^2 = |A|^2 + |B|^2 + 2 <A, B>, <A, B> = sum_{t,s} g_t[index_s] (x_t . e_s), in float64
    and off by at most gamma(width + counts) S_A S_B; S = S_A + S_B. What is added is A's sum and
    B's, each with its own error, and rounded once more. turned: the products' left side has the
    width. head, table: the sites of A and of B.
    """
    rows, width = sizes
    (of_table,) = table.ways
    m, n = (width, rows) if turned else (rows, width)

    def inner(env: Env) -> Tensor:
        g, x = products(env)
        if turned:
            g, x = x, g
        index, e = lookups(env)

        def of(g: Tensor, x: Tensor, index: Tensor, e: Tensor) -> list[Tensor]:
            dots = x[0].double() @ e[0].double().t()
            pairs = dots * g[0].index_select(1, index[0]).double()
            return [torch.where(index[0] != padding, pairs, 0.0).sum().reshape(1)]

        return _one_by_one(of, g, x, index.long(), e)[0]

    def alone(env: Env) -> Norm:
        def of(g: Tensor, x: Tensor) -> Sequence[Tensor]:
            return kernels.gram_pair(g, x, True)

        return Norm(*_one_by_one(of, *products(env)))

    def both(norm: Callable[[Env], Norm]) -> Callable[[Env], Norm]:
        def of(env: Env) -> Norm:
            a, b = norm(env), of_table.norm(env)
            assert a.spread is not None
            assert b.spread is not None
            return Norm(a.squared + b.squared + 2.0 * inner(env), a.spread + b.spread)

        return of

    crossed = bounds.gamma(width + counts[0] * counts[1] + 8, bounds.U64)
    precise = bounds.gram_pair(counts[0], m, n, precise=True, native=kernels.native())
    ways = [(f"{w.name}+tied", w.norm, w.gamma, w) for w in head.ways if not w.bytes]
    made = [
        Way(name, both(norm), max(gamma, of_table.gamma, crossed) + crossed,
            max(w.error, of_table.error) * (1.0 + bounds.U32) + 2.0 * bounds.U32, True)
        for name, norm, gamma, w in [*ways, ("loop", alone, precise, ways[0][3])]
    ]  # fmt: skip
    return Site(head.name, made, {**head.totals, **table.totals})


def apart_site(name: str, sites: Sequence[Site]) -> Site:
    """Sites that fall on different entries of the parameter: squared norms add."""

    def norm(env: Env) -> Norm:
        squared, spread = [], []
        for site in sites:
            one = site.way.norm(env)
            squared.append(one.squared)
            spread.append(one.squared if one.spread is None else one.spread.square())
        return Norm(sum(squared[1:], squared[0]), sum(spread[1:], spread[0]).sqrt())

    chosen = [s.way for s in sites]
    way = Way(
        "+".join(w.name for w in chosen),
        norm,
        max(w.gamma for w in chosen),
        max(w.error for w in chosen),
        any(w.scaled for w in chosen),
        sum(w.bytes for w in chosen),
        tuple(f for w in chosen for f in w.formed) if all(w.formed for w in chosen) else (),
    )
    totals: Mapping[str, Total] = {k: t for s in sites for k, t in s.totals.items()}
    return Site(name, [way], dict(totals), parts=sites)
