"""torch's optimizers and learning-rate schedulers as what a job can say."""

from __future__ import annotations

from typing import Any, Final

import torch
from torch.optim import lr_scheduler

from casemate.spec.errors import UsageError
from casemate.spec.job import Adam, Schedule, Sgd

# Options that only choose an implementation.
_HARMLESS: Final = {"foreach", "fused", "capturable", "differentiable", "decoupled_weight_decay"}


def _refuse(message: str, mend: str) -> UsageError:
    return UsageError("usage.optimizer", message, mend=mend)


def optimizer(given: torch.optim.Optimizer) -> Sgd | Adam:
    """``torch.optim.SGD``, ``Adam`` or ``AdamW`` as a job's optimizer.

    Raises ``UsageError`` ``usage.optimizer`` naming the option that has no counterpart.
    """
    kind = type(given)
    if kind not in (torch.optim.SGD, torch.optim.Adam, torch.optim.AdamW):
        raise _refuse(f"{kind.__name__} is not admitted.", "Use SGD, Adam or AdamW.")
    if len(given.param_groups) != 1:
        raise _refuse(
            f"The optimizer has {len(given.param_groups)} groups of parameters.",
            "Use one group; freeze what is not to be trained by requires_grad_(False).",
        )
    group = {k: v for k, v in given.param_groups[0].items() if k != "params"}
    lr = float(group.pop("lr"))
    lr = float(group.pop("initial_lr", lr))  # a scheduler has begun to change lr
    decay = float(group.pop("weight_decay"))
    made: Sgd | Adam
    if kind is torch.optim.SGD:
        made = Sgd(
            lr=lr,
            momentum=float(group.pop("momentum")),
            nesterov=bool(group.pop("nesterov")),
            weight_decay=decay,
        )
    else:
        beta1, beta2 = group.pop("betas")
        decoupled = kind is torch.optim.AdamW or bool(group.get("decoupled_weight_decay"))
        made = Adam(
            lr=lr,
            beta1=float(beta1),
            beta2=float(beta2),
            eps=float(group.pop("eps")),
            weight_decay=decay,
            decoupled=decoupled,
        )
    for name, value in group.items():
        if value and name not in _HARMLESS:
            raise _refuse(f"{kind.__name__} with {name}={value} is not admitted.", "Leave it out.")
    return made


def schedule(given: Any, steps: int) -> Schedule:
    """A scheduler of ``torch.optim.lr_scheduler``, stepped after every step of ``steps``.

    ConstantLR with factor 1, StepLR, ExponentialLR, LinearLR down from 1, CosineAnnealingLR over
    all steps, and SequentialLR of a LinearLR warm-up and one of these. Raises ``UsageError``
    ``usage.schedule`` for what has no exact counterpart.
    """
    warmup = 0
    if isinstance(given, lr_scheduler.SequentialLR):
        parts, marks = given._schedulers, given._milestones
        first = parts[0]
        warmup = int(marks[0])
        if (
            len(parts) != 2
            or not isinstance(first, lr_scheduler.LinearLR)
            or warmup < 2
            or (first.end_factor, first.total_iters) != (1.0, warmup - 1)
            or abs(first.start_factor * warmup - 1) > 1e-9
        ):
            raise _no_schedule(
                given, f"A warm-up is LinearLR(start_factor=1/{warmup}, total_iters={warmup - 1})."
            )
        given = parts[1]
    rest = steps - warmup
    (base,) = given.base_lrs
    if isinstance(given, lr_scheduler.StepLR):
        return Schedule(kind="step", warmup=warmup, gamma=given.gamma, every=given.step_size)
    if isinstance(given, lr_scheduler.ExponentialLR):
        return Schedule(kind="step", warmup=warmup, gamma=given.gamma, every=1)
    if isinstance(given, lr_scheduler.ConstantLR) and given.factor == 1:
        return Schedule(kind="constant", warmup=warmup)
    if isinstance(given, lr_scheduler.LinearLR):
        if given.start_factor != 1 or given.total_iters != rest:
            raise _no_schedule(given, f"Use start_factor=1.0 and total_iters={rest}.")
        return Schedule(kind="linear", warmup=warmup, final=given.end_factor)
    if isinstance(given, lr_scheduler.CosineAnnealingLR):
        if given.T_max != rest:
            raise _no_schedule(given, f"Use T_max={rest}, all steps after the warm-up.")
        return Schedule(kind="cosine", warmup=warmup, final=given.eta_min / base)
    raise _no_schedule(
        given, "Use StepLR, ExponentialLR, LinearLR, CosineAnnealingLR, or cm's own."
    )


def _no_schedule(given: Any, mend: str) -> UsageError:
    name = type(given).__name__
    return UsageError("usage.schedule", f"{name} as given has no exact counterpart.", mend=mend)
