"""Sealed datasets to tensors: what is refused, and with which words."""

from __future__ import annotations

import os

import pytest
import torch

from casemate.spec import tensors
from casemate.spec.data import Column, DatasetSchema
from casemate.spec.errors import DataError, FormatError
from casemate.worker import dataset
from support import engine_lab as lab

KEY, SALT = b"k" * 32, b"s" * 32
SCHEMA = DatasetSchema(
    name="t",
    columns=(
        Column(name="x", dtype="f32", shape=(2,), low=0, high=1),
        Column(name="y", dtype="i64", low=0, high=2, role="label"),
        Column(name="flag", dtype="bool"),
        Column(name="byte", dtype="u8", low=3, high=9),
        Column(name="who", dtype="i64", low=0, high=2, role="unit"),
    ),
    rows=3,
    units=3,
)


def good() -> dict[str, torch.Tensor]:
    return {
        "x": torch.rand(3, 2),
        "y": torch.tensor([0, 1, 2]),
        "flag": torch.tensor([True, False, True]),
        "byte": torch.tensor([3, 9, 5], dtype=torch.uint8),
        "who": torch.tensor([2, 0, 1]),
    }


def load(wire: bytes, *, name: str | None = None, schema=SCHEMA, key=KEY, fd: int | None = None):
    fd = lab.sealed_fd(KEY, wire) if fd is None else fd
    try:
        return dataset.load(name or lab.commitment(SALT, wire), schema, key, SALT, fd)
    finally:
        os.close(fd)


def test_what_went_in_comes_out():
    table = good()
    found = load(lab.to_wire(table))
    assert found.keys() == table.keys()
    assert all(torch.equal(found[n], table[n]) for n in table)
    dataset.check(SCHEMA, found)


def test_an_empty_column_axis_is_no_trouble():
    schema = DatasetSchema(name="t", columns=(Column(name="b", dtype="bool"),), rows=1, units=1)
    assert load(lab.to_wire({"b": torch.tensor([False])}), schema=schema)["b"].tolist() == [False]


def test_other_bytes_than_the_name_commits_to_are_refused():
    other = lab.commitment(SALT, b"something else")
    with pytest.raises(DataError) as refused:
        load(lab.to_wire(good()), name=other)
    assert refused.value.code == "data.commitment"


@pytest.mark.parametrize(
    "change",
    [
        lambda t: t.pop("y"),
        lambda t: t.update(extra=torch.zeros(3)),
        lambda t: t.update(x=torch.rand(3, 3)),
        lambda t: t.update(x=torch.rand(4, 2)),
        lambda t: t.update(y=t["y"].int()),
        lambda t: t.update(x=t["x"].reshape(6)),
    ],
    ids=["missing", "extra", "wider", "longer", "dtype", "flat"],
)
def test_columns_that_are_not_the_schemas_are_refused_by_name(change):
    table = good()
    change(table)
    with pytest.raises(DataError) as refused:
        load(lab.to_wire(table))
    assert refused.value.code == "data.columns"
    assert refused.value.where in ("x", "y", "extra")


def test_bytes_that_are_no_bool_are_refused():
    table = {n: (lab.WIRE[t.dtype], tuple(t.shape), t.numpy().tobytes()) for n, t in good().items()}
    table["flag"] = ("bool", (3,), b"\x00\x01\x02")
    with pytest.raises(DataError) as refused:
        load(tensors.dump(table))
    assert (refused.value.code, refused.value.where) == ("data.bool", "flag")


@pytest.mark.parametrize(
    ("column", "value", "code"),
    [
        ("x", float("nan"), "data.not-finite"),
        ("x", float("inf"), "data.not-finite"),
        ("x", 1.0001, "data.bounds"),
        ("x", -1e-9, "data.bounds"),
        ("y", 3, "data.bounds"),
        ("y", -1, "data.bounds"),
        ("byte", 2, "data.bounds"),
        ("who", 3, "data.bounds"),
        ("who", -1, "data.bounds"),
    ],
)
def test_contents_out_of_bounds_are_refused_by_column_alone(column, value, code):
    """The words are the same wherever the bad value is and however many there are."""
    said = set()
    for rows in ([0], [2], [0, 1, 2]):
        table = good()
        table[column][rows] = value
        with pytest.raises(DataError) as refused:
            dataset.check(SCHEMA, load(lab.to_wire(table)))
        assert (refused.value.code, refused.value.where) == (code, column)
        said.add(str(refused.value))
    assert len(said) == 1


def test_a_wrong_key_or_a_torn_stream_is_refused():
    wire = lab.to_wire(good())
    with pytest.raises(FormatError):
        load(wire, key=b"z" * 32)
    fd = lab.sealed_fd(KEY, wire)
    os.ftruncate(fd, os.fstat(fd).st_size - 1)
    with pytest.raises(FormatError):
        load(wire, fd=fd)
    with pytest.raises(FormatError):
        load(b"", name=lab.commitment(SALT, b""))


@pytest.mark.parametrize("at", [0, 5, 20, 100])
def test_a_header_that_is_not_canonical_is_refused(at):
    wire = bytearray(lab.to_wire(good()))
    wire[at] ^= 1
    with pytest.raises((FormatError, DataError)):
        load(bytes(wire))
