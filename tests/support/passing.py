"""People with real keys, and what they sign when a state passes on."""

from __future__ import annotations

from functools import cache
from typing import Any

from casemate.ledger import fsck, log, recovery
from casemate.ledger.store import Store
from casemate.seal import dsse
from casemate.seal.identity import Identity
from casemate.seams import Disk
from casemate.spec import codec
from casemate.spec.consent import (
    CONSENT_TYPE,
    RecoveryConsent,
    RecoveryRequest,
    SoftwareConsent,
)
from support.ledgers import KEY, CountingRng, attestation, boot

OLD, NEW, OTHER = "aa" * 48, "bb" * 48, "cc" * 48


@cache
def owner(name: str = "owner") -> Identity:
    return Identity.generate(name, CountingRng(sum(name.encode())))


def signed(by: Identity, value: object, kind: str = CONSENT_TYPE) -> str:
    return dsse.sign(kind, codec.encode(value), by.sign, by.id)


def to_software(
    store: Store, dataset: str, measurement: str = NEW, by: Identity | None = None, **more: Any
) -> str:
    origin = more.pop("origin", log.key(store).origin)
    trust = more.pop("trust", "simulated" if measurement else "")
    value = SoftwareConsent(origin=origin, dataset=dataset, measurement=measurement, trust=trust)
    return signed(by or owner(), value)


def to_recovery(
    asked: RecoveryRequest, dataset: str, by: Identity | None = None, **more: Any
) -> str:
    fields = {"head": asked.head, "next": asked.next, "dataset": dataset} | more
    return signed(by or owner(), RecoveryConsent(**fields))


def opened(disk: Disk, number: int, key: bytes = KEY, folder: str = "ledger") -> Store:
    """The store, not started."""
    return Store.open(disk, key, boot(number), CountingRng(number), folder=folder)


def started(disk: Disk, number: int, measurement: str = OLD, key: bytes = KEY) -> Store:
    store = opened(disk, number, key)
    try:
        recovery.start(store, attestation(store), software="a test", measurement=measurement)
    except BaseException:
        store.close()
        raise
    return store


def sound(store: Store) -> None:
    """The independent checker finds nothing."""
    assert fsck.check(store.all).findings == []


def kinds(store: Store) -> list[str]:
    """The kinds of all entries."""
    sql = "SELECT json_extract(CAST(entry AS TEXT), '$.kind') FROM entries ORDER BY sequence"
    return [kind for (kind,) in store.all(sql)]
