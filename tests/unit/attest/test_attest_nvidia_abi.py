"""The SPDM report: what it says, and every way in which it may be malformed. Made-up reports."""

import struct

import pytest

from casemate.attest.nvidia import abi
from casemate.attest.verdict import Refused
from support import nvidia
from support.mutation import fuzz


def refused(raw: bytes) -> str:
    with pytest.raises(Refused) as e:
        abi.parse(raw)
    assert e.value.where == "report.bin"
    return e.value.code.removeprefix("evidence.parse-")


def spliced(at: int, new: bytes) -> bytes:
    raw = nvidia.report()
    return raw[:at] + new + raw[at + len(new) :]


RECORD = 37 + 8
BLOCK = 7 + 48
NONCE = RECORD + 64 * BLOCK
OPAQUE = NONCE + 32 + 2


def test_a_report_says_what_was_put_in():
    raw = nvidia.report()
    found = abi.parse(raw)
    assert found.request_nonce == nvidia.NONCE
    assert found.response_nonce == b"\x5a" * 32
    assert {n: m.value for n, m in found.measurements.items()} == nvidia.VALUES
    assert {m.kind for m in found.measurements.values()} == {1}
    assert (found.driver_version, found.vbios_version) == (nvidia.DRIVER, nvidia.VBIOS)
    assert (found.nvdec0, found.protected_pcie, found.mode) == (False, True, "ppcie")
    assert found.opaque["FWID"] == nvidia.FWID
    assert found.opaque_version == 1
    assert found.texts["PROJECT"] == "G520"
    assert found.signed == raw[:-96]
    assert found.r.to_bytes(48, "big") + found.s.to_bytes(48, "big") == raw[-96:]


def test_what_a_report_does_not_say_stays_open():
    found = abi.parse(nvidia.report(fields=b""))
    assert (found.driver_version, found.vbios_version, found.mode) == ("", "", "")
    assert (found.nvdec0, found.protected_pcie, found.opaque_version) == (None, None, 0)


def test_a_switch_gives_its_bios_as_text():
    found = abi.parse(nvidia.report(fields=nvidia.opaque([(6, b"96.10.55.00.01")])))
    assert found.vbios_version == "96.10.55.00.01"


def test_versioned_opaque_data():
    raw = nvidia.report(fields=nvidia.versioned(nvidia.OPAQUE))
    found, plain = abi.parse(raw), abi.parse(nvidia.report())
    assert found.opaque == plain.opaque
    assert found.opaque_version == 2


def test_an_unknown_field_is_kept_by_its_number():
    found = abi.parse(nvidia.report(fields=nvidia.opaque([*nvidia.OPAQUE, (77, b"x")])))
    assert found.opaque["TYPE_77"] == b"x"


@pytest.mark.parametrize(
    ("raw", "code"),
    [
        (b"", "report-length"),
        (nvidia.report()[:36], "report-length"),
        (nvidia.report()[:-1], "report-length"),
        (nvidia.report() + b"\0", "report-length"),
        (b"\0" * (abi.MAX_BYTES + 1), "report-length"),
        (nvidia.report(request=b"\x12\xe0\x01\xff"), "request"),
        (nvidia.report(request=b"\x11\xe1\x01\xff"), "request"),
        (nvidia.report(request=b"\x11\xe0\x00\xff"), "request"),
        (nvidia.report(request=b"\x11\xe0\x01\x01"), "request"),
        (nvidia.report(slot=8, response=b"\x11\x60\x00\x08"), "request"),
        (nvidia.report(response=b"\x10\x60\x00\x00"), "response"),
        (nvidia.report(response=b"\x11\x7f\x00\x00"), "response"),
        (nvidia.report(response=b"\x11\x60\x01\x00"), "response"),
        (nvidia.report(response=b"\x11\x60\x00\x01"), "response"),
        (nvidia.report(values={}), "response"),
        (nvidia.report(values={0: b"x" * 48}), "measurement"),
        (spliced(RECORD + BLOCK, b"\x01"), "measurement"),
        (spliced(RECORD + 1, b"\x02"), "measurement"),
        (spliced(RECORD + 2, b"\x34\x00"), "measurement"),
        (spliced(RECORD + 2, struct.pack("<HBH", 52, 1, 49)), "measurement"),
        (spliced(41, b"\x3f"), "measurement"),
        (spliced(41, b"\x41"), "report-length"),
        (spliced(42, b"\xff\xff\xff"), "report-length"),
        (spliced(OPAQUE - 2, b"\xff\xff"), "report-length"),
        (nvidia.report(fields=nvidia.opaque([(6, b"x" * 8), (6, b"y" * 8)])), "opaque"),
        (nvidia.report(fields=nvidia.opaque([(6, b"not a version")])), "opaque"),
        (nvidia.report(fields=nvidia.opaque([(3, b"\xff\xfe")])), "opaque"),
        (nvidia.report(fields=nvidia.opaque([(3, b"590\n12")])), "opaque"),
        (nvidia.report(fields=nvidia.opaque([(11, b"\x54")])), "opaque"),
        (nvidia.report(fields=nvidia.opaque([(11, b"")])), "opaque"),
        (nvidia.report(fields=nvidia.opaque([(21, b"\x55\x55")])), "opaque"),
        (nvidia.report(fields=b"\x03\x00\x05"), "report-length"),
        (nvidia.report(fields=b"\x03\x00\x05\x00abcd"), "report-length"),
        (nvidia.report(fields=nvidia.opaque([(34, b"\x03\x00")])), "opaque-version"),
        (nvidia.report(fields=nvidia.versioned([], major=3)), "opaque-version"),
        (nvidia.report(fields=nvidia.versioned([], profile=1)), "opaque"),
        (nvidia.report(fields=b"NVDAOD\0\0"), "report-length"),
        (nvidia.report()[:-96] + b"\0" * 96, "signature"),
        (nvidia.report()[:-48] + b"\0" * 48, "signature"),
        (nvidia.report()[:-96] + nvidia.P384_ORDER.to_bytes(48, "big") * 2, "signature"),
        (nvidia.report()[:-48] + b"\xff" * 48, "signature"),
    ],
)  # fmt: skip
def test_malformed_reports(raw, code):
    assert refused(raw) == code


def test_every_cut_is_refused():
    raw = nvidia.report()
    for size in range(len(raw)):
        assert refused(raw[:size]) in ("report-length", "measurement", "signature")


def test_fuzzed_reports():
    seeds = [
        nvidia.report(),
        nvidia.report(fields=nvidia.versioned(nvidia.OPAQUE)),
        nvidia.report(values={1: b"x" * 48, 9: b"y"}, fields=nvidia.opaque([(6, b"\0" * 8)])),
    ]
    fuzz(abi.parse, seeds)
