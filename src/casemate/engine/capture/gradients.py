"""Gradients that a module makes by itself: a graph says what is computed forward, and its gradient
is torch's own, so they would be lost without a word."""

from __future__ import annotations

from typing import Any, Final

import torch
from torch import nn
from torch.autograd.function import BackwardCFunction
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

from casemate.spec.errors import ModelError

_HOOKED: Final = "Take the hook off: the graph that is sent holds no hooks."

_REENTRANT: Final = "Call checkpoint with use_reentrant=False."
_DETACH: Final = (
    "Write its gradient with detach: straight through f is x + (f(x) - x).detach(), and reversed s"
    " times is (1 + s) * x.detach() - s * x."
)


def _refuse(what: str, where: str, mend: str) -> ModelError:
    return ModelError("model.export", what, mend=mend, where=where[:120])


def refuse_hooks(module: nn.Module) -> None:
    """Refuse hooks on the gradients of what is trained, by name."""
    if not any(p.requires_grad for p in module.parameters()):
        return
    for name, m in module.named_modules():
        if m._backward_hooks or m._backward_pre_hooks:
            raise _refuse(f"{name or 'The module'} has a backward hook.", name, _HOOKED)
    for name, p in module.named_parameters():
        if p._backward_hooks or getattr(p, "_post_accumulate_grad_hooks", None):
            raise _refuse(f"{name} has a hook on its gradient.", name, _HOOKED)


class Watch(TorchFunctionMode):
    """Refuses, while a module runs, hooks on tensors and inference mode."""

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        if func is torch.Tensor.register_hook:
            what = "The module sets a hook on a tensor's gradient."
            raise _refuse(what, "register_hook", _HOOKED)
        if torch.is_inference_mode_enabled() and any(
            isinstance(x, torch.Tensor) and x.requires_grad for x in tree_leaves((args, kwargs))
        ):
            what = "The module uses torch.inference_mode, which leaves no trace in a graph."
            raise _refuse(what, "inference_mode", "Use torch.no_grad(), or .detach().")
        return func(*args, **(kwargs or {}))


def refuse_functions(losses: torch.Tensor) -> None:
    """Refuse what a ``torch.autograd.Function`` with a backward of its own is behind, by name."""
    todo, seen = [losses.grad_fn], set()
    while todo:
        node = todo.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if isinstance(node, BackwardCFunction):
            name = type(node).__name__.removesuffix("Backward")
            what = f"The backward of {name} is its own, and would be lost."
            raise _refuse(what, name, _REENTRANT if name == "CheckpointFunction" else _DETACH)
        todo += [n for n, _ in node.next_functions]
