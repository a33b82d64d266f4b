"""The parser on documents made up under a test root."""

import cbor2
import pytest

from casemate.attest.nitro import abi
from casemate.attest.verdict import Refused
from support import nitro
from support.mutation import COUNT, fuzz

GOOD = nitro.fields()


def refused(data):
    with pytest.raises(Refused) as e:
        abi.parse(data)
    return e.value.code.removeprefix("evidence.")


def of(**changed):
    return nitro.sign(cbor2.dumps(GOOD | changed))


def test_every_field_is_read():
    data = nitro.sign(cbor2.dumps(GOOD))
    found = abi.parse(data)
    for name, value in GOOD.items():
        assert getattr(found, name) == (tuple(value) if name == "cabundle" else value)
    assert found.message.signature == data[-96:]
    assert (found.message.tagged, found.message.algorithm) == (False, -35)
    assert abi.parse(nitro.sign(cbor2.dumps(GOOD), tagged=True)).pcrs == found.pcrs


def test_optional_fields_are_null_or_left_out():
    for name in ("public_key", "user_data", "nonce"):
        assert getattr(abi.parse(of(**{name: None})), name) is None
        left = {key: value for key, value in GOOD.items() if key != name}
        assert getattr(abi.parse(nitro.sign(cbor2.dumps(left))), name) is None


def test_an_indefinite_map_as_newer_systems_write_it():
    pairs = b"".join(cbor2.dumps(key) + cbor2.dumps(value) for key, value in GOOD.items())
    assert abi.parse(nitro.sign(b"\xbf" + pairs + b"\xff")).module_id == nitro.MODULE
    assert refused(nitro.sign(b"\xbf" + pairs)) == "parse-document"


@pytest.mark.parametrize(
    "changed",
    [
        {"module_id": ""}, {"module_id": b"i-0"}, {"module_id": "i 0"}, {"module_id": "i\x1b[2J"},
        {"module_id": "i" * 256}, {"module_id": None}, {"digest": "SHA256"}, {"digest": "sha384"},
        {"digest": None}, {"digest": b"SHA384"}, {"timestamp": 0}, {"timestamp": -1},
        {"timestamp": True}, {"timestamp": 1.5}, {"timestamp": "1"}, {"timestamp": None},
        {"pcrs": {}}, {"pcrs": []}, {"pcrs": None}, {"pcrs": {32: bytes(48)}},
        {"pcrs": {-1: bytes(48)}}, {"pcrs": {"0": bytes(48)}}, {"pcrs": {0: bytes(47)}},
        {"pcrs": {0: bytes(49)}}, {"pcrs": {0: bytes(32)}}, {"pcrs": {0: "0" * 48}},
        {"pcrs": {0: None}}, {"pcrs": {n: bytes(48) for n in range(33)}},
        {"certificate": b""}, {"certificate": bytes(1025)}, {"certificate": None},
        {"certificate": "x"}, {"cabundle": []}, {"cabundle": b"x"}, {"cabundle": None},
        {"cabundle": [b""]}, {"cabundle": [bytes(1025)]}, {"cabundle": ["x"]},
        {"cabundle": [b"x"] * 9}, {"public_key": b""}, {"public_key": bytes(1025)},
        {"public_key": "x"}, {"user_data": bytes(513)}, {"user_data": "x"}, {"user_data": [1]},
        {"nonce": bytes(513)}, {"nonce": 1}, {"more": None},
    ],
)  # fmt: skip
def test_a_field_of_another_type_or_size_is_refused(changed):
    assert refused(of(**changed)) == "parse-document"


@pytest.mark.parametrize(
    "changed",
    [
        {"public_key": b"k"}, {"public_key": bytes(1024)}, {"user_data": b""},
        {"user_data": bytes(512)}, {"nonce": b""}, {"nonce": bytes(512)},
        {"timestamp": 2**64 - 1}, {"timestamp": 1}, {"pcrs": {31: bytes(48)}},
        {"certificate": bytes(1024)}, {"cabundle": [b"x"] * 8}, {"module_id": "i" * 255},
    ],
)  # fmt: skip
def test_sizes_at_their_bounds(changed):
    found = abi.parse(of(**changed))
    for name, value in changed.items():
        assert getattr(found, name) == (tuple(value) if name == "cabundle" else value)


@pytest.mark.parametrize(
    "name", ["module_id", "digest", "timestamp", "pcrs", "certificate", "cabundle"]
)
def test_a_mandatory_field_is_missing(name):
    left = {key: value for key, value in GOOD.items() if key != name}
    assert refused(nitro.sign(cbor2.dumps(left))) == "parse-document"


def test_fields_and_registers_stand_once():
    twice = cbor2.dumps("nonce") + cbor2.dumps(b"other")
    payload = cbor2.dumps(GOOD)
    assert payload[0] == 0xA9
    assert refused(nitro.sign(b"\xaa" + payload[1:] + twice)) == "parse-document"
    registers = cbor2.dumps(GOOD["pcrs"])
    again = b"\xb1" + registers[1:] + cbor2.dumps(0) + cbor2.dumps(bytes(48))
    assert refused(nitro.sign(payload.replace(registers, again))) == "parse-document"


def test_fields_have_names():
    assert refused(nitro.sign(cbor2.dumps({**GOOD, 7: None}))) == "parse-document"


def test_the_payload_is_one_map_of_limited_size():
    for payload in (b"", b"\xa0", b"\x80", cbor2.dumps(GOOD) + b"\0", bytes(16385), b"\xff"):
        assert refused(nitro.sign(payload)) == "parse-document"


def test_headers_are_alg_alone():
    payload = cbor2.dumps(GOOD)
    more = cbor2.dumps({1: -35, 4: b"kid"})
    assert refused(nitro.sign(payload, protected=more)) == "parse-header"
    for unprotected in ({4: b"kid"}, {"x": None}):
        code = refused(nitro.sign(payload, unprotected=unprotected))
        assert code == "parse-unsigned-bytes"
    assert refused(nitro.sign(payload, unprotected={1: -35})) == "parse-cose"


def test_a_document_is_found_by_name_or_by_how_it_starts():
    data, tagged = nitro.sign(b"x"), nitro.sign(b"x", tagged=True)
    assert abi.find({"document.cose": b"anything", "other": data}) == "document.cose"
    assert abi.find({"root.pem": b"-----BEGIN", "quote": data}) == "quote"
    assert abi.find({"quote": tagged}) == "quote"
    assert abi.find({"one": data, "two": tagged}) == ""
    assert abi.find({"report.bin": bytes(1184), "empty": b""}) == ""


def test_fuzzed_documents():
    """Of the whole, and of the payload, which is most of it."""
    payload = cbor2.dumps(GOOD)
    data = nitro.sign(payload)
    whole = fuzz(abi.parse, [data, nitro.sign(payload, tagged=True)], COUNT // 2, seed=4)
    start, end = data[: data.index(payload) - 3], data[-98:]

    def wrapped(inner):
        abi.parse(start + b"\x59" + len(inner).to_bytes(2, "big") + inner + end)

    wrapped(payload)
    inner = fuzz(wrapped, [payload], COUNT // 2, seed=5)
    assert 0 < whole < COUNT // 2
    assert 0 < inner < COUNT // 2
