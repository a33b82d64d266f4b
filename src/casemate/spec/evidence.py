"""What a server shows of itself."""

from __future__ import annotations

from typing import Final

from casemate.spec.codec import value

NONCE_BYTES: Final = 32
# The layers of the sandbox around a worker (docs/sandbox.md).
SANDBOX: Final = (
    "capabilities", "descriptors", "environment", "landlock", "memory-lock", "no-import",
    "no-new-privileges", "not-dumpable", "rlimits", "seccomp",
)  # fmt: skip


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


@value("server-policy/v2")
class ServerPolicy:
    """What a server promises of itself beyond its measurement; evidence binds its digest.

    filter: the privacy filter of its ledger. release_owner: the Ed25519 key, in hex, of who can
    release its sealing key, and so open its state; "" where hardware holds that key. sandbox: the
    layers that hold around each worker, by name (docs/sandbox.md); a job whose worker lacks one
    ends before it gets a key.
    """

    software: str
    dev: bool
    filter: str
    release_owner: str
    sandbox: tuple[str, ...]


@value("evidence/v1")
class Evidence:
    """A TEE's evidence and its collateral as files, named as in an evidence folder."""

    tee: str
    simulated: bool
    files: dict[str, bytes]


@value("attestation/v2")
class Attestation:
    """The answer to a nonce: what is bound, the policy whose digest is, the nonce's audit path to
    ``nonce_root``, evidence."""

    binding: Binding
    policy: ServerPolicy
    index: int
    count: int
    path: tuple[bytes, ...]
    evidence: Evidence
