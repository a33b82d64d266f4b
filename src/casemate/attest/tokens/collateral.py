"""What vouches for a token's key: the certificates in its header, or a key set beside it.

Files: ``root.pem`` (a root certificate) and ``jwks.json`` (RFC 7517 section 5), both optional and
never trusted for standing there: a key leads to acceptance only if the policy pins it, a chain only
if it ends in a pinned root. Carried is Google's "Confidential Space Root CA", the certificate that
``https://confidentialcomputing.googleapis.com/.well-known/attestation-pki-root`` names; its
SHA-256 is 148b293821bb0c6a317f413c8ba475814091cb22d49b9e3c94198db8e8f86c39.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from functools import cache
from importlib import resources
from typing import Final

from casemate.attest import jws, x509
from casemate.attest.jws import Jwk, Jws, PublicKey
from casemate.attest.kind import Files
from casemate.attest.tokens.abi import GOOGLE, OTHER
from casemate.attest.verdict import refusal

ROOT: Final = "root.pem"
KEYS: Final = "jwks.json"
# SHA-256 of the SubjectPublicKeyInfo of Google's root for tokens of the PKI type.
GOOGLE_ROOTS: Final = ("40b464f4d4ff947572c6b23869a7bccae3f69ba9c81ade6c09d035e4657e40c4",)
# Services whose tokens carry their certificates; elsewhere x5c in a header is not acted upon.
CHAINED: Final = (GOOGLE, OTHER)


@dataclass(frozen=True)
class Collateral:
    root: x509.Certificate | None
    keys: tuple[Jwk, ...] | None


@cache
def google_root() -> x509.Certificate:
    """The carried root certificate."""
    file = "google-confidential-space.pem"
    return x509.parse((resources.files("casemate.attest.roots") / file).read_bytes(), file)


def parse(files: Files) -> Collateral:
    """What stands beside the token, read strictly. ``evidence.parse-*``."""
    return Collateral(
        x509.parse(files[ROOT], ROOT) if ROOT in files else None,
        jws.key_set(files[KEYS], KEYS) if KEYS in files else None,
    )


def chain(
    token: Jws, collateral: Collateral, where: str
) -> tuple[tuple[x509.Certificate, str], ...]:
    """The token's certificates with their names, leaf first. A root that the header leaves out is
    the carried one, or the one beside the token, if the last certificate names it as its issuer.
    ``evidence.parse-certificate``."""
    path = [
        (x509.parse(one, name), name)
        for one, name in ((one, f"x5c[{n}] of {where}") for n, one in enumerate(token.x5c))
    ]
    last = path[-1][0]
    if last.issuer != last.subject:
        roots = [(google_root(), "the carried root")]
        if collateral.root is not None:
            roots.append((collateral.root, ROOT))
        path += [(root, name) for root, name in roots if root.subject == last.issuer][:1]
    return tuple(path)


def _texts(key: Jwk, where: str) -> list[bytes]:
    """The certificates of a key in a key set (RFC 7517 section 4.7) in DER."""
    x5c = key.members.get("x5c", [])
    if not isinstance(x5c, list) or len(x5c) > jws.MAX_X5C:
        raise refusal("parse-jwk", f"x5c of {where} is no list of certificates.", where)
    texts = (jws.text_of(one, f"x5c of {where}", jws.MAX_BYTES) for one in x5c)
    return [jws.b64_decode(text, f"x5c of {where}") for text in texts]


def key_chain(
    token: Jws, collateral: Collateral, roots: Collection[str]
) -> tuple[tuple[x509.Certificate, str], ...]:
    """The certificates of the key that the token's header names, from its own to the first that
    ``roots`` pins; ``root.pem`` comes last where it issued the last. Empty where none is pinned:
    certificates that end nowhere say nothing. ``evidence.parse-*``."""
    key = _named(token, collateral)
    if key is None or not roots or "x5c" not in key.members:
        return ()
    where = f"the key {key.kid[:80]!r} of {KEYS}"
    path = [(x509.parse(one, f"x5c[{n}] of {where}"), f"x5c[{n}] of {where}")
            for n, one in enumerate(_texts(key, where))]  # fmt: skip
    root = collateral.root
    if path and root is not None and root.subject == path[-1][0].issuer:
        path.append((root, ROOT))
    for n, (certificate, _) in enumerate(path):
        if certificate.fingerprint in roots:
            return tuple(path[: n + 1])
    return ()


def _named(token: Jws, collateral: Collateral) -> Jwk | None:
    keys = collateral.keys or ()
    found = [key for key in keys if key.kid == token.kid] if token.kid else list(keys)
    return found[0] if len(found) == 1 else None


def _usable(key: Jwk, token: Jws, where: str) -> None:
    uses = key.members.get("use", "sig"), key.members.get("key_ops", ["verify"])
    if uses[0] != "sig" or not isinstance(uses[1], list) or "verify" not in uses[1]:
        raise refusal("signature-key", f"{where} is not for signatures.", where)
    if key.alg not in ("", token.alg):
        raise refusal("signature-key", f"{where} is for {key.alg[:40]}, not {token.alg}.", where)


def key_of(token: Jws, collateral: Collateral) -> PublicKey | None:
    """The key of the set beside the token that its header names (where it names none, the only
    one); ``None`` where there is none. Raises ``evidence.parse-jwk``, ``signature-key``."""
    key = _named(token, collateral)
    if key is None:
        return None
    where = f"the key {key.kid[:80]!r} of {KEYS}"
    _usable(key, token, where)
    if key.kty == "RSA" and "n" not in key.members and (certificates := _texts(key, where)):
        certificate = x509.parse(certificates[0], f"x5c[0] of {where}")
        return jws.usable(x509.public_key(certificate, where), where)
    return jws.jwk_key(key, where)
