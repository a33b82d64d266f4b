"""safetensors, in one canonical form, without numpy.

Layout (safetensors format): 8 bytes little-endian header length, a JSON header, the tensors' bytes.
Canonical here: the header is canonical JSON (sorted names, no ``__metadata__``) padded with spaces
to a multiple of 8; tensors lie in the order of their names, contiguous, without gaps or overlap,
row-major, little-endian; nothing follows the last. Everything else is refused.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Final

from casemate.spec import canonical
from casemate.spec.errors import FormatError

MAX_HEADER: Final = 16 << 20
MAX_TENSORS: Final = 65_536
_VALUES: Final = 24 * MAX_TENSORS  # a header's, each shape of 8 sizes
DTYPES: Final[dict[str, tuple[str, int]]] = {
    "bool": ("BOOL", 1),
    "u8": ("U8", 1),
    "i32": ("I32", 4),
    "i64": ("I64", 8),
    "f32": ("F32", 4),
}
_FROM_WIRE: Final = {wire: (name, size) for name, (wire, size) in DTYPES.items()}


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """A tensor's dtype (``f32`` ...), shape, and byte range [start, end) in the file."""

    dtype: str
    shape: tuple[int, ...]
    start: int
    end: int


def _refuse(message: str, where: str = "") -> FormatError:
    return FormatError(
        "format.safetensors", message, mend="Write the file with casemate.", where=where
    )


def layout(tensors: Mapping[str, tuple[str, tuple[int, ...]]]) -> tuple[bytes, list[str]]:
    """Prefix (length and header) of a file with these (dtype, shape), and the order of names.

    The caller writes the prefix, then each tensor's bytes in that order.
    """
    header: dict[str, object] = {}
    at = 0
    names = sorted(tensors)
    for name in names:
        dtype, shape = tensors[name]
        wire, size = DTYPES[dtype]
        end = at + size * math.prod(shape)
        header[name] = {"dtype": wire, "shape": list(shape), "data_offsets": [at, end]}
        at = end
    text = canonical.encode(header)
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text, names


def dump(tensors: Mapping[str, tuple[str, tuple[int, ...], bytes]]) -> bytes:
    """A whole file from name -> (dtype, shape, row-major little-endian bytes)."""
    prefix, names = layout({n: (d, s) for n, (d, s, _) in tensors.items()})
    parts: list[bytes] = [prefix]
    for name in names:
        dtype, shape, data = tensors[name]
        if len(data) != DTYPES[dtype][1] * math.prod(shape):
            raise ValueError(f"tensor {name!r} has {len(data)} bytes, not what its shape says")
        parts.append(data)
    return b"".join(parts)


def _entry(name: str, entry: object, at: int) -> TensorInfo:
    if not isinstance(entry, dict) or set(entry) != {"dtype", "shape", "data_offsets"}:
        raise _refuse("A header entry has other fields than dtype, shape, data_offsets.", name)
    wire, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(wire, str) or wire not in _FROM_WIRE:
        raise _refuse(f"The dtype {str(wire)[:20]!r} is not admitted.", name)
    if (
        not isinstance(shape, list)
        or len(shape) > 8
        or any(type(d) is not int or not 0 <= d < 2**40 for d in shape)
    ):
        raise _refuse("The shape is not a list of at most 8 sizes.", name)
    dtype, size = _FROM_WIRE[wire]
    end = at + size * math.prod(d for d in shape if isinstance(d, int))
    # In Python 0 == 0.0 == False; in the one form of a file they differ.
    if not isinstance(offsets, list) or any(type(x) is not int for x in offsets):
        raise _refuse("The byte range is not two integers.", name)
    if offsets != [at, end] or end > 2**46:
        raise _refuse("The byte range has a gap, an overlap or the wrong length.", name)
    return TensorInfo(dtype, tuple(d for d in shape if isinstance(d, int)), at, end)


def read_header(prefix: bytes | memoryview, total: int) -> dict[str, TensorInfo]:
    """Names to :class:`TensorInfo` with ranges absolute in the file.

    ``prefix`` must hold at least the length and the header; ``total`` is the file's size.
    """
    if len(prefix) < 8:
        raise _refuse("The file is shorter than 8 bytes.")
    length = int.from_bytes(prefix[:8], "little")
    if length > MAX_HEADER or length % 8 or 8 + length > min(total, len(prefix)):
        raise _refuse("The header's length is impossible.")
    raw = bytes(prefix[8 : 8 + length])
    text = raw.rstrip(b" ")
    if len(raw) - len(text) != -len(text) % 8:
        raise _refuse("The header is not padded in the canonical way.")
    header = canonical.decode(text, limit=MAX_HEADER, values=_VALUES)
    if not isinstance(header, dict) or len(header) > MAX_TENSORS:
        raise _refuse("The header is not an object of admitted size.")
    out: dict[str, TensorInfo] = {}
    at = 0
    base = 8 + length
    for name, entry in header.items():  # canonical JSON: already sorted
        if not (1 <= len(name) <= 512 and name.isascii() and name.isprintable()):
            raise _refuse("A tensor's name must be 1 to 512 printable ASCII characters.")
        if name == "__metadata__":  # no tensor to other readers of the format
            raise _refuse("A tensor is called as the format's own metadata.", name)
        info = _entry(name, entry, at)
        at = info.end
        out[name] = TensorInfo(info.dtype, info.shape, base + info.start, base + info.end)
    if base + at != total:
        raise _refuse("Bytes are missing at the end, or stand behind the last tensor.")
    return out


def load(data: bytes | memoryview) -> dict[str, tuple[TensorInfo, memoryview]]:
    """Every tensor as (info, view of its bytes); nothing is copied."""
    view = memoryview(data)
    return {n: (t, view[t.start : t.end]) for n, t in read_header(view, len(view)).items()}


def total_bytes(infos: Iterable[TensorInfo]) -> int:
    """Bytes of the tensors alone."""
    return sum(t.end - t.start for t in infos)
