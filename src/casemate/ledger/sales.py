"""Sales of deployed models: a model's stream key, sealed to whom its owner signed it over.

A sale is one durable transaction with its entry in the log. The server seals and signs; what is
kept of the key here opens to the buyer alone, and goes when the model goes. Sale and receipt stay.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field
from typing import Any, Final

from casemate.ledger import catalog, log, models
from casemate.ledger.store import Store
from casemate.seal import dsse
from casemate.spec import codec
from casemate.spec.errors import CasemateError, ModelError, PolicyError
from casemate.spec.evidence import Attestation
from casemate.spec.log import SALT_BYTES, Granted, commitment
from casemate.spec.receipt import LogEntry, ReceiptBundle
from casemate.spec.sale import SALE_TYPE, Sale


@dataclass(frozen=True, slots=True)
class Sold:
    """A sale as it stands. ``entry``: the place of its grant in the log. ``receipt``: an envelope.
    ``sealed_key``: ``None`` once the model is gone."""

    sale: Sale
    salt: bytes
    entry: int
    receipt: str
    sealed_key: bytes | None = field(repr=False)


_SELECT: Final = "SELECT sale, salt, entry, receipt, sealed_key FROM sales"


def _sold(row: tuple[Any, ...]) -> Sold:
    return Sold(codec.known(Sale, row[0]), *row[1:])


def unknown(id: str) -> ModelError:
    """Also for one that exists but that the caller has no part in."""
    return ModelError(
        "model.unknown-sale",
        f"There is no sale {id[:60]!r} that you have a part in.",
        mend="List what you sold and bought: casemate model sales.",
        status=404,
    )


def find(store: Store, id: str) -> Sold | None:
    row = store.one(f"{_SELECT} WHERE id = ?", id)
    return None if row is None else _sold(row)


def sold(store: Store, id: str) -> Sold:
    """``ModelError`` ``model.unknown-sale`` (404) if there is none."""
    found = find(store, id)
    if found is None:
        raise unknown(id)
    return found


def sales(store: Store, identity: str) -> list[Sold]:
    """What an identity sold or bought, oldest first."""
    sql = f"{_SELECT} WHERE ?1 IN (seller, buyer) ORDER BY entry"
    return [_sold(row) for row in store.all(sql, identity)]


def refuse(message: str, where: str) -> PolicyError:
    """``policy.sale``."""
    return PolicyError(
        "policy.sale",
        message,
        mend="Let the model's owner sign a new one: casemate model grant.",
        where=where,
    )


def read(store: Store, envelope: str, seller: str, id: str) -> Sale:
    """What ``seller`` signed of the deployed model ``id``, which must be theirs.

    Raises ``PolicyError`` ``policy.sale`` for another's word, or one on another model or log;
    ``AuthError`` ``auth.unknown-identity`` for a buyer who never enrolled; ``model.unknown``.
    """
    identity = catalog.identity(store, seller)
    try:
        kind, payload = dsse.verify(envelope, {identity.id: identity.sign_key})
        if kind != SALE_TYPE:
            raise refuse(f"The envelope holds {kind[:60]!r}, no sale.", id)
        sale = codec.decode(Sale, payload)
    except PolicyError:
        raise
    except CasemateError as e:
        raise refuse(f"The sale does not hold: {e.message}", id) from None
    model, mine = models.model(store, id), log.key(store).origin
    for name, said, due in (
        ("model", sale.model, model.id),
        ("model_digest", sale.model_digest, model.deployment.model_digest),
        ("seller", sale.seller, seller),
        ("owner", seller, model.owner),
        ("origin", sale.origin, mine),
    ):
        if said != due:
            raise refuse(f"The sale's {name} is {said[:80]}, not {due}.", name)
    catalog.identity(store, sale.buyer)
    return sale


def grant(store: Store, sale: Sale, sealed_key: bytes, receipt: str) -> Sold:
    """Keep a sale that :func:`read` gave, and put it into the log; again changes nothing.

    ``sealed_key``: the model's stream key, sealed to the buyer; ``receipt``: the signed envelope.
    """
    with store.transaction():
        before = find(store, sale.id)
        if before is not None:
            return before
        models.model(store, sale.model)
        salt = store.rng.bytes(SALT_BYTES)
        digest = "sha256:" + hashlib.sha256(receipt.encode()).hexdigest()
        body = Granted(sale=commitment(salt, codec.digest(sale)), receipt=commitment(salt, digest))
        entry = store.append("grant", body.sale, body)
        store.run(
            "INSERT INTO sales VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?)",
            sale.id,
            sale.model,
            sale.seller,
            sale.buyer,
            codec.encode(sale),
            salt,
            entry.sequence,
            receipt,
            sealed_key,
        )
        return sold(store, sale.id)


def bundle(store: Store, id: str) -> ReceiptBundle:
    """The receipt of a sale, proved under :func:`casemate.ledger.log.covering`."""
    found = sold(store, id)
    entry = store.link(found.entry).entry
    boot = codec.decode(LogEntry, entry).boot
    (attestation,) = store.one("SELECT attestation FROM attestations WHERE boot = ?", boot)
    return ReceiptBundle(
        envelope=found.receipt,
        attestation=codec.decode(Attestation, attestation),
        entry=entry,
        salt=found.salt,
        proof=str(log.prove(store, found.entry, log.covering(store, found.entry))),
    )
