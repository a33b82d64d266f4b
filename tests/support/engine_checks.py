"""Properties of the engine as functions that assert: tests run them, seeded bugs must fail them.

Statistical checks state their false-alarm rate; each is at most 1e-6 a run.
"""

from __future__ import annotations

import itertools
import math

import numpy as np
import torch

from casemate.engine import clip, grid, keystream, sampling, train
from casemate.engine.program import Program
from casemate.spec.job import Execution, Plan, TrainSpec
from support import engine_lab as lab

# Two-sided normal quantile for 5e-7: two such comparisons in a run stay below 1e-6.
QUANTILE = 5.03
KEY = b"\x07" * 32


def make(sizes=(5, 4, 3), count=24, batch=8, steps=4, seed=0, **more):
    """A program, rows, spec and plan of a small MLP job."""
    graph, weights = lab.mlp(sizes, seed)
    schema = lab.schema(sizes[0], sizes[-1], count, units=more.get("units"), k=more.get("k", 1))
    table = lab.table(schema, seed)
    program = Program(graph, weights)
    rows = lab.rows_of((schema, table), graph=graph)
    if more.get("replayed", True):
        assert program.note(program.prefix({n: t[:1].clone() for n, t in rows.inputs.items()}))
    spec = lab.spec_of(batch, steps, clip=more.get("clip", 0.5), form=more.get("form", "flat"))
    plan = lab.plan_of(spec, rows.units, program.dimension, slots=more.get("slots"))
    return program, rows, spec, plan, table


def run(program, rows, spec: TrainSpec, plan: Plan, *, noise=lab.no_noise, key=KEY):
    """The engine's loop with the given noise; the flat weights, float32."""
    take = train.loop(plan, Execution(), spec, program, rows, key, noise, False)
    for step in range(plan.steps):
        take(step)
    return program.flat.clone()


def sum_of(program, rows, plan, chosen) -> torch.Tensor:
    gradients = train.PATHS["record"](program, rows.inputs, rows.count, False)
    found = np.asarray(chosen, dtype=np.int64)
    return train.grid_sum(plan, gradients, rows, found, program.dimension)


def forward(weights: dict[str, torch.Tensor], x: torch.Tensor, y: int) -> torch.Tensor:
    """The MLP of lab.mlp written again, with torch.nn.functional, on one record."""
    layers = len(weights) // 2
    for i in range(layers):
        x = torch.nn.functional.linear(x, weights[f"w{i}"], weights[f"b{i}"])
        x = torch.relu(x) if i < layers - 1 else x
    return torch.nn.functional.cross_entropy(x.unsqueeze(0), torch.tensor([y]))


def scaled(gradients, form: str, bound: float, gamma: float):
    """A unit's gradients, by name, as the forms of ``spec.job.Dp`` define them."""
    norms = {n: float((g**2).sum()) ** 0.5 for n, g in gradients.items()}
    norm = math.sqrt(sum(v**2 for v in norms.values()))
    if form == "per-layer":
        each = bound / math.sqrt(len(gradients))
        return {n: g * min(1.0, each / max(norms[n], 1e-300)) for n, g in gradients.items()}
    factor = bound / (norm + gamma) if form == "automatic" else min(1.0, bound / max(norm, 1e-300))
    return {n: g * factor for n, g in gradients.items()}


def reference(
    sizes, seed, table, plan: Plan, lr: float, who=None, k=1, form="flat", gamma=0.01
) -> torch.Tensor:
    """Abadi et al. 2016, Algorithm 1, without noise, in float64, one record at a time; a unit's
    gradient is the sum over its first k rows. The normaliser is the expected lot size L."""
    _, weights = lab.mlp(sizes, seed)
    weights = {n: t.double().requires_grad_() for n, t in weights.items()}
    order = [f"{c}{i}" for i in range(len(sizes) - 1) for c in "wb"]
    sample_key = keystream.subkey(KEY, sampling.PURPOSE)
    for step in range(plan.steps):
        total = {n: torch.zeros_like(t) for n, t in weights.items()}
        for unit in sampling.sample(sample_key, step, plan.units, plan.rate):
            members = [int(unit)] if who is None else np.flatnonzero(who == unit)[:k]
            if len(members) == 0:
                continue
            loss = sum(
                forward(weights, table["x"][r].double(), int(table["y"][r])).sum() for r in members
            )
            gradients = dict(
                zip(order, torch.autograd.grad(loss, [weights[n] for n in order]), strict=True)
            )
            for n, g in scaled(gradients, form, plan.clip, gamma).items():
                total[n] += g
        for n in order:
            weights[n] = (weights[n] - lr * total[n] / plan.normaliser).detach().requires_grad_()
    return torch.cat([weights[n].detach().reshape(-1) for n in order]).float()


def agrees_with_algorithm_1(**more) -> None:
    """The engine with zero noise has the reference's weights to 1e-5 (relative to their size)."""
    program, rows, spec, plan, table = make(steps=6, **more)
    form = more.get("form", "flat")
    who = table["who"].numpy() if "who" in table else None
    found = run(program, rows, spec, plan)
    expected = reference((5, 4, 3), 0, table, plan, spec.optimizer.lr, who, more.get("k", 1), form)
    assert torch.allclose(found, expected, rtol=1e-5, atol=1e-5), (found - expected).abs().max()
    start = Program(*lab.mlp((5, 4, 3))).flat
    assert (found - start).abs().max() > 1e-2  # it moved, so agreement means something


def contributions_are_alone() -> None:
    """P13 on sums: any set of units in any order sums to exactly the sum of its members alone."""
    program, rows, _, plan, _ = make(count=12, slots=12)
    alone = [sum_of(program, rows, plan, [u]) for u in range(12)]
    rng = np.random.default_rng(3)
    for size in (1, 2, 5, 11, 12):
        chosen = rng.permutation(12)[:size]
        expected = torch.stack([alone[u] for u in chosen]).sum(0)
        assert torch.equal(sum_of(program, rows, plan, chosen), expected), size


HOSTILE = [0.0, 1e-45, 1e-38, 1e-20, 1.0, 1e10, 1e19, 1e20, 3.4e38, math.inf, -math.inf, math.nan]


def clip_bounds_anything(dimension: int = 67, form: str = "flat", gamma: float = 0.01) -> None:
    """P3: whatever comes in, what joins the sum has norm at most the accounted sensitivity."""
    bound, step = 1.0, 2.0**-14
    clip_ = clip.FORMS[form]((3, dimension - 7, 4), gamma)
    limit = grid.sensitivity(bound, dimension, step)
    made = torch.Generator().manual_seed(1)
    for value, spread in itertools.product(HOSTILE, (0, 1, dimension)):
        x = torch.randn(dimension, generator=made, dtype=torch.float64)
        if spread:
            x[-spread:] = value
        else:
            x *= value
        clip_(x, bound)
        assert bool(torch.isfinite(x).all()), value
        assert float(torch.linalg.vector_norm(x)) <= bound * (1 + clip.eta(dimension)) * (1 + 1e-15)
        steps = grid.to_grid(x, step)
        norm = math.sqrt(sum(int(v) ** 2 for v in steps.tolist())) * step
        assert norm <= limit, (value, spread, norm, limit)


def small_contributions_stay() -> None:
    """Clipping leaves what is within the bound as it is, and keeps the direction of the rest."""
    x = torch.tensor([0.3, -0.4], dtype=torch.float64)
    y = x.clone()
    clip.clip(y, 0.5 + 1e-9)
    assert torch.equal(x, y)
    clip.clip(y, 0.25)
    assert torch.allclose(y, x / 2, rtol=1e-14)


def noise_has_the_plans_law() -> None:
    """Through the whole loop, with every row invalid: the update is the noise alone, and its
    standard deviation is plan.sigma / normaliser within 1.3%, draws of two steps uncorrelated.
    False alarm below 1e-6: two comparisons at 5.03 standard errors, n = 1e5."""
    wide = (60, 400, 60)
    program, rows, spec, plan, _ = make(wide, count=4, batch=2, steps=1)
    rows.valid[:] = False
    start = program.flat.clone()
    spec = lab.spec_of(2, 2, clip=0.5)
    plan = lab.plan_of(spec, 4, program.dimension)
    moves = []
    for steps in (1, 2):
        program.flat.copy_(start)
        shorter = lab.spec_of(2, steps, clip=0.5)
        train.train(
            lab.plan_of(shorter, 4, program.dimension), Execution(), shorter, program, rows, KEY
        )
        moves.append(program.flat.clone())
    first, second = (moves[0] - start).double(), (moves[1] - moves[0]).double()
    scale = spec.optimizer.lr * plan.sigma / plan.normaliser
    draws = torch.cat([first, second]) / scale
    n = draws.numel()
    ratio = float((draws**2).mean())
    assert abs(ratio - 1) < QUANTILE * math.sqrt(2 / n), ratio
    correlation = float((first * second).mean()) / scale**2
    assert abs(correlation) < QUANTILE / math.sqrt(n / 2), correlation


def sampling_is_poisson(units: int = 60, rate: float = 0.3, steps: int = 4000) -> None:
    """Sizes have the binomial's mean and variance (a fixed-size batch has variance 0) and each unit
    its rate, at 5.6 standard errors: 62 comparisons, false alarm below 1e-6 by the union bound."""
    key = keystream.subkey(KEY, sampling.PURPOSE)
    taken = np.zeros((steps, units), dtype=bool)
    for step in range(steps):
        taken[step, train.sampling.sample(key, step, units, rate)] = True
    size = taken.sum(axis=1)
    variance = units * rate * (1 - rate)
    quantile = 5.7
    assert abs(size.mean() - units * rate) < quantile * math.sqrt(variance / steps)
    assert abs(size.var() / variance - 1) < quantile * math.sqrt(2.1 / steps)
    each = math.sqrt(rate * (1 - rate) / steps)
    assert np.all(np.abs(taken.mean(axis=0) - rate) < quantile * each)


def amplifier(features: int = 6, width: int = 8):
    """The hostile model of P13, as a graph: tanh(1e12 (x@W - sum x*W)) * w. In exact arithmetic its
    gradient is zero; it turns rounding into signal."""
    from casemate.graph.model import Graph

    made = torch.Generator().manual_seed(5)
    weights = {
        "w": torch.randn(width, features, generator=made),
        "v": torch.randn(width, generator=made),
    }
    graph = Graph(
        inputs=(
            lab.param("w", width, features, kind="frozen"),
            lab.param("v", width),
            lab.data("x", "f32", features),
            lab.data("y", "i64"),
        ),
        nodes=(
            lab.node("a", "aten.linear.default", "%x", "%w"),
            lab.node("u", "aten.unsqueeze.default", "%x", 1),
            lab.node("p", "aten.mul.Tensor", "%u", "%w"),
            lab.node("b", "aten.sum.dim_IntList", "%p", [2]),
            lab.node("e", "aten.sub.Tensor", "%a", "%b"),
            lab.node("m", "aten.mul.Tensor", "%e", 1e12),
            lab.node("t", "aten.tanh.default", "%m"),
            lab.node("o", "aten.mul.Tensor", "%t", "%v"),
            lab.node("loss", "aten.sum.dim_IntList", "%o", [1]),
        ),
        loss="loss",
    )
    return graph, weights


def amplified_contributions_are_alone() -> None:
    """P13 against the amplifying model: contributions bit-equal in any company and any place."""
    graph, weights = amplifier()
    schema = lab.schema(6, 2, 16)
    table = lab.table(schema)
    program = Program(graph, weights)
    rows = lab.rows_of((schema, table), graph=graph)
    assert program.note(program.prefix({n: t[:1].clone() for n, t in rows.inputs.items()}))
    plan = lab.plan_of(lab.spec_of(8, 1), 16, program.dimension, slots=16)
    alone = [sum_of(program, rows, plan, [u]) for u in range(16)]
    assert any(bool(a.any()) for a in alone)  # the model does amplify rounding
    rng = np.random.default_rng(4)
    for size in (2, 7, 15, 16):
        chosen = rng.permutation(16)[:size]
        expected = torch.stack([alone[u] for u in chosen]).sum(0)
        assert torch.equal(sum_of(program, rows, plan, chosen), expected), size
