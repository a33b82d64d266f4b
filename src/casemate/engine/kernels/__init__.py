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

Operands are float32. On the CPU ``compiled`` does the work where there is a compiler, one thread,
bits independent of the slot; else ``twins``, plain torch on any device, whose page has each door.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import ParamSpec, TypeVar

import torch

from casemate.engine.kernels import bounds, compiled, twins
from casemate.engine.kernels.window import Window

__all__ = [
    "Window",
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
    "noting",
    "row_squares",
    "token_affine",
    "weighted_sum",
]

P = ParamSpec("P")
T = TypeVar("T")


def native() -> bool:
    """Whether there are compiled kernels."""
    return compiled.library() is not None


def noting() -> bool:
    """Whether kernels are noted as operations of a graph, not run."""
    return compiled.noting()


def _fits(operand: object) -> bool:
    if not isinstance(operand, torch.Tensor):
        return True
    return operand.is_cpu and operand.dtype == torch.float32


def _door(kernel: Callable[P, T], twin: Callable[P, T], *whole: int) -> Callable[P, T]:
    """The kernel where it takes the operands; ``whole``: places of those that are not float32."""

    @functools.wraps(twin)
    def door(*args: P.args, **kwargs: P.kwargs) -> T:
        operands = [a for i, a in enumerate(args) if i not in whole]
        taken = native() and all(map(_fits, (*operands, *kwargs.values())))
        return (kernel if taken else twin)(*args, **kwargs)

    return door


row_squares = _door(compiled.row_squares, twins.row_squares)
gram_pair = _door(compiled.gram_pair, twins.gram_pair)
formed_outer = _door(compiled.formed_outer, twins.formed_outer)
formed_sum = _door(compiled.formed_sum, twins.formed_sum)
embedding_gram = _door(compiled.embedding_gram, twins.embedding_gram, 0)
conv_formed = _door(compiled.conv_formed, twins.conv_formed)
conv_norms = _door(compiled.conv_norms, twins.conv_norms)
conv_scale = _door(compiled.conv_scale, twins.conv_scale)
conv_gram = _door(compiled.conv_gram, twins.conv_gram)
accumulate = _door(compiled.accumulate, twins.accumulate, 0)
finish = _door(compiled.finish, twins.finish, 0)
weighted_sum = _door(compiled.weighted_sum, twins.weighted_sum)
contract = _door(compiled.contract, twins.contract, 3)
conv_contract = _door(compiled.conv_contract, twins.conv_contract, 3)
embedding_add = _door(compiled.embedding_add, twins.embedding_add, 0, 1, 4)
channel_affine = _door(compiled.channel_affine, twins.channel_affine)
token_affine = _door(compiled.token_affine, twins.token_affine)
channel_sum = _door(compiled.channel_sum, twins.channel_sum)
