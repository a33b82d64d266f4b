"""A witness that an owner replaced: what it can still cosign (LIMITATIONS.md, "Witnesses")."""

from __future__ import annotations

import pytest

from casemate.ledger import catalog, ledger, log
from casemate.ledger.store import Store
from casemate.seal import checkpoint
from casemate.seal.checkpoint import Checkpoint, Request
from casemate.spec import merkle
from casemate.spec.errors import JobError
from casemate.witness.decide import Accepted, decide
from support.disk import SimDisk
from support.ledgers import OPEN, Witness, changed_policy, commit, push, queue
from support.passing import owner, started


class Honest(Witness):
    """Cosigns by the witness's own rule; it never forgets."""

    held: dict[str, Checkpoint]

    def ask(self, store: Store) -> bool:
        signed = log.sign(store)
        head = checkpoint.read(signed.text)
        old = self.held[head.origin].size if head.origin in self.held else 0
        proof = merkle.consistency(old, head.size, store.node) if old <= head.size else []
        asked = str(Request(min(old, head.size), tuple(proof), signed)).encode()
        found = decide(self.held, asked, {head.origin: log.key(store).verifier})
        if not isinstance(found, Accepted):
            return False
        self.held[head.origin] = found.head
        log.cosign(store, self.sign(signed), [self.verifier])
        return True


def honest(name: str) -> Honest:
    made = Honest(name)
    made.held = {}
    return made


@pytest.mark.parametrize("saw_the_change", [False, True])
def test_one_reserved_job_in_two_branches(saw_the_change: bool) -> None:
    """The owner names another witness because the operator makes the first look dead. What keeps a
    copy from before the change from going on is that the first saw it, or is stopped."""
    first, second = honest("first.test/w"), honest("second.test/w")
    disk = SimDisk()
    store = started(disk, 1)
    named = changed_policy(OPEN, witnesses=(first.vkey,), cosignatures=1)
    dataset = push(store, "a", owner().public, policy=named)
    job = queue(store, "1", (dataset,))
    ledger.reserve(store, job)
    assert first.ask(store)
    copy = SimDisk.of(disk.snapshot())
    ledger.begin(store, job)
    changed = changed_policy(OPEN, witnesses=(second.vkey,), cosignatures=1)
    catalog.set_policy(store, dataset, owner().id, changed)
    if saw_the_change:
        assert first.ask(store)
    commit(store, job)
    assert second.ask(store)
    ledger.release(store, job, log.sign(store), b"sealed")
    again = started(copy, 2)
    assert first.ask(again) is not saw_the_change
    if saw_the_change:
        with pytest.raises(JobError, match=r"job\.not-witnessed"):
            ledger.begin(again, job)
        return
    ledger.begin(again, job)
    commit(again, job)
    assert first.ask(again)
    ledger.release(again, job, log.sign(again), b"sealed")
    assert ledger.job(again, job).state == ledger.job(store, job).state == "done"
