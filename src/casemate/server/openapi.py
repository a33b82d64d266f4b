"""The OpenAPI 3.1 document, made of the routes and of the shared formats' type hints."""

from __future__ import annotations

import dataclasses
import types
import typing
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any, Final, Literal, Union, get_args, get_origin

from casemate.spec import codec

if TYPE_CHECKING:
    from casemate.server.routes import Route

_SCALARS: Final[dict[type, dict[str, Any]]] = {
    bool: {"type": "boolean"},
    int: {"type": "integer", "minimum": -(2**53) + 1, "maximum": 2**53 - 1},
    float: {"type": "number"},
    str: {"type": "string"},
    bytes: {"type": "string", "contentEncoding": "base64url", "pattern": "^[A-Za-z0-9_-]*$"},
}
_PARAMETERS: Final[dict[str, dict[str, Any]]] = {
    "{id}": {"name": "id", "in": "path", "required": True, "schema": {"type": "string"}},
    "{digest}": {
        "name": "digest",
        "in": "path",
        "required": True,
        "schema": {"type": "string", "pattern": "^sha256:[0-9a-f]{64}$"},
    },
    "{path}": {
        "name": "path",
        "in": "path",
        "required": True,
        "description": "As in C2SP tlog-tiles, with its slashes.",
        "schema": {"type": "string"},
    },
    "{hex}": {
        "name": "hex",
        "in": "path",
        "required": True,
        "schema": {"type": "string", "pattern": "^[0-9a-f]{64}$"},
    },
}
_ERROR: Final[dict[str, Any]] = {
    "type": "object",
    "required": ["error"],
    "additionalProperties": False,
    "properties": {
        "error": {
            "type": "object",
            "required": ["code", "message", "mend", "where"],
            "additionalProperties": False,
            "properties": {
                "code": {"type": "string", "pattern": "^[a-z]+(\\.[a-z0-9-]+)+$"},
                "message": {"type": "string"},
                "mend": {"type": "string"},
                "where": {"type": "string"},
            },
        }
    },
}


class _Schemas:
    """JSON Schema (2020-12) of types; shared formats become named components."""

    def __init__(self) -> None:
        self.named: dict[str, dict[str, Any]] = {"Error": _ERROR}

    def of(self, hint: Any) -> dict[str, Any]:
        origin = get_origin(hint)
        if origin is Literal:
            return {"enum": list(get_args(hint))}
        if origin in (Union, types.UnionType):
            return {
                "anyOf": [
                    {"type": "null"} if kind is type(None) else self.of(kind)
                    for kind in get_args(hint)
                ]
            }
        if origin in (tuple, list):
            return {"type": "array", "items": self.of(get_args(hint)[0])}
        if origin is dict:
            return {"type": "object", "additionalProperties": self.of(get_args(hint)[1])}
        if isinstance(hint, tuple):
            return {"type": "array", "items": {"anyOf": [self.of(kind) for kind in hint]}}
        if isinstance(hint, Mapping):
            return _object({name: self.of(kind) for name, kind in hint.items()})
        name = getattr(hint, "__casemate_type__", None)
        if name is None:
            return dict(_SCALARS[hint])
        if hint.__name__ not in self.named:
            self.named[hint.__name__] = {}  # before its fields: a format may hold itself
            hints = typing.get_type_hints(hint)
            fields = {f.name: self.of(hints[f.name]) for f in dataclasses.fields(hint)}
            made = _object({"type": {"const": name}} | fields)
            made["required"] = [n for n in made["required"] if n not in codec.later_fields(hint)]
            made["description"] = _first_paragraph(hint.__doc__)
            self.named[hint.__name__] = made
        return {"$ref": f"#/components/schemas/{hint.__name__}"}


def _object(properties: dict[str, Any]) -> dict[str, Any]:
    return {
        "type": "object",
        "properties": properties,
        "required": sorted(properties),
        "additionalProperties": False,
    }


def _first_paragraph(doc: str | None) -> str:
    return " ".join((doc or "").split("\n\n")[0].split())


def _content(schemas: _Schemas, form: Any) -> dict[str, Any]:
    if form is bytes:
        return {"application/octet-stream": {"schema": {}}}
    if form is str:
        return {"text/plain": {"schema": {"type": "string"}}}
    if form is object:
        return {"application/json": {"schema": {"type": "object"}}}
    return {"application/json": {"schema": schemas.of(form)}}


def _operation(schemas: _Schemas, route: Route) -> dict[str, Any]:
    operation: dict[str, Any] = {
        "operationId": route.name,
        "summary": route.summary,
        "x-casemate-permission": route.permission,
        "security": [] if route.permission == "public" else [{"signature": []}],
        "responses": {
            str(route.status): {"description": "Done."},
            "default": {
                "description": "Refused; 503 comes with Retry-After.",
                "content": {"application/json": {"schema": {"$ref": "#/components/schemas/Error"}}},
            },
        },
    }
    parameters = [spec for mark, spec in _PARAMETERS.items() if mark in route.path]
    parameters += [
        {"name": name, "in": place, "required": required, "schema": {"type": "string"}}
        | ({"description": text} if text else {})
        for place, name, required, text in route.parameters
    ]
    if parameters:
        operation["parameters"] = parameters
    if route.body is not None:
        operation["requestBody"] = {"required": True, "content": _content(schemas, route.body)}
    if route.answer is not None:
        operation["responses"][str(route.status)]["content"] = _content(schemas, route.answer)
    return operation


def document(routes: Iterable[Route], software: str) -> dict[str, Any]:
    """The OpenAPI 3.1 document of ``routes``."""
    schemas = _Schemas()
    paths: dict[str, dict[str, Any]] = {}
    for route in routes:
        paths.setdefault(route.path, {})[route.method.lower()] = _operation(schemas, route)
    return {
        "openapi": "3.1.0",
        "info": {
            "title": "casemate",
            "version": software,
            "description": "Canonical JSON only; every format is closed. Requests are signed with "
            "RFC 9421 for one boot of one attested server.",
        },
        "paths": paths,
        "components": {
            "schemas": schemas.named,
            "securitySchemes": {
                "signature": {
                    "type": "http",
                    "scheme": "signature",
                    "description": "RFC 9421, label casemate, Ed25519; see ARCHITECTURE.md.",
                }
            },
        },
    }
