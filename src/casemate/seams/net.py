"""Net: what the server asks of other machines, which are untrusted."""

from __future__ import annotations

import asyncio
from typing import Final, Protocol

MAX_ANSWER: Final = 1 << 16


class Unreachable(Exception):
    """There was no answer: of its words nothing is shown."""


class Net(Protocol):
    async def ask(self, url: str, body: bytes | None, *, seconds: float) -> tuple[int, bytes]:
        """POST ``body``, or GET where it is None: status and at most ``MAX_ANSWER`` bytes of the
        answer, all of it within ``seconds``. Raises :class:`Unreachable`."""


class HttpNet:
    """HTTP by httpx, without proxies, redirects or cookies; https with the system's authorities."""

    async def ask(self, url: str, body: bytes | None, *, seconds: float) -> tuple[int, bytes]:
        import httpx

        try:
            # httpx counts from one byte to the next, which a slow peer can draw out for ever.
            async with (
                asyncio.timeout(seconds),
                httpx.AsyncClient(trust_env=False, timeout=seconds) as client,
                client.stream("GET" if body is None else "POST", url, content=body) as answer,
            ):
                data = b""
                async for part in answer.aiter_bytes():
                    data += part
                    if len(data) > MAX_ANSWER:
                        raise Unreachable
                return answer.status_code, data
        except (httpx.HTTPError, httpx.InvalidURL, OSError):
            raise Unreachable from None
