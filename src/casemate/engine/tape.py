"""Replaying one record's forward and backward without autograd.

At batch 1 every shape is fixed, so the operations of a gradient are the same for every record. They
are noted once, below autograd, and then called directly: the same kernels on the same operands, so
the same bits (``prepare.probe`` compares them on rows of every magnitude), in about half the time.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from casemate.engine.replay import At, Call, Replay

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


def memory(t: torch.Tensor) -> int:
    """Where its memory begins. Raises ``Unfit`` for zeros that autograd makes without any."""
    if t._is_zerotensor():
        raise Unfit("a gradient is zero and has no memory")
    return t.untyped_storage().data_ptr()


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
        self._values: list[torch.Tensor] = []  # by slot, while noting
        self._slots: dict[int, int] = {}
        self._transposed: dict[int, int] = {}  # slot of a transpose -> slot of what it turns
        self._fixed: set[int] = set()
        self._alive: list[Any] = []  # identities are only unique while their owners live
        inputs = [self._new(v) for v in frontier]
        shared = {v.untyped_storage().data_ptr() for v in (*leaves, *constants)}
        self._guarded = shared | {v.untyped_storage().data_ptr() for v in frontier}
        for value in (*leaves, *constants):
            self._fixed.add(self._new(value))
        log = Log()
        with log:
            found = gradients(frontier)
        self._alive.append(log.entries)
        self._calls: list[tuple[Call, bool]] = []  # and whether each writes to what it reads
        for func, args, kwargs, out in log.entries:
            self._note(func, args, kwargs, out, shared)
        self._outs = [None if g is None else self._slots.get(id(g)) for g in found]
        if any(g is not None and s is None for g, s in zip(found, self._outs, strict=True)):
            raise Unfit("a gradient came from nowhere")
        self._sizes = [leaf.numel() for leaf in leaves]
        wanted = [s for s in self._outs if s is not None]
        fixed = {s: self._values[s] for s in self._fixed}
        self._replay = Replay(self._needed(wanted), inputs, wanted, fixed)
        for held in (self._alive, self._slots, self._values, self._calls):
            held.clear()

    def _new(self, value: torch.Tensor) -> int:
        self._slots[id(value)] = len(self._values)
        self._values.append(value)
        self._alive.append(value)
        return len(self._values) - 1

    def _at(self, value: Any) -> Any:
        """In place of a tensor among the arguments of a call, its slot."""
        if isinstance(value, list | tuple) and any(isinstance(x, torch.Tensor) for x in value):
            return [self._at(x) for x in value]
        return At(self._slot(value)) if isinstance(value, torch.Tensor) else value

    def _slot(self, value: torch.Tensor) -> int:
        if id(value) not in self._slots:
            raise Unfit("a tensor was made out of sight")
        return self._slots[id(value)]

    def _made(self, value: Any) -> int | None:
        """The slot of a result: an operation in place gives what it was given."""
        if not isinstance(value, torch.Tensor):
            return None
        known = self._slots.get(id(value))
        return self._new(value) if known is None else known

    def _note(
        self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any, shared: set[int]
    ) -> None:
        if random(func, args, kwargs) or any(isinstance(v, torch.Tensor) for v in kwargs.values()):
            raise Unfit(f"{func} cannot be replayed")
        if func is torch.ops.aten.detach.default:
            self._slots[id(out)] = self._slot(args[0])
            return
        if func is torch.ops.aten.t.default:
            source = self._slot(args[0])
            if source in self._transposed:  # turned back: the same view as before
                self._slots[id(out)] = self._transposed[source]
                return
        several = isinstance(out, list | tuple)
        outs = list(out) if several else [out]
        given = [self._at(arg) for arg in args]
        reads = Call(func._op, given, kwargs, []).reads
        pure = not func._schema.is_mutable
        if not pure:
            written = self._values[reads[0]]
            if memory(written) in self._guarded:
                raise Unfit(f"{func} writes to what must stay")
        views = {memory(o) for o in outs if isinstance(o, torch.Tensor)}
        fixed = pure and all(s in self._fixed for s in reads)
        made = [self._made(o) for o in outs]
        if func is torch.ops.aten.t.default:
            self._transposed[self._slot(out)] = reads[0]
        # What only views trained weights follows them without being called again; the ones that
        # autograd starts from are the same for every record.
        if func is torch.ops.aten.ones_like.default:
            shared.update(views)
            self._guarded.update(views)
            fixed = True
        if fixed and views <= shared:
            self._fixed.update(s for s in made if s is not None)
            return
        self._calls.append((Call(func._op, given, kwargs, made if several else made[0]), pure))

    def _needed(self, outs: Sequence[int]) -> list[Call]:
        """The calls without those whose results nobody reads."""
        wanted: set[Any] = set(outs)
        kept = []
        for call, pure in reversed(self._calls):
            if not pure or wanted.intersection(call.made):
                wanted.update(call.reads)
                kept.append(call)
        return kept[::-1]

    def __call__(self, frontier: Sequence[torch.Tensor], out: torch.Tensor) -> None:
        """Write the flat gradient of the record with these frontier values into ``out``."""
        with torch.inference_mode():
            found = iter(self._replay(frontier))
            parts = [
                torch.zeros(size) if slot is None else next(found).reshape(-1)
                for slot, size in zip(self._outs, self._sizes, strict=True)
            ]
            torch.cat(parts, out=out)
