"""What an owner declares of a dataset before any row is read, from arguments or a TOML file."""

from __future__ import annotations

import json
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final, TypeAlias, cast, get_args

from casemate.client.data.columns import Number, Scale, Target, refuse
from casemate.client.data.sources import open_source
from casemate.client.data.table import Found, Table
from casemate.spec.data import Column, DatasetSchema, Dtype
from casemate.spec.errors import DataError

Pair: TypeAlias = "tuple[Number, Number]"
#: A pair for every feature, or pairs by column name; the name ``*`` stands for all others.
Bounds: TypeAlias = "Pair | Mapping[str, Pair]"
#: How many classes the label has, or its words in order; or either by column name.
Classes: TypeAlias = "int | Sequence[Any] | Mapping[str, int | Sequence[Any]]"
Scales: TypeAlias = "Scale | Mapping[str, Scale]"

_DTYPES: Final = get_args(Dtype)
_SCALES: Final = get_args(Scale)


@dataclass(frozen=True, slots=True)
class Declaration:
    """Everything declared. ``targets`` leaves out the unit column, which ``unit`` names.

    ``units``: the public number of privacy units to show, at least the true one (``None``: that).
    """

    targets: tuple[Target, ...]
    name: str | None = None
    unit: str | None = None
    rows_per_unit: int = 1
    units: int | None = None


def _bad(message: str, where: str = "") -> DataError:
    return refuse(
        "schema", message, "Correct it; 'casemate dataset template FILE' writes a schema.", where
    )


def from_columns(columns: Sequence[Column]) -> Declaration:
    """The declaration that explicit columns make."""
    unit = [c for c in columns if c.role == "unit"]
    units = None if not unit or unit[0].high is None else int(unit[0].high) + 1
    if len(unit) > 1 or len({c.name for c in columns}) != len(columns):
        raise _bad("Columns must have different names, and at most one can be the unit.")
    targets = tuple(
        Target(c.name, c.dtype, c.shape, c.low, c.high, c.scale, c.role)
        for c in columns
        if c.role != "unit"
    )
    return Declaration(targets, unit=unit[0].name if unit else None, units=units)


def from_schema(schema: DatasetSchema) -> Declaration:
    """The declaration of another version of a dataset: the same columns, at least as many units."""
    return replace(
        from_columns(schema.columns),
        name=schema.name,
        rows_per_unit=schema.rows_per_unit,
        units=schema.units if schema.unit_column or schema.units > schema.rows else None,
    )


def _classes(of: int | Sequence[Any], name: str) -> tuple[int, tuple[str, ...] | None]:
    """(count, words or None when the cells are the indices themselves)."""
    if isinstance(of, bool) or (isinstance(of, int) and of < 1) or isinstance(of, str):
        raise _bad(f"The classes of {name!r} are neither a count nor a list of words.", name)
    if isinstance(of, int):
        return of, None
    words = tuple(w if isinstance(w, str) else str(w) for w in of)
    if not words or "" in words or len(set(words)) != len(words):
        raise _bad(f"The classes of {name!r} must be one or several different words.", name)
    return len(words), words


def declare(
    table: Table,
    *,
    label: str | Sequence[str] | None,
    unit: str | None,
    bounds: Bounds | None,
    classes: Classes | None,
    scale: Scales,
) -> tuple[Target, ...]:
    """Targets for every column of ``table`` but the unit, from arguments.

    Raises DataError ``data.bounds-missing`` with every column that lacks bounds.
    """
    labels = (label,) if isinstance(label, str) else tuple(label or ())
    by_name: Mapping[str, Pair] = bounds if isinstance(bounds, Mapping) else {}
    default = by_name.get("*") if isinstance(bounds, Mapping) else bounds
    if classes is not None and not isinstance(classes, Mapping):
        if len(labels) != 1:
            raise _bad("Classes are given, but not which column they belong to.")
        classes = {labels[0]: classes}
    scales: Mapping[str, Scale] = scale if isinstance(scale, Mapping) else {}
    named = [*labels, *([unit] if unit else []), *by_name, *(classes or {}), *scales]
    require(table, (n for n in named if n != "*"))
    if unit in labels:
        raise _bad(f"{unit!r} is said to be the unit and a label.", unit)

    targets, missing = [], []
    for name, found in table.columns.items():
        if name == unit:
            continue
        is_label = name in labels
        target = _target(
            name,
            found,
            is_label,
            by_name.get(name, None if is_label else default),
            (classes or {}).get(name),
            scales.get(name, "none" if is_label else scales.get("*", "none"))
            if isinstance(scale, Mapping)
            else ("none" if is_label else scale),
        )
        if target.dtype != "bool" and target.low is None:
            missing.append(name)
        targets.append(target)
    if missing:
        raise bounds_missing(missing)
    return tuple(targets)


def require(table: Table, names: Any) -> None:
    """DataError ``data.column-missing`` for the first name that ``table`` lacks."""
    for name in names:
        if name not in table.columns:
            have = ", ".join(repr(n) for n in list(table.columns)[:20])
            raise refuse(
                "column-missing",
                f"The source has no column {name!r}; it has {have or 'none'}.",
                "Name a column as the source spells it.",
                name,
            )


def bounds_missing(names: Sequence[str]) -> DataError:
    shown = ", ".join(repr(n) for n in names[:40]) + (", ..." if len(names) > 40 else "")
    return refuse(
        "bounds-missing",
        f"No bounds are declared for {shown}.",
        "Declare what can occur, never what did: bounds={"
        + f"{names[0]!r}: (low, high)}} by column, one pair (low, high) for all features, classes="
        "[...] for a label, or a schema file ('casemate dataset template FILE' writes one).",
        names[0],
    )


def _pair(pair: Any, name: str) -> Pair:
    ok = isinstance(pair, Sequence) and not isinstance(pair, str) and len(pair) == 2
    if not ok or any(isinstance(x, bool) or not isinstance(x, int | float) for x in pair):
        raise refuse(
            "bounds",
            f"The bounds of {name!r} are no pair of numbers.",
            "Write (low, high).",
            name,
        )
    return cast(Pair, (pair[0], pair[1]))


def _target(
    name: str,
    found: Found,
    is_label: bool,
    pair: Pair | None,
    classes: int | Sequence[Any] | None,
    scale: Scale,
) -> Target:
    """Default dtypes: floats f32, whole numbers i64, arrays of bytes u8; what is scaled f32."""
    if scale not in _SCALES:
        raise _bad(f"The scale of {name!r} is none of {', '.join(_SCALES)}.", name)
    made = Target(name, "f32", found.shape, scale=scale, role="label" if is_label else "feature")
    if classes is not None:
        count, words = _classes(classes, name)
        return replace(made, dtype="i64", low=0, high=count - 1, scale="none", classes=words)
    if found.kind == "text":
        raise refuse(
            "dtype",
            f"Column {name!r} holds text.",
            f"Declare its words with classes={{{name!r}: [...]}}, tokenise it"
            " (casemate.client.data.text), or leave it out.",
            name,
        )
    if found.kind == "bool" and pair is None and scale == "none":
        return (
            replace(made, dtype="i64", low=0, high=1) if is_label else replace(made, dtype="bool")
        )
    if found.kind == "u8" and found.shape and pair is None:
        pair = (0, 255)  # bounds of the type itself, nothing is learnt from the rows
    low, high = _pair(pair, name) if pair is not None else (None, None)
    made = replace(made, low=low, high=high)
    whole = found.kind in ("int", "u8", "bool") or (
        found.kind == "cell" and is_label and isinstance(low, int) and isinstance(high, int)
    )
    if not whole or scale != "none":
        return made
    if found.kind == "u8" and found.shape and low is not None and low >= 0:
        return replace(made, dtype="u8")
    return replace(made, dtype="i64")


# The schema file.


def load_schema(path: str | Path) -> Declaration:
    """The declaration in a TOML file as :func:`template` writes it.

    Raises DataError ``data.schema`` (form), ``data.bounds-missing``, ``data.bounds``.
    """
    path = Path(path)
    if not path.is_file():  # a pipe or a device has no end
        raise _bad(f"There is no schema file {path}.", str(path))
    try:
        tree = tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as e:
        raise _bad(f"The schema file {path} cannot be read: {e}.", str(path)) from None
    known = {"name", "label", "unit", "rows_per_unit", "units", "columns"}
    if unknown := set(tree) - known:
        raise _bad(f"A schema has no entry {min(unknown)!r}.", min(unknown))
    for key, kind in (("name", str), ("unit", str), ("rows_per_unit", int), ("units", int)):
        if key in tree and type(tree[key]) is not kind:
            raise _bad(f"The entry {key!r} is no {kind.__name__}.", key)
    labels = tree.get("label", [])
    labels = [labels] if isinstance(labels, str) else labels
    columns = tree.get("columns")
    if not isinstance(columns, dict) or not columns:
        raise _bad("The schema has no [columns.NAME] tables.", "columns")
    if not isinstance(labels, list) or any(
        not isinstance(x, str) or x not in columns for x in labels
    ):
        raise _bad("The label names no column of the schema.", "label")
    targets = tuple(_entry(name, entry, name in labels) for name, entry in columns.items())
    missing = [t.name for t in targets if t.dtype != "bool" and t.low is None]
    if missing:
        raise bounds_missing(missing)
    for target in targets:
        target.column()
    unit = tree.get("unit")
    if unit in columns:
        raise _bad("The unit column is declared by 'unit' alone, without a table.", "unit")
    return Declaration(
        targets,
        name=tree.get("name"),
        unit=unit,
        rows_per_unit=tree.get("rows_per_unit", 1),
        units=tree.get("units"),
    )


def _entry(name: str, entry: Any, is_label: bool) -> Target:
    known = {"dtype", "shape", "low", "high", "scale", "classes"}
    if not isinstance(entry, dict) or set(entry) - known:
        raise _bad(
            f"The table of {name!r} has other entries than {', '.join(sorted(known))}.", name
        )
    dtype: Any = entry.get("dtype")
    shape, scale = entry.get("shape", []), entry.get("scale", "none")
    made = Target(name, "f32", role="label" if is_label else "feature")
    if "classes" in entry:
        if set(entry) - {"classes", "dtype"} or dtype not in (None, "i64"):
            raise _bad(f"{name!r} has classes: it is i64 and needs nothing else.", name)
        if not isinstance(entry["classes"], int | list):
            raise _bad(f"The classes of {name!r} are neither a count nor a list.", name)
        count, words = _classes(entry["classes"], name)
        return replace(made, dtype="i64", low=0, high=count - 1, classes=words)
    if not entry:
        return made
    if dtype not in _DTYPES or scale not in _SCALES:
        raise _bad(f"{name!r} needs a dtype ({', '.join(_DTYPES)}) and an admitted scale.", name)
    if not isinstance(shape, list) or any(type(d) is not int for d in shape):
        raise _bad(f"The shape of {name!r} is no list of sizes.", name)
    low, high = entry.get("low"), entry.get("high")
    if low is not None and high is not None:
        low, high = _pair((low, high), name)
    else:
        low = high = None
    return replace(made, dtype=dtype, shape=tuple(shape), low=low, high=high, scale=scale)


def dump_schema(declaration: Declaration) -> str:
    """The TOML text that :func:`load_schema` reads; columns without bounds get a place for them."""
    labels = [t.name for t in declaration.targets if t.role == "label"]
    head = {
        "name": declaration.name,
        "label": labels[0] if len(labels) == 1 else labels or None,
        "unit": declaration.unit,
        "rows_per_unit": declaration.rows_per_unit if declaration.unit else None,
        "units": declaration.units,
    }
    lines = ["# A casemate dataset. Bounds say what can occur; never compute them from the rows."]
    lines += [f"{key} = {_toml(item)}" for key, item in head.items() if item is not None]
    for target in declaration.targets:
        lines += ["", f"[columns.{_toml(target.name)}]"]
        if target.classes == ():
            lines.append('# classes = ["first", "second"]')
            continue
        if target.classes is not None:
            lines.append(f"classes = {_toml(list(target.classes))}")
            continue
        lines.append(f"dtype = {_toml(target.dtype)}")
        if target.shape:
            lines.append(f"shape = {_toml(list(target.shape))}")
        if target.low is not None and target.high is not None:
            lines += [f"low = {_toml(target.low)}", f"high = {_toml(target.high)}"]
        elif target.dtype != "bool":
            lines += ["# low = ", "# high = "]
            if target.role == "label":
                lines.append('# or, instead of dtype and bounds: classes = ["no", "yes"]')
        if target.scale != "none":
            lines.append(f"scale = {_toml(target.scale)}")
    return "\n".join(lines) + "\n"


def _toml(item: Any) -> str:
    """A TOML string, number or list: JSON's form is TOML's too, but for DEL in strings."""
    return json.dumps(item, ensure_ascii=False).replace("\x7f", "\\u007f")


def template(
    source: Any,
    *,
    name: str | None = None,
    label: str | Sequence[str] | None = None,
    unit: str | None = None,
) -> str:
    """A schema file for ``source`` with the bounds left to fill in.

    Names, dtypes and shapes come from the source's header or types; no row's value is looked at.
    """
    table = open_source(source)
    labels = (label,) if isinstance(label, str) else tuple(label or ())
    require(table, (*labels, *([unit] if unit else [])))
    targets = []
    for column, found in table.columns.items():
        if column != unit:
            if found.kind == "text":  # its words are left to be filled in
                targets.append(Target(column, "i64", classes=()))
            else:
                targets.append(_target(column, found, column in labels, None, None, "none"))
    return dump_schema(Declaration(tuple(targets), name=name, unit=unit))
