"""What is drawn: noise and samples, as they show in what the real step releases."""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass
from typing import Final
from unittest import mock

import numpy as np
import torch
from scipy import stats

from audit import lab
from audit.lab import Job
from audit.law import count, counts, holds, lags, lengths, likely, normal, uncorrelated
from casemate.engine import noise as engine_noise
from casemate.engine import windows

_STEPS: Final = 3


def _wide(path: str) -> Job:
    return lab.job(lab.Wide(), lab.schema_of(5, 4), batch=2, steps=_STEPS, path=path, noise=0.8)


_wides: Final = {path: functools.partial(_wide, path) for path in ("auto", "record")}


def released(job: Job, key: bytes, plan_steps: int) -> np.ndarray:
    """What each step of a run adds where no unit adds anything, over sigma: (steps, d)."""
    table = lab.spoilt(lab.zeros(job.schema), slice(None))
    run = job.start(table, key)
    out, before = [], job.flat()
    for step in range(plan_steps):
        run(step)
        after = job.flat()
        out.append((before - after) * job.plan.normaliser / job.rate / job.plan.sigma)
        before = after
    return np.array(out)


def noise(seed: int) -> None:
    """Every entry of every tensor has the plan's noise in every step, and no draw tells of another:
    not across windows, tensors, steps or runs. Both paths; native and in numpy."""
    for what, path, helped in (
        ("graph", "auto", True), ("record", "record", True), ("numpy", "auto", False),
    ):  # fmt: skip
        job = lab.kept(_wides[path])
        with mock.patch.object(engine_noise, "_helper", engine_noise._helper if helped else _none):
            first = released(job, lab.key_of("noise", seed, what, 0), _STEPS)
            other = released(job, lab.key_of("noise", seed, what, 1), _STEPS)
        both = np.concatenate([first, other])
        sizes = lab.Wide.SIZES
        for i, part in enumerate(np.split(both, np.cumsum(sizes)[:-1], axis=1)):
            normal(part, f"noise, {what}, tensor {i}")
        for step, row in enumerate(both):
            normal(row, f"noise, {what}, step {step % _STEPS}")
            lags(row, f"noise, {what}, step {step % _STEPS}")
        lengths(both.T, f"noise, {what}, each entry")
        normal(both[:, : windows.WINDOW], f"noise, {what}, the first window")
        normal(both[:, windows.WINDOW :], f"noise, {what}, the second window")
        normal(both[:, -1:], f"noise, {what}, the last entry")
        for a in range(len(both)):
            for b in range(a):
                uncorrelated(both[a], both[b], f"noise, {what}, draws {a} and {b}")
        for lag in (1, 2, 3, 301):
            uncorrelated(both[:, lag:], both[:, :-lag], f"noise, {what}, entries {lag} apart")
        rest = both.shape[1] - windows.WINDOW
        uncorrelated(both[:, :rest], both[:, windows.WINDOW :], f"noise, {what}, two windows")


def _none() -> None:
    return None


UNITS: Final = 48
GRID: Final = 2.0**-12
CLIP: Final = 0.7  # not on the grid, so that what is not rounded to it shows
MULTIPLIER: Final = 0.05
MOST_STEPS: Final = 10_000_000


def _metered(path: str) -> Job:
    module = lab.Line(UNITS)
    schema = lab.schema_of(UNITS, UNITS)
    return lab.job(
        module, schema, batch=2, steps=MOST_STEPS, noise=MULTIPLIER, grid=GRID, path=path, lr=1.0,
        clip=CLIP,
    )  # fmt: skip


_meters: Final = {path: functools.partial(_metered, path) for path in ("auto", "record")}


@dataclass(frozen=True)
class Seen:
    """Of a metered run: taken (T, U), who was in each step; steps (T, U), what was released in grid
    steps; left (T, U), noise over sigma; off: how far from the grid an entry was at most."""

    taken: np.ndarray
    steps: np.ndarray
    left: np.ndarray
    off: float


def meter(job: Job, key: bytes, steps: int) -> Seen:
    """Unit u's gradient is along entry u, and noise is small beside it: each release shows who was
    sampled. The weights are put back after each step, so that each is of one step alone."""
    table = lab.zeros(job.schema)
    table["x"][:] = torch.eye(UNITS) * 2
    run = job.start(table, key)
    found = np.empty((steps, UNITS), dtype=np.float32)
    flat = job.ready.program.flat
    weights = flat.detach().numpy()
    for step in range(steps):
        run(step)
        found[step] = weights
        weights[:] = 0.0
    sums = -found.astype(np.float64) * job.plan.normaliser
    lattice = sums / job.plan.grid
    off = float(np.abs(lattice - np.rint(lattice)).max())
    taken = sums > job.plan.clip / 2
    each = np.rint(job.plan.clip / job.plan.grid) * job.plan.grid
    return Seen(taken, np.rint(lattice), (sums - each * taken) / job.plan.sigma, off)


def sampling(seed: int, steps: int = 20_000) -> None:
    """Poisson samples at the plan's rate, a public normaliser, noise in empty batches too, and
    nothing between the points of the grid: all read from what is released."""
    for path, share in (("auto", 1.0), ("record", 0.05)):
        job = lab.kept(_meters[path])
        seen = meter(job, lab.key_of("sampling", seed, path), int(steps * share))
        _samples(seen.taken, job.plan.rate, f"samples, {path}")
        _around(seen, f"release, {path}")


def _samples(taken: np.ndarray, rate: float, what: str) -> None:
    steps, units = taken.shape
    count(int(taken.sum()), taken.size, rate, f"{what}: units taken")
    counts(taken.sum(0), steps, rate, f"{what}: times that a unit is taken")
    size = taken.sum(1)
    count(int((size == 0).sum()), steps, (1 - rate) ** units, f"{what}: empty batches")
    for most in range(5):
        p = float(stats.binom.cdf(most, units, rate))
        count(int((size <= most).sum()), steps, p, f"{what}: batches of at most {most}")
    for lag in (1, 2, 3):
        for shift in range(2):  # pairs of steps that have none in common
            a = taken[shift * lag :][: (steps - shift * lag) // (2 * lag) * 2 * lag]
            a = a.reshape(-1, 2, lag, units)
            both = a[:, 0] & a[:, 1]
            count(int(both.sum()), both.size, rate**2, f"{what}: taken again {lag} later")
    for shift in range(2):
        a = taken[:, shift : units - units % 2 - shift].reshape(steps, -1, 2).all(2)
        count(int(a.sum()), a.size, rate**2, f"{what}: neighbours taken together")
    together = (taken.T.astype(np.float32) @ taken.astype(np.float32)).astype(np.int64)
    pairs = together[np.triu_indices(units, 1)]
    counts(pairs, steps, rate**2, f"{what}: two units taken together")
    epoch = int(1 / rate)
    blocks = taken[: steps // epoch * epoch].reshape(-1, epoch, units).sum(1)
    none = float((1 - rate) ** epoch)
    count(int((blocks == 0).sum()), blocks.size, none, f"{what}: units that an epoch leaves out")


def _around(seen: Seen, what: str) -> None:
    taken, left = seen.taken, seen.left
    size = taken.sum(1)
    holds(seen.off < 1e-2, f"{what}: an entry lies {seen.off:.3g} grid steps off the grid")
    for bit in range(4):  # of a wide draw all bits below its size are fair, whatever the data
        ones = int(((seen.steps.astype(np.int64) >> bit) & 1).sum())
        count(ones, seen.steps.size, 0.5, f"{what}: bit {bit} of the lattice")
    normal(left, f"{what}: noise")
    lengths(left, f"{what}: noise of each step")
    for members in range(5):
        part = left[size == members]
        if len(part):
            normal(part, f"{what}: noise and normaliser in batches of {members}")
    normal(left[taken], f"{what}: what a unit adds")
    normal(left[:, :1], f"{what}: noise in the first entry")
    normal(left[:, -1:], f"{what}: noise in the last entry")
    uncorrelated(left[1:], left[:-1], f"{what}: noise of steps that follow")
    uncorrelated(left[:, 1:], left[:, :-1], f"{what}: noise of entries side by side")
    # Noise and samples have keys of their own: a pair's radius tells of nobody's place.
    radius = left.reshape(len(left), -1, 2)
    radius = (radius**2).sum(2)  # of two normals: exponential with mean 2
    for name, mine in (("first", taken[:, ::2]), ("second", taken[:, 1::2])):
        for rows, of in ((radius, mine), (radius[1:], mine[:-1]), (radius[:-1], mine[1:])):
            mean, n = float(rows[of].sum()), int(of.sum())
            p = 2 * min(stats.gamma.cdf(mean, n, scale=2), stats.gamma.sf(mean, n, scale=2))
            likely(p if n else 1.0, f"{what}: noise where the pair's {name} unit is taken")
    size_of = np.clip(size, 0, 4)
    drift = np.corrcoef(size_of, left.sum(1))[0, 1] if size_of.std() else 0.0
    t = drift * math.sqrt(len(left) - 2) / math.sqrt(max(1e-300, 1 - drift * drift))
    likely(2 * stats.t.sf(abs(t), len(left) - 2), f"{what}: the sum tells the batch's size")
