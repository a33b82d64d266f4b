"""The SEV-SNP attestation report, byte for byte.

Source: AMD, "SEV Secure Nested Paging Firmware ABI Specification", publication 56860, revision
1.58: section 7.3, table 23 (ATTESTATION_REPORT; table 21 in revision 1.54, 22 in 1.55), table 3
(TCB_VERSION), section 4.3 (POLICY), section 10.2 (ECDSA P-384 with SHA-384: R and S in 72 bytes
each, little endian, filled with zeros). Versions 2, 3 (adds CPUID) and 5 (adds mitigation vectors)
are known. All integers are little endian. Field names are the vendor's, in lower case.

Bytes 0x000 to 0x29f are signed; R and S stand at 0x2a0; bytes 0x330 to 0x49f are covered by
nothing: they are kept in ``Report.unsigned``, and ``appraise`` refuses others than zeros. Reserved
bytes among the signed ones must be zero here already.
"""

from __future__ import annotations

import struct
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

from casemate.attest.verdict import Refused, refusal

REPORT_BYTES: Final = 1184
SIGNED_BYTES: Final = 0x2A0
SIGNATURE_AT: Final = 0x2A0
COMPONENT_BYTES: Final = 72
UNSIGNED_AT: Final = SIGNATURE_AT + 2 * COMPONENT_BYTES

VERSIONS: Final = (2, 3, 5)
ECDSA_P384_SHA384: Final = 1
P384_ORDER: Final = int(
    "ffffffffffffffffffffffffffffffffffffffffffffffffc7634d81f4372ddf581a0db248b0a77aecec196accc52973",
    16,
)
SIGNING_KEYS: Final = {0: "VCEK", 1: "VLEK"}

# The signed part in order; "reserved" has the bytes that must be zero.
_FIELDS: Final = (
    ("version", "I"), ("guest_svn", "I"), ("policy", "Q"), ("family_id", "16s"),
    ("image_id", "16s"), ("vmpl", "I"), ("signature_algo", "I"), ("current_tcb", "8s"),
    ("platform_info", "Q"), ("flags", "I"), ("reserved_4c", "4s"), ("report_data", "64s"),
    ("measurement", "48s"), ("host_data", "32s"), ("id_key_digest", "48s"),
    ("author_key_digest", "48s"), ("report_id", "32s"), ("report_id_ma", "32s"),
    ("reported_tcb", "8s"), ("cpuid_fam_id", "B"), ("cpuid_mod_id", "B"), ("cpuid_step", "B"),
    ("reserved_18b", "21s"), ("chip_id", "64s"), ("committed_tcb", "8s"), ("current_build", "B"),
    ("current_minor", "B"), ("current_major", "B"), ("reserved_1eb", "B"),
    ("committed_build", "B"), ("committed_minor", "B"), ("committed_major", "B"),
    ("reserved_1ef", "B"), ("launch_tcb", "8s"), ("launch_mit_vector", "Q"),
    ("current_mit_vector", "Q"), ("reserved_208", "152s"),
)  # fmt: skip
LAYOUT: Final = struct.Struct("<" + "".join(code for _, code in _FIELDS))
NAMES: Final = tuple(name for name, _ in _FIELDS)

# Fields that a version does not have yet are reserved in it.
_SINCE: Final = {
    "cpuid_fam_id": 3, "cpuid_mod_id": 3, "cpuid_step": 3,
    "launch_mit_vector": 5, "current_mit_vector": 5,
}  # fmt: skip

# Bit by bit: POLICY (section 4.3) and PLATFORM_INFO (table 24).
POLICY_BITS: Final = {
    "smt": 16, "migrate_ma": 18, "debug": 19, "single_socket": 20, "cxl_allow": 21,
    "mem_aes_256_xts": 22, "rapl_dis": 23, "ciphertext_hiding_dram": 24, "page_swap_disable": 25,
}  # fmt: skip
_POLICY_MUST_BE_ONE: Final = 17
PLATFORM_BITS: Final = {
    "smt_en": 0, "tsme_en": 1, "ecc_en": 2, "rapl_dis": 3, "ciphertext_hiding_dram_en": 4,
    "alias_check_complete": 5, "iommu_write_safe": 6, "tio_en": 7,
}  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class GuestPolicy:
    """POLICY of a guest (section 4.3, table 9). ``reserved``: bits 26 and up."""

    abi_minor: int
    abi_major: int
    smt: bool
    migrate_ma: bool
    debug: bool
    single_socket: bool
    cxl_allow: bool
    mem_aes_256_xts: bool
    rapl_dis: bool
    ciphertext_hiding_dram: bool
    page_swap_disable: bool
    reserved: int


@dataclass(frozen=True, kw_only=True)
class Report:
    """An attestation report. ``raw`` is all of it; TCB versions are left as their 8 bytes, since
    their meaning depends on the product line (see ``collateral``). ``current_version`` and
    ``committed_version``: the firmware's major, minor and build."""

    raw: bytes
    version: int
    guest_svn: int
    policy: GuestPolicy
    family_id: bytes
    image_id: bytes
    vmpl: int
    current_tcb: bytes
    platform_info: int
    author_key_en: bool
    mask_chip_key: bool
    signing_key: str
    report_data: bytes
    measurement: bytes
    host_data: bytes
    id_key_digest: bytes
    author_key_digest: bytes
    report_id: bytes
    report_id_ma: bytes
    reported_tcb: bytes
    cpuid_fam_id: int
    cpuid_mod_id: int
    cpuid_step: int
    chip_id: bytes
    committed_tcb: bytes
    current_version: tuple[int, int, int]
    committed_version: tuple[int, int, int]
    launch_tcb: bytes
    launch_mit_vector: int
    current_mit_vector: int
    r: int
    s: int

    @property
    def signed(self) -> bytes:
        return self.raw[:SIGNED_BYTES]

    @property
    def unsigned(self) -> bytes:
        """What neither the signature covers nor it is made of."""
        return self.raw[UNSIGNED_AT:]

    @property
    def platform(self) -> dict[str, bool]:
        """The known bits of PLATFORM_INFO."""
        return {name: bool(self.platform_info >> at & 1) for name, at in PLATFORM_BITS.items()}


def pack(values: Mapping[str, int | bytes]) -> bytes:
    """The signed bytes, 0x000 to 0x29f, of a report with these fields; all others are zero."""
    unknown = set(values) - set(NAMES)
    if unknown:
        raise ValueError(f"{sorted(unknown)[0]} is no field of the report")
    empty: dict[str, int | bytes] = {n: b"" if c.endswith("s") else 0 for n, c in _FIELDS}
    return LAYOUT.pack(*(empty | dict(values)).values())


def _refuse(reason: str, message: str) -> Refused:
    return refusal(f"parse-{reason}", message, "report.bin")


def _policy(bits: int) -> GuestPolicy:
    if not bits >> _POLICY_MUST_BE_ONE & 1:
        raise _refuse("policy", "Bit 17 of the guest policy, which is always one, is zero.")
    return GuestPolicy(
        abi_minor=bits & 0xFF,
        abi_major=bits >> 8 & 0xFF,
        reserved=bits >> 26,
        **{name: bool(bits >> at & 1) for name, at in POLICY_BITS.items()},
    )


def _component(raw: bytes, at: int, name: str) -> int:
    value = int.from_bytes(raw[at : at + COMPONENT_BYTES], "little")
    if not 0 < value < P384_ORDER:
        raise _refuse("signature", f"{name} of the signature is outside the range of P-384.")
    return value


def parse(raw: bytes) -> Report:
    """The report in ``raw``, 1,184 bytes. Raises ``evidence.parse-*``:

    1. its length (``report-length``) and version (``report-version``);
    2. all reserved bytes, and those of later versions, are zero (``reserved``);
    3. the signature's algorithm is ECDSA P-384 with SHA-384 (``signature-algorithm``), its key a
       VCEK or VLEK (``signing-key``), R and S are in [1, n) (``signature``);
    4. the guest policy is one (``policy``), VMPL is 0 to 3 (``vmpl``).
    """
    if len(raw) != REPORT_BYTES:
        raise _refuse("report-length", f"The report has {len(raw)} bytes, not {REPORT_BYTES}.")
    found = dict(zip(NAMES, LAYOUT.unpack_from(raw), strict=True))
    version = found["version"]
    if version not in VERSIONS:
        raise _refuse("report-version", f"Version {version} of the report is none of 2, 3 and 5.")
    for name, value in found.items():
        reserved = name.startswith("reserved") or _SINCE.get(name, 0) > version
        if reserved and (any(value) if isinstance(value, bytes) else value):
            raise _refuse("reserved", f"Reserved bytes ({name}) are not zero.")
    if found["signature_algo"] != ECDSA_P384_SHA384:
        raise _refuse(
            "signature-algorithm",
            f"Signature algorithm {found['signature_algo']} is not ECDSA P-384 with SHA-384.",
        )
    flags = found["flags"]
    signing_key = SIGNING_KEYS.get(flags >> 2 & 7)
    if signing_key is None:
        raise _refuse("signing-key", "The report is signed with neither a VCEK nor a VLEK.")
    if flags >> 5:
        raise _refuse("reserved", "Reserved bits (flags) are not zero.")
    if found["vmpl"] > 3:
        raise _refuse("vmpl", f"VMPL {found['vmpl']} is none of 0 to 3.")
    return Report(
        raw=raw,
        policy=_policy(found["policy"]),
        author_key_en=bool(flags & 1),
        mask_chip_key=bool(flags & 2),
        signing_key=signing_key,
        current_version=tuple(found[f"current_{x}"] for x in ("major", "minor", "build")),
        committed_version=tuple(found[f"committed_{x}"] for x in ("major", "minor", "build")),
        r=_component(raw, SIGNATURE_AT, "R"),
        s=_component(raw, SIGNATURE_AT + COMPONENT_BYTES, "S"),
        **{
            name: found[name]
            for name in Report.__dataclass_fields__
            if name in found and name != "policy"
        },
    )
