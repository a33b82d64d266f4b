"""What the kernels of convolutions are told of them."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, TypeVar

import torch

T = TypeVar("T")


class Window(NamedTuple):
    """Entries of kernel, stride, padding and dilation by axis of space, 1 to 3 of them.

    transposed: the convolution that has this one as its gradient by the input.
    """

    kernel: Sequence[int]
    stride: Sequence[int]
    padding: Sequence[int]
    dilation: Sequence[int]
    groups: int = 1
    transposed: bool = False


def windowed(before: int = 0) -> Callable[[Callable[..., T]], Callable[..., T]]:
    """A door that takes a :class:`Window` as one that takes its parts: (x, g, ``before`` more,
    *window, ...). One that is transposed is the plain one with its operands exchanged."""

    def of(door: Callable[..., T]) -> Callable[..., T]:
        @functools.wraps(door)
        def flat(x: torch.Tensor, g: torch.Tensor, *rest: Any, **named: Any) -> T:
            behind = before + len(Window._fields)
            w = Window(*rest[before:behind])
            if w.transposed:
                x, g, w = g, x, w._replace(transposed=False)
            return door(x, g, *rest[:before], w, *rest[behind:], **named)

        return flat

    return of
