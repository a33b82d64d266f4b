"""The noise against its law and against 60-digit arithmetic, native and in numpy.

False alarm at most 1e-6 a test. That both give the same bits: tests/unit/engine/test_noise.py.
"""

from __future__ import annotations

import ctypes
import math
import re
from pathlib import Path

import mpmath
import numpy as np
import pytest

from casemate.engine import keystream, native, noise

KEY = b"\x21" * 32
N = 400_000


@pytest.fixture(params=["native", "twin"], autouse=True)
def side(request, monkeypatch):
    """Every test is of both."""
    if request.param == "twin":
        monkeypatch.setattr(noise, "_helper", lambda: None)
    elif noise._helper() is None:
        pytest.skip(f"no native noise: {native.reason('noise') or 'no AES instructions'}")
    return request.param


def draws(scale, key=KEY, step=0, count=N):
    return noise.gaussian(key, step, count, scale)


def kolmogorov(values: np.ndarray, scale: float) -> float:
    """sqrt(n) times the Kolmogorov-Smirnov distance to round(N(0, scale^2)), a discrete law, for
    which the continuous law's quantile is an upper bound."""
    points, counts = np.unique(values, return_counts=True)
    found = np.cumsum(counts) / len(values)
    upper = (points + 0.5) / scale / math.sqrt(2)
    expected = np.array([0.5 * math.erfc(-u) for u in upper])
    return math.sqrt(len(values)) * float(np.abs(found - expected).max())


# P[sqrt(n) D > 2.7] <= 2 exp(-2 * 2.7^2) = 9.3e-7 (Massart 1990).
@pytest.mark.parametrize("scale", [1.0, 3.7, 1000.0, 2.0**31])
def test_draws_have_the_law(scale):
    assert kolmogorov(draws(scale), scale) < 2.7


@pytest.mark.parametrize("wrong", [0.97, 1.03])
def test_the_law_test_rejects_a_scale_off_by_3_percent(wrong):
    assert kolmogorov(draws(1000.0 * wrong), 1000.0) > 2.7


def test_variance_is_the_scales():
    scale = 2.0**20
    ratio = float(np.mean((draws(scale) / scale) ** 2))
    assert abs(ratio - 1) < 4.9 * math.sqrt(2 / N)  # 1.1%


def test_small_scales_keep_the_lattices_probabilities():
    """round(N(0, 1)): P[0] = erf(1 / sqrt 8)."""
    p = math.erf(0.5 / math.sqrt(2))
    assert abs(float(np.mean(draws(1.0) == 0)) - p) < 4.9 * math.sqrt(p * (1 - p) / N)


def test_neighbours_steps_and_keys_are_uncorrelated():
    base = draws(1e6).astype(float) / 1e6
    others = [
        draws(1e6, step=1).astype(float) / 1e6,
        draws(1e6, key=b"\x22" * 32).astype(float) / 1e6,
        np.roll(base, 1),
        np.roll(base, 2),
        base[::-1],
    ]
    for other in others:
        assert abs(float(np.mean(base * other))) < 5.3 / math.sqrt(N) * 1.5


def test_low_bits_are_uniform():
    """The lattice is filled evenly: the last bit of a wide draw is fair, 4.9 standard errors."""
    ones = int((draws(1e9) & 1).sum())
    assert abs(ones - N / 2) < 4.9 * math.sqrt(N) / 2


def test_the_sign_and_the_tail():
    values = draws(1e6) / 1e6
    assert abs(float(np.mean(values > 0)) - 0.5) < 4.9 * 0.5 / math.sqrt(N)
    p = math.erfc(3.5 / math.sqrt(2))
    assert abs(float(np.mean(np.abs(values) > 3.5)) - p) < 5.5 * math.sqrt(p / N)


def normals(side, words):
    if side == "twin":
        return noise.normals(words)
    out = np.empty(words.shape)
    noise._helper().casemate_noise_normals(
        *(ctypes.c_void_p(words.ctypes.data), ctypes.c_uint64(len(words))),
        ctypes.c_void_p(out.ctypes.data),
    )
    return out


def test_float64_is_within_the_stated_error(side):
    """A quarter of ERROR, the 140u of native/noise.cpp, against mpmath, on 4,000 pairs, some at
    the edges of the fast way and where its cases meet."""
    low, high = (47, 47) if side == "twin" else (43, 30)
    words = keystream.words(keystream.subkey(KEY, "test"), 0, 0, 4000).reshape(-1, 2).copy()
    near = np.arange(100, dtype=np.uint64)
    places = [
        (0, 2**low),  # the least U1
        (0, 2**64 - 2**high - 100),  # the greatest
        (0, 2**63 - 50),  # U1 = 1/2
        (0, math.isqrt(2**127) - 50),  # U1 = sqrt(1/2)
        (0, math.isqrt(2**125) - 50),
        *((1, k * 2**61) for k in range(8)),  # axes and diagonals
        *((1, k * 2**61 - 100) for k in range(1, 9)),
    ]
    for i, (column, start) in enumerate(places):
        words[100 * i : 100 * i + 100, column] = np.uint64(start) + near
    # The largest radius with each part of an octant.
    words[3000:3400, 0] = 2**low + np.arange(400, dtype=np.uint64)
    found = normals(side, words)
    limit = noise.ERROR / 4 if side == "twin" else 140 * 2.0**-53
    assert limit < noise.NATIVE_ERROR / 1.8 or side == "twin"
    # Native, and U1 the middle of its interval: what is left of the 140u is arithmetic.
    arithmetic = limit if side == "twin" else 44 * 2.0**-53
    with mpmath.workprec(200):
        for (w1, w2), (a, b) in zip(words.tolist(), found.tolist(), strict=True):
            radius = mpmath.sqrt(-2 * mpmath.log((w1 + mpmath.mpf("0.5")) / 2**64))
            angle = 2 * mpmath.pi * mpmath.mpf(w2) / 2**64
            assert abs(a - radius * mpmath.cos(angle)) < arithmetic
            assert abs(b - radius * mpmath.sin(angle)) < arithmetic
            for more in (0, 1):  # the ends of what further bits may make of U1 and U2
                radius = mpmath.sqrt(-2 * mpmath.log((mpmath.mpf(w1) + more) / 2**64))
                angle = 2 * mpmath.pi * (mpmath.mpf(w2) + more) / 2**64
                assert abs(a - radius * mpmath.cos(angle)) < limit
                assert abs(b - radius * mpmath.sin(angle)) < limit


SOURCE = (Path(native.__file__).parent / "noise.cpp").read_text()
POLYNOMIALS = {  # the variable in native/noise.cpp: what it stands for, up to which q, how near
    "p": (lambda q: -4 * mpmath.atanh(mpmath.sqrt(q)) / mpmath.sqrt(q), 0.0294373, 2.0**-48.9),
    "c": (lambda q: mpmath.cos(2 * mpmath.pi * mpmath.sqrt(q)), 1 / 64, 2.0**-54.09),
    "o": (
        lambda q: mpmath.sin(2 * mpmath.pi * mpmath.sqrt(q)) / mpmath.sqrt(q),
        1 / 64,
        2.0**-58.69,
    ),
}


def polynomial_error(source, name):
    """The largest over 400 of Chebyshev's points; the sine's times its argument."""
    function, end, _ = POLYNOMIALS[name]
    first = re.findall(rf"double {name} = (-?[\d.]+)", source)
    rest = re.findall(rf"{name} = {name} \* q ([-+] [\d.]+)", source)
    coefficients = [float(x.replace(" ", "")) for x in first + rest]
    assert len(coefficients) == 7
    with mpmath.workprec(200):
        error = 0.0
        for i in range(400):
            q = mpmath.mpf(end) * (1 - mpmath.cos(mpmath.pi * (i + 0.5) / 400)) / 2
            found = mpmath.mpf(0)
            for coefficient in coefficients:
                found = found * q + coefficient
            off = found - function(q)
            error = max(error, abs(float(off * mpmath.sqrt(q) if name == "o" else off)))
    return error


@pytest.mark.parametrize("name", POLYNOMIALS)
def test_polynomials_are_as_near_as_the_proof_says(name):
    assert polynomial_error(SOURCE, name) < POLYNOMIALS[name][2]


@pytest.mark.parametrize(
    ("name", "digits"),
    [("p", "0.5714283425911313"), ("c", "64.93939402241418"), ("o", "76.70585965343442")],
)
def test_a_coefficient_that_is_off_shows(name, digits):
    assert SOURCE.count(digits) == 1
    off = SOURCE.replace(digits, f"{digits[:-9]}{9 - int(digits[-9])}{digits[-8:]}")
    assert polynomial_error(off, name) > POLYNOMIALS[name][2]


def test_the_long_way_is_the_exact_rounding():
    """The decimal evaluation against mpmath with the same bits, over all octants and magnitudes."""
    rng = np.random.default_rng(5)
    for i in range(40):
        bits = (192, 256, 1088)[i % 3]
        n1 = int.from_bytes(rng.bytes(bits // 8), "big") >> int(rng.integers(0, bits // 4 - 20))
        n2 = ((i % 8) << (bits - 3)) + (int.from_bytes(rng.bytes(bits // 8), "big") >> 3)
        scale = 2.0 ** float(rng.uniform(0, 32))
        found = noise._try_pair(n1, n2, bits, scale)
        with mpmath.workprec(1400):
            radius = mpmath.sqrt(-2 * mpmath.log((n1 + mpmath.mpf("0.5")) / 2**bits)) * scale
            angle = 2 * mpmath.pi * mpmath.mpf(n2) / 2**bits
            expected = tuple(int(mpmath.nint(radius * f(angle))) for f in (mpmath.cos, mpmath.sin))
        assert found == expected


def test_both_ways_agree_and_the_long_way_is_taken_near_boundaries():
    main, more = (keystream.subkey(KEY, p) for p in (noise.PURPOSE, noise.MORE))
    words = keystream.words(main, 9, 0, 200).reshape(-1, 2)
    fast = np.rint(noise.normals(words) * 777.0).astype(np.int64)
    for i, (w1, w2) in enumerate(words.tolist()):
        assert tuple(fast[i]) == noise._exact_pair(w1, w2, 777.0, more, 9, i)


def test_unsure_draws_take_the_long_way(side, monkeypatch):
    """With the error bound blown up, the long way is taken often and changes nothing."""
    plain = draws(50.0, count=2000)
    monkeypatch.setattr(noise, "ERROR" if side == "twin" else "NATIVE_ERROR", 2.0**-9)
    calls = []
    right = noise._exact_pair
    monkeypatch.setattr(noise, "_exact_pair", lambda *a: calls.append(1) or right(*a))
    assert np.array_equal(draws(50.0, count=2000), plain)
    assert 20 < len(calls) < 900


def test_extreme_words_take_the_long_way():
    words = np.array([[0, 0], [1, 2**63], [2**64 - 1, 5], [2**46, 7]], dtype=np.uint64)
    found = noise._round_pairs(words, 1e6, keystream.subkey(KEY, noise.MORE), 0, 0)
    assert np.abs(found).max() < 2**11 * 1e6
    assert abs(int(found[0])) > 9.4e6  # U1 < 2^-64: beyond 9.4 standard deviations at angle 0
    assert abs(int(found[4])) < 10  # U1 next to 1


def test_counts_and_chunks_give_one_stream(monkeypatch):
    whole = draws(100.0, count=1001)
    monkeypatch.setattr(noise, "_CHUNK", 64)
    assert np.array_equal(draws(100.0, count=1001), whole)
    assert np.array_equal(draws(100.0, count=7), whole[:7])
    assert len(draws(100.0, count=0)) == 0


@pytest.mark.parametrize("scale", [0.0, 0.99, 2.0**32 * 1.01, math.nan, math.inf])
def test_scales_outside_the_proof_are_refused(scale):
    with pytest.raises(ValueError):
        draws(scale, count=2)


def test_distance_is_negligible_and_grows():
    assert noise.distance(10**12) < 1e-12
    assert noise.distance(10**6) < noise.distance(10**7)


def test_blocks_are_those_of_aes_ctr():
    """NIST SP 800-38A, F.5.5: CTR-AES256, first block, with the counter block cut in two."""
    key = bytes.fromhex("603deb1015ca71be2b73aef0857d77811f352c073b6108d72d9810a30914dff4")
    counter = bytes.fromhex("f0f1f2f3f4f5f6f7f8f9fafbfcfdfeff")
    plain = bytes.fromhex("6bc1bee22e409f96e93d7e117393172a")
    step, first = int.from_bytes(counter[:8], "big"), int.from_bytes(counter[8:], "big")
    block = keystream.blocks(key, step, first, 1)
    assert bytes(a ^ b for a, b in zip(block, plain, strict=True)).hex() == (
        "601ec313775789a5b7a7f504bbf3d228"
    )


def test_no_block_is_used_twice():
    """Purposes have different keys; steps and places different counters."""
    keys = {keystream.subkey(KEY, p) for p in (noise.PURPOSE, noise.MORE, "sampling")}
    assert len(keys) == 3
    seen = set()
    for key in keys:
        for step in (0, 1, 2**32):
            raw = keystream.blocks(key, step, 0, 50)
            seen |= {raw[i : i + 16] for i in range(0, len(raw), 16)}
    assert len(seen) == 3 * 3 * 50
    with pytest.raises(ValueError):
        keystream.blocks(KEY, 0, 2**64 - 1, 2)
    with pytest.raises(ValueError):
        keystream.subkey(b"short", "noise")
