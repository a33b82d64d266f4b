"""Jobs, their results and receipts."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Final

from casemate.ledger import ledger
from casemate.seams import File
from casemate.server import records
from casemate.server.service import Call, Reply
from casemate.server.throttle import Busy
from casemate.spec.errors import JobError
from casemate.spec.job import JobStatus
from casemate.spec.receipt import ReceiptBundle

PART: Final = 1 << 20


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
        service.queue.cancel(
            call.id, "cancelled", "job.cancelled", "The scientist cancelled the job."
        )
    return service.queue.status(ledger.job(service.store, call.id))


async def _parts(head: bytes, file: File) -> AsyncIterator[bytes]:
    try:
        yield head
        at, size = 0, file.size()
        while at < size:
            part = await asyncio.to_thread(file.read, at, min(PART, size - at))
            if not part:
                return
            at += len(part)
            yield part
    finally:
        file.close()


def sealed_file(sealed_key: bytes, file: File) -> Reply:
    """A stream that lies on the Disk, behind its key as it is sealed to the caller."""
    head = len(sealed_key).to_bytes(4, "big") + sealed_key
    size = len(head) + file.size()
    return Reply(_parts(head, file), headers={"content-length": str(size)})


async def result(call: Call) -> Reply:
    """The sealed weights."""
    job = ledger.job(call.service.store, call.id)
    if job.state != "done" or job.blob is None:
        raise JobError(
            "job.not-done", f"The job {job.id} has no result.", mend="Wait until it is done."
        )
    sealed = ledger.result_key(call.service.store, job.id)
    return sealed_file(sealed, call.service.disk.open(job.blob))


async def receipt(call: Call) -> ReceiptBundle:
    return ledger.bundle(call.service.store, call.id)
