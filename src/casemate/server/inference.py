"""Workers that hold deployed models, and the calls that wait for them.

A model has one worker, prepared once and warm while it is called; of the models that are loaded the
one that was called longest ago makes room for another. A worker answers one pass at a time: the
callers that wait take turns, so that one who calls more often waits longer, not the others. Calls
share a pass only where the deployer asked for slots and the worker found that it may
(``engine.predict.Forward.share``).
"""

from __future__ import annotations

import asyncio
import contextlib
from collections import OrderedDict, deque
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Final

from casemate.ledger import models
from casemate.ledger.models import Model
from casemate.seal import stream
from casemate.seal.calls import Opened
from casemate.server.pool import Worker, WorkerGone, refusal
from casemate.server.prepared import check_locked
from casemate.server.run import tell, worker_gone
from casemate.server.throttle import Busy
from casemate.spec import messages
from casemate.spec.errors import CasemateError, JobError, LimitError
from casemate.spec.messages import Failed, Locked, Predict, Predicted, Serve, Serving
from casemate.spec.serving import Deployment, ServePolicy, answer_size

if TYPE_CHECKING:
    from casemate.server.service import Service

# Of the time that a call may take: how much more the kernel gives the worker.
_ALARM: Final = 2
_GONE: Final = "The worker that holds the model has failed."


@dataclass(eq=False, slots=True)
class Waiting:
    """A call that waits for its answer."""

    caller: str
    opened: Opened = field(repr=False)
    done: asyncio.Future[bytes] = field(repr=False)


class Host:
    """One loaded model: its worker's task, and who waits, by caller in turn."""

    def __init__(self, policy: ServePolicy) -> None:
        self.policy = policy
        self.ready: asyncio.Future[Serving] = asyncio.get_running_loop().create_future()
        self.task: asyncio.Task[None] | None = None
        self.closed = False
        self.busy = False
        self._turns: OrderedDict[str, deque[Waiting]] = OrderedDict()
        self._calls: dict[str, int] = {}
        self._wake = asyncio.Event()

    @property
    def idle(self) -> bool:
        """Whether nobody waits, and nothing is run or prepared."""
        return not self._calls and self.ready.done()

    def calls(self, caller: str | None = None) -> int:
        """How many calls wait or run, of one caller or of all."""
        return sum(self._calls.values()) if caller is None else self._calls.get(caller, 0)

    @contextlib.contextmanager
    def counted(self, caller: str) -> Iterator[None]:
        """One more call of this caller, while it lasts."""
        self._calls[caller] = self.calls(caller) + 1
        try:
            yield
        finally:
            self._calls[caller] -= 1
            if not self._calls[caller]:
                del self._calls[caller]

    def put(self, waiting: Waiting) -> None:
        self._turns.setdefault(waiting.caller, deque()).append(waiting)
        self._wake.set()

    async def next(self, slots: int) -> list[Waiting]:
        """The next caller's oldest call, and of others as many as the slots of one pass hold."""
        while True:
            taken: list[Waiting] = []
            room = slots
            for caller in list(self._turns):
                first = self._turns[caller][0]
                if taken and first.opened.records > room:
                    continue
                room -= first.opened.records
                taken.append(self._turns[caller].popleft())
                if self._turns[caller]:
                    self._turns.move_to_end(caller)
                else:
                    del self._turns[caller]
                if room <= 0 or slots == 1:
                    break
            if taken:
                return taken
            self._wake.clear()
            await self._wake.wait()

    def fail(self, error: Exception) -> None:
        """Nobody waits any more."""
        self.closed = True
        if not self.ready.done():
            self.ready.set_exception(error)
        for turn in self._turns.values():
            for waiting in turn:
                if not waiting.done.done():
                    waiting.done.set_exception(error)
        self._turns.clear()


class Inference:
    """The loaded models, the oldest call first."""

    def __init__(self, service: Service) -> None:
        self._service = service
        self._hosts: OrderedDict[str, Host] = OrderedDict()
        self._counted: dict[tuple[str, str], int] = {}

    # Calls.

    async def call(self, model: Model, caller: str, opened: Opened) -> bytes:
        """The sealed answer to a call that was let in. Raises ``Busy`` ``limit.calls``,
        ``limit.models-busy``; ``policy.calls``; ``job.worker-failed``."""
        limits = self._service.config.limits
        host = self._hosts.get(model.id)
        if host is None:
            host = self._start(model.deployment, model.key, model.policy)
        self._hosts.move_to_end(model.id)
        if host.calls(caller) >= model.policy.at_once or host.calls() >= limits.model_calls:
            raise Busy(
                "limit.calls",
                f"Too many calls wait or run, {host.calls(caller)} of them yours.",
                mend=f"Call again later; a caller may have {model.policy.at_once} at once.",
            )
        with host.counted(caller):
            self._count(model, caller)
            try:
                await asyncio.shield(host.ready)
            except CasemateError:  # what is wrong with a model is its owner's to know
                raise _failed() from None
            waiting = Waiting(caller, opened, asyncio.get_running_loop().create_future())
            host.put(waiting)
            if host.closed:
                raise _failed()
            return await waiting.done

    def _count(self, model: Model, caller: str) -> None:
        if model.policy.calls is None:
            return
        key = (model.id, caller)
        if not self._counted.get(key):
            self._counted[key] = models.count(self._service.store, model.id, caller)
        self._counted[key] -= 1

    def left(self, model: Model, caller: str) -> int | None:
        """Calls that a caller has left in this epoch, ``None`` where they are not counted."""
        if model.policy.calls is None:
            return None
        taken = models.used(self._service.store, model.id, caller)
        return model.policy.calls - taken + self._counted.get((model.id, caller), 0)

    # Workers.

    @contextlib.asynccontextmanager
    async def prepared(
        self, deployment: Deployment, key: bytes, policy: ServePolicy
    ) -> AsyncIterator[Serving]:
        """Load a model under a policy that is not stored yet; it stays loaded unless the body
        raises. Raises the worker's refusal; ``limit.models-busy``."""
        host = self._start(deployment, key, policy)
        try:
            yield await asyncio.shield(host.ready)
        except BaseException:
            if self._hosts.get(deployment.model) is host:
                await self.drop(deployment.model)
            raise

    def forget(self, model: str) -> None:
        """What is left of blocks of calls counts no more: the epoch is another, or all is over."""
        for key in [k for k in self._counted if k[0] == model]:
            del self._counted[key]

    async def drop(self, model: str) -> None:
        """End a model's worker."""
        if (ending := self._stop(model)) is not None:
            await asyncio.wait([ending])

    async def close(self) -> None:
        for model in list(self._hosts):
            await self.drop(model)

    def _stop(self, model: str) -> asyncio.Task[None] | None:
        """Begin to end a model's worker; who waits for it hears of it at once."""
        host = self._hosts.pop(model, None)
        if host is None or host.task is None:
            return None
        host.task.cancel()
        host.fail(_failed())
        return host.task

    def _start(self, deployment: Deployment, key: bytes, policy: ServePolicy) -> Host:
        """A host whose worker begins to prepare, in the place of the model's own or, where there
        are as many as may be, of an idle one. It never waits, so that what the caller has read of
        the store still holds. Raises ``Busy`` ``limit.models-busy``."""
        model = place = deployment.model
        if model not in self._hosts and len(self._hosts) >= self._service.config.models:
            idle = next((name for name, host in self._hosts.items() if host.idle), None)
            if idle is None:
                raise Busy(
                    "limit.models-busy",
                    "All models that can be loaded at once are being called.",
                    mend="Try again in a few seconds.",
                    retry_after=2.0,
                )
            place = idle
        before = self._stop(place)
        host = self._hosts[model] = Host(policy)
        host.ready.add_done_callback(lambda f: f.cancelled() or f.exception())
        host.task = asyncio.create_task(self._live(host, deployment, key, before))
        return host

    async def _live(
        self, host: Host, deployment: Deployment, key: bytes, before: asyncio.Task[None] | None
    ) -> None:
        """A worker's life: prepare, lock, then answer until it is dropped or fails. ``before``:
        whose memory it takes."""
        model = deployment.model
        error: Exception = _failed()
        try:
            if before is not None:
                await asyncio.wait([before])
            async with self._service.pool.worker(prompt=True) as (worker, _):
                try:
                    serving = await self._prepare(worker, host, deployment, key)
                    host.ready.set_result(serving)
                    self._service.log.event("model", model=model, state="loaded")
                    while True:
                        taken = await host.next(serving.slots)
                        await self._answer(worker, serving, taken)
                finally:  # before anyone hears of it: the next call is for another worker
                    self._remove(model, host)
        except WorkerGone as e:
            error = worker_gone(e) if not host.ready.done() else _failed()
            self._service.log.event("worker-end", model=model, state=e.reason)
        except Exception as e:
            if not host.ready.done():
                error = e
            else:
                self._service.log.fault(e, model=model)
        finally:
            self._remove(model, host)
            host.fail(error)

    def _remove(self, model: str, host: Host) -> None:
        host.closed = True
        if self._hosts.get(model) is host:
            del self._hosts[model]

    async def _prepare(
        self, worker: Worker, host: Host, deployment: Deployment, key: bytes
    ) -> Serving:
        config = self._service.config
        message = Serve(
            key=key,
            model_digest=deployment.model_digest,
            records=host.policy.records,
            slots=host.policy.slots,
            memory_bytes=config.worker_memory,
            threads=config.threads,
            call_seconds=max(1, round(_ALARM * config.limits.call_seconds)),
            sandbox=config.sandbox,
        )
        seconds = config.limits.prepare_seconds
        await tell(worker, message, partial(self._service.uploads.descriptor, deployment.upload))
        found: Serving | Failed = await worker.expect([Serving, Failed], seconds)
        if isinstance(found, Failed):
            raise refusal(found, ("prepare",))
        locked: Locked | Failed = await worker.expect([Locked, Failed], seconds)
        if isinstance(locked, Failed):
            raise refusal(locked, ("lock",))
        check_locked(locked, config.sandbox)
        slots = (1, host.policy.slots)
        if found.model_digest != deployment.model_digest or found.slots not in slots:
            raise WorkerGone("protocol")
        size = answer_size(found.outputs, host.policy.records)
        if size > config.limits.answer_bytes:
            raise LimitError(
                "limit.answer-size",
                f"An answer to {host.policy.records} records would have {size} bytes;"
                f" {config.limits.answer_bytes} are admitted.",
                mend="Deploy with fewer records in a call, or with smaller outputs.",
            )
        return found

    async def _answer(self, worker: Worker, serving: Serving, taken: list[Waiting]) -> None:
        """One pass. A worker that breaks its form, or takes too long, is ended with its calls."""
        seconds = self._service.config.limits.call_seconds
        asked = [w.opened for w in taken]
        calls = tuple(
            messages.Call(keys=o.keys, records=o.records, size=len(o.sealed)) for o in asked
        )
        try:
            await worker.tell(Predict(calls=calls), payload=[o.sealed for o in asked])
            sizes = [stream.sealed_size(answer_size(serving.outputs, o.records)) for o in asked]
            found: Predicted | Failed = await worker.expect([Predicted, Failed], seconds)
            if isinstance(found, Failed) or found.calls != len(taken):
                raise WorkerGone("failed")
            for waiting, size in zip(taken, sizes, strict=True):
                answer = await worker.octets(size, seconds)
                if not waiting.done.done():
                    waiting.done.set_result(answer)
        finally:
            for waiting in taken:
                if not waiting.done.done():
                    waiting.done.set_exception(_failed())


def _failed() -> JobError:
    return JobError(
        "job.worker-failed",
        _GONE,
        mend="Call again; if it fails again, tell the owner.",
        status=503,
    )
