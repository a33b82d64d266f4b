"""A start: what the store takes up from the boots before this one. And a recovery: going on from a
restored state, by its owners' consent.

Whoever restores an older state forgets what was spent after it, so that the log must not go on as
if nothing had been: it ends at the restored head and goes on under a new name and key, whose first
entry says so. The key is made when the owners are asked, and each consent names the new log: a
consent serves for one recovery, and not again when the same backup is restored once more.
"""

from __future__ import annotations

from collections.abc import Iterable

from casemate.ledger import catalog, consent, handover, ledger, log, models
from casemate.ledger.store import Link, Store, not_begun
from casemate.seal import checkpoint, note
from casemate.spec import codec
from casemate.spec.consent import Recovered, RecoveryConsent, RecoveryDataset, RecoveryRequest
from casemate.spec.errors import LedgerError
from casemate.spec.evidence import Attestation
from casemate.spec.log import Started

_VOID = "policy.recovered"
_ASK = (
    "Ask them for their consent (casemate dataset consent --recovery); one owner's is enough to go"
    " on, the other datasets stay frozen until theirs come."
)
_LOST = "The state was restored from a backup during the job; the charge stays."


def start(store: Store, attestation: Attestation, *, software: str, measurement: str) -> Link:
    """Put this boot into the log with the attestation that binds its keys, freeze what its owners
    did not accept under this measurement, and take over or abandon the jobs that another boot left
    reserved or running. Once a boot, before anything else, and after ``Store.hold`` has held the
    state against its anchor. Raises ``ledger.handed-over``."""
    raw = codec.encode(attestation)
    digest = codec.digest(attestation)
    handover.require_here(store)
    handover.require_successor(store, measurement)
    with store.anchored() as moved:
        consent.passes(store, measurement)
        body = Started(software=software, measurement=measurement, attestation=digest, anchor=moved)
        entry = store.append("start", store.boot.hex(), body)
        store.run("INSERT INTO attestations VALUES (?, ?, ?)", store.boot, digest, raw)
        ledger.settle_left(store)
        return entry


def request(store: Store, newest: str | None = None) -> RecoveryRequest:
    """What the owners are asked; the same again until the recovery is done or an entry is added.

    ``newest``: a later checkpoint of this log that someone has seen. Raises ``receipt.note-*`` if
    this log did not sign it, ``ledger.handed-over``, ``ledger.missing`` before the first start.
    """
    if store.size() == 0:
        raise not_begun()
    handover.require_here(store)
    _require_ours(store, newest)
    with store.transaction():
        if store.one("SELECT 1 FROM next_log_key") is None:
            store.run("INSERT INTO next_log_key VALUES (?, ?)", *log.new_key(store))
        (origin,) = store.one("SELECT origin FROM next_log_key")
        return RecoveryRequest(
            head=log.seen(log.head(store)),
            next=origin,
            newest=newest,
            datasets=tuple(
                RecoveryDataset(
                    dataset=d.id, owner=d.owner, budget=catalog.budget_state(store, d.lineage)
                )
                for d in _live(store)
            ),
        )


def _live(store: Store) -> list[catalog.Dataset]:
    """Those that a recovery freezes: what the log tells as neither revoked nor dropped."""
    return [d for d in catalog.datasets(store) if d.state != "revoked"]


def _require_ours(store: Store, newest: str | None) -> None:
    if newest is not None:
        checkpoint.verify(note.parse(newest), log.key(store).verifier)


def recover(store: Store, asked: RecoveryRequest, envelopes: Iterable[str]) -> Link:
    """Go on from this state under a new log, with the consents to ``asked``.

    ``asked`` comes from a file of the operator's: whose word is needed says the store. One owner's
    is enough to go on; datasets without one stay frozen until their owners give theirs
    (``consent.give``). Every quote is void, every unfinished job abandoned: in what was lost it may
    have been released already. Raises ``ledger.recovery`` where the state is not the one that the
    owners were asked about, ``ledger.consent-missing`` without any consent, ``policy.consent``,
    ``receipt.note-*`` as :func:`request`, ``ledger.handed-over``.
    """
    handover.require_here(store)
    given = list(envelopes)
    _require_ours(store, asked.newest)
    with store.transaction():
        head = log.seen(log.head(store))
        if (head, (asked.next,)) != (asked.head, store.one("SELECT origin FROM next_log_key")):
            raise LedgerError(
                "ledger.recovery",
                f"The owners were asked about {asked.head.size} entries and the log"
                f" {asked.next}; this state has {head.size}, or was not asked about.",
                mend="Make a new request here (casemate state recover), and ask the owners again.",
                where=asked.next,
            )
        live = [d.id for d in _live(store)]
        if live and not given:
            raise handover.consent_missing(live, _ASK)
        log.add_key(store)
        key = log.key(store)
        body = Recovered(head=head, origin=key.origin, key=key.public, newest=asked.newest)
        entry = store.append("recover", key.origin, body)
        _void(store)
        for envelope in given:
            owner, found = consent.signed(store, envelope)
            if not isinstance(found, RecoveryConsent):
                raise consent.refuse("The consent is none to a recovery.", found.dataset)
            consent.take(store, envelope, owner)
        return entry


def _void(store: Store) -> None:
    ledger.end_unfinished(store, _LOST)
    store.run("UPDATE quotes SET void = ? WHERE void IS NULL", _VOID)
    store.run("UPDATE quote_datasets SET verdict = NULL")
    store.run(
        "UPDATE jobs SET state = 'failed', error = ?,"
        " message = 'The state was restored from a backup.' WHERE state = 'queued'",
        _VOID,
    )
    store.run(
        "INSERT OR IGNORE INTO frozen SELECT id, ? FROM datasets WHERE state != 'revoked'",
        consent.RECOVERY,
    )
    models.freeze(store)
    store.run("DELETE FROM consents")  # they name the log before
    store.run("DELETE FROM cosignatures")
    store.run("UPDATE anchor SET name = NULL, count = NULL, before = NULL, step = NULL")
