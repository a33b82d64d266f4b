"""Jobs that wait for witnesses: out of the queue's way, so that one owner's silent witness holds up
nobody else's jobs."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Collection

from casemate.ledger import ledger
from casemate.ledger.store import Store
from casemate.seams import Clock
from casemate.server.publish import Publisher


class Aside:
    """Which jobs wait, and for a cosignature over which entry of the log."""

    def __init__(
        self, store: Store, publisher: Publisher, clock: Clock, wake: Callable[[], None]
    ) -> None:
        self._store, self._publisher, self._clock, self._wake = store, publisher, clock, wake
        self._waits: dict[str, int] = {}
        self._put = asyncio.Event()

    def __contains__(self, job: str) -> bool:
        return job in self._waits

    def jobs(self) -> Collection[str]:
        return tuple(self._waits)

    def put(self, job: str, sequence: int) -> None:
        """Let a job wait until its witnesses have cosigned the log up to ``sequence``."""
        self._waits[job] = sequence
        self._put.set()

    def drop(self, job: str) -> None:
        """It has ended, and waits for nothing."""
        self._waits.pop(job, None)

    async def serve(self) -> None:
        """Ask for as long as a job waits; wake the queue for each that does no more.

        Raises ``LedgerError`` ``ledger.rolled-back``.
        """
        while True:
            if not self._waits:
                await self._put.wait()
            self._put.clear()
            await self._publisher.ask()
            for job, sequence in tuple(self._waits.items()):
                if ledger.witnessed(self._store, job, sequence):
                    self.drop(job)
                    self._wake()
            if self._waits:
                await self._rest()

    async def _rest(self) -> None:
        """Until a witness may be asked again, or another job waits."""
        tasks = [
            asyncio.ensure_future(self._clock.sleep(self._publisher.rest())),
            asyncio.ensure_future(self._put.wait()),
        ]
        try:
            await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for task in tasks:
                task.cancel()
