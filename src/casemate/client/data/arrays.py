"""Arrays, frames and map-style datasets, through numpy."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from casemate.client.data.arrow import arrow_array, no_wire_form
from casemate.client.data.columns import Block, refuse
from casemate.client.data.table import (
    BLOCK_ROWS,
    Table,
    extra,
    found_in,
    no_duplicates,
    no_nulls,
    peeked,
)


def _numpy(name: str, source: Any) -> Any:
    """``source`` as an array, of any dimension."""
    try:
        import numpy as np
    except ModuleNotFoundError:
        raise extra("numpy") from None
    if np.ma.is_masked(source):
        no_nulls(name, np.ma.getmaskarray(source).reshape(len(source), -1).any(axis=1))
    try:
        return np.asarray(source)
    except (TypeError, ValueError, RuntimeError) as e:
        raise refuse(
            "shape",
            f"Column {name!r} makes no array: {str(e)[:120]}.",
            "Give rows of equal shape on the CPU.",
            name,
        ) from None


def _column(name: str, source: Any) -> Any:
    """``source`` as an array with the row as axis 0; lists in cells become further axes."""
    array = _numpy(name, source)
    if array.ndim == 0:
        raise refuse("shape", f"Column {name!r} has no rows.", "Give one value per row.", name)
    cells = array.dtype.kind == "O" and array.ndim == 1 and len(array) > 0
    return _stacked(name, list(array), 1) if cells and hasattr(array[0], "__array__") else array


def arrays_table(source: dict[str, Any]) -> Table:
    arrays = {name: _column(name, item) for name, item in source.items()}
    if len({len(a) for a in arrays.values()}) > 1:
        counts = ", ".join(f"{name}: {len(a)}" for name, a in list(arrays.items())[:8])
        raise refuse(
            "rows-differ",
            f"The columns have different numbers of rows ({counts}).",
            "Give every column one value per row.",
        )

    def blocks() -> Iterator[Block]:
        rows = len(next(iter(arrays.values()))) if arrays else 0
        for at in range(0, rows, BLOCK_ROWS):
            end = min(rows, at + BLOCK_ROWS)
            yield Block({n: a[at:end] for n, a in arrays.items()}, range(at + 1, end + 1))

    return Table({name: found_in(a, name) for name, a in arrays.items()}, blocks)


def pandas_table(frame: Any) -> Table:
    names = [str(name) for name in frame.columns]
    no_duplicates(names)
    arrays: dict[str, Any] = {}
    for at, name in enumerate(names):
        series = frame.iloc[:, at]
        missing = series.isna()
        # NaN in a float column is not a missing label but a number that is not finite.
        if missing.any() and getattr(series.dtype, "kind", "O") != "f":
            no_nulls(name, missing)
        kind = getattr(series.dtype, "numpy_dtype", None)  # of nullable columns such as Int64
        arrays[name] = series.to_numpy(dtype=kind) if kind is not None else series.to_numpy()
        if len(series) and isinstance(series.iloc[0], list):
            arrays[name] = _stacked(name, series.tolist(), 1)
    return arrays_table(arrays)


def polars_table(frame: Any) -> Table:
    import polars as pl

    arrays: dict[str, Any] = {}
    for name in frame.columns:
        series = frame[name]
        if series.null_count():
            no_nulls(name, series.is_null())
        if series.dtype == pl.Struct:  # whose fields would become an axis
            raise no_wire_form(name, series.dtype)
        nested = str(series.dtype).startswith("List")
        try:
            arrays[name] = _stacked(name, series.to_list(), 1) if nested else series.to_numpy()
        except pl.exceptions.PolarsError:
            raise no_wire_form(name, series.dtype) from None
    return arrays_table(arrays)


def hugging_face_table(dataset: Any) -> Table:
    """Columns as Arrow, which keeps float64; images and the like decoded through numpy."""
    names = list(dataset.column_names)
    coded = [n for n, feature in dataset.features.items() if hasattr(feature, "decode_example")]
    plain = [n for n in names if n not in coded]

    def blocks() -> Iterator[Block]:
        for at in range(0, len(dataset), BLOCK_ROWS):
            rows = range(at, min(len(dataset), at + BLOCK_ROWS))
            columns: dict[str, Any] = {}
            if plain:
                part = dataset.select_columns(plain).with_format("arrow")[rows]
                for name in plain:
                    columns[name] = arrow_array(name, part[name], at + 1)
            if coded:
                decoded = _decoded(dataset.select_columns(coded), rows)
                for name in coded:
                    columns[name] = _stacked(name, decoded[name], at + 1)
            yield Block(columns, range(at + 1, at + len(rows) + 1))

    return peeked(names, blocks)


def _decoded(dataset: Any, rows: range) -> Any:
    """Images and the like as arrays. Whatever their libraries raise (of a file that unfolds to too
    many pixels, say) is a fault of the rows."""
    try:
        return dataset.with_format("numpy")[rows]
    except Exception as e:
        names = ", ".join(map(repr, dataset.column_names))
        raise refuse(
            "undecodable",
            f"A row from {rows.start + 1} to {rows.stop} of {names} cannot be decoded:"
            f" {type(e).__name__}: {str(e)[:120]}.",
            "Leave the row out, or write its image again, smaller.",
            names,
        ) from None


def _stacked(name: str, rows: Any, first_row: int) -> Any:
    """Rows of one shape as one array; DataError ``data.shape`` names the first that differs."""
    import numpy as np

    if isinstance(rows, np.ndarray) and rows.dtype.kind != "O":
        return rows
    parts = []
    for at, row in enumerate(rows, first_row):
        if row is None:
            no_nulls(name, [False] * (at - 1) + [True])
        parts.append(_numpy(name, row))
        if parts[-1].shape != parts[0].shape:
            raise refuse(
                "shape",
                f"Column {name!r}, row {at}: shape {parts[-1].shape} where another row has"
                f" {parts[0].shape}.",
                "Pad, cut or resize every row to one declared shape.",
                f"{name}, row {at}",
            )
    return np.stack(parts) if parts else np.empty((0,))


def items_table(source: Any) -> Table:
    """A map-style torch Dataset, or any sequence of rows that are mappings or tuples."""
    try:
        import numpy  # noqa: F401
    except ModuleNotFoundError:
        raise extra("numpy") from None

    def row(at: int) -> dict[str, Any]:
        item = source[at]
        if isinstance(item, Mapping):
            return {str(k): v for k, v in item.items()}
        if isinstance(item, tuple | list) and len(item) > 1:
            inputs = item[:-1]
            names = ["x"] if len(inputs) == 1 else [f"x{i}" for i in range(len(inputs))]
            return {**dict(zip(names, inputs, strict=True)), "y": item[-1]}
        return {"x": item[0] if isinstance(item, tuple | list) else item}

    def blocks() -> Iterator[Block]:
        for at in range(0, len(source), BLOCK_ROWS):
            part = [row(i) for i in range(at, min(len(source), at + BLOCK_ROWS))]
            for i, item in enumerate(part):
                if list(item) != list(part[0]):
                    raise refuse(
                        "rows-differ",
                        f"Row {at + i + 1} has other fields than the first.",
                        "Let every row have the same fields.",
                        f"row {at + i + 1}",
                    )
            columns = {n: _stacked(n, [item[n] for item in part], at + 1) for n in part[0]}
            yield Block(columns, range(at + 1, at + len(part) + 1))

    return peeked(list(row(0)) if len(source) else [], blocks)
