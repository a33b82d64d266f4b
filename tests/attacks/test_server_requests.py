"""Requests that someone took, changed, repeated or made too large."""

from __future__ import annotations

import asyncio
import json
import logging
import re

import httpx
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from casemate.seal import requests
from casemate.seal.identity import Identity
from casemate.server.config import Rate, Rates
from casemate.server.logs import FIELDS, Bridge, Log
from casemate.server.routes import ROUTES
from casemate.server.throttle import Nonces, Throttle
from casemate.spec import codec
from casemate.spec.errors import AuthError, LimitError
from casemate.spec.messages import Run
from support.desk import URL, Desk, Person, Refused, Script, run_async
from support.server import table


def _code(response: httpx.Response) -> str:
    return str(response.json()["error"]["code"])


def test_a_repeated_request_is_refused_on_every_signed_route() -> None:
    async def work() -> None:
        async with Desk() as desk:
            person = await desk.person("p")
            for route in ROUTES:
                if route.permission in ("public", "self"):
                    continue
                path = route.path.replace("{id}", "none").replace("{digest}", "none")
                request = person.signed(route.method, path, b"" if route.body is None else b"{}")
                first = await desk.http.send(request)
                again = await desk.http.send(request)
                assert again.status_code == 401, route
                if route.method != "HEAD":
                    assert first.is_success or _code(first) != "auth.replay"
                    assert _code(again) == "auth.replay"

    run_async(work())


def test_a_parameter_twice_is_not_one_of_them() -> None:
    """Two readers of one address could take two nonces from it."""

    async def work() -> None:
        async with Desk() as desk:
            one, other = (f"nonce={c * 64}" for c in "01")
            for path in (f"{one}&{other}", f"{one}&{one}", f"x=1&{one}&x=2"):
                answer = await desk.http.get(f"/v1/attestation?{path}")
                assert (answer.status_code, _code(answer)) == (400, "format.field")
            assert (await desk.http.get(f"/v1/attestation?{one}")).status_code == 200

    run_async(work())


def _changes(request: httpx.Request) -> dict[str, httpx.Request]:
    def made(
        method: str = "", path: str = "", body: bytes | None = None, **head: str
    ) -> httpx.Request:
        headers = dict(request.headers) | {k.replace("_", "-"): v for k, v in head.items()}
        headers.pop("content-length", None)
        return httpx.Request(
            method or request.method, URL + (path or request.url.raw_path.decode()),
            content=request.content if body is None else body, headers=headers,
        )  # fmt: skip

    digest = request.headers["content-digest"]
    signature = request.headers["signature"]
    other = ("A" if signature[12] != "A" else "B").join((signature[:12], signature[13:]))
    stated = request.headers["signature-input"].replace('keyid="id_', 'keyid="id_0')
    return {
        "body": made(body=b'{"size":11}'),
        "body-empty": made(body=b""),
        "path": made(path="/v1/jobs"),
        "query": made(path="/v1/uploads?x=1"),
        "method": made(method="PATCH"),
        "host": made(host="other.example:8443"),
        "nonce": made(casemate_nonce="ff" * 16),
        "nonce-form": made(casemate_nonce="FF" * 16),
        "boot": made(casemate_boot="00" * 16),
        "digest": made(content_digest=digest[:-4] + "AA=:"),
        "signature": made(signature=other),
        "keyid": made(signature_input=stated),
        "no-signature": made(signature=""),
    }  # fmt: skip


def test_a_changed_request_is_refused() -> None:
    async def work() -> None:
        async with Desk() as desk:
            person = await desk.person("p")
            for name in _changes(person.signed("POST", "/v1/uploads", {"size": 10})):
                request = person.signed("POST", "/v1/uploads", {"size": 10})
                answer = await desk.http.send(_changes(request)[name])
                assert answer.status_code in (401, 404, 405), (name, answer.text)
                # The change spoilt nothing: the request itself is still good, once.
                if name not in ("nonce",):
                    assert (await desk.http.send(request)).status_code == 201, name

    run_async(work())


def test_a_request_signed_for_another_boot_or_by_another_key_is_refused() -> None:
    async def work() -> None:
        async with Desk() as one, Desk() as two:
            person = await one.person("p")
            there = Person(two, person.identity)
            await there.enrol()
            moved = person.signed("GET", "/v1/datasets")
            answer = await two.http.send(moved)
            assert (answer.status_code, _code(answer)) == (401, "auth.boot-stale")
            thief = Identity.generate("thief")
            head = requests.sign(
                thief, "GET", URL + "/v1/datasets", {}, b"", boot=one.service.keys.boot
            )
            head["signature-input"] = head["signature-input"].replace(thief.id, person.id)
            answer = await one.http.get("/v1/datasets", headers=head)
            assert (answer.status_code, _code(answer)) == (401, "auth.signature")

    run_async(work())


def test_nobody_enrols_for_another() -> None:
    async def work() -> None:
        async with Desk() as desk:
            victim = Identity.generate("victim")
            thief = Person(desk, Identity.generate("thief"))
            for path, body in (
                (f"/v1/identities/{victim.id}", victim.public),
                (f"/v1/identities/{victim.id}", thief.identity.public),
                (f"/v1/identities/{thief.id}", victim.public),
            ):
                answer = await thief.send("PUT", path, body)
                assert (answer.status_code, _code(answer)) == (401, "auth.unknown-identity")

    run_async(work())


def test_a_registration_cannot_take_another_owners_upload_or_sealed_key() -> None:
    async def work() -> None:
        async with Desk() as desk:
            owner, thief = await desk.person("owner"), await desk.person("thief")
            made = await owner.registration()
            stolen = codec.from_json(type(made), codec.to_json(made) | {"owner": thief.id})  # type: ignore[operator]
            with pytest.raises(Refused) as refused:
                await thief.ask("POST", "/v1/datasets", stolen)
            assert refused.value.code == "data.unknown-upload"
            theirs = await thief.registration()
            mixed = codec.from_json(
                type(made),
                codec.to_json(theirs) | {"sealed_key": codec.to_json(made)["sealed_key"]},  # type: ignore[operator,index]
            )
            with pytest.raises(Refused) as refused:
                await thief.ask("POST", "/v1/datasets", mixed)
            assert refused.value.code == "format.sealed"

    run_async(work())


@pytest.mark.parametrize(
    "body",
    [b"", b"[]", b'{"size":1,"size":2}', b'{"size": 1}', b'{"size":1.0}', b'{"size":true}',
     b'{"size":"1"}', b'{"size":1,"x":2}', b"\xff", b'{"size":-1}', b'{"size":0}',
     b'{"size":99999999999999999999}', b"[" * 5000, b'{"size":NaN}'],
)  # fmt: skip
def test_a_malformed_body_is_refused_with_a_code(body: bytes) -> None:
    async def work() -> None:
        async with Desk() as desk:
            person = await desk.person("p")
            answer = await person.send("POST", "/v1/uploads", body)
            assert answer.status_code in (400, 413)
            assert _code(answer).split(".")[0] in ("format", "limit")

    run_async(work())


@settings(max_examples=150, deadline=None)
@given(body=st.binary(max_size=200), choice=st.integers(0, len(ROUTES) - 1))
def test_no_bytes_make_the_server_fault(body: bytes, choice: int) -> None:
    route = ROUTES[choice]

    async def work(desk: Desk, person: Person) -> httpx.Response:
        path = re.sub(r"{[a-z]+}", "x", route.path)
        return await person.send(route.method, path, body)

    desk, person = _shared_desk()
    answer = asyncio.run(work(desk, person))
    assert answer.status_code < 500


_SHARED: list[tuple[Desk, Person]] = []


def _shared_desk() -> tuple[Desk, Person]:
    if not _SHARED:
        desk = Desk()
        person = Person(desk, Identity.generate("p"))
        asyncio.run(person.enrol())
        _SHARED.append((desk, person))
    return _SHARED[0]


def test_a_path_with_a_slash_more_is_not_redirected_to_where_the_caller_says() -> None:
    async def work() -> None:
        async with Desk() as desk:
            for path in ("/v1/health/", "/log/checkpoint/", "/v1//health", "/"):
                answer = await desk.http.get(path, headers={"host": "evil.example"})
                assert (answer.status_code, _code(answer)) == (404, "format.route"), path
                assert "location" not in answer.headers

    run_async(work())


def test_sizes_are_capped() -> None:
    async def work() -> None:
        limits = {"json_bytes": 4096, "chunk_bytes": 1000, "upload_bytes": 5000}
        async with Desk(identity_bytes=8000, open_uploads=2, **limits) as desk:
            person = await desk.person("p")

            async def code(method: str, path: str, body: object, **head: str) -> str:
                return _code(await person.send(method, path, body, head))

            assert await code("POST", "/v1/uploads", b" " * 4097) == "limit.body"
            assert await code("POST", "/v1/uploads", {"size": 5001}) == "limit.upload"
            assert await code("GET", "/v1/datasets", b"x") == "limit.body"
            name = (await person.ask("POST", "/v1/uploads", {"size": 1500}))["upload"]
            path = f"/v1/uploads/{name}"
            offset = {"upload-offset": "0"}
            assert _code(await person.send("PATCH", path, b"x" * 1001, offset)) == "limit.body"
            await person.ask("PATCH", path, b"x" * 1000, offset)
            late = await person.send("PATCH", path, b"x" * 501, {"upload-offset": "1000"})
            assert _code(late) == "limit.upload"
            # An unsigned body is not read past the limit either, with or without a length.
            answer = await desk.http.post("/v1/uploads", content=b" " * 10_000)
            assert _code(answer) == "limit.body"

            async def endless() -> object:
                while True:
                    yield b" " * 1000

            answer = await desk.http.post("/v1/uploads", content=endless())  # type: ignore[arg-type]
            assert _code(answer) == "limit.body"

    run_async(work())


def test_too_fast_gets_503_with_retry_after() -> None:
    async def work() -> None:
        slow = Rate(per_second=0.5, burst=2)
        quick = Rate(per_second=1e6, burst=10**6)
        rates = Rates(public=slow, enrol=quick, identity=quick, quote=slow)
        async with Desk(rates=rates) as desk:
            answers = [await desk.http.get("/v1/health") for _ in range(3)]
            assert [a.status_code for a in answers] == [200, 200, 503]
            assert _code(answers[-1]) == "limit.rate" and answers[-1].headers["retry-after"] == "2"
            desk.clock.now += 2
            assert (await desk.http.get("/v1/health")).status_code == 200
            # One identity's haste does not slow another down.
            one, two = await desk.person("one"), await desk.person("two")
            for _ in range(2):
                assert (await one.send("POST", "/v1/quotes", b"{}")).status_code == 400
            assert (await one.send("POST", "/v1/quotes", b"{}")).status_code == 503
            assert (await two.send("POST", "/v1/quotes", b"{}")).status_code == 400

    run_async(work())


# Replay memory.


@settings(max_examples=100, deadline=None)
@given(st.lists(st.tuples(st.sampled_from("ab"), st.integers(0, 40)), max_size=120))
@example([("a", number) for number in (*range(6), *range(6))])
def test_no_nonce_passes_twice_in_bounded_memory(uses: list[tuple[str, int]]) -> None:
    memory = Nonces(per_identity=5, total=8)
    passed = set()
    for identity, number in uses:
        nonce = number.to_bytes(16, "big")
        try:
            memory.use(identity, nonce)
        except AuthError as e:
            assert e.code in ("auth.replay", "auth.nonce-old")
        else:
            assert (identity, nonce) not in passed
            passed.add((identity, nonce))
        assert len(memory) <= 8


def test_rising_nonces_never_meet_the_floor_whatever_others_do() -> None:
    memory = Nonces(per_identity=10, total=40)
    for number in range(1000):
        memory.use("honest", number.to_bytes(16, "big"))
        for other in range(3):
            memory.use(f"flood{other}", (number * 7 + other).to_bytes(16, "big"))


def test_a_memory_that_forgets_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    """The seeded bug: nonces are dropped, but the floor does not rise."""

    def forget(self: Nonces, identity: str) -> None:
        self._count -= len(self._seen[identity])
        self._seen[identity] = set()

    monkeypatch.setattr(Nonces, "_halve", forget)
    with pytest.raises(AssertionError):
        test_no_nonce_passes_twice_in_bounded_memory()


def test_a_flood_of_keys_does_not_grow_the_buckets() -> None:
    from casemate.server import throttle
    from support.desk import AutoClock

    made = Throttle(Rate(per_second=1.0, burst=1), AutoClock())
    for number in range(throttle.MAX_BUCKETS + 100):
        made.take(str(number))
    assert len(made._buckets) == throttle.MAX_BUCKETS
    with pytest.raises(LimitError):
        made.take(str(throttle.MAX_BUCKETS + 99))


# What is written down.

MARKER = b"SECRET-ROW-MARKER"


def test_logs_and_metrics_never_carry_what_was_sent(monkeypatch: pytest.MonkeyPatch) -> None:
    """Markers in rows, names, ids, paths, headers, bodies and faults: none comes back."""
    text = MARKER.decode()

    async def work() -> None:
        fault = RuntimeError(text)
        async with Desk(script=Script(answers={Run: fault})) as desk:
            owner, scientist = await desk.person(text), await desk.person("s")
            info = await owner.push(name=text, wire=table(64, marker=MARKER * 4))
            job = (await scientist.submit(await scientist.quote(info))).job
            await scientist.finished(job)
            await desk.http.get(f"/{text}", headers={"x": text, "user-agent": text})
            await desk.http.get(f"/v1/attestation?nonce={text}")
            await owner.send("GET", f"/v1/datasets/{text}?{text}={text}")
            await owner.send("POST", "/v1/uploads", {text: text})

            monkeypatch.setattr(desk.service.metrics, "text", broken)
            answer = await desk.http.get("/metrics")
            assert (answer.status_code, _code(answer)) == (500, "internal.fault")
            assert text not in answer.text
            monkeypatch.undo()
            Bridge(desk.service.log).handle(
                logging.LogRecord("uvicorn.error", logging.ERROR, text, 1, text, None, None)
            )
            metrics = (await desk.http.get("/metrics")).text
            assert text not in metrics and info.dataset not in metrics and job not in metrics
            assert text not in desk.log_text()
            for line in desk.logs:
                assert set(json.loads(line)) <= set(FIELDS) | {"time", "event"}
            assert any('"error":"ValueError"' in line for line in desk.logs)

    def broken() -> bytes:
        raise ValueError(text)

    run_async(work())


@given(st.text(max_size=100), st.sampled_from(sorted(FIELDS)))
def test_a_field_takes_only_its_form(text: str, name: str) -> None:
    from support.desk import AutoClock

    lines: list[str] = []
    Log(lines.append, AutoClock()).event("request", **{name: text, "unknown_field": text})
    written = json.loads(lines[0])
    assert "unknown_field" not in written
    assert name not in written or written[name] == text
    assert "\n" not in lines[0]
