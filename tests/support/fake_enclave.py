"""A small TLS server with true evidence, that answers what a test tells it to."""

from __future__ import annotations

import ssl
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, urlsplit

from casemate.spec import canonical, codec
from casemate.spec.errors import FormatError
from support.publog import PublicLog


@dataclass
class Seen:
    """A request that arrived: on which connection, and what."""

    connection: int
    method: str
    target: str
    headers: dict[str, str]
    body: bytes


@dataclass
class FakeEnclave:
    """``answers``: (method, path) -> (status, headers, body), or a function of the request.

    ``last``: connections are closed after this many answers. ``attest``: makes attestations.
    ``log``: answers whatever is asked below /log/.
    """

    attest: Callable[[bytes], Any]
    context: ssl.SSLContext
    answers: dict[tuple[str, str], Any] = field(default_factory=dict)
    seen: list[Seen] = field(default_factory=list)
    last: int = 10**9
    port: int = 0
    connections: int = 0
    log: PublicLog | None = None
    _server: ThreadingHTTPServer | None = None

    @property
    def url(self) -> str:
        return f"https://127.0.0.1:{self.port}"

    @property
    def requests(self) -> list[Seen]:
        """All but attestation."""
        return [s for s in self.seen if not s.target.startswith("/v1/attestation")]

    def start(self) -> FakeEnclave:
        fake = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"
            timeout = 20

            def setup(self) -> None:
                self.request = fake.context.wrap_socket(self.request, server_side=True)
                super().setup()
                fake.connections += 1
                self.number, self.answered = fake.connections, 0

            def handle_any(self) -> None:
                length = int(self.headers.get("content-length") or 0)
                headers = {k.lower(): v for k, v in self.headers.items()}
                request = Seen(
                    self.number, self.command, self.path, headers, self.rfile.read(length)
                )
                fake.seen.append(request)
                status, extra, body = fake.answer(request)
                self.answered += 1
                self.send_response(status)
                for name, value in extra.items():
                    self.send_header(name, value)
                self.send_header("content-length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)
                self.close_connection = self.answered >= fake.last

            def __getattr__(self, name: str) -> Any:
                if name.startswith("do_"):
                    return self.handle_any
                raise AttributeError(name)

            def log_message(self, *_: Any) -> None:
                pass

        class Server(ThreadingHTTPServer):
            daemon_threads = True

            def handle_error(self, *_: Any) -> None:
                pass

        self._server = Server(("127.0.0.1", self.port), Handler)
        self.port = self._server.server_port
        threading.Thread(target=self._server.serve_forever, args=(0.02,), daemon=True).start()
        return self

    def answer(self, request: Seen) -> tuple[int, dict[str, str], bytes]:
        url = urlsplit(request.target)
        if url.path == "/v1/attestation":
            nonce = bytes.fromhex(parse_qs(url.query)["nonce"][0])
            return 200, {}, codec.encode(self.attest(nonce))
        if self.log is not None and url.path.startswith("/log/"):
            try:
                return 200, {}, self.log.file(url.path.removeprefix("/log/"))
            except (KeyError, FormatError):
                error = FormatError("format.tile", "There is none.", mend="Ask for another.")
                return 404, {}, canonical.encode(error.to_wire())
        found = self.answers.get((request.method, url.path), (200, {}, b"{}"))
        status, headers, body = found(request) if callable(found) else found
        return status, headers, body if isinstance(body, bytes) else canonical.encode(body)

    def stop(self) -> None:
        if self._server is not None:
            self._server.shutdown()
            self._server.server_close()
            self._server = None
