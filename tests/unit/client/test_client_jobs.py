"""Runs: watched to their end, results opened and compared, quotes compared with what was asked."""

from __future__ import annotations

import dataclasses
import hashlib

import pytest
import torch

import casemate as cm
from casemate.client import jobs, models
from casemate.client.connection import Connection
from casemate.client.datasets import Datasets
from casemate.client.jobs import Jobs, QuoteView, Run
from casemate.seal import hpke, stream
from casemate.spec import codec, tensors
from casemate.spec.data import Column, DatasetInfo, DatasetSchema
from casemate.spec.errors import (
    BudgetError,
    DataError,
    FormatError,
    JobError,
    NetError,
    PolicyError,
    ReceiptError,
    UsageError,
)
from casemate.spec.job import (
    Charge,
    DatasetQuote,
    DatasetUse,
    Execution,
    InputBinding,
    JobRequest,
    JobStatus,
    Plan,
    Quote,
    TrainSpec,
)

JOB = "job_" + "0" * 32
D = "sha256:" + "0" * 64
COLUMN = Column(name="x", dtype="f32", low=0, high=1)
WEIGHTS = tensors.dump(
    {
        "weight": ("f32", (1, 2), torch.tensor([[1.0, 2.0]]).numpy().tobytes()),
        "bias": ("f32", (1,), torch.tensor([3.0]).numpy().tobytes()),
    }
)
DIGEST = "sha256:" + hashlib.sha256(WEIGHTS).hexdigest()


@pytest.fixture
def connected(fakes, keys, trust, someone):
    fake = fakes(keys)
    return fake, Connection(fake.url, trust=trust, identity=someone, pause=lambda _: None)


def status(state="running", tick=0, **more) -> JobStatus:
    return JobStatus(job=JOB, state=state, tick=tick, ticks=10, quote_digest=D, **more)


def serve_states(fake, *states):
    left = list(states)

    def answer(_):
        found = left.pop(0) if len(left) > 1 else left[0]
        return 200, {}, codec.encode(found)

    fake.answers["GET", f"/v1/jobs/{JOB}"] = answer


def run_of(connection, trust) -> Run:
    return Run(connection, JOB, trust, pause=lambda _: None)


def test_watching_ends_with_the_job(connected, trust, capsys):
    fake, connection = connected
    first = status("queued")
    serve_states(fake, first, first, status(tick=3), status(tick=3), status("done", 10))
    run = run_of(connection, trust)
    assert run.watch() is run
    shown = capsys.readouterr().err
    assert " 30%" in shown
    assert "100%" in shown
    assert "done" in shown
    serve_states(fake, status("queued"), status(tick=3), status(tick=3), status("done", 10))
    assert [s.state for s in run.ticks()] == ["queued", "running", "done"]


def test_a_failed_job_raises_what_the_server_names(connected, trust):
    fake, connection = connected
    serve_states(fake, status("failed", error="budget.exhausted", message="Too much."))
    with pytest.raises(BudgetError) as caught:
        run_of(connection, trust).watch(progress=False)
    assert (caught.value.code, caught.value.where) == ("budget.exhausted", JOB)
    serve_states(fake, status("cancelled"))
    with pytest.raises(JobError) as caught:
        run_of(connection, trust).watch(progress=False)
    assert caught.value.code == "job.cancelled"


def sealed(someone, data=WEIGHTS, digest=DIGEST, job=JOB) -> bytes:
    key = bytes(range(32))
    info = jobs.RESULT_KEY_INFO.format(job=job, digest=digest).encode()
    message = hpke.seal(someone.public.seal_key, key, info=info)
    return len(message).to_bytes(4, "big") + message + b"".join(stream.encrypt(key, [data]))


def pull(connected, trust, body: bytes) -> bytes:
    fake, connection = connected
    fake.answers["GET", f"/v1/jobs/{JOB}/result"] = (200, {}, body)
    return run_of(connection, trust)._pull(DIGEST)


def test_a_result_opens_with_ones_own_key(connected, trust, someone):
    assert pull(connected, trust, sealed(someone)) == WEIGHTS


def test_other_results_are_refused(connected, trust, someone):
    good = sealed(someone)
    other_weights = sealed(someone, WEIGHTS[:-1] + b"\1")
    with pytest.raises(ReceiptError) as caught:
        pull(connected, trust, other_weights)
    assert caught.value.code == "receipt.weights"
    stranger = cm.Identity.generate("stranger")
    for bad in (
        sealed(stranger),
        sealed(someone, digest=D),
        sealed(someone, job="job_" + "1" * 32),
        good[:-1],
        good[:-20] + bytes(20),
    ):
        with pytest.raises(FormatError):
            pull(connected, trust, bad)
    for bad in (b"", good[:3], good[:900], bytes(4) + good[4:]):
        with pytest.raises(NetError):
            pull(connected, trust, bad)


def test_weights_go_into_a_module(connected, trust, someone, monkeypatch):
    run = run_of(connected[1], trust)
    monkeypatch.setattr(run, "_data", WEIGHTS)
    module = torch.nn.Linear(2, 1)
    found = run.weights(into=module)
    assert found["weight"].tolist() == [[1.0, 2.0]]
    assert module.bias.tolist() == [3.0]
    assert found["bias"].flags.writeable


def request(**changes) -> JobRequest:
    train = TrainSpec(batch_size=10, steps=5, privacy=cm.DP(2, 1e-5), optimizer=cm.SGD(1.0))
    fields = {
        "job": JOB, "scientist": "id_s", "model_digest": D, "train": train,
        "datasets": (DatasetUse(dataset="ds_1", policy_digest=D, epoch=0),),
        "inputs": (InputBinding(input="x", columns=("x",)),),
    }  # fmt: skip
    return JobRequest(**(fields | changes))


def quote(asked: JobRequest | None = None, **changes) -> Quote:
    asked = asked or request()
    plan = Plan(
        request_digest=codec.digest(asked), model_digest=D, private=True, units=100, rate=0.1,
        steps=5, clip=1.0, normaliser=10.0, sensitivity=1.0, noise_multiplier=1.0, sigma=1.0,
        grid=1e-6, microbatch=8, microbatches=2, events=(), delta_truncation=0.0, delta_sampler=0.0,
    )  # fmt: skip
    part = DatasetQuote(
        dataset="ds_1", owner="id_o", policy_digest=D, epoch=0, left_after=1.0,
        charge=Charge(rdp_nano=(1,), delta_femto=0, epsilon=2.0), approval_needed=False, **changes,
    )  # fmt: skip
    return Quote(
        request=asked, plan=plan, execution=Execution(), epsilon=1.5, delta=1e-5, datasets=(part,),
        seconds=3.0, bytes=2**20, ticks=10, parameters=3, path=("record",),
    )  # fmt: skip


def test_a_quote_shows_its_cost_and_raises_its_refusal():
    view = QuoteView(quote())
    assert view.allowed
    assert view.charge == 2.0
    assert view.digest in str(view)
    assert "<table>" in view._repr_html_()
    view.raise_if_refused()
    refused = QuoteView(quote(refusal="budget.exhausted", message="Nothing is left."))
    assert not refused.allowed
    with pytest.raises(BudgetError, match=r"Nothing is left"):
        refused.raise_if_refused()
    with pytest.raises(PolicyError):
        QuoteView(quote(refusal="policy.epoch")).raise_if_refused()


def test_ones_own_cap_is_on_the_charge():
    jobs.refuse_above(QuoteView(quote()), None)
    jobs.refuse_above(QuoteView(quote()), 2.0)
    with pytest.raises(BudgetError) as caught:
        jobs.refuse_above(QuoteView(quote()), 1.9)
    assert caught.value.code == "budget.cap"
    words = request().train
    free = dataclasses.replace(words, privacy=cm.NonPrivate("training in the open"))
    with pytest.raises(BudgetError):
        jobs.refuse_above(QuoteView(quote(request(train=free))), 100.0)


def test_a_quote_by_digest_is_compared_with_it(connected):
    fake, connection = connected
    found = quote()
    path = f"/v1/quotes/{codec.digest(found)}"
    fake.answers["GET", path] = (200, {}, codec.encode(found))
    assert Jobs(connection).quote(codec.digest(found)).quote == found
    fake.answers["GET", path] = (200, {}, codec.encode(dataclasses.replace(found, seconds=9.0)))
    with pytest.raises(NetError) as caught:
        Jobs(connection).quote(codec.digest(found))
    assert caught.value.code == "net.protocol"


def info(name="ds_1", state="ready", error=None) -> DatasetInfo:
    return DatasetInfo(
        dataset=name, owner="id_o", policy=cm.Policy("*"), policy_digest=D, epoch=0, state=state,
        schema=DatasetSchema(name="t", columns=(COLUMN,), rows=4, units=100), error=error,
    )  # fmt: skip


def enclave_of(fake, connection, trust, someone) -> cm.Enclave:
    fake.answers["GET", "/v1/datasets/ds_1"] = (200, {}, codec.encode(info()))
    return cm.Enclave(connection, trust, someone)


def test_a_server_that_quotes_another_job_is_refused(connected, trust, someone):
    fake, connection = connected
    enclave = enclave_of(fake, connection, trust, someone)
    fake.answers["POST", "/v1/uploads"] = (201, {}, {"upload": "u"})
    fake.answers["PATCH", "/v1/uploads/u"] = lambda r: (
        204, {"upload-offset": str(len(r.body))}, b"",
    )  # fmt: skip
    honest, other = request(), request(scientist="id_other")
    for lie in (quote(other), dataclasses.replace(quote(other), request=honest)):
        fake.answers["POST", "/v1/quotes"] = (200, {}, codec.encode(lie))
        with pytest.raises(NetError) as caught:
            enclave._quote(honest, b"packed model")
        assert caught.value.code == "net.protocol"
    fake.answers["POST", "/v1/quotes"] = (200, {}, codec.encode(quote(honest)))
    assert enclave._quote(honest, b"packed model").quote == quote(honest)
    assert all(b"packed model" not in s.body for s in fake.requests)


@pytest.mark.parametrize(
    "given",
    [{}, {"epochs": 1, "steps": 3}, {"epochs": 0}, {"epochs": -1.0}, {"epochs": float("nan")}],
)
def test_epochs_or_steps_one_of_them(given, connected, trust, someone):
    from casemate.client.enclave import _steps

    with pytest.raises(UsageError):
        _steps(given.get("epochs"), given.get("steps"), 10, 100)
    assert _steps(1.5, None, 40, 100) == 4
    assert _steps(None, 7, 40, 100) == 7


def test_a_refused_dataset_raises_its_reason(connected):
    fake, connection = connected
    bad = info(state="refused", error="data.bounds")
    fake.answers["GET", "/v1/datasets/ds_1"] = (200, {}, codec.encode(bad))
    datasets = Datasets(connection, pause=lambda _: None)
    with pytest.raises(DataError) as caught:
        datasets._checked(info(state="checking"))
    assert caught.value.code == "data.bounds"
    fake.answers["GET", "/v1/datasets/ds_1"] = (200, {}, codec.encode(info(name="ds_2")))
    with pytest.raises(NetError):
        datasets.show("ds_1")


def test_listings_show_themselves(connected):
    fake, connection = connected
    fake.answers["GET", "/v1/datasets"] = (200, {}, [codec.to_json(info())])
    found = Datasets(connection).list()
    assert len(found) == 1
    assert found[0].dataset == "ds_1"
    assert "ds_1" in repr(found)
    assert "<table>" in found._repr_html_()


def test_impossible_jobs_are_usage_errors(connected, trust, someone, tmp_path, monkeypatch):
    from casemate.client import models
    from casemate.graph.model import Packed

    fake, connection = connected
    enclave = enclave_of(fake, connection, trust, someone)
    monkeypatch.setattr(models, "export", lambda *_, **__: models.Exported(Packed(b""), ()))
    good = {"dp": cm.DP(2, 1e-5), "batch_size": 10, "steps": 5, "optimizer": cm.SGD(1.0)}
    for bad in ({"batch_size": 0}, {"steps": 0}, {"steps": 10**9}, {"optimizer": "rmsprop"}):
        with pytest.raises(UsageError):
            enclave.quote("model", ["ds_1"], **(good | bad))
    for datasets in ([], ["ds_1", "ds_1"]):
        with pytest.raises(UsageError):
            enclave.quote("model", datasets, **good)


@pytest.mark.parametrize(
    ("given", "limits", "words"),
    [
        ("mse", None, "There is no limit for 'mse'"),
        (["accuracy", "mse"], {"rmse": 1.0}, "There is no limit for 'mse'"),
        ("accuracy", {"mse": 1.0}, "A limit is given for 'mse'"),
        ([], None, "No metric is named"),
    ],
)
def test_metrics_have_names_and_limits(given, limits, words):
    with pytest.raises(UsageError, match=words) as e:
        models.metrics(given, limits)
    assert e.value.code == "usage.metrics"


def test_metrics_by_name_function_and_limit():
    assert models.metrics("accuracy", None) == {"accuracy": ("accuracy", 1.0)}
    found = models.metrics({"near": abs, "mse": "mse"}, {"near": 2, "mse": 3.5})
    assert found == {"near": (abs, 2.0), "mse": ("mse", 3.5)}


def test_a_packed_model_has_no_scores():
    with pytest.raises(UsageError, match="gives losses and no scores"):
        models.export_metrics("model.cmm", [], {"accuracy": ("accuracy", 1.0)})
