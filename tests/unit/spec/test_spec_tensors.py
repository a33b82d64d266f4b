"""safetensors: read by the public library, and in one form only."""

import json
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from casemate.spec import canonical, tensors
from casemate.spec.errors import FormatError

NAMES = st.text(st.characters(min_codepoint=32, max_codepoint=126), min_size=1, max_size=12)
SHAPES = st.lists(st.integers(0, 4), max_size=3).map(tuple)


@st.composite
def files(draw):
    out = {}
    for name in draw(st.lists(NAMES, max_size=5, unique=True)):
        dtype, shape = draw(st.sampled_from(sorted(tensors.DTYPES))), draw(SHAPES)
        size = tensors.DTYPES[dtype][1] * math.prod(shape)
        out[name] = (dtype, shape, draw(st.binary(min_size=size, max_size=size)))
    return out


def loaded(data):
    return {n: (t.dtype, t.shape, bytes(view)) for n, (t, view) in tensors.load(data).items()}


@given(files())
def test_what_is_dumped_loads(made):
    data = tensors.dump(made)
    assert loaded(data) == made
    infos = [t for t, _ in tensors.load(data).values()]
    assert tensors.total_bytes(infos) == sum(len(b) for _, _, b in made.values())


@given(files(), st.data())
def test_any_changed_byte_is_refused_or_another_file_in_its_one_form(made, draw):
    data = bytearray(tensors.dump(made))
    at = draw.draw(st.integers(0, len(data) - 1))
    data[at] = draw.draw(st.integers(0, 255))
    try:
        again = loaded(bytes(data))
    except FormatError:
        return
    assert tensors.dump(again) == bytes(data)


@given(files(), st.data())
def test_any_cut_or_tail_is_refused(made, draw):
    data = tensors.dump(made)
    cut = draw.draw(st.integers(0, len(data) - 1))
    for bad in (data[:cut], data + b"\0", data + data):
        with pytest.raises(FormatError):
            tensors.load(bad)


def test_the_public_library_reads_it():
    numpy = pytest.importorskip("numpy")
    safetensors = pytest.importorskip("safetensors.numpy")
    arrays = {
        "weight": numpy.arange(6, dtype="<f4").reshape(2, 3),
        "ids": numpy.array([-1, 2**40], dtype="<i8"),
        "small": numpy.array([[7]], dtype="<i4"),
        "flags": numpy.array([True, False]),
        "pixels": numpy.array([0, 255], dtype="u1"),
    }
    kinds = {"<f4": "f32", "<i8": "i64", "<i4": "i32", "|b1": "bool", "|u1": "u8"}
    data = tensors.dump({n: (kinds[a.dtype.str], a.shape, a.tobytes()) for n, a in arrays.items()})
    read = safetensors.load(data)
    assert read.keys() == arrays.keys()
    assert all((read[n] == arrays[n]).all() and read[n].dtype == arrays[n].dtype for n in arrays)


def with_header(header, body=bytes(8), pad=True):
    text = header if isinstance(header, bytes) else canonical.encode(header)
    text += b" " * (-len(text) % 8) if pad else b""
    return len(text).to_bytes(8, "little") + text + body


def entry(**changed):
    return {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]} | changed


def test_the_plain_form_is_admitted():
    assert loaded(with_header({"a": entry()})) == {"a": ("f32", (2,), bytes(8))}


@pytest.mark.parametrize(
    "data",
    [
        b"", bytes(7), bytes(8), b"\xff" * 8, (2**40).to_bytes(8, "little") + b"{}",
        with_header(b"[]"), with_header(b"null"), with_header(b"x"), with_header(b"{}", pad=False),
        with_header(b"{}" + b" " * 14, body=b""),
        with_header({"a": entry(dtype="F64")}), with_header({"a": entry(dtype="f32")}),
        with_header({"a": entry(dtype=None)}), with_header({"a": entry(dtype=["F32"])}),
        with_header({"a": entry(shape=[2.0])}), with_header({"a": entry(shape=[True, 2])}),
        with_header({"a": entry(shape=[-2])}), with_header({"a": entry(shape=2)}),
        with_header({"a": entry(shape=[1] * 9)}), with_header({"a": entry(shape=[2**41])}),
        with_header({"a": entry(shape=[2**39, 2**39])}),
        with_header({"a": entry(data_offsets=[0.0, 8.0])}),
        with_header({"a": entry(data_offsets=[False, 8])}),
        with_header({"a": entry(data_offsets=[0, 4])}),
        with_header({"a": entry(data_offsets=[8, 16])}),
        with_header({"a": entry(data_offsets=[8, 0])}), with_header({"a": entry(data_offsets={})}),
        with_header({"a": entry(x=1)}), with_header({"a": 1}), with_header({"a": {}}),
        with_header({"": entry()}), with_header({"é": entry()}), with_header({"a\n": entry()}),
        with_header({"a" * 513: entry()}), with_header({"__metadata__": {"a": "b"}, "a": entry()}),
        with_header({"a": entry(), "b": entry()}),
        with_header({"a": entry(), "b": entry(data_offsets=[16, 24])}, bytes(24)),
        with_header({"a": entry(data_offsets=[8, 16]), "b": entry()}, bytes(16)),
        with_header({"a": entry()}, bytes(7)), with_header({"a": entry()}, bytes(9)),
        with_header(b'{"a":{"dtype":"F32","data_offsets":[0,8],"shape":[2]}}'),
        with_header(json.dumps({"a": entry()}).encode()),
    ],
)  # fmt: skip
def test_other_forms_are_refused(data):
    with pytest.raises(FormatError):
        tensors.load(data)


def test_too_many_tensors_are_refused(monkeypatch):
    monkeypatch.setattr(tensors, "MAX_TENSORS", 2)
    good = dict.fromkeys("ab", ("u8", (1,), b"x"))
    assert loaded(tensors.dump(good)) == good
    with pytest.raises(FormatError):
        tensors.load(tensors.dump(good | {"c": ("u8", (1,), b"x")}))


def test_a_dump_of_the_wrong_length_is_a_fault_of_the_caller():
    with pytest.raises(ValueError, match="'a'"):
        tensors.dump({"a": ("f32", (2,), bytes(7))})
