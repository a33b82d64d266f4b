"""The whole story by command line: owner, scientist, auditor, against a real server."""

from __future__ import annotations

import io
import json
import os
import random
import subprocess
import sys
import time
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from typing import NamedTuple

import pytest

from casemate.cli.main import main

pytestmark = pytest.mark.e2e

MODEL = """
import torch
from torch import nn

def build():
    torch.manual_seed(0)
    return nn.Linear(2, 2)
"""


class Done(NamedTuple):
    returncode: int
    stdout: str
    stderr: str


class Person:
    """Somebody with a home folder and a command line."""

    def __init__(self, folder: Path, name: str) -> None:
        self.folder = folder / name
        self.folder.mkdir()
        self.id = self("identity", "new", name)["id"]

    def run(self, *arguments: str) -> Done:
        """The command line with this person's home, in this process."""
        out, err = io.StringIO(), io.StringIO()
        with pytest.MonkeyPatch.context() as patch:
            for name in [n for n in os.environ if n.startswith("CASEMATE_")]:
                patch.delenv(name)
            patch.setenv("CASEMATE_HOME", str(self.folder))
            patch.chdir(self.folder)
            with redirect_stdout(out), redirect_stderr(err), pytest.raises(SystemExit) as caught:
                main([*arguments, "--format", "json"])
        return Done(caught.value.code or 0, out.getvalue(), err.getvalue())

    def __call__(self, *arguments: str):
        done = self.run(*arguments)
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout)

    def refused(self, *arguments: str) -> tuple[int, str]:
        done = self.run(*arguments)
        assert done.returncode != 0, done.stdout
        assert done.stdout == ""
        return done.returncode, json.loads(done.stderr)["error"]["code"]


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    """(url, root) of `casemate serve --dev`."""
    state = tmp_path_factory.mktemp("state")
    with (state / "log").open("wb") as sink:
        process = subprocess.Popen(
            [sys.executable, "-m", "casemate", "serve", "--dev", "--port", "0",
             "--state", str(state), "--threads", "1"],
            stdout=sink, stderr=sink,
        )  # fmt: skip
    try:
        ready = state / "server.json"
        end = time.monotonic() + 60
        while not ready.exists():
            assert process.poll() is None, (state / "log").read_text()
            assert time.monotonic() < end
            time.sleep(0.05)
        found = json.loads(ready.read_text())
        yield found["url"], found["root"]
    finally:
        process.terminate()
        try:
            process.wait(15)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


@pytest.fixture(scope="module")
def people(server, tmp_path_factory):
    folder = tmp_path_factory.mktemp("people")
    made = {name: Person(folder, name) for name in ("owner", "scientist", "stranger")}
    for person in made.values():
        found = person("enclave", "add", "lab", server[0], "--trust", f"simulated:{server[1]}")
        assert found["verdict"]["simulated"] is True
    chance = random.Random(1)
    lines = ["left,right,kind"]
    for _ in range(120):
        kind = chance.choice(["low", "high"])
        at = 0.3 if kind == "low" else 0.7
        lines.append(f"{chance.gauss(at, 0.05):.4f},{chance.gauss(at, 0.05):.4f},{kind}")
    (made["owner"].folder / "rows.csv").write_text("\n".join(lines) + "\n")
    (made["scientist"].folder / "mine.py").write_text(MODEL)
    return made


def filled_in(text: str) -> str:
    """The template as an owner would fill it in."""
    low_high = 'low = 0\nhigh = 1\nscale = "symmetric"'
    out = []
    for part in text.split("\n\n"):
        if '"kind"' in part and part.lstrip().startswith("[columns"):
            part = '[columns."kind"]\nclasses = ["low", "high"]'
        elif part.lstrip().startswith("[columns"):
            head = part.splitlines()[0]
            part = f'{head}\ndtype = "f32"\n{low_high}'
        out.append(part)
    return "\n\n".join(out) + "\n"


@pytest.fixture(scope="module")
def dataset(people):
    owner, scientist = people["owner"], people["scientist"]
    with pytest.MonkeyPatch.context() as patch, pytest.raises(SystemExit) as caught:
        patch.chdir(owner.folder)
        main(["dataset", "template", "rows.csv", "--label", "kind", "--out", "rows.toml"])
    assert not caught.value.code
    file = owner.folder / "rows.toml"
    assert owner.refused(
        "dataset", "push", "rows.csv", "--schema", "rows.toml", "--scientist", scientist.id,
        "--epsilon", "4", "--delta", "1e-4",
    )[0] == 4, "bounds must be declared"  # fmt: skip
    file.write_text(filled_in(file.read_text()))
    found = owner(
        "dataset", "push", "rows.csv", "--schema", "rows.toml", "--scientist", scientist.id,
        "--approval", "--epsilon", "4", "--delta", "1e-4",
    )  # fmt: skip
    assert found["state"] == "ready"
    return found["dataset"]


def quote(scientist, dataset, epsilon="2"):
    return scientist(
        "job", "quote", "--model", "mine.py:build", "--loss", "cross_entropy",
        "--dataset", dataset, "--optimizer", "sgd", "--lr", "2", "--batch-size", "40",
        "--steps", "20", "--epsilon", epsilon, "--delta", "1e-5",
    )  # fmt: skip


def test_owner_scientist_and_auditor(people, dataset):
    owner, scientist, stranger = people["owner"], people["scientist"], people["stranger"]
    assert [d["dataset"] for d in scientist("dataset", "ls")["datasets"]] == [dataset]
    assert stranger("dataset", "ls")["datasets"] == []

    # Strangers learn nothing, and cannot act.
    assert stranger.refused("dataset", "show", dataset)[0] in (4, 7, 8)
    assert stranger.refused("dataset", "revoke", dataset, "--yes")[0] in (4, 7, 8)

    # A quote waits for the owner's word; an approval is of exactly that quote.
    found = quote(scientist, dataset)
    assert found["allowed"] is True
    assert found["approval_needed"] == [owner.id]
    code, reason = scientist.refused("job", "submit", found["digest"])
    assert code == 8
    assert reason.startswith("policy.")
    assert scientist.refused("job", "submit", found["digest"], "--max-epsilon", "1") == (
        9,
        "budget.cap",
    )
    waiting = owner("job", "ls")["quotes"]
    assert [q["digest"] for q in waiting] == [found["digest"]]
    assert owner("job", "show", found["digest"])["quote"] == found["quote"]
    assert owner("job", "approve", found["digest"])["approved"] is True

    status = scientist("job", "submit", found["digest"])
    assert status["state"] == "done"
    again = scientist("job", "submit", found["digest"])
    assert again["job"] == status["job"], "the same quote again is the same job"

    result = scientist(
        "job", "result", status["job"], "--out", "w.safetensors", "--receipt", "receipt.json"
    )
    assert result["simulated"] == ["tee"]
    states = {c["name"]: c["state"] for c in result["checks"]}
    assert set(states.values()) == {"ok", "simulated", "unchecked"}
    assert [name for name, state in states.items() if state == "unchecked"] == ["witnesses"]
    assert owner.refused("job", "result", status["job"], "--out", "stolen")[0] in (7, 8, 22)

    budget = owner("dataset", "budget", dataset)["budget"]
    assert budget["jobs"] == 1
    assert 1 < budget["spent_epsilon"] < 2.5

    # Offline, with nothing but two files.
    receipt = str(scientist.folder / "receipt.json")
    weights = str(scientist.folder / "w.safetensors")
    checked = stranger("receipt", "verify", receipt, "--weights", weights, "--trust", "simulated")
    assert checked["receipt"]["job"] == status["job"]
    assert stranger("receipt", "show", receipt)["predicate"] == checked["receipt"]
    Path(weights).write_bytes(Path(weights).read_bytes()[:-1] + b"\0")
    assert stranger.refused(
        "receipt", "verify", receipt, "--weights", weights, "--trust", "simulated"
    ) == (20, "receipt.weights")

    # The log is one and the same to everyone.
    seen = owner("audit", "verify", "--receipt", receipt)
    assert seen["debits"] == 1
    assert seen["kinds"]["commit"] == 1
    other = stranger("audit", "verify")
    assert other["origin"] == seen["origin"]
    assert other["entries"] >= seen["entries"]
    assert other["debits"] == 1
    assert seen["jobs"][0]["epsilon_pld"] <= seen["jobs"][0]["epsilon"]
    assert seen["budgets"][0]["spent_epsilon"] == budget["spent_epsilon"]
    assert [s["simulated"] for s in seen["starts"]] == [True]

    # As static files, for whoever wants to audit offline.
    mirrored = stranger("audit", "mirror", "log")
    assert mirrored["entries"] >= seen["entries"]
    offline = stranger("audit", "verify", "--dir", "log", "--receipt", receipt)
    assert offline["budgets"] == seen["budgets"]
    assert {c["name"]: c["state"] for c in offline["checks"]}["seen before"] == "ok"
    compared = stranger("audit", "compare", receipt, "log")
    assert compared["relation"] in ("equal", "second-extends-first")
    assert owner("audit", "sync")["entries"] >= mirrored["entries"]
    assert owner("audit", "compare", receipt, str(stranger.folder / "log"))["second"] >= 1


def test_a_budget_that_is_too_small_refuses_before_anything_runs(people, dataset):
    owner, scientist = people["owner"], people["scientist"]
    before = owner("dataset", "budget", dataset)["budget"]
    found = quote(scientist, dataset, epsilon="7")
    assert found["allowed"] is False
    assert found["quote"]["datasets"][0]["refusal"].startswith("budget.")
    assert scientist.refused("job", "submit", found["digest"])[0] in (8, 9)
    assert owner("dataset", "budget", dataset)["budget"] == before


def test_changed_policies_void_quotes_and_epochs_only_advance(people, dataset):
    owner, scientist = people["owner"], people["scientist"]
    found = quote(scientist, dataset, epsilon="1")
    owner("job", "approve", found["digest"])
    shown = owner("dataset", "policy", dataset, "--scientist", scientist.id, "--max-epsilon", "2")
    assert shown["policy"]["approval"] == "none"
    assert scientist.refused("job", "submit", found["digest"])[0] == 8
    assert owner("dataset", "epoch", dataset, "3")["epoch"] == 3
    assert owner.refused("dataset", "epoch", dataset, "2")[0] in (2, 8)


def quote_metrics(scientist, dataset, *more):
    return scientist(
        "job", "quote-metrics", "--model", "mine.py:build", "--dataset", dataset,
        "--metric", "accuracy", "--metric", "cross_entropy=4", *more,
    )  # fmt: skip


def test_metrics_exact_where_the_owner_counts_them_and_private_elsewhere(people, dataset):
    owner, scientist = people["owner"], people["scientist"]
    held_out = owner(
        "dataset", "push", "rows.csv", "--schema", "rows.toml", "--scientist", scientist.id,
        "--evaluation", "--evaluations", "1", "--epsilon", "4", "--delta", "1e-4",
    )["dataset"]  # fmt: skip
    status = scientist("job", "submit", quote_metrics(scientist, held_out)["digest"])
    exact = scientist("job", "metrics", status["job"])
    assert 0 <= exact["accuracy"]["value"] <= 1
    assert 0 < exact["cross_entropy"]["value"] < 4
    assert exact["accuracy"]["noise"] == 0
    again = quote_metrics(scientist, held_out)
    assert again["quote"]["datasets"][0]["refusal"] == "policy.evaluations"
    refused = quote_metrics(scientist, dataset)
    assert refused["quote"]["datasets"][0]["refusal"] == "policy.not-evaluation"

    scientist("job", "result", status["job"], "--receipt", "metrics.json")
    receipt = str(scientist.folder / "metrics.json")
    said = people["stranger"]("receipt", "verify", receipt, "--trust", "simulated")["receipt"]
    assert said["guarantee"]["statement"] == "no privacy guarantee for these rows"
    assert [m["name"] for m in said["metrics"]] == ["accuracy", "cross_entropy"]
    assert people["stranger"]("audit", "verify", "--receipt", receipt)["entries"] > 0

    private = quote_metrics(scientist, dataset, "--epsilon", "1", "--delta", "1e-5")
    status = scientist("job", "submit", private["digest"])
    noisy = scientist("job", "metrics", status["job"])
    # Ten standard deviations, so 1e-6 with room for the quotient.
    assert abs(noisy["accuracy"]["value"] - exact["accuracy"]["value"]) < 1
    assert 0.01 < noisy["accuracy"]["noise"] < 0.2
    assert owner("dataset", "budget", dataset)["budget"]["jobs"] >= 1


def test_revocation_ends_it(people, dataset):
    owner, scientist = people["owner"], people["scientist"]
    assert owner("dataset", "revoke", dataset, "--yes")["state"] == "revoked"
    code, reason = scientist.refused(
        "job", "quote", "--model", "mine.py:build", "--loss", "cross_entropy", "--dataset", dataset,
        "--lr", "1", "--batch-size", "40", "--steps", "2", "--epsilon", "1", "--delta", "1e-5",
    )  # fmt: skip
    assert code in (4, 8)
    assert reason in ("policy.revoked", "data.unknown-dataset")


def test_bad_rows_are_refused_on_the_owners_machine(people, server):
    owner = people["owner"]
    text = (owner.folder / "rows.csv").read_text().splitlines()
    for bad in ("7,0.5,low", "nan,0.5,low", "0.5,0.5,middle", "0.5,0.5", "x,0.5,low"):
        (owner.folder / "bad.csv").write_text("\n".join([*text[:5], bad]) + "\n")
        code, reason = owner.refused(
            "dataset", "push", "bad.csv", "--schema", "rows.toml", "--scientist", "*",
            "--epsilon", "4", "--delta", "1e-4",
        )  # fmt: skip
        assert code == 4, bad
        assert reason.startswith("data."), bad


def test_models_are_packed_and_checked_locally(people, dataset):
    scientist = people["scientist"]
    packed = scientist.folder / "mine.cmm"
    shown = people["owner"]("dataset", "show", dataset)
    (scientist.folder / "shown.json").write_text(json.dumps(shown))
    made = scientist("model", "export", "mine.py:build", "--schema", "shown.json", "--loss",
                     "cross_entropy", "--out", str(packed))  # fmt: skip
    assert made["trained_scalars"] == 6
    found = scientist("model", "check", str(packed))
    assert found["digest"] == made["digest"]
    packed.write_bytes(packed.read_bytes() + b"\0")
    assert scientist.refused("model", "check", str(packed))[0] == 3
