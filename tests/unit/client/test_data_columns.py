"""Numbers to the wire: both ways of packing agree, and nothing steps over its bounds."""

import math
import struct

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from casemate.client.data.columns import F32_MAX, Block, Target, f32_within, pack
from casemate.spec.errors import DataError

FLOATS = st.floats(-1e30, 1e30) | st.floats(-2, 2) | st.sampled_from([0.0, -0.0, 0.1, 5e-324])


def block(raw):
    return Block({"x": raw}, range(1, len(raw) + 1))


def unpacked(data):
    return list(struct.unpack(f"<{len(data) // 4}f", data))


@st.composite
def targets(draw):
    low, high = sorted(draw(st.tuples(FLOATS, FLOATS)))
    scale = draw(st.sampled_from(["none", "unit", "symmetric"]))
    assume(low < high)
    least, most = f32_within(low, high)
    assume(least <= most)
    return Target("x", "f32", low=low, high=high, scale=scale)


@given(targets(), st.lists(st.floats(0, 1), min_size=1, max_size=9))
def test_cells_and_arrays_agree_and_keep_the_wire_bounds(target, parts):
    low, high = target.bounds
    target.column()
    values = [min(max(low + p * (high - low), low), high) for p in parts] + [low, high]
    from_array = bytes(pack(target, block(np.array(values))))
    assert (
        from_array == pack(target, block([repr(v) for v in values])) == pack(target, block(values))
    )
    least, most = target.column().wire_bounds
    assert all(least <= v <= most for v in unpacked(from_array))


@given(FLOATS, FLOATS)
def test_the_extreme_float32_within_bounds(a, b):
    low, high = sorted((a, b))
    least, most = f32_within(low, high)
    for inner, outward in ((least, -math.inf), (most, math.inf)):
        assert np.float32(inner) == inner
        beyond = float(np.nextafter(np.float32(inner), np.float32(outward)))
        assert not low <= beyond <= high
    assert least > most or (low <= least and most <= high)


@pytest.mark.parametrize(
    ("dtype", "low", "high", "code"),
    [
        ("f32", 0.1, 0.1, "data.bounds"),
        ("f32", 0, 2 * F32_MAX, "data.bounds"),
        ("f32", 0, math.inf, "data.bounds"),
        ("u8", 0, 256, "data.bounds"),
        ("u8", -1, 5, "data.bounds"),
        ("i32", 0, 2**31, "data.bounds"),
        ("i64", 0, 2**53, "data.bounds"),
        ("f32", 1, 0, "data.column"),
        ("f32", None, 1, "data.column"),
        ("f32", math.nan, 1, "data.column"),
    ],
)
def test_impossible_bounds(dtype, low, high, code):
    with pytest.raises(DataError) as e:
        Target("x", dtype, low=low, high=high).column()
    assert e.value.code == code and e.value.where == "x"


def test_a_float32_source_may_lie_at_the_rounded_bound():
    x = np.array([0.1], np.float32)  # above 0.1 as a double
    data = pack(Target("x", "f32", low=0, high=0.1), block(x))
    assert unpacked(data)[0] <= 0.1
    with pytest.raises(DataError):
        pack(Target("x", "f32", low=0, high=0.1), block(x.astype(np.float64)))


@pytest.mark.parametrize(
    "raw", [["2", 2, "2.0", 2.0], np.array([2.0] * 4), np.array([2] * 4, "u1")]
)
@pytest.mark.parametrize(("dtype", "code"), [("i64", "q"), ("i32", "i"), ("u8", "B")])
def test_whole_numbers(raw, dtype, code):
    data = pack(Target("x", dtype, low=0, high=9), block(raw))
    assert struct.unpack(f"<4{code}", data) == (2,) * 4


@pytest.mark.parametrize("raw", [["1.5"], [1.5], np.array([1.5])])
def test_fractions_are_no_whole_numbers(raw):
    with pytest.raises(DataError, match="not-an-integer"):
        pack(Target("x", "i64", low=0, high=9), block(raw))


@pytest.mark.parametrize("value", [2**60 + 1, -(2**60)])
def test_large_integers_are_compared_exactly(value):
    target = Target("x", "i64", low=-(2**53) + 1, high=2**53 - 1)
    for raw in ([str(value)], [value], np.array([value])):
        with pytest.raises(DataError, match="out-of-bounds"):
            pack(target, block(raw))
    assert struct.unpack("<q", pack(target, block([str(2**53 - 1)]))) == (2**53 - 1,)
    with pytest.raises(DataError, match="out-of-bounds"):
        pack(target, block(np.array([2**64 - 1], np.uint64)))


def test_booleans():
    target = Target("x", "bool")
    assert pack(target, block(["true", "FALSE", "1", 0, True])) == b"\1\0\1\0\1"
    assert bytes(pack(target, block(np.array([True, False])))) == b"\1\0"
    assert bytes(pack(target, block(np.array([1.0, 0.0])))) == b"\1\0"
    for raw in (["yes"], [2], np.array([2]), np.array([0.5])):
        with pytest.raises(DataError, match="not-a-bool"):
            pack(target, block(raw))
    with pytest.raises(DataError, match="missing-value"):
        pack(target, block([""]))


def test_shapes_must_be_the_declared_ones():
    target = Target("x", "f32", (2,), low=0, high=9)
    with pytest.raises(DataError, match="shape"):
        pack(target, block(np.zeros((3, 3))))
    with pytest.raises(DataError, match="shape"):
        pack(target, block(["1"]))


def test_classes_by_their_words():
    target = Target("x", "i64", low=0, high=1, role="label", classes=("3", "7"))
    assert struct.unpack("<3q", pack(target, block(np.array([7, 3, 7])))) == (1, 0, 1)
    with pytest.raises(DataError, match="label-range"):
        pack(target, block(np.array([5])))
    with pytest.raises(DataError, match="unknown-class"):
        pack(Target("x", "i64", low=0, high=0, classes=("a",)), block(["b"]))


def test_a_scale_from_the_rows_would_be_caught():
    """Seeded bug: scaling by what the rows hold instead of what is declared (rule P2)."""
    target = Target("x", "f32", low=0, high=100, scale="unit")
    alone, among = pack(target, block([50.0])), pack(target, block([50.0, 80.0]))
    assert alone == among[:4]
