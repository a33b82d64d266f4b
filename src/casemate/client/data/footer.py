"""What a Parquet file's footer says of the sizes of its columns.

Source: parquet-format (FileMetaData, RowGroup, ColumnChunk, ColumnMetaData) in Thrift's compact
protocol. pyarrow aborts the whole process where it is asked for the metadata of a column that is
malformed (its size statistics, say); so what is needed before it may decode is read here.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Final

MAGIC: Final = b"PAR1"
MOST: Final = 16 << 20  # bytes of footer
_DEPTH: Final = 16

# Thrift's compact types.
_TRUE, _FALSE, _BYTE, _I16, _I32, _I64, _DOUBLE, _BINARY, _LIST, _SET, _MAP, _STRUCT = range(1, 13)
# Field numbers of parquet-format.
_ROW_GROUPS: Final = 4
_COLUMNS: Final = 1
_META_DATA: Final = 3
_NUM_VALUES: Final = 5
_UNCOMPRESSED: Final = 6


class FooterError(ValueError):
    """The bytes are no footer of Parquet."""


class _Compact:
    def __init__(self, data: bytes) -> None:
        self._data, self._at = data, 0

    def take(self, count: int) -> bytes:
        part = self._data[self._at : self._at + count]
        if len(part) != count:
            raise FooterError("the footer is cut off")
        self._at += count
        return part

    def varint(self) -> int:
        found = 0
        for place in range(10):
            byte = self.take(1)[0]
            found |= (byte & 0x7F) << 7 * place
            if byte < 0x80:
                return found
        raise FooterError("a number of the footer is too long")

    def value(self, kind: int, depth: int = 0) -> Any:
        """Numbers, lists, and structs as field number to value; of the rest only the place."""
        if depth > _DEPTH:
            raise FooterError("the footer is nested too deep")
        if kind in (_TRUE, _FALSE):
            return kind == _TRUE
        if kind in (_I16, _I32, _I64):
            found = self.varint()
            return found >> 1 ^ -(found & 1)
        if kind in (_BYTE, _DOUBLE, _BINARY):
            self.take({_BYTE: 1, _DOUBLE: 8}.get(kind) or self.varint())
            return None
        if kind in (_LIST, _SET):
            head = self.take(1)[0]
            count = head >> 4 if head >> 4 < 15 else self.varint()
            return [self._item(head & 15, depth) for _ in range(self._bounded(count))]
        if kind == _MAP:
            if count := self._bounded(self.varint()):
                kinds = self.take(1)[0]
                for _ in range(count):
                    self._item(kinds >> 4, depth)
                    self._item(kinds & 15, depth)
            return None
        if kind == _STRUCT:
            return self._struct(depth)
        raise FooterError("the footer holds a value of no known type")

    def _bounded(self, count: int) -> int:
        if count > len(self._data) - self._at:  # each item has a byte at least
            raise FooterError("a list of the footer is cut off")
        return count

    def _item(self, kind: int, depth: int) -> Any:
        return self.value(_BYTE if kind in (_TRUE, _FALSE) else kind, depth + 1)

    def _struct(self, depth: int) -> dict[int, Any]:
        fields: dict[int, Any] = {}
        number = 0
        while head := self.take(1)[0]:
            number = number + (head >> 4) if head >> 4 else self.value(_I16)
            fields[number] = self.value(head & 15, depth + 1)
        return fields


def _footer(path: Path) -> bytes:
    with path.open("rb") as file:
        size = file.seek(0, 2)
        if size < 12:
            raise FooterError("the file is too short")
        file.seek(size - 8)
        tail = file.read(8)
        count = int.from_bytes(tail[:4], "little")
        if tail[4:] != MAGIC or count > min(MOST, size - 12):
            raise FooterError("the file does not end in a footer")
        file.seek(size - 8 - count)
        return file.read(count)


def unfolded(path: Path) -> int:
    """Bytes that the columns take once they are decoded, as the footer has it: 8 a value, or the
    uncompressed pages, whichever is more. Raises :class:`FooterError`, ``OSError``."""
    total = 0
    try:
        for group in _Compact(_footer(path)).value(_STRUCT)[_ROW_GROUPS]:
            for chunk in group[_COLUMNS]:
                of = chunk[_META_DATA]
                total += max(8 * int(of[_NUM_VALUES]), int(of[_UNCOMPRESSED]), 0)
    except (KeyError, TypeError):
        raise FooterError("the footer lacks a field") from None
    return total
