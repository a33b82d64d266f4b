"""Heads, signatures and cosignatures of the log as a store keeps it."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import pytest

from casemate.ledger import catalog, fsck, fsck_notes, log, recovery
from casemate.ledger.store import Store
from casemate.seal import checkpoint
from casemate.spec import codec, merkle
from casemate.spec.errors import LedgerError
from casemate.spec.log import Started, dataset_salt
from casemate.spec.receipt import LogEntry
from support.anchors import FakeAnchor
from support.disk import SimDisk
from support.ledgers import OWNER, Witness, attestation, open_store, push
from support.passing import opened, owner, started, to_recovery, to_software

W1, W2 = Witness("w1"), Witness("w2")


@pytest.fixture
def store():
    made = open_store(SimDisk())
    yield made
    made.close()


def test_every_earlier_head_can_be_signed_again(store: Store) -> None:
    push(store)
    leaves = [store.link(i).entry for i in range(store.size())]
    for size in range(store.size() + 1):
        signed = log.sign(store, size)
        head = checkpoint.verify(signed, log.key(store).verifier)
        assert head == log.head(store, size)
        assert (head.size, head.root) == (size, merkle.root(size, merkle.tree(leaves[:size])))
    assert log.sign(store) == log.sign(store, store.size())


def test_a_witness_that_is_silent_takes_nothing_from_the_next(store: Store) -> None:
    push(store)
    log.cosign(store, W2.sign(log.sign(store)), [W1.verifier, W2.verifier])
    assert log.cosigned(store, [W2.vkey], store.size() - 1) == 1


def test_what_was_seen_before_a_recovery_is_told_with_the_logs_name() -> None:
    disk = SimDisk()
    store = started(disk, 1)
    dataset = push(store, "a", owner().public)
    store.empty_wal()
    store.close()
    files = disk.snapshot()
    store = started(disk, 2)
    newest = log.sign(store)
    store.close()
    store = opened(SimDisk.of(files), 3)
    asked = recovery.request(store)
    recovery.recover(store, asked, [to_recovery(asked, dataset)])
    with pytest.raises(LedgerError) as e:
        log.check(store, newest)
    assert (e.value.code, e.value.status, e.value.where) == (
        "ledger.recovered", 409, asked.head.origin,
    )  # fmt: skip
    assert store.all("SELECT generation FROM log_keys ORDER BY generation") == [(1,), (2,)]
    store.close()


def test_owners_are_asked_about_what_is_theirs_and_not_revoked() -> None:
    store = started(SimDisk(), 1)
    by = {name: push(store, name, owner(name).public) for name in ("a", "b", "c")}
    store.run("UPDATE datasets SET state = 'refused' WHERE id = ?", by["b"])
    catalog.revoke(store, by["c"], owner("c").id)
    asked = recovery.request(store)
    # Of what was refused at push nothing is in the log; what was revoked waits for nobody.
    named = {(d.dataset, d.owner) for d in asked.datasets}
    assert named == {(by[name], owner(name).id) for name in ("a", "b")}
    push(store, "d", owner("a").public)
    with pytest.raises(LedgerError) as e:
        recovery.recover(store, asked, [to_recovery(asked, by["a"], owner("a"))])
    assert (e.value.code, e.value.where) == ("ledger.recovery", asked.next)
    asked = recovery.request(store)
    with pytest.raises(Exception, match="none to a recovery") as wrong:
        recovery.recover(store, asked, [to_software(store, by["a"], by=owner("a"))])
    assert wrong.value.where == by["a"]
    store.close()


def test_a_start_says_how_often_the_anchor_was_moved() -> None:
    """And the next one takes the count up from the disk, an older copy does not start."""
    disk, held = SimDisk(), FakeAnchor()

    def start(disk: SimDisk, number: int) -> int | None:
        store = opened(disk, number)
        try:
            store.hold(held)
            entry = recovery.start(store, attestation(store), software="s", measurement="00")
            return codec.decode(Started, codec.decode(LogEntry, entry.entry).body).anchor
        finally:
            store.close()

    assert start(disk, 1) == 1
    old = SimDisk.of(disk.snapshot())
    assert start(disk, 2) == 2
    with pytest.raises(LedgerError, match=r"ledger\.rolled-back"):
        start(old, 3)
    assert start(disk, 4) == 3


def test_a_start_goes_through_a_log_once_that_an_owner_made_long(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Anybody adds entries behind the anchor's newest mark; a tree for each would keep a server
    from starting for hours."""
    store = opened(SimDisk(), 1)
    store.hold(FakeAnchor())
    recovery.start(store, attestation(store), software="s", measurement="00")
    dataset = push(store)
    for epoch in range(1, 40):
        catalog.advance_epoch(store, dataset, OWNER.id, epoch)
    trees, tree = [0], fsck_notes.tree

    def counted(leaves: Sequence[bytes], start: int = 0, count: int | None = None) -> bytes:
        trees[0] += 1
        return tree(leaves, start, count)

    monkeypatch.setattr(fsck_notes, "tree", counted)
    assert fsck.check(store.all).findings == []
    assert trees[0] < 2 * store.size()


def _attestation(store: Store):
    from support.ledgers import attestation

    return attestation(store)


def test_the_salt_of_the_log_is_another_one_than_the_datasets() -> None:
    salt = bytes(range(32))
    assert dataset_salt(salt) == hashlib.sha256(b"casemate/log-salt/v1\0" + salt).digest()
