"""Columns, schemas, policies: what an owner can and cannot declare."""

import math
from dataclasses import replace

import pytest

from casemate.spec.data import Column, DatasetSchema, Policy
from casemate.spec.identity import PublicIdentity
from casemate.spec.job import DatasetUse, JobRequest

X = Column(name="x", dtype="f32", low=0, high=1)
WHO = Column(name="who", dtype="i64", low=0, high=4, role="unit")


@pytest.mark.parametrize(
    "changed",
    [
        {"name": ""}, {"name": "é"}, {"name": "a\nb"}, {"name": "x" * 121},
        {"shape": (0,)}, {"shape": (-1,)}, {"shape": (2**24 + 1,)}, {"shape": (1,) * 7},
        {"low": None}, {"high": None}, {"low": 2}, {"low": math.nan}, {"high": math.nan},
        {"scale": "unit", "dtype": "i64"}, {"scale": "unit", "high": 0},
        {"role": "unit"}, {"role": "unit", "dtype": "i64", "low": 1},
        {"role": "unit", "dtype": "i64", "shape": (2,)},
    ],
)  # fmt: skip
def test_impossible_columns(changed):
    fields = {f: getattr(X, f) for f in Column.__dataclass_fields__}
    with pytest.raises(ValueError):
        Column(**(fields | changed))


def test_bounds_and_bytes_on_the_wire():
    assert X.wire_bounds == (0, 1)
    scaled = {"name": "x", "dtype": "f32", "low": -9, "high": 9}
    assert Column(**scaled, scale="unit").wire_bounds == (0.0, 1.0)
    assert Column(**scaled, scale="symmetric").wire_bounds == (-1.0, 1.0)
    assert Column(name="b", dtype="bool").wire_bounds is None
    assert Column(name="p", dtype="u8", shape=(3, 4, 5), low=0, high=255).row_bytes == 60
    assert Column(name="t", dtype="i64", shape=(7,), low=0, high=9).row_bytes == 56


GOOD = {"name": "d", "columns": (X, WHO), "rows": 9, "units": 5, "rows_per_unit": 2}


@pytest.mark.parametrize(
    "changed",
    [
        {"columns": ()}, {"columns": (X, X)}, {"columns": (X, WHO, WHO)}, {"name": ""},
        {"name": "a\n"}, {"rows": 0}, {"units": 0}, {"rows": 2**40 + 1}, {"rows_per_unit": 0},
        {"rows_per_unit": 4097}, {"units": 6}, {"rows": 11}, {"columns": (X,)},
        {"columns": (X,), "rows_per_unit": 1, "units": 8},
        {"columns": (X, replace(WHO, high=2**40 - 1)), "units": 2**40, "rows": 2**40 + 1},
    ],
)  # fmt: skip
def test_impossible_schemas(changed):
    with pytest.raises(ValueError):
        DatasetSchema(**(GOOD | changed))


def test_schema_lookups():
    schema = DatasetSchema(**GOOD)
    assert schema.unit_column == WHO and schema.column("x") == X and schema.column("z") is None
    padded = DatasetSchema(name="d", columns=(X,), rows=9, units=12)
    assert padded.unit_column is None


@pytest.mark.parametrize(
    "changed",
    [
        {"scientists": ()}, {"scientists": ("*", "*")}, {"scientists": ("anna",)},
        {"max_epsilon": 0.0}, {"max_epsilon": math.nan}, {"nonprivate": "yes"},
        {"nonprivate": ""}, {"last_epoch": -1},
    ],
)  # fmt: skip
def test_impossible_policies(changed):
    with pytest.raises(ValueError):
        Policy(**({"scientists": ("*",)} | changed))


def test_who_is_admitted():
    assert Policy(scientists=("*",)).admits("id_1")
    assert Policy(scientists=("id_1",)).admits("id_1")
    assert not Policy(scientists=("id_1",)).admits("id_2")


def test_an_identity_is_named_by_both_keys():
    one = PublicIdentity(name="a", sign_key=bytes(32), seal_key=bytes(1216))
    assert one.id == PublicIdentity(name="b", sign_key=bytes(32), seal_key=bytes(1216)).id
    for changed in ({"sign_key": b"\1" * 32}, {"seal_key": b"\1" * 1216}):
        fields = {"name": "a", "sign_key": bytes(32), "seal_key": bytes(1216)} | changed
        assert PublicIdentity(**fields).id != one.id
    with pytest.raises(ValueError):
        PublicIdentity(name="a", sign_key=bytes(31), seal_key=bytes(1217))


def test_a_job_names_different_datasets():
    from support import formats

    job = formats.sample(JobRequest)
    fields = {f: getattr(job, f) for f in JobRequest.__dataclass_fields__}
    use = DatasetUse(dataset=formats.DATASET, policy_digest="", epoch=0)
    for changed in ({"datasets": ()}, {"datasets": (use, use)}, {"job": "job_1"}):
        with pytest.raises(ValueError):
            JobRequest(**(fields | changed))
