"""The rows of the table of docs/ledger.md as work that can be shared out: each a list of tasks,
each task a function of plain values that returns what it counted and what it found."""

from __future__ import annotations

import contextlib
import os
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any, Final

from torture import faults, forks, kills, race, sim, syscalls
from torture.model import Model, Violation
from torture.zygote import Zygote

SPAN: Final = 10_000_000  # seeds of one SEED
SIMS, FORKS = 50, 25  # in one task


@dataclass
class Part:
    """What one task did. ``wrong``: (what, the command that replays it)."""

    counts: Counter[str] = field(default_factory=Counter)
    wrong: list[tuple[str, str]] = field(default_factory=list)


@dataclass(frozen=True)
class Task:
    """``row`` of :data:`PLAYS` with these arguments; as ``python -m torture replay row …`` too."""

    row: str
    given: tuple[Any, ...]


def shared_memory() -> str | None:
    """A folder in memory: SIGKILL leaves its files as it leaves a disk's, and fsync costs
    nothing. ``TORTURE_FOLDER`` names another one: the parent's, which it removes."""
    if given := os.environ.get("TORTURE_FOLDER"):
        return given
    return "/dev/shm" if os.access("/dev/shm", os.W_OK) else None


@contextlib.contextmanager
def folder() -> Iterator[Path]:
    with tempfile.TemporaryDirectory(dir=shared_memory(), prefix="torture-") as made:
        yield Path(made)


@cache
def _zygote() -> Zygote:
    """One for each process; it ends with it."""
    return Zygote()


@cache
def _template() -> tuple[tempfile.TemporaryDirectory[str], Model]:
    made = tempfile.TemporaryDirectory(dir=shared_memory(), prefix="torture-")
    return made, kills.template(_zygote(), Path(made.name))


def _note(part: Part, error: BaseException, row: str, *given: object) -> None:
    said = " ".join(map(str, given))
    part.wrong.append(
        (
            f"{row} {said}: {type(error).__name__}: {error}",
            f"PYTHONPATH=tests PYTHONHASHSEED=0 .venv/bin/python -m torture replay {row} {said}",
        )
    )


def play_sim(first: int, count: int = 1) -> Part:
    part = Part()
    for seed in range(first, first + count):
        try:
            outcome = sim.run(seed)
        except Exception as e:
            _note(part, e, "sim", seed)
            continue
        part.counts["acknowledged"] += outcome.acknowledged
        part.counts["jobs"] += outcome.jobs
        part.counts["crashes"] += sum(f in ("power", "kill", "lie") for f in outcome.fates)
        if outcome.fates[-1] in sim.HOSTILE:
            part.counts[outcome.found.split(":")[0]] += 1
    part.counts["runs"] += count
    return part


def play_kills(seed: int, count: int = kills.SERIES) -> Part:
    part = Part()
    made, begun = _template()
    try:
        found = kills.series(_zygote(), Path(made.name), begun, seed, count)
    except Exception as e:
        _note(part, e, "kills", seed, count)
        part.counts["kills"] += count
        return part
    for name in ("kills", "starting", "acknowledged", "jobs", "reads"):
        part.counts[name] += getattr(found, name)
    return part


def play_call(way: str, first: int, last: int, step: int = 1) -> Part:
    part = Part()
    with folder() as where:
        for number in range(first, last + 1, step):
            try:
                part.counts["calls"] += syscalls.one(_zygote(), where, number, way)
            except Exception as e:
                _note(part, e, "call", way, number, number)
    return part


def play_fault(kind: str, at: int, step: int = 0, fresh: int = 0) -> Part:
    """At one call, or (``step``) from it on at each so many."""
    part = Part()
    try:
        most = faults.calls(faults.SEED, fresh=bool(fresh)) if step else at
    except Exception as e:  # the life fails without a fault
        _note(part, e, "fault", kind, 1 << 30, 0, fresh)
        return part
    for place in range(at, most + 1, step or 1):
        try:
            sim.run(faults.SEED, fates=(kind,), at=place, fresh=bool(fresh), signed=False)
        except Exception as e:
            _note(part, e, "fault", kind, place, 0, fresh)
        part.counts["faults"] += 1
    return part


def play_race(requests: int) -> Part:
    part = Part()
    try:
        with folder() as where:
            found = race.race(_zygote(), where, requests)
    except Exception as e:
        _note(part, e, "race", requests)
        return part
    part.counts.update(requests=found.requests, granted=found.granted, refused=found.refused)
    return part


def play_fork(first: int, count: int = 1) -> Part:
    part = Part()
    for seed in range(first, first + count):
        try:
            found = forks.fork(seed)
        except Exception as e:
            _note(part, e, "fork", seed)
            continue
        part.counts[found.by] += 1
    part.counts["forks"] += count
    return part


PLAYS: Final[dict[str, Callable[..., Part]]] = {
    "sim": play_sim,
    "kills": play_kills,
    "call": play_call,
    "fault": play_fault,
    "race": play_race,
    "fork": play_fork,
}


def play(task: Task) -> tuple[str, Part]:
    # While SQLite undoes what a first error stopped, a second one reaches the interpreter only.
    sys.unraisablehook = lambda _: None
    return task.row, PLAYS[task.row](*task.given)


def way() -> str:
    return "strace" if syscalls.can_trace() else "seam"


def calls() -> int:
    """How many calls there are to die at, about."""
    if way() == "seam":
        return 1000  # past the last one nothing dies
    with folder() as where:
        return syscalls.count(_zygote(), where)


def tasks(
    *, sims: int, kills_: int, forks_: int, call_step: int, fault_step: int, race_: int, seed: int
) -> list[Task]:
    """All that is to be done, the longest first. A step of 0 leaves its row out."""
    first = seed * SPAN
    out = []
    if call_step:
        last, width = calls(), 16 * call_step
        out += [
            Task("call", (way(), at, min(last, at + width - 1), call_step))
            for at in range(1, last + 1, width)
        ]
    if fault_step:
        width = 8 * fault_step
        out += [
            Task("fault", (kind, at, width, fresh))
            for kind in faults.FAULTS
            for fresh in (0, 1)
            for at in range(1, width + 1, fault_step)
        ]
    if race_:
        out.append(Task("race", (race_,)))
    out += [
        Task("kills", (first + at, min(kills.SERIES, kills_ - at)))
        for at in range(0, kills_, kills.SERIES)
    ]
    out += [Task("sim", (first + at, min(SIMS, sims - at))) for at in range(0, sims, SIMS)]
    out += [Task("fork", (first + at, min(FORKS, forks_ - at))) for at in range(0, forks_, FORKS)]
    return out


__all__ = ["PLAYS", "Part", "Task", "Violation", "play", "tasks", "way"]
