"""Rows of a run: the graph's data inputs for every row, and each row's unit (P1)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt
import torch

from casemate.engine.program import DTYPES
from casemate.graph.model import InputSpec
from casemate.spec.data import Column, DatasetSchema
from casemate.spec.job import InputBinding


@dataclass(frozen=True, slots=True)
class Rows:
    """``inputs``: graph input -> tensor with the row as axis 0. ``valid``: rows as their schema
    says; others contribute zero (P6). ``order`` and ``starts``: the rows of unit u, in their order,
    are ``order[starts[u]:starts[u + 1]]``, at most its dataset's k; ``per_unit``: the largest k.
    ``filler``: what a place without a row holds, a made-up record within the declared bounds, so
    that no operation fails on it."""

    inputs: dict[str, torch.Tensor]
    valid: npt.NDArray[np.bool_]
    order: npt.NDArray[np.int64]
    starts: npt.NDArray[np.int64]
    per_unit: int
    filler: dict[str, torch.Tensor] = field(default_factory=dict)

    def filler_of(self, name: str) -> torch.Tensor:
        """The made-up record of an input, batch 1; zeros where none is given."""
        found = self.inputs[name]
        return self.filler.get(name, found.new_zeros((1, *found.shape[1:])))

    @property
    def count(self) -> int:
        return len(self.valid)

    @property
    def units(self) -> int:
        return len(self.starts) - 1

    def of_unit(self, unit: int) -> npt.NDArray[np.int64]:
        """The unit's valid rows among its first k, chosen from its own rows alone."""
        chosen = self.order[self.starts[unit] : self.starts[unit + 1]]
        kept: npt.NDArray[np.int64] = chosen[self.valid[chosen]]
        return kept

    def places(self) -> npt.NDArray[np.int64]:
        """For each row, the number of its place among all units' places, which follows from its own
        unit alone; of a row that is no unit's, and as the last of all, that of nobody."""
        lengths = np.diff(self.starts)
        unit = np.repeat(np.arange(self.units), lengths)
        rank = np.arange(len(self.order)) - self.starts[:-1][unit]
        out = np.full(self.count + 1, self.units * self.per_unit, dtype=np.int64)
        out[self.order] = unit * self.per_unit + rank
        return out

    def table(self, k: int) -> tuple[torch.Tensor, torch.Tensor]:
        """:meth:`of_unit` for all units: rows (units, k) int64, missing ones filled up with the
        first or with -1, and which are there, float32."""
        lengths = np.diff(self.starts)
        kept = self.valid[self.order]
        before = np.concatenate([[0], np.cumsum(kept)])
        unit = np.repeat(np.arange(self.units), lengths)
        rank = before[:-1] - before[self.starts[:-1]][unit]
        found = np.full((self.units, k), -1, dtype=np.int64)
        found[unit[kept], rank[kept]] = self.order[kept]
        there = found >= 0
        filled = np.where(there, found, found[:, :1])
        return torch.from_numpy(filled), torch.from_numpy(there.astype(np.float32))


def bound_columns(
    schema: DatasetSchema, spec: InputSpec, bindings: Sequence[InputBinding]
) -> list[Column]:
    """The columns that feed a data input, as :func:`casemate.plan.check.check_inputs` admitted."""
    names = next(b.columns for b in bindings if b.input == spec.name)
    return [next(c for c in schema.columns if c.name == name) for name in names]


def stack(columns: Sequence[Column], tensors: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """One column as it is, or scalar columns side by side."""
    if len(columns) == 1:
        return tensors[columns[0].name]
    return torch.stack([tensors[c.name] for c in columns], dim=1)


def valid_rows(schema: DatasetSchema, tensors: Mapping[str, torch.Tensor]) -> npt.NDArray[np.bool_]:
    """Which rows keep their schema's bounds (NaN does not)."""
    good = torch.ones(schema.rows, dtype=torch.bool)
    for column in schema.columns:
        if (bounds := column.wire_bounds) is not None:
            flat = tensors[column.name].reshape(schema.rows, -1)
            good &= ((flat >= bounds[0]) & (flat <= bounds[1])).all(dim=1)
    return good.numpy()


def assemble(
    schemas: Sequence[DatasetSchema],
    tensors: Sequence[Mapping[str, torch.Tensor]],
    data: Sequence[InputSpec],
    bindings: Sequence[InputBinding],
) -> Rows:
    """All datasets one after the other; a unit is a unit of one dataset (design: P1). Of ``data``
    those inputs count that columns feed: random ones are drawn in each step."""
    inputs, filler = {}, {}
    for spec in (s for s in data if s.kind == "data"):
        bound = bound_columns(schemas[0], spec, bindings)
        filler[spec.name] = stack(bound, {c.name: _nearest_zero(c) for c in bound})
        parts = [
            stack(bound_columns(schema, spec, bindings), columns)
            for schema, columns in zip(schemas, tensors, strict=True)
        ]
        inputs[spec.name] = torch.cat(parts).contiguous()
    valid, owner, limits, base = [], [], [], 0
    for schema, columns in zip(schemas, tensors, strict=True):
        column = schema.unit_column
        unit = torch.arange(schema.rows) if column is None else columns[column.name]
        valid.append(valid_rows(schema, columns))
        # A row whose unit is out of range belongs to nobody.
        known = (unit >= 0) & (unit < schema.units)
        owner.append(torch.where(known, unit + base, -1).numpy())
        limits.append(np.full(schema.rows, schema.rows_per_unit))
        base += schema.units
    owners = np.concatenate(owner).astype(np.int64)
    order = np.argsort(owners, kind="stable").astype(np.int64)
    ordered = owners[order]
    rank = np.arange(len(order)) - np.searchsorted(ordered, ordered)
    order = order[(ordered >= 0) & (rank < np.concatenate(limits)[order])]
    starts = np.searchsorted(owners[order], np.arange(base + 1)).astype(np.int64)
    per_unit = max(schema.rows_per_unit for schema in schemas)
    return Rows(inputs, np.concatenate(valid), order, starts, per_unit, filler)


def _nearest_zero(column: Column) -> torch.Tensor:
    """Of the declared values the one nearest to zero, for one record, batch 1."""
    low, high = column.wire_bounds or (0, 0)
    return torch.full((1, *column.shape), min(max(0, low), high), dtype=DTYPES[column.dtype])


def synthetic(columns: Sequence[Column], rng: np.random.Generator) -> torch.Tensor:
    """One made-up record's input (batch 1), uniform within the declared bounds."""
    parts = []
    made: npt.NDArray[np.int64] | npt.NDArray[np.float64]
    for column in columns:
        low, high = column.wire_bounds or (0, 1)
        if column.dtype == "f32":
            made = rng.uniform(low, high, size=(1, *column.shape))
        else:
            made = rng.integers(int(low), int(high), endpoint=True, size=(1, *column.shape))
        parts.append(torch.from_numpy(np.ascontiguousarray(made)).to(DTYPES[column.dtype]))
    return parts[0] if len(columns) == 1 else torch.stack(parts, dim=1)
