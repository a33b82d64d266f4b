"""A real witness over HTTP: cosigns, is killed, goes on; a second one on its folder is refused."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from contextlib import contextmanager

import httpx
import pytest

from casemate.seal import checkpoint, note
from support import server
from support.witness import Tree

pytestmark = pytest.mark.e2e

LOG = Tree([b"entry %d" % i for i in range(40)])
FORK = LOG.fork(10, [b"other %d" % i for i in range(30)])
OTHER = LOG.fork(0, [b"other %d" % i for i in range(40)])


def casemate(*words):
    return [sys.executable, "-m", "casemate", "witness", *map(str, words), "--format", "json"]


def run(*words):
    done = subprocess.run(casemate(*words), capture_output=True, text=True, check=False, timeout=60)
    return done.returncode, done.stdout, done.stderr


@contextmanager
def serving(folder):
    process = subprocess.Popen(
        casemate("serve", folder, "--port", "0"),
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    try:
        line = process.stdout.readline()
        assert line, process.stderr.read()
        yield process, json.loads(line)["url"]
    finally:
        if process.poll() is None:
            process.kill()
        process.wait(30)
        process.stdout.close()
        process.stderr.close()


@pytest.fixture
def folder(tmp_path):
    assert run("init", tmp_path / "w", "--name", "w.example/e2e")[0] == 0
    assert run("add", tmp_path / "w", LOG.log)[0] == 0
    return tmp_path / "w"


def post(client, body):
    return client.post("/add-checkpoint", content=body)


def test_a_witness_over_http(folder):
    with serving(folder) as (process, url), httpx.Client(base_url=url, timeout=30) as client:
        about = client.get("/").json()
        witness = note.verifier(about["vkey"])
        answer = post(client, LOG.request(0, 20))
        assert answer.status_code == 200
        both = LOG.signed(20).add(note.lines(answer.text))
        assert witness in note.verify(both, [LOG.log, witness])
        answer = post(client, FORK.request(0, 25))
        assert (answer.status_code, answer.text) == (409, "20\n")
        assert answer.headers["content-type"] == "text/x.tlog.size"
        assert post(client, FORK.request(20, 25)).status_code == 422
        assert post(client, FORK.request(20, 20)).status_code == 409
        assert post(client, b"x" * (note.MAX_NOTE + 1)).status_code == 413
        assert client.get("/").json()["logs"][0]["forks"] == 1
        encoded = LOG.origin.replace("/", "%2F")
        for path in (LOG.origin, encoded):
            assert client.get(f"/checkpoint/{path}").text == str(both)
        code, _, err = run("serve", folder, "--port", 0)
        assert code == 21 and json.loads(err)["error"]["code"] == "ledger.in-use"
        code, _, err = run("add", folder, LOG.log)
        assert code == 21 and json.loads(err)["error"]["code"] == "ledger.in-use"
        process.send_signal(signal.SIGTERM)
        assert process.wait(30) == 0
        events = [json.loads(x)["event"] for x in process.stderr.read().splitlines()]
        assert {"cosigned", "refused", "fork", "unproven"} <= set(events)
    shown = json.loads(run("show", folder)[1])
    assert shown["logs"][0]["size"] == 20 and shown["logs"][0]["forks"] == 1


def test_killed_under_load_it_forgets_nothing_that_it_let_out(folder):
    """SIGKILL while clients ask; what was answered is held by the next one."""
    highest = 0
    for _ in range(3):
        with serving(folder) as (process, url):
            out, lock = [highest], threading.Lock()

            def ask(url=url, out=out, lock=lock):
                with httpx.Client(base_url=url, timeout=30) as client:
                    while True:
                        size = max(out)
                        try:
                            answer = post(client, LOG.request(size, min(size + 1, 40)))
                        except httpx.HTTPError:
                            return
                        with lock:
                            if answer.status_code == 200:
                                out.append(min(size + 1, 40))
                            elif answer.status_code == 409:
                                out.append(int(answer.text))

            clients = [threading.Thread(target=ask) for _ in range(3)]
            for c in clients:
                c.start()
            while max(out) < min(highest + 5, 40):
                time.sleep(0.005)
            os.kill(process.pid, signal.SIGKILL)
            for c in clients:
                c.join()
            highest = max(out)
        with serving(folder) as (_, url), httpx.Client(base_url=url, timeout=30) as client:
            held = client.get("/").json()["logs"][0]["size"]
            assert held in (highest, highest + 1)
            assert post(client, OTHER.request(held, 40)).status_code == 422
            highest = held


def test_the_log_of_an_enclave_is_watched_by_its_evidence(folder, tmp_path):
    with server.start(tmp_path / "server") as running:
        code, _, err = run("add", folder, "--from", running.url)
        assert code == 2 and json.loads(err)["error"]["code"] == "usage.trust"
        code, out, err = run("add", folder, "--from", running.url, "--trust", "simulated")
        assert code == 0 and "SIMULATED" in err
        log = note.verifier(json.loads(out)["vkey"])
        fetched = httpx.get(f"{running.url}/log/checkpoint", verify=False)
        signed = note.parse(fetched.content)
    head = checkpoint.verify(signed, log)
    assert json.loads(out)["origin"] == head.origin and head.size > 0
    with serving(folder) as (_, url), httpx.Client(base_url=url, timeout=30) as client:
        body = str(checkpoint.Request(0, (), signed)).encode()
        assert post(client, body).status_code == 200
        newest = note.parse(client.get(f"/checkpoint/{head.origin}").content)
        assert checkpoint.verify(newest, log) == head
