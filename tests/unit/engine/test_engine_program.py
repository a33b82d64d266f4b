"""Programs: the closed table, the frozen prefix, gradients."""

from __future__ import annotations

import dataclasses
import itertools

import pytest
import torch

from casemate.engine import program as engine_program
from casemate.engine import records
from casemate.engine.program import Program
from casemate.graph.ops import TABLE, Batch, Value, bind
from casemate.spec.errors import ModelError
from support import engine_checks as checks
from support import engine_lab as lab

# What may be run in place of torch's own; the tests below say that it is the same.
INSTEAD = {"aten.one_hot.default", "aten.instance_norm.default", "aten.batch_norm.default"}


def test_every_op_of_the_table_is_one_torch_overload():
    for op in TABLE:
        found = engine_program.resolve(op)
        if op in engine_program._INSTEAD:
            assert op in INSTEAD and found is engine_program._INSTEAD[op]
        else:
            assert isinstance(found, torch._ops.OpOverload) and str(found) == op


@pytest.mark.parametrize("shape", [(), (0,), (1,), (7,), (2, 0, 3), (3, 4), (2, 3, 4)])
@pytest.mark.parametrize("count", [1, 2, 5, 300])
def test_one_hot_is_torchs(shape, count):
    torch.manual_seed(0)
    index = torch.randint(count, shape)
    for x in (index, index.t() if index.dim() == 2 else index, torch.full(shape, count - 1)):
        found = engine_program.resolve("aten.one_hot.default")(x, count)
        want = torch.nn.functional.one_hot(x, count)
        assert found.dtype == want.dtype and torch.equal(found, want)


@pytest.mark.parametrize("hostile", [-1, -(2**63), 3, 4, 2**31, 2**32, 2**63 - 1])
def test_one_hot_of_a_class_out_of_range_is_no_class_and_tells_nothing(hostile):
    """torch raises; here the row is zeros, and the others are what they are without it."""
    with pytest.raises(RuntimeError):
        torch.nn.functional.one_hot(torch.tensor([hostile]), 3)
    found = engine_program.resolve("aten.one_hot.default")(torch.tensor([0, hostile, 2]), 3)
    assert found.tolist() == [[1, 0, 0], [0, 0, 0], [0, 0, 1]]


@pytest.mark.parametrize(
    ("low", "high", "code"),
    [
        (0, 2, None),
        (0, 3, "model.index-range"),
        (-1, 2, "model.index-range"),
        (None, None, "model.index-range"),
    ],
)
def test_one_hot_of_classes_that_are_not_proved_in_range_is_refused(low, high, code):
    bounds = None if low is None else (low, high)
    index = Value("i64", (1,), Batch(0), bounds, data=True)
    entry = TABLE["aten.one_hot.default"]
    call = bind(entry.schema, "n", "", (index, 3), {})
    if code is None:
        assert entry.rule(call).bounds == (0, 1)
        return
    with pytest.raises(ModelError) as refused:
        entry.rule(call)
    assert refused.value.code == code and refused.value.where == "n"


def _laid(size, order):
    """Random numbers of that size whose axes lie in memory in that order."""
    t = torch.randn([size[i] for i in order], dtype=torch.float64)
    return t.permute([order.index(i) for i in range(4)])


def _formula(op, x, w, b, mean, var):
    wide = (slice(None), None, None)
    if op == "aten.batch_norm.default":
        m, v = mean[wide], var[wide]
    else:
        m = x.mean((2, 3), keepdim=True)
        v = (x - m).square().mean((2, 3), keepdim=True)
    return (x - m) / (v + 1e-5).sqrt() * w[wide] + b[wide]


@pytest.mark.parametrize("op", ["aten.instance_norm.default", "aten.batch_norm.default"])
@pytest.mark.parametrize("batch", [1, 3])
def test_norms_whose_gradient_comes_permuted(op, batch):
    torch.manual_seed(0)
    norm, training = engine_program.resolve(op), op == "aten.instance_norm.default"
    for size in ((5, 3), (1, 3), (3, 1)):
        for order in itertools.permutations(range(4)):
            for of_x in ((0, 1, 2, 3), (0, 2, 3, 1)):
                g, x = (_laid((batch, 4, *size), o) for o in (order, of_x))
                w, b, mean = torch.randn(3, 4, dtype=torch.float64)
                var = torch.rand(4, dtype=torch.float64) + 0.5
                own = [x.detach().requires_grad_(), w.requires_grad_(), b.requires_grad_()]
                stats = (None, None) if training else (mean, var)
                made = norm(*own, *stats, training, 0.1, 1e-5, False)
                want = torch.autograd.grad(_formula(op, *own, mean, var), own, g)
                for found, right in zip(torch.autograd.grad(made, own, g), want, strict=True):
                    assert torch.allclose(found, right, rtol=1e-6, atol=1e-8), (size, order, of_x)


@pytest.mark.parametrize(
    "op", ["aten.system.default", "os.system.default", "aten.relu", "", "aten.relu_.default", "x"]
)
def test_other_names_are_never_looked_up(op):
    with pytest.raises(ModelError) as refused:
        engine_program.resolve(op)
    assert refused.value.code == "model.op"


def gradient_of(program, record):
    out = torch.empty(program.dimension)
    program.gradient(program.prefix(record), out)
    return out


@pytest.mark.parametrize("frozen", [0, 1, 2])
def test_gradients_are_autograds(frozen):
    sizes = (5, 4, 4, 3)
    graph, weights = lab.mlp(sizes, frozen=frozen)
    program = Program(graph, weights)
    assert program.has_prefix == (frozen > 0)
    x, y = torch.randn(1, 5), torch.tensor([2])
    leaves = {n: t.clone().requires_grad_(int(n[1]) >= frozen) for n, t in weights.items()}
    loss = checks.forward(leaves, x[0], 2)
    trained = [leaves[i.tensor] for i in program.trained]
    expected = torch.cat([g.reshape(-1) for g in torch.autograd.grad(loss, trained)])
    assert torch.allclose(gradient_of(program, {"x": x, "y": y}), expected, rtol=1e-5, atol=1e-7)
    assert set(program.result()) == {n for n in weights if int(n[1]) >= frozen}


def test_gradients_follow_the_weights():
    program = Program(*lab.mlp([3, 2]))
    record = {"x": torch.randn(1, 3), "y": torch.tensor([1])}
    before = gradient_of(program, record)
    with torch.no_grad():
        program.flat.zero_()
    after = gradient_of(program, record)
    assert not torch.equal(before, after)
    assert torch.allclose(after[-2:], torch.tensor([0.5, -0.5]))


def test_frozen_tensors_and_inputs_do_not_change():
    graph, weights = lab.mlp([5, 4, 3], frozen=1)
    kept = {n: t.clone() for n, t in weights.items()}
    program = Program(graph, weights)
    record = {"x": torch.randn(1, 5), "y": torch.tensor([0])}
    held = {n: t.clone() for n, t in record.items()}
    for _ in range(3):
        gradient_of(program, record)
        with torch.no_grad():
            program.flat.add_(1.0)
    assert all(torch.equal(weights[n], kept[n]) for n in kept)
    assert all(torch.equal(record[n], held[n]) for n in held)


def test_the_prefix_is_the_same_kept_or_not():
    graph, weights = lab.mlp([5, 4, 3], frozen=1)
    program = Program(graph, weights)
    schema = lab.schema(5, 3, 6)
    rows = lab.rows_of((schema, lab.table(schema)), graph=graph)
    found = []
    for keep in (False, True):
        gradients = records.record(program, rows.inputs, rows.count, keep)
        out = torch.empty(7, program.dimension)
        for i, row in enumerate((0, 5, -1, 3, 0, 1, 2)):
            gradients(row, out[i])
        found.append(out)
    assert torch.equal(*found)
    assert torch.equal(found[0][0], found[0][4])


def test_kept_prefixes_run_once_a_row(monkeypatch):
    graph, weights = lab.mlp([5, 4, 3], frozen=1)
    program = Program(graph, weights)
    schema = lab.schema(5, 3, 6)
    rows = lab.rows_of((schema, lab.table(schema)), graph=graph)
    calls = []
    right = program.prefix
    monkeypatch.setattr(program, "prefix", lambda r: calls.append(1) or right(r))
    gradients = records.record(program, rows.inputs, rows.count, True)
    for _ in range(5):
        gradients(2, torch.empty(program.dimension))
    assert len(calls) == 7  # six rows and the dummy


def test_a_row_on_which_the_model_fails_has_gradient_zero():
    graph, weights = lab.mlp([5, 3])
    program = Program(graph, weights)
    inputs = {"x": torch.ones(2, 5), "y": torch.tensor([7, 1])}  # class 7 of 3
    gradients = records.record(program, inputs, 2, False)
    out = torch.full((program.dimension,), 9.0)
    gradients(0, out)
    assert not bool(out.any())
    gradients(1, out)
    assert bool(out.any())


def test_a_failing_node_is_named():
    graph, weights = lab.mlp([5, 3])
    nodes = (lab.node("h0", "aten.linear.default", "%x", "%b0", "%b0"), *graph.nodes[1:])
    program = Program(dataclasses.replace(graph, nodes=nodes), weights)
    with pytest.raises(ModelError, match="'h0'"):
        gradient_of(program, {"x": torch.ones(1, 5), "y": torch.tensor([0])})


def test_a_model_without_trained_parameters_is_refused():
    with pytest.raises(ModelError) as refused:
        Program(*lab.mlp([5, 3], frozen=1))
    assert refused.value.code == "model.nothing-trained"
