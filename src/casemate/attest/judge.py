"""Many checks of one step: all are made before the first failure is raised."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from functools import partial
from typing import Any, TypeAlias

from casemate.attest.verdict import Checks, Refused, Step, Unchecked, refusal

# A field of a policy: its name, whether it holds (or why it is not looked at), what was found, what
# is wanted.
Judged: TypeAlias = tuple[str, bool | Unchecked, str, str]
# From name, what was found and what is wanted.
Unwanted: TypeAlias = Callable[[str, str, str], Refused]


def among(
    name: str, found: object, admitted: tuple[Any, ...] | Unchecked, absent: str = ""
) -> Judged:
    """Whether ``found`` is one of ``admitted``; absent: how "" is told."""
    if isinstance(admitted, Unchecked):
        return name, admitted, "", ""
    wanted = "one of " + ", ".join(map(str, admitted[:8]))
    return name, found in admitted, str(found) or absent, wanted


def unwanted(whose: str, mend: str, name: str, found: str, wanted: str) -> Refused:
    """The refusal ``appraise-<name>`` of what ``whose`` field says."""
    message = f"The {whose}'s {name} is {found}; the policy wants {wanted}."
    return refusal(f"appraise-{name}", message, name, mend)


def field(judged: Judged, refused: Unwanted, step: Step) -> None:
    """Tell a judged field, or raise its refusal."""
    name, ok, found, wanted = judged
    if isinstance(ok, Unchecked):
        step.unchecked(ok.reason)
    elif not ok:
        raise refused(name, found, wanted)
    else:
        step.detail = found


def made(todo: Iterable[tuple[str, Callable[[Step], None]]], checks: Checks) -> list[Refused]:
    """Make each check under its name; the failures in order."""
    failed: list[Refused] = []
    for name, check in todo:
        try:
            with checks.step(name) as step:
                check(step)
        except Refused as e:
            failed.append(e)
    return failed


def every(todo: Iterable[tuple[str, Callable[[Step], None]]], checks: Checks) -> None:
    """:func:`made`; raises the first failure, with all checks."""
    if failed := made(todo, checks):
        failed[0].checks = tuple(checks.done)
        raise failed[0]


def fields(
    judged: Iterable[Judged], refused: Unwanted
) -> Iterator[tuple[str, Callable[[Step], None]]]:
    """Judged fields as checks for :func:`every`."""
    return ((one[0], partial(field, one, refused)) for one in judged)
