"""The budget rules: submit, reserve, begin, commit, release, abandon.

A job is ``queued`` (nothing charged), ``reserved`` (charged), ``running`` (keys handed out),
``committed`` (its one result is fixed in the log, nothing visible yet), then ``done``; or, charged
all the same, ``failed``, ``cancelled`` or ``abandoned``. The keys of a run come only from
:func:`begin`, which wants a reservation or takeover of this boot and gives them once: nothing can
be read that was not debited, and one debit pays for one release (P8). Where a policy asks for
witnesses, keys and results both wait until they have cosigned the log up to that point. What a
queued job will take is held against the budget, so that its turn does not end in a refusal;
cancelled there, it costs nothing.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Collection
from dataclasses import dataclass, field
from typing import Any, Final, Literal

from casemate.ledger import catalog, log, quotes
from casemate.ledger.admission import admit
from casemate.ledger.store import Link, Store
from casemate.seal.note import Note
from casemate.spec import codec
from casemate.spec.data import DatasetKey, Policy
from casemate.spec.errors import JobError, PolicyError
from casemate.spec.evidence import Attestation
from casemate.spec.job import Quote
from casemate.spec.log import Abandoned, Committed, Debit, Reserved, TakenOver, commitment
from casemate.spec.messages import RunDataset
from casemate.spec.receipt import ReceiptBundle

State = Literal[
    "queued", "reserved", "running", "committed", "done", "failed", "cancelled", "abandoned"
]
LIVE: Final = ("reserved", "running")


@dataclass(frozen=True, slots=True)
class Job:
    """A job as it stands. ``blob``: where its sealed result lies on the Disk, once committed.

    ``reserved`` and ``ended``: sequences of its entries in the log; ``granted``: of the one that
    lets ``boot`` run it. ``takeovers``: how often another boot went on with it.
    """

    id: str
    request_digest: str
    quote: str
    scientist: str
    state: State
    boot: bytes | None
    reserved: int | None
    granted: int | None
    takeovers: int
    ended: int | None
    error: str | None
    message: str
    blob: str | None
    result_digest: str | None


_COLUMNS: Final = (
    "id, request_digest, quote, scientist, state, boot, reserved, granted, takeovers, ended, error,"
    " message, blob, result_digest"
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


def next_queued(store: Store, but: Collection[str] = ()) -> Job | None:
    """The job that has waited longest, of those that are not in ``but``."""
    sql = (
        f"SELECT {_COLUMNS} FROM jobs WHERE state = 'queued'"
        " AND id NOT IN (SELECT value FROM json_each(?)) ORDER BY place LIMIT 1"
    )
    row = store.one(sql, json.dumps(list(but)))
    return None if row is None else Job(*row)


def unfinished(store: Store) -> list[Job]:
    """What an earlier boot left: jobs to go on with (reserved) and results to release (committed),
    oldest first."""
    sql = f"SELECT {_COLUMNS} FROM jobs WHERE state IN ('reserved', 'committed') ORDER BY place"
    return [Job(*row) for row in store.all(sql)]


def bundle(store: Store, id: str) -> ReceiptBundle:
    """The receipt of a job that is done."""
    row = store.one("SELECT bundle FROM jobs WHERE id = ? AND state = 'done'", id)
    if row is None:
        raise _not_done(id)
    return codec.decode(ReceiptBundle, row[0])


def bundles(store: Store, dataset: str) -> list[bytes]:
    """The receipts of all jobs on a dataset that are done, as they were written."""
    sql = (
        "SELECT bundle FROM jobs JOIN job_datasets ON job = id WHERE dataset = ? AND state = 'done'"
        " ORDER BY place"
    )
    return [raw for (raw,) in store.all(sql, dataset)]


def _not_done(id: str) -> JobError:
    return JobError(
        "job.not-done", f"The job {id[:60]!r} has no result.", mend="Wait until it is done."
    )


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
    with store.lock:
        before = job(store, id).reserved
        return _reserve(store, id) if before is None else store.link(before)


def _reserve(store: Store, id: str) -> Link:
    with store.anchored() as moved:
        found = job(store, id)
        if found.state != "queued":
            raise _wrong_state(found, "queued")
        stored = quotes.get(store, found.quote)
        charges = admit(store, stored, held=False)
        for held, charge in charges:
            for whose in (catalog.EVERYONE, found.scientist):
                account = catalog.account(store, held.lineage, whose).add(charge)
                catalog.set_account(store, held.lineage, whose, account)
        plan = stored.quote.plan
        entry = store.append(
            "reserve",
            id,
            Reserved(
                job=id,
                scientist=found.scientist,
                request=commitment(stored.salt, found.request_digest),
                quote=commitment(stored.salt, found.quote),
                plan=commitment(stored.salt, codec.digest(plan)),
                events=plan.events,
                delta_truncation=plan.delta_truncation,
                delta_sampler=plan.delta_sampler,
                delta_shown=stored.quote.delta,
                charge=charges[0][1],
                debits=tuple(
                    Debit(
                        dataset=d.id,
                        lineage=d.lineage,
                        policy=commitment(d.salt, d.policy_digest),
                        epoch=d.epoch,
                    )
                    for d, _ in charges
                ),
                anchor=moved,
            ),
        )
        store.run(
            "UPDATE jobs SET state = 'reserved', boot = ?1, reserved = ?2, granted = ?2"
            " WHERE id = ?3",
            store.boot,
            entry.sequence,
            id,
        )
        return entry


def take_over(store: Store, id: str) -> Link | None:
    """Inside a transaction: let this boot go on with a job that another one left; its log entry.

    ``None`` when it was taken over as often as its policies allow: then it has to be abandoned.
    """
    found = job(store, id)
    most = min(p.resumes for p in _policies(store, id))
    if found.state not in LIVE or found.takeovers >= most:
        return None
    entry = store.append("takeover", id, TakenOver(job=id))
    store.run(
        "UPDATE jobs SET state = 'reserved', boot = ?, granted = ?, takeovers = takeovers + 1"
        " WHERE id = ?",
        store.boot,
        entry.sequence,
        id,
    )
    return entry


@dataclass(frozen=True, slots=True)
class TrainingState:
    """A run's newest state: after how many steps, where it lies on the Disk, its stream's key."""

    step: int
    path: str
    key: bytes = field(repr=False)


def frozen(store: Store, id: str) -> bool:
    """Whether a dataset of the job waits for its owner's consent."""
    sql = "SELECT 1 FROM job_datasets JOIN frozen USING (dataset) WHERE job = ?"
    return store.one(sql, id) is not None


def quote(store: Store, id: str) -> Quote:
    """What a job was quoted."""
    return quotes.get(store, job(store, id).quote).quote


def training_state(store: Store, id: str) -> TrainingState | None:
    row = store.one("SELECT step, path, key FROM states WHERE job = ?", id)
    return None if row is None else TrainingState(*row)


def training_states(store: Store) -> set[str]:
    """Where all of them lie."""
    return {path for (path,) in store.all("SELECT path FROM states")}


def keep_state(store: Store, id: str, state: TrainingState) -> None:
    """Name a run's newest state, already synced. Raises ``JobError`` ``job.state`` for a job that
    does not run in this boot."""
    with store.transaction():
        found = job(store, id)
        if found.state != "running" or found.boot != store.boot:
            raise _wrong_state(found, "running in this boot")
        store.run(
            "INSERT INTO states VALUES (?1, ?2, ?3, ?4) ON CONFLICT (job)"
            " DO UPDATE SET step = ?2, path = ?3, key = ?4",
            id,
            state.step,
            state.path,
            state.key,
        )


def witnesses(store: Store, id: str) -> tuple[tuple[tuple[str, ...], int], ...]:
    """What the policies of a job's datasets ask for: (vkeys, how many of them), each once."""
    policies = _policies(store, id)
    return tuple({(p.witnesses, p.cosignatures) for p in policies if p.cosignatures})


def cosigned_at(store: Store, id: str, sequence: int) -> int | None:
    """The size of the log over entry ``sequence`` whose very checkpoint has enough cosignatures
    for each dataset, more than half of its witnesses'; ``None`` where they stand on different
    ones."""
    needed = witnesses(store, id)
    if not needed:
        return store.size()
    said = dict(store.all("SELECT witness, size FROM cosignatures WHERE size > ?", sequence))
    for size in set(said.values()):
        if all(sum(said.get(w) == size for w in keys) >= k for keys, k in needed):
            return int(size)
    return None


def _policies(store: Store, id: str) -> list[Policy]:
    sql = "SELECT policy FROM job_datasets JOIN datasets d ON d.id = dataset WHERE job = ?"
    return [codec.decode(Policy, raw) for (raw,) in store.all(sql, id)]


def witnessed(store: Store, id: str, sequence: int) -> bool:
    """Whether enough witnesses of each dataset cosigned the log up to entry ``sequence``."""
    return all(log.cosigned(store, keys, sequence) >= k for keys, k in witnesses(store, id))


def _require_witnessed(store: Store, id: str, sequence: int | None) -> None:
    if sequence is None or not witnessed(store, id, sequence):
        raise JobError(
            "job.not-witnessed",
            f"The witnesses have not cosigned the log up to what job {id} did.",
            mend="Wait until the operator's server reaches the owners' witnesses.",
            status=503,
        )


def begin(store: Store, id: str) -> tuple[RunDataset, ...]:
    """The datasets of a job reserved by this boot, with their keys, in the request's order; once.

    Raises ``JobError`` ``job.state`` if it is not reserved, or was begun, ``job.not-witnessed``;
    ``PolicyError`` ``policy.revoked`` if a key is gone.
    """
    with store.transaction():
        found = job(store, id)
        if found.state != "reserved" or found.boot != store.boot:
            raise _wrong_state(found, "reserved by this boot")
        _require_witnessed(store, id, found.granted)
        out = []
        for use in quotes.get(store, found.quote).quote.request.datasets:
            key = store.one("SELECT key FROM dataset_keys WHERE dataset = ?", use.dataset)
            if key is None:
                raise _revoked(use.dataset)
            catalog.require_thawed(store, use.dataset)
            opened = codec.decode(DatasetKey, key[0])
            schema = catalog.dataset(store, use.dataset).registration.schema
            out.append(
                RunDataset(dataset=use.dataset, schema=schema, key=opened.key, salt=opened.salt)
            )
        store.run("UPDATE jobs SET state = 'running' WHERE id = ?", id)
        return tuple(out)


def commit(
    store: Store, id: str, *, result_digest: str, blob: str, result_key: bytes, envelope: str
) -> Link:
    """The job's only commit: from now on this result and this receipt are its own, and no other
    ever is. Nothing is visible yet: :func:`release`.

    ``blob`` names the encrypted result on the Disk, already synced; ``result_key``: its stream
    key. Again with the same result gives the same entry. Raises ``JobError`` ``job.state``,
    ``PolicyError`` ``policy.revoked`` (an owner withdrew during the run: abandon the job).
    """
    with store.lock:
        found = job(store, id)
        if found.state in ("committed", "done") and found.result_digest == result_digest:
            assert found.ended is not None
            return store.link(found.ended)
        return _commit(store, found, result_digest, blob, result_key, envelope)


def _commit(
    store: Store, found: Job, result_digest: str, blob: str, result_key: bytes, envelope: str
) -> Link:
    id = found.id
    with store.anchored() as moved:
        if found.state != "running" or found.boot != store.boot:
            raise _wrong_state(found, "running in this boot")
        _require_not_revoked(store, id)
        salt = quotes.get(store, found.quote).salt
        body = Committed(
            job=id,
            result=commitment(salt, result_digest),
            receipt=commitment(salt, "sha256:" + hashlib.sha256(envelope.encode()).hexdigest()),
            anchor=moved,
        )
        entry = store.append("commit", id, body)
        store.run(
            "UPDATE jobs SET state = 'committed', ended = ?, blob = ?, result_digest = ?,"
            " result_key = ?, envelope = ? WHERE id = ?",
            entry.sequence,
            blob,
            result_digest,
            result_key,
            envelope,
            id,
        )
        store.run("DELETE FROM states WHERE job = ?", id)
        return entry


def result_key(store: Store, id: str) -> bytes:
    """The stream key of a committed result, to be sealed to the scientist; once released, that
    sealed message."""
    row = store.one("SELECT result_key FROM jobs WHERE id = ? AND result_key NOT NULL", id)
    if row is None:
        raise _not_done(id)
    return bytes(row[0])


def release(store: Store, id: str, signed: Note, sealed_key: bytes) -> ReceiptBundle:
    """Result, receipt and proof become visible together: the job is done.

    ``signed``: a checkpoint of this log that covers the commit. ``sealed_key``: the result's key,
    sealed to the scientist. Again gives the same bundle. Raises ``JobError`` ``job.state``,
    ``job.not-witnessed``; ``ReceiptError`` for another checkpoint; ``PolicyError``
    ``policy.revoked`` (an owner withdrew after the commit: abandon the job).
    """
    with store.transaction():
        found = job(store, id)
        if found.state == "done":
            return bundle(store, id)
        if found.state != "committed" or found.ended is None:
            raise _wrong_state(found, "committed")
        _require_not_revoked(store, id)
        _require_witnessed(store, id, found.ended)
        if log.check(store, signed).size <= found.ended:
            raise _wrong_state(found, "under this checkpoint")
        (envelope,) = store.one("SELECT envelope FROM jobs WHERE id = ?", id)
        (attestation,) = store.one(
            "SELECT attestation FROM attestations WHERE boot = ?", found.boot
        )
        made = ReceiptBundle(
            envelope=envelope,
            attestation=codec.decode(Attestation, attestation),
            entry=store.link(found.ended).entry,
            salt=quotes.get(store, found.quote).salt,
            proof=str(log.prove(store, found.ended, signed)),
        )
        store.run(
            "UPDATE jobs SET state = 'done', bundle = ?, result_key = ?, envelope = NULL"
            " WHERE id = ?",
            codec.encode(made),
            sealed_key,
            id,
        )
        return made


def abandon(
    store: Store, id: str, state: Literal["failed", "cancelled"], error: str, message: str = ""
) -> Job:
    """End a job without a result. A charge that was taken stays; a queued job had none.

    A job that has ended stays as it is; a committed one ends so only when an owner revoked.
    """
    with store.transaction():
        found = job(store, id)
        if found.state not in ("queued", *LIVE) and not (
            found.state == "committed" and error == "policy.revoked"
        ):
            return found
        _end(store, found, state, error, message)
        return job(store, id)


def _end(store: Store, found: Job, state: str, error: str, message: str) -> None:
    ended = None
    if found.reserved is not None:
        reason: Any = "crashed" if state == "abandoned" else state
        ended = store.append("abandon", found.id, Abandoned(job=found.id, reason=reason)).sequence
    store.run(
        "UPDATE jobs SET state = ?, ended = ?, error = ?, message = ?, blob = NULL,"
        " result_digest = NULL, result_key = NULL, envelope = NULL WHERE id = ?",
        state,
        ended,
        error,
        message,
        found.id,
    )
    store.run("DELETE FROM states WHERE job = ?", found.id)


def settle_left(store: Store) -> None:
    """Inside a transaction, at a start: what another boot left reserved or running is taken over,
    or abandoned when that happened too often."""
    sql = f"SELECT {_COLUMNS} FROM jobs WHERE state IN ('reserved', 'running') ORDER BY place"
    for row in store.all(sql):
        found = Job(*row)
        if take_over(store, found.id) is None:
            _end(
                store,
                found,
                "abandoned",
                "job.abandoned",
                "The server stopped too often during the run; the charge stays.",
            )


def end_unfinished(store: Store, message: str) -> None:
    """Inside a transaction: abandon what was charged and not released."""
    sql = (
        f"SELECT {_COLUMNS} FROM jobs WHERE state IN ('reserved', 'running', 'committed')"
        " ORDER BY place"
    )
    for row in store.all(sql):
        _end(store, Job(*row), "abandoned", "job.abandoned", message)


def _require_not_revoked(store: Store, id: str) -> None:
    sql = (
        "SELECT d.id FROM job_datasets JOIN datasets d ON d.id = dataset"
        " WHERE job = ? AND d.state != 'ready' ORDER BY d.id"
    )
    gone = store.one(sql, id)
    if gone is not None:
        raise _revoked(gone[0])


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
