"""The enclave's log as an auditor reads it: every entry under a head that the log's key signed, the
ledger replayed from them alone, and the evidence of every start.

That the server gives everyone the same log is for others to say: witnesses, other clients'
checkpoints, and what this client saw before (:mod:`casemate.client.memory`).
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from casemate.attest.verify import verify_evidence
from casemate.client.connection import MAX_ATTESTATION, Connection
from casemate.client.memory import CHECKPOINT, log_id
from casemate.client.replay import Ledger, replay
from casemate.seal import checkpoint, note, tiles
from casemate.seal.checkpoint import Checkpoint
from casemate.seal.note import Note, Verifier
from casemate.seal.tiles import ENTRIES
from casemate.spec import codec, merkle
from casemate.spec.errors import CasemateError, FormatError, ReceiptError
from casemate.spec.evidence import Attestation
from casemate.spec.log import Started
from casemate.spec.receipt import LogEntry

if TYPE_CHECKING:
    from casemate.attest.trust import Trust

Get = Callable[[str], bytes]


@dataclass(frozen=True, slots=True)
class Log:
    """A log that holds: its leaves, the head over them as it was signed and by whom, and the ledger
    that follows from them."""

    leaves: tuple[bytes, ...]
    head: Checkpoint
    signed: Note
    key: Verifier
    ledger: Ledger

    @property
    def entries(self) -> tuple[LogEntry, ...]:
        return tuple(codec.decode(LogEntry, leaf) for leaf in self.leaves)

    @property
    def debits(self) -> int:
        """How many charges were recomputed from their events."""
        return self.ledger.debits


@dataclass(frozen=True, slots=True)
class Start:
    """A start whose evidence holds and binds its boot and the log's key."""

    place: int
    said: Started
    tee: str
    simulated: bool


def files(connection: Connection) -> Get:
    """The log's files, by their path below its prefix."""
    return lambda path: connection.public(f"/log/{path}", limit=MAX_ATTESTATION)


def fetch(connection: Connection) -> Log:
    """The whole log, checked, under a head that extends what this client saw before."""
    get, seen = files(connection), connection.sync()
    signed = note.parse(get(CHECKPOINT)) if seen is None else seen.signed
    leaves: list[bytes] = []
    for tile in tiles.tiles(checkpoint.read(signed.text).size):
        if tile.level == ENTRIES:
            leaves += tiles.unbundle(tile, get(tile.path))
    key = connection.line().attestation.binding.log_key
    return verify(signed, checkpoint.log_key(checkpoint.read(signed.text).origin, key), leaves)


def read(folder: Path, trust: Trust, *, now: float | None = None) -> Log:
    """A log from a folder of static files (``checkpoint``, ``tile/entries``, ``attestation``), by
    the key that the evidence of its last start binds. Raises ``ReceiptError``, ``EvidenceError``,
    ``FormatError``."""
    get = folder_files(folder)
    signed = note.parse(get(CHECKPOINT))
    leaves: list[bytes] = []
    for tile in tiles.tiles(checkpoint.read(signed.text).size):
        if tile.level == ENTRIES:
            leaves += tiles.unbundle(tile, get(tile.path))
    for leaf in reversed(leaves):
        entry = codec.decode(LogEntry, leaf)
        if entry.kind == "start":
            said = codec.decode(Started, entry.body)
            attestation = _attestation(said, f"entry {entry.sequence}", get)
            verify_evidence(attestation, trust, now=time.time() if now is None else now)
            origin = checkpoint.read(signed.text).origin
            return verify(signed, checkpoint.log_key(origin, attestation.binding.log_key), leaves)
    raise _refuse("log-impossible", "The log holds no start.", "")


def folder_files(folder: Path) -> Get:
    """As :func:`files`, of a folder. Raises ``FormatError`` ``format.tile`` for what is missing."""

    def get(path: str) -> bytes:
        try:
            return (folder / path).read_bytes()
        except OSError as e:
            raise FormatError(
                "format.tile",
                f"{folder / path} cannot be read: {e.strerror}.",
                mend="Name a folder that `casemate audit mirror` made, or another mirror's files.",
                where=path,
            ) from None

    return get


def verify(signed: Note, key: Verifier, leaves: Sequence[bytes]) -> Log:
    """A log of these leaves under a signed checkpoint. Raises ``ReceiptError``."""
    head = checkpoint.verify(signed, key)
    if merkle.root(len(leaves), merkle.tree(leaves)) != head.root or len(leaves) != head.size:
        raise _refuse("log-root", "The log's entries are not those under its signed head.", "")
    ledger = replay(leaves)
    if ledger.recovered and ledger.recovered[-1][1].origin != head.origin:
        raise _refuse("log-root", "The log went on under another name than its head's.", "")
    return Log(tuple(leaves), head, signed, key, ledger)


def starts(
    found: Log, get: Get, trust: Trust, *, now: float | None = None, last: bool = False
) -> tuple[Start, ...]:
    """The evidence of each start (of the ``last`` one only), judged now under ``trust``.

    Raises ``EvidenceError`` where it is refused, ``ReceiptError`` ``receipt.log-attestation`` where
    it is missing, is another one than the log names, or binds another boot or log.
    """
    now = time.time() if now is None else now
    wanted = found.ledger.starts[-1:] if last else found.ledger.starts
    return tuple(_start(found, place, boot, said, get, trust, now)
                 for place, boot, said in wanted)  # fmt: skip


def _start(
    found: Log, place: int, boot: bytes, said: Started, get: Get, trust: Trust, now: float
) -> Start:
    where = f"entry {place}"
    attestation = _attestation(said, where, get)
    verdict = verify_evidence(attestation, trust, now=now)
    binding = attestation.binding
    if binding.boot != boot or not _binds(found, place, binding.log_key):
        raise _refuse("log-attestation", f"The evidence of {where} binds another log.", where)
    return Start(place, said, verdict.tee, verdict.simulated)


def attestation_path(said: Started) -> str:
    """Where the attestation of a start lies, below the log's prefix."""
    return f"attestation/{said.attestation.removeprefix('sha256:')}"


def _attestation(said: Started, where: str, get: Get) -> Attestation:
    try:
        raw = get(attestation_path(said))
        attestation = codec.decode(Attestation, raw, limit=MAX_ATTESTATION)
    except CasemateError as e:
        if e.family == "net":
            raise
        reason = f"The attestation of the start at {where} cannot be had: {e.message}"
        raise _refuse("log-attestation", reason, where) from None
    if codec.digest(attestation) != said.attestation:
        raise _refuse("log-attestation", f"Another attestation than {where} names.", where)
    return attestation


def _binds(found: Log, place: int, key: bytes) -> bool:
    """Whether this was the log's key at that place. Before a recovery it is known by its name."""
    origin, known = found.ledger.key_at(place)
    if origin is None:
        return key == found.key.key
    return key == known if known is not None else origin.endswith(log_id(key))


def _refuse(reason: str, message: str, where: str) -> ReceiptError:
    return ReceiptError(
        f"receipt.{reason}",
        message,
        mend="Keep this log and do not rely on the server's ledger.",
        where=where,
    )
