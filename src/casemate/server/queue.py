"""The durable queue. Its state is the ledger's; this is only the loop that serves it.

One job at a time is prepared and reserved, ``config.workers`` run at once. What was left half done
goes first: by another boot, taken over at the start, or by witnesses, once they have answered; then
what is queued.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine
from contextlib import asynccontextmanager
from functools import partial
from typing import Any

from casemate.ledger import catalog, ledger, quotes
from casemate.ledger.ledger import Job
from casemate.server import records, release, run, states
from casemate.server.aside import Aside
from casemate.server.publish import FIRST_WAIT, LONGEST_WAIT
from casemate.server.run import Ticks
from casemate.server.service import Service
from casemate.server.throttle import Busy
from casemate.spec.data import Policy
from casemate.spec.errors import CasemateError
from casemate.spec.job import JobStatus

_WAITS = "The job waits for the cosignatures of witnesses that the owners' policies name."
_VISIBLE = {"reserved": "running", "committed": "running", "abandoned": "failed"}


class Queue:
    """Runs jobs and checks of datasets as tasks of one event loop."""

    def __init__(self, service: Service) -> None:
        self._service = service
        self._wake = asyncio.Event()
        self._slots = asyncio.Semaphore(service.config.workers)
        self._checks = asyncio.Semaphore(service.config.workers)
        self._prepares = asyncio.Semaphore(service.config.workers)
        self._waiting = 0
        self._running: dict[str, asyncio.Task[None]] = {}
        self._left: deque[str] = deque()  # half done: they go first
        self._draining = False
        self._hurried = asyncio.Event()
        self._aside = Aside(service.store, service.publisher, service.clock, self.wake)
        self._ticks: dict[str, Ticks] = {}
        self._checking: dict[str, asyncio.Task[None]] = {}
        self._again: dict[str, asyncio.Task[None]] = {}

    @asynccontextmanager
    async def serve(self) -> AsyncIterator[None]:
        """The queue's life: takes up what was left, ends all tasks when it closes."""
        for dataset in catalog.datasets(self._service.store):
            if dataset.state == "checking":
                self.check(dataset.id)
        self._sweep()
        release.sweep(self._service.disk, self._service.store)
        self._left.extend(job.id for job in ledger.unfinished(self._service.store))
        loops = [asyncio.create_task(self._loop()), asyncio.create_task(self._witnesses())]
        self.wake()
        try:
            yield
        finally:
            # What runs now is taken over by the next start.
            tasks = [*loops, *self._checking.values(), *self._running.values()]
            tasks += self._again.values()
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            await self._service.publisher.close()

    async def drain(self, seconds: float) -> None:
        """Start nothing more, and wait for what runs: so long at most, or until :meth:`hurry`.

        What is not charged yet stays queued; what is not over then is taken over by the next start.
        """
        self._draining = True
        for job, task in self._running.items():
            if ledger.job(self._service.store, job).state == "queued":
                task.cancel()
        if not self._running:
            return
        self._service.log.event("server", state="draining")
        over = asyncio.ensure_future(
            asyncio.gather(*self._running.values(), return_exceptions=True)
        )
        hurried = asyncio.ensure_future(self._hurried.wait())
        either: set[asyncio.Future[Any]] = {over, hurried}
        await asyncio.wait(either, timeout=seconds, return_when=asyncio.FIRST_COMPLETED)
        hurried.cancel()

    def hurry(self) -> None:
        """Wait no longer."""
        self._hurried.set()

    def wake(self) -> None:
        """Something may have been queued."""
        self._wake.set()

    def changed(self, policy: Policy) -> None:
        """An owner changed a dataset that has this policy now: the witnesses that it names see that
        soon, so that a rollback to before it stops the server."""
        self._aside.settle()
        if policy.witnesses:
            self._aside.show()

    def check(self, dataset: str) -> None:
        """Check a registered dataset, unless that is done or under way."""
        if dataset in self._checking:
            return
        if catalog.dataset(self._service.store, dataset).state == "checking":
            self._start(self._checking, dataset, self._check(dataset))

    @staticmethod
    def _start(
        tasks: dict[str, asyncio.Task[None]], name: str, work: Coroutine[Any, Any, None]
    ) -> asyncio.Task[None]:
        task = asyncio.create_task(work)
        tasks[name] = task
        task.add_done_callback(lambda _: tasks.pop(name, None))
        return task

    async def _check(self, dataset: str) -> None:
        async with self._checks:
            try:
                await run.check_dataset(self._service, dataset)
            except CasemateError as e:
                # Revoked while it waited, or the store has stopped: nothing to settle.
                self._service.log.event("dataset", dataset=dataset, code=e.code)
            except Exception as e:
                self._service.log.fault(e, dataset=dataset)

    @asynccontextmanager
    async def preparing(self) -> AsyncIterator[None]:
        """A place for a quote's worker; ``limit.quotes-waiting`` when too many wait for one."""
        if self._waiting >= self._service.config.limits.quotes_waiting:
            raise Busy(
                "limit.quotes-waiting",
                "Too many quotes are being made.",
                mend="Try again in a few seconds.",
                retry_after=5.0,
            )
        self._waiting += 1
        try:
            async with self._prepares:
                yield
        finally:
            self._waiting -= 1

    async def _loop(self) -> None:
        while self._service.broken is None:
            await self._wake.wait()
            self._wake.clear()
            try:
                while await self._next():
                    pass
            except Exception as e:
                self._service.log.fault(e)
                self._service.watch(e)

    async def _witnesses(self) -> None:
        while self._service.broken is None:
            try:
                await self._aside.serve()
            except Exception as e:
                self._service.log.fault(e)
                self._service.watch(e)
                await self._service.clock.sleep(FIRST_WAIT)

    def _first(self) -> Job | None:
        store = self._service.store
        if self._draining:
            return None
        for _ in range(len(self._left)):
            job = ledger.job(store, self._left.popleft())
            if job.state not in ("reserved", "committed"):
                continue
            if job.id in self._aside or (job.state == "reserved" and ledger.frozen(store, job.id)):
                self._left.append(job.id)  # until its witnesses, its owners; or it is cancelled
            else:
                return job
        return ledger.next_queued(store, self._aside.jobs())

    async def _serve(self, job: str, work: Callable[[], Awaitable[int | None]]) -> None:
        """Take a job to its end, or until it has to wait for witnesses."""
        try:
            sequence = await work()
        except Exception:
            self._start(self._again, job, self._later(job))
            raise
        if sequence is not None:
            self._left.append(job)
            self._aside.put(job, sequence)

    async def _later(self, job: str) -> None:
        """What met a fault half done is tried again, not at once."""
        await self._service.clock.sleep(LONGEST_WAIT)
        self._left.append(job)
        self.wake()

    async def _next(self) -> bool:
        """Start the job that waited longest; return when it no longer stands first."""
        await self._slots.acquire()
        job = None
        try:
            job = self._first()
        finally:
            if job is None:
                self._slots.release()
        if job is None:
            return False
        left = asyncio.Event()
        work: Callable[[], Awaitable[int | None]]
        if job.state == "committed":
            work = partial(run.release_job, self._service, job.id)
            left.set()
        else:
            tick = partial(self._tick, job.id)
            work = partial(run.execute, self._service, job.id, tick, left.set)
        task = self._start(self._running, job.id, self._serve(job.id, work))

        def ended(task: asyncio.Task[None]) -> None:
            if not task.cancelled() and (error := task.exception()) is not None:
                self._service.log.fault(error, job=job.id)
                self._service.watch(error)
            self._slots.release()
            self._ticks.pop(job.id, None)
            left.set()
            self._sweep()
            self.wake()

        task.add_done_callback(ended)
        await left.wait()
        return True

    def _sweep(self) -> None:
        """Remove the sealed models and the training states of jobs that have ended."""
        try:
            states.sweep(self._service.disk, self._service.store)
            for upload in records.spent_models(self._service.store):
                self._service.uploads.drop(upload)
        except CasemateError as e:
            self._service.watch(e)
        except OSError as e:  # the next start sweeps too
            self._service.log.fault(e)

    def _tick(self, job: str, ticks: Ticks) -> None:
        self._ticks[job] = ticks

    def _end(self, job: str, state: Any, code: str, message: str) -> None:
        self._aside.drop(job)
        ended = ledger.abandon(self._service.store, job, state, code, message)
        if ended.error == code:
            self._service.metrics.jobs.labels(ended.state).inc()
            self._service.log.event("job", job=job, state=ended.state, code=code)

    def cancel(self, job: str, state: str, code: str, message: str) -> None:
        """End a job now, whatever it is doing; its worker is killed. A charge stays.

        A scientist is not to wait for the worker's end: how long that takes would tell whether the
        run was over by now, at no public moment.
        """
        self._end(job, state, code, message)  # first, or it would stand first in the queue again
        if job in self._running:
            self._running[job].cancel()
        self._sweep()

    async def stop(self, job: str, state: str, code: str, message: str) -> None:
        """As :meth:`cancel`, and wait until its worker is no more."""
        task = self._running.get(job)
        self.cancel(job, state, code, message)
        if task is not None:
            await asyncio.gather(task, return_exceptions=True)

    async def stop_revoked(self, dataset: str) -> None:
        """End the jobs that run on a dataset whose key was destroyed."""
        for job in (*self._running, *self._aside.jobs()):
            used = quotes.get(
                self._service.store, ledger.job(self._service.store, job).quote
            ).quote.request.datasets
            if dataset in {use.dataset for use in used}:
                await self.stop(
                    job, "failed", "policy.revoked", "An owner revoked a dataset of this job."
                )

    def status(self, job: Job) -> JobStatus:
        """What may be seen of a job."""
        quote = quotes.get(self._service.store, job.quote).quote
        ticks = self._ticks.get(job.id)
        tick = quote.ticks if job.state == "done" else 0
        if job.state in ("reserved", "running", "committed") and ticks is not None:
            tick = ticks.tick(self._service.clock.monotonic())
        return JobStatus(
            job=job.id,
            state=_VISIBLE.get(job.state, job.state),  # type: ignore[arg-type]
            tick=tick,
            ticks=quote.ticks,
            quote_digest=job.quote,
            error=job.error,
            message=_WAITS if job.id in self._aside else job.message,
        )
