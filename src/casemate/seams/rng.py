"""Rng: cryptographic random bytes for keys, nonces and identifiers."""

from __future__ import annotations

import os
from typing import Protocol


class Rng(Protocol):
    def bytes(self, count: int) -> bytes:
        """``count`` unpredictable bytes."""


class OsRng:
    def bytes(self, count: int) -> bytes:
        return os.urandom(count)
