"""Whether a kernel gives a record the same bits in every slot, whatever the other slots hold (P13).

A record's row of a batched operation may depend on its slot only through the order in which the
kernel adds, or through different code at the batch's ragged end; and on the other slots only
through a branch on values of the whole batch. Each operation of the joint graph is tried by itself,
at the very shapes and strides that the run has, on dense random operands of our own choosing: two
orders of summation, or two ways to an exponential, then differ in the last bits of some of
thousands of entries. The model decides which operations are tried and not what they are tried on,
so no model can hide an amplifier from this probe. An operation that fails is run one record at a
time, in the same buffers.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any, Final

import torch

from casemate.engine.nodes import Env, Runner, from_rows, to_rows
from casemate.engine.program import uses
from casemate.graph.model import Node, Ref
from casemate.graph.ops import Value

_ROUNDS: Final = 3


def _like(t: torch.Tensor, flat: torch.Tensor, v: Value) -> torch.Tensor:
    """Rows as a tensor with the strides of ``t``."""
    if any(s == 0 and d > 1 for s, d in zip(t.stride(), t.shape, strict=True)):
        return from_rows(flat, v)
    out = torch.empty_strided(t.size(), t.stride(), dtype=t.dtype)
    return out.copy_(from_rows(flat, v))


def _key(runner: Runner, node: Node, env: Env) -> Any:
    def of(arg: Any) -> Any:
        if isinstance(arg, Ref):
            t = env[arg.name]
            return (tuple(t.shape), t.stride(), t.dtype, runner.proved.values[arg.name].batch)
        items = getattr(arg, "items", None)
        return tuple(of(x) for x in items) if isinstance(items, tuple) else arg

    kwargs = tuple((k, of(a)) for k, a in sorted(node.kwargs.items()))
    return node.op, tuple(of(a) for a in node.args), kwargs


def same_in_every_slot(
    runner: Runner,
    node: Node,
    env: Env,
    call: Callable[[Mapping[str, Any]], Any],
    generator: torch.Generator,
) -> bool:
    """Whether ``call(values)`` treats all slots of ``node``'s operands alike, bit for bit.

    env: the operands as a run has them: integers are tried as they are, floats replaced.
    """
    rows = runner.rows
    values_of = runner.proved.values
    read = [n for n in dict.fromkeys(uses(node)) if values_of[n].batch is not None]
    names = [n for n in read if not values_of[n].slot]  # a record's place is not the record's
    if not names:
        return True
    flats = {n: to_rows(env[n], runner.proved.values[n], rows) for n in names}

    def outputs(of: Mapping[str, torch.Tensor]) -> list[torch.Tensor]:
        values = dict(env)
        for n in names:
            values[n] = _like(env[n], of[n], runner.proved.values[n])
        made = call(values)
        found = made if isinstance(made, list | tuple) else (made,)
        return [
            to_rows(t, runner.proved.values[o], rows).contiguous()
            for o, t in zip(runner.outs(node), found, strict=False)
            if t is not None and runner.proved.values[o].batch is not None
        ]

    def same(a: torch.Tensor, b: torch.Tensor) -> bool:
        return torch.equal(a.contiguous().view(torch.uint8), b.contiguous().view(torch.uint8))

    for round_ in range(_ROUNDS):
        tried = {}
        for n, flat in flats.items():
            random = flat.is_floating_point() and round_ > 0
            tried[n] = torch.randn(flat.shape, generator=generator) if random else flat.clone()
        first = outputs(tried)
        order = torch.randperm(rows, generator=generator)
        turned = outputs({n: t[order] for n, t in tried.items()})
        if not all(same(a[order], b) for a, b in zip(first, turned, strict=True)):
            return False
        # Other records: larger, smaller, and not numbers at all.
        mixed = {n: t.clone() for n, t in tried.items()}
        for t in mixed.values():
            if t.is_floating_point():
                t[1::4] *= 1e20
                t[2::4] = 0.0
                t[3::4] = math.nan
            else:
                t[1::2] = t[:1]
        changed = outputs(mixed)
        if not all(same(a[::4], b[::4]) for a, b in zip(first, changed, strict=True)):
            return False
    return True


def one_by_one(runner: Runner, node: Node) -> Callable[..., Any]:
    """The node's operation, one record per call in the same buffers; takes its operands by name."""
    values = runner.proved.values
    names = [n for n in dict.fromkeys(uses(node)) if values[n].batch is not None]
    outs = runner.outs(node)
    changed = runner.without_sums(node)
    buffers: dict[str, torch.Tensor] = {}

    def run(env: Mapping[str, Any]) -> Any:
        flats = {n: to_rows(env[n], values[n], runner.rows) for n in names}
        one = dict(env)
        for n in names:
            if n not in buffers:
                buffers[n] = torch.empty(values[n].sizes(1), dtype=env[n].dtype)
            one[n] = buffers[n]
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
            from_rows(next(whole), values[o])
            if t is not None and values[o].batch is not None
            else t
            for o, t in zip(outs, rest, strict=False)
        ]
        return out if outs != [node.name] else out[0]

    return run


def failing(runner: Runner, nodes: list[Node], env: Env) -> dict[str, Callable[..., Any]]:
    """Of the nodes, those that do not treat all slots alike, with a replacement that does."""
    generator = torch.Generator().manual_seed(0)  # tests kernels, guards nothing
    known: dict[Any, bool] = {}
    out: dict[str, Callable[..., Any]] = {}
    with torch.inference_mode():
        for node in nodes:
            key = _key(runner, node, env)
            if key not in known:
                changed = runner.without_sums(node)

                def call(
                    values: Mapping[str, Any], node: Node = node, changed: Any = changed
                ) -> Any:
                    return runner.call(node, values, runner.rows, changed)

                known[key] = same_in_every_slot(runner, node, env, call, generator)
            if not known[key]:
                out[node.name] = one_by_one(runner, node)
    return out
