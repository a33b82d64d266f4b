"""Formats: strict, whole, and the same after a round trip."""

import json
import types
import typing
from typing import Any, Literal, Union

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from casemate.spec import canonical, codec
from casemate.spec.codec import value
from casemate.spec.errors import CasemateError, FormatError
from support import formats

FORMATS = formats.formats()
TEXT = st.text(st.characters(codec="utf-8"), max_size=12)
INTS = st.integers(-canonical.MAX_INT, canonical.MAX_INT)
FLOATS = st.floats(allow_nan=False, allow_infinity=False)


def strategy(hint: Any) -> st.SearchStrategy:
    """Values of a field's type."""
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin is Literal:
        return st.sampled_from(args)
    if origin in (Union, types.UnionType):
        return st.one_of([st.none() if a is type(None) else strategy(a) for a in args])
    if origin is tuple:
        return st.lists(strategy(args[0]), max_size=2).map(tuple)
    if origin is dict:
        return st.dictionaries(TEXT, strategy(args[1]), max_size=2)
    if hasattr(hint, "__casemate_type__"):
        return values(hint)
    return {bool: st.booleans(), int: INTS, float: FLOATS, str: TEXT, bytes: st.binary(max_size=9)}[
        hint
    ]


def values(kind: type) -> st.SearchStrategy:
    """Values of a format: any that its own checks admit, else the sample."""
    if kind.__casemate_type__ in formats.FIELDS:
        return st.just(formats.sample(kind))
    fields = {k: strategy(h) for k, h in typing.get_type_hints(kind).items()}

    def make(made: dict[str, Any]) -> Any:
        try:
            return kind(**made)
        except ValueError:
            return formats.sample(kind)

    return st.fixed_dictionaries(fields).map(make)


@pytest.mark.parametrize("name", FORMATS)
@settings(max_examples=8, suppress_health_check=list(HealthCheck))
@given(data=st.data())
def test_every_format_survives_a_round_trip(name, data):
    item = data.draw(values(FORMATS[name]))
    encoded = codec.encode(item)
    again = codec.decode(FORMATS[name], encoded)
    assert again == item
    assert codec.encode(again) == encoded
    assert codec.digest(again) == codec.digest(item)


@pytest.mark.parametrize("name", FORMATS)
@settings(max_examples=20, suppress_health_check=list(HealthCheck))
@given(data=st.data())
def test_any_changed_byte_is_refused_or_another_value(name, data):
    encoded = bytearray(codec.encode(formats.sample(FORMATS[name])))
    at = data.draw(st.integers(0, len(encoded) - 1))
    encoded[at] = data.draw(st.integers(32, 126) | st.integers(0, 255))
    try:
        item = codec.decode(FORMATS[name], bytes(encoded))
    except CasemateError:
        return
    assert codec.encode(item) == bytes(encoded)


WRONG = [None, True, 1, 1.5, "x", "é", [], [1], {}, {"type": "column/v1"}, "0" * 43, -1, 10**15]


@pytest.mark.parametrize("name", FORMATS)
def test_every_field_refuses_other_types_without_a_foreign_exception(name):
    tree = json.loads(formats.golden(name).read_bytes())
    for field in tree:
        for wrong in WRONG:
            changed = canonical.encode(tree | {field: wrong})
            try:
                item = codec.decode(FORMATS[name], changed)
            except CasemateError as e:
                assert e.code.startswith("format.")
            else:
                assert codec.encode(item) == changed
        fewer = {k: v for k, v in tree.items() if k != field}
        with pytest.raises(FormatError):
            codec.decode(FORMATS[name], canonical.encode(fewer))


@pytest.mark.parametrize("key", ["x", "Type", "typе", "name ", "nаme", "", "__class__"])
def test_unknown_and_look_alike_fields_are_refused(key):
    tree = json.loads(formats.golden("column/v1").read_bytes())
    with pytest.raises(FormatError) as e:
        codec.decode(FORMATS["column/v1"], canonical.encode(tree | {key: 1}))
    assert e.value.code == "format.field"


@pytest.mark.parametrize("kind", ["column/v2", "Column/v1", "schema/v1", "", None, 1, [], {}])
def test_another_version_is_refused(kind):
    tree = json.loads(formats.golden("column/v1").read_bytes())
    with pytest.raises(FormatError) as e:
        codec.decode(FORMATS["column/v1"], canonical.encode(tree | {"type": kind}))
    assert e.value.code == "format.version"


@value("test-inner/v1")
class Inner:
    number: int | None = None


@value("test-outer/v1")
class Outer:
    inners: tuple[Inner, ...] = ()
    data: bytes = b""
    rate: float = 0.0
    flag: bool = False
    cap: float | None = None


def outer(**changed):
    tree = json.loads(codec.encode(Outer())) | changed
    return codec.decode(Outer, canonical.encode(tree))


def test_an_error_says_where():
    good = {"type": "test-inner/v1", "number": 1}
    with pytest.raises(FormatError) as e:
        outer(inners=[good, good | {"number": "1"}])
    assert e.value.where == "inners[1].number"
    assert "inners[1].number" in e.value.message


@pytest.mark.parametrize("text", ["=", "YQ==", "YR", "a", "a\n", "ä", "Y Q", "+/+/", "YQ\n"])
def test_only_canonical_base64url_is_bytes(text):
    with pytest.raises(FormatError):
        outer(data=text)


def test_numbers_and_booleans_are_kept_apart():
    for changed in ({"rate": 1}, {"rate": True}, {"flag": 1}, {"flag": 0.0}, {"cap": 2}):
        with pytest.raises(FormatError):
            outer(**changed)
    assert outer(rate=1.0, cap=2.0).cap == 2.0
    for number in (True, False, 1.0):
        with pytest.raises(FormatError):
            outer(inners=[{"type": "test-inner/v1", "number": number}])


def test_a_whole_number_for_a_float_becomes_a_float():
    """So that Dp(epsilon=2) on one side is readable on the other."""
    made = Outer(rate=2, cap=3)
    assert type(made.rate) is float and type(made.cap) is float
    assert codec.decode(Outer, codec.encode(made)) == made
    assert codec.digest(made) == codec.digest(Outer(rate=2.0, cap=3.0))


def test_a_check_of_the_format_becomes_a_format_error():
    tree = json.loads(formats.golden("budget/v1").read_bytes())
    with pytest.raises(FormatError, match=r"epsilon must be above 0"):
        codec.decode(FORMATS["budget/v1"], canonical.encode(tree | {"epsilon": -1.0}))


def test_what_is_no_format_is_a_fault_of_the_caller():
    with pytest.raises(TypeError):
        codec.encode(object())
    with pytest.raises(TypeError):
        codec.decode(dict, b"{}")
    with pytest.raises(ValueError):
        value("policy/v1")(type("Another", (), {"__annotations__": {}}))


def test_a_decoder_that_lets_unknown_fields_pass_would_be_caught(monkeypatch):
    """Seeded bug: canonical form is not compared; the mutation test must then find two forms."""
    monkeypatch.setattr(canonical, "decode", lambda data, **_: json.loads(data))
    loose = b' {"type":"test-inner/v1","number":1}'
    assert codec.encode(codec.decode(Inner, loose)) != loose


@value("grown/v1", later=("more", "half"))
class Grown:
    name: str
    more: int = 0
    half: float = 0.5


def test_a_field_that_joined_later_is_written_only_off_its_default():
    """What was written before has the same bytes, and every value has one form alone."""
    before = b'{"name":"a","type":"grown/v1"}'
    assert codec.encode(Grown(name="a")) == before
    assert codec.decode(Grown, before) == Grown(name="a")
    grown = Grown(name="a", more=3)
    assert codec.encode(grown) == b'{"more":3,"name":"a","type":"grown/v1"}'
    assert codec.decode(Grown, codec.encode(grown)) == grown
    for bad in (
        b'{"more":0,"name":"a","type":"grown/v1"}',
        b'{"half":0.5,"name":"a","type":"grown/v1"}',
    ):
        with pytest.raises(FormatError, match="has its default"):
            codec.decode(Grown, bad)
    for bad in (
        b'{"more":0.5,"name":"a","type":"grown/v1"}',
        b'{"more":null,"name":"a","type":"grown/v1"}',
    ):
        with pytest.raises(FormatError):
            codec.decode(Grown, bad)


def test_a_field_that_joined_later_needs_a_default():
    with pytest.raises(ValueError, match="needs a default"):

        @value("headless/v1", later=("name",))
        class Headless:
            name: str
