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
_MOST_DECIMAL: Final = 32  # bytes of a decimal


def arrow_array(name: str, column: Any, first_row: int) -> Any:
    """An array, or chunks of one, as numpy: lists of equal length become a further axis.

    Raises ``data.missing-value``, ``data.shape``, ``data.dtype`` (kinds that are no numbers, words
    or lists of them), ``data.arrow-form``.
    """
    import pyarrow as pa

    try:
        # Arrow believes what a column says of itself: of offsets past its end it makes a word of
        # whatever lies there in memory.
        column.validate(full=True)
        whole = column.combine_chunks() if isinstance(column, pa.ChunkedArray) else column
        return _array(name, whole, first_row, 0)
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

    kind = column.type
    if column.null_count:
        # Nulls of no kind are as many as one likes in no memory.
        missing = 0 if kinds.is_null(kind) else column.is_null().index(True).as_py()
        row = first_row + missing
        raise refuse(
            "missing-value",
            f"Column {name!r}, row {row}: the value is missing.",
            "Fill it in, or remove the row; casemate guesses no values.",
            f"{name}, row {row}",
        )
    if isinstance(column, pa.ExtensionArray):  # what its type says is not looked at
        return _array(name, column.storage, first_row, depth)
    if kinds.is_dictionary(kind):
        # Not decoded by Arrow, which writes each word out as often as it occurs. A list that is
        # kept once would be written out here.
        words = _array(name, column.dictionary, first_row, depth)
        if words.ndim > 1:
            raise no_wire_form(name, kind)
        return words[column.indices.to_numpy()]
    if kinds.is_fixed_size_list(kind) or kinds.is_list(kind) or kinds.is_large_list(kind):
        size = _list_size(name, column, first_row)
        if depth == MAX_NESTED:
            message = f"Column {name!r} has lists in lists, more than {MAX_NESTED} deep."
            raise refuse("shape", message, f"Give rows of at most {MAX_NESTED} axes.", name)
        inner = _array(name, column.flatten(), first_row, depth + 1)
        return inner.reshape(len(column), size, *inner.shape[1:])
    if kinds.is_decimal(kind):
        column = column.cast(pa.float64())
    elif not any(is_kind(kind) for is_kind in _plain()):
        raise no_wire_form(name, kind)
    return column.to_numpy(zero_copy_only=False)


def _list_size(name: str, column: Any, first_row: int) -> int:
    """Of lists of one length that length. Raises ``data.shape``."""
    import pyarrow.types as kinds

    if kinds.is_fixed_size_list(column.type):
        return int(column.type.list_size)
    lengths = column.value_lengths().to_numpy()
    if (differ := lengths != lengths[:1]).any():
        at = int(differ.argmax())
        raise refuse(
            "shape",
            f"Column {name!r}, row {first_row + at}: {lengths[at]} items where another row has"
            f" {lengths[0]}.",
            "Pad and cut every row to one declared length.",
            f"{name}, row {first_row + at}",
        )
    return int(lengths[0]) if len(lengths) else 0


def no_wire_form(name: str, kind: Any) -> DataError:
    """Of a column whose kind is no number, word or list of numbers."""
    message = f"Column {name!r} holds {str(kind)[:80]}, which has no wire form."
    return refuse("dtype", message, "Convert it to numbers or words, or leave it out.", name)


def _plain() -> Sequence[Callable[[Any], bool]]:
    """No views: many may show the same bytes, and each is written out."""
    import pyarrow.types as kinds

    words = (kinds.is_string, kinds.is_large_string)
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
    import pyarrow as pa

    def blocks() -> Iterator[Block]:
        batches = table.to_batches() if hasattr(table, "to_batches") else [table]
        return _record_batches(iter(batches))

    try:
        table.validate()  # columns of one length: Arrow ends the process at a slice past one's end
        names = list(table.schema.names)
    except pa.ArrowException as e:
        raise refuse(
            "arrow-form", f"This is no sound Arrow table: {str(e)[:120]}.", "Write the table again."
        ) from None
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
            words = [f.name for f in file.schema_arrow if _is_words(f.type)]
            _require_words_apart(file.schema, words)
        _require_no_bomb(path)
    except unreadable as e:
        raise failed(e) from None
    return peeked(names, blocks)


def _is_words(kind: Any) -> bool:
    import pyarrow.types as kinds

    kind = kind.value_type if kinds.is_dictionary(kind) else kind
    return bool(kinds.is_string(kind) or kinds.is_large_string(kind) or kinds.is_string_view(kind))


def _require_words_apart(schema: Any, words: Sequence[str]) -> None:
    """Raises ``data.dtype`` for octets anywhere but in a column of words: those alone can be read
    so that what the file has once is in memory once."""
    for leaf in map(schema.column, range(len(schema))):
        octets = leaf.physical_type == "BYTE_ARRAY" and leaf.path not in words
        if octets or (leaf.physical_type == "FIXED_LEN_BYTE_ARRAY" and leaf.length > _MOST_DECIMAL):
            raise no_wire_form(leaf.path, leaf.physical_type)


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
