import pytest
from hypothesis import given
from hypothesis import strategies as st

from casemate.attest import der


@pytest.mark.parametrize(
    "data",
    [
        b"", b"\x02", b"\x02\x01", b"\x02\x80\x00\x00", b"\x02\x81\x01\x00", b"\x02\x82\x00\x80",
        b"\x1f\x01\x00", b"\x02\x85\x00\x00\x00\x00\x01\x00", b"\x02\x05\x00\x00\x00\x00",
    ],
)  # fmt: skip
def test_an_element_has_one_form(data):
    with pytest.raises(der.DerError):
        der.Reader(data).element()


def test_elements_come_in_order_and_nothing_is_left():
    reader = der.Reader(b"\x02\x01\x05\x05\x00")
    assert reader.peek() == der.INTEGER
    assert reader.raw(der.INTEGER) == b"\x02\x01\x05"
    with pytest.raises(der.DerError, match="left over"):
        reader.end()
    assert reader.read(der.NULL) == b""
    reader.end()
    assert reader.peek() == -1
    with pytest.raises(der.DerError, match="tag"):
        der.only(b"\x02\x01\x05", der.SEQUENCE)


@given(st.integers(-(2**200), 2**200))
def test_integers(value):
    size = (value + (value < 0)).bit_length() // 8 + 1
    content = value.to_bytes(size, "big", signed=True)
    assert der.integer(content) == value
    padding = b"\xff" if value < 0 else b"\0"
    with pytest.raises(der.DerError):
        der.integer(padding + content)


@pytest.mark.parametrize(
    ("content", "dotted"),
    [
        ("2b0601040119", "1.3.6.1.4.1.25"),
        ("2a864886f70d01010a", "1.2.840.113549.1.1.10"),
        ("2b060104019c78010308", "1.3.6.1.4.1.3704.1.3.8"),
        ("883703", "2.999.3"),
        ("00", "0.0"),
    ],
)
def test_oids(content, dotted):
    assert der.oid(bytes.fromhex(content)) == dotted


@pytest.mark.parametrize("content", ["", "80", "2b80", "2b8001", "ff" * 70])
def test_oids_have_one_form(content):
    with pytest.raises(der.DerError):
        der.oid(bytes.fromhex(content))


@pytest.mark.parametrize(
    ("tag", "content", "seconds"),
    [
        (der.UTC_TIME, b"700101000000Z", 0.0),
        (der.UTC_TIME, b"491231235959Z", 2524607999.0),
        (der.UTC_TIME, b"500101000000Z", -631152000.0),
        (der.GENERALIZED_TIME, b"20500101000000Z", 2524608000.0),
    ],
)
def test_times(tag, content, seconds):
    assert der.time(tag, content) == seconds


@pytest.mark.parametrize(
    ("tag", "content"),
    [
        (der.UTC_TIME, b"7001010000Z"), (der.UTC_TIME, b"700101000000+0100"),
        (der.UTC_TIME, b"701301000000Z"), (der.UTC_TIME, b"700230000000Z"),
        (der.UTC_TIME, b"700101000060Z"), (der.UTC_TIME, b"700101240000Z"),
        (der.GENERALIZED_TIME, b"700101000000Z"), (der.GENERALIZED_TIME, b"00000101000000Z"),
        (der.GENERALIZED_TIME, b"20500101000000.5Z"), (der.OCTET_STRING, b"700101000000Z"),
    ],
)  # fmt: skip
def test_times_of_other_forms(tag, content):
    with pytest.raises(der.DerError):
        der.time(tag, content)


def test_small_kinds():
    assert der.boolean(b"\xff") is True
    assert der.boolean(b"\x00") is False
    assert der.bits(b"\x00ab") == b"ab"
    for call, content in (
        (der.boolean, b"\x01"), (der.boolean, b""), (der.bits, b""), (der.bits, b"\x01a"),
        (der.integer, b""),
    ):  # fmt: skip
        with pytest.raises(der.DerError):
            call(content)
    for tag, content in ((der.UTF8_STRING, b"\xff"), (der.IA5_STRING, b"\x80"), (der.NULL, b"")):
        with pytest.raises(der.DerError):
            der.text(tag, content)


@given(st.binary(max_size=60))
def test_whatever_is_read_would_be_written_so_again(data):
    reader = der.Reader(data)
    whole = b""
    try:
        while reader:
            whole += reader.element()[2]
    except der.DerError:
        return
    assert whole == data
