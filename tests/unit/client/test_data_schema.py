"""The schema file, and declarations by columns."""

import tomllib

import numpy as np
import pytest

from casemate.client.data import dump_schema, encode, load_schema, template
from casemate.spec.data import Column
from casemate.spec.errors import DataError

TOML = """
name = "Patients"
label = "sick"
unit = "who"
rows_per_unit = 2
units = 50

[columns.age]
dtype = "f32"
low = 0
high = 120
scale = "symmetric"

[columns."mean radius"]
dtype = "i64"
low = 0
high = 9

[columns.sick]
classes = ["no", "yes"]
"""
CSV = "age,other,mean radius,sick,who\n60,x,3,yes,a\n0,y,4,no,a\n120,z,5,no,b\n"


@pytest.fixture
def schema(tmp_path):
    def write(text=TOML):
        path = tmp_path / "schema.toml"
        path.write_text(text)
        return path

    return write


@pytest.fixture
def table(tmp_path):
    path = tmp_path / "t.csv"
    path.write_text(CSV)
    return path


def refused(call, *args, **kwargs):
    with pytest.raises(DataError) as e:
        call(*args, **kwargs)
    return e.value


def test_a_schema_file_declares_everything(schema, table):
    made = encode(table, columns=load_schema(schema()))
    shown = {c.name: (c.dtype, c.low, c.high, c.scale, c.role) for c in made.schema.columns}
    assert shown == {
        "age": ("f32", 0, 120, "symmetric", "feature"),
        "mean radius": ("i64", 0, 9, "none", "feature"),
        "sick": ("i64", 0, 1, "none", "label"),
        "who": ("i64", 0, 49, "none", "unit"),
    }
    assert (made.schema.name, made.schema.units, made.schema.rows_per_unit) == ("Patients", 50, 2)
    assert encode(table, name="Other", columns=load_schema(schema())).schema.name == "Other"


def test_a_declaration_survives_its_file(schema):
    declared = load_schema(schema())
    assert load_schema(schema(dump_schema(declared))) == declared


def test_a_template_is_valid_and_asks_for_bounds(schema, table):
    text = template(table, name="n", label="sick", unit="who")
    assert set(tomllib.loads(text)["columns"]) == {"age", "other", "mean radius", "sick"}
    error = refused(load_schema, schema(text))
    assert error.code == "data.bounds-missing"
    assert "'age', 'other', 'mean radius', 'sick'" in error.message
    filled = text.replace("# low = ", "low = 0").replace("# high = ", "high = 200")
    declared = load_schema(schema(filled))
    assert [t.high for t in declared.targets] == [200] * 4


def test_a_template_asks_for_the_words_of_text(schema):
    text = template({"colour": np.array(["red", "blue"])})
    assert "red" not in text
    assert refused(load_schema, schema(text)).code == "data.bounds-missing"
    filled = text.replace("# classes", "classes").replace('"first", "second"', '"red", "blue"')
    made = encode({"colour": ["blue", "red"]}, name="t", columns=load_schema(schema(filled)))
    assert made.schema.columns[0].high == 1


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("[columns.age]", "[columns.age"),
        ("[columns.age]", "[colums.age]"),
        ('name = "Patients"', "name = 1"),
        ('name = "Patients"', "nmae = 1"),
        ("rows_per_unit = 2", "rows_per_unit = true"),
        ("units = 50", "units = 1.5"),
        ('label = "sick"', 'label = "ill"'),
        ('label = "sick"', "label = 1"),
        ('unit = "who"', 'unit = "age"'),
        ('dtype = "f32"', 'dtype = "f64"'),
        ('dtype = "f32"', "dtype = 1"),
        ('dtype = "f32"', 'dtype = "f32"\nshape = 3'),
        ('dtype = "f32"', 'dtype = "f32"\nmean = 3'),
        ('scale = "symmetric"', 'scale = "standard"'),
        ("low = 0", 'low = "0"'),
        ("low = 0", "low = true"),
        ("low = 0", "low = 500"),
        ("low = 0", "low = nan"),
        ("high = 120", "high = inf"),
        ("high = 120", "high = 1" + "0" * 400),
        ('label = "sick"', 'label = [["sick"]]'),
        ('label = "sick"', "label = [{a = 1}]"),
        ('classes = ["no", "yes"]', 'classes = ["no", "no"]'),
        ('classes = ["no", "yes"]', "classes = []"),
        ('classes = ["no", "yes"]', "classes = 0"),
        ('classes = ["no", "yes"]', 'classes = "no"'),
        ('classes = ["no", "yes"]', 'classes = ["no"]\nlow = 0'),
        (TOML, ""),
        (TOML, "[columns]\n"),
        (TOML, "columns = 1\n"),
    ],
)
def test_faults_of_a_schema_file(schema, old, new):
    assert old in TOML
    error = refused(load_schema, schema(TOML.replace(old, new, 1)))
    assert error.code in ("data.schema", "data.bounds", "data.column") and error.mend


def test_a_schema_file_that_is_not_there(tmp_path):
    assert refused(load_schema, tmp_path / "none.toml").code == "data.schema"


def test_explicit_columns_choose_and_name_the_dtype(table):
    columns = (
        Column(name="mean radius", dtype="i32", low=0, high=9),
        Column(name="age", dtype="u8", low=0, high=120),
        Column(name="who", dtype="i64", low=0, high=6, role="unit"),
    )
    made = encode(table, name="t", columns=columns, rows_per_unit=2)
    assert [c.name for c in made.schema.columns] == ["age", "mean radius", "who"]
    assert made.schema.units == 7
    assert refused(encode, table, name="t", columns=(columns[0], columns[0])).code == "data.schema"
    assert refused(encode, table, name="t", columns=columns, bounds=(0, 1)).code == "data.schema"
    missing = (Column(name="z", dtype="bool"),)
    assert refused(encode, table, name="t", columns=missing).code == "data.column-missing"


def test_a_new_version_keeps_the_schema(table):
    first = encode(table, name="t", label="sick", unit="who", rows_per_unit=2, pad_units=9,
                   bounds={"age": (0, 120), "mean radius": (0, 9), "other": (0, 1)},
                   classes={"sick": ["no", "yes"], "other": ["x", "y", "z"]})  # fmt: skip
    arrays = {"age": [1.0], "mean radius": [1], "sick": [1], "other": [2], "who": ["k"]}
    again = encode({n: np.array(a) for n, a in arrays.items()}, columns=first.schema)
    assert again.schema.units == 9
    assert set(again.schema.columns) == set(first.schema.columns)


def test_classes_need_a_column(table):
    assert refused(encode, table, name="t", bounds=(0, 1), classes=2).code == "data.schema"
    for classes in (0, True, "no", [], ["a", "a"], [""]):
        error = refused(encode, table, name="t", label="sick", bounds=(0, 1), classes=classes)
        assert error.code == "data.schema"


@pytest.mark.parametrize("pair", [1, (1,), (1, 2, 3), ("a", "b"), (True, 1), "ab"])
def test_bounds_are_pairs(table, pair):
    bounds = {"*": (0, 200), "age": pair}
    error = refused(encode, table, name="t", label="sick", classes=["no", "yes"], bounds=bounds)
    assert error.code == "data.bounds"


def test_the_written_file_is_the_chunks(table, tmp_path):
    made = encode(table, columns=load_schema_text(tmp_path))
    with (tmp_path / "wire").open("wb") as file:
        made.write(file)
    assert (tmp_path / "wire").read_bytes() == b"".join(made.chunks())


def load_schema_text(folder):
    (folder / "s.toml").write_text(TOML)
    return load_schema(folder / "s.toml")
