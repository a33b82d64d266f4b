"""Bytes that are almost right: flips, cuts and splices, for tests of parsers and verifiers."""

from __future__ import annotations

import os
import random
from collections.abc import Callable, Iterator, Sequence

from casemate.attest.verdict import Refused

# Of fuzzed inputs to each parser; `make test-full` asks for 1,000,000.
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


def fuzz(
    parse: Callable[[bytes], object], seeds: Sequence[bytes], count: int = COUNT, seed: int = 0
) -> int:
    """Feed ``count`` mutated seeds to ``parse``, which may answer or raise ``Refused`` and nothing
    else. Returns how many it took."""
    draw, taken = random.Random(seed), 0
    for _ in range(count):
        data = mutated(draw.choice(seeds), draw)
        try:
            parse(data)
        except Refused:
            continue
        taken += 1
    return taken
