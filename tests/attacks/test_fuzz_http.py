"""Requests under fuzz: by schemathesis, made of the OpenAPI document; and our own, whole bodies and
targets changed in a few places and signed again, so that they come past the signature.

Whatever comes, the answer is of the documented form and no fault, within the limits of
:mod:`support.fuzzing`."""

from __future__ import annotations

import asyncio
import base64
import json
import random
from datetime import timedelta
from functools import cache
from typing import Any
from urllib.parse import quote, unquote

import httpx
import pytest
import schemathesis
from hypothesis import HealthCheck, given, seed, settings
from schemathesis.checks import CHECKS as ALL
from schemathesis.checks import load_all_checks
from schemathesis.core.failures import FailureGroup
from schemathesis.generation import GenerationMode

from casemate.seal import requests
from casemate.seal.identity import Identity
from casemate.server import app, openapi
from casemate.server.routes import ROUTES
from casemate.spec import canonical, codec
from casemate.spec.errors import UsageError
from support import fuzzing
from support.desk import URL, Desk, Person
from support.mutation import COUNT, mutated, reformed

load_all_checks()
CHECKS = ALL.get_by_names([
    "not_a_server_error", "status_code_conformance", "content_type_conformance",
    "response_schema_conformance",
])  # fmt: skip
# A case costs some 30 ms, nearly all of it hypothesis': a tenth of a release's count.
EXAMPLES = 6 if COUNT <= 20_000 else COUNT // 10 // len(ROUTES)
SEPARATOR = b"\n\n"


@cache
def loop() -> asyncio.AbstractEventLoop:
    return asyncio.new_event_loop()


@cache
def shared() -> tuple[Desk, Person]:
    """One server for all requests; its log shows faults."""
    desk = Desk()
    person = Person(desk, Identity.generate("p"))
    loop().run_until_complete(person.enrol())
    return desk, person


def send(method: str, target: str, body: bytes, head: dict[str, str]) -> httpx.Response:
    """The answer to a request, signed over what is sent."""
    desk, person = shared()
    built = desk.http.build_request(method, target, content=body)
    signed = requests.sign(
        person.identity, method, str(built.url), head, body, boot=desk.service.keys.boot
    )
    built.headers.update(signed)
    answer = loop().run_until_complete(desk.http.send(built))
    desk.logs.clear()
    return answer


# By schemathesis.


@cache
def operations() -> dict[str, Any]:
    document = openapi.document(ROUTES, "0")
    found = schemathesis.openapi.from_dict(document).get_all_operations()
    return {f"{o.method.upper()} {o.path}": o for o in (r.ok() for r in found)}


@pytest.mark.parametrize(
    ("route", "mode"),
    [(r, GenerationMode.POSITIVE) for r in ROUTES]
    + [(r, GenerationMode.NEGATIVE) for r in ROUTES if r.body not in (None, bytes)],
    ids=lambda of: getattr(of, "name", None),
)
def test_an_answer_is_of_the_documented_form(route: Any, mode: GenerationMode) -> None:
    operation = operations()[f"{route.method} {route.path}"]

    @seed(1)
    @settings(max_examples=EXAMPLES, deadline=None, database=None,
              suppress_health_check=list(HealthCheck))  # fmt: skip
    @given(case=operation.as_strategy(generation_mode=mode))
    def ask(case: Any) -> None:
        body = b""
        if isinstance(case.body, bytes):
            body = case.body
        elif case.media_type is not None:
            body = json.dumps(case.body, sort_keys=True, separators=(",", ":"), ensure_ascii=False,
                              default=str).encode("utf-8", "surrogatepass")  # fmt: skip
        head = {k.lower(): str(v) for k, v in (case.headers or {}).items() if str(v).isascii()
                and str(v).isprintable()}  # fmt: skip
        query = httpx.QueryParams({k: str(v) for k, v in (case.query or {}).items()})
        target = URL + case.formatted_path + (f"?{query}" if query else "")
        answer = send(route.method, target, body, head)
        assert answer.status_code < 500
        case.validate_response(answer, checks=CHECKS)

    ask()


def test_the_checks_bite() -> None:
    operation = operations()["GET /v1/health"]
    case = operation.Case()
    request = httpx.Request("GET", URL + "/v1/health")
    said = {"content-type": "application/json"}
    for status, head, body in ((500, said, b'{"error":1}'), (200, said, b'{"status":7}'),
                               (200, {"content-type": "text/html"}, b"<p>")):  # fmt: skip
        answer = httpx.Response(status, headers=head, content=body, request=request)
        answer.elapsed = timedelta()
        with pytest.raises(FailureGroup):
            case.validate_response(answer, checks=CHECKS)


# Our own: a line of method and target, a line of headers that are set after signing, the body.


def ask(data: bytes) -> None:
    """Send what the input says; AssertionError unless the answer is an answer or a refusal."""
    head, _, body = data.partition(SEPARATOR)
    first, _, more = head.partition(b"\n")
    method, _, target = first.decode("latin-1").partition(" ")
    path, _, query = quote(target, safe="/?=&:%").partition("?")
    desk, person = shared()
    url = URL + path + (f"?{query}" if query else "")
    boot = desk.service.keys.boot
    try:
        headers = requests.sign(person.identity, method, url, {}, body, boot=boot)
    except UsageError:  # no URL that one could sign
        headers = requests.sign(person.identity, method, URL, {}, body, boot=boot)
    lines = [line.partition(b": ") for line in more.split(b"\n") if line]
    changed = {name.decode("latin-1").lower(): value for name, _, value in lines}
    raw = {k: v.encode() for k, v in headers.items()} | {
        "host": URL.removeprefix("https://").encode(), "content-length": b"%d" % len(body),
        **changed,
    }  # fmt: skip
    scope = {
        "type": "http", "asgi": {"version": "3.0"}, "http_version": "1.1", "method": method,
        "scheme": "https", "path": unquote(path, errors="replace"), "raw_path": path.encode(),
        "query_string": query.encode(), "root_path": "", "client": ("127.0.0.1", 1),
        "server": ("desk.example", 8443),
        "headers": [(k.encode("latin-1"), v) for k, v in raw.items()],
    }  # fmt: skip
    sent: list[dict[str, Any]] = []

    async def receive() -> dict[str, Any]:
        return {"type": "http.request", "body": body, "more_body": False}

    async def answer(message: dict[str, Any]) -> None:
        sent.append(message)

    loop().run_until_complete(desk.app(scope, receive, answer))
    desk.logs.clear()
    status = sent[0]["status"]
    content = b"".join(m.get("body", b"") for m in sent[1:])
    assert status < 500, content
    if status >= 400 and method != "HEAD":
        assert set(canonical.decode(content)) == {"error"}  # type: ignore[arg-type]


@cache
def seeds() -> list[bytes]:
    shared.cache_clear()  # a release's count fills what a server remembers of nonces in one moment
    desk, person = shared()

    async def make() -> list[tuple[str, str, bytes, bytes]]:
        registration = await person.registration()
        await person.ask("POST", "/v1/datasets", registration)
        info = await person.settled(registration.dataset)
        other = await person.registration(name="other")
        submission = await person.submission([info])
        quoted = await person.quote(info)
        upload = await person.ask("POST", "/v1/uploads", {"size": 900})
        of, at = f"/v1/datasets/{info.dataset}", f"/v1/uploads/{upload['upload']}"
        digest = codec.digest(quoted)
        newest = base64.b64encode((await desk.http.get("/log/checkpoint")).content)
        return [
            ("PUT", f"/v1/identities/{person.id}", b"", codec.encode(person.identity.public)),
            ("POST", "/v1/uploads", b"", b'{"size":900}'),
            ("HEAD", at, b"", b""),
            ("PATCH", at, b"upload-offset: 0", b"sealed"),
            ("POST", "/v1/datasets", b"", codec.encode(other)),
            ("GET", "/v1/datasets", b"casemate-checkpoint: " + newest, b""),
            ("GET", of, b"", b""),
            ("PUT", of + "/policy", b"", codec.encode(registration.policy)),
            ("POST", of + "/epoch", b"", b'{"epoch":3}'),
            ("POST", of + "/consents", b"", b'{"envelope":"{}"}'),
            ("POST", "/v1/quotes", b"", codec.encode(submission)),
            ("GET", f"/v1/quotes/{digest}", b"", b""),
            ("POST", f"/v1/quotes/{digest}/approval", b"", b""),
            ("POST", "/v1/jobs", b"", b'{"quote":"%s"}' % digest.encode()),
            ("GET", "/v1/attestation?nonce=" + "0" * 64, b"", b""),
            ("GET", "/log/tile/0/000.p/1", b"", b""),
            ("GET", "/log/attestation/" + "0" * 64, b"", b""),
        ]

    made = loop().run_until_complete(make())
    return [f"{m} {t}\n".encode() + h + SEPARATOR + b for m, t, h, b in made]


def changed(data: bytes, draw: random.Random) -> bytes:
    """Another body for most, so that it is decoded; else the target, or a header."""
    head, _, body = data.partition(SEPARATOR)
    first, _, more = head.partition(b"\n")
    method, _, target = first.partition(b" ")
    kind = draw.random()
    if kind < 0.6 and body.startswith(b"{"):
        body = reformed(body, draw) if draw.random() < 0.8 else mutated(body, draw)
    elif kind < 0.8:
        target = b"/" + mutated(target[1:], draw)
    else:
        name = draw.choice((b"signature", b"signature-input", b"content-digest", b"casemate-boot",
                            b"casemate-nonce", b"casemate-checkpoint", b"upload-offset",
                            b"content-length", b"host"))  # fmt: skip
        old = more.partition(b": ")[2] or b"casemate=:AAAA:"
        more = name + b": " + mutated(old, draw).replace(b"\n", b"")
    return method + b" " + target.replace(b"\n", b"") + b"\n" + more + SEPARATOR + body


def test_our_own_requests_are_answered_or_refused() -> None:
    draw = random.Random(4)
    for made in seeds():
        ask(made)
    count = COUNT if COUNT > 20_000 else COUNT // 10
    fuzzing.feed(ask, (changed(draw.choice(seeds()), draw) for _ in range(count)), ())


def test_a_fault_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """Seeded bug: a decoder that lets a KeyError out."""
    monkeypatch.setattr(app, "_decode", lambda form, data, limit: {}[data])
    with pytest.raises(fuzzing.Foreign):
        fuzzing.feed(ask, seeds(), ())
