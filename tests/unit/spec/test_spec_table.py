"""The rules of a table's wire form, without torch: equal to numpy's word on every value."""

from __future__ import annotations

import struct
import sys

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from casemate.spec import table, tensors
from casemate.spec.data import Column, DatasetSchema
from casemate.spec.errors import CasemateError, DataError

KINDS = {"u8": ("B", 0, 255), "i32": ("i", -(2**31), 2**31 - 1), "i64": ("q", -(2**63), 2**63 - 1)}


def schema(column: Column, rows: int) -> DatasetSchema:
    return DatasetSchema(name="t", columns=(column,), rows=rows, units=rows)


def said(of: DatasetSchema, wire: bytes) -> str:
    try:
        table.check(of, wire)
    except CasemateError as e:
        return e.code
    return ""


@settings(deadline=None)
@given(st.data())
def test_whole_numbers(data: st.DataObject) -> None:
    dtype = data.draw(st.sampled_from(sorted(KINDS)))
    code, low, high = KINDS[dtype]
    near = 2**53 - 1
    bounds = st.integers(max(low, -near), min(high, near))
    a, b = sorted((data.draw(bounds), data.draw(bounds)))
    edges = [x for x in (a - 1, a, b, b + 1, low, high) if low <= x <= high]
    values = data.draw(st.lists(st.sampled_from(edges) | st.integers(low, high), min_size=1))
    wire = tensors.dump(
        {"x": (dtype, (len(values),), struct.pack(f"<{len(values)}{code}", *values))}
    )
    of = schema(Column(name="x", dtype=dtype, low=a, high=b), len(values))  # type: ignore[arg-type]
    assert said(of, wire) == ("" if a <= min(values) <= max(values) <= b else "data.bounds")


@settings(deadline=None)
@given(
    st.lists(st.floats(width=32), min_size=1),
    st.floats(-1e6, 1e6),
    st.floats(-1e6, 1e6),
)
def test_floats(values: list[float], a: float, b: float) -> None:
    low, high = sorted((a, b))
    array = np.array(values, "<f4")
    wire = tensors.dump({"x": ("f32", (len(values),), array.tobytes())})
    found = said(schema(Column(name="x", dtype="f32", low=low, high=high), len(values)), wire)
    wide = array.astype(np.float64)
    if not np.isfinite(array).all():
        assert found == "data.not-finite"
    else:
        assert found == ("" if ((wide >= low) & (wide <= high)).all() else "data.bounds")


@given(st.binary(min_size=1, max_size=40))
def test_bools(raw: bytes) -> None:
    of = schema(Column(name="x", dtype="bool"), len(raw))
    wire = tensors.dump({"x": ("bool", (len(raw),), raw)})
    assert said(of, wire) == ("" if max(raw) <= 1 else "data.bool")


@given(st.binary(max_size=200))
def test_no_bytes_raise_anything_else(raw: bytes) -> None:
    assert said(schema(Column(name="x", dtype="bool"), 3), raw).startswith("format.")


def test_a_scaled_column_is_within_its_scale() -> None:
    for scale, low in (("unit", 0.0), ("symmetric", -1.0)):
        column = Column(name="x", dtype="f32", low=-9, high=90, scale=scale)  # type: ignore[arg-type]
        for value, code in ((low, ""), (1.0, ""), (low - 1e-3, "data.bounds"), (9, "data.bounds")):
            wire = tensors.dump({"x": ("f32", (1,), struct.pack("<f", value))})
            assert said(schema(column, 1), wire) == code


def test_the_other_end_first_is_read_alike(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the machine is big-endian, the bytes are swapped."""
    monkeypatch.setattr(sys, "byteorder", "big")
    wire = tensors.dump({"x": ("i32", (1,), struct.pack(">i", 7))})
    assert said(schema(Column(name="x", dtype="i32", low=7, high=7), 1), wire) == ""


def test_a_refusal_names_the_column_and_the_mend() -> None:
    of = schema(Column(name="x", dtype="u8", low=0, high=256), 1)
    with pytest.raises(DataError) as e:
        table.check_schema(of)
    assert (e.value.code, e.value.where) == ("data.bounds", "x")
    assert e.value.mend
