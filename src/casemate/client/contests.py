"""Contests: the leaderboard, made of receipts that anyone can verify offline."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Final

from casemate.client import receipts, views
from casemate.client.connection import Connection
from casemate.client.heads import Witnesses
from casemate.client.receipts import VerifiedReceipt
from casemate.spec import codec
from casemate.spec.errors import ReceiptError
from casemate.spec.receipt import Leaderboard, Receipt, rank

if TYPE_CHECKING:
    from casemate.attest.trust import Trust
    from casemate.client.memory import Memory

MAX_BYTES: Final = 64 << 20


@dataclass(frozen=True, slots=True)
class Board:
    """A leaderboard whose receipts hold: ``entries``, the best first; ``source`` for a file."""

    source: Leaderboard
    entries: tuple[VerifiedReceipt, ...]

    def save(self, path: str | Path) -> None:
        """Write what :func:`load` reads and anyone can verify."""
        Path(path).write_bytes(codec.encode(self.source) + b"\n")

    def shown(self) -> tuple[str, tuple[str, ...], list[tuple[object, ...]]]:
        """Title, head and rows of the table."""
        names = [m.name for m in self.entries[0].receipt.metrics] if self.entries else []
        title = f"Contest on {self.source.dataset}: {len(self.entries)} participant(s)"
        if (logs := len({e.receipt.log for e in self.entries})) > 1:
            title = f"{title}, of {logs} logs"
        if any(e.simulated for e in self.entries):
            title = f"SIMULATED: {title}"
        rows: list[tuple[object, ...]] = [
            (
                place,
                entry.receipt.scientist,
                *(f"{score:.5g}" for score in entry.receipt.scores),
                entry.receipt.model_digest[7:23] + "…",
                entry.receipt.job,
            )
            for place, entry in enumerate(self.entries, 1)
        ]
        return title, ("", "participant", *names, "model", "job"), rows

    def __str__(self) -> str:
        return views.as_text(*self.shown())

    __repr__ = __str__

    def _repr_html_(self) -> str:
        return views.as_html(*self.shown())


def fetch(connection: Connection, dataset: str, trust: Trust, *, recovered: bool = False) -> Board:
    """The leaderboard as the server gives it, verified."""
    path = f"/v1/datasets/{dataset}/leaderboard"
    source = connection.request("GET", path, limit=MAX_BYTES).value(Leaderboard)
    connection.sync()  # the receipts' heads are newer than the one seen at the beginning
    if source.dataset != dataset:
        raise _refuse("The leaderboard is of another dataset.", source.dataset)
    return verify(source, trust, connection.memory, recovered=recovered)


def load(path: str | Path) -> Leaderboard:
    """A saved leaderboard, not yet verified. Raises ``UsageError``, ``FormatError``."""
    mend = "Name a file that `casemate contest board --out` wrote."
    return receipts.read_value(Leaderboard, path, MAX_BYTES, mend)


def verify(
    source: Leaderboard,
    trust: Trust,
    memory: Memory | None = None,
    *,
    witnesses: Witnesses = Witnesses(),  # noqa: B008 - a frozen value
    recovered: bool = False,
) -> Board:
    """Check each receipt, that all are of one contest, each of another participant, and in order.

    All stand in one log, since each enclave with the rows counts entries by itself; ``recovered``
    admits several, of a state that was restored with its owners' consent. Whether an entry was left
    out no list can prove: who is missed has the receipt that shows it.
    Raises ``ReceiptError`` ``receipt.leaderboard``, and as :func:`receipts.verify_receipt`.
    """
    found = tuple(
        receipts.verify_receipt(b, trust=trust, memory=memory, witnesses=witnesses)
        for b in source.entries
    )
    entries = [entry.receipt for entry in found]
    for receipt in entries:
        if [d.dataset for d in receipt.datasets] != [source.dataset] or not receipt.target:
            raise _refuse("A receipt is about another thing than this contest.", receipt.job)
        if _rules(receipt) != _rules(entries[0]):
            raise _refuse("Two entries were scored by different rules.", receipt.job)
        if receipt.log != entries[0].log and not recovered:
            raise ReceiptError(
                "receipt.leaderboard",
                f"Entries stand in two logs, {entries[0].log} and {receipt.log}: other enclaves"
                " may have taken more of them than the contest allows.",
                mend="If the enclave's state was recovered, as its log then says: --recovered,"
                " recovered=True. Else do not rely on it.",
                where=receipt.job,
            )
    if len({r.scientist for r in entries}) != len(entries):
        raise _refuse("A participant stands there twice.", source.dataset)
    if entries != sorted(entries, key=rank):
        raise _refuse("The entries are not in the order of their scores.", source.dataset)
    return Board(source, found)


def _rules(receipt: Receipt) -> tuple[object, ...]:
    """What entries that are compared must have in common."""
    plan = receipt.plan
    part = receipt.datasets[0]
    return (
        receipt.target, receipt.metrics, part.owner, part.units, plan.private,
        plan.noise_multiplier, plan.clip, receipt.guarantee.delta,
    )  # fmt: skip


def _refuse(message: str, where: str) -> ReceiptError:
    return ReceiptError(
        "receipt.leaderboard", message, mend="Fetch the leaderboard again.", where=where
    )
