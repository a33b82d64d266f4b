"""One column's values to the wire form: parsed, checked against the declaration, scaled, packed.

Two forms come in: ``list`` of cells (CSV text, or Python objects) and numpy arrays. Both follow one
rule: a value is finite and within the declared bounds, or an error names its column and row. The
message is for the owner, on the owner's machine.
"""

from __future__ import annotations

import math
import struct
import sys
from array import array
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import compress
from typing import Any, Final, Literal, NoReturn, TypeAlias

from casemate.spec.data import Column, Dtype
from casemate.spec.errors import DataError

Scale: TypeAlias = Literal["none", "unit", "symmetric"]
Role: TypeAlias = Literal["feature", "label", "unit"]
Number: TypeAlias = "int | float"

F32_MAX: Final = 3.4028234663852886e38
MAX_INT: Final = 2**53 - 1
_CODES: Final[dict[str, str]] = {"bool": "B", "u8": "B", "i32": "i", "i64": "q", "f32": "f"}
_NUMPY: Final[dict[str, str]] = {
    "bool": "|u1",
    "u8": "|u1",
    "i32": "<i4",
    "i64": "<i8",
    "f32": "<f4",
}
_RANGE: Final[dict[str, tuple[int, int]]] = {
    "u8": (0, 255),
    "i32": (-(2**31), 2**31 - 1),
    "i64": (-MAX_INT, MAX_INT),
}
_TRUTH: Final = {"true": 1, "1": 1, "1.0": 1, "false": 0, "0": 0, "0.0": 0}


def refuse(reason: str, message: str, mend: str, where: str = "") -> DataError:
    return DataError(f"data.{reason}", message, mend=mend, where=where)


@dataclass(frozen=True, slots=True)
class Block:
    """Some rows in order: raw values by column; ``rows`` count from 1, ``lines`` in a file."""

    columns: dict[str, Any]
    rows: Sequence[int]
    lines: Sequence[int] | None = None

    def place(self, at: int) -> str:
        line = f" (line {self.lines[at]})" if self.lines is not None else ""
        return f"row {self.rows[at]}{line}"

    def keep(self, mask: Sequence[bool]) -> Block:
        """The rows where ``mask`` is true."""
        if all(mask):
            return self
        columns = {
            name: list(compress(raw, mask))
            if isinstance(raw, list)
            else raw[[i for i, kept in enumerate(mask) if kept]]
            for name, raw in self.columns.items()
        }
        lines = None if self.lines is None else list(compress(self.lines, mask))
        return replace(self, columns=columns, rows=list(compress(self.rows, mask)), lines=lines)


def _f32(x: float) -> float:
    return float(struct.unpack("<f", struct.pack("<f", x))[0])


def _f32_step(x: float, up: bool) -> float:
    """The float32 next to the float32 ``x``."""
    if x == 0:
        return math.copysign(2.0**-149, 1 if up else -1)
    bits = struct.unpack("<i", struct.pack("<f", x))[0]
    return float(struct.unpack("<f", struct.pack("<i", bits + (1 if up == (x > 0) else -1)))[0])


def f32_within(low: float, high: float) -> tuple[float, float]:
    """The least and the greatest float32 in [low, high]; the first is above if there is none."""
    least, most = _f32(low), _f32(high)
    return (
        _f32_step(least, True) if least < low else least,
        _f32_step(most, False) if most > high else most,
    )


@dataclass(frozen=True)
class Target:
    """What a source's column becomes. ``classes``: the cells' words in the order of their index."""

    name: str
    dtype: Dtype
    shape: tuple[int, ...] = ()
    low: Number | None = None
    high: Number | None = None
    scale: Scale = "none"
    role: Role = "feature"
    classes: tuple[str, ...] | None = None

    def column(self) -> Column:
        """The shared format; DataError ``data.column`` or ``data.bounds`` if it cannot be."""
        try:
            made = Column(
                name=self.name,
                dtype=self.dtype,
                shape=self.shape,
                low=self.low,
                high=self.high,
                scale=self.scale,
                role=self.role,
            )
        except ValueError as e:
            raise refuse(
                "column", f"A column cannot be so: {e}.", "Change its declaration.", self.name
            ) from None
        if self.dtype == "bool":
            return made
        low, high = self.bounds
        # An integer may be too large for a float.
        if not (abs(low) < math.inf and abs(high) < math.inf):
            raise refuse(
                "bounds",
                f"The bounds of {self.name!r} are not finite.",
                "Declare the least and the greatest value that can occur.",
                self.name,
            )
        wide = self.dtype == "f32" and max(-low, high) > F32_MAX
        if wide or self.limits[0] > self.limits[1]:
            raise refuse(
                "bounds",
                f"Column {self.name!r}: float32 cannot hold the bounds [{low}, {high}].",
                "Declare bounds with a float32 between them, at most 3.4e38.",
                self.name,
            )
        natural = _RANGE.get(self.dtype)
        if natural is not None and not natural[0] <= low <= high <= natural[1]:
            raise refuse(
                "bounds",
                f"The bounds of {self.name!r} are outside {self.dtype}, {natural}.",
                "Declare narrower bounds, or another dtype.",
                self.name,
            )
        return made

    @property
    def bounds(self) -> tuple[Number, Number]:
        if self.low is None or self.high is None:
            raise ValueError(f"{self.name!r} has no bounds")
        return self.low, self.high

    @cached_property
    def limits(self) -> tuple[float, float]:
        """The extreme values on the wire."""
        if self.scale != "none":
            return (0.0 if self.scale == "unit" else -1.0), 1.0
        low, high = self.bounds
        return f32_within(low, high) if self.dtype == "f32" else (low, high)

    @cached_property
    def index(self) -> dict[str, int]:
        return {word: i for i, word in enumerate(self.classes or ())}

    def out_of_bounds(self, found: object, place: str) -> NoReturn:
        low, high = self.bounds
        raise refuse(
            "label-range" if self.role == "label" else "out-of-bounds",
            f"Column {self.name!r}, {place}: {str(found)[:40]} is outside the declared"
            f" bounds [{low}, {high}].",
            "Correct the row, or declare the bounds that can really occur.",
            f"{self.name}, {place}",
        )

    def bad(self, reason: str, place: str, found: object, what: str) -> NoReturn:
        raise refuse(
            reason,
            f"Column {self.name!r}, {place}: {str(found)[:40]!r} {what}.",
            "Correct or remove the row.",
            f"{self.name}, {place}",
        )

    def missing(self, place: str) -> NoReturn:
        raise refuse(
            "missing-value",
            f"Column {self.name!r}, {place}: the value is missing.",
            "Fill it in, or remove the row; casemate guesses no values.",
            f"{self.name}, {place}",
        )


def pack(target: Target, block: Block) -> bytes:
    """The little-endian, row-major wire bytes of ``target``'s column in ``block``."""
    raw = block.columns[target.name]
    if isinstance(raw, list):
        return _pack_cells(target, raw, block)
    if target.classes is not None or raw.dtype.kind not in "biuf":
        if raw.ndim != 1:
            target.bad("dtype", block.place(0), raw.dtype, "is no number")
        return _pack_cells(target, raw.tolist(), block)
    return _pack_array(target, raw, block)


def _pack_cells(target: Target, cells: list[Any], block: Block) -> bytes:
    if target.shape:
        raise refuse(
            "shape",
            f"Column {target.name!r} has declared shape {target.shape}, but a cell is one value.",
            "Give such a column as an array.",
            target.name,
        )
    if target.classes is not None:
        out = [target.index.get(cell if isinstance(cell, str) else str(cell), -1) for cell in cells]
        if -1 in out:
            _unknown_class(target, cells, out.index(-1), block)
    elif target.dtype == "f32":
        return _floats(target, cells, block)
    else:
        one = _truth if target.dtype == "bool" else _integer
        out = [one(target, cell, block, i) for i, cell in enumerate(cells)]
    return _bytes(target.dtype, out)


def _bytes(dtype: str, values: Sequence[Number]) -> bytes:
    packed = array(_CODES[dtype], values)
    if sys.byteorder == "big":
        packed.byteswap()
    return packed.tobytes()


def _unknown_class(target: Target, cells: list[Any], at: int, block: Block) -> NoReturn:
    place = block.place(at)
    if cells[at] is None or cells[at] == "":
        target.missing(place)
    words = ", ".join(repr(w) for w in (target.classes or ())[:8])
    raise refuse(
        "label-range" if target.role == "label" else "unknown-class",
        f"Column {target.name!r}, {place}: {str(cells[at])[:40]!r} is none of the declared classes"
        f" ({words}{', ...' if len(target.classes or ()) > 8 else ''}).",
        "Correct the row, or declare every class that can occur.",
        f"{target.name}, {place}",
    )


def _number(target: Target, cell: Any, block: Block, at: int) -> float:
    """A finite number in decimal notation of ASCII, as Python's, without underscores."""
    place = block.place(at)
    if cell is None or (isinstance(cell, str) and not cell.strip()):
        target.missing(place)
    if isinstance(cell, str) and (not cell.isascii() or "_" in cell):
        target.bad("not-a-number", place, cell, "is no number")
    try:
        found = float(cell)
    except (TypeError, ValueError, OverflowError):
        target.bad("not-a-number", place, cell, "is no number")
    if not math.isfinite(found):
        target.bad("not-finite", place, cell, "is not finite")
    return found


def _integer(target: Target, cell: Any, block: Block, at: int) -> int:
    try:
        plain = not isinstance(cell, str) or (cell.isascii() and "_" not in cell)
        whole = int(cell) if plain and isinstance(cell, str | int) else None
    except ValueError:
        whole = None
    if whole is None:
        found = _number(target, cell, block, at)
        if not found.is_integer():
            target.bad("not-an-integer", block.place(at), cell, "is no whole number")
        whole = int(found)
    low, high = target.bounds
    if not low <= whole <= high:
        target.out_of_bounds(cell, block.place(at))
    return whole


def _truth(target: Target, cell: Any, block: Block, at: int) -> int:
    found = _TRUTH.get(str(cell).strip().lower())
    if found is None:
        if cell is None or str(cell).strip() == "":
            target.missing(block.place(at))
        target.bad("not-a-bool", block.place(at), cell, "is neither true nor false")
    return found


def _floats(target: Target, cells: list[Any], block: Block) -> bytes:
    low, high = target.bounds
    values = _quick_floats(cells)
    if values is None:
        values = [_number(target, cell, block, i) for i, cell in enumerate(cells)]
    if values and not low <= min(values) <= max(values) <= high:
        at = next(i for i, x in enumerate(values) if not low <= x <= high)
        target.out_of_bounds(cells[at], block.place(at))
    span = high - low
    if target.scale == "unit":
        values = [(x - low) / span for x in values]
    elif target.scale == "symmetric":
        values = [2 * ((x - low) / span) - 1 for x in values]
    rounded = array("f", values)
    least, most = target.limits
    if rounded and not least <= min(rounded) <= max(rounded) <= most:
        # Rounding to float32 must not step over the bounds.
        rounded = array("f", [min(max(x, least), most) for x in values])
    return _bytes("f32", rounded)


def _quick_floats(cells: list[Any]) -> list[float] | None:
    """All cells as finite floats, or ``None`` when one must be looked at alone."""
    try:
        text = "".join(cells)
        values = list(map(float, cells))
    except (TypeError, ValueError):
        return None
    plain = text.isascii() and "_" not in text and all(map(math.isfinite, values))
    return values if plain else None


def _pack_array(target: Target, raw: Any, block: Block) -> bytes:
    import numpy as np

    if raw.shape[1:] != target.shape:
        raise refuse(
            "shape",
            f"Column {target.name!r} has rows of shape {raw.shape[1:]}, declared {target.shape}.",
            "Declare the shape that the rows have, or pad and cut them to it.",
            target.name,
        )

    def first(bad: Any) -> tuple[str, object]:
        at = int(np.argmax(bad.reshape(len(raw), -1).any(axis=1)))
        return block.place(at), raw[at][bad[at]].flat[0] if raw.ndim > 1 else raw[at]

    if raw.dtype.kind == "f" and not np.isfinite(raw).all():
        place, found = first(~np.isfinite(raw))
        target.bad("not-finite", place, found, "is not finite")
    if target.dtype == "bool":
        if (bad := (raw != 0) & (raw != 1)).any():
            place, found = first(bad)
            target.bad("not-a-bool", place, found, "is neither true nor false")
        return bytes(raw.astype("|u1").tobytes())
    if target.dtype != "f32" and raw.dtype.kind == "f" and (bad := raw != np.rint(raw)).any():
        place, found = first(bad)
        target.bad("not-an-integer", place, found, "is no whole number")
    low, high = target.bounds
    # A float32 source is compared with its own rounding of the bounds.
    kind = raw.dtype if raw.dtype.kind == "f" else None
    with np.errstate(over="ignore"):
        low_, high_ = (low, high) if kind is None else (kind.type(low), kind.type(high))
    if (bad := (raw < low_) | (raw > high_)).any():
        place, found = first(bad)
        target.out_of_bounds(found, place)
    if target.dtype == "f32":
        wide = raw.astype(np.float64)
        if target.scale != "none":
            wide = (wide - low) / (high - low)
        if target.scale == "symmetric":
            wide = 2 * wide - 1
        raw = np.clip(wide, *target.limits)
    return bytes(raw.astype(_NUMPY[target.dtype]).tobytes())
