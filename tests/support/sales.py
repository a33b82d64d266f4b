"""Sales of deployed models: people with real keys, a model in a store, receipts as servers sign
them."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from casemate.ledger import catalog, log, models, sales
from casemate.ledger.sales import Sold
from casemate.ledger.store import Store
from casemate.seal import dsse, hpke
from casemate.seal.identity import Identity
from casemate.server.keys import BootKeys
from casemate.server.sales import sign_receipt
from casemate.spec import codec
from casemate.spec.messages import Serving
from casemate.spec.sale import SALE_TYPE, Sale
from casemate.spec.serving import Deployment, ServePolicy, TensorSpec
from support.ledgers import hexes, receipt_key
from support.passing import owner

MODEL = "model_" + hexes("model", 32)
DIGEST = "sha256:" + hexes("a model", 64)
KEY = b"m" * 32
X = TensorSpec(name="x", dtype="f32", shape=(3,))


def seller() -> Identity:
    return owner("seller")


def buyer() -> Identity:
    return owner("buyer")


def enrol(store: Store, *people: Identity) -> None:
    for person in people:
        catalog.enrol(store, person.public)


def deploy(store: Store, name: str = "model", by: Identity | None = None) -> models.Model:
    """A model of the seller's, deployed; all parties are enrolled."""
    enrol(store, seller(), buyer())
    by = by or seller()
    made = Deployment(
        model="model_" + hexes(name, 32), owner=by.id, name="a", policy=ServePolicy(callers=()),
        model_digest=DIGEST, upload=catalog.add_upload(store, by.id, 1000), sealed_key=b"sealed",
    )  # fmt: skip
    serving = Serving(model_digest=DIGEST, inputs=(X,), outputs=(X,), parameters=3, slots=1)
    return models.deploy(store, made, KEY, serving, "00")


def terms(store: Store, **changes: Any) -> Sale:
    """The sale of :data:`MODEL` to the buyer."""
    made = Sale(
        origin=log.key(store).origin, model=MODEL, model_digest=DIGEST, seller=seller().id,
        buyer=buyer().id, terms="10 crowns",
    )  # fmt: skip
    return replace(made, **changes)


def signed(sale: Sale, by: Identity | None = None, kind: str = SALE_TYPE) -> str:
    by = by or seller()
    return dsse.sign(kind, codec.encode(sale), by.sign, by.id)


def receipt(store: Store, sale: Sale, envelope: str, by: Identity | None = None) -> str:
    """The envelope that this boot's server would sign."""
    keys = BootKeys(store.boot, None, None, receipt_key(store.boot), None)  # type: ignore[arg-type]
    return sign_receipt(keys, True, sale, envelope, (by or seller()).public)


def sell(store: Store, **changes: Any) -> Sold:
    """A sale as the server makes one."""
    envelope = signed(terms(store, **changes))
    sale = sales.read(store, envelope, seller().id, terms(store, **changes).model)
    sealed = hpke.seal(buyer().public.seal_key, KEY, info=sale.info)
    return sales.grant(store, sale, sealed, receipt(store, sale, envelope))
