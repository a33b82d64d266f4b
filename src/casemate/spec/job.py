"""Job, plan and quote: what the scientist asks for, what it comes to, what it costs."""

from __future__ import annotations

import math
import re
from typing import Final, Literal

from casemate.spec.codec import value

_LARGEST: Final = 1e6


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


@value("dp/v1")
class Dp:
    """The privacy asked for: the plan is calibrated so that no dataset's filter is charged more
    than ``epsilon`` at ``delta``; ``clip`` is C, the bound on one unit's gradient norm."""

    epsilon: float
    delta: float
    clip: float = 1.0

    def __post_init__(self) -> None:
        if not 0 < self.epsilon <= 1000 or not 0 < self.delta <= 0.01:
            raise ValueError("epsilon must be in (0, 1000], delta in (0, 0.01]")
        _between(1e-30, _LARGEST, clip=self.clip)


@value("non-private/v1")
class NonPrivate:
    """Training without privacy, with the words of the owners' policies repeated (P10)."""

    words: str


@value("train/v1")
class TrainSpec:
    """``batch_size``: the expected number of units in a step, also the normaliser (P2)."""

    batch_size: int
    steps: int
    privacy: Dp | NonPrivate
    optimizer: Sgd | Adam
    schedule: Schedule = Schedule()

    def __post_init__(self) -> None:
        if not 1 <= self.batch_size <= 2**31 or not 1 <= self.steps <= 10_000_000:
            raise ValueError("batch_size must be in [1, 2^31], steps in [1, 10^7]")


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


@value("job/v1")
class JobRequest:
    """One training job over one or several datasets.

    ``job`` is ``job_`` and 32 hex digits chosen by the client; the same id with another body is
    refused. ``model_digest`` is the SHA-256 of the packed model (graph and initial weights).
    """

    job: str
    scientist: str
    datasets: tuple[DatasetUse, ...]
    model_digest: str
    inputs: tuple[InputBinding, ...]
    train: TrainSpec

    def __post_init__(self) -> None:
        if not re.fullmatch(r"job_[0-9a-f]{32}", self.job):
            raise ValueError("job must be job_ and 32 hex digits")
        names = [d.dataset for d in self.datasets]
        if not 1 <= len(names) <= 64 or len(set(names)) != len(names):
            raise ValueError("a job needs 1 to 64 different datasets")


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


@value("plan/v1")
class Plan:
    """All public constants of a run that can affect privacy. Frozen; its digest is what counts.

    units: N over all datasets. rate: q. normaliser: what the noised sum is divided by.
    sensitivity: accounted L2 sensitivity, C(1+eta) plus certified rounding (P3), in gradient units.
    sigma: standard deviation of the noise in gradient units = noise_multiplier * sensitivity.
    grid: size of one integer grid step in gradient units (P4).
    microbatch, microbatches: every step evaluates exactly microbatch * microbatches slots.
    delta_truncation, delta_sampler: charged beside the event's own delta (P2, P4).
    private is False only for NonPrivate jobs; then sigma is 0 and events is empty.
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


@value("execution/v1")
class Execution:
    """Parts of a run that cannot affect privacy. ``path``: how gradients are had (engine PATHS)."""

    threads: int = 1
    path: str = "record"


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
