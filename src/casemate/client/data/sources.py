"""Whatever an owner holds, as blocks of rows. Nothing heavy is imported but what the source needs.

A :class:`Table` names its columns, says what each holds, and gives the rows block by block, so that
a file larger than memory need not be held as text or frame.
"""

from __future__ import annotations

import csv
import itertools
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Literal, TypeAlias

from casemate.client.data.columns import Block, refuse
from casemate.spec.errors import DataError, UsageError

BLOCK_ROWS: Final = 4096

#: What a source says of a column: a CSV says nothing (``cell``), others know the kind of number.
Kind: TypeAlias = Literal["cell", "text", "bool", "int", "u8", "float"]


@dataclass(frozen=True, slots=True)
class Found:
    """A column as the source has it: its kind and the shape of a row in it."""

    kind: Kind
    shape: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class Table:
    columns: dict[str, Found]
    blocks: Callable[[], Iterator[Block]]


def open_source(source: Any) -> Table:
    """The table of a path, frame, Arrow table, dataset, or arrays.

    Raises DataError ``data.source`` for anything else, UsageError ``usage.extra`` when the package
    that reads it is not installed.
    """
    if isinstance(source, str | os.PathLike):
        return _path(Path(source))
    package = type(source).__module__.split(".")[0]
    reader = _READERS.get((package, type(source).__name__))
    if reader is not None:
        return reader(source)
    if isinstance(source, Mapping):
        return _arrays(dict(source))
    if isinstance(source, tuple) and len(source) == 2:
        return _arrays({"x": source[0], "y": source[1]})
    if package == "numpy":
        return _arrays({"x": source})
    if hasattr(source, "__getitem__") and hasattr(source, "__len__"):
        return _items(source)
    raise refuse(
        "source",
        f"A {type(source).__module__}.{type(source).__name__} is no source of rows.",
        "Give a CSV or Parquet path, a frame, an Arrow table, a dataset with a length, or arrays.",
    )


def _path(path: Path) -> Table:
    if not path.is_file():
        raise refuse("source", f"There is no file {path}.", "Name an existing file.", str(path))
    suffix = path.suffix.lower()
    if suffix == ".csv":
        return _csv(path)
    if suffix in (".parquet", ".pq"):
        return _parquet(path)
    raise refuse(
        "source",
        f"The kind of {path.name} is unknown.",
        "Name a file that ends in .csv or .parquet, or load it and give the frame.",
        str(path),
    )


def _extra(package: str) -> UsageError:
    return UsageError(
        "usage.extra",
        f"This source needs the package {package}, which is not installed.",
        mend="Install it with: pip install 'casemate[data]'.",
        where=package,
    )


def _duplicates(names: Sequence[str]) -> None:
    for name in names:
        if names.count(name) > 1:
            raise refuse(
                "duplicate-column",
                f"Two columns are called {name!r}.",
                "Give each column its own name.",
                name,
            )


# CSV (RFC 4180), strictly: a header, as many cells in every row, UTF-8.


def _csv_error(path: Path, reason: str, line: int, message: str, mend: str) -> DataError:
    return refuse(reason, f"{path.name}, line {line}: {message}.", mend, f"{path.name}:{line}")


def _csv_rows(path: Path) -> Iterator[tuple[int, list[str]]]:
    """(line, cells) of each record; the line is the one on which the record ends."""
    line = 0
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            reader = csv.reader(file, strict=True)
            for row in reader:
                line = reader.line_num
                yield line, row
    except UnicodeDecodeError as e:
        raise _csv_error(
            path,
            "csv-encoding",
            line + 1,
            f"from here on there are bytes that are not UTF-8 (0x{e.object[e.start]:02x})",
            "Save the file as UTF-8.",
        ) from None
    except csv.Error as e:
        raise _csv_error(
            path, "csv-form", line + 1, f"this is no CSV ({e})", "Save the table as CSV (RFC 4180)."
        ) from None
    except OSError as e:
        raise refuse(
            "source",
            f"{path} cannot be read: {e.strerror}.",
            "Name a file that you can read.",
            str(path),
        ) from None


def _csv(path: Path) -> Table:
    first = next(_csv_rows(path), None)
    if first is None or not any(cell.strip() for cell in first[1]):
        raise _csv_error(
            path, "csv-header", 1, "there is no header", "Let the first line name the columns."
        )
    names = [name.strip() for name in first[1]]
    if "" in names:
        at = names.index("") + 1
        raise _csv_error(
            path,
            "csv-header",
            1,
            f"column {at} has no name",
            "Let the first line name each column.",
        )
    _duplicates(names)

    def blocks() -> Iterator[Block]:
        rows = _full_rows(path, len(names))
        next(rows)
        done = 0
        while part := list(itertools.islice(rows, BLOCK_ROWS)):
            cells = list(zip(*(row for _, row in part), strict=True))
            yield Block(
                {name: list(cells[i]) for i, name in enumerate(names)},
                range(done + 1, done + len(part) + 1),
                [line for line, _ in part],
            )
            done += len(part)

    return Table({name: Found("cell") for name in names}, blocks)


def _full_rows(path: Path, width: int) -> Iterator[tuple[int, list[str]]]:
    """Rows of that width; empty lines only at the end."""
    blank = 0
    for line, row in _csv_rows(path):
        if not row:
            blank = blank or line
            continue
        if blank or len(row) != width:
            raise _csv_error(
                path,
                "csv-ragged",
                blank or line,
                "the line is empty" if blank else f"{len(row)} cells where the header has {width}",
                "Let every row have one cell for each column; quote cells that hold commas.",
            )
        yield line, row


# Arrays.


def _found(array: Any, name: str) -> Found:
    kinds: dict[str, Kind] = {"b": "bool", "i": "int", "u": "int", "f": "float"}
    shape = tuple(int(d) for d in array.shape[1:])
    kind = kinds.get(array.dtype.kind, "text")
    if kind == "text" and (shape or array.dtype.kind not in "OUST"):
        raise refuse(
            "dtype",
            f"Column {name!r} holds {array.dtype}, which has no wire form.",
            "Convert it to numbers of equal shape, or leave it out.",
            name,
        )
    if 0 in shape:
        raise refuse("shape", f"Column {name!r} has rows of shape {shape}.", "Leave it out.", name)
    return Found("u8" if array.dtype.kind == "u" and array.dtype.itemsize == 1 else kind, shape)


def _numpy(name: str, source: Any) -> Any:
    try:
        import numpy as np
    except ModuleNotFoundError:
        raise _extra("numpy") from None
    try:
        array = np.asarray(source)
    except (TypeError, ValueError, RuntimeError) as e:
        raise refuse(
            "shape",
            f"Column {name!r} makes no array: {str(e)[:120]}.",
            "Give rows of equal shape on the CPU.",
            name,
        ) from None
    if array.ndim == 0:
        raise refuse("shape", f"Column {name!r} has no rows.", "Give one value per row.", name)
    return array


def _arrays(source: dict[str, Any]) -> Table:
    arrays = {str(name): _numpy(str(name), item) for name, item in source.items()}
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

    return Table({name: _found(a, name) for name, a in arrays.items()}, blocks)


# Frames.


def _no_nulls(name: str, missing: Any) -> None:
    """``missing``: one boolean per row."""
    for row, gone in enumerate(missing, 1):
        if gone:
            raise refuse(
                "missing-value",
                f"Column {name!r}, row {row}: the value is missing.",
                "Fill it in, or remove the row; casemate guesses no values.",
                f"{name}, row {row}",
            )


def _pandas(frame: Any) -> Table:
    names = [str(name) for name in frame.columns]
    _duplicates(names)
    arrays: dict[str, Any] = {}
    for at, name in enumerate(names):
        series = frame.iloc[:, at]
        missing = series.isna()
        # NaN in a float column is not a missing label but a number that is not finite.
        if missing.any() and getattr(series.dtype, "kind", "O") != "f":
            _no_nulls(name, missing)
        kind = getattr(series.dtype, "numpy_dtype", None)  # of nullable columns such as Int64
        arrays[name] = series.to_numpy(dtype=kind) if kind is not None else series.to_numpy()
    return _arrays(arrays)


def _polars(frame: Any) -> Table:
    arrays: dict[str, Any] = {}
    for name in frame.columns:
        series = frame[name]
        if series.null_count():
            _no_nulls(name, series.is_null())
        arrays[name] = series.to_numpy()
    return _arrays(arrays)


# Arrow.


def _arrow_array(name: str, column: Any, first_row: int) -> Any:
    """One chunk as numpy: lists of equal length become a further axis."""
    import pyarrow as pa
    import pyarrow.types as kinds

    if column.null_count:
        missing = (i for i, null in enumerate(column.is_null().to_pylist()) if null)
        row = first_row + next(missing)
        raise refuse(
            "missing-value",
            f"Column {name!r}, row {row}: the value is missing.",
            "Fill it in, or remove the row; casemate guesses no values.",
            f"{name}, row {row}",
        )
    kind = column.type
    if isinstance(column, pa.ExtensionArray):
        return _arrow_array(name, column.storage, first_row)
    if kinds.is_dictionary(kind):
        return _arrow_array(name, column.dictionary_decode(), first_row)
    if kinds.is_fixed_size_list(kind) or kinds.is_list(kind) or kinds.is_large_list(kind):
        lengths = column.value_lengths().to_pylist()
        if len(set(lengths)) > 1:
            at = next(i for i, n in enumerate(lengths) if n != lengths[0])
            raise refuse(
                "shape",
                f"Column {name!r}, row {first_row + at}: {lengths[at]} items where another row has"
                f" {lengths[0]}.",
                "Pad and cut every row to one declared length.",
                f"{name}, row {first_row + at}",
            )
        inner = _arrow_array(name, column.flatten(), first_row)
        return inner.reshape(len(column), lengths[0] if lengths else 0, *inner.shape[1:])
    if kinds.is_decimal(kind):
        column = column.cast(pa.float64())
    return column.to_numpy(zero_copy_only=False)


def _record_batches(batches: Iterator[Any]) -> Iterator[Block]:
    done = 0
    for batch in batches:
        for at in range(0, batch.num_rows, BLOCK_ROWS):
            part = batch.slice(at, BLOCK_ROWS)
            columns = {
                name: _arrow_array(name, part.column(i), done + 1)
                for i, name in enumerate(part.schema.names)
            }
            yield Block(columns, range(done + 1, done + part.num_rows + 1))
            done += part.num_rows


def _peeked(names: Sequence[str], blocks: Callable[[], Iterator[Block]]) -> Table:
    """A table whose kinds are those of its first block."""
    _duplicates(names)
    first = next(blocks(), None)
    if first is None:
        return Table({name: Found("cell") for name in names}, blocks)
    return Table({name: _found(first.columns[name], name) for name in names}, blocks)


def _arrow(table: Any) -> Table:
    def blocks() -> Iterator[Block]:
        batches = table.to_batches() if hasattr(table, "to_batches") else [table]
        return _record_batches(iter(batches))

    return _peeked(list(table.schema.names), blocks)


def _parquet(path: Path) -> Table:
    try:
        import pyarrow as pa
        import pyarrow.parquet as parquet
    except ModuleNotFoundError:
        raise _extra("pyarrow") from None

    def failed(e: Exception) -> DataError:
        return refuse(
            "parquet-form",
            f"{path.name} is no readable Parquet file: {str(e)[:120]}.",
            "Write the file again.",
            str(path),
        )

    def blocks() -> Iterator[Block]:
        try:
            with parquet.ParquetFile(path) as file:
                yield from _record_batches(file.iter_batches(batch_size=BLOCK_ROWS))
        except (pa.ArrowException, OSError) as e:
            raise failed(e) from None

    try:
        names = list(parquet.read_schema(path).names)
    except (pa.ArrowException, OSError) as e:
        raise failed(e) from None
    return _peeked(names, blocks)


# Datasets.


def _hugging_face(dataset: Any) -> Table:
    """Through numpy's format, which decodes images and class labels."""
    names = list(dataset.column_names)

    def blocks() -> Iterator[Block]:
        done = 0
        for part in dataset.with_format("numpy").iter(batch_size=BLOCK_ROWS):
            columns = {name: _stacked(name, part[name], done + 1) for name in names}
            count = len(next(iter(columns.values())))
            yield Block(columns, range(done + 1, done + count + 1))
            done += count

    return _peeked(names, blocks)


def _stacked(name: str, rows: Any, first_row: int) -> Any:
    """Rows of one shape as one array; DataError ``data.shape`` names the first that differs."""
    import numpy as np

    if isinstance(rows, np.ndarray) and rows.dtype.kind != "O":
        return rows
    for i, row in enumerate(rows):
        if row is None:
            _no_nulls(name, [False] * (first_row + i - 1) + [True])
    parts = [_numpy_row(name, row) for row in rows]
    for i, row in enumerate(parts):
        if row.shape != parts[0].shape:
            raise refuse(
                "shape",
                f"Column {name!r}, row {first_row + i}: shape {row.shape} where another row has"
                f" {parts[0].shape}.",
                "Pad, cut or resize every row to one declared shape.",
                f"{name}, row {first_row + i}",
            )
    return np.stack(parts) if parts else np.empty((0,))


def _numpy_row(name: str, row: Any) -> Any:
    return _numpy(name, [row])[0:1].reshape(_numpy(name, [row]).shape[1:])


def _items(source: Any) -> Table:
    """A map-style torch Dataset, or any sequence of rows that are mappings or tuples."""
    try:
        import numpy  # noqa: F401
    except ModuleNotFoundError:
        raise _extra("numpy") from None

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

    return _peeked(list(row(0)) if len(source) else [], blocks)


_READERS: Final[dict[tuple[str, str], Callable[[Any], Table]]] = {
    ("pandas", "DataFrame"): _pandas,
    ("polars", "DataFrame"): _polars,
    ("pyarrow", "Table"): _arrow,
    ("pyarrow", "RecordBatch"): _arrow,
    ("datasets", "Dataset"): _hugging_face,
}
