"""Export: a module and a loss to a packed model, with the columns that feed it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeAlias

import torch
from torch import nn

from casemate.client import bind
from casemate.client.torch import onnx
from casemate.engine.capture import capture_outputs, frozen, metrics_head
from casemate.engine.capture import loss as losses
from casemate.engine.capture.trace import Specs, capture, module_of, parameters, specs_of
from casemate.graph.model import LABEL_NAMES, Graph, InputSpec, Packed
from casemate.spec.data import DatasetSchema
from casemate.spec.errors import ModelError, UsageError
from casemate.spec.job import InputBinding

Inputs: TypeAlias = "Mapping[str, str | Sequence[str]]"


def export(
    module: nn.Module,
    data: DatasetSchema | Mapping[str, torch.Tensor],
    *,
    loss: Any = None,
    inputs: Inputs | None = None,
    dropout: bool = True,
) -> tuple[Packed, tuple[InputBinding, ...]]:
    """Pack ``module`` with its per-record ``loss``; and say which columns feed which input.

    ``data``: a dataset's schema, or example tensors by name with the batch as axis 0 (only dtypes
    and shapes are used). An input named as one of ``forward``'s parameters is passed to it; the one
    named ``target``, ``label``, ``labels`` or ``y`` goes to the loss as its target.
    ``loss``: a name (:data:`casemate.engine.capture.loss.NAMES`, or ``next_token``), a ``torch.nn``
    loss, or a function of (outputs, target) that gives shape (B,).
    ``inputs``: input to column or columns, where names do not say it.

    ``dropout``: as in PyTorch, layers in training mode drop out, with draws that the server makes
    for each record; ``False`` leaves it out whatever the mode.

    Parameters with ``requires_grad`` are trained; others, and buffers, never change. Raises
    ``ModelError`` naming the node and the mend.
    """
    module = module_of(module)
    made = losses.make(loss)
    if not isinstance(data, DatasetSchema):
        specs = specs_of(data)
        bindings = tuple(InputBinding(input=n, columns=(n,)) for n in specs)
        return capture(module, made, specs, dropout=dropout), bindings
    specs, bindings = _inputs(module, made, data, inputs or {})
    return capture(module, made, specs, bindings, data, dropout), bindings


def export_metrics(
    module: nn.Module,
    schema: DatasetSchema,
    metrics: Mapping[str, tuple[object, float]],
    *,
    inputs: Inputs | None = None,
) -> tuple[Packed, tuple[InputBinding, ...]]:
    """Pack an evaluation of ``module`` (:mod:`casemate.engine.capture.metrics`), in evaluation mode
    and as it is now; and say which columns feed which input, as :func:`export` does.

    ``metrics``: by name, what :func:`casemate.engine.capture.metrics.make` takes, and the limit
    above 0 at which a row's value is cut. Raises ``ModelError``.
    """
    module, made = module_of(module), metrics_head(metrics)
    with frozen(module):
        specs, bindings = _inputs(module, made, schema, inputs or {})
        return capture(module, made, specs, bindings, schema, dropout=False), bindings


def export_outputs(
    module: nn.Module, example: Any, *, bounds: Mapping[str, tuple[int, int]] | None = None
) -> Packed:
    """Pack what ``module`` returns, in evaluation mode and as it is now.

    example: tensors or arrays with the batch as axis 0, by the names of ``forward``'s parameters,
    in their order (a tuple), or one alone; or in place of a tensor (dtype, shape of one record).
    Only dtypes and shapes are used. bounds: inclusive bounds of integer inputs, which indices made
    of them need. Raises ``UsageError``, ``ModelError``.
    """
    module = module_of(module)
    required, optional, _ = parameters(module)
    if isinstance(example, Mapping):
        given = dict(example)
    else:
        several = isinstance(example, tuple) and not _is_spec(example)
        parts = list(example) if several else [example]
        names = [*required, *optional] or [f"input_{i}" for i in range(len(parts))]
        given = dict(zip(names, parts, strict=False))
        if example is None or len(given) < len(parts):
            raise UsageError(
                "usage.inputs",
                f"The module's inputs are {', '.join(names)[:200]}; {len(parts)} examples are given"
                if example is not None
                else "No example of the module's inputs is given.",
                mend="Give example=, such as a tensor, or a dict of tensors by name.",
            )
    return capture_outputs(module, {n: _spec(n, x) for n, x in given.items()}, bounds)


def export_entry(
    module: nn.Module, schema: DatasetSchema, *, inputs: Inputs | None = None
) -> tuple[Packed, tuple[InputBinding, ...]]:
    """Pack what ``module`` returns, as :func:`export_outputs` does; and say which columns of a
    schema without labels feed which input. Raises ``ModelError``."""
    module = module_of(module)
    specs, bindings = _inputs(module, losses.Custom(lambda outputs: outputs), schema, inputs or {})
    declared = {c.name: c.wire_bounds or (0, 1) for c in schema.columns}
    bounds = {}
    for b in bindings:
        if specs[b.input][0] in ("u8", "i32", "i64"):
            lows, highs = zip(*(declared[c] for c in b.columns), strict=True)
            bounds[b.input] = int(min(lows)), int(max(highs))
    return capture_outputs(module, specs, bounds), bindings


def tensors(arrays: Mapping[str, Any]) -> dict[str, torch.Tensor]:
    """Tensors that share the memory of numpy arrays."""
    return {name: torch.from_numpy(array) for name, array in arrays.items()}


def export_onnx(path: str | Path, *, bounds: Mapping[str, tuple[int, int]] | None = None) -> Packed:
    """Pack an ONNX file for prediction (:mod:`casemate.client.torch.onnx`). Raises ``UsageError``,
    ``ModelError``."""
    module, specs = onnx.load(path)
    return capture_outputs(module, specs, bounds)


def _is_spec(given: Any) -> bool:
    return isinstance(given, tuple) and len(given) == 2 and isinstance(given[0], str)


def _spec(name: str, given: Any) -> tuple[str, tuple[int, ...]]:
    if _is_spec(given):
        return given[0], tuple(given[1])
    tensor = torch.as_tensor(given)
    if tensor.dtype == torch.float64 and not isinstance(given, torch.Tensor):
        tensor = tensor.float()  # Python's own numbers
    if not tensor.dim():
        raise UsageError(
            "usage.inputs",
            f"The example of {name!r} has no axis for records.",
            mend="Give a tensor whose axis 0 is the record.",
            where=name,
        )
    return specs_of({name: tensor})[name]


def _inputs(
    module: nn.Module,
    loss: nn.Module,
    data: DatasetSchema,
    given: Inputs,
) -> tuple[Specs, tuple[InputBinding, ...]]:
    """Each input's dtype and per-record shape, and the columns that feed it."""
    required, optional, any_keyword = parameters(module)
    columns = {c.name: c for c in data.columns}
    names = [n for n in required if n not in given]
    names += [n for n in optional if n in columns and n not in LABEL_NAMES]
    if any_keyword and not names and not given:
        names = [c.name for c in data.columns if c.role == "feature"]
    names += list(given)
    own = losses.targets(loss)
    fed = {*names, *own}
    for columns_ in given.values():
        fed.update([columns_] if isinstance(columns_, str) else columns_)
    labels = [c.name for c in data.columns if c.role == "label"]
    said = set(given) & set(LABEL_NAMES) - {*own, *required}
    named = set(own) <= {*names, *columns} and set(labels) <= fed and not said
    if named:
        names += own
    elif labels and not set(names) & set(LABEL_NAMES):
        names.append("target")
    names = list(dict.fromkeys(names))
    # A column may feed the model and its loss both.
    given = {**{n: n for n in names if n in columns}, **given}
    if own and not named and not set(names) & set(LABEL_NAMES):
        raise ModelError(
            "model.inputs",
            "The loss takes a target, and no column of the dataset is one.",
            mend="Mark a column as the label, or name it: inputs={'target': 'column'}; a column may"
            " feed the module too.",
            where="target",
        )
    shell = Graph(
        inputs=tuple(InputSpec(name=n, kind="data", dtype="f32", shape=()) for n in names),
        nodes=(),
        loss="",
    )
    bindings = bind.bind(shell, data, given)
    specs: Specs = {}
    for b in bindings:
        found = [columns[c] for c in b.columns if c in columns]
        if len(found) != len(b.columns) or (len(found) > 1 and any(c.shape for c in found)):
            raise ModelError(
                "model.inputs",
                f"Input {b.input!r} cannot be fed by the columns {', '.join(b.columns)[:200]}.",
                mend="Name one column, or several scalar columns of the dataset.",
                where=b.input,
            )
        if len({c.dtype for c in found}) > 1:
            raise ModelError(
                "model.inputs",
                f"Input {b.input!r} is fed by columns of different dtypes.",
                mend="Push the columns as one dtype, or give the module one input for each.",
                where=b.input,
            )
        specs[b.input] = (found[0].dtype, found[0].shape if len(found) == 1 else (len(found),))
    return specs, bindings
