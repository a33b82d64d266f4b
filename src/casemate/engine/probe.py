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
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any, Final, NamedTuple, TypeAlias

import torch

from casemate.engine.nodes import Env, Runner, from_rows, mapped, to_rows
from casemate.engine.program import resolve, uses
from casemate.graph.model import Node, Ref
from casemate.graph.ops import JOINT, Value

Replacement: TypeAlias = Callable[[Mapping[str, Any]], Any]

# Entries that any vector loop of torch takes at once at most: four vectors of 64 bytes of float32.
STEP: Final = 64
_ALIGNED: Final = 64  # bytes; torch's allocator gives no less
_TRIED: Final = 1 << 17
_ENOUGH: Final = 10_000
_ROUNDS: Final = (4, 64)
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
    return t.storage_offset() * t.element_size() % _ALIGNED == 0


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


class Place(NamedTuple):
    """How a tensor lies in memory; shift: its first entry's place within a vector."""

    sizes: tuple[int, ...]
    strides: tuple[int, ...]
    shift: int


def place(t: torch.Tensor) -> Place:
    shift = int(t.storage_offset()) % (_ALIGNED // t.element_size())
    return Place(tuple(t.shape), t.stride(), shift)


def laid(t: torch.Tensor, at: Place) -> torch.Tensor:
    """A copy of ``t`` that lies so. Of axes with stride 0 what lies first counts."""
    first = tuple(slice(0, 1) if s == 0 else slice(None) for s in at.strides)
    source = t[first]
    reach = sum((d - 1) * s for d, s in zip(source.shape, at.strides, strict=True))
    memory = torch.empty(at.shift + max(0, reach) + 1, dtype=t.dtype, device=t.device)
    out = memory.as_strided(source.shape, at.strides, at.shift)
    return out.copy_(source).expand(at.sizes)


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


def same(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Bit for bit, but for which NaN a NaN is."""

    def equal(a: torch.Tensor, b: torch.Tensor) -> bool:
        return torch.equal(a.contiguous().view(torch.uint8), b.contiguous().view(torch.uint8))

    if equal(a, b):
        return True
    if not a.is_floating_point():
        return False
    nan = a.isnan()
    return torch.equal(nan, b.isnan()) and equal(a.masked_fill(nan, 0.0), b.masked_fill(nan, 0.0))


def _spread(sizes: Sequence[int], generator: torch.Generator) -> torch.Tensor:
    """Both signs, magnitudes from 1e-30 to 1e30."""
    exponents = torch.rand(sizes, generator=generator) * 60.0 - 30.0
    return torch.randn(sizes, generator=generator).sign() * torch.pow(10.0, exponents)


def drawn_as(sizes: Sequence[int], round_: int, generator: torch.Generator) -> torch.Tensor:
    if round_ % 4 == 3:
        return _spread(sizes, generator)
    return torch.randn(sizes, generator=generator) * (100.0 if round_ % 4 == 2 else 1.0)


def _outputs(runner: Runner, node: Node, made: Any) -> list[torch.Tensor]:
    """Records' rows of a node's results."""
    values = runner.proved.values
    found = made if isinstance(made, list | tuple) else (made,)
    return [
        to_rows(t, values[o], runner.rows).contiguous()
        for o, t in zip(runner.outs(node), found, strict=False)
        if t is not None and values[o].batch is not None
    ]


def same_in_every_slot(
    runner: Runner,
    node: Node,
    env: Env,
    call: Replacement,
    generator: torch.Generator,
) -> bool:
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
    places = {n: place(env[n]) for n in read}
    # Expanded along the records: all rows are one.
    shared = {n for n in names if places[n].strides[axis(values_of[n])] == 0 and rows > 1}
    own = {n: to_rows(env[n], values_of[n], rows) for n in names}
    weights = [n for n in read if n not in of_records and env[n].is_floating_point()]

    def outputs(of: Mapping[str, torch.Tensor], weights: Mapping[str, Any]) -> list[torch.Tensor]:
        values = {**env, **weights}
        for n in names:
            values[n] = laid(from_rows(of[n], values_of[n]), places[n])
        return _outputs(runner, node, call(values))

    rounds, done, round_ = _ROUNDS[0], 0, 0
    while round_ < rounds:
        tried, fixed = {}, {}
        for n, flat in own.items():
            drawn = flat.is_floating_point() and round_ > 0
            tried[n] = drawn_as(flat.shape, round_, generator) if drawn else flat.clone()
            if n in shared:
                tried[n] = tried[n][:1].expand(flat.shape).clone()
        for n in weights if round_ else ():
            drawn_ = torch.randn(env[n].shape, generator=generator)
            fixed[n] = laid(drawn_ if round_ % 2 else drawn_.abs() + 0.5, places[n])
        first = outputs(tried, fixed)
        order = torch.randperm(rows, generator=generator)
        turned = outputs({n: t[order] for n, t in tried.items()}, fixed)
        if not all(same(a[order], b) for a, b in zip(first, turned, strict=True)):
            return False
        keep = (torch.arange(rows) + round_) % 4
        mixed = beside(tried, shared, keep, _HOSTILE[round_ % len(_HOSTILE)])
        changed = outputs(mixed, fixed)
        kept = keep == 0
        if not all(same(a[kept], b[kept]) for a, b in zip(first, changed, strict=True)):
            return False
        done += sum(t.numel() for t in first)
        round_ += 1
        if round_ == rounds and done < _ENOUGH and rounds < _ROUNDS[1]:
            rounds += 1
    return True


def axis(v: Value) -> int:
    """Of the records."""
    assert v.batch is not None
    return v.batch.axis


def beside(
    tried: Mapping[str, torch.Tensor], shared: Collection[str], part: torch.Tensor, hostile: float
) -> dict[str, torch.Tensor]:
    """Copies of operands in which rows of ``part`` (rows,) 0 stay and others change: larger,
    ``hostile``, and not numbers at all. shared: operands whose rows are one, which stay."""
    mixed = {n: t.clone() for n, t in tried.items()}
    for n, t in mixed.items():
        if n in shared:
            continue
        if t.is_floating_point():
            t[part == 1] *= 1e20
            t[part == 2] = hostile
            t[part == 3] = math.nan
        else:
            t[part % 2 == 1] = t[:1].clone()
    return mixed


def same_in_every_lane(
    runner: Runner, node: Node, env: Mapping[str, Any], generator: torch.Generator
) -> bool:
    """Whether an operation entry by entry gives an entry the same bits whatever the others are and
    wherever it lies, over one :func:`even` run of many entries."""
    names = list(dict.fromkeys(uses(node)))
    many = [n for n in names if env[n].numel() > 1]

    def operand(t: torch.Tensor) -> torch.Tensor:
        if t.dtype == torch.bool:
            return torch.rand(_TRIED, generator=generator) < 0.5
        if not t.is_floating_point():
            return torch.randint(-2, 3, (_TRIED,), generator=generator).to(t.dtype)
        half = torch.randn(_TRIED // 2, generator=generator) * 3.0
        both = torch.cat([half, _spread(half.shape, generator)]).to(t.dtype)
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


def _way(runner: Runner, node: Node, env: Env, generator: torch.Generator) -> _Way:
    """How the node has to be run; ``None``: as it is."""
    given = [env[n] for n in dict.fromkeys(uses(node))]
    made = [env[o] for o in runner.outs(node)]
    way: _Way = None
    if all(isinstance(t, torch.Tensor) for t in made) and entrywise(
        node, [t.shape for t in given], [t.shape for t in made]
    ):
        try:
            alike = same_in_every_lane(runner, node, env, generator)
        except (RuntimeError, IndexError):  # it does not take entries without their axes
            alike = False
        if not alike:
            return one_by_one
        if not even(given, made):
            way = evenly
    call = _whole(runner, node) if way is None else way(runner, node, env)
    return way if same_in_every_slot(runner, node, env, call, generator) else one_by_one


def prober(runner: Runner) -> Callable[[Node, Env], tuple[Replacement, bool] | None]:
    """A function of a node and the values as a run has them. It gives ``None`` where the node
    treats all slots alike, else a replacement that does, and whether that is one record a call."""
    generator = torch.Generator().manual_seed(0)  # tests kernels, guards nothing
    known: dict[Any, _Way] = {}

    def tried(node: Node, env: Env) -> tuple[Replacement, bool] | None:
        with torch.inference_mode():
            key = _key(runner, node, env)
            if key not in known:
                known[key] = _way(runner, node, env, generator)
            way = known[key]
            return None if way is None else (way(runner, node, env), way is one_by_one)

    return tried
