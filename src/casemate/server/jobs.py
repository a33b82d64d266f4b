"""Jobs, their results and receipts, and the log."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Final

from casemate.ledger import ledger
from casemate.seams import File
from casemate.server import permissions, records
from casemate.server.service import Call, Reply, whole
from casemate.server.throttle import Busy
from casemate.spec import codec
from casemate.spec.canonical import Json
from casemate.spec.errors import CasemateError, FormatError, JobError
from casemate.spec.job import JobStatus
from casemate.spec.receipt import LogEntry, ReceiptBundle

PART: Final = 1 << 20
LOG_PAGE: Final = 1000


async def submit(call: Call) -> JobStatus:
    """Queue a quote's job; the same quote again is the same job."""
    service = call.service
    waiting = records.queued(service.store)
    limits = service.config.limits
    if len(waiting) >= limits.queued_jobs or (
        waiting.count(call.caller) >= limits.queued_per_identity
    ):
        raise Busy(
            "limit.jobs",
            "Too many jobs wait in the queue.",
            mend="Wait for one to end, then submit again.",
            retry_after=10.0,
        )
    job = ledger.submit(service.store, call.body["quote"], call.caller)
    service.metrics.queued.set(len(waiting) + (job.state == "queued"))
    service.queue.wake()
    return service.queue.status(job)


async def list_jobs(call: Call) -> list[JobStatus]:
    service = call.service
    return [service.queue.status(job) for job in ledger.jobs(service.store, call.caller)]


async def show_job(call: Call) -> JobStatus:
    return call.service.queue.status(ledger.job(call.service.store, call.id))


async def cancel(call: Call) -> JobStatus:
    """Stop a job; one that has ended stays as it is."""
    service = call.service
    if ledger.job(service.store, call.id).state in ("queued", "reserved", "running"):
        await service.queue.stop(
            call.id, "cancelled", "job.cancelled", "The scientist cancelled the job."
        )
    return service.queue.status(ledger.job(service.store, call.id))


async def _parts(file: File) -> AsyncIterator[bytes]:
    try:
        at, size = 0, file.size()
        while at < size:
            part = await asyncio.to_thread(file.read, at, min(PART, size - at))
            if not part:
                return
            at += len(part)
            yield part
    finally:
        file.close()


async def result(call: Call) -> Reply:
    """The sealed weights."""
    job = ledger.job(call.service.store, call.id)
    if job.state != "done" or job.blob is None:
        raise JobError(
            "job.not-done", f"The job {job.id} has no result.", mend="Wait until it is done."
        )
    file = call.service.disk.open(job.blob)
    return Reply(_parts(file), headers={"content-length": str(file.size())})


async def receipt(call: Call) -> ReceiptBundle:
    return ledger.bundle(call.service.store, call.id)


# Which rule says whether a caller may see an entry's body, by the kind of entry.
_SEEN_BY: Final = {
    "register": "dataset-party",
    "policy": "dataset-party",
    "epoch": "dataset-party",
    "revoke": "dataset-party",
    "approve": "quote-party",
    "reject": "quote-party",
    "quote": "quote-party",
    "reserve": "job-party",
    "commit": "job-party",
    "abandon": "job-party",
}


def _visible(call: Call, entry: LogEntry) -> bool:
    if entry.kind == "start":
        return True
    if entry.kind == "identity":
        return entry.subject == call.caller
    try:
        permissions.check(call.service, _SEEN_BY[entry.kind], call.caller, entry.subject)
    except CasemateError:
        return False
    return True


async def log(call: Call) -> list[Json]:
    """Up to ``LOG_PAGE`` entries from sequence ``from`` on; of those that are others', the digest
    only, so that everyone can check the whole chain."""
    start = whole(call.query.get("from", "0"))
    if start is None:
        raise FormatError(
            "format.field",
            "from is not a sequence number.",
            mend="Ask for ?from=N with N at least 0.",
            where="from",
        )
    return [
        codec.to_json(entry)
        if _visible(call, entry)
        else {"digest": codec.digest(entry), "sequence": entry.sequence}
        for entry in call.service.store.entries(start, LOG_PAGE)
    ]
