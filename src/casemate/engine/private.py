"""The engine as a library: a module, a loss and an optimizer to a private training run.

No server: who runs this holds the rows. Everything else is the server's own engine: the graph is
captured and proved, the plan compiled, and each step sampled, clipped, put on the integer grid,
noised and applied as docs/engine.md says.
"""

from __future__ import annotations

import hashlib
import math
import os
import secrets
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, Final, Literal, TypeAlias

import torch
from torch import nn

from casemate.accounting import calibrate, pld, rdp
from casemate.engine import capture
from casemate.engine.capture.table import Bounds, group, named, table
from casemate.engine.prepare import prepare
from casemate.engine.rows import assemble
from casemate.engine.select import Compile
from casemate.engine.train import start
from casemate.plan.compile import EXTRA_PART, compile_plan
from casemate.seams import OsRng
from casemate.spec.errors import UsageError
from casemate.spec.job import (
    Adam,
    Clipping,
    DatasetUse,
    Dp,
    DpEvent,
    Execution,
    JobRequest,
    Schedule,
    Sgd,
    TrainSpec,
    Views,
)

Accountant: TypeAlias = Literal["rdp", "pld"]


def _by_rdp(events: tuple[DpEvent, ...], delta: float) -> float:
    curves = [rdp.curve(e) for e in events]
    return rdp.epsilon(tuple(map(sum, zip(*curves, strict=True))), delta)


# Epsilon of events at a delta, as upper bounds. One run, fixed beforehand: no filter is needed.
ACCOUNTANTS: Final[dict[str, Callable[[tuple[DpEvent, ...], float], float]]] = {
    "rdp": _by_rdp,
    "pld": pld.epsilon,
}
MAX_EPSILON: Final = 1000.0
_PRECISION: Final = 2.0**-13


def _refuse(message: str, mend: str, where: str = "") -> UsageError:
    return UsageError("usage.value", message, mend=mend, where=where)


def noise_for(
    rate: float, steps: int, epsilon: float, delta: float, accountant: Accountant = "rdp"
) -> float:
    """The smallest noise multiplier, within a factor 1 + 2^-13, by which ``accountant`` gives at
    most ``epsilon`` at ``delta`` for ``steps`` Poisson samples of rate ``rate``.

    Raises ``PlanError`` ``plan.epsilon`` when no noise is enough.
    """
    spent = ACCOUNTANTS[accountant]

    def enough(log2: float) -> bool:
        event = DpEvent(rate=rate, noise_multiplier=math.exp2(log2), steps=steps)
        return spent((event,), delta) <= epsilon

    # The filter's noise is above: its delta is divided, and nothing else differs.
    high = math.log2(calibrate.noise_multiplier(rate, steps, epsilon, delta))
    low = high - 1.0
    while low > math.log2(rdp.MIN_NOISE) and enough(low):
        low, high = low - 1.0, low
    while high - low > _PRECISION:
        middle = (low + high) / 2
        low, high = (low, middle) if enough(middle) else (middle, high)
    return math.exp2(high)


@dataclass(frozen=True, slots=True)
class Cost:
    """What a run takes, known before it.

    epsilon, delta: of the whole run, by ``accountant``. noise_multiplier: standard deviation of the
    noise over the sensitivity; sigma: in gradient units, on the sum. clipping: the form of the
    clip. rate: each unit's chance to be in a step. parameters: trained scalars. path: how gradients
    are had, site by site. seconds and bytes: predicted from a probe on this machine, on made-up
    rows.
    """

    epsilon: float
    delta: float
    accountant: str
    noise_multiplier: float
    sigma: float
    clip: float
    clipping: str
    rate: float
    units: int
    steps: int
    parameters: int
    path: tuple[str, ...]
    seconds: float
    bytes: int

    def __str__(self) -> str:
        return "\n".join(
            (
                f"epsilon {self.epsilon:.4g} at delta {self.delta:.3g} ({self.accountant}),"
                f" noise multiplier {self.noise_multiplier:.4g}, clip {self.clip:g}"
                + ("" if self.clipping == "flat" else f" {self.clipping}"),
                f"{self.steps} steps, each of {self.units} units at rate {self.rate:.4g}",
                f"{self.parameters} trained parameters, {self.seconds:.1f} s and"
                f" {self.bytes / 2**20:.0f} MiB predicted",
                *(f"  {line}" for line in self.path),
            )
        )


@contextmanager
def _threads() -> Iterator[None]:
    """The engine runs on one thread (P13); the caller's number is put back."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _memory() -> int:
    """Half of the machine's memory, in bytes."""
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 2


def _optimizer(given: Any, model: nn.Module) -> Sgd | Adam:
    if isinstance(given, Sgd | Adam):
        return given
    if not isinstance(given, torch.optim.Optimizer):
        raise UsageError(
            "usage.optimizer",
            f"{type(given).__name__} is no optimizer.",
            mend="Give torch.optim.SGD, Adam or AdamW over the module's parameters.",
        )
    made = capture.optimizer(given)
    theirs = {id(p) for group in given.param_groups for p in group["params"] if p.requires_grad}
    if theirs != {id(p) for p in model.parameters() if p.requires_grad}:
        raise UsageError(
            "usage.optimizer",
            "The optimizer does not hold exactly the module's parameters that require a gradient.",
            mend="Call requires_grad_(False) on what is not to be trained; then make the optimizer"
            " of the rest.",
        )
    return made


def _steps(steps: int | None, epochs: float | None, batch_size: int, units: int) -> int:
    if (steps is None) == (epochs is None):
        raise UsageError(
            "usage.steps", "Neither or both of epochs and steps are given.", mend="Give one."
        )
    if steps is None:
        assert epochs is not None
        steps = math.ceil(epochs * units / max(1, batch_size)) if epochs > 0 else 0
    if steps < 1:
        raise UsageError("usage.steps", "There are no steps to take.", mend="Give one or more.")
    return steps


def _schedule(given: Any, steps: int) -> Schedule:
    if given is None or isinstance(given, Schedule):
        return given or Schedule()
    return capture.schedule(given, steps)


def _path(name: str) -> str:
    if name not in ("auto", "record"):
        raise _refuse(f"There is no path {name[:40]!r}.", "Give 'auto' or 'record'.")
    return name


def _views(count: int) -> Views:
    try:
        return Views(count=count)
    except ValueError as e:
        raise _refuse(f"The views cannot be had: {e}.", "Choose within these.", "views") from None


def _spec(privacy: Mapping[str, Any], **given: Any) -> TrainSpec:
    try:
        numbers = {k: float(v) for k, v in privacy.items() if k != "clipping"}
        dp = Dp(clipping=privacy["clipping"], **numbers)
        return TrainSpec(privacy=dp, **given)
    except ValueError as e:
        raise _refuse(f"The run cannot be described: {e}.", "Choose within these.") from None


def _request(digest: str, inputs: Any, train: TrainSpec) -> JobRequest:
    """A job as the planner takes it; nobody else sees it."""
    nobody = "sha256:" + "0" * 64
    return JobRequest(
        job="job_" + secrets.token_hex(16),
        scientist="library",
        datasets=(DatasetUse(dataset="data", policy_digest=nobody, epoch=0),),
        model_digest=digest,
        inputs=inputs,
        train=train,
    )


class Private:
    """A private training run over rows that are here.

    model: a module; parameters with ``requires_grad`` are trained. loss: a name
    (``cross_entropy``, ...), a ``torch.nn`` loss, or a function of (outputs, target) that gives one
    loss for each record. optimizer: ``torch.optim.SGD``, ``Adam`` or ``AdamW`` over those
    parameters (its settings are read; its state stays as it is). data: tensors by ``forward``'s
    parameter names, and ``target``; or a ``TensorDataset``. batch_size: the expected number of
    units in a step; the true one is secret. steps, or epochs.

    epsilon at delta calibrates the noise; or noise_multiplier says it, at delta. clip: the bound on
    the L2 norm of one unit's gradient; clipping: how it is kept, ``flat``, ``per-layer`` or
    ``automatic`` with gamma (:class:`casemate.spec.job.Dp`). ema: decay of the average of the
    weights that is given in place of the last ones; 0 for none. views: a row's gradient is the mean
    over so many views of it; or which, as ``Views`` (docs/library.md). dropout: whether layers in
    training mode drop out. accountant: ``rdp``, or ``pld``
    (tighter; needs the extra ``audit``). schedule: of ``torch.optim.lr_scheduler``. unit: whose row
    each one is, where a person has several; the first rows_per_unit of each are used, and protected
    together. bounds: what each tensor may hold (:func:`casemate.engine.capture.table.table`).
    memory: bytes, half of the machine's by default. path: ``auto``, or ``record``. compile_seconds:
    for so long parts of a long run's step may be compiled while it goes on; 0 for none.

    The guarantee: all weights that this ever shows are (epsilon, delta)-DP together for zeroing out
    one unit's contribution (docs/privacy.md); the number of units, and whatever is an argument
    here, is public. Raises ``CasemateError`` with a stable code; nothing has been spent then.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        loss: Any,
        optimizer: Any,
        data: Any,
        batch_size: int,
        steps: int | None = None,
        epochs: float | None = None,
        epsilon: float | None = None,
        delta: float,
        noise_multiplier: float | None = None,
        clip: float = 1.0,
        clipping: Clipping = "flat",
        gamma: float = 0.01,
        accountant: Accountant = "rdp",
        schedule: Any = None,
        ema: float = 0.0,
        views: int | Views = 1,
        dropout: bool = True,
        unit: Any = None,
        rows_per_unit: int = 1,
        bounds: Bounds | None = None,
        memory: int | None = None,
        path: str = "auto",
        compile_seconds: float = 300.0,
    ) -> None:
        if accountant not in ACCOUNTANTS:
            raise _refuse(f"There is no accountant {accountant!r}.", "Give 'rdp' or 'pld'.")
        if (epsilon is None) == (noise_multiplier is None):
            raise _refuse("Neither or both of epsilon and noise_multiplier are given.", "Give one.")
        self.model = capture.module_of(model)
        made = _optimizer(optimizer, self.model)
        lossy = capture.make_loss(loss)
        rows = group(named(data, self.model), unit, rows_per_unit)
        units = rows.units
        count = _steps(steps, epochs, batch_size, units)
        if batch_size > units:
            raise _refuse(
                f"The batch size {batch_size} is above the {units} units.",
                f"Use at most {units}.",
                "batch_size",
            )
        self.accountant, self.delta, self.done = accountant, delta, 0
        path = _path(path)
        self.spec = _spec(
            batch_size=batch_size,
            steps=count,
            privacy={
                "epsilon": epsilon or MAX_EPSILON, "delta": delta, "clip": clip,
                "clipping": clipping, "gamma": gamma,
            },
            optimizer=made,
            schedule=_schedule(schedule, count),
            ema=float(ema),
            views=views if isinstance(views, Views) else _views(views),
        )  # fmt: skip
        packed = capture.capture(self.model, lossy, capture.specs_of(rows.tensors), dropout=dropout)
        found = table(packed, rows, bounds or {})
        self.schema, self.inputs = found.schema, found.bindings
        noise_ = noise_multiplier
        if noise_ is None:
            assert epsilon is not None
            at = delta * (1 - 2 * EXTRA_PART)
            noise_ = noise_for(batch_size / units, count, epsilon, at, accountant)
        digest = "sha256:" + hashlib.sha256(packed.data).hexdigest()
        schemas = (self.schema,)
        with _threads():
            self.ready = prepare(
                packed.data, digest, schemas, self.inputs, self.spec, memory or _memory(), path,
                Compile(seconds=compile_seconds, background=True),
            )  # fmt: skip
        self.execution = Execution(path=self.ready.path, compiled=self.ready.prepared.compiled)
        request = _request(digest, self.inputs, self.spec)
        self.plan = compile_plan(request, schemas, self.ready.prepared, noise_)
        self.rows = assemble(schemas, (found.columns,), self.ready.program.data, self.inputs)
        key = OsRng().bytes(32)
        with _threads():
            self._run = start(
                self.plan, self.execution, self.spec, self.ready.program, self.rows, key,
                keep=self.ready.keep, fast=self.ready.fast,
            )  # fmt: skip

    def __repr__(self) -> str:
        return f"Private({self.done} of {self.steps} steps, epsilon {self.epsilon:.4g})"

    @property
    def steps(self) -> int:
        """Steps of the whole run; there are no more than these."""
        return self.plan.steps

    def spent(self, steps: int, accountant: Accountant | None = None) -> float:
        """Epsilon at ``delta`` of the run's first ``steps`` steps."""
        if steps == 0:
            return 0.0
        extra = self.plan.delta_truncation + self.plan.delta_sampler
        events = tuple(replace(e, steps=steps) for e in self.plan.events)
        return ACCOUNTANTS[accountant or self.accountant](events, self.delta - extra)

    @property
    def epsilon(self) -> float:
        """Spent so far, at ``delta``."""
        return self.spent(self.done)

    def quote(self) -> Cost:
        """What the whole run costs. Looks at no row."""
        p, plan = self.ready.prepared, self.plan
        step = p.seconds_per_step + plan.microbatches * p.seconds_per_microbatch
        return Cost(
            epsilon=self.spent(plan.steps),
            delta=self.delta,
            accountant=self.accountant,
            noise_multiplier=plan.noise_multiplier,
            sigma=plan.sigma,
            clip=plan.clip,
            clipping=plan.clipping,
            rate=plan.rate,
            units=plan.units,
            steps=plan.steps,
            parameters=p.dimension,
            path=p.path,
            seconds=p.seconds_fixed + plan.steps * step,
            bytes=p.bytes,
        )

    def step(self) -> None:
        """One step. After the last, the weights are in the module.

        Raises ``UsageError`` ``usage.steps`` when all are done: more must be accounted afresh.
        """
        if self.done >= self.steps:
            raise UsageError(
                "usage.steps",
                f"All {self.steps} steps are done.",
                mend="Make another Private: its epsilon is to be added to this one's.",
            )
        at, self.done = self.done, self.done + 1  # spent, whatever becomes of it
        with _threads():
            self._run(at)
        if self.done == self.steps:
            self.pull()

    def __iter__(self) -> Iterator[int]:
        """Take the steps that are left; after each, how many are done."""
        while self.done < self.steps:
            self.step()
            yield self.done

    def train(self) -> nn.Module:
        """Take the steps that are left; the module, with the trained weights."""
        for _ in self:
            pass
        return self.model

    def pull(self) -> nn.Module:
        """Copy the weights as they are now, or their average, into the module: noised, and covered
        by ``epsilon``."""
        capture.load_weights(self.model, self._run.result())
        return self.model
