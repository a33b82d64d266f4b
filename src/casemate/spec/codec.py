"""Frozen dataclasses to canonical JSON and back, strictly.

A shared format is a frozen, keyword-only dataclass marked with :func:`value`, which gives it a
versioned name. Its JSON object holds ``"type": "<name>/v<n>"`` and every field, none more; those
that joined it later stand there only where they are not at their default. Field types are those of
:data:`Json` scalars, ``bytes`` (unpadded base64url), ``tuple[X, ...]``, ``dict[str, X]``,
``X | None``, ``Literal`` and other values. Checks beyond types belong in ``__post_init__`` and
raise a ``CasemateError`` or ``ValueError``.
"""

from __future__ import annotations

import base64
import binascii
import dataclasses
import functools
import math
import re
import types
import typing
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Final, Literal, TypeVar, Union, dataclass_transform, get_args, get_origin

from casemate.spec import canonical
from casemate.spec.canonical import Json
from casemate.spec.errors import CasemateError, FormatError

T = TypeVar("T")

_REGISTRY: Final[dict[str, type]] = {}


@dataclass_transform(frozen_default=True, kw_only_default=True)
def value(name: str, *, later: Sequence[str] = ()) -> Callable[[type[T]], type[T]]:
    """Make a class a shared format under ``name``, such as ``policy/v1``.

    later: fields that the format has got since it was first written. At its default such a field is
    left out, so that what was written before keeps its bytes and its digest; a decoder that does
    not know it refuses any other value of it.

    A whole number given for a float field becomes a float, since the wire keeps the two apart.
    """

    def mark(cls: type[T]) -> type[T]:
        check = cls.__dict__.get("__post_init__")

        def post_init(self: T) -> None:
            for field in _float_fields(typing.cast(Any, type(self))):
                if type(given := getattr(self, field)) is int:
                    object.__setattr__(self, field, float(given))
            if check is not None:
                check(self)

        cls.__post_init__ = post_init  # type: ignore[attr-defined]
        made = dataclasses.dataclass(frozen=True, kw_only=True, slots=True)(cls)
        made.__casemate_type__ = name  # type: ignore[attr-defined]
        defaults = {f.name: f.default for f in dataclasses.fields(typing.cast(Any, made))}
        made.__casemate_later__ = {n: defaults[n] for n in later}  # type: ignore[attr-defined]
        if dataclasses.MISSING in (defaults[n] for n in later):
            raise ValueError(f"a field that joined {name} later needs a default")
        if name in _REGISTRY:
            raise ValueError(f"two formats are called {name}")
        _REGISTRY[name] = made
        return made

    return mark


def registered() -> dict[str, type]:
    """Every shared format by name; each must have a golden file."""
    return dict(_REGISTRY)


def later_fields(kind: type | object) -> Mapping[str, object]:
    """Fields that joined a format later, with their defaults."""
    found: Mapping[str, object] = typing.cast(Any, kind).__casemate_later__
    return found


def warm() -> None:
    """Resolve every format's field types now, since that compiles code: for a process that is about
    to forbid it."""
    for cls in _REGISTRY.values():
        _hints(cls)


@functools.cache
def _hints(cls: type) -> dict[str, Any]:
    return typing.get_type_hints(cls)


@functools.cache
def _float_fields(cls: type) -> tuple[str, ...]:
    return tuple(name for name, hint in _hints(cls).items() if hint in (float, float | None))


def to_json(item: object) -> Json:
    """The JSON form of a value, of a container of values, or of a scalar."""
    if item is None or isinstance(item, bool | int | float | str):
        return item
    if isinstance(item, bytes):
        return base64.urlsafe_b64encode(item).decode().rstrip("=")
    if isinstance(item, tuple | list):
        return [to_json(x) for x in item]
    if isinstance(item, dict):
        return {k: to_json(v) for k, v in item.items()}
    name = getattr(type(item), "__casemate_type__", None)
    if name is None:
        raise TypeError(f"{type(item).__name__} is no shared format")
    out: dict[str, Json] = {"type": name}
    joined = later_fields(item)
    for field in dataclasses.fields(item):  # type: ignore[arg-type]
        given = getattr(item, field.name)
        if field.name not in joined or given != joined[field.name]:
            out[field.name] = to_json(given)
    return out


def encode(item: object) -> bytes:
    """Canonical bytes of a value."""
    return canonical.encode(to_json(item))


def digest(item: object) -> str:
    """``sha256:<hex>`` over the canonical bytes of a value."""
    return canonical.digest(to_json(item))


def _bad(where: str, message: str) -> FormatError:
    return FormatError(
        "format.field",
        f"{where or 'The value'} {message}.",
        mend="Send the documented form of this version.",
        where=where,
    )


def _scalar(kind: type, data: Json, where: str) -> object:
    # bool is an int in Python; the formats keep them apart.
    if kind is bytes:
        if not isinstance(data, str) or not re.fullmatch(r"[A-Za-z0-9_-]*", data):
            raise _bad(where, "is not base64url")
        try:
            raw = base64.urlsafe_b64decode(data + "=" * (-len(data) % 4))
        except (binascii.Error, ValueError):
            raise _bad(where, "is not base64url") from None
        if to_json(raw) != data:
            raise _bad(where, "is not canonical base64url")
        return raw
    if type(data) is not kind:
        raise _bad(where, f"is not of type {kind.__name__}")
    if kind is float and not math.isfinite(typing.cast(float, data)):
        raise _bad(where, "is not finite")
    return data


def _decode(hint: Any, data: Json, where: str) -> Any:
    origin = get_origin(hint)
    if origin is Literal:
        for choice in get_args(hint):
            if type(data) is type(choice) and data == choice:
                return choice
        raise _bad(where, f"is not one of {', '.join(map(repr, get_args(hint)))}")
    if origin in (Union, types.UnionType):
        kinds = get_args(hint)
        if data is None:
            if type(None) in kinds:
                return None
            raise _bad(where, "is missing")
        rest = [k for k in kinds if k is not type(None)]
        if len(rest) == 1:
            return _decode(rest[0], data, where)
        if isinstance(data, dict):
            for kind in rest:
                if getattr(kind, "__casemate_type__", None) == data.get("type"):
                    return _decode(kind, data, where)
        else:
            for kind in rest:
                if isinstance(kind, type) and type(data) is kind:
                    return _decode(kind, data, where)
        raise _bad(where, "is of none of the admitted types")
    if origin is tuple:
        if not isinstance(data, list):
            raise _bad(where, "is not a list")
        item = get_args(hint)[0]
        return tuple(_decode(item, x, f"{where}[{i}]") for i, x in enumerate(data))
    if origin is dict:
        if not isinstance(data, dict):
            raise _bad(where, "is not an object")
        item = get_args(hint)[1]
        return {k: _decode(item, v, f"{where}.{k}"[:200]) for k, v in data.items()}
    if hasattr(hint, "__casemate_type__"):
        return from_json(hint, data, where=where)
    if hint in (bool, int, float, str, bytes):
        return _scalar(hint, data, where)
    raise TypeError(f"{hint!r} cannot stand in a shared format")


def from_json(cls: type[T], data: Json, *, where: str = "") -> T:
    """The value of class ``cls`` that ``data`` spells; ``FormatError`` for anything else."""
    name = getattr(cls, "__casemate_type__", None)
    if name is None:
        raise TypeError(f"{cls.__name__} is no shared format")
    if not isinstance(data, dict):
        raise _bad(where, "is not an object")
    if data.get("type") != name:
        raise FormatError(
            "format.version",
            f"A {name} was expected, {str(data.get('type'))[:60]!r} came.",
            mend="Use a client and a server of matching versions.",
            where=where,
        )
    hints = _hints(typing.cast(Any, cls))
    names = [f.name for f in dataclasses.fields(cls)]  # type: ignore[arg-type]
    for key in data:
        if key != "type" and key not in names:
            raise _bad(f"{where}.{key}"[:200].lstrip("."), "is not a field of this version")
    fields, joined = {}, later_fields(cls)
    for key in names:
        if key not in data and key in joined:
            continue
        at = f"{where}.{key}".lstrip(".")
        if key not in data:
            raise _bad(at, "is missing")
        fields[key] = _decode(hints[key], data[key], at)
        if key in joined and fields[key] == joined[key]:
            raise _bad(at, "stands there although it has its default")
    try:
        return cls(**fields)
    except CasemateError:
        raise
    except (ValueError, OverflowError) as e:
        raise _bad(where or name, f"is refused: {e}") from None


def decode(
    cls: type[T],
    data: bytes,
    *,
    limit: int = canonical.MAX_BYTES,
    values: int = canonical.MAX_VALUES,
) -> T:
    """The value of class ``cls`` in canonical bytes; ``FormatError`` for anything else. ``limit``
    and ``values`` are those of :func:`casemate.spec.canonical.decode`."""
    return from_json(cls, canonical.decode(data, limit=limit, values=values))


@functools.lru_cache(maxsize=1024)  # a policy with all its callers takes 0.6 MB
def known(cls: type[T], data: bytes) -> T:
    """As :func:`decode`, of small values that come again and again: frozen, so that one will do."""
    return decode(cls, data)
