"""Privacy bugs put in on purpose, over the real code: each has to be caught by the battery.

A bug is a function of a ``pytest.MonkeyPatch``. Where the real thing is native code, the bug sits
at the Python seam in front of it; its name says what a build with it would do.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import math
import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import pytest
import torch

from audit import battery, lab, rest
from casemate.accounting import calibrate, filters, pld, rdp
from casemate.accounting.filters import RdpFilter
from casemate.client import receipts
from casemate.engine import (
    batched,
    clip,
    compiled,
    draws,
    fill,
    forms,
    grid,
    kernels,
    keystream,
    noise,
    optim,
    prepare,
    private,
    probe,
    products,
    rows,
    sampling,
    small,
    state,
    train,
    views,
)
from casemate.engine.capture import table as tables
from casemate.ledger import admission, catalog, ledger
from casemate.plan import compile as plans
from casemate.plan import state as state_form
from casemate.server import release
from casemate.spec import codec, rules, tensors
from casemate.spec.data import MAX_RESUMES
from casemate.spec.job import Charge
from casemate.worker import session

Patch = pytest.MonkeyPatch


@dataclass(frozen=True)
class Bug:
    """seed: puts it in. checks: those meant to catch it, tried first."""

    name: str
    checks: tuple[str, ...]
    seed: Callable[[Patch], None]


BUGS: Final[dict[str, Bug]] = {}


def bug(name: str, *checks: str) -> Callable[[Callable[[Patch], None]], Callable[[Patch], None]]:
    def add(seed: Callable[[Patch], None]) -> Callable[[Patch], None]:
        assert name not in BUGS and set(checks) <= set(battery.CHECKS)
        BUGS[name] = Bug(name, checks, seed)
        return seed

    return add


def forget() -> None:
    """Nothing that was computed with or without a bug is taken for the other."""
    lab.forget()
    rest.worker.cache_clear()
    for kept in (
        calibrate.noise_multiplier, filters.capacities, rdp.step_curve, pld._epsilon,
        noise._subkeys,
    ):  # fmt: skip
        with contextlib.suppress(AttributeError):
            kept.cache_clear()


@contextlib.contextmanager
def seeded(name: str) -> Iterator[None]:
    """The bug is in, for the time being."""
    forget()
    try:
        with pytest.MonkeyPatch.context() as patch:
            BUGS[name].seed(patch)
            yield
    finally:
        forget()


def find(name: str, seed: int = 1, steps: int = 4000) -> battery.Finding | None:
    """By which check a bug is caught: those meant for it, then all others."""
    first = BUGS[name].checks
    with seeded(name):
        for check in (*first, *(c for c in battery.CHECKS if c not in first)):
            if (found := battery.one(check, seed, steps)) is not None:
                return found
    return None


def _rng(key: bytes, *more: int) -> np.random.Generator:
    raw = hashlib.sha256(key + repr(more).encode()).digest()
    return np.random.default_rng(np.frombuffer(raw, dtype="<u4"))


# --- samples

Sample = Callable[[bytes, int, int, float], np.ndarray]


def _sampled(name: str, change: Callable[[Sample], Sample], *checks: str) -> None:
    @bug(name, *(checks or ("sampling", "known samples")))
    def seed(patch: Patch) -> None:
        patch.setattr(sampling, "sample", change(sampling.sample))


def _shuffled(key: bytes, step: int, units: int, rate: float) -> np.ndarray:
    epoch = max(1, round(1 / rate))
    turn, part = divmod(step, epoch)
    return np.sort(_rng(key, turn).permutation(units)[part::epoch])


def _of_one_size(key: bytes, step: int, units: int, rate: float) -> np.ndarray:
    size = round(units * rate)
    return np.sort(_rng(key, step).choice(units, size, replace=False)).astype(np.int64)


def _with_replacement(key: bytes, step: int, units: int, rate: float) -> np.ndarray:
    return np.unique(_rng(key, step).integers(0, units, round(units * rate)))


_sampled("batches are shuffled, not sampled", lambda real: _shuffled)
_sampled("batches have one size", lambda real: _of_one_size)
_sampled("batches are drawn with replacement", lambda real: _with_replacement)
_sampled(
    "the rate is a tenth too high", lambda real: lambda k, t, n, q: real(k, t, n, min(1.0, q * 1.1))
)
_sampled(
    "the rate is rounded up to sixteenths",
    lambda real: lambda k, t, n, q: real(k, t, n, math.ceil(q * 16) / 16),
)
_sampled("a sample is used for two steps", lambda real: lambda k, t, n, q: real(k, t // 2, n, q))
_sampled(
    "who was in the last step is left out",
    lambda real: (
        lambda k, t, n, q: np.setdiff1d(real(k, t, n, q), real(k, t - 1, n, q) if t else [])
    ),
)
_sampled(
    "neighbours are sampled together",
    lambda real: (
        lambda k, t, n, q: np.array(
            [u for p in real(k, t, (n + 1) // 2, q) for u in (2 * p, 2 * p + 1) if u < n],
            dtype=np.int64,
        )
    ),
)
_sampled(
    "no batch is empty",
    lambda real: (
        lambda k, t, n, q: (
            found if len(found := real(k, t, n, q)) else np.array([t % n], dtype=np.int64)
        )
    ),
)
_sampled(
    "the first unit is in every sample",
    lambda real: lambda k, t, n, q: np.union1d(real(k, t, n, q), [0]),
)


@bug("noise and samples come from one stream", "sampling")
def _one_stream(patch: Patch) -> None:
    real = keystream.subkey
    patch.setattr(keystream, "subkey", lambda key, purpose: real(key, "all"))


# --- noise

Add = Callable[..., None]


def _noised(name: str, change: Callable[[Add], Add], *checks: str) -> None:
    @bug(name, *(checks or ("noise", "sampling")))
    def seed(patch: Patch) -> None:
        patch.setattr(noise, "add_gaussian", change(noise.add_gaussian))


def _some(real: Add, where: Callable[[int], slice]) -> Add:
    def add(total: np.ndarray, key: bytes, step: int, scale: float, first: int = 0) -> None:
        made = np.zeros_like(total)
        real(made, key, step, scale, first)
        part = where(len(total))
        total[part] += made[part]

    return add


def _instead(draw: Callable[[np.random.Generator, int], np.ndarray]) -> Callable[[Add], Add]:
    def change(real: Add) -> Add:
        def add(total: np.ndarray, key: bytes, step: int, scale: float, first: int = 0) -> None:
            made = draw(_rng(key, step, first), len(total))
            total += np.rint(made * scale).astype(np.int64)

        return add

    return change


def _twins(real: Add) -> Add:
    def add(total: np.ndarray, key: bytes, step: int, scale: float, first: int = 0) -> None:
        made = np.zeros_like(total)
        real(made, key, step, scale, first)
        made[1::2] = made[::2][: len(made[1::2])]
        total += made

    return add


def _coarse(real: Add) -> Add:
    def add(total: np.ndarray, key: bytes, step: int, scale: float, first: int = 0) -> None:
        made = np.zeros_like(total)
        real(made, key, step, scale, first)
        total += np.rint(made / 8).astype(np.int64) * 8

    return add


def _scaled(by: Callable[[int], float]) -> Callable[[Add], Add]:
    return lambda real: (
        lambda total, key, step, scale, first=0: real(total, key, step, scale * by(step), first)
    )


_noised("noise is 3% too small", _scaled(lambda step: 0.97))
_noised("noise is that of the clip, not of the sensitivity", _scaled(lambda step: 1 / 1.0156))
_noised("noise decays with the steps", _scaled(lambda step: 0.9999**step))
_noised("every second step has no noise", lambda real: lambda total, key, step, scale, first=0: (
    real(total, key, step, scale, first) if step % 2 == 0 else None))  # fmt: skip
_noised("each step has the same noise", lambda real: lambda total, key, step, scale, first=0: real(
    total, key, 0, scale, first))  # fmt: skip
_noised("each window has the same noise", lambda real: lambda total, key, step, scale, first=0: (
    real(total, key, step, scale, 0)))  # fmt: skip
_noised("only the first window has noise", lambda real: lambda total, key, step, scale, first=0: (
    real(total, key, step, scale, 0) if first == 0 else None))  # fmt: skip
_noised("the first tensors have no noise", lambda real: _some(real, lambda n: slice(6, None)))
_noised("the last entry has no noise", lambda real: _some(real, lambda n: slice(0, n - n % 2)))
_noised("every tenth entry has no noise", lambda real: lambda total, *a: [
    _some(real, lambda n, i=i: slice(i, None, 10))(total, *a) for i in range(9)])  # fmt: skip
_noised("two entries share one draw", _twins)
_noised("noise is coarser than the grid", _coarse, "sampling")
_noised("noise is Laplace's", _instead(lambda rng, n: rng.laplace(0, math.sqrt(0.5), n)))
_noised("noise is uniform", _instead(lambda rng, n: rng.uniform(-math.sqrt(3), math.sqrt(3), n)))
_noised("noise is cut off at three sigma", _instead(
    lambda rng, n: np.clip(rng.normal(size=n), -3, 3)))  # fmt: skip
_noised("the noise of a run is that of any other", lambda real: (
    lambda total, key, step, scale, first=0: real(total, bytes(32), step, scale, first)),
    "noise", "keys")  # fmt: skip


@bug("noise is added to the mean, in floating point", "sampling")
def _float_noise(patch: Patch) -> None:
    real, held = optim.optimizer, dict[str, Any]()

    def add(total: np.ndarray, key: bytes, step: int, scale: float, first: int = 0) -> None:
        held["draw"] = _rng(key, step, first).normal(size=len(total)) * scale

    applied = train.applied

    def apply(weights: Any, add: Any, update: Any, factor: float) -> Any:
        held["factor"] = factor
        return applied(weights, add, update, factor)

    def optimizer(*args: Any) -> optim.Update:
        made = real(*args)

        def update(weights: Any, gradient: torch.Tensor, step: int, first: int) -> None:
            if "factor" in held:
                drawn = held["draw"] * held["factor"]
                gradient = gradient + torch.from_numpy(drawn).float()
            made.apply(weights, gradient, step, first)

        return optim.Update(update, made.state)

    patch.setattr(noise, "add_gaussian", add)
    patch.setattr(train, "applied", apply)
    patch.setattr(optim, "optimizer", optimizer)


class _Sizes:
    """What the last sample was, for bugs that use it."""

    def __init__(self, patch: Patch) -> None:
        self.size, self.mean = 0, 1.0
        real = sampling.sample

        def sample(key: bytes, step: int, units: int, rate: float) -> np.ndarray:
            found = real(key, step, units, rate)
            self.size, self.mean = len(found), units * rate
            return found

        patch.setattr(sampling, "sample", sample)


@bug("empty batches have no noise", "sampling")
def _empty(patch: Patch) -> None:
    sizes, real = _Sizes(patch), noise.add_gaussian
    patch.setattr(noise, "add_gaussian", lambda *a: real(*a) if sizes.size else None)


@bug("noise follows the batch that was sampled", "sampling")
def _by_size(patch: Patch) -> None:
    sizes, real = _Sizes(patch), noise.add_gaussian

    def add(total: np.ndarray, key: bytes, step: int, scale: float, first: int = 0) -> None:
        real(total, key, step, scale * math.sqrt(max(1, sizes.size) / sizes.mean), first)

    patch.setattr(noise, "add_gaussian", add)


def _updated(patch: Patch, change: Callable[[torch.Tensor, int], torch.Tensor]) -> None:
    """The gradient that the optimizer sees is another."""
    real = optim.optimizer

    def optimizer(*args: Any) -> optim.Update:
        made = real(*args)

        def update(weights: Any, gradient: torch.Tensor, step: int, first: int) -> None:
            made.apply(weights, change(gradient, step), step, first)

        return optim.Update(update, made.state)

    patch.setattr(optim, "optimizer", optimizer)


@bug("the sum is divided by the batch that was sampled", "sampling")
def _data_dependent(patch: Patch) -> None:
    sizes = _Sizes(patch)
    _updated(patch, lambda g, step: g * (sizes.mean / max(1, sizes.size)))


@bug("the batch's size is in one entry", "sampling")
def _size_leaks(patch: Patch) -> None:
    sizes = _Sizes(patch)

    def change(gradient: torch.Tensor, step: int) -> torch.Tensor:
        out = gradient.clone()
        out[0] += 1e-3 * sizes.size
        return out

    _updated(patch, change)


# --- what a unit adds


def _clipping(name: str, form: str, made: Callable[..., clip.Clip], *checks: str) -> None:
    @bug(name, *(checks or ("sensitivity",)))
    def seed(patch: Patch) -> None:
        patch.setattr(clip, "FORMS", {**clip.FORMS, form: made})


def _half(x: torch.Tensor, bound: float) -> None:
    if not bool(torch.isfinite(x).all()):
        x.zero_()
    norm = float(torch.linalg.vector_norm(x.half()))
    if norm > bound:
        x.mul_(bound / norm)


def _by_largest(x: torch.Tensor, bound: float) -> None:
    if not bool(torch.isfinite(x).all()):
        x.zero_()
    norm = float(x.abs().max())
    if norm > bound:
        x.mul_(bound / norm)


_clipping("nothing is clipped", "flat", lambda sizes, gamma: lambda x, bound: None)
_clipping("norms are in half precision", "flat", lambda sizes, gamma: _half)
_clipping("the norm is the largest entry", "flat", lambda sizes, gamma: _by_largest)
_clipping("the clip is twice the bound", "flat", lambda s, g: lambda x, b: clip.clip(x, 2 * b))
_clipping("automatic clipping forgets the norm", "automatic",
          lambda sizes, gamma: lambda x, bound: x.mul_(bound / gamma))  # fmt: skip


@bug("each layer has the whole bound", "sensitivity")
def _whole_bound(patch: Patch) -> None:
    for module in (clip, batched):
        patch.setattr(module, "share", lambda bound, tensors: bound)


@bug("the sum is clipped, not its parts", "sensitivity", "algorithm")
def _after_the_sum(patch: Patch) -> None:
    def clipped_sum(count: int, bound: float, step: float, gradients: Any, rows: Any, chosen: Any,
                    dimension: int, how: Any = None) -> torch.Tensor:  # fmt: skip
        total = torch.zeros(dimension, dtype=torch.float64)
        for real, contribution in train._slots(count, gradients, rows, chosen, dimension):
            if real and bool(torch.isfinite(contribution).all()):
                total += contribution
        (how or clip.clip)(total, bound * max(1, len(chosen)))
        return grid.to_grid(total, step)

    patch.setattr(train, "clipped_sum", clipped_sum)


@bug("rows are clipped, not units", "units")
def _rows_not_units(patch: Patch) -> None:
    def slots(count: int, gradients: Any, rows: Any, chosen: Any, dimension: int) -> Any:
        one, out = torch.empty(dimension), torch.empty(dimension, dtype=torch.float64)
        for unit in chosen[:count]:
            for row in rows.of_unit(int(unit)):
                gradients(int(row), one)
                out.copy_(one)
                yield True, out

    patch.setattr(train, "_slots", slots)


@bug("free places count", "algorithm")
def _free_places(patch: Patch) -> None:
    real = train._slots

    def slots(count: int, gradients: Any, rows: Any, chosen: Any, dimension: int) -> Any:
        one = torch.empty(dimension)
        for taken, made in real(count, gradients, rows, chosen, dimension):
            if not taken:
                gradients(-1, one)
                made.copy_(one)
            yield True, made

    patch.setattr(train, "_slots", slots)


@bug("free places count, in a microbatch", "algorithm")
def _seed_of_ones(patch: Patch) -> None:
    real = batched.Batched._evaluate
    patch.setattr(
        batched.Batched, "_evaluate", lambda self, seed: real(self, torch.ones_like(seed))
    )


@bug("what is not a number is let through", "sensitivity", "no numbers")
def _not_a_number(patch: Patch) -> None:
    def squared(contribution: torch.Tensor) -> float:
        found = float(torch.dot(contribution, contribution))
        return found if math.isfinite(found) else 0.0

    patch.setattr(clip, "_squared", squared)


def _factors(name: str, change: Callable[[Any, Any], tuple[Any, Any]], *checks: str) -> None:
    """Of the path ``graph``, whose smallest native step is left out for that."""

    @bug(name, *(checks or ("sensitivity",)))
    def seed(patch: Patch) -> None:
        real = batched.factors
        patch.setattr(batched, "factors", lambda *a: change(*real(*a)))
        patch.setattr(small, "build", lambda *a: None)


_factors("clip factors are not applied", lambda c, good: (torch.ones_like(c), good))
_factors("clip factors are in bfloat16", lambda c, good: (c.bfloat16().float(), good))
_factors("clip factors are the neighbour's", lambda c, good: (c.roll(1), good))
_factors("clip factors are rounded up by a thousandth", lambda c, good: (c * 1.001, good))
_factors("infinite records are not blanked", lambda c, good: (c, torch.ones_like(good)))


@bug("the native step clips at 1.02 of the bound", "sensitivity")
def _native(patch: Patch) -> None:
    real = small.Small.__call__
    patch.setattr(
        small.Small, "__call__",
        lambda self, env, bound, *rest: real(self, env, bound * 1.02, *rest),
    )  # fmt: skip


@bug("norms by cancellation are trusted", "cancellation")
def _no_gamma(patch: Patch) -> None:
    real = batched.factors

    def careless(found: Any, norms: Any, bound: float, units: int, *more: Any) -> Any:
        for site in found:
            site.way = dataclasses.replace(site.way, gamma=0.0, error=1e-30, scaled=False)
        n2 = [forms.Norm(n.squared.clamp(min=1e-30), n.spread) for n in norms]
        return real(found, n2, bound, units, *more)

    patch.setattr(batched, "factors", careless)


@bug("kernels depend on the slot", "slots")
def _never_probed(patch: Patch) -> None:
    patch.setattr(batched, "prober", lambda *a: lambda *b: None)
    patch.setattr(products, "chooser", lambda *a: lambda *b: None)


@bug("the sum is not put on the grid", "sampling")
def _no_grid(patch: Patch) -> None:
    """What rounding takes from the sum comes back after the noise."""
    real, finish, rest_ = grid.to_grid, kernels.finish, {}

    def to_grid(contribution: torch.Tensor, step: float) -> torch.Tensor:
        exact = contribution / step
        made = real(contribution, step)
        rest_["left"] = rest_.get("left", 0) + exact - made
        return made

    def finished(total: torch.Tensor, factor: float, mean: torch.Tensor) -> None:
        finish(total, factor, mean)
        mean += (rest_.pop("left", torch.zeros(len(mean))) * factor).float()

    patch.setattr(grid, "to_grid", to_grid)
    patch.setattr(kernels, "finish", finished)


@bug("the grid's rounding is not accounted", "rounding")
def _no_rounding(patch: Patch) -> None:
    for path in ("graph", "record"):
        patch.setitem(train.SENSITIVITY, path, lambda bound, dimension, step: bound * (1 + 1e-6))


@bug("each view has a clip of its own", "random inputs")
def _clip_by_view(patch: Patch) -> None:
    real = train._sums

    def sums(
        plan: Any, path: str, program: Any, rows: Any, keep: bool, fast: Any, drawn: Any
    ) -> Any:
        count = 1 if drawn is None else drawn.views
        more = dataclasses.replace(plan, clip=plan.clip * count)
        return real(more, path, program, rows, keep, fast, drawn)

    patch.setattr(train, "_sums", sums)


@bug("dropout's masks go by the slot", "random inputs")
def _masks_by_slot(patch: Patch) -> None:
    real = draws.Draws.fill

    def fill(self: Any, buffers: Any, rows: np.ndarray, view: np.ndarray) -> None:
        inner = (rows >= 0).cumsum() - 1
        real(self, buffers, np.where(rows >= 0, inner, -1), view)

    patch.setattr(draws.Draws, "fill", fill)


@bug("the clip follows the last record's norm", "sensitivity", "state")
def _adaptive(patch: Patch) -> None:
    held = {"norm": 0.0}

    def adaptive(x: torch.Tensor, bound: float) -> None:
        norm = float(torch.linalg.vector_norm(x))
        clip.clip(x, bound * (1 + 0.1 * math.tanh(held["norm"])))
        held["norm"] = norm if math.isfinite(norm) else 0.0

    patch.setattr(clip, "FORMS", {**clip.FORMS, "flat": lambda sizes, gamma: adaptive})


# --- what is kept and what leaves


class _Raw:
    """The last step's sum before its noise, in units of the mean."""

    def __init__(self, patch: Patch) -> None:
        self.raw: torch.Tensor = torch.zeros(1)
        self.factor = 1.0
        add, applied = noise.add_gaussian, train.applied

        def noised(total: np.ndarray, *rest: Any) -> None:
            self.raw = torch.from_numpy(total.astype(np.float32))
            add(total, *rest)

        def apply(weights: Any, add: Any, update: Any, factor: float) -> Any:
            self.factor = factor
            return applied(weights, add, update, factor)

        patch.setattr(noise, "add_gaussian", noised)
        patch.setattr(train, "applied", apply)

    @property
    def mean(self) -> torch.Tensor:
        return self.raw * self.factor


@bug("momentum is of raw gradients", "optimizer")
def _raw_momentum(patch: Patch) -> None:
    raw, real = _Raw(patch), optim.optimizer

    def optimizer(*args: Any) -> optim.Update:
        made = real(*args)

        def update(weights: Any, gradient: torch.Tensor, step: int, first: int) -> None:
            made.apply(weights, gradient, step, first)
            for vector in made.state.values():
                vector[first : first + len(gradient)] += 0.1 * (raw.mean - gradient)

        return optim.Update(update, made.state)

    patch.setattr(optim, "optimizer", optimizer)


@bug("the average takes raw gradients in", "optimizer")
def _raw_average(patch: Patch) -> None:
    raw, real = _Raw(patch), optim.Average.add
    patch.setattr(optim.Average, "add", lambda self, w: real(self, w - raw.mean * 0.1))


@bug("the state keeps the raw sum", "state")
def _raw_state(patch: Patch) -> None:
    raw, real = _Raw(patch), state.write

    def write(plan: Any, spec: Any, step: int, vectors: Mapping[str, torch.Tensor]) -> Any:
        weights = vectors["weights"].detach()
        return real(plan, spec, step, {**vectors, "weights": weights + raw.mean * 1e-3})

    patch.setattr(state, "write", write)


def _with_rows(patch: Patch) -> dict[str, Any]:
    held: dict[str, Any] = {}
    real = train._sums

    def sums(plan: Any, path: str, program: Any, rows: Any, *more: Any) -> Any:
        held["rows"], held["program"] = rows, program
        return real(plan, path, program, rows, *more)

    patch.setattr(train, "_sums", sums)
    return held


@bug("the loss is in the weights' last bits", "state")
def _loss_leaks(patch: Patch) -> None:
    held, real = _with_rows(patch), train.Run.__call__

    def call(self: train.Run, step: int) -> None:
        real(self, step)
        with torch.no_grad():
            self.program.flat[0] += 1e-6 * float(held["rows"].inputs["target"].sum())

    patch.setattr(train.Run, "__call__", call)


@bug("buffers follow the data", "state")
def _buffers(patch: Patch) -> None:
    held, real = _with_rows(patch), train.Run.__call__

    def call(self: train.Run, step: int) -> None:
        real(self, step)
        trained = {s.tensor for s in self.program.trained}
        for name, tensor in self.program.weights.items():
            if name not in trained:
                tensor.mul_(0.9).add_(0.1 * float(held["rows"].inputs["x"].nanmean()))

    patch.setattr(train.Run, "__call__", call)


@bug("the result has one tensor more", "state")
def _more_leaves(patch: Patch) -> None:
    real = train.Run.result
    patch.setattr(train.Run, "result", lambda self: {**real(self), "loss": torch.zeros(1)})


@bug("the last step has no noise", "noise")
def _last_step(patch: Patch) -> None:
    real = train.loop

    def loop(plan: Any, execution: Any, spec: Any, program: Any, rows: Any, key: bytes, add: Any,
             *more: Any) -> Any:  # fmt: skip
        def but_last(step: int, first: int, total: np.ndarray) -> None:
            if step < plan.steps - 1:
                add(step, first, total)

        return real(plan, execution, spec, program, rows, key, but_last, *more)

    patch.setattr(train, "loop", loop)


class _Fixed:
    def bytes(self, count: int) -> bytes:
        return b"\x01" * count


@bug("every job of the worker has the same key", "keys")
def _worker_key(patch: Patch) -> None:
    patch.setattr(session, "OsRng", _Fixed)


@bug("every run of the library has the same key", "keys")
def _library_key(patch: Patch) -> None:
    patch.setattr(private, "OsRng", _Fixed)


# --- what is accounted


def _accounting(name: str, *checks: str) -> Callable[[Callable[[Patch], None]], Any]:
    return bug(name, *(checks or ("accounting",)))


@_accounting("the accountant counts half of the steps")
def _half_steps(patch: Patch) -> None:
    real = filters.nano
    patch.setattr(filters, "nano", lambda events: real(
        [dataclasses.replace(e, steps=max(1, e.steps // 2)) for e in events]))  # fmt: skip


@_accounting("steps compose as their root")
def _root(patch: Patch) -> None:
    real = filters.nano
    patch.setattr(filters, "nano", lambda events: real(
        [dataclasses.replace(e, steps=math.isqrt(e.steps)) for e in events]))  # fmt: skip


@_accounting("the accountant amplifies twice")
def _twice(patch: Patch) -> None:
    real = rdp.step_curve
    patch.setattr(rdp, "step_curve", lambda rate, s: real(rate * rate, s))


@_accounting("the accountant takes more noise than there is")
def _more_noise(patch: Patch) -> None:
    real = rdp.step_curve
    patch.setattr(rdp, "step_curve", lambda rate, s: real(rate, min(s * 1.25, rdp.MAX_NOISE)))


@_accounting("the curve lacks its factor of a half")
def _curve_halved(patch: Patch) -> None:
    real = rdp.step_curve
    patch.setattr(rdp, "step_curve", lambda rate, s: tuple(x / 2 for x in real(rate, s)))


@_accounting("delta is not paid for")
def _no_delta(patch: Patch) -> None:
    real = filters.capacities
    patch.setattr(filters, "capacities", lambda epsilon, delta: real(epsilon, 1e-2))


@_accounting("the noise is 5% below what epsilon asks")
def _calibrated_low(patch: Patch) -> None:
    for module in (calibrate, plans):
        real = module.noise_multiplier
        patch.setattr(module, "noise_multiplier", lambda *a, real=real: real(*a) * 0.95)


@_accounting("the tight epsilon forgets one step in ten")
def _pld_steps(patch: Patch) -> None:
    real = pld._compose
    patch.setattr(pld, "_compose", lambda one, steps: real(one, max(1, steps * 9 // 10)))


@_accounting("the tight epsilon is rounded the wrong way")
def _optimistic(patch: Patch) -> None:
    from dp_accounting.pld import privacy_loss_distribution as theirs

    real = theirs.from_gaussian_mechanism

    def made(**given: Any) -> Any:
        given |= {"pessimistic_estimate": False, "use_connect_dots": False}
        return real(**given)

    patch.setattr(theirs, "from_gaussian_mechanism", made)


@_accounting("the library counts one step less")
def _library_steps(patch: Patch) -> None:
    real = private.Private.spent
    patch.setattr(
        private.Private, "spent", lambda self, steps, *a: real(self, max(0, steps - 1), *a)
    )


@_accounting("the library's noise is for another delta")
def _library_delta(patch: Patch) -> None:
    real = private.noise_for
    patch.setattr(private, "noise_for", lambda q, n, e, d, *a: real(q, n, e, d * 100, *a))
    patch.setattr(private, "MAX_EPSILON", 1000.0)


@_accounting("the plan accounts half of its rate")
def _half_rate(patch: Patch) -> None:
    real = plans.compile_plan

    def compile_plan(*a: Any) -> Any:
        plan = real(*a)
        events = tuple(dataclasses.replace(e, rate=e.rate / 2) for e in plan.events)
        return dataclasses.replace(plan, events=events)

    patch.setattr(plans, "compile_plan", compile_plan)
    patch.setattr(train, "check_plan", lambda *a: None)


@bug("plans are not checked", "plans")
def _unchecked(patch: Patch) -> None:
    patch.setattr(train, "check_plan", lambda *a: None)


@bug("a step has room for the mean batch only", "plans")
def _little_room(patch: Patch) -> None:
    patch.setattr(
        plans, "capacity", lambda units, rate, steps, part: max(1, math.ceil(units * rate))
    )


@bug("the filter forgets earlier jobs", "accounting", "charges")
def _forgets(patch: Patch) -> None:
    real = RdpFilter.admits
    patch.setattr(
        RdpFilter, "admits", lambda self, spent, delta, charge: real(self, self.empty(), 0, charge)
    )


@bug("a job that fails is refunded", "charges")
def _refunds(patch: Patch) -> None:
    real = ledger.abandon

    def abandon(store: Any, id: str, *rest_: Any, **more: Any) -> Any:
        sql = (
            "SELECT lineage, charge, scientist FROM job_datasets JOIN jobs ON id = job"
            " WHERE job = ?"
        )
        for lineage, raw, scientist in store.all(sql, id):
            charge = codec.decode(Charge, raw)
            for whose in (catalog.EVERYONE, scientist):
                had = catalog.account(store, lineage, whose)
                left = tuple(a - b for a, b in zip(had.rdp_nano, charge.rdp_nano, strict=True))
                back = catalog.Account(left, had.delta_femto - charge.delta_femto, had.jobs - 1)
                with store.transaction():
                    catalog.set_account(store, lineage, whose, back)
        return real(store, id, *rest_, **more)

    patch.setattr(ledger, "abandon", abandon)


@bug("jobs are charged for nothing", "charges")
def _free(patch: Patch) -> None:
    patch.setattr(catalog, "set_account", lambda *a: None)


# --- what only known answers see

_noised("one half of the noise is the other's mirror image", lambda real: _mirrored(real),
        "known noise")  # fmt: skip
_noised("noise is made of 16 bits", _instead(lambda rng, n: _boxed(rng, n, 16)), "known noise")
_noised("each thousandth step has no noise", lambda real: (
    lambda total, key, step, scale, first=0: (
        None if step % 1000 == 999 else real(total, key, step, scale, first))),
    "known noise")  # fmt: skip
_noised("the last pair of a full window has no noise", lambda real: _some(
    real, lambda n: slice(0, n - 2 if n == 1 << 16 else n)), "known noise")  # fmt: skip
_noised("windows of noise overlap by a half", lambda real: (
    lambda total, key, step, scale, first=0: real(total, key, step, scale, first // 4 * 2)),
    "known noise")  # fmt: skip
_noised("noise repeats after two windows", lambda real: (
    lambda total, key, step, scale, first=0: real(total, key, step, scale, first % (2 << 16))),
    "known noise")  # fmt: skip
_noised("noise repeats after 16384 steps", lambda real: (
    lambda total, key, step, scale, first=0: real(total, key, step % 16384, scale, first)),
    "known noise")  # fmt: skip
_sampled("samples repeat after 16384 steps",
         lambda real: lambda k, t, n, q: real(k, t % 16384, n, q), "known samples")  # fmt: skip
_sampled("the rate is rounded up to 1024ths", lambda real: (
    lambda k, t, n, q: real(k, t, n, min(1024, int(q * 1024) + 1) / 1024)),
    "known samples")  # fmt: skip
_sampled("units far apart share their chance", lambda real: (
    lambda k, t, n, q: np.concatenate([
        first + real(k, t, min(1 << 17, n - first), q) for first in range(0, n, 1 << 17)])),
    "known samples")  # fmt: skip


def _mirrored(real: Add) -> Add:
    def add(total: np.ndarray, key: bytes, step: int, scale: float, first: int = 0) -> None:
        half = (len(total) + 1) // 2
        half = min(len(total), half + half % 2)
        made = np.zeros(half, dtype=np.int64)
        real(made, key, step, scale, first)
        total[:half] += made
        total[half:] -= made[: len(total) - half]

    return add


def _boxed(rng: np.random.Generator, n: int, bits: int) -> np.ndarray:
    """Box and Muller's draws of words of so few bits."""
    u = (rng.integers(0, 1 << bits, size=(n + n % 2, 1)) + 0.5) / (1 << bits)
    u = u.reshape(-1, 2)
    radius, angle = np.sqrt(-2 * np.log(u[:, 0])), 2 * math.pi * u[:, 1]
    return np.stack([radius * np.cos(angle), radius * np.sin(angle)], 1).reshape(-1)[:n]


@bug("the samples' key follows the data", "known samples")
def _key_of_data(patch: Patch) -> None:
    held, real = {"valid": 0}, keystream.subkey
    loop = train.loop

    def begun(plan: Any, execution: Any, spec: Any, program: Any, rows: Any, *more: Any) -> Any:
        held["valid"] = int(rows.valid.sum())
        return loop(plan, execution, spec, program, rows, *more)

    def subkey(key: bytes, purpose: str) -> bytes:
        more = f"/{held['valid']}" if purpose == sampling.PURPOSE else ""
        return real(key, purpose + more)

    patch.setattr(train, "loop", begun)
    patch.setattr(keystream, "subkey", subkey)


# --- what meters of one step and one microbatch do not see


class _Microbatches:
    """The number, in its step, of the microbatch at work on the path ``graph``."""

    def __init__(self, patch: Patch) -> None:
        self.number = -1
        swap, evaluate = batched.Batched._swap, batched.Batched._evaluate

        def begun(path: Any) -> None:
            self.number = -1
            swap(path)

        def evaluated(path: Any, seed: torch.Tensor) -> Any:
            self.number += 1
            return evaluate(path, seed)

        patch.setattr(batched.Batched, "_swap", begun)
        patch.setattr(batched.Batched, "_evaluate", evaluated)

    @property
    def more(self) -> float:
        return 1.05 if self.number > 0 else 1.0


def _looser(patch: Patch, of: type, name: str) -> None:
    """Of the later microbatches, ``name`` is given 1.05 of the bound."""
    at, real = _Microbatches(patch), getattr(of, name)
    patch.setattr(of, name, lambda self, env, bound, *rest: real(self, env, bound * at.more, *rest))


@bug("later microbatches clip at 1.05 of the bound", "sensitivity", "steps")
def _later(patch: Patch) -> None:
    _looser(patch, batched.Batched, "_factors")


@bug("later microbatches of the native step clip at 1.05 of the bound", "sensitivity")
def _later_native(patch: Patch) -> None:
    _looser(patch, small.Small, "__call__")


@bug("free places hold who was there before", "steps")
def _stale(patch: Patch) -> None:
    pieces, real = batched.Batched.pieces, batched.Batched._evaluate
    held: dict[str, torch.Tensor] = {}

    def evaluate(self: Any, seed: torch.Tensor) -> Any:
        had = held.get("seed", seed)
        held["seed"] = torch.where(seed == 0, had, seed) if len(had) == len(seed) else seed.clone()
        return real(self, held["seed"])

    def begun(self: Any, *args: Any, **more: Any) -> Any:
        made = pieces(self, *args, **more)

        def total(chosen: np.ndarray) -> Iterator[Any]:
            with pytest.MonkeyPatch.context() as within:
                within.setattr(batched.Batched, "_evaluate", evaluate)
                yield from made(chosen)

        return total

    patch.setattr(batched.Batched, "pieces", begun)


@bug("a step's sum is added to the last one's", "steps")
def _kept_sum(patch: Patch) -> None:
    real = batched.Batched.pieces

    def pieces(self: Any, *args: Any, **more: Any) -> Any:
        made = real(self, *args, **more)
        held: dict[int, torch.Tensor] = {}

        def total(chosen: np.ndarray) -> Iterator[Any]:
            for first, part in made(chosen):
                if args[3] > self.shape.units:  # slots
                    part += held.get(first, 0)
                    held[first] = part.clone()
                yield first, part

        return total

    patch.setattr(batched.Batched, "pieces", pieces)


@bug("the norm is that of the first window", "late entries")
def _first_window(patch: Patch) -> None:
    real = clip._squared
    patch.setattr(clip, "_squared", lambda contribution: real(contribution[: 1 << 16]))


@bug("units of two datasets with one number are one", "datasets")
def _run_together(patch: Patch) -> None:
    real = rows.assemble

    def assemble(schemas: Any, *more: Any) -> Any:
        made = real(schemas, *more)
        if len(schemas) == 1:
            return made
        owners = np.repeat(np.arange(made.units), np.diff(made.starts)) % schemas[0].units
        turn = np.argsort(owners, kind="stable")
        ordered = owners[turn]
        few = np.arange(len(turn)) - np.searchsorted(ordered, ordered) < made.per_unit
        starts = np.searchsorted(ordered[few], np.arange(made.units + 1)).astype(np.int64)
        return dataclasses.replace(made, order=made.order[turn][few], starts=starts)

    patch.setattr(rows, "assemble", assemble)


@bug("the grid rounds away from zero", "rounding")
def _away(patch: Patch) -> None:
    def to_grid(contribution: torch.Tensor, step: float) -> torch.Tensor:
        found = contribution / step
        return (found.sign() * found.abs().ceil()).to(torch.int64)

    patch.setattr(grid, "to_grid", to_grid)


@bug("an embedding's norm forgets that indices repeat", "layers")
def _repeats(patch: Patch) -> None:
    real = kernels.embedding_gram

    def gram(index: torch.Tensor, g: torch.Tensor, padding: int | None = None) -> Any:
        used = torch.ones_like(index, dtype=torch.bool) if padding is None else index != padding
        return (g.double() * used.unsqueeze(2)).square().sum((1, 2)), real(index, g, padding)[1]

    patch.setattr(kernels, "embedding_gram", gram)


@bug("a tied weight's norm lacks what its two uses share", "layers")
def _tied(patch: Patch) -> None:
    real = forms._one_by_one

    def one_by_one(of: Any, *operands: torch.Tensor) -> list[torch.Tensor]:
        found = real(of, *operands)
        return [torch.zeros_like(found[0])] if len(operands) == 4 else found

    patch.setattr(forms, "_one_by_one", one_by_one)


@bug("a convolution's squared norm is halved", "layers")
def _halved(patch: Patch) -> None:
    real = kernels.conv_norms
    patch.setattr(kernels, "conv_norms", lambda *a: real(*a) / 2)


@bug("factors do not heed what a sum's rounding may hide", "rounding of sums")
def _heedless(patch: Patch) -> None:
    plain, quick, call = batched._factors, small.factors, small.Small.__call__

    @dataclass
    class Exact:
        way: forms.Way

    def factors(sites: Any, *rest: Any) -> Any:
        return plain([Exact(dataclasses.replace(s.way, error=0.0)) for s in sites], *rest)

    patch.setattr(batched, "_factors", factors)
    patch.setattr(small, "factors", lambda *a: quick(*a[:4], math.inf))
    patch.setattr(
        small.Small, "__call__",
        lambda self, env, bound, share, *rest: call(self, env, bound, math.inf, *rest),
    )  # fmt: skip


# --- what is charged to whom


@bug("extra deltas are not added up", "charges")
def _largest_delta(patch: Patch) -> None:
    real = catalog.Account.add

    def add(self: catalog.Account, charge: Charge) -> catalog.Account:
        delta = max(self.delta_femto, charge.delta_femto)
        return dataclasses.replace(real(self, charge), delta_femto=delta)

    patch.setattr(catalog.Account, "add", add)


@bug("only the first dataset of a job is charged", "charges")
def _first_dataset(patch: Patch) -> None:
    real = ledger.admit
    patch.setattr(ledger, "admit", lambda *a, **more: real(*a, **more)[:1])


@bug("a new version of a dataset has a new budget", "charges")
def _new_budget(patch: Patch) -> None:
    def lineage(store: Any, registration: Any) -> str:
        catalog._new_lineage(store, registration)
        name: str = registration.dataset
        return name

    patch.setattr(catalog, "_old_lineage", lineage)


@bug("a job that runs is given its keys again", "charges")
def _keys_again(patch: Patch) -> None:
    real = ledger.begin

    def begin(store: Any, id: str) -> Any:
        with store.transaction():
            store.run("UPDATE jobs SET state = 'reserved' WHERE id = ? AND state = 'running'", id)
        return real(store, id)

    patch.setattr(ledger, "begin", begin)


@bug("the budget holds each scientist's jobs, not all together", "charges")
def _by_scientist(patch: Patch) -> None:
    real = catalog.set_account

    def set_account(store: Any, lineage: str, whose: str, account: catalog.Account) -> None:
        real(store, lineage, whose, account)
        if whose != catalog.EVERYONE:
            real(store, lineage, catalog.EVERYONE, account)

    patch.setattr(catalog, "set_account", set_account)


# --- what leaves, and what is accounted, made again from public numbers


@bug("the result is one hundredth free of noise", "result")
def _part_free(patch: Patch) -> None:
    raw, real = _Raw(patch), train.Run.result

    def result(self: train.Run) -> dict[str, torch.Tensor]:
        found, free = real(self), raw.mean.to(torch.float64)
        if len(free) != self.program.dimension:
            return found
        parts = torch.split(free.to(torch.float32), [t.numel() for t in found.values()])
        return {
            name: t + 0.01 * part.view(t.shape)
            for (name, t), part in zip(found.items(), parts, strict=True)
        }

    patch.setattr(train.Run, "result", result)


@bug("the average leaves out empty batches", "optimizer")
def _average_of_some(patch: Patch) -> None:
    sizes, real = _Sizes(patch), optim.Average.add
    patch.setattr(optim.Average, "add", lambda self, w: real(self, w) if sizes.size else None)


@bug("the schedule counts batches that are not empty", "optimizer")
def _schedule_of_some(patch: Patch) -> None:
    some, sample, real = [0], sampling.sample, optim.optimizer

    def sampled(*a: Any) -> np.ndarray:
        found = sample(*a)
        some[0] += len(found) > 0
        return found

    def optimizer(*args: Any) -> optim.Update:
        made = real(*args)
        some[0] = 0

        def update(weights: Any, gradient: torch.Tensor, step: int, first: int) -> None:
            made.apply(weights, gradient, max(0, some[0] - 1), first)

        return optim.Update(update, made.state)

    patch.setattr(sampling, "sample", sampled)
    patch.setattr(optim, "optimizer", optimizer)


class _Short:
    """16 bits of the system's generator, spread over a key."""

    def bytes(self, count: int) -> bytes:
        return hashlib.sha256(os.urandom(2)).digest()[:count]


@bug("a worker's key has 16 bits", "keys")
def _short_key(patch: Patch) -> None:
    patch.setattr(session, "OsRng", _Short)


@bug("a key of the library has 16 bits", "keys")
def _short_library_key(patch: Patch) -> None:
    patch.setattr(private, "OsRng", _Short)


@bug("random inputs share the noise's stream", "keys")
def _shared_stream(patch: Patch) -> None:
    patch.setattr(draws, "PURPOSE", noise.PURPOSE)


@bug("rounding before the grid is not accounted", "plans")
def _no_certified(patch: Patch) -> None:
    real = plans.sensitivity

    def sensitivity(bound: float, eta: float, rounding: float, step: float, d: int) -> float:
        return real(bound, eta, 0.0, step, d)

    def of_graph(bound: float, dimension: int, step: float) -> float:
        return bound * (1.0 + batched.ETA) + step * math.sqrt(dimension)

    patch.setattr(plans, "sensitivity", sensitivity)
    patch.setitem(train.SENSITIVITY, "graph", of_graph)


@bug("room is rounded down to whole microbatches", "plans")
def _rounded_room(patch: Patch) -> None:
    real = plans.compile_plan

    def compile_plan(request: Any, schemas: Any, prepared: Any, *more: Any) -> Any:
        plan = real(request, schemas, prepared, *more)
        needed = plans.slots(request.train, plan.units)
        return dataclasses.replace(plan, microbatches=max(1, needed // plan.microbatch))

    patch.setattr(plans, "compile_plan", compile_plan)


@bug("the form of the clip is not checked", "plans")
def _any_form(patch: Patch) -> None:
    real = train.check_plan

    def check_plan(plan: Any, spec: Any, *more: Any) -> None:
        asked = spec.privacy
        gamma = asked.gamma if asked.clipping == "automatic" else 0.0
        real(dataclasses.replace(plan, clipping=asked.clipping, gamma=gamma), spec, *more)

    patch.setattr(train, "check_plan", check_plan)


@bug("the room for a batch is not checked", "plans")
def _any_room(patch: Patch) -> None:
    patch.setattr(train, "_room", lambda plan: 0)


@_accounting("a step's curve is 5% low")
def _curve_low(patch: Patch) -> None:
    real = rdp.step_curve
    patch.setattr(rdp, "step_curve", lambda rate, s: tuple(0.95 * x for x in real(rate, s)))


@_accounting("each order of the filter has the whole delta")
def _no_weights(patch: Patch) -> None:
    patch.setattr(filters, "weight", lambda order, epsilon, delta: 1.0)


# --- what only laws by step and by distance see


def _again_later(real: Add) -> Add:
    def add(total: np.ndarray, key: bytes, step: int, scale: float, first: int = 0) -> None:
        made = np.zeros_like(total)
        real(made, key, step, scale, first)
        if len(made) > 10_000:
            made[5_000:10_000] = made[:5_000]
        total += made

    return add


_noised("noise comes again 5,000 entries later", _again_later, "noise")
_noised("one step of two thousand has no noise", lambda real: (
    lambda total, key, step, scale, first=0: (
        None if step % 2000 == 1234 else real(total, key, step, scale, first))),
    "sampling")  # fmt: skip


# --- found uncaught by a second review: far entries, unusual layers, what costs nothing

_noised("noise repeats after 2^20 entries", lambda real: (
    lambda total, key, step, scale, first=0: real(total, key, step, scale, first % (1 << 20))),
    "known noise")  # fmt: skip


@bug("images are centred over their microbatch", "random inputs")
def _centred(patch: Patch) -> None:
    real = views.turn
    patch.setattr(views, "turn", lambda images, *rest: real(images - images.mean(), *rest))


@bug("what counts for nothing is multiplied by zero", "layers")
def _times_zero(patch: Patch) -> None:
    def weighted_sum(made: torch.Tensor, c: torch.Tensor) -> torch.Tensor:
        return (made.double() * c.double().view(-1, 1)).sum(0).float()

    patch.setattr(kernels, "weighted_sum", weighted_sum)


@bug("a record on which the model fails empties its microbatch", "no numbers")
def _emptied(patch: Patch) -> None:
    def leave_out(put: Any, evaluate: Any, index: torch.Tensor, seed: torch.Tensor) -> None:
        index.fill_(-1)
        seed.zero_()
        put(index.view(-1), True)

    patch.setattr(fill, "leave_out", leave_out)


@bug("where one row of a unit counts, each row is a unit", "units")
def _rows_are_units(patch: Patch) -> None:
    real = rows.assemble

    def assemble(schemas: Any, tables: Any, *rest: Any) -> rows.Rows:
        made = []
        for schema, table in zip(schemas, tables, strict=True):
            column = schema.unit_column
            if column is not None and schema.rows_per_unit == 1:
                table = {**table, column.name: torch.arange(schema.rows)}
            made.append(table)
        return real(schemas, made, *rest)

    patch.setattr(rows, "assemble", assemble)


@bug("factors are used however small they are", "layers")
def _small_factors(patch: Patch) -> None:
    patch.setattr(batched, "SMALLEST", 0.0)
    patch.setattr(small, "factors", lambda *a: None)


@bug("a window that begins within a row of a table gets the row's beginning", "layers")
def _rows_cut(patch: Patch) -> None:
    real = forms.embedding_site

    def site(*args: Any) -> forms.Site:
        made, width = real(*args), args[4][1]
        for name, add in made.adds.items():
            made.adds[name] = lambda steps, first, *rest, add=add: add(
                steps, first - first % width, *rest
            )
        return made

    patch.setattr(forms, "embedding_site", site)


@bug("automatic clipping scales an embedding's sum twice", "layers")
def _scaled_twice(patch: Patch) -> None:
    real = batched.Batched._fill

    def filled(self: batched.Batched, at: Any, *rest: Any) -> Any:
        scale = rest[-1] ** 2 if at.gradient in at.site.adds else rest[-1]
        return real(self, at, *rest[:-1], scale)

    patch.setattr(batched.Batched, "_fill", filled)


@bug("an embedding's norm is made of its rows' own, not of their sum", "layers")
def _norm_of_rows(patch: Patch) -> None:
    real = forms.embedding_site

    def site(*args: Any) -> forms.Site:
        made, (both, count, table, padding, shape) = real(*args), args[2:]
        k, none = shape.per_unit, padding if padding >= 0 else None

        def norm(env: Any) -> forms.Norm:
            index, g = both(env)
            of_rows = index.reshape(-1, count // k), g.reshape(-1, count // k, table[1])
            squared, spread = kernels.embedding_gram(*of_rows, none)
            return forms.Norm(squared.view(-1, k).sum(1), spread.view(-1, k).sum(1))

        made.ways = [dataclasses.replace(way, norm=norm) for way in made.ways]
        return made

    patch.setattr(forms, "embedding_site", site)


@bug("a convolution's sums are taken for exact", "rounding of sums")
def _exact_sums(patch: Patch) -> None:
    real = forms.convolution_site

    def site(*args: Any) -> forms.Site:
        made = real(*args)
        made.ways = [dataclasses.replace(way, error=0.0) for way in made.ways]
        return made

    patch.setattr(forms, "convolution_site", site)


@bug("what was compiled adds half of a neighbour", "steps")
def _neighbours(patch: Patch) -> None:
    real = batched.Batched._swap

    def swap(self: batched.Batched) -> None:
        before = self.fused
        real(self)
        if self.fused is not before:
            call, rows_ = self._forward, self.shape.rows
            self._forward = lambda *a: [
                t + 0.5 * t.flip(0) if t.is_floating_point() and t.shape[:1] == (rows_,) else t
                for t in call(*a)
            ]

    patch.setattr(batched.Batched, "_swap", swap)


@_accounting("a step's curve is 30% low above order 64")
def _curve_low_above(patch: Patch) -> None:
    real = rdp.step_curve

    def curve(rate: float, s: float) -> tuple[float, ...]:
        pairs = zip(rdp.ORDERS, real(rate, s), strict=True)
        return tuple(0.7 * x if a > 64 else x for a, x in pairs)

    patch.setattr(rdp, "step_curve", curve)


@_accounting("a job is charged 20,000 steps at most")
def _steps_capped(patch: Patch) -> None:
    real = filters.nano
    patch.setattr(filters, "nano", lambda events: real(
        [dataclasses.replace(e, steps=min(e.steps, 20_000)) for e in events]))  # fmt: skip


@bug("a budget admits one job more than it holds", "charges")
def _one_more(patch: Patch) -> None:
    real = RdpFilter.admits
    patch.setattr(RdpFilter, "admits", lambda *a: real(*a[:3], filters.NOTHING))


@bug("a receipt claims a tenth less than was quoted", "charges")
def _claims_less(patch: Patch) -> None:
    real = release.guarantee

    def guarantee(quote: Any) -> Any:
        made = real(quote)
        return dataclasses.replace(made, epsilon=0.9 * made.epsilon)

    patch.setattr(release, "guarantee", guarantee)


@bug("what a receipt claims is not compared with what the events cost", "charges")
def _claims_anything(patch: Patch) -> None:
    patch.setattr(release, "check_guarantee", lambda quote: None)


@bug("a job that has its result may be given another", "charges")
def _committed_again(patch: Patch) -> None:
    real = ledger.commit

    def commit(store: Any, id: str, **more: Any) -> Any:
        with store.transaction():
            store.run("UPDATE jobs SET state = 'running' WHERE id = ?", id)
        return real(store, id, **more)

    patch.setattr(ledger, "commit", commit)


@bug("exact evaluations are not counted", "charges")
def _not_counted(patch: Patch) -> None:
    patch.setattr(admission, "evaluated", lambda *a, **more: 0)


@bug("any words permit training without privacy", "charges")
def _any_words(patch: Patch) -> None:
    real = rules.broken

    def broken(*args: Any) -> Any:
        found = real(*args)
        return None if found is not None and found[0] == "policy.private-only" else found

    patch.setattr(rules, "broken", broken)


# --- found uncaught by a third review: sizes, kinds and places that no case had


@bug("a unit of two rows has the norm of its first", "layers")
def _first_row(patch: Patch) -> None:
    real = forms.outer_site

    def site(name: str, names: Any, both: Any, count: int, sizes: Any, shape: Any) -> forms.Site:
        made = real(name, names, both, count, sizes, shape)
        if count == shape.per_unit > 1:
            first = real(
                name, names, lambda env: tuple(t[:, :1] for t in both(env)), 1, sizes, shape
            )
            made.ways = first.ways
        return made

    patch.setattr(forms, "outer_site", site)


@bug("of a parameter in two parts the larger one is weighed", "layers")
def _larger_part(patch: Patch) -> None:
    real = forms.apart_site

    def site(name: str, parts: Any) -> forms.Site:
        made = real(name, parts)

        def norm(env: Any) -> forms.Norm:
            squared = torch.stack([p.way.norm(env).squared for p in parts])
            return forms.Norm(squared.max(0).values, squared.max(0).values.sqrt())

        made.ways = [dataclasses.replace(way, norm=norm) for way in made.ways]
        return made

    patch.setattr(forms, "apart_site", site)


@bug("a convolution's Gram matrix ignores its dilation", "layers")
def _undilated(patch: Patch) -> None:
    real = kernels.conv_gram

    def gram(*args: Any) -> Any:
        before, dilation, rest = args[:5], args[5], args[6:]
        return real(*before, (1,) * len(dilation), *rest)

    patch.setattr(kernels, "conv_gram", gram)


@bug("units from the 65th of a microbatch on have the first ones' norms", "layers")
def _of_the_first_block(patch: Patch) -> None:
    real = small.factors

    def factors(sites: Any, norms: Any, bound: float, units: int, share: float) -> Any:
        again = torch.arange(units) % 64
        norms = [
            forms.Norm(n.squared[again], None if n.spread is None else n.spread[again])
            for n in norms
        ]
        return real(sites, norms, bound, units, share)

    patch.setattr(small, "factors", factors)


@bug("without native kernels formed gradients are not scaled", "layers")
def _unscaled_twin(patch: Patch) -> None:
    real = kernels.weighted_sum

    def weighted_sum(made: torch.Tensor, c: torch.Tensor) -> torch.Tensor:
        return real(made, c if kernels.native() else (c != 0).float())

    patch.setattr(kernels, "weighted_sum", weighted_sum)


@bug("per-layer clips below 1 are those of 1", "sensitivity")
def _share_of_one(patch: Patch) -> None:
    real = clip.share
    for module in (clip, batched):
        patch.setattr(module, "share", lambda bound, tensors: real(max(bound, 1.0), tensors))


@bug("a tensor's norm stops after 2^16 entries", "late entries")
def _short_rows(patch: Patch) -> None:
    real = kernels.row_squares
    patch.setattr(kernels, "row_squares", lambda x: real(x.flatten(1)[:, : 1 << 16]))


@bug("sums are made of weights that their step has changed", "late entries")
def _changed_weights(patch: Patch) -> None:
    patch.setattr(batched.Batched, "_shares", lambda self, env: False)


@bug("compiled islands keep what they made first", "steps")
def _stale_islands(patch: Patch) -> None:
    real = compiled.function

    def keeps(call: Any) -> Any:
        held: list[Any] = []

        def run(given: list[Any]) -> list[Any]:
            if not held:
                held.extend(t.clone() for t in call(given))
            return list(held)

        return run

    def function(*args: Any) -> Any:
        before, fused, rest = args[:4], args[4], args[5:]
        return real(*before, [(island, keeps(call)) for island, call in fused], *rest)

    patch.setattr(compiled, "function", function)


@bug("a resumed run's key is made of its state's", "keys")
def _resumed_key(patch: Patch) -> None:
    held, real = dict[str, bytes](), session._resumed

    def resumed(message: Any, run: Any, fd: int) -> Any:
        held["key"] = run.resume.key
        return real(message, run, fd)

    class Derived:
        def bytes(self, count: int) -> bytes:
            key = held.pop("key", None)
            return os.urandom(count) if key is None else hashlib.sha256(key).digest()[:count]

    patch.setattr(session, "_resumed", resumed)
    patch.setattr(session, "OsRng", Derived)


@bug("draws whose rounding float64 cannot tell are zero", "known noise")
def _no_long_way(patch: Patch) -> None:
    patch.setattr(noise, "_exact_pair", lambda *a: (0, 0))


_noised("a window of one entry has no noise", lambda real: (
    lambda total, *rest: None if len(total) == 1 else real(total, *rest)),
    "known noise")  # fmt: skip


@bug("room for a batch is had from the normal law", "plans")
def _normal_room(patch: Patch) -> None:
    real = plans.capacity

    def capacity(units: int, rate: float, steps: int, part: float) -> int:
        if units < 1000:
            return real(units, rate, steps, part)
        return min(units, math.ceil(units * rate + 4 * math.sqrt(units * rate)))

    for module in (plans, train):
        patch.setattr(module, "capacity", capacity)


@bug("rounding past 2^16 entries is not accounted", "plans")
def _rounding_of_few(patch: Patch) -> None:
    real = plans.sensitivity
    patch.setattr(plans, "sensitivity", lambda *a: real(*a[:4], min(a[4], 1 << 16)))
    for path, of in dict(train.SENSITIVITY).items():
        patch.setitem(
            train.SENSITIVITY, path, lambda c, d, step, of=of: of(c, min(d, 1 << 16), step)
        )


@_accounting("a step's curve is 20% low at rates below 1/500")
def _curve_low_rates(patch: Patch) -> None:
    real = rdp.step_curve
    patch.setattr(rdp, "step_curve", lambda rate, s: tuple(
        x * (0.8 if rate < 0.002 else 1) for x in real(rate, s)))  # fmt: skip


@_accounting("without sampling a step's curve is 2% low")
def _curve_low_whole(patch: Patch) -> None:
    real = rdp.step_curve
    patch.setattr(rdp, "step_curve", lambda rate, s: tuple(
        x * (0.98 if rate == 1 else 1) for x in real(rate, s)))  # fmt: skip


@bug("only the first dataset's budget is looked at", "charges")
def _first_budget(patch: Patch) -> None:
    real = admission._filters
    patch.setattr(admission, "_filters", lambda found, stored, budget: (
        real(found, stored, budget)
        if stored.quote.request.datasets[0].dataset == found.id else ()))  # fmt: skip


@bug("a budget does not bound extra deltas", "charges")
def _any_delta(patch: Patch) -> None:
    real = RdpFilter.admits
    patch.setattr(RdpFilter, "admits", lambda self, spent, delta, charge: real(
        self, spent, 0, dataclasses.replace(charge, delta_femto=0)))  # fmt: skip


@bug("the third version of a dataset has a new budget", "charges")
def _third_budget(patch: Patch) -> None:
    real = catalog._old_lineage

    def lineage(store: Any, registration: Any) -> str:
        before = catalog.dataset(store, registration.previous).registration.previous
        found = real(store, registration)
        if before is None:
            return found
        catalog._new_lineage(store, registration)
        name: str = registration.dataset
        return name

    patch.setattr(catalog, "_old_lineage", lineage)


@bug("the error of a run that failed is told", "charges")
def _errors_told(patch: Patch) -> None:
    patch.setattr(release, "end", lambda error, *, read: (error.code, error.message))


@bug("a result may hold more than weights", "charges")
def _any_result(patch: Patch) -> None:
    patch.setattr(release, "check_result", lambda *a: None)


@bug("an exact evaluation may train any weights", "charges")
def _any_metrics(patch: Patch) -> None:
    patch.setattr(prepare, "check_evaluation", lambda *a: None)


@bug("where one row of a person counts, the library's units are rows", "units")
def _people_are_rows(patch: Patch) -> None:
    real = tables.group
    patch.setattr(
        tables, "group",
        lambda tensors, unit, k: real(tensors, unit if k > 1 else None, k),
    )  # fmt: skip


# --- found uncaught by a fourth review: jobs of one kind alone, owners' rules, receipts


def _for_some(name: str, part: Callable[[Any, Any, int], float], *checks: str) -> None:
    """Jobs of some kind have so large a part of their noise: of (plan, spec, step)."""

    @bug(name, *(checks or ("runs",)))
    def seed(patch: Patch) -> None:
        real, held = train.start, dict[str, Any]()
        add = noise.add_gaussian

        def start(plan: Any, execution: Any, spec: Any, *rest_: Any, **more: Any) -> Any:
            held["of"] = (plan, spec)
            return real(plan, execution, spec, *rest_, **more)

        def noised(total: np.ndarray, key: bytes, step: int, scale: float, first: int = 0) -> None:
            less = part(*held["of"], step) if "of" in held else 1.0
            add(total, key, step, max(1.0, scale * less), first)

        patch.setattr(train, "start", start)
        patch.setattr(noise, "add_gaussian", noised)


_for_some("jobs with views have no noise to speak of", lambda plan, spec, step: (
    1e-9 if spec.views.count > 1 else 1.0))  # fmt: skip
_for_some("noise is 0.7 sigma where clipping is per layer", lambda plan, spec, step: (
    0.7 if plan.clipping == "per-layer" else 1.0))  # fmt: skip
_for_some("noise is halved for Adam", lambda plan, spec, step: (
    0.5 if hasattr(spec.optimizer, "beta1") else 1.0))  # fmt: skip
_for_some("noise is 0.9 sigma where weights are averaged", lambda plan, spec, step: (
    0.9 if spec.ema else 1.0))  # fmt: skip
_for_some("of large noise 4 times the sensitivity is added", lambda plan, spec, step: (
    min(1.0, 4 * plan.sensitivity / plan.sigma)))  # fmt: skip
_for_some("noise warms up with the learning rate", lambda plan, spec, step: (
    min(1.0, (step + 1) / max(1, spec.schedule.warmup))))  # fmt: skip
_for_some("noise is halved for clips below 1/100", lambda plan, spec, step: (
    0.5 if plan.clip < 0.01 else 1.0))  # fmt: skip


@bug("thousands of units are sampled at 1.2 of the rate", "runs")
def _many_units(patch: Patch) -> None:
    real = sampling.sample
    patch.setattr(sampling, "sample", lambda key, step, units, rate: real(
        key, step, units, min(1.0, rate * (1.2 if 1_000 <= units < 4_000 else 1))))  # fmt: skip


_sampled("units are sampled at 1/1000 at least",
         lambda real: lambda k, t, n, q: real(k, t, n, max(q, 0.001)))  # fmt: skip
_noised("noise repeats after 2^22 steps", lambda real: (
    lambda total, key, step, scale, first=0: real(total, key, step % (1 << 22), scale, first)),
    "known noise")  # fmt: skip


@bug("gradients of 2^20 to 2^40 clips are not clipped", "sensitivity")
def _band(patch: Patch) -> None:
    def banded(x: torch.Tensor, bound: float) -> None:
        if not 2.0**20 < float(torch.linalg.vector_norm(x)) / bound < 2.0**40:
            clip.clip(x, bound)

    patch.setattr(clip, "FORMS", {**clip.FORMS, "flat": lambda sizes, gamma: banded})


@bug("the ninth tensor is not in the norm", "sensitivity")
def _ninth(patch: Patch) -> None:
    real, build = batched.factors, small.build
    patch.setattr(
        batched, "factors", lambda sites, norms, *rest_: real(sites[:8], norms[:8], *rest_)
    )
    patch.setattr(small, "build", lambda runner, sites, *rest_: (
        None if len(sites) > 8 else build(runner, sites, *rest_)))  # fmt: skip


@bug("masks of long records go by the first one's", "random inputs")
def _long_masks(patch: Patch) -> None:
    real = draws.Draws._words

    def words(self: Any, start: np.ndarray, blocks: int) -> np.ndarray:
        if blocks >= draws._LONG:
            start = start[0] + np.arange(len(start), dtype=np.uint64) * np.uint64(blocks)
        return real(self, start, blocks)

    patch.setattr(draws.Draws, "_words", words)


@bug("images padded by reflection are cut where the first one is", "random inputs")
def _one_cut(patch: Patch) -> None:
    real = views._cut

    def cut(sources: np.ndarray, crop: Any, words: np.ndarray) -> np.ndarray:
        same = np.broadcast_to(words[:1], words.shape) if crop.pad == "reflect" else words
        return real(sources, crop, same)

    patch.setattr(views, "_cut", cut)


@bug("a release carries 2^-20 of the sum before its noise", "runs")
def _carries(patch: Patch) -> None:
    raw, real = _Raw(patch), kernels.finish

    def finished(total: torch.Tensor, factor: float, mean: torch.Tensor) -> None:
        real(total, factor, mean)
        mean += raw.raw * (factor * 2.0**-20)

    patch.setattr(kernels, "finish", finished)


@bug("the average's low bits hold sums before their noise", "runs")
def _low_bits(patch: Patch) -> None:
    raw, real = _Raw(patch), optim.Average.add

    def add(self: optim.Average, weights: torch.Tensor) -> None:
        real(self, weights)
        self.value[: len(raw.raw)] += raw.mean.double() * 1e-9

    patch.setattr(optim.Average, "add", add)


@bug("Adam takes no step where nobody was sampled", "runs")
def _rests(patch: Patch) -> None:
    sizes, real = _Sizes(patch), optim.adam

    def adam(*args: Any) -> optim.Update:
        made = real(*args)

        def update(*given: Any) -> None:
            if sizes.size:
                made.apply(*given)

        return optim.Update(update, made.state)

    patch.setattr(optim, "adam", adam)


@bug("what a worker writes carries a column's mean", "runs")
def _written(patch: Patch) -> None:
    held, real = _with_rows(patch), session._packed

    def packed(result: dict[str, torch.Tensor]) -> bytes:
        mean = float(held["rows"].inputs["x"].double().nan_to_num().mean())
        return real({name: t + 1e-6 * mean for name, t in result.items()})

    patch.setattr(session, "_packed", packed)


@bug("what adds up is not tried in every slot", "slots")
def _untried(patch: Patch) -> None:
    patch.setattr(probe, "same_in_every_slot", lambda *a: True)
    patch.setattr(products, "chooser", lambda *a: lambda *b: None)


@bug("of more than 64 tokens the first 64 are in the norm", "layers")
def _first_tokens(patch: Patch) -> None:
    real = kernels.gram_pair
    patch.setattr(
        kernels, "gram_pair",
        lambda g, x, *rest_: (real(g[:, :64], x[:, :64], *rest_)[0], real(g, x, *rest_)[1]),
    )  # fmt: skip


@bug("a run goes on from any job's state", "state")
def _any_state(patch: Patch) -> None:
    real = state_form.check

    def check(head: Any, total: int, plan: Any, spec: Any) -> Any:
        at = tensors.read_header(head, total)["job"]
        own = bytes(head[: at.start]) + state_form.job(plan, spec) + bytes(head[at.end :])
        return real(own, total, plan, spec)

    patch.setattr(state_form, "check", check)


@_accounting("charges are rounded down")
def _rounded_down(patch: Patch) -> None:
    patch.setattr(filters, "math", _Floored())


@_accounting("a delta below 10^-15 is none")
def _small_delta(patch: Patch) -> None:
    patch.setattr(filters, "femto", lambda delta: int(delta * 1e15))


class _Floored:
    def __getattr__(self, name: str) -> Any:
        return math.floor if name == "ceil" else getattr(math, name)


@_accounting("one step of all units costs nothing")
def _one_free(patch: Patch) -> None:
    real = RdpFilter.charge

    def charge(events: Any, extra: float, *, delta_shown: float) -> Charge:
        if all(e.rate == 1 and e.steps == 1 for e in events):
            return filters.NOTHING
        return real(events, extra, delta_shown=delta_shown)

    patch.setattr(RdpFilter, "charge", staticmethod(charge))


@_accounting("of more than 1,000 steps whole thousands are in the tight epsilon")
def _whole_thousands(patch: Patch) -> None:
    real = pld._compose
    patch.setattr(pld, "_compose", lambda one, steps: real(
        one, steps // 1000 * 1000 if steps > 1000 else steps))  # fmt: skip


@bug("a new version brings its budget", "owners")
def _new_budget(patch: Patch) -> None:
    real = catalog._old_lineage

    def lineage(store: Any, registration: Any) -> str:
        before = catalog.dataset(store, registration.previous).registration
        same = dataclasses.replace(registration, budget=before.budget)
        found = real(store, same)
        raw = codec.encode(registration.budget)
        store.run("UPDATE lineages SET budget = ? WHERE id = ?", raw, found)
        return found

    patch.setattr(catalog, "_old_lineage", lineage)


@bug("a scientist's budget replaces the dataset's", "owners")
def _replaces(patch: Patch) -> None:
    real = admission._filters
    patch.setattr(admission, "_filters", lambda found, *rest_: (
        tuple(real(found, *rest_))[1:] if found.policy.scientist_budget
        else real(found, *rest_)))  # fmt: skip


@bug("a cap on epsilon is measured at the job's delta", "owners")
def _own_delta(patch: Patch) -> None:
    real = filters.beyond
    patch.setattr(filters, "beyond", lambda total, cap, delta: real(total, cap, 1e-3))


@bug("rows serve another purpose by a new policy", "owners")
def _any_purpose(patch: Patch) -> None:
    patch.setattr(catalog, "_keep_purpose", lambda *a: None)


@bug("a job is resumed however often", "owners")
def _any_resumes(patch: Patch) -> None:
    real = ledger._policies
    patch.setattr(ledger, "_policies", lambda *a: [
        dataclasses.replace(p, resumes=MAX_RESUMES) for p in real(*a)])  # fmt: skip


@bug("what was revoked still gives its result", "owners")
def _unrevoked(patch: Patch) -> None:
    patch.setattr(ledger, "_require_not_revoked", lambda *a: None)


@bug("keys and results do not wait for witnesses", "owners")
def _unwitnessed(patch: Patch) -> None:
    patch.setattr(ledger, "_require_witnessed", lambda *a: None)


@bug("a run without privacy is called private", "owners")
def _called_private(patch: Patch) -> None:
    real = release.guarantee

    def guarantee(quote: Any) -> Any:
        words = "The released weights are (0, 0)-differentially private."
        return dataclasses.replace(real(quote), private=True, statement=words)

    patch.setattr(release, "guarantee", guarantee)


@bug("clients take receipts that claim a tenth less", "receipts")
def _loose(patch: Patch) -> None:
    patch.setattr(receipts, "RELATIVE_SLACK", 0.1)


@bug("clients do not recompute what a receipt claims", "receipts")
def _not_recomputed(patch: Patch) -> None:
    patch.setattr(receipts, "_privacy", lambda receipt: iter(()))


@bug("clients take a receipt for any weights", "receipts")
def _for_any_weights(patch: Patch) -> None:
    real = receipts.same_file
    patch.setattr(receipts, "same_file", lambda name, digest, given: real(name, digest, None))


@bug("clients do not ask whether a receipt was logged", "receipts")
def _unlogged(patch: Patch) -> None:
    patch.setattr(receipts, "_logged", lambda *a: receipts.Check("log", ""))


@bug("clients take receipts that contradict themselves", "receipts")
def _contradicts(patch: Patch) -> None:
    patch.setattr(receipts, "_agree", lambda *a: None)


@bug("automatic clipping forgets the norm where gamma is above the clip", "sensitivity")
def _large_gamma(patch: Patch) -> None:
    def automatic(sizes: Any, gamma: float) -> clip.Clip:
        plain = clip.automatic(gamma)

        def scale(x: torch.Tensor, bound: float) -> None:
            x.mul_(bound / gamma) if gamma > bound else plain(x, bound)

        return scale

    patch.setattr(clip, "FORMS", {**clip.FORMS, "automatic": automatic})


@_accounting("the library's noise by one accountant is for a tenth more")
def _for_more(patch: Patch) -> None:
    real = private.noise_for

    def noise_for(rate: Any, steps: Any, epsilon: float, delta: Any, accountant: Any) -> float:
        return real(rate, steps, epsilon * (1.1 if accountant == "rdp" else 1), delta, accountant)

    patch.setattr(private, "noise_for", noise_for)


@bug("later microbatches than five clip at twice the bound", "runs")
def _sixth(patch: Patch) -> None:
    at, real = _Microbatches(patch), batched.Batched._factors
    patch.setattr(batched.Batched, "_factors", lambda self, env, bound, *rest_: real(
        self, env, bound * (2.0 if at.number > 4 else 1.0), *rest_))  # fmt: skip
