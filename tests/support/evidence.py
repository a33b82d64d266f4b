"""Attestations by one simulated TEE, good ones and forged ones, for tests."""

from __future__ import annotations

from dataclasses import replace
from datetime import UTC, datetime
from functools import cache
from pathlib import Path

from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import rsa

from casemate.attest import binding
from casemate.attest.snp import abi
from casemate.seams import OsRng
from casemate.spec import codec
from casemate.spec.evidence import Attestation, Binding, Evidence, ServerPolicy
from casemate.tee import simulated
from support.disk import SimDisk

NOW = datetime(2026, 6, 1, tzinfo=UTC).timestamp()
NONCES = [bytes([i]) * 32 for i in range(5)]
NONCE = NONCES[3]
CAPTURED = Path(__file__).resolve().parents[3] / "shared" / "evidence" / "snp"


class FixedClock:
    def monotonic(self) -> float:
        return 0.0

    def wall(self) -> float:
        return NOW

    async def sleep(self, seconds: float) -> None:
        raise AssertionError("nothing waits here")


@cache
def tee(seed: int = 0) -> simulated.SimulatedTee:
    """One TEE for each seed and test process: RSA keys take a second."""
    return simulated.SimulatedTee(SimDisk(seed), OsRng(), FixedClock())


@cache
def stranger() -> rsa.RSAPrivateKey:
    """A key of the right form that nobody trusts."""
    return rsa.generate_private_key(65537, 4096)


PROMISES = ServerPolicy(
    software="casemate", dev=False, filter="rdp/v1", release_owner="",
    sandbox=("landlock", "seccomp"),
)  # fmt: skip


def bound(boot: bytes = b"b" * 16, nonces: list[bytes] = NONCES) -> Binding:
    return Binding(
        boot=boot,
        tls_spki=b"t" * 32,
        hpke_key=b"h" * 1216,
        receipt_key=b"r" * 32,
        log_key=b"l" * 32,
        server_policy=codec.digest(PROMISES),
        nonce_root=binding.nonce_root(nonces),
    )


def attestation(
    of: simulated.SimulatedTee | None = None, what: Binding | None = None, **fields: int | bytes
) -> Attestation:
    """An attestation that answers NONCE; ``fields`` of the report are set before it is signed."""
    maker, what = of or tee(), what or bound()
    report = maker._fields(binding.report_data(what)) | fields
    return Attestation(
        binding=what,
        policy=PROMISES,
        index=NONCES.index(NONCE),
        count=len(NONCES),
        path=binding.nonce_path(NONCES, NONCES.index(NONCE)),
        evidence=maker._evidence(abi.pack(report)),
    )


def with_files(of: Attestation, **files: bytes | None) -> Attestation:
    """The attestation with files replaced (``ask_pem`` for ``ask.pem``), or removed by None."""
    named = {k.replace("_", "."): v for k, v in files.items()}
    merged = {**of.evidence.files, **named}
    kept = {k: v for k, v in merged.items() if v is not None}
    evidence = Evidence(tee=of.evidence.tee, simulated=of.evidence.simulated, files=kept)
    return replace(of, evidence=evidence)


def der(pem: bytes) -> bytes:
    from casemate.attest import x509

    return x509.from_pem(pem)


def certificate(made: object) -> bytes:
    """DER of a certificate made by ``cryptography``."""
    return made.public_bytes(serialization.Encoding.DER)  # type: ignore[attr-defined]
