"""DCAP quotes byte for byte: what is read, and every way to be refused. Quotes are made up."""

import struct

import pytest

from casemate.attest.dcap import abi
from casemate.attest.verdict import Refused
from support import dcap
from support.mutation import COUNT, fuzz

FORMS = {
    "sgx-3": dcap.Case(version=3),
    "tdx-4": dcap.Case(),
    "tdx-5-10": dcap.Case(version=5),
    "tdx-5-15": dcap.Case(version=5, body_type=3, body=dcap.td(True)),
}
QUOTES = {name: case.quote() for name, case in FORMS.items()}


def refused(raw):
    with pytest.raises(Refused) as e:
        abi.parse(raw)
    return e.value.code.removeprefix("evidence.parse-")


def put(raw, at, data):
    return raw[:at] + data + raw[at + len(data) :]


@pytest.mark.parametrize("name", QUOTES)
def test_what_is_written_is_read(name):
    quote = abi.parse(QUOTES[name])
    assert quote.header.version == FORMS[name].version
    assert quote.header.user_data == b"u" * 20
    assert quote.body.report_data == b"r" * 64
    assert QUOTES[name].startswith(quote.signed)
    assert quote.qe_auth_data == bytes(range(32))
    assert quote.certification_type == 5
    assert quote.certification_data == FORMS[name].pck_chain + b"\0"
    assert quote.padding == b""
    assert isinstance(quote.body, abi.EnclaveReport) == name.startswith("sgx")


def test_a_td_report_of_either_size():
    ten, fifteen = (abi.parse(QUOTES[f"tdx-5-{n}"]).body for n in ("10", "15"))
    assert (ten.tee_tcb_svn2, ten.mrservicetd) == (None, None)
    assert (fifteen.tee_tcb_svn2, fifteen.mrservicetd) == (dcap.TEE_TCB_SVN, bytes(48))
    assert ten.mrtd == fifteen.mrtd == b"m" * 48
    assert ten.attribute("sept_ve_disable") and not ten.attribute("debug")
    assert not ten.reserved_attributes


@pytest.mark.parametrize("bit", [1, 7, 8, 27, 32, 62])
def test_attributes_without_meaning_are_told(bit):
    body = dcap.td(tdattributes=(1 << bit | 1 << 28).to_bytes(8, "little"))
    assert abi.parse(dcap.Case(body=body).quote()).body.reserved_attributes == 1 << bit


def test_the_versions_in_a_header_are_told():
    raw = put(QUOTES["tdx-4"], 8, b"\1\0\2\0")
    assert abi.parse(raw).header.reserved == b"\1\0\2\0"


def test_what_follows_is_padding():
    assert abi.parse(dcap.Case(padding=b"\1" * 70).quote()).padding == b"\1" * 70


@pytest.mark.parametrize(
    ("name", "at", "data", "code"),
    [
        ("tdx-4", 0, b"\x06\0", "quote-version"),
        ("tdx-4", 0, b"\x03\0", "quote-version"),  # a TDX quote of SGX's version
        ("sgx-3", 0, b"\x04\0", "quote-version"),
        ("tdx-4", 4, b"\0", "quote-version"),
        ("tdx-4", 4, b"\x82", "quote-version"),
        ("tdx-4", 2, b"\x03", "key-type"),
        ("tdx-4", 12, b"\0", "qe-vendor"),
        ("tdx-5-10", 48, b"\x01", "body-type"),
        ("tdx-5-10", 48, b"\x03", "body-type"),  # a size that is another body's
        ("tdx-5-10", 50, struct.pack("<I", 583), "body-type"),
        ("sgx-3", 48 + 20, b"\x01", "reserved"),
        ("sgx-3", 48 + 96, b"\x01", "reserved"),
        ("sgx-3", 48 + 160, b"\x01", "reserved"),
        ("sgx-3", 48 + 262, b"\x01", "reserved"),
        ("tdx-4", 48 + 584 + 4 + 128, b"\x05", "certification-type"),
        ("tdx-4", 48 + 584 + 4 + 134 + 450 + 32, b"\x04", "certification-type"),
        ("tdx-4", 48 + 584 + 4 + 134 + 450 + 32, b"\x01", "certification-type"),
        ("tdx-4", 48 + 584 + 4 + 130, b"\xff", "quote-length"),
        ("tdx-4", 48 + 584, b"\xff\xff\xff\xff", "quote-length"),
        ("tdx-4", 48 + 584 + 4 + 134 + 448, b"\xff\xff", "quote-length"),
        ("tdx-4", 48 + 584 + 4, bytes(32), "signature"),
        ("tdx-4", 48 + 584 + 4 + 32, abi.P256_ORDER.to_bytes(32, "big"), "signature"),
        ("tdx-4", 48 + 584 + 4 + 134 + 384, bytes(32), "signature"),
    ],
)  # fmt: skip
def test_other_bytes_are_refused(name, at, data, code):
    assert refused(put(QUOTES[name], at, data)) == code


@pytest.mark.parametrize("name", QUOTES)
def test_cut_anywhere_it_is_refused(name):
    raw = QUOTES[name]
    for size in [*range(0, len(raw), 97), len(raw) - 1]:
        assert refused(raw[:size]) in ("quote-length", "certification-type")


def test_bytes_between_parts_are_refused():
    raw = QUOTES["sgx-3"]
    at = 48 + 384
    size = int.from_bytes(raw[at : at + 4], "little")
    assert refused(put(raw, at, (size + 1).to_bytes(4, "little")) + b"\0") == "quote-length"


def test_auth_data_of_another_size():
    assert refused(dcap.Case(auth=b"a" * 31).quote()) == "auth-data"


def test_no_quote_is_that_large():
    assert refused(bytes(abi.MAX_BYTES + 1)) == "too-large"


@pytest.mark.parametrize("kind", [1, 2, 3])
def test_a_quote_that_only_names_its_pck(kind):
    data = bytes(abi.PPIDS[kind])
    quote = abi.parse(dcap.Case(version=3, certification=(kind, data)).quote())
    assert (quote.certification_type, quote.certification_data) == (kind, data)


def test_fuzz():
    seeds = [dcap.Case(version=v, padding=b"\0" * 9).quote() for v in (3, 4, 5)]
    assert 0 < fuzz(abi.parse, [*seeds, *QUOTES.values()]) < COUNT
