"""Signatures and times of a service's tokens: is it the service's word, and still good?

Procedure (RFC 7515 section 5.2, RFC 7519 section 7.2, RFC 9711 section 5). Roots and ``now`` are
passed in.

 1. ``algorithm``: the header of each token names an algorithm that its service uses (a fixed list;
    ``none`` and HMAC are on none).
 2. ``submods``: each device's token has the SHA-256 that the overall token states for it, and no
    device is there that it does not name. (NVIDIA hashes the whole token, signature included.)
 3. ``chain``, ``root``: where the header carries certificates and the service uses them: each is
    issued by the next (RFC 5280 section 6.1), the leaf is no authority and may sign, the last is a
    root whose key ``roots`` pins. Else ``key``: the key of ``jwks.json`` that the header names, RSA
    of 2,048 bits or more or on P-256 or P-384. Without it there is no answer: ``crypto`` is
    unknown, and the evidence is refused (``collateral-keys``). Where that key has certificates of
    its own (RFC 7517 section 4.7) and ``roots`` pins one of them, they are checked up to that one.
    ``jku``, ``x5u`` and keys in the header are never followed.
 4. ``signature``: of each token, by that key.
 5. ``validity``: ``now`` lies in the validity of the certificates, and of each token from ``nbf``
    and ``iat`` to ``exp``. The second ``exp`` itself is still admitted, as a certificate's
    notAfter is (RFC 7519 section 4.1.4 admits some leeway).
 6. ``revocation``: no revocation list comes with tokens, and the verdict says so.

Raises :class:`~casemate.attest.verdict.Refused`. Nothing is keyed on signature bytes; only a
device's token cannot have its signature replaced by its twin, since the overall token has its hash.
"""

from __future__ import annotations

import hashlib
from collections.abc import Collection
from dataclasses import dataclass
from itertools import pairwise
from typing import Final, TypeAlias

from cryptography.hazmat.primitives import serialization

from casemate.attest import der, jws, x509
from casemate.attest.jws import PublicKey
from casemate.attest.tokens import collateral as collaterals
from casemate.attest.tokens.abi import GOOGLE, ITA, MAA, NRAS, OTHER, Token, Tokens
from casemate.attest.tokens.collateral import CHAINED, Collateral
from casemate.attest.verdict import Checks, check_window, moment, refusal
from casemate.attest.x509 import Certificate

# Google: "Attestation token validation endpoint fields" (RS256 alone). Microsoft: "Azure
# Attestation EAT profile". Intel: "Attestation tokens and claims". NVIDIA: JWKS of its service.
ALGORITHMS: Final[dict[str, frozenset[str]]] = {
    GOOGLE: frozenset({"RS256"}),
    MAA: frozenset({"RS256"}),
    ITA: frozenset({"PS384", "RS256"}),
    NRAS: frozenset({"ES384"}),
    OTHER: frozenset(jws.ALGORITHMS),
}
_DIGITAL_SIGNATURE: Final = 0x80
_KEYS_MEND: Final = (
    "Put the issuer's key set beside the token as jwks.json, fetched from the issuer over a"
    " connection that you trust, and pin its key in the trust policy."
)
_ROOT_MEND: Final = "Trust a root only if its fingerprint reached you from its vendor."


_Path: TypeAlias = tuple[tuple[Certificate, str], ...]


@dataclass(frozen=True)
class Signer:
    """Who signed. root: SHA-256 (hex) of the SubjectPublicKeyInfo that the trust ends in: the
    root's, or the key's own where it came in a key set. thumbprints: RFC 7638 names of keys of a
    key set (empty for a token's own certificates), vouched: those of them whose certificates end
    in a pinned root."""

    root: str
    thumbprints: tuple[str, ...] = ()
    vouched: tuple[str, ...] = ()


def _submods(tokens: Tokens) -> str:
    stated = getattr(tokens.overall.claims, "submods", {})
    for name, token in tokens.devices.items():
        if name not in stated:
            raise refusal("endorsement-submods", f"The overall token names no {name}.", token.where)
        digest = hashlib.sha256(token.jws.raw.encode("ascii")).hexdigest()
        if digest != stated[name]:
            raise refusal(
                "endorsement-submods",
                f"The overall token states another digest of the token of {name}.",
                token.where,
            )
    return ", ".join(tokens.devices) or "no tokens of devices"


def _leaf(certificate: x509.Certificate, where: str) -> None:
    usage = x509.key_usage(certificate)
    basic = certificate.extensions.get(x509.BASIC_CONSTRAINTS)
    try:
        authority = basic is not None and bool(der.only(basic.value, der.SEQUENCE)[:1])
    except der.DerError:
        authority = True
    if authority or (x509.KEY_USAGE in certificate.extensions and not usage & _DIGITAL_SIGNATURE):
        raise refusal("chain-leaf", f"{where} is not a certificate to sign tokens with.", where)


def _chain(
    tokens: Tokens, collateral: Collateral, roots: Collection[str], checks: Checks
) -> tuple[_Path, PublicKey, Signer]:
    where = tokens.overall.where
    with checks.step("chain") as step:
        path = collaterals.chain(tokens.overall.jws, collateral, where)
        if len(path) < 2:
            raise refusal("chain-length", f"{where} carries no chain of certificates.", where)
        x509.check_chain(path)
        _leaf(*path[0])
        key = jws.usable(x509.public_key(*path[0]), path[0][1])
        step.detail = ", ".join(jws.plain(c.name()) or "?" for c, _ in path)
    with checks.step("root") as step:
        root = path[-1][0].fingerprint
        if root not in roots:
            raise refusal(
                "root-unknown",
                f"The chain ends in the root key {root}, which is not trusted.",
                path[-1][1],
                _ROOT_MEND,
            )
        step.detail = f"root key {root}"
        if collateral.root is not None:
            same = "is that root" if collateral.root.fingerprint == root else "is another"
            step.detail += f"; root.pem came with the token, {same}, and is not what is trusted"
    return path, key, Signer(root)


def _vouched(path: _Path, key: PublicKey) -> None:
    """EvidenceError unless the certificates lead from ``key`` to the last, which is pinned."""
    for n, ((certificate, where), (issuer, _)) in enumerate(pairwise(path)):
        x509.check_issued(certificate, issuer, where, n, x509.ALGORITHMS)
    if len(path) > 1:
        _leaf(*path[0])
    own = jws.usable(x509.public_key(*path[0]), path[0][1])
    if jws.thumbprint(own) != jws.thumbprint(key):
        raise refusal("chain-key", f"{path[0][1]} is of another key.", path[0][1])


def _keys(
    tokens: Tokens, collateral: Collateral, roots: Collection[str], checks: Checks
) -> tuple[_Path, tuple[PublicKey, ...], Signer]:
    with checks.step("key") as step:
        found: list[PublicKey] = []
        path: dict[str, Certificate] = {}
        vouched: dict[str, str] = {}
        for token in tokens.all:
            key = collaterals.key_of(token.jws, collateral)
            if key is None:
                checks.crypto = "unknown"
                said = f" ({token.jws.kid[:80]!r})" if token.jws.kid else ""
                raise refusal(
                    "collateral-keys",
                    f"The key{said} that signs {token.where} is not at hand.",
                    collaterals.KEYS,
                    _KEYS_MEND,
                )
            found.append(key)
            certificates = collaterals.key_chain(token.jws, collateral, roots)
            if certificates:
                _vouched(certificates, key)
                path.update((where, certificate) for certificate, where in certificates)
                vouched[jws.thumbprint(key)] = certificates[-1][0].fingerprint
        names = tuple(dict.fromkeys(map(jws.thumbprint, found)))
        step.detail = f"supplied with the evidence in {collaterals.KEYS}: {', '.join(names)}"
        if vouched:
            step.detail += f"; certified by {', '.join(dict.fromkeys(vouched.values()))}"
    root = vouched.get(names[0]) or spki(found[0])
    named = tuple((certificate, where) for where, certificate in path.items())
    return named, tuple(found), Signer(root, names, tuple(vouched))


def spki(key: PublicKey) -> str:
    """SHA-256 (hex) of the key's SubjectPublicKeyInfo."""
    form = serialization.PublicFormat.SubjectPublicKeyInfo
    return hashlib.sha256(key.public_bytes(serialization.Encoding.DER, form)).hexdigest()


def check_times(token: Token, now: float) -> None:
    """``evidence.validity-*`` unless ``now`` (Unix seconds) is from nbf and iat to exp."""
    claims, where = token.claims, token.where
    since = claims.iat if claims.nbf is None else max(claims.iat, claims.nbf)
    check_window(where, since, claims.exp, now, mend="Ask for a new token.")


def verify(
    tokens: Tokens, collateral: Collateral, roots: Collection[str], *, now: float, checks: Checks
) -> Signer:
    """Follow the procedure above. ``roots``: admitted SHA-256 (hex) of roots' keys. ``now``: Unix
    seconds."""
    admitted = ALGORITHMS[tokens.tee]
    with checks.step("algorithm") as step:
        for token in tokens.all:
            jws.check_algorithm(token.jws, admitted, token.where)
        step.detail = tokens.overall.jws.alg
        idle = {name for token in tokens.all for name in token.jws.ignored}
        if tokens.overall.jws.x5c and tokens.tee not in CHAINED:
            idle.add("x5c")
        if idle:
            step.detail += (
                f"; in the header and not acted upon: {jws.plain(', '.join(sorted(idle)), 200)}"
            )
    if tokens.tee == NRAS:
        with checks.step("submods") as step:
            step.detail = _submods(tokens)
    if tokens.overall.jws.x5c and tokens.tee in CHAINED:
        path, key, signer = _chain(tokens, collateral, roots, checks)
        keys: tuple[PublicKey, ...] = (key,)
    else:
        path, keys, signer = _keys(tokens, collateral, roots, checks)
    with checks.step("signature") as step:
        for token, key in zip(tokens.all, keys, strict=True):
            jws.check_signature(token.jws, key, admitted, token.where)
        step.detail = f"{tokens.overall.jws.alg}, {len(tokens.all)} of {len(tokens.all)} tokens"
        if tokens.unsigned:
            step.detail += f"; not signed: {tokens.unsigned}"
    checks.crypto = "valid"
    with checks.step("validity") as step:
        for certificate, where in path:
            x509.check_validity(certificate, where, now)
        for token in tokens.all:
            check_times(token, now)
        step.detail = f"at {moment(now)}"
    with checks.step("revocation") as step:
        step.unchecked("no revocation list comes with tokens")
    return signer
