"""Graphs made to cost the server more than they look: memory and time for nothing.

Each is refused by the check, by the node's name, before a kernel runs. What only backward costs is
counted with backward.
"""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
import resource
from collections.abc import Sequence
from typing import Any

import pytest
import torch

from casemate.engine import prepare as prepare_
from casemate.engine.program import Program
from casemate.graph import check, pack
from casemate.graph.model import Graph, ListArg, Node, Ref
from casemate.graph.ops import TABLE
from casemate.spec.errors import CasemateError, LimitError, ModelError
from support import engine_lab as lab
from support.desk import Desk, Refused, run_async
from support.graphs import interpret
from support.rawgraph import INPUTS, B, data, graph, infos, ls, node, r, run, weight
from support.server import mlp

BIG = 2**28


def refused(graph_: Graph, where: str, code: str = "model.too-large", **how: Any) -> None:
    with pytest.raises(ModelError) as e:
        check.check(graph_, infos(graph_), **how)
    assert (e.value.code, e.value.where) == (code, where), str(e.value)
    assert e.value.mend


def trained(*nodes: Node, last: str) -> Graph:
    """The nodes, then a loss that every trained scalar of ``last`` reaches."""
    end = (
        node("end", "sum.default", r(last)),
        node("l0", "mul.Tensor", r("x"), r("end")),
        node("l", "sum.dim_IntList", r("l0"), ls(1)),
    )
    return Graph(inputs=INPUTS, nodes=(*nodes, *end), loss="l")


# Cheap forward, huge backward.


def looks(count: int, size: int, op: str = "select.int", *args: Any) -> Graph:
    """One weight seen as ``size`` of them (no memory at all), of which one is looked at, ``count``
    times: backward makes a gradient of ``size`` elements for each look."""
    see = node("see", "expand.default", r("one"), ls(size))
    at = [node(f"s{i}", op, r("see"), *(args or (0, i))) for i in range(count)]
    inputs = (data("x", 4), weight("one", 1))
    stack = node("st", "cat.default" if args else "stack.default", ls(*(r(n.name) for n in at)), 0)
    end = (
        node("end", "sum.default", r("st")),
        node("l0", "mul.Tensor", r("x"), r("end")),
        node("l", "sum.dim_IntList", r("l0"), ls(1)),
    )
    return Graph(inputs=inputs, nodes=(see, *at, stack, *end), loss="l")


@pytest.mark.parametrize(
    ("op", "args"),
    [("select.int", ()), ("slice.Tensor", (0, 0, 1)), ("unfold.default", (0, BIG, 1))],
)
def test_takes_minutes_by_looking_at_one_element_many_times(op: str, args: tuple[int, ...]) -> None:
    g = looks(300, BIG, op, *args)
    with pytest.raises(ModelError) as e:
        check.check(g, infos(g))
    assert e.value.code == "model.too-large"


def test_backward_of_a_look_is_as_large_as_what_was_looked_at() -> None:
    """Why it is counted so: torch makes that gradient in full."""
    g = looks(3, 1 << 20)
    found = check.check(g, infos(g))
    assert found.workspace_bytes >= 4 << 20
    one = torch.ones(1, requires_grad=True)
    see = one.expand(1 << 20)
    shapes: list[int] = []
    see.register_hook(lambda grad: shapes.append(grad.untyped_storage().nbytes()))
    see[7].backward()
    assert shapes == [4 << 20]


def test_takes_terabytes_by_a_product_that_broadcasts() -> None:
    """Backward of a broadcast matrix product makes the factor's gradient once for each place, and
    sums only then: forward 1 GiB, backward 4 TiB."""
    inputs = (*INPUTS, data("a", 2**16, 1, 2**12), weight("o", 1, 2**12, 2**12))
    g = graph(node("p", "matmul.default", r("a"), r("o")), inputs=inputs)
    refused(g, "p")
    plain = (*INPUTS, data("a", 2**10, 2**12), weight("o", 2**12, 2**12))
    g = graph(node("p", "matmul.default", r("a"), r("o")), inputs=plain)
    assert check.check(g, infos(g)).workspace_bytes < 1 << 27  # in one piece: admitted


def test_takes_hours_by_windows_as_large_as_the_image() -> None:
    """A pool of windows of a quarter of an image each: few elements in, few out, and as many reads
    as places times window."""
    inputs = (*INPUTS, data("big", 1, 8192, 8192))
    for kind in ("avg_pool2d.default", "max_pool2d.default"):
        pool = node("p", kind, r("big"), ls(4096, 4096), ls(1, 1))
        refused(graph(pool, inputs=inputs), "p")
    usual = graph(node("p", "max_pool2d.default", r("big"), ls(3, 3), ls(1, 1)), inputs=inputs)
    check.check(usual, infos(usual))


def peak(work: Any) -> int:
    """The most bytes of tensors alive at once while ``work`` runs, beside those there before."""
    now = most = 0
    with torch.profiler.profile(profile_memory=True) as seen:
        work()
    events = seen.profiler.kineto_results.events()  # type: ignore[union-attr]
    for event in sorted(events, key=lambda e: e.start_ns()):
        if event.name() == "[memory]":
            now += event.nbytes()
            most = max(most, now)
    return most


N = 2**16
SQUARE = (256, 256)
COSTLY = {
    "product of rows": ("prod.dim_int", r("sq"), 1),
    "running product": ("cumprod.default", r("sq"), 1),
    "running sum": ("cumsum.default", r("sq"), 1),
    "running sum of exponentials": ("logcumsumexp.default", r("sq"), 1),
    "a power of weights": ("pow.Tensor_Tensor", r("sq"), r("sq")),
    "a root of an angle": ("atan2.default", r("sq"), r("sq")),
    "sorted": ("sort.default", r("sq"), 1),
    "largest": ("topk.default", r("sq"), 128, 1),
    "softmax": ("log_softmax.int", r("sq"), 1),
    "norm of rows": ("linalg_vector_norm.default", r("sq"), 2, ls(1)),
    "layer norm": ("layer_norm.default", r("sq"), ls(256)),
    "variance": ("var.correction", r("sq"), ls(1)),
    "product of matrices": ("matmul.default", r("sq"), r("sq")),
    "broadcast product": ("matmul.default", r("lead"), r("mat")),
    "windows": ("unfold.default", r("sq"), 1, 64, 8),
    "columns": ("im2col.default", r("image"), ls(5, 5), ls(1, 1), ls(0, 0), ls(1, 1)),
    "convolution": ("conv2d.default", r("image"), r("kernel")),
    "transposed convolution": ("conv_transpose2d.input", r("image"), r("kernel"), None, ls(2, 2)),
    "pool": ("max_pool2d.default", r("image"), ls(5, 5), ls(1, 1)),
    "mean pool": ("avg_pool2d.default", r("image"), ls(5, 5), ls(1, 1)),
    "enlarged": ("upsample_bicubic2d.vec", r("image"), ls(512, 512), False, None),
    "one place": ("select.int", r("sq"), 0, 3),
    "one place of a view": ("select.int", r("seen"), 0, 3),
    "one row written": ("select_scatter.default", r("sq"), r("one"), 0, 3),
    "picked": ("index_select.default", r("sq"), 0, r("places")),
    "looked up": ("embedding.default", r("sq"), r("places")),
    "attention": ("scaled_dot_product_attention.default", r("tokens"), r("tokens"), r("tokens")),
    "joined": ("cat.default", ls(r("sq"), r("sq")), 0),
    "reflected": ("reflection_pad2d.default", r("image"), ls(9, 9, 9, 9)),
    "gated": ("glu.default", r("sq"), 1),
    "recurrent": (
        "lstm.input", r("words"), ls(r("h0"), r("h0")), ls(r("ih"), r("hh")), False, 1, 0.0, False,
        False, True),
    "hyperbolic": ("mish.default", r("sq")),
}  # fmt: skip
COST_INPUTS = (
    data("x", 4), weight("sq", *SQUARE), weight("image", 1, 1, *SQUARE),
    weight("kernel", 1, 1, 5, 5), weight("lead", 64, 1, 64), weight("mat", 1, 64, 64),
    weight("one", 256), weight("tokens", 4, 256, 64), data("words", 128, 64),
    weight("places", 512, dtype="i64", kind="frozen"), weight("ih", 256, 64), weight("hh", 256, 64),
)  # fmt: skip


def measured(what: str, args: Sequence[Any] = ()) -> tuple[int, int]:
    """Bytes that torch takes for forward and backward of one node, and the bytes counted; ``what``
    is a case, or an op with its arguments."""
    op, *args = (what, *args) if args else COSTLY[what]
    several = op in ("sort.default", "topk.default", "lstm.input")
    before = {
        "one place of a view": node("seen", "expand.default", r("sq"), ls(8, -1, -1)),
        "recurrent": node("h0", "zeros.default", ls(1, B, 64)),
    }
    nodes = (
        *([before[what]] if what in before else []),
        node("p", op, *args),
        node("end", "sum.dim_IntList", r("p.0"), ls(1, 2)) if what == "recurrent"
        else node("end", "sum.default", r("p.0" if several else "p")),
        *([] if what == "recurrent" else [
            node("l0", "mul.Tensor", r("x"), r("end")),
            node("loss", "sum.dim_IntList", r("l0"), ls(1)),
        ]),
    )  # fmt: skip
    used = {a.name for n in nodes for a in _refs(n)} | {"x"}
    inputs = tuple(i for i in COST_INPUTS if i.name in used)
    g = Graph(inputs=inputs, nodes=nodes, loss="end" if what == "recurrent" else "loss")
    found = check.check(g, infos(g))
    made = torch.Generator().manual_seed(1)
    weights = {
        i.tensor: torch.rand(tuple(d for d in i.shape if isinstance(d, int)), generator=made)
        for i in inputs if i.kind == "param"
    }  # fmt: skip
    for t in weights.values():
        t.requires_grad_()
    fixed = {"places": torch.arange(512) % 256}
    row = {"x": torch.ones(1, 4), "words": torch.ones(1, 128, 64)}
    taken = peak(lambda: interpret(g, weights | fixed, row)[g.loss].sum().backward())
    counted = found.saved_bytes + found.fixed_bytes + found.workspace_bytes + 4 * found.dimension
    return taken, counted


def bounded(taken: int, counted: int) -> bool:
    return taken <= 1.1 * counted + (64 << 10)


@pytest.mark.parametrize("what", COSTLY)
def test_what_is_counted_bounds_what_torch_takes(what: str) -> None:
    """Measured, so that no count is a wish; and not counted far above."""
    taken, counted = measured(what)
    assert bounded(taken, counted), f"{taken} bytes, {counted} counted"
    assert counted <= 10 * max(taken, 4 * N)


GIVEN = {"Tensor": r("sq"), "Scalar": 0.5, "float": 0.5, "int": 1, "int[]": ls(1)}


@pytest.mark.full
def test_every_op_that_takes_a_square_is_counted() -> None:
    """All of the table that can be called with nothing but this."""
    tried, beyond = 0, []
    for name, entry in TABLE.items():
        kinds = [p.kind for p in entry.schema.params if p.required]
        if not set(kinds) <= GIVEN.keys():
            continue
        try:
            taken, counted = measured(name.removeprefix("aten."), [GIVEN[k] for k in kinds])
        except (ModelError, RuntimeError):  # it wants other shapes or dtypes
            continue
        tried += 1
        if not bounded(taken, counted):
            beyond.append((name, taken, counted))
    assert not beyond
    assert tried > 100


@pytest.mark.parametrize("what", ["running sum of exponentials", "attention", "convolution"])
def test_a_count_without_backwards_workspace_is_seen(
    what: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    name = f"aten.{COSTLY[what][0]}"
    bare = dataclasses.replace(TABLE[name], workspace=lambda call, out: 0)
    monkeypatch.setitem(TABLE, name, bare)
    assert not bounded(*measured(what))


def _refs(of: Node) -> list[Any]:
    flat = [x for a in of.args for x in (a.items if isinstance(a, ListArg) else (a,))]
    return [x for x in flat if isinstance(x, Ref)]


# What is too large to be.

SIZES = {
    "2^40 elements in one value": [node("p", "zeros.default", ls(2**20, 2**20))],
    "2^40 elements of a record": [node("p", "zeros.default", ls(*[2**10] * 4))],
    "2^40 by a view": [
        node("z", "expand.default", r("w"), ls(2**20, 4)),
        node("p", "expand.default", r("z"), ls(2**20, -1, -1)),
    ],
    "2^40 by enlarging": [node("p", "upsample_nearest2d.vec", r("im"), None, ls(2.0**19, 2.0**19))],
    "2^40 by repeating": [node("p", "repeat.default", r("x"), ls(1, 2**40))],
    "2^40 by interleaving": [node("p", "repeat_interleave.self_int", r("x"), 2**40, 1)],
    "2^40 classes": [node("p", "one_hot.default", r("i"), 2**40)],
    "2^52 counted": [node("p", "arange.default", 2**52)],
    "2^53 steps": [node("p", "linspace.default", 0, 1, 2**53 - 1)],
    "a square of 2^30": [node("p", "eye.default", 2**30)],
    "an axis above 2^31 of nothing": [node("p", "zeros.default", ls(0, 2**32))],
    "axes by the hundred": [node("p", "zeros.default", ls(*[1] * 100))],
}


@pytest.mark.parametrize("what", SIZES)
def test_takes_memory_by_one_node(what: str) -> None:
    refused(graph(*SIZES[what]), "p")


DOUBLE = {
    "joined with itself": lambda a, b: node(b, "cat.default", ls(r(a), r(a)), 1),
    "repeated": lambda a, b: node(b, "repeat.default", r(a), ls(1, 2)),
    "interleaved": lambda a, b: node(b, "repeat_interleave.self_int", r(a), 2, 1),
    "padded by its size": lambda a, b: node(
        b, "constant_pad_nd.default", r(a), ls(0, 4 << int(b[1:]))
    ),
}


@pytest.mark.parametrize("what", DOUBLE)
def test_takes_memory_by_doubling(what: str) -> None:
    names = ["x", *(f"d{i}" for i in range(60))]
    nodes = [DOUBLE[what](a, b) for a, b in itertools.pairwise(names)]
    with pytest.raises(ModelError) as e:
        run(*nodes)
    assert e.value.code == "model.too-large"
    assert int(e.value.where[1:]) < 28


def test_takes_memory_by_many_values_that_are_each_admitted() -> None:
    """64 GiB of zeros, 64 times the largest; and the same as intermediates of a record."""
    with pytest.raises(ModelError) as e:
        run(*(node(f"n{i}", "zeros.default", ls(BIG)) for i in range(64)))
    assert (e.value.code, e.value.where) == ("model.too-large", "n2")
    nodes = [node("n0", "expand.default", r("x"), ls(-1, 4))]
    wide = [node(f"n{i}", "constant_pad_nd.default", r("x"), ls(0, BIG - 4)) for i in range(1, 40)]
    with pytest.raises(ModelError) as e:
        run(*nodes, *wide)
    assert e.value.code == "model.too-large"


def test_takes_memory_by_a_norm_of_all_that_no_weight_needs() -> None:
    """Constants count too: no trained weight is near."""
    chain = [node("c0", "ones.default", ls(2**14, 2**14))]
    chain += [node(f"c{i}", "mm.default", r(f"c{i - 1}"), r("c0")) for i in range(1, 10)]
    with pytest.raises(ModelError) as e:
        run(*chain)
    assert e.value.code == "model.too-large"


# What makes the check itself expensive.


def test_takes_the_checkers_memory_by_outputs_that_cost_nothing() -> None:
    """A hundred thousand nodes are admitted; with 4096 outputs each they are 400 million values."""
    see = node("z", "expand.default", r("w"), ls(4096, 4))
    with pytest.raises(ModelError) as e:
        run(see, *(node(f"u{i}", "unbind.int", r("z")) for i in range(1000)))
    assert e.value.code == "model.too-large"
    assert int(e.value.where[1:]) < 64


def million(item: Any) -> ListArg:
    return ListArg(items=(item,) * 10**6)


LONG = {
    "a product of a million sizes": ("reshape.default", r("x"), million(2**53 - 1)),
    "a permutation of a million axes": ("permute.default", r("x"), million(0)),
    "a million joined": ("cat.default", million(r("x")), 1),
    "a million indices": ("index.Tensor", r("x"), million(None)),
    "a million parts": ("split_with_sizes.default", r("x"), million(0), 1),
}


@pytest.mark.parametrize("what", LONG)
def test_takes_the_checkers_time_by_a_long_list(what: str) -> None:
    """The product of sizes alone would take a quarter of an hour: each step a longer number."""
    op, *args = LONG[what]
    refused(graph(node("p", op, *args)), "p")


@pytest.mark.parametrize("count", [2**21, 2**40, 2**53 - 1])
@pytest.mark.parametrize("name", ["stride", "padding", "dilation"])
def test_overflows_a_kernels_arithmetic_by_windows(name: str, count: int) -> None:
    """Padding and dilation that cancel each other leave a usual shape."""
    kwargs = {"stride": ls(1), "padding": ls(0), "dilation": ls(1)} | {name: ls(count)}
    if name == "dilation":
        kwargs["padding"] = ls(count)
    bad = node("p", "conv2d.default", r("im"), r("k"), None, **kwargs)
    refused(graph(bad), "p", "model.argument")


def test_too_many_nodes_and_inputs() -> None:
    limits = check.Limits(nodes=10, inputs=20)
    nodes = [node(f"n{i}", "relu.default", r("x")) for i in range(12)]
    refused(graph(*nodes), "", limits=limits)
    many = tuple(weight(f"w{i}", 1) for i in range(21))
    refused(graph(inputs=(*INPUTS, *many)), "", limits=limits)


# As the worker meets them.


def offered(nodes: list[Node], memory: int, units: int = 16) -> CasemateError:
    """What phase ``prepare`` answers to a model of these nodes, on a dataset of so many units."""
    g, weights = lab.mlp([4, 2])
    g = dataclasses.replace(g, nodes=(*nodes, *g.nodes))
    packed = lab.packed(g, weights)
    schema = dataclasses.replace(lab.schema(4, 2, 16), units=units)
    with pytest.raises(CasemateError) as e:
        prepare_.prepare(
            packed, "sha256:" + hashlib.sha256(packed).hexdigest(), (schema,), lab.BINDINGS,
            lab.spec_of(4, 1), memory,
        )  # fmt: skip
    return e.value


def test_takes_the_workers_memory_before_it_is_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    """Admitted by the check, too large for this worker: said before anything is built or run."""

    def built(*given: object) -> None:
        raise AssertionError("a program was made")

    monkeypatch.setattr(Program, "__init__", built)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    wide = [node(f"n{i}", "constant_pad_nd.default", r("x"), ls(0, 2**27)) for i in range(12)]
    error = offered(wide, 4 << 30)
    assert isinstance(error, LimitError)
    assert error.code == "limit.memory"
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 256 << 10


@pytest.mark.parametrize("units", [2**28, 2**40])
def test_burns_everybodys_budget_by_units_that_are_not_there(units: int) -> None:
    """An owner may pad the number of units. Padded to where the places of all units do not fit, a
    job over several datasets would be charged to all, and then fail."""
    error = offered([], 4 << 30, units)
    assert error.code == "limit.memory"


def test_a_graph_of_empty_lists_is_refused_before_it_is_read() -> None:
    """32 MiB of brackets would be 11 million lists, a gigabyte of them."""
    body = b'{"inputs":[' + b",".join([b"[]"] * 3_000_000) + b"]}"
    body += b" " * (-len(body) % 8)
    with pytest.raises(CasemateError) as e:
        pack.unpack(len(body).to_bytes(8, "little") + body)
    assert e.value.code == "format.too-large"


@pytest.mark.parametrize("what", ["table", "model"])
def test_an_upload_that_no_worker_can_hold_starts_none(what: str) -> None:
    """64 GiB may be uploaded; they are refused by their size, before a worker opens them."""

    async def work() -> None:
        async with Desk(worker_bytes=2500) as desk:
            person = await desk.person("someone")
            info = await person.push(rows=64)
            assert info.state == "ready"
            told = len(desk.script.told)
            with pytest.raises(Refused) as e:
                if what == "table":
                    await person.push(rows=128)
                else:
                    await person.quote(info, model=mlp(hidden=64))
            assert (e.value.code, e.value.error["where"]) == ("limit.memory", "upload")
            assert len(desk.script.told) == told

    run_async(work())


# Seeded bugs.


@pytest.mark.parametrize(
    ("limit", "bomb"),
    [
        ("moved", lambda: looks(300, BIG)),
        ("moved", lambda: looks(300, BIG, "slice.Tensor", 0, 0, 1)),
        ("items", lambda: graph(node("p", "cat.default", ListArg(items=(r("x"),) * 5000), 1))),
    ],
)
def test_without_the_limit_the_bomb_is_admitted(limit: str, bomb: Any) -> None:
    g = bomb()
    loose = dataclasses.replace(check.Limits(), **{limit: 2**60})
    check.check(g, infos(g), limits=loose)
    with pytest.raises(ModelError):
        check.check(g, infos(g))
