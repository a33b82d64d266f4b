"""Structures of a quote, made up: each rule of the form, and nothing but refusals for noise."""

from __future__ import annotations

import struct

import pytest

from casemate.attest.tpm import abi
from casemate.attest.verdict import Refused
from support import tpm
from support.mutation import fuzz

BANKS = tpm.banks("sha256", "sha384")


def refused(parse, raw: bytes) -> str:
    with pytest.raises(Refused) as e:
        parse(raw, "it")
    assert e.value.code == "evidence.parse-tpm"
    return e.value.message


def test_fields_of_a_quote():
    select = {"sha384": (23, 0, 7), "sha256": (1,)}
    raw = tpm.attest(BANKS, select=select, extra=b"x", clock=5, resets=6, restarts=7, safe=0,
                     firmware=8)  # fmt: skip
    found = abi.attest(raw, "it")
    assert found.pcr_select == (
        abi.Selection("sha384", (0, 7, 23)), abi.Selection("sha256", (1,)),
    )  # fmt: skip
    assert (found.extra_data, found.qualified_signer) == (b"x", tpm.SIGNER)
    assert (found.clock, found.reset_count, found.restart_count) == (5, 6, 7)
    assert (found.safe, found.firmware_version) == (False, 8)
    assert found.pcr_digest == tpm._composite(select, BANKS, "sha256")


@pytest.mark.parametrize("signer", [b"", b"\x40\0\0\x07", tpm.SIGNER])
@pytest.mark.parametrize("extra", [b"", b"e" * 66])
def test_sizes_that_are_admitted(signer, extra):
    assert abi.attest(tpm.attest(BANKS, signer=signer, extra=extra), "it").extra_data == extra


@pytest.mark.parametrize(
    "changed",
    [
        {"magic": 0xFF544346}, {"type": 0x8017}, {"type": 0x8019}, {"signer": b"\0\x0bshort"},
        {"signer": b"\0\x99" + bytes(32)}, {"signer": b"x"}, {"extra": bytes(67)}, {"safe": 2},
        {"digest": bytes(65)}, {"rest": b"\0"},
        {"selection": struct.pack(">I", 1 << 31)},
        {"selection": struct.pack(">IHB", 1, 0xB, 0)},
        {"selection": struct.pack(">IHBI", 1, 0xB, 4, 1 << 0)},
        {"selection": struct.pack(">IHB", 1, 0xB, 5) + bytes(5)},
        {"selection": struct.pack(">IHB", 1, 0x99, 3) + bytes(3)},
        {"selection": struct.pack(">I", 2) + (struct.pack(">HB", 0xB, 3) + bytes(3)) * 2},
    ],
)  # fmt: skip
def test_quotes_that_are_none(changed):
    abi.attest(tpm.attest(BANKS), "it")
    refused(abi.attest, tpm.attest(BANKS, **changed))


def test_cuts_and_additions_are_refused():
    ak = tpm.key("ak", "p256")
    whole = tpm.attest(BANKS)
    for parse, raw in (
        (abi.attest, whole), (abi.signature, tpm.signature(ak, whole)),
        (abi.signature, tpm.signature(tpm.key("ak"), whole)), (abi.public, tpm.public(ak)),
        (abi.public, tpm.public(tpm.key("ak"))),
    ):  # fmt: skip
        parse(raw, "it")
        for end in range(len(raw)):
            refused(parse, raw[:end])
        refused(parse, raw + b"\0")
    refused(abi.attest, bytes(abi.MAX_BYTES + 1))


@pytest.mark.parametrize(
    "raw",
    [
        struct.pack(">HH", 0x0014, 0x0004) + tpm.sized(bytes(256)),  # SHA-1
        struct.pack(">HH", 0x001A, 0x000B) + tpm.sized(bytes(256)),  # ECDAA
        struct.pack(">HH", 0x0014, 0x000B) + tpm.sized(bytes(1025)),
        struct.pack(">H", 0x0010),
    ],
)
def test_signatures_that_are_none(raw):
    refused(abi.signature, raw)


@pytest.mark.parametrize("kind", ["rsa", "p256", "p384"])
def test_public_areas(kind):
    key = tpm.key("ak", kind)
    found = abi.public(tpm.public(key), "it")
    assert found.key.public_numbers() == key.public_key().public_numbers()
    assert found.attributes == tpm.AK_ATTRIBUTES
    assert found.qualified(tpm.ENDORSEMENT) == tpm.qualified(tpm.public(key))
    assert (
        abi.public(tpm.sized(tpm.public(key)), "it").name == abi.public(tpm.public(key), "it").name
    )


def test_public_areas_that_are_none():
    raw = tpm.public(tpm.key("ak", "p256"))
    refused(abi.public, raw[:-1] + bytes([raw[-1] ^ 1]))  # a point beside the curve
    refused(abi.public, b"\0\x08" + raw[2:])
    refused(abi.public, raw.replace(struct.pack(">HH", 3, 0x10), struct.pack(">HH", 9, 0x10)))
    raw = tpm.public(tpm.key("ak"))
    refused(abi.public, raw.replace(struct.pack(">H", 2048), struct.pack(">H", 2047)))


def test_fuzz():
    ak, rsa = tpm.key("ak", "p256"), tpm.key("ak")
    quotes = [tpm.attest(BANKS), tpm.attest(BANKS, select={"sha256": (0,)}, extra=b"")]
    for parse, seeds in (
        (abi.attest, quotes),
        (abi.signature, [tpm.signature(ak, quotes[0]), tpm.signature(rsa, quotes[0])]),
        (abi.public, [tpm.public(ak), tpm.public(rsa)]),
    ):
        assert fuzz(lambda raw, parse=parse: parse(raw, "it"), seeds) > 0
