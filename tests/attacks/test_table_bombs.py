"""Tables made to take an owner's machine, or to smuggle something past what is declared: bombs in
Parquet, Arrow, CSV and images, types that run code or say one thing and hold another, bounds that
let a label out of range through.

Whoever hands an owner a file is the attacker here. An owner's machine is where tables are parsed;
the enclave takes the wire form alone.
"""

from __future__ import annotations

import io
import os
import pickle
import resource
import struct
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from casemate.client import data
from casemate.client.data import arrow, encode, load_schema
from casemate.spec import table, tensors
from casemate.spec.data import Column, DatasetSchema
from casemate.spec.errors import CasemateError
from casemate.worker import dataset

MIB = 1 << 10  # in KiB, as the kernel counts


def refused(source: Any, *codes: str, bounds: Any = (0.0, 1.0), **more: Any) -> CasemateError:
    """Refused with one of ``codes``, without taking half a gigabyte."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(CasemateError) as e:
        encode(source, name="t", bounds=bounds, **more)
    assert e.value.code in codes, str(e.value)
    assert e.value.mend
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 512 * MIB
    return e.value


def parquet(path: Path, table_: pa.Table, times: int = 1, **how: Any) -> Path:
    with pq.ParquetWriter(path, table_.schema, compression="zstd", **how) as writer:
        for _ in range(times):
            writer.write_table(table_)
    return path


# Files that unfold.


def test_fills_the_machine_by_a_column_that_repeats(tmp_path: Path) -> None:
    """A few kilobytes of Parquet for more than a gigabyte of rows."""
    part = pa.table({"x": pa.array(np.zeros(1_000_000))})
    bomb = parquet(tmp_path / "bomb.parquet", part, 160)
    assert bomb.stat().st_size < 1 << 20
    error = refused(bomb, "data.too-large")
    assert "bomb.parquet" in error.message


def test_fills_the_machine_by_one_word_that_repeats(tmp_path: Path) -> None:
    """A word of a megabyte, a hundred thousand times: 695 bytes of Parquet, 100 GB of text."""
    word = pa.DictionaryArray.from_arrays(
        pa.array(np.zeros(100_000, "i4")), pa.array(["A" * 10**6])
    )
    bomb = parquet(tmp_path / "bomb.parquet", pa.table({"x": word}))
    assert bomb.stat().st_size < 1024
    refused(bomb, "data.unknown-class", bounds=None, classes={"x": ["a", "b"]})
    refused(pa.table({"x": word}), "data.unknown-class", bounds=None, classes={"x": ["a"]})


WORD = "A" * 50_000
WORDS = {
    "long words": lambda: pa.array([WORD] * 4096, pa.large_string()),
    "views": lambda: pa.array([WORD] * 4096, pa.string_view()),
    "octets": lambda: pa.array([WORD.encode()] * 4096, pa.large_binary()),
    "octets of one length": lambda: pa.array([WORD.encode()] * 4096, pa.binary(len(WORD))),
    "words in lists": lambda: pa.FixedSizeListArray.from_arrays(pa.array([WORD] * 4096), 1),
    "words of a known extension": lambda: pa.ExtensionArray.from_storage(
        pa.json_(pa.large_string()), pa.array([WORD] * 4096, pa.large_string())
    ),
}


# In a process of its own, for here the bomb was made.
PUSHES = """
import re, sys
from pathlib import Path
from casemate.client.data import encode
from casemate.spec.errors import CasemateError

def most():
    return int(re.search(r"VmHWM:\\s*(\\d+)", Path("/proc/self/status").read_text())[1])

import pyarrow.parquet
before = most()
try:
    encode(sys.argv[1], name="t", classes={"x": ["a"]})
except CasemateError as e:
    print(e.code, most() - before)
"""


@pytest.mark.parametrize("what", WORDS)
def test_fills_the_machine_by_one_word_of_another_kind(tmp_path: Path, what: str) -> None:
    """Less than a kilobyte of Parquet, of which Arrow makes 200 MB for one block of rows."""
    path = tmp_path / "t.parquet"
    parquet(path, pa.table({"x": WORDS[what]()}), dictionary_pagesize_limit=1 << 30)
    assert path.stat().st_size < 1024
    out = subprocess.run([sys.executable, "-c", PUSHES, path], capture_output=True, text=True)
    code, kib = out.stdout.split()
    assert code in ("data.dtype", "data.unknown-class")
    assert int(kib) < 100 * MIB


def test_fills_the_machine_by_a_list_that_is_kept_once() -> None:
    """Indices into a dictionary of lists: each would be written out."""
    lists = pa.FixedSizeListArray.from_arrays(pa.array(np.zeros(2**20, "f4")), 2**20)
    made = pa.DictionaryArray.from_arrays(pa.array(np.zeros(4096, "i4")), lists)
    refused(pa.table({"x": made}), "data.dtype")


MANY = 2**27
NOTHINGS = {
    "missing values in lists of one length": lambda: pa.Array.from_buffers(
        pa.list_(pa.null(), MANY), 1, [None],
        children=[pa.Array.from_buffers(pa.null(), MANY, [None])],
    ),
    "missing values in lists": lambda: pa.Array.from_buffers(
        pa.list_(pa.null()), 1, [None, pa.py_buffer(struct.pack("<ii", 0, MANY))],
        children=[pa.Array.from_buffers(pa.null(), MANY, [None])],
    ),
    "lists of no length": lambda: pa.Array.from_buffers(
        pa.list_(pa.list_(pa.float64(), 0), MANY), 1, [None],
        children=[
            pa.Array.from_buffers(
                pa.list_(pa.float64(), 0), MANY, [None], children=[pa.array([], pa.float64())]
            )
        ],
    ),
}  # fmt: skip


@pytest.mark.parametrize("what", NOTHINGS)
def test_fills_the_machine_by_what_takes_no_memory_in_arrow(what: str) -> None:
    """A list of Python's was made of them: 16 GB and a minute for two rows."""
    refused(pa.table({"x": NOTHINGS[what]()}), "data.missing-value", "data.shape")


def test_fills_the_machine_by_views_of_one_word() -> None:
    refused(pa.table({"x": pa.array(["a"], pa.string_view())}), "data.dtype")


def test_fills_the_machine_by_lists_that_repeat(tmp_path: Path) -> None:
    lists = pa.FixedSizeListArray.from_arrays(pa.array(np.zeros(2**22, "i1")), 2**22)
    bomb = parquet(tmp_path / "bomb.parquet", pa.table({"x": lists}), 64, write_statistics=False)
    assert bomb.stat().st_size < 1 << 17
    refused(bomb, "data.too-large")


def test_what_repeats_but_is_small_is_no_bomb(tmp_path: Path) -> None:
    plain = pa.table({"x": pa.array(np.zeros(50_000)), "y": pa.array(["yes"] * 50_000)})
    made = encode(
        parquet(tmp_path / "t.parquet", plain), name="t", label="y", bounds=(0.0, 1.0),
        classes=["no", "yes"],
    )  # fmt: skip
    assert made.schema.rows == 50_000
    assert tensors.load(b"".join(made.chunks()))["y"][1][:8] == struct.pack("<q", 1)


def test_the_limit_is_what_refuses_the_bomb(tmp_path: Path, monkeypatch: Any) -> None:
    """Seeded bug: without it a smaller bomb is unfolded."""
    monkeypatch.setattr(arrow, "MAX_UNFOLDED", 1 << 10)
    part = pa.table({"x": pa.array(np.zeros(200_000))})
    bomb = parquet(tmp_path / "bomb.parquet", part, 4)
    refused(bomb, "data.too-large")
    monkeypatch.setattr(arrow, "MAX_RATIO", 1 << 40)
    assert encode(bomb, name="t", bounds=(0.0, 1.0)).schema.rows == 800_000


@pytest.mark.parametrize("name", ["t.csv.gz", "t.zip", "t.xlsx", "t.npz", "t.npy", "t.pkl", "t.pt"])
def test_archives_are_no_tables(tmp_path: Path, name: str) -> None:
    """A zip bomb, or a pickle: not even opened."""
    path = tmp_path / name
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as z:
        z.writestr("t.csv", "x\n" + "1\n" * 10**6)
    refused(path, "data.source")


@pytest.mark.parametrize("name", ["t.csv", "t.parquet"])
def test_an_archive_by_another_name_is_no_table(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as z:
        z.writestr("t.csv", "x\n" + "1\n" * 10**6)
    refused(path, "data.csv-encoding", "data.csv-header", "data.parquet-form", "data.csv-form")


@pytest.mark.parametrize("name", ["t.csv", "t.parquet"])
def test_waits_for_ever_on_a_pipe_or_a_device(tmp_path: Path, name: str) -> None:
    os.mkfifo(tmp_path / name)
    refused(tmp_path / name, "data.source")
    (tmp_path / f"d.{name}").symlink_to("/dev/zero")
    refused(tmp_path / f"d.{name}", "data.source")


@pytest.mark.parametrize("at", [0, 0.5, 0.99])
def test_a_footer_that_lies_is_refused(tmp_path: Path, at: float) -> None:
    """Lengths of a Parquet file set to as much as fits; cut and torn files."""
    good = parquet(tmp_path / "good.parquet", pa.table({"x": pa.array(np.linspace(0, 1, 100))}))
    raw = good.read_bytes()
    huge = raw[:-8] + struct.pack("<I", 2**31 - 1) + b"PAR1"
    for bad in (huge, raw[: int(len(raw) * at)], raw[:-8] + struct.pack("<I", 4) + b"PAR1"):
        (tmp_path / "bad.parquet").write_bytes(bad)
        refused(tmp_path / "bad.parquet", "data.parquet-form")


# Images.


def images(*raw: bytes | str) -> Any:
    datasets = pytest.importorskip("datasets")
    rows = [
        {"bytes": r, "path": None} if isinstance(r, bytes) else {"bytes": None, "path": r}
        for r in raw
    ]
    return datasets.Dataset.from_dict({"x": rows}).cast_column("x", datasets.Image())


def test_fills_the_machine_by_an_image_of_one_colour() -> None:
    """48 KB of PNG for 400 million pixels."""
    image = pytest.importorskip("PIL.Image")
    file = io.BytesIO()
    image.new("1", (20_000, 20_000)).save(file, "PNG")
    assert len(file.getvalue()) < 1 << 16
    refused(images(file.getvalue()), "data.undecodable", bounds=(0, 255))


@pytest.mark.parametrize("raw", [b"", b"no image", b"\x89PNG\r\n\x1a\n" + bytes(64), "/etc/passwd"])
def test_what_is_no_image_is_the_rows_fault(raw: bytes | str) -> None:
    pytest.importorskip("PIL.Image")
    error = refused(images(raw), "data.undecodable", "data.missing-value", bounds=(0, 255))
    assert "root:" not in error.message  # nothing of a file that is no image is said


# Arrow's types.


class Evil:
    """What a pickle would run."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return Path.touch, (self.path,)


def test_runs_code_by_an_extension_type(tmp_path: Path) -> None:
    """Arrow once unpickled the parameters of such a type on reading (CVE-2023-47248)."""
    mark = tmp_path / "ran"
    meta = {
        b"ARROW:extension:name": b"arrow.py_extension_type",
        b"ARROW:extension:metadata": pickle.dumps(Evil(mark)),
    }
    field = pa.field("x", pa.float64(), metadata=meta)
    made = pa.Table.from_arrays([pa.array([0.5])], schema=pa.schema([field]))
    path = parquet(tmp_path / "t.parquet", made)
    assert encode(path, name="t", bounds=(0.0, 1.0)).schema.columns[0].dtype == "f32"
    assert not mark.exists()


def test_an_extension_type_says_nothing_about_the_values(tmp_path: Path) -> None:
    """One that claims 2^124 elements is refused; a known one is taken by its storage alone."""
    meta = {
        b"ARROW:extension:name": b"arrow.fixed_shape_tensor",
        b"ARROW:extension:metadata": b'{"shape":[4611686018427387904,4611686018427387904]}',
    }
    field = pa.field("x", pa.list_(pa.float64()), metadata=meta)
    made = pa.Table.from_arrays([pa.array([[0.5]])], schema=pa.schema([field]))
    refused(parquet(tmp_path / "t.parquet", made), "data.parquet-form")
    square = pa.fixed_shape_tensor(pa.float32(), (2, 2))
    storage = pa.FixedSizeListArray.from_arrays(pa.array([0.0, 0.25, 0.5, 1.0], pa.float32()), 4)
    column = pa.ExtensionArray.from_storage(square, storage)
    found = encode(pa.table({"x": column}), name="t", bounds=(0.0, 1.0))
    assert found.schema.columns[0].shape == (4,)


def torn(column: pa.Array, old: bytes, new: bytes) -> pa.Table:
    """A table whose column says of itself what is not so, as Arrow reads it from a stream."""
    sink = pa.BufferOutputStream()
    whole = pa.table({"x": column})
    with pa.ipc.new_stream(sink, whole.schema) as writer:
        writer.write_table(whole)
    raw = sink.getvalue().to_pybytes()
    assert old in raw
    return pa.ipc.open_stream(raw.replace(old, new)).read_all()


def numbers(code: str, *values: int) -> bytes:
    return struct.pack(f"<{len(values)}{code}", *values)


TORN = {
    "words past the end": (["abcdefg", "hijkl"], (0, 7, 12), (0, 1 << 16, 1 << 17)),
    "words far away": (
        ["abcdefg", "hijkl"],
        (0, 7, 12),
        (2 * 10**9, 2 * 10**9 + 7, 2 * 10**9 + 12),
    ),
    "words backwards": (["abcdefg", "hijkl"], (0, 7, 12), (0, 12, 7)),
    "lists past the end": (
        [[1.0] * 3] * 2,
        (0, 3, 6),
        (1 << 20, (1 << 20) + 512, (1 << 20) + 1024),
    ),
}


@pytest.mark.parametrize("what", TORN)
def test_reads_the_owners_memory_by_offsets_past_the_end(what: str) -> None:
    """Arrow would make rows, and errors, of what lies behind the column, or end the process."""
    values, old, new = TORN[what]
    error = refused(
        torn(pa.array(values), numbers("i", *old), numbers("i", *new)), "data.arrow-form",
        bounds=None, classes={"x": ["a"]},
    )  # fmt: skip
    assert "abcdefg" not in error.message


@pytest.mark.parametrize(("old", "new"), [(1000, 1 << 30), (8000, 8)])
def test_reads_the_owners_memory_by_rows_that_are_not_there(old: int, new: int) -> None:
    made = torn(pa.array([0.25] * 1000), numbers("q", old), numbers("q", new))
    refused(made, "data.arrow-form")


def nested(depth: int) -> pa.Table:
    value: Any = 1.0
    kind = pa.float32()
    for _ in range(depth):
        value, kind = [value], pa.list_(kind)
    return pa.table({"x": pa.array([value], kind)})


KINDS = {
    "runs of two thousand million": lambda: pa.RunEndEncodedArray.from_arrays(
        pa.array([2_000_000_000], pa.int32()), pa.array([0.5])
    ),
    "a union": lambda: pa.UnionArray.from_dense(
        pa.array([0], pa.int8()), pa.array([0], pa.int32()), [pa.array([1.0])]
    ),
    "a struct": lambda: pa.array([{"a": 1.0}]),
    "a map": lambda: pa.array([[("a", 1.0)]], pa.map_(pa.string(), pa.float64())),
    "octets": lambda: pa.array([b"\x80\x04"]),
    "nothing at all": lambda: pa.nulls(3),
    "a day": lambda: pa.array([1], pa.timestamp("s")),
    "a word that is not there": lambda: pa.DictionaryArray.from_arrays(
        pa.array([5]), pa.array([1.0]), safe=False
    ),
    "a word before the first": lambda: pa.DictionaryArray.from_arrays(
        pa.array([-1]), pa.array([1.0]), safe=False
    ),
}


@pytest.mark.parametrize("what", KINDS)
def test_types_without_a_wire_form_are_refused(what: str) -> None:
    made = pa.Table.from_arrays([KINDS[what]()], names=["x"])
    refused(made, "data.dtype", "data.missing-value", "data.arrow-form")


@pytest.mark.parametrize("depth", [7, 65, 500])
def test_runs_out_of_stack_by_lists_in_lists(depth: int) -> None:
    refused(nested(depth), "data.shape")


# CSV and the declaration.


def csv(path: Path, *lines: str) -> Path:
    path.write_text("".join(f"{line}\n" for line in lines))
    return path


def test_takes_hours_by_a_header_of_many_names(tmp_path: Path) -> None:
    """Names are compared once, not each with each."""
    names = ",".join(f"c{i}" for i in range(40_000))
    refused(csv(tmp_path / "t.csv", names, ",".join(["1"] * 40_000)), "data.schema")
    refused(csv(tmp_path / "u.csv", names + ",c7", "1"), "data.duplicate-column")


ROWS = {
    "a cell of 50 MB": ("x", '"' + "1" * 50_000_000 + '"'),
    "a number of 100,000 digits": ("x", "1" * 100_000),
    "an exponent past all": ("x", "1e999999999"),
    "a hexadecimal": ("x", "0x1p-1"),
    "full-width digits": ("x", "\uff11"),
    "Arabic digits": ("x", "\u0661"),
    "digits with underscores": ("x", "0_1"),
    "a number in words": ("x", "infinity"),
    "a quiet NaN": ("x", "-nan"),
    "a nul": ("x", "0\0"),
    "a quote that is never closed": ("x", '"1', "1"),
    "millions of empty lines": ("x", *[""] * 10**6, "1"),
}


@pytest.mark.parametrize("what", ROWS)
def test_cells_that_are_no_plain_numbers_are_refused(tmp_path: Path, what: str) -> None:
    refused(
        csv(tmp_path / "t.csv", *ROWS[what]),
        "data.not-a-number", "data.not-finite", "data.csv-form", "data.csv-ragged",
    )  # fmt: skip


DEEP = {
    "lists in lists": "a = " + "[" * 100_000,
    "tables in tables": "[" + ".".join(["a"] * 3_000) + "]",
    "inline tables": "a = " + "{a = " * 5_000,
    "a number of 10,000 digits": "units = " + "9" * 10_000,
    "no UTF-8": "name = '\udc80'",
}


@pytest.mark.parametrize("what", DEEP)
def test_a_schema_file_that_is_deep_is_no_fault_of_casemate(tmp_path: Path, what: str) -> None:
    path = tmp_path / "t.toml"
    path.write_text(DEEP[what], errors="surrogateescape")
    with pytest.raises(CasemateError) as e:
        load_schema(path)
    assert e.value.code == "data.schema"


# The wire form, whatever the client: the worker's rules.


def column(dtype: Any, low: Any, high: Any) -> DatasetSchema:
    return DatasetSchema(
        name="t", columns=(Column(name="x", dtype=dtype, low=low, high=high),), rows=2, units=2
    )


def wire(dtype: str, *values: float) -> bytes:
    code = {"u8": "B", "i32": "i", "i64": "q", "f32": "f"}[dtype]
    return tensors.dump({"x": (dtype, (2,), struct.pack(f"<2{code}", *values))})


def both(schema: DatasetSchema, raw: bytes) -> set[str]:
    """What the shared rules, and the worker over torch, say of a wire form."""
    said = set()
    loaded = {n: torch.frombuffer(bytearray(v), dtype=dataset._DTYPES[t.dtype]).reshape(t.shape)
              for n, (t, v) in tensors.load(raw).items()}  # fmt: skip
    for check in (lambda: table.check(schema, raw), lambda: dataset.check(schema, loaded)):
        try:
            check()
            said.add("")
        except CasemateError as e:
            said.add(e.code)
    return said


BOUNDS = {
    "a label one past a float": (column("i64", 0, 2.0**24), wire("i64", 0, 2**24 + 1)),
    "a label 64 past": (column("i64", 0, 2.0**30), wire("i64", 0, 2**30 + 64)),
    "a label past one that no float holds": (column("i64", 0, 2**53 - 1), wire("i64", 0, 2**53)),
    "a float one step past": (column("f32", 0.0, 0.1), wire("f32", 0.0, np.float32(0.1))),
    "bytes that can be more than a byte": (column("u8", 0, 300), wire("u8", 0, 255)),
    "whole numbers to infinity, nearly": (column("i64", 0, 1e300), wire("i64", 0, 1)),
    "floats that float32 does not hold": (column("f32", 0.0, 1e300), wire("f32", 0.0, 1.0)),
}  # fmt: skip


@pytest.mark.parametrize("what", BOUNDS)
def test_steals_a_row_by_a_label_just_past_its_bound(what: str) -> None:
    """An index of a lookup is proved in range by the declared bounds: a value past them would be an
    error on that row alone. torch compares whole numbers with a float in float32."""
    schema, raw = BOUNDS[what]
    assert both(schema, raw) == {"data.bounds"}


def test_the_comparison_of_torch_would_let_it_through() -> None:
    assert bool((torch.tensor([2**24 + 1]) <= 2.0**24).all())
    assert both(column("i64", 0, 2.0**24), wire("i64", 0, 2**24)) == {""}


NAMES = {
    "a space behind": "age ",
    "a space before": " age",
    "two spaces": "a  ge",
}


@pytest.mark.parametrize("what", NAMES)
def test_hides_a_column_behind_spaces(what: str) -> None:
    columns = (Column(name="age", dtype="bool"), Column(name=NAMES[what], dtype="bool"))
    schema = DatasetSchema(name="t", columns=columns, rows=1, units=1)
    raw = tensors.dump({c.name: ("bool", (1,), b"\1") for c in columns})
    assert both(schema, raw) == {"data.column"}
    with pytest.raises(CasemateError) as e:
        data.encode({"age": np.array([True]), NAMES[what]: np.array([True])}, name="t")
    assert e.value.code == "data.column"


@pytest.mark.parametrize(
    "name",
    [
        "St. M\u0430ry", "\u0391nna", "caf\u0065\u0301", "\uff21nna", "St.  Mary", "Mary ",
        "\u212bngstrom",
    ],
)  # fmt: skip
def test_poses_as_another_dataset_by_a_name(name: str) -> None:
    schema = DatasetSchema(name=name, columns=(Column(name="x", dtype="bool"),), rows=1, units=1)
    assert both(schema, tensors.dump({"x": ("bool", (1,), b"\1")})) == {"data.name"}


@pytest.mark.parametrize(
    "name", ["St. Mary", "Hôpital Nord", "Больница 7", "東京病院 (Tokyo)", "Νοσοκομείο Athens 2"]
)
def test_names_of_many_languages_are_admitted(name: str) -> None:
    schema = DatasetSchema(name=name, columns=(Column(name="x", dtype="bool"),), rows=1, units=1)
    assert both(schema, tensors.dump({"x": ("bool", (1,), b"\1")})) == {""}
