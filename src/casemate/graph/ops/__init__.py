"""The closed table of operations: one entry for each ATen overload that a graph may hold.

An op without an entry is refused. To add one, write its entry in the file of its family: the ATen
schema as torch prints it, the rule for dtype, shape and batch, and the cost.
"""

from typing import Final

from casemate.graph.ops import elementwise, loss, matmul
from casemate.graph.ops.base import Batch, Call, Op, Value, bind

__all__ = ["TABLE", "Batch", "Call", "Op", "Value", "bind"]

TABLE: Final[dict[str, Op]] = {
    entry.schema.name: entry for family in (elementwise, matmul, loss) for entry in family.TABLE
}
