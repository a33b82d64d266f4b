"""What a witness keeps, on a ``Disk``.

::

    key.json                 its key, in the form of an identity's file (not kept here)
    witness.json             its vkey and the logs that it watches
    logs/<log>.json          of each log the newest checkpoint that it cosigned
    evidence/<log>-...json   checkpoints that a log signed and that cannot stand beside it

Each file is written anew, synced, renamed, its folder synced. An error of the disk ends all in
LedgerError ``ledger.witness-stopped``, after which only a new start knows what is there. A log's
file is there from the moment that the log is watched, so that a lost one is told from a new one.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Final, Literal

from casemate.seal import checkpoint, note
from casemate.seal.note import Note, Verifier
from casemate.seams import Disk, files
from casemate.spec import codec
from casemate.spec.codec import value
from casemate.spec.errors import CasemateError, FormatError, LedgerError, UsageError

KEY: Final = "key.json"
STATE: Final = "witness.json"
LOGS: Final = "logs"
EVIDENCE: Final = "evidence"
MAX_FILE: Final = 1 << 22
#: Of each log and kind; only the log's key can make more of them, one is proof enough.
MAX_EVIDENCE: Final = 64


@value("witness/v1")
class State:
    """``witness``: its vkey (type 0x04); ``logs``: the vkeys of the logs (type 0x01)."""

    witness: str
    logs: tuple[str, ...]


@value("witness-log/v1")
class Watched:
    """``checkpoint``: the newest one cosigned, with the log's and the witness's line, or ``""``."""

    log: str
    checkpoint: str


@value("witness-evidence/v1")
class Evidence:
    """``held``: the checkpoint that was cosigned; ``request``: what came later, its checkpoint
    signed by the same log. ``seconds``: of POSIX time, as the witness's clock had it."""

    log: str
    kind: Literal["fork", "unproven"]
    held: str
    request: str
    seconds: int


def log_id(log: Verifier) -> str:
    """The name of a log's files: 32 hex digits of SHA-256 over its vkey."""
    return hashlib.sha256(str(log).encode()).hexdigest()[:32]


def _path(log: Verifier) -> str:
    return f"{LOGS}/{log_id(log)}.json"


def _read(disk: Disk, path: str) -> bytes:
    file = disk.open(path)
    try:
        return file.read(0, MAX_FILE)
    finally:
        file.close()


def _damaged(path: str, why: str) -> LedgerError:
    return LedgerError(
        "ledger.witness-state",
        f"The witness's file {path} cannot be relied upon: {why}",
        mend="Restore its newest copy; without one, start a new witness with a new key.",
        where=path,
    )


def missing(what: str) -> LedgerError:
    """A witness that cosigned must never begin at size 0 again."""
    return LedgerError(
        "ledger.witness-missing",
        f"The witness has no {what}.",
        mend="Restore its newest copy, name the right folder, or run `casemate witness init` in "
        "a new one.",
        where=what,
    )


@contextmanager
def _stops() -> Iterator[None]:
    """An error of the disk is final: nothing is tried again, and what is on it is not known."""
    try:
        yield
    except OSError as e:
        raise LedgerError(
            "ledger.witness-stopped",
            f"The witness's disk failed: {type(e).__name__}: {e.strerror}.",
            mend="Mend the disk and start again; what was not kept was not cosigned.",
        ) from None


@_stops()
def create(disk: Disk, witness: Verifier) -> None:
    """A state without logs, over whatever stood there: only before its key is first kept."""
    disk.make_folder(LOGS)
    disk.make_folder(EVIDENCE)
    files.store(disk, STATE, codec.encode(State(witness=str(witness), logs=())))


def _state(disk: Disk) -> tuple[Verifier, list[Verifier]]:
    if not disk.exists(STATE):
        raise missing(STATE)
    try:
        found = codec.decode(State, _read(disk, STATE), limit=MAX_FILE)
        return note.verifier(found.witness), list(map(note.verifier, found.logs))
    except FormatError as e:
        raise _damaged(STATE, e.message) from None


@_stops()
def witness(disk: Disk) -> Verifier:
    """Whose state this is. Raises as :func:`load`."""
    return _state(disk)[0]


@_stops()
def load(disk: Disk, witness: Verifier) -> dict[Verifier, Note | None]:
    """Of each log that is watched, the newest checkpoint cosigned.

    Raises LedgerError ``ledger.witness-missing``, or ``ledger.witness-state`` where a file is
    damaged, belongs to another witness, or lacks a signature.
    """
    owner, logs = _state(disk)
    if owner != witness:
        raise _damaged(STATE, "it belongs to another key.")
    for log in logs:
        if not disk.exists(_path(log)):
            raise missing(_path(log))
    return {log: _newest(disk, log, witness) for log in logs}


def _newest(disk: Disk, log: Verifier, witness: Verifier) -> Note | None:
    path = _path(log)
    try:
        kept = codec.decode(Watched, _read(disk, path), limit=MAX_FILE)
        if kept.log != str(log):
            raise _damaged(path, "it is of another log.")
        if not kept.checkpoint:
            return None
        newest = note.parse(kept.checkpoint)
        if len(note.verify(newest, [log, witness])) != 2:
            raise _damaged(path, "the log or the witness did not sign it.")
        if checkpoint.head(newest.text).origin != log.name:
            raise _damaged(path, "it is of another log.")
    except LedgerError:
        raise
    except CasemateError as e:
        raise _damaged(path, e.message) from None
    return newest


@_stops()
def save(disk: Disk, log: Verifier, newest: Note) -> None:
    """Keep what is about to be cosigned; durable on return."""
    files.store(disk, _path(log), codec.encode(Watched(log=str(log), checkpoint=str(newest))))


@_stops()
def add(disk: Disk, witness: Verifier, log: Verifier) -> bool:
    """Watch a log from now on; False when it was watched before.

    Raises UsageError ``usage.witness-log`` for a key that is no log's, or another key of an origin
    that is watched.
    """
    known = load(disk, witness)
    if log in known:
        return False
    reason = ""
    if log.kind != note.SIGNATURE:
        reason = "It is a witness's key."
    if any(k.name == log.name for k in known):
        reason = f"Another key of {log.name} is watched already."
    if reason:
        raise UsageError(
            "usage.witness-log",
            f"The log cannot be watched: {reason}",
            mend="Give the vkey of type 1 that the log's own evidence binds.",
            where=log.name,
        )
    if not disk.exists(_path(log)):  # kept from a time when it was watched
        files.store(disk, _path(log), codec.encode(Watched(log=str(log), checkpoint="")))
    _newest(disk, log, witness)
    logs = tuple(map(str, (*known, log)))
    files.store(disk, STATE, codec.encode(State(witness=str(witness), logs=logs)))
    return True


def evidence_name(item: Evidence) -> str:
    """One file for each checkpoint that a log signed, whatever proof came with it."""
    log, text = note.verifier(item.log), checkpoint.read_request(item.request.encode()).signed.text
    size = checkpoint.head(text).size
    return f"{log_id(log)}-{item.kind}-{size}-{hashlib.sha256(text.encode()).hexdigest()[:16]}.json"


@_stops()
def keep_evidence(disk: Disk, item: Evidence) -> bool:
    """Keep it, unless it is kept already or there is enough of its kind."""
    name, kept = evidence_name(item), evidence(disk, note.verifier(item.log), item.kind)
    if name in kept or len(kept) >= MAX_EVIDENCE:
        return False
    files.store(disk, f"{EVIDENCE}/{name}", codec.encode(item))
    return True


@_stops()
def evidence(disk: Disk, log: Verifier, kind: str) -> list[str]:
    """The names of what is kept against a log."""
    head = f"{log_id(log)}-{kind}-"
    return [n for n in disk.list(EVIDENCE) if n.startswith(head) and n.endswith(".json")]


def about(disk: Disk, witness: Verifier, newest: Mapping[Verifier, Note | None]) -> dict[str, Any]:
    """Who it is, which logs it watches and how far, and how much stands against each."""
    logs = [
        {
            "origin": log.name,
            "vkey": str(log),
            "size": checkpoint.head(found.text).size if found is not None else None,
            "forks": len(evidence(disk, log, "fork")),
            "unproven": len(evidence(disk, log, "unproven")),
        }
        for log, found in newest.items()
    ]
    return {"name": witness.name, "vkey": str(witness), "logs": logs}
