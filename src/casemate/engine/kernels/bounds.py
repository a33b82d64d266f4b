"""How far the kernels' squared norms may be from the truth.

Each function gives gamma with |returned - n^2| <= gamma S^2, where n is the norm of one record's
gradient A = sum_t g_t x_t^T and S = sum_t |g_t||x_t| what the door returns beside it. Since n <= S,
``n2 + gamma * S**2`` is never below the truth: that is what a clip may trust (P3).

u is 2^-24 in float32 and 2^-53 in float64. A sum of n products, computed in any order, with or
without fused multiply-add, differs from the truth by at most gamma(n) = nu / (1 - nu) times the sum
of the products' absolute values (Higham, Accuracy and Stability of Numerical Algorithms, 2nd ed.,
section 3.1); by Cauchy-Schwarz that sum is at most the product of the two lengths. Products of two
float32 values are exact in float64. The compiled kernels add at most CHUNK terms in float32 and the
rest in float64; in Gram matrices they add sums of a few terms, a few such sums, and the rest in
float64, so that no product goes through more than SHORT roundings in float32, nor more than there
are terms (Higham, section 4.2). Their gamma thus does not grow with the number of terms; for the
twins, whose products are the BLAS's, it does.

Underflow: a float32 product or sum below 2^-126 may be wrong by 2^-149 (gradual underflow, which
``torch.set_flush_denormal(True)`` would break). A dot product of n terms is then wrong by n 2^-149
more, which moves a pair's contribution by n 2^-149 |g_t||g_s|, or m 2^-149 |x_t||x_s|, or
nm 2^-298. The S that comes with a float32 result holds these, divided by u and thus by no more
than gamma: S^2 + 2^-125 (n (sum |g_t|)^2 + m (sum |x_t|)^2) + 2^-250 T^2 n m. Where operands are
of any usual size this is S. The entries of a formed gradient are wrong by T 2^-149, in norm
gamma a with a = 2^-125 (mn)^(1/2); its square by 2 gamma a S and (gamma a)^2 more, which the same
S holds, since n (sum |g_t|)^2 + m (sum |x_t|)^2 >= 2 (mn)^(1/2) S.

Overflow ends in infinity or NaN, never in a finite value. A record for which a Gram matrix does so
is evaluated again in float64, where squares of squares of float32 neither overflow nor underflow;
a formed gradient that overflows float32 is what training would see, and stays not finite.

Float32 matrix products must be those of float32: ``torch.get_float32_matmul_precision()`` is
"highest".
"""

from __future__ import annotations

from typing import Final

U32: Final = 2.0**-24
U64: Final = 2.0**-53
CHUNK: Final = 256
SHORT: Final = 32
UNDERFLOW: Final = 2.0**-125
# For the rounding of S itself, of gamma, and of n2 + gamma S^2.
_SLACK: Final = 1.0 + 2.0**-20


def gamma(terms: int, unit: float) -> float:
    """nu / (1 - nu), Higham's gamma_n; ValueError when nu is not below 1/2."""
    product = terms * unit
    if product >= 0.5:
        raise ValueError(f"{terms} terms are too many for unit roundoff {unit}")
    return product / (1.0 - product)


def _also(*parts: float) -> float:
    product = 1.0
    for part in parts:
        product *= 1.0 + part
    return (product - 1.0) * _SLACK


def _dot(terms: int, native: bool, chunk: int = CHUNK) -> float:
    if not native:
        return gamma(terms, U32)
    return _also(gamma(min(terms, chunk), U32), gamma(terms // chunk + 2, U64))


def row_squares(n: int) -> float:
    """Relative: squares are exact in float64 and positive."""
    return _also(gamma(n + 1, U64))


def rank_one(m: int, n: int) -> float:
    """Relative: the product of two such sums."""
    return _also(gamma(n + 1, U64), gamma(m + 1, U64), gamma(1, U64))


def gram_pair(tokens: int, m: int, n: int, *, precise: bool, native: bool) -> float:
    """Each pair is off by gamma |x_t||x_s||g_t||g_s|; these sum to S^2.

    The product of the two dots and the sum over pairs are in float64.
    """
    summed = gamma(tokens * tokens + 4, U64)
    if precise:
        return _also(gamma(n, U64), gamma(m, U64), summed)
    return _also(_dot(n, native, SHORT), _dot(m, native, SHORT), summed)


def formed(tokens: int, size: int, *, native: bool) -> float:
    """For squares of a formed gradient of ``size`` entries, each a sum over tokens, in float32.

    The error's norm is at most e S with e of one entry (triangle inequality over tokens), so the
    square moves by at most 2 e S n + (e S)^2. In norm, not square, it is e S: where n is much
    smaller than S this is far less than gamma^(1/2) S; see :func:`formed_norm`.
    """
    e = formed_norm(tokens, native=native)
    return _also(2.0 * e + e * e, gamma(size + 1, U64))


def formed_norm(tokens: int, *, native: bool) -> float:
    """e with | |A computed| - n | <= e S for a formed gradient; float64's squares add less."""
    return _also(_dot(tokens, native), U32)


def formed_sum(tokens: int) -> float:
    """e with |sum computed - sum| <= e * sum_t |g_t|, in norm: float64, then one rounding."""
    return _also(gamma(tokens, U64), U32)


def embedding_gram(tokens: int, m: int) -> float:
    """Rows are formed in float64: 2e + e^2 as in :func:`formed`."""
    e = gamma(tokens, U64)
    return _also(2.0 * e + e * e, gamma(tokens * m + 1, U64))


def conv_norms(positions: int, size: int, *, native: bool) -> float:
    """As :func:`formed`; ``positions`` of the output, ``size`` of the weight."""
    return formed(positions, size, native=native)


def conv_gram(
    positions: int, m: int, n: int, taps: int, *, precise: bool = False, native: bool
) -> float:
    """As :func:`gram_pair` with m output channels and windows of n = channels * taps entries.

    The compiled one adds the base Gram matrix along diagonals in float64: a dot over channels and
    ``taps`` sums, the latter bounded by the windows' lengths (Cauchy-Schwarz).
    """
    plain = gram_pair(positions, m, n, precise=precise, native=native)
    if not native:
        return plain
    channels = n // taps
    dots = (
        (gamma(channels, U64), gamma(m, U64))
        if precise
        else (_dot(channels, True, SHORT), _dot(m, True, SHORT))
    )
    box = _also(*dots, gamma(taps + 1, U64), gamma(positions * positions + 4, U64))
    # Where the fast way does not hold, the windows are written out and gram_pair does it.
    return max(box, plain)


def weighted_sum(records: int) -> float:
    """e with |computed - sum_i c_i a_i| <= e * sum_i |c_i||a_i|: float64, then one rounding."""
    return _also(gamma(records + 1, U64), U32)


def contract(terms: int, chunk: int) -> float:
    """e with |computed - sum_t c_t g_t x_t^T| <= e * sum_t |c_t g_t||x_t|, the operands as scaled.

    A product goes through at most min(terms, chunk) roundings on its way to its chunk's sum and one
    for each chunk after that (Higham, section 4.2); by entry, and so in norm by token.
    """
    return gamma(min(terms, chunk) + -(-terms // chunk), U32)
