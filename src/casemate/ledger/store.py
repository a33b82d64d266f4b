"""The one sealed store: a single encrypted SQLite file on a Disk.

It holds the datasets' keys together with their budgets and the log, so that wiping or restoring the
ledger alone gives nothing. One process has it open and writes; calls from several threads are
serialised by a lock, and the server calls from one thread. Every transaction is on the disk when it
returns (WAL, ``synchronous=FULL``). After any error of the disk or of SQLite the store has stopped:
each later call raises, and only a new start, which reads what is really on the disk, goes on.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Final

import apsw

from casemate.ledger import anchor as anchors
from casemate.ledger import fsck
from casemate.ledger.anchor import Anchor, Mark, Stand
from casemate.ledger.schema import APPLICATION_ID, MODELS, SCHEMA, VERSION
from casemate.ledger.sealed import FOLDER, connect, failure, let_go
from casemate.ledger.vfs import Mount
from casemate.seams import Disk, Rng
from casemate.spec import codec, merkle
from casemate.spec.errors import InternalError, LedgerError, LimitError
from casemate.spec.receipt import EntryKind, LogEntry

BOOT_BYTES: Final = 16
# What a tile of entries can hold of one (C2SP tlog-tiles).
MAX_ENTRY: Final = 0xFFFF


@dataclass(frozen=True, slots=True)
class Link:
    """Where an entry stands in the log, and its bytes."""

    sequence: int
    entry: bytes


def not_begun() -> LedgerError:
    """``ledger.missing``: there is a store, and no start in it yet."""
    return LedgerError(
        "ledger.missing",
        "The log has not begun: no server has started on this state.",
        mend="Start the server first.",
    )


class Store:
    """Use :meth:`open`. The rules are in ``catalog``, ``quotes`` and ``ledger``."""

    def __init__(self, mount: Mount, connection: apsw.Connection, boot: bytes, rng: Rng) -> None:
        self.boot = boot
        self.rng = rng
        self._mount = mount
        self._connection = connection
        self.lock = threading.RLock()
        self._stopped: BaseException | None = None
        self.anchor: Anchor | None = None
        self.stand: Stand | None = None

    @classmethod
    def open(cls, disk: Disk, key: bytes, boot: bytes, rng: Rng, *, folder: str = FOLDER) -> Store:
        """Open or make the store for the boot instance ``boot`` (16 bytes, fresh at each start).

        Checks all pages and replays the log against the tables. Nothing may be done before
        ``recovery.start`` has put the start into the log.

        Raises ``LedgerError``: ``ledger.key`` (wrong
        key), ``ledger.corrupt``, ``ledger.inconsistent`` (broken chain, missing or changed row),
        ``ledger.version``, ``ledger.boot`` (instance used before), ``ledger.stopped`` (disk).
        """
        if len(boot) != BOOT_BYTES:
            raise LedgerError(
                "ledger.boot",
                f"A boot instance has {BOOT_BYTES} bytes, not {len(boot)}.",
                mend="Draw 16 random bytes at each start.",
            )
        mount = Mount(disk, folder)
        connection: apsw.Connection | None = None
        try:
            disk.make_folder(folder)
            disk.sync_folder(".")
            connection = connect(mount, key)
            store = cls(mount, connection, boot, rng)
            store._check()
        except BaseException as e:
            if connection is not None:
                let_go(connection)
            mount.close()
            if isinstance(e, apsw.Error | OSError):
                raise failure(mount.failed or e) from e
            raise
        return store

    def _check(self) -> None:
        if self.one("PRAGMA user_version")[0] == 0 and not self.all("SELECT 1 FROM sqlite_schema"):
            with self.transaction():
                self._connection.execute(SCHEMA)
                self._connection.execute(f"PRAGMA application_id = {APPLICATION_ID}")
                self._connection.execute(f"PRAGMA user_version = {VERSION}")
        version = self.one("PRAGMA user_version")[0]
        if version == 2:
            with self.transaction():
                self._connection.execute(MODELS)
                self._connection.execute(f"PRAGMA user_version = {VERSION}")
            version = VERSION
        if version != VERSION or self.one("PRAGMA application_id")[0] != APPLICATION_ID:
            raise LedgerError(
                "ledger.version",
                f"The store has version {version}; this software reads {VERSION}.",
                mend="Start the software that wrote it.",
            )
        if self.all("PRAGMA integrity_check") != [("ok",)]:
            raise apsw.CorruptError("the file's pages contradict each other")
        replay = fsck.check(self.all)
        if replay.findings:
            raise LedgerError(
                "ledger.inconsistent",
                f"The store contradicts its log: {replay.findings[0]}",
                mend="Restore it from a backup, with the owners' consent.",
            )
        if self.boot in replay.started:
            raise LedgerError(
                "ledger.boot",
                "This boot instance has opened the store before.",
                mend="Draw 16 random bytes at each start.",
            )

    @contextmanager
    def transaction(self) -> Iterator[None]:
        """All or nothing, durable on return. An exception inside undoes everything."""
        with self.lock:
            if self._connection.in_transaction:
                raise RuntimeError("transactions do not nest")
            self.run("BEGIN IMMEDIATE")
            try:
                yield
                self.run("COMMIT")
            except BaseException:
                self._undo()
                raise

    @contextmanager
    def anchored(self) -> Iterator[int | None]:
        """A transaction after which the anchor is moved, where there is one: an older state cannot
        follow. Gives how many times it will have been moved, for the entry. Once it has failed, the
        store has stopped."""
        stand = self.stand
        with self.transaction():
            yield None if stand is None else stand.count + 1
            if stand is not None:
                size = self.size()
                mark = stand.mark(merkle.root(size, self.node))
                self.run(
                    "UPDATE anchor SET name = ?, count = ?, before = ?, step = ?",
                    mark.name,
                    mark.count,
                    mark.before,
                    mark.step,
                )
        if stand is not None and self.anchor is not None:
            try:
                self.stand = anchors.move(self.anchor, mark)
            except BaseException as e:
                self._stopped = self._stopped or e
                raise

    def anchor_secret(self) -> bytes:
        """The 32 bytes that an anchor's authorisation follows from; made once."""
        with self.transaction():
            if (row := self.one("SELECT secret FROM anchor")) is not None:
                return bytes(row[0])
            secret = self.rng.bytes(anchors.BYTES)
            self.run("INSERT INTO anchor (one, secret) VALUES (1, ?)", secret)
            return secret

    def hold(self, anchor: Anchor | None) -> None:
        """At a start: hold the state against its anchor. Raises ``ledger.rolled-back``,
        ``ledger.anchor-*``."""
        if anchor is not None:
            self.anchor_secret()  # the row that marks are kept in
        row = self.one("SELECT name, count, before, step FROM anchor WHERE name NOT NULL")
        self.stand = anchors.resume(anchor, None if row is None else Mark(*row), self.rng)
        self.anchor = anchor

    def _undo(self) -> None:
        try:
            if self._connection.in_transaction:
                self._connection.execute("ROLLBACK")
        except apsw.Error as e:
            self._stopped = self._stopped or e

    def run(self, sql: str, *values: Any) -> None:
        """One statement without an answer."""
        self.all(sql, *values)

    def all(self, sql: str, *values: Any) -> list[tuple[Any, ...]]:
        """All rows of one statement."""
        with self.lock:
            if self._stopped is not None:
                raise failure(self._stopped)
            try:
                return self._connection.execute(sql, values).fetchall()
            except apsw.ConstraintError as e:
                raise InternalError(
                    "internal.ledger", f"A rule of the tables was broken: {e}.", mend="Report it."
                ) from e
            except apsw.Error as e:
                self._stopped = self._mount.failed or e
                raise failure(self._stopped) from e

    def one(self, sql: str, *values: Any) -> Any:
        """The first row, or ``None``."""
        rows = self.all(sql, *values)
        return rows[0] if rows else None

    def append(self, kind: EntryKind, subject: str, body: object) -> Link:
        """Add an entry to the log, inside a transaction; ``limit.entry`` past 65535 bytes;
        ``ledger.missing`` for a first one that is no start."""
        if not self._connection.in_transaction:
            raise RuntimeError("an entry is appended inside a transaction")
        sequence = self.size()
        if sequence == 0 and kind != "start":  # a command after a first start that was refused
            raise not_begun()
        entry = codec.encode(
            LogEntry(
                sequence=sequence,
                boot=self.boot,
                kind=kind,
                subject=subject,
                body=codec.encode(body),
            )
        )
        if len(entry) > MAX_ENTRY:
            raise LimitError(
                "limit.entry",
                f"The log's entry on {subject} would have {len(entry)} bytes.",
                mend="Use fewer datasets in one job.",
                where=subject,
            )
        self.run("INSERT INTO entries VALUES (?, ?)", sequence, entry)
        for level, place, hashed in merkle.grow(sequence, merkle.leaf_hash(entry), self.node):
            self.run("INSERT INTO nodes VALUES (?, ?, ?)", level, place, hashed)
        return Link(sequence, entry)

    def size(self) -> int:
        """How many entries the log has."""
        return int(self.one("SELECT coalesce(max(sequence) + 1, 0) FROM entries")[0])

    def node(self, level: int, place: int) -> bytes:
        """The hash of a complete subtree of the log (``merkle.Node``); IndexError without it."""
        row = self.one("SELECT hash FROM nodes WHERE level = ? AND place = ?", level, place)
        if row is None:
            raise IndexError(f"node {place} of level {level}")
        return bytes(row[0])

    def link(self, sequence: int) -> Link:
        """The entry at a place that there is."""
        return Link(sequence, *self.one("SELECT entry FROM entries WHERE sequence = ?", sequence))

    def entries(self, start: int = 0, count: int = 1000) -> list[bytes]:
        """The bytes of up to ``count`` entries of the log from sequence ``start`` on."""
        sql = "SELECT entry FROM entries WHERE sequence >= ? ORDER BY sequence LIMIT ?"
        return [raw for (raw,) in self.all(sql, start, count)]

    def empty_wal(self) -> None:
        """Move the WAL into the file and empty it, so that deleted bytes are overwritten there."""
        if self.one("PRAGMA wal_checkpoint(TRUNCATE)")[0] != 0:
            raise InternalError(
                "internal.ledger", "The WAL is in use and was not emptied.", mend="Report it."
            )

    def close(self) -> None:
        """Let the file go. Idempotent; afterwards every call raises ``ledger.stopped``."""
        with self.lock:
            self._stopped = self._stopped or RuntimeError("it was closed")
            let_go(self._connection)
            self._mount.close()
