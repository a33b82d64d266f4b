"""Channels last: the same numbers, laid by the weights, and taken only where right and quicker."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional as F  # noqa: N812

from casemate.engine import layout
from support import models
from support.batched_lab import Data, Lab, clipped, gradients, lab, relative


class Images(nn.Module):
    """Plain, strided, grouped, depthwise and transposed; norms, pooling, a residual and a view."""

    def __init__(self, tied: bool = False) -> None:
        super().__init__()
        self.first, self.norm = nn.Conv2d(3, 8, 3, padding=1), nn.GroupNorm(4, 8)
        self.second = nn.Conv2d(8, 8, 3, padding=1, groups=2, bias=False)
        self.each = nn.Conv2d(8, 8, 3, padding=1, groups=8)
        self.up, self.last = nn.ConvTranspose2d(8, 6, 2, stride=2), nn.Conv2d(6, 6, 3, stride=3)
        self.instance, self.out = nn.InstanceNorm2d(6, affine=True), nn.Linear(6 * 4, 3)
        self.tied = tied

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = F.relu(self.norm(self.first(x)))
        x = F.max_pool2d(x + self.second(x), 2)
        x = F.silu(self.each(x))
        x = self.last(self.instance(self.up(x)))
        y: torch.Tensor = self.out(x.flatten(1))
        return y + self.first.weight.sum() if self.tied else y


def images(n: int) -> Data:
    return {"x": torch.randn(n, 3, 7, 8), "target": torch.randint(3, (n,))}


def last_of(at: Lab) -> list[torch.Tensor]:
    """Operands of contractions that lie with channels last and not in order as well."""
    found = (t for t in at.env().values() if t.dim() == 4 and not t.is_contiguous())
    return [t for t in found if t.is_contiguous(memory_format=torch.channels_last)]


@pytest.mark.parametrize("per_unit", [1, 2])
def test_gradients_are_those_of_a_float64_loop(per_unit: int) -> None:
    torch.manual_seed(0)
    module = Images()
    at = lab(module, images, per_unit=per_unit, last=True)
    assert len(last_of(at)) >= 6
    each = gradients(module, at.program, at.data, "cross_entropy")
    bound = float(each.norm(dim=1).median())
    want, _ = clipped(each, bound, per_unit)
    got, _ = at.parts(bound)
    assert relative(got, want) < 1e-5


def test_a_depthwise_weight_is_laid_though_it_lies_either_way() -> None:
    weight = torch.randn(16, 1, 3, 3)
    made = layout.laid(weight)
    assert weight.is_contiguous(memory_format=torch.channels_last)
    assert made is not None
    assert made.stride() == (9, 1, 3, 1)
    assert layout.laid(made) is None


def test_weights_are_followed_and_nothing_else_is_laid() -> None:
    torch.manual_seed(1)
    at = lab(Images(), images, last=True)
    with torch.no_grad():
        at.program.flat.mul_(1.5)
    at.path.runner.refresh()
    got, _ = at.parts(1.0)
    runner = at.path.runner
    every = ((n, t) for n, t in runner.fixed.items() if t.dim() == 4)
    laid = {n for n, t in every if t.stride() != torch.empty(t.shape).stride()}
    assert laid == set(runner._laid) and laid <= set(layout.weights(at.path.proved))
    assert len(laid) == 5
    at.path.settle(at.data, False)
    assert not last_of(at) and not runner._laid
    want, _ = at.parts(1.0)
    assert relative(got, want) < 1e-5


def test_a_weight_that_is_read_otherwise_stays_in_order() -> None:
    torch.manual_seed(2)
    plain, tied = (lab(Images(t), images, settle=False).path.proved for t in (False, True))
    assert len(set(layout.weights(plain)) - set(layout.weights(tied))) == 1


def test_a_prefix_that_is_kept() -> None:
    torch.manual_seed(3)
    module = nn.Sequential(
        nn.Conv2d(3, 8, 3).requires_grad_(False), nn.ReLU(), nn.Conv2d(8, 6, 3), nn.Flatten(),
        nn.Linear(6 * 12, 3),
    )  # fmt: skip

    def data(n: int) -> Data:
        return {"input": torch.randn(n, 3, 7, 8), "target": torch.randint(3, (n,))}

    at = lab(module, data, keep=True, last=True)
    want = clipped(gradients(module, at.program, at.data, "cross_entropy"), 1.0)[0]
    assert relative(at.parts(1.0)[0], want) < 1e-5
    frontier = {f"d{i}": at.data[s.name] for i, s in enumerate(at.program.data)}
    assert layout.quicker(at.path, frontier) in (True, False)


@pytest.mark.parametrize("last", [False, pytest.param(True, marks=pytest.mark.full)])
def test_what_is_quicker_is_taken(monkeypatch: pytest.MonkeyPatch, last: bool) -> None:
    calls: list[bool] = []

    def less(ways: object) -> bool:
        calls.append(last)
        return last

    monkeypatch.setattr(layout, "_less", less)
    at = lab(Images(), images)
    assert bool(last_of(at)) == at.path.runner.last == last
    assert len(calls) == 1


def test_without_images_nothing_is_tried(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(layout, "_less", lambda ways: pytest.fail("tried"))
    at = lab(
        nn.Sequential(nn.Linear(6, 3)),
        lambda n: {"input": torch.randn(n, 6), "target": torch.randint(3, (n,))},
    )
    assert not at.path.runner.last


class Turned(nn.Module):
    """The output gradient of the norm is in order, its input is not."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm = nn.Conv2d(3, 8, 3), nn.GroupNorm(4, 8)
        self.out = nn.Linear(8 * 30, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = self.out(self.norm(self.first(x)).flatten(1))
        return y


def test_norms_read_their_operands_in_one_order(monkeypatch: pytest.MonkeyPatch) -> None:
    """Seeded bug: torch's own is wrong there, and that is seen before it is taken."""
    torch.manual_seed(4)
    module = Turned()
    at = lab(module, images, last=True)
    want = clipped(gradients(module, at.program, at.data, "cross_entropy"), 1.0)[0]
    assert relative(at.parts(1.0)[0], want) < 1e-5
    few = {k: v for k, v in layout.INSTEAD.items() if "norm" not in k}
    monkeypatch.setattr(layout, "INSTEAD", few)
    monkeypatch.setattr(layout, "_less", lambda ways: True)
    at.path.settle(at.data, True)
    assert relative(at.parts(1.0)[0], want) > 1e-2
    at.path.settle(at.data)
    assert not at.path.runner.last
    assert relative(at.parts(1.0)[0], want) < 1e-5


def test_slow_operations_are_not_worth_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where channels last would have an operation run one record a call, they are not taken."""
    from casemate.engine import probe

    same = probe.same_in_every_slot

    def not_last(runner, node, env, call):  # type: ignore[no-untyped-def]
        return not (runner.last and "convolution" in node.op) and same(runner, node, env, call)

    monkeypatch.setattr(probe, "same_in_every_slot", not_last)
    monkeypatch.setattr(layout, "_less", lambda ways: True)
    at = lab(Turned(), images)
    assert not at.path.runner.last and not any("convolution" in op for op in at.slow)


def test_a_frozen_batch_norm_saves_nothing_and_is_compared_all_the_same(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Its backward reads statistics that are empty."""
    torch.manual_seed(0)
    module = models.frozen_batchnorm()
    monkeypatch.setattr(layout, "_less", lambda *given: True)

    def rows(n: int) -> Data:
        return {"input": torch.randn(n, 3, 8, 8), "target": torch.randint(5, (n,))}

    at = lab(module, rows)
    assert at.path.runner.last
    each = gradients(module, at.program, at.data, "cross_entropy")
    bound = float(each.norm(dim=1).median())
    assert relative(at.parts(bound)[0], clipped(each, bound, 1)[0]) < 1e-5
