"""The network as a function that is passed in: collateral, and a cloud's own metadata service."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Final, TypeAlias

from casemate.spec.errors import NetError

MAX_BODY: Final = 4 << 20
SECONDS: Final = 20.0


@dataclass(frozen=True)
class Ask:
    """A GET, or a POST of ``body``."""

    url: str
    headers: Mapping[str, str] = field(default_factory=dict)
    body: bytes | None = None


@dataclass(frozen=True)
class Reply:
    """``headers``: names in lower case."""

    status: int
    headers: Mapping[str, str]
    body: bytes


Fetch: TypeAlias = Callable[[Ask], Reply]


def failed(url: str, reason: str) -> NetError:
    return NetError(
        "net.collateral",
        f"{url[:160]} gives nothing: {reason}.",
        mend="Try again later; what was stored before stays.",
        where=url[:160],
    )


def https(ask: Ask) -> Reply:
    """By httpx, no redirect followed. Raises ``net.collateral``."""
    import httpx

    method = "GET" if ask.body is None else "POST"
    try:
        with (
            httpx.Client(timeout=SECONDS, trust_env=True) as client,
            client.stream(method, ask.url, headers=dict(ask.headers), content=ask.body) as reply,
        ):
            parts, size = [], 0
            for part in reply.iter_bytes():
                size += len(part)
                if size > MAX_BODY:
                    raise failed(ask.url, "the answer is too long")
                parts.append(part)
            headers = {name.lower(): text for name, text in reply.headers.items()}
            return Reply(reply.status_code, headers, b"".join(parts))
    except (httpx.HTTPError, httpx.InvalidURL) as e:
        raise failed(ask.url, type(e).__name__) from None


def answered(fetch: Fetch, ask: Ask) -> Reply:
    """A reply of status 200. Raises ``net.collateral``."""
    reply = fetch(ask)
    if reply.status != 200:
        raise failed(ask.url, f"status {reply.status}")
    if not reply.body or len(reply.body) > MAX_BODY:
        raise failed(ask.url, f"{len(reply.body)} bytes")
    return reply
