"""The scripts of examples/ run as they are written, in a small form where they are slow."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from support.contract import needs_a_chain

EXAMPLES = Path(__file__).parents[2] / "examples"


def run(name: str) -> str:
    done = subprocess.run(
        [sys.executable, "-W", "ignore", str(EXAMPLES / name)],
        capture_output=True, text=True, check=False, timeout=250,
        env={**os.environ, "CASEMATE_EXAMPLE_ROWS": "320", "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.e2e
def test_private_training() -> None:
    shown = run("private_training.py")
    before, after = (float(x) for x in re.findall(r"accuracy \w+: ([\d.]+)%", shown))
    assert before < 60 < 80 < after
    assert "at epsilon 2.00" in shown


@pytest.mark.e2e
def test_private_inference() -> None:
    shown = run("private_inference.py")
    assert "SIMULATED" in shown and "those of the model itself: True" in shown
    assert float(re.findall(r"accuracy ([\d.]+)%", shown)[0]) > 90
    codes = ("model.unknown", "auth.forbidden", "limit.records", "policy.calls",
             "model.mixes-records")  # fmt: skip
    assert all(code in shown for code in codes)


@pytest.mark.e2e
def test_contest() -> None:
    shown = run("contest.py")
    assert "SIMULATED" in shown and "WENT THROUGH" not in shown
    codes = ("policy.evaluation-only", "policy.contest", "model.inputs", "model.mixes-records",
             "policy.entries", "policy.expired", "receipt.leaderboard",
             "model.unknown-sale")  # fmt: skip
    assert all(code in shown for code in codes)
    assert "the winner's model: True" in shown
    boards = re.findall(r"3 participant\(s\)", shown)
    assert len(boards) == 2


@pytest.mark.e2e
@pytest.mark.full
def test_private_lora() -> None:
    pytest.importorskip("peft")
    pytest.importorskip("transformers")
    shown = run("private_lora.py")
    assert "epsilon 4" in shown
    assert re.search(r"after LoRA: [\d.]+% at epsilon 4\.00", shown)


@pytest.mark.e2e
def test_anchored_receipt() -> None:
    needs_a_chain()
    shown = run("anchored_receipt.py")
    assert "SIMULATED" in shown
    assert "this receipt stands in the log: True" in shown
    refused = re.findall(r"^  (.+): refused, (.+)$", shown, re.M)
    assert [why for _, why in refused] == [
        "the path leads to another root",
        "the path leads to another root",
        "the path is too short",
        "the path is too long",
        "only the poster posts",
        "the log has not grown",
    ]
    assert "neither the Ed25519 signature" in shown


def test_every_script_has_a_test() -> None:
    text = Path(__file__).read_text()
    assert all(f'run("{p.name}")' in text for p in EXAMPLES.glob("*.py"))
