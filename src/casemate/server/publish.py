"""Witnesses: the log's head goes to them, their cosignatures come back (C2SP tlog-witness).

Where a witness can be reached is the operator's word; which keys count is the owners', in their
policies. So whatever comes back is checked by key, and a lie on the way costs time only. A witness
that shows a checkpoint of this log that the store does not extend has seen it before a rollback, or
another copy of it: the server stops.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final
from urllib.parse import quote

from casemate.ledger import catalog, ledger, log
from casemate.ledger.store import Store
from casemate.seal import checkpoint, note
from casemate.seal.checkpoint import Request
from casemate.seal.note import Note
from casemate.seams import Clock, Net, Unreachable
from casemate.server.logs import Log
from casemate.server.metrics import Metrics
from casemate.spec import merkle
from casemate.spec.errors import CasemateError, LedgerError

ASK_SECONDS: Final = 10.0
FIRST_WAIT: Final = 0.5
LONGEST_WAIT: Final = 60.0


@dataclass(frozen=True, slots=True)
class _Rest:
    """How long a witness is left alone, and until when on the monotonic clock."""

    seconds: float
    until: float


class Publisher:
    """One server's witnesses at ``urls`` (each a submission prefix)."""

    def __init__(
        self,
        store: Store,
        net: Net,
        clock: Clock,
        events: Log,
        metrics: Metrics,
        urls: Sequence[str],
    ) -> None:
        self._store, self._net, self._clock, self._events = store, net, clock, events
        self._metrics = metrics
        self._known = dict.fromkeys((url.rstrip("/") for url in urls), 0)
        self._rests: dict[str, _Rest] = {}
        self._lock = asyncio.Lock()

    def checkpoint(self) -> Note:
        """The log's newest head, signed."""
        self._metrics.log.set(self._store.size())
        return log.sign(self._store)

    async def ask(self) -> None:
        """Ask each witness once to cosign the newest head; one that cannot be reached, or did not
        cosign a moment ago, is passed over. Raises ``LedgerError`` ``ledger.rolled-back``."""
        async with self._lock:
            now = self._clock.monotonic()
            due = [u for u in self._known if u not in self._rests or self._rests[u].until <= now]
            if due:
                signed = self.checkpoint()
                await asyncio.gather(*(self._once(url, signed) for url in due))

    def rest(self) -> float:
        """Seconds until a witness that was passed over is asked again."""
        if not self._rests:
            return LONGEST_WAIT
        return max(0.0, min(r.until for r in self._rests.values()) - self._clock.monotonic())

    async def witnessed(self, job: str, sequence: int) -> bool:
        """Whether enough witnesses of a job's datasets cosigned the log up to ``sequence``, asked
        once if they have not."""
        if not ledger.witnessed(self._store, job, sequence):
            await self.ask()
        if found := ledger.witnessed(self._store, job, sequence):
            return found
        self._events.event("witness", job=job, state="waiting")
        return False

    async def _once(self, url: str, signed: Note) -> None:
        if await self._ask(url, signed):
            self._rests.pop(url, None)
            return
        last = self._rests.get(url)
        wait = FIRST_WAIT if last is None else min(2 * last.seconds, LONGEST_WAIT)
        self._rests[url] = _Rest(wait, self._clock.monotonic() + wait)

    async def _ask(self, url: str, signed: Note) -> bool:
        """Whether it cosigned."""
        now = checkpoint.read(signed.text)
        for _ in range(2):  # a second time from the size that the witness says it knows
            old = self._known[url]
            proof = merkle.consistency(old, now.size, self._store.node)
            status, answer = await self._send(
                f"{url}/add-checkpoint", str(Request(old, proof, signed)).encode()
            )
            if status == 200:
                self._known[url] = now.size
                return self._keep(signed, answer)
            size = _size(answer) if status == 409 else None
            if status == 422 or (size is not None and (size > now.size or size == old)):
                await self._newer(url, now.origin)
                return False
            if size is None:
                return False
            self._known[url] = size
        return False

    async def _send(self, url: str, body: bytes | None) -> tuple[int, bytes]:
        try:
            status, answer = await self._net.ask(url, body, seconds=ASK_SECONDS)
        except Unreachable:
            self._events.event("witness", state="unreachable")
            self._metrics.witnesses.labels("none").inc()
            return 0, b""
        self._events.event("witness", status=status)
        self._metrics.witnesses.labels(str(status)).inc()
        return status, answer

    async def _newer(self, url: str, origin: str) -> None:
        """The witness says that it knows another tree. Its word is not signed, so it costs the
        cosignature alone; the checkpoint that it cosigned is, by this log."""
        status, answer = await self._send(f"{url}/checkpoint/{quote(origin, safe='')}", None)
        try:
            if status == 200:
                log.check(self._store, note.parse(answer))
        except LedgerError:
            raise
        except CasemateError as e:
            self._events.event("witness", code=e.code)

    def _keep(self, signed: Note, answer: bytes) -> bool:
        """Each line of a key that a policy names, if it verifies; whether all were understood."""
        known = tuple(map(note.verifier, catalog.witnesses(self._store)))
        try:
            lines = note.lines(answer.decode("utf-8"))
        except (CasemateError, UnicodeDecodeError):
            return False
        kept = True
        for line in lines:
            try:
                log.cosign(self._store, signed.add([line]), known)
            except CasemateError as e:
                self._events.event("witness", code=e.code)
                kept = False
        return kept


def _size(answer: bytes) -> int | None:
    """The size in a conflict's answer."""
    text = answer.decode("ascii", "replace").removesuffix("\n")
    return int(text) if text.isdecimal() and text.isascii() and len(text) <= 16 else None
