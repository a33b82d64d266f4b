"""``casemate audit fsck`` on the folder of a real server: after an orderly end, after SIGKILL, and
after someone was at its files."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from support.server import NON_PRIVATE, Party, start, train_spec

pytestmark = pytest.mark.e2e


def fsck(state: Path, *words: str) -> tuple[int, dict[str, Any], str]:
    command = [sys.executable, "-m", "casemate", "audit", "fsck", str(state), "--tee", "simulated"]
    run = subprocess.run(
        [*command, "--format", "json", *words],
        capture_output=True,
        text=True,
        env={"PATH": os.environ.get("PATH", ""), "HOME": str(state.parent)},
    )
    return run.returncode, json.loads(run.stdout or "{}"), run.stderr


@pytest.mark.full
def test_a_real_servers_state(tmp_path: Path) -> None:
    state = tmp_path / "state"
    with start(state) as server:
        owner, scientist = Party(server, "owner"), Party(server, "scientist")
        info = owner.push(rows=64)
        open_to_all = replace(info.policy, nonprivate="all owners agree to this")
        public = owner.push(rows=32, policy=open_to_all, seed=3)
        jobs = []
        for datasets, spec in (
            ([info, public], train_spec(epsilon=1.0, steps=10)),
            ([public], replace(train_spec(steps=5), privacy=NON_PRIVATE)),
        ):
            jobs.append(scientist.submit(scientist.quote(datasets, train=spec)).job)
            assert scientist.wait(jobs[-1]).state == "done"
        owner.request("DELETE", f"/v1/datasets/{public.dataset}")
        code, _, err = fsck(state)
        assert code == 21 and "ledger.in-use" in err
        late = scientist.submit(scientist.quote([info], train=train_spec(1.0, 3000, 32))).job
        while scientist.status(late).state == "queued":
            time.sleep(0.02)
        server.stop(signal.SIGKILL)
    before = {p: p.stat().st_mtime_ns for p in state.rglob("*") if p.is_file()}
    code, found, err = fsck(state)
    assert code == 0, (found, err)
    assert found["findings"] == []
    assert (found["starts"], found["datasets"], found["jobs"], found["receipts"]) == (1, 2, 3, 2)
    assert {p: p.stat().st_mtime_ns for p in state.rglob("*") if p.is_file()} == before

    with start(state) as server:
        server.stop()
    code, found, _ = fsck(state)
    assert (code, found["starts"], found["left"]) == (0, 2, [])
    result = state / "results" / jobs[0]
    data = result.read_bytes()
    result.unlink()
    upload = next(p for p in (state / "uploads").iterdir() if p.suffix == "")
    upload.write_bytes(upload.read_bytes() + b"x")
    (state / "results" / "more").write_bytes(data)
    code, found, _ = fsck(state)
    assert code == 21
    assert any(jobs[0] in finding for finding in found["findings"])
    assert any(upload.name in finding for finding in found["findings"])
    assert found["left"] == ["results/more"]


def test_there_is_nothing_to_check(tmp_path: Path) -> None:
    code, _, err = fsck(tmp_path)
    assert code == 21 and "ledger.missing" in err
    assert list(tmp_path.iterdir()) == []
