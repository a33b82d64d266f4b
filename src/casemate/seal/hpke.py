"""HPKE with a post-quantum hybrid: one short message to one key (RFC 9180, base mode, single-shot).

The suite is MLKEM768-X25519 with HKDF-SHA-256 and AES-256-GCM (draft-ietf-hpke-pq), so that what is
recorded today stays closed if either of the two key exchanges falls. ``info`` binds the message to
its purpose; there is no separate ``aad``, since in single-shot use it adds nothing (RFC 9180, 8.1).
"""

from __future__ import annotations

import functools
from dataclasses import dataclass, field
from typing import Final

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.asymmetric.mlkem import MLKEM768PrivateKey, MLKEM768PublicKey
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey, X25519PublicKey
from cryptography.hazmat.primitives.hpke import (
    AEAD,
    KDF,
    KEM,
    MLKEM768X25519PrivateKey,
    MLKEM768X25519PublicKey,
    Suite,
)

from casemate.seams import OsRng, Rng
from casemate.spec.errors import FormatError
from casemate.spec.identity import SEAL_KEY_BYTES

SUITE: Final = Suite(KEM.MLKEM768_X25519, KDF.HKDF_SHA256, AEAD.AES_256_GCM)
OVERHEAD: Final = KEM.MLKEM768_X25519.enc_length() + 16
SECRET_BYTES: Final = 64 + 32  # ML-KEM-768 seed (FIPS 203: d || z), X25519 private key
_MLKEM_PUBLIC: Final = SEAL_KEY_BYTES - 32


@functools.lru_cache(maxsize=64)
def _public(key: bytes) -> MLKEM768X25519PublicKey:
    if len(key) != SEAL_KEY_BYTES:
        raise ValueError(f"{len(key)} bytes where {SEAL_KEY_BYTES} are due")
    return MLKEM768X25519PublicKey(
        MLKEM768PublicKey.from_public_bytes(key[:_MLKEM_PUBLIC]),
        X25519PublicKey.from_public_bytes(key[_MLKEM_PUBLIC:]),
    )


def seal(public_key: bytes, plaintext: bytes, *, info: bytes) -> bytes:
    """Encrypt ``plaintext`` to ``public_key`` (1216 bytes) for the purpose ``info``.

    Returns the encapsulation (1120 bytes), the ciphertext and its tag: ``OVERHEAD`` bytes more than
    the plaintext. Raises FormatError ``format.seal-key`` for bytes that are no key.
    """
    try:
        return SUITE.encrypt(plaintext, _public(public_key), info)
    except ValueError as e:
        raise FormatError(
            "format.seal-key",
            f"The key to seal to is no ML-KEM-768+X25519 public key: {e}.",
            mend="Take the key from a verified attestation or a public identity.",
        ) from None


@dataclass(frozen=True, slots=True)
class SealKey:
    """A private key to receive messages; ``public`` is its 1216-byte public key."""

    public: bytes
    _private: MLKEM768X25519PrivateKey = field(repr=False, compare=False)

    def open(self, message: bytes, *, info: bytes) -> bytes:
        """The plaintext of a message sealed to this key for ``info``.

        Raises FormatError ``format.sealed`` when the message was made for another key or purpose,
        or was changed; which of these, nobody can tell.
        """
        try:
            return SUITE.decrypt(message, self._private, info)
        except (InvalidTag, ValueError):
            raise FormatError(
                "format.sealed",
                "A sealed message does not open: other key, other purpose, or changed on the way.",
                mend="Seal it again to the key of the present attestation.",
            ) from None


def from_secret(secret: bytes) -> SealKey:
    """The key made of 96 secret bytes: ML-KEM-768 seed and X25519 private key."""
    if len(secret) != SECRET_BYTES:
        raise ValueError(f"a seal key's secret has {SECRET_BYTES} bytes, not {len(secret)}")
    mlkem = MLKEM768PrivateKey.from_seed_bytes(secret[:64])
    x25519 = X25519PrivateKey.from_private_bytes(secret[64:])
    public = mlkem.public_key().public_bytes_raw() + x25519.public_key().public_bytes_raw()
    return SealKey(public, MLKEM768X25519PrivateKey(mlkem, x25519))


def generate(rng: Rng | None = None) -> SealKey:
    """A fresh key."""
    return from_secret((rng or OsRng()).bytes(SECRET_BYTES))
