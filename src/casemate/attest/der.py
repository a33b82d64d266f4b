"""A strict reader of DER (ITU-T X.690 section 10): one way to write each value, nothing left over.

Errors are :class:`DerError`, a ValueError, which callers turn into their own.
"""

from __future__ import annotations

import re
from datetime import UTC, datetime
from typing import Final

BOOLEAN: Final = 0x01
INTEGER: Final = 0x02
BIT_STRING: Final = 0x03
OCTET_STRING: Final = 0x04
NULL: Final = 0x05
OID: Final = 0x06
UTF8_STRING: Final = 0x0C
PRINTABLE_STRING: Final = 0x13
IA5_STRING: Final = 0x16
UTC_TIME: Final = 0x17
GENERALIZED_TIME: Final = 0x18
SEQUENCE: Final = 0x30
SET: Final = 0x31


def context(number: int, *, constructed: bool = True) -> int:
    """The tag byte of ``[number]``."""
    return (0xA0 if constructed else 0x80) | number


class DerError(ValueError):
    """Bytes that are no DER, or not of the expected type."""


class Reader:
    """Reads elements one after another; :meth:`end` says that nothing is left."""

    def __init__(self, data: bytes) -> None:
        self._data = data
        self._at = 0

    def __bool__(self) -> bool:
        return self._at < len(self._data)

    def peek(self) -> int:
        """The next tag, or -1 at the end."""
        return self._data[self._at] if self else -1

    def element(self) -> tuple[int, bytes, bytes]:
        """The next (tag, content, whole encoding)."""
        data, start = self._data, self._at
        if len(data) - start < 2:
            raise DerError("an element is cut short")
        tag, length, at = data[start], data[start + 1], start + 2
        if tag & 0x1F == 0x1F:
            raise DerError("a tag of more than one byte")
        if length >= 0x80:
            size = length & 0x7F
            if not 1 <= size <= 4 or len(data) - at < size:
                raise DerError("an impossible length")
            length = int.from_bytes(data[at : at + size], "big")
            if length < 0x80 or length >> (8 * (size - 1)) == 0:
                raise DerError("a length that is not in its shortest form")
            at += size
        if len(data) - at < length:
            raise DerError("an element is cut short")
        self._at = at + length
        return tag, data[at : self._at], data[start : self._at]

    def read(self, tag: int) -> bytes:
        """The content of the next element, which must have ``tag``."""
        found, content, _ = self.element()
        if found != tag:
            raise DerError(f"tag 0x{found:02x} where 0x{tag:02x} was expected")
        return content

    def raw(self, tag: int) -> bytes:
        """The whole encoding of the next element, which must have ``tag``."""
        found, _, whole = self.element()
        if found != tag:
            raise DerError(f"tag 0x{found:02x} where 0x{tag:02x} was expected")
        return whole

    def enter(self, tag: int = SEQUENCE) -> Reader:
        """A reader of the content of the next element."""
        return Reader(self.read(tag))

    def end(self) -> None:
        if self:
            raise DerError("bytes are left over")


def only(data: bytes, tag: int) -> bytes:
    """The content of the single element that ``data`` is."""
    reader = Reader(data)
    content = reader.read(tag)
    reader.end()
    return content


def integer(content: bytes) -> int:
    """An INTEGER's value from its content."""
    if not content or (
        len(content) > 1 and content[0] in (0x00, 0xFF) and (content[0] ^ content[1]) < 0x80
    ):
        raise DerError("an integer that is not in its shortest form")
    return int.from_bytes(content, "big", signed=True)


def boolean(content: bytes) -> bool:
    if content not in (b"\x00", b"\xff"):
        raise DerError("a boolean that is neither 00 nor ff")
    return content == b"\xff"


def bits(content: bytes) -> bytes:
    """A BIT STRING of whole bytes."""
    if not content or content[0] != 0:
        raise DerError("a bit string that is not of whole bytes")
    return content[1:]


def oid(content: bytes) -> str:
    """An OBJECT IDENTIFIER in dotted form."""
    if not content or len(content) > 64 or content[-1] & 0x80:
        raise DerError("an impossible object identifier")
    arcs: list[int] = []
    value = 0
    fresh = True
    for byte in content:
        if fresh and byte == 0x80:
            raise DerError("an object identifier that is not in its shortest form")
        value = value << 7 | byte & 0x7F
        fresh = not byte & 0x80
        if fresh:
            arcs.append(value)
            value = 0
    first = min(arcs[0] // 40, 2)
    return ".".join(map(str, (first, arcs[0] - 40 * first, *arcs[1:])))


def text(tag: int, content: bytes) -> str:
    """A string of the kinds that certificates' names are made of."""
    try:
        if tag == UTF8_STRING:
            return content.decode("utf-8")
        if tag in (PRINTABLE_STRING, IA5_STRING):
            return content.decode("ascii")
    except UnicodeDecodeError:
        raise DerError("a string with impossible characters") from None
    raise DerError(f"tag 0x{tag:02x} where a string was expected")


def time(tag: int, content: bytes) -> float:
    """Unix seconds of a UTCTime or GeneralizedTime as RFC 5280 section 4.1.2.5 admits them."""
    digits = {UTC_TIME: 12, GENERALIZED_TIME: 14}.get(tag)
    if digits is None or not re.fullmatch(rb"[0-9]{%d}Z" % digits, content):
        raise DerError("a time that is not in the form of RFC 5280")
    written = content[:-1].decode()
    if tag == UTC_TIME:
        written = ("19" if written[:2] >= "50" else "20") + written
    try:
        return datetime.strptime(written, "%Y%m%d%H%M%S").replace(tzinfo=UTC).timestamp()
    except ValueError:
        raise DerError("a time that is none") from None
