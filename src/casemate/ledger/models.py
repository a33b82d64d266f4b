"""Deployed models: their keys, policies, and how often each caller has called.

Counts are taken before a call is answered and never given back. They are written in blocks, so that
not every call waits for the disk: a crash costs a caller what was left of one block.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Final

from casemate.ledger import catalog
from casemate.ledger.store import Store
from casemate.spec import codec
from casemate.spec.errors import ModelError, PolicyError
from casemate.spec.messages import Serving
from casemate.spec.serving import Deployment, ServePolicy

# Of a caller's calls, a block is this part, and at most so many.
_BLOCKS: Final = 64
_BLOCK: Final = 1024


@dataclass(frozen=True, slots=True)
class Model:
    """A deployed model as it stands. ``policy`` may be newer than ``deployment.policy``;
    ``accepted``: the software's measurement under which its owner let it run, or "" for none."""

    id: str
    owner: str
    deployment: Deployment
    policy: ServePolicy
    policy_digest: str
    serving: Serving
    key: bytes = field(repr=False)
    accepted: str


_SELECT: Final = (
    "SELECT id, owner, deployment, policy, policy_digest, serving, model_key, accepted FROM models"
)


def _model(row: tuple[Any, ...]) -> Model:
    id_, owner, deployment, policy, digest, serving, key, accepted = row
    return Model(
        id_,
        owner,
        codec.known(Deployment, deployment),
        codec.known(ServePolicy, policy),
        digest,
        codec.known(Serving, serving),
        key,
        accepted,
    )


def unknown(id: str) -> ModelError:
    """Also for one that exists but that the caller may not know of."""
    return ModelError(
        "model.unknown",
        f"There is no deployed model {id[:60]!r} here that you may call.",
        mend="List the models that you own or are admitted to.",
        status=404,
    )


def model(store: Store, id: str) -> Model:
    """``ModelError`` ``model.unknown`` (404) if there is none."""
    row = store.one(f"{_SELECT} WHERE id = ?", id)
    if row is None:
        raise unknown(id)
    return _model(row)


def models(store: Store) -> list[Model]:
    """All, by id."""
    return [_model(row) for row in store.all(f"{_SELECT} ORDER BY id")]


def visible(store: Store, identity: str, after: str, count: int) -> list[Model]:
    """What ``identity`` owns or may call. By id, the next ``count`` behind the id ``after``; "" is
    before all."""
    sql = (
        f"{_SELECT} WHERE id > ?2 AND (owner = ?1 OR {catalog.names('callers')})"
        " ORDER BY id LIMIT ?3"
    )
    return [_model(row) for row in store.all(sql, identity, after, count)]


def same(store: Store, deployment: Deployment) -> Model | None:
    """The model that this very deployment has made before. Raises ``policy.model-taken`` for the
    same id with another body, and for that of a model which was sold and is gone."""
    row = store.one(f"{_SELECT} WHERE id = ?", deployment.model)
    if row is None:
        if store.one("SELECT 1 FROM sales WHERE model = ?", deployment.model) is not None:
            raise _taken(deployment.model, "was sold, and is gone: its sales are of no other")
        return None
    found = _model(row)
    if found.deployment != deployment:
        raise _taken(deployment.model, "is deployed with another body")
    return found


def _taken(id: str, why: str) -> PolicyError:
    return PolicyError(
        "policy.model-taken",
        f"The model {id} {why}.",
        mend="Deploy again: that makes a new id.",
        status=409,
    )


def deploy(
    store: Store, deployment: Deployment, key: bytes, serving: Serving, measurement: str
) -> Model:
    """A model that a worker has proved and warmed; the same deployment again changes nothing.

    Raises ``policy.model-taken``, ``data.unknown-upload``, ``data.upload-used``.
    """
    with store.transaction():
        if (found := same(store, deployment)) is not None:
            return found
        catalog.identity(store, deployment.owner)
        catalog.use_upload(store, deployment.upload, deployment.owner, deployment.model)
        store.run(
            "INSERT INTO models VALUES (?, ?, ?, ?, ?, ?, ?, ?)",
            deployment.model,
            deployment.owner,
            codec.encode(deployment),
            codec.encode(deployment.policy),
            codec.digest(deployment.policy),
            codec.encode(serving),
            key,
            measurement,
        )
        return model(store, deployment.model)


def require_successor(found: Model, policy: ServePolicy) -> None:
    """The policy may follow that of the model. Raises ``policy.epoch-back``, and
    ``policy.calls-fixed`` where the number of calls changes and the epoch does not: what was
    counted would then be of neither."""
    before = found.policy
    if policy.epoch < before.epoch:
        raise PolicyError(
            "policy.epoch-back",
            f"The epoch is {before.epoch} and only goes forward; {policy.epoch} was given.",
            mend="Name a later epoch.",
            status=409,
        )
    if policy.epoch == before.epoch and policy.calls != before.calls:
        calls = "not counted" if before.calls is None else before.calls
        raise PolicyError(
            "policy.calls-fixed",
            f"In epoch {before.epoch} the calls of each caller are {calls}.",
            mend="Give another number together with a later epoch; counts begin anew then.",
            status=409,
        )


def set_policy(
    store: Store, id: str, policy: ServePolicy, serving: Serving, measurement: str
) -> Model:
    """Replace the policy, and let the model run under the software that runs. ``serving``: what a
    worker says of it under this policy. Raises as :func:`require_successor`."""
    with store.transaction():
        found = model(store, id)
        require_successor(found, policy)
        if policy.epoch > found.policy.epoch:
            store.run("DELETE FROM model_calls WHERE model = ?", id)
        store.run(
            "UPDATE models SET policy = ?, policy_digest = ?, serving = ?, accepted = ?"
            " WHERE id = ?",
            codec.encode(policy),
            codec.digest(policy),
            codec.encode(serving),
            measurement,
            id,
        )
        return model(store, id)


def undeploy(store: Store, id: str) -> Model:
    """Destroy the model's key, also as it is sealed to buyers: its row is overwritten, and the WAL
    that held it is emptied. The caller drops the upload. It binds an operator who kept an older
    copy of the disk no more."""
    with store.transaction():
        found = model(store, id)
        store.run("UPDATE sales SET sealed_key = NULL WHERE model = ?", id)
        store.run("DELETE FROM model_calls WHERE model = ?", id)
        store.run("DELETE FROM models WHERE id = ?", id)
    store.empty_wal()
    return found


def used(store: Store, id: str, caller: str) -> int:
    """Calls that were counted of a caller in this epoch, whole blocks."""
    row = store.one("SELECT calls FROM model_calls WHERE model = ? AND caller = ?", id, caller)
    return 0 if row is None else int(row[0])


def count(store: Store, id: str, caller: str) -> int:
    """Count a block of calls, durably; how many. Raises ``policy.calls`` when none is left."""
    with store.transaction():
        policy = model(store, id).policy
        assert policy.calls is not None
        before = used(store, id, caller)
        if before >= policy.calls:
            raise PolicyError(
                "policy.calls",
                f"All {policy.calls} calls of this caller in epoch {policy.epoch} are taken.",
                mend="Ask the model's owner for a later epoch.",
                where=id,
            )
        block = max(1, min(_BLOCK, policy.calls // _BLOCKS))
        block = min(block, policy.calls - before)
        store.run(
            "INSERT INTO model_calls VALUES (?1, ?2, ?3)"
            " ON CONFLICT (model, caller) DO UPDATE SET calls = calls + ?3",
            id,
            caller,
            block,
        )
        return block


def freeze(store: Store) -> None:
    """Inside a transaction: no model runs until its owner sets its policy again."""
    store.run("UPDATE models SET accepted = ''")


def destroy(store: Store) -> None:
    """Inside a transaction: no model's key passes to a successor, nor what was sealed to buyers."""
    store.run("UPDATE sales SET sealed_key = NULL")
    store.run("DELETE FROM model_calls")
    store.run("DELETE FROM uploads WHERE used_by IN (SELECT id FROM models)")
    store.run("DELETE FROM models")
