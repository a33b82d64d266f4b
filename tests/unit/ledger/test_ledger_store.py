"""What a store says once it has stopped, and what it keeps for its anchor."""

from __future__ import annotations

import pytest

from casemate.ledger import fsck
from casemate.ledger.store import Store
from casemate.spec.errors import LedgerError
from support.anchors import FakeAnchor
from support.disk import SimDisk
from support.ledgers import KEY, CountingRng, boot, open_store, push
from support.passing import opened


def stopped(action) -> str:
    with pytest.raises(LedgerError) as e:
        action()
    assert e.value.code == "ledger.stopped"
    return e.value.message


def test_a_disk_error_is_named_by_every_later_call() -> None:
    disk = SimDisk()
    store = open_store(disk)
    disk.fault = (len(disk.trace) + 1, "ENOSPC")
    first = stopped(lambda: push(store))
    assert "No space left" in first
    disk.fault = None
    assert stopped(store.size) == first
    store.close()
    assert stopped(store.size) == first


def test_a_closed_store_says_so() -> None:
    store = open_store(SimDisk())
    store.close()
    assert "it was closed" in stopped(store.size)


def test_an_error_of_the_disk_at_the_start_is_named() -> None:
    disk = SimDisk()
    open_store(disk).close()
    seen = set()
    for at in range(1, 60):
        copy = SimDisk.of(disk.snapshot())
        copy.fault = (at, "EIO")
        try:
            Store.open(copy, KEY, boot(2), CountingRng()).close()
        except LedgerError as e:
            assert "Input/output error" in e.message, (at, e)
            seen.add(e.code)
    assert seen == {"ledger.stopped"}


def test_the_first_contradiction_is_told() -> None:
    disk = SimDisk()
    store = open_store(disk)
    push(store)
    store.run("DELETE FROM nodes WHERE level = 0 AND place = 1")
    first = fsck.check(store.all).findings[0]
    store.close()
    with pytest.raises(LedgerError) as e:
        opened(disk, 2)
    assert e.value.code == "ledger.inconsistent"
    assert e.value.message == f"The store contradicts its log: {first}"


def test_an_anchors_secret_is_made_once() -> None:
    disk = SimDisk()
    store = open_store(disk)
    secret = store.anchor_secret()
    assert len(secret) == 32 and store.anchor_secret() == secret
    assert store.anchor is None and store.stand is None
    store.hold(FakeAnchor())
    store.close()
    store = open_store(disk, 2)
    assert store.anchor_secret() == secret
    store.close()
