"""What float32 rounding may do to a computation, seen from a float64 evaluation of it.

Monte Carlo arithmetic (Parker, "Monte Carlo Arithmetic", UCLA CSD-970002, 1997): every operation is
evaluated in float64 and its operands and results are moved at random by as much as one in float32
might, so that the spread of the outcomes is the error that rounding can bring to any evaluation of
the same operations, ill-conditioned or not.

An operation whose results are sums of at most n products is, in float32, the exact one of operands
moved by at most lambda sqrt(n) u relatively, u = 2^-24, but for a probability of 2 exp(-lambda^2/2)
(Higham and Mary, "A new approach to probabilistic rounding error analysis", SIAM J. Sci. Comput.
41(5), 2019, theorem 3.1). Each operand is moved by sqrt(n) u times a number of mean square 1, and
results by u more; the outcomes' root mean square is then the error for lambda = 1.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Final

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

UNIT: Final = 2.0**-24
LAMBDA: Final = 6.0  # 2 exp(-18) = 3e-8: over a thousand graphs, not once in thirty thousand runs
# What moves or chooses numbers, and rounds nothing.
_EXACT = """
    view _unsafe_view reshape _reshape_alias t transpose permute expand squeeze unsqueeze select
    slice split split_with_sizes unbind alias detach as_strided diagonal unfold clone copy_ _to_copy
    lift_fresh cat stack repeat flip roll index index_select gather embedding where masked_fill neg
    abs relu sign sgn maximum minimum max min amax amin sort topk threshold_backward zeros_like
    ones_like zeros ones empty empty_like new_empty new_zeros new_empty_strided full full_like fill_
    zero_ scalar_tensor arange select_backward slice_backward max_pool2d_with_indices
    max_pool3d_with_indices constant_pad_nd reflection_pad1d reflection_pad2d replication_pad1d
    replication_pad2d randn normal_ triu tril eye eq ne lt le gt ge isnan isinf isfinite logical_not
    logical_and logical_or argmax argmin any all clamp clamp_min clamp_max
"""
EXACT: Final = frozenset(_EXACT.split())
# Elementwise: one operation on each number.
_SINGLE = """
    add sub rsub mul div addcmul addcdiv lerp exp log log1p expm1 exp2 sqrt rsqrt reciprocal sin
    cos tan tanh sigmoid erf pow square atan asinh sinh cosh silu gelu mish elu softplus
    tanh_backward sigmoid_backward silu_backward gelu_backward mish_backward elu_backward
    softplus_backward
"""
SINGLE: Final = frozenset(_SINGLE.split())


def _floats(x: Any) -> bool:
    return isinstance(x, Tensor) and x.dtype == torch.float64 and x.numel() > 0


class Rounded(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Float64 operations with the errors that float32 would make, drawn anew by each seed."""

    def __init__(self, seed: int) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.random = torch.Generator().manual_seed(seed)

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False

    def _moved(self, x: Tensor, by: float) -> Tensor:
        sign = torch.randint(2, x.shape, generator=self.random) * 2 - 1
        return x * (1 + by * sign)

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        name = func._schema.name.removeprefix("aten::")
        if name in EXACT:
            return func(*args, **kwargs)
        if func._schema.is_mutable:
            made = func(*args, **kwargs)
            if _floats(made):
                made.copy_(self._moved(made, UNIT))
            return made
        if name not in SINGLE:
            longest = max((a.numel() for a in args if isinstance(a, Tensor)), default=1)
            by = UNIT * longest**0.5
            args = tuple(self._moved(a, by) if _floats(a) else a for a in args)
        made = func(*args, **kwargs)
        if isinstance(made, tuple | list):
            return type(made)(self._moved(x, UNIT) if _floats(x) else x for x in made)
        return self._moved(made, UNIT) if _floats(made) else made


def error(run: Callable[[], Tensor], exact: Tensor, times: int = 6) -> float:
    """What rounding may do to the vector ``run()``, whose float64 value is ``exact``, in norm."""
    squares = []
    for seed in range(times):
        with Rounded(seed):
            made = run()
        squares.append(float((made - exact).square().sum()))
    return LAMBDA * (sum(squares) / times) ** 0.5
