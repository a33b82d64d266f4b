"""A job that the native step trains, on a real server; its program made again by command line."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import casemate as cm
from casemate.client.enclave import Enclave
from casemate.client.jobs import QuoteView, Run
from casemate.graph import pack
from casemate.spec.errors import CasemateError
from support.server import Party, RunningServer, mlp, start

# A worker yields to all else, and a compiler is most of this.
pytestmark = [pytest.mark.e2e, pytest.mark.full, pytest.mark.timeout(1200)]


@pytest.fixture(scope="module")
def server(folder: Path) -> Iterator[RunningServer]:
    """Compilers of a busy machine take their time."""
    with start(folder / "state", limits={"prepare_seconds": 900.0}) as running:
        yield running


@pytest.fixture(scope="module")
def enclave(server: RunningServer, scientist: Party) -> Iterator[Enclave]:
    with cm.connect(server.url, trust=server.trust, identity=scientist.identity) as made:
        yield made


@pytest.fixture(scope="module")
def model(folder: Path) -> Path:
    (folder / "model.cmm").write_bytes(mlp().data)
    return folder / "model.cmm"


@pytest.fixture(scope="module")
def dataset(owner: Party) -> str:
    return owner.push(96).dataset


def asked(enclave: Enclave, model: Path, dataset: str, **more: Any) -> QuoteView:
    given = {"dp": cm.DP(3.0, 1e-3), "steps": 30, "lr": 0.5, "runtime": "native"}
    return enclave.quote(str(model), [dataset], batch_size=32, optimizer="sgd", **(given | more))


@pytest.fixture(scope="module")
def run(enclave: Enclave, model: Path, dataset: str) -> Run:
    quote = asked(enclave, model, dataset)
    said = quote.quote.execution
    assert quote.quote.path[0] == said.path == "native" and said.artifact in str(quote)
    return enclave.submit(quote).watch(progress=False)


def test_it_trains_and_the_receipt_names_the_program(run: Run, enclave: Enclave) -> None:
    weights, (_, before) = run.weights(), pack.unpack(mlp().data)
    assert weights.keys() == before.keys()
    for name, (info, view) in before.items():
        assert weights[name].shape == info.shape and np.isfinite(weights[name]).all()
        assert (weights[name].reshape(-1) != np.frombuffer(view, np.float32)).any()
    found = run.receipt
    quote = enclave.jobs.quote(found.receipt.quote_digest).quote
    assert found.receipt.artifact == quote.execution.artifact
    (check,) = (c for c in found.checks if c.name == "native step")
    assert check.state == "unchecked" and found.receipt.artifact in check.found


@pytest.mark.parametrize(
    ("more", "code"),
    [
        ({"dp": cm.NonPrivate("all owners agree to this")}, "plan.native"),
        ({"dp": cm.DP(3.0, 1e-3, clipping="automatic")}, "plan.native"),
        ({"views": 4}, "plan.native"),
    ],
)
def test_what_it_cannot_do_is_refused_at_the_quote(
    more: dict[str, Any], code: str, enclave: Enclave, model: Path, dataset: str
) -> None:
    with pytest.raises(CasemateError) as refused:
        asked(enclave, model, dataset, **more)
    assert refused.value.code == code and 'runtime="torch"' in refused.value.mend


def test_a_worker_that_did_not_quote_makes_the_same(
    run: Run, enclave: Enclave, model: Path, dataset: str
) -> None:
    """One worker at most waits for its job: that of the last quote."""
    quote = asked(enclave, model, dataset, dp=cm.DP(3.0, 1e-3, clip=0.5))
    later = asked(enclave, model, dataset, runtime="torch")
    assert later.quote.execution.artifact == "" and later.quote.path[0] == "graph"
    found = enclave.submit(quote).watch(progress=False).receipt.receipt
    assert found.artifact == quote.quote.execution.artifact
    assert found.artifact != run.receipt.receipt.artifact  # of another clip


@pytest.fixture(scope="module")
def identity(scientist: Party, folder: Path) -> Path:
    scientist.identity.save(folder / "scientist.json")
    return folder / "scientist.json"


def build(server: RunningServer, identity: Path, folder: Path, *more: str) -> Any:
    """``casemate native build`` in a process of its own, as a person runs it."""
    trust = f"simulated:{server.facts['root']}"
    return subprocess.run(
        [sys.executable, "-W", "ignore", "-m", "casemate", "native", "build", *more,
         "--model", str(folder / "model.cmm"), "--out", str(folder / "step"),
         "--enclave", server.url, "--trust", trust, "--identity", str(identity),
         "--format", "json"],
        env={**os.environ, "CASEMATE_HOME": str(folder / "home")}, capture_output=True, text=True,
        check=False,
    )  # fmt: skip


def test_an_auditor_makes_the_very_program_again(
    run: Run, server: RunningServer, identity: Path, folder: Path
) -> None:
    done = build(server, identity, folder, run.job)
    assert done.returncode == 0, done.stderr
    made = hashlib.sha256((folder / "step").read_bytes()).hexdigest()
    assert f"sha256:{made}" == run.receipt.receipt.artifact
    assert json.loads(done.stdout) == json.loads((folder / "step.json").read_text())
    assert json.loads(done.stdout)["artifact"] == made


def test_a_manifest_of_another_program_is_told(
    run: Run, server: RunningServer, identity: Path, folder: Path
) -> None:
    digest = run.receipt.receipt.quote_digest
    ways = ["rank-one", "formed"] * 2
    (folder / "other.json").write_text(json.dumps({"artifact": "0" * 64, "ways": ways}))
    done = build(server, identity, folder, digest, "--like", str(folder / "other.json"))
    assert done.returncode == 2
    assert json.loads(done.stderr)["error"]["code"] == "usage.native-differs"
