"""Signed requests: HTTP message signatures (RFC 9421) over content digests (RFC 9530).

One form only: label ``casemate``, Ed25519, key id the identity's, and exactly the components of
:data:`COMPONENTS` in that order. ``created`` is there for the reader of a log; no decision uses it.
Replay is prevented by the boot (a signature counts for one start of one server) and the nonce,
which the server must admit once.
"""

from __future__ import annotations

import re
import secrets
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Final, TypeAlias

from cryptography.exceptions import InvalidSignature as BadSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey
from http_message_signatures import (
    ContentDigest,
    HTTPMessageSignaturesException,
    HTTPMessageSigner,
    HTTPMessageVerifier,
    HTTPSignatureKeyResolver,
    algorithms,
)

from casemate.seal.identity import Identity
from casemate.spec.errors import AuthError, UsageError
from casemate.spec.identity import PublicIdentity

LABEL: Final = "casemate"
BOOT_HEADER: Final = "casemate-boot"
NONCE_HEADER: Final = "casemate-nonce"
NONCE_BYTES: Final = 16
COMPONENTS: Final = ("@method", "@target-uri", "content-digest", BOOT_HEADER, NONCE_HEADER)
_SIGNED: Final = ("signature", "signature-input", "content-digest", BOOT_HEADER, NONCE_HEADER)
_MAX_HEADER: Final = 1024
_INPUT: Final = re.compile(
    re.escape(f"{LABEL}=(" + " ".join(f'"{c}"' for c in COMPONENTS) + ")")
    + r';created=[0-9]{1,15};keyid="(id_[0-9a-f]{40})";alg="ed25519"'
)
# The last letter before the padding: unused bits are zero, so that bytes have one spelling.
_SIGNATURE: Final = re.compile(re.escape(LABEL) + r"=:[A-Za-z0-9+/]{85}[AQgw]==:")
_DIGEST: Final = re.compile(r"sha-256=:[A-Za-z0-9+/]{42}[AEIMQUYcgkosw048]=:")

Headers: TypeAlias = Mapping[str, str] | Iterable[tuple[str, str]]
Lookup: TypeAlias = Callable[[str], PublicIdentity | None]


@dataclass(slots=True)
class _Message:
    """What the library asks of a request."""

    method: str
    url: str
    headers: dict[str, str]


class _Keys(HTTPSignatureKeyResolver):
    def __init__(self, key: Any) -> None:
        self._key = key

    def resolve_public_key(self, key_id: str) -> Any:
        return self._key

    def resolve_private_key(self, key_id: str) -> Any:
        return self._key


class _Verifier(HTTPMessageVerifier):
    """No decision by a clock, and the label is checked by the caller."""

    require_created = False

    def validate_created_and_expires(self, sig_input: object, max_age: object = None) -> None:
        return None


def _refuse(reason: str, message: str, mend: str = "Sign the request with casemate.") -> AuthError:
    return AuthError(f"auth.{reason}", message, mend=mend)


def _pairs(headers: Headers) -> Iterable[tuple[str, str]]:
    return headers.items() if isinstance(headers, Mapping) else headers


def sign(
    identity: Identity,
    method: str,
    url: str,
    headers: Headers,
    body: bytes,
    *,
    boot: bytes,
    nonce: bytes | None = None,
) -> dict[str, str]:
    """``headers`` with lower-case names, and those that sign the request added.

    ``url`` is absolute, as it will be sent. ``boot``: the attested boot instance. ``nonce``: 16
    bytes, fresh for each request (also for a repeated one); made here when ``None``. Raises
    UsageError ``usage.url``.
    """
    nonce = secrets.token_bytes(NONCE_BYTES) if nonce is None else nonce
    if len(nonce) != NONCE_BYTES:
        raise ValueError(f"a nonce has {NONCE_BYTES} bytes, not {len(nonce)}")
    out = {name.lower(): text for name, text in _pairs(headers) if name.lower() not in _SIGNED}
    out[BOOT_HEADER], out[NONCE_HEADER] = boot.hex(), nonce.hex()
    message = _Message(method.upper(), url, out)
    signer = HTTPMessageSigner(signature_algorithm=algorithms.ED25519)
    try:
        prepared = signer.prepare(
            message, key_id=identity.id, label=LABEL, covered_component_ids=COMPONENTS, body=body
        )
    except HTTPMessageSignaturesException as e:
        raise UsageError(
            "usage.url",
            f"No request can be signed for {url[:200]!r}: {e}.",
            mend="Give an absolute URL such as https://enclave.example:8443.",
        ) from None
    signer.apply(message, prepared, identity.sign(prepared.signature_base))
    return {name.lower(): text for name, text in out.items()}


def _signed_headers(headers: Headers) -> dict[str, str]:
    """The headers that carry the signature, each exactly once and in its only form."""
    found: dict[str, str] = {}
    for name, text in _pairs(headers):
        key = name.lower()
        if key in _SIGNED:
            if key in found:
                raise _refuse("signature-form", f"The request has two {key} headers.")
            found[key] = text
    if "signature" not in found or "signature-input" not in found:
        raise _refuse(
            "signature-missing",
            "The request is not signed.",
            "Sign it with an enrolled identity (RFC 9421, label casemate).",
        )
    for key in _SIGNED:
        if key not in found or len(found[key]) > _MAX_HEADER:
            raise _refuse("signature-form", f"The request has no proper {key} header.")
    return found


def verify(
    method: str, url: str, headers: Headers, body: bytes, *, boot: bytes, lookup: Lookup
) -> str:
    """The id of the identity that signed exactly this request for this boot.

    ``url``: absolute, rebuilt from what came. ``lookup`` gives the public identity of an id, or
    ``None``. The caller must still refuse a nonce (header ``casemate-nonce``) that it has seen from
    this identity. Raises AuthError ``auth.signature-missing``, ``-form``, ``auth.signature``,
    ``auth.content-digest``, ``auth.unknown-identity``, ``auth.boot-stale`` or ``auth.nonce``.
    """
    found = _signed_headers(headers)
    stated = _INPUT.fullmatch(found["signature-input"])
    if stated is None or not _SIGNATURE.fullmatch(found["signature"]):
        raise _refuse("signature-form", "The signature is not in casemate's form of RFC 9421.")
    if not _DIGEST.fullmatch(found["content-digest"]):
        raise _refuse("signature-form", "The content digest is not one SHA-256.")
    if not re.fullmatch(rf"[0-9a-f]{{{2 * NONCE_BYTES}}}", found[NONCE_HEADER]):
        raise _refuse("nonce", f"The nonce is not {NONCE_BYTES} bytes in lower-case hex.")
    if found[BOOT_HEADER] != boot.hex():
        raise _refuse(
            "boot-stale",
            "The request was signed for another start of the server.",
            "Connect and verify the enclave again, then repeat the request.",
        )
    public = lookup(stated[1])
    if public is None or public.id != stated[1]:
        raise _refuse(
            "unknown-identity",
            f"Nobody is enrolled as {stated[1]}.",
            "Enrol the identity with this server first.",
        )
    verifier = _Verifier(
        signature_algorithm=algorithms.ED25519,
        key_resolver=_Keys(Ed25519PublicKey.from_public_bytes(public.sign_key)),
    )
    try:
        verifier.verify(_Message(method, url, found), max_age=None, require_components=COMPONENTS)
    except (HTTPMessageSignaturesException, BadSignature, ValueError):
        raise _refuse(
            "signature",
            "The signature does not belong to this request and identity.",
            "Sign the request as it is sent, with the identity that it names.",
        ) from None
    try:
        ContentDigest.verify(found["content-digest"], body)
    except HTTPMessageSignaturesException:
        raise _refuse(
            "content-digest",
            "The body is not the one that was signed.",
            "Send the body unchanged.",
        ) from None
    return public.id
