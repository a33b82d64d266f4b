"""Arrow tables and Parquet files, batch by batch."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from casemate.client.data.columns import Block, refuse
from casemate.client.data.table import BLOCK_ROWS, Table, extra, peeked
from casemate.spec.errors import DataError


def arrow_array(name: str, column: Any, first_row: int) -> Any:
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
        return arrow_array(name, column.storage, first_row)
    if kinds.is_dictionary(kind):
        return arrow_array(name, column.dictionary_decode(), first_row)
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
        inner = arrow_array(name, column.flatten(), first_row)
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
                name: arrow_array(name, part.column(i), done + 1)
                for i, name in enumerate(part.schema.names)
            }
            yield Block(columns, range(done + 1, done + part.num_rows + 1))
            done += part.num_rows


def arrow_table(table: Any) -> Table:
    def blocks() -> Iterator[Block]:
        batches = table.to_batches() if hasattr(table, "to_batches") else [table]
        return _record_batches(iter(batches))

    return peeked(list(table.schema.names), blocks)


def parquet_table(path: Path) -> Table:
    try:
        import pyarrow as pa
        import pyarrow.parquet as parquet
    except ModuleNotFoundError:
        raise extra("pyarrow") from None

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
    return peeked(names, blocks)
