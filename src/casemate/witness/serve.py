"""``casemate witness serve``: add-checkpoint and what owners compare, over HTTP/1.1.

========================= ===========================================================
POST /add-checkpoint      C2SP tlog-witness: 200 with the cosignature, or 400, 403,
                          404, 409 (with the size held), 413, 422
GET /                     JSON: name, vkey, the logs known with their sizes, and how
                          many checkpoints are kept against each
GET /checkpoint/ORIGIN    the newest checkpoint of a log that it cosigned
========================= ===========================================================

No TLS: every answer that matters is signed. Put a proxy before it to be reached by https.
"""

from __future__ import annotations

import asyncio
import json
import signal
import socket
from collections.abc import Awaitable, Callable, Iterator, MutableMapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final, TypeAlias

import uvicorn

from casemate.seal import note
from casemate.seal.identity import Identity
from casemate.seams import OsDisk, SystemClock
from casemate.spec.errors import LedgerError, NetError
from casemate.witness.alone import alone
from casemate.witness.decide import TEXT, Answer, refuse
from casemate.witness.service import Event, Witness

JSON: Final = "application/json"
BODY_SECONDS: Final = 10
KEEP_ALIVE_SECONDS: Final = 60
GRACE_SECONDS: Final = 5
MAX_CONNECTIONS: Final = 256
CHECKPOINT: Final = "/checkpoint/"

Scope: TypeAlias = MutableMapping[str, Any]
Receive: TypeAlias = Callable[[], Awaitable[MutableMapping[str, Any]]]
Send: TypeAlias = Callable[[MutableMapping[str, Any]], Awaitable[None]]
App: TypeAlias = Callable[[Scope, Receive, Send], Awaitable[None]]


async def _body(receive: Receive) -> bytes | Answer:
    data = bytearray()
    while True:
        message = await receive()
        if message["type"] != "http.request":
            return refuse(400, "The request was not sent to its end.")
        data += message.get("body", b"")
        if len(data) > note.MAX_NOTE:
            return refuse(413, f"A request has at most {note.MAX_NOTE} bytes.")
        if not message.get("more_body"):
            return bytes(data)


async def _add(witness: Witness, receive: Receive) -> Answer:
    try:
        body = await asyncio.wait_for(_body(receive), BODY_SECONDS)
    except TimeoutError:
        return refuse(408, "The request took too long.")
    if isinstance(body, Answer):
        return body
    return await asyncio.to_thread(witness.add_checkpoint, body)


async def _about(witness: Witness) -> Answer:
    about = await asyncio.to_thread(witness.about)
    return Answer(200, JSON, json.dumps(about, indent=2, sort_keys=True).encode() + b"\n")


def _newest(witness: Witness, origin: str) -> Answer:
    found = witness.newest(origin)
    if found is None:
        return refuse(404, "This witness has cosigned nothing of such a log.")
    return Answer(200, TEXT, found.encode())


async def _answer(witness: Witness, method: str, path: str, receive: Receive) -> Answer:
    allowed = "POST" if path == "/add-checkpoint" else "GET"
    if path not in ("/", "/add-checkpoint") and not path.startswith(CHECKPOINT):
        return refuse(404, "There is nothing here.")
    if method != allowed:
        return refuse(405, f"Use {allowed}.")
    if path == "/":
        return await _about(witness)
    if path.startswith(CHECKPOINT):
        return _newest(witness, path.removeprefix(CHECKPOINT))
    return await _add(witness, receive)


def app(witness: Witness, stop: Callable[[], None]) -> App:
    """The ASGI application; calls ``stop`` once the witness can answer no more."""

    async def handle(scope: Scope, receive: Receive, send: Send) -> None:
        try:
            answer = await _answer(witness, scope["method"], scope["path"], receive)
        except LedgerError:
            stop()
            answer = refuse(503, "This witness has stopped.")
        headers = [
            (b"content-type", answer.kind.encode()),
            (b"content-length", str(len(answer.body)).encode()),
            (b"cache-control", b"no-store"),
            (b"x-content-type-options", b"nosniff"),
        ]
        if answer.status in (408, 413):  # the rest of the body is not waited for
            headers.append((b"connection", b"close"))
        await send({"type": "http.response.start", "status": answer.status, "headers": headers})
        await send({"type": "http.response.body", "body": answer.body})

    return handle


class _Server(uvicorn.Server):
    """uvicorn's server; says when it listens, and takes signals without raising them again."""

    def __init__(self, config: uvicorn.Config, ready: Callable[[], None]) -> None:
        super().__init__(config)
        self._ready = ready

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        self._ready()

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        loop = asyncio.get_running_loop()
        for number in (signal.SIGINT, signal.SIGTERM):
            loop.add_signal_handler(number, self.handle_exit, number, None)
        try:
            yield
        finally:
            for number in (signal.SIGINT, signal.SIGTERM):
                loop.remove_signal_handler(number)


def _listen(host: str, port: int) -> socket.socket:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    sock = socket.socket(family, socket.SOCK_STREAM)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        sock.bind((host, port))
    except OSError as e:
        sock.close()
        raise NetError(
            "net.listen",
            f"Cannot listen on {host} port {port}: {e.strerror}.",
            mend="Choose another --port, or 0 for a free one.",
        ) from None
    return sock


def serve(
    folder: Path,
    identity: Identity,
    host: str,
    port: int,
    *,
    ready: Callable[[str, Witness], None],
    event: Event,
) -> None:
    """Run the witness in ``folder`` until SIGINT or SIGTERM; ``ready`` gets its URL.

    Raises ``ledger.in-use``, ``ledger.witness-*``, ``net.listen``; ``ledger.witness-stopped`` when
    its disk failed under it.
    """
    with alone(folder):
        witness = Witness(OsDisk(folder), identity, SystemClock(), event)
        with _listen(host, port) as sock:
            shown = f"[{host}]" if ":" in host else host
            url = f"http://{shown}:{sock.getsockname()[1]}"
            config = uvicorn.Config(
                app(witness, lambda: setattr(http, "should_exit", True)),
                http="h11",
                ws="none",
                loop="asyncio",
                lifespan="off",
                log_config=None,
                access_log=False,
                server_header=False,
                date_header=False,
                proxy_headers=False,
                limit_concurrency=MAX_CONNECTIONS,
                timeout_keep_alive=KEEP_ALIVE_SECONDS,
                timeout_graceful_shutdown=GRACE_SECONDS,
            )
            http = _Server(config, lambda: ready(url, witness))
            asyncio.run(http.serve(sockets=[sock]))
        if witness.broken is not None:
            raise witness.broken
