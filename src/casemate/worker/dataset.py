"""A dataset's sealed stream to tensors, strictly as its schema says."""

from __future__ import annotations

import hashlib
from typing import Final

import torch

from casemate.seal.stream import Reader
from casemate.spec import tensors
from casemate.spec.data import DatasetSchema
from casemate.spec.errors import DataError

_DTYPES: Final = {
    "bool": torch.uint8,  # bytes other than 0 and 1 are no bools; see load
    "u8": torch.uint8,
    "i32": torch.int32,
    "i64": torch.int64,
    "f32": torch.float32,
}
DOMAIN: Final = b"casemate/dataset/v1\0"


def _refuse(reason: str, message: str, where: str = "") -> DataError:
    return DataError(
        f"data.{reason}", message, mend="Mend the table or the schema and push again.", where=where
    )


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
        raise _refuse("commitment", "The sealed bytes are not those that the dataset's name says.")
    loaded = tensors.load(memoryview(wire))
    wanted = {c.name: (c.dtype, (schema.rows, *c.shape)) for c in schema.columns}
    for name in sorted(wanted.keys() | loaded.keys()):
        info = loaded[name][0] if name in loaded else None
        if name not in wanted or info is None or (info.dtype, info.shape) != wanted[name]:
            raise _refuse("columns", f"Column {name!r} is not as the schema says.", name)
    out = {}
    for column in schema.columns:
        info, view = loaded[column.name]
        if len(view):
            flat = torch.frombuffer(view, dtype=_DTYPES[column.dtype])
        else:
            flat = torch.empty(0, dtype=_DTYPES[column.dtype])
        if column.dtype == "bool":
            if bool((flat > 1).any()):
                raise _refuse(
                    "bool", f"Column {column.name!r} holds bytes that are no bool.", column.name
                )
            flat = flat.to(torch.bool)
        out[column.name] = flat.reshape(info.shape)
    return out


def check(schema: DatasetSchema, columns: dict[str, torch.Tensor]) -> None:
    """Every value within its declared bounds, none NaN.

    Raises ``DataError`` naming the column alone: which rows, and how many, is said to nobody.
    """
    for column in schema.columns:
        bounds = column.wire_bounds
        if bounds is None:
            continue
        values = columns[column.name]
        if values.is_floating_point() and not bool(torch.isfinite(values).all()):
            raise _refuse(
                "not-finite", f"Column {column.name!r} holds NaN or infinity.", column.name
            )
        if not bool(((values >= bounds[0]) & (values <= bounds[1])).all()):
            raise _refuse(
                "bounds",
                f"Column {column.name!r} holds values outside its declared bounds.",
                column.name,
            )
