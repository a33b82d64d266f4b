"""A worker process, spoken to over its socket pair as the server does."""

from __future__ import annotations

import dataclasses
import hashlib
import os

import pytest
import torch

from casemate.spec import frames, tensors
from casemate.spec.errors import NetError
from casemate.spec.messages import CheckDataset, Checked, Done, Failed, Locked, Prepared, Ready
from support import engine_lab as lab
from support.worker_lab import (
    ANSWERS,
    CLASSES,
    FEATURES,
    KEY,
    ROWS,
    SALT,
    ask,
    job,
    run_of,
    worker,
)


def check_message(schema, wire):
    return CheckDataset(dataset=lab.commitment(SALT, wire), schema=schema, key=KEY, salt=SALT)


def test_a_job_from_prepare_to_weights():
    made = job()
    prepare, weights = made.prepare, made.weights
    with worker() as (sock, process):
        prepared = ask(sock, prepare, lab.sealed_fd(KEY, made.model))
        assert isinstance(prepared, Prepared), prepared
        assert prepared.dimension == sum(t.numel() for t in weights.values())
        locked, _ = frames.receive(sock, (Locked,), timeout=60)
        assert {"rlimits", "environment", "descriptors", "no-import"} <= set(locked.layers)
        run = run_of(made, prepared)
        memfd = os.memfd_create("result")
        done = ask(sock, run, lab.sealed_fd(KEY, made.wire), os.dup(memfd))
        assert isinstance(done, Done), done
        result = tensors.load(os.pread(memfd, done.bytes, 0))
        assert os.fstat(memfd).st_size == done.bytes
        os.close(memfd)
        assert process.wait(timeout=30) == 0
    assert {n: i.shape for n, (i, _) in result.items()} == {
        n: tuple(t.shape) for n, t in weights.items()
    }
    moved = torch.frombuffer(bytearray(result["w0"][1]), dtype=torch.float32)
    assert not torch.equal(moved, weights["w0"].reshape(-1))


def test_a_good_dataset_is_checked():
    schema = lab.schema(FEATURES, CLASSES, ROWS)
    wire = lab.to_wire(lab.table(schema))
    with worker() as (sock, process):
        answer = ask(sock, check_message(schema, wire), lab.sealed_fd(KEY, wire))
        assert answer == Checked(dataset=lab.commitment(SALT, wire))
        assert process.wait(timeout=30) == 0


def test_a_refused_model_names_its_node():
    prepare = job().prepare
    graph, weights = lab.mlp([FEATURES, 3, CLASSES])
    nodes = (*graph.nodes[:-1], lab.node("loss", "aten.system.default", "%h1"))
    model = lab.packed(dataclasses.replace(graph, nodes=nodes), weights)
    digest = "sha256:" + hashlib.sha256(model).hexdigest()
    with worker() as (sock, process):
        answer = ask(
            sock, dataclasses.replace(prepare, model_digest=digest), lab.sealed_fd(KEY, model)
        )
        assert isinstance(answer, Failed)
        assert answer.phase == "prepare"
        assert answer.code.startswith("model.")
        assert "loss" in answer.message
        assert process.wait(timeout=30) == 1


def test_a_run_out_of_order_ends_the_worker():
    with worker() as (sock, process):
        answer = ask(sock, Ready(pid=1))
        assert isinstance(answer, Failed)
        with pytest.raises(NetError):
            frames.receive(sock, ANSWERS, timeout=30)
        assert process.wait(timeout=30) == 1
