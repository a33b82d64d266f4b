"""DSSE: signed envelopes (https://github.com/secure-systems-lab/dsse, protocol and envelope v1).

One form only: canonical JSON, standard base64 with padding, one or several Ed25519 signatures.
"""

from __future__ import annotations

import base64
import binascii
from collections.abc import Callable, Mapping

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey

from casemate.spec import canonical
from casemate.spec.canonical import Json
from casemate.spec.errors import FormatError, ReceiptError


def pae(payload_type: str, payload: bytes) -> bytes:
    """The pre-authentication encoding: what is signed."""
    kind = payload_type.encode("utf-8")
    return b"DSSEv1 %d %b %d %b" % (len(kind), kind, len(payload), payload)


def sign(payload_type: str, payload: bytes, signer: Callable[[bytes], bytes], keyid: str) -> str:
    """The envelope's JSON text; ``signer`` makes an Ed25519 signature (64 bytes)."""
    signature = signer(pae(payload_type, payload))
    envelope = {
        "payload": base64.b64encode(payload).decode(),
        "payloadType": payload_type,
        "signatures": [{"keyid": keyid, "sig": base64.b64encode(signature).decode()}],
    }
    return canonical.encode(envelope).decode("utf-8")


def _refuse(reason: str, message: str) -> ReceiptError:
    return ReceiptError(
        f"receipt.{reason}", message, mend="Get the receipt again from its source, unchanged."
    )


def _text(envelope: dict[str, Json], key: str) -> str:
    found = envelope[key]
    if not isinstance(found, str):
        raise _refuse("envelope", f"The envelope's {key} is not text.")
    return found


def _octets(text: str) -> bytes:
    try:
        raw = base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError):
        raw = b""
    if base64.b64encode(raw).decode() != text:
        raise _refuse("envelope", "The envelope holds bytes that are not in base64.")
    return raw


def _read(envelope: str | bytes) -> tuple[str, bytes, list[Json]]:
    """Payload type, payload and signatures, of which nothing is verified."""
    try:
        data = envelope.encode("utf-8") if isinstance(envelope, str) else envelope
        whole = canonical.decode(data)
    except (FormatError, UnicodeEncodeError) as e:
        raise _refuse("envelope", f"The envelope is no canonical JSON: {e}.") from None
    if not isinstance(whole, dict) or set(whole) != {"payload", "payloadType", "signatures"}:
        raise _refuse("envelope", "The envelope has other fields than DSSE v1.")
    signatures = whole["signatures"]
    if not isinstance(signatures, list) or not signatures:
        raise _refuse("envelope", "The envelope has no signature.")
    return _text(whole, "payloadType"), _octets(_text(whole, "payload")), signatures


def unverified(envelope: str | bytes) -> bytes:
    """The payload, for reading: who signed it is not asked. Raises ReceiptError
    ``receipt.envelope``."""
    return _read(envelope)[1]


def verify(envelope: str | bytes, keys: Mapping[str, bytes]) -> tuple[str, bytes]:
    """(payload type, payload) of an envelope whose every signature holds.

    ``keys``: key id to Ed25519 public key (32 bytes); each signature's key id must be there, and
    key ids must differ. Raises ReceiptError ``receipt.envelope`` (form), ``receipt.signer``
    (unknown key) or ``receipt.signature``.
    """
    payload_type, payload, signatures = _read(envelope)
    seen: set[str] = set()
    for item in signatures:
        if not isinstance(item, dict) or set(item) != {"keyid", "sig"}:
            raise _refuse("envelope", "A signature has other fields than keyid and sig.")
        keyid = _text(item, "keyid")
        if keyid in seen or keyid not in keys:
            raise _refuse("signer", f"No trusted key is called {keyid[:80]!r}, or it signs twice.")
        seen.add(keyid)
        try:
            key = Ed25519PublicKey.from_public_bytes(keys[keyid])
            key.verify(_octets(_text(item, "sig")), pae(payload_type, payload))
        except (InvalidSignature, ValueError):
            raise _refuse("signature", f"The signature by {keyid[:80]!r} does not hold.") from None
    return payload_type, payload
