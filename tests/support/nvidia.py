"""NVIDIA evidence made up under test roots of NVIDIA's form: reports, chains, signed manifests,
revocation answers; good ones and forged ones. No hardware made any of it."""

from __future__ import annotations

import base64
import hashlib
import struct
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from functools import cache
from typing import Any

from cryptography import x509 as made
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec, utils
from cryptography.x509 import ocsp as made_ocsp
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from casemate.attest import x509
from casemate.attest.nvidia.policy import DEFAULT, NvidiaPolicy

NOW = datetime(2026, 6, 1, tzinfo=UTC)
AT = NOW.timestamp()
NONCE = bytes(range(32))
FWID = b"\xf1" * 48
DRIVER, VBIOS = "590.12", "96.00.A5.00.01"
VALUES = {n: hashlib.sha384(bytes([n])).digest() for n in range(1, 65)}
SHA384 = made.ObjectIdentifier("2.16.840.1.101.3.4.2.2")
P384_ORDER = int(
    "ffffffffffffffffffffffffffffffffffffffffffffffffc7634d81f4372ddf581a0db248b0a77aecec196accc52973",
    16,
)


@cache
def key(name: str) -> ec.EllipticCurvePrivateKey:
    """One key for each name and test process."""
    return ec.generate_private_key(ec.SECP384R1())


def tlv(tag: int, *parts: bytes) -> bytes:
    body = b"".join(parts)
    size = bytes([len(body)]) if len(body) < 128 else b"\x81" + bytes([len(body)])
    return bytes([tag]) + size + body


SHA384_OID = bytes.fromhex("0609608648016503040202")


def composite(fwid: bytes, spki: bytes) -> bytes:
    """The leaf's extension on Hopper."""
    return tlv(0x30, b"\x02\x01\x01", spki, tlv(0x30, SHA384_OID, tlv(4, fwid)))


def tcb_info(fwid: bytes) -> bytes:
    """The leaf's extension on Blackwell: vendor, FWIDs, flags."""
    one = tlv(0x30, SHA384_OID, tlv(4, fwid))
    return tlv(0x30, tlv(0x80, b"NVIDIA"), tlv(0xA6, one, one), b"\x87\x05\x00\x80\x00\x00\x01")


def spki(name: str) -> bytes:
    return (
        key(name)
        .public_key()
        .public_bytes(serialization.Encoding.DER, serialization.PublicFormat.SubjectPublicKeyInfo)
    )


def certificate(
    name: str,
    issuer: str,
    *,
    common: str = "",
    issuer_common: str = "",
    authority: bool = True,
    signs: bool = False,
    extensions: Sequence[made.ExtensionType] = (),
    days: int = 365,
    begins: int = -30,
    serial: int = 0,
    signer: str = "",
) -> made.Certificate:
    """``name``'s certificate by ``issuer``; keys go by these names."""
    nothing = dict.fromkeys(
        ("content_commitment", "key_encipherment", "data_encipherment", "key_agreement",
         "encipher_only", "decipher_only"), False,
    )  # fmt: skip
    builder = (
        made.CertificateBuilder()
        .subject_name(made.Name([made.NameAttribute(NameOID.COMMON_NAME, common or name)]))
        .issuer_name(made.Name([made.NameAttribute(NameOID.COMMON_NAME, issuer_common or issuer)]))
        .public_key(key(name).public_key())
        .serial_number(serial or 1 + sum(name.encode()))
        .not_valid_before((NOW + timedelta(days=begins)).replace(tzinfo=None))
        .not_valid_after((NOW + timedelta(days=days)).replace(tzinfo=None))
        .add_extension(
            made.KeyUsage(
                digital_signature=signs, key_cert_sign=authority, crl_sign=authority, **nothing
            ),
            True,
        )
    )
    if authority:
        builder = builder.add_extension(made.BasicConstraints(True, None), True)
    for extension in extensions:
        builder = builder.add_extension(extension, False)
    return builder.sign(key(signer or issuer), hashes.SHA384())


def pem(*certificates: made.Certificate) -> bytes:
    return b"".join(c.public_bytes(serialization.Encoding.PEM) for c in certificates)


def der(certificate: Any) -> bytes:
    return certificate.public_bytes(serialization.Encoding.DER)


def dmtf(text: str) -> made.SubjectAlternativeName:
    value = tlv(0x0C, text.encode())
    return made.SubjectAlternativeName(
        [made.OtherName(made.ObjectIdentifier("1.3.6.1.4.1.412.274.1"), value)]
    )


def unrecognized(oid: str, value: bytes) -> made.UnrecognizedExtension:
    return made.UnrecognizedExtension(made.ObjectIdentifier(oid), value)


def provisioner(chip: str = "GH100") -> str:
    return f"NVIDIA {chip} Provisioner ICA 1"


def device_chain(
    *,
    chip: str = "GH100",
    name: str = "",
    fwid: bytes = FWID,
    blackwell: bool = False,
    leaf: Mapping[str, Any] | None = None,
    device: Mapping[str, Any] | None = None,
    ica: Mapping[str, Any] | None = None,
) -> list[made.Certificate]:
    """Leaf, device, provisioner, identity and root; ``leaf`` and so on change what they name."""
    kind = (
        unrecognized("2.23.133.5.4.1.1", tcb_info(fwid))
        if blackwell
        else unrecognized("2.23.133.5.4.1", composite(fwid, spki("device")))
    )
    leaf_options: dict[str, Any] = {
        "common": f"{chip} A01 GSP FMC LF",
        "issuer_common": f"{chip} A01 GSP BROM",
        "authority": False,
        "signs": True,
        "extensions": [dmtf(name or f"NVIDIA:{chip}:48B02D0123456789"), kind],
    }
    device_options = {"common": f"{chip} A01 GSP BROM", "issuer_common": provisioner(chip)}
    return [
        certificate("leaf", "device", **(leaf_options | dict(leaf or {}))),
        certificate("device", "ica", **(device_options | dict(device or {}))),
        certificate("ica", "identity", **({"common": provisioner(chip)} | dict(ica or {}))),
        certificate("identity", "device-root"),
        certificate("device-root", "device-root"),
    ]


OPAQUE = (
    (6, bytes.fromhex("00a5009601000000")), (15, b"885\0\0"), (17, b"G520\0"), (18, b"0200\0"),
    (3, DRIVER.encode() + b"\0"), (11, b"\x55"), (20, FWID), (21, b"\xaa"), (34, b"\1\0"),
    (36, b"\2\0"),
)  # fmt: skip


def with_field(kind: int, value: bytes | None) -> list[tuple[int, bytes]]:
    """The usual opaque entries with one replaced, or left out by None."""
    kept = [(k, v) for k, v in OPAQUE if k != kind]
    return kept if value is None else [*kept, (kind, value)]


def opaque(entries: Sequence[tuple[int, bytes]] = OPAQUE) -> bytes:
    return b"".join(struct.pack("<HH", k, len(v)) + v for k, v in entries)


def versioned(entries: Sequence[tuple[int, bytes]], *, major: int = 2, profile: int = 0) -> bytes:
    head = b"NVDAOD" + struct.pack("<HBBBB", profile, major, 0, 0, 0)
    return head + b"".join(struct.pack("<HHH", k, 1, len(v)) + v for k, v in entries)


def signature(signer: str, signed: bytes) -> bytes:
    r, s = utils.decode_dss_signature(key(signer).sign(signed, ec.ECDSA(hashes.SHA384())))
    return r.to_bytes(48, "big") + s.to_bytes(48, "big")


def twin(raw: bytes) -> bytes:
    """(r, n - s) for (r, s)."""
    return raw[:48] + (P384_ORDER - int.from_bytes(raw[48:], "big")).to_bytes(48, "big")


def report(
    *,
    nonce: bytes = NONCE,
    values: Mapping[int, bytes] | None = None,
    fields: bytes | None = None,
    request: bytes = b"\x11\xe0\x01\xff",
    response: bytes = b"\x11\x60\x00\x00",
    slot: int = 0,
    signer: str = "leaf",
    change: Callable[[bytes], bytes] = lambda raw: raw,
) -> bytes:
    """``change``: of the bytes, before they are signed."""
    values = VALUES if values is None else values
    record = b"".join(
        struct.pack("<BBHBH", n, 1, len(v) + 3, 1, len(v)) + v for n, v in values.items()
    )
    body = opaque() if fields is None else fields
    raw = (
        request + nonce + bytes([slot])
        + response + bytes([len(values)]) + len(record).to_bytes(3, "little") + record
        + b"\x5a" * 32 + struct.pack("<H", len(body)) + body
    )  # fmt: skip
    raw = change(raw)
    return raw + signature(signer, raw)


SWID = "http://standards.iso.org/iso/19770/-2/2015/schema.xsd"
TCG = (
    "https://trustedcomputinggroup.org/resource/"
    "tcg-reference-integrity-manifest-rim-information-model/"
)
DS = "http://www.w3.org/2000/09/xmldsig#"
C14N11 = "http://www.w3.org/2006/12/xml-c14n11"
ECDSA = "http://www.w3.org/2001/04/xmldsig-more#ecdsa-sha384"
DIGEST = "http://www.w3.org/2001/04/xmldsig-more#sha384"
ENVELOPED = "http://www.w3.org/2000/09/xmldsig#enveloped-signature"


def resource(index: int, values: Sequence[bytes], active: bool = True, more: str = "") -> str:
    hashed = " ".join(f'ns2:Hash{n}="{v.hex()}"' for n, v in enumerate(values))
    return (
        f'<ns0:Resource type="Measurement" index="{index}" active="{active}"'
        f' alternatives="{len(values)}" {hashed} name="Measurement_{index}" size="48"{more}/>'
    )


def manifest(
    version: str, golden: Mapping[int, Sequence[bytes]], *, product: str = "GH100",
    records: str = "", attributes: str = 'patch="false" supplemental="false"', meta: str = "",
) -> str:  # fmt: skip
    """An unsigned one. ``golden``: index to values; ``records``, ``meta``: more of the payload, and
    in place of Meta."""
    body = "\n  ".join(resource(n, v) for n, v in golden.items())
    meta = meta or (
        f'<ns0:Meta xmlns:ns1="{TCG}" colloquialVersion="{version}" product="{product}"'
        ' ns1:FirmwareManufacturerId="5703"/>'
    )
    return (
        f'<SoftwareIdentity xmlns="{SWID}" xmlns:ns0="{SWID}"'
        f' xmlns:ns2="http://www.w3.org/2001/04/xmlenc#sha384" name="{product}" {attributes}'
        f' tagId="{"ab" * 48}" version="1.0">\n'
        f' <ns0:Entity name="NVIDIA Corporation" role="tagCreator"/>\n {meta}\n'
        f" <ns0:Payload>{body}{records}</ns0:Payload>\n</SoftwareIdentity>"
    )


def rim_chain(**signer: Any) -> list[made.Certificate]:
    options = {"authority": False, "signs": True, "days": 200} | signer
    return [
        certificate("rim-signer", "rim-ca", **options),
        certificate("rim-ca", "rim-root"),
        certificate("rim-root", "rim-root"),
    ]


def canonical(xml: str, exclusive: bool = False) -> bytes:
    from lxml import etree

    return etree.tostring(
        etree.fromstring(xml.encode()), method="c14n", exclusive=exclusive, with_comments=False
    )


def sign_xml(
    xml: str,
    *,
    signer: str = "rim-signer",
    certificates: Sequence[made.Certificate] | None = None,
    method: str = C14N11,
    info: Callable[[str], str] = lambda text: text,
    over: str = "",
    value: Callable[[bytes], bytes] = lambda raw: raw,
) -> bytes:
    """``xml`` with an enveloped signature as its last child. info: changes SignedInfo before it is
    signed; over: the document whose digest is stated, where it is another; value: changes the
    signature."""
    exclusive = method.endswith("xml-exc-c14n#")
    digest = hashlib.sha384(canonical(over or xml, exclusive)).digest()
    b64 = base64.b64encode
    text = info(
        f'<ds:SignedInfo><ds:CanonicalizationMethod Algorithm="{method}"/>'
        f'<ds:SignatureMethod Algorithm="{ECDSA}"/><ds:Reference URI=""><ds:Transforms>'
        f'<ds:Transform Algorithm="{ENVELOPED}"/><ds:Transform Algorithm="{method}"/>'
        f'</ds:Transforms><ds:DigestMethod Algorithm="{DIGEST}"/>'
        f"<ds:DigestValue>{b64(digest).decode()}</ds:DigestValue></ds:Reference></ds:SignedInfo>"
    )
    names = f' xmlns:ds="{DS}"'
    if not exclusive:  # what is in scope where SignedInfo stands
        names = f' xmlns="{SWID}"{names} xmlns:ns0="{SWID}"' + (
            ' xmlns:ns2="http://www.w3.org/2001/04/xmlenc#sha384"'
        )
    octets = canonical(text.replace("<ds:SignedInfo", f"<ds:SignedInfo{names}", 1), exclusive)
    signed = value(signature(signer, octets))
    found = rim_chain() if certificates is None else certificates
    held = "".join(
        f"<ds:X509Certificate>{b64(der(c)).decode()}\n</ds:X509Certificate>" for c in found
    )
    block = (
        f'<ds:Signature xmlns:ds="{DS}">{text}<ds:SignatureValue>{b64(signed).decode()}'
        f"</ds:SignatureValue><ds:KeyInfo><ds:X509Data>{held}</ds:X509Data></ds:KeyInfo>"
        "</ds:Signature>"
    )
    return xml.replace("</SoftwareIdentity>", block + "</SoftwareIdentity>").encode()


def golden(*indices: int) -> dict[int, list[bytes]]:
    return {n: [VALUES[n + 1]] for n in indices}


def driver_rim(**options: Any) -> bytes:
    return sign_xml(manifest(DRIVER, golden(7, 21, 22, 35)), **options)


def vbios_rim(**options: Any) -> bytes:
    return sign_xml(manifest(VBIOS, golden(0, 1, 2)), **options)


def policy(**changes: Any) -> NvidiaPolicy:
    """The default one under the test roots."""
    roots = {
        "roots": (hashlib.sha256(spki("device-root")).hexdigest(),),
        "rim_roots": (hashlib.sha256(spki("rim-root")).hexdigest(),),
    }
    return replace(DEFAULT, **(roots | changes))


def files(**changed: bytes | None) -> dict[str, bytes]:
    """Evidence that is accepted, with files replaced (``report_bin`` for ``report.bin``) or left
    out by None."""
    found: dict[str, bytes | None] = {
        "report.bin": report(),
        "cert_chain.pem": pem(*device_chain()),
        "driver_rim.xml": driver_rim(),
        "vbios_rim.xml": vbios_rim(),
    }
    found |= {".".join(name.rsplit("_", 1)): data for name, data in changed.items()}
    return {name: data for name, data in found.items() if data is not None}


def answer(
    subject: made.Certificate,
    issuer: made.Certificate,
    issuer_key: str,
    *,
    status: made_ocsp.OCSPCertStatus = made_ocsp.OCSPCertStatus.GOOD,
    reason: made.ReasonFlags | None = None,
    responder: made.Certificate | None = None,
    responder_key: str = "",
    by_key: bool = False,
    days: int = 7,
    begins: int = -1,
    algorithm: hashes.HashAlgorithm | None = None,
) -> bytes:
    """An OCSP response about ``subject`` by its issuer, or by ``responder``."""
    revoked = status is made_ocsp.OCSPCertStatus.REVOKED
    how = made_ocsp.OCSPResponderEncoding
    builder = made_ocsp.OCSPResponseBuilder().add_response(
        cert=subject,
        issuer=issuer,
        algorithm=algorithm or hashes.SHA256(),
        cert_status=status,
        this_update=(NOW + timedelta(days=begins)).replace(tzinfo=None),
        next_update=(NOW + timedelta(days=days)).replace(tzinfo=None),
        revocation_time=NOW.replace(tzinfo=None) if revoked else None,
        revocation_reason=reason,
    )
    builder = builder.responder_id(how.HASH if by_key else how.NAME, responder or issuer)
    if responder is not None:
        builder = builder.certificates([responder])
    return der(builder.sign(key(responder_key or issuer_key), hashes.SHA384()))


def responder(issuer: str, *, purpose: bool = True, **options: Any) -> made.Certificate:
    """A certificate for ``responder`` by ``issuer``."""
    usage = ExtendedKeyUsageOID.OCSP_SIGNING if purpose else ExtendedKeyUsageOID.SERVER_AUTH
    return certificate(
        "responder", issuer, authority=False, signs=True,
        extensions=[made.ExtendedKeyUsage([usage])], **options,
    )  # fmt: skip


def revocation_list(
    issuer: str, *serials: int, days: int = 7, begins: int = -1, signer: str = "", common: str = ""
) -> bytes:
    builder = (
        made.CertificateRevocationListBuilder()
        .issuer_name(made.Name([made.NameAttribute(NameOID.COMMON_NAME, common or issuer)]))
        .last_update((NOW + timedelta(days=begins)).replace(tzinfo=None))
        .next_update((NOW + timedelta(days=days)).replace(tzinfo=None))
    )
    for serial in serials:
        one = made.RevokedCertificateBuilder().serial_number(serial)
        builder = builder.add_revoked_certificate(
            one.revocation_date(NOW.replace(tzinfo=None)).build()
        )
    return der(builder.sign(key(signer or issuer), hashes.SHA384()))


def parsed(certificate: made.Certificate) -> x509.Certificate:
    return x509.parse(der(certificate), "a test")
