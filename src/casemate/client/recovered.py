"""A log that goes on under another name, because owners consented to going on from a restored
state.

The enclave's own entry says so (``recover``: the old log's head, the new name and key), at the
place right behind the restored entries; the enclave asked the owners before it wrote it, and its
evidence binds the new key. Here is seen that nothing else took the old log's place: up to the
restored head, or to what this client saw of it, both logs are one.
"""

from __future__ import annotations

from collections.abc import Callable

from casemate.client.memory import Get, Mirror, Seen
from casemate.seal import checkpoint, tiles
from casemate.seal.note import Verifier
from casemate.seal.tiles import ENTRIES
from casemate.spec import codec, merkle
from casemate.spec.consent import Recovered
from casemate.spec.errors import CasemateError
from casemate.spec.receipt import LogEntry


def _entries(size: int, get: Get) -> list[bytes]:
    out: list[bytes] = []
    for tile in tiles.tiles(size):
        if tile.level == ENTRIES:
            out += tiles.unbundle(tile, get(tile.path))
    return out


def follows(
    before: Mirror, old: Verifier, new: Seen, root: Callable[[int], bytes], get: Get
) -> int:
    """How many entries that were seen of the log ``old`` are not in the log ``new``, which goes on
    from it by recoveries; -1 where it does not.

    ``before``: what was seen of the old log; ``root``: the new log's at a size; ``get``: its files.
    """
    seen = before.seen()
    try:
        leaves = _entries(new.head.size, get)
        node = merkle.tree(leaves)
        if seen is None or merkle.root(len(leaves), node) != new.head.root:
            return -1
        log, shared = old, seen.head.size
        for place, leaf in enumerate(leaves):
            entry = codec.decode(LogEntry, leaf)
            if entry.kind != "recover":
                continue
            body = codec.decode(Recovered, entry.body)
            if body.head.origin != log.name:
                continue
            if (body.head.size, body.head.root) != (place, merkle.root(place, node)):
                return -1
            shared = min(shared, place)
            log = checkpoint.log_key(body.origin, body.key)
    except CasemateError:
        return -1
    if log != new.key or before.root(shared) != root(shared):
        return -1
    return seen.head.size - shared
