"""An ONNX file as a module, on the machine of who has it: the enclave reads casemate's form alone.

Each operation has a rule in PyTorch (:mod:`casemate.client.torch.onnx_rules`); the module is then
exported, proved and admitted like any other. One without a rule is refused by its name.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Final

import torch
from torch import nn

from casemate.client.torch.onnx_rules import DTYPES, RULES, Call, Value, refuse
from casemate.engine.capture.trace import Specs
from casemate.spec.errors import UsageError

OPSETS: Final = range(13, 25)


class Imported(nn.Module):
    """The graph of an ONNX file, node by node; outputs by their names."""

    def __init__(self, proto: Any, onnx: Any) -> None:
        super().__init__()
        self._values: dict[str, Value] = {}
        self._buffers_of: dict[str, str] = {}
        graph = proto.graph
        for made in graph.initializer:
            self._keep(made.name, onnx.numpy_helper.to_array(made))
        self._nodes = []
        for i, node in enumerate(graph.node):
            name = node.name or f"{node.op_type}_{i}"
            if node.domain not in ("", "ai.onnx") or node.op_type not in RULES:
                refuse(
                    f"The ONNX operation {node.op_type!r} (node {name!r}) has no rule.",
                    "Export the model with other operations, or deploy the PyTorch module;"
                    " docs/inference.md lists the operations.",
                    name,
                )
            attributes = {a.name: self._attribute(a, onnx) for a in node.attribute}
            self._nodes.append(
                (node.op_type, name, list(node.input), list(node.output), attributes)
            )
        self._inputs = [i.name for i in graph.input if i.name not in self._values]
        self._outputs = [o.name for o in graph.output]

    def _keep(self, name: str, array: Any) -> None:
        self._values[name] = self._constant(array)
        if isinstance(self._values[name], torch.Tensor):
            self._buffers_of[name] = f"tensor_{len(self._buffers_of)}"
            self.register_buffer(self._buffers_of[name], self._values.pop(name))
            self._values[name] = None

    @staticmethod
    def _constant(array: Any) -> Value:
        """Integers of at most one axis may be sizes: numbers, as single floats are. All else is a
        tensor."""
        sizes = array.dtype.kind == "i" and array.ndim <= 1 and array.dtype.itemsize == 8
        if sizes or (array.dtype.kind == "f" and array.ndim == 0):
            found: Value = array.tolist()
            return found
        if array.dtype.kind == "f" and array.dtype.itemsize != 4:
            array = array.astype("float32")
        return torch.from_numpy(array.copy())

    def _attribute(self, attribute: Any, onnx: Any) -> Any:
        found = onnx.helper.get_attribute_value(attribute)
        if isinstance(found, onnx.TensorProto):
            return self._constant(onnx.numpy_helper.to_array(found))
        return found

    def forward(self, *given: torch.Tensor) -> dict[str, torch.Tensor]:
        values = dict(self._values)
        values |= {name: getattr(self, buffer) for name, buffer in self._buffers_of.items()}
        values |= dict(zip(self._inputs, given, strict=True))
        for op, name, inputs, outputs, attributes in self._nodes:
            call = Call(
                op, name, [values[i] if i else None for i in inputs], attributes, len(outputs)
            )
            made = RULES[op](call)
            several = made if isinstance(made, tuple) else (made,)
            values.update(zip(outputs, several, strict=False))
        return {_name(o): values[o] for o in self._outputs}


def _name(name: str) -> str:
    """An identifier for a name of ONNX's."""
    text = "".join(c if c.isascii() and c.isalnum() else "_" for c in name)[:120]
    return text if text.isidentifier() else f"n_{text}"


def load(path: str | Path) -> tuple[nn.Module, Specs]:
    """The module of an ONNX file, and its inputs' dtypes and shapes of one record: axis 0 of each
    is the batch. Raises ``UsageError`` (a file that cannot be read, the extra), ``ModelError``."""
    try:
        import onnx
    except ImportError:
        raise UsageError(
            "usage.extra",
            "Reading ONNX needs the package onnx, which is not installed.",
            mend="Run pip install 'casemate[onnx]'.",
        ) from None
    try:
        proto = onnx.load(str(path))
        onnx.checker.check_model(proto)
    except Exception as e:  # protobuf's and onnx's own, and those of files
        raise UsageError(
            "usage.file",
            f"The ONNX file {path} cannot be read: {' '.join(str(e).split())[:200]}.",
            mend="Export it again; onnx.checker.check_model says what is wrong.",
            where=str(path),
        ) from None
    opsets = {o.domain: o.version for o in proto.opset_import}
    if opsets.get("", opsets.get("ai.onnx")) not in OPSETS:
        refuse(
            f"The file is of ONNX opset {opsets.get('', 'unknown')}.",
            f"Export with opset {OPSETS.start} to {OPSETS.stop - 1}, or convert it with"
            " onnx.version_converter.",
        )
    module = Imported(proto, onnx)
    specs: Specs = {}
    for given in proto.graph.input:
        if given.name in module._inputs:
            specs[_name(given.name)] = _spec(given)
    return module.eval(), specs


def _spec(given: Any) -> tuple[str, tuple[int, ...]]:
    tensor = given.type.tensor_type
    dtype = DTYPES.get(tensor.elem_type)
    sizes = [d.dim_value if d.HasField("dim_value") else None for d in tensor.shape.dim]
    if dtype is None or not sizes or any(d is None or d < 1 for d in sizes[1:]):
        refuse(
            f"Input {given.name!r} is not float32, int64, int32, uint8 or bool with a batch on"
            " axis 0 and fixed sizes behind it.",
            "Export it with the batch as the only dynamic axis.",
            given.name,
        )
    return dtype, tuple(int(d) for d in sizes[1:] if d is not None)
