"""Who takes part: a public identity and the name derived from it."""

from __future__ import annotations

import hashlib
from typing import Final

from casemate.spec.codec import value

SIGN_KEY_BYTES: Final = 32
SEAL_KEY_BYTES: Final = 1216  # ML-KEM-768 encapsulation key (1184) and X25519 public key (32)


@value("identity/v1")
class PublicIdentity:
    """Ed25519 key to check signatures, ML-KEM-768+X25519 key to seal results to.

    ``name`` is for display and proves nothing; ``id`` names the keys.
    """

    name: str
    sign_key: bytes
    seal_key: bytes

    def __post_init__(self) -> None:
        if len(self.sign_key) != SIGN_KEY_BYTES or len(self.seal_key) != SEAL_KEY_BYTES:
            raise ValueError("a key has the wrong length")
        if not (1 <= len(self.name) <= 80 and self.name.isprintable()):
            raise ValueError("the name must have 1 to 80 printable characters")

    @property
    def id(self) -> str:
        """``id_`` and 40 hex digits of SHA-256 over both keys."""
        tag = b"casemate/identity/v1\0"
        return "id_" + hashlib.sha256(tag + self.sign_key + self.seal_key).hexdigest()[:40]
