"""Phase ``prepare``: from a packed model to a probed program and its costs; no data, no keys."""

from __future__ import annotations

import hashlib
import math
import statistics
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch

from casemate.engine import clip, draws, noise, optim, sampling, select, windows
from casemate.engine.batched import ETA, Batched
from casemate.engine.program import DTYPES, Program
from casemate.engine.records import Gradients, record
from casemate.engine.rows import Rows, bound_columns, synthetic
from casemate.engine.sites import ROUNDING
from casemate.engine.train import applied, clipped_sum
from casemate.engine.views import check_views
from casemate.graph import check as graph_check
from casemate.graph import pack, score
from casemate.graph.model import Graph
from casemate.plan.check import check_inputs
from casemate.plan.compile import EXTRA_PART, slots
from casemate.spec import tensors
from casemate.spec.data import DatasetSchema
from casemate.spec.errors import LimitError, ModelError, PlanError
from casemate.spec.job import Dp, InputBinding, Metric, TrainSpec, Views
from casemate.spec.messages import Prepared
from casemate.spec.tensors import TensorInfo

_PROBES = 6
_TIMED_SECONDS = 0.2
_MIB = 1 << 20
NEVER = select.Compile()


@dataclass(frozen=True, slots=True)
class Ready:
    """What ``train`` needs beside plan and data: the program, whether to keep the prefix, the path
    ``graph`` where that is taken, and the columns that feed each input."""

    program: Program
    keep: bool
    prepared: Prepared
    fast: Batched | None = None
    inputs: Sequence[InputBinding] = ()

    @property
    def path(self) -> str:
        return self.prepared.path[0]


def weights_of(
    view: Mapping[str, tuple[TensorInfo, memoryview]],
) -> dict[str, torch.Tensor]:
    """Tensors of a weight file, each a copy of its own. Raises ``ModelError`` ``model.form``: a
    bool must be 0 or 1, as the proof of ranges takes it."""
    graph_check.require_bools(view)
    out = {}
    for name, (info, raw) in view.items():
        flat = (
            torch.frombuffer(bytearray(raw), dtype=DTYPES[info.dtype])
            if len(raw)
            else torch.empty(0, dtype=DTYPES[info.dtype])
        )
        out[name] = flat.reshape(info.shape)
    return out


def prepare(
    packed: bytes,
    model_digest: str,
    schemas: Sequence[DatasetSchema],
    inputs: Sequence[InputBinding],
    train: TrainSpec,
    memory_bytes: int,
    path: str = "auto",
    compiling: select.Compile = NEVER,
    released: int | None = None,
    metrics: Sequence[Metric] = (),
    target: str = "",
) -> Ready:
    """Parse, check, build and probe the model. Deterministic but for the measured times.

    packed: its bytes, whose digest must be ``model_digest``. memory_bytes: the cap for the run.
    path: ``record``, or ``auto``: ``graph`` where it can be had (:mod:`casemate.engine.select`).
    compiling: whether and for how long islands of that path are compiled. released: where given,
    the model must train one tensor of so many scalars (an evaluation, ``spec.job.JobRequest``).
    metrics, target: of an entry of a contest, whose evaluation is made here of a model's outputs.
    Raises ``FormatError``, ``ModelError``, ``PlanError`` (a binding, the delta) or ``LimitError``
    (memory).
    """
    begun = time.monotonic()
    torch.set_num_threads(1)
    torch.set_flush_denormal(False)
    if torch.get_float32_matmul_precision() != "highest":  # what the bounds of products are for
        torch.set_float32_matmul_precision("highest")
    if "sha256:" + hashlib.sha256(packed).hexdigest() != model_digest:
        raise ModelError(
            "model.digest",
            "The packed model is not the one that the job names.",
            mend="Submit the job again with its model.",
        )
    graph, view = pack.unpack(packed)
    if target:
        graph, view, inputs = _entry(graph, view, metrics, target, inputs, schemas[0])
    elif graph.outputs:
        raise ModelError(
            "model.outputs",
            "The model is made for prediction: it gives outputs and no losses.",
            mend="Give the module with a loss, or pack it with casemate model export --schema.",
        )
    if released is not None:
        check_evaluation(graph, released)
    check_inputs(graph.inputs, inputs, schemas)
    check_views(train.views, graph.inputs, inputs, schemas)
    bounds = graph_check.known_bounds(graph, view, inputs, schemas)
    infos = {name: info for name, (info, _) in view.items()}
    checked = graph_check.check(graph, infos, bounds=bounds)
    units = sum(s.units for s in schemas)
    per_unit = max(s.rows_per_unit for s in schemas)
    # Rows twice, and the places of all units (:mod:`casemate.engine.rows`), padded ones too.
    row_bytes = sum(2 * s.rows * sum(c.row_bytes for c in s.columns) for s in schemas)
    row_bytes += units * (32 + 32 * per_unit)
    # What is needed for certain, before any of it is tried: by a record, and by weights, gradient
    # and sum.
    least = checked.saved_bytes + checked.workspace_bytes + checked.fixed_bytes
    least += 16 * checked.dimension
    require_memory(least + row_bytes, memory_bytes)
    weights = weights_of(view)
    check_generator(train, units, checked.dimension)
    program = Program(graph, weights)
    made_up = samples(program, schemas, inputs) | draws.samples(program.random, _PROBES)
    probe(program, made_up)
    rows = sum(s.rows for s in schemas)
    each = per_unit * train.views.count
    frontier = program.prefix({k: v[:1] for k, v in made_up.items()})
    kept_bytes = (rows + 1) * sum(v.numel() * v.element_size() for v in frontier[: program.lasting])
    # A prefix that is kept is of the row as it is, not of a view.
    worth = program.has_prefix and rows <= train.steps * train.batch_size * each
    worth = worth and not train.views.transforms
    asked = _Asked(program, made_up, train, units, each, worth, kept_bytes, row_bytes, memory_bytes)
    took, why = _by_graph(asked, checked, compiling, begun) if path != "record" else (None, ())
    if took is None:
        took = _by_record(asked, checked, why)
    require_memory(took.bytes, memory_bytes)
    head, result_bytes = _result(program)
    prepared = Prepared(
        model_digest=model_digest,
        parameters=sum(t.numel() for t in weights.values()),
        dimension=program.dimension,
        microbatch=1 if took.fast is None else took.fast.shape.units,
        seconds_per_microbatch=took.microbatch_seconds,
        seconds_per_step=took.step_seconds,
        seconds_fixed=max(0.0, rows * took.prefix_seconds * took.keep + row_bytes / 200e6),
        bytes=took.bytes,
        certified_eta=took.eta,
        rounding=took.rounding,
        path=tuple(_line(line) for line in took.lines),
        compiled=took.compiled,
        result="sha256:" + hashlib.sha256(head).hexdigest(),
        result_bytes=result_bytes,
    )
    return Ready(program, took.keep, prepared, took.fast, inputs)


def _entry(
    graph: Graph,
    weights: pack.Weights,
    metrics: Sequence[Metric],
    target: str,
    inputs: Sequence[InputBinding],
    schema: DatasetSchema,
) -> tuple[Graph, pack.Weights, Sequence[InputBinding]]:
    """The evaluation of a model that enters a contest. Raises ``ModelError``, ``PlanError``."""
    column = schema.column(target)
    if column is None or column.role != "label":  # the server has looked
        raise PlanError("plan.entry-target", "There is no such label.", mend="Report it.")
    graph, weights, label = score.compose(graph, weights, metrics, column)
    return graph, weights, (*inputs, label)


def _line(text: str) -> str:
    """As the server takes it: an error's words may come from torch, or name a node."""
    return "".join(c if c.isprintable() else " " for c in text[:1000])


def _result(program: Program) -> tuple[bytes, int]:
    """What stands before the first tensor of the result, and the bytes of the whole."""
    named = {name: ("f32", tuple(t.shape)) for name, t in program.result().items()}
    head, _ = tensors.layout(named)
    return head, len(head) + 4 * sum(math.prod(shape) for _, shape in named.values())


def check_evaluation(graph: Graph, released: int) -> None:
    """Refuse a model from which more would be released than its metrics. Raises ``ModelError``
    ``model.metrics``."""
    trained = [(i.name, i.shape) for i in graph.inputs if i.kind == "param"]
    if [shape for _, shape in trained] != [(released,)]:
        names = ", ".join(f"{name} {list(shape)}" for name, shape in trained) or "nothing"
        raise ModelError(
            "model.metrics",
            f"An evaluation trains one vector of {released} scalars; this model trains"
            f" {names[:300]}.",
            mend="Let casemate make the model: enclave.quote_metrics, casemate job quote-metrics.",
            where=trained[0][0] if trained else "",
        )


@dataclass(frozen=True, slots=True)
class _Asked:
    """What a path is to do: ``each`` rows a unit and step, views counted. keep: whether keeping
    the frozen prefix is worth it, in ``kept_bytes``; ``row_bytes``: of all rows, twice, and of the
    places of units."""

    program: Program
    samples: Mapping[str, torch.Tensor]
    train: TrainSpec
    units: int
    each: int
    keep: bool
    kept_bytes: int
    row_bytes: int
    memory_bytes: int

    @property
    def state_bytes(self) -> int:
        """Weights, two optimizer states, gradient, contribution, sum, noise, the average, and
        temporaries."""
        return self.program.dimension * (3 * 4 + 4 * 4 + 6 * 8 + (8 if self.train.ema else 0))


@dataclass(frozen=True, slots=True)
class _Took:
    """A path made ready: seconds, bytes, and what it certifies. prefix_seconds: of a row."""

    microbatch_seconds: float
    step_seconds: float
    prefix_seconds: float
    bytes: int
    keep: bool
    eta: float
    rounding: float
    lines: tuple[str, ...]
    fast: Batched | None = None
    compiled: bool = False


def _by_graph(
    asked: _Asked, checked: graph_check.Checked, compiling: select.Compile, begun: float
) -> tuple[_Took | None, tuple[str, ...]]:
    """The path ``graph``, or ``None`` and why not."""
    program, train = asked.program, asked.train
    count = slots(train, asked.units)
    kept_bytes = asked.kept_bytes if asked.keep else 0
    per_layer = isinstance(train.privacy, Dp) and train.privacy.clipping == "per-layer"
    job = select.Job(count, asked.each, asked.keep, kept_bytes, per_layer)
    left = asked.memory_bytes - select.BASE_BYTES - asked.row_bytes - asked.state_bytes
    fast, lines = select.graph(program, checked, asked.samples, job, left)
    if fast is None:
        return None, lines
    slot, prefix = select.times(fast, asked.samples, train.views)
    step = _step_time(program, train, asked.units)
    microbatches = train.steps * -(-count // fast.shape.units)
    # The process has done by now all that a run does, but for its rows.
    needed = resident() + asked.row_bytes + kept_bytes
    tried = select.compile_(
        fast, asked.samples, compiling, compiling.seconds - (time.monotonic() - begun),
        microbatches, slot, asked.memory_bytes - needed,
    )  # fmt: skip
    if fast.fused is not None:
        slot, prefix = select.times(fast, asked.samples, train.views)
        lines = (*lines, str(fast.fused))
        needed = resident() + asked.row_bytes + kept_bytes
    elif tried:  # in the background, with a microbatch's values
        needed = resident() + asked.row_bytes + kept_bytes + select.COMPILER_BYTES
    clipped = train.privacy.clip if isinstance(train.privacy, Dp) else 0.0
    took = _Took(
        slot, step, prefix, needed, asked.keep, ETA, ROUNDING * clipped, lines, fast, tried
    )
    return took, ()


def _by_record(asked: _Asked, checked: graph_check.Checked, why: tuple[str, ...]) -> _Took:
    """The path ``record``. why: the lines that say so. Raises ``LimitError``."""
    program, train = asked.program, asked.train
    needed = resident() + asked.row_bytes + asked.state_bytes
    needed += checked.saved_bytes * 3 + checked.workspace_bytes
    keep = asked.keep and needed + asked.kept_bytes <= asked.memory_bytes
    needed += asked.kept_bytes if keep else 0
    require_memory(needed, asked.memory_bytes)
    slot, whole = _times(program, asked.samples, keep, asked.each // train.views.count, train.views)
    return _Took(
        slot, _step_time(program, train, asked.units), whole - slot / asked.each, needed, keep,
        clip.eta(program.dimension), 0.0, why or ("record",),
    )  # fmt: skip


def require_memory(needed: int, there: int) -> None:
    """Raises ``LimitError`` ``limit.memory``. Both in bytes."""
    if needed > there:
        raise LimitError(
            "limit.memory",
            f"The job needs {-(-needed // _MIB)} MiB of memory where {there // _MIB} are.",
            mend="Make the model smaller, or ask the operator for a larger limit.",
        )


def resident() -> int:
    """Bytes of memory that this process has had at most. Not getrusage(2)'s: a process begins there
    with what its parent had, and a quote would tell of the server's other jobs."""
    with Path("/proc/self/status").open() as status:
        return next(int(line.split()[1]) << 10 for line in status if line.startswith("VmHWM:"))


def check_generator(train: TrainSpec, units: int, dimension: int) -> None:
    """Refuse a delta too small for the generator's distance, before the job is charged: see
    :func:`casemate.engine.train.check_plan`. Raises ``PlanError``."""
    if not isinstance(train.privacy, Dp):
        return
    least = noise.distance(train.steps * (dimension + units)) / EXTRA_PART
    if train.privacy.delta < least * (1 + 2.0**-40):
        raise PlanError(
            "plan.delta",
            f"The job draws too many random numbers for delta {train.privacy.delta:g}.",
            mend=f"Ask for a delta of at least {least * 1.01:.2g}.",
            where="train.privacy.delta",
        )


def samples(
    program: Program,
    schemas: Sequence[DatasetSchema],
    inputs: Sequence[InputBinding],
    count: int = _PROBES,
) -> dict[str, torch.Tensor]:
    """So many synthetic rows within the first schema's bounds."""
    rng = np.random.default_rng(0)  # tests kernels, guards nothing
    out = {}
    for spec in (s for s in program.data if s.kind == "data"):
        columns = bound_columns(schemas[0], spec, inputs)
        out[spec.name] = torch.cat([synthetic(columns, rng) for _ in range(count)])
    return out


def probe(program: Program, samples: Mapping[str, torch.Tensor]) -> None:
    """P13 on this machine: a row's gradient is the same bits before and after any other row's, by
    autograd and, where that can be, replayed (:mod:`casemate.engine.tape`).

    The rows are synthetic, plus the same at magnitudes from 1e-30 to 1e30. Raises ``ModelError``
    when bits differ, or when the model fails on a row of the declared schema.
    """
    first_row = {k: v[:1].clone() for k, v in samples.items()}
    frontier = program.prefix(first_row)
    program.gradient(frontier, torch.empty(program.dimension))
    hostile = {
        k: torch.cat([v * m for m in (1.0, 1e-30, 1e15, 1e30)])
        if v.is_floating_point()
        else v.repeat(4, *[1] * (v.dim() - 1))
        for k, v in samples.items()
    }
    count = 4 * _PROBES
    gradients = record(program, hostile, count, False)
    first = torch.empty(count, program.dimension)
    again = torch.empty(program.dimension)
    for row in range(count):
        gradients(row, first[row])

    def same_again() -> bool:
        for row in np.random.default_rng(1).permutation(count):
            gradients(int(row), again)
            if not torch.equal(again.view(torch.int32), first[row].view(torch.int32)):
                return False
        return True

    if not (program.note(frontier) and same_again()):
        program.note(())
        if not same_again():
            raise ModelError(
                "model.not-reproducible",
                "The model's gradient of a record is not the same each time on this machine.",
                mend="Report the model: an operation in it is not deterministic here.",
            )


def _times(
    program: Program,
    samples: Mapping[str, torch.Tensor],
    keep: bool,
    per_unit: int,
    views: Views,
) -> tuple[float, float]:
    """Seconds of one slot, and of one view of a row with its prefix: as in a run's loop."""
    given = {s.name: samples[s.name] for s in program.data if s.kind == "data"}
    order, valid = np.arange(_PROBES), np.ones(_PROBES, dtype=bool)
    rows = Rows(given, valid, order, np.arange(_PROBES + 1), per_unit)
    drawn = draws.of_job(bytes(32), rows, program.data, views)
    found = []
    for kept in (keep, False):
        gradients = record(program, given, _PROBES, kept, drawn)

        def seconds(count: int, gradients: Gradients = gradients) -> float:
            chosen = np.resize(order, count)
            start = time.perf_counter()
            clipped_sum(count, 1.0, 2.0**-20, gradients, rows, chosen, program.dimension)
            return (time.perf_counter() - start) / count

        # As many slots at once as a step may have, if they are quick.
        count = max(3, min(256, int(_TIMED_SECONDS / 8 / seconds(3))))
        taken = [seconds(count)]
        while count * sum(taken) < _TIMED_SECONDS:
            taken.append(seconds(count))
        found.append(statistics.median(taken))
    return found[0], found[1] / (per_unit * views.count)


def _step_time(program: Program, train: TrainSpec, units: int) -> float:
    """Seconds of sampling, noise and update in one step; their helpers are there from now on."""
    flat, dimension = program.flat.clone(), program.dimension
    update = optim.optimizer(train.optimizer, train.schedule, train.steps, dimension)

    def add(step: int, first: int, total: npt.NDArray[np.int64]) -> None:
        noise.add_gaussian(total, bytes(32), step, 2.0**20, first)

    apply = applied(flat, add, update, 2.0**-20)
    taken = []
    for step in range(5):
        start = time.perf_counter()
        sampling.sample(bytes(32), step, units, min(1.0, train.batch_size / units))
        apply(windows.filled([dimension], [None], torch.int64), step)
        taken.append(time.perf_counter() - start)
    return statistics.median(taken)
