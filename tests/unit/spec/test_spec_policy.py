"""What policies, budgets, consents and trees refuse, at their bounds."""

from __future__ import annotations

from dataclasses import replace

import pytest

from casemate.seal import note
from casemate.spec import merkle
from casemate.spec.consent import (
    Consented,
    HandoverRequest,
    Head,
    RecoveryConsent,
    SoftwareConsent,
)
from casemate.spec.data import (
    ANYONE,
    MAX_DELTA,
    Budget,
    Column,
    DatasetSchema,
    Policy,
    Registration,
)
from casemate.spec.errors import FormatError
from casemate.spec.evidence import Evidence, ServerPolicy
from casemate.spec.job import Charge

OPEN = Policy(scientists=(ANYONE,))
SCHEMA = DatasetSchema(
    name="t", columns=(Column(name="x", dtype="f32", low=0.0, high=1.0),), rows=10, units=10
)


@pytest.mark.parametrize(
    ("good", "bad", "words"),
    [
        (
            {"scientists": ("id_a", "id_b")},
            {"scientists": ("id_a", "id_a")},
            "different identities",
        ),
        ({"scientists": ("*", "id_b")}, {"scientists": ()}, "different identities"),
        ({"scientists": ("id_",)}, {"scientists": ("ID_x",)}, "identity ids or"),
        ({"scientists": ("*",)}, {"scientists": ("id_a", "x")}, "identity ids or"),
        ({"max_epsilon": 1e-9}, {"max_epsilon": 0.0}, "max_epsilon must be above 0"),
        ({"nonprivate": "a b c"}, {"nonprivate": "a b"}, "in words"),
        ({"last_epoch": 0}, {"last_epoch": -1}, "last_epoch must be at least 0"),
        ({"resumes": 0}, {"resumes": -1}, "resumes must be from 0 to 3"),
        ({"resumes": 3}, {"resumes": 4}, "resumes must be from 0 to 3"),
        (
            {"evaluation": True, "evaluations": 1_000_000},
            {"evaluation": True, "evaluations": 1_000_001},
            "evaluations must be from 0 to 1000000",
        ),
        (
            {"evaluation": True, "evaluations": 0},
            {"evaluation": True, "evaluations": -1},
            "evaluations must be from 0",
        ),
        ({"evaluations": 0}, {"evaluations": 1}, "0 but for evaluation"),
    ],
)
def test_a_policys_bounds(good: dict, bad: dict, words: str) -> None:
    replace(OPEN, **good)
    with pytest.raises(ValueError, match=words):
        replace(OPEN, **bad)


def test_no_more_cosignatures_than_witnesses() -> None:
    keys = ("w+0+a", "v+0+b")
    replace(OPEN, witnesses=keys, cosignatures=2)
    for count in (-1, 0, 1, 3, 4):
        with pytest.raises(ValueError, match="more than half"):
            replace(OPEN, witnesses=keys, cosignatures=count)


def test_whom_a_policy_admits() -> None:
    assert OPEN.admits("id_a")
    named = Policy(scientists=("id_a", "id_b"))
    assert [named.admits(i) for i in ("id_a", "id_b", "id_c", "*")] == [True, True, False, False]
    assert (OPEN.approval, OPEN.evaluation, OPEN.resumes, OPEN.cosignatures) == (
        "none",
        False,
        3,
        0,
    )


@pytest.mark.parametrize("field", ["epsilon", "delta"])
def test_a_budgets_bounds(field: str) -> None:
    budget = Budget(epsilon=1.0, delta=1e-5)
    most = {"epsilon": 1000.0, "delta": MAX_DELTA}[field]
    for good in (1e-9, most):
        replace(budget, **{field: good})
    for bad in (0.0, -1.0, most * 1.001):
        with pytest.raises(ValueError, match=f"{field} must be above 0"):
            replace(budget, **{field: bad})


def test_a_registrations_id() -> None:
    made = Registration(
        dataset="ds_" + "0" * 40, owner="o", schema=SCHEMA, policy=OPEN,
        budget=Budget(epsilon=1.0, delta=1e-5), upload="u", sealed_key=b"",
    )  # fmt: skip
    assert made.filter == "rdp/v1" and made.previous is None
    for bad in ("ds_" + "0" * 39, "ds_" + "0" * 41, "xx_" + "0" * 40):
        with pytest.raises(ValueError, match="ds_ and 40"):
            replace(made, dataset=bad)
    info = Registration.info("ds_x", "sha256:p", "sha256:s")
    assert info == b"casemate/dataset-key/v1|ds_x|sha256:p|sha256:s"


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"rows": 0}, "from 1 to 2"),
        ({"units": 2**40 + 1}, "from 1 to 2"),
        ({"rows_per_unit": 0}, "rows_per_unit"),
        ({"rows_per_unit": 4097}, "rows_per_unit"),
        ({"units": 9}, "every row is a unit"),
        ({"rows_per_unit": 2}, "every row is a unit"),
        ({"name": ""}, "1 to 120 printable"),
        ({"name": "x" * 121}, "1 to 120 printable"),
        ({"columns": ()}, "1 to 4096 columns"),
        ({"columns": SCHEMA.columns * 2}, "different names"),
    ],
)
def test_a_schemas_bounds(changes: dict, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        replace(SCHEMA, **changes)


def test_columns_that_name_the_unit() -> None:
    unit = Column(name="u", dtype="i64", low=0, high=4, role="unit")
    two = replace(SCHEMA, columns=(*SCHEMA.columns, unit), units=5, rows_per_unit=2)
    assert two.unit_column == unit and SCHEMA.unit_column is None
    assert two.column("u") == unit and two.column("v") is None
    second = replace(unit, name="v")
    for changes, words in (
        ({"columns": (*two.columns, second)}, "only one column"),
        ({"units": 6}, "high must be units - 1"),
        ({"rows": 11}, "more rows than"),
    ):
        with pytest.raises(ValueError, match=words):
            replace(two, **changes)
    for changes in ({"dtype": "i32"}, {"shape": (2,)}, {"low": 1}):
        with pytest.raises(ValueError, match="i64 scalars from 0"):
            replace(unit, **changes)


HEAD = Head(origin="o", size=0, root=b"r" * 32)


def test_consents_bounds() -> None:
    for bad in ({"size": -1}, {"root": b"r" * 31}, {"root": b"r" * 33}):
        with pytest.raises(ValueError, match="a root of 32 bytes"):
            replace(HEAD, **bad)
    plain = SoftwareConsent(origin="o", dataset="d", measurement="0f" * 128, trust="x" * (1 << 14))
    replace(plain, measurement="", trust="")
    for bad, words in (
        ({"measurement": "0" * 257}, "in hex, lower case"),
        ({"measurement": "0F"}, "in hex, lower case"),
        ({"trust": "x" * ((1 << 14) + 1)}, "at most 16384"),
        ({"measurement": ""}, "stand together"),
        ({"trust": ""}, "stand together"),
    ):
        with pytest.raises(ValueError, match=words):
            replace(plain, **bad)
    charge = Charge(rdp_nano=(0, 0), delta_femto=0, epsilon=0.0)
    recovery = RecoveryConsent(head=HEAD, next="n", dataset="d", charge=charge)
    replace(recovery, charge=None, rest=True)
    for bad, words in (
        ({"rest": True}, "either the rest"),
        ({"charge": replace(charge, rdp_nano=(0, -1))}, "never negative"),
        ({"charge": replace(charge, delta_femto=-1)}, "never negative"),
    ):
        with pytest.raises(ValueError, match=words):
            replace(recovery, **bad)


def test_keys_of_consents_and_hand_overs() -> None:
    consented = Consented(envelope="", sign_key=b"s" * 32, seal_key=b"k" * 1216)
    for bad in ({"sign_key": b"s" * 31}, {"seal_key": b"k" * 1215}):
        with pytest.raises(ValueError, match="wrong length"):
            replace(consented, **bad)
    promises = ServerPolicy(software="", dev=True, filter="", release_owner="", sandbox=())
    request = HandoverRequest(
        hpke_key=b"k" * 1216, policy=promises, anchor="",
        evidence=Evidence(tee="simulated", simulated=True, files={}),
    )  # fmt: skip
    with pytest.raises(ValueError, match="wrong length"):
        replace(request, hpke_key=b"k" * 1217)


def test_witnesses_have_different_names_or_ids() -> None:
    a = note.Verifier("w", note.COSIGNATURE, b"a" * 32)
    assert note.witnesses([str(a)]) == (a,)
    with pytest.raises(FormatError, match="same name and id"):
        note.witnesses([str(a), str(a)])
    with pytest.raises(FormatError, match="type 4"):
        note.witnesses([str(replace(a, kind=note.SIGNATURE))])


def test_a_tree_of_nothing_and_of_itself() -> None:
    root = merkle.root(3, merkle.tree([b"a", b"b", b"c"]))
    merkle.check_consistency(0, merkle.EMPTY, 3, root, ())
    merkle.check_consistency(3, root, 3, root, ())
    for old, first, proof, words in (
        (0, root, (), "the empty tree has another root"),
        (3, merkle.EMPTY, (), "two roots for one size"),
        (3, root, (root,), "too long"),
        (0, merkle.EMPTY, (root,), "too long"),
        (4, root, (), "cannot become"),
        (-1, root, (), "cannot become"),
    ):
        with pytest.raises(ValueError, match=words):
            merkle.check_consistency(old, first, 3, root, proof)


def test_what_lies_on_a_schemas_bounds() -> None:
    most = 2**40
    for good in (
        {"rows": 1, "units": 1},
        {"rows": most, "units": most},
        {"rows": 1, "units": most},
        {"name": "x" * 120},
        {"columns": tuple(replace(SCHEMA.columns[0], name=f"c{i}") for i in range(4096))},
    ):
        replace(SCHEMA, **good)
    for bad in (
        {"rows": most + 1, "units": most + 1},
        {"rows": 1, "units": most + 1},
        {"rows": 0, "units": 1},
        {"columns": tuple(replace(SCHEMA.columns[0], name=f"c{i}") for i in range(4097))},
    ):
        with pytest.raises(ValueError):
            replace(SCHEMA, **bad)
    unit = Column(name="u", dtype="i64", low=0, high=0, role="unit")
    one = replace(SCHEMA, columns=(unit,), rows=1, units=1, rows_per_unit=1)
    replace(one, rows=4096, rows_per_unit=4096)
    with pytest.raises(ValueError, match="rows_per_unit"):
        replace(one, rows_per_unit=4097)
    with pytest.raises(ValueError, match="more rows"):
        replace(one, rows=2)


def test_what_lies_on_a_columns_bounds() -> None:
    column = SCHEMA.columns[0]
    for good in (
        {"name": "x" * 120}, {"shape": (1,) * 6}, {"shape": (2**24,)}, {"low": 1.0},
        {"dtype": "bool", "low": None, "high": None}, {"scale": "unit"},
    ):  # fmt: skip
        replace(column, **good)
    for bad, words in (
        ({"name": ""}, "1 to 120 printable"),
        ({"name": "x" * 121}, "1 to 120 printable"),
        ({"name": "é"}, "1 to 120 printable"),
        ({"name": "a\n"}, "1 to 120 printable"),
        ({"shape": (1,) * 7}, "impossible shape"),
        ({"shape": (0,)}, "impossible shape"),
        ({"shape": (2**24 + 1,)}, "impossible shape"),
        ({"low": None}, "declared bounds"),
        ({"high": None}, "declared bounds"),
        ({"low": 1.5}, "low above high"),
        ({"scale": "unit", "low": 1.0}, "can be scaled only"),
        ({"scale": "unit", "dtype": "i32", "low": 0, "high": 1}, "can be scaled only"),
    ):
        with pytest.raises(ValueError, match=words):
            replace(column, **bad)
    assert column.wire_bounds == (0.0, 1.0)
    assert replace(column, scale="symmetric").wire_bounds == (-1.0, 1.0)
    assert replace(column, low=-3.0, high=3.0, scale="unit").wire_bounds == (0.0, 1.0)
    assert replace(column, dtype="bool", low=None, high=None).wire_bounds is None
    assert replace(column, shape=(3, 2)).row_bytes == 24
    assert replace(column, dtype="u8", low=0, high=9).row_bytes == 1
