"""The graph: a frozen value.

A graph is a list of nodes in execution order over functional ATen operations, with norms,
attention, convolution, pooling and RNNs kept whole. The only symbol is the batch ``B``; every size
is affine in it. Its result is the per-record losses, shape (B,), float32; that of a graph for
prediction are named tensors with a slice for each record. Arguments follow the op's ATen schema
without device, layout, memory format and generator; trailing defaults may be left out. Where the
schema has a number, the strings ``inf`` and ``-inf`` are the infinities (JSON has none; no op's
string argument takes these words).
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import Final, Literal, TypeAlias

from casemate.spec.codec import value

# Names by which an input is taken for the loss's target.
LABEL_NAMES: Final = ("target", "targets", "label", "labels", "y")

# A size is an int, or "a*B+c" as Size(a, c); kept apart from ints so that B=1 proves nothing.


@value("size/v1")
class Size:
    """The size a*B + c."""

    a: int
    c: int = 0


@value("ref/v1")
class Ref:
    """The value called ``name``: an input, or a node's output; ``name.i`` for one of several."""

    name: str


@value("dtype/v1")
class DtypeArg:
    """A dtype given as an argument: bool u8 i32 i64 f32."""

    dtype: str


@value("list/v1")
class ListArg:
    """A list argument."""

    items: tuple[Ref | Size | DtypeArg | bool | int | float | str | None, ...]


Arg: TypeAlias = "Ref | Size | DtypeArg | ListArg | bool | int | float | str | None"


@value("input-spec/v1", later=("rate", "low", "high"))
class InputSpec:
    """An input of the graph.

    kind: ``param`` (trained), ``frozen`` (a parameter or buffer that never changes), ``data`` (has
    the batch as axis 0), ``random`` (has it too; no column feeds it: whoever runs the graph draws
    each element of each record by itself, 0 with probability ``rate``, else 1 / (1 - rate), as
    dropout multiplies by). ``tensor`` names the weight file's tensor for param and frozen; two
    inputs may name the same tensor only through one InputSpec (tied weights are one input).
    low, high: inclusive bounds of an integer ``data`` input of a graph for prediction, which no
    dataset declares; whoever runs the graph refuses records outside.
    """

    name: str
    kind: Literal["param", "frozen", "data", "random"]
    dtype: str
    shape: tuple[int | Size, ...]
    tensor: str = ""
    rate: float = 0.0
    low: int | None = None
    high: int | None = None


@value("node/v1")
class Node:
    """One operation. ``op`` is the ATen overload, such as ``aten.linear.default``.

    ``source`` is where the model's author finds it (module path), for error messages only.
    """

    name: str
    op: str
    args: tuple[Ref | Size | DtypeArg | ListArg | bool | int | float | str | None, ...]
    kwargs: dict[str, Ref | Size | DtypeArg | ListArg | bool | int | float | str | None]
    source: str = ""


@value("output/v1")
class Output:
    """An output of a graph for prediction: its name, and that of the value that it is."""

    name: str
    value: str


@value("graph/v1", later=("outputs",))
class Graph:
    """Inputs, nodes in order, and ``loss``, the name of the (B,) float32 losses.

    A graph for prediction has ``outputs`` instead, no loss (``""``) and nothing that is trained;
    each of them has the batch as axis 0.
    """

    inputs: tuple[InputSpec, ...]
    nodes: tuple[Node, ...]
    loss: str
    outputs: tuple[Output, ...] = ()


@dataclass(frozen=True, slots=True)
class Packed:
    """A packed model as bytes: graph JSON, then weights; see :mod:`casemate.graph.pack`."""

    data: bytes

    @property
    def digest(self) -> str:
        return "sha256:" + hashlib.sha256(self.data).hexdigest()


MAX_NODES: Final = 100_000
