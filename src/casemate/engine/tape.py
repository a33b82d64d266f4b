"""Replaying one record's forward and backward without autograd.

At batch 1 every shape is fixed, so the operations of a gradient are the same for every record. They
are noted once, below autograd, and then called directly: the same kernels on the same operands, so
the same bits (``prepare.probe`` compares them on rows of every magnitude), in about half the time.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

_REFUSED = (
    torch.Tag.nondeterministic_seeded,
    torch.Tag.data_dependent_output,
    torch.Tag.dynamic_output_shape,
)


def random(func: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> bool:
    """Whether a call's result depends on more than its arguments, or its shape on their values.

    Attention is marked as random for the sake of its dropout alone.
    """
    if "dropout_p" in (a.name for a in func._schema.arguments):
        at = [a.name for a in func._schema.arguments].index("dropout_p")
        return bool(args[at] if at < len(args) else kwargs.get("dropout_p", 0.0))
    if func is torch.ops.aten.index.Tensor:  # the shape is dynamic with masks alone
        return any(i is not None and i.dtype == torch.bool for i in args[1])
    return any(tag in func.tags for tag in _REFUSED)


class Unfit(Exception):
    """The operations depend on the record's values, or are not all seen."""


@dataclass(slots=True)
class _Slot:
    """The place of a value in a replay's list of values."""

    index: int


@dataclass(slots=True)
class _Call:
    op: Callable[..., Any]
    args: list[Any]
    kwargs: dict[str, Any]
    places: list[tuple[int, int]]  # (argument, slot)
    lists: list[tuple[int, list[Any]]]  # (argument, items that hold slots)
    outs: list[int]  # slots; -1 for what is no tensor
    several: bool
    pure: bool
    reads: list[int] = field(default_factory=list)


class Log(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Notes every operation that torch runs below autograd: (op, args, kwargs, result)."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.entries: list[tuple[Any, tuple[Any, ...], dict[str, Any], Any]] = []

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # else torch imports its compiler, four seconds, to keep out of its way

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        self.entries.append((func, args, dict(kwargs or {}), out))
        return out


class Tape:
    """The noted operations of ``gradients(frontier) -> one tensor per leaf``.

    Raises ``Unfit`` where replaying would not be the same computation.
    """

    def __init__(
        self,
        gradients: Callable[[Sequence[torch.Tensor]], Sequence[torch.Tensor | None]],
        frontier: Sequence[torch.Tensor],
        leaves: Sequence[torch.Tensor],
        constants: Sequence[torch.Tensor],
    ) -> None:
        if not all(isinstance(v, torch.Tensor) for v in frontier):
            raise Unfit("a value that is no tensor crosses the frontier")
        self._values: list[Any] = []
        self._slots: dict[int, int] = {}
        self._transposed: dict[int, int] = {}  # slot of a transpose -> slot of what it turns
        self._fixed: set[int] = set()
        self._alive: list[Any] = []  # identities are only unique while their owners live
        self._frontier = [self._new(v) for v in frontier]
        shared = {v.untyped_storage().data_ptr() for v in (*leaves, *constants)}
        self._guarded = shared | {v.untyped_storage().data_ptr() for v in frontier}
        for value in (*leaves, *constants):
            self._fixed.add(self._new(value))
        log = Log()
        with log:
            found = gradients(frontier)
        self._alive.append(log.entries)
        self._calls: list[_Call] = []
        for func, args, kwargs, out in log.entries:
            self._note(func, args, kwargs, out, shared)
        self._outs = [None if g is None else self._slots.get(id(g)) for g in found]
        if any(g is not None and s is None for g, s in zip(found, self._outs, strict=True)):
            raise Unfit("a gradient came from nowhere")
        self._sizes = [leaf.numel() for leaf in leaves]
        self._prune()
        self._alive.clear()
        self._slots.clear()
        self._values = [v if i in self._fixed else None for i, v in enumerate(self._values)]

    def _new(self, value: torch.Tensor) -> int:
        self._slots[id(value)] = len(self._values)
        self._values.append(value)
        self._alive.append(value)
        return len(self._values) - 1

    def _slot(self, value: torch.Tensor) -> _Slot:
        if id(value) not in self._slots:
            raise Unfit("a tensor was made out of sight")
        return _Slot(self._slots[id(value)])

    def _note(
        self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any, shared: set[int]
    ) -> None:
        if random(func, args, kwargs) or any(isinstance(v, torch.Tensor) for v in kwargs.values()):
            raise Unfit(f"{func} cannot be replayed")
        if func is torch.ops.aten.detach.default:
            self._slots[id(out)] = self._slot(args[0]).index
            return
        if func is torch.ops.aten.t.default:
            source = self._slot(args[0]).index
            if source in self._transposed:  # turned back: the same view as before
                self._slots[id(out)] = self._transposed[source]
                return
        call = _Call(func._op, list(args), kwargs, [], [], [], isinstance(out, list | tuple), True)
        for i, arg in enumerate(args):
            if isinstance(arg, torch.Tensor):
                call.places.append((i, self._slot(arg).index))
                call.args[i] = None
            elif isinstance(arg, list | tuple) and any(isinstance(x, torch.Tensor) for x in arg):
                items = [self._slot(x) if isinstance(x, torch.Tensor) else x for x in arg]
                call.lists.append((i, items))
                call.args[i] = None
        call.reads = [s for _, s in call.places]
        call.reads += [x.index for _, items in call.lists for x in items if isinstance(x, _Slot)]
        outs = list(out) if call.several else [out]
        if func._schema.is_mutable:
            call.pure = False
            written = self._values[call.reads[0]]
            if written.untyped_storage().data_ptr() in self._guarded:
                raise Unfit(f"{func} writes to what must stay")
        views = {o.untyped_storage().data_ptr() for o in outs if isinstance(o, torch.Tensor)}
        fixed = call.pure and all(s in self._fixed for s in call.reads)
        for value in outs:
            known = isinstance(value, torch.Tensor) and id(value) in self._slots
            if not isinstance(value, torch.Tensor):
                call.outs.append(-1)
            else:
                call.outs.append(self._slots[id(value)] if known else self._new(value))
        if func is torch.ops.aten.t.default:
            self._transposed[call.outs[0]] = call.reads[0]
        # What only views trained weights follows them without being called again; the ones that
        # autograd starts from are the same for every record.
        if func is torch.ops.aten.ones_like.default:
            shared.update(views)
            self._guarded.update(views)
            fixed = True
        if fixed and views <= shared:
            self._fixed.update(s for s in call.outs if s >= 0)
            return
        self._calls.append(call)

    def _prune(self) -> None:
        wanted = {s for s in self._outs if s is not None}
        kept = []
        for call in reversed(self._calls):
            if not call.pure or wanted.intersection(call.outs):
                wanted.update(call.reads)
                kept.append(call)
        # Tuples: their parts are had without a look-up by name, which is a tenth of the time.
        self._plan = [
            (c.op, c.args, c.kwargs, c.places, c.lists, c.outs, c.several) for c in kept[::-1]
        ]
        self._calls.clear()

    def __call__(self, frontier: Sequence[torch.Tensor], out: torch.Tensor) -> None:
        """Write the flat gradient of the record with these frontier values into ``out``."""
        values = self._values
        for slot, value in zip(self._frontier, frontier, strict=True):
            values[slot] = value
        with torch.inference_mode():
            for op, args, kwargs, places, lists, outs, several in self._plan:
                for i, slot in places:
                    args[i] = values[slot]
                for i, items in lists:
                    args[i] = [values[x.index] if isinstance(x, _Slot) else x for x in items]
                made = op(*args, **kwargs)
                if several:
                    for slot, value in zip(outs, made, strict=True):
                        if slot >= 0:
                            values[slot] = value
                else:
                    values[outs[0]] = made
            parts = [
                torch.zeros(size) if slot is None else values[slot].reshape(-1)
                for slot, size in zip(self._outs, self._sizes, strict=True)
            ]
            torch.cat(parts, out=out)
