"""Deployed models, for ``fsck``: each is whole, no caller has taken more than its calls, and the
sales are those of the log."""

from __future__ import annotations

import hashlib

from casemate.ledger.fsck_replay import Replay, Rows, commitment
from casemate.spec import codec
from casemate.spec.messages import Serving
from casemate.spec.sale import Sale
from casemate.spec.serving import Deployment, ServePolicy


def compare(replay: Replay, rows: Rows) -> None:
    """Against the log and the uploads."""
    if not rows("SELECT 1 FROM sqlite_schema WHERE name = 'models'"):
        return  # a state from before there were any
    uploads = {
        name: (owner, used) for name, owner, used in rows("SELECT id, owner, used_by FROM uploads")
    }
    deployments: dict[str, Deployment] = {}
    policies: dict[str, ServePolicy] = {}
    for name, owner, raw, policy, digest, serving, key, _ in rows("SELECT * FROM models"):
        deployments[name] = deployment = codec.decode(Deployment, raw)
        policies[name] = found = codec.decode(ServePolicy, policy)
        replay.expect(
            (deployment.model, deployment.owner) == (name, owner)
            and owner in replay.identities
            and uploads.get(deployment.upload) == (owner, name)
            and codec.digest(found) == digest
            and found.epoch >= deployment.policy.epoch
            and codec.decode(Serving, serving).model_digest == deployment.model_digest
            and len(key) == 32,
            f"model {name} does not agree with its rows",
        )
    for name, caller, calls in rows("SELECT model, caller, calls FROM model_calls"):
        of = policies.get(name)
        replay.expect(
            of is not None
            and caller in replay.identities
            and of.calls is not None
            and 0 < calls <= of.calls,
            f"what {caller} has called of model {name} is not within its calls",
        )
    _compare_sales(replay, rows, deployments)


def _compare_sales(replay: Replay, rows: Rows, deployments: dict[str, Deployment]) -> None:
    """Each is that of one entry; what is sealed to its buyer goes when its model goes."""
    left = dict(replay.sales)
    for name, model, seller, buyer, raw, salt, entry, receipt, key in rows("SELECT * FROM sales"):
        sale = codec.decode(Sale, raw)
        place, said, _ = left.pop(commitment(salt, codec.digest(sale)), (None, "", b""))
        digest = "sha256:" + hashlib.sha256(receipt.encode()).hexdigest()
        replay.expect(
            (sale.id, sale.model, sale.seller, sale.buyer) == (name, model, seller, buyer)
            and {seller, buyer} <= replay.identities
            and place == entry
            and sale.origin == replay.passing.origin(entry)
            and said == commitment(salt, digest),
            f"sale {name} is not as the log says",
        )
        of = deployments.get(model)
        replay.expect(
            (key is None) == (of is None)
            and (of is None or (of.owner, of.model_digest) == (seller, sale.model_digest)),
            f"sale {name} does not agree with its model",
        )
    replay.expect(not left, "sales are missing")
