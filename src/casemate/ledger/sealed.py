"""Opening the sealed file: SQLite with sqlite3mc's encryption on a mounted Disk (ADR 0002)."""

from __future__ import annotations

from contextlib import suppress
from typing import Final

import apsw

from casemate.ledger.vfs import Mount
from casemate.spec.errors import LedgerError

FOLDER: Final = "ledger"
FILE: Final = "store.db"
KEY_BYTES: Final = 32


def failure(cause: BaseException) -> LedgerError:
    """What a stopped store says at every call."""
    if isinstance(cause, apsw.CorruptError | apsw.NotADBError):
        return LedgerError(
            "ledger.corrupt",
            f"The store is damaged: {cause}.",
            mend="Restore it from a backup, with the owners' consent.",
        )
    return LedgerError(
        "ledger.stopped",
        f"The store has stopped: {type(cause).__name__}: {cause}.",
        mend="Mend the disk and start the server again; nothing acknowledged is lost.",
    )


def connect(mount: Mount, key: bytes) -> apsw.Connection:
    """A connection to the store under ``key`` (32 bytes). ``LedgerError`` for a wrong key."""
    if len(key) != KEY_BYTES:
        raise LedgerError(
            "ledger.key",
            f"The store's key has {len(key)} bytes, not {KEY_BYTES}.",
            mend="Give the sealing key of this enclave.",
        )
    flags = apsw.SQLITE_OPEN_URI | apsw.SQLITE_OPEN_READWRITE | apsw.SQLITE_OPEN_CREATE
    connection = apsw.Connection(mount.uri(FILE), flags=flags)
    try:
        # ChaCha20-Poly1305 for each page, bound to its number (docs/adr/0002).
        connection.execute("PRAGMA cipher = 'chacha20'")
        connection.execute(f'PRAGMA key = "raw:{key.hex()}"')
        connection.execute("PRAGMA locking_mode = EXCLUSIVE")
        connection.execute("SELECT count(*) FROM sqlite_schema").fetchall()
        for pragma in (
            "journal_mode = WAL",
            "synchronous = FULL",
            "foreign_keys = ON",
            "secure_delete = ON",
            "temp_store = MEMORY",
            "trusted_schema = OFF",
            "cell_size_check = ON",
        ):
            connection.execute(f"PRAGMA {pragma}")
    except apsw.Error as e:
        let_go(connection)
        if isinstance(e, apsw.NotADBError):
            raise LedgerError(
                "ledger.key",
                "The store cannot be opened: the key is wrong, or the file's head is damaged.",
                mend="Start the enclave that sealed it, or restore the file from a backup.",
            ) from None
        raise
    return connection


def let_go(connection: apsw.Connection) -> None:
    """Close it. What was acknowledged is in the WAL already, so that an error changes nothing."""
    with suppress(apsw.Error):
        connection.close()
