"""Optimizers and schedules on the noised mean gradient (P11), as torch.optim defines them, and the
average of the weights.

State is one flat float32 vector each, and an update may be made part by part. Formulas:
torch.optim.SGD, Adam, AdamW (PyTorch 2.13), Kingma and Ba 2015, Loshchilov and Hutter 2019; the
tests compare with torch.optim itself.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch

from casemate.spec.job import Adam, Schedule, Sgd


@dataclass(frozen=True, slots=True)
class Update:
    """One step in place on the weights (n,), float32, from entry ``first`` of the whole on.

    state: by name, float32 (d,), all that a step leaves to the next beside the weights.
    """

    apply: Callable[[torch.Tensor, torch.Tensor, int, int], None]
    state: Mapping[str, torch.Tensor]

    def __call__(
        self, weights: torch.Tensor, gradient: torch.Tensor, step: int, first: int = 0
    ) -> None:
        self.apply(weights, gradient, step, first)


def factor(schedule: Schedule, step: int, steps: int) -> float:
    """The factor on the learning rate at ``step`` (from 0) of ``steps``."""
    if step < schedule.warmup:
        return (step + 1) / schedule.warmup
    done = step - schedule.warmup
    part = done / max(1, steps - schedule.warmup)
    return {
        "constant": lambda: 1.0,
        "linear": lambda: 1.0 + (schedule.final - 1.0) * part,
        "cosine": lambda: (
            schedule.final + (1.0 - schedule.final) * (1.0 + math.cos(math.pi * part)) / 2.0
        ),
        "step": lambda: schedule.gamma ** (done // max(1, schedule.every)),
    }[schedule.kind]()


def sgd(spec: Sgd, rate: Callable[[int], float], dimension: int) -> Update:
    whole = torch.zeros(dimension if spec.momentum else 0)

    def update(weights: torch.Tensor, gradient: torch.Tensor, step: int, first: int) -> None:
        if spec.weight_decay:
            gradient = gradient.add(weights, alpha=spec.weight_decay)
        if spec.momentum:
            velocity = whole[first : first + len(weights)]
            velocity.mul_(spec.momentum).add_(gradient)
            gradient = gradient.add(velocity, alpha=spec.momentum) if spec.nesterov else velocity
        weights.add_(gradient, alpha=-rate(step))

    return Update(update, {"velocity": whole} if spec.momentum else {})


def adam(spec: Adam, rate: Callable[[int], float], dimension: int) -> Update:
    moments = torch.zeros(2, dimension)

    def update(weights: torch.Tensor, gradient: torch.Tensor, step: int, first: int) -> None:
        lr = rate(step)
        mean, square = moments[:, first : first + len(weights)]
        if spec.weight_decay and spec.decoupled:
            weights.mul_(1.0 - lr * spec.weight_decay)
        elif spec.weight_decay:
            gradient = gradient.add(weights, alpha=spec.weight_decay)
        mean.lerp_(gradient, 1.0 - spec.beta1)
        square.mul_(spec.beta2).addcmul_(gradient, gradient, value=1.0 - spec.beta2)
        correction1 = 1.0 - spec.beta1 ** (step + 1)
        correction2 = 1.0 - spec.beta2 ** (step + 1)
        denominator = (square.sqrt() / math.sqrt(correction2)).add_(spec.eps)
        weights.addcdiv_(mean, denominator, value=-lr / correction1)

    return Update(update, {"mean": moments[0], "square": moments[1]})


def optimizer(spec: Sgd | Adam, schedule: Schedule, steps: int, dimension: int) -> Update:
    """The update with this optimizer's state."""

    def rate(step: int) -> float:
        return spec.lr * factor(schedule, step, steps)

    return adam(spec, rate, dimension) if isinstance(spec, Adam) else sgd(spec, rate, dimension)


class Average:
    """The exponential moving average of weights, with its bias taken out.

    After t weights w_1 ... w_t it is a_t = (1 - b) / (1 - b^t) sum_s b^(t-s) w_s with decay b: the
    average of De et al. 2022 (arXiv:2204.13650) with the divisor 1 - b^t of Kingma and Ba 2015,
    section 3. In steps, a_t = a_(t-1) + p_t (w_t - a_(t-1)) with p_t = (1 - b) / (1 - b^t), so that
    a_1 is w_1 and the initial weights have no part in it. Float64 (d,): in float32 a change below
    2^-25 |a|, which (1 - b)(w - a) soon is, would be lost.
    """

    def __init__(self, decay: float, dimension: int) -> None:
        self.decay, self.count = decay, 0
        self.value = torch.zeros(dimension, dtype=torch.float64)

    def add(self, weights: torch.Tensor) -> None:
        """Take weights (d,), float32, in."""
        self.count += 1
        part = 1.0
        if self.count > 1:
            part = (1.0 - self.decay) / -math.expm1(self.count * math.log(self.decay))
        self.value.mul_(1.0 - part).add_(weights, alpha=part)
