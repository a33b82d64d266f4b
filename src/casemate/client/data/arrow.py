"""Arrow tables and Parquet files, batch by batch."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Final

from casemate.client.data import footer
from casemate.client.data.columns import Block, refuse
from casemate.client.data.table import BLOCK_ROWS, Table, extra, peeked
from casemate.spec.errors import DataError

# A file that unfolds to more than both of these is a bomb and no table: a constant column of a
# true one takes next to nothing, but then it is small.
MAX_UNFOLDED: Final = 1 << 30
MAX_RATIO: Final = 1000
MAX_NESTED: Final = 6


def arrow_array(name: str, column: Any, first_row: int) -> Any:
    """One chunk as numpy: lists of equal length become a further axis.

    Raises ``data.missing-value``, ``data.shape``, ``data.dtype`` (kinds that are no numbers, words
    or lists of them), ``data.arrow-form``.
    """
    import pyarrow as pa

    try:
        return _array(name, column, first_row, 0)
    except (pa.ArrowException, ValueError, LookupError) as e:
        raise refuse(
            "arrow-form",
            f"Column {name!r} is no sound Arrow column: {str(e)[:120]}.",
            "Write the table again.",
            name,
        ) from None


def _array(name: str, column: Any, first_row: int, depth: int) -> Any:
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
    if isinstance(column, pa.ExtensionArray):  # what its type says is not looked at
        return _array(name, column.storage, first_row, depth)
    if kinds.is_dictionary(kind):
        # Not decoded by Arrow, which writes each word out as often as it occurs.
        column.validate(full=True)
        return _array(name, column.dictionary, first_row, depth)[column.indices.to_numpy()]
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
        if depth == MAX_NESTED:
            message = f"Column {name!r} has lists in lists, more than {MAX_NESTED} deep."
            raise refuse("shape", message, f"Give rows of at most {MAX_NESTED} axes.", name)
        inner = _array(name, column.flatten(), first_row, depth + 1)
        return inner.reshape(len(column), lengths[0] if lengths else 0, *inner.shape[1:])
    if kinds.is_decimal(kind):
        column = column.cast(pa.float64())
    elif not any(is_kind(kind) for is_kind in _plain()):
        message = f"Column {name!r} holds {str(kind)[:80]}, which has no wire form."
        raise refuse("dtype", message, "Convert it to numbers or words, or leave it out.", name)
    return column.to_numpy(zero_copy_only=False)


def _plain() -> Sequence[Callable[[Any], bool]]:
    import pyarrow.types as kinds

    words = (kinds.is_string, kinds.is_large_string, kinds.is_string_view)
    return (kinds.is_integer, kinds.is_floating, kinds.is_boolean, kinds.is_temporal, *words)


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

    try:
        names = list(table.schema.names)
    except UnicodeDecodeError:
        raise refuse(
            "schema", "The name of a column is not UTF-8.", "Give the columns names in UTF-8."
        ) from None
    return peeked(names, blocks)


def parquet_table(path: Path) -> Table:
    try:
        import pyarrow as pa
        import pyarrow.parquet as parquet
    except ModuleNotFoundError:
        raise extra("pyarrow") from None

    unreadable = (pa.ArrowException, OSError, UnicodeDecodeError, footer.FooterError)

    def failed(e: Exception) -> DataError:
        return refuse(
            "parquet-form",
            f"{path.name} is no readable Parquet file: {str(e)[:120]}.",
            "Write the file again.",
            str(path),
        )

    def blocks() -> Iterator[Block]:
        try:
            with parquet.ParquetFile(path, read_dictionary=words) as file:
                yield from _record_batches(file.iter_batches(batch_size=BLOCK_ROWS))
        except unreadable as e:
            raise failed(e) from None

    try:
        with parquet.ParquetFile(path) as file:
            names = list(file.schema_arrow.names)
            words = [f.name for f in file.schema_arrow if pa.types.is_string(f.type)]
        _require_no_bomb(path)
    except unreadable as e:
        raise failed(e) from None
    return peeked(names, blocks)


def _require_no_bomb(path: Path) -> None:
    """Raises ``data.too-large`` by what the file says of itself, before a value is decoded."""
    unfolded, size = footer.unfolded(path), path.stat().st_size
    if unfolded > max(MAX_UNFOLDED, MAX_RATIO * size):
        raise refuse(
            "too-large",
            f"{path.name} has {size} bytes and unfolds to {unfolded}.",
            "Leave out what repeats, or split the table.",
            str(path),
        )
