"""Sums of models that are no meters, against gradients by autograd in float64: several steps in
several microbatches, and every way to every kind of layer's norm."""

from __future__ import annotations

import contextlib
import functools
import itertools
import math
from collections.abc import Callable, Iterator
from typing import Any, Final
from unittest import mock

import numpy as np
import torch
from torch import Tensor, nn

from audit import known, lab, sums
from audit.lab import Job
from audit.law import holds
from casemate.engine import batched, compiled, kernels, small, train, windows
from casemate.engine.islands import Island, islands
from casemate.engine.joint import SEED
from casemate.engine.nodes import Runner, needed
from casemate.spec.job import Execution
from support import batched_lab
from support.engine_lab import no_noise

UNITS: Final = 60
STEPS: Final = 6


def _net(path: str) -> Job:
    few = 16 if path == "auto" else 0
    return lab.job(
        lab.Net(), lab.schema_of(12, UNITS), batch=30, steps=STEPS, path=path, loss=sums.net_loss,
        clip=0.3, few=few,
    )  # fmt: skip


def _compiled() -> Job:
    """As if islands had been compiled: what came of it, with each island's operations in its
    place, is taken before the first step."""
    job = _net("auto")
    if (fast := job.ready.fast) is not None:
        ends, forming, instead = [*fast.source, SEED], fast._forming, fast.instead
        order = fast.runner.order(ends, needed(fast._given, forming))
        found = islands(fast.runner, order, needed(fast._given, forming), frozenset(instead))
        fused = [(island, _operations(fast.runner, island)) for island in found]
        call = compiled.function(fast.runner, ends, fast._given, instead, fused, forming)
        made = compiled.Fused(call, len(fused), 1, (), 0.0)
        fast.later = mock.Mock(over=lambda: True, ready=lambda: made)
    return job


def _operations(runner: Runner, island: Island) -> Callable[[list[Any]], Any]:
    """What stands for an island's compiled form."""
    of = compiled._nodes(runner, island)
    return lambda given: of(dict(zip(island.reads, given, strict=True)))


_nets: Final = {
    "graph": functools.partial(_net, "auto"),
    "record": functools.partial(_net, "record"),
    "graph, compiled": _compiled,
}


def steps(seed: int) -> None:
    """Each of six steps of one run, in several microbatches, sums the clipped gradients of those
    whom the key has sampled: no place and no step keeps anything of an earlier one."""
    for path, make in _nets.items():
        job = lab.kept(make)
        plan, fast, program = job.plan, job.ready.fast, job.ready.program
        sums.on_path(job, path.split(",")[0])
        if fast is not None:
            several = plan.microbatches > 1 and fast._small() is None
            holds(several, f"steps, {path}: several microbatches, not of the smallest native step")
        rng = lab.rng_of("steps", seed, path)
        table, key = lab.zeros(job.schema), rng.bytes(32)
        table["x"][:] = torch.from_numpy(rng.normal(size=(UNITS, 12)))
        table["target"][:] = torch.from_numpy(rng.normal(size=UNITS))
        with torch.no_grad():
            program.flat.copy_(job.initial)
        each = batched_lab.gradients(lab.Net(), program, table, sums.net_loss)
        parts = (each * torch.clamp(plan.clip / each.norm(dim=1), max=1)[:, None]).numpy()
        run = train.loop(
            plan, Execution(path=job.path), job.spec, program, job.rows(table), key, no_noise,
            job.ready.keep, fast,
        )  # fmt: skip
        for step in range(STEPS):
            with torch.no_grad():
                program.flat.copy_(job.initial)
            with mock.patch.object(compiled, "race", lambda *pair: (0.0, 1.0)):
                run(step)
            before = job.initial.numpy().astype(np.float64)
            found = (before - job.flat()) * plan.normaliser / job.rate
            want = parts[known.sample(key, step, UNITS, plan.rate)].sum(0)
            off = float(np.linalg.norm(found - want))
            holds(off < 2e-3, f"steps, {path}: the sum of step {step} is {off:.3g} off its units'")
        taken = fast is not None and fast.fused is not None and fast.fused.islands > 0
        holds(taken == ("compiled" in path), f"steps, {path}: what was compiled is taken")


WIDTH: Final = 21  # a vector of the kernels' and a part of one


class Embedded(nn.Module):
    """Tokens' vectors, as they are or against the same table. Index 3 is padding."""

    def __init__(self, tied: bool, rows: int = 7) -> None:
        super().__init__()
        made = torch.Generator().manual_seed(8)
        self.table = nn.Embedding(rows, WIDTH, padding_idx=3)
        self.tied = tied
        with torch.no_grad():
            self.table.weight.copy_(torch.randn(rows, WIDTH, generator=made))

    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = self.table(x)
        return found @ self.table.weight.t() if self.tied else found


class Layer(nn.Module):
    """One layer of torch's, its parameters drawn."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        made = torch.Generator().manual_seed(9)
        self.layer = layer
        with torch.no_grad():
            for p in layer.parameters():
                p.copy_(torch.randn(p.shape, generator=made))

    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = self.layer(x)
        return found


class Parts(Layer):
    """The halves of one matrix work on different values, as those of an attention's do."""

    def forward(self, x: Tensor) -> Tensor:
        first, second = self.layer.weight[:2], self.layer.weight[2:]
        return torch.cat([x @ first.t(), x.sin() @ second.t()], -1)


class Attends(Layer):
    """Attention of tokens to each other, and what a recurrent layer puts out: the first result."""

    def forward(self, x: Tensor) -> Tensor:
        attends = isinstance(self.layer, nn.MultiheadAttention)
        found: Tensor = (self.layer(x, x, x, need_weights=False) if attends else self.layer(x))[0]
        return found


class Scalars(nn.Module):
    """Parameters of one entry, of no axis and of one."""

    def __init__(self) -> None:
        super().__init__()
        self.s, self.t = nn.Parameter(torch.tensor(0.7)), nn.Parameter(torch.ones(1))

    def forward(self, x: Tensor) -> Tensor:
        return x.sin() * self.s + x * self.t


class Twice(Layer):
    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = self.layer(self.layer(x).tanh())
        return found


Inputs = Callable[[int, torch.Generator], Tensor]


def _pointwise(*channels: int) -> nn.Module:
    pairs = itertools.pairwise(channels)
    return nn.Sequential(*(nn.Conv2d(i, o, 1, bias=False) for i, o in pairs))


def _vectors(n: int, made: torch.Generator) -> Tensor:
    return torch.randn(n, 11, generator=made)


def _tokens(n: int, made: torch.Generator) -> Tensor:
    """Every other record is one index, six times; in the others one is padding."""
    x = torch.randint(4, 7, (n, 6), generator=made)
    x[:, -1] = 3
    x[::2] = torch.randint(4, 7, (len(x[::2]), 1), generator=made)
    return x


def _texts(n: int, made: torch.Generator) -> Tensor:
    """More tokens than any kernel takes at once, of which many are alike."""
    return torch.randint(0, 50, (n, 300), generator=made)


def _arrays(*sizes: int) -> Inputs:
    return lambda n, made: torch.randn(n, *sizes, generator=made)


def _images(channels: int, *sizes: int) -> Inputs:
    return _arrays(channels, *sizes or (6, 6))


_FINE: Final = 2.0**-20
# Forms of the clip that have rules of their own, with their gamma.
FORMS: Final = {"per-layer": 0.0, "automatic": 0.25}
ZOO: Final[dict[str, tuple[Callable[[], nn.Module], Inputs]]] = {
    "embedding": (lambda: Embedded(False), _tokens),
    "tied embedding": (lambda: Embedded(True), _tokens),
    "linear layer": (lambda: Layer(nn.Linear(11, 7)), _vectors),
    "linear layer in parts": (lambda: Parts(nn.Linear(6, 4, bias=False)), _images(2)),
    "linear layer used twice": (lambda: Twice(nn.Linear(11, 11)), _vectors),
    "convolution": (lambda: Layer(nn.Conv2d(2, 3, 3, padding=1, dilation=(2, 1))), _images(2)),
    "pointwise convolutions": (lambda: Layer(_pointwise(4, 64, 4, 3)), _images(4, 3, 3)),
    "convolution of series": (lambda: Layer(nn.Conv1d(3, 4, 3, dilation=2)), _images(3, 11)),
    "convolution of volumes": (
        lambda: Layer(nn.Conv3d(2, 3, 2, padding=(1, 0, 1))),
        _images(2, 2, 4, 2),
    ),
    "convolution of groups": (lambda: Layer(nn.Conv2d(4, 4, 3, groups=2)), _images(4)),
    "convolution with stride": (lambda: Layer(nn.Conv2d(2, 3, 2, stride=2)), _images(2)),
    "transposed convolution": (lambda: Layer(nn.ConvTranspose2d(2, 3, 3, stride=2)), _images(2)),
    "group norm": (lambda: Layer(nn.GroupNorm(2, 4)), _images(4)),
    "linear layer of tokens": (lambda: Layer(nn.Linear(6, 5)), _images(4)),
    # Past what kernels take at once.
    "linear layer of many tokens": (lambda: Layer(nn.Linear(40, 20)), _arrays(150, 40)),
    "wide linear layer": (lambda: Layer(nn.Linear(300, 70)), _arrays(300)),
    "large convolution": (lambda: Layer(nn.Conv2d(20, 18, 3, padding=1)), _images(20, 13, 13)),
    "embedding of long texts": (lambda: Embedded(False, 50), _texts),
    "convolution used twice": (lambda: Twice(nn.Conv2d(2, 2, 3, padding=1)), _images(2)),
    "depthwise convolution": (lambda: Layer(nn.Conv2d(6, 6, 3, groups=6)), _images(6)),
    "layer norm of many tokens": (lambda: Layer(nn.LayerNorm(5)), _arrays(40, 5)),
    "frozen batch norm": (lambda: Layer(nn.BatchNorm2d(4)).eval(), _images(4)),
    "instance norm": (lambda: Layer(nn.InstanceNorm2d(4, affine=True)), _images(4)),
    "slopes": (lambda: Layer(nn.PReLU(4)), _images(4)),
    "scalars": (Scalars, _vectors),
    "attention": (lambda: Attends(nn.MultiheadAttention(8, 2, batch_first=True)), _arrays(5, 8)),
    "recurrent layer": (lambda: Attends(nn.RNN(3, 4, batch_first=True)), _arrays(4, 3)),
}
# More rows than the native step weighs at once; others have 16, some of more tokens than are
# multiplied at once.
ROWS: Final = {"linear layer": 80}
# With the channels of images last in memory.
LAST: Final = ("pointwise convolutions",)


def weighed(outputs: Tensor, target: Tensor) -> Tensor:
    """The gradient with respect to the outputs is the target."""
    return (outputs * target).flatten(1).sum(1)


def _made(name: str, k: int, seed: int, count: int) -> batched_lab.Data:
    """Rows of units of k, which are alike: their gradients add up."""
    made = torch.Generator().manual_seed(seed)
    build, inputs = ZOO[name]
    x = inputs(-(-count // k), made).repeat_interleave(k, 0)[:count]
    with torch.no_grad():
        like = build()(x[::k])
    # All of one sign, so that what meets at one weight adds up.
    target = torch.randn(like.shape, generator=made).abs() * 50
    return {"x": x, "target": target.repeat_interleave(k, 0)[:count]}


@contextlib.contextmanager
def without_help(plain: bool) -> Iterator[None]:
    """As on a machine without a compiler: torch's operations instead of the native kernels."""
    with contextlib.ExitStack() as stack:
        if plain:
            stack.enter_context(mock.patch.object(kernels, "native", lambda: False))
            stack.enter_context(mock.patch.object(small, "library", lambda: None))
        yield


def _zoo(name: str, k: int, plain: bool) -> batched_lab.Lab:
    del plain  # which two have labs of their own
    made = functools.partial(_made, name, k, 0)
    at = batched_lab.lab(
        ZOO[name][0](), made, weighed, rows=ROWS.get(name, 16), per_unit=k,
        last=name in LAST or None, how=lab.exported,
    )  # fmt: skip
    at.path.choose(at.env(), batched_lab.ROOM)
    return at


# Of units of one row or two, by the native kernels; without these of one. Some in one way alone.
ONCE: Final[dict[str, tuple[int, ...]]] = {
    "large convolution": (1,), "convolution used twice": (2,), "layer norm of many tokens": (2,),
    "frozen batch norm": (1,), "instance norm": (1,), "slopes": (2,), "scalars": (2,),
    "attention": (1,), "recurrent layer": (1,), "wide linear layer": (1,),
    "depthwise convolution": (2,), "embedding of long texts": (1,),
}  # fmt: skip
_labs: Final = {
    (name, k, plain): functools.partial(_zoo, name, k, plain)
    for name in ZOO
    for k, plain in ((1, False), (2, False), (1, True))
    if k in ONCE.get(name, (1, 2)) and not (plain and (name in LAST or name in ONCE))
}


def layers(seed: int) -> None:
    """Layers whose norms are had by kernels of their own, in every way that the engine may take:
    a unit of one row or two adds its gradient clipped, also beside one that is infinite, and the
    sum is that of the factors, also where it is made by windows that end within a row of it."""
    for (name, k, plain), make in _labs.items():
        with without_help(plain):
            at: batched_lab.Lab = lab.kept(make)  # type: ignore[arg-type,assignment]
            _by_all_ways(
                at, f"{name}, {k} rows{', in torch' * plain}", _made(name, k, seed, at.rows)
            )


def _by_all_ways(at: batched_lab.Lab, name: str, data: batched_lab.Data) -> None:
    k = at.path.shape.per_unit
    each = batched_lab.gradients(at.module, at.program, data, weighed)
    each = each.view(-1, k, each.shape[1]).sum(1)
    norms = each.norm(dim=1)
    sick = {**data, "target": data["target"].clone()}
    sick["target"][0] = math.inf
    alone, ends = _alone(data, k), _extremes(data, k)
    for site in at.path.sites:
        for way in site.ways:
            site.way, what = way, f"{name}, {way.name}"
            total, c = at.parts(1.0, data)
            added = (c.double() * norms)[norms > 1]
            most, least = float(added.max()), float(added.min())
            holds(most <= 1 + 2 * sums.TIGHT, f"{what}: a unit adds {most:.6g}")
            holds(least > 0.98, f"{what}: a unit adds {least:.6g}, which is too little")
            parts = c.double()[:, None] * each
            off = float((total - parts.sum(0)).norm())
            holds(off <= 2e-3, f"{what}: the sum is {off:.3g} off that of the factors")
            off = float((_by_windows(at, data, k) - parts.sum(0)).norm())
            holds(off <= 2e-3, f"{what}: the sum by windows is {off:.3g} off")
            off = float((at.parts(1.0, sick)[0] - parts[1:].sum(0)).norm())
            holds(off <= 2e-3, f"{what}: beside an infinite one the sum is {off:.3g} off")
            for form, gamma in FORMS.items():
                norm = float(_by_windows(at, alone, k, form, gamma).norm())
                holds(norm <= 1 + 2 * batched.ROUNDING, f"{what}, {form}: adds {norm:.6g}")
            for bound, one in ends:
                norm = float(at.parts(bound, one)[0].norm()) / bound
                holds(norm <= 1 + 2 * batched.ROUNDING, f"{what}: adds {norm:.6g} of {bound}")


def _alone(data: batched_lab.Data, k: int) -> batched_lab.Data:
    """The first unit's gradient is what it was, all others' are zero."""
    target = torch.zeros_like(data["target"])
    target[:k] = data["target"][:k]
    return {**data, "target": target}


def _extremes(data: batched_lab.Data, k: int) -> list[tuple[float, batched_lab.Data]]:
    """Small bounds with one unit whose gradient is as long as float32 has it, by what goes in or
    by what comes back: clip factors, or what they make of an operand, lie among the denormals."""
    x, target = data["x"], _alone(data, k)["target"]
    made = [{**data, "target": target * 2.0**110}]
    if x.is_floating_point():
        made.append({"x": x * 2.0**124, "target": target * 2.0**-12})
    return [(2.0**-e, one) for e in (14, 20, 26, 28) for one in made]


def _by_windows(
    at: batched_lab.Lab, data: batched_lab.Data, k: int, form: Any = "flat", gamma: float = 0.0
) -> Tensor:
    """The clipped sum as a run has it, on the grid, ten entries at a time."""
    with mock.patch.object(windows, "WINDOW", 10):
        sums_of = at.path.sums(at.rows_of(data, k), 1.0, _FINE, at.rows // k, form, gamma)
        return sums_of(np.arange(at.rows // k)).double() * _FINE


class Product(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.zeros(3, 5))

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.w.t()


def _of_tokens(x: Tensor, g: Tensor) -> batched_lab.Data:
    """Six tokens of which three and three are alike."""
    return {"x": x.repeat_interleave(3, 1), "target": g}


def _of_windows(x: Tensor, g: Tensor) -> batched_lab.Data:
    """Windows at six places, three and three alike, for the image repeats along one axis."""
    x = x.transpose(1, 2)[..., None]
    return {"x": x.repeat(1, 1, 1, 4), "target": g.transpose(1, 2).reshape(len(g), 3, 2, 3)}


# Contractions with tokens that cancel: x (n, 2, 5) and g (n, 6, 3) as a record of theirs.
CANCELLING: Final[dict[str, tuple[Callable[[], nn.Module], Callable[..., batched_lab.Data]]]] = {
    "tokens": (Product, _of_tokens),
    "convolution": (lambda: Layer(nn.Conv2d(5, 3, (1, 2), bias=False)), _of_windows),
}


def _cancels(name: str, seed: int, far: float, left: float, count: int) -> batched_lab.Data:
    """Records whose parts are 10^3 to 10^(3 + far) long and cancel but for ``left`` of the first,
    or for 1 where that is zero."""
    made = torch.Generator().manual_seed(seed)
    x, g = torch.randn(count, 2, 5, generator=made), torch.randn(count, 6, 3, generator=made)
    g *= 10 ** (3 + far * torch.rand(count, 1, 1, generator=made))
    g[:, 2::3] = -(g[:, ::3] + g[:, 1::3])
    g[:, 0] = g[:, 0] * (1 + left) if left else g[:, 0] + 1
    return CANCELLING[name][1](x, g)


def _contracts(name: str) -> batched_lab.Lab:
    data = functools.partial(_cancels, name, 0, 4, 0.0)
    at = batched_lab.lab(CANCELLING[name][0](), data, weighed, how=lab.exported)
    at.path.choose(at.env(), batched_lab.ROOM)
    return at


_contracting: Final = {name: functools.partial(_contracts, name) for name in CANCELLING}


def _unformed(seed: int, far: float, left: float) -> Iterator[tuple[str, Tensor, Tensor, Tensor]]:
    """By each way that forms no gradients: what it is, records' gradients, their sum, factors."""
    for name, make in _contracting.items():
        at: batched_lab.Lab = lab.kept(make)  # type: ignore[arg-type,assignment]
        data = _cancels(name, seed, far, left, at.rows)
        each = batched_lab.gradients(at.module, at.program, data, weighed)
        (site,) = at.path.sites
        for way in (w for w in site.ways if not w.formed):
            site.way = way
            yield f"{name}, {way.name}", each, *at.parts(1.0, data)


def cancellation(seed: int) -> None:
    """Norms had from Gram matrices, of records made to cancel in them: the factor that comes of it
    keeps the exact contribution within the clip."""
    for what, each, _, c in _unformed(seed, 4, 0.0):
        norm = float((c.double() * each.norm(dim=1)).max())
        holds(norm <= 1 + batched.ETA, f"cancellation, {what}: a unit adds {norm:.8g}")


def rounding(seed: int) -> None:
    """Records made of large parts that cancel: rounding moves the sum by no more than is accounted
    (``batched.ROUNDING`` of the clip)."""
    for what, each, total, c in _unformed(seed, 5, 1e-6):
        off = float((total - (c.double()[:, None] * each).sum(0)).norm())
        most = batched.ROUNDING * (1 + 1e-6)
        holds(off <= most, f"rounding of sums, {what}: the sum is {off:.3g} off its factors'")
