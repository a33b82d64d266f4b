"""Attacks on deployed models, on a real server: who is no caller, replays, races for the last call,
models that mix, inputs that are none, a worker killed under a call, content on disk and in logs."""

from __future__ import annotations

import os
import random
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
import torch
from torch import Tensor, nn

import casemate as cm
from casemate.client import served
from casemate.client.torch import export_outputs
from casemate.engine.capture import outputs
from casemate.graph import pack
from casemate.seal import calls, requests
from casemate.seams import OsRng
from casemate.spec.errors import CasemateError
from casemate.spec.serving import dump
from support import server as servers
from support.markers import Markers, floats
from support.server import RunningServer, start

FEATURES = 24
DRAW = random.Random(11)


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(FEATURES, 16), nn.Tanh(), nn.Linear(16, 3))

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.layers(x)
        return out


@pytest.fixture(scope="module")
def running(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningServer]:
    with start(tmp_path_factory.mktemp("inference") / "state", models=3) as server:
        yield server


def person(server: RunningServer, name: str) -> cm.Enclave:
    return cm.connect(
        server.url, trust=server.trust, identity=cm.Identity.generate(name), memory=None
    )


@pytest.fixture(scope="module")
def owner(running: RunningServer) -> cm.Enclave:
    return person(running, "owner")


@pytest.fixture(scope="module")
def caller(running: RunningServer) -> cm.Enclave:
    return person(running, "caller")


@pytest.fixture(scope="module")
def net() -> nn.Module:
    torch.manual_seed(3)
    return Net().eval()


@pytest.fixture(scope="module")
def model(owner: cm.Enclave, caller: cm.Enclave, net: nn.Module) -> str:
    policy = cm.ServePolicy([caller.identity.id], records=8)
    return owner.deploy(net, policy, example=torch.zeros(1, FEATURES), name="net").id


def refused(work: Any, *given: Any) -> CasemateError:
    with pytest.raises(CasemateError) as error:
        work(*given)
    return error.value


def test_it_answers_as_the_module_does(caller: cm.Enclave, model: str, net: nn.Module) -> None:
    x = torch.randn(5, FEATURES)
    with torch.inference_mode():
        torch.testing.assert_close(caller.predict(model, x), net(x))


def test_a_stolen_id_is_worth_nothing(
    running: RunningServer, owner: cm.Enclave, model: str
) -> None:
    thief = person(running, "thief")
    thief.models._known[model] = owner.models.show(model).info  # with all that is public of it
    error = refused(thief.predict, model, np.zeros((1, FEATURES), np.float32))
    assert (error.code, error.status) == ("model.unknown", 404)
    for work in (thief.models.show, thief.models.undeploy):
        assert refused(work, model).code == "model.unknown"
    assert refused(thief.models.set_policy, model, cm.ServePolicy("*")).code == "model.unknown"
    assert not thief.models.list()
    # Who deployed it is no caller by that.
    assert refused(owner.predict, model, np.zeros((1, FEATURES), np.float32)).status == 403


def test_a_caller_does_not_govern(caller: cm.Enclave, model: str) -> None:
    assert refused(caller.models.undeploy, model).status == 403
    assert refused(caller.models.set_policy, model, cm.ServePolicy("*")).status == 403


def sealed(enclave: cm.Enclave, model: str, caller: str, records: int = 1) -> tuple[bytes, bytes]:
    specs = enclave.models.show(model).inputs
    wire = dump(specs, records, {"x": bytes(4 * records * FEATURES)})
    key = enclave.attestation.binding.hpke_key
    return calls.seal(key, model, caller, records, wire, OsRng())


def post(enclave: cm.Enclave, model: str, body: bytes) -> bytes:
    path = f"/v1/models/{model}/predictions"
    answer: bytes = enclave._connection.request("POST", path, body).body
    return answer


def test_a_call_sealed_by_another_caller_or_for_another_model_does_not_open(
    owner: cm.Enclave, caller: cm.Enclave, model: str, net: nn.Module
) -> None:
    body, _ = sealed(caller, model, owner.identity.id)
    assert refused(post, caller, model, body).code == "format.sealed"
    policy = cm.ServePolicy([caller.identity.id])
    other = owner.deploy(net, policy, example=torch.zeros(1, FEATURES)).id
    body, _ = sealed(caller, other, caller.identity.id)
    assert refused(post, caller, model, body).code == "format.sealed"
    owner.models.undeploy(other)


def test_a_request_that_was_recorded_is_not_answered_again(
    running: RunningServer, caller: cm.Enclave, model: str
) -> None:
    body, _ = sealed(caller, model, caller.identity.id)
    url = f"{running.url}/v1/models/{model}/predictions"
    boot = caller.attestation.binding.boot
    head = requests.sign(caller.identity, "POST", url, {}, body, boot=boot)
    with httpx.Client(verify=False, trust_env=False) as http:  # whoever recorded it
        assert http.post(url, content=body, headers=head).status_code == 200
        again = http.post(url, content=body, headers=head)
        assert again.json()["error"]["code"] == "auth.replay"
        twice = requests.sign(caller.identity, "POST", url, {}, body, boot=os.urandom(16))
        assert http.post(url, content=body, headers=twice).json()["error"]["code"] == (
            "auth.boot-stale"
        )


def test_an_answer_is_of_use_to_its_caller_alone(caller: cm.Enclave, model: str) -> None:
    body, key = sealed(caller, model, caller.identity.id)
    answer = post(caller, model, body)
    assert calls.open_answer(key, answer)[:1] == b"\0"
    error = refused(calls.open_answer, os.urandom(32), answer)
    assert error.code == "format.stream-tampered"


def test_sixty_four_callers_threads_race_for_the_last_calls(
    running: RunningServer, owner: cm.Enclave, net: nn.Module
) -> None:
    """Exactly as many as are left are answered, and none more after a restart of who asks."""
    racer = person(running, "racer")
    policy = cm.ServePolicy([racer.identity.id], calls=20, at_once=64)
    raced = owner.deploy(net, policy, example=torch.zeros(1, FEATURES)).id
    lines = [
        cm.connect(running.url, trust=running.trust, identity=racer.identity, memory=None)
        for _ in range(8)
    ]
    found: list[str] = []

    def ask(line: cm.Enclave) -> None:
        for _ in range(8):
            try:
                line.predict(raced, np.zeros((1, FEATURES), np.float32))
                found.append("answered")
            except CasemateError as e:
                found.append(e.code)

    threads = [threading.Thread(target=ask, args=(line,)) for line in lines]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert len(found) == 64 and set(found) == {"answered", "policy.calls"}
    assert found.count("answered") == 20
    assert racer.models.show(raced).left == 0
    owner.models.undeploy(raced)


MIXES = {
    "mean": lambda x: x - x.mean(0),
    "softmax": lambda x: x.softmax(0),
    "neighbour": lambda x: x.roll(1, 0),
    "first": lambda x: x + x[:1],
    "gram": lambda x: x @ x.t() @ x,
    "sort": lambda x: x.sort(0).values,
}


@pytest.mark.parametrize("how", MIXES)
def test_a_model_that_mixes_records_is_refused_here_and_there(
    how: str, owner: cm.Enclave, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Mix(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.w = nn.Parameter(torch.eye(FEATURES))

        def forward(self, x: Tensor) -> Tensor:
            return MIXES[how](x @ self.w)

    example = torch.zeros(1, FEATURES)
    here = refused(export_outputs, Mix(), example)
    assert here.code in ("model.mixes-records", "model.batch-fixed")
    if here.code == "model.batch-fixed":
        return  # no graph can be made of it
    monkeypatch.setattr(outputs.check, "check", lambda *_, **__: None)  # a client that lies
    packed = export_outputs(Mix(), example)
    monkeypatch.undo()
    there = refused(owner.deploy, packed, cm.ServePolicy("*", slots=4))
    assert (there.code, there.where) == (here.code, here.where)


def test_a_model_for_training_is_not_served(owner: cm.Enclave) -> None:
    assert refused(owner.deploy, servers.mlp(), cm.ServePolicy("*")).code == "usage.model"
    graph, view = pack.unpack(servers.mlp().data)
    assert not graph.outputs and view


def test_inputs_that_are_no_numbers_get_answers_that_are_none(
    caller: cm.Enclave, model: str, net: nn.Module
) -> None:
    x = np.random.default_rng(0).normal(size=(4, FEATURES)).astype(np.float32)
    plain = caller.predict(model, x)
    x[1] = np.nan
    x[2] = np.inf
    found = caller.predict(model, x)
    assert np.array_equal(found[[0, 3]], plain[[0, 3]])
    assert np.isnan(found[1]).all()


@pytest.mark.parametrize("case", ["garbage", "short", "huge", "renamed", "empty"])
def test_what_is_wrong_within_is_told_to_the_caller_alone(
    running: RunningServer, caller: cm.Enclave, model: str, case: str
) -> None:
    """Status and size of the answer are those of any other; the log says nothing of it."""
    good, _ = sealed(caller, model, caller.identity.id, 2)
    usual = len(post(caller, model, good))
    specs = caller.models.show(model).inputs
    wire = dump(specs, 2, {"x": bytes(8 * FEATURES)})
    plain = {
        "garbage": os.urandom(len(wire)),
        "short": wire[:-4],
        "huge": wire + bytes(1 << 16),
        "renamed": wire.replace(b'"x"', b'"y"'),
        "empty": b"",
    }[case]
    key = caller.attestation.binding.hpke_key
    body, mine = calls.seal(key, model, caller.identity.id, 2, plain, OsRng())
    if len(plain) != len(wire):
        assert refused(post, caller, model, body).code == "data.inputs-size"  # the size is public
        return
    before = running.log.stat().st_size
    answer = post(caller, model, body)
    assert len(answer) == usual
    error = refused(
        served.read_answer, caller.models.show(model).outputs, 2, calls.open_answer(mine, answer)
    )
    assert error.family in ("data", "format")
    said = running.log.read_bytes()[before:].decode()
    assert error.code not in said and '"status":200' in said


def test_counts_of_records_at_their_ends(caller: cm.Enclave, model: str) -> None:
    nine = np.zeros((9, FEATURES), np.float32)
    assert refused(caller.predict, model, nine).code == "limit.records"
    assert refused(caller.predict, model, nine[:0]).code == "usage.inputs"
    assert caller.predict(model, nine[:8]).shape == (8, 3)
    body, _ = sealed(caller, model, caller.identity.id)
    for count in (0, 2**32 - 1):
        lied = count.to_bytes(4, "big") + body[4:]
        assert refused(post, caller, model, lied).code == "format.call"


def workers(server: RunningServer) -> list[int]:
    tasks = Path(f"/proc/{server.process.pid}/task").glob("*/children")
    return [int(p) for t in tasks for p in t.read_text().split()]


def test_a_call_that_takes_too_long_ends_its_worker(tmp_path: Path, net: nn.Module) -> None:
    with start(tmp_path / "state", limits={"call_seconds": 1.0}) as server:
        owner = person(server, "owner")
        view = owner.deploy(net, cm.ServePolicy("*"), example=torch.zeros(1, FEATURES))
        (pid,) = workers(server)
        os.kill(pid, signal.SIGSTOP)
        row = np.zeros((1, FEATURES), np.float32)
        error = refused(owner.predict, view.id, row)
        assert (error.code, error.status) == ("job.worker-failed", 503)
        assert owner.predict(view.id, row).shape == (1, 3)  # by another worker
        assert not Path(f"/proc/{pid}").exists()
        assert '"state":"time"' in server.log.read_text()


def test_a_worker_killed_under_a_call_costs_that_call_and_no_more(
    tmp_path: Path, net: nn.Module
) -> None:
    with start(tmp_path / "state") as server:
        owner = person(server, "owner")
        view = owner.deploy(net, cm.ServePolicy("*", calls=3), example=torch.zeros(1, FEATURES))
        (pid,) = workers(server)
        os.kill(pid, signal.SIGSTOP)  # so that the call does not end before
        row = np.zeros((1, FEATURES), np.float32)
        caught: list[CasemateError] = []
        thread = threading.Thread(
            target=lambda: caught.append(refused(owner.predict, view.id, row))
        )
        thread.start()
        time.sleep(0.5)  # whether it is killed before or under the call: the same comes of it
        os.kill(pid, signal.SIGKILL)
        thread.join(60)
        assert [e.code for e in caught] == ["job.worker-failed"]
        assert owner.models.show(view.id).left == 2  # it is not given back
        assert owner.predict(view.id, row).shape == (1, 3)  # by another worker


def places(server: RunningServer) -> dict[str, bytes]:
    found = {str(p): p.read_bytes() for p in server.state.rglob("*") if p.is_file()}
    found["log"] = server.log.read_bytes()
    with httpx.Client(verify=False, trust_env=False) as http:
        found["metrics"] = http.get(f"{server.url}/metrics").content
    return found


def test_no_content_is_on_the_disk_in_logs_or_metrics(tmp_path: Path) -> None:
    markers = Markers()
    weight, row = floats(DRAW, 3 * FEATURES), floats(DRAW, FEATURES)
    module = nn.Linear(FEATURES, 3)
    with torch.no_grad():
        module.weight.copy_(torch.tensor(weight).reshape(3, FEATURES))
    markers.add_floats("a weight", weight)
    markers.add_floats("an input", row)
    with start(tmp_path / "state") as server:
        owner = person(server, "owner")
        view = owner.deploy(module, cm.ServePolicy("*", calls=50), example=torch.zeros(1, FEATURES))
        x = torch.tensor([row])
        out = owner.predict(view.id, x)
        with torch.inference_mode():
            torch.testing.assert_close(out, module(x))
        markers.add_floats("an output", out.reshape(-1).tolist())
        bad = torch.full((1, FEATURES), 1e38)
        owner.predict(view.id, bad)
        assert markers.found(places(server)) == []
        owner.models.undeploy(view.id)
        assert markers.found(places(server)) == []
    # The search would see it.
    assert markers.found({"a leak": np.float32(row).tobytes()})
