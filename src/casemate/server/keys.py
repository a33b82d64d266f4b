"""The keys of one boot, bound together by the evidence: made at start, in memory only, but for
the log's, which lives in the sealed store."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from casemate.seal import hpke
from casemate.seams import Rng
from casemate.server import tls
from casemate.spec.evidence import Binding

BOOT_BYTES = 16


@dataclass(frozen=True, slots=True)
class SignKey:
    """An Ed25519 key: ``public`` is its 32 raw bytes."""

    public: bytes
    sign: Callable[[bytes], bytes] = field(repr=False, compare=False)


def sign_key(rng: Rng) -> SignKey:
    """A fresh one."""
    key = Ed25519PrivateKey.from_private_bytes(rng.bytes(32))
    return SignKey(key.public_key().public_bytes_raw(), key.sign)


@dataclass(frozen=True, slots=True)
class BootKeys:
    """``boot`` names this start (16 random bytes)."""

    boot: bytes
    tls: tls.Tls
    hpke: hpke.SealKey
    receipt: SignKey
    log: SignKey

    def binding(self, server_policy: str, nonce_root: bytes) -> Binding:
        """What evidence binds for these keys and the nonces under ``nonce_root``."""
        return Binding(
            boot=self.boot,
            tls_spki=self.tls.spki,
            hpke_key=self.hpke.public,
            receipt_key=self.receipt.public,
            log_key=self.log.public,
            server_policy=server_policy,
            nonce_root=nonce_root,
        )


def make(rng: Rng, hosts: Iterable[str], boot: bytes, log: SignKey) -> BootKeys:
    """Fresh keys for the start ``boot``, beside the log's; the TLS key comes from OpenSSL's own
    generator."""
    return BootKeys(
        boot=boot,
        tls=tls.make(hosts),
        hpke=hpke.generate(rng),
        receipt=sign_key(rng),
        log=log,
    )
