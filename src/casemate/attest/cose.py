"""COSE_Sign1: one signature over one payload.

Source: RFC 9052 (sections 2, 3, 3.1, 4.2, 4.4), RFC 9053 (sections 2.1: ECDSA; 2 and table 1),
RFC 8230 (section 2: RSASSA-PSS), RFC 8812 (section 2: RSASSA-PKCS1-v1_5), RFC 9360 (section 2:
x5chain, x5t).

Procedure of :func:`parse` (``evidence.parse-cose``):

 1. The message is one array of four in strict CBOR (:mod:`casemate.attest.cbor`, nothing of
    indefinite length), tagged 18 or not tagged.
 2. The protected header is a byte string that holds a map in strict CBOR, the unprotected one is a
    map. No label stands in both, ``alg`` and ``crit`` stand in the protected one only.
 3. ``crit``, where it is there, is a list of labels, each of which is in the protected header and
    is understood.
 4. Payload and signature are byte strings.

The unprotected header is signed by nobody: ``Sign1.unprotected`` is for callers to refuse or list.

:func:`verify` checks the signature over Sig_structure (section 4.4). ECDSA: the key is on the curve
of the algorithm's size, the signature is r || s in the curve's size, each in [1, n). The twin
(r, n-s) gets the same answer.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Final, TypeAlias

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec, padding, rsa, utils
from cryptography.hazmat.primitives.asymmetric.types import PublicKeyTypes

from casemate.attest import cbor, x509
from casemate.attest.verdict import refusal

MAX_BYTES: Final = 128 << 10
_TAG: Final = 18

# Labels of header parameters (RFC 9052 table 2, RFC 9360 table 1).
ALG: Final = 1
CRIT: Final = 2
CONTENT_TYPE: Final = 3
KID: Final = 4
X5CHAIN: Final = 33
X5T: Final = 34

Header: TypeAlias = Mapping[int | str, cbor.Value]
_Check: TypeAlias = Callable[[PublicKeyTypes, bytes, bytes], None]


@dataclass(frozen=True, kw_only=True)
class Sign1:
    """A message, parsed and not verified. ``protected_raw``: the protected header as it is signed;
    ``algorithm``: its ``alg``."""

    tagged: bool
    protected_raw: bytes
    protected: Header
    unprotected: Header
    algorithm: int
    payload: bytes
    signature: bytes


class _WrongKey(Exception):
    pass


class _WrongForm(Exception):
    pass


def _ecdsa(curve: type[ec.EllipticCurve], order: int, digest: hashes.HashAlgorithm) -> _Check:
    size = (order.bit_length() + 7) // 8

    def check(key: PublicKeyTypes, signature: bytes, signed: bytes) -> None:
        if not isinstance(key, ec.EllipticCurvePublicKey) or not isinstance(key.curve, curve):
            raise _WrongKey(f"on {curve.name}")
        if len(signature) != 2 * size:
            raise _WrongForm(f"has {len(signature)} bytes, not {2 * size}")
        r, s = (int.from_bytes(half, "big") for half in (signature[:size], signature[size:]))
        if not (1 <= r < order and 1 <= s < order):
            raise _WrongForm("has an r or s outside [1, n)")
        key.verify(utils.encode_dss_signature(r, s), signed, ec.ECDSA(digest))

    return check


def _rsa(scheme: padding.AsymmetricPadding, digest: hashes.HashAlgorithm) -> _Check:
    def check(key: PublicKeyTypes, signature: bytes, signed: bytes) -> None:
        if not isinstance(key, rsa.RSAPublicKey) or not 2048 <= key.key_size <= 8192:
            raise _WrongKey("RSA of 2048 to 8192 bits")
        if len(signature) != (key.key_size + 7) // 8:
            raise _WrongForm(f"has {len(signature)} bytes, not {(key.key_size + 7) // 8}")
        key.verify(signature, signed, scheme, digest)

    return check


def _pss(digest: hashes.HashAlgorithm) -> _Check:
    return _rsa(padding.PSS(padding.MGF1(digest), digest.digest_size), digest)


_P256_ORDER: Final = 0xFFFFFFFF00000000FFFFFFFFFFFFFFFFBCE6FAADA7179E84F3B9CAC2FC632551
_P384_ORDER: Final = int(
    "ffffffffffffffffffffffffffffffffffffffffffffffffc7634d81f4372ddf581a0db248b0a77aecec196accc52973",
    16,
)
_P521_ORDER: Final = int(
    "01fffffffffffffffffffffffffffffffffffffffffffffffffffffffffffffffffa"
    "51868783bf2f966b7fcc0148f709a5d03bb5c9b8899c47aebb6fb71e91386409",
    16,
)

# Number of ``alg`` to its name and check.
ALGORITHMS: Final[dict[int, tuple[str, _Check]]] = {
    -7: ("ES256", _ecdsa(ec.SECP256R1, _P256_ORDER, hashes.SHA256())),
    -35: ("ES384", _ecdsa(ec.SECP384R1, _P384_ORDER, hashes.SHA384())),
    -36: ("ES512", _ecdsa(ec.SECP521R1, _P521_ORDER, hashes.SHA512())),
    -37: ("PS256", _pss(hashes.SHA256())),
    -38: ("PS384", _pss(hashes.SHA384())),
    -39: ("PS512", _pss(hashes.SHA512())),
    -257: ("RS256", _rsa(padding.PKCS1v15(), hashes.SHA256())),
    -258: ("RS384", _rsa(padding.PKCS1v15(), hashes.SHA384())),
    -259: ("RS512", _rsa(padding.PKCS1v15(), hashes.SHA512())),
}
ES384: Final = -35

# Labels that may be called critical: each is acted upon here.
_UNDERSTOOD: Final = frozenset({ALG, CRIT, X5CHAIN, X5T})


def _parse(data: bytes, understood: Collection[int | str]) -> Sign1:
    if len(data) > MAX_BYTES:
        raise cbor.CborError(f"it has {len(data)} bytes")
    whole = cbor.decode(data, tags=True)
    tagged = isinstance(whole, cbor.Tag)
    if isinstance(whole, cbor.Tag):
        if whole.number != _TAG:
            raise cbor.CborError(f"it is tagged {whole.number}")
        whole = whole.value
    if not isinstance(whole, tuple) or len(whole) != 4:
        raise cbor.CborError("it is no array of four")
    raw, unprotected, payload, signature = whole
    if not isinstance(raw, bytes) or not isinstance(unprotected, dict):
        raise cbor.CborError("its headers are no byte string and map")
    if not isinstance(payload, bytes) or not isinstance(signature, bytes):
        raise cbor.CborError("its payload and signature are no byte strings")
    protected = cbor.decode(raw, tags=True) if raw else {}
    if not isinstance(protected, dict):
        raise cbor.CborError("its protected header is no map")
    if set(protected) & set(unprotected) or {ALG, CRIT} & set(unprotected):
        raise cbor.CborError("a protected parameter stands in the unprotected header")
    algorithm = protected.get(ALG)
    if not isinstance(algorithm, int) or isinstance(algorithm, bool):
        raise cbor.CborError("it names no algorithm by number")
    if CRIT in protected:
        critical = protected[CRIT]
        if not isinstance(critical, tuple) or not critical:
            raise cbor.CborError("crit is no list")
        for label in critical:
            known = isinstance(label, int | str) and not isinstance(label, bool)
            if not known or label not in protected:
                raise cbor.CborError("crit names a parameter that is not there")
            if label not in {*_UNDERSTOOD, *understood}:
                raise cbor.CborError(f"the critical parameter {str(label)[:40]!r} is unknown")
    return Sign1(
        tagged=tagged, protected_raw=raw, protected=protected, unprotected=unprotected,
        algorithm=algorithm, payload=payload, signature=signature,
    )  # fmt: skip


def parse(data: bytes, where: str, understood: Collection[int | str] = ()) -> Sign1:
    """Follow the procedure above. Raises ``evidence.parse-cose``; ``where`` names the message in
    errors. understood: labels, more than those of this module, that the caller acts upon."""
    try:
        return _parse(data, understood)
    except cbor.CborError as e:
        raise refusal("parse-cose", f"{where} is no COSE_Sign1: {e}.", where) from None


def signed_bytes(message: Sign1, external_aad: bytes = b"") -> bytes:
    """Sig_structure (RFC 9052 section 4.4) in its encoding."""
    return cbor.array(
        cbor.text_string("Signature1"), cbor.byte_string(message.protected_raw),
        cbor.byte_string(external_aad), cbor.byte_string(message.payload),
    )  # fmt: skip


def verify(
    message: Sign1, key: PublicKeyTypes, where: str, admitted: Collection[int],
    *, code: str = "signature-cose", external_aad: bytes = b"",
) -> str:  # fmt: skip
    """The algorithm's name, once ``key`` has made the signature with one of ``admitted`` (of
    :data:`ALGORITHMS`). Raises ``evidence.signature-algorithm``, ``signature-key``,
    ``parse-signature`` (its form) and ``<code>`` (its value)."""
    if message.algorithm not in admitted:
        wanted = " or ".join(ALGORITHMS[number][0] for number in admitted)
        raise refusal(
            "signature-algorithm",
            f"{where} is signed with algorithm {message.algorithm}, not with {wanted}.",
            where,
        )
    name, check = ALGORITHMS[message.algorithm]
    try:
        check(key, message.signature, signed_bytes(message, external_aad))
    except _WrongKey as e:
        raise refusal("signature-key", f"The key that signs {where} is not {e}.", where) from None
    except _WrongForm as e:
        raise refusal("parse-signature", f"The signature of {where} {e}.", where) from None
    except (InvalidSignature, ValueError):
        raise refusal(code, f"The signature of {where} is not its key's.", where) from None
    return name


# Hash algorithms of x5t (RFC 9054 table 1).
_X5T_HASHES: Final = {-16: "sha256", -43: "sha384", -44: "sha512"}


def certificates(message: Sign1, where: str, most: int = 8) -> tuple[x509.Certificate, ...]:
    """The certificates of the protected ``x5chain``, leaf first (RFC 9360 section 2): one byte
    string, or a list of two at least. A protected ``x5t`` is the leaf's hash. Raises
    ``evidence.parse-cose`` and ``parse-certificate``."""
    try:
        found = message.protected.get(X5CHAIN)
        chain = found if isinstance(found, tuple) else (found,)
        if not 1 <= len(chain) <= most or (isinstance(found, tuple) and len(chain) < 2):
            raise cbor.CborError(f"x5chain has {len(chain)} certificates")
        raw = [one for one in chain if isinstance(one, bytes)]
        if len(raw) != len(chain):
            raise cbor.CborError("it has no protected x5chain of byte strings")
        if any(one.startswith(b"-----") for one in raw):
            raise cbor.CborError("x5chain is not in DER")
        out = tuple(x509.parse(one, f"{where} x5chain[{n}]") for n, one in enumerate(raw))
        if X5T in message.protected:
            match message.protected[X5T]:
                case (int(number), bytes(digest)) if number in _X5T_HASHES:
                    if hashlib.new(_X5T_HASHES[number], raw[0]).digest() != digest:
                        raise cbor.CborError("x5t is not the hash of x5chain's first certificate")
                case _:
                    raise cbor.CborError("x5t is no hash that is known here")
    except cbor.CborError as e:
        raise refusal("parse-cose", f"{where} is no COSE_Sign1: {e}.", where) from None
    return out
