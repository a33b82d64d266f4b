"""Quotes and approvals: what a job would cost, and the owners' word on it."""

from __future__ import annotations

import asyncio

from casemate.accounting.filters import RdpFilter
from casemate.ledger import admission, catalog, quotes
from casemate.plan.check import check_request
from casemate.plan.compile import compile_plan
from casemate.plan.quote import DatasetState, quote
from casemate.server import permissions, records, run
from casemate.server.pool import WorkerGone
from casemate.server.service import Call, Service
from casemate.spec import codec
from casemate.spec.errors import LimitError, PolicyError
from casemate.spec.job import DatasetUse, Execution, Quote, Submission
from casemate.spec.messages import Prepared


def _state(service: Service, use: DatasetUse, scientist: str) -> DatasetState:
    found = catalog.dataset(service.store, use.dataset)
    rdp = RdpFilter(catalog.budget(service.store, found.lineage))
    account = catalog.account(service.store, found.lineage)
    own = catalog.account(service.store, found.lineage, scientist)
    return DatasetState(
        dataset=found.id,
        owner=found.owner,
        schema=found.registration.schema,
        policy=found.policy,
        policy_digest=found.policy_digest,
        epoch=found.epoch,
        state=found.state,
        filter=rdp,
        spent=account.rdp_nano,
        delta_femto=account.delta_femto,
        by_scientist=(own.rdp_nano, own.delta_femto),
        evaluated=admission.evaluated(service.store, found.lineage, held=True),
        entered=admission.entered(service.store, found, scientist, held=True),
    )


def _require_known(call: Call, submission: Submission) -> None:
    """The caller is the scientist, and knows of every dataset by right."""
    request = submission.request
    call.require_named("job", "scientist", request.scientist, "Ask")
    for use in request.datasets:
        permissions.dataset_roles(call.service, call.caller, use.dataset)
        if catalog.dataset(call.service.store, use.dataset).state == "revoked":
            raise PolicyError(
                "policy.revoked",
                f"The dataset {use.dataset} was revoked by its owner.",
                mend="Ask for a quote without it.",
                where=use.dataset,
            )


def _model_key(call: Call, submission: Submission) -> bytes:
    info = Submission.info(codec.digest(submission.request))
    return call.service.model_key(submission.sealed_key, info)


async def make(call: Call) -> Quote:
    """Look at the model in a worker, compile the plan, and price it. No data is touched."""
    service = call.service
    submission: Submission = call.body
    request = submission.request
    _require_known(call, submission)
    most = service.config.limits.quotes
    if records.quotes_of(service.store, call.caller) >= most:
        raise LimitError(
            "limit.quotes",
            f"This identity has {most} quotes, as many as are kept.",
            mend="Use a quote that you have, or ask the operator for a higher limit.",
        )
    schemas = run.schemas_of(service, request)
    check_request(request, schemas)
    size = service.uploads.complete(call.caller, submission.upload, unused=True)
    service.require_worker_memory(size)
    key = _model_key(call, submission)
    try:
        async with service.queue.preparing(), service.pool.worker() as (worker, _):
            prepared = await run.prepare(service, worker, request, schemas, submission.upload, key)
            execution = Execution(
                threads=service.config.threads,
                path=prepared.path[0],
                compiled=prepared.compiled,
                artifact=prepared.artifact,
                ways=prepared.ways,
            )
            made = await asyncio.to_thread(_price, service, submission, prepared, execution)
            _require_time(service, made.seconds)
            digest = quotes.add(service.store, made, submission, key)
            if all(d.refusal is None for d in made.datasets):
                await service.pool.keep(digest, worker)
    except WorkerGone as e:  # none could be started
        raise run.worker_gone(e) from None
    return made


def _require_time(service: Service, seconds: float) -> None:
    """A run is ended after ``run_seconds``, however long it was said to take."""
    most = service.config.limits.run_seconds
    if not seconds <= most:
        raise LimitError(
            "limit.run",
            f"The job would take {seconds:.0f} seconds where {most:.0f} are allowed.",
            mend="Take fewer steps or a smaller model, or ask the operator for a larger limit.",
        )


def _price(
    service: Service, submission: Submission, prepared: Prepared, execution: Execution
) -> Quote:
    request = submission.request
    states = [_state(service, use, request.scientist) for use in request.datasets]
    plan = compile_plan(request, [s.schema for s in states], prepared)
    return quote(request, plan, prepared, execution, states)


async def list_quotes(call: Call) -> list[Quote]:
    """One's own newest, and those that wait for one's word."""
    store = call.service.store
    found = {
        stored.digest: stored.quote
        for stored in (
            *quotes.of_scientist(store, call.caller),
            *quotes.waiting_for(store, call.caller),
        )
    }
    return list(found.values())


async def show(call: Call) -> Quote:
    return quotes.get(call.service.store, call.id).quote


async def approve(call: Call) -> None:
    _judge(call, "approve")


async def reject(call: Call) -> None:
    _judge(call, "reject")


def _judge(call: Call, verdict: quotes.Verdict) -> None:
    judged = quotes.judge(call.service.store, call.id, call.caller, verdict)
    for use in judged.quote.request.datasets:
        call.service.queue.changed(catalog.dataset(call.service.store, use.dataset).policy)
