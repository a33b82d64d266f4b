"""Nitro documents made up under a test root of AWS's form, good ones and forged ones."""

from __future__ import annotations

from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from functools import cache
from typing import Any

import cbor2
from cryptography import x509 as made
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec, utils

from casemate.attest import x509
from casemate.attest.nitro.policy import DEFAULT, NitroPolicy

NOW = datetime(2026, 6, 1, tzinfo=UTC)
INSTANCE = "i-0123456789abcdef0"
MODULE = f"{INSTANCE}-enc0123456789abcdef"
CRL_URL = "http://crl.example/list.crl"
P384_ORDER = int(
    "ffffffffffffffffffffffffffffffffffffffffffffffffc7634d81f4372ddf581a0db248b0a77aecec196accc52973",
    16,
)


@cache
def key(name: str, curve: type[ec.EllipticCurve] = ec.SECP384R1) -> ec.EllipticCurvePrivateKey:
    """One key for each name and test process."""
    return ec.generate_private_key(curve())


def der(certificate: Any) -> bytes:
    return certificate.public_bytes(serialization.Encoding.DER)


def pcr(text: str) -> bytes:
    digest = hashes.Hash(hashes.SHA384())
    digest.update(text.encode())
    return digest.finalize()


@dataclass
class Issued:
    """A certificate to make. path: pathLen of an authority; -1: it is none, and no authority."""

    name: str
    issuer: str
    path: int | None = -1
    usage: tuple[str, ...] = ("key_cert_sign", "crl_sign")
    lives: timedelta = timedelta(hours=3)
    key: ec.EllipticCurvePrivateKey | None = None
    signer: ec.EllipticCurvePrivateKey | None = None
    digest: hashes.HashAlgorithm = field(default_factory=hashes.SHA384)
    points: bool = False
    serial: int = 0

    def make(self) -> made.Certificate:
        """Valid from NOW less one minute."""
        usage = {
            name: name in self.usage
            for name in (
                "digital_signature", "content_commitment", "key_encipherment",
                "data_encipherment", "key_agreement", "key_cert_sign", "crl_sign", "encipher_only",
                "decipher_only",
            )
        }  # fmt: skip
        authority = self.path is None or self.path >= 0
        builder = (
            made.CertificateBuilder()
            .subject_name(_name(self.name))
            .issuer_name(_name(self.issuer))
            .public_key((self.key or key(self.name)).public_key())
            .serial_number(self.serial or made.random_serial_number())
            .not_valid_before(NOW - timedelta(minutes=1))
            .not_valid_after(NOW + self.lives)
            .add_extension(
                made.BasicConstraints(authority, self.path if authority else None), critical=True
            )
            .add_extension(made.KeyUsage(**usage), critical=True)
        )
        if self.points:
            point = made.DistributionPoint(
                [made.UniformResourceIdentifier(CRL_URL)], None, None, None
            )
            builder = builder.add_extension(made.CRLDistributionPoints([point]), critical=False)
        return builder.sign(self.signer or key(self.issuer), self.digest)


def _name(text: str) -> made.Name:
    return made.Name([made.NameAttribute(made.NameOID.COMMON_NAME, text)])


def chain(**changed: dict[str, Any]) -> dict[str, Issued]:
    """The certificates of a document, root first; ``changed``: fields of each by its name."""
    out = {
        "root": Issued("root", "root", None, lives=timedelta(days=9999)),
        "region": Issued("region", "root", 2, lives=timedelta(days=20), points=True),
        "zone": Issued("zone", "region", 1, lives=timedelta(days=5), points=True),
        "instance": Issued("instance", "zone", 0, lives=timedelta(days=1)),
        "leaf": Issued("leaf", "instance", usage=("digital_signature",)),
    }
    for name, values in changed.items():
        for attribute, value in values.items():
            setattr(out[name], attribute, value)
    return out


def fields(issued: dict[str, Issued] | None = None, **changed: Any) -> dict[str, Any]:
    """The fields of a good document; ``changed``: others in their place."""
    certificates = [der(one.make()) for one in (issued or chain()).values()]
    return {
        "module_id": MODULE,
        "digest": "SHA384",
        "timestamp": int(NOW.timestamp() * 1000),
        "pcrs": {n: pcr(f"pcr{n}") if n in (0, 1, 2, 4) else bytes(48) for n in range(16)},
        "certificate": certificates[-1],
        "cabundle": certificates[:-1],
        "public_key": None,
        "user_data": b"u" * 64,
        "nonce": b"n" * 32,
    } | changed


def sign(
    payload: bytes, signer: ec.EllipticCurvePrivateKey | None = None, *, tagged: bool = False,
    protected: bytes = b"\xa1\x01\x38\x22", unprotected: dict[Any, Any] | None = None,
) -> bytes:  # fmt: skip
    """The COSE_Sign1, encoded by another than casemate's own code."""
    structure = cbor2.dumps(["Signature1", protected, b"", payload])
    signature = (signer or key("leaf")).sign(structure, ec.ECDSA(hashes.SHA384()))
    r, s = utils.decode_dss_signature(signature)
    parts = [protected, unprotected or {}, payload, r.to_bytes(48, "big") + s.to_bytes(48, "big")]
    return cbor2.dumps(cbor2.CBORTag(18, parts) if tagged else parts)


def document(issued: dict[str, Issued] | None = None, **changed: Any) -> bytes:
    """A signed document."""
    return sign(cbor2.dumps(fields(issued, **changed)))


def twin(data: bytes) -> bytes:
    """The document with the other signature, (r, n-s), that the same key and bytes have."""
    s = P384_ORDER - int.from_bytes(data[-48:], "big")
    return data[:-48] + s.to_bytes(48, "big")


def revocations(issuer: str, *serials: int, lives: timedelta = timedelta(days=1)) -> bytes:
    """A revocation list of one of the chain's authorities."""
    builder = (
        made.CertificateRevocationListBuilder()
        .issuer_name(_name(issuer))
        .last_update(NOW - timedelta(hours=1))
        .next_update(NOW + lives)
    )
    for serial in serials:
        entry = made.RevokedCertificateBuilder().serial_number(serial).revocation_date(NOW)
        builder = builder.add_revoked_certificate(entry.build())
    return der(builder.sign(key(issuer), hashes.SHA384()))


def tls(name: str = "tls") -> bytes:
    """A TLS certificate that nobody but its own key vouches for."""
    return der(Issued(name, name).make())


def spki(name: str = "tls") -> bytes:
    return (
        key(name)
        .public_key()
        .public_bytes(serialization.Encoding.DER, serialization.PublicFormat.SubjectPublicKeyInfo)
    )


def policy(**changed: Any) -> NitroPolicy:
    """The default policy under the test root."""
    kept = {name: getattr(DEFAULT, name) for name in DEFAULT.__dataclass_fields__}
    root = x509.parse(der(chain()["root"].make()), "the test root")
    return NitroPolicy(**(kept | {"roots": (root.fingerprint,)} | changed))
