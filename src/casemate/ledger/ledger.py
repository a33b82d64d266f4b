"""The budget rules: submit, reserve, begin, commit, abandon.

A job is ``queued`` (nothing charged), ``reserved`` (charged), ``running`` (keys handed out), then
``done`` or, charged all the same, ``failed``, ``cancelled`` or ``abandoned``. The keys of a run
come only from :func:`begin`, which wants a reservation of this boot and gives them once: nothing
can be read that was not debited, and one debit pays for one run (P8). What a queued job will take
is held against the budget, so that its turn does not end in a refusal; cancelled there, it costs
nothing.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Final, Literal

from casemate.ledger import catalog, quotes
from casemate.ledger.admission import add, admit
from casemate.ledger.store import Link, Store
from casemate.spec import codec
from casemate.spec.data import DatasetKey
from casemate.spec.errors import JobError, PolicyError
from casemate.spec.job import Charge
from casemate.spec.log import Abandoned, Committed, Debit, Reserved
from casemate.spec.messages import RunDataset
from casemate.spec.receipt import ReceiptBundle

State = Literal["queued", "reserved", "running", "done", "failed", "cancelled", "abandoned"]
LIVE: Final = ("reserved", "running")


@dataclass(frozen=True, slots=True)
class Job:
    """A job as it stands. ``blob``: where its sealed result lies on the Disk, once done.

    ``reserved`` and ``ended``: sequences of its entries in the log.
    """

    id: str
    request_digest: str
    quote: str
    scientist: str
    state: State
    boot: bytes | None
    reserved: int | None
    ended: int | None
    error: str | None
    message: str
    blob: str | None
    result_digest: str | None


_COLUMNS: Final = (
    "id, request_digest, quote, scientist, state, boot, reserved, ended, error, message, blob,"
    " result_digest"
)


def unknown(id: str) -> JobError:
    """Also for a job that exists but that the caller may not see."""
    return JobError(
        "job.unknown",
        f"There is no job {id[:60]!r} that you may see.",
        mend="List your jobs.",
        status=404,
    )


def _find(store: Store, id: str) -> Job | None:
    row = store.one(f"SELECT {_COLUMNS} FROM jobs WHERE id = ?", id)
    return None if row is None else Job(*row)


def job(store: Store, id: str) -> Job:
    """``JobError`` ``job.unknown`` (404) if there is none."""
    found = _find(store, id)
    if found is None:
        raise unknown(id)
    return found


def jobs(store: Store, identity: str, count: int = 1000) -> list[Job]:
    """The newest jobs of a scientist, and those on an owner's datasets."""
    sql = (
        f"SELECT {_COLUMNS} FROM jobs WHERE scientist = ?1 OR id IN (SELECT job FROM job_datasets"
        " JOIN datasets d ON d.id = dataset WHERE d.owner = ?1) ORDER BY place DESC LIMIT ?2"
    )
    return [Job(*row) for row in store.all(sql, identity, count)]


def next_queued(store: Store) -> Job | None:
    """The job that has waited longest."""
    sql = f"SELECT {_COLUMNS} FROM jobs WHERE state = 'queued' ORDER BY place LIMIT 1"
    row = store.one(sql)
    return None if row is None else Job(*row)


def bundle(store: Store, id: str) -> ReceiptBundle:
    """The receipt of a job that is done."""
    row = store.one("SELECT bundle FROM jobs WHERE id = ? AND state = 'done'", id)
    if row is None:
        raise JobError(
            "job.not-done", f"The job {id[:60]!r} has no result.", mend="Wait until it is done."
        )
    return codec.decode(ReceiptBundle, row[0])


def submit(store: Store, quote_digest: str, scientist: str) -> Job:
    """Queue the quote's job. The same request again answers with the same job.

    Raises ``PlanError`` (unknown quote), ``JobError`` ``job.id-reused`` (same id, other request),
    ``PolicyError`` (policy, epoch, approval), ``BudgetError`` ``budget.exhausted`` (it does not fit
    beside what is spent and held).
    """
    with store.transaction():
        stored = quotes.get(store, quote_digest)
        quote = stored.quote
        if quote.request.scientist != scientist:
            raise quotes.unknown(quote_digest)
        request_digest = codec.digest(quote.request)
        found = _find(store, quote.request.job)
        if found is not None:
            if found.request_digest != request_digest:
                raise JobError(
                    "job.id-reused",
                    f"The job {found.id} was submitted with another request.",
                    mend="Take a new job id.",
                )
            return found
        charges = admit(store, stored, held=True)
        store.run(
            "INSERT INTO jobs (id, place, request_digest, quote, scientist, state)"
            " SELECT ?, coalesce(max(place), 0) + 1, ?, ?, ?, 'queued' FROM jobs",
            quote.request.job,
            request_digest,
            quote_digest,
            scientist,
        )
        for found_dataset, charge in charges:
            store.run(
                "INSERT INTO job_datasets VALUES (?, ?, ?, ?)",
                quote.request.job,
                found_dataset.id,
                found_dataset.lineage,
                codec.encode(charge),
            )
        return job(store, quote.request.job)


def reserve(store: Store, id: str) -> Link:
    """Charge every dataset of a queued job, durably, before anything is read; its log entry.

    All in one transaction or none; on return it is on the disk. The charge is never given back.
    Again gives the same answer. Raises ``PolicyError``, ``BudgetError``, ``JobError``.
    """
    with store.transaction():
        found = job(store, id)
        if found.reserved is not None:
            return _link(store, found.reserved)
        if found.state != "queued":
            raise _wrong_state(found, "queued")
        stored = quotes.get(store, found.quote)
        charges = admit(store, stored, held=False)
        for held, charge in charges:
            _spend(store, held.lineage, charge)
        plan = stored.quote.plan
        entry = store.append(
            "reserve",
            id,
            Reserved(
                job=id,
                scientist=found.scientist,
                request_digest=found.request_digest,
                quote_digest=found.quote,
                plan_digest=codec.digest(plan),
                events=plan.events,
                delta_truncation=plan.delta_truncation,
                delta_sampler=plan.delta_sampler,
                delta_shown=stored.quote.delta,
                debits=tuple(
                    Debit(
                        dataset=d.id,
                        lineage=d.lineage,
                        policy_digest=d.policy_digest,
                        epoch=d.epoch,
                        charge=charge,
                    )
                    for d, charge in charges
                ),
            ),
        )
        store.run(
            "UPDATE jobs SET state = 'reserved', boot = ?, reserved = ? WHERE id = ?",
            store.boot,
            entry.sequence,
            id,
        )
        return entry


def begin(store: Store, id: str) -> tuple[RunDataset, ...]:
    """The datasets of a job reserved by this boot, with their keys, in the request's order; once.

    Raises ``JobError`` ``job.state`` if it is not reserved, or was begun; ``PolicyError``
    ``policy.revoked`` if a key is gone.
    """
    with store.transaction():
        found = job(store, id)
        if found.state != "reserved" or found.boot != store.boot:
            raise _wrong_state(found, "reserved by this boot")
        out = []
        for use in quotes.get(store, found.quote).quote.request.datasets:
            key = store.one("SELECT key FROM dataset_keys WHERE dataset = ?", use.dataset)
            if key is None:
                raise _revoked(use.dataset)
            opened = codec.decode(DatasetKey, key[0])
            schema = catalog.dataset(store, use.dataset).registration.schema
            out.append(
                RunDataset(dataset=use.dataset, schema=schema, key=opened.key, salt=opened.salt)
            )
        store.run("UPDATE jobs SET state = 'running' WHERE id = ?", id)
        return tuple(out)


def commit(
    store: Store,
    id: str,
    *,
    result_digest: str,
    blob: str,
    receipt: Callable[[Link], ReceiptBundle],
) -> ReceiptBundle:
    """The job's only commit: result, receipt and log entry become visible together.

    ``blob`` names the sealed result on the Disk, already synced. ``receipt`` makes the bundle from
    the commit entry; if it raises, nothing has happened. Again with the same result gives the same
    bundle. Raises ``JobError`` ``job.state``, ``PolicyError`` ``policy.revoked`` (an owner withdrew
    during the run: abandon the job).
    """
    with store.transaction():
        found = job(store, id)
        if found.state == "done" and found.result_digest == result_digest:
            return bundle(store, id)
        if found.state != "running" or found.boot != store.boot:
            raise _wrong_state(found, "running in this boot")
        sql = (
            "SELECT d.id FROM job_datasets JOIN datasets d ON d.id = dataset"
            " WHERE job = ? AND d.state != 'ready' ORDER BY d.id"
        )
        gone = store.one(sql, id)
        if gone is not None:
            raise _revoked(gone[0])
        body = Committed(job=id, request_digest=found.request_digest, result_digest=result_digest)
        entry = store.append("commit", id, body)
        made = receipt(entry)
        store.run(
            "UPDATE jobs SET state = 'done', ended = ?, blob = ?, result_digest = ?, bundle = ?"
            " WHERE id = ?",
            entry.sequence,
            blob,
            result_digest,
            codec.encode(made),
            id,
        )
        return made


def abandon(
    store: Store, id: str, state: Literal["failed", "cancelled"], error: str, message: str = ""
) -> Job:
    """End a job without a result. A charge that was taken stays; a queued job had none.

    A job that has ended stays as it is.
    """
    with store.transaction():
        found = job(store, id)
        if found.state not in ("queued", *LIVE):
            return found
        ended = None
        if found.reserved is not None:
            body = Abandoned(job=id, request_digest=found.request_digest, reason=state)
            ended = store.append("abandon", id, body).sequence
        store.run(
            "UPDATE jobs SET state = ?, ended = ?, error = ?, message = ? WHERE id = ?",
            state,
            ended,
            error,
            message,
            id,
        )
        return job(store, id)


def _wrong_state(found: Job, wanted: str) -> JobError:
    return JobError(
        "job.state",
        f"The job {found.id} is {found.state}, not {wanted}.",
        mend="Look at its status.",
    )


def _revoked(dataset: str) -> PolicyError:
    return PolicyError(
        "policy.revoked",
        f"The dataset {dataset} was revoked by its owner.",
        mend="Ask for a quote without it.",
        where=dataset,
    )


def _link(store: Store, sequence: int) -> Link:
    return Link(*store.one("SELECT sequence, digest FROM entries WHERE sequence = ?", sequence))


def _spend(store: Store, lineage: str, charge: Charge) -> None:
    _, spent, delta_femto, jobs = catalog.spent(store, lineage)
    for place, nano in enumerate(add(spent, charge)):
        store.run(
            "UPDATE spent SET rdp_nano = ? WHERE lineage = ? AND place = ?", nano, lineage, place
        )
    store.run(
        "UPDATE lineages SET delta_femto = ?, jobs = ? WHERE id = ?",
        delta_femto + charge.delta_femto,
        jobs + 1,
        lineage,
    )
