"""The paravisor's report and TDREPORT, made up: each rule of the form."""

from __future__ import annotations

import hashlib
import json
import struct

import pytest

from casemate.attest.azure import abi
from casemate.attest.verdict import Refused
from support import azure, tpm
from support.mutation import fuzz

AK = tpm.key("ak")
TEXT = azure.claims(AK)


def made(hardware: str = "snp", text: bytes = TEXT, **changed) -> bytes:
    payload = b"p" * abi.REPORTS[azure.KINDS[hardware]][1]
    return azure.report(hardware, payload, text, **changed)


def refused(raw: bytes, code: str = "parse-hcl") -> str:
    with pytest.raises(Refused) as e:
        abi.parse(raw)
    assert e.value.code == f"evidence.{code}"
    return e.value.message


@pytest.mark.parametrize("hardware", ["snp", "tdx"])
@pytest.mark.parametrize("version", [1, 2])
@pytest.mark.parametrize("name", ["sha256", "sha384", "sha512"])
def test_fields(hardware, version, name):
    found = abi.parse(made(hardware, version=version, hash=azure.HASHES[name]))
    assert (found.hardware, found.version, found.hash) == (hardware, version, name)
    assert found.report == b"p" * len(found.report)
    assert len(found.report) == {"snp": 1184, "tdx": 1024}[hardware]
    assert found.claims == TEXT
    assert found.digest == hashlib.new(name, TEXT).digest()
    assert found.ak.public_numbers() == AK.public_key().public_numbers()
    assert found.user_data == azure.USER
    assert found.configuration["vmUniqueId"] == azure.VM
    assert found.padding == bytes(100)


@pytest.mark.parametrize("size", [1184, 32 + 1184 + 20 + len(TEXT)])
def test_sizes_that_are_written(size):
    """The documented one, and the one that paravisors write."""
    assert abi.parse(made(size=size)).claims == TEXT


@pytest.mark.parametrize(
    "changed",
    [
        {"signature": b"HCLB"}, {"version": 0}, {"version": 3}, {"request": 1}, {"status": 1},
        {"reserved": bytes(11) + b"\1"}, {"size": 1183}, {"size": 1024}, {"edition": 2},
        {"kind": 0}, {"kind": 3}, {"hash": 0}, {"hash": 4}, {"data": 20}, {"claims": 0},
        {"claims": 1 << 31, "data": 20 + (1 << 31)}, {"claims": len(TEXT) + 1},
        {"claims": len(TEXT) + 101, "data": len(TEXT) + 121},
    ],
)  # fmt: skip
def test_headers_that_are_none(changed):
    refused(made(**changed))


def test_bytes_that_nothing_signs():
    assert abi.parse(made(padding=b"")).padding == b""
    assert abi.parse(made(padding=b"rest")).padding == b"rest"
    raw = bytearray(made("tdx"))
    raw[32 + 1024] = 1
    refused(bytes(raw))


def test_cuts_are_refused():
    raw = made(padding=b"")
    for end in range(0, len(raw), 3):
        refused(raw[:end])
    refused(made(padding=bytes(1 << 16)))


def key(**changed):
    return [azure.jwk(AK) | changed]


@pytest.mark.parametrize(
    ("text", "code"),
    [
        (b"no JSON", "parse-json"),
        (b"[]", "parse-json"),
        (TEXT[:-1] + b',"keys":[]}', "parse-json"),
        (TEXT + b"x", "parse-json"),
        (TEXT.replace(b"HCLAkPub", b"OtherKey"), "parse-hcl"),
        (azure.claims(AK, keys=[]), "parse-hcl"),
        (azure.claims(AK, keys={}), "parse-hcl"),
        (azure.claims(AK, keys=key() * 2), "parse-hcl"),
        (azure.claims(AK, keys=key() * 9), "parse-hcl"),
        (azure.claims(AK, keys=key(kty="EC")), "parse-hcl"),
        (azure.claims(AK, keys=key(n="AQAB")), "parse-hcl"),
        (azure.claims(AK, keys=key(n=5)), "parse-hcl"),
        (azure.claims(AK, keys=key(n="AA" + azure.jwk(AK)["n"])), "parse-hcl"),
        (azure.claims(AK, keys=key(n=azure.jwk(AK)["n"] + "=")), "parse-hcl"),
        (azure.claims(AK, keys=key(e="Ag")), "parse-hcl"),
        (azure.claims(AK, keys=key(e="AQAC")), "parse-hcl"),
        (azure.claims(AK, keys=key(e=None)), "parse-hcl"),
        (azure.claims(AK, user="xyz"), "parse-hcl"),
        (azure.claims(AK, user="00" * 65), "parse-hcl"),
        (azure.claims(AK, user=5), "parse-hcl"),
    ],
)
def test_claims_that_are_none(text, code):
    refused(made(text=text), code)


def test_claims_may_lack_what_nothing_rests_on():
    older = azure.claims(AK, keys=key(key_ops=["encrypt"]))
    assert abi.parse(made(text=older)).ak.public_numbers() == AK.public_key().public_numbers()
    bare = json.dumps({"keys": key()}).encode()
    found = abi.parse(made(text=bare))
    assert (found.user_data, found.configuration) == (b"", {})
    assert abi.parse(made(text=azure.claims(AK, extra={"a": [1, 2.5, None]}))).values["extra"]


def test_a_tdreport():
    raw = azure.tdreport(mrtd=b"m" * 48, rtmr3=b"r" * 48, tee_tcb_svn2=b"s" * 16)
    found = abi.td_report(raw)
    assert (found["mrtd"], found["rtmr3"]) == (b"m" * 48, b"r" * 48)
    assert found["tee_tcb_svn2"] == b"s" * 16
    assert (raw[0x210:0x240], raw[0x360:0x390]) == (b"m" * 48, b"r" * 48)


def test_tdreports_that_are_none():
    def refuse(raw):
        with pytest.raises(Refused) as e:
            abi.td_report(raw)
        assert e.value.code == "evidence.parse-hcl"

    good = azure.tdreport()
    abi.td_report(good)
    refuse(azure.tdreport(reporttype=bytes(4)))
    for name, _ in abi._TD_FIELDS:
        if name.startswith("reserved"):
            refuse(azure.tdreport(**{name: b"\1"}))
    for name in ("tee_tcb_info_hash", "tee_info_hash"):
        refuse(azure.tdreport(**{name: b"h" * 48}))
    # Each byte of both halves is under one of the two digests.
    for at in (*range(0x100, 0x1EF, 5), *range(0x200, 0x400, 5)):
        refuse(good[:at] + bytes([good[at] ^ 1]) + good[at + 1 :])


def test_fuzz():
    seeds = [made("snp"), made("tdx", padding=b"")]
    assert fuzz(abi.parse, seeds) > 0
    reports = [azure.tdreport(mrtd=b"m" * 48)]

    def read(raw: bytes) -> None:
        if len(raw) == struct.calcsize(abi._TD_REPORT.format):
            abi.td_report(raw)

    assert fuzz(read, reports) > 0
