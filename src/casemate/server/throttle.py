"""Token buckets on the Clock, and the memory of request nonces; both bounded."""

from __future__ import annotations

import math
from collections import OrderedDict
from typing import Final

from casemate.seams import Clock
from casemate.server.config import Rate
from casemate.spec.errors import AuthError, LimitError

MAX_BUCKETS: Final = 20_000


class Busy(LimitError):
    """Too fast or too many for now: 503 with Retry-After (RFC 9110, 10.2.3), in seconds."""

    status = 503

    def __init__(self, code: str, message: str, *, mend: str, retry_after: float = 1.0) -> None:
        super().__init__(code, message, mend=mend)
        self.retry_after = max(1, math.ceil(retry_after))


class Throttle:
    """Token buckets by key; the least recently used is forgotten past ``MAX_BUCKETS``."""

    def __init__(self, rate: Rate, clock: Clock) -> None:
        self._rate = rate
        self._clock = clock
        self._buckets: OrderedDict[str, tuple[float, float]] = OrderedDict()

    def take(self, key: str) -> None:
        """Take a token of ``key``; raises ``limit.rate`` when there is none."""
        now = self._clock.monotonic()
        tokens, then = self._buckets.pop(key, (float(self._rate.burst), now))
        tokens = min(self._rate.burst, tokens + (now - then) * self._rate.per_second)
        allowed = tokens >= 1
        self._buckets[key] = (tokens - 1 if allowed else tokens, now)
        if len(self._buckets) > MAX_BUCKETS:
            self._buckets.popitem(last=False)
        if not allowed:
            wait = (1 - tokens) / self._rate.per_second
            raise Busy(
                "limit.rate",
                "Requests come faster than this server takes them.",
                mend=f"Try again in {max(1, math.ceil(wait))} s.",
                retry_after=wait,
            )


class Nonces:
    """Every nonce at most once in a boot, in bounded memory.

    Per identity the newest are kept, and a floor: when there are too many, the lower half goes and
    the floor rises to the highest that went; what is not above the floor is refused. So no nonce
    passes twice, whatever the clocks say, and a client whose nonces rise (six bytes of Unix
    milliseconds, then ten random) never meets the floor. When all identities together hold too
    many, the one that holds most is halved, so that a flood is paid for by who makes it.
    """

    def __init__(self, per_identity: int, total: int) -> None:
        self._per_identity = per_identity
        self._total = total
        self._count = 0
        self._seen: dict[str, set[bytes]] = {}
        self._floor: dict[str, bytes] = {}

    def __len__(self) -> int:
        return self._count

    def use(self, identity: str, nonce: bytes) -> None:
        """Remember ``nonce``; raises ``auth.replay`` when it may have been used."""
        seen = self._seen.setdefault(identity, set())
        if nonce in seen:
            raise AuthError(
                "auth.replay",
                "This signed request has been answered before.",
                mend="Sign a new request with a new nonce.",
            )
        if nonce <= self._floor.get(identity, b""):
            raise AuthError(
                "auth.nonce-old",
                "The nonce is below those that the server still remembers.",
                mend="Let nonces rise: 6 bytes of Unix milliseconds, then 10 random bytes.",
            )
        seen.add(nonce)
        self._count += 1
        if len(seen) > self._per_identity:
            self._halve(identity)
        if self._count > self._total:
            self._halve(max(self._seen, key=lambda i: len(self._seen[i])))

    def _halve(self, identity: str) -> None:
        ordered = sorted(self._seen[identity])
        cut = (len(ordered) + 1) // 2
        self._floor[identity] = ordered[cut - 1]
        self._seen[identity] = set(ordered[cut:])
        self._count -= cut
