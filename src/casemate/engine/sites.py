"""Per-record norms and weighted sums where the joint graph sums over records.

A *contraction* is a node whose output is S by itself: sum_i A_i over the rows of a microbatch. Its
*form* knows how to get tokens or formed gradients out of the node's operands. A *site* is what one
parameter's gradient is made of: one contraction or several that merge. Each site has ways to its
per-unit norm; the planner times those that are admitted and takes the quickest:

========  =========================================================================================
rank-one  one token: the product of two norms
gram      Gram matrices of tokens (float32 or float64), masked ones for embeddings, those of the
          padded input for convolutions
direct    a convolution's gradients formed in cache, never written
formed    the gradients are formed, and their weighted sum is the contraction
loop      as formed, one record at a time by the very operation of the graph
========  =========================================================================================

The bound (rule P3). Let v_i be the exact sum over tokens of c_i g_t x_t^T of the float32 operands
that the second contraction is given, n_i the norm of v_i / c_i, S_i = sum_t |g_t||x_t|. A way gives
n2 and gamma with |n2 - n_i^2| <= gamma S_i^2 (:mod:`casemate.engine.kernels.bounds`), or, for formed
gradients, n_i itself up to its squares' rounding. Scaling g by c_i in float32 moves v_i by at most
2^-24 c_i S_i. :func:`limits` turns both into the c_i that keep |v_i| <= C.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Final, TypeAlias

import torch

from casemate.engine import kernels, products
from casemate.engine.kernels import bounds
from casemate.engine.nodes import Runner
from casemate.graph import joint as graph_joint
from casemate.graph.joint import Proved
from casemate.graph.model import Node
from casemate.graph.ops import Value

Tensor: TypeAlias = torch.Tensor
Env: TypeAlias = dict[str, Any]
_U32: Final = 2.0**-24


@dataclass(frozen=True, slots=True)
class Shape:
    """rows of a microbatch, rows of a unit; ``rows`` is a multiple of ``per_unit``."""

    rows: int
    per_unit: int

    @property
    def units(self) -> int:
        return self.rows // self.per_unit


@dataclass(frozen=True, slots=True)
class Norm:
    """Squared norms of units (u,), float64, and S (u,) where it is not the norm itself."""

    squared: Tensor
    spread: Tensor | None = None


@dataclass(frozen=True, slots=True)
class Way:
    """One way to a site's norms. ``gamma`` as above; ``error``: the contraction of what it leaves
    is off by at most error * sum_i c_i S_i in norm. ``bytes``: what it keeps until then."""

    name: str
    norm: Callable[[Env], Norm]
    gamma: float
    error: float
    bytes: int = 0


@dataclass(slots=True)
class Site:
    """What one parameter's gradient is made of; ``total`` gives each contraction's weighted sum.

    totals: S value -> function of (env, weights of rows (b,) float32, which rows count) giving it.
    """

    name: str
    ways: list[Way]
    totals: dict[str, Callable[[Env, Tensor, Tensor], Tensor]]
    way: Way = field(init=False)


# --- operands -------------------------------------------------------------------------------------


def tokens(t: Tensor, v: Value, shape: Shape, last: int) -> Tensor:
    """A two-axis B value, batch (and tokens) on one axis, as (units, tokens, features)."""
    assert v.batch is not None
    if v.batch.axis != 1 - last:
        raise ValueError("the batch is not where tokens are")
    t = t if last == 1 else t.t()
    outer, inner = v.batch.outer, v.batch.inner
    width = t.shape[1]
    if outer > 1:
        t = t.reshape(outer, shape.rows, inner, width).transpose(0, 1)
    return t.reshape(shape.units, shape.per_unit * outer * inner, width)


def _rows(weights: Tensor, per_row: int) -> Tensor:
    return weights if per_row == 1 else weights.repeat_interleave(per_row)


@dataclass(frozen=True, slots=True)
class Outer:
    """mm over the batch: sum over records and tokens of g x^T."""

    name: str
    left: str
    right: str
    left_value: Value
    right_value: Value
    shape: Shape

    @property
    def count(self) -> int:
        assert self.left_value.batch is not None
        return self.left_value.batch.outer * self.left_value.batch.inner

    @property
    def sizes(self) -> tuple[int, int]:
        return self.left_value.dims[0], self.right_value.dims[1]

    def pair(self, env: Env) -> tuple[Tensor, Tensor]:
        return (
            tokens(env[self.left], self.left_value, self.shape, 0),
            tokens(env[self.right], self.right_value, self.shape, 1),
        )

    def total(self, env: Env, weights: Tensor, keep: Tensor) -> Tensor:
        g, x = self.pair(env)
        m, n = self.sizes
        each = _per_token(g, weights, keep, self.shape)
        # The smaller operand is scaled.
        if m <= n:
            g = kernels.scale_rows(g.reshape(-1, m), *each)
        else:
            x = kernels.scale_rows(x.reshape(-1, n), *each)
        return products.product(g.reshape(-1, m).t(), x.reshape(-1, n))


def _per_token(t: Tensor, weights: Tensor, keep: Tensor, shape: Shape) -> tuple[Tensor, Tensor]:
    """Weights of rows as weights of the tokens of (units, tokens, features)."""
    count = t.shape[0] * t.shape[1] // shape.rows
    if count == 1:
        return weights, keep
    return weights.repeat_interleave(count), keep.repeat_interleave(count)


def _outer_site(name: str, forms: Sequence[Outer], shape: Shape) -> Site:
    m, n = forms[0].sizes
    count = sum(f.count for f in forms) * shape.per_unit
    native = kernels.native()

    def both(env: Env) -> tuple[Tensor, Tensor]:
        pairs = [f.pair(env) for f in forms]
        if len(pairs) == 1:
            return pairs[0]
        return torch.cat([p[0] for p in pairs], 1), torch.cat([p[1] for p in pairs], 1)

    error = _sum_error(max(f.count for f in forms) * shape.rows, len(forms))
    ways: list[Way] = []
    if count == 1:

        def rank_one(env: Env) -> Norm:
            g, x = both(env)
            return Norm(kernels.rank_one(g[:, 0], x[:, 0]))

        ways.append(Way("rank-one", rank_one, bounds.rank_one(m, n), error))
    else:
        for precise in (True, False):
            # Twice the time of a small product is nothing.
            if not precise and shape.units * count * count * (m + n) < 2e7:
                continue

            def gram(env: Env, precise: bool = precise) -> Norm:
                return Norm(*kernels.gram_pair(*both(env), precise))

            gamma = bounds.gram_pair(count, m, n, precise=precise, native=native)
            ways.append(Way("gram" if not precise else "gram64", gram, gamma, error))
    totals = {f.name: f.total for f in forms}
    if len(forms) == 1 and count > 1:
        formed = _Formed(forms[0].name, lambda env: kernels.formed_outer(*both(env)), m * n, shape)
        ways.append(formed.way())
        totals[forms[0].name] = formed.or_else(forms[0].total, (m, n))
    return Site(name, ways, totals)


def _sum_error(terms: int, parts: int = 1) -> float:
    """Of a float32 sum of that many products in any order (Higham, section 3.1), in ``parts``."""
    return bounds.gamma(terms + parts, _U32)


class _Formed:
    """Gradients formed once and kept for their weighted sum; exact as contributions."""

    def __init__(
        self,
        name: str,
        make: Callable[[Env], Tensor],
        size: int,
        shape: Shape,
        label: str = "formed",
    ) -> None:
        self.key, self.make, self.size, self.shape, self.label = (
            f"{name}!",
            make,
            size,
            shape,
            label,
        )

    def norm(self, env: Env) -> Norm:
        made = self.make(env)
        env[self.key] = made
        return Norm(kernels.row_squares(made))

    def way(self) -> Way:
        gamma = bounds.row_squares(self.size)
        error = bounds.weighted_sum(self.shape.units)
        return Way(self.label, self.norm, gamma, error, 4 * self.shape.units * self.size)

    def or_else(
        self, other: Callable[[Env, Tensor, Tensor], Tensor] | None, size: Sequence[int]
    ) -> Callable[[Env, Tensor, Tensor], Tensor]:
        def total(env: Env, weights: Tensor, keep: Tensor) -> Tensor:
            made = env.pop(self.key, None)
            if made is None:
                assert other is not None
                return other(env, weights, keep)
            c = weights.reshape(self.shape.units, -1)[:, 0]
            return kernels.weighted_sum(made, c).reshape(tuple(size))

        return total


# --- the planner ----------------------------------------------------------------------------------


class Planner:
    """Sites of a proved joint graph at one microbatch; see the module."""

    def __init__(self, proved: Proved, runner: Runner, shape: Shape) -> None:
        self.proved, self.runner, self.shape = proved, runner, shape
        self.values = proved.values

    def sites(self) -> list[Site]:
        found = []
        for i, gradient in enumerate(self.proved.joint.gradients):
            if gradient is not None:
                found.append(self._site(f"p{i}", gradient))
        return found

    def _terms(self, name: str) -> list[tuple[str, tuple[Node, ...]]] | None:
        """Contractions below an S value, each with the nodes from it to ``name``; ``None`` where
        the value is no plain sum of such chains."""
        if name in self.proved.contractions:
            return [(name, ())]
        node = self.proved.linear[name]
        call = graph_joint.bound(node, self.values)
        sums = [a for a in self._refs(node) if self.values[a].summed]
        if graph_joint.entry(node).linear == "add":
            if node.op != "aten.add.Tensor" or call["alpha"] != 1:
                return None
            parts = [self._terms(a) for a in sums]
            if any(p is None for p in parts):
                return None
            return [(c, (*chain, node)) for p in parts if p for c, chain in p]
        if len(sums) != 1:
            return None
        below = self._terms(sums[0])
        return None if below is None else [(c, (*chain, node)) for c, chain in below]

    @staticmethod
    def _refs(node: Node) -> list[str]:
        from casemate.engine.program import uses

        return uses(node)

    def _site(self, name: str, gradient: str) -> Site:
        terms = self._terms(gradient)
        if terms is not None:
            made = self._known(name, gradient, terms)
            if made is not None:
                return made
        return self._whole(name, gradient)

    def _known(
        self, name: str, gradient: str, terms: Sequence[tuple[str, tuple[Node, ...]]]
    ) -> Site | None:
        kinds = {graph_joint.entry(self.proved.contractions[c]).site for c, _ in terms}
        if len(terms) > 1 or not all(_turns_only(chain) for _, chain in terms):
            places = [self.runner.placement(c, chain) for c, chain in terms]
            if any(p is None for p in places):
                return None
            same = all(torch.equal(places[0], p) for p in places[1:] if p is not None)  # type: ignore[arg-type]
            if len(terms) > 1 and not same:
                return self._apart(name, terms, places)
        if len(kinds) != 1:
            return None
        kind = kinds.pop()
        names = [c for c, _ in terms]
        return _KINDS.get(kind, Planner._looped)(self, name, names)

    def _apart(
        self, name: str, terms: Sequence[tuple[str, tuple[Node, ...]]], places: Sequence[Any]
    ) -> Site | None:
        """Terms that fall on different entries of the parameter: squared norms add."""
        everything = torch.cat([p.reshape(-1) for p in places])
        if everything.unique().numel() != everything.numel():
            return None
        parts = [self._known(name, c, [(c, ())]) for c, _ in terms]
        if any(p is None for p in parts):
            return None
        sites = [p for p in parts if p is not None]
        for site in sites:
            self.choose(site)

        def norm(env: Env) -> Norm:
            squared, spread = None, None
            for site in sites:
                n = site.way.norm(env)
                s2 = n.squared if n.spread is None else n.spread.square()
                squared = n.squared if squared is None else squared + n.squared
                spread = s2 if spread is None else spread + s2
            assert squared is not None and spread is not None
            return Norm(squared, spread.sqrt())

        way = Way(
            "+".join(s.way.name for s in sites),
            norm,
            max(s.way.gamma for s in sites),
            max(s.way.error for s in sites),
            sum(s.way.bytes for s in sites),
        )
        return Site(name, [way], {k: t for s in sites for k, t in s.totals.items()})

    # One function for each kind of contraction: (planner, site's name, S values) -> Site | None.

    def _outer(self, name: str, names: Sequence[str]) -> Site | None:
        forms = []
        for c in names:
            node = self.proved.contractions[c]
            left, right = self._refs(node)
            a, b = self.values[left], self.values[right]
            if a.rank != 2:
                return self._looped(name, names)
            forms.append(Outer(c, left, right, a, b, self.shape))
        return _outer_site(name, forms, self.shape)

    def _sum(self, name: str, names: Sequence[str]) -> Site | None:
        if len(names) != 1:
            return self._looped(name, names)
        node = self.proved.contractions[names[0]]
        (source,) = self._refs(node)
        value = self.values[source]
        call = graph_joint.bound(node, self.values)
        axes = call.axes(call.args.get("dim"), value.rank)
        out = self.values[names[0]].dims
        shape = self.shape
        assert value.batch is not None
        batch = value.batch
        if batch.axis == 0 and batch.outer == 1 and value.rank == 2 and axes == (0,):

            def make(env: Env) -> Tensor:
                return kernels.formed_sum(tokens(env[source], value, shape, 1))

        else:
            split, rest = _unfold_axes(value, axes)

            def make(env: Env) -> Tensor:
                t = env[source]
                sizes = [*t.shape[: batch.axis], batch.outer, shape.rows, batch.inner,
                         *t.shape[batch.axis + 1 :]]  # fmt: skip
                t = t.reshape(sizes)
                t = t.movedim(split, 0)
                t = t.sum(rest) if rest else t
                return t.reshape(shape.units, shape.per_unit, -1).sum(1)

        formed = _Formed(names[0], make, math.prod(out), shape)
        return Site(name, [formed.way()], {names[0]: formed.or_else(None, out)})

    def _embedding(self, name: str, names: Sequence[str]) -> Site | None:
        shape = self.shape
        parts = []
        for c in names:
            node = self.proved.contractions[c]
            refs = self._refs(node)
            call = graph_joint.bound(node, self.values)
            g, index = self.values[refs[0]], self.values[refs[1]]
            if g.batch is None or index.batch is None or g.batch.axis != 0 or index.batch.axis != 0:
                return self._looped(name, names)
            if g.batch.outer != 1 or index.batch.outer != 1:
                return self._looped(name, names)
            parts.append((c, refs[0], refs[1], call["num_weights"], call["padding_idx"]))
        if len({p[3:] for p in parts}) != 1:
            return self._looped(name, names)
        rows, padding = parts[0][3:]
        width = self.values[parts[0][1]].dims[-1]
        count = shape.per_unit * sum(self.values[p[2]].numel for p in parts)

        def operands(env: Env) -> tuple[Tensor, Tensor]:
            index = [env[p[2]].reshape(shape.units, -1) for p in parts]
            g = [env[p[1]].reshape(shape.units, -1, width) for p in parts]
            return (index[0], g[0]) if len(parts) == 1 else (torch.cat(index, 1), torch.cat(g, 1))

        def norm(env: Env) -> Norm:
            index, g = operands(env)
            return Norm(*kernels.embedding_gram(index, g, padding if padding >= 0 else None))

        def total(part: tuple[str, str, str, int, int]) -> Callable[[Env, Tensor, Tensor], Tensor]:
            def run(env: Env, weights: Tensor, keep: Tensor) -> Tensor:
                g = env[part[1]].reshape(shape.units, -1, width)
                each = _per_token(g, weights, keep, shape)
                scaled = kernels.scale_rows(g.reshape(-1, width), *each)
                index = env[part[2]].reshape(-1)
                return torch.ops.aten.embedding_dense_backward(scaled, index, rows, padding, False)

            return run

        error = _sum_error(count * shape.units, len(parts))
        way = Way("gram", norm, bounds.embedding_gram(count, width), error)
        return Site(name, [way], {p[0]: total(p) for p in parts})

    def _convolution(self, name: str, names: Sequence[str]) -> Site | None:
        c = names[0]
        node = self.proved.contractions[c]
        if len(names) != 1 or not c.endswith(".1"):
            return self._bias(name, names)
        refs = self._refs(node)
        call = graph_joint.bound(node, self.values)
        g_name, x_name = refs[0], refs[1]
        w = self.values[c].dims
        args = (
            w[2:], call["stride"], call["padding"], call["dilation"], call["groups"],
            bool(call["transposed"]),
        )  # fmt: skip
        if any(call["output_padding"]) and not call["transposed"]:
            return self._looped(name, names)
        shape = self.shape
        x, g = self.values[x_name], self.values[g_name]
        rank = len(w) - 2
        args = tuple(_spread(a, rank) if isinstance(a, tuple) else a for a in args)  # type: ignore[assignment]
        positions = math.prod(x.dims[2:] if call["transposed"] else g.dims[2:])
        size, taps = math.prod(w), math.prod(w[2:])
        channels = (g if call["transposed"] else x).dims[1]
        out_channels = (x if call["transposed"] else g).dims[1]
        native = kernels.native()

        def formed(env: Env) -> Tensor:
            made = kernels.conv_formed(env[x_name], env[g_name], *args).reshape(shape.rows, -1)
            if shape.per_unit > 1:
                made = made.reshape(shape.units, shape.per_unit, -1).sum(1)
            return made

        def direct(env: Env) -> Norm:
            x, g = env[x_name], env[g_name]
            return Norm(kernels.conv_norms(x, g, *args), kernels.conv_scale(x, g, *args))

        def gram(env: Env) -> Norm:
            return Norm(*kernels.conv_gram(env[x_name], env[g_name], *args))

        def total(env: Env, weights: Tensor, keep: Tensor) -> Tensor:
            scaled = kernels.scale_rows(env[g_name], weights, keep)
            mask = {"output_mask": (False, True, False)}
            made: Tensor = self.runner.call(node, env | {g_name: scaled}, shape.rows, mask)[1]
            return made

        error = _sum_error(positions * shape.rows)
        kept = _Formed(c, formed, size, shape)
        ways = [kept.way()]
        if shape.per_unit == 1:
            gamma = bounds.conv_norms(positions, size, native=native)
            ways.append(Way("direct", direct, gamma, error))
            groups = call["groups"]
            if groups == 1 and positions <= 512:
                gamma = bounds.conv_gram(
                    positions, out_channels, channels * taps, taps, native=native
                )
                ways.append(Way("gram", gram, gamma, error))
        return Site(name, ways, {c: kept.or_else(total, w)})

    def _bias(self, name: str, names: Sequence[str]) -> Site | None:
        """A convolution's bias: the output gradient summed over positions."""
        if len(names) != 1:
            return self._looped(name, names)
        g_name = self._refs(self.proved.contractions[names[0]])[0]
        shape, size = self.shape, self.values[names[0]].dims

        def make(env: Env) -> Tensor:
            made = env[g_name].flatten(2).sum(2)
            return (
                made.reshape(shape.units, shape.per_unit, -1).sum(1) if shape.per_unit > 1 else made
            )

        formed = _Formed(names[0], make, math.prod(size), shape)
        return Site(name, [formed.way()], {names[0]: formed.or_else(None, size)})

    def _looped(self, name: str, names: Sequence[str]) -> Site | None:
        """Each contraction by its own operation, one record at a time."""
        shape = self.shape
        sizes = {c: self.values[c].dims for c in names}
        forms = {c: self.runner.looped(c, shape) for c in names}
        weights_of = {c: _Formed(c, forms[c], math.prod(sizes[c]), shape, "loop") for c in names}
        if len(names) == 1:
            only = weights_of[names[0]]
            return Site(name, [only.way()], {names[0]: only.or_else(None, sizes[names[0]])})

        def norm(env: Env) -> Norm:
            made = None
            for c in names:
                one = forms[c](env)
                env[weights_of[c].key] = one
                made = one if made is None else made + one
            assert made is not None
            return Norm(kernels.row_squares(made))

        # The parts are summed apart: their scales bound the error, the sum's norm the clip.
        way = Way("loop", norm, 4.0 * _U32 * len(names), _sum_error(shape.units * len(names)))
        return Site(name, [way], {c: weights_of[c].or_else(None, sizes[c]) for c in names})

    def _whole(self, name: str, gradient: str) -> Site:
        """The whole gradient of a parameter, one record at a time."""
        size = self.values[gradient].dims
        make = self.runner.looped(gradient, self.shape)
        formed = _Formed(gradient, make, math.prod(size), self.shape, "loop")
        return Site(name, [formed.way()], {gradient: formed.or_else(None, size)})

    def choose(self, site: Site, env: Env | None = None, most: int = 1 << 62) -> None:
        """Take the quickest admitted way on the operands of ``env``; the first without them."""
        fitting = [w for w in site.ways if w.bytes <= most] or [
            min(site.ways, key=lambda w: w.bytes)
        ]
        if env is None or len(fitting) == 1:
            site.way = fitting[0]
            return
        site.way = min(fitting, key=lambda w: _seconds(site, w, dict(env), self.shape))


def _seconds(site: Site, way: Way, env: Env, shape: Shape) -> float:
    weights, keep = torch.ones(shape.rows), torch.ones(shape.rows, dtype=torch.bool)
    best = math.inf
    for _ in range(3):
        start = time.perf_counter()
        way.norm(env)
        for total in site.totals.values():
            total(env, weights, keep)
        best = min(best, time.perf_counter() - start)
    return best


def _spread(items: tuple[int, ...], rank: int) -> tuple[int, ...]:
    return items * rank if len(items) == 1 else items


def _turns_only(chain: Sequence[Node]) -> bool:
    return all(graph_joint.entry(n).isometric for n in chain)


def _unfold_axes(value: Value, axes: Sequence[int]) -> tuple[int, list[int]]:
    """With the batch axis in three (outer, rows, inner): where the rows are, and the axes to sum
    once they are in front."""
    assert value.batch is not None
    k = value.batch.axis
    own = [a if a < k else a + 2 for a in axes if a != k] + [k, k + 2]
    return k + 1, sorted(a + 1 if a < k + 1 else a for a in own)


_KINDS: Final[dict[str, Callable[[Planner, str, Sequence[str]], Site | None]]] = {
    "outer": Planner._outer,
    "sum": Planner._sum,
    "embedding": Planner._embedding,
    "convolution": Planner._convolution,
    "": Planner._looped,
    "norm": Planner._looped,
}
