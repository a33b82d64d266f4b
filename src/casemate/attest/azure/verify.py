"""How the parts of a confidential VM's evidence hang together: the hardware vouches for the runtime
claims, these for the vTPM's attestation key, that key for the quote.

Source: Microsoft, "Confidential VM Guest Attestation Design Detail" (how vTPM evidence is
verified); TPM 2.0 Library as ``tpm.verify`` names it.

Procedure, on a hardware report whose signatures hold (``hardware``):

 1. ``runtime-claims``: the hardware's report data is the hash of the runtime claims, by the
    algorithm that the paravisor's report names, filled with zeros.
 2. ``ak``: every copy of the attestation key beside (``aik_cert.der``, ``ak_public.*``) is the key
    ``HCLAkPub`` of the claims.
 3. ``aik-chain``: a certificate of that key is issued by the next, up to a pinned root, as far as
    authorities are at hand; where they are not, it is told and nothing rests on it.
 4. ``quote-signature``, ``pcr-digest``, ``event-log``: by that key, as ``tpm.verify`` has it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from casemate.attest.azure import abi
from casemate.attest.azure.abi import HclReport
from casemate.attest.azure.hardware import Hardware
from casemate.attest.azure.policy import AzurePolicy
from casemate.attest.tpm import certificates
from casemate.attest.tpm import verify as tpm
from casemate.attest.tpm.collateral import Banks, Parts
from casemate.attest.verdict import Checks, refusal

_MEND: Final = "Ask the operator for evidence of one and the same machine."


@dataclass(frozen=True, kw_only=True)
class Verified:
    """ak: fingerprint of the attestation key. path: of its certificate, () where there is none.
    rooted: whether that ends in a pinned root. quoted, logged: as in ``tpm.verify``."""

    ak: str
    path: certificates.Path
    rooted: bool
    quoted: Banks
    logged: bool


def runtime_claims(hcl: HclReport, hardware: Hardware, checks: Checks) -> None:
    """Step 1."""
    with checks.step("runtime-claims") as step:
        if hardware.report_data != hcl.digest.ljust(64, b"\0"):
            raise refusal(
                "endorsement-runtime-claims",
                "The hardware's report is not about these runtime claims.",
                abi.FILE,
                _MEND,
            )
        step.detail = f"{hcl.hash} {hcl.digest.hex()}"
        if hcl.padding:
            what = "not all zero" if any(hcl.padding) else "zeros"
            step.detail += f"; {len(hcl.padding)} bytes follow that nothing covers: {what}"


def attestation_key(hcl: HclReport, parts: Parts, checks: Checks) -> str:
    """Step 2: the key's fingerprint."""
    with checks.step("ak") as step:
        step.detail = f"{abi.AK} {tpm.fingerprint(hcl.ak)}"
        copies = tpm.copies(parts)
        for key, file in copies:
            if key.public_numbers() != hcl.ak.public_numbers():
                raise refusal(
                    "endorsement-ak", f"{file} holds another key than the runtime claims.", file,
                    _MEND,
                )  # fmt: skip
        if copies:
            step.detail += f", as in {', '.join(file for _, file in copies)}"
        return tpm.fingerprint(hcl.ak)


def aik_chain(parts: Parts, policy: AzurePolicy, checks: Checks) -> tuple[certificates.Path, bool]:
    """Step 3."""
    if parts.certificate is None:
        return (), False
    with checks.step("aik-chain") as step:
        certificates.check_leaf(parts.certificate, parts.certificate_file)
        path, whole = certificates.path(
            parts.certificate, parts.certificate_file, parts.authorities
        )
        root, file = path[-1]
        if not whole:
            step.unchecked(f"the issuer of {file} does not come with the evidence")
        elif root.fingerprint not in policy.tpm.roots:
            raise refusal(
                "root-unknown",
                f"The attestation key's certificate ends in the root key {root.fingerprint}, which"
                " is not trusted.",
                file,
                "Trust a root only if its fingerprint reached you from its vendor.",
            )
        else:
            step.detail = ", ".join(name for _, name in path)
        return path, whole


def verify(
    hcl: HclReport, hardware: Hardware, parts: Parts, policy: AzurePolicy, checks: Checks
) -> Verified:
    """Follow the procedure above; without a quote, steps 1 to 3."""
    runtime_claims(hcl, hardware, checks)
    ak = attestation_key(hcl, parts, checks)
    path, rooted = aik_chain(parts, policy, checks)
    if not parts.quotes:
        return Verified(ak=ak, path=path, rooted=rooted, quoted={}, logged=False)
    quoted = tpm.quotes(parts.quotes, hcl.ak, parts.banks, checks)
    logged = parts.log is not None and tpm.replayed(parts.log, quoted, checks, quoted=True)
    certificates.lists(path, parts, checks)
    return Verified(ak=ak, path=path, rooted=rooted, quoted=quoted, logged=logged)
