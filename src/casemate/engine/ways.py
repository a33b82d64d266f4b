"""The choice among a site's ways to norms: alike in every slot, accurate, within memory, quick.

A way is taken only if a unit's squared norm, its S and what is kept of it have the same bits in
every slot and beside any others (P13). What is tried is the way itself, on random operands of our
own at the run's shapes, strides and alignments: units are turned, and a quarter kept while the
others become huge, zero or NaN. Where none of a site's ways passes, its contractions are evaluated
one record at a time, which needs no trial.

A certified norm is too large by up to gamma S^2 / 2 n^2, and a clip factor as much too small: safe,
but not what was asked for. Of the quickest ways those give way that lose most for what they save,
until a unit of the operands at hand loses at most :data:`LOSS`. This is for accuracy alone; what a
way claims holds on any operands.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Final

import torch

from casemate.engine.forms import Env, Shape, Site, Tensor, Way
from casemate.engine.nodes import Runner, mapped
from casemate.engine.program import uses
from casemate.engine.trials import Slots, Spoil, place, rounds_for
from casemate.graph.model import Ref
from casemate.graph.ops import Value

# How much smaller than exact a factor may be; 1e-5 is asked of the sum, float32 takes its part.
LOSS: Final = 2.0**-17
_HOSTILE: Final = (0.0, math.nan, math.inf, -1e38)
_TIMES: Final = 3
_TIMED_SECONDS: Final = 0.1
_BEHIND: Final = 1.5


def fitting(site: Site, most: int) -> list[Way]:
    """The ways that keep at most that many bytes, or the one that keeps least."""
    return [w for w in site.ways if w.bytes <= most] or [min(site.ways, key=lambda w: w.bytes)]


# --- every slot alike ---


def _made(way: Way, env: Env, units: int) -> list[Tensor]:
    """What a way makes of each unit, (units, n): its norm, S, and what it keeps."""
    before = set(env)
    norm = way.norm(env)
    kept = [t for k, t in env.items() if k not in before and isinstance(t, torch.Tensor)]
    found = [norm.squared, *([] if norm.spread is None else [norm.spread]), *kept]
    return [t.reshape(units, -1) for t in found]


def alike(
    way: Way,
    env: Mapping[str, Any],
    operands: Mapping[str, Value],
    shape: Shape,
) -> bool:
    """Whether ``way`` gives a unit the same bits in every slot, whatever the other slots hold.

    env: operands as a run has them: integers are tried as they are, floats drawn. operands: those
    of records.
    """
    units = shape.units
    names = [n for n in operands if not operands[n].slot]
    slots = Slots([(env[n], operands[n]) for n in names], shape.rows, shape.per_unit)
    generator = torch.Generator().manual_seed(0)  # tries kernels, guards nothing

    def outputs(laid: list[Tensor]) -> list[Tensor]:
        return _made(way, {**env, **dict(zip(names, laid, strict=True))}, units)

    entries = sum(t.numel() for t in slots.own)
    for round_ in range(rounds_for(entries)):
        # Magnitudes of which squares are numbers.
        slots.draw(round_, generator, False, 20.0)
        order = torch.randperm(units, generator=generator)
        beside: Spoil = (-round_, (None, _HOSTILE[round_ % len(_HOSTILE)], math.nan))
        if not all(slots.alike(outputs, [order], [beside])):
            return False
    return True


class Trials:
    """:func:`alike` for ways of sites, once for each way, geometry and place of its operands."""

    def __init__(self, runner: Runner, shape: Shape) -> None:
        self.runner, self.shape = runner, shape
        self.known: dict[Any, bool] = {}
        self.generator = torch.Generator().manual_seed(0)  # tests kernels, guards nothing

    def __call__(self, site: Site, way: Way, env: Env) -> bool:
        if way.name == "loop":
            return True
        values, nodes = self.runner.proved.values, self.runner.sums_behind(list(site.totals))
        names = dict.fromkeys(r for node in nodes for r in uses(node) if r in env)
        operands = {n: values[n] for n in names if values[n].batch is not None}

        def of(arg: Any) -> Any:
            if not isinstance(arg, Ref):
                return arg
            there = arg.name in operands
            return (place(env[arg.name]), values[arg.name].batch) if there else "other"

        geometry = [
            (
                n.op,
                [mapped(a, of) for a in n.args],
                sorted((k, str(mapped(a, of))) for k, a in n.kwargs.items()),
            )
            for n in nodes
        ]
        key = (way.name, way.gamma, way.error, repr(geometry))
        if key not in self.known:
            self.known[key] = alike(way, env, operands, self.shape)
        return self.known[key]


# --- seconds, bytes, accuracy ---


def _seconds(site: Site, ways: Sequence[Way], env: Env, shape: Shape) -> dict[str, float]:
    """Of norm and sum, by way: the least of a few times; those far behind are not timed again."""
    weights, keep = torch.ones(shape.rows), torch.ones(shape.rows, dtype=torch.bool)
    best = {w.name: math.inf for w in ways}
    racing, begun = list(ways), time.thread_time()
    for round_ in range(_TIMES):
        for way in racing:
            start = time.thread_time()
            way.norm(env)
            for total in site.totals.values():
                total(env, weights, keep)
            best[way.name] = min(best[way.name], time.thread_time() - start)
        racing = [w for w in racing if best[w.name] < _BEHIND * min(best.values())]
        if len(racing) == 1 or (round_ and time.thread_time() - begun > _TIMED_SECONDS):
            break
    return best


Costs = Sequence[Mapping[str, float]]


def _lean(sites: Sequence[Site], costs: Costs, most: int) -> None:
    """Keep at most ``most`` bytes in all: what saves most bytes a second gives way."""
    while sum(s.way.bytes for s in sites) > most:
        swaps = [
            ((cost[w.name] - cost[s.way.name]) / (s.way.bytes - w.bytes), i, w)
            for i, (s, cost) in enumerate(zip(sites, costs, strict=True))
            for w in fitting(s, most)
            if w.bytes < s.way.bytes
        ]
        if not swaps:
            break
        _, i, way = min(swaps, key=lambda swap: swap[:2])
        sites[i].way = way


def losses(sites: Sequence[Site], env: Env, each: bool) -> tuple[list[Tensor], list[Tensor]]:
    """By site and unit, by what share the way taken may shrink the factor; and S^2 over what that
    is a share of: twice the squared norm of the whole, or of the site where ``each`` is clipped by
    itself. Units without a gradient have zeros."""
    norms = [site.way.norm(dict(env)) for site in sites]
    squared = [n.squared.clamp(min=0.0) for n in norms]
    whole = torch.stack(squared).sum(0)
    over = [n.squared if n.spread is None else n.spread.square() for n in norms]
    shares = [
        torch.nan_to_num(s / (2.0 * (n if each else whole)), 0.0, 0.0, 0.0)
        for s, n in zip(over, squared, strict=True)
    ]
    return [s * site.way.gamma for s, site in zip(shares, sites, strict=True)], shares


def _accurate(sites: Sequence[Site], costs: Costs, env: Env, most: int, each: bool) -> None:
    """Keep to :data:`LOSS`: what loses most for the seconds that it saves gives way."""
    lost, shares = losses(sites, env, each)
    while True:
        if each:
            over = {i for i, v in enumerate(lost) if float(v.max()) > LOSS}
        else:
            worst = torch.stack(lost).sum(0)
            over = set(range(len(sites))) if float(worst.max()) > LOSS else set()
        room = most - sum(s.way.bytes for s in sites)
        swaps = []
        for i in over:
            site, cost = sites[i], costs[i]
            for w in site.ways:
                # A formed gradient's own norm is exact.
                gain = lost[i] - shares[i] * w.gamma * (w.bytes == 0)
                if w.name in cost and float(gain.max()) > LOSS / 64 and w.bytes <= room:
                    dearer = max(cost[w.name] - cost[site.way.name], 1e-9)
                    swaps.append((float(gain.max()) / dearer, i, w))
        if not swaps:
            return
        _, i, way = max(swaps, key=lambda swap: swap[:2])
        lost[i] = shares[i] * way.gamma * (way.bytes == 0)
        sites[i].way = way


def plan(
    sites: Sequence[Site],
    env: Env,
    most: int,
    tried: Trials,
    alone: Callable[[Site], None],
    each: bool = False,
) -> None:
    """Take for every site the quickest of the ways that pass, as the module says, on these
    operands; formed gradients take at most ``most`` bytes in all.

    alone: gives a site the one way that is left, one record at a time. each: whether sites are
    clipped by themselves.
    """
    known: dict[Any, dict[str, float]] = {}
    while True:
        costs: list[dict[str, float]] = []
        for site in sites:
            ways = fitting(site, most)
            key = tuple((w.name, w.bytes, w.gamma) for w in ways)
            if key not in known:
                several = len(ways) > 1
                known[key] = (
                    _seconds(site, ways, dict(env), tried.shape) if several
                    else {ways[0].name: 0.0}
                )  # fmt: skip
            costs.append(known[key])
            site.way = min(ways, key=lambda w: known[key][w.name])
        _lean(sites, costs, most)
        _accurate(sites, costs, env, most, each)
        failed = [s for s in sites if not tried(s, s.way, env)]
        for site in failed:
            site.ways.remove(site.way)
            if not site.ways:
                alone(site)
        if not failed:
            break
    for site in sites:
        site.settle(site.way)
