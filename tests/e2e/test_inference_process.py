"""A deployed model on a real server, by command line and SDK: over a SIGKILL, a restart, fsck."""

from __future__ import annotations

import io
import json
import os
import signal
import subprocess
import sys
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import casemate as cm
from casemate.cli.main import main
from support.server import RunningServer, start

pytestmark = pytest.mark.e2e

MODULE = (
    "import torch\nfrom torch import nn\n"
    "def build():\n    torch.manual_seed(5)\n    return nn.Sequential(nn.Linear(6, 4), nn.GELU())\n"
)


class Person:
    """Somebody with a home folder and a command line, in this process."""

    def __init__(self, folder: Path, name: str) -> None:
        self.folder = folder / name
        self.folder.mkdir()
        self.id = self("identity", "new", name)["id"]

    def run(self, *arguments: str) -> tuple[int, str, str]:
        out, err = io.StringIO(), io.StringIO()
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("CASEMATE_HOME", str(self.folder))
            patch.delenv("CASEMATE_LOGS", raising=False)
            patch.chdir(self.folder)
            with redirect_stdout(out), redirect_stderr(err), pytest.raises(SystemExit) as caught:
                main([*arguments, "--format", "json"])
        return int(caught.value.code or 0), out.getvalue(), err.getvalue()

    def __call__(self, *arguments: str) -> Any:
        code, out, err = self.run(*arguments)
        assert code == 0, err
        return json.loads(out)

    def meets(self, server: RunningServer) -> None:
        trust = f"simulated:{server.facts['root']}"
        self("enclave", "add", "lab", server.url, "--trust", trust, "--default")

    def enclave(self, server: RunningServer) -> cm.Enclave:
        me = cm.Identity.load(self.folder / "identity.json")
        return cm.connect(server.url, trust=server.trust, identity=me, memory=None)


def fsck(state: Path) -> dict[str, Any]:
    done = subprocess.run(
        [sys.executable, "-m", "casemate", "audit", "fsck", str(state), "--tee", "simulated",
         "--format", "json"],
        capture_output=True, text=True, check=False,
        env={"PATH": os.environ.get("PATH", ""), "HOME": str(state.parent)},
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def test_the_whole_story(tmp_path: Path) -> None:
    state = tmp_path / "state"
    owner, caller, stranger = (Person(tmp_path, n) for n in ("owner", "caller", "stranger"))
    (owner.folder / "mine.py").write_text(MODULE)
    rows = np.random.default_rng(0).normal(size=(3, 6)).astype(np.float32)
    torch.manual_seed(5)
    module = nn.Sequential(nn.Linear(6, 4), nn.GELU())
    with torch.inference_mode():
        wanted = module(torch.from_numpy(rows)).numpy()
    with start(state) as server:
        for person in (owner, caller, stranger):
            person.meets(server)
        deployed = owner(
            "model", "deploy", "mine.py:build", "--input", "input:f32:6", "--caller", caller.id,
            "--calls", "3", "--name", "net",
        )  # fmt: skip
        model = deployed["model"]
        assert owner("model", "ls")["models"] == [deployed]
        (caller.folder / "rows.json").write_text(json.dumps({"input": rows.tolist()}))
        found = caller("predict", model, "--input", "rows.json", "--out", "out.safetensors")
        assert found["outputs"] == {"output": [3, 4]}
        before = caller.enclave(server).predict(model, rows)
        np.testing.assert_allclose(before, wanted, rtol=1e-5, atol=1e-6)
        (stranger.folder / "rows.json").write_text((caller.folder / "rows.json").read_text())
        code, _, err = stranger.run("predict", model, "--input", "rows.json")
        assert code == 5 and json.loads(err)["error"]["code"] == "model.unknown"
        server.stop(signal.SIGKILL)
    assert fsck(state)["findings"] == []
    with start(state) as server:
        for person in (owner, caller):
            person.meets(server)
        assert caller("model", "show", model)["left"] == 1
        again = caller.enclave(server).predict(model, rows)
        assert np.array_equal(again, before)  # to the bit
        code, _, err = caller.run("predict", model, "--input", "rows.json")
        assert code == 8 and json.loads(err)["error"]["code"] == "policy.calls"
        changed = owner(
            "model", "policy", model, "--caller", caller.id, "--calls", "5", "--epoch", "1"
        )
        assert changed["policy"]["epoch"] == 1
        shown = caller("predict", model, "--input", "rows.json")
        np.testing.assert_allclose(shown["outputs"]["output"], wanted, rtol=1e-5, atol=1e-6)
        assert owner("model", "undeploy", model) == {"undeployed": model}
        assert caller.run("model", "show", model)[0] == 5
    assert fsck(state)["findings"] == []
