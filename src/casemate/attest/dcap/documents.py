"""TCB info and QE identity: Intel's signed JSON documents, read strictly.

Source: Intel, "PCS API" version 4, appendix A (TCB info, version 3) and B (enclave identity,
version 2). Version 2 of TCB info, of the retired API, is refused. What a document says beyond the
fields below is signed by Intel too, and not read.

A document is verified over its text as it came; parsing follows and never precedes that.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any, Final, TypeVar

from casemate.attest.jws import strict_object
from casemate.attest.verdict import refusal

T = TypeVar("T")

MAX_BYTES: Final = 256 << 10
MAX_LEVELS: Final = 256
TCB_INFO_VERSIONS: Final = (3,)
IDENTITY_VERSIONS: Final = (2,)

UP_TO_DATE: Final = "UpToDate"
OUT_OF_DATE: Final = "OutOfDate"
REVOKED: Final = "Revoked"
PLATFORM_STATUSES: Final = (
    UP_TO_DATE, "SWHardeningNeeded", "ConfigurationNeeded", "ConfigurationAndSWHardeningNeeded",
    OUT_OF_DATE, "OutOfDateConfigurationNeeded", REVOKED,
)  # fmt: skip
ENCLAVE_STATUSES: Final = (UP_TO_DATE, OUT_OF_DATE, REVOKED)


@dataclass(frozen=True, kw_only=True)
class Level:
    """A TCB level. ``sgx``, ``tdx``: the security versions of 16 components each (``tdx`` empty in
    TCB info of SGX). ``date``: Unix seconds."""

    sgx: bytes
    tdx: bytes
    pcesvn: int
    date: float
    status: str
    advisories: tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class SvnLevel:
    """A TCB level of an enclave or of a TDX module."""

    isvsvn: int
    date: float
    status: str
    advisories: tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class Module:
    """Who a TDX module is; ``levels`` is empty for version 0."""

    version: int
    mrsigner: bytes
    attributes: bytes
    attributes_mask: bytes
    levels: tuple[SvnLevel, ...]


@dataclass(frozen=True, kw_only=True)
class TcbInfo:
    """``id``: SGX or TDX; ``modules``: empty for SGX. ``levels`` and those of modules stand highest
    first. Times are Unix seconds."""

    id: str
    issue_date: float
    next_update: float
    fmspc: bytes
    pceid: bytes
    evaluation: int
    levels: tuple[Level, ...]
    modules: tuple[Module, ...]


@dataclass(frozen=True, kw_only=True)
class Identity:
    """``id``: QE (SGX) or TD_QE. Times are Unix seconds; ``levels`` stand highest first."""

    id: str
    issue_date: float
    next_update: float
    evaluation: int
    miscselect: int
    miscselect_mask: int
    attributes: bytes
    attributes_mask: bytes
    mrsigner: bytes
    isvprodid: int
    levels: tuple[SvnLevel, ...]


class _BadError(ValueError):
    """Turned into ``evidence.parse-document`` with the document's name."""


def _field(of: Any, name: str) -> Any:
    if not isinstance(of, dict) or name not in of:
        raise _BadError(f"{name} is missing")
    return of[name]


def _number(of: Any, name: str, most: int) -> int:
    found = _field(of, name)
    if type(found) is not int or not 0 <= found <= most:
        raise _BadError(f"{name} is no number up to {most}")
    return found


def _word(of: Any, name: str, admitted: tuple[str, ...]) -> str:
    found = _field(of, name)
    if found not in admitted:
        raise _BadError(f"{name} is none of {', '.join(admitted)}")
    return str(found)


def _hex(of: Any, name: str, size: int) -> bytes:
    found = _field(of, name)
    if not isinstance(found, str) or not re.fullmatch(r"[0-9A-Fa-f]*", found):
        raise _BadError(f"{name} is no hex")
    if len(found) != 2 * size:
        raise _BadError(f"{name} has {len(found)} hex digits, not {2 * size}")
    return bytes.fromhex(found)


def _date(of: Any, name: str) -> float:
    found = _field(of, name)
    try:
        if not re.fullmatch(r"[0-9-]{10}T[0-9:]{8}Z", found):
            raise ValueError
        return datetime.strptime(found, "%Y-%m-%dT%H:%M:%SZ").replace(tzinfo=UTC).timestamp()
    except (TypeError, ValueError):
        raise _BadError(f"{name} is no time of ISO 8601 in UTC") from None


def _list(of: Any, name: str, read: Callable[[Any], T], least: int = 1) -> list[T]:
    found = _field(of, name)
    if not isinstance(found, list) or not least <= len(found) <= MAX_LEVELS:
        raise _BadError(f"{name} is no list of {least} to {MAX_LEVELS}")
    return [read(item) for item in found]


def _advisory(found: Any) -> str:
    if not isinstance(found, str) or not re.fullmatch(r"[A-Za-z0-9-]{1,64}", found):
        raise _BadError("an advisory is no identifier")
    return found


def _advisories(of: Any) -> tuple[str, ...]:
    return tuple(_list(of, "advisoryIDs", _advisory, 0)) if "advisoryIDs" in of else ()


def _components(of: Any, name: str) -> bytes:
    found = _list(of, name, lambda component: _number(component, "svn", 0xFF))
    if len(found) != 16:
        raise _BadError(f"{name} has {len(found)} components, not 16")
    return bytes(found)


def _svn_level(of: Any) -> SvnLevel:
    return SvnLevel(
        isvsvn=_number(_field(of, "tcb"), "isvsvn", 0xFFFF),
        date=_date(of, "tcbDate"),
        status=_word(of, "tcbStatus", ENCLAVE_STATUSES),
        advisories=_advisories(of),
    )


def _svn_levels(of: Any) -> tuple[SvnLevel, ...]:
    found = sorted(_list(of, "tcbLevels", _svn_level), key=lambda x: x.isvsvn, reverse=True)
    if len({level.isvsvn for level in found}) != len(found):
        raise _BadError("a TCB level stands twice")
    return tuple(found)


def _platform_levels(of: Any, tdx: bool) -> tuple[Level, ...]:
    def read(level: Any) -> Level:
        tcb = _field(level, "tcb")
        return Level(
            sgx=_components(tcb, "sgxtcbcomponents"),
            tdx=_components(tcb, "tdxtcbcomponents") if tdx else b"",
            pcesvn=_number(tcb, "pcesvn", 0xFFFF),
            date=_date(level, "tcbDate"),
            status=_word(level, "tcbStatus", PLATFORM_STATUSES),
            advisories=_advisories(level),
        )

    def rank(level: Level) -> tuple[bytes, int, bytes]:
        return level.sgx, level.pcesvn, level.tdx

    found = sorted(_list(of, "tcbLevels", read), key=rank, reverse=True)
    if len({rank(level) for level in found}) != len(found):
        raise _BadError("a TCB level stands twice")
    return tuple(found)


def _module(of: Any, version: int, levels: tuple[SvnLevel, ...]) -> Module:
    return Module(
        version=version,
        mrsigner=_hex(of, "mrsigner", 48),
        attributes=_hex(of, "attributes", 8),
        attributes_mask=_hex(of, "attributesMask", 8),
        levels=levels,
    )


def _identified(of: Any) -> Module:
    name = _field(of, "id")
    if not isinstance(name, str) or not re.fullmatch(r"TDX_[0-9A-Fa-f]{2}", name):
        raise _BadError("a TDX module's id is none")
    return _module(of, int(name[4:], 16), _svn_levels(of))


def _modules(of: Any) -> tuple[Module, ...]:
    named = _list(of, "tdxModuleIdentities", _identified) if "tdxModuleIdentities" in of else []
    found = (_module(_field(of, "tdxModule"), 0, ()), *named)
    if len({module.version for module in found}) != len(found):
        raise _BadError("a TDX module stands twice")
    return found


def _tcb_info(of: Any) -> TcbInfo:
    _word_version(of, TCB_INFO_VERSIONS)
    tee = _word(of, "id", ("SGX", "TDX"))
    _number(of, "tcbType", 0)
    return TcbInfo(
        id=tee,
        issue_date=_date(of, "issueDate"),
        next_update=_date(of, "nextUpdate"),
        fmspc=_hex(of, "fmspc", 6),
        pceid=_hex(of, "pceId", 2),
        evaluation=_number(of, "tcbEvaluationDataNumber", 1 << 31),
        levels=_platform_levels(of, tee == "TDX"),
        modules=_modules(of) if tee == "TDX" else (),
    )


def _word_version(of: Any, admitted: tuple[int, ...]) -> None:
    if _number(of, "version", 255) not in admitted:
        raise _BadError(f"its version is none of {', '.join(map(str, admitted))}")


def _identity(of: Any) -> Identity:
    tee = _word(of, "id", ("QE", "TD_QE"))
    _word_version(of, IDENTITY_VERSIONS)
    return Identity(
        id=tee,
        issue_date=_date(of, "issueDate"),
        next_update=_date(of, "nextUpdate"),
        evaluation=_number(of, "tcbEvaluationDataNumber", 1 << 31),
        miscselect=int.from_bytes(_hex(of, "miscselect", 4), "little"),
        miscselect_mask=int.from_bytes(_hex(of, "miscselectMask", 4), "little"),
        attributes=_hex(of, "attributes", 16),
        attributes_mask=_hex(of, "attributesMask", 16),
        mrsigner=_hex(of, "mrsigner", 32),
        isvprodid=_number(of, "isvprodid", 0xFFFF),
        levels=_svn_levels(of),
    )


def _read(text: bytes, where: str, read: Callable[[Any], T]) -> T:
    try:
        return read(strict_object(text, where, MAX_BYTES))
    except _BadError as e:
        raise refusal("parse-document", f"{where} is malformed: {e}.", where) from None


def tcb_info(text: bytes, where: str = "tcb_info") -> TcbInfo:
    """Raises ``evidence.parse-json`` and ``evidence.parse-document``."""
    return _read(text, where, _tcb_info)


def identity(text: bytes, where: str = "qe_identity") -> Identity:
    """Raises ``evidence.parse-json`` and ``evidence.parse-document``."""
    return _read(text, where, _identity)
