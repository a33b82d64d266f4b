"""Running a fixed sequence of operations by direct calls, without names and without autograd.

Every value has a register, constants too, so that what a call takes is one look-up in a list. A
register is emptied after its last use. No code is made of a graph: its operations come resolved.
"""

from __future__ import annotations

import functools
import itertools
import operator
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, TypeAlias

Key: TypeAlias = Any  # hashable


@dataclass(frozen=True, slots=True)
class At:
    """In a call's arguments: the value of this key."""

    key: Key


@dataclass(frozen=True, slots=True)
class Call:
    """op(*args, **kwargs), which hold :class:`At`, lists that do, and constants.

    outs: the result's key; a list: those of the results, ``None`` for one that nobody reads.
    """

    op: Callable[..., Any]
    args: Sequence[Any]
    kwargs: Mapping[str, Any]
    outs: Key | list[Key | None]

    @property
    def made(self) -> list[Any]:
        return self.outs if isinstance(self.outs, list) else [self.outs]

    @property
    def reads(self) -> list[Key]:
        parts = (*self.args, *self.kwargs.values())
        return [x.key for part in parts for x in _items(part) if isinstance(x, At)]


class Replay:
    """``calls`` as a function of ``inputs``, a value by key, that gives those of ``outputs``."""

    def __init__(
        self,
        calls: Sequence[Call],
        inputs: Sequence[Key],
        outputs: Sequence[Key],
        constants: Mapping[Key, Any] = MappingProxyType({}),
    ) -> None:
        self._inputs = len(inputs)
        self._rest: list[Any] = []  # what registers beyond those of inputs hold at first
        self._places = {key: i for i, key in enumerate(inputs)}
        if len(self._places) < len(inputs):
            raise ValueError("two inputs of one key")
        for key, value in constants.items():
            self._places[key] = self._register(value)
        keep = {*outputs, *constants}
        last: dict[Key, int] = {}
        for i, call in enumerate(calls):
            last |= dict.fromkeys([*call.reads, *call.made], i)
        self._steps = []
        for i, call in enumerate(calls):
            op, leaves = _flat(call)
            take = _getter([self._leaf(x) for x in leaves])
            made = [self._made(key) for key in call.made]
            gone = [r for key, r in zip(call.made, made, strict=True) if key is None]
            for key in dict.fromkeys([*call.reads, *call.made]):
                if key is not None and last[key] == i and key not in keep:
                    gone.append(self._places[key])
            one = -1 if isinstance(call.outs, list) else made[0]
            self._steps.append((op, take, one, tuple(made), tuple(gone)))
        self._give = _getter([self._places[key] for key in outputs])

    def _register(self, value: Any = None) -> int:
        self._rest.append(value)
        return self._inputs + len(self._rest) - 1

    def _leaf(self, x: Any) -> int:
        return self._places[x.key] if isinstance(x, At) else self._register(x)

    def _made(self, key: Key | None) -> int:
        if key is None:
            return self._register()
        if key not in self._places:
            self._places[key] = self._register()
        return self._places[key]

    def __call__(self, inputs: Iterable[Any]) -> Sequence[Any]:
        registers = [*inputs]
        if len(registers) != self._inputs:
            raise TypeError(f"{self._inputs} inputs are needed, not {len(registers)}")
        registers += self._rest
        for op, take, one, several, gone in self._steps:
            if one >= 0:
                registers[one] = op(*take(registers))
            else:
                for register, value in zip(several, op(*take(registers)), strict=True):
                    registers[register] = value
                value = None  # else it would live until the next such call
            for register in gone:
                registers[register] = None
        return self._give(registers)


def _items(part: Any) -> Sequence[Any]:
    return part if isinstance(part, list | tuple) else (part,)


def _holds(part: Any) -> bool:
    return any(isinstance(x, At) for x in _items(part))


def _flat(call: Call) -> tuple[Callable[..., Any], list[Any]]:
    """The call as a function of a flat list, and that list."""
    op, args, kwargs = call.op, call.args, call.kwargs
    if not any(map(_holds, kwargs.values())):
        op, kwargs = (functools.partial(op, **kwargs) if kwargs else op), {}
        if not any(_holds(a) for a in args if not isinstance(a, At)):
            return op, list(args)
    parts = [*args, *kwargs.values()]
    if len(parts) == 1 and args:  # one list
        return lambda *values: op(list(values)), list(args[0])
    counts = [len(p) if isinstance(p, list | tuple) and _holds(p) else None for p in parts]
    leaves = [x for p, n in zip(parts, counts, strict=True) for x in ((p,) if n is None else p)]

    def of_flat(*values: Any) -> Any:
        each = iter(values)
        made = [next(each) if n is None else list(itertools.islice(each, n)) for n in counts]
        named = dict(zip(kwargs, made[len(args) :], strict=True))
        return op(*made[: len(args)], **named)

    return of_flat, leaves


def _getter(registers: Sequence[int]) -> Callable[[list[Any]], Sequence[Any]]:
    """What a list holds at these places, as a sequence whatever their number."""
    if len(registers) > 1:
        return operator.itemgetter(*registers)
    return operator.itemgetter(slice(registers[0], registers[0] + 1) if registers else slice(0))
