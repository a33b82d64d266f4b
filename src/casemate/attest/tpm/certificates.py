"""The certificates and revocation lists of an attestation key.

Source: TCG, "EK Credential Profile for TPM Family 2.0" and "TPM 2.0 Keys for Device Identity and
Attestation" (extended key usages); RFC 5280 sections 4.2.1.1, 4.2.1.2, 5 and 6.1.

Procedure:

 1. :func:`check_leaf`: the key's certificate is no authority's, is for signatures (where it says
    what for), and for a TPM's key (extended key usage 2.23.133.8.1 or 2.23.133.8.3, where it names
    any). Google gives both of its vTPM's keys the former: an endorsement key does not sign.
 2. :func:`path`: from it, each is issued by the next, up to a self-signed one. Issuers are found by
    name among what came along and what casemate carries; one that is at hand and has not issued it,
    or only under another name, is refused; one that is not at hand leaves the path open.
 3. :func:`lists`: each revocation list is signed by the authority of the path that it is of.
 4. :func:`windows`: certificates and lists are valid at ``now``; no list names a certificate.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final, TypeAlias

from casemate.attest import crl, der, x509
from casemate.attest.tpm import collateral
from casemate.attest.tpm.collateral import Parts
from casemate.attest.tpm.policy import TpmPolicy
from casemate.attest.verdict import Checks, Refused, moment, refusal

Path: TypeAlias = tuple[tuple[x509.Certificate, str], ...]

_MAX_PATH: Final = 5
_SUBJECT_KEY, _AUTHORITY_KEY = "2.5.29.14", "2.5.29.35"
_SIGNS: Final = 0x80  # digitalSignature
_USAGES: Final = ("2.23.133.8.1", "2.23.133.8.3")


def check_leaf(certificate: x509.Certificate, where: str) -> None:
    """``evidence.chain-usage`` unless it may be an attestation key's certificate."""
    usages: list[str] = []
    try:
        basic = certificate.extensions.get(x509.BASIC_CONSTRAINTS)
        reader = der.Reader(der.only(basic.value, der.SEQUENCE) if basic else b"")
        authority = reader.peek() == der.BOOLEAN and der.boolean(reader.read(der.BOOLEAN))
        extended = certificate.extensions.get(x509.EXTENDED_KEY_USAGE)
        reader = der.Reader(der.only(extended.value, der.SEQUENCE) if extended else b"")
        while reader:
            usages.append(der.oid(reader.read(der.OID)))
    except der.DerError as e:
        raise refusal("parse-certificate", f"{where} is malformed: {e}.", where) from None
    if authority:
        raise refusal("chain-usage", f"{where} is an authority's certificate.", where)
    if x509.KEY_USAGE in certificate.extensions and not x509.key_usage(certificate) & _SIGNS:
        raise refusal("chain-usage", f"{where} is for a key that signs nothing.", where)
    if extended and not set(usages) & set(_USAGES):
        raise refusal("chain-usage", f"{where} is not for a TPM's key.", where)


def _identifier(certificate: x509.Certificate, oid: str) -> bytes:
    """The key identifier in an authority's (RFC 5280 section 4.2.1.1) or a subject's (4.2.1.2)
    extension; b"" where there is none."""
    try:
        value = certificate.extensions[oid].value
        if oid == _SUBJECT_KEY:
            return der.only(value, der.OCTET_STRING)
        return der.Reader(der.only(value, der.SEQUENCE)).read(der.context(0, constructed=False))
    except (KeyError, der.DerError):
        return b""


def _misnamed(last: x509.Certificate, name: str, known: Sequence[tuple[x509.Certificate, str]]
              ) -> None:  # fmt: skip
    """Refuses a certificate whose issuer is at hand by its key, but under another name."""
    wanted = _identifier(last, _AUTHORITY_KEY)
    if wanted and any(_identifier(one, _SUBJECT_KEY) == wanted for one, _ in known):
        raise refusal("chain-issuer", f"{name} names another issuer than that of its key.", name)


def path(leaf: x509.Certificate, file: str, others: Path) -> tuple[Path, bool]:
    """The chain from ``leaf``, and whether it ends in a self-signed certificate; where it does not,
    the issuer of its last is not at hand. Raises ``evidence.chain-*`` where one is at hand, by name
    or by key identifier, and has not issued it."""
    known = [*collateral.carried(), *others]
    out = [(leaf, file)]
    while len(out) < _MAX_PATH:
        last, name = out[-1]
        if last.issuer == last.subject and len(out) > 1:
            x509.check_issued(last, last, name, len(out) - 2, x509.ALGORITHMS)
            return tuple(out), True
        failed: Refused | None = None
        for issuer in known:
            if issuer[0].subject != last.issuer:
                continue
            try:
                x509.check_issued(last, issuer[0], name, len(out) - 1, x509.ALGORITHMS)
            except Refused as e:
                failed = failed or e
                continue
            out.append(issuer)
            break
        else:
            if failed is not None:
                raise failed
            _misnamed(last, name, known)
            return tuple(out), False
    raise refusal("chain-length", "The chain of certificates is too long.", file)


def _issuers(path: Path) -> list[tuple[x509.Certificate, str, x509.Certificate]]:
    return [(cert, file, path[n + 1][0]) for n, (cert, file) in enumerate(path[:-1])]


def of_key(parts: Parts) -> tuple[Path, bool]:
    """Steps 1 and 2 for the key's certificate; ((), False) where it has none."""
    if parts.certificate is None:
        return (), False
    check_leaf(parts.certificate, parts.certificate_file)
    return path(parts.certificate, parts.certificate_file, parts.authorities)


def lists(path: Path, parts: Parts, checks: Checks) -> None:
    """Step 3."""
    if not parts.lists:
        return
    with checks.step("revocation-signature") as step:
        known = [cert for cert, _ in path]
        for found, file in parts.lists:
            issuer = next((c for c in known if c.subject == found.issuer), None)
            if issuer is None:
                raise refusal("chain-issuer", f"{file} is of none of the authorities.", file)
            crl.check_issued(found, issuer, file, x509.ALGORITHMS)
        step.detail = ", ".join(file for _, file in parts.lists)


def windows(
    path: Path, parts: Parts, policy: TpmPolicy, now: float, checks: Checks, prefix: str = ""
) -> None:
    """Step 4. prefix: of the checks' names."""
    with checks.step(f"{prefix}validity") as step:
        if not path:
            step.unchecked("there are no certificates")
        else:
            for certificate, file in path:
                x509.check_validity(certificate, file, now)
            for found, file in parts.lists:
                crl.check_validity(found, file, now)
                checks.issued[file] = found.this_update
            step.detail = f"at {moment(now)}"
    with checks.step(f"{prefix}revocation") as step:
        by_issuer = {found.issuer: found for found, _ in parts.lists}
        missing = []
        for certificate, file, issuer in _issuers(path):
            revoked = by_issuer.get(issuer.subject)
            if revoked is None:
                missing.append(file)
            else:
                crl.check_revoked(revoked, certificate, file)
        if missing and policy.revocation is True:
            raise refusal(
                "needs-crl", f"No revocation list about {missing[0]} comes along.", missing[0]
            )
        if missing or not path:
            step.unchecked(
                f"no revocation list about {', '.join(missing) or 'the key'} comes along"
            )
        else:
            step.detail = ", ".join(file for _, file in parts.lists)
