"""The attestation report of an NVIDIA GPU or NVSwitch: an SPDM request and its response.

Sources: DMTF DSP0274 (SPDM) 1.1, messages GET_MEASUREMENTS and MEASUREMENTS, measurement block and
its form by DMTF; NVIDIA, "Opaque Data Format" (docs.nvidia.com/attestation/specs): entries of type,
size and value, and from version 2 a header ``NVDAOD`` and a value type in each entry. All integers
are little endian; field names are the vendor's.

``report.bin`` is the request (37 bytes), then the response. Everything but the last 96 bytes, R and
S of ECDSA P-384 in big endian, is signed; nothing is left unsigned.
"""

from __future__ import annotations

import re
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

from casemate.attest.verdict import Refused, refusal

REQUEST: Final = struct.Struct("<BBBB32sB")
_HEAD: Final = struct.Struct("<BBBBB3s")
_BLOCK: Final = struct.Struct("<BBHBH")
_ENTRY: Final = struct.Struct("<HH")
_VERSIONED_ENTRY: Final = struct.Struct("<HHH")
_OPAQUE_HEADER: Final = struct.Struct("<6sHBBBB")
NONCE_BYTES: Final = 32
COMPONENT_BYTES: Final = 48
SIGNATURE_BYTES: Final = 2 * COMPONENT_BYTES
MAX_BYTES: Final = 256 << 10

VERSION: Final = 0x11
GET_MEASUREMENTS: Final = 0xE0
MEASUREMENTS: Final = 0x60
_SIGNED: Final = 1
_ALL: Final = 0xFF
_DMTF: Final = 1
_OPAQUE_MAGIC: Final = b"NVDAOD"
MAX_OPAQUE_VERSION: Final = 2
P384_ORDER: Final = int(
    "ffffffffffffffffffffffffffffffffffffffffffffffffc7634d81f4372ddf581a0db248b0a77aecec196accc52973",
    16,
)

# Types of opaque data; 22 to 27 have other names on a switch.
OPAQUE: Final = {
    1: "CERT_ISSUER_NAME", 2: "CERT_AUTHORITY_KEY_IDENTIFIER", 3: "DRIVER_VERSION", 4: "GPU_INFO",
    5: "SKU", 6: "VBIOS_VERSION", 7: "MANUFACTURER_ID", 8: "TAMPER_DETECTION", 9: "SMC",
    10: "VPR", 11: "NVDEC0_STATUS", 12: "MSRSCNT", 13: "CPRINFO", 14: "BOARD_ID", 15: "CHIP_SKU",
    16: "CHIP_SKU_MOD", 17: "PROJECT", 18: "PROJECT_SKU", 19: "PROJECT_SKU_MOD", 20: "FWID",
    21: "PROTECTED_PCIE_STATUS", 22: "SWITCH_PDI", 23: "FLOORSWEPT_PORTS", 24: "POSITION_ID",
    25: "LOCK_SWITCH_STATUS", 26: "SWITCH_GPU_PDIS", 27: "SWITCH_PORTS", 32: "GPU_LINK_CONN",
    33: "SYS_ENABLE_STATUS", 34: "OPAQUE_DATA_VERSION", 35: "CHIP_INFO", 36: "FEATURE_FLAG",
    255: "INVALID",
}  # fmt: skip
TEXTS: Final = (
    "DRIVER_VERSION", "CHIP_SKU", "CHIP_SKU_MOD", "PROJECT", "PROJECT_SKU", "PROJECT_SKU_MOD",
)  # fmt: skip
# A byte that says off or on.
_SWITCHED: Final = {b"\x55": False, b"\xaa": True}
MODES: Final = {0: "spt", 1: "mpt", 2: "ppcie"}
VBIOS: Final = re.compile(r"[0-9A-F]{2}(\.[0-9A-F]{2}){4}")


@dataclass(frozen=True)
class Measurement:
    """DMTFSpecMeasurementValueType and -Value of one block."""

    kind: int
    value: bytes


@dataclass(frozen=True, kw_only=True)
class Report:
    """A request with its response. ``raw`` is all of it.

    measurements: by the block's index, from 1. opaque: by name, ``TYPE_n`` where the type is
    unknown. driver_version, vbios_version: "" where the report states none. nvdec0, protected_pcie:
    whether they are on; None where the report does not say. mode: how GPUs are passed through, spt,
    mpt or ppcie; "" where it does not say. opaque_version: 0 where none is stated.
    """

    raw: bytes
    request_nonce: bytes
    slot: int
    response_nonce: bytes
    record: bytes
    measurements: Mapping[int, Measurement]
    opaque: Mapping[str, bytes]
    opaque_version: int
    driver_version: str
    vbios_version: str
    nvdec0: bool | None
    protected_pcie: bool | None
    mode: str
    r: int
    s: int

    @property
    def signed(self) -> bytes:
        return self.raw[:-SIGNATURE_BYTES]

    @property
    def texts(self) -> dict[str, str]:
        """The opaque fields that are texts."""
        return {name: _text(self.opaque[name], name) for name in TEXTS if name in self.opaque}


def _refuse(reason: str, message: str) -> Refused:
    return refusal(f"parse-{reason}", message, "report.bin")


def _unpack(layout: struct.Struct, data: bytes, at: int, what: str) -> tuple[Any, ...]:
    if len(data) - at < layout.size:
        raise _refuse("report-length", f"{what} is cut short.")
    return layout.unpack_from(data, at)


def _take(data: bytes, at: int, size: int, what: str) -> bytes:
    if len(data) - at < size:
        raise _refuse("report-length", f"{what} is cut short.")
    return data[at : at + size]


def _text(data: bytes, name: str) -> str:
    """Text of printable ASCII, filled with zeros."""
    try:
        found = data.rstrip(b"\0").decode("ascii")
    except UnicodeDecodeError:
        found = "\0"
    if not found.isprintable():
        raise _refuse("opaque", f"{name} is no text.")
    return found


def _blocks(record: bytes, count: int) -> dict[int, Measurement]:
    """``count`` measurement blocks, which fill ``record``."""
    found: dict[int, Measurement] = {}
    at = 0
    for _ in range(count):
        index, specification, size, kind, length = _unpack(_BLOCK, record, at, "A measurement")
        if specification != _DMTF or size != length + 3:
            raise _refuse("measurement", f"Measurement {index} is not in the form of DMTF.")
        if not index or index in found:
            raise _refuse("measurement", f"Measurement {index} is impossible or stands twice.")
        at += _BLOCK.size
        found[index] = Measurement(kind, _take(record, at, length, f"Measurement {index}"))
        at += length
    if at != len(record):
        raise _refuse("measurement", "The measurement record has bytes left over.")
    return found


def _opaque(data: bytes) -> tuple[dict[str, bytes], int]:
    """Opaque data by name, and its version."""
    found: dict[str, bytes] = {}
    at, version, layout = 0, 0, _ENTRY
    if data.startswith(_OPAQUE_MAGIC):
        header = _unpack(_OPAQUE_HEADER, data, 0, "The opaque data")
        if header[1] or header[5]:
            raise _refuse("opaque", "The opaque data is of an unknown profile.")
        at, version, layout = _OPAQUE_HEADER.size, header[2], _VERSIONED_ENTRY
    while at < len(data):
        kind, *_, size = _unpack(layout, data, at, "The opaque data")
        at += layout.size
        name = OPAQUE.get(kind, f"TYPE_{kind}")
        if name in found:
            raise _refuse("opaque", f"Opaque field {name} stands twice.")
        found[name] = _take(data, at, size, f"Opaque field {name}")
        at += size
    if layout is _ENTRY:
        version = int.from_bytes(found.get("OPAQUE_DATA_VERSION", b"")[:8], "little")
    if version > MAX_OPAQUE_VERSION:
        raise _refuse("opaque-version", f"Opaque data of version {version} is unknown.")
    return found, version


def _vbios(data: bytes) -> str:
    """GPUs give it in binary, 8 bytes; switches as text."""
    if not data:
        return ""
    if len(data) == 8:
        return ".".join(f"{data[i]:02X}" for i in (3, 2, 1, 0, 4))
    found = _text(data, "VBIOS_VERSION").upper()
    if not VBIOS.fullmatch(found):
        raise _refuse("opaque", "VBIOS_VERSION is no version.")
    return found


def _switched(opaque: Mapping[str, bytes], name: str) -> bool | None:
    if name not in opaque:
        return None
    if opaque[name] not in _SWITCHED:
        raise _refuse("opaque", f"{name} is neither on nor off.")
    return _SWITCHED[opaque[name]]


def _component(data: bytes, name: str) -> int:
    value = int.from_bytes(data, "big")
    if not 0 < value < P384_ORDER:
        raise _refuse("signature", f"{name} of the signature is outside the range of P-384.")
    return value


def parse(raw: bytes) -> Report:
    """The report in ``raw``. Raises ``evidence.parse-*``:

    1. the request: SPDM 1.1, GET_MEASUREMENTS, a signature over all measurements is asked for
       (``request``);
    2. the response: SPDM 1.1, MEASUREMENTS, of the slot that was asked (``response``);
    3. its measurement blocks, in DMTF's form, each index once, fill the record (``measurement``);
    4. its opaque entries, each type once, fill the opaque data (``opaque``), whose version is known
       (``opaque-version``);
    5. R and S are in [1, n) and end the report (``signature``, ``report-length``).
    """
    if len(raw) > MAX_BYTES:
        raise _refuse("report-length", f"The report has {len(raw)} bytes.")
    version, code, param1, param2, *_ = _unpack(REQUEST, raw, 0, "The request")
    nonce, slot = REQUEST.unpack_from(raw)[4:]
    if (version, code, param1, param2) != (VERSION, GET_MEASUREMENTS, _SIGNED, _ALL) or slot > 7:
        raise _refuse("request", "The request does not ask for all measurements, signed.")
    at = REQUEST.size
    head = _HEAD.unpack(_take(raw, at, _HEAD.size, "The response"))
    if head[:4] != (VERSION, MEASUREMENTS, 0, slot) or not head[4]:
        raise _refuse("response", "The response is no answer to the request.")
    at += _HEAD.size
    record = _take(raw, at, int.from_bytes(head[5], "little"), "The measurement record")
    measurements = _blocks(record, head[4])
    at += len(record)
    response_nonce = _take(raw, at, NONCE_BYTES, "The response's nonce")
    at += NONCE_BYTES
    size = int.from_bytes(_take(raw, at, 2, "The opaque data"), "little")
    opaque, opaque_version = _opaque(_take(raw, at + 2, size, "The opaque data"))
    signature = raw[at + 2 + size :]
    if len(signature) != SIGNATURE_BYTES:
        raise _refuse("report-length", f"The signature has {len(signature)} bytes.")
    for name in TEXTS:
        _text(opaque.get(name, b""), name)
    flag = opaque.get("FEATURE_FLAG", b"")
    return Report(
        raw=raw,
        request_nonce=nonce,
        slot=slot,
        response_nonce=response_nonce,
        record=record,
        measurements=measurements,
        opaque=opaque,
        opaque_version=opaque_version,
        driver_version=_text(opaque.get("DRIVER_VERSION", b""), "DRIVER_VERSION"),
        vbios_version=_vbios(opaque.get("VBIOS_VERSION", b"")),
        nvdec0=_switched(opaque, "NVDEC0_STATUS"),
        protected_pcie=_switched(opaque, "PROTECTED_PCIE_STATUS"),
        mode=MODES.get(int.from_bytes(flag, "little"), "unknown") if flag else "",
        r=_component(signature[:COMPONENT_BYTES], "R"),
        s=_component(signature[COMPONENT_BYTES:], "S"),
    )
