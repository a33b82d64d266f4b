"""Azure confidential VMs as a kind of evidence.

Procedure of ``check``:

 1. ``parse``: the paravisor's report (``abi``) and what belongs to the vTPM (``collateral``).
 2. The hardware's report: its signatures (``hardware``).
 3. Claims, attestation key, quote, event log (``verify``). From here on ``crypto`` is valid.
 4. What remains of the hardware (validity, revocation, collateral, TCB, its policy), of the key's
    certificate, and the policies of claims and quote; a quote over an empty nonce is refused. All
    of it is made, then the first failure is raised.

The binding is in the quote's extraData, which the attested guest alone can have quoted; user-data
of the claims is no proof of freshness, since an old quote may stand beside new claims.
"""

from __future__ import annotations

from collections.abc import Mapping

from casemate.attest.azure import abi, appraise, collateral, hardware, verify
from casemate.attest.azure.policy import DEFAULT, AzurePolicy
from casemate.attest.kind import Claims, Files, Kind, hashed
from casemate.attest.snp import abi as snp_abi
from casemate.attest.snp.kind import shown
from casemate.attest.tpm import appraise as tpm_appraise
from casemate.attest.tpm import certificates
from casemate.attest.tpm import verify as tpm_verify
from casemate.attest.tpm.collateral import Parts
from casemate.attest.tpm.kind import hex_banks, quote_fields
from casemate.attest.verdict import Checks, Refused, refusal
from casemate.spec.canonical import Json


def _recognises(files: Files) -> bool:
    return abi.FILE in files or any(d.startswith(abi.SIGNATURE) for d in files.values())


def _report(files: Files) -> abi.HclReport:
    if abi.FILE not in files:
        raise refusal("parse-hcl", "The paravisor's report has another name.", abi.FILE)
    return abi.parse(files[abi.FILE])


def _check(files: Files, policy: AzurePolicy, now: float, checks: Checks) -> Claims:
    with checks.step("parse") as step:
        hcl = _report(files)
        parts = collateral.vtpm(files)
        step.detail = f"report version {hcl.version} of {hcl.hardware}, {len(parts.quotes)} quotes"
    found = hardware.HARDWARE[hcl.hardware](hcl, files, policy, checks)
    unread = {
        *parts.unread,
        *(n for n in files if hardware.is_hardware(n) and n not in found.files),
    }
    verified = verify.verify(hcl, found, parts, policy, checks)
    checks.crypto = "valid"
    failed = found.rest(now)
    if parts.certificate is not None:
        failed += tpm_appraise.attempt(
            lambda: certificates.windows(verified.path, parts, policy.tpm, now, checks, "aik-")
        )
    failed += tpm_appraise.record(appraise.judge(hcl, verified.rooted, policy), checks)
    failed += _quote(parts, verified, policy, checks)
    if unread:
        with checks.step("other-files") as step:
            step.unchecked(f"not read: {', '.join(sorted(unread))}")
    tpm_appraise.settle(failed, checks)
    attest = parts.quotes[0].attest
    return Claims(
        bound=attest.extra_data,
        fresh=(attest.extra_data,),
        product=found.product,
        root=found.root,
        measurement=found.measurement,
        chip_id=found.chip_id,
        tcb=found.tcb,
        other={
            "vm_configuration": hcl.configuration,
            "user_data": hcl.user_data.hex(),
            "ak": verified.ak,
            "pcrs": hex_banks(verified.quoted),
            "reset_count": attest.reset_count,
            "restart_count": attest.restart_count,
            "firmware_version": f"{attest.firmware_version:016x}",
        },
    )


def _quote(
    parts: Parts, verified: verify.Verified, policy: AzurePolicy, checks: Checks
) -> list[Refused]:
    """What the vTPM's quote is refused for."""
    if not parts.quotes:
        return tpm_appraise.attempt(lambda: _quoteless(checks))
    failed = tpm_appraise.attempt(lambda: tpm_verify.same_boot(parts.quotes, checks))
    judged = tpm_appraise.judge(
        parts.quotes[0].attest, verified.ak, verified.quoted, parts.log, verified.logged, policy.tpm
    )
    failed += tpm_appraise.record(judged, checks)
    return failed + tpm_appraise.attempt(lambda: tpm_verify.nonce(parts.quotes, checks))


def _quoteless(checks: Checks) -> None:
    with checks.step("quote"):
        raise refusal(
            "needs-quote",
            "There is no quote of the vTPM, so that nothing tells what was booted.",
            "tpm_quote.msg",
            "Ask the server for a quote of its vTPM over a nonce of yours.",
        )


def _fields(files: Files) -> Mapping[str, Json]:
    hcl, parts = _report(files), collateral.vtpm(files)
    report: dict[str, Json]
    if hcl.hardware == "snp":
        report = shown(snp_abi.parse(hcl.report))
    else:
        report = {name: value.hex() for name, value in abi.td_report(hcl.report).items()}
    out: dict[str, Json] = {
        "header": {"version": hcl.version, "hardware": hcl.hardware, "hash": hcl.hash},
        "report": report,
        "runtime_claims": hcl.values,
        "padding": hcl.padding.rstrip(b"\0").hex(),
        "pcrs": hex_banks(parts.banks),
    }
    out |= {quote.file: quote_fields(quote) for quote in parts.quotes}
    if parts.log is not None:
        out["event_log"] = parts.log.to_json()
    return out


KIND = Kind(
    tee="azure-cvm",
    recognises=_recognises,
    check=_check,
    policy=AzurePolicy,
    default=lambda: DEFAULT,
    field="extraData of the vTPM's quote",
    of=hashed,
    fields=_fields,
    instances=("chip_ids", "instances", "aks", "vm_ids"),
    vendor="Microsoft",
)
