"""Fields of trust policies: what they may be, and how they are read from TOML.

A section of a policy is a frozen dataclass whose fields are all given or ``Unchecked("reason")``.
Its ``__post_init__`` calls the checks below, each of which lets ``Unchecked`` pass and raises
``usage.trust`` with the field's name for anything malformed.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Collection, Mapping
from typing import Any, TypeVar

from casemate.attest.verdict import Unchecked
from casemate.spec.errors import UsageError

T = TypeVar("T")


def bad(message: str, where: str = "") -> UsageError:
    return UsageError(
        "usage.trust",
        message,
        mend="Write the trust policy as docs/evidence.md shows; a field that is not to be checked"
        ' is { unchecked = "reason" }.',
        where=where,
    )


def digests(found: object, digits: int | Collection[int], where: str) -> None:
    """A tuple of lower-case hex strings of ``digits`` digits, one at least."""
    sizes = {digits} if isinstance(digits, int) else set(digits)
    if isinstance(found, Unchecked):
        return
    if (
        not isinstance(found, tuple)
        or not found
        or not all(
            isinstance(x, str) and re.fullmatch(r"[0-9a-f]+", x) and len(x) in sizes for x in found
        )
    ):
        wanted = " or ".join(map(str, sorted(sizes)))
        raise bad(f"{where} must be a list of strings of {wanted} hex digits.", where)


def integers(found: object, admitted: range, where: str) -> None:
    """A tuple of numbers of ``admitted``, one at least."""
    if isinstance(found, Unchecked):
        return
    if (
        not isinstance(found, tuple)
        or not found
        or not all(type(x) is int and x in admitted for x in found)
    ):
        raise bad(f"{where} must be numbers from {admitted[0]} to {admitted[-1]}.", where)


def integer(found: object, admitted: range, where: str) -> None:
    """One number of ``admitted``."""
    if not isinstance(found, Unchecked):
        integers((found,), admitted, where)


def words(found: object, admitted: Collection[str] | None, where: str) -> None:
    """A tuple of strings, of ``admitted`` where that is given, one at least."""
    if isinstance(found, Unchecked):
        return
    if (
        not isinstance(found, tuple)
        or not found
        or not all(isinstance(x, str) and x and (admitted is None or x in admitted) for x in found)
    ):
        kinds = "strings" if admitted is None else f"of {', '.join(sorted(admitted))}"
        raise bad(f"{where} must be {kinds}.", where)


def flag(found: object, where: str) -> None:
    """true or false."""
    if not isinstance(found, Unchecked | bool):
        raise bad(f"{where} must be true or false.", where)


def flags(found: object, needed: Collection[str], known: Collection[str], where: str) -> None:
    """Names to true or false: all of ``needed``, others of ``known``."""
    if isinstance(found, Unchecked):
        return
    if not isinstance(found, Mapping) or not (
        set(needed) <= set(found) <= set(known)
        and all(type(value) is bool for value in found.values())
    ):
        wanted = ", ".join(sorted(needed))
        raise bad(f"{where} must say true or false for {wanted} and other known bits.", where)


def toml(data: Any) -> Any:
    """A value of TOML as a field's: lists as tuples, ``{ unchecked = "..." }`` as Unchecked."""
    if isinstance(data, list):
        return tuple(map(toml, data))
    if isinstance(data, dict) and set(data) == {"unchecked"}:
        if not isinstance(data["unchecked"], str) or not data["unchecked"].strip():
            raise bad("unchecked needs a reason.")
        return Unchecked(data["unchecked"])
    return data


def load(policy: type[T], section: object, where: str) -> T:
    """The policy in a section of TOML, every field given."""
    if not isinstance(section, dict):
        raise bad(f"{where} must be a table.", where)
    found = {name: toml(data) for name, data in section.items()}
    names = {f.name for f in dataclasses.fields(policy)}  # type: ignore[arg-type]
    for name in sorted(names ^ set(found)):
        problem = "is missing from" if name in names else "is no field of"
        raise bad(f"{name[:40]} {problem} {where}.", name[:40])
    try:
        return policy(**found)
    except (TypeError, AttributeError):
        raise bad(f"A field of {where} has the wrong type.", where) from None
