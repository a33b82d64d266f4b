"""A table's wire form against its schema, without torch: the rules that the enclave's worker and
``casemate dataset check`` share, so that both refuse with the same codes.

No message says which row, or how many: the worker's are kept, and seen by the operator.
"""

from __future__ import annotations

import math
import sys
import unicodedata
from array import array
from collections.abc import Mapping
from typing import Final, TypeAlias

from casemate.spec import tensors
from casemate.spec.data import Column, DatasetSchema
from casemate.spec.errors import DataError
from casemate.spec.tensors import TensorInfo

#: The least and the greatest value of a column; NaN where one of them is no number.
Extremes: TypeAlias = "tuple[int | float, int | float]"

_F32_MAX: Final = 3.4028234663852886e38
_RANGE: Final[dict[str, tuple[int | float, int | float]]] = {
    "u8": (0, 255),
    "i32": (-(2**31), 2**31 - 1),
    "i64": (-(2**63), 2**63 - 1),
    "f32": (-_F32_MAX, _F32_MAX),
}
_CODES: Final = {"bool": "B", "u8": "B", "i32": "i", "i64": "q", "f32": "f"}


def refusal(reason: str, message: str, where: str = "") -> DataError:
    return DataError(
        f"data.{reason}", message, mend="Mend the table or the schema and push again.", where=where
    )


def check_schema(schema: DatasetSchema) -> None:
    """What is declared. Raises ``DataError``: ``data.bounds`` where a dtype cannot hold the bounds,
    ``data.column`` and ``data.name`` where a name could pass for another."""
    if unicodedata.normalize("NFKC", schema.name) != schema.name or _scripts(schema.name):
        message = f"The name {schema.name!r} is written so that it could pass for another."
        raise refusal("name", message, "name")
    for column in schema.columns:
        name = column.name
        if " ".join(name.split()) != name:
            raise refusal("column", f"Column {name!r} has spaces that cannot be seen.", name)
        if column.dtype == "bool" or column.low is None or column.high is None:
            continue
        low, high = _RANGE[column.dtype]
        if not low <= column.low <= column.high <= high:
            raise refusal("bounds", f"{column.dtype} cannot hold the bounds of {name!r}.", name)


def _scripts(name: str) -> bool:
    """Spaces that cannot be seen, or a word in letters of several scripts that share shapes."""
    words = name.split()
    alike = {"LATIN", "GREEK", "CYRILLIC", "ARMENIAN", "COPTIC", "CHEROKEE"}
    kinds = ({unicodedata.name(c, "").partition(" ")[0] for c in word} & alike for word in words)
    return " ".join(words) != name or any(len(kind) > 1 for kind in kinds)


def check_columns(schema: DatasetSchema, found: Mapping[str, TensorInfo]) -> None:
    """Raises ``data.columns``: the file holds each declared column, and no other."""
    wanted = {c.name: (c.dtype, (schema.rows, *c.shape)) for c in schema.columns}
    for name in sorted(wanted.keys() | found.keys()):
        info = found.get(name)
        if info is None or (info.dtype, info.shape) != wanted.get(name):
            raise refusal("columns", f"Column {name!r} is not as the schema says.", name)


def check_values(column: Column, extremes: Extremes) -> None:
    """Raises ``data.bool``, ``data.not-finite`` or ``data.bounds``. Python compares whole numbers
    and floats exactly, which torch does not."""
    low, high = extremes
    if column.dtype == "bool":
        if high > 1:
            raise refusal(
                "bool", f"Column {column.name!r} holds bytes that are no bool.", column.name
            )
        return
    if not (math.isfinite(low) and math.isfinite(high)):
        raise refusal("not-finite", f"Column {column.name!r} holds NaN or infinity.", column.name)
    bounds = column.wire_bounds
    if bounds is not None and not bounds[0] <= low <= high <= bounds[1]:
        message = f"Column {column.name!r} holds values outside its declared bounds."
        raise refusal("bounds", message, column.name)


def check(schema: DatasetSchema, wire: bytes | memoryview) -> None:
    """A whole wire form, in the worker's order. Raises ``FormatError`` or ``DataError``."""
    loaded = tensors.load(wire)
    check_columns(schema, {name: info for name, (info, _) in loaded.items()})
    bools = [c for c in schema.columns if c.dtype == "bool"]
    others = [c for c in schema.columns if c.dtype != "bool"]
    for column in bools:
        check_values(column, _extremes(column.dtype, loaded[column.name][1]))
    check_schema(schema)
    for column in others:
        check_values(column, _extremes(column.dtype, loaded[column.name][1]))


def _extremes(dtype: str, data: memoryview) -> Extremes:
    values = array(_CODES[dtype])
    values.frombytes(data)
    if sys.byteorder == "big":
        values.byteswap()
    if dtype == "f32" and not all(map(math.isfinite, values)):
        return math.nan, math.nan
    return min(values), max(values)
