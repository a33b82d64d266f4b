"""Canonical JSON: one value, one sequence of bytes."""

import json
import math
import subprocess
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from casemate.spec import canonical
from casemate.spec.errors import FormatError

SCALARS = (
    st.none()
    | st.booleans()
    | st.integers(-canonical.MAX_INT, canonical.MAX_INT)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(st.characters(codec="utf-8"))
)
VALUES = st.recursive(
    SCALARS,
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.dictionaries(st.text(st.characters(codec="utf-8")), inner, max_size=4)
    ),
    max_leaves=20,
)


def refused(data):
    with pytest.raises(FormatError) as e:
        canonical.decode(data)
    return e.value.code


def same(a, b):
    """Equal with equal types: 1, 1.0 and True differ, and so do 0.0 and -0.0."""
    if type(a) is not type(b):
        return False
    if isinstance(a, list):
        return len(a) == len(b) and all(map(same, a, b))
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    if isinstance(a, float):
        return a == b and math.copysign(1, a) == math.copysign(1, b)
    return a == b


@given(VALUES)
def test_what_is_encoded_decodes_to_the_same(value):
    data = canonical.encode(value)
    assert same(canonical.decode(data), value)
    assert same(json.loads(data), value)  # any JSON reader understands it


@given(VALUES, st.data())
def test_any_changed_byte_is_refused_or_another_canonical_value(value, draw):
    data = bytearray(canonical.encode(value))
    at = draw.draw(st.integers(0, len(data) - 1))
    data[at] = draw.draw(st.integers(0, 255))
    try:
        again = canonical.decode(bytes(data))
    except FormatError:
        return
    assert canonical.encode(again) == bytes(data)


@given(st.binary(max_size=60))
def test_any_bytes_are_refused_or_canonical(data):
    try:
        value = canonical.decode(data)
    except FormatError:
        return
    assert canonical.encode(value) == data


@pytest.mark.parametrize(
    ("data", "code"),
    [
        (b"", "format.json"),
        (b" 1", "format.not-canonical"),
        (b"1 ", "format.not-canonical"),
        (b"1\n", "format.not-canonical"),
        (b"[1, 2]", "format.not-canonical"),
        (b'{"b":1,"a":2}', "format.not-canonical"),
        (b'{"a":1,"a":1}', "format.duplicate-key"),
        (b'{"a":{"b":1,"b":2}}', "format.duplicate-key"),
        (b'{"a":1,"\\u0061":2}', "format.duplicate-key"),
        (b'{"\\u0061":1}', "format.not-canonical"),
        (b'"\\/"', "format.not-canonical"),
        (b'"\\u00e9"', "format.not-canonical"),
        (b'"\\ud800"', "format.unicode"),
        (b'"\\udc00\\ud800"', "format.unicode"),
        (b'"\\ud83e\\udd8a"', "format.not-canonical"),
        (b'"\xed\xa0\x80"', "format.json"),
        (b'"\xc0\xaf"', "format.json"),
        (b"\xef\xbb\xbf1", "format.json"),
        (b'"\x01"', "format.json"),
        (b"NaN", "format.number"),
        (b"Infinity", "format.number"),
        (b"-Infinity", "format.number"),
        (b"1e400", "format.number"),
        (b"-1e400", "format.number"),
        (b"[1e400]", "format.number"),
        (b"9007199254740992", "format.number"),
        (b"-9007199254740992", "format.number"),
        (b"1" * 4000, "format.number"),
        (b"1" * 5000, "format.json"),
        (b"-0", "format.not-canonical"),
        (b"1.10", "format.not-canonical"),
        (b"1E5", "format.not-canonical"),
        (b"1e5", "format.not-canonical"),
        (b"1e-999", "format.not-canonical"),
        (b"0.1000000000000000055511151231257827", "format.not-canonical"),
        (b"01", "format.json"),
        (b"+1", "format.json"),
        (b".5", "format.json"),
        (b"1.", "format.json"),
        (b"True", "format.json"),
        (b"'a'", "format.json"),
        (b"[1,]", "format.json"),
        (b"1 2", "format.json"),
        (b"[" * 65 + b"]" * 65, "format.too-deep"),
        (b"[" * 100_000, "format.too-deep"),
        (b'{"a":' * 65 + b"1" + b"}" * 65, "format.too-deep"),
    ],
)
def test_hostile_forms(data, code):
    assert refused(data) == code


@pytest.mark.parametrize("data", [b"[" * 300_000 + b"]" * 300_000, b'[{"":' * 90_000])
def test_depth_is_not_left_to_the_limit_of_recursion(data):
    """With that limit raised, as some libraries do, a parser would end the process."""
    code = """
import sys
from casemate.spec import canonical
from casemate.spec.errors import FormatError
sys.setrecursionlimit(1_000_000)
try:
    canonical.decode(sys.stdin.buffer.read())
except FormatError as e:
    print(e.code)
"""
    done = subprocess.run([sys.executable, "-c", code], input=data, capture_output=True, check=True)
    assert done.stdout == b"format.too-deep\n"


def test_many_brackets_side_by_side_are_not_deep():
    wide = [[{}, "]][[", ['\\"']] for _ in range(2000)]
    assert canonical.decode(canonical.encode(wide)) == wide


def test_the_limits_themselves_are_admitted():
    deep = b"[" * 64 + b"]" * 64
    assert canonical.encode(canonical.decode(deep)) == deep
    assert canonical.decode(b"9007199254740991") == 2**53 - 1
    brackets_in_text = json.dumps("[" * 200).encode()
    assert canonical.decode(brackets_in_text) == "[" * 200
    assert canonical.decode(b"123", limit=3) == 123
    with pytest.raises(FormatError, match="4 bytes"):
        canonical.decode(b"1234", limit=3)


def test_signs_of_zero_and_kinds_of_numbers_are_kept_apart():
    assert canonical.encode([0, 0.0, -0.0, 1, 1.0]) == b"[0,0.0,-0.0,1,1.0]"
    assert math.copysign(1, canonical.decode(b"-0.0")) == -1


def test_look_alike_keys_are_different_keys():
    """No normalisation: é composed, é decomposed, and a Cyrillic а."""
    value = {"\u00e9": 1, "e\u0301": 2, "a": 3, "\u0430": 4}
    assert canonical.decode(canonical.encode(value)) == value


def test_keys_are_sorted_by_code_point():
    assert canonical.encode({"\U0001f98a": 1, "\uffff": 2, "z": 3}) == (
        '{"z":3,"\uffff":2,"\U0001f98a":1}'.encode()
    )


@pytest.mark.parametrize(
    "value",
    [
        math.nan,
        math.inf,
        2**53,
        -(10**400),
        "\ud800",
        {"\udfff": 1},
        {1: 2},
        {None: 1},
        b"x",
        {1, 2},
        object(),
    ],
)
def test_values_without_a_form_are_refused(value):
    with pytest.raises(FormatError):
        canonical.encode(value)
    with pytest.raises(FormatError):
        canonical.encode([value])


def test_a_value_that_is_too_deep_is_refused():
    value = []
    for _ in range(10_000):
        value = [value]
    with pytest.raises(FormatError, match="deeper"):
        canonical.encode(value)


def test_digest():
    assert canonical.digest({}) == (
        "sha256:44136fa355b3678a1146ad16f7e8649e94fb4fc21fe77e8310c060f61caaff8a"
    )
