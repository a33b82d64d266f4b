"""Which columns feed which input of a graph.

By name first; then the label column feeds the one input that is left with a label's name; then all
scalar feature columns, in the schema's order, are stacked into the one input that is left.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from casemate.graph.model import LABEL_NAMES, Graph
from casemate.spec.data import DatasetSchema
from casemate.spec.errors import ModelError
from casemate.spec.job import InputBinding


def bind(
    graph: Graph, schema: DatasetSchema, given: Mapping[str, str | Sequence[str]] | None = None
) -> tuple[InputBinding, ...]:
    """Bindings for every data input of ``graph``; ``given`` (input to column or columns) first.

    Raises ``ModelError`` ``model.inputs`` when an input is left without a column, or unknown.
    """
    inputs = [i.name for i in graph.inputs if i.kind == "data"]
    chosen: dict[str, tuple[str, ...]] = {}
    for name, columns in (given or {}).items():
        if name not in inputs:
            raise _refuse(f"The model has no data input {name!r}.", inputs, schema, name)
        chosen[name] = (columns,) if isinstance(columns, str) else tuple(columns)
    used = {c for columns in chosen.values() for c in columns}
    free = [c for c in schema.columns if c.role != "unit" and c.name not in used]
    for name in inputs:
        if name not in chosen and any(c.name == name for c in free):
            chosen[name] = (name,)
            free = [c for c in free if c.name != name]
    labels = [c.name for c in free if c.role == "label"]
    left = [name for name in inputs if name not in chosen]
    named = [name for name in left if name in LABEL_NAMES]
    if len(labels) == 1 and len(named) == 1:
        chosen[named[0]] = (labels[0],)
        left.remove(named[0])
    features = [c for c in free if c.role == "feature"]
    if len(left) == 1 and features:
        scalars = tuple(c.name for c in features if not c.shape)
        if len(scalars) == len(features):
            chosen[left.pop()] = scalars
        elif len(features) == 1:
            chosen[left.pop()] = (features[0].name,)
    if left:
        raise _refuse(
            f"No column of the dataset feeds the input {left[0]!r}.", inputs, schema, left[0]
        )
    return tuple(InputBinding(input=name, columns=chosen[name]) for name in inputs)


def _refuse(message: str, inputs: Sequence[str], schema: DatasetSchema, where: str) -> ModelError:
    columns = ", ".join(c.name for c in schema.columns[:20])
    return ModelError(
        "model.inputs",
        f"{message} Inputs: {', '.join(inputs)}; columns: {columns}.",
        mend="Name the columns: inputs={'input': ['column', …]}.",
        where=where,
    )
