"""An owner's rows to the wire form: a schema, and one canonical safetensors file."""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, BinaryIO, Final

from casemate.client.data import schema as declaring
from casemate.client.data.columns import Block, Target, pack, refuse
from casemate.client.data.schema import Bounds, Classes, Declaration, Scales
from casemate.client.data.sources import open_source
from casemate.spec import tensors
from casemate.spec.codec import encode as encode_value
from casemate.spec.data import Column, DatasetSchema
from casemate.spec.errors import CasemateError
from casemate.spec.table import check_schema

PIECE: Final = 1 << 20


@dataclass(frozen=True, slots=True)
class Encoded:
    """A dataset ready to be sealed.

    ``size``: bytes of the wire form. ``dropped``: rows left out because their unit had
    ``rows_per_unit`` rows before them.
    """

    schema: DatasetSchema
    size: int
    dropped: int
    _parts: tuple[bytes | bytearray, ...] = field(repr=False)

    def chunks(self) -> Iterator[bytes]:
        """The wire form in pieces of at most 1 MiB."""
        for part in self._parts:
            view = memoryview(part)
            for at in range(0, len(view), PIECE):
                yield bytes(view[at : at + PIECE])

    def write(self, file: BinaryIO) -> None:
        for piece in self.chunks():
            file.write(piece)


@dataclass(slots=True)
class _Units:
    """Ids to indices in order of first appearance; each keeps its own first ``k`` rows.

    Which rows of a unit are kept depends on that unit's rows alone (P1).
    """

    column: str
    k: int
    index: dict[Hashable, int] = field(default_factory=dict)
    taken: list[int] = field(default_factory=list)
    out: bytearray = field(default_factory=bytearray)

    def admit(self, block: Block) -> Block:
        raw = block.columns[self.column]
        cells = raw if isinstance(raw, list) else raw.tolist()
        mask = []
        for at, cell in enumerate(cells):
            if (
                not isinstance(cell, Hashable)
                or cell is None
                or cell != cell
                or not str(cell).strip()
            ):
                raise refuse(
                    "unit-missing",
                    f"Column {self.column!r}, {block.place(at)}: the row names no unit.",
                    "Say whose row it is, or remove it.",
                    f"{self.column}, {block.place(at)}",
                )
            unit = self.index.setdefault(cell, len(self.index))
            if unit == len(self.taken):
                self.taken.append(0)
            kept = self.taken[unit] < self.k
            if kept:
                self.taken[unit] += 1
                self.out += unit.to_bytes(8, "little")
            mask.append(kept)
        return block.keep(mask)


def encode(
    source: Any,
    *,
    name: str | None = None,
    label: str | Sequence[str] | None = None,
    unit: str | None = None,
    rows_per_unit: int = 1,
    bounds: Bounds | None = None,
    classes: Classes | None = None,
    scale: Scales = "none",
    columns: Sequence[Column] | DatasetSchema | Declaration | None = None,
    pad_units: int | None = None,
) -> Encoded:
    """Check ``source`` against what is declared and bring it to the wire form.

    source: a CSV or Parquet path, a pandas or polars frame, an Arrow table, a torch or Hugging Face
    dataset, a dict of arrays, or arrays (X, y), which become columns ``x`` and ``y``.

    Without ``columns``, every column of the source is taken. ``bounds`` are inclusive and of the
    raw values: by column name, or one pair for all features. They and ``classes`` (the label's
    words in order, or their number) are the owner's knowledge of what can occur; nothing is ever
    computed from the rows. ``scale`` maps features linearly from their bounds to [0, 1] (``unit``)
    or [-1, 1] (``symmetric``). Floats become f32, whole numbers i64, arrays of bytes u8; CSV
    features f32.

    ``columns`` declares the columns to take instead: values of :class:`Column`, the schema of an
    earlier version, or :func:`load_schema` of a TOML file.

    ``unit`` names the column that says whose row it is; a unit keeps its first ``rows_per_unit``
    rows. ``pad_units`` is the number of units to show instead of the true one, at least as large.

    Raises DataError ``data.*`` that names column and row, UsageError ``usage.extra`` when a package
    for the source is not installed.
    """
    table = open_source(source)
    if columns is None:
        targets = declaring.declare(
            table, label=label, unit=unit, bounds=bounds, classes=classes, scale=scale
        )
        declared = Declaration(targets, unit=unit, rows_per_unit=rows_per_unit)
    else:
        if label is not None or bounds is not None or classes is not None or scale != "none":
            raise refuse(
                "schema",
                "Columns are declared, and label, bounds, classes or scale beside them.",
                "Declare everything in one place.",
            )
        declared = _explicit(columns)
        declared = replace(
            declared,
            unit=unit if unit is not None else declared.unit,
            rows_per_unit=rows_per_unit if rows_per_unit != 1 else declared.rows_per_unit,
        )
    declared = replace(
        declared,
        name=name if name is not None else declared.name,
        units=pad_units if pad_units is not None else declared.units,
    )
    declaring.require(table, (t.name for t in declared.targets))
    declaring.require(table, [declared.unit] if declared.unit else [])
    if not declared.targets:
        raise refuse("empty", "The source has no columns to send.", "Give a table with columns.")
    return _encode(table.blocks(), declared, list(table.columns))


def _explicit(columns: Sequence[Column] | DatasetSchema | Declaration) -> Declaration:
    if isinstance(columns, Declaration):
        return columns
    if isinstance(columns, DatasetSchema):
        return declaring.from_schema(columns)
    return declaring.from_columns(columns)


def _encode(blocks: Iterator[Block], declared: Declaration, order: list[str]) -> Encoded:
    k = declared.rows_per_unit
    if not 1 <= k <= 4096 or (declared.unit is None and k != 1):
        raise refuse(
            "units",
            f"{k} rows per unit are declared" + (" without a unit column." if k > 1 else "."),
            "Name the unit column, and from 1 to 4096 rows of each.",
        )
    made = {t.name: t.column() for t in declared.targets}
    units = _Units(declared.unit, k) if declared.unit is not None else None
    data: dict[str, bytearray] = {t.name: bytearray() for t in declared.targets}
    seen = rows = 0
    for block in blocks:
        seen += len(block.rows)
        if units is not None:
            block = units.admit(block)
        rows += len(block.rows)
        if block.rows:
            _extend(data, declared.targets, block)
    if rows == 0:
        raise refuse("empty", "The source has no rows.", "Give a table with at least one row.")
    count = _unit_count(declared.units, rows if units is None else len(units.index))
    if units is not None:
        made[units.column] = Column(
            name=units.column, dtype="i64", low=0, high=count - 1, role="unit"
        )
        data[units.column] = units.out
    try:
        schema = DatasetSchema(
            name=declared.name or "",
            columns=tuple(made[n] for n in order if n in made),
            rows=rows,
            units=count,
            rows_per_unit=k,
        )
        encode_value(schema)
    except (ValueError, CasemateError) as e:
        raise refuse(
            "schema", f"The dataset cannot be so: {e}.", "Change its declaration."
        ) from None
    check_schema(schema)
    prefix, names = tensors.layout({c.name: (c.dtype, (rows, *c.shape)) for c in schema.columns})
    parts: tuple[bytes | bytearray, ...] = (prefix, *(data[n] for n in names))
    return Encoded(schema, sum(map(len, parts)), seen - rows, parts)


def _extend(data: dict[str, bytearray], targets: tuple[Target, ...], block: Block) -> None:
    for target in targets:
        data[target.name] += pack(target, block)


def _unit_count(padded: int | None, true: int) -> int:
    if padded is not None and padded < true:
        raise refuse(
            "units",
            f"The source has {true} units, more than the {padded} declared.",
            "Declare at least as many units as there are.",
        )
    return true if padded is None else padded
