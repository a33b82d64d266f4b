"""Noise added in place, native and by the twin."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from casemate.engine import native, noise

KEY = bytes(range(32))


@pytest.fixture(params=["native", "twin"], autouse=True)
def side(request, monkeypatch):
    if request.param == "twin":
        monkeypatch.setattr(noise, "_helper", lambda: None)
        monkeypatch.setattr(noise, "_CHUNK", 100)
    elif noise._helper() is None:
        pytest.skip(f"no native noise: {native.reason('noise') or 'no AES instructions'}")


def test_adding_is_the_sum():
    rng = np.random.default_rng(1)
    for count in (0, 1, 5, 513, 40_001):
        total = rng.integers(-(2**60), 2**60, count)
        expected = total + noise.gaussian(KEY, 4, count, 1e7)
        noise.add_gaussian(total, KEY, 4, 1e7)
        assert np.array_equal(total, expected)


def test_adding_stays_within_the_vector():
    for count in (1, 2, 511, 513, 1001):
        room = np.full(count + 20, 7, dtype=np.int64)
        noise.add_gaussian(room[10 : 10 + count], KEY, 0, 1e6)
        assert (room[:10] == 7).all() and (room[10 + count :] == 7).all()


@st.composite
def windows(draw):
    """A vector's length, its number in the step's, and where it is cut, evenly, into parts."""
    count = draw(st.integers(0, 1500))
    cuts = draw(st.sets(st.integers(0, count // 2).map(lambda half: 2 * half), max_size=6))
    first = draw(st.sampled_from([0, 2, 98, 510, 2**48, 2**49 - 1500]))
    return count, first, sorted({0, count} | cuts)


@settings(
    max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(windows(), st.sampled_from([2.0**-45, 2.0**-12]))
def test_windows_one_by_one_make_the_whole(window, error):
    """Also where pairs take the long way, and the native list of them is full before the end."""
    count, first, cuts = window
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(noise, "ERROR", max(error, noise.ERROR))
        patch.setattr(noise, "NATIVE_ERROR", error)
        patch.setattr(noise, "_ROOM", 300)
        whole = np.arange(count)
        noise.add_gaussian(whole, KEY, 3, 300.0, first)
        parts = np.arange(count)
        for a, b in itertools.pairwise(cuts):
            noise.add_gaussian(parts[a:b], KEY, 3, 300.0, first + a)
    assert np.array_equal(parts, whole)


@pytest.mark.parametrize("first", [2, 200, 512, 40_000])
def test_an_offset_counts_draws_of_the_steps_vector(first):
    whole = noise.gaussian(KEY, 4, first + 700, 1e7)
    part = np.zeros(700, dtype=np.int64)
    noise.add_gaussian(part, KEY, 4, 1e7, first)
    assert np.array_equal(part, whole[first:])


READ_ONLY = np.zeros(4, dtype=np.int64)
READ_ONLY.flags.writeable = False


@pytest.mark.parametrize(
    "total",
    [
        np.zeros(4),
        np.zeros(4, dtype=np.int32),
        np.zeros(4, dtype=">i8"),
        np.zeros((2, 2), dtype=np.int64),
        np.zeros(8, dtype=np.int64)[::2],
        np.frombuffer(bytearray(33), dtype=np.int64, offset=1),
        READ_ONLY,
    ],
    ids=["float", "int32", "big-endian", "matrix", "strided", "unaligned", "read-only"],
)
def test_other_arrays_are_refused(total):
    with pytest.raises(ValueError):
        noise.add_gaussian(total, KEY, 0, 1e6)
    assert not total.any()


def test_what_is_out_of_range_is_refused_and_adds_nothing():
    total = np.zeros(4, dtype=np.int64)
    cases = [(KEY, -1, 2.0), (KEY, 2**64, 2.0), (b"short", 0, 2.0)]
    cases += [(KEY, 0, scale) for scale in (0.5, 2.0**33, float("nan"))]
    cases += [(KEY, 0, 2.0, first) for first in (-2, -1, 1, 3, 2**49 - 2, 2**49, 2**65)]
    for case in cases:
        with pytest.raises(ValueError):
            noise.add_gaussian(total, *case)
    assert not total.any()
    noise.add_gaussian(total, KEY, 0, 1e6, 2**49 - 4)
    assert total.all()
