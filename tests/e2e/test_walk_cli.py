"""The whole story by command line as three people live it: two hospitals and a scientist, each with
a home folder of their own, in tables for people and in JSON for scripts."""

from __future__ import annotations

import io
import json
import os
import random
import re
import subprocess
import sys
from collections.abc import Iterator
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any

import pytest

from casemate.cli.main import main
from support.server import RunningServer, start

pytestmark = pytest.mark.e2e

MODEL = """
import torch
from torch import nn

def build():
    torch.manual_seed(0)
    return nn.Linear(2, 2)

def wider():
    return nn.Linear(3, 2)

def broken():
    return 1 / 0
"""
SCHEMA = """
name = "Clinic"
label = "kind"

[columns."left"]
dtype = "f32"
low = 0
high = 1
scale = "symmetric"

[columns."right"]
dtype = "f32"
low = 0
high = 1
scale = "symmetric"

[columns."kind"]
classes = ["low", "high"]
"""
QUOTE = (
    "job", "quote", "--loss", "cross_entropy", "--optimizer", "sgd", "--lr", "2",
    "--batch-size", "40", "--steps", "20", "--delta", "1e-5",
)  # fmt: skip


class Person:
    """Somebody at a terminal: :meth:`__call__` for scripts (JSON), :meth:`read` for people."""

    def __init__(self, folder: Path, name: str) -> None:
        self.home = folder / name.lower()
        self.home.mkdir()
        self.id = str(self("identity", "new", name)["id"])

    def run(self, *arguments: str) -> tuple[int, str, str]:
        out, err = io.StringIO(), io.StringIO()
        with pytest.MonkeyPatch.context() as patch:
            for name in [n for n in os.environ if n.startswith("CASEMATE_")]:
                patch.delenv(name)
            patch.setenv("CASEMATE_HOME", str(self.home))
            patch.setenv("COLUMNS", "100")
            patch.chdir(self.home)
            with redirect_stdout(out), redirect_stderr(err), pytest.raises(SystemExit) as caught:
                main([*arguments])
        code = caught.value.code
        assert "Traceback" not in out.getvalue() + err.getvalue()
        return int(code or 0), out.getvalue(), err.getvalue()

    def __call__(self, *arguments: str) -> dict[str, Any]:
        code, out, err = self.run(*arguments, "--format", "json")
        assert code == 0, err
        found = json.loads(out)
        assert isinstance(found, dict)
        return found

    def read(self, *arguments: str) -> str:
        code, out, err = self.run(*arguments)
        assert code == 0, err
        return out

    def refused(self, code: str, exits: int, *arguments: str) -> str:
        """The refusal reads the same in both forms; the sentence and its mend."""
        status, out, err = self.run(*arguments, "--format", "json")
        assert (status, out) == (exits, ""), err
        error = json.loads(err.strip().splitlines()[-1])["error"]
        assert error["code"] == code, error
        status, out, err = self.run(*arguments)
        assert (status, out) == (exits, ""), err
        first, second = err.strip().splitlines()[-2:]
        assert first.startswith(f"error {code}")
        assert first.endswith(error["message"])
        assert second == f"mend: {error['mend']}"
        return f"{error['message']} {error['mend']}"


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningServer]:
    with start(tmp_path_factory.mktemp("walk") / "state") as running:
        yield running


People = tuple[Person, Person, Person]


@pytest.fixture(scope="module")
def people(server: RunningServer, tmp_path_factory: pytest.TempPathFactory) -> People:
    folder = tmp_path_factory.mktemp("people")
    anna, bert, sue = (Person(folder, name) for name in ("Anna", "Bert", "Sue"))
    chance = random.Random(1)
    for owner, rows in ((anna, 120), (bert, 80)):
        lines = ["left,right,kind"]
        for _ in range(rows):
            kind, at = chance.choice([("low", 0.3), ("high", 0.7)])
            lines.append(f"{chance.gauss(at, 0.05):.4f},{chance.gauss(at, 0.05):.4f},{kind}")
        (owner.home / "rows.csv").write_text("\n".join(lines) + "\n")
        (owner.home / "schema.toml").write_text(SCHEMA)
    (sue.home / "mine.py").write_text(MODEL)
    return anna, bert, sue


@pytest.fixture(scope="module")
def datasets(server: RunningServer, people: People) -> tuple[str, str]:
    """Everybody names the enclave; the hospitals push, Anna with approval and a cap."""
    anna, bert, sue = people
    for person in people:
        person("enclave", "add", "lab", server.url, "--trust", f"simulated:{server.facts['root']}")
    push = ("dataset", "push", "rows.csv", "--schema", "schema.toml", "--epsilon", "4")
    more = ("--delta", "1e-4", "--scientist", sue.id)
    first = anna(*push, *more, "--name", "Anna", "--approval", "--max-epsilon", "3")
    shown = bert.read(*push, *more, "--name", "Bert")
    second = re.search(r"ds_[0-9a-f]{40}", shown)
    assert second is not None, shown
    return str(first["dataset"]), second[0]


def quote(sue: Person, *datasets: str, epsilon: str = "1", model: str = "mine.py:build") -> Any:
    named = [x for d in datasets for x in ("--dataset", d)]
    return sue(*QUOTE, "--model", model, "--epsilon", epsilon, *named)


def test_before_anything_is_set_up_each_command_says_what_is_missing(
    server: RunningServer, tmp_path: Path
) -> None:
    new = Person(tmp_path, "New")
    new.refused("usage.enclave", 2, "dataset", "ls")
    new.refused("usage.enclave", 2, "dataset", "ls", "--enclave", "nowhere")
    new.refused("usage.trust", 2, "dataset", "ls", "--enclave", server.url)
    new.refused("usage.identity-exists", 2, "identity", "new", "Again")
    here = ("--enclave", server.url, "--trust")
    new.refused("usage.trust", 2, "enclave", "verify", *here, "none.toml")
    text = new.refused(
        "evidence.root-unknown", 10, "enclave", "verify", *here, "simulated:" + "ab" * 32
    )
    assert server.facts["root"] in text
    nobody = ("--enclave", "https://127.0.0.1:9", "--trust", "simulated")
    new.refused("net.unreachable", 23, "enclave", "verify", *nobody)
    (new.home / "identity.json").unlink()
    new.refused("usage.identity-file", 2, "dataset", "ls", *here, "simulated")


def test_simulation_is_said_loudly(server: RunningServer, people: People) -> None:
    shown = people[0].read("enclave", "verify", "--enclave", server.url, "--trust", "simulated")
    assert "SIMULATED" in shown.splitlines()[0]
    found = people[0]("enclave", "verify", "--enclave", server.url, "--trust", "simulated")
    assert found["verdict"]["simulated"] is True
    assert found["verdict"]["root"] == server.facts["root"]


def test_an_owner_is_told_what_is_wrong_before_anything_leaves(
    people: People, datasets: tuple[str, str]
) -> None:
    anna, _, sue = people
    code, out, _ = anna.run("dataset", "template", "rows.csv", "--label", "kind")
    assert code == 0
    assert "0." not in out, "the template holds no value of the table"
    (anna.home / "empty.toml").write_text(out)
    budget = ("--epsilon", "4", "--delta", "1e-4")
    push = ("dataset", "push", "rows.csv", "--schema", "empty.toml", *budget)
    text = anna.refused("data.bounds-missing", 4, *push, "--scientist", sue.id)
    assert "'left'" in text
    anna.refused("usage.arguments", 2, *push)
    anna.refused("usage.value", 2, *push, "--scientist", "Sue")
    lines = (anna.home / "rows.csv").read_text().splitlines()
    (anna.home / "bad.csv").write_text("\n".join([*lines[:3], "0.5,7,low"]) + "\n")
    text = anna.refused(
        "data.out-of-bounds", 4, "dataset", "push", "bad.csv", "--schema", "schema.toml",
        *budget, "--scientist", sue.id,
    )  # fmt: skip
    assert "'right', row 3 (line 4): 7" in text
    assert len(anna("dataset", "ls")["datasets"]) == 1


def test_lists_show_ids_in_one_piece(people: People, datasets: tuple[str, str]) -> None:
    anna, bert, sue = people
    for name in datasets:
        assert name in sue.read("dataset", "ls")
        assert name in sue.read("dataset", "show", name)
    assert datasets[1] not in anna.read("dataset", "ls")
    anna.refused("data.unknown-dataset", 4, "dataset", "show", datasets[1])
    assert "4.0000" in bert.read("dataset", "budget", datasets[1])


def test_a_scientist_is_told_what_is_wrong_with_a_job(
    people: People, datasets: tuple[str, str]
) -> None:
    sue = people[2]

    def refused(code: str, exits: int, *more: str) -> str:
        return sue.refused(code, exits, *QUOTE, "--dataset", datasets[1], *more)

    good = ("--model", "mine.py:build")
    refused("usage.arguments", 2, *good)
    refused("usage.model", 2, "--model", "mine.py:nothing", "--epsilon", "1")
    text = refused("usage.model", 2, "--model", "mine.py:broken", "--epsilon", "1")
    assert "division by zero" in text
    refused("usage.file", 2, "--model", "none.py:build", "--epsilon", "1")
    refused("model.export", 5, "--model", "mine.py:wider", "--epsilon", "1")
    refused("usage.value", 2, *good, "--epsilon", "-1")
    sue.refused("data.unknown-dataset", 4, *QUOTE, *good, "--epsilon", "1", "--dataset", "ds_none")
    over = quote(sue, datasets[1], epsilon="30")
    assert over["allowed"] is False
    sue.refused("budget.exhausted", 9, "job", "submit", over["digest"])
    assert sue("dataset", "budget", datasets[1])["budget"]["jobs"] == 0


def test_the_story(people: People, datasets: tuple[str, str]) -> None:
    anna, bert, sue = people
    found = quote(sue, *datasets)
    digest = found["digest"]
    assert found["approval_needed"] == [anna.id]
    sue.refused("policy.not-approved", 8, "job", "submit", digest)
    assert digest in anna.read("job", "ls")
    assert anna.id in anna.read("job", "show", digest)

    # One owner rejects, then thinks again.
    assert bert("job", "reject", digest)["approved"] is False
    assert anna("job", "approve", digest)["approved"] is True
    sue.refused("policy.rejected", 8, "job", "submit", digest)
    assert bert.read("job", "approve", digest) == f"approved {digest}\n"

    status = sue("job", "submit", digest, "--no-watch")
    assert status["state"] in ("queued", "running", "done")
    job = status["job"]
    assert sue.read("job", "watch", job) == f"{job} done\n"
    assert job in sue.read("job", "ls")
    assert job in anna.read("job", "ls")

    files = ("--out", "w.safetensors", "--receipt", "r.json")
    assert "SIMULATED" in sue.read("job", "result", job, *files)
    anna.refused("auth.forbidden", 7, "job", "result", job, "--out", "stolen.safetensors")
    assert not (anna.home / "stolen.safetensors").exists()
    # An end is an end.
    assert sue("job", "cancel", job) == {"job": job, "cancelled": False, "state": "done"}

    receipt, weights = str(sue.home / "r.json"), str(sue.home / "w.safetensors")
    verify = ("receipt", "verify", receipt, "--weights", weights, "--trust")
    assert "-differentially private" in " ".join(anna.read(*verify, "simulated").split())
    anna.refused("evidence.root-unknown", 10, *verify, "simulated:" + "ab" * 32)
    assert json.loads(anna.read("receipt", "show", receipt))["predicate"]["job"] == job
    for owner, dataset in ((anna, datasets[0]), (bert, datasets[1])):
        state = owner("dataset", "budget", dataset)["budget"]
        assert state["jobs"] == 1
        assert 0 < state["spent_epsilon"] < 4
        seen = owner("audit", "verify", "--receipt", receipt)
        assert seen["debits"] == 2, "both datasets of the one job"
    assert "casemate.dev/log/" in sue.read("audit", "verify")


@pytest.mark.full
def test_a_new_policy_voids_an_approval_and_revocation_ends_it(
    people: People, datasets: tuple[str, str]
) -> None:
    anna, _, sue = people
    mine = datasets[0]
    digest = quote(sue, mine)["digest"]
    anna("job", "approve", digest)
    policy = ("--scientist", sue.id, "--approval", "--max-epsilon", "2.5")
    assert "2.5" in anna.read("dataset", "policy", mine, *policy)
    assert mine in sue.refused("policy.changed", 8, "job", "submit", digest)
    anna.refused("policy.changed", 8, "job", "approve", digest)
    sue.refused("auth.forbidden", 7, "dataset", "policy", mine, "--scientist", "*")
    sue.refused("auth.forbidden", 7, "dataset", "revoke", mine, "--yes")
    sue.refused("plan.unknown-quote", 6, "job", "submit", "sha256:" + "0" * 64)
    sue.refused("job.unknown", 22, "job", "watch", "job_" + "0" * 32)

    assert anna("dataset", "revoke", mine, "--yes") == {"dataset": mine, "state": "revoked"}
    again = (*QUOTE, "--model", "mine.py:build", "--epsilon", "1", "--dataset", mine)
    sue.refused("policy.revoked", 8, *again)
    assert quote(sue, datasets[1])["allowed"] is True


def test_an_unanswered_question_changes_nothing(people: People, datasets: tuple[str, str]) -> None:
    """``revoke`` asks; with nobody at the terminal it does not take silence for a yes."""
    bert = people[1]
    done = subprocess.run(
        [sys.executable, "-m", "casemate", "dataset", "revoke", datasets[1]],
        env={"PATH": os.environ.get("PATH", ""), "CASEMATE_HOME": str(bert.home)},
        stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 130
    assert "for ever?" in done.stderr
    assert bert("dataset", "show", datasets[1])["state"] == "ready"
