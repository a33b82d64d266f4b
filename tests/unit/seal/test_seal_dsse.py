"""DSSE envelopes."""

import base64
import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from casemate.seal import dsse
from casemate.seal.identity import Identity
from casemate.spec.errors import ReceiptError

ANNA, OTTO = Identity.generate("Anna"), Identity.generate("Otto")
KEYS = {"anna": ANNA.public.sign_key, "otto": OTTO.public.sign_key}
TYPE = "application/vnd.in-toto+json"
ENVELOPE = dsse.sign(TYPE, b'{"a":1}', ANNA.sign, "anna")


def code(envelope, keys=KEYS):
    with pytest.raises(ReceiptError) as e:
        dsse.verify(envelope, keys)
    return e.value.code


def changed(**fields):
    return json.dumps(json.loads(ENVELOPE) | fields, sort_keys=True, separators=(",", ":"))


def test_the_encoding_is_that_of_the_specification():
    """The vector of protocol.md, DSSE v1.0.0."""
    expected = b"DSSEv1 29 http://example.com/HelloWorld 11 hello world"
    assert dsse.pae("http://example.com/HelloWorld", b"hello world") == expected
    assert dsse.pae("é", b"") == b"DSSEv1 2 \xc3\xa9 0 "


@given(st.text(st.characters(codec="utf-8")), st.binary(max_size=200))
def test_what_was_signed_verifies(kind, payload):
    assert dsse.verify(dsse.sign(kind, payload, ANNA.sign, "anna"), KEYS) == (kind, payload)


def test_the_encoding_is_injective():
    """Moving bytes between type and payload changes what is signed."""
    assert dsse.pae("a 1 b", b"") != dsse.pae("a", b"b")
    assert code(changed(payloadType=TYPE + "x")) == "receipt.signature"


def test_other_payloads_keys_and_signers_are_refused():
    assert code(changed(payload=base64.b64encode(b'{"a":2}').decode())) == "receipt.signature"
    assert code(ENVELOPE, {"anna": OTTO.public.sign_key}) == "receipt.signature"
    assert code(ENVELOPE, {"otto": OTTO.public.sign_key}) == "receipt.signer"
    assert code(ENVELOPE, {}) == "receipt.signer"
    assert code(ENVELOPE, {"anna": b"short"}) == "receipt.signature"


def test_every_one_of_several_signatures_must_hold():
    mine = json.loads(ENVELOPE)["signatures"]
    theirs = json.loads(dsse.sign(TYPE, b'{"a":1}', OTTO.sign, "otto"))["signatures"]
    bad = json.loads(dsse.sign(TYPE, b"else", OTTO.sign, "otto"))["signatures"]
    assert dsse.verify(changed(signatures=mine + theirs), KEYS)[1] == b'{"a":1}'
    assert code(changed(signatures=mine + bad)) == "receipt.signature"
    assert code(changed(signatures=mine + mine)) == "receipt.signer"
    assert code(changed(signatures=[])) == "receipt.envelope"


@pytest.mark.parametrize(
    "envelope",
    [
        "", "{}", "[]", "null", "\ud800", b"\xff",
        ENVELOPE + " ", " " + ENVELOPE,
        changed(extra=1), changed(payload=1), changed(payload="%%%%"), changed(payload="YQ"),
        changed(payload="YR=="), changed(payload="Y Q=="), changed(payloadType=None),
        changed(signatures={}), changed(signatures=[1]), changed(signatures=[{"sig": "YQ=="}]),
        changed(signatures=[{"keyid": 1, "sig": "YQ=="}]),
        changed(signatures=[{"keyid": "anna", "sig": "YQ==", "x": 1}]),
        changed(signatures=[{"keyid": "anna", "sig": "-_-_"}]),
    ],
)  # fmt: skip
def test_other_forms_are_refused(envelope):
    assert code(envelope) == "receipt.envelope"


def test_every_flipped_bit_is_refused():
    data = ENVELOPE.encode()
    for bit in range(len(data) * 8):
        bad = bytearray(data)
        bad[bit // 8] ^= 1 << bit % 8
        with pytest.raises(ReceiptError):
            dsse.verify(bytes(bad), KEYS)
