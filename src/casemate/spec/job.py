"""Job, plan and quote: what the scientist asks for, what it comes to, what it costs."""

from __future__ import annotations

import math
import re
from typing import Final, Literal, TypeAlias, get_args

from casemate.spec.codec import value

_LARGEST: Final = 1e6
MAX_METRICS: Final = 16


def _between(low: float, high: float, **fields: float) -> None:
    for name, x in fields.items():
        if not low <= x <= high:
            raise ValueError(f"{name} must be in [{low:g}, {high:g}]")


@value("sgd/v1")
class Sgd:
    """SGD as torch.optim.SGD defines it (dampening 0)."""

    lr: float
    momentum: float = 0.0
    nesterov: bool = False
    weight_decay: float = 0.0

    def __post_init__(self) -> None:
        _between(0, _LARGEST, lr=self.lr, momentum=self.momentum, weight_decay=self.weight_decay)


@value("adam/v1")
class Adam:
    """Adam (``decoupled=False``) or AdamW (``decoupled=True``) as torch.optim defines them."""

    lr: float
    beta1: float = 0.9
    beta2: float = 0.999
    eps: float = 1e-8
    weight_decay: float = 0.0
    decoupled: bool = False

    def __post_init__(self) -> None:
        _between(0, _LARGEST, lr=self.lr, eps=self.eps, weight_decay=self.weight_decay)
        _between(0, math.nextafter(1, 0), beta1=self.beta1, beta2=self.beta2)


@value("schedule/v1")
class Schedule:
    """Factor on the learning rate at step t of T, after ``warmup`` linear steps from 1/warmup to 1.

    constant: 1. linear: from 1 to ``final``. cosine: half a cosine from 1 to ``final``.
    step: ``gamma ** ((t - warmup) // every)``.
    """

    kind: Literal["constant", "linear", "cosine", "step"] = "constant"
    warmup: int = 0
    final: float = 0.0
    gamma: float = 1.0
    every: int = 1

    def __post_init__(self) -> None:
        _between(0, 1000, final=self.final)
        _between(0, 1, gamma=self.gamma)
        _between(0, 10_000_000, warmup=self.warmup)
        _between(1, 10_000_000, every=self.every)


Clipping: TypeAlias = Literal["flat", "per-layer", "automatic"]


@value("dp/v1", later=("clipping", "gamma"))
class Dp:
    """The privacy asked for: the plan is calibrated so that no dataset's filter is charged more
    than ``epsilon`` at ``delta``; ``clip`` is C, the bound on one unit's gradient norm.

    ``clipping`` says how a unit's gradient g comes to a norm of at most C:

    flat: g min(1, C / |g|) (Abadi et al. 2016, Algorithm 1).
    per-layer: each trained tensor's part by itself to C / sqrt(L), L the number of trained tensors
    (McMahan et al. 2018, arXiv:1710.06963, per-layer clipping).
    automatic: g C / (|g| + gamma) (Bu et al. 2023, arXiv:2206.07136, AUTO-S); gamma, in gradient
    units, counts for this form alone.
    """

    epsilon: float
    delta: float
    clip: float = 1.0
    clipping: Clipping = "flat"
    gamma: float = 0.01

    def __post_init__(self) -> None:
        if not 0 < self.epsilon <= 1000 or not 0 < self.delta <= 0.01:
            raise ValueError("epsilon must be in (0, 1000], delta in (0, 0.01]")
        _between(1e-30, _LARGEST, clip=self.clip)
        _between(1e-6, _LARGEST, gamma=self.gamma)
        if self.clipping not in get_args(Clipping):
            raise ValueError(f"clipping must be one of {', '.join(get_args(Clipping))}")


@value("non-private/v1")
class NonPrivate:
    """Without privacy (P10). words: of the owners' policies, repeated; of an evaluation, any."""

    words: str


@value("flip/v1")
class Flip:
    """Mirror an image (C, H, W) left to right with probability ``chance``."""

    chance: float = 0.5

    def __post_init__(self) -> None:
        _between(0, 1, chance=self.chance)


@value("crop/v1")
class Crop:
    """Pad an image (C, H, W) by ``pixels`` on each side, with zeros or by reflection (which leaves
    out the edge itself), and cut one of the old size at a place drawn uniformly."""

    pixels: int
    pad: Literal["reflect", "zeros"] = "reflect"

    def __post_init__(self) -> None:
        _between(1, 1024, pixels=self.pixels)
        if self.pad not in ("reflect", "zeros"):
            raise ValueError("pad must be one of reflect, zeros")


@value("views/v1")
class Views:
    """Augmentation multiplicity (De et al. 2022, arXiv:2204.13650, section 3.3): a row's gradient
    is the mean over ``count`` views of it, each with draws of its own, before the clip; so what one
    unit moves stays as it is. ``transforms``, in their order, act on the graph's input ``input``;
    by default on its only one of images."""

    count: int = 1
    input: str = ""
    transforms: tuple[Flip | Crop, ...] = ()

    def __post_init__(self) -> None:
        _between(1, 1024, count=self.count)
        if len(self.transforms) > 8:
            raise ValueError("there are at most 8 transforms")
        if self.input and not self.transforms:
            raise ValueError("an input is named for no transforms")


Runtime: TypeAlias = Literal["torch", "native"]


@value("train/v1", later=("ema", "views", "runtime"))
class TrainSpec:
    """``batch_size``: the expected number of units in a step, also the normaliser (P2).

    ``ema``: what is released is the average of the weights after each step w_1 ... w_t with this
    decay b, (1 - b) / (1 - b^t) sum_s b^(t-s) w_s (De et al. 2022, arXiv:2204.13650;
    the divisor as in Adam, so that the initial weights have no part in it); 0: the last weights.

    ``runtime``: what trains, the engine on torch or the native step (docs/native.md).
    """

    batch_size: int
    steps: int
    privacy: Dp | NonPrivate
    optimizer: Sgd | Adam
    schedule: Schedule = Schedule()
    ema: float = 0.0
    views: Views = Views()
    runtime: Runtime = "torch"

    def __post_init__(self) -> None:
        if self.runtime not in get_args(Runtime):
            raise ValueError(f"runtime must be one of {', '.join(get_args(Runtime))}")
        _between(0, math.nextafter(1, 0), ema=self.ema)
        if not 1 <= self.batch_size <= 2**31 or not 1 <= self.steps <= 10_000_000:
            raise ValueError("batch_size must be in [1, 2^31], steps in [1, 10^7]")


def longest(metrics: int, rows_per_unit: int) -> float:
    """The largest norm of what a unit adds to an evaluation of so many metrics: a clip that changes
    none."""
    return math.sqrt(1 + metrics) * rows_per_unit


@value("input/v1")
class InputBinding:
    """Feeds a graph input: one column as it is, or several scalar columns stacked in order."""

    input: str
    columns: tuple[str, ...]


@value("dataset-use/v1")
class DatasetUse:
    """The dataset, and the policy and epoch that the scientist saw."""

    dataset: str
    policy_digest: str
    epoch: int


@value("metric/v1")
class Metric:
    """A figure that each row has, cut to [0, ``limit``]; its mean over the rows is asked for."""

    name: str
    limit: float = 1.0

    def __post_init__(self) -> None:
        if not (1 <= len(self.name) <= 60 and self.name.isascii() and self.name.isprintable()):
            raise ValueError("a metric's name must have 1 to 60 printable ASCII characters")
        if self.name != " ".join(self.name.split()):  # in a receipt it would look like another
            raise ValueError("a metric's name must have single spaces, and none at its ends")
        _between(1e-6, _LARGEST, limit=self.limit)


@value("job/v1", later=("metrics", "target"))
class JobRequest:
    """One job over one or several datasets: a training, or with ``metrics`` an evaluation.

    ``job`` is ``job_`` and 32 hex digits chosen by the client; the same id with another body is
    refused. ``model_digest`` is the SHA-256 of the packed model (graph and initial weights).

    An evaluation is one step of plain SGD, lr 1, on all units, of a graph whose one trained tensor
    is a vector of zeros, one longer than ``metrics``, and whose loss is minus its product with
    (1, each metric over its limit): so it becomes the mean of these over units, by the way that
    clips, sums and noises gradients. Without privacy the metrics are exact (:attr:`exact`).

    ``target``: of an entry of a contest, the label column that the outputs of the model are scored
    against. The model is then one for prediction, of which the enclave makes the evaluation.
    """

    job: str
    scientist: str
    datasets: tuple[DatasetUse, ...]
    model_digest: str
    inputs: tuple[InputBinding, ...]
    train: TrainSpec
    metrics: tuple[Metric, ...] = ()
    target: str = ""

    def __post_init__(self) -> None:
        if not re.fullmatch(r"job_[0-9a-f]{32}", self.job):
            raise ValueError("job must be job_ and 32 hex digits")
        names = [d.dataset for d in self.datasets]
        if not 1 <= len(names) <= 64 or len(set(names)) != len(names):
            raise ValueError("a job needs 1 to 64 different datasets")
        if self.target and not (self.metrics and len(self.datasets) == 1):
            raise ValueError("an entry asks for metrics of one dataset")
        if not self.metrics:
            return
        different = len({m.name for m in self.metrics}) == len(self.metrics)
        if not different or len(self.metrics) > MAX_METRICS:
            raise ValueError(f"metrics must be at most {MAX_METRICS}, with different names")
        form = TrainSpec(
            batch_size=self.train.batch_size,
            steps=1,
            privacy=self.train.privacy,
            optimizer=Sgd(lr=1.0),
        )
        if self.train != form:
            raise ValueError("metrics are had by one step of plain SGD with lr 1")

    @property
    def exact(self) -> bool:
        """Whether metrics are asked for without privacy (P10)."""
        return bool(self.metrics) and isinstance(self.train.privacy, NonPrivate)

    @property
    def released(self) -> int | None:
        """How many scalars an evaluation releases; ``None``: those of the model."""
        return len(self.metrics) + 1 if self.metrics else None


@value("submission/v1")
class Submission:
    """A job with where its sealed model lies. ``sealed_key``: HPKE message holding the 32-byte
    stream key, info :meth:`info`."""

    request: JobRequest
    upload: str
    sealed_key: bytes

    @staticmethod
    def info(request_digest: str) -> bytes:
        return f"casemate/model-key/v1|{request_digest}".encode()


@value("dp-event/v1")
class DpEvent:
    """``steps`` Gaussian mechanisms on Poisson samples of rate ``rate``, zero-out adjacency.

    ``noise_multiplier`` is the noise's standard deviation over the accounted sensitivity.
    """

    rate: float
    noise_multiplier: float
    steps: int


@value("plan/v1", later=("clipping", "gamma"))
class Plan:
    """All public constants of a run that can affect privacy. Frozen; its digest is what counts.

    units: N over all datasets. rate: q. normaliser: what the noised sum is divided by.
    sensitivity: accounted L2 sensitivity, C(1+eta) plus certified rounding (P3), in gradient units.
    sigma: standard deviation of the noise in gradient units = noise_multiplier * sensitivity.
    grid: size of one integer grid step in gradient units (P4).
    microbatch, microbatches: every step evaluates exactly microbatch * microbatches slots.
    delta_truncation, delta_sampler: charged beside the event's own delta (P2, P4).
    private is False only for NonPrivate jobs; then sigma is 0 and events is empty.
    clipping, gamma: the form of the clip, as in ``Dp``; gamma is 0 but for ``automatic``. What a
    unit adds has norm at most C (1+eta) under each, so that sensitivity does not depend on it.
    """

    request_digest: str
    model_digest: str
    private: bool
    units: int
    rate: float
    steps: int
    clip: float
    normaliser: float
    sensitivity: float
    noise_multiplier: float
    sigma: float
    grid: float
    microbatch: int
    microbatches: int
    events: tuple[DpEvent, ...]
    delta_truncation: float
    delta_sampler: float
    clipping: Clipping = "flat"
    gamma: float = 0.0


@value("execution/v1", later=("compiled", "artifact", "ways"))
class Execution:
    """Parts of a run that cannot affect privacy. ``path``: how gradients are had (engine PATHS).
    ``compiled``: whether parts of it are compiled before the run, for speed alone. Of the path
    ``native``: ``artifact``, ``sha256:`` of the program that trains, and ``ways``, by trained
    tensor how its norms are had: with these the same model and plan give the same bytes."""

    threads: int = 1
    path: str = "record"
    compiled: bool = False
    artifact: str = ""
    ways: tuple[str, ...] = ()


@value("charge/v1")
class Charge:
    """What a dataset's RDP filter takes: nano-RDP at each order of ``rdp/v1``, rounded up, and
    delta in units of 1e-15, rounded up. ``epsilon`` shows it at the job's delta."""

    rdp_nano: tuple[int, ...]
    delta_femto: int
    epsilon: float


@value("dataset-quote/v1")
class DatasetQuote:
    """One dataset's answer. ``refusal``: an error code, or ``None`` when the job is allowed now."""

    dataset: str
    owner: str
    policy_digest: str
    epoch: int
    charge: Charge
    left_after: float
    approval_needed: bool
    refusal: str | None = None
    message: str = ""


@value("quote/v1")
class Quote:
    """What a job will cost. Its digest is what owners approve and what ``submit`` names.

    epsilon: tight PLD epsilon of this job alone at the job's delta, shown, never debited.
    seconds, bytes: predicted wall time of the run and peak memory. ticks: public progress steps.
    path: which engine path each part of the model takes.
    """

    request: JobRequest
    plan: Plan
    execution: Execution
    epsilon: float
    delta: float
    datasets: tuple[DatasetQuote, ...]
    seconds: float
    bytes: int
    ticks: int
    parameters: int
    path: tuple[str, ...]


@value("job-status/v1")
class JobStatus:
    """What may be seen of a job: public ticks of the predicted time, nothing finer (P6)."""

    job: str
    state: Literal["queued", "running", "done", "failed", "cancelled"]
    tick: int
    ticks: int
    quote_digest: str
    error: str | None = None
    message: str = ""
