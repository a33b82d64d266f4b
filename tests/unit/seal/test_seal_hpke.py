"""HPKE: opens with the right key and purpose only."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from casemate.seal import hpke
from casemate.spec.errors import FormatError
from casemate.spec.identity import SEAL_KEY_BYTES

KEY = hpke.generate()
MESSAGE = hpke.seal(KEY.public, b"the data key", info=b"purpose")


class Counting:
    """An Rng whose bytes are known."""

    def bytes(self, count: int) -> bytes:
        return bytes(i % 251 for i in range(count))


@given(st.binary(max_size=300), st.binary(max_size=60))
def test_what_was_sealed_opens(plaintext, info):
    message = hpke.seal(KEY.public, plaintext, info=info)
    assert len(message) == len(plaintext) + hpke.OVERHEAD
    assert KEY.open(message, info=info) == plaintext


def test_sealing_twice_gives_different_messages():
    assert hpke.seal(KEY.public, b"x", info=b"") != hpke.seal(KEY.public, b"x", info=b"")


def test_other_purpose_or_key_does_not_open():
    with pytest.raises(FormatError) as e:
        KEY.open(MESSAGE, info=b"another purpose")
    assert e.value.code == "format.sealed"
    with pytest.raises(FormatError):
        hpke.generate().open(MESSAGE, info=b"purpose")


@given(st.integers(0, len(MESSAGE) * 8 - 1))
def test_any_flipped_bit_is_refused(bit):
    bad = bytearray(MESSAGE)
    bad[bit // 8] ^= 1 << bit % 8
    with pytest.raises(FormatError) as e:
        KEY.open(bytes(bad), info=b"purpose")
    assert e.value.code == "format.sealed"


@given(st.integers(0, len(MESSAGE) - 1))
def test_any_cut_is_refused(length):
    with pytest.raises(FormatError):
        KEY.open(MESSAGE[:length], info=b"purpose")


@pytest.mark.parametrize(
    "key", [b"", b"\0" * 32, KEY.public[:-1], KEY.public + b"\0", b"\xff" * 1216]
)
def test_bytes_that_are_no_key_are_refused(key):
    with pytest.raises(FormatError) as e:
        hpke.seal(key, b"", info=b"")
    assert e.value.code == "format.seal-key"


def test_a_low_order_x25519_key_is_refused():
    with pytest.raises(FormatError):
        hpke.seal(KEY.public[:-32] + bytes(32), b"", info=b"")


def test_a_key_is_made_of_its_secret_alone():
    one, two = hpke.generate(Counting()), hpke.generate(Counting())
    assert one.public == two.public and len(one.public) == SEAL_KEY_BYTES
    assert two.open(hpke.seal(one.public, b"x", info=b""), info=b"") == b"x"
    with pytest.raises(ValueError):
        hpke.from_secret(b"short")


def test_a_private_key_does_not_show_itself():
    assert "_private" not in repr(KEY)
