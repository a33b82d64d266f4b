"""Signatures of a Nitro document: is it AWS's word about this enclave?

Procedure (AWS, "Nitro Enclaves Attestation Process", sections 3.2.1 and 3.2.3; RFC 5280 section
6.1; RFC 9052 section 4.4). ``roots`` and ``now`` are passed in.

 1. ``chain``: the first of ``cabundle`` signs itself, each signs the next, the last signs
    ``certificate``; all with ECDSA of P-384 keys and SHA-384. Issuers' names are their signers'
    subjects. All but the last may sign certificates, and no chain is longer than a pathLen admits.
    The last may make signatures, is no authority and has no pathLen.
 2. ``root``: the key of the chain's first is one whose SHA-256 ``roots`` pins. A root that lies
    beside the document is not looked at.
 3. ``signature``: ES384 over the document by the key of ``certificate``.
 4. ``revocation-lists``: each list that came is signed by an authority of the chain that may sign
    lists.
 5. ``tls-certificate``: a TLS certificate that came is bound by what the enclave itself wrote:
    ``user_data`` or ``public_key`` is its SubjectPublicKeyInfo, or a SHA-2 hash of that or of the
    whole certificate. The nonce is the challenger's and binds nothing, and neither does a copy of
    the document within the certificate: anyone can make a certificate that holds it.
 6. ``unused``: other files, which nothing signs, are listed.

:func:`current` follows, once all signatures have held:

 7. ``validity``: ``now`` lies in the validity of every certificate and list.
 8. ``revocation``: no list names a certificate of the chain. Without any it stays unchecked;
    where the policy demands lists, one is needed for each certificate that says where its issuer
    publishes them (``needs-crl``).

Raises :class:`~casemate.attest.verdict.Refused`. The twin (r, n-s) of a signature gets the same
answer, and nothing is keyed on signature bytes.
"""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Iterator
from typing import Final

from casemate.attest import cose, crl, der, x509
from casemate.attest.nitro.abi import Document
from casemate.attest.nitro.collateral import CRL_POINTS, Chain
from casemate.attest.verdict import Checks, Step, Unchecked, moment, refusal

_DIGITAL_SIGNATURE: Final = 0x80
_ADMITTED: Final = (x509.ECDSA_SHA384,)
_ROOT_MEND = "Trust a root only if its fingerprint reached you from its vendor."
_CRL_MEND = "Ask the operator to send the revocation lists that AWS publishes with the evidence."


def _check_leaf(leaf: x509.Certificate, where: str) -> None:
    """Section 3.2.3.2 and 3.2.3.3 on the target certificate."""
    try:
        found = leaf.extensions.get(x509.BASIC_CONSTRAINTS)
        # An empty one: cA is false, pathLen is not there.
        plain = found is None or der.only(found.value, der.SEQUENCE) == b""
    except der.DerError:
        plain = False
    if not plain:
        raise refusal("chain-leaf", f"{where} is an authority's, no enclave's.", where)
    if not x509.key_usage(leaf) & _DIGITAL_SIGNATURE:
        raise refusal("chain-leaf", f"The key of {where} is not for signatures.", where)


def _lists(chain: Chain) -> None:
    authorities = {certificate.subject: certificate for certificate, _ in chain.path[1:]}
    for file, found in chain.lists.items():
        issuer = authorities.get(found.issuer)
        if issuer is None:
            raise refusal(
                "chain-issuer", f"{file} was issued by another authority than the chain's.", file
            )
        crl.check_issued(found, issuer, file, _ADMITTED)


def _forms(tls: x509.Certificate) -> Iterator[tuple[str, bytes]]:
    yield "its SubjectPublicKeyInfo", tls.spki
    for what, data in (("its SubjectPublicKeyInfo", tls.spki), ("the certificate", tls.raw)):
        for name in ("sha256", "sha384", "sha512"):
            yield f"{name} of {what}", hashlib.new(name, data).digest()


def _tls(document: Document, tls: x509.Certificate, file: str, checks: Checks, step: Step) -> None:
    written = {"user_data": document.user_data, "public_key": document.public_key}
    for what, form in _forms(tls):
        for field, value in written.items():
            if value == form:
                step.detail = f"{file}: {field} is {what}; the rest of it is not checked"
                return
    checks.crypto = "invalid"
    raise refusal(
        "binding-tls-certificate",
        f"The document does not bind the key of {file}.",
        file,
        "Ask for evidence over the connection that ends in the enclave.",
    )


def verify(document: Document, chain: Chain, roots: Collection[str], checks: Checks) -> None:
    """Follow steps 1 to 6 of the procedure. ``roots``: admitted SHA-256 fingerprints (hex) of root
    keys."""
    with checks.step("chain") as step:
        x509.check_chain(chain.path, _ADMITTED)
        for certificate, where in chain.path:
            x509.p384(certificate, where)
        _check_leaf(*chain.path[0])
        step.detail = ", ".join(where for _, where in chain.path)
    with checks.step("root") as step:
        if chain.root.fingerprint not in roots:
            raise refusal(
                "root-unknown",
                f"The chain ends in the root key {chain.root.fingerprint}, which is not trusted.",
                chain.path[-1][1],
                _ROOT_MEND,
            )
        step.detail = f"root key {chain.root.fingerprint}"
    with checks.step("signature") as step:
        key = x509.p384(*chain.path[0])
        step.detail = cose.verify(
            document.message, key, "the document", (cose.ES384,), code="signature-document"
        )
    if chain.lists:
        with checks.step("revocation-lists") as step:
            _lists(chain)
            step.detail = ", ".join(chain.lists)
    if chain.tls is not None:
        with checks.step("tls-certificate") as step:
            _tls(document, *chain.tls, checks, step)
    with checks.step("unused") as step:
        step.detail = ", ".join(map(ascii, chain.unused)) or "every file is used"


def _revocation(chain: Chain, demanded: bool | Unchecked, step: Step) -> None:
    covered = []
    for certificate, where in chain.path[:-1]:
        about = [item for item in chain.lists.items() if item[1].issuer == certificate.issuer]
        for file, found in about:
            crl.check_revoked(found, certificate, where)
            covered.append(f"{where} by {file}")
        if demanded is True and not about and CRL_POINTS in certificate.extensions:
            raise refusal(
                "needs-crl", f"No revocation list came about {where}.", where, _CRL_MEND
            )  # fmt: skip
    if covered:
        step.detail = ", ".join(covered)
    else:
        reason = f": {demanded.reason}" if isinstance(demanded, Unchecked) else ""
        step.unchecked(f"no revocation list came with the document{reason}")


def current(chain: Chain, demanded: bool | Unchecked, *, now: float, checks: Checks) -> None:
    """Follow steps 7 and 8 of the procedure. ``now``: Unix seconds; ``demanded``: whether
    revocation lists must have come."""
    with checks.step("validity") as step:
        for certificate, where in chain.path:
            x509.check_validity(certificate, where, now)
        for file, found in chain.lists.items():
            crl.check_validity(found, file, now)
            checks.issued[file] = found.this_update
        step.detail = f"at {moment(now)}"
    with checks.step("revocation") as step:
        _revocation(chain, demanded, step)
