"""What Intel's documents say about a platform's TCB: one status, with the open advisories.

Source: Intel, "PCS API" version 4 ("Determine TCB level", TCB info and enclave identity), and the
order in which Intel's Quote Verification Library (section 4.1.2.4) makes these checks.

Procedure:

 1. ``tcb-info``: TCB info is of the quote's TEE, FMSPC and PCEID. ``qe-identity``: QE identity is
    of the TEE's quoting enclave, whose MISCSELECT and ATTRIBUTES are right under its masks, whose
    MRSIGNER and ISVPRODID are right and which is no debug enclave.
 2. ``tdx-module`` (TDX): TEE_TCB_SVN[1] names the module's version; MRSIGNERSEAM is that version's
    signer, SEAMATTRIBUTES are zero and those of the version.
 3. ``tcb-level``: the highest level of which no component is above the platform's: the 16 of
    CPUSVN, PCESVN and, for TDX, the 16 of TEE_TCB_SVN, but for the first two where the module's
    version is above 0: then its own levels speak for it, the highest whose ISVSVN is at most
    TEE_TCB_SVN[0]. The QE's level is the highest at most its ISVSVN. No level of any of the three:
    refused, with the status ``none matches``.
 4. The statuses converge: Revoked of any is Revoked; a module or QE that is OutOfDate makes
    OutOfDate, and OutOfDateConfigurationNeeded where the platform wants configuration. Advisories
    of all three are put together.
 5. A TD report 1.5 also has TEE_TCB_SVN2, of the module that runs now, which may be newer than what
    the TD was launched under. It is evaluated likewise. Where the launch was OutOfDate and what
    runs now is not, the status is that a relaunch of the TD is advised; what runs now and is
    Revoked makes Revoked.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Final

from casemate.attest.dcap.abi import EnclaveReport, TdReport
from casemate.attest.dcap.documents import (
    OUT_OF_DATE,
    REVOKED,
    Identity,
    Level,
    Module,
    SvnLevel,
    TcbInfo,
)
from casemate.attest.dcap.pck import Platform
from casemate.attest.dcap.policy import RELAUNCH, RELAUNCH_CONFIGURATION
from casemate.attest.dcap.verify import Current, Endorsed
from casemate.attest.verdict import Checks, Refused, refusal

NONE: Final = "none matches"
_MEND: Final = "Ask the operator for the collateral of this very platform."
_UPDATE: Final = "Ask the operator to update the platform's firmware and microcode."
_CONFIGURATION: Final = "OutOfDateConfigurationNeeded"
_IDENTITIES: Final = {"SGX": "QE", "TDX": "TD_QE"}


@dataclass(frozen=True, kw_only=True)
class Tcb:
    """``module``: ``None`` for SGX and for a TDX module without levels."""

    status: str
    advisories: tuple[str, ...]
    platform: Level
    module: SvnLevel | None
    qe: SvnLevel


def _foreign(reason: str, message: str, where: str) -> Refused:
    return refusal(f"collateral-{reason}", message, where, _MEND)


def _tcb_info(info: TcbInfo, tee: str, platform: Platform) -> str:
    if info.id != tee:
        raise _foreign("tee", f"TCB info is of {info.id}, the quote of {tee}.", "tcb_info")
    for name in ("fmspc", "pceid"):
        told, own = getattr(info, name), getattr(platform, name)
        if told != own:
            message = f"TCB info is of {name.upper()} {told.hex()}, the platform {own.hex()}."
            raise _foreign(name, message, "tcb_info")
    return f"FMSPC {info.fmspc.hex()}, PCEID {info.pceid.hex()}"


def _masked(data: bytes, mask: bytes) -> bytes:
    return bytes(a & b for a, b in zip(data, mask, strict=True))


def _identity(identity: Identity, report: EnclaveReport, tee: str) -> None:
    if identity.id != _IDENTITIES[tee]:
        raise _foreign("tee", f"QE identity is of {identity.id}, not of {tee}.", "qe_identity")
    mask, attributes = identity.attributes_mask, identity.attributes
    wrong = {
        "MISCSELECT": (report.miscselect ^ identity.miscselect) & identity.miscselect_mask,
        "ATTRIBUTES": _masked(report.attributes, mask) != _masked(attributes, mask),
        "ATTRIBUTES.DEBUG": report.attribute("debug"),
        "MRSIGNER": report.mrsigner != identity.mrsigner,
        "ISVPRODID": report.isvprodid != identity.isvprodid,
    }
    for name, differs in wrong.items():
        if differs:
            raise refusal(
                "tcb-qe", f"The quoting enclave's {name} is not Intel's.", "qe_identity", _MEND
            )


def _version(info: TcbInfo, version: int) -> Module:
    found = next((module for module in info.modules if module.version == version), None)
    if found is None:
        raise refusal(
            "tcb-module", f"TCB info knows no TDX module of version {version}.", "tcb_info", _MEND
        )
    return found


def _module(info: TcbInfo, report: TdReport) -> Module:
    found = _version(info, report.tee_tcb_svn[1])
    if report.mrsignerseam != found.mrsigner:
        raise refusal("tcb-module", "MRSIGNERSEAM is not the TDX module's.", "quote.bin", _MEND)
    attributes = report.seamattributes
    if any(attributes) or _masked(attributes, found.attributes_mask) != found.attributes:
        raise refusal("tcb-module", "SEAMATTRIBUTES are not the TDX module's.", "quote.bin", _MEND)
    return found


def _reaches(own: bytes, wanted: bytes) -> bool:
    return all(a >= b for a, b in zip(own, wanted, strict=True))


def _svn(levels: tuple[SvnLevel, ...], isvsvn: int) -> SvnLevel | None:
    return next((level for level in levels if isvsvn >= level.isvsvn), None)


def _below(what: str, checks: Checks) -> Refused:
    checks.tcb_status = NONE
    return refusal("tcb-none", f"No TCB level matches {what}.", "tcb_info", _UPDATE)


def converge(platform: str, other: str) -> str:
    """The status of a platform with a part whose own status is UpToDate, OutOfDate or Revoked."""
    if REVOKED in (platform, other):
        return REVOKED
    if other != OUT_OF_DATE:
        return platform
    return _CONFIGURATION if "Configuration" in platform else OUT_OF_DATE


def _relaunch(launch: str, current: str) -> str:
    """The status of a TD by those of its launch and of what runs now."""
    if current == REVOKED:
        return REVOKED
    if not launch.startswith(OUT_OF_DATE) or current.startswith(OUT_OF_DATE):
        return launch
    return RELAUNCH_CONFIGURATION if "Configuration" in launch + current else RELAUNCH


def _rated(of: Endorsed, current: Current, svn: bytes | None, checks: Checks) -> Tcb:
    """The platform's TCB; ``svn``: TEE_TCB_SVN or TEE_TCB_SVN2, ``None`` for SGX."""
    info, versioned = current.tcb_info, svn is not None and svn[1] > 0
    first = 2 if versioned else 0
    level = next(
        (
            level
            for level in info.levels
            if _reaches(of.platform.svns, level.sgx)
            and of.platform.pcesvn >= level.pcesvn
            and (svn is None or _reaches(svn[first:], level.tdx[first:]))
        ),
        None,
    )
    if level is None:
        raise _below("the platform: its security versions are too low", checks)
    status, module = level.status, None
    if svn is not None and versioned:
        module = _svn(_version(info, svn[1]).levels, svn[0])
        if module is None:
            raise _below(f"the TDX module's ISVSVN {svn[0]}", checks)
        status = converge(status, module.status)
    isvsvn = of.quote.qe_report.isvsvn
    qe = _svn(current.identity.levels, isvsvn)
    if qe is None:
        raise _below(f"the quoting enclave's ISVSVN {isvsvn}", checks)
    advisories: dict[str, None] = {}
    for part in (level, module, qe):
        advisories |= dict.fromkeys(part.advisories if part else ())
    return Tcb(
        status=converge(status, qe.status),
        advisories=tuple(advisories),
        platform=level,
        module=module,
        qe=qe,
    )


def _levels(of: Endorsed, current: Current, checks: Checks) -> Tcb:
    body = of.quote.body
    if isinstance(body, EnclaveReport):
        return _rated(of, current, None, checks)
    launch = _rated(of, current, body.tee_tcb_svn, checks)
    if body.tee_tcb_svn2 is None:
        return launch
    now = _rated(of, current, body.tee_tcb_svn2, checks)
    return replace(launch, status=_relaunch(launch.status, now.status))


def evaluate(of: Endorsed, current: Current, checks: Checks) -> Tcb:
    """Follow the procedure above; ``checks`` gets the status and the advisories."""
    body = of.quote.body
    tee = "TDX" if isinstance(body, TdReport) else "SGX"
    with checks.step("tcb-info") as step:
        step.detail = _tcb_info(current.tcb_info, tee, of.platform)
    with checks.step("qe-identity") as step:
        _identity(current.identity, of.quote.qe_report, tee)
        step.detail = f"{current.identity.id}, ISVSVN {of.quote.qe_report.isvsvn}"
    if isinstance(body, TdReport):
        with checks.step("tdx-module") as step:
            module = _module(current.tcb_info, body)
            step.detail = f"version {module.version}, ISVSVN {body.tee_tcb_svn[0]}"
    with checks.step("tcb-level") as step:
        tcb = _levels(of, current, checks)
        checks.tcb_status, checks.advisories = tcb.status, tcb.advisories
        step.detail = f"{tcb.status} (platform {tcb.platform.status}, QE {tcb.qe.status}"
        step.detail += f", TDX module {tcb.module.status})" if tcb.module else ")"
    return tcb
