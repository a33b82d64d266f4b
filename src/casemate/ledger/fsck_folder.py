"""A state folder for ``fsck``: the store opened another way than the server does, and the files
that it names.

The sealed file and its WAL are copied, as they are, into a temporary folder, and opened there
through SQLite's own file system (with sqlite3mc's encryption) instead of the server's.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final

import apsw

from casemate.ledger.fsck_replay import Replay, Rows
from casemate.seams import Disk
from casemate.spec import codec, tensors
from casemate.spec.data import Registration
from casemate.spec.errors import LedgerError

FILE: Final = "ledger/store.db"
KEY_BYTES: Final = 32
PIECE: Final = 1 << 20
# A sealed stream: header, then chunks of 2^20 bytes with a tag each (docs, seal).
HEADER: Final = 44
CHUNK: Final = 1 << 20
TAG: Final = 16


@contextmanager
def opened(disk: Disk, key: bytes) -> Iterator[Rows]:
    """SQL to rows, on a copy. Raises ``ledger.missing``, ``ledger.key``, ``ledger.corrupt``."""
    if not disk.exists(FILE):
        raise LedgerError(
            "ledger.missing", "There is no store in this folder.", mend="Name the state folder."
        )
    if len(key) != KEY_BYTES:
        raise _wrong_key()
    with tempfile.TemporaryDirectory(prefix="casemate-fsck-") as folder:
        copy = Path(folder) / "store.db"
        for suffix in ("", "-wal"):
            if disk.exists(FILE + suffix):
                _copy(disk, FILE + suffix, Path(f"{copy}{suffix}"))
        connection = apsw.Connection(f"file:{copy}", flags=_FLAGS)
        try:
            yield _reader(connection, key)
        except apsw.NotADBError as e:
            raise _wrong_key() from e
        except apsw.Error as e:
            raise _damaged(e) from e
        finally:
            connection.close()


_FLAGS: Final = apsw.SQLITE_OPEN_URI | apsw.SQLITE_OPEN_READWRITE


def _wrong_key() -> LedgerError:
    return LedgerError(
        "ledger.key",
        "The store cannot be opened: the key is wrong, or the file's head is damaged.",
        mend="Give the sealing key of the enclave that wrote it.",
    )


def _damaged(cause: BaseException) -> LedgerError:
    return LedgerError(
        "ledger.corrupt",
        f"The store is damaged: {cause}.",
        mend="Restore it from a backup, with the owners' consent.",
    )


def _copy(disk: Disk, path: str, to: Path) -> None:
    file = disk.open(path)
    try:
        with to.open("wb") as out:
            for at in range(0, file.size(), PIECE):
                out.write(file.read(at, min(PIECE, file.size() - at)))
    finally:
        file.close()


def _reader(connection: apsw.Connection, key: bytes) -> Rows:
    connection.execute("PRAGMA cipher = 'chacha20'")
    connection.execute(f'PRAGMA key = "raw:{key.hex()}"')
    connection.execute("PRAGMA locking_mode = EXCLUSIVE")
    connection.execute("PRAGMA temp_store = MEMORY")
    connection.execute("PRAGMA trusted_schema = OFF")
    connection.execute("PRAGMA query_only = ON")
    if connection.execute("PRAGMA integrity_check").fetchall() != [("ok",)]:
        raise apsw.CorruptError("the file's pages contradict each other")

    def rows(sql: str) -> list[tuple[Any, ...]]:
        return connection.execute(sql).fetchall()

    return rows


def sealed_size(plain: int) -> int:
    """Bytes of the stream that holds ``plain`` bytes."""
    return HEADER + plain + TAG * max(1, -(-plain // CHUNK))


def check(replay: Replay, rows: Rows, disk: Disk) -> None:
    """Every file that the store names is there, as long as it should be, and no other is."""
    named: set[str] = set()
    for name, size, used in rows("SELECT id, size, used_by FROM uploads"):
        named |= {f"uploads/{name}", f"uploads/{name}.offset"}
        if used is not None:
            _expect(replay, disk, f"uploads/{name}", {size})
            _expect(replay, disk, f"uploads/{name}.offset", {24, 48})
    for raw, state in rows("SELECT registration, state FROM datasets"):
        registration = codec.decode(Registration, raw)
        if state not in ("revoked", "refused"):
            schema = registration.schema
            columns = {c.name: (c.dtype, (schema.rows, *c.shape)) for c in schema.columns}
            rows_bytes = schema.rows * sum(c.row_bytes for c in schema.columns)
            plain = len(tensors.layout(columns)[0]) + rows_bytes
            _expect(replay, disk, f"uploads/{registration.upload}", {sealed_size(plain)})
    for job, path, parameters in rows(
        "SELECT j.id, j.blob, json_extract(CAST(q.quote AS TEXT), '$.parameters')"
        " FROM jobs j JOIN quotes q ON q.digest = j.quote WHERE j.blob NOT NULL"
    ):
        named.add(path)
        found = _size(disk, path)
        replay.expect(
            found is not None and sealed_size(0) < found <= sealed_size(4 * parameters + PIECE),
            f"the result of {job} is missing, or no such result is so long",
        )
    for job, path in rows("SELECT job, path FROM states"):
        named.add(path)
        found = _size(disk, path)
        replay.expect(
            found is not None and found > sealed_size(0), f"the training state of {job} is missing"
        )
    for folder in ("uploads", "results", "states"):
        for name in _names(disk, folder):
            if f"{folder}/{name}" not in named:
                replay.left.append(f"{folder}/{name}")


def _names(disk: Disk, folder: str) -> list[str]:
    """A folder that was never used is not there in what was restored and not yet started."""
    try:
        return disk.list(folder)
    except FileNotFoundError:
        return []


def _size(disk: Disk, path: str) -> int | None:
    if not disk.exists(path):
        return None
    file = disk.open(path)
    try:
        return file.size()
    finally:
        file.close()


def _expect(replay: Replay, disk: Disk, path: str, sizes: set[int]) -> None:
    found = _size(disk, path)
    said = "is missing" if found is None else f"has {found} bytes, not {min(sizes)}"
    replay.expect(found in sizes, f"the file {path} {said}")
