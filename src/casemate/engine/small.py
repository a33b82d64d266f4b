"""What a step costs beside its arithmetic: clip factors and whole small steps in one native call.

At a thousand records of thirty features, forward and backward take a tenth of a millisecond, and
so would a few dozen tiny tensor operations. ``native/step.cpp`` has two doors. Clip factors: the
formula of :func:`casemate.engine.batched.factors`, which is the definition and the twin. And where
every site has one token a record and the products are few, norms, factors, the weighted sum and
the grid in one call, added up in float64; its twin is ``Batched.parts`` and ``accumulate``.
"""

from __future__ import annotations

import ctypes
import functools
import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

import torch

from casemate.engine import native
from casemate.engine.kernels import bounds
from casemate.engine.nodes import Runner
from casemate.engine.program import uses
from casemate.engine.sites import Outer, Shape, Site
from casemate.graph import joint as graph_joint
from casemate.graph.joint import Proved

# Multiplications in a microbatch's weighted sums up to which the plain loop beats a library's call.
MOST: Final = 1 << 20
_P, _I, _D = ctypes.c_void_p, ctypes.c_int64, ctypes.c_double
_DOORS: Final = {
    "factors": (_I, _I, _P, _P, _P, _P, _P, _D, _D, _P, _P),
    "sums": (_I, _I, _P, _P, _P, _P, _P, _P, _D, _D, _D, _P, _P, _P),
}


@functools.cache
def library() -> ctypes.CDLL | None:
    """The helper with its doors declared; ``None`` where it cannot be had."""
    found = native.library("step")
    if found is not None:
        for name, arguments in _DOORS.items():
            door = getattr(found, "step_" + name)
            door.argtypes = arguments
            door.restype = None
    return found


def _doubles(values: Sequence[float]) -> ctypes.Array[ctypes.c_double]:
    return (_D * len(values))(*values)


def _places(tensors: Sequence[torch.Tensor | None]) -> ctypes.Array[ctypes.c_void_p]:
    return (_P * len(tensors))(*(None if t is None else t.data_ptr() for t in tensors))


def factors(
    sites: Sequence[Site], norms: Sequence[Any], bound: float, units: int, share: float
) -> tuple[torch.Tensor, torch.Tensor] | None:
    """As :func:`casemate.engine.batched.factors`: (c (u,) float32, which count); ``None`` without
    the helper. share: what bounds c Q, the rounding a unit may bring into the sums."""
    helper = library()
    norms = [(n.squared, n.spread) for n in norms]
    held = [t for pair in norms for t in pair if t is not None]
    if helper is None or any(t.device.type != "cpu" or not t.is_contiguous() for t in held):
        return None
    c, good = torch.empty(units), torch.empty(units, dtype=torch.bool)
    helper.step_factors(
        len(sites), units, _places([n for n, _ in norms]), _places([s for _, s in norms]),
        _doubles([s.way.gamma for s in sites]), _doubles([s.way.error for s in sites]),
        bytes(not s.way.scaled for s in sites), bound, share, c.data_ptr(), good.data_ptr(),
    )  # fmt: skip
    return c, good


class Small:
    """A microbatch's clipped sum on the grid, for sites of one token; see :func:`build`."""

    def __init__(self, helper: ctypes.CDLL, parts: Sequence[_Part], shape: Shape) -> None:
        self._call, self._parts, self._rows = helper.step_sums, parts, shape.rows
        self._m = (_I * len(parts))(*(p.m for p in parts))
        self._n = (_I * len(parts))(*(p.n for p in parts))
        self._g, self._x, self._at = ((_P * len(parts))() for _ in range(3))
        self._gamma = _doubles([p.gamma for p in parts])
        self._error = _doubles([p.error for p in parts])
        self._scratch = torch.empty(max(p.m * p.n for p in parts), dtype=torch.float64)
        self._factors = torch.empty(shape.rows)

    def __call__(
        self, env: dict[str, Any], bound: float, share: float, step: float, total: torch.Tensor
    ) -> torch.Tensor:
        """Add to total (d,) int64; the units' factors (u,), valid until the next call."""
        base, held = total.data_ptr(), []
        for i, part in enumerate(self._parts):
            held.append(part.g(env).contiguous())
            self._g[i] = held[-1].data_ptr()
            if part.x is not None:
                held.append(part.x(env).contiguous())
                self._x[i] = held[-1].data_ptr()
            self._at[i] = base + 8 * part.offset
        self._call(
            len(self._parts), self._rows, self._g, self._x, self._m, self._n, self._gamma,
            self._error, bound, share, 1.0 / step, self._factors.data_ptr(),
            self._scratch.data_ptr(), self._at,
        )  # fmt: skip
        return self._factors


@dataclass(frozen=True, slots=True)
class _Part:
    g: Callable[[Mapping[str, Any]], torch.Tensor]
    x: Callable[[Mapping[str, Any]], torch.Tensor] | None
    m: int
    n: int
    gamma: float
    error: float
    offset: int


def build(
    runner: Runner, sites: Sequence[Site], shape: Shape, sizes: Sequence[int]
) -> Small | None:
    """The native step where every site has one token a record and there is little to multiply.

    sizes: elements of each trained tensor.
    """
    helper = library()
    if helper is None or shape.per_unit != 1:
        return None
    proved = runner.proved
    offsets = [0, *itertools.accumulate(sizes)]
    gradients = [(i, g) for i, g in enumerate(proved.joint.gradients) if g is not None]
    parts = []
    for (i, gradient), site in zip(gradients, sites, strict=True):
        if len(site.totals) != 1:
            return None
        (name,) = site.totals
        chain = runner.sums_behind([gradient], frozenset(site.totals))
        landed = runner.placement(name, chain)
        if landed is None or not torch.equal(landed, torch.arange(sizes[i])):
            return None
        part = _part(proved, name, shape, offsets[i])
        if part is None:
            return None
        parts.append(part)
    if not parts or shape.rows * sum(p.m * p.n for p in parts) > MOST:
        return None
    return Small(helper, parts, shape)


def _part(proved: Proved, name: str, shape: Shape, offset: int) -> _Part | None:
    node = proved.contractions.get(name)
    if node is None:  # a whole gradient, which is made of contractions
        return None
    refs = uses(node)
    values = [proved.values[r] for r in refs]
    if any(v.rank != 2 or v.batch is None or v.dtype != "f32" for v in values):
        return None
    kind = graph_joint.entry(node).site
    if kind == "outer":
        form = Outer(name, refs[0], refs[1], values[0], values[1], shape)
        m, n = form.sizes
        if form.count != 1 or [v.batch and v.batch.axis for v in values] != [1, 0]:
            return None
        return _Part(
            lambda env: env[refs[0]].t(), lambda env: env[refs[1]],
            m, n, bounds.rank_one(m, n), bounds.weighted_sum(shape.rows), offset,
        )  # fmt: skip
    batch = values[0].batch
    axes = graph_joint.bound(node, proved.values).axes
    if kind != "sum" or batch is None or (batch.axis, batch.outer, batch.inner) != (0, 1, 1):
        return None
    if axes(graph_joint.bound(node, proved.values).args.get("dim"), 2) != (0,):
        return None
    m = values[0].dims[1]
    return _Part(
        lambda env: env[refs[0]], None, m, 1, bounds.row_squares(m),
        bounds.weighted_sum(shape.rows), offset,
    )  # fmt: skip
