"""A library user's tensors as one dataset: its schema with declared bounds, its columns."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final, TypeAlias

import torch
from torch import nn
from torch.utils.data import TensorDataset

from casemate.engine.capture.trace import dtype_of, parameters
from casemate.graph import check
from casemate.graph.model import LABEL_NAMES, Graph, Packed
from casemate.graph.pack import unpack
from casemate.spec.data import Column, DatasetSchema
from casemate.spec.errors import DataError, ModelError, UsageError
from casemate.spec.job import InputBinding

Bounds: TypeAlias = "Mapping[str, tuple[float, float]]"
# What a float column is taken to hold when nothing is declared.
FLOATS: Final = (-16.0, 16.0)
_MOST: Final = 2**31 - 1


@dataclass(frozen=True, slots=True)
class Table:
    """``schema`` declares what ``columns`` (name -> tensor, axis 0 the row) may hold."""

    schema: DatasetSchema
    columns: dict[str, torch.Tensor]
    bindings: tuple[InputBinding, ...]


def _refuse(message: str, mend: str, where: str = "") -> UsageError:
    return UsageError("usage.value", message, mend=mend, where=where)


def named(data: Any, module: nn.Module) -> dict[str, torch.Tensor]:
    """Tensors by input, each with the row as axis 0.

    data: a mapping, or a ``TensorDataset`` whose tensors are ``forward``'s parameters in order and
    then the target. Raises ``UsageError`` ``usage.value``.
    """
    if isinstance(data, TensorDataset):
        required, optional, _ = parameters(module)
        count = len(data.tensors)
        features = required if count <= len(required) else [*required, *optional][: count - 1]
        names = [*features, "target"][:count]
        if len(names) != count:
            raise _refuse("The dataset has more tensors than forward takes.", "Give a dict.")
        data = dict(zip(names, data.tensors, strict=True))
    if not isinstance(data, Mapping) or not data:
        raise _refuse(
            f"{type(data).__name__} is no data that can be sampled here.",
            "Give a dict of tensors by forward's parameter names (and 'target'), or a"
            " TensorDataset.",
            "data",
        )
    out = {str(name): torch.as_tensor(item).detach() for name, item in data.items()}
    rows = {t.shape[0] if t.dim() else 0 for t in out.values()}
    if len(rows) != 1 or 0 in rows:
        raise _refuse("The tensors do not have the same rows, at least one.", "Mend them.", "data")
    return out


def _admitted(graph: Graph, infos: Any, known: dict[str, Any], name: str) -> tuple[int, int]:
    """What an integer input may hold: the places of the table that it indexes, else 0 and 1."""
    others = {s.name: (0, 0) for s in graph.inputs if s.kind == "data" and s.dtype != "f32"}

    def fits(high: int) -> bool:
        try:
            check.check(graph, infos, bounds={**others, **known, name: (0, high)})
        except ModelError as e:
            if e.code != "model.index-range":
                raise
            return False
        return True

    if fits(_MOST):
        return 0, 1
    sizes = sorted({d for v in check.check(graph, infos).values.values() for d in v.dims if d > 0})
    low, high = 0, len(sizes)
    while low < high:
        middle = (low + high) // 2
        if fits(sizes[middle] - 1):
            low = middle + 1
        else:
            high = middle
    return 0, sizes[max(0, low - 1)] - 1


def _bounds(packed: Packed, tensors: Mapping[str, torch.Tensor], given: Bounds) -> dict[str, Any]:
    if unknown := sorted(set(given) - set(tensors)):
        raise _refuse(
            f"There are bounds for {unknown[0]!r}, which is no tensor.", "Leave them out."
        )
    graph, view = unpack(packed.data)
    infos = {n: info for n, (info, _) in view.items()}
    known = check.known_bounds(graph, view, (), ())
    out: dict[str, Any] = {}
    for name, tensor in tensors.items():
        kind = dtype_of(name, tensor.dtype)
        if name in given:
            low, high = given[name]
            out[name] = (low, high) if kind == "f32" else (int(low), int(high))
        elif kind in ("i32", "i64"):
            out[name] = _admitted(graph, infos, known, name)
        else:
            out[name] = {"f32": FLOATS, "u8": (0, 255), "bool": (None, None)}[kind]
    return out


def _check(column: Column, tensor: torch.Tensor, declared: bool) -> None:
    bounds = column.wire_bounds
    if bounds is None:
        return
    if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
        raise DataError(
            "data.not-finite",
            f"{column.name!r} holds NaN or infinity.",
            mend="Clean the tensor first.",
            where=column.name,
        )
    if not bool(((tensor >= bounds[0]) & (tensor <= bounds[1])).all()):
        said = "declared" if declared else "assumed, none being declared"
        raise DataError(
            "data.bounds",
            f"{column.name!r} holds values outside [{bounds[0]:g}, {bounds[1]:g}] ({said}).",
            mend=f"Scale it, or declare what can occur: bounds={{{column.name!r}: (low, high)}};"
            " known beforehand, not computed from the rows.",
            where=column.name,
        )


@dataclass(frozen=True, slots=True)
class Grouped:
    """Rows by unit: ``tensors`` with the rows that are kept, each row's ``owner`` from 0 (``None``:
    each row is a unit of its own), the number of ``units``, and the most rows of one."""

    tensors: dict[str, torch.Tensor]
    owner: torch.Tensor | None
    units: int
    rows_per_unit: int


def group(tensors: dict[str, torch.Tensor], unit: Any, rows_per_unit: int) -> Grouped:
    """Of each unit the first ``rows_per_unit`` rows. unit: an id for each row (rows,), or ``None``.

    Raises ``UsageError`` ``usage.value``.
    """
    rows = len(next(iter(tensors.values())))
    if unit is None:
        if rows_per_unit != 1:
            raise _refuse("rows_per_unit without unit.", "Give each row's unit.", "rows_per_unit")
        return Grouped(tensors, None, rows, 1)
    ids = torch.as_tensor(unit)
    if ids.shape != (rows,) or ids.is_floating_point() or rows_per_unit < 1:
        raise _refuse(
            "unit is no vector of whole numbers, one for each row.",
            "Give the id of the person (or other unit) that each row belongs to.",
            "unit",
        )
    found, place = torch.unique(ids, return_inverse=True)
    order = torch.argsort(place, stable=True)
    ordered = place[order]
    rank = torch.arange(rows) - torch.searchsorted(ordered, ordered)
    kept = order[rank < rows_per_unit].sort().values
    if len(kept) < rows:
        tensors = {name: t[kept] for name, t in tensors.items()}
    return Grouped(tensors, place[kept].to(torch.int64), len(found), rows_per_unit)


def table(packed: Packed, rows: Grouped, bounds: Bounds) -> Table:
    """``rows``, which feed ``packed``, as a dataset.

    bounds: what each tensor may hold, inclusive. Where none are declared: floats ``FLOATS``; whole
    numbers the places of the table that they index in the model, or else 0 and 1. Raises
    ``UsageError``, ``DataError`` ``data.bounds`` or ``data.not-finite``: to who holds the rows,
    before a run.
    """
    declared = _bounds(packed, rows.tensors, bounds)
    columns = {name: t.to("cpu").contiguous() for name, t in rows.tensors.items()}
    extra = []
    if rows.owner is not None:
        name = "unit"
        while name in columns:
            name += "_"
        columns[name] = rows.owner
        extra = [Column(name=name, dtype="i64", low=0, high=rows.units - 1, role="unit")]
    try:
        made = tuple(
            Column(
                name=name,
                dtype=dtype_of(name, t.dtype),  # type: ignore[arg-type]
                shape=tuple(t.shape[1:]),
                low=declared[name][0],
                high=declared[name][1],
                role="label" if name in LABEL_NAMES else "feature",
            )
            for name, t in columns.items()
            if name in declared
        )
        schema = DatasetSchema(
            name="data",
            columns=(*made, *extra),
            rows=len(next(iter(columns.values()))),
            units=rows.units,
            rows_per_unit=rows.rows_per_unit,
        )
    except ValueError as e:
        raise _refuse(f"The data cannot be described: {e}.", "Mend the tensors.", "data") from None
    for column in made:
        _check(column, columns[column.name], column.name in bounds)
    bindings = tuple(InputBinding(input=name, columns=(name,)) for name in rows.tensors)
    return Table(schema, columns, bindings)
