"""Trials of slots: operands of records as a run has them, drawn at random, turned and spoilt.

What is tried is the same for operations (:mod:`casemate.engine.probe`), ways to norms
(:mod:`casemate.engine.ways`) and compiled islands (:mod:`casemate.engine.slots`); each says what it
draws, in which orders slots are turned and beside what they stay.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Final, NamedTuple, TypeAlias

import torch

from casemate.engine.nodes import from_rows, to_rows
from casemate.graph.ops import Value

ALIGNED: Final = 64  # bytes; torch's allocator gives no less
_ENOUGH: Final = 10_000
_ROUNDS: Final = (4, 64)
_POOL: Final = 2**17 - 1  # a prime, so that no two records of a tensor are alike


class Place(NamedTuple):
    """How a tensor lies in memory; shift: its first entry's place within a vector."""

    sizes: tuple[int, ...]
    strides: tuple[int, ...]
    shift: int


def place(t: torch.Tensor) -> Place:
    shift = int(t.storage_offset()) % (ALIGNED // t.element_size())
    return Place(tuple(t.shape), t.stride(), shift)


def _memory(at: Place, like: torch.Tensor) -> torch.Tensor:
    """Memory for a tensor that lies so; axes with stride 0 have one entry."""
    sizes = [d if s else min(d, 1) for d, s in zip(at.sizes, at.strides, strict=True)]
    reach = sum((d - 1) * s for d, s in zip(sizes, at.strides, strict=True))
    memory = torch.empty(at.shift + max(0, reach) + 1, dtype=like.dtype, device=like.device)
    return memory.as_strided(sizes, at.strides, at.shift)


def _put(memory: torch.Tensor, t: torch.Tensor, at: Place) -> torch.Tensor:
    first = tuple(slice(None) if s else slice(0, 1) for s in at.strides)
    return memory.copy_(t[first]).expand(at.sizes)


def laid(t: torch.Tensor, at: Place) -> torch.Tensor:
    """A copy of ``t`` that lies so. Of axes with stride 0 what lies first counts."""
    return _put(_memory(at, t), t, at)


_BITS: Final = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def same(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Bit for bit, but for which NaN a NaN is."""

    def equal(a: torch.Tensor, b: torch.Tensor) -> bool:
        return torch.equal(a.view(_BITS[a.element_size()]), b.view(_BITS[b.element_size()]))

    if equal(a, b):
        return True
    if not a.is_floating_point():
        return False
    nan = a.isnan()
    return torch.equal(nan, b.isnan()) and equal(a.masked_fill(nan, 0.0), b.masked_fill(nan, 0.0))


def spread(sizes: Sequence[int], generator: torch.Generator, reach: float = 30.0) -> torch.Tensor:
    """Both signs, magnitudes from 10^-reach to 10^reach."""
    exponents = (torch.rand(sizes, generator=generator) * 2.0 - 1.0) * reach
    return torch.randn(sizes, generator=generator).sign() * torch.pow(10.0, exponents)


@functools.cache
def _pool(reach: float) -> torch.Tensor:
    """Random entries: of magnitudes up to 10^reach, or normal ones where that is zero."""
    generator = torch.Generator().manual_seed(1)  # tries kernels, guards nothing
    if reach:
        return spread((_POOL,), generator, reach)
    return torch.randn(_POOL, generator=generator)


def forget() -> None:
    """Let go of the pool: a run needs it no more."""
    _pool.cache_clear()


def fill(t: torch.Tensor, generator: torch.Generator, reach: float = 0.0) -> torch.Tensor:
    """Random entries of the pool, over and over from some place on, in ``t``, which is dense."""
    pool, flat = _pool(reach), t.view(-1)
    start = int(torch.randint(_POOL, (), generator=generator))
    done = 0
    while done < len(flat):
        part = pool[start : start + len(flat) - done]
        flat[done : done + len(part)] = part
        done, start = done + len(part), 0
    return t


Spoil: TypeAlias = tuple[int, Sequence[float | None]]


class Slots:
    """Operands of records in the slots of a microbatch, ``per`` rows each, as a run has them:
    (tensor, its value). In the same memory each time: fresh pages cost more than most operations.
    """

    def __init__(
        self, operands: Sequence[tuple[torch.Tensor, Value]], rows: int, per: int = 1
    ) -> None:
        self.rows, self.values = rows, [v for _, v in operands]
        self.places = [place(t) for t, _ in operands]
        self.own = [to_rows(t, v, rows).reshape(rows // per, -1) for t, v in operands]
        # Expanded along the records: all rows are one.
        self.shared = [rows > 1 and t.stride()[_axis(v)] == 0 for t, v in operands]
        self.drawn, self._others = (
            [torch.empty(t.shape, dtype=t.dtype) for t in self.own] for _ in range(2)
        )
        self._memory = [_memory(at, t) for at, t in zip(self.places, self.own, strict=True)]

    def draw(
        self, round_: int, generator: torch.Generator, as_is: bool, reach: float = 30.0
    ) -> None:
        """Floats as they are, or normal, 100 times that, or of both signs and magnitudes from
        10^-reach to 10^reach."""
        for own, made, one in zip(self.own, self.drawn, self.shared, strict=True):
            if as_is or not own.is_floating_point():
                made.copy_(own)
            else:
                fill(made, generator, reach if round_ % 4 == 3 else 0.0)
                if round_ % 4 == 2:
                    made *= 100.0
            if one:
                made[1:] = made[:1]

    def _laid(self, rows: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        return [
            _put(memory, from_rows(t.view(self.rows, -1), v), at)
            for memory, t, v, at in zip(self._memory, rows, self.values, self.places, strict=True)
        ]

    def _beside(self, spoil: Spoil) -> list[torch.Tensor]:
        """Of every four slots, from a place on, one stays; the others become what is said, or
        huge."""
        first, values = spoil
        for t, other, one in zip(self.drawn, self._others, self.shared, strict=True):
            other.copy_(t)
            for role, value in enumerate(values if not one else (), 1):
                rows = other[(first + role) % 4 :: 4]
                if not t.is_floating_point():
                    if role % 2:
                        rows[:] = t[:1]
                elif value is None:
                    rows *= 1e20
                else:
                    rows.fill_(value)
        return self._others

    def alike(
        self,
        outputs: Callable[[list[torch.Tensor]], Sequence[torch.Tensor]],
        orders: Sequence[torch.Tensor],
        spoils: Sequence[Spoil],
    ) -> list[bool]:
        """Which results, (slots, n), of the operands drawn are the same bits in every order of
        slots, and in the slots that stay beside others."""
        first = [t.clone() for t in outputs(self._laid(self.drawn))]
        good = [True] * len(first)
        for order in orders:
            for t, other in zip(self.drawn, self._others, strict=True):
                torch.index_select(t, 0, order, out=other)
            turned = outputs(self._laid(self._others))
            for i, (a, b) in enumerate(zip(first, turned, strict=True)):
                good[i] = good[i] and same(a[order], b)
        for spoil in spoils:
            changed, stay = outputs(self._laid(self._beside(spoil))), slice(spoil[0] % 4, None, 4)
            for i, (a, b) in enumerate(zip(first, changed, strict=True)):
                good[i] = good[i] and same(a[stay], b[stay])
        return good


def rounds_for(entries: int) -> int:
    """Of trials on so many entries each."""
    return min(_ROUNDS[1], max(_ROUNDS[0], -(-_ENOUGH // max(1, entries))))


def other_weights(
    weights: Mapping[Any, torch.Tensor], round_: int, generator: torch.Generator
) -> dict[Any, torch.Tensor]:
    """Others that lie as these do: normal, or all positive in every other round."""
    out = {}
    for n, t in weights.items():
        made = fill(torch.empty(t.shape), generator)
        out[n] = laid((made if round_ % 2 else made.abs_().add_(0.5)).to(t.dtype), place(t))
    return out


def _axis(v: Value) -> int:
    """Of the records."""
    assert v.batch is not None
    return v.batch.axis
