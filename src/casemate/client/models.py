"""From what a scientist has to what a job needs: a packed model, bindings, an optimizer."""

from __future__ import annotations

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
from casemate.spec.job import Adam, InputBinding, Sgd

SUFFIX: Final = ".cmm"
MAX_FILE: Final = 8 << 30


@dataclass(frozen=True, slots=True)
class Exported:
    """A packed model with the columns that feed it."""

    packed: Packed
    inputs: tuple[InputBinding, ...]


def load(path: str | Path) -> Packed:
    """The packed model in a ``.cmm`` file. Raises ``UsageError`` when it cannot be read."""
    try:
        data = Path(path).read_bytes()
    except OSError as e:
        raise UsageError(
            "usage.file",
            f"The model {path} cannot be read: {e.strerror}.",
            mend="Name a packed model; `casemate model export` makes one.",
            where=str(path),
        ) from None
    pack.unpack(data)
    return Packed(data)


def export(
    model: Any,
    schemas: Sequence[DatasetSchema],
    *,
    loss: Any = None,
    inputs: Mapping[str, str | Sequence[str]] | None = None,
) -> Exported:
    """Pack ``model`` for datasets of these schemas.

    A ``.cmm`` path or a ``Packed`` needs no torch; a module is exported by
    :mod:`casemate.client.torch`. Raises ``ModelError`` naming the node or the input.
    """
    if isinstance(model, str | Path):
        model = load(model)
    if isinstance(model, Packed):
        graph, _ = pack.unpack(model.data)
        return Exported(model, bind(graph, schemas[0], inputs))
    from casemate.client import torch as bridge

    packed, bindings = bridge.export(model, schemas[0], loss=loss, inputs=inputs)
    return Exported(packed, bindings)


_TORCH: Final[dict[str, Any]] = {
    "SGD": lambda d: values.SGD(d["lr"], d["momentum"], d["nesterov"], d["weight_decay"]),
    "Adam": lambda d: values.Adam(d["lr"], d["betas"], d["eps"], d["weight_decay"]),
    "AdamW": lambda d: values.AdamW(d["lr"], d["betas"], d["eps"], d["weight_decay"]),
}
_NAMED: Final[dict[str, Any]] = {
    "sgd": values.SGD,
    "adam": values.Adam,
    "adamw": values.AdamW,
}
# What the engine's optimizers do not have; a torch optimizer with one of these set is refused.
_ABSENT: Final = ("dampening", "amsgrad", "maximize")


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
    kind, defaults = type(given).__name__, getattr(given, "defaults", None)
    if kind in _TORCH and isinstance(defaults, dict):
        strange = [name for name in _ABSENT if defaults.get(name)]
        groups = getattr(given, "param_groups", [])
        if strange or len(groups) > 1:
            what = strange[0] if strange else "parameter groups"
            raise UsageError(
                "usage.optimizer",
                f"torch.optim.{kind} with {what} has no counterpart here.",
                mend="Use one parameter group and the plain form of the optimizer.",
            )
        found: Sgd | Adam = _TORCH[kind](defaults)
        return found
    raise UsageError(
        "usage.optimizer",
        f"{str(given)[:60]!r} is no optimizer that casemate knows.",
        mend="Use 'sgd', 'adam' or 'adamw' with lr, torch.optim.SGD, Adam or AdamW, or cm.SGD(…).",
    )
