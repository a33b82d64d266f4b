"""Jobs that wait for witnesses, out of the queue's way, and changes by owners, which witnesses are
to see soon. Each witness is asked by a task of its own, so that one owner's silent witness holds up
nobody else's jobs."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Collection

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
        self._owed = 0  # so much of the log is to be shown
        self._pokes = {url: asyncio.Event() for url in publisher.urls}

    def __contains__(self, job: str) -> bool:
        return job in self._waits

    def jobs(self) -> Collection[str]:
        return tuple(self._waits)

    def put(self, job: str, sequence: int) -> None:
        """Let a job wait until its witnesses have cosigned the log up to ``sequence``."""
        self._waits[job] = sequence
        self.settle()  # they may have answered meanwhile
        self._poke()

    def drop(self, job: str) -> None:
        """It has ended, and waits for nothing."""
        self._waits.pop(job, None)

    def show(self) -> None:
        """Let the witnesses see the log as it is now."""
        self._owed = self._store.size()
        self._poke()

    def settle(self) -> None:
        """Wake the queue for each job that waits no more."""
        for job, sequence in tuple(self._waits.items()):
            if self._publisher.cosigned(job, sequence):
                self.drop(job)
                self._wake()

    async def serve(self) -> None:
        """Ask each witness at the start, and for as long as a job waits or it has not seen what an
        owner changed. Raises ``LedgerError`` ``ledger.rolled-back``."""
        tasks = [asyncio.create_task(self._ask(*each)) for each in self._pokes.items()]
        try:
            await asyncio.gather(asyncio.Event().wait(), *tasks)
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    def _poke(self) -> None:
        for poke in self._pokes.values():
            poke.set()

    async def _ask(self, url: str, poke: asyncio.Event) -> None:
        while True:
            poke.clear()
            await self._publisher.turn(url)
            self.settle()
            if self._waits or self._publisher.shown(url) < self._owed:
                await self._rest(url, poke)
            else:
                await poke.wait()

    async def _rest(self, url: str, poke: asyncio.Event) -> None:
        """Until the witness may be asked again, or there is something new to ask."""
        tasks = [
            asyncio.ensure_future(self._clock.sleep(self._publisher.rest(url))),
            asyncio.ensure_future(poke.wait()),
        ]
        try:
            await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for task in tasks:
                task.cancel()
