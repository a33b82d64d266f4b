"""Witnesses: the log's head goes to them, their cosignatures come back (C2SP tlog-witness).

Where a witness can be reached is the operator's word; which keys count is the owners', in their
policies. So whatever comes back is checked by key, and a lie on the way costs time only. A witness
that knows more of this log than the store holds has seen it before a rollback: the server stops.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Final

from casemate.ledger import catalog, ledger, log
from casemate.ledger.store import Store
from casemate.seal import checkpoint, note
from casemate.seal.checkpoint import Request
from casemate.seal.note import Note
from casemate.seams import Clock, Net, Unreachable
from casemate.server.logs import Log
from casemate.spec import merkle
from casemate.spec.errors import CasemateError, LedgerError

ASK_SECONDS: Final = 10.0
FIRST_WAIT: Final = 0.5
LONGEST_WAIT: Final = 60.0


def _rolled_back(message: str) -> LedgerError:
    return LedgerError(
        "ledger.rolled-back",
        message,
        mend="Start from the newest state, or let the owners consent to a recovery.",
    )


class Publisher:
    """One server's witnesses at ``urls`` (each a submission prefix)."""

    def __init__(
        self, store: Store, net: Net, clock: Clock, events: Log, urls: Sequence[str]
    ) -> None:
        self._store, self._net, self._clock, self._events = store, net, clock, events
        self._known = dict.fromkeys((url.rstrip("/") for url in urls), 0)
        self._lock = asyncio.Lock()

    def checkpoint(self) -> Note:
        """The log's newest head, signed."""
        return log.sign(self._store)

    async def ask(self) -> None:
        """Ask each witness once to cosign the newest head; one that cannot be reached is passed
        over. Raises ``LedgerError`` ``ledger.rolled-back``."""
        async with self._lock:
            await asyncio.gather(*(self._ask(url) for url in self._known))

    async def witnessed(self, job: str, sequence: int) -> None:
        """Return once enough witnesses of a job's datasets cosigned the log up to ``sequence``."""
        wait = FIRST_WAIT
        while not ledger.witnessed(self._store, job, sequence):
            await self.ask()
            if not ledger.witnessed(self._store, job, sequence):
                self._events.event("witness", job=job, state="waiting")
                await self._clock.sleep(wait)
                wait = min(2 * wait, LONGEST_WAIT)

    async def _ask(self, url: str) -> None:
        signed = self.checkpoint()
        now = checkpoint.read(signed.text)
        for _ in range(2):  # a second time from the size that the witness says it knows
            old = self._known[url]
            proof = merkle.consistency(old, now.size, self._store.node)
            body = str(Request(old, proof, signed)).encode()
            try:
                status, answer = await self._net.post(
                    f"{url}/add-checkpoint", body, seconds=ASK_SECONDS
                )
            except Unreachable:
                self._events.event("witness", state="unreachable")
                return
            self._events.event("witness", status=status, count=now.size)
            if status == 200:
                self._known[url] = now.size
                self._keep(signed, answer)
                return
            if status == 422 or (status == 409 and answer == b"%d\n" % old and old == now.size):
                raise _rolled_back(
                    f"A witness has seen another log than this one at {old} entries: the state was"
                    " forked."
                )
            if status != 409:
                return
            self._known[url] = self._size(answer, now.size)

    def _size(self, answer: bytes, mine: int) -> int:
        """The size in a conflict's answer; our own state must hold as much."""
        text = answer.decode("ascii", "replace").removesuffix("\n")
        if not (text.isascii() and text.isdecimal() and len(text) <= 16):
            return 0
        if int(text) > mine:
            raise _rolled_back(
                f"A witness has seen {text} entries of this log, which has {mine} here: the state"
                " is an older copy."
            )
        return int(text)

    def _keep(self, signed: Note, answer: bytes) -> None:
        """Each line of a key that a policy names, if it verifies."""
        known = {(v.name, v.id): v for v in note.witnesses(catalog.witnesses(self._store))}
        try:
            lines = note.lines(answer.decode("utf-8"))
        except (CasemateError, UnicodeDecodeError):
            return
        for line in lines:
            by = known.get((line.name, line.id))
            if by is None:
                continue
            try:
                log.cosign(self._store, signed.add([line]), [by])
            except CasemateError as e:
                self._events.event("witness", code=e.code)
