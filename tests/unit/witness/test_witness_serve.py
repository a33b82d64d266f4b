"""The HTTP face of a witness, called as ASGI: routes, limits, what happens when it stops."""

import asyncio
import errno
import json
import os
import signal
import socket
import threading

import httpx
import pytest

from casemate.seal import note
from casemate.seal.identity import Identity
from casemate.seams import OsDisk
from casemate.spec.errors import LedgerError, NetError
from casemate.witness import serve, service, state
from casemate.witness.alone import alone
from casemate.witness.service import Witness
from support.disk import SimDisk
from support.witness import Tree

ANNA = Identity.generate("w.example/anna")
LOG = Tree([b"entry %d" % i for i in range(12)])


class Clock:
    def wall(self):
        return 1_700_000_000.0


@pytest.fixture
def witness():
    disk = SimDisk()
    state.create(disk, service.verifier(ANNA))
    state.add(disk, service.verifier(ANNA), LOG.log)
    return Witness(disk, ANNA, Clock())


def call(witness, method, path, *parts, stop=lambda: None, ends=True):
    """(status, headers, body) of one request whose body comes in ``parts``."""
    sent = []
    messages = [
        {"type": "http.request", "body": p, "more_body": not ends or i + 1 < len(parts)}
        for i, p in enumerate(parts or (b"",))
    ]

    async def receive():
        if messages:
            return messages.pop(0)
        if ends is None:
            await asyncio.Event().wait()
        return {"type": "http.disconnect"}

    async def send(message):
        sent.append(message)

    scope = {"type": "http", "method": method, "path": path}
    asyncio.run(serve.app(witness, stop)(scope, receive, send))
    headers = {k.decode(): v.decode() for k, v in sent[0]["headers"]}
    assert headers["content-length"] == str(len(sent[1]["body"]))
    assert headers["cache-control"] == "no-store"
    return sent[0]["status"], headers, sent[1]["body"]


def test_add_checkpoint(witness):
    body = LOG.request(0, 5)
    status, headers, answer = call(witness, "POST", "/add-checkpoint", body[:50], body[50:], b"")
    assert (status, headers["content-type"]) == (200, "text/plain; charset=utf-8")
    assert note.verify(LOG.signed(5).add(note.lines(answer.decode())), [witness.key])
    status, headers, answer = call(witness, "POST", "/add-checkpoint", body)
    assert (status, headers["content-type"], answer) == (409, "text/x.tlog.size", b"5\n")
    assert call(witness, "POST", "/add-checkpoint", LOG.request(9, 5, ()))[0] == 400
    assert call(witness, "POST", "/add-checkpoint", LOG.request(5, 9, ()))[0] == 422
    assert call(witness, "POST", "/add-checkpoint", Tree([b"x"], "b").request(0, 1))[0] == 404
    forged = LOG.request(5, 9).replace(b"\n9\n", b"\n8\n")
    assert call(witness, "POST", "/add-checkpoint", forged)[0] == 403


def test_what_owners_compare(witness):
    status, headers, answer = call(witness, "GET", "/")
    assert (status, headers["content-type"]) == (200, "application/json")
    assert json.loads(answer) == witness.about()
    assert call(witness, "GET", f"/checkpoint/{LOG.origin}")[0] == 404
    call(witness, "POST", "/add-checkpoint", LOG.request(0, 5))
    status, headers, answer = call(witness, "GET", f"/checkpoint/{LOG.origin}")
    assert (status, headers["content-type"]) == (200, "text/plain; charset=utf-8")
    assert len(note.verify(note.parse(answer), [LOG.log, witness.key])) == 2
    assert call(witness, "GET", "/checkpoint/log.example/other")[0] == 404


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [
        ("GET", "/add-checkpoint", 405),
        ("PUT", "/add-checkpoint", 405),
        ("POST", "/", 405),
        ("DELETE", "/checkpoint/log.example/a", 405),
        ("GET", "/checkpoint/", 404),
        ("GET", "/checkpoint", 404),
        ("POST", "/add-checkpoint/", 404),
        ("GET", "/key.json", 404),
        ("GET", "/checkpoint/../key.json", 404),
        ("GET", "/evidence", 404),
    ],
)
def test_nothing_else_is_open(witness, method, path, status):
    assert call(witness, method, path)[0] == status


def test_bodies_are_bounded_and_whole(witness):
    half = bytes(note.MAX_NOTE // 2)
    assert call(witness, "POST", "/add-checkpoint", half, half)[0] == 400
    status, headers, _ = call(witness, "POST", "/add-checkpoint", half, half, b"x", ends=False)
    assert (status, headers["connection"]) == (413, "close")
    assert call(witness, "POST", "/add-checkpoint", LOG.request(0, 5), ends=False)[0] == 400
    assert witness.newest(LOG.origin) is None


def test_a_slow_body_is_not_waited_for(witness, monkeypatch):
    monkeypatch.setattr(serve, "BODY_SECONDS", 0.01)
    status, headers, _ = call(witness, "POST", "/add-checkpoint", b"old", ends=None)
    assert (status, headers["connection"]) == (408, "close")


def test_a_witness_that_stopped_says_so_and_leaves(witness):
    witness._disk.fault = (len(witness._disk.trace) + 4, "EIO")
    stops = []
    for _ in range(2):
        status, _, answer = call(
            witness, "POST", "/add-checkpoint", LOG.request(0, 5), stop=lambda: stops.append(1)
        )
        assert (status, answer) == (503, b"This witness has stopped.\n")
    assert stops == [1, 1] and witness.broken is not None


def test_a_folder_has_one_process(tmp_path):
    with alone(tmp_path / "w"):
        with pytest.raises(LedgerError) as e, alone(tmp_path / "w"):
            pass
        assert e.value.code == "ledger.in-use"
    with alone(tmp_path / "w"):
        pass


def test_an_address_that_is_taken():
    with serve._listen("127.0.0.1", 0) as sock:
        sock.listen()
        with pytest.raises(NetError) as e:
            serve._listen("127.0.0.1", sock.getsockname()[1])
    assert e.value.code == "net.listen"


@pytest.fixture
def folder(tmp_path):
    disk = OsDisk(tmp_path / "w")
    state.create(disk, service.verifier(ANNA))
    state.add(disk, service.verifier(ANNA), LOG.log)
    return tmp_path / "w"


def served(folder, act, host="127.0.0.1", told=True):
    """Run a whole witness on this thread; ``act`` asks it from another, then it is told to stop."""
    got, events = [], []

    def ask(url):
        try:
            with httpx.Client(base_url=url, timeout=30) as client:
                got.append(act(client))
        finally:
            if told:  # while it serves it takes the signal; afterwards the signal would kill
                os.kill(os.getpid(), signal.SIGTERM)

    def ready(url, witness):
        assert witness.key == service.verifier(ANNA)
        threading.Thread(target=ask, args=(url,)).start()

    serve.serve(folder, ANNA, host, 0, ready=ready, event=events.append)
    return got[0], events


def test_it_serves_until_it_is_told_to_stop(folder):
    def act(client):
        answers = [client.post("/add-checkpoint", content=LOG.request(0, n)) for n in (5, 7)]
        return [a.status_code for a in answers], client.get("/").json()["logs"][0]["size"]

    assert served(folder, act) == (
        ([200, 409], 5),
        [
            {"event": "cosigned", "log": LOG.origin, "size": 5},
            {"event": "refused", "log": LOG.origin, "status": 409},
        ],
    )


def test_a_disk_that_fails_ends_the_process(folder, monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def act(client):
        monkeypatch.setattr(OsDisk, "rename", full)
        return client.post("/add-checkpoint", content=LOG.request(0, 5)).status_code

    with pytest.raises(LedgerError) as e:
        served(folder, act, told=False)
    assert e.value.code == "ledger.witness-stopped" and "No space" in e.value.message


def test_an_address_of_version_6(folder):
    if not socket.has_ipv6:
        pytest.skip("no IPv6 here")
    try:
        found, _ = served(folder, lambda c: str(c.base_url), host="::1")
    except NetError:
        pytest.skip("no IPv6 here")
    assert found.startswith("http://[::1]:")
