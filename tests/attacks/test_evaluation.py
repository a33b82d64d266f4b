"""Evaluation as a way to the rows: exact metrics where none are due, more of them than the owner
allows, more in them than metrics."""

from __future__ import annotations

import dataclasses
import functools
import struct
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from torch import nn

from casemate.client import models, receipts
from casemate.client.enclave import Enclave
from casemate.client.jobs import Run, measured
from casemate.server import release
from casemate.spec import tensors
from casemate.spec.data import Budget, DatasetInfo, Policy
from casemate.spec.errors import CasemateError, FormatError, JobError, ReceiptError
from casemate.spec.job import (
    DatasetUse,
    InputBinding,
    JobRequest,
    Metric,
    NonPrivate,
    Quote,
    Sgd,
    TrainSpec,
)
from casemate.spec.messages import Prepared
from support.desk import PREPARED, told_result
from support.server import CLASSES, FEATURES, Party, mlp, schema, table

pytestmark = pytest.mark.e2e

ROWS = 64
WORDS = "Anybody may train on it."
EXACT = NonPrivate(words="")
METRICS = (Metric(name="accuracy"),)
BUDGET = Budget(epsilon=50, delta=1e-2)


@pytest.fixture(scope="module")
def enclave(scientist: Party) -> Enclave:
    return Enclave(scientist.connection, scientist.server.trust, scientist.identity)


def held_out(owner: Party, count: int) -> DatasetInfo:
    policy = Policy(scientists=("*",), evaluation=True, evaluations=count)
    return owner.push(ROWS, policy=policy, budget=BUDGET)


@pytest.fixture(scope="module")
def data(owner: Party) -> DatasetInfo:
    return held_out(owner, 5)


@pytest.fixture(scope="module")
def training(owner: Party) -> DatasetInfo:
    """Even words that permit training without privacy permit no exact metrics."""
    return owner.push(ROWS, policy=Policy(scientists=("*",), nonprivate=WORDS), budget=BUDGET)


def module() -> nn.Module:
    torch.manual_seed(0)
    return nn.Linear(FEATURES, CLASSES)


@functools.cache
def exported() -> models.Exported:
    return models.export_metrics(module(), [schema()], models.metrics("accuracy", None))


def accuracy(seed: int = 0) -> float:
    found = {n: bytes(v) for n, (_, v) in tensors.load(table(ROWS, seed)).items()}
    x = torch.frombuffer(bytearray(found["x"]), dtype=torch.float32).reshape(ROWS, FEATURES)
    y = torch.frombuffer(bytearray(found["y"]), dtype=torch.int64)
    with torch.no_grad():
        return float((module()(x).argmax(1) == y).double().mean())


def evaluation(batch: int = ROWS, **changes: Any) -> TrainSpec:
    spec = TrainSpec(batch_size=batch, steps=1, privacy=EXACT, optimizer=Sgd(lr=1.0))
    return dataclasses.replace(spec, **changes)


def ask(scientist: Party, datasets: list[DatasetInfo], train: TrainSpec) -> Quote:
    made = exported()
    return scientist.quote(datasets, made.packed, train=train, inputs=made.inputs, metrics=METRICS)


def exact(scientist: Party, *datasets: DatasetInfo, **changes: Any) -> Quote:
    """The quote of exact metrics over several datasets of the same size."""
    return ask(scientist, list(datasets), evaluation(ROWS * len(datasets), **changes))


def refused(of: Any, *given: Any, **more: Any) -> CasemateError:
    with pytest.raises(CasemateError) as e:
        of(*given, **more)
    assert e.value.mend
    return e.value


@pytest.fixture(scope="module")
def counted(owner: Party) -> DatasetInfo:
    return held_out(owner, 1)


@pytest.fixture(scope="module")
def run(enclave: Enclave, counted: DatasetInfo) -> Run:
    """The only exact evaluation of a dataset."""
    return enclave.evaluate(module(), [counted]).watch(progress=False)


def test_exact_metrics_are_counted_and_their_receipt_says_what_they_are(
    scientist: Party, counted: DatasetInfo, run: Run
) -> None:
    assert run.metrics()["accuracy"].value == pytest.approx(accuracy(), abs=1e-6)
    assert run.metrics()["accuracy"].noise == 0.0
    said = run.receipt.receipt
    assert said.guarantee.statement == "no privacy guarantee for these rows"
    assert said.metrics == METRICS and not said.guarantee.private
    again = exact(scientist, counted)
    assert again.datasets[0].refusal == "policy.evaluations"
    assert refused(scientist.submit, again).code == "policy.evaluations"


def test_private_metrics_are_what_is_left_and_the_budget_pays(
    owner: Party, enclave: Enclave, counted: DatasetInfo, run: Run
) -> None:
    before = owner.dataset(counted.dataset).budget
    noisy = enclave.evaluate(module(), [counted], epsilon=2.0, delta=1e-4).watch(progress=False)
    after = owner.dataset(counted.dataset).budget
    assert before is not None and after is not None
    assert after.spent_epsilon > before.spent_epsilon == 0.0
    assert noisy.metrics()["accuracy"].noise > 0 and noisy.receipt.receipt.guarantee.private


def test_quotes_taken_together_do_not_multiply_the_evaluations(
    owner: Party, scientist: Party
) -> None:
    """Each quote is allowed when it is made; only as many jobs as are left start."""
    few = held_out(owner, 1)
    quotes = [exact(scientist, few) for _ in range(3)]
    assert all(q.datasets[0].refusal is None for q in quotes)

    def submit(quote: Quote) -> str:
        try:
            return scientist.wait(scientist.submit(quote).job).state
        except CasemateError as e:
            return e.code

    with ThreadPoolExecutor(3) as pool:
        ends = sorted(pool.map(submit, quotes))
    assert ends == ["done"] + ["policy.evaluations"] * 2


def test_exact_metrics_of_training_rows_are_refused(
    scientist: Party, training: DatasetInfo
) -> None:
    for words in ("", WORDS):
        quote = exact(scientist, training, privacy=NonPrivate(words=words))
        assert quote.datasets[0].refusal == "policy.not-evaluation"
        assert refused(scientist.submit, quote).code == "policy.not-evaluation"


def test_one_dataset_for_evaluation_does_not_open_another(
    scientist: Party, data: DatasetInfo, training: DatasetInfo
) -> None:
    quote = exact(scientist, data, training)
    assert [d.refusal for d in quote.datasets] == [None, "policy.not-evaluation"]
    error = refused(scientist.submit, quote)
    assert (error.code, error.where) == ("policy.not-evaluation", training.dataset)


def test_nobody_trains_on_what_is_for_evaluation(scientist: Party, data: DatasetInfo) -> None:
    quote = scientist.quote([data])
    assert quote.datasets[0].refusal == "policy.evaluation-only"
    assert refused(scientist.submit, quote).code == "policy.evaluation-only"


def test_weights_are_no_metrics(scientist: Party, data: DatasetInfo) -> None:
    """A whole network's gradient of the rows, called a metric."""
    error = refused(scientist.quote, [data], mlp(), train=evaluation(), metrics=METRICS)
    assert error.code == "model.metrics" and "w0" in error.message


def test_a_few_rows_are_not_measured_alone(scientist: Party, data: DatasetInfo) -> None:
    """A sample of the rows would show what few of them have; by Poisson sampling, even one."""
    error = refused(ask, scientist, [data], evaluation(1))
    assert error.code == "plan.evaluation"


@pytest.mark.parametrize(
    "train",
    [
        evaluation(steps=2),
        evaluation(optimizer=Sgd(lr=1.0, momentum=0.5)),
        evaluation(optimizer=Sgd(lr=2.0)),
        evaluation(ema=0.5),
    ],
)
def test_other_steps_are_no_evaluation(train: TrainSpec) -> None:
    with pytest.raises(ValueError, match="one step of plain SGD"):
        request(train)


def request(train: TrainSpec, metrics: tuple[Metric, ...] = METRICS) -> JobRequest:
    return JobRequest(
        job="job_" + "1" * 32,
        scientist="id_s",
        datasets=(DatasetUse(dataset="ds_a", policy_digest="sha256:0", epoch=0),),
        model_digest="sha256:0",
        inputs=(InputBinding(input="x", columns=("x",)),),
        train=train,
        metrics=metrics,
    )


@pytest.mark.parametrize("more", [("a", "a"), tuple(f"m{i}" for i in range(17))])
def test_metrics_are_few_and_different(more: tuple[str, ...]) -> None:
    with pytest.raises(ValueError, match="at most 16, with different names"):
        request(evaluation(), tuple(Metric(name=n) for n in more))


def test_a_hostile_worker_gets_no_more_out_than_the_metrics(enclave: Enclave, run: Run) -> None:
    quote = enclave.jobs.quote(run.status.quote_digest).quote
    assert quote.parameters > 2  # of the model, which are not released

    def result(count: int) -> bytes:
        return tensors.dump({"x": ("f32", (count,), struct.pack(f"<{count}f", *[0.5] * count))})

    def told(count: int) -> Prepared:
        return Prepared(**{**PREPARED, "model_digest": "", **told_result(result(count))})

    release.check_result(result(2), quote, told(2))
    for said, given in ((2, 3), (3, 3), (2, 1)):
        with pytest.raises(FormatError, match="not the quoted model's weights"):
            release.check_result(result(given), quote, told(said))


def test_purposes_do_not_change(owner: Party, data: DatasetInfo, training: DatasetInfo) -> None:
    """Exact metrics would undo what private jobs on the same rows were promised."""
    opened = Policy(scientists=("*",), evaluation=True, evaluations=5)
    for found, policy in ((training, opened), (data, Policy(scientists=("*",)))):
        error = refused(owner.request, "PUT", f"/v1/datasets/{found.dataset}/policy", policy)
        assert error.code == "policy.purpose"
        error = refused(
            owner.register, ROWS, policy=policy, budget=BUDGET,
            previous=found.dataset,
        )  # fmt: skip
        assert error.code == "policy.purpose"
    more = dataclasses.replace(opened, evaluations=6)
    answer = owner.request("PUT", f"/v1/datasets/{data.dataset}/policy", more)
    assert answer.value(DatasetInfo).policy == more


def test_a_receipt_of_metrics_passes_for_no_other(run: Run) -> None:
    said = dataclasses.replace(run.receipt.receipt, metrics=())
    with pytest.raises(ReceiptError, match="must say 'no privacy guarantee'"):
        receipts._agree(said, run.bundle)
    with pytest.raises(FormatError, match="other things than the metrics"):
        measured(said, run.result())
    drowned = tensors.dump({"x": ("f32", (2,), bytes(8))})
    with pytest.raises(JobError, match="larger than the number of rows"):
        measured(run.receipt.receipt, drowned)
