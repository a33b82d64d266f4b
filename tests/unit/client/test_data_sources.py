"""Every source gives the same wire form as CSV, and its own faults are named."""

import numpy as np
import pandas as pd
import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from casemate.client.data import encode, template
from casemate.spec import tensors
from casemate.spec.errors import DataError

ROWS = 10_000  # several blocks
FRAME = pd.DataFrame(
    {
        "age": [i % 90 for i in range(ROWS)],
        "bmi": [20 + i % 40 + 0.3 for i in range(ROWS)],
        "sick": ["yes" if i % 3 else "no" for i in range(ROWS)],
        "who": [f"p{i // 3}" for i in range(ROWS)],
    }
)
DECLARED = {
    "name": "t",
    "label": "sick",
    "unit": "who",
    "rows_per_unit": 2,
    "bounds": {"age": (0, 120), "bmi": (10.5, 60.1)},
    "classes": ["no", "yes"],
    "scale": "symmetric",
}


def wire(encoded):
    return b"".join(encoded.chunks())


def arrays(encoded):
    kinds = {"f32": "<f4", "i64": "<i8", "i32": "<i4", "u8": "u1", "bool": "?"}
    return {
        name: np.frombuffer(view, kinds[info.dtype]).reshape(info.shape)
        for name, (info, view) in tensors.load(wire(encoded)).items()
    }


def refused(source, **declared):
    with pytest.raises(DataError) as e:
        encode(source, name="t", **declared)
    return e.value


class Rows:
    """A map-style dataset, as torch knows them."""

    def __init__(self, rows):
        self.rows = rows

    def __len__(self):
        return len(self.rows)

    def __getitem__(self, at):
        return self.rows[at]


def csv_file(frame, path):
    frame.to_csv(path, index=False)
    return path


def parquet_file(frame, path):
    pq.write_table(pa.Table.from_pandas(frame), path, row_group_size=3000)
    return path


def hugging_face(frame, path):
    datasets = pytest.importorskip("datasets")
    shuffled = datasets.Dataset.from_pandas(frame[::-1].reset_index(drop=True))
    return shuffled.select(range(len(frame) - 1, -1, -1))  # with an index mapping


SOURCES = {
    "parquet": parquet_file,
    "pandas": lambda f, p: f,
    "pandas-nullable": lambda f, p: f.convert_dtypes(),
    "pandas-category": lambda f, p: f.astype({"sick": "category"}),
    "pandas-odd-index": lambda f, p: f.set_index(f.index * 7 + 5),
    "polars": lambda f, p: pl.from_pandas(f),
    "arrow": lambda f, p: pa.Table.from_pandas(f),
    "arrow-batch": lambda f, p: pa.RecordBatch.from_pandas(f),
    "arrow-dictionary": lambda f, p: pa.table(
        {n: pa.array(f[n]).dictionary_encode() for n in f.columns}
    ),
    "hugging-face": hugging_face,
    "dict": lambda f, p: {n: f[n].to_numpy() for n in f.columns},
    "dict-of-lists": lambda f, p: {n: f[n].tolist() for n in f.columns},
    "items": lambda f, p: Rows(f.to_dict("records")),
}


@pytest.fixture(scope="module")
def from_csv(tmp_path_factory):
    return encode(csv_file(FRAME, tmp_path_factory.mktemp("csv") / "t.csv"), **DECLARED)


@pytest.mark.parametrize("kind", SOURCES)
def test_every_source_gives_the_same_bytes(kind, from_csv, tmp_path):
    made = encode(SOURCES[kind](FRAME, tmp_path / "t.parquet"), **DECLARED)
    assert made.schema == from_csv.schema
    assert wire(made) == wire(from_csv)
    assert made.dropped == from_csv.dropped == ROWS // 3


def test_default_dtypes():
    made = encode(
        {
            "f64": np.array([0.1, 0.2]),
            "f16": np.array([0.5, 1.0], dtype=np.float16),
            "int": np.array([1, 2], dtype=np.int32),
            "byte": np.array([1, 2], dtype=np.uint8),
            "flag": np.array([True, False]),
            "image": np.zeros((2, 3, 4, 4), np.uint8),
            "tokens": np.ones((2, 5), np.int64),
            "y": np.array([True, False]),
        },
        name="t",
        label="y",
        bounds={"f64": (0, 1), "f16": (0, 1), "int": (0, 9), "byte": (0, 9), "tokens": (0, 99)},
    )
    shown = {c.name: (c.dtype, c.shape, c.low, c.high) for c in made.schema.columns}
    assert shown == {
        "f64": ("f32", (), 0, 1),
        "f16": ("f32", (), 0, 1),
        "int": ("i64", (), 0, 9),
        "byte": ("i64", (), 0, 9),
        "flag": ("bool", (), None, None),
        "image": ("u8", (3, 4, 4), 0, 255),
        "tokens": ("i64", (5,), 0, 99),
        "y": ("i64", (), 0, 1),
    }
    assert arrays(made)["f64"].tolist() == np.array([0.1, 0.2], np.float32).tolist()
    assert arrays(made)["y"].tolist() == [1, 0]


def test_images_scale_to_floats():
    pixels = np.arange(2 * 3 * 4 * 4, dtype=np.uint8).reshape(2, 3, 4, 4)
    made = encode((pixels, [0, 1]), name="t", label="y", classes=2, scale="unit")
    assert np.array_equal(arrays(made)["x"], (pixels / 255).astype(np.float32))


def test_layouts_in_memory_do_not_matter():
    x = np.arange(24, dtype=">f8").reshape(4, 6)
    for view in (x, np.asfortranarray(x), np.repeat(x, 2, axis=1)[:, ::2], x[::-1][::-1]):
        assert np.array_equal(arrays(encode(view, name="t", bounds=(0, 23)))["x"], x)


def test_torch_datasets():
    torch = pytest.importorskip("torch")
    x, y = torch.rand(5000, 3, 2), torch.arange(5000) % 4
    dataset = torch.utils.data.TensorDataset(x, y)
    made = encode(dataset, name="t", label="y", bounds=(0, 1), classes=4)
    assert np.array_equal(arrays(made)["x"], x.numpy())
    assert np.array_equal(arrays(made)["y"], y.numpy())
    subset = torch.utils.data.Subset(dataset, [3, 1])
    made = encode(subset, name="t", label="y", bounds=(0, 1), classes=4)
    assert arrays(made)["y"].tolist() == [3, 1]
    assert refused(torch.utils.data.DataLoader(dataset), bounds=(0, 1)).code == "data.source"


def test_hugging_face_images_and_splits():
    datasets = pytest.importorskip("datasets")
    pytest.importorskip("PIL")
    pixels = [np.full((4, 4, 3), i, np.uint8) for i in range(3)]
    features = datasets.Features(
        {"img": datasets.Image(), "label": datasets.ClassLabel(names=["a", "b"])}
    )
    rows = datasets.Dataset.from_dict({"img": pixels, "label": [0, 1, 0]}, features=features)
    made = encode(rows, name="t", label="label", classes=["0", "1"])
    assert np.array_equal(arrays(made)["img"], np.stack(pixels))
    splits = datasets.DatasetDict({"train": rows})
    assert "'train'" in refused(splits).message


TOKENS = [[1, 2, 3], [4, 5, 6]]


@pytest.mark.parametrize(
    "source",
    [
        pd.DataFrame({"t": TOKENS}),
        pd.DataFrame({"t": [np.array(r) for r in TOKENS]}),
        pl.DataFrame({"t": TOKENS}),
        pl.DataFrame({"t": TOKENS}, schema={"t": pl.Array(pl.Int64, 3)}),
        pa.table({"t": TOKENS}),
        pa.table({"t": pa.array(TOKENS, pa.list_(pa.int32(), 3))}),
        pa.table({"t": pa.array([[9], *TOKENS][1:], pa.large_list(pa.int64()))}),
        pa.table({"t": pa.array([[0, 0, 0], *TOKENS], pa.list_(pa.int32(), 3))}).slice(1),
        {"t": TOKENS},
        Rows([{"t": r} for r in TOKENS]),
    ],
)
def test_lists_of_equal_length_become_an_axis(source):
    made = encode(source, name="t", bounds=(0, 9))
    assert made.schema.columns[0].shape == (3,)
    assert arrays(made)["t"].tolist() == TOKENS


RAGGED = [[1, 2, 3], [4, 5]]


@pytest.mark.parametrize(
    "source",
    [
        pd.DataFrame({"t": RAGGED}),
        pl.DataFrame({"t": RAGGED}),
        pa.table({"t": RAGGED}),
        Rows([{"t": r} for r in RAGGED]),
    ],
)
def test_lists_of_unequal_length_are_refused(source):
    error = refused(source, bounds=(0, 9))
    assert error.code == "data.shape" and "row 2" in error.message


@pytest.mark.parametrize(
    ("source", "code", "words"),
    [
        (pd.DataFrame({"x": [1.0, np.nan]}), "data.not-finite", "'x', row 2"),
        (pd.DataFrame({"x": [1.0, np.inf]}), "data.not-finite", "'x', row 2"),
        (pd.DataFrame({"x": [1, None]}, dtype="Int64"), "data.missing-value", "'x', row 2"),
        (pd.DataFrame({"x": ["a", None]}), "data.missing-value", "'x', row 2"),
        (pd.DataFrame({"x": ["a", "b"]}), "data.dtype", "'x' holds text"),
        (pd.DataFrame({"x": pd.to_datetime(["2020-01-01"])}), "data.dtype", "datetime64"),
        (pd.DataFrame([[1, 2]], columns=["x", "x"]), "data.duplicate-column", "'x'"),
        (pd.DataFrame({"x": [1, 11]}), "data.out-of-bounds", "'x', row 2: 11"),
        (pd.DataFrame({"x": []}, dtype=float), "data.empty", "no rows"),
        (pd.DataFrame(), "data.empty", ""),
        (pd.Series([1]), "data.source", "Series"),
        (pl.DataFrame({"x": [1, None]}), "data.missing-value", "'x', row 2"),
        (pl.DataFrame({"x": [1.0, float("nan")]}), "data.not-finite", "'x', row 2"),
        (pl.LazyFrame({"x": [1]}), "data.source", "LazyFrame"),
        (pl.DataFrame({"x": [{"a": 1}]}), "data.dtype", "'x' holds Struct"),
        (pl.DataFrame({"x": [2**100]}, {"x": pl.Int128}), "data.dtype", "'x' holds Int128"),
        (pa.table({"x": [1, 2, None]}), "data.missing-value", "'x', row 3"),
        (pa.table({"x": [[1, 2], [3, None]]}), "data.missing-value", "'x'"),
        (pa.table([[1], [2]], names=["x", "x"]), "data.duplicate-column", "'x'"),
        (pa.table({"x": [{"a": 1}]}), "data.dtype", "'x'"),
        (pa.table({"x": [b"raw"]}), "data.dtype", "'x'"),
        ({"x": np.array([1 + 2j])}, "data.dtype", "complex"),
        ({"x": np.ma.array([1.0, 2.0], mask=[False, True])}, "data.missing-value", "'x', row 2"),
        ({"x": [1, 2], "y": [1]}, "data.rows-differ", "x: 2, y: 1"),
        ({"x": [[1, 2], [3]]}, "data.shape", "'x'"),
        ({"x": 1}, "data.shape", "'x'"),
        ({"x": np.zeros((2, 0))}, "data.shape", "'x'"),
        ({1: [1], "1": [1]}, "data.duplicate-column", "'1'"),
        ({}, "data.empty", ""),
        ((np.array([[0.5, 2], [0.5, 99]]), [0, 0]), "data.out-of-bounds", "'x', row 2: 99"),
        (Rows([{"x": 1}, {"z": 1}]), "data.rows-differ", "Row 2"),
        (Rows([]), "data.empty", ""),
        (b"bytes", "data.source", "bytes"),
        (iter([1]), "data.source", "iterator"),
        (5, "data.source", "int"),
        (None, "data.source", "None"),
    ],
)
def test_faults_of_sources(source, code, words):
    label = {"label": "y", "classes": 2} if isinstance(source, tuple) else {}
    error = refused(source, bounds={"*": (0, 10)}, **label)
    assert error.code == code and words in error.message and error.mend


def test_a_label_is_no_unit():
    table = {"x": [0.1, 0.2], "y": [0, 1]}
    error = refused(table, label="y", unit="y", classes=2, bounds={"x": (0, 1)})
    assert (error.code, error.where) == ("data.schema", "y")


def test_a_fault_in_a_later_block_names_its_row(tmp_path):
    x = np.zeros(ROWS)
    x[9000] = np.nan
    frame = pd.DataFrame({"x": x})
    path = parquet_file(frame, tmp_path / "t.parquet")
    for source in (frame, pa.table(frame), path, Rows([{"x": v} for v in x])):
        assert "row 9001" in refused(source, bounds=(0, 1)).message


def test_a_broken_parquet_file(tmp_path):
    path = parquet_file(FRAME, tmp_path / "t.parquet")
    whole = path.read_bytes()
    for broken in (b"", b"PAR1", whole[: len(whole) // 2], b"x" * 100):
        path.write_bytes(broken)
        assert refused(path, bounds=(0, 1)).code == "data.parquet-form"


def test_templates_name_columns_and_look_at_no_value():
    text = template(FRAME, name="n", label="sick", unit="who")
    assert 'unit = "who"' in text and "[columns.who]" not in text
    assert '[columns."age"]' in text and "classes" in text
    assert template(FRAME.iloc[::-1], name="n", label="sick", unit="who") == text
