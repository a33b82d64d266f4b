"""Metrics as a loss: what a row's gradient is then, is the row's metrics.

The head trains one vector of zeros, and a record's loss is minus the product of that vector with
(1, each metric over its limit). One step of SGD, lr 1, over all units leaves their mean in it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Final, TypeAlias

import torch
from torch import Tensor, nn

from casemate.engine.capture import loss as losses
from casemate.engine.capture.trace import modes
from casemate.spec.errors import ModelError

Function: TypeAlias = Callable[..., Tensor]


class Accuracy(nn.Module):
    """The part of a record's targets that the scores hit: the largest of several classes (second
    as in torch, or last), or the sign of one."""

    def forward(self, outputs: Any, target: Tensor) -> Tensor:
        scores = losses.scores_of(outputs)
        if target.dim() == scores.dim() and target.shape[-1] == 1 < scores.shape[-1]:
            target = target.squeeze(-1)
        if target.dim() < scores.dim() and scores[0].numel() > target[0].numel():
            second = scores.shape[2:] == target.shape[1:]
            hit = scores.argmax(1 if second else -1) == target
        else:
            hit = (scores.reshape(target.shape) > 0) == (target > 0.5)
        flat: Tensor = hit.to(torch.float32).reshape(hit.shape[0], -1)
        return flat.sum(1) / flat[0].numel()


NAMES: Final[dict[str, Callable[[], nn.Module]]] = {"accuracy": Accuracy}


def make(metric: object) -> nn.Module:
    """The per-record form of a metric's name (``accuracy``, or a loss's), or of a function of
    (outputs, target). Raises ``ModelError``."""
    if isinstance(metric, str) and metric in NAMES:
        return NAMES[metric]()
    if isinstance(metric, str) and metric not in (*losses.NAMES, "next_token"):
        raise ModelError(
            "model.metrics",
            f"{metric[:60]!r} is no metric that casemate knows.",
            mend=f"Use one of {', '.join([*NAMES, *sorted(losses.NAMES)])}, or a function of"
            " (outputs, target) that gives one value for each record.",
            where=metric[:60],
        )
    return losses.make(metric)


class Head(nn.Module):
    """The loss of an evaluation. A value that is no number counts as its limit."""

    def __init__(self, functions: Sequence[nn.Module], limits: Sequence[float]) -> None:
        super().__init__()
        self.functions, self.limits = nn.ModuleList(functions), tuple(limits)
        self.metrics = nn.Parameter(torch.zeros(1 + len(functions)))

    def forward(self, outputs: Any, target: Tensor) -> Tensor:
        values = []
        for function, limit in zip(self.functions, self.limits, strict=True):
            value = function(outputs, target).to(torch.float32).reshape(target.shape[0])
            value = torch.where(value == value, value, limit)
            values.append(value.clamp(0, limit) / limit)
        row = torch.stack([torch.ones_like(values[0]), *values], dim=1)
        return -(row * self.metrics).sum(1)


def head(metrics: Mapping[str, tuple[object, float]]) -> Head:
    """Of metrics by name: what :func:`make` takes, and the limit."""
    return Head([make(m) for m, _ in metrics.values()], [limit for _, limit in metrics.values()])


@contextmanager
def frozen(module: nn.Module) -> Iterator[None]:
    """Nothing of the module is trained, and it is in evaluation mode; put back as it was."""
    trained = [p for p in module.parameters() if p.requires_grad]
    module.requires_grad_(False)
    try:
        with modes(module):
            yield
    finally:
        for p in trained:
            p.requires_grad_(True)
