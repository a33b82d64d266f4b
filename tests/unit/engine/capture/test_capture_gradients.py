"""Gradients that no graph holds are refused by name; the mends that the refusals name work."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812
from torch.utils.checkpoint import checkpoint

from casemate.engine.program import Program
from casemate.spec.errors import ModelError
from support.batched_lab import exported, gradients


class Own(nn.Module):
    """Two layers with ``between`` them."""

    def __init__(self, between: Callable[[Any, Tensor], Tensor]) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(4, 5), nn.Linear(5, 3)
        self.between = between

    def forward(self, x: Tensor) -> Tensor:
        made: Tensor = self.second(self.between(self, self.first(x)))
        return made


class Reverse(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        return -2 * grads[0]


def hooked(m: Own, x: Tensor) -> Tensor:
    x.register_hook(lambda g: -g)
    return x


def unseen(m: Own, x: Tensor) -> Tensor:
    with torch.inference_mode():
        y = x.tanh()
    return y.clone()


def reentrant(m: Own, x: Tensor) -> Tensor:
    made: Tensor = checkpoint(lambda y: m.first(y[:, :4]).tanh(), x, use_reentrant=True)
    return made


def of_module() -> nn.Module:
    module = Own(lambda m, x: x)
    module.first.register_full_backward_hook(lambda m, given, made: None)
    return module


def of_parameter() -> nn.Module:
    module = Own(lambda m, x: x)
    module.first.weight.register_hook(lambda g: -g)
    return module


def rows(n: int) -> dict[str, Tensor]:
    return {"x": torch.randn(n, 4), "target": torch.randint(3, (n,))}


REFUSED: dict[str, tuple[Callable[[], nn.Module], str, str]] = {
    "a function": (lambda: Own(lambda m, x: Reverse.apply(x)), "Reverse", "detach"),
    "a checkpoint": (lambda: Own(reentrant), "CheckpointFunction", "use_reentrant=False"),
    "a hook within": (lambda: Own(hooked), "register_hook", "hook off"),
    "a hook on a module": (of_module, "first", "hook off"),
    "a hook on a parameter": (of_parameter, "first.weight", "hook off"),
    "inference mode": (lambda: Own(unseen), "inference_mode", "no_grad"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_gradients_of_its_own_are_refused_by_name(name: str) -> None:
    make, where, mend = REFUSED[name]
    module = make()
    with pytest.raises(ModelError) as e:
        exported(module, rows(3), "cross_entropy")
    assert (e.value.code, e.value.where) == ("model.export", where)
    assert mend in e.value.mend
    if name != "a hook within":  # which torch refuses where no gradient flows
        exported(module.requires_grad_(False), rows(3), Scaled())


class Scaled(nn.Module):
    """All that is trained lies above the module."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(()))

    def forward(self, outputs: Tensor, target: Tensor) -> Tensor:
        return F.cross_entropy(outputs * self.scale, target, reduction="none")


def reversed_(m: Own, x: Tensor) -> Tensor:
    return 3 * x.detach() - 2 * x


def straight(m: Own, x: Tensor) -> Tensor:
    return x + (x.sign() - x).detach()


def once_more(m: Own, x: Tensor) -> Tensor:
    made: Tensor = checkpoint(lambda y: y.tanh(), x, use_reentrant=False)
    return made


@pytest.mark.parametrize("between", [reversed_, straight, once_more])
def test_mends_have_the_gradient_that_was_meant(between: Any) -> None:
    module, data = Own(between), rows(2)
    program: Program = exported(module, rows(3), "cross_entropy")[0]
    want = gradients(module, program, data, "cross_entropy")
    if between is reversed_:
        own = Own(lambda m, x: Reverse.apply(x))
        own.load_state_dict(module.state_dict())
        assert torch.allclose(want, gradients(own, program, data, "cross_entropy"))
    found = torch.zeros(program.dimension)
    for i in range(2):
        one = {s.name: data[s.name][i : i + 1] for s in program.data}
        program.gradient(program.prefix(one), found)
        torch.testing.assert_close(found.double(), want[i], rtol=1e-5, atol=1e-6)
