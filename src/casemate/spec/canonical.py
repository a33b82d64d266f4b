"""Canonical JSON: one value, one sequence of bytes.

UTF-8, keys sorted by code point, no white space, no duplicate keys, integers within ±(2^53 - 1),
finite floats in Python's shortest round-trip form (always with a ``.`` or an exponent, so that
``1`` and ``1.0`` differ). Decoding is strict: bytes that would not be written again exactly so
are refused. It differs from RFC 8785 only in the form of floats and in keeping int and float apart.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
from typing import Final, NoReturn, TypeAlias

from casemate.spec.errors import FormatError

Json: TypeAlias = "bool | int | float | str | list[Json] | dict[str, Json] | None"

MAX_BYTES: Final = 64 << 20
MAX_DEPTH: Final = 64
MAX_VALUES: Final = 1 << 23
MAX_INT: Final = 2**53 - 1
# Brackets that any stack has room for, whatever their depth.
_SAFE_DEPTH: Final = 500
_TEXT: Final = re.compile(rb'"[^"\\]*+(?:\\.[^"\\]*+)*+"', re.DOTALL)
_ALL_BUT_BRACKETS: Final = bytes(set(range(256)) - set(b"[]{}"))


def _refuse(reason: str, message: str) -> NoReturn:
    raise FormatError(
        f"format.{reason}", message, mend="Write it with casemate, in canonical JSON."
    )


def _check(value: object, depth: int = 0) -> None:
    if depth >= MAX_DEPTH and isinstance(value, list | tuple | dict):
        _refuse("too-deep", f"JSON is nested deeper than {MAX_DEPTH}.")
    if value is None or isinstance(value, bool):
        return
    if isinstance(value, int):
        if abs(value) > MAX_INT:
            _refuse("number", "JSON holds an integer outside ±(2^53 - 1).")
    elif isinstance(value, float):
        if not math.isfinite(value):
            _refuse("number", "JSON holds a number that is not finite.")
    elif isinstance(value, str):
        if not value.isascii() and any(0xD800 <= ord(c) <= 0xDFFF for c in value):
            _refuse("unicode", "A string holds a lone surrogate.")
    elif isinstance(value, list | tuple):
        for item in value:
            _check(item, depth + 1)
    elif isinstance(value, dict):
        for key, item in value.items():
            if not isinstance(key, str):
                _refuse("key", f"A key is {type(key).__name__}, not a string.")
            _check(key)
            _check(item, depth + 1)
    else:
        _refuse("type", f"A value of type {type(value).__name__} has no JSON form.")


def encode(value: object) -> bytes:
    """``value`` (None, bool, int, float, str, list or tuple, dict) as canonical bytes."""
    _check(value)
    text = json.dumps(
        value, ensure_ascii=False, allow_nan=False, sort_keys=True, separators=(",", ":")
    )
    return text.encode("utf-8")


def _is_deep(data: bytes) -> bool:
    """Whether brackets are nested deeper than twice :data:`MAX_DEPTH`, or do not match."""
    left = _TEXT.sub(b"", data).translate(None, _ALL_BUT_BRACKETS)
    for _ in range(MAX_DEPTH):
        left = left.replace(b"[]", b"").replace(b"{}", b"")
    return bool(left)


def _pairs(pairs: list[tuple[str, Json]]) -> dict[str, Json]:
    out = dict(pairs)
    if len(out) != len(pairs):
        _refuse("duplicate-key", "A JSON object has the same key twice.")
    return out


def _constant(name: str) -> NoReturn:
    _refuse("number", f"JSON holds {name}.")


def decode(data: bytes, *, limit: int = MAX_BYTES, values: int = MAX_VALUES) -> Json:
    """The value of canonical bytes; anything else raises ``FormatError``.

    ``limit`` is the largest size in bytes; ``values`` bounds the commas and opening brackets, and
    so the values, before any is made: each takes far more memory and time than its bytes.
    """
    if len(data) > limit:
        _refuse("too-large", f"{len(data)} bytes of JSON where {limit} are allowed.")
    if sum(map(data.count, (b",", b"[", b"{"))) > values:
        _refuse("too-large", f"JSON of more than {values} values.")
    # Not left to Python's limit of recursion, which a program may have raised past its stack.
    if data.count(b"[") + data.count(b"{") > _SAFE_DEPTH and _is_deep(data):
        _refuse("too-deep", f"JSON is nested deeper than {MAX_DEPTH}.")
    try:
        text = data.decode("utf-8")
        value: Json = json.loads(text, object_pairs_hook=_pairs, parse_constant=_constant)
        again = encode(value)
    except FormatError:
        raise
    except RecursionError:  # of a caller that is deep itself
        _refuse("too-deep", f"JSON is nested deeper than {MAX_DEPTH}.")
    except ValueError as e:
        _refuse("json", f"The bytes are no JSON: {str(e)[:120]}.")
    if again != data:
        _refuse("not-canonical", "The JSON is not in canonical form.")
    return value


def digest(value: object) -> str:
    """SHA-256 of the canonical bytes, as ``sha256:<hex>``."""
    return "sha256:" + hashlib.sha256(encode(value)).hexdigest()
