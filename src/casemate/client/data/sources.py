"""Whatever an owner holds, as a table. A source is known by its type's name, so that nothing is
imported but what it needs."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Final

from casemate.client.data import arrays, arrow
from casemate.client.data.columns import refuse
from casemate.client.data.csvfile import csv_table
from casemate.client.data.table import Table, no_duplicates


def open_source(source: Any) -> Table:
    """The table of a path, frame, Arrow table, dataset, or arrays.

    Raises DataError ``data.source`` for anything else, UsageError ``usage.extra`` when the package
    that reads it is not installed.
    """
    if isinstance(source, str | os.PathLike):
        return _path(Path(source))
    names = [(kind.__module__.split(".")[0], kind.__name__) for kind in type(source).__mro__]
    for name in names:
        if name in _READERS:
            return _READERS[name](source)
    if isinstance(source, Mapping):
        no_duplicates([str(name) for name in source])
        return arrays.arrays_table({str(name): item for name, item in source.items()})
    if isinstance(source, tuple) and len(source) == 2:
        return arrays.arrays_table({"x": source[0], "y": source[1]})
    if names[0][0] == "numpy":
        return arrays.arrays_table({"x": source})
    rows = hasattr(source, "__getitem__") and hasattr(source, "__len__")
    if rows and names[0][0] not in _NO_ROWS and not isinstance(source, bytes | bytearray):
        return arrays.items_table(source)
    raise refuse(
        "source",
        f"A {type(source).__module__}.{type(source).__name__} is no source of rows.",
        "Give a CSV or Parquet path, a frame, an Arrow table, a dataset with a length, or arrays.",
    )


def require_file(path: Path) -> None:
    """Raises DataError ``data.source``; a pipe or a device, which has no end, is no file."""
    if not path.is_file():
        raise refuse("source", f"There is no file {path}.", "Name an existing file.", str(path))


def _path(path: Path) -> Table:
    require_file(path)
    suffix = path.suffix.lower()
    if suffix == ".csv":
        return csv_table(path)
    if suffix in (".parquet", ".pq"):
        return arrow.parquet_table(path)
    raise refuse(
        "source",
        f"The kind of {path.name} is unknown.",
        "Name a file that ends in .csv or .parquet, or load it and give the frame.",
        str(path),
    )


def _splits(splits: Any) -> Table:
    names = ", ".join(map(repr, splits))
    raise refuse(
        "source", f"These are several datasets: {names}.", "Give one of them, dataset[name]."
    )


_NO_ROWS: Final = frozenset({"pandas", "polars", "pyarrow"})  # but for those that are read below
_READERS: Final[dict[tuple[str, str], Callable[[Any], Table]]] = {
    ("pandas", "DataFrame"): arrays.pandas_table,
    ("polars", "DataFrame"): arrays.polars_table,
    ("pyarrow", "Table"): arrow.arrow_table,
    ("pyarrow", "RecordBatch"): arrow.arrow_table,
    ("datasets", "Dataset"): arrays.hugging_face_table,
    ("datasets", "DatasetDict"): _splits,
}
