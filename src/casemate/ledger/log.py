"""The log as others see it: an RFC 6962 Merkle tree over the ledger's entries, its signed heads,
and what witnesses said of them.

The log's key is made at the first start and lives in the store; each boot's evidence binds it. A
witness's cosignature counts for a log entry when it stands on a checkpoint that this log signed and
that covers the entry.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass
from functools import lru_cache
from typing import Final

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from casemate.ledger.store import Store
from casemate.seal import checkpoint, note
from casemate.seal.checkpoint import Checkpoint, Proof
from casemate.seal.note import Note, Verifier
from casemate.spec import merkle
from casemate.spec.consent import Head
from casemate.spec.errors import LedgerError

ORIGIN: Final = "casemate.dev/log"
KEY_BYTES: Final = 32


@dataclass(frozen=True, slots=True)
class LogKey:
    """The log's name (origin) and its Ed25519 key (``public``: 32 bytes)."""

    origin: str
    public: bytes
    private: Ed25519PrivateKey

    @property
    def verifier(self) -> Verifier:
        return checkpoint.log_key(self.origin, self.public)


def key(store: Store) -> LogKey:
    """The newest key; made when there is none yet."""
    row = store.one("SELECT origin, key FROM log_keys ORDER BY generation DESC LIMIT 1")
    if row is None:
        with store.transaction():
            add_key(store)
        return key(store)
    return _log_key(*row)


@lru_cache(maxsize=4)
def _log_key(origin: str, private: bytes) -> LogKey:
    key = Ed25519PrivateKey.from_private_bytes(private)
    return LogKey(origin, key.public_key().public_bytes_raw(), key)


def add_key(store: Store) -> None:
    """Inside a transaction: the log goes on under a new name and key."""
    (generation,) = store.one("SELECT coalesce(max(generation), 0) + 1 FROM log_keys")
    origin, private = store.one("SELECT origin, key FROM next_log_key") or new_key(store)
    store.run("UPDATE log_keys SET ended = ? WHERE ended IS NULL", store.size())
    store.run("INSERT INTO log_keys VALUES (?, ?, ?, NULL)", generation, origin, private)
    store.run("DELETE FROM next_log_key")


def new_key(store: Store) -> tuple[str, bytes]:
    """A fresh name and private key."""
    private = store.rng.bytes(KEY_BYTES)
    public = Ed25519PrivateKey.from_private_bytes(private).public_key().public_bytes_raw()
    return f"{ORIGIN}/{hashlib.sha256(public).hexdigest()[:32]}", private


def head(store: Store, size: int | None = None) -> Checkpoint:
    """The tree head over all entries, or over the first ``size``."""
    size = store.size() if size is None else size
    return Checkpoint(key(store).origin, size, merkle.root(size, store.node))


def seen(head: Checkpoint) -> Head:
    """A tree head in the form that entries and consents hold."""
    return Head(origin=head.origin, size=head.size, root=head.root)


def sign(store: Store, size: int | None = None) -> Note:
    """The newest checkpoint, or the one at ``size``, signed, with the cosignatures that stand on
    this very one."""
    mine, now = key(store), head(store, size)
    signed = checkpoint.sign(now, mine.public, mine.private.sign)
    rows = store.all("SELECT line FROM cosignatures WHERE size = ? ORDER BY witness", now.size)
    return signed.add(note.line(text) for (text,) in rows)


def covering(store: Store, sequence: int) -> Note:
    """A checkpoint over entry ``sequence`` of the log that got it: of those that witnesses cosigned
    the one that most of them did, else the newest; of a log that a recovery ended, its last."""
    origin, private, ended = store.one(
        "SELECT origin, key, ended FROM log_keys WHERE ended IS NULL OR ended > ?"
        " ORDER BY generation LIMIT 1",
        sequence,
    )
    if ended is None:
        sql = (
            "SELECT size FROM cosignatures WHERE size > ?"
            " GROUP BY size ORDER BY count(*) DESC, size DESC"
        )
        row = store.one(sql, sequence)
        return sign(store, None if row is None else row[0])
    mine = _log_key(origin, private)
    last = Checkpoint(origin, ended, merkle.root(ended, store.node))
    return checkpoint.sign(last, mine.public, mine.private.sign)


def cosign(store: Store, signed: Note, witnesses: Iterable[Verifier]) -> Checkpoint:
    """Keep what ``witnesses`` said of a checkpoint of this log; what others said is dropped.

    Raises ``ReceiptError`` ``receipt.note-*`` for a checkpoint that this log did not sign, or a
    wrong signature; ``LedgerError`` ``ledger.rolled-back`` for one of this log that the store does
    not extend.
    """
    known = list(witnesses)
    found = check(store, signed)
    by = note.verify(signed, [key(store).verifier, *known])
    with store.transaction():
        for witness in known:
            if witness not in by:
                continue
            (line,) = (x for x in signed.lines if (x.name, x.id) == (witness.name, witness.id))
            store.run(
                "INSERT INTO cosignatures VALUES (?1, ?2, ?3) ON CONFLICT (witness) DO UPDATE"
                " SET size = ?2, line = ?3 WHERE size < ?2",
                str(witness),
                found.size,
                str(line).removesuffix("\n"),
            )
    return found


def check(store: Store, signed: Note) -> Checkpoint:
    """A checkpoint that this log signed at some time, under its present or an earlier name, which
    the store must extend.

    ``LedgerError`` ``ledger.rolled-back`` where it does not: then this store is an older copy, or a
    fork. ``ledger.recovered`` (409) for more than the owners went on from at a recovery.
    """
    found = checkpoint.verify(signed, _signer(store, signed))
    size = store.size()
    row = store.one("SELECT ended FROM log_keys WHERE origin = ?", found.origin)
    if row[0] is not None and found.size > row[0]:
        raise LedgerError(
            "ledger.recovered",
            f"The state was restored to its first {row[0]} entries, with the owners' consent; you"
            f" have seen {found.size} of the log before that.",
            mend="Verify the recovery in the log (casemate audit verify), then go on from it.",
            where=found.origin,
            status=409,
        )
    if found.size > size or merkle.root(found.size, store.node) != found.root:
        raise LedgerError(
            "ledger.rolled-back",
            f"This log once had {found.size} entries that are not all here: the state was rolled"
            f" back or forked (it has {size}).",
            mend="Start from the newest state, or let the owners consent to a recovery.",
            where=found.origin,
        )
    return found


def _signer(store: Store, signed: Note) -> Verifier:
    """The key of the log, present or earlier, whose name the checkpoint bears."""
    row = store.one(
        "SELECT key FROM log_keys WHERE origin = ?", checkpoint.read(signed.text).origin
    )
    if row is None:
        return key(store).verifier
    public = Ed25519PrivateKey.from_private_bytes(row[0]).public_key().public_bytes_raw()
    return checkpoint.log_key(checkpoint.read(signed.text).origin, public)


def cosigned(store: Store, witnesses: Iterable[str], sequence: int) -> int:
    """How many of ``witnesses`` (vkeys) cosigned a checkpoint that covers entry ``sequence``."""
    sql = "SELECT size FROM cosignatures WHERE witness = ?"
    sizes = [row[0] for w in witnesses if (row := store.one(sql, w)) is not None]
    return sum(size > sequence for size in sizes)


def prove(store: Store, sequence: int, signed: Note) -> Proof:
    """That entry ``sequence`` stands under the checkpoint ``signed``, which must cover it."""
    size = checkpoint.read(signed.text).size
    return Proof(sequence, merkle.inclusion(sequence, size, store.node), signed)
