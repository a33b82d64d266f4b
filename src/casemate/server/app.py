"""The ASGI application: each route of the table behind the same gates, in the same order.

Throttle, body within its limit and time, signature, nonce, permission, strict decoding, handler.
Nothing but the table opens a path, and every error leaves in the one shape of ``spec.errors``.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager
from typing import Any, Final

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response, StreamingResponse
from starlette.routing import Route as Path

from casemate.ledger import catalog
from casemate.seal import note, requests
from casemate.server import permissions
from casemate.server.routes import ROUTES, Route
from casemate.server.service import JSON, Call, Reply, Service, whole
from casemate.server.throttle import Busy
from casemate.spec import canonical, codec
from casemate.spec.errors import AuthError, CasemateError, FormatError, InternalError, LimitError
from casemate.spec.identity import PublicIdentity

CHECKPOINT_HEADER: Final = "casemate-checkpoint"
# Past this many bytes a body is hashed off the event loop.
_LARGE: Final = 1 << 18
# A body's values: decoding holds the event loop. Three times what a schema of 4,096 columns has.
_VALUES: Final = 1 << 17
_HEADERS: Final = {"cache-control": "no-store", "x-content-type-options": "nosniff"}


def decode_fields(form: Mapping[str, type], data: canonical.Json) -> dict[str, Any]:
    """A plain JSON object with exactly the fields of ``form``; ``FormatError`` otherwise."""
    if not isinstance(data, dict) or set(data) != set(form):
        raise FormatError(
            "format.field",
            f"The body is not an object with exactly: {', '.join(sorted(form))}.",
            mend="Send the documented form of this version.",
        )
    for name, kind in form.items():
        if type(data[name]) is not kind:
            raise FormatError(
                "format.field",
                f"{name} is not of type {kind.__name__}.",
                mend="Send the documented form of this version.",
                where=name,
            )
    return dict(data)


def _decode(form: Any, data: bytes, limit: int) -> Any:
    if form is None or form is bytes:
        return data
    if isinstance(form, Mapping):
        return decode_fields(form, canonical.decode(data, limit=limit, values=_VALUES))
    return codec.decode(form, data, limit=limit, values=_VALUES)


def _too_large(limit: int) -> LimitError:
    return LimitError(
        "limit.body",
        f"The body is larger than the {limit} bytes that this route takes.",
        mend="Send less at once.",
    )


async def _body(request: Request, limit: int, seconds: float) -> bytes:
    declared = whole(request.headers.get("content-length", "0"))
    if declared is None or declared > limit:
        raise _too_large(limit)
    parts = bytearray()
    try:
        async with asyncio.timeout(seconds):
            async for part in request.stream():
                parts += part
                if len(parts) > limit:
                    raise _too_large(limit)
    except TimeoutError:
        raise LimitError(
            "limit.slow",
            f"The body did not come within {seconds:.0f} s.",
            mend="Send smaller pieces.",
            status=408,
        ) from None
    return bytes(parts)


def _url(request: Request) -> str:
    """The target as the client wrote it; the boot in the signature says which server is meant."""
    scope = request.scope
    query = scope["query_string"]
    target = scope["raw_path"] + (b"?" + query if query else b"")
    host = request.headers.get("host", "")
    return f"{scope['scheme']}://{host}{target.decode('latin-1')}"


async def _authenticate(service: Service, route: Route, request: Request, body: bytes) -> str:
    """Who signed this request, once; ``auth.*`` otherwise."""

    def lookup(name: str) -> PublicIdentity | None:
        try:
            return catalog.identity(service.store, name)
        except AuthError:
            return None

    def enrolling(name: str) -> PublicIdentity | None:
        identity: PublicIdentity = _decode(route.body, body, route.limit(service.config.limits))
        return identity if identity.id == name == request.path_params["id"] else None

    def verify() -> str:
        return requests.verify(
            request.method,
            _url(request),
            request.headers.items(),
            body,
            boot=service.keys.boot,
            lookup=enrolling if route.permission == "self" else lookup,
        )

    caller = await asyncio.to_thread(verify) if len(body) > _LARGE else verify()
    service.nonces.use(caller, bytes.fromhex(request.headers[requests.NONCE_HEADER]))
    return caller


def _query(request: Request) -> dict[str, str]:
    found = request.query_params.multi_items()
    for name, count in Counter(name for name, _ in found).items():
        if count > 1:
            raise FormatError(
                "format.field",
                f"The parameter {name[:40]!r} stands there {count} times.",
                mend="Send each parameter once.",
                where=name[:40],
            )
    return dict(found)


async def _answer(service: Service, route: Route, request: Request) -> Response:
    public = route.permission == "public"
    limits = service.config.limits
    if (seen := request.headers.get(CHECKPOINT_HEADER)) is not None:
        service.remembers(note.octets(seen).decode("utf-8", "replace"))
    if public or route.permission == "self":
        peer = request.client.host if request.client is not None else ""
        service.throttles["public" if public else "enrol"].take(peer)
    body = await _body(request, route.limit(limits), limits.body_seconds)
    caller = ""
    if not public:
        caller = await _authenticate(service, route, request, body)
        service.throttles["identity"].take(caller)
        if route.rate != "identity":
            service.throttles[route.rate].take(caller)
    resource = next(iter(request.path_params.values()), "")
    permissions.check(service, route.permission, caller, resource)
    call = Call(
        service=service,
        caller=caller,
        id=resource,
        query=_query(request),
        headers=request.headers,
        body=_decode(route.body, body, route.limit(limits)),
    )
    service.require_whole()  # last, since another request may have found it meanwhile
    answer = await route.handler(call)
    if isinstance(answer, Reply):
        headers = _HEADERS | dict(answer.headers)
        if isinstance(answer.content, bytes):
            return Response(answer.content, route.status, headers, media_type=answer.media)
        return StreamingResponse(answer.content, route.status, headers, media_type=answer.media)
    if answer is None:
        return Response(status_code=route.status, headers=_HEADERS)
    return Response(codec.encode(answer), route.status, _HEADERS, media_type=JSON)


def _refused(service: Service, error: CasemateError, method: str) -> Response:
    service.metrics.refusals.labels(error.family).inc()
    headers = dict(_HEADERS)
    if isinstance(error, Busy):
        headers["retry-after"] = str(error.retry_after)
    content = b"" if method == "HEAD" else canonical.encode(error.to_wire())
    return Response(content, error.status, headers, media_type=JSON)


_FAULT: Final = InternalError(
    "internal.fault",
    "The server met a fault of its own.",
    mend="Try again; if it comes back, report it with the time of day.",
)


def _stopping() -> Busy:
    return Busy(
        "limit.stopping",
        "The server stops, and waits for this answer no longer.",
        mend="Try again when it is back: what it accepted is kept.",
    )


def _endpoint(service: Service, route: Route) -> Callable[[Request], Any]:
    async def endpoint(request: Request) -> Response:
        started = service.clock.monotonic()
        code = None
        try:
            response = await _answer(service, route, request)
        except CasemateError as e:
            code = e.code
            service.watch(e)
            response = _refused(service, e, request.method)
        except ClientDisconnect:
            code = "net.closed"
            response = Response(status_code=400)
        except asyncio.CancelledError:  # by uvicorn, once the server has waited long enough
            stopping = _stopping()
            code = stopping.code
            response = _refused(service, stopping, request.method)
        except Exception as e:
            service.log.fault(e, route=route.path, method=route.method)
            code = _FAULT.code
            response = _refused(service, _FAULT, request.method)
        status = response.status_code
        service.metrics.requests.labels(route.method, route.path, str(status)).inc()
        service.metrics.seconds.labels(route.path).observe(service.clock.monotonic() - started)
        service.log.event(
            "request", method=route.method, route=route.path, status=status, code=code
        )
        return response

    return endpoint


def build(service: Service, background: Callable[[], Any]) -> Starlette:
    """The application; ``background`` is a context manager around its life."""

    async def unmatched(request: Request, error: Exception) -> Response:
        status = error.status_code if isinstance(error, HTTPException) else 404
        refused = FormatError(
            "format.route",
            "There is no such route.",
            mend="See /openapi.json for the routes of this version.",
            status=status,
        )
        return _refused(service, refused, request.method)

    @asynccontextmanager
    async def lifespan(_: Starlette) -> AsyncIterator[None]:
        async with background():
            yield

    paths = []
    # Those that take octets, which are called often, are looked at first.
    for route in sorted(ROUTES, key=lambda r: r.body is not bytes):
        where = route.path.replace("{path}", "{path:path}")
        path = Path(where, _endpoint(service, route), methods=[route.method])
        path.methods = {route.method}  # Starlette would add HEAD to GET
        paths.append(path)
    made = Starlette(routes=paths, lifespan=lifespan, exception_handlers={HTTPException: unmatched})
    made.router.redirect_slashes = False  # a path that is not in the table does not exist
    return made
