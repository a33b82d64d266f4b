"""Secrets that are recognised wherever they turn up: planted bytes, and the search for them."""

from __future__ import annotations

import base64
import random
import struct
from collections.abc import Iterable, Mapping

MINIMUM = 12  # bytes; fewer would be met by chance


def floats(draw: random.Random, count: int) -> tuple[float, ...]:
    """Numbers in [1, 3] that nobody else has: not 1.000001, which answers have as a rounded 1."""
    found: list[float] = []
    while len(found) < count:
        value = struct.unpack("<f", struct.pack("<f", draw.uniform(1, 3)))[0]
        if f"{value:.5f}"[-3:] not in ("000", "999"):
            found.append(value)
    return tuple(found)


def packed(values: Iterable[float]) -> bytes:
    return b"".join(struct.pack("<f", v) for v in values)


def forms(secret: bytes) -> Iterable[tuple[str, bytes]]:
    """How a secret may be written: as it is, in hex, in base64 at any of its three offsets."""
    yield "bytes", secret
    yield "hex", secret.hex().encode()
    yield "HEX", secret.hex().upper().encode()
    for offset in range(3):
        cut = secret[(3 - offset) % 3 :]
        whole = base64.b64encode(cut[: len(cut) - len(cut) % 3])
        yield f"base64 {offset}", whole
        yield f"base64url {offset}", whole.translate(bytes.maketrans(b"+/", b"-_"))


class Markers:
    """Secrets by name. Pieces of 12 bytes are looked for, so that a part of one is found too."""

    def __init__(self) -> None:
        self._needles: dict[bytes, str] = {}

    def add(self, name: str, secret: bytes) -> bytes:
        """Plant ``secret``; every piece of it counts."""
        if len(secret) < MINIMUM:
            raise ValueError(f"{name} has {len(secret)} bytes, fewer than {MINIMUM}")
        for at in range(0, len(secret) - MINIMUM + 1, MINIMUM):
            for form, needle in forms(secret[at : at + MINIMUM]):
                if len(needle) >= MINIMUM:
                    self._needles.setdefault(needle, f"{name} ({form})")
        return secret

    def add_text(self, name: str, text: str) -> str:
        self._needles.setdefault(text.encode(), f"{name} (text)")
        return text

    def add_floats(self, name: str, values: Iterable[float]) -> bytes:
        """Numbers: their bytes, and each of them in decimals."""
        found = list(values)
        for value in found:
            self.add_text(name, f"{value:.6f}"[:-1])
        return self.add(name, packed(found))

    def found(self, places: Mapping[str, bytes]) -> list[str]:
        """Which secrets stand where, in words."""
        return sorted(
            f"{name} in {place}"
            for place, data in places.items()
            for needle, name in self._needles.items()
            if needle in data
        )
