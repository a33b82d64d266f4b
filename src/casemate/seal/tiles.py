"""A log as static files (C2SP tlog-tiles): hashes and entries in tiles of 256.

Written and read through a ``merkle.Node``; the server, the client's mirror and the auditor use the
same few functions. Paths are relative to the log's prefix.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Final, Literal, TypeAlias

from casemate.spec import merkle
from casemate.spec.errors import FormatError
from casemate.spec.merkle import HASH_BYTES, Node

HEIGHT: Final = 8
WIDTH: Final = 1 << HEIGHT
ENTRIES: Final = "entries"
MAX_ENTRY: Final = 0xFFFF
_PATH: Final = re.compile(
    r"tile/(?P<level>entries|0|[1-9][0-9]?)/(?P<place>(x[0-9]{3}/){0,5}[0-9]{3})"
    r"(\.p/(?P<width>[1-9][0-9]{0,2}))?"
)
Level: TypeAlias = int | Literal["entries"]


@dataclass(frozen=True, slots=True)
class Tile:
    """``width`` hashes (or entries) from ``place * 256`` on, at tile level ``level``."""

    level: Level
    place: int
    width: int = WIDTH

    @property
    def path(self) -> str:
        digits = f"{self.place:03d}"
        digits = digits.zfill(-(-len(digits) // 3) * 3)
        parts = [digits[i : i + 3] for i in range(0, len(digits), 3)]
        place = "/".join([*(f"x{p}" for p in parts[:-1]), parts[-1]])
        partial = "" if self.width == WIDTH else f".p/{self.width}"
        return f"tile/{self.level}/{place}{partial}"


def read_path(path: str) -> Tile:
    """The tile that a path names. Raises ``FormatError`` ``format.tile``; there is one spelling."""
    found = _PATH.fullmatch(path)
    if found is not None:
        level: Level = ENTRIES if found["level"] == ENTRIES else int(found["level"])
        place = int(found["place"].replace("x", "").replace("/", ""))
        tile = Tile(level, place, int(found["width"] or WIDTH))
        if tile.path == path and tile.width <= WIDTH and (level == ENTRIES or level < 64):
            return tile
    raise FormatError(
        "format.tile",
        f"{path[:80]!r} names no tile.",
        mend="See c2sp.org/tlog-tiles for the paths.",
    )


def _level(tile: Tile) -> int:
    return 0 if tile.level == ENTRIES else int(tile.level)


def within(tile: Tile, size: int) -> bool:
    """Whether a log of ``size`` entries has this tile, or had it when it was smaller."""
    return tile.place * WIDTH + tile.width <= size >> (HEIGHT * _level(tile))


def tiles(size: int, known: int = 0) -> Iterator[Tile]:
    """The tiles of hashes and entries of a log of ``size`` entries that one of ``known`` lacks."""
    levels: list[Level] = [ENTRIES, *range(-(-size.bit_length() // HEIGHT))]
    for level in levels:
        shift = 0 if level == ENTRIES else HEIGHT * int(level)
        now, before = size >> shift, known >> shift
        if now == before:
            continue
        for place in range(before // WIDTH, -(-now // WIDTH)):
            yield Tile(level, place, min(WIDTH, now - place * WIDTH))


def hashes(tile: Tile, node: Node) -> bytes:
    """The content of a tile of hashes."""
    level, start = HEIGHT * _level(tile), tile.place * WIDTH
    return b"".join(node(level, start + i) for i in range(tile.width))


def bundle(entries: Sequence[bytes]) -> bytes:
    """The content of a tile of entries, each behind its length in 2 bytes; ValueError past that."""
    if any(len(e) > MAX_ENTRY for e in entries):
        raise ValueError(f"an entry has at most {MAX_ENTRY} bytes")
    return b"".join(len(e).to_bytes(2, "big") + e for e in entries)


def unbundle(tile: Tile, data: bytes) -> tuple[bytes, ...]:
    """The entries of a tile. Raises ``FormatError`` ``format.tile``."""
    out, at = [], 0
    for _ in range(tile.width):
        end = at + 2 + int.from_bytes(data[at : at + 2], "big")
        out.append(data[at + 2 : end])
        at = end
    if at != len(data):  # past it when it was cut short
        raise _form(tile)
    return tuple(out)


def _form(tile: Tile) -> FormatError:
    return FormatError(
        "format.tile",
        f"The tile {tile.path} holds another number of bytes than it should.",
        mend="Fetch it again; if it stays so, the log is damaged.",
        where=tile.path,
    )


def check(tile: Tile, data: bytes) -> bytes:
    """``data`` if it has the length of this tile of hashes; ``FormatError`` otherwise."""
    if len(data) != tile.width * HASH_BYTES:
        raise _form(tile)
    return data


def reader(size: int, load: Callable[[Tile], bytes]) -> Node:
    """A tree of ``size`` leaves over its tiles; ``load`` gives a tile's content, here checked for
    its length alone: a root made of it must be compared with a signed one."""
    kept: dict[Tile, bytes] = {}

    def node(level: int, place: int) -> bytes:
        if level % HEIGHT:
            return merkle.node_hash(node(level - 1, 2 * place), node(level - 1, 2 * place + 1))
        count = size >> level
        at = place // WIDTH
        tile = Tile(level // HEIGHT, at, min(WIDTH, count - at * WIDTH))
        if tile.width <= place % WIDTH:
            raise IndexError(f"node {place} of level {level} in a log of {size}")
        if tile not in kept:
            kept[tile] = check(tile, load(tile))
        start = place % WIDTH * HASH_BYTES
        return kept[tile][start : start + HASH_BYTES]

    return node
