"""What one unit adds to a step's sum, however its record is made and wherever it sits."""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any, Final
from unittest import mock

import numpy as np
import torch
from torch import nn

from audit import lab
from audit.lab import Job, Table
from audit.law import holds
from casemate.engine import rows
from casemate.engine.capture import table as tables
from casemate.spec.job import Crop, Execution, Flip, Views
from support import batched_lab
from support.engine_lab import no_noise

SIZES: Final = (1, 7, 20)
D: Final = sum(SIZES)
MANY: Final = (2, 1, 3, 1, 4, 2, 1, 3, 2, 1, 5, 3)  # D as well
GAIN: Final = 1e12
UNITS: Final = 12
# Above the clip by this, of the clip, is a clip that does not hold: float32 sums err by less.
TIGHT: Final = 1e-4

Vector = np.ndarray


def moderate(rng: np.random.Generator) -> Vector:
    return rng.normal(size=D) * 10.0 ** rng.uniform(-1, 3)


def near(rng: np.random.Generator) -> Vector:
    """Just above the clip, where a coarse norm lets most through."""
    x = rng.normal(size=D)
    return x / np.linalg.norm(x) * (1 + 10.0 ** rng.uniform(-4, -2))


def spread(rng: np.random.Generator) -> Vector:
    return rng.choice([-1.0, 1.0], D) * 10.0 ** rng.uniform(-40, 20, D)


def layered(rng: np.random.Generator) -> Vector:
    """Every tensor's part above the whole clip."""
    return rng.choice([-1.0, 1.0], D) * 5.0


def flat(rng: np.random.Generator) -> Vector:
    """All entries alike: the largest is sqrt(d) below the norm."""
    return rng.choice([-1.0, 1.0], D) * (0.9 + 0.2 * rng.random())


def huge(rng: np.random.Generator) -> Vector:
    return rng.normal(size=D) * 1e30


def infinite(rng: np.random.Generator) -> Vector:
    """One entry overflows in float32."""
    x = rng.normal(size=D)
    x[rng.integers(D)] = 1e40
    return x


def tiny(rng: np.random.Generator) -> Vector:
    return rng.normal(size=D) * 1e-3


HOSTILE: Final[tuple[Callable[[np.random.Generator], Vector], ...]] = (
    moderate, near, spread, layered, flat, huge, infinite, tiny,
)  # fmt: skip


class Sick(nn.Module):
    """A meter whose gradient is NaN where a feature is very large."""

    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.zeros(D))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        large = x * 1e20
        return ((large - large + x) * self.w).sum(1, keepdim=True)


def _meter(form: str = "flat", path: str = "auto", clip: float = 1.0, **more: Any) -> Job:
    schema, module = lab.schema_of(D, UNITS), lab.Meter(SIZES, GAIN)
    return lab.job(module, schema, batch=UNITS, form=form, path=path, clip=clip, **more)


CASES: Final[dict[str, Callable[[], Job]]] = {
    "graph": lambda: _meter(),
    "record": lambda: _meter(path="record"),
    # Of another clip than 1, so that one that is forgotten shows.
    "graph, per-layer": lambda: _meter("per-layer", clip=0.3),
    "record, per-layer": lambda: _meter("per-layer", "record", clip=3.0),
    "graph, automatic": lambda: _meter("automatic", clip=3.0),
    "record, automatic": lambda: _meter("automatic", "record", clip=0.3),
    "graph, automatic, a large gamma": lambda: _meter("automatic", gamma=4.0),
    "record, automatic, a large gamma": lambda: _meter("automatic", "record", gamma=4.0),
    "graph, many tensors": lambda: lab.job(lab.Meter(MANY, GAIN), lab.schema_of(D, 40), batch=40),
    "graph, one matrix": lambda: lab.job(lab.Line(D), lab.schema_of(D, UNITS), batch=9),
    "graph, microbatches of the native step": lambda: lab.job(
        lab.Meter(SIZES, GAIN), lab.schema_of(D, 60), batch=45, few=16
    ),
    # Units of two rows are none that the native step takes.
    "graph, microbatches": lambda: lab.job(
        lab.Meter(SIZES, GAIN), lab.schema_of(D, 60, units=60, k=2), batch=45, few=16
    ),
}


def expected(job: Job, gradient: Vector, sizes: tuple[int, ...]) -> Vector:
    """What a unit with this gradient adds, in float64, by the clip's definition."""
    with np.errstate(over="ignore"):
        g = gradient.astype(np.float32).astype(np.float64)
    if not np.isfinite(g).all():
        return np.zeros(len(g))
    bound, form = job.plan.clip, job.plan.clipping
    norm = float(np.linalg.norm(g))
    if form == "automatic":
        return g * (bound / (norm + job.plan.gamma))
    if form == "per-layer":
        share, out = bound / math.sqrt(len(sizes)), g.copy()
        for first, end in itertools.pairwise([0, *itertools.accumulate(sizes)]):
            part = float(np.linalg.norm(g[first:end]))
            out[first:end] *= min(1.0, share / max(part, 1e-300))
        return out
    return g * min(1.0, bound / max(norm, 1e-300))


def moved(job: Job, table: Table, rows: list[int], key: bytes) -> Vector:
    """How far the release moves when these rows are zeroed out, the chance being the same."""
    return job.step(table, key) - job.step(lab.spoilt(table, rows), key)


def bounded(job: Job, found: Vector, what: str) -> None:
    holds(bool(np.isfinite(found).all()), f"{what}: what is released is finite")
    norm, most = float(np.linalg.norm(found)), job.plan.sensitivity
    holds(
        norm <= most + job.slack(), f"{what}: a unit moves the sum by {norm:.6g}, above {most:.6g}"
    )


def on_path(job: Job, path: str) -> None:
    """What is to be looked at is what runs: a path that is wrong may be refused by the engine's own
    comparison of the two, and the other taken."""
    why = job.ready.prepared.path[-1][:120]
    holds(job.path == path, f"the engine takes the path {job.path}, not {path} ({why})")


def company(job: Job, rng: np.random.Generator, gain: float = GAIN) -> Table:
    table = lab.zeros(job.schema)
    shape = table["x"].shape
    table["x"][:] = torch.from_numpy(rng.normal(size=shape) * 10.0 ** rng.uniform(-2, 2) / gain)
    return table


def in_microbatches(job: Job, name: str) -> None:
    """That a case named for microbatches has several, of the native step or of the general one."""
    if "microbatches" in name:
        fast = job.ready.fast
        native = fast is not None and fast._small() is not None
        right = job.plan.microbatches > 1 and native == ("native" in name)
        holds(right, f"{name}: {job.plan.microbatches} microbatches, native: {native}")


def sensitivity(seed: int, trials: int = 1) -> None:
    """One hostile record at a random place moves what is released by what is accounted at most; a
    record that is not hostile adds what the clip's definition says. Both paths, all forms."""
    for name, make in CASES.items():
        job = lab.kept(make)
        gain = 1.0 if "matrix" in name else GAIN
        on_path(job, name.split(",")[0])
        in_microbatches(job, name)
        sizes = tuple(leaf.numel() for leaf in job.ready.program.leaves)
        _octaves(job, name, sizes, seed)
        for i, hostile in itertools.product(range(trials), HOSTILE):
            rng = lab.rng_of("sensitivity", seed, name, hostile.__name__, i)
            table = company(job, rng, gain)
            place, made = int(rng.integers(job.schema.units)), hostile(rng)
            if gain == 1.0:
                made = np.clip(made, -1e29, 1e29)
            table["x"][place] = torch.from_numpy(made * (job.plan.clip / gain))
            gradient = table["x"][place].numpy().astype(np.float64) * gain
            found = moved(job, table, [place], rng.bytes(32))
            what = f"{name}, {hostile.__name__}"
            bounded(job, found, what)
            want = expected(job, gradient, sizes)
            most = job.plan.clip * (1 + TIGHT) + job.plan.grid * math.sqrt(D) + job.slack()
            norm = float(np.linalg.norm(found))
            holds(norm <= most, f"{what}: {norm:.7g} is above the clip {job.plan.clip:g}")
            off = float(np.linalg.norm(found - want))
            long = float(np.linalg.norm(gradient))
            if 2.0**40 < long < 1e38:  # the path ``graph`` may count such a one as nothing
                continue
            none = job.plan.rate < 1
            out = none and norm <= job.slack() + 1e-9
            holds(out or off <= 2e-3, f"{what}: adds {off:.3g} other than the clip says")


def _octaves(job: Job, name: str, sizes: tuple[int, ...], seed: int) -> None:
    """A gradient in each octave of 2^-20 to 2^124 clips, each unit's along its own entry."""
    rng = lab.rng_of("octaves", seed, name)
    gain, bound = 1.0 if "matrix" in name else GAIN, job.plan.clip
    units = min(D, job.schema.units)
    for lowest in range(-20, 124, units):
        table = lab.zeros(job.schema)
        long = bound * 2.0 ** np.minimum(124, lowest + np.arange(units) + rng.random(units))
        table["x"][:units, :units] = torch.from_numpy(np.diag(np.minimum(long / gain, 1e29)))
        each = np.diag(table["x"][:units, :units].numpy()).astype(np.float64) * gain
        found = quiet(job, table, rng.bytes(32))
        for unit, gradient in enumerate(np.diag(each)):
            more = np.concatenate([gradient, np.zeros(D - units)])
            off = abs(found[unit] - expected(job, more, sizes)[unit])
            here = f"{name}: a gradient {each[unit] / bound:.3g} clips long"
            holds(off <= 2e-3 * bound or not found[unit], f"{here} adds {off:.3g} other")


def numbers_that_are_none(seed: int) -> None:
    """A gradient of NaN, or a record on which the model fails, adds nothing and takes nothing from
    others."""
    _failures(seed)
    for path in ("auto", "record"):
        job = lab.kept(_sick[path])
        rng = lab.rng_of("nan", seed, path)
        table = company(job, rng, 1.0)
        place = int(rng.integers(UNITS))
        table["x"][place, : D // 2] = 1e25
        found = moved(job, table, [place], rng.bytes(32))
        holds(bool(np.isfinite(found).all()), f"NaN, {path}: what is released is finite")
        off = float(np.linalg.norm(found))
        holds(off <= job.slack(), f"NaN, {path}: a gradient of NaN moves the sum by {off:.3g}")


def _failures(seed: int) -> None:
    mark = 12_345.0
    for path, make in _sick.items():
        job = lab.kept(make)
        rng = lab.rng_of("failures", seed, path)
        table = company(job, rng, 1.0)
        place, told = int(rng.integers(UNITS)), [0]
        table["x"][place] = mark

        def fails(values: Iterable[torch.Tensor], told: list[int] = told) -> None:
            if any(bool((v == mark).any()) for v in values):
                told[0] += 1
                raise ZeroDivisionError

        fast, program = job.ready.fast, job.ready.program
        batch, one = fast and fast._evaluate, program.gradient

        def evaluate(weights: torch.Tensor, fast: Any = fast, batch: Any = batch) -> Any:
            fails(fast._buffers.values())
            return batch(weights)

        def gradient(values: Sequence[Any], out: torch.Tensor, one: Any = one) -> None:
            fails(values)
            one(values, out)

        where: Any = (fast, "_evaluate", evaluate) if fast else (program, "gradient", gradient)
        with mock.patch.object(*where):
            found = moved(job, table, [place], rng.bytes(32))
        holds(told[0] > 0, f"failures, {path}: the model does not fail")
        off = float(np.linalg.norm(found))
        holds(off <= job.slack(), f"failures, {path}: one on which it fails moves {off:.3g}")


def _on_sick(path: str) -> Job:
    return lab.job(Sick(), lab.schema_of(D, UNITS), batch=UNITS, path=path)


_sick: Final = {path: functools.partial(_on_sick, path) for path in ("auto", "record")}


def _units(path: str, k: int) -> Job:
    schema = lab.schema_of(D, k * UNITS, units=UNITS, k=k)
    return lab.job(lab.Meter(SIZES), schema, batch=UNITS, path=path)


_of_units: Final = {
    (path, k): functools.partial(_units, path, k) for path in ("auto", "record") for k in (1, 2)
}


def units(seed: int) -> None:
    """A unit of several rows counts as one, and no more of them than are declared."""
    people(seed)
    for (path, k), make in _of_units.items():
        job = lab.kept(make)
        for i in range(3):
            rng = lab.rng_of("units", seed, path, k, i)
            table = company(job, rng, 1.0)
            place = int(rng.integers(UNITS))
            mine = rng.choice(k * UNITS, size=(1, 2, 6)[i], replace=False)
            others = [u for u in range(UNITS) if u != place]
            table["who"][:] = torch.from_numpy(rng.choice(others, k * UNITS))
            table["who"][mine] = place
            turn = rng.normal(size=D)
            for row in mine:  # all rows point the same way
                table["x"][row] = torch.from_numpy(turn * 10)
            found = moved(job, table, [int(r) for r in mine], rng.bytes(32))
            what = f"a unit of {len(mine)} rows, of which {k} count, {path}"
            bounded(job, found, what)
            want = turn / np.linalg.norm(turn)
            off = float(np.linalg.norm(found - want))
            holds(off < 2e-3, f"{what}: adds {off:.3g} other than once")


def people(seed: int) -> None:
    """The library's units are those that it is told, whatever their numbers are."""
    for k in (1, 2):
        rng = lab.rng_of("people", seed, k)
        ids = rng.choice([-5, 0, 3, 1 << 40, (1 << 40) + (1 << 32)], 4, replace=False)
        who = rng.permutation(np.repeat(ids, 3))
        made = tables.group({"row": torch.arange(12)}, torch.from_numpy(who), k)
        kept = made.tensors["row"].numpy()
        owners = np.arange(len(kept)) if made.owner is None else made.owner.numpy()
        holds(made.units == 4, f"people: {made.units} units of 4 people")
        for unit in range(4):
            mine = set(who[kept[owners == unit]])
            rows_of = int((owners == unit).sum())
            holds(len(mine) == 1 and rows_of == k, f"people: a unit has {rows_of} rows of {mine}")
        holds(len(kept) == 4 * k, f"people: {len(kept)} rows of four are used")


def _coarse(path: str) -> Job:
    schema = lab.schema_of(D, UNITS)
    return lab.job(lab.Meter(SIZES), schema, batch=UNITS, path=path, grid=2.0**-6)


_on_grid: Final = {path: functools.partial(_coarse, path) for path in ("auto", "record")}


def rounding(seed: int) -> None:
    """A record whose entries all round away from zero moves the sum beyond the clip: what the
    plan accounts has room for that. None is moved by more than half a step of the grid."""
    for path, make in _on_grid.items():
        job = lab.kept(make)
        rng = lab.rng_of("rounding", seed, path)
        half = np.where(rng.permutation(D) < D // 2, 11.5, 12.5) * (1 + 1e-4)
        made = half * job.plan.grid * rng.choice([-1.0, 1.0], D)
        table = lab.zeros(job.schema)
        place = int(rng.integers(UNITS))
        table["x"][place] = torch.from_numpy(made)
        found = moved(job, table, [place], rng.bytes(32))
        bounded(job, found, f"rounding, {path}")
        least = job.plan.clip + job.plan.grid * math.sqrt(D) / 2
        holds(job.plan.sensitivity >= least, f"rounding, {path}: the plan has room for the grid")
        steps = found / job.plan.grid
        off = float(np.abs(steps - np.rint(steps)).max())
        holds(off < 1e-3, f"rounding, {path}: what a unit adds is {off:.3g} off the grid")
        made = (12 + 1e-3) * job.plan.grid * rng.choice([-1.0, 1.0], D)  # just above a grid point
        table["x"][place] = torch.from_numpy(made)
        found = moved(job, table, [place], rng.bytes(32))
        far = float(np.abs(found - made).max() / job.plan.grid)
        holds(far <= 0.5 + 1e-3, f"rounding, {path}: an entry is moved by {far:.3f} grid steps")


class Late(nn.Module):
    """A meter of two tensors, of which the second begins after 70,000 entries."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Parameter(torch.zeros(70_000))
        self.b = nn.Parameter(torch.zeros(9))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.stack([(x[:, :1] * self.a).sum(1), (x[:, 1:] * self.b).sum(1)], 1)


class Asks(nn.Module):
    """A learned vector goes through a matrix that lies 70,000 entries behind it: the matrix's
    gradient is made of weights which a step changes before it comes to the matrix."""

    def __init__(self) -> None:
        super().__init__()
        self.ask = nn.Parameter(torch.ones(3))
        self.a = nn.Parameter(torch.zeros(70_000))
        self.b = nn.Parameter(torch.zeros(9, 3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        made = nn.functional.linear(self.ask.expand(x.shape[0], 3), self.b)
        return torch.cat([(x[:, :1] * self.a).sum(1, keepdim=True), x[:, 1:] * made], 1)


def _late(path: str, module: type[nn.Module]) -> Job:
    return lab.job(module(), lab.schema_of(10, 6), batch=6, path=path)


_lates: Final = {
    (path, module): functools.partial(_late, path, module)
    for path in ("auto", "record")
    for module in (Late, Asks)
}


def late_entries(seed: int) -> None:
    """A gradient that is long only where a model's first window of entries is over, or a tensor's,
    and one that is made of weights which the first windows change."""
    for (path, module), make in _lates.items():
        job = lab.kept(make)
        on_path(job, "graph" if path == "auto" else path)
        rng = lab.rng_of("late", seed, path, module.__name__)
        place = int(rng.integers(6))
        for what, a, b in (("last", 0, 50), ("first", 50, 0), ("all", 5, 50)):
            made = rng.normal(size=10) * [a, *[b] * 9]
            table = lab.zeros(job.schema)
            table["x"][place] = torch.from_numpy(made)
            found = moved(job, table, [place], rng.bytes(32))
            bounded(job, found, f"late entries, {path}, {what}")
            rest = made[1:] if module is Late else np.repeat(made[1:], 3)
            want = np.concatenate([np.full(70_000, made[0]), rest])
            found = found[-len(want) :] - want / np.linalg.norm(want)
            off = float(np.linalg.norm(found))
            holds(off < 3e-3, f"late entries, {path}, {what}: adds {off:.3g} other than it should")


def _three(path: str) -> Job:
    return lab.job(lab.Meter((8,)), lab.schema_of(8, 18, units=18, k=2), batch=18, path=path)


_threes: Final = {path: functools.partial(_three, path) for path in ("auto", "record")}


def several_datasets(seed: int) -> None:
    """Three datasets in one job, units of up to two rows: units of the same number in all are
    three, and each moves the sum as far as one may."""
    part = lab.schema_of(8, 6, units=6, k=2)
    for path, make in _threes.items():
        job = lab.kept(make)
        rng = lab.rng_of("three", seed, path)
        place, key = int(rng.integers(6)), rng.bytes(32)
        tables = [lab.zeros(part) for _ in range(3)]
        for i, table in enumerate(tables):
            table["x"][place, i] = 50.0 * (-10) ** i

        def released(tables: list[Table], job: Job = job, key: bytes = key) -> Vector:
            made = rows.assemble((part,) * 3, tables, job.ready.program.data, job.inputs)
            holds(made.units == 18, f"datasets: {made.units} units of three times 6")
            return job.step_of(made, key)

        whole = released(tables)
        for i, table in enumerate(tables):
            without = [*tables[:i], lab.spoilt(table, [place]), *tables[i + 1 :]]
            found = whole - released(without)
            bounded(job, found, f"datasets, {path}")
            found[i] -= (-1.0) ** i
            off = float(np.linalg.norm(found))
            holds(off < 2e-3, f"datasets, {path}: the unit of number {i} adds {off:.3g} other")


def _net(path: str) -> Job:
    return lab.job(lab.Net(), lab.schema_of(12, UNITS), batch=9, path=path, loss=net_loss, clip=0.3)


def net_loss(outputs: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """Of a record of zeros, as a free place holds, the gradient is not zero."""
    return outputs[:, 0] * (target + 1) + outputs[:, 1].square()


_nets: Final = {path: functools.partial(_net, path) for path in ("auto", "record")}


def algorithm(seed: int) -> None:
    """Abadi et al. 2016, Algorithm 1: a unit of a real network adds its clipped gradient, by
    autograd in float64, whoever is beside it; free places add nothing."""
    for path, make in _nets.items():
        job = lab.kept(make)
        on_path(job, "graph" if path == "auto" else path)
        rng = lab.rng_of("algorithm", seed, path)
        table = lab.zeros(job.schema)
        table["x"][:] = torch.from_numpy(rng.normal(size=(UNITS, 12)))
        table["target"][:] = torch.from_numpy(rng.normal(size=UNITS))
        each = batched_lab.gradients(lab.Net(), job.ready.program, table, net_loss)
        parts = each * torch.clamp(job.plan.clip / each.norm(dim=1), max=1)[:, None]
        alone = rng.permutation(UNITS)
        for place in alone[:3]:
            key = rng.bytes(32)
            by_all = moved(job, table, [int(place)], key)
            few = lab.spoilt(table, [int(i) for i in alone[6:] if i != place])
            by_few = moved(job, few, [int(place)], key)
            bounded(job, by_all, f"net, {path}")
            off = float(np.linalg.norm(by_all - by_few))
            holds(off <= 1e-4 + job.slack(), f"net, {path}: company changes a unit by {off:.3g}")
            one = parts[int(place)].numpy()
            off = min(float(np.linalg.norm(by_all - one)), float(np.linalg.norm(by_all)))
            holds(off <= 1e-3, f"net, {path}: a unit adds {off:.3g} other than its gradient")
        found = quiet(job, table, rng.bytes(32))
        holds(bool(np.isfinite(found).all()), f"net, {path}: the sum is finite")
        nobody = quiet(job, lab.spoilt(table, slice(None)), rng.bytes(32))
        holds(not nobody.any(), f"net, {path}: nobody's rows add nothing")
        same = lab.zeros(job.schema)
        same["x"][:], same["target"][:] = table["x"][:1], table["target"][:1]
        found = quiet(job, same, rng.bytes(32))
        one = parts[0].numpy()
        times = float(found @ one / (one @ one))
        off = float(np.linalg.norm(found - round(times) * one))
        right = 0 <= round(times) <= UNITS and off <= 1e-3 * (1 + times)
        holds(right, f"net, {path}: {UNITS} equal units add {times:.4f} times one")


def quiet(job: Job, table: Table, key: bytes) -> Vector:
    """A step's sum before its noise."""
    from casemate.engine import train

    with torch.no_grad():
        job.ready.program.flat.copy_(job.initial)
    run = train.loop(
        job.plan, Execution(path=job.path), job.spec, job.ready.program, job.rows(table), key,
        no_noise, job.ready.keep, job.ready.fast,
    )  # fmt: skip
    run(0)
    before = job.initial.numpy().astype(np.float64)
    return (before - job.flat()) * job.plan.normaliser / job.rate


def _drops(views: int, path: str, size: int = 9) -> Job:
    schema = lab.schema_of(size, UNITS)
    return lab.job(
        lab.Drops(size), schema, batch=UNITS, dropout=True, views=Views(count=views), path=path
    )


# More than a stream's blocks of one record that are drawn in one piece.
LONG: Final = 2_100


class Seen(nn.Module):
    """A meter of images."""

    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.zeros(2, 4, 4))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return (x * self.w).flatten(1).sum(1, keepdim=True)


def _turned(count: int, path: str, pad: Any = "zeros") -> Job:
    views = Views(count=count, transforms=(Flip(), Crop(pixels=1, pad=pad)))
    return lab.job(Seen(), lab.schema_of((2, 4, 4), UNITS), batch=UNITS, views=views, path=path)


_random: Final = {
    (what, views, path): functools.partial(make, views, path)
    for what, make, counts in (
        ("dropout", _drops, (1, 4)),
        ("dropout of long records", functools.partial(_drops, size=LONG), (2,)),
        ("images", _turned, (1, 4)),
        ("images reflected", functools.partial(_turned, pad="reflect"), (2,)),
    )
    for views in counts
    for path in ("auto", "record")
}


def random_inputs(seed: int) -> None:
    """Dropout's masks and views: a unit's mean over its views is clipped once, and its draws do not
    depend on who is beside it."""
    for (made, views, path), make in _random.items():
        job = lab.kept(make)
        on_path(job, "graph" if path == "auto" else path)
        rng = lab.rng_of("random", seed, made, views, path)
        what = f"{made}, {views} views, {path}"
        table = lab.zeros(job.schema)
        table["x"][:] = torch.from_numpy(rng.normal(size=table["x"].shape) * 100)
        place, key = int(rng.integers(UNITS)), rng.bytes(32)
        found = moved(job, table, [place], key)
        bounded(job, found, what)
        norm = float(np.linalg.norm(found))
        holds(
            norm <= 1 + TIGHT + job.slack(), f"{what}: a unit adds {norm:.6g}, more than the clip"
        )
        holds(norm > 0.99 or not found.any(), f"{what}: a unit adds its mean, clipped")
        alone = lab.spoilt(table, [i for i in range(UNITS) if i != place])
        off = float(np.linalg.norm(found - moved(job, alone, [place], key)))
        holds(off <= 1e-4 + job.slack(), f"{what}: company changes a unit's draws by {off:.3g}")


class Narrow(nn.Module):
    """Entry by entry, seven at a time: the ends of vectors lie among the records."""

    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.ones(7))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return nn.functional.silu(x[:, :7] * self.w)


class Products(nn.Module):
    """Products whose sums a library may add in an order that goes by the slot."""

    def __init__(self) -> None:
        super().__init__()
        made = torch.Generator().manual_seed(1)
        self.w = nn.Parameter(torch.ones(7))
        self.register_buffer("m", torch.randn(7, 13, generator=made))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.tanh((x[:, :7] * self.w) @ self.m) @ self.m.t()


def slots(seed: int) -> None:
    """Rule P13: a record's contribution has the same bits in every slot of a microbatch; a model
    that makes rounding into a signal moves no more than others."""

    def data(n: int) -> batched_lab.Data:
        made = torch.Generator().manual_seed(seed)
        x = torch.randn(n, 9, generator=made)
        return {"x": x, "target": torch.randn(n, generator=made)}

    def score(outputs: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        return outputs.square().sum(1) + outputs[:, 0] * target

    for module in (Narrow(), Products()):
        at = batched_lab.lab(module, data, score, rows=48)
        for i in range(24):
            same = {k: v[i : i + 1].repeat(48, *(1,) * (v.dim() - 1)) for k, v in at.data.items()}
            made = len(set(at.contributions(1.0, same)))
            holds(made == 1, f"a record has {made} contributions over 48 slots")
    job = lab.kept(_amplified)
    rng = lab.rng_of("slots", seed)
    table = lab.zeros(job.schema)
    table["x"][:] = torch.from_numpy(rng.normal(size=tuple(table["x"].shape)))
    for place in rng.permutation(UNITS)[:4]:
        bounded(job, moved(job, table, [int(place)], rng.bytes(32)), "the amplifier")


def _amplified() -> Job:
    return lab.job(lab.Amplifier(13), lab.schema_of(13, UNITS), batch=UNITS)
