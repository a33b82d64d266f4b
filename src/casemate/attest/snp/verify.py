"""Signatures and endorsements of a SEV-SNP report: is it AMD's word about this chip and TCB?

Procedure (AMD 57230 section 3; 56860 sections 7.3 and 10.2). ``roots`` and ``now`` are passed in.

 1. ``root``: the ARK is the trusted one of the product line: its key's SHA-256 is pinned in
    ``roots``. A root that came beside the evidence is used only if it is that key. With
    ``Unchecked`` roots (simulation asked for by name) the carried one is taken, and the check says
    so. The ARK signs itself.
 2. ``chain``: ARK signs ASK (or ASVK), ASK signs VCEK (or VLEK), each RSASSA-PSS with SHA-384 and
    an RSA-4096 key; issuers' names are their signers' subjects; ARK and ASK may sign certificates;
    the leaf's key is on P-384.
 3. ``validity``: ``now`` lies in the validity of all three.
 4. ``product``: the report's CPUID (versions 3 and up) is of the chain's product line.
 5. ``signing-key``: the report says that it is signed with the kind of key that the leaf holds.
 6. ``chip-id``: CHIP_ID is the VCEK's hwID (a shorter hwID is followed by zeros). A VLEK names no
    chip.
 7. ``tcb``: REPORTED_TCB is, byte for byte, what the leaf's extensions say.
 8. ``signature``: ECDSA P-384 with SHA-384 over bytes 0x000 to 0x29f by the leaf's key.
 9. ``revocation``: no revocation list is part of the evidence yet, and the verdict says so.

Raises :class:`~casemate.attest.verdict.Refused`. The twin (r, n-s) of a signature gets the same
answer, and nothing is keyed on signature bytes.
"""

from __future__ import annotations

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec, utils

from casemate.attest import roots as carried
from casemate.attest import x509
from casemate.attest.roots import Roots
from casemate.attest.snp.abi import Report
from casemate.attest.snp.collateral import PRODUCTS, Chain
from casemate.attest.verdict import Checks, Refused, Unchecked, refusal


def _root(chain: Chain, roots: Roots | Unchecked, checks: Checks) -> x509.Certificate:
    ark = chain.ark
    if isinstance(roots, Unchecked):
        if ark is None:
            raise checks.stop(
                "root", refusal("collateral-missing", "The evidence carries no ark.pem.", "ark.pem")
            )
        checks.unchecked("root", roots.reason)
        return ark
    pins = roots.get(chain.product, ())
    if ark is None:
        ark = carried.amd(chain.product)
    if ark.fingerprint not in pins:
        raise checks.stop(
            "root",
            refusal(
                "root-unknown",
                f"The {chain.product} chain ends in root key {ark.fingerprint[:16]}..., which is"
                " not trusted.",
                "ark.pem",
                mend="Trust it only if its fingerprint reached you from the vendor; a simulated"
                " TEE's root is trusted by asking for simulation by name.",
            ),
        )
    checks.passed("root", f"{chain.product} root key {ark.fingerprint}")
    return ark


def _signed(
    certificate: x509.Certificate, file: str, issuer: x509.Certificate, checks: Checks
) -> None:
    if certificate.issuer != issuer.subject:
        raise checks.stop(
            "chain",
            refusal("chain-issuer", f"{file} was issued by another than the next in chain.", file),
        )
    try:
        x509.check_authority(issuer, f"the issuer of {file}")
        x509.check_pss_sha384(certificate, issuer, file)
    except Refused as e:
        raise checks.stop("chain", e) from None


def _validity(certificate: x509.Certificate, file: str, now: float, checks: Checks) -> None:
    if now < certificate.not_before:
        error = refusal(
            "chain-not-yet-valid", f"{file} is not valid yet.", file, "Check this machine's clock."
        )
    elif now > certificate.not_after:
        error = refusal(
            "chain-expired", f"{file} has expired.", file, "Ask the operator to renew collateral."
        )
    else:
        return
    raise checks.stop("validity", error)


def _product(report: Report, chain: Chain, checks: Checks) -> None:
    if report.version < 3:
        checks.unchecked("product", f"a version {report.version} report has no CPUID")
        return
    family, model = report.cpuid_fam_id, report.cpuid_mod_id
    if not any(family == f and model in models for f, models in PRODUCTS[chain.product].cpuid):
        raise checks.stop(
            "product",
            refusal(
                "endorsement-product",
                f"CPUID family {family:#x} model {model:#x} is no {chain.product}.",
                "report.bin",
            ),
        )
    checks.passed("product", f"{chain.product}, CPUID family {family:#x} model {model:#x}")


def _endorsed(report: Report, chain: Chain, checks: Checks) -> None:
    if report.signing_key != chain.kind:
        raise checks.stop(
            "signing-key",
            refusal(
                "endorsement-key",
                f"The report is signed with a {report.signing_key}, a {chain.kind} came with it.",
                chain.leaf_file,
            ),
        )
    checks.passed("signing-key", chain.kind)
    if chain.kind == "VLEK":
        checks.unchecked("chip-id", f"a VLEK ({chain.csp_id}) names no chip")
    elif report.chip_id != chain.hwid.ljust(64, b"\0"):
        raise checks.stop(
            "chip-id",
            refusal(
                "endorsement-chip-id",
                "The report's CHIP_ID is not the chip that the VCEK was made for.",
                chain.leaf_file,
            ),
        )
    else:
        checks.passed("chip-id", chain.hwid.hex())
    if report.reported_tcb != chain.tcb:
        raise checks.stop(
            "tcb",
            refusal(
                "endorsement-tcb",
                f"REPORTED_TCB {report.reported_tcb.hex()} is not the certificate's"
                f" {chain.tcb.hex()}.",
                chain.leaf_file,
            ),
        )
    checks.passed("tcb", f"REPORTED_TCB {report.reported_tcb.hex()}")


def verify(
    report: Report, chain: Chain, roots: Roots | Unchecked, *, now: float, checks: Checks
) -> x509.Certificate:
    """Follow the procedure above and return the root that the chain ends in.

    ``roots``: product line to the admitted SHA-256 fingerprints (hex) of its root key. ``now``:
    Unix seconds.
    """
    ark = _root(chain, roots, checks)
    certificates = (
        (ark, "ark.pem", ark),
        (chain.intermediate, chain.intermediate_file, ark),
        (chain.leaf, chain.leaf_file, chain.intermediate),
    )
    for certificate, file, issuer in certificates:
        _signed(certificate, file, issuer, checks)
    try:
        key = x509.p384(chain.leaf, chain.leaf_file)
    except Refused as e:
        raise checks.stop("chain", e) from None
    checks.passed("chain", f"{chain.leaf_file}, {chain.intermediate_file}, ark.pem")
    for certificate, file, _ in certificates:
        _validity(certificate, file, now, checks)
    checks.passed("validity", f"at {now:.0f}")
    _product(report, chain, checks)
    _endorsed(report, chain, checks)
    signature = utils.encode_dss_signature(report.r, report.s)
    try:
        key.verify(signature, report.signed, ec.ECDSA(hashes.SHA384()))
    except InvalidSignature:
        raise checks.stop(
            "signature",
            refusal("signature-report", "The report's signature is not its key's.", "report.bin"),
        ) from None
    checks.passed("signature", "ECDSA P-384 with SHA-384")
    checks.unchecked("revocation", "no revocation list comes with the evidence")
    return ark
