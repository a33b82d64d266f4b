"""Kinds of models that run once the worker is shut in: no kernel needs code, files or threads then
that phase ``prepare`` did not leave."""

from __future__ import annotations

import dataclasses
import hashlib
import os
from collections.abc import Callable, Sequence

import numpy as np
import pytest
import torch
from torch import nn

from casemate.client.torch import export
from casemate.engine import rows
from casemate.server import pool
from casemate.spec import frames, tensors
from casemate.spec.data import Column, DatasetSchema
from casemate.spec.messages import Done, Locked, Prepare, Prepared
from support import engine_lab as lab
from support import models
from support.worker_lab import KEY, SALT, answer, ask, job, worker

ROWS = 24


def image(side: int) -> Column:
    return Column(name="input", dtype="f32", shape=(3, side, side), low=-2.0, high=2.0)


WORDS = Column(name="tokens", dtype="i64", shape=(6,), low=0, high=39)
KINDS: dict[str, tuple[Callable[[], nn.Module], Sequence[Column], int]] = {
    "convolutions": (models.vgg, [image(16)], 5),
    "depthwise": (lambda: models.EfficientNet(5, 0.25), [image(32)], 5),
    "residual": (models.resnet, [image(8)], 5),
    "recurrent": (lambda: models.Recurrent("LSTM"), [WORDS], 3),
    "attention": (models.Attention, [WORDS], 3),
}
LIGHT = {("convolutions", "2")}


@pytest.mark.parametrize(
    ("kind", "threads"),
    [
        (k, t) if (k, t) in LIGHT else pytest.param(k, t, marks=pytest.mark.full)
        for k in KINDS
        for t in "12"
    ],
)
def test_a_kind_of_model_runs_shut_in(kind: str, threads: str) -> None:
    make, features, classes = KINDS[kind]
    torch.manual_seed(0)
    label = Column(name="target", dtype="i64", low=0, high=classes - 1, role="label")
    schema = DatasetSchema(name="t", columns=(*features, label), rows=ROWS, units=ROWS)
    packed, bindings = export(make(), schema, loss="cross_entropy")
    rng = np.random.default_rng(3)
    table = {
        c.name: torch.cat([rows.synthetic([c], rng) for _ in range(ROWS)]) for c in schema.columns
    }
    wire = lab.to_wire(table)
    message = Prepare(
        key=KEY,
        model_digest="sha256:" + hashlib.sha256(packed.data).hexdigest(),
        schemas=(schema,),
        inputs=bindings,
        train=lab.spec_of(8, 3),
        memory_bytes=8 << 30,
        threads=int(threads),
        sandbox=pool.layers(),
    )
    with worker(threads) as (sock, process):
        prepared = ask(sock, message, lab.sealed_fd(KEY, packed.data))
        assert isinstance(prepared, Prepared), prepared
        locked, _ = frames.receive(sock, (Locked,), timeout=60)
        assert set(locked.layers) == set(message.sandbox)
        memfd = os.memfd_create("result")
        run = lab.run_of(message, prepared, wire, KEY, SALT)
        done = ask(sock, run, lab.sealed_fd(KEY, wire), os.dup(memfd))
        assert isinstance(done, Done), done
        found = tensors.load(os.pread(memfd, done.bytes, 0))
        os.close(memfd)
        assert process.wait(timeout=30) == 0
    flat = [torch.frombuffer(bytearray(raw), dtype=torch.float32) for _, raw in found.values()]
    assert sum(t.numel() for t in flat) == prepared.dimension
    assert all(torch.isfinite(t).all() for t in flat)


def test_a_worker_that_lacks_a_promised_layer_takes_no_data() -> None:
    made = job()
    promised = dataclasses.replace(made.prepare, sandbox=("seccomp", "a layer of tomorrow"))
    with worker() as (sock, process):
        assert isinstance(ask(sock, promised, lab.sealed_fd(KEY, made.model)), Prepared)
        failed = answer(sock)
        assert (failed.phase, failed.code) == ("lock", "internal.sandbox")
        assert "a layer of tomorrow" in failed.message
        assert process.wait(timeout=30) != 0
