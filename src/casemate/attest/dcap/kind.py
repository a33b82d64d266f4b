"""SGX and TDX as kinds of evidence.

Files: ``quote.bin``; collateral as :mod:`casemate.attest.dcap.collateral` finds it; for TDX an
event log as :mod:`casemate.attest.dcap.replay` finds it.

Procedure:

 1. ``parse``: the quote, strictly (``abi``). What follows its signed data is told.
    ``collateral-parse``: what lies beside it (``collateral``).
 2. ``pck-chain`` to ``signature`` (``verify.quote``): from here on ``crypto`` is valid.
 3. ``validity`` of the PCK chain, ``debug``, and the ``event-log`` of a TDX quote.
 4. Collateral (``verify.collateral``), then the TCB (``tcb``).
 5. The policy, field by field (``appraise``).

Steps 3 and 4 are made to the end, so that the platform's status is known of a debug enclave too;
what failed first is raised. A quote that is refused for what it says itself is refused, with or
without collateral.
"""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Callable, Mapping
from typing import Final, TypeVar

from casemate.attest.dcap import (
    abi,
    appraise,
    collateral,
    documents,
    pck,
    policy,
    replay,
    tcb,
    verify,
)
from casemate.attest.dcap.abi import Quote, TdReport
from casemate.attest.dcap.policy import SgxPolicy, TdxPolicy
from casemate.attest.kind import Claims, Files, Kind, whole
from casemate.attest.verdict import Checks, Refused, refusal
from casemate.spec.canonical import Json

T = TypeVar("T")

FILE: Final = "quote.bin"


def _version(files: Files) -> int:
    return int.from_bytes(files[FILE][:2], "little") if FILE in files else 0


def _is_tdx(files: Files) -> bool:
    return FILE in files and (
        _version(files) in (4, 5) or files[FILE][4:8] == abi.TDX.to_bytes(4, "little")
    )


def _is_sgx(files: Files) -> bool:
    return FILE in files and not _is_tdx(files)


def _parse(files: Files, wanted: type[abi.Body], checks: Checks) -> Quote:
    with checks.step("parse") as step:
        quote = abi.parse(files[FILE])
        if not isinstance(quote.body, wanted):
            raise refusal("parse-quote-version", "The quote is of another kind of TEE.", FILE)
        step.detail = f"version {quote.header.version}, {len(quote.signed)} bytes signed"
        if quote.padding:
            step.detail += f"; {len(quote.padding)} bytes follow that nothing covers: "
            step.detail += _padding(quote.padding)
    return quote


def _collateral(files: Files, checks: Checks) -> collateral.Collateral:
    with checks.step("collateral-parse") as step:
        parts = collateral.parse(files)
        step.detail = f"missing: {', '.join(parts.missing) or 'nothing'}"
    return parts


def _padding(data: bytes) -> str:
    if not any(data):
        return "zeros"
    return data.hex() if len(data) <= 64 else f"SHA-256 {hashlib.sha256(data).hexdigest()}"


def _hex(found: object) -> dict[str, Json]:
    names = [f.name for f in dataclasses.fields(found) if f.name != "raw"]  # type: ignore[arg-type]
    values = {name: getattr(found, name) for name in names}
    return {n: v.hex() if isinstance(v, bytes) else v for n, v in values.items() if v is not None}


def _platform(platform: pck.Platform) -> dict[str, Json]:
    return {**_hex(platform), "flags": dict(platform.flags)}


def _claims(of: verify.Endorsed, found: tcb.Tcb) -> Claims:
    body, platform = of.quote.body, of.platform
    measured = body.mrtd if isinstance(body, TdReport) else body.mrenclave
    versions = {f"cpusvn{n:02d}": svn for n, svn in enumerate(platform.svns)}
    versions |= {"pcesvn": platform.pcesvn, "qe_isvsvn": of.quote.qe_report.isvsvn}
    if isinstance(body, TdReport):
        versions |= {f"tee_tcb_svn{n:02d}": svn for n, svn in enumerate(body.tee_tcb_svn)}
    product = "TDX" if isinstance(body, TdReport) else "SGX"
    nonces = (body.report_data, body.report_data.rstrip(b"\0"))
    return Claims(
        bound=body.report_data,
        fresh=tuple(nonce for nonce in dict.fromkeys(nonces) if nonce),
        product=f"{product} (FMSPC {platform.fmspc.hex()})",
        root=of.root.fingerprint,
        measurement=measured.hex(),
        chip_id=platform.ppid.hex(),
        tcb=versions,
        other={
            "report": _hex(body),
            "platform": _platform(platform),
            "tcb_date": found.platform.date,
        },
    )


def _check(
    files: Files, trust: SgxPolicy | TdxPolicy, now: float, checks: Checks, body: type[abi.Body]
) -> Claims:
    failed: list[Refused] = []

    def attempt(step: Callable[[], T]) -> T | None:
        try:
            return step()
        except Refused as e:
            failed.append(e)
            return None

    quote = _parse(files, body, checks)
    # A quote with its own PCK chain is judged by itself, however its collateral may look.
    own = quote.certification_type == abi.PCK_CHAIN
    parts = attempt(lambda: _collateral(files, checks))
    if failed and not own:
        raise failed[0]
    try:
        of = verify.quote(quote, parts, trust.roots, checks)
    except Refused as e:
        if e.code.startswith("evidence.needs-"):
            checks.crypto = "unknown"
        raise
    checks.crypto = "valid"
    malformed = failed.pop() if failed else None
    attempt(lambda: verify.validity(of, now=now, checks=checks))
    attempt(lambda: appraise.debug(quote.body, trust, checks))
    if isinstance(quote.body, TdReport) and isinstance(trust, TdxPolicy):
        attempt(lambda: _event_log(files, quote.body, trust, checks))  # type: ignore[arg-type]
    found = None
    if malformed:
        failed.append(malformed)
    elif parts is not None:
        found = attempt(lambda: _tcb(parts, of, trust, now, checks))
    if found is not None:
        attempt(lambda: appraise.appraise(of, found, trust, checks))
    if failed or found is None:
        failed[0].checks = tuple(checks.done)
        raise failed[0]
    return _claims(of, found)


def _event_log(
    files: Files, body: TdReport, trust: TdxPolicy, checks: Checks
) -> replay.Replayed | None:
    with checks.step("event-log") as step:
        return replay.check(files, body, trust.event_log, step)


def _tcb(
    parts: collateral.Collateral, of: verify.Endorsed, trust: SgxPolicy | TdxPolicy, now: float,
    checks: Checks,
) -> tcb.Tcb:  # fmt: skip
    current = verify.collateral(parts, of, trust, now=now, checks=checks)
    return tcb.evaluate(of, current, checks)


def _fields(files: Files) -> Mapping[str, Json]:
    quote = abi.parse(files[FILE])
    out: dict[str, Json] = {
        "header": _hex(quote.header),
        "report": _hex(quote.body),
        "qe_report": _hex(quote.qe_report),
        "qe_auth_data": quote.qe_auth_data.hex(),
        "attestation_key": quote.attestation_key.hex(),
        "signature": "{:064x}{:064x}".format(*quote.signature),
        "certification_type": quote.certification_type,
        "padding": len(quote.padding),
    }
    if quote.certification_type == abi.PCK_CHAIN:
        chain = pck.chain(quote.certification_data, "the quote's PCK chain")
        out["pck"] = _platform(pck.platform(chain[0], "PCK chain[0]"))
        out["pck_chain"] = [certificate.name() for certificate in chain]
    out["collateral"] = _documents(collateral.parse(files))
    log = replay.read(files) if isinstance(quote.body, TdReport) else None
    if log is not None:
        out["event_log"] = {f"rtmr{n}": value.hex() for n, value in sorted(log.rtmrs.items())}
    return out


def _documents(parts: collateral.Collateral) -> dict[str, Json]:
    """What collateral says, not verified."""
    out: dict[str, Json] = {"missing": list(parts.missing)}
    if parts.tcb_info:
        info = documents.tcb_info(parts.tcb_info.text)
        out["tcb_info"] = {
            "id": info.id,
            "fmspc": info.fmspc.hex(),
            "evaluation": info.evaluation,
            "issue_date": info.issue_date,
            "next_update": info.next_update,
        }
    if parts.qe_identity:
        identity = documents.identity(parts.qe_identity.text)
        out["qe_identity"] = {
            "id": identity.id,
            "mrsigner": identity.mrsigner.hex(),
            "evaluation": identity.evaluation,
            "issue_date": identity.issue_date,
            "next_update": identity.next_update,
        }
    for name, found in (("pck_crl", parts.pck_crl), ("root_ca_crl", parts.root_ca_crl)):
        if found:
            out[name] = {
                "revoked": len(found.revoked),
                "this_update": found.this_update,
                "next_update": found.next_update,
            }
    return out


SGX: Final = Kind(
    tee="sgx",
    recognises=_is_sgx,
    check=lambda files, trust, now, checks: _check(files, trust, now, checks, abi.EnclaveReport),
    policy=SgxPolicy,
    default=lambda: policy.SGX,
    field="REPORTDATA, all 64 bytes",
    of=whole,
    fields=_fields,
    instances=("instances",),
    vendor="Intel",
)
TDX: Final = Kind(
    tee="tdx",
    recognises=_is_tdx,
    check=lambda files, trust, now, checks: _check(files, trust, now, checks, abi.TdReport),
    policy=TdxPolicy,
    default=lambda: policy.TDX,
    field="REPORTDATA, all 64 bytes",
    of=whole,
    fields=_fields,
    instances=("instances",),
    vendor="Intel",
)
