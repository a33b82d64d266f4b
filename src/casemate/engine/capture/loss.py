"""Losses by their usual names, for one record at a time."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable
from typing import Any, Final

import torch
from torch import Tensor, nn
from torch.nn import functional

from casemate.spec.errors import ModelError

NAMES: Final[dict[str, Callable[[], nn.Module]]] = {
    "cross_entropy": nn.CrossEntropyLoss,
    "nll_loss": nn.NLLLoss,
    "binary_cross_entropy_with_logits": nn.BCEWithLogitsLoss,
    "mse": nn.MSELoss,
    "mse_loss": nn.MSELoss,
    "l1": nn.L1Loss,
    "l1_loss": nn.L1Loss,
    "smooth_l1_loss": nn.SmoothL1Loss,
    "huber_loss": nn.HuberLoss,
    "poisson_nll_loss": nn.PoissonNLLLoss,
}
_CLASSES: Final = (nn.CrossEntropyLoss, nn.NLLLoss)
_ADMITTED: Final = (
    *_CLASSES, nn.BCEWithLogitsLoss, nn.MSELoss, nn.L1Loss, nn.SmoothL1Loss, nn.HuberLoss,
    nn.PoissonNLLLoss, nn.SoftMarginLoss,
)  # fmt: skip

_INSTEAD: Final[dict[type, str]] = {
    nn.BCELoss: "Leave the sigmoid out and use nn.BCEWithLogitsLoss.",
    nn.GaussianNLLLoss: "Write it out: lambda outputs, target: ((outputs[:, 0] - target) ** 2"
    " * torch.exp(-outputs[:, 1]) + outputs[:, 1]) / 2, where outputs[:, 1] is the log variance.",
}


def scores_of(outputs: Any) -> Any:
    """The scores of what a model returns: ``.logits``, else the first of a tuple, else itself."""
    if isinstance(outputs, Tensor):
        return outputs
    logits = getattr(outputs, "logits", None)
    if isinstance(logits, Tensor):
        return logits
    if isinstance(outputs, dict) and isinstance(outputs.get("logits"), Tensor):
        return outputs["logits"]
    if isinstance(outputs, tuple | list) and outputs and isinstance(outputs[0], Tensor):
        return outputs[0]
    raise ModelError(
        "model.outputs",
        f"The module returns {type(outputs).__name__}, in which no scores are found.",
        mend="Return a tensor, or pass a loss function of (outputs, target).",
    )


class Named(nn.Module):
    """A loss of ``torch.nn``: for each record the mean (or sum) over its own elements, shape (B,).

    Elements with the target ``ignore_index`` do not count in the mean. Class weights multiply; the
    mean is over elements, not over weights, since a sum of weights would mix records.
    """

    def __init__(self, loss: nn.Module, *, shift: bool = False) -> None:
        super().__init__()
        self.mean = loss.reduction != "sum"
        self.loss = copy.deepcopy(loss)
        self.loss.reduction = "none"  # type: ignore[assignment]
        self.shift = shift

    def forward(self, outputs: Any, target: Tensor) -> Tensor:
        scores = scores_of(outputs)
        if self.shift:
            scores, target = scores[:, :-1], target[:, 1:]
        if isinstance(self.loss, _CLASSES):
            if not target.is_floating_point():
                target = target.long()
                if target.dim() == scores.dim():
                    target = target.squeeze(-1)
            # Classes are second as in torch; language models have them last.
            second = scores.shape[2:] == target.shape[1:] and not self.shift
            if target.dim() > 1 and not target.is_floating_point() and not second:
                scores = scores.movedim(-1, 1)
        else:
            target = target.to(scores.dtype)
            if target.dim() != scores.dim():
                scores = scores.reshape(target.shape)
        ignore = getattr(self.loss, "ignore_index", None)
        if ignore is None or target.is_floating_point() or target.dim() == 1:
            each: Tensor = self.loss(scores, target)
            if each.dim() == 1:
                return each
            total = each.flatten(1).sum(1)
            return total / each[0].numel() if self.mean else total
        # Classes are kept in range, so that no record can raise an error while the job runs.
        counted = target != ignore
        classes = torch.where(counted, target, 0).clamp(0, scores.shape[1] - 1)
        total = (self.loss(scores, classes) * counted).flatten(1).sum(1)
        mean: Tensor = total / counted.flatten(1).sum(1).clamp(min=1)
        return mean if self.mean else total


class Custom(nn.Module):
    """A function of (outputs, *targets) that gives one loss for each record."""

    def __init__(self, function: Callable[..., Tensor]) -> None:
        super().__init__()
        if isinstance(function, nn.Module):
            self.inner = function
        self.function = function

    def forward(self, outputs: Any, *targets: Tensor) -> Tensor:
        return self.function(outputs, *targets)


def make(loss: object) -> nn.Module:
    """The per-record form of a name, of a ``torch.nn`` loss, or of a function."""
    if isinstance(loss, str):
        if loss == "next_token":
            return Named(nn.CrossEntropyLoss(), shift=True)
        if loss not in NAMES:
            raise ModelError(
                "model.loss",
                f"{loss[:60]!r} is no loss that casemate knows.",
                mend=f"Use one of {', '.join(sorted([*NAMES, 'next_token']))}, or a function.",
            )
        return Named(NAMES[loss]())
    if isinstance(loss, _ADMITTED):
        return Named(loss)
    if isinstance(loss, nn.Module) and hasattr(loss, "reduction"):
        instead = _INSTEAD.get(type(loss), "")
        raise ModelError(
            "model.loss",
            f"{type(loss).__name__} has no per-record form here.",
            mend=instead
            or "Pass a function of (outputs, target) that gives one loss for each record; most of"
            " torch.nn.functional do with reduction='none'.",
        )
    name = getattr(loss, "__name__", "")
    if name in NAMES and getattr(functional, name, None) is loss:
        return make(name)
    if callable(loss):
        return Custom(loss)
    raise ModelError(
        "model.loss",
        "No loss was given.",
        mend="Give loss='cross_entropy', or a function: lambda outputs: outputs, where the module"
        " gives each record's loss itself.",
    )


def targets(loss: nn.Module) -> list[str]:
    """What the loss takes beside the outputs: the names of its parameters without default."""
    if isinstance(loss, Named):
        return ["target"]
    given = loss.function if isinstance(loss, Custom) else loss
    function = given.forward if isinstance(given, nn.Module) else given
    try:
        parameters = list(inspect.signature(function).parameters.values())
    except (TypeError, ValueError):
        return ["target"]
    plain = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    return [p.name for p in parameters[1:] if p.kind in plain and p.default is p.empty]
