"""Deployed models: what their owners and callers do."""

from __future__ import annotations

import asyncio
import contextlib

from casemate.ledger import models
from casemate.ledger.models import Model
from casemate.seal import calls, stream
from casemate.server import records
from casemate.server.service import Call, Reply, Service, page
from casemate.spec import codec
from casemate.spec.errors import DataError, FormatError, LimitError, PolicyError
from casemate.spec.serving import Deployment, ModelInfo, ServePolicy, plain_size


def _show(service: Service, model: Model, caller: str) -> ModelInfo:
    return ModelInfo(
        model=model.id,
        owner=model.owner,
        name=model.deployment.name,
        policy=model.policy,
        policy_digest=model.policy_digest,
        model_digest=model.deployment.model_digest,
        state="ready" if model.accepted == service.tee.measurement else "frozen",
        inputs=model.serving.inputs,
        outputs=model.serving.outputs,
        parameters=model.serving.parameters,
        slots=model.serving.slots,
        left=service.inference.left(model, caller) if model.policy.admits(caller) else None,
    )


async def deploy(call: Call) -> ModelInfo:
    """Look at the model in a worker, which stays loaded; keep its key. Again is the same."""
    deployment: Deployment = call.body
    service = call.service
    call.require_named("deployment", "owner", deployment.owner, "Deploy")
    due = Deployment.id(deployment.owner, deployment.model_digest, deployment.upload)
    if deployment.model != due:
        raise FormatError(
            "format.field",
            "model is not the id that owner, model_digest and upload give.",
            mend="Send the documented form of this version.",
            where="model",
        )
    if (before := models.same(service.store, deployment)) is not None:
        return _show(service, before, call.caller)
    most = service.config.limits.models
    if records.models_of(service.store, call.caller) >= most:
        raise LimitError(
            "limit.models",
            f"This identity has {most} deployed models, as many as are allowed.",
            mend="Undeploy one, or ask the operator for a higher limit.",
        )
    size = service.uploads.complete(call.caller, deployment.upload, unused=True)
    service.require_worker_memory(size)
    info = Deployment.info(
        deployment.model, deployment.owner, codec.digest(deployment.policy), deployment.model_digest
    )
    key = service.model_key(deployment.sealed_key, info)
    async with service.inference.prepared(deployment, key, deployment.policy) as serving:
        made = models.deploy(service.store, deployment, key, serving, service.tee.measurement)
    service.log.event("model", model=made.id, state="deployed")
    return _show(service, made, call.caller)


async def list_models(call: Call) -> Reply:
    return page(call, models.visible, _show)


async def show_model(call: Call) -> ModelInfo:
    return _show(call.service, models.model(call.service.store, call.id), call.caller)


async def set_policy(call: Call) -> ModelInfo:
    """Replace the policy; it also says that the software that runs may have the model."""
    service = call.service
    policy: ServePolicy = call.body
    found = models.model(service.store, call.id)
    models.require_successor(found, policy)
    async with contextlib.AsyncExitStack() as loaded:
        serving = found.serving
        if (policy.records, policy.slots) != (found.policy.records, found.policy.slots):
            under = service.inference.prepared(found.deployment, found.key, policy)
            serving = await loaded.enter_async_context(under)
        accepted = service.tee.measurement
        changed = models.set_policy(service.store, call.id, policy, serving, accepted)
    if policy.epoch > found.policy.epoch:
        service.inference.forget(call.id)
    return _show(service, changed, call.caller)


async def undeploy(call: Call) -> None:
    """Destroy the key, end the worker, then remove the sealed bytes."""
    service = call.service
    gone = models.undeploy(service.store, call.id)
    service.inference.forget(call.id)
    await service.inference.drop(call.id)
    service.metrics.undeployed(gone.id)
    service.log.event("model", model=gone.id, state="undeployed")
    await asyncio.to_thread(service.uploads.drop, gone.deployment.upload)


def require_accepted(service: Service, model: Model) -> None:
    """Its owner lets the model run under this software. Raises ``policy.frozen``."""
    if model.accepted != service.tee.measurement:
        raise PolicyError(
            "policy.frozen",
            f"The model {model.id} waits for its owner: its state was restored from a backup, or"
            " other software runs.",
            mend="Ask its owner to set its policy again.",
            where=model.id,
        )


async def predict(call: Call) -> Reply:
    """Answer a sealed call. Of its content this process knows the number of records."""
    service = call.service
    started = service.clock.monotonic()
    model = models.model(service.store, call.id)
    require_accepted(service, model)
    opened = calls.open_head(service.keys.hpke, call.id, call.caller, call.body)
    if opened.records > model.policy.records:
        raise LimitError(
            "limit.records",
            f"The call has {opened.records} records; {model.policy.records} are allowed.",
            mend="Call with fewer at once.",
        )
    due = stream.sealed_size(plain_size(model.serving.inputs, opened.records))
    if len(opened.sealed) != due:
        raise DataError(
            "data.inputs-size",
            f"{opened.records} records take {due} sealed bytes; {len(opened.sealed)} came.",
            mend="Compare the inputs with what the model takes: enclave.models.show(ref).inputs.",
        )
    answer = await service.inference.call(model, call.caller, opened)
    service.metrics.predicted(call.id, opened.records, service.clock.monotonic() - started)
    return Reply(answer)
