"""A state passes to another enclave: what the one that has it writes before it falls silent.

The entry ``handover`` is the last that the predecessor writes. With it, in one transaction, the
keys of datasets whose owners did not sign for the successor are destroyed, and the store is marked:
it never starts again. The successor's copy (:func:`export`) lacks the mark.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Final

import apsw

from casemate.ledger import catalog, consent, models, rekey
from casemate.ledger.store import Store
from casemate.seams import Disk
from casemate.spec import codec
from casemate.spec.consent import HandedOver
from casemate.spec.errors import LedgerError
from casemate.spec.receipt import LogEntry

FOLDER = "handover"


def handed(store: Store) -> HandedOver | None:
    """To whom this state was handed over, if it was."""
    row = store.one("SELECT e.entry FROM entries e JOIN handed_over h ON h.entry = e.sequence")
    return None if row is None else codec.decode(HandedOver, codec.decode(LogEntry, row[0]).body)


def require_here(store: Store) -> None:
    """``LedgerError`` ``ledger.handed-over``."""
    found = handed(store)
    if found is not None:
        raise _handed_over(found)


def require_successor(store: Store, measurement: str) -> None:
    """A state that was handed over starts first under what it was handed to: ``LedgerError``
    ``ledger.handed-over``."""
    row = store.one(
        "SELECT entry FROM entries WHERE json_extract(CAST(entry AS TEXT), '$.kind')"
        " IN ('start', 'handover') ORDER BY sequence DESC LIMIT 1"
    )
    newest = None if row is None else codec.decode(LogEntry, row[0])
    if newest is not None and newest.kind == "handover":
        found = codec.decode(HandedOver, newest.body)
        if found.measurement != measurement:
            raise _handed_over(found)


def _handed_over(found: HandedOver) -> LedgerError:
    return LedgerError(
        "ledger.handed-over",
        f"This state was handed over to the enclave of measurement {found.measurement[:64]}, by its"
        f" request {found.request}.",
        mend="Start that enclave: casemate state take-over. Two of them would be a fork.",
        where=found.request,
    )


_DROP: Final = (
    "Ask them for their consent (casemate dataset consent), or hand over without these datasets"
    " (--drop), whose keys are then destroyed."
)


def consent_missing(datasets: Sequence[str], mend: str = _DROP) -> LedgerError:
    """``ledger.consent-missing``."""
    return LedgerError(
        "ledger.consent-missing",
        f"The owners of {len(datasets)} datasets did not sign: {' '.join(datasets[:8])}.",
        mend=mend,
        where=datasets[0] if datasets else "",
    )


def left_out(store: Store, agreed: Collection[str]) -> list[str]:
    """The datasets with a key that are not among ``agreed``."""
    rows = store.all("SELECT dataset FROM dataset_keys ORDER BY dataset")
    return [name for (name,) in rows if name not in agreed]


def hand_over(
    store: Store, measurement: str, request: str, agreed: Collection[str], *, drop: bool
) -> HandedOver:
    """Hand the state over to who made ``request`` (its digest), verified to be of ``measurement``.

    ``agreed``: datasets whose owners signed for it; with ``drop`` the others' keys are destroyed,
    and what was quoted on them. Again with the same request gives the same. Raises
    ``ledger.consent-missing``, ``ledger.handed-over`` (to another one).
    """
    before = handed(store)
    if before is not None:
        if before.request != request:
            raise _handed_over(before)
        return before
    with store.anchored() as moved:
        dropped = left_out(store, agreed)
        if not agreed or (dropped and not drop):
            raise consent_missing(dropped)
        for name in dropped:
            _drop(store, name)
        if measurement == consent.running(store):  # the successor's start will not freeze, nor thaw
            consent.use_up(store, measurement)
        models.destroy(store)
        body = HandedOver(
            measurement=measurement, request=request, dropped=tuple(dropped), anchor=moved
        )
        entry = store.append("handover", measurement, body)
        store.run("INSERT INTO handed_over VALUES (?)", entry.sequence)
    store.empty_wal()
    return body


def _drop(store: Store, dataset: str) -> None:
    """Destroy its key, and those of the models, training states and results that were of it."""
    catalog.destroy(store, dataset)
    quotes = "(SELECT quote FROM quote_datasets WHERE dataset = ?)"
    store.run(f"UPDATE quotes SET model_key = zeroblob(32) WHERE digest IN {quotes}", dataset)
    jobs = "(SELECT job FROM job_datasets WHERE dataset = ?)"
    store.run(
        f"UPDATE jobs SET result_key = zeroblob(32) WHERE state = 'committed' AND id IN {jobs}",
        dataset,
    )
    store.run(f"DELETE FROM states WHERE job IN {jobs}", dataset)


def export(disk: Disk, key: bytes, new_key: bytes, *, same_anchor: bool) -> None:
    """Write the successor's copy under ``new_key`` into :data:`FOLDER`. The store is not open.

    ``same_anchor``: the successor has the same anchor, which it goes on from; another begins anew.
    """

    def unmark(connection: apsw.Connection) -> None:
        connection.execute("DELETE FROM handed_over")
        if not same_anchor:
            connection.execute(
                "UPDATE anchor SET name = NULL, count = NULL, before = NULL, step = NULL"
            )

    rekey.copy(disk, key, new_key, FOLDER, unmark)
