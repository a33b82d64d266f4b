"""Enrolment, upload, and datasets: what owners do."""

from __future__ import annotations

import asyncio

from casemate.ledger import catalog
from casemate.seal import hpke, stream
from casemate.server import records
from casemate.server.service import Call, Reply, Service, page, whole
from casemate.spec import codec, tensors
from casemate.spec.data import DatasetInfo, DatasetKey, DatasetSchema, Policy, Registration
from casemate.spec.errors import DataError, FormatError, LimitError
from casemate.spec.identity import PublicIdentity

OFFSET = "upload-offset"


async def enrol(call: Call) -> PublicIdentity:
    """Make an identity known; again is the same."""
    identity: PublicIdentity = call.body
    store, most = call.service.store, call.service.config.limits.identities
    if records.identities(store) >= most and not records.is_enrolled(store, identity.id):
        raise LimitError(
            "limit.identities",
            f"This server has its {most} identities.",
            mend="Ask the operator.",
        )
    hpke.seal(identity.seal_key, b"", info=b"casemate/enrol/v1")  # a key that can be sealed to
    catalog.enrol(store, identity)
    return identity


async def begin_upload(call: Call) -> dict[str, str]:
    return {"upload": call.service.uploads.begin(call.caller, call.body["size"])}


async def show_upload(call: Call) -> Reply:
    return Reply(headers={OFFSET: str(call.service.uploads.offset(call.id))})


async def append_upload(call: Call) -> Reply:
    stated = whole(call.headers.get(OFFSET, ""))
    if stated is None:
        raise FormatError(
            "format.upload-offset",
            "The header Upload-Offset is not a count of bytes.",
            mend="Send the offset at which the piece begins.",
            where=OFFSET,
        )
    service = call.service
    offset = await service.uploads.take(call.caller, call.id, stated, call.body)
    service.metrics.uploaded.inc(len(call.body))
    return Reply(headers={OFFSET: str(offset)})


def wire_size(schema: DatasetSchema) -> int:
    """Bytes of the wire form (safetensors) that the schema declares, before sealing."""
    prefix, _ = tensors.layout({c.name: (c.dtype, (schema.rows, *c.shape)) for c in schema.columns})
    return len(prefix) + sum(c.row_bytes for c in schema.columns) * schema.rows


def _show(service: Service, dataset: catalog.Dataset, caller: str) -> DatasetInfo:
    return catalog.info(service.store, dataset, budget=True)


async def register(call: Call) -> DatasetInfo:
    """Take an uploaded dataset; its content is checked in a worker, off this request."""
    registration: Registration = call.body
    service = call.service
    call.require_named("registration", "owner", registration.owner, "Register")
    mine = records.datasets_of(service.store, call.caller)
    if registration.dataset not in mine and len(mine) >= service.config.limits.datasets:
        raise LimitError(
            "limit.datasets",
            f"This identity has {len(mine)} datasets, as many as are allowed.",
            mend="Ask the operator for a higher limit.",
        )
    size = service.uploads.complete(call.caller, registration.upload)
    service.require_worker_memory(size)
    due = wire_size(registration.schema)
    if stream.plain_size(size) != due:
        raise DataError(
            "data.size",
            f"The schema declares {due} bytes; the upload holds {stream.plain_size(size)}.",
            mend="Push the dataset again with the schema that belongs to it.",
            where="schema",
        )
    info = Registration.info(
        registration.dataset, codec.digest(registration.policy), codec.digest(registration.schema)
    )
    key = codec.decode(DatasetKey, service.keys.hpke.open(registration.sealed_key, info=info))
    dataset = catalog.register(service.store, registration, key)
    service.queue.check(dataset.id)
    service.queue.changed(dataset.policy)
    return _show(service, dataset, call.caller)


async def list_datasets(call: Call) -> Reply:
    return page(call, catalog.visible, _show)


async def show_dataset(call: Call) -> DatasetInfo:
    return _show(call.service, catalog.dataset(call.service.store, call.id), call.caller)


async def set_policy(call: Call) -> DatasetInfo:
    policy: Policy = call.body
    before = catalog.dataset(call.service.store, call.id).policy
    changed = catalog.set_policy(call.service.store, call.id, call.caller, policy)
    for named in (before, policy):
        call.service.queue.changed(named)
    return _show(call.service, changed, call.caller)


async def set_epoch(call: Call) -> DatasetInfo:
    changed = catalog.advance_epoch(call.service.store, call.id, call.caller, call.body["epoch"])
    call.service.queue.changed(changed.policy)
    return _show(call.service, changed, call.caller)


async def revoke(call: Call) -> None:
    """Destroy the key, end jobs that run on it, then remove the sealed bytes."""
    service = call.service
    dataset = catalog.revoke(service.store, call.id, call.caller)
    service.queue.changed(dataset.policy)
    await service.queue.stop_revoked(dataset.id)
    await asyncio.to_thread(service.uploads.drop, dataset.registration.upload)
