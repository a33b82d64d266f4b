"""The attestation report of an Azure confidential VM's paravisor, byte for byte. All integers are
little endian.

Source: Microsoft, "Confidential VM Guest Attestation Design Detail", section "Attestation Report
Format" (header, report payload, runtime data, runtime claims); RFC 7517, RFC 7518 section 6.3.1
(JWK of RSA); Intel, "TDX Module ABI" (TDREPORT_STRUCT: REPORTMACSTRUCT, TEE_TCB_INFO, TDINFO).

::

    0x000   32   header: "HCLA", version, size of report, type of request, status, zeros
    0x020 1184   report: SEV-SNP (1184 bytes) or TDREPORT (1024 bytes, then zeros)
    0x4c0   20   runtime data: size, version, type of report, type of hash, size of claims
    0x4d4        runtime claims (JSON), then zeros up to the size of the NV index (2600)

The hardware signs the hash of the claims, in its report data; header and the 20 bytes are signed by
nothing, and so have one admitted form.

Procedure of :func:`parse`:

 1. Header and runtime data have their known values (``parse-hcl``), sizes agree. What follows the
    claims is told.
 2. The claims are a strict JSON object; ``keys`` holds one RSA key ``HCLAkPub``. Its key_ops are
    not looked at: older paravisors write "encrypt" where newer ones write "sign".
 3. A TDREPORT has the type of a TD's, zeros where bytes are reserved, and SHA-384 of its two halves
    in its first part; the latter is for the machine itself, whose key made its MAC.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import re
import struct
from dataclasses import dataclass
from typing import Final, Literal

from cryptography.hazmat.primitives.asymmetric import rsa

from casemate.attest.jws import strict_object
from casemate.attest.verdict import Refused, refusal
from casemate.spec.canonical import Json

FILE: Final = "hcl_report.bin"
SIGNATURE: Final = b"HCLA"
MAX_BYTES: Final = 1 << 16
MAX_CLAIMS: Final = 1 << 14
VERSIONS: Final = (1, 2)
AK, EK = "HCLAkPub", "HCLEkPub"

_HEADER: Final = struct.Struct("<4sIIII12s")
_RUNTIME: Final = struct.Struct("<IIIII")
PAYLOAD: Final = 1184
_RUNTIME_AT: Final = _HEADER.size + PAYLOAD
CLAIMS_AT: Final = _RUNTIME_AT + _RUNTIME.size
_REQUEST: Final = 2
Hardware = Literal["snp", "tdx"]
REPORTS: Final[dict[int, tuple[Hardware, int]]] = {2: ("snp", 1184), 4: ("tdx", 1024)}
HASHES: Final = {1: "sha256", 2: "sha384", 3: "sha512"}


@dataclass(frozen=True, kw_only=True)
class HclReport:
    """report: the hardware's, 1,184 or 1,024 bytes. hash: by which the hardware's report data binds
    ``claims``. ak: the vTPM's attestation key. padding: what follows the claims, unsigned."""

    version: int
    hardware: Hardware
    report: bytes
    hash: str
    claims: bytes
    values: dict[str, Json]
    ak: rsa.RSAPublicKey
    padding: bytes

    @property
    def digest(self) -> bytes:
        """What the hardware's report data begins with; the rest of its 64 bytes is zero."""
        return hashlib.new(self.hash, self.claims).digest()

    @property
    def configuration(self) -> dict[str, Json]:
        found = self.values.get("vm-configuration")
        return found if isinstance(found, dict) else {}

    @property
    def user_data(self) -> bytes:
        """What the VM's owner wrote to be bound, 64 bytes; b"" where the claims have none."""
        found = self.values.get("user-data")
        return bytes.fromhex(found) if isinstance(found, str) else b""


def _refuse(what: str) -> Refused:
    return refusal("parse-hcl", f"The paravisor's report is malformed: {what}.", FILE)


def _base64url(text: Json) -> int:
    """An unsigned integer (RFC 7518 section 2), in its one form."""
    if not isinstance(text, str) or not re.fullmatch(r"[A-Za-z0-9_-]{1,1400}", text):
        raise _refuse("a number of a key is not base64url")
    try:
        data = base64.urlsafe_b64decode(text + "=" * (-len(text) % 4))
    except binascii.Error:
        raise _refuse("a number of a key is not base64url") from None
    if base64.urlsafe_b64encode(data).rstrip(b"=").decode() != text or data[0] == 0:
        raise _refuse("a number of a key is not in its shortest form")
    return int.from_bytes(data, "big")


def _key(keys: Json) -> rsa.RSAPublicKey:
    if not isinstance(keys, list) or len(keys) > 8:
        raise _refuse("the claims have no list of keys")
    found = [key for key in keys if isinstance(key, dict) and key.get("kid") == AK]
    if len(found) != 1:
        raise _refuse(f"the claims have {len(found)} keys {AK}")
    key = found[0]
    if key.get("kty") != "RSA":
        raise _refuse(f"{AK} is no RSA key")
    exponent, modulus = _base64url(key.get("e")), _base64url(key.get("n"))
    if not 2048 <= modulus.bit_length() <= 4096:
        raise _refuse(f"{AK} has {modulus.bit_length()} bits")
    try:
        return rsa.RSAPublicNumbers(exponent, modulus).public_key()
    except ValueError:
        raise _refuse(f"{AK} is no RSA key") from None


def parse(raw: bytes) -> HclReport:
    """Follow the procedure above but for the hardware's report. Raises ``evidence.parse-*``."""
    if not CLAIMS_AT < len(raw) <= MAX_BYTES:
        raise _refuse(f"it has {len(raw)} bytes")
    signature, version, size, request, status, reserved = _HEADER.unpack_from(raw)
    data, edition, kind, hash_kind, claims = _RUNTIME.unpack_from(raw, _RUNTIME_AT)
    if signature != SIGNATURE or version not in VERSIONS or request != _REQUEST:
        raise _refuse(f"its header is of version {version}, request {request}")
    if status or any(reserved):
        raise _refuse("its status or reserved bytes are not zero")
    if edition != 1 or kind not in REPORTS or hash_kind not in HASHES:
        raise _refuse(f"its runtime data is of version {edition}, report {kind}, hash {hash_kind}")
    hardware, length = REPORTS[kind]
    end = CLAIMS_AT + claims
    if not 0 < claims <= MAX_CLAIMS or data != _RUNTIME.size + claims or end > len(raw):
        raise _refuse(f"its claims have {claims} of {data} bytes")
    # The documentation gives the hardware report's own size; paravisors write that of all parts.
    if size not in (length, end):
        raise _refuse(f"it gives its own size as {size}")
    if any(raw[_HEADER.size + length : _RUNTIME_AT]):
        raise _refuse("bytes that nothing signs are not zero")
    values = strict_object(raw[CLAIMS_AT:end], FILE, MAX_CLAIMS)
    user = values.get("user-data", "")
    if not isinstance(user, str) or not re.fullmatch(r"(?:[0-9a-fA-F]{2}){0,64}", user):
        raise _refuse("user-data is no hex")
    return HclReport(
        version=version, hardware=hardware, report=raw[_HEADER.size : _HEADER.size + length],
        hash=HASHES[hash_kind], claims=raw[CLAIMS_AT:end], values=values,
        ak=_key(values.get("keys")), padding=raw[end:],
    )  # fmt: skip


# REPORTMACSTRUCT at 0, TEE_TCB_INFO (239 bytes) at 0x100, 17 bytes reserved, TDINFO at 0x200.
_TD_FIELDS: Final = (
    ("reporttype", "4s"), ("reserved_04", "12s"), ("cpusvn", "16s"), ("tee_tcb_info_hash", "48s"),
    ("tee_info_hash", "48s"), ("report_data", "64s"), ("reserved_c0", "32s"), ("mac", "32s"),
    ("valid", "8s"), ("tee_tcb_svn", "16s"), ("mrseam", "48s"), ("mrsignerseam", "48s"),
    ("seamattributes", "8s"), ("tee_tcb_svn2", "16s"), ("reserved_190", "95s"),
    ("reserved_1ef", "17s"), ("tdattributes", "8s"), ("xfam", "8s"), ("mrtd", "48s"),
    ("mrconfigid", "48s"), ("mrowner", "48s"), ("mrownerconfig", "48s"), ("rtmr0", "48s"),
    ("rtmr1", "48s"), ("rtmr2", "48s"), ("rtmr3", "48s"), ("mrservicetd", "48s"),
    ("reserved_3c0", "64s"),
)  # fmt: skip
_TD_REPORT: Final = struct.Struct("<" + "".join(code for _, code in _TD_FIELDS))
_TD_TYPE: Final = 0x81
# The fields that a quote repeats; the last two only one of a TD report 1.5.
QUOTED: Final = (
    "tee_tcb_svn", "mrseam", "mrsignerseam", "seamattributes", "tdattributes", "xfam", "mrtd",
    "mrconfigid", "mrowner", "mrownerconfig", "rtmr0", "rtmr1", "rtmr2", "rtmr3", "report_data",
)  # fmt: skip
QUOTED_15: Final = ("tee_tcb_svn2", "mrservicetd")


def td_report(raw: bytes) -> dict[str, bytes]:
    """The fields of a TDREPORT by name: step 3."""
    found = dict(zip((name for name, _ in _TD_FIELDS), _TD_REPORT.unpack(raw), strict=True))
    if found["reporttype"][0] != _TD_TYPE:
        raise _refuse("its TDREPORT is none")
    for name, value in found.items():
        if name.startswith("reserved") and any(value):
            raise _refuse(f"reserved bytes of its TDREPORT ({name}) are not zero")
    halves = {"tee_tcb_info_hash": raw[0x100:0x1EF], "tee_info_hash": raw[0x200:0x400]}
    for name, half in halves.items():
        if hashlib.sha384(half).digest() != found[name]:
            raise _refuse(f"{name} of its TDREPORT is not that of what it holds")
    return found
