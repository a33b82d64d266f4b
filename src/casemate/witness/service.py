"""One witness: its key, its logs and its state, behind one lock.

Checking the old size and keeping the new checkpoint are one step, and nothing is said before what
is said is durable. After an error of the disk it answers nothing more: only a new start sees what
the disk really holds.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any, Final

from casemate.seal import checkpoint, note
from casemate.seal.checkpoint import Checkpoint
from casemate.seal.identity import Identity
from casemate.seal.note import Note, Verifier
from casemate.seams import Clock, Disk
from casemate.spec.errors import LedgerError
from casemate.witness import state
from casemate.witness.decide import TEXT, Accepted, Answer, Refused, decide
from casemate.witness.state import Evidence

Event = Callable[[dict[str, Any]], None]
_LAST_SECOND: Final = (1 << 63) - 1


def verifier(identity: Identity) -> Verifier:
    """The key that a witness cosigns with: its identity's name and Ed25519 key, type 0x04."""
    return Verifier(note.check_name(identity.name), note.COSIGNATURE, identity.public.sign_key)


class Witness:
    """Opened on its state. Raises LedgerError ``ledger.witness-*``.

    All methods may be called from any thread.
    """

    def __init__(
        self, disk: Disk, identity: Identity, clock: Clock, event: Event = lambda _: None
    ) -> None:
        self._disk = disk
        self._identity = identity
        self._clock = clock
        self._event = event
        self._lock = threading.Lock()
        self.key: Final = verifier(identity)
        found = state.load(disk, self.key)
        self._logs = {log.name: log for log in found}
        self._newest = {log.name: newest for log, newest in found.items()}
        self._heads = {
            name: checkpoint.head(n.text) for name, n in self._newest.items() if n is not None
        }
        self.broken: LedgerError | None = None

    def add_checkpoint(self, body: bytes) -> Answer:
        """The answer to ``POST add-checkpoint``. Raises LedgerError ``ledger.witness-stopped``."""
        with self._lock:
            if self.broken is not None:
                raise self.broken
            try:
                found = decide(self._heads, body, self._logs)
                if isinstance(found, Accepted):
                    return self._accept(found.head, found.signed)
                return self._refuse(found, body)
            except LedgerError as e:
                self.broken = e
                raise

    def _accept(self, head: Checkpoint, signed: Note) -> Answer:
        name, key, sign = self.key.name, self.key.key, self._identity.sign
        line = note.cosign(signed.text, name, key, sign, self._seconds())
        before = self._newest[head.origin]
        if before is None or before.text != signed.text:  # else a newer time of what is kept
            newest = signed.add([line])
            state.save(self._disk, self._logs[head.origin], newest)
            self._newest[head.origin], self._heads[head.origin] = newest, head
        self._event({"event": "cosigned", "log": head.origin, "size": head.size})
        return Answer(200, TEXT, str(line).encode())

    def _refuse(self, found: Refused, body: bytes) -> Answer:
        origin = found.log.name if found.log is not None else ""
        self._event({"event": "refused", "log": origin, "status": found.answer.status})
        if found.log is not None and found.suspicion:
            accusation = Evidence(
                log=str(found.log),
                kind=found.suspicion,
                held=str(self._newest[origin]),
                request=body.decode(),
                seconds=self._seconds(),
            )
            if state.keep_evidence(self._disk, accusation):
                self._event({"event": found.suspicion, "log": origin})
        return found.answer

    def _seconds(self) -> int:
        return min(max(0, int(self._clock.wall())), _LAST_SECOND)

    def newest(self, origin: str) -> str | None:
        """The newest checkpoint of a log that was cosigned, as a signed note; None when none."""
        with self._lock:
            found = self._newest.get(origin)
            return str(found) if found is not None else None

    def about(self) -> dict[str, Any]:
        """See :func:`casemate.witness.state.about`."""
        with self._lock:
            newest = {log: self._newest[log.name] for log in self._logs.values()}
            return state.about(self._disk, self.key, newest)
