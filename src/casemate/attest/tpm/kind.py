"""TPM 2.0 quotes as a kind of evidence.

Procedure of ``check``:

 1. ``parse``: quotes, signatures, PCR values, event log, certificates (``abi``, ``eventlog``,
    ``collateral``).
 2. Without a quote nothing is signed: an event log is replayed to the PCR values that come with it,
    and the quote is asked for (``needs-quote``).
 3. ``verify``: all signatures and bindings. From here on ``crypto`` is valid.
 4. Validity and revocation, ``same-boot``, the policy (``appraise``), and a nonce that is not empty
    (``freshness-empty``): all of it is made, then the first failure is raised, what is wrong before
    what is missing.
"""

from __future__ import annotations

from collections.abc import Mapping

from casemate.attest.kind import Claims, Files, Kind, hashed
from casemate.attest.tpm import abi, appraise, certificates, collateral, verify
from casemate.attest.tpm.policy import DEFAULT, PRODUCTS, TpmPolicy
from casemate.attest.verdict import Checks, refusal
from casemate.spec.canonical import Json

_LOG_HEAD = b"Spec ID Event"
_LOG_HEAD_AT = 32


def _is_log(file: str, data: bytes) -> bool:
    return file == collateral.LOG and data.startswith(_LOG_HEAD, _LOG_HEAD_AT)


def _recognises(files: Files) -> bool:
    if any(collateral.is_quote(name, data) for name, data in files.items()):
        return True
    logs = {name for name, data in files.items() if _is_log(name, data)}
    return bool(logs) and all(n in logs or collateral.is_pcrs(n) for n in files)


def _log_alone(parts: collateral.Parts, checks: Checks) -> None:
    if parts.log is not None and parts.banks:
        verify.replayed(parts.log, parts.banks, checks, quoted=False)
    checks.crypto = "not-applicable"
    with checks.step("quote"):
        raise refusal(
            "needs-quote",
            "There is no quote, so that nothing vouches for the event log and the PCR values.",
            "quote.msg",
            "Ask the server for a TPM quote over a nonce of yours.",
        )


def _check(files: Files, policy: TpmPolicy, now: float, checks: Checks) -> Claims:
    with checks.step("parse") as step:
        parts = collateral.parse(files)
        step.detail = f"{len(parts.quotes)} quotes"
        if parts.unread:
            step.detail += f"; not read: {', '.join(parts.unread)}"
    if not parts.quotes:
        _log_alone(parts, checks)
    verified = verify.verify(parts, policy, checks)
    attest = parts.quotes[0].attest
    failed = appraise.attempt(
        lambda: certificates.windows(verified.path, parts, policy, now, checks)
    )
    failed += appraise.attempt(lambda: verify.same_boot(parts.quotes, checks))
    judged = appraise.judge(
        attest, verified.ak, verified.quoted, parts.log, verified.logged, policy
    )
    failed += appraise.record(judged, checks)
    failed += appraise.attempt(lambda: verify.nonce(parts.quotes, checks))
    appraise.settle(failed, checks)
    other: dict[str, Json] = {
        "pcrs": hex_banks(verified.quoted),
        "reset_count": attest.reset_count,
        "restart_count": attest.restart_count,
        "firmware_version": f"{attest.firmware_version:016x}",
    }
    if parts.certificate is not None:
        other["instance"] = collateral.instance(parts.certificate, parts.certificate_file)
    return Claims(
        bound=attest.extra_data,
        fresh=(attest.extra_data,),
        product=PRODUCTS.get(verified.root, "TPM 2.0"),
        root=verified.root,
        measurement="",
        chip_id=verified.ak,
        tcb={},
        other=other,
    )


def hex_banks(banks: collateral.Banks) -> dict[str, Json]:
    return {
        bank: {str(n): value.hex() for n, value in sorted(values.items())}
        for bank, values in banks.items()
    }


def quote_fields(quote: collateral.Quote) -> dict[str, Json]:
    """A quote field by field."""
    attest, signature = quote.attest, quote.signature
    out: dict[str, Json] = {
        "qualifiedSigner": attest.qualified_signer.hex(),
        "extraData": attest.extra_data.hex(),
        "clockInfo": {
            "clock": str(attest.clock),
            "resetCount": attest.reset_count,
            "restartCount": attest.restart_count,
            "safe": attest.safe,
        },
        "firmwareVersion": f"{attest.firmware_version:016x}",
        "pcrSelect": [{"hash": one.hash, "pcrs": list(one.pcrs)} for one in attest.pcr_select],
        "pcrDigest": attest.pcr_digest.hex(),
    }
    if isinstance(signature, abi.Signature):
        value = signature.sig.hex() or f"{signature.r:x} {signature.s:x}"
        out["signature"] = {"scheme": signature.scheme, "hash": signature.hash, "value": value}
    else:
        out["signature"] = None if signature is None else signature.hex()
    return out


def _fields(files: Files) -> Mapping[str, Json]:
    parts = collateral.parse(files)
    out: dict[str, Json] = {quote.file: quote_fields(quote) for quote in parts.quotes}
    out["pcrs"] = hex_banks(parts.banks)
    if parts.public is not None:
        out["ak_public"] = {
            "name": parts.public.name.hex(),
            "objectAttributes": f"{parts.public.attributes:08x}",
            "key": verify.fingerprint(parts.public.key),
        }
    if parts.certificate is not None:
        out["instance"] = collateral.instance(parts.certificate, parts.certificate_file)
    if parts.log is not None:
        out["event_log"] = parts.log.to_json()
    return out


KIND = Kind(
    tee="tpm",
    recognises=_recognises,
    check=_check,
    policy=TpmPolicy,
    default=lambda: DEFAULT,
    field="extraData of the quote",
    of=hashed,
    fields=_fields,
    instances=("aks",),
    vendor="TPM",
)
