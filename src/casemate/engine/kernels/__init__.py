"""Per-record gradient norms and per-record gradients where a batch is contracted.

One microbatch has b records. At a contraction the gradient of record i is A_i = sum_t g_it x_it^T,
g (b, T, m) the output gradients and x (b, T, n) the inputs; at a convolution the tokens are output
positions and x_it is the window that the kernel sees there. These doors give |A_i|^2 without A
("ghost" norms: Goodfellow, arXiv:1510.01799; Li et al., arXiv:2110.05679, section 4; Bu et al.,
arXiv:2205.10683), or A itself, and what a step does with it then.

Squared norms n2 are float64 (b,). Beside them stands S_i = sum_t |g_it||x_it| >= |A_i| where tokens
can cancel; ``bounds`` holds for each door gamma with |n2 - |A_i|^2| <= gamma S_i^2 and its proof.
n2 itself may be negative where tokens cancel; n2 + gamma S^2 never is.
An operand that is not finite gives an n2 that is not finite, and none of a finite one is.

Operands are float32. On the CPU ``compiled`` does the work where :func:`native` says so, one
thread, bits independent of the slot; else ``twins``, plain torch on any device.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from casemate.engine.kernels import bounds, compiled, twins

__all__ = [
    "accumulate",
    "bounds",
    "channel_affine",
    "channel_sum",
    "contract",
    "conv_contract",
    "conv_formed",
    "conv_gram",
    "conv_norms",
    "conv_scale",
    "embedding_add",
    "embedding_gram",
    "finish",
    "formed_outer",
    "formed_sum",
    "gram_pair",
    "native",
    "rank_one",
    "row_squares",
    "scale_rows",
    "token_affine",
    "weighted_sum",
]

Tensor = torch.Tensor


def native(*operands: Tensor) -> bool:
    """Whether the compiled kernels take these float32 operands; of none: whether there are any."""
    if compiled.library() is None:
        return False
    return all(t.device.type == "cpu" and t.dtype == torch.float32 for t in operands)


def row_squares(x: Tensor) -> Tensor:
    """Sum of squares of each row of x (b, ...), added in float64; gamma: bounds.row_squares.

    Exact squares, all positive: no cancellation, and no overflow, whatever finite float32 comes in.
    """
    return compiled.row_squares(x) if native(x) else twins.row_squares(x)


def rank_one(g: Tensor, x: Tensor) -> Tensor:
    """|g_i x_i^T|^2 = |g_i|^2 |x_i|^2 for g (b, m), x (b, n): one token. gamma: bounds.rank_one."""
    return compiled.rank_one(g, x) if native(g, x) else twins.rank_one(g, x)


def gram_pair(g: Tensor, x: Tensor, precise: bool = False) -> tuple[Tensor, Tensor]:
    """(n2, S) for g (b, T, m), x (b, T, n): n2 = sum_{t,s} (x_t . x_s)(g_t . g_s).

    ``precise``: the dots in float64, else in float32; gamma: bounds.gram_pair. A record whose
    float32 dots could overflow is done in float64. Only pairs t <= s are computed.
    """
    if native(g, x):
        return compiled.gram_pair(g, x, precise)
    return twins.gram_pair(g, x, precise)


def formed_outer(g: Tensor, x: Tensor, out: Tensor | None = None) -> Tensor:
    """The gradients themselves, (b, m * n) float32, for g (b, T, m), x (b, T, n).

    Their squares: bounds.formed with S as for gram_pair, and bounds.formed_norm, which is far
    tighter where n is much below S. ``out``, if given, is filled and returned; fresh memory costs
    more than the arithmetic where few tokens make large gradients.
    """
    door = compiled.formed_outer if native(g, x) else twins.formed_outer
    return door(g, x, out)


def formed_sum(g: Tensor) -> Tensor:
    """sum_t g_t, (b, m) float32, for g (b, T, m): a bias. Error: bounds.formed_sum."""
    return compiled.formed_sum(g) if native(g) else twins.formed_sum(g)


def embedding_gram(
    index: Tensor, g: Tensor, padding_idx: int | None = None
) -> tuple[Tensor, Tensor]:
    """(n2, S) of an embedding's gradient for index (b, T) int64, g (b, T, m).

    n2 = sum over pairs of tokens with one index of g_t . g_s, S = sum_t |g_t|, both without tokens
    whose index is ``padding_idx``. Rows of one index are added in float64 and squared, which is
    cheaper than the masked Gram matrix and tighter; gamma: bounds.embedding_gram.
    """
    if native(g):
        return compiled.embedding_gram(index, g, padding_idx)
    return twins.embedding_gram(index, g, padding_idx)


def conv_formed(
    x: Tensor,
    g: Tensor,
    kernel: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int = 1,
    transposed: bool = False,
    out: Tensor | None = None,
) -> Tensor:
    """Weight gradients (b, O, C / groups, *kernel), float32, of a convolution in 1 to 3 dimensions.

    x (b, C, *in), g (b, O, *out), of any strides; ``transposed``: (b, C, O / groups, *kernel).
    Squares: bounds.formed(T, size) or formed_norm, S of :func:`conv_scale`. ``out`` as above.
    """
    door = compiled.conv_formed if native(x, g) else twins.conv_formed
    return door(x, g, kernel, stride, padding, dilation, groups, transposed, out)


def conv_norms(
    x: Tensor,
    g: Tensor,
    kernel: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int = 1,
    transposed: bool = False,
) -> Tensor:
    """n2 of the same, forming each gradient tile by tile in registers and never writing it out.

    Costs the FLOPs of the plain weight gradient. gamma: bounds.conv_norms with :func:`conv_scale`;
    n2^(1/2) + bounds.formed_norm S is the tighter bound, for which a rough S will do.
    """
    door = compiled.conv_norms if native(x, g) else twins.conv_norms
    return door(x, g, kernel, stride, padding, dilation, groups, transposed)


def conv_scale(
    x: Tensor,
    g: Tensor,
    kernel: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int = 1,
    transposed: bool = False,
) -> Tensor:
    """S of a convolution, float64 (b,): sum_t |g_t||u_t|, u_t the window; over groups, the root
    of the sum of squares."""
    door = compiled.conv_scale if native(x, g) else twins.conv_scale
    return door(x, g, kernel, stride, padding, dilation, groups, transposed)


def conv_gram(
    x: Tensor,
    g: Tensor,
    kernel: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int = 1,
    transposed: bool = False,
) -> tuple[Tensor, Tensor]:
    """(n2, S) by Gram matrices over output positions: cheap where these are few.

    Compiled, with strides of 1 and one group: (u_t . u_s) is the padded input's Gram matrix summed
    over the taps along its diagonals, so nothing is unfolded. Else windows are written out and
    :func:`gram_pair` does it. gamma: bounds.conv_gram.
    """
    door = compiled.conv_gram if native(x, g) else twins.conv_gram
    return door(x, g, kernel, stride, padding, dilation, groups, transposed)


def scale_rows(g: Tensor, c: Tensor, keep: Tensor, out: Tensor | None = None) -> Tensor:
    """c_i g_i for g (b, ...), c (b,); exact zeros where ``keep`` (b,) bool is not set.

    Rows not kept become zeros even where they hold infinities or NaN. ``out`` may be g itself.
    """
    door = compiled.scale_rows if native(g, c) else twins.scale_rows
    return door(g, c, keep, out)


def accumulate(total: Tensor, part: Tensor, inverse_step: float) -> None:
    """total (d,) int64 += rint(part * inverse_step), part (d,) float32, the product in float64.

    ``inverse_step`` is a power of two, so that the product is exact; halves go to the even integer.
    What is not finite, or 2^62 and more, counts as zero.
    """
    _contiguous(total, torch.int64)
    door = compiled.accumulate if native(part) else twins.accumulate
    door(total, part, inverse_step)


def finish(total: Tensor, factor: float, out: Tensor) -> None:
    """out (d,) float32 = total (d,) int64 * factor, in float64, rounded once more."""
    _contiguous(total, torch.int64)
    _contiguous(out, torch.float32)
    door = compiled.finish if native(out) else twins.finish
    door(total, factor, out)


def weighted_sum(formed: Tensor, c: Tensor) -> Tensor:
    """sum_i c_i formed_i, (n,) float32, for formed (b, n), c (b,).

    A row of weight zero does not count, whatever it holds. Error: bounds.weighted_sum.
    """
    return compiled.weighted_sum(formed, c) if native(formed, c) else twins.weighted_sum(formed, c)


def contract(
    g: Tensor, x: Tensor, c: Tensor, keep: Tensor, chunk: int, out: Tensor | None = None
) -> Tensor:
    """sum_t c_t g_t x_t^T, (m, n) float32, for g (b * T, m), x (b * T, n), c and ``keep`` (b,).

    Tokens of a record that is not kept count as zeros, whatever they hold. At most ``chunk`` terms
    are added in float32 before their sum is; error: bounds.contract.
    """
    door = compiled.contract if native(g, x, c) else twins.contract
    return door(g, x, c, keep, chunk, out)


def conv_contract(
    x: Tensor,
    g: Tensor,
    c: Tensor,
    keep: Tensor,
    chunk: int,
    kernel: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int = 1,
    transposed: bool = False,
    out: Tensor | None = None,
) -> Tensor:
    """The same of a convolution: its weight gradient with records weighted by c (b,)."""
    door = compiled.conv_contract if native(x, g, c) else twins.conv_contract
    return door(x, g, c, keep, chunk, kernel, stride, padding, dilation, groups, transposed, out)


def embedding_add(
    total: Tensor,
    index: Tensor,
    g: Tensor,
    c: Tensor,
    keep: Tensor,
    inverse_step: float,
    padding_idx: int | None = None,
) -> None:
    """total (rows, m) int64 += rint(c_i A_i inverse_step) for each record i that is kept.

    A_i: the embedding's gradient for index (b, T), g (b, T, m) as :func:`embedding_gram` has it,
    added up in float64. Every record is rounded by itself, so that none moves another's entries.
    ``inverse_step`` is a power of two. Indices are not checked.
    """
    _contiguous(total, torch.int64)
    door = compiled.embedding_add if native(g, c) else twins.embedding_add
    door(total, index, g, c, keep, inverse_step, padding_idx)


def channel_affine(g: Tensor, x: Tensor, mean: Tensor, rstd: Tensor) -> tuple[Tensor, Tensor]:
    """(dw, db), each (b, C), of a group norm's scale and shift, for g, x (b, C, ...), mean, rstd
    (b, G)."""
    door = compiled.channel_affine if native(g, x, mean, rstd) else twins.channel_affine
    return door(g, x, mean, rstd)


def token_affine(g: Tensor, x: Tensor, mean: Tensor, rstd: Tensor) -> tuple[Tensor, Tensor]:
    """(dw, db), each (b, m), of a layer norm's scale and shift, for g, x (b, T, m), mean, rstd
    (b, T)."""
    door = compiled.token_affine if native(g, x, mean, rstd) else twins.token_affine
    return door(g, x, mean, rstd)


def channel_sum(g: Tensor) -> Tensor:
    """Sums over all axes but the first two, (b, C) float32, for g (b, C, ...)."""
    return compiled.channel_sum(g) if native(g) else twins.channel_sum(g)


def _contiguous(t: Tensor, dtype: torch.dtype) -> None:
    if t.dtype != dtype or not t.is_contiguous():
        raise TypeError(f"a contiguous {dtype} tensor is needed")
