"""Per-record norms and weighted sums where the joint graph sums over records.

A *contraction* is a node whose output is S by itself: sum_i A_i over the rows of a microbatch. A
*site* is what one parameter's gradient is made of: one contraction or several that merge. Each site
has ways to its per-unit norm (:mod:`casemate.engine.forms`); the planner times those that are
admitted and takes the quickest:

=========  ========================================================================================
rank-one   one token: the product of two norms
gram       Gram matrices of tokens (float32, or float64: gram64), those of the padded input for
           convolutions
embedding  tokens of one index added up, then squared
...+tied   an embedding that is also a factor: both squared norms and twice the inner product
direct     a convolution's gradients formed in cache, never written
formed     the gradients are formed, and their weighted sum is the contraction
loop       as formed, one record at a time by the very operation of the graph
=========  ========================================================================================

The bound (rule P3). Let A_i be unit i's exact gradient of the float32 operands, n_i its norm,
S_i = sum_t |g_t||x_t|. A way gives n2 and gamma with |n2 - n_i^2| <= gamma S_i^2
(:mod:`casemate.engine.kernels.bounds`); a formed gradient is itself what is added, so that its norm
is exact up to the squares' sum and S is the norm. Scaling g by c_i in float32 moves v_i by at most
2^-24 c_i S_i; formed gradients are scaled in float64. The sum over units is off by at most
error * sum_i c_i S_i. ``batched.factors`` turns these into the c_i that keep |v_i| <= C (1 + ETA)
and the sums within ROUNDING C. docs/engine.md, "Certified sums", has the argument in one piece.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Final

import torch

from casemate.engine import forms, kernels, ways
from casemate.engine.forms import ROUNDING, Env, Norm, Shape, Site, Tensor, Way
from casemate.engine.nodes import Runner, to_rows
from casemate.engine.program import uses
from casemate.graph import joint as graph_joint
from casemate.graph.joint import Proved
from casemate.graph.model import Node
from casemate.graph.ops import Batch, Value

__all__ = ["ROUNDING", "Env", "Norm", "Outer", "Planner", "Shape", "Site", "Way", "tokens"]


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


Pair = Callable[[Env], tuple[Tensor, Tensor]]


def _joined(parts: Sequence[Pair]) -> Pair:
    """Tokens of several contractions as those of one."""
    if len(parts) == 1:
        return parts[0]

    def both(env: Env) -> tuple[Tensor, Tensor]:
        pairs = [p(env) for p in parts]
        return torch.cat([p[0] for p in pairs], 1), torch.cat([p[1] for p in pairs], 1)

    return both


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
        """Tokens of a unit."""
        assert self.left_value.batch is not None
        batch = self.left_value.batch
        return self.shape.per_unit * batch.outer * batch.inner

    @property
    def sizes(self) -> tuple[int, int]:
        return self.left_value.dims[0], self.right_value.dims[1]

    def pair(self, env: Env) -> tuple[Tensor, Tensor]:
        return (
            tokens(env[self.left], self.left_value, self.shape, 0),
            tokens(env[self.right], self.right_value, self.shape, 1),
        )


class Planner:
    """Sites of a proved joint graph at one microbatch; see the module."""

    def __init__(self, proved: Proved, runner: Runner, shape: Shape) -> None:
        self.proved, self.runner, self.shape = proved, runner, shape
        self.values = proved.values
        self.trials = ways.Trials(runner, shape)

    def sites(self) -> list[Site]:
        found = []
        for i, gradient in enumerate(self.proved.joint.gradients):
            if gradient is not None:
                found.append(self._site(f"p{i}", gradient))
        return found

    def _terms(self, name: str) -> list[tuple[str, tuple[Node, ...]]] | None:
        """Contractions below an S value, each once, with the nodes from it to ``name``; ``None``
        where the value is no sum of such chains."""
        if name in self.proved.contractions:
            return [(name, ())]
        node = self.proved.linear[name]
        sums = [a for a in uses(node) if self.values[a].summed]
        if graph_joint.entry(node).linear == "add":
            found: list[tuple[str, tuple[Node, ...]]] = []
            for a in sums:  # no further than the first that has none: a chain of a + a is short
                part = self._terms(a)
                if part is None:
                    return None
                found += [(c, (*chain, node)) for c, chain in part]
            return found if len({c for c, _ in found}) == len(found) else None
        if len(sums) != 1:
            return None
        below = self._terms(sums[0])
        return None if below is None else [(c, (*chain, node)) for c, chain in below]

    def _site(self, name: str, gradient: str) -> Site:
        terms = self._terms(gradient)
        if terms is not None:
            made = self._known(name, terms)
            if made is not None:
                return made
        return self._whole(name, gradient)

    def _known(self, name: str, terms: Sequence[tuple[str, tuple[Node, ...]]]) -> Site | None:
        kinds = {graph_joint.entry(self.proved.contractions[c]).site for c, _ in terms}
        if len(terms) > 1 or not all(_turns_only(chain) for _, chain in terms):
            places = [self.runner.placement(c, chain) for c, chain in terms]
            found = [p for p in places if p is not None]
            if len(found) < len(places):
                return None
            if kinds == {"outer", "embedding"}:
                return self._tied(name, terms, found)
            if not all(torch.equal(found[0], p) for p in found[1:]):
                return self._apart(name, terms, found)
        if len(kinds) != 1:
            return None
        names = [c for c, _ in terms]
        return _KINDS.get(kinds.pop(), Planner._looped)(self, name, names)

    def _apart(
        self, name: str, terms: Sequence[tuple[str, tuple[Node, ...]]], places: Sequence[Tensor]
    ) -> Site | None:
        """Terms that fall on different entries of the parameter: squared norms add."""
        everything = torch.cat([p.reshape(-1) for p in places]).sort().values
        if bool((everything[1:] == everything[:-1]).any()):
            return None
        parts = [self._known(name, [(c, ())]) for c, _ in terms]
        sites = [p for p in parts if p is not None]
        if len(sites) < len(parts):
            return None
        for site in sites:
            self.choose(site)
        return forms.apart_site(name, sites)

    # One function for each kind of contraction: (planner, site's name, S values) -> Site.

    def _outer(self, name: str, names: Sequence[str]) -> Site:
        found = self._products(names)
        if found is None:
            return self._looped(name, names)
        return forms.outer_site(name, names, *found, self.shape)

    def _products(self, names: Sequence[str]) -> tuple[Pair, int, tuple[int, int]] | None:
        """(g, x) of all, how many tokens, and (m, n)."""
        parts = []
        for c in names:
            left, right = uses(self.proved.contractions[c])
            a, b = self.values[left], self.values[right]
            if a.rank != 2:
                return None
            parts.append(Outer(c, left, right, a, b, self.shape))
        if len({p.sizes for p in parts}) != 1:  # one tensor, read in two shapes
            return None
        return _joined([p.pair for p in parts]), sum(p.count for p in parts), parts[0].sizes

    def _sum(self, name: str, names: Sequence[str]) -> Site:
        makes = [self._summed(c) for c in names]

        def make(env: Env) -> Tensor:
            made = makes[0](env)
            for other in makes[1:]:
                made = made + other(env)
            return made

        return forms.formed_site(name, names, make, self.values[names[0]].dims, self.shape)

    def _summed(self, c: str) -> forms.Make:
        """Sums of units over tokens and other axes."""
        node = self.proved.contractions[c]
        (source,) = uses(node)
        value, shape = self.values[source], self.shape
        call = graph_joint.bound(node, self.values)
        axes = sorted(call.axes(call.args.get("dim"), value.rank))
        assert value.batch is not None
        batch, width = value.batch, math.prod(self.values[c].dims)
        kept = [a for a in range(value.rank) if a not in axes]

        def make(env: Env) -> Tensor:
            if batch.axis == 0 and batch.outer == 1 and axes == list(range(len(axes))):
                t = env[source].reshape(shape.units, -1, width)
                return t[:, 0] if t.shape[1] == 1 else kernels.formed_sum(t)
            # A record as (tokens, kept entries): what is summed in front, the rest behind.
            sizes = [*value.dims[: batch.axis], batch.outer, batch.inner,
                     *value.dims[batch.axis + 1 :]]  # fmt: skip
            t = to_rows(env[source], value, shape.rows).reshape(shape.rows, *sizes)
            behind = [1 + a + (a > batch.axis) for a in kept]
            front = [a for a in range(1, t.dim()) if a not in behind]
            t = t.permute(0, *front, *behind).reshape(shape.units, -1, width)
            return kernels.formed_sum(t)

        return make

    def _embedding(self, name: str, names: Sequence[str]) -> Site:
        found = self._lookups(names)
        if found is None:
            return self._looped(name, names)
        return forms.embedding_site(name, names, *found, self.shape)

    def _lookups(self, names: Sequence[str]) -> tuple[Pair, int, tuple[int, int], int] | None:
        """(index, g) of all, how many tokens, (rows, width) of the table, and its padding."""
        shape, parts, count = self.shape, [], 0
        tables = set()
        for c in names:
            node = self.proved.contractions[c]
            source, at = uses(node)[:2]
            call = graph_joint.bound(node, self.values)
            for v in (self.values[source], self.values[at]):
                if v.batch is None or v.batch.axis != 0 or v.batch.outer != 1:
                    return None
            width = self.values[source].dims[-1]
            tables.add((call["num_weights"], width, call["padding_idx"]))
            count += shape.per_unit * self.values[at].numel

            def pair(
                env: Env, source: str = source, at: str = at, w: int = width
            ) -> tuple[Tensor, Tensor]:
                return env[at].reshape(shape.units, -1), env[source].reshape(shape.units, -1, w)

            parts.append(pair)
        if len(tables) != 1:
            return None
        rows, width, padding = tables.pop()
        return _joined(parts), count, (rows, width), padding

    def _tied(
        self, name: str, terms: Sequence[tuple[str, tuple[Node, ...]]], places: Sequence[Tensor]
    ) -> Site | None:
        """One tensor read by embeddings and by products: a language model's head."""
        kinds = [graph_joint.entry(self.proved.contractions[c]).site for c, _ in terms]
        at = {kind: [i for i, k in enumerate(kinds) if k == kind] for kind in kinds}
        head, table = ([terms[i][0] for i in at[kind]] for kind in ("outer", "embedding"))
        for some in at.values():
            if not all(torch.equal(places[some[0]], places[i]) for i in some):
                return None
        products, lookups = self._products(head), self._lookups(table)
        if products is None or lookups is None:
            return None
        of_head = places[at["outer"][0]].reshape(products[2])
        of_table = places[at["embedding"][0]].reshape(lookups[2])
        turned = not torch.equal(of_head, of_table)
        if turned and not torch.equal(of_head.t(), of_table):
            return None
        return forms.tied_site(
            forms.outer_site(name, head, *products, self.shape),
            forms.embedding_site(name, table, *lookups, self.shape),
            products[0], lookups[0], (products[1], lookups[1]), lookups[2], lookups[3], turned,
            self.shape,
        )  # fmt: skip

    def _convolution(self, name: str, names: Sequence[str]) -> Site:
        c = names[0]
        node = self.proved.contractions[c]
        if len(names) != 1 or not c.endswith(".1"):
            return self._bias(name, names)
        g_name, x_name = uses(node)[:2]
        call = graph_joint.bound(node, self.values)
        w, transposed = self.values[c].dims, bool(call["transposed"])
        x, g = self.values[x_name], self.values[g_name]
        folded = any(v.batch is None or v.batch != _PLAIN for v in (x, g))
        if folded or (any(call["output_padding"]) and not transposed):
            return self._looped(name, names)
        stride, padding, dilation = (
            _spread(call[k], len(w) - 2) for k in ("stride", "padding", "dilation")
        )
        if transposed:
            x, g = g, x
        window = forms.Window(
            (w[2:], stride, padding, dilation, call["groups"], transposed),
            w,
            math.prod(g.dims[2:]),
            x.dims[1],
            g.dims[1],
            call["groups"],
        )
        return forms.convolution_site(name, c, x_name, g_name, window, self.shape)

    def _bias(self, name: str, names: Sequence[str]) -> Site:
        """A convolution's bias: the output gradient summed over positions."""
        g_name = uses(self.proved.contractions[names[0]])[0]
        if len(names) != 1 or self.values[g_name].batch != _PLAIN:
            return self._looped(name, names)
        shape = self.shape

        def make(env: Env) -> Tensor:
            return shape.merged(kernels.channel_sum(env[g_name]))

        return forms.formed_site(name, names, make, self.values[names[0]].dims, shape)

    def _norm(self, name: str, names: Sequence[str]) -> Site:
        """Scale (.1) or shift (.2) of a norm layer; both are had in one pass."""
        node = self.proved.contractions[names[0]]
        affine = self._affine(node)
        if len(names) != 1 or affine is None:
            return self._looped(name, names)
        mine, shape = int(names[0][-1]), self.shape
        key = f"{node.name}!affine"

        def make(env: Env) -> Tensor:
            which, made = env.pop(key, (0, None))
            if which != mine:
                dw, db = affine(env)
                made, other = (dw, db) if mine == 1 else (db, dw)
                env[key] = (3 - mine, other)
            return shape.merged(made)

        return forms.formed_site(name, names, make, self.values[names[0]].dims, shape)

    def _affine(self, node: Node) -> Pair | None:
        call, refs, rows = graph_joint.bound(node, self.values), uses(node), self.shape.rows
        g, x = refs[:2]
        if node.op == "aten.native_layer_norm_backward.default":
            mean, rstd = refs[2:4]
            size = math.prod(call["normalized_shape"])

            def of_rows(env: Env, name: str, width: int) -> Tensor:
                return to_rows(env[name], self.values[name], rows).reshape(rows, -1, width)

            def by_token(env: Env) -> tuple[Tensor, Tensor]:
                stats = (of_rows(env, n, 1)[:, :, 0] for n in (mean, rstd))
                return kernels.token_affine(of_rows(env, g, size), of_rows(env, x, size), *stats)

            return by_token
        if any(self.values[v].batch != _PLAIN for v in (g, x)):
            return None
        if node.op == "aten.native_group_norm_backward.default":
            return lambda env: kernels.channel_affine(env[g], env[x], env[refs[2]], env[refs[3]])
        if node.op == "aten.native_batch_norm_backward.default" and not call["train"]:
            mean, var = (_named(node)[k].name for k in ("running_mean", "running_var"))

            def frozen(env: Env) -> tuple[Tensor, Tensor]:
                stats = (env[mean], torch.rsqrt(env[var] + call["eps"]))
                each = (s.expand(rows, -1) for s in stats)
                return kernels.channel_affine(env[g], env[x], *each)

            return frozen
        return None

    def _looped(self, name: str, names: Sequence[str]) -> Site:
        """Each contraction by its own operation, one record at a time; they add up."""
        makes = [self.runner.looped(c, self.shape) for c in names]

        def make(env: Env) -> Tensor:
            made = makes[0](env)
            for other in makes[1:]:
                made = made + other(env)
            return made

        return forms.formed_site(name, names, make, self.values[names[0]].dims, self.shape, "loop")

    def _whole(self, name: str, gradient: str) -> Site:
        """The whole gradient of a parameter, one record at a time."""
        size = self.values[gradient].dims
        make = self.runner.looped(gradient, self.shape)
        return forms.formed_site(name, [gradient], make, size, self.shape, "loop")

    def choose(self, site: Site, env: Env | None = None, most: int = 1 << 62) -> None:
        """Take the quickest admitted way on the operands of ``env``; the first without them."""
        if env is None:
            site.settle(ways.fitting(site, most)[0])
        else:
            self.plan([site], env, most)

    def plan(self, sites: Sequence[Site], env: Env, most: int, each: bool = False) -> None:
        """The way of every site, on these operands: see :mod:`casemate.engine.ways`. Formed
        gradients take at most ``most`` bytes in all; each: whether sites are clipped by
        themselves."""
        ways.plan(sites, env, most, self.trials, self._alone, each)

    def _alone(self, site: Site) -> None:
        """Leave a site no way but its contractions evaluated one record at a time."""
        parts = [self._looped(p.name, list(p.totals)) for p in site.parts or (site,)]
        made = parts[0] if len(parts) == 1 else forms.apart_site(site.name, parts)
        site.ways, site.totals, site.rooms = made.ways, made.totals, ()
        site.adds.clear()


def _spread(items: Any, rank: int) -> tuple[int, ...]:
    return tuple(items) * (rank if len(items) == 1 else 1)


def _named(node: Node) -> dict[str, Any]:
    """The node's arguments by the schema's names."""
    names = [p.name for p in graph_joint.entry(node).schema.params]
    return {**dict(zip(names, node.args, strict=False)), **node.kwargs}


def _turns_only(chain: Sequence[Node]) -> bool:
    return all(graph_joint.entry(n).isometric for n in chain)


_PLAIN: Final = Batch(0)
_KINDS: Final[dict[str, Callable[[Planner, str, Sequence[str]], Site | None]]] = {
    "outer": Planner._outer,
    "sum": Planner._sum,
    "embedding": Planner._embedding,
    "convolution": Planner._convolution,
    "norm": Planner._norm,
}
