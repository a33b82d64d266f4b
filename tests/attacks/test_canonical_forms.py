"""One value, one sequence of bytes: whoever can write the same thing twice differently can have one
thing approved and another one run. And what is refused is refused on one's own machine with the
code that the enclave gives, before anything is sent.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import re
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from casemate.cli.main import main
from casemate.engine import prepare as prepare_
from casemate.graph import check, pack
from casemate.graph.model import Graph, InputSpec, Node, Size
from casemate.server.app import _decode
from casemate.spec import canonical, codec, tensors
from casemate.spec.data import Column, DatasetSchema, Registration
from casemate.spec.errors import CasemateError, FormatError, ModelError
from casemate.worker import dataset
from support import engine_lab as lab
from support.rawgraph import INPUTS, graph, infos, ls, node, r, weight

GRAPH, WEIGHTS = lab.mlp([4, 3, 2])
SCHEMA = lab.schema(4, 2, 16)
TEXT = codec.encode(GRAPH)
FILE = tensors.dump({n: ("f32", tuple(t.shape), t.numpy().tobytes()) for n, t in WEIGHTS.items()})


def model(text: bytes = TEXT, file: bytes = FILE, pad: bytes = b" ") -> bytes:
    text += pad * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text + file


def refused(data: bytes, *codes: str) -> None:
    with pytest.raises(CasemateError) as e:
        graph_, weights = pack.unpack(data)
        check.check(graph_, {n: t for n, (t, _) in weights.items()})
    assert e.value.code in codes, str(e.value)


def test_the_one_form_is_admitted() -> None:
    graph_, weights = pack.unpack(model())
    check.check(graph_, {n: t for n, (t, _) in weights.items()})


# The graph's JSON.

LOSS = b'"loss":"loss"'
JSON = {
    "a key twice, the same": (LOSS, LOSS + b"," + LOSS, "format.duplicate-key"),
    "a key twice, another": (LOSS, b'"loss":"h0",' + LOSS, "format.duplicate-key"),
    "a key twice by an escape": (LOSS, LOSS + b',"l\\u006fss":"h0"', "format.duplicate-key"),
    "a key by an escape": (b'"loss"', b'"l\\u006fss"', "format.not-canonical"),
    "a space": (LOSS, b'"loss": "loss"', "format.not-canonical"),
    "a field by another name": (b'"args":[', b'"aargs":[', "format.field"),
    "a whole number as a float": (b'"c":0', b'"c":0.0', "format.field"),
    "minus nothing": (b'"c":0', b'"c":-0', "format.not-canonical"),
    "an exponent": (b'"c":0', b'"c":0e0', "format.not-canonical"),
    "a leading zero": (b'"c":0', b'"c":00', "format.json"),
    "past 2^53": (b'"c":0', b'"c":9007199254740993', "format.number"),
    "a truth for a number": (b'"c":0', b'"c":false', "format.field"),
    "no number": (b'"c":0', b'"c":NaN', "format.number"),
    "infinity": (b'"c":0', b'"c":1e999', "format.number"),
    "null": (b'"c":0', b'"c":null', "format.field"),
    "a Cyrillic key": (b'"loss"', '"l\u043ess"'.encode(), "format.field"),
    "a type of another version": (b'"node/v1"', b'"node/v2"', "format.version"),
    "an unknown type": (b'"ref/v1"', b'"code/v1"', "format.field"),
    "a field of nobody": (LOSS, LOSS + b',"module":"os"', "format.field"),
}  # fmt: skip


@pytest.mark.parametrize("what", JSON)
def test_says_two_things_by_one_graph(what: str) -> None:
    old, new, code = JSON[what]
    assert old in TEXT
    refused(model(TEXT.replace(old, new, 1)), code, "format.not-canonical")


def test_json_by_the_depth(monkeypatch: pytest.MonkeyPatch) -> None:
    for depth in (65, 1_000, 100_000):
        refused(model(b'{"a":' * depth + b"1" + b"}" * depth), "format.too-deep")
        refused(model(b"[" * depth + b"]" * depth), "format.too-deep")
    refused(model(b"[" * 64 + b"]" * 64), "format.field")


def test_holds_the_event_loop_by_a_body_of_many_values() -> None:
    """What a body costs is bounded before it is read, and before anybody has signed."""
    flood = b"[" + b",".join([b"{}"] * 100_000) + b"]"
    for form in (Registration, {"size": int}):
        with pytest.raises(FormatError) as e:
            _decode(form, flood, 4 << 20)
        assert e.value.code == "format.too-large"
    columns = tuple(Column(name=f"c{i}", dtype="f32", low=0, high=1) for i in range(4096))
    widest = codec.encode(DatasetSchema(name="t", columns=columns, rows=1, units=1))
    assert _decode(DatasetSchema, widest, 4 << 20).columns == columns


# The bytes around it.

PACKS = {
    "nothing": b"",
    "a length and no more": struct.pack("<Q", 8),
    "a length past the end": struct.pack("<Q", 1 << 20) + model()[8:],
    "a length past all": b"\xff" * 8 + model()[8:],
    "a length that is no multiple of 8": struct.pack("<Q", 9) + model()[8:],
    "eight spaces more": model(TEXT + b" " * 8),
    "padded by nul": model(pad=b"\0"),
    "padded by lines": model(pad=b"\n"),
    "bytes behind the last tensor": model() + b"\0",
    "two models": model() + model(),
    "no weights": model(file=b""),
}


@pytest.mark.parametrize("what", PACKS)
def test_hides_bytes_in_a_packed_model(what: str) -> None:
    refused(
        PACKS[what], "format.model", "format.safetensors", "format.json", "format.not-canonical"
    )


def header(change: Callable[[dict[str, Any]], Any], more: int = 0) -> bytes:
    """The weights with another header, and ``more`` bytes."""
    size = int.from_bytes(FILE[:8], "little")
    tree = json.loads(FILE[8 : 8 + size])
    change(tree)
    text = canonical.encode(tree)
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text + FILE[8 + size :] + bytes(more)


def offsets(name: str, *at: Any) -> Callable[[dict[str, Any]], None]:
    return lambda tree: tree[name].update(data_offsets=list(at))


# b0: 12 bytes, b1: 8, w0: 48, w1: 24.
HEADERS = {
    "two tensors of the same bytes": (offsets("b1", 0, 8), 0),
    "one inside the other": (offsets("b1", 4, 12), 0),
    "a gap": (offsets("b1", 16, 24), 8),
    "from the end": (offsets("b1", -8, 0), 0),
    "backwards": (offsets("b0", 12, 0), 0),
    "in another order": (lambda t: (offsets("b0", 8, 20)(t), offsets("b1", 0, 8)(t)), 0),
    "longer than its shape": (offsets("b0", 0, 16), 4),
    "a shape of nothing with bytes": (lambda t: t["b0"].update(shape=[0]), 0),
    "a shape past 2^64": (lambda t: t["b0"].update(shape=[2**39, 2**39]), 0),
    "metadata": (lambda t: t.update(__metadata__={"format": "pt"}), 0),
    "a tensor of no input": (
        lambda t: t.update(z={"dtype": "F32", "shape": [0], "data_offsets": [92, 92]}), 0),
    "half precision": (lambda t: t["b0"].update(dtype="F16", shape=[6]), 0),
    "a name with a nul": (lambda t: t.update({"b0\0": t.pop("b0")}), 0),
    "a name in other letters": (lambda t: t.update({"b\uff10": t.pop("b0")}), 0),
}  # fmt: skip


@pytest.mark.parametrize("what", HEADERS)
def test_hides_bytes_between_tensors(what: str) -> None:
    change, more = HEADERS[what]
    refused(model(file=header(change, more)), "format.safetensors", "model.form")


def test_a_header_longer_than_allowed(monkeypatch: pytest.MonkeyPatch) -> None:
    for length in (tensors.MAX_HEADER + 8, 2**63):
        refused(model(file=length.to_bytes(8, "little") + bytes(64)), "format.safetensors")
    monkeypatch.setattr(tensors, "MAX_TENSORS", 3)
    refused(model(), "format.safetensors")


# Names.

TWINS = [
    "x\u0430", "\u0445", "x\u200b", "\uff58", "x ", " x", "x.y", "x-y", "", "1x", "x\n",
    "__class__.x", "x" * 513,
]  # fmt: skip


@pytest.mark.parametrize("name", TWINS)
def test_a_node_or_input_poses_as_another_by_its_name(name: str) -> None:
    bad = dataclasses.replace(node("n", "relu.default", r("x")), name=name)
    with pytest.raises(ModelError) as e:
        check.check(g := graph(bad), infos(g))
    assert e.value.code == "model.form"
    extra = dataclasses.replace(weight("w9", 1), name=name)
    with pytest.raises(ModelError) as e:
        check.check(g := graph(inputs=(*INPUTS, extra)), infos(g))
    assert e.value.code == "model.form"


@pytest.mark.parametrize("tensor", ["w ", " w", "w  9"])
def test_a_tensor_poses_as_another_by_spaces(tensor: str) -> None:
    extra = dataclasses.replace(weight("w9", 1), tensor=tensor)
    with pytest.raises(ModelError) as e:
        check.check(g := graph(inputs=(*INPUTS, extra)), infos(g))
    assert (e.value.code, e.value.where) == ("model.form", "w9")


def test_a_node_takes_the_name_of_another_value() -> None:
    """``a.1`` is the second output of ``a``: no name may be written so, nor twice."""
    for nodes in (
        [node("a", "relu.default", r("x")), node("a", "neg.default", r("x"))],
        [node("x", "relu.default", r("x"))],
        [node("w", "relu.default", r("x"))],
        [node("a", "max.dim", r("x"), 1), node("a.1", "relu.default", r("x"))],
    ):
        with pytest.raises(ModelError) as e:
            check.check(g := graph(*nodes), infos(g))
        assert e.value.code == "model.form"


OPS = [
    "aten.relu", "aten.relu.Default", "ATEN.relu.default", "aten.relu.default ", "aten::relu",
    "aten.r\u0435lu.default", "torch.ops.aten.relu.default", "prims.relu.default",
    "aten.from_file.default", "aten._from_file.default", "evil.relu.default", "os.system.default",
    "aten.__getattr__.default", "aten.relu_.default", "aten.relu.out", "aten.set_.source_Storage",
    "aten.data.default", "aten.record_stream.default", "quantized.linear.default",
    "torch_cluster.knn.default", "profiler._record_function_enter.default",
    "inductor._alloc_from_pool.default",
    "aten._cuda_getCurrentRawStream.default", "higher_order.cond", "aten.to.device", "",
]  # fmt: skip


@pytest.mark.parametrize("op", OPS)
def test_calls_code_of_its_own_by_the_name_of_an_op(op: str) -> None:
    """Nothing but the table's names is an op; a name is looked up, never resolved in torch."""
    bad = Node(name="bad", op=op, args=(r("x"),), kwargs={})
    with pytest.raises(ModelError) as e:
        check.check(g := graph(bad), infos(g))
    assert e.value.code.startswith("model.")
    assert e.value.where == "bad"
    assert e.value.mend


# The same codes here and there.


def said_here(capsys: Any, *arguments: str) -> tuple[int, str, str]:
    """Exit code, error code and place of a command with ``--format json``."""
    with pytest.raises(SystemExit) as e:
        main([*arguments, "--format", "json"])
    out, err = capsys.readouterr()
    if e.value.code == 0:
        assert json.loads(out)
        return 0, "", ""
    error = json.loads(err)["error"]
    assert re.match(r"[a-z]+\.[a-z0-9-]+\Z", error["code"])
    assert error["mend"]
    return int(str(e.value.code)), error["code"], error["where"]


def said_by_the_worker(data: bytes) -> tuple[int, str, str]:
    try:
        prepare_.prepare(
            data, "sha256:" + hashlib.sha256(data).hexdigest(), (SCHEMA,), lab.BINDINGS,
            lab.spec_of(4, 1), 8 << 30,
        )  # fmt: skip
    except CasemateError as e:
        return e.exit_code, e.code, e.where
    return 0, "", ""


def with_nodes(*nodes: Node, inputs: tuple[InputSpec, ...] = (), **more: Any) -> bytes:
    made = Graph(inputs=(*GRAPH.inputs, *inputs), nodes=(*nodes, *GRAPH.nodes), loss="loss")
    return lab.packed(made, WEIGHTS | more)


B = Size(a=1)
FLAG = InputSpec(name="f", kind="frozen", dtype="bool", shape=(2,), tensor="f")
MODELS: dict[str, Callable[[], bytes]] = {
    "good": model,
    "a pickle": lambda: b"\x80\x04\x95" + bytes(61),
    "cut": lambda: model()[:-1],
    "a key twice": lambda: model(TEXT.replace(LOSS, LOSS + b"," + LOSS)),
    "deep": lambda: model(b"[" * 100 + b"]" * 100),
    "overlapping weights": lambda: model(file=header(offsets("b1", 0, 8))),
    "an unknown op": lambda: with_nodes(Node(name="n", op="evil.copy.default", args=(), kwargs={})),
    "batch norm": lambda: with_nodes(
        node("n", "batch_norm.default", r("x"), None, None, None, None, True, 0.1, 1e-5, False)
    ),
    "records mixed": lambda: with_nodes(node("n", "mean.dim", r("x"), ls(0), True)),
    "the batch's size": lambda: with_nodes(node("n", "div.Tensor", r("x"), B)),
    "randomness": lambda: with_nodes(node("n", "rand_like.default", r("x"))),
    "control flow": lambda: with_nodes(node("n", "item.default", r("x"))),
    "2^40 elements": lambda: with_nodes(node("n", "zeros.default", ls(2**20, 2**20))),
    "an index out of range": lambda: with_nodes(
        node("n", "embedding.default", r("w1"), r("y2")), node("n2", "relu.default", r("n"))
    ),
    "a label out of range": lambda: lab.packed(*lab.mlp([4, 1])),
    "a label in range but not declared so": lambda: with_nodes(
        node("y2", "add.Scalar", r("y"), 1), node("n", "embedding.default", r("w1"), r("y2"))
    ),
    "another width": lambda: lab.packed(*lab.mlp([5, 2])),
    "a bool of 5": lambda: pack.pack(
        Graph(inputs=(*GRAPH.inputs, FLAG), nodes=GRAPH.nodes, loss="loss"),
        {n: ("f32", tuple(t.shape), t.numpy().tobytes()) for n, t in WEIGHTS.items()}
        | {"f": ("bool", (2,), b"\5\0")},
    ).data,
}  # fmt: skip


@pytest.mark.parametrize("what", MODELS)
def test_a_model_is_refused_here_as_the_worker_refuses_it(
    what: str, tmp_path: Path, capsys: Any
) -> None:
    data = MODELS[what]()
    (tmp_path / "m.cmm").write_bytes(data)
    (tmp_path / "s.json").write_text(json.dumps(codec.to_json(SCHEMA), indent=2))
    schema = ("--schema", str(tmp_path / "s.json"))
    here = said_here(capsys, "model", "check", str(tmp_path / "m.cmm"), *schema)
    assert here == said_by_the_worker(data)
    assert (here[0] == 0) == (what == "good")


def test_without_a_schema_a_model_is_checked_for_all_that_needs_none(
    tmp_path: Path, capsys: Any
) -> None:
    for what, make in MODELS.items():
        (tmp_path / "m.cmm").write_bytes(data := make())
        code = said_here(capsys, "model", "check", str(tmp_path / "m.cmm"))[1]
        of_schema = "declared" in what or "label" in what or "width" in what
        assert code == ("" if of_schema else said_by_the_worker(data)[1]), what


def column(**changed: Any) -> DatasetSchema:
    """x (f32, 2), y (i64), flag (bool), byte (u8); three rows."""
    columns = {
        "x": Column(name="x", dtype="f32", shape=(2,), low=0, high=1),
        "y": Column(name="y", dtype="i64", low=0, high=2, role="label"),
        "flag": Column(name="flag", dtype="bool"),
        "byte": Column(name="byte", dtype="u8", low=3, high=9),
    }
    given = changed.pop("column", {})
    made = tuple(dataclasses.replace(c, **given.get(n, {})) for n, c in columns.items())
    return DatasetSchema(**({"name": "t", "columns": made, "rows": 3, "units": 3} | changed))


GOOD_WIRE: dict[str, tuple[str, tuple[int, ...], bytes]] = {
    "x": ("f32", (3, 2), struct.pack("<6f", 0, 0.25, 0.5, 0.75, 1, 0)),
    "y": ("i64", (3,), struct.pack("<3q", 0, 1, 2)),
    "flag": ("bool", (3,), b"\0\1\1"),
    "byte": ("u8", (3,), b"\3\5\x09"),
}


def wire(**changed: Any) -> bytes:
    return tensors.dump({n: t for n, t in (GOOD_WIRE | changed).items() if t is not None})


def floats(*values: float) -> tuple[str, tuple[int, ...], bytes]:
    return "f32", (3, 2), struct.pack("<6f", *values)


TABLES: dict[str, tuple[DatasetSchema, bytes]] = {
    "good": (column(), wire()),
    "a pickle": (column(), b"\x80\x04\x95" + bytes(61)),
    "nothing": (column(), b""),
    "cut": (column(), wire()[:-1]),
    "longer": (column(), wire() + b"\0"),
    "a changed header": (column(), wire().replace(b"[0,", b"[8,")),
    "NaN": (column(), wire(x=floats(0, 0, 0, 0, float("nan"), 0))),
    "infinity": (column(), wire(x=floats(0, 0, 0, float("-inf"), 0, 0))),
    "above": (column(), wire(x=floats(0, 0, 0, 1.0000001, 0, 0))),
    "below": (column(), wire(x=floats(0, -1e-45, 0, 0, 0, 0))),
    "a label above": (column(), wire(y=("i64", (3,), struct.pack("<3q", 0, 3, 0)))),
    "a label far below": (column(), wire(y=("i64", (3,), struct.pack("<3q", 0, -(2**63), 0)))),
    "a bool of 2": (column(), wire(flag=("bool", (3,), b"\0\2\1"))),
    "a byte below": (column(), wire(byte=("u8", (3,), b"\2\5\x09"))),
    "a column missing": (column(), wire(flag=None)),
    "a column more": (column(), wire(z=("u8", (3,), b"\0\0\0"))),
    "another dtype": (column(), wire(y=("i32", (3,), bytes(12)))),
    "another shape": (column(), wire(x=("f32", (6,), bytes(24)))),
    "rows more": (column(rows=2, units=2), wire()),
    "bounds past the dtype": (column(column={"byte": {"high": 256}}), wire()),
    "a name of two scripts": (column(name="St. M\u0430ry"), wire()),
    "several faults": (
        column(column={"byte": {"high": 256}}),
        wire(flag=("bool", (3,), b"\0\2\1"), y=("i64", (3,), struct.pack("<3q", 0, 9, 0))),
    ),
}  # fmt: skip


def said_by_the_checker(schema: DatasetSchema, raw: bytes) -> tuple[int, str, str]:
    """The worker's phase ``check``, in this process."""
    key, salt = b"k" * 32, b"s" * 32
    fd = lab.sealed_fd(key, raw)
    try:
        dataset.check(schema, dataset.load(lab.commitment(salt, raw), schema, key, salt, fd))
    except CasemateError as e:
        return e.exit_code, e.code, e.where
    finally:
        os.close(fd)
    return 0, "", ""


@pytest.mark.parametrize("what", TABLES)
def test_a_table_is_refused_here_as_the_worker_refuses_it(
    what: str, tmp_path: Path, capsys: Any
) -> None:
    schema, raw = TABLES[what]
    (tmp_path / "t.safetensors").write_bytes(raw)
    (tmp_path / "s.json").write_text(json.dumps({"schema": codec.to_json(schema)}, indent=2))
    given = (str(tmp_path / "t.safetensors"), "--schema", str(tmp_path / "s.json"))
    here = said_here(capsys, "dataset", "check", *given)
    assert here == said_by_the_checker(schema, raw)
    assert (here[0] == 0) == (what == "good")


ENDLESS = {
    "dataset": ["dataset", "check", "{}/x.safetensors", "--schema", "{}/s.json"],
    "its schema": ["dataset", "check", "{}/s.csv", "--schema", "{}/x.toml"],
    "its schema in JSON": ["dataset", "check", "{}/s.safetensors", "--schema", "{}/x.json"],
    "model": ["model", "check", "{}/x.cmm"],
    "the schema of a model": ["model", "check", "{}/s.cmm", "--schema", "{}/x.json"],
}


@pytest.mark.parametrize("what", ENDLESS)
def test_waits_for_ever_on_a_pipe_or_fills_memory_from_a_device(
    tmp_path: Path, capsys: Any, what: str
) -> None:
    (tmp_path / "s.csv").write_text("x\n1\n")
    (tmp_path / "s.safetensors").write_bytes(b"")
    (tmp_path / "s.cmm").write_bytes(MODELS["good"]())
    (tmp_path / "s.json").write_text(json.dumps(codec.to_json(SCHEMA)))
    for make in (lambda p: os.mkfifo(p), lambda p: p.symlink_to("/dev/zero")):
        for end in ("safetensors", "toml", "json", "cmm"):
            (tmp_path / f"x.{end}").unlink(missing_ok=True)
            make(tmp_path / f"x.{end}")
        _, code, where = said_here(capsys, *(part.format(tmp_path) for part in ENDLESS[what]))
        assert code in ("data.source", "data.schema", "usage.file")
        assert "/x." in where


def test_a_csv_is_checked_as_push_checks_it(tmp_path: Path, capsys: Any) -> None:
    text = 'name = "t"\nlabel = "sick"\n[columns.age]\ndtype = "f32"\nlow = 0\nhigh = 120\n'
    text += '[columns.sick]\nclasses = ["no", "yes"]\n'
    (tmp_path / "t.toml").write_text(text)
    for rows, code in (
        ("40,no\n50,yes\n", ""),
        ("40,no\n140,yes\n", "data.out-of-bounds"),
        ("40,no\nnan,yes\n", "data.not-finite"),
        ("40,no\n,yes\n", "data.missing-value"),
        ("40,no\n50,maybe\n", "data.label-range"),
        ("40,no\n50\n", "data.csv-ragged"),
        ("", "data.empty"),
    ):
        (tmp_path / "t.csv").write_text(f"age,sick\n{rows}")
        given = (str(tmp_path / "t.csv"), "--schema", str(tmp_path / "t.toml"))
        assert said_here(capsys, "dataset", "check", *given)[1] == code
    assert said_here(capsys, "dataset", "check", given[0])[1] == "data.bounds-missing"
    (tmp_path / "t.safetensors").write_bytes(wire())
    bare = said_here(capsys, "dataset", "check", str(tmp_path / "t.safetensors"))
    assert bare[:2] == (2, "usage.arguments")


def test_what_is_checked_here_imports_no_torch() -> None:
    import subprocess
    import sys

    code = "import sys; sys.modules['torch'] = sys.modules['numpy'] = None;"
    code += "import casemate.spec.table, casemate.graph.check, casemate.cli.model"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)


def test_a_table_is_refused_exactly_where_a_value_is_out_of_bounds() -> None:
    made = torch.Generator().manual_seed(5)
    for _ in range(50):
        values = torch.randn(3, 2, generator=made).clamp(0, 1)
        if torch.rand((), generator=made) < 0.5:
            values[1, 1] = [float("nan"), float("inf"), 2.0][
                int(torch.randint(3, (), generator=made))
            ]
        raw = wire(x=floats(*values.flatten().tolist()))
        bad = not bool(((values >= 0) & (values <= 1)).all())
        assert (said_by_the_checker(column(), raw)[1] != "") == bad


def test_hides_a_tensor_where_others_read_metadata() -> None:
    """One file, two readings: to other readers of safetensors this is no tensor."""
    with pytest.raises(CasemateError) as e:
        tensors.load(tensors.dump({"__metadata__": ("f32", (1,), bytes(4))}))
    assert e.value.code == "format.safetensors"
