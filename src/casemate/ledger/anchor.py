"""The rule by which a hardware anchor tells an old state from the newest one. No I/O of its own.

An anchor keeps 32 bytes outside the operator's reach and changes them in one way only: ``extend``
makes SHA-256(value || step) of them. A state moves it in three moments:

1. in the transaction that appends the entry, the store keeps a :class:`Mark`: the value it found
   (``before``) and the step that it is going to take, which no other state can have;
2. when that is durable, :func:`move` takes the step, and sees that no one else took one;
3. only then may anything that follows from the entry be seen outside.

So the anchor holds either what the newest mark left from or what it leads to; the first is a crash
between 1 and 2, and :func:`resume` takes the step before anything else. Whatever else it holds, the
state is older than the anchor, or beside it: :func:`check`.

A bare counter does not do. Let a state that recorded ``r`` be stopped before the counter moves and
put aside; a copy of its predecessor records ``r`` too, moves the counter, and spends. The state put
aside now agrees with the counter and knows nothing of it. Told apart from an honest crash it can
only be by *which* state moved the anchor (Parno et al., "Memoir", IEEE S&P 2011, section 4, keep a
digest of the history for the same reason): tests/attacks/test_anchor.py finds this attack.

What is covered is what lies before the last mark. A state that never had one can be restored by who
takes the anchor away.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import Final, Protocol

from casemate.seams import Rng
from casemate.spec.errors import LedgerError

BYTES: Final = 32


class Anchor(Protocol):
    @property
    def name(self) -> str:
        """Which anchor it is, the same for its life; public."""

    def read(self) -> bytes | None:
        """The value, 32 bytes, or None where it has none yet. Raises ``ledger.anchor-foreign`` for
        one that is not this state's."""

    def begin(self, base: bytes) -> None:
        """Give it a first value, which follows from 32 bytes that were never used before."""

    def extend(self, step: bytes) -> None:
        """The value becomes SHA-256(value || step), durably, before this returns."""


def _sized(what: str, data: bytes) -> None:
    if len(data) != BYTES:
        raise ValueError(f"{what} has {len(data)} bytes, not {BYTES}")


@dataclass(frozen=True, slots=True)
class Mark:
    """What a state records before it moves the anchor. ``count``: how many times the state has
    moved it, with this one; for people, and for the log. ``before`` and ``step``: 32 bytes."""

    name: str
    count: int
    before: bytes
    step: bytes

    def __post_init__(self) -> None:
        _sized("before", self.before)
        _sized("step", self.step)

    @property
    def after(self) -> bytes:
        return hashlib.sha256(self.before + self.step).digest()


@dataclass(frozen=True, slots=True)
class Stand:
    """Where the anchor is known to stand: ``value`` has 32 bytes."""

    name: str
    count: int
    value: bytes

    def mark(self, step: bytes) -> Mark:
        """For the next entry. ``step``: 32 bytes that no other state would take from here, say the
        root of the log with that entry in it."""
        return Mark(self.name, self.count + 1, self.value, step)


def rolled_back(name: str, message: str) -> LedgerError:
    """``ledger.rolled-back``."""
    return LedgerError(
        "ledger.rolled-back",
        message,
        mend="Start from the newest state, or let the owners consent to a recovery.",
        where=name,
    )


def foreign(name: str, message: str) -> LedgerError:
    """``ledger.anchor-foreign``: this anchor is not the state's."""
    return LedgerError(
        "ledger.anchor-foreign",
        message,
        mend="Start on the machine whose anchor it is, or let the owners consent to a recovery; two"
        " servers on one TPM need an NV index each.",
        where=name,
    )


def missing(name: str, message: str) -> LedgerError:
    """``ledger.anchor-missing``."""
    return LedgerError(
        "ledger.anchor-missing",
        message,
        mend="Give the server its anchor back, or let the owners consent to a recovery.",
        where=name,
    )


def check(recorded: Mark, name: str, found: bytes | None) -> bool:
    """Whether the step of the newest mark is still to be taken; ``found`` is what the anchor
    ``name`` holds.

    Raises ``ledger.rolled-back``, ``ledger.anchor-foreign``, ``ledger.anchor-missing``.
    """
    if name != recorded.name:
        raise foreign(name, f"The state is anchored in {recorded.name}, not in {name}.")
    if found is None:
        raise missing(name, f"The anchor {name} has been removed; the state moved it last.")
    if found == recorded.after:
        return False
    if found == recorded.before:
        return True
    raise rolled_back(
        name,
        f"The state has moved its anchor {recorded.count} times and the anchor holds another value:"
        " the state is older than the anchor, or a copy of it has gone on.",
    )


def resume(anchor: Anchor | None, recorded: Mark | None, rng: Rng) -> Stand | None:
    """At a start, before the state does anything: where the anchor stands, with the step of a crash
    finished, or None where there is none and none was ever recorded.

    ``recorded``: the newest mark of the state; None too after the owners' consent to a recovery.
    Raises what :func:`check` raises, and what the anchor does.
    """
    if anchor is None:
        if recorded is not None:
            raise missing(
                recorded.name, f"The state is anchored in {recorded.name}, and no anchor is there."
            )
        return None
    found = anchor.read()
    if recorded is None:
        return Stand(anchor.name, 0, _begun(anchor, rng) if found is None else found)
    if check(recorded, anchor.name, found):
        return move(anchor, recorded)
    return Stand(anchor.name, recorded.count, recorded.after)


def _begun(anchor: Anchor, rng: Rng) -> bytes:
    """A first value that no earlier life of the anchor had."""
    anchor.begin(rng.bytes(BYTES))
    found = anchor.read()
    if found is None:
        raise missing(anchor.name, f"The anchor {anchor.name} keeps no value.")
    return found


def move(anchor: Anchor, mark: Mark) -> Stand:
    """Take the step of a mark that is durable. On any error the state may not go on: whether the
    step was taken, only the next start's :func:`resume` can tell.

    Not idempotent, on purpose: of two copies of a state only one sees its own step succeed. Raises
    ``ledger.rolled-back`` for the other.
    """
    if anchor.read() != mark.before:
        raise _moved(mark)
    anchor.extend(mark.step)
    if anchor.read() != mark.after:
        raise _moved(mark)
    return Stand(mark.name, mark.count, mark.after)


def _moved(mark: Mark) -> LedgerError:
    return rolled_back(
        mark.name,
        f"Another enclave has moved the anchor since this state moved it for the"
        f" {mark.count - 1}. time: a copy of the state has gone on.",
    )
