"""Bytes that are almost right: flips, cuts and splices, for tests of parsers and verifiers."""

from __future__ import annotations

import json
import os
import random
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from casemate.attest.verdict import Refused
from support import fuzzing

# Of fuzzed inputs to each parser; `make fuzz` asks for 1,000,000.
COUNT = int(os.environ.get("CASEMATE_FUZZ", "20000"))
_BOUNDS = (0x00, 0x01, 0x7F, 0x80, 0xFE, 0xFF)


def flipped(data: bytes, bit: int) -> bytes:
    """``data`` with one bit changed; bit 0 is the lowest of the first byte."""
    return data[: bit // 8] + bytes([data[bit // 8] ^ 1 << bit % 8]) + data[bit // 8 + 1 :]


def flips(data: bytes, start: int = 0, end: int | None = None) -> Iterator[bytes]:
    """Every single-bit flip of bytes ``start`` to ``end``."""
    for bit in range(8 * start, 8 * (len(data) if end is None else end)):
        yield flipped(data, bit)


def mutated(data: bytes, draw: random.Random) -> bytes:
    """One to four changes: a bit, a byte at a bound, a cut, a repeat, a piece moved, noise."""
    out = bytearray(data)
    for _ in range(draw.randint(1, 4)):
        at = draw.randrange(len(out) + 1)
        size = min(draw.choice((1, 1, 2, 4, 16, 64)), len(out) - at)
        match draw.randrange(7):
            case 0 if at < len(out):
                out[at] ^= 1 << draw.randrange(8)
            case 1 if at < len(out):
                out[at] = draw.choice(_BOUNDS)
            case 2:
                del out[at : at + size]
            case 3:
                out[at:at] = out[at : at + size]
            case 4:
                piece = bytes(out[at : at + size])
                del out[at : at + size]
                to = draw.randrange(len(out) + 1)
                out[to:to] = piece
            case 5:
                out[at:at] = draw.randbytes(draw.choice((1, 2, 4, 32)))
            case _:
                del out[at:]
    return bytes(out)


def scrambled(data: bytes, draw: random.Random, among: bytes) -> bytes:
    """One to three changes to a text that is read line by line: a byte ``among`` those that it is
    made of, a cut, a piece repeated elsewhere, a bit."""
    out = bytearray(data)
    for _ in range(draw.randrange(1, 4)):
        at = draw.randrange(len(out))
        match draw.randrange(4):
            case 0:
                out[at] = draw.choice(among)
            case 1:
                del out[at : at + draw.randrange(1, 9)]
            case 2:
                out[at:at] = out[draw.randrange(len(out)) :][: draw.randrange(9)]
            case _:
                out[at] ^= 1 << draw.randrange(8)
    return bytes(out)


_ODD: tuple[Any, ...] = (
    None, True, False, 0, 1, -1, 2, 255, 2**31, 2**53 - 1, 1 - 2**53, 2**53, 2**64, 10**30, 0.0,
    -0.0, 1.0, 0.5, 1e308, 5e-324, float("inf"), float("nan"), "", "x", "\0", "\u0430", "e\u0301",
    "\ud800", "\u202e", "A" * 5000, "-1", "1e9", [], {}, [[]], [None], {"": 0}, {"type": "x"},
)  # fmt: skip


def _place(tree: list[Any], draw: random.Random) -> tuple[Any, Any]:
    """A container of a tree of JSON and a key in it, at a random depth."""
    at: Any = tree
    key: Any = 0
    while isinstance(at[key], dict | list) and at[key] and draw.random() < 0.8:
        at = at[key]
        key = draw.choice(list(at)) if isinstance(at, dict) else draw.randrange(len(at))
    return at, key


def reformed(data: bytes, draw: random.Random) -> bytes:
    """One to three changes to what a JSON text says, written in canonical form where it has one: a
    value at a bound or of another kind, another part of the tree, one more, one less."""
    tree = [json.loads(data)]
    for _ in range(draw.randint(1, 3)):
        at, key = _place(tree, draw)
        old, other = at[key], _place(tree, draw)
        match draw.randrange(8):
            case 0 | 1:
                at[key] = _copy(draw.choice(_ODD))
            case 2:
                at[key] = _copy(other[0][other[1]])
            case 3 if at is not tree:
                del at[key]
            case 4 if isinstance(at, list) and at is not tree:
                at.insert(key, _copy(old))
            case 4 if isinstance(at, dict):
                at[draw.choice(("", "x", "type", str(key).upper(), f"{key}\u0435"))] = _copy(old)
            case 5 if isinstance(old, str):
                at[key] = mutated(old.encode("utf-8", "surrogatepass"), draw).decode("latin-1")
            case 6 if type(old) in (int, float):
                at[key] = draw.choice(
                    (old + 1, old - 1, -old, old * 2, float(old) if abs(old) < 2**60 else 0)
                )
            case _:
                text = json.dumps(old)
                many = 65 if len(text) < 500 else 3  # what is long would take all of the time
                at[key] = [json.loads(text) for _ in range(draw.choice((1, 1, 2, many)))]
                break
    text = json.dumps(tree[0], ensure_ascii=False, sort_keys=True, separators=(",", ":"))
    return text.encode("utf-8", "surrogatepass")


def _copy(tree: Any) -> Any:
    return json.loads(json.dumps(tree))


def fuzz(
    parse: Callable[[bytes], object], seeds: Sequence[bytes], count: int = COUNT, seed: int = 0
) -> int:
    """Feed ``count`` mutated seeds to ``parse``, which may answer or raise ``Refused`` and nothing
    else, within the limits of :mod:`support.fuzzing`. Returns how many it took."""
    draw = random.Random(seed)
    inputs = (mutated(draw.choice(seeds), draw) for _ in range(count))
    return fuzzing.feed(parse, inputs, (Refused,))
