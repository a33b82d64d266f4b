"""SQLite on a Disk: names, syncs, and what happens after the first error."""

from __future__ import annotations

import apsw
import pytest

from casemate.ledger import catalog, sealed, vfs
from casemate.ledger.copy import CopyDisk
from casemate.ledger.vfs import Mount
from casemate.spec.errors import LedgerError
from support.disk import SimDisk
from support.ledgers import KEY, OWNER, open_store


def test_each_commit_is_synced_before_it_returns() -> None:
    disk = SimDisk()
    store = open_store(disk)
    disk.trace.clear()
    catalog.enrol(store, OWNER)
    assert "sync ledger/store.db-wal" in disk.trace
    # What the sync made durable is enough: everything behind it may be lost.
    again = open_store(disk.power_cycle(), 2)
    assert catalog.identity(again, OWNER.id) == OWNER
    again.close()
    store.close()


def test_a_new_files_name_is_made_durable_with_its_first_sync() -> None:
    disk = SimDisk()
    store = open_store(disk)
    for name in ("store.db", "store.db-wal"):
        created = disk.trace.index(f"create ledger/{name}")
        synced = disk.trace.index(f"sync ledger/{name}", created)
        assert disk.trace[synced + 1] == "sync_folder ledger"
    disk.trace.clear()
    catalog.enrol(store, OWNER)
    assert "sync_folder ledger" not in disk.trace


def test_no_call_reaches_the_disk_after_the_first_error() -> None:
    disk = SimDisk()
    store = open_store(disk)
    disk.fault = (len(disk.trace) + 3, "EIO")
    with pytest.raises(LedgerError, match=r"ledger\.stopped"):
        catalog.enrol(store, OWNER)
    made = len(disk.trace)
    with pytest.raises(LedgerError, match=r"ledger\.stopped"):
        catalog.enrol(store, OWNER)
    store.close()
    assert len(disk.trace) == made


def test_a_failed_sync_is_never_tried_again() -> None:
    disk = SimDisk()
    store = open_store(disk)
    disk.trace.clear()
    catalog.enrol(store, OWNER)
    sync = disk.trace.index("sync ledger/store.db-wal") + 1
    other = SimDisk()
    store = open_store(other)
    other.trace.clear()
    other.fault = (sync, "EIO")
    with pytest.raises(LedgerError):
        catalog.enrol(store, OWNER)
    store.close()
    assert other.trace.count("sync ledger/store.db-wal") == 1
    assert other.trace[-1] == "sync ledger/store.db-wal"


def test_a_name_without_a_mount_does_not_open() -> None:
    mount = Mount(SimDisk(), "x")
    mount.close()
    with pytest.raises(apsw.CantOpenError):
        sealed.connect(mount, KEY)


def test_nothing_is_created_unless_it_is_asked_for() -> None:
    disk = SimDisk()
    mount = Mount(disk, "x")
    with pytest.raises(apsw.CantOpenError, match="'x/db' does not exist"):
        apsw.Connection(mount.uri("db"), flags=apsw.SQLITE_OPEN_URI | apsw.SQLITE_OPEN_READWRITE)
    assert disk.snapshot() == {}
    mount.close()


def test_temporary_files_would_not_be_sealed_and_are_refused() -> None:
    mount = Mount(SimDisk(), "x")
    connection = sealed.connect(mount, KEY)
    connection.execute("PRAGMA temp_store = FILE")
    with pytest.raises(apsw.Error):
        connection.execute("PRAGMA cache_size = 1")
        connection.execute("CREATE TEMP TABLE t(x)")
        rows = "WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n WHERE i < 20000)"
        connection.execute(f"INSERT INTO t {rows} SELECT hex(randomblob(500)) FROM n")
    sealed.let_go(connection)
    mount.close()


def test_a_copy_never_touches_what_it_copies() -> None:
    disk = SimDisk.of({"a/one": b"1", "a/two": b"22"})
    copy = CopyDisk(disk)
    copy.make_folder("b")
    with pytest.raises(FileNotFoundError, match="a/none"):
        copy.open("a/none")
    with pytest.raises(FileExistsError, match="a/one"):
        copy.open("a/one", create=True, exclusive=True)
    file = copy.open("a/one")
    file.write(3, b"x")
    file.sync()
    file.truncate(5)
    assert file.read(0, 9) == b"1\0\0x\0"
    file.write(1, b"22")
    file.write(5, b"y")
    assert file.read(0, 9) == b"122x\0y"
    copy.rename("a/one", "a/three")
    copy.remove("a/two")
    copy.sync_folder("a")
    assert [copy.exists(f"a/{n}") for n in ("one", "two", "three")] == [False, False, True]
    assert copy.open("a/new", create=True).size() == 0
    assert disk.snapshot() == {"a/one": b"1", "a/two": b"22"}
    with pytest.raises(OSError):
        file.descriptor()


def test_what_is_open_at_exit_is_closed() -> None:
    disk = SimDisk()
    store, broken = open_store(disk), open_store(SimDisk(1, None))
    broken._mount.disk.turn_off()
    vfs._let_go()
    assert apsw.connections() == []
    with pytest.raises(LedgerError, match=r"ledger\.stopped"):
        store.size()
    open_store(disk, 2).close()


def test_a_copy_lists_what_it_copies() -> None:
    disk = SimDisk.of({"a/one": b"1", "a/two": b"22"})
    assert CopyDisk(disk).list("a") == ["one", "two"]


def test_each_mount_has_its_own_folder() -> None:
    one, other = Mount(SimDisk(), "x"), Mount(SimDisk(), "y/z")
    names = [m.uri("a/db").removeprefix("file:").split("?")[0] for m in (one, other)]
    assert [vfs._find(n) for n in names] == [(one, "x/a/db"), (other, "y/z/a/db")]
    assert len(vfs._registered) == 1
    one.close()
    other.close()


def test_a_wal_that_is_emptied_is_empty_on_the_disk() -> None:
    disk = SimDisk()
    store = open_store(disk)
    assert len(disk.snapshot()["ledger/store.db-wal"]) > 0
    store.empty_wal()
    assert len(disk.snapshot()["ledger/store.db-wal"]) == 0
    store.close()


def test_what_sqlite_asks_a_file_for() -> None:
    """With one connection and no shared memory, locks do nothing; nothing is promised."""
    mount = Mount(SimDisk(), "x")
    file = vfs._File(mount, mount.disk.open("x/db", create=True), fresh=True)
    file.xLock(1)
    file.xUnlock(0)
    assert (file.xCheckReservedLock(), file.xFileControl(1, 0)) == (False, False)
    assert (file.xSectorSize(), file.xDeviceCharacteristics()) == (4096, 0)
    assert file.excepthook(None, None, None) is True
    file.xClose()
    mount.close()


def test_a_file_is_opened_once_it_is_there() -> None:
    mount = Mount(SimDisk(), "x")
    name = mount.uri("db").removeprefix("file:").split("?")[0]
    found = vfs._registered[0]
    assert found.xFullPathname(name) == name
    assert not found.xAccess(name, 0)
    flags = [apsw.SQLITE_OPEN_CREATE | apsw.SQLITE_OPEN_READWRITE, 0]
    found.xOpen(name, flags).xClose()
    assert flags[0] == flags[1]
    assert found.xAccess(name, 0)
    found.xDelete(name, False)
    assert not found.xAccess(name, 0)
    assert mount.disk.trace == ["create x/db", "remove x/db"]
    found.xOpen(name, flags).xClose()
    found.xDelete(name, True)
    assert mount.disk.trace[-1] == "sync_folder x"
    mount.close()


def test_an_error_of_the_disk_is_sqlites_own_of_that_call(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object) -> int:
        raise OSError("gone")

    disk = SimDisk()
    mount = Mount(disk, "x")
    file = disk.open("x/db", create=True)
    monkeypatch.setattr(type(file), "size", broken)
    with pytest.raises(apsw.IOError) as size:
        vfs._File(mount, file, fresh=False).xFileSize()
    assert size.value.extendedresult == apsw.SQLITE_IOERR_FSTAT
    mount.close()
    mount = Mount(disk, "x")
    monkeypatch.setattr(disk, "exists", broken)
    name = mount.uri("db").removeprefix("file:").split("?")[0]
    with pytest.raises(apsw.CantOpenError):
        vfs._registered[0].xOpen(name, [apsw.SQLITE_OPEN_CREATE, 0])
    assert isinstance(mount.failed, OSError)
    mount.close()
