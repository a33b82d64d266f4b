"""Noise added in place, native and by the twin."""

from __future__ import annotations

import numpy as np
import pytest

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
    for case in cases:
        with pytest.raises(ValueError):
            noise.add_gaussian(total, *case)
    assert not total.any()
