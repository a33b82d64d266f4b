"""Matrix products by whichever of torch's libraries is quicker here.

MKL runs at about half of oneDNN's speed on some CPUs, and at small widths its result depends on the
record's place. Which one does a product is timed on its very shapes and strides, once a process,
and decides nothing but speed: a product over records' values is taken only where it treats every
slot alike (rule P13, :mod:`casemate.engine.probe`). Sums over records are not made here: their
rounding is certified (:mod:`casemate.engine.sites`).
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from operator import itemgetter
from typing import Any, Final, TypeAlias

import torch

from casemate.engine.nodes import Env, Runner
from casemate.engine.probe import Replacement, same_in_every_slot, way_of
from casemate.graph.model import Node, Ref

Tensor: TypeAlias = torch.Tensor
Product: TypeAlias = Callable[[Tensor, Tensor, Tensor | None], Tensor]
# One library must be this much quicker before it is preferred to torch's own choice.
_MARGIN: Final = 0.95
_REPEATS: Final = 5
_BEHIND: Final = 1.3


def _own(a: Tensor, b: Tensor, bias: Tensor | None) -> Tensor:
    return torch.mm(a, b) if bias is None else torch.addmm(bias, a, b)


def _onednn(a: Tensor, b: Tensor, bias: Tensor | None) -> Tensor:
    made: Tensor = torch.ops.mkldnn._linear_pointwise(a, b.t(), bias, "none", [], "")
    return made


def _packed(a: Tensor, b: Tensor, bias: Tensor | None) -> Tensor:
    """oneDNN with the weight's columns in rows: its own copying of long columns is slow."""
    return _onednn(a, b.t().contiguous().t(), bias)


def _onednn_there() -> bool:
    return torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")  # type: ignore[no-untyped-call]


def _fits(*operands: Tensor | None) -> bool:
    """Whether oneDNN's product takes these."""
    return _onednn_there() and all(
        t is None
        or (t.device.type == "cpu" and t.dtype == torch.float32 and t.numel() > 0
            and all(s > 0 for s in t.stride()))
        for t in operands
    )  # fmt: skip


_Key: TypeAlias = tuple[Any, ...]
_seconds: dict[_Key, tuple[float, ...]] = {}


def _layout(t: Tensor | None) -> Any:
    return None if t is None else (tuple(t.shape), t.stride())


def _timed(ways: Sequence[Product], a: Tensor, b: Tensor, bias: Tensor | None) -> tuple[float, ...]:
    """Seconds of each way on operands laid out as these, interleaved; once a process."""
    key = (tuple(w.__name__ for w in ways), _layout(a), _layout(b), _layout(bias))
    if key not in _seconds:
        made = [
            None if t is None
            else torch.empty_strided(t.size(), t.stride(), dtype=t.dtype).normal_()
            for t in (a, b, bias)
        ]  # fmt: skip
        left, right, row = made
        assert left is not None and right is not None
        best = [float("inf")] * len(ways)
        with torch.inference_mode():
            for round_ in range(_REPEATS):
                for i, way in enumerate(ways):
                    start = time.thread_time()
                    way(left, right, row)
                    best[i] = min(best[i], time.thread_time() - start)
                if round_ and max(best) > _BEHIND * min(best):
                    break
        _seconds[key] = tuple(best)
    return _seconds[key]


def _operands(node: Node) -> tuple[str, str, str | None] | None:
    """Names of (left, right, bias) where ``node`` is a plain product."""
    refs = [a.name for a in node.args if isinstance(a, Ref)]
    if len(refs) != len(node.args) or any(v != 1 for v in node.kwargs.values()):
        return None
    if node.op == "aten.mm.default":
        return refs[0], refs[1], None
    if node.op == "aten.addmm.default":
        return refs[1], refs[2], refs[0]
    return None


def _as_call(names: tuple[str, str, str | None], way: Product) -> Replacement:
    left, right, bias = names

    def run(values: Mapping[str, Any]) -> Tensor:
        return way(values[left], values[right], None if bias is None else values[bias])

    return run


def chooser(runner: Runner) -> Callable[[Node, Env], Replacement | None]:
    """A function of a node and the values as a run has them. It gives what another library than
    torch's own choice shall do instead, where that treats all slots alike and either is quicker, or
    torch's own does not."""
    known: dict[Any, bool] = {}

    def alike(way: Product, node: Node, names: tuple[str, str, str | None], env: Env) -> bool:
        batches = tuple(runner.proved.values[n].batch for n in names if n is not None)
        key = (way, batches, *(_layout(env[n]) for n in names if n is not None))
        if key not in known:
            known[key] = same_in_every_slot(runner, node, env, _as_call(names, way))
        return known[key]

    def chosen(node: Node, env: Env) -> Replacement | None:
        names = _operands(node)
        if names is None:
            return None
        left, right, bias = names
        a, b, row = env[left], env[right], None if bias is None else env[bias]
        if not _fits(a, b, row) or (row is not None and row.dim() != 1):
            return None
        ways = (_own, _onednn) if b.t().is_contiguous() else (_own, _onednn, _packed)
        own, *others = _timed(ways, a, b, row)
        needed = way_of(runner, node, env) is not None
        for seconds, way in sorted(zip(others, ways[1:], strict=True), key=itemgetter(0)):
            if not needed and seconds >= _MARGIN * own:
                break
            # Whatever follows was tried on the strides of torch's own result.
            made = way(a, b, row)
            if made.stride() == env[node.name].stride() and alike(way, node, names, env):
                return _as_call(names, way)
        return None

    return chosen
