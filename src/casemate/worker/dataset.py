"""A dataset's sealed stream to tensors, strictly as its schema says."""

from __future__ import annotations

import hashlib
from typing import Final

import torch

from casemate.seal.stream import Reader
from casemate.spec import table, tensors
from casemate.spec.data import DatasetSchema
from casemate.spec.table import refusal

_DTYPES: Final = {
    "bool": torch.uint8,  # bytes other than 0 and 1 are no bools; see load
    "u8": torch.uint8,
    "i32": torch.int32,
    "i64": torch.int64,
    "f32": torch.float32,
}
DOMAIN: Final = b"casemate/dataset/v1\0"


def load(
    dataset: str, schema: DatasetSchema, key: bytes, salt: bytes, fd: int
) -> dict[str, torch.Tensor]:
    """Column name -> tensor (rows, *shape).

    Raises ``FormatError`` (the stream or the safetensors form) or ``DataError``
    (``data.commitment``, ``data.columns``, ``data.bool``). Contents are :func:`check`'s matter.
    """
    reader = Reader(key, fd)
    wire = bytearray(reader.size)
    reader.readinto(0, wire)
    found = "ds_" + hashlib.sha256(DOMAIN + salt + wire).hexdigest()[:40]
    if found != dataset:
        message = "The sealed bytes are not those that the dataset's name says."
        raise refusal("commitment", message)
    loaded = tensors.load(memoryview(wire))
    table.check_columns(schema, {name: info for name, (info, _) in loaded.items()})
    out = {}
    for column in schema.columns:
        info, view = loaded[column.name]
        if len(view):
            flat = torch.frombuffer(view, dtype=_DTYPES[column.dtype])
        else:
            flat = torch.empty(0, dtype=_DTYPES[column.dtype])
        if column.dtype == "bool":
            table.check_values(column, (0, int(flat.max()) if len(flat) else 0))
            flat = flat.to(torch.bool)
        out[column.name] = flat.reshape(info.shape)
    return out


def check(schema: DatasetSchema, columns: dict[str, torch.Tensor]) -> None:
    """The declaration, then every value within its bounds, none NaN.

    Raises ``DataError`` naming the column alone: which rows, and how many, is said to nobody.
    """
    table.check_schema(schema)
    for column in schema.columns:
        if column.wire_bounds is not None:
            low, high = torch.aminmax(columns[column.name])
            table.check_values(column, (low.item(), high.item()))
