"""DCAP quotes, byte for byte.

Source: Intel, "SGX ECDSA QuoteLibReference DCAP API" appendix A (quote version 3) and "TDX DCAP
Quoting Library API" appendix A (versions 4 and 5); Intel SDM volume 3D section 39.15 (REPORT) and
"TDX Module Base Architecture" (TDREPORT, TDINFO, ATTRIBUTES). All integers are little endian. Field
names are the vendor's, in lower case.

    quote       header (48) · [version 5: body type (2), body size (4)] · body · length (4) · data
    body        SGX enclave report (384) · TD report 1.0 (584) · TD report 1.5 (648)
    data, 3     signature (64) · attestation key (64) · QE report (384) · its signature (64)
                · auth data (2 + n) · certification data (2 + 4 + n)
    data, 4, 5  signature (64) · attestation key (64) · certification data of type 6, which holds
                QE report · signature · auth data · certification data

Header and body are signed by the attestation key, the key and the auth data are hashed into the QE
report, which the PCK signs. What follows the data is covered by nothing: machines give quotes in
buffers that are longer than they, filled with whatever stood there. It is told, and not read.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from typing import Final, TypeAlias

from casemate.attest.verdict import Refused, refusal

MAX_BYTES: Final = 128 << 10
HEADER_BYTES: Final = 48
SGX: Final = 0x00
TDX: Final = 0x81
ECDSA_P256: Final = 2
INTEL_QE: Final = bytes.fromhex("939a7233f79c4ca9940a0db3957f0607")
P256_ORDER: Final = 0xFFFFFFFF00000000FFFFFFFFFFFFFFFFBCE6FAADA7179E84F3B9CAC2FC632551

# Certification data (table 9): 1 to 3 name a PCK by its PPID, in plain or encrypted.
PPIDS: Final = {1: 36, 2: 276, 3: 404}
PCK_CHAIN: Final = 5
QE_REPORT: Final = 6
# Intel's QEs write 32 bytes.
AUTH_BYTES: Final = 32

_Fields: TypeAlias = tuple[tuple[str, str], ...]
_HEADER: Final = struct.Struct("<HHI4s16s20s")
_BODY: Final = struct.Struct("<HI")
_REPORT: Final[_Fields] = (
    ("cpusvn", "16s"), ("miscselect", "I"), ("reserved_14", "12s"), ("isvextprodid", "16s"),
    ("attributes", "16s"), ("mrenclave", "32s"), ("reserved_60", "32s"), ("mrsigner", "32s"),
    ("reserved_a0", "32s"), ("configid", "64s"), ("isvprodid", "H"), ("isvsvn", "H"),
    ("configsvn", "H"), ("reserved_106", "42s"), ("isvfamilyid", "16s"), ("report_data", "64s"),
)  # fmt: skip
_TD10: Final[_Fields] = (
    ("tee_tcb_svn", "16s"), ("mrseam", "48s"), ("mrsignerseam", "48s"), ("seamattributes", "8s"),
    ("tdattributes", "8s"), ("xfam", "8s"), ("mrtd", "48s"), ("mrconfigid", "48s"),
    ("mrowner", "48s"), ("mrownerconfig", "48s"), ("rtmr0", "48s"), ("rtmr1", "48s"),
    ("rtmr2", "48s"), ("rtmr3", "48s"), ("report_data", "64s"),
)  # fmt: skip
_TD15: Final[_Fields] = (*_TD10, ("tee_tcb_svn2", "16s"), ("mrservicetd", "48s"))

# ATTRIBUTES of an enclave (SDM table 38-2) and of a TD; other bits of a TD's are reserved.
SGX_ATTRIBUTES: Final = {
    "init": 0, "debug": 1, "mode64bit": 2, "provision_key": 4, "einittoken_key": 5, "cet": 6,
    "kss": 7, "aexnotify": 10,
}  # fmt: skip
TD_ATTRIBUTES: Final = {
    "debug": 0, "sept_ve_disable": 28, "migratable": 29, "pks": 30, "kl": 31, "perfmon": 63,
}  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Header:
    """``reserved``: in version 3 the QE's and the PCE's security versions, which quoting enclaves
    may write into later versions too."""

    version: int
    att_key_type: int
    tee_type: int
    reserved: bytes
    qe_vendor_id: bytes
    user_data: bytes


@dataclass(frozen=True, kw_only=True)
class EnclaveReport:
    """The body of an SGX quote, and what a quoting enclave says about itself."""

    raw: bytes
    cpusvn: bytes
    miscselect: int
    isvextprodid: bytes
    attributes: bytes
    mrenclave: bytes
    mrsigner: bytes
    configid: bytes
    isvprodid: int
    isvsvn: int
    configsvn: int
    isvfamilyid: bytes
    report_data: bytes

    def attribute(self, name: str) -> bool:
        """A bit of :data:`SGX_ATTRIBUTES`."""
        return _bit(self.attributes, SGX_ATTRIBUTES[name])


@dataclass(frozen=True, kw_only=True)
class TdReport:
    """The body of a TDX quote; the last two are ``None`` in a TD report 1.0."""

    tee_tcb_svn: bytes
    mrseam: bytes
    mrsignerseam: bytes
    seamattributes: bytes
    tdattributes: bytes
    xfam: bytes
    mrtd: bytes
    mrconfigid: bytes
    mrowner: bytes
    mrownerconfig: bytes
    rtmr0: bytes
    rtmr1: bytes
    rtmr2: bytes
    rtmr3: bytes
    report_data: bytes
    tee_tcb_svn2: bytes | None = None
    mrservicetd: bytes | None = None

    def attribute(self, name: str) -> bool:
        """A bit of :data:`TD_ATTRIBUTES`; ``debug``: any bit of the group TUD, the first byte."""
        if name == "debug":
            return self.tdattributes[0] != 0
        return _bit(self.tdattributes, TD_ATTRIBUTES[name])

    @property
    def reserved_attributes(self) -> int:
        """The bits of TDATTRIBUTES whose meaning is not known."""
        known = sum(1 << at for at in TD_ATTRIBUTES.values())
        return int.from_bytes(self.tdattributes, "little") & ~known


Body: TypeAlias = EnclaveReport | TdReport
Signature: TypeAlias = tuple[int, int]


@dataclass(frozen=True, kw_only=True)
class Quote:
    """``signed``: header and body. ``padding``: what follows the signed data. ``attestation_key``:
    x and y. ``certification_type``, ``certification_data``: the innermost."""

    header: Header
    body: Body
    signed: bytes
    signature: Signature
    attestation_key: bytes
    qe_report: EnclaveReport
    qe_report_signature: Signature
    qe_auth_data: bytes
    certification_type: int
    certification_data: bytes
    padding: bytes


def _bit(data: bytes, at: int) -> bool:
    return bool(data[at // 8] >> at % 8 & 1)


def _refuse(reason: str, message: str) -> Refused:
    return refusal(f"parse-{reason}", message, "quote.bin")


class _Reader:
    def __init__(self, data: bytes) -> None:
        self.data, self.at = data, 0

    def take(self, size: int) -> bytes:
        if len(self.data) - self.at < size:
            raise _refuse("quote-length", "The quote is cut short.")
        self.at += size
        return self.data[self.at - size : self.at]

    def number(self, size: int) -> int:
        return int.from_bytes(self.take(size), "little")

    def end(self, what: str) -> None:
        if self.at != len(self.data):
            raise _refuse("quote-length", f"Bytes are left over after {what}.")


def _layout(fields: _Fields) -> struct.Struct:
    return struct.Struct("<" + "".join(code for _, code in fields))


_LAYOUTS: Final[dict[_Fields, struct.Struct]] = {
    fields: _layout(fields) for fields in (_REPORT, _TD10, _TD15)
}


def _unpack(raw: bytes, fields: _Fields) -> dict[str, int | bytes]:
    names = (name for name, _ in fields)
    return dict(zip(names, _LAYOUTS[fields].unpack(raw), strict=True))


def _report(raw: bytes, what: str) -> EnclaveReport:
    found = _unpack(raw, _REPORT)
    for name in [name for name in found if name.startswith("reserved")]:
        if any(found.pop(name)):  # type: ignore[arg-type]
            raise _refuse("reserved", f"Reserved bytes of {what} ({name}) are not zero.")
    return EnclaveReport(raw=raw, **found)  # type: ignore[arg-type]


# (version, TEE type, body type) to the body's fields; version 5 alone tells a body type.
_BODIES: Final = {
    (3, SGX, 0): _REPORT,
    (4, TDX, 0): _TD10,
    (5, TDX, 2): _TD10,
    (5, TDX, 3): _TD15,
}


def _signature(raw: bytes, what: str) -> Signature:
    r, s = int.from_bytes(raw[:32], "big"), int.from_bytes(raw[32:], "big")
    if not (0 < r < P256_ORDER and 0 < s < P256_ORDER):
        raise _refuse("signature", f"{what} is outside the range of P-256.")
    return r, s


def _header(reader: _Reader) -> Header:
    names = ("version", "att_key_type", "tee_type", "reserved", "qe_vendor_id", "user_data")
    unpacked = _HEADER.unpack(reader.take(HEADER_BYTES))
    header = Header(**dict(zip(names, unpacked, strict=True)))
    if (header.version, header.tee_type) not in {key[:2] for key in _BODIES}:
        raise _refuse(
            "quote-version",
            f"A quote of version {header.version} for TEE {header.tee_type:#x} is not known.",
        )
    if header.att_key_type != ECDSA_P256:
        raise _refuse("key-type", f"Attestation key type {header.att_key_type} is not ECDSA P-256.")
    if header.qe_vendor_id != INTEL_QE:
        raise _refuse("qe-vendor", "The quote was not made by Intel's quoting enclave.")
    return header


def _certification(reader: _Reader, what: str) -> tuple[int, bytes]:
    kind = reader.number(2)
    data = reader.take(reader.number(4))
    reader.end(what)
    return kind, data


def parse(raw: bytes) -> Quote:
    """The quote in ``raw``. Raises ``evidence.parse-*``:

    1. its size (``too-large``), version and TEE (``quote-version``: 3 is SGX, 4 and 5 are TDX),
       kind of key (``key-type``), Intel's QE (``qe-vendor``), reserved bytes (``reserved``);
    2. the body's type and size (``body-type``);
    3. every length is that of what it holds (``quote-length``); the outer certification data of
       versions 4 and 5 is of type 6, the inner of types 1 to 3 or 5 (``certification-type``), the
       auth data has 32 bytes (``auth-data``);
    4. r and s of both signatures are in [1, n) (``signature``).
    """
    if len(raw) > MAX_BYTES:
        raise _refuse("too-large", f"The quote has {len(raw)} bytes.")
    reader = _Reader(raw)
    header = _header(reader)
    kind, size = _BODY.unpack(reader.take(6)) if header.version == 5 else (0, None)
    fields = _BODIES.get((header.version, header.tee_type, kind))
    if fields is None or size not in (None, _LAYOUTS[fields].size):
        raise _refuse("body-type", f"A body of type {kind} with {size} bytes is not known.")
    content = reader.take(_LAYOUTS[fields].size)
    body: Body
    if fields is _REPORT:
        body = _report(content, "the report")
    else:
        body = TdReport(**_unpack(content, fields))  # type: ignore[arg-type]
    signed = raw[: reader.at]
    data = _Reader(reader.take(reader.number(4)))
    padding = raw[reader.at :]
    signature, key = data.take(64), data.take(64)
    if header.version > 3:
        kind, inner = _certification(data, "the certification data")
        if kind != QE_REPORT:
            raise _refuse("certification-type", f"Certification data of type {kind}, not 6.")
        data = _Reader(inner)
    qe_report, qe_signature = data.take(384), data.take(64)
    auth = data.take(data.number(2))
    if len(auth) != AUTH_BYTES:
        raise _refuse("auth-data", f"The QE's auth data has {len(auth)} bytes, not {AUTH_BYTES}.")
    kind, certification = _certification(data, "the certification data")
    if kind not in (*PPIDS, PCK_CHAIN) or PPIDS.get(kind, len(certification)) != len(certification):
        raise _refuse("certification-type", f"Certification data of type {kind} is not known.")
    return Quote(
        header=header,
        body=body,
        signed=signed,
        signature=_signature(signature, "The quote's signature"),
        attestation_key=key,
        qe_report=_report(qe_report, "the QE's report"),
        qe_report_signature=_signature(qe_signature, "The signature on the QE's report"),
        qe_auth_data=auth,
        certification_type=kind,
        certification_data=certification,
        padding=padding,
    )
