"""Helpers on modules: weights back into a module, BatchNorm replaced."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from casemate.spec.errors import ModelError


def load_weights(module: nn.Module, tensors: Mapping[str, Any]) -> None:
    """Copy tensors (torch or numpy, by ``state_dict`` name) into ``module``, in place.

    Names that the module has and ``tensors`` has not stay as they are (frozen parameters). Raises
    ``ModelError`` ``model.weights`` for an unknown name or another shape, with nothing changed.
    """
    own: dict[str, torch.Tensor] = dict(module.named_parameters(remove_duplicate=False))
    own.update(module.named_buffers(remove_duplicate=False))
    given: dict[str, torch.Tensor] = {}
    for name, item in tensors.items():
        tensor = torch.as_tensor(item)
        if name not in own or own[name].shape != tensor.shape:
            raise ModelError(
                "model.weights",
                f"The module has no tensor {name[:120]!r} of shape {tuple(tensor.shape)}.",
                mend="Load the weights into the module that was exported.",
                where=name[:120],
            )
        given[name] = tensor
    with torch.no_grad():
        for name, tensor in given.items():
            own[name].copy_(tensor)


def groupnorm(module: nn.Module, groups: int = 32) -> nn.Module:
    """Replace every BatchNorm by a GroupNorm over at most ``groups`` groups, in place.

    GroupNorm looks at one record alone. Scale and shift are kept. Returns the module (a new one
    where ``module`` itself is a BatchNorm).
    """
    if isinstance(module, nn.modules.batchnorm._BatchNorm):
        channels = module.num_features
        made = nn.GroupNorm(math.gcd(groups, channels), channels, module.eps, module.affine)
        if module.affine:
            with torch.no_grad():
                made.weight.copy_(module.weight)
                made.bias.copy_(module.bias)
        return made
    for name, child in list(module.named_children()):
        setattr(module, name, groupnorm(child, groups))
    return module
