"""CSV to the wire form in the base install, and what a bad file gets."""

import struct
import subprocess
import sys

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from casemate.client.data import encode
from casemate.spec import tensors
from casemate.spec.errors import DataError

BOUNDS = {"age": (0, 120), "bmi": (10.0, 60.0)}
TABLE = "age,bmi,sick\n34,20.5,no\n61,31.25,yes\n7,15.0,no\n"


@pytest.fixture
def write(tmp_path):
    def made(text, name="t.csv"):
        path = tmp_path / name
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
        return path

    return made


def push(path, **changed):
    known = {"name": "t", "label": "sick", "bounds": BOUNDS, "classes": ["no", "yes"]}
    return encode(path, **(known | changed))


def wire(encoded):
    """Columns as Python numbers, read back from the wire form."""
    data = b"".join(encoded.chunks())
    assert len(data) == encoded.size
    codes = {"f32": "f", "i64": "q", "i32": "i", "u8": "B", "bool": "B"}
    out = {}
    for name, (info, view) in tensors.load(data).items():
        column = encoded.schema.column(name)
        assert (info.dtype, info.shape) == (column.dtype, (encoded.schema.rows, *column.shape))
        count = len(view) // struct.calcsize(codes[info.dtype])
        out[name] = list(struct.unpack(f"<{count}{codes[info.dtype]}", view))
    return out


def refused(path, **changed):
    with pytest.raises(DataError) as e:
        push(path, **changed)
    return e.value


def test_a_table_comes_through(write):
    encoded = push(write(TABLE))
    assert wire(encoded) == {"age": [34, 61, 7], "bmi": [20.5, 31.25, 15], "sick": [0, 1, 0]}
    assert [(c.name, c.dtype, c.role) for c in encoded.schema.columns] == [
        ("age", "f32", "feature"),
        ("bmi", "f32", "feature"),
        ("sick", "i64", "label"),
    ]
    assert (encoded.schema.rows, encoded.schema.units, encoded.dropped) == (3, 3, 0)
    assert encoded.schema.column("age").high == 120


@pytest.mark.parametrize(
    "text",
    [
        "\ufeff" + TABLE,
        TABLE.replace("\n", "\r\n"),
        TABLE + "\n\n",
        TABLE.rstrip("\n"),
        TABLE.replace("34", '" 34 "').replace("no", '"no"'),
        TABLE.replace("34", "3.4e1").replace("61", "+61"),
    ],
)
def test_usual_spellings_of_the_same_table(write, text):
    assert wire(push(write(text))) == wire(push(write(TABLE, "other.csv")))


@pytest.mark.parametrize(
    ("text", "code", "words"),
    [
        ("", "data.csv-header", "no header"),
        ("\n1,2\n", "data.csv-header", "no header"),
        ("age,,sick\n1,2,no\n", "data.csv-header", "column 2 has no name"),
        ("age,age,sick\n1,2,no\n", "data.duplicate-column", "'age'"),
        ("age, age,sick\n1,2,no\n", "data.duplicate-column", "'age'"),
        (TABLE + "1,2\n", "data.csv-ragged", "line 5: 2 cells where the header has 3"),
        (TABLE + "1,2,no,4\n", "data.csv-ragged", "line 5: 4 cells"),
        (TABLE + "\n1,20,no\n", "data.csv-ragged", "line 5: the line is empty"),
        (TABLE + '1,"2\n', "data.csv-form", "line"),
        (TABLE + '1,"2"x,no\n', "data.csv-form", "line 5"),
        (TABLE.encode() + b"1,\xff,no\n", "data.csv-encoding", "line 5: the byte 0xff"),
        (TABLE.encode("utf-16"), "data.csv-encoding", "line 1"),
        (TABLE.encode("latin-1") + "1,20,né\n".encode("latin-1"), "data.csv-encoding", "line 5"),
        ("age,bmi,sick\n", "data.empty", "no rows"),
        (TABLE + ",20,no\n", "data.missing-value", "'age', row 4 (line 5)"),
        (TABLE + "1, ,no\n", "data.missing-value", "'bmi', row 4 (line 5)"),
        (TABLE + "1,20,\n", "data.missing-value", "'sick', row 4"),
        (TABLE + "x,20,no\n", "data.not-a-number", "'age', row 4 (line 5): 'x'"),
        (TABLE + "1_0,20,no\n", "data.not-a-number", "'1_0'"),
        (TABLE + "\u0661,20,no\n", "data.not-a-number", "row 4"),
        (TABLE + '"1,5",20,no\n', "data.not-a-number", "'1,5'"),
        (TABLE + "0x10,20,no\n", "data.not-a-number", "'0x10'"),
        (TABLE + "nan,20,no\n", "data.not-finite", "'nan'"),
        (TABLE + "1,-Infinity,no\n", "data.not-finite", "'bmi'"),
        (TABLE + "1e400,20,no\n", "data.not-finite", "'age'"),
        (TABLE + "121,20,no\n", "data.out-of-bounds", "'age', row 4 (line 5): 121"),
        (TABLE + "1,9.999,no\n", "data.out-of-bounds", "'bmi', row 4 (line 5): 9.999"),
        (TABLE + "1,20,maybe\n", "data.label-range", "'sick', row 4 (line 5): 'maybe'"),
        (TABLE + "1,20,No\n", "data.label-range", "'No'"),
        (TABLE + "1,20, no\n", "data.label-range", "' no'"),
    ],
)
def test_what_a_bad_table_gets(write, text, code, words):
    error = refused(write(text))
    assert error.code == code
    assert words in error.message
    assert error.mend
    assert error.where or code == "data.empty"


def test_the_line_is_counted_through_quoted_breaks(write):
    error = refused(write('age,bmi,sick\n1,"20\n",no\n200,20,no\n'))
    assert "row 2 (line 4)" in error.message


def test_a_fault_far_down_names_its_row(write):
    rows = "".join(f"{i % 100},20,no\n" for i in range(10_000))
    error = refused(write("age,bmi,sick\n" + rows + "500,20,no\n"))
    assert (
        "row 10001 (line 10002)" in error.message and error.where == "age, row 10001 (line 10002)"
    )


def test_missing_bounds_are_all_named_with_how_to_write_them(write):
    error = refused(write(TABLE), bounds=None)
    assert error.code == "data.bounds-missing"
    assert "'age', 'bmi'" in error.message and "'sick'" not in error.message
    assert "bounds={'age': (low, high)}" in error.mend and "schema" in error.mend
    error = refused(write(TABLE), bounds={"bmi": (0, 1)}, classes=None)
    assert "'age', 'sick'" in error.message


def test_one_pair_serves_every_feature_but_not_the_label(write):
    encoded = push(write(TABLE), bounds=(0, 200))
    assert encoded.schema.column("bmi").high == 200
    assert refused(write(TABLE), bounds=(0, 200), classes=None).code == "data.bounds-missing"
    assert (
        push(write(TABLE), bounds={"*": (0, 200), "age": (0, 99)}).schema.column("age").high == 99
    )


@pytest.mark.parametrize(
    ("label", "values", "dtype"), [((0, 2), "0\n1\n2", "i64"), ((0.0, 2.0), "0\n0.5\n2", "f32")]
)
def test_a_label_is_whole_when_its_bounds_are(write, label, values, dtype):
    encoded = encode(write("y\n" + values), name="t", label="y", bounds={"y": label})
    assert encoded.schema.columns[0].dtype == dtype


def test_labels_out_of_their_declared_range(write):
    path = write("x,y\n1,0\n1,3\n")
    for changed in ({"bounds": {"x": (0, 1), "y": (0, 2)}}, {"bounds": (0, 1), "classes": 3}):
        error = refused(path, **({"label": "y", "classes": None} | changed))
        assert error.code == "data.label-range" and "'y', row 2" in error.message
    error = refused(write("x,y\n1,0.5\n", "b.csv"), label="y", bounds=(0, 1), classes=3)
    assert error.code == "data.not-an-integer"


def test_a_column_that_is_not_there(write):
    for changed in (
        {"label": "ill"},
        {"unit": "who"},
        {"bounds": BOUNDS | {"z": (0, 1)}},
        {"scale": {"z": "unit"}},
    ):
        error = refused(write(TABLE), **changed)
        assert error.code == "data.column-missing" and "'age', 'bmi', 'sick'" in error.message


def test_units_keep_their_own_first_rows(write):
    rows = ["b,1", "a,2", "b,3", "b,4", "c,5", "a,6", "b,7"]
    encoded = encode(
        write("who,x\n" + "\n".join(rows)), name="t", unit="who", rows_per_unit=2, bounds=(0, 9)
    )
    assert wire(encoded) == {"who": [0, 1, 0, 2, 1], "x": [1, 2, 3, 5, 6]}
    assert (encoded.schema.units, encoded.schema.rows_per_unit, encoded.dropped) == (3, 2, 2)
    assert encoded.schema.unit_column.high == 2


@settings(max_examples=25)
@given(st.lists(st.tuples(st.sampled_from("abc"), st.integers(0, 9)), min_size=1, max_size=20))
def test_a_units_rows_do_not_depend_on_the_others(tmp_path_factory, rows):
    """P1: with everybody else's rows away, a unit keeps the same rows."""
    path = tmp_path_factory.mktemp("units") / "t.csv"

    def kept(table, unit):
        path.write_text("who,x\n" + "".join(f"{u},{x}\n" for u, x in table))
        found = wire(encode(path, name="t", unit="who", rows_per_unit=2, bounds=(0, 9)))
        index = list(dict.fromkeys(u for u, _ in table)).index(unit)
        return [x for i, x in zip(found["who"], found["x"], strict=True) if i == index]

    for unit in {u for u, _ in rows}:
        assert kept(rows, unit) == kept([r for r in rows if r[0] == unit], unit)


def test_a_first_rows_of_the_file_cut_would_be_caught(write):
    """Seeded bug: k rows of the whole table instead of each unit's own."""
    alone = wire(encode(write("w,x\nb,5\n"), name="t", unit="w", bounds=(0, 9)))["x"]
    both = wire(encode(write("w,x\na,1\nb,5\n", "u.csv"), name="t", unit="w", bounds=(0, 9)))
    assert both["x"][1:] == alone and both["x"][:1] != alone


def test_padding_hides_the_number_of_units(write):
    assert push(write(TABLE), pad_units=10).schema.units == 10
    assert refused(write(TABLE), pad_units=2).code == "data.units"
    path = write("who,x\na,1\nb,2\n", "u.csv")
    schema = encode(path, name="t", unit="who", bounds=(0, 9), pad_units=7).schema
    assert schema.units == 7 and schema.unit_column.high == 6


def test_a_row_without_a_unit(write):
    error = refused(write("who,x\na,1\n ,2\n"), unit="who", label=None, classes=None, bounds=(0, 9))
    assert error.code == "data.unit-missing" and "row 2 (line 3)" in error.message
    assert refused(write(TABLE), rows_per_unit=2).code == "data.units"
    alone = {"label": None, "classes": None, "bounds": (0, 9), "unit": "who", "rows_per_unit": 0}
    assert refused(write("who,x\na,1\n"), **alone).code == "data.units"


def test_scaling_maps_the_declared_bounds(write):
    path = write("x\n-10\n0\n30\n")
    for scale, expected in (("unit", [0, 0.25, 1]), ("symmetric", [-1, -0.5, 1])):
        encoded = encode(path, name="t", bounds=(-10, 30), scale=scale)
        assert wire(encoded)["x"] == expected
        assert encoded.schema.columns[0].scale == scale
        assert encoded.schema.columns[0].low == -10


def test_names_of_columns_and_datasets_have_limits(write):
    assert refused(write("âge\n1\n"), label=None, classes=None, bounds=(0, 1)).code == "data.column"
    assert refused(write(TABLE), name="").code == "data.schema"
    assert refused(write(TABLE), name="\ud800").code == "data.schema"


def test_paths_that_are_no_table(write, tmp_path):
    assert refused(tmp_path / "none.csv").code == "data.source"
    assert refused(tmp_path).code == "data.source"
    assert refused(write(TABLE, "t.xlsx")).code == "data.source"


def test_csv_needs_no_package(write):
    """In a process where numpy, pandas and pyarrow cannot be imported."""
    script = f"""
import sys
for name in ("numpy", "pandas", "pyarrow", "polars", "torch", "tokenizers"):
    sys.modules[name] = None
from casemate.client.data import encode, template
from casemate.spec.errors import UsageError
made = encode({str(write(TABLE))!r}, name="t", label="sick", bounds=(0, 200), classes=["no", "yes"])
print(made.size, template({str(write(TABLE))!r}).count("[columns."))
try:
    encode({{"x": [1]}}, name="t", bounds=(0, 1))
except UsageError as e:
    print(e.code, e.where)
"""
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True
    )
    expected = push(write(TABLE), bounds=(0, 200)).size
    assert done.stdout.split() == [str(expected), "3", "usage.extra", "numpy"]
