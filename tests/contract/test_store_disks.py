"""One store, every Disk: what is written is found again, sealed, by the next start alone."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path

import pytest

from casemate.ledger import catalog, fsck, ledger, log
from casemate.ledger.copy import CopyDisk
from casemate.ledger.store import Store
from casemate.seams import Disk, OsDisk
from casemate.spec import merkle
from casemate.spec.errors import AuthError, CasemateError, JobError, LedgerError
from support.disk import SimDisk
from support.ledgers import (
    KEY,
    OTHER,
    OWNER,
    SCIENTIST,
    CountingRng,
    boot,
    entries,
    finish,
    open_store,
    push,
    queue,
    run,
    secret,
    taken,
)

DISKS: dict[str, Callable[[Path], Disk]] = {
    "os": OsDisk,
    "simulated": lambda _: SimDisk(),
    "copy": lambda _: CopyDisk(SimDisk()),
}


@pytest.fixture(params=sorted(DISKS))
def disk(request: pytest.FixtureRequest, tmp_path: Path) -> Disk:
    return DISKS[request.param](tmp_path / "state")


def raw(disk: Disk) -> bytes:
    """All bytes of the store's files."""
    out = b""
    for name in disk.list("ledger") if not isinstance(disk, CopyDisk) else ["store.db"]:
        file = disk.open(f"ledger/{name}")
        out += file.read(0, file.size())
        file.close()
    return out


def test_everything_is_there_at_the_next_start(disk: Disk) -> None:
    store = open_store(disk, 1)
    dataset = push(store)
    job = queue(store, "1", (dataset,))
    bundle = run(store, job)
    before = taken(store, dataset)
    info = catalog.info(store, catalog.dataset(store, dataset), budget=True)
    head = log.head(store)
    store.close()

    store = open_store(disk, 2)
    assert taken(store, dataset) == before == taken(store, dataset, SCIENTIST.id)
    assert catalog.info(store, catalog.dataset(store, dataset), budget=True) == info
    assert ledger.bundle(store, job) == bundle
    assert store.size() == head.size + 1
    assert merkle.root(head.size, store.node) == head.root
    assert log.head(store).origin == head.origin
    store.close()
    assert fsck.verify(disk, KEY).findings == []


def test_the_log_is_a_tree_over_its_entries(disk: Disk) -> None:
    store = open_store(disk, 1)
    run(store, queue(store, "1", (push(store),)))
    kinds = [e.kind for e in entries(store)]
    assert kinds == ["start", "identity", "identity", "register", "reserve", "commit"]
    assert [e.sequence for e in entries(store)] == list(range(6))
    leaves = store.entries()
    assert log.head(store).root == tree_hash(leaves)
    for size in range(7):
        assert merkle.root(size, store.node) == tree_hash(leaves[:size])
    assert store.entries(4, 1) == leaves[4:5] == [store.link(4).entry]
    store.close()


def tree_hash(leaves: list[bytes]) -> bytes:
    """RFC 6962, 2.1."""
    if len(leaves) < 2:
        return hashlib.sha256(b"\0" + leaves[0] if leaves else b"").digest()
    k = 1 << ((len(leaves) - 1).bit_length() - 1)
    return hashlib.sha256(b"\1" + tree_hash(leaves[:k]) + tree_hash(leaves[k:])).digest()


def test_jobs_of_another_boot_are_taken_over_and_charged_once(disk: Disk) -> None:
    store = open_store(disk, 1)
    dataset = push(store)
    jobs = [queue(store, name, (dataset,)) for name in "12"]
    for job in jobs:
        ledger.reserve(store, job)
    ledger.begin(store, jobs[0])
    before = taken(store, dataset)
    store.close()

    store = open_store(disk, 2)
    for job in jobs:
        found = ledger.job(store, job)
        assert (found.state, found.boot, found.takeovers) == ("reserved", boot(2), 1)
        (entry,) = entries(store, found.granted)[:1]
        assert (entry.kind, entry.boot) == ("takeover", boot(2))
        with pytest.raises(JobError):
            finish(store, job)  # what another boot ran is not released
        ledger.begin(store, job)
        finish(store, job)
    assert taken(store, dataset) == before
    store.close()


def test_queued_jobs_outlive_a_restart(disk: Disk) -> None:
    store = open_store(disk, 1)
    job = queue(store, "1", (push(store),))
    store.close()
    store = open_store(disk, 2)
    assert ledger.next_queued(store).id == job
    run(store, job)
    store.close()


def test_a_wrong_key_is_refused_and_changes_nothing(disk: Disk) -> None:
    store = open_store(disk, 1)
    push(store)
    store.close()
    before = raw(disk)
    for key in (b"x" * 32, bytes(32)):
        with pytest.raises(LedgerError) as e:
            open_store(disk, 2, key)
        assert e.value.code == "ledger.key"
        with pytest.raises(LedgerError, match=r"ledger\.key"):
            fsck.verify(disk, key)
    with pytest.raises(LedgerError, match=r"ledger\.key"):
        open_store(disk, 2, b"short")
    assert raw(disk) == before
    open_store(disk, 3).close()


def test_a_boot_instance_is_used_once(disk: Disk) -> None:
    open_store(disk, 1).close()
    for name in (boot(1), b"short"):
        with pytest.raises(LedgerError, match=r"ledger\.boot"):
            Store.open(disk, KEY, name, CountingRng())


def test_no_file_shows_what_is_stored(disk: Disk) -> None:
    store = open_store(disk, 1)
    dataset = push(store)
    key = secret("a").key
    words = (key, key.hex().encode(), OWNER.id.encode(), dataset.encode(), b"owner", b"CREATE")
    assert not any(word in raw(disk) for word in words)
    catalog.revoke(store, dataset, OWNER.id)
    store.close()
    assert not any(word in raw(disk) for word in words)


def test_a_closed_store_answers_nothing(disk: Disk) -> None:
    store = open_store(disk, 1)
    store.close()
    store.close()
    with pytest.raises(LedgerError, match=r"ledger\.stopped"):
        store.size()


def test_uploads_and_identities(disk: Disk) -> None:
    store = open_store(disk, 1)
    catalog.enrol(store, OWNER)
    catalog.enrol(store, OWNER)
    catalog.enrol(store, OTHER)
    assert catalog.identity(store, OWNER.id) == OWNER
    with pytest.raises(AuthError, match=r"auth\.unknown-identity"):
        catalog.identity(store, "id_nobody")
    name = catalog.add_upload(store, OWNER.id, 5)
    assert catalog.upload(store, name, OWNER.id).size == 5
    with pytest.raises(CasemateError, match=r"data\.unknown-upload"):
        catalog.upload(store, name, OTHER.id)
    with pytest.raises(CasemateError, match=r"limit\.uploads"):
        catalog.add_upload(store, OWNER.id, 5, most=1)
    catalog.drop_upload(store, name)
    assert catalog.uploads(store) == []
    assert [e.kind for e in entries(store)] == ["start", "identity", "identity"]
    store.close()


def test_nothing_of_an_undone_transaction_stays(disk: Disk) -> None:
    store = open_store(disk, 1)
    size = store.size()

    def write() -> None:
        with store.transaction():
            catalog_write = "INSERT INTO identities VALUES ('id_x', x'00')"
            store.run(catalog_write)
            raise KeyError("changed my mind")

    with pytest.raises(KeyError):
        write()
    assert store.all("SELECT * FROM identities") == []
    assert store.size() == size
    with pytest.raises(CasemateError, match=r"internal\.ledger"), store.transaction():
        store.run("INSERT INTO dataset_keys VALUES ('ds_x', x'00')")
    catalog.enrol(store, OWNER)
    store.close()


@pytest.mark.parametrize("version", [0, 99])
def test_a_store_of_another_version_is_refused(disk: Disk, version: int) -> None:
    store = open_store(disk, 1)
    store.run(f"PRAGMA user_version = {version}")
    store.close()
    with pytest.raises(LedgerError, match=r"ledger\.version"):
        open_store(disk, 2)


def test_there_is_no_store_to_verify(disk: Disk) -> None:
    with pytest.raises(LedgerError, match=r"ledger\.missing"):
        fsck.verify(disk, KEY)


def test_the_settings_that_durability_rests_on(disk: Disk) -> None:
    store = open_store(disk, 1)
    settings = ("journal_mode", "synchronous", "locking_mode", "secure_delete", "foreign_keys")
    assert [store.one(f"PRAGMA {s}")[0] for s in settings] == ["wal", 2, "exclusive", 1, 1]
    store.close()


def test_two_stores_in_one_process_do_not_meet(tmp_path: Path) -> None:
    first, second = open_store(OsDisk(tmp_path / "a"), 1), open_store(OsDisk(tmp_path / "b"), 1)
    catalog.enrol(first, OWNER)
    assert second.all("SELECT * FROM identities") == []
    first.close()
    catalog.enrol(second, OTHER)
    second.close()
