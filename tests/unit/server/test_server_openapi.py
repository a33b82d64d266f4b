"""The OpenAPI document and docs/server.md stay in step with the table."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import jsonschema
import pytest
from openapi_spec_validator import OpenAPIV31SpecValidator

from casemate.server import openapi
from casemate.server.config import Config, Limits
from casemate.server.routes import ROUTES
from casemate.spec import codec
from casemate.spec.data import DatasetInfo
from casemate.spec.errors import FAMILIES
from support.desk import Desk, run_async

DOCS = Path(__file__).parents[3] / "docs"


def _document() -> dict[str, Any]:
    found: list[dict[str, Any]] = []

    async def work() -> None:
        async with Desk() as desk:
            found.append((await desk.http.get("/openapi.json")).json())

    run_async(work())
    return found[0]


def test_the_document_is_valid_openapi_31_and_complete() -> None:
    document = _document()
    OpenAPIV31SpecValidator(document).validate()
    listed = {(m.upper(), p) for p, item in document["paths"].items() for m in item}
    assert listed == {(r.method, r.path) for r in ROUTES}
    names = [o["operationId"] for item in document["paths"].values() for o in item.values()]
    assert len(set(names)) == len(ROUTES)


def _schema(document: dict[str, Any], form: Any) -> dict[str, Any]:
    """The JSON schema of ``form`` with the document's components."""
    made = openapi._Schemas().of(form)
    text = json.dumps({"schema": made, "components": document["components"]})
    return json.loads(text)["schema"] | {"components": document["components"]}  # type: ignore[no-any-return]


def test_what_the_server_sends_and_takes_is_what_the_document_says() -> None:
    """Real bodies against the schemas; a field more, less or of another type is refused."""
    document = _document()

    async def work() -> None:
        async with Desk() as desk:
            owner, scientist = await desk.person("owner"), await desk.person("scientist")
            registration = await owner.registration()
            info = await owner.push()
            submission = await scientist.submission([info])
            quote = await scientist.ask("POST", "/v1/quotes", submission)
            job = (await scientist.ask("POST", "/v1/jobs", {"quote": _digest(quote)}))["job"]
            await scientist.finished(job)
            answers = {
                "/v1/attestation": (
                    await desk.http.get("/v1/attestation?nonce=" + "0" * 64)
                ).json(),
                "/v1/datasets/{id}": codec.to_json(info),
                "/v1/quotes/{digest}": quote,
                "/v1/jobs/{id}": codec.to_json(await scientist.status(job)),
                "/v1/jobs/{id}/receipt": await scientist.ask("GET", f"/v1/jobs/{job}/receipt"),
                "/v1/datasets": [codec.to_json(info)],
            }
            for route in ROUTES:
                if route.method == "GET" and route.path in answers:
                    jsonschema.validate(answers[route.path], _schema(document, route.answer))
            for value in (registration, submission):
                form = _schema(document, type(value))
                body = codec.to_json(value)
                assert isinstance(body, dict)
                jsonschema.validate(body, form)
                for bad in ({**body, "more": 1}, {k: v for k, v in body.items() if k != "upload"},
                            {**body, "sealed_key": 3}, {**body, "type": "other/v1"}):  # fmt: skip
                    with pytest.raises(jsonschema.ValidationError):
                        jsonschema.validate(bad, form)

    run_async(work())


def _digest(quote: Any) -> str:
    from casemate.spec import canonical

    return canonical.digest(quote)


def test_every_route_says_what_it_is() -> None:
    for route in ROUTES:
        assert route.summary and not route.summary.endswith(".")
        assert (route.body is None) == (route.limit(Limits()) == 0)
    assert openapi._Schemas().of(DatasetInfo) == {"$ref": "#/components/schemas/DatasetInfo"}


def test_the_page_lists_exactly_the_routes() -> None:
    page = (DOCS / "server.md").read_text()
    rows = re.findall(
        r"^\| (GET|HEAD|POST|PUT|PATCH|DELETE) \| `([^`]+)` \| ([a-z-]+) \| (.+) \|$", page, re.M
    )
    assert rows == [(r.method, r.path, r.permission, r.summary) for r in ROUTES]


def test_the_operators_page_names_the_true_limits() -> None:
    page = (DOCS / "operate.md").read_text()
    rows = dict(re.findall(r"^\| `(\w+)` \| ([0-9.]+) \|", page, re.M))
    limits = Limits()
    assert rows == {
        name: f"{getattr(limits, name):g}"
        if isinstance(getattr(limits, name), float)
        else str(getattr(limits, name))
        for name in Limits.__dataclass_fields__
    }
    for name in ("host", "port", "workers", "spares", "threads"):
        assert f"`{name}`" in page and name in Config.__dataclass_fields__
    assert "server.json" in page and set(FAMILIES) >= {"limit", "ledger"}
