"""What a stopped server's folder holds, against what its clients were told: read from a copy in
memory, by the start's own checks and the ledger's own questions."""

from __future__ import annotations

import contextlib
import os
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass

from casemate.ledger import catalog, ledger, quotes
from casemate.ledger.copy import CopyDisk
from casemate.ledger.store import Store
from casemate.seams import Disk, OsRng
from casemate.server.config import Limits
from casemate.server.keeping import STORE_LABEL
from casemate.server.uploads import Uploads
from casemate.spec import codec
from casemate.spec.errors import CasemateError
from casemate.tee.simulated import SimulatedTee, _sealing_secret
from support.simserver import charged, findings, granted, spent, verdicts
from torture.model import ENDED, Model, Violation, demand


@dataclass(frozen=True)
class Kept:
    """As much of a service as the questions of ``support.simserver`` need."""

    store: Store
    disk: Disk


def store_key(disk: Disk) -> bytes:
    """The store's key under the simulated TEE, without its certificates."""
    tee = object.__new__(SimulatedTee)
    tee._secret = _sealing_secret(disk, OsRng())
    return tee.sealing_key(STORE_LABEL)


@contextlib.contextmanager
def opened(disk: Disk, key: bytes) -> Iterator[Kept]:
    """The store of a stopped server, on a copy. Raises :class:`Violation` for what would refuse a
    start."""
    copied = CopyDisk(disk)
    try:
        store = Store.open(copied, key, os.urandom(16), OsRng())
    except CasemateError as e:
        raise Violation(f"the next start is refused: {e}") from e
    try:
        yield Kept(store, copied)
    finally:
        store.close()


def check(kept: Kept, model: Model, journal: Counter[str]) -> None:
    """Nothing that was acknowledged is missing, nothing was read without a debit.

    ``journal``: how often workers began to read for each request digest.
    """
    wrong = findings(kept)  # type: ignore[arg-type]
    demand(not wrong, f"fsck: {wrong[:3]}")
    try:
        _check_things(kept, model)
    except CasemateError as e:
        raise Violation(f"lost: {e}") from e
    sums = {name: spent(kept, name) for name in model.datasets}  # type: ignore[arg-type]
    model.reads = journal
    model.check_spent(charged(kept), granted(kept), sums)  # type: ignore[arg-type]


def _check_things(kept: Kept, model: Model) -> None:
    store = kept.store
    for who in model.enrolled:
        catalog.identity(store, who)
    for name in model.datasets:
        found = catalog.dataset(store, name)
        demand(found.policy_digest in model.values[("policy", name)], f"{name}: another policy")
        low, high = model.epochs[name]
        demand(low <= found.epoch <= high, f"{name} is in epoch {found.epoch}")
        demand(name not in model.revoked or found.state == "revoked", f"{name} is not revoked")
        demand(name in model.revoking or found.state != "revoked", f"{name} is revoked by nobody")
    uploads = Uploads.__new__(Uploads)
    uploads._disk, uploads._store, uploads._limits = kept.disk, store, Limits()
    uploads._stopped = None
    for name, offset in model.offsets.items():
        if name not in model.used:
            have = uploads.offset(name)
            demand(have >= offset, f"{name}: {have} of {offset} acknowledged bytes")
    for digest in model.quotes:
        quotes.get(store, digest)
    for (owner, digest), said in model.values.items():
        if owner == "policy":
            continue
        counts, words = verdicts(kept, digest)  # type: ignore[arg-type]
        for name, word in words.items():
            if counts and catalog.dataset(store, name).owner == owner:
                demand((word or "") in said, f"{digest}: {said} was said, {word} is kept")
    for job, state in model.jobs.items():
        now = ledger.job(store, job)
        shown = "failed" if now.state == "abandoned" else now.state
        demand(state not in ENDED or shown == state, f"{job} was {state} and is {shown}")
        if state == "done":
            demand(kept.disk.exists(now.blob or "?"), f"{job} is done and has no result")
    for job, receipt in model.receipts.items():
        demand(codec.encode(ledger.bundle(store, job)) == receipt, f"{job}: another receipt")
    for job, result in model.results.items():
        file = kept.disk.open(ledger.job(store, job).blob or "?")
        sealed = file.read(0, file.size())
        file.close()
        demand(result.endswith(sealed) and bool(sealed), f"{job}: another result")
