"""The closed list of messages between the server and a worker.

A frame on the socket pair is 4 bytes of length (big endian) and a value's canonical bytes; file
descriptors travel beside it (SCM_RIGHTS) in the order that the message's docstring gives.
The parent treats the worker as hostile: a frame over MAX_FRAME, of another type or out of order
ends the worker.
"""

from __future__ import annotations

from typing import Final, Literal

from casemate.spec.codec import value
from casemate.spec.data import DatasetSchema
from casemate.spec.job import Execution, InputBinding, Metric, Plan, TrainSpec
from casemate.spec.serving import TensorSpec

MAX_FRAME: Final = 1 << 20


# From the server to the worker.


@value("w-check/v1", later=("sandbox",))
class CheckDataset:
    """Check a pushed dataset. Descriptors: the sealed stream.

    sandbox: layers without which the worker does not look at it."""

    dataset: str
    schema: DatasetSchema
    key: bytes
    salt: bytes
    sandbox: tuple[str, ...] = ()


@value(
    "w-prepare/v1",
    later=("compile_seconds", "compiled", "sandbox", "released", "metrics", "target", "ways"),
)
class Prepare:
    """Parse, prove and probe a model; no data, no data keys. Descriptors: the sealed model.

    compile_seconds: from then on no part of it is compiled. compiled: what the quote's execution
    says; ``None`` where there is no quote yet and the worker decides. sandbox: layers without
    which the worker takes no data. released: scalars of the one tensor that an evaluation may have
    trained; ``None`` for a training. metrics, target: as in the request, of an entry of a contest.
    ways: of a native step, what the quote's execution says."""

    key: bytes
    model_digest: str
    schemas: tuple[DatasetSchema, ...]
    inputs: tuple[InputBinding, ...]
    train: TrainSpec
    memory_bytes: int
    threads: int
    compile_seconds: float = 0.0
    compiled: bool | None = None
    sandbox: tuple[str, ...] = ()
    released: int | None = None
    metrics: tuple[Metric, ...] = ()
    target: str = ""
    ways: tuple[str, ...] = ()


@value("w-dataset/v1")
class RunDataset:
    """A dataset of a run: its name, schema and key."""

    dataset: str
    schema: DatasetSchema
    key: bytes
    salt: bytes


@value("w-resume/v1")
class Resume:
    """The training state to go on from: its stream's key and the steps it has taken."""

    key: bytes
    step: int


@value("w-run/v1", later=("resume", "state_steps"))
class Run:
    """Train. Descriptors: the sealed streams in the order of ``datasets``, that of the state with
    ``resume``, an empty memfd for the result, and one for states with ``state_steps``. Sent only
    after ``Prepared`` and ``Locked``, to the worker that prepared.

    state_steps: after each multiple of it below the plan's steps comes a ``State``; 0: none comes.
    A public constant, as are the steps themselves (``plan.state.due``)."""

    plan: Plan
    execution: Execution
    datasets: tuple[RunDataset, ...]
    resume: Resume | None = None
    state_steps: int = 0


@value("w-go-on/v1")
class GoOn:
    """The answer to ``State``: the state after ``step`` steps is kept, the memfd is free again."""

    step: int


@value("w-serve/v1")
class Serve:
    """Parse, prove and warm a model that is deployed; no calls yet. Descriptors: the sealed model.

    records, slots: as in ``ServePolicy``. memory_bytes: of the whole process. call_seconds: after
    which the kernel ends the worker, should the server not have done so."""

    key: bytes
    model_digest: str
    records: int
    slots: int
    memory_bytes: int
    threads: int
    call_seconds: int
    sandbox: tuple[str, ...] = ()


@value("w-call/v1")
class Call:
    """One call: the keys of its inputs' stream and of its answer's, its records, and how many bytes
    its sealed inputs have."""

    keys: bytes
    records: int
    size: int


@value("w-predict/v1")
class Predict:
    """Answer these calls, whose sealed inputs follow the frame one after another. Sent only after
    ``Serving`` and ``Locked``."""

    calls: tuple[Call, ...]


# From the worker to the server.


@value("w-ready/v1")
class Ready:
    """Imports are done; one job may come."""

    pid: int


@value("w-checked/v1")
class Checked:
    """The dataset is as its schema says."""

    dataset: str


@value("w-prepared/v1", later=("compiled", "result", "result_bytes", "artifact", "ways"))
class Prepared:
    """What the plan needs to know of a model on this machine.

    certified_eta: the relative slack of the clip (P3); rounding: certified absolute error of one
    step's sum in gradient units before the grid's own rounding.
    dimension: number of trained scalars. compiled: whether compiling parts of the path was tried.
    result, result_bytes: of the result to come the digest of all before its first tensor, so of its
    names and shapes, and its size. No other is taken. artifact, ways: of a native step, as in
    ``Execution``.
    """

    model_digest: str
    parameters: int
    dimension: int
    microbatch: int
    seconds_per_microbatch: float
    seconds_per_step: float
    seconds_fixed: float
    bytes: int
    certified_eta: float
    rounding: float
    path: tuple[str, ...]
    compiled: bool = False
    result: str = ""
    result_bytes: int = 0
    artifact: str = ""
    ways: tuple[str, ...] = ()


@value("w-locked/v1")
class Locked:
    """The worker has shut itself in; the layers that hold."""

    layers: tuple[str, ...]


@value("w-state/v1")
class State:
    """The memfd for states holds, from its beginning, the training state after ``step`` steps, this
    long (``plan.state``), in clear. The worker leaves it alone, and waits, until ``GoOn``."""

    step: int
    bytes: int


@value("w-serving/v1")
class Serving:
    """What a deployed model takes and gives. parameters: its scalars. slots: of one forward pass;
    1 where a record's bits depended on its place, so that calls do not share one."""

    model_digest: str
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    parameters: int
    slots: int


@value("w-predicted/v1")
class Predicted:
    """The sealed answers follow the frame, one for each call, of the sizes that are public."""

    calls: int


@value("w-done/v1")
class Done:
    """The result memfd holds the weights as safetensors, this long."""

    bytes: int


@value("w-failed/v1")
class Failed:
    """A refusal. In phase ``run`` the parent drops everything but ``phase`` (P6)."""

    phase: Literal["check", "prepare", "lock", "run"]
    code: str
    message: str
    mend: str
    where: str
