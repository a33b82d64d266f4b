"""Witnesses: the log's head goes to them, their cosignatures come back (C2SP tlog-witness).

Where a witness can be reached is the operator's word; which keys count is the owners', in their
policies. So whatever comes back is checked by key, and a lie on the way costs time only. A witness
that shows a checkpoint of this log that the store does not extend has seen it before a rollback, or
another copy of it: the server stops.

Each witness is asked by itself, so that a slow or silent one holds up nothing that the others
suffice for.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from contextlib import suppress
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
# How long a job waits for its witnesses' answers before it stands aside, by the event loop's clock.
PATIENCE: Final = 1.0
# A job is charged only where its witnesses answered so lately; more than the time between two asks.
FRESH: Final = 120.0
FIRST_WAIT: Final = 0.5
LONGEST_WAIT: Final = 60.0


@dataclass(frozen=True, slots=True)
class _Rest:
    """How long a witness is left alone, and until when on the monotonic clock."""

    seconds: float
    until: float


@dataclass(frozen=True, slots=True)
class _Heard:
    """When a witness was asked last, and the keys that cosigned then."""

    at: float
    keys: frozenset[str]


class Publisher:
    """One server's witnesses at ``urls`` (each a submission prefix).

    ``failed`` hears of the errors (``ledger.rolled-back``) of those that nobody waits for any more.
    """

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
        self._shown = dict.fromkeys(self._known, -1)  # the size of the head that each cosigned
        self._heard = dict.fromkeys(self._known, _Heard(-FRESH, frozenset()))
        self._rests: dict[str, _Rest] = {}
        self._locks = {url: asyncio.Lock() for url in self._known}
        self._asked: set[asyncio.Task[None]] = set()
        self.failed: Callable[[BaseException], None] = lambda _: None

    @property
    def urls(self) -> tuple[str, ...]:
        return tuple(self._known)

    def checkpoint(self) -> Note:
        """The log's newest head, signed."""
        self._metrics.log.set(self._store.size())
        return log.sign(self._store)

    async def ask(self) -> None:
        """Ask all witnesses, and wait for each. Raises ``LedgerError`` ``ledger.rolled-back``."""
        asked = [self._begin(url) for url in self.urls]
        if asked:
            await asyncio.wait(asked)
        for task in asked:
            task.result()

    async def until(self, holds: Callable[[], bool]) -> bool:
        """Ask all witnesses until ``holds``, for a moment at most; what that was then. Those that
        are slower are not waited for, and their answers are kept all the same."""
        left = set() if holds() else {self._begin(url) for url in self.urls}
        with suppress(TimeoutError):
            async with asyncio.timeout(PATIENCE):
                while left and not holds():
                    _, left = await asyncio.wait(left, return_when=asyncio.FIRST_COMPLETED)
        return holds()

    async def witnessed(self, job: str, sequence: int) -> bool:
        """As :meth:`cosigned`; they are asked once if they have not."""
        if await self.until(lambda: self.cosigned(job, sequence)):
            return True
        self._events.event("witness", job=job, state="waiting")
        return False

    def cosigned(self, job: str, sequence: int) -> bool:
        """Whether enough witnesses of a job's datasets cosigned the log up to ``sequence``; and
        answered lately, before the job is charged: it should wait for silent ones free."""
        if not ledger.witnessed(self._store, job, sequence):
            return False
        if ledger.job(self._store, job).reserved is not None:
            return True
        since = self._clock.monotonic() - FRESH
        lately = {key for heard in self._heard.values() if heard.at > since for key in heard.keys}
        needed = ledger.witnesses(self._store, job)
        return all(len(lately.intersection(keys)) >= k for keys, k in needed)

    async def turn(self, url: str) -> None:
        """Ask one witness once to cosign the newest head, unless it has lately, or did not a moment
        ago. Raises ``LedgerError`` ``ledger.rolled-back``."""
        async with self._locks[url]:
            last, now = self._rests.get(url), self._clock.monotonic()
            if last is not None and last.until > now:
                return
            heard = self._heard[url]
            if self._shown[url] == self._store.size() and now < heard.at + FRESH / 2:
                return
            try:
                done = await self._ask(url, self.checkpoint())
            except LedgerError:
                raise
            except Exception as e:  # a fault over what it said costs its cosignature alone
                self._events.fault(e)
                done = False
            if done:
                self._rests.pop(url, None)
                return
            if self._heard[url] is heard:  # nothing that it said counts
                self._heard[url] = _Heard(now, frozenset())
            wait = FIRST_WAIT if last is None else min(2 * last.seconds, LONGEST_WAIT)
            self._rests[url] = _Rest(wait, self._clock.monotonic() + wait)

    def shown(self, url: str) -> int:
        """How much of the log a witness has cosigned since this start; -1 for nothing."""
        return self._shown[url]

    def rest(self, url: str) -> float:
        """Seconds until a witness that did not cosign is asked again."""
        if url not in self._rests:
            return LONGEST_WAIT
        return max(0.0, self._rests[url].until - self._clock.monotonic())

    async def close(self) -> None:
        """Ask nobody any more."""
        asked = tuple(self._asked)
        for task in asked:
            task.cancel()
        await asyncio.gather(*asked, return_exceptions=True)

    def _begin(self, url: str) -> asyncio.Task[None]:
        task = asyncio.create_task(self.turn(url))
        self._asked.add(task)
        task.add_done_callback(self._ended)
        return task

    def _ended(self, task: asyncio.Task[None]) -> None:
        self._asked.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None:
            self._events.fault(error)
            self.failed(error)

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
                if not self._keep(url, signed, answer):
                    return False
                self._shown[url] = now.size
                return True
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
        cosignature alone; the checkpoint that it cosigned is, by this log. One that the owners went
        back behind at a recovery costs the cosignature too: anybody may have kept it."""
        status, answer = await self._send(f"{url}/checkpoint/{quote(origin, safe='')}", None)
        try:
            if status == 200:
                log.check(self._store, note.parse(answer))
        except CasemateError as e:
            if isinstance(e, LedgerError) and e.code != "ledger.recovered":
                raise
            self._events.event("witness", code=e.code)

    def _keep(self, url: str, signed: Note, answer: bytes) -> bool:
        """Each line of a key that a policy names, if it verifies; whether all were understood."""
        known = tuple(map(note.verifier, catalog.witnesses(self._store)))
        try:
            lines = note.lines(answer.decode("utf-8"))
        except (CasemateError, UnicodeDecodeError):
            return False
        kept, said = True, set[str]()
        for line in lines:
            try:
                log.cosign(self._store, signed.add([line]), known)
                said |= {str(key) for key in known if (key.name, key.id) == (line.name, line.id)}
            except CasemateError as e:
                self._events.event("witness", code=e.code)
                kept = False
        self._heard[url] = _Heard(self._clock.monotonic(), frozenset(said))
        return kept


def _size(answer: bytes) -> int | None:
    """The size in a conflict's answer."""
    text = answer.decode("ascii", "replace").removesuffix("\n")
    return int(text) if text.isdecimal() and text.isascii() and len(text) <= 16 else None
