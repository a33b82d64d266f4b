"""A real server process with real workers over TLS."""

from __future__ import annotations

import fcntl
import json
import os
import signal
import subprocess
import threading
import time
from dataclasses import replace
from pathlib import Path

import pytest

from casemate.client import log as client_log
from casemate.client import receipts
from casemate.seal import stream
from casemate.spec.data import Budget
from casemate.spec.errors import JobError, LedgerError
from casemate.spec.job import Clipping, Dp, Views
from casemate.spec.receipt import ReceiptBundle
from support.server import Party, RunningServer, mlp, start, table, train_spec

pytestmark = pytest.mark.e2e

# Long beside the test; of the other the end is waited for, and shown when its time is over.
LONG = train_spec(epsilon=1.0, steps=20_000, batch=8)
SHORTER = train_spec(epsilon=1.0, steps=2_000, batch=8)


def _workers(server: RunningServer) -> set[int]:
    """The server's worker processes."""
    found = set()
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            parent = int(stat.read_text().rpartition(")")[2].split()[1])
            name = (stat.parent / "cmdline").read_bytes()
        except OSError:
            continue
        if parent == server.process.pid and b"casemate.worker" in name:
            found.add(int(stat.parent.name))
    return found


def log_kinds(party: Party) -> list[str]:
    return [e.kind for e in client_log.fetch(party.connection).entries]


def _running(party: Party, job: str) -> None:
    while (status := party.status(job)).state == "queued":
        time.sleep(0.02)
    assert status.state == "running", status


def test_two_owners_one_scientist_one_model(
    server: RunningServer, owner: Party, scientist: Party
) -> None:
    other = Party(server, "other")
    one, two = owner.push(rows=96, seed=1), other.push(rows=64, seed=2)
    assert (one.state, two.state) == ("ready", "ready")
    model = mlp()
    quote = scientist.quote([one, two], model)
    assert quote.plan.units == 160
    job = scientist.submit(quote).job
    status = scientist.wait(job)
    assert (status.state, status.error) == ("done", None)
    bundle = scientist.request("GET", f"/v1/jobs/{job}/receipt").value(ReceiptBundle)
    verified = receipts.verify_receipt(bundle, trust=server.trust)
    result = scientist.result(job, verified.receipt.result_digest)
    from casemate.graph import pack

    _, before = pack.unpack(model.data)
    assert {n: i.shape for n, (i, _) in result.items()} == {
        n: i.shape for n, (i, _) in before.items()
    }
    assert all(bytes(result[n][1]) != bytes(before[n][1]) for n in result)
    for party, info in ((owner, one), (other, two)):
        budget = party.dataset(info.dataset).budget
        assert budget is not None and budget.jobs == 1 and budget.spent_epsilon > 0


@pytest.mark.parametrize("form", [pytest.param("per-layer", marks=pytest.mark.full), "automatic"])
def test_choices_of_a_job_go_through_to_the_receipt(
    server: RunningServer, owner: Party, scientist: Party, form: Clipping
) -> None:
    """A form of the clip, the average of the weights and views, by quote, run and audit."""
    plain = train_spec(epsilon=1.0, steps=20, batch=8)
    assert isinstance(plain.privacy, Dp)
    dp = replace(plain.privacy, clipping=form)
    spec = replace(plain, privacy=dp, ema=0.9, views=Views(count=2))
    quote = scientist.quote([owner.push(rows=64)], train=spec)
    assert (quote.plan.clipping, quote.execution.path) == (form, "graph")
    job = scientist.submit(quote).job
    status = scientist.wait(job)
    assert (status.state, status.error) == ("done", None)
    bundle = scientist.request("GET", f"/v1/jobs/{job}/receipt").value(ReceiptBundle)
    assert receipts.verify_receipt(bundle, trust=server.trust).receipt.quote_digest


def test_rows_off_their_schema_are_refused_in_the_worker(owner: Party) -> None:
    nan = b"\x00\x00\xc0\x7f"
    assert owner.push(rows=8, wire=table(8, marker=nan)).error == "data.not-finite"
    assert owner.push(rows=8, wire=table(8)[:-8] + b"\x07" + bytes(7)).error == "data.bounds"


def test_a_killed_worker_costs_the_charge_and_not_the_server(
    server: RunningServer, owner: Party, scientist: Party
) -> None:
    info = owner.push(rows=64, budget=Budget(epsilon=50.0, delta=1e-2))
    quote = scientist.quote([info], train=SHORTER)
    job = scientist.submit(quote).job
    _running(scientist, job)
    (busy,) = _workers(server)
    # While the run is under way the server answers and the result is nowhere.
    assert scientist.request("GET", "/v1/datasets").status == 200
    with pytest.raises(JobError) as early:
        scientist.request("GET", f"/v1/jobs/{job}/receipt")
    assert early.value.code == "job.not-done"
    os.kill(busy, signal.SIGKILL)
    status = scientist.wait(job)
    assert (status.state, status.error) == ("failed", "job.failed")
    budget = owner.dataset(info.dataset).budget
    assert budget is not None and budget.jobs == 1
    assert scientist.wait(scientist.submit(scientist.quote([info])).job).state == "done"


def test_cancel_kills_the_worker(server: RunningServer, owner: Party, scientist: Party) -> None:
    info = owner.push(rows=64)
    quote = scientist.quote([info], train=LONG)
    job = scientist.submit(quote).job
    _running(scientist, job)
    before = _workers(server)
    assert before
    assert scientist.request("DELETE", f"/v1/jobs/{job}").status == 200
    assert scientist.status(job).state == "cancelled"
    while before & _workers(server):  # nobody waits for their end
        time.sleep(0.01)


def test_a_second_server_on_the_same_folder_is_refused(server: RunningServer) -> None:
    from casemate.server.config import Config
    from casemate.server.serve import alone

    with pytest.raises(LedgerError) as refused, alone(Config(state=server.state, dev=True)):
        pass
    assert refused.value.code == "ledger.in-use"


def test_what_a_killed_server_was_starting_is_waited_for(tmp_path: Path) -> None:
    """It has the lock's descriptor until it runs its own program."""
    from casemate.server.config import Config
    from casemate.server.serve import LOCK_FILE, alone

    with (tmp_path / LOCK_FILE).open("w") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        end = threading.Timer(0.2, fcntl.flock, (held, fcntl.LOCK_UN))
        end.start()
        with alone(Config(state=tmp_path, dev=True)):
            pass
        end.join()


def test_no_private_key_lies_in_the_state_folder(server: RunningServer) -> None:
    """Only the simulated TEE, whose files say so, keeps keys there; rows never lie open."""
    for path in server.state.rglob("*"):
        if path.is_file() and "SIMULATED" not in path.name:
            data = path.read_bytes()
            assert b"PRIVATE KEY" not in data and b'"x":{' not in data and b"SQLite" not in data
            assert path.stat().st_mode & 0o077 == 0, path


def test_a_server_that_is_stopped_ends_its_job_first(tmp_path: Path) -> None:
    """As an operator stops it: what runs ends, what waits is run by the next start."""
    with start(tmp_path / "state", drain_seconds=120.0) as running:
        owner, scientist = Party(running, "owner"), Party(running, "scientist")
        info = owner.push(rows=64, budget=Budget(epsilon=20.0, delta=1e-2))
        quotes = [scientist.quote([info], train=t) for t in (SHORTER, train_spec(1.0, steps=10))]
        jobs = [scientist.submit(quote).job for quote in quotes]
        _running(scientist, jobs[0])
        assert running.stop() == 0
    with start(tmp_path / "state") as again:
        for party in (owner, scientist):
            party.server = again
            party.connect()
        assert scientist.status(jobs[0]).state == "done"
        assert scientist.wait(jobs[1]).state == "done"
        assert "takeover" not in log_kinds(scientist)
        again.stop(signal.SIGKILL)


@pytest.mark.full  # test_server_jobs.py has it without processes
def test_a_second_signal_is_not_waited_for(tmp_path: Path) -> None:
    with start(tmp_path / "state", drain_seconds=1e4) as running:
        owner, scientist = Party(running, "owner"), Party(running, "scientist")
        info = owner.push(rows=64, budget=Budget(epsilon=20.0, delta=1e-2))
        _running(scientist, scientist.submit(scientist.quote([info], train=LONG)).job)
        running.process.send_signal(signal.SIGTERM)
        with pytest.raises(subprocess.TimeoutExpired):
            running.process.wait(3)
        assert running.stop() == 0


@pytest.mark.full
def test_a_crash_in_the_run_then_a_restart(
    folder: Path, server: RunningServer, owner: Party, scientist: Party
) -> None:
    """The last test of this server: it is killed as the power would."""
    info = owner.push(rows=64, budget=Budget(epsilon=20.0, delta=1e-2))
    done = scientist.submit(scientist.quote([info])).job
    scientist.wait(done)
    bundle = scientist.request("GET", f"/v1/jobs/{done}/receipt").value(ReceiptBundle)
    # Half of an upload.
    key, wire = os.urandom(32), table(4000)
    sealed = b"".join(stream.encrypt(key, [wire]))
    name = str(owner.request("POST", "/v1/uploads", {"size": len(sealed)}).json()["upload"])
    owner.request("PATCH", f"/v1/uploads/{name}", sealed[:70_000], headers={"upload-offset": "0"})
    job = scientist.submit(scientist.quote([info], train=LONG)).job
    _running(scientist, job)
    server.stop(signal.SIGKILL)
    with start(folder / "state") as again:
        assert again.facts["boot"] != server.facts["boot"]
        assert again.facts["root"] == server.facts["root"]
        for party in (owner, scientist):
            party.server = again
            party.connect()
        # This boot goes on with it, on the same charge and with new noise, until it is told not to.
        assert scientist.status(job).state in ("queued", "running")
        assert log_kinds(scientist).count("takeover") == 1
        assert scientist.request("DELETE", f"/v1/jobs/{job}").status == 200
        assert scientist.status(job).state == "cancelled"
        budget = owner.dataset(info.dataset).budget
        assert budget is not None and budget.jobs == 2
        kept = scientist.request("GET", f"/v1/jobs/{done}/receipt").value(ReceiptBundle)
        assert kept == bundle
        verified = receipts.verify_receipt(kept, trust=again.trust)
        assert scientist.result(done, verified.receipt.result_digest)
        # The upload goes on where it stood.
        head = owner.request("HEAD", f"/v1/uploads/{name}").headers["upload-offset"]
        assert head == "70000"
        rest = owner.request(
            "PATCH", f"/v1/uploads/{name}", sealed[70_000:], headers={"upload-offset": head}
        )
        assert rest.headers["upload-offset"] == str(len(sealed))
        again_job = scientist.submit(scientist.quote([info])).job
        assert scientist.wait(again_job).state == "done"
        assert again.stop() == 0
        assert not (again.state / "server.json").exists()
        log = again.log.read_text()
    assert "SIMULATED TEE: nothing here is protected" in log
    for line in log.splitlines():
        if line.startswith("{"):
            json.loads(line)
    assert not _workers(again)
