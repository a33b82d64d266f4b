"""The steps that ours is compared with, each built with the weights and batch of its workload.

A private peer clips each record's gradient to norm C, sums, adds Gaussian noise, divides by the
batch and lets SGD step. Where a peer cannot do a workload it raises, and the report says so.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from importlib import import_module
from typing import Any, Final

import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap
from torch.nn import functional as F  # noqa: N812

from benchmarks.engine import joint, ours
from benchmarks.engine.workloads import CLIP, LEARNING_RATE, NOISE_MULTIPLIER, Workload, losses

Step = Callable[[], object]


def _any(workload: Workload) -> bool:
    return True


def _never(workload: Workload) -> bool:
    return False


class Absent(Exception):
    """What is measured is not installed, or not there yet."""


@dataclass(frozen=True)
class Peer:
    """``group``: ``ours``, ``eager``, ``n`` (may win N), ``opacus`` or ``other``.

    ``fits`` says for which workloads it makes sense, ``quick`` for which a quick run has it too.
    ``compiles``: built before anything is measured, with other workloads at the same time.
    """

    id: str
    group: str
    build: Callable[[Workload], Step]
    fits: Callable[[Workload], bool] = _any
    quick: Callable[[Workload], bool] = _any
    compiles: bool = False


def _trained(module: nn.Module) -> list[nn.Parameter]:
    return [p for p in module.parameters() if p.requires_grad]


def _sgd(module: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(_trained(module), lr=LEARNING_RATE)


def _started(workload: Workload, channels_last: bool) -> tuple[nn.Module, Any, Tensor]:
    module, (inputs, target) = workload.make(), workload.data()
    if channels_last:
        module = module.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        inputs = tuple(x.to(memory_format=torch.channels_last) for x in inputs)
    return module, inputs, target


def eager(workload: Workload, *, channels_last: bool = False) -> Step:
    """Forward, mean loss, backward, ``optimizer.step``, ``zero_grad``."""
    module, inputs, target = _started(workload, channels_last)
    optimizer = _sgd(module)

    def step() -> None:
        torch.autograd.backward(losses(module, inputs, target).mean())
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step


def torch_compile(workload: Workload, *, channels_last: bool = False) -> Step:
    """As ``eager``, forward and loss through ``torch.compile``."""
    module, inputs, target = _started(workload, channels_last)
    optimizer = _sgd(module)
    loss = torch.compile(lambda *args: losses(module, args[:-1], args[-1]).mean())

    def step() -> None:
        torch.autograd.backward(loss(*inputs, target))
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    step()
    return step


def _positions_frozen(module: nn.Module) -> None:
    """Opacus and fastDP take no position ids that all records share; this favours them."""
    for name, parameter in module.named_parameters():
        if "position_embeddings" in name:
            parameter.requires_grad_(False)


def opacus(workload: Workload, mode: str) -> Step:
    """Opacus 1.6 in one of its modes, with its own optimizer."""
    optimizers = import_module("opacus.optimizers")
    module, (inputs, target) = workload.make(), workload.data()
    if workload.text:
        _positions_frozen(module)
    more: dict[str, Any] = {} if mode == "ew" else {"strict": False}
    if mode == "ghost":
        more["max_grad_norm"] = CLIP
    wrapped = import_module("opacus.grad_sample").wrap_model(
        module, mode, loss_reduction="mean", **more
    )
    kind = "DPOptimizerFastGradientClipping" if mode == "ghost" else "DPOptimizer"
    optimizer = getattr(optimizers, kind)(
        _sgd(module), noise_multiplier=NOISE_MULTIPLIER, max_grad_norm=CLIP,
        expected_batch_size=workload.batch, loss_reduction="mean",
    )  # fmt: skip
    criterion: Any = nn.CrossEntropyLoss()
    if mode == "ghost":
        utils = import_module("opacus.utils.fast_gradient_clipping_utils")
        criterion = utils.DPLossFastGradientClipping(wrapped, optimizer, criterion, "mean")

    def step() -> None:
        criterion(wrapped(*inputs), target).backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step


def vmap_grad(workload: Workload) -> Step:
    """Every record's gradient by ``vmap(grad)`` (Goodfellow's problem, torch.func's answer)."""
    module, (inputs, target) = workload.make(), workload.data()
    parameters = {n: p.detach() for n, p in module.named_parameters() if p.requires_grad}
    fixed = {n: p.detach() for n, p in module.named_parameters() if not p.requires_grad}
    fixed |= dict(module.named_buffers())

    def loss(held: dict[str, Tensor], one: tuple[Tensor, ...], label: Tensor) -> Tensor:
        batch = tuple(x.unsqueeze(0) for x in one)
        logits = functional_call(module, {**fixed, **held}, batch)
        return F.cross_entropy(logits, label.unsqueeze(0))

    each = vmap(grad(loss), in_dims=(None, 0, 0), randomness="different")

    @torch.no_grad()
    def step() -> None:
        found = each(parameters, inputs, target)
        norms = torch.stack([g.flatten(1).norm(dim=1) for g in found.values()]).norm(dim=0)
        scale = (CLIP / (norms + 1e-6)).clamp(max=1.0)
        for name, parameter in parameters.items():
            total = torch.tensordot(scale, found[name], dims=1)
            total.add_(torch.normal(0.0, NOISE_MULTIPLIER * CLIP, total.shape))
            parameter.add_(total, alpha=-LEARNING_RATE / workload.batch)

    return step


def fast_dp(workload: Workload) -> Step:
    """fastDP's book-keeping (Bu et al. 2023); no package registry has it."""
    try:
        engine = import_module("fastDP").PrivacyEngine
    except ImportError as e:
        raise Absent("fastDP is not installed") from e
    module, (inputs, target) = workload.make(), workload.data()
    if workload.text:
        _positions_frozen(module)
    optimizer = _sgd(module)
    engine(
        module, batch_size=workload.batch, sample_size=100 * workload.batch, epochs=1,
        noise_multiplier=NOISE_MULTIPLIER, max_grad_norm=CLIP, clipping_fn="Abadi",
        clipping_mode="MixOpt", clipping_style="all-layer",
    ).attach(optimizer)  # fmt: skip

    def step() -> None:
        torch.autograd.backward(losses(module, inputs, target).mean())
        optimizer.step()
        optimizer.zero_grad()

    return step


def _convolutional(workload: Workload) -> bool:
    return workload.convolutional


# Where full runs never had it among the fastest, a quick run saves its compilation.
_QUICK: Final = {
    "torch.compile": (), "torch.compile channels_last": (),
    "inductor": ("logreg", "mlp", "minilm", "distilbert", "distilbert_lora", "distilbert_last"),
    "inductor channels_last": ("efficientnet_b0",),
}  # fmt: skip


def _candidates() -> list[Peer]:
    """Everything that may win N, contiguous and, for convolutions, channels last."""

    def peer(name: str, last: bool, build: Callable[[Workload], Step], compiles: bool) -> Peer:
        name += " channels_last" if last else ""
        return Peer(
            name, "n", build, _convolutional if last else _any,
            lambda w: w.id in _QUICK.get(name, (w.id,)), compiles,
        )  # fmt: skip

    made = [peer("eager", True, partial(eager, channels_last=True), False)]
    for last in (False, True):
        made += [
            peer("torch.compile", last, partial(torch_compile, channels_last=last), True),
            peer("graph", last,
                 partial(joint.step, channels_last=last, compile_graph=False), True),
            peer("inductor", last, partial(joint.step, channels_last=last), True),
        ]  # fmt: skip
    return made


ALL: Final = (
    Peer("casemate", "ours", ours.casemate_step, compiles=True),
    Peer("eager", "eager", eager),
    *_candidates(),
    *(Peer(f"opacus {m}", "opacus", partial(opacus, mode=m))
      for m in ("ghost", "functorch", "hooks", "ew")),
    Peer("fastDP", "other", fast_dp, quick=_never),
    Peer("vmap(grad)", "other", vmap_grad, quick=_never),
)  # fmt: skip
