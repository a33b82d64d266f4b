"""A strict reader of CBOR (RFC 8949), of what signed evidence is made of and no more.

Read are integers, byte and text strings, arrays, maps, tags where asked for, false, true and null.
Every length and integer is in its shortest form (section 4.2.1), a map has no key twice, its keys
are integers or text, and nothing follows the one item. Floating point, other simple values and
strings in chunks are refused; arrays and maps of indefinite length too, unless their producer is
known to write them. Order of keys is not looked at: producers differ.

Errors are :class:`CborError`, a ValueError, which callers turn into their own.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Final, TypeAlias, Union

MAX_DEPTH: Final = 16
MAX_ITEMS: Final = 4096

_UNSIGNED, _NEGATIVE, _BYTES, _TEXT, _ARRAY, _MAP, _TAG, _SIMPLE = range(8)
_SIMPLE_VALUES: Final = {20: False, 21: True, 22: None}
_INDEFINITE: Final = 31
_BREAK: Final = 0xFF


class CborError(ValueError):
    """Bytes that are no CBOR, or not in the one admitted form."""


@dataclass(frozen=True)
class Tag:
    """A tagged item, its meaning left to the reader."""

    number: int
    value: Value


# Maps are dicts, arrays tuples.
Value: TypeAlias = Union[
    int, bytes, str, bool, Tag, "tuple[Value, ...]", "dict[int | str, Value]", None
]


class _Reader:
    def __init__(self, data: bytes, *, indefinite: bool, tags: bool) -> None:
        self._data = data
        self._indefinite = indefinite
        self._tags = tags
        self._at = 0
        self._items = 0

    def _take(self, size: int) -> bytes:
        if size > len(self._data) - self._at:
            raise CborError("an item is cut short")
        start, self._at = self._at, self._at + size
        return self._data[start : self._at]

    def _head(self) -> tuple[int, int | None]:
        """Major type and argument; None for an indefinite length."""
        initial = self._take(1)[0]
        major, info = initial >> 5, initial & 0x1F
        if info < 24:
            return major, info
        if info == _INDEFINITE:
            if major not in (_ARRAY, _MAP) or not self._indefinite:
                raise CborError("an indefinite length, or a break outside of one")
            return major, None
        if info > 27:
            raise CborError("a reserved length")
        size = 1 << (info - 24)
        argument = int.from_bytes(self._take(size), "big")
        if argument < 24 or (size > 1 and argument >> (4 * size) == 0):
            raise CborError("a number that is not in its shortest form")
        return major, argument

    def _count(self, count: int | None) -> Iterator[None]:
        """Once for each entry of an array or map."""
        if count is not None:
            # An entry has a byte at least, so that no count outruns the data.
            if count > len(self._data) - self._at:
                raise CborError("an item is cut short")
            yield from (None for _ in range(count))
            return
        while self._data[self._at : self._at + 1] != bytes([_BREAK]):
            yield None
        self._at += 1

    def item(self, depth: int = 0) -> Value:
        self._items += 1
        if depth > MAX_DEPTH or self._items > MAX_ITEMS:
            raise CborError("more or deeper items than evidence has")
        major, argument = self._head()
        if major == _ARRAY:
            return tuple(self.item(depth + 1) for _ in self._count(argument))
        if major == _MAP:
            return self._map(argument, depth + 1)
        if argument is None:
            raise CborError("an indefinite length")
        match major:
            case 0:
                return argument
            case 1:
                return -1 - argument
            case 2:
                return self._take(argument)
            case 3:
                try:
                    return self._take(argument).decode()
                except UnicodeDecodeError:
                    raise CborError("text that is not UTF-8") from None
            case 6 if self._tags:
                return Tag(argument, self.item(depth + 1))
            case 7 if argument in _SIMPLE_VALUES:
                return _SIMPLE_VALUES[argument]
        raise CborError("a tag" if major == _TAG else "floating point or another simple value")

    def _map(self, count: int | None, depth: int) -> dict[int | str, Value]:
        out: dict[int | str, Value] = {}
        for _ in self._count(count):
            key = self.item(depth)
            if not isinstance(key, int | str) or isinstance(key, bool):
                raise CborError("a key that is neither an integer nor text")
            if key in out:
                raise CborError(f"the key {str(key)[:40]!r} stands twice")
            out[key] = self.item(depth)
        return out

    def end(self) -> None:
        if self._at != len(self._data):
            raise CborError("bytes are left over")


def decode(data: bytes, *, indefinite: bool = False, tags: bool = False) -> Value:
    """The one item that ``data`` is. Raises CborError.

    indefinite: whether arrays and maps may be of indefinite length; tags: whether items may be
    tagged (then they are :class:`Tag`).
    """
    reader = _Reader(data, indefinite=indefinite, tags=tags)
    value = reader.item()
    reader.end()
    return value


NULL: Final = b"\xf6"


def _encoded_head(major: int, argument: int) -> bytes:
    if argument < 24:
        return bytes([major << 5 | argument])
    power = next(n for n in range(4) if argument >> (8 << n) == 0)
    return bytes([major << 5 | 24 + power]) + argument.to_bytes(1 << power, "big")


def byte_string(data: bytes) -> bytes:
    """``data`` as an item."""
    return _encoded_head(_BYTES, len(data)) + data


def text_string(text: str) -> bytes:
    """``text`` as an item."""
    data = text.encode()
    return _encoded_head(_TEXT, len(data)) + data


def array(*items: bytes) -> bytes:
    """An array of items that are encoded already."""
    return _encoded_head(_ARRAY, len(items)) + b"".join(items)


def mapping(entries: Mapping[str, bytes]) -> bytes:
    """A map of text keys to encoded values, in their order."""
    return _encoded_head(_MAP, len(entries)) + b"".join(
        text_string(key) + item for key, item in entries.items()
    )
