"""EIO, ENOSPC, EMFILE and short writes at each call of the disk, the whole server in front of it.

The same life each time, from an empty disk or from a grown one, with the fault at another call:
the server answers with an error, or stops, and after the next start all is there.
"""

from __future__ import annotations

from torture.sim import FAULTS, run

SEED = 7


def calls(seed: int, *, fresh: bool) -> int:
    """How many calls of the disk the life makes when nothing fails."""
    return run(seed, fates=("EIO",), at=1 << 30, fresh=fresh, signed=False).calls


def sweep(kind: str, start: int, step: int, *, seed: int = SEED, fresh: bool = False) -> int:
    """The fault at calls ``start``, ``start + step``, …; how many. Raises
    :class:`torture.model.Violation`."""
    places = range(start, calls(seed, fresh=fresh) + 1, step)
    for at in places:
        try:
            run(seed, fates=(kind,), at=at, fresh=fresh, signed=False)
        except AssertionError as e:
            raise type(e)(f"{kind} at call {at}, seed {seed}, fresh {fresh}: {e}") from e
    return len(places)


__all__ = ["FAULTS", "calls", "sweep"]
