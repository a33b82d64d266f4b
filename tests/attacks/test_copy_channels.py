"""A model that carries a row out: through a buffer, a parameter, a tied pair, NaN, an infinite
gradient, or the sizes and lengths of things.

Each attack is run with the noise left out. What must hold without noise: a row moves the sum of a
step by at most what is accounted, and nothing else that leaves depends on it.
"""

from __future__ import annotations

import dataclasses
import math
import struct
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812

from casemate.client.data import encode
from casemate.engine import batched, clip, train
from casemate.engine.program import Program
from casemate.engine.sites import ROUNDING
from casemate.graph import check, pack
from casemate.graph.model import Graph, Size
from casemate.seal import stream
from casemate.spec import tensors
from casemate.spec.errors import CasemateError, ModelError
from support import engine_checks as checks
from support import engine_lab as lab
from support.batched_lab import Data
from support.batched_lab import lab as batched_lab
from support.graphs import exported
from support.rawgraph import INPUTS, graph, infos, ls, node, r, run, weight
from support.worker_lab import InProcess, job

SECRET = torch.tensor([1234.5, -777.25, 3.0, 0.125])
COUNT = 12
STEP = 2.0**-24  # of the grid, on the path graph


# Buffers.


class Copier(nn.Module):
    """Writes what it sees where it will be found: BastionAI's released attack."""

    def __init__(self, into: str) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 4)
        self.register_buffer("seen", torch.zeros(4))
        self.into = into

    def forward(self, input: Tensor) -> Tensor:
        first = input[0]
        with torch.no_grad():
            if self.into == "a parameter":
                self.layer.weight.copy_(first.expand(4, 4))
            elif self.into == "a parameter's data":
                self.layer.bias.data.copy_(first)
            elif self.into == "a buffer":
                self.seen.copy_(first)
            elif self.into == "a new buffer":
                self.seen = self.seen + input.mean(0)
            elif self.into == "an index of a buffer":
                self.seen[0] = first[0]
            elif self.into == "an attribute":
                self.kept = input
            elif self.into == "a global":
                globals()["KEPT"] = input
        return self.layer(input)


COPIES = ["a parameter", "a parameter's data", "a buffer", "an index of a buffer"]


@pytest.mark.parametrize("into", COPIES)
def test_copies_a_record_into_the_module(into: str) -> None:
    """Refused at export, by name; the same ops written by hand are refused by the server."""
    data = {"input": torch.zeros(4, 4), "target": torch.zeros(4, dtype=torch.long)}
    with pytest.raises(ModelError) as e:
        exported(Copier(into), data, loss="cross_entropy")
    assert e.value.mend


@pytest.mark.parametrize("into", ["a new buffer", "an attribute", "a global"])
def test_keeps_a_record_in_python(into: str) -> None:
    """No Python of the module travels: the graph holds the layer and nothing of the keeping."""
    data = {"input": torch.zeros(4, 4), "target": torch.zeros(4, dtype=torch.long)}
    try:
        packed = exported(Copier(into), data, loss="cross_entropy")
    except CasemateError:
        return
    made, weights = pack.unpack(packed.data)
    assert {n.op for n in made.nodes} <= {
        "aten.linear.default", "aten.cross_entropy_loss.default", "aten.detach.default",
        "aten.select.int", "aten.reshape.default",
    }  # fmt: skip
    assert b"KEPT" not in packed.data
    assert set(weights) <= {"layer.weight", "layer.bias", "seen"}


WRITES = {
    "copy in place": node("bad", "copy_.default", r("w"), r("x")),
    "set": node("bad", "set_.source_Tensor", r("w"), r("x")),
    "add in place": node("bad", "add_.Tensor", r("w"), r("x")),
    "index put": node("bad", "index_put_.default", r("w"), ls(r("c")), r("x")),
    "resize": node("bad", "resize_.default", r("w"), ls(4)),
    "out argument": node("bad", "add.out", r("x"), r("x"), out=r("w")),
    "running statistics": node(
        "bad", "batch_norm.default", r("im"), None, None, r("w"), r("w"), True, 0.1, 1e-5, False
    ),
    "running statistics, kept by hand": node(
        "bad", "instance_norm.default", r("t"), None, None, r("c"), r("c"), True, 0.1, 1e-5, False
    ),
    "a file": node("bad", "_save.default", r("x"), "/tmp/row"),
}


@pytest.mark.parametrize("what", WRITES)
def test_writes_a_record_by_an_op(what: str) -> None:
    with pytest.raises(ModelError) as e:
        run(WRITES[what])
    assert e.value.where == "bad"
    assert e.value.code in ("model.op-unknown", "model.batchnorm", "model.dtype")


def test_finds_a_record_among_what_comes_back() -> None:
    """What comes back are the trained tensors, no more: neither what was frozen nor a value."""
    of = job(steps=2, private=False)
    own = InProcess(of)
    with pytest.MonkeyPatch.context() as patch:
        result, _ = own.run(patch)
    names = {i.tensor for i in own.ready.program.graph.inputs if i.kind == "param"}
    assert set(tensors.load(result)) == names


# Parameters: the gradient itself is the row.


def row_lab(made: Graph, weights: dict[str, Tensor], **table: Tensor) -> tuple[Any, Any, Any]:
    """A program, rows and plan of the record path; every unit may be in a step."""
    schema = lab.schema(4, 2, COUNT)
    rows_table = lab.table(schema) | table
    program = Program(made, weights)
    rows = lab.rows_of((schema, rows_table), graph=made)
    rows.valid[:] = True  # as if the owner had declared no bounds worth the name
    plan = lab.plan_of(lab.spec_of(4, 1), COUNT, program.dimension, slots=COUNT)
    return program, rows, plan


def moved(program: Any, rows: Any, plan: Any, unit: int) -> float:
    """How far the sum moves when a unit is taken out, exactly."""
    everyone = list(range(COUNT))
    full = checks.sum_of(program, rows, plan, everyone)
    less = checks.sum_of(program, rows, plan, [u for u in everyone if u != unit])
    square = sum(int(v) ** 2 for v in (full - less).tolist())
    return math.sqrt(square) * plan.grid


def copies(gain: float) -> Graph:
    """Losses whose gradient is the record itself, times ``gain``."""
    return Graph(
        inputs=(lab.param("w", 4), lab.data("x", "f32", 4), lab.data("y", "i64")),
        nodes=(
            lab.node("p", "aten.mul.Tensor", "%x", "%w"),
            lab.node("g", "aten.mul.Scalar", "%p", gain),
            lab.node("loss", "aten.sum.dim_IntList", "%g", [1]),
        ),
        loss="loss",
    )


@pytest.mark.parametrize("gain", [1.0, 1e6, 1e30, 3e38, 1e-30])
def test_copies_a_record_by_a_gradient_that_is_the_record(gain: float) -> None:
    x = lab.table(lab.schema(4, 2, COUNT))["x"]
    x[7] = SECRET
    program, rows, plan = row_lab(copies(gain), {"w": torch.zeros(4)}, x=x)
    assert moved(program, rows, plan, 7) <= plan.sensitivity


def test_without_a_clip_the_record_is_there(monkeypatch: pytest.MonkeyPatch) -> None:
    """Seeded bug: the attack works, and the check above sees it."""
    monkeypatch.setattr(clip, "clip", lambda x, bound: None)
    x = lab.table(lab.schema(4, 2, COUNT))["x"]
    x[7] = SECRET
    program, rows, plan = row_lab(copies(1.0), {"w": torch.zeros(4)}, x=x)
    assert moved(program, rows, plan, 7) > 1000 * plan.sensitivity


# Tied and aliased parameters.


def test_takes_its_clip_twice_by_two_names_of_one_tensor() -> None:
    """Two inputs of one tensor would each be clipped, and added to the same weights."""
    twin = dataclasses.replace(weight("w2", 4), tensor="w")
    for kind in ("param", "frozen"):
        again = dataclasses.replace(twin, kind=kind)
        with pytest.raises(ModelError) as e:
            check.check(g := graph(inputs=(*INPUTS, again)), infos(g))
        assert (e.value.code, e.value.where) == ("model.form", "w2")


@pytest.mark.parametrize("times", [2, 5])
def test_takes_its_clip_twice_by_a_tied_weight(times: int) -> None:
    """One weight at many places: its gradient is summed over them before the one clip."""
    made = copies(1e3)
    nodes = [n for n in made.nodes if n.name != "loss"]
    parts = ["g"]
    for i in range(times):
        nodes.append(lab.node(f"t{i}", "aten.mul.Tensor", f"%{parts[-1]}", "%w"))
        nodes.append(lab.node(f"u{i}", "aten.add.Tensor", f"%t{i}", "%p"))
        parts.append(f"u{i}")
    nodes.append(lab.node("loss", "aten.sum.dim_IntList", f"%{parts[-1]}", [1]))
    made = dataclasses.replace(made, nodes=tuple(nodes))
    x = lab.table(lab.schema(4, 2, COUNT))["x"]
    x[7] = SECRET
    program, rows, plan = row_lab(made, {"w": torch.full((4,), 0.5)}, x=x)
    assert moved(program, rows, plan, 7) <= plan.sensitivity


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(6, 4)
        self.out = nn.Linear(4, 6, bias=False)
        self.out.weight = self.embed.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.embed(x).tanh() * 100)


def accounted(dimension: int) -> float:
    return 1 + batched.ETA + 2 * ROUNDING + STEP * math.sqrt(dimension)


def batched_moved(at: Any, data: Data, unit: int) -> float:
    rows, n = at.rows_of(data), len(data["x"])
    full = at.path.sums(rows, 1.0, STEP, at.rows)(np.arange(n)).clone().numpy()
    rows.valid[unit] = False
    less = at.path.sums(rows, 1.0, STEP, at.rows)(np.arange(n)).numpy()
    return math.sqrt(sum(int(v) ** 2 for v in (full - less).tolist())) * STEP


def test_takes_its_clip_twice_by_a_tied_weight_in_the_fast_path() -> None:
    torch.manual_seed(0)
    at = batched_lab(
        Tied(),
        lambda n: {"x": torch.randint(6, (n, 3)), "target": torch.randint(6, (n, 3))},
        lambda out, y: F.cross_entropy(out.transpose(1, 2), y, reduction="none").mean(1),
    )
    by = [batched_moved(at, at.data, u) for u in range(6)]
    assert max(by) <= accounted(at.program.dimension)
    assert max(by) > 0.99  # the records are clipped: both uses are large


# NaN and infinity.


def never(z: Tensor, value: Tensor) -> Tensor:
    """Nothing, of a value whose gradient at 0 is infinite; the product with nothing is NaN."""
    return torch.where(z > 1e6, value, torch.zeros_like(z))


NOTHING: dict[str, Callable[[Tensor], Tensor]] = {
    "a root": lambda z: never(z, z.sqrt()),
    "a quotient": lambda z: never(z, 1 / z),
    "a logarithm": lambda z: never(z, z.log()),
    "a power": lambda z: never(z, z**0.3),
    "a length by hand": lambda z: never(z, (z * z).sum(1, keepdim=True).sqrt()),
    "zero times infinity": lambda z: (z * 1e38 * 1e38) * 0,
}


class Gated(nn.Module):
    """A good branch, and one that adds nothing forward: its gradient is infinite or NaN where the
    record's last feature is above 2."""

    def __init__(self, how: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.good, self.bad, self.how = nn.Linear(4, 3), nn.Linear(4, 3), how

    def forward(self, x: Tensor) -> Tensor:
        gate = (x[:, 3:] > 2).float()
        return self.good(x) + self.how(self.bad(x).abs() * (1 - gate) + gate * self.bad(x) * 0)


@pytest.mark.parametrize("what", NOTHING)
def test_slips_the_clip_by_a_branch_of_no_weight(what: str) -> None:
    """Its gradient is NaN on some records: those count as nothing, whole, and the others' bits do
    not change."""
    torch.manual_seed(1)
    at = batched_lab(
        Gated(NOTHING[what]),
        lambda n: {"x": torch.randn(n, 4).clamp(-1, 1), "target": torch.randn(n, 3)},
        lambda out, y: ((out - y) ** 2).mean(1) * 100,
    )
    data = {k: v.clone() for k, v in at.data.items()}
    data["x"][5, 3] = 3.0
    _, c = at.parts(1.0, data)
    assert bool((c == 0).any())  # the attack bites
    assert bool((c > 0).any())
    for unit in (5, 6):
        assert batched_moved(at, data, unit) <= accounted(at.program.dimension)
    rows = at.rows_of(data)
    total = at.path.sums(rows, 1.0, STEP, at.rows)(np.arange(16))
    assert bool((total.abs() * STEP <= 16).all())


SIGNALS = {
    "NaN in": (1.0, math.nan), "infinity in": (1.0, math.inf), "overflow": (3e38, 4.0),
    "minus infinity": (1.0, -math.inf), "denormal": (1e-45, 1e-3),
}  # fmt: skip


@pytest.mark.parametrize("what", SIGNALS)
def test_signals_a_record_by_a_gradient_that_is_no_number(what: str) -> None:
    """One such record among twelve would make the weights NaN, a bit without noise. It adds zero:
    the sum has the bits that it has without the record."""
    gain, value = SIGNALS[what]
    x = lab.table(lab.schema(4, 2, COUNT))["x"]
    x[7] = value
    program, rows, plan = row_lab(copies(gain), {"w": torch.zeros(4)}, x=x)
    everyone = list(range(COUNT))
    full = checks.sum_of(program, rows, plan, everyone)
    assert moved(program, rows, plan, 7) <= plan.sensitivity
    if not math.isfinite(value) or gain * value > 3.5e38:
        others = [u for u in everyone if u != 7]
        assert torch.equal(full, checks.sum_of(program, rows, plan, others))


def test_signals_a_record_by_weights_that_are_no_numbers() -> None:
    """Weights that begin as NaN or infinity: every record adds zero, whatever it is."""
    for value in (math.nan, math.inf, 3e38):
        for row in (SECRET, -SECRET):
            x = lab.table(lab.schema(4, 2, COUNT))["x"]
            x[7] = row
            made = copies(1.0)
            more = lab.node("q", "aten.mul.Tensor", "%p", "%p")
            nodes = (made.nodes[0], more, lab.node("loss", "aten.sum.dim_IntList", "%q", [1]))
            program, rows, plan = row_lab(
                dataclasses.replace(made, nodes=nodes), {"w": torch.full((4,), value)}, x=x
            )
            assert moved(program, rows, plan, 7) <= plan.sensitivity
            if not math.isfinite(value):
                assert not bool(checks.sum_of(program, rows, plan, [7]).any())


def test_a_sum_that_lets_nan_in_would_be_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    """Seeded bug: the norm is not asked whether it is a number."""

    def careless(x: Tensor, bound: float) -> None:
        norm = float(torch.linalg.vector_norm(torch.nan_to_num(x, 0.0, 1e30, -1e30)))
        x.mul_(min(1.0, bound / max(norm, 1e-30)))

    monkeypatch.setattr(clip, "clip", careless)
    x = lab.table(lab.schema(4, 2, COUNT))["x"]
    x[7] = math.nan
    program, rows, plan = row_lab(copies(1.0), {"w": torch.zeros(4)}, x=x)
    everyone = list(range(COUNT))
    others = [u for u in everyone if u != 7]
    full = checks.sum_of(program, rows, plan, everyone)
    assert not torch.equal(full, checks.sum_of(program, rows, plan, others))


# Sizes and lengths.


def test_reads_a_row_by_the_size_of_what_is_pushed() -> None:
    """Bytes that leave an owner depend on the schema: words of other lengths, numbers of other
    digits, padded lists of other contents are equally long, sealed too."""
    pa = pytest.importorskip("pyarrow")

    def pushed(words: list[str], numbers: list[float], lists: list[list[int]]) -> tuple[int, int]:
        source = pa.table({"word": words, "n": numbers, "tokens": lists})
        made = encode(
            source, name="t", bounds={"n": (-1e6, 1e6), "tokens": (0, 99)},
            classes={"word": ["a", "a much longer word than the other"]},
        )  # fmt: skip
        sealed = sum(map(len, stream.encrypt(bytes(32), made.chunks())))
        return made.size, sealed

    one = pushed(["a", "a"], [0.0, 1.0], [[1, 0, 0], [0, 0, 0]])
    two = pushed(["a much longer word than the other"] * 2, [-99999.125, 1e-30], [[99, 98, 97]] * 2)
    assert one == two


@pytest.mark.parametrize("lists", [[[1, 2], [1]], [[], [1, 2]], [[1, 2], [1, 2, 3]]])
def test_reads_a_row_by_its_own_length(lists: list[list[int]]) -> None:
    """Rows of their own lengths have no wire form: owners pad to one declared length."""
    pa = pytest.importorskip("pyarrow")
    with pytest.raises(CasemateError) as e:
        encode(pa.table({"tokens": lists}), name="t", bounds={"tokens": (0, 9)})
    assert e.value.code == "data.shape"


def test_reads_rows_by_the_size_of_the_result() -> None:
    """Two tables of one schema, one of them all invalid: results of one length, header and all."""
    heads = []
    for more in ({"rows": 0}, {"rows": 3}, {"spoilt": True}):
        of = job(steps=2, private=False, **more)  # type: ignore[arg-type]
        with pytest.MonkeyPatch.context() as patch:
            result, _ = InProcess(of).run(patch)
        size = struct.unpack("<Q", result[:8])[0]
        heads.append((len(result), result[: 8 + size]))
    assert len(set(heads)) == 1


def test_reads_rows_by_how_many_microbatches_a_step_takes() -> None:
    """The number of places is the plan's, whoever was drawn."""
    taken: list[int] = []
    program, rows, plan = row_lab(copies(1.0), {"w": torch.zeros(4)})
    real = train.PATHS["record"](program, rows.inputs, rows.count, False)

    def counting(row: int, out: Tensor) -> None:
        taken.append(row)
        real(row, out)

    for chosen in ([], [3], list(range(COUNT))):
        taken.clear()
        found = np.asarray(chosen, dtype=np.int64)
        train.grid_sum(plan, counting, rows, found, program.dimension)
        assert len(taken) == plan.microbatches * plan.microbatch


def test_reads_the_batchs_size_by_a_constant() -> None:
    """How many were drawn is secret: no number of the graph may be the batch's size."""
    batch = Size(a=1)
    for bad in (
        node("bad", "mul.Scalar", r("x"), batch),
        node("bad", "full.default", ls(batch, 4), batch),
        node("bad", "arange.start", batch, 9),
        node("bad", "clamp.default", r("x"), 0, batch),
        node("bad", "scalar_tensor.default", batch),
    ):
        with pytest.raises(ModelError) as e:
            run(bad)
        assert e.value.where == "bad"
        assert e.value.code in ("model.batch-size", "model.mixes-records", "model.argument")
