"""Evidence of an Azure confidential VM: the paravisor's report, a quote of its vTPM, certificates.

Source: Microsoft, "Confidential VM guest attestation: design and vTPM" (NV index 0x01400001 holds
the HCL report, 0x81000003 the AK) and the instance metadata service (THIM: SEV-SNP certificates;
``/acc/tdquote``: a TDX quote for a TD report).

Procedure:

 1. At the start: the HCL report from NV. It holds the hardware's report of this boot, which binds
    the AK by the hash of its runtime claims. By its type: SEV-SNP: VCEK, ASK and ARK from the
    metadata service, if it answers; TDX: the quote over the TD report, from the same.
 2. For each request: a quote whose extraData follows from ``report_data``.

Files: ``hcl_report.bin``, ``tpm_quote.msg``, ``tpm_quote.tpmt_signature``, ``pcrs.json``,
``aik_cert.der`` where the vTPM holds one; ``vcek.der``, ``ask.pem``, ``ark.pem`` or
``td_quote.bin``.
"""

from __future__ import annotations

import base64
import binascii
import json
from typing import Any, Final

from casemate.attest.azure import abi
from casemate.spec.errors import NetError
from casemate.tee import errors, snp_certificates
from casemate.tee.fetch import Ask, Fetch, Reply, answered
from casemate.tee.hardware import Maker
from casemate.tee.tpm import pcrs_json
from casemate.tee.tpm_device import AK_SOURCES, TCTI, Ak, Quote, Tpm

KIND: Final = "azure-cvm"
HCL_INDEX: Final = 0x01400001
CERTIFICATES: Final = "http://169.254.169.254/metadata/THIM/amd/certification"
TD_QUOTE: Final = "http://169.254.169.254/acc/tdquote"


def _json(reply: Reply) -> dict[str, Any]:
    try:
        found = json.loads(reply.body)
    except ValueError:
        found = None
    if not isinstance(found, dict):
        raise errors.device("azure", "The metadata service's answer is no JSON object.")
    return found


def _certificates(fetch: Fetch) -> dict[str, bytes]:
    """VCEK, ASK and ARK; nothing where the service does not answer: KDS has them too."""
    try:
        found = _json(answered(fetch, Ask(CERTIFICATES, {"Metadata": "true"})))
    except NetError:
        return {}
    leaf, chain = found.get("vcekCert"), found.get("certificateChain")
    if not isinstance(leaf, str) or not isinstance(chain, str):
        raise errors.device("azure", "The metadata service gives no certificates.")
    marker = "-----BEGIN CERTIFICATE-----"
    parts = [marker + part for part in chain.split(marker)[1:]]
    if len(parts) != 2:
        raise errors.device("azure", f"The metadata service gives a chain of {len(parts)}.")
    ask, ark = (part.strip().encode() + b"\n" for part in parts)
    return {"vcek.der": snp_certificates.der(leaf.encode()), "ask.pem": ask, "ark.pem": ark}


def _td_quote(report: bytes, fetch: Fetch) -> dict[str, bytes]:
    body = json.dumps({"report": base64.urlsafe_b64encode(report).decode().rstrip("=")}).encode()
    ask = Ask(TD_QUOTE, {"Metadata": "true", "Content-Type": "application/json"}, body)
    text = _json(answered(fetch, ask)).get("quote")
    try:
        if not isinstance(text, str):
            raise ValueError
        quote = base64.urlsafe_b64decode(text + "=" * (-len(text) % 4))
    except (ValueError, binascii.Error):
        raise errors.device("azure", "The metadata service gives no TDX quote.") from None
    return {"td_quote.bin": quote}


def boot_files(hcl: bytes, fetch: Fetch) -> dict[str, bytes]:
    """Step 1's files. Raises ``evidence.parse-hcl``, ``usage.tee-device``, ``net.collateral``."""
    report = abi.parse(hcl)
    beside = _certificates(fetch) if report.hardware == "snp" else _td_quote(report.report, fetch)
    return {"hcl_report.bin": hcl, **beside}


def _quote_files(quote: Quote, ak: Ak) -> dict[str, bytes]:
    return {
        "tpm_quote.msg": quote.message,
        "tpm_quote.tpmt_signature": quote.signature,
        "pcrs.json": pcrs_json(quote),
        **({"aik_cert.der": ak.certificate} if ak.certificate else {}),
    }


def maker(fetch: Fetch, tcti: str = TCTI) -> Maker:
    """Step 1 now, step 2 at each call. Raises ``usage.tee-absent`` where the TPM is no Azure
    confidential VM's."""
    with Tpm(tcti) as tpm:
        hcl = tpm.nv(HCL_INDEX)
        if hcl is None:
            raise errors.absent(
                "azure",
                f"The TPM has no HCL report (NV index {HCL_INDEX:#x}).",
                "Run in an Azure confidential VM.",
            )
        ak = tpm.ak(AK_SOURCES[:1])
    boot = boot_files(hcl, fetch)

    def make(extra: bytes) -> dict[str, bytes]:
        with Tpm(tcti) as tpm:
            return {**boot, **_quote_files(tpm.quote(ak, extra), ak)}

    return make
