"""A run's state at a step boundary, out and in (:mod:`casemate.plan.state` says its form).

Written from and read into the tensors where they lie, so that it takes no memory of its own.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Protocol

import torch

from casemate.plan import state
from casemate.spec import tensors
from casemate.spec.job import Plan, TrainSpec


class Source(Protocol):
    """Bytes that can be read at any place, such as :class:`casemate.seal.stream.Reader`."""

    @property
    def size(self) -> int: ...

    def readinto(self, offset: int, buffer: memoryview) -> int: ...


def _bytes(vector: torch.Tensor) -> memoryview:
    """The tensor's own bytes; native order, which is little endian wherever casemate runs."""
    return vector.detach().numpy().data.cast("B")


def write(
    plan: Plan, train: TrainSpec, step: int, vectors: Mapping[str, torch.Tensor]
) -> Iterator[bytes | memoryview]:
    """The state's bytes after ``step`` steps, in parts valid until the next step.

    vectors: by name, (d,), contiguous, of the dtypes that the form says (float64 for ``average``).
    """
    wanted = state.layout(train, len(vectors["weights"]))
    prefix, names = tensors.layout(wanted)
    held = {state.VECTOR + name: _bytes(vector) for name, vector in vectors.items()}
    parts: dict[str, bytes | memoryview] = {
        "job": state.job(plan, train), "step": step.to_bytes(8, "little"), **held
    }  # fmt: skip
    yield prefix
    for name in names:
        yield parts[name]


def read(source: Source, plan: Plan, train: TrainSpec, vectors: Mapping[str, torch.Tensor]) -> int:
    """Fill ``vectors`` from a state; the steps it has taken. Nothing is filled before the form is
    found right. Raises as :func:`casemate.plan.state.check`, and what ``source`` raises."""
    head = bytearray(min(source.size, state.HEAD_BYTES))
    source.readinto(0, memoryview(head))
    found = state.check(bytes(head), source.size, plan, train)
    if found.dimension != len(vectors["weights"]):
        raise state.refuse("The training state is of a model of another size.")
    for name, info in tensors.read_header(bytes(head), source.size).items():
        if name.startswith(state.VECTOR):
            buffer = _bytes(vectors[name.removeprefix(state.VECTOR)])
            if source.readinto(info.start, buffer) != len(buffer):
                raise state.refuse("The training state ends within a tensor.")
    return found.step
