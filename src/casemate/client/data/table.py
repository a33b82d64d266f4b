"""The one form of every source: columns by name, and rows in blocks.

A :class:`Table` says what each column holds and gives the rows block by block, so that a file
larger than memory need not be held as text or frame.
"""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Final, Literal, TypeAlias

from casemate.client.data.columns import Block, refuse
from casemate.spec.errors import UsageError

BLOCK_ROWS: Final = 4096

#: What a source says of a column: a CSV says nothing (``cell``), others know the kind of number.
Kind: TypeAlias = Literal["cell", "text", "bool", "int", "u8", "float"]


@dataclass(frozen=True, slots=True)
class Found:
    """A column as the source has it: its kind and the shape of a row in it."""

    kind: Kind
    shape: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class Table:
    """``blocks`` may be called once."""

    columns: dict[str, Found]
    blocks: Callable[[], Iterator[Block]]


def extra(package: str) -> UsageError:
    return UsageError(
        "usage.extra",
        f"This source needs the package {package}, which is not installed.",
        mend="Install it with: pip install 'casemate[data]'.",
        where=package,
    )


def no_duplicates(names: Sequence[str]) -> None:
    for name, count in Counter(names).items():
        if count > 1:
            raise refuse(
                "duplicate-column",
                f"Two columns are called {name!r}.",
                "Give each column its own name.",
                name,
            )


def no_nulls(name: str, missing: Any) -> None:
    """``missing``: one boolean per row."""
    for row, gone in enumerate(missing, 1):
        if gone:
            raise refuse(
                "missing-value",
                f"Column {name!r}, row {row}: the value is missing.",
                "Fill it in, or remove the row; casemate guesses no values.",
                f"{name}, row {row}",
            )


def found_in(array: Any, name: str) -> Found:
    kinds: dict[str, Kind] = {"b": "bool", "i": "int", "u": "int", "f": "float"}
    shape = tuple(int(d) for d in array.shape[1:])
    kind = kinds.get(array.dtype.kind, "text")
    if kind == "text" and (shape or array.dtype.kind not in "OUST"):
        raise refuse(
            "dtype",
            f"Column {name!r} holds {array.dtype}, which has no wire form.",
            "Convert it to numbers of equal shape, or leave it out.",
            name,
        )
    if 0 in shape:
        raise refuse("shape", f"Column {name!r} has rows of shape {shape}.", "Leave it out.", name)
    return Found("u8" if array.dtype.kind == "u" and array.dtype.itemsize == 1 else kind, shape)


def peeked(names: Sequence[str], blocks: Callable[[], Iterator[Block]]) -> Table:
    """A table whose kinds are those of its first block."""
    no_duplicates(names)
    rest = blocks()
    first = next(rest, None)
    if first is None:
        return Table({name: Found("cell") for name in names}, lambda: rest)
    columns = {name: found_in(first.columns[name], name) for name in names}
    return Table(columns, lambda: itertools.chain([first], rest))
