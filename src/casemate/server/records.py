"""Questions to the store's tables that only the server asks: counts for limits, what to sweep."""

from __future__ import annotations

from casemate.ledger.store import Store


def identities(store: Store) -> int:
    """How many are enrolled."""
    return int(store.one("SELECT count(*) FROM identities")[0])


def is_enrolled(store: Store, identity: str) -> bool:
    return store.one("SELECT 1 FROM identities WHERE id = ?", identity) is not None


def datasets_of(store: Store, owner: str) -> set[str]:
    """The ids of an owner's datasets, in whatever state."""
    return {id_ for (id_,) in store.all("SELECT id FROM datasets WHERE owner = ?", owner)}


def models_of(store: Store, owner: str) -> int:
    """How many models an identity has deployed."""
    return int(store.one("SELECT count(*) FROM models WHERE owner = ?", owner)[0])


def sales_of(store: Store, seller: str) -> int:
    """How many sales an identity has made."""
    return int(store.one("SELECT count(*) FROM sales WHERE seller = ?", seller)[0])


def quotes_of(store: Store, scientist: str) -> int:
    """How many quotes are kept for a scientist."""
    return int(store.one("SELECT count(*) FROM quotes WHERE scientist = ?", scientist)[0])


def queued(store: Store) -> list[str]:
    """The scientists of the jobs that wait, one each."""
    return [name for (name,) in store.all("SELECT scientist FROM jobs WHERE state = 'queued'")]


def keyless_uploads(store: Store) -> set[str]:
    """Uploads whose keys were destroyed: of revoked datasets, and of models that are gone."""
    sql = (
        "SELECT u.id FROM uploads u JOIN datasets d ON u.used_by = d.id WHERE d.state = 'revoked'"
        " UNION SELECT id FROM uploads WHERE used_by GLOB 'model_*'"
        " AND used_by NOT IN (SELECT id FROM models)"
    )
    return {upload for (upload,) in store.all(sql)}


def spent_models(store: Store) -> list[str]:
    """Uploads of models whose job has ended (an upload serves one quote, a quote one job)."""
    return [
        upload
        for (upload,) in store.all(
            "SELECT u.id FROM uploads u JOIN quotes q"
            " ON json_extract(CAST(q.submission AS TEXT), '$.upload') = u.id"
            " JOIN jobs j ON j.quote = q.digest"
            " WHERE j.state NOT IN ('queued', 'reserved', 'running')"
        )
    ]
