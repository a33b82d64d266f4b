"""A parser is fed what an attacker would send, input after input, and must keep to its limits.

An input may be read or refused; another exception, 50 ms of processor time or 64 MiB of memory for
one input is a failure. Whoever is over a limit is asked again alone, so that neither a busy machine
nor the collector's turn is taken for the parser's fault.
"""

from __future__ import annotations

import contextlib
import gc
import itertools
import time
import tracemalloc
from collections.abc import Callable, Iterable
from pathlib import Path

SECONDS = 0.05
BYTES = 64 << 20
TRIES = 3
_BATCH = 256
_CLEAR = Path("/proc/self/clear_refs")
_STATUS = Path("/proc/self/status")

Refusals = tuple[type[Exception], ...]
Parse = Callable[[bytes], object]


class Exceeded(AssertionError):
    """An input cost more than it may."""


class Foreign(AssertionError):
    """A parser let an exception out that is not a refusal."""


def _resident(line: str) -> int:
    """Bytes of ``VmRSS`` (now) or ``VmHWM`` (the most since the mark, proc(5))."""
    found = next(x for x in _STATUS.read_text().splitlines() if x.startswith(line))
    return int(found.split()[1]) << 10


def _mark() -> int:
    """Memory held now; from here on the most of it is noted anew (5: proc(5), clear_refs)."""
    with contextlib.suppress(OSError):  # where that is forbidden, only new peaks are seen
        _CLEAR.write_text("5")
    return _resident("VmRSS")


def _try(parse: Parse, data: bytes, refusals: Refusals) -> bool:
    try:
        parse(data)
    except refusals:
        return False
    except Exception as e:
        raise Foreign(f"{type(e).__name__}: {e} for {data[:4000]!r}") from e
    return True


def _least(cost: Callable[[], float], limit: float) -> float:
    """The least of a few tries, or the first within the limit."""
    least = float("inf")
    for _ in range(TRIES):
        gc.collect()
        least = min(least, cost())
        if least <= limit:
            break
    return least


def seconds(parse: Parse, data: bytes, refusals: Refusals) -> float:
    """Processor time of one input, the least of a few tries."""

    def cost() -> float:
        began = time.process_time()
        _try(parse, data, refusals)
        return time.process_time() - began

    return _least(cost, SECONDS)


def memory(parse: Parse, data: bytes, refusals: Refusals) -> float:
    """The most memory that one input took, Python's or any other, the least of a few tries."""

    def cost() -> float:
        before = _mark()
        tracemalloc.start()
        try:
            _try(parse, data, refusals)
            return max(tracemalloc.get_traced_memory()[1], _resident("VmHWM") - before)
        finally:
            tracemalloc.stop()

    return _least(cost, BYTES)


def feed(parse: Parse, inputs: Iterable[bytes], refusals: Refusals) -> int:
    """How many of ``inputs`` were read. Raises :class:`Foreign` and :class:`Exceeded`."""
    taken, rest = 0, iter(inputs)
    while batch := list(itertools.islice(rest, _BATCH)):
        before = _mark()
        for data in batch:
            began = time.process_time()
            taken += _try(parse, data, refusals)
            if time.process_time() - began > SECONDS:
                took = seconds(parse, data, refusals)
                if took > SECONDS:
                    raise Exceeded(f"{1000 * took:.0f} ms for {data[:4000]!r}")
        if _resident("VmHWM") - before > BYTES:
            for data in batch:
                took = memory(parse, data, refusals)
                if took > BYTES:
                    raise Exceeded(f"{took / 2**20:.0f} MiB for {data[:4000]!r}")
    return taken
