"""The closed table of operations: one entry for each ATen overload that a graph may hold.

An op without an entry is refused. To add one, write its entry in the file of its family: the ATen
schema as torch prints it, the rule for dtype, shape and batch, and the cost.
"""

from typing import Final

from casemate.graph.ops import (
    attention,
    conv,
    create,
    elementwise,
    index,
    joint,
    loss,
    matmul,
    norm,
    reduce,
    view,
)
from casemate.graph.ops.base import Batch, Call, Op, Value, bind

__all__ = ["FAMILIES", "JOINT", "TABLE", "Batch", "Call", "Op", "Value", "bind"]

FAMILIES: Final[dict[str, tuple[Op, ...]]] = {
    "elementwise": elementwise.TABLE,
    "reduce": reduce.TABLE,
    "view": view.TABLE,
    "matmul": matmul.TABLE,
    "conv": conv.TABLE,
    "norm": norm.TABLE,
    "attention": attention.TABLE,
    "index": index.TABLE,
    "loss": loss.TABLE,
    "create": create.TABLE,
}

TABLE: Final[dict[str, Op]] = {
    entry.schema.name: entry for family in FAMILIES.values() for entry in family
}

# What the joint graph of forward and backward may hold besides: no model may.
JOINT: Final[dict[str, Op]] = TABLE | {entry.schema.name: entry for entry in joint.TABLE}
