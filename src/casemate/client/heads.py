"""What can be said of a log's signed head: who cosigned it, and how it stands to another one."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Literal

from casemate.client.memory import Memory, Mirror, Seen, keep
from casemate.seal import checkpoint, note
from casemate.seal.note import Note, Verifier
from casemate.spec.errors import ReceiptError, UsageError


@dataclass(frozen=True, slots=True)
class Check:
    """One step: its name, what it found, and whether it was done at all."""

    name: str
    found: str
    state: Literal["ok", "unchecked", "simulated"] = "ok"


@dataclass(frozen=True, slots=True)
class Witnesses:
    """Whose cosignatures count (C2SP tlog-cosignature), and how many of them are asked for."""

    keys: tuple[Verifier, ...] = ()
    needed: int = 0

    @classmethod
    def of(cls, vkeys: Sequence[str], needed: int | None = None) -> Witnesses:
        """From verifier keys as text; all of them are needed unless ``needed`` says how many.
        Raises ``UsageError`` ``usage.witness``, ``FormatError`` ``format.note``."""
        keys = tuple(dict.fromkeys(map(note.verifier, vkeys)))
        count = len(keys) if needed is None else needed
        if any(k.kind != note.COSIGNATURE for k in keys) or len({k.key for k in keys}) < len(keys):
            raise _usage("A witness is named by a key for cosignatures, and each by its own.")
        if not (0 < count <= len(keys) or count == len(keys) == 0):
            raise _usage(f"{count} of {len(keys)} witnesses cannot be asked for.")
        return cls(keys, count)

    def check(self, signed: Note) -> Check:
        """How many of them cosigned. Raises ``ReceiptError``: ``receipt.witnesses`` when too few
        did, ``receipt.note-signature`` for one that does not verify."""
        if not self.keys:
            others = max(0, len(signed.lines) - 1)
            return Check("witnesses", f"no key given; {others} cosignature(s) stand", "unchecked")
        known = {(k.name, k.id) for k in self.keys}
        lines = tuple(x for x in signed.lines if (x.name, x.id) in known)
        by = note.verify(Note(signed.text, lines), self.keys) if lines else {}
        if len(by) < self.needed:
            missing = ", ".join(k.name for k in self.keys if k not in by)
            raise ReceiptError(
                "receipt.witnesses",
                f"{len(by)} of {len(self.keys)} witnesses cosigned the log's head, {self.needed}"
                f" are asked for; missing: {missing}.",
                mend="Do not rely on it; ask the enclave for a head that they cosigned.",
                where=missing,
            )
        said = ", ".join(f"{k.name} at {_time(seconds)}" for k, seconds in by.items())
        return Check("witnesses", f"{len(by)} of {len(self.keys)} cosigned: {said}")


def _usage(message: str) -> UsageError:
    return UsageError(
        "usage.witness",
        message,
        mend="Give each witness's verifier key (casemate witness show) once.",
    )


def _time(seconds: int | None) -> str:
    try:
        return f"{datetime.fromtimestamp(seconds or 0, UTC):%Y-%m-%dT%H:%M:%SZ}"
    except (OverflowError, ValueError, OSError):
        return f"{seconds} s"


def read(signed: Note, key: bytes) -> Seen:
    """A head by the log's key (32 bytes). Raises ``ReceiptError`` ``receipt.note-*``."""
    by = checkpoint.log_key(checkpoint.read(signed.text).origin, key)
    return Seen(by, signed, checkpoint.verify(signed, by))


def seen_before(head: Seen, memory: Memory | None) -> Check:
    """Whether a head goes with what this client saw of its log, offline.

    Raises ``ReceiptError``: ``receipt.fork`` when it does not (both heads are kept as proof),
    ``receipt.memory``.
    """
    name = "seen before"
    mirror = None if memory is None else memory.mirror(head.key.key)
    known = None if mirror is None else mirror.seen()
    if mirror is None or known is None:
        reason = "nothing is remembered" if mirror is None else "this client has seen nothing of it"
        return Check(name, f"{reason}; `casemate audit sync` fetches the log", "unchecked")
    if head.head.size > known.head.size:
        return Check(
            name,
            f"newer than the {known.head.size} entries that this client has seen;"
            " run `casemate audit sync`",
            "unchecked",
        )
    if not agrees(mirror, head):
        raise mirror.refused(known, head)
    return Check(name, f"the same log of which this client has seen {known.head.size} entries")


def compare(one: Seen, two: Seen, mirrors: Sequence[Mirror], proofs: Path) -> str | None:
    """How two heads of a log stand to each other, by the logs in ``mirrors``: ``equal``,
    ``second-extends-first``, ``first-extends-second``, or ``None`` where none of them reaches far
    enough. Raises ``ReceiptError``: ``receipt.fork`` where both cannot be true (they are kept below
    ``proofs``), ``receipt.note-origin`` for two logs."""
    if one.key != two.key:
        raise ReceiptError(
            "receipt.note-origin",
            f"The heads are of two logs: {one.head.origin} and {two.head.origin}.",
            mend="Compare heads of one log; an enclave shows another one after a recovery only.",
            where=two.head.origin,
        )
    if one.head == two.head:
        return "equal"
    size = max(one.head.size, two.head.size)
    for mirror in mirrors if one.head.size != two.head.size else ():
        known = mirror.seen()
        if known is None or known.key != one.key or known.head.size < size:
            continue
        if agrees(mirror, one) and agrees(mirror, two):
            grew = one.head.size < two.head.size
            return "second-extends-first" if grew else "first-extends-second"
        break
    else:
        if one.head.size != two.head.size:
            return None
    folder = keep(proofs, one, two)
    raise ReceiptError(
        "receipt.fork",
        f"The log was forked: one head has {one.head.size} entries, the other {two.head.size}, and"
        f" they do not go together. Both are kept in {folder}.",
        mend="Send nothing to this enclave; show both files to its operator and to the owners.",
        where=one.head.origin,
    )


def agrees(mirror: Mirror, head: Seen) -> bool:
    """Whether a head that is no newer than the mirror is one of its log."""
    known = mirror.seen()
    same = known is not None and known.head.origin == head.head.origin
    return same and mirror.root(head.head.size) == head.head.root
