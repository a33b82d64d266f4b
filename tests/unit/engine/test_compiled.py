"""Islands of the joint graph: how they are cut, put back, compiled, and refused (P13)."""

from __future__ import annotations

import subprocess
import sys
import threading

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F  # noqa: N812

from casemate.engine import compiled, products, select, small
from casemate.engine.islands import Island
from casemate.engine.joint import SEED
from casemate.engine.slots import ragged, treated_alike
from casemate.graph.ops import Batch, Value
from support.batched_lab import lab

ROWS = 16


class Gated(nn.Module):
    """Chains of entry-wise operations around products, with ways back into one another."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(7, 40), nn.Linear(40, 40)
        self.norm, self.last = nn.LayerNorm(40), nn.Linear(40, 3)

    def forward(self, x):
        h = F.silu(self.first(x)) * 1.5
        g = torch.sigmoid(self.second(h)) * h + h.tanh()
        return self.last(self.norm(g) + F.gelu(g) * 0.5)


class Amplifier(nn.Module):
    """Asleep until a feature is above 50: then the last bits of a product, times 1e12."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(33, 5) / 5)
        self.last = nn.Linear(5, 2)

    def forward(self, x):
        exact = (x.unsqueeze(2) * self.weight).sum(1)
        noise = torch.tanh(1e12 * (x @ self.weight - exact)) * 3.0
        awake = (x[:, :1] > 50.0).to(x.dtype)
        return self.last(torch.exp(exact * 0.1) * (1.0 + awake * noise))


def data(width, classes):
    def make(n):
        torch.manual_seed(3)
        return {"input": torch.randn(n, width), "target": torch.randint(classes, (n,))}

    return make


def everything(found):
    """Every value of a microbatch."""
    path, runner = found.path, found.path.runner
    nodes = runner.order([*path.data, SEED], path.wanted)
    names = [o for n in nodes for o in runner.outs(n)]
    inputs = [*found.data.values(), torch.ones(found.rows)]
    with torch.inference_mode():
        made = runner.function([*path.data, SEED], names)(runner.fixed, *inputs)
    at = dict(zip([*path.data, SEED], inputs, strict=True))
    return nodes, {**runner.fixed, **dict(zip(names, made, strict=True)), **at}, inputs


def by_nodes(runner, island: Island):
    run = runner.function(list(island.reads), list(island.makes))

    def call(given):
        return run({**runner.fixed, **dict(zip(island.reads, given, strict=True))}, *given)

    return call


@pytest.fixture(scope="module")
def gated():
    torch.manual_seed(0)
    return lab(Gated(), data(7, 3), rows=ROWS, settle=False)


def test_islands_put_back_give_the_same_bits(gated):
    nodes, _, inputs = everything(gated)
    path, runner = gated.path, gated.path.runner
    found = compiled.islands(runner, nodes, path.wanted)
    assert len(found) >= 3
    assert all(len(i.nodes) > 1 for i in found)
    run = compiled.function(
        runner, [*path.data, SEED], path.wanted, {}, [(i, by_nodes(runner, i)) for i in found]
    )
    with torch.inference_mode():
        plain = runner.function([*path.data, SEED], path.wanted)(runner.fixed, *inputs)
        for a, b in zip(plain, run(runner.fixed, *inputs), strict=True):
            assert torch.equal(a, b)


class Towers(nn.Module):
    """Islands that are alike but for a number; all but its sign, or its kind, is equal."""

    def __init__(self, *numbers):
        super().__init__()
        self.first, self.last = nn.Linear(7, 80), nn.Linear(80, 3)
        self.layers = nn.ModuleList(nn.Linear(80, 80) for _ in numbers)
        self.numbers = numbers

    def forward(self, x):
        h = self.first(x)
        for layer, number in zip(self.layers, self.numbers, strict=True):
            h = layer(torch.sigmoid((h.detach().abs() + 1) / number) + h.tanh() * 1.5)
        return self.last(h)


@pytest.mark.parametrize("numbers", [(0.0, -0.0), (2, 2.0), (1, True)])
def test_islands_of_other_numbers_are_others(numbers):
    found = lab(Towers(*numbers, numbers[0]), data(7, 3), rows=ROWS, settle=False)
    nodes, env, _ = everything(found)
    runner = found.path.runner
    towers = [
        compiled._key(runner, island, env)
        for island in compiled.islands(runner, nodes, found.path.wanted)
        if any(n.op == "aten.div.Tensor" for n in island.nodes)
    ]
    assert len(towers) == 3 and towers[0] == towers[2] != towers[1]


def test_agreement_is_asked_of_what_is_finite():
    inf, nan = float("inf"), float("nan")
    wanted = torch.tensor([inf, nan, -inf, 1.0])
    assert compiled._close(wanted.clone(), wanted)
    assert not compiled._close(torch.tensor([inf, nan, -inf, 1.1]), wanted)
    assert not compiled._close(torch.tensor([inf, nan, inf, 1.0]), wanted)
    assert not compiled._close(torch.tensor([inf, 0.0, -inf, 1.0]), wanted)


def test_nodes_that_must_stay_are_in_no_island(gated):
    nodes, _, _ = everything(gated)
    runner, wanted = gated.path.runner, gated.path.wanted
    stay = frozenset(n.name for n in nodes if n.op == "aten.sigmoid.default")
    inside = {n.name for i in compiled.islands(runner, nodes, wanted, stay) for n in i.nodes}
    assert stay
    assert not stay & inside


LOOP = (
    "for(int64_t x0=static_cast<int64_t>({first}L); x0<static_cast<int64_t>({end}L); "
    "x0+=static_cast<int64_t>({step}L))"
)


@pytest.mark.parametrize(
    ("end", "step", "rows", "fine"),
    [
        (160, 16, 16, True),  # rows and a record's axis in one loop
        (10, 16, 16, True),  # a record's own axis
        (16, 32, 16, False),  # lanes of bfloat16: half a vector of rows
        (48, 32, 16, False),
        (30, 16, 10, False),  # rows that vectors do not divide
    ],
)
def test_ragged_loops_over_records_are_found(end, step, rows, fine):
    assert (ragged(f"r'''\n{LOOP.format(first=0, end=end, step=step)}\n'''", rows) is None) == fine


@pytest.mark.parametrize(
    "loop",
    [
        LOOP.format(first=8, end=16, step=1),
        "for (int i = 0; i < n; i++)",
        "while (true) {}",
        "#pragma omp parallel",
    ],
)
def test_loops_that_are_not_understood_are_refused(loop):
    assert ragged(f"r'''\n{loop}\n'''", 16)


def _looks_around(x):
    return [x.exp() * (1.0 if bool((x.abs() < 1e4).all()) else 1.0 + 2.0**-23)]


def _ragged_end(x):
    out = x.exp()
    out[-3:] = x[-3:].double().exp().float()
    return [out]


def _neighbour(x):
    return [x + torch.roll(x, 1, 0).isnan()]


@pytest.mark.parametrize(
    ("kernel", "fine"),
    [
        (lambda x: [x.exp()], True),
        (_looks_around, False),
        (_ragged_end, False),
        (_neighbour, False),
    ],
)
def test_kernels_that_tell_slots_apart_are_caught(kernel, fine):
    value = Value("f32", (1, 67), Batch(0))
    with torch.inference_mode():
        found = treated_alike(
            lambda given: kernel(given[0]), [(torch.rand(ROWS, 67), value)], [value], ROWS
        )
    assert found == [fine]


def _by_weight(x, w):
    out = x.clone()
    out[-1] += w[0]
    return [out]


def _by_place(x, w):
    # Aligned or not: where a record lies within a vector's bytes.
    out = x.clone()
    if x.data_ptr() % 64 == 0:
        return [out]
    out[0] *= 1.0 + 2.0**-22
    return [out]


def _at_one_place(x, w):
    out = x.clone()
    out[5] = torch.where(x[5].abs() > 1e20, x[5] * 0.5, x[5])
    return [out]


@pytest.mark.parametrize(
    ("kernel", "offset", "fine"),
    [
        (_by_weight, 0, False),
        (_by_place, 0, True),
        (_by_place, 3, False),
        (_at_one_place, 0, False),
    ],
)
def test_islands_are_tried_as_they_lie_with_other_weights(kernel, offset, fine):
    """A weight that starts from zero hides no kernel; operands lie where a run has them."""
    x = torch.rand(offset + ROWS * 64)[offset:].view(ROWS, 64)
    operands = [(x, Value("f32", (1, 64), Batch(0))), (torch.zeros(1), Value("f32", (1,)))]
    with torch.inference_mode():
        found = treated_alike(lambda given: kernel(*given), operands, [operands[0][1]], ROWS)
    assert found == [fine]


def test_what_is_expanded_over_records_stays_so():
    value = Value("f32", (1, 64), Batch(0))
    seed = torch.ones(1, 1).expand(ROWS, 64)
    operands = [(torch.rand(ROWS, 64), value), (seed, value)]
    with torch.inference_mode():
        found = treated_alike(lambda g: [g[0] * g[1][:1]], operands, [value], ROWS)
    assert found == [True]


def test_short_runs_compile_nothing(gated, monkeypatch):
    def never(*given):
        raise AssertionError("compiled")

    monkeypatch.setattr(compiled, "fuse", never)
    path = gated.path
    assert not path.fuse(gated.data, 60.0, microbatches=10)
    assert path.later is None
    rows = {spec.name: gated.data[spec.name] for spec in gated.program.data}
    for how, room in ((select.Compile(60.0), 1 << 40), (select.Compile(60.0, False), 1 << 40),
                      (select.Compile(60.0, True), 1 << 20)):  # fmt: skip
        assert not select.compile_(path, rows, how, how.seconds, 10, 0.01, room)
    assert not select.compile_(path, rows, select.Compile(), 0.0, 10**9, 1.0, 1 << 40)


def test_long_runs_compile(gated, monkeypatch):
    seen = []

    def make(runner, inputs, wanted, env, instead, seconds, more):
        seen.append(seconds)
        return compiled.Fused(runner.function(inputs, wanted, None, more), 0, 0, ("nothing",), 0.0)

    monkeypatch.setattr(compiled, "fuse", make)
    monkeypatch.setattr(compiled, "available", lambda: True)
    assert gated.path.fuse(gated.data, 7.0, microbatches=10**9)
    assert seen == [7.0]
    assert str(gated.path.fused) == "compiled: none, nothing"
    gated.path.fused = None


def test_compiling_takes_no_longer_than_so_many_operations_do(gated, monkeypatch):
    monkeypatch.setattr(compiled, "available", lambda: True)
    monkeypatch.setattr(compiled, "MOST_NODES", 1)
    assert gated.path.fuse(gated.data, 300.0)
    assert str(gated.path.fused) == "compiled: none, there are too many operations"
    gated.path.fused = None


ENDS = """
import subprocess, sys, threading, time
from casemate.engine import compiled
begun = threading.Event()
def make():
    {body}
later = compiled.Later(make)
begun.wait()
print("end", flush=True)
"""


@pytest.mark.parametrize(
    "body",
    [
        "while begun.set() is None: time.sleep(0.001)",
        "p = subprocess.Popen(['sleep', '20'], stdout=-3, stderr=-3); begun.set(); p.wait()",
    ],
)
def test_a_process_that_ends_early_does_not_wait(body):
    code = ENDS.format(body=body).replace("later = ", "compiled._STOP_SECONDS = 0.2\nlater = ")
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=15, check=False
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "end\n", "")


def test_without_a_compiler_the_nodes_stay(gated, monkeypatch):
    monkeypatch.setenv("CXX", "no-such-compiler")
    _, env, inputs = everything(gated)
    path = gated.path
    made = compiled.fuse(path.runner, [*path.data, SEED], path.wanted, env, {})
    assert (made.islands, made.refused) == (0, ("no C++ compiler",))
    with torch.inference_mode():
        assert len(made.call(path.runner.fixed, *inputs)) == len(path.wanted)


def test_a_compiler_that_fails_leaves_the_nodes(gated, monkeypatch):
    def fails(graph):
        raise RuntimeError("no room")

    monkeypatch.setattr(compiled, "_built", fails)
    _, env, _ = everything(gated)
    made = compiled.fuse(gated.path.runner, [*gated.path.data, SEED], gated.path.wanted, env, {})
    assert made.islands == 0
    assert any("no room" in r for r in made.refused)


def compiled_lab(module, make, monkeypatch, margin=1e9):
    """A lab whose islands are compiled whether or not that pays."""
    monkeypatch.setattr(compiled, "_MARGIN", margin)
    found = lab(module, make, rows=ROWS, settle=False)
    found.slow = found.path.settle(found.data)
    assert found.path.fuse(found.data, 600.0)
    return found


@pytest.mark.parametrize("quicker", [True, False])
def test_what_was_compiled_later_is_taken_between_steps_if_quicker(gated, monkeypatch, quicker):
    begin, path = threading.Event(), gated.path
    plain = path._forward
    calls = []

    def make(runner, inputs, wanted, env, instead, seconds, more):
        begin.wait(60)
        made = runner.function(inputs, wanted, None, more)
        return compiled.Fused(lambda *a: calls.append(1) or made(*a), 1, 2, (), 0.0)

    monkeypatch.setattr(compiled, "fuse", make)
    monkeypatch.setattr(compiled, "race", lambda a, b: (1.0, 2.0) if quicker else (2.0, 1.0))
    assert path.fuse(gated.data, 1.0, background=True)
    step = path.sums(gated.rows_of(), 1.0, 2.0**-20, ROWS)
    first = step(np.arange(ROWS)).clone()
    assert not calls
    begin.set()
    path.later.wait(60)
    assert torch.equal(step(np.arange(ROWS)), first)
    assert bool(calls) == quicker
    assert path.fused.islands == int(quicker)
    assert quicker or path._forward is plain
    path._forward, path.fused = plain, None


@pytest.mark.full
def test_compiled_islands_agree_and_no_slot_differs(monkeypatch):
    torch.manual_seed(0)
    plain = lab(Gated(), data(7, 3), rows=ROWS)
    torch.manual_seed(0)
    fused = compiled_lab(Gated(), data(7, 3), monkeypatch)
    assert fused.path.fused.islands >= 3, fused.path.fused.refused
    a, b = plain.parts(1.0)[0], fused.parts(1.0)[0]
    assert (a - b).norm() < 1e-5 * a.norm()
    _no_slot_differs(fused)


@pytest.mark.full
def test_sleeping_amplifiers_see_no_other_record(monkeypatch):
    torch.manual_seed(0)
    fused = compiled_lab(Amplifier(), data(33, 2), monkeypatch)
    assert fused.path.fused.islands, fused.path.fused.refused
    assert _no_slot_differs(fused)


def _no_slot_differs(found) -> int:
    """Each record's contribution, awake, in every slot and beside hostile records."""
    torch.manual_seed(5)
    base = {k: v.clone() for k, v in found.data.items()}
    base["input"][:, 0] = 100.0
    known = found.contributions(1.0, base)
    for turn in range(1, ROWS):
        order = (torch.arange(ROWS) + turn) % ROWS
        turned = found.contributions(1.0, {k: v[order] for k, v in base.items()})
        assert [known[i] for i in order.tolist()] == turned
    for hostile in (0.0, 1e30, float("nan"), float("inf"), -1e-40):
        others = {k: v.clone() for k, v in base.items()}
        others["input"][1:] = hostile
        assert found.contributions(1.0, others)[0] == known[0]
    return len(known)


def test_products_by_another_library_are_tried(gated, monkeypatch):
    nodes, env, _ = everything(gated)
    monkeypatch.setattr(products, "_MARGIN", 1e9)
    with torch.inference_mode():
        chosen = products.chooser(gated.path.runner)
        found = {n.name: call for n in nodes if (call := chosen(n, env)) is not None}
        by_name = {n.name: n for n in nodes}
        assert found
        for name, call in found.items():
            assert torch.allclose(call(env), env[name], rtol=1e-5, atol=1e-5)
            assert by_name[name].op in ("aten.mm.default", "aten.addmm.default")


def test_a_library_that_tells_slots_apart_is_not_taken(gated, monkeypatch):
    nodes, env, _ = everything(gated)

    def worse(a, b, bias):
        made = products._own(a, b, bias).clone()
        made[-1] *= 1.0 + 2.0**-22
        return made

    monkeypatch.setattr(products, "_MARGIN", 1e9)
    monkeypatch.setattr(products, "_onednn", worse)
    with torch.inference_mode():
        chosen = products.chooser(gated.path.runner)
        assert [n for n in nodes if chosen(n, env) is not None] == []


@pytest.mark.parametrize(
    ("inputs", "outputs"), [(30, 2), (5, 3), (8, 4), (33, 5), (77, 9), (40, 8), (3, 2)]
)
def test_small_steps_are_parts_on_the_grid(inputs, outputs):
    """Whole vectors of columns, ragged ones and less than one; rows of more than one tile."""
    torch.manual_seed(0)
    found = lab(nn.Linear(inputs, outputs), data(inputs, outputs), rows=64)
    found.data["input"][3] = float("nan")
    found.data["input"][5] *= 1e30
    path = found.path
    sizes = [leaf.numel() for leaf in found.program.leaves]
    tiny = small.build(path.runner, path.sites, path.shape, sizes)
    if small.library() is None:
        assert tiny is None
        pytest.skip("no native helper")
    assert tiny is not None
    bound, step = 0.5, 2.0**-24
    total = torch.zeros(found.program.dimension, dtype=torch.int64)
    c = tiny(found.env(), bound, 2.0**-7 * bound / 64, step, total)
    expected, factors = found.parts(bound)
    seen = torch.arange(64) != 5  # whose zero gradient underflows nowhere in float64
    assert torch.allclose(c[seen], factors[seen], rtol=1e-6)
    assert c[3] == 0
    assert (c <= 1).all()
    error = (total.double() * step - expected).abs().max()
    assert error < 1e-6 * expected.abs().max() + step


def test_small_steps_are_for_small_models_alone():
    found = lab(nn.Linear(300, 300), data(300, 300), rows=16)
    sizes = [leaf.numel() for leaf in found.program.leaves]
    assert small.build(found.path.runner, found.path.sites, found.path.shape, sizes) is None


def test_native_factors_are_the_twins():
    from casemate.engine import batched
    from casemate.engine.sites import Norm, Site, Way

    torch.manual_seed(2)
    squared = torch.rand(100, dtype=torch.float64) * torch.logspace(-30, 30, 100).double()
    spread = squared.sqrt() * 50
    squared[7], squared[9], squared[11] = float("nan"), float("inf"), 0.0
    spread[11] = 0.0
    sites = []
    for k, name in enumerate(("gram", "formed")):
        site = Site(name, [], {})
        site.way = Way(name, lambda env: Norm(squared), 1e-9 * (k + 1), 1e-5, k == 0)
        sites.append(site)
    norms = [Norm(squared, spread), Norm(squared * 0.5)]
    for bound in (1.0, 1e-3, float("inf")):
        made = small.factors(sites, norms, bound, 100, 2.0**-7 * bound / 100)
        if made is None:
            pytest.skip("no native helper")
        c, good = batched._factors(sites, norms, bound, 100)
        assert torch.equal(made[1], good)
        assert torch.allclose(made[0], c, rtol=3e-7, atol=1e-45)
