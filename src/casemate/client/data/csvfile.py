"""CSV (RFC 4180), strictly: a header, as many cells in every row, UTF-8. No package is needed."""

from __future__ import annotations

import csv
import itertools
from collections.abc import Iterator
from pathlib import Path

from casemate.client.data.columns import Block, refuse
from casemate.client.data.table import BLOCK_ROWS, Found, Table, no_duplicates
from casemate.spec.errors import DataError


def _csv_error(path: Path, reason: str, line: int, message: str, mend: str) -> DataError:
    return refuse(reason, f"{path.name}, line {line}: {message}.", mend, f"{path.name}:{line}")


def _bad_encoding(path: Path) -> DataError:
    """Names the first line that is not UTF-8; text is decoded far ahead of the rows."""
    line, what = 1, "the file"
    for number, raw in enumerate(path.read_bytes().splitlines(keepends=True), 1):
        try:
            raw.decode("utf-8")
        except UnicodeDecodeError as e:
            line, what = number, f"the byte 0x{raw[e.start]:02x}"
            break
    return _csv_error(path, "csv-encoding", line, f"{what} is not UTF-8", "Save the file as UTF-8.")


def _csv_rows(path: Path) -> Iterator[tuple[int, list[str]]]:
    """(line, cells) of each record; the line is the one on which the record ends."""
    line = 0
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            reader = csv.reader(file, strict=True)
            for row in reader:
                line = reader.line_num
                yield line, row
    except UnicodeDecodeError:
        raise _bad_encoding(path) from None
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


def csv_table(path: Path) -> Table:
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
    no_duplicates(names)

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
