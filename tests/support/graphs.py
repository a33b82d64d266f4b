"""Graphs for tests: an interpreter that knows nothing of casemate's engine, and short ways."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn

from casemate.client.torch import export
from casemate.graph import check, pack
from casemate.graph.model import DtypeArg, Graph, ListArg, Ref, Size

DTYPES = {
    "f32": torch.float32, "i64": torch.int64, "i32": torch.int32, "u8": torch.uint8,
    "bool": torch.bool,
}  # fmt: skip


def reader(values: Mapping[str, Any], batch: int) -> Callable[[Any], Any]:
    """What an argument of a node is, with the values so far, at a batch size."""

    def read(arg: Any) -> Any:
        if isinstance(arg, Ref):
            return values[arg.name]
        if isinstance(arg, Size):
            return arg.a * batch + arg.c
        if isinstance(arg, DtypeArg):
            return DTYPES[arg.dtype]
        if isinstance(arg, ListArg):
            return [read(x) for x in arg.items]
        return float(arg) if arg in ("inf", "-inf") else arg

    return read


def interpret(
    graph: Graph, weights: Mapping[str, torch.Tensor], data: Mapping[str, torch.Tensor]
) -> dict[str, torch.Tensor]:
    """Every value of the graph at this batch, op by op, straight from the names in the graph."""
    values: dict[str, Any] = {
        i.name: data[i.name] if i.kind == "data" else weights[i.tensor] for i in graph.inputs
    }
    read = reader(values, next(iter(data.values())).shape[0])
    for node in graph.nodes:
        space, name, overload = node.op.split(".")
        op = getattr(getattr(getattr(torch.ops, space), name), overload)
        made = op(*(read(a) for a in node.args), **{k: read(a) for k, a in node.kwargs.items()})
        if isinstance(made, torch.Tensor):
            values[node.name] = made
        else:
            values.update({f"{node.name}.{i}": x for i, x in enumerate(made)})
    return values


def tensors(packed: Any) -> tuple[Graph, dict[str, torch.Tensor], dict[str, Any]]:
    """The graph, its weights as tensors, and what the file says of them."""
    graph, weights = pack.unpack(packed.data)
    made = {
        name: torch.frombuffer(bytearray(view), dtype=DTYPES[info.dtype]).reshape(info.shape)
        if len(view)
        else torch.zeros(info.shape, dtype=DTYPES[info.dtype])
        for name, (info, view) in weights.items()
    }
    return graph, made, {name: info for name, (info, _) in weights.items()}


def exported(module: nn.Module, data: Mapping[str, torch.Tensor], **how: Any) -> Any:
    """The packed model, without dropout unless it is asked for."""
    return export(module, data, **{"dropout": False, **how})[0]


def checked(module: nn.Module, data: Mapping[str, torch.Tensor], **how: Any) -> check.Checked:
    graph, _, infos = tensors(exported(module, data, **how))
    return check.check(graph, infos)
