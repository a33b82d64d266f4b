"""Channels last: whether a graph with convolutions over images is run so.

A convolution over images keeps its channels innermost in memory where its weight lies so, and what
follows keeps the order, so laying the weights is all it takes (:meth:`nodes.Runner.lay`). oneDNN is
quicker then, and group norms are slower; what wins is timed (:func:`quicker`). Either way
:mod:`casemate.engine.probe` tries each operation in every slot at the strides that it has (P13),
and contractions read operands where they lie, so the choice changes nothing that is certified.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, Final

import torch

from casemate.engine.joint import SEED
from casemate.engine.program import uses
from casemate.graph.joint import Proved
from casemate.graph.model import Node, Ref

if TYPE_CHECKING:
    from casemate.engine.batched import Batched
    from casemate.engine.nodes import Runner

_LAST: Final = torch.channels_last
# Which argument is the weight.
_CONVOLUTIONS: Final = {"aten.convolution.default": 1, "aten.convolution_backward.default": 2}
# Channels last must be that much quicker.
_MARGIN: Final = 0.97
_ROUNDS: Final = 3
_BEHIND: Final = 1.1
_AGREE: Final = 1e-4
_ROUNDING: Final = 1e-6


def weights(proved: Proved) -> list[str]:
    """Values that do not depend on records and are read as weights of convolutions over images and
    as nothing else."""
    found: dict[str, bool] = {}
    for node in proved.joint.nodes:
        at = _CONVOLUTIONS.get(node.op)
        for name in uses(node):
            mine = at is not None and node.args[at] == Ref(name=name)
            mine = mine and uses(node).count(name) == 1
            found[name] = mine and found.get(name, True)
    values = proved.values
    return [
        n for n, mine in found.items()
        if mine and values[n].batch is None and not values[n].summed and values[n].rank == 4
    ]  # fmt: skip


def laid(t: torch.Tensor) -> torch.Tensor | None:
    """Memory for a copy of ``t`` with channels last; ``None`` where it lies so already.

    By strides: a depthwise weight, of one channel, lies either way, but torch takes the format
    of a convolution from the strides (with images of one pixel from nothing else)."""
    there = torch.empty_like(t, memory_format=_LAST)
    return None if there.stride() == t.stride() else there


def _same_order(op: Any) -> Callable[..., Any]:
    """torch 2.13's gradients of norms read the output gradient as if it lay as the input does, and
    are wrong where it does not."""

    def run(g: torch.Tensor, x: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        last = x.dim() == 4 and not x.is_contiguous() and x.is_contiguous(memory_format=_LAST)
        order = _LAST if last else torch.contiguous_format
        return op(g.contiguous(memory_format=order), x.contiguous(memory_format=order),
                  *args, **kwargs)  # fmt: skip

    return run


# Instead of an operation that asks for values in order.
INSTEAD: Final[Mapping[str, Callable[..., Any]]] = {
    "aten.view.default": torch.ops.aten.reshape.default,
    "aten._unsafe_view.default": torch.ops.aten.reshape.default,
    "aten.native_group_norm_backward.default": _same_order(
        torch.ops.aten.native_group_norm_backward.default
    ),
    "aten.native_batch_norm_backward.default": _same_order(
        torch.ops.aten.native_batch_norm_backward.default
    ),
}


def agrees(runner: Runner, node: Node, env: Mapping[str, Any], made: Any) -> bool:
    """Whether the node makes of operands in order what it ``made`` of them as they lie, but for
    rounding."""
    if all(env[n].is_contiguous() for n in uses(node)):
        return True
    ordered = {n: env[n].contiguous() for n in uses(node)}
    wanted = runner.call(node, ordered, runner.rows, runner.without_sums(node))
    # A mean may be all rounding.
    floats = [t for t in ordered.values() if t.is_floating_point() and t.numel()]
    sizes = [float(t.abs().max()) for t in floats]
    least = _ROUNDING * max(sizes, default=0.0)
    pairs = zip(_each(made), _each(wanted), strict=True)
    return all(_close(a, b, least) for a, b in pairs if a is not None)


def _each(made: Any) -> list[Any]:
    return list(made) if isinstance(made, list | tuple) else [made]


def _close(a: torch.Tensor, b: torch.Tensor, least: float) -> bool:
    if a.shape != b.shape or a.dtype != b.dtype:
        return False
    if not a.is_floating_point():
        return torch.equal(a, b)
    off, size = (float(torch.linalg.vector_norm(t.double())) for t in (a - b, b))
    return off <= _AGREE * size + least * math.sqrt(b.numel())


def _right(path: Batched, inputs: Mapping[str, torch.Tensor]) -> bool:
    """Whether every operation agrees with itself in order, node by node."""
    runner = path.runner
    env: dict[str, Any] = {**runner.fixed, **inputs}
    nodes = runner.order(list(inputs), path.wanted)
    last = {n: i for i, node in enumerate(nodes) for n in uses(node)}
    for i, node in enumerate(nodes):
        made = runner.call(node, env, runner.rows, runner.without_sums(node))
        if not agrees(runner, node, env, made):
            return False
        runner._store(node, env, made)
        for name in dict.fromkeys((*uses(node), *runner.outs(node))):
            if last.get(name, i) == i:
                env.pop(name, None)
    return True


def _forward(path: Batched, inputs: Mapping[str, torch.Tensor]) -> Callable[[], object]:
    """What makes the contractions' operands, as the runner lies now."""
    call, fixed = path.runner.function(list(inputs), path.wanted), dict(path.runner.fixed)
    return lambda: call(fixed, *inputs.values())


def quicker(path: Batched, data: Mapping[str, torch.Tensor]) -> bool:
    """Whether the operands of a microbatch's contractions are had quicker with channels last,
    without a prefix that is kept: norms and sums take as long either way. data: by name in the
    joint graph. False for graphs without convolutions over images, and where an operation goes
    wrong. The runner is left as either."""
    if not weights(path.proved):
        return False
    runner = path.runner
    forwards: dict[bool, Callable[[], object]] = {}
    with torch.inference_mode():
        runner.lay(False)
        fixed, call = runner.fixed, runner.function(list(data), path.source)
        kept = call(fixed, *data.values()) if path.keep else data.values()
        inputs = dict(zip(path.source, kept, strict=True)) | {SEED: torch.ones(runner.rows)}
        for last in (False, True):
            runner.lay(last)
            forwards[last] = _forward(path, inputs)
        return _less(forwards) and _right(path, inputs)


def _less(ways: Mapping[bool, Callable[[], object]]) -> bool:
    """Whether ``True`` takes less time than ``False``; not timed again where one is far behind."""
    best = dict.fromkeys(ways, math.inf)
    for round_ in range(_ROUNDS):
        for key, way in ways.items():
            # Of the processor: the clock sees what else the machine does.
            start = time.process_time()
            way()
            best[key] = min(best[key], time.process_time() - start)
        if round_ and max(best.values()) > _BEHIND * min(best.values()):
            break
    return best[True] < _MARGIN * best[False]


def slowed(path: Batched) -> bool:
    """Whether an operation over images is run one record a call."""
    values, slow = path.proved.values, set(path.slow)
    return any(
        f"{node.op} ({node.name})" in slow and any(values[n].rank == 4 for n in uses(node))
        for node in path.runner.nodes.values()
    )
