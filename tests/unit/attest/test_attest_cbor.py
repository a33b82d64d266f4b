import random

import cbor2
import pytest
from hypothesis import given
from hypothesis import strategies as st

from casemate.attest import cbor
from support.fuzzing import feed
from support.mutation import COUNT, mutated

VALUES = st.recursive(
    st.integers(-(2**64), 2**64 - 1) | st.binary(max_size=40) | st.text(max_size=40)
    | st.booleans() | st.none(),
    lambda inner: st.lists(inner, max_size=5)
    | st.dictionaries(st.integers(-(2**64), 2**64 - 1) | st.text(max_size=9), inner, max_size=5),
    max_leaves=20,
)  # fmt: skip


def plain(value):
    """As cbor2 has it."""
    match value:
        case tuple():
            return [plain(x) for x in value]
        case dict():
            return {k: plain(v) for k, v in value.items()}
        case cbor.Tag():
            return cbor2.CBORTag(value.number, plain(value.value))
    return value


# From RFC 8949 appendix A.
@pytest.mark.parametrize(
    ("encoded", "value"),
    [
        ("00", 0), ("17", 23), ("1818", 24), ("1903e8", 1000), ("1a000f4240", 1000000),
        ("1bffffffffffffffff", 2**64 - 1), ("3bffffffffffffffff", -(2**64)), ("20", -1),
        ("3903e7", -1000), ("f4", False), ("f5", True), ("f6", None), ("40", b""),
        ("4401020304", b"\1\2\3\4"), ("60", ""), ("62c3bc", "ü"), ("64f0908591", "𐅑"), ("80", ()),
        ("8301820203820405", (1, (2, 3), (4, 5))), ("a0", {}), ("a201020304", {1: 2, 3: 4}),
        ("a26161016162820203", {"a": 1, "b": (2, 3)}),
        ("c11a514b67b0", cbor.Tag(1, 1363896240)), ("d818456449455446", cbor.Tag(24, b"dIETF")),
    ],
)  # fmt: skip
def test_examples_of_the_rfc(encoded, value):
    assert cbor.decode(bytes.fromhex(encoded), tags=True) == value


@pytest.mark.parametrize(
    "encoded",
    [
        "", "18", "1900", "1817", "190017", "1a0000ffff", "1b00000000ffffffff", "1c", "1d", "1e",
        "1f", "3f", "f90000", "fb3ff199999999999a", "f7", "f0", "f814", "f8ff", "ff", "4141 00",
        "42 61", "580161", "61ff", "62c328", "7f6161ff", "5f4161ff", "81", "8200",
        "9bffffffffffffffff",
        "a1", "a101", "a2010101 02", "a2 6161 01 6161 02", "a1 4161 01", "a1 80 01", "a1 f5 01",
        "a1 f6 01", "c100", "00 00", "df", "fc", "9f0102", "bf01", "9fff00",
    ],
)  # fmt: skip
@pytest.mark.parametrize("indefinite", [False, True])
def test_what_is_not_in_the_one_form_is_refused(encoded, indefinite):
    with pytest.raises(cbor.CborError):
        cbor.decode(bytes.fromhex(encoded), indefinite=indefinite)


@pytest.mark.parametrize(
    ("encoded", "value"),
    [
        ("9fff", ()), ("9f018202039f0405ffff", (1, (2, 3), (4, 5))),
        ("bf61610161629f0203ffff", {"a": 1, "b": (2, 3)}), ("bfff", {}),
    ],
)  # fmt: skip
def test_indefinite_lengths_only_where_they_are_admitted(encoded, value):
    data = bytes.fromhex(encoded)
    assert cbor.decode(data, indefinite=True) == value
    with pytest.raises(cbor.CborError, match="indefinite"):
        cbor.decode(data)


@pytest.mark.parametrize("start", ["81", "a100", "c1", "9f", "bf00"])
def test_depth_is_limited(start):
    opened = bytes.fromhex(start)
    for depth, ends in ((cbor.MAX_DEPTH, True), (cbor.MAX_DEPTH + 1, False), (100_000, False)):
        closed = b"\xff" * depth if opened[0] & 0x1F == 0x1F else b""
        data = opened * depth + b"\x00" + closed
        if ends:
            cbor.decode(data, indefinite=True, tags=True)
        else:
            with pytest.raises(cbor.CborError, match="deeper"):
                cbor.decode(data, indefinite=True, tags=True)


def test_items_are_limited():
    def of(count):
        return b"\x99" + count.to_bytes(2, "big") + bytes(count)

    assert len(cbor.decode(of(cbor.MAX_ITEMS - 1))) == cbor.MAX_ITEMS - 1
    with pytest.raises(cbor.CborError, match="more"):
        cbor.decode(of(cbor.MAX_ITEMS))


def test_a_boolean_is_no_second_form_of_an_integer():
    assert cbor.decode(b"\x82\x01\xf5") == (1, True)
    assert isinstance(cbor.decode(b"\xf5"), bool)
    assert not isinstance(cbor.decode(b"\x01"), bool)


@given(VALUES)
def test_what_another_encoder_writes_is_read_as_the_same(value):
    assert plain(cbor.decode(cbor2.dumps(value))) == value
    assert plain(cbor.decode(cbor2.dumps(value, canonical=True))) == value


@given(st.binary(max_size=70000), st.text(max_size=300))
def test_encoding_is_another_encoders(data, text):
    assert cbor.byte_string(data) == cbor2.dumps(data)
    assert cbor.text_string(text) == cbor2.dumps(text)
    assert cbor.array(cbor.byte_string(data), cbor.text_string(text)) == cbor2.dumps([data, text])


@pytest.mark.parametrize("size", [0, 23, 24, 255, 256, 65535, 65536])
def test_heads_at_their_bounds(size):
    assert cbor.byte_string(bytes(size)) == cbor2.dumps(bytes(size))
    assert cbor.decode(cbor.byte_string(bytes(size))) == bytes(size)


def test_fuzzed_items_are_refused_or_read_as_another_decoder_does():
    draw = random.Random(1)
    seeds = [
        cbor2.dumps({1: -35, 3: "application/json", "iss": "x", "list": [1, 2, {"a": b"b" * 30}]}),
        cbor2.dumps([b"\xa1\x01\x38\x22", {}, b"p" * 300, b"s" * 96]),
        cbor2.dumps({"pcrs": {n: bytes(48) for n in range(16)}, "nonce": None, "t": 2**40}),
        bytes.fromhex("bf61610161629f0203ffff"),
    ]

    def read(data: bytes):
        value = cbor.decode(data, indefinite=True)
        assert plain(value) == cbor2.loads(data, allow_duplicate_keys=False)

    inputs = (mutated(draw.choice(seeds), draw) for _ in range(COUNT))
    assert feed(read, inputs, (cbor.CborError,)) > COUNT // 100
