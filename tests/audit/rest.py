"""What is kept, what leaves, what is accounted: state, keys, plans, budgets."""

from __future__ import annotations

import dataclasses
import functools
import itertools
import math
import os
from contextlib import suppress
from fractions import Fraction
from typing import Any, Final
from unittest import mock

import numpy as np
import pytest
import torch
from scipy import special, stats
from torch import nn

from audit import accountant, lab, sums
from audit.lab import Job
from audit.law import holds, normal, uncorrelated
from casemate.accounting import calibrate, filters, pld, rdp
from casemate.accounting.filters import RdpFilter
from casemate.engine import Private, keystream, private, train
from casemate.engine import noise as engine_noise
from casemate.engine.batched import ETA
from casemate.engine.sites import ROUNDING
from casemate.plan import compile, quote, state
from casemate.spec import tensors
from casemate.spec.data import Budget
from casemate.spec.errors import BudgetError, CasemateError, PlanError, UsageError
from casemate.spec.job import Adam, Dp, DpEvent, Schedule, Sgd
from support import worker_lab

D: Final = 8
UNITS: Final = 12
STEPS: Final = 4
OPTIMIZERS: Final[dict[str, Any]] = {
    "momentum": Sgd(lr=0.5, momentum=0.9, nesterov=True, weight_decay=0.01),
    "adam": Adam(lr=0.1, beta1=0.8, weight_decay=0.1, decoupled=True),
}


class Carrier(nn.Module):
    """A meter with a frozen parameter and a buffer, from neither of which it learns."""

    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.zeros(D))
        self.still = nn.Parameter(torch.full((D,), 0.25), requires_grad=False)
        self.register_buffer("calm", torch.ones(D))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return (x * self.calm * self.w + (x * self.still)).sum(1, keepdim=True)


def _carried(path: str, optimizer: str) -> Job:
    schema = lab.schema_of(D, UNITS)
    return lab.job(
        Carrier(), schema, batch=8, steps=STEPS, path=path, ema=0.6, lr=1.0,
        optimizer=OPTIMIZERS[optimizer],
    )  # fmt: skip


_carriers: Final = {
    (path, optimizer): functools.partial(_carried, path, optimizer)
    for path, optimizer in (("auto", "momentum"), ("record", "adam"))
}


def _thin(path: str) -> Job:
    """Most steps have nobody in them, and the learning rate follows the step's number."""
    return lab.job(
        Carrier(), lab.schema_of(D, UNITS), batch=1, steps=30, path=path, ema=0.6, lr=1.0,
        optimizer=OPTIMIZERS["momentum"], schedule=Schedule(kind="cosine", warmup=3, final=0.1),
    )  # fmt: skip


_thins: Final = {(path, "thin"): functools.partial(_thin, path) for path in ("auto", "record")}


def _outcome(job: Job, table: lab.Table, key: bytes) -> tuple[list[bytes], bytes]:
    """All that a run leaves: its state after each step, and its result."""
    run = job.start(table, key)
    states = []
    for step in range(STEPS):
        run(step)
        states.append(b"".join(bytes(part) for part in run.state()))
        weights = bytes(tensors.load(memoryview(states[-1]))[state.VECTOR + "weights"][1])
        same = weights == job.ready.program.flat.detach().numpy().tobytes()
        holds(same, f"state: its weights are those of step {step}")
    result = run.result()
    wanted = [spec.tensor for spec in job.ready.program.trained]
    holds(list(result) == wanted, f"the result is {list(result)}, not the trained tensors")
    return states, b"".join(t.numpy().tobytes() for t in result.values())


def kept(seed: int) -> None:
    """Nothing of a run but the noised sums is in its state or its result: what changes the loss, a
    gradient's length beyond the clip, or a record that counts for nothing, changes no bit."""
    for (path, _), make in _carriers.items():
        job = lab.kept(make)
        rng = lab.rng_of("kept", seed, path)
        table = lab.zeros(job.schema)
        table["x"][:] = torch.from_numpy(rng.choice([-1.0, 1.0], (UNITS, D)) * 4)
        key, place = rng.bytes(32), int(rng.integers(UNITS))
        program = job.ready.program
        weights = {n: t.clone() for n, t in program.weights.items()}
        states, result = _outcome(job, table, key)
        frozen = [n for n in weights if n not in {s.tensor for s in program.trained}]
        same = all(torch.equal(program.weights[n], weights[n]) for n in frozen)
        holds(bool(frozen) and same, f"state, {path}: what is not trained does not change")
        wanted = set(state.layout(job.spec, program.dimension))
        for step, found in enumerate(states, 1):
            holds(set(tensors.load(memoryview(found))) == wanted, f"state, {path}: names")
            size = state.size(job.spec, program.dimension)
            holds(len(found) == size, f"state, {path}: {len(found)} bytes after step {step}")
        for what, change in _CHANGES.items():
            other = {name: t.clone() for name, t in table.items()}
            change(other, place)
            again, released = _outcome(job, other, key)
            holds(again == states, f"state, {path}: {what} shows in the state")
            holds(released == result, f"state, {path}: {what} shows in the result")
        _foreign(job, states[1], f"state, {path}")
        gone = lab.spoilt(table, [place])
        broken = {name: t.clone() for name, t in table.items()}
        broken["x"][place] = math.inf
        same = _outcome(job, gone, key) == _outcome(job, broken, key)
        holds(same, f"state, {path}: a record that counts for nothing shows")


def _foreign(job: Job, held: bytes, what: str) -> None:
    """A run goes on from a state of its own job alone, at one of its steps, whole."""
    own, less = job.plan, dataclasses.replace
    first = 1 + held.index(b"}")  # of a step's number, which follows the job's digest
    at = next(i for i in range(first, len(held)) if held[i : i + 8] == (2).to_bytes(8, "little"))
    numbered = {n: held[:at] + n.to_bytes(8, "little") + held[at + 8 :] for n in (0, STEPS)}
    for of, plan, found in (
        ("its own", own, held),
        ("a job of less noise", less(own, sigma=own.sigma / 2), held),
        ("another request", less(own, request_digest=own.model_digest), held),
        ("before the first step", own, numbered[0]),
        ("after the last", own, numbered[STEPS]),
        ("one entry less", own, held[:-4]),
    ):
        right = False
        with suppress(CasemateError):
            right = state.check(found[: state.HEAD_BYTES], len(found), plan, job.spec).step == 2
        holds(right == (of == "its own"), f"{what}: a run goes on from the state of {of}: {right}")


def _louder(table: lab.Table, place: int) -> None:
    table["target"][place] = 1e3


def _longer(table: lab.Table, place: int) -> None:
    table["x"][place] *= 2.0**10


_CHANGES: Final = {"a loss": _louder, "a gradient's length": _longer}


def followed(seed: int) -> None:
    """Rule P11: weights, moments and average follow from the noised sums alone, by the optimizer's
    own formulas, written again here; also where most steps are empty and the rate has a
    schedule."""
    for (path, optimizer), make in (*_carriers.items(), *_thins.items()):
        job = lab.kept(make)
        steps = job.spec.steps
        rng = lab.rng_of("followed", seed, path)
        table = lab.zeros(job.schema)
        table["x"][:] = torch.from_numpy(rng.normal(size=(UNITS, D)) * 10)
        seen: list[np.ndarray] = []
        real = engine_noise.add_gaussian

        def add(total: np.ndarray, *rest: Any, real: Any = real, seen: Any = seen) -> None:
            real(total, *rest)
            seen.append(total.astype(np.float64))

        with mock.patch.object(engine_noise, "add_gaussian", add):
            run = job.start(table, rng.bytes(32))
            for step in range(steps):
                run(step)
        holds(
            len(seen) == steps, f"followed, {path}: {len(seen)} sums were noised in {steps} steps"
        )
        means = [total * job.plan.grid / job.plan.normaliser for total in seen]
        _, want = again(job, means)
        (found,) = run.result().values()
        off = float(np.abs(found.numpy().ravel() - want).max() / max(1.0, np.abs(want).max()))
        holds(off < 1e-4, f"followed, {path}, {optimizer}: {off:.3g} off what the noised sums make")


def again(job: Job, means: list[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """The weights after each step, (steps, d), and their average, from noised means, float64."""
    spec, w = job.spec.optimizer, job.initial.numpy().astype(np.float64)
    a, b, decay = np.zeros(len(w)), np.zeros(len(w)), job.spec.ema
    made = []
    for t, g in enumerate(means, 1):
        rate = spec.lr * _factor(job.spec.schedule, t, job.spec.steps)
        shrunk = isinstance(spec, Adam) and spec.decoupled
        w = w * (1 - rate * spec.weight_decay) if shrunk else w
        g = g if shrunk else g + spec.weight_decay * w
        if isinstance(spec, Adam):
            a = spec.beta1 * a + (1 - spec.beta1) * g
            b = spec.beta2 * b + (1 - spec.beta2) * g * g
            up = a / (1 - spec.beta1**t)
            w = w - rate * up / (np.sqrt(b / (1 - spec.beta2**t)) + spec.eps)
        else:
            a = spec.momentum * a + g
            w = w - rate * (g + spec.momentum * a if spec.nesterov else a)
        made.append(w)
    each = np.array(made)
    parts = decay ** np.arange(len(each) - 1, -1, -1.0)
    return each, parts @ each * (1 - decay) / (1 - decay ** len(each))


def _factor(schedule: Schedule, t: int, steps: int) -> float:
    """Of the learning rate at step t from 1 on."""
    if t <= schedule.warmup:
        return t / schedule.warmup
    done, left = t - 1 - schedule.warmup, steps - schedule.warmup
    if schedule.kind == "step":
        return schedule.gamma ** (done // schedule.every)
    if schedule.kind == "linear":
        return 1 - (1 - schedule.final) * done / left
    if schedule.kind == "cosine":
        return schedule.final + (1 - schedule.final) * (1 + math.cos(math.pi * done / left)) / 2
    return 1.0


def _last(path: str) -> Job:
    return lab.job(lab.Meter((5,)), lab.schema_of(5, 8), batch=4, steps=STEPS, path=path)


_lasts: Final = {path: functools.partial(_last, path) for path in ("auto", "record")}


def released(seed: int) -> None:
    """Without an average the result is the weights, to the bit, after any step."""
    for path, make in _lasts.items():
        job = lab.kept(make)
        rng = lab.rng_of("released", seed, path)
        table = lab.zeros(job.schema)
        table["x"][:] = torch.from_numpy(rng.normal(size=(8, 5)) * 10)
        run = job.start(table, rng.bytes(32))
        for step in range(STEPS):
            run(step)
            (found,) = run.result().values()
            same = torch.equal(found.reshape(-1), job.ready.program.flat.detach())
            holds(same, f"result, {path}: after step {step} it is not the weights")


# Of the worker's job: the widths of its network, and its steps.
WORKER: Final = (4, 60, 40, 2)
WORKED: Final = 2


@functools.cache
def worker() -> worker_lab.InProcess:
    """The worker's own code, on rows that add nothing."""
    return worker_lab.InProcess(worker_lab.job(WORKED, sizes=WORKER, spoilt=True))


def keys(seed: int) -> None:
    """Every run draws its own key: two runs of one job, and a run resumed from another's state,
    have noise that has nothing in common. Through the worker's own code, and the library's."""
    at = worker()
    size = len(at._initial)
    with pytest.MonkeyPatch.context() as patch:
        (first, states), (second, _) = at.run(patch, every=1), at.run(patch)
        sealed = worker_lab.sealed_state(states[1], 1)
        third, _ = at.run(patch, state=sealed)
        for step in (2, 0):
            refused = True
            with suppress(CasemateError):
                at.run(patch, state=worker_lab.sealed_state(states[1], step))
                refused = False
            holds(refused, f"keys: the state of step 1 is gone on from as that of step {step}")
    names = sorted(at.job.weights)

    def flat(wire: bytes) -> np.ndarray:
        loaded = tensors.load(memoryview(bytearray(wire)))
        holds(sorted(loaded) == names, f"keys: the worker's result is {sorted(loaded)}")
        order = [s.tensor for s in at.ready.program.trained]
        return np.concatenate([np.frombuffer(loaded[n][1], dtype="<f4") for n in order])

    initial = at._initial.numpy().astype(np.float64)
    plan = worker_lab.run_of(at.job, at.ready.prepared).plan
    unit = at.job.prepare.train.optimizer.lr * plan.sigma / plan.normaliser * math.sqrt(plan.steps)
    ones = [(flat(wire) - initial) / unit for wire in (first, second, third)]
    for i, z in enumerate(ones):
        normal(z, f"keys: noise of run {i}")
    uncorrelated(ones[0], ones[1], "keys: two runs")
    loaded = tensors.load(memoryview(bytearray(states[1])))
    raw = np.frombuffer(loaded[state.VECTOR + "weights"][1], dtype="<f4")
    once = unit / math.sqrt(plan.steps)
    tails = [(flat(wire) - raw.astype(np.float64)) / once for wire in (first, third)]
    uncorrelated(*tails, "keys: a run and the run resumed from its state")
    uncorrelated((raw - initial) / once, tails[1], "keys: a state and what is resumed from it")
    holds(size == len(raw), "keys: a state holds the trained weights")
    _generators(at, seed, states[1])
    _purposes(seed)
    made = [library(seed) for _ in range(2)]
    uncorrelated(*made, "keys: two runs of the library")


def _generators(at: worker_lab.InProcess, seed: int, state_of: bytes) -> None:
    """A run's key is 32 bytes as the operating system's generator gave them in that run, resumed
    or not."""
    resumed = worker_lab.sealed_state(state_of, 1)
    for who, module, name, run in (
        ("the worker", train, "train", lambda patch: at.run(patch)),
        ("a resumed run", train, "train", lambda patch: at.run(patch, state=resumed)),
        ("the library", private, "start", lambda patch: library(seed)),
    ):
        given: list[bytes] = []
        used: list[bytes] = []
        system, begun = os.urandom, getattr(module, name)

        def bytes_of(count: int, given: Any = given, system: Any = system) -> bytes:
            given.append(system(count))
            return bytes(given[-1])

        def begins(*args: Any, used: Any = used, begun: Any = begun, **more: Any) -> Any:
            used.append(args[5])
            return begun(*args, **more)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(os, "urandom", bytes_of)
            patch.setattr(module, name, begins)
            run(patch)
        right = len(used) == 1 and len(used[0]) == 32 and given.count(used[0]) == 1
        holds(right, f"keys: the key of {who} is not what the system's generator gave")


def _drops() -> Job:
    schema = lab.schema_of(9, UNITS)
    return lab.job(lab.Drops(9), schema, batch=UNITS, dropout=True, path="record")


def _purposes(seed: int) -> None:
    """Samples, noise, noise's further bits, random inputs: each has a key of its own."""
    made: dict[str, bytes] = {}
    asked: list[str] = []
    real = keystream.subkey

    def subkey(key: bytes, purpose: str) -> bytes:
        asked.append(purpose)
        made[purpose] = real(key, purpose)
        return made[purpose]

    job = lab.kept(_drops)
    engine_noise._subkeys.cache_clear()
    with mock.patch.object(keystream, "subkey", subkey):
        job.start(lab.zeros(job.schema), lab.key_of("purposes", seed))(0)
    right = len(asked) == len(set(asked)) == len(set(made.values())) == 4
    holds(right, f"keys: there are {sorted(asked)} for four purposes")


def library(seed: int, feature: float = 0.0) -> np.ndarray:
    """One step of ``Private`` on rows that hold this, over sigma; with 0 they add nothing."""
    module = nn.Linear(64, 8)
    with torch.no_grad():
        module.weight.zero_()
    data = {"input": torch.full((6, 64), feature), "target": torch.full((6, 8), feature)}
    run = Private(
        module, loss=lambda o, t: (o * t).sum(1), data=data,
        optimizer=torch.optim.SGD(module.parameters(), 1.0), batch_size=3, steps=1,
        noise_multiplier=1.0, delta=1e-5, compile_seconds=0,
        path="record",
    )  # fmt: skip
    run.train()
    made = module.weight.detach().numpy().astype(np.float64).ravel()
    return made * run.plan.normaliser / run.plan.sigma


def plans(seed: int) -> None:
    """The engine refuses plans whose constants do not bound what it does."""
    job = lab.kept(_plain)
    plan, units = job.plan, job.schema.units
    dimension = job.ready.program.dimension
    event = plan.events[0]
    less = dataclasses.replace
    wrong = {
        "less noise": less(plan, sigma=plan.sigma * 0.99),
        "a smaller sensitivity": less(plan, sensitivity=plan.clip, sigma=plan.sigma),
        "another clip": less(plan, clip=plan.clip * 2),
        "another rate": less(plan, rate=plan.rate * 1.1),
        "more steps": less(plan, steps=plan.steps + 1),
        "no events": less(plan, events=()),
        "events of fewer steps": less(plan, events=(less(event, steps=event.steps - 1),)),
        "events of a lower rate": less(plan, events=(less(event, rate=event.rate / 2),)),
        "events of more noise": less(plan, events=(less(event, noise_multiplier=9.0),)),
        "a grid that is no power of two": less(plan, grid=plan.grid * 0.75),
        "no delta for the sampler": less(plan, delta_sampler=0.0),
        "other units": less(plan, units=units + 1),
        "no privacy": less(plan, private=False),
        "another form of the clip": less(plan, clipping="per-layer"),
        "a gamma that its form has not": less(plan, gamma=plan.clip),
        "room for few units": less(plan, microbatches=1),
        "nothing charged for dropped units": less(plan, delta_truncation=0.0),
        "a grid on which sums overflow": less(
            plan,
            grid=2.0**-55,
            sigma=2.0**-45,
            noise_multiplier=2.0**-50,
            events=(less(event, noise_multiplier=2.0**-50),),
        ),
        "a grid too fine for the sampler": less(plan, grid=plan.sigma * 2.0**-33),
    }
    train.check_plan(plan, job.spec, dimension, units, job.path)
    for what, bad in wrong.items():
        refused = False
        try:
            train.check_plan(bad, job.spec, dimension, units, job.path)
        except PlanError:
            refused = True
        holds(refused, f"plans: a plan with {what} is run")
    other = lab.kept(_automatic)
    refused = False
    try:
        bad = less(other.plan, gamma=other.plan.gamma / 2)
        train.check_plan(bad, other.spec, D, other.schema.units, other.path)
    except PlanError:
        refused = True
    holds(refused, "plans: a plan with another gamma is run")
    for one in (job, *(lab.kept(sums.CASES[name]) for name in sums.CASES if "micro" in name)):
        bounds(one)
    _rooms()
    _sensitivities()


def _rooms() -> None:
    """A step's room, for populations of every size, against the binomial law."""
    for units, batch, steps, part in itertools.product(
        (30, 999, 1_000, 65_537, 10**6, 2 * 10**8), (1, 20, 512, 20_000), (1, 10**5),
        (1e-12, 1e-7, 1e-3),
    ):  # fmt: skip
        if batch < units:
            room = compile.capacity(units, batch / units, steps, part)
            over = steps * float(stats.binom.sf(room, units, batch / units))
            what = f"plans: room for {room} of {units} units at {batch}"
            holds(over <= part, f"{what} overflows with chance {over:.3g}, not {part:.3g}")


def _sensitivities() -> None:
    """What a unit moves, for models and clips of every size."""
    for path, dimension, bound, step in itertools.product(
        ("graph", "record"), (1, 100, 65_537, 10**6, 10**9), (1e-6, 1.0, 50.0), (2.0**-40, 2.0**-9)
    ):
        eta, rounding = (ETA, ROUNDING * bound) if path == "graph" else (0.0, 0.0)
        least = _moves(path, bound, dimension, bound * step)
        for what, found in (
            ("plan", compile.sensitivity(bound, eta, rounding, bound * step, dimension)),
            ("engine", train.SENSITIVITY[path](bound, dimension, bound * step)),
        ):
            holds(found >= least, f"plans: the {what} bounds {least:.7g} of {dimension} by {found}")


def _moves(path: str, bound: float, dimension: int, step: float) -> float:
    """The clip; on the path ``graph`` 2^-20 and, with the unit and without it, 2^-7 of it for what
    float32 sums round; and what the grid rounds."""
    more, rounded = (2.0**-20 + 2 * 2.0**-7, 1.0) if path == "graph" else (0.0, 0.5)
    return (bound * (1 + more) + rounded * step * math.sqrt(dimension)) * (1 - 1e-12)


def bounds(job: Job) -> None:
    """A plan's room and sensitivity, against what they bound."""
    # Of the units sampled in a step those past the last slot are dropped, so seldom as is charged.
    plan, units = job.plan, job.schema.units
    tail = float(stats.binom.sf(train.slots(plan), units, job.spec.batch_size / units))
    over = plan.steps * tail
    holds(over <= plan.delta_truncation, f"plans: overflow has chance {over:.3g}")
    least = _moves(job.path, plan.clip, job.ready.program.dimension, plan.grid)
    for what, found in (
        ("plan", plan.sensitivity),
        ("engine", train.SENSITIVITY[job.path](plan.clip, job.ready.program.dimension, plan.grid)),
    ):
        holds(found >= least, f"plans: the {what} bounds {least:.7g} by {found:.7g}")


def _automatic() -> Job:
    schema = lab.schema_of(D, UNITS)
    return lab.job(lab.Meter((D,)), schema, batch=UNITS, form="automatic", path="record")


def _plain() -> Job:
    schema = lab.schema_of(D, 400)
    return lab.job(
        lab.Meter((D,)), schema, batch=20, steps=50, noise=None, epsilon=3.0, path="record"
    )


def accounted(seed: int) -> None:
    """What is claimed is no less than the second accountant's certified lower bound, for the rate,
    the noise and the number of steps that a run has: server's plan, calibration and library."""
    rng = lab.rng_of("accounted", seed)
    job = lab.kept(_plain)
    plan, spec = job.plan, job.spec
    delta = spec.privacy.delta
    rate = spec.batch_size / job.schema.units
    holds(plan.normaliser == spec.batch_size, "accounted: the normaliser is the batch size asked")
    ratio = plan.sigma / max(plan.sensitivity, plan.clip)
    extra = plan.delta_truncation + plan.delta_sampler
    true = accountant.bounds(rate, ratio, spec.steps, delta - extra)
    charge, tight = quote.recompute(plan, delta)
    for what, found in (("charge", charge.epsilon), ("epsilon", tight), ("asked", 3.0)):
        holds(found >= true.low, f"accounted: the {what} is {found:.5f}, at least {true.low:.5f}")
    holds(charge.epsilon <= 3.0 * (1 + 1e-9), "accounted: the charge is what was asked")
    holds(tight <= max(true.low * 1.01, true.low + 0.01), f"accounted: {tight:.5f} is not tight")
    for _ in range(2):
        q, steps = 10 ** rng.uniform(-2.5, -0.3), int(10 ** rng.uniform(0, 2.3))
        epsilon, at = 10 ** rng.uniform(-0.7, 1.7), 10 ** rng.uniform(-8, -3)
        s = calibrate.noise_multiplier(q, steps, epsilon, at)
        low = accountant.bounds(q, s, steps, 0.9 * at).low
        holds(low <= epsilon, f"accounted: noise {s:.4g} for {epsilon:.4g} gives {low:.5f}")
        event = DpEvent(rate=q, noise_multiplier=s, steps=steps)
        found, low = pld.epsilon([event], at), accountant.bounds(q, s, steps, at).low
        holds(low <= found <= max(low * 1.01, low + 0.01), f"accounted: {found:.5f} for {low:.5f}")
    long = DpEvent(rate=0.01, noise_multiplier=1.0, steps=1_999)
    found, low = pld.epsilon([long], 1e-6), accountant.bounds(0.01, 1.0, 1_999, 1e-6).low
    holds(found >= low, f"accounted: {found:.5f} for {low:.5f} of 1,999 steps")
    with mock.patch.object(pld, "epsilon", lambda events, at: at):
        at = quote.recompute(plan, delta)[1]
        holds(at <= delta - extra, f"accounted: the tight epsilon is at {at}, not {delta - extra}")
    _planned(job, seed)
    _library_accounts()
    _budget()
    _curves(seed)
    _capacities(seed)


def _planned(job: Job, seed: int) -> None:
    """Plans for any epsilon, delta, clip and batch: noise, events and charge go together."""
    for i, epsilon in enumerate((0.2, 1.5, 12.0, 45.0)):
        rng = lab.rng_of("planned", seed, i)
        delta, steps = 10 ** rng.uniform(-8, -3), int(10 ** rng.uniform(0, 4))
        batch, clip = int(rng.integers(1, job.schema.units + 1)), 10 ** rng.uniform(-6, 6)
        privacy = Dp(epsilon=epsilon, delta=delta, clip=clip)
        spec = dataclasses.replace(job.spec, batch_size=batch, steps=steps, privacy=privacy)
        request = dataclasses.replace(job.request, train=spec)
        plan = compile.compile_plan(request, (job.schema,), job.ready.prepared)
        train.check_plan(plan, spec, job.ready.program.dimension, job.schema.units, job.path)
        charge, _ = quote.recompute(plan, delta)
        ratio = plan.sigma / max(plan.sensitivity, plan.clip)
        rate, extra = batch / job.schema.units, plan.delta_truncation + plan.delta_sampler
        low = accountant.bounds(rate, ratio, steps, delta - extra).low
        what = f"planned: {steps} steps at {rate:.3g} for epsilon {epsilon}"
        holds(low <= epsilon, f"{what} are at least {low:.5f}")
        holds(charge.epsilon <= epsilon * (1 + 1e-9), f"{what} are charged {charge.epsilon:.5f}")
        bounds(dataclasses.replace(job, plan=plan, spec=spec))


def _curves(seed: int) -> None:
    """The Renyi divergence that is accounted for a sampled step is no less than its integral
    (Mironov, Talwar, Zhang 2019) by the trapezoid rule over all its mass, and that of many steps
    is as many times one step's."""
    rng = lab.rng_of("curves", seed)
    usual = [(10 ** rng.uniform(-2.5, -0.1), 10 ** rng.uniform(-0.2, 0.8)) for _ in range(4)]
    rare = [(10 ** rng.uniform(-7, -2.5), 10 ** rng.uniform(-0.2, 0.8)) for _ in range(2)]
    loud = [(10 ** rng.uniform(-3, -0.01), 10 ** rng.uniform(0.8, 4)) for _ in range(2)]
    for q, s in (*usual, *rare, *loud, (1.0, 10 ** rng.uniform(-1, 2))):
        for order, found in zip(rdp.ORDERS, rdp.step_curve(q, s), strict=True):
            exact = _divergence(q, s, order)
            what = f"accounted: {found:.7g} for {exact:.7g} at order {order:g}"
            holds(found >= exact * (1 - 1e-6), f"{what}, rate {q:.3g}, noise {s:.3g}")
        for steps in (1, 999, int(10 ** rng.uniform(4, 7))):
            event = DpEvent(rate=q, noise_multiplier=s, steps=steps)
            _charged((event,), 10 ** rng.uniform(-18, -8))
            _charged((event, event), 0.0)


def _charged(events: tuple[DpEvent, ...], extra: float) -> None:
    """A charge is no less than its events' curves and its extra delta, to the last unit: a job that
    costs less than one may be had any number of times."""
    found = filters.nano(events)
    for i, n in enumerate(found):
        exact = sum(
            e.steps * Fraction(rdp.step_curve(e.rate, e.noise_multiplier)[i]) for e in events
        )
        least = min(exact * 10**9, Fraction(filters.SATURATED))
        holds(n >= least, f"accounted: {events} are {float(least):.4g} and charged {n}")
    femto = filters.femto(extra)
    holds(femto >= Fraction(extra) * 10**15, f"accounted: a delta of {extra:.3g} as {femto} femto")
    with suppress(BudgetError):
        made = RdpFilter.charge(events, extra, delta_shown=1e-2)
        whole = (made.rdp_nano, made.delta_femto) == (found, femto)
        holds(whole, f"accounted: {events} are charged whole")


def _divergence(q: float, s: float, order: float) -> float:
    """Of N(0, s^2) mixed with N(1, s^2) at rate q from N(0, s^2); the ratio's mean is 1, so what is
    added up is above zero and nothing cancels."""
    if q == 1:
        return order / (2 * s * s)
    width = (order + 26 * s) / 20_000  # below a tenth of s: the rule errs by nothing
    z = -13 * s + width * np.arange(20_001)
    plain = -((z / s) ** 2) / 2 - math.log(s * math.sqrt(2 * math.pi)) + math.log(width)
    level = (2 * z - 1) / (2 * s * s)
    ratio = np.logaddexp(math.log1p(-q), math.log(q) + level)
    part = np.empty_like(z)
    far = order * ratio > 30
    above = q * np.expm1(level[~far])  # of the ratio, what it is above 1
    with np.errstate(divide="ignore"):
        part[~far] = np.log(np.maximum(np.expm1(order * np.log1p(above)) - order * above, 0.0))
    v = ratio[far]
    line = math.log(order) + v + np.log1p((1 - order) / order * np.exp(-v))
    part[far] = order * v + np.log1p(-np.exp(line - order * v))
    return float(np.logaddexp(0.0, special.logsumexp(plain + part))) / (order - 1)


def _capacities(seed: int) -> None:
    """What a filter's orders take of delta together is what the proof has to give: 0.9."""
    rng = lab.rng_of("capacities", seed)
    some = [(10 ** rng.uniform(-1, 1.7), 10 ** rng.uniform(-9, -2)) for _ in range(20)]
    for epsilon, delta in ((0.5, 1e-6), (4.0, 1e-5), (8.0, 1e-8), (50.0, 1e-3), *some):
        share = 0.0
        for order, capacity in zip(rdp.ORDERS, filters.capacities(epsilon, delta), strict=True):
            if capacity >= 0:
                log = (order - 1) * (capacity / 1e9 - epsilon + math.log1p(-1 / order))
                share += math.exp(log) / order / delta
        what = f"accounted: of ({epsilon:.3g}, {delta:.3g})"
        holds(share <= 0.9 * (1 + 1e-6), f"{what} the orders take {share:.4f} of delta")
        most = filters.delta_capacity(delta) / 1e15
        holds(most <= 0.1 * delta * (1 + 1e-9), f"{what} the extra deltas take {most:.3g}")


def _library_accounts() -> None:
    run = lab.kept(_private)  # type: ignore[arg-type]
    if run.done == 0:
        with suppress(UsageError):
            while run.done < 1000:
                run.step()
    rate, ratio = 3 / 12, run.plan.sigma / max(run.plan.sensitivity, run.plan.clip)
    true = accountant.bounds(rate, ratio, run.done, run.delta)
    for way in ("rdp", "pld"):
        found = run.spent(run.done, way)
        holds(true.low <= found, f"accounted: the library's {found:.5f} by {way}")
    holds(run.epsilon <= 2.0, "accounted: the library spends what was asked")
    for way, spent in private.ACCOUNTANTS.items():
        noise = private.noise_for(rate, 40, 3.0, 1e-6, way)  # type: ignore[arg-type]
        event = DpEvent(rate=rate, noise_multiplier=noise, steps=40)
        found = spent((event,), 1e-6)
        holds(found <= 3.0 * (1 + 1e-9), f"accounted: the library's noise by {way} is of {found}")
    holds(run.done == 5, f"accounted: the library takes {run.done} steps")


def _private() -> Any:
    module = nn.Linear(4, 2)
    data = {"input": torch.randn(12, 4), "target": torch.zeros(12, dtype=torch.int64)}
    return Private(
        module, loss="cross_entropy", data=data,
        optimizer=torch.optim.SGD(module.parameters(), 0.1),
        batch_size=3, steps=5, epsilon=2.0, delta=1e-5, accountant="pld", compile_seconds=0,
        path="record",
    )  # fmt: skip


def _budget() -> None:
    """A dataset's filter admits jobs as long as all of them together are within its budget."""
    budget = Budget(epsilon=4.0, delta=1e-5)
    holder, event = RdpFilter(budget), DpEvent(rate=0.1, noise_multiplier=2.0, steps=100)
    charge = holder.charge([event], 1e-9, delta_shown=1e-6)
    spent, delta, jobs = RdpFilter.empty(), 0, 0
    while holder.admits(spent, delta, charge) and jobs < 100:
        spent = tuple(s + c for s, c in zip(spent, charge.rdp_nano, strict=True))
        delta, jobs = delta + charge.delta_femto, jobs + 1
    low = accountant.bounds(0.1, 2.0, max(1, jobs * 100), budget.delta).low
    holds(jobs > 0 and low <= budget.epsilon, f"accounted: {jobs} jobs of a budget make {low:.4f}")
