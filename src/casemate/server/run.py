"""One job, from its turn in the queue to its commit.

prepare (no data, no keys) -> reserve, durable -> witnesses -> keys -> run -> encrypt -> commit at a
public moment -> witnesses -> release.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import os
from collections.abc import Callable, Iterator
from functools import partial

from casemate.ledger import catalog, ledger, log, quotes
from casemate.ledger.quotes import StoredQuote
from casemate.plan.state import due as due_state
from casemate.plan.state import size as state_size
from casemate.server import release, states
from casemate.server.pool import Worker, WorkerGone, refusal
from casemate.server.prepared import check_locked, check_prepared
from casemate.server.service import Service
from casemate.spec.contest import scores
from casemate.spec.data import DatasetSchema
from casemate.spec.errors import CasemateError, JobError, PolicyError
from casemate.spec.job import Execution, JobRequest, Quote
from casemate.spec.messages import (
    CheckDataset,
    Checked,
    Done,
    Failed,
    GoOn,
    Locked,
    Prepare,
    Prepared,
    Resume,
    Run,
    State,
)

# Of prepare_seconds: what was begun by then has the rest to end in.
COMPILE_PART = 0.5


def worker_gone(gone: WorkerGone) -> JobError:
    """What is said of a worker that died before it saw a row."""
    reason = {
        "time": "The input took too long to look at.",
        "memory": "The input needs more memory than a worker may have.",
    }.get(gone.reason, "The worker that looks at the input has failed.")
    return JobError(
        "job.worker-failed", reason, mend="Send something smaller, or try again.", status=503
    )


async def tell(worker: Worker, message: object, *files: Callable[[], int]) -> None:
    """Send a message with the descriptors that ``files`` open, then close ours."""
    with contextlib.ExitStack() as stack:
        opened = []
        for file in files:
            opened.append(file())
            stack.callback(os.close, opened[-1])
        await worker.tell(message, opened)


async def prepare(
    service: Service,
    worker: Worker,
    request: JobRequest,
    schemas: tuple[DatasetSchema, ...],
    upload: str,
    model_key: bytes,
    quoted: Execution | None = None,
) -> Prepared:
    """Phases ``prepare`` and ``lock``. quoted: of a quote, if there is one. Raises the worker's
    refusal of the model, or ``JobError`` ``job.worker-failed``."""
    limits, threads = service.config.limits, service.config.threads
    message = Prepare(
        key=model_key,
        model_digest=request.model_digest,
        schemas=schemas,
        inputs=request.inputs,
        train=request.train,
        memory_bytes=service.config.worker_memory,
        threads=threads,
        compile_seconds=min(limits.compile_seconds, COMPILE_PART * limits.prepare_seconds),
        compiled=None if quoted is None else quoted.compiled,
        sandbox=service.config.sandbox,
        released=request.released,
        metrics=request.metrics if request.target else (),
        target=request.target,
        ways=() if quoted is None else quoted.ways,
    )
    try:
        await tell(worker, message, lambda: service.uploads.descriptor(upload))
        prepared: Prepared | Failed = await worker.expect(
            [Prepared, Failed], limits.prepare_seconds
        )
        if isinstance(prepared, Prepared):
            check_prepared(prepared, request.model_digest, service.config, request.train.runtime)
            locked: Locked | Failed = await worker.expect([Locked, Failed], limits.prepare_seconds)
            if isinstance(locked, Failed):
                raise refusal(locked, ("lock",))
            check_locked(locked, service.config.sandbox)
    except WorkerGone as e:
        raise worker_gone(e) from None
    if isinstance(prepared, Failed):
        raise refusal(prepared, ("prepare",))
    worker.prepared = prepared
    return prepared


def schemas_of(service: Service, request: JobRequest) -> tuple[DatasetSchema, ...]:
    """The schemas of a request's datasets, in its order."""
    return tuple(
        catalog.dataset(service.store, use.dataset).registration.schema for use in request.datasets
    )


async def check_dataset(service: Service, dataset: str) -> None:
    """Compare a pushed dataset with its schema, in a worker; settle it as ready or refused."""
    found = catalog.dataset(service.store, dataset)
    key = catalog.checking_key(service.store, dataset)
    message = CheckDataset(
        dataset=dataset, schema=found.registration.schema, key=key.key, salt=key.salt,
        sandbox=service.config.sandbox,
    )  # fmt: skip
    error: str | None = None
    try:
        async with service.pool.worker() as (worker, _):
            upload = found.registration.upload
            await tell(worker, message, lambda: service.uploads.descriptor(upload))
            seconds = service.config.limits.check_seconds
            answer: Checked | Failed = await worker.expect([Checked, Failed], seconds)
        if isinstance(answer, Failed):
            error = refusal(answer, ("check",)).code
        elif answer.dataset != dataset:
            error = "job.worker-failed"
    except WorkerGone as e:
        error = worker_gone(e).code
    settled = catalog.settle(service.store, dataset, error)
    service.log.event("dataset", dataset=dataset, state=settled.state)  # why: to its owner alone
    if settled.state in ("refused", "revoked"):
        await asyncio.to_thread(service.uploads.drop, settled.registration.upload)


class Ticks:
    """Public time: ``quote.ticks`` steps over the predicted seconds, nothing finer (P6).

    Progress is a matter of the clock alone; the end is not, since work on one row may take longer
    than on another, by a model made for that. So ends are shown at few :func:`moments`. An end says
    which of them was the first to come.
    """

    def __init__(self, quote: Quote, started: float) -> None:
        self.started = started
        self.ticks = max(1, quote.ticks)
        self.predicted = max(1e-3, quote.seconds)

    def tick(self, now: float) -> int:
        """Elapsed over predicted time, short of the end until the job has ended."""
        return min(self.ticks - 1, int((now - self.started) / self.predicted * self.ticks))

    def rest(self, now: float) -> float:
        """Seconds from ``now`` to the next tick."""
        each = self.predicted / self.ticks
        return each - (now - self.started) % each

    def wait(self, now: float) -> float:
        """Seconds from ``now`` to the next of :func:`moments` of the predicted time."""
        passed = (now - self.started) / self.predicted
        end = next(moment for moment in moments() if moment > passed)
        return self.started + end * self.predicted - now


def moments() -> Iterator[float]:
    """When an end may be shown, as parts of the predicted time: from a half to the whole in
    sixteenths of an octave, then at distances that double from a twentieth."""
    yield from (2 ** (k / 16 - 1) for k in range(17))
    yield from (1 + 0.05 * 2**k for k in itertools.count())


async def execute(
    service: Service,
    job: str,
    on_start: Callable[[Ticks], None],
    reserved: Callable[[], None],
) -> int | None:
    """Take a queued or a reserved job to its end; or to the entry of the log, returned, that its
    witnesses have still to cosign. Whatever happens, the ledger says how it ended.

    ``reserved`` is called once the charge is durable; ``on_start`` when public time begins.
    """
    store = service.store
    stored = quotes.get(store, ledger.job(store, job).quote)
    request = stored.quote.request
    ticks: Ticks | None = None
    try:
        async with service.pool.worker(stored.digest) as (worker, is_prepared):
            if not is_prepared:
                schemas = schemas_of(service, request)
                upload, key = stored.submission.upload, stored.model_key
                quoted = stored.quote.execution
                found = await prepare(service, worker, request, schemas, upload, key, quoted)
                _as_quoted(found, stored.quote)
            if (unseen := await _charge(service, job, reserved)) is not None:
                await service.pool.keep(stored.digest, worker)
                return unseen
            ticks = Ticks(stored.quote, service.clock.monotonic())
            on_start(ticks)
            weights = await _train(service, worker, stored, job, ticks)
        await _commit(service, stored, job, weights, ticks)
    except asyncio.CancelledError:
        raise
    except (CasemateError, WorkerGone) as e:
        error = worker_gone(e) if isinstance(e, WorkerGone) else e
        await _fail(service, job, ticks, *release.end(error, read=ticks is not None))
        if ticks is None and isinstance(e, WorkerGone):
            service.log.event("worker-end", job=job, state=e.reason)
    except Exception as e:
        await _fail(service, job, ticks, "job.failed", release.FAILED)
        service.log.fault(e, job=job)
    else:  # what is committed does not fail by what keeps it from being released
        return await release_job(service, job)
    return None


async def _charge(service: Service, job: str, reserved: Callable[[], None]) -> int | None:
    """Reserve a job that is not yet; the entry of the log that its witnesses have still to cosign
    before the next step."""
    store, publisher = service.store, service.publisher
    if ledger.job(store, job).reserved is None:  # also one that an owner's change has ended
        # Witnesses that cannot be reached keep a job waiting, not charged and waiting. What they
        # cosigned is asked below: a log that grows faster than they answer would starve it here.
        if not await publisher.witnessed(job, 0):
            return 0
        ledger.reserve(store, job)
    reserved()
    granted = ledger.job(store, job).granted
    assert granted is not None
    return None if await publisher.witnessed(job, granted) else granted


def _as_quoted(found: Prepared, quote: Quote) -> None:
    """Refuse, before anything is charged, where the plan does not fit what is there now, or the
    native step is another program."""
    execution = quote.execution
    now = found.path[0], found.microbatch, found.artifact
    if now != (execution.path, quote.plan.microbatch, execution.artifact):
        raise JobError(
            "job.stale-quote",
            "The engine takes another path through the model than when it was quoted.",
            mend="Ask for a new quote.",
        )


async def _train(
    service: Service, worker: Worker, stored: StoredQuote, job: str, ticks: Ticks
) -> memoryview:
    """Phase ``run``: keys and data go in, the weights' bytes come out; the worker is gone then."""
    quote, limits = stored.quote, service.config.limits
    every = states.every(quote, limits)
    with contextlib.ExitStack() as stack:
        result, state = (os.memfd_create(n, os.MFD_CLOEXEC) for n in ("result", "state"))
        stack.callback(os.close, result)
        stack.callback(os.close, state)
        datasets = ledger.begin(service.store, job)
        uploads = [catalog.dataset(service.store, d.dataset).registration.upload for d in datasets]
        files = [partial(service.uploads.descriptor, upload) for upload in uploads]
        left = states.newest(service, job)
        if left is not None:
            files.append(partial(states.descriptor, service, left))
        files.append(partial(os.dup, result))
        if every:
            files.append(partial(os.dup, state))
        message = Run(
            plan=quote.plan,
            execution=quote.execution,
            datasets=datasets,
            resume=None if left is None else Resume(key=left.key, step=left.step),
            state_steps=every,
        )
        await tell(worker, message, *files)
        done = await _states(service, worker, job, ticks, message, state)
        await worker.end()  # nobody writes the result any more
        if isinstance(done, Failed):
            raise WorkerGone("failed")
        prepared = worker.prepared
        assert prepared is not None
        if done.bytes != prepared.result_bytes:
            raise WorkerGone("result")
        weights = await asyncio.to_thread(_read, result, done.bytes)
        await asyncio.to_thread(release.check_result, weights, quote, prepared)
        return weights


async def _states(
    service: Service, worker: Worker, job: str, ticks: Ticks, run: Run, memory: int
) -> Done | Failed:
    """Keep each state of a run when it is due, at a public tick, while the worker works on the
    next; how the run ended, within its time."""
    clock, limits = service.clock, service.config.limits
    longest = min(limits.run_seconds, limits.run_floor + limits.run_factor * ticks.predicted)
    until = clock.monotonic() + longest
    after = 0 if run.resume is None else run.resume.step
    request, prepared = ledger.quote(service.store, job).request, worker.prepared
    assert prepared is not None
    size = state_size(request.train, prepared.dimension)
    while (due := due_state(run.plan.steps, run.state_steps, after)) is not None:
        found: State | Failed = await worker.expect([State, Failed], until - clock.monotonic())
        if isinstance(found, Failed):
            return found
        if (found.step, found.bytes) != (due, size):
            raise WorkerGone("protocol")
        data = await asyncio.to_thread(_read, memory, size)
        await worker.tell(GoOn(step=due))
        await clock.sleep(ticks.rest(clock.monotonic()))
        await asyncio.to_thread(states.keep, service, job, due, data)
        after = due
    return await worker.expect([Done, Failed], until - clock.monotonic())


def _read(fd: int, count: int) -> memoryview:
    """So many bytes of a file from its beginning, held once, however long it is."""
    data = memoryview(bytearray(count))
    at = 0
    while at < count:
        got = os.preadv(fd, [data[at:]], at)
        if not got:
            raise WorkerGone("result")
        at += got
    return data.toreadonly()


async def _commit(
    service: Service, stored: StoredQuote, job: str, weights: memoryview, ticks: Ticks
) -> None:
    """Encrypt the result, wait for the next public moment (:class:`Ticks`), then the one commit."""
    store = service.store
    request = stored.quote.request
    await asyncio.to_thread(release.check_guarantee, stored.quote)
    path, digest, key = await asyncio.to_thread(
        release.seal_result, service.disk, service.rng, job, weights
    )
    scored = scores(request.metrics, weights) if request.target else ()
    await service.clock.sleep(ticks.wait(service.clock.monotonic()))
    units = {
        use.dataset: schema.units
        for use, schema in zip(request.datasets, schemas_of(service, request), strict=True)
    }
    simulated = service.boot_attestation.evidence.simulated
    envelope = release.receipt(
        store, service.keys, simulated, stored, units=units, result_digest=digest, scores=scored
    )
    ledger.commit(store, job, result_digest=digest, blob=path, result_key=key, envelope=envelope)


async def release_job(service: Service, job: str) -> int | None:
    """Let a committed job's result and receipt out; the entry of its commit, where its owners'
    witnesses have still to cosign that."""
    store = service.store
    ended = ledger.job(store, job).ended
    assert ended is not None

    def cosigned() -> int | None:
        return ledger.cosigned_at(store, job, ended)

    if not await service.publisher.witnessed(job, ended):
        return ended
    try:
        sealed = await asyncio.to_thread(
            release.seal_key, store, job, catalog.identity(store, ledger.job(store, job).scientist)
        )
        if (size := cosigned()) is None:
            # All of the same head, for the receipt's sake.
            await service.publisher.until(lambda: cosigned() is not None)
            size = cosigned()
        ledger.release(store, job, log.sign(store, size), sealed)
    except PolicyError as e:
        ledger.abandon(store, job, "failed", e.code, e.message)
    state = ledger.job(store, job).state
    service.metrics.jobs.labels(state).inc()
    service.log.event("job", job=job, state=state)
    return None


async def _fail(service: Service, job: str, ticks: Ticks | None, code: str, message: str) -> None:
    """End a job without a result; at a public moment once it has read rows."""
    if ticks is not None:
        await service.clock.sleep(ticks.wait(service.clock.monotonic()))
    ended = ledger.abandon(service.store, job, "failed", code, message)
    service.metrics.jobs.labels(ended.state).inc()
    service.log.event("job", job=job, state=ended.state, code=code)
