"""A log that goes on under another name, because owners consented to going on from a restored
state.

The enclave's own entry says so (``recover``: the old log's head, the new name and key), at the
place right behind the restored entries; the enclave asked the owners before it wrote it, and its
evidence binds the new key. Here is seen that nothing else took the old log's place: up to the
restored head, or to what this client saw of it, both logs are one, and the owners' signatures stand
in it. A recovery on which there were datasets and to which none of their owners consented is not
followed.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from casemate.client.memory import Get, Mirror, Seen
from casemate.client.replay import RECOVERING, consented
from casemate.seal import checkpoint, note, tiles
from casemate.seal.note import Verifier
from casemate.seal.tiles import ENTRIES
from casemate.spec import codec, merkle
from casemate.spec.consent import Recovered, RecoveryConsent
from casemate.spec.errors import CasemateError
from casemate.spec.log import BODIES
from casemate.spec.receipt import LogEntry


def _entries(size: int, get: Get) -> list[bytes]:
    out: list[bytes] = []
    for tile in tiles.tiles(size):
        if tile.level == ENTRIES:
            out += tiles.unbundle(tile, get(tile.path))
    return out


@dataclass(slots=True)
class _Words:
    """``owners``: of the datasets that were neither revoked nor dropped. ``waiting``: those of the
    last recovery, ``last``, without consent; ``said``: whose consents it has."""

    owners: dict[str, str] = field(default_factory=dict)
    last: Recovered | None = None
    waiting: set[str] = field(default_factory=set)
    said: set[str] = field(default_factory=set)

    @property
    def silent(self) -> bool:
        return bool(self.waiting) and not self.said

    def read(self, entry: LogEntry) -> None:
        """Take in the next entry."""
        body: Any = codec.decode(BODIES[entry.kind], entry.body)
        if entry.kind == "register":
            self.owners[body.dataset] = body.owner
        elif entry.kind == "revoke":
            self._forget(body.dataset)
        elif entry.kind == "handover":
            for name in body.dropped:
                self._forget(name)
        elif entry.kind == "recover":
            self.last, self.waiting, self.said = body, set(self.owners), set()
        elif entry.kind == "consent":
            self._consent(*consented(body))

    def _forget(self, dataset: str) -> None:
        self.owners.pop(dataset, None)
        self.waiting.discard(dataset)

    def _consent(self, owner: str, signed: Any) -> None:
        last = self.last
        if not isinstance(signed, RecoveryConsent) or last is None:
            return
        named = (last.head, last.origin) == (signed.head, signed.next)
        if named and signed.dataset in self.waiting and self.owners[signed.dataset] == owner:
            self.waiting.discard(signed.dataset)
            self.said.add(owner)

    def say(self) -> None:
        """Whose consents they are: of one owner is enough to go on, and whoever has the enclave may
        be an owner too."""
        who = " ".join(sorted(self.said)) or "nobody: there was no dataset"
        warnings.warn(
            f"Consents to the recovery are of {who}. {len(self.waiting)} datasets wait for theirs.",
            stacklevel=4,
        )


def follows(
    before: Mirror, old: Verifier, new: Seen, root: Callable[[int], bytes], get: Get
) -> int:
    """How many entries that were seen of the log ``old`` are not in the log ``new``, which goes on
    from it by recoveries; -1 where it does not.

    ``before``: what was seen of the old log; ``root``: the new log's at a size; ``get``: its files.
    Warns of whose consents let it go on.
    """
    seen = before.seen()
    try:
        leaves = _entries(new.head.size, get)
        node = merkle.tree(leaves)
        if seen is None or merkle.root(len(leaves), node) != new.head.root:
            return -1
        log, shared, words = old, seen.head.size, _Words()
        for place, leaf in enumerate(leaves):
            entry = codec.decode(LogEntry, leaf)
            if words.silent and entry.kind not in RECOVERING:
                return -1
            words.read(entry)
            if entry.kind != "recover":
                continue
            body = codec.decode(Recovered, entry.body)
            if body.head.origin != log.name:
                continue
            if (body.head.size, body.head.root) != (place, merkle.root(place, node)):
                return -1
            if body.newest is not None:
                checkpoint.verify(note.parse(body.newest), log)
            shared = min(shared, place)
            log = checkpoint.log_key(body.origin, body.key)
    except CasemateError:
        return -1
    if words.silent or log != new.key or before.root(shared) != root(shared):
        return -1
    words.say()
    return seen.head.size - shared
