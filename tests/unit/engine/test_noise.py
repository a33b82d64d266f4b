"""Native noise against its twin, bit by bit, and seeded bugs that this catches."""

from __future__ import annotations

import ctypes
import math
import os

import numpy as np
import pytest

from casemate.engine import keystream, native, noise

KEYS = [bytes(32), b"\xff" * 32, bytes(range(32))]
SOURCE = native._source("noise").decode()

if noise._helper() is None:
    why = native.reason("noise") or "this CPU has no AES instructions"
    pytestmark = pytest.mark.skip(reason=f"no native noise: {why}")


def twin(key, step, count, scale):
    total = np.zeros(count, dtype=np.int64)
    main, more = (keystream.subkey(key, p) for p in (noise.PURPOSE, noise.MORE))
    noise._add_twin(total, main, more, step, scale, 0)
    return total


def same(key, step, count, scale):
    return np.array_equal(noise.gaussian(key, step, count, scale), twin(key, step, count, scale))


@pytest.fixture
def build(tmp_path, tmp_path_factory, monkeypatch):
    """Noise by a build of one's own: of a changed source, or by another compiler command."""

    def use(*changes, cxx=""):
        source = SOURCE
        for old, new in changes:
            assert source.count(old) == 1, old
            source = source.replace(old, new)
        (tmp_path / "noise.cpp").write_text(source)
        with monkeypatch.context() as m:
            m.setattr(native, "_SOURCES", tmp_path)
            m.setenv("XDG_CACHE_HOME", str(tmp_path_factory.getbasetemp()))
            if cxx:
                m.setenv("CXX", cxx)
            library, reason = native._load.__wrapped__("noise")
        assert library is not None, reason
        helper = noise._typed(library)
        monkeypatch.setattr(noise, "_helper", lambda: helper)
        return library

    return use


@pytest.fixture
def long_ways(monkeypatch):
    """Pairs that took the long way."""
    seen = []
    right = noise._exact_pair
    monkeypatch.setattr(noise, "_exact_pair", lambda *a: seen.append(a[-1]) or right(*a))
    return seen


# 512 draws are one block of the native side, 4,096 unsure pairs its list, 2^17 a chunk of the twin.
@pytest.mark.parametrize(
    "count", [0, 1, 2, 3, 511, 512, 513, 1023, 1024, 1025, 2**17 - 1, 2**17, 2**17 + 3]
)
def test_counts(count):
    assert same(KEYS[2], 7, count, 2.0**20)


@pytest.mark.parametrize("scale", [1.0, 1.5, 777.7, 2.0**10, 1e6, 2.0**24, 1e9, 2.0**32])
def test_scales(scale):
    assert same(KEYS[2], 3, 50_001, scale)


@pytest.mark.parametrize("key", KEYS, ids=["zeros", "ones", "counting"])
@pytest.mark.parametrize("step", [0, 1, 2**32 - 1, 2**63, 2**64 - 1])
def test_keys_and_steps(key, step):
    assert same(key, step, 3001, 1e6)
    assert not np.array_equal(
        noise.gaussian(key, step, 99, 1e6), noise.gaussian(key, step ^ 1, 99, 1e6)
    )


@pytest.mark.full
def test_many_draws():
    for step in range(20):
        assert same(os.urandom(32), step, 2_000_001, 2.0 ** (step + 5))


@pytest.mark.parametrize("error", [2.0**-9, 2.0**-5, 1.0])
def test_unsure_pairs_take_the_long_way_and_change_nothing(error, long_ways, monkeypatch):
    """With the bound blown up, up to every pair, and lists that fill before the draws are done."""
    plain = noise.gaussian(KEYS[2], 2, 1501, 50.0)
    long_ways.clear()
    monkeypatch.setattr(noise, "NATIVE_ERROR", error)
    monkeypatch.setattr(noise, "_ROOM", 300)
    assert np.array_equal(noise.gaussian(KEYS[2], 2, 1501, 50.0), plain)
    assert len(long_ways) == len(set(long_ways)) >= {2.0**-9: 50, 2.0**-5: 751, 1.0: 751}[error]


def test_extreme_words_take_the_long_way_and_change_nothing(build, long_ways):
    """With nearer edges: U1 below exp(-1.5), over a fifth of the pairs, and above exp(-1/16)."""
    plain = noise.gaussian(KEYS[2], 2, 2001, 1e6)
    build(("LEAST = 0x1p-33, MOST = 29.112", "LEAST = 0.125, MOST = 3.0"))
    long_ways.clear()
    assert np.array_equal(noise.gaussian(KEYS[2], 2, 2001, 1e6), plain)
    words = keystream.words(keystream.subkey(KEYS[2], noise.PURPOSE), 2, 0, 1001)[::2]
    u1 = words / 2.0**64
    assert long_ways == np.flatnonzero((u1 < math.exp(-1.5)) | (u1 > math.exp(-0.0625))).tolist()
    assert len(long_ways) > 250


def native_blocks(library, key, step, first, count):
    out = ctypes.create_string_buffer(16 * count)
    word = ctypes.c_uint64
    library.casemate_noise_blocks(key, word(step), word(first), word(count), out)
    return out.raw


def check_aes(library):
    """NIST SP 800-38A, F.5.5 (CTR-AES256), all four blocks; then other keys and places."""
    key = bytes.fromhex("603deb1015ca71be2b73aef0857d77811f352c073b6108d72d9810a30914dff4")
    plain = bytes.fromhex(
        "6bc1bee22e409f96e93d7e117393172aae2d8a571e03ac9c9eb76fac45af8e51"
        "30c81c46a35ce411e5fbc1191a0a52eff69f2445df4f9b17ad2b417be66c3710"
    )
    cipher = bytes.fromhex(
        "601ec313775789a5b7a7f504bbf3d228f443e3ca4d62b59aca84e990cacaf5c5"
        "2b0930daa23de94ce87017ba2d84988ddfc9c58db67aada613c2dd08457941a6"
    )
    stream = native_blocks(library, key, 0xF0F1F2F3F4F5F6F7, 0xF8F9FAFBFCFDFEFF, 4)
    assert bytes(a ^ b for a, b in zip(stream, plain, strict=True)) == cipher
    rng = np.random.default_rng(3)
    for step, first, count in ((0, 0, 1), (5, 250, 700), (2**64 - 1, 2**64 - 300, 300)):
        some = rng.bytes(32)
        expected = keystream.blocks(some, step, first, count)
        assert native_blocks(library, some, step, first, count) == expected


def test_aes_is_the_standards():
    check_aes(noise._helper())


@pytest.mark.parametrize("flag", ["-mno-vaes", "-mno-avx512f", "-mno-avx"])
def test_narrower_cpus_draw_the_same(build, flag):
    library = build(cxx=f"{' '.join(native.compiler())} {flag}")
    check_aes(library)
    for scale in (1.0, 1e6, 2.0**32):
        assert same(KEYS[2], 3, 20_001, scale)


def test_a_cpu_without_aes_leaves_it_to_the_twin(build):
    plain = noise.gaussian(KEYS[0], 0, 101, 1e6)
    library = build(cxx=f"{' '.join(native.compiler())} -mno-aes -mno-vaes")
    assert library.casemate_noise_available() == 0 and noise._helper() is None
    assert np.array_equal(noise.gaussian(KEYS[0], 0, 101, 1e6), plain)


MUTANTS = {
    "counter off by one": ("keystream(schedule, step, first + done / 2,",
                           "keystream(schedule, step, first + done / 2 + 1,"),
    "a block used twice": ("j++, counter = add(counter, next))",
                           "j++, counter = add(counter, j & 1 ? next : all(_mm_setzero_si128())))"),
    "step and number swapped": ("counter = count(step, first)", "counter = count(first, step)"),
    "one round too few": ("round < 14;", "round < 13;"),
    "cosine and sine swapped": ("direction(b.words[2 * i + 1], &cos, &sin);",
                                "direction(b.words[2 * i + 1], &sin, &cos);"),
    "quarters the wrong way": ("(quarter + (1ull << 62))", "(quarter - (1ull << 62))"),
    "axes half a quarter off": ("quarter = w2 + (1ull << 61)", "quarter = w2"),
    "ln 2 in float32": ("0.69314718055994530942", "(double)0.6931472f"),
    "a logarithm's coefficient off": ("0.8000000010455202", "0.80001"),
    "a cosine's coefficient off": ("60.24462126522892", "60.3"),
    "a sine's coefficient off": ("41.341702240399215", "41.3418"),
    "words swapped": ("twice_energy(b.words[2 * i]);", "twice_energy(b.words[2 * i + 1]);"),
    "odd end dropped": ("for (uint64_t i = 0; i < take; i++) out",
                        "for (uint64_t i = 0; i < (take & ~1); i++) out"),
}  # fmt: skip


@pytest.mark.parametrize("bug", MUTANTS)
def test_a_seeded_bug_is_caught(bug, build):
    build(MUTANTS[bug])
    assert not same(KEYS[2], 3, 20_001, 2.0**20)


UNSURE_MUTANTS = {
    "unsure pairs dropped": ("if (b.flags[i / 2] >> 63)", "if (0)"),
    "unsure pairs added twice": ("b.draws[i] = b.draws[i + 1] = 0;", ""),
    "only the first draw looked at": (" | as_bits(sure - off_y * off_y)", ""),
    "listed by the wrong place": ("unsure[listed++] = (done + i) / 2;",
                                  "unsure[listed++] = i / 2;"),
}  # fmt: skip


@pytest.mark.parametrize("bug", UNSURE_MUTANTS)
def test_a_seeded_bug_in_unsure_pairs_is_caught(bug, build, monkeypatch):
    """Where the error is large enough to show: ln 2 in float32, and a bound that covers it."""
    rough = ("0.69314718055994530942", "(double)0.6931472f")  # z is off by less than 2^-24
    monkeypatch.setattr(noise, "NATIVE_ERROR", 2.0**-24)
    build(rough)
    assert same(KEYS[2], 3, 60_001, 2.0**12)
    build(rough, UNSURE_MUTANTS[bug])
    assert not same(KEYS[2], 3, 60_001, 2.0**12)
