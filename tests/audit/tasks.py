"""What an audit does, as tasks for processes of their own."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Final

from audit import battery, bugs, canary, jobs, law, settings


@dataclass(frozen=True)
class Part:
    """What one task gave: its figures, and what it found wrong."""

    kind: str
    figures: Any = None
    wrong: tuple[str, ...] = ()


@dataclass(frozen=True)
class Task:
    kind: str
    args: tuple[Any, ...] = field(default=())


def _battery(seed: int, steps: int) -> Part:
    law.made.clear()
    seconds, wrong = {}, []
    for name in battery.CHECKS:
        begun = time.perf_counter()
        if (found := battery.one(name, seed, steps)) is not None:
            wrong.append(f"{found.check}, seed {seed}: {found.what}")
        seconds[name] = time.perf_counter() - begun
    return Part("battery", (dict(law.made), seconds), tuple(wrong))


def _clean(first: int, count: int, steps: int) -> Part:
    wrong = []
    for seed in range(first, first + count):
        wrong += [f"clean run {seed}, {f.check}: {f.what}" for f in battery.run(seed, steps=steps)]
    return Part("clean", count, tuple(wrong))


def _bug(name: str, seed: int, steps: int) -> Part:
    found = bugs.find(name, seed, steps)
    wrong = () if found else (f"the seeded bug {name!r} is not caught",)
    return Part("bugs", (name, found), wrong)


def _canary(epsilon: float, path: str, draws: int, floor: float, seed: int) -> Part:
    shown = canary.single(epsilon, path, draws, seed)
    return Part("canaries", shown, _broken(lambda: canary.check(shown, floor)))


def _one_run(seed: int) -> Part:
    found = canary.one_run(seed)
    return Part("one run", found, _broken(lambda: canary.check_run(found)))


def _settings(first: int, count: int, seed: int) -> Part:
    made, wrong = [], []
    for number in range(first, first + count):
        try:
            made.append(settings.compare(number, seed))
        except law.Broken as e:
            wrong.append(str(e))
    return Part("settings", made, tuple(wrong))


def _jobs(count: int, seed: int) -> Part:
    found = jobs.run(count, seed)
    return Part("jobs", found, _broken(lambda: jobs.check(found)))


def _broken(check: Callable[[], None]) -> tuple[str, ...]:
    try:
        check()
    except law.Broken as e:
        return (str(e),)
    return ()


PLAYS: Final[dict[str, Callable[..., Part]]] = {
    "battery": _battery,
    "clean": _clean,
    "bugs": _bug,
    "canaries": _canary,
    "one run": _one_run,
    "settings": _settings,
    "jobs": _jobs,
}


def play(task: Task) -> Part:
    """One task; what it raises is a violation."""
    try:
        return PLAYS[task.kind](*task.args)
    except Exception as e:
        return Part(task.kind, None, (f"{task.kind} {task.args}: {type(e).__name__}: {e}"[:600],))


@dataclass(frozen=True)
class Counts:
    """How much of each; ``other``: draws of the path ``graph``, whose floors are lower. jobs: 0 for
    none."""

    clean: int = 40
    settings: int = 200
    draws: int = canary.DRAWS
    other: int = 20_000
    one_runs: int = 4
    jobs: int = 0
    bug_steps: int = 4_000


FULL: Final = Counts(clean=1000, settings=2000, other=canary.DRAWS, one_runs=20, jobs=2000,
                     bug_steps=battery.STEPS)  # fmt: skip


def tasks(counts: Counts, seed: int) -> list[Task]:
    """The longest first."""
    made = [Task("jobs", (counts.jobs, seed))] if counts.jobs else []
    for path, draws in (("record", counts.draws), ("auto", counts.other)):
        for epsilon in canary.FLOORS if draws else ():
            floor = canary.floor(epsilon, path, draws)
            made.append(Task("canaries", (epsilon, path, draws, floor, seed)))
    made.append(Task("battery", (seed, battery.STEPS)))
    each = 5
    made += [
        Task("clean", (1_000_000 * seed + n, min(each, counts.clean - n), 4_000))
        for n in range(0, counts.clean, each)
    ]
    made += [
        Task("settings", (n, min(10, counts.settings - n), seed))
        for n in range(0, counts.settings, 10)
    ]
    made += [Task("bugs", (name, seed, counts.bug_steps)) for name in bugs.BUGS]
    made += [Task("one run", (seed + n,)) for n in range(counts.one_runs)]
    return made
