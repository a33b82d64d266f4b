"""The one packed form of a model: its graph, then its initial weights.

Layout: 8 bytes little-endian length, the graph's canonical JSON padded with spaces to a multiple of
8, canonical safetensors. The weights' file holds exactly the tensors that the graph's inputs name.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final, TypeAlias

from casemate.graph.model import Graph, Packed
from casemate.spec import codec, tensors
from casemate.spec.errors import FormatError

Tensor: TypeAlias = tuple[str, tuple[int, ...], bytes]
Weights: TypeAlias = dict[str, tuple[tensors.TensorInfo, memoryview]]

MAX_GRAPH: Final = 32 << 20
MAX_VALUES: Final = 1 << 22  # 40 for each of the nodes admitted
MAX_BYTES: Final = (8 << 30) + MAX_GRAPH + tensors.MAX_HEADER + 16


def pack(graph: Graph, weights: Mapping[str, Tensor]) -> Packed:
    """The packed bytes; ``weights``: name -> (dtype, shape, row-major little-endian bytes)."""
    text = codec.encode(graph)
    text += b" " * (-len(text) % 8)
    return Packed(len(text).to_bytes(8, "little") + text + tensors.dump(weights))


def unpack(data: bytes | memoryview) -> tuple[Graph, Weights]:
    """The graph and a view of each tensor; nothing is copied.

    Raises ``FormatError`` for bytes that :func:`pack` would not have written. Whether the graph is
    admitted is :func:`casemate.graph.check.check`'s to say.
    """
    view = memoryview(data)
    if len(view) > MAX_BYTES:
        raise _refuse("The model is too large.")
    length = int.from_bytes(view[:8], "little")
    if len(view) < 8 or length > min(MAX_GRAPH, len(view) - 8) or length % 8:
        raise _refuse("The length of the graph is impossible.")
    raw = bytes(view[8 : 8 + length])
    text = raw.rstrip(b" ")
    if len(raw) - len(text) != -len(text) % 8:
        raise _refuse("The graph is not padded in the canonical way.")
    graph = codec.decode(Graph, text, limit=MAX_GRAPH, values=MAX_VALUES)
    return graph, tensors.load(view[8 + length :])


def _refuse(message: str) -> FormatError:
    return FormatError("format.model", message, mend="Export the model with casemate.")
