"""``casemate model deploy`` and its kin, ``casemate predict``: what they read, write and refuse."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner

from casemate.cli import served
from casemate.cli.main import cli
from casemate.client import weights
from casemate.spec.errors import CasemateError

MODULE = (
    "from torch import nn\n"
    "class Words(nn.Module):\n"
    "    def __init__(self):\n"
    "        super().__init__()\n"
    "        self.e = nn.Embedding(10, 4)\n"
    "    def forward(self, tokens):\n"
    "        return self.e(tokens).sum(1)\n"
    "def build():\n"
    "    return nn.Linear(3, 2)\n"
)


def run(*arguments: str) -> Any:
    return CliRunner().invoke(cli, arguments)


@pytest.fixture
def mine(tmp_path: Path) -> Path:
    path = tmp_path / "mine.py"
    path.write_text(MODULE)
    return path


def test_a_module_is_packed_for_prediction_and_checked(mine: Path, tmp_path: Path) -> None:
    out = str(tmp_path / "m.cmm")
    made = run("model", "export", f"{mine}:Words", "--input", "tokens:i64:5:0:9", "--out", out,
               "--format", "json")  # fmt: skip
    assert made.exit_code == 0, made.output
    found = json.loads(run("model", "check", out, "--format", "json").output)
    assert found["outputs"] == {"output": "f32"} and found["inputs"] == {"tokens": "i64"}
    assert "operations forward" not in run("model", "check", out).output
    refused = run("model", "export", f"{mine}:Words", "--input", "tokens:i64:5", "--out", out)
    assert "index-range" in str(refused.exception)


@pytest.mark.parametrize(
    "given",
    ["x", "x:f32", "x:f64:3", "x:f32:a", "x:i64:3:0", "x:i64:3:0:b", "x:f32:3:0:1:2"],
)
def test_an_input_in_another_form_is_refused(given: str, mine: Path) -> None:
    done = run("model", "deploy", f"{mine}:build", "--caller", "*", "--input", given)
    assert done.exit_code == 2 and "NAME:DTYPE:SHAPE" in done.output


def test_shapes_are_read(mine: Path) -> None:
    packed = served.pack(f"{mine}:build", {"input": ("f32", (3,), None)})
    assert packed.digest.startswith("sha256:")


@pytest.mark.parametrize(
    "arguments",
    [
        ["export", "mine.py:build", "--out", "x.cmm"],
        ["export", "mine.py:build", "--out", "x.cmm", "--loss", "mse", "--input", "input:f32:3"],
        ["deploy", "mine.py:build", "--input", "input:f32:3"],
        ["policy", "model_1"],
    ],
    ids=lambda a: " ".join(a[:2]),
)
def test_what_is_missing_is_said(arguments: list[str]) -> None:
    assert run("model", *arguments).exit_code == 2


@pytest.mark.parametrize("suffix", [".json", ".safetensors"])
def test_outputs_can_be_written_and_read_again(suffix: str, tmp_path: Path) -> None:
    path = tmp_path / f"out{suffix}"
    given = {"a": np.arange(6, dtype=np.float32).reshape(2, 3), "b": np.array([1, 2])}
    served._write(path, given)
    found = served._read(path)
    assert all(np.array_equal(found[n], a) for n, a in given.items())


def test_a_single_array_and_files_that_are_none(tmp_path: Path) -> None:
    (tmp_path / "x.json").write_text("[[1, 2.5], [3, 4]]")
    assert served._read(tmp_path / "x.json").tolist() == [[1.0, 2.5], [3.0, 4.0]]
    (tmp_path / "no.json").write_text('{"x": [[1], [2, 3]]}')
    (tmp_path / "x.safetensors").write_bytes(b"nothing")
    for name in ("absent.json", "no.json", "x.safetensors"):
        with pytest.raises(CasemateError, match=r"usage\.file"):
            served._read(tmp_path / name)
    assert weights.numpy() is np
