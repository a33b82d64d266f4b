"""What bad input gets, against a real server: a stable code, a sentence that names the offending
thing, a mend; no budget is spent, and the server goes on serving.

To the owner at push: refused on the owner's machine by the SDK, and by the enclave's worker when a
client sends bytes that are not as their schema says. To the scientist: from the declared schema
alone, so that two datasets with other rows behind one schema give word for word the same answer.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import math
import os
import socket
import struct
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

import casemate as cm
from casemate.client.connection import Connection
from casemate.client.jobs import QuoteView
from casemate.graph import pack
from casemate.graph.model import Graph, InputSpec, ListArg, Node, Ref, Size
from casemate.seal import requests, stream
from casemate.seal.identity import Identity
from casemate.spec import codec, tensors
from casemate.spec.data import (
    Budget,
    Column,
    DatasetInfo,
    DatasetKey,
    Policy,
    Registration,
)
from casemate.spec.errors import CasemateError
from casemate.spec.job import InputBinding
from support.server import CLASSES, FEATURES, Party, RunningServer, mlp, schema

pytestmark = pytest.mark.e2e

ROWS = 32
BUDGET = Budget(epsilon=3.0, delta=1e-2)


@pytest.fixture
def scientist(server: RunningServer) -> Party:
    return Party(server, "scientist")


@pytest.fixture(scope="module")
def twins(owner: Party) -> tuple[DatasetInfo, DatasetInfo]:
    """Two datasets with one schema and other rows."""
    one, two = (owner.push(ROWS, of=schema("twin", ROWS), seed=s, budget=BUDGET) for s in (1, 2))
    assert (one.state, two.state) == ("ready", "ready")
    return one, two


@pytest.fixture(autouse=True)
def nothing_spent(owner: Party, twins: tuple[DatasetInfo, DatasetInfo]) -> Iterator[None]:
    """No budget is spent by any test here, no job is made, and the server still serves."""
    yield
    for twin in twins:
        state = owner.dataset(twin.dataset).budget
        assert state is not None
        assert (state.spent_epsilon, state.jobs) == (0.0, 0)
    assert owner.request("GET", "/v1/jobs").json() == []


@contextlib.contextmanager
def refused(code: str, *words: str) -> Iterator[list[CasemateError]]:
    """The block is refused with ``code``; message or place name all ``words``."""
    out: list[CasemateError] = []
    with pytest.raises(CasemateError) as caught:
        yield out
    out.append(caught.value)
    said(caught.value, code, *words)


def said(error: CasemateError, code: str, *words: str) -> None:
    assert error.code == code, str(error)
    assert error.message.endswith("."), str(error)
    assert len(error.mend) > 5, str(error)
    assert error.mend.endswith("."), str(error)
    for word in words:
        assert word in f"{error.message} {error.where}", str(error)


# To the owner, on the owner's machine.


def _csv(*lines: str) -> Callable[[Path], dict[str, Any]]:
    def make(folder: Path) -> dict[str, Any]:
        path = folder / "patients.csv"
        path.write_text("".join(f"{line}\n" for line in lines))
        bounds = {"age": (0, 120), "dose": (0.0, 5.0)}
        return {"source": path, "label": "sick", "classes": ["no", "yes"], "bounds": bounds}

    return make


HEAD = "age,dose,sick"


def _bytes(name: str, data: bytes) -> Callable[[Path], dict[str, Any]]:
    def make(folder: Path) -> dict[str, Any]:
        (folder / name).write_bytes(data)
        return {"source": folder / name, "label": "sick", "bounds": (0.0, 1.0)}

    return make


def _parquet(cut: int) -> Callable[[Path], dict[str, Any]]:
    def make(folder: Path) -> dict[str, Any]:
        pa = pytest.importorskip("pyarrow")
        import pyarrow.parquet as pq

        path = folder / "patients.parquet"
        pq.write_table(pa.table({"age": [1.0, 2.0], "sick": [0, 1]}), path)
        path.write_bytes(path.read_bytes()[:-cut])
        return {"source": path, "label": "sick", "bounds": (0.0, 120.0)}

    return make


def _frame(**columns: list[Any]) -> Callable[[Path], dict[str, Any]]:
    def make(folder: Path) -> dict[str, Any]:
        pd = pytest.importorskip("pandas")
        return {
            "source": pd.DataFrame(columns),
            "label": "sick",
            "classes": 2,
            "bounds": {"age": (0, 120)},
        }

    return make


def _arrays(x: Any, y: Any, columns: list[Column] | None = None) -> Callable[[Path], Any]:
    def make(folder: Path) -> dict[str, Any]:
        np = pytest.importorskip("numpy")
        source = (np.asarray(x), np.asarray(y))
        if columns is not None:
            return {"source": source, "columns": columns}
        return {"source": source, "label": "y", "classes": 2, "bounds": {"x": (-4.0, 4.0)}}

    return make


def _twice(folder: Path) -> dict[str, Any]:
    pd = pytest.importorskip("pandas")
    return {"source": pd.DataFrame([[1.0, 2.0]], columns=["age", "age"]), "bounds": (0.0, 9.0)}


XY = [Column(name="x", dtype="i32", shape=(2,), low=0, high=9), schema().columns[1]]
LOCAL: dict[str, tuple[Callable[[Path], dict[str, Any]], str, tuple[str, ...]]] = {
    # Malformed tables.
    "ragged CSV": (_csv(HEAD, "40,1,no", "41,1"), "data.csv-ragged", ("line 3", "2 cells")),
    "empty line": (_csv(HEAD, "40,1,no", "", "41,1,no"), "data.csv-ragged", ("line 3",)),
    "open quote": (_csv(HEAD, '40,"1,no'), "data.csv-form", ("line 2",)),
    "two columns of a name": (_csv("age,age,sick", "1,2,no"), "data.duplicate-column", ("age",)),
    "two frame columns of a name": (_twice, "data.duplicate-column", ("age",)),
    "no name": (_csv("age,,sick", "1,2,no"), "data.csv-header", ("column 2",)),
    "empty file": (_bytes("patients.csv", b""), "data.csv-header", ("patients.csv",)),
    "no rows": (_csv(HEAD), "data.empty", ("no rows",)),
    "no UTF-8": (_bytes("p.csv", b"age,sick\n1,\xff\n"), "data.csv-encoding", ("line 2", "0xff")),
    "no Parquet": (_bytes("p.parquet", b"PAR1 or not"), "data.parquet-form", ("p.parquet",)),
    "cut Parquet": (_parquet(9), "data.parquet-form", ("patients.parquet",)),
    "no file": (lambda _: {"source": Path("none.csv")}, "data.source", ("none.csv",)),
    "no table": (lambda _: {"source": 7}, "data.source", ("int",)),
    "column missing": (_csv("age,sick", "4,no"), "data.column-missing", ("dose",)),
    "columns of different length": (
        _arrays([[1.0], [2.0]], [0]),
        "data.rows-differ",
        (),
    ),
    # Wrong dtypes.
    "text for a number": (_csv(HEAD, "forty,1,no"), "data.not-a-number", ("'age'", "row 1")),
    "text column": (_frame(age=["old"], sick=[0]), "data.dtype", ("'age'",)),
    "fraction for a whole": (_arrays([[1.5, 2]], [0], XY), "data.not-an-integer", ("'x'",)),
    "shape": (_arrays([[1, 2, 3]], [0], XY), "data.shape", ("(3,)", "(2,)")),
    "dates": (_arrays([["2020-01-01"]], [0]), "data.dtype", ("'x'",)),
    # NaN and gaps.
    "NaN in CSV": (_csv(HEAD, "40,1,no", "nan,1,no"), "data.not-finite", ("'age'", "row 2")),
    "infinity in CSV": (_csv(HEAD, "40,-inf,no"), "data.not-finite", ("'dose'", "row 1")),
    "gap in CSV": (_csv(HEAD, "40,,no"), "data.missing-value", ("'dose'", "row 1")),
    "NaN in an array": (
        _arrays([[0.0], [math.nan]], [0, 1]),
        "data.not-finite",
        ("'x'", "row 2"),
    ),
    # Bounds and labels.
    "out of bounds": (_csv(HEAD, "140,1,no"), "data.out-of-bounds", ("'age'", "140", "[0, 120]")),
    "unknown class": (_csv(HEAD, "40,1,maybe"), "data.label-range", ("'sick'", "maybe")),
    "label above": (_arrays([[0.0]], [2]), "data.label-range", ("'y'", "row 1", "2")),
    "label below": (_arrays([[0.0]], [-1]), "data.label-range", ("'y'", "row 1", "-1")),
    "no bounds": (lambda _: {"source": {"a": [1.0]}}, "data.bounds-missing", ("'a'",)),
}


@pytest.mark.parametrize("case", LOCAL)
def test_the_sdk_refuses_at_push_and_nothing_leaves_the_machine(
    server: RunningServer, owner: Party, tmp_path: Path, case: str
) -> None:
    make, code, words = LOCAL[case]
    given = make(tmp_path)
    before = sorted((server.state / "uploads").glob("*"))
    listed = owner.request("GET", "/v1/datasets").json()
    with (
        cm.connect(server.url, trust=server.trust, identity=owner.identity) as enclave,
        refused(code, *words),
    ):
        enclave.datasets.push(
            given.pop("source"), name="bad", policy=cm.Policy("*"), budget=BUDGET, **given
        )
    assert sorted((server.state / "uploads").glob("*")) == before
    assert owner.request("GET", "/v1/datasets").json() == listed


# To the owner, by the enclave's worker: the client is buggy or dishonest.


def _wire(x: list[float] | None = None, y: list[int] | None = None, **more: Any) -> bytes:
    x = x or [0.0] * (ROWS * FEATURES)
    y = y or [0] * ROWS
    columns = {
        "x": ("f32", (ROWS, FEATURES), struct.pack(f"<{len(x)}f", *x)),
        "y": ("i64", (ROWS,), struct.pack(f"<{len(y)}q", *y)),
    }
    return tensors.dump(columns | more)


def _x(value: float, at: int = 17) -> bytes:
    return _wire(x=[value if i == at else 0.0 for i in range(ROWS * FEATURES)])


def _y(value: int) -> bytes:
    return _wire(y=[value] + [0] * (ROWS - 1))


FLAG = Column(name="flag", dtype="bool")
UNIT = Column(name="who", dtype="i64", low=0, high=ROWS - 1, role="unit")
GOOD = _wire()
WIRES: dict[str, tuple[bytes, str, Column | None]] = {
    "NaN": (_x(math.nan), "data.not-finite", None),
    "infinity": (_x(math.inf), "data.not-finite", None),
    "above": (_x(4.0000005), "data.bounds", None),
    "below": (_x(-5.0, at=ROWS * FEATURES - 1), "data.bounds", None),
    "label above": (_y(CLASSES), "data.bounds", None),
    "label below": (_y(-1), "data.bounds", None),
    "label huge": (_y(-(2**63)), "data.bounds", None),
    "bool of 2": (_wire(flag=("bool", (ROWS,), b"\2" * ROWS)), "data.bool", FLAG),
    "unknown unit": (
        _wire(who=("i64", (ROWS,), struct.pack(f"<{ROWS}q", *range(1, ROWS + 1)))),
        "data.bounds",
        UNIT,
    ),
    "two columns in the other's place": (
        tensors.dump(
            {
                "x": ("i64", (ROWS,), bytes(8 * ROWS)),
                "y": ("f32", (ROWS, FEATURES), bytes(4 * ROWS * FEATURES)),
            }
        ),
        "data.columns",
        None,
    ),
    "zeros": (bytes(len(GOOD)), "format.json", None),
    "header points elsewhere": (GOOD.replace(b"[0,", b"[8,"), "format.safetensors", None),
    "trailing bytes": (
        tensors.dump({"x": ("f32", (ROWS, 1), bytes(4 * ROWS))}).ljust(len(GOOD), b"\0"),
        "format.safetensors",
        None,
    ),
}

# Of these kinds there is another, and tests/unit/worker has all without a process.
SLOW_WIRES = (
    "infinity", "above", "below", "label above", "label below", "label huge", "unknown unit",
    "two columns in the other's place", "header points elsewhere",
)  # fmt: skip


def _kept_from_others(owner: Party, scientist: Party, dataset: str) -> None:
    """An admitted scientist cannot tell a refused dataset from one that does not exist."""
    answers = []
    for name in (dataset, "ds_" + "0" * 40):
        with refused("data.unknown-dataset", name) as caught:
            scientist.dataset(name)
        answers.append(str(caught[0]).replace(name, "*"))
        info = dataclasses.replace(owner.dataset(dataset), dataset=name, epoch=0)
        with refused("data.unknown-dataset", name) as caught:
            scientist.quote([info])
        answers.append(str(caught[0]).replace(name, "*"))
    assert len(set(answers)) == 1
    assert dataset not in str(scientist.request("GET", "/v1/datasets").json())


@pytest.mark.parametrize(
    "case", [pytest.param(c, marks=pytest.mark.full) if c in SLOW_WIRES else c for c in WIRES]
)
def test_the_worker_refuses_what_is_not_as_its_schema_says(
    owner: Party, scientist: Party, case: str
) -> None:
    wire, code, extra = WIRES[case]
    of = schema("hostile", ROWS)
    if extra is not None:
        of = dataclasses.replace(of, columns=(*of.columns, extra))
    found = owner.push(wire=wire, of=of)
    assert (found.state, found.error) == ("refused", code)
    assert found.budget is not None
    assert (found.budget.jobs, found.budget.spent_epsilon) == (0, 0.0)
    _kept_from_others(owner, scientist, found.dataset)


def _register(owner: Party, wire: bytes, **change: Any) -> DatasetInfo:
    """Register ``wire`` with something in the envelope that does not belong to it."""
    of, policy = schema("envelope", ROWS), Policy(scientists=("*",))
    salt, key = os.urandom(32), os.urandom(32)
    digest = hashlib.sha256(b"casemate/dataset/v1\0" + salt + wire).hexdigest()
    dataset = change.get("dataset", f"ds_{digest[:40]}")
    sealed = b"".join(stream.encrypt(change.get("stream_key", key), [wire]))
    sealed = change.get("spoil", lambda b: b)(sealed)
    place = str(owner.request("POST", "/v1/uploads", {"size": len(sealed)}).json()["upload"])
    owner.request("PATCH", f"/v1/uploads/{place}", sealed, headers={"upload-offset": "0"})
    info = Registration.info(dataset, codec.digest(policy), codec.digest(of))
    body = Registration(
        dataset=dataset,
        owner=change.get("named", owner.id),
        schema=change.get("schema", of),
        policy=change.get("policy", policy),
        budget=BUDGET,
        upload=place,
        sealed_key=owner.seal(
            codec.encode(DatasetKey(key=key, salt=change.get("salt", salt))), info
        ),
    )
    found = owner.request("POST", "/v1/datasets", body).value(DatasetInfo)
    while found.state == "checking":
        time.sleep(0.05)
        found = owner.dataset(found.dataset)
    return found


def _flip(data: bytes) -> bytes:
    return data[:-1] + bytes([data[-1] ^ 1])


@pytest.mark.parametrize(
    ("change", "code"),
    [
        ({"salt": bytes(32)}, "data.commitment"),
        ({"dataset": "ds_" + "0" * 40}, "data.commitment"),
        ({"spoil": _flip}, "format.stream-tampered"),
        ({"stream_key": bytes(32)}, "format.stream-tampered"),
    ],
)
def test_the_worker_refuses_sealed_bytes_that_are_not_the_committed_ones(
    owner: Party, change: dict[str, Any], code: str
) -> None:
    found = _register(owner, GOOD, **change)
    assert (found.state, found.error) == ("refused", code)


@pytest.mark.parametrize(
    ("change", "code", "words"),
    [
        ({"spoil": lambda b: b[:-1]}, "data.size", ("schema",)),
        ({"spoil": lambda b: b + b"\0"}, "data.size", ("schema",)),
        ({"schema": schema("envelope", ROWS - 1)}, "data.size", ("schema",)),
        ({"policy": Policy(scientists=("*",), max_epsilon=9.0)}, "format.sealed", ()),
        ({"schema": schema("other name", ROWS)}, "format.sealed", ()),
        ({"named": "id_" + "0" * 40}, "auth.forbidden", ("owner",)),
    ],
)
def test_the_server_refuses_a_registration_that_does_not_hold_together(
    owner: Party, change: dict[str, Any], code: str, words: tuple[str, ...]
) -> None:
    listed = owner.request("GET", "/v1/datasets").json()
    with refused(code, *words):
        _register(owner, GOOD, **change)
    assert owner.request("GET", "/v1/datasets").json() == listed


def test_a_registration_with_numbers_that_cannot_be_is_refused(owner: Party) -> None:
    bad = {
        "budget": b'"epsilon":-3.0,',
        "schema": b'"rows":0,',
    }
    good = {"budget": b'"epsilon":3.0,', "schema": f'"rows":{ROWS},'.encode()}
    registration = Registration(
        dataset="ds_" + "0" * 40, owner=owner.id, schema=schema("numbers", ROWS),
        policy=Policy(scientists=("*",)), budget=BUDGET, upload="up_" + "0" * 32, sealed_key=b"x",
    )  # fmt: skip
    body = codec.encode(registration)
    for field, text in bad.items():
        assert good[field] in body
        with refused("format.field", field):
            owner.request("POST", "/v1/datasets", body.replace(good[field], text))


# To the scientist: from what is declared alone.


def _mlp_of(features: int, dtype: str = "f32") -> pack.Packed:
    """A linear model for records of another shape."""
    weight = InputSpec(name="w", kind="param", dtype="f32", shape=(CLASSES, features), tensor="w")
    batch = Size(a=1)
    graph = Graph(
        inputs=(
            weight,
            InputSpec(name="x", kind="data", dtype=dtype, shape=(batch, features)),
            InputSpec(name="y", kind="data", dtype="i64", shape=(batch,)),
        ),
        nodes=(
            _node("o", "aten.linear.default", Ref(name="x"), Ref(name="w"), None),
            _node("loss", "aten.cross_entropy_loss.default", Ref(name="o"), Ref(name="y"), None, 0),
        ),
        loss="loss",
    )
    data = ("f32", (CLASSES, features), bytes(4 * CLASSES * features))
    return pack.pack(graph, {"w": data})


def _node(name: str, op: str, *args: Any) -> Node:
    return Node(name=name, op=op, args=args, kwargs={})


def _with(*nodes: Node, loss: str = "loss") -> pack.Packed:
    """The usual model and these nodes behind it."""
    graph, weights = pack.unpack(mlp().data)
    made = dataclasses.replace(graph, nodes=(*graph.nodes, *nodes), loss=loss)
    return pack.pack(made, {n: (i.dtype, i.shape, bytes(v)) for n, (i, v) in weights.items()})


H = Ref(name="h")
HUGE = 2**20
# Model, change of the request, code, words.
Job = tuple[pack.Packed, dict[str, Any], str, tuple[str, ...]]
_X = InputBinding(input="x", columns=("x",))
_Y = InputBinding(input="y", columns=("y",))
JOBS: dict[str, Job] = {
    "shape": (_mlp_of(FEATURES + 1), {}, "plan.shape", ("'x'", f"({FEATURES},)", "(5,)")),
    "dtype": (_mlp_of(FEATURES, "i64"), {}, "plan.dtype", ("'x'", "i64", "f32")),
    "unknown op": (
        _with(_node("odd", "aten.linalg_svd.default", H)),
        {},
        "model.op-unknown",
        ("'odd'", "aten.linalg_svd.default"),
    ),
    "mixes records": (
        _with(_node("odd", "aten.mean.dim", H, ListArg(items=(0,)), True)),
        {},
        "model.mixes-records",
        ("'odd'",),
    ),
    "too large for a record": (
        _with(
            _node("wide", "aten.repeat.default", H, ListArg(items=(1, HUGE))),
            _node("wider", "aten.repeat.default", Ref(name="wide"), ListArg(items=(1, HUGE))),
        ),
        {},
        "model.too-large",
        ("'wider'",),
    ),
    "wrong digest": (mlp(), {"model_digest": "sha256:" + "0" * 64}, "model.digest", ("model",)),
    "no model": (
        pack.Packed(data=b"not a model"),
        {},
        "format.model",
        (),
    ),
    "unknown column": (
        mlp(),
        {"inputs": (InputBinding(input="x", columns=("z",)), _Y)},
        "plan.unknown-column",
        ("'z'", "'twin'"),
    ),
    "unbound input": (mlp(), {"inputs": (_X,)}, "plan.unbound-input", ("'y'",)),
    "unknown input": (
        mlp(),
        {"inputs": (_X, _Y, InputBinding(input="q", columns=("x",)))},
        "plan.unknown-input",
        ("'q'",),
    ),
    "batch": (mlp(), {"batch": ROWS + 1}, "plan.batch-size", (str(ROWS + 1), str(ROWS))),
}


# Each refusal in a worker costs a new one, so a few stand for all; of the slow ones, tests/unit and
# tests/attacks have the codes without a process.
ON_BOTH = {"shape", "unknown op", "wrong digest", "unknown column", "batch"}
SLOW_JOBS = ("dtype", "too large for a record", "no model", "unbound input", "unknown input")


@pytest.mark.parametrize(
    "case", [pytest.param(c, marks=pytest.mark.full) if c in SLOW_JOBS else c for c in JOBS]
)
def test_a_bad_job_is_refused_in_the_same_words_whatever_the_rows(
    scientist: Party, twins: tuple[DatasetInfo, DatasetInfo], case: str
) -> None:
    model, change, code, words = JOBS[case]
    change = dict(change)
    train = None
    if "batch" in change:
        from support.server import train_spec

        train = train_spec(batch=change.pop("batch"))
    answers = set()
    for twin in twins if case in ON_BOTH else twins[:1]:
        with refused(code, *words) as caught:
            scientist.quote([twin], model, train=train, **change)
        answers.add(str(caught[0]).replace(twin.dataset, "*"))
    assert len(answers) == 1
    assert scientist.request("GET", "/v1/quotes").json() == []


def test_declarations_that_differ_between_owners_are_refused(
    owner: Party, scientist: Party, twins: tuple[DatasetInfo, DatasetInfo]
) -> None:
    x, y = schema().columns
    other = dataclasses.replace(
        schema("other", ROWS), columns=(dataclasses.replace(x, high=5.0), y)
    )
    info = owner.push(ROWS, of=other)
    with refused("plan.schemas-differ", "'x'", "'twin'", "'other'"):
        scientist.quote([twins[0], info])


def test_a_model_too_large_for_the_sdk_and_one_of_another_shape() -> None:
    torch = pytest.importorskip("torch")
    from casemate.client.torch import export

    with refused("model.export", "4", "5"):
        export(torch.nn.Linear(5, 2), schema("twin", ROWS), loss="cross_entropy")


# Who asks.


def _signed(party: Party, method: str, path: str, **more: Any) -> dict[str, str]:
    url = party.server.url + path
    boot = party.connection.line().attestation.binding.boot
    signed = requests.sign(party.identity, method, url, {}, b"", boot=boot, **more)
    return dict(signed)


def _send(party: Party, method: str, path: str, headers: dict[str, str], body: bytes = b"") -> Any:
    """As someone on the wire would: the same live connection, headers as they are."""
    line = party.connection.line()
    return line.http.request(method, party.server.url + path, content=body, headers=headers)


def _error(response: httpx.Response) -> CasemateError:
    return CasemateError.from_wire(response.json(), response.status_code)


def test_a_wrong_signature_a_used_nonce_and_an_unknown_identity_are_refused(
    scientist: Party,
) -> None:
    path = "/v1/datasets"
    good = _signed(scientist, "GET", path)
    assert _send(scientist, "GET", path, good).status_code == 200
    said(_error(_send(scientist, "GET", path, good)), "auth.replay", "answered before")

    thief = Identity.generate("thief")
    boot = scientist.connection.line().attestation.binding.boot
    forged = dict(requests.sign(thief, "GET", scientist.server.url + path, {}, b"", boot=boot))
    said(_error(_send(scientist, "GET", path, forged)), "auth.unknown-identity", thief.id)
    forged["signature-input"] = forged["signature-input"].replace(thief.id, scientist.id)
    said(_error(_send(scientist, "GET", path, forged)), "auth.signature", "signature")

    elsewhere = _signed(scientist, "GET", "/v1/jobs")
    said(_error(_send(scientist, "GET", path, elsewhere)), "auth.signature", "signature")
    empty = _signed(scientist, "POST", "/v1/uploads")
    body = _error(_send(scientist, "POST", "/v1/uploads", empty, b'{"size":1}'))
    said(body, "auth.content-digest", "body")
    odd = _signed(scientist, "GET", path) | {"casemate-nonce": "0" * 31 + "g"}
    said(_error(_send(scientist, "GET", path, odd)), "auth.nonce", "nonce")
    old = _signed(scientist, "GET", path) | {"casemate-boot": "00" * 16}
    said(_error(_send(scientist, "GET", path, old)), "auth.boot-stale", "another start")
    said(_error(_send(scientist, "GET", path, {})), "auth.signature-missing", "not signed")


def test_a_stranger_learns_nothing_of_a_dataset(owner: Party, scientist: Party) -> None:
    private = owner.push(ROWS, policy=Policy(scientists=(owner.id,)), budget=BUDGET)
    _kept_from_others(owner, scientist, private.dataset)


# What policies, epochs and budgets forbid.


def _refusal(party: Party, info: DatasetInfo, **more: Any) -> CasemateError:
    """What a quote says of its one dataset, and that its submission says the same."""
    quote = party.quote([info], **more)
    with pytest.raises(CasemateError) as early:
        QuoteView(quote).raise_if_refused()
    with pytest.raises(CasemateError) as late:
        party.submit(quote)
    assert early.value.code == late.value.code
    said(late.value, late.value.code, info.dataset)
    assert party.request("GET", "/v1/jobs").json() == []
    return early.value


def test_an_exhausted_budget_is_refused_before_anything_is_read(
    scientist: Party, twins: tuple[DatasetInfo, DatasetInfo]
) -> None:
    from support.server import train_spec

    answers = set()
    for twin in twins:
        error = _refusal(scientist, twin, train=train_spec(epsilon=30.0))
        said(error, "budget.exhausted", "'twin'", "left")
        answers.add(str(error).replace(twin.dataset, "*"))
    assert len(answers) == 1


@pytest.mark.full
def test_an_epoch_that_is_over_or_another_one_is_refused(owner: Party, scientist: Party) -> None:
    info = owner.push(ROWS, policy=Policy(scientists=("*",), last_epoch=1), budget=BUDGET)
    quote = scientist.quote([info])
    owner.request("POST", f"/v1/datasets/{info.dataset}/epoch", {"epoch": 1})
    with refused("policy.stale-epoch", info.dataset):
        scientist.submit(quote)
    said(_refusal(scientist, info), "policy.stale-epoch", "epoch 1, not 0")
    now = owner.dataset(info.dataset)
    assert scientist.quote([now]).datasets[0].refusal is None
    owner.request("POST", f"/v1/datasets/{info.dataset}/epoch", {"epoch": 2})
    with refused("policy.epoch-back", "epoch is 2", "1 was asked"):
        owner.request("POST", f"/v1/datasets/{info.dataset}/epoch", {"epoch": 1})
    said(_refusal(scientist, owner.dataset(info.dataset)), "policy.expired", "epoch 1")
    state = owner.dataset(info.dataset).budget
    assert state is not None
    assert (state.jobs, state.spent_epsilon) == (0, 0.0)


@pytest.mark.full
def test_a_changed_policy_and_a_revoked_dataset_are_refused(owner: Party, scientist: Party) -> None:
    info = owner.push(ROWS, budget=BUDGET)
    quote = scientist.quote([info])
    stricter = Policy(scientists=("*",), max_epsilon=0.5)
    owner.request("PUT", f"/v1/datasets/{info.dataset}/policy", stricter)
    with refused("policy.changed", info.dataset):
        scientist.submit(quote)
    said(_refusal(scientist, info), "policy.changed", "another policy")
    now = owner.dataset(info.dataset)
    said(_refusal(scientist, now), "policy.max-epsilon", "0.5")
    owner.request("DELETE", f"/v1/datasets/{info.dataset}")
    with refused("policy.revoked", info.dataset):
        scientist.submit(quote)
    with refused("policy.revoked", info.dataset):
        scientist.quote([now])
    state = owner.dataset(info.dataset).budget
    assert state is not None
    assert (state.jobs, state.spent_epsilon) == (0, 0.0)


# The server, and its evidence.


def test_a_server_that_is_not_there_is_said_to_be_so(server: RunningServer) -> None:
    identity = Identity.generate("lost")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        url = f"https://127.0.0.1:{free.getsockname()[1]}"
        with refused("net.unreachable", url):
            cm.connect(url, trust=server.trust, identity=identity)
    for bad in ("http://127.0.0.1:1", "127.0.0.1", "https://"):
        with refused("usage.url", bad):
            cm.connect(bad, trust=server.trust, identity=identity)


def test_a_server_that_speaks_no_tls_is_said_to_be_so(server: RunningServer) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def answer() -> None:
            with contextlib.suppress(OSError):
                client, _ = listener.accept()
                with client:
                    client.recv(1000)
                    client.sendall(b"HTTP/1.1 200 OK\r\ncontent-length: 0\r\n\r\n")

        thread = threading.Thread(target=answer, daemon=True)
        thread.start()
        url = f"https://127.0.0.1:{listener.getsockname()[1]}"
        with refused("net.unreachable", url):
            Connection(url, trust=server.trust).line()
        thread.join(10)


def test_refused_evidence_says_which_check_and_why(server: RunningServer) -> None:
    identity = Identity.generate("careful")
    hardware = cm.Trust.sev_snp(measurements=[server.facts["measurement"]])
    with refused("evidence.simulated-not-asked", "simulated", "label") as caught:
        cm.connect(server.url, trust=hardware, identity=identity)
    assert "by name" in caught[0].mend
    assert [c.name for c in caught[0].checks if c.outcome == "failed"] == ["label"]  # type: ignore[attr-defined]

    pinned = cm.Trust.simulated("ab" * 32)
    with refused("evidence.root-unknown", server.facts["root"]) as caught:
        cm.connect(server.url, trust=pinned, identity=identity)
    checks = caught[0].checks  # type: ignore[attr-defined]
    assert [c.outcome for c in checks[:-1]] == ["passed"] * (len(checks) - 1)
    assert (checks[-1].outcome, checks[-1].code) == ("failed", "evidence.root-unknown")
    # Nobody was enrolled: the evidence is checked before anything is said.
    party = Party(server, "asker")
    said(
        _error(_send(party, "GET", "/v1/datasets", _by(identity, party))),
        "auth.unknown-identity",
        identity.id,
    )


def _by(identity: Identity, party: Party) -> dict[str, str]:
    boot = party.connection.line().attestation.binding.boot
    url = party.server.url + "/v1/datasets"
    return dict(requests.sign(identity, "GET", url, {}, b"", boot=boot))
