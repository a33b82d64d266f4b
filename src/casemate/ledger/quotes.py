"""Quotes and the owners' words on them. A quote is named by its digest; so is an approval."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from casemate.ledger.catalog import dataset, use_upload
from casemate.ledger.store import Store
from casemate.spec import codec
from casemate.spec.errors import PlanError, PolicyError
from casemate.spec.job import Quote, Submission
from casemate.spec.log import SALT_BYTES, Approval, commitment

Verdict = Literal["approve", "reject"]


@dataclass(frozen=True, slots=True)
class StoredQuote:
    """``void``: the error code of what made it void, or ``None``. ``verdicts`` by dataset.
    ``salt``: of the commitments on the quote and its job in the log."""

    digest: str
    quote: Quote
    submission: Submission
    model_key: bytes
    salt: bytes
    void: str | None
    verdicts: dict[str, Verdict | None]


def add(store: Store, quote: Quote, submission: Submission, model_key: bytes) -> str:
    """Keep a quote with what is needed to run it; its digest.

    The same quote again changes nothing, but brings a void one back, without approvals.
    ``model_key``: the opened 32-byte stream key of the sealed model.
    """
    digest = codec.digest(quote)
    request = quote.request
    with store.transaction():
        row = store.one("SELECT void FROM quotes WHERE digest = ?", digest)
        if row is not None:
            store.run("UPDATE quotes SET void = NULL WHERE digest = ?", digest)
            return digest
        for use in request.datasets:
            dataset(store, use.dataset)
        use_upload(store, submission.upload, request.scientist, f"model:{request.model_digest}")
        store.run(
            "INSERT INTO quotes SELECT ?, coalesce(max(place), 0) + 1, ?, ?, ?, ?, ?, ?, NULL"
            " FROM quotes",
            digest,
            request.job,
            request.scientist,
            codec.encode(quote),
            codec.encode(submission),
            model_key,
            store.rng.bytes(SALT_BYTES),
        )
        for use in request.datasets:
            store.run("INSERT INTO quote_datasets VALUES (?, ?, NULL)", digest, use.dataset)
    return digest


def unknown(digest: str) -> PlanError:
    """Also for a quote that exists but that the caller may not see."""
    return PlanError(
        "plan.unknown-quote",
        f"There is no quote {digest[:80]!r} that you may see.",
        mend="Ask for a quote first.",
        status=404,
    )


def get(store: Store, digest: str) -> StoredQuote:
    """``PlanError`` ``plan.unknown-quote`` (404) if there is none."""
    row = store.one(
        "SELECT quote, submission, model_key, salt, void FROM quotes WHERE digest = ?", digest
    )
    if row is None:
        raise unknown(digest)
    verdicts = store.all("SELECT dataset, verdict FROM quote_datasets WHERE quote = ?", digest)
    return StoredQuote(
        digest,
        codec.decode(Quote, row[0]),
        codec.decode(Submission, row[1]),
        row[2],
        row[3],
        row[4],
        dict(verdicts),
    )


def owners(store: Store, digest: str) -> set[str]:
    """The owners of the quote's datasets."""
    sql = "SELECT owner FROM quote_datasets JOIN datasets ON id = dataset WHERE quote = ?"
    return {owner for (owner,) in store.all(sql, digest)}


def of_scientist(store: Store, scientist: str, count: int = 100) -> list[StoredQuote]:
    """A scientist's newest quotes."""
    sql = "SELECT digest FROM quotes WHERE scientist = ? ORDER BY place DESC LIMIT ?"
    return [get(store, digest) for (digest,) in store.all(sql, scientist, count)]


def waiting_for(store: Store, owner: str, count: int = 100) -> list[StoredQuote]:
    """Quotes on which ``owner``'s word is needed and not yet given, oldest first."""
    sql = (
        "SELECT DISTINCT q.digest, q.place FROM quotes q"
        " JOIN quote_datasets u ON u.quote = q.digest JOIN datasets d ON d.id = u.dataset"
        " WHERE d.owner = ? AND u.verdict IS NULL AND q.void IS NULL"
        " AND json_extract(CAST(d.policy AS TEXT), '$.approval') = 'each-quote'"
        " ORDER BY q.place LIMIT ?"
    )
    return [get(store, digest) for digest, _ in store.all(sql, owner, count)]


def judge(store: Store, digest: str, owner: str, verdict: Verdict) -> StoredQuote:
    """``owner``'s word for every dataset of theirs in the quote; the last word counts.

    Rejecting ends a job that waits in the queue, not one that is reserved. Raises
    ``PlanError`` ``plan.unknown-quote`` to all but the owners, ``PolicyError`` for a void quote.
    """
    with store.transaction():
        sql = (
            "SELECT dataset, verdict FROM quote_datasets JOIN datasets ON id = dataset"
            " WHERE quote = ? AND owner = ? ORDER BY dataset"
        )
        mine = store.all(sql, digest, owner)
        if not mine:
            raise unknown(digest)
        found = get(store, digest)
        require_valid(found)
        for name, before in mine:
            if before != verdict:
                store.run(
                    "UPDATE quote_datasets SET verdict = ? WHERE quote = ? AND dataset = ?",
                    verdict,
                    digest,
                    name,
                )
                quote = commitment(found.salt, digest)
                store.append(verdict, name, Approval(quote=quote, dataset=name, owner=owner))
        if verdict == "reject":
            store.run(
                "UPDATE jobs SET state = 'failed', error = 'policy.rejected',"
                " message = 'An owner rejected the quote.' WHERE state = 'queued' AND quote = ?",
                digest,
            )
        return get(store, digest)


def require_valid(stored: StoredQuote) -> None:
    """``PolicyError`` with the code of what made the quote void."""
    if stored.void is not None:
        raise PolicyError(
            stored.void,
            "An owner changed or revoked what this quote was made under.",
            mend="Ask for a new quote.",
            where=stored.digest,
        )
