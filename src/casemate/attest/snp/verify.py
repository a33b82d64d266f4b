"""Signatures and endorsements of a SEV-SNP report: is it AMD's word about this chip and TCB?

Procedure (AMD 57230 sections 3 and 4.2; 56860 sections 7.3 and 10.2; RFC 5280 sections 5 and 6).
``roots`` and ``now`` are passed in. :func:`signatures`:

 1. ``chain``: the ARK signs itself and the ASK (or ASVK), the ASK signs the VCEK (or VLEK), each
    with RSASSA-PSS of SHA-384 by an RSA-4096 key; issuers' names are their signers' subjects; ARK
    and ASK may sign certificates; the leaf's key is on P-384. The ARK is the one that was carried,
    or casemate's own where none was.
 2. ``root``: the ARK's key is one whose SHA-256 ``roots`` pins for the product line. Standing
    beside the evidence gives a root nothing. With ``Unchecked`` roots (simulation that was asked
    for by name) any is taken, and the verdict says so.
 3. ``product``: the intermediate is named for the leaf's product line, and the report's CPUID
    (versions 3 and up) is of that line.
 4. ``signing-key``: the report says that it is signed with the kind of key that the leaf holds.
 5. ``chip-id``: CHIP_ID is the VCEK's hwID (a shorter hwID is followed by zeros). A VLEK names no
    chip.
 6. ``tcb``: REPORTED_TCB is, byte for byte, what the leaf's extensions say.
 7. ``signature``: ECDSA P-384 with SHA-384 over bytes 0x000 to 0x29f by the leaf's key.
 8. ``crl``: each revocation list that was carried is signed like a certificate by its issuer.

:func:`standing`:

 9. ``validity``: ``now`` lies in the validity of all three certificates and of each list.
10. ``revocation``: the ARK's list does not name the intermediate; the intermediate's list, where
    there is one, not the leaf. Without the ARK's list it stays unchecked, or is refused where the
    policy demands one.

Without a report, steps 4 to 7 do not apply. Raises :class:`~casemate.attest.verdict.Refused`. The
twin (r, n-s) of a signature gets the same answer, and nothing is keyed on signature bytes.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final, TypeAlias

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec, utils

from casemate.attest import crl, x509
from casemate.attest import roots as carried
from casemate.attest.roots import Roots
from casemate.attest.snp.abi import Report
from casemate.attest.snp.collateral import INTERMEDIATES, LISTS, MISSING_MEND, PRODUCTS, Chain
from casemate.attest.verdict import Checks, Step, Unchecked, moment, refusal

Lists: TypeAlias = Mapping[str, crl.RevocationList]

_NOT_DEMANDED: Final = Unchecked("no revocation list comes with the evidence")
_ROOT_MEND = (
    "Trust a root only if its fingerprint reached you from its vendor; a simulated TEE's root is"
    " trusted by asking for simulation by name."
)
_FOREIGN_MEND = "Ask the operator for the collateral of this very chip and firmware."


def _root(ark: x509.Certificate, product: str, roots: Roots | Unchecked, step: Step) -> None:
    if isinstance(roots, Unchecked):
        step.unchecked(f"{roots.reason} ({ark.fingerprint})")
    elif ark.fingerprint not in roots.get(product, ()):
        raise refusal(
            "root-unknown",
            f"The {product} chain ends in the root key {ark.fingerprint}, which is not trusted.",
            "ark.pem",
            _ROOT_MEND,
        )
    else:
        step.detail = f"{product} root key {ark.fingerprint}"


def _product(report: Report | None, chain: Chain, step: Step) -> None:
    name = INTERMEDIATES[chain.kind].prefix + chain.product
    if chain.intermediate.name() != name:
        raise refusal(
            "endorsement-product",
            f"A {chain.product} {chain.kind} was issued under another name than {name}.",
            chain.intermediate_file,
            _FOREIGN_MEND,
        )
    step.detail = chain.product
    if report is None:
        return
    if report.version < 3:
        step.detail += f" by its certificate; a version {report.version} report has no CPUID"
        return
    family, model = report.cpuid_fam_id, report.cpuid_mod_id
    if not any(family == f and model in models for f, models in PRODUCTS[chain.product].cpuid):
        raise refusal(
            "endorsement-product",
            f"CPUID family {family:#x} model {model:#x} is no {chain.product}.",
            "report.bin",
            _FOREIGN_MEND,
        )
    step.detail += f", CPUID family {family:#x} model {model:#x}"


def _chip(report: Report, chain: Chain, step: Step) -> None:
    if chain.kind == "VLEK":
        step.unchecked(f"a VLEK ({chain.csp_id}) names no chip")
    elif report.chip_id != chain.hwid.ljust(64, b"\0"):
        raise refusal(
            "endorsement-chip-id",
            "The report's CHIP_ID is not the chip that the VCEK was made for.",
            chain.leaf_file,
            _FOREIGN_MEND,
        )
    else:
        step.detail = chain.hwid.hex()


def _report(report: Report, chain: Chain, key: ec.EllipticCurvePublicKey, checks: Checks) -> None:
    """Steps 4 to 7."""
    with checks.step("signing-key") as step:
        if report.signing_key != chain.kind:
            raise refusal(
                "endorsement-key",
                f"The report is signed with a {report.signing_key}, a {chain.kind} came with it.",
                chain.leaf_file,
                _FOREIGN_MEND,
            )
        step.detail = chain.kind
    with checks.step("chip-id") as step:
        _chip(report, chain, step)
    with checks.step("tcb") as step:
        if report.reported_tcb != chain.tcb:
            raise refusal(
                "endorsement-tcb",
                f"REPORTED_TCB {report.reported_tcb.hex()} is not the certificate's"
                f" {chain.tcb.hex()}.",
                chain.leaf_file,
                _FOREIGN_MEND,
            )
        step.detail = f"REPORTED_TCB {report.reported_tcb.hex()}"
    with checks.step("signature") as step:
        signature = utils.encode_dss_signature(report.r, report.s)
        try:
            key.verify(signature, report.signed, ec.ECDSA(hashes.SHA384()))
        except InvalidSignature:
            raise refusal(
                "signature-report", "The report's signature is not its key's.", "report.bin"
            ) from None
        step.detail = "ECDSA P-384 with SHA-384"


def signatures(
    report: Report | None,
    chain: Chain,
    roots: Roots | Unchecked,
    checks: Checks,
    lists: Lists | None = None,
) -> x509.Certificate:
    """Steps 1 to 8; returns the root that the chain ends in.

    ``roots``: product line to the admitted SHA-256 fingerprints (hex) of its root key.
    """
    ark = chain.ark or carried.amd(chain.product)
    with checks.step("chain") as step:
        path = (
            (chain.leaf, chain.leaf_file), (chain.intermediate, chain.intermediate_file),
            (ark, "ark.pem"),
        )  # fmt: skip
        x509.check_chain(path, {x509.PSS_SHA384})
        key = x509.p384(chain.leaf, chain.leaf_file)
        step.detail = ", ".join(file for _, file in path)
    with checks.step("root") as step:
        _root(ark, chain.product, roots, step)
    with checks.step("product") as step:
        _product(report, chain, step)
    if report is not None:
        _report(report, chain, key, checks)
    if lists:
        with checks.step("crl") as step:
            for file, found in lists.items():
                issuer = chain.intermediate if LISTS[file] else ark
                crl.check_issued(found, issuer, file, {x509.PSS_SHA384})
            step.detail = ", ".join(lists)
    return ark


def standing(
    chain: Chain,
    ark: x509.Certificate,
    checks: Checks,
    *,
    now: float,
    lists: Lists | None = None,
    demanded: bool | Unchecked = _NOT_DEMANDED,
) -> None:
    """Steps 9 and 10, at ``now`` (Unix seconds). demanded: whether the ARK's list must be there."""
    lists = lists or {}
    with checks.step("validity") as step:
        x509.check_validity(ark, "ark.pem", now)
        x509.check_validity(chain.intermediate, chain.intermediate_file, now)
        x509.check_validity(chain.leaf, chain.leaf_file, now)
        for file, found in lists.items():
            crl.check_validity(found, file, now)
            checks.issued[file] = found.this_update
        step.detail = f"at {moment(now)}"
    with checks.step("revocation") as step:
        for file, found in lists.items():
            if LISTS[file]:
                crl.check_revoked(found, chain.leaf, chain.leaf_file)
            else:
                crl.check_revoked(found, chain.intermediate, chain.intermediate_file)
        if any(not LISTS[file] for file in lists):
            step.detail = ", ".join(lists)
        elif demanded is True:
            message = "The evidence carries no revocation list of AMD's."
            raise refusal("needs-crl", message, "crl.der", MISSING_MEND)
        else:
            missing = "no revocation list comes with the evidence"
            step.unchecked(missing if demanded is False else demanded.reason)
