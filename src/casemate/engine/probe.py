"""Whether a kernel gives a record the same bits in every slot, whatever the other slots hold (P13).

A record's row of a batched operation may depend on its slot through the order in which the kernel
adds, or through different code at a ragged end; and on the other slots through a branch on values
of a whole vector or batch. No trial on random operands finds a difference that is rare, so what is
computed entry by entry is settled by structure (:func:`entrywise`, :func:`even`):

1. an operation of :data:`EXACT` is one operation of IEEE 754 or a choice: any code gives its bits;
2. any other one runs over memory as one run of whole vectors, so that all entries go through the
   same code; where operands and results do not lie so, :func:`evenly` lays them so;
3. that this code gives each lane the same bits whatever the other lanes hold is tried on 2^17
   entries of our own choosing, over all magnitudes.

What adds up (products, sums, norms, softmax) is tried at the very shapes, strides and alignments
that the run has, on dense random operands: two orders of summation differ in the last bits of a
good part of thousands of entries. The model decides which operations are tried and not what they
are tried on, so no model can hide an amplifier from the probe. An operation that fails is run one
record at a time, in the same buffers. Which NaN a result is may differ: no operation of the closed
table tells one from another.
"""

from __future__ import annotations

import math
import weakref
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Final, TypeAlias

import torch

from casemate.engine.nodes import Env, Runner, from_rows, mapped, to_rows
from casemate.engine.program import resolve, uses
from casemate.engine.trials import (
    ALIGNED,
    Slots,
    Spoil,
    laid,
    other_weights,
    place,
    rounds_for,
    same,
    spread,
)
from casemate.graph.model import Node, Ref
from casemate.graph.ops import JOINT

__all__ = [
    "EXACT", "STEP", "Replacement", "entrywise", "even", "evenly", "exact", "laid", "one_by_one",
    "place", "prober", "same_in_every_lane", "same_in_every_slot", "way_of",
]  # fmt: skip

Replacement: TypeAlias = Callable[[Mapping[str, Any]], Any]

# Entries that any vector loop of torch takes at once at most: four vectors of 64 bytes of float32.
STEP: Final = 64
_TRIED: Final = 1 << 17
_HOSTILE: Final = (0.0, math.nan, math.inf, -1e38, 1e-42)

EXACT: Final = frozenset(
    "aten." + name for name in (
        "abs.default", "add.Scalar", "add.Tensor", "bitwise_and.Scalar", "bitwise_and.Tensor",
        "bitwise_not.default", "bitwise_or.Scalar", "bitwise_or.Tensor", "bitwise_xor.Scalar",
        "bitwise_xor.Tensor", "ceil.default", "clamp.Tensor", "clamp.default", "clamp_max.default",
        "clamp_min.default", "clone.default", "div.Scalar", "div.Tensor", "eq.Scalar", "eq.Tensor",
        "floor.default", "ge.Scalar", "ge.Tensor", "gt.Scalar", "gt.Tensor",
        "hardshrink_backward.default", "hardtanh.default", "hardtanh_backward.default",
        "isfinite.default", "isinf.default", "isnan.default", "le.Scalar", "le.Tensor",
        "leaky_relu.default", "leaky_relu_backward.default", "logical_and.default",
        "logical_not.default", "logical_or.default", "logical_xor.default", "lt.Scalar",
        "lt.Tensor", "masked_fill.Scalar", "masked_fill.Tensor", "max.other", "maximum.default",
        "min.other", "minimum.default", "mul.Scalar", "mul.Tensor", "nan_to_num.default",
        "ne.Scalar", "ne.Tensor", "neg.default", "reciprocal.default", "relu.default",
        "sgn.default", "sign.default", "sqrt.default", "square.default", "sub.Scalar",
        "sub.Tensor", "threshold.default", "threshold_backward.default", "trunc.default",
        "where.Scalar", "where.ScalarOther", "where.ScalarSelf", "where.self",
    )
)  # fmt: skip
# Entry by entry, though torch does not tag them so.
_ALSO: Final = frozenset(
    "aten." + name for name in (
        "_prelu_kernel.default", "_prelu_kernel_backward.default", "elu_backward.default",
        "floor_divide.default", "hardsigmoid_backward.default", "hardswish.default",
        "hardswish_backward.default", "huber_loss.default", "huber_loss_backward.default",
        "log_sigmoid_backward.default", "log_sigmoid_forward.default", "mish_backward.default",
        "mse_loss.default", "mse_loss_backward.default", "rsub.Tensor", "smooth_l1_loss.default",
        "smooth_l1_loss_backward.default", "soft_margin_loss.default",
        "soft_margin_loss_backward.default", "softplus_backward.default",
        "softshrink_backward.default",
    )
)  # fmt: skip


# --- what is computed entry by entry ---


def exact(node: Node) -> bool:
    """Whether any code for the node gives the same bits: see :data:`EXACT`."""
    scaled = node.kwargs.get("alpha", 1) != 1 or (
        node.op in ("aten.add.Scalar", "aten.sub.Scalar") and node.args[2:] not in ((), (1,))
    )
    power = node.op == "aten.pow.Tensor_Scalar" and node.args[1] in (1, 2)
    return power or (node.op in EXACT and not scaled)


def entrywise(node: Node, given: Sequence[Sequence[int]], made: Sequence[Sequence[int]]) -> bool:
    """Whether each entry of the results is a function of the operands' entries there, and not
    :func:`exact`. given, made: the sizes of operands and results."""
    op: Any = resolve(node.op, JOINT)
    if exact(node) or not (node.op in _ALSO or torch.Tag.pointwise in getattr(op, "tags", ())):
        return False
    try:
        whole = tuple(torch.broadcast_shapes(*given))  # type: ignore[no-untyped-call]
    except RuntimeError:
        return False
    return bool(made) and all(tuple(sizes) == whole for sizes in made)


def _run_of(t: torch.Tensor) -> tuple[tuple[int, int], ...]:
    """Sizes and strides where there is more than one entry."""
    return tuple((d, s) for d, s in zip(t.shape, t.stride(), strict=True) if d != 1)


def _dense(t: torch.Tensor) -> bool:
    left = 1
    for d, s in sorted(_run_of(t), key=lambda pair: pair[1]):
        if s != left:
            return False
        left *= d
    return True


def _aligned(t: torch.Tensor) -> bool:
    return t.storage_offset() * t.element_size() % ALIGNED == 0


def even(given: Sequence[torch.Tensor], made: Sequence[torch.Tensor]) -> bool:
    """Whether an operation entry by entry is one run over memory without a ragged end: all lie
    densely in one order, from an aligned place, and are a multiple of :data:`STEP`."""
    many = [t for t in given if t.numel() > 1]
    first, *others = [*made, *many]
    return (
        first.numel() % STEP == 0
        and _dense(first)
        and all(_run_of(t) == _run_of(first) for t in others)
        and all(map(_aligned, (first, *others)))
    )


def _flat(
    values: Mapping[str, Any], names: Sequence[str], flats: Mapping[str, torch.Tensor]
) -> dict[str, Any]:
    """Values with ``flats`` in place; of what has one entry, no more than one axis is left."""
    single = {n: values[n].reshape(1) for n in names if n not in flats and values[n].dim() > 1}
    return {**values, **single, **flats}


def evenly(runner: Runner, node: Node, env: Mapping[str, Any]) -> Replacement:
    """The node's operation, entry by entry, on operands copied to where they are :func:`even`;
    results lie as in ``env``."""
    outs = runner.outs(node)
    places = [place(env[o]) for o in outs]
    sizes, count = places[0].sizes, math.prod(places[0].sizes)
    names = list(dict.fromkeys(uses(node)))
    buffers = {
        n: torch.zeros(-(-count // STEP) * STEP, dtype=env[n].dtype)
        for n in names
        if env[n].numel() > 1
    }

    def run(values: Mapping[str, Any]) -> Any:
        for n, buffer in buffers.items():
            buffer[:count].view(sizes).copy_(values[n])
        made = runner.call(node, _flat(values, names, buffers), runner.rows)
        found = made if isinstance(made, list | tuple) else [made]
        out = [laid(t[:count].view(sizes), at) for t, at in zip(found, places, strict=True)]
        return out if outs != [node.name] else out[0]

    return run


# --- what is tried ---


def same_in_every_slot(runner: Runner, node: Node, env: Env, call: Replacement) -> bool:
    """Whether ``call(values)`` treats all slots of ``node``'s operands alike, bit for bit.

    env: the operands as a run has them: integers are tried as they are; floats, trained tensors'
    too, which a model may start from zero, are replaced.
    """
    rows, values_of = runner.rows, runner.proved.values
    read = list(dict.fromkeys(uses(node)))
    of_records = [n for n in read if values_of[n].batch is not None]
    names = [n for n in of_records if not values_of[n].slot]  # a record's place is not the record's
    if not names:
        return True
    generator = torch.Generator().manual_seed(0)  # tries kernels, guards nothing
    slots = Slots([(env[n], values_of[n]) for n in names], rows)
    weights = {n: env[n] for n in read if n not in of_records and env[n].is_floating_point()}
    outs = [(o, values_of[o]) for o in runner.outs(node)]

    entries = sum(env[o].numel() for o, v in outs if v.batch is not None and env[o] is not None)
    for round_ in range(rounds_for(entries)):
        slots.draw(round_, generator, not round_)
        fixed = other_weights(weights, round_, generator) if round_ else {}

        def outputs(
            operands: list[torch.Tensor], fixed: Mapping[str, Any] = fixed
        ) -> list[torch.Tensor]:
            made = call({**env, **fixed, **dict(zip(names, operands, strict=True))})
            found = made if isinstance(made, list | tuple) else (made,)
            return [
                to_rows(t, v, rows)
                for (_, v), t in zip(outs, found, strict=False)
                if t is not None and v.batch is not None
            ]

        order = torch.randperm(rows, generator=generator)
        beside: Spoil = (-round_, (None, _HOSTILE[round_ % len(_HOSTILE)], math.nan))
        if not all(slots.alike(outputs, [order], [beside])):
            return False
    return True


def same_in_every_lane(runner: Runner, node: Node, env: Mapping[str, Any]) -> bool:
    """Whether an operation entry by entry gives an entry the same bits whatever the others are and
    wherever it lies, over one :func:`even` run of many entries."""
    generator = torch.Generator().manual_seed(0)  # tries kernels, guards nothing
    names = list(dict.fromkeys(uses(node)))
    many = [n for n in names if env[n].numel() > 1]

    def operand(t: torch.Tensor) -> torch.Tensor:
        if t.dtype == torch.bool:
            return torch.rand(_TRIED, generator=generator) < 0.5
        if not t.is_floating_point():
            return torch.randint(-2, 3, (_TRIED,), generator=generator).to(t.dtype)
        half = torch.randn(_TRIED // 2, generator=generator) * 3.0
        both = torch.cat([half, spread(half.shape, generator)]).to(t.dtype)
        return both[torch.randperm(_TRIED, generator=generator)]

    def outputs(flats: Mapping[str, torch.Tensor]) -> list[torch.Tensor]:
        made = runner.call(node, _flat(env, names, flats), runner.rows)
        return list(made) if isinstance(made, list | tuple) else [made]

    tried = {n: operand(env[n]) for n in many}
    first = outputs(tried)
    floats = [t for t in tried.values() if t.is_floating_point()]
    # Anywhere; and each among others of its size.
    orders = [torch.randperm(_TRIED, generator=generator), *(t.abs().argsort() for t in floats)]
    for order in orders:
        turned = outputs({n: t[order] for n, t in tried.items()})
        if not all(same(a[order], b) for a, b in zip(first, turned, strict=True)):
            return False
    for value in _HOSTILE:
        kept = torch.rand(_TRIED, generator=generator) < 0.25
        mixed = {
            n: torch.where(kept, t, value) if t.is_floating_point() else t for n, t in tried.items()
        }
        changed = outputs(mixed)
        if not all(same(a[kept], b[kept]) for a, b in zip(first, changed, strict=True)):
            return False
    return True


# --- what takes an operation's place ---


def one_by_one(runner: Runner, node: Node, env: Mapping[str, Any]) -> Replacement:
    """The node's operation, one record per call in the same buffers; takes its operands by name,
    and its results lie as in ``env``."""
    values = runner.proved.values
    names = [n for n in dict.fromkeys(uses(node)) if values[n].batch is not None]
    outs = runner.outs(node)
    changed = runner.without_sums(node)
    buffers = {n: torch.empty(values[n].sizes(1), dtype=env[n].dtype) for n in names}
    places = {o: place(env[o]) for o in outs if values[o].batch is not None and env[o] is not None}

    def run(given: Mapping[str, Any]) -> Any:
        flats = {n: to_rows(given[n], values[n], runner.rows) for n in names}
        one = {**given, **buffers}
        parts: list[list[torch.Tensor]] = []
        rest: list[Any] = []
        for i in range(runner.rows):
            for n in names:
                at = 0 if values[n].slot else i  # alone, a record's place is the first
                buffers[n].copy_(from_rows(flats[n][at : at + 1], values[n]))
            made = runner.call(node, one, 1, changed)
            rest = list(made) if isinstance(made, list | tuple) else [made]
            parts.append(
                [
                    to_rows(t, values[o], 1).clone()
                    for o, t in zip(outs, rest, strict=False)
                    if t is not None and values[o].batch is not None
                ]
            )
        whole = iter([torch.cat(p) for p in zip(*parts, strict=True)])
        out = [
            laid(from_rows(next(whole), values[o]), places[o])
            if t is not None and values[o].batch is not None
            else t
            for o, t in zip(outs, rest, strict=False)
        ]
        return out if outs != [node.name] else out[0]

    return run


def _key(runner: Runner, node: Node, env: Env) -> Any:
    def of(arg: Any) -> Any:
        if not isinstance(arg, Ref):
            return arg
        t = env[arg.name]
        return (place(t), t.dtype, runner.proved.values[arg.name].batch)

    kwargs = tuple((k, mapped(a, of)) for k, a in sorted(node.kwargs.items()))
    places = sorted((k, str(v)) for k, v in runner.noted.places.get(node.name, {}).items())
    # 1, 1.0 and True are equal.
    return node.op, repr((tuple(mapped(a, of) for a in node.args), kwargs, places))


def _whole(runner: Runner, node: Node) -> Replacement:
    changed = runner.without_sums(node)
    return lambda values: runner.call(node, values, runner.rows, changed)


_Way: TypeAlias = Callable[[Runner, Node, Env], Replacement] | None


def _way(runner: Runner, node: Node, env: Env) -> _Way:
    """How the node has to be run; ``None``: as it is."""
    given = [env[n] for n in dict.fromkeys(uses(node))]
    made = [env[o] for o in runner.outs(node)]
    way: _Way = None
    if all(isinstance(t, torch.Tensor) for t in made) and entrywise(
        node, [t.shape for t in given], [t.shape for t in made]
    ):
        try:
            alike = same_in_every_lane(runner, node, env)
        except (RuntimeError, IndexError):  # it does not take entries without their axes
            alike = False
        if not alike:
            return one_by_one
        if not even(given, made):
            way = evenly
    call = _whole(runner, node) if way is None else way(runner, node, env)
    return way if same_in_every_slot(runner, node, env, call) else one_by_one


_known: weakref.WeakKeyDictionary[Runner, dict[Any, _Way]] = weakref.WeakKeyDictionary()


def way_of(runner: Runner, node: Node, env: Env) -> _Way:
    """:func:`_way`, had once for each operation, geometry and place of a runner."""
    known, key = _known.setdefault(runner, {}), (runner.last, _key(runner, node, env))
    if key not in known:
        with torch.inference_mode():
            known[key] = _way(runner, node, env)
    return known[key]


def prober(runner: Runner) -> Callable[[Node, Env], tuple[Replacement, bool] | None]:
    """A function of a node and the values as a run has them. It gives ``None`` where the node
    treats all slots alike, else a replacement that does, and whether that is one record a call."""

    def tried(node: Node, env: Env) -> tuple[Replacement, bool] | None:
        way = way_of(runner, node, env)
        return None if way is None else (way(runner, node, env), way is one_by_one)

    return tried
