"""The store under another key: a whole copy beside it, then one rename.

At every moment the file named ``store.db`` is whole and opens under the old key or under the new
one. No server may have it open.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from typing import Final

import apsw

from casemate.ledger.sealed import FILE, FOLDER, connect, failure, let_go
from casemate.ledger.vfs import Mount
from casemate.seams import Disk

NEXT: Final = "next"
# SQLite's files beside the store; none may stay when another store takes its name.
_BESIDE: Final = (f"{FILE}-wal", f"{FILE}-journal")


def _opened(stack: ExitStack, disk: Disk, key: bytes, folder: str) -> apsw.Connection:
    mount = Mount(disk, folder)
    stack.callback(mount.close)
    try:
        connection = connect(mount, key)
    except apsw.Error as e:
        raise failure(mount.failed or e) from e
    stack.callback(let_go, connection)
    return connection


def copy(
    disk: Disk,
    key: bytes,
    new_key: bytes,
    folder: str,
    edit: Callable[[apsw.Connection], None] = lambda _: None,
    *,
    source: str = FOLDER,
) -> None:
    """Copy the store in ``source`` under ``key``, as ``edit`` changes it, to one under ``new_key``
    in ``folder``, in place of what is there; durable on return. Raises ``LedgerError``."""
    clear(disk, folder)
    disk.make_folder(folder)
    disk.sync_folder(".")
    try:
        with ExitStack() as stack:
            old = _opened(stack, disk, key, source)
            new = _opened(stack, disk, new_key, folder)
            _rows(old, new)
            edit(new)
            new.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchall()
    except apsw.Error as e:
        raise failure(e) from e
    _beside(disk, folder)
    file = disk.open(f"{folder}/{FILE}")
    try:
        file.sync()
    finally:
        file.close()
    disk.sync_folder(folder)


def _rows(old: apsw.Connection, new: apsw.Connection) -> None:
    """Tables, rows and indices, in one transaction. SQLite's own backup loses a Disk's errors."""
    new.execute("BEGIN IMMEDIATE; PRAGMA defer_foreign_keys = ON")
    for pragma in ("user_version", "application_id"):
        ((number,),) = old.execute(f"PRAGMA {pragma}")
        new.execute(f"PRAGMA {pragma} = {number}")
    schema = "SELECT type, name, sql FROM sqlite_schema WHERE sql NOT NULL ORDER BY type = 'index'"
    for kind, name, sql in old.execute(schema).fetchall():
        new.execute(str(sql))
        if kind == "table":
            columns = len(old.execute(f"PRAGMA table_info({name})").fetchall())
            places = ", ".join("?" * columns)
            new.executemany(
                f"INSERT INTO {name} VALUES ({places})", old.execute(f"SELECT * FROM {name}")
            )
    new.execute("COMMIT")


def _beside(disk: Disk, folder: str) -> None:
    for name in _BESIDE:
        if disk.exists(f"{folder}/{name}"):
            disk.remove(f"{folder}/{name}")


def clear(disk: Disk, folder: str) -> None:
    """Remove a store in ``folder``, if there is one."""
    _beside(disk, folder)
    if disk.exists(f"{folder}/{FILE}"):
        disk.remove(f"{folder}/{FILE}")
        disk.sync_folder(folder)


def install(disk: Disk, folder: str) -> None:
    """Let the store in ``folder`` take the place of the one in use, whose WAL has been emptied: a
    WAL that stayed would be read into the new one."""
    disk.make_folder(FOLDER)
    disk.sync_folder(".")
    _beside(disk, FOLDER)
    disk.sync_folder(FOLDER)
    disk.rename(f"{folder}/{FILE}", f"{FOLDER}/{FILE}")
    disk.sync_folder(FOLDER)
    disk.sync_folder(folder)
