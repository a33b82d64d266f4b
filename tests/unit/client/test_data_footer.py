"""The sizes in a Parquet footer, read as pyarrow reads those of a file that is well formed."""

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from casemate.client.data import encode, footer
from casemate.spec.errors import DataError

TABLES = {
    "plain": pa.table({"x": np.arange(1000.0), "y": np.arange(1000)}),
    "nested": pa.table({"x": pa.array([[1.0, 2.0], [], [3.0]]), "s": pa.array([{"a": 1}] * 3)}),
    "words": pa.table({"w": pa.array(["a", "b"] * 500), "é": pa.array([None, 1] * 500)}),
    "many": pa.table({f"c{i}": np.zeros(40) for i in range(60)}),
    "none": pa.table({"x": pa.array([], pa.float32())}),
}


@pytest.mark.parametrize("how", [{}, {"row_group_size": 7}, {"compression": "zstd"}])
@pytest.mark.parametrize("name", TABLES)
def test_what_pyarrow_says(tmp_path: Path, name: str, how: dict[str, object]) -> None:
    pq.write_table(TABLES[name], path := tmp_path / "t.parquet", **how)
    said = pq.read_metadata(path)
    groups = [said.row_group(i) for i in range(said.num_row_groups)]
    columns = [g.column(i) for g in groups for i in range(g.num_columns)]
    wanted = sum(max(8 * c.num_values, c.total_uncompressed_size) for c in columns)
    assert footer.unfolded(path) == wanted


@pytest.mark.parametrize(
    "raw",
    [b"", b"PAR1", b"\x00" * 40, b"\x2c" * 30 + b"\x1e\0\0\0PAR1", b"\x19" * 30 + b"\x1e\0\0\0PAR1",
     b"\x4c\xff\xff" + bytes(9) + b"\x0c\0\0\0PAR1", b"\x46" + b"\xff" * 20 + b"\x15\0\0\0PAR1"],
)  # fmt: skip
def test_no_footer(tmp_path: Path, raw: bytes) -> None:
    (path := tmp_path / "t.parquet").write_bytes(raw)
    with pytest.raises(footer.FooterError):
        footer.unfolded(path)


def test_statistics_that_end_pyarrows_process_are_not_asked_for(tmp_path: Path) -> None:
    """SizeStatistics whose field is another list: pyarrow calls abort(3) where it is asked for such
    a column's metadata. Here each such file is read, or refused."""
    column = pa.array([1.0, 2.0], pa.float32())
    pq.write_table(pa.table({"x": column}), path := tmp_path / "t.parquet")
    raw = path.read_bytes()
    start = len(raw) - 8 - int.from_bytes(raw[-8:-4], "little")
    for at in (i for i in range(start, len(raw) - 8) if raw[i] == 0x29):
        path.write_bytes(raw[:at] + b"\x19" + raw[at + 1 :])
        try:
            assert encode(path, name="t", bounds=(0.0, 4.0)).schema.rows == 2
        except DataError as e:
            assert e.code == "data.parquet-form"


def test_names_that_are_not_utf_8_are_refused(tmp_path: Path) -> None:
    made = pa.table({"name": pa.array([1.0])})
    pq.write_table(made, path := tmp_path / "t.parquet", store_schema=False)
    path.write_bytes(path.read_bytes().replace(b"name", b"n\xffme"))
    with pytest.raises(DataError) as e:
        encode(path, name="t", bounds=(0.0, 4.0))
    assert e.value.code == "data.parquet-form"
    with pa.ipc.new_stream(sink := pa.BufferOutputStream(), made.schema) as out:
        out.write_table(made)
    raw = sink.getvalue().to_pybytes().replace(b"name", b"n\xffme")
    with pytest.raises(DataError) as e:
        encode(pa.ipc.open_stream(raw).read_all(), name="t", bounds=(0.0, 4.0))
    assert e.value.code == "data.schema"
