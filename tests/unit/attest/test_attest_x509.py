"""Our reader against ``cryptography``'s, on certificates that both can read, and where it is
stricter."""

import base64
import warnings

import pytest
from cryptography import x509 as peer
from cryptography.hazmat.primitives import serialization
from hypothesis import given, settings
from hypothesis import strategies as st

from casemate.attest import roots, x509
from casemate.attest.der import DerError, Reader
from casemate.spec.errors import EvidenceError
from support.evidence import CAPTURED, attestation, der


def carried():
    files = attestation().evidence.files
    return {
        "vcek": files["vcek.der"], "ask": der(files["ask.pem"]), "ark": der(files["ark.pem"]),
        **{line: roots.amd(line).raw for line in roots.AMD},
    }  # fmt: skip


@pytest.mark.parametrize("name", ["vcek", "ask", "ark", "Milan", "Genoa", "Turin"])
def test_reads_what_cryptography_reads(name):
    data = carried()[name]
    ours, theirs = x509.parse(data, name), peer.load_der_x509_certificate(data)
    assert ours.serial == theirs.serial_number
    assert ours.tbs == theirs.tbs_certificate_bytes
    assert ours.signature == theirs.signature
    assert ours.issuer == theirs.issuer.public_bytes()
    assert ours.subject == theirs.subject.public_bytes()
    assert ours.not_before == theirs.not_valid_before_utc.timestamp()
    assert ours.not_after == theirs.not_valid_after_utc.timestamp()
    assert ours.spki == theirs.public_key().public_bytes(
        serialization.Encoding.DER, serialization.PublicFormat.SubjectPublicKeyInfo
    )
    assert ours.signature_algorithm == x509.PSS_SHA384
    assert {k: e.critical for k, e in ours.extensions.items()} == {
        e.oid.dotted_string: e.critical for e in theirs.extensions
    }
    common = theirs.subject.get_attributes_for_oid(peer.NameOID.COMMON_NAME)[0].value
    assert ours.name() == common


def zero_serial() -> bytes:
    data = carried()["vcek"]
    assert data.count(b"\xa0\x03\x02\x01\x02\x02\x01\x01") == 1
    return data.replace(b"\xa0\x03\x02\x01\x02\x02\x01\x01", b"\xa0\x03\x02\x01\x02\x02\x01\x00")


def test_serial_zero_is_read_without_a_warning():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert x509.parse(zero_serial(), "vcek.der").serial == 0
    with pytest.warns(match="serial"):  # the reason for a reader of our own still stands
        peer.load_der_x509_certificate(zero_serial())


@pytest.mark.skipif(not CAPTURED.is_dir(), reason="no captured evidence beside the project")
def test_real_vceks_of_serial_zero():
    found = sorted(CAPTURED.glob("*/v?ek.der"))
    assert found
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert {x509.parse(f.read_bytes(), f.name).serial for f in found} == {0}


def test_pem_is_one_certificate_and_nothing_else():
    data = carried()["ask"]
    text = base64.encodebytes(data)
    good = b"-----BEGIN CERTIFICATE-----\n" + text + b"-----END CERTIFICATE-----\n"
    assert x509.parse(good, "x").raw == data
    assert x509.parse(good.replace(b"\n", b"\r\n"), "x").raw == data
    for bad in (
        good + good,
        good + b"more",
        b" " + good,
        good.replace(b"CERTIFICATE", b"X509 CRL"),
        good.replace(text, text.replace(b"A", b"A ", 1)),
        good.replace(text, text[:-3] + b"\n"),
        good[:-30],
    ):
        with pytest.raises(EvidenceError) as e:
            x509.parse(bad, "x")
        assert e.value.code == "evidence.parse-certificate"


@pytest.mark.parametrize("text", ["AB==", "AAB=", "A===", "AA=", "AA==AA=="])
def test_pem_has_one_form(text):
    wrapped = f"-----BEGIN CERTIFICATE-----\n{text}\n-----END CERTIFICATE-----\n".encode()
    with pytest.raises(DerError):
        x509.from_pem(wrapped)
    x509.from_pem(wrapped.replace(text.encode(), b"AA=="))


def test_an_extension_stands_once():
    entry = bytes.fromhex("300a0603551d1304030101ff")
    assert set(x509.extensions(Reader(entry))) == {x509.BASIC_CONSTRAINTS}
    with pytest.raises(DerError, match="twice"):
        x509.extensions(Reader(entry + entry))


def test_an_unknown_critical_extension_is_refused():
    data = carried()["ask"]
    usage, other = bytes.fromhex("0603551d0f0101ff"), bytes.fromhex("0603551d1e0101ff")
    assert data.count(usage) == 1
    with pytest.raises(EvidenceError, match=r"critical extension 2\.5\.29\.30"):
        x509.parse(data.replace(usage, other), "ask.pem")


def test_two_signature_algorithms_are_refused():
    data = carried()["ask"]
    salt = bytes.fromhex("020130")
    assert data.count(salt) == 2
    at = data.rindex(salt)
    with pytest.raises(EvidenceError, match="two different"):
        x509.parse(data[:at] + bytes.fromhex("020120") + data[at + 3 :], "ask.pem")


def test_size_is_bounded():
    with pytest.raises(EvidenceError, match="bytes"):
        x509.parse(b"0" * (x509.MAX_BYTES + 1), "x")


@settings(max_examples=400)
@given(st.sampled_from(["vcek", "ask", "ark"]), st.data())
def test_mangled_certificates_raise_only_evidence_errors(name, data):
    good = carried()[name]
    bad = bytearray(good)
    for _ in range(data.draw(st.integers(1, 3))):
        at = data.draw(st.integers(0, len(bad) - 1))
        bad[at : at + data.draw(st.integers(0, 2))] = data.draw(st.binary(max_size=2))
    try:
        found = x509.parse(bytes(bad), name)
        assert found.raw == bytes(bad)
        x509.public_key(found, name)
    except EvidenceError as e:
        assert e.code.startswith("evidence.parse-")


@given(st.binary(max_size=200))
def test_noise_raises_only_evidence_errors(data):
    with pytest.raises(EvidenceError):
        x509.parse(data, "noise")
