# ruff: noqa: E501 - one call a line
"""Every rule of the joint graph against torch: states, shapes, and that they are what they say.

Each operation that a model may hold is run forward and backward at two batch sizes; the proof of
what ran is then held against the numbers (see support.jointcases). Seeded bugs show that it bites.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
from collections import defaultdict
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from casemate.graph.model import DtypeArg
from casemate.graph.ops import JOINT, Batch, Call, Op, Value
from casemate.graph.ops import joint as joint_ops
from casemate.spec.errors import ModelError
from support.graphs import interpret
from support.jointcases import (
    Case,
    cases,
    constants,
    nonlinear,
    problems,
    refolded,
    shows,
    single,
    singles,
)
from support.jointgraph import seen
from support.rawgraph import ls, r
from unit.graph.test_graph_ops import GRAPHS, values_of, whole

OWN = {entry.schema.name for entry in joint_ops.TABLE}

# Seen, and knowingly without a rule.
REFUSED = {
    "aten.aminmax.default": "one_hot looks at all classes to see that they are in range",
    "aten._local_scalar_dense.default": "a number that depends on the data",
}

# Have a rule, and are run by no single operation of a model's.
ELSEWHERE = {"aten.alias.default", "aten.lift_fresh.default"}

X, T, W, M = Value("f32", (1, 4), Batch(0)), Value("f32", (1, 3, 4), Batch(0)), Value("f32", (4,)), Value("f32", (4, 4))  # fmt: skip
C, BOOL = Value("i64", (3,), None, (0, 3)), Value("bool", (4, 4))
ZERO = Value("f32", (4, 4), bounds=(0, 0))
ROW = Value("f32", (3, 4))

# Calls that no single operation makes, or makes on other states.
CALLS = (
    single("alias.default", {"x": T}, r("x")),
    single("lift_fresh.default", {"x": T}, r("x")),
    single("dot.default", {"x": Value("f32", (1,), Batch(0)), "y": Value("f32", (1,), Batch(0))}, r("x"), r("y")),
    single("dot.default", {"x": W, "y": W}, r("x"), r("y")),
    single("_to_copy.default", {"x": M}, r("x"), dtype=DtypeArg(dtype="f32")),
    single("masked_fill.Tensor", {"x": M, "m": BOOL, "z": Value("f32", (), bounds=(0, 0))}, r("x"), r("m"), r("z")),
    single("sub.Tensor", {"x": X, "y": X}, r("x"), r("y")),
    single("where.self", {"m": Value("bool", (1, 4), Batch(0)), "x": X, "y": X}, r("m"), r("x"), r("y")),
    single("where.self", {"m": BOOL, "z": ZERO, "x": M}, r("m"), r("z"), r("x")),
    single("select_scatter.default", {"z": ZERO, "x": W}, r("z"), r("x"), 0, 2),
    single("slice_scatter.default", {"z": ZERO, "x": ROW}, r("z"), r("x"), 0, 1, 4),
    single("index_put.default", {"z": ZERO, "i": C, "x": ROW}, r("z"), ls(r("i")), r("x"), True),
    single("index_add.default", {"z": ZERO, "i": C, "x": ROW}, r("z"), 0, r("i"), r("x"), alpha=2),
    single("scatter_add.default", {"z": ZERO, "i": Value("i64", (3, 4), None, (0, 3)), "x": ROW}, r("z"), 0, r("i"), r("x")),
    single("scatter.src", {"z": ZERO, "i": Value("i64", (3, 4), None, (0, 3)), "x": ROW}, r("z"), 0, r("i"), r("x")),
    single("gather.default", {"x": M, "i": Value("i64", (3, 4), None, (0, 3))}, r("x"), 0, r("i")),
    single("index_select.default", {"x": M, "i": C}, r("x"), 0, r("i")),
    single("index.Tensor", {"x": M, "i": C}, r("x"), ls(None, r("i"))),
)  # fmt: skip

# What is a function of parameters alone has S as its gradient. Some derivatives then do what is not
# proved linear, and such a model takes the slower path: the operation at fault, by case.
SLOWER = {
    "aten.where.self": "binary/maximum_fx binary/maximum_fw binary/maximum_fi binary/maximum_fb binary/maximum_fz "
    "binary/minimum_fx binary/minimum_fw binary/minimum_fi binary/minimum_fb binary/minimum_fz binary/mi reduce/cp",
    "aten.abs.default": "reduce/lc",
}


@functools.cache
def of(family: str) -> tuple[Case, ...]:
    made = cases(whole(family), GRAPHS[family], values_of)
    return tuple(dataclasses.replace(c, name=f"{family}/{c.name}") for c in made)


def slower(case: Case) -> str | None:
    """The operation by which the case is refused, where that is known."""
    name, _, tag = case.name.partition(":")
    known = {n: op for op, names in SLOWER.items() for n in names.split()}
    return known.get(name) if tag == "constant" else None


@functools.cache
def parts() -> dict[str, tuple[Case, ...]]:
    """By operation, up to four of its calls in all that ran."""
    found: dict[str, dict[object, Case]] = defaultdict(dict)
    for one in CALLS:
        found[one.nodes[0].op][id(one)] = one
    for case in itertools.chain.from_iterable(of(f) for f in GRAPHS):
        if slower(case):
            continue
        for one in singles(case):
            key = (tuple((v.dims, v.batch) for v in one.inputs.values()), str(one.nodes[0].args))
            mine = found[one.nodes[0].op]
            finite = all(x.isfinite().all() for x in one.data.values())
            if len(mine) < 5 and finite and not any(v.slot for v in one.inputs.values()):
                mine.setdefault(key, one)
    return {op: tuple(d.values()) for op, d in found.items()}


@pytest.mark.parametrize("family", GRAPHS)
def test_states_are_what_they_say(family: str) -> None:
    for case in of(family):
        if op := slower(case):
            with pytest.raises(ModelError) as e:
                case.prove()
            assert next(n.op for n in case.nodes if n.name == e.value.where) == op, case.name
            continue
        assert problems(case) == [], case.name
        values = case.prove()
        for name, want in zip(case.names, case.outputs, strict=True):
            if name is not None and name not in case.inputs:
                v = values[name]
                assert (v.dtype, v.dims, v.batch) == (want.dtype, want.dims, want.batch), case.name
                assert not v.summed
        for leaf, name in zip(case.leaves, case.gradients, strict=bool(case.gradients)):
            if name is not None:
                v, was = values[name], case.inputs[leaf]
                assert (v.dims, v.batch) == (was.dims, was.batch), case.name
                assert v.summed or v.batch is not None or v.bounds == (0, 0), case.name


def test_the_lists_are_complete() -> None:
    seen = frozenset[str]().union(*(case.seen for f in GRAPHS for case in of(f)))
    assert seen - set(JOINT) == set(REFUSED)
    assert OWN - seen == ELSEWHERE


def test_forward_alone_needs_no_more() -> None:
    """Without gradients torch takes other ways; they have rules too."""
    for family in GRAPHS:
        g = whole(family)
        torch.manual_seed(3)
        weights = {i.tensor: values_of(i, 0) for i in g.inputs if i.kind != "data"}
        weights["sorted"] = weights["sorted"].sort().values
        data = {i.name: values_of(i, 7) for i in g.inputs if i.kind == "data"}
        with torch.inference_mode():
            assert seen(lambda: interpret(g, weights, data)) - set(JOINT) <= set(REFUSED)  # noqa: B023


@pytest.mark.parametrize("name", sorted(OWN))
def test_schemas_are_torchs(name: str) -> None:
    space, op, overload = name.split(".")
    theirs = str(getattr(getattr(getattr(torch.ops, space), op), overload)._schema)
    assert JOINT[name].schema.text.replace("'", '"') == theirs.replace("'", '"')
    assert "!" not in theirs


def test_sums_have_a_site() -> None:
    sites = {op: e.site for op, e in JOINT.items() if e.contract is not None}
    assert sites == {
        "aten.mm.default": "outer", "aten.bmm.default": "outer", "aten.mv.default": "",
        "aten.dot.default": "", "aten.sum.default": "sum", "aten.sum.dim_IntList": "sum",
        "aten.convolution_backward.default": "convolution",
        "aten.embedding_dense_backward.default": "embedding",
        "aten.native_layer_norm_backward.default": "norm",
        "aten.native_group_norm_backward.default": "norm",
        "aten.native_batch_norm_backward.default": "norm",
        "aten.index_put.default": "", "aten.index_add.default": "",
    }  # fmt: skip


# --- folds: the batch folded with other axes, alike in all operands or not


def folds(case: Case) -> Iterator[tuple[bool, ...]]:
    wide = sum(v.batch is not None for v in case.inputs.values())
    return itertools.product((False, True), repeat=wide)


OPS = sorted(op for op, e in JOINT.items() if op in OWN or e.contract is not None)


@settings(max_examples=150, deadline=None, derandomize=True)
@given(st.data())
def test_any_fold_is_proved_or_refused(data: st.DataObject) -> None:
    op = data.draw(st.sampled_from([op for op in OPS if op in parts()]))
    case = data.draw(st.sampled_from(parts()[op]))
    sides = data.draw(st.sampled_from(list(folds(case))))
    folded = refolded(case, data.draw(st.integers(2, 3)), sides)
    alike = len(set(sides)) <= 1
    try:
        assert problems(folded) == []
        assert alike or op not in ("aten.mm.default", "aten.add.Tensor")
    except ModelError as e:
        assert not alike, str(e)
        assert e.where == folded.nodes[0].name


# What mixes nothing when folded askew: its operands are alike for all records.
HARMLESS = {"aten.hardsigmoid_backward.default"}


@pytest.mark.parametrize("op", OPS)
def test_a_rule_that_forgets_to_refuse_is_caught(op: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Operands folded askew mix records: with refusals silenced the numbers say so."""
    bites, tried = 0, 0
    for case in parts().get(op, ()):
        for sides in itertools.islice(folds(case), 1, 9):
            askew = refolded(case, 2, sides)
            try:
                askew.prove()
            except ModelError:
                tried += 1
                with monkeypatch.context() as m:
                    m.setattr(Call, "refuse", lambda self, *a: None)
                    bites += shows(askew)
        if bites:
            return
    assert not tried or op in HARMLESS


# --- seeded bugs in what a rule says


def _records_forgotten(v: Value) -> Value:
    return dataclasses.replace(v, batch=None)


def _sum_of_records(v: Value) -> Value:
    return dataclasses.replace(v, batch=None, summed=True)


def _sum_forgotten(v: Value) -> Value:
    return dataclasses.replace(v, summed=False)


def _sum_said_to_be_records(v: Value) -> Value:
    return dataclasses.replace(v, summed=False, batch=Batch(0, 1, v.dims[0]) if v.dims else None)


def _turned_fold(v: Value) -> Value:
    b = v.batch
    return v.view(v.dims, b and Batch(b.axis, b.inner, b.outer))


def _other_axis(v: Value) -> Value:
    if v.batch is None or v.rank < 2:
        return v
    k = (v.batch.axis + 1) % v.rank
    return v.view(v.dims, Batch(k, 1, v.dims[k]))


def _longer(v: Value) -> Value:
    return v.view((*v.dims[:-1], v.dims[-1] + 1), v.batch) if v.dims else v


def _other_dtype(v: Value) -> Value:
    return dataclasses.replace(v, dtype="i32" if v.dtype != "i32" else "f32", bounds=None)


BUGS: tuple[Callable[[Value], Value], ...] = (
    _records_forgotten, _sum_of_records, _sum_forgotten, _sum_said_to_be_records, _turned_fold,
    _other_axis, _longer, _other_dtype,
)  # fmt: skip


def _broken(entry: Op, bug: Callable[[Value], Value]) -> Op:
    def wrap(f: Callable[[Call], Any]) -> Callable[[Call], Any]:
        def rule(call: Call) -> Any:
            made = f(call)
            if made is None:
                return None
            return tuple(bug(v) for v in made) if isinstance(made, tuple) else bug(made)

        return rule

    contract = entry.contract and wrap(entry.contract)
    return dataclasses.replace(entry, rule=wrap(entry.rule), contract=contract)


@pytest.mark.parametrize("op", OPS)
def test_a_rule_that_says_another_state_is_caught(op: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if op not in parts():
        pytest.skip("tried in whole models alone")
    sound = JOINT[op]
    # Where a sum comes in, the proof itself says that a sum comes out.
    tried = [c for c in parts()[op] if not any(v.summed for v in c.inputs.values())]
    tried += [refolded(c, 2, sides) for c in tried for sides in list(folds(c))[:1]]
    made = [[v for n, v in c.prove().items() if n not in c.inputs and n != "_loss"] for c in tried]
    for bug in BUGS:
        touched = [
            c for c, vs in zip(tried, made, strict=True) if any(bug(v) != v for v in vs if v.numel)
        ]
        # A constant is what it is whether or not records are thought to lie in it.
        if not touched or (_constant(op) and bug not in (_longer, _other_dtype)):
            continue
        monkeypatch.setitem(JOINT, op, _broken(sound, bug))
        assert any(shows(c) for c in touched), bug.__name__
        monkeypatch.setitem(JOINT, op, sound)


def _constant(op: str) -> bool:
    return JOINT[op].schema.name.split(".")[1] in (
        "zeros", "zeros_like", "new_zeros", "full", "full_like", "new_full", "scalar_tensor",
        "_efficientzerotensor", "empty", "copy",
    )  # fmt: skip


# --- linear maps of sums


def assignments(case: Case) -> Iterator[Case]:
    """The case on constants, with each float operand S in turn, and all of them together."""
    still = constants(case)
    floats = [k for k, v in still.inputs.items() if v.floating]
    for chosen in [(k,) for k in floats] + ([tuple(floats)] if len(floats) > 1 else []):
        inputs = {
            k: dataclasses.replace(v, summed=True, bounds=None) if k in chosen else v
            for k, v in still.inputs.items()
        }
        yield dataclasses.replace(still, inputs=inputs)


def _admitted(op: str) -> Iterator[Case]:
    for case in parts().get(op, ()):
        for held in assignments(case):
            try:
                held.prove()
            except ModelError:
                continue
            yield held


ALL = sorted(JOINT)


@pytest.mark.parametrize("op", [op for op in ALL if JOINT[op].linear or JOINT[op].isometric])
def test_linear_maps_are_linear(op: str) -> None:
    tried = [nonlinear(case) for case in _admitted(op)]
    assert not any(tried), tried
    assert tried or op not in parts()


# Linear too, where nothing overflows; no gradient of a parameter was met there.
ALSO_LINEAR = {
    *(f"aten.{kind}_pad{n}d.default" for kind in ("reflection", "replication") for n in (1, 2, 3)),
    *(f"aten.upsample_{k}.default" for k in (
        "nearest1d", "nearest2d", "nearest3d", "linear1d", "bilinear2d", "bicubic2d", "trilinear3d",
    )),
    *(f"aten.{p}avg_pool{n}d.default" for p in ("", "_adaptive_") for n in (2, 3)),
    "aten.embedding.default", "aten.fill.Tensor", "aten.lerp.Scalar", "aten.nan_to_num.default",
    "aten.nll_loss_forward.default", "aten.nll_loss2d_forward.default",
}  # fmt: skip


@pytest.mark.parametrize("how", ["first", "each", "add"])
def test_an_op_said_to_be_linear_that_is_not_is_caught(
    how: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    missed = []
    for op in ALL:
        entry = JOINT[op]
        if entry.linear or op not in parts():
            continue
        monkeypatch.setitem(JOINT, op, dataclasses.replace(entry, linear=how))
        held = list(_admitted(op))
        if held and not any(_nonlinear(c) for c in held):
            missed.append(op)
        monkeypatch.setitem(JOINT, op, entry)
    assert set(missed) <= ALSO_LINEAR


def _nonlinear(case: Case) -> bool:
    try:
        return nonlinear(case) != []
    except RuntimeError:
        return True
