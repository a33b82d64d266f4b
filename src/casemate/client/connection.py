"""One attested connection: evidence and requests travel over the very same TLS 1.3 stream.

:class:`Connection` opens a TCP connection, asks for evidence over it with a fresh nonce, checks the
evidence (the key that it binds must be the one of the live TLS session), and only then lets a
request pass. When the stream ends, the next request opens another one and the checks run again:
:class:`_OneStream` holds one open stream and has no way to open a second. No proxies, no
redirects, no cookies, no certificate authorities: trust comes from the evidence alone.

With a memory (:mod:`casemate.client.memory`) the stream must also show a log that extends what this
client has seen, before any request passes; each request then carries the newest checkpoint that is
remembered, so that a server that was rolled back learns of it. What changes the log
(:meth:`Connection.change`) is followed by its newest head, so that a rollback of what was
acknowledged is found by the next connection.
"""

from __future__ import annotations

import dataclasses
import hashlib
import re
import ssl
import threading
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final, TypeVar

import httpcore
import httpx
from cryptography import x509
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

from casemate.attest.verify import verify_attestation
from casemate.client import memory as memories
from casemate.client.memory import Memory, Seen
from casemate.seal import requests
from casemate.seams import OsRng, Rng
from casemate.spec import canonical, codec
from casemate.spec.errors import (
    AuthError,
    CasemateError,
    FormatError,
    LimitError,
    NetError,
    ReceiptError,
    UsageError,
)
from casemate.spec.evidence import NONCE_BYTES, Attestation

if TYPE_CHECKING:
    from casemate.attest.trust import Trust
    from casemate.attest.verify import Verdict
    from casemate.seal.identity import Identity

T = TypeVar("T")

CONNECT_SECONDS: Final = 10.0
# An answer may take what a server gives to looking at a model (prepare_seconds), and a little more.
READ_SECONDS: Final = 330.0
ATTEMPTS: Final = 4
MAX_ATTESTATION: Final = 8 << 20
MAX_BODY: Final = canonical.MAX_BYTES
CHECKPOINT_HEADER: Final = "casemate-checkpoint"
# How often a public file is asked for again when the server says that it is too fast.
PATIENCE: Final = 20
IDEMPOTENT: Final = frozenset({"GET", "HEAD", "PUT", "DELETE"})
# Heads that cannot both be true: no failure to fetch one.
_PROVEN: Final = frozenset({"receipt.fork", "receipt.rolled-back", "receipt.log-replaced"})
# The address of a listing's next page, beside its own.
_NEXT: Final = re.compile(r'<(\?after=\w{1,100})>; rel="next"', re.ASCII)
_TIMEOUT: Final = dict.fromkeys(("connect", "read", "write", "pool"), READ_SECONDS)
_LOST: Final = (httpcore.NetworkError, httpcore.TimeoutException, httpcore.ProtocolError)


@dataclass(frozen=True, slots=True)
class Answer:
    """A successful answer: its status, headers (lower case) and body."""

    status: int
    headers: Mapping[str, str]
    body: bytes

    def json(self) -> canonical.Json:
        return canonical.decode(self.body)

    def value(self, kind: type[T]) -> T:
        return codec.decode(kind, self.body)


class _OneStream(httpx.BaseTransport):
    """Sends on one open stream; there is no code here that opens another."""

    def __init__(self, origin: httpcore.Origin, stream: httpcore.NetworkStream) -> None:
        self._origin = origin
        self._http = httpcore.HTTP11Connection(origin, stream)

    def handle_request(self, request: httpx.Request) -> httpx.Response:
        url = request.url
        answer = self._http.handle_request(
            httpcore.Request(
                method=request.method,
                url=httpcore.URL(
                    scheme=url.raw_scheme, host=url.raw_host, port=url.port, target=url.raw_path
                ),
                headers=request.headers.raw,
                content=request.stream,
                extensions=request.extensions,
            )
        )
        return httpx.Response(answer.status, headers=answer.headers, stream=_Body(answer))

    @contextmanager
    def exchange(
        self, method: str, url: str, headers: Mapping[str, str], body: bytes
    ) -> Iterator[httpx.Response]:
        """One request as it was signed, and its answer, without what a client of the web adds."""
        scheme, _, rest = url.partition("://")
        netloc, _, path = rest.partition("/")
        origin = self._origin
        named = {"host": netloc, "accept": "*/*", **headers, "content-length": str(len(body))}
        answer = self._http.handle_request(
            httpcore.Request(
                method=method,
                url=httpcore.URL(
                    scheme=scheme, host=origin.host, port=origin.port, target=f"/{path}"
                ),
                headers=[(n.encode("ascii"), v.encode("latin-1")) for n, v in named.items()],
                content=body,
                extensions={"timeout": _TIMEOUT},
            )
        )
        try:
            yield httpx.Response(answer.status, headers=answer.headers, stream=_Body(answer))
        finally:
            answer.close()

    @property
    def usable(self) -> bool:
        return self._http.is_available() and not self._http.has_expired()

    def close(self) -> None:
        self._http.close()


class _Body(httpx.SyncByteStream):
    def __init__(self, answer: httpcore.Response) -> None:
        self._answer = answer

    def __iter__(self) -> Iterator[bytes]:
        yield from self._answer.iter_stream()

    def close(self) -> None:
        self._answer.close()


@dataclass(frozen=True, slots=True)
class Line:
    """A live stream whose far end has been attested. ``seen``: the newest checkpoint of its log,
    where this client remembers any."""

    http: httpx.Client
    stream: _OneStream
    attestation: Attestation
    verdict: Verdict
    seen: Seen | None = None


def _tls() -> ssl.SSLContext:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.minimum_version = ssl.TLSVersion.TLSv1_3
    # The key is compared with the one in the evidence; names and authorities prove nothing here.
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE
    return context


def _spki_digest(stream: httpcore.NetworkStream) -> bytes:
    """SHA-256 of the SubjectPublicKeyInfo that the peer proved to hold in this TLS session."""
    session = stream.get_extra_info("ssl_object")
    der = session.getpeercert(True) if session is not None else None
    if not der:
        raise NetError(
            "net.tls", "The server showed no TLS certificate.", mend="Check the server's address."
        )
    try:
        key = x509.load_der_x509_certificate(der).public_key()
        spki = key.public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo)
    except ValueError as e:
        raise NetError(
            "net.tls",
            f"The server's TLS certificate cannot be read: {str(e)[:80]}.",
            mend="Check that the address is a casemate server.",
        ) from None
    return hashlib.sha256(spki).digest()


def _read(response: httpx.Response, limit: int) -> bytes:
    parts: list[bytes] = []
    total = 0
    for part in response.iter_raw():
        total += len(part)
        if total > limit:
            raise LimitError(
                "limit.answer",
                f"The server's answer is longer than {limit} bytes.",
                mend="Check that the address is a casemate server.",
            )
        parts.append(part)
    return b"".join(parts)


def _raise_for(status: int, body: bytes) -> None:
    if status < 400:
        if status >= 300:
            raise NetError(
                "net.redirect",
                f"The server answered with a redirect ({status}), which is never followed.",
                mend="Give the server's own address.",
            )
        return
    try:
        shape = canonical.decode(body)
    except FormatError:
        shape = None
    raise CasemateError.from_wire(shape, status)


def _unreachable(url: str, cause: Exception) -> NetError:
    return NetError(
        "net.unreachable",
        f"{url} cannot be reached: {str(cause)[:160] or type(cause).__name__}.",
        mend="Check the address, that `casemate serve` runs there, and the network.",
    )


def _address(url: str) -> tuple[str, str, int]:
    """The https address without path, its host in ASCII, and its port."""
    try:
        parsed = httpx.URL(url)
        host, port = parsed.raw_host.decode("ascii"), parsed.port or 443
    except (httpx.InvalidURL, UnicodeError, TypeError):
        host = ""
    if not host or parsed.scheme != "https" or parsed.userinfo or port > 65535:
        raise UsageError(
            "usage.url",
            f"{str(url)[:200]!r} is no https address.",
            mend="Give an address such as https://host:8443.",
        )
    return f"https://{parsed.netloc.decode('ascii')}", host, port


def address(url: str) -> str:
    """The https address of a server, as connections have it. Raises ``usage.url``."""
    return _address(url)[0]


class Connection:
    """A server at ``url`` under ``trust``; ``identity`` signs the requests.

    ``memory``: what this client has seen of logs; without one nothing is remembered. Thread-safe;
    one request at a time. Raises ``EvidenceError`` when the server's evidence is refused,
    ``ReceiptError`` when its log is not the one that was seen before, ``NetError`` when it cannot
    be reached.
    """

    def __init__(
        self,
        url: str,
        *,
        trust: Trust,
        identity: Identity | None = None,
        memory: Memory | None = None,
        rng: Rng | None = None,
        now: Callable[[], float] = time.time,
        pause: Callable[[float], None] = time.sleep,
    ) -> None:
        self.url, self._host, self._port = _address(url)
        self._trust = trust
        self.identity = identity
        self.memory = memory
        self._rng = rng or OsRng()
        self._now, self._pause = now, pause
        self._lock = threading.RLock()
        self._line: Line | None = None

    # Opening.

    def _open(self) -> Line:
        backend = httpcore.SyncBackend()
        try:
            stream = backend.connect_tcp(self._host, self._port, timeout=CONNECT_SECONDS)
            stream = stream.start_tls(_tls(), server_hostname=self._host, timeout=CONNECT_SECONDS)
        except (*_LOST, OSError) as e:
            raise _unreachable(self.url, e) from None
        origin = httpcore.Origin(b"https", self._host.encode("ascii"), self._port)
        carrier = _OneStream(origin, stream)
        http = httpx.Client(
            transport=carrier,
            trust_env=False,
            follow_redirects=False,
            timeout=httpx.Timeout(READ_SECONDS, connect=CONNECT_SECONDS),
        )
        try:
            return self._meet(self._attest(http, carrier, stream))
        except _LOST as e:
            http.close()
            raise _unreachable(self.url, e) from None
        except BaseException:
            http.close()
            raise

    def _attest(
        self, http: httpx.Client, carrier: _OneStream, stream: httpcore.NetworkStream
    ) -> Line:
        nonce = self._rng.bytes(NONCE_BYTES)
        with http.stream("GET", f"{self.url}/v1/attestation?nonce={nonce.hex()}") as response:
            body = _read(response, MAX_ATTESTATION)
            _raise_for(response.status_code, body)
        attestation = codec.decode(Attestation, body)
        verdict = verify_attestation(
            attestation, nonce, self._trust, now=self._now(), tls_spki=_spki_digest(stream)
        )
        return Line(http, carrier, attestation, verdict)

    def _meet(self, line: Line) -> Line:
        """The line with its log's newest checkpoint, which extends what was seen before."""
        if self.memory is None:
            return line
        key = line.attestation.binding.log_key
        root = line.verdict.root if line.verdict.simulated else None

        def get(path: str) -> bytes:
            return self._file(line, f"/log/{path}", {}, MAX_BODY).body

        try:
            seen = self.memory.meet(memories.enclave_name(self.url, root), key, get)
        except ReceiptError as e:
            if e.code in ("receipt.fork", "receipt.rolled-back"):
                self._tell(line, key)
            raise
        return dataclasses.replace(line, seen=seen)

    def _tell(self, line: Line, key: bytes) -> None:
        """Show a server whose log does not hold what was seen, so that an honest one stops."""
        with suppress(CasemateError, *_LOST):
            self._file(line, "/log/checkpoint", self._remind(key), MAX_BODY)

    def _remind(self, key: bytes) -> dict[str, str]:
        """The header with the newest checkpoint remembered of a log, also by another process."""
        seen = None if self.memory is None else self.memory.mirror(key).seen()
        return {} if seen is None else {CHECKPOINT_HEADER: memories.header(seen.signed, seen.key)}

    def _file(self, line: Line, path: str, headers: Mapping[str, str], limit: int) -> Answer:
        """One unsigned GET on a line; waits where the server is asked too fast."""
        for attempt in range(PATIENCE):
            with line.http.stream("GET", self.url + path, headers=dict(headers)) as response:
                body = _read(response, limit)
            try:
                _raise_for(response.status_code, body)
            except LimitError as e:
                if e.code != "limit.rate" or attempt + 1 == PATIENCE:
                    raise
                self._pause(1.0)
                continue
            return Answer(response.status_code, dict(response.headers), body)
        raise AssertionError("the last attempt returns or raises")

    def sync(self) -> Seen | None:
        """See the log's newest checkpoint now; ``None`` without a memory. Raises as
        :meth:`casemate.client.memory.Memory.meet`."""
        with self._lock:
            line = self.line()
            try:
                self._line = self._meet(line)
            except BaseException:
                self.close()
                raise
            return self._line.seen

    def remember(self) -> None:
        """After something was acknowledged: remember the log's newest head, which holds it.

        Only the stream that carried the answer may show that head: on another one the server could
        have gone back behind it already. What was acknowledged stands where none can be had, so
        that is a warning. Raises ``ReceiptError`` for a fork or a rollback.
        """
        with self._lock:
            line = self._line
            if self.memory is None:
                return
            try:
                if line is None or not line.stream.usable:
                    raise _unreachable(self.url, ConnectionError("the connection was closed"))
                self._line = self._meet(line)
            except (CasemateError, *_LOST) as e:
                self.close()
                if isinstance(e, ReceiptError) and e.code in _PROVEN:
                    raise
                warnings.warn(
                    "The server has answered, but the head of its log that holds what it said could"
                    f" not be remembered ({str(e)[:200] or type(e).__name__}), so that this client"
                    " would not notice if that was rolled back. Connect again, and look whether it"
                    " still stands.",
                    stacklevel=2,
                )

    def public(self, path: str, *, limit: int = MAX_BODY) -> bytes:
        """A file that anybody may read; no identity is needed. Raises as :meth:`request`."""
        with self._lock:
            return self._try(lambda: self._public(path, limit), ATTEMPTS).body

    def _public(self, path: str, limit: int) -> Answer:
        line = self.line()
        try:
            return self._file(line, path, self._remind(line.attestation.binding.log_key), limit)
        except BaseException:
            self.close()
            raise

    def line(self) -> Line:
        """The live attested stream; a fresh one, freshly attested, when there is none."""
        with self._lock:
            if self._line is not None and not self._line.stream.usable:
                self.close()
            if self._line is None:
                self._line = self._open()
            return self._line

    def close(self) -> None:
        with self._lock:
            if self._line is not None:
                self._line.http.close()
                self._line = None

    # Sending.

    def _nonce(self) -> bytes:
        """Rising, which keeps the server's memory bounded: milliseconds, then random."""
        milliseconds = max(0, int(self._now() * 1000)) % (1 << 48)
        return milliseconds.to_bytes(6, "big") + self._rng.bytes(requests.NONCE_BYTES - 6)

    @contextmanager
    def _send(
        self, method: str, path: str, body: bytes, headers: Mapping[str, str]
    ) -> Iterator[httpx.Response]:
        line = self.line()
        url = self.url + path
        if self.identity is None:
            raise AuthError(
                "auth.no-identity",
                "This connection has no identity to sign with.",
                mend="Give one: cm.connect(url, trust=…, identity=cm.Identity.load(path)).",
            )
        signed = requests.sign(
            self.identity,
            method,
            url,
            {**headers, **self._remind(line.attestation.binding.log_key)},
            body,
            boot=line.attestation.binding.boot,
            nonce=self._nonce(),
        )
        try:
            with line.stream.exchange(method, url, signed, body) as response:
                yield response
        except BaseException:
            # A half-read stream cannot carry another request.
            self.close()
            raise

    def request(
        self,
        method: str,
        path: str,
        body: object = None,
        *,
        headers: Mapping[str, str] | None = None,
        retry: bool | None = None,
        limit: int = MAX_BODY,
    ) -> Answer:
        """Send one signed request and read its answer.

        ``body``: bytes as they are, or a value or JSON sent in canonical form. Idempotent methods
        (``retry`` overrides) are sent again after a lost connection, each time with new evidence,
        nonce and signature. Raises the ``CasemateError`` that the server names, or ``NetError``.
        """
        head = dict(headers or {})
        if body is None or isinstance(body, bytes):
            data = body or b""
        else:
            data = codec.encode(body)
            head.setdefault("content-type", "application/json")
        again = method in IDEMPOTENT if retry is None else retry
        with self._lock:
            return self._try(
                lambda: self._once(method, path, data, head, limit), ATTEMPTS if again else 1
            )

    def listing(self, path: str, kind: type[T]) -> list[T]:
        """All items of a listing, page by page as the server links them (RFC 8288)."""
        found: list[T] = []
        more = ""
        while True:
            answer = self.request("GET", path + more)
            items = answer.json()
            if not isinstance(items, list):
                raise FormatError(
                    "format.field",
                    f"{path} answered no list.",
                    mend="Use matching versions.",
                    where=path,
                )
            found += [codec.from_json(kind, item) for item in items]
            link = _NEXT.fullmatch(answer.headers.get("link", ""))
            if link is None or not items:
                return found
            more = link[1]

    def change(
        self, method: str, path: str, body: object = None, *, retry: bool | None = None
    ) -> Answer:
        """A request that adds to the log, as :meth:`request`, then :meth:`remember`."""
        with self._lock:
            answer = self.request(method, path, body, retry=retry)
            self.remember()
            return answer

    def _once(
        self, method: str, path: str, data: bytes, headers: Mapping[str, str], limit: int
    ) -> Answer:
        with self._send(method, path, data, headers) as response:
            body = _read(response, limit)
        _raise_for(response.status_code, body)
        return Answer(response.status_code, dict(response.headers), body)

    def _try(self, act: Callable[[], T], attempts: int) -> T:
        for attempt in range(1, attempts + 1):
            try:
                return act()
            except _LOST as e:
                lost = e
            except NetError as e:
                # A server that restarts refuses connections for a moment.
                if e.code != "net.unreachable" or attempt == attempts:
                    raise
                lost = None
            if attempt < attempts:
                self._pause(0.2 * 2**attempt)
        raise NetError(
            "net.lost",
            f"The connection to {self.url} was lost: {str(lost)[:120] or type(lost).__name__}.",
            mend="Run the command again; what the server accepted is kept.",
        )

    def download(self, path: str, sink: Callable[[bytes], object], *, limit: int) -> int:
        """Stream an octet answer into ``sink``; the number of bytes. Not retried."""
        total = 0
        with self._lock:
            try:
                with self._send("GET", path, b"", {}) as response:
                    if response.status_code >= 300:
                        _raise_for(response.status_code, _read(response, MAX_ATTESTATION))
                    for part in response.iter_raw():
                        total += len(part)
                        if total > limit:
                            raise LimitError(
                                "limit.answer",
                                f"The result is longer than the {limit} bytes expected.",
                                mend="Ask for the receipt and compare.",
                            )
                        sink(part)
            except _LOST as e:
                raise NetError(
                    "net.lost",
                    f"The connection to {self.url} was lost: {str(e)[:120] or type(e).__name__}.",
                    mend="Ask for the result again; it is kept.",
                ) from None
        return total
