"""The form of a training state at a step boundary: what a run is resumed from, and nothing else.

Canonical safetensors (:mod:`casemate.spec.tensors`) with these tensors alone, d trained scalars:

    job             u8 (32,)  SHA-256 of the plan and the training it belongs to
    step            i64 (1,)  steps taken, above 0 and below the plan's
    vector.weights  f32 (d,)  the trained tensors, one after another in the order of the graph
    vector.velocity f32 (d,)  of SGD with momentum
    vector.mean     f32 (d,)  of Adam: the first moment
    vector.square   f32 (d,)  of Adam: the second
    vector.average  i64 (d,)  with ``TrainSpec.ema``: the bits of float64

So it has no place for a key, a sample or a row, and its size is a public constant of the job (P11).
What the vectors hold is made of noised sums by public rules. docs/privacy.md, "Resuming".
"""

from __future__ import annotations

import hashlib
import math
from dataclasses import dataclass
from typing import Final

from casemate.spec import codec, tensors
from casemate.spec.errors import FormatError, PlanError
from casemate.spec.job import Adam, Plan, TrainSpec

# The header, ``job`` and ``step`` of any state lie within so many bytes.
HEAD_BYTES: Final = 1024
VECTOR: Final = "vector."
_DOMAIN: Final = b"casemate/training-state/v1\0"


@dataclass(frozen=True, slots=True)
class Head:
    """Steps taken, and the number of trained scalars."""

    step: int
    dimension: int


def vectors(train: TrainSpec) -> dict[str, str]:
    """The vectors' names and dtypes."""
    names = ["weights"]
    if isinstance(train.optimizer, Adam):
        names += ["mean", "square"]
    elif train.optimizer.momentum:
        names += ["velocity"]
    return dict.fromkeys(names, "f32") | ({"average": "i64"} if train.ema else {})


def layout(train: TrainSpec, dimension: int) -> dict[str, tuple[str, tuple[int, ...]]]:
    """Every tensor's dtype and shape."""
    each = {VECTOR + name: (dtype, (dimension,)) for name, dtype in vectors(train).items()}
    return {"job": ("u8", (32,)), "step": ("i64", (1,)), **each}


def size(train: TrainSpec, dimension: int) -> int:
    """Bytes of a state."""
    wanted = layout(train, dimension)
    bodies = (tensors.DTYPES[d][1] * math.prod(s) for d, s in wanted.values())
    return len(tensors.layout(wanted)[0]) + sum(bodies)


def job(plan: Plan, train: TrainSpec) -> bytes:
    """What ``job`` holds, 32 bytes; the plan names the request and the model by their digests."""
    both = codec.encode(plan) + b"\0" + codec.encode(train)
    return hashlib.sha256(_DOMAIN + both).digest()


def due(steps: int, every: int, after: int) -> int | None:
    """The next step, ``after`` so many, whose state is kept: a multiple of ``every`` (0: none is)
    below ``steps``. A function of public constants alone, so that both sides know it."""
    following = after - after % every + every if every > 0 else steps
    return following if following < steps else None


def refuse(message: str) -> FormatError:
    """The error for bytes that are no state."""
    return FormatError("format.state", message, mend="Start the job again from its beginning.")


def check(head: bytes | memoryview, total: int, plan: Plan, train: TrainSpec) -> Head:
    """Whether bytes are a state of this job.

    head: the first ``HEAD_BYTES`` of ``total``, or all where there are fewer. Raises
    ``FormatError`` for another form (``format.state`` and those of safetensors), ``PlanError``
    ``plan.state`` for another job's or a step that is none of the plan's.
    """
    infos = tensors.read_header(head, total)
    weights = infos.get(VECTOR + "weights")
    if weights is None or len(weights.shape) != 1 or not weights.shape[0]:
        raise refuse("The bytes are no training state: there are no weights.")
    dimension = weights.shape[0]
    if {n: (i.dtype, i.shape) for n, i in infos.items()} != layout(train, dimension):
        raise refuse("The training state has other tensors than its job's optimizer keeps.")
    named, counted = (head[i.start : i.end] for i in (infos["job"], infos["step"]))
    step = int.from_bytes(counted, "little")
    if named != job(plan, train) or not 1 <= step < plan.steps:
        raise PlanError(
            "plan.state",
            "The training state is not one of this job's steps.",
            mend="Start the job again from its beginning.",
        )
    return Head(step, dimension)
