"""A server process that is killed while a real worker trains, and started again."""

from __future__ import annotations

import signal
import time
from pathlib import Path

import pytest

from casemate.client import receipts
from casemate.spec.receipt import ReceiptBundle
from support.server import Party, start, train_spec

pytestmark = pytest.mark.e2e

# Some seconds of training, a state after each fortieth.
LONG = train_spec(epsilon=1.0, steps=3_000, batch=8)


def test_a_killed_servers_job_goes_on_from_its_newest_state(tmp_path: Path) -> None:
    """The next boot takes it over, charged once, and its receipt holds."""
    state, limits = tmp_path / "state", {"state_seconds": 0.1}
    with start(state, limits=limits, spares=0) as server:
        owner, scientist = Party(server, "owner"), Party(server, "scientist")
        info = owner.push(rows=64)
        job = scientist.submit(scientist.quote([info], train=LONG)).job
        kept: list[str] = []
        while len(kept) < 2:
            found = [p.name for p in (state / "states").glob(f"{job}.*")]
            kept += [name for name in found if name not in kept]
            assert scientist.status(job).state in ("queued", "running")
            time.sleep(0.01)
        server.stop(signal.SIGKILL)
    (left,) = (state / "states").glob(f"{job}.*")
    assert int(left.suffix[1:]) >= 150
    with start(state, limits=limits, spares=0) as server:
        for party in (owner, scientist):
            party.server = server
            party.connect()
        status = scientist.wait(job)
        assert status.state == "done", (status, server.log.read_text())
        bundle = scientist.request("GET", f"/v1/jobs/{job}/receipt").value(ReceiptBundle)
        verified = receipts.verify_receipt(bundle, trust=server.trust)
        assert scientist.result(job, verified.receipt.result_digest)
        budget = owner.dataset(info.dataset).budget
        assert budget is not None and budget.jobs == 1
        assert list((state / "states").iterdir()) == []
