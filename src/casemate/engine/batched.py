"""The path ``graph``: a microbatch at a time, with per-record norms and no per-record gradients.

The joint graph of forward and backward is run once up to the operands of its contractions; the
norm of each unit's contribution is had there (:mod:`casemate.engine.sites`), and each contraction
is made with the output gradients times the clip factors (Lee and Kifer 2021, "Scaling up
differentially private deep learning with fast per-example gradient clipping"; Bu et al.,
arXiv:2210.00038). The microbatch's sum is then put on the integer grid.

What P3 needs (see :func:`factors`): with n the norm and S the spread of a unit's contribution as
defined in ``sites``, c is chosen so that c n <= C and that what the second contraction's rounding
may hide is at most ``ROUNDING`` C a microbatch. Zeroing out a unit changes one microbatch, so the
sum moves by at most C (1 + ETA) + 2 ROUNDING C + grid sqrt(d), whatever form the clip has
(:func:`weigh`).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import numpy.typing as npt
import torch

from casemate.engine import compiled, early, fill, kernels, layout, products, small, trials, windows
from casemate.engine.clip import share
from casemate.engine.draws import Draws
from casemate.engine.joint import BATCHES, SEED, Noted, note
from casemate.engine.nodes import Env, Runner, from_rows, needed, to_rows
from casemate.engine.probe import Replacement, laid, place, prober
from casemate.engine.program import DTYPES, Program, maker, uses
from casemate.engine.replay import Call
from casemate.engine.rows import Rows
from casemate.engine.sites import ROUNDING, Planner, Shape, Site
from casemate.graph.check import Checked
from casemate.graph.joint import Proved, prove
from casemate.graph.model import Node
from casemate.spec.job import Clipping

ETA: Final = 2.0**-20
SMALLEST: Final = 2.0**-48
_U32: Final = 2.0**-24


def sensitivity(bound: float, dimension: int, grid: float) -> float:
    """How far one unit moves a step's sum on the grid, L2, in gradient units, rounded up."""
    exact = bound * (1.0 + ETA) + 2.0 * ROUNDING * bound + grid * math.sqrt(dimension)
    return exact * (1.0 + 2.0**-50)


def factors(
    sites: Sequence[Site], norms: Sequence[Any], bound: float, units: int, gamma: float = 0.0
) -> tuple[torch.Tensor, torch.Tensor]:
    """Clip factors of units (u,), float32, and which units count.

    Over sites, with n2 and S as the site's way gives them: N^2 = sum n2 + gamma S^2 bounds the
    squared norm from above; scaling in float32, where a way does so, and the float64 sums here add
    2^-24 S and less than ETA. Q^2 = sum (error S)^2 bounds what a unit brings into the rounding of
    the sums (triangle inequality over units and sites), so c <= ROUNDING C / (u Q) keeps that below
    ROUNDING C in all. A factor is rounded towards zero. A unit whose bound is not finite does not
    count (its operands are taken out before anything is multiplied).

    A factor below SMALLEST is zero, else what c times an operand loses to underflow could be more
    than C. That loss is at most 2^-150 sqrt(m) sum_t |x_t| at a site, and S is at least 2^-62.5
    sqrt(m) sum_t |x_t| (``bounds``); with c >= 2^-48, S is at most 2^48 ROUNDING C / (u error), and
    error at least 2^-24: the loss is below 2^-22 C / u, that of a microbatch 2^-22 C: ETA holds it.

    gamma: of automatic clipping; then c N <= C N / (N + gamma), for gamma >= C.
    """
    quick = None
    if not gamma:
        quick = small.factors(sites, norms, bound, units, ROUNDING * bound / units)
    return quick or _factors(sites, norms, bound, units, gamma)


def per_layer(
    sites: Sequence[Site], norms: Sequence[Any], bound: float, units: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Clip factors (sites, u) of each site by itself, for the same ``bound``, and which units count
    at all of them."""
    c = torch.zeros(len(sites), units)
    good = torch.ones(units, dtype=torch.bool)
    for i, (site, norm) in enumerate(zip(sites, norms, strict=True)):
        c[i], fine = factors([site], [norm], bound, units)
        good &= fine
    c[:, ~good] = 0.0
    return c, good


def scale_of(bound: float, gamma: float) -> float:
    """The power of two by which automatic clipping has its sums multiplied in the end: bound over
    it is at most gamma, so that no factor is above 1 and no operand overflows."""
    return 2.0 ** max(0, math.frexp(bound / gamma)[1]) if gamma else 1.0


def _factors(
    sites: Sequence[Site], norms: Sequence[Any], bound: float, units: int, gamma: float = 0.0
) -> tuple[torch.Tensor, torch.Tensor]:
    total = torch.zeros(units, dtype=torch.float64)
    spread = torch.zeros(units, dtype=torch.float64)
    rounding = torch.zeros(units, dtype=torch.float64)
    for site, norm in zip(sites, norms, strict=True):
        s2 = norm.squared if norm.spread is None else norm.spread.square()
        total += norm.squared + site.way.gamma * s2
        rounding += site.way.error**2 * s2
        if site.way.scaled:
            spread += s2
    largest = total.clamp(min=0.0).sqrt() + _U32 * spread.sqrt()
    good = torch.isfinite(largest)
    if not math.isfinite(bound):
        return good.to(torch.float32), good
    by_norm = bound / (largest + gamma)
    by_rounding = ROUNDING * bound / (units * rounding.sqrt())
    c = torch.minimum(by_norm, by_rounding).clamp(max=1.0)
    c = torch.where(good & (c >= SMALLEST), c, 0.0)
    exact = c.to(torch.float32)
    down = torch.nextafter(exact, torch.zeros_like(exact))
    return torch.where(exact.to(torch.float64) > c, down, exact), good


@dataclass(frozen=True, slots=True)
class _At:
    """Of a trained tensor: the site and its place among sites, the gradient, and the nodes from
    the site's totals to it."""

    place: int
    gradient: str
    site: Site
    tail: Sequence[Node]


class Batched:
    """``program`` evaluated ``shape.rows`` rows at a time."""

    def __init__(
        self, program: Program, noted: Noted, proved: Proved, shape: Shape, keep: bool
    ) -> None:
        self.program, self.noted, self.proved, self.shape = program, noted, proved, shape
        at = Program(program.graph, program.weights, shape.rows)
        constants = {key: at.constant[name] for key, name in noted.constants.items()}
        self.runner = Runner(noted, proved, shape.rows, constants, program.leaves)
        self.data = [f"d{i}" for i in range(len(program.data))]
        self.frontier = list(dict.fromkeys(noted.frontier))
        self.keep = keep
        planner = Planner(proved, self.runner, shape)
        self.sites = planner.sites()
        self.wanted = self._operands()
        self.instead: dict[str, Replacement] = {}
        self.slow: list[str] = []
        self.fused: compiled.Fused | None = None
        self.later: compiled.Later | None = None
        self._trial: list[torch.Tensor] = []
        self.source = self.frontier if keep else self.data
        self._forming: list[Call] = []
        self._functions({})
        self.planner = planner
        self._buffers = {
            name: torch.zeros(
                proved.values[name].sizes(shape.rows), dtype=DTYPES[proved.values[name].dtype]
            )
            for name in self.source
        }
        gradients = [(i, g) for i, g in enumerate(proved.joint.gradients) if g is not None]
        # By trained tensor: its site, its gradient and what leads from the site's totals there.
        self._order: list[_At | None] = [None] * len(proved.joint.gradients)
        for nth, ((i, g), site) in enumerate(zip(gradients, self.sites, strict=True)):
            tail = self.runner.sums_behind([g], frozenset(site.totals))
            self._order[i] = _At(nth, g, site, tail)

    def _functions(self, instead: Mapping[str, Any]) -> None:
        self._forming, self._given = [], self.wanted
        self._forward = self.runner.function([*self.source, SEED], self.wanted, instead)
        if self.keep:
            self._prefix = self.runner.function(self.data, self.frontier, instead)

    def settle(self, records: Mapping[str, torch.Tensor], last: bool | None = None) -> list[str]:
        """Try every operation in every slot (:mod:`casemate.engine.probe`), where values lie as in
        a run; those that fail are run another way from now on. records: a microbatch by data input.
        last: run with channels last, or not; ``None``: as is quicker (:mod:`layout`).
        Returns their names."""
        inputs = {
            name: records[spec.name].contiguous()
            for name, spec in zip(self.data, self.program.data, strict=True)
        }
        choice = layout.quicker(self, inputs) if last is None else last
        self.runner.lay(choice)
        self.instead, self.slow = {}, []
        tried = self._trier()
        with torch.inference_mode():
            if self.keep:
                env = tried(inputs, self.frontier)
                # What is kept goes through the buffers.
                inputs = {n: b.copy_(env[n]).clone() for n, b in self._buffers.items()}
            inputs[SEED] = torch.ones(self.shape.rows)
            tried(inputs, self.wanted)
        if choice and last is None and layout.slowed(self):
            return self.settle(records, False)
        self._functions(self.instead)
        return [f"{self.runner.nodes[name].op} ({name})" for name in self.instead]

    def fuse(
        self,
        records: Mapping[str, torch.Tensor],
        seconds: float,
        *,
        microbatches: int | None = None,
        background: bool = False,
    ) -> bool:
        """Compile islands (:mod:`casemate.engine.compiled`) after :meth:`settle`, none begun after
        so many seconds; what comes of it is taken if it is quicker: at once, or in the
        ``background`` before some later step. records: a microbatch by data input. microbatches: do
        so only if it is likely to pay for a run of as many. Returns whether it was begun."""
        runner, ends = self.runner, [*self.source, SEED]
        data = [records[spec.name].contiguous() for spec in self.program.data]
        with torch.inference_mode():
            given: list[torch.Tensor] = data
            if self.keep:
                kept = self._prefix(runner.fixed, *data)
                given = [
                    b.copy_(t).clone() for b, t in zip(self._buffers.values(), kept, strict=True)
                ]
            given = [*given, torch.ones(self.shape.rows)]
            names = [o for n in runner.order(ends, self.wanted) for o in runner.outs(n)]
            made = runner.function(ends, names, self.instead)(runner.fixed, *given)
            fixed = runner.fixed
            if background:  # steps change weights meanwhile
                fixed = {k: laid(t, place(t)) for k, t in fixed.items()}
        env = {**fixed, **dict(zip([*ends, *names], [*given, *made], strict=True))}
        wanted, forming, instead = self._given, self._forming, self.instead
        if microbatches is not None and not compiled.pays(
            runner, ends, needed(wanted, forming), env, instead, microbatches
        ):
            return False
        self._trial = given
        self.later = compiled.Later(
            lambda: compiled.fuse(runner, ends, wanted, env, instead, seconds, forming)
        )
        if not background:
            self.later.wait()
            self._swap()
        return True

    def _trier(self) -> Callable[[Mapping[str, torch.Tensor], Sequence[str]], Env]:
        """``f(inputs, ends)``: evaluate what lies between, node by node, trying each on what it
        reads and adding to ``instead`` what takes its place and to ``slow`` those that are run one
        record a call. Gives the ends, as a run has them."""
        runner = self.runner
        product, other = products.chooser(runner), prober(runner)

        def tried(inputs: Mapping[str, torch.Tensor], ends: Sequence[str]) -> Env:
            env: Env = {**runner.fixed, **inputs}
            nodes = runner.order(list(inputs), ends)
            last = {n: i for i, node in enumerate(nodes) for n in uses(node)}
            for i, node in enumerate(nodes):
                made = runner.call(node, env, self.shape.rows, runner.without_sums(node))
                runner._store(node, env, made)
                found = product(node, env)
                if found is None and (way := other(node, env)) is not None:
                    found, alone = way
                    self.slow += [f"{node.op} ({node.name})"] * alone
                if found is not None:
                    self.instead[node.name] = found
                for name in dict.fromkeys((*uses(node), *runner.outs(node))):
                    if last.get(name, i) == i and name not in ends:
                        env.pop(name, None)
            return env

        return tried

    def values(self, records: Mapping[str, torch.Tensor]) -> Env:
        """Every value of a microbatch of these records; none is let go of."""
        runner = self.runner
        data = {
            name: records[spec.name]
            for name, spec in zip(self.data, self.program.data, strict=True)
        }
        data[SEED] = torch.ones(self.shape.rows)
        nodes = runner.order(list(data), [*self.wanted, *self.frontier])
        names = [o for n in nodes for o in runner.outs(n)]
        with torch.inference_mode():
            made = runner.function(list(data), names)(runner.fixed, *data.values())
        return {**runner.fixed, **data, **dict(zip(names, made, strict=True))}

    def _swap(self) -> None:
        """Take what was compiled, between steps, if it is quicker on made-up records."""
        if self.later is None or not self.later.over():
            return
        made, plain, self.later = self.later.ready(), self._forward, None
        given, self._trial = self._trial, []
        trials.forget()
        if made is None or not made.islands:
            self.fused = made
            return
        with torch.inference_mode():
            fixed = self.runner.fixed
            quick, slow = compiled.race(
                lambda: made.call(fixed, *given), lambda: plain(fixed, *given)
            )
        self.fused = made if quick < slow else made.untaken(plain)
        self._forward = self.fused.call

    def _operands(self) -> list[str]:
        out: dict[str, None] = {}
        for site in self.sites:
            for name in site.totals:
                for node in self.runner.sums_behind([name]):
                    for r in self.runner.reads[node.name]:
                        of_records = self.proved.values[r].batch is not None
                        if of_records or maker(r) in self.runner.of_batch:
                            out[r] = None
        return list(out)

    def operands(self, frontier: Mapping[str, torch.Tensor], seed: torch.Tensor) -> Env:
        """Operands of all contractions for one microbatch, or what was formed of them."""
        for name, buffer in self._buffers.items():
            buffer.copy_(frontier[name])
        return self._evaluate(seed)

    def _evaluate(self, seed: torch.Tensor) -> Env:
        """As :meth:`operands`, of what is in the buffers."""
        with torch.inference_mode():
            made = self._forward(self.runner.fixed, *self._buffers.values(), seed)
        return {**self.runner.fixed, **dict(zip(self._given, made, strict=True))}

    def operands_of(self, records: Mapping[str, torch.Tensor]) -> Env:
        """:meth:`operands` of a microbatch of records by data input, as a run has them."""
        data = [records[spec.name].contiguous() for spec in self.program.data]
        with torch.inference_mode():
            given = self._prefix(self.runner.fixed, *data) if self.keep else data
        return self.operands(
            dict(zip(self.source, given, strict=True)), torch.ones(self.shape.rows)
        )

    def choose(self, env: Env, most: int, each: bool = False) -> None:
        """Time the ways of every site on these operands and take the quickest that together keep at
        most ``most`` bytes of formed gradients. each: sites are clipped each by itself."""
        with torch.inference_mode():
            self.planner.plan(self.sites, env, most, each)

    def form(self) -> None:
        """Form early what the chosen ways form (:mod:`casemate.engine.early`) from now on; where
        the native step takes all operands, nothing. What ways were tried on is let go of."""
        trials.forget()
        if self._small() is not None:
            return
        self._forming, self._given = early.forming(self.runner, self.sites, self.wanted)
        self._forward = self.runner.function(
            [*self.source, SEED], self._given, self.instead, self._forming
        )

    def _small(self) -> small.Small | None:
        sizes = [leaf.numel() for leaf in self.program.leaves]
        return small.build(self.runner, self.sites, self.shape, sizes)

    def weigh(
        self, norms: Sequence[Any], bound: float, clipping: Clipping, gamma: float
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Clip factors in a form (``spec.job.Dp``), and which units count: (u,), or (sites, u).

        Per-layer: each of L tensors has C / sqrt(L) for its norm, and ROUNDING C / sqrt(L) for what
        the rounding of its sum may hide. Tensors have no entry in common, so both add up as squares
        to what the whole has under one factor: C (1 + ETA), ROUNDING C. Automatic: a power of two M
        with C / M <= gamma; factors for C / M and for gamma, and sums times M, which is exact: all
        that holds for the bound C / M holds for C.
        """
        sites, units = self.sites, self.shape.units
        if clipping == "per-layer":
            return per_layer(sites, norms, share(bound, len(self.program.leaves)), units)
        if clipping == "automatic":
            return factors(sites, norms, bound / scale_of(bound, gamma), units, gamma)
        return factors(sites, norms, bound, units)

    def parts(
        self, env: Env, bound: float, clipping: Clipping = "flat", gamma: float = 0.0
    ) -> tuple[list[torch.Tensor | None], torch.Tensor]:
        """The clipped sum of one microbatch, a tensor for each trained one (``None`` for zero), and
        the units' factors. gamma: 0 but for automatic clipping, whose factors are over
        :func:`scale_of`."""
        c, weights, keep = self._factors(env, bound, clipping, gamma)
        scale = scale_of(bound, gamma)
        parts: list[torch.Tensor | None] = []
        for at in self._order:
            made = None if at is None else self._sum(at, env, weights, keep)
            parts.append(made if made is None or scale == 1.0 else made * scale)
        return parts, c

    def _factors(
        self, env: Env, bound: float, clipping: Clipping, gamma: float
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Units' factors, (sites, rows) those of their rows, and which rows count; operands of
        others are zeroed and what is formed is kept in ``env``."""
        with torch.inference_mode():
            norms = [site.way.norm(env) for site in self.sites]
            c, good = self.weigh(norms, bound, clipping, gamma)
            if not bool(good.all()):
                self._blank(env, good)
            k = self.shape.per_unit
            of_rows, rows = c, good
            if k > 1:
                of_rows, rows = c.repeat_interleave(k, dim=-1), good.repeat_interleave(k)
            return c, of_rows.expand(len(self.sites), -1), rows

    def _sum(self, at: _At, env: Env, weights: torch.Tensor, keep: torch.Tensor) -> torch.Tensor:
        """One trained tensor's weighted sum over a microbatch."""
        with torch.inference_mode():
            return self.total(at, env, weights[at.place], keep)

    def total(self, at: _At, env: Env, mine: torch.Tensor, keep: torch.Tensor) -> torch.Tensor:
        """:meth:`_sum` with the rows' weights at that tensor."""
        sums = {n: total(env, mine, keep) for n, total in at.site.totals.items()}
        if at.tail:
            sums = {**env, **sums}
        for node in at.tail:
            self.runner._store(node, sums, self.runner.call(node, sums, self.shape.rows))
        made: torch.Tensor = sums[at.gradient]
        return made

    def _fill(
        self, at: _At, env: Env, weights: torch.Tensor, keep: torch.Tensor, inverse: float,
        scale: float,
    ) -> windows.Fill:  # fmt: skip
        """What adds :meth:`_sum` times ``scale`` to windows, in grid steps of 1 / inverse, or
        as it is where that is zero."""
        if inverse and at.gradient in at.site.adds:
            add, mine = at.site.adds[at.gradient], weights[at.place]
            return lambda window, first: add(window, first, env, mine, keep, inverse * scale)
        made: list[torch.Tensor] = []

        def fill(window: torch.Tensor, first: int) -> None:
            if not made:
                made.append(self._sum(at, env, weights, keep).reshape(-1))
            part = made[0][first : first + len(window)]
            if inverse:
                kernels.accumulate(window, part, inverse * scale)
            else:
                window += part * scale

        return fill

    def _blank(self, env: Env, good: torch.Tensor) -> None:
        """Zero the operands of units that do not count: what they hold may not be multiplied."""
        rows = good.repeat_interleave(self.shape.per_unit)
        for name in (n for n in self.wanted if n in env):
            value, t = self.proved.values[name], env[name]
            if t.is_floating_point() and value.batch is not None:
                flat = to_rows(t, value, self.shape.rows).clone()
                flat[~rows] = 0.0
                blank = from_rows(flat, value)
                own = t.stride()[value.batch.axis] > 0  # else all records' rows are one
                env[name] = laid(blank, place(t)) if own else blank

    def sums(self, *args: Any, **kwargs: Any) -> Callable[[npt.NDArray[np.int64]], torch.Tensor]:
        """:meth:`pieces` as one vector, in the same memory each time."""
        pieces = self.pieces(*args, **kwargs)
        held: list[torch.Tensor] = []

        def total(chosen: npt.NDArray[np.int64]) -> torch.Tensor:
            for first, part in pieces(chosen):
                if not held:
                    held.append(torch.empty(self.program.dimension, dtype=part.dtype))
                held[0][first : first + len(part)] = part
            return held[0]

        return total

    def pieces(
        self,
        rows: Rows,
        bound: float,
        step: float,
        slots: int,
        clipping: Clipping = "flat",
        gamma: float = 0.0,
        drawn: Draws | None = None,
    ) -> Callable[[npt.NDArray[np.int64]], Iterator[windows.Piece]]:
        """``f(chosen units)``: their sum by pieces (:mod:`casemate.engine.windows`), int64 in grid
        steps, or float64 when ``step`` is 0. Weights may change as pieces are taken. drawn: random
        inputs and views, whose step the caller sets; of a unit's ``per_unit`` places each row takes
        one for each of its views."""
        units, k = self.shape.units, self.shape.per_unit
        views = 1 if drawn is None else drawn.views
        store = None
        if self.keep:
            assert self._prefix is not None
            names = self.frontier
            store = fill.kept(self._prefix, names, self.runner, self.program, rows)
        index = torch.zeros(self.shape.rows, dtype=torch.int64)
        seed = torch.zeros(self.shape.rows)

        members, there = (t.repeat_interleave(views, 1) for t in rows.table(k // views))
        full = bool(there.all())
        there = there / views
        sizes = [leaf.numel() for leaf in self.program.leaves]
        tiny = self._small() if clipping == "flat" and step else None
        everywhere = bool((members >= 0).all()) and rows.count > 0
        places = index.view(-1, k)
        if k == 1:  # a vector's rows are found in half the time
            members, places = members.view(-1), index
        put = fill.of_rows(self._buffers, self.program, self.proved.values, rows, store, drawn)
        dtype = torch.int64 if step else torch.float64
        inverse, scale = 1.0 / step if step else 0.0, scale_of(bound, gamma)
        held: torch.Tensor | None = None
        streams: bool | None = None  # told by the first microbatch
        prepared = -1  # places that have a row, as index and seed say

        def evaluated(first: int, chosen: npt.NDArray[np.int64]) -> Env:
            """Operands of the microbatch that begins with that slot."""
            nonlocal prepared
            taken = torch.from_numpy(chosen[first : first + units])
            count = len(taken) * k
            if count != prepared:
                index[count:] = -1
                seed[:count] = 1.0 / views
                seed[count:] = 0.0
                prepared = count
            torch.index_select(members, 0, taken, out=places[: len(taken)])
            if not full:
                seed[:count] = there[taken].reshape(-1)
            put(index, not everywhere or count < self.shape.rows)
            try:
                return self._evaluate(seed)
            except Exception:  # of some record, of which an error would tell (P6)
                prepared = -1
                fill.leave_out(put, self._evaluate, index.view(-1, k), seed.view(-1, k))
                return self._evaluate(seed)

        def fills(env: Env) -> Iterator[windows.Fill | None]:
            _, weights, keep = self._factors(env, bound, clipping, gamma)
            for at in self._order:
                yield None if at is None else self._fill(at, env, weights, keep, inverse, scale)

        def add_all(env: Env, whole: torch.Tensor) -> None:
            for window, add in zip(torch.split(whole, sizes), fills(env), strict=True):
                if add is not None:
                    add(window, 0)

        def total(chosen: npt.NDArray[np.int64]) -> Iterator[windows.Piece]:
            nonlocal held, streams
            self._swap()
            self.runner.refresh()
            if held is not None:
                held.zero_()
            for first in range(0, slots, units):
                env = evaluated(first, chosen)
                if streams is None:
                    streams = slots <= units and tiny is None and not self._shares(env)
                if streams:
                    yield from windows.filled(sizes, fills(env), dtype)
                    return
                if held is None:
                    held = torch.zeros(self.program.dimension, dtype=dtype)
                if tiny is not None:
                    tiny(env, bound, ROUNDING * bound / units, step, held)
                else:
                    add_all(env, held)
                del env  # before the next is made
            assert held is not None
            yield from windows.of(held)

        return total

    def _shares(self, env: Env) -> bool:
        """Whether what weighted sums are made of lies in the memory of the weights."""
        own = self.program.flat.untyped_storage().data_ptr()
        names: set[str] = set()
        for at in (at for at in self._order if at is not None):
            names.update(r for node in at.tail for r in self.runner.reads[node.name])
            if not at.site.way.formed:
                names.update(early.summed_of(self.runner, list(at.site.totals)))
        found = (env[name] for name in names if name in env)
        return any(t.untyped_storage().data_ptr() == own for t in found)


def analyse(
    program: Program, checked: Checked, records: Mapping[str, torch.Tensor]
) -> tuple[Noted, Proved]:
    """Forward and backward as a graph, and the proof of what its values are; ``Unfit`` or
    ``ModelError``. records: at least three made-up ones by data input."""
    few = [Program(program.graph, program.weights, b) for b in BATCHES]
    noted = note(program.graph, checked.values, few,
                 [{k: v[:b].clone() for k, v in records.items()} for b in BATCHES])  # fmt: skip
    return noted, prove(noted.joint)


def build(
    program: Program,
    checked: Checked,
    records: Mapping[str, torch.Tensor],
    shape: Shape,
    keep: bool,
) -> Batched:
    """The path for a model, or ``Unfit`` or ``ModelError`` where it cannot be taken.

    records: at least three made-up records by data input.
    """
    noted, proved = analyse(program, checked, records)
    return Batched(program, noted, proved, shape, keep)
