"""Owners' consents to other software or to a recovery, over the attested line."""

from __future__ import annotations

import tomllib

from casemate.attest.trust import Trust
from casemate.ledger import catalog, consent
from casemate.server.service import Call
from casemate.spec.consent import SoftwareConsent
from casemate.spec.data import DatasetInfo
from casemate.spec.errors import UsageError


def parse_trust(text: str) -> Trust:
    """The trust policy in a consent. Raises ``usage.trust``."""
    if text.partition(":")[0] == "simulated":
        return Trust.parse(text)
    try:
        return Trust.read(tomllib.loads(text))
    except tomllib.TOMLDecodeError as e:
        raise UsageError(
            "usage.trust",
            f"The trust policy in the consent is no TOML: {e}.",
            mend="Sign for a policy that casemate reads: docs/evidence.md.",
            where="trust",
        ) from None


async def give(call: Call) -> DatasetInfo:
    """Take a consent into the log; what waited for it goes on."""
    service, envelope = call.service, call.body["envelope"]
    found = consent.read(envelope, catalog.identity(service.store, call.caller))
    if found.dataset != call.id:
        raise consent.refuse(f"The consent is for {found.dataset[:60]}.", call.id)
    if isinstance(found, SoftwareConsent) and found.measurement:
        parse_trust(found.trust)
    consent.give(service.store, envelope, call.caller)
    service.queue.check(call.id)
    service.queue.wake()
    dataset = catalog.dataset(service.store, call.id)
    service.queue.changed(dataset.policy)
    return catalog.info(service.store, dataset, budget=True)
