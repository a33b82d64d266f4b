"""A deployed model on a real server, by command line and SDK: over a SIGKILL, a restart, fsck; and
its sale."""

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
from casemate.graph import pack
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

    def run(self, *arguments: str, form: str = "json") -> tuple[int, str, str]:
        out, err = io.StringIO(), io.StringIO()
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("CASEMATE_HOME", str(self.folder))
            patch.setenv("COLUMNS", "200")  # of tables, wherever this runs
            patch.delenv("CASEMATE_LOGS", raising=False)
            patch.chdir(self.folder)
            with redirect_stdout(out), redirect_stderr(err), pytest.raises(SystemExit) as caught:
                main([*arguments, "--format", form])
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


def test_a_model_is_sold(tmp_path: Path) -> None:
    """Granted, pulled over a SIGKILL, verified without a server; the weights are equal."""
    state = tmp_path / "state"
    seller, buyer, stranger = (Person(tmp_path, n) for n in ("seller", "buyer", "stranger"))
    (seller.folder / "mine.py").write_text(MODULE)
    exported = seller(
        "model", "export", "mine.py:build", "--input", "input:f32:6", "--out", "mine.cmm"
    )
    with start(state) as server:
        for person in (seller, buyer, stranger):
            person.meets(server)
            person("model", "sales")  # enrols
        model = seller("model", "deploy", "mine.cmm", "--caller", seller.id)["model"]
        sale = seller("model", "grant", model, "--to", buyer.id, "--terms", "10 crowns")
        assert (sale["state"], sale["sale"]["buyer"]) == ("open", buyer.id)
        assert sale["sale"]["model_digest"] == exported["digest"]
        assert seller("model", "grant", model, "--to", buyer.id, "--terms", "10 crowns") == sale
        for person in (seller, buyer):
            assert person("model", "sales") == {"sales": [sale]}
        again = ("model", "grant", model, "--to", buyer.id, "--terms", "10 crowns")
        for arguments in (again, ("model", "sales")):
            code, shown, _ = seller.run(*arguments, form="table")
            assert code == 0 and "crowns" in shown and "open" in shown
        server.stop(signal.SIGKILL)
    assert fsck(state)["findings"] == []
    with start(state) as server:
        for person in (seller, buyer, stranger):
            person.meets(server)
        code, _, err = stranger.run("model", "pull", sale["id"], "--out", "theirs.cmm")
        assert code == 5 and json.loads(err)["error"]["code"] == "model.unknown-sale"
        code, _, err = seller.run("model", "pull", sale["id"], "--out", "theirs.cmm")
        assert code == 7 and json.loads(err)["error"]["code"] == "auth.forbidden"
        assert not (stranger.folder / "theirs.cmm").exists()
        pulled = buyer("model", "pull", sale["id"], "--out", "bought.cmm", "--receipt", "sale.json")
        checks = {c["name"]: c["state"] for c in pulled["checks"]}
        assert (checks["model"], checks["seller"], checks["seen before"]) == ("ok", "ok", "ok")
        shown = seller("model", "pull", sale["id"], "--receipt", "sale.json")
        assert shown["receipt"] == pulled["receipt"] and shown["model_file"] is None
        assert "grant" in buyer("audit", "verify")["kinds"]
        assert seller("model", "undeploy", model) == {"undeployed": model}
        code, _, err = buyer.run("model", "pull", sale["id"], "--out", "again.cmm")
        assert code == 5 and json.loads(err)["error"]["code"] == "model.sale-ended"
        buyer("model", "pull", sale["id"], "--receipt", "later.json")
        root = server.facts["root"]
    assert fsck(state)["findings"] == []
    # Without a server.
    bought = (buyer.folder / "bought.cmm").read_bytes()
    assert bought == (seller.folder / "mine.cmm").read_bytes()
    found, wanted = (
        {n: bytes(v) for n, (_, v) in pack.unpack(data)[1].items()}
        for data in (bought, (seller.folder / "mine.cmm").read_bytes())
    )
    assert found == wanted and len(found) == 2
    trust = ("--trust", f"simulated:{root}")
    for folder, file in ((buyer, "sale.json"), (buyer, "later.json"), (seller, "sale.json")):
        done = folder("receipt", "verify", file, *trust)
        assert done["receipt"]["sale"] == sale["sale"] and done["simulated"] == ["tee"]
    done = buyer("receipt", "verify", "sale.json", "--weights", "bought.cmm", *trust)
    assert {c["name"]: c["state"] for c in done["checks"]}["model"] == "ok"
    (buyer.folder / "bought.cmm").write_bytes(bought[:-1] + bytes([bought[-1] ^ 1]))
    code, _, err = buyer.run("receipt", "verify", "sale.json", "--weights", "bought.cmm", *trust)
    assert code == 20 and json.loads(err)["error"]["code"] == "receipt.weights"
    code, _, err = buyer.run("receipt", "verify", "sale.json", "--trust", "simulated:" + "0" * 64)
    assert code != 0
    code, table, _ = buyer.run("receipt", "verify", "sale.json", *trust, form="table")
    assert code == 0 and "SIMULATED" in table and "10 crowns" in table.replace("\n", " ")
    statement = buyer("receipt", "show", "sale.json")
    assert statement["predicateType"] == "https://casemate.dev/sale/v1"
