"""A contest: rows for evaluation that score models which others enter (docs/contests.md).

What is scored is the model's outputs, by a closed list of metrics that the enclave itself computes
(``graph.score``): an entrant has no say in them.
"""

from __future__ import annotations

import math
import struct
from typing import TYPE_CHECKING, Final

from casemate.spec import tensors
from casemate.spec.codec import value
from casemate.spec.errors import FormatError
from casemate.spec.job import MAX_METRICS, Dp, JobRequest, Metric, NonPrivate

if TYPE_CHECKING:
    from casemate.spec.data import Column

# The metrics that there are, and whether more of one is better.
HIGHER: Final = {
    "accuracy": True,
    "binary_cross_entropy_with_logits": False,
    "cross_entropy": False,
    "l1": False,
    "mse": False,
}
MAX_ENTRIES: Final = 1_000_000


def index(label: Column) -> bool:
    """Whether a label is the index of a class, from 0 on."""
    return label.dtype in ("u8", "i32", "i64") and not label.shape and label.low == 0


def fits(metric: str, label: Column, *, classes: bool) -> bool:
    """Whether a metric can be had of a score for each of a label's ``classes``, or for each of its
    elements. Where it asks whether a score is above 0, what it is compared with is from 0 to 1: of
    a class out of ten, "above 0" is nine times right."""
    if classes:
        return metric in ("accuracy", "cross_entropy") and index(label)
    if metric in ("l1", "mse"):
        return True
    low, high = label.wire_bounds or (0, 1)
    return metric in ("accuracy", "binary_cross_entropy_with_logits") and 0 <= low <= high <= 1


@value("contest/v1")
class Contest:
    """``target``: the label column that outputs are compared with. ``metrics``: of :data:`HIGHER`;
    entries are ranked by the first. ``entries``: of each participant, in all, failed ones too.
    ``epsilon``, ``delta``: the privacy of each entry's scores, which the dataset's budget pays;
    neither: scores are exact, and each is one of the policy's ``evaluations``.
    """

    target: str
    metrics: tuple[Metric, ...]
    entries: int
    epsilon: float | None = None
    delta: float | None = None

    def __post_init__(self) -> None:
        names = [m.name for m in self.metrics]
        if not 1 <= len(names) <= MAX_METRICS or len(set(names)) != len(names):
            raise ValueError(f"a contest needs 1 to {MAX_METRICS} different metrics")
        if unknown := [n for n in names if n not in HIGHER]:
            raise ValueError(f"{unknown[0]!r} is none of {', '.join(HIGHER)}")
        if any(m.name == "accuracy" and m.limit != 1 for m in self.metrics):
            raise ValueError("the limit of accuracy is 1")
        if not 1 <= self.entries <= MAX_ENTRIES:
            raise ValueError(f"entries must be in [1, {MAX_ENTRIES}]")
        if (self.epsilon is None) != (self.delta is None):
            raise ValueError("epsilon and delta are given both, or neither")
        if self.epsilon is not None and self.delta is not None:
            Dp(epsilon=self.epsilon, delta=self.delta)

    def can_score(self, label: Column, *, classes: bool) -> bool:
        """Whether all metrics can be had of one output: :func:`fits`."""
        return all(fits(m.name, label, classes=classes) for m in self.metrics)

    def takes(self, request: JobRequest) -> bool:
        """Whether a job asks for these scores, in this privacy, and for nothing else."""
        privacy = request.train.privacy
        asked = (
            (None, None) if isinstance(privacy, NonPrivate) else (privacy.epsilon, privacy.delta)
        )
        return (request.target, request.metrics) == (self.target, self.metrics) and asked == (
            self.epsilon,
            self.delta,
        )


def sums(metrics: tuple[Metric, ...], result: bytes | memoryview) -> tuple[float, ...]:
    """What an evaluation's result holds: the rows' part, then each metric's sum over its limit, all
    over the normaliser. Raises ``FormatError``."""
    parts = [(info, bytes(view)) for info, view in tensors.load(memoryview(result)).values()]
    if [(i.dtype, i.shape) for i, _ in parts] != [("f32", (len(metrics) + 1,))]:
        raise FormatError(
            "format.result", "The result holds other things than the metrics.", mend="Report it."
        )
    return struct.unpack(f"<{len(metrics) + 1}f", parts[0][1])


def scores(metrics: tuple[Metric, ...], result: bytes | memoryview) -> tuple[float, ...]:
    """The mean of each metric over the rows, from 0 to its limit; where noise has left no rows, the
    worst that there is."""
    rows, *parts = sums(metrics, result)
    return tuple(
        m.limit * min(1.0, max(0.0, part / rows))
        if rows > 0 and math.isfinite(part)
        else m.limit * (not HIGHER[m.name])
        for m, part in zip(metrics, parts, strict=True)
    )
