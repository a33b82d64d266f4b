"""HTTP/1.1 itself, below routes and bodies: bytes on a real server's TLS connection that are no
request, half of one, two in one, or one that two parsers read differently."""

from __future__ import annotations

import contextlib
import json
import os
import random
import re
import socket
import ssl
from collections.abc import Iterator
from pathlib import Path
from typing import Final
from urllib.parse import urlsplit

import pytest

from support.server import RunningServer

pytestmark = pytest.mark.e2e

SECONDS = 5.0
# A connection each; `make fuzz` asks for more.
ASKED = 20_000 if "CASEMATE_FUZZ" in os.environ else 400
STATUS = re.compile(rb"HTTP/1\.1 (\d{3}) ")
GET = b"GET /v1/health HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\n"
POST = (
    b"POST /v1/jobs HTTP/1.1\r\nHost: a\r\nConnection: close\r\n"
    b"Content-Type: application/json\r\nContent-Length: 2\r\n\r\n{}"
)
CHUNKED = (
    b"POST /v1/jobs HTTP/1.1\r\nHost: a\r\nConnection: close\r\n"
    b"Transfer-Encoding: chunked\r\n\r\n2\r\n{}\r\n0\r\n\r\n"
)


def ask(server: RunningServer, data: bytes, patience: float = 0.1) -> bytes:
    """What the server answers to these bytes, on a connection of their own, until it closes or is
    silent for ``patience`` seconds: half a request is one that it waits for."""
    at = urlsplit(server.url)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    with (
        socket.create_connection((at.hostname, at.port), SECONDS) as plain,
        context.wrap_socket(plain) as line,
    ):
        out = bytearray()
        with contextlib.suppress(OSError):  # it may close before it has read all
            line.sendall(data)
            line.settimeout(patience)
            while part := line.recv(1 << 16):
                out += part
        return bytes(out)


def statuses(answer: bytes) -> list[int]:
    assert not answer or answer.startswith(b"HTTP/1.1 ")
    return [int(s) for s in STATUS.findall(answer)]


def events(server: RunningServer) -> list[dict[str, object]]:
    lines = server.log.read_text().splitlines()
    return [json.loads(line) for line in lines if line.startswith("{")]


@pytest.fixture(autouse=True)
def unharmed(server: RunningServer) -> Iterator[None]:
    """Whatever came, the same process serves afterwards, and met no fault."""
    yield
    assert server.process.poll() is None
    assert statuses(ask(server, GET, SECONDS)) == [200]
    assert not [e for e in events(server) if e.get("event") == "fault"]
    assert "Traceback" not in server.log.read_text()


def test_requests_of_ours_are_answered(server: RunningServer) -> None:
    """Else no test below could fail: the way there is open."""
    found = [statuses(ask(server, data, SECONDS)) for data in (GET, POST, CHUNKED)]
    assert found == [[200], [401], [401]]


HIDDEN = b"GET /metrics HTTP/1.1\r\nHost: a\r\n\r\n"


SMUGGLED: Final = {
    "length and chunks": CHUNKED.replace(b"Host: a", b"Host: a\r\nContent-Length: 5"),
    "two lengths": POST.replace(b"Length: 2", b"Length: 2\r\nContent-Length: 40") + HIDDEN,
    "a list of lengths": POST.replace(b"Length: 2", b"Length: 2, 40") + HIDDEN,
    "a signed length": POST.replace(b"Length: 2", b"Length: +2"),
    "a negative length": POST.replace(b"Length: 2", b"Length: -1"),
    "a length in hex": POST.replace(b"Length: 2", b"Length: 0x2"),
    "an endless length": POST.replace(b"Length: 2", b"Length: " + b"9" * 5000),
    "chunked twice": CHUNKED.replace(b": chunked", b": chunked, chunked"),
    "an unknown coding": CHUNKED.replace(b": chunked", b": gzip, chunked"),
    "a coding behind a tab": CHUNKED.replace(b": chunked", b":\x0bchunked"),
    "a space before the colon": POST.replace(b"Length: 2", b"Length : 2"),
    "a folded header": POST.replace(b"Host: a", b"Host: a\r\n X: b"),
    "a header without a name": POST.replace(b"Host: a", b": a"),
    "a zero byte in a header": POST.replace(b"Host: a", b"Host: a\0b"),
    "a bare return in a header": POST.replace(b"Host: a", b"Host: a\rX: b"),
    "two hosts": POST.replace(b"Host: a", b"Host: a\r\nHost: b"),
    "no host": POST.replace(b"Host: a\r\n", b""),
    "a chunk of a negative size": CHUNKED.replace(b"\r\n2\r\n", b"\r\n-2\r\n"),
    "a chunk of a huge size": CHUNKED.replace(b"\r\n2\r\n", b"\r\n" + b"F" * 40 + b"\r\n"),
    "a chunk longer than it says": CHUNKED.replace(b"{}", b"{}" + HIDDEN),
    "no version": b"GET /v1/health\r\n\r\n",
    "version 0.9": GET.replace(b"HTTP/1.1", b"HTTP/0.9"),
    "version 2": GET.replace(b"1.1", b"2.0"),
    "a target with spaces": GET.replace(b"/v1/health", b"/v1/health /metrics"),
    "a target that is no path": GET.replace(b"/v1/health", b"http://other/v1/health"),
    "raw bytes in the target": GET.replace(b"health", b"\xff\xfe\x00"),
    "a method of another alphabet": GET.replace(b"GET", b"G\xc3\x89T"),
    "connect": b"CONNECT other:443 HTTP/1.1\r\nHost: other\r\n\r\n",
    "an upgrade": GET.replace(b"close", b"Upgrade\r\nUpgrade: websocket"),
    "a line that never ends": b"GET /" + b"a" * (1 << 20),
    "headers without end": GET[:-2] + b"X: y\r\n" * 100_000,
    "a header of a mebibyte": GET[:-2] + b"X: " + b"y" * (1 << 20) + b"\r\n\r\n",
    "nothing": b"",
    "another protocol": b"SSH-2.0-OpenSSH_9.6\r\n",
}


@pytest.mark.parametrize("data", SMUGGLED.values(), ids=SMUGGLED)
def test_one_connection_takes_one_meaning(server: RunningServer, data: bytes) -> None:
    """At most one answer, never one of the request that is hidden in another, and never a fault of
    the server's own."""
    found = statuses(ask(server, data, 0.3))
    assert len(found) <= 1 and not set(found) & {500, 502}, found


PIECES = (b"\r\n", b"\r", b"\n", b"\0", b" ", b":", b"\t", b"0", b"-1", b"chunked", b"Host: a\r\n",
          b"Content-Length: 7\r\n", b"Transfer-Encoding: chunked\r\n", b"\xff", b"HTTP/1.1", b"%00",
          b"Expect: 100-continue\r\n", b"Upgrade: h2c\r\n")  # fmt: skip


def changed(chance: random.Random) -> bytes:
    """One of our requests with a few places changed, or cut."""
    data = bytearray(chance.choice((GET, POST, CHUNKED)))
    for _ in range(chance.randint(1, 4)):
        at = chance.randrange(len(data) + 1)
        match chance.randrange(4):
            case 0:
                data[at:at] = chance.choice(PIECES)
            case 1:
                del data[at : at + chance.randint(1, 12)]
            case 2:
                data[at : at + 1] = bytes([chance.randrange(256)])
            case _:
                data[at:at] = data[: chance.randint(0, 40)]
    return bytes(data)


def test_changed_requests_are_answered_or_refused(server: RunningServer) -> None:
    seen: set[int] = set()
    for seed in range(ASKED):
        data = changed(random.Random(seed))
        found = statuses(ask(server, data))
        assert not set(found) & {500, 502}, (seed, data)
        seen.update(found)
    assert {200, 400, 401} <= seen  # some pass, some are no HTTP, some are not signed


def test_a_fault_would_be_seen(server: RunningServer, tmp_path: Path) -> None:
    """The check after each test reads what a fault writes."""
    log = tmp_path / "log"
    log.write_text('{"event":"fault","error":"ValueError"}\n')
    there = RunningServer(server.state, server.process, server.facts, log)
    assert [e for e in events(there) if e.get("event") == "fault"]
