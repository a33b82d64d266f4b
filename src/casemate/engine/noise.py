"""Gaussian noise in integer grid steps (P4).

One draw is round(N(0, s^2)) for the exact normal law, s = sigma / grid. Since
round(k + x) = k + round(x) for every integer k, adding it to an integer sum is post-processing of
the exact Gaussian mechanism, and no floating-point trace of the sum remains (Mironov 2012, "On
significance of the least significant bits for differential privacy").

How exactness is had (Ziv 1991, "Fast evaluation of elementary mathematical functions with
correctly rounded last bit"): an infinite string of uniform bits defines U1, U2 and, by Box and
Muller (1958), z = sqrt(-2 ln U1) cos(2 pi U2), with sin for the second draw. The first 64 bits of
each and float64 give z within ``ERROR`` (below); where s * z then lies too near a rounding boundary
to tell, more bits are drawn and the same expression is evaluated to as many digits as it takes.
So a draw is the rounding of the exact z, and given uniform bits the law is the ideal one: distance
zero. What is left is AES-256 itself (assumed a pseudo-random permutation) and that its blocks never
repeat: see :func:`distance`.

ERROR. Let w1, w2 be the 64-bit words, 2^47 <= w1 < 2^64 - 2^47 (others take the long way). U1 is
known to 2^-48 relative to the nearer of U1 and 1 - U1, and the logarithm is taken on that side, so
E = -ln U1 has absolute error 2^-48 + 2^-50 E (4 ulp for numpy's log) and r = sqrt(2E) <= 4.9 has
error below 2^-47.3. The angle has error below 3 * 2^-50.3 and cos and sin 2^-50 (4 ulp), together
2^-48.1, times r: 2^-45.8. The sum is below 2^-45.2; ERROR = 2^-43 leaves a factor of 4. The product
with s <= 2^32 adds a relative 2^-52.

Since a draw is defined by the bits alone, it does not matter who computes it: native/noise.cpp,
over ten times as fast, has its own float64 evaluation with its own proof (NATIVE_ERROR) and leaves
what it cannot settle to the same long way. What is here in numpy is its twin.
"""

from __future__ import annotations

import ctypes
import decimal
import functools
import math
from decimal import Decimal
from typing import Final

import numpy as np
import numpy.typing as npt

from casemate.engine import keystream, native

PURPOSE: Final = "noise"
MORE: Final = "noise-more"
MAX_SCALE: Final = 2.0**32
ERROR: Final = 2.0**-43
NATIVE_ERROR: Final = 2.0**-45
_EDGE: Final = np.uint64(2**47)
_HALF: Final = np.uint64(2**63)
_CHUNK: Final = 1 << 16
# Pairs that the native side may list before it gives the rest back.
_ROOM: Final = 1 << 10
_Room: Final = ctypes.c_uint64 * _ROOM
# Blocks of 16 bytes kept for one pair's further bits: 2^16 blocks, half a megabit for each word.
_MORE_BLOCKS: Final = 1 << 16


def distance(draws: int) -> float:
    """Upper bound on the total variation distance between ``draws`` draws of a job and ideal ones,
    given that AES-256 is a pseudo-random permutation.

    CTR blocks of a permutation never repeat; n of them are within n^2 / 2^129 of uniform (Bellare,
    Rogaway 2006, "The security of triple encryption", the PRP/PRF switching lemma). One block makes
    two draws; the long way's blocks (another key) are fewer than the draws.
    """
    return (2.0 * draws + 2.0) ** 2 * 2.0**-129


def gaussian(key: bytes, step: int, count: int, scale: float) -> npt.NDArray[np.int64]:
    """``count`` independent draws of round(N(0, scale^2)) for ``step``, int64.

    ``key`` is the job's key; ``scale`` is sigma / grid, in [1, 2^32]. Raises ``ValueError``.
    """
    out = np.zeros(count, dtype=np.int64)
    add_gaussian(out, key, step, scale)
    return out


def add_gaussian(
    total: npt.NDArray[np.int64], key: bytes, step: int, scale: float, first: int = 0
) -> None:
    """Add the draws of :func:`gaussian` from number ``first`` on to ``total``, int64 (d,), where
    it lies: the part of the step's vector that begins at ``first``, which is even. Parts added one
    by one make what the whole added at once makes.

    Raises ``ValueError``, with ``total`` unchanged, for a scale outside [1, 2^32], for an array
    that is not writable, aligned, contiguous int64 of one dimension, and for a ``first`` that is
    odd or negative or from where the draws would pass number 2^49.
    """
    if not 1 <= scale <= MAX_SCALE:
        raise ValueError(f"sigma over grid is {scale:.3g}, it must be in [1, 2^32]")
    flags = total.flags
    if total.dtype != np.int64 or total.ndim != 1 or not (flags.c_contiguous and flags.behaved):
        raise ValueError("noise is added to a writable, aligned, contiguous int64 vector")
    if first % 2:
        raise ValueError("a part of the noise begins at an even draw, since draws come in pairs")
    pair, pairs = first // 2, (len(total) + 1) // 2
    # Of all that may be needed: pairs have one block of one stream and _MORE_BLOCKS of the other.
    keystream.check_range(step, pair * _MORE_BLOCKS, pairs * _MORE_BLOCKS)
    main, more = _subkeys(key)
    helper = _helper()
    if helper is None:
        _add_twin(total, main, more, step, scale, pair)
    else:
        _add_native(helper, total, main, more, step, scale, pair)


@functools.lru_cache(maxsize=1)
def _subkeys(key: bytes) -> tuple[bytes, bytes]:
    """Kept for the one job at work: its key is there anyway, one that is done is let go of by the
    next."""
    return keystream.subkey(key, PURPOSE), keystream.subkey(key, MORE)


def _add_twin(
    total: npt.NDArray[np.int64], main: bytes, more: bytes, step: int, scale: float, first: int
) -> None:
    for done in range(0, (len(total) + 1) // 2, _CHUNK):
        part = total[2 * done : 2 * (done + _CHUNK)]
        pairs = (len(part) + 1) // 2
        words = keystream.words(main, step, first + done, pairs).reshape(pairs, 2)
        part += _round_pairs(words, scale, more, step, first + done)[: len(part)]


@functools.cache
def _helper() -> ctypes.CDLL | None:
    """native/noise.cpp; None where it does not build or the CPU has no AES."""
    return _typed(native.library("noise"))


def _typed(found: ctypes.CDLL | None) -> ctypes.CDLL | None:
    if found is None or not found.casemate_noise_available():
        return None
    word, pointer = ctypes.c_uint64, ctypes.c_void_p
    found.casemate_noise_add.restype = ctypes.c_int64
    found.casemate_noise_add.argtypes = [
        *(ctypes.c_char_p, word, word, ctypes.c_double, ctypes.c_double),
        *(pointer, word, pointer, word, pointer),
    ]
    return found


def _add_native(
    helper: ctypes.CDLL,
    total: npt.NDArray[np.int64],
    main: bytes,
    more: bytes,
    step: int,
    scale: float,
    first: int,
) -> None:
    unsure, found, place = _Room(), ctypes.c_uint64(), total.ctypes.data
    slack = _slack(scale, NATIVE_ERROR)
    done = 0
    while done < len(total):
        took = helper.casemate_noise_add(
            *(main, step, first + done // 2, scale, slack),
            *(place + 8 * done, len(total) - done, unsure, _ROOM, ctypes.byref(found)),
        )
        for pair in (done // 2 + i for i in unsure[: found.value]):
            w1, w2 = keystream.words(main, step, first + pair, 1).tolist()
            part = total[2 * pair : 2 * pair + 2]
            part += np.array(_exact_pair(w1, w2, scale, more, step, first + pair))[: len(part)]
        done += took


def _slack(scale: float, error: float) -> float:
    """How far from the nearest integer scale * z may be for the rounding to be sure."""
    return max(0.0, 0.5 - scale * (error + 8.0 * 2.0**-52))


def normals(words: npt.NDArray[np.uint64]) -> npt.NDArray[np.float64]:
    """Box-Muller in float64: (n, 2) words to (n, 2) normals, within ERROR but for extreme w1."""
    w1, w2 = words[:, 0], words[:, 1]
    small = w1 < _HALF
    near = (np.where(small, w1, ~w1).astype(np.float64) + 0.5) * 2.0**-64
    energy = np.where(small, -np.log(near), -np.log1p(-near))
    radius = np.sqrt(2.0 * energy)
    angle = (w2.astype(np.float64) * 2.0**-64) * (2.0 * math.pi)
    return np.stack([radius * np.cos(angle), radius * np.sin(angle)], axis=1)


def _round_pairs(
    words: npt.NDArray[np.uint64], scale: float, more: bytes, step: int, first: int
) -> npt.NDArray[np.int64]:
    steps = normals(words) * scale
    rounded = np.rint(steps)
    w1 = words[:, 0]
    unsure = (np.abs(steps - rounded) >= _slack(scale, ERROR)).any(axis=1)
    unsure |= (w1 < _EDGE) | (~w1 < _EDGE)
    out = rounded.astype(np.int64)
    for i in np.flatnonzero(unsure):
        out[i] = _exact_pair(int(words[i, 0]), int(words[i, 1]), scale, more, step, first + int(i))
    return out.reshape(-1)


def _exact_pair(
    w1: int, w2: int, scale: float, more: bytes, step: int, pair: int
) -> tuple[int, int]:
    """The pair's draws, with as many further bits as the rounding needs."""
    blocks = 2
    while blocks <= _MORE_BLOCKS:
        extra = keystream.blocks(more, step, pair * _MORE_BLOCKS, blocks)
        bits = 64 * blocks  # for each word: alternate blocks
        x1 = int.from_bytes(b"".join(extra[i : i + 16] for i in range(0, len(extra), 32)), "big")
        x2 = int.from_bytes(
            b"".join(extra[i + 16 : i + 32] for i in range(0, len(extra), 32)), "big"
        )
        found = _try_pair((w1 << bits) + x1, (w2 << bits) + x2, 64 + bits, scale)
        if found is not None:
            return found
        blocks *= 2
    raise ArithmeticError("the generator's bits are not random")


def _try_pair(n1: int, n2: int, bits: int, scale: float) -> tuple[int, int] | None:
    """Roundings of the pair from U1 in [n1, n1+1) / 2^bits and U2 likewise; None when unsure.

    With bits >= 192 and min(U1, 1 - U1) >= 2^-(bits/4), z is known within 2^-(bits/2):
    dE <= 2^(-bits + bits/4), r >= 2^(-bits/8), dr = dE / r. Of decimal's roundings, u1's is what
    counts: dE <= 10^-prec < 2^(-5 bits / 8) 10^-12, so dr <= 2^(-bits/2) 10^-12.
    """
    whole = 1 << bits
    if min(n1, whole - 1 - n1) >> (bits - bits // 4) == 0:
        return None
    with decimal.localcontext() as ctx:
        ctx.prec = int(bits * 0.189) + 12
        ctx.Emax, ctx.Emin = decimal.MAX_EMAX, decimal.MIN_EMIN
        u1 = (Decimal(n1) + Decimal("0.5")) / whole
        radius = (-2 * u1.ln()).sqrt() * Decimal(scale)
        cos, sin = _cos_sin(Decimal(n2) / whole)
        slack = Decimal("0.5") - Decimal(2) ** -(bits // 2) * Decimal(scale)
        out = []
        for value in (radius * cos, radius * sin):
            nearest = value.to_integral_value(rounding=decimal.ROUND_HALF_EVEN)
            if abs(value - nearest) >= slack:
                return None
            out.append(int(nearest))
    return out[0], out[1]


def _cos_sin(turns: Decimal) -> tuple[Decimal, Decimal]:
    """cos and sin of ``turns`` in [0, 1) turns, at the context's precision, by Taylor's series."""
    octant = int(turns * 8)
    # Within the octant, measure from the nearer axis, so that the series sees at most pi / 4.
    quarter = (octant + 1) // 2
    x = (turns - Decimal(quarter) / 4) * 2 * _pi(decimal.getcontext().prec)
    cos = term = Decimal(1)
    sin = odd = x
    tiny = Decimal(10) ** -(decimal.getcontext().prec + 5)
    n = 0
    while abs(term) > tiny or abs(odd) > tiny:
        n += 2
        term = -term * x * x / ((n - 1) * n)
        odd = -odd * x * x / (n * (n + 1))
        cos += term
        sin += odd
    return ((cos, sin), (-sin, cos), (-cos, -sin), (sin, -cos))[quarter % 4]


@functools.cache
def _pi(digits: int) -> Decimal:
    """Pi to ``digits`` digits (Machin: 16 atan(1/5) - 4 atan(1/239))."""

    def atan_inverse(n: int) -> Decimal:
        power = total = Decimal(1) / n
        tiny = Decimal(10) ** -(digits + 5)
        k = 1
        while power > tiny:
            power /= n * n
            k += 2
            total += (-power if k % 4 == 3 else power) / k
        return total

    with decimal.localcontext() as ctx:
        ctx.prec = digits + 5
        return 16 * atan_inverse(5) - 4 * atan_inverse(239)
