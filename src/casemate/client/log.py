"""The enclave's log as an auditor reads it: every entry, under a head that the enclave signed, with
every charge recomputed.

What this cannot show is that the server gave everyone the same log: compare heads with others, with
earlier ones of one's own, or ask for a witness's cosignature.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from casemate.accounting.filters import RdpFilter
from casemate.client.connection import Connection
from casemate.seal import checkpoint, note, tiles
from casemate.seal.checkpoint import Checkpoint
from casemate.seal.note import Note, Verifier
from casemate.seal.tiles import ENTRIES
from casemate.spec import codec, merkle
from casemate.spec.errors import ReceiptError
from casemate.spec.job import Charge
from casemate.spec.log import Reserved
from casemate.spec.receipt import LogEntry


@dataclass(frozen=True, slots=True)
class Log:
    """A log that holds: its leaves and what they say, the head over them as it was signed, and how
    many charges were recomputed from their events."""

    leaves: tuple[bytes, ...]
    entries: tuple[LogEntry, ...]
    head: Checkpoint
    signed: Note
    debits: int


def fetch(connection: Connection) -> Log:
    """The whole log, checked. Raises ``ReceiptError`` at the first thing that does not fit."""
    signed = note.parse(connection.request("GET", "/log/checkpoint").body)
    size = checkpoint.read(signed.text).size
    leaves: list[bytes] = []
    for tile in tiles.tiles(size):
        if tile.level == ENTRIES:
            leaves += tiles.unbundle(tile, connection.request("GET", f"/log/{tile.path}").body)
    key = connection.line().attestation.binding.log_key
    return verify(signed, checkpoint.log_key(checkpoint.read(signed.text).origin, key), leaves)


def verify(signed: Note, key: Verifier, leaves: Sequence[bytes]) -> Log:
    """A log of these leaves under a signed checkpoint. Raises ``ReceiptError``."""
    head = checkpoint.verify(signed, key)
    if merkle.root(len(leaves), merkle.tree(leaves)) != head.root or len(leaves) != head.size:
        raise _refuse("log-root", "The log's entries are not those under its signed head.", "")
    entries = tuple(codec.decode(LogEntry, leaf) for leaf in leaves)
    for place, entry in enumerate(entries):
        if entry.sequence != place:
            raise _refuse("log-gap", f"Entry {place} says that it is {entry.sequence}.", place)
    return Log(tuple(leaves), entries, head, signed, sum(map(_debits, entries)))


def _debits(entry: LogEntry) -> int:
    """How many charges a reservation holds, recomputed from the events beside them."""
    if entry.kind != "reserve":
        return 0
    body = codec.decode(Reserved, entry.body)
    due = Charge(rdp_nano=RdpFilter.empty(), delta_femto=0, epsilon=0.0)
    if body.events:
        extra = body.delta_truncation + body.delta_sampler
        due = RdpFilter.charge(body.events, extra, delta_shown=body.delta_shown)
    if (body.charge.rdp_nano, body.charge.delta_femto) != (due.rdp_nano, due.delta_femto):
        raise _refuse(
            "log-charge",
            f"Entry {entry.sequence} charges another amount than its events cost.",
            entry.sequence,
        )
    return len(body.debits)


def _refuse(reason: str, message: str, place: int | str) -> ReceiptError:
    return ReceiptError(
        f"receipt.{reason}",
        message,
        mend="Keep this log and do not rely on the server's ledger.",
        where=f"entry {place}",
    )
