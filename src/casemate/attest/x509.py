"""X.509 certificates (RFC 5280), read strictly and only as far as evidence needs.

Why not ``cryptography.x509``: AMD's VCEK certificates carry serial number 0, which RFC 5280 forbids
and which that parser announces to stop reading. Here the serial is a number and nothing more.
Signatures are checked with ``cryptography``'s keys over the exact bytes that were signed.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import re
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import Final, TypeAlias

from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec, padding, rsa
from cryptography.hazmat.primitives.asymmetric.types import PublicKeyTypes

from casemate.attest import der
from casemate.attest.verdict import check_window, refusal

MAX_BYTES: Final = 16 << 10

COMMON_NAME: Final = "2.5.4.3"
ORGANISATION: Final = "2.5.4.10"
KEY_USAGE: Final = "2.5.29.15"
BASIC_CONSTRAINTS: Final = "2.5.29.19"
_KEY_CERT_SIGN: Final = 0x04
EXTENDED_KEY_USAGE: Final = "2.5.29.37"
ALTERNATIVE_NAME: Final = "2.5.29.17"
# Those that are acted upon here, or that only say more of who the subject is.
_CRITICAL: Final = {KEY_USAGE, BASIC_CONSTRAINTS, EXTENDED_KEY_USAGE, ALTERNATIVE_NAME}

# RSASSA-PSS with SHA-384, MGF1 with SHA-384 and 48 bytes of salt (RFC 4055 section 3.1).
_RSASSA_PSS: Final = "1.2.840.113549.1.1.10"
_MGF1: Final = "1.2.840.113549.1.1.8"
_SHA384: Final = "2.16.840.1.101.3.4.2.2"
PSS_SHA384: Final = "rsassa-pss-sha384"
# RFC 5758 section 3.2, RFC 8017 appendix C.
ECDSA_SHA256: Final = "1.2.840.10045.4.3.2"
ECDSA_SHA384: Final = "1.2.840.10045.4.3.3"
ECDSA_SHA512: Final = "1.2.840.10045.4.3.4"
RSA_SHA256: Final = "1.2.840.113549.1.1.11"
RSA_SHA384: Final = "1.2.840.113549.1.1.12"
RSA_SHA512: Final = "1.2.840.113549.1.1.13"

_CURVES: Final = (ec.SECP256R1, ec.SECP384R1, ec.SECP521R1)
_Verify: TypeAlias = Callable[[PublicKeyTypes, bytes, bytes], None]


@dataclass(frozen=True)
class Extension:
    critical: bool
    value: bytes


@dataclass(frozen=True)
class Certificate:
    """``issuer``, ``subject`` and ``spki`` are DER; times are Unix seconds."""

    raw: bytes
    tbs: bytes
    serial: int
    signature_algorithm: str
    issuer: bytes
    subject: bytes
    not_before: float
    not_after: float
    spki: bytes
    extensions: dict[str, Extension]
    signature: bytes

    @property
    def fingerprint(self) -> str:
        """SHA-256 of the SubjectPublicKeyInfo in hex: it names the key, not this certificate."""
        return hashlib.sha256(self.spki).hexdigest()

    def name(self, attribute: str = COMMON_NAME) -> str:
        """The subject's only attribute of that kind, or ""."""
        found = names(self.subject).get(attribute, [])
        return found[0] if len(found) == 1 else ""


def names(name: bytes) -> dict[str, list[str]]:
    """Attributes of a DER name by OID. DerError for anything else."""
    out: dict[str, list[str]] = {}
    sets = der.Reader(der.only(name, der.SEQUENCE))
    while sets:
        pair = sets.enter(der.SET).enter()  # sets of one, as all vendors write them
        kind = der.oid(pair.read(der.OID))
        tag, content, _ = pair.element()
        pair.end()
        out.setdefault(kind, []).append(der.text(tag, content))
    return out


def _hash(reader: der.Reader) -> str:
    kind = der.oid(reader.read(der.OID))
    if reader and reader.read(der.NULL) != b"":
        raise der.DerError("hash parameters that are not NULL")
    reader.end()
    return kind


def algorithm(raw: bytes) -> str:
    """A known signature algorithm's name, else its OID."""
    reader = der.Reader(der.only(raw, der.SEQUENCE))
    kind = der.oid(reader.read(der.OID))
    if kind != _RSASSA_PSS:
        return kind
    params = reader.enter()
    reader.end()
    digest = _hash(params.enter(der.context(0)).enter())
    mask = params.enter(der.context(1)).enter()
    function = der.oid(mask.read(der.OID))
    mask_digest = _hash(mask.enter())
    mask.end()
    salt = der.integer(params.enter(der.context(2)).read(der.INTEGER))
    trailer = 1
    if params:  # AMD's ARK and ASK spell out the default
        trailer = der.integer(params.enter(der.context(3)).read(der.INTEGER))
    params.end()
    if (digest, function, mask_digest, salt, trailer) == (_SHA384, _MGF1, _SHA384, 48, 1):
        return PSS_SHA384
    return f"{kind} with other parameters"


def extensions(reader: der.Reader) -> dict[str, Extension]:
    """OID to extension. DerError where one stands twice."""
    out: dict[str, Extension] = {}
    while reader:
        entry = reader.enter()
        kind = der.oid(entry.read(der.OID))
        critical = False
        if entry.peek() == der.BOOLEAN:
            critical = der.boolean(entry.read(der.BOOLEAN))
        if kind in out:
            raise der.DerError(f"extension {kind} stands twice")
        out[kind] = Extension(critical, entry.read(der.OCTET_STRING))
        entry.end()
    return out


def _parse(data: bytes) -> Certificate:
    whole = der.Reader(der.only(data, der.SEQUENCE))
    tbs = whole.raw(der.SEQUENCE)
    outer = whole.raw(der.SEQUENCE)
    signature = der.bits(whole.read(der.BIT_STRING))
    whole.end()
    reader = der.Reader(der.only(tbs, der.SEQUENCE))
    version = reader.enter(der.context(0))
    if der.integer(version.read(der.INTEGER)) != 2:
        raise der.DerError("a certificate of another version than 3")
    version.end()
    serial = der.integer(reader.read(der.INTEGER))
    if reader.raw(der.SEQUENCE) != outer:
        raise der.DerError("two different signature algorithms")
    issuer = reader.raw(der.SEQUENCE)
    validity = reader.enter()
    before = der.time(*validity.element()[:2])
    after = der.time(*validity.element()[:2])
    validity.end()
    subject = reader.raw(der.SEQUENCE)
    spki = reader.raw(der.SEQUENCE)
    found: dict[str, Extension] = {}
    if reader:
        wrapped = reader.enter(der.context(3))
        found = extensions(wrapped.enter())
        wrapped.end()
    reader.end()
    names(subject)
    unknown = [k for k, e in found.items() if e.critical and k not in _CRITICAL]
    if unknown:
        raise der.DerError(f"the critical extension {unknown[0]} is unknown")
    return Certificate(
        data, tbs, serial, algorithm(outer), issuer, subject, before, after, spki,
        found, signature,
    )  # fmt: skip


def parse(data: bytes, where: str) -> Certificate:
    """A certificate in DER, or in PEM with nothing around it. ``where`` names it in errors."""
    if len(data) > MAX_BYTES:
        raise refusal("parse-certificate", f"{where} has {len(data)} bytes.", where)
    try:
        if data.startswith(b"-----BEGIN"):
            data = from_pem(data)
        return _parse(data)
    except der.DerError as e:
        raise refusal("parse-certificate", f"{where} is no certificate: {e}.", where) from None


def from_pem(data: bytes) -> bytes:
    """The DER of exactly one certificate in PEM (RFC 7468). DerError for anything else."""
    found = re.fullmatch(
        rb"-----BEGIN CERTIFICATE-----\r?\n([A-Za-z0-9+/=\r\n]+)-----END CERTIFICATE-----[\r\n]*",
        data,
    )
    if not found:
        raise der.DerError("PEM of other things than one certificate")
    text = re.sub(rb"[\r\n]", b"", found[1])
    try:
        raw = base64.b64decode(text, validate=True)
    except binascii.Error:
        raise der.DerError("PEM that is not base64") from None
    if base64.b64encode(raw) != text:
        raise der.DerError("PEM that is not canonical base64")
    return raw


_PEM: Final = re.compile(
    rb"-----BEGIN CERTIFICATE-----\r?\n[A-Za-z0-9+/=\r\n]+-----END CERTIFICATE-----"
)


def bundle(data: bytes, where: str, most: int = 8) -> tuple[Certificate, ...]:
    """The certificates in PEM that ``data`` is, 1 to ``most``, with blank lines between at most."""
    found = _PEM.findall(data)
    if not 1 <= len(found) <= most or _PEM.sub(b"", data).strip():
        raise refusal("parse-certificate", f"{where} is no PEM of 1 to {most} certificates.", where)
    return tuple(parse(one, f"{where}[{n}]") for n, one in enumerate(found))


def public_key(certificate: Certificate, where: str) -> PublicKeyTypes:
    """The certificate's key; EvidenceError when it is of no known kind."""
    try:
        return serialization.load_der_public_key(certificate.spki)
    except (ValueError, TypeError, UnsupportedAlgorithm):
        raise refusal("parse-key", f"The public key in {where} cannot be read.", where) from None


def p384(certificate: Certificate, where: str) -> ec.EllipticCurvePublicKey:
    key = public_key(certificate, where)
    if not isinstance(key, ec.EllipticCurvePublicKey) or not isinstance(key.curve, ec.SECP384R1):
        raise refusal("chain-key", f"The key in {where} is not on the curve P-384.", where)
    return key


def _pss(key: PublicKeyTypes, signature: bytes, signed: bytes) -> None:
    if not isinstance(key, rsa.RSAPublicKey) or key.key_size != 4096:
        raise TypeError("RSA of 4096 bits")
    scheme = padding.PSS(padding.MGF1(hashes.SHA384()), 48)
    key.verify(signature, signed, scheme, hashes.SHA384())


def _pkcs1(digest: hashes.HashAlgorithm) -> _Verify:
    def verify(key: PublicKeyTypes, signature: bytes, signed: bytes) -> None:
        if not isinstance(key, rsa.RSAPublicKey) or not 2048 <= key.key_size <= 8192:
            raise TypeError("RSA of 2048 to 8192 bits")
        key.verify(signature, signed, padding.PKCS1v15(), digest)

    return verify


def _ecdsa(digest: hashes.HashAlgorithm) -> _Verify:
    def verify(key: PublicKeyTypes, signature: bytes, signed: bytes) -> None:
        if not isinstance(key, ec.EllipticCurvePublicKey) or not isinstance(key.curve, _CURVES):
            raise TypeError("on P-256, P-384 or P-521")
        key.verify(signature, signed, ec.ECDSA(digest))

    return verify


# Signature algorithms of certificates and revocation lists: name or OID to its check.
ALGORITHMS: Final[dict[str, _Verify]] = {
    PSS_SHA384: _pss,
    ECDSA_SHA256: _ecdsa(hashes.SHA256()),
    ECDSA_SHA384: _ecdsa(hashes.SHA384()),
    ECDSA_SHA512: _ecdsa(hashes.SHA512()),
    RSA_SHA256: _pkcs1(hashes.SHA256()),
    RSA_SHA384: _pkcs1(hashes.SHA384()),
    RSA_SHA512: _pkcs1(hashes.SHA512()),
}


def check_signature(
    algorithm: str, issuer: Certificate, signature: bytes, signed: bytes, where: str,
    admitted: Collection[str],
) -> None:  # fmt: skip
    """EvidenceError unless ``issuer``'s key made ``signature`` over ``signed`` by ``algorithm``,
    one of ``admitted`` (of :data:`ALGORITHMS`). ``where`` names what is signed."""
    if algorithm not in admitted:
        raise refusal(
            "chain-algorithm",
            f"{where} is signed with {algorithm}, not with {' or '.join(sorted(admitted))}.",
            where,
        )
    key = public_key(issuer, f"the issuer of {where}")
    try:
        ALGORITHMS[algorithm](key, signature, signed)
    except TypeError as e:
        raise refusal("chain-key", f"The key that signs {where} is not {e}.", where) from None
    except (InvalidSignature, ValueError):
        raise refusal(
            "chain-signature", f"The signature on {where} is not its issuer's.", where
        ) from None


def check_issued(
    certificate: Certificate, issuer: Certificate, where: str, below: int, admitted: Collection[str]
) -> None:
    """EvidenceError unless ``issuer`` may issue ``certificate`` and has. below: authorities between
    the issued one and the leaf, itself counted where it is one."""
    if certificate.issuer != issuer.subject:
        raise refusal(
            "chain-issuer", f"{where} was issued by another than the next in chain.", where
        )
    check_authority(issuer, f"the issuer of {where}", below)
    check_signature(
        certificate.signature_algorithm, issuer, certificate.signature, certificate.tbs, where,
        admitted,
    )  # fmt: skip


def check_chain(
    path: Sequence[tuple[Certificate, str]], admitted: Collection[str] = ALGORITHMS
) -> None:
    """EvidenceError unless each certificate of ``path`` (leaf first, self-signed root last, each
    with the name it has in errors) is issued by the next (RFC 5280 section 6.1, but for time,
    revocation and the root's being trusted, which are checks of their own)."""
    issuers = [certificate for certificate, _ in path[1:]] + [path[-1][0]]
    for n, ((certificate, where), issuer) in enumerate(zip(path, issuers, strict=True)):
        check_issued(certificate, issuer, where, min(n, len(path) - 2), admitted)


def check_validity(certificate: Certificate, where: str, now: float) -> None:
    """EvidenceError unless ``now`` (Unix seconds) lies in the certificate's validity."""
    check_window(where, certificate.not_before, certificate.not_after, now)


def key_usage(certificate: Certificate) -> int:
    """The first eight bits of keyUsage (RFC 5280 section 4.2.1.3), digitalSignature the highest; 0
    where there are none."""
    try:
        return der.only(certificate.extensions[KEY_USAGE].value, der.BIT_STRING)[1]
    except (KeyError, IndexError, der.DerError):
        return 0


def check_authority(certificate: Certificate, where: str, below: int) -> None:
    """EvidenceError unless the certificate may sign others (RFC 5280 sections 4.2.1.3, 4.2.1.9) and
    admits ``below`` authorities under it."""
    try:
        extension = certificate.extensions[BASIC_CONSTRAINTS]
        basic = der.Reader(der.only(extension.value, der.SEQUENCE))
        authority = der.boolean(basic.read(der.BOOLEAN))
        depth = der.integer(basic.read(der.INTEGER)) if basic else below
        basic.end()
        signs = bool(key_usage(certificate) & _KEY_CERT_SIGN)
    except (KeyError, der.DerError):
        raise refusal("chain-authority", f"{where} is no authority.", where) from None
    if not authority or not signs or depth < below:
        raise refusal("chain-authority", f"{where} may not sign this certificate.", where)
