"""What a server shows of itself."""

from __future__ import annotations

from typing import Final

from casemate.spec.codec import value

NONCE_BYTES: Final = 32


@value("binding/v1")
class Binding:
    """All that evidence binds (design: section 4).

    boot: 16 random bytes of this start. tls_spki: SHA-256 of the TLS key's SubjectPublicKeyInfo.
    hpke_key: the boot's ML-KEM-768+X25519 public key. receipt_key, log_key: Ed25519 keys.
    server_policy: digest of the server's policy. nonce_root: Merkle root of the nonces waiting.
    """

    boot: bytes
    tls_spki: bytes
    hpke_key: bytes
    receipt_key: bytes
    log_key: bytes
    server_policy: str
    nonce_root: bytes


@value("evidence/v1")
class Evidence:
    """A TEE's evidence and its collateral as files, named as in an evidence folder."""

    tee: str
    simulated: bool
    files: dict[str, bytes]


@value("attestation/v1")
class Attestation:
    """The answer to a nonce: what is bound, the nonce's audit path to ``nonce_root``, evidence."""

    binding: Binding
    index: int
    count: int
    path: tuple[bytes, ...]
    evidence: Evidence
