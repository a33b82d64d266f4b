"""Graphs written by hand, for what torch.export would never write."""

from __future__ import annotations

from typing import Any

from casemate.graph import check
from casemate.graph.model import Graph, InputSpec, ListArg, Node, Ref, Size
from casemate.spec.tensors import TensorInfo

B = Size(a=1)


def r(name: str) -> Ref:
    return Ref(name=name)


def ls(*items: Any) -> ListArg:
    return ListArg(items=items)


def data(name: str, *shape: int, dtype: str = "f32") -> InputSpec:
    return InputSpec(name=name, kind="data", dtype=dtype, shape=(B, *shape))


def weight(name: str, *shape: int, dtype: str = "f32", kind: Any = "param") -> InputSpec:
    return InputSpec(name=name, kind=kind, dtype=dtype, shape=shape, tensor=name)


def node(name: str, op: str, *args: Any, **kwargs: Any) -> Node:
    return Node(name=name, op=f"aten.{op}", args=args, kwargs=kwargs)


# x (B, 4), a token axis t (B, 3, 4), integers i (B, 4), and weights.
INPUTS = (
    data("x", 4), data("t", 3, 4), data("i", 4, dtype="i64"), data("im", 2, 6, 6),
    weight("w", 4), weight("m", 4, 4), weight("k", 2, 2, 3, 3),
    weight("e", 10, 4), weight("c", 3, kind="frozen", dtype="i64"),
)  # fmt: skip


def graph(*nodes: Node, loss: str | None = None, inputs: tuple[InputSpec, ...] = INPUTS) -> Graph:
    """The nodes, then a good loss of (B,) besides, so that only they can be at fault."""
    end = (
        ()
        if loss
        else (
            node("l0", "mul.Tensor", r("x"), r("w")),
            node("loss", "sum.dim_IntList", r("l0"), ls(1)),
        )
    )
    return Graph(inputs=inputs, nodes=(*nodes, *end), loss=loss or "loss")


def infos(g: Graph) -> dict[str, TensorInfo]:
    return {
        i.tensor: TensorInfo(i.dtype, tuple(d for d in i.shape if isinstance(d, int)), 0, 0)
        for i in g.inputs
        if i.kind != "data"
    }


def run(*nodes: Node, loss: str | None = None, **how: Any) -> check.Checked:
    g = graph(*nodes, loss=loss)
    return check.check(g, infos(g), **how)
