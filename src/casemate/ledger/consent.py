"""The owners' consents, and what is frozen without them.

A dataset is accepted under the measurement at which it was registered. A start under another one
freezes it, unless its owner signed for that measurement before; the signature is used up by the
start, so that going back to earlier software needs a new one. One for the software that runs stays
until a hand-over to another machine with that software, or until it starts after other software.
A dataset has one at a time, the newest. A recovery freezes all datasets until each owner consents
to it. What is frozen gets no quotes, no jobs, and gives out no key.
"""

from __future__ import annotations

from typing import Final, TypeVar

from casemate.accounting.filters import FEMTO, SATURATED, RdpFilter
from casemate.ledger import catalog, log
from casemate.ledger.store import Link, Store
from casemate.seal import dsse
from casemate.spec import canonical, codec
from casemate.spec.consent import (
    CONSENT_TYPE,
    Consent,
    Consented,
    Recovered,
    RecoveryConsent,
    SoftwareConsent,
)
from casemate.spec.errors import CasemateError, PolicyError
from casemate.spec.identity import PublicIdentity
from casemate.spec.job import Charge
from casemate.spec.log import Started
from casemate.spec.receipt import LogEntry

# `frozen.accepted` of a dataset that waits for consent to a recovery; no measurement, which is hex.
RECOVERY: Final = "recovery"

T = TypeVar("T")


def refuse(message: str, where: str) -> PolicyError:
    """``policy.consent``."""
    return PolicyError(
        "policy.consent",
        message,
        mend="Let the dataset's owner sign a new one: casemate dataset consent.",
        where=where,
    )


def read(envelope: str, owner: PublicIdentity) -> Consent:
    """What ``owner`` signed. Raises ``policy.consent``."""
    try:
        kind, payload = dsse.verify(envelope, {owner.id: owner.sign_key})
        if kind != CONSENT_TYPE:
            raise refuse(f"The envelope holds {kind[:60]!r}, no consent.", owner.id)
        named = canonical.decode(payload)
        found = named.get("type") if isinstance(named, dict) else None
        if found == "consent-software/v1":
            return codec.decode(SoftwareConsent, payload)
        return codec.decode(RecoveryConsent, payload)
    except PolicyError:
        raise
    except CasemateError as e:
        raise refuse(f"The consent does not hold: {e.message}", owner.id) from None


def signed(store: Store, envelope: str) -> tuple[str, Consent]:
    """Who signed an envelope that came without a word of whose it is, and what."""
    try:
        whole = canonical.decode(envelope.encode())
        signatures = whole["signatures"] if isinstance(whole, dict) else None
        one = signatures[0] if isinstance(signatures, list) else None
        owner = one["keyid"] if isinstance(one, dict) else None
    except (CasemateError, KeyError, IndexError):
        owner = None
    if not isinstance(owner, str):
        raise refuse("This is no consent: no envelope with one signature.", "")
    return owner, read(envelope, catalog.identity(store, owner))


def give(store: Store, envelope: str, owner: str) -> None:
    """Take ``owner``'s consent into the log; again changes nothing.

    Raises ``PolicyError`` ``policy.consent`` for one that is not the owner's, or is for another
    log or recovery; ``policy.revoked``; ``data.unknown-dataset``.
    """
    with store.transaction():
        take(store, envelope, owner)


def take(store: Store, envelope: str, owner: str) -> None:
    """As :func:`give`, inside a transaction."""
    identity = catalog.identity(store, owner)
    found = read(envelope, identity)
    dataset = catalog.owned(store, found.dataset, owner)
    if isinstance(found, SoftwareConsent):
        _to_software(store, found, envelope, identity)
    else:
        _to_recovery(store, found, envelope, identity, dataset)


def _append(store: Store, dataset: str, envelope: str, owner: PublicIdentity) -> Link:
    body = Consented(envelope=envelope, sign_key=owner.sign_key, seal_key=owner.seal_key)
    return store.append("consent", dataset, body)


def _to_software(
    store: Store, found: SoftwareConsent, envelope: str, owner: PublicIdentity
) -> None:
    mine = log.key(store).origin
    if found.origin != mine:
        raise refuse(f"The consent is for the log {found.origin}, not {mine}.", found.dataset)
    before = store.one("SELECT envelope FROM consents WHERE dataset = ?", found.dataset)
    if before == (envelope,):
        return
    _append(store, found.dataset, envelope, owner)
    store.run("DELETE FROM consents WHERE dataset = ?", found.dataset)
    if found.measurement and found.measurement == running(store):
        thaw = "DELETE FROM frozen WHERE dataset = ? AND accepted != ?"
        store.run(thaw, found.dataset, RECOVERY)
    if found.measurement:
        row = (found.dataset, found.measurement, envelope)
        store.run("INSERT INTO consents VALUES (?, ?, ?)", *row)


def _to_recovery(
    store: Store,
    found: RecoveryConsent,
    envelope: str,
    owner: PublicIdentity,
    dataset: catalog.Dataset,
) -> None:
    recovered = last_recovery(store)
    if recovered is None or (recovered.head, recovered.origin) != (found.head, found.next):
        raise refuse(
            "The consent is for another recovery than the one this log went through.", found.dataset
        )
    held = "SELECT 1 FROM frozen WHERE dataset = ? AND accepted = ?"
    if store.one(held, found.dataset, RECOVERY) is None:
        return
    charge = assumed(store, found, dataset)
    if charge is not None:
        account = catalog.account(store, dataset.lineage)
        catalog.set_account(store, dataset.lineage, catalog.EVERYONE, account.add(charge))
    store.run("DELETE FROM frozen WHERE dataset = ? AND accepted = ?", found.dataset, RECOVERY)
    _append(store, found.dataset, envelope, owner)


def assumed(store: Store, found: RecoveryConsent, dataset: catalog.Dataset) -> Charge | None:
    """What is charged for jobs that a recovery forgot, as the owner wants it."""
    rdp = RdpFilter(catalog.budget(store, dataset.lineage))
    if found.charge is not None:
        nano, delta = found.charge.rdp_nano, found.charge.delta_femto
        if len(nano) != len(rdp.capacity) or max(nano) > SATURATED or delta > FEMTO:
            raise refuse("The consent's charge is none of the filter's.", found.dataset)
    if not found.rest:
        return found.charge
    spent = catalog.account(store, dataset.lineage)
    left = zip(rdp.capacity, spent.rdp_nano, strict=True)
    return Charge(
        rdp_nano=tuple(max(0, c - s) for c, s in left),
        delta_femto=max(0, rdp.delta_capacity - spent.delta_femto),
        epsilon=0.0,
    )


def running(store: Store) -> str | None:
    """The measurement of the newest start in the log."""
    raw = store.one(
        "SELECT entry FROM entries WHERE json_extract(CAST(entry AS TEXT), '$.kind') = 'start'"
        " ORDER BY sequence DESC LIMIT 1"
    )
    return None if raw is None else _body(raw[0], Started).measurement


def last_recovery(store: Store) -> Recovered | None:
    """The newest recovery that the log went through: its entry stands where the old log ended."""
    row = store.one(
        "SELECT entry FROM entries JOIN log_keys ON sequence = ended ORDER BY generation DESC"
    )
    return None if row is None else _body(row[0], Recovered)


def _body(raw: bytes, kind: type[T]) -> T:
    return codec.decode(kind, codec.decode(LogEntry, raw).body)


def passes(store: Store, measurement: str) -> None:
    """Inside a transaction, at a start under ``measurement``: what its owners did not accept is
    frozen; their consents to it are used up, if other software ran before."""
    before = running(store)
    if before == measurement:
        return
    if before is not None:
        store.run(
            "INSERT INTO frozen SELECT id, ?1 FROM datasets WHERE state != 'revoked'"
            " AND id NOT IN (SELECT dataset FROM frozen WHERE accepted != ?2)",
            before,
            RECOVERY,
        )
    store.run(
        "DELETE FROM frozen WHERE accepted = ?1 OR accepted != ?2"
        " AND dataset IN (SELECT dataset FROM consents WHERE measurement = ?1)",
        measurement,
        RECOVERY,
    )
    use_up(store, measurement)


def use_up(store: Store, measurement: str) -> None:
    """Inside a transaction: what owners signed for ``measurement`` has served."""
    store.run("DELETE FROM consents WHERE measurement = ?", measurement)


def frozen(store: Store) -> dict[str, tuple[str, ...]]:
    """Each frozen dataset with what it waits for: ``RECOVERY``, and the measurement that its owner
    accepted last."""
    out: dict[str, tuple[str, ...]] = {}
    for dataset, accepted in store.all("SELECT * FROM frozen ORDER BY dataset, accepted"):
        out[dataset] = (*out.get(dataset, ()), accepted)
    return out
