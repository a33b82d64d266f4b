"""What BastionAI, as it was released, let happen (design, section 8): each attack again, one test
each, on the real server, client and worker of today."""

from __future__ import annotations

import base64
import dataclasses
import io
import json
import os
import pickle
import re
import struct
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from casemate.accounting import pld
from casemate.attest.trust import Trust
from casemate.attest.verify import verify_attestation
from casemate.client import connection, receipts
from casemate.client.torch import export, groupnorm
from casemate.graph import pack
from casemate.graph.model import ListArg, Node, Ref
from casemate.plan.quote import recompute
from casemate.server.routes import ROUTES
from casemate.spec import codec, tensors
from casemate.spec.data import Budget, DatasetInfo, Policy
from casemate.spec.errors import CasemateError, EvidenceError, ModelError
from casemate.spec.job import JobStatus, Quote
from casemate.spec.receipt import ReceiptBundle
from support.server import FEATURES, Party, RunningServer, mlp, schema, start, train_spec

pytestmark = pytest.mark.e2e

MARK = struct.pack("<4f", 1.2345678, -2.3456789, 3.3333333, -0.9876543)
ROWS = 64


@pytest.fixture(scope="module")
def dataset(owner: Party) -> DatasetInfo:
    """Rows of which the first holds a mark."""
    from support.server import table

    found = owner.push(ROWS, wire=table(ROWS, marker=MARK), budget=Budget(epsilon=50, delta=1e-2))
    assert found.state == "ready"
    return found


@pytest.fixture(scope="module")
def done(scientist: Party, dataset: DatasetInfo) -> tuple[Quote, JobStatus]:
    quote = scientist.quote([dataset], train=train_spec(epsilon=6.0, steps=20, batch=16))
    status = scientist.wait(scientist.submit(quote).job)
    assert status.state == "done", status
    return quote, status


def refused(scientist: Party, dataset: DatasetInfo, model: pack.Packed) -> CasemateError:
    with pytest.raises(CasemateError) as e:
        scientist.quote([dataset], model)
    assert e.value.mend
    return e.value


def with_nodes(*nodes: Node) -> pack.Packed:
    """The usual model with these nodes before its loss."""
    graph, weights = pack.unpack(mlp().data)
    made = dataclasses.replace(graph, nodes=(*graph.nodes, *nodes))
    return pack.pack(made, {n: (i.dtype, i.shape, bytes(v)) for n, (i, v) in weights.items()})


def test_epsilon_was_off_by_orders_of_magnitude(
    owner: Party, dataset: DatasetInfo, done: tuple[Quote, JobStatus]
) -> None:
    """Declared 6, true about 4,276: no accountant had chosen the noise. Now what is declared bounds
    what an accountant finds in the plan's events, and that is what the owner is charged."""
    quote, _ = done
    plan = quote.plan
    charge, tight = recompute(plan, quote.delta)
    extra = plan.delta_truncation + plan.delta_sampler
    assert tight == quote.epsilon == pld.epsilon(plan.events, quote.delta - extra)
    assert 3.0 < tight <= charge.epsilon <= 6.0 * (1 + 1e-6)
    assert quote.datasets[0].charge == charge
    assert plan.sigma >= plan.noise_multiplier * plan.sensitivity * (1 - 1e-12)
    state = owner.dataset(dataset.dataset).budget
    assert state is not None
    assert state.spent_epsilon >= tight * 0.5
    # The check bites: with noise a hundredth as large an accountant says so.
    weak = tuple(
        dataclasses.replace(e, noise_multiplier=e.noise_multiplier / 100) for e in plan.events
    )
    assert pld.epsilon(weak, quote.delta - extra) > 1000


def test_the_loss_of_each_batch_was_readable(
    scientist: Party, owner: Party, done: tuple[Quote, JobStatus], server: RunningServer
) -> None:
    """Nothing that any route says of a job is a loss, or anything else of its rows: the fields are
    these, and two runs on other rows say the same."""
    fields = {f.name for f in dataclasses.fields(JobStatus)}
    assert fields == {"job", "state", "tick", "ticks", "quote_digest", "error", "message"}
    words = re.compile(r"loss|accura|metric|gradient", re.IGNORECASE)
    assert not [r.path for r in ROUTES if words.search(r.path) and r.path != "/metrics"]
    other = owner.push(ROWS, of=schema("owner", ROWS), seed=1)
    second = scientist.quote([other], train=done[0].request.train)
    said = []
    for status in (done[1], scientist.wait(scientist.submit(second).job)):
        bundle = scientist.request("GET", f"/v1/jobs/{status.job}/receipt").value(ReceiptBundle)
        keys = set(re.findall(r'"([A-Za-z_]+)":', json.dumps(receipts.statement_json(bundle))))
        assert not {k for k in keys if words.search(k)}, keys
        said.append((status.state, status.error, status.message, status.tick, sorted(keys)))
    assert said[0] == said[1]
    text = server.log.read_text()
    assert "loss" not in text


def test_raw_datasets_were_there_for_anybody(
    server: RunningServer, owner: Party, scientist: Party, dataset: DatasetInfo,
    done: tuple[Quote, JobStatus],
) -> None:  # fmt: skip
    """Every route that reads, as stranger, scientist and owner: no answer holds the mark of a row,
    raw, in text or in base64, and no file of the server does."""
    stranger = Party(server, "stranger")
    forms = {
        MARK,
        base64.urlsafe_b64encode(MARK[:12]),
        base64.b64encode(MARK[:12]),
        MARK.hex().encode(),
    }
    forms |= {b"1.2345678", b"2.3456789"}
    ids = [dataset.dataset, done[1].job, codec.digest(done[0]), owner.id, "0", "x"]
    asked = 0
    for party in (stranger, scientist, owner):
        for route in (r for r in ROUTES if r.method in ("GET", "HEAD")):
            for name in ids if "{" in route.path else [""]:
                path = re.sub(r"\{[a-z]+\}", name, route.path)
                try:
                    body = party.request(route.method, path).body
                except CasemateError as e:
                    body = str(e).encode()
                asked += 1
                assert not [f for f in forms if f in body], path
    assert asked > 60
    held = [p for p in server.state.rglob("*") if p.is_file()]
    assert held
    assert not [p for p in held if MARK in p.read_bytes()]
    with pytest.raises(CasemateError):  # and no such route exists
        stranger.request("GET", f"/v1/datasets/{dataset.dataset}/data")


class Copier(nn.Module):
    """The released attack: a scripted model that writes its input over its own weights."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(2, FEATURES))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.weight.data.copy_(x[0].expand(2, 4))
        return x @ self.weight.t()


def test_a_scripted_model_copied_its_input_into_its_weights(
    scientist: Party, owner: Party, dataset: DatasetInfo, done: tuple[Quote, JobStatus]
) -> None:
    file = io.BytesIO()
    torch.jit.save(torch.jit.script(Copier()), file)
    error = refused(scientist, dataset, pack.Packed(data=file.getvalue()))
    assert error.code.startswith("format.")
    with pytest.raises(ModelError):
        export(Copier(), schema(), loss="cross_entropy")
    copy = Node(
        name="steal", op="aten.copy_.default", args=(Ref(name="w0"), Ref(name="x")), kwargs={}
    )
    error = refused(scientist, dataset, with_nodes(copy))
    assert (error.code, error.where) == ("model.op-unknown", "steal")
    # And what is released of an admitted job holds no row: weights far from it, and noised.
    status = done[1]
    bundle = scientist.request("GET", f"/v1/jobs/{status.job}/receipt").value(ReceiptBundle)
    digest = re.search(
        r'"result_digest": ?"(sha256:[0-9a-f]+)"', json.dumps(receipts.statement_json(bundle))
    )
    assert digest is not None
    found = scientist.result(status.job, digest[1])
    assert set(found) == {"w0", "b0", "w1", "b1"}
    assert MARK not in b"".join(bytes(view) for _, view in found.values())


def test_batchnorm_was_dropped_without_a_word(scientist: Party, dataset: DatasetInfo) -> None:
    """Now it is refused, by name and with a mend that works."""

    class Normed(nn.Sequential):
        def forward(self, x: Any) -> Any:  # the schema's column feeds it by its name
            return super().forward(x)

    module = Normed(nn.Linear(FEATURES, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 2))
    with pytest.raises(ModelError) as e:
        export(module, schema(), loss="cross_entropy")
    assert e.value.code == "model.batchnorm"
    assert "GroupNorm" in e.value.mend
    names = [None] * 4
    by_hand = Node(
        name="bn", op="aten.batch_norm.default",
        args=(Ref(name="h"), *names, True, 0.1, 1e-5, False), kwargs={},
    )  # fmt: skip
    error = refused(scientist, dataset, with_nodes(by_hand))
    assert (error.code, error.where) == ("model.batchnorm", "bn")
    made = groupnorm(module)
    packed, _ = export(made if made is not None else module, schema(), loss="cross_entropy")
    ops = [n.op for n in pack.unpack(packed.data)[0].nodes]
    assert "aten.group_norm.default" in ops


def test_a_model_that_mixed_the_batch_beat_the_clip(scientist: Party, dataset: DatasetInfo) -> None:
    """A loss of each record that is the sum over all: each clipped gradient is of the whole batch,
    so that taking one record out moved them all."""
    mixes = (
        Node(
            name="all", op="aten.sum.dim_IntList",
            args=(Ref(name="x"), ListArg(items=(0,)), True), kwargs={},
        ),
        Node(name="out", op="aten.mul.Tensor", args=(Ref(name="x"), Ref(name="all")), kwargs={}),
    )  # fmt: skip
    error = refused(scientist, dataset, with_nodes(*mixes))
    assert (error.code, error.where) == ("model.mixes-records", "all")


def test_a_restart_gave_the_budget_back(tmp_path: Path) -> None:
    """The operator stops the server, politely and by force, as often as it likes."""
    import signal

    spent = []
    with start(tmp_path / "state") as running:
        owner, scientist = Party(running, "owner"), Party(running, "scientist")
        found = owner.push(ROWS, budget=Budget(epsilon=2.2, delta=1e-3))
        quote = scientist.quote([found], train=train_spec(epsilon=2.0, steps=4))
        assert scientist.wait(scientist.submit(quote).job).state == "done"
        spent.append(owner.dataset(found.dataset).budget)
        running.stop(signal.SIGKILL)
    with start(tmp_path / "state") as running:
        again, more = Party(running, "owner"), Party(running, "scientist")
        for party, known in ((again, owner), (more, scientist)):
            party.identity = known.identity
            party.connect()
        spent.append(again.dataset(found.dataset).budget)
        now = again.dataset(found.dataset)
        fresh = more.quote([now], train=train_spec(epsilon=2.0, steps=4))
        assert fresh.datasets[0].refusal == "budget.exhausted"
        with pytest.raises(CasemateError):
            more.submit(fresh)
        spent.append(again.dataset(found.dataset).budget)
    assert spent[0] == spent[1] == spent[2]
    assert spent[0] is not None
    assert spent[0].spent_epsilon > 1.0


def test_a_tls_certificate_was_trusted_at_first_sight(
    server: RunningServer, tmp_path: Path, owner: Party
) -> None:
    """Another server at the address, with TLS of its own that is as good: nothing is sent to it,
    at the first visit as at any. What counts is the attested key, not the certificate."""
    with start(tmp_path / "impostor") as impostor:
        conn = connection.Connection(impostor.url, trust=server.trust, identity=owner.identity)
        with pytest.raises(EvidenceError):
            conn.request("GET", "/v1/datasets")
        time.sleep(0.2)
        assert "/v1/datasets" not in impostor.log.read_text()
        seen = Party(impostor, "visitor")  # who asks for the impostor by name gets it
        assert seen.request("GET", "/v1/datasets").status == 200


def test_a_bad_signature_passed_for_a_good_one(server: RunningServer, owner: Party) -> None:
    """BastionAI compared the result of the check the wrong way round. Every part of what is signed
    is flipped here, and every part of the signature."""
    line = owner.connection.line()
    good, now = line.attestation, time.time()
    from casemate.attest.fields import Unchecked

    unasked = Unchecked("the nonce was the connection's own")
    assert verify_attestation(good, unasked, server.trust, now=now).simulated
    report = good.evidence.sections["report"] if hasattr(good.evidence, "sections") else None
    if report is None:
        name = next(iter(good.evidence.files))
        report = good.evidence.files[name]
    refusals = 0
    for at in range(0, len(report), 37):
        bad = report[:at] + bytes([report[at] ^ 1]) + report[at + 1 :]
        forged = _with_report(good, report, bad)
        with pytest.raises(EvidenceError):
            verify_attestation(forged, unasked, server.trust, now=now)
        refusals += 1
    assert refusals > 20
    with pytest.raises(EvidenceError):
        verify_attestation(good, os.urandom(32), server.trust, now=now)  # another's nonce
    with pytest.raises(EvidenceError):
        verify_attestation(good, unasked, Trust.simulated("ab" * 32), now=now)  # another's root


def _with_report(attestation: Any, old: bytes, new: bytes) -> Any:
    text = codec.encode(attestation)

    def b64(raw: bytes) -> bytes:
        return base64.urlsafe_b64encode(raw).rstrip(b"=")

    assert b64(old) in text
    return codec.decode(type(attestation), text.replace(b64(old), b64(new)))


class Runs:
    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> Any:
        return Path.touch, (self.mark,)


def test_code_ran_on_clients_that_loaded_pickled_metadata(tmp_path: Path) -> None:
    """Whatever a server answers is canonical JSON or safetensors; a pickle is neither."""
    mark = tmp_path / "ran"
    evil = pickle.dumps(Runs(mark))
    answer = connection.Answer(200, {}, evil)
    for take in (
        answer.json,
        lambda: answer.value(DatasetInfo),
        lambda: answer.value(JobStatus),
        lambda: codec.decode(Policy, base64.b64encode(evil)),
        lambda: tensors.load(evil),
    ):
        with pytest.raises(CasemateError) as e:
            take()
        assert e.value.code.startswith("format.")
    assert not mark.exists()
    pickle.loads(evil)  # noqa: S301 - our own: it would have run
    assert mark.exists()
