"""A step's sum a window at a time, so that no vector as long as the model need be held for it.

A piece is (first, sum): the entries from ``first`` on, int64 grid steps or float64, (n,), valid
until the next is asked for. Pieces follow one another without gaps; all but the last have
:data:`WINDOW` entries.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Final, TypeAlias

import torch

Piece: TypeAlias = tuple[int, torch.Tensor]
# Adds the entries from a place on of one tensor's sum to as many places.
Fill: TypeAlias = Callable[[torch.Tensor, int], None]

# Even, for noise comes in pairs; with what is made of it, it stays in the second cache.
WINDOW: Final = 1 << 16


def of(total: torch.Tensor) -> Iterator[Piece]:
    """Pieces of a vector that is held."""
    for first in range(0, len(total), WINDOW):
        yield first, total[first : first + WINDOW]


def filled(
    sizes: Sequence[int], fills: Iterable[Fill | None], dtype: torch.dtype
) -> Iterator[Piece]:
    """Pieces of tensors of these sizes, one after another; ``None`` for a tensor of zeros. Each
    fill is asked for, used and let go of before the next."""
    room = torch.zeros(min(WINDOW, sum(sizes)), dtype=dtype)
    first = used = 0
    for size, fill in zip(sizes, fills, strict=True):
        done = 0
        while done < size:
            count = min(len(room) - used, size - done)
            if fill is not None:
                fill(room[used : used + count], done)
            used, done = used + count, done + count
            if used == len(room):
                yield first, room
                first, used = first + used, 0
                room.zero_()
    if used:
        yield first, room[:used]
