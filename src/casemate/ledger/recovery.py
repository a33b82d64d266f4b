"""A start: what the store takes up from the boots before this one."""

from __future__ import annotations

from casemate.ledger import ledger
from casemate.ledger.store import Link, Store
from casemate.spec import codec
from casemate.spec.evidence import Attestation
from casemate.spec.log import Started


def start(store: Store, attestation: Attestation, *, software: str, measurement: str) -> Link:
    """Put this boot into the log with the attestation that binds its keys, and take over or abandon
    the jobs that another boot left reserved or running. Once a boot, before anything else, and
    after ``Store.hold`` has held the state against its anchor."""
    raw = codec.encode(attestation)
    digest = codec.digest(attestation)
    with store.anchored() as moved:
        body = Started(software=software, measurement=measurement, attestation=digest, anchor=moved)
        entry = store.append("start", store.boot.hex(), body)
        store.run("INSERT INTO attestations VALUES (?, ?, ?)", store.boot, digest, raw)
        ledger.settle_left(store)
        return entry
