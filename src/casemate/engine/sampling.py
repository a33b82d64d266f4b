"""Secret Poisson sampling over units (P2)."""

from __future__ import annotations

from fractions import Fraction
from typing import Final

import numpy as np
import numpy.typing as npt

from casemate.engine import keystream

PURPOSE: Final = "sampling"
_CHUNK: Final = 1 << 16


def threshold(rate: float) -> int:
    """floor(rate * 2^64): a 64-bit word below it takes the unit. Exact, so that the true rate is
    below ``rate`` by less than 2^-64; the Gaussian's amplified loss grows with the rate, so
    accounting with ``rate`` is an upper bound."""
    if not 0 < rate <= 1:
        raise ValueError("the sampling rate must be in (0, 1]")
    return int(Fraction(rate) * 2**64)


def sample(key: bytes, step: int, units: int, rate: float) -> npt.NDArray[np.int64]:
    """Units of ``step``'s Poisson sample, ascending; each of ``units`` is in it with probability
    ``rate`` independently. ``key`` is the purpose's own subkey. One word for each unit and step,
    whatever the outcome.
    """
    limit = threshold(rate)
    found = []
    for first in range(0, units, 2 * _CHUNK):
        count = min(2 * _CHUNK, units - first)
        words = keystream.words(key, step, first // 2, (count + 1) // 2)[:count]
        taken = words < np.uint64(limit) if limit < 2**64 else np.ones(count, dtype=bool)
        found.append(np.flatnonzero(taken).astype(np.int64) + first)
    return np.concatenate(found)
