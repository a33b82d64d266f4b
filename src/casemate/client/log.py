"""The enclave's log as an auditor reads it: a hash chain, with every charge recomputed.

Each entry names the digest of the one before it. An entry that one may not see comes as its digest,
which still has to be what its successor names; a charge that one may see is recomputed from its
events. What this cannot show is that the server gave everyone the same chain: compare
:attr:`Chain.head` with others', or with an earlier one of one's own.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Final

from casemate.accounting.filters import RdpFilter
from casemate.client.connection import Connection
from casemate.spec import codec
from casemate.spec.canonical import Json
from casemate.spec.errors import FormatError, ReceiptError
from casemate.spec.log import Reserved
from casemate.spec.receipt import LogEntry

FIRST_PREVIOUS: Final = "sha256:" + "0" * 64


@dataclass(frozen=True, slots=True)
class Seen:
    """An entry of which one may see all (``entry``) or the digest alone."""

    sequence: int
    digest: str
    entry: LogEntry | None


@dataclass(frozen=True, slots=True)
class Chain:
    """A chain that holds. ``links``: how often an entry's word on its predecessor was compared;
    ``debits``: charges recomputed from their events; ``head``: digest of the newest entry."""

    entries: tuple[Seen, ...]
    links: int
    debits: int
    head: str

    @property
    def visible(self) -> tuple[LogEntry, ...]:
        return tuple(s.entry for s in self.entries if s.entry is not None)


def fetch(connection: Connection) -> Iterator[Seen]:
    """Every entry, page by page. Raises ``FormatError`` for another form."""
    start = 0
    while True:
        page = connection.request("GET", f"/v1/log?from={start}").json()
        if not isinstance(page, list):
            raise _form("The log's page is no list.")
        if not page:
            return
        for item in page:
            seen = _seen(item)
            if seen.sequence != start:
                raise _form(f"Entry {seen.sequence} came where {start} was due.")
            yield seen
            start += 1


def _form(message: str) -> FormatError:
    return FormatError(
        "format.log", message, mend="Use a client and a server of matching versions."
    )


def _seen(item: Json) -> Seen:
    if isinstance(item, dict) and set(item) == {"digest", "sequence"}:
        digest, sequence = item["digest"], item["sequence"]
        if isinstance(digest, str) and type(sequence) is int:
            return Seen(sequence, digest, None)
        raise _form("A hidden entry is not a digest and a sequence number.")
    entry = codec.from_json(LogEntry, item)
    return Seen(entry.sequence, codec.digest(entry), entry)


def verify(entries: Iterable[Seen]) -> Chain:
    """The chain, checked. Raises ``ReceiptError`` (``receipt.log-*``) at the first entry that does
    not fit."""
    found = tuple(entries)
    links = debits = 0
    previous = FIRST_PREVIOUS
    for place, seen in enumerate(found):
        if seen.sequence != place:
            raise _refuse("log-gap", f"Entry {place} is missing from the log.", place)
        if seen.entry is not None:
            if seen.entry.previous != previous:
                raise _refuse(
                    "log-chain", f"Entry {place} names another predecessor than it has.", place
                )
            links += 1
            debits += _debits(seen.entry)
        previous = seen.digest
    return Chain(found, links, debits, previous)


def _debits(entry: LogEntry) -> int:
    """How many charges a reservation holds, each recomputed from the events beside it."""
    if entry.kind != "reserve":
        return 0
    body = codec.decode(Reserved, entry.body)
    if not body.events:
        return 0
    extra = body.delta_truncation + body.delta_sampler
    due = RdpFilter.charge(body.events, extra, delta_shown=body.delta_shown)
    for debit in body.debits:
        if (debit.charge.rdp_nano, debit.charge.delta_femto) != (due.rdp_nano, due.delta_femto):
            raise _refuse(
                "log-charge",
                f"Entry {entry.sequence} charges dataset {debit.dataset} another amount than its"
                " events cost.",
                entry.sequence,
            )
    return len(body.debits)


def _refuse(reason: str, message: str, place: int) -> ReceiptError:
    return ReceiptError(
        f"receipt.{reason}",
        message,
        mend="Keep this log and do not rely on the server's ledger.",
        where=f"entry {place}",
    )


def verify_receipt_entry(chain: Chain, sequence: int, digest: str) -> None:
    """That a receipt's commit entry stands in the chain. Raises ``receipt.log-absent``."""
    if not (0 <= sequence < len(chain.entries) and chain.entries[sequence].digest == digest):
        raise _refuse("log-absent", "The receipt's entry does not stand in this log.", sequence)
