"""DCAP evidence made up with keys of our own, for what no captured quote shows: revoked and older
platforms, every way in which statuses meet, forged and mixed collateral. No hardware is behind it.
"""

from __future__ import annotations

import datetime as dt
import hashlib
import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from functools import cache
from typing import Any

from cryptography import x509 as made
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec, utils
from cryptography.x509.oid import NameOID

from casemate.attest import x509
from casemate.attest.dcap import abi, pck, policy

NOW = dt.datetime(2026, 6, 1, tzinfo=dt.UTC)
AT = NOW.timestamp()
START, END = NOW - dt.timedelta(days=10), NOW + dt.timedelta(days=20)
ISO = "%Y-%m-%dT%H:%M:%SZ"

ROOT, CA, PCK, SIGNER = (
    "Intel SGX Root CA", "Intel SGX PCK Platform CA", "Intel SGX PCK Certificate",
    "Intel SGX TCB Signing",
)  # fmt: skip
SERIALS = {ROOT: 11, CA: 12, PCK: 13, SIGNER: 14}
SVNS = bytes([5, 5, 2, 2, 4, 1, 0, 5] + [0] * 8)
FMSPC, PCEID, PPID, PCESVN = bytes.fromhex("00806f050000"), b"\0\0", bytes(range(16)), 13
QE_MRSIGNER = hashlib.sha256(b"qe").digest()
TEE_TCB_SVN = bytes([6, 1, 3] + [0] * 13)


@cache
def key(name: str) -> ec.EllipticCurvePrivateKey:
    return ec.generate_private_key(ec.SECP256R1())


def _name(common: str) -> made.Name:
    return made.Name([made.NameAttribute(NameOID.COMMON_NAME, common)])


def _tlv(tag: int, content: bytes) -> bytes:
    size = len(content)
    if size < 0x80:
        return bytes([tag, size]) + content
    return bytes([tag, 0x82, size >> 8, size & 0xFF]) + content


def _oid(arcs: str) -> bytes:
    encoded = made.UnrecognizedExtension(
        made.ObjectIdentifier(f"1.2.840.113741.1.13.1.{arcs}"), b""
    )
    first = bytes.fromhex("2a864886f84d010d01")
    return _tlv(0x06, first + bytes(map(int, encoded.oid.dotted_string.split(".")[7:])))


def _pair(arcs: str, tag: int, content: bytes) -> bytes:
    return _tlv(0x30, _oid(arcs) + _tlv(tag, content))


def _integer(value: int) -> bytes:
    return value.to_bytes(value.bit_length() // 8 + 1, "big")


def extension(
    svns: bytes = SVNS, pcesvn: int = PCESVN, *, cpusvn: bytes | None = None, extra: bytes = b"",
    ppid: bytes = PPID, flags: bytes = b"\xff\x00\xff", drop: str = "",
) -> bytes:  # fmt: skip
    """The SGX extension of a PCK; ``drop``: the arc that is left out."""
    tcb = b"".join(_pair(f"2.{n + 1}", 0x02, _integer(svn)) for n, svn in enumerate(svns))
    tcb += _pair("2.17", 0x02, _integer(pcesvn))
    tcb += _pair("2.18", 0x04, svns if cpusvn is None else cpusvn)
    config = b"".join(_pair(f"7.{n + 1}", 0x01, bytes([f])) for n, f in enumerate(flags))
    parts = {
        "1": _pair("1", 0x04, ppid),
        "2": _pair("2", 0x30, tcb),
        "3": _pair("3", 0x04, PCEID),
        "4": _pair("4", 0x04, FMSPC),
        "5": _pair("5", 0x0A, b"\x01"),
        "6": _pair("6", 0x04, b"i" * 16),
        "7": _pair("7", 0x30, config),
    }
    parts.pop(drop, None)
    return _tlv(0x30, b"".join(parts.values()) + extra)


@cache
def certificate(
    name: str, issuer: str, *, by: str = "", keyed: str = "", before: dt.datetime | None = None,
    after: dt.datetime | None = None, value: bytes | None = None,
) -> bytes:  # fmt: skip
    """PEM. ``by``: whose key signs (the issuer's else); ``keyed``: whose key it holds."""
    authority = name in (ROOT, CA)
    builder = (
        made.CertificateBuilder()
        .subject_name(_name(name))
        .issuer_name(_name(issuer))
        .public_key(key(keyed or name).public_key())
        .serial_number(SERIALS.get(name, 99))
        .not_valid_before(before or NOW - dt.timedelta(days=300))
        .not_valid_after(after or NOW + dt.timedelta(days=3000))
        .add_extension(made.BasicConstraints(authority, {ROOT: 1, CA: 0}.get(name)), True)
        .add_extension(
            made.KeyUsage(
                digital_signature=True, content_commitment=False, key_encipherment=False,
                data_encipherment=False, key_agreement=False, key_cert_sign=authority,
                crl_sign=authority, encipher_only=False, decipher_only=False,
            ),
            True,
        )
    )  # fmt: skip
    if value is not None:
        oid = made.ObjectIdentifier(pck.OID)
        builder = builder.add_extension(made.UnrecognizedExtension(oid, value), False)
    signed = builder.sign(key(by or issuer), hashes.SHA256())
    return signed.public_bytes(serialization.Encoding.PEM)


def root() -> bytes:
    return certificate(ROOT, ROOT)


def authority() -> bytes:
    return certificate(CA, ROOT)


def signer() -> bytes:
    return certificate(SIGNER, ROOT)


def revoked(
    issuer: str, serials: Iterable[int] = (), *, by: str = "", start: dt.datetime = START,
    end: dt.datetime = END,
) -> bytes:  # fmt: skip
    """A revocation list in DER."""
    builder = (
        made.CertificateRevocationListBuilder()
        .issuer_name(_name(issuer))
        .last_update(start)
        .next_update(end)
        .add_extension(made.CRLNumber(1), critical=False)
        .add_extension(
            made.AuthorityKeyIdentifier.from_issuer_public_key(key(by or issuer).public_key()),
            critical=False,
        )
    )
    for serial in serials:
        one = made.RevokedCertificateBuilder().serial_number(serial).revocation_date(START).build()
        builder = builder.add_revoked_certificate(one)
    return builder.sign(key(by or issuer), hashes.SHA256()).public_bytes(serialization.Encoding.DER)


def raw(by: str, data: bytes) -> bytes:
    """r and s, 32 bytes each."""
    r, s = utils.decode_dss_signature(key(by).sign(data, ec.ECDSA(hashes.SHA256())))
    return r.to_bytes(32, "big") + s.to_bytes(32, "big")


def level(
    status: str = "UpToDate", sgx: bytes = SVNS, tdx: bytes | None = bytes([5, 0, 3] + [0] * 13),
    pcesvn: int = PCESVN, advisories: tuple[str, ...] = (),
) -> dict[str, Any]:  # fmt: skip
    tcb: dict[str, Any] = {"sgxtcbcomponents": [{"svn": svn} for svn in sgx], "pcesvn": pcesvn}
    if tdx is not None:
        tcb["tdxtcbcomponents"] = [{"svn": svn} for svn in tdx]
    out = {"tcb": tcb, "tcbDate": "2024-11-13T00:00:00Z", "tcbStatus": status}
    return out | ({"advisoryIDs": list(advisories)} if advisories else {})


def svn_level(isvsvn: int, status: str = "UpToDate", *advisories: str) -> dict[str, Any]:
    out = {"tcb": {"isvsvn": isvsvn}, "tcbDate": "2024-11-13T00:00:00Z", "tcbStatus": status}
    return out | ({"advisoryIDs": list(advisories)} if advisories else {})


def module(version: int, *levels: dict[str, Any]) -> dict[str, Any]:
    who = {"mrsigner": "00" * 48, "attributes": "00" * 8, "attributesMask": "FF" * 8}
    return {"id": f"TDX_{version:02X}", **who, "tcbLevels": list(levels)}


def tcb_info(tee: str = "TDX", **changes: Any) -> dict[str, Any]:
    tdx = None if tee == "SGX" else bytes([5, 0, 3] + [0] * 13)
    old = None if tee == "SGX" else bytes([5, 0, 2] + [0] * 13)
    out: dict[str, Any] = {
        "id": tee,
        "version": 3,
        "issueDate": START.strftime(ISO),
        "nextUpdate": END.strftime(ISO),
        "fmspc": FMSPC.hex(),
        "pceId": PCEID.hex(),
        "tcbType": 0,
        "tcbEvaluationDataNumber": 18,
        "tcbLevels": [
            level(tdx=tdx),
            level("OutOfDate", bytes(16), old, 5, ("INTEL-SA-00001", "INTEL-SA-00002")),
        ],
    }
    if tee == "TDX":
        modules = module(1, svn_level(6), svn_level(4, "OutOfDate", "INTEL-SA-00003"))
        base = {k: v for k, v in module(0).items() if k not in ("id", "tcbLevels")}
        out |= {"tdxModule": base, "tdxModuleIdentities": [modules]}
    return out | changes


def identity(tee: str = "TDX", **changes: Any) -> dict[str, Any]:
    return {
        "id": "QE" if tee == "SGX" else "TD_QE",
        "version": 2,
        "issueDate": START.strftime(ISO),
        "nextUpdate": END.strftime(ISO),
        "tcbEvaluationDataNumber": 18,
        "miscselect": "00000000",
        "miscselectMask": "FFFFFFFF",
        "attributes": "11" + "00" * 15,
        "attributesMask": "FB" + "FF" * 7 + "00" * 8,
        "mrsigner": QE_MRSIGNER.hex(),
        "isvprodid": 2,
        "tcbLevels": [svn_level(4), svn_level(2, "OutOfDate", "INTEL-SA-00004")],
    } | changes


def _packed(layout: tuple[tuple[str, str], ...], values: Mapping[str, Any]) -> bytes:
    unknown = set(values) - {name for name, _ in layout}
    if unknown:
        raise ValueError(f"{sorted(unknown)[0]} is no such field")
    empty = {name: b"" if code.endswith("s") else 0 for name, code in layout}
    return abi._LAYOUTS[layout].pack(*(empty | dict(values)).values())


def enclave(**values: Any) -> bytes:
    return _packed(
        abi._REPORT, {"attributes": b"\x05" + bytes(15), "report_data": b"r" * 64} | values
    )


def td(fifteen: bool = False, **values: Any) -> bytes:
    base = {
        "tee_tcb_svn": TEE_TCB_SVN,
        "tdattributes": bytes.fromhex("0000001000000000"),
        "mrtd": b"m" * 48,
        "report_data": b"r" * 64,
    }
    if fifteen:
        base["tee_tcb_svn2"] = TEE_TCB_SVN
    return _packed(abi._TD15 if fifteen else abi._TD10, base | values)


def quoting_enclave(attestation: bytes, auth: bytes, **values: Any) -> bytes:
    digest = hashlib.sha256(attestation + auth).digest()
    base = {
        "attributes": b"\x11" + bytes(15),
        "mrsigner": QE_MRSIGNER,
        "isvprodid": 2,
        "isvsvn": 5,
        "report_data": digest,
    }
    return _packed(abi._REPORT, base | values)


def _sized(data: bytes, size: int = 4) -> bytes:
    return len(data).to_bytes(size, "little") + data


def _same(data: bytes) -> bytes:
    return data


@dataclass(frozen=True, kw_only=True)
class Case:
    """What a quote and its collateral are made of. ``parts``: members of ``collateral.json`` that
    are other than the good ones, removed by ``None``. ``header``: changes its 48 bytes before they
    are signed."""

    version: int = 4
    body: bytes = b""
    body_type: int = 2
    qe: Mapping[str, Any] = field(default_factory=dict)
    auth: bytes = bytes(range(32))
    platform: bytes = b""
    chain: bytes | None = None
    certification: tuple[int, bytes] | None = None
    padding: bytes = b""
    info: Mapping[str, Any] = field(default_factory=dict)
    identity: Mapping[str, Any] = field(default_factory=dict)
    parts: Mapping[str, str | None] = field(default_factory=dict)
    header: Callable[[bytes], bytes] = _same
    quoted_by: str = "attestation"
    qe_by: str = PCK

    @property
    def tee(self) -> str:
        return "SGX" if self.version == 3 else "TDX"

    @property
    def pck_chain(self) -> bytes:
        if self.chain is not None:
            return self.chain
        leaf = certificate(PCK, CA, value=self.platform or extension())
        return leaf + authority() + root()

    def quote(self) -> bytes:
        tee = 0 if self.version == 3 else 0x81
        header = abi._HEADER.pack(self.version, 2, tee, b"", abi.INTEL_QE, b"u" * 20)
        signed = self.header(header)
        body = self.body or (enclave() if self.version == 3 else td())
        if self.version == 5:
            signed += abi._BODY.pack(self.body_type, len(body))
        signed += body
        numbers = key("attestation").public_key().public_numbers()
        attestation = numbers.x.to_bytes(32, "big") + numbers.y.to_bytes(32, "big")
        report = quoting_enclave(attestation, self.auth, **self.qe)
        kind, data = self.certification or (5, self.pck_chain + b"\0")
        inner = report + raw(self.qe_by, report) + _sized(self.auth, 2)
        inner += kind.to_bytes(2, "little") + _sized(data)
        if self.version > 3:
            inner = (6).to_bytes(2, "little") + _sized(inner)
        return signed + _sized(raw(self.quoted_by, signed) + attestation + inner) + self.padding

    def collateral(self) -> dict[str, str]:
        documents = {
            "tcb_info": tcb_info(self.tee, **self.info),
            "qe_identity": identity(self.tee, **self.identity),
        }
        out: dict[str, str | None] = {
            "pck_crl_issuer_chain": (authority() + root()).decode(),
            "root_ca_crl": revoked(ROOT).hex(),
            "pck_crl": revoked(CA).hex(),
        }
        for name, document in documents.items():
            text = json.dumps(document, separators=(",", ":"))
            out[name] = text
            out[f"{name}_signature"] = raw(SIGNER, text.encode()).hex()
            out[f"{name}_issuer_chain"] = (signer() + root()).decode()
        return {
            name: value for name, value in (out | dict(self.parts)).items() if value is not None
        }

    def files(self) -> dict[str, bytes]:
        return {
            "quote.bin": self.quote(),
            "collateral.json": json.dumps(self.collateral()).encode(),
        }


@cache
def pin() -> tuple[str, ...]:
    return (x509.parse(root(), "root").fingerprint,)


def sgx(**changes: Any) -> policy.SgxPolicy:
    """The default policy with our root."""
    return replace(policy.SGX, **({"roots": pin()} | changes))


def tdx(**changes: Any) -> policy.TdxPolicy:
    return replace(policy.TDX, **({"roots": pin()} | changes))
