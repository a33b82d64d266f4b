import pytest
from hypothesis import given
from hypothesis import strategies as st

from casemate.attest.snp import abi
from casemate.spec.errors import EvidenceError
from support.evidence import attestation

# Offsets and sizes as table 23 of AMD 56860 revision 1.58 prints them.
TABLE = {
    "version": (0x00, 4), "guest_svn": (0x04, 4), "policy": (0x08, 8), "family_id": (0x10, 16),
    "image_id": (0x20, 16), "vmpl": (0x30, 4), "signature_algo": (0x34, 4),
    "current_tcb": (0x38, 8), "platform_info": (0x40, 8), "flags": (0x48, 4),
    "report_data": (0x50, 64), "measurement": (0x90, 48), "host_data": (0xC0, 32),
    "id_key_digest": (0xE0, 48), "author_key_digest": (0x110, 48), "report_id": (0x140, 32),
    "report_id_ma": (0x160, 32), "reported_tcb": (0x180, 8), "cpuid_fam_id": (0x188, 1),
    "cpuid_mod_id": (0x189, 1), "cpuid_step": (0x18A, 1), "chip_id": (0x1A0, 64),
    "committed_tcb": (0x1E0, 8), "current_build": (0x1E8, 1), "current_minor": (0x1E9, 1),
    "current_major": (0x1EA, 1), "committed_build": (0x1EC, 1), "committed_minor": (0x1ED, 1),
    "committed_major": (0x1EE, 1), "launch_tcb": (0x1F0, 8), "launch_mit_vector": (0x1F8, 8),
    "current_mit_vector": (0x200, 8),
}  # fmt: skip
SIGNED = {at + i for at, size in TABLE.values() for i in range(size)}


def good(version=3) -> bytes:
    raw = bytearray(attestation().evidence.files["report.bin"])
    raw[0] = version
    if version < 3:
        raw[0x188:0x18B] = bytes(3)
    return bytes(raw)


def code(raw: bytes) -> str:
    with pytest.raises(EvidenceError) as e:
        abi.parse(raw)
    assert e.value.where == "report.bin"
    return e.value.code


def test_fields_stand_where_the_specification_says():
    assert abi.LAYOUT.size == abi.SIGNED_BYTES == 0x2A0
    for name, (at, size) in TABLE.items():
        marked = abi.pack({name: b"\xa5" * size if size not in (1, 4) and name not in (
            "policy", "platform_info", "launch_mit_vector", "current_mit_vector")
            else int.from_bytes(b"\xa5" * size, "little")})  # fmt: skip
        assert marked == bytes(at) + b"\xa5" * size + bytes(abi.SIGNED_BYTES - at - size)


def test_parsed_fields_are_the_bytes():
    raw = good(5)
    report = abi.parse(raw)
    for name, (at, size) in TABLE.items():
        value = getattr(report, name, None)
        if isinstance(value, bytes):
            assert value == raw[at : at + size]
        elif type(value) is int:
            assert value == int.from_bytes(raw[at : at + size], "little")
    assert report.current_version == (raw[0x1EA], raw[0x1E9], raw[0x1E8])
    assert report.committed_version == (raw[0x1EE], raw[0x1ED], raw[0x1EC])
    assert report.r == int.from_bytes(raw[0x2A0:0x2E8], "little")
    assert report.s == int.from_bytes(raw[0x2E8:0x330], "little")
    assert report.signed == raw[:0x2A0]


@pytest.mark.parametrize(
    ("name", "bit"),
    [
        ("smt", 16), ("migrate_ma", 18), ("debug", 19), ("single_socket", 20), ("cxl_allow", 21),
        ("mem_aes_256_xts", 22), ("rapl_dis", 23), ("ciphertext_hiding_dram", 24),
        ("page_swap_disable", 25),
    ],
)  # fmt: skip
def test_bits_of_the_guest_policy(name, bit):
    raw = bytearray(good())
    raw[8:16] = (1 << 17 | 1 << bit | 0x1F37).to_bytes(8, "little")
    policy = abi.parse(bytes(raw)).policy
    assert {n for n in abi.POLICY_BITS if getattr(policy, n)} == {name}
    assert (policy.abi_major, policy.abi_minor, policy.reserved) == (0x1F, 0x37, 0)


def test_reserved_policy_bits_are_kept_apart():
    raw = bytearray(good())
    raw[8:16] = (1 << 17 | 5 << 26).to_bytes(8, "little")
    assert abi.parse(bytes(raw)).policy.reserved == 5


@pytest.mark.parametrize("version", [2, 3, 5])
def test_every_reserved_bit_must_be_zero(version):
    late = {"cpuid_fam_id", "cpuid_mod_id", "cpuid_step"} if version < 3 else set()
    late |= {"launch_mit_vector", "current_mit_vector"} if version < 5 else set()
    free = SIGNED - {TABLE[n][0] + i for n in late for i in range(TABLE[n][1])}
    raw = good(version)
    abi.parse(raw)
    for at in sorted(set(range(abi.SIGNED_BYTES)) - free):
        bad = raw[:at] + bytes([raw[at] | 1 << at % 8]) + raw[at + 1 :]
        assert code(bad) == "evidence.parse-reserved", hex(at)


def test_unsigned_bytes_are_kept_apart():
    raw = good()
    assert not any(abi.parse(raw).unsigned)
    for at in range(0x330, 0x4A0):
        bad = raw[:at] + bytes([1 << at % 8]) + raw[at + 1 :]
        assert abi.parse(bad).unsigned == bad[0x330:]


@pytest.mark.parametrize(
    ("name", "bit"),
    [
        ("smt_en", 0), ("tsme_en", 1), ("ecc_en", 2), ("rapl_dis", 3),
        ("ciphertext_hiding_dram_en", 4), ("alias_check_complete", 5), ("iommu_write_safe", 6),
        ("tio_en", 7),
    ],
)  # fmt: skip
def test_bits_of_the_platform_info(name, bit):
    raw = bytearray(good())
    raw[0x40:0x48] = (1 << bit | 1 << 63).to_bytes(8, "little")
    report = abi.parse(bytes(raw))
    assert {n for n, on in report.platform.items() if on} == {name}
    assert report.platform_info == 1 << bit | 1 << 63


@pytest.mark.parametrize("length", [0, 1, 0x2A0, 1183, 1185, 4000])
def test_length(length):
    assert code(good().ljust(4000, b"\0")[:length]) == "evidence.parse-report-length"


@pytest.mark.parametrize("version", [0, 1, 4, 6, 255])
def test_version(version):
    assert code(good(version)) == "evidence.parse-report-version"


def at(offset: int, value: bytes) -> str:
    raw = good()
    return code(raw[:offset] + value + raw[offset + len(value) :])


def test_other_refusals():
    assert at(0x34, b"\0") == "evidence.parse-signature-algorithm"
    assert at(0x34, b"\2") == "evidence.parse-signature-algorithm"
    assert at(0x48, b"\x08") == "evidence.parse-signing-key"
    assert at(0x48, b"\x1c") == "evidence.parse-signing-key"
    assert at(0x48, b"\x20") == "evidence.parse-reserved"
    assert at(0x30, b"\x04") == "evidence.parse-vmpl"
    assert at(0x08, bytes(8)) == "evidence.parse-policy"
    order = abi.P384_ORDER.to_bytes(72, "little")
    for offset in (0x2A0, 0x2E8):
        assert at(offset, bytes(72)) == "evidence.parse-signature"
        assert at(offset, order) == "evidence.parse-signature"
        assert at(offset + 71, b"\1") == "evidence.parse-signature"


def test_the_order_is_that_of_the_curve():
    from cryptography.hazmat.primitives.asymmetric import ec

    assert ec.SECP384R1().group_order == abi.P384_ORDER


@given(st.binary(min_size=1184, max_size=1184))
def test_noise_raises_only_evidence_errors(raw):
    with pytest.raises(EvidenceError):
        abi.parse(raw)


@given(st.integers(0, 1183), st.integers(0, 255))
def test_one_byte_off_raises_only_evidence_errors(offset, byte):
    raw = good()
    try:
        abi.parse(raw[:offset] + bytes([byte]) + raw[offset + 1 :])
    except EvidenceError as e:
        assert e.code.startswith("evidence.parse-")


def test_pack_knows_its_fields():
    with pytest.raises(ValueError, match="no field"):
        abi.pack({"colour": 1})
