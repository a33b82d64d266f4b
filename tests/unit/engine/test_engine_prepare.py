"""Phase prepare: refusals, and figures that the plan needs."""

from __future__ import annotations

import dataclasses
import hashlib
import subprocess
import sys

import pytest
import torch

from casemate.engine import batched, clip, prepare, records
from casemate.spec.errors import FormatError, LimitError, ModelError, PlanError
from casemate.spec.job import InputBinding
from support import engine_lab as lab


def run(
    graph, weights, *, schemas=None, bindings=lab.BINDINGS, memory=4 << 30, packed=None, path="auto"
):
    packed = lab.packed(graph, weights) if packed is None else packed
    digest = "sha256:" + hashlib.sha256(packed).hexdigest()
    return prepare.prepare(
        packed, digest, schemas or [lab.schema(5, 3, 50)], bindings, lab.spec_of(8, 20), memory,
        path,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("asked", "path", "eta", "rounding"),
    [
        ("record", "record", clip.eta(15), 0.0),
        ("auto", "graph", batched.ETA, batched.ROUNDING * lab.spec_of(8, 20).privacy.clip),
    ],
)
def test_what_a_plan_needs_is_there(asked, path, eta, rounding):
    ready = run(*lab.mlp([5, 4, 3], frozen=1), path=asked)
    found = ready.prepared
    assert (found.dimension, found.parameters) == (15, 39)
    assert (found.certified_eta, found.rounding) == (eta, rounding)
    assert found.path[0] == ready.path == path
    assert (ready.fast is None) == (path == "record")
    assert found.seconds_per_microbatch > 0 and found.bytes > 0
    assert ready.keep


def test_a_prefix_seen_less_than_once_is_not_kept():
    assert not run(*lab.mlp([5, 4, 3], frozen=1), schemas=[lab.schema(5, 3, 10**6)]).keep


def test_the_weights_are_those_packed():
    graph, weights = lab.mlp([5, 4, 3])
    program = run(graph, weights).program
    assert all(torch.equal(t, weights[n]) for n, t in program.result().items())


def test_probing_leaves_no_trace():
    graph, weights = lab.mlp([5, 4, 3])
    first, second = run(graph, weights).program, run(graph, weights).program
    assert torch.equal(first.flat, second.flat)


def test_other_bytes_than_those_named_are_refused():
    packed = lab.packed(*lab.mlp([5, 3]))
    with pytest.raises(ModelError) as refused:
        prepare.prepare(packed, "sha256:" + "0" * 64, [], (), lab.spec_of(1, 1), 1 << 40)
    assert refused.value.code == "model.digest"


@pytest.mark.parametrize("packed", [b"", b"\0" * 64, b"\xff" * 64])
def test_bytes_that_are_no_model_are_refused(packed):
    with pytest.raises(FormatError):
        run(*lab.mlp([5, 3]), packed=packed)


def test_a_schema_that_does_not_fit_is_refused():
    with pytest.raises(PlanError):
        run(*lab.mlp([5, 3]), schemas=[lab.schema(5, 3, 9), lab.schema(4, 3, 9, name="other")])
    with pytest.raises(PlanError):
        run(*lab.mlp([5, 3]), bindings=(InputBinding(input="x", columns=("x",)),))


def test_too_little_memory_is_refused():
    with pytest.raises(LimitError) as refused:
        run(*lab.mlp([5, 3]), memory=1 << 20)
    assert refused.value.code == "limit.memory"


def test_a_model_that_fails_on_a_declared_row_is_refused():
    """Labels up to 9 where the model knows 3 classes."""
    with pytest.raises(ModelError):
        run(*lab.mlp([5, 3]), schemas=[lab.schema(5, 10, 50)])


def test_a_gradient_that_changes_from_call_to_call_is_refused(monkeypatch):
    right = records.record

    def path(*args):
        inner, calls = right(*args), iter(range(10**9))

        def gradients(row, out):
            inner(row, out)
            out[0] += next(calls)

        return gradients

    monkeypatch.setattr(prepare, "record", path)
    with pytest.raises(ModelError) as refused:
        run(*lab.mlp([5, 3]))
    assert refused.value.code == "model.not-reproducible"


def test_an_unknown_op_is_refused_by_name():
    graph, weights = lab.mlp([5, 3])
    nodes = (*graph.nodes[:-1], lab.node("loss", "aten.nonesuch.default", "%h0"))
    with pytest.raises(ModelError, match="loss"):
        run(dataclasses.replace(graph, nodes=nodes), weights)


def test_labels_beyond_the_classes_are_refused_from_the_schema_alone():
    """Else a record's label would decide whether an error is raised (P6)."""
    graph, weights = lab.mlp([5, 4, 3])
    with pytest.raises(ModelError) as refused:
        run(graph, weights, schemas=[lab.schema(5, 4, 50)])
    assert refused.value.code == "model.index-range"


@pytest.mark.parametrize("columns", [(), ("nothing",), ("y",), ("x", "x"), ("x", "y")])
def test_bindings_that_do_not_fit_are_refused(columns):
    bindings = (InputBinding(input="x", columns=columns), lab.BINDINGS[1])
    with pytest.raises(PlanError):
        run(*lab.mlp([5, 4, 3]), bindings=bindings)


def test_what_its_server_once_held_is_no_memory_of_a_workers():
    """A quote's bytes would tell the size of others' results, and jobs would be refused for it."""
    measures = "from casemate.engine import prepare; print(prepare.resident())"
    starts = (
        "import subprocess, sys; x = b'x' * (1500 << 20); del x;"
        "subprocess.run([sys.executable, '-c', sys.argv[1]], start_new_session=True, check=True)"
    )
    done = subprocess.run(
        [sys.executable, "-c", starts, measures], capture_output=True, text=True, check=True
    )
    assert 0 < int(done.stdout) < 1200 << 20
