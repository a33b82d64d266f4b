"""A job that the native step trains, on a real server; its program made again by command line."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

import casemate as cm
from casemate.client.enclave import Enclave
from casemate.client.jobs import Run
from support.server import Party, RunningServer, mlp

pytestmark = pytest.mark.e2e

PRIVACY = cm.DP(epsilon=3.0, delta=1e-3)


@pytest.fixture(scope="module")
def enclave(server: RunningServer, scientist: Party):
    with cm.connect(server.url, trust=server.trust, identity=scientist.identity) as made:
        yield made


@pytest.fixture(scope="module")
def model(folder: Path) -> Path:
    (folder / "model.cmm").write_bytes(mlp().data)
    return folder / "model.cmm"


def asked(enclave: Enclave, model: Path, dataset: str, **more: Any) -> Any:
    given = {"dp": PRIVACY, "batch_size": 32, "steps": 30, "optimizer": "sgd", "lr": 0.5}
    return enclave.quote(str(model), [dataset], runtime="native", **(given | more))


@pytest.fixture(scope="module")
def run(enclave: Enclave, owner: Party, model: Path) -> Run:
    quote = asked(enclave, model, owner.push(96).dataset)
    assert quote.quote.path[0] == quote.quote.execution.path == "native"
    assert quote.quote.execution.artifact in str(quote)
    return enclave.submit(quote).watch(progress=False)


def test_the_receipt_names_the_program_that_trained(run: Run) -> None:
    weights = run.weights()
    assert {n: w.shape for n, w in weights.items()} == {
        "w0": (8, 4), "b0": (8,), "w1": (2, 8), "b1": (2,)
    }  # fmt: skip
    found = run.receipt
    assert found.receipt.artifact.startswith("sha256:")
    assert found.receipt.plan.steps == 30 and found.receipt.guarantee.private
    assert f"native step  unchecked  {found.receipt.artifact}"[:40] in " ".join(str(found).split())
