"""A module to a graph of what it returns: for prediction."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn

from casemate.engine.capture.metrics import frozen
from casemate.engine.capture.trace import Specs, exported, parameters, refuse_modules
from casemate.graph import check
from casemate.graph.model import Packed
from casemate.graph.pack import pack, unpack
from casemate.spec.errors import ModelError


class _Returned(nn.Module):
    """The module as a function of tensors to a tuple of tensors, whose names ``note`` is told."""

    def __init__(
        self, module: nn.Module, inputs: list[str], note: Callable[[list[str]], None]
    ) -> None:
        super().__init__()
        self.module, self.inputs, self.note = module, inputs, note
        required, optional, any_keyword = parameters(module)
        self.by_name = any_keyword or set(inputs) <= {*required, *optional}
        self.fixed = {"use_cache": False} if "use_cache" in optional else {}

    def forward(self, *tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
        if self.by_name:
            given = dict(zip(self.inputs, tensors, strict=True))
            found = named(self.module(**given, **self.fixed))
        else:
            found = named(self.module(*tensors))
        self.note(list(found))
        return tuple(found.values())


def named(returned: Any) -> dict[str, torch.Tensor]:
    """What a module returned by name: ``output``; ``output_0`` and so on of several; a mapping's
    own names. What is no tensor is left out. Raises ``ModelError``."""
    if isinstance(returned, torch.Tensor):
        return {"output": returned}
    if isinstance(returned, Mapping):
        found = {str(k): v for k, v in returned.items() if isinstance(v, torch.Tensor)}
    elif isinstance(returned, list | tuple):
        each = enumerate(returned)
        found = {f"output_{i}": v for i, v in each if isinstance(v, torch.Tensor)}
    else:
        found = {}
    if not found or not all(n.isidentifier() and n.isascii() for n in found):
        raise ModelError(
            "model.outputs",
            f"The module returns {type(returned).__name__}, in which no tensors with names are.",
            mend="Return a tensor, a tuple of tensors, or a dict of them by identifiers.",
        )
    return found


def capture_outputs(
    module: nn.Module, specs: Specs, bounds: Mapping[str, tuple[int, int]] | None = None
) -> Packed:
    """The checked and packed model of what ``module`` returns, in evaluation mode and as it is now.

    specs: dtype and per-record shape of each input, by the names of ``forward``'s parameters or in
    their order. bounds: inclusive bounds of integer inputs; who calls with others is refused.
    Raises ``ModelError`` naming the node and the mend.
    """
    bounds = bounds or {}
    if unknown := sorted(set(bounds) - {n for n, (d, _) in specs.items() if d != "f32"}):
        raise ModelError(
            "model.inputs",
            f"Bounds are given for {unknown[0][:80]!r}, which is no integer input.",
            mend="Give bounds of integer inputs by their names.",
            where=unknown[0][:80],
        )
    with frozen(module):  # also puts it in evaluation mode
        refuse_modules(module)
        names: list[str] = []

        def note(found: list[str]) -> None:
            names[:] = found

        wrapper = _Returned(module, list(specs), note)
        graph, weights = exported(wrapper, module, specs, outputs=lambda: names)
    inputs = tuple(
        dataclasses.replace(s, low=bounds[s.name][0], high=bounds[s.name][1])
        if s.name in bounds
        else s
        for s in graph.inputs
    )
    packed = pack(dataclasses.replace(graph, inputs=inputs), weights)
    made, view = unpack(packed.data)
    known = check.known_bounds(made, view, (), ())
    check.check(made, {n: info for n, (info, _) in view.items()}, bounds=known)
    return packed
