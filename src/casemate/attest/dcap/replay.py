"""Event logs beside a TDX quote, replayed to its RTMRs.

Source: UEFI 2.10 section 38.4.1 (registers of a confidential VM, the ACPI table CCEL); Intel TDX
Module Base Architecture (RTMR.EXTEND: SHA-384 of the register before and the digest). Logs in JSON
are lists of objects with ``imr`` (0 to 3), ``event_type``, ``digest``, ``event``, ``event_payload``
as guest agents write them, other members unread; an event of :data:`RUNTIME` has the digest
SHA-384(event_type, 4 bytes little endian, ``:``, event, ``:``, payload).

Procedure:

 1. The log is parsed strictly: ``event_log.json``, or a CCEL in TCG's form (``ccel_data.bin`` and
    the like).
 2. Each register is replayed from zeros. RTMR0 to RTMR2 are those of the quote, all of them; so is
    RTMR3, unless a CCEL has no event of it: it is the guest's, and firmware does not log it.
 3. Of a JSON log, the digests of runtime events are recomputed. How many events say something that
    no digest covers is told.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

from casemate.attest.dcap.abi import TdReport
from casemate.attest.jws import strict_json
from casemate.attest.kind import Files
from casemate.attest.tpm import eventlog
from casemate.attest.verdict import Refused, Step, Unchecked, refusal

RUNTIME: Final = 0x08000001
MAX_BYTES: Final = 4 << 20
MAX_EVENTS: Final = 1 << 14
_JSON: Final = re.compile(r"event_?log\.json")
_CCEL: Final = re.compile(r"(?:ccel|event_?log|ccel_data|cc_?eventlog)\.bin")
_MEMBERS: Final = {"imr", "event_type", "digest", "event", "event_payload"}


@dataclass(frozen=True, kw_only=True)
class Replayed:
    """``rtmrs``: register to its value. ``events``: how many; ``uncovered``: of those, how many
    say something that no digest covers."""

    file: str
    rtmrs: Mapping[int, bytes]
    events: int
    uncovered: int


def _bad(where: str, problem: str) -> Refused:
    return refusal("parse-event-log", f"The event log is malformed: {problem}.", where)


def _event(found: object, where: str) -> tuple[int, bytes, bool]:
    """Register, digest, and whether the digest covers what the event says."""
    if not isinstance(found, dict) or not set(found) >= _MEMBERS:
        raise _bad(where, "an event lacks a member")
    imr, kind, name = found["imr"], found["event_type"], found["event"]
    if type(imr) is not int or not 0 <= imr <= 3:
        raise _bad(where, "a register is none of 0 to 3")
    if type(kind) is not int or not 0 <= kind < 1 << 32 or not isinstance(name, str):
        raise _bad(where, "an event's type or name is none")
    hexed = []
    for member in ("digest", "event_payload"):
        text = found[member]
        if not isinstance(text, str) or not re.fullmatch(r"(?:[0-9a-f]{2})*", text):
            raise _bad(where, f"{member} is no lower-case hex")
        hexed.append(bytes.fromhex(text))
    digest, payload = hexed
    told = b":".join((kind.to_bytes(4, "little"), name.encode(), payload))
    if kind == RUNTIME and not digest:  # some agents leave out what can be computed
        digest = hashlib.sha384(told).digest()
    if len(digest) != 48:
        raise _bad(where, "a digest is not of SHA-384")
    if kind == RUNTIME:
        if hashlib.sha384(told).digest() != digest:
            raise refusal(
                "binding-event-log", "An event's digest is not that of what it says.", where
            )
        return imr, digest, True
    return imr, digest, not name and hashlib.sha384(payload).digest() == digest


def _json(data: bytes, where: str) -> Replayed:
    found = strict_json(data, where, MAX_BYTES)
    if not isinstance(found, list) or len(found) > MAX_EVENTS:
        raise _bad(where, f"it is no list of up to {MAX_EVENTS} events")
    rtmrs = dict.fromkeys(range(4), bytes(48))
    uncovered = 0
    for one in found:
        imr, digest, covered = _event(one, where)
        rtmrs[imr] = hashlib.sha384(rtmrs[imr] + digest).digest()
        uncovered += not covered
    return Replayed(file=where, rtmrs=rtmrs, events=len(found), uncovered=uncovered)


def _ccel(data: bytes, where: str) -> Replayed:
    log = eventlog.parse(data)
    rtmrs = {**dict.fromkeys(range(3), bytes(48)), **log.rtmrs()}
    return Replayed(file=where, rtmrs=rtmrs, events=len(log.events), uncovered=len(log.uncovered))


def read(files: Files) -> Replayed | None:
    """The log in ``files``, replayed; ``None`` where there is none. Raises
    ``evidence.parse-event-log``, ``parse-json`` and, for an event that is not what its digest says,
    ``binding-event-log``."""
    logs = [name for name in files if _JSON.fullmatch(name) or _CCEL.fullmatch(name)]
    if len(logs) > 1:
        raise _bad(logs[0], "there are several")
    if not logs:
        return None
    name = logs[0]
    return (_json if name.endswith(".json") else _ccel)(files[name], name)


def check(files: Files, body: TdReport, wanted: bool | Unchecked, step: Step) -> Replayed | None:
    """Follow the procedure above. ``wanted``: whether there must be a log. Raises
    ``evidence.binding-event-log`` too where the log does not lead to the quote's RTMRs."""
    found = read(files)
    if found is None:
        if wanted is True:
            raise refusal(
                "binding-event-log-missing", "The policy wants an event log, and there is none.",
                "event_log.json", "Ask the operator for the event log too.",
            )  # fmt: skip
        step.unchecked(wanted.reason if isinstance(wanted, Unchecked) else "there is none")
        return None
    for register, value in sorted(found.rtmrs.items()):
        own = getattr(body, f"rtmr{register}", None)
        if value != own:
            raise refusal(
                "binding-event-log",
                f"The event log leads to another RTMR{register} than the quote's.",
                found.file,
                "Ask for the log of this very guest, taken with the quote.",
            )
    step.detail = f"{found.events} events lead to RTMR" + ", ".join(map(str, sorted(found.rtmrs)))
    if found.uncovered:
        step.detail += f"; what {found.uncovered} of them say is covered by no digest"
    return found
