"""Forward and backward of single nodes, noted below autograd as nodes that the proof can read.

A noter of its own, so that the rules are not tested by the engine's. What runs is noted at two
batch sizes, and an int that differs between them becomes the size that gives both.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from casemate.graph.model import DtypeArg, ListArg, Node, Ref, Size
from casemate.graph.ops import Value
from support.graphs import DTYPES, reader

NAMES = {dtype: name for name, dtype in DTYPES.items()}
SIZES = (7, 11)


class _Log(TorchDispatchMode):  # type: ignore[no-untyped-call]
    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.entries: list[tuple[Any, tuple[Any, ...], dict[str, Any], Any]] = []

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        self.entries.append((func, args, dict(kwargs or {}), out))
        return out


def plain() -> contextlib.AbstractContextManager[None]:
    """Without oneDNN, so that recurrent networks fall into cells."""
    flags: contextlib.AbstractContextManager[None] = torch.backends.mkldnn.flags(enabled=False)
    return flags


# What is not as it would be without the last underscore; memory not yet written starts as zeros.
_FUNCTIONAL = {
    "aten.transpose_.default": "aten.transpose.int",
    "aten.empty_like.default": "aten.zeros_like.default",
}


def functional(name: str) -> str:
    """``aten.add_.Tensor`` as ``aten.add.Tensor``."""
    space, op, last = name.split(".")
    return _FUNCTIONAL.get(name, f"{space}.{op.removesuffix('_')}.{last}")


def seen(run: Callable[[], object]) -> frozenset[str]:
    """The operations that run."""
    log = _Log()
    with plain(), log:
        run()
    return frozenset(functional(str(entry[0])) for entry in log.entries)


@dataclass(slots=True)
class _Raw:
    name: str
    op: str
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    outs: list[str | None]
    several: bool


@dataclass(slots=True)
class Noted:
    """nodes in order, those that nothing reads left out; outputs: names of what the function gave,
    ``None`` as it gave it; found: that at the last batch size; seen: all ops, read or not."""

    nodes: tuple[Node, ...]
    outputs: tuple[str | None, ...]
    found: tuple[torch.Tensor | None, ...]
    seen: frozenset[str]


_PLACE = ("device", "layout", "pin_memory", "memory_format", "non_blocking", "generator")


def _raw(
    run: Callable[[Mapping[str, torch.Tensor]], Sequence[torch.Tensor | None]],
    inputs: Mapping[str, torch.Tensor],
) -> tuple[list[_Raw], tuple[str | None, ...], list[torch.Tensor | None]]:
    names = {id(v): k for k, v in inputs.items()}
    alive: list[Any] = list(inputs.values())
    log = _Log()
    with log:
        found = list(run(inputs))
    alive.append(log.entries)
    out: list[_Raw] = []

    def read(arg: Any) -> Any:
        if isinstance(arg, torch.Tensor):
            return Ref(name=names[id(arg)])
        if isinstance(arg, list | tuple):
            return tuple(read(x) for x in arg)
        if isinstance(arg, torch.dtype):
            return DtypeArg(dtype=NAMES.get(arg, str(arg)))
        return arg

    for i, (func, args, kwargs, made) in enumerate(log.entries):
        given = tuple(read(a) for a in args)
        named = {k: read(v) for k, v in kwargs.items() if k not in _PLACE}
        several = isinstance(made, list | tuple)
        outs: list[str | None] = []
        for k, v in enumerate(made if several else (made,)):
            if isinstance(v, torch.Tensor):
                outs.append(f"n{i}.{k}" if several else f"n{i}")
                names[id(v)] = f"n{i}.{k}" if several else f"n{i}"
                alive.append(v)
            else:
                outs.append(None)
        out.append(_Raw(f"n{i}", functional(str(func)), given, named, outs, several))
    return out, tuple(None if g is None else names[id(g)] for g in found), found


def _merge(a: Any, b: Any) -> Any:
    """What stands for ``a`` at the first batch size and for ``b`` at the second."""
    if isinstance(a, tuple):
        assert isinstance(b, tuple) and len(a) == len(b)
        return ListArg(items=tuple(_merge(x, y) for x, y in zip(a, b, strict=True)))
    if type(a) is int and type(b) is int and a != b:
        slope, rest = divmod(b - a, SIZES[1] - SIZES[0])
        assert rest == 0
        return Size(a=slope, c=a - slope * SIZES[0])
    if type(a) is float and a in (float("inf"), float("-inf")):
        return str(a)
    assert a == b or (a != a and b != b), (a, b)
    return a


def _reads(arg: Any) -> list[str]:
    if isinstance(arg, Ref):
        return [arg.name]
    return [n for x in arg for n in _reads(x)] if isinstance(arg, tuple) else []


def note(
    run: Callable[[Mapping[str, torch.Tensor]], Sequence[torch.Tensor | None]],
    inputs: Callable[[int], Mapping[str, torch.Tensor]],
) -> Noted:
    """The operations of ``run`` on the inputs at each batch size."""
    with plain():
        (first, outs, _), (second, outs2, found) = (_raw(run, inputs(n)) for n in SIZES)
    assert [x.op for x in first] == [x.op for x in second] and outs == outs2
    needed = {n for n in outs if n is not None}
    nodes: list[Node] = []
    for x, y in reversed(list(zip(first, second, strict=True))):
        name = x.name
        if not needed.intersection(x.outs):
            continue
        args = tuple(_merge(p, q) for p, q in zip(x.args, y.args, strict=True))
        kwargs = {k: _merge(v, y.kwargs[k]) for k, v in x.kwargs.items()}
        nodes.insert(0, Node(name=name, op=x.op, args=args, kwargs=kwargs))
        needed.update(n for a in (*x.args, *x.kwargs.values()) for n in _reads(a))
    return Noted(tuple(nodes), outs, tuple(found), frozenset(x.op for x in first))


def overload(op: str) -> Any:
    """The function; one that views memory reshapes, since strides are no part of a graph."""
    space, name, last = op.split(".")
    if op in ("aten.view.default", "aten._unsafe_view.default"):
        name = "reshape"
    return getattr(getattr(getattr(torch.ops, space), name), last)


Hook: TypeAlias = "Callable[[Node, tuple[Any, ...], dict[str, Any]], None]"


def replay(
    nodes: Sequence[Node],
    inputs: Mapping[str, torch.Tensor],
    batch: int,
    hook: Hook | None = None,
) -> dict[str, torch.Tensor]:
    """Every value of the nodes at this batch; ``hook`` sees each node with its arguments."""
    values: dict[str, Any] = dict(inputs)
    read = reader(values, batch)
    with torch.no_grad(), plain():
        for node in nodes:
            kwargs = {k: read(a) for k, a in node.kwargs.items()}
            args = tuple(read(a) for a in node.args)
            if hook is not None:
                hook(node, args, kwargs)
            made = overload(node.op)(*args, **kwargs)
            if isinstance(made, torch.Tensor):
                values[node.name] = made
            else:
                made = {f"{node.name}.{i}": x for i, x in enumerate(made)}
                values.update({k: x for k, x in made.items() if isinstance(x, torch.Tensor)})
    return values


def take(x: torch.Tensor, v: Value, records: Sequence[int]) -> torch.Tensor:
    """These records of a B value, in this order; places in the batch are counted anew."""
    if v.batch is None:
        return x
    if v.slot:
        records = range(len(records))
    k, o, i = v.batch.axis, v.batch.outer, v.batch.inner
    y = x.movedim(k, 0)
    y = y.reshape(o, -1, i, *y.shape[1:])[:, list(records)]
    return y.reshape(-1, *y.shape[3:]).movedim(0, k).contiguous()
