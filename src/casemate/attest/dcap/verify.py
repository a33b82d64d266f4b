"""Signatures on a DCAP quote and on its collateral: is it Intel's word about this platform?

Source: Intel, "SGX ECDSA QuoteLibReference DCAP API" appendix A.4 and "PCS API" version 4 (what
signs what); PCK certificate profile revision 1.5. ``roots`` and ``now`` are passed in.

Procedure of :func:`quote`; all of it is what ``crypto`` speaks of:

 1. ``pck-chain``: the PCK certificate is issued by a PCK CA, that by the Intel SGX Root CA, each
    by its own name, with ECDSA P-256 and SHA-256; the chain is the quote's own, or the one beside
    it, which then must be of the same PCK. ``root``: the root's key is one that ``roots`` pins,
    whatever edition of its certificate was carried.
 2. ``qe-report``: the PCK signed the quoting enclave's report.
 3. ``attestation-key``: that report's data begins with SHA-256 of attestation key and auth data.
 4. ``signature``: the attestation key signed header and body.

Procedure of :func:`collateral`, over the parts that are there; after it none is missing:

 5. ``tcb-info-signature``, ``qe-identity-signature``: by the TCB signing certificate, which the
    same root issued, over the text as it came; then the text is parsed.
 6. ``pck-crl``: signed by the PCK CA of step 1; ``root-crl``: by the root.
 7. ``revocation``: neither the PCK, nor the PCK CA, nor a TCB signer, nor the root is listed, by
    any list that is there: who is revoked stays so.
 8. ``collateral``: nothing is missing (``evidence.needs-*``).
 9. ``collateral-validity``: ``now`` lies in the validity of all certificates, from issueDate or
    thisUpdate to nextUpdate of documents and lists (later by the policy's grace), and nothing is
    older than the policy admits.
10. ``tcb-evaluation``: TCB info and QE identity are of the same evaluation, of at least the
    policy's number: a fresh part does not cover for a stale one.

Raises :class:`~casemate.attest.verdict.Refused`. The twin (r, n-s) of a signature gets the same
answer, and nothing is keyed on signature bytes.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import Final

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec, utils

from casemate.attest import crl, x509
from casemate.attest.dcap import abi, documents, pck
from casemate.attest.dcap.abi import Quote, Signature
from casemate.attest.dcap.collateral import Collateral, Signed
from casemate.attest.dcap.policy import DAY, DcapPolicy
from casemate.attest.verdict import Checks, Step, Unchecked, check_window, moment, refusal

_ROOT_MEND: Final = "Trust a root only if its fingerprint reached you from Intel."
_RENEW: Final = "Ask the operator to renew collateral from Intel's service."
_NAMES: Final = {
    "tcb_info": "TCB info",
    "qe_identity": "QE identity",
    "pck_crl": "the PCK CA's revocation list",
    "pck_crl_issuer_chain": "the issuer chain of that list",
    "root_ca_crl": "the root's revocation list",
}


@dataclass(frozen=True, kw_only=True)
class Endorsed:
    """A quote whose signatures hold. ``chain``: PCK, PCK CA and root."""

    quote: Quote
    chain: tuple[x509.Certificate, ...]
    platform: pck.Platform

    @property
    def root(self) -> x509.Certificate:
        return self.chain[-1]


@dataclass(frozen=True, kw_only=True)
class Current:
    """Intel's documents on the platform. ``windows``: a part's name, and when it was issued and
    has to be renewed, in Unix seconds."""

    tcb_info: documents.TcbInfo
    identity: documents.Identity
    windows: tuple[tuple[str, float, float], ...]


def _root(root: x509.Certificate, roots: tuple[str, ...] | Unchecked, step: Step) -> None:
    if isinstance(roots, Unchecked):
        step.unchecked(f"{roots.reason} ({root.fingerprint})")
    elif root.fingerprint not in roots:
        raise refusal(
            "root-unknown",
            f"The chain ends in the root key {root.fingerprint}, which is not trusted.",
            "PCK chain",
            _ROOT_MEND,
        )
    else:
        step.detail = root.fingerprint


def _key(raw: bytes) -> ec.EllipticCurvePublicKey:
    x, y = int.from_bytes(raw[:32], "big"), int.from_bytes(raw[32:], "big")
    try:
        return ec.EllipticCurvePublicNumbers(x, y, ec.SECP256R1()).public_key()
    except ValueError:
        raise refusal(
            "signature-key", "The attestation key is no point of P-256.", "quote.bin"
        ) from None


def _certified(certificate: x509.Certificate, where: str) -> ec.EllipticCurvePublicKey:
    key = x509.public_key(certificate, where)
    if not isinstance(key, ec.EllipticCurvePublicKey) or not isinstance(key.curve, ec.SECP256R1):
        raise refusal("chain-key", f"The key in {where} is not on the curve P-256.", where)
    return key


def _check(
    key: ec.EllipticCurvePublicKey, signature: Signature, signed: bytes, code: str, where: str
) -> None:
    try:
        key.verify(utils.encode_dss_signature(*signature), signed, ec.ECDSA(hashes.SHA256()))
    except InvalidSignature:
        raise refusal(code, f"The signature on {where} is not its key's.", where) from None


def _pck_chain(quote: Quote, parts: Collateral | None) -> tuple[x509.Certificate, ...]:
    own = None
    if quote.certification_type == abi.PCK_CHAIN:
        own = pck.chain(quote.certification_data, "the quote's PCK chain")
    beside = parts.pck_certificate_chain if parts else None
    if own and beside and own[0].raw != beside[0].raw:
        raise refusal(
            "chain-pck", "The PCK chain beside the quote is of another platform.", "collateral"
        )
    found = beside or own
    if not found:
        raise refusal(
            "needs-pck-chain",
            f"The quote names its PCK only (type {quote.certification_type}), and no chain lies"
            " beside it.",
            "pck_certificate_chain",
            _RENEW,
        )
    names = (pck.PCK, pck.PCK_CA, pck.ROOT)
    if beside and own:
        pck.path(own, names, "the quote's PCK chain")
    return pck.path(found, names, "PCK chain")


def quote(
    found: Quote, parts: Collateral | None, roots: tuple[str, ...] | Unchecked, checks: Checks
) -> Endorsed:
    """Follow steps 1 to 4. ``roots``: admitted SHA-256 (hex) of the root's key."""
    with checks.step("pck-chain") as step:
        chain = _pck_chain(found, parts)
        key = _certified(chain[0], "PCK chain[0]")
        platform = pck.platform(chain[0], "PCK chain[0]")
        step.detail = f"{chain[1].name()}, FMSPC {platform.fmspc.hex()}, PPID {platform.ppid.hex()}"
    with checks.step("root") as step:
        _root(chain[-1], roots, step)
    with checks.step("qe-report") as step:
        signature = found.qe_report_signature
        _check(key, signature, found.qe_report.raw, "signature-qe-report", "the QE's report")
        step.detail = f"MRSIGNER {found.qe_report.mrsigner.hex()}"
    with checks.step("attestation-key") as step:
        digest = hashlib.sha256(found.attestation_key + found.qe_auth_data).digest()
        if found.qe_report.report_data[:32] != digest:
            raise refusal(
                "endorsement-attestation-key",
                "The quoting enclave does not vouch for this attestation key.",
                "quote.bin",
            )
        step.detail = digest.hex()
    with checks.step("signature") as step:
        attestation = _key(found.attestation_key)
        _check(attestation, found.signature, found.signed, "signature-quote", "the quote")
        step.detail = "ECDSA P-256 with SHA-256"
    return Endorsed(quote=found, chain=chain, platform=platform)


def validity(of: Endorsed, *, now: float, checks: Checks) -> None:
    """``now`` (Unix seconds) lies in the validity of the PCK chain."""
    with checks.step("validity") as step:
        for n, certificate in enumerate(of.chain):
            x509.check_validity(certificate, f"PCK chain[{n}]", now)
        step.detail = f"at {moment(now)}"


def _same_root(chain: tuple[x509.Certificate, ...], root: x509.Certificate, where: str) -> None:
    if chain[-1].spki != root.spki:
        raise refusal("root-unknown", f"{where} ends in another root.", where, _ROOT_MEND)


def _text(signed: Signed, name: str, root: x509.Certificate) -> tuple[x509.Certificate, ...]:
    where = f"{name}_issuer_chain"
    chain = pck.path(signed.chain, (pck.SIGNER, pck.ROOT), where)
    _same_root(chain, root, where)
    key = _certified(chain[0], f"{where}[0]")
    _check(key, signed.signature, signed.text, "collateral-signature", name)
    return chain


def _listed(parts: Collateral, of: Endorsed, signers: list[x509.Certificate], step: Step) -> None:
    leaf, authority, root = of.chain
    if parts.pck_crl:
        crl.check_revoked(parts.pck_crl, leaf, "the PCK certificate")
    if parts.root_ca_crl:
        crl.check_revoked(parts.root_ca_crl, authority, "the PCK CA")
        crl.check_revoked(parts.root_ca_crl, root, "the root")
        for signer in signers:
            crl.check_revoked(parts.root_ca_crl, signer, "the TCB signing certificate")
    made = [name for name in ("pck_crl", "root_ca_crl") if getattr(parts, name)]
    if made:
        step.detail = " and ".join(made)
    else:
        step.unchecked("no revocation list came with the evidence")


def _complete(parts: Collateral, texts: dict[str, bytes]) -> Current:
    pck_crl, root_crl = parts.pck_crl, parts.root_ca_crl
    if parts.missing or pck_crl is None or root_crl is None:
        missing = ", ".join(_NAMES[name] for name in parts.missing)
        slug = parts.missing[0].replace("_", "-")
        message = f"Collateral is missing: {missing}."
        raise refusal(f"needs-{slug}", message, parts.missing[0], _RENEW)
    tcb_info = documents.tcb_info(texts["tcb_info"])
    identity = documents.identity(texts["qe_identity"])
    windows = (
        ("tcb_info", tcb_info.issue_date, tcb_info.next_update),
        ("qe_identity", identity.issue_date, identity.next_update),
        ("pck_crl", pck_crl.this_update, pck_crl.next_update),
        ("root_ca_crl", root_crl.this_update, root_crl.next_update),
    )
    return Current(tcb_info=tcb_info, identity=identity, windows=windows)


def _window(name: str, first: float, last: float, policy: DcapPolicy, now: float) -> None:
    where, whose = name, _NAMES[name][0].upper() + _NAMES[name][1:]
    check_window(whose, first, last + policy.collateral_grace * DAY, now, where, _RENEW)
    age = policy.collateral_age
    if not isinstance(age, Unchecked) and now - first > age * DAY:
        raise refusal("collateral-age", f"{whose} is older than {age} days.", where, _RENEW)


def _evaluation(current: Current, policy: DcapPolicy, step: Step) -> None:
    numbers = (current.tcb_info.evaluation, current.identity.evaluation)
    step.detail = f"TCB info {numbers[0]}, QE identity {numbers[1]}"
    if policy.same_evaluation is True and len(set(numbers)) != 1:
        raise refusal(
            "collateral-mixed",
            f"TCB info is of evaluation {numbers[0]}, QE identity of {numbers[1]}.",
            "tcbEvaluationDataNumber",
            _RENEW,
        )
    least = policy.tcb_evaluation
    if isinstance(least, Unchecked):
        step.detail += f"; {least.reason}"
    elif min(numbers) < least:
        raise refusal(
            "collateral-evaluation",
            f"Collateral is of evaluation {min(numbers)}; the policy wants at least {least}.",
            "tcbEvaluationDataNumber",
            _RENEW,
        )


def collateral(
    parts: Collateral, of: Endorsed, policy: DcapPolicy, *, now: float, checks: Checks
) -> Current:
    """Follow steps 5 to 10. ``now``: Unix seconds."""
    signers: list[x509.Certificate] = []
    certificates = list(of.chain)
    texts: dict[str, bytes] = {}
    for name, signed in (("tcb_info", parts.tcb_info), ("qe_identity", parts.qe_identity)):
        with checks.step(f"{name.replace('_', '-')}-signature") as step:
            if signed is None:
                step.unchecked(f"{_NAMES[name]} is missing")
                continue
            chain = _text(signed, name, of.root)
            signers.append(chain[0])
            certificates += chain
            texts[name] = signed.text
            step.detail = chain[0].name()
    with checks.step("pck-crl") as step:
        if parts.pck_crl_issuer_chain:
            where = "pck_crl_issuer_chain"
            chain = pck.path(parts.pck_crl_issuer_chain, (pck.PCK_CA, pck.ROOT), where)
            _same_root(chain, of.root, where)
            certificates += chain
        if parts.pck_crl:
            crl.check_issued(parts.pck_crl, of.chain[1], "pck_crl", {x509.ECDSA_SHA256})
            step.detail = f"{len(parts.pck_crl.revoked)} revoked by {of.chain[1].name()}"
        else:
            step.unchecked("it is missing")
    with checks.step("root-crl") as step:
        if parts.root_ca_crl:
            crl.check_issued(parts.root_ca_crl, of.root, "root_ca_crl", {x509.ECDSA_SHA256})
            step.detail = f"{len(parts.root_ca_crl.revoked)} revoked by {of.root.name()}"
        else:
            step.unchecked("it is missing")
    with checks.step("revocation") as step:
        _listed(parts, of, signers, step)
    with checks.step("collateral") as step:
        current = _complete(parts, texts)
        step.detail = f"not read: {', '.join(parts.unread)}" if parts.unread else "complete"
    with checks.step("collateral-validity") as step:
        for certificate in certificates[len(of.chain) :]:
            x509.check_validity(certificate, certificate.name(), now)
        for name, first, last in current.windows:
            checks.issued[name] = first
            _window(name, first, last, policy, now)
        ages = (f"{_NAMES[name]} {int((now - first) // DAY)}" for name, first, _ in current.windows)
        step.detail = f"age in days: {', '.join(ages)}"
    with checks.step("tcb-evaluation") as step:
        _evaluation(current, policy, step)
    return current
