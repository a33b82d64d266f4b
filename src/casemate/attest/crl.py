"""X.509 certificate revocation lists (RFC 5280 section 5), read as strictly as certificates.

Full lists only: an indirect or delta list, and any critical extension of the list or of an entry,
is refused.
"""

from __future__ import annotations

import base64
import binascii
import re
from collections.abc import Collection
from dataclasses import dataclass
from typing import Final

from casemate.attest import der, x509
from casemate.attest.verdict import check_window, refusal

MAX_BYTES: Final = 1 << 20
_CRL_SIGN: Final = 0x02
_PEM: Final = re.compile(
    rb"-----BEGIN X509 CRL-----\r?\n([A-Za-z0-9+/=\r\n]+)-----END X509 CRL-----[\r\n]*"
)


@dataclass(frozen=True)
class RevocationList:
    """``issuer`` is DER; times are Unix seconds. revoked: serial number to time of revocation."""

    raw: bytes
    tbs: bytes
    signature_algorithm: str
    issuer: bytes
    this_update: float
    next_update: float
    revoked: dict[int, float]
    signature: bytes


def _entries(reader: der.Reader) -> dict[int, float]:
    out: dict[int, float] = {}
    while reader:
        entry = reader.enter()
        serial = der.integer(entry.read(der.INTEGER))
        at = der.time(*entry.element()[:2])
        _uncritical(entry)
        if serial in out:
            raise der.DerError("a serial number stands twice")
        out[serial] = at
    return out


def _uncritical(reader: der.Reader) -> None:
    """What may follow: extensions, none of them critical."""
    if reader:
        kinds = x509.extensions(reader.enter())
        reader.end()
        if any(extension.critical for extension in kinds.values()):
            raise der.DerError("a critical extension is unknown")


def _parse(data: bytes) -> RevocationList:
    whole = der.Reader(der.only(data, der.SEQUENCE))
    tbs, outer = whole.raw(der.SEQUENCE), whole.raw(der.SEQUENCE)
    signature = der.bits(whole.read(der.BIT_STRING))
    whole.end()
    reader = der.Reader(der.only(tbs, der.SEQUENCE))
    if der.integer(reader.read(der.INTEGER)) != 1:
        raise der.DerError("a list of another version than 2")
    if reader.raw(der.SEQUENCE) != outer:
        raise der.DerError("two different signature algorithms")
    issuer = reader.raw(der.SEQUENCE)
    x509.names(issuer)
    this_update, next_update = (der.time(*reader.element()[:2]) for _ in range(2))
    revoked = _entries(reader.enter()) if reader.peek() == der.SEQUENCE else {}
    if reader:
        wrapped = reader.enter(der.context(0))
        reader.end()
        _uncritical(wrapped)
    return RevocationList(
        data, tbs, x509.algorithm(outer), issuer, this_update, next_update, revoked, signature
    )


def parse(data: bytes, where: str) -> RevocationList:
    """A list in DER or PEM. Raises ``evidence.parse-crl``; ``where`` names it in errors."""
    try:
        if len(data) > MAX_BYTES:
            raise der.DerError(f"it has {len(data)} bytes")
        if data.startswith(b"-----BEGIN"):
            found = _PEM.fullmatch(data)
            if not found:
                raise der.DerError("PEM of other things than one list")
            data = base64.b64decode(re.sub(rb"[\r\n]", b"", found[1]), validate=True)
        return _parse(data)
    except (der.DerError, binascii.Error) as e:
        raise refusal("parse-crl", f"{where} is no revocation list: {e}.", where) from None


def check_issued(
    found: RevocationList, issuer: x509.Certificate, where: str, admitted: Collection[str]
) -> None:
    """EvidenceError unless ``issuer`` may sign revocation lists and has signed this one."""
    if found.issuer != issuer.subject:
        raise refusal("chain-issuer", f"{where} was issued by another authority.", where)
    if not x509.key_usage(issuer) & _CRL_SIGN:
        raise refusal("chain-authority", f"The issuer of {where} may not sign lists.", where)
    x509.check_signature(
        found.signature_algorithm, issuer, found.signature, found.tbs, where, admitted
    )


def check_validity(found: RevocationList, where: str, now: float) -> None:
    """EvidenceError unless ``now`` (Unix seconds) is from thisUpdate to nextUpdate."""
    check_window(where, found.this_update, found.next_update, now)


def check_revoked(found: RevocationList, certificate: x509.Certificate, where: str) -> None:
    """EvidenceError if the list, of the certificate's own issuer, names ``certificate``."""
    if certificate.issuer != found.issuer:
        raise refusal("revocation-list", f"The list at hand is not about {where}.", where)
    if certificate.serial in found.revoked:
        raise refusal("revocation-revoked", f"{where} has been revoked by its issuer.", where)
