"""Which nodes one fused kernel may stand for: see :mod:`casemate.engine.compiled`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final

import torch

from casemate.engine.nodes import Runner
from casemate.engine.program import maker, uses
from casemate.graph.model import Node, Ref

_VIEWS: Final = frozenset(
    "aten." + name for name in (
        "view.default", "reshape.default", "_unsafe_view.default", "expand.default", "t.default",
        "transpose.int", "permute.default", "unsqueeze.default", "squeeze.dim", "squeeze.dims",
        "alias.default", "detach.default",
    )
)  # fmt: skip
# Of these the lowering is loops over a record's own entries. What is missing stays whole, by
# measurement: norms, pooling and attention lose, and loops that gather look at indices.
_ROWS: Final = frozenset(
    "aten." + name for name in (
        "_log_softmax.default", "_log_softmax_backward_data.default", "_softmax.default",
        "_softmax_backward_data.default", "sum.dim_IntList", "mean.dim", "mse_loss.default",
    )
)  # fmt: skip
_ENTRIES: Final = frozenset(
    "aten." + name for name in (
        "add.Tensor", "add.Scalar", "sub.Tensor", "sub.Scalar", "rsub.Scalar", "mul.Tensor",
        "mul.Scalar", "div.Tensor", "div.Scalar", "neg.default", "relu.default",
        "threshold_backward.default", "gelu.default", "gelu_backward.default", "silu.default",
        "silu_backward.default", "sigmoid.default", "sigmoid_backward.default", "tanh.default",
        "tanh_backward.default", "exp.default", "sqrt.default", "rsqrt.default", "abs.default",
        "reciprocal.default", "square.default", "where.self", "clamp.default", "clamp_min.default",
        "clamp_max.default", "maximum.default", "minimum.default", "eq.Scalar", "eq.Tensor",
        "ne.Scalar", "ne.Tensor", "ge.Scalar", "ge.Tensor", "gt.Scalar", "gt.Tensor", "le.Scalar",
        "le.Tensor", "lt.Scalar", "lt.Tensor", "logical_and.default", "logical_not.default",
        "logical_or.default", "masked_fill.Scalar", "leaky_relu.default",
        "leaky_relu_backward.default", "hardtanh.default", "hardtanh_backward.default",
        "hardswish.default", "hardswish_backward.default", "hardsigmoid.default",
        "hardsigmoid_backward.default", "elu.default", "elu_backward.default", "softplus.default",
        "softplus_backward.default", "log.default", "log1p.default", "pow.Tensor_Scalar",
        "zeros_like.default", "ones_like.default", "full_like.default", "clone.default",
        "addcmul.default", "lerp.Scalar", "lerp.Tensor",
    )
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Island:
    """nodes in order; the values they read from outside, and those that are read outside."""

    nodes: tuple[Node, ...]
    reads: tuple[str, ...]
    makes: tuple[str, ...]


def islands(
    runner: Runner,
    order: Sequence[Node],
    wanted: Sequence[str],
    stay: frozenset[str] = frozenset(),
) -> list[Island]:
    """The parts of ``order`` worth fusing: two or more nodes that are no views, none of ``stay``.

    A node's level is how many nodes outside islands lie before it at most; what is connected within
    a level can be run at once, since a way out of an island and back goes up a level.
    """
    values = runner.proved.values
    fusible = {
        n.name for n in order if (n.name not in stay or n.op in _PRODUCTS) and _fusible(runner, n)
    }
    level: dict[str, int] = {}
    for node in order:
        before = [maker(r) for r in uses(node)]
        step = node.name in fusible
        level[node.name] = max(
            (level[m] + (step and m not in fusible) for m in before if m in level), default=0
        )
    group = {name: name for name in fusible}

    def find(name: str) -> str:
        while group[name] != name:
            name = group[name]
        return name

    for node in order:
        for m in map(maker, uses(node)):
            if node.name in fusible and m in fusible and level[m] == level[node.name]:
                group[find(m)] = find(node.name)
    together: dict[str, list[Node]] = {}
    for node in order:
        if node.name in fusible:
            together.setdefault(find(node.name), []).append(node)
    found = []
    for nodes in together.values():
        kept = _trimmed(nodes)
        if sum(n.op not in _VIEWS for n in kept) < 2:
            continue
        inside = {n.name for n in kept}
        reads = dict.fromkeys(r for n in kept for r in uses(n) if maker(r) not in inside)
        outside = set(wanted) | {r for n in order if n.name not in inside for r in uses(n)}
        makes = [o for n in kept for o in runner.outs(n) if o in outside]
        if all(values[o].batch is not None for o in makes):
            found.append(Island(tuple(kept), tuple(reads), tuple(makes)))
    return found


def _fusible(runner: Runner, node: Node) -> bool:
    values = runner.proved.values
    special = _small_product(runner, node) or _plain_loss(runner, node)
    if node.op not in _VIEWS | _ROWS | _ENTRIES and not special:
        return False
    if "memory_format" in runner.noted.places.get(node.name, {}):
        return False
    given = [values[r] for r in uses(node)]
    made = [values[o] for o in runner.outs(node)]
    return not any(v.summed or v.slot for v in (*given, *made))


# A product of a few columns is a sum along the record like any other, and there a library's call
# costs more than its arithmetic.
_SMALL: Final = 512


def _mm(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    return (a.unsqueeze(1) * b.t().unsqueeze(0)).sum(2)


def _addmm(bias: torch.Tensor, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    return _mm(a, b) + bias


def _nll(
    x: torch.Tensor, target: torch.Tensor, weight: None, reduction: int, ignore: int
) -> tuple[torch.Tensor, torch.Tensor]:
    hit = torch.arange(x.shape[1]) == target.unsqueeze(1)
    found = -torch.where(hit, x, 0.0).sum(1)
    return torch.where(target != ignore, found, 0.0), torch.zeros(())


def _nll_backward(
    grad: torch.Tensor, x: torch.Tensor, target: torch.Tensor, weight: None, reduction: int,
    ignore: int, total: torch.Tensor,
) -> torch.Tensor:  # fmt: skip
    hit = torch.arange(x.shape[1]) == target.unsqueeze(1)
    return torch.where(hit & (target != ignore).unsqueeze(1), -grad.unsqueeze(1), 0.0)


_PRODUCTS: Final = {"aten.mm.default": _mm, "aten.addmm.default": _addmm}
# Looking up a class would be a load by index; comparing is not.
_LOSSES: Final = {
    "aten.nll_loss_forward.default": _nll,
    "aten.nll_loss_backward.default": _nll_backward,
}
FORMS: Final[dict[str, Any]] = {**_PRODUCTS, **_LOSSES}


def _plain_loss(runner: Runner, node: Node) -> bool:
    if node.op not in _LOSSES or node.kwargs:
        return False
    at = 1 if node.op == "aten.nll_loss_backward.default" else 0
    x = node.args[at]
    weight, reduction = node.args[at + 2 : at + 4]
    return (
        isinstance(x, Ref) and runner.proved.values[x.name].rank == 2
        and weight is None and reduction == 0
    )  # fmt: skip


def _small_product(runner: Runner, node: Node) -> bool:
    if node.op not in _PRODUCTS or node.kwargs:
        return False
    *_, a, b = [runner.proved.values[r] for r in uses(node)]
    return b.batch is None and a.batch is not None and a.batch.axis == 0 and b.numel <= _SMALL


def _trimmed(nodes: Sequence[Node]) -> list[Node]:
    """Without views at the edges: outside they cost nothing."""
    kept = list(nodes)
    while True:
        inside = {n.name for n in kept}
        read = {maker(r) for n in kept for r in uses(n)}
        edge = {
            n.name for n in kept if n.op in _VIEWS
            and (n.name not in read or not any(maker(r) in inside for r in uses(n)))
        }  # fmt: skip
        if not edge:
            return kept
        kept = [n for n in kept if n.name not in edge]
