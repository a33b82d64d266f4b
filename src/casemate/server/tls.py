"""TLS 1.3 with a key that is made at start and lives in memory only.

OpenSSL's Python door loads keys from files alone; the file here is a memfd (memfd_create(2)),
which has no name on any disk and is gone once closed.
"""

from __future__ import annotations

import datetime
import hashlib
import ipaddress
import os
import ssl
from collections.abc import Iterable
from dataclasses import dataclass

from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
    PublicFormat,
)
from cryptography.x509.oid import NameOID


@dataclass(frozen=True, slots=True)
class Tls:
    """``context`` serves TLS 1.3; ``spki`` is SHA-256 of the key's SubjectPublicKeyInfo (DER)."""

    context: ssl.SSLContext
    spki: bytes


def _alternative(host: str) -> x509.GeneralName:
    try:
        return x509.IPAddress(ipaddress.ip_address(host))
    except ValueError:
        return x509.DNSName(host)


def make(hosts: Iterable[str]) -> Tls:
    """A fresh ECDSA P-256 key with a certificate that it signed itself.

    The certificate proves nothing and says so by its dates (RFC 5280, 4.1.2.5: no well-defined
    expiry): what counts is the key's digest in the attested binding.
    """
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "casemate: trust the attestation")])
    certificate = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(datetime.datetime(2000, 1, 1, tzinfo=datetime.UTC))
        .not_valid_after(datetime.datetime(9999, 12, 31, 23, 59, 59, tzinfo=datetime.UTC))
        .add_extension(
            x509.SubjectAlternativeName([_alternative(h) for h in dict.fromkeys(hosts)]), False
        )
        .sign(key, hashes.SHA256())
    )
    pem = key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
    pem += certificate.public_bytes(Encoding.PEM)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_3
    context.set_alpn_protocols(["http/1.1"])
    # A resumed session would reach back past this connection's evidence.
    context.options |= ssl.OP_NO_TICKET
    context.num_tickets = 0
    fd = os.memfd_create("tls", os.MFD_CLOEXEC)
    try:
        os.write(fd, pem)
        context.load_cert_chain(f"/proc/self/fd/{fd}")
    finally:
        os.close(fd)
    public = key.public_key().public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo)
    return Tls(context, hashlib.sha256(public).digest())
