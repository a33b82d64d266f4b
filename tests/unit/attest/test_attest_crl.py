"""Revocation lists: what is read, what is refused, who may sign one, when it counts."""

from __future__ import annotations

import base64
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from cryptography import x509 as made
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

from casemate.attest import crl, x509
from casemate.attest.verdict import Refused
from support.mutation import flips, fuzz

NOW = datetime(2026, 6, 1, tzinfo=UTC)
DAY = timedelta(days=1)
KEY = ec.generate_private_key(ec.SECP256R1())
OTHER = ec.generate_private_key(ec.SECP256R1())
ADMITTED = {x509.ECDSA_SHA256}


def name(text: str) -> made.Name:
    return made.Name([made.NameAttribute(NameOID.COMMON_NAME, text)])


def certificate(text: str, serial: int = 7, *, crl_sign: bool = True) -> x509.Certificate:
    usage = made.KeyUsage(False, False, False, False, False, True, crl_sign, False, False)
    built = (
        made.CertificateBuilder().subject_name(name(text)).issuer_name(name("CA"))
        .public_key(KEY.public_key()).serial_number(serial)
        .not_valid_before(NOW - DAY).not_valid_after(NOW + DAY)
        .add_extension(usage, critical=True).sign(KEY, hashes.SHA256())
    )  # fmt: skip
    return x509.parse(built.public_bytes(serialization.Encoding.DER), text)


def revocations(*serials: int, key: Any = KEY, critical: bool = False) -> bytes:
    builder = (
        made.CertificateRevocationListBuilder().issuer_name(name("CA"))
        .last_update(NOW).next_update(NOW + DAY)
        .add_extension(made.CRLNumber(3), critical=critical)
    )  # fmt: skip
    for serial in serials:
        entry = made.RevokedCertificateBuilder().serial_number(serial).revocation_date(NOW)
        reason = made.CRLReason(made.ReasonFlags.key_compromise)
        builder = builder.add_revoked_certificate(entry.add_extension(reason, False).build())
    return builder.sign(key, hashes.SHA256()).public_bytes(serialization.Encoding.DER)


def code(call: Any, *args: Any) -> str:
    with pytest.raises(Refused) as e:
        call(*args)
    return e.value.code.removeprefix("evidence.")


def test_what_stands_in_a_list():
    found = crl.parse(revocations(7, 9), "list")
    assert set(found.revoked) == {7, 9}
    assert (found.this_update, found.next_update) == (
        NOW.timestamp(), (NOW + DAY).timestamp(),
    )  # fmt: skip
    assert crl.parse(revocations(), "list").revoked == {}
    crl.check_issued(found, certificate("CA"), "list", ADMITTED)


def test_pem_is_the_same():
    data = revocations(7)
    text = base64.encodebytes(data).replace(b"\n", b"")
    pem = b"-----BEGIN X509 CRL-----\n" + text + b"\n-----END X509 CRL-----\n"
    assert crl.parse(pem, "list") == crl.parse(data, "list")
    assert code(crl.parse, pem + b"more", "list") == "parse-crl"


def test_a_revoked_certificate():
    found = crl.parse(revocations(7), "list")
    crl.check_revoked(found, certificate("leaf", 8), "leaf")
    assert code(crl.check_revoked, found, certificate("leaf", 7), "leaf") == "revocation-revoked"


def test_a_list_says_nothing_about_another_authoritys_certificates():
    foreign = x509.Certificate(**{**vars(certificate("leaf")), "issuer": certificate("x").subject})
    found = crl.parse(revocations(7), "list")
    assert code(crl.check_revoked, found, foreign, "leaf") == "revocation-list"


def test_who_may_sign_one():
    ca = certificate("CA")
    forged = crl.parse(revocations(key=OTHER), "list")
    assert code(crl.check_issued, forged, ca, "list", ADMITTED) == "chain-signature"
    good = crl.parse(revocations(), "list")
    assert code(crl.check_issued, good, certificate("B"), "list", ADMITTED) == "chain-issuer"
    unable = certificate("CA", crl_sign=False)
    assert code(crl.check_issued, good, unable, "list", ADMITTED) == "chain-authority"
    assert code(crl.check_issued, good, ca, "list", {x509.ECDSA_SHA384}) == "chain-algorithm"


def test_when_it_counts():
    found = crl.parse(revocations(), "list")
    for seconds in (0, 86400):
        crl.check_validity(found, "list", NOW.timestamp() + seconds)
    assert code(crl.check_validity, found, "list", NOW.timestamp() - 1) == "validity-not-yet"
    assert code(crl.check_validity, found, "list", NOW.timestamp() + 86401) == "validity-expired"
    assert code(crl.check_validity, found, "list", float("nan")) == "validity-not-yet"


def test_critical_extensions_are_refused():
    assert code(crl.parse, revocations(critical=True), "list") == "parse-crl"


def test_a_serial_number_stands_once_and_size_is_bounded():
    assert code(crl.parse, bytes(crl.MAX_BYTES + 1), "list") == "parse-crl"
    assert code(crl.parse, b"", "list") == "parse-crl"
    entry = revocations(7)
    assert code(crl.parse, entry + b"\0", "list") == "parse-crl"


def test_every_flip_is_refused():
    """Of a list with one entry: in its parsing, its issuer or its signature."""
    ca = certificate("CA")
    for data in flips(revocations(7)):
        with pytest.raises(Refused):
            crl.check_issued(crl.parse(data, "list"), ca, "list", ADMITTED)


def test_whatever_comes_is_refused_or_read():
    fuzz(lambda data: crl.parse(data, "list"), [revocations(), revocations(7, 1 << 90)])
