"""From what a scientist has to what a job needs: a packed model, bindings, an optimizer."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from casemate.client import values
from casemate.client.bind import bind
from casemate.graph import pack
from casemate.graph.model import Packed
from casemate.spec.data import DatasetSchema
from casemate.spec.errors import UsageError
from casemate.spec.job import Adam, InputBinding, Schedule, Sgd, Views

SUFFIX: Final = ".cmm"


@dataclass(frozen=True, slots=True)
class Exported:
    """A packed model with the columns that feed it."""

    packed: Packed
    inputs: tuple[InputBinding, ...]


def load(path: str | Path) -> Packed:
    """The packed model in a ``.cmm`` file. Raises ``UsageError`` when it cannot be read."""
    file = Path(path)
    try:
        what = "no file" if not file.is_file() else "too large"
        fits = file.is_file() and file.stat().st_size <= pack.MAX_BYTES
        data = file.read_bytes() if fits else None
    except OSError as e:
        what, data = str(e.strerror), None
    if data is None:
        raise UsageError(
            "usage.file",
            f"The model {path} cannot be read: {what}.",
            mend="Name a packed model; `casemate model export` makes one.",
            where=str(path),
        )
    pack.unpack(data)
    return Packed(data)


def export(
    model: Any,
    schemas: Sequence[DatasetSchema],
    *,
    loss: Any = None,
    inputs: Mapping[str, str | Sequence[str]] | None = None,
    dropout: bool = True,
) -> Exported:
    """Pack ``model`` for datasets of these schemas.

    A ``.cmm`` path or a ``Packed`` needs no torch; a module is exported by
    :mod:`casemate.client.torch`, with what its layers in training mode drop out unless ``dropout``
    is false. Raises ``ModelError`` naming the node or the input.
    """
    if isinstance(model, str | Path):
        model = load(model)
    if isinstance(model, Packed):
        graph, _ = pack.unpack(model.data)
        return Exported(model, bind(graph, schemas[0], inputs))
    from casemate.client import torch as bridge

    packed, bindings = bridge.export(model, schemas[0], loss=loss, inputs=inputs, dropout=dropout)
    return Exported(packed, bindings)


def export_metrics(
    model: Any,
    schemas: Sequence[DatasetSchema],
    metrics: Mapping[str, tuple[object, float]],
    *,
    inputs: Mapping[str, str | Sequence[str]] | None = None,
) -> Exported:
    """Pack an evaluation of a module over datasets of these schemas. A packed model has no scores
    any more, but its losses. Raises ``UsageError``, ``ModelError``."""
    if isinstance(model, str | Path | Packed):
        raise UsageError(
            "usage.model",
            "A packed model gives losses and no scores, so that it cannot be evaluated.",
            mend="Give the torch.nn.Module, with the weights loaded.",
        )
    from casemate.client import torch as bridge

    packed, bindings = bridge.export_metrics(model, schemas[0], metrics, inputs=inputs)
    return Exported(packed, bindings)


def export_outputs(
    model: Any, example: Any = None, bounds: Mapping[str, tuple[int, int]] | None = None
) -> Packed:
    """Pack what ``model`` returns, for prediction; see
    :meth:`casemate.client.enclave.Enclave.deploy`. A ``.cmm`` file or a ``Packed`` needs no torch.
    Raises ``UsageError``, ``ModelError``."""
    if isinstance(model, str | Path) and Path(model).suffix == ".onnx":
        from casemate.client import torch as bridge

        return bridge.export_onnx(model, bounds=bounds)
    if isinstance(model, str | Path):
        model = load(model)
    if isinstance(model, Packed):
        if not pack.unpack(model.data)[0].outputs:
            raise UsageError(
                "usage.model",
                "The model is packed for training: it gives losses and no outputs.",
                mend="Deploy the module, or pack it with casemate model export --input.",
            )
        return model
    from casemate.client import torch as bridge

    return bridge.export_outputs(model, example, bounds=bounds)


def export_entry(
    model: Any,
    schema: DatasetSchema,
    *,
    inputs: Mapping[str, str | Sequence[str]] | None = None,
) -> Exported:
    """Pack what ``model`` returns for an entry in a contest; labels feed no input. Raises
    ``UsageError``, ``ModelError``."""
    columns = tuple(c for c in schema.columns if c.role != "label")
    seen = dataclasses.replace(schema, columns=columns)
    if isinstance(model, str | Path | Packed):
        packed = export_outputs(model)
        return Exported(packed, bind(pack.unpack(packed.data)[0], seen, inputs))
    from casemate.client import torch as bridge

    return Exported(*bridge.export_entry(model, seen, inputs=inputs))


def metrics(
    given: str | Sequence[str] | Mapping[str, Any], limits: Mapping[str, float] | None
) -> dict[str, tuple[object, float]]:
    """Metrics by name with what makes them and their limits: 1 for accuracy, else as given."""
    names = {given: given} if isinstance(given, str) else given
    made = dict(names) if isinstance(names, Mapping) else {name: name for name in names}
    limits = {"accuracy": 1.0, **(limits or {})}
    missing = sorted(made.keys() - limits.keys())
    unknown = sorted(limits.keys() - made.keys() - {"accuracy"})
    if missing or unknown or not made:
        raise UsageError(
            "usage.metrics",
            f"There is no limit for {missing[0]!r}."
            if missing
            else f"A limit is given for {unknown[0]!r}, which is no metric."
            if unknown
            else "No metric is named.",
            mend="Name metrics, and for each the limit at which a row's value is cut:"
            " metrics=['mse'], limits={'mse': 25.0}.",
        )
    return {name: (metric, float(limits[name])) for name, metric in made.items()}


def views(given: int | Views | None) -> Views:
    """Views from their number, themselves, or ``None`` for one without transforms."""
    if isinstance(given, Views):
        return given
    return values.Views(1 if given is None else given)


_NAMED: Final[dict[str, Any]] = {
    "sgd": values.SGD,
    "adam": values.Adam,
    "adamw": values.AdamW,
}


def optimizer(given: Any, lr: float | None = None) -> Sgd | Adam:
    """The optimizer's values from a name, a ``torch.optim`` object, or themselves."""
    if isinstance(given, Sgd | Adam):
        return given
    if isinstance(given, str) and given.lower() in _NAMED:
        if lr is None:
            raise UsageError(
                "usage.optimizer", f"{given!r} needs a learning rate.", mend="Give lr=…."
            )
        made: Sgd | Adam = _NAMED[given.lower()](lr)
        return made
    if hasattr(given, "param_groups"):
        from casemate.client import torch as bridge

        return bridge.optimizer(given)
    raise UsageError(
        "usage.optimizer",
        f"{str(given)[:60]!r} is no optimizer that casemate knows.",
        mend="Use 'sgd', 'adam' or 'adamw' with lr, torch.optim.SGD, Adam or AdamW, or cm.SGD(…).",
    )


def schedule(given: Any, steps: int) -> Schedule:
    """The schedule's values from a kind by name, a torch scheduler, themselves, or ``None``."""
    if given is None or isinstance(given, Schedule):
        return given or Schedule()
    if isinstance(given, str):
        return values.Schedule(given)  # type: ignore[arg-type]  # it refuses other words
    from casemate.client import torch as bridge

    return bridge.schedule(given, steps)
