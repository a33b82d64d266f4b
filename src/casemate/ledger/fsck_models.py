"""Deployed models, for ``fsck``: each is whole, and no caller has taken more than its calls."""

from __future__ import annotations

from casemate.ledger.fsck_replay import Replay, Rows
from casemate.spec import codec
from casemate.spec.messages import Serving
from casemate.spec.serving import Deployment, ServePolicy


def compare(replay: Replay, rows: Rows) -> None:
    """Against the log's identities and the uploads."""
    if not rows("SELECT 1 FROM sqlite_schema WHERE name = 'models'"):
        return  # a state from before there were any
    uploads = {
        name: (owner, used) for name, owner, used in rows("SELECT id, owner, used_by FROM uploads")
    }
    policies: dict[str, ServePolicy] = {}
    for name, owner, raw, policy, digest, serving, key, _ in rows("SELECT * FROM models"):
        deployment = codec.decode(Deployment, raw)
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
