"""Signed JSON in compact form (JWS, RFC 7515), keys (JWK, RFC 7517) and their signatures (RFC 7518,
section 3), read strictly.

What JOSE leaves open is closed here: one spelling of base64url (unpadded, no stray bits), JSON
without duplicate keys, NaN, lone surrogates or deep nesting, no extension that would change what is
signed (``crit``, ``b64``, ``zip``, ``enc``), and no key that the token names itself (``jwk``).
Locations (``jku``, ``x5u``) are reported and never followed. ``none`` and HMAC are no algorithms.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import json
import math
import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any, Final, NoReturn, TypeAlias

from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec, padding, rsa, utils

from casemate.attest.verdict import refusal
from casemate.spec.canonical import Json

MAX_BYTES: Final = 256 << 10
MAX_DEPTH: Final = 24
MAX_INT: Final = 2**53 - 1
MAX_X5C: Final = 8
RSA_BITS: Final = range(2048, 8193)

# Header parameters that would change what is signed, or bring a key of the token's own choice.
_FORBIDDEN: Final = ("crit", "b64", "zip", "enc", "jwk")
_KNOWN: Final = ("alg", "typ", "kid", "x5c")
_TYPES: Final = ("JWT", "EAT+JWT", "APPLICATION/JWT", "APPLICATION/EAT+JWT")
_URL: Final = re.compile(r"[A-Za-z0-9_-]*")
_STRINGS: Final = re.compile(r'"(?:[^"\\]|\\.)*"', re.DOTALL)

PublicKey: TypeAlias = rsa.RSAPublicKey | ec.EllipticCurvePublicKey


@dataclass(frozen=True)
class Jws:
    """A compact JWS. raw: the text; signed: its bytes that the signature covers. x5c: DER. ignored:
    header parameters that are not acted upon."""

    raw: str
    signed: bytes
    alg: str
    typ: str
    kid: str
    x5c: tuple[bytes, ...]
    ignored: tuple[str, ...]
    payload: bytes
    signature: bytes


@dataclass(frozen=True)
class _Scheme:
    """hash; kind: how RSA pads, or the curve of ECDSA."""

    hash: type[hashes.HashAlgorithm]
    kind: str | type[ec.EllipticCurve]


ALGORITHMS: Final[dict[str, _Scheme]] = {
    "RS256": _Scheme(hashes.SHA256, "pkcs1"),
    "RS384": _Scheme(hashes.SHA384, "pkcs1"),
    "RS512": _Scheme(hashes.SHA512, "pkcs1"),
    "PS256": _Scheme(hashes.SHA256, "pss"),
    "PS384": _Scheme(hashes.SHA384, "pss"),
    "PS512": _Scheme(hashes.SHA512, "pss"),
    "ES256": _Scheme(hashes.SHA256, ec.SECP256R1),
    "ES384": _Scheme(hashes.SHA384, ec.SECP384R1),
}
# Curve by its JOSE name: its class, bytes of a coordinate and its order (SEC 2, section 2).
CURVES: Final[dict[str, tuple[type[ec.EllipticCurve], int, int]]] = {
    "P-256": (
        ec.SECP256R1,
        32,
        0xFFFFFFFF00000000FFFFFFFFFFFFFFFFBCE6FAADA7179E84F3B9CAC2FC632551,
    ),
    "P-384": (
        ec.SECP384R1,
        48,
        int(
            "ffffffffffffffffffffffffffffffffffffffffffffffff"
            "c7634d81f4372ddf581a0db248b0a77aecec196accc52973",
            16,
        ),
    ),
}


def _refuse(code: str, message: str, where: str) -> NoReturn:
    raise refusal(code, message, where)


def plain(text: object, most: int = 80) -> str:
    """For people to read: at most ``most`` characters, and none that steers a terminal."""
    return "".join(c if c.isprintable() else " " for c in str(text)[:most])


def url_decode(text: str, where: str) -> bytes:
    """Unpadded base64url in its one form (RFC 7515 section 2). ``evidence.parse-base64``."""
    if not _URL.fullmatch(text) or len(text) % 4 == 1:
        _refuse("parse-base64", f"{where} is not unpadded base64url.", where)
    data = base64.urlsafe_b64decode(text + "=" * (-len(text) % 4))
    if url_encode(data) != text:
        _refuse("parse-base64", f"{where} is not canonical base64url.", where)
    return data


def url_encode(data: bytes) -> str:
    return base64.urlsafe_b64encode(data).rstrip(b"=").decode("ascii")


def b64_decode(text: str, where: str) -> bytes:
    """Padded base64 in its one form (RFC 4648 section 4). ``evidence.parse-base64``."""
    try:
        data = base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError):
        _refuse("parse-base64", f"{where} is not base64.", where)
    if base64.b64encode(data).decode("ascii") != text:
        _refuse("parse-base64", f"{where} is not canonical base64.", where)
    return data


def _pairs(pairs: list[tuple[str, Json]]) -> dict[str, Json]:
    out = dict(pairs)
    if len(out) != len(pairs):
        raise ValueError("the same key stands twice in an object")
    return out


def _constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is no number")


def _integer(text: str) -> int:
    if len(text) > 17 or abs(int(text)) > MAX_INT:
        raise ValueError("an integer is outside ±(2^53 - 1)")
    return int(text)


def _float(text: str) -> float:
    number = float(text)
    if not math.isfinite(number):
        raise ValueError("a number is not finite")
    return number


def _depth(text: str) -> int:
    depth = deepest = 0
    for char in _STRINGS.sub("", text):
        if char in "[{":
            depth += 1
            deepest = max(deepest, depth)
        elif char in "]}":
            depth -= 1
    return deepest


def strict_json(data: bytes, where: str, limit: int = MAX_BYTES) -> Json:
    """The JSON (RFC 8259, as RFC 7493 narrows it) in ``data``: UTF-8, no key twice in an object, no
    NaN, integers within ±(2^53 - 1), no lone surrogate, nested 24 deep at most, nothing after it.
    ``evidence.parse-json``; limit: bytes."""
    if len(data) > limit:
        _refuse("parse-too-large", f"{where} has {len(data)} bytes; {limit} are admitted.", where)
    try:
        text = data.decode("utf-8")
        if text.count("[") + text.count("{") > MAX_DEPTH and _depth(text) > MAX_DEPTH:
            raise ValueError(f"it is nested deeper than {MAX_DEPTH}")
        value: Json = json.loads(
            text, object_pairs_hook=_pairs, parse_constant=_constant, parse_int=_integer,
            parse_float=_float,
        )  # fmt: skip
        if "\\u" in text:  # the only way for a lone surrogate to get in
            json.dumps(value, ensure_ascii=False).encode("utf-8")
    except (ValueError, RecursionError) as e:
        _refuse("parse-json", f"{where} is no strict JSON: {str(e)[:100]}.", where)
    return value


def strict_object(data: bytes, where: str, limit: int = MAX_BYTES) -> dict[str, Json]:
    value = strict_json(data, where, limit)
    if not isinstance(value, dict):
        _refuse("parse-json", f"{where} is no JSON object.", where)
    return value


def text_of(value: Json, where: str, most: int = 1024) -> str:
    """A string of 1 to ``most`` characters."""
    if not isinstance(value, str) or not 1 <= len(value) <= most:
        _refuse("parse-header", f"{where} is no text of 1 to {most} characters.", where)
    return value


def _header(data: bytes, where: str) -> dict[str, Any]:
    header = strict_object(data, where)
    for name in _FORBIDDEN:
        if name in header:
            _refuse("parse-header", f"{where} holds {name}, which is never admitted.", where)
    typ = header.get("typ", "")
    if typ != "" and text_of(typ, f"typ in {where}").upper() not in _TYPES:
        _refuse("parse-header", f"{where} says that this is a {str(typ)[:40]!r}, not a JWT.", where)
    x5c = header.get("x5c", [])
    if not isinstance(x5c, list) or len(x5c) > MAX_X5C or ("x5c" in header and not x5c):
        _refuse("parse-header", f"x5c in {where} is no list of 1 to {MAX_X5C} certificates.", where)
    names = [f"x5c[{n}] in {where}" for n in range(len(x5c))]
    return {
        "alg": text_of(header.get("alg"), f"alg in {where}"),
        "typ": typ,
        "kid": text_of(header["kid"], f"kid in {where}") if "kid" in header else "",
        "x5c": tuple(
            b64_decode(text_of(one, name, MAX_BYTES), name)
            for one, name in zip(x5c, names, strict=True)
        ),
        "ignored": tuple(sorted(set(header) - set(_KNOWN))),
    }


def parse(text: str, where: str) -> Jws:
    """The compact JWS that ``text`` is (RFC 7515 section 7.1). Raises ``evidence.parse-*``."""
    if len(text) > MAX_BYTES:
        _refuse("parse-too-large", f"{where} has {len(text)} characters.", where)
    parts = text.split(".")
    if len(parts) != 3:
        _refuse(
            "parse-token", f"{where} has {len(parts)} parts, not the 3 of a signed token.", where
        )
    header, payload, signature = (
        url_decode(part, f"the {name} of {where}")
        for part, name in zip(parts, ("header", "payload", "signature"), strict=True)
    )
    return Jws(
        raw=text,
        signed=text.rpartition(".")[0].encode("ascii"),
        payload=payload,
        signature=signature,
        **_header(header, f"the header of {where}"),
    )


def check_algorithm(token: Jws, admitted: Collection[str], where: str) -> None:
    """``evidence.signature-algorithm`` unless the header names one of ``admitted``."""
    if token.alg not in admitted:
        raise refusal(
            "signature-algorithm",
            f"{where} says that it is signed with {token.alg[:40]!r}; only"
            f" {', '.join(sorted(admitted))} is admitted from this issuer.",
            where,
        )


def usable(key: object, where: str) -> PublicKey:
    """The key, if it is RSA of 2,048 to 8,192 bits or on P-256 or P-384."""
    if isinstance(key, rsa.RSAPublicKey) and key.key_size in RSA_BITS:
        return key
    if isinstance(key, ec.EllipticCurvePublicKey) and isinstance(
        key.curve, tuple(curve for curve, _, _ in CURVES.values())
    ):
        return key
    raise refusal(
        "signature-key",
        f"The key of {where} is neither RSA of {RSA_BITS[0]} to {RSA_BITS[-1]} bits nor on P-256"
        " or P-384.",
        where,
    )


def _ecdsa(token: Jws, key: PublicKey, scheme: _Scheme) -> None:
    if not isinstance(key, ec.EllipticCurvePublicKey) or not isinstance(scheme.kind, type):
        raise TypeError
    if not isinstance(key.curve, scheme.kind):
        raise TypeError
    size, order = next(row[1:] for row in CURVES.values() if row[0] is scheme.kind)
    r, s = (
        int.from_bytes(half, "big") for half in (token.signature[:size], token.signature[size:])
    )
    if len(token.signature) != 2 * size or not (0 < r < order and 0 < s < order):
        raise InvalidSignature
    key.verify(utils.encode_dss_signature(r, s), token.signed, ec.ECDSA(scheme.hash()))


def _rsa(token: Jws, key: PublicKey, scheme: _Scheme) -> None:
    if not isinstance(key, rsa.RSAPublicKey):
        raise TypeError
    pad: padding.AsymmetricPadding = padding.PKCS1v15()
    if scheme.kind == "pss":
        pad = padding.PSS(padding.MGF1(scheme.hash()), scheme.hash().digest_size)
    key.verify(token.signature, token.signed, pad, scheme.hash())


def check_signature(token: Jws, key: PublicKey, admitted: Collection[str], where: str) -> None:
    """EvidenceError unless ``key`` made the signature by one of ``admitted`` (of
    :data:`ALGORITHMS`): ``signature-algorithm``, ``signature-key``, ``signature-token``. The
    numbers of an ECDSA signature (RFC 7518 section 3.4) are in [1, n); the twin (r, n-s) gets the
    same answer."""
    check_algorithm(token, admitted, where)
    scheme = ALGORITHMS[token.alg]
    try:
        (_rsa if isinstance(scheme.kind, str) else _ecdsa)(token, usable(key, where), scheme)
    except TypeError:
        raise refusal(
            "signature-key", f"The key of {where} is of another kind than {token.alg}.", where
        ) from None
    except (InvalidSignature, ValueError, UnsupportedAlgorithm):
        raise refusal(
            "signature-token", f"The signature on {where} is not its key's.", where
        ) from None


@dataclass(frozen=True)
class Jwk:
    """A member of a key set, its numbers unread until it is chosen. members: as written."""

    kid: str
    kty: str
    alg: str
    members: Mapping[str, Json]


def key_set(data: bytes, where: str, most: int = 64) -> tuple[Jwk, ...]:
    """The keys of a JWK set (RFC 7517 section 5), 1 to ``most``, no key name twice. A set with
    private or symmetric keys is refused: nobody publishes those. ``evidence.parse-jwks``."""
    keys = strict_object(data, where).get("keys")
    if not isinstance(keys, list) or not 1 <= len(keys) <= most:
        _refuse("parse-jwks", f"{where} is no set of 1 to {most} keys.", where)
    out = []
    for member in keys:
        if not isinstance(member, dict):
            _refuse("parse-jwks", f"A key in {where} is no object.", where)
        kty, kid, alg = (member.get(name, "") for name in ("kty", "kid", "alg"))
        if not isinstance(kty, str) or not isinstance(kid, str) or not isinstance(alg, str):
            _refuse("parse-jwks", f"A key in {where} has a kty, kid or alg that is no text.", where)
        if kty == "oct" or "d" in member or "k" in member:
            _refuse("parse-jwks", f"{where} holds a secret key.", where)
        out.append(Jwk(kid, kty, alg, member))
    if len({key.kid for key in out}) != len(out):
        _refuse("parse-jwks", f"Two keys in {where} have the same name.", where)
    return tuple(out)


def _number(key: Jwk, name: str, where: str) -> bytes:
    value = key.members.get(name)
    if not isinstance(value, str):
        _refuse("parse-jwk", f"{where} has no {name}.", where)
    return url_decode(value, f"{name} of {where}")


def jwk_key(key: Jwk, where: str) -> PublicKey:
    """The public key of a JWK of type RSA or EC (RFC 7518 sections 6.2.1, 6.3.1).
    ``evidence.parse-jwk``, ``signature-key``."""
    try:
        if key.kty == "RSA":
            n, e = _number(key, "n", where), _number(key, "e", where)
            exponent = int.from_bytes(e, "big")
            # A large exponent only makes a check slow.
            if n[:1] == b"\0" or e[:1] == b"\0" or not 2 < exponent < 1 << 32:
                _refuse("parse-jwk", f"{where} is no RSA key in the one form.", where)
            if len(n) * 8 > RSA_BITS[-1]:
                _refuse("parse-jwk", f"{where} has {len(n) * 8} bits.", where)
            numbers = rsa.RSAPublicNumbers(exponent, int.from_bytes(n, "big"))
            return usable(numbers.public_key(), where)
        if key.kty == "EC" and key.members.get("crv") in CURVES:
            curve, size, _ = CURVES[str(key.members["crv"])]
            x, y = _number(key, "x", where), _number(key, "y", where)
            if len(x) != size or len(y) != size:
                _refuse(
                    "parse-jwk", f"A coordinate of {where} has another length than {size}.", where
                )
            at = (int.from_bytes(x, "big"), int.from_bytes(y, "big"))
            return usable(ec.EllipticCurvePublicNumbers(*at, curve()).public_key(), where)
    except (ValueError, UnsupportedAlgorithm):
        _refuse("parse-jwk", f"{where} is no public key.", where)
    _refuse("parse-jwk", f"{where} is neither an RSA key nor one on P-256 or P-384.", where)


def _uint(number: int) -> str:
    return url_encode(number.to_bytes((number.bit_length() + 7) // 8, "big"))


def thumbprint(key: PublicKey) -> str:
    """The key's name by RFC 7638 with SHA-256, base64url: 43 characters."""
    if isinstance(key, rsa.RSAPublicKey):
        public = key.public_numbers()
        members = {"e": _uint(public.e), "kty": "RSA", "n": _uint(public.n)}
    else:
        point = key.public_numbers()
        name, size = next(
            (name, size)
            for name, (curve, size, _) in CURVES.items()
            if isinstance(key.curve, curve)
        )
        x, y = (url_encode(n.to_bytes(size, "big")) for n in (point.x, point.y))
        members = {"crv": name, "kty": "EC", "x": x, "y": y}
    text = json.dumps(members, separators=(",", ":"), sort_keys=True)
    return url_encode(hashlib.sha256(text.encode("ascii")).digest())
